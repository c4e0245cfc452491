"""SimpleITK, quiet and single-threaded: headers and affines."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


@functools.cache
def quiet_sitk() -> ModuleType:
    """SimpleITK, with one thread and no warnings of its own on stderr."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def information(path: Path, io: str = "") -> Any:
    """A reader that has read the header: size, spacing, tags.

    Raises:
        RuntimeError: As SimpleITK does.
    """
    sitk = quiet_sitk()
    reader = sitk.ImageFileReader()
    if io:
        reader.SetImageIO(io)
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def affine_of(image: Any) -> np.ndarray:
    """(i, j, k) to RAS+ mm, of a SimpleITK image or reader; ITK's own world is LPS."""
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
