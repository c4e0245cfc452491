"""Where voxels are: canonical order, spacing, grids, and the way back to patient space.

Arrays are (C, D, H, W), D inferior to superior, H posterior to anterior, W left to right ("SAR"). An
affine here takes a voxel (d, h, w) to patient mm in nibabel's RAS+ world, unless it is called
`original_affine`: that one takes the source's own (i, j, k).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ssl3d.errors import DataError

if TYPE_CHECKING:
    from ssl3d.data.store.record import Record

Triple = tuple[float, float, float]

CANONICAL = "SAR"
UNKNOWN = "unknown"
# (d, h, w) <-> (x, y, z): one and the same permutation, its own inverse.
_REVERSED = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)


def spacing_of(affine: np.ndarray) -> Triple:
    """Return the voxel sides in mm along the three axes of an affine."""
    d, h, w = (float(side) for side in np.sqrt((affine[:3, :3] ** 2).sum(axis=0)))
    return d, h, w


def check_affine(affine: np.ndarray) -> None:
    """Refuse an affine that places no volume.

    Raises:
        DataError: The affine is not finite, or its axes do not span space.
    """
    if not np.isfinite(affine).all():
        raise DataError("the affine of the header is not finite")
    sides = np.array(spacing_of(affine))
    if (sides <= 0).any() or abs(np.linalg.det(affine[:3, :3] / np.where(sides > 0, sides, 1))) < 1e-3:
        raise DataError(
            f"the affine of the header is degenerate (voxel sides {sides.round(4).tolist()} mm)"
        )


def to_canonical(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reorder and flip axes so that they run nearest to superior, anterior, right; nothing is resampled.

    Args:
        voxels: (..., I, J, K) in the order of the affine.
        affine: 4 x 4, (i, j, k) to RAS+ mm. May be oblique: the obliqueness stays in the result.

    Returns:
        (..., D, H, W) and the affine of (d, h, w).

    Example:
        >>> voxels, affine = to_canonical(np.zeros((2, 3, 4)), np.diag([1.0, 1.0, 5.0, 1.0]))
        >>> voxels.shape, spacing_of(affine)
        ((4, 3, 2), (5.0, 1.0, 1.0))
    """
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    orientation = io_orientation(affine)
    shape = voxels.shape[-3:]
    moved = np.moveaxis(voxels, (-3, -2, -1), (0, 1, 2))
    moved = apply_orientation(moved, orientation)
    canonical = affine @ inv_ornt_aff(orientation, shape)
    return np.moveaxis(moved, (2, 1, 0), (-3, -2, -1)), canonical @ _REVERSED


def from_canonical(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Undo the reordering of `to_canonical`.

    Args:
        voxels: (..., D, H, W).
        affine: 4 x 4, (i, j, k) of the source to RAS+ mm.

    Returns:
        (..., I, J, K).
    """
    from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

    back = ornt_transform(io_orientation(np.eye(4)), io_orientation(affine))
    moved = np.moveaxis(voxels, (-3, -2, -1), (2, 1, 0))
    return np.moveaxis(apply_orientation(moved, back), (0, 1, 2), (-3, -2, -1))


def unknown_affine(spacing: Triple) -> np.ndarray:
    """Return the affine of a volume whose place is unknown: x along W, y along H, z along D."""
    return _REVERSED @ np.diag([*spacing, 1.0])


def shifted(affine: np.ndarray, start: Sequence[float]) -> np.ndarray:
    """Return the affine of a crop that begins at voxel `start`."""
    moved = affine.copy()
    moved[:3, 3] = affine[:3, :3] @ np.asarray(start, dtype=float) + affine[:3, 3]
    return moved


def respaced(
    shape: Sequence[int], affine: np.ndarray, spacing: Triple
) -> tuple[tuple[int, ...], np.ndarray]:
    """Return the grid of another spacing over the same field of view, centres aligned, axes kept.

    Args:
        shape: Voxels (D, H, W) of the grid.
        affine: 4 x 4, (d, h, w) of the grid to RAS+ mm.
        spacing: Voxel sides (D, H, W) in mm of the other grid.

    Returns:
        The other grid's shape and affine.

    Example:
        >>> respaced((10, 20, 20), unknown_affine((4.0, 1.0, 1.0)), (2.0, 2.0, 2.0))[0]
        (20, 10, 10)
    """
    old = np.array(spacing_of(affine))
    ratio = np.array(spacing) / old
    sizes = tuple(max(1, round(n / r)) for n, r in zip(shape, ratio, strict=True))
    # Both grids share their centre; a voxel is as long as its side, so the edges agree to half a voxel.
    start = [((n - 1) - (m - 1) * r) / 2 for n, m, r in zip(shape, sizes, ratio, strict=True)]
    moved = shifted(affine, start)
    moved[:3, :3] = affine[:3, :3] * ratio
    return sizes, moved


def regrid(
    voxels: np.ndarray,
    affine: np.ndarray,
    shape: Sequence[int],
    target: np.ndarray,
    nearest: bool = False,
    outside: float | None = None,
) -> np.ndarray:
    """Sample a volume on another grid: linearly, smoothed first where voxels get larger, or nearest.

    Args:
        voxels: (D, H, W).
        affine: Affine of `voxels`.
        shape: Shape of the result.
        target: Affine of the result.
        nearest: Whether each voxel takes the nearest value, as label maps need it.
        outside: Value beyond the volume, whose voxels reach half their side beyond their centres; None
            continues its border.
    """
    from scipy import ndimage

    matrix = np.linalg.inv(affine) @ target
    steps = np.sqrt((matrix[:3, :3] ** 2).sum(axis=1))
    source = voxels
    if not nearest:
        source = voxels.astype(np.float32, copy=False)
        for axis, step in enumerate(steps):
            if step > 1.05 and source.shape[axis] > 1:
                # Point spread of the coarser voxel, less that of the finer (Cardoso et al., MICCAI 2015).
                sigma = np.sqrt((step**2 - 1) / (8 * np.log(2)))
                source = ndimage.gaussian_filter1d(source, sigma, axis=axis, mode="nearest")
    linear = matrix[:3, :3]
    off_diagonal = np.abs(linear - np.diag(np.diag(linear))).max()
    resampled: np.ndarray = ndimage.affine_transform(
        source,
        np.diag(linear) if off_diagonal < 1e-9 else linear,
        offset=matrix[:3, 3],
        output_shape=tuple(shape),
        order=0 if nearest else 1,
        mode="nearest",
    )
    if outside is not None:
        _fill_beyond(resampled, matrix, source.shape, outside)
    return resampled


def _fill_beyond(voxels: np.ndarray, matrix: np.ndarray, shape: Sequence[int], value: float) -> None:
    """Write a value wherever `matrix` takes a voxel of `voxels` out of a volume of `shape`.

    scipy's own constant mode fills from the outermost centres on: the least shift costs whole planes.
    """
    rows, columns = np.ogrid[: voxels.shape[1], : voxels.shape[2]]
    for depth, layer in enumerate(voxels):  # layer by layer, to save memory
        for (d, h, w, start), size in zip(matrix[:3], shape, strict=True):
            place = d * depth + start + h * rows + w * columns
            layer[(place < -0.5 - 1e-3) | (place > size - 0.5 + 1e-3)] = value


def to_patient(record: Record, voxel: Sequence[float] | np.ndarray) -> np.ndarray:
    """Convert positions in the stored volume into positions in the patient.

    Args:
        record: Record of the volume (`Volume.record`).
        voxel: (..., 3), (d, h, w); fractions and places outside the volume are fine.

    Returns:
        (..., 3), (x, y, z) in mm, RAS+ world. Of an "unknown" orientation: along W, H, D.
    """
    affine = np.array(record.affine)
    return np.asarray(voxel, dtype=float) @ affine[:3, :3].T + affine[:3, 3]


def save_nifti(record: Record, start: Sequence[int], array: np.ndarray, path: str | Path) -> Path:
    """Write a crop, a prediction or a mask as NIfTI at its place in the patient.

    Args:
        record: Record of the volume that the crop was cut from.
        start: First voxel of the crop in the stored volume, (D, H, W).
        array: (d, h, w) or (C, d, h, w), at the stored spacing.
        path: File whose name ends in .nii or .nii.gz.

    Raises:
        DataError: The array has another number of axes, or the path another ending.
    """
    import nibabel

    path = Path(path)
    if array.ndim not in (3, 4):
        raise DataError(f"{path}: an array of shape {array.shape}; expected (d, h, w) or (C, d, h, w)")
    if not path.name.removesuffix(".gz").endswith(nibabel.Nifti1Image.valid_exts):
        raise DataError(f"{path}: expected a name that ends in .nii or .nii.gz")
    data = array.astype(np.uint8) if array.dtype == bool else array
    if data.dtype == np.int64:
        data = data.astype(np.int32)
    elif data.dtype == np.float16:
        data = data.astype(np.float32)
    # NIfTI keeps (x, y, z) and channels last.
    data = data.T if array.ndim == 3 else np.transpose(data, (3, 2, 1, 0))
    image = nibabel.Nifti1Image(data, shifted(np.array(record.affine), start) @ _REVERSED)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path
