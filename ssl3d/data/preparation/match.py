"""A mask, or a further channel, on the grid of its scan: where the headers put it, or voxel by voxel.

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
    """A label map on the grid of its scan.

    Two headers that tell places of their own are believed if at least half of what is labelled then lies in
    the scan. Else one of them is wrong, and the voxels are taken as they lie in the files.

    Args:
        scan: Voxels of (F, D, H, W).
        mask: Voxels of (1, D, H, W), whole numbers.
        name: Of the mask's file.

    Returns:
        (D, H, W), and how it got there: "" (one grid), "elsewhere" (voxel by voxel, against what the
        headers say) or "regridded" (by the headers, to the nearest label).

    Raises:
        DataError: Neither headers nor shapes say which voxel belongs to which.
    """
    labels, shape = mask.voxels[0], scan.voxels.shape[1:]
    alike, placed, told = labels.shape == shape, _placed(scan, mask), _told(scan, mask)
    if placed and alike and _apart(scan, mask) <= 1:
        return labels, "" if np.allclose(mask.affine, scan.affine, atol=1e-2) else "elsewhere"
    stored = _as_in_file(scan, mask)
    if stored is not None and not told:
        return stored, "" if scan.orientation == mask.orientation == UNKNOWN else "elsewhere"
    if placed and sorted(labels.shape) != sorted(shape):  # with equal ones, axes may have changed places
        found = geometry.regrid(labels, mask.affine, shape, scan.affine, nearest=True, outside=0)
        if found.any() == labels.any() and _same_field(scan, mask):
            return found, "regridded"
    elif told and alike:
        found = geometry.regrid(labels, mask.affine, shape, scan.affine, nearest=True, outside=0)
        if 2 * _labelled(found, scan) >= _labelled(labels, mask):
            return found, "regridded"
    if told and (stored is not None or alike):
        return labels if stored is None else stored, "elsewhere"
    sizes = [_file_order(pixels).shape for pixels in (mask, scan)]
    raise DataError(f"mask {name} of shape {sizes[0]} does not fit the scan, {sizes[1]}")


def channel_onto(first: Pixels, other: Pixels, name: str) -> tuple[np.ndarray, str]:
    """A further channel on the grid of the first.

    Args:
        first: Voxels of (1, D, H, W).
        other: Voxels of (1, D, H, W).
        name: Of the channel.

    Returns:
        (D, H, W), and how it got there: "" (one grid), "elsewhere" (voxel by voxel, against what the
        headers say) or "regridded" (by the headers; where it ends, its lowest value goes on).

    Raises:
        DataError: Nothing says which voxel belongs to which, the two do not overlap, or what should be
            resampled is not finite.
    """
    shape, placed = first.voxels.shape[1:], _placed(first, other)
    near = placed and other.voxels.shape[1:] == shape and _apart(first, other) <= 1
    if near and np.allclose(other.affine, first.affine, atol=1e-3):
        return other.voxels[0], ""
    stored = None if near or _told(first, other) else _as_in_file(first, other)
    if stored is not None:
        return stored, "" if first.orientation == other.orientation == UNKNOWN else "elsewhere"
    if not placed:
        sizes = [_file_order(pixels).shape for pixels in (other, first)]
        raise DataError(f"channel {name}: shape {sizes[0]}, the first has {sizes[1]}")
    odd = int((~np.isfinite(other.voxels)).sum())
    if odd:
        raise DataError(f"channel {name}: {odd:,} of {other.voxels.size:,} voxels are NaN or infinite")
    darkest = float(other.voxels.min())
    found = geometry.regrid(other.voxels[0], other.affine, shape, first.affine, outside=darkest)
    if found.min() == found.max():
        raise DataError(f"channel {name} does not overlap the first")
    return found, "regridded"


def _placed(one: Pixels, other: Pixels) -> bool:
    """Whether both files say where they are, in whatever words."""
    return UNKNOWN not in (one.orientation, other.orientation)


def _told(one: Pixels, other: Pixels) -> bool:
    """Whether each of two headers tells a place of its own: turned axes, or an origin."""
    return _placed(one, other) and not (_bare(one, other) or _bare(other, one))


def _bare(pixels: Pixels, other: Pixels) -> bool:
    """Whether a header tells the sides of voxels only, or the other's origin without its directions."""
    mine, theirs = _affine_of_file(pixels), _affine_of_file(other)
    sides, others = (np.sqrt((affine[:3, :3] ** 2).sum(axis=0)) for affine in (mine, theirs))
    if np.abs(np.abs(np.diag(mine)[:3]) - sides).max() > 1e-3 * sides.max():
        return False
    handed_on = np.allclose(mine[:3, 3], theirs[:3, 3], atol=1e-3) and np.allclose(sides, others, rtol=1e-3)
    return handed_on or bool(np.abs(mine[:3, 3]).max() < 1e-3)


def _file_order(pixels: Pixels) -> np.ndarray:
    """The first frame as its file holds it, (I, J, K); of a picture x, y and a depth of 1."""
    return geometry.from_canonical(pixels.voxels[0], _affine_of_file(pixels))


def _as_in_file(scan: Pixels, other: Pixels) -> np.ndarray | None:
    """The voxels of a file turned as those of the scan's were, (D, H, W); None if the shapes differ."""
    held = _file_order(other)
    if held.shape != _file_order(scan).shape:
        return None
    return geometry.to_canonical(held, _affine_of_file(scan))[0]


def _affine_of_file(pixels: Pixels) -> np.ndarray:
    # What has no affine was taken as it is: x along W, y along H.
    return np.eye(4) if pixels.original_affine is None else pixels.original_affine


def _corners(pixels: Pixels) -> np.ndarray:
    """The eight outer corners of a grid in mm, (8, 3)."""
    ends = [(-0.5, n - 0.5) for n in pixels.voxels.shape[1:]]
    at = np.stack(np.meshgrid(*ends, indexing="ij"), axis=-1).reshape(-1, 3)
    return at @ pixels.affine[:3, :3].T + pixels.affine[:3, 3]


def _apart(scan: Pixels, other: Pixels) -> float:
    """How far the corners of two grids are from each other along any axis, in voxels of the scan."""
    gaps = (_corners(other) - _corners(scan)) @ np.linalg.inv(scan.affine[:3, :3]).T
    return float(np.abs(gaps).max())


def _same_field(scan: Pixels, other: Pixels) -> bool:
    """Whether two grids cover the same space, to within one and a half of the larger voxels."""
    gaps = np.abs(_corners(other) - _corners(scan)).max()
    return bool(gaps <= 1.5 * max(*scan.spacing, *other.spacing))


def _labelled(labels: np.ndarray, pixels: Pixels) -> float:
    """What is labelled on a grid, in cubic mm."""
    return float(np.count_nonzero(labels) * np.prod(pixels.spacing))
