"""A feature pyramid in 3D over any encoder's maps, and the convolutions that detectors put on it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ssl3d.encoder import Encoder
from ssl3d.encoders.inference import upsample
from ssl3d.encoders.norms import norm
from ssl3d.heads.decoder import conv3x3x3, stride_path

Triple = tuple[int, int, int]

_GROUPS = 8


class Conv3x3x3(nn.Conv3d):
    """A padded 3 x 3 x 3 convolution; on depth 1 the same in 2D. Right gradients in bfloat16 too."""

    def __init__(self, channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, channels, D, H, W) to (B, out_channels, D, H, W)."""
        y = conv3x3x3(input, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None, None]


def conv_block(channels: int, out_channels: int) -> nn.Sequential:
    """Build a block of a 3 x 3 x 3 convolution, a group norm and a ReLU."""
    return nn.Sequential(
        Conv3x3x3(channels, out_channels, bias=False),
        norm("group", out_channels, _GROUPS),
        nn.ReLU(inplace=True),
    )


class Pyramid3d(nn.Module):
    """Feature pyramid network (Lin et al., CVPR 2017, arXiv 1612.03144) in 3D, for any strides.

    From the deepest map up, each step brings what is there to the next resolution by linear interpolation
    and adds the encoder's map of that resolution, where there is one, after a 1 x 1 x 1 convolution. A
    3 x 3 x 3 convolution gives each level. Of several maps of one resolution the deepest counts. Levels
    finer than the encoder's first map are steps without a map to add.

    Args:
        encoder: Encoder of which only `channels` and `strides` are read; it is not kept.
        strides: Strides of the levels wanted, fine to coarse.
        channels: Number of channels of every level.

    Raises:
        ValueError: A level is coarser than the deepest map, or on no way down from it.
    """

    def __init__(self, encoder: Encoder, strides: Sequence[Triple], channels: int = 64) -> None:
        super().__init__()
        maps = {stride: n for n, stride in enumerate(encoder.strides)}
        deepest = encoder.strides[-1]
        stops = sorted(({s for s in maps if _within(s, deepest)} | set(strides)) - {deepest}, reverse=True)
        end = min(strides)
        path = [deepest]
        if end != deepest:
            path += stride_path(deepest, [s for s in stops if _within(end, s)])
        missing = [stride for stride in strides if stride not in path]
        if missing:
            raise ValueError(f"level of stride {missing[0]}: the way down from {deepest} is {path}")
        self.strides = tuple(strides)
        self.out_channels = channels
        self._path = [(stride, maps.get(stride)) for stride in path]
        self.lateral = nn.ModuleDict(
            {str(n): nn.Conv3d(encoder.channels[n], channels, 1) for _, n in self._path if n is not None}
        )
        self.out = nn.ModuleList(Conv3x3x3(channels, channels) for _ in strides)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Compute the levels (B, channels, ceil(D / stride), ...), fine to coarse.

        Args:
            maps: Feature maps that the encoder gave.
            size: Size (D, H, W) of the encoder's input.
        """
        reached, source = self._path[0]
        x = self.lateral[str(source)](maps[source if source is not None else -1])
        by_stride = {reached: x}
        for stride, source in self._path[1:]:
            sides = [-(-length // step) for length, step in zip(size, stride, strict=True)]
            x = upsample(x, sides, [a / b for a, b in zip(reached, stride, strict=True)])
            if source is not None:
                x = x + self.lateral[str(source)](maps[source])
            reached = stride
            by_stride[stride] = x
        return [out(by_stride[stride]) for out, stride in zip(self.out, self.strides, strict=True)]


def _within(stride: Sequence[int], other: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(stride, other, strict=True))
