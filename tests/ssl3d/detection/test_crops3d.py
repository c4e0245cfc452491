"""Crops with boxes: where they are drawn, and that boxes go where the voxels go."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.api import BoxViews3d, draw_boxed3d, move_boxed3d, numpy_rng, one_group
from ssl3d.detection.crops3d import flip_boxed3d, zoom_boxed3d

QUIET = {"zoom": 0.0, "intensity": 0.0, "axes": ()}


class Scan:
    """A volume in memory: dark, with a bright block where each box is."""

    id, block, has_ignored = "scan", (8, 8, 8), False

    def __init__(self, shape, boxes):
        self.shape = (1, *shape)
        self.boxes = np.array(boxes, np.float32).reshape(-1, 6)
        self.image = np.zeros(shape, np.float32)
        for z1, y1, x1, z2, y2, x2 in self.boxes.astype(int):
            self.image[z1:z2, y1:y2, x1:x2] = 1.0

    def foreground(self):
        return np.ones([-(-n // b) for n, b in zip(self.shape[1:], self.block, strict=True)], np.float32)

    def read(self, start, size):
        out = np.zeros(size, np.float32)
        take, put = [], []
        for begin, length, limit in zip(start, size, self.shape[1:], strict=True):
            low, high = max(begin, 0), max(min(begin + length, limit), max(begin, 0))
            take.append(slice(low, high))
            put.append(slice(low - begin, high - begin))
        out[tuple(put)] = self.image[tuple(take)]
        return torch.from_numpy(out)[None]


def drawn(config, scan, size, seed):
    labels = np.arange(len(scan.boxes))
    return draw_boxed3d(config, scan, scan.boxes, labels, size, numpy_rng("crop", seed))


def batched(config, scan, size, seed, training=True):
    batch = {name: value[None] for name, value in drawn(config, scan, size, seed).items()}
    return move_boxed3d(config, batch, size, one_group(seed, 1), training)


def extent(image):
    where = torch.nonzero(image[0] > 0.5)
    return [*where.amin(0).tolist(), *(where.amax(0) + 1).tolist()]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([(16, 16, 16), (12, 20, 16)]),
    shape=st.sampled_from([(24, 30, 28), (10, 40, 13), (40, 18, 50)]),
)
def test_crops_hold_the_object_and_its_box(seed, size, shape):
    rng = np.random.default_rng(seed)
    low = [int(rng.integers(0, n - 5)) for n in shape]
    scan = Scan(shape, [[*low, low[0] + 4, low[1] + 5, low[2] + 3]])
    moved = batched(BoxViews3d(around=1.0, **QUIET), scan, size, seed)
    assert moved.images.shape[2:] == size
    assert moved.boxes[0].tolist() == [pytest.approx(extent(moved.images[0]))]
    sides = moved.boxes[0][0, 3:] - moved.boxes[0][0, :3]
    assert sides.tolist() == [4, 5, 3]  # whole


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_mirrored_boxes_are_where_the_mirrored_object_is(seed):
    scan = Scan((24, 24, 24), [[3, 6, 10, 8, 9, 17]])
    moved = batched(BoxViews3d(around=1.0, zoom=0.0, intensity=0.0), scan, (20, 16, 18), seed)
    assert moved.boxes[0].tolist() == [pytest.approx(extent(moved.images[0]))]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(24, 24, 24), (1, 28, 28)]))
def test_zoomed_boxes_are_where_the_zoomed_object_is(seed, shape):
    depth = min(shape[0], 10)
    scan = Scan(shape, [[0, 8, 9, depth, 18, 17]])
    size = (min(shape[0], 16), 20, 20)
    moved = batched(BoxViews3d(around=1.0, zoom=0.3, intensity=0.0, visible=0.9), scan, size, seed)
    if not len(moved.boxes[0]):
        return
    box = moved.boxes[0][0]
    assert np.abs(np.array(extent(moved.images[0])) - box.numpy()).max() < 1.1
    assert box[0] == 0 or shape[0] > 1
    if shape[0] == 1:
        assert (box[0], box[3]) == (0, 1)


def test_objects_are_not_always_in_the_middle():
    scan = Scan((40, 40, 40), [[18, 18, 18, 22, 22, 22]])
    config = BoxViews3d(around=1.0, **QUIET)
    places = {
        tuple(batched(config, scan, (16, 16, 16), seed).boxes[0][0, :3].tolist()) for seed in range(40)
    }
    assert len(places) > 30
    assert {min(p) for p in places} <= set(range(13))


def test_some_crops_lie_anywhere():
    scan = Scan((60, 60, 60), [[2, 2, 2, 6, 6, 6]])
    held = [
        len(batched(BoxViews3d(around=p, **QUIET), scan, (8, 8, 8), s).boxes[0])
        for p in (0, 1)
        for s in range(20)
    ]
    assert sum(held[:20]) < 5 and sum(held[20:]) == 20


def test_boxes_that_are_mostly_outside_are_not_asked_for():
    config = BoxViews3d(**QUIET, visible=0.5)
    boxes = torch.tensor([[[-3.0, 0, 0, 2, 4, 4], [-2, 0, 0, 2, 4, 4], [7.5, 0, 0, 12, 8, 8]]])
    batch = {
        "image": torch.zeros(1, 1, 8, 8, 8),
        "boxes": boxes,
        "labels": torch.tensor([[0, 1, 2]]),
        "count": torch.tensor([3]),
    }
    moved = move_boxed3d(config, batch, (8, 8, 8), one_group(0, 1))
    assert moved.boxes[0].tolist() == [[0, 0, 0, 2, 4, 4]]
    assert moved.labels[0].tolist() == [1]


def test_an_object_larger_than_the_crop():
    scan = Scan((40, 40, 40), [[5, 5, 5, 35, 35, 35]])
    moved = batched(BoxViews3d(around=1.0, **QUIET, visible=0.05), scan, (16, 16, 16), 0)
    assert moved.images.mean() > 0.5
    assert len(moved.boxes[0]) == 1


def test_more_boxes_than_asked_for():
    scan = Scan((16, 16, 16), [[n, n, n, n + 2, n + 2, n + 2] for n in range(10)])
    found = drawn(BoxViews3d(around=0.0, most=4, **QUIET), scan, (16, 16, 16), 0)
    assert found["boxes"].shape == (4, 6) and found["count"] == 4
    assert found["labels"].tolist() == sorted(found["labels"].tolist())


def test_crops_follow_from_the_generator():
    scan = Scan((40, 40, 40), [[5, 5, 5, 15, 15, 15]])
    one, two = (drawn(BoxViews3d(), scan, (16, 16, 16), 5) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_training_nothing_is_augmented():
    scan = Scan((24, 24, 24), [[8, 8, 8, 12, 12, 12]])
    config = BoxViews3d(around=1.0)
    batch = {name: value[None] for name, value in drawn(config, scan, (16, 16, 16), 3).items()}
    kept = {name: value.clone() for name, value in batch.items()}
    still = move_boxed3d(config, batch, (16, 16, 16), one_group(0, 1), training=False)
    assert still.boxes[0].tolist() == [pytest.approx(extent(still.images[0]))]
    move_boxed3d(config, batch, (16, 16, 16), one_group(0, 1))
    assert all(torch.equal(batch[name], kept[name]) for name in batch)


def test_two_flips_are_none():
    x, boxes = torch.randn(2, 1, 4, 5, 6), torch.rand(2, 3, 6).sort(dim=2).values * 4
    chosen = torch.tensor([True, False])
    for axis in range(3):
        once = flip_boxed3d(x, boxes, chosen, axis)
        assert torch.equal(once[0][1], x[1]) and torch.equal(once[1][1], boxes[1])
        again = flip_boxed3d(*once, chosen, axis)
        torch.testing.assert_close(again[0], x)
        torch.testing.assert_close(again[1], boxes)


def test_zoom_of_one_changes_nothing():
    x, boxes = torch.randn(1, 1, 8, 8, 8), torch.tensor([[[1.0, 2, 3, 4, 5, 6]]])
    y, moved = zoom_boxed3d(x, boxes, torch.ones(1), (4, 4, 4))
    assert torch.equal(y, x[:, :, 2:6, 2:6, 2:6])
    assert moved.tolist() == [[[-1, 0, 1, 2, 3, 4]]]


@pytest.mark.parametrize(
    "options", [{"around": 2}, {"visible": 0}, {"most": 0}, {"axes": (3,)}, {"zoom": -1}, {"intensity": 2}]
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BoxViews3d(**options)
