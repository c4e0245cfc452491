"""Opens HDF5 stores as one lazy collection: only the index is read until a crop is asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import h5py
import numpy as np
import torch
from torch import Tensor

from ssl3d.data.index import FORMAT, ROW, VERSION, label_of
from ssl3d.data.record import SPLITS, Affine
from ssl3d.data.record import Record as Record
from ssl3d.data.writer import PART, assemble, part_record, write_part
from ssl3d.errors import DataError

__all__ = [
    "Collection",
    "Record",
    "Store",
    "Volume",
    "assemble",
    "open_data",
    "part_record",
    "write_part",
]

_MAX_OPEN = 128  # files a process keeps open at once; a pool of shards may have thousands


class Store:
    """One store file: its index in memory, its voxels on disk.

    The file is opened by each process for itself and never locked, so a store survives `fork`, pickling
    and readers on network file systems.

    Attributes:
        path: Of the file.
        rows: Index table, one row per volume.
        datasets: Names of the data sets.
        people: Per identity code: position in `datasets`, subject.

    Raises:
        DataError: The file is missing, cut short, from a newer format, or not a store.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        file = _checked(self.path)
        with file:
            try:
                self.rows: np.ndarray = file["index/table"].astype(ROW)[()]
                self.text: bytes = file["index/text"][()].tobytes()
                head = json.loads(file["index/head"][()].tobytes())
            except (KeyError, OSError, ValueError, TypeError) as error:
                raise DataError(
                    f"{path}: its index cannot be read ({error}); prepare the store again"
                ) from error
        self.datasets: list[str] = head["datasets"]
        self.orientations: list[str] = head["orientations"]
        self.label_names: list[str] = head["labels"]
        self.people: list[tuple[int, str]] = [tuple(person) for person in head["identities"]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def file(self) -> h5py.File:
        """The file, opened by this process."""
        return _open_here(self.path)

    def _json(self, name: str, default: Any) -> Any:
        file = self.file
        return json.loads(file[name][()].tobytes()) if name in file else default

    @property
    def settings(self) -> dict[str, Any]:
        """How the volumes were made."""
        return self._json("settings", {})

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Per data set: counts, shapes, spacings, intensities."""
        return self._json("fingerprint", {})

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """The files that were refused, with their reasons."""
        return self._json("rejected", [])


class Volume:
    """One volume of a collection, lazy.

    Attributes:
        index: Unique over all stores of the collection it came from, kept by `select`.
        shape: (C, D, H, W).
        spacing: mm along (D, H, W).
        has_mask: Whether `read_mask` works.
        block: Voxels per block of the foreground map along (D, H, W).
    """

    def __init__(self, store: Store, row: int, index: int):
        self._store, self._number, self.index = store, row, index
        entry = self._row = store.rows[row]
        self.shape: tuple[int, int, int, int] = tuple(entry["shape"].tolist())
        self.spacing: tuple[float, float, float] = tuple(entry["spacing"].tolist())
        self.has_mask = bool(entry["has_mask"])
        self.block: tuple[int, int, int] = tuple(entry["block"].tolist())

    def __repr__(self) -> str:
        return f"Volume({self.index}, {self.dataset}/{self.id}, shape {self.shape}, spacing {self.spacing})"

    @property
    def id(self) -> str:
        """Name of the volume, unique in its store."""
        start = int(self._row["id_at"])
        return self._store.text[start : start + int(self._row["id_length"])].decode()

    @property
    def dataset(self) -> str:
        """Data set."""
        return self._store.datasets[self._store.people[self._row["identity"]][0]]

    @property
    def subject(self) -> str:
        """Subject within the data set."""
        return self._store.people[self._row["identity"]][1]

    @property
    def split(self) -> str:
        """As the data came: train, val, test, or empty."""
        return SPLITS[self._row["split"]]

    @property
    def orientation(self) -> str:
        """Either "SAR" or "unknown"."""
        return self._store.orientations[self._row["orientation"]]

    @property
    def label(self) -> int | float | str | None:
        """Class, ordinal or real value."""
        return label_of(self._row, self._store.label_names)

    @property
    def boxes(self) -> np.ndarray | None:
        """(n, 6) float32, z1 y1 x1 z2 y2 x2 in voxels; None where nobody looked for any."""
        return self._flat("boxes")

    @property
    def box_labels(self) -> np.ndarray | None:
        """(n,) int64."""
        return self._flat("box_labels")

    def _flat(self, name: str) -> np.ndarray | None:
        count, start = int(self._row["boxes"]), int(self._row["boxes_at"])
        return None if count < 0 else self._store.file[name][start : start + count]

    @cached_property
    def record(self) -> Record:
        """Everything known about the volume."""
        start = int(self._row["provenance_at"])
        text = self._store.file["provenance"][start : start + int(self._row["provenance_length"])]
        return Record.from_json(text.tobytes())

    @property
    def affine(self) -> Affine:
        """4 x 4, voxel (d, h, w) to patient mm (RAS+ world)."""
        return self.record.affine

    def crop_affine(self, start: Sequence[int]) -> Affine:
        """The affine of a crop that begins at voxel `start`: places it back in patient space."""
        matrix = np.array(self.affine, dtype=np.float64)
        matrix[:3, 3] += matrix[:3, :3] @ np.asarray(start, dtype=np.float64)
        return tuple(tuple(map(float, row)) for row in matrix)

    @cached_property
    def background(self) -> tuple[float, ...]:
        """Value of air, per channel; what `read` fills in outside the volume."""
        return tuple(self._store.file[f"images/{self._number}"].attrs["background"].tolist())

    def read(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Voxels (C, d, h, w), float32; the whole volume if nothing is said.

        Args:
            start: First voxel along (D, H, W); may be negative.
            size: Voxels along (D, H, W); may reach outside, where the background is filled in.

        Raises:
            DataError: The store cannot be read here.
        """
        data = self._data("images")
        start, size = self._window(start, size)
        inside, place, whole = _clip(start, size, self.shape[1:])
        if whole:
            found = _decoded(data[(slice(None), *inside)], data)
            return torch.from_numpy(found)
        out = np.empty((self.shape[0], *size), np.float32)
        out[:] = np.asarray(self.background, np.float32)[:, None, None, None]
        if all(s.stop > s.start for s in inside):
            out[(slice(None), *place)] = _decoded(data[(slice(None), *inside)], data)
        return torch.from_numpy(out)

    def read_mask(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Mask (d, h, w), int64, 0 outside the volume; arguments as of `read`.

        Raises:
            DataError: The volume has no mask, or the store cannot be read here.
        """
        if not self.has_mask:
            raise DataError(f"{self.dataset}/{self.id}: has no mask")
        data = self._data("masks")
        start, size = self._window(start, size)
        inside, place, _ = _clip(start, size, self.shape[1:])
        out = np.zeros(tuple(size), np.int64)
        if all(s.stop > s.start for s in inside):
            out[place] = data[inside]
        return torch.from_numpy(out)

    def foreground(self) -> np.ndarray:
        """Share of each block that is foreground, 0 to 1, float32; see `block`."""
        shape = tuple(-(-n // b) for n, b in zip(self.shape[1:], self.block, strict=True))
        start = int(self._row["foreground_at"])
        values = self._store.file["foreground"][start : start + int(np.prod(shape))]
        return values.reshape(shape).astype(np.float32) / 255

    def foreground_box(self, share: float = 0.1) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """First voxel and end (exclusive) of what holds all blocks with `share` foreground or more.

        The whole volume where no block has.
        """
        occupied = self.foreground() >= share
        limits = self.shape[1:]
        if not occupied.any():
            return (0, 0, 0), limits
        first, end = [], []
        for axis, (block, limit) in enumerate(zip(self.block, limits, strict=True)):
            where = np.flatnonzero(occupied.any(axis=tuple(a for a in range(3) if a != axis)))
            first.append(int(where[0]) * block)
            end.append(min(int(where[-1] + 1) * block, limit))
        return (first[0], first[1], first[2]), (end[0], end[1], end[2])

    def _data(self, group: str) -> h5py.Dataset:
        try:
            return self._store.file[f"{group}/{self._number}"]
        except KeyError as error:
            raise DataError(
                f"{self._store.path}: {self.id} is missing from {group}; prepare it again"
            ) from error

    def _window(
        self, start: Sequence[int] | None, size: Sequence[int] | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        begin = (0, 0, 0) if start is None else tuple(map(int, start))
        if size is None:
            size = [n - b for n, b in zip(self.shape[1:], begin, strict=True)]
        extent = tuple(map(int, size))
        if len(begin) != 3 or len(extent) != 3 or min(extent) < 1:
            raise ValueError(f"crop at {begin} of size {extent}: expected three numbers each, sizes from 1")
        return begin, extent


class Collection(Sequence[Volume]):
    """The volumes of several stores as one sequence, or a selection of them.

    Args:
        stores: In order; their volumes are numbered through.
        rows: Which volumes, by number; all of them if left out.
    """

    def __init__(self, stores: Sequence[Store], rows: np.ndarray | None = None):
        self.stores = tuple(stores)
        self._ends = np.cumsum([len(store) for store in stores])
        total = int(self._ends[-1]) if len(stores) else 0
        self.rows = np.arange(total) if rows is None else np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> Volume: ...
    @overload
    def __getitem__(self, position: slice) -> Collection: ...
    def __getitem__(self, position: int | slice) -> Volume | Collection:
        """The volume at a position, or the collection of a slice."""
        if isinstance(position, slice):
            return self.select(np.arange(len(self))[position])
        return self.volume(int(self.rows[position]))

    def volume(self, index: int) -> Volume:
        """The volume of a `Volume.index`, selected or not."""
        store = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[store - 1]) if store else 0
        return Volume(self.stores[store], index - start, index)

    def __iter__(self) -> Iterator[Volume]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Any) -> Collection:
        """The volumes at these positions (integers, or a mask of booleans); they keep their `index`."""
        chosen = object.__new__(Collection)
        chosen.stores, chosen._ends = self.stores, self._ends
        chosen.rows = self.rows[np.asarray(indices)] if len(indices) else self.rows[:0]
        # Codes stay those of the whole, so that a memory bank or a split may use either.
        if "_codes" in self.__dict__:
            chosen.__dict__["_codes"] = self._codes
        return chosen

    def _column(self, field: str) -> np.ndarray:
        if len(self.stores) == 1:
            return self.stores[0].rows[field][self.rows]
        if not self.stores:
            return np.zeros(0, ROW[field])
        return np.concatenate([store.rows[field] for store in self.stores])[self.rows]

    @cached_property
    def _codes(self) -> tuple[np.ndarray, np.ndarray, list[str], list[tuple[str, str]]]:
        """Of all volumes: code of the data set and of the person; the names behind the codes."""
        datasets: dict[str, int] = {}
        people: dict[tuple[str, str], int] = {}
        by_dataset, by_person = [], []
        for store in self.stores:
            own = [datasets.setdefault(name, len(datasets)) for name in store.datasets]
            mine = np.array(
                [people.setdefault((store.datasets[d], s), len(people)) for d, s in store.people], np.int64
            )
            identity = store.rows["identity"]
            by_person.append(mine[identity])
            by_dataset.append(np.array([own[d] for d, _ in store.people], np.int64)[identity])
        empty = [np.zeros(0, np.int64)]
        return (
            np.concatenate(by_dataset or empty),
            np.concatenate(by_person or empty),
            list(datasets),
            list(people),
        )

    @property
    def dataset_codes(self) -> np.ndarray:
        """(N,) int64, one number per data set."""
        return self._codes[0][self.rows]

    @property
    def subject_codes(self) -> np.ndarray:
        """(N,) int64, one number per person, that is (data set, subject)."""
        return self._codes[1][self.rows]

    @property
    def dataset_names(self) -> list[str]:
        """Names behind `dataset_codes`."""
        return self._codes[2]

    @cached_property
    def ids(self) -> np.ndarray:
        """(N,) strings."""
        return self._strings(lambda store: _texts(store))

    @property
    def datasets(self) -> np.ndarray:
        """(N,) strings."""
        return np.array(self._codes[2], dtype=object)[self.dataset_codes]

    @property
    def subjects(self) -> np.ndarray:
        """(N,) strings; a person is (data set, subject)."""
        return np.array([subject for _, subject in self._codes[3]], dtype=object)[self.subject_codes]

    @property
    def splits(self) -> np.ndarray:
        """(N,) strings: "", train, val, test."""
        return np.array(SPLITS, dtype=object)[self._column("split")]

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) objects: int, float, str or None."""
        return self._strings(lambda store: [label_of(row, store.label_names) for row in store.rows])

    @property
    def shapes(self) -> np.ndarray:
        """(N, 4) int64: C, D, H, W."""
        return self._column("shape").astype(np.int64)

    @property
    def spacings(self) -> np.ndarray:
        """(N, 3) float64, mm along D, H, W."""
        return self._column("spacing")

    @property
    def has_mask(self) -> np.ndarray:
        """(N,) booleans."""
        return self._column("has_mask")

    @property
    def has_boxes(self) -> np.ndarray:
        """(N,) booleans: somebody looked for boxes, though there may be none."""
        return self._column("boxes") >= 0

    @property
    def orientations(self) -> np.ndarray:
        """(N,) strings."""
        return self._strings(lambda store: np.array(store.orientations, object)[store.rows["orientation"]])

    @property
    def settings(self) -> list[dict[str, Any]]:
        """How the volumes were made, per store."""
        return [store.settings for store in self.stores]

    def _strings(self, of: Any) -> np.ndarray:
        columns = []
        for store in self.stores:
            column = np.empty(len(store), dtype=object)
            column[:] = of(store)
            columns.append(column)
        return np.concatenate(columns or [np.empty(0, dtype=object)])[self.rows]

    def identities(self) -> list[tuple[str, str]]:
        """The people in it, (data set, subject), in the order of their codes."""
        return [self._codes[3][code] for code in np.unique(self.subject_codes)]

    def digest(self) -> str:
        """A hash of the volumes in order: identities, labels, splits, voxels, masks, boxes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(np.ascontiguousarray(self._column("content")).data)
        for column in (self.ids, self.datasets, self.subjects, self.splits, self.labels):
            digest.update("\0".join(map(str, column)).encode())
        return digest.hexdigest()


def open_data(paths: Sequence[str | Path], **prepare_options: Any) -> Collection:
    """Opens stores, folders of shards, phantoms or scans as one collection.

    Args:
        paths: `.h5` stores; folders that hold only `.h5` shards; `phantoms` or `phantoms:N`; or whatever
            `ssl3d prepare` takes, prepared into a cache ($SSL3D_CACHE, else ~/.cache/ssl3d).
        prepare_options: Options of `prepare`, for scans.

    Raises:
        DataError: Something is missing, unreadable, given twice, or a folder mixes stores and scans.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    stores: list[Path] = []
    scans: list[Path] = []
    for path in paths:
        text = str(path)
        if text == "phantoms" or text.startswith("phantoms:"):
            from ssl3d.data.phantoms import phantom_store

            stores.append(phantom_store(_count(text)))
            continue
        found, is_store = _sort_out(Path(text))
        if is_store:
            stores += found
        elif Path(text).is_dir() or Path(text).suffix in (".npz", ".csv"):
            stores.append(_prepared([Path(text)], prepare_options))
        else:
            scans.append(Path(text))
    if scans:  # single files make one store together, not one each
        stores.append(_prepared(scans, prepare_options))
    if not stores:
        raise DataError("no data given: name a store, a folder of scans, or phantoms")
    resolved = [path.resolve() for path in stores]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise DataError(f"{stores[i]}: given twice; its volumes would count double")
    return Collection([Store(path) for path in stores])


# ------------------------------------------------------------------------------------------------

_open_files: OrderedDict[Path, h5py.File] = OrderedDict()
_open_by = os.getpid()


def _open_here(path: Path) -> h5py.File:
    """The file of this process; HDF5 handles must not cross a fork."""
    global _open_files, _open_by
    if _open_by != os.getpid():
        # Dropped, not closed: the parent still uses what these handles stand for.
        _forgotten.append(_open_files)
        _open_files, _open_by = OrderedDict(), os.getpid()
    if path in _open_files:
        _open_files.move_to_end(path)
        return _open_files[path]
    while len(_open_files) >= _MAX_OPEN:
        _open_files.popitem(last=False)[1].close()
    file = _open_files[path] = _checked(path)
    return file


_forgotten: list[OrderedDict[Path, h5py.File]] = []


def _checked(path: Path) -> h5py.File:
    """Opens a store for reading, or says in one line what is wrong with it."""
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir():
        raise DataError(f"{path}: a folder, not a store")
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise DataError(_why_not(path, error)) from error
    kind, version = file.attrs.get("format"), file.attrs.get("version")
    if kind == FORMAT and isinstance(version, int | np.integer) and version <= VERSION:
        return file
    file.close()
    if kind == FORMAT:
        raise DataError(f"{path}: store format {version}, this ssl3d reads up to {VERSION}: update ssl3d")
    if kind == PART:
        raise DataError(f"{path}: one part of an unfinished store; let `ssl3d prepare` finish it")
    raise DataError(f"{path}: an HDF5 file, but not a store of ssl3d; make one with `ssl3d prepare`")


def _why_not(path: Path, error: OSError) -> str:
    if not os.access(path, os.R_OK):
        return f"{path}: no permission to read it"
    size = path.stat().st_size
    with path.open("rb") as file:
        signed = file.read(8) == b"\x89HDF\r\n\x1a\n"
    if not signed:
        return f"{path}: not an HDF5 file ({size} bytes); make a store with `ssl3d prepare`"
    return f"{path}: cut short or damaged ({size} bytes on disk); prepare it again, or copy it again"


_SCANS = (
    ".nii",
    ".nii.gz",
    ".nrrd",
    ".nhdr",
    ".mha",
    ".mhd",
    ".dcm",
    ".npz",
    ".png",
    ".jpg",
    ".jpeg",
    ".ima",
)


def _sort_out(path: Path) -> tuple[list[Path], bool]:
    """The stores behind a path and True, or what to prepare and False."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        with path.open("rb") as file:
            signed = file.read(8) == b"\x89HDF\r\n\x1a\n"
        return [path], signed or path.suffix.lower() in (".h5", ".hdf5")
    if path.name.endswith(".partial"):
        raise DataError(f"{path}: an unfinished store; let `ssl3d prepare` finish it")
    stores, scan = [], None
    for folder, folders, files in os.walk(path):
        for name in [name for name in folders if name.endswith(".partial")]:
            if not (Path(folder) / name.removesuffix(".partial")).exists():
                raise DataError(
                    f"{Path(folder) / name}: an unfinished store; let `ssl3d prepare` finish it"
                )
        folders[:] = sorted(n for n in folders if not n.endswith(".partial") and not n.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            if name.lower().endswith((".h5", ".hdf5")):
                stores.append(Path(folder) / name)
            elif scan is None and name.lower().endswith(_SCANS):
                scan = Path(folder) / name
    if stores and scan is not None:
        raise DataError(f"{path}: holds stores ({stores[0].name}) and scans ({scan.name}); give them apart")
    return (stores, True) if stores else ([path], False)


def _prepared(paths: list[Path], options: dict[str, Any]) -> Path:
    from ssl3d.data.prepare import prepare_cached

    return Path(prepare_cached(paths, **options))


def _count(text: str) -> int:
    from ssl3d.data.phantoms import DEFAULT_COUNT

    number = text.partition(":")[2]
    if not number:
        return DEFAULT_COUNT
    if not number.isdigit() or int(number) < 1:
        raise DataError(f"{text}: expected phantoms:N with N from 1")
    return int(number)


def _clip(
    start: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...], bool]:
    """What of a window lies in the volume, where in the window that is, and whether it is all of it."""
    inside, place = [], []
    for begin, extent, limit in zip(start, size, shape, strict=True):
        low, high = min(max(begin, 0), limit), min(max(begin + extent, 0), limit)
        inside.append(slice(low, high))
        place.append(slice(low - begin, high - begin))
    whole = all(p.start == 0 and p.stop == n for p, n in zip(place, size, strict=True))
    return tuple(inside), tuple(place), whole


def _decoded(stored: np.ndarray, data: h5py.Dataset) -> np.ndarray:
    found = stored.astype(np.float32)
    if stored.dtype == np.int16:
        found *= np.float32(data.attrs["scale"])
        found += np.float32(data.attrs["offset"])
    return found


def _texts(store: Store) -> list[str]:
    ends = (store.rows["id_at"] + store.rows["id_length"]).tolist()
    return [store.text[a:b].decode() for a, b in zip(store.rows["id_at"].tolist(), ends, strict=True)]
