"""Voxels of a scan as its file holds them, in canonical order and with their place in the patient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl3d import memory
from ssl3d.data import geometry
from ssl3d.data.geometry import CANONICAL, Triple
from ssl3d.errors import DataError


@dataclasses.dataclass
class Pixels:
    """A scan as read, in canonical order, its values untouched.

    Attributes:
        voxels: (F, D, H, W), F frames or channels, in the source's type.
        affine: (d, h, w) to patient mm.
        orientation: "SAR" or "unknown".
        original_shape: Shape of the source's array.
        original_affine: (i, j, k) of the source to RAS+ mm; None where the format has none.
        modality: DICOM code, "" where the format has none.
        eight_bit: Whether the source held unsigned bytes.
        colours: Whether the F axis is red, green, blue.
        vector: Whether the F axis holds several values of each voxel, and no frames.
        notes: Changes made to the source, for the record. "copies": slices met twice and left out.
    """

    voxels: np.ndarray
    affine: np.ndarray
    orientation: str
    original_shape: tuple[int, ...]
    original_affine: np.ndarray | None = None
    modality: str = ""
    eight_bit: bool = False
    colours: bool = False
    vector: bool = False
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def spacing(self) -> Triple:
        """Voxel sides along (D, H, W), mm."""
        return geometry.spacing_of(self.affine)


def placed_pixels(
    voxels: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, ...],
    colours: bool = False,
    vector: bool = False,
) -> Pixels:
    """Turn voxels whose place in the patient is known into canonical order.

    Args:
        voxels: (F, K, J, I).
        affine: 4 x 4, (i, j, k) to RAS+ mm.
        shape: Shape of the source's array.
        colours: Whether F is red, green, blue.
        vector: Whether F holds several values of each voxel, and no frames.

    Raises:
        DataError: The affine places no volume.
    """
    geometry.check_affine(affine)
    canonical, moved = geometry.to_canonical(np.moveaxis(voxels, (1, 2, 3), (3, 2, 1)), affine)
    return Pixels(canonical, moved, CANONICAL, shape, affine, "", voxels.dtype == np.uint8, colours, vector)


def canonical_spacing(affine: np.ndarray) -> Triple:
    """Return the voxel sides along (D, H, W) in mm of a volume whose header has this affine.

    Raises:
        DataError: The affine places no volume.
    """
    geometry.check_affine(affine)
    return geometry.spacing_of(geometry.to_canonical(np.empty((1, 1, 1)), affine)[1])


def check_size(shape: Sequence[int], max_voxels: int | None, each: int = 0) -> None:
    """Refuse a scan of no voxels, of more than `max_voxels`, or of more memory than may be taken.

    Args:
        shape: Shape by the header.
        max_voxels: Largest number of voxels; None where it does not matter.
        each: Bytes of memory that reading takes for a voxel.

    Raises:
        DataError: The scan is empty or too large.
    """
    count = math.prod(shape)
    if count == 0:
        raise DataError(f"empty: shape {tuple(shape)}")
    if max_voxels is not None and count > max_voxels:
        raise DataError(f"{count:,} voxels {tuple(shape)}, more than --max-voxels {max_voxels:,}")
    memory.check(count * each, f"{count:,} voxels {tuple(shape)}: ")
