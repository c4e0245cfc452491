"""Models on disk: the trained network of a downstream task, its card and the digests of both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d import memory, plugins
from ssl3d.checkpoint.card import (
    check_digest,
    check_format,
    plugin_record,
    signed,
    versions,
    without_places,
)
from ssl3d.checkpoint.weights import load_strictly, not_finite, safetensors_of
from ssl3d.config import from_dict
from ssl3d.errors import CheckpointError, PluginError, TrainingError, UsageError, not_written
from ssl3d.files import check_regular, whole_folder, write_whole
from ssl3d.json_files import parse_json
from ssl3d.model import Model

CARD = "model.json"
WEIGHTS = "model.safetensors"
FORMAT = 1
"""Format of `model.json`; a reader refuses anything newer."""
KINDS = ("segmentation", "classification", "detection")

_NEEDED: Mapping[str, type] = {
    "benchmark": str, "task": dict, "architecture": dict, "channels": list, "spacing": dict,
    "orientations": list, "preprocessing": list, "sha256": str, "digest": str,
}  # fmt: skip


def save_model(network: nn.Module, folder: str | Path, card: Mapping[str, Any]) -> Path:
    """Save a trained network in a folder: tensors in `model.safetensors`, all else in `model.json`.

    Both files appear at once, or none; a model that is there already is replaced.

    Args:
        network: Network with its weights.
        folder: Folder to write, made where missing.
        card: Plain values of `model.json`; what `load_model` needs must be among them.

    Returns:
        The folder.

    Raises:
        TrainingError: A weight is not finite.
        TransientError: The disk is full.
        UsageError: The folder cannot be written.
    """
    folder = Path(folder)
    wrong = not_finite(network.state_dict())
    if wrong:
        raise TrainingError(f"the model is not kept in {folder}: {wrong}")
    weights = safetensors_of(network)
    text = _signed({**card, "sha256": hashlib.sha256(weights).hexdigest(), "versions": versions()})
    try:
        with whole_folder(folder) as place:
            write_whole(place / WEIGHTS, weights, sync=True)
            write_whole(place / CARD, text, sync=True)
    except OSError as error:
        raise not_written(
            error, f"the model cannot be written to {folder}: {error.strerror or error}"
        ) from error
    return folder


def amend_model(folder: str | Path, changes: Mapping[str, Any]) -> None:
    """Change entries of the card of a model, whose weights stay.

    Raises:
        CheckpointError: There is no model, or it is damaged.
        TransientError: The disk is full.
        UsageError: The folder cannot be written.
    """
    path = Path(folder) / CARD
    card = {**read_model_card(folder), **changes}
    try:
        write_whole(path, _signed(card), sync=True)
    except OSError as error:
        raise not_written(error, f"{path} cannot be written: {error.strerror or error}") from error


def card_for_others(card: Mapping[str, Any]) -> str:
    """Write the card of a model for other machines: without the places of files on this one."""
    return _signed(without_places({key: value for key, value in card.items() if key != "format"}))


def read_model_card(folder: str | Path) -> dict[str, Any]:
    """Read and check the `model.json` of a folder, or of either file in it.

    Raises:
        CheckpointError: The file is missing, damaged, no card of a model, or of a newer format.
    """
    path = _folder_of(Path(folder)) / CARD
    try:
        check_regular(path)
        card = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}: no model that ssl3d finetune kept") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: truncated or not JSON ({error})") from error
    if not isinstance(card, dict) or "format" not in card:
        raise CheckpointError(f"{path}: is no card of a model that ssl3d finetune kept")
    check_format(card["format"], str(path), FORMAT)
    for key, kind in _NEEDED.items():
        if not isinstance(card.get(key), kind):
            raise CheckpointError(f"{path}: damaged: {key!r} is missing or no {kind.__name__}")
    check_digest(card, str(path))
    return card


def model_folders(path: str | Path) -> list[Path]:
    """List the folders of models behind a path: one model, the folds of one, or the models of a run.

    Args:
        path: Folder of a model; folder with one model for each fold; or folder of `ssl3d finetune`, if one
            model, or the folds of one, is kept in it.

    Raises:
        CheckpointError: There is no model, or there are those of several contestants.
    """
    place = Path(path)
    if (place / CARD).is_file() or place.name in (CARD, WEIGHTS):
        return [_folder_of(place)]
    folds = _models_in(place)
    if folds and all(fold.name.startswith("fold-") for fold in folds):
        return folds
    kept = place / "models" if (place / "models").is_dir() else place
    groups = [own for child in _children(kept) if (own := _own_models(child))]
    if len(groups) == 1:
        return groups[0]
    if groups:
        names = ", ".join(child.name for child in _children(kept) if _own_models(child))
        raise CheckpointError(f"{place}: holds {len(groups)} models ({names}); name one of them")
    if not place.exists():
        raise CheckpointError(f"{place}: no such file or folder")
    raise CheckpointError(
        f"{place}: holds no model ({CARD}); ssl3d finetune keeps them in the folder models of its --out"
    )


def load_model(folder: str | Path) -> Model:
    """Load a model that `ssl3d finetune` kept, in evaluation mode, on the CPU.

    Nothing is unpickled. The digests of both files, the names, shapes and types of all weights, and that
    they are finite, are checked.

    Args:
        folder: Folder of the model, or a folder in which it is the only one.

    Returns:
        Torch module with `predict(volume)`; its `card` holds `model.json`.

    Raises:
        CheckpointError: There is no model, there are several, or it is damaged or of a newer format.
    """
    places = model_folders(folder)
    if len(places) > 1:
        raise CheckpointError(
            f"{folder}: {len(places)} models, one for each fold; load each, or give all to ssl3d predict"
        )
    place = places[0]
    card = read_model_card(place)
    state = _read_weights(place / WEIGHTS, str(card["sha256"]))
    model = _built(card, place)
    load_strictly(model.network, state, str(place / WEIGHTS), "the model")
    for key, own in model.network.state_dict().items():
        if key in state and own.dtype != state[key].dtype:
            raise CheckpointError(
                f"{place / WEIGHTS}: {key} is {state[key].dtype}, the model expects {own.dtype}"
            )
    return model.eval()


def check_model(folder: str | Path) -> dict[str, Any]:
    """Check both files of a model against their digests, without building it, and return the card.

    Raises:
        CheckpointError: A file is missing, cut short or another one than was written.
    """
    card = read_model_card(folder)
    _read_weights(_folder_of(Path(folder)) / WEIGHTS, str(card["sha256"]))
    return card


# ------------------------------------------------------------------------------------------------


def _built(card: Mapping[str, Any], place: Path) -> Model:
    """Build the encoder and, by the benchmark that trained it, the network around it."""
    where = f"{place / CARD}"
    about = card["architecture"]
    name = str(about.get("name"))
    try:
        kind = plugins.load_recorded(plugins.ENCODERS, name, plugin_record(about, name))
        benchmark = plugins.load(plugins.BENCHMARKS, card["benchmark"])
    except PluginError as error:
        raise CheckpointError(f"{where}: {error}") from error
    try:
        config = from_dict(kind.Config, about.get("config") or {}, f"{where}, architecture {name}")
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    try:
        with torch.random.fork_rng(devices=[]):
            model: Model = benchmark.restore(kind(config), dict(card))
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{where}: no model can be built of it ({reason})") from error
    return model


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read weights, by their digest first: a header that lies about its tensors is never parsed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        check_regular(path)
        memory.check(2 * path.stat().st_size, f"{path}: ")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(
            f"{path}: its {len(content):,} bytes are not those that {CARD} was written for (sha256 differs)"
        )
    try:
        state = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not safetensors ({' '.join(str(error).split())})") from error
    wrong = not_finite(state)
    if wrong:
        raise CheckpointError(f"{path}: {wrong}")
    return state


def _signed(card: Mapping[str, Any]) -> str:
    return signed({"format": FORMAT, **card}, allow_nan=False)


def _folder_of(place: Path) -> Path:
    return place.parent if place.name in (CARD, WEIGHTS) else place


def _children(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _models_in(folder: Path) -> list[Path]:
    return [child for child in _children(folder) if (child / CARD).is_file()]


def _own_models(folder: Path) -> list[Path]:
    """List a contestant's models: the folder itself, or one for each fold in it."""
    return [folder] if (folder / CARD).is_file() else _models_in(folder)
