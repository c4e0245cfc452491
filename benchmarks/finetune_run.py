"""Fine-tuning from options to records: who is trained, on what; jobs can stop anywhere and go on."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ssl3d.api import (
    Contestant,
    DataError,
    Result,
    Scores,
    Ssl3dError,
    UsageError,
    encoder_from,
    find_result,
    open_data_for,
    write_result,
)
from ssl3d_benchmarks import locks
from ssl3d_benchmarks.contestants import (
    Entry,
    check_channels,
    described,
    device_of,
    fitting_all,
    given,
    named,
    record,
    trivial_contestant,
    trivial_entries,
    untrained,
)
from ssl3d_benchmarks.finetune import Finetune, FinetuneTask, task_class
from ssl3d_benchmarks.finetune_command import Options
from ssl3d_benchmarks.finetune_train import (
    Diverged,
    Plan,
    Trial,
    autocast,
    check_freeze,
    memory_peak,
    predict,
    train,
    weights_digest,
)
from ssl3d_benchmarks.linear_probe_table import Row
from ssl3d_benchmarks.task import Fold, Job, Task, headline, jobs, say, split_up

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


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        rows: Of the table, one per record.
        failed: Names of the jobs that failed, and why.
    """

    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def resolve(options: Options, config: Any, asked: set[str]) -> tuple[Options, Any]:
    """The options with the task's recipe and the preset below what was asked for.

    Args:
        options: As given.
        config: The task's own options.
        asked: Names of the options that were given, those of the task as TASK.FIELD.

    Raises:
        UsageError: The preset is unknown, or there is no learning rate or no number of steps.
    """
    kind = task_class(options.task)
    below: dict[str, Any] = dict(kind.recipe)
    if options.preset:
        if options.preset not in kind.presets:
            known = ", ".join(kind.presets) or "none"
            raise UsageError(f"--preset {options.preset}: {options.task} has {known}")
        below |= kind.presets[options.preset]
        lasting = {"steps", "epochs"} & set(kind.presets[options.preset])
        for name in {"steps", "epochs"} - lasting if lasting else ():
            below.pop(name, None)
    if options.steps and options.epochs:
        raise UsageError(f"--steps {options.steps} and --epochs {options.epochs}: give one of them")
    if options.steps or options.epochs:
        below = {key: value for key, value in below.items() if key not in ("steps", "epochs")}
    if "lr" in asked:
        below.pop("lr_scratch", None)  # it was chosen beside another learning rate
    own = {key: value for key, value in below.items() if "." not in key and key not in asked}
    options = replace(options, **own)
    own = {key: value for key, value in below.items() if "." in key and key not in asked}
    inner = {key.partition(".")[2]: value for key, value in own.items()}
    if options.tune and "lr_scratch" in asked:
        raise UsageError("--lr-scratch beside --tune: give --tune-scratch, as many as --tune")
    if options.lr is None and not options.tune:
        raise UsageError(f"--lr: {options.task} has no learning rate of its own; give --lr or --tune")
    if not options.steps and not options.epochs:
        raise UsageError(f"--steps: {options.task} has no length of its own; give --steps or --epochs")
    return options, replace(config, **inner)


def run(options: Options, config: Any) -> Outcome:
    """Trains and scores every arm on every subset, writes records, table and pictures, prints the table.

    Args:
        options: Resolved.
        config: The task's own options.
    """
    make_arms(options)  # a wrong path is said before anything is read
    configs = _configs(options, config)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(device_of(options.device))
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: not a folder")
    outcome = Outcome()
    for number, one in enumerate(configs):
        task, benchmark = make_task(options, one)
        arms = make_arms(replace(options, encoder=fitting_all(options.encoder, task.data)))
        check_channels([arm.first for arm in arms], task.data)
        if number == 0:
            classes = getattr(benchmark.work, "classes", ())
            say(headline(task, benchmark.target, [str(name) for name in classes]))
        if options.sparse_slices:
            say(f"annotated slices per volume: {options.sparse_slices[number]}")
        _run(outcome, arms, task, benchmark, options, device)
    _finish(outcome, benchmark, task, options)
    return outcome


def _configs(options: Options, config: Any) -> list[Any]:
    """The task's options, for each number of annotated slices."""
    if not options.sparse_slices:
        return [config]
    if not hasattr(config, "sparse_slices"):
        raise UsageError(f"--sparse-slices: {options.task} learns no slices; it is for --task segmentation")
    return [replace(config, sparse_slices=0 if one == "all" else int(one)) for one in options.sparse_slices]


def _run(
    outcome: Outcome,
    arms: Sequence[Arm],
    task: Task,
    benchmark: Finetune,
    options: Options,
    device: torch.device,
) -> None:
    """Every arm on every subset; what another process has in hand comes last."""
    todo: list[tuple[Entry, Job, int, Callable[[], Result]]] = []
    for job in jobs(task, options.fractions, options.repeats, options.split_seed):
        for seed in options.seeds:
            for arm in arms:
                work = partial(run_job, arm, benchmark, task, job, seed, options, device)
                todo.append((arm.entries[seed], job, seed, work))
        for entry in () if options.no_trivial else trivial_entries(benchmark.work.trivial):
            seed = options.seeds[0]
            trivial = partial(run_trivial, entry, benchmark, task, job, seed, options)
            todo.append((entry, job, seed, trivial))
    rows: dict[int, Row] = {}
    left = list(range(len(todo)))
    waiting = False
    while left:
        before, left = left, []
        for number in before:
            try:
                row = _try(outcome, *todo[number])
            except Held:
                left.append(number)
                continue
            if row is not None:
                rows[number] = row
        if left == before:
            if not waiting:
                say(f"{len(left)} left, in the hands of another process: waiting")
            waiting = True
            time.sleep(locks.WAIT)
    outcome.rows += [rows[number] for number in sorted(rows)]


class Held(Exception):
    """Another process is at this job."""


def _try(outcome: Outcome, entry: Entry, job: Job, seed: int, work: Callable[[], Result]) -> Row | None:
    """Runs one job; a failure is told by name and ends this job only."""
    name = job_name(entry, job, seed)
    try:
        return Row(entry.kind, entry.group, work())
    except Held:
        raise
    except Exception as error:
        if not isinstance(error, Ssl3dError):
            traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        outcome.failed[name] = reason
        say(f"failed: {name}: {reason}")
        return None


def _finish(outcome: Outcome, benchmark: Finetune, task: Task, options: Options) -> None:
    if outcome.rows:
        from ssl3d_benchmarks.finetune_table import draw_curves, draw_slices, format_table

        text = format_table(outcome.rows, benchmark, task.how)
        print(text)
        (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        pictures = draw_curves(outcome.rows, benchmark, options.out)
        for path in [*pictures, *draw_slices(outcome.rows, benchmark, options.out)]:
            print(f"picture: {path}")
        print(f"records: {options.out}")
    if outcome.failed:
        say(f"{len(outcome.failed)} of {len(outcome.failed) + len(outcome.rows)} jobs failed:")
        for name, reason in outcome.failed.items():
            say(f"  {name}: {reason}")


# The task and the arms ----------------------------------------------------------------------------


def make_task(options: Options, config: Any) -> tuple[Task, Finetune]:
    """The data in its folds, and the benchmark.

    Raises:
        DataError: There is nothing to learn, or there are too few subjects.
    """
    specs = [named(spec)[1] for spec in options.encoder]
    trained = [encoder_from(spec) for spec in specs if not spec.startswith("scratch:")]
    data = open_data_for(trained, options.data)
    where = " ".join(options.data)
    if not len(data):
        raise DataError(f"{where}: holds no volumes")
    kind = task_class(options.task)
    known = kind.known(config, data)
    if not known.any():
        raise DataError(f"{where}: none of the {len(data)} volumes has a target for {options.task}")
    if (~known).any():
        say(f"{int((~known).sum())} of {len(data)} volumes have no target for {options.task}: left out")
    chosen = data.select(known)
    work: FinetuneTask = kind(config, chosen)
    benchmark = Finetune(work)
    task = split_up(
        data, known, config, work.strata(chosen), where, options.folds, options.split_seed,
        choose=True, noun="fine-tuning",
    )  # fmt: skip
    choosing = bool(task.folds[0].val.any())
    if options.tune and not choosing:
        raise DataError(f"{where}: no validation subjects, which --tune chooses on: give more data")
    if not choosing and options.keep == "best":
        say("no validation subjects: the last step is taken")
    return task, benchmark


def make_arms(options: Options) -> list[Arm]:
    """The encoders given, and for each architecture among them the same network from scratch.

    Raises:
        CheckpointError: An encoder cannot be loaded.
        UsageError: A name is given twice.
    """
    rates = options.tune or ((options.lr,) if options.lr else ())
    scratch_rate = options.lr_scratch or options.lr
    scratch_rates = options.tune_scratch or options.tune or ((scratch_rate,) if scratch_rate else ())
    arms: list[Arm] = []
    scratch: dict[str, Arm] = {}
    for spec, encoder, entry in given(options.encoder, options.pool):
        asked = spec.startswith("scratch:")
        check_freeze(encoder, options.freeze)
        if not asked:
            arms.append(Arm(dict.fromkeys(options.seeds, entry), rates))
        if entry.group not in scratch and (asked or not options.no_scratch):
            entries = {
                seed: replace(untrained(entry, seed, encoder), name=entry.group) for seed in options.seeds
            }
            scratch[entry.group] = Arm(entries, scratch_rates)
    return arms + list(scratch.values())


def job_name(entry: Entry, job: Job, seed: int) -> str:
    """For people: contestant, fraction and repeat, seed."""
    part = "" if job.fraction == 1 else f", {job.fraction:g} of the subjects, subset {job.repeat}"
    return f"{entry.name}{part}, seed {seed}"


def settings_of(benchmark: Finetune, options: Options, job: Job, rates: Sequence[float]) -> dict[str, Any]:
    """What a record keeps of the options: all that changes its scores.

    `training` is the same for all rows of a run; `rates` is the row's own.
    """
    training = {
        one.name: getattr(options, one.name) for one in dataclasses.fields(options) if one.name not in APART
    }
    plain: dict[str, Any] = json.loads(json.dumps(benchmark.work.settings(), default=str))
    return {
        "task": plain,
        "training": json.loads(json.dumps(training)),
        "preset": options.preset,
        "rates": list(rates),
        "fractions": "all" if job.fraction == 1 else f"{job.fraction:g} of the training subjects, nested",
    }


# Jobs ---------------------------------------------------------------------------------------------


def run_job(
    arm: Arm,
    benchmark: Finetune,
    task: Task,
    job: Job,
    seed: int,
    options: Options,
    device: torch.device,
) -> Result:
    """The record of one arm on one subset with one seed, found or made.

    Raises:
        Held: Another process is making it.
        UsageError: The folder cannot be written to.
    """
    entry = arm.entries[seed]
    assert entry.make is not None
    encoder = entry.make()
    details = {} if options.pool == "mean" else {"pool": options.pool}
    contestant = described(entry, encoder, details)
    settings = settings_of(benchmark, options, job, arm.rates)
    result = record(contestant, benchmark, benchmark.task_version, task, job, seed, settings)
    name = job_name(entry, job, seed)

    unsaved = "" if not options.save_predictions else "; its predictions are saved with --overwrite only"

    def look() -> Result | None:
        found = None if options.overwrite else find_result(result, options.out)
        if found is not None:
            say(f"{name}: record found in {options.out}{unsaved}")
        return found

    found = look()
    if found is not None:
        return found
    lock = options.out / ".jobs" / f"{result.key}.lock"
    _take(lock)
    with locks.holding(lock):
        found = look()  # made by another, just before the lock was taken
        return found or _make(arm, encoder, benchmark, task, job, seed, options, device, result)


def _take(lock: Path) -> None:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        if not locks.take(lock):
            raise Held
    except OSError as error:
        raise UsageError(f"cannot write {lock}: {error.strerror}") from error


def _make(
    arm: Arm,
    encoder: Encoder,
    benchmark: Finetune,
    task: Task,
    job: Job,
    seed: int,
    options: Options,
    device: torch.device,
    result: Result,
) -> Result:
    """Trains, scores and writes. Everything of a job that is not finished lies in `OUT/.jobs/KEY/`."""
    name = job_name(arm.entries[seed], job, seed)
    folder = options.out / ".jobs" / result.key
    began = time.perf_counter()
    parts: list[dict[str, Any]] = []
    for number, (fold, (fit, choose)) in enumerate(zip(task.folds, job.subsets, strict=True)):
        path = folder / f"fold-{number}.json"
        part = None if options.overwrite else _read_json(path)
        if part is None:
            plan = Plan(
                benchmark,
                task.data.select(np.flatnonzero(fit)),
                task.data.select(np.flatnonzero(choose)),
                options,
                seed,
                device,
                name if len(task.folds) == 1 else f"{name}, fold {number}",
                folder / f"fold-{number}",
                say,
            )
            if options.overwrite:
                shutil.rmtree(plan.folder or folder, ignore_errors=True)
            part = score_fold(plan, lambda: copy.deepcopy(encoder), arm.rates, task.data, fold, result.key)
            _write_json(path, part)
            shutil.rmtree(folder / f"fold-{number}", ignore_errors=True)
        parts.append(part)
    merged = benchmark.summarise([row for part in parts for row in part["predictions"]])
    result.scores, result.intervals = merged.scores, merged.intervals
    result.predictions = merged.predictions
    told = [part["details"] for part in parts]
    result.compute["finetune"] = _compute([part["compute"] for part in parts])
    result.compute["details"] = told[0] if len(told) == 1 else told
    write_result(result, options.out)
    shutil.rmtree(folder, ignore_errors=True)
    chosen = ", ".join(f"{one['lr']:g}" for one in told)
    say(f"{name}: {benchmark.main} {result.scores[benchmark.main]:.3f}"
        f" (learning rate {chosen}; {time.perf_counter() - began:.0f} s)")  # fmt: skip
    return result


def score_fold(
    plan: Plan,
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
            "peak_memory_bytes": memory_peak(plan.device),
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


def _save_predictions(plan: Plan, model: nn.Module, test: Collection, key: str) -> None:
    folder = plan.options.out / "predictions" / f"{_slug(plan.name)}-{key[:8]}"
    shutil.rmtree(folder, ignore_errors=True)  # of the same job, by a run before
    folder.mkdir(parents=True)
    with torch.inference_mode(), autocast(plan.device, plan.options.precision):
        written = [plan.benchmark.work.save_prediction(model, volume, folder) for volume in test]
    if not any(written):
        folder.rmdir()
    else:
        say(f"{plan.name}: {sum(map(bool, written))} predictions in {folder}")


def _save_picture(plan: Plan, model: nn.Module, test: Collection, key: str) -> None:
    """Predictions beside the truth on some test volumes, where the task draws them."""
    with torch.inference_mode(), autocast(plan.device, plan.options.precision):
        figure = plan.benchmark.work.picture(model, test)
    if figure is not None:
        plan.options.out.mkdir(parents=True, exist_ok=True)
        path = plan.options.out / f"{_slug(plan.name)}-test-{key[:8]}.png"
        figure.savefig(path, dpi=110)
        say(f"picture: {path}")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", name).strip("_")[:80]


def run_trivial(
    entry: Entry, benchmark: Finetune, task: Task, job: Job, seed: int, options: Options
) -> Result:
    """The record of a row without a network, on the same subset and test subjects."""
    contestant = trivial_contestant(entry)
    # Nothing is trained, but on a subset; which one, the seed of the split says where it is not 0.
    training = {} if job.fraction == 1 or not options.split_seed else {"split_seed": options.split_seed}
    settings = {**settings_of(benchmark, options, job, ()), "training": training, "preset": ""}
    result = record(contestant, benchmark, benchmark.task_version, task, job, seed, settings)
    found = None if options.overwrite else find_result(result, options.out)
    if found is not None:
        return found
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for fold, (fit, choose) in zip(task.folds, job.subsets, strict=True):
        train, val, test = (task.data.select(np.flatnonzero(mask)) for mask in (fit, choose, fold.test))
        rows += benchmark.work.predict_trivial(entry.name, train, val, test, seed)
    merged = benchmark.summarise(rows)
    result.scores, result.intervals, result.predictions = merged.scores, merged.intervals, rows
    result.compute["finetune"] = {"training_seconds": round(time.perf_counter() - began, 3)}
    write_result(result, options.out)
    return result


def score_by_recipe(
    benchmark: Finetune,
    contestant: Contestant,
    train_data: Collection,
    val: Collection,
    test: Collection,
    seed: int,
) -> Scores:
    """A contestant trained by the task's recipe: the whole protocol in one call, without records."""
    if contestant.encoder is None:
        rows = benchmark.work.predict_trivial(contestant.name, train_data, val, test, seed)
        return benchmark.summarise(rows)
    options, _ = resolve(Options(("given",), task=benchmark.work.name), benchmark.work.config, set())
    encoder = contestant.encoder
    device = next(encoder.parameters()).device
    plan = Plan(benchmark, train_data, val, options, seed, device, contestant.name)
    everything = np.ones(len(test), dtype=bool)
    rate = options.lr_scratch if contestant.kind == "untrained" and options.lr_scratch else options.lr
    assert rate is not None
    began = time.perf_counter()
    fold = Fold(~everything, ~everything, everything)
    part = score_fold(plan, lambda: copy.deepcopy(encoder), (rate,), test, fold)
    scores = benchmark.summarise(part["predictions"])
    scores.details, scores.seconds = part["details"], time.perf_counter() - began
    return scores


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut short: made again
        return None
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(f".partial{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
