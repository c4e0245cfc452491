"""Projection heads on an encoder's embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

NORMS = ("batch", "layer", "none")


def projection_head(
    in_features: int,
    hidden: int,
    out: int,
    layers: int = 2,
    norm: str = "batch",
    norm_last: bool = True,
    bias_last: bool = True,
) -> nn.Module:
    """Make lightly's projection head: linear layers with ReLU between them, (B, in) to (B, out).

    With norm `batch`, two layers and `norm_last` it is lightly's `SimCLRProjectionHead`; with three
    layers and without `norm_last` its `BarlowTwinsProjectionHead`.

    Args:
        in_features: Length of the embeddings, the encoder's `embed_dim`.
        hidden: Width of the hidden layers.
        out: Length of a projection.
        layers: Number of linear layers, at least 1.
        norm: Norm of the layers: `batch`, or, so that every example stands alone (batches of a few,
            gradients equal over any number of ranks), `layer` or `none`.
        norm_last: Whether the last layer is normalised too.
        bias_last: Whether a last layer without norm has a bias; losses that standardise need none.

    Raises:
        ValueError: `norm` is unknown or `layers` below 1.

    Example:
        >>> import torch
        >>> projection_head(32, 64, 16)(torch.rand(4, 32)).shape
        torch.Size([4, 16])
    """
    from lightly.models.modules.heads import ProjectionHead

    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    if layers < 1:
        raise ValueError(f"layers must be at least 1, not {layers}")
    make: dict[str, Callable[[int], nn.Module | None]] = {
        "batch": nn.BatchNorm1d,
        "layer": nn.LayerNorm,
        "none": lambda width: None,
    }
    blocks: list[tuple[Any, ...]] = []
    width = in_features
    for _ in range(layers - 1):
        blocks.append((width, hidden, make[norm](hidden), nn.ReLU()))
        width = hidden
    last = make[norm](out) if norm_last else None
    blocks.append((width, out, last, None, last is None and bias_last))
    head: nn.Module = ProjectionHead(blocks)
    return head
