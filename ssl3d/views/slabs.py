"""Slabs of a volume, whole or cropped in plane: what proxies draw that compare slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssl3d.views.compose import Views, view_margin
from ssl3d.views.crops import AXES, Triple, draw_crop, lay_flat, read_slab, slab_size
from ssl3d.views.outside import apply_torchio, check_in_plane

if TYPE_CHECKING:
    from ssl3d.data.store.volume import Volume


@dataclasses.dataclass
class SlabViews(Views):
    """Options of proxies that show slabs of a volume, which move in plane alone.

    Attributes:
        slab: Adjacent slices per slab. 1 suits the convolution kinds acs and 2.5d; a 3d or p3d encoder
            needs slabs deeper than its stride along D.
        axis: Axis the slabs are cut across; D runs from inferior to superior.
        crop: In-plane size (height, width) of the slabs, in voxels; smaller volumes are padded evenly.
        field: Part of a larger slice that is seen: whole shrinks all of it to the crop's size, keeping its
            proportions; crop cuts a place of that size out of it, at full resolution, the same for all
            slices of a volume. Where a crop shows too little of the body, its place cannot be told.
    """

    slab: int = 1
    axis: Literal["D", "H", "W"] = "D"
    crop: tuple[int, int] = (64, 64)
    field: Literal["whole", "crop"] = "whole"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if self.slab < 1:
            raise ValueError(f"slab is {self.slab}, must be at least 1")
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f"crop is {self.crop}, must be two positive sizes: height and width")
        check_in_plane(self.torchio)

    @property
    def size(self) -> Triple:
        """Size of a slab as it is seen, laid flat."""
        return (self.slab, *self.crop)


def draw_slabs(
    config: SlabViews, volume: Volume, positions: Sequence[int] | np.ndarray, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Cut the slabs that start at increasing positions, with the margin that augmentation in plane needs.

    All slabs of a volume have one place in plane and, of torchio, one transformation.

    Returns:
        `slabs` (S, C, slab, height, width), laid flat, and their `spacing`, (3,), mm.

    Raises:
        DataError: The volume has no foreground.
    """
    axis = AXES.index(config.axis)
    corner = None
    if config.field == "crop":
        # The crop, over the whole way from the first slab to the last, must see something.
        way = slab_size(axis, int(positions[-1] - positions[0]) + config.slab, config.crop)
        corner = draw_crop(volume, way, rng, fixed={axis: int(positions[0])})
    margin = view_margin(config, config.size, axes=(1, 2))[1:]
    slabs = torch.stack([read_field(config, volume, int(at), corner, margin) for at in positions])
    # One transformation for all: to torchio, slabs are channels of one volume.
    slabs = apply_torchio(config.torchio, slabs.flatten(0, 1), rng).view_as(slabs)
    along, high, wide = lay_flat(volume.spacing, axis)
    shrunk = _shrinkage(config, volume)
    spacing = torch.tensor((along, high * shrunk, wide * shrunk), dtype=torch.float32)
    return {"slabs": slabs, "spacing": spacing}


def read_field(
    config: SlabViews,
    volume: Volume,
    position: int,
    corner: Sequence[int] | None = None,
    margin: Sequence[int] = (0, 0),
) -> Tensor:
    """Read the slab (C, slab, height, width) at a position along the axis, laid flat.

    Args:
        config: Options of the slabs.
        volume: Volume to read from.
        position: First slice along the axis.
        corner: Place (D, H, W) where a crop starts in plane; None is the whole slice, shrunk to the crop.
        margin: Voxels to read around the crop in plane.
    """
    axis = AXES.index(config.axis)
    if corner is None:
        return _whole_slab(config, volume, position, margin)
    size = slab_size(axis, config.slab, [n + 2 * m for n, m in zip(config.crop, margin, strict=True)])
    start = np.asarray(corner) - slab_size(axis, 0, margin)
    start[axis] = position
    return read_slab(volume, axis, start.tolist(), size)


def _whole_slab(config: SlabViews, volume: Volume, position: int, margin: Sequence[int]) -> Tensor:
    axis = AXES.index(config.axis)
    start = slab_size(axis, position, (0, 0))
    _, *plane = lay_flat(volume.shape[1:], axis)
    slab = read_slab(volume, axis, start, slab_size(axis, config.slab, [int(n) for n in plane]))
    shrunk = _shrinkage(config, volume)
    if shrunk > 1:
        small = [max(1, round(n / shrunk)) for n in plane]
        slab = F.interpolate(slab, size=small, mode="bilinear", antialias=True)
    sides = [n + 2 * m for n, m in zip(config.crop, margin, strict=True)]
    empty = torch.tensor(volume.background, dtype=slab.dtype).view(-1, 1, 1, 1)
    placed = empty.expand(-1, config.slab, *sides).clone()
    top, left = ((side - n) // 2 for side, n in zip(sides, slab.shape[2:], strict=True))
    placed[:, :, top : top + slab.shape[2], left : left + slab.shape[3]] = slab
    return placed


def _shrinkage(config: SlabViews, volume: Volume) -> float:
    """Return the factor by which a whole slice shrinks to fit the crop; 1 where it fits as it is."""
    if config.field == "crop":
        return 1.0
    _, *plane = lay_flat(volume.shape[1:], AXES.index(config.axis))
    return max(1.0, *(n / side for n, side in zip(plane, config.crop, strict=True)))
