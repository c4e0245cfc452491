"""The index of a store: one table, written volume by volume, read at once.

Layout (version 1). `index/table` has one row per volume (`ROW`); the names of the volumes are
`index/text`, one after the other; `index/head` is JSON: data sets, people, orientations, label names, and
the rows that have voxels to ignore, if any.
Foreground maps and boxes lie end to end in `foreground`, `boxes`, `box_labels`, and `provenance` holds
one JSON `Record` per row. `settings`, `rejected` and `fingerprint` are JSON. Opening a store reads
`index` and nothing else, and compares it with the attribute `digest` of its table. Chunks of images and
masks have a CRC-32 each (`ssl3d.data.store.chunks`), all else HDF5's Fletcher32. Stores made before have
neither.
"""

from __future__ import annotations

import json
from typing import Any

import h5py
import numpy as np

from ssl3d.data.store.digests import index_digest
from ssl3d.data.store.record import SPLITS, Record, blob, plain
from ssl3d.errors import DataError

FORMAT = "ssl3d-store"
VERSION = (
    3  # 2: some voxels are stored as uint8; 3: some are to be ignored; a store without is of version 1
)
NO_LABEL, INT_LABEL, FLOAT_LABEL, TEXT_LABEL = range(4)

# One row of the index table. Offsets point into the flat data sets; boxes is -1 where there are none
# because nobody looked, 0 where somebody looked and found none.
ROW = np.dtype(
    [
        ("shape", "<i4", 4),
        ("spacing", "<f8", 3),
        ("block", "<i2", 3),
        ("identity", "<i4"),
        ("split", "u1"),
        ("orientation", "u1"),
        ("has_mask", "?"),
        ("label_kind", "u1"),
        ("label", "<f8"),
        ("id_at", "<i8"),
        ("id_length", "<i4"),
        ("boxes", "<i4"),
        ("boxes_at", "<i8"),
        ("foreground_at", "<i8"),
        ("provenance_at", "<i8"),
        ("provenance_length", "<i4"),
        ("content", "u1", 16),
    ]
)

_BUFFER = 1 << 20  # bytes kept before they are written
_QUANTILES = (0.5, 5, 50, 95, 99.5)


class IndexWriter:
    """Rows of a store that is being written; what is long goes to disk as it comes.

    Args:
        file: HDF5 file, open for writing.
        count: Number of volumes to come.

    Attributes:
        version: Version of the format that the file will say.
    """

    def __init__(self, file: h5py.File, count: int):
        self.version = 1
        self._file, self._rows, self._filled = file, np.zeros(count, ROW), 0
        self._datasets, self._orientations, self._labels = _Codes(), _Codes(), _Codes()
        self._people, self._ids = _Codes(), dict[str, None]()
        self._sketches: list[np.ndarray] = []
        self._ignored: list[int] = []
        self._foreground = _Appender(file, "foreground", np.uint8)
        self._boxes = _Appender(file, "boxes", np.float32, 6)
        self._box_labels = _Appender(file, "box_labels", np.int64)
        self._provenance = _Appender(file, "provenance", np.uint8)

    def add(
        self,
        record: Record,
        *,
        shape: tuple[int, ...],
        block: tuple[int, ...],
        has_mask: bool,
        has_ignored: bool = False,
        foreground: np.ndarray,
        boxes: np.ndarray | None = None,
        box_labels: np.ndarray | None = None,
        sketch: np.ndarray,
    ) -> None:
        """Add the row of the next volume.

        Args:
            record: Provenance and identity.
            shape: (C, D, H, W).
            block: Voxels per block of the foreground map.
            has_mask: Whether the volume has a mask.
            has_ignored: Whether it has voxels to ignore.
            foreground: Foreground map, uint8.
            boxes: (n, 6), or None.
            box_labels: (n,), where there are boxes.
            sketch: Quantiles of the foreground, (C, n).

        Raises:
            DataError: A volume of that id is there already.
        """
        if record.id in self._ids:
            raise DataError(f"two volumes of one store are called {record.id!r}")
        row = self._rows[self._filled]
        row["shape"], row["spacing"], row["block"] = shape, record.spacing, block
        row["identity"] = self._people[self._datasets[record.dataset], record.subject]
        row["split"] = SPLITS.index(record.split)
        row["orientation"] = self._orientations[record.orientation]
        row["has_mask"] = has_mask
        row["content"] = np.frombuffer(bytes.fromhex(record.voxels or "00" * 16), np.uint8)
        if isinstance(record.label, str):
            row["label_kind"], row["label"] = TEXT_LABEL, self._labels[record.label]
        elif record.label is not None:
            row["label_kind"] = INT_LABEL if isinstance(record.label, int) else FLOAT_LABEL
            row["label"] = record.label
        row["id_length"] = len(record.id.encode())
        row["boxes"], row["boxes_at"] = -1, self._boxes.length
        if boxes is not None and box_labels is not None:
            row["boxes"] = len(boxes)
            self._boxes.append(boxes)
            self._box_labels.append(box_labels)
        row["foreground_at"] = self._foreground.append(foreground.ravel())
        text = blob(record.to_json())
        row["provenance_at"], row["provenance_length"] = self._provenance.append(text), len(text)
        self._ids[record.id] = None
        self._sketches.append(sketch)
        if has_ignored:
            self._ignored.append(self._filled)
        self._filled += 1

    def close(self) -> None:
        """Write the table, the texts and the fingerprint, and mark the file as a store."""
        rows, file = self._rows[: self._filled], self._file
        lengths = rows["id_length"].astype(np.int64)
        rows["id_at"] = np.cumsum(lengths) - lengths
        for appender in (self._foreground, self._boxes, self._box_labels, self._provenance):
            appender.flush()
        head = {
            "datasets": list(self._datasets),
            "orientations": list(self._orientations),
            "labels": list(self._labels),
            "identities": [list(person) for person in self._people],
        }
        if self._ignored:
            head["ignored"] = self._ignored
        file.create_group("index")  # one made on the way to a data set would hold the time of its making
        content, text = json.dumps(head), "".join(self._ids)
        file["index/head"], file["index/text"], file["index/table"] = blob(content), blob(text), rows
        file["index/table"].attrs["digest"] = index_digest(rows, text.encode(), content.encode())
        put(file, "fingerprint", blob(json.dumps(self._fingerprint(), default=plain)))
        file.attrs.update(format=FORMAT, version=self.version, volumes=len(rows))

    def _fingerprint(self) -> dict[str, Any]:
        """Summarise counts, shapes, spacings and foreground intensities, per data set."""
        rows = self._rows[: self._filled]
        dataset_of = np.array([dataset for dataset, _ in self._people], np.int64)[rows["identity"]]
        return {
            name: self._describe(np.flatnonzero(dataset_of == code))
            for name, code in sorted(self._datasets.items())
        }

    def _describe(self, here: np.ndarray) -> dict[str, Any]:
        rows, sketches = self._rows[here], [self._sketches[i] for i in here]
        labelled = rows[rows["label_kind"] != NO_LABEL]
        values, counts = np.unique(labelled[["label_kind", "label"]], return_counts=True)
        names, orientations = list(self._labels), list(self._orientations)
        classes = {str(label_of(value, names)): int(n) for value, n in zip(values, counts, strict=True)}
        channels = max(map(len, sketches))
        pooled = [np.concatenate([s[c] for s in sketches if c < len(s)]) for c in range(channels)]
        return {
            "volumes": len(rows),
            "subjects": len(np.unique(rows["identity"])),
            "masks": int(rows["has_mask"].sum()),
            **({"ignored": ignored} if (ignored := len(np.intersect1d(here, self._ignored))) else {}),
            "labelled": len(labelled),
            "classes": classes if len(classes) <= 50 else {},
            "boxes": int(np.maximum(rows["boxes"], 0).sum()),
            "splits": {
                name or "none": n for k, name in enumerate(SPLITS) if (n := int((rows["split"] == k).sum()))
            },
            "orientations": sorted(orientations[k] for k in np.unique(rows["orientation"])),
            "channels": channels,
            "voxels": int(rows["shape"].astype(np.int64).prod(axis=1).sum()),
            "shape": _spread(rows["shape"][:, 1:]),
            "spacing": _spread(rows["spacing"]),
            "intensity": [
                {f"p{q:g}": round(float(np.percentile(values, q)), 4) for q in _QUANTILES}
                | {"mean": round(float(values.mean()), 4), "std": round(float(values.std()), 4)}
                for values in pooled
            ],
        }


def fault_of_index(rows: np.ndarray, text: bytes, head: Any) -> str:
    """Return what contradicts itself in an index, in a few words; empty for one that can be read.

    A store made before indices had a digest is checked by this alone.

    Args:
        rows: Table of the volumes.
        text: Names of the volumes, one after the other.
        head: Content of `index/head`.
    """
    lists = {"datasets": str, "orientations": str, "labels": str, "identities": list}
    if not isinstance(head, dict) or not all(
        isinstance(head.get(key), list) and all(isinstance(entry, kind) for entry in head[key])
        for key, kind in lists.items()
    ):
        return "its head lacks a list"
    own = head.get("ignored", [])
    if not isinstance(own, list) or not all(type(row) is int and 0 <= row < len(rows) for row in own):
        return "voxels to ignore are of no volume"
    people = head["identities"]
    if not all(
        len(person) == 2
        and type(person[0]) is int
        and 0 <= person[0] < len(head["datasets"])
        and isinstance(person[1], str)
        for person in people
    ):
        return "a person is of no data set"
    kind, label = rows["label_kind"], rows["label"]
    texts = kind == TEXT_LABEL
    begin, length = rows["id_at"], rows["id_length"].astype(np.int64)
    faults = {
        "a person's number": (rows["identity"] < 0) | (rows["identity"] >= len(people)),
        "a split": rows["split"] >= len(SPLITS),
        "an orientation": rows["orientation"] >= len(head["orientations"]),
        "a name's place": (begin < 0) | (length < 0) | (begin + length > len(text)),
        "a label": (kind > TEXT_LABEL)
        | (texts & ~((label >= 0) & (label < len(head["labels"])) & (label == np.rint(label))))
        | ((kind == INT_LABEL) & ~np.isfinite(label)),
        "a shape": (rows["shape"] < 1).any(axis=1),
        "a block": (rows["block"] < 1).any(axis=1),
        "a spacing": ~(np.isfinite(rows["spacing"]) & (rows["spacing"] > 0)).all(axis=1),
        "a place in a list": (rows["boxes"] < -1)
        | (rows["boxes_at"] < 0)
        | (rows["foreground_at"] < 0)
        | (rows["provenance_at"] < 0)
        | (rows["provenance_length"] < 0),
    }
    for name, wrong in faults.items():
        if wrong.any():
            return f"{name} of volume {int(np.flatnonzero(wrong)[0])} cannot be"
    try:
        text.decode()
    except UnicodeDecodeError:
        return "a name is no text"
    return ""


def label_of(row: Any, names: list[str]) -> int | float | str | None:
    """Return the label that a row's `label_kind` and `label` stand for."""
    kind, value = int(row["label_kind"]), row["label"]
    if kind == INT_LABEL:
        return int(value)
    if kind == FLOAT_LABEL:
        return float(value)
    return names[int(value)] if kind == TEXT_LABEL else None


def put(file: h5py.File, name: str, values: np.ndarray) -> None:
    """Write a small data set as one chunk with a check sum; an empty one has no chunk."""
    options = {"chunks": values.shape, "fletcher32": True} if values.size else {}
    file.create_dataset(name, data=values, **options)


class _Appender:
    """A data set that grows at its end, through a buffer."""

    def __init__(self, file: h5py.File, name: str, dtype: type, width: int = 0):
        row = (width,) if width else ()
        size = max(1, 65536 // (np.dtype(dtype).itemsize * max(1, width)))
        self._data = file.create_dataset(
            name,
            (0, *row),
            dtype,
            maxshape=(None, *row),
            chunks=(size, *row),
            fillvalue=0,  # without it the rest of the last chunk is whatever was in memory
            fletcher32=True,
        )
        self._waiting: list[np.ndarray] = []
        self._bytes = self.length = 0

    def append(self, values: np.ndarray) -> int:
        """Append values, and return where they begin."""
        begin = self.length
        self._waiting.append(values)
        self._bytes += values.nbytes
        self.length += len(values)
        if self._bytes > _BUFFER:
            self.flush()
        return begin

    def flush(self) -> None:
        if self._waiting:
            begin = len(self._data)
            self._data.resize(self.length, axis=0)
            self._data[begin:] = np.concatenate(self._waiting)
            self._waiting, self._bytes = [], 0


class _Codes(dict[Any, int]):
    """Numbers of values in the order of their first look-up."""

    def __missing__(self, key: Any) -> int:
        self[key] = code = len(self)
        return code


def _spread(values: np.ndarray) -> dict[str, np.ndarray]:
    return {"min": values.min(axis=0), "median": np.median(values, axis=0), "max": values.max(axis=0)}


PART = "ssl3d-part"
