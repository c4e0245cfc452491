"""The card of an encoder, `encoder.json`."""

from __future__ import annotations

import contextlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ssl3d.checkpoint.snapshot import check_format
from ssl3d.errors import CheckpointError

CARD = "encoder.json"


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


WEIGHTS = "encoder.safetensors"
