import math

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter, map_coordinates

from ssl3d.rng import BatchRng, numpy_rng, one_group
from ssl3d.views import intensity, spatial
from ssl3d.views.compose import ViewRng, Views, augment, augment_labelled, view_margin
from ssl3d.views.outside import TORCHIO, apply_torchio

INTENSITY = [intensity.gamma, intensity.contrast, intensity.noise, intensity.blur, intensity.bias_field]
ALL = [*INTENSITY, intensity.low_resolution, intensity.cutout, spatial.flip, spatial.turn]


def crops(batch=6, shape=(8, 10, 10), channels=2, seed=0):
    return torch.randn(batch, channels, *shape, generator=torch.Generator().manual_seed(seed))


def coordinates(batch, shape, spacing=(1.0, 1.0, 1.0)):
    """Each voxel holds where it is, mm, in three channels."""
    axes = [torch.arange(n, dtype=torch.float32) * s for n, s in zip(shape, spacing, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None].repeat(batch, 1, 1, 1, 1)


@pytest.mark.parametrize("transform", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 9, 9), (1, 8, 8), (1, 1, 1)])
def test_shape_and_dtype_stay_and_nothing_overflows(transform, dtype, shape):
    x = crops(4, shape).to(dtype)
    changed = transform(x, one_group(0, 4), p=1.0)
    assert changed.shape == x.shape and changed.dtype == dtype and changed.isfinite().all()


@pytest.mark.parametrize("transform", ALL, ids=lambda f: f.__name__)
def test_probability_counts_for_each_example(transform):
    x = crops(200, (8, 8, 8))
    assert torch.equal(transform(x, one_group(0, 200), p=0.0), x)
    changed = (transform(x, one_group(0, 200), p=0.5) != x).flatten(1).any(1).float().mean()
    low, high = (0.35, 0.6)  # a blur of a fraction of a voxel is none
    if transform in (spatial.flip, spatial.turn):
        low, high = 0.8, 0.95  # they have three chances
    if transform is intensity.cutout:
        low = 0.2  # a thin box may fall between voxels
    assert low < changed < high


@pytest.mark.parametrize("transform", ALL, ids=lambda f: f.__name__)
def test_an_example_does_not_depend_on_the_others(transform):
    x = crops()
    y = x.clone()
    y[1:] = 7 * y[1:] + 3
    rngs = (one_group(0, 6), one_group(0, 6))
    assert torch.equal(transform(x, rngs[0], p=1.0)[0], transform(y, rngs[1], p=1.0)[0])


@pytest.mark.parametrize("transform", ALL, ids=lambda f: f.__name__)
def test_constant_crops_stay_finite(transform):
    x = torch.full((3, 1, 4, 4, 4), 2.5)
    assert transform(x, one_group(0, 3), p=1.0).isfinite().all()


def test_ranks_see_the_rows_of_the_single_run():
    views = Views(turn=0.5, cutout=0.4, stretch=0.1, shift=0.1)
    size = (8, 8, 8)
    margin = view_margin(views, size)
    x = crops(6, tuple(n + 2 * m for n, m in zip(size, margin, strict=True)))
    whole = augment(views, x, one_group(5, 6), size)
    for rank in range(2):
        rows = list(range(rank, 6, 2))
        part = augment(views, x[rows], BatchRng(5, rows, 6), size)
        assert torch.allclose(part, whole[rows], atol=1e-5)


def test_views_of_an_example_differ_unless_shared():
    x = crops(4)[:, None].repeat(1, 3, 1, 1, 1, 1).flatten(0, 1)
    for shared in (False, True):
        rng = ViewRng(one_group(0, 4), 3, shared)
        y = augment(Views(), x, rng, (6, 8, 8)).unflatten(0, (4, 3))
        assert len(rng) == 12
        assert torch.allclose(y[:, 0], y[:, 1], atol=1e-5) is shared
        assert not torch.allclose(y[0], y[1], atol=1e-2)


def test_views_of_ranks_are_rows_of_the_single_run():
    whole = ViewRng(one_group(3, 4), 2).normal(5).unflatten(0, (4, 2))
    part = ViewRng(BatchRng(3, [1, 3], 4), 2).normal(5).unflatten(0, (2, 2))
    assert torch.equal(part, whole[[1, 3]])


# Space --------------------------------------------------------------------------------------------


def test_an_example_left_alone_is_cropped_exactly():
    x = crops(8, (12, 14, 16))
    y = spatial.affine(x, one_group(0, 8), (8, 8, 8), p=0.0)
    assert torch.allclose(y, spatial.centre_crop(x, (8, 8, 8)), atol=1e-5)
    assert torch.allclose(
        spatial.affine(x[:, :, :1], one_group(0, 8), (1, 8, 8), p=0.0), x[:, :, :1, 3:11, 4:12], atol=1e-5
    )


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 2.0, 1.5)])
def test_rotations_keep_lengths_and_angles_in_mm(spacing):
    size, batch = (9, 9, 9), 16
    where = coordinates(batch, (25, 41, 41), spacing)
    mm = torch.tensor(spacing).repeat(batch, 1)
    y = spatial.affine(where, one_group(0, batch), size, rotate=20.0, scale=0.0, spacing=mm).double()
    steps = torch.stack([y[:, :, 1, 0, 0], y[:, :, 0, 1, 0], y[:, :, 0, 0, 1]], 1) - y[:, None, :, 0, 0, 0]
    gram = steps @ steps.transpose(1, 2)
    expected = torch.diag(torch.tensor(spacing, dtype=torch.float64) ** 2)
    assert torch.allclose(gram, expected.expand_as(gram), atol=2e-3 * max(spacing) ** 2)
    centre = (torch.tensor((24, 40, 40.0)) / 2 * torch.tensor(spacing)).double()
    assert torch.allclose(y[:, :, 4, 4, 4], centre.expand(batch, 3), atol=1e-3)  # about the centre
    assert (gram - steps.new_tensor(0)).abs().max() > 0 and steps[:, 0, 1:].abs().max() > 0.05  # it turned


@pytest.mark.parametrize("seed", range(3))
def test_images_and_masks_move_as_scipy_moves_them(seed):
    """The map is read off a volume that holds its own coordinates, and given to scipy."""
    views = Views(
        chance=1.0, flip=0.5, rotate=30.0, scale=0.3, stretch=0.2, shift=0.1,
        blur=0.0, bias=0.0, gamma=0.0, contrast=0.0, noise=0.0,
    )  # fmt: skip
    size, whole = (12, 14, 16), (24, 26, 28)
    where = coordinates(1, whole)
    at = augment(views, where, one_group(seed, 1), size)[0].double().numpy()
    corner = at[:, 0, 0, 0]
    steps = np.stack([at[:, 1, 0, 0], at[:, 0, 1, 0], at[:, 0, 0, 1]], 1) - corner[:, None]
    x, rng = crops(1, whole, 1), np.random.default_rng(seed)
    smooth = gaussian_filter(x[0, 0].numpy(), 1.5)
    labels = rng.integers(0, 3, whole)
    image, moved = augment_labelled(
        views,
        torch.from_numpy(smooth)[None, None],
        torch.from_numpy(labels)[None],
        one_group(seed, 1),
        size,
    )
    expected = affine_transform(smooth, steps, corner, size, order=1, mode="nearest")
    assert np.allclose(image[0, 0].numpy(), expected, atol=1e-4)
    nearest = affine_transform(labels, steps, corner, size, order=0, mode="nearest")
    # Where a place lies halfway between two voxels the last bit decides.
    assert (moved[0].numpy() == nearest).mean() > 0.995


def test_zoom_is_within_its_law_and_the_same_along_all_axes():
    batch = 64
    y = spatial.affine(
        coordinates(batch, (21, 21, 21)), one_group(0, batch), (9, 9, 9), rotate=0.0, scale=0.5
    )
    steps = torch.stack([y[:, 0, 1, 0, 0] - y[:, 0, 0, 0, 0], y[:, 2, 0, 0, 1] - y[:, 2, 0, 0, 0]], 1)
    assert torch.allclose(steps[:, 0], steps[:, 1], atol=1e-4)
    logs = -steps[:, 0].log() / math.log(1.5)
    assert logs.abs().max() <= 1.0 + 1e-4 and logs.min() < -0.85 and logs.max() > 0.85


def test_nothing_moves_across_an_axis_that_is_left_out():
    x = coordinates(16, (12, 30, 30))
    views = Views(
        chance=1.0, turn=1.0, shift=0.2, stretch=0.2, blur=0, bias=0, gamma=0, contrast=0, noise=0
    )
    margin = view_margin(views, (12, 12, 12), (1, 2))
    assert margin[0] == 0
    y = augment(views, x, one_group(0, 16), (12, 12, 12), axes=(1, 2))
    depth = torch.arange(12.0).view(1, 12, 1, 1).expand(16, 12, 12, 12)
    assert torch.allclose(y[:, 0], depth, atol=1e-4)
    assert not torch.allclose(y[0, 1], y[1, 1], atol=1e-1)


@pytest.mark.parametrize("size", [(8, 8, 8), (1, 12, 12), (4, 10, 16)])
def test_the_margin_is_enough_for_the_strongest_draws(size):
    strengths = {"rotate": 25.0, "scale": 0.3, "stretch": 0.1, "shift": 0.1}
    margin = spatial.affine_margin(size, **strengths, limit=9.0)
    shape = tuple(n + 2 * m for n, m in zip(size, margin, strict=True))
    y = spatial.affine(coordinates(400, shape), one_group(0, 400), size, **strengths)
    for axis in (2, 3, 4):  # a border that goes on would bend the straight lines
        if y.shape[axis] > 2:
            assert y.diff(n=2, dim=axis).abs().max() < 1e-3
    assert spatial.affine_margin(size, 0.0, 0.0) == (0, 0, 0)


def test_flips_mirror_and_each_axis_on_its_own():
    x = coordinates(64, (3, 4, 5))
    y = spatial.flip(x, one_group(0, 64), 0.5)
    mirrored = torch.stack([y[:, a, 0, 0, 0] > 0 for a in range(3)], 1)
    assert len(mirrored.unique(dim=0)) == 8
    expected = x[0].flip([a + 1 for a in range(3) if mirrored[0, a]])
    assert torch.equal(y[0], expected)
    only = spatial.flip(x, one_group(0, 64), 1.0, axes=(2,))
    assert torch.equal(only, x.flip(4))


def test_turns_stay_in_square_planes_of_square_voxels():
    x = coordinates(64, (4, 6, 6))
    y = spatial.turn(x, one_group(0, 64), 1.0)
    assert torch.equal(y[:, 0], x[:, 0])  # depth is not square with the rest
    kinds = {tuple(row) for row in y[:, 1:, 0, 0, 0].int().tolist()}
    assert kinds == {(0, 5), (5, 0), (5, 5)}
    cube = crops(64, (6, 6, 6), 1)
    mm = torch.tensor([3.0, 1.0, 1.0]).repeat(64, 1)
    turned = spatial.turn(cube, one_group(0, 64), 1.0, spacing=mm)
    assert torch.allclose(turned.sum((3, 4)), cube.sum((3, 4)), atol=1e-4)  # slices stay slices


def test_a_quarter_turn_four_times_is_none():
    x = crops(8, (6, 6, 6), 1)
    y = x
    for _ in range(4):
        y = spatial.turn(y, one_group(1, 8), 1.0, axes=(1, 2))
    assert torch.equal(x, y)


# Grey values --------------------------------------------------------------------------------------


def test_gamma_keeps_the_range_and_the_order():
    x = crops()
    y = intensity.gamma(x, one_group(0, 6), 1.0, 1.0)
    assert torch.allclose(y.amax((2, 3, 4)), x.amax((2, 3, 4)), atol=1e-5)
    assert torch.allclose(y.amin((2, 3, 4)), x.amin((2, 3, 4)), atol=1e-5)
    assert torch.equal(y[0, 0].flatten().argsort(), x[0, 0].flatten().argsort())


def test_contrast_is_linear_within_its_law():
    x = crops(200, (6, 6, 6), 1)
    y = intensity.contrast(x, one_group(0, 200), 1.0, 0.5)
    factor = y.std((1, 2, 3, 4)) / x.std((1, 2, 3, 4))
    assert factor.min() >= 1 / 1.5 - 1e-4 and factor.max() <= 1.5 + 1e-4
    assert factor.min() < 0.72 and factor.max() > 1.4
    moved = (y.mean((1, 2, 3, 4)) - x.mean((1, 2, 3, 4))) / x.std((1, 2, 3, 4))
    assert moved.abs().max() <= 0.51 and moved.abs().max() > 0.4


def test_noise_has_the_strength_drawn():
    x = crops(100, (8, 8, 8), 1) * 40 + 1000
    added = intensity.noise(x, one_group(0, 100), 1.0, 0.3) - x
    share = added.std((1, 2, 3, 4)) / x.std((1, 2, 3, 4))
    assert share.max() < 0.33 and share.max() > 0.25 and share.min() < 0.03
    assert added.mean().abs() < 0.5


def test_blur_is_the_gaussian_filter_inside():
    x = crops(3, (20, 24, 22), 1)
    y = intensity.blur(x, one_group(2, 3), 1.0, 1.5)
    sigma = one_group(2, 3).uniform(1, high=1.5)
    for i in range(3):
        reference = gaussian_filter(x[i, 0].numpy(), float(sigma[i]), truncate=8.0)
        inner = (slice(7, -7),) * 3
        assert np.allclose(y[i, 0].numpy()[inner], reference[inner], atol=5e-3)
    constant = torch.full((3, 1, 5, 5, 5), 4.0)
    assert torch.allclose(intensity.blur(constant, one_group(2, 3), 1.0, 1.5), constant, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 12, 6), (1, 12, 12)])
def test_low_resolution_is_torchs_own_down_and_up(shape):
    class Half:
        """Makes voxels of twice the length."""

        def uniform(self, *each, low=0.0, high=1.0):
            return torch.full((2, *each), high if each else 0.0)

        def chance(self, p, *each):
            return torch.ones(2, *each, dtype=torch.bool)

    x = crops(2, shape)
    small = [max(n // 2, 1) for n in shape]
    low = torch.nn.functional.interpolate(x, small, mode="nearest-exact")
    expected = torch.nn.functional.interpolate(low, shape, mode="trilinear", align_corners=False)
    assert torch.allclose(intensity.low_resolution(x, Half(), strength=1.0), expected, atol=1e-5)
    in_rows = intensity.low_resolution(x, Half(), strength=1.0, axes=(1,))
    assert not torch.equal(in_rows, x)
    column = intensity.low_resolution(x[..., 2:3], Half(), strength=1.0, axes=(1,))
    assert torch.allclose(in_rows[..., 2:3], column, atol=1e-5)  # nothing is mixed across the other axes
    assert torch.equal(intensity.low_resolution(x, Half(), strength=0.0), x)


def test_blur_is_narrower_across_thick_slices():
    x = torch.zeros(1, 1, 15, 15, 15)
    x[0, 0, 7, 7, 7] = 1
    y = intensity.blur(x, one_group(0, 1), 1.0, 2.0, torch.tensor([[5.0, 1.0, 1.0]]))[0, 0]
    assert y.sum((1, 2))[7] > 0.9 > y.sum((0, 1))[7]


def test_a_bias_field_is_smooth_and_keeps_the_darkest():
    x = torch.ones(4, 1, 12, 12, 12)
    x[:, :, 0, 0, 0] = 0
    field = intensity.bias_field(x, one_group(0, 4), 1.0, 0.3)
    assert (field[:, 0, 0, 0, 0] == 0).all()
    inner = field[:, 0, 1:, 1:, 1:]
    assert inner.min() > 0 and inner.std() > 0.05
    assert (inner.diff(dim=1).abs() / inner[:, 1:]).max() < 0.6


def test_cutout_fills_one_box_of_at_most_the_size():
    x = crops(100, (10, 12, 14), 1)
    holes = (intensity.cutout(x, one_group(0, 100), 1.0, 0.5) != x)[:, 0]
    for axis, length in ((1, 10), (2, 12), (3, 14)):
        others = tuple(a for a in (1, 2, 3) if a != axis)
        extent = holes.any(others[1]).any(others[0]).sum(1)
        assert extent.max() <= length / 2 + 1
    boxes = holes.flatten(1).sum(1)
    product = math.prod(holes.any(b).any(a).sum(1) for a, b in ((1, 2), (1, 3), (2, 3)))
    assert torch.equal(boxes, product)


def test_autocast_does_not_reach_the_views():
    x = crops(4, (10, 10, 10), 1)
    plain = augment(Views(), x, one_group(0, 4), (8, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(Views(), x, one_group(0, 4), (8, 8, 8)), plain)


@pytest.mark.parametrize(
    "wrong,name",
    [
        ({"chance": 1.5}, "chance"),
        ({"rotate": -1.0}, "rotate"),
        ({"noise": -0.1}, "noise"),
        ({"shift": 0.9}, "shift"),
        ({"low_resolution": -1.0}, "low_resolution"),
    ],
)
def test_options_out_of_range_name_the_field(wrong, name):
    with pytest.raises(ValueError, match=name):
        Views(**wrong)


# torchio ------------------------------------------------------------------------------------------


def test_an_unknown_torchio_name_gets_suggestions():
    with pytest.raises(ValueError, match=r"RandomNose.*Did you mean RandomNoise"):
        Views(torchio=("RandomNose",))


@pytest.mark.filterwarnings("ignore:The maximum displacement")
@pytest.mark.parametrize("name", TORCHIO)
def test_torchio_repeats_exactly_and_leaves_the_global_generator_alone(name):
    x = crops(1, (12, 12, 12), 1)[0]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = apply_torchio((name,), x, numpy_rng(4))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(apply_torchio((name,), x, numpy_rng(4)), first)
    assert first.shape == x.shape and first.dtype == x.dtype
    others = [apply_torchio((name,), x, numpy_rng(seed)) for seed in range(5, 10)]
    assert any(not torch.equal(other, first) for other in others)


# Elastic deformation --------------------------------------------------------------------------------


def released_elastic(image, dx, dy, alpha=991.0, sigma=8.0):
    """The released code of TransVW, on an array (x, y, z) and its noise, by scipy."""
    dx = gaussian_filter(dx, sigma, mode="constant", cval=0) * alpha
    dy = gaussian_filter(dy, sigma, mode="constant", cval=0) * alpha
    x, y, z = np.meshgrid(*[np.arange(n) for n in image.shape])
    places = [np.reshape(at, (-1, 1)) for at in (y + dy, x + dx, z)]
    return map_coordinates(image, places, order=1, mode="reflect").reshape(image.shape)


def test_crops_are_deformed_as_by_the_released_code():
    x = torch.randn(2, 1, 32, 64, 64, generator=torch.Generator().manual_seed(0))
    found = spatial.elastic(x, one_group(4, 2))
    noise = one_group(4, 2).uniform(2, 32, 64, 64, low=-1.0, high=1.0).double().numpy()
    for image, deformed, (first, second) in zip(x[:, 0], found[:, 0], noise, strict=True):
        # (z, y, x) here; the first axis of theirs is x, and moved by dy.
        expected = released_elastic(
            image.numpy().transpose(2, 1, 0), first.transpose(2, 1, 0), second.transpose(2, 1, 0)
        )
        assert np.allclose(deformed.numpy(), expected.transpose(2, 1, 0), atol=1e-3)


def test_elastic_deformations_scale_with_the_crop():
    moved = []
    for depth, *plane in ((32, 64, 64), (16, 32, 32), (8, 32, 32)):
        ramp = torch.arange(float(plane[1])).expand(200, 1, depth, *plane).contiguous()
        change = spatial.elastic(ramp, one_group(1, 200)) - ramp
        middle = change[:, 0, depth // 2, plane[0] // 2 :: plane[0], plane[1] // 2]
        moved.append(middle.std().item() / plane[1])
    assert moved == pytest.approx([3.8 / 64] * 3, rel=0.15)


@pytest.mark.parametrize("size", [(1, 40, 40), (3, 9, 30), (1, 1, 1), (20, 1, 8)])
def test_slices_of_any_size_are_deformed_and_stay_apart(size):
    x = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
    whole = spatial.elastic(x, one_group(5, 3))
    assert whole.isfinite().all() and whole.shape == x.shape
    part = spatial.elastic(x[[0, 2]], BatchRng(5, (0, 2), 3))
    assert torch.equal(part, whole[[0, 2]])
    flat = torch.arange(float(size[0])).view(-1, 1, 1).expand(3, 1, *size).contiguous()
    assert torch.allclose(spatial.elastic(flat, one_group(5, 3)), flat, atol=1e-4)  # never across slices
