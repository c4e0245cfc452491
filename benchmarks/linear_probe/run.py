"""From a command line to records: contestants, splits, subsets, then the table and the pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import (
    Collection,
    Contestant,
    DataError,
    Result,
    Scores,
    UsageError,
    find_result,
    load_metric,
    open_data_for,
    printable,
    recorded_metric,
    write_result,
)
from ssl3d_benchmarks.contestants import (
    Entry,
    Loaded,
    check_channels,
    fitting_all,
    record,
)
from ssl3d_benchmarks.linear_probe.entries import build, contestants
from ssl3d_benchmarks.linear_probe.protocol import LinearProbe
from ssl3d_benchmarks.linear_probe.table import format_table
from ssl3d_benchmarks.table import Row
from ssl3d_benchmarks.task import (
    SplitData,
    TrainingSubset,
    check_numbers,
    class_names,
    find_target,
    headline,
    known_label,
    mask_names,
    mask_values,
    say,
    show,
    split_up,
    training_subsets,
    write_table,
)
from ssl3d_benchmarks.trivial_rows import TRIVIAL

if TYPE_CHECKING:
    from ssl3d_benchmarks.linear_probe.options import FrozenEncoderOptions

Array = NDArray[Any]


def run(options: FrozenEncoderOptions, protocol: type[LinearProbe] = LinearProbe) -> list[Row]:
    """Score every contestant, write records, table and pictures, and print the table."""
    loaded = Loaded()
    contestants(options, loaded)  # a wrong path is reported before anything is read
    task = make_task(open_data_for(loaded.trained(options.encoder), options.data), options, protocol)
    entries = contestants(replace(options, encoder=fitting_all(options.encoder, task.data)), loaded)
    check_channels(entries, task.data)
    classes = task.config.classes if task.config.target in ("classes", "masks") else ()
    say(headline(task, task.config.target, classes))
    if not isinstance(options.out, Path) or (options.out.exists() and not options.out.is_dir()):
        raise UsageError(f"--out {options.out}: not a folder")
    benchmark = protocol(task.config)
    rows: list[Row] = []
    for entry in entries:
        rows += score_entry(entry, benchmark, task, options)
    text = format_table(rows, benchmark, task.how)
    show(text)
    write_table(options.out, text)
    from ssl3d_benchmarks.linear_probe.pictures import draw

    for path in draw(rows, benchmark, task, entries, options):
        show(f"picture: {path}")
    show(f"records: {options.out}")
    return rows


def make_task(
    data: Collection, options: FrozenEncoderOptions, protocol: type[LinearProbe] = LinearProbe
) -> SplitData:
    """Find the target, leave out the volumes that have none, and split the rest.

    Raises:
        DataError: There is nothing to predict, one class only, or too few subjects.
    """
    where = " ".join(options.data)
    if not len(data):
        raise DataError(f"{where}: holds no volumes")
    target = find_target(data, options.target, where)
    if target not in protocol.mains:
        raise UsageError(
            f"--target {target}: {protocol.name} takes {', '.join(protocol.mains)}; use linear-probe"
        )
    metrics = getattr(options, "metric", ())
    if metrics and target != "masks":
        raise UsageError(f"--metric {metrics[0]}: a metric of one's own is for masks; add --target masks")
    for metric in metrics:
        load_metric(metric)  # a wrong one is refused before anything is computed
    if target == "masks" and options.pool != "mean":
        raise UsageError(
            f"--pool {options.pool}: the dense probe of masks reads feature maps and pools nothing; it is "
            "for --target classes, ordinal or real"
        )
    labels = data.labels
    known = np.array([known_label(label) for label in labels]) if target != "masks" else data.has_mask
    chosen = data.select(known)
    resolved = {
        "target": target,
        "classes": {"classes": class_names, "masks": mask_names}.get(target, _none)(chosen),
        "pool_subject": options.pool_subject if target != "masks" else "none",
        "mask_classes": mask_values(chosen)[1:] if target != "masks" and chosen.has_mask.all() else (),
    }
    fields = {field.name for field in dataclasses.fields(protocol.Config)}
    own = {name: getattr(options, name) for name in fields if hasattr(options, name)}
    config = protocol.Config(**{**own, **resolved})
    if target in ("ordinal", "real"):
        check_numbers(labels[known], target)
    if (~known).any():
        say(f"{int((~known).sum())} of {len(data)} volumes have no {target} target and are left out")
    strata = np.array([str(label) for label in chosen.labels]) if target in ("classes", "ordinal") else None
    if options.pool_subject == "concat" and target != "masks":
        counts = np.unique(chosen.subject_codes, return_counts=True)[1]
        if counts.min() != counts.max():
            raise DataError(
                f"--pool-subject concat: subjects have {counts.min()} to {counts.max()} volumes; it needs "
                "the same number of each; use mean"
            )
    return split_up(
        data, known, config, strata, where, options.folds, options.seed, choose=target == "masks"
    )


def _none(data: Collection) -> tuple[str, ...]:
    return ()


# Scoring ------------------------------------------------------------------------------------------


def score_entry(
    entry: Entry, benchmark: LinearProbe, task: SplitData, options: FrozenEncoderOptions
) -> list[Row]:
    """Score one contestant on every fraction and repeat, or read the records that exist already."""
    if benchmark.target == "masks" and entry.make is None:
        if entry.name != TRIVIAL[0]:
            return []
        entry = replace(entry, name="intensities and position")
    repeats = options.repeats or (5 if task.config.target == "masks" else 20)
    subsets = list(training_subsets(task, options.fractions, repeats, options.seed))
    built = [build(entry, task, fold, options) for fold in task.folds[:1]]
    # Every fold has its own norm statistics; the record's digest covers them all.
    several = entry.recalibrate and len(task.folds) > 1
    if several:
        built += [build(entry, task, fold, options) for fold in task.folds[1:]]
    contestant = built[0]
    if several:
        joined = "".join(of_fold.digest for of_fold in built)
        contestant = replace(built[0], digest=hashlib.sha256(joined.encode()).hexdigest()[:16])
    results = [_record(contestant, benchmark, task, job, options) for job in subsets]
    records = [None if options.overwrite else find_result(result, options.out) for result in results]
    if all(records):
        say(f"{entry.name}: {len(records)} record{'s' * (len(records) > 1)} found in {options.out}")
        return [Row(entry.kind, entry.group, result) for result in records if result]
    began = time.perf_counter()
    parts: list[list[Scores]] = [[] for _ in subsets]
    for number, fold in enumerate(task.folds):
        own = built[number if several else 0]
        benchmark.report = _progress(entry.name)
        if number == 0 or several:
            benchmark.prepare(own, task.data)
        for position, job in enumerate(subsets):
            if records[position]:
                continue
            train, val = job.folds[number]
            fit, choose, test = (task.data.select(np.flatnonzero(rows)) for rows in (train, val, fold.test))
            parts[position].append(benchmark.score(own, fit, choose, test, options.seed))
    for position, result in enumerate(results):
        if records[position]:
            continue
        merged = benchmark.summarise([row for part in parts[position] for row in part.predictions])
        result.scores, result.intervals = merged.scores, merged.intervals
        result.predictions = merged.predictions
        details = [part.details for part in parts[position]]
        result.compute["details"] = details[0] if len(details) == 1 else details
        result.compute["probe_seconds"] = round(sum(part.seconds for part in parts[position]), 3)
        write_result(result, options.out)
        records[position] = result
    say(f"{entry.name}: {benchmark.main} {results[0].scores[benchmark.main]:.3f}"
        f" ({time.perf_counter() - began:.0f} s)")  # fmt: skip
    return [Row(entry.kind, entry.group, result) for result in records if result]


def _record(
    contestant: Contestant,
    benchmark: LinearProbe,
    task: SplitData,
    job: TrainingSubset,
    options: FrozenEncoderOptions,
) -> Result:
    fraction = job.fraction
    subset = "all" if fraction == 1 else f"{fraction:g} of the training subjects, nested"
    settings = {**dataclasses.asdict(task.config), "fractions": subset}
    # Records of before this option are found again.
    if metrics := settings.pop("metric", ()):
        settings["metric"] = [recorded_metric(metric) for metric in metrics]
    return record(contestant, benchmark, task, job, options.seed, settings)


def _progress(name: str) -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def report(done: int, total: int) -> None:
        line = f"\r{printable(name)[:60]}: {done}/{total} volumes"
        print(line, end="\n" if done == total else "", file=sys.stderr)

    return report
