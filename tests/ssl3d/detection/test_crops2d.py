"""Crops with boxes: what is drawn holds the boxes, and they follow every movement of the pixels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.detection.crops2d import BoxViews, cut_boxes, draw_boxed, flip_boxed, move_boxed, zoom_boxed
from ssl3d.errors import DataError
from ssl3d.rng import BatchRng, one_group


@dataclasses.dataclass
class Drawn:
    """A volume that is bright within its boxes and dark elsewhere."""

    shape: tuple[int, int, int, int]
    boxes: np.ndarray | None
    box_labels: np.ndarray | None
    id: str = "drawn"

    def read(self, start, size):
        whole = torch.zeros(self.shape)
        for z1, y1, x1, z2, y2, x2 in np.asarray(self.boxes).astype(int):
            whole[:, z1:z2, y1:y2, x1:x2] = 1
        out = torch.zeros(self.shape[0], *size)
        for axis in range(3):  # by index, as slow as it is plain
            at = torch.arange(start[axis], start[axis] + size[axis])
            inside = (at >= 0) & (at < self.shape[axis + 1])
            whole = whole.index_select(axis + 1, at.clamp(0, self.shape[axis + 1] - 1))
            whole = whole * inside.view([-1 if a == axis + 1 else 1 for a in range(4)])
        return out + whole


def image(boxes, shape=(1, 1, 80, 100), labels=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    full = np.concatenate(
        [np.zeros((len(boxes), 1)), boxes[:, :2], np.ones((len(boxes), 1)), boxes[:, 2:]], 1
    )
    kinds = np.arange(len(boxes)) if labels is None else np.array(labels)
    return Drawn(shape, full.astype(np.float32), kinds)


def stacked(examples):
    return {name: torch.stack([one[name] for one in examples]) for name in examples[0]}


def bright(x):
    """y1 x1 y2 x2 of what is bright in (C, D, H, W), to half a pixel."""
    mass = x[0, x.shape[1] // 2]
    edges = []
    for axis in (1, 0):
        profile = mass.amax(axis)
        at = torch.nonzero(profile > 0.02)[:, 0]
        # Where interpolation leaves half a pixel, half of it counts.
        edges.append((at[0] + 1 - profile[at[0]], at[-1] + profile[at[-1]]))
    (y1, y2), (x1, x2) = edges
    return torch.stack([y1, x1, y2, x2])


@given(
    y=st.integers(0, 60), x=st.integers(0, 80), h=st.integers(6, 20), w=st.integers(6, 20),
    seed=st.integers(0, 10**6), part=st.sampled_from([0.0, 0.5, 1.5]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_boxes_lie_where_the_pixels_are_after_all_movements(y, x, h, w, seed, part):
    volume = image([[y, x, y + h, x + w]])
    span = (part * 0.9, part) if part else (0.0, 0.0)
    config = BoxViews(crop=(48, 40), span=span, around=1.0, visible=0.01, scale=0.3, intensity=0.0)
    batch = stacked([draw_boxed(config, volume, np.random.default_rng(seed))])
    before = {name: value.clone() for name, value in batch.items()}
    for training in (True, False):
        moved = move_boxed(config, batch, one_group(seed, 1), training)
        assert moved.images.shape == (1, 1, 1, 48, 40)
        if not moved.there[0, 0]:
            continue
        box = moved.boxes[0, 0]
        assert (box[2:] > box[:2]).all()
        # A pixel of slack for interpolation, twice of it where the image is enlarged.
        slack = 1.6 if part != 0.5 else 3.2
        assert (bright(moved.images[0]) - box).abs().max() <= slack
    assert all(torch.equal(batch[name], value) for name, value in before.items())


def test_without_movement_the_crop_is_read_to_the_voxel():
    volume = image([[30, 40, 50, 64]])
    config = BoxViews(crop=(32, 32), around=1.0, scale=0.2, visible=0.01)
    batch = stacked([draw_boxed(config, volume, np.random.default_rng(n)) for n in range(20)])
    moved = move_boxed(config, batch, one_group(0, 20), training=False)
    for n in range(20):
        assert moved.there[n].tolist() == [True] + [False] * 31
        y1, x1, y2, x2 = moved.boxes[n, 0].int().tolist()
        expected = torch.zeros(32, 32)
        expected[y1:y2, x1:x2] = 1
        assert torch.equal(moved.images[n, 0, 0], expected)


def test_crops_around_boxes_hold_one_and_lie_off_centre():
    volume = image([[10, 10, 20, 24]], shape=(1, 1, 200, 200))
    config = BoxViews(crop=(64, 64), around=1.0)
    batch = stacked([draw_boxed(config, volume, np.random.default_rng(n)) for n in range(40)])
    moved = move_boxed(config, batch, one_group(0, 40), training=False)
    middles = (moved.boxes[:, 0, :2] + moved.boxes[:, 0, 2:]) / 2
    assert moved.there[:, 0].all()
    assert ((moved.boxes[:, 0, 2:] - moved.boxes[:, 0, :2]) == torch.tensor([10.0, 14.0])).all()
    assert middles.std(0).min() > 2  # as far as the image's border lets them
    anywhere = dataclasses.replace(config, around=0.0)
    counts = [int(draw_boxed(anywhere, volume, np.random.default_rng(n))["count"]) for n in range(40)]
    assert 0 < sum(counts) < 20


def test_mirroring_twice_changes_nothing_and_a_half_turn_is_both_mirrors():
    x, boxes = torch.rand(3, 1, 2, 20, 30), torch.tensor([[[1.0, 2, 5, 12]]]).repeat(3, 1, 1)
    chosen = torch.tensor([True, False, True])
    for axis in (0, 1):
        once = flip_boxed(x, boxes, chosen, axis)
        twice = flip_boxed(*once, chosen, axis)
        assert torch.equal(twice[0], x) and torch.equal(twice[1], boxes)
        assert torch.equal(once[0][1], x[1]) and not torch.equal(once[0][0], x[0])
    assert flip_boxed(x, boxes, chosen, 0)[1][0].tolist() == [[15, 2, 19, 12]]
    assert flip_boxed(x, boxes, chosen, 1)[1][0].tolist() == [[1, 18, 5, 28]]


def test_a_zoom_enlarges_boxes_about_the_middle():
    x = torch.zeros(1, 1, 1, 40, 40)
    boxes = torch.tensor([[[15.0, 15, 25, 25], [0, 0, 4, 4]]])
    _, moved = zoom_boxed(x, boxes, torch.tensor([2.0]), (20, 20))
    assert moved[0].tolist() == [[0, 0, 20, 20], [-30, -30, -22, -22]]
    assert cut_boxes(moved, (20, 20))[0, 1].tolist() == [0, 0, 0, 0]


def test_boxes_that_are_cut_away_are_not_asked_for():
    config = BoxViews(crop=(20, 20), visible=0.5, scale=0.0)
    boxes = torch.tensor([[[-4.0, 0, 6, 10], [-6, 0, 4, 10], [5, 5, 6, 15], [3, 3, 9, 9]]])
    batch = {
        "crop": torch.zeros(1, 1, 1, 20, 20), "boxes": boxes, "count": torch.tensor([3]),
        "labels": torch.zeros(1, 4, dtype=torch.int64),
    }  # fmt: skip
    moved = move_boxed(config, batch, one_group(0, 1), training=False)
    # More than half left; less than half; a side below 2 pixels; beyond the count.
    assert moved.there.tolist() == [[True, False, False, False]]
    assert moved.boxes[0, 0].tolist() == [0, 0, 6, 10]


def test_views_of_rows_are_those_of_the_whole_batch():
    volume = image([[10, 10, 40, 40]])
    config = BoxViews(crop=(32, 32), around=1.0)
    batch = stacked([draw_boxed(config, volume, np.random.default_rng(n)) for n in range(4)])
    whole = move_boxed(config, batch, one_group(5, 4), True)
    half = move_boxed(config, {k: v[[1, 3]] for k, v in batch.items()}, BatchRng(5, (1, 3), 4), True)
    torch.testing.assert_close(whole.images[[1, 3]], half.images)
    torch.testing.assert_close(whole.boxes[[1, 3]], half.boxes)


def test_slabs_of_volumes_are_asked_for_the_boxes_of_their_middle_slice():
    boxes = np.array([[4, 10, 10, 7, 30, 30], [9, 40, 40, 11, 60, 60]], np.float32)
    volume = Drawn((1, 14, 80, 80), boxes, np.array([5, 6]))
    config = BoxViews(crop=(64, 64), slab=3, around=1.0, scale=0.0)
    seen = set()
    for n in range(30):
        drawn = draw_boxed(config, volume, np.random.default_rng(n))
        assert drawn["crop"].shape == (1, 3, 64, 64)
        lit = bool((drawn["crop"][0, 1] > 0).any())
        assert lit == bool(drawn["count"])
        seen |= set(drawn["labels"][: int(drawn["count"])].tolist())
    assert seen == {5, 6}
    counts = [
        int(draw_boxed(dataclasses.replace(config, around=0.0), volume, np.random.default_rng(n))["count"])
        for n in range(60)
    ]
    assert 0 in counts and 1 in counts  # slices without a lesion too


def test_of_too_many_boxes_some_are_drawn():
    volume = image([[n, n, n + 10, n + 10] for n in range(40)])
    config = BoxViews(crop=(80, 100), most=8, scale=0.0)
    drawn = [draw_boxed(config, volume, np.random.default_rng(n)) for n in range(2)]
    assert [int(one["count"]) for one in drawn] == [8, 8]
    assert drawn[0]["labels"].tolist() != drawn[1]["labels"].tolist()


def test_volumes_without_boxes_known_are_refused_and_those_with_none_are_not():
    with pytest.raises(DataError, match="drawn: nobody looked for boxes"):
        draw_boxed(BoxViews(), Drawn((1, 1, 50, 50), None, None), np.random.default_rng(0))
    drawn = draw_boxed(BoxViews(), image([]), np.random.default_rng(0))
    assert drawn["count"] == 0 and drawn["crop"].shape == (1, 1, 116, 116)


@pytest.mark.parametrize(
    "field,value",
    [
        ("crop", (0, 5)), ("slab", 0), ("span", (1.0, 0.5)), ("around", 1.5), ("visible", 0.0),
        ("least", -1.0), ("most", 0), ("flip", (0.5, 2.0)), ("scale", -0.1), ("intensity", -1.0),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        BoxViews(**{field: value})
