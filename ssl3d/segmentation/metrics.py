"""Scores of one segmented volume: Dice, 95th percentile of the surface distance, surface Dice; in mm.

By SciPy's distance transforms: the packages that have these scores either need more than the rest of
this one together or are no longer kept up. The tests hold them against MONAI's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Box = tuple[slice, ...]


class MaskScores(NamedTuple):
    """Scores of one class of one volume; see `mask_scores` for empty masks.

    Attributes:
        dice: Dice, 2 |A and B| / (|A| + |B|).
        hd95: Larger of the two directed 95th percentiles of the distance between surfaces, in mm.
        surface_dice: Share of both surfaces that lies within the tolerance of the other.
    """

    dice: float | None
    hd95: float | None
    surface_dice: float | None


def mask_scores(
    predicted: Array, truth: Array, spacing: Sequence[float], tolerance: float | None = None
) -> MaskScores:
    """Score a predicted mask against the true one.

    The surface of a mask is its voxels that have one of their six neighbours outside it, or lie at the
    edge of the volume; distances are between their centres (as MONAI's `compute_hausdorff_distance` and
    `compute_surface_dice`, without sub-voxels). Nikolov et al., arXiv 1809.04430, weigh them by area.
    Of an image (D = 1) it is the contour, by four neighbours, and the side along D counts nowhere.

    Conventions: both masks empty: all None, neither right nor wrong. One of them empty: Dice and surface
    Dice 0, and HD95 the diagonal of the volume, the worst that could be.

    Args:
        predicted: Predicted mask (D, H, W), bool.
        truth: True mask (D, H, W), bool.
        spacing: Voxel sides along D, H, W in mm.
        tolerance: Tolerance of the surface Dice in mm; None for 1 mm, or the largest voxel side where that
            is more: a surface cannot be placed more exactly.

    Example:
        >>> truth = np.zeros((4, 4, 4), dtype=bool)
        >>> truth[1:3] = True
        >>> mask_scores(np.roll(truth, 1, axis=0), truth, spacing=(2, 1, 1))
        MaskScores(dice=0.5, hd95=2.0, surface_dice=1.0)
    """
    predicted, truth = np.asarray(predicted, dtype=bool), np.asarray(truth, dtype=bool)
    if predicted.shape != truth.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {truth.shape}")
    size = int(predicted.sum()) + int(truth.sum())
    if size == 0:
        return MaskScores(None, None, None)
    if not (predicted.any() and truth.any()):
        sides = [n * s for n, s in zip(truth.shape, spacing, strict=True)]
        return MaskScores(0.0, float(np.linalg.norm(sides[len(truth) == 1 :])), 0.0)
    dice = 2 * int((predicted & truth).sum()) / size
    there, back = surface_distances(predicted, truth, spacing)
    allowed = max(1.0, *spacing[len(truth) == 1 :]) if tolerance is None else tolerance
    within = int((there <= allowed + 1e-6).sum()) + int((back <= allowed + 1e-6).sum())
    hd95 = max(float(np.percentile(there, 95)), float(np.percentile(back, 95)))
    return MaskScores(dice, hd95, within / (len(there) + len(back)))


def surface_distances(first: Array, second: Array, spacing: Sequence[float]) -> tuple[Array, Array]:
    """Measure the distance in mm of each surface voxel of one mask to the other's surface, both ways.

    Args:
        first: Mask (D, H, W), bool, not empty.
        second: Another mask of the same shape, not empty.
        spacing: Voxel sides along D, H, W in mm.
    """
    from scipy import ndimage

    box = _around(first | second)  # what lies outside it is nearer to nothing
    surfaces = [_surface(mask[box], flat=len(mask) == 1) for mask in (first, second)]
    there, back = (
        ndimage.distance_transform_edt(~surfaces[1 - n], sampling=spacing)[surfaces[n]] for n in (0, 1)
    )
    return there, back


def _surface(mask: Array, flat: bool) -> Array:
    from scipy import ndimage

    inside = np.pad(mask, 1)
    neighbours = ndimage.generate_binary_structure(3, 1)
    if flat:  # above and below an image there is nothing that could be outside
        neighbours[[0, 2]] = False
    surface = inside & ~ndimage.binary_erosion(inside, neighbours)
    return surface[1:-1, 1:-1, 1:-1]


def _around(mask: Array) -> Box:
    cut = []
    for axis in range(3):
        where = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        cut.append(slice(int(where[0]), int(where[-1]) + 1))
    return tuple(cut)
