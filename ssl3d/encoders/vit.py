"""A vision transformer over 3D patches, for volumes and images of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl3d.encoder import Encoder
from ssl3d.encoders.convolutions import Triple


@dataclass(frozen=True)
class ViTConfig:
    """Options of a vision transformer; by default ViT-S.

    Attributes:
        in_channels: Channels of the volumes.
        patch: Size of a token, in voxels along D H W. 1 along D sees every slice of a thin slab by itself.
        width: Length of a token.
        layers: Number of transformer blocks.
        heads: Number of attention heads; lowered to what divides the width.
        mlp_ratio: Hidden width of a block's perceptron, as a multiple of the width.
        grid: Numbers of tokens along D H W for which position embeddings are learned; for any other size
            they are interpolated. 8 8 8 is a crop of 64 voxels with patches of 8.
        maps: Number of feature maps, from evenly spaced blocks, the last one's among them.
        class_token: Whether a learned token that has no place goes through the blocks too, as where a
            classifier was trained on it; no map holds it.
        norm_eps: What the layer norms add to the variance.
        dropout: Dropout rate after every linear layer while training.
        checkpointing: Whether only each block's input is kept for the backward pass and the rest is
            computed again: less memory, a third more time, the same gradients.
    """

    in_channels: int = 1
    patch: tuple[int, int, int] = (8, 8, 8)
    width: int = 384
    layers: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    grid: tuple[int, int, int] = (8, 8, 8)
    maps: int = 4
    class_token: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        for field in ("in_channels", "width", "layers", "heads", "maps"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("patch", "grid"):
            sides = getattr(self, field)
            if len(sides) != 3 or min(sides) < 1:
                raise ValueError(f"{field} needs at least 1 along D, H and W, got {sides}")
        if self.maps > self.layers:
            raise ValueError(f"maps ({self.maps}) must be at most layers ({self.layers})")
        if self.mlp_ratio * self.width < 1:
            raise ValueError(f"mlp_ratio must be above 0, not {self.mlp_ratio:g}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, not {self.norm_eps:g}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout:g}")


def repeat_edges(x: Tensor, multiples: Triple, first: int = 2) -> Tensor:
    """Lengthen three axes to multiples, by repeating the last slice along each.

    It concatenates, since the backward pass of replication padding is not deterministic on CUDA.

    Args:
        x: Tensor with at least three axes.
        multiples: Numbers that the lengths of the axes are to be multiples of.
        first: Number of the first of the three axes.

    Example:
        >>> repeat_edges(torch.arange(3).view(1, 1, 1, 1, 3), (1, 1, 2)).flatten()
        tensor([0, 1, 2, 2])
    """
    for axis, multiple in enumerate(multiples, start=first):
        missing = -x.shape[axis] % multiple
        if missing:
            last = x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([x, *[last] * missing], dim=axis)
    return x


def resampling(target: int, source: int, like: Tensor) -> Tensor:
    """Make a matrix of linear interpolation between numbers of points, antialiased where they become fewer.

    It is a matrix, since the gradient of torch's own interpolation is not deterministic on CUDA. Points lie
    in the middle of equal cells (torch's `align_corners=False`), and every source counts for some target.

    Args:
        target: Number of points wanted.
        source: Number of points there are.
        like: Tensor of the result's device and dtype.

    Returns:
        Matrix (target, source), whose rows sum to 1.

    Example:
        >>> resampling(2, 1, torch.zeros(1)).flatten()
        tensor([1., 1.])
    """
    scale = max(1.0, source / target)
    centres = (torch.arange(target, device=like.device, dtype=like.dtype) + 0.5) * (source / target) - 0.5
    places = torch.arange(source, device=like.device, dtype=like.dtype)
    weights = (1 - (places - centres[:, None]).abs() / scale).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


class Tokens(nn.Module):
    """Position embeddings, blocks and norm: torchvision's `VisionTransformer.encoder`, by its names."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        from torchvision.models.vision_transformer import EncoderBlock

        self.config = config
        self.pos_embedding = nn.Parameter(torch.empty(1, math.prod(config.grid), config.width))
        nn.init.normal_(self.pos_embedding, std=0.02)
        if config.class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        norm = partial(nn.LayerNorm, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleDict(
            {
                f"encoder_layer_{n}": EncoderBlock(
                    math.gcd(config.heads, config.width),
                    config.width,
                    round(config.mlp_ratio * config.width),
                    config.dropout,
                    config.dropout,
                    norm,
                )
                for n in range(config.layers)
            }
        )
        self.ln = norm(config.width)

    def positions(self, sides: tuple[int, ...]) -> Tensor:
        """Interpolate the position embeddings to a grid of tokens of any size: (1, d h w, E)."""
        if tuple(sides) == tuple(self.config.grid):
            return self.pos_embedding
        table = self.pos_embedding.unflatten(1, self.config.grid)
        d, h, w = (
            resampling(target, source, table)
            for target, source in zip(sides, self.config.grid, strict=True)
        )
        with torch.autocast(table.device.type, enabled=False):
            return torch.einsum("bdhwe,xd,yh,zw->bxyze", table, d, h, w).flatten(1, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute feature maps (B, E, d, h, w) of embedded patches (B, E, d, h, w)."""
        sides = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self.positions(sides)
        extra = int(self.config.class_token)
        if extra:
            x = torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = self.dropout(x)
        again = self.config.checkpointing and self.training and torch.is_grad_enabled()
        layers, maps = self.config.layers, self.config.maps
        wanted = {(n + 1) * layers // maps for n in range(maps)}
        outputs = []
        for n, layer in enumerate(self.layers.values(), start=1):
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            if n in wanted:
                outputs.append(self.ln(x[:, extra:]).transpose(1, 2).unflatten(2, sides))
        return outputs


class ViT(Encoder):
    """A vision transformer over 3D patches, with torchvision's blocks and parameter names.

    Its feature maps are the tokens after evenly spaced blocks, normalised, all of one stride; the
    embedding is the mean over the last ones, without any class token. Sizes that are no multiples of the
    patch are lengthened by repeating the last slice; position embeddings are interpolated to the grid.

    An input of depth 1 is an image: it counts as a volume with that slice all through the patch, which is
    computed in 2D with the patch kernel summed along D. So a 2D ViT whose patch kernel is divided by the
    depth and repeated computes on images what it did (as I3D inflates, Carreira and Zisserman, 2017).

    Differs from the paper: 3D patches, smaller since crops are; no class token unless it is asked for;
    position embeddings of any grid.
    """

    Config = ViTConfig
    paper = (
        "Dosovitskiy, Beyer, Kolesnikov et al.: An Image is Worth 16x16 Words: Transformers for Image "
        "Recognition at Scale. ICLR 2021, arXiv 2010.11929"
    )

    def __init__(self, config: ViTConfig | None = None):
        super().__init__()
        self.config = config = config or ViTConfig()
        self.conv_proj = nn.Conv3d(config.in_channels, config.width, config.patch, config.patch)
        fan_in = config.in_channels * math.prod(config.patch)
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / fan_in))
        nn.init.zeros_(self.conv_proj.get_parameter("bias"))
        self.encoder = Tokens(config)
        self.channels = (config.width,) * config.maps
        self.strides = (config.patch,) * config.maps
        self.embed_dim = config.width

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute feature maps of (B, C, D, H, W), shallow to deep."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"the encoder takes (B, {self.config.in_channels}, D, H, W), got {tuple(x.shape)}"
            )
        weight, bias, (depth, height, width) = self.conv_proj.weight, self.conv_proj.bias, self.config.patch
        if x.shape[2] == 1:
            x = repeat_edges(x, (1, height, width)).squeeze(2)
            x = F.conv2d(x, weight.sum(2), bias, (height, width)).unsqueeze(2)
        else:
            x = F.conv3d(repeat_edges(x, (depth, height, width)), weight, bias, (depth, height, width))
        maps: list[Tensor] = self.encoder(x)
        return maps
