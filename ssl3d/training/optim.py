"""Optimizers and the learning rate, a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ssl3d.training.options import PretrainOptions


def without_decay(module: nn.Module) -> set[str]:
    """List the trainable parameters that weight decay leaves alone: biases, norms, other vectors."""
    return {
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.ndim <= 1 or name.endswith(".bias"))
    }


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], spared: set[str], options: PretrainOptions
) -> torch.optim.Optimizer:
    """Build the optimizer over named parameters, in two groups: with weight decay and without.

    Args:
        parameters: Names and parameters; names may carry the prefixes of wrappers (DDP).
        spared: Names from `without_decay`, taken before wrapping.
        options: Options of the run.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (undecayed if _unwrapped(name) in spared else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One kernel for all, on GPUs; but with 16 bit Fabric scales gradients back itself, to clip them.
    fused = (options.precision != "16" and all(_on_cuda(group["params"]) for group in groups)) or None
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, fused=fused)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, fused=fused)
    from lightly.utils.lars import LARS

    # Lightly's skips the trust ratio where weight decay is 0, which is what the papers do for biases
    # and norms; for everything else PretrainOptions refuses a weight decay of 0.
    return LARS(groups, lr=options.lr, momentum=options.momentum)


def _on_cuda(parameters: list[nn.Parameter]) -> bool:
    return all(parameter.device.type == "cuda" for parameter in parameters)


def _unwrapped(name: str) -> str:
    """Strip a parameter's name of the prefixes of Fabric and DDP (`module.`)."""
    if name.startswith("_forward_module."):
        return name.removeprefix("_forward_module.").removeprefix("module.")
    return name


def lr_at(step: int, total: int, peak: float, warmup: float) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine down to 0.

    Args:
        step: Number of the step, from 0.
        total: Steps of the run.
        peak: Highest learning rate, at the end of the warm-up.
        warmup: Share of the steps in which the rate rises.

    Example:
        >>> [round(lr_at(step, 8, 1.0, 0.25), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
    """
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))
