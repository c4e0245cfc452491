"""Parameters of a model that is fine-tuned: stages, freezing, learning rates by layer, the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl3d.api import AggregatedEncoder, UsageError

if TYPE_CHECKING:
    from ssl3d.api import Encoder
    from ssl3d_benchmarks.finetune.options import FinetuneOptions


def shared_encoder(encoder: Encoder) -> Encoder:
    """Return the encoder that an aggregator pools, or the encoder itself."""
    inner: Encoder = encoder.encoder if isinstance(encoder, AggregatedEncoder) else encoder
    return inner


def stages_of(encoder: Encoder) -> dict[str, int]:
    """Find the stage of every parameter of an encoder, by name: the first feature map that depends on it.

    Each map is differentiated, so this holds for any encoder. Parameters that no map depends on (those of
    an aggregator) count as beyond the last stage.
    """
    inner = shared_encoder(encoder)
    prefix = "encoder." if inner is not encoder else ""
    count = len(inner.strides)
    stages = {name: count for name, _ in encoder.named_parameters()}
    named = [(prefix + name, parameter) for name, parameter in inner.named_parameters()]
    modes = [(part, part.training) for part in inner.modules()]
    wanted = [parameter.requires_grad for _, parameter in named]
    device = named[0][1].device
    # The input is a volume, whatever the depth of the data: some kernels see nothing of an image. The
    # deepest map has two cells, since instance norm makes zeros of a single one.
    size = [max(step, 8) * cells for step, cells in zip(inner.strides[-1], (1, 1, 2), strict=True)]
    inner.eval()
    try:
        for _, parameter in named:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            x = torch.zeros(1, inner.config.in_channels, *size, device=device)
            maps = inner(x)
            for stage in reversed(range(count)):
                reached = torch.autograd.grad(
                    maps[stage].sum(), [p for _, p in named], allow_unused=True, retain_graph=True
                )
                for (name, _), gradient in zip(named, reached, strict=True):
                    if gradient is not None:
                        stages[name] = stage
    finally:
        for (_, parameter), needed in zip(named, wanted, strict=True):
            parameter.requires_grad_(needed)
        for part, training in modes:
            part.training = training
    return stages


def check_freeze(encoder: Encoder, asked: str) -> None:
    """Raise a UsageError where an encoder has fewer stages than shall be frozen."""
    count = len(shared_encoder(encoder).strides)
    if asked.isdigit() and int(asked) > count:
        raise UsageError(f"--freeze {asked}: the encoder has {count} stages; freeze fewer of them, or all")


def encoders_of(model: nn.Module) -> list[Encoder]:
    """List the encoders in a model: its `encoder`, and the copy that a coarse stage has."""
    encoders: list[Encoder] = []
    above: list[str] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "encoder" and not any(name.startswith(prefix) for prefix in above):
            above.append(f"{name}.")  # an aggregator's encoder is part of it
            encoders.append(module)
    return encoders


def freeze(model: nn.Module, asked: str, norms: bool) -> list[nn.Module]:
    """Freeze parameters of the encoders and return the modules that stay in evaluation mode.

    Args:
        model: Model with its `encoder`, and perhaps others of that name in it.
        asked: Stages to freeze: none, all, or a number of first stages.
        norms: Whether the batch norms of the encoder are frozen too.
    """
    return [module for encoder in encoders_of(model) for module in _freeze(encoder, asked, norms)]


def _freeze(encoder: Encoder, asked: str, norms: bool) -> list[nn.Module]:
    if asked == "all":
        encoder.requires_grad_(False)
        return [encoder]
    calm: list[nn.Module] = []
    if asked != "none":
        stages = stages_of(encoder)
        for name, parameter in encoder.named_parameters():
            if stages[name] < int(asked):
                parameter.requires_grad_(False)
        for module in encoder.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                calm.append(module)
    if norms:
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
                calm.append(module)
    return calm


def set_training(model: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """Set training mode for all but the frozen modules, whose norm statistics stay too."""
    model.train()
    for module in frozen:
        module.eval()


def parameter_groups(model: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay.

    The head has the full learning rate (`scale` 1), the encoder's last stage `layer_decay` of it, each
    stage before it `layer_decay` of the next. Biases, norms and other vectors are not decayed.
    """
    place: dict[int, int] = {}
    for encoder in encoders_of(model):
        count = len(shared_encoder(encoder).strides)
        stages = stages_of(encoder) if layer_decay < 1 else {}
        place |= {id(p): count - stages.get(name, count) for name, p in encoder.named_parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** place.get(id(parameter), 0)
        decay = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") else weight_decay
        group = groups.setdefault(
            (scale, decay), {"params": [], "names": [], "scale": scale, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def optimizer_of(model: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """Build the optimizer, whose learning rates are set at every step."""
    groups: list[dict[str, Any]] = [
        {key: value for key, value in group.items() if key != "names"}
        for group in parameter_groups(model, options.layer_decay, options.weight_decay)
    ]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    if options.optimizer == "adam":
        return torch.optim.Adam(groups, lr=0.0)
    nesterov = options.momentum > 0
    return torch.optim.SGD(groups, lr=0.0, momentum=options.momentum, nesterov=nesterov)
