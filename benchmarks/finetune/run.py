"""Fine-tuning from options to records: who is trained, on what; jobs can stop anywhere and go on."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ssl3d.api import (
    DataError,
    Result,
    Ssl3dError,
    UsageError,
    device_of,
    open_data_for,
)
from ssl3d_benchmarks import locks
from ssl3d_benchmarks.contestants import (
    Entry,
    Loaded,
    check_channels,
    fitting_all,
    given,
    trivial_entries,
    untrained,
)
from ssl3d_benchmarks.finetune.benchmark import Finetune
from ssl3d_benchmarks.finetune.job import Arm, Held, Work, job_name, run_job, run_trivial
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.protocol import FinetuneTask, task_class
from ssl3d_benchmarks.finetune.train import check_freeze
from ssl3d_benchmarks.table import Row
from ssl3d_benchmarks.task import Job, Task, headline, jobs, say, split_up

if TYPE_CHECKING:
    pass


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        rows: Of the table, one per record.
        failed: Names of the jobs that failed, and why.
    """

    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run(options: FinetuneOptions, config: Any) -> Outcome:
    """Trains and scores every arm on every subset, writes records, table and pictures, prints the table.

    Args:
        options: Resolved.
        config: The task's own options.
    """
    loaded = Loaded()
    make_arms(options, loaded)  # a wrong path is said before anything is read
    configs = _configs(options, config)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(device_of(options.device))
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: not a folder")
    outcome = Outcome()
    for number, one in enumerate(configs):
        task, benchmark = make_task(options, one, loaded)
        arms = make_arms(replace(options, encoder=fitting_all(options.encoder, task.data)), loaded)
        check_channels([arm.first for arm in arms], task.data)
        if number == 0:
            classes = getattr(benchmark.work, "classes", ())
            say(headline(task, benchmark.target, [str(name) for name in classes]))
        if options.sparse_slices:
            say(f"annotated slices per volume: {options.sparse_slices[number]}")
        _run(outcome, arms, task, benchmark, options, device)
    _finish(outcome, benchmark, task, options)
    return outcome


def _configs(options: FinetuneOptions, config: Any) -> list[Any]:
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
    options: FinetuneOptions,
    device: torch.device,
) -> None:
    """Every arm on every subset; what another process has in hand comes last."""
    todo: list[tuple[Entry, Job, int, Callable[[], Result]]] = []
    for job in jobs(task, options.fractions, options.repeats, options.split_seed):
        for seed in options.seeds:
            for arm in arms:
                work = Work(arm, benchmark, benchmark.work, task, job, seed, options, device)
                todo.append((work.entry, job, seed, partial(run_job, work)))
        for entry in () if options.no_trivial else trivial_entries(benchmark.work.trivial):
            seed = options.seeds[0]
            trivial = partial(run_trivial, entry, benchmark, benchmark.work, task, job, seed, options)
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


def _finish(outcome: Outcome, benchmark: Finetune, task: Task, options: FinetuneOptions) -> None:
    if outcome.rows:
        from ssl3d_benchmarks.finetune.table import draw_curves, draw_slices, format_table

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


def make_task(options: FinetuneOptions, config: Any, loaded: Loaded | None = None) -> tuple[Task, Finetune]:
    """The data in its folds, and the benchmark.

    Raises:
        DataError: There is nothing to learn, or there are too few subjects.
    """
    loaded = Loaded() if loaded is None else loaded
    data = open_data_for(loaded.trained(options.encoder), options.data)
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


def make_arms(options: FinetuneOptions, loaded: Loaded | None = None) -> list[Arm]:
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
    for spec, encoder, entry in given(options.encoder, options.pool, loaded):
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
