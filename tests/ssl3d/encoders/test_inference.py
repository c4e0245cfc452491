"""Sliding windows, dense features, recalibration."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import nn

from ssl3d.encoder import Encoder
from ssl3d.encoders.inference import (
    dense_features,
    embed_volume,
    gaussian_weight,
    recalibrate_norm,
    upsample,
    window_starts,
)
from ssl3d.encoders.resnet import ResNet10, ResNetConfig


class Identity(Encoder):
    """Maps: the input itself, and every second voxel of it; embedding: the mean."""

    channels, strides, embed_dim = (1, 1), ((1, 1, 1), (2, 2, 2)), 1

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return [x, x[:, :, ::2, ::2, ::2]]

    def pool(self, maps):
        return maps[0].mean(dim=(2, 3, 4))


def encoder(**options):
    torch.manual_seed(0)
    return ResNet10(ResNetConfig(width=8, **options)).eval()


@given(st.integers(1, 60), st.integers(1, 30), st.sampled_from([0, 0.25, 0.5, 0.75]))
@settings(max_examples=200, deadline=None)
def test_windows_cover_every_voxel_and_stay_inside(size, window, overlap):
    starts = window_starts(size, window, overlap)
    window = min(window, size)
    assert starts[0] == 0 and starts[-1] == size - window
    covered = {voxel for start in starts for voxel in range(start, start + window)}
    assert covered == set(range(size))
    allowed = max(1, int(window * (1 - overlap)))
    assert all(0 < b - a <= allowed for a, b in itertools.pairwise(starts))


def test_a_volume_no_larger_than_the_window_is_embedded_as_it_is():
    volume = torch.randn(1, 9, 20, 17)
    one = embed_volume(encoder(), volume, (16, 32, 32))
    assert torch.allclose(one, encoder().embed(volume[None])[0], atol=1e-6)


def test_even_weighting_counts_every_voxel_once():
    volume = torch.zeros(1, 12, 12, 12)
    volume[0, 0, 0, 0] = volume[0, 6, 6, 6] = 1.0
    probe = Identity()
    # Without overlap the mean of window means is the volume's mean; with it, border voxels keep up.
    assert embed_volume(probe, volume, (6, 6, 6), 0.0).item() == pytest.approx(2 / 12**3)
    constant = embed_volume(probe, torch.full((1, 13, 11, 7), 3.0), (6, 5, 4), 0.5)
    assert constant.item() == pytest.approx(3.0)
    ramp = torch.arange(12.0)[None, :, None, None].expand(1, 12, 4, 4)
    assert embed_volume(probe, ramp, (6, 4, 4), 0.5).item() == pytest.approx(5.5)


def test_gaussian_weighting_prefers_the_centre():
    volume = torch.zeros(1, 20, 4, 4)
    volume[:, 8:12] = 1.0
    even = embed_volume(Identity(), volume, (4, 4, 4), 0.0)
    centred = embed_volume(Identity(), volume, (4, 4, 4), 0.0, weighting="gaussian")
    assert even.item() == pytest.approx(0.2) and centred.item() > 0.3


def test_the_batch_of_windows_changes_nothing():
    volume = torch.randn(1, 20, 24, 22)
    net = encoder()
    a, b = (embed_volume(net, volume, (12, 12, 12), batch=batch) for batch in (1, 7))
    assert torch.allclose(a, b, atol=1e-5)
    a, b = (dense_features(net, volume, (12, 12, 12), batch=batch) for batch in (1, 7))
    assert torch.allclose(a, b, atol=1e-4)


def test_windows_of_depth_1_are_images():
    probe = Identity()
    embed_volume(probe, torch.randn(1, 3, 8, 8), (1, 8, 8), batch=2)
    assert probe.seen == [(2, 1, 1, 8, 8), (1, 1, 1, 8, 8)]


@pytest.mark.parametrize("size", [(16, 16, 16), (9, 24, 7), (1, 12, 2), (48, 32, 40)])
def test_window_weights_are_those_of_nnunet(size):
    """nnU-Net v2: a unit impulse at n // 2, filtered, scaled to 10, its zeros in half precision raised."""
    impulse = np.zeros(size)
    impulse[tuple(n // 2 for n in size)] = 1
    golden = gaussian_filter(impulse, [n / 8 for n in size], 0, mode="constant", cval=0)
    golden = golden / golden.max() * 10
    weight = gaussian_weight([torch.arange(n) for n in size], size)
    np.testing.assert_allclose(10 * weight, golden, rtol=1e-5)
    half = golden.astype(np.float16)
    half[half == 0] = half[half != 0].min()
    np.testing.assert_allclose(10 * weight, half.astype(np.float64), rtol=1e-3, atol=1e-7)
    some = [torch.arange(n)[1::3] if n > 1 else torch.arange(n) for n in size]
    assert torch.equal(gaussian_weight(some, size), weight[np.ix_(*[p.numpy() for p in some])])


@pytest.mark.parametrize("every", [(1, 1, 1), (2, 3, 1)])
@pytest.mark.parametrize("shape", [(13, 11, 10), (1, 9, 14), (5, 6, 4)])
def test_dense_features_stand_on_their_own_voxels(shape, every):
    ramp = sum(
        factor * torch.arange(float(n)).view([-1 if a == axis else 1 for a in range(3)])
        for axis, (n, factor) in enumerate(zip(shape, (1.0, 10.0, 100.0), strict=True))
    ).expand(shape)[None]
    dense = dense_features(Identity(), ramp, (5, 6, 7), every=every)
    kept = ramp[:, :: every[0], :: every[1], :: every[2]]
    assert dense.shape == (2, *kept.shape[1:])
    assert torch.allclose(dense[0], kept[0], atol=1e-3)
    # The map of stride 2 interpolates to the same ramp except beyond its last centre.
    first = tuple(slice(0, -(-2 // s)) for s in every)
    assert torch.allclose(dense[1][first], kept[0][first], atol=1e-3)


def test_dense_features_of_every_other_slice_by_windows_of_depth_1():
    ramp = torch.arange(9 * 6 * 7, dtype=torch.float32).reshape(1, 9, 6, 7)
    dense = dense_features(Identity(), ramp, (1, 6, 7), every=(4, 2, 1))
    torch.testing.assert_close(dense[:1], ramp[:, ::4, ::2])


def test_upsampling_meets_the_input_where_an_impulse_was():
    torch.manual_seed(0)
    for stride in (2, 4):
        x = torch.zeros(1, 1, 33, 1, 1)
        x[0, 0, 16] = 1.0
        y = F.conv3d(x, torch.ones(1, 1, 2 * stride - 1, 1, 1), None, (stride, 1, 1), (stride - 1, 0, 0))
        back = upsample(y, (33, 1, 1), (stride, 1, 1))[0, 0, :, 0, 0]
        centre = (back * torch.arange(33)).sum() / back.sum()
        assert centre.item() == pytest.approx(16.0, abs=1e-4)


def test_stitching_matches_one_window_far_from_its_border():
    net = encoder(norm="batch")
    volume = torch.randn(1, 24, 24, 24)
    whole = dense_features(net, volume, (24, 24, 24))
    assert whole.shape == (sum(net.channels), 24, 24, 24)
    maps = net(volume[None])
    expected = torch.cat([upsample(m, (24,) * 3, s) for m, s in zip(maps, net.strides, strict=True)], 1)
    assert torch.allclose(whole, expected[0].detach(), atol=1e-4)
    deepest = dense_features(net, volume, (24, 24, 24), levels=[-1])
    assert torch.equal(deepest, whole[-net.channels[-1] :])


def test_bfloat16_is_close_and_the_mode_is_put_back():
    net = encoder().train()
    volume = torch.randn(1, 16, 16, 16)
    full = embed_volume(net, volume, (12, 12, 12))
    half = embed_volume(net, volume, (12, 12, 12), autocast=torch.bfloat16)
    assert half.dtype == torch.float32 and not torch.equal(full, half)
    assert (full - half).norm() / full.norm() < 0.05
    assert all(module.training for module in net.modules())


def test_autocast_leaves_the_interpolation_of_a_float32_map_alone():
    map_ = torch.rand(1, 4, 5, 5, 5) * 100
    exact = upsample(map_, (40, 40, 40), (8, 8, 8))
    ramp = torch.arange(13 * 11 * 10.0).reshape(1, 13, 11, 10)
    with torch.autocast("cpu", torch.bfloat16):
        found = upsample(map_, (40, 40, 40), (8, 8, 8))
        half = upsample(map_.bfloat16(), (40, 40, 40), (8, 8, 8))
    assert found.dtype == torch.float32 and torch.equal(found, exact)
    assert half.dtype == torch.bfloat16  # a map of less precision stays what it is
    dense = dense_features(Identity(), ramp, (5, 6, 7), autocast=torch.bfloat16)
    assert torch.equal(dense, dense_features(Identity(), ramp, (5, 6, 7)))


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        embed_volume(Identity(), torch.zeros(1, 4, 4, 4), (2, 2, 2), 1.0)
    with pytest.raises(ValueError, match="patch"):
        embed_volume(Identity(), torch.zeros(1, 4, 4, 4), (2, 2))
    with pytest.raises(ValueError, match="C, D, H, W"):
        dense_features(Identity(), torch.zeros(4, 4, 4), (2, 2, 2))


def test_recalibration_makes_eval_mode_normalise_the_target_data():
    net = encoder()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 1, 1, 32, 32, generator=generator) * 5 + 3 for _ in range(8)]
    weights = {name: p.clone() for name, p in net.named_parameters()}
    counted = {name: b.clone() for name, b in net.named_buffers()}
    assert recalibrate_norm(net, iter(batches)) == 8
    assert not any(module.training for module in net.modules())
    assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
    assert not torch.equal(net.bn1.running_mean, counted["bn1.running_mean"])
    assert net.bn1.momentum == 0.1
    with torch.no_grad():
        before = net.conv1(torch.cat(batches)[:, :, 0], True)
    assert torch.allclose(net.bn1.running_mean, before.mean(dim=(0, 2, 3)), atol=1e-3)
    after = net.bn1(before)
    assert after.mean().abs() < 0.02 and (after.std() - 1).abs() < 0.02


def test_recalibration_without_batch_norm_or_without_batches():
    assert recalibrate_norm(encoder(norm="group"), []) == 0
    net = encoder()
    net.bn1.running_mean.fill_(7.0)
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_norm(net, [])
    assert bool((net.bn1.running_mean == 7).all()) and net.bn1.momentum == 0.1
