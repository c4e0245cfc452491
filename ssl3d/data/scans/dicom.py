"""DICOM headers: whose slices, in which order, whether all are there and lie evenly."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl3d.amounts import printable
from ssl3d.data.scans.dicom_pixels import dicom_information
from ssl3d.errors import DataError, is_transient

RADIOGRAPHS = ("CR", "DX", "MG", "RF", "XA", "IO", "PX")
FILMS = (*RADIOGRAPHS, "US")  # pictures, and films of them: their files are no slices of a volume
_TAGS = {
    "charset": "0008|0005",
    "type": "0008|0008",
    "modality": "0008|0060",
    "patient": "0010|0020",
    "study": "0020|000d",
    "series": "0020|000e",
    "instance": "0020|0013",
    "acquisition": "0020|0012",
    "phase": "0020|0100",
    "echo": "0018|0086",
    "acquired": "0008|0032",
    "content": "0008|0033",
    "position": "0020|0032",
    "axes": "0020|0037",
    "frames": "0028|0008",
    "rows": "0028|0010",
    "columns": "0028|0011",
    "spacing": "0028|0030",
}
# Such a difference of direction or of spacing shifts the rim of 512 pixels, a usual side, by half a pixel.
_SAME = 1e-3
_SAME_PLACE = 2e-3  # mm: headers round positions
# How far a slice may lie from its place in an even stack. Half a pixel off, it is nearer to the next pixel.
# Along the stack neighbours may err in opposite senses: a quarter each makes half a slice between them.
_MOST_PIXELS, _MOST_SLICES = 0.5, 0.25


@dataclasses.dataclass(frozen=True)
class Slice:
    """Where a slice lies, and what tells it from others at the same place.

    Attributes:
        name: Name of the slice in messages.
        position: Middle of the first pixel, (x, y, z) in mm, DICOM's world (LPS).
        axes: Directions along a row and along a column, (6,).
        spacing: mm between rows, and between columns; () where the header has none.
        phase: Numbers of the echo and of the time: the same for all slices of a frame.
        key: Further numbers that put the slices at one place in order.
    """

    name: str
    position: tuple[float, ...]
    axes: tuple[float, ...]
    spacing: tuple[float, ...] = ()
    phase: tuple[float, ...] = ()
    key: tuple[float, ...] = ()


def dicom_tags(path: Path) -> dict[str, str]:
    """Read modality, patient, series, geometry and order from a DICOM file's header; "" where absent.

    The patient is decoded by the character set that the file declares, and is then printable text.

    "series" tells what belongs together, so it is "" too for a file that is whole in itself: one of many
    frames, and a view or film of a series of radiographs or ultrasound.

    Raises:
        DataError: The file is not readable as DICOM.
    """
    try:
        reader = dicom_information(path)
    except DataError:
        raise
    except Exception as error:  # pydicom, which rewrites some files, raises nearly anything
        if is_transient(error):
            raise
        raise DataError("not readable as DICOM") from error
    keys = set(reader.GetMetaDataKeys())
    tags = {name: reader.GetMetaData(key).strip() if key in keys else "" for name, key in _TAGS.items()}
    tags["patient"] = _decoded(tags["patient"], tags["charset"])
    if frame_count(tags) > 1 or (tags["modality"] in FILMS and not tags["axes"]):
        tags["series"] = ""
    return tags


def _decoded(text: str, charset: str) -> str:
    """Decode text by a file's SpecificCharacterSet; bytes that are no text of it are escaped.

    Args:
        text: Text as SimpleITK gives it: read as UTF-8, with a surrogate for each byte that is not.
        charset: Value of SpecificCharacterSet, "" where the file has none.
    """
    from pydicom.charset import convert_encodings, decode_bytes

    if charset and not (text.isascii() and text.isprintable()):  # ISO 2022 switches sets by escapes
        # Its warnings are about sets that are misspelt or unknown.
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(LookupError, ValueError):
            encodings = convert_encodings([name.strip() for name in charset.split("\\")])
            read = decode_bytes(text.encode("utf-8", "surrogateescape"), encodings, {*b"\r\n\t\f\\"})
            # pydicom guesses where it knows no set, and puts U+FFFD for bytes that are no text, so that two
            # people would be one.
            if encodings != ["iso8859"] and "\ufffd" not in read:
                text = read
    return printable(text.strip())


def frame_count(tag: dict[str, str]) -> int:
    """Return the number of frames in a file, 1 where its header does not tell."""
    return int(tag["frames"]) if tag["frames"].isdecimal() else 1


def slices_of(tags: dict[Path, dict[str, str]]) -> list[Slice]:
    """Return the slices of a series, a file each, from their headers.

    Raises:
        DataError: A slice has no place, holds several frames, or is of another size than the first.
    """
    first = next(iter(tags.values()))
    slices = []
    for path, tag in tags.items():
        if frame_count(tag) > 1:
            raise DataError(f"slice {path.name} holds {tag['frames']} frames: no slice of a series")
        if (tag["rows"], tag["columns"]) != (first["rows"], first["columns"]):
            raise DataError(
                f"slices of several sizes in one series: {first['rows']} x {first['columns']} pixels, "
                f"but {path.name} {tag['rows']} x {tag['columns']}"
            )
        slices.append(
            Slice(
                path.name,
                _placing(tag["position"], 3, "image position", path),
                _placing(tag["axes"], 6, "image orientation", path),
                numbers(tag["spacing"]),
                phase=(_number(tag["echo"]), _number(tag["phase"])),
                # Instance numbers may start again with every acquisition.
                key=tuple(_number(tag[n]) for n in ("acquisition", "instance", "acquired", "content")),
            )
        )
    return slices


def in_order(slices: Sequence[Slice]) -> tuple[list[int], np.ndarray]:
    """Sort slices along their normal, those at one place by phase and key.

    Returns:
        The indices of the slices in that order, and the number of the place of each, from 0.

    Raises:
        DataError: The orientations or pixel spacings differ.
    """
    first = slices[0]
    normal = np.cross(first.axes[:3], first.axes[3:])
    for other in slices:
        if np.abs(np.subtract(other.axes, first.axes)).max() > _SAME:
            raise DataError(f"slices of several orientations in one series ({other.name} differs)")
        same = len(other.spacing) == len(first.spacing)
        if not same or not np.allclose(other.spacing, first.spacing, rtol=_SAME, atol=0):
            raise DataError(
                f"slices of several pixel spacings in one series: {_sides(first)}, "
                f"but {other.name} {_sides(other)}"
            )
    along = [float(np.dot(normal, part.position)) for part in slices]
    order = sorted(range(len(slices)), key=along.__getitem__)
    place = np.cumsum(np.diff([along[i] for i in order], prepend=along[order[0]]) > _SAME_PLACE)
    rank = dict(zip(order, place.tolist(), strict=True))
    return sorted(order, key=lambda i: (rank[i], slices[i].phase, slices[i].key)), place


def stack_affine(ordered: Sequence[Slice], place: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """Compute the affine of a stack that steps evenly from its first slice to its last.

    The steps need not be along the normal: those of a tilted gantry are not.

    Args:
        ordered: Slices in order.
        place: Number of the place of each slice, from `in_order`.
        plane: Steps of (3, 2) mm from a pixel to the next along a row and along a column; RAS+ world.

    Returns:
        4 x 4, (i, j, place) to RAS+ mm; 1 mm along the normal where there is one place only.

    Raises:
        DataError: Slices are missing, or a slice does not lie where even steps put it.
    """
    positions = np.array([part.position for part in ordered]) * (-1, -1, 1)  # LPS to RAS
    affine = np.eye(4)
    affine[:3, :2] = plane
    affine[:3, 3] = positions[0]
    normal = np.cross(plane[:, 0], plane[:, 1])
    normal /= np.linalg.norm(normal)
    if place[-1] == 0:
        affine[:3, 2] = normal
    else:
        affine[:3, 2] = (positions[-1] - positions[0]) / place[-1]
        starts = positions[np.flatnonzero(np.diff(place, prepend=-1))]
        _check_gaps(starts @ normal)
    off = (positions - positions[0]) @ np.linalg.inv(affine[:3, :3]).T
    off[:, 2] -= place
    share = np.abs(off) / (_MOST_PIXELS, _MOST_PIXELS, _MOST_SLICES)
    worst, axis = np.unravel_index(share.argmax(), share.shape)
    if share[worst, axis] > 1:
        mm = float(np.linalg.norm(affine[:3, :3] @ off[worst]))
        unit, most = ("slice", _MOST_SLICES) if axis == 2 else ("pixel", _MOST_PIXELS)
        raise DataError(
            f"slices do not lie evenly: {ordered[worst].name} is {mm:.3g} mm from its place in an even "
            f"stack ({abs(off[worst, axis]):.2f} of a {unit}, at most {most:g})"
        )
    return affine


def check_frames(ordered: Sequence[Slice], place: np.ndarray) -> int:
    """Return the number of frames (phases, echoes) of a stack: that of the slices at every place.

    Raises:
        DataError: Some places have more than others, or a frame would hold slices of several phases.
    """
    counts = np.bincount(place)
    if counts.min() != counts.max():
        raise DataError(
            f"slice positions occur {counts.min()} to {counts.max()} times: frames are incomplete"
        )
    count = int(counts[0])
    for at, part in enumerate(ordered):
        if count > 1 and part.phase != ordered[at % count].phase:
            raise DataError(
                f"frames are mixed: {part.name} is of another echo or time than "
                f"{ordered[at % count].name}, which would be of the same frame"
            )
    return count


def numbers(text: str) -> tuple[float, ...]:
    """Parse the numbers of a header's text; () where a part of it is no number."""
    try:
        return tuple(float(value) for value in text.split("\\") if value.strip())
    except ValueError:
        return ()


# ------------------------------------------------------------------------------------------------


def _number(text: str) -> float:
    return next(iter(numbers(text)), 0.0)


def _placing(text: str, count: int, field: str, path: Path) -> tuple[float, ...]:
    values = numbers(text)
    if len(values) != count:
        raise DataError(f"slice {path.name} has no {field}: the series cannot be put in order")
    return values


def _sides(part: Slice) -> str:
    return " x ".join(f"{side:.4g}" for side in part.spacing) + " mm" if part.spacing else "none"


def _check_gaps(places: np.ndarray) -> None:
    """Refuse a stack with gaps, given its places in mm along the normal, in order."""
    gaps = np.diff(places)
    if gaps.max() > 1.5 * gaps.min():
        at = places[int(gaps.argmax())]
        usual = float(np.median(gaps))
        raise DataError(
            f"slices are missing: a gap of {gaps.max():.4g} mm at {at:.4g}, usually {usual:.4g} mm"
        )
