"""Writes the HDF5 store: one part per volume, by any number of workers, then one atomic assembly.

Layout of a store (version 1). `index/table` has one row per volume (`ROW`); strings live in
`index/text`, one after the other; `index/head` is JSON: data sets, orientations, label names. The
voxels of row i are `images/i` and `masks/i`; foreground maps and boxes lie end to end in
`foreground`, `boxes`, `box_labels`; `provenance/text` holds one JSON `Record` per row. Opening a store
reads the index and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ssl3d.errors import DataError

FORMAT = "ssl3d-store"
PART = "ssl3d-part"
VERSION = 1
SPLITS = ("", "train", "val", "test")
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

_CHUNK = 32  # voxels a side: 64 KiB in half precision
_SKETCH = 65  # quantiles kept per channel and volume, to pool intensities over a data set
_IDENTITY = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))

Affine = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known about one volume of a store: identity, geometry, origin, what was done to it.

    Attributes:
        id: Unique in its store.
        dataset: Data set. A person is (dataset, subject).
        subject: Subject within the data set.
        split: "", "train", "val" or "test", as the data came.
        label: Class, ordinal (int), real value (float) or class name (str); None where unknown.
        spacing: Of the stored voxels, mm along (D, H, W).
        orientation: "SAR" (D to superior, H to anterior, W to right) or "unknown".
        affine: 4 x 4, stored voxel (d, h, w) to patient mm (RAS+ world).
        original_shape: Shape of the source's voxel array.
        original_affine: 4 x 4 of the source, None where it has none.
        source: Path relative to the root given, POSIX.
        sha256: Of the source file.
        voxels: Hash of what is stored; filled in by `write_part`.
        channels: Names of the channels.
        done: What was done, JSON values only: resampling, normalisation, crop. `done["background"]`, a
            number or one per channel, is the value of air; without it the minimum is taken.
    """

    id: str
    dataset: str
    subject: str
    split: str = ""
    label: int | float | str | None = None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    orientation: str = "unknown"
    affine: Affine = _IDENTITY
    original_shape: tuple[int, ...] = ()
    original_affine: Affine | None = None
    source: str = ""
    sha256: str = ""
    voxels: str = ""
    channels: tuple[str, ...] = ("image",)
    done: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.label, np.generic | bool):
            plain = self.label.item() if isinstance(self.label, np.generic) else int(self.label)
            object.__setattr__(self, "label", plain)
        if self.split not in SPLITS:
            raise DataError(f"{self.id}: split {self.split!r}; known: train, val, test, or empty")
        if not (len(self.spacing) == 3 and all(np.isfinite(s) and s > 0 for s in self.spacing)):
            raise DataError(f"{self.id}: spacing {self.spacing} mm; expected three positive numbers")

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self), default=_plain, separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> Record:
        """The record that `to_json` wrote; fields of later versions are dropped."""
        known = {field.name for field in dataclasses.fields(Record)}
        values = {key: value for key, value in json.loads(text).items() if key in known}
        for key in ("affine", "original_affine"):
            if values.get(key) is not None:
                values[key] = tuple(tuple(map(float, row)) for row in values[key])
        for key in ("spacing", "original_shape", "channels"):
            values[key] = tuple(values.get(key, ()))
        return Record(**values)


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
) -> Path:
    """Writes one volume as `folder/name.part`; what is there under that name is whole.

    Args:
        folder: Usually `store.h5.partial`; made if missing.
        name: File name without suffix; parts are assembled in the order of their names.
        record: Its `voxels` is filled in.
        image: (C, D, H, W), normalised.
        mask: (D, H, W), integers >= 0.
        boxes: (n, 6), z1 y1 x1 z2 y2 x2 in voxels, upper corner exclusive.
        box_labels: (n,), integers; zeros if left out.
        foreground: (D, H, W), boolean; by default what is brighter than the background.
        dtype: float16, float32, or int16 (scaled per volume to its own range).

    Raises:
        DataError: Shapes disagree, a voxel is not finite, or does not fit half precision.
    """
    image = np.asarray(image, dtype=np.float32)
    _check(record, image, mask, boxes, foreground)
    background = np.asarray(record.done.get("background", image.min(axis=(1, 2, 3))), dtype=np.float32)
    stored, scale, offset = _encode(record.id, image, dtype)
    if stored.dtype == np.float16:  # air outside the volume is to equal air inside
        background = background.astype(np.float16).astype(np.float32)
    background = np.broadcast_to(background, image.shape[:1])
    occupied = _derived_foreground(image, background) if foreground is None else foreground.astype(bool)
    block = block_size(image.shape[1:])
    boxes = None if boxes is None else np.asarray(boxes, dtype=np.float32).reshape(-1, 6)
    labels = None
    if boxes is not None:
        labels = np.zeros(len(boxes)) if box_labels is None else np.asarray(box_labels)
        if len(labels) != len(boxes):
            raise DataError(f"{record.id}: {len(boxes)} boxes but {len(labels)} box labels")
    small = None if mask is None else mask.astype(np.min_scalar_type(int(mask.max(initial=0))))
    content = _content(stored, small, boxes)
    record = dataclasses.replace(record, voxels=content.hexdigest())
    path = folder / f"{name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    with _renamed(path) as temporary, h5py.File(temporary, "w", libver="v110") as file:
        data = file.create_dataset("image", data=stored, chunks=_chunks(stored.shape))
        data.attrs.update(background=background, scale=scale, offset=offset)
        if small is not None:
            file.create_dataset("mask", data=small, chunks=_chunks(small.shape))
        if boxes is not None and labels is not None:
            file["boxes"], file["box_labels"] = boxes, labels.astype(np.int64)
        file["foreground"] = _occupancy(occupied, block)
        file["sketch"] = _sketch(image, occupied)
        file.attrs.update(format=PART, version=VERSION, record=np.bytes_(record.to_json().encode()))
    return path


def part_record(path: Path) -> Record:
    """The record of a part, after checking that the part is whole.

    Raises:
        DataError: It is missing, cut short, or not a part.
    """
    with open_part(path) as file:
        return Record.from_json(bytes(file.attrs["record"]))


@contextmanager
def open_part(path: Path) -> Iterator[h5py.File]:
    """Opens a part for reading.

    Raises:
        DataError: It is missing, cut short, or not a part.
    """
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        reason = _reason(path, error)
        raise DataError(f"{path}: not a whole part ({reason}); delete it and prepare again") from error
    with file:
        if file.attrs.get("format") != PART or "sketch" not in file:
            raise DataError(f"{path}: not a part of a store; delete it and prepare again")
        yield file


def assemble(folder: Path, out: Path, settings: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    """Makes one store of all parts in a folder, under a temporary name, synced, then renamed.

    Args:
        folder: Of `*.part` files; it is left as it is.
        out: The store. It either does not exist or is whole.
        settings: How the volumes were made, JSON values.
        rejected: One dict per file that was refused, JSON values.

    Raises:
        DataError: There are no parts, one is cut short, or two volumes have one id.
    """
    paths = sorted(folder.glob("*.part"))
    if not paths:
        raise DataError(f"{folder}: no volumes to assemble")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _renamed(out, sync=True) as temporary, h5py.File(temporary, "w", libver="v110") as file:
        images, masks = file.create_group("images"), file.create_group("masks")
        records, maps, boxes, labels, sketches, rows = [], [], [], [], [], np.zeros(len(paths), ROW)
        for i, path in enumerate(paths):
            with open_part(path) as part:
                text = bytes(part.attrs["record"])
                record = Record.from_json(text)
                row, shape = rows[i], part["image"].shape
                row["shape"], row["spacing"], row["block"] = shape, record.spacing, block_size(shape[1:])
                row["has_mask"] = "mask" in part
                part.copy("image", images, name=str(i))
                if "mask" in part:
                    part.copy("mask", masks, name=str(i))
                row["boxes"] = -1
                if "boxes" in part:
                    row["boxes"] = len(part["boxes"])
                    boxes.append(part["boxes"][()])
                    labels.append(part["box_labels"][()])
                maps.append(part["foreground"][()].ravel())
                sketches.append(part["sketch"][()])
                records.append((record, text))
        _write_index(file, rows, records)
        rows["boxes_at"] = _starts(np.maximum(rows["boxes"], 0))
        rows["foreground_at"] = _starts([len(m) for m in maps])
        file["index/table"] = rows
        file["foreground"] = np.concatenate(maps)
        file["boxes"] = np.concatenate([np.zeros((0, 6), np.float32), *boxes])
        file["box_labels"] = np.concatenate([np.zeros(0, np.int64), *labels])
        file["settings"] = _blob(json.dumps(settings, default=_plain, sort_keys=True))
        file["rejected"] = _blob(json.dumps(rejected, default=_plain))
        fingerprint = _fingerprint(rows, [record for record, _ in records], sketches)
        file["fingerprint"] = _blob(json.dumps(fingerprint, default=_plain))
        file.attrs.update(format=FORMAT, version=VERSION, volumes=len(rows))


def write_index(file: h5py.File, rows: np.ndarray, records: Iterable[Record]) -> None:
    """Fills the text columns of `rows` and writes the whole index; used to simulate large stores."""
    _write_index(file, rows, [(record, record.to_json().encode()) for record in records])
    file["index/table"] = rows
    file.attrs.update(format=FORMAT, version=VERSION, volumes=len(rows))


def block_size(shape: Sequence[int]) -> tuple[int, int, int]:
    """Voxels per block of the foreground map: a power of two up to 8 that leaves 16 blocks or more."""
    sides = [min(8, 1 << max(0, (max(size, 16) // 16).bit_length() - 1)) for size in shape]
    return sides[0], sides[1], sides[2]


# ------------------------------------------------------------------------------------------------


def _check(
    record: Record,
    image: np.ndarray,
    mask: np.ndarray | None,
    boxes: np.ndarray | None,
    foreground: np.ndarray | None,
) -> None:
    if image.ndim != 4 or 0 in image.shape:
        raise DataError(f"{record.id}: image of shape {image.shape}; expected (C, D, H, W), not empty")
    if not np.isfinite(image).all():
        raise DataError(f"{record.id}: {int((~np.isfinite(image)).sum())} voxels are NaN or infinite")
    for what, array in (("mask", mask), ("foreground", foreground)):
        if array is not None and array.shape != image.shape[1:]:
            raise DataError(f"{record.id}: {what} of shape {array.shape} for an image of {image.shape[1:]}")
    if mask is not None and (mask.dtype.kind not in "iub" or (mask.size and mask.min() < 0)):
        raise DataError(f"{record.id}: mask of {mask.dtype} from {mask.min()}; expected integers from 0")
    if (
        boxes is not None
        and np.asarray(boxes).size
        and np.asarray(boxes).reshape(len(boxes), -1).shape[1] != 6
    ):
        raise DataError(f"{record.id}: boxes of shape {np.shape(boxes)}; expected (n, 6)")


def _encode(name: str, image: np.ndarray, dtype: str) -> tuple[np.ndarray, float, float]:
    """Voxels as stored; stored * scale + offset gives the image back."""
    if dtype == "float32":
        return image, 1.0, 0.0
    if dtype == "float16":
        top = float(np.abs(image).max())
        if top > 65504:
            raise DataError(
                f"{name}: voxel of {top:.6g} exceeds half precision (65504); normalise, or store as float32"
            )
        return image.astype(np.float16), 1.0, 0.0
    if dtype == "int16":
        low, high = float(image.min()), float(image.max())
        scale, offset = max((high - low) / 65534, 1e-12), (high + low) / 2
        return np.rint((image - offset) / scale).astype(np.int16), scale, offset
    raise DataError(f"{name}: cannot store voxels as {dtype!r}; known: float16, float32, int16")


def _content(stored: np.ndarray, mask: np.ndarray | None, boxes: np.ndarray | None) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=16)
    for array in (stored, mask, boxes):
        if array is not None:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest


def _chunks(shape: Sequence[int]) -> tuple[int, ...]:
    """Chunks of about 32 x 32 x 32 voxels that divide the shape evenly, so that edges waste no disk.

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
    """Brighter than the background by a tenth of the way to the brightest, in any channel."""
    top = np.percentile(image.reshape(len(image), -1)[:, :: max(1, image[0].size // 65536)], 99.5, axis=1)
    level = background + 0.1 * np.maximum(top - background, 0)
    return (image > level[:, None, None, None]).any(axis=0)


def _occupancy(occupied: np.ndarray, block: tuple[int, int, int]) -> np.ndarray:
    """Share of each block that is foreground, 0 to 255, rounded up; border blocks count what exists."""
    counts = [np.add.reduceat(np.ones(n), np.arange(0, n, b)) for n, b in zip(occupied.shape, block)]
    total = occupied.astype(np.float32)
    for axis, b in enumerate(block):
        total = np.add.reduceat(total, np.arange(0, occupied.shape[axis], b), axis=axis)
    existing = counts[0][:, None, None] * counts[1][:, None] * counts[2]
    return np.ceil(255 * total / existing).astype(np.uint8)


def _sketch(image: np.ndarray, occupied: np.ndarray) -> np.ndarray:
    """Evenly spaced quantiles of each channel's foreground, (C, 65) float32."""
    voxels = image[:, occupied] if occupied.any() else image.reshape(len(image), -1)
    step = max(1, voxels.shape[1] // 65536)
    quantiles = np.quantile(voxels[:, ::step], np.linspace(0, 1, _SKETCH), axis=1)
    return np.ascontiguousarray(quantiles.T, dtype=np.float32)


def _write_index(file: h5py.File, rows: np.ndarray, records: list[tuple[Record, bytes]]) -> None:
    """Text columns, codes and provenance; everything of the index but the table itself."""
    datasets, orientations, names = _Codes(), _Codes(), _Codes()
    identities, seen, ids = _Codes(), set(), []
    for row, (record, _) in zip(rows, records, strict=True):
        if record.id in seen:
            raise DataError(f"two volumes of one store are called {record.id!r}")
        seen.add(record.id)
        ids.append(record.id.encode())
        row["identity"] = identities[datasets[record.dataset], record.subject]
        row["split"] = SPLITS.index(record.split)
        row["orientation"] = orientations[record.orientation]
        row["content"] = np.frombuffer(bytes.fromhex(record.voxels or "00" * 16), np.uint8)
        label = record.label
        if isinstance(label, str):
            row["label_kind"], row["label"] = TEXT_LABEL, names[label]
        elif label is not None:
            row["label_kind"] = INT_LABEL if isinstance(label, int) else FLOAT_LABEL
            row["label"] = label
    rows["id_length"] = [len(text) for text in ids]
    rows["id_at"] = _starts(rows["id_length"])
    rows["provenance_length"] = [len(text) for _, text in records]
    rows["provenance_at"] = _starts(rows["provenance_length"])
    head = {
        "datasets": list(datasets),
        "orientations": list(orientations),
        "labels": list(names),
        "identities": [list(identity) for identity in identities],
    }
    file["index/head"] = _blob(json.dumps(head))
    file["index/text"] = np.frombuffer(b"".join(ids), np.uint8)
    file["provenance/text"] = np.frombuffer(b"".join(text for _, text in records), np.uint8)


def _fingerprint(rows: np.ndarray, records: list[Record], sketches: list[np.ndarray]) -> dict[str, Any]:
    """Counts, shapes, spacings and foreground intensities, per data set."""
    result: dict[str, Any] = {}
    for dataset in sorted({record.dataset for record in records}):
        here = [i for i, record in enumerate(records) if record.dataset == dataset]
        shapes, spacings = rows["shape"][here, 1:], rows["spacing"][here]
        channels = max(len(sketches[i]) for i in here)
        pooled = [
            np.concatenate([sketches[i][c] for i in here if c < len(sketches[i])]) for c in range(channels)
        ]
        labels = [records[i].label for i in here if records[i].label is not None]
        kinds = sorted(set(labels), key=str)
        classes = {str(kind): labels.count(kind) for kind in kinds} if len(kinds) <= 50 else {}
        result[dataset] = {
            "volumes": len(here),
            "subjects": len({records[i].subject for i in here}),
            "masks": int(rows["has_mask"][here].sum()),
            "labelled": len(labels),
            "classes": classes,
            "boxes": int(np.maximum(rows["boxes"][here], 0).sum()),
            "splits": {s or "none": n for s in SPLITS if (n := sum(records[i].split == s for i in here))},
            "orientations": sorted({records[i].orientation for i in here}),
            "channels": channels,
            "voxels": int(rows["shape"][here].astype(np.int64).prod(axis=1).sum()),
            "shape": {"min": shapes.min(0), "median": np.median(shapes, 0), "max": shapes.max(0)},
            "spacing": {"min": spacings.min(0), "median": np.median(spacings, 0), "max": spacings.max(0)},
            "intensity": [
                {f"p{q:g}": round(float(np.percentile(values, q)), 4) for q in (0.5, 5, 50, 95, 99.5)}
                | {"mean": round(float(values.mean()), 4), "std": round(float(values.std()), 4)}
                for values in pooled
            ],
        }
    return result


class _Codes(dict[Any, int]):
    """Numbers values in the order of their first look-up."""

    def __missing__(self, key: Any) -> int:
        self[key] = code = len(self)
        return code


def _starts(lengths: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))[:-1]]).astype(np.int64)


def _blob(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _plain(value: Any) -> Any:
    """Numpy values and paths as JSON knows them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _reason(path: Path, error: OSError) -> str:
    if not path.exists():
        return "no such file"
    return "cut short" if "truncated" in str(error) or path.stat().st_size < 512 else "not HDF5"


@contextmanager
def _renamed(path: Path, sync: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when all went well, and goes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
        if sync:
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
