"""Puts a mask, or a further channel, on the grid of its scan: by the headers, or voxel by voxel.

Headers decide while both tell where their voxels lie. One that tells nothing of its own (no codes, or
sides of voxels only, as a program leaves it that saves an array without the scan's header) does not tell
either how its axes run: to turn the voxels by it would mirror them. They then lie in their file as those of
the scan do in its own.
"""

from __future__ import annotations

import numpy as np

from ssl3d.data import geometry
from ssl3d.data.geometry import UNKNOWN
from ssl3d.data.scans.read import Pixels
from ssl3d.errors import DataError


def mask_onto(scan: Pixels, mask: Pixels, name: str) -> tuple[np.ndarray, str]:
    """Put a label map on the grid of its scan.

    Two headers that tell places of their own are believed if at least half of what is labelled then lies in
    the scan. Else one of them is wrong, and the voxels are taken as they lie in the files.

    Args:
        scan: Voxels of (F, D, H, W).
        mask: Voxels of (1, D, H, W), whole numbers.
        name: Name of the mask's file.

    Returns:
        Labels (D, H, W), and how they got there: "" (one grid), "elsewhere" (voxel by voxel, against what
        the headers say) or "regridded" (by the headers, to the nearest label).

    Raises:
        DataError: Neither headers nor shapes say which voxel belongs to which.
    """
    labels, shape = mask.voxels[0], scan.voxels.shape[1:]
    alike, placed, located = labels.shape == shape, _placed(scan, mask), _located(scan, mask)
    if placed and alike and _apart(scan, mask) <= 1:
        return labels, "" if np.allclose(mask.affine, scan.affine, atol=1e-2) else "elsewhere"
    cropped = _of_a_part(scan, mask) if placed and not alike else None
    if cropped is not None:
        return cropped, "regridded"
    stored = _as_in_file(scan, mask)
    if stored is not None and not located:
        return stored, "" if scan.orientation == mask.orientation == UNKNOWN else "elsewhere"
    if placed and sorted(labels.shape) != sorted(shape):  # with equal ones, axes may have changed places
        moved = geometry.regrid(labels, mask.affine, shape, scan.affine, nearest=True, outside=0)
        if moved.any() == labels.any() and _same_field(scan, mask):
            return moved, "regridded"
    elif located and alike:
        moved = geometry.regrid(labels, mask.affine, shape, scan.affine, nearest=True, outside=0)
        if 2 * _labelled(moved, scan) >= _labelled(labels, mask):
            return moved, "regridded"
    if located and (stored is not None or alike):
        return labels if stored is None else stored, "elsewhere"
    sizes = [_file_order(pixels).shape for pixels in (mask, scan)]
    raise DataError(f"mask {name} of shape {sizes[0]} does not fit the scan, {sizes[1]}")


def _of_a_part(scan: Pixels, mask: Pixels) -> np.ndarray | None:
    """Put labels of a part of the scan's own voxels in their place, (D, H, W); None if they are not so.

    3D Slicer stores no more than the box around the segments. A header without a place of its own, which
    some program left, would put it into a corner.
    """
    if _bare(mask, scan):
        return None
    onto = np.linalg.inv(scan.affine) @ mask.affine
    start = np.rint(onto[:3, 3])
    stop = start + mask.voxels.shape[1:]
    inside = (start >= 0).all() and (stop <= scan.voxels.shape[1:]).all()
    # Nowhere a tenth of a voxel off.
    off = np.abs(onto[:3, :3] - np.eye(3)) @ mask.voxels.shape[1:] + np.abs(onto[:3, 3] - start)
    if not inside or off.max() > 0.1:
        return None
    labels = np.zeros(scan.voxels.shape[1:], mask.voxels.dtype)
    labels[tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))] = mask.voxels[0]
    return labels


def channel_onto(first: Pixels, other: Pixels, name: str) -> tuple[np.ndarray, str]:
    """Put a further channel on the grid of the first.

    Args:
        first: Voxels of (1, D, H, W).
        other: Voxels of (1, D, H, W).
        name: Name of the channel.

    Returns:
        Voxels (D, H, W), and how they got there: "" (one grid), "elsewhere" (voxel by voxel, against what
        the headers say) or "regridded" (by the headers; beyond the channel its lowest value goes on).

    Raises:
        DataError: Nothing says which voxel belongs to which, the two do not overlap, or what should be
            resampled is not finite.
    """
    shape, placed = first.voxels.shape[1:], _placed(first, other)
    near = placed and other.voxels.shape[1:] == shape and _apart(first, other) <= 1
    if near and np.allclose(other.affine, first.affine, atol=1e-3):
        return other.voxels[0], ""
    stored = None if near or _located(first, other) else _as_in_file(first, other)
    if stored is not None:
        return stored, "" if first.orientation == other.orientation == UNKNOWN else "elsewhere"
    if not placed:
        sizes = [_file_order(pixels).shape for pixels in (other, first)]
        raise DataError(f"channel {name}: shape {sizes[0]}, the first has {sizes[1]}")
    odd = int((~np.isfinite(other.voxels)).sum())
    if odd:
        raise DataError(f"channel {name}: {odd:,} of {other.voxels.size:,} voxels are NaN or infinite")
    darkest = float(other.voxels.min())
    moved = geometry.regrid(other.voxels[0], other.affine, shape, first.affine, outside=darkest)
    if moved.min() == moved.max():
        raise DataError(f"channel {name} does not overlap the first")
    return moved, "regridded"


def _placed(first: Pixels, other: Pixels) -> bool:
    """Tell whether both files say where they are, in whatever words."""
    return UNKNOWN not in (first.orientation, other.orientation)


def _located(first: Pixels, other: Pixels) -> bool:
    """Tell whether each of two headers has a place of its own: turned axes, or an origin."""
    return _placed(first, other) and not (_bare(first, other) or _bare(other, first))


def _bare(pixels: Pixels, other: Pixels) -> bool:
    """Tell whether a header has the sides of voxels only, or the other's origin without its directions."""
    mine, theirs = _affine_of_file(pixels), _affine_of_file(other)
    sides, others = (np.sqrt((affine[:3, :3] ** 2).sum(axis=0)) for affine in (mine, theirs))
    if np.abs(np.abs(np.diag(mine)[:3]) - sides).max() > 1e-3 * sides.max():
        return False
    handed_on = np.allclose(mine[:3, 3], theirs[:3, 3], atol=1e-3) and np.allclose(sides, others, rtol=1e-3)
    return handed_on or bool(np.abs(mine[:3, 3]).max() < 1e-3)


def _file_order(pixels: Pixels) -> np.ndarray:
    """Turn the first frame back to its file's order, (I, J, K); of a picture x, y and a depth of 1."""
    return geometry.from_canonical(pixels.voxels[0], _affine_of_file(pixels))


def _as_in_file(scan: Pixels, other: Pixels) -> np.ndarray | None:
    """Turn the voxels of a file as those of the scan's were, (D, H, W); None if the shapes differ."""
    held = _file_order(other)
    if held.shape != _file_order(scan).shape:
        return None
    return geometry.to_canonical(held, _affine_of_file(scan))[0]


def _affine_of_file(pixels: Pixels) -> np.ndarray:
    # What has no affine was taken as it is: x along W, y along H.
    return np.eye(4) if pixels.original_affine is None else pixels.original_affine


def _corners(pixels: Pixels) -> np.ndarray:
    """Compute the eight outer corners of a grid in mm, (8, 3)."""
    ends = [(-0.5, n - 0.5) for n in pixels.voxels.shape[1:]]
    at = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
    return at @ pixels.affine[:3, :3].T + pixels.affine[:3, 3]


def _apart(scan: Pixels, other: Pixels) -> float:
    """Measure how far two grids' corners are apart at most along an axis, in voxels of the scan."""
    gaps = (_corners(other) - _corners(scan)) @ np.linalg.inv(scan.affine[:3, :3]).T
    return float(np.abs(gaps).max())


def _same_field(scan: Pixels, other: Pixels) -> bool:
    """Tell whether two grids cover the same space, to within one and a half of the larger voxels."""
    gaps = np.abs(_corners(other) - _corners(scan)).max()
    return bool(gaps <= 1.5 * max(*scan.spacing, *other.spacing))


def _labelled(labels: np.ndarray, pixels: Pixels) -> float:
    """Measure what is labelled on a grid, in cubic mm."""
    return float(np.count_nonzero(labels) * np.prod(pixels.spacing))
