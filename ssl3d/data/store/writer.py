"""Writes the HDF5 store: one part per volume, by any number of workers, then one atomic assembly.

A store holds the voxels of row i of its index as `images/i` and `masks/i`; see `ssl3d.data.store.index` for
the rest of the layout.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from ssl3d.data.identity import reading_of
from ssl3d.data.store import chunks
from ssl3d.data.store.digests import content_digest
from ssl3d.data.store.index import PART, VERSION, IndexWriter, put
from ssl3d.data.store.record import Record, blob, plain
from ssl3d.errors import DataError, is_transient, reason_of
from ssl3d.files import whole_file

_CHUNK = 32  # voxels a side: 64 KiB in half precision
_SKETCH = 65  # quantiles kept per channel and volume, to pool intensities over a data set


def write_part(
    folder: Path,
    name: str,
    record: Record,
    image: np.ndarray,
    mask: np.ndarray | None = None,
    boxes: np.ndarray | None = None,
    box_labels: np.ndarray | None = None,
    foreground: np.ndarray | None = None,
    dtype: str = "float16",
    ignored: np.ndarray | None = None,
) -> Path:
    """Write one volume as `folder/name.part`; what is there under that name is whole.

    Args:
        folder: Folder of the parts, usually `store.h5.partial`; made if missing.
        name: File name without suffix; parts are assembled in the order of their names.
        record: Record of the volume, whose `voxels` and `reading` are filled in.
        image: (C, D, H, W), normalised.
        mask: (D, H, W), integers >= 0.
        boxes: (n, 6), z1 y1 x1 z2 y2 x2 in voxels, upper corner exclusive.
        box_labels: (n,), integers; zeros if left out.
        foreground: (D, H, W), boolean; by default what is brighter than the background.
        dtype: float16, float32, int16 (scaled per volume to its own range), or uint8 (255ths of 1).
        ignored: (D, H, W), boolean: voxels to ignore, which are no foreground either.

    Raises:
        DataError: Shapes disagree, a voxel is not finite, or the type cannot hold it.
    """
    image = np.asarray(image, dtype=np.float32)
    _check(record, image, mask, boxes, foreground, ignored)
    background = np.asarray(record.done.get("background", image.min(axis=(1, 2, 3))), dtype=np.float32)
    stored, scale, offset = encode_voxels(record.id, image, dtype)
    if stored.dtype == np.float16:  # air outside the volume is to equal air inside
        background = background.astype(np.float16).astype(np.float32)
    background = np.broadcast_to(background, image.shape[:1])
    occupied = _derived_foreground(image, background) if foreground is None else foreground.astype(bool)
    if ignored is not None:
        ignored = ignored.astype(bool)
        occupied = occupied & ~ignored
    block = block_size(image.shape[1:])
    boxes = None if boxes is None else np.asarray(boxes, dtype=np.float32).reshape(-1, 6)
    labels = None
    if boxes is not None:
        labels = np.zeros(len(boxes)) if box_labels is None else np.asarray(box_labels)
        if len(labels) != len(boxes):
            raise DataError(f"{record.id}: {len(boxes)} boxes but {len(labels)} box labels")
    small = None if mask is None else mask.astype(np.min_scalar_type(int(mask.max(initial=0))))
    content = content_digest(stored, small, boxes, scale, offset, ignored)
    # Of what is read back, so that a store that lacks it gives the same later.
    reading = reading_of(
        stored if stored.dtype != np.int16 else stored * np.float32(scale) + np.float32(offset)
    )
    record = dataclasses.replace(record, voxels=content, reading=reading)
    path = folder / f"{name}.part"
    with whole_file(path) as temporary, _new_file(temporary) as (file, _):
        data = chunks.put(file, "image", stored, _chunks(stored.shape))
        data.attrs.update(background=background, scale=scale, offset=offset)
        if small is not None:
            chunks.put(file, "mask", small, _chunks(small.shape))
        if ignored is not None:
            chunks.put(file, "ignored", ignored, _chunks(ignored.shape))
        if boxes is not None and labels is not None:
            put(file, "boxes", boxes)
            put(file, "box_labels", labels.astype(np.int64))
        put(file, "foreground", _occupancy(occupied, block))
        put(file, "sketch", _sketch(image, occupied))
        put(file, "record", blob(record.to_json()))
        file.attrs.update(format=PART, version=VERSION)
    return path


def part_record(path: Path) -> Record:
    """Read the record of a part, after comparing all of the part with its check sums.

    Raises:
        DataError: The file is missing, cut short, damaged, or not a part.
    """
    with open_part(path) as file:
        try:
            for data in file.values():
                if data.ndim < 3 or data.fletcher32:
                    data[()]
                else:
                    chunks.Chunked(data).check()
            return Record.from_json(file["record"][()].tobytes())
        except chunks.UNREADABLE as error:
            if is_transient(error):
                raise
            raise DataError(
                f"{path}: not a whole part ({reason_of(error)}); delete it and prepare again"
            ) from error


@contextmanager
def open_part(path: Path) -> Iterator[h5py.File]:
    """Open a part for reading.

    Raises:
        DataError: The file is missing, cut short, or not a part.
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        reason = _reason(path, error)
        raise DataError(f"{path}: not a whole part ({reason}); delete it and prepare again") from error
    with file:
        if file.attrs.get("format") != PART or "record" not in file:
            raise DataError(f"{path}: not a part of a store; delete it and prepare again")
        yield file


def assemble(folder: Path, out: Path, settings: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    """Assemble one store of all parts in a folder, under a temporary name, synced, then renamed.

    Args:
        folder: Folder of `*.part` files; it is left as it is.
        out: File of the store, which either does not exist or is whole.
        settings: Settings with which the volumes were made, JSON values.
        rejected: Files that were refused, a dict each, JSON values.

    Raises:
        DataError: There are no parts, a part is cut short, or two volumes have one id.

    Example:
        >>> import tempfile
        >>> from ssl3d.api import Record, assemble, open_data, write_part
        >>> parts, store = (Path(tempfile.mkdtemp()) / name for name in ("parts", "study.h5"))
        >>> image = np.random.default_rng(0).normal(size=(1, 16, 16, 16))
        >>> part = write_part(parts, "0", Record("scan-1", "study", "patient-1"), image)
        >>> assemble(parts, store, settings={}, rejected=[])
        >>> open_data([store])[0]
        Volume(0, study/scan-1, shape (1, 16, 16, 16), spacing (1.0, 1.0, 1.0))
    """
    paths = sorted(folder.glob("*.part"))
    if not paths:
        raise DataError(f"{folder}: no volumes to assemble")
    with whole_file(out, sync=True) as temporary, _new_file(temporary) as (file, check):
        images, masks = file.create_group("images"), file.create_group("masks")
        index = IndexWriter(file, len(paths))
        for number, path in enumerate(paths):
            check()
            with open_part(path) as part:
                part.copy("image", images, name=str(number))
                if "mask" in part:
                    part.copy("mask", masks, name=str(number))
                if "ignored" in part:
                    part.copy("ignored", file.require_group("ignored"), name=str(number))
                index.version = max(index.version, _version_of(part))
                index.add(
                    Record.from_json(part["record"][()].tobytes()),
                    shape=part["image"].shape,
                    block=block_size(part["image"].shape[1:]),
                    has_mask="mask" in part,
                    has_ignored="ignored" in part,
                    foreground=part["foreground"][()],
                    boxes=part["boxes"][()] if "boxes" in part else None,
                    box_labels=part["box_labels"][()] if "boxes" in part else None,
                    sketch=part["sketch"][()],
                )
        index.close()
        put(file, "settings", blob(json.dumps(settings, default=plain, sort_keys=True)))
        put(file, "rejected", blob(json.dumps(rejected, default=plain)))


def _version_of(part: h5py.File) -> int:
    """Return the version of the format that a part needs: one that ignores nothing of it."""
    if "ignored" in part:
        return 3
    return 2 if part["image"].dtype == np.uint8 else 1


def block_size(shape: Sequence[int]) -> tuple[int, int, int]:
    """Choose the sides of the foreground map's blocks: powers of two up to 8 that leave 16 or more."""
    sides = [min(8, 1 << max(0, (max(size, 16) // 16).bit_length() - 1)) for size in shape]
    return sides[0], sides[1], sides[2]


# ------------------------------------------------------------------------------------------------


def _check(
    record: Record,
    image: np.ndarray,
    mask: np.ndarray | None,
    boxes: np.ndarray | None,
    foreground: np.ndarray | None,
    ignored: np.ndarray | None,
) -> None:
    if image.ndim != 4 or 0 in image.shape:
        raise DataError(f"{record.id}: image of shape {image.shape}; expected (C, D, H, W), not empty")
    if not np.isfinite(image).all():
        raise DataError(f"{record.id}: {int((~np.isfinite(image)).sum())} voxels are NaN or infinite")
    for name, array in (("mask", mask), ("foreground", foreground), ("ignored", ignored)):
        if array is not None and array.shape != image.shape[1:]:
            raise DataError(f"{record.id}: {name} of shape {array.shape} for an image of {image.shape[1:]}")
    if mask is not None and (mask.dtype.kind not in "iub" or (mask.size and mask.min() < 0)):
        raise DataError(f"{record.id}: mask of {mask.dtype} from {mask.min()}; expected integers from 0")
    if (
        boxes is not None
        and np.asarray(boxes).size
        and np.asarray(boxes).reshape(len(boxes), -1).shape[1] != 6
    ):
        raise DataError(f"{record.id}: boxes of shape {np.shape(boxes)}; expected (n, 6)")


def encode_voxels(name: str, image: np.ndarray, dtype: str) -> tuple[np.ndarray, float, float]:
    """Convert voxels to what is stored; stored * scale + offset gives the image back.

    Args:
        name: Name of the volume, for messages.
        image: Voxels (C, D, H, W), float32.
        dtype: Type to store: float16, float32, int16 or uint8.

    Raises:
        DataError: The type cannot hold the voxels.
    """
    if dtype == "float32":
        return image, 1.0, 0.0
    if dtype == "float16":
        top = max(-float(image.min()), float(image.max()))  # `abs` would copy a large scan
        if top > 65504:
            raise DataError(
                f"{name}: voxel of {top:.6g} exceeds half precision (65504); normalise, or store as float32"
            )
        return image.astype(np.float16), 1.0, 0.0
    if dtype == "int16":
        low, high = float(image.min()), float(image.max())
        scale, offset = max((high - low) / 65534, 1e-12), (high + low) / 2
        return np.rint((image - offset) / scale).astype(np.int16), scale, offset
    if dtype == "uint8":
        if image.min() < 0 or image.max() > 1:
            raise DataError(
                f"{name}: voxels from {image.min():.6g} to {image.max():.6g}; uint8 holds 0 to 1"
            )
        return np.rint(image * 255).astype(np.uint8), 1 / 255, 0.0
    raise DataError(f"{name}: cannot store voxels as {dtype!r}; known: float16, float32, int16, uint8")


def _chunks(shape: Sequence[int]) -> tuple[int, ...]:
    """Choose chunks of about 32 x 32 x 32 voxels that divide the shape evenly: edges waste no disk.

    Short axes leave their share to the long ones: an image of depth 1 gets about 181 x 181.
    """
    sides = dict.fromkeys(range(len(shape)), 1)
    first, left, budget = len(shape) - 3, 3, float(_CHUNK**3)
    for axis in sorted(range(first, len(shape)), key=lambda a: shape[a]):
        side = min(shape[axis], budget ** (1 / left))
        pieces = max(1, round(shape[axis] / side))
        sides[axis] = -(-shape[axis] // pieces)
        budget, left = max(1.0, budget / sides[axis]), left - 1
    if first:  # crops take all channels, so a few lie in one chunk
        sides[0] = min(shape[0], 4)
    return tuple(sides[axis] for axis in range(len(shape)))


def _derived_foreground(image: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Mark what is brighter than the background by a tenth of the way to the brightest, in any channel."""
    top = np.percentile(image.reshape(len(image), -1)[:, :: max(1, image[0].size // 65536)], 99.5, axis=1)
    level = background + 0.1 * np.maximum(top - background, 0)
    return (image > level[:, None, None, None]).any(axis=0)


def _occupancy(occupied: np.ndarray, block: tuple[int, int, int]) -> np.ndarray:
    """Measure the foreground of each block, 0 to 255, rounded up; border blocks count what exists."""
    counts = [np.add.reduceat(np.ones(n), np.arange(0, n, b)) for n, b in zip(occupied.shape, block)]
    total = occupied.astype(np.float32)
    for axis, b in enumerate(block):
        total = np.add.reduceat(total, np.arange(0, occupied.shape[axis], b), axis=axis)
    existing = counts[0][:, None, None] * counts[1][:, None] * counts[2]
    return np.ceil(255 * total / existing).astype(np.uint8)


def _sketch(image: np.ndarray, occupied: np.ndarray) -> np.ndarray:
    """Compute evenly spaced quantiles of each channel's foreground, (C, 65) float32."""
    # Thinned out before the foreground is selected: a large scan is not copied for 65 numbers.
    step = max(1, int(occupied.sum()) // 65536)
    thin, chosen = image.reshape(len(image), -1)[:, ::step], occupied.reshape(-1)[::step]
    voxels = thin[:, chosen] if chosen.any() else thin
    quantiles = np.quantile(voxels, np.linspace(0, 1, _SKETCH), axis=1)
    return np.ascontiguousarray(quantiles.T, dtype=np.float32)


def _reason(path: Path, error: OSError) -> str:
    if not path.exists():
        return "no such file"
    return "cut short" if "truncated" in str(error) or path.stat().st_size < 512 else "not HDF5"


class _Sink:
    """File that HDF5 writes to: it keeps the first error, for HDF5 may end the process over one.

    Args:
        path: File, made anew.
    """

    def __init__(self, path: Path):
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed below)
        self._error: OSError | None = None
        self.seek, self.tell, self.flush = self._file.seek, self._file.tell, self._file.flush

    def read(self, count: int = -1) -> bytes:
        return self._file.read(count)

    def readinto(self, place: Any) -> int:
        count = self._file.readinto(place)
        memoryview(place).cast("B")[count:] = bytes(len(place) - count)  # what could not be written
        return len(place)

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        size = len(left)
        self._try(lambda: _write_all(self._file, left))
        return size

    def truncate(self, size: int) -> None:
        self._try(lambda: self._file.truncate(size))

    def _try(self, act: Callable[[], Any]) -> None:
        if self._error is None:
            try:
                act()
            except OSError as error:
                self._error = error

    def check(self) -> None:
        """Raise the first error of writing, if there was one."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._file.close()


def _write_all(file: IO[bytes], content: memoryview) -> None:
    while len(content):
        content = content[file.write(content) :]


@contextmanager
def _new_file(path: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Yield a new HDF5 file, and a check that raises an error of writing; the end of the block checks too.

    Raises:
        OSError: The disk is full, or cannot be written.
    """
    sink = _Sink(path)
    try:
        try:
            with h5py.File(sink, "w", libver="v110") as file:
                yield file, sink.check
        finally:
            sink.check()  # what came after it is its consequence
    finally:
        sink.close()
