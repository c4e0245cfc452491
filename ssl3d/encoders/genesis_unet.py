"""The encoder half of Models Genesis' 3D U-Net, with its parameter names, for volumes and images."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.encoders.convolutional import ConvolutionalEncoder, check_options, times
from ssl3d.encoders.convolutions import Triple, convolution, triple
from ssl3d.encoders.norms import norm, norm_relu

STAGES = ("down_tr64", "down_tr128", "down_tr256", "down_tr512")


@dataclass(frozen=True)
class GenesisUNetConfig:
    """Options of the encoder of Models Genesis.

    Attributes:
        kind: Kind of convolutions: 3d (full kernels, as published), p3d (1x3x3 then 3x1x1), acs (2D kernels
            over three planes) or 2.5d (1x3x3).
        in_channels: Channels of the volumes.
        width: Channels of the first convolution; a stage ends with twice as many as it begins with, and
            the next begins with those.
        norm: Kind of norms: batch (as published), group or instance.
        norm_groups: Number of groups of the group norm, lowered to what divides the channels.
        pool_strides: Strides along D H W of the three max-pools between the stages; 1 along D keeps the
            depth.
        checkpointing: Whether only each stage's input is kept for the backward pass and the rest is
            computed again: less memory, a third more time, the same gradients.
    """

    kind: str = "3d"
    in_channels: int = 1
    width: int = 32
    norm: str = "batch"
    norm_groups: int = 8
    pool_strides: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        check_options(self, ("in_channels", "width", "norm_groups"), {"pool_strides": 3})


class ConvNormReLU(nn.Module):
    """Convolution with bias `conv1`, norm `bn1`, ReLU."""

    def __init__(self, config: GenesisUNetConfig, channels: int, out: int):
        super().__init__()
        self.conv1 = convolution(config.kind, channels, out, 3)
        self.conv1.register_parameter("bias", nn.Parameter(self.conv1.weight.new_zeros(out)))
        self.bn1 = norm(config.norm, out, config.norm_groups)

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Map (B, channels, ...) to (B, out, ...)."""
        x = self.conv1(x, image)
        bias = self.conv1.get_parameter("bias").to(x.dtype)
        return norm_relu(self.bn1, x + bias.view(-1, *(1,) * (x.ndim - 2)))


class DownStage(nn.Module):
    """Two convolutions in a row, `ops.0` and `ops.1`; the second doubles the channels."""

    def __init__(self, config: GenesisUNetConfig, channels: int, first: int):
        super().__init__()
        self.ops = nn.ModuleList(
            [ConvNormReLU(config, channels, first), ConvNormReLU(config, first, 2 * first)]
        )

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Map (B, channels, ...) to (B, 2 first, ...)."""
        for part in self.ops:
            x = part(x, image)
        return x


class GenesisUNet(ConvolutionalEncoder):
    """The encoder of Models Genesis' 3D U-Net: four stages of two convolutions, max-pools between them.

    Its feature maps are those of the stages, before the pools: 64, 128, 256 and 512 channels at strides 1,
    2, 4 and 8. An input of depth 1 is an image, and the whole network then runs in 2D.

    Differs from the published code: in evaluation mode the norms use their running statistics, which the
    published code keeps but never uses (it normalises every batch by itself, so that an embedding would
    depend on its batch); in training mode the two are the same. Sizes that are no multiple of the strides
    keep their last voxels.
    """

    Config = GenesisUNetConfig
    paper = (
        "Zhou, Sodha, Rahman Siddiquee, Feng, Tajbakhsh, Gotway, Liang: Models Genesis: Generic "
        "Autodidactic Models for 3D Medical Image Analysis. MICCAI 2019, arXiv 1908.06912"
    )

    def __init__(self, config: GenesisUNetConfig | None = None):
        super().__init__()
        self.config = config = config or GenesisUNetConfig()
        channels, strides = [], []
        before, reached = config.in_channels, (1, 1, 1)
        for n, name in enumerate(STAGES):
            first = config.width * 2**n
            self.add_module(name, DownStage(config, before, first))
            before = 2 * first
            if n:
                reached = times(reached, config.pool_strides[n - 1])
            channels.append(before)
            strides.append(reached)
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.embed_dim = before

    def maps(self, x: Tensor, image: bool) -> list[Tensor]:
        """Compute the map of each stage."""
        maps: list[Tensor] = []
        for n, name in enumerate(STAGES):
            if n:
                x = _max_pool(maps[-1], triple(self.config.pool_strides[n - 1]), image)
            x = self.run(self.get_submodule(name), x, image)
            maps.append(self.in_layout(x, image))
        return maps


def _max_pool(x: Tensor, stride: Triple, image: bool) -> Tensor:
    """Pool the maximum of each cell, to ceil(n / stride): the last cells may be cut."""
    steps = stride[1:] if image else stride
    cell = [min(step, size) for step, size in zip(steps, x.shape[2:], strict=True)]  # torch wants no larger
    return (F.max_pool2d if image else F.max_pool3d)(x, cell, steps, ceil_mode=True)
