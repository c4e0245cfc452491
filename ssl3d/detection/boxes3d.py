"""Boxes as tensors, in 3D (or any dimension d): overlap, coding against anchors, suppression, clusters.

Boxes are (n, 2d): lower corner, then upper corner, exclusive; z1 y1 x1 z2 y2 x2 in 3D, in voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST = math.log(1000 / 16)
"""Largest logarithm of a size ratio that `decode` takes; Faster R-CNN's."""
_BLOCK = 16_000_000  # overlaps in memory at a time


def box_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Compute the intersection over union of every pair of (n, 2d) and (m, 2d); (n, m)."""
    half = a.shape[1] // 2
    low = torch.maximum(a[:, None, :half], b[None, :, :half])
    high = torch.minimum(a[:, None, half:], b[None, :, half:])
    shared = (high - low).clamp_min(0).prod(dim=2)
    return shared / (box_volume(a)[:, None] + box_volume(b)[None] - shared).clamp_min(1e-9)


def box_volume(boxes: Tensor) -> Tensor:
    """Count the voxels in each box, (n,)."""
    half = boxes.shape[1] // 2
    return (boxes[:, half:] - boxes[:, :half]).prod(dim=1)


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Encode boxes as offsets from their anchors: (tz, ty, tx, td, th, tw) of each pair, (n, 2d).

    tz = (z - za) / da of the centres, td = log(d / da) of the sides, as Faster R-CNN has them in 2D (Ren
    et al., arXiv 1506.01497) and every 3D detector since.

    Args:
        boxes: Boxes (n, 2d).
        anchors: Anchors of the boxes (n, 2d), row by row.
        weights: Factors of the 2d offsets; 1 if None.
    """
    centre, side = _centred(boxes)
    base, base_side = _centred(anchors)
    offsets = torch.cat([(centre - base) / base_side, torch.log(side / base_side)], dim=1)
    return offsets if weights is None else offsets * offsets.new_tensor(list(weights))


def decode(offsets: Tensor, anchors: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Decode the boxes at `offsets` from their anchors, (n, 2d): the inverse of `encode`.

    A side is at most 1000 / 16 times its anchor's.
    """
    offsets = offsets.float()
    if weights is not None:
        offsets = offsets / offsets.new_tensor(list(weights))
    base, base_side = _centred(anchors.float())
    half = base.shape[1]
    centre = base + offsets[:, :half] * base_side
    side = base_side * torch.exp(offsets[:, half:].clamp(max=MOST))
    return torch.cat([centre - side / 2, centre + side / 2], dim=1)


def clip(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Cut boxes at the borders of a volume of `size` voxels."""
    end = boxes.new_tensor([*size, *size])
    return torch.minimum(boxes.clamp_min(0), end)


def nms(
    boxes: Tensor, scores: Tensor, overlap: float, groups: Tensor | None = None, most: int | None = None
) -> Tensor:
    """Select boxes by greedy non-maximum suppression, exact, in any dimension.

    In order of falling score (ties in the order given), a box stays unless it overlaps one that stays by
    more than `overlap`.

    Args:
        boxes: Boxes (n, 2d).
        scores: Scores of the boxes (n,).
        overlap: Intersection over union above which the worse of two goes.
        groups: Class or level of each box (n,); boxes of different groups never touch each other.
        most: Largest number of boxes to keep.

    Returns:
        Indices of what stays, (k,), the best first.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0, 0, 0, 4, 4, 3], [8, 8, 8, 9, 9, 9]])
        >>> nms(boxes, torch.tensor([0.9, 0.8, 0.7]), overlap=0.5)
        tensor([0, 2])
    """
    order = torch.argsort(scores, descending=True, stable=True)
    ranked = boxes[order].float()
    kinds = None if groups is None else groups[order]
    count = len(order)
    alive = torch.ones(count, dtype=torch.bool)
    kept: list[int] = []
    rows = max(1, min(count, _BLOCK // max(count, 1)))
    for first in range(0, count, rows):
        # Overlaps of some rows with all boxes after them; the greedy pass itself runs on the CPU.
        above = box_overlap(ranked[first : first + rows], ranked[first:]) > overlap
        if kinds is not None:
            above &= kinds[first : first + rows, None] == kinds[None, first:]
        above = above.cpu()
        for row in range(len(above)):
            if not alive[first + row]:
                continue
            kept.append(first + row)
            if most is not None and len(kept) >= most:
                return order[torch.tensor(kept, device=order.device)]
            alive[first:] &= ~above[row]
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]


def weighted_clusters(
    boxes: Tensor,
    scores: Tensor,
    overlap: float,
    groups: Tensor | None = None,
    expected: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the boxes that `nms` would drop, by weighted box clustering.

    Jaeger et al.: Retina U-Net, ML4H 2019, arXiv 1811.08661. Each cluster is one box that stays and all
    that overlap it by more than `overlap`; its coordinates are the mean of theirs with weights score x
    overlap, its score the weighted mean of the scores, drawn towards 0 where fewer windows saw the object
    than looked at the place.

    Args:
        boxes: Boxes (n, 2d) of all windows.
        scores: Scores of the boxes (n,).
        overlap: Intersection over union above which a box joins a cluster, as in `nms`.
        groups: Class or level of each box (n,), or None.
        expected: Number of windows that looked at each box's centre (n,); None: as many as found it.

    Returns:
        Boxes (k, 2d), scores (k,), falling, and for each cluster the index of its best box, (k,).
    """
    boxes, scores = boxes.float(), scores.float()
    left = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    merged, values, heads = [], [], []
    for head in nms(boxes, scores, overlap, groups).tolist():
        shared = box_overlap(boxes[head : head + 1], boxes)[0]
        members = left & (shared > overlap)
        if groups is not None:
            members &= groups == groups[head]
        members[head] = True
        left &= ~members
        weight = shared[members].clamp_min(1e-6) * scores[members].clamp_min(1e-9)
        merged.append((boxes[members] * weight[:, None]).sum(dim=0) / weight.sum())
        missing = 0.0 if expected is None else max(float(expected[head]) - int(members.sum()), 0.0)
        share = shared[members]
        values.append((share * scores[members]).sum() / (share.sum() + missing * share.mean()))
        heads.append(head)
    if not heads:
        return boxes, scores, torch.zeros(0, dtype=torch.long, device=boxes.device)
    means = torch.stack(values)
    order = means.argsort(descending=True, stable=True)
    return torch.stack(merged)[order], means[order], torch.tensor(heads, device=boxes.device)[order]


def _centred(boxes: Tensor) -> tuple[Tensor, Tensor]:
    half = boxes.shape[1] // 2
    low, high = boxes[:, :half], boxes[:, half:]
    return (low + high) / 2, high - low
