"""Convolution kinds that take volumes and images: full 3D, pseudo-3D, axial-coronal-sagittal, 2.5D.

Every kind has one module whose `forward(x, image)` is told by its caller whether the network's input is
an image. It is an argument and never kept: a flag left on the module gives silently wrong gradients when
activation checkpointing runs the forward pass again. Images travel as (B, C, H, W), volumes as
(B, C, D, H, W).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Triple = tuple[int, int, int]
Axes = tuple[int, ...]

KINDS = ("3d", "p3d", "acs", "2.5d")


def triple(value: int | Sequence[int]) -> Triple:
    """Repeat one number for (D, H, W), or return the three given.

    Example:
        >>> triple(3), triple([1, 2, 2])
        ((3, 3, 3), (1, 2, 2))
    """
    if isinstance(value, int):
        return (value, value, value)
    depth, height, width = value
    return (depth, height, width)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
    groups: int = 1,
) -> Tensor:
    """Compute `torch.nn.functional.conv3d`, with right gradients on the CPU on small maps as well.

    There, oneDNN (torch 2.15, AVX-512) reads and writes beyond its buffers in the weight gradient of
    small padded maps: in bfloat16 with kernel 3 on depth 2, and in float32 with kernel 7 and stride 2 on
    5 voxels. The outcome is infinite or plausible wrong numbers, or a crash. Padding beforehand takes
    another path; maps that small make it cheap.

    Depth-wise kernels take the routes of `depthwise_conv3d`; single taps with the channels last in memory
    are a 2D convolution of slices, since the 3D one in float32 is slower and puts the channels first.
    """
    stride, padding, dilation = triple(stride), triple(padding), triple(dilation)
    if groups > 1 and groups == x.shape[1] == weight.shape[0] and dilation == (1, 1, 1):
        y = depthwise_conv3d(x, weight, stride, padding)
        return y if bias is None else y + bias.to(y.dtype)[:, None, None, None]
    single = groups == 1 and weight.shape[2:] == (1, 1, 1) and padding == (0, 0, 0)
    if single and x.device.type == "cpu" and _format(x) is torch.channels_last_3d:
        x = x[:, :, :: stride[0], :: stride[1], :: stride[2]]
        y = F.conv2d(_fold(x, (0, 2), (1,), (3,), (4,)), weight[:, :, 0], bias)
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    x, left = _pad_beforehand(x, weight, padding)
    return F.conv3d(x, weight, bias, stride, triple(left), dilation, groups)


def conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: int | tuple[int, int],
    groups: int = 1,
    bias: Tensor | None = None,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Compute `torch.nn.functional.conv2d`, with the same care as `conv3d`.

    Single taps with a stride, from 2 to 15 channels that lie last in memory to few, corrupt the heap in
    their backward pass (float32, torch 2.15, AVX-512): there the pixels that they read are cut out
    beforehand. Wider ones are right as they are, and up to 1.6 times as fast so.
    """
    pads = (padding, padding) if isinstance(padding, int) else padding
    if x.device.type == "cpu" and x.shape[1] < 16 and weight.shape[2:] == (1, 1) and not any(pads):
        x, stride = x[..., :: stride[0], :: stride[1]], (1, 1)
    x, (height, width) = _pad_beforehand(x, weight, pads)
    return F.conv2d(x, weight, bias, stride, (height, width), dilation, groups)


def depthwise_conv3d(x: Tensor, weight: Tensor, stride: Triple, padding: Triple) -> Tensor:
    """Filter each channel with its own kernel, by 2D convolutions, which have fast kernels.

    The axis along which the kernel is flat joins the batch or the channels, whichever needs no copy with
    the channels last in memory. A kernel that is flat nowhere is the sum over its planes. Measured on one
    AVX-512 core, 96 channels of 16^3, channels last, forward and backward, in ms, `torch.conv3d` against
    this: in bfloat16 15 / 0.9 (1x3x3), 17 / 2.2 (3x1x3), 14 / 1.0 (3x3x1), 12 / 0.6 (3x1x1), 28 / 5.9
    (3x3x3); in float32 7.5 / 4.0, 8.4 / 5.4, 8.8 / 1.5, 12 / 1.1, 13 / 9.1. Not measured on a GPU.

    Args:
        x: Input (B, C, D, H, W).
        weight: Kernels (C, 1, KD, KH, KW) of any size.
        stride: Strides along D, H, W.
        padding: Numbers of zeros on both sides, along D, H, W.

    Returns:
        Output (B, C, D', H', W'), in the memory format of `x`.
    """
    return _depthwise(x, weight, stride, padding).contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    """Return channels last where `x` has them there and could have them elsewhere."""
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format


def _depthwise(x: Tensor, weight: Tensor, stride: Triple, padding: Triple) -> Tensor:
    """Compute `depthwise_conv3d`, in any memory format."""
    size = weight.shape[2:]
    channels = x.shape[1]
    if any(2 * pad > k for pad, k in zip(padding, size, strict=True)):  # nobody needs it: no route
        x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
        padding = (0, 0, 0)
    if size[0] == 1:
        return _flat_depth(x[:, :, :: stride[0]], weight[:, :, 0], stride[1:], padding[1:])
    if size[1] == size[2] == 1:
        x = x[..., :: stride[1], :: stride[2]]
        space = x.shape[3:]
        columns = _fold(x, (0,), (1,), (2,), (3, 4))
        y = conv2d(columns, weight[..., 0], (stride[0], 1), (padding[0], 0), channels)
        return y.unflatten(3, space)
    if size[2] == 1:
        return _flat_width(x[..., :: stride[2]], weight[..., 0], stride[:2], padding[:2])
    if size[1] == 1:
        rows = x[..., :: stride[1], :]
        return _flat_height(rows, weight[:, :, :, 0], stride[::2], padding[::2])
    return _planes(x, weight, stride, padding)


def _fold(x: Tensor, batch: Axes, channels: Axes, rows: Axes, columns: Axes) -> Tensor:
    """Fold `x` into a picture (B, C, H, W), each axis of which is made of these axes of `x`.

    No copy is made where that can be; otherwise the copy has the channels where `x` has them, for a plain
    `reshape` would put them first.
    """
    last = x.stride(1) == 1
    groups = (batch, rows, columns, channels) if last else (batch, channels, rows, columns)
    y = x.permute([axis for group in groups for axis in group])
    # A list, not a generator, which torch.compile could not follow.
    y = y.reshape([prod([x.shape[axis] for axis in group]) for group in groups])
    return y.permute(0, 3, 1, 2) if last else y


def _flat_depth(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Convolve slices as rows of the batch."""
    batch, channels, depth = x.shape[:3]
    y = conv2d(_fold(x, (0, 2), (1,), (3,), (4,)), weight, stride, padding, channels)
    return y.unflatten(0, (batch, depth)).transpose(1, 2)


def _flat_height(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Convolve rows of voxels as rows of the batch, at the price of a copy."""
    batch, channels, _, height = x.shape[:4]
    y = conv2d(_fold(x, (0, 3), (1,), (2,), (4,)), weight, stride, padding, channels)
    return y.unflatten(0, (batch, height)).permute(0, 2, 3, 1, 4)


def _flat_width(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Convolve columns as channels, each with the same kernels."""
    channels, width = x.shape[1], x.shape[4]
    y = _fold(x, (0,), (4, 1), (2,), (3,))
    y = conv2d(y, weight.repeat(width, 1, 1, 1), stride, padding, width * channels)
    return y.unflatten(1, (width, channels)).permute(0, 2, 3, 4, 1)


def _planes(x: Tensor, weight: Tensor, stride: Triple, padding: Triple) -> Tensor:
    """Sum over the kernel's planes (KH, KW), each on the slices that it meets."""
    depth, size, step, pad = x.shape[2], weight.shape[2], stride[0], padding[0]
    length = (depth + 2 * pad - size) // step + 1
    total: Tensor | None = None
    for k in range(size):
        # Output i reads slice i * step + k - pad: which i, of those inside?
        first = max(0, -(-(pad - k) // step))
        end = min(length, (depth - 1 + pad - k) // step + 1)
        if first >= end:
            continue
        begin = first * step + k - pad
        plane = weight[:, :, k]
        if step == 1:  # all slices, for they join the batch without a copy; cut afterwards
            y = _flat_depth(x, plane, stride[1:], padding[1:])[:, :, begin : begin + end - first]
        else:
            seen = x[:, :, begin : begin + (end - first - 1) * step + 1 : step]
            y = _flat_depth(seen, plane, stride[1:], padding[1:])
        y = F.pad(y, (0, 0, 0, 0, first, length - end))
        total = y if total is None else total + y
    assert total is not None  # the padding is narrower than the kernel
    return total


def _pad_beforehand(x: Tensor, weight: Tensor, pads: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Pad where the convolution cannot be trusted to, and return what is left for it to pad."""
    if not any(pads) or x.device.type != "cpu":
        return x, pads
    used = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    risky = used not in (torch.float32, torch.float64) or max(weight.shape[2:]) > 3
    reach = max(*weight.shape[2:], *(2 * pad + 1 for pad in pads))  # a dilated kernel's is its padding's
    if not risky or min(x.shape[2:]) >= 2 * reach:
        return x, pads
    return F.pad(x, [p for pad in reversed(pads) for p in (pad, pad)]), (0,) * len(pads)


def acs_split(channels: int) -> Triple:
    """Split output channels over the axial (H, W), coronal (D, W) and sagittal (D, H) plane.

    Each gets a third; what is left over goes to the first ones (Yang et al., arXiv 1911.10477).

    Example:
        >>> acs_split(64)
        (22, 21, 21)
    """
    third, rest = divmod(channels, 3)
    return (third + (rest > 0), third + (rest > 1), third)


def acs_kernel(weight: Tensor) -> Tensor:
    """Make the K x K x K kernel, mostly zeros, that computes what ACS does with 2D kernels.

    Args:
        weight: 2D kernels (Cout, Cin / groups, K, K), K odd.

    Returns:
        3D kernels (Cout, Cin / groups, K, K, K).
    """
    size = weight.shape[-1]
    axial, coronal, sagittal = weight.split(acs_split(weight.shape[0]))
    before = after = size // 2
    return torch.cat(
        [
            F.pad(axial.unsqueeze(2), (0, 0, 0, 0, before, after)),
            F.pad(coronal.unsqueeze(3), (0, 0, before, after)),
            F.pad(sagittal.unsqueeze(4), (before, after)),
        ]
    )


def acs_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    dilation: Triple = (1, 1, 1),
    groups: int = 1,
    whole: bool | None = None,
) -> Tensor:
    """Convolve a volume by ACS: each output channel's 2D kernel lies in one of three planes.

    Along the axis on which its kernel is flat, output i reads input `i * stride - padding +
    dilation * (K - 1) / 2`, zero outside: the same place as the centre of a K x K x K kernel, for any
    stride, dilation, padding and size.

    Args:
        x: Input (B, Cin, D, H, W).
        weight: 2D kernels (Cout, Cin / groups, K, K), K odd.
        bias: Bias of the output channels, (Cout,).
        stride: Strides along D, H, W.
        padding: Numbers of zeros on both sides, along D, H, W.
        dilation: Distances between taps, along D, H, W.
        groups: Number of groups of channels, which divides them, as in `torch.conv3d`.
        whole: Whether one convolution with the kernel of `acs_kernel` is run instead of three with flat
            kernels: more products, fewer passes over the input. None: the three, unless there are groups
            that the split would cut: depth-wise, each third of the channels has its input to itself.
    """
    depthwise = 1 < groups == x.shape[1] == weight.shape[0]
    if whole or (groups > 1 and not depthwise):
        return conv3d(x, acs_kernel(weight), bias, stride, padding, dilation, groups)
    size = weight.shape[-1]
    split = acs_split(weight.shape[0])
    parts = []
    biases = (None, None, None) if bias is None else bias.split(split)
    inputs = x.split(split, dim=1) if depthwise else (x, x, x)
    for flat, (kernel, offset, seen) in enumerate(zip(weight.split(split), biases, inputs, strict=True)):
        if kernel.shape[0] == 0:
            continue
        reach = dilation[flat] * (size - 1)
        before = padding[flat] - reach // 2
        after = 2 * padding[flat] - reach - before
        if before or after:  # never where the padding keeps the size; negative numbers crop
            pads = [0] * 6
            pads[2 * (2 - flat)], pads[2 * (2 - flat) + 1] = before, after
            seen = F.pad(seen, pads)
        thin = (padding[0], padding[1], padding[2])
        thin = tuple(0 if axis == flat else p for axis, p in enumerate(thin))  # type: ignore[assignment]
        flat_kernel = kernel.unsqueeze(2 + flat)
        if depthwise and dilation == (1, 1, 1):
            y = _depthwise(seen, flat_kernel, stride, thin)
            parts.append(y if offset is None else y + offset.to(y.dtype)[:, None, None, None])
        else:
            mine = kernel.shape[0] if depthwise else 1
            parts.append(conv3d(seen, flat_kernel, offset, stride, thin, dilation, mine))
    y = torch.cat(parts, dim=1)
    # A third of the channels has no memory format that its part of the output could take.
    return y.contiguous(memory_format=_format(x)) if depthwise else y


class Convolution(nn.Module, ABC):
    """A convolution of one kind, without bias, that keeps the size where the stride is 1.

    Subclasses hold `weight`, and compute an image's output from (B, C, H, W) and a volume's from
    (B, C, D, H, W).

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel: Size K of the kernels, odd.
        stride: Strides along D, H, W.
        groups: Number of groups of channels that see each other; `in_channels` of them is depth-wise.
        dilation: Distances between taps along D, H, W.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: Triple = (1, 1, 1),
        groups: int = 1,
        dilation: Triple = (1, 1, 1),
    ):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}")
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide {in_channels} and {out_channels} channels; {groups} do not"
            )
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.stride, self.groups, self.dilation = triple(stride), groups, triple(dilation)
        self.middle = kernel // 2
        self.padding = triple([self.middle * distance for distance in self.dilation])
        self.weight = nn.Parameter(torch.empty(self.weight_shape()))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if groups > 1:  # torch counts the outputs of all groups, of which an input reaches only its own
            with torch.no_grad():
                self.weight.mul_(groups**0.5)

    def weight_shape(self) -> tuple[int, ...]:
        """Return the 2D kernel's shape; overridden where the kernel is 3D."""
        return (self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel)

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Convolve (B, Cin, H, W) where `image`, else (B, Cin, D, H, W); sizes become ceil(n / stride)."""
        return self.on_image(x) if image else self.on_volume(x)

    def on_image(self, x: Tensor) -> Tensor:
        """Convolve images (B, C, H, W) as the 2D network does."""
        return self._in_plane(x, self.weight)

    def _in_plane(self, x: Tensor, weight: Tensor) -> Tensor:
        pads, dilation = self.padding[1:], self.dilation[1:]
        return conv2d(x, weight, self.stride[1:], pads, self.groups, dilation=dilation)

    @abstractmethod
    def on_volume(self, x: Tensor) -> Tensor:
        """Convolve volumes (B, C, D, H, W) as the 3D network does."""

    def extra_repr(self) -> str:
        """Describe the layer as `print` shows it."""
        more = f", groups={self.groups}" if self.groups > 1 else ""
        more += f", dilation={self.dilation}" if self.dilation != (1, 1, 1) else ""
        return f"{self.in_channels}, {self.out_channels}, kernel={self.kernel}, stride={self.stride}{more}"


class Full(Convolution):
    """K x K x K kernels. On an image only their middle plane meets anything but zeros."""

    def weight_shape(self) -> tuple[int, ...]:
        """Return the 3D kernel's shape, (Cout, Cin / groups, K, K, K)."""
        return (*super().weight_shape(), self.kernel)

    def on_image(self, x: Tensor) -> Tensor:
        """Convolve images, without the planes that would meet padding only."""
        return self._in_plane(x, self.weight[:, :, self.middle])

    def on_volume(self, x: Tensor) -> Tensor:
        """Convolve volumes with the full kernels."""
        return conv3d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


class Cuboid(Convolution):
    """Full kernels of one size along each axis; on an image only their middle plane counts."""

    def __init__(self, in_channels: int, out_channels: int, sizes: Triple, stride: Triple = (1, 1, 1)):
        self.sizes = sizes
        super().__init__(in_channels, out_channels, max(sizes), stride)
        self.padding = (sizes[0] // 2, sizes[1] // 2, sizes[2] // 2)

    def weight_shape(self) -> tuple[int, ...]:
        """Return the kernel's shape, (Cout, Cin, kD, kH, kW)."""
        return (self.out_channels, self.in_channels, *self.sizes)

    def on_image(self, x: Tensor) -> Tensor:
        """Convolve images, without the planes that would meet padding only."""
        return conv2d(x, self.weight[:, :, self.padding[0]], self.stride[1:], self.padding[1:])

    def on_volume(self, x: Tensor) -> Tensor:
        """Convolve volumes with the full kernels."""
        return conv3d(x, self.weight, None, self.stride, self.padding)


class Pseudo3D(Convolution):
    """1 x K x K, then K x 1 x 1 (P3D, Qiu et al., arXiv 1711.10305, serial form).

    `weight` has the 2D kernel's shape and name; `depth_weight` (Cout, Cout / groups, K) begins as the
    identity, so a network with 2D weights begins as that 2D network on every slice. Differs from the
    paper: no norm and no activation between the two, which would be no identity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: Triple = (1, 1, 1),
        groups: int = 1,
        dilation: Triple = (1, 1, 1),
    ):
        super().__init__(in_channels, out_channels, kernel, stride, groups, dilation)
        if kernel > 1:
            self.depth_weight = nn.Parameter(torch.empty(out_channels, out_channels // groups, kernel))
            nn.init.dirac_(self.depth_weight, groups)

    def on_image(self, x: Tensor) -> Tensor:
        """Convolve images; only the middle tap of the depth kernel meets anything but zeros."""
        x = super().on_image(x)
        if self.kernel == 1:
            return x
        return F.conv2d(x, self.depth_weight[:, :, self.middle, None, None], groups=self.groups)

    def on_volume(self, x: Tensor) -> Tensor:
        """Convolve volumes in the plane, then across it."""
        if self.kernel == 1:
            return conv3d(x, self.weight.unsqueeze(2), None, self.stride, groups=self.groups)
        depth, height, width = self.stride
        flat, taps = (0, *self.padding[1:]), (1, *self.dilation[1:])
        x = conv3d(x, self.weight.unsqueeze(2), None, (1, height, width), flat, taps, self.groups)
        pad, taps = (self.padding[0], 0, 0), (self.dilation[0], 1, 1)
        return conv3d(x, self.depth_weight[..., None, None], None, (depth, 1, 1), pad, taps, self.groups)


class Flat(Convolution):
    """1 x K x K kernels, with the stride on all three axes; holds exactly the 2D network's weights."""

    def on_volume(self, x: Tensor) -> Tensor:
        """Convolve every slice by itself."""
        pad, taps = (0, *self.padding[1:]), (1, *self.dilation[1:])
        return conv3d(x, self.weight.unsqueeze(2), None, self.stride, pad, taps, self.groups)


class ACS(Convolution):
    """2D kernels split over three planes (Yang et al., arXiv 1911.10477); exactly the 2D weights."""

    def on_volume(self, x: Tensor) -> Tensor:
        """Convolve volumes, each third of the output channels in its own plane."""
        if self.kernel == 1:
            return conv3d(x, self.weight.unsqueeze(2), None, self.stride, groups=self.groups)
        return acs_conv3d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


_KINDS: dict[str, type[Convolution]] = {"3d": Full, "p3d": Pseudo3D, "acs": ACS, "2.5d": Flat}


def convolution(
    kind: str,
    in_channels: int,
    out_channels: int,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Convolution:
    """Make a convolution of kind `3d`, `p3d`, `acs` or `2.5d`; triples are along (D, H, W).

    A kernel of unequal sides is of kind `3d`, without groups and dilation.
    """
    sides = triple(kernel)
    if len(set(sides)) > 1:
        if kind != "3d" or groups > 1 or triple(dilation) != (1, 1, 1):
            raise ValueError(f"a kernel of {sides} voxels needs kind 3d, without groups and dilation")
        return Cuboid(in_channels, out_channels, sides, triple(stride))
    return _KINDS[kind](in_channels, out_channels, sides[0], triple(stride), groups, triple(dilation))
