"""Scans to a store: finds them, hands them to workers, survives their deaths and its own, assembles."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from ssl3d.amounts import count_of, duration, size
from ssl3d.data.geometry import Triple
from ssl3d.data.preparation import keys, pool
from ssl3d.data.preparation.parts import (
    VERSION,
    digest_of,
    keep_only,
    key_of,
    locked,
    mask_lines,
    odd_masks,
    reuse_parts,
    stamp,
    store_counts,
    store_settings,
    write_rejected,
)
from ssl3d.data.preparation.process import Recipe, Task, process, spacing_of_scan, start_worker
from ssl3d.data.preparation.progress import Progress
from ssl3d.data.preparation.remarks import remarks
from ssl3d.data.scans.find import find, in_part
from ssl3d.data.scans.found import Found, Scan, Wanted
from ssl3d.data.scans.read import STORES
from ssl3d.errors import DataError

_SAMPLE = 4  # scans timed before the estimate


@dataclasses.dataclass
class PrepareOptions:
    """Turns folders and files of scans into one store, ready for training.

    Attributes:
        sources: Folders and files: NIfTI, NRRD, MHA, DICOM, MedMNIST .npz, PNG and JPEG, folders with
            dataset.json (MSD, nnU-Net), BIDS, or a CSV with a column path and, if you like, subject,
            label, split, mask.
        out: The store to make.
        dataset: Name of the data set; by default what dataset.json says, else the folder's name.
        channels: File-name parts that tell the sequences of one subject apart, such as t1 flair; they
            become channels, a missing one is marked and zero.
        label: Column of a CSV that holds the labels, such as survival_days; by default label, class,
            class_index or diagnosis.
        masks: File-name part that tells the label map beside a scan, such as seg; kept as its mask.
        take_labels: Take label-like files for scans too.
        spacing: Voxel size in mm along D H W; or keep, every scan's own (the default: nothing is
            interpolated, and the spacing is stored); or median, the median over the data set, of each
            data set its own (Med3D).
        normalize: ct (clip to the window, 0 to 1), mr (clip to the foreground's 0.5 and 99.5
            percentiles, z-score over the foreground), unit (0 to 1), none, or auto: by the header's
            modality, else by the values, for each scan.
        nan: Value to put in place of NaN, as SPM writes it for the background; scans with NaN are refused
            otherwise.
        window: Lowest and highest value, instead of -1000 1000 HU (ct) or the percentiles.
        crop_foreground: Cut off the background around the foreground.
        frames: What becomes of 4D files: split into volumes, channels of one volume, or refuse.
        colour: What becomes of pictures: grey, or rgb (three channels, for grey ones too). With rgb they
            are taken for natural images: folders are their classes, every picture is a subject of its own
            unless a list says whose it is, and a byte stays what it is, divided by 255 when it is read.
        boxes: Boxes of objects: listed (beside pictures COCO's instances.json or a CSV as VinDr-CXR's;
            beside volumes MONAI's JSON, LUNA16's annotations.csv or a CSV of x_mm, y_mm, z_mm, w_mm, h_mm,
            d_mm), or masks (around the connected components of each value of the mask).
        box_readers: What becomes of boxes that several readers drew around one object: merge (their mean),
            or keep.
        max_voxels: Refuse scans with more voxels than this, before reading them.
        workers: Processes; by default one per core, at most 8; 0 works without any.
        part: I/N makes shard I of N (from 1), all volumes of a subject in one; the name gets -I-of-N.
        overwrite: Replace a store made of other data or with other options.
    """

    sources: tuple[str, ...] = dataclasses.field(metadata={"positional": True})
    out: str = "store.h5"
    dataset: str = ""
    channels: tuple[str, ...] = ()
    label: str = ""
    masks: str = ""
    take_labels: bool = False
    spacing: tuple[float, float, float] | Literal["keep", "median"] = "keep"
    normalize: Literal["auto", "ct", "mr", "unit", "none"] = "auto"
    nan: float | None = None
    window: tuple[float, float] | None = None
    crop_foreground: bool = False
    frames: Literal["split", "channels", "refuse"] = "split"
    colour: Literal["grey", "rgb"] = "grey"
    boxes: Literal["listed", "masks"] = "listed"
    box_readers: Literal["merge", "keep"] = "merge"
    max_voxels: int = 2**30
    workers: int | None = None
    part: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.sources = tuple(str(source) for source in self.sources)
        self.channels = tuple(self.channels)
        if not self.sources:
            raise ValueError("sources: name at least one folder or file")
        if not self.out.endswith(STORES):
            raise ValueError(f"out is {self.out!r}; expected a name that ends in .h5")
        if isinstance(self.spacing, str):
            if self.spacing not in ("keep", "median"):
                raise ValueError(
                    f"spacing is {self.spacing!r}; expected keep, median or three numbers (D H W, mm)"
                )
        else:
            self.spacing = _triple(self.spacing)
        if self.window is not None:
            self.window = (float(self.window[0]), float(self.window[1]))
            if not self.window[0] < self.window[1]:
                raise ValueError(f"window is {self.window}; expected the lower value first")
        for field, known in (("boxes", ("listed", "masks")), ("box_readers", ("merge", "keep"))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected {' or '.join(known)}")
        if self.nan is not None and not np.isfinite(self.nan):
            raise ValueError(f"nan is {self.nan}; expected a finite value to put in place of NaN")
        if self.max_voxels < 1:
            raise ValueError(f"max_voxels is {self.max_voxels}; expected 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}; expected 0 or more")
        if len({channel.lower() for channel in self.channels}) < len(self.channels):
            raise ValueError(f"channels are {' '.join(self.channels)}; expected different names")
        self.shard()

    def shard(self) -> tuple[int, int]:
        """(I, N) of `part`; (1, 1) without."""
        if not self.part:
            return 1, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"part is {self.part!r}; expected I/N with I from 1 to N, such as 2/8")
        return int(match[1]), int(match[2])

    def store(self) -> Path:
        """Where the store goes, with the shard in its name."""
        path = Path(self.out)
        index, count = self.shard()
        return path.with_name(f"{path.stem}-{index}-of-{count}{path.suffix}") if self.part else path


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `prepare` made.

    Attributes:
        store: The file; it does not exist if there was nothing usable.
        volumes: In it.
        subjects: In it.
        rejected: Files refused.
        reused: Whether the store was there already.
        seconds: It took.
        empty_shard: Whether no subject falls to this shard.
    """

    store: Path
    volumes: int
    subjects: int
    rejected: int
    reused: bool = False
    seconds: float = 0.0
    empty_shard: bool = False


def prepare(options: PrepareOptions, output: TextIO | None = None) -> Summary:
    """Makes a store of scans, or goes on where it was stopped.

    Args:
        options: What of, where to, and how.
        output: Where what happens is told; stdout by default.

    Raises:
        DataError: Nothing is found, the store there is of other data or options, or the disk is full.
    """

    def say(line: str) -> None:
        print(line, file=output or sys.stdout, flush=True)

    begun = time.monotonic()
    out = options.store()
    if out.is_dir():
        raise DataError(f"{out}: a folder; --out names a file")
    wanted = Wanted(options.dataset, options.channels, options.masks, options.take_labels, options.colour,
                    options.box_readers, options.label)  # fmt: skip
    found = find(options.sources, wanted)
    for note in found.notes:
        say(note)
    index, count = options.shard()
    scans = [s for s in found.scans if in_part(f"{s.dataset}/{s.subject}", index, count)]
    refused = [r for r in found.rejected if in_part(r[0], index, count)]
    workers = _worker_count(options.workers, len(scans))
    if not scans and found.scans:
        say(f"{out}: no subject of {len(found.scans):,} scans falls to part {options.part}; nothing to do")
        return Summary(out, 0, 0, len(refused), empty_shard=True)
    signed = _signed(scans, refused, options)
    done = _finished(out, signed, options)
    if done is not None:
        say(f"{out}: already prepared: {count_of(done.volumes, 'volume')}, {done.rejected} rejected")
        for line in remarks(out) + mask_lines(odd_masks(out)):
            say(line)
        return done
    spacing, medians = _spacing(options, found, workers, say)
    recipe = Recipe(
        spacing,
        options.normalize,
        options.window,
        options.crop_foreground,
        options.frames,
        options.colour,
        options.max_voxels,
        options.boxes,
        tuple(medians.items()),
        options.nan,
    )
    folder = out.with_name(f"{out.name}.partial")
    try:
        with locked(folder, out):
            todo = reuse_parts(scans, recipe, folder, say)
            made = _make(todo, scans, recipe, folder, workers, out, say)
            rejected = refused + made
            keep_only(folder, todo)
            rows = [{"path": path, "reason": reason} for path, reason in sorted(rejected)]
            written = sorted(folder.glob("*.part"))
            if written:
                from ssl3d.data.store.writer import assemble

                settings = {
                    "prepare": signed,
                    "options": _plain_options(options),
                    "spacing": medians or spacing,
                    "mask_labels": found.label_names,
                    "box_labels": _box_names(found, options),
                    "version": VERSION,
                }
                assemble(folder, out, settings, rows)
            elif options.overwrite:
                out.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        if _is_full(error):
            raise DataError(
                f"{out}: no space left on the disk; what is done stays in {folder.name}: call again"
            ) from error
        raise DataError(f"{out}: {error.strerror or error}") from error
    write_rejected(out, rows)
    seconds = time.monotonic() - begun
    if not written:
        say(f"{out}: nothing usable: 0 volumes, {len(rejected)} rejected{_where(out, rejected)}")
        return Summary(out, 0, 0, len(rejected), seconds=seconds)
    volumes, subjects = store_counts(out)
    say(
        f"{out}: {count_of(volumes, 'volume')} of {count_of(subjects, 'subject')}, {len(rejected)} rejected"
        f"{_where(out, rejected)}, {size(out.stat().st_size)}, {duration(seconds)}"
    )
    for line in remarks(out) + mask_lines(odd_masks(out)):
        say(line)
    return Summary(out, volumes, subjects, len(rejected), seconds=seconds)


def prepare_cached(paths: Sequence[str | Path], **options: Any) -> Path:
    """The store of these scans from the cache ($SSL3D_CACHE, else ~/.cache/ssl3d), made if missing.

    The store is keyed by the files that are read (paths, sizes, times of change; of a list its content
    and the files that it names) and the options: when either changes another one is made.

    Args:
        paths: What `ssl3d prepare` takes.
        options: Of `PrepareOptions`.

    Raises:
        DataError: Nothing is usable.
    """
    from ssl3d.data.cache import cache_folder

    # Not resolved: of a link into an annex the name is the scan's, that of what it points to is not.
    roots = [Path(os.path.abspath(path)) for path in paths]
    for root in roots:
        if not root.exists():
            raise DataError(f"{root}: no such file or folder")
    unkeyed = {key: value for key, value in options.items() if key not in ("workers", "out", "overwrite")}
    listing = [state for root in roots for state in keys.state_of(root)]
    key = digest_of([VERSION, keys.FOUND, [str(root) for root in roots], listing, unkeyed])
    cache = cache_folder()
    name = re.sub(r"[^\w\-]+", "-", roots[0].stem)[:40]
    out = cache / f"{name}-{key}.h5"
    if out.is_file():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    given = {"workers": options.get("workers"), **unkeyed}
    made = PrepareOptions(sources=tuple(map(str, roots)), out=str(out), **given)
    print(f"preparing {', '.join(map(str, paths))} into {out}", file=sys.stderr)
    summary = prepare(made, output=sys.stderr)
    if not summary.volumes:
        raise DataError(
            f"{paths[0]}: nothing usable in it ({summary.rejected} rejected, see {cache}/rejected.csv)"
        )
    return out


# Identity -----------------------------------------------------------------------------------------


def _triple(values: Sequence[float]) -> Triple:
    spacing = tuple(float(v) for v in values)
    if len(spacing) != 3 or not all(np.isfinite(v) and v > 0 for v in spacing):
        raise ValueError(
            f"spacing is {values}; expected three positive numbers (D H W, mm), keep or median"
        )
    return spacing[0], spacing[1], spacing[2]


def _plain_options(options: PrepareOptions) -> dict[str, Any]:
    """The options that decide what is in the store."""
    plain = dataclasses.asdict(options)
    for name in ("out", "workers", "overwrite", "sources"):
        del plain[name]
    for name, usual in (("boxes", "listed"), ("box_readers", "merge"), ("label", ""), ("nan", None)):
        if plain[name] == usual:  # stores made before there were these options are made the same way
            del plain[name]
    return json.loads(json.dumps(plain))


def _box_names(found: Found, options: PrepareOptions) -> dict[str, dict[str, str]]:
    """Per data set, box label -> kind of object; of boxes around masks, what the mask's values are."""
    return (found.label_names if options.boxes == "masks" else {}) | found.box_names


def _signed(
    scans: Sequence[Scan], refused: Sequence[tuple[str, str]], options: PrepareOptions
) -> dict[str, Any]:
    stamps: dict[Path, tuple[int, int]] = {}
    return {
        "options": digest_of([VERSION, _plain_options(options)]),
        "data": digest_of([[key_of(scan, stamps) for scan in scans], sorted(refused)]),
        "found": len(scans),
    }


def _finished(out: Path, signed: dict[str, Any], options: PrepareOptions) -> Summary | None:
    """The store that is there already, if it is the one wanted; None if there is none or it may go."""
    if not out.exists():
        return None
    settings, rejected, reason = store_settings(out)
    if not reason:
        before = settings.get("prepare", {})
        if before == signed:
            volumes, subjects = store_counts(out)
            return Summary(out, volumes, subjects, len(rejected), reused=True)
        same_options = before.get("options") == signed["options"]
        reason = (
            f"a store of other data ({before.get('found', '?')} scans found then, {signed['found']} now, "
            "or files changed)"
            if same_options
            else _other_options(settings, options)
        )
    if options.overwrite:
        return None
    raise DataError(f"{out}: exists, {reason}; --overwrite replaces it, --out names another")


def _other_options(settings: dict[str, Any], options: PrepareOptions) -> str:
    """Which options a store was made with that are not those given."""
    usual = json.loads(json.dumps({f.name: f.default for f in dataclasses.fields(options)[1:]}))
    before, now = usual | (settings.get("options") or {}), usual | _plain_options(options)
    differ = [
        f"--{name.replace('_', '-')}: {_word(before.get(name))} then, {_word(value)} now"
        for name, value in now.items()
        if before.get(name) != value and name not in ("out", "workers", "overwrite")
    ]
    if not differ:
        return "a store made by another version of ssl3d"
    return f"a store made with other options ({'; '.join(differ)})"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in (None, "", []):
        return "none"
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)


# Work ---------------------------------------------------------------------------------------------


def _worker_count(workers: int | None, scans: int) -> int:
    if workers is not None:
        return workers
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, 8, scans))


def _spacing(
    options: PrepareOptions, found: Found, workers: int, say: Any
) -> tuple[Triple | None, dict[str, Triple]]:
    """The target spacing, and that of each data set where there are several.

    A median is that of all scans found, so every shard gets the same.
    """
    if options.spacing == "keep":
        return None, {}
    if not isinstance(options.spacing, str):
        return options.spacing, {}
    each: dict[str, list[Triple]] = {}
    for scan, result in pool.run(spacing_of_scan, iter(found.scans), workers, start_worker):
        if isinstance(result, tuple):
            each.setdefault(scan.dataset, []).append(result)
    medians: dict[str, Triple] = {}
    for name in dict.fromkeys(scan.dataset for scan in found.scans):
        several = f"{name}: " if len({scan.dataset for scan in found.scans}) > 1 else ""
        if name not in each:
            say(f"--spacing median: {several}no scan here has a spacing; kept as they are")
            continue
        d, h, w = (float(round(v, 4)) for v in np.median(np.array(each[name]), axis=0))
        of = count_of(len(each[name]), "scan")
        say(f"{several}median spacing {d:g} x {h:g} x {w:g} mm (D, H, W) of {of}")
        medians[name] = (d, h, w)
    if len({scan.dataset for scan in found.scans}) > 1:
        return None, medians
    return next(iter(medians.values()), None), {}


def _make(
    names: Sequence[str],
    scans: Sequence[Scan],
    recipe: Recipe,
    folder: Path,
    workers: int,
    out: Path,
    say: Any,
) -> list[tuple[str, str]]:
    """Has the missing parts made; returns what was rejected."""
    missing = [i for i, name in enumerate(names) if not (folder / f"{name}.part").exists()]
    if len(missing) < len(names):
        say(f"going on: {len(names) - len(missing)} of {count_of(len(names), 'scan')} are done")
    rejected: list[tuple[str, str]] = []
    label_like: list[str] = []
    progress = Progress(len(missing))
    # A few scans, spread over the whole, are timed first; .npz rows must be read in order.
    rows = any(scans[i].member for i in missing)
    sampled = missing[:_SAMPLE] if rows else missing[:: max(1, len(missing) // _SAMPLE)][:_SAMPLE]
    chosen = set(sampled)
    order = sampled + [i for i in missing if i not in chosen]
    started, written, worked, unspaced = time.monotonic(), 0, 0.0, 0
    tasks = _tasks(order, names, scans, recipe, folder, rejected)
    sample = pool.run(process, itertools.islice(tasks, len(sampled)), workers, start_worker)
    rest = pool.run(process, tasks, workers, start_worker)
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
            say(_estimate(scans, sampled, missing, worked / max(workers, 1), written, workers, out))
        progress.show(number, time.monotonic() - started)
    progress.clear()
    if unspaced:
        say(f"{count_of(unspaced, 'scan')} without a spacing: not resampled")
    if label_like:
        from ssl3d.data.scans.folders import label_note

        say(label_note(sorted(label_like)))
    return rejected


def _estimate(
    scans: Sequence[Scan],
    sampled: Sequence[int],
    missing: Sequence[int],
    seconds: float,
    written: int,
    workers: int,
    out: Path,
) -> str:
    """Time and disk of the whole, from the sample, in proportion to the size of the files."""

    def weight(indices: Sequence[int]) -> float:
        if any(scans[i].member for i in indices):
            return len(indices)
        return sum(stamp(p)[0] for i in indices for p in scans[i].all_files) or len(indices)

    factor = weight(missing) / max(weight(sampled), 1)
    free = shutil.disk_usage(out.parent).free
    disk = written * factor
    warning = " (NOT ENOUGH)" if 2 * disk > free else ""
    return (
        f"{count_of(len(missing), 'scan')} with {count_of(workers, 'worker')}: about "
        f"{duration(seconds * factor)}; {size(disk)} of disk, twice that while it is made, "
        f"{size(free)} are free{warning}"
    )


def _tasks(
    order: Sequence[int],
    names: Sequence[str],
    scans: Sequence[Scan],
    recipe: Recipe,
    folder: Path,
    rejected: list[tuple[str, str]],
) -> Iterator[Task]:
    """Tasks in order; rows of .npz files are read here, one at a time, because they lie in one stream."""
    from ssl3d.data.scans.arrays import Rows

    rows = Rows()
    for i in order:
        scan = scans[i]
        task = Task(scan, names[i], folder, recipe.of(scan.dataset))
        if scan.member is not None:
            try:
                task.row, task.row_mask, task.sha256 = rows.of(scan.files[0][0], *scan.member)
            except DataError as error:
                rejected.append((f"{scan.source}#{scan.member[0]}[{scan.member[1]}]", str(error)))
                continue
        yield task


def _is_full(error: OSError) -> bool:
    return error.errno in (28, 122) or "No space left" in str(error)


def _where(out: Path, rejected: Sequence[object]) -> str:
    return f" (see {out.parent / 'rejected.csv'})" if rejected else ""
