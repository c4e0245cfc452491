"""Convolution kinds that take volumes and images: full 3D, pseudo-3D, axial-coronal-sagittal, 2.5D.

Every kind has one module whose `forward(x, image)` is told by its caller whether the network's input is
an image. It is an argument and never kept: a flag left on the module gives silently wrong gradients when
activation checkpointing runs the forward pass again. Images travel as (B, C, H, W), volumes as
(B, C, D, H, W).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Triple = tuple[int, int, int]

KINDS = ("3d", "p3d", "acs", "2.5d")


def triple(value: int | Sequence[int]) -> Triple:
    """One number for (D, H, W), or the three given."""
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
    """`torch.nn.functional.conv3d`, with gradients that are right on the CPU on small maps as well.

    There, oneDNN (torch 2.15, AVX-512) reads and writes beyond its buffers in the weight gradient of
    small padded maps: in bfloat16 with kernel 3 on depth 2, and in float32 with kernel 7 and stride 2 on
    5 voxels. The outcome is infinite or plausible wrong numbers, or a crash. Padding beforehand takes
    another path; maps that small make it cheap.
    """
    x, left = _pad_beforehand(x, weight, triple(padding))
    return F.conv3d(x, weight, bias, stride, triple(left), dilation, groups)


def conv2d(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: int) -> Tensor:
    """`torch.nn.functional.conv2d`, with the same care as `conv3d`."""
    x, (height, width) = _pad_beforehand(x, weight, (padding, padding))
    return F.conv2d(x, weight, None, stride, (height, width))


def _pad_beforehand(x: Tensor, weight: Tensor, pads: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Pads where the convolution itself could not be trusted to; what is left for it to pad."""
    if not any(pads) or x.device.type != "cpu":
        return x, pads
    used = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    risky = used not in (torch.float32, torch.float64) or max(weight.shape[2:]) > 3
    if not risky or min(x.shape[2:]) >= 2 * max(weight.shape[2:]):
        return x, pads
    return F.pad(x, [p for pad in reversed(pads) for p in (pad, pad)]), (0,) * len(pads)


def acs_split(channels: int) -> Triple:
    """How many output channels see the axial (H, W), coronal (D, W) and sagittal (D, H) plane.

    Thirds; what is left over goes to the first ones (Yang et al., arXiv 1911.10477).
    """
    third, rest = divmod(channels, 3)
    return (third + (rest > 0), third + (rest > 1), third)


def acs_kernel(weight: Tensor) -> Tensor:
    """The K x K x K kernel, mostly zeros, that computes what ACS does with 2D kernels.

    Args:
        weight: (Cout, Cin / groups, K, K), K odd.

    Returns:
        (Cout, Cin / groups, K, K, K).
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
    """ACS convolution of a volume: each output channel's 2D kernel lies in one of three planes.

    Along the axis on which its kernel is flat, output i reads input `i * stride - padding +
    dilation * (K - 1) / 2`, zero outside: the same place as the centre of a K x K x K kernel, for any
    stride, dilation, padding and size.

    Args:
        x: (B, Cin, D, H, W).
        weight: (Cout, Cin / groups, K, K), K odd.
        bias: (Cout,).
        stride: Along D, H, W; so are padding and dilation.
        padding: Zeros on both sides.
        dilation: Distance between taps.
        groups: As in `torch.conv3d`; any number that divides the channels.
        whole: One convolution with the kernel of `acs_kernel` instead of three with flat kernels. More
            products, fewer passes over the input. None: the three, unless there are groups.
    """
    if groups > 1 or whole:
        return conv3d(x, acs_kernel(weight), bias, stride, padding, dilation, groups)
    size = weight.shape[-1]
    parts = []
    biases = (None, None, None) if bias is None else bias.split(acs_split(weight.shape[0]))
    for flat, (kernel, offset) in enumerate(
        zip(weight.split(acs_split(weight.shape[0])), biases, strict=True)
    ):
        if kernel.shape[0] == 0:
            continue
        reach = dilation[flat] * (size - 1)
        before = padding[flat] - reach // 2
        after = 2 * padding[flat] - reach - before
        seen = x
        if before or after:  # never where the padding keeps the size; negative numbers crop
            pads = [0] * 6
            pads[2 * (2 - flat)], pads[2 * (2 - flat) + 1] = before, after
            seen = F.pad(x, pads)
        thin = (padding[0], padding[1], padding[2])
        thin = tuple(0 if axis == flat else p for axis, p in enumerate(thin))  # type: ignore[assignment]
        parts.append(conv3d(seen, kernel.unsqueeze(2 + flat), offset, stride, thin, dilation))
    return torch.cat(parts, dim=1)


class Convolution(nn.Module, ABC):
    """A convolution of one kind, without bias, that keeps the size where the stride is 1.

    Subclasses hold `weight`, and compute an image's output from (B, C, H, W) and a volume's from
    (B, C, D, H, W).

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Size K, odd.
        stride: Along D, H, W.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: Triple = (1, 1, 1)):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}")
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.stride = triple(stride)
        self.padding = kernel // 2
        self.weight = nn.Parameter(torch.empty(self.weight_shape()))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def weight_shape(self) -> tuple[int, ...]:
        """The 2D kernel's shape; overridden where the kernel is 3D."""
        return (self.out_channels, self.in_channels, self.kernel, self.kernel)

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """(B, Cin, H, W) where `image`, else (B, Cin, D, H, W); every axis shrinks to ceil(n / stride)."""
        return self.on_image(x) if image else self.on_volume(x)

    def on_image(self, x: Tensor) -> Tensor:
        """The 2D network's convolution."""
        return conv2d(x, self.weight, self.stride[1:], self.padding)

    @abstractmethod
    def on_volume(self, x: Tensor) -> Tensor:
        """The 3D network's convolution."""

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.in_channels}, {self.out_channels}, kernel={self.kernel}, stride={self.stride}"


class Full(Convolution):
    """K x K x K kernels. On an image only their middle plane meets anything but zeros."""

    def weight_shape(self) -> tuple[int, ...]:
        """(Cout, Cin, K, K, K)."""
        return (*super().weight_shape(), self.kernel)

    def on_image(self, x: Tensor) -> Tensor:
        """Skips the planes that would meet padding only."""
        return conv2d(x, self.weight[:, :, self.padding], self.stride[1:], self.padding)

    def on_volume(self, x: Tensor) -> Tensor:
        """A plain 3D convolution."""
        return conv3d(x, self.weight, None, self.stride, self.padding)


class Pseudo3D(Convolution):
    """1 x K x K, then K x 1 x 1 (P3D, Qiu et al., arXiv 1711.10305, serial form).

    `weight` has the 2D kernel's shape and name; `depth_weight` (Cout, Cout, K) begins as the identity,
    so a network with 2D weights begins as that 2D network on every slice. Differs from the paper: no
    norm and no activation between the two, which would be no identity.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: Triple = (1, 1, 1)):
        super().__init__(in_channels, out_channels, kernel, stride)
        if kernel > 1:
            self.depth_weight = nn.Parameter(torch.empty(out_channels, out_channels, kernel))
            nn.init.dirac_(self.depth_weight)

    def on_image(self, x: Tensor) -> Tensor:
        """Of the depth kernel only the middle tap meets anything but zeros."""
        x = super().on_image(x)
        if self.kernel == 1:
            return x
        return F.conv2d(x, self.depth_weight[:, :, self.padding, None, None])

    def on_volume(self, x: Tensor) -> Tensor:
        """In the plane, then across it."""
        if self.kernel == 1:
            return conv3d(x, self.weight.unsqueeze(2), None, self.stride)
        depth, height, width = self.stride
        x = conv3d(x, self.weight.unsqueeze(2), None, (1, height, width), (0, self.padding, self.padding))
        return conv3d(x, self.depth_weight[..., None, None], None, (depth, 1, 1), (self.padding, 0, 0))


class Flat(Convolution):
    """1 x K x K kernels, with the stride on all three axes; holds exactly the 2D network's weights."""

    def on_volume(self, x: Tensor) -> Tensor:
        """Every slice by itself."""
        pad = (0, self.padding, self.padding)
        return conv3d(x, self.weight.unsqueeze(2), None, self.stride, pad)


class ACS(Convolution):
    """2D kernels split over three planes (Yang et al., arXiv 1911.10477); exactly the 2D weights."""

    def on_volume(self, x: Tensor) -> Tensor:
        """Each third of the output channels in its own plane."""
        if self.kernel == 1:
            return conv3d(x, self.weight.unsqueeze(2), None, self.stride)
        return acs_conv3d(x, self.weight, None, self.stride, triple(self.padding))


_KINDS: dict[str, type[Convolution]] = {"3d": Full, "p3d": Pseudo3D, "acs": ACS, "2.5d": Flat}


def convolution(
    kind: str, in_channels: int, out_channels: int, kernel: int, stride: int | Sequence[int] = 1
) -> Convolution:
    """A convolution of kind `3d`, `p3d`, `acs` or `2.5d`; stride along (D, H, W)."""
    return _KINDS[kind](in_channels, out_channels, kernel, triple(stride))
