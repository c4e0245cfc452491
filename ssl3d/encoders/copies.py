"""Copies of an encoder's weights: a momentum teacher, and parameters that are put back."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ssl3d.encoder import Encoder


def momentum_teacher(encoder: Encoder) -> Encoder:
    """Copy an encoder as a teacher in evaluation mode, whose parameters get no gradient."""
    return copy.deepcopy(encoder).requires_grad_(False).eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move a teacher's weights and statistics towards those of its student, in place.

    Each floating-point value becomes `momentum` x itself + (1 - `momentum`) x the student's; counters are
    copied.

    Example:
        >>> teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(teacher.weight), nn.init.ones_(student.weight)
        >>> follow(teacher, student, 0.75)
        >>> teacher.weight.item()
        0.25
    """
    pairs = zip(teacher.state_dict().values(), student.state_dict().values(), strict=True)
    for old, new in pairs:
        if old.is_floating_point():
            old.lerp_(new.to(old.dtype), 1 - momentum)
        else:
            old.copy_(new)


def flat_parameters(module: nn.Module) -> Tensor:
    """Return a copy of all parameters in a row, (P,)."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@torch.no_grad()
def restore_parameters(module: nn.Module, flat: Tensor) -> None:
    """Put parameters back, in place, as `flat_parameters` gave them."""
    start = 0
    for parameter in module.parameters():
        own = flat[start : start + parameter.numel()]
        parameter.copy_(own.view_as(parameter))
        start += parameter.numel()
