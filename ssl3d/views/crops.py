"""Where crops, pairs of crops and slabs come from: the foreground map, without reading the volume."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ssl3d.errors import DataError

if TYPE_CHECKING:
    from ssl3d.data.store.volume import Volume

Triple = tuple[int, int, int]
AXES = "DHW"

_TRIES = 16  # candidates per round of rejection
_ROUNDS = 4


def fit_size(image: Volume | Tensor, size: Sequence[int]) -> Triple:
    """Return the size (D, H, W) of crops of a volume, or of a batch of its crops: an image keeps depth 1.

    Only the depth follows the image: along H and W a crop has the size asked for, and what an image lacks
    there is padded. No margin is read along a depth of 1 (`view_margin`), so a batch of crops of images has
    depth 1 as its volumes have, and `draw` and `forward` agree on the size.

    Args:
        image: A volume (C, D, H, W), or a tensor whose last three axes are D, H and W.
        size: Size asked for, (D, H, W), voxels.

    Example:
        >>> import torch
        >>> fit_size(torch.zeros(4, 1, 1, 200, 200), (16, 96, 96))
        (1, 96, 96)
        >>> fit_size(torch.zeros(4, 1, 30, 200, 200), (16, 96, 96))
        (16, 96, 96)
    """
    depth, height, width = size
    return (1 if image.shape[-3] == 1 else depth, height, width)


def draw_crop(
    volume: Volume,
    size: Sequence[int],
    rng: np.random.Generator,
    min_foreground: float = 0.1,
    fixed: Mapping[int, int] | None = None,
) -> Triple:
    """Draw the start (D, H, W) of a crop, uniformly among those with enough foreground.

    Foreground is estimated from the volume's occupancy map, as if even within each block. No crop has a
    voxel to be ignored at its centre (`Volume.read_ignored`). A volume
    smaller than the crop along an axis is put in its middle: the start is negative there, and `read`
    fills the rest with background. Where too few crops qualify to be met by chance, one is taken from a
    grid of starts, and where none does, the fullest of the grid.

    Args:
        volume: Volume to crop; only its shape and occupancy map are looked at.
        size: Size (D, H, W) of the crop, in voxels.
        rng: Generator of all randomness.
        min_foreground: Least share of foreground among the crop's voxels that lie in the volume.
        fixed: Starts that are given already, by axis 0 to 2.

    Raises:
        DataError: The volume has no foreground at all, or every crop has a voxel to be ignored at its
            centre.
    """
    low, high = start_range(volume, size, fixed)
    return _draw(volume, size, low, high, rng, min_foreground)


def draw_overlapping(
    volume: Volume,
    size: Sequence[int],
    start: Sequence[int],
    rng: np.random.Generator,
    min_overlap: float = 0.5,
    min_iou: float = 0.0,
    min_foreground: float = 0.1,
    fixed: Mapping[int, int] | None = None,
) -> Triple:
    """Draw the start (D, H, W) of a second crop that overlaps the one at `start`.

    Uniform among the starts that share at least `min_overlap` of the crop's length along every axis
    (nnssl asks 0.5) and `min_iou` of the joint volume (Medical-SSL asks 0.25) and have enough foreground.
    Where chance finds none, the first crop is taken again. Axes that are `fixed` count as if shared.

    Raises:
        DataError: The volume has no foreground at all.
    """
    low, high = start_range(volume, size, fixed)
    length, near = np.asarray(size), np.array(start)
    for axis, at in (fixed or {}).items():
        near[axis] = at  # what is given is not asked to overlap
    reach = np.floor((1 - min_overlap) * length + 1e-6).astype(int)
    low, high = np.maximum(low, near - reach), np.minimum(high, near + reach)

    def enough_iou(starts: np.ndarray) -> np.ndarray:
        shared = np.prod(np.maximum(length - np.abs(starts - near), 0), axis=1)
        return shared / (2 * np.prod(length) - shared) >= min_iou - 1e-9

    return _draw(volume, size, low, high, rng, min_foreground, enough_iou, to_triple(near))


def draw_positions(
    volume: Volume,
    axis: int,
    count: int,
    rng: np.random.Generator,
    slab: int = 1,
    min_gap_mm: float = 0.0,
    min_foreground: float = 0.1,
) -> np.ndarray:
    """Draw where `count` slabs start along an axis: increasing, apart, each with something to see.

    Uniform among all sets of positions whose neighbours are at least `min_gap_mm` apart, and whose
    slabs do not overlap (a shared slice would give their order away).

    Args:
        volume: Volume to draw from; only its shape, spacing and occupancy map are looked at.
        axis: Axis 0 to 2, for D, H, W.
        count: Number of slabs.
        rng: Generator of all randomness.
        slab: Adjacent slices in a slab.
        min_gap_mm: Least distance between the starts of neighbouring slabs, in mm.
        min_foreground: Least foreground of a slab, as a share of that of the fullest slab.

    Returns:
        Starts along `axis`, (count,) int64, increasing. A volume thinner than one slab has a single
        position, which may be negative: it is padded evenly.

    Raises:
        DataError: There is no foreground, or too little room for so many slabs.
    """
    step = max(slab, int(np.ceil(min_gap_mm / volume.spacing[axis] - 1e-6)), 1)
    allowed = _allowed_positions(volume, axis, slab, min_foreground)
    # ways[k, i]: sets of k + 1 positions, the last of them allowed[i]; scaled, or 512 choose 64 overflows.
    ways = np.ones((count, len(allowed)))
    before = np.searchsorted(allowed, allowed - step, side="right")  # how many may come before each
    for k in range(1, count):
        total = np.concatenate([[0.0], np.cumsum(ways[k - 1])])
        ways[k] = total[before]
        ways[k] /= max(ways[k].max(), 1.0)
    if not ways[-1].sum():
        room = (allowed[-1] - allowed[0]) * volume.spacing[axis]
        raise DataError(
            f"{volume.id}: {count} slabs of {slab} slices, {step * volume.spacing[axis]:g} mm apart along "
            f"{AXES[axis]}, need {(count - 1) * step * volume.spacing[axis]:g} mm and the foreground has "
            f"{room:g} mm; ask for fewer slabs or a smaller gap"
        )
    chosen, end = [], len(allowed)
    for k in range(count - 1, -1, -1):
        weights = ways[k, :end]
        index = int(rng.choice(end, p=weights / weights.sum()))
        chosen.append(allowed[index])
        end = int(before[index])
    return np.asarray(chosen[::-1], dtype=np.int64)


def foreground_shares(volume: Volume, starts: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Estimate the share of foreground, (N,), in the crops of one size at `starts` (N, 3).

    Raises:
        DataError: The volume has no foreground at all.
    """
    return _Occupancy(volume).shares(np.asarray(starts), size)


def centres_ignored(volume: Volume, starts: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Tell which crops of one size at `starts` (N, 3) have a voxel to be ignored at their centre: (N,)."""
    if not volume.has_ignored:
        return np.zeros(len(starts), bool)
    centres = np.asarray(starts) + np.asarray(size) // 2
    centres = np.clip(centres, 0, np.asarray(volume.shape[1:]) - 1)  # of a volume smaller than the crop
    return np.array([bool(volume.read_ignored(at.tolist(), (1, 1, 1))) for at in centres], bool)


def neighbour_position(
    volume: Volume,
    axis: int,
    position: int,
    rng: np.random.Generator,
    slab: int = 1,
    max_distance_mm: float = 0.0,
    min_foreground: float = 0.1,
) -> int:
    """Draw the start of a slab within `max_distance_mm` of another, uniformly; 0 gives it again."""
    reach = int(max_distance_mm / volume.spacing[axis] + 1e-6)
    allowed = _allowed_positions(volume, axis, slab, min_foreground)
    near = allowed[np.abs(allowed - position) <= reach]
    return int(rng.choice(near)) if len(near) else position


def slab_size(axis: int, slab: int, in_plane: Sequence[int]) -> Triple:
    """Return the size (D, H, W) of a slab across `axis`, from its slices and its other two sides.

    Example:
        >>> slab_size(1, 3, (64, 48))
        (64, 3, 48)
    """
    size = [int(n) for n in in_plane]
    size.insert(axis, slab)
    return (size[0], size[1], size[2])


def read_crop(volume: Volume, start: Sequence[int], size: Sequence[int], margin: Sequence[int]) -> Tensor:
    """Read a crop with `margin` more voxels on every side: (C, D + 2 margin, ...), float32.

    The margin is what an affine transform on the device needs to turn the crop without empty corners.
    """
    return volume.read(
        tuple(int(s) - m for s, m in zip(start, margin, strict=True)),
        tuple(int(n) + 2 * m for n, m in zip(size, margin, strict=True)),
    )


def read_slab(volume: Volume, axis: int, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Read a slab across `axis` and lay it flat: (C, slab, h, w), float32.

    `start` and `size` are in the volume's (D, H, W); the axis becomes the slab's depth and the other two
    keep their order. `lay_flat` does the same to a spacing.
    """
    return volume.read(tuple(int(s) for s in start), tuple(int(n) for n in size)).movedim(axis + 1, 1)


def lay_flat(triple: Sequence[float], axis: int) -> tuple[float, float, float]:
    """Order a triple (D, H, W) as a slab read across `axis` has it: that axis, then the other two.

    Example:
        >>> lay_flat((5.0, 1.0, 2.0), axis=2)
        (2.0, 5.0, 1.0)
    """
    rest = [value for i, value in enumerate(triple) if i != axis]
    return (triple[axis], rest[0], rest[1])


class _Occupancy:
    """Coarse map of a volume's foreground, as voxels per block."""

    def __init__(self, volume: Volume) -> None:
        share = np.asarray(volume.foreground(), dtype=np.float64)
        self.shape = volume.shape[1:]
        self.edges = [
            np.minimum(np.arange(blocks + 1) * side, length)
            for blocks, side, length in zip(share.shape, volume.block, self.shape, strict=True)
        ]
        extents = [np.diff(edges) for edges in self.edges]
        self.voxels = share * extents[0][:, None, None] * extents[1][:, None] * extents[2]
        if not self.voxels.any():
            raise DataError(f"{volume.id}: has no foreground to draw a crop from")

    def covered(self, axis: int, starts: np.ndarray, size: int) -> np.ndarray:
        """Measure the share of each block's extent within [start, start + size): (starts, blocks)."""
        edges = self.edges[axis]
        stops = np.minimum(starts[:, None] + size, edges[1:])
        inside = np.maximum(stops - np.maximum(starts[:, None], edges[:-1]), 0)
        return inside / np.maximum(np.diff(edges), 1)

    def full(self, size: Sequence[int]) -> int:
        """Count the voxels of a crop that can lie inside the volume."""
        return int(np.prod([min(a, b) for a, b in zip(size, self.shape, strict=True)]))

    def shares(self, starts: np.ndarray, size: Sequence[int]) -> np.ndarray:
        """Estimate the share of foreground in crops at `starts` (N, 3): (N,)."""
        d, h, w = (self.covered(axis, starts[:, axis], size[axis]) for axis in range(3))
        per_row = np.tensordot(self.voxels, w, (2, 1))
        return np.einsum("ijn,nj,ni->n", per_row, h, d) / self.full(size)

    def grid(self, axes: Sequence[np.ndarray], size: Sequence[int]) -> np.ndarray:
        """Estimate the share of foreground in the crops at every combination of starts per axis."""
        held = self.voxels
        for axis in range(3):
            held = np.tensordot(held, self.covered(axis, axes[axis], size[axis]), (0, 1))
        return held / self.full(size)


def start_range(
    volume: Volume, size: Sequence[int], fixed: Mapping[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last start of a crop along every axis."""
    room = np.asarray(volume.shape[1:]) - np.asarray(size)
    low = np.where(room < 0, -((-room) // 2), 0)
    high = np.where(room < 0, low, room)
    for axis, start in (fixed or {}).items():
        low[axis] = high[axis] = start
    return low, high


def _draw(
    volume: Volume,
    size: Sequence[int],
    low: np.ndarray,
    high: np.ndarray,
    rng: np.random.Generator,
    min_foreground: float,
    condition: Callable[[np.ndarray], np.ndarray] | None = None,
    otherwise: Triple | None = None,
) -> Triple:
    occupancy = _Occupancy(volume)

    def qualify(starts: np.ndarray, shares: np.ndarray) -> np.ndarray:
        enough = shares >= min_foreground - 1e-9
        return enough if condition is None else enough & condition(starts)

    for _ in range(_ROUNDS):
        starts = rng.integers(low, high + 1, size=(_TRIES, 3))
        good = np.flatnonzero(qualify(starts, occupancy.shares(starts, size)))
        good = good[~centres_ignored(volume, starts[good], size)]
        if len(good):
            return to_triple(starts[good[0]])
    if otherwise is not None:
        return otherwise
    axes = [
        np.unique(np.linspace(a, b, 2 * len(edges)).round().astype(int))
        for a, b, edges in zip(low, high, occupancy.edges, strict=True)
    ]
    shares = occupancy.grid(axes, size)
    starts, shares = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3), shares.reshape(-1)
    if volume.has_ignored:
        counted = ~centres_ignored(volume, starts, size)
        if not counted.any():
            raise DataError(
                f"{volume.id}: every crop of {tuple(size)} has a voxel to be ignored at its centre"
            )
        starts, shares = starts[counted], shares[counted]
    good = np.flatnonzero(qualify(starts, shares))
    return to_triple(starts[rng.choice(good) if len(good) else shares.argmax()])


def _allowed_positions(volume: Volume, axis: int, slab: int, min_foreground: float) -> np.ndarray:
    occupancy = _Occupancy(volume)
    length = occupancy.shape[axis]
    if slab >= length:
        return np.asarray([-((slab - length) // 2)])
    starts = np.arange(length - slab + 1)
    others = tuple(i for i in range(3) if i != axis)
    held = occupancy.covered(axis, starts, slab) @ occupancy.voxels.sum(axis=others)
    return starts[(held > 0) & (held >= min_foreground * held.max() - 1e-9)]


def to_triple(start: np.ndarray) -> Triple:
    """Convert an array of three numbers to a triple of int."""
    return (int(start[0]), int(start[1]), int(start[2]))
