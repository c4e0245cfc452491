"""Encoders on disk: a folder of tensors and a card, written whole and loaded strictly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl3d import plugins
from ssl3d.checkpoint.card import (
    CARD,
    FORMAT,
    WEIGHTS,
    encoder_folder,
    plain_value,
    plugin_record,
    read_card,
    signed,
    versions,
)
from ssl3d.checkpoint.travellers import traveller_class, travellers_of
from ssl3d.checkpoint.volumes_seen import HASHES, hashes_apart, hashes_together
from ssl3d.checkpoint.weights import load_strictly, read_weights, safetensors_of
from ssl3d.config import from_dict, to_dict
from ssl3d.encoder import Encoder
from ssl3d.errors import CheckpointError, PluginError, UsageError, not_written
from ssl3d.files import whole_folder, write_whole


def save_encoder(
    encoder: Encoder,
    folder: str | Path,
    metadata: Mapping[str, Any] | None = None,
    travellers: Mapping[str, nn.Module] | None = None,
) -> Path:
    """Save an encoder in a folder: tensors in `encoder.safetensors`, all else in `encoder.json`.

    All files appear at once, or none. An encoder that is there already is replaced.

    Args:
        encoder: Encoder of a class registered under `ssl3d.encoders`, else no name loads it again.
        folder: Folder to write, made where missing.
        metadata: Plain values for `encoder.json`: `patch` (D, H, W), `spacing`, `preprocessing`,
            `proxies`, `steps`, `data`, `identities`, `labels_seen`, `citations`, ...
        travellers: Modules of the classes in `TRAVELLERS`, by name, each written to NAME.safetensors.

    Returns:
        The folder.

    Raises:
        PluginError: A traveller cannot be made again from what would be written.
        TransientError: The disk is full.
        UsageError: The folder cannot be written.
    """
    folder = Path(folder)
    weights = safetensors_of(encoder)
    others = {name: safetensors_of(module) for name, module in (travellers or {}).items()}
    cards = {
        name: {
            "class": traveller_class(name, module),
            "config": to_dict(module.config),
            "sha256": hashlib.sha256(others[name]).hexdigest(),
        }
        for name, module in (travellers or {}).items()
    }
    card = {
        "format": FORMAT,
        "architecture": plugins.name_of(plugins.ENCODERS, type(encoder)),
        "config": to_dict(encoder.config),
        "channels": list(encoder.channels),
        "strides": [list(stride) for stride in encoder.strides],
        "embed_dim": encoder.embed_dim,
        "sha256": hashlib.sha256(weights).hexdigest(),
        **({"travellers": cards} if cards else {}),
        **dict(metadata or {}),
        "versions": versions(),
    }
    apart = hashes_apart(card)
    text = signed(card)
    try:
        with whole_folder(folder) as place:
            write_whole(place / WEIGHTS, weights, sync=True)
            for name, content in others.items():
                write_whole(place / f"{name}.safetensors", content, sync=True)
            if apart is not None:
                write_whole(place / HASHES, apart, sync=True)
            write_whole(place / CARD, text, sync=True)
    except OSError as error:
        raise not_written(
            error, f"the encoder cannot be written to {folder}: {error.strerror or error}"
        ) from error
    return folder


def load_encoder(path: str | Path, changes: Mapping[str, Any] | None = None) -> Encoder:
    """Load an encoder from a run folder, or from its `encoder/`, in evaluation mode, on the CPU.

    This needs the encoder's plugin, but no proxy. Its attribute `metadata` holds `encoder.json`.

    Args:
        path: Folder of the run or of the encoder.
        changes: Options of the encoder in place of those it was trained with, such as strides: any that
            leave the names and shapes of all its weights as they are.

    Raises:
        CheckpointError: There is no encoder, or it is truncated, of a newer format or something else.
        UsageError: A change is no option of this encoder, or would need other weights.

    Example:
        >>> import tempfile
        >>> from ssl3d import encoder_from
        >>> folder = save_encoder(encoder_from("scratch:resnet10:width=4"), tempfile.mkdtemp() + "/small")
        >>> load_encoder(folder).embed_dim
        32
    """
    folder = encoder_folder(Path(path))
    card = read_card(folder)
    name = str(card["architecture"])
    try:
        kind = plugins.load_recorded(plugins.ENCODERS, name, plugin_record(card, name))
    except PluginError as error:
        raise CheckpointError(f"{folder / CARD}: {error}") from error
    try:
        where = f"{folder / CARD}, architecture {name}"
        config = from_dict(kind.Config, card["config"], where, recorded=True)
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    if changes:
        config = from_dict(kind.Config, {**to_dict(config), **changes}, f"{folder} as {name}")
    state = read_weights(folder / WEIGHTS, card)
    try:
        with torch.random.fork_rng(devices=[]):
            encoder: Encoder = kind(config)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # a class of any origin, from options that a damaged card may name
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise (UsageError if changes else CheckpointError)(
            f"{where}: no encoder can be built of its config ({reason})"
        ) from error
    try:
        load_strictly(encoder, state, str(folder / WEIGHTS), name)
    except CheckpointError as error:
        if not changes:
            raise
        given = ", ".join(f"{key}={_shown(value)}" for key, value in changes.items())
        raise UsageError(
            f"{folder} with {given}: needs other weights than it has ({_after_colon(error)}); only options "
            "that leave all weights as they are, such as strides, can be changed"
        ) from error
    encoder.metadata = hashes_together(card, folder)
    if changes:
        encoder.metadata = {
            **encoder.metadata, "config": to_dict(config), "channels": list(encoder.channels),
            "strides": [list(stride) for stride in encoder.strides], "changed": sorted(changes),
        }  # fmt: skip
    return encoder.eval()


def _after_colon(error: Exception) -> str:
    return str(error).partition(": ")[2] or str(error)


def _shown(value: Any) -> str:
    return json.dumps(value, default=plain_value).replace(" ", "").strip('"')


def check_weights(folder: str | Path, card: Mapping[str, Any]) -> None:
    """Check the weights beside a card.

    Raises:
        CheckpointError: A file of weights is missing, cut short or another one than the card says.
    """
    read_weights(Path(folder) / WEIGHTS, card)
    for name, record in travellers_of(card).items():
        read_weights(Path(folder) / f"{name}.safetensors", record)
