"""Convolution kinds against references written from their definitions."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl3d.encoders.convolutions import (
    ACS,
    KINDS,
    Flat,
    Full,
    Pseudo3D,
    acs_conv3d,
    acs_kernel,
    acs_split,
    conv3d,
    convolution,
)


def acs_by_loops(x, weight, stride, padding, dilation):
    """The definition, a voxel at a time: on the flat axis output i reads i*s - p + d(K-1)/2."""
    batch, _, *space = x.shape
    out_channels, _, size, _ = weight.shape
    shape = [
        (n + 2 * p - d * (size - 1) - 1) // s + 1
        for n, s, p, d in zip(space, stride, padding, dilation, strict=True)
    ]
    out = x.new_zeros(batch, out_channels, *shape)
    third, rest = divmod(out_channels, 3)
    axial, coronal = third + (rest > 0), third + (rest > 1)
    for o in range(out_channels):
        flat = 0 if o < axial else 1 if o < axial + coronal else 2
        for place in itertools.product(*map(range, shape)):
            for a, b in itertools.product(range(size), repeat=2):
                taps = [a, b]
                taps.insert(flat, (size - 1) // 2)
                at = [
                    i * s - p + d * k
                    for i, s, p, d, k in zip(place, stride, padding, dilation, taps, strict=True)
                ]
                if all(0 <= v < n for v, n in zip(at, space, strict=True)):
                    out[(slice(None), o, *place)] += x[(slice(None), slice(None), *at)] @ weight[o, :, a, b]
    return out


@pytest.mark.parametrize(
    "channels,split", [(3, (1, 1, 1)), (4, (2, 1, 1)), (5, (2, 2, 1)), (64, (22, 21, 21))]
)
def test_left_over_channels_go_to_the_first_planes(channels, split):
    assert acs_split(channels) == split


@pytest.mark.parametrize(
    "size,stride,padding,dilation",
    [
        (3, (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        (3, (2, 2, 2), (1, 1, 1), (1, 1, 1)),
        (3, (1, 2, 3), (1, 0, 2), (1, 1, 1)),
        (3, (1, 1, 2), (2, 2, 2), (2, 2, 2)),
        (3, (2, 1, 1), (0, 3, 1), (1, 2, 1)),
        (5, (2, 2, 2), (2, 2, 2), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("space", [(6, 7, 5), (5, 6, 8)])
def test_acs_is_its_definition_for_any_stride_padding_and_dilation(size, stride, padding, dilation, space):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *space, dtype=torch.float64)
    weight = torch.randn(5, 3, size, size, dtype=torch.float64)
    expected = acs_by_loops(x, weight, stride, padding, dilation)
    for whole in (False, True):
        seen = acs_conv3d(x, weight, None, stride, padding, dilation, whole=whole)
        assert torch.allclose(seen, expected)


def test_acs_with_groups_and_bias_keeps_each_group_to_its_channels():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 4, 5, 6, dtype=torch.float64)
    weight, bias = torch.randn(6, 2, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    dense = torch.zeros(6, 6, 3, 3, dtype=torch.float64)
    for o in range(6):
        dense[o, 2 * (o // 2) : 2 * (o // 2) + 2] = weight[o]
    expected = acs_conv3d(x, dense, bias, padding=(1, 1, 1))
    assert torch.allclose(acs_conv3d(x, weight, bias, padding=(1, 1, 1), groups=3), expected)


def test_acs_channels_see_only_their_plane():
    x = torch.zeros(1, 1, 5, 5, 5)
    x[0, 0, 2, 2, 2] = 1.0
    y = acs_conv3d(x, torch.ones(3, 1, 3, 3), padding=(1, 1, 1))[0]
    for channel in range(3):
        reach = [len(set(y[channel].nonzero()[:, axis].tolist())) for axis in range(3)]
        assert reach == [1 if axis == channel else 3 for axis in range(3)]
    assert acs_kernel(torch.ones(3, 1, 3, 3)).sum(dim=(1, 2, 3, 4)).tolist() == [9.0, 9.0, 9.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
def test_an_image_is_a_volume_of_depth_1_for_all_kinds_but_acs(kind, kernel, stride):
    torch.manual_seed(0)
    layer = convolution(kind, 2, 6, kernel, stride).double()
    if kind == "p3d" and kernel > 1:
        nn.init.normal_(layer.depth_weight)
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    image = layer(x, True)
    if kind == "acs":  # there the kernels are left whole
        expected = F.conv2d(x, layer.weight, None, stride[1:], kernel // 2)
    else:
        expected = layer(x.unsqueeze(2), False).squeeze(2)
    assert torch.allclose(image, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 3)])
@pytest.mark.parametrize("space", [(1, 1, 1), (2, 5, 8), (7, 4, 9)])
def test_sizes_shrink_to_the_ceiling_of_size_over_stride(kind, kernel, stride, space):
    y = convolution(kind, 1, 3, kernel, stride)(torch.randn(1, 1, *space), False)
    assert y.shape == (1, 3, *(-(-n // s) for n, s in zip(space, stride, strict=True)))


def test_kernels_have_the_shapes_of_their_kind():
    assert Full(2, 6, 3).weight.shape == (6, 2, 3, 3, 3)
    for kind in (ACS, Flat, Pseudo3D):
        assert kind(2, 6, 3).weight.shape == (6, 2, 3, 3)
    assert [name for name, _ in ACS(2, 6, 3).named_parameters()] == ["weight"]


def test_pseudo_3d_begins_as_the_2d_network_on_every_slice():
    torch.manual_seed(0)
    layer, flat = Pseudo3D(2, 6, 3), Flat(2, 6, 3)
    flat.load_state_dict({"weight": layer.weight})
    x = torch.randn(1, 2, 5, 6, 7)
    assert torch.allclose(layer(x, False), flat(x, False), atol=1e-6)


def test_weights_keep_the_variance_that_the_layer_promises():
    torch.manual_seed(0)
    for kind, taps in (("3d", 27), ("acs", 9)):
        weight = convolution(kind, 64, 128, 3).weight
        assert weight.var().item() == pytest.approx(2 / (128 * taps), rel=0.05)


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel must be odd, not 4"):
        convolution("acs", 1, 3, 4)


SMALL_STEMS = """
import itertools, torch
from ssl3d.encoders.convolutions import conv3d
torch.manual_seed(0)
for kernel in ((7, 7, 1), (7, 1, 7), (7, 7, 7)):
    spaces = [(1, 1, 2), (3, 9, 9), (5, 5, 5)]
    for space, dtype in itertools.product(spaces, [torch.float32, torch.bfloat16]):
        for _ in range(3):
            x = torch.randn(2, 1, *space)
            weight = torch.randn(16, 1, *kernel)
            found = []
            for precision in (torch.float64, dtype):
                w = weight.to(precision).requires_grad_()
                pads = tuple(k // 2 for k in kernel)
                y = conv3d(x.to(precision), w, None, (2, 2, 2), pads)
                y.backward(torch.ones_like(y))
                found.append(w.grad.double())
            size = float(max(x.abs().max(), found[0].abs().max()))
            assert torch.allclose(*found, atol=0.03 * size), (kernel, space, dtype)
"""


def test_wide_kernels_on_small_volumes_have_right_gradients_and_do_not_crash():
    """oneDNN writes beyond its buffers there, which ends the process: so in one of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL_STEMS],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-500:]


NARROW_SHORTCUTS = """
import torch
import torch.nn.functional as F
from ssl3d.encoders.convolutions import conv2d

for channels in (2, 4, 8, 15, 16):
    torch.manual_seed(0)
    x, weight = torch.randn(4, channels, 48, 48), torch.randn(16, channels, 1, 1)
    found = []
    for run, layout in ((F.conv2d, torch.contiguous_format), (conv2d, torch.channels_last)):
        for _ in range(9):  # what is written out of bounds is not always needed
            ours = x.clone(memory_format=layout).requires_grad_()
            kernel = weight.clone().requires_grad_()
            y = run(ours, kernel, stride=(2, 2), padding=(0, 0))
            y.square().sum().backward()
        found.append((y, ours.grad, kernel.grad))
    for theirs, one in zip(*found):
        torch.testing.assert_close(one, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
"""


def test_narrow_strided_single_taps_have_right_gradients_and_do_not_crash():
    """oneDNN writes beyond its buffers there too, with the channels last in memory."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW_SHORTCUTS],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_CHECK_": "3", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-500:]


# Depth-wise and grouped --------------------------------------------------------------------------------


def dense(weight, in_channels, groups):
    """The kernel of one group that computes the same: zeros between the groups."""
    out_channels, inside = weight.shape[:2]
    whole = weight.new_zeros(out_channels, in_channels, *weight.shape[2:])
    for o in range(out_channels):
        group = o // (out_channels // groups)
        whole[o, group * inside : (group + 1) * inside] = weight[o]
    return whole


@pytest.mark.parametrize(
    "size", [(1, 3, 3), (3, 1, 3), (3, 3, 1), (3, 1, 1), (3, 3, 3), (1, 1, 1), (5, 3, 3)]
)
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 3), (3, 1, 2)])
@pytest.mark.parametrize("space", [(1, 1, 1), (2, 5, 8), (7, 4, 9)])
def test_depthwise_routes_are_torchs_convolution_with_its_gradients(size, stride, space):
    torch.manual_seed(0)
    x = torch.randn(2, 4, *space, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, *size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64)
    pads = tuple(k // 2 for k in size)
    expected = F.conv3d(x, weight, bias, stride, pads, 1, 4)
    direction = torch.randn_like(expected)
    theirs = torch.autograd.grad((expected * direction).sum(), [x, weight])
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        y = conv3d(x.contiguous(memory_format=layout), weight, bias, stride, pads, 1, 4)
        assert torch.allclose(y, expected)
        assert y.is_contiguous(memory_format=layout)
        ours = torch.autograd.grad((y * direction).sum(), [x, weight])
        assert all(torch.allclose(one, two) for one, two in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("padding", [(0, 0, 0), (2, 1, 0), (3, 2, 2)])
def test_depthwise_routes_take_any_padding(padding):
    x, weight = torch.randn(1, 3, 5, 5, 5), torch.randn(3, 1, 3, 3, 3)
    for kernel in (weight, weight[:, :, :1], weight[:, :, :, :1], weight[..., :1], weight[..., :1, :1]):
        for stride in ((1, 1, 1), (2, 3, 4)):
            expected = F.conv3d(x, kernel, None, stride, padding, 1, 3)
            assert torch.allclose(conv3d(x, kernel, None, stride, padding, 1, 3), expected, atol=1e-5)


@pytest.mark.parametrize(
    "stride,padding,dilation",
    [
        ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
        ((2, 2, 2), (1, 1, 1), (1, 1, 1)),
        ((1, 2, 3), (1, 0, 2), (1, 1, 1)),  # the flat axis is padded or cropped: the package's defect
        ((2, 1, 1), (0, 3, 1), (1, 2, 1)),
        ((1, 1, 2), (2, 2, 2), (2, 2, 2)),
    ],
)
@pytest.mark.parametrize("out,groups", [(5, 5), (10, 5), (5, 1)])
def test_grouped_acs_is_its_definition(stride, padding, dilation, out, groups):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 7, 5, dtype=torch.float64)
    weight = torch.randn(out, 5 // groups, 3, 3, dtype=torch.float64)
    bias = torch.randn(out, dtype=torch.float64)
    expected = acs_by_loops(x, dense(weight, 5, groups), stride, padding, dilation)
    for whole in (None, True):
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            seen = acs_conv3d(
                x.contiguous(memory_format=layout), weight, bias, stride, padding, dilation, groups, whole
            )
            assert torch.allclose(seen, expected + bias[:, None, None, None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 3)])
@pytest.mark.parametrize("space", [(1, 1, 1), (2, 5, 8), (7, 4, 9)])
def test_groups_of_every_kind_are_the_dense_layer_with_zeros_between_them(kind, groups, stride, space):
    torch.manual_seed(0)
    layer = convolution(kind, 6, 6, 3, stride, groups).double()
    whole = convolution(kind, 6, 6, 3, stride).double()
    if kind == "p3d":
        nn.init.normal_(layer.depth_weight)
    for name, weight in layer.state_dict().items():
        whole.state_dict()[name].copy_(dense(weight, 6, groups))
    x = torch.randn(2, 6, *space, dtype=torch.float64)
    assert torch.allclose(layer(x, False), whole(x, False))
    assert torch.allclose(layer(x[:, :, 0], True), whole(x[:, :, 0], True))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_a_depthwise_layer_do_not_meet(kind):
    layer = convolution(kind, 6, 6, 3, groups=6)
    x = torch.zeros(1, 6, 3, 3, 3)
    x[:, 4] = 1.0
    assert layer(x, False).sum(dim=(0, 2, 3, 4)).ne(0).tolist() == [False] * 4 + [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_depthwise_weights_keep_the_variance(kind):
    """torchvision's begin a width too small, as fan-out counts the outputs of all groups."""
    torch.manual_seed(0)
    layer = convolution(kind, 96, 96, 3, groups=96)
    y = layer(torch.randn(4, 96, 9, 9, 9), False)[..., 2:-2, 2:-2, 2:-2]
    assert y.var().item() == pytest.approx(2.0, rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (3, 5, 2), (5, 1, 3), (4, 7, 6)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_depthwise_gradients_in_bfloat16_are_those_in_float32(kind, space, stride):
    torch.manual_seed(0)
    layer = convolution(kind, 32, 32, 3, stride, 32)
    x = torch.randn(3, 32, *space)
    found = []
    for half in (False, True):
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            layer.zero_grad()
            given = x.clone().contiguous(memory_format=layout).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = layer(given, False)
            y.float().square().sum().backward()
            found.append([given.grad, *(p.grad for p in layer.parameters())])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.allclose(one, two, atol=0.03 * float(one.abs().max()), rtol=0)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="groups must divide 6 and 8 channels; 4 do not"):
        convolution("acs", 6, 8, 3, groups=4)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_taps_keep_the_channels_last_and_the_result(stride, dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 8, 5, 6, 7), torch.randn(12, 8, 1, 1, 1), torch.randn(12)
    expected = F.conv3d(x, weight, bias, stride)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    y = conv3d(last.to(dtype), weight.to(dtype), bias.to(dtype), stride)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.allclose(y.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.1)
