"""Masked slices of a stack, whose embeddings are predicted from the slices that are seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl3d.distributed import gather
from ssl3d.rng import BatchRng


def mask_block(rng: BatchRng, count: int, share: tuple[float, float]) -> Tensor:
    """Draw one block of masked slices in each row, at least one slice and never all of them.

    The block's share of the slices ~ U(low, high); its place is uniform.

    Args:
        rng: Generator of the B rows.
        count: Slices in a row, at least 2.
        share: Least and largest share of the slices in the block.

    Returns:
        (B, count), True where a slice is masked.

    Example:
        >>> from ssl3d.rng import one_group
        >>> mask_block(one_group(0, 3), 10, (0.2, 0.2)).sum(1)
        tensor([2, 2, 2])
    """
    low, high = share
    length = (rng.uniform(low=low, high=high) * count).round().long().clamp(1, count - 1)
    first = (rng.uniform() * (count - length + 1)).long().minimum(count - length)
    number = torch.arange(count, device=first.device)
    return (number >= first.unsqueeze(1)) & (number < (first + length).unsqueeze(1))


def mask_scattered(rng: BatchRng, count: int, share: tuple[float, float]) -> Tensor:
    """Draw masked slices anywhere in each row, at least one slice and never all of them.

    Their share of the slices ~ U(low, high).

    Args:
        rng: Generator of the B rows.
        count: Slices in a row, at least 2.
        share: Least and largest share of the slices that are masked.

    Returns:
        (B, count), True where a slice is masked.

    Example:
        >>> from ssl3d.rng import one_group
        >>> mask_scattered(one_group(0, 3), 10, (0.2, 0.2)).sum(1)
        tensor([2, 2, 2])
    """
    low, high = share
    masked = (rng.uniform(low=low, high=high) * count).round().long().clamp(1, count - 1)
    return rng.permutation(count) < masked.unsqueeze(1)


@torch.no_grad()
def standardise(embedded: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Standardise embeddings over all groups of a batch and all ranks, feature by feature.

    Every rank must call it. Constant embeddings are then no solution of a task that predicts them: their
    error is that of the mean.

    Args:
        embedded: Embeddings (..., F) of each group; possibly none.
        like: Tensor of the same features, device and type, for a rank without groups.

    Returns:
        The embeddings in float32, less their mean and over their standard deviation.

    Example:
        >>> standardise([torch.tensor([[1.0], [3.0]])], torch.zeros(1))[0].round(decimals=2).flatten()
        tensor([-1.,  1.])
    """
    flat = [e.detach().float().flatten(0, -2) for e in embedded]
    every = gather(torch.cat(flat) if flat else like.new_zeros(0, like.shape[-1], dtype=torch.float32))
    mean, variance = every.mean(0), every.var(0, correction=0)
    scale = (variance + 1e-3 * variance.mean() + 1e-12).sqrt()
    return [(e.detach().float() - mean) / scale for e in embedded]


def interpolate_masked(x: Tensor, mask: Tensor) -> Tensor:
    """Interpolate linearly between the seen slices next to each masked one, on both sides.

    A masked slice at an end of the stack takes the one seen slice that is next to it.

    Args:
        x: Embeddings of the slices, (B, S, F).
        mask: Masked slices, (B, S); some are seen in each row.

    Returns:
        (B, S, F), of meaning where the mask is True.

    Example:
        >>> x = torch.tensor([[[0.0], [5.0], [8.0]]])
        >>> interpolate_masked(x, torch.tensor([[False, True, False]]))[0, 1].item()
        4.0
    """
    count = mask.shape[1]
    number = torch.arange(count, device=x.device).expand_as(mask)
    left = torch.where(mask, -1, number).cummax(1).values
    right = torch.where(mask, count, number).flip(1).cummin(1).values.flip(1)
    share = (number - left) / (right - left).clamp_min(1)
    share = torch.where(left < 0, 1.0, share)
    share = torch.where(right >= count, 0.0, share).unsqueeze(2)
    row = torch.arange(len(x), device=x.device).unsqueeze(1)
    before, after = x[row, left.clamp_min(0)], x[row, right.clamp_max(count - 1)]
    return before * (1 - share) + after * share
