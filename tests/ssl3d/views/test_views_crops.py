import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.errors import DataError
from ssl3d.rng import numpy_rng
from ssl3d.views.crops import (
    draw_crop,
    draw_overlapping,
    draw_positions,
    fit_size,
    lay_flat,
    neighbour_position,
    read_crop,
    slab_size,
)


class Fake:
    """A volume whose voxels are its foreground; counts what is read."""

    id = "fake"
    has_ignored = False

    def __init__(self, body, block=(8, 8, 8), spacing=(1.0, 1.0, 1.0)):
        self.body, self.block, self.spacing, self.asked = body, block, spacing, 0
        self.shape = (1, *body.shape)
        self.share = self._share()

    def foreground(self):
        return self.share

    def _share(self):
        blocks = [-(-n // b) for n, b in zip(self.body.shape, self.block, strict=True)]
        share = np.zeros(blocks, np.float32)
        for at in np.ndindex(*blocks):
            share[at] = self.body[tuple(slice(i * b, i * b + b) for i, b in zip(at, self.block))].mean()
        return share

    def read(self, start, size):
        self.asked += int(np.prod(size))
        padded = np.pad(self.body.astype(np.float32), 200, constant_values=-1)
        part = padded[tuple(slice(s + 200, s + 200 + n) for s, n in zip(start, size, strict=True))]
        return torch.from_numpy(part.copy())[None]


def blob(shape=(40, 50, 60), start=(8, 16, 24), stop=(32, 40, 48)):
    body = np.zeros(shape, bool)
    body[tuple(slice(a, b) for a, b in zip(start, stop))] = True
    return body


def share(volume, start, size):
    return float((volume.read(start, size) > 0).float().mean())


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.tuples(*[st.integers(1, 30)] * 3), st.floats(0.05, 0.6))
def test_crops_hold_the_share_of_foreground_and_lie_inside(seed, size, least):
    volume = Fake(blob())
    start = draw_crop(volume, size, numpy_rng(seed), least)
    assert all(0 <= s <= n - k for s, n, k in zip(start, volume.body.shape, size, strict=True))
    # The blob fills whole blocks, so the coarse map is exact.
    assert share(volume, start, size) >= least - 1e-6


def test_drawing_reads_no_voxel():
    volume = Fake(blob())
    draw_crop(volume, (16, 16, 16), numpy_rng(0))
    draw_positions(volume, 0, 4, numpy_rng(0))
    assert volume.asked == 0


def test_every_start_that_qualifies_is_as_likely():
    volume = Fake(np.ones((10, 1, 1), bool), block=(4, 4, 4))
    drawn = [draw_crop(volume, (4, 1, 1), numpy_rng(i), 0.5)[0] for i in range(2100)]
    counts = np.bincount(drawn, minlength=7)
    assert len(counts) == 7 and counts.min() > 230 and counts.max() < 370


@pytest.mark.long
def test_a_rare_foreground_is_found_and_else_the_fullest_crop_taken():
    volume = Fake(blob((120, 120, 120), (80, 80, 80), (88, 88, 88)))
    for seed in range(20):
        assert share(volume, draw_crop(volume, (8, 8, 8), numpy_rng(seed), 0.2), (8, 8, 8)) >= 0.2
    start = draw_crop(volume, (32, 32, 32), numpy_rng(0), 0.9)  # no such crop: 8³ of 32³ at best
    assert share(volume, start, (32, 32, 32)) > 0.014


@pytest.mark.parametrize("length,size,expected", [(10, 10, 0), (9, 12, -1), (8, 12, -2), (1, 4, -1)])
def test_small_volumes_are_padded_evenly(length, size, expected):
    volume = Fake(np.ones((length, 20, 20), bool))
    start = draw_crop(volume, (size, 8, 8), numpy_rng(0), 0.5)
    assert start[0] == expected


def test_no_foreground_is_an_error_that_names_the_volume():
    for call in (
        lambda v: draw_crop(v, (4, 4, 4), numpy_rng(0)),
        lambda v: draw_positions(v, 0, 2, numpy_rng(0)),
    ):
        with pytest.raises(DataError, match="fake: has no foreground"):
            call(Fake(np.zeros((10, 10, 10), bool)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.25, 0.5, 0.9]), st.sampled_from([0.0, 0.25, 0.6]))
def test_second_crops_overlap_as_asked(seed, overlap, iou):
    volume, size = Fake(np.ones((40, 50, 60), bool)), np.array((16, 20, 24))
    rng = numpy_rng(seed)
    a = np.array(draw_crop(volume, size, rng))
    b = np.array(draw_overlapping(volume, size, a, rng, overlap, iou))
    along = (size - np.abs(a - b)) / size
    shared = np.prod(np.maximum(along, 0))
    assert (along >= overlap - 1e-9).all() and shared / (2 - shared) >= iou - 1e-9


def test_second_crops_move_unless_asked_to_overlap_wholly():
    volume, size = Fake(np.ones((40, 40, 40), bool)), (16, 16, 16)
    starts = {draw_overlapping(volume, size, (12, 12, 12), numpy_rng(i), 0.5) for i in range(20)}
    assert len(starts) > 15
    assert draw_overlapping(volume, size, (12, 12, 12), numpy_rng(0), 1.0) == (12, 12, 12)


def test_a_fixed_axis_keeps_its_start_in_both_crops():
    volume = Fake(np.ones((40, 40, 40), bool))
    a = draw_crop(volume, (1, 16, 16), numpy_rng(0), fixed={0: 7})
    b = draw_overlapping(volume, (1, 16, 16), a, numpy_rng(0), 0.5, 0.25, fixed={0: 11})
    assert a[0] == 7 and b[0] == 11 and b[1:] != a[1:]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 2),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([0.0, 2.5, 6.0]),
)
def test_positions_keep_their_distance_and_see_something(seed, axis, count, slab, gap):
    volume = Fake(blob((60, 60, 60), (8, 8, 8), (56, 56, 56)), spacing=(2.0, 1.0, 1.5))
    found = draw_positions(volume, axis, count, numpy_rng(seed), slab, gap)
    assert len(found) == count
    apart = np.diff(found)
    assert (apart >= slab).all() and (apart * volume.spacing[axis] >= gap - 1e-9).all()
    assert found.min() > 8 - slab and found.max() < 56


def test_every_set_of_positions_is_as_likely():
    volume = Fake(np.ones((7, 4, 4), bool), block=(2, 4, 4))
    sets = [tuple(draw_positions(volume, 0, 3, numpy_rng(i), min_gap_mm=2.0)) for i in range(2000)]
    found = {key: sets.count(key) for key in set(sets)}
    assert len(found) == 10  # C(7 - 2, 3)
    assert min(found.values()) > 140 and max(found.values()) < 270


def test_too_many_slabs_are_refused_with_both_numbers():
    volume = Fake(np.ones((20, 8, 8), bool), spacing=(3.0, 1.0, 1.0))
    with pytest.raises(DataError, match=r"fake: 8 slabs .* along D, need 105 mm .* has 57 mm"):
        draw_positions(volume, 0, 8, numpy_rng(0), min_gap_mm=15.0)


def test_neighbours_stay_within_the_distance():
    volume = Fake(np.ones((30, 8, 8), bool), spacing=(2.0, 1.0, 1.0))
    near = {neighbour_position(volume, 0, 10, numpy_rng(i), 1, 5.0) for i in range(60)}
    assert near == {8, 9, 10, 11, 12}
    assert neighbour_position(volume, 0, 10, numpy_rng(0), 1, 0.0) == 10


def test_images_give_crops_of_depth_one():
    assert fit_size(Fake(np.ones((1, 30, 30), bool)), (32, 16, 16)) == (1, 16, 16)
    assert fit_size(Fake(np.ones((2, 30, 30), bool)), (32, 16, 16)) == (32, 16, 16)
    for batch in (torch.zeros(4, 2, 1, 30, 30), torch.zeros(4, 1, 30, 30)):  # images, and their masks
        assert fit_size(batch, (32, 16, 16)) == (1, 16, 16)
    assert fit_size(torch.zeros(1, 1, 2, 30, 30), (32, 16, 16)) == (32, 16, 16)


def test_slabs_and_triples_are_laid_flat_alike():
    assert slab_size(1, 3, (10, 20)) == (10, 3, 20)
    assert lay_flat((10, 3, 20), 1) == (3, 10, 20)


def test_a_margin_is_read_on_every_side():
    volume = Fake(blob())
    assert read_crop(volume, (0, 0, 0), (8, 8, 8), (1, 2, 3)).shape == (1, 10, 12, 14)
