"""A light U-shaped decoder: from any encoder's feature maps back to every voxel of its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.encoder import Encoder
from ssl3d.encoders.convolutions import conv2d, conv3d
from ssl3d.encoders.inference import upsample
from ssl3d.encoders.norms import norm as make_norm

Triple = tuple[int, int, int]

_GROUPS = 8


class Decoder(nn.Module):
    """Decoder of an encoder's feature maps to (B, out_channels, D, H, W), in steps of a factor 2 at most.

    On the way from the deepest map up, each step brings what is there to the next resolution by linear
    interpolation, adds the encoder's map of that resolution where there is one (`skips`), and applies a
    3 x 3 x 3 convolution, norm and leaky ReLU; a last 1 x 1 x 1 convolution gives the values. Of several
    maps of one resolution the deepest counts. The input itself is never seen: an encoder whose first map
    has stride 2 leaves nothing to copy the voxels from.

    A step has `width` channels at half resolution, half of them at full resolution and twice as many per
    halving below, up to eight times: full resolution costs most, so the whole is lighter than a ResNet.

    Any strides and sizes will do, and images (D = 1), which run in 2D. Differs from the U-Net (Ronneberger
    et al., MICCAI 2015): skips are added after 1 x 1 x 1 convolutions instead of concatenated, one
    convolution per step instead of two, and interpolation instead of transposed convolutions.

    Args:
        encoder: Encoder whose maps are decoded; only its `channels`, `strides` and `config.in_channels`
            are read, it is not kept.
        out_channels: Number of output channels; None for that of the encoder's input.
        width: Number of channels at half resolution.
        skips: Whether the shallower maps are used too. Without them the deepest map must hold
            everything that comes out.
        norm: Kind of norms: batch, group or instance. `instance` takes the mean and scale of every channel
            from each example, and with them much of what an absolute grey value is restored from.

    Attributes:
        sources: Numbers of the encoder's maps that are decoded.
    """

    def __init__(
        self,
        encoder: Encoder,
        out_channels: int | None = None,
        width: int = 32,
        skips: bool = True,
        norm: Literal["batch", "group", "instance"] = "group",
    ) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"width must be at least 2, not {width}")
        self.out_channels = encoder.config.in_channels if out_channels is None else out_channels
        # Where maps have equal strides, the deepest one counts.
        maps = {stride: n for n, stride in enumerate(encoder.strides)}
        deepest = encoder.strides[-1]
        # Only what is no coarser than the deepest can be met on the way up.
        stops = sorted((s for s in maps if s != deepest and _within(s, deepest)), reverse=True)
        path = stride_path(deepest, [*stops, (1, 1, 1)])
        used = maps if skips else {}
        self._stages = [(stride, used.get(stride) if stride != deepest else None) for stride in path]
        self._deepest = deepest
        self.sources = tuple(
            sorted({len(encoder.strides) - 1, *(m for _, m in self._stages if m is not None)})
        )
        channels = encoder.channels[-1]
        self.carry, self.skip = nn.ModuleList(), nn.ModuleDict()
        self.mix, self.norms = nn.ModuleList(), nn.ModuleList()
        for n, (stride, source) in enumerate(self._stages):
            out = min(max(width * max(stride) // 2, 1), 8 * width)
            # Before the interpolation, where a voxel is cheap.
            self.carry.append(nn.Conv3d(channels, out, 1))
            if source is not None:
                self.skip[str(n)] = nn.Conv3d(encoder.channels[source], out, 1, bias=False)
            self.mix.append(nn.Conv3d(out, out, 3, bias=False))
            self.norms.append(make_norm(norm, out, _GROUPS))
            channels = out
        self.out = nn.Conv3d(channels, self.out_channels, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Decode the feature maps of an input.

        Args:
            maps: Feature maps of the encoder, shallow to deep.
            size: Size (D, H, W) of the encoder's input.

        Returns:
            Values (B, out_channels, D, H, W).
        """
        x, reached = maps[-1], self._deepest
        for n, (stride, source) in enumerate(self._stages):
            x = self.carry[n](x)
            if stride != reached:
                sides = [-(-length // step) for length, step in zip(size, stride, strict=True)]
                x = upsample(x, sides, [a / b for a, b in zip(reached, stride, strict=True)])
                reached = stride
            if source is not None:
                x = x + self.skip[str(n)](maps[source])
            x = F.leaky_relu(
                self.norms[n](conv3x3x3(x, self.mix[n].get_parameter("weight"))), 0.01, inplace=True
            )
        return self.out(x)


def _within(stride: Sequence[int], other: Sequence[int]) -> bool:
    return all(a <= b for a, b in zip(stride, other, strict=True))


def stride_path(start: Triple, stops: Sequence[Triple]) -> list[Triple]:
    """List strides from `start` (left out) over `stops` to full resolution, in steps of at most a factor 2.

    An encoder of stride 1 stays where it is: one step at full resolution.

    Example:
        >>> stride_path((4, 8, 8), [(1, 1, 1)])
        [(2, 4, 4), (1, 2, 2), (1, 1, 1)]
    """
    path = [start]
    for stop in stops:
        if not _within(stop, path[-1]):
            continue  # coarser along some axis than what is reached
        while path[-1] != stop:
            d, h, w = (max(goal, -(-at // 2)) for at, goal in zip(path[-1], stop, strict=True))
            path.append((d, h, w))
    return path[1:] or path


def conv3x3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with padded 3 x 3 x 3 kernels; in 2D, with the same outcome, where the depth is 1."""
    if x.shape[2] == 1:
        return conv2d(x.squeeze(2), weight[:, :, 1], (1, 1), 1).unsqueeze(2)
    return conv3d(x, weight, padding=1)
