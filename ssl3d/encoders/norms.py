"""Norms that take images and volumes, with the activation that follows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("batch", "group", "instance")

# Set while activation checkpointing runs a forward pass for the second time.
_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


# What else has to hold again during that second pass: makes the context that the first one ran in.
surroundings: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar(
    "surroundings", default=nullcontext
)


def recomputation() -> AbstractContextManager[None]:
    """For the second pass: batch norms leave their running statistics alone, this batch has been counted.

    To be called during the first pass, as `torch.utils.checkpoint` calls its `context_fn`: what
    `surroundings` makes then is entered again.
    """
    return _recomputation(surroundings.get())


@contextmanager
def _recomputation(again: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        with again():
            yield
    finally:
        _recomputing.reset(token)


def recomputing() -> bool:
    """Whether this is the second pass."""
    return _recomputing.get()


class BatchNorm(nn.BatchNorm3d):
    """Batch norm of (B, C, H, W) or (B, C, D, H, W), with BatchNorm2d's names.

    Counts a batch once under activation checkpointing, where torch's own counts it twice.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (4, 5):
            raise ValueError(f"batch norm takes (B, C, H, W) or (B, C, D, H, W), not {input.dim()} axes")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises over all axes but C."""
        if self.training and self.running_mean is not None and recomputing():
            assert self.running_var is not None
            mean, var = self.running_mean.clone(), self.running_var.clone()  # thrown away
            return F.batch_norm(input, mean, var, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(input)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Group norm by torch's kernels, also fast on a CPU with channels last.

    There they take 4 (fp32) to 40 times (bf16) as long as on contiguous memory (4 x 8 channels of
    32 x 48 x 32 in bf16, forward and backward, one core, torch 2.15: 57 ms against 1.2), so the memory is
    turned and turned back.
    """
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    turned = x.dim() in (4, 5) and x.device.type == "cpu" and not x.is_contiguous()
    if not turned or not x.is_contiguous(memory_format=last):
        return F.group_norm(x, groups, weight, bias, eps)
    return F.group_norm(x.contiguous(), groups, weight, bias, eps).contiguous(memory_format=last)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` by `group_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalises each group of channels of each example."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def norm(kind: str, channels: int, groups: int) -> nn.Module:
    """A norm of kind `batch`, `group` or `instance`; `groups` is lowered to what divides `channels`."""
    if kind == "batch":
        return BatchNorm(channels)
    return GroupNorm(channels if kind == "instance" else math.gcd(groups, channels), channels)


def norm_relu(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual)."""
    x = module(x)
    if residual is not None:
        x = x + residual
    return F.relu(x, inplace=True)


def norm_relu6(module: nn.Module, x: Tensor) -> Tensor:
    """min(relu(norm(x)), 6)."""
    return F.relu6(module(x), inplace=True)
