"""MobileNetV2 for volumes and images of any depth, with 3D, pseudo-3D, ACS or 2.5D convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ssl3d.encoders.convolutional import ConvolutionalEncoder, check_options, times
from ssl3d.encoders.convolutions import Triple, convolution, triple
from ssl3d.encoders.norms import norm, norm_relu6


@dataclass(frozen=True)
class MobileNetV2Config:
    """Options of a MobileNetV2.

    Attributes:
        kind: Kind of convolutions: 3d (full kernels), p3d (1x3x3 then 3x1x1), acs (2D kernels over three
            planes) or 2.5d (1x3x3). acs and 2.5d hold exactly a 2D MobileNetV2's weights.
        in_channels: Channels of the volumes.
        width_multiplier: Factor of the channels of every layer, which are rounded to multiples of 8; the
            last layer's are never fewer.
        last_channels: Channels of the last layer, which is the embedding.
        norm: Kind of norms: batch, group or instance.
        norm_groups: Number of groups of the group norm, lowered to what divides the channels.
        stem_stride: Stride of the first convolution along D H W.
        stage_strides: Strides along D H W of the four places that have one in the 2D network: its stages
            of 24, 32, 64 and 160 channels. All four 2 2 2 makes that network, with a total of 32.
        checkpointing: Whether only each block's input is kept for the backward pass and the rest is
            computed again: less memory, a third more time, the same gradients.
    """

    kind: str = "acs"
    in_channels: int = 1
    width_multiplier: float = 1.0
    last_channels: int = 1280
    norm: str = "batch"
    norm_groups: int = 8
    stem_stride: tuple[int, int, int] = (2, 2, 2)
    stage_strides: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        check_options(
            self,
            at_least_1=("in_channels", "last_channels", "norm_groups"),
            strides={"stem_stride": None, "stage_strides": 4},
        )
        if self.width_multiplier <= 0:
            raise ValueError(f"width_multiplier must be above 0, not {self.width_multiplier}")


def scaled(channels: int, multiplier: float) -> int:
    """Scale channels to the nearest multiple of 8 that is no more than a tenth below the product.

    Example:
        >>> scaled(32, 0.75), scaled(24, 0.5)
        (24, 16)
    """
    exact = channels * multiplier
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


class ConvNormReLU6(nn.Sequential):
    """Convolution `0`, norm `1`, ReLU6."""

    def __init__(
        self,
        config: MobileNetV2Config,
        channels: int,
        out: int,
        kernel: int,
        stride: Triple = (1, 1, 1),
        groups: int = 1,
    ):
        super().__init__(
            convolution(config.kind, channels, out, kernel, stride, groups),
            norm(config.norm, out, config.norm_groups),
        )

    def forward(self, x: Tensor, image: bool) -> Tensor:  # type: ignore[override]
        """Map (B, channels, ...) to (B, out, ...)."""
        return norm_relu6(self[1], self[0](x, image))


class InvertedResidual(nn.Module):
    """Inverted residual: widened by 1 x 1 x 1, filtered channel by channel, narrowed without activation."""

    def __init__(
        self,
        config: MobileNetV2Config,
        channels: int,
        out: int,
        expansion: int,
        stride: Triple | None,
    ):
        super().__init__()
        width = channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormReLU6(config, channels, width, 1))
        layers.append(ConvNormReLU6(config, width, width, 3, stride or (1, 1, 1), width))
        layers.append(convolution(config.kind, width, out, 1))
        layers.append(norm(config.norm, out, config.norm_groups))
        self.conv = nn.ModuleList(layers)
        # A place that has a stride keeps no shortcut when it is set to 1: the weights know none there.
        self.residual = stride is None and channels == out

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Map (B, channels, ...) to (B, out, ...)."""
        *layers, last_norm = self.conv
        y = x
        for layer in layers:
            y = layer(y, image)
        y = last_norm(y)
        return x + y if self.residual else y


class MobileNetV2(ConvolutionalEncoder):
    """MobileNetV2: inverted residuals around depth-wise convolutions.

    The 2D network's layout, with its parameter names (`features.*`), over volumes and images. Its five
    feature maps are those before each of the four strides of `stage_strides`, and the last layer's: the
    outputs of `features.1`, `.3`, `.6`, `.13` and `.18`, with 16, 24, 32, 96 and 1280 channels. As timm's,
    but for the last, which there is `.17`: an encoder leaves no layer unused. An input of depth 1 is an
    image: the whole network then runs in 2D, and kinds `acs` and `2.5d` compute exactly what torchvision's
    MobileNetV2 computes with these weights, where all strides are 2. By default the last stride is 1, for
    a volume has fewer voxels along an axis than a picture. A map that strides have brought to depth 1
    stays a volume.

    Differs from the paper: depth-wise kernels begin with the variance that keeps the signal's, where
    torchvision's begin smaller by the number of channels.
    """

    Config = MobileNetV2Config
    paper = (
        "Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks. "
        "CVPR 2018, arXiv 1801.04381"
    )
    # Expansion, channels, blocks, and which of `stage_strides` (None: the stage has no stride).
    settings: ClassVar[tuple[tuple[int, int, int, int | None], ...]] = (
        (1, 16, 1, None),
        (6, 24, 2, 0),
        (6, 32, 3, 1),
        (6, 64, 4, 2),
        (6, 96, 3, None),
        (6, 160, 3, 3),
        (6, 320, 1, None),
    )

    def __init__(self, config: MobileNetV2Config | None = None):
        super().__init__()
        self.config = config = config or MobileNetV2Config()
        factor = config.width_multiplier
        width = scaled(32, factor)
        layers: list[nn.Module] = [ConvNormReLU6(config, config.in_channels, width, 3, config.stem_stride)]
        reached = triple(config.stem_stride)
        channels, strides, cuts = [], [], []
        for expansion, base, blocks, strided in self.settings:
            out = scaled(base, factor)
            stride: Triple | None = None
            if strided is not None:
                stride = triple(config.stage_strides[strided])
                channels.append(width)
                strides.append(reached)
                cuts.append(len(layers) - 1)
                reached = times(reached, stride)
            for k in range(blocks):
                here = stride if k == 0 else None
                layers.append(InvertedResidual(config, width, out, expansion, here))
                width = out
        last = scaled(config.last_channels, max(1.0, factor))
        layers.append(ConvNormReLU6(config, width, last, 1))
        self.features = nn.ModuleList(layers)
        self.cuts = (*cuts, len(layers) - 1)
        self.channels, self.strides = (*channels, last), (*strides, reached)
        self.embed_dim = last

    def maps(self, x: Tensor, image: bool) -> list[Tensor]:
        """Compute the outputs of the layers in `cuts`."""
        maps = []
        for n, layer in enumerate(self.features):
            if n == 0:
                assert isinstance(layer, ConvNormReLU6)
                x = norm_relu6(layer[1], self.in_layout(layer[0](x, image), image))
            else:
                x = self.run(layer, x, image)
            if n in self.cuts:
                maps.append(x)
        return maps
