"""Fine-tuning from options to records: contestants, data and jobs, which can stop anywhere and go on."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssl3d.api import (
    DataError,
    Ssl3dError,
    UsageError,
    device_of,
    load_metric,
    locks,
    missing_loggers,
    open_data_for,
)
from ssl3d_benchmarks.contestants import (
    Loaded,
    check_channels,
    fitting_all,
    given,
    trivial_entries,
    untrained,
)
from ssl3d_benchmarks.finetune import kept
from ssl3d_benchmarks.finetune.benchmark import Finetune
from ssl3d_benchmarks.finetune.forecast import forecast, size_notes
from ssl3d_benchmarks.finetune.job import Arm, FinetuneJob, HeldElsewhere, run_job
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.parameters import check_freeze
from ssl3d_benchmarks.finetune.protocol import FinetuneTask, task_class
from ssl3d_benchmarks.finetune.recipe import planned
from ssl3d_benchmarks.table import Row
from ssl3d_benchmarks.task import (
    SplitData,
    headline,
    say,
    scored_on_validation,
    show,
    split_up,
    training_subsets,
    write_table,
)

if TYPE_CHECKING:
    from ssl3d.api import Collection


@dataclass
class Outcome:
    """Records and failures of a whole run.

    Attributes:
        rows: Rows of the table, one per record.
        failed: Names of the jobs that failed, with the reasons.
    """

    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run(options: FinetuneOptions, config: Any) -> Outcome:
    """Train and score every arm on every subset; write records, table and pictures; print the table.

    Args:
        options: Options of the command, resolved.
        config: Options of the task, resolved.
    """
    loaded = Loaded()
    decoders = getattr(config, "init", "new") == "pretrained"
    make_arms(options, loaded, decoders)  # a wrong path is reported before anything is read
    configs = _configs(options, config)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(device_of(options.device))
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: not a folder")
    for line in missing_loggers(options.logger):
        say(line)
    outcome, asked = Outcome(), options
    for number, own_config in enumerate(configs):
        split, benchmark = make_task(options, own_config, loaded)
        options = planned(asked, benchmark.downstream, planned_on(split))
        fitted = replace(options, encoder=fitting_all(options.encoder, split.data))
        arms = make_arms(fitted, loaded, decoders)
        check_channels([arm.first for arm in arms], split.data)
        if number == 0:
            classes = getattr(benchmark.downstream, "classes", ())
            say(headline(split, benchmark.target, [str(name) for name in classes]))
        for line in benchmark.downstream.reasons:
            say(f"plan: {line}")
        if options.sparse_slices:
            say(f"annotated slices per volume: {options.sparse_slices[number]}")
        jobs = make_jobs(arms, split, benchmark, options, device)
        for line in size_notes(jobs, getattr(own_config, "patch", None)) if number == 0 else ():
            say(line)
        expected = forecast(jobs)
        if expected:
            say(expected)
        _run(outcome, jobs)
    _finish(outcome, benchmark, split, options)
    return outcome


def _configs(options: FinetuneOptions, config: Any) -> list[Any]:
    """Return the options of the task, for each number of annotated slices."""
    if options.metric and not hasattr(config, "metric"):
        raise UsageError(
            f"--metric {options.metric[0]}: a metric of one's own is for masks; use --task segmentation"
        )
    if options.metric:
        config = replace(config, metric=options.metric)
    for metric in getattr(config, "metric", ()):
        load_metric(metric)  # a wrong one is refused before anything is trained
    if not options.sparse_slices:
        return [config]
    if not hasattr(config, "sparse_slices"):
        raise UsageError(f"--sparse-slices: --task {options.task} has no slices; use --task segmentation")
    numbers = [0 if words == "all" else int(words) for words in options.sparse_slices]
    return [replace(config, sparse_slices=number) for number in numbers]


def make_jobs(
    arms: Sequence[Arm],
    split: SplitData,
    benchmark: Finetune,
    options: FinetuneOptions,
    device: torch.device,
) -> list[FinetuneJob]:
    """Plan every arm on every subset with every seed; rows without a network have the first seed alone."""
    first = options.seeds[0]
    names = () if options.no_trivial or options.validation_only else benchmark.downstream.trivial
    trivial = [Arm({first: entry}, ()) for entry in trivial_entries(names)]
    return [
        FinetuneJob(arm, benchmark, benchmark.downstream, split, subset, seed, options, device)
        for subset in training_subsets(split, options.fractions, options.repeats, options.split_seed)
        for seed, arm in [
            *((seed, arm) for seed in options.seeds for arm in arms),
            *((first, arm) for arm in trivial),
        ]
    ]


def _run(outcome: Outcome, jobs: Sequence[FinetuneJob]) -> None:
    """Run every job; those that other processes hold come last."""
    rows: dict[int, Row] = {}
    left = list(range(len(jobs)))
    waiting = False
    while left:
        before, left = left, []
        for number in before:
            try:
                row = _try(outcome, jobs[number])
            except HeldElsewhere:
                left.append(number)
                continue
            if row is not None:
                rows[number] = row
        if left == before:
            if not waiting:
                say(f"waiting for {len(left)} job{'s' * (len(left) > 1)} that another process is running")
            waiting = True
            time.sleep(locks.WAIT)
    outcome.rows += [rows[number] for number in sorted(rows)]


def _try(outcome: Outcome, job: FinetuneJob) -> Row | None:
    """Run one job; a failure is reported by name and ends this job only."""
    try:
        record = run_job(job)
        return None if record is None else Row(job.entry.kind, job.entry.group, record)
    except HeldElsewhere:
        raise
    except Exception as error:
        if not isinstance(error, Ssl3dError):
            traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        outcome.failed[job.name] = reason
        say(f"failed: {job.name}: {reason}")
        return None


def _finish(outcome: Outcome, benchmark: Finetune, split: SplitData, options: FinetuneOptions) -> None:
    if outcome.rows:
        from ssl3d_benchmarks.finetune.table import (
            blocks_of,
            draw_curves,
            draw_slices,
            format_table,
            note_warnings,
        )

        blocks = blocks_of(outcome.rows, benchmark)
        note_warnings(outcome.rows, benchmark, options.out)
        text = format_table(blocks, benchmark, split.how)
        show(text)
        write_table(options.out, text)
        pictures = draw_curves(outcome.rows, benchmark, options.out)
        for path in [*pictures, *draw_slices(outcome.rows, benchmark, options.out)]:
            show(f"picture: {path}")
        show(f"records: {options.out}")
        _say_models(outcome, options)
    if outcome.failed:
        say(f"{len(outcome.failed)} of {len(outcome.failed) + len(outcome.rows)} jobs failed:")
        for name, reason in outcome.failed.items():
            say(f"  {name}: {reason}")


def _say_models(outcome: Outcome, options: FinetuneOptions) -> None:
    """Print the folders of the models that are kept, and how one predicts."""
    places = {kept.kept_of(row.result, options.out) for row in outcome.rows} - {None}
    for place in sorted(map(str, places)):
        show(f"model: {place} (ssl3d predict {place} --data SCANS --out predicted)")
    trained = any(row.kind != "trivial" for row in outcome.rows)
    if trained and not places and kept.NONE not in options.keep_models:
        say(f"no model of these records is kept in {options.out}; --overwrite trains and keeps them")


# The data and the arms ----------------------------------------------------------------------------


def make_task(
    options: FinetuneOptions, config: Any, loaded: Loaded | None = None
) -> tuple[SplitData, Finetune]:
    """Return the data, split into folds, and the benchmark of the task.

    Raises:
        DataError: There is nothing to learn, or there are too few subjects.
    """
    loaded = Loaded() if loaded is None else loaded
    data = open_data_for(loaded.trained(options.encoder), options.data)
    where = " ".join(options.data)
    if not len(data):
        raise DataError(f"{where} holds no volumes")
    kind = task_class(options.task)
    known = kind.known(config, data)
    if not known.any():
        raise DataError(f"{where}: none of the {len(data)} volumes has a target for --task {options.task}")
    if (~known).any():
        count = int((~known).sum())
        say(f"{count} of {len(data)} volumes have no target for {options.task} and are left out")
    chosen = data.select(known)
    task: FinetuneTask = kind(config, chosen)
    split = split_up(
        data, known, config, task.strata(chosen), where, options.folds, options.split_seed,
        choose=True, noun="fine-tuning",
    )  # fmt: skip
    if options.part == "val":
        split = scored_on_validation(split)
    choosing = bool(split.folds[0].val.any())
    if options.tune and not choosing:
        raise DataError(f"{where} has no validation subjects, which --tune chooses on; give more data")
    if options.validation_only and not choosing:
        raise DataError(f"{where} has no validation subjects for --validation-only; give more data")
    if not choosing and options.keep == "best":
        say("there are no validation subjects: the weights of the last step are kept")
    return split, Finetune(task)


def planned_on(split: SplitData) -> Collection:
    """Return the volumes of training and validation, of any fold, which a plan may look at."""
    seen = np.logical_or.reduce([fold.train | fold.val for fold in split.folds])
    return split.data.select(np.flatnonzero(seen))


def make_arms(options: FinetuneOptions, loaded: Loaded | None = None, decoders: bool = False) -> list[Arm]:
    """Return an arm for each encoder given, and for the same network from scratch of each architecture.

    Args:
        options: Options of the command.
        loaded: Encoders that were loaded before.
        decoders: Whether encoders come with their decoders.

    Raises:
        CheckpointError: An encoder cannot be loaded, or has no decoder where one is asked for.
        UsageError: A name is given twice.
    """
    rates = options.tune or ((options.lr,) if options.lr else ())
    scratch_rate = options.lr_scratch or options.lr
    scratch_rates = options.tune_scratch or options.tune or ((scratch_rate,) if scratch_rate else ())
    arms: list[Arm] = []
    scratch: dict[str, Arm] = {}
    for spec, encoder, entry in given(options.encoder, options.pool, loaded, decoders, options.folds):
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
