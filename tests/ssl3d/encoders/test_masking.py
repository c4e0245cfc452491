"""Encoders on the visible part of their input: statistics, depths, and no trace left on the encoder."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from ssl3d.api import can_mask, only_visible, visible_at
from ssl3d.convert.config import ConvertedConfig
from ssl3d.convert.encoder import ConvertedEncoder
from ssl3d.encoders.resnet import ResNet10


def blocks(count, side, batch=2, seed=0):
    """A random mask of blocks, (batch, 1, D, H, W), with some of each kind in every example."""
    visible = torch.rand(batch, 1, *count, generator=torch.Generator().manual_seed(seed)) < 0.5
    visible.flatten(1)[:, 0], visible.flatten(1)[:, -1] = True, False
    for axis in range(3):
        visible = visible.repeat_interleave(side[axis], axis + 2)
    return visible


def encoder(**options):
    torch.manual_seed(0)
    return ResNet10(ResNet10.Config(width=8, **options))


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize("size", [(32, 32, 32), (1, 64, 64)], ids=["volume", "image"])
def test_masked_places_are_zero_at_every_depth(norm, size):
    visible = blocks([-(-n // 16) for n in size], [min(16, n) for n in size])
    made = encoder(norm=norm)
    with only_visible(made, visible):
        maps = made(torch.randn(2, 1, *size) * visible)
    for level in maps:
        known = visible_at(visible, tuple(level.shape[2:])).expand_as(level)
        assert level[~known].abs().sum() == 0
        assert level[known].abs().sum() > 0
    assert all(
        level[~visible_at(visible, tuple(level.shape[2:])).expand_as(level)].any()
        for level in made(torch.randn(2, 1, *size))
    )


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 4, 8), (1, 16, 16), (12, 3, 6)])
@pytest.mark.parametrize("size", [(24, 20, 17), (1, 33, 5), (32, 48, 16)])
def test_a_cell_of_a_map_is_its_strides_voxels(size, stride):
    visible = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)) < 0.02
    shape = tuple(-(-n // s) for n, s in zip(size, stride))
    found = visible_at(visible, shape, stride)
    assert found.shape == (2, 1, *shape) and found.dtype == torch.bool
    for at in itertools.product(*map(range, shape)):
        cell = tuple(slice(i * s, (i + 1) * s) for i, s in zip(at, stride))
        assert torch.equal(found[(..., *at)], visible[(..., *cell)].flatten(1).any(1, keepdim=True))


def test_without_a_stride_cells_are_those_of_a_power_of_two_or_else_equal():
    visible = torch.zeros(1, 1, 24, 36, 40, dtype=torch.bool)
    visible[:, :, :16, :27] = True
    found = visible_at(visible, (2, 4, 80))  # of 16 voxels, of 9, and of half a voxel
    assert found[0, 0, :, 0, 0].tolist() == [True, False]
    assert found[0, 0, 0, :, 0].tolist() == [True, True, True, False]
    assert torch.equal(visible_at(visible[:, :, :1], (4, 80)), found[:, :, 0])


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize(
    "size,stage_strides",
    [
        ((24, 24, 24), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))),
        ((3, 20, 36), ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))),
        ((1, 24, 40), ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))),
        ((30, 32, 20), ((1, 1, 1), (3, 1, 2), (1, 2, 2), (2, 2, 2))),
    ],
    ids=["volume", "depth kept", "image", "thirds"],
)
def test_a_crop_is_seen_like_the_multiple_that_it_is_cut_from(norm, size, stage_strides):
    # Beyond a crop there are zeros, and where voxels are masked too.
    made = encoder(norm=norm, stage_strides=stage_strides, stem_stride=(1 if size[0] == 3 else 2, 2, 2))
    deepest = made.strides[-1]
    counts = [-(-n // s) for n, s in zip(size, deepest)]
    cut = (..., *(slice(n) for n in size))
    visible = blocks(counts, deepest)[cut]
    whole = torch.zeros(2, 1, *(1 if n == 1 else c * s for n, c, s in zip(size, counts, deepest)))
    whole[cut] = torch.randn(2, 1, *size) * visible
    shown = torch.zeros_like(whole, dtype=torch.bool)
    shown[cut] = visible
    other = copy.deepcopy(made)
    with only_visible(made, visible):
        maps = made(whole[cut])
    with only_visible(other, shown):
        expected = other(whole)
    for one, larger, stride in zip(maps, expected, made.strides, strict=True):
        torch.testing.assert_close(one, larger[(..., *map(slice, one.shape[2:]))], atol=1e-4, rtol=1e-3)
        known = visible[(..., *(slice(None, None, s) for s in stride))].expand_as(one)
        assert not one[~known].any() and one[known].any()
    for one, larger in zip(made.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, larger, atol=1e-4, rtol=1e-3)


class Two(nn.Module):
    """A convolution and a norm, as any library builds them."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv3d(1, 6, 3, padding=1), norm
        for weight in self.norm.parameters():
            nn.init.normal_(weight)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_batch_statistics_are_those_of_the_visible_places():
    visible = blocks((2, 2, 2), (4, 4, 4))
    x = torch.randn(2, 1, 8, 8, 8) * visible
    made = Two(nn.BatchNorm3d(6))
    expected = copy.deepcopy(made.norm)
    with only_visible(made, visible):
        found = made(x)
    # As torch does it, on a plain table of the visible places alone.
    places = visible.squeeze(1)
    rows = made.conv(x).movedim(1, -1)[places]
    table = functional.batch_norm(
        rows, expected.running_mean, expected.running_var, expected.weight, expected.bias, True, 0.1, 1e-5
    )
    assert torch.allclose(found.movedim(1, -1)[places], table, atol=1e-5)
    assert torch.allclose(made.norm.running_mean, expected.running_mean, atol=1e-6)
    assert torch.allclose(made.norm.running_var, expected.running_var, atol=1e-6)
    assert made.norm.num_batches_tracked == 1
    made.eval()
    with only_visible(made, visible):
        assert torch.allclose(made(x), made.norm(made.conv(x)) * visible, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("kind", ["group", "instance"])
def test_group_statistics_are_those_of_the_visible_places(kind, groups):
    if kind == "instance":
        groups = 6
    visible = blocks((2, 2, 2), (4, 4, 4))
    x = torch.randn(2, 1, 8, 8, 8) * visible
    made = Two(nn.GroupNorm(groups, 6) if kind == "group" else nn.InstanceNorm3d(6, affine=True))
    with only_visible(made, visible):
        found = made(x)
    dense = made.conv(x)
    for n in range(2):
        places = visible[n, 0]
        table = dense[n][:, places].unsqueeze(0)  # (1, C, places)
        expected = functional.group_norm(table, groups, made.norm.weight, made.norm.bias)
        assert torch.allclose(found[n][:, places], expected[0], atol=1e-5)


def test_everything_visible_is_the_encoder_as_it_is():
    made, x = encoder(), torch.randn(2, 1, 32, 32, 32)
    expected = copy.deepcopy(made)(x)
    with only_visible(made, torch.ones_like(x, dtype=torch.bool)):
        found = made(x)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_activation_checkpointing_changes_nothing(norm):
    visible = blocks((2, 2, 2), (16, 16, 16))
    x = torch.randn(2, 1, 32, 32, 32) * visible
    found = []
    for checkpointing in (False, True):
        made = encoder(norm=norm, checkpointing=checkpointing)
        with only_visible(made, visible):
            maps = made(x)
        loss = sum(level.square().mean() for level in maps)  # blocks are computed again, outside
        first = torch.autograd.grad(loss, list(made.parameters()), retain_graph=True)
        loss.backward()  # and once more, as by GradNorm
        second = [p.grad for p in made.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        found.append(second + list(made.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_no_trace_is_left_on_the_encoder():
    made = encoder()
    x = torch.randn(2, 1, 32, 32, 32)
    before = copy.deepcopy(made.eval())
    with pytest.raises(RuntimeError, match="on purpose"), only_visible(made, blocks((2, 2, 2), (16,) * 3)):
        made(x)
        raise RuntimeError("on purpose")
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in made.modules())
    for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert all(torch.equal(a, b) for a, b in zip(one(x), before(x)))


def test_attention_cannot_be_masked_like_this():
    assert can_mask(encoder())
    assert not can_mask(nn.TransformerEncoderLayer(8, 2))


def test_slices_along_several_axes_cannot_be_masked_like_this():
    strides = ((2, 2, 2), *((1, 1, 1),) * 4)
    for kind, can in (("acs", True), ("triplanar", False)):
        made = ConvertedEncoder(ConvertedConfig(network="shufflenet_v2_x0_5", kind=kind, strides=strides))
        assert can_mask(made) == can
