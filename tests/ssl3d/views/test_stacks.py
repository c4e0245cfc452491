"""Stacks of slices: in order, apart, within the volume."""

import itertools

import numpy as np
import pytest

from ssl3d.rng import numpy_rng
from ssl3d.views.stacks import draw_stack


class Box:
    """A volume that is all foreground."""

    def __init__(self, depth, spacing=1.0):
        self.shape, self.spacing, self.id = (1, depth, 32, 32), (spacing, 1.0, 1.0), "box"

    def foreground_box(self):
        return (0, 0, 0), self.shape[1:]


@pytest.mark.parametrize("stack", ["spread", "random", "block"])
@pytest.mark.parametrize("slab", [1, 3])
@pytest.mark.parametrize("depth", [3, 4, 7, 12, 20, 41])
def test_stacks_lie_in_the_volume_without_overlap(stack, slab, depth):
    seen = set()
    for seed in range(30):
        starts, places = draw_stack(Box(depth), 0, 6, slab, numpy_rng(seed), stack)
        assert len(starts) == min(6, depth // slab)
        assert min(starts) >= 0 and max(starts) + slab <= depth
        assert all(b - a >= slab for a, b in itertools.pairwise(starts))
        assert all(0 <= place <= 1 for place in places)
        seen |= set(starts)
    if depth == 20 and slab == 1:
        assert seen == set(range(20))


def test_a_block_has_regular_steps_in_mm():
    starts, _ = draw_stack(Box(40, spacing=2.0), 0, 4, 1, numpy_rng(0), "block", step_mm=6.0)
    assert np.diff(starts).tolist() == [3, 3, 3]
    starts, _ = draw_stack(Box(7, spacing=2.0), 0, 4, 1, numpy_rng(0), "block", step_mm=6.0)  # closer
    assert np.diff(starts).tolist() == [2, 2, 2]


def test_a_spread_stack_reaches_from_end_to_end():
    starts, _ = draw_stack(Box(50), 0, 5, 1, numpy_rng(1))
    assert starts[0] < 10 and starts[-1] >= 40 and set(np.diff(starts)) <= {9, 10, 11}
