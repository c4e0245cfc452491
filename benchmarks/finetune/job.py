"""A job of fine-tuning: one contestant on one subset of the training data with one seed, to its record."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ssl3d.api import (
    Benchmark,
    Contestant,
    Loggers,
    Result,
    autocast,
    find_result,
    locks,
    not_written,
    parse_json,
    peak_memory,
    write_result,
    write_whole,
)
from ssl3d_benchmarks.contestants import Entry, described, pool_details, record, trivial_contestant
from ssl3d_benchmarks.finetune import kept
from ssl3d_benchmarks.finetune.checkpoint import Trial, weights_digest
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.protocol import FinetuneTask
from ssl3d_benchmarks.finetune.train import Diverged, TrainingPlan, predict, train
from ssl3d_benchmarks.finetune.validation import ValidationScores
from ssl3d_benchmarks.task import SplitData, TrainingSubset, say

if TYPE_CHECKING:
    from ssl3d.api import Collection, Encoder

APART = (
    "encoder", "data", "task", "out", "preset", "fractions", "repeats", "seeds", "folds", "part",
    "lr", "lr_scratch", "tune", "tune_scratch", "no_scratch", "no_trivial", "save_predictions",
    "keep_models", "checkpoint_seconds", "device", "threads", "workers", "overwrite", "sparse_slices",
    "metric", "logger", "validation_only", "compile",
)  # fmt: skip
"""Options that settings leave out: they change no score, or the record holds them elsewhere."""


@dataclass(frozen=True)
class Arm:
    """Row of the table: one contestant and its learning rates.

    Attributes:
        entries: Contestant of each seed: always the same encoder, or one from scratch for each seed.
        rates: Learning rates to try; none for a row without a network.
    """

    entries: dict[int, Entry]
    rates: tuple[float, ...]

    @property
    def first(self) -> Entry:
        """Contestant of the first seed."""
        return next(iter(self.entries.values()))


def settings_of(
    task: FinetuneTask, options: FinetuneOptions, subset: TrainingSubset, rates: Sequence[float]
) -> dict[str, Any]:
    """Return the options that a record keeps: all that change its scores.

    `training` is the same for all rows of a run; `rates` is the row's own.
    """
    training = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        # Without an average a record's key is that of the versions that had none.
        if field.name not in APART and (field.name != "ema" or options.ema)
    }
    share = "all" if subset.fraction == 1 else f"{subset.fraction:g} of the training subjects, nested"
    return {
        "task": json.loads(json.dumps(task.settings(), default=str)),
        "training": json.loads(json.dumps(training)),
        "preset": options.preset,
        "rates": list(rates),
        "fractions": share,
    }


class HeldElsewhere(Exception):
    """Another process is running this job."""


@dataclass(frozen=True)
class FinetuneJob:
    """Fine-tuning of one arm on one subset of the training data with one seed.

    Attributes:
        arm: Contestant and its learning rates.
        benchmark: Benchmark that scores the predictions.
        task: Downstream task to learn.
        split: Data, split into folds.
        subset: Part of the training data to use.
        seed: Seed of the training.
        options: Options of the command, resolved.
        device: Device that trains.
    """

    arm: Arm
    benchmark: Benchmark
    task: FinetuneTask
    split: SplitData
    subset: TrainingSubset
    seed: int
    options: FinetuneOptions
    device: torch.device

    @property
    def entry(self) -> Entry:
        """Contestant that is trained."""
        return self.arm.entries[self.seed]

    @property
    def name(self) -> str:
        """Name of the job in messages: contestant, fraction and repeat, seed."""
        part = self.subset
        share = "" if part.fraction == 1 else f", {part.fraction:g} of the subjects, subset {part.repeat}"
        return f"{self.entry.name}{share}, seed {self.seed}"

    def begin_record(self, contestant: Contestant, settings: dict[str, Any]) -> Result:
        """Begin the record of this job, whose key says whether it was done before."""
        pool = pool_details(self.options.pool)
        by_fold = [described(own, own.make(), pool) for own in self.entry.folds if own.make is not None]
        return record(contestant, self.benchmark, self.split, self.subset, self.seed, settings, by_fold)

    def folds(self) -> Iterator[tuple[Collection, Collection, Collection]]:
        """Yield the training, validation and test volumes of each fold."""
        for fold, (fit, choose) in zip(self.split.folds, self.subset.folds, strict=True):
            train, val, test = (self.split.data.select(np.flatnonzero(m)) for m in (fit, choose, fold.test))
            yield train, val, test


def run_job(job: FinetuneJob) -> Result | None:
    """Return the record of a job: read it where it exists, else train, score and write it.

    With `validation_only` there is no record, but a file of validation scores.

    Raises:
        HeldElsewhere: Another process is running the job.
        TransientError: The disk is full, or failed.
        UsageError: The folder of the records cannot be written to.
    """
    if job.entry.make is None:
        return _run_trivial(job)
    options = job.options
    encoder = job.entry.make()
    contestant = described(job.entry, encoder, pool_details(options.pool))
    result = job.begin_record(contestant, settings_of(job.task, options, job.subset, job.arm.rates))
    if options.validation_only:
        _only_validate(job, result)
        return None
    unsaved = "" if not options.save_predictions else "; its predictions are saved with --overwrite only"

    def look() -> Result | None:
        existing = None if options.overwrite else find_result(result, options.out)
        if existing is not None:
            say(f"{job.name}: record found in {options.out}{unsaved}")
        return existing

    existing = look()
    if existing is not None:
        return existing
    with _holding(job, result):
        existing = look()  # another process may have made it just before the lock was taken
        return existing or _train_and_score(job, result)


@contextlib.contextmanager
def _holding(job: FinetuneJob, result: Result) -> Iterator[None]:
    """Hold the lock of a job.

    Raises:
        HeldElsewhere: Another process holds it.
        TransientError: The disk is full, or failed.
        UsageError: The folder cannot be written to.
    """
    lock = job.options.out / ".jobs" / f"{result.key}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        if not locks.take(lock):
            raise HeldElsewhere
    except OSError as error:
        raise not_written(error, f"cannot write {lock}: {error.strerror}") from error
    with locks.holding(lock):
        yield


def _only_validate(job: FinetuneJob, result: Result) -> None:
    """Train, and write the score on the validation subjects; test subjects are not read."""
    scores = ValidationScores(job.options.out / "validation" / f"{_slug(job.name)}-{result.key[:8]}.jsonl")
    with _holding(job, result):
        if job.options.overwrite:
            scores.path.unlink(missing_ok=True)
        if scores.final() is None:
            with _loggers(job, result) as loggers:
                parts = _train_folds(job, result, loggers, scores)
                chosen = [part["details"]["validation"][job.benchmark.main] for part in parts]
                scores.finish([math.nan if score is None else float(score) for score in chosen])
            shutil.rmtree(job.options.out / ".jobs" / result.key, ignore_errors=True)
    say(f"{job.name}: validation {job.benchmark.main} {scores.final():.3f}")


def _train_and_score(job: FinetuneJob, result: Result) -> Result:
    """Train, score and write the record, beside the loggers that the options name."""
    with _loggers(job, result) as loggers:
        _score_folds(job, result, loggers)
    return result


def _loggers(job: FinetuneJob, result: Result) -> Loggers:
    options = job.options
    folder = options.out / ".logs" / f"{_slug(job.name)}-{result.key[:8]}"
    if options.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    about = {**result.settings, "arm": job.entry.name, "fraction": result.fraction, "seed": job.seed,
             "data": list(options.data)}  # fmt: skip
    return Loggers(options.logger, folder, job.name, about, say, group=options.out.resolve().name)


def _score_folds(job: FinetuneJob, result: Result, loggers: Loggers) -> None:
    """Fill the record and write it; until then everything lies in `OUT/.jobs/KEY/`."""
    folder = job.options.out / ".jobs" / result.key
    began = time.perf_counter()
    parts = _train_folds(job, result, loggers)
    merged = job.benchmark.summarise([row for part in parts for row in part["predictions"]])
    result.scores, result.intervals = merged.scores, merged.intervals
    result.predictions = merged.predictions
    details = [part["details"] for part in parts]
    result.compute["finetune"] = _compute([part["compute"] for part in parts])
    result.compute["details"] = details[0] if len(details) == 1 else details
    # Before the record: where that is found, nothing is trained again.
    model = kept.finish(result, folder, job.options.out, job.options, len(job.split.folds))
    write_result(result, job.options.out)
    steps = max(of_fold["steps"] for of_fold in details)
    loggers.scalars({f"test/{name}": value for name, value in result.scores.items()}, steps)
    if model is not None:
        loggers.artefact("model", model)
    shutil.rmtree(folder, ignore_errors=True)
    chosen = ", ".join(f"{of_fold['lr']:g}" for of_fold in details)
    say(f"{job.name}: {job.benchmark.main} {result.scores[job.benchmark.main]:.3f}"
        f" (learning rate {chosen}; {time.perf_counter() - began:.0f} s)")  # fmt: skip


def _train_folds(
    job: FinetuneJob, result: Result, loggers: Loggers, scores: ValidationScores | None = None
) -> list[dict[str, Any]]:
    """Train and predict each fold, or read what was written of it before a stop.

    Args:
        job: Job to do.
        result: Record that was begun.
        loggers: Loggers of the job.
        scores: File of validation scores, where nothing is to be predicted for test subjects.
    """
    folder = job.options.out / ".jobs" / result.key
    parts: list[dict[str, Any]] = []
    for number, (fit, choose, test) in enumerate(job.folds()):
        path = folder / f"fold-{number}.json"
        part = None if job.options.overwrite else _read_json(path)
        if part is None:
            entry = job.entry.of_fold(number)
            assert entry.make is not None
            plan = TrainingPlan(
                benchmark=job.benchmark,
                task=job.task,
                train=fit,
                val=choose,
                options=job.options,
                seed=job.seed,
                device=job.device,
                name=job.name if len(job.split.folds) == 1 else f"{job.name}, fold {number}",
                folder=folder / f"fold-{number}",
                say=say,
                decoder=entry.decoder,
                loggers=loggers,
                scores=scores,
                part="" if len(job.split.folds) == 1 else f"fold-{number}/",
            )
            if job.options.overwrite:
                shutil.rmtree(plan.folder or folder, ignore_errors=True)
            part = score_fold(
                plan,
                entry.make,
                rates=job.arm.rates,
                test=test if scores is None else None,
                key=result.key,
                keep=_keeper(job, plan, result, folder / f"fold-{number}.model"),
            )
            _write_json(path, part)
            shutil.rmtree(folder / f"fold-{number}", ignore_errors=True)
        parts.append(part)
    return parts


def _keeper(
    job: FinetuneJob, plan: TrainingPlan, result: Result, folder: Path
) -> Callable[[nn.Module, Trial], None] | None:
    """Return the function that keeps the model of a fold; None where it is not to be kept."""
    if job.options.validation_only or not kept.wanted(job.options, job.entry.name, result.fraction):
        return None
    return lambda model, trial: kept.keep_fold(plan, model, trial, result, folder)


def score_fold(
    plan: TrainingPlan,
    make: Callable[[], Encoder],
    *,
    rates: Sequence[float],
    test: Collection | None,
    key: str = "",
    keep: Callable[[nn.Module, Trial], None] | None = None,
) -> dict[str, Any]:
    """Train with every learning rate, keep the best by validation score, and only then predict.

    Args:
        plan: Settings of the training.
        make: Function that returns the encoder to start from, always the same.
        rates: Learning rates to try.
        test: Volumes to predict at the end; None for none.
        key: Key of the record, by which predictions and pictures are named; empty for no pictures.
        keep: Function that keeps the model of the best learning rate, given its training.

    Returns:
        `predictions`, `details` and `compute`, as JSON holds them.

    Raises:
        Diverged: The loss is no number with any of the learning rates.
    """
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    trials: list[Trial] = []
    best_so_far: tuple[nn.Module, Trial] | None = None
    for lr in rates:
        try:
            model, trial = train(plan, make, lr)
        except Diverged as error:
            trials.append(error.trial)
            if best_so_far is None and len(trials) == len(rates):
                raise
            plan.say(f"{error}; this learning rate is left out")
            continue
        trials.append(trial)
        if (
            best_so_far is None
            or trial.value > best_so_far[1].value
            or not np.isfinite(best_so_far[1].value)
        ):
            best_so_far = model, trial
    assert best_so_far is not None
    model, best = best_so_far
    began = time.perf_counter()
    predictions = [] if test is None else predict(plan, model, test)
    seconds = time.perf_counter() - began
    if keep is not None:
        keep(model, best)
    if test is not None and plan.options.save_predictions:
        _save_predictions(plan, model, test, key)
    if test is not None and key and plan.seed == plan.options.seeds[0]:
        _save_picture(plan, model, test, predictions, key, best.total)
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
                {
                    "lr": trial.lr,
                    plan.benchmark.main: trial.best.get("score"),
                    "step": trial.best.get("step"),
                }
                | ({} if trial.step == trial.total else {"diverged": trial.step + 1})
                for trial in trials
            ],
            "weights": weights_digest(model.state_dict()),
            **({"plan": list(plan.task.reasons)} if plan.task.reasons else {}),
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
    """Sum the costs over folds; of memory the largest counts."""
    total: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if name in ("device", "threads"):
            total[name] = value
        elif name == "peak_memory_bytes":
            total[name] = max(values)
        else:
            total[name] = round(sum(values), 3)
    total["seconds_per_step"] = round(total["training_seconds"] / max(total["steps"], 1), 5)
    return total


def _save_predictions(plan: TrainingPlan, model: nn.Module, test: Collection, key: str) -> None:
    folder = plan.options.out / "predictions" / f"{_slug(plan.name)}-{key[:8]}"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run of the same job may have left it
    folder.mkdir(parents=True)
    with torch.inference_mode(), autocast(plan.device, plan.options.precision):
        written = [plan.task.save_prediction(model, volume, folder) for volume in test]
    if not any(written):
        folder.rmdir()
    else:
        say(f"{plan.name}: {sum(map(bool, written))} predictions written to {folder}")


def _save_picture(
    plan: TrainingPlan,
    model: nn.Module,
    test: Collection,
    rows: Sequence[dict[str, Any]],
    key: str,
    step: int,
) -> None:
    """Save a picture of the median and the worst prediction beside the truth, where the task draws one."""
    with torch.inference_mode(), autocast(plan.device, plan.options.precision):
        figure = plan.task.picture(model, test, rows)
    if figure is not None:
        plan.options.out.mkdir(parents=True, exist_ok=True)
        path = plan.options.out / f"{_slug(plan.name)}-median-and-worst-{key[:8]}.png"
        figure.savefig(path, dpi=110)
        say(f"picture: {path}")
        if plan.loggers is not None:
            plan.loggers.picture(f"{plan.part}test", figure, path, step)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")[:80]


def _run_trivial(job: FinetuneJob) -> Result:
    """Return the record of a row without a network, on the same subset and test subjects."""
    options = job.options
    # Nothing is trained; the seed of the split matters where the row is fitted to a subset of the data.
    seeded = job.subset.fraction < 1 and options.split_seed
    training = {"split_seed": options.split_seed} if seeded else {}
    settings = {**settings_of(job.task, options, job.subset, ()), "training": training, "preset": ""}
    result = job.begin_record(trivial_contestant(job.entry, job.task.measured(job.entry.name)), settings)
    existing = None if options.overwrite else find_result(result, options.out)
    if existing is not None:
        return existing
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for fit, choose, test in job.folds():
        rows += job.task.predict_trivial(job.entry.name, fit, choose, test, job.seed)
    merged = job.benchmark.summarise(rows)
    result.scores, result.intervals, result.predictions = merged.scores, merged.intervals, rows
    result.compute["finetune"] = {"training_seconds": round(time.perf_counter() - began, 3)}
    write_result(result, options.out)
    return result


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a file that is missing or cut short is made again
        return None
    return content if isinstance(content, dict) else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        write_whole(path, json.dumps(content))
    except OSError as error:
        raise not_written(error, f"cannot write {path}: {error.strerror}") from error
