"""Weights as safetensors: written and read with their digest, loaded strictly."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl3d.checkpoint.card import CARD
from ssl3d.errors import CheckpointError


def _tensors_of(module: nn.Module) -> bytes:
    from safetensors.torch import save

    # Contiguous copies: the memory format is not part of the weights, and tied tensors are refused. Of
    # one tensor with two names the first is kept.
    state = module.state_dict()
    first = tensor_names(state)
    return save({k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
                 for k, v in state.items() if first[k] == k})  # fmt: skip


def tensor_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For every name in a module's state, the first name of the same tensor."""
    seen: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        found[name] = seen.setdefault(place, name) if tensor.numel() and tensor.data_ptr() else name
    return found


def _read_weights(path: Path, card: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        state = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: truncated or not safetensors ({len(content)} bytes: {error})"
        ) from error
    if "sha256" in card and hashlib.sha256(content).hexdigest() != card["sha256"]:
        raise CheckpointError(
            f"{path}: its bytes are not those that {CARD} was written for (sha256 differs)"
        )
    return state


def _load_strictly(module: nn.Module, state: Mapping[str, torch.Tensor], where: str, name: str) -> None:
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


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
