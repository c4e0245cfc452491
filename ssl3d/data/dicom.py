"""DICOM headers: whose slices, in which order, whether all are there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ssl3d.data.itk import information
from ssl3d.errors import DataError

DICOM = (".dcm", ".dicom", ".ima")
RADIOGRAPHS = ("CR", "DX", "MG", "RF", "XA", "IO", "PX")
_TAGS = {
    "modality": "0008|0060",
    "patient": "0010|0020",
    "series": "0020|000e",
    "instance": "0020|0013",
    "position": "0020|0032",
    "axes": "0020|0037",
    "photometric": "0028|0004",
    "spacing": "0028|0030",
    "imager_spacing": "0018|1164",
}


def dicom_tags(path: Path) -> dict[str, str]:
    """Modality, patient, series and geometry of a DICOM file's header; "" where absent.

    Raises:
        DataError: It is not readable as DICOM.
    """
    try:
        reader = information(path, "GDCMImageIO")
    except RuntimeError as error:
        raise DataError("not readable as DICOM") from error
    keys = set(reader.GetMetaDataKeys())
    return {name: reader.GetMetaData(key).strip() if key in keys else "" for name, key in _TAGS.items()}


def is_dicom(path: Path) -> bool:
    """Whether a file calls itself DICOM, by its ending or its first bytes."""
    if path.suffix.lower() in DICOM:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def sorted_slices(tags: dict[Path, dict[str, str]]) -> tuple[list[Path], np.ndarray]:
    """Files of a series along the slice normal (repeats by instance number), and their positions in mm."""

    def numbers(text: str, count: int, what: str, path: Path) -> list[float]:
        values = [float(v) for v in text.split("\\") if v.strip()] if text else []
        if len(values) != count:
            raise DataError(f"slice {path.name} has no {what}: the series cannot be put in order")
        return values

    first = next(iter(tags))
    axes = np.array(numbers(tags[first]["axes"], 6, "image orientation", first))
    normal = np.cross(axes[:3], axes[3:])
    keys = []
    for path, tag in tags.items():
        other = np.array(numbers(tag["axes"], 6, "image orientation", path))
        if np.abs(other - axes).max() > 1e-2:
            raise DataError(f"slices of several orientations in one series ({path.name} differs)")
        position = float(np.dot(normal, numbers(tag["position"], 3, "image position", path)))
        instance = int(tag["instance"]) if re.fullmatch(r"\d+", tag["instance"]) else 0
        keys.append((round(position, 3), instance, path.name, path))
    keys.sort()
    return [key[3] for key in keys], np.array([key[0] for key in keys])


def frames_of(positions: np.ndarray) -> tuple[int, float]:
    """How often every slice position occurs (phases, echoes), and the gap between neighbours in mm."""
    places, counts = np.unique(positions, return_counts=True)
    if counts.min() != counts.max():
        raise DataError(
            f"slice positions occur {counts.min()} to {counts.max()} times: frames are incomplete"
        )
    if len(places) == 1:
        return int(counts[0]), 1.0
    gaps = np.diff(places)
    usual = float(np.median(gaps))
    if gaps.max() > 1.5 * gaps.min():
        at = places[int(gaps.argmax())]
        raise DataError(
            f"slices are missing: a gap of {gaps.max():.4g} mm at {at:.4g}, usually {usual:.4g} mm"
        )
    return int(counts[0]), usual
