"""Encoders and run checkpoints on disk: safe to read, self-describing, written atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssl3d import plugins
from ssl3d.config import from_dict, to_dict
from ssl3d.encoder import Encoder
from ssl3d.errors import CheckpointError, PluginError, TrainingError, UsageError
from ssl3d.leaks import HASHES, hashes_apart, hashes_together
from ssl3d.snapshot import FORMAT, check_format, load_checkpoint, sync_folder

if TYPE_CHECKING:
    from ssl3d.data.store import Collection
    from ssl3d.proxy import Proxy

WEIGHTS = "encoder.safetensors"
CARD = "encoder.json"
TRAVELLERS = {"slice_aggregator": "ssl3d.aggregator:SliceAggregator"}
"""Classes that may travel beside an encoder, as `encoder.json` calls them; no other is ever imported.

Each has a dataclass `Config` and is made by `from_config(config)` where it has that, else of its config
alone; an instance keeps it as `config`.
"""


# Encoders -----------------------------------------------------------------------------------------


def save_encoder(
    encoder: Encoder,
    folder: str | Path,
    metadata: Mapping[str, Any] | None = None,
    travellers: Mapping[str, nn.Module] | None = None,
) -> Path:
    """Writes `encoder.safetensors` (tensors only) and `encoder.json` (everything else) into a folder.

    All files appear at once, or none. An encoder that is there already is replaced.

    Args:
        encoder: Of a class registered under `ssl3d.encoders`, else it cannot be loaded by name.
        folder: Made where missing.
        metadata: Plain values for `encoder.json`: `patch` (D, H, W), `spacing`, `preprocessing`,
            `proxies`, `steps`, `data`, `identities`, `labels_seen`, `citations`, ...
        travellers: Modules of the classes in `TRAVELLERS`, by name, each written to NAME.safetensors.

    Raises:
        PluginError: A traveller cannot be made again from what would be written.
        TrainingError: The disk is full or the folder cannot be written.
    """
    folder = Path(folder)
    weights = _tensors_of(encoder)
    others = {name: _tensors_of(module) for name, module in (travellers or {}).items()}
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
    text = json.dumps(card, indent=1, default=_plain) + "\n"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary / WEIGHTS, weights)
        for name, content in others.items():
            _write(temporary / f"{name}.safetensors", content)
        if apart is not None:
            _write(temporary / HASHES, apart)
        _write(temporary / CARD, text.encode())
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(
            f"the encoder cannot be written to {folder}: {error.strerror or error}"
        ) from error
    return folder


def load_encoder(path: str | Path, changes: Mapping[str, Any] | None = None) -> Encoder:
    """Loads an encoder from a run folder, or from its `encoder/`, in evaluation mode, on the CPU.

    Needs the encoder's plugin, but no proxy. What `encoder.json` says is its attribute `metadata`.

    Args:
        path: Of the folder.
        changes: Options of the encoder to take in place of those it was trained with, such as strides:
            any that leave the names and shapes of all its weights as they are.

    Raises:
        CheckpointError: There is no encoder, or it is truncated, of a newer format or something else.
        UsageError: A change is no option of this encoder, or would need other weights.
    """
    folder = _encoder_folder(Path(path))
    card = read_card(folder)
    name = str(card["architecture"])
    try:
        kind = plugins.load_recorded(plugins.ENCODERS, name, _plugin_record(card, name))
    except PluginError as error:
        raise CheckpointError(f"{folder / CARD}: {error}") from error
    try:
        config = from_dict(kind.Config, card["config"], f"{folder / CARD}, architecture {name}")
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    if changes:
        config = from_dict(kind.Config, {**to_dict(config), **changes}, f"{folder} as {name}")
    with torch.random.fork_rng(devices=[]):
        encoder: Encoder = kind(config)
    state = _read_weights(folder / WEIGHTS, card)
    try:
        _load_strictly(encoder, state, str(folder / WEIGHTS), name)
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


def _plugin_record(about: Mapping[str, Any], name: str) -> Any:
    """What a card says of where a plugin came from that was not installed, None for one that was."""
    records = about.get("plugins")
    return records.get(name) if isinstance(records, Mapping) else None


def _after_colon(error: Exception) -> str:
    return str(error).partition(": ")[2] or str(error)


def _shown(value: Any) -> str:
    return json.dumps(value, default=_plain).replace(" ", "").strip('"')


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


def traveller_class(name: str, module: nn.Module) -> str:
    """What `encoder.json` calls the class of a module that is to travel.

    Raises:
        PluginError: The name is no file's, the class is not listed, or the module has no `config`.
    """
    if not name.isidentifier() or name == "encoder":
        raise PluginError(f"travels(): {name!r} cannot be the name of a file beside the encoder")
    path = f"{type(module).__module__}:{type(module).__qualname__}"
    found = [key for key, place in TRAVELLERS.items() if place == path]
    if not found:
        raise PluginError(
            f"travels(): {name} is a {path}, which is not listed in ssl3d.checkpoint.TRAVELLERS "
            f"({', '.join(TRAVELLERS.values())})"
        )
    if not dataclasses.is_dataclass(getattr(module, "config", None)):
        raise PluginError(f"travels(): {name}, a {path}, keeps no dataclass `config` to be made again from")
    return found[0]


def load_traveller(path: str | Path, name: str) -> nn.Module:
    """A module that travelled beside an encoder, such as the aggregator of intra_inter.

    In evaluation mode, on the CPU; nothing is unpickled, and only a class in `TRAVELLERS` is made.

    Args:
        path: A run folder, or its `encoder/`.
        name: As the proxy's `travels` calls it.

    Raises:
        CheckpointError: None of that name travelled, or its file is damaged.
    """
    folder = _encoder_folder(Path(path))
    cards = travellers_of(read_card(folder))
    if name not in cards:
        there = f"it has {', '.join(cards)}" if cards else "it has none"
        raise CheckpointError(f"{folder}: no {name} travelled with this encoder ({there})")
    card, where = cards[name], f"{folder / CARD}, {name}"
    if card.get("class") not in TRAVELLERS:
        raise CheckpointError(
            f"{where}: class {card.get('class')!r} is not one of {', '.join(TRAVELLERS)}; update ssl3d"
        )
    state = _read_weights(folder / f"{name}.safetensors", card)
    module_name, _, class_name = TRAVELLERS[card["class"]].partition(":")
    kind = getattr(importlib.import_module(module_name), class_name)
    try:
        config = from_dict(kind.Config, card.get("config") or {}, where)
    except UsageError as error:
        raise CheckpointError(str(error)) from error
    with torch.random.fork_rng(devices=[]):
        module = make_traveller(kind, config)
    _load_strictly(module, state, str(folder / f"{name}.safetensors"), card["class"])
    return module.eval()


def make_traveller(kind: Any, config: Any) -> nn.Module:
    """A module of a class in `TRAVELLERS`, of its options alone."""
    made: nn.Module = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    return made


def travellers_of(card: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What `encoder.json` says of the modules beside the encoder, by name."""
    found = card.get("travellers")
    return {
        name: one
        for name, one in (found.items() if isinstance(found, Mapping) else ())
        # The name becomes a file's: one that leads elsewhere is none.
        if isinstance(name, str) and name.isidentifier() and isinstance(one, Mapping)
    }


def read_card(folder: str | Path) -> dict[str, Any]:
    """The checked content of a folder's `encoder.json`, of this format.

    Raises:
        CheckpointError: It is missing, not one, or of a newer format.
    """
    path = Path(folder) / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: truncated or not JSON ({error})") from error
    needed = {"format", "architecture", "config"}
    if not isinstance(card, dict) or not needed <= set(card):
        raise CheckpointError(f"{path}: not an encoder of ssl3d (it lacks {', '.join(sorted(needed))})")
    check_format(card["format"], str(path))
    return card


def _encoder_folder(path: Path) -> Path:
    if (path / CARD).is_file():
        return path
    if (path / "encoder" / CARD).is_file():
        return path / "encoder"
    if path.name in (CARD, WEIGHTS) and path.is_file():
        return path.parent
    if (path / "config.yaml").is_file():
        raise CheckpointError(f"{path}: this run is not finished; ssl3d pretrain --resume {path}")
    if path.exists():
        raise CheckpointError(f"{path}: not a run or an encoder (no {CARD} in it or in its encoder/)")
    raise CheckpointError(f"{path}: no such run or encoder (for an untrained one: scratch:resnet18)")


def check_weights(folder: str | Path, card: Mapping[str, Any]) -> None:
    """Raises a CheckpointError where weights beside a card are missing, cut short or others."""
    _read_weights(Path(folder) / WEIGHTS, card)
    for name, one in travellers_of(card).items():
        _read_weights(Path(folder) / f"{name}.safetensors", one)


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


# Runs ---------------------------------------------------------------------------------------------


def config_of(run: str | Path) -> dict[str, Any]:
    """The options of a run, from its `config.yaml`.

    Raises:
        CheckpointError: The folder is not a run.
    """
    import yaml

    path = Path(run) / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{run}: not a run (config.yaml: {error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not YAML") from error
    if not isinstance(content, dict) or "proxy" not in content:
        raise CheckpointError(f"{path}: not the options of a run (no `proxy`)")
    return content


def load_proxies(run: str | Path, data: Collection | None = None) -> dict[str, Proxy]:
    """The proxies of a run with their trained heads, on its encoder, in evaluation mode.

    Args:
        run: A run folder; its newest intact checkpoint is read.
        data: The data of the run, for a proxy that needs more of them here than what the checkpoint
            knows: their number, shapes, spacings, and which are whose.

    Raises:
        CheckpointError: The folder is no run, no checkpoint can be read, or a proxy needs its data.
    """
    run = Path(run)
    config = config_of(run)
    found = load_checkpoint(run)
    if found is None:
        raise CheckpointError(f"{run}: no checkpoint yet; ssl3d pretrain --resume {run}")
    state = found["module"]
    spec, about = found["spec"], found.get("about") or {}

    def load(group: str, name: str) -> Any:
        try:
            return plugins.load_recorded(group, name, _plugin_record(about, name))
        except PluginError as error:
            raise CheckpointError(f"{run}: {error}") from error

    kind = load(plugins.ENCODERS, spec["encoder"])
    with torch.random.fork_rng(devices=[]):
        encoder: Encoder = kind(from_dict(kind.Config, spec["encoder_config"], f"{run}, {spec['encoder']}"))
        proxies: dict[str, Proxy] = {}
        for name, options in spec["proxies"].items():
            made = load(plugins.PROXIES, name)
            proxy = made(from_dict(made.Config, options, f"{run}, {name}"), encoder)
            sized: Any = data
            if data is None and found.get("outline"):
                sized = Outline(found["outline"], f"load_proxies({str(run)!r}, data)", name)
            if sized is not None:
                proxy.setup(sized)
            prefix = f"proxies.{name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            where = f"{run}, proxy {name}" + ("" if sized is not None else " (without its data)")
            _load_strictly(proxy, own, where, name)
            proxies[name] = proxy.eval()
    card = run / "encoder" / CARD
    encoder.metadata = read_card(card.parent) if card.is_file() else {"config": config}
    return proxies


class Outline(Sequence[Any]):
    """What a checkpoint knows of the volumes of its run: enough for most proxies to size themselves.

    Attributes:
        found: What the proxy's own `outline` kept, by name.

    Args:
        columns: From `outline_of`, and the proxies' own.
        instead: What to call where more is needed.
        proxy: Which one is to be sized.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor], instead: str, proxy: str = "") -> None:
        own = f"{proxy}/"
        self.found = {key.removeprefix(own): v for key, v in columns.items() if key.startswith(own)}
        shown = {key: value.tolist() for key, value in columns.items() if "/" not in key}
        self.shapes = [tuple(shape) for shape in shown["shapes"]]
        self.spacings = [tuple(spacing) for spacing in shown["spacings"]]
        self.dataset_codes, self.subject_codes = columns["datasets"].numpy(), columns["subjects"].numpy()
        self.datasets = [str(code) for code in shown["datasets"]]
        self._indices, self._instead = shown["indices"], instead

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, position: Any) -> Any:
        """The outline of a volume."""
        return OutlinedVolume(
            int(self._indices[position]), self.shapes[position], self.spacings[position],
            self.datasets[position], str(int(self.subject_codes[position])), self._instead,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OutlinedVolume:
    """A volume without its voxels; data set and subject are numbers in words."""

    index: int
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    dataset: str
    subject: str
    instead: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CheckpointError(
            f"a proxy asks for `{name}` of a volume, which the checkpoint does not hold: give the data of "
            f"the run, {self.instead}"
        )


def outline_of(data: Collection) -> dict[str, torch.Tensor]:
    """What checkpoints keep of the volumes of a run, as tensors; nobody can be named by it."""
    import numpy as np

    return {
        "indices": torch.as_tensor(np.asarray(data.rows, dtype=np.int64)),
        "shapes": torch.as_tensor(np.asarray([tuple(shape) for shape in data.shapes], dtype=np.int64)),
        "spacings": torch.as_tensor(np.asarray(data.spacings, dtype=np.float64)),
        "datasets": torch.as_tensor(np.asarray(data.dataset_codes, dtype=np.int64)),
        "subjects": torch.as_tensor(np.asarray(data.subject_codes, dtype=np.int64)),
    }


# What both record ---------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import platform

    found = {"python": platform.python_version()}
    for name in ("ssl3d", "torch", "torchvision", "lightly", "pytorch-lightning", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
