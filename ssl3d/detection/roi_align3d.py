"""RoIAlign in 3D, by trilinear sampling: no library on PyPI has one without CUDA sources of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 64_000_000  # sampled values in memory at a time


def roi_align3d(
    map_: Tensor,
    boxes: Sequence[Tensor],
    size: int | Sequence[int],
    stride: float | Sequence[float] = 1.0,
    samples: int | Sequence[int] = 2,
    centred: bool = False,
) -> Tensor:
    """Bring the features of boxes to one grid of `size` cells each (He et al., Mask R-CNN, 2017).

    Each cell is the mean of `samples` values per axis, at the middles of equal parts of the cell, read
    between the voxels of the map by trilinear interpolation; nothing is rounded. Coordinate c of a box is
    place c / stride - .5 of the map, as in `torchvision.ops.roi_align(aligned=True)`, to which this is
    equal at depth 1. A sample more than one voxel outside the map is 0; up to there the border's value
    holds.

    Args:
        map_: Feature maps (B, C, D, H, W).
        boxes: Boxes of each of the B volumes (n, 6), z1 y1 x1 z2 y2 x2 in voxels of the input; n may be 0.
        size: Number of cells along (D, H, W), or one number for all.
        stride: Stride of the map along (D, H, W).
        samples: Number of samples per cell along each axis.
        centred: Whether voxel i of the map lies on voxel i x stride of the input, its centre being
            i x stride + .5, as in the networks of this package: place (c - .5) / stride. The other rule is
            right for maps whose voxels are the means of blocks.

    Returns:
        (all boxes, C, *size), volume by volume, in single precision at least.

    Raises:
        ValueError: The map is not 5D, there are not as many lists of boxes as volumes, or sizes below 1.
    """
    if map_.ndim != 5:
        raise ValueError(f"roi_align3d takes a map (B, C, D, H, W), not {tuple(map_.shape)}")
    if len(boxes) != len(map_):
        raise ValueError(f"boxes of {len(boxes)} volumes for a map of {len(map_)}")
    cells, parts = _three(size), _three(samples)
    steps = [float(s) for s in _each(stride)]
    if min(cells) < 1 or min(parts) < 1:
        raise ValueError(f"size and samples must be at least 1, not {cells} and {parts}")
    # bfloat16 does not hold a coordinate beyond 256.
    map_ = map_.to(torch.promote_types(map_.dtype, torch.float32))
    pooled = [
        _of_one(map_[n : n + 1], own.to(map_.dtype), cells, steps, parts, centred)
        for n, own in enumerate(boxes)
    ]
    return torch.cat(pooled)


def _of_one(
    map_: Tensor, boxes: Tensor, cells: list[int], steps: list[float], parts: list[int], centred: bool
) -> Tensor:
    """Pool the boxes (n, 6) of one volume to (n, C, *cells)."""
    channels, extent = map_.shape[1], map_.shape[2:]
    if not len(boxes):
        return map_.new_zeros(0, channels, *cells)
    points = cells[0] * parts[0] * cells[1] * parts[1] * cells[2] * parts[2]
    some = max(1, _BLOCK // (points * channels))
    out = []
    for first in range(0, len(boxes), some):
        chosen = boxes[first : first + some]
        places, inside = [], []
        for axis in range(3):
            low, high = chosen[:, axis], chosen[:, 3 + axis]
            if centred:
                low, high = (low - 0.5) / steps[axis], (high - 0.5) / steps[axis]
            else:
                low, high = low / steps[axis] - 0.5, high / steps[axis] - 0.5
            count = cells[axis] * parts[axis]
            at = (torch.arange(count, device=map_.device, dtype=map_.dtype) + 0.5) / count
            place = low[:, None] + at * (high - low)[:, None]  # (n, count)
            inside.append((place >= -1) & (place <= extent[axis]))
            # From places to grid_sample's -1 ... 1; an axis of one voxel has one place.
            last = extent[axis] - 1
            places.append(place.clamp(0, last) * (2 / last) - 1 if last else torch.zeros_like(place))
        n, (d, h, w) = len(chosen), (places[0].shape[1], places[1].shape[1], places[2].shape[1])
        grid = torch.stack(
            [
                places[2][:, None, None, :].expand(n, d, h, w),
                places[1][:, None, :, None].expand(n, d, h, w),
                places[0][:, :, None, None].expand(n, d, h, w),
            ],
            dim=-1,
        )
        # The boxes lie one after the other along the grid's depth: one call for all.
        values = functional.grid_sample(
            map_, grid.reshape(1, n * d, h, w, 3), mode="bilinear", align_corners=True
        ).reshape(channels, n, d, h, w)
        within = inside[0][:, :, None, None] & inside[1][:, None, :, None] & inside[2][:, None, None, :]
        values = (values * within).transpose(0, 1)
        folded = values.reshape(n, channels, cells[0], parts[0], cells[1], parts[1], cells[2], parts[2])
        out.append(folded.mean(dim=(3, 5, 7)))
    return torch.cat(out)


def _three(value: int | Sequence[int]) -> list[int]:
    numbers = [value] * 3 if isinstance(value, int) else [int(n) for n in value]
    if len(numbers) != 3:
        raise ValueError(f"expected one number or three (D, H, W), got {value}")
    return numbers


def _each(value: float | Sequence[float]) -> list[float]:
    numbers = list(value) if isinstance(value, Sequence) else [value] * 3
    if len(numbers) != 3 or min(numbers) <= 0:
        raise ValueError(f"stride must be one positive number or three (D, H, W), not {value}")
    return numbers
