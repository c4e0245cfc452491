"""Context restoration: what is swapped, what it learns, and what it must not be able to learn from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.api import BatchRng, DataError, numpy_rng, one_group
from ssl3d.data.open import open_data
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d_proxies.context_restoration import ContextRestoration, ContextRestorationConfig, swap_patches


def numbered(size, batch=2, channels=1):
    """Volumes whose every voxel has a value of its own."""
    return torch.arange(batch * channels * int(np.prod(size))).view(batch, channels, *size).float()


def proxy_of(seed=0, **options):
    torch.manual_seed(seed)
    encoder = ResNet10(
        ResNet10.Config(width=8, stem_kernel=3, stage_strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1)))
    )
    return ContextRestoration(ContextRestorationConfig(crop=(16, 16, 16), width=8, **options), encoder)


def group(x):
    return {"crop": x, "foreground": torch.ones_like(x[:, 0], dtype=torch.bool)}


def train(proxy, make, steps=50, batch=8, lr=3e-3):
    """A hand-written loop; `make(n, seed)` gives crops."""
    optimizer = torch.optim.AdamW(proxy.train().parameters(), lr=lr)
    for step in range(steps):
        output = proxy(group(make(batch, step)), one_group(step, batch))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    with torch.no_grad():
        return proxy(group(make(16, 10_000)), one_group(1, 16)).metrics


# Swapping -------------------------------------------------------------------------------------------

SIZES = st.sampled_from([(16, 16, 16), (24, 20, 28), (1, 32, 40), (10, 48, 33), (3, 17, 64), (9, 9, 9)])


@given(size=SIZES, seed=st.integers(0, 999), density=st.sampled_from((0.05, 0.5, 1.0)))
@settings(max_examples=60, deadline=None)
def test_voxels_change_places_in_pairs_and_none_is_lost(size, seed, density):
    x = numbered(size, channels=2)
    foreground = torch.rand(2, *size, generator=torch.Generator().manual_seed(seed)) < density
    before = x.clone(), foreground.clone()
    image, moved = swap_patches(x, foreground, one_group(seed, 2))
    assert torch.equal(x, before[0]) and torch.equal(foreground, before[1])  # nothing is aliased
    assert image.data_ptr() != x.data_ptr()
    for one, other in zip(image.flatten(2).flatten(0, 1), x.flatten(2).flatten(0, 1)):
        assert torch.equal(one.sort().values, other)
    assert torch.equal((image != x).all(1), moved) and torch.equal((image != x).any(1), moved)
    # Exchanging the same patches again puts everything back: they come in pairs and do not overlap.
    again, _ = swap_patches(image, foreground, one_group(seed, 2))
    assert torch.equal(again, x)


@given(size=SIZES, seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_patches_are_equal_boxes_of_the_sides_asked_for(size, seed):
    image, moved = swap_patches(
        numbered(size, 1), torch.ones(1, *size, dtype=torch.bool), one_group(seed, 1)
    )
    voxels = torch.nonzero(moved[0])
    origin = torch.stack(torch.unravel_index(image[0, 0][moved[0]].long(), size), dim=1)
    patches = {}
    for at, by in zip(voxels.tolist(), (origin - voxels).tolist()):
        patches.setdefault(tuple(by), []).append(at)
    # Each direction belongs to one patch, or by chance to several: the smallest is one, and whole.
    smallest = torch.tensor(min(patches.values(), key=len))
    sides = (smallest.amax(0) - smallest.amin(0) + 1).tolist()
    assert len(smallest) == np.prod(sides)
    assert all(len(one) % len(smallest) == 0 for one in patches.values())
    for side, length in zip(sides, size):
        least = 1 if length <= 8 else 2
        assert max(least, round(length / 16)) <= side <= max(least, round(length / 6))


@given(seed=st.integers(0, 999), low=st.sampled_from((0.1, 0.3, 0.5)), density=st.sampled_from((0.3, 1.0)))
@settings(max_examples=40, deadline=None)
def test_the_share_of_the_foreground_asked_for_moves(seed, low, density):
    foreground = torch.zeros(3, 32, 32, 32, dtype=torch.bool)
    foreground[:, 4:28, 4:28, 4:28] = True
    foreground &= torch.rand(foreground.shape, generator=torch.Generator().manual_seed(seed)) < density
    _, moved = swap_patches(numbered((32,) * 3, 3), foreground, one_group(seed, 3), (low, low + 0.2))
    share = (moved & foreground).flatten(1).sum(1) / foreground.flatten(1).sum(1)
    slack = 5**3 / 24**3 / density + 1e-6  # of half a pair of the largest patches
    assert (share > low - slack).all() and (share < low + 0.2 + slack).all()


def test_shares_are_drawn_over_the_whole_range():
    foreground = torch.ones(200, 1, 40, 40, dtype=torch.bool)
    _, moved = swap_patches(numbered((1, 40, 40), 200), foreground, one_group(0, 200))
    share = moved.flatten(1).float().mean(1)
    assert share.min() < 0.24 and share.max() > 0.46 and share.mean() == pytest.approx(0.35, abs=0.03)


@given(
    size=st.sampled_from([(27, 27, 27), (28, 28, 28), (1, 27, 27), (1, 1, 3), (3, 3, 3), (2, 2, 2)]),
    seed=st.integers(0, 999),
    least=st.sampled_from((0.01, 0.3, 0.5)),
)
@settings(max_examples=60, deadline=None)
def test_patches_of_half_a_side_still_find_partners(size, seed, least):
    x, foreground = numbered(size), torch.ones(2, *size, dtype=torch.bool)
    image, moved = swap_patches(x, foreground, one_group(seed, 2), patch=(least, 0.5))
    assert moved.flatten(1).any(1).all()
    assert torch.equal((image != x).squeeze(1), moved)
    assert torch.equal(image.flatten(1).sort().values, x.flatten(1))


def test_a_single_voxel_stays_where_it_is():
    image, moved = swap_patches(
        numbered((1, 1, 1)), torch.ones(2, 1, 1, 1, dtype=torch.bool), one_group(0, 2)
    )
    assert torch.equal(image, numbered((1, 1, 1))) and not moved.any() and moved.dtype == torch.bool


def test_background_alone_is_never_swapped():
    foreground = torch.zeros(4, 32, 32, 32, dtype=torch.bool)
    foreground[:, :, :, :10] = True
    _, moved = swap_patches(numbered((32,) * 3, 4), foreground, one_group(0, 4))
    assert not moved[..., 16:].any()  # a patch with foreground ends before
    image, moved = swap_patches(numbered((32,) * 3, 4), torch.zeros_like(foreground), one_group(0, 4))
    assert not moved.any() and torch.equal(image, numbered((32,) * 3, 4))


def test_patches_lie_anywhere():
    # No voxel but the outermost is spared: patches are not on a fixed grid.
    foreground = torch.ones(300, 1, 24, 24, dtype=torch.bool)
    _, moved = swap_patches(numbered((1, 24, 24), 300), foreground, one_group(0, 300))
    often = moved.float().mean(0)[0]
    assert often[3:-3, 3:-3].min() > 0.6 * often[3:-3, 3:-3].max()
    assert often.min() > 0


def test_two_ranks_swap_what_one_would():
    x, foreground = numbered((16,) * 3, 4), torch.ones(4, 16, 16, 16, dtype=torch.bool)
    whole = swap_patches(x, foreground, one_group(5, 4)).image
    for rows in ([0, 1], [2, 3]):
        assert torch.equal(swap_patches(x[rows], foreground[rows], BatchRng(5, rows, 4)).image, whole[rows])


# One step -------------------------------------------------------------------------------------------


def restored_by(rule, x, **options):
    """One step in which the decoder gives rule(damaged, original)."""
    proxy = proxy_of(flip=0.0, **options)
    shown = []
    proxy.encoder.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    proxy.decoder.forward = lambda maps, size: rule(shown[-1], x)
    return proxy(group(x), one_group(3, len(x))), shown[-1]


def test_metrics_of_what_is_easy_to_do():
    x = torch.randn(4, 1, 16, 16, 16)
    copied, damaged = restored_by(lambda damaged, original: damaged.clone(), x)
    assert copied.metrics["relative_error"].item() == pytest.approx(1)
    assert copied.metrics["unmoved_error"].item() == 0
    assert copied.loss.item() == pytest.approx((damaged - x).square().mean().item())
    assert copied.metrics["moved"].item() == pytest.approx((damaged != x).float().mean().item())
    right, _ = restored_by(lambda damaged, original: original.clone(), x)
    assert (
        right.loss.item()
        == right.metrics["relative_error"].item()
        == right.metrics["mean_error"].item()
        == 0
    )
    mean, _ = restored_by(
        lambda damaged, original: original.mean((2, 3, 4), keepdim=True).expand_as(original), x
    )
    assert mean.metrics["mean_error"].item() == mean.metrics["unmoved_error"].item() == pytest.approx(1)
    assert mean.metrics["relative_error"].item() == pytest.approx(0.5, abs=0.05)  # var over 2 var


def test_errors_on_moved_voxels_by_hand():
    x = torch.randn(2, 1, 16, 16, 16)
    output, damaged = restored_by(lambda damaged, original: 0.5 * damaged, x)
    where = damaged != x
    error = sum(((0.5 * d - o) ** 2).item() for d, o in zip(damaged[where], x[where]))
    copying = sum(((d - o) ** 2).item() for d, o in zip(damaged[where], x[where]))
    assert output.metrics["relative_error"].item() == pytest.approx(error / copying, rel=1e-4)


def test_nothing_to_restore_counts_as_no_better_than_copying():
    metrics = proxy_of()(group(torch.full((2, 1, 16, 16, 16), 3.0)), one_group(0, 2)).metrics
    assert metrics["relative_error"].item() == metrics["mean_error"].item() == 1


def test_crops_are_mirrored_while_training_only():
    x = numbered((16,) * 3, 4)
    proxy = proxy_of(flip=1.0, moved=(0.01, 0.01))
    shown = []
    proxy.encoder.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    proxy.train()(group(x), one_group(0, 4))
    proxy.eval()(group(x), one_group(0, 4))
    assert (shown[0] == x.flip(2, 3, 4)).float().mean() > 0.9
    assert (shown[1] == x).float().mean() > 0.9


def test_draw_gives_a_crop_and_its_foreground(tmp_path):
    image, inside = (
        np.random.default_rng(0).normal(size=(20, 24, 28)).astype(np.float32),
        np.zeros((20, 24, 28), bool),
    )
    inside[:, :12] = True
    write_part(
        tmp_path / "p", "a", Record("a", "made", "s"), image[None], foreground=inside, dtype="float32"
    )
    write_part(tmp_path / "p", "b", Record("b", "made", "t"), image[None], foreground=inside & False)
    assemble(tmp_path / "p", tmp_path / "s.h5", {}, [])
    volumes = open_data([tmp_path / "s.h5"])
    config = ContextRestorationConfig(crop=(16, 24, 32))
    drawn = ContextRestoration.draw(config, volumes[0], numpy_rng(0))
    assert drawn["crop"].shape == (1, 16, 24, 32) and drawn["foreground"].shape == (16, 24, 32)
    expected = torch.zeros(16, 24, 32, dtype=torch.bool)
    expected[:, :12, 2:30] = True  # padded evenly along W; the volume's foreground beyond that
    assert torch.equal(drawn["foreground"], expected)
    with pytest.raises(DataError, match="no foreground"):
        ContextRestoration.draw(config, volumes[1], numpy_rng(0))


def test_picture_shows_input_restored_and_original():
    figure = proxy_of()(group(torch.randn(3, 1, 16, 16, 16)), one_group(0, 3)).picture()
    assert len(figure.axes) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        {"moved": (0.5, 0.2)},
        {"moved": (0.0, 0.2)},
        {"patch": (0.1, 0.6)},
        {"width": 1},
        {"flip": 2.0},
        {"crop": (0, 1, 1)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ContextRestorationConfig(**wrong)


# Learning, and shortcut controls --------------------------------------------------------------------


def noise(n, seed):
    return torch.randn(n, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def smooth(n, seed):
    """Waves of random direction and phase: a patch from elsewhere is seen and its place can be filled."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    way = torch.rand(n, 3, generator=generator) * 0.4
    phase = torch.rand(n, 1, 1, 1, generator=generator) * 6.28
    return (1.4 * torch.sin(torch.einsum("na,adhw->ndhw", way, at) + phase)).unsqueeze(1)


def place(n, seed):
    """The cue put in: every voxel says where it belongs."""
    ramp = torch.linspace(-1.5, 1.5, 16).view(16, 1, 1).expand(16, 16, 16)
    return (ramp + 0.1 * noise(n, seed)).contiguous()


def test_it_restores_what_continues_and_the_cue_makes_it_easier():
    waves = train(proxy_of(flip=0.0), smooth)
    assert waves["mean_error"] < 0.75 and waves["relative_error"] < 0.4
    assert train(proxy_of(flip=0.0), place)["mean_error"] < 0.8 * waves["mean_error"]


def test_noise_stays_at_chance():
    # Where nothing tells moved voxels from others, nothing beats the mean on them.
    assert train(proxy_of(), noise)["mean_error"] > 0.97


def test_the_crop_of_another_example_is_of_no_use():
    proxy = proxy_of(flip=0.0)
    proxy.encoder.register_forward_pre_hook(lambda module, inputs: inputs[0].roll(1, 0))
    assert train(proxy, smooth)["mean_error"] > 0.95
