"""SimpleITK, quiet and single-threaded: headers, affines, and the formats that it reads whole."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssl3d.data import geometry
from ssl3d.data.geometry import UNKNOWN, Triple
from ssl3d.data.scans.itk_files import detached_voxels, stored_voxels
from ssl3d.data.scans.pixels import Pixels, canonical_spacing, check_size, placed_pixels
from ssl3d.errors import DataError


@functools.cache
def quiet_sitk() -> ModuleType:
    """Import SimpleITK with one thread and no warnings of its own on stderr."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def information(path: Path, io: str = "") -> Any:
    """Read a file's header (size, spacing, tags) and return the reader that holds it.

    Args:
        path: File.
        io: Name of ITK's reader; by default ITK chooses.

    Raises:
        RuntimeError: SimpleITK cannot read the header.
    """
    sitk = quiet_sitk()
    reader = sitk.ImageFileReader()
    if io:
        reader.SetImageIO(io)
    with readable(path) as place:
        reader.SetFileName(place)
        reader.ReadImageInformation()
    return reader


def image_of(path: Path, io: str = "") -> Any:
    """Read a file whole; arguments and errors are those of `information`."""
    with readable(path) as place:
        return quiet_sitk().ReadImage(place, imageIO=io)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[str]:
    """Yield a path that SimpleITK can open: a name that is not UTF-8 ends the process there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, f"scan{path.suffix}")
            link.symlink_to(path.absolute())
            for voxels in detached_voxels(path):
                with contextlib.suppress(
                    ValueError, OSError
                ):  # in a folder of its own: ITK says that it is missing
                    (Path(folder) / voxels.relative_to(path.parent)).symlink_to(voxels.absolute())
            yield str(link)
    else:
        yield str(path)


def affine_of(image: Any) -> np.ndarray:
    """Return (i, j, k) to RAS+ mm of a SimpleITK image or reader; ITK's own world is LPS."""
    n = image.GetDimension()
    spacing, origin = np.ones(3), np.zeros(3)
    direction = np.eye(3)
    keep = min(n, 3)
    spacing[:keep] = image.GetSpacing()[:keep]
    origin[:keep] = image.GetOrigin()[:keep]
    direction[:keep, :keep] = np.array(image.GetDirection()).reshape(n, n)[:keep, :keep]
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def read_itk(files: Sequence[Path], max_voxels: int | None) -> Pixels:
    """Read an NRRD or MetaImage file, whose size and check sum are seen before its voxels are read.

    Raises:
        DataError: The file is cut short, damaged, too large, complex, or of another number of axes; or the
            file with its voxels is missing.
    """
    path = files[0]
    stored = stored_voxels(path)
    if stored is not None:
        stored.check_there()
    header = information(path)
    size, components = header.GetSize(), header.GetNumberOfComponents()
    check_size((*size, components), max_voxels)
    kinds = {header.GetMetaData(key) for key in header.GetMetaDataKeys() if key.startswith("NRRD_kinds")}
    colours = bool(kinds & {"RGB-color", "RGBA-color"})
    dtype = _dtype(header.GetPixelIDValue())
    voxels = None
    if stored is not None and dtype is not None:
        voxels = stored.read(dtype, size, components)
    elif stored is not None:
        stored.check()
    if voxels is None:
        check_size((*size, components), None, image_bytes(header))
        return pixels_of(image_of(path), colours=colours)
    return _pixels(voxels, header, components, colours=colours)


def image_bytes(header: Any) -> int:
    """Return the bytes of memory that SimpleITK takes for one value: its own copy, and that for numpy."""
    dtype = _dtype(header.GetPixelIDValue())
    return 2 * (8 if dtype is None else dtype.itemsize)


def _dtype(kind: int) -> np.dtype | None:
    """Return the type of a value of one of SimpleITK's types of voxels; None of complex ones and labels."""
    name = quiet_sitk().GetPixelIDValueAsString(kind)
    match = re.fullmatch(r"(?:vector of )?(\d+)-bit (unsigned integer|signed integer|float)", name)
    if match is None:
        return None
    letter = {"unsigned integer": "u", "signed integer": "i", "float": "f"}[match[2]]
    return np.dtype(f"{letter}{int(match[1]) // 8}")


def itk_spacing(files: Sequence[Path]) -> Triple:
    """Read the spacing (D, H, W) in mm from the header of an NRRD or MetaImage file.

    Raises:
        DataError: The affine places no volume.
    """
    return canonical_spacing(affine_of(information(files[0])))


def pixels_of(image: Any, unplaced: bool = False, colours: bool = True) -> Pixels:
    """Turn a SimpleITK image into pixels.

    Args:
        image: Image of 2, 3 or 4 dimensions.
        unplaced: Whether its place in the patient is unknown, as that of a radiograph.
        colours: Whether three values of a voxel are known to be red, green, blue.

    Raises:
        DataError: The voxels are complex, of another number of dimensions, or colours in frames.
    """
    if "complex" in image.GetPixelIDTypeAsString():
        raise DataError("complex voxels; save the magnitude")
    voxels = quiet_sitk().GetArrayFromImage(image)  # (..., K, J, I[, C])
    return _pixels(voxels, image, image.GetNumberOfComponentsPerPixel(), unplaced, colours)


def _pixels(
    voxels: np.ndarray, header: Any, components: int, unplaced: bool = False, colours: bool = True
) -> Pixels:
    """Turn voxels (..., K, J, I[, C]) into pixels, by the header of a SimpleITK image or reader."""
    dimension = header.GetDimension()
    shape = tuple(int(n) for n in header.GetSize()) + ((components,) if components > 1 else ())
    voxels = np.moveaxis(voxels, -1, 0) if components > 1 else voxels[None]
    colours = colours and components == 3
    vector = components > 1 and not colours
    if dimension == 4:
        if components > 1:
            raise DataError(f"{components} components in 4 dimensions; expected one or the other")
        voxels = voxels[0]
    elif dimension == 2:
        voxels = voxels[:, None]
    elif dimension != 3:
        raise DataError(f"{dimension} dimensions; expected 2, 3 or 4")
    if dimension == 2 or unplaced:
        pixels = unplaced_pixels(voxels, header, shape, colours)
        pixels.vector = vector
        return pixels
    return placed_pixels(voxels, affine_of(header), shape, colours, vector)


def unplaced_pixels(
    voxels: np.ndarray, image: Any, shape: tuple[int, ...], colours: bool = False
) -> Pixels:
    """Give voxels whose place is unknown the sides that an image or header has in the plane.

    Args:
        voxels: (F, K, J, I).
        image: SimpleITK image or reader.
        shape: Shape of the source's array.
        colours: Whether F is red, green, blue.
    """
    sides = [float(side) for side in image.GetSpacing()[:2]]
    affine = geometry.unknown_affine((1.0, sides[1], sides[0]))
    return Pixels(voxels, affine, UNKNOWN, shape, None, "", voxels.dtype == np.uint8, colours)
