"""Where the frames of a multi-frame DICOM file lie: in sequences, which SimpleITK does not show."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.data.scans.dicom import Slice
from ssl3d.data.scans.dicom_pixels import mapped, plain_dicom
from ssl3d.errors import DataError, is_transient

if TYPE_CHECKING:
    from pydicom import Dataset

_SLICE_VECTOR = 0x00540080


@dataclasses.dataclass
class Frames:
    """What the header of a file tells of its frames, in the file's order.

    Attributes:
        slices: Place of each frame; empty where the header does not tell it of all.
        rescale: (slope, intercept) of each frame, (1, 0) where the header has none.
        stacked: Whether the frames say that they are the slices of one even stack (nuclear medicine).
    """

    slices: list[Slice]
    rescale: list[tuple[float, float]]
    stacked: bool


def read_frames(path: Path) -> Frames:
    """Read what the functional groups of a multi-frame file tell of its frames.

    Raises:
        ValueError: The header is damaged.
    """
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    wanted = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "FrameIncrementPointer"]
    try:
        # Warnings are of values that are not by the book.
        with warnings.catch_warnings(action="ignore"), plain_dicom(path) as plain, mapped(plain) as file:
            header = dcmread(file, stop_before_pixels=True, specific_tags=list(wanted))
            shared = next(iter(header.get(wanted[0]) or ()), None)
            groups = list(header.get(wanted[1]) or ())
            slices = [_slice(k, group, shared) for k, group in enumerate(groups)]
            rescale = [_rescale(group, shared) for group in groups]
            stacked = header.get(wanted[2]) == _SLICE_VECTOR
    except InvalidDicomError:
        return Frames([], [], False)
    except DataError:
        raise
    except Exception as error:
        if is_transient(error):
            raise
        raise ValueError(f"its header is damaged: {error}") from error
    return Frames([place for place in slices if place] if all(slices) else [], rescale, stacked)


def _slice(index: int, group: Dataset, shared: Dataset | None) -> Slice | None:
    position = _numbers(group, shared, "PlanePositionSequence", "ImagePositionPatient")
    axes = _numbers(group, shared, "PlaneOrientationSequence", "ImageOrientationPatient")
    if len(position) != 3 or len(axes) != 6:
        return None
    return Slice(
        f"frame {index}",
        position,
        axes,
        _numbers(group, shared, "PixelMeasuresSequence", "PixelSpacing"),
        phase=_numbers(group, shared, "FrameContentSequence", "TemporalPositionIndex"),
        key=_numbers(group, shared, "FrameContentSequence", "DimensionIndexValues"),
    )


def _rescale(group: Dataset, shared: Dataset | None) -> tuple[float, float]:
    slope, intercept = (
        _numbers(group, shared, "PixelValueTransformationSequence", name)
        for name in ("RescaleSlope", "RescaleIntercept")
    )
    return (slope[0] if slope else 1.0), (intercept[0] if intercept else 0.0)


def _numbers(group: Dataset, shared: Dataset | None, sequence: str, name: str) -> tuple[float, ...]:
    """Read numbers from the frame's own group, else from the group that all frames share."""
    for place in (group, shared):
        for item in (place.get(sequence) or ()) if place is not None else ():
            value: Any = item.get(name)
            if value is not None and value != "":
                return tuple(map(float, value if hasattr(value, "__iter__") else (value,)))
    return ()
