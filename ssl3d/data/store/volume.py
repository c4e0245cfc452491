"""One store file and one of its volumes: lazy, opened by each process for itself."""

from __future__ import annotations

import atexit
import math
import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ssl3d import memory
from ssl3d.data.store.chunks import UNREADABLE, Chunked
from ssl3d.data.store.digests import content_digest, index_digest
from ssl3d.data.store.index import FORMAT, PART, ROW, VERSION, fault_of_index, label_of
from ssl3d.data.store.record import SPLITS, Affine, Record
from ssl3d.data.store.remote import Remote, is_address
from ssl3d.errors import DataError, PluginError, is_transient, reason_of
from ssl3d.json_files import parse_json

_MAX_OPEN = 128  # files a process keeps open at once; a pool of shards may have thousands
_CACHE = 1 << 20  # bytes of chunks that HDF5 keeps of each open data set: no chunk is larger
_MAX_CACHED = 1 << 26  # bytes that all open data sets together may keep
_HANDLE = 1 << 14  # bytes that an open data set takes without its chunks


class Store:
    """One store file: its index in memory, its voxels on disk.

    The file is opened by each process for itself and never locked, so a store survives `fork`, pickling
    and readers on network file systems.

    Attributes:
        path: Absolute path of the file, or its address on a server.
        rows: Index table, one row per volume.
        datasets: Names of the data sets.
        people: Position in `datasets` and subject, per identity code.
        ignored: Rows of the volumes that have voxels to ignore.
        state: Number, time of change and size of the file.

    Raises:
        DataError: The file is missing, cut short, damaged, from a newer format, or not a store.
    """

    def __init__(self, path: str | Path | Remote):
        if not isinstance(path, Remote):
            path = Remote.of(path) if is_address(path) else Path(path).absolute()
        self.path: Path | Remote = path
        file = _checked(self.path)
        self.state = _state(self.path)
        with file:
            try:
                place = file["index/table"]
                table = place[()]
                self.rows: np.ndarray = table if table.dtype == ROW else place.astype(ROW)[()]
                self.text: bytes = file["index/text"][()].tobytes()
                content = file["index/head"][()].tobytes()
                expected = place.attrs.get("digest")
                if expected not in (None, index_digest(table, self.text, content)):
                    raise ValueError("its bytes are not those that were written")
                head = parse_json(content)
                if fault := fault_of_index(self.rows, self.text, head):
                    raise ValueError(fault)
            except UNREADABLE as error:
                if is_transient(error):
                    raise
                raise DataError(
                    f"{path}: its index cannot be read ({reason_of(error)}); prepare the store again"
                ) from error
        self.datasets: list[str] = head["datasets"]
        self.orientations: list[str] = head["orientations"]
        self.label_names: list[str] = head["labels"]
        self.people: list[tuple[int, str]] = [tuple(person) for person in head["identities"]]
        self.ignored: frozenset[int] = frozenset(head.get("ignored", ()))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def file(self) -> h5py.File:
        """HDF5 file, opened by this process."""
        return _open_here(self.path, self.state)

    def array(self, name: str) -> Chunked:
        """Look up a data set of the file, and keep it: a look-up costs as much as reading a small crop.

        Raises:
            KeyError: There is no data set of that name.
        """
        return _dataset_here(self.path, self.state, name)

    @contextmanager
    def reading(self, subject: str) -> Iterator[None]:
        """Raise what HDF5 and the parsers raise over damaged bytes as one line.

        Args:
            subject: What is read in the block, such as the mask of a volume.

        Raises:
            DataError: The bytes are damaged: a check sum does not hold, or they are of something else.
            OSError: The disk or memory failed, which says nothing of the store.
        """
        try:
            yield
        except UNREADABLE as error:
            if is_transient(error):
                raise
            raise DataError(
                f"{self.path}: {subject} is damaged ({reason_of(error)}); copy the store again, or prepare "
                "it again (ssl3d info --verify names all that is damaged)"
            ) from error

    def _json(self, name: str, default: Any) -> Any:
        with self.reading(f"what it says of its {name}"):
            file = self.file
            return parse_json(file[name][()].tobytes()) if name in file else default

    @property
    def settings(self) -> dict[str, Any]:
        """Settings with which the volumes were made."""
        return self._json("settings", {})

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Counts, shapes, spacings and intensities, per data set."""
        return self._json("fingerprint", {})

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """Files that were refused, with their reasons."""
        return self._json("rejected", [])


class Volume:
    """One volume of a collection, read when asked for.

    Attributes:
        index: Number that is unique over all stores of the collection, kept by `select`.
        shape: (C, D, H, W).
        spacing: Voxel sides, mm along (D, H, W).
        has_mask: Whether `read_mask` works.
        has_ignored: Whether some of its voxels are to be ignored, such as defaced ones.
        block: Voxels per block of the foreground map along (D, H, W).
    """

    _withheld_from = ""

    def __init__(self, store: Store, row: int, index: int):
        self._store, self._number, self.index = store, row, index
        entry = self._row = store.rows[row]
        self.shape: tuple[int, int, int, int] = tuple(entry["shape"].tolist())
        self.spacing: tuple[float, float, float] = tuple(entry["spacing"].tolist())
        self.has_mask = bool(entry["has_mask"])
        self.has_ignored = row in store.ignored
        self.block: tuple[int, int, int] = tuple(entry["block"].tolist())

    def __repr__(self) -> str:
        return f"Volume({self.index}, {self.dataset}/{self.id}, shape {self.shape}, spacing {self.spacing})"

    def withhold_labels(self, who: str) -> None:
        """Refuse label, boxes and mask from here on, as `who` does not say that it learns from them."""
        self._withheld_from = who

    def _labelled(self, annotation: str) -> None:
        if self._withheld_from:
            raise PluginError(
                f"{self._withheld_from} reads a volume's {annotation}, but its class does not set "
                "uses_labels = True: checkpoints would say that no labels were seen"
            )

    @property
    def place(self) -> tuple[Store, int]:
        """Store of the volume, and its row there."""
        return self._store, self._number

    @property
    def id(self) -> str:
        """Name of the volume, unique in its store."""
        start = int(self._row["id_at"])
        return self._store.text[start : start + int(self._row["id_length"])].decode()

    @property
    def dataset(self) -> str:
        """Name of the volume's data set."""
        return self._store.datasets[self._store.people[self._row["identity"]][0]]

    @property
    def subject(self) -> str:
        """Name of the subject within the data set."""
        return self._store.people[self._row["identity"]][1]

    @property
    def split(self) -> str:
        """Split as the data came: train, val, test, or empty."""
        return SPLITS[self._row["split"]]

    @property
    def orientation(self) -> str:
        """Orientation of the axes: "SAR" or "unknown"."""
        return self._store.orientations[self._row["orientation"]]

    @property
    def label(self) -> int | float | str | None:
        """Class, ordinal or real value; None where unknown."""
        self._labelled("label")
        return label_of(self._row, self._store.label_names)

    @property
    def boxes(self) -> np.ndarray | None:
        """Boxes (n, 6) float32, z1 y1 x1 z2 y2 x2 in voxels; None where nobody looked for any."""
        self._labelled("boxes")
        return self._flat("boxes")

    @property
    def box_labels(self) -> np.ndarray | None:
        """Classes of the boxes, (n,) int64."""
        self._labelled("box labels")
        return self._flat("box_labels")

    def _flat(self, name: str) -> np.ndarray | None:
        count, start = int(self._row["boxes"]), int(self._row["boxes_at"])
        return None if count < 0 else self._slice(name, start, count)

    def _slice(self, name: str, start: int, count: int) -> np.ndarray:
        """Read the volume's own part of a flat data set."""
        subject = "record" if name == "provenance" else name.replace("_", " ")
        with self._reading(f"the {subject}"):
            values = self._store.array(name)[start : start + count]
            if len(values) != count:  # HDF5 cuts what reaches over the end
                raise ValueError(f"{len(values)} of {count} entries")
            return values

    def _reading(self, subject: str) -> AbstractContextManager[None]:
        return self._store.reading(f"{subject} of {self.dataset}/{self.id}")

    @cached_property
    def record(self) -> Record:
        """Record of all that is known about the volume, but for a label that is withheld."""
        start, length = int(self._row["provenance_at"]), int(self._row["provenance_length"])
        text = self._slice("provenance", start, length)
        with self._reading("the record"):
            record = Record.from_json(text.tobytes())
        return replace(record, label=None) if self._withheld_from else record

    @property
    def affine(self) -> Affine:
        """Affine, 4 x 4, voxel (d, h, w) to patient mm (RAS+ world)."""
        return self.record.affine

    def crop_affine(self, start: Sequence[int]) -> Affine:
        """Return the affine of a crop that begins at voxel `start`, which places it in the patient."""
        matrix = np.array(self.affine, dtype=np.float64)
        matrix[:3, 3] += matrix[:3, :3] @ np.asarray(start, dtype=np.float64)
        return tuple(tuple(map(float, row)) for row in matrix)

    @cached_property
    def background(self) -> tuple[float, ...]:
        """Value of air per channel, which `read` fills in outside the volume."""
        data = self.stored("images")
        with self._reading("the background"):
            return tuple(data.attrs["background"].tolist())

    def read(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Read voxels (C, d, h, w), float32; by default the whole volume.

        Args:
            start: First voxel along (D, H, W); may be negative.
            size: Voxels along (D, H, W); may reach outside, where the background is filled in.

        Raises:
            DataError: The store cannot be read here, its check sum does not hold, or the voxels need more
                memory than may be taken.

        Example:
            >>> from ssl3d.api import open_data
            >>> volume = open_data(["phantoms:4"])[0]
            >>> volume.read(start=(0, 8, 8), size=(16, 32, 32)).shape
            torch.Size([1, 16, 32, 32])
        """
        data = self._summed("images")
        start, size = self._window(start, size)
        inside, place, whole = _clip(start, size, self.shape[1:])
        self._check_memory(self.shape[0] * math.prod(size) * (4 + data.dtype.itemsize))
        if whole:
            return self._voxels(data, inside)
        out = torch.empty((self.shape[0], *size))
        out[:] = torch.tensor(self.background)[:, None, None, None]
        if all(s.stop > s.start for s in inside):
            out[(slice(None), *place)] = self._voxels(data, inside)
        return out

    def _check_memory(self, needed: int) -> None:
        memory.check(needed, f"{self.dataset}/{self.id}, shape {self.shape}: ")

    def _voxels(self, data: Chunked, inside: tuple[slice, ...]) -> Tensor:
        with self._reading("the image"):
            return _decoded(data[(slice(None), *inside)], data)

    def read_mask(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Read the mask (d, h, w), int64, 0 outside the volume; the arguments are those of `read`.

        Raises:
            DataError: The volume has no mask, the store cannot be read here, or its check sum does not
                hold.
        """
        self._labelled("mask")
        if not self.has_mask:
            raise DataError(f"{self.dataset}/{self.id}: has no mask")
        data = self._summed("masks")
        start, size = self._window(start, size)
        inside, place, _ = _clip(start, size, self.shape[1:])
        self._check_memory(math.prod(size) * (8 + data.dtype.itemsize))
        out = np.zeros(tuple(size), np.int64)
        if all(s.stop > s.start for s in inside):
            with self._reading("the mask"):
                out[place] = data[inside]
        return torch.from_numpy(out)

    @property
    def may_ignore(self) -> bool:
        """Whether some volume of its store has voxels to ignore."""
        return bool(self._store.ignored)

    def read_ignored(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Read which voxels are to be ignored, (d, h, w), bool; the arguments are those of `read`.

        None are outside the volume, nor in a volume without such voxels.

        Raises:
            DataError: The store cannot be read here, or its check sum does not hold.
        """
        start, size = self._window(start, size)
        inside, place, _ = _clip(start, size, self.shape[1:])
        out = np.zeros(tuple(size), bool)
        if self.has_ignored and all(s.stop > s.start for s in inside):
            data = self._summed("ignored")
            with self._reading("the mask of voxels to ignore"):
                out[place] = data[inside]
        return torch.from_numpy(out)

    def foreground(self) -> np.ndarray:
        """Read the share of each block that is foreground, 0 to 1, float32; see `block`."""
        shape = tuple(-(-n // b) for n, b in zip(self.shape[1:], self.block, strict=True))
        values = self._slice("foreground", int(self._row["foreground_at"]), int(np.prod(shape)))
        return values.reshape(shape).astype(np.float32) / 255

    def foreground_box(self, share: float = 0.1) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Find the first voxel and the end (exclusive) of all blocks with `share` foreground or more.

        The box is the whole volume where no block has that much.
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

    def stored(self, group: str) -> Chunked:
        """Look up the volume's data set in `images`, `masks` or `ignored`, as it is stored.

        Raises:
            DataError: It is missing, or its shape is not that of the index.
        """
        named = {"ignored": "mask of voxels to ignore"}.get(group, group[:-1])
        with self._reading(f"the {named}"):
            data = self._store.array(f"{group}/{self._number}")
            expected = self.shape if group == "images" else self.shape[1:]
            if data.shape != expected:
                raise ValueError(f"its shape is {data.shape}, in the index {expected}")
            return data

    def _summed(self, group: str) -> Chunked:
        """Look up a data set as `stored` does, whose damage is told as it is read.

        In a store made before chunks had check sums, all of the volume is compared with its hash, once in
        each process.
        """
        data = self.stored(group)
        known = self._row["content"].tobytes().hex()
        key = self._store.path, self._store.state, self._number
        if not data.summed and data.nbytes and known.strip("0") and key not in _whole:
            with self._reading("the image, the mask or the boxes"):
                if self.content() != known:
                    raise ValueError("they are not those that were written")
            _whole.add(key)
        return data

    def content(self) -> str:
        """Hash all that is stored of the volume, in little memory: `Record.voxels` of what was written.

        Raises:
            DataError: Part of it cannot be read.
        """
        image = self.stored("images")
        mask = self.stored("masks") if self.has_mask else None
        ignored = self.stored("ignored") if self.has_ignored else None
        with self._reading("the image, the mask or the boxes"):
            scale, offset = (float(image.attrs[key]) for key in ("scale", "offset"))
            return content_digest(image, mask, self._flat("boxes"), scale, offset, ignored)

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


# ------------------------------------------------------------------------------------------------

# By path and state of the file: a store that was made anew is another one, in a notebook too.
_Key = tuple[Path | Remote, tuple[int, int, int]]


class _Handles(OrderedDict[tuple[_Key, str], Chunked]):
    """Open data sets, of which the oldest are dropped as soon as all together may keep too many bytes."""

    def __init__(self) -> None:
        super().__init__()
        self._held, self._names = 0, defaultdict[_Key, set[str]](set)

    def keep(self, key: tuple[_Key, str], data: Chunked) -> None:
        """Add a data set."""
        self[key] = data
        self._names[key[0]].add(key[1])
        self._held += _size(data)
        while self._held > _MAX_CACHED and len(self) > 1:
            self._drop(next(iter(self)))

    def close(self, file: _Key) -> None:
        """Drop all data sets of a file."""
        for name in list(self._names[file]):
            self._drop((file, name))
        del self._names[file]

    def _drop(self, key: tuple[_Key, str]) -> None:
        self._held -= _size(self.pop(key))
        self._names[key[0]].discard(key[1])


def _size(data: Chunked) -> int:
    return _HANDLE + min(data.nbytes, _CACHE)


_open_files: OrderedDict[_Key, h5py.File] = OrderedDict()
_known = _Handles()
_pending: dict[tuple[_Key, str], np.ndarray] = {}  # chunks not compared yet; outlives the handles
_whole: set[tuple[Path | Remote, tuple[int, int, int], int]] = set()  # volumes compared with their hashes
_forgotten: list[object] = []
_open_by = os.getpid()


def _state(path: Path | Remote) -> tuple[int, int, int]:
    if isinstance(path, Remote):
        return path.state
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


def _open_here(path: Path | Remote, state: tuple[int, int, int]) -> h5py.File:
    """Open the file for this process, or return it opened; HDF5 handles must not cross a fork."""
    global _open_files, _known, _open_by
    if _open_by != os.getpid():
        # Dropped, not closed: the parent still uses what these handles stand for.
        _forgotten.append((_open_files, _known))
        _open_files, _known, _open_by = OrderedDict(), _Handles(), os.getpid()
    key = path, state
    if key in _open_files:
        _open_files.move_to_end(key)
        return _open_files[key]
    while len(_open_files) >= _MAX_OPEN:
        oldest, file = _open_files.popitem(last=False)
        _known.close(oldest)
        file.close()
    file = _open_files[key] = _checked(path)
    return file


@atexit.register
def _close_remote() -> None:
    """Close what is read by Python's own functions, which HDF5 would call when they are gone already."""
    for (path, _), file in _open_files.items():
        if isinstance(path, Remote) and _open_by == os.getpid():
            file.close()


def _dataset_here(path: Path | Remote, state: tuple[int, int, int], name: str) -> Chunked:
    file, key = _open_here(path, state), ((path, state), name)
    if key in _known:
        _known.move_to_end(key)
        return _known[key]
    data = Chunked(file[name], _pending.get(key))
    if data.pending is not None:
        _pending[key] = data.pending
    _known.keep(key, data)
    return data


def _checked(path: Path | Remote) -> h5py.File:
    """Open a store for reading, or say in one line what is wrong with it."""
    if isinstance(path, Remote):
        source: Any = path.opened()
    else:
        source = path
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if path.is_dir():
            raise DataError(f"{path}: a folder, not a store")
    try:
        file = h5py.File(source, "r", locking=False, rdcc_nbytes=_CACHE, rdcc_nslots=521)
    except OSError as error:
        raise DataError(_why_not(path, error)) from error
    try:
        kind, version = file.attrs.get("format"), file.attrs.get("version")
    except UNREADABLE as error:
        file.close()
        raise DataError(
            f"{path}: damaged ({reason_of(error)}); prepare it again, or copy it again"
        ) from error
    if kind == FORMAT and isinstance(version, int | np.integer) and version <= VERSION:
        return file
    file.close()
    if kind == FORMAT:
        raise DataError(f"{path}: store format {version}, this ssl3d reads up to {VERSION}: update ssl3d")
    if kind == PART:
        raise DataError(f"{path}: one part of an unfinished store; let `ssl3d prepare` finish it")
    raise DataError(f"{path}: an HDF5 file, but not a store of ssl3d; make one with `ssl3d prepare`")


def _why_not(path: Path | Remote, error: OSError) -> str:
    remote = isinstance(path, Remote)
    if not remote and not os.access(path, os.R_OK):
        return f"{path}: no permission to read it"
    size = _state(path)[2]
    with path.opened() if isinstance(path, Remote) else path.open("rb") as file:
        signed = file.read(8) == b"\x89HDF\r\n\x1a\n"
    if not signed:
        return f"{path}: not an HDF5 file ({size} bytes); make a store with `ssl3d prepare`"
    where = "there" if remote else "on disk"
    return f"{path}: cut short or damaged ({size} bytes {where}); prepare it again, or copy it again"


def _clip(
    start: Sequence[int], size: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...], bool]:
    """Cut a window to the volume; return also where in the window that is, and whether it is all of it."""
    inside, place = [], []
    for begin, extent, limit in zip(start, size, shape, strict=True):
        low, high = min(max(begin, 0), limit), min(max(begin + extent, 0), limit)
        inside.append(slice(low, high))
        place.append(slice(low - begin, high - begin))
    whole = all(p.start == 0 and p.stop == n for p, n in zip(place, size, strict=True))
    return tuple(inside), tuple(place), whole


def _decoded(stored: np.ndarray, data: Chunked) -> Tensor:
    voxels = torch.from_numpy(stored).float()  # several times faster than numpy's cast from half
    if stored.dtype in (np.int16, np.uint8):
        voxels = voxels * float(data.attrs["scale"]) + float(data.attrs["offset"])
    return voxels
