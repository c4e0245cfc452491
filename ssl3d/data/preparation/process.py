"""Makes one scan one part of the store, or several if its file holds frames: the work of a worker."""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl3d import memory
from ssl3d.amounts import count_of
from ssl3d.data import geometry
from ssl3d.data.geometry import UNKNOWN, Triple
from ssl3d.data.preparation.match import channel_onto, mask_onto
from ssl3d.data.preparation.normalize import decide, foreground, normalize
from ssl3d.data.scans.arrays import frames_of_row
from ssl3d.data.scans.boxes import around_mask, from_world, within
from ssl3d.data.scans.found import Scan
from ssl3d.data.scans.itk import quiet_sitk
from ssl3d.data.scans.read import Pixels, header_spacing, read, read_mask, sha256_of, with_voxels
from ssl3d.data.store.record import Record
from ssl3d.errors import DataError, is_full

# Bytes of memory for a voxel: in single precision, as it is stored, mask, foreground and what marks them.
_PREPARED = 10
_LABEL_VALUES = 32  # a label map has no more values than this
_LARGEST = float(np.finfo(np.float16).max)  # of the type that stores have
MASK_ELSEWHERE = "its header places it elsewhere; taken voxel by voxel"
_CHANNEL_NOTES = {"regridded": "onto_first_channel", "elsewhere": "voxel_by_voxel"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Steps of preparation that every scan takes; `PrepareOptions` explains the words.

    Attributes:
        spacing: Target (D, H, W) in mm; None keeps each scan's own.
        normalize: ct, mr, unit, auto or none.
        window: Lowest and highest value; None for the kind's own.
        crop_foreground: Whether the border of background is cut off.
        frames: split, channels or refuse.
        colour: grey or rgb.
        max_voxels: Largest number of voxels that is not refused.
        boxes: listed, or masks: around the components of the mask.
        medians: Targets of data sets that each have their own, by name, instead of `spacing`.
        nan: Value in place of NaN; None refuses NaN.
    """

    spacing: Triple | None = None
    normalize: str = "auto"
    window: tuple[float, float] | None = None
    crop_foreground: bool = False
    frames: Literal["split", "channels", "refuse"] = "split"
    colour: Literal["grey", "rgb"] = "grey"
    max_voxels: int = 2**30
    boxes: Literal["listed", "masks"] = "listed"
    medians: tuple[tuple[str, Triple], ...] = ()
    nan: float | None = None

    def of(self, dataset: str) -> Recipe:
        """Return the recipe for the scans of one data set."""
        own = dict(self.medians).get(dataset, self.spacing)
        return dataclasses.replace(self, spacing=own, medians=())


@dataclasses.dataclass
class ScanTask:
    """One scan that a worker is handed, with what it needs.

    Attributes:
        scan: Scan to be processed.
        name: Name of the scan's part.
        folder: Folder of the parts.
        recipe: Steps of preparation.
        row: Voxels of a row, where a file holds many volumes.
        row_mask: Mask of that row.
        sha256: SHA-256 of the file, where it holds many volumes.
        share: Bytes of memory that the scan may take beside others; None for the whole budget.
    """

    scan: Scan
    name: str
    folder: Path
    recipe: Recipe
    row: np.ndarray | None = None
    row_mask: np.ndarray | None = None
    sha256: str = ""
    share: int | None = None


@dataclasses.dataclass
class Outcome:
    """What became of one scan.

    Attributes:
        parts: Names of the parts written.
        size: Bytes of the parts.
        rejected: (source, reason) of what was refused.
        label_like: Whether it was left out because its values are those of a label map.
        full: Whether there was no room for it on the disk.
        unspaced: Whether it could not be resampled, for want of a spacing.
        seconds: Duration of the work.
    """

    parts: list[str] = dataclasses.field(default_factory=list)
    size: int = 0
    rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    label_like: bool = False
    full: bool = False
    unspaced: bool = False
    seconds: float = 0.0


@dataclasses.dataclass
class Prepared:
    """A volume that is ready to be stored or predicted.

    Attributes:
        record: Identity, geometry and what was done.
        image: Normalised voxels (C, D, H, W), float32.
        mask: Labels (D, H, W), if there are any.
        ignored: Voxels to ignore (D, H, W), boolean, if there are any.
        boxes: Boxes (n, 6) in voxels, if somebody looked for any.
        box_labels: Class of each box.
        foreground: Foreground (D, H, W), boolean.
        dtype: Type in which the voxels are stored.
    """

    record: Record
    image: np.ndarray
    mask: np.ndarray | None
    ignored: np.ndarray | None
    boxes: np.ndarray | None
    box_labels: np.ndarray | None
    foreground: np.ndarray
    dtype: str


def process(task: ScanTask) -> Outcome:
    """Read, place, resample, normalise, crop and write one scan; bad data are rejected, not raised.

    Raises:
        MemoryError: Its share of the memory is not enough; alone it may be.
    """
    started = time.monotonic()
    outcome = Outcome()
    try:
        with memory.sharing(task.share):
            _process(task, outcome)
    except DataError as error:
        if isinstance(error, memory.TooLarge) and task.share is not None:
            raise MemoryError(str(error)) from error
        outcome.rejected.append((task.scan.source, str(error)))
    outcome.seconds = time.monotonic() - started
    return outcome


def _process(task: ScanTask, outcome: Outcome) -> None:
    """Process a scan, and record in the outcome what becomes of its volumes.

    Raises:
        DataError: The scan as a whole is of no use.
    """
    scan = task.scan
    pixels, missing, notes = _read_channels(task)
    if not scan.named and _label_like(pixels):
        outcome.label_like = True
        return
    volumes = _frames(pixels, task, notes)
    sha256 = _sha256(task)
    outcome.unspaced = task.recipe.spacing is not None and pixels.original_affine is None
    several = len(volumes) > 1
    # Frame 0 is written last: where it stands, the others do too.
    for frame in reversed(range(len(volumes))):
        source = f"{scan.source}#{frame}" if several else scan.source
        name = f"{task.name}_{frame:05d}" if frame else task.name
        try:
            prepared = _prepared(
                task,
                volumes[frame],
                missing=missing,
                done={**notes, "frame": frame} if several else dict(notes),
                sha256=sha256,
                frame=frame if several else None,
            )
            path = _write(task.folder, name, prepared)
            outcome.parts.append(name)
            outcome.size += path.stat().st_size
        except DataError as error:
            if isinstance(error, memory.TooLarge) and task.share is not None:
                raise
            outcome.rejected.append((source, str(error).removeprefix(f"{scan.id}: ")))
        except OSError as error:
            if not is_full(error):
                raise
            outcome.full = True
            return


def _write(folder: Path, name: str, prepared: Prepared) -> Path:
    """Write a prepared volume as a part of the store."""
    from ssl3d.data.store.writer import write_part

    return write_part(
        folder, name, prepared.record, prepared.image, prepared.mask, prepared.boxes, prepared.box_labels,
        prepared.foreground, prepared.dtype, prepared.ignored,
    )  # fmt: skip


def prepared_volumes(task: ScanTask) -> Iterator[Prepared]:
    """Prepare the volumes of one scan, one after the other, without writing them to a store.

    Raises:
        DataError: The scan, or a volume of it, is of no use.
    """
    pixels, missing, notes = _read_channels(task)
    if not task.scan.named and _label_like(pixels):
        raise DataError("its values are those of a label map; name the file itself if it is a scan")
    volumes = _frames(pixels, task, notes)
    del pixels
    sha256 = _sha256(task)
    count = len(volumes)
    several = count > 1
    for frame in range(count):
        yield _prepared(
            task,
            volumes.pop(0),  # what is read is not held while it is predicted
            missing=missing,
            done={**notes, "frame": frame} if several else dict(notes),
            sha256=sha256,
            frame=frame if several else None,
        )


def _sha256(task: ScanTask) -> str:
    """Compute the SHA-256 of a scan's files."""
    files = (path for group in task.scan.files for path in group)
    return task.sha256 or sha256_of([whole for path in files for whole in with_voxels(path)])


def spacing_of_scan(scan: Scan) -> Triple | None:
    """Read the spacing from the header; None where the format has none or the header is damaged."""
    files = next((group for group in scan.files if group), ())
    if scan.member is not None or not files:
        return None
    try:
        return header_spacing(files)
    except DataError:
        return None


# ------------------------------------------------------------------------------------------------


def _read_channels(task: ScanTask) -> tuple[Pixels, list[int], dict[str, Any]]:
    """Read all channels on the grid of the first, the missing channels, and notes for the record."""
    scan, recipe = task.scan, task.recipe
    if task.row is not None:
        only = _filled(_from_row(task.row, recipe), recipe)
        return only, [], dict(only.notes)
    present = [i for i, group in enumerate(scan.files) if group]
    first = _filled(read(scan.files[present[0]], recipe.max_voxels), recipe)
    if len(scan.files) == 1:
        return first, [], dict(first.notes)
    notes: dict[str, Any] = dict(first.notes)
    missing = [i for i, group in enumerate(scan.files) if not group]
    if missing:
        notes["missing"] = [scan.channels[i] for i in missing]
    if len(first.voxels) != 1:
        raise DataError(f"{len(first.voxels)} frames or colours in the file of one channel")
    memory.check(memory.held(first.voxels) + 4 * len(scan.files) * first.voxels.size)
    voxels = np.zeros((len(scan.files), *first.voxels.shape[1:]), dtype=np.float32)
    voxels[present[0]] = first.voxels[0]
    for index in present[1:]:
        other = _filled(read(scan.files[index], recipe.max_voxels), recipe)
        name = scan.channels[index]
        if len(other.voxels) != 1:
            raise DataError(
                f"channel {name}: {len(other.voxels)} frames or colours in the file of one channel"
            )
        voxels[index], how = channel_onto(first, other, name)
        if how:
            notes.setdefault(_CHANNEL_NOTES[how], []).append(name)
        if "nan_filled" in other.notes:
            notes["nan_filled"] = notes.get("nan_filled", 0) + other.notes["nan_filled"]
    return dataclasses.replace(first, voxels=voxels), missing, notes


def _filled(pixels: Pixels, recipe: Recipe) -> Pixels:
    """Put a value in place of NaN if the recipe asks for it, and note it."""
    if recipe.nan is None or pixels.voxels.dtype.kind != "f":
        return pixels
    blank = np.isnan(pixels.voxels)
    count = int(blank.sum())
    if not count:
        return pixels
    voxels = np.where(blank, pixels.voxels.dtype.type(recipe.nan), pixels.voxels)
    return dataclasses.replace(pixels, voxels=voxels, notes={**pixels.notes, "nan_filled": count})


def _from_row(row: np.ndarray, recipe: Recipe) -> Pixels:
    """Make pixels of a row of an archive."""
    frames, colours = frames_of_row(row)
    if frames.size > recipe.max_voxels:
        raise DataError(f"{frames.size:,} voxels {row.shape}, more than --max-voxels {recipe.max_voxels:,}")
    affine = geometry.unknown_affine((1.0, 1.0, 1.0))
    return Pixels(frames, affine, UNKNOWN, row.shape, None, "", row.dtype == np.uint8, colours)


def _label_like(pixels: Pixels) -> bool:
    """Tell whether the values are few small whole numbers from 0, as in a label map."""
    sample = pixels.voxels.reshape(-1)
    if sample.size == 0 or sample.dtype.kind not in "iufb":
        return False
    if sample.dtype.kind == "f" and not np.isfinite(sample).all():
        return False
    low, high = sample.min(), sample.max()
    if low < 0 or high > 255 or low == high:
        return False
    values = np.unique(sample)
    return len(values) <= _LABEL_VALUES and high <= 50 and bool(np.array_equal(values, np.rint(values)))


def _frames(pixels: Pixels, task: ScanTask, notes: dict[str, Any]) -> list[Pixels]:
    """Split a scan into a `Pixels` per volume to be stored, its first axis the channels."""
    scan, recipe = task.scan, task.recipe
    voxels = pixels.voxels
    if scan.frames_are_channels and len(voxels) == len(scan.channels):
        return [pixels]
    if pixels.vector and recipe.frames != "channels":
        raise DataError(f"{len(voxels)} values at each voxel; --frames channels takes them as channels")
    if pixels.colours:
        if recipe.colour == "rgb":
            return [pixels]
        if scan.frames_are_channels:
            raise DataError(
                f"{len(voxels)} colours, but dataset.json names {len(scan.channels)} channels; "
                "--colour rgb takes them as channels"
            )
        weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's L
        grey = np.tensordot(weights, voxels.astype(np.float32), axes=1)[None]
        notes["colour"] = "grey"
        if pixels.eight_bit:
            grey = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
        return [dataclasses.replace(pixels, voxels=grey, colours=False)]
    picture = pixels.orientation == UNKNOWN and voxels.shape[1] == 1
    if recipe.colour == "rgb" and picture and len(voxels) == 1:
        return [dataclasses.replace(pixels, voxels=np.repeat(voxels, 3, axis=0), colours=True)]
    if scan.frames_are_channels:
        count = count_of(len(voxels), "frame")
        raise DataError(f"{count}, but dataset.json names {len(scan.channels)} channels")
    if len(voxels) == 1 or len(scan.files) > 1:
        return [pixels]
    if recipe.frames == "channels":
        return [pixels]
    if recipe.frames == "refuse":
        raise DataError(f"4D: {len(voxels)} frames (--frames split or channels takes them)")
    return [dataclasses.replace(pixels, voxels=voxels[i : i + 1]) for i in range(len(voxels))]


def _prepared(
    task: ScanTask,
    pixels: Pixels,
    *,
    missing: list[int],
    done: dict[str, Any],
    sha256: str,
    frame: int | None,
) -> Prepared:
    """Place, resample, normalise and crop one volume, and note what was done to it in its record.

    Args:
        task: Scan that the volume is of, and its recipe.
        pixels: Volume as read.
        missing: Channels that the subject lacks.
        done: Notes for the record, which are added to.
        sha256: SHA-256 of the source.
        frame: Number of the frame, where the scan holds several.

    Raises:
        DataError: The volume is of no use.
    """
    scan, recipe = task.scan, task.recipe
    needed = memory.held(pixels.voxels) + _PREPARED * pixels.voxels.size
    memory.check(needed, f"{pixels.voxels.size:,} voxels {pixels.voxels.shape}: ")
    voxels = _checked(pixels, scan, missing)
    mask, ignored = _mask(task, pixels, done), _ignored(task, pixels, done)
    affine = pixels.affine
    kind = recipe.normalize
    if kind == "auto":
        present = [i for i in range(len(voxels)) if i not in missing]
        judged = voxels[present] if ignored is None else voxels[present][:, ~ignored]
        kind = decide(judged, pixels.modality or scan.modality, pixels.eight_bit)
    if recipe.spacing and pixels.original_affine is None:
        done["resampled"] = "not: the source has no spacing"
    elif recipe.spacing and not np.allclose(pixels.spacing, recipe.spacing, rtol=1e-3):
        voxels, (mask, ignored), affine = _resampled(voxels, (mask, ignored), affine, recipe, done)
        if ignored is not None and ignored.all():
            assert scan.ignore is not None
            raise DataError(
                f"{scan.ignore.name}: at {recipe.spacing} mm every voxel left is one to ignore; a smaller "
                "--spacing keeps the others"
            )
    inside = foreground(voxels, kind, ignored)
    natural = pixels.colours and pixels.eight_bit and kind == "unit"
    # A channel that is nearly black is one of a picture, and no mask of 0 and 1.
    window = (0.0, 255.0) if natural and recipe.window is None else recipe.window
    image, how = normalize(
        voxels, kind, inside, window, pixels.eight_bit, missing, in_place=True, ignored=ignored
    )
    # No sooner: what is tested must not scale the question, and a scan to be predicted has no mask.
    if mask is not None:
        inside |= mask > 0
        inside = inside if ignored is None else inside & ~ignored
    done["background"] = how.pop("background")
    done["normalize"] = how
    # 255ths, exactly: stored as they came, in half the room.
    plain = natural and window == (0.0, 255.0) and not isinstance(done.get("resampled"), dict)
    start: tuple[int, ...] = (0, 0, 0)
    stop = inside.shape
    if recipe.crop_foreground:
        start, stop = _box(inside)
    if (start, stop) != ((0, 0, 0), inside.shape):
        done["crop"] = {"start": start, "of": inside.shape}
        cut = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        image, inside = image[(slice(None), *cut)], inside[cut]
        mask, ignored = (None if own is None else own[cut] for own in (mask, ignored))
        affine = geometry.shifted(affine, start)
    top = float(np.abs(image).max())
    if top > _LARGEST:
        raise DataError(
            f"voxels up to {top:.6g}, but a store holds up to {_LARGEST:g}: another --normalize than "
            f"{kind} scales them"
        )
    boxes, box_labels = _boxes(
        task, pixels, mask=mask, start=start, shape=image.shape[1:], affine=affine, done=done
    )
    record = _record(
        scan,
        pixels,
        id=scan.id if frame is None else f"{scan.id}#{frame}",
        affine=affine,
        sha256=sha256,
        channels=_channels(scan, pixels, len(image)),
        done=done,
    )
    dtype = "uint8" if plain else "float16"
    return Prepared(record, image, mask, ignored, boxes, box_labels, inside, dtype)


def _record(scan: Scan, pixels: Pixels, *, affine: np.ndarray, **fields: Any) -> Record:
    original = pixels.original_affine
    return Record(
        dataset=scan.dataset,
        subject=scan.subject,
        split=scan.split,
        label=scan.label,
        spacing=geometry.spacing_of(affine),
        orientation=pixels.orientation,
        affine=tuple(tuple(float(v) for v in row) for row in affine),
        original_shape=tuple(int(n) for n in pixels.original_shape),
        original_affine=None if original is None else tuple(tuple(map(float, row)) for row in original),
        source=scan.source if scan.member is None else f"{scan.source}#{scan.member[0]}[{scan.member[1]}]",
        **fields,
    )


def _boxes(
    task: ScanTask,
    pixels: Pixels,
    *,
    mask: np.ndarray | None,
    start: Sequence[int],
    shape: Sequence[int],
    affine: np.ndarray,
    done: dict[str, Any],
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Place boxes (n, 6) and their labels (n,) on the stored grid, which begins at voxel `start`.

    Args:
        task: Scan that the volume is of, and its recipe.
        pixels: Volume as read.
        mask: Mask on the stored grid.
        start: Voxel of the volume as read at which the stored grid begins.
        shape: Shape of the stored grid.
        affine: Affine of the stored grid.
        done: Notes for the record, which are added to.

    Raises:
        DataError: The boxes are in mm and the volume has no place, or in pixels and it is no picture.
    """
    scan = task.scan
    if mask is not None and (task.recipe.boxes == "masks" or scan.mask_boxes):
        boxes, labels = around_mask(mask)
        if scan.mask_boxes and not len(boxes):
            return None, None
        done["boxes"] = {"around": "the components of the mask"}
        return boxes, labels
    if scan.world_boxes is not None:
        if pixels.orientation == UNKNOWN:
            raise DataError("boxes are listed for it in mm, and its file does not say where its voxels lie")
        world = np.array(scan.world_boxes, dtype=np.float64).reshape(-1, 7)
        boxes, inside = within(from_world(world[:, :6], np.asarray(affine)), shape)
        done["boxes"] = {"listed": len(world), "outside": int((~inside).sum())}
        return boxes[inside], world[inside, 6].astype(np.int64)
    if scan.boxes is None:
        return None, None
    listed = np.array(scan.boxes, dtype=np.float32).reshape(-1, 7)
    if len(listed) and (pixels.voxels.shape[1] > 1 or pixels.orientation != UNKNOWN):
        raise DataError(
            f"{len(listed)} boxes are listed for it, and it is no picture: those have boxes in pixels"
        )
    boxes, inside = within(listed[:, :6] - np.array([*start, *start], np.float32), shape)
    if not inside.all():
        done["boxes"] = {"listed": len(listed), "outside": int((~inside).sum())}
    return boxes[inside], listed[inside, 6].astype(np.int64)


def _channels(scan: Scan, pixels: Pixels, count: int) -> tuple[str, ...]:
    if count == len(scan.channels):
        return scan.channels
    if pixels.colours and count == 3:
        return "red", "green", "blue"
    return tuple(f"channel{i}" for i in range(count)) if count > 1 else ("image",)


def _checked(pixels: Pixels, scan: Scan, missing: list[int]) -> np.ndarray:
    """Return the voxels in single precision, or refuse them."""
    if pixels.voxels.dtype.kind not in "iufb":
        raise DataError(f"voxels of type {pixels.voxels.dtype}; expected numbers")
    with np.errstate(over="ignore"):
        voxels = pixels.voxels.astype(np.float32, order="C")
    if not np.isfinite(voxels).all():
        raise DataError(_unfinite(voxels))
    for index, channel in enumerate(voxels):
        # Of a coloured picture one channel may be: a red one has no green.
        if pixels.colours and voxels.min() < voxels.max():
            break
        if index not in missing and channel.min() == channel.max():
            which = f"channel {scan.channels[index]}: " if len(voxels) == len(scan.channels) > 1 else ""
            raise DataError(f"{which}constant: every voxel is {channel.flat[0]:g}")
    return voxels


def _unfinite(voxels: np.ndarray) -> str:
    odd, nan = int((~np.isfinite(voxels)).sum()), int(np.isnan(voxels).sum())
    hint = "; --nan 0 of ssl3d prepare puts 0 in their place" if odd == nan else ""
    return f"{odd:,} of {voxels.size:,} voxels are {'NaN' if odd == nan else 'NaN or infinite'}{hint}"


def _mask(task: ScanTask, pixels: Pixels, done: dict[str, Any]) -> np.ndarray | None:
    """Read the label map on the scan's own grid, (D, H, W)."""
    if task.row_mask is not None:
        return task.row_mask.reshape(pixels.voxels.shape[1:])
    path = task.scan.mask
    if path is None:
        return None
    return _map(path, pixels, "mask", done)


def _ignored(task: ScanTask, pixels: Pixels, done: dict[str, Any]) -> np.ndarray | None:
    """Read the voxels to ignore on the scan's own grid, (D, H, W), boolean; None where there are none.

    Raises:
        DataError: All of them are.
    """
    path = task.scan.ignore
    if path is None:
        return None
    ignored = _map(path, pixels, "ignore_mask", done) > 0
    if ignored.all():
        raise DataError(
            f"{path.name}: every voxel is above 0, and those are ignored; a mask of what was kept is the "
            "other way round"
        )
    return ignored if ignored.any() else None


def _map(path: Path, pixels: Pixels, key: str, done: dict[str, Any]) -> np.ndarray:
    """Read a label map on the scan's own grid, (D, H, W), and note under a key how it got there."""
    labels, how = mask_onto(pixels, mask := read_mask(path), path.name)
    if how:
        resampled = f"resampled from a grid of {mask.voxels.shape[1:]}"
        done[key] = MASK_ELSEWHERE if how == "elsewhere" else resampled
    return labels


def _resampled(
    voxels: np.ndarray,
    maps: Sequence[np.ndarray | None],
    affine: np.ndarray,
    recipe: Recipe,
    done: dict[str, Any],
) -> tuple[np.ndarray, list[np.ndarray | None], np.ndarray]:
    assert recipe.spacing is not None
    shape, target = geometry.respaced(voxels.shape[1:], affine, recipe.spacing)
    count = int(np.prod(shape, dtype=np.float64)) * len(voxels)
    if count > recipe.max_voxels:
        raise DataError(
            f"{shape} voxels at {recipe.spacing} mm, more than --max-voxels {recipe.max_voxels:,}"
        )
    memory.check(voxels.nbytes + (_PREPARED + 2) * count, f"{shape} voxels at {recipe.spacing} mm: ")
    done["resampled"] = {
        "from_spacing": geometry.spacing_of(affine),
        "from_shape": voxels.shape[1:],
        "interpolation": "linear, smoothed before larger voxels; masks nearest",
    }
    images = np.stack([geometry.regrid(channel, affine, shape, target) for channel in voxels])
    labels = [None if own is None else _regridded(own, affine, shape, target) for own in maps]
    return images, labels, target


def _regridded(
    labels: np.ndarray, affine: np.ndarray, shape: Sequence[int], target: np.ndarray
) -> np.ndarray:
    """Put labels, or booleans, on another grid, each voxel by its nearest."""
    plain = labels.astype(np.uint8) if labels.dtype == bool else labels
    return geometry.regrid(plain, affine, tuple(shape), target, nearest=True).astype(labels.dtype)


def _box(inside: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the first and one-past-last voxel of the foreground along each axis."""
    starts, stops = [], []
    for axis in range(3):
        there = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        starts.append(int(there[0]))
        stops.append(int(there[-1]) + 1)
    return tuple(starts), tuple(stops)


def start_worker() -> None:
    """Prepare a worker: one thread where a library would start its own, and the imports it will use."""
    quiet_sitk()
    for name in ("nibabel", "scipy.ndimage", "pydicom", "PIL.Image", "ssl3d.data.store.writer"):
        importlib.import_module(name)
