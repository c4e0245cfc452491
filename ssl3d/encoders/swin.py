"""A Swin transformer for volumes and images of any size, of MONAI's modules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssl3d.encoder import Encoder
from ssl3d.encoders.convolutions import Triple
from ssl3d.encoders.vit import repeat_edges
from ssl3d.errors import PluginError


@dataclass(frozen=True)
class SwinConfig:
    """Options of a Swin transformer.

    Attributes:
        in_channels: Channels of the volumes.
        patch: Size of a token of the first map, in voxels along D H W; 1 along D where slices are thick.
        width: Channels of the first map; each later one has twice those of the one before. 48 in
            SwinUNETR.
        depths: Numbers of blocks of the four stages; windows are shifted in every other one.
        heads: Number of attention heads of the first stage, doubled in each later one; lowered to what
            divides the width.
        window: Size of a window, in tokens along D H W that see each other; 7 7 7 in SwinUNETR. 4 leaves
            nothing to pad in crops of 32, 64 or 96 voxels.
        mlp_ratio: Hidden width of a block's perceptron, as a multiple of its channels.
        drop_path: Probability that the last block is skipped for an example while training; from 0 at the
            first block it rises linearly.
        merging: Way of merging tokens between stages: mergingv2 takes all eight tokens together; merging,
            that of SwinUNETR's published weights, takes some of them twice and leaves others out.
        checkpointing: Whether only each block's input is kept for the backward pass and the rest is
            computed again: less memory, a third more time, the same gradients.
    """

    in_channels: int = 1
    patch: tuple[int, int, int] = (2, 2, 2)
    width: int = 24
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    heads: int = 3
    window: tuple[int, int, int] = (4, 4, 4)
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    merging: Literal["mergingv2", "merging"] = "mergingv2"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        for field in ("in_channels", "width", "heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        for field in ("patch", "window"):
            sides = getattr(self, field)
            if len(sides) != 3 or min(sides) < 1:
                raise ValueError(f"{field} needs at least 1 along D, H and W, got {sides}")
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ValueError(f"depths needs at least 1 block in each of four stages, got {self.depths}")
        if self.mlp_ratio * self.width < 1:
            raise ValueError(f"mlp_ratio must be above 0, not {self.mlp_ratio:g}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, not {self.drop_path:g}")
        if self.merging not in ("mergingv2", "merging"):
            raise ValueError(f"merging is {self.merging!r}; choose mergingv2 or merging")


class Swin(Encoder):
    """A Swin transformer over 3D windows, MONAI's, as in SwinUNETR; needs `ssl3d[transformers]`.

    Its five feature maps are the embedded patches and the outputs of the four stages, normalised, each at
    half the resolution of the one before. The parameters are those of SwinUNETR's `swinViT`, by MONAI's
    names.

    Any size: where patches or merging need one slice more, the last one is repeated, and windows shrink to
    maps that are smaller. So an image (D = 1) goes through the same weights one token deep, as a slab of
    two equal slices does.

    Differs from MONAI: where it merges an odd number of tokens it adds zeros, for images at every stage;
    and in a map smaller than the window along H or W it looks up position biases at wrong displacements.
    Elsewhere the outputs are the same.

    Raises:
        PluginError: MONAI is not installed.
    """

    Config = SwinConfig
    paper = (
        "Liu, Lin, Cao et al.: Swin Transformer: Hierarchical Vision Transformer using Shifted Windows. "
        "ICCV 2021, arXiv 2103.14030; in 3D: Tang, Yang, Li et al.: Self-Supervised Pre-Training of Swin "
        "Transformers for 3D Medical Image Analysis. CVPR 2022, arXiv 2111.14791"
    )

    def __init__(self, config: SwinConfig | None = None):
        super().__init__()
        self.config = config = config or SwinConfig()
        heads = math.gcd(config.heads, config.width)
        self.swinViT: Any = _monai().SwinTransformer(
            in_chans=config.in_channels,
            embed_dim=config.width,
            window_size=config.window,
            patch_size=config.patch,
            depths=config.depths,
            num_heads=[heads * 2**n for n in range(4)],
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path,
            downsample=config.merging,
            spatial_dims=3,
        )
        self.channels = tuple(config.width * 2**n for n in range(5))
        depth, height, width = config.patch
        self.strides = tuple((depth * 2**n, height * 2**n, width * 2**n) for n in range(5))
        self.embed_dim = self.channels[-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute feature maps of (B, C, D, H, W), shallow to deep."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"the encoder takes (B, {self.config.in_channels}, D, H, W), got {tuple(x.shape)}"
            )
        net = self.swinViT
        again = self.config.checkpointing and self.training and torch.is_grad_enabled()
        x = net.patch_embed.proj(repeat_edges(x, self.config.patch)).movedim(1, -1)
        maps = [_as_map(x)]
        for stage in (net.layers1[0], net.layers2[0], net.layers3[0], net.layers4[0]):
            for block in stage.blocks:
                x = checkpoint(_run, block, x, use_reentrant=False) if again else _run(block, x)
            x = stage.downsample(repeat_edges(x, (2, 2, 2), first=1))
            maps.append(_as_map(x))
        return maps


def _monai() -> Any:
    try:
        from monai.networks.nets import swin_unetr
    except ImportError as error:
        raise PluginError(
            f"the encoder swin needs MONAI ({error}): pip install 'ssl3d[transformers]'"
        ) from error
    return swin_unetr


def _as_map(x: Tensor) -> Tensor:
    """Normalise (B, d, h, w, C) over C, and return (B, C, d, h, w)."""
    return F.layer_norm(x, x.shape[-1:]).movedim(-1, 1)


def _run(block: Any, x: Tensor) -> Tensor:
    """Run MONAI's block on (B, d, h, w, C), with its own modules."""
    x = x + block.drop_path(_attend(block, block.norm1(x)))
    x = x + block.drop_path(block.mlp(block.norm2(x)))
    return x


def _attend(block: Any, x: Tensor) -> Tensor:
    """Attend within windows of (B, d, h, w, C); as in MONAI, a window's padding is seen as zeros."""
    monai, attention = _monai(), block.attn
    batch, depth, height, width = x.shape[:4]
    window, shift = monai.get_window_size((depth, height, width), block.window_size, block.shift_size)
    pads = [n for side, step in zip((width, height, depth), window[::-1], strict=True)
            for n in (0, -side % step)]  # fmt: skip
    x = F.pad(x, [0, 0, *pads])
    padded = x.shape[1:4]
    shifted = any(shift)
    if shifted:
        x = x.roll([-step for step in shift], (1, 2, 3))
    tokens = monai.window_partition(x, window)
    heads = attention.num_heads
    q, k, v = attention.qkv(tokens).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    index = relative_index(window, block.window_size, x.device)
    bias = attention.relative_position_bias_table[index].permute(2, 0, 1)  # (heads, n, n)
    scores = (q * attention.scale) @ k.transpose(-2, -1) + bias
    if shifted:
        mask = monai.compute_mask(padded, window, shift, x.device)  # (windows, n, n)
        scores = (scores.unflatten(0, (batch, -1)) + mask[:, None]).flatten(0, 1)
    seen = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
    x = monai.window_reverse(attention.proj(seen), window, [batch, *padded])
    if shifted:
        x = x.roll(shift, (1, 2, 3))
    return x[:, :depth, :height, :width]


def relative_index(window: Triple, largest: Triple, device: torch.device | str = "cpu") -> Tensor:
    """Look up the rows of the table of position biases for every pair of a window's tokens.

    Args:
        window: Size of the window in tokens along D H W; at most `largest`.
        largest: Window for which the table has a row per displacement, in raster order.
        device: Device of the result.

    Returns:
        Numbers of rows (n, n), n being the number of tokens.

    Example:
        >>> relative_index((1, 1, 2), (1, 1, 2))
        tensor([[1, 0],
                [2, 1]])
    """
    axes = [torch.arange(side, device=device) for side in window]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    apart = places[:, :, None] - places[:, None, :]
    d, h, w = (steps + side - 1 for steps, side in zip(apart, largest, strict=True))
    index: Tensor = (d * (2 * largest[1] - 1) + h) * (2 * largest[2] - 1) + w
    return index
