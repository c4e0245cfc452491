"""The card of an encoder, `encoder.json`."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ssl3d.checkpoint.zoo import ZOO, fetched
from ssl3d.errors import CheckpointError
from ssl3d.files import check_regular
from ssl3d.json_files import parse_json, was_changed, with_digest

CARD = "encoder.json"
WEIGHTS = "encoder.safetensors"

FORMAT = 1
"""Format of `encoder.json` and of the checkpoints; a reader refuses anything newer."""


_KINDS: Mapping[str, tuple[type, ...]] = {
    "architecture": (str,), "config": (dict,), "preprocessing": (list,), "data": (dict,),
    "identities": (list,), "travellers": (dict,), "patch": (list,), "spacing": (list, dict),
    "proxies": (dict, list), "compute": (dict,), "citations": (dict,), "plugins": (dict,), "steps": (int,),
    "seed": (int,), "labels_seen": (bool,), "channels": (list,), "strides": (list,), "versions": (dict,),
    "sha256": (str,), "digest": (str,),
}  # fmt: skip
"""Types of what a card may hold, where it holds it; the first of several is the usual one."""

PACKAGES = (
    "ssl3d", "torch", "torchvision", "lightly", "pytorch-lightning", "numpy", "scipy", "scikit-learn"
)  # fmt: skip
"""Packages whose versions encoders and records keep."""

_PLACE = re.compile(r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?/(?:[^/\s:,;=]+/)*([^/\s:,;=]+)")


def without_places(value: Any) -> Any:
    """Return the values of a card with the names alone of what lies on this machine.

    Args:
        value: Value of JSON: text, number, list or dictionary.

    Example:
        >>> without_places({"data": ["/scans/a.h5"], "init": "x=/data/r1:width=4", "by": "https://a.b/c"})
        {'data': ['a.h5'], 'init': 'x=r1:width=4', 'by': 'https://a.b/c'}
    """
    if isinstance(value, str):
        if "\n" not in value and any(
            kind(value).is_absolute() for kind in (PurePosixPath, PureWindowsPath)
        ):
            value = PureWindowsPath(value).name
        return _PLACE.sub(r"\1", value)
    if isinstance(value, list | tuple):
        return [without_places(entry) for entry in value]
    if isinstance(value, Mapping):
        return {without_places(key): without_places(own) for key, own in value.items()}
    return value


def check_format(number: Any, where: str, newest: int = FORMAT) -> None:
    """Refuse what is of a newer format than `newest`, or of none.

    Raises:
        CheckpointError: The format is unknown; the message begins with `where`.
    """
    if not isinstance(number, int):
        raise CheckpointError(f"{where}: is no file of ssl3d (format {number!r})")
    if number > newest:
        raise CheckpointError(
            f"{where}: written by a newer ssl3d "
            f"(format {number}, this one reads up to {newest}); update ssl3d"
        )


def read_card(folder: str | Path) -> dict[str, Any]:
    """Read and check the `encoder.json` of a folder.

    Raises:
        CheckpointError: The file is missing, no card of an encoder, or of a newer format.
    """
    path = Path(folder) / CARD
    try:
        check_regular(path)
        card = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: truncated or not JSON ({error})") from error
    needed = {"format", "architecture", "config"}
    if not isinstance(card, dict) or not needed <= set(card):
        raise CheckpointError(f"{path}: is no encoder of ssl3d, which has {', '.join(sorted(needed))}")
    check_format(card["format"], str(path))
    for key, kinds in _KINDS.items():
        if card.get(key) is not None and not isinstance(card[key], kinds):
            raise CheckpointError(
                f"{path}: damaged: {key} is {type(card[key]).__name__}, not {kinds[0].__name__}"
            )
    for key in ("config", "architecture"):
        if card[key] is None:
            raise CheckpointError(f"{path}: damaged: {key} is empty")
    if not all(isinstance(settings, dict) for settings in card.get("preprocessing") or ()):
        raise CheckpointError(f"{path}: damaged: preprocessing is not a list of dict")
    patch = card.get("patch")
    if patch is not None and not (len(patch) == 3 and all(type(n) is int and n >= 0 for n in patch)):
        raise CheckpointError(f"{path}: damaged: patch is {patch!r:.60}, not three sizes")
    check_digest(card, str(path))
    return card


def signed(card: Mapping[str, Any], allow_nan: bool = True) -> str:
    """Write a card as JSON, with the digest of all that it says."""
    content = json.loads(json.dumps({**card, "digest": ""}, default=plain_value, allow_nan=allow_nan))
    return json.dumps(with_digest(content), indent=1) + "\n"


def check_digest(card: Mapping[str, Any], where: str) -> None:
    """Compare a card with its digest, which earlier versions did not write into that of an encoder.

    Raises:
        CheckpointError: It says something else than was written; the message begins with `where`.
    """
    if was_changed(card):
        raise CheckpointError(
            f"{where}: was changed after it was written (its digest differs); take an intact copy"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    import platform

    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def plain_value(value: Any) -> Any:
    """Convert what JSON does not know: arrays to lists, anything else to its text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def plugin_record(about: Mapping[str, Any], name: str) -> Any:
    """Return what a card says of the origin of a plugin; None for one that was installed."""
    records = about.get("plugins")
    return records.get(name) if isinstance(records, Mapping) else None


def encoder_folder(path: Path) -> Path:
    """Find the folder of an encoder in a run, in the folder itself, or beside one of its two files.

    `zoo:NAME` is fetched, unless it was before.

    Raises:
        CheckpointError: There is none; the message says what there is.
    """
    if str(path).startswith(ZOO):
        return fetched(str(path))
    if (path / CARD).is_file():
        return path
    if (path / "encoder" / CARD).is_file():
        return path / "encoder"
    if path.name in (CARD, WEIGHTS) and path.is_file():
        return path.parent
    if (path / "config.yaml").is_file():
        raise CheckpointError(f"{path}: this run is not finished; ssl3d pretrain --resume {path}")
    if path.exists():
        raise CheckpointError(
            f"{path}: is neither a run nor an encoder (no {CARD} in it or in its encoder/)"
        )
    raise CheckpointError(f"{path}: no such run or encoder (for an untrained one: scratch:resnet18)")
