"""nnU-Net's residual encoder for volumes and images of any depth, with nnU-Net's parameter names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.encoder import Encoder
from ssl3d.encoders.convolutional import ConvolutionOptions
from ssl3d.encoders.convolutions import KINDS, Triple, convolution
from ssl3d.encoders.norms import NORMS, norm, refuse_one_voxel
from ssl3d.encoders.resnet import Stage

_BLOCKS = (1, 3, 4, 6)  # of nnU-Net's stages; 6 in every later one
SLOPE = 0.01  # of the leaky ReLU, torch's default and nnU-Net's


@dataclass(frozen=True)
class ResEncConfig:
    """Options of a residual encoder.

    nnU-Net plans as many stages as leave the deepest map at least 4 voxels along an axis: 4 for crops of
    32 voxels, 5 from 64 and 6 from 128. So its presets ResEnc M, L and XL are one network, `stages 6` for
    their crops of 128 to 224 voxels, and differ in the memory that crops and batches fill.

    Attributes:
        kind: Kind of convolutions: 3d (full kernels, nnU-Net's), p3d (1x3x3 then 3x1x1), acs (2D kernels
            over three planes) or 2.5d (1x3x3).
        in_channels: Channels of the volumes.
        stages: Number of stages, each at half the resolution of the one before; 6 for ResEnc-M, -L and -XL.
        width: Channels of the first stage; each later stage has twice those of the one before.
        max_width: Largest number of channels of a stage, 320 in nnU-Net's 3D plans.
        blocks: Numbers of residual blocks of the stages; empty for nnU-Net's 1, 3, 4, 6, 6, 6, ...
        strides: Stride of each stage along D H W; empty for 1, then 2 along all. 1 along D keeps the
            depth.
        kernels: Kernel of each stage along D H W, odd, as in nnU-Net's plans for thick slices (1 3 3);
            empty for 3 everywhere. Needs kind 3d.
        norm: Kind of norms: instance (nnU-Net's), batch or group. Instance norm takes the mean out of every
            channel of every example, so that little is left for an embedding to hold if the deepest map is
            small; group norm serves proxies better that look at embeddings only.
        norm_groups: Number of groups of the group norm, lowered to what divides the channels.
        conv_bias: Whether the convolutions have a bias, as in nnU-Net's plans; those of shortcuts never.
        zero_init_residual: Whether residual branches begin by adding nothing, as in nnU-Net.
        checkpointing: Whether only each block's input is kept for the backward pass and the rest is
            computed again: less memory, a third more time, the same gradients.
    """

    kind: str = "3d"
    in_channels: int = 1
    stages: int = 4
    width: int = 32
    max_width: int = 320
    blocks: tuple[int, ...] = ()
    strides: tuple[tuple[int, int, int], ...] = ()
    kernels: tuple[tuple[int, int, int], ...] = ()
    norm: str = "instance"
    norm_groups: int = 8
    conv_bias: bool = True
    zero_init_residual: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        for field, allowed in (("kind", KINDS), ("norm", NORMS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; choose {', '.join(allowed)}")
        for field in ("in_channels", "stages", "width", "max_width", "norm_groups"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("blocks", "strides", "kernels"):
            given = getattr(self, field)
            if given and len(given) != self.stages:
                raise ValueError(f"{field} has {len(given)} entries for {self.stages} stages (stages)")
        if self.blocks and min(self.blocks) < 1:
            raise ValueError(f"blocks must be at least 1 in every stage, got {self.blocks}")
        for stride in self.strides:
            if len(stride) != 3 or min(stride) < 1:
                raise ValueError(f"strides needs at least 1 along D, H and W, got {stride}")
        for kernel in self.kernels:
            if len(kernel) != 3 or any(size < 1 or size % 2 == 0 for size in kernel):
                raise ValueError(f"kernels needs odd sizes along D, H and W, got {kernel}")
        if self.kind != "3d" and any(kernel != (3, 3, 3) for kernel in self.kernels):
            raise ValueError(f"kernels other than 3 3 3 need kind 3d, not {self.kind}")


class ConvNorm(nn.Module):
    """Convolution, bias and norm, by nnU-Net's names: `conv`, `norm` and both again in `all_modules`."""

    def __init__(
        self,
        config: ConvolutionOptions,
        channels: int,
        out: int,
        kernel: Triple,
        stride: Triple = (1, 1, 1),
        bias: bool = False,
    ):
        super().__init__()
        self.conv = convolution(config.kind, channels, out, kernel, stride)
        nn.init.kaiming_normal_(self.conv.weight, a=SLOPE)
        self.conv.register_parameter("bias", nn.Parameter(torch.zeros(out)) if bias else None)
        self.norm = norm(config.norm, out, config.norm_groups)
        self.all_modules = nn.ModuleList([self.conv, self.norm])

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Map (B, channels, ...) to (B, out, ...); no activation."""
        x = self.conv(x, image)
        if self.conv.bias is not None:
            x = x + self.conv.get_parameter("bias").to(x.dtype).view(-1, *(1,) * (x.ndim - 2))
        x = self.norm(x)
        return x


class Pool(nn.Module):
    """Mean over each stride's voxels; at an odd end, over those that are there."""

    def __init__(self, stride: Triple):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Shrink every axis to ceil(n / stride)."""
        stride = self.stride[1:] if image else self.stride
        # torch refuses windows that are larger than the map.
        window = tuple(min(step, size) for step, size in zip(stride, x.shape[2:], strict=True))
        return (F.avg_pool2d if image else F.avg_pool3d)(x, window, stride, ceil_mode=True)


class Block(nn.Module):
    """Two convolutions and a shortcut that is pooled, not strided (ResNet-D, arXiv 1812.01187)."""

    def __init__(self, config: ResEncConfig, channels: int, out: int, kernel: Triple, stride: Triple):
        super().__init__()
        self.conv1 = ConvNorm(config, channels, out, kernel, stride, config.conv_bias)
        self.conv2 = ConvNorm(config, out, out, kernel, bias=config.conv_bias)
        self.skip = nn.ModuleList()
        if stride != (1, 1, 1):
            self.skip.append(Pool(stride))
        if channels != out:
            self.skip.append(ConvNorm(config, channels, out, (1, 1, 1)))

    def forward(self, x: Tensor, image: bool) -> Tensor:
        """Map (B, channels, ...) to (B, out, ...)."""
        y = self.conv2(_activate(self.conv1(x, image)), image)
        for part in self.skip:
            x = part(x, image)
        return _activate(y + x)


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE, inplace=True)


class ResEnc(Encoder):
    """nnU-Net's residual encoder, by default as planned for crops of 32 voxels.

    Its feature maps are those of its stages, the first at full resolution. The parameters are named as in
    `ResidualEncoder` of dynamic-network-architectures (`encoder.*` of its ResidualEncoderUNet), and give
    the same output: weights go to nnU-Net and back as they are.

    An input of depth 1 is an image, and the whole network then runs in 2D, full kernels with their middle
    plane; a slab of any depth and odd sizes work too, where nnU-Net asks for multiples of the stride: at
    an odd end the shortcut takes the mean over the voxels that are there.

    Raises:
        UsageError: In `forward`, if instance norm would see a map of one voxel, which it sets to zero.
    """

    Config = ResEncConfig
    paper = (
        "Isensee, Wald, Ulrich et al.: nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical "
        "Image Segmentation. MICCAI 2024, arXiv 2404.09556"
    )

    def __init__(self, config: ResEncConfig | None = None):
        super().__init__()
        self.config = config = config or ResEncConfig()
        widths = [min(config.width * 2**n, config.max_width) for n in range(config.stages)]
        counts = config.blocks or tuple(_BLOCKS[min(n, 3)] for n in range(config.stages))
        steps = config.strides or ((1, 1, 1), *((2, 2, 2),) * (config.stages - 1))
        kernels = config.kernels or ((3, 3, 3),) * config.stages
        stem = ConvNorm(config, config.in_channels, widths[0], kernels[0], bias=config.conv_bias)
        self.stem = nn.ModuleDict({"convs": nn.ModuleList([stem])})
        self.stages = nn.ModuleList()
        strides: list[Triple] = []
        before, reached = widths[0], (1, 1, 1)
        for width, count, kernel, stride in zip(widths, counts, kernels, steps, strict=True):
            blocks = [Block(config, before, width, kernel, stride)]
            blocks += [Block(config, width, width, kernel, (1, 1, 1)) for _ in range(count - 1)]
            self.stages.append(nn.ModuleDict({"blocks": Stage(*blocks)}))
            reached = (reached[0] * stride[0], reached[1] * stride[1], reached[2] * stride[2])
            strides.append(reached)
            before = width
        self.channels, self.strides = tuple(widths), tuple(strides)
        self.embed_dim = widths[-1]
        if config.zero_init_residual:
            for module in self.modules():
                if isinstance(module, Block):
                    nn.init.zeros_(module.conv2.norm.get_parameter("weight"))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute feature maps of (B, C, D, H, W), shallow to deep."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"the encoder takes (B, {self.config.in_channels}, D, H, W), got {tuple(x.shape)}"
            )
        refuse_one_voxel(self.config.norm, x.shape[2:], self.strides[-1])
        image = x.shape[2] == 1
        if image:
            x = x.squeeze(2)
        again = self.config.checkpointing and self.training and torch.is_grad_enabled()
        for conv in self.stem["convs"]:  # type: ignore[attr-defined]
            x = _activate(conv(x, image))
        maps = []
        for stage in self.stages:
            x = stage["blocks"](x, image, again)  # type: ignore[index]
            maps.append(x)
        return [m.unsqueeze(2) for m in maps] if image else maps
