"""Predicted label maps back in the scan's own geometry, as NIfTI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssl3d.data.geometry import regrid, save_nifti
from ssl3d.errors import DataError

if TYPE_CHECKING:
    from ssl3d.data.store.writer import Record


def to_original(record: Record, labels: np.ndarray) -> np.ndarray | None:
    """Resample a label map to the grid of the file that the volume came from, by the nearest voxel.

    What preparation cropped away is 0.

    Args:
        record: Record of the volume (`Volume.record`).
        labels: Label map (D, H, W) on the stored grid.

    Returns:
        (I, J, K) in the source's own order of axes; None where the record does not say where the source's
        voxels were (formats without an affine, series of frames).
    """
    if record.original_affine is None:
        return None
    shape = _spatial(record.original_shape)
    if shape is None:
        return None
    source, stored = np.array(record.original_affine), np.array(record.affine)
    matrix = np.linalg.inv(stored) @ source  # (i, j, k) of the source to (d, h, w) of the store
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in labels.shape], indexing="ij")).reshape(3, -1)
    back = np.linalg.inv(matrix)
    reached = back[:3, :3] @ corners + back[:3, 3:]
    # Resampling keeps the field of view to half a voxel; anything else is another geometry.
    slack = np.abs(back[:3, :3]).sum(axis=1, keepdims=True) + 1
    if (reached < -0.5 - slack).any() or (reached > np.array(shape)[:, None] - 0.5 + slack).any():
        return None
    axes = np.abs(matrix[:3, :3]).argmax(axis=0)
    kept = np.zeros_like(matrix[:3, :3])
    kept[axes, range(3)] = matrix[axes, range(3)]
    if sorted(axes) != [0, 1, 2] or np.abs(matrix[:3, :3] - kept).max() * max(shape) > 0.1:
        return regrid(labels, stored, shape, source, nearest=True, outside=0)
    # Axis by axis, for `regrid` leaves out source voxels whose centres the stored grid just misses.
    restored = np.moveaxis(labels, axes, (0, 1, 2))
    for axis, length in enumerate(shape):
        row = axes[axis]
        place = matrix[row, axis] * np.arange(length) + matrix[row, 3]
        size = restored.shape[axis]
        # Without a crop both grids cover the same field of view, to half a voxel at the rim.
        inside = ((place > -0.5 - 1e-3) & (place < size - 0.5 + 1e-3)) | ("crop" not in record.done)
        restored = np.take(restored, np.clip(np.rint(place), 0, size - 1).astype(int), axis=axis)
        wide = [1, 1, 1]
        wide[axis] = length
        restored = np.where(inside.reshape(wide), restored, 0)
    return restored


def save_segmentation(record: Record, labels: np.ndarray, path: str | Path) -> bool:
    """Write a label map as NIfTI, with the affine and shape of the scan where the record has them.

    Args:
        record: Record of the volume (`Volume.record`).
        labels: Label map (D, H, W), integers, on the stored grid.
        path: Path that ends in .nii or .nii.gz.

    Returns:
        Whether it is on the scan's own grid; else it is on the store's, at its place in the patient.

    Raises:
        DataError: The labels are not of three axes or too large, or the path has another ending.
    """
    if labels.ndim != 3:
        raise DataError(f"{path}: labels of shape {labels.shape}; expected (D, H, W)")
    low, high = int(labels.min()), int(labels.max())
    types = (np.uint8, np.int16, np.uint16, np.int32)
    holding = [t for t in types if np.iinfo(t).min <= low and high <= np.iinfo(t).max]
    if not holding:
        raise DataError(f"{path}: labels {low} to {high}; expected what fits into 32 bits")
    values = labels.astype(holding[0])
    restored = to_original(record, values)
    if restored is None:
        save_nifti(record, (0, 0, 0), values, path)
        return False
    save_original(record, restored, Path(path))
    return True


def save_original(record: Record, labels: np.ndarray, path: Path) -> None:
    """Write a label map that is on the grid of the scan already as NIfTI.

    Args:
        record: Record of the volume (`Volume.record`).
        labels: Label map (I, J, K) in the source's own order of axes.
        path: Path that ends in .nii or .nii.gz.

    Raises:
        DataError: The path has another ending.
    """
    import nibabel

    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: expected a name that ends in .nii or .nii.gz")
    image = nibabel.Nifti1Image(labels, np.array(record.original_affine))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def _spatial(shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Return the first three axes of the source; a picture has one slice."""
    if len(shape) < 2:
        return None
    i, j, k = (*shape[:3], 1)[:3]
    return (int(i), int(j), int(k))
