"""DenseNets for volumes and images of any depth, with 3D, pseudo-3D, ACS or 2.5D convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssl3d.encoders.convolutional import (
    ConvolutionalEncoder,
    average_pool,
    check_options,
    max_pool,
    times,
)
from ssl3d.encoders.convolutions import Triple, convolution, triple
from ssl3d.encoders.norms import norm, norm_relu


@dataclass(frozen=True)
class DenseNetConfig:
    """Options of a DenseNet.

    Attributes:
        kind: Kind of convolutions: 3d (full kernels), p3d (1x3x3 then 3x1x1), acs (2D kernels over three
            planes) or 2.5d (1x3x3). acs and 2.5d hold exactly a 2D DenseNet's weights.
        in_channels: Channels of the volumes.
        growth: Channels that each layer adds.
        width: Channels of the first convolution.
        bottleneck: Channels inside a layer, as a multiple of the growth.
        norm: Kind of norms: batch, group or instance.
        norm_groups: Number of groups of the group norm, lowered to what divides the channels.
        stem_kernel: Size of the first convolution's kernel, odd.
        stem_stride: Stride of the first convolution along D H W.
        stem_pool: Whether a max-pool of size 3 follows the first convolution, as in the 2D DenseNet.
        pool_stride: Stride of the max-pool along D H W.
        stage_strides: Strides along D H W of the three transitions between the dense blocks, which
            average over so many voxels; 1 along D keeps the depth.
        checkpointing: Whether only what each layer adds is kept for the backward pass and the rest is
            computed again: memory linear in the depth and not quadratic, a third more time, the same
            gradients.
    """

    kind: str = "acs"
    in_channels: int = 1
    growth: int = 32
    width: int = 64
    bottleneck: int = 4
    norm: str = "batch"
    norm_groups: int = 8
    stem_kernel: int = 7
    stem_stride: tuple[int, int, int] = (2, 2, 2)
    stem_pool: bool = False
    pool_stride: tuple[int, int, int] = (2, 2, 2)
    stage_strides: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        check_options(
            self,
            at_least_1=("in_channels", "growth", "width", "bottleneck", "norm_groups", "stem_kernel"),
            strides={"stem_stride": None, "pool_stride": None, "stage_strides": 3},
        )
        if self.stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel must be odd, not {self.stem_kernel}")


class DenseLayer(nn.Module):
    """Layer that sees all maps before it, and adds `growth` channels by 1 x 1 x 1, then 3 x 3 x 3."""

    def __init__(self, config: DenseNetConfig, channels: int):
        super().__init__()
        inside = config.bottleneck * config.growth
        self.norm1 = norm(config.norm, channels, config.norm_groups)
        self.conv1 = convolution(config.kind, channels, inside, 1)
        self.norm2 = norm(config.norm, inside, config.norm_groups)
        self.conv2 = convolution(config.kind, inside, config.growth, 3)

    def forward(self, image: bool, *known: Tensor) -> Tensor:
        """Map the outputs of all layers before to (B, growth, ...)."""
        x = self.conv1(norm_relu(self.norm1, torch.cat(known, dim=1)), image)
        return self.conv2(norm_relu(self.norm2, x), image)


class Transition(nn.Module):
    """Norm, ReLU, half the channels, and the mean of each cell of `stride` voxels."""

    def __init__(self, config: DenseNetConfig, channels: int, stride: Triple):
        super().__init__()
        self.norm = norm(config.norm, channels, config.norm_groups)
        self.conv = convolution(config.kind, channels, channels // 2, 1)
        self.stride = triple(stride)

    def forward(self, x: Tensor, image: bool) -> tuple[Tensor, Tensor]:
        """Return the map before the stride, normed, and the next block's input."""
        x = norm_relu(self.norm, x)
        return x, average_pool(self.conv(x, image), self.stride, image)


class DenseNet(ConvolutionalEncoder):
    """The 2D DenseNet-BC's layout, with its parameter names (`features.*`), over volumes and images.

    Its five feature maps are the stem's output (before any max-pool) and those of the four dense blocks,
    each before its transition's stride, and each after the norm and ReLU that follow it: channels and
    strides as timm's, which leaves norm and ReLU out. An input of depth 1 is an image: the whole network
    then runs in 2D, and kinds `acs` and `2.5d` compute exactly what torchvision's DenseNet computes with
    these weights (with `stem_pool`, and where the maps that are averaged have even sizes: of an odd one
    torchvision leaves out the last row). A map that strides have brought to depth 1 stays a volume.
    """

    Config = DenseNetConfig
    paper = (
        "Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks. "
        "CVPR 2017, arXiv 1608.06993"
    )
    layers: ClassVar[tuple[int, int, int, int]]

    def __init__(self, config: DenseNetConfig | None = None):
        super().__init__()
        self.config = config = config or DenseNetConfig()
        width = config.width
        self.features = nn.ModuleDict(
            {
                "conv0": convolution(
                    config.kind, config.in_channels, width, config.stem_kernel, config.stem_stride
                ),
                "norm0": norm(config.norm, width, config.norm_groups),
            }
        )
        channels, strides = [width], [triple(config.stem_stride)]
        reached = strides[0]
        if config.stem_pool:
            reached = times(reached, config.pool_stride)
        for n, count in enumerate(self.layers):
            block = nn.ModuleDict()
            for k in range(count):
                block[f"denselayer{k + 1}"] = DenseLayer(config, width)
                width += config.growth
            self.features[f"denseblock{n + 1}"] = block
            channels.append(width)
            strides.append(reached)
            if n < 3:
                stride = config.stage_strides[n]
                self.features[f"transition{n + 1}"] = Transition(config, width, stride)
                reached = times(reached, stride)
                width //= 2
        self.features["norm5"] = norm(config.norm, width, config.norm_groups)
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.embed_dim = width

    def maps(self, x: Tensor, image: bool) -> list[Tensor]:
        """Compute the stem's map, and each dense block's after norm and ReLU."""
        parts = self.features
        x = self.in_layout(parts["conv0"](x, image), image)
        x = norm_relu(parts["norm0"], x)
        maps = [x]
        if self.config.stem_pool:
            x = max_pool(x, self.config.pool_stride, image)
        for n in range(4):
            known = [x]
            block = parts[f"denseblock{n + 1}"]
            assert isinstance(block, nn.ModuleDict)
            for layer in block.values():
                known.append(self.run(layer, image, *known))
            x = torch.cat(known, dim=1)
            if n < 3:
                seen, x = parts[f"transition{n + 1}"](x, image)
                x = self.in_layout(x, image)  # torch's 3D mean puts the channels first
            else:
                seen = norm_relu(parts["norm5"], x)
            maps.append(seen)
        return maps


class DenseNet121(DenseNet):
    """DenseNet-121: every layer sees all layers before it; blocks of 6, 12, 24 and 16 layers."""

    layers = (6, 12, 24, 16)
