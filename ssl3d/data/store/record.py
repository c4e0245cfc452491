"""What is known about one volume: identity, geometry, origin, what was done to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.errors import DataError
from ssl3d.json_files import parse_json

SPLITS = ("", "train", "val", "test")
_IDENTITY = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))

Affine = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known about one volume of a store: identity, geometry, origin, what was done to it.

    Attributes:
        id: Name of the volume, unique in its store.
        dataset: Name of the data set. A person is (dataset, subject).
        subject: Name of the subject within the data set.
        split: "", "train", "val" or "test", as the data came.
        label: Class, ordinal (int), real value (float) or class name (str); None where unknown.
        spacing: Sides of the stored voxels, mm along (D, H, W).
        orientation: "SAR" (D to superior, H to anterior, W to right) or "unknown".
        affine: 4 x 4, stored voxel (d, h, w) to patient mm (RAS+ world).
        original_shape: Shape of the source's voxel array.
        original_affine: 4 x 4, voxel (i, j, k) of the source to RAS+ mm; None where it has none.
        source: Path relative to the root given, POSIX.
        sha256: SHA-256 of the source file.
        voxels: Hash of what is stored; filled in by `write_part`.
        reading: Hashes of the voxels that do not depend on names, precision or masks
            (`ssl3d.data.identity`); filled in by `write_part`.
        channels: Names of the channels.
        done: Steps of preparation, JSON values only: resampling, normalisation, crop. `done["background"]`,
            a number or one per channel, is the value of air; without it the minimum is taken.
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
    reading: str = ""
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
        """Write the record as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), default=plain, separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> Record:
        """Read the record that `to_json` wrote; fields of later versions are dropped."""
        known = {field.name for field in dataclasses.fields(Record)}
        values = {key: value for key, value in parse_json(text).items() if key in known}
        for key in ("affine", "original_affine"):
            if values.get(key) is not None:
                values[key] = tuple(tuple(map(float, row)) for row in values[key])
        for key in ("spacing", "original_shape", "channels"):
            values[key] = tuple(values.get(key, ()))
        return Record(**values)


def blob(text: str) -> np.ndarray:
    """Convert text to what HDF5 stores here: UTF-8 bytes, of any length."""
    return np.frombuffer(text.encode(), np.uint8)


def plain(value: Any) -> Any:
    """Convert numpy values and paths to what JSON knows, for `json.dumps(default=plain)`.

    Raises:
        TypeError: JSON has nothing like the value.
    """
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"{type(value).__name__} is not JSON")
