"""Mosaics: DICOM files that hold the slices of a volume side by side in one picture."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data.scans.dicom_pixels import dicom_image, mapped, plain_dicom
from ssl3d.data.scans.itk import quiet_sitk
from ssl3d.data.scans.pixels import Pixels, placed_pixels
from ssl3d.errors import DataError, is_transient

_SAME = 1e-3  # mm, between the places of a series' volumes
_SIEMENS_TYPE, _UIH_SLICES = (0x0051, 0x1016), (0x0065, 0x1050)  # private: type, slices in the picture


def is_mosaic(path: Path, tag: dict[str, str]) -> bool:
    """Tell by its headers whether a file is a Siemens mosaic.

    Args:
        path: File.
        tag: Its tags; see `dicom_tags`.

    Raises:
        DataError: It is a mosaic of United Imaging, which is not read.
    """
    if "MOSAIC" in tag["type"].split("\\"):
        return True
    if tag["modality"] != "MR":
        return False
    of_siemens, slices = _private(path)
    if slices.isdecimal() and int(slices) > 1:
        raise DataError(
            f"a grid of {int(slices)} slices in one picture (United Imaging); convert it with dcm2niix"
        )
    return "MOSAIC" in of_siemens.replace("/", "\\").split("\\")


def read_mosaics(files: list[Path], header_only: bool) -> Pixels:
    """Read mosaics, each a volume of a series, as frames.

    Siemens' own header, which nibabel reads, tells how many slices there are and which way they go.

    Args:
        files: Files in the order of time.
        header_only: Whether to read the place of the voxels alone, and one voxel instead of them.

    Raises:
        DataError: Siemens' header is missing or tells of an order that is not known, or the volumes lie at
            several places.
    """
    first, affine = _header(files[0])
    frames = []
    for path in files:
        wrapper, place = _header(path)
        if wrapper.image_shape != first.image_shape or not np.allclose(place, affine, atol=_SAME):
            raise DataError(f"mosaics of several places or sizes in one series ({path.name} differs)")
        if not header_only:
            frames.append(_unpacked(path, wrapper))
    if header_only:
        return placed_pixels(np.empty((1, 1, 1, 1)), affine, ())
    rows, columns, slices = first.image_shape
    shape = (columns, rows, slices) + ((len(frames),) if len(frames) > 1 else ())
    return placed_pixels(np.stack(frames), affine, shape)


def _private(path: Path) -> tuple[str, str]:
    """Return what private tags tell: Siemens' type of image, United Imaging's number of slices."""
    from pydicom import dcmread

    try:
        with warnings.catch_warnings(action="ignore"), plain_dicom(path) as plain, mapped(plain) as file:
            header = dcmread(file, stop_before_pixels=True, specific_tags=[_SIEMENS_TYPE, _UIH_SLICES])
            private = [header[tag].value if tag in header else "" for tag in (_SIEMENS_TYPE, _UIH_SLICES)]
    except Exception as error:  # GDCM reads headers that pydicom does not
        if is_transient(error):
            raise
        return "", ""
    # Bytes where the header names no types; several values where they are told apart by \.
    texts = [value.decode("latin-1") if isinstance(value, bytes) else value for value in private]
    of_siemens, slices = (
        "\\".join(map(str, text)) if isinstance(text, list | tuple) else str(text).strip(" \0")
        for text in texts
    )
    return of_siemens, slices


def _header(path: Path) -> tuple[Any, np.ndarray]:
    """Return nibabel's view of a mosaic, and (i, j, k) to RAS+ mm.

    Raises:
        DataError: The header does not tell of the slices.
    """
    with warnings.catch_warnings(action="ignore"):  # nibabel's are about what its readers lack elsewhere
        from nibabel.nicom.csareader import get_scalar
        from nibabel.nicom.dicomwrappers import MosaicWrapper, wrapper_from_data
        from pydicom import dcmread

        with plain_dicom(path) as plain, mapped(plain) as file:
            wrapper = wrapper_from_data(dcmread(file, stop_before_pixels=True))
    affine = wrapper.affine if isinstance(wrapper, MosaicWrapper) and wrapper.csa_header else None
    if affine is None:
        raise DataError(
            "a Siemens mosaic without the header of Siemens that tells its slices; convert it with dcm2niix"
        )
    number = get_scalar(wrapper.csa_header, "ProtocolSliceNumber")
    if number is not None and number > 1:
        raise DataError(
            f"a Siemens mosaic whose first slice is the protocol's {number}: their order is not sure; "
            "convert it with dcm2niix"
        )
    return wrapper, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine[:, [1, 0, 2, 3]]  # LPS; rows before columns


def _unpacked(path: Path, wrapper: Any) -> np.ndarray:
    """Read a mosaic as (K, J, I)."""
    sheet = quiet_sitk().GetArrayFromImage(dicom_image(path))
    sheet = sheet.reshape(sheet.shape[-2:])
    rows, columns, slices = wrapper.image_shape
    side = wrapper.mosaic_size
    if sheet.shape != (side * rows, side * columns):
        raise DataError(
            f"a Siemens mosaic of {sheet.shape[0]} x {sheet.shape[1]} pixels, which {side} x {side} slices "
            "do not fill; convert it with dcm2niix"
        )
    tiles = sheet.reshape(side, rows, side, columns).swapaxes(1, 2)
    return np.asarray(tiles.reshape(-1, rows, columns)[:slices])
