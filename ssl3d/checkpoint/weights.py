"""Weights as safetensors: written and read with their digest, loaded strictly."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl3d import memory
from ssl3d.checkpoint.card import CARD
from ssl3d.encoder import Encoder
from ssl3d.errors import CheckpointError
from ssl3d.files import check_regular


def safetensors_of(module: nn.Module) -> bytes:
    """Return the weights and buffers of a module as the content of a safetensors file."""
    from safetensors.torch import save

    # Contiguous copies: the memory format is not part of the weights, and tied tensors are refused. Of
    # one tensor with two names the first is kept.
    state = module.state_dict()
    first = tensor_names(state)
    return save({k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
                 for k, v in state.items() if first[k] == k})  # fmt: skip


def tensor_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Map every name in a module's state to the first name of the same tensor."""
    seen: dict[tuple[Any, ...], str] = {}
    names = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        names[name] = seen.setdefault(place, name) if tensor.numel() and tensor.data_ptr() else name
    return names


def read_weights(path: Path, card: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Read a file of weights whose digest a card keeps as `sha256`.

    Raises:
        CheckpointError: The file is missing, truncated, or not the one that the card was written for; or a
            weight is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        check_regular(path)
        memory.check(2 * path.stat().st_size, f"{path}: ")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        state = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: truncated or not safetensors ({len(content)} bytes: {error})"
        ) from error
    if "sha256" in card and hashlib.sha256(content).hexdigest() != card["sha256"]:
        raise CheckpointError(
            f"{path}: its bytes are not those that {CARD} was written for (sha256 differs)"
        )
    if wrong := not_finite(state):
        raise CheckpointError(f"{path}: {wrong}; the training that wrote it had diverged")
    return state


def not_finite(state: Mapping[str, torch.Tensor]) -> str:
    """Say how many weights of the first tensor with such are NaN or infinite; empty where none is."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            odd = int((~torch.isfinite(tensor)).sum())
            return f"{odd:,} of the {tensor.numel():,} weights of {name} are NaN or infinite"
    return ""


def load_strictly(module: nn.Module, state: Mapping[str, torch.Tensor], where: str, name: str) -> None:
    """Load weights into a module, all of them and no others.

    Args:
        module: Module to fill.
        state: Weights and buffers by name; of tied tensors one name is enough.
        where: Beginning of the message of an error.
        name: Name of the architecture, for the message.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    own = module.state_dict()
    for key, first in tensor_names(own).items():
        if key not in state and first in state:
            state = {**state, key: state[first]}
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if missing or extra:
        raise CheckpointError(
            f"{where}: not the weights of {name}: {len(missing)} missing ({', '.join(missing[:2]) or '-'}),"
            f" {len(extra)} unknown ({', '.join(extra[:2]) or '-'})"
        )
    wrong = [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{where}: {key} has shape {tuple(state[key].shape)}, {name} expects {tuple(own[key].shape)}"
        )
    module.load_state_dict(dict(state))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Give an optimizer its state of then, which must be one of the same parameters and options.

    Args:
        optimizer: Optimizer to fill.
        state: What its `state_dict` returned.

    Raises:
        ValueError: A part is missing, of the wrong kind or shape, or not finite.
    """
    own = [{key: type(value) for key, value in g.items()} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    for kinds, group in zip(own, optimizer.param_groups, strict=True):
        if missing := sorted(set(kinds) - set(group)):
            raise ValueError(f"a group lacks {', '.join(missing)}")
        for key, kind in kinds.items():
            numbers = {kind, type(group[key])} <= {int, float}
            if kind is not type(group[key]) and not numbers:
                raise ValueError(f"{key} is {type(group[key]).__name__}, not {kind.__name__}")
    names: set[str] | None = None
    for parameter, entries in optimizer.state.items():
        if not isinstance(parameter, torch.Tensor) or not isinstance(entries, dict):
            raise ValueError("it has the state of what is no parameter")
        names = names or set(entries)
        if set(entries) != names:
            raise ValueError("parameters have states of different kinds")
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                if value.numel() != 1 and value.shape != parameter.shape:
                    raise ValueError(f"{key} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
                if not_finite({key: value}):
                    raise ValueError(f"{key} is NaN or infinite")
            elif value is not None and not isinstance(value, int | float):
                raise ValueError(f"{key} is {type(value).__name__}")


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor's values, in the order of its axes, whatever its memory format."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, shapes and types."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


LATER = ("shortcut", "dilated", "high_resolution")
"""Options that encoders got after the first records: at their defaults, they leave digests as they were."""


def encoder_digest(encoder: Encoder) -> str:
    """Return a hash of an encoder's class, configuration, weights and buffers, by which records know it."""
    digest = hashlib.sha256(f"{type(encoder).__name__} {_written(encoder.config)}".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def _written(config: Any) -> str:
    """Return the `repr` of a configuration, without later options that are at their defaults."""
    shown = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in LATER or getattr(config, field.name) != field.default
    ]
    return f"{type(config).__qualname__}({', '.join(shown)})"
