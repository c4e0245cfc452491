"""Layers of 2D networks over volumes, on folded slices, with the 2D layers' parameters and names."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.convert.folding import (
    Cells,
    Triple,
    adaptive_avg_pool,
    adaptive_max_pool,
    along_depth,
    avg_pool,
    fold,
    interpolate,
    lp_pool,
    max_pool,
    output_size,
    pad,
    pad_volume,
    pair,
    same_pads,
    unfold,
)
from ssl3d.encoders.convolutions import conv2d, conv3d

Pads = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Layer = TypeVar("Layer", bound=nn.Module)


class Folded:
    """Mixin of the converted layers: called on folded slices in a network, on volumes by themselves."""

    def forward(self, x: Tensor, batch: int | None = None, image: bool = False) -> Tensor:
        """Apply the layer to folded (B D, C, H, W) with `batch` B, or to a volume (B, C, D, H, W)."""
        if batch is not None:
            return self.on_slices(x, batch, image)
        return unfold(self.on_slices(fold(x), len(x), x.shape[2] == 1), len(x))

    @abstractmethod
    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Apply the layer to folded slices (B D, C, H, W)."""


def remade(cls: type[Layer], layer: nn.Module) -> Layer:
    """Copy a layer, with everything it has, into another class."""
    copied = cls.__new__(cls)
    copied.__dict__.update(copy.deepcopy(layer.__dict__))
    return copied


# Convolutions -------------------------------------------------------------------------------------


class Convolution(Folded, nn.Conv2d):
    """A 2D convolution over volumes; on an image it is the 2D convolution.

    Depth has the stride, dilation and padding of height and width, the smaller where they differ (`Flat`
    has the stride alone). Where a volume is so thin that nothing would be left, kernels keep their middle
    along depth, stride 1.

    Attributes:
        like_tensorflow: Whether to pad as TensorFlow's SAME does, by the input's size (timm's Conv2dSame).
        depth_padding: Continuation of depth beyond its ends: zeros, or replicate.
        cells: Other strides and sizes than the 2D layer's, as encoders have them.
    """

    like_tensorflow: bool
    depth_padding: Literal["zeros", "replicate"]
    cells: Cells | None = None

    @classmethod
    def of(cls, layer: nn.Conv2d, depth_padding: str, **options: Any) -> Convolution:
        """Return a converted copy of a 2D layer."""
        converted = remade(cls, layer)
        converted.like_tensorflow = is_same(layer)
        converted.depth_padding = depth_padding  # type: ignore[assignment]
        converted.begin(**options)
        return converted

    def begin(self) -> None:
        """Make parameters of its own out of the 2D ones."""

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Apply the convolution to folded slices (B D, C, H, W)."""
        if image:
            return self.on_image(x)
        return fold(self.on_volume(unfold(x, batch)))

    def on_image(self, x: Tensor) -> Tensor:
        """Apply the 2D network's own convolution."""
        return self.on_plane(x, self.weight)

    def on_plane(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply a 2D kernel to an image (B, C, H, W)."""
        _, height, width = self._pads((1, *x.shape[2:]))
        return padded_conv2d(
            x, weight, self.bias, self._strides()[1:], pair(self.dilation), (height, width), self.groups,
            self.padding_mode,
        )  # fmt: skip

    def on_volume(self, x: Tensor) -> Tensor:
        """Convolve (B, C, D, H, W) to (B, C', D', H', W')."""
        dilation, stride = pair(self.dilation), self._strides()
        k, s, d = along_depth(self.kernel_size), stride[0], along_depth(dilation)
        pads = self._pads(x.shape[2:])
        shrunk = output_size(x.shape[2], k, s, pads[0], d) < 1
        if shrunk:
            s, d, pads = 1, 1, ((0, 0), pads[1], pads[2])
        elif self.depth_padding == "replicate":
            x = pad_volume(x, (0, 0, 0, 0, *pads[0]), "replicate")
            pads = ((0, 0), pads[1], pads[2])
        if self.padding_mode != "zeros":
            x = pad_volume(x, [n for axis in reversed(pads) for n in axis], self.padding_mode)
            pads = ((0, 0), (0, 0), (0, 0))
        return self.convolve(x, (s, stride[1], stride[2]), (d, *dilation), pads, shrunk)

    @abstractmethod
    def convolve(self, x: Tensor, stride: Triple, dilation: Triple, pads: Pads, shrunk: bool) -> Tensor:
        """Convolve a padded volume; where it is `shrunk`, kernels keep their middle along depth."""

    def _strides(self) -> Triple:
        height, width = pair(self.stride)
        own = (along_depth((height, width)), height, width)
        return own if self.cells is None else self.cells.strides(own)

    def _pads(self, sizes: Sequence[int]) -> Pads:
        """Return the padding before and behind, along D, H, W."""
        (high, wide), (down, right), (over, across) = (
            self.kernel_size, pair(self.stride), pair(self.dilation)
        )  # fmt: skip
        kernel = (along_depth((high, wide)), high, wide)
        own = (along_depth((down, right)), down, right)
        dilation = (along_depth((over, across)), over, across)
        steps = self._strides()
        pads: list[tuple[int, int]]
        if self.like_tensorflow:
            pads = [
                same_pads(n, k, s, d) for n, k, s, d in zip(sizes, kernel, steps, dilation, strict=True)
            ]
            return pads[0], pads[1], pads[2]
        if self.padding == "valid":
            pads = [(0, 0)] * 3
        elif self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = [(t // 2, t - t // 2) for t in totals]
        else:
            height, width = pair(self.padding)  # type: ignore[arg-type]
            pads = [(p, p) for p in (along_depth((height, width)), height, width)]
        if self.cells is not None:
            pads = [
                self.cells.pads(*axis)
                for axis in zip(sizes, kernel, steps, own, dilation, pads, strict=True)
            ]
        return pads[0], pads[1], pads[2]


class Flat(Convolution):
    """2.5D: the 2D kernel on every slice by itself; where it strides, on the first of each stride's slices.

    So depth gets ceil(D / stride), whatever the 2D layer's kernel and padding, as in ACSConv.
    """

    def on_volume(self, x: Tensor) -> Tensor:
        """Apply the 2D kernel to every slice that the stride leaves."""
        pads: Pads = ((0, 0), *self._pads(x.shape[2:])[1:])
        stride = self._strides()
        x = x[:, :, :: stride[0]]
        if self.padding_mode != "zeros":
            x = pad_volume(x, [n for axis in reversed(pads) for n in axis], self.padding_mode)
            pads = ((0, 0), (0, 0), (0, 0))
        return self.convolve(x, (1, *stride[1:]), (1, *pair(self.dilation)), pads, True)

    def convolve(self, x: Tensor, stride: Triple, dilation: Triple, pads: Pads, shrunk: bool) -> Tensor:
        """Apply the 2D kernel to every slice."""
        return _padded_conv3d(x, self.weight.unsqueeze(2), self.bias, stride, dilation, pads, self.groups)


class ACS(Convolution):
    """Axial-coronal-sagittal (Yang et al., arXiv:1911.10477): a third of the kernels in each plane."""

    def begin(self) -> None:
        """Check that kernels of unequal sides keep the size of every axis, as all planes need."""
        _check_square(self)

    def convolve(self, x: Tensor, stride: Triple, dilation: Triple, pads: Pads, shrunk: bool) -> Tensor:
        """Apply a third of the kernels in each plane."""
        if self.kernel_size == (1, 1):
            return planar(x, self.weight, self.bias, 0, 1, stride, dilation, pads, self.groups)
        parts = []
        for plane, (low, high) in enumerate(thirds(self.out_channels)):
            if low < high:
                bias = None if self.bias is None else self.bias[low:high]
                parts.append(self._plane(x, plane, low, high, bias, stride, dilation, pads, shrunk))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _plane(
        self, x: Tensor, plane: int, low: int, high: int, bias: Tensor | None, stride: Triple,
        dilation: Triple, pads: Pads, shrunk: bool,
    ) -> Tensor:  # fmt: skip
        # Groups at the border of two thirds are computed whole, and cut.
        size, inputs = self.out_channels // self.groups, self.in_channels // self.groups
        first, last = low // size, -(-high // size)
        weight = self.weight[low:high] if self.groups == 1 else self.weight[first * size : last * size]
        part = x if self.groups == 1 else x[:, first * inputs : last * inputs]
        k = along_depth(self.kernel_size)
        if self.kernel_size[0] != self.kernel_size[1]:
            # It keeps the size of every axis (`_check_square`): each is padded for what lies along it.
            spans = [axis for axis in range(3) if axis != plane]
            totals = dict(
                zip(
                    spans, (d * (n - 1) for d, n in zip(pair(self.dilation), self.kernel_size)), strict=True
                )
            )
            low_high = [(totals.get(axis, 0) // 2, -(-totals.get(axis, 0) // 2)) for axis in range(3)]
            pads, k = (low_high[0], low_high[1], low_high[2]), 1
        if shrunk:
            k, weight = (
                (1, weight) if plane == 0 else (k, weight[:, :, self.kernel_size[0] // 2].unsqueeze(2))
            )
        y = planar(
            part, weight, None, plane, k, stride, dilation, pads, last - first if self.groups > 1 else 1
        )
        if self.groups > 1:
            y = y[:, low - first * size : high - first * size]
        return y if bias is None else y + bias.to(y.dtype)[:, None, None, None]


class SoftACS(ACS):
    """Every kernel in all three planes, mixed by a learned softmax per output channel.

    `plane_logits` (Cout, 3) begins at zero: the mean of the planes. A 1 x 1 kernel is the same in all, and
    has none.
    """

    plane_logits: nn.Parameter

    def begin(self) -> None:
        """Add the mixture of the planes."""
        super().begin()
        if self.kernel_size == (1, 1):
            return
        self.plane_logits = nn.Parameter(self.weight.new_zeros(self.out_channels, 3))

    def on_image(self, x: Tensor) -> Tensor:
        """Apply the 2D network's convolution; the mixture only gets a gradient of 0, for DDP."""
        y = super().on_image(x)
        if self.kernel_size == (1, 1) or not (self.training and torch.is_grad_enabled()):
            return y
        return y + 0 * self.plane_logits.sum().to(y.dtype)

    def convolve(self, x: Tensor, stride: Triple, dilation: Triple, pads: Pads, shrunk: bool) -> Tensor:
        """Apply every kernel in all planes and mix the results."""
        if self.kernel_size == (1, 1):
            return super().convolve(x, stride, dilation, pads, shrunk)
        share = self.plane_logits.softmax(1)
        total: Tensor | None = None
        for plane in range(3):
            y = self._plane(x, plane, 0, self.out_channels, None, stride, dilation, pads, shrunk)
            y = y * share[:, plane].to(y.dtype)[:, None, None, None]
            total = y if total is None else total + y
        assert total is not None
        return total if self.bias is None else total + self.bias.to(total.dtype)[:, None, None, None]


class Inflated(Convolution):
    """I3D (Carreira and Zisserman, arXiv:1705.07750): copies of the 2D kernel, over their number.

    `weight` has five axes. On an image only the kernel's middle along depth meets anything, as in a
    network of kind `3d`.
    """

    def begin(self, axis: int = 0) -> None:
        """Inflate the 2D kernel along D (0), H (1) or W (2); it lies in the other two axes."""
        _check_square(self, needed=axis != 0)
        count = along_depth(self.kernel_size)
        copies = [self.weight.detach().unsqueeze(2 + axis)] * count
        self.weight = nn.Parameter(torch.cat(copies, 2 + axis) / count)

    def on_image(self, x: Tensor) -> Tensor:
        """Apply the kernel's middle along depth."""
        return self.on_plane(x, self.weight[:, :, self.weight.shape[2] // 2])

    def convolve(self, x: Tensor, stride: Triple, dilation: Triple, pads: Pads, shrunk: bool) -> Tensor:
        """Apply the inflated kernels to the volume."""
        middle = self.weight.shape[2] // 2
        weight = self.weight[:, :, middle : middle + 1] if shrunk else self.weight
        return _padded_conv3d(x, weight, self.bias, stride, dilation, pads, self.groups)


class Pseudo3D(Convolution):
    """P3D (Qiu et al., arXiv:1711.10305), serial: the 2D kernel, then `depth_weight` (Cout, Cout/g, K).

    `depth_weight` begins as the identity, so the network begins as the 2D one on every slice.
    """

    depth_weight: nn.Parameter

    def begin(self) -> None:
        """Add the depth kernel, with the groups of the 2D one where its channels divide so."""
        k = along_depth(self.kernel_size)
        if k > 1:
            weight = self.weight.new_zeros(self.out_channels, self.out_channels // self.groups, k)
            weight[torch.arange(len(weight)), torch.arange(len(weight)) % weight.shape[1], (k - 1) // 2] = 1
            self.depth_weight = nn.Parameter(weight)

    def on_image(self, x: Tensor) -> Tensor:
        """Apply the 2D kernel, then the depth kernel's middle."""
        x = super().on_image(x)
        if along_depth(self.kernel_size) == 1:
            return x
        k = self.depth_weight.shape[2]
        return F.conv2d(x, self.depth_weight[:, :, (k - 1) // 2, None, None], groups=self.groups)

    def convolve(self, x: Tensor, stride: Triple, dilation: Triple, pads: Pads, shrunk: bool) -> Tensor:
        """Apply the 2D kernel, then the depth kernel."""
        k = along_depth(self.kernel_size)
        if shrunk or k == 1:
            return planar(
                x, self.weight, self.bias, 0, 1 if shrunk else k, stride, dilation, pads, self.groups
            )
        flat = ((0, 0), pads[1], pads[2])
        x = planar(x, self.weight, self.bias, 0, 1, (1, *stride[1:]), (1, *dilation[1:]), flat, self.groups)
        deep = (pads[0], (0, 0), (0, 0))
        weight = self.depth_weight[..., None, None]
        return _padded_conv3d(x, weight, None, (stride[0], 1, 1), (dilation[0], 1, 1), deep, self.groups)


def planar(
    x: Tensor, weight: Tensor, bias: Tensor | None, plane: int, flat: int, stride: Triple,
    dilation: Triple, pads: Pads, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Apply a 2D kernel in one plane of a volume.

    Across the plane it behaves as the middle of a kernel of `flat` voxels: output i reads voxel
    i s - p + d (K - 1) / 2, and nothing but zeros where that lies outside.

    Args:
        x: Volumes (B, C, D, H, W).
        weight: Kernels (Cout, Cin/g, K, K).
        bias: Bias of the outputs (Cout,).
        plane: Axis that the kernel is flat along: 0 (D, axial), 1 (H) or 2 (W).
        flat: Size, along that axis, of the kernel that it stands for.
        stride: Stride along D, H, W.
        dilation: Dilation along D, H, W.
        pads: Padding before and behind, along D, H, W.
        groups: Number of groups of the convolution.
    """
    n, s, d = x.shape[2 + plane], stride[plane], dilation[plane]
    before, behind = pads[plane]
    count = output_size(n, flat, s, (before, behind), d)
    start = d * ((flat - 1) // 2) - before
    low, high = -start, (count - 1) * s + 1 + start - n
    axis = 2 * (2 - plane)  # F.pad counts from the last axis
    if low or high > 0 or (n - 1) // s + 1 > count:
        around = [0] * 6
        around[axis], around[axis + 1] = low, high
        x = F.pad(x, around)
    free = list(pads)
    free[plane] = (0, 0)
    around_plane = (free[0], free[1], free[2])
    return _padded_conv3d(x, weight.unsqueeze(2 + plane), bias, stride, dilation, around_plane, groups)


def _padded_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    dilation: Triple,
    pads: Pads,
    groups: int,
) -> Tensor:
    if any(low != high for low, high in pads):
        x = F.pad(x, [n for axis in reversed(pads) for n in axis])
        pads = ((0, 0), (0, 0), (0, 0))
    return conv3d(x, weight, bias, stride, (pads[0][0], pads[1][0], pads[2][0]), dilation, groups)


def padded_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], dilation: tuple[int, int],
    pads: tuple[tuple[int, int], tuple[int, int]], groups: int, mode: str = "zeros",
) -> Tensor:  # fmt: skip
    """Apply a 2D convolution with padding of its own on each side."""
    (top, bottom), (left, right) = pads
    height, width = top, left
    if mode != "zeros" or top != bottom or left != right:
        x = F.pad(x, (left, right, top, bottom), "constant" if mode == "zeros" else mode)
        height = width = 0
    return conv2d(x, weight, (stride[0], stride[1]), (height, width), groups, bias, dilation)


def thirds(channels: int) -> list[tuple[int, int]]:
    """Divide output channels into axial, coronal and sagittal ones; what is left over goes to the first."""
    size, rest = divmod(channels, 3)
    ends = [size + (rest > 0), 2 * size + (rest > 0) + (rest > 1), channels]
    return list(zip([0, *ends], ends, strict=False))


def _check_square(layer: nn.Conv2d, needed: bool = True) -> None:
    height, width = layer.kernel_size
    (down, right), (over, across) = pair(layer.stride), pair(layer.dilation)
    if not needed or (height == width and down == right and over == across and _square_padding(layer)):
        return
    keeps = down == right == 1 and (
        isinstance(layer.padding, str) or tuple(2 * p for p in pair(layer.padding)) == (
            over * (height - 1), across * (width - 1)
        )
    )  # fmt: skip
    if not keeps or layer.padding_mode != "zeros":
        raise ValueError(
            f"a kernel of {height} x {width} with stride {down}, {right} fits one plane: kind 2.5d or i3d"
        )


def _square_padding(layer: nn.Conv2d) -> bool:
    return isinstance(layer.padding, str) or pair(layer.padding)[0] == pair(layer.padding)[1]


def is_same(layer: nn.Module) -> bool:
    """Check whether a layer pads as TensorFlow does (timm's classes, recognised by their names)."""
    return type(layer).__name__ in ("Conv2dSame", "MaxPool2dSame", "AvgPool2dSame")


class Transposed(Folded, nn.ConvTranspose2d):  # type: ignore[misc]
    """A transposed convolution over volumes, which lengthens depth as height and keeps each plane.

    Across depth the kernel is repeated and scaled by stride / kernel, so that a volume constant along
    depth stays so away from its ends; with kernel = stride every slice is repeated. Of one kind, for all.
    """

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Apply the layer to folded slices."""
        if image:
            return nn.ConvTranspose2d.forward(self, x)
        kernel, stride, pads = self.kernel_size, pair(self.stride), pair(self.padding)  # type: ignore[arg-type]
        behind, dilation = pair(self.output_padding), pair(self.dilation)
        k, s, p, o, d = (along_depth(v) for v in (kernel, stride, pads, behind, dilation))
        weight = self.weight.unsqueeze(2).repeat(1, 1, k, 1, 1) * (s / k)
        y = F.conv_transpose3d(
            unfold(x, batch),
            weight,
            self.bias,
            (s, *stride),
            (p, *pads),
            (o, *behind),
            self.groups,
            (d, *dilation),
        )
        return fold(y)


# Others -------------------------------------------------------------------------------------------


class MaxPool(Folded, nn.MaxPool2d):
    """Max-pooling over depth too."""

    cells: Cells | None = None

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Pool folded slices, over depth too."""
        padding = self.padding
        if getattr(self, "like_tensorflow", False):
            x, padding = _pad_like_tensorflow(self, x, -torch.inf, batch, image), 0
        return max_pool(
            x,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.ceil_mode,
            batch=batch,
            image=image,
            cells=self.cells,
        )


class AvgPool(Folded, nn.AvgPool2d):
    """Average pooling over depth too."""

    cells: Cells | None = None

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Pool folded slices, over depth too."""
        padding = self.padding
        if getattr(self, "like_tensorflow", False):
            x, padding = _pad_like_tensorflow(self, x, 0.0, batch, image), 0
        return avg_pool(
            x, self.kernel_size, self.stride, padding, self.ceil_mode, self.count_include_pad,
            self.divisor_override, batch=batch, image=image, cells=self.cells,
        )  # fmt: skip


def _pad_like_tensorflow(layer: Any, x: Tensor, value: float, batch: int, image: bool) -> Tensor:
    kernel, stride, dilation = (
        pair(v) for v in (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1))
    )
    height, width = (same_pads(x.shape[2 + i], kernel[i], stride[i], dilation[i]) for i in (0, 1))
    whole = unfold(x, batch)
    deep = (
        (0, 0)
        if image
        else same_pads(whole.shape[2], *(along_depth(v) for v in (kernel, stride, dilation)))
    )
    return fold(pad_volume(whole, (*width, *height, *deep), "constant", value))


class BlurPool(Folded, nn.Module):
    """Anti-aliased striding over depth too: a binomial filter, then every stride-th voxel (timm's).

    The filter is the product of one along each axis; an axis whose stride became 1 is not filtered.
    """

    filt: Tensor
    stride: int
    padding: list[int]
    pad_mode: str
    cells: Cells | None = None

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Filter and stride folded slices, along depth too."""
        steps = (self.stride,) * 3 if self.cells is None else self.cells.strides((self.stride,) * 3)
        if image:
            steps = (1, *steps[1:])
        taps = self.filt[0, 0].sum(1).to(x.dtype)
        flat = [(image and axis == 0) or steps[axis] == 1 < self.stride for axis in range(3)]
        depth, height, width = (taps.new_ones(1) if unfiltered else taps for unfiltered in flat)
        kernel = depth[:, None, None] * height[:, None] * width
        pads = [n for unfiltered in reversed(flat) for n in ((0, 0) if unfiltered else self.padding[:2])]
        whole = pad_volume(unfold(x, batch), pads, self.pad_mode)
        channels = whole.shape[1]
        weight = kernel.expand(channels, 1, *kernel.shape)
        return fold(conv3d(whole, weight, None, (steps[0], steps[1], steps[2]), 0, 1, channels))


def is_blur(layer: nn.Module) -> bool:
    """Check whether a layer blurs before it strides (timm's class, recognised by its name)."""
    return type(layer).__name__ == "BlurPool2d" and hasattr(layer, "filt") and hasattr(layer, "pad_mode")


class LPPool(Folded, nn.LPPool2d):
    """Power-average pooling over depth too."""

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Pool folded slices, over depth too."""
        return lp_pool(
            x, self.norm_type, self.kernel_size, self.stride, self.ceil_mode, batch=batch, image=image
        )


class AdaptiveAvgPool(Folded, nn.AdaptiveAvgPool2d):
    """Adaptive average pooling, to one slice."""

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Pool folded slices to one slice."""
        return adaptive_avg_pool(x, self.output_size, batch=batch, image=image)


class AdaptiveMaxPool(Folded, nn.AdaptiveMaxPool2d):
    """Adaptive max-pooling, to one slice."""

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Pool folded slices to one slice."""
        return adaptive_max_pool(x, self.output_size, self.return_indices, batch=batch, image=image)


class Upsample(Folded, nn.Upsample):
    """Up-sampling of depth too."""

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Upsample folded slices, along depth too."""
        return interpolate(
            x, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor,
            batch=batch, image=image,
        )  # fmt: skip


class Pad(Folded, nn.Module):
    """Padding of depth as of height.

    Args:
        layer: 2D padding module of torch.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.pads = tuple(layer.padding)  # type: ignore[arg-type]
        named = type(layer).__name__
        modes = {"Refl": "reflect", "Repl": "replicate", "Circ": "circular"}
        self.mode = modes.get(named[:4], "constant")
        self.value = getattr(layer, "value", 0.0) if self.mode == "constant" else None

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Pad folded slices, along depth too."""
        return pad(x, self.pads, self.mode, self.value, batch=batch, image=image)


class GroupNorm(Folded, nn.GroupNorm):
    """Group norm over depth too."""

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Normalise folded slices over whole volumes."""
        return fold(nn.GroupNorm.forward(self, unfold(x, batch)))


class InstanceNorm(Folded, nn.InstanceNorm3d):
    """Instance norm over depth too."""

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Normalise folded slices over whole volumes."""
        return fold(nn.InstanceNorm3d.forward(self, unfold(x, batch)))


class Dropout(Folded, nn.Dropout3d):
    """Dropout of whole channels of a volume."""

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Drop whole channels of volumes."""
        return fold(nn.Dropout3d.forward(self, unfold(x, batch)))


class PerSample(Folded, nn.Module):
    """Layer that drops samples (stochastic depth): a volume with all its slices, or none of it.

    Args:
        layer: Layer that takes tensors of any number of axes.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def on_slices(self, x: Tensor, batch: int, image: bool) -> Tensor:
        """Apply the layer to whole volumes."""
        return fold(self.layer(unfold(x, batch)))
