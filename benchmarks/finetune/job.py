"""A job of fine-tuning: one contestant on one subset of the training data with one seed, to its record."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ssl3d.api import (
    Benchmark,
    Result,
    UsageError,
    autocast,
    find_result,
    peak_memory,
    write_result,
    write_whole,
)
from ssl3d_benchmarks import locks
from ssl3d_benchmarks.contestants import Entry, described, pool_details, record, trivial_contestant
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.protocol import FinetuneTask
from ssl3d_benchmarks.finetune.train import (
    Diverged,
    TrainingPlan,
    Trial,
    predict,
    train,
    weights_digest,
)
from ssl3d_benchmarks.task import Fold, Job, Task, say

if TYPE_CHECKING:
    from ssl3d.api import Collection, Encoder

APART = (
    "encoder", "data", "task", "out", "preset", "fractions", "repeats", "seeds", "folds", "lr",
    "lr_scratch", "tune", "tune_scratch", "no_scratch", "no_trivial", "save_predictions",
    "checkpoint_seconds", "device", "threads", "workers", "overwrite", "sparse_slices",
)  # fmt: skip
"""Options that a record's settings do not hold: they change no score, or stand elsewhere in the record."""


@dataclass(frozen=True)
class Arm:
    """A row of the table: one encoder and its learning rates.

    Attributes:
        entries: Per seed, who is trained: the same encoder, or one from scratch for each seed.
        rates: Learning rates to try.
    """

    entries: dict[int, Entry]
    rates: tuple[float, ...]

    @property
    def first(self) -> Entry:
        """Of any seed."""
        return next(iter(self.entries.values()))


def job_name(entry: Entry, job: Job, seed: int) -> str:
    """For people: contestant, fraction and repeat, seed."""
    part = "" if job.fraction == 1 else f", {job.fraction:g} of the subjects, subset {job.repeat}"
    return f"{entry.name}{part}, seed {seed}"


def settings_of(
    learned: FinetuneTask, options: FinetuneOptions, job: Job, rates: Sequence[float]
) -> dict[str, Any]:
    """What a record keeps of the options: all that changes its scores.

    `training` is the same for all rows of a run; `rates` is the row's own.
    """
    training = {
        one.name: getattr(options, one.name) for one in dataclasses.fields(options) if one.name not in APART
    }
    plain: dict[str, Any] = json.loads(json.dumps(learned.settings(), default=str))
    return {
        "task": plain,
        "training": json.loads(json.dumps(training)),
        "preset": options.preset,
        "rates": list(rates),
        "fractions": "all" if job.fraction == 1 else f"{job.fraction:g} of the training subjects, nested",
    }


class Held(Exception):
    """Another process is at this job."""


@dataclass(frozen=True)
class Work:
    """One arm on one subset with one seed: a job of fine-tuning."""

    arm: Arm
    benchmark: Benchmark
    learned: FinetuneTask
    task: Task
    job: Job
    seed: int
    options: FinetuneOptions
    device: torch.device

    @property
    def entry(self) -> Entry:
        """Who is trained."""
        return self.arm.entries[self.seed]

    @property
    def name(self) -> str:
        """For people."""
        return job_name(self.entry, self.job, self.seed)


def run_job(work: Work) -> Result:
    """The record of a job, found or made.

    Raises:
        Held: Another process is making it.
        UsageError: The folder cannot be written to.
    """
    options = work.options
    assert work.entry.make is not None
    encoder = work.entry.make()
    contestant = described(work.entry, encoder, pool_details(options.pool))
    settings = settings_of(work.learned, options, work.job, work.arm.rates)
    version = work.benchmark.task_version
    result = record(contestant, work.benchmark, version, work.task, work.job, work.seed, settings)
    unsaved = "" if not options.save_predictions else "; its predictions are saved with --overwrite only"

    def look() -> Result | None:
        found = None if options.overwrite else find_result(result, options.out)
        if found is not None:
            say(f"{work.name}: record found in {options.out}{unsaved}")
        return found

    found = look()
    if found is not None:
        return found
    lock = options.out / ".jobs" / f"{result.key}.lock"
    _take(lock)
    with locks.holding(lock):
        found = look()  # made by another, just before the lock was taken
        return found or _make(work, encoder, result)


def _take(lock: Path) -> None:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        if not locks.take(lock):
            raise Held
    except OSError as error:
        raise UsageError(f"cannot write {lock}: {error.strerror}") from error


def _make(work: Work, encoder: Encoder, result: Result) -> Result:
    """Trains, scores and writes. Everything of a job that is not finished lies in `OUT/.jobs/KEY/`."""
    folder = work.options.out / ".jobs" / result.key
    began = time.perf_counter()
    parts: list[dict[str, Any]] = []
    for number, (fold, (fit, choose)) in enumerate(zip(work.task.folds, work.job.subsets, strict=True)):
        path = folder / f"fold-{number}.json"
        part = None if work.options.overwrite else _read_json(path)
        if part is None:
            plan = TrainingPlan(
                work.benchmark,
                work.learned,
                work.task.data.select(np.flatnonzero(fit)),
                work.task.data.select(np.flatnonzero(choose)),
                work.options,
                work.seed,
                work.device,
                work.name if len(work.task.folds) == 1 else f"{work.name}, fold {number}",
                folder / f"fold-{number}",
                say,
            )
            if work.options.overwrite:
                shutil.rmtree(plan.folder or folder, ignore_errors=True)
            part = score_fold(
                plan, lambda: copy.deepcopy(encoder), work.arm.rates, work.task.data, fold, result.key
            )
            _write_json(path, part)
            shutil.rmtree(folder / f"fold-{number}", ignore_errors=True)
        parts.append(part)
    merged = work.benchmark.summarise([row for part in parts for row in part["predictions"]])
    result.scores, result.intervals = merged.scores, merged.intervals
    result.predictions = merged.predictions
    told = [part["details"] for part in parts]
    result.compute["finetune"] = _compute([part["compute"] for part in parts])
    result.compute["details"] = told[0] if len(told) == 1 else told
    write_result(result, work.options.out)
    shutil.rmtree(folder, ignore_errors=True)
    chosen = ", ".join(f"{one['lr']:g}" for one in told)
    say(f"{work.name}: {work.benchmark.main} {result.scores[work.benchmark.main]:.3f}"
        f" (learning rate {chosen}; {time.perf_counter() - began:.0f} s)")  # fmt: skip
    return result


def score_fold(
    plan: TrainingPlan,
    make: Callable[[], Encoder],
    rates: Sequence[float],
    data: Collection,
    fold: Fold,
    key: str = "",
) -> dict[str, Any]:
    """Trains with every learning rate, takes the best on val, and only then predicts test."""
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    trials: list[Trial] = []
    kept: tuple[nn.Module, Trial] | None = None
    for lr in rates:
        try:
            model, trial = train(plan, make, lr)
        except Diverged as error:
            trials.append(error.trial)
            if kept is None and len(trials) == len(rates):
                raise
            plan.say(f"{error}: this learning rate is out")
            continue
        trials.append(trial)
        if kept is None or trial.value > kept[1].value or not np.isfinite(kept[1].value):
            kept = model, trial
    assert kept is not None
    model, best = kept
    test = data.select(np.flatnonzero(fold.test))
    began = time.perf_counter()
    predictions = predict(plan, model, test)
    seconds = time.perf_counter() - began
    if plan.options.save_predictions:
        _save_predictions(plan, model, test, key)
    if key and plan.seed == plan.options.seeds[0]:
        _save_picture(plan, model, test, key)
    steps = sum(trial.step for trial in trials)
    return {
        "predictions": predictions,
        "details": {
            "lr": best.lr,
            "steps": best.total,
            "batch_size": plan.batch_size,
            "best_step": best.best.get("step"),
            "validation": {plan.benchmark.main: best.best.get("score")},
            "curve": best.curve,
            "trials": [
                {"lr": one.lr, plan.benchmark.main: one.best.get("score"), "step": one.best.get("step")}
                | ({} if one.step == one.total else {"diverged": one.step + 1})
                for one in trials
            ],
            "weights": weights_digest(model.state_dict()),
        },
        "compute": {
            "steps": steps,
            "flops": sum(trial.flops * trial.step for trial in trials),
            "training_seconds": sum(trial.seconds for trial in trials),
            "reading_seconds": sum(trial.waited for trial in trials),
            "validation_seconds": sum(trial.scoring for trial in trials),
            "test_seconds": seconds,
            "peak_memory_bytes": peak_memory(plan.device),
            "device": torch.cuda.get_device_name() if plan.device.type == "cuda" else plan.device.type,
            "threads": torch.get_num_threads(),
        },
    }


def _compute(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over folds; of memory the largest."""
    found: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if name in ("device", "threads"):
            found[name] = value
        elif name == "peak_memory_bytes":
            found[name] = max(values)
        else:
            found[name] = round(sum(values), 3)
    found["seconds_per_step"] = round(found["training_seconds"] / max(found["steps"], 1), 5)
    return found


def _save_predictions(plan: TrainingPlan, model: nn.Module, test: Collection, key: str) -> None:
    folder = plan.options.out / "predictions" / f"{_slug(plan.name)}-{key[:8]}"
    shutil.rmtree(folder, ignore_errors=True)  # of the same job, by a run before
    folder.mkdir(parents=True)
    with torch.inference_mode(), autocast(plan.device, plan.options.precision):
        written = [plan.learned.save_prediction(model, volume, folder) for volume in test]
    if not any(written):
        folder.rmdir()
    else:
        say(f"{plan.name}: {sum(map(bool, written))} predictions in {folder}")


def _save_picture(plan: TrainingPlan, model: nn.Module, test: Collection, key: str) -> None:
    """Predictions beside the truth on some test volumes, where the task draws them."""
    with torch.inference_mode(), autocast(plan.device, plan.options.precision):
        figure = plan.learned.picture(model, test)
    if figure is not None:
        plan.options.out.mkdir(parents=True, exist_ok=True)
        path = plan.options.out / f"{_slug(plan.name)}-test-{key[:8]}.png"
        figure.savefig(path, dpi=110)
        say(f"picture: {path}")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")[:80]


def run_trivial(
    entry: Entry,
    benchmark: Benchmark,
    learned: FinetuneTask,
    task: Task,
    job: Job,
    seed: int,
    options: FinetuneOptions,
) -> Result:
    """The record of a row without a network, on the same subset and test subjects."""
    contestant = trivial_contestant(entry)
    # Nothing is trained, but on a subset; which one, the seed of the split says where it is not 0.
    training = {} if job.fraction == 1 or not options.split_seed else {"split_seed": options.split_seed}
    settings = {**settings_of(learned, options, job, ()), "training": training, "preset": ""}
    result = record(contestant, benchmark, benchmark.task_version, task, job, seed, settings)
    found = None if options.overwrite else find_result(result, options.out)
    if found is not None:
        return found
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for fold, (fit, choose) in zip(task.folds, job.subsets, strict=True):
        train, val, test = (task.data.select(np.flatnonzero(mask)) for mask in (fit, choose, fold.test))
        rows += learned.predict_trivial(entry.name, train, val, test, seed)
    merged = benchmark.summarise(rows)
    result.scores, result.intervals, result.predictions = merged.scores, merged.intervals, rows
    result.compute["finetune"] = {"training_seconds": round(time.perf_counter() - began, 3)}
    write_result(result, options.out)
    return result


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut short: made again
        return None
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        write_whole(path, json.dumps(content))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
