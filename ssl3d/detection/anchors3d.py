"""Anchors in 3D: at which levels of a pyramid, and of which shapes, found from the training boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ssl3d.encoder import Encoder
from ssl3d.heads.decoder import stride_path

Triple = tuple[int, int, int]
Shape = tuple[float, float, float]

_RARE = 0.02  # share of the boxes below which a level is not worth its cost


@dataclass(frozen=True)
class AnchorPlan:
    """Levels at which anchors lie, and the shapes of the anchors.

    Attributes:
        strides: Strides of the levels along (D, H, W), fine to coarse.
        shapes: Sides (D, H, W) in voxels of the anchors of each level, as many at every level.
    """

    strides: tuple[Triple, ...]
    shapes: tuple[tuple[Shape, ...], ...]

    def __post_init__(self) -> None:
        """Check that all levels have anchors, and as many."""
        if not self.strides or len(self.strides) != len(self.shapes):
            raise ValueError(f"{len(self.strides)} levels with shapes for {len(self.shapes)}")
        if len({len(level) for level in self.shapes}) != 1 or not self.shapes[0]:
            raise ValueError("every level needs as many anchor shapes as the others, one at least")

    @property
    def count(self) -> int:
        """Number of anchors in one place."""
        return len(self.shapes[0])


def plan_anchors(
    boxes: ArrayLike, encoder: Encoder, count: int = 3, cells: float = 2.0, finest: int = 2
) -> AnchorPlan:
    """Choose levels and anchor shapes for an encoder's maps from the boxes that are to be learned.

    A box belongs to the level of which it spans about `cells` cells per axis. Levels that have no boxes
    worth speaking of are left out. The shapes of a level are the means of `count` clusters of its boxes'
    sides, on a logarithmic scale; where the boxes are too much alike for that, the mean shape at a third
    of an octave from each other. So anisotropic spacing and flat objects need no setting.

    Args:
        boxes: Boxes (n, 6) of the training data alone, in voxels.
        encoder: Encoder of which only `strides` are read.
        count: Number of anchor shapes per level.
        cells: Cells that a box spans in its level. Fewer: coarser levels, less work, coarser boxes.
        finest: Least stride of a level along any axis that has a larger one in the encoder's first map;
            levels finer than that map are made by interpolation.

    Raises:
        ValueError: There is no box, or one without extent.
    """
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
    sides = corners[:, 3:] - corners[:, :3]
    if not len(sides):
        raise ValueError("anchors are planned from boxes, and there are none")
    if not (sides > 0).all():
        raise ValueError(f"box {corners[(sides <= 0).any(axis=1)][0].tolist()} has no extent")
    strides = _candidates(encoder.strides, finest)
    misfit = _misfit(sides, strides, cells)
    shares = np.bincount(misfit.argmin(axis=1), minlength=len(strides)) / len(sides)
    kept = [n for n, share in enumerate(shares) if share >= _RARE]
    level = misfit[:, kept].argmin(axis=1)
    return AnchorPlan(
        strides=tuple(strides[n] for n in kept),
        shapes=tuple(_shapes(sides[level == n], count) for n in range(len(kept))),
    )


def fit_shapes(boxes: ArrayLike, plan: AnchorPlan, cells: float = 2.0) -> Tensor:
    """Fit the anchor shapes of a plan's levels to other boxes; a level without boxes keeps its own.

    Args:
        boxes: Boxes (n, 6) of the training data alone, in voxels.
        plan: Plan whose levels stay.
        cells: Cells that a box spans in its level, as in `plan_anchors`.
    """
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 6)
    sides = corners[:, 3:] - corners[:, :3]
    sides = sides[(sides > 0).all(axis=1)]
    shapes = list(plan.shapes)
    if len(sides):
        level = _misfit(sides, plan.strides, cells).argmin(axis=1)
        for n in np.unique(level):
            shapes[n] = _shapes(sides[level == n], plan.count)
    return torch.tensor(shapes, dtype=torch.float32)


def grid_anchors(strides: Sequence[Triple], shapes: Tensor, size: Sequence[int]) -> list[Tensor]:
    """Lay the anchors of every level over an input of `size` (D, H, W), (d h w count, 6) float32 each.

    Voxel i of a map of stride s lies on voxel i x s of the input: its anchors are centred on i x s + .5.
    In the order of (d, h, w, shape).

    Args:
        strides: Strides of the levels along (D, H, W).
        shapes: Sides of the anchors (levels, count, 3), voxels.
        size: Size of the input (D, H, W).
    """
    anchors = []
    for stride, sides in zip(strides, shapes, strict=True):
        axes = [
            torch.arange(-(-n // s), dtype=torch.float32, device=shapes.device) * s + 0.5
            for n, s in zip(size, stride, strict=True)
        ]
        centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 1, 3)
        half = sides.float()[None] / 2
        anchors.append(torch.cat([centres - half, centres + half], dim=2).reshape(-1, 6))
    return anchors


def level_of(boxes: Tensor, strides: Sequence[Triple], cells: float) -> Tensor:
    """Choose the level (n,) of which each box spans about `cells` cells per axis, as in `plan_anchors`."""
    sides = (boxes[:, 3:] - boxes[:, :3]).clamp_min(1e-3)
    # As `_misfit`: the depth of boxes in images says nothing of the level.
    first = 0 if bool((sides[:, 0] > 1).any()) else 1
    spans = torch.log2(sides[:, None, first:] / (cells * sides.new_tensor(strides)[None, :, first:]))
    return spans.mean(dim=2).abs().argmin(dim=1)


def _candidates(strides: Sequence[Triple], finest: int) -> list[Triple]:
    """List the strides a level may have, fine to coarse: those of the maps, and finer steps."""
    deepest = strides[-1]
    known = {s for s in strides if all(a <= b for a, b in zip(s, deepest, strict=True))}
    first = min(known)
    end = (min(first[0], finest), min(first[1], finest), min(first[2], finest))
    finer = stride_path(first, [end]) if end != first else []
    return sorted(known | set(finer))


def _misfit(sides: np.ndarray, strides: Sequence[Triple], cells: float) -> np.ndarray:
    """Measure how many octaves each level is too fine or too coarse for a box, (boxes, levels)."""
    # In images every box is one voxel deep and says nothing of the depth.
    axes = [axis for axis in range(3) if axis or (sides[:, 0] > 1).any()]
    steps = np.array(strides, dtype=np.float64)[None][..., axes]
    octaves: np.ndarray = np.abs(np.log2(sides[:, None, axes] / (cells * steps)).mean(axis=2))
    return octaves


def _shapes(sides: np.ndarray, count: int) -> tuple[Shape, ...]:
    """Return the means of `count` clusters of (n, 3) sides, small to large."""
    logs = np.log(sides)
    order = np.argsort(logs.sum(axis=1), kind="stable")
    picks = order[((np.arange(count) + 0.5) / count * len(order)).astype(int)]
    means = logs[picks]
    for _ in range(25):
        owner = ((logs[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
        means = np.stack(
            [logs[owner == n].mean(axis=0) if (owner == n).any() else means[n] for n in range(count)]
        )
    apart = [np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]]
    if apart and min(apart) < 0.1:
        # On an axis along which no box has any extent there is nothing to vary either.
        steps = (np.arange(count) - (count - 1) / 2)[:, None] * np.log(2) / 3
        means = logs.mean(axis=0)[None] + steps * (sides > 1).any(axis=0)
    means = means[np.argsort(means.sum(axis=1), kind="stable")]
    return tuple((float(d), float(h), float(w)) for d, h, w in np.exp(means))
