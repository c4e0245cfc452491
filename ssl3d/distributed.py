"""Gathering over ranks, with gradients, so that losses over the global batch stay exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Count the ranks of this run; 1 outside `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; 0 outside `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def row_counts(local: int, device: torch.device) -> list[int]:
    """Count the rows that each rank holds, in the order of ranks; every rank must call it."""
    if world_size() == 1:
        return [local]
    counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(local, device=device))
    return [int(n) for n in counts]


def gather(x: Tensor, counts: list[int] | None = None) -> Tensor:
    """Gather all ranks' rows, in the order of ranks: (B of all ranks, ...) from (B, ...).

    Every rank must call it, with the same shape but for B, which may differ and may be 0. The gradient is
    summed over the ranks. So a loss that every rank computes from the gathered rows alone, and a mean
    over this rank's own rows, give the single-process gradient once DDP has averaged over ranks.

    Args:
        x: Rows (B, ...) of this rank.
        counts: Rows of each rank from `row_counts`, where they are known already.

    Example:
        >>> gather(torch.arange(3))  # one process
        tensor([0, 1, 2])
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _Gather.apply(x, counts or row_counts(len(x), x.device))
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather of unequal rows: padded to the longest, cut after."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        start = sum(ctx.counts[: rank()])
        return total[start : start + ctx.counts[rank()]], None
