"""Checkpoints to resume from: written whole, the last two kept, nothing unpickled but tensors."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ssl3d.checkpoint.card import check_format
from ssl3d.checkpoint.weights import not_finite
from ssl3d.errors import CheckpointError, not_written
from ssl3d.files import check_regular, sync_folder
from ssl3d.yaml_files import read_yaml


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Save one checkpoint, whole or not at all, and remove all but the newest `keep`.

    The name holds a digest of the bytes, so that a file cut short on disk is noticed.

    Args:
        run: Folder of the run.
        step: Optimizer steps done.
        write: Function that writes the state to a path.
        keep: Number of checkpoints that stay.

    Returns:
        The file of the checkpoint.

    Raises:
        TransientError: The disk is full; older checkpoints are intact.
    """
    folder = run / "checkpoints"
    temporary = folder / f".step-{step:08d}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.tmp"):  # of a run that was killed while it wrote
            left.unlink()
        write(temporary)
        digest = _digest(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        path = folder / f"step-{step:08d}-{digest}.pt"
        temporary.replace(path)
        sync_folder(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise not_written(
            error,
            f"the checkpoint of step {step} cannot be written to {folder} ({reason}); older ones are "
            f"intact: make room, then ssl3d pretrain --resume {run}",
        ) from error
    for stale in checkpoints(run):
        if stale != path and (step_of(stale) >= step or stale not in checkpoints(run)[:keep]):
            stale.unlink()
    return path


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values to a file that `torch.load` reads.

    Raises:
        OSError: The disk is full or cannot be written, which torch itself hides behind a RuntimeError.
    """
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from error


def load_checkpoint(run: Path, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Load the newest checkpoint whose bytes are whole; None where the run has none.

    Args:
        run: Folder of the run.
        say: Function that is told of every checkpoint that is passed over.

    Raises:
        CheckpointError: There are checkpoints and none is whole, or one is of a newer format.
    """
    paths = checkpoints(run)
    for path in paths:
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            if "newer" in str(error):
                raise
            say(f"{error}; using the one before it")
    if paths:
        raise CheckpointError(
            f"{run}: none of its {len(paths)} checkpoints is whole; "
            f"delete {run / 'checkpoints'} to start at 0"
        )
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the state of one checkpoint, on the CPU; nothing but tensors and plain values is unpickled.

    Raises:
        CheckpointError: Its bytes are not those that were written, its format is newer, or a part is
            missing or of the wrong kind.
    """
    expected = path.stem.rpartition("-")[2]
    try:
        check_regular(path)
        whole = _digest(path) == expected
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if not whole:
        raise CheckpointError(f"{path}: is damaged or cut short ({path.stat().st_size} bytes)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError,
        pickle.UnpicklingError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path}: is no checkpoint of ssl3d ({type(error).__name__})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: is no checkpoint of ssl3d")
    check_format(state["format"], str(path))
    if fault := _fault_of(state):
        raise CheckpointError(f"{path}: is no checkpoint of ssl3d: {fault}")
    encoder = {key: value for key, value in state["module"].items() if key.startswith("encoder.")}
    if wrong := not_finite(encoder):
        raise CheckpointError(f"{path}: {wrong}; the training that wrote it had diverged")
    return state


_PARTS: Mapping[str, type] = {
    "step": int, "steps": int, "patch": list, "about": dict, "world": int, "device": str, "spec": dict,
    "precision": dict, "module": dict, "optimizer": dict, "ranks": list, "outline": dict,
    "options": dict,
}  # fmt: skip
_LATER = ("ranks", "outline", "options")  # the first checkpoints lack them


def _fault_of(state: Mapping[str, Any]) -> str:
    """Return which part of a checkpoint is missing or of the wrong kind; empty where none is."""
    for name, kind in _PARTS.items():
        value = state.get(name)
        if not isinstance(value, kind) and not (value is None and name in _LATER):
            return f"its {name} is {type(value).__name__}, not {kind.__name__}"
    if not 0 <= state["step"] <= state["steps"]:
        return f"it is of step {state['step']} of {state['steps']}"
    if len(state["patch"]) != 3 or not all(type(side) is int for side in state["patch"]):
        return "its patch is not three numbers"
    about, spec = state["about"], state["spec"]
    if not isinstance(about.get("data"), dict) or not isinstance(about["data"].get("digest"), str):
        return "it does not say on which data"
    for name in ("compute", "plugins"):
        if not isinstance(about.get(name, {}), dict):
            return f"its {name} is {type(about[name]).__name__}, not dict"
    if not all(isinstance(n, int | float) for k, n in about.get("compute", {}).items() if k != "where"):
        return "its compute is not of numbers"
    if not (
        isinstance(spec.get("encoder"), str)
        and isinstance(spec.get("encoder_config"), dict)
        and isinstance(spec.get("proxies"), dict)
        and all(isinstance(options, dict) for options in spec["proxies"].values())
    ):
        return "it does not say of which encoder and proxies"
    for tensors in (state["module"], state.get("outline") or {}, *(state.get("ranks") or ())):
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            return "its weights are not tensors by name"
    return ""


def checkpoints(run: str | Path) -> list[Path]:
    """List the checkpoints of a run, newest first."""
    paths = [
        p for p in (Path(run) / "checkpoints").glob("step-*.pt") if re.fullmatch(r"step-\d+-\w+", p.stem)
    ]
    return sorted(paths, key=lambda path: (step_of(path), path.stat().st_mtime), reverse=True)


def step_of(path: Path) -> int:
    """Read the step from a checkpoint's name."""
    return int(path.stem.split("-")[1])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def config_of(run: str | Path) -> dict[str, Any]:
    """Read the options of a run from its `config.yaml`.

    Raises:
        CheckpointError: The folder is not a run.
    """
    path = Path(run) / "config.yaml"
    try:
        content = read_yaml(path)
    except OSError as error:
        raise CheckpointError(f"{run}: is no run (config.yaml: {error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not YAML") from error
    if not isinstance(content, dict) or "proxy" not in content:
        raise CheckpointError(f"{path}: does not hold the options of a run (it has no `proxy`)")
    return content
