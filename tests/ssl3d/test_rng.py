"""Draws for the rows of a rank: the numbers of the whole batch, without holding them."""

import pytest
import torch

from ssl3d import rng as module
from ssl3d.rng import BatchRng, one_group

DRAWS = {
    "uniform": lambda rng, *shape: rng.uniform(*shape, low=-1.0, high=2.0),
    "normal": lambda rng, *shape: rng.normal(*shape),
    "chance": lambda rng, *shape: rng.chance(0.3, *shape),
    "integers": lambda rng, *shape: rng.integers(-3, 7, *shape),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("at_once", [2**22, 100, 7])
def test_ranks_see_the_rows_of_one(draw, at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    one = one_group(5, 10)
    for rows in ([0, 1, 2], [7, 3, 4], [9], []):
        part = BatchRng(5, rows, 10)
        for shape in ((), (3,), (2, 9)):  # one after the other: the generator stays in step
            one_draw = draw(one, *shape)
            assert torch.equal(draw(part, *shape), one_draw[rows])
        one = one_group(5, 10)


def test_draws_are_torchs_own_whether_made_by_parts_or_not(monkeypatch):
    def reference():
        generator = torch.Generator().manual_seed(5)
        return (
            torch.rand(40, 2, 8, generator=generator),
            torch.randn(40, 2, 8, generator=generator),
            torch.randint(2, 9, (40, 3), generator=generator),
        )

    for at_once in (2**22, 600, 256):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        rng = one_group(5, 40)
        drawn = rng.uniform(2, 8), rng.normal(2, 8), rng.integers(2, 9, 3)
        assert all(map(torch.equal, drawn, reference()))


def test_a_rank_does_not_hold_the_whole_batch(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 64)
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: sizes.append(shape) or empty(*shape, **how))
    BatchRng(5, [2, 3], 1000).normal(32)
    assert max(rows * width for rows, width in sizes) <= 64
