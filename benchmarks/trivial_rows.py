"""The rows without a network: volume alone, seventeen shape features, pooled voxels, smoothed intensities.

A network that does not beat them has learnt nothing that the outline or the grey values do not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from ssl3d.api import Volume

Array = NDArray[Any]

VERSION = 1
"""Version of the features, part of the digests of trivial rows; raised when a feature changes."""

TRIVIAL = ("volume only", "shape features", "pooled voxels")
"""Names of the trivial rows of tasks that have one target per volume."""

TRUE_MASKS = "computed from the true masks"
"""Words for a row that reads the masks of the test volumes, which no encoder sees."""

FEATURES = (
    "log volume",
    "log surface",
    "sphericity",
    "log extent D",
    "log extent H",
    "log extent W",
    "share of the bounding box",
    "log axis 1",
    "log axis 2",
    "log axis 3",
    "elongation",
    "flatness",
    "solidity",
    "greatest thickness",
    "mean thickness",
    "log components",
    "share of the largest component",
)

_POOLED = 7


def reads_true_masks(contestant: Mapping[str, Any]) -> bool:
    """Return whether a record's contestant reads the true masks of the test volumes."""
    return bool(contestant.get("mask_classes"))


def trivial_features(name: str, volume: Volume, classes: Sequence[int] = (), deep: bool = False) -> Array:
    """Compute the features of a volume for one trivial row, (n,).

    Args:
        name: Name of the row, one of `TRIVIAL`.
        volume: Volume, which is read whole.
        classes: Mask values to measure, each on its own; without any, the voxels above Otsu's threshold.
        deep: Whether some volume of the data has several slices.
    """
    if name == "pooled voxels":
        return pooled_voxels(volume.read(), deep)
    objects = [volume.read_mask().numpy() == k for k in classes] or [bright(volume.read())]
    if name == "volume only":
        return np.array([_log(mask.sum() * np.prod(volume.spacing)) for mask in objects])
    return np.concatenate([shape_features(mask, volume.spacing) for mask in objects])


def pooled_voxels(image: Tensor, deep: bool = False) -> Array:
    """Average a volume over a grid of at most 7 x 7 x 7 boxes, per channel; (C x cells,).

    Args:
        image: Volume (C, D, H, W).
        deep: Whether a volume of one slice has as many boxes as others, each slice of them the same.
    """
    import torch.nn.functional as F

    from ssl3d.api import fit_size

    # One length for every volume, whatever its shape (where all are images, they have depth 1).
    size = (_POOLED, _POOLED, _POOLED)
    size = size if deep else fit_size(image, size)
    return F.adaptive_avg_pool3d(image[None], size).numpy().ravel().astype(np.float64)


def bright(image: Tensor) -> Array:
    """Return the voxels (D, H, W) above Otsu's threshold in the first channel."""
    values = image[0].numpy().astype(np.float64)
    if values.min() == values.max():
        return np.zeros(values.shape, dtype=bool)
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    between = np.nan_to_num(below * above * apart**2)
    # Of a binary volume every threshold in the gap is equally good; the middle one is taken.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return values > edges[1 + int(best[len(best) // 2])]


def shape_features(mask: Array, spacing: Sequence[float]) -> Array:
    """Compute the `FEATURES` of an object (D, H, W) with voxels of `spacing` mm; zeros if it is empty."""
    from scipy import ndimage

    values = np.zeros(len(FEATURES))
    points = np.argwhere(mask)
    if not len(points):
        return values
    step = np.asarray(spacing, dtype=np.float64)
    low, high = points.min(axis=0), points.max(axis=0) + 1
    # With a rim, so that the object has a surface where it touches the volume's edge.
    object_ = np.pad(mask[tuple(map(slice, low, high))], 1)
    volume = len(points) * step.prod()
    surface = sum(
        np.count_nonzero(np.diff(object_.astype(np.int8), axis=axis)) * step.prod() / step[axis]
        for axis in range(3)
    )
    extents = (high - low) * step
    # The covariance of a cloud of boxes: that of their centres, plus a box's own.
    covariance = np.cov((points * step).T, bias=True) + np.diag(step**2 / 12)
    axes = np.sqrt(np.linalg.eigvalsh(covariance)[::-1])
    thickness = ndimage.distance_transform_edt(object_, sampling=step)[object_]
    labels, components = ndimage.label(object_)
    sizes = np.bincount(labels.ravel())[1:]
    values[:] = [
        np.log(volume),
        np.log(surface),
        np.pi ** (1 / 3) * (6 * volume) ** (2 / 3) / surface,
        *np.log(extents),
        volume / extents.prod(),
        *np.log(axes),
        axes[1] / axes[0],
        axes[2] / axes[0],
        _solidity(np.argwhere(mask & ~ndimage.binary_erosion(mask)), len(points)),
        thickness.max(),
        thickness.mean(),
        np.log(components),
        sizes.max() / sizes.sum(),
    ]
    return values


def _solidity(points: Array, voxels: int) -> float:
    """Divide the volume of voxels by that of the convex hull of their corners (an area if flat)."""
    from scipy.spatial import ConvexHull

    wide = [axis for axis in range(3) if np.ptp(points[:, axis]) > 0]
    if not wide:
        return 1.0
    flat = points[:, wide] if len(wide) > 1 else np.c_[points[:, wide], np.zeros(len(points), dtype=int)]
    corners = np.unique(
        np.concatenate([flat + shift for shift in np.ndindex(*[2] * flat.shape[1])]), axis=0
    )
    return float(voxels / ConvexHull(corners).volume)


def intensity_maps(image: Tensor) -> Tensor:
    """Return the features of the dense probe's trivial row: intensities and positions, (F, D, H, W).

    They are, per channel, the intensity and its Gaussian means of 1, 2 and 4 voxels; then the three
    coordinates in [-1, 1], their squares and products.
    """
    import torch
    from scipy import ndimage

    maps = []
    for channel in image.numpy():
        maps.append(channel)
        maps += [ndimage.gaussian_filter(channel, sigma, mode="nearest") for sigma in (1, 2, 4)]
    grid = np.meshgrid(
        *[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in image.shape[1:]], indexing="ij"
    )
    maps += grid
    maps += [grid[a] * grid[b] for a in range(3) for b in range(a, 3)]
    return torch.from_numpy(np.stack(maps).astype(np.float32))


def _log(value: float) -> float:
    return float(np.log(max(value, 1e-6)))
