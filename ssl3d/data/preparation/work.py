"""The work of `prepare`: workers make scans parts of a store, and an estimate tells what that takes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ssl3d.amounts import count_of, duration, size
from ssl3d.data.geometry import Triple
from ssl3d.data.preparation import pool
from ssl3d.data.preparation.parts import stamp
from ssl3d.data.preparation.process import (
    Recipe,
    ScanTask,
    process,
    spacing_of_scan,
    start_worker,
)
from ssl3d.data.preparation.progress import Progress
from ssl3d.data.scans.arrays import DamagedArchive, Rows
from ssl3d.data.scans.folders import label_note
from ssl3d.data.scans.found import Scan
from ssl3d.errors import DataError

_SAMPLE = 4  # scans timed before the estimate


@dataclasses.dataclass(frozen=True)
class Work:
    """Scans that are to become the parts of a store, and the means.

    Attributes:
        scans: Scans in the order of the store.
        recipe: Steps that every scan takes.
        out: File of the store.
        workers: Number of processes; 0 works in this one.
        say: Function that prints a line.
    """

    scans: Sequence[Scan]
    recipe: Recipe
    out: Path
    workers: int
    say: Callable[[str], None]

    @property
    def folder(self) -> Path:
        """Folder of the parts, beside the store."""
        return self.out.with_name(f"{self.out.name}.partial")


def worker_count(workers: int | None, scans: int) -> int:
    """Return the number of workers asked for; by default one per core, at most 8 and one per scan."""
    if workers is not None:
        return workers
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, 8, scans))


def median_spacings(scans: Sequence[Scan], workers: int, say: Callable[[str], None]) -> dict[str, Triple]:
    """Compute the median spacing of each data set from the headers of its scans.

    Args:
        scans: Scans of all shards, so that every shard gets the same.
        workers: Number of processes; 0 works in this one.
        say: Function that prints a line.
    """
    each: dict[str, list[Triple]] = {}
    for scan, result in pool.run(spacing_of_scan, iter(scans), workers, start_worker):
        if isinstance(result, tuple):
            each.setdefault(scan.dataset, []).append(result)
    medians: dict[str, Triple] = {}
    datasets = dict.fromkeys(scan.dataset for scan in scans)
    for name in datasets:
        several = f"{name}: " if len(datasets) > 1 else ""
        if name not in each:
            say(f"--spacing median: {several}no scan here has a spacing; kept as they are")
            continue
        d, h, w = (float(round(v, 4)) for v in np.median(np.array(each[name]), axis=0))
        count = count_of(len(each[name]), "scan")
        say(f"{several}median spacing {d:g} x {h:g} x {w:g} mm (D, H, W) of {count}")
        medians[name] = (d, h, w)
    return medians


def make_parts(work: Work, names: Sequence[str]) -> list[tuple[str, str]]:
    """Make the parts that are missing, and return what was rejected.

    Args:
        work: Scans, recipe and means.
        names: Name of each scan's part.

    Raises:
        OSError: The disk is full.
    """
    missing = [i for i, name in enumerate(names) if not (work.folder / f"{name}.part").exists()]
    if len(missing) < len(names):
        work.say(f"going on: {len(names) - len(missing)} of {count_of(len(names), 'scan')} are done")
    rejected: list[tuple[str, str]] = []
    label_like: list[str] = []
    progress = Progress(len(missing))
    sampled = _sample(work, missing)
    chosen = set(sampled)
    order = sampled + [i for i in missing if i not in chosen]
    started, written, worked, unspaced = time.monotonic(), 0, 0.0, 0
    tasks = _tasks(work, names, order, rejected)
    sample = pool.run(process, itertools.islice(tasks, len(sampled)), work.workers, start_worker)
    rest = pool.run(process, tasks, work.workers, start_worker)
    for number, (task, result) in enumerate(itertools.chain(sample, rest), start=1):
        if isinstance(result, pool.Died):
            rejected.append((task.scan.source, result.reason))
        else:
            if result.full:
                raise OSError(28, result.full)
            rejected += result.rejected
            written += result.size
            worked += result.seconds
            unspaced += result.unspaced
            if result.label_like:
                label_like.append(task.scan.source)
        if number == len(sampled):
            progress.clear()
            share = _weight(work, missing) / max(_weight(work, sampled), 1)
            seconds = worked / max(work.workers, 1) * share
            work.say(_estimate(work, len(missing), seconds=seconds, disk=written * share))
        progress.show(number, time.monotonic() - started)
    progress.clear()
    if unspaced:
        work.say(f"{count_of(unspaced, 'scan')} without a spacing: not resampled")
    if label_like:
        work.say(label_note(sorted(label_like)))
    return rejected


# ------------------------------------------------------------------------------------------------


def _sample(work: Work, missing: list[int]) -> list[int]:
    """Choose the scans that are timed first: a few, spread over the whole; rows are read in order."""
    rows = any(work.scans[i].member for i in missing)
    step = 1 if rows else max(1, len(missing) // _SAMPLE)
    return missing[::step][:_SAMPLE]


def _weight(work: Work, indices: Sequence[int]) -> float:
    """Weigh scans by the size of their files; rows, and files without any size, by their number."""
    if any(work.scans[i].member for i in indices):
        return len(indices)
    return sum(stamp(p)[0] for i in indices for p in work.scans[i].all_files) or len(indices)


def _estimate(work: Work, count: int, *, seconds: float, disk: float) -> str:
    """Write the line that tells time and disk of the whole."""
    free = shutil.disk_usage(work.out.parent).free
    warning = " (NOT ENOUGH)" if 2 * disk > free else ""
    return (
        f"{count_of(count, 'scan')} with {count_of(work.workers, 'worker')}: about "
        f"{duration(seconds)}; {size(disk)} of disk, twice that while it is made, "
        f"{size(free)} are free{warning}"
    )


def _tasks(
    work: Work, names: Sequence[str], order: Sequence[int], rejected: list[tuple[str, str]]
) -> Iterator[ScanTask]:
    """Yield tasks in order; rows of archives are read here, one at a time, as they lie in one stream."""
    rows = Rows()
    damaged: set[Path] = set()
    for i in order:
        scan = work.scans[i]
        if scan.member is not None and scan.files[0][0] in damaged:
            continue
        task = ScanTask(scan, names[i], work.folder, work.recipe.of(scan.dataset))
        if scan.member is not None:
            try:
                task.row, task.row_mask, task.sha256 = rows.of(scan.files[0][0], *scan.member)
            except DamagedArchive as error:
                rejected.append((scan.source, str(error)))
                damaged.add(scan.files[0][0])
                continue
            except DataError as error:
                rejected.append((f"{scan.source}#{scan.member[0]}[{scan.member[1]}]", str(error)))
                continue
        yield task
