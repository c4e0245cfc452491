"""Norms that take images and volumes, with the activation that follows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.errors import UsageError

NORMS = ("batch", "group", "instance")

# Set while activation checkpointing runs a forward pass for the second time.
_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


# What else has to hold again during that second pass: makes the context that the first one ran in.
surroundings: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar(
    "surroundings", default=nullcontext
)


class recomputation(AbstractContextManager[None]):
    """Context of the second pass, in which batch norms leave their running statistics alone.

    The batch has been counted in the first. It is to be made during the first pass, as
    `torch.utils.checkpoint` calls its `context_fn`: what `surroundings` makes then is entered again. It can
    be entered any number of times, since torch does so once per walk through the graph: twice where
    gradients are looked at before the backward pass.
    """

    def __init__(self) -> None:
        self._again = surroundings.get()
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.callback(_recomputing.reset, _recomputing.set(True))
            stack.enter_context(self._again())
            self._entered.append(stack.pop_all())

    def __exit__(self, *raised: Any) -> None:
        self._entered.pop().__exit__(*raised)


def recomputing() -> bool:
    """Tell whether this is the second pass."""
    return _recomputing.get()


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """Compute once more what was computed before: batch norms of any kind do not count the batch again."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    kept = [dict(norm._buffers) for norm in norms]
    try:
        for norm, buffers in zip(norms, kept, strict=True):  # copies, which are thrown away
            norm._buffers.update({k: None if v is None else v.clone() for k, v in buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


class BatchNorm(nn.BatchNorm3d):
    """Batch norm of (B, C, H, W) or (B, C, D, H, W), with BatchNorm2d's names.

    Counts a batch once under activation checkpointing, where torch's own counts it twice.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (4, 5):
            raise ValueError(f"batch norm takes (B, C, H, W) or (B, C, D, H, W), not {input.dim()} axes")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over all axes but C."""
        if self.training and self.running_mean is not None and recomputing():
            assert self.running_var is not None
            mean, var = self.running_mean.clone(), self.running_var.clone()  # thrown away
            return F.batch_norm(input, mean, var, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(input)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalise groups of channels by torch's kernels, also fast on a CPU with channels last.

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
    """Group norm by `group_norm`, with `nn.GroupNorm`'s names."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each group of channels of each example."""
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def norm(kind: str, channels: int, groups: int) -> nn.Module:
    """Make a norm of kind `batch`, `group` or `instance`; `groups` is lowered to divide `channels`."""
    if kind == "batch":
        return BatchNorm(channels)
    return GroupNorm(channels if kind == "instance" else math.gcd(groups, channels), channels)


def refuse_one_voxel(kind: str, size: Sequence[int], stride: Sequence[int]) -> None:
    """Refuse an input for which instance norm would set an encoder's deepest map to zero.

    Args:
        kind: Kind of the encoder's norms.
        size: Size (D, H, W) of its input, voxels.
        stride: Strides of its deepest map along (D, H, W).

    Raises:
        UsageError: The kind is instance, and that map has one voxel.
    """
    if kind == "instance" and all(length <= step for length, step in zip(size, stride, strict=True)):
        given, step = (" x ".join(map(str, sides)) for sides in (size, stride))
        raise UsageError(
            f"instance norm makes nothing of a map of 1 voxel, which is the deepest of {given} with "
            f"stride {step}: take larger crops, smaller strides or norm group"
        )


def norm_relu(module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Compute relu(norm(x) + residual), the residual being optional."""
    x = module(x)
    if residual is not None:
        x = x + residual
    return F.relu(x, inplace=True)


def norm_relu6(module: nn.Module, x: Tensor) -> Tensor:
    """Compute min(relu(norm(x)), 6) of an input."""
    return F.relu6(module(x), inplace=True)
