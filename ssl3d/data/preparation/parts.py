"""Parts of a store that is being made: those that still hold, whose they are, and what was refused."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ssl3d.amounts import count_of, printable
from ssl3d.data.preparation.process import MASK_ELSEWHERE, Recipe
from ssl3d.data.scans.found import Scan
from ssl3d.data.scans.read import with_voxels
from ssl3d.errors import DataError
from ssl3d.files import write_whole
from ssl3d.json_files import parse_json

if TYPE_CHECKING:
    import h5py

_BATCH = 4096  # records read at once
VERSION = 3  # of what `process` makes of a scan: raise it, and nothing made before is reused


def stamp(path: Path) -> tuple[int, int]:
    """Read size and time of change of a file; zeros if it is gone."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a name in a header that no file can have
        return 0, 0
    return status.st_size, status.st_mtime_ns


def digest_of(value: Any) -> str:
    """Hash JSON values to a short text."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def key_of(scan: Scan, stamps: dict[Path, tuple[int, int]]) -> str:
    """Hash a scan and the state of its files; a part is reused for the same key only."""
    files = [whole for path in scan.all_files for whole in with_voxels(path)]
    for path in files:
        if path not in stamps:
            stamps[path] = stamp(path)
    described = dataclasses.asdict(scan)
    del described["files"], described["mask"]
    if scan.ignore is None:
        del described["ignore"]
    else:
        described["ignore"] = scan.ignore.name
    if not scan.mask_boxes:  # as it was before there was such a thing
        del described["mask_boxes"]
    if scan.world_boxes is None:
        del described["world_boxes"]
    states = [[path.name, *stamps[path]] for path in files]
    return digest_of([described, [len(group) for group in scan.files], states])


def reuse_parts(
    scans: Sequence[Scan], recipe: Recipe, folder: Path, say: Callable[[str], None]
) -> list[str]:
    """Name the parts, in order; parts of an earlier call that still hold get these names, others go.

    Args:
        scans: Scans of the store, in order.
        recipe: Steps that every scan takes.
        folder: Folder of the parts.
        say: Function that prints a line.
    """
    stamps: dict[Path, tuple[int, int]] = {}
    options = digest_of([VERSION, dataclasses.asdict(recipe)])
    memo = folder / "options.json"
    names = [f"{i:08d}-{key_of(scan, stamps)}" for i, scan in enumerate(scans)]
    before = memo.read_text(encoding="utf-8", errors="replace") if memo.is_file() else ""
    if before != options:
        stale = list(folder.glob("*.part"))
        for path in stale:
            path.unlink()
        if stale:
            say(f"{folder.name}: {count_of(len(stale), 'volume')} made with other options, not reused")
        memo.write_text(options, encoding="utf-8")
        return names
    wanted = {name.partition("-")[2]: name for name in names}
    for path in folder.glob("*.part"):
        if not _whole(path):  # the machine went down before the disk had it
            path.unlink()
            continue
        number, _, rest = path.stem.partition("-")
        key, _, frame = rest.partition("_")
        name = wanted.get(key)
        if name is None:
            path.unlink()
        elif name.partition("-")[0] != number:
            path.rename(folder / f"{name}{'_' if frame else ''}{frame}.part")
    return names


def _whole(path: Path) -> bool:
    from ssl3d.data.store.writer import part_record

    try:
        part_record(path)
    except DataError:
        return False
    return True


def keep_only(folder: Path, names: Sequence[str]) -> None:
    """Remove what does not belong: temporary files, and parts by an orphaned worker of another call."""
    wanted = set(names)
    for path in folder.iterdir():
        if path.name.endswith(".tmp") or (
            path.suffix == ".part" and path.stem.partition("_")[0] not in wanted
        ):
            path.unlink(missing_ok=True)


class InUse(DataError):
    """A store that another process is making."""


@contextmanager
def locked(folder: Path, out: Path) -> Iterator[None]:
    """Make the folder of the parts, and refuse a second `prepare` of the same store at the same time.

    What a killed call left beside the store while it assembled it is removed.

    Raises:
        InUse: Another process is making the store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        if not _lock(lock, wait=False):
            raise InUse(f"{out}: another ssl3d prepare is making it right now")
        for path in leftovers(out):
            path.unlink(missing_ok=True)
        yield


def leftovers(out: Path) -> list[Path]:
    """List the temporary files that were to become a file, and that a killed process left beside it."""
    if not out.parent.is_dir():
        return []
    start = f".{out.name}."
    return [path for path in out.parent.iterdir() if path.name.startswith(start) and path.suffix == ".tmp"]


def _lock(file: IO[str], wait: bool) -> bool:
    """Lock a file for this process, until it is closed; tell whether that was possible."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    # A lock of the process (not of the descriptor): workers do not inherit it, so it ends with us.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process changes a file; what a killed one left beside it is removed."""
    guard = path.with_name(f".{path.name}.lock")
    while True:
        with open(guard, "w", encoding="utf-8") as file:
            _lock(file, wait=True)
            # The one before removed the file: another may have a new one of that name, and its lock.
            if not guard.exists() or os.fstat(file.fileno()).st_ino != guard.stat().st_ino:
                continue
            try:
                for left in leftovers(path):
                    left.unlink(missing_ok=True)
                yield
            finally:
                guard.unlink(missing_ok=True)
            return


def store_settings(path: Path) -> tuple[dict[str, Any], list[Any], str]:
    """Read the settings and rejected files of a store, or what is wrong with it."""
    import h5py

    from ssl3d.data.store.index import FORMAT

    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != FORMAT:
                return {}, [], "an HDF5 file but not a store"
            return (
                parse_json(file["settings"][()].tobytes()),
                parse_json(file["rejected"][()].tobytes()),
                "",
            )
    except (OSError, KeyError, ValueError):
        return {}, [], "not a whole store"


def store_counts(path: Path) -> tuple[int, int]:
    """Count the volumes and subjects of a store."""
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        rows = file["index/table"]["identity"]
    return len(rows), len(np.unique(rows))


def odd_masks(file: h5py.File) -> dict[str, list[str]]:
    """Find the scans whose masks do not fit them, by the provenance in a store.

    Args:
        file: Store, open for reading.

    Returns:
        Sources, in order, of the scans whose mask's header places it somewhere else ("elsewhere"), and of
        those whose mask was of another grid ("regridded").
    """
    odd: dict[str, list[str]] = {"elsewhere": [], "regridded": []}
    rows = file["index/table"][()]
    masked = np.flatnonzero(rows["has_mask"])
    for begin in range(0, len(masked), _BATCH):
        own = rows[masked[begin : begin + _BATCH]]
        start = int(own["provenance_at"].min())
        ends = own["provenance_at"] + own["provenance_length"]
        text = file["provenance"][start : int(ends.max())].tobytes()
        for at, end in zip(own["provenance_at"].tolist(), ends.tolist(), strict=True):
            line = text[at - start : end - start]
            if b'"mask":"' not in line:  # nearly all: they need not be parsed
                continue
            record = parse_json(line)
            how = record["done"].get("mask")
            if how is not None:
                odd["elsewhere" if how == MASK_ELSEWHERE else "regridded"].append(record["source"])
    return odd


def mask_lines(odd: dict[str, list[str]]) -> list[str]:
    """Write the lines that tell of `odd_masks`."""
    said = {
        "elsewhere": "placed elsewhere than the scan by its header, taken voxel by voxel all the same",
        "regridded": "of another grid than the scan, resampled to it",
    }
    return [
        f"{count_of(len(odd[kind]), 'mask')} {remark}: {', '.join(odd[kind][:3])}"
        + (f" and {len(odd[kind]) - 3} more" if len(odd[kind]) > 3 else "")
        for kind, remark in said.items()
        if odd.get(kind)
    ]


def write_beside(out: Path, name: str, rows: Sequence[tuple[str, str]]) -> None:
    """List paths and reasons in a table beside the store; lines of other stores there stay.

    Args:
        out: File of the store.
        name: Name of the table, one of `OWN_TABLES`.
        rows: (path, reason); a table without any line is removed.
    """
    path = out.parent / name
    if not rows and not path.is_file():
        return
    with _alone(path):
        others: list[dict[str, str]] = []
        if path.is_file():
            with open(path, encoding="utf-8", newline="") as file:
                others = [row for row in csv.DictReader(file) if row.get("store") != out.name]
        if not others and not rows:
            path.unlink(missing_ok=True)
            return
        table = io.StringIO()
        writer = csv.DictWriter(table, ("path", "reason", "store"), extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(others)
        writer.writerows(
            {"path": printable(source), "reason": printable(reason), "store": out.name}
            for source, reason in rows
        )
        write_whole(path, table.getvalue())
