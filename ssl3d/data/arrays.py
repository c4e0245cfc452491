"""Volumes that are rows of arrays: MedMNIST's .npz files and flat ones; read as a stream."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np

from ssl3d.data import sources
from ssl3d.data.read import sha256_of, stem_of
from ssl3d.data.sources import Found, Scan, Wanted, relative
from ssl3d.errors import DataError

_SPLITS = ("train", "val", "test")
PACKED = "masks_packed"


def from_arrays(path: Path, wanted: Wanted, root: Path) -> Found:
    """A MedMNIST file: `train_images`, `train_labels` and so on; 2D and 3D; every row is a volume.

    Also a flat layout of the same kind: `images`, or `masks_packed` (`np.packbits` of `shape`), one row
    per volume, with `patient`, `malignancy` or `labels` and `split` of the same length. Where `nodule` says
    which nodule a slice with a mask shows, the columns may have a value per nodule, and the mask's
    components are its boxes.
    """
    found = Found()
    source = relative(path, root)
    try:
        shapes = {name: header[0] for name, header in array_headers(path).items()}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        found.rejected.append(
            (source, "empty file" if path.stat().st_size == 0 else f"unreadable: {error}")
        )
        return found
    # adrenalmnist3d_64 holds the same people as adrenalmnist3d.
    dataset = wanted.dataset or re.sub(r"_(64|128|224)$", "", stem_of(path))
    splits = [split for split in _SPLITS if f"{split}_images" in shapes]
    if not splits:
        return _flat_arrays(path, source, dataset, shapes, found)
    with np.load(path, allow_pickle=False) as archive:
        for split in splits:
            count = shapes[f"{split}_images"][0]
            labels = archive[f"{split}_labels"] if f"{split}_labels" in shapes else np.zeros((count, 0))
            labels = labels.reshape(len(labels), -1)
            if len(labels) != count:
                found.rejected.append((source, f"{count} {split} images but {len(labels)} labels"))
                continue
            for index in range(count):
                found.scans.append(
                    Scan(
                        id=f"{stem_of(path)}/{split}-{index:05d}",
                        dataset=dataset,
                        subject=f"{split}-{index:05d}",
                        source=source,
                        files=((path,),),
                        label=_npz_label(labels[index]),
                        split=split,
                        named=True,
                        member=(f"{split}_images", index),
                    )
                )
    return found


def _npz_label(row: np.ndarray) -> int | float | str | None:
    if row.size == 0:
        return None
    if row.size > 1:  # several findings at once: the set is the class
        return "+".join(str(i) for i in np.flatnonzero(row)) or "none"
    value = row[0].item()
    return int(value) if isinstance(value, bool) or float(value).is_integer() else float(value)


def _flat_label(value: np.generic, real: bool) -> int | float | str:
    """One type for a whole column: real if any of its values is."""
    plain = value.item()
    return plain if isinstance(plain, str) else float(plain) if real else int(plain)


def _flat_arrays(
    path: Path, source: str, dataset: str, shapes: dict[str, tuple[int, ...]], found: Found
) -> Found:
    member = next((name for name in ("images", PACKED) if name in shapes), None)
    if member is None or (member == PACKED and "shape" not in shapes):
        found.rejected.append(
            (
                source,
                f"arrays {', '.join(sorted(shapes)) or 'none'}; expected MedMNIST's train_images and so on",
            )
        )
        return found
    count = shapes[member][0]
    with np.load(path, allow_pickle=False) as archive:
        small = {
            name: archive[name]
            for name in ("patient", "subject", "malignancy", "labels", "label", "split", "nodule")
            if name in shapes
        }
    rows = small.get("nodule", np.arange(count))

    def column(*names: str) -> np.ndarray | None:
        """A column per row; one value per nodule is spread over the nodule's rows."""
        for name in names:
            if name in small:
                values = small[name]
                return values if len(values) == count else values[rows]
        return None

    subjects, labels, split = (
        column("patient", "subject"),
        column("malignancy", "labels", "label"),
        column("split"),
    )
    if labels is not None and labels.dtype.kind == "f" and not np.isfinite(labels).all():
        found.rejected.append((source, "labels that are not finite"))
        return found
    shown = member == "images" and PACKED in shapes and "nodule" in shapes
    if shown:
        found.box_names[dataset] = {"1": "nodule"}
    real = labels is not None and labels.dtype.kind == "f" and bool((labels != np.rint(labels)).any())
    counts: Counter[str] = Counter()
    for index in range(count):
        subject = str(subjects[index]) if subjects is not None else f"{index:05d}"
        counts[subject] += 1
        found.scans.append(
            Scan(
                id=f"{stem_of(path)}/{subject}"
                + (f"-{counts[subject]:03d}" if subjects is not None else ""),
                dataset=dataset,
                subject=subject,
                source=source,
                files=((path,),),
                label=None if labels is None else _flat_label(labels[index], real),
                split="" if split is None else sources.split_of(str(split[index])) or "",
                named=True,
                member=(member, index),
                mask_boxes=shown,
            )
        )
    return found


def array_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of every array of an .npz, without reading them."""
    headers = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                headers[name.removesuffix(".npy")] = _array_header(file)[:2]
    return headers


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are not read")
    return shape, dtype, fortran


class RowReader:
    """Reads the rows of an .npz array in rising order, one at a time: memory of a row, not of the file."""

    def __init__(self, path: Path, member: str):
        self._archive = zipfile.ZipFile(path)
        self._file = self._archive.open(f"{member}.npy")
        self.shape, self.dtype, fortran = _array_header(self._file)
        if fortran:
            raise DataError(f"{path.name}: {member} is in Fortran order; save it in C order")
        self._bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
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
        """Closes the file."""
        self._file.close()
        self._archive.close()


class Rows:
    """Rows of any number of .npz arrays, asked for in rising order per array.

    A mask array of packed bits beside `images` gives the rows their masks.
    """

    def __init__(self) -> None:
        self._readers: dict[tuple[Path, str], RowReader] = {}
        self._digests: dict[Path, str] = {}
        self._shapes: dict[Path, tuple[int, ...]] = {}
        self._packed: dict[Path, bool] = {}

    def of(self, path: Path, member: str, index: int) -> tuple[np.ndarray, np.ndarray | None, str]:
        """The voxels of a row, its mask if there is one, and the SHA-256 of the file.

        Raises:
            DataError: The file is cut short or damaged.
        """
        try:
            if path not in self._digests:
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
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
            raise DataError(f"unreadable: {error}") from error
        except Exception as error:  # zlib.error has no public root
            raise DataError(f"unreadable: {type(error).__name__}: {error}") from error

    def _reader(self, path: Path, member: str) -> RowReader:
        if (path, member) not in self._readers:
            self._readers[path, member] = RowReader(path, member)
        return self._readers[path, member]

    @staticmethod
    def _unpacked(row: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.unpackbits(row)[: int(np.prod(shape))].reshape(shape)
