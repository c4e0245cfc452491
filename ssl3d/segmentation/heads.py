"""Segmentation heads on any encoder's feature maps: U-shaped, Med3D's, DenseASPP, linear.

Every head is called as `head(x, maps)` with the network's input (B, C, D, H, W) and the encoder's maps
of it, and gives a list of logits (B, K, D, H, W): the prediction first, then those of deep supervision.
Any strides and sizes; images (D = 1) and axes on which a kernel meets nothing but padding are computed
without it, with the same outcome.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.encoder import Encoder
from ssl3d.encoders import norms
from ssl3d.encoders.convolutions import conv2d, conv3d
from ssl3d.encoders.inference import upsample
from ssl3d.errors import UsageError
from ssl3d.heads.decoder import conv3x3x3, stride_path

Triple = tuple[int, int, int]

_FULL: Triple = (1, 1, 1)
_GROUPS = 8
_GROUP = 4  # channels at least: one voxel of one channel has no deviation to divide by


@dataclass
class UNetConfig:
    """Options of a U-Net, with what it has to know of its encoder.

    Attributes:
        channels: Channels of the encoder's maps, shallow to deep.
        strides: Strides of the encoder's maps along D H W.
        in_channels: Channels of the encoder's input.
        classes: Number of output channels.
        width: Channels at half resolution.
        norm: Kind of norm: batch, group or instance.
        deep_supervision: Whether the coarser steps give logits too.
    """

    channels: tuple[int, ...]
    strides: tuple[tuple[int, int, int], ...]
    in_channels: int
    classes: int
    width: int = 32
    norm: str = "instance"
    deep_supervision: bool = False


class UNetHead(nn.Module):
    """A U-shaped decoder whose last step also sees the input at full resolution.

    On the way from the deepest map up, in steps of a factor 2 at most, each step interpolates what is
    there to the next resolution, concatenates the encoder's map of that resolution where there is one,
    and applies two 3 x 3 x 3 convolutions with norm and leaky ReLU. Of several maps of one resolution
    the deepest counts. At full resolution the skip is the input itself through a stem of one such
    convolution, unless the encoder has a map there: most encoders begin with a stride of 2 and have
    thrown the finest borders away.

    With deep supervision the coarser steps give logits too, and each step adds its own to those of the
    coarser ones (Kayalibay et al., arXiv 1701.03056; Isensee et al., BRATS 2017, arXiv 1802.10508): the
    finest corrects what the coarser have found. Without the sum the finest step took long to see classes
    that are told apart by their surroundings, and in short trainings of few channels sometimes never did
    (posterior hippocampus, 200 steps: Dice 0 beside .83 of the next coarser step; with it .84).

    A step has `width` channels at half resolution, half of them at full resolution and twice as many
    per halving below, up to ten times.

    Ronneberger, Fischer, Brox: U-Net, MICCAI 2015, arXiv 1505.04597; Isensee et al.: nnU-Net, Nature
    Methods 2021. Differs from them: an encoder of any kind, interpolation in place of transposed
    convolutions.

    Args:
        encoder: Encoder whose maps are decoded; only its `channels`, `strides` and `config.in_channels`
            are read.
        classes: Number of classes K.
        width: Number of channels at half resolution.
        norm: Kind of norm: batch, group or instance. Group norm learned several times slower (hippocampus
            MR, after 120 steps: Dice .29, with instance norm .77).
        deep_supervision: Whether the coarser steps give logits that the finer ones add to, themselves given
            too while training, up-sampled to the input's voxels: so that sparse annotation is not lost by
            sub-sampling it.

    Attributes:
        path: Stride of each step's map, coarse to fine.
        sources: Numbers of the encoder's maps that are decoded.
    """

    Config: ClassVar[type] = UNetConfig

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        width: int = 32,
        norm: str = "instance",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.config = UNetConfig(
            tuple(encoder.channels),
            tuple(encoder.strides),
            encoder.config.in_channels,
            classes,
            width,
            norm,
            deep_supervision,
        )
        if width < 2:
            raise ValueError(f"width must be at least 2, not {width}")
        self.deep_supervision = deep_supervision
        maps = {stride: n for n, stride in enumerate(encoder.strides)}
        self._deepest = deepest = encoder.strides[-1]
        stops = sorted(
            (s for s in maps if s != deepest and all(a <= b for a, b in zip(s, deepest, strict=True))),
            reverse=True,
        )
        self.path = stride_path(deepest, [*stops, _FULL])
        self._sources = [maps.get(stride) if stride != deepest else None for stride in self.path]
        used = {n for n in self._sources if n is not None}
        self.sources = tuple(sorted({len(encoder.strides) - 1, *used}))
        channels = encoder.channels[-1]
        self.mixes, self.convs, self.coarse = nn.ModuleList(), nn.ModuleList(), nn.ModuleDict()
        self.stem: nn.Module | None = None
        for stride, source in zip(self.path, self._sources, strict=True):
            out = min(max(width * max(stride) // 2, 1), 10 * width)
            skip = 0 if source is None else encoder.channels[source]
            if stride == _FULL and source is None:
                self.stem, skip = ConvNorm(encoder.config.in_channels, out, norm), out
            self.mixes.append(_Mix(channels, skip, out, norm))
            self.convs.append(ConvNorm(out, out, norm))
            # Full resolution has `out`, and the coarsest steps say little.
            if deep_supervision and stride != _FULL and max(stride) <= 8:
                self.coarse[str(len(self.convs) - 1)] = nn.Conv3d(out, classes, 1)
            channels = out
        self.out = nn.Conv3d(channels, classes, 1)

    @classmethod
    def from_config(cls, config: UNetConfig) -> UNetHead:
        """Build a U-Net from its options alone, without its encoder."""
        like: Any = SimpleNamespace(
            channels=config.channels,
            strides=config.strides,
            config=SimpleNamespace(in_channels=config.in_channels),
        )
        return cls(like, config.classes, config.width, config.norm, config.deep_supervision)

    def steps(self, x: Tensor, maps: Sequence[Tensor]) -> Iterator[Tensor]:
        """Decode step by step: yield the map of each, of the strides in `path`."""
        size = x.shape[2:]
        y, reached = maps[-1], self._deepest
        for n, (stride, source) in enumerate(zip(self.path, self._sources, strict=True)):
            if source is not None:
                skip: Tensor | None = maps[source]
            else:
                skip = self.stem(x) if stride == _FULL and self.stem is not None else None
            y = self.convs[n](self.mixes[n](y, skip, size, reached, stride))
            reached = stride
            yield y

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Compute the logits, finest first; one of them in evaluation mode."""
        others: list[Tensor] = []
        for n, y in enumerate(self.steps(x, maps)):
            if str(n) in self.coarse:
                coarser = upsample(self.coarse[str(n)](y), x.shape[2:], self.path[n])
                others.append(coarser + others[-1] if others else coarser)
        finest = self.out(y) + others[-1] if others else self.out(y)
        return [finest, *reversed(others)] if self.training else [finest]


class Med3DHead(nn.Module):
    """The decoder of Med3D's lung segmentation: up-sampling by transposed convolutions, without skips.

    Chen, Ma, Zheng: Med3D: Transfer learning for 3D medical image analysis, arXiv 1904.00625. Steps of
    {transposed 3 x 3 x 3 convolution that doubles the resolution, 256 channels; 3 x 3 x 3 convolution,
    128 channels}, each with norm and ReLU, then a 1 x 1 x 1 convolution. As in the paper for an encoder
    of stride 8: three steps. As many as an encoder of another stride needs.

    Args:
        encoder: Encoder whose deepest map is decoded.
        classes: Number of classes K.
        channels: Numbers of channels of the transposed and of the plain convolutions.
        norm: Kind of norm: batch, group or instance.
    """

    def __init__(
        self, encoder: Encoder, classes: int, channels: tuple[int, int] = (256, 128), norm: str = "batch"
    ) -> None:
        super().__init__()
        self._deepest = encoder.strides[-1]
        self._path = stride_path(self._deepest, [_FULL])
        wide, narrow = channels
        self.up, self.up_norms, self.conv = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = encoder.channels[-1]
        for _ in self._path:
            self.up.append(nn.ConvTranspose3d(before, wide, 3, bias=False))
            self.up_norms.append(_norm(norm, wide))
            self.conv.append(ConvNorm(wide, narrow, norm, slope=0.0))
            before = narrow
        self.out = nn.Conv3d(before, classes, 1)

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Compute the logits, one of them."""
        y, reached = maps[-1], self._deepest
        for n, stride in enumerate(self._path):
            sides = _sides(x.shape[2:], stride)
            y = _transposed(y, self.up[n].get_parameter("weight"), sides, reached, stride)
            y = self.conv[n](F.relu(self.up_norms[n](y), inplace=True))
            reached = stride
        return [self.out(y)]


class DenseASPPHead(nn.Module):
    """Densely connected dilated convolutions on the deepest map, in 3D.

    Yang et al.: DenseASPP for semantic segmentation in street scenes, CVPR 2018; in 3D on a ResNet-152
    of stride 8 by Med3D (arXiv 1904.00625) for the liver. Layer i sees the map and the outcome of all
    layers before it: 1 x 1 x 1 convolution to `bottleneck` channels, norm, ReLU, 3 x 3 x 3 convolution of
    dilation d_i to `growth` channels, norm, ReLU, dropout; a 1 x 1 x 1 convolution of all of them gives
    the logits, which are interpolated. Differs from the paper: the channels are fewer (there 512 and 128
    on a map of 2,048), norms follow the convolutions.

    Along an axis that is no longer than the dilation all but the middle tap meet padding: they are left
    out.

    Args:
        encoder: Encoder whose deepest map is used; dilations count its voxels.
        classes: Number of classes K.
        dilations: Dilation of each layer.
        bottleneck: Number of channels before each dilated convolution.
        growth: Number of channels that each layer adds.
        dropout: Probability that a channel of a layer is dropped.
        norm: Kind of norm: batch, group or instance.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        dilations: Sequence[int] = (3, 6, 12, 18, 24),
        bottleneck: int = 64,
        growth: int = 32,
        dropout: float = 0.1,
        norm: str = "instance",
    ) -> None:
        super().__init__()
        self._stride = encoder.strides[-1]
        self.reduce, self.norms, self.dilated = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = encoder.channels[-1]
        for dilation in dilations:
            self.reduce.append(nn.Conv3d(channels, bottleneck, 1, bias=False))
            self.norms.append(_norm(norm, bottleneck))
            self.dilated.append(ConvNorm(bottleneck, growth, norm, dilation, slope=0.0))
            channels += growth
        self.dropout = nn.Dropout3d(dropout)
        self.out = nn.Conv3d(channels, classes, 1)

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Compute the logits, one of them."""
        y = maps[-1]
        for reduce, norm, dilated in zip(self.reduce, self.norms, self.dilated, strict=True):
            y = torch.cat([y, self.dropout(dilated(F.relu(norm(reduce(y)), inplace=True)))], dim=1)
        return [upsample(self.out(y), x.shape[2:], self._stride)]


class LinearHead(nn.Module):
    """A 1 x 1 x 1 convolution of every map, interpolated to the voxels and added.

    The same as one 1 x 1 x 1 convolution of the concatenated, interpolated maps (see the linear probe).

    Args:
        encoder: Encoder whose maps are used.
        classes: Number of classes K.
        levels: Indices of the maps, such as `(-1,)`; all of them if None.
    """

    def __init__(self, encoder: Encoder, classes: int, levels: Sequence[int] | None = None) -> None:
        super().__init__()
        count = len(encoder.channels)
        self._levels = list(range(count)) if levels is None else [range(count)[level] for level in levels]
        self._strides = [encoder.strides[level] for level in self._levels]
        self.out = nn.ModuleList(nn.Conv3d(encoder.channels[level], classes, 1) for level in self._levels)

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Compute the logits, one of them."""
        logits = [
            upsample(out(maps[level]), x.shape[2:], stride)
            for out, level, stride in zip(self.out, self._levels, self._strides, strict=True)
        ]
        return [torch.stack(logits).sum(dim=0)]


HEADS = ("unet", "med3d", "denseaspp", "linear")
"""Names that `segmentation_head` knows."""


def segmentation_head(
    name: str,
    encoder: Encoder,
    classes: int,
    width: int = 32,
    norm: str = "instance",
    deep_supervision: bool = False,
) -> nn.Module:
    """Build a head by name, its channels scaled by one number.

    Args:
        name: Name of the head: unet, med3d, denseaspp or linear.
        encoder: Encoder whose maps it takes.
        classes: Number of classes K, background among them.
        width: Width of the head: 32 makes a U-Net of 32 channels at half resolution, and the DenseASPP of
            this module; of Med3D's 256 and 128 channels it gives 8 and 4 per unit.
        norm: Kind of norm: batch, group or instance.
        deep_supervision: Whether the U-Net's coarser steps give logits too, as in `UNetHead`; the others
            have none.

    Raises:
        UsageError: There is no head of that name.
    """
    if name == "unet":
        return UNetHead(encoder, classes, width, norm, deep_supervision)
    if name == "med3d":
        return Med3DHead(encoder, classes, (8 * width, 4 * width), norm)
    if name == "denseaspp":
        return DenseASPPHead(encoder, classes, bottleneck=2 * width, growth=width, norm=norm)
    if name == "linear":
        return LinearHead(encoder, classes)
    raise UsageError(f"segmentation head {name!r}: is none of {', '.join(HEADS)}")


# Parts --------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """Block of a 3 x 3 x 3 convolution that keeps the size, a norm and a leaky ReLU.

    Args:
        channels: Number of channels that enter.
        out: Number of channels that leave.
        norm: Kind of norm: batch, group or instance.
        dilation: Distance between taps, along all axes.
        slope: Slope of the leaky ReLU below 0; 0 makes it a ReLU.
    """

    def __init__(self, channels: int, out: int, norm: str, dilation: int = 1, slope: float = 0.01) -> None:
        super().__init__()
        self.dilation, self.slope = dilation, slope
        self.weight = nn.Parameter(torch.empty(out, channels, 3, 3, 3))
        nn.init.kaiming_normal_(self.weight, a=slope, mode="fan_in", nonlinearity="leaky_relu")
        self.norm = _norm(norm, out)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, channels, D, H, W) to (B, out, D, H, W)."""
        y = conv3x3x3(x, self.weight) if self.dilation == 1 else _dilated(x, self.weight, self.dilation)
        return F.leaky_relu(self.norm(y), self.slope, inplace=True)


class _Mix(nn.Module):
    """First half of a step, which makes maps finer, joins them with the skip, and convolves.

    The channels are reduced before the interpolation, where a voxel is cheap: a 1 x 1 x 1 convolution
    and a linear interpolation commute.
    """

    def __init__(self, below: int, skip: int, out: int, norm: str) -> None:
        super().__init__()
        self.carry = nn.Conv3d(below, out, 1) if below != out else nn.Identity()
        self.conv = ConvNorm(out + skip, out, norm)

    def forward(
        self, y: Tensor, skip: Tensor | None, size: Sequence[int], reached: Triple, stride: Triple
    ) -> Tensor:
        """Bring `y` from stride `reached` to stride `stride`, of an input of `size`."""
        y = self.carry(y)
        if stride != reached:
            y = upsample(y, _sides(size, stride), [a / b for a, b in zip(reached, stride, strict=True)])
        return self.conv(y if skip is None else torch.cat([y, skip.to(y.dtype)], dim=1))


class _InstanceNorm(nn.GroupNorm):
    """Norm of each channel of each example; where that is one voxel, of all channels together."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:
        groups = 1 if input[0, 0].numel() == 1 else self.num_groups
        return norms.group_norm(input, groups, self.weight, self.bias, self.eps)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "instance":
        return _InstanceNorm(channels)
    return norms.norm(kind, channels, max(1, min(_GROUPS, channels // _GROUP)))


def _sides(size: Sequence[int], stride: Triple) -> list[int]:
    """Return the size of a map of a stride."""
    return [-(-n // s) for n, s in zip(size, stride, strict=True)]


def _transposed(x: Tensor, weight: Tensor, sides: Sequence[int], reached: Triple, stride: Triple) -> Tensor:
    """Apply a transposed 3 x 3 x 3 convolution from one stride to the next finer, as with padding 1.

    Voxel i comes to lie on voxel i x factor. Nothing is padded inside (see `ssl3d.encoders.convolutions`):
    the outcome is cut. Factors that are not whole are met by interpolation first.
    """
    factor = [a / b for a, b in zip(reached, stride, strict=True)]
    whole = all(f in (1, 2) for f in factor)
    if not whole:
        x, factor = upsample(x, sides, factor), [1.0] * 3
    steps = [int(f) for f in factor]
    if x.shape[2] == 1 and sides[0] == 1:
        flat = F.conv_transpose2d(x.squeeze(2), weight[:, :, 1], stride=(steps[1], steps[2])).unsqueeze(2)
        return _cut(flat, [0, 1, 1], sides)
    return _cut(F.conv_transpose3d(x, weight, stride=(steps[0], steps[1], steps[2])), [1, 1, 1], sides)


def _cut(x: Tensor, starts: Sequence[int], sides: Sequence[int]) -> Tensor:
    for axis, (start, side) in enumerate(zip(starts, sides, strict=True)):
        x = x.narrow(2 + axis, start, side)
    return x


def _dilated(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Apply a dilated convolution that keeps the size, without the taps that meet padding only."""
    padding = []
    for axis, length in enumerate(x.shape[2:]):
        reaches = length > dilation
        padding.append(dilation if reaches else 0)
        if not reaches:
            weight = weight.narrow(2 + axis, 1, 1)
    if x.shape[2] == 1:
        pads = (padding[1], padding[2])
        return conv2d(x.squeeze(2), weight[:, :, 0], (1, 1), pads, dilation=dilation).unsqueeze(2)
    return conv3d(x, weight, None, 1, (padding[0], padding[1], padding[2]), dilation)
