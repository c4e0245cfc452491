"""State of a training with one learning rate, and the file that it goes on from."""

from __future__ import annotations

import hashlib
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d.api import (
    UsageError,
    is_transient,
    not_written,
    restore_optimizer,
    tensor_bytes,
    whole_file,
    write_state,
)

FORMAT = 1


@dataclass
class Trial:
    """State of a training with one learning rate.

    Attributes:
        lr: Peak learning rate.
        total: Number of steps of the whole training.
        step: Number of steps done.
        curve: Step, score on the validation subjects (None where there are none) and mean training loss
            since the last entry, for each scoring.
        best: Step and score of the scoring whose weights are kept.
        weights: State of the model at that scoring, on the CPU.
        average: Exponential moving average of the model's state; empty without one.
        seconds: Seconds spent on steps, reading included.
        waited: Seconds spent on reading.
        scoring: Seconds spent on validation.
        flops: Floating-point operations of one step.
        losses: Training losses since the last scoring.
    """

    lr: float
    total: int
    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    scoring: float = 0.0
    flops: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def value(self) -> float:
        """Validation score of the weights kept; NaN without validation subjects."""
        score = self.best.get("score")
        return math.nan if score is None else float(score)


def save(path: Path, trial: Trial, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        TransientError: The disk is full, or failed.
        UsageError: The file cannot be written.
    """
    state = {
        "format": FORMAT,
        "trial": {key: getattr(trial, key) for key in Trial.__dataclass_fields__},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "threads": torch.get_num_threads(),
    }
    try:
        with whole_file(path, sync=True) as temporary:
            write_state(state, temporary)
    except OSError as error:
        raise not_written(error, f"cannot write {path}: {error.strerror}") from error


def resume(
    path: Path,
    trial: Trial,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    name: str,
    say: Callable[[str], None],
) -> None:
    """Restore a checkpoint, if there is one and its bytes are those that were written.

    Args:
        path: Path of the checkpoint.
        trial: Training to restore.
        model: Model to restore.
        optimizer: Optimizer to restore.
        name: Name of the job, for messages.
        say: Function that prints a message.

    Raises:
        OSError: The file cannot be read just now.
        UsageError: Its bytes are right, and it is no checkpoint of this training.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes the check sum of each member, and reads none
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return
    except (
        OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError,
        pickle.UnpicklingError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        if is_transient(error):
            raise
        say(f"{name}: {path} is damaged; the training starts at step 0")
        return
    try:
        _restore(state, path, trial, model, optimizer, name, say)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        # The model may be half restored: no training starts from that.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"{path}: is no checkpoint of {name} ({reason}); delete it to start at step 0"
        ) from error


def _restore(
    state: dict[str, Any],
    path: Path,
    trial: Trial,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    name: str,
    say: Callable[[str], None],
) -> None:
    if state.get("format") != FORMAT or state["trial"]["total"] != trial.total:
        say(f"{name}: {path} belongs to another training; this one starts at step 0")
        return
    if state["threads"] != torch.get_num_threads():
        say(
            f"{name}: the training began with {state['threads']} threads and goes on with "
            f"{torch.get_num_threads()}, so sums may differ in their last bits"
        )
    model.load_state_dict(state["model"])
    restore_optimizer(optimizer, state["optimizer"])
    _check_trial(state["trial"], trial, model)
    for key, value in state["trial"].items():
        setattr(trial, key, value)
    if trial.step < trial.total:
        say(f"{name}: the training goes on at step {trial.step} of {trial.total}")


def _check_trial(kept: dict[str, Any], trial: Trial, model: nn.Module) -> None:
    """Check that what a checkpoint keeps of a training is of the kinds that a training has.

    Raises:
        ValueError: A part is missing, unknown, or of the wrong kind.
    """
    if not {"step", "curve", "weights"} <= set(kept) <= set(Trial.__dataclass_fields__):
        raise ValueError(f"it keeps {', '.join(map(str, kept))}")
    for key, value in kept.items():
        own = getattr(trial, key)
        if type(value) is not type(own) and not {type(value), type(own)} <= {int, float}:
            raise ValueError(f"{key} is {type(value).__name__}, not {type(own).__name__}")
    if not 0 <= kept["step"] <= kept["total"] or type(kept["step"]) is not int:
        raise ValueError(f"it is of step {kept['step']} of {kept['total']}")
    if not all(isinstance(value, int | float) for value in kept.get("losses", ())):
        raise ValueError("a loss is no number")
    scored = [*kept["curve"], *([kept["best"]] if kept.get("best") else [])]
    if not all(isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in scored):
        raise ValueError("an entry of the curve has no step")
    if not all(isinstance(entry.get("score"), int | float | None) for entry in scored):
        raise ValueError("a score is no number")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for key in ("weights", "average"):
        state = kept.get(key)
        if state and {k: isinstance(v, Tensor) and v.shape for k, v in state.items()} != shapes:
            raise ValueError(f"its {key} are not those of the model")


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Hash the weights and buffers of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]
