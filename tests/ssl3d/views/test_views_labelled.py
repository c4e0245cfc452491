"""Crops with a mask: image and mask move alike, and rare structures are met."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.api import (
    BatchRng,
    DataError,
    Views,
    augment,
    augment_labelled,
    dataset_labels,
    draw_labelled,
    mask_places,
    mask_values,
    numpy_rng,
    one_group,
    read_labelled,
    view_margin,
)
from ssl3d.data.open import open_data
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part

MOVING = {"blur": 0.0, "bias": 0.0, "gamma": 0.0, "contrast": 0.0, "noise": 0.0}


def ramp(batch, size, axis):
    """Every voxel holds its place along an axis, as grey value and as label."""
    at = torch.arange(size[axis]).view([-1 if a == axis else 1 for a in range(3)])
    return at.expand(batch, 1, *size).float().contiguous(), at.expand(batch, *size).int().contiguous()


@given(
    seed=st.integers(0, 999),
    axis=st.integers(0, 2),
    size=st.sampled_from([(16, 16, 16), (12, 16, 16), (9, 14, 11), (1, 16, 16)]),
    chance=st.sampled_from((0.0, 0.5, 1.0)),
    flip=st.sampled_from((0.0, 0.5)),
    turn=st.sampled_from((0.0, 0.7)),
    shift=st.sampled_from((0.0, 0.2)),
    thick=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_mask_that_is_the_image_rounded_stays_so(seed, axis, size, chance, flip, turn, shift, thick):
    views = Views(
        chance=chance, flip=flip, turn=turn, shift=shift, rotate=25.0, scale=0.3, stretch=0.1, **MOVING
    )
    margin = view_margin(views, size)
    whole = tuple(n + 2 * m for n, m in zip(size, margin))
    x, mask = ramp(4, whole, axis)
    before = x.clone(), mask.clone()
    spacing = torch.tensor([[3.0, 1.0, 1.0]] * 4) if thick else None
    image, moved = augment_labelled(views, x, mask, one_group(seed, 4), size, spacing)
    assert torch.equal(x, before[0]) and torch.equal(mask, before[1])
    assert image.shape == (4, 1, *size) and moved.shape == (4, *size) and moved.dtype == torch.int32
    # Linear sampling of a ramp gives the place itself; the nearest voxel's label is that place, rounded.
    place = image[:, 0]
    clear = (place - place.floor() - 0.5).abs() > 1e-3
    assert clear.float().mean() > 0.9 or not chance
    assert torch.equal(moved[clear], place[clear].round().int())


def test_no_label_is_made_up_between_two():
    x = torch.randn(8, 1, 16, 16, 16)
    mask = torch.where(x[:, 0] > 0, 200, 0).short()
    _, moved = augment_labelled(Views(chance=1.0), x, mask, one_group(0, 8), (12, 12, 12))
    assert moved.dtype == torch.int16 and set(moved.unique().tolist()) == {0, 200}


def test_the_image_is_what_augment_alone_gives():
    # More than fits a core's cache: the image goes through in parts, the mask at once.
    views, x = Views(turn=0.5), torch.randn(5, 1, 56, 56, 56)
    mask = (x[:, 0] > 0).int()
    image, moved = augment_labelled(views, x, mask, one_group(3, 5), (48, 48, 48))
    assert torch.equal(image, augment(views, x, one_group(3, 5), (48, 48, 48)))
    some, labels = augment_labelled(views, x[1::2], mask[1::2], BatchRng(3, (1, 3), 5), (48, 48, 48))
    assert torch.equal(some, image[1::2]) and torch.equal(labels, moved[1::2])


def test_grey_values_may_change_and_labels_do_not():
    x, mask = ramp(6, (16, 16, 16), 1)
    still = Views(chance=1.0, flip=0.0, rotate=0.0, scale=0.0, gamma=0.5, noise=0.5)
    image, moved = augment_labelled(still, x, mask, one_group(0, 6), (16, 16, 16))
    assert torch.equal(moved, mask) and not torch.equal(image, x)


# Drawing ------------------------------------------------------------------------------------------


@pytest.fixture
def volumes(tmp_path):
    """One with a large structure 3 and a single voxel of 7; one with an empty mask; one without."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 40, 36, 44)).astype(np.float32)
    mask = np.zeros((40, 36, 44), np.uint8)
    mask[4:30, 5:30, 6:40] = 3
    mask[33, 31, 2] = 7
    for name, labels in (("a", mask), ("b", mask * 0), ("c", None)):
        write_part(
            tmp_path / "p", name, Record(name, "made", name), image, labels, foreground=np.ones(mask.shape)
        )
    assemble(tmp_path / "p", tmp_path / "s.h5", {}, [])
    return open_data([tmp_path / "s.h5"])


def test_places_are_those_of_the_mask_evenly_drawn(volumes):
    assert mask_values(volumes[0]).tolist() == [0, 3, 7] and mask_values(volumes[1]).tolist() == [0]
    places = mask_places(volumes[0], 2000)
    assert sorted(places) == [3, 7] and places[7].tolist() == [[33, 31, 2]]
    assert len({tuple(voxel) for voxel in places[3].tolist()}) == 2000  # none twice
    mask = volumes[0].read_mask()
    assert (mask[tuple(torch.from_numpy(places[3]).long().T)] == 3).all()
    assert places[3].mean(0) == pytest.approx([16.5, 17, 22.5], abs=0.7)
    assert places[3].min(0).tolist() == [4, 5, 6] and places[3].max(0).tolist() == [29, 29, 39]
    assert mask_places(volumes[1]) == {}
    with pytest.raises(DataError, match="made/c: has no mask"):
        mask_places(volumes[2])


def test_mask_values_are_those_of_every_voxel(tmp_path):
    rng, masks = np.random.default_rng(0), []
    for n in range(24):
        shape = tuple(rng.integers(1, (40, 6, 7)))
        some = rng.choice([0, 1, 2, 7, 255, 256, 65535, 70000], rng.integers(1, 5))
        masks.append(np.sort(rng.choice(some, shape), axis=0) if n % 2 else rng.choice(some, shape))
        record = Record(f"{n:02d}", "made", f"{n}")
        write_part(tmp_path / "p", record.id, record, np.ones((1, *shape), np.float32), masks[-1])
    assemble(tmp_path / "p", tmp_path / "s.h5", {}, [])
    for volume, mask in zip(open_data([tmp_path / "s.h5"]), masks, strict=True):
        found = mask_values(volume)
        assert found.dtype == np.int64 and found.tolist() == np.unique(mask).tolist()


def test_masks_are_looked_through_as_they_are_stored(tmp_path, monkeypatch):
    """Widened to int64 and sorted, a thousand masks of usual size took a quarter of an hour."""
    mask = np.zeros((64, 128, 128), np.uint8)
    mask[20:40, 30:90, 30:90] = 5
    write_part(tmp_path / "p", "a", Record("a", "made", "a"), mask[None].astype(np.float32), mask)
    assemble(tmp_path / "p", tmp_path / "s.h5", {}, [])
    volume = open_data([tmp_path / "s.h5"])[0]
    monkeypatch.setattr(type(volume), "read_mask", None)
    mask_values(volume)
    tracemalloc.start()
    try:
        assert mask_values(volume).tolist() == [0, 5]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 16 * 128 * 128  # of a slab, one byte a voxel; int64 alone is 8


def test_ranks_share_the_masks_out(volumes, monkeypatch):
    from ssl3d.views import labelled

    alone = dataset_labels(volumes)
    read, parts = [], []

    def values_of(volume):
        read.append(volume.id)
        return mask_values(volume)

    def exchanged(into, own):  # what ranks before this one gave, and its own
        parts.append(own)
        into[:] = parts

    monkeypatch.setattr(labelled, "mask_values", values_of)
    monkeypatch.setattr(labelled, "world_size", lambda: 2)
    monkeypatch.setattr(labelled.distributed, "all_gather_object", exchanged)
    for rank in (0, 1):
        monkeypatch.setattr(labelled, "rank", lambda rank=rank: rank)
        both = dataset_labels(volumes)
    assert read == ["a", "b"]  # each by one rank
    assert {code: values.tolist() for code, values in both.items()} == {0: [0, 3, 7]}
    assert list(alone) == [0] and np.array_equal(alone[0], both[0])


def test_crops_hold_each_structure_equally_often(volumes):
    size, held = (8, 8, 8), []
    for n in range(120):
        start = draw_labelled(volumes[0], size, numpy_rng(n), around=1.0)
        assert min(start) >= 0 and all(a + b <= c for a, b, c in zip(start, size, volumes[0].shape[1:]))
        _, mask = read_labelled(volumes[0], start, size)
        held.append((7 in mask, 3 in mask))
        assert mask.shape == size and mask.any()
    rare = np.mean([seven for seven, _ in held])
    assert 0.4 < rare < 0.6
    # Not always in the middle.
    starts = {draw_labelled(volumes[0], size, numpy_rng(n), around=1.0)[0] for n in range(120)}
    assert {26, 27, 28, 29, 30, 31, 32} <= starts


def test_the_rest_of_the_crops_lie_anywhere(volumes):
    size, held = (4, 4, 4), []
    for share in (0.0, 0.5):
        for n in range(200):
            start = draw_labelled(volumes[0], size, numpy_rng(n), share)
            held.append(bool(read_labelled(volumes[0], start, size)[1].any()))
    chance = np.mean(held[:200])
    assert 0.3 < chance < 0.6
    assert np.mean(held[200:]) == pytest.approx((1 + chance) / 2, abs=0.1)
    assert draw_labelled(volumes[1], (4, 4, 4), numpy_rng(0), 1.0)  # nothing to be drawn around


def test_a_small_volume_lies_in_the_middle_of_its_crop(volumes):
    start = draw_labelled(volumes[0], (48, 16, 48), numpy_rng(0), 1.0)
    assert (start[0], start[2]) == (-4, -2)
    image, mask = read_labelled(volumes[0], start, (48, 16, 48), (1, 2, 3))
    assert image.shape == (1, 50, 20, 54) and mask.shape == (50, 20, 54) and mask.dtype == torch.int32
    assert not mask[:5].any() and not mask[-5:].any()
