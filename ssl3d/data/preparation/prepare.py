"""Scans to a store: finds them, hands them to workers, survives their deaths and its own, assembles."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from ssl3d import memory
from ssl3d.amounts import count_of, duration, printable, size
from ssl3d.data.cache import cache_folder, make_cache
from ssl3d.data.geometry import Triple
from ssl3d.data.preparation import keys
from ssl3d.data.preparation.options import PrepareOptions as PrepareOptions
from ssl3d.data.preparation.options import other_options, plain_options
from ssl3d.data.preparation.parts import (
    VERSION,
    InUse,
    digest_of,
    keep_only,
    key_of,
    leftovers,
    locked,
    mask_lines,
    odd_masks,
    reuse_parts,
    store_counts,
    store_settings,
    write_beside,
)
from ssl3d.data.preparation.remarks import left_out_lines, remarks
from ssl3d.data.preparation.work import Work, make_parts, median_spacings, worker_count
from ssl3d.data.scans.find import find, in_part
from ssl3d.data.scans.found import Found, Scan
from ssl3d.errors import DataError, TransientError, is_transient, reason_of, transient_reported

_LOOK_AGAIN = 1.0  # seconds between two looks at a store that another process makes


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a call of `prepare` made.

    Attributes:
        store: File of the store; it does not exist if there was nothing usable.
        volumes: Number of volumes in the store.
        subjects: Number of subjects in the store.
        rejected: Number of files refused.
        reused: Whether the store was there already.
        seconds: Duration of the call.
        empty_shard: Whether no subject falls to this shard.
        short_of_memory: Number of files refused, when a store was made before, for want of memory.
    """

    store: Path
    volumes: int
    subjects: int
    rejected: int
    reused: bool = False
    seconds: float = 0.0
    empty_shard: bool = False
    short_of_memory: int = 0


def prepare(options: PrepareOptions, output: TextIO | None = None) -> Summary:
    """Make a store of scans, or go on where it was stopped.

    Args:
        options: Sources, store and steps of preparation.
        output: Stream to which progress is told; stdout by default.

    Raises:
        DataError: Nothing is found, or the store there is of other data or options.
        TransientError: The disk is full, or memory, a process or the network failed, twice; what is done
            stays.
    """

    def say(line: str) -> None:
        print(printable(line), file=output or sys.stdout, flush=True)

    out = options.store()
    with transient_reported(str(out), f"what is done stays in {out.name}.partial: call again"):
        return _prepare(options, out, say)


def _prepare(options: PrepareOptions, out: Path, say: Callable[[str], None]) -> Summary:
    begun = time.monotonic()
    if out.is_dir():
        raise DataError(f"{out}: a folder; --out names a file")
    contents = find(options.sources, options.wanted())
    for note in contents.notes:
        say(note)
    index, count = options.shard()
    scans = [s for s in contents.scans if in_part(f"{s.dataset}/{s.subject}", index, count)]
    refused = [r for r in contents.rejected if in_part(r[0], index, count)]
    left_out = [r for r in contents.left_out if in_part(r[0], index, count)]
    if not scans and contents.scans:
        say(
            f"{out}: no subject of {len(contents.scans):,} scans falls to part {options.part}; "
            "nothing to do"
        )
        return Summary(out, 0, 0, len(refused), empty_shard=True)
    signed = _signed(scans, refused, contents, options)
    work = Work(scans, options.recipe(None, {}), out, worker_count(options.workers, len(scans)), say)
    summary = _finished(out, signed, options)
    if summary is not None:
        say(f"{out}: already prepared: {count_of(summary.volumes, 'volume')}, {summary.rejected} rejected")
        if summary.short_of_memory:
            say(
                f"{count_of(summary.short_of_memory, 'file')} of them for want of memory: {memory.FLAG} "
                "gives it, --overwrite prepares again"
            )
        _tidy(work)
    else:
        spacing, medians = _spacing(options, contents, work.workers, say)
        work = dataclasses.replace(work, recipe=options.recipe(spacing, medians))
        settings = {
            "prepare": signed,
            "options": plain_options(options),
            "spacing": medians or spacing,
            "mask_labels": contents.label_names,
            "mask_ignore": contents.ignore_labels,
            "mask_regions": contents.regions,
            "box_labels": _box_names(contents, options),
            "modalities": _modalities(scans),
            "version": VERSION,
        }
        rejected = _make_store(work, refused, left_out, settings, overwrite=options.overwrite)
        summary = _summary(work, rejected, time.monotonic() - begun)
    if summary.volumes:
        import h5py

        with h5py.File(out, "r", locking=False) as file:
            lines = remarks(out) + mask_lines(odd_masks(file))
        for line in lines:
            say(line)
        left_out += [(path, reason) for path, reason in store_settings(out)[0].get("label_like", ())]
        if summary.reused:  # files may have come since, that are not read
            write_beside(out, "left_out.csv", left_out)
    for line in left_out_lines(left_out):
        say(line)
    return summary


def _tidy(work: Work) -> None:
    """Remove what a call left that was killed after the store was there."""
    if work.folder.exists() or leftovers(work.out):
        with contextlib.suppress(DataError), locked(work.folder, work.out):
            shutil.rmtree(work.folder, ignore_errors=True)


def _make_store(
    work: Work,
    refused: Sequence[tuple[str, str]],
    left_out: Sequence[tuple[str, str]],
    settings: dict[str, Any],
    *,
    overwrite: bool,
) -> list[tuple[str, str]]:
    """Make the missing parts and the store of all, with tables beside it of what was refused and left out.

    Args:
        work: Scans, recipe and means.
        refused: (source, reason) of what was refused while scans were looked for.
        left_out: (source, reason) of what was found and is not used.
        settings: Settings that the store keeps.
        overwrite: Whether an older store goes where nothing usable takes its place.

    Returns:
        (source, reason) of all that was refused.

    Raises:
        DataError: The store cannot be written.
        TransientError: The disk is full, or memory, a process or the network failed.
    """
    out, folder = work.out, work.folder
    try:
        with locked(folder, out):
            names = reuse_parts(work.scans, work.recipe, folder, work.say)
            parts = make_parts(work, names)
            rejected = sorted([*refused, *parts.rejected])
            keep_only(folder, names)
            if any(folder.glob("*.part")):
                from ssl3d.data.store.writer import assemble

                _check_room(folder, out)
                rows = [{"path": printable(path), "reason": printable(reason)} for path, reason in rejected]
                assemble(folder, out, {**settings, "label_like": parts.label_like}, rows)
            elif overwrite:
                out.unlink(missing_ok=True)
            write_beside(out, "rejected.csv", rejected)
            write_beside(out, "left_out.csv", [*left_out, *parts.label_like])
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if is_transient(error):
            raise
        raise DataError(f"{out}: {reason_of(error)}") from error
    return rejected


def _check_room(folder: Path, out: Path) -> None:
    """Look whether the disk has room for the store, as large as its parts together.

    Raises:
        TransientError: It has not.
    """
    needed = sum(path.stat().st_size for path in folder.glob("*.part"))
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise TransientError(
            f"{out}: the store needs {size(needed)}, and {size(free)} are free on the disk; what is done "
            f"stays in {folder.name}: make room and call again"
        )


def _summary(work: Work, rejected: Sequence[object], seconds: float) -> Summary:
    """Summarise what was made, and say it."""
    out = work.out
    where = f" (see {out.parent / 'rejected.csv'})" if rejected else ""
    if not out.exists():
        work.say(f"{out}: nothing usable: 0 volumes, {len(rejected)} rejected{where}")
        return Summary(out, 0, 0, len(rejected), seconds=seconds)
    volumes, subjects = store_counts(out)
    work.say(
        f"{out}: {count_of(volumes, 'volume')} of {count_of(subjects, 'subject')}, {len(rejected)} rejected"
        f"{where}, {size(out.stat().st_size)}, {duration(seconds)}"
    )
    return Summary(out, volumes, subjects, len(rejected), seconds=seconds)


def prepare_cached(paths: Sequence[str | Path], **options: Any) -> Path:
    """Return the store of these scans from the cache ($SSL3D_CACHE, else ~/.cache/ssl3d), made if missing.

    The store is keyed by the files that are read (paths, sizes, times of change; of a list its content
    and the files that it names) and the options: when either changes another one is made.

    Args:
        paths: Folders and files, as `ssl3d prepare` takes them.
        options: Options of `PrepareOptions`.

    Raises:
        DataError: Nothing is usable.
    """
    # Not resolved: of a link into an annex the name is the scan's, that of what it points to is not.
    roots = [Path(os.path.abspath(path)) for path in paths]
    for root in roots:
        if not root.exists():
            raise DataError(f"{root}: no such file or folder")
    unkeyed = {key: value for key, value in options.items() if key not in ("workers", "out", "overwrite")}
    ignored = str(options.get("ignore_mask") or "")
    read = roots + [Path(os.path.abspath(ignored))] * os.path.isdir(ignored)
    listing = [state for root in read for state in keys.state_of(root)]
    key = digest_of([VERSION, keys.FOUND, [str(root) for root in roots], listing, unkeyed])
    cache = cache_folder()
    name = re.sub(r"[^\w\-]+", "-", roots[0].stem)[:40]
    out = cache / f"{name}-{key}.h5"
    if out.is_file():
        return out
    make_cache(cache)
    unkeyed["workers"] = options.get("workers")
    full = PrepareOptions(sources=tuple(map(str, roots)), out=str(out), **unkeyed)
    print(f"preparing {', '.join(map(str, paths))} into {out}", file=sys.stderr)
    waited = False
    while True:
        try:
            summary = prepare(full, output=sys.stderr)
            break
        except InUse:
            if not waited:
                print(f"waiting for another process that prepares {out}", file=sys.stderr)
            waited = True
            time.sleep(_LOOK_AGAIN)
            if out.is_file():
                return out
    if not summary.volumes:
        raise DataError(
            f"{paths[0]}: nothing usable in it ({summary.rejected} rejected, see {cache}/rejected.csv)"
        )
    return out


# ------------------------------------------------------------------------------------------------


def _spacing(
    options: PrepareOptions, contents: Found, workers: int, say: Callable[[str], None]
) -> tuple[Triple | None, dict[str, Triple]]:
    """Return the target spacing, and that of each data set where there are several.

    A median is that of all scans found, so every shard gets the same.
    """
    if options.spacing == "keep":
        return None, {}
    if not isinstance(options.spacing, str):
        return options.spacing, {}
    medians = median_spacings(contents.scans, workers, say)
    if len({scan.dataset for scan in contents.scans}) > 1:
        return None, medians
    return next(iter(medians.values()), None), {}


def _modalities(scans: Sequence[Scan]) -> dict[str, str]:
    """Return the modality (DICOM code) of each data set whose scans all say the same."""
    kinds_of: dict[str, set[str]] = {}
    for scan in scans:
        kinds_of.setdefault(scan.dataset, set()).add(scan.modality)
    return {
        name: kinds.pop() for name, kinds in sorted(kinds_of.items()) if len(kinds) == 1 and "" not in kinds
    }


def _box_names(contents: Found, options: PrepareOptions) -> dict[str, dict[str, str]]:
    """Map box labels to kinds of objects, per data set; around masks those are what the values mean."""
    return (contents.label_names if options.boxes == "masks" else {}) | contents.box_names


def _signed(
    scans: Sequence[Scan], refused: Sequence[tuple[str, str]], contents: Found, options: PrepareOptions
) -> dict[str, Any]:
    stamps: dict[Path, tuple[int, int]] = {}
    data: list[Any] = [[key_of(scan, stamps) for scan in scans], sorted(refused)]
    if contents.ignore_labels or contents.regions:  # else it is as before there were such things
        data += [contents.ignore_labels, contents.regions]
    return {
        "options": digest_of([VERSION, plain_options(options)]),
        "data": digest_of(data),
        "found": len(scans),
    }


def _finished(out: Path, signed: dict[str, Any], options: PrepareOptions) -> Summary | None:
    """Describe the store that is there already, if it is the one wanted; None if none is or it may go."""
    if not out.exists():
        return None
    settings, rejected, reason = store_settings(out)
    if not reason:
        before = settings.get("prepare", {})
        if before == signed:
            volumes, subjects = store_counts(out)
            short = sum(str(row.get("reason")).endswith(f" of {memory.FLAG}") for row in rejected)
            return Summary(out, volumes, subjects, len(rejected), reused=True, short_of_memory=short)
        same_options = before.get("options") == signed["options"]
        reason = (
            f"a store of other data ({before.get('found', '?')} scans found then, {signed['found']} now, "
            "or files changed)"
            if same_options
            else other_options(settings, options)
        )
    if options.overwrite:
        return None
    raise DataError(f"{out}: exists, {reason}; --overwrite replaces it, --out names another")
