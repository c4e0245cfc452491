"""Modules that travel beside an encoder, such as the slice aggregator."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl3d.checkpoint.card import CARD, encoder_folder, read_card
from ssl3d.checkpoint.weights import load_strictly, read_weights
from ssl3d.config import from_dict
from ssl3d.errors import CheckpointError, PluginError, UsageError

TRAVELLERS = {
    "slice_aggregator": "ssl3d.heads.aggregator:SliceAggregator",
    "unet": "ssl3d.segmentation.heads:UNetHead",
}
"""Classes that may travel beside an encoder, by their names in `encoder.json`; no other is imported.

Each has a dataclass `Config` and is made by `from_config(config)` where it has that, else of its config
alone; an instance keeps it as `config`.
"""


def traveller_class(name: str, module: nn.Module) -> str:
    """Return the name that `encoder.json` gives the class of a module that is to travel.

    Raises:
        PluginError: The name is no file's, the class is not listed, or the module has no `config`.
    """
    if not name.isidentifier() or name == "encoder":
        raise PluginError(f"travels(): {name!r} cannot be the name of a file beside the encoder")
    path = f"{type(module).__module__}:{type(module).__qualname__}"
    keys = [key for key, place in TRAVELLERS.items() if place == path]
    if not keys:
        raise PluginError(
            f"travels(): {name} is a {path}, which is not listed in ssl3d.checkpoint.travellers.TRAVELLERS "
            f"({', '.join(TRAVELLERS.values())})"
        )
    if not dataclasses.is_dataclass(getattr(module, "config", None)):
        raise PluginError(f"travels(): {name}, a {path}, keeps no dataclass `config` to be made again from")
    return keys[0]


def load_traveller(path: str | Path, name: str) -> nn.Module:
    """Load a module that travelled beside an encoder, such as the aggregator of intra_inter.

    It is in evaluation mode, on the CPU; nothing is unpickled, and only a class in `TRAVELLERS` is made.

    Args:
        path: Folder of a run, or its `encoder/`.
        name: Name of the module in the proxy's `travels`.

    Raises:
        CheckpointError: No module of that name travelled, or its file is damaged.
    """
    folder = encoder_folder(Path(path))
    cards = travellers_of(read_card(folder))
    if name not in cards:
        there = f"it has {', '.join(cards)}" if cards else "it has none"
        raise CheckpointError(f"{folder}: no {name} travelled with this encoder ({there})")
    card, where = cards[name], f"{folder / CARD}, {name}"
    if card.get("class") not in TRAVELLERS:
        raise CheckpointError(
            f"{where}: class {card.get('class')!r} is not one of {', '.join(TRAVELLERS)}; update ssl3d"
        )
    state = read_weights(folder / f"{name}.safetensors", card)
    module_name, _, class_name = TRAVELLERS[card["class"]].partition(":")
    kind = getattr(importlib.import_module(module_name), class_name)
    try:
        config = from_dict(kind.Config, card.get("config") or {}, where, recorded=True)
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    with torch.random.fork_rng(devices=[]):
        module = make_traveller(kind, config)
    load_strictly(module, state, str(folder / f"{name}.safetensors"), card["class"])
    return module.eval()


def make_traveller(kind: Any, config: Any) -> nn.Module:
    """Make a module of a class in `TRAVELLERS` from its options alone."""
    module: nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    return module


def travellers_of(card: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the records of the modules beside the encoder in `encoder.json`, by name."""
    records = card.get("travellers")
    return {
        name: record
        for name, record in (records.items() if isinstance(records, Mapping) else ())
        # The name becomes a file's: one that leads elsewhere is none.
        if isinstance(name, str) and name.isidentifier() and isinstance(record, Mapping)
    }
