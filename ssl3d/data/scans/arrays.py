"""Volumes that are rows of arrays: MedMNIST's .npz files and flat ones; read as a stream."""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np

from ssl3d import memory
from ssl3d.data.scans.found import Found, Scan, Wanted
from ssl3d.data.scans.read import sha256_of, stem_of
from ssl3d.data.scans.streams import DEFLATED
from ssl3d.data.scans.subjects import relative, split_of
from ssl3d.data.scans.tables import cell
from ssl3d.errors import DataError, is_transient

_SPLITS = ("train", "val", "test")
PACKED = "masks_packed"
_ROWS = ("images", PACKED)  # ends of the names of arrays that are read row by row
Label = int | float | str | None


class DamagedArchive(DataError):
    """An archive of arrays of which no volume can be used."""


def from_arrays(path: Path, wanted: Wanted, root: Path) -> Found:
    """List the volumes of a MedMNIST file, 2D or 3D, with `train_images`, `train_labels` and so on.

    Every row is a volume. There is a flat layout of the same kind too: `images`, or `masks_packed`
    (`np.packbits` of `shape`), one row per volume, with `patient`, `malignancy` or `labels` and `split` of
    the same length. Where `nodule` says which nodule a slice with a mask shows, the columns may have a
    value per nodule, and the mask's components are its boxes.

    Raises:
        DataError: `split` holds an unknown word.
    """
    contents = Found()
    source = relative(path, root)
    # adrenalmnist3d_64 holds the same people as adrenalmnist3d.
    dataset = wanted.dataset or re.sub(r"_(64|128|224)$", "", stem_of(path))
    try:
        shapes = {name: header[0] for name, header in array_headers(path).items()}
        splits = [split for split in _SPLITS if f"{split}_images" in shapes]
        for split in splits:
            _split_arrays(path, source, dataset, shapes, split, contents)
        if not splits:
            _flat_arrays(path, source, dataset, shapes, contents)
    except DataError:
        raise
    except Exception as error:  # zipfile and numpy raise nearly anything on damaged files
        if is_transient(error):
            raise
        reason = (
            "empty file" if path.stat().st_size == 0 else f"unreadable: {error or type(error).__name__}"
        )
        contents = Found(rejected=[(source, reason)])
    return contents


def _split_arrays(
    path: Path, source: str, dataset: str, shapes: dict[str, tuple[int, ...]], split: str, contents: Found
) -> None:
    """Add the rows of one split of a MedMNIST file."""
    name = f"{split}_labels"
    try:
        count = _count(shapes, f"{split}_images")
        labels: list[Label] = [None] * count
        if name in shapes:
            with np.load(path, allow_pickle=False) as archive:
                labels = _labels(_per_row(archive[name], count, name))
    except DataError as error:
        contents.rejected.append((source, str(error)))
        return
    for index, label in enumerate(labels):
        contents.scans.append(
            Scan(
                id=f"{stem_of(path)}/{split}-{index:05d}",
                dataset=dataset,
                subject=f"{split}-{index:05d}",
                source=source,
                files=((path,),),
                label=label,
                split=split,
                named=True,
                member=(f"{split}_images", index),
            )
        )


def _count(shapes: dict[str, tuple[int, ...]], member: str) -> int:
    """Return the number of volumes that an array holds.

    Raises:
        DataError: The array has no rows, being a single value.
    """
    if not shapes[member]:
        raise DataError(f"{member} is a single value; expected one row per volume")
    return shapes[member][0]


def _per_row(values: np.ndarray, count: int, name: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Return a column with one value (or row of values) per volume, text as text.

    Args:
        values: Column as stored.
        count: Number of volumes.
        name: Name of the column in messages.
        rows: (count,), nodule of each volume: a column with one value per nodule is spread over them.

    Raises:
        DataError: The column has another length.
    """
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim and len(values) == count:
        return values
    if values.ndim and rows is not None and count and rows.min() >= 0 and rows.max() < len(values):
        return values[rows]
    raise DataError(f"{count} volumes, but {len(values) if values.ndim else 'one value'} of {name}")


def _labels(values: np.ndarray) -> list[Label]:
    """Return a label per row, all of one type: real if any is a fraction.

    Of several columns of 0 and 1 (several findings at once) the set is the class.

    Raises:
        DataError: Labels are neither text nor finite numbers, or several per row that are not 0 and 1.
    """
    rows = values.reshape(len(values), math.prod(values.shape[1:]))
    if rows.shape[1] == 0:
        return [None] * len(rows)
    if rows.dtype.kind not in "biufU":
        raise DataError(f"labels of type {rows.dtype}; expected numbers or text")
    if rows.dtype.kind == "f" and not np.isfinite(rows).all():
        raise DataError("labels that are not finite")
    if rows.shape[1] > 1:
        if rows.dtype.kind == "U" or not np.isin(rows, (0, 1)).all():
            raise DataError(f"{rows.shape[1]} labels per volume, not all of them 0 or 1")
        return ["+".join(str(i) for i in np.flatnonzero(row)) or "none" for row in rows]
    column = rows[:, 0]
    if column.dtype.kind == "U":
        return [cell(text) or None for text in column.tolist()]
    real = column.dtype.kind == "f" and bool((column != np.rint(column)).any())
    return [float(value) if real else int(value) for value in column]


def _flat_arrays(
    path: Path, source: str, dataset: str, shapes: dict[str, tuple[int, ...]], contents: Found
) -> None:
    """Add the rows of the flat layout.

    Raises:
        DataError: `split` holds an unknown word.
    """
    member = next((name for name in ("images", PACKED) if name in shapes), None)
    if member is None or (member == PACKED and "shape" not in shapes):
        contents.rejected.append(
            (
                source,
                f"arrays {', '.join(sorted(shapes)) or 'none'}; expected MedMNIST's train_images and so on",
            )
        )
        return
    names = (("patient", "subject"), ("malignancy", "labels", "label"), ("split",))
    try:
        count = _count(shapes, member)
        with np.load(path, allow_pickle=False) as archive:
            rows = archive["nodule"] if "nodule" in shapes else None
            if rows is not None and (rows.shape != (count,) or rows.dtype.kind not in "iu"):
                raise DataError(f"nodule is {rows.dtype} of shape {rows.shape}; expected {count} integers")
            columns = []
            for aliases in names:
                name = next((alias for alias in aliases if alias in shapes), None)
                columns.append(None if name is None else _per_row(archive[name], count, name, rows))
        subjects, values, words = columns
        labels: list[Label] = [None] * count if values is None else _labels(values)
    except DataError as error:
        contents.rejected.append((source, str(error)))
        return
    splits = [""] * count if words is None else _split_words(path, words)
    shown = member == "images" and PACKED in shapes and "nodule" in shapes
    if shown:
        contents.box_names[dataset] = {"1": "nodule"}
    counts: Counter[str] = Counter()
    for index in range(count):
        subject = (cell(str(subjects[index])) if subjects is not None else "") or f"{index:05d}"
        counts[subject] += 1
        contents.scans.append(
            Scan(
                id=f"{stem_of(path)}/{subject}"
                + (f"-{counts[subject]:03d}" if subjects is not None else ""),
                dataset=dataset,
                subject=subject,
                source=source,
                files=((path,),),
                label=labels[index],
                split=splits[index],
                named=True,
                member=(member, index),
                mask_boxes=shown,
            )
        )


def _split_words(path: Path, words: np.ndarray) -> list[str]:
    """Translate the words of a column into splits.

    Raises:
        DataError: A word names no split.
    """
    splits = []
    for index, word in enumerate(map(str, words.tolist())):
        split = split_of(cell(word))
        if split is None:
            raise DataError(f"{path}, row {index}: split {word!r}; known: train, val, test, or nothing")
        splits.append(split)
    return splits


def array_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Read the shape and type of every array of an archive, and no values.

    Raises:
        ValueError: An array is not as long as its header says; or what zipfile raises.
    """
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                shape, dtype, _ = _array_header(file)
                needed = file.tell() + math.prod(shape) * dtype.itemsize
            name = member.filename.removesuffix(".npy")
            if not needed == member.file_size <= path.stat().st_size * DEFLATED:
                raise ValueError(
                    f"{name} holds {member.file_size:,} bytes, but its header promises {needed:,}"
                )
            if not name.endswith(_ROWS):
                memory.check(2 * needed, f"{name}: ")  # read whole: labels, subjects, splits
            headers[name] = shape, dtype
    return headers


def check_archive(path: Path) -> None:
    """Read every array of an archive to its end, for the check sums.

    Raises:
        DamagedArchive: The file is damaged or cut short.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zlib.error has no public root
        if is_transient(error):
            raise
        raise DamagedArchive(f"unreadable: {type(error).__name__}: {error}") from error
    if damaged is not None:
        raise DamagedArchive(f"damaged: the check sum of {damaged.removesuffix('.npy')} does not hold")


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are not read")
    return shape, dtype, fortran


def frames_of_row(row: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the frames (F, D, H, W) of a row, and whether they are red, green, blue.

    A row is (H, W) or (D, H, W); a channel axis comes last, of 1 or 3 values: (H, W, 3), (D, H, W, 1).

    Raises:
        DataError: The row has another number of axes, or nothing tells channels from slices.
    """
    shape = row.shape
    colours = row.ndim in (3, 4) and shape[-1] == 3 and shape[-2] != 3
    if colours:
        row = np.moveaxis(row, -1, 0)
    elif row.ndim in (3, 4) and shape[-1] == 1 != shape[-2]:
        row = row[..., 0][None]
    elif row.ndim == 4 or (row.ndim == 3 and min(shape[0], shape[-1]) in (2, 3, 4) and shape[1] > 4):
        raise DataError(
            f"rows of shape {shape}: channels or slices? Save channels last, as (H, W, 3), slices as "
            "(D, H, W, 1)"
        )
    else:
        row = row[None]
    frames = row[:, None] if row.ndim == 3 else row
    if frames.ndim != 4:
        raise DataError(f"rows of shape {shape}; expected (H, W), (H, W, 3), (D, H, W) or (D, H, W, 1)")
    return frames, colours


class RowReader:
    """Reader of an array's rows in rising order, one at a time: memory of a row, not of the file.

    Args:
        path: Archive of arrays.
        member: Name of the array.

    Raises:
        DataError: The array is in Fortran order.
    """

    def __init__(self, path: Path, member: str):
        self._archive = zipfile.ZipFile(path)
        self._file = self._archive.open(f"{member}.npy")
        self.shape, self.dtype, fortran = _array_header(self._file)
        if fortran:
            raise DataError(f"{path.name}: {member} is in Fortran order; save it in C order")
        self._bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        memory.check(self._bytes, f"a row of {member}: ")
        self._next = 0

    def __getitem__(self, index: int) -> np.ndarray:
        while self._next < index:
            self._take()
            self._next += 1
        self._next += 1
        return np.frombuffer(self._take(), self.dtype).reshape(self.shape[1:])

    def _take(self) -> bytes:
        data = self._file.read(self._bytes)
        if len(data) < self._bytes:
            raise EOFError("cut short")
        return data

    def close(self) -> None:
        """Close the array and its archive."""
        self._file.close()
        self._archive.close()


class Rows:
    """Rows of any number of arrays in archives, asked for in rising order per array.

    A mask array of packed bits beside `images` gives the rows their masks.
    """

    def __init__(self) -> None:
        self._readers: dict[tuple[Path, str], RowReader] = {}
        self._digests: dict[Path, str] = {}
        self._shapes: dict[Path, tuple[int, ...]] = {}
        self._packed: dict[Path, bool] = {}

    def of(self, path: Path, member: str, index: int) -> tuple[np.ndarray, np.ndarray | None, str]:
        """Read the voxels of a row, its mask if there is one, and the SHA-256 of the file.

        Raises:
            DamagedArchive: The file is cut short or damaged.
            DataError: The row cannot be read.
        """
        try:
            if path not in self._digests:
                check_archive(path)
                self._digests[path] = sha256_of([path])
                headers = array_headers(path)
                self._packed[path] = PACKED in headers
                if "shape" in headers:
                    with np.load(path, allow_pickle=False) as archive:
                        self._shapes[path] = tuple(int(n) for n in archive["shape"])
            row = self._reader(path, member)[index]
            if member == PACKED:
                return self._unpacked(row, self._shapes[path]), None, self._digests[path]
            mask = None
            if member == "images" and self._packed[path]:
                mask = self._unpacked(self._reader(path, PACKED)[index], row.shape)
            return row, mask, self._digests[path]
        except DataError:
            raise
        except Exception as error:  # zlib.error has no public root
            if is_transient(error):
                raise
            raise DataError(f"unreadable: {type(error).__name__}: {error}") from error

    def _reader(self, path: Path, member: str) -> RowReader:
        if (path, member) not in self._readers:
            self._readers[path, member] = RowReader(path, member)
        return self._readers[path, member]

    @staticmethod
    def _unpacked(row: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.unpackbits(row)[: int(np.prod(shape))].reshape(shape)
