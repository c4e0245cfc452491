"""Corruptions against the released Models Genesis code, typed anew, and what they must keep."""

from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.rng import BatchRng, one_group
from ssl3d.views import corruptions
from ssl3d.views.corruptions import (
    Corruptions,
    bezier,
    bezier_intensity,
    corrupt,
    corrupt_once,
    draw_boxes,
    in_painting,
    local_shuffle,
    out_painting,
    restoration_error,
)

ALL = [bezier_intensity, local_shuffle, in_painting, out_painting]
units = st.floats(0, 1, allow_nan=False)
seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 14), st.integers(1, 40), st.integers(1, 40))


def crops(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# What all of them keep ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ALL)
def test_the_input_is_neither_changed_nor_shared(function):
    x = crops(6, 2, 20, 20, 20)
    before = x.clone()
    y = function(x, one_group(1, 6))
    assert torch.equal(x, before)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert not torch.equal(y, x)


def several(x, rng):
    return corrupt(Corruptions(), x, rng).input


def once(x, rng):
    return corrupt_once(x, rng).input


@pytest.mark.parametrize("function", [*ALL, several, once])
def test_an_example_fares_alike_on_any_number_of_ranks(function):
    x = crops(7, 1, 12, 20, 20)
    whole = function(x, one_group(5, 7))
    for rows in ((0, 2, 4, 6), (1, 3, 5), (3,)):
        part = function(x[list(rows)], BatchRng(5, rows, 7))
        assert torch.equal(part, whole[list(rows)])


@settings(max_examples=25, deadline=None)
@given(sizes, seeds)
def test_any_size_goes_and_values_stay_within_the_range(size, seed):
    x = crops(3, 2, *size, seed=seed)
    for function in ALL:
        y = function(x, one_group(seed, 3))
        low, high = x.amin((2, 3, 4), keepdim=True), x.amax((2, 3, 4), keepdim=True)
        assert ((y >= low - 1e-5) & (y <= high + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype):
    for function in ALL:
        y = function(crops(2, 1, 12, 12, 12).to(dtype), one_group(0, 2))
        assert y.dtype == dtype and y.isfinite().all()


def test_flat_crops_stay_flat():
    x = torch.full((4, 1, 10, 20, 20), 3.0)
    assert torch.equal(corrupt(Corruptions(), x, one_group(0, 4)).input, x)


# Curves ---------------------------------------------------------------------------------------------


def released_curve(points, falling, steps=100_000):
    """The released code's curve: Bernstein polynomials, the last point first; places sorted."""
    t = np.linspace(0, 1, steps)
    n = len(points) - 1
    basis = np.array([comb(n, i) * t ** (n - i) * (1 - t) ** i for i in range(n + 1)])
    x, y = np.array(points).T @ basis
    return (np.sort(x), y) if falling else (np.sort(x), np.sort(y))


@pytest.mark.parametrize("falling", [False, True])
def test_curves_are_those_of_the_released_code(falling):
    x = crops(8, 1, 6, 10, 10)
    drawn = one_group(3, 8).uniform(1, 2, 2)[:, 0].double().numpy()  # both points, x and y of each
    y = bezier_intensity(x, one_group(3, 8), inverted=float(falling))
    for image, changed, ((ax, ay), (bx, by)) in zip(x, y, drawn, strict=True):
        low, span = image.min().item(), (image.max() - image.min()).item()
        curve = released_curve([(0, 0), (ax, ay), (bx, by), (1, 1)], falling)
        expected = low + span * np.interp((image.double().numpy() - low) / span, *curve)
        assert np.allclose(changed, expected, atol=5e-3 * span)


@settings(max_examples=60, deadline=None)
@given(units, units)
def test_a_curve_rises_from_0_to_1(a, b):
    curve = bezier(torch.tensor([a, b], dtype=torch.float64))
    assert curve[0] == 0
    assert curve[-1] == pytest.approx(1)
    assert (curve.diff() >= 0).all()
    t = np.linspace(0, 1, 1000)
    assert np.allclose(curve, 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seeds, st.booleans())
def test_grey_values_keep_their_order_or_reverse_it(seed, falling):
    x = crops(2, 2, 1, 9, 9, seed=seed)
    y = bezier_intensity(x, one_group(seed, 2), inverted=float(falling))
    order = x.flatten(2).argsort(2)
    steps = y.flatten(2).gather(2, order).diff(dim=2) * (-1 if falling else 1)
    assert (steps >= -1e-5).all()
    ends = y.flatten(2).gather(2, order)[..., [0, -1]]
    limits = torch.stack(x.flatten(2).aminmax(dim=2), 2)
    assert torch.allclose(ends, limits.flip(2) if falling else limits, atol=1e-5)


# Shuffling ------------------------------------------------------------------------------------------


def blocks(size, seed, count):
    """The block of every voxel, (count, D, H, W), as `local_shuffle` draws it."""
    rng = one_group(seed, count)
    d, h, w = (corruptions._pieces(rng, side)[0] for side in size)
    return (d[:, :, None, None] * size[1] + h[:, None, :, None]) * size[2] + w[:, None, None, :]


@settings(max_examples=25, deadline=None)
@given(sizes, seeds)
def test_each_block_keeps_its_voxels(size, seed):
    x = crops(3, 1, *size, seed=seed)
    y = local_shuffle(x, one_group(seed, 3), share=0.7)
    for image, shuffled, block in zip(x, y, blocks(size, seed, 3), strict=True):
        before, after = (np.lexsort((one.flatten(), block.flatten())) for one in (image, shuffled))
        assert np.array_equal(image.flatten()[before], shuffled.flatten()[after])
    longest = [max(1, side // 10) for side in size]
    for axis, most in enumerate(longest):
        code = torch.arange(size[axis], dtype=torch.float32).view(
            [-1 if a == axis else 1 for a in range(3)]
        )
        code = code.expand(1, 1, *size).contiguous()
        moved = local_shuffle(code.expand(3, -1, -1, -1, -1), one_group(seed, 3)) - code
        assert moved.abs().max() < most


def test_channels_move_together():
    x = crops(2, 1, 20, 20, 20)
    y = local_shuffle(torch.cat([x, 2 * x], 1), one_group(0, 2))
    assert torch.equal(y[:, 1], 2 * y[:, 0])


def test_only_the_chosen_examples_and_blocks_are_shuffled():
    x = crops(4, 1, 20, 20, 20)
    whole = local_shuffle(x, one_group(0, 4))
    some = local_shuffle(x, one_group(0, 4), rows=torch.tensor([True, False, True, False]))
    assert torch.equal(some[[0, 2]], whole[[0, 2]])
    assert torch.equal(some[[1, 3]], x[[1, 3]])
    assert torch.equal(local_shuffle(x, one_group(0, 4), rows=torch.zeros(4, dtype=torch.bool)), x)
    assert torch.equal(local_shuffle(x, one_group(0, 4), share=0.0), x)


def test_a_block_is_permuted_evenly():
    # Sides of 10 have blocks of one voxel; of 20, of one or two: a voxel of a pair stays half the time.
    x = torch.arange(20.0).view(1, 1, 1, 1, 20).expand(4000, 1, 1, 1, 20).contiguous()
    moved = local_shuffle(x, one_group(0, 4000), share=1.0) != x
    pairs = (blocks((1, 1, 20), 0, 4000).flatten(1).diff(dim=1) == 0).sum() * 2
    assert moved.sum().item() / pairs.item() == pytest.approx(0.5, abs=0.02)


def test_as_many_voxels_move_as_far_as_in_the_released_code():
    size, rng = (64, 64, 32), np.random.default_rng(0)
    place = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"))
    moved, touched = place.copy(), np.zeros(size, bool)
    for _ in range(10_000):
        sides = [rng.integers(1, n // 10 + 1) for n in size]
        where = tuple(slice(a, a + s) for s, n in zip(sides, size) for a in [rng.integers(0, n - s + 1)])
        window = place[(slice(None), *where)].reshape(3, -1)
        moved[(slice(None), *where)] = rng.permuted(window, axis=1).reshape(3, *sides)
        touched[where] = True
    theirs = np.abs(moved - place).mean((1, 2, 3))
    assert touched.mean() == pytest.approx(Corruptions.shuffled, abs=0.02)
    x = torch.from_numpy(place).float()[None]
    ours = (local_shuffle(x, one_group(0, 1)) - x).abs().mean((0, 2, 3, 4)).numpy()
    assert np.allclose(ours, theirs, rtol=0.25)


# Painting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "limits", "least"),
    [
        (in_painting, lambda n: (n // 6, n // 3), 0),
        (out_painting, lambda n: (n - 4 * n // 7, n - 3 * n // 7), 1),
    ],
)
@settings(max_examples=25, deadline=None)
@given(size=sizes, seed=seeds)
def test_exactly_the_windows_are_painted_or_kept(function, limits, least, size, seed):
    x = crops(3, 2, *size, seed=seed)
    inside = draw_boxes(one_group(seed, 3), size, [limits(n) for n in size], least)[:, None].expand_as(x)
    y = function(x, one_group(seed, 3))
    kept = inside if function is out_painting else ~inside
    assert torch.equal(y[kept], x[kept])
    # Noise, uniform over a channel's range, hits no value again (unless there is a single voxel).
    if np.prod(size) > 100:
        assert (y[~kept] != x[~kept]).float().mean() > 0.99 or not (~kept).any()


@pytest.mark.parametrize("name", ["in", "out"])
def test_boxes_have_the_published_sides(name):
    size = (32, 64, 56)
    limits = [(n // 6, n // 3) if name == "in" else (n - 4 * n // 7, n - 3 * n // 7) for n in size]
    inside = draw_boxes(one_group(0, 500), size, limits, least=1, most=1)
    for axis, (length, (least, most)) in enumerate(zip(size, limits, strict=True)):
        others = tuple(a + 1 for a in range(3) if a != axis)
        line = inside.any(others[1]).any(others[0])
        sides = line.sum(1)
        assert sides.min() == least and sides.max() == most
        first = line.int().argmax(1)
        assert first.min() == 3 and (first + sides).max() == length - 3
    volume = inside.flatten(1).sum(1)
    spans = torch.stack(
        [inside.any(3).any(2).sum(1), inside.any(3).any(1).sum(1), inside.any(1).any(1).sum(1)]
    )
    assert torch.equal(volume, spans.prod(0))  # a solid box


def test_boxes_follow_each_other_with_the_published_chance():
    size = (1, 1, 400)
    tiny = draw_boxes(one_group(0, 4000), size, [(1, 1)] * 3, least=0)
    assert (tiny.flatten(1).sum(1) == 0).float().mean().item() == pytest.approx(0.05, abs=0.015)
    assert tiny.flatten(1).sum(1).float().mean().item() == pytest.approx(
        sum(0.95**n for n in range(1, 6)), rel=0.03
    )
    assert draw_boxes(one_group(0, 500), size, [(1, 1)] * 3, least=1).flatten(1).any(1).all()


# All together ---------------------------------------------------------------------------------------


def test_the_published_shares_of_examples_are_corrupted():
    x = crops(1, 1, 2, 12, 12).expand(4000, -1, -1, -1, -1)
    done = {
        name: flags.float().mean().item()
        for name, flags in corrupt(Corruptions(), x, one_group(0, 4000)).done.items()
    }
    assert done == pytest.approx(
        {"shuffle": 0.5, "curve": 0.9, "inpaint": 0.18, "outpaint": 0.72}, abs=0.025
    )


def test_what_was_not_done_leaves_the_example_alone():
    x = crops(64, 1, 10, 20, 20)
    seen, done = corrupt(Corruptions(shuffle=0.3, curve=0.3, paint=0.3), x, one_group(0, 64))
    untouched = ~torch.stack(list(done.values())).any(0)
    assert 5 < untouched.sum() < 40
    same = (seen == x).flatten(1).all(1)
    assert torch.equal(same | done["inpaint"], untouched | done["inpaint"])  # at times with no box at all


def test_a_crop_is_corrupted_in_exactly_one_of_four_ways():
    x = crops(1, 1, 12, 24, 24).expand(800, -1, -1, -1, -1)
    seen, done = corrupt_once(x, one_group(0, 800))
    assert (torch.stack(list(done.values())).sum(0) == 1).all()
    shares = {name: flags.float().mean().item() for name, flags in done.items()}
    assert shares == pytest.approx(
        dict.fromkeys(("shuffle", "curve", "inpaint", "outpaint"), 0.25), abs=0.04
    )
    order = x.flatten(1).sort(1).values
    # A shuffle keeps all values, a curve the order of them or its reverse, a box all but what is in it.
    assert torch.equal(seen[done["shuffle"]].flatten(1).sort(1).values, order[done["shuffle"]])
    steps = seen[done["curve"]].flatten(1).gather(1, x.flatten(1).argsort(1)[done["curve"]]).diff(dim=1)
    assert ((steps >= -1e-5).all(1) | (steps <= 1e-5).all(1)).all()
    for name, painted in (("inpaint", seen != x), ("outpaint", seen == x)):
        box = painted[done[name], 0]
        sides = [box.any(a).any(b - 1).sum(1) for a, b in ((2, 3), (1, 3), (1, 2))]
        assert torch.equal(box.flatten(1).sum(1), torch.stack(sides).prod(0)) and min(map(min, sides)) > 0


@pytest.mark.parametrize("name", ["shuffle", "shuffled", "curve", "paint", "outside"])
def test_wrong_options_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        Corruptions(**{name: 1.5})


def test_no_corruption_at_all_is_refused():
    with pytest.raises(ValueError, match="nothing to restore"):
        Corruptions(shuffle=0, curve=0, paint=0)


# Errors ---------------------------------------------------------------------------------------------


def test_errors_by_hand():
    original = torch.tensor([0.0, 2.0]).view(1, 1, 1, 1, 2)  # range 2, mean 1
    corrupted, restored = original + torch.tensor([2.0, 0.0]), original + torch.tensor([0.0, -1.0])
    error = restoration_error(restored, corrupted, original)
    assert error.loss.item() == pytest.approx(0.5 * (1 / 2) ** 2)
    assert error.relative.item() == pytest.approx(1 / 4)
    assert error.flat.item() == pytest.approx((1 + 1) / 4)
    assert restoration_error(corrupted, corrupted, original).relative == 1
    # A range below 1 counts as 1.
    assert restoration_error(restored / 4, corrupted / 4, original / 4).loss.item() == pytest.approx(
        0.5 / 16
    )


def test_a_batch_that_was_left_alone_is_as_good_as_its_input():
    x = crops(2, 1, 4, 4, 4)
    error = restoration_error(x + 1, x, x)
    assert error.relative == 1 and error.flat == 1
