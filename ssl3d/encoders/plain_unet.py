"""The encoder half of nnU-Net's plain U-Net, with nnU-Net's parameter names, for volumes and images."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.encoders.convolutional import ConvolutionalEncoder, check_options, times
from ssl3d.encoders.convolutions import Triple, triple
from ssl3d.encoders.resenc import SLOPE, ConvNorm


@dataclass(frozen=True)
class PlainUNetConfig:
    """Options of the encoder of a plain U-Net, by default as nnU-Net plans it for crops of 64 voxels.

    Attributes:
        kind: Kind of convolutions: 3d (full kernels, nnU-Net's), p3d (1x3x3 then 3x1x1), acs (2D kernels
            over three planes) or 2.5d (1x3x3).
        in_channels: Channels of the volumes.
        stages: Number of stages, each at half the resolution of the one before.
        width: Channels of the first stage; each later stage has twice those of the one before.
        max_width: Largest number of channels of a stage, 320 in nnU-Net's 3D plans.
        convolutions: Numbers of convolutions of the stages, the first of which strides; empty for 2 each.
        strides: Stride of each stage along D H W; empty for 1, then 2 along all. 1 along D keeps the
            depth.
        kernels: Kernel of each stage along D H W, odd, as in nnU-Net's plans for thick slices (1 3 3);
            empty for 3 everywhere. Needs kind 3d.
        norm: Kind of norms: instance (nnU-Net's), batch or group.
        norm_groups: Number of groups of the group norm, lowered to what divides the channels.
        conv_bias: Whether the convolutions have a bias, as in nnU-Net's plans.
        checkpointing: Whether only each stage's input is kept for the backward pass and the rest is
            computed again: less memory, a third more time, the same gradients.
    """

    kind: str = "3d"
    in_channels: int = 1
    stages: int = 5
    width: int = 32
    max_width: int = 320
    convolutions: tuple[int, ...] = ()
    strides: tuple[tuple[int, int, int], ...] = ()
    kernels: tuple[tuple[int, int, int], ...] = ()
    norm: str = "instance"
    norm_groups: int = 8
    conv_bias: bool = True
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        strides = {"strides": self.stages} if self.strides else {}
        check_options(self, ("in_channels", "stages", "width", "max_width", "norm_groups"), {**strides})
        for field in ("convolutions", "kernels"):
            given = getattr(self, field)
            if given and len(given) != self.stages:
                raise ValueError(f"{field} has {len(given)} entries for {self.stages} stages (stages)")
        if self.convolutions and min(self.convolutions) < 1:
            raise ValueError(f"convolutions must be at least 1 in every stage, got {self.convolutions}")
        for kernel in self.kernels:
            if len(kernel) != 3 or any(size < 1 or size % 2 == 0 for size in kernel):
                raise ValueError(f"kernels needs odd sizes along D, H and W, got {kernel}")
        if self.kind != "3d" and any(kernel != (3, 3, 3) for kernel in self.kernels):
            raise ValueError(f"kernels other than 3 3 3 need kind 3d, not {self.kind}")


class Convolutions(nn.Module):
    """Convolutions in a row, each with its norm and leaky ReLU; the first one has the stride."""

    def __init__(
        self, config: PlainUNetConfig, channels: int, out: int, count: int, kernel: Triple, stride: Triple
    ):
        super().__init__()
        self.convs = nn.ModuleList(
            ConvNorm(
                config, out if n else channels, out, kernel, (1, 1, 1) if n else stride, config.conv_bias
            )
            for n in range(count)
        )

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Map (B, channels, ...) to (B, out, ...)."""
        for conv in self.convs:
            x = F.leaky_relu(conv(x, image), SLOPE, inplace=True)
        return x


class PlainUNet(ConvolutionalEncoder):
    """The encoder half of nnU-Net's PlainConvUNet: stages of convolutions, the first of each strided.

    Its feature maps are those of its stages, the first at full resolution. The parameters are named as in
    `PlainConvEncoder` of dynamic-network-architectures (`encoder.*` of its PlainConvUNet), and give the
    same output.

    An input of depth 1 is an image, and the whole network then runs in 2D, full kernels with their middle
    plane; a slab of any depth and odd sizes work too.
    """

    Config = PlainUNetConfig
    paper = (
        "Isensee, Jaeger, Kohl, Petersen, Maier-Hein: nnU-Net: a self-configuring method for deep "
        "learning-based biomedical image segmentation. Nature Methods 2021"
    )

    def __init__(self, config: PlainUNetConfig | None = None):
        super().__init__()
        self.config = config = config or PlainUNetConfig()
        widths = [min(config.width * 2**n, config.max_width) for n in range(config.stages)]
        counts = config.convolutions or (2,) * config.stages
        steps = config.strides or ((1, 1, 1), *((2, 2, 2),) * (config.stages - 1))
        kernels = config.kernels or ((3, 3, 3),) * config.stages
        self.stages = nn.ModuleList()
        strides: list[Triple] = []
        before, reached = config.in_channels, (1, 1, 1)
        for width, count, kernel, stride in zip(widths, counts, kernels, steps, strict=True):
            stage = Convolutions(config, before, width, count, triple(kernel), triple(stride))
            self.stages.append(nn.ModuleList([stage]))  # nnU-Net's may hold a pool before it
            reached = times(reached, stride)
            strides.append(reached)
            before = width
        self.channels, self.strides = tuple(widths), tuple(strides)
        self.embed_dim = widths[-1]

    def maps(self, x: Tensor, image: bool) -> list[Tensor]:
        """Compute the map of each stage."""
        maps = []
        for stage in self.stages:
            x = self.in_layout(self.run(stage[0], x, image), image)  # type: ignore[index]
            maps.append(x)
        return maps

    def prefers_channels_last(self, device: object) -> bool:
        """Return False: instance norm takes contiguous maps, and so do full kernels on a CPU."""
        return False
