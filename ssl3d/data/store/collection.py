"""Opens HDF5 stores as one lazy collection: only the index is read until a crop is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np

from ssl3d.data.store.index import ROW, label_of
from ssl3d.data.store.record import SPLITS
from ssl3d.data.store.record import Record as Record
from ssl3d.data.store.volume import Store as Store
from ssl3d.data.store.volume import Volume as Volume


class Collection(Sequence[Volume]):
    """The volumes of several stores as one sequence, or a selection of them.

    Args:
        stores: Stores in order; their volumes are numbered through.
        rows: Numbers of the volumes selected; all of them if left out.

    Example:
        >>> from ssl3d.api import open_data
        >>> volumes = open_data(["phantoms:6"])
        >>> len(volumes), len(volumes.select(volumes.labels == 1)), len(volumes[:2])
        (6, 2, 2)
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
        """Return the volume at a position, or the collection of a slice."""
        if isinstance(position, slice):
            return self.select(np.arange(len(self))[position])
        return self.volume(int(self.rows[position]))

    def volume(self, index: int) -> Volume:
        """Return the volume of a `Volume.index`, selected or not."""
        store = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[store - 1]) if store else 0
        return Volume(self.stores[store], index - start, index)

    def __iter__(self) -> Iterator[Volume]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Any) -> Collection:
        """Select the volumes at these positions; they keep their `index`.

        Args:
            indices: Integers, or a mask of booleans.
        """
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
        """Codes of the data set and of the person of all volumes, and the names behind the codes."""
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
        """Number of each volume's data set, (N,) int64."""
        return self._codes[0][self.rows]

    @property
    def subject_codes(self) -> np.ndarray:
        """Number of each volume's person, that is (data set, subject), (N,) int64."""
        return self._codes[1][self.rows]

    @property
    def dataset_names(self) -> list[str]:
        """Names of the data sets, in the order of `dataset_codes`."""
        return self._codes[2]

    @cached_property
    def ids(self) -> np.ndarray:
        """Names of the volumes, (N,) strings."""
        return self._strings(lambda store: _texts(store))

    @property
    def datasets(self) -> np.ndarray:
        """Data set of each volume, (N,) strings."""
        return np.array(self._codes[2], dtype=object)[self.dataset_codes]

    @property
    def subjects(self) -> np.ndarray:
        """Subject of each volume, (N,) strings; a person is (data set, subject)."""
        return np.array([subject for _, subject in self._codes[3]], dtype=object)[self.subject_codes]

    @property
    def splits(self) -> np.ndarray:
        """Split of each volume as the data came, (N,) strings: "", train, val, test."""
        return np.array(SPLITS, dtype=object)[self._column("split")]

    @cached_property
    def labels(self) -> np.ndarray:
        """Label of each volume, (N,) objects: int, float, str or None."""
        return self._strings(lambda store: [label_of(row, store.label_names) for row in store.rows])

    @property
    def shapes(self) -> np.ndarray:
        """Shape of each volume, (N, 4) int64: C, D, H, W."""
        return self._column("shape").astype(np.int64)

    @property
    def spacings(self) -> np.ndarray:
        """Spacing of each volume, (N, 3) float64, mm along D, H, W."""
        return self._column("spacing")

    @property
    def has_mask(self) -> np.ndarray:
        """Whether each volume has a mask, (N,) booleans."""
        return self._column("has_mask")

    @property
    def has_boxes(self) -> np.ndarray:
        """Whether somebody looked for boxes in each volume, (N,) booleans; there may be none."""
        return self._column("boxes") >= 0

    @property
    def orientations(self) -> np.ndarray:
        """Orientation of each volume, (N,) strings: "SAR" or "unknown"."""
        return self._strings(lambda store: np.array(store.orientations, object)[store.rows["orientation"]])

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Settings with which the volumes were made, per store."""
        return [store.settings for store in self.stores]

    def _strings(self, of: Any) -> np.ndarray:
        columns = []
        for store in self.stores:
            column = np.empty(len(store), dtype=object)
            column[:] = of(store)
            columns.append(column)
        return np.concatenate(columns or [np.empty(0, dtype=object)])[self.rows]

    def identities(self) -> list[tuple[str, str]]:
        """List the people of the volumes, (data set, subject), in the order of their codes."""
        return [self._codes[3][code] for code in np.unique(self.subject_codes)]

    def digest(self) -> str:
        """Hash the volumes in order: identities, labels, splits, geometry, voxels, masks, boxes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(np.ascontiguousarray(self._column("content")).data)
        digest.update(np.ascontiguousarray(self.spacings, dtype=np.float64).data)
        for column in (self.ids, self.datasets, self.subjects, self.splits, self.labels, self.orientations):
            digest.update("\0".join(map(str, column)).encode())
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------


def _texts(store: Store) -> list[str]:
    ends = (store.rows["id_at"] + store.rows["id_length"]).tolist()
    return [store.text[a:b].decode() for a, b in zip(store.rows["id_at"].tolist(), ends, strict=True)]
