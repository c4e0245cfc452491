"""Opens HDF5 stores as one lazy collection: only the index is read until a crop is asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from ssl3d.data.index import ROW, label_of
from ssl3d.data.record import SPLITS
from ssl3d.data.record import Record as Record
from ssl3d.data.volume import Store as Store
from ssl3d.data.volume import Volume as Volume
from ssl3d.data.writer import assemble, part_record, write_part
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
        """A hash of the volumes in order: identities, labels, splits, geometry, voxels, masks, boxes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(np.ascontiguousarray(self._column("content")).data)
        digest.update(np.ascontiguousarray(self.spacings, dtype=np.float64).data)
        for column in (self.ids, self.datasets, self.subjects, self.splits, self.labels, self.orientations):
            digest.update("\0".join(map(str, column)).encode())
        return digest.hexdigest()


def open_data(paths: Sequence[str | Path], **prepare_options: Any) -> Collection:
    """Opens stores, folders of shards, phantoms or scans as one collection.

    Args:
        paths: `.h5` stores; folders that hold only `.h5` shards; `phantoms`, `phantoms:N`,
            `phantoms:N:faint` (lesions that are hard to detect) or `phantoms:N:noise` (nothing to learn);
            or whatever `ssl3d prepare` takes, prepared into a cache ($SSL3D_CACHE, else ~/.cache/ssl3d).
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

            count, kind = _phantoms(text)
            stores.append(phantom_store(count, kind=kind))
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


def holds_scans(paths: Sequence[str | Path]) -> bool:
    """Whether `open_data` would prepare some of these first.

    Raises:
        DataError: One is missing, or mixes stores and scans.
    """
    named = [str(path) for path in paths]
    files = [text for text in named if text != "phantoms" and not text.startswith("phantoms:")]
    return any(not _sort_out(Path(text))[1] for text in files)


def _prepared(paths: list[Path], options: dict[str, Any]) -> Path:
    from ssl3d.data.prepare import prepare_cached

    return Path(prepare_cached(paths, **options))


def _phantoms(text: str) -> tuple[int, str]:
    """How many phantoms, and of what kind."""
    from ssl3d.data.phantoms import DEFAULT_COUNT, KINDS

    number, _, kind = text.partition(":")[2].partition(":")
    number, kind = (str(DEFAULT_COUNT), number) if number in KINDS else (number or str(DEFAULT_COUNT), kind)
    if not number.isdigit() or int(number) < 1 or kind not in ("", *KINDS):
        raise DataError(f"{text}: expected phantoms:N, phantoms:N:faint or phantoms:N:noise with N from 1")
    return int(number), kind or "plain"


def _texts(store: Store) -> list[str]:
    ends = (store.rows["id_at"] + store.rows["id_length"]).tolist()
    return [store.text[a:b].decode() for a, b in zip(store.rows["id_at"].tolist(), ends, strict=True)]
