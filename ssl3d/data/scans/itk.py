"""SimpleITK, quiet and single-threaded: headers, affines, and the formats that it reads whole."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ssl3d.data import geometry
from ssl3d.data.geometry import UNKNOWN, Triple
from ssl3d.data.scans.pixels import Pixels, canonical_spacing, check_size, placed_pixels
from ssl3d.errors import DataError

_VOXELS = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.MULTILINE | re.IGNORECASE)


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


def detached_voxels(path: Path) -> Iterator[Path]:
    """Yield the file that holds the voxels of a header in NRRD or MetaImage, where that is another."""
    with open(path, "rb") as file:
        match = _VOXELS.search(file.read(1 << 16).partition(b"\n\n")[0])
    if match and match[1] not in (b"LOCAL", b"LIST"):
        yield path.parent / os.fsdecode(match[1])


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
    """Read an NRRD or MetaImage file, whose size is checked before its voxels are read.

    Raises:
        DataError: The file is cut short, too large, complex, or of another number of axes.
    """
    path = files[0]
    header = information(path)
    check_size((*header.GetSize(), header.GetNumberOfComponents()), max_voxels)
    _check_length(path, header)
    return pixels_of(image_of(path))


def itk_spacing(files: Sequence[Path]) -> Triple:
    """Read the spacing (D, H, W) in mm from the header of an NRRD or MetaImage file.

    Raises:
        DataError: The affine places no volume.
    """
    return canonical_spacing(affine_of(information(files[0])))


def pixels_of(image: Any, unplaced: bool = False) -> Pixels:
    """Turn a SimpleITK image into pixels.

    Args:
        image: Image of 2, 3 or 4 dimensions.
        unplaced: Whether its place in the patient is unknown, as that of a radiograph.

    Raises:
        DataError: The voxels are complex, of another number of dimensions, or colours in frames.
    """
    sitk = quiet_sitk()
    components = image.GetNumberOfComponentsPerPixel()
    dimension = image.GetDimension()
    if "complex" in image.GetPixelIDTypeAsString():
        raise DataError("complex voxels; save the magnitude")
    voxels = sitk.GetArrayFromImage(image)  # (..., K, J, I[, C])
    shape = tuple(int(n) for n in image.GetSize()) + ((components,) if components > 1 else ())
    voxels = np.moveaxis(voxels, -1, 0) if components > 1 else voxels[None]
    if dimension == 4:
        if components > 1:
            raise DataError(f"{components} components in 4 dimensions; expected one or the other")
        voxels = voxels[0]
    elif dimension == 2:
        voxels = voxels[:, None]
    elif dimension != 3:
        raise DataError(f"{dimension} dimensions; expected 2, 3 or 4")
    if dimension == 2 or unplaced:
        return unplaced_pixels(voxels, image, shape, components == 3)
    return placed_pixels(voxels, affine_of(image), shape, components == 3)


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


def _check_length(path: Path, header: Any) -> None:
    """Refuse a MetaImage file that is shorter than its header promises.

    MetaImage prints lines of its own about such a file before it fails.
    """
    with open(path, "rb") as file:
        text = file.read(4096)
    if b"ElementDataFile = LOCAL" not in text or re.search(rb"CompressedData\s*=\s*True", text):
        return
    sitk = quiet_sitk()
    pixel = sitk.Image([1] * 2, header.GetPixelID(), header.GetNumberOfComponents())
    size = pixel.GetSizeOfPixelComponent() * pixel.GetNumberOfComponentsPerPixel()
    needed = math.prod(header.GetSize()) * size
    if path.stat().st_size < needed:
        raise DataError(f"cut short: {path.stat().st_size:,} bytes, the header promises {needed:,}")
