"""ResNets for volumes and images of any depth, with 3D, pseudo-3D, ACS or 2.5D convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl3d.encoder import Encoder
from ssl3d.encoders.convolutional import count_once, max_pool, times
from ssl3d.encoders.convolutions import KINDS, Triple, convolution, triple
from ssl3d.encoders.norms import NORMS, norm, norm_relu, refuse_one_voxel

ShortcutType = Literal["B", "A"]


@dataclass(frozen=True)
class ResNetConfig:
    """Options of a ResNet.

    Attributes:
        kind: Kind of convolutions: 3d (full kernels), p3d (1x3x3 then 3x1x1), acs (2D kernels over three
            planes) or 2.5d (1x3x3). acs and 2.5d hold exactly a 2D ResNet's weights.
        in_channels: Channels of the volumes.
        width: Channels of the first stage; each later stage has twice those of the one before.
        norm: Kind of norms: batch, group or instance.
        norm_groups: Number of groups of the group norm, lowered to what divides the channels.
        stem_kernel: Size of the first convolution's kernel, odd: one number, or one along each of D H W, as
            inflated 2D networks have it (3 7 7); unequal ones need kind 3d.
        stem_stride: Stride of the first convolution along D H W.
        stem_pool: Whether a max-pool of size 3 follows the first convolution, as in the 2D ResNet.
        pool_stride: Stride of the max-pool along D H W.
        stage_strides: Stride of each of the four stages along D H W; 1 along D keeps the depth.
        shortcut: Way in which a block's input takes the shape of its output where the two differ: B (1x1x1
            convolution and norm) or A (every stride-th voxel, zeros for the channels that are new; no
            parameters), as MedicalNet has it in its ResNet-18 and -34.
        dilated: Whether stages 3 and 4 dilate their kernels by what they would have strided, as in Med3D:
            stride 1 with dilations of 2 and 4, so that the deepest maps are four times as fine.
        high_resolution: Whether the maps are fine, for dense tasks: the first convolution and the third
            stage have stride 1 and the max-pool goes, whatever the options above say (Zhang et al., arXiv
            2201.01426).
        zero_init_residual: Whether residual branches begin by adding nothing.
        checkpointing: Whether only each block's input is kept for the backward pass and the rest is
            computed again: less memory, a third more time, the same gradients.
    """

    kind: str = "acs"
    in_channels: int = 1
    width: int = 64
    norm: str = "batch"
    norm_groups: int = 8
    stem_kernel: int | tuple[int, int, int] = 7
    stem_stride: tuple[int, int, int] = (2, 2, 2)
    stem_pool: bool = False
    pool_stride: tuple[int, int, int] = (2, 2, 2)
    stage_strides: tuple[tuple[int, int, int], ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    shortcut: ShortcutType = "B"
    dilated: bool = False
    high_resolution: bool = False
    zero_init_residual: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        for field, allowed in (("kind", KINDS), ("norm", NORMS), ("shortcut", get_args(ShortcutType))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; choose {', '.join(allowed)}")
        for field in ("in_channels", "width", "norm_groups"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        sides = (self.stem_kernel,) if isinstance(self.stem_kernel, int) else self.stem_kernel
        if len(sides) not in (1, 3) or any(side < 1 or side % 2 == 0 for side in sides):
            raise ValueError(f"stem_kernel must be odd, not {self.stem_kernel}")
        if len(set(sides)) > 1 and self.kind != "3d":
            raise ValueError(f"stem_kernel {self.stem_kernel} needs kind 3d, not {self.kind}")
        if len(self.stage_strides) != 4:
            raise ValueError(f"stage_strides needs four triples, got {len(self.stage_strides)}")
        for field in ("stem_stride", "pool_stride"):
            _check_stride(field, getattr(self, field))
        for stride in self.stage_strides:
            _check_stride("stage_strides", stride)

    def stem(self) -> tuple[Triple, bool]:
        """Return the stride of the first convolution, and whether the max-pool follows."""
        if self.high_resolution:
            return (1, 1, 1), False
        return triple(self.stem_stride), self.stem_pool

    def steps(self) -> list[tuple[Triple, Triple]]:
        """Return stride and dilation of each stage."""
        strides = [triple(stride) for stride in self.stage_strides]
        if self.high_resolution:
            strides[2] = (1, 1, 1)
        if not self.dilated:
            return [(stride, (1, 1, 1)) for stride in strides]
        third = strides[2]
        return [
            (strides[0], (1, 1, 1)),
            (strides[1], (1, 1, 1)),
            ((1, 1, 1), third),
            ((1, 1, 1), times(third, strides[3])),
        ]


def _check_stride(field: str, stride: tuple[int, ...]) -> None:
    if len(stride) != 3 or min(stride) < 1:
        raise ValueError(f"{field} needs strides of at least 1 along D, H and W, got {stride}")


class Shortcut(nn.Sequential):
    """1 x 1 x 1 convolution and norm, `downsample.0` and `downsample.1`."""

    def forward(self, x: Tensor, image: bool) -> Tensor:  # type: ignore[override]
        """Bring the block's input into the shape of its output."""
        return self[1](self[0](x, image))


class ZeroPadding(nn.Module):
    """Shortcut of every stride-th voxel, and zeros for new channels (He et al.'s option A).

    It has no parameters. Differs from MedicalNet, whose shortcut passes no gradient on.
    """

    def __init__(self, new_channels: int, stride: Triple):
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Bring the block's input into the shape of its output."""
        last = torch.channels_last if image else torch.channels_last_3d
        layout = last if x.is_contiguous(memory_format=last) else torch.contiguous_format
        for axis, step in enumerate(self.stride[1:] if image else self.stride, 2):
            x = x[(slice(None),) * axis + (slice(None, None, step),)]
        padded = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, self.new_channels))
        return padded.contiguous(memory_format=layout)


class Block(nn.Module):
    """Residual block: its branch plus the shortcut, then ReLU."""

    expansion: ClassVar[int]
    last_norm: ClassVar[str]
    downsample: Shortcut | ZeroPadding | None

    def _shortcut(
        self, config: ResNetConfig, channels: int, out: int, stride: Triple
    ) -> Shortcut | ZeroPadding | None:
        if channels == out and stride == (1, 1, 1):
            return None
        if config.shortcut == "A":
            return ZeroPadding(out - channels, stride)
        return Shortcut(
            convolution(config.kind, channels, out, 1, stride), norm(config.norm, out, config.norm_groups)
        )

    def shortcut(self, x: Tensor, image: bool) -> Tensor:
        """Bring the input into the shape of the output."""
        return x if self.downsample is None else self.downsample(x, image)


class BasicBlock(Block):
    """Residual block of two 3 x 3 x 3 convolutions (He et al., arXiv 1512.03385)."""

    expansion = 1
    last_norm = "bn2"

    def __init__(self, config: ResNetConfig, channels: int, width: int, stride: Triple, dilation: Triple):
        super().__init__()
        self.conv1 = convolution(config.kind, channels, width, 3, stride, dilation=dilation)
        self.bn1 = norm(config.norm, width, config.norm_groups)
        self.conv2 = convolution(config.kind, width, width, 3, dilation=dilation)
        self.bn2 = norm(config.norm, width, config.norm_groups)
        self.downsample = self._shortcut(config, channels, width, stride)

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Map (B, channels, ...) to (B, width, ...)."""
        y = norm_relu(self.bn1, self.conv1(x, image))
        return norm_relu(self.bn2, self.conv2(y, image), self.shortcut(x, image))


class Bottleneck(Block):
    """Residual block of convolutions 1, 3 and 1 voxels wide, the middle one strided ("V1.5")."""

    expansion = 4
    last_norm = "bn3"

    def __init__(self, config: ResNetConfig, channels: int, width: int, stride: Triple, dilation: Triple):
        super().__init__()
        out = width * self.expansion
        self.conv1 = convolution(config.kind, channels, width, 1)
        self.bn1 = norm(config.norm, width, config.norm_groups)
        self.conv2 = convolution(config.kind, width, width, 3, stride, dilation=dilation)
        self.bn2 = norm(config.norm, width, config.norm_groups)
        self.conv3 = convolution(config.kind, width, out, 1)
        self.bn3 = norm(config.norm, out, config.norm_groups)
        self.downsample = self._shortcut(config, channels, out, stride)

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Map (B, channels, ...) to (B, 4 width, ...)."""
        y = norm_relu(self.bn1, self.conv1(x, image))
        y = norm_relu(self.bn2, self.conv2(y, image))
        return norm_relu(self.bn3, self.conv3(y, image), self.shortcut(x, image))


class Stage(nn.Sequential):
    """Blocks in a row; the first one has the stride."""

    def forward(self, x: Tensor, image: bool, checkpointing: bool) -> Tensor:  # type: ignore[override]
        """Pass `image` on to every block."""
        for block in self:
            if checkpointing:
                x = checkpoint(block, x, image, use_reentrant=False, context_fn=count_once)
            else:
                x = block(x, image)
        return x


class ResNet(Encoder):
    """A 2D ResNet's layout, with its parameter names, over volumes and images.

    Its five feature maps are the stem's output (before any max-pool) and those of the four stages. An
    input of depth 1 is an image: the whole network then runs in 2D, and kinds `acs` and `2.5d` compute
    exactly what torchvision's ResNet computes with these weights. A map that strides have brought to
    depth 1 stays a volume.

    Attributes:
        channels_last: Memory format of the feature maps; None for the faster one. It changes the time
            and nothing else.

    Raises:
        UsageError: In `forward` while training, if instance norm would see a map of one voxel, which it
            sets to zero.
    """

    channels_last: bool | None = None
    Config = ResNetConfig
    paper = "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016, arXiv 1512.03385"
    layer1: Stage
    layer2: Stage
    layer3: Stage
    layer4: Stage
    block: ClassVar[type[Block]]
    depths: ClassVar[tuple[int, int, int, int]]

    def __init__(self, config: ResNetConfig | None = None):
        super().__init__()
        self.config = config = config or ResNetConfig()
        block = self.block
        first, self.pools = config.stem()
        self.conv1 = convolution(config.kind, config.in_channels, config.width, config.stem_kernel, first)
        self.bn1 = norm(config.norm, config.width, config.norm_groups)
        channels = [config.width]
        strides = [first]
        reached = first
        if self.pools:
            reached = times(reached, config.pool_stride)
        for n, (depth, (stride, dilation)) in enumerate(zip(self.depths, config.steps(), strict=True)):
            width = config.width * 2**n
            blocks = []
            for k in range(depth):
                before = channels[-1] if k == 0 else width * block.expansion
                blocks.append(block(config, before, width, stride if k == 0 else (1, 1, 1), dilation))
            self.add_module(f"layer{n + 1}", Stage(*blocks))
            reached = times(reached, stride)
            channels.append(width * block.expansion)
            strides.append(reached)
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.embed_dim = channels[-1]
        if config.zero_init_residual:
            for module in self.modules():
                if isinstance(module, Block):
                    nn.init.zeros_(module.get_parameter(f"{module.last_norm}.weight"))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute feature maps of (B, C, D, H, W), shallow to deep."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"the encoder takes (B, {self.config.in_channels}, D, H, W), got {tuple(x.shape)}"
            )
        if self.training:  # in use, the shallow maps of a small volume may be all that is wanted
            refuse_one_voxel(self.config.norm, x.shape[2:], self.strides[-1])
        image = x.shape[2] == 1
        if image:
            x = x.squeeze(2)
        # After the convolution: with one channel in, its input has no layout that the output could take.
        x = norm_relu(self.bn1, self.conv1(x, image).contiguous(memory_format=self._layout(x, image)))
        maps = [x]
        if self.pools:
            x = max_pool(x, self.config.pool_stride, image)
        again = self.config.checkpointing and self.training and torch.is_grad_enabled()
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x, image, again)
            maps.append(x)
        return [m.unsqueeze(2) for m in maps] if image else maps

    def prefers_channels_last(self, device: torch.device | str) -> bool:
        """Tell whether it trains faster with the channels last in memory."""
        return faster_channels_last(self.config, device)

    def _layout(self, x: Tensor, image: bool) -> torch.memory_format:
        channels_last = self.channels_last
        if channels_last is None:
            channels_last = faster_channels_last(self.config, x.device)
        if not channels_last:
            return torch.contiguous_format
        return torch.channels_last if image else torch.channels_last_3d


def faster_channels_last(config: ResNetConfig, device: torch.device | str) -> bool:
    """Tell whether a ResNet trains faster with the channels last in memory.

    Measured by benchmarks/scripts/speed_encoder.py on an AVX-512 processor: flat kernels, and three thin
    convolutions above all, gain about a sixth; full kernels are as fast or faster with channels first.
    """
    kind = torch.device(device).type
    return kind == "cuda" or (kind == "cpu" and config.kind != "3d")


class ResNet10(ResNet):
    """ResNet-10: one basic block per stage."""

    block, depths = BasicBlock, (1, 1, 1, 1)


class ResNet18(ResNet):
    """ResNet-18: two basic blocks per stage."""

    block, depths = BasicBlock, (2, 2, 2, 2)


class ResNet34(ResNet):
    """ResNet-34: 3, 4, 6 and 3 basic blocks."""

    block, depths = BasicBlock, (3, 4, 6, 3)


class ResNet50(ResNet):
    """ResNet-50: 3, 4, 6 and 3 bottleneck blocks."""

    block, depths = Bottleneck, (3, 4, 6, 3)


class ResNet101(ResNet):
    """ResNet-101: 3, 4, 23 and 3 bottleneck blocks."""

    block, depths = Bottleneck, (3, 4, 23, 3)


class ResNet152(ResNet):
    """ResNet-152: 3, 8, 36 and 3 bottleneck blocks."""

    block, depths = Bottleneck, (3, 8, 36, 3)


class ResNet200(ResNet):
    """ResNet-200: 3, 24, 36 and 3 bottleneck blocks."""

    block, depths = Bottleneck, (3, 24, 36, 3)
