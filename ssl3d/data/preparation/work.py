"""The work of `prepare`: workers make scans parts of a store, and an estimate tells what that takes."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ssl3d import memory
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
from ssl3d.data.scans.read import is_whole, suffix_of
from ssl3d.errors import DataError, TransientError

_SAMPLE = 4  # scans of each format timed before the estimate
_STORE_ITSELF = 130_000  # bytes of a store but its volumes
_ROWS = "rows"  # of an archive, which are alike, and are read in their order
_LABEL_LIKE = "its values are those of a label map"


@dataclasses.dataclass
class Made:
    """What became of scans that were made parts.

    Attributes:
        rejected: (source, reason) of what was refused.
        label_like: (source, reason) of what is no scan by its values.
    """

    rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    label_like: list[tuple[str, str]] = dataclasses.field(default_factory=list)


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
        if isinstance(result, pool.Died):
            if result.transient:  # without it the median would be another
                raise TransientError(f"{scan.source}: {result.reason}, twice; call again")
        elif result is not None:
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


def make_parts(work: Work, names: Sequence[str]) -> Made:
    """Make the parts that are missing.

    Args:
        work: Scans, recipe and means.
        names: Name of each scan's part.

    Raises:
        OSError: The disk is full.
        TransientError: A scan failed twice, the second time alone, by no fault of its own.
    """
    missing = [i for i, name in enumerate(names) if not (work.folder / f"{name}.part").exists()]
    if len(missing) < len(names):
        work.say(f"going on: {len(names) - len(missing)} of {count_of(len(names), 'scan')} are done")
    parts = Made()
    progress = Progress(len(missing))
    estimate = Estimate(
        {i: _kind(work.scans[i]) for i in missing}, {i: _weight(work.scans[i]) for i in missing}
    )
    order = estimate.sample + [i for i in missing if i not in set(estimate.sample)]
    places = {names[i]: i for i in missing}
    started, unspaced = time.monotonic(), 0
    tasks = _tasks(work, names, order, parts.rejected)
    results = pool.run(process, tasks, work.workers, start_worker, _with_all_memory)
    for number, (task, result) in enumerate(results, start=1):
        seconds, written = 0.0, 0
        if isinstance(result, pool.Died):
            if result.transient:
                raise TransientError(
                    f"{task.scan.source}: {result.reason}, twice, the second time alone; what is done "
                    f"stays in {work.folder.name}: call again"
                )
            parts.rejected.append((task.scan.source, result.reason))
        else:
            if result.full:
                raise OSError(errno.ENOSPC, "no space left on the disk")
            parts.rejected += result.rejected
            seconds, written = result.seconds, result.size
            unspaced += result.unspaced
            if result.label_like:
                parts.label_like.append((task.scan.source, _LABEL_LIKE))
        if estimate.add(places[task.name], seconds, written):
            progress.clear()
            work.say(_estimate_line(work, len(missing), *estimate.whole()))
        progress.show(number, time.monotonic() - started)
    progress.clear()
    if unspaced:
        work.say(f"{count_of(unspaced, 'scan')} without a spacing: not resampled")
    if parts.label_like:
        work.say(label_note(sorted(path for path, _ in parts.label_like)))
    return parts


class Estimate:
    """Estimate of the time and disk that scans take, by a few of each kind that are done first.

    What a scan takes is in proportion to the size of its file, and the proportion is that of its kind: a
    compressed volume becomes many times as large, a picture may not. Of each kind the sample is spread over
    its bytes, so that large files, which take the most, are in it for sure; what a kind takes is the mean
    of what the sample takes per byte, times all its bytes (Hansen and Hurwitz 1943, "On the theory of
    sampling from finite populations").

    Args:
        kinds: Kind of each scan, by its number.
        weights: Bytes of each scan, by its number.
    """

    def __init__(self, kinds: dict[int, str], weights: dict[int, float]):
        self._weights = weights
        members: dict[str, list[int]] = {}
        for scan, kind in kinds.items():
            members.setdefault(kind, []).append(scan)
        self._totals = {kind: sum(weights[i] for i in own) for kind, own in members.items()}
        self._drawn = {
            kind: own[:_SAMPLE] if kind == _ROWS else _spread(own, weights) for kind, own in members.items()
        }
        self.sample = sorted({i for own in self._drawn.values() for i in own})
        self._waiting = set(self.sample)
        self._taken: dict[int, tuple[float, float]] = {}

    def add(self, scan: int, seconds: float, written: float) -> bool:
        """Note what a scan took; tell whether the sample is whole now."""
        if scan not in self._waiting:
            return False
        self._waiting.remove(scan)
        self._taken[scan] = seconds, written
        return not self._waiting

    def whole(self) -> tuple[float, float]:
        """Return the seconds of work and the bytes that all scans take."""
        seconds, written = 0.0, float(_STORE_ITSELF)
        for kind, drawn in self._drawn.items():
            share = self._totals[kind] / len(drawn)
            seconds += share * sum(self._taken[i][0] / self._weights[i] for i in drawn)
            written += share * sum(self._taken[i][1] / self._weights[i] for i in drawn)
        return seconds, written


def _spread(scans: Sequence[int], weights: dict[int, float]) -> list[int]:
    """Draw scans at even steps of their bytes, from small to large; a large one perhaps several times."""
    by_size = sorted(scans, key=lambda i: (weights[i], i))
    ends = np.cumsum([weights[i] for i in by_size])
    count = min(_SAMPLE, len(scans))
    places = np.searchsorted(ends, (np.arange(count) + 0.5) / count * ends[-1])
    return [by_size[int(place)] for place in places]


# ------------------------------------------------------------------------------------------------


def _with_all_memory(task: ScanTask) -> ScanTask:
    """Return a task as it is tried alone, when it may take all the memory that others shared."""
    return dataclasses.replace(task, share=None)


def _kind(scan: Scan) -> str:
    """Return what decides how much work a byte of a scan is: its format, and whether it has a mask."""
    if scan.member is not None:
        return _ROWS
    first = next(group[0] for group in scan.files if group)
    suffix = suffix_of(first) if is_whole(first) else "slices"
    return suffix if scan.mask is None else f"{suffix} with a mask"


def _weight(scan: Scan) -> float:
    """Weigh a scan by the size of its files; a row, and files without any size, as one."""
    if scan.member is not None:
        return 1.0
    return float(sum(stamp(path)[0] for group in scan.files for path in group)) or 1.0


def _estimate_line(work: Work, count: int, seconds: float, disk: float) -> str:
    """Write the line that tells time and disk of the whole."""
    free = shutil.disk_usage(work.out.parent).free
    warning = " (NOT ENOUGH)" if 2 * disk > free else ""
    return (
        f"{count_of(count, 'scan')} with {count_of(work.workers, 'worker')}: about "
        f"{duration(seconds / max(work.workers, 1))}; {size(disk)} of disk, twice that while it is made, "
        f"{size(free)} are free{warning}"
    )


def _tasks(
    work: Work, names: Sequence[str], order: Sequence[int], rejected: list[tuple[str, str]]
) -> Iterator[ScanTask]:
    """Yield tasks in order; rows of archives are read here, one at a time, as they lie in one stream."""
    rows = Rows()
    damaged: set[Path] = set()
    share = memory.budget() // work.workers if work.workers > 1 else None
    for i in order:
        scan = work.scans[i]
        if scan.member is not None and scan.files[0][0] in damaged:
            continue
        task = ScanTask(scan, names[i], work.folder, work.recipe.of(scan.dataset), share=share)
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
