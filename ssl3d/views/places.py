"""Two views of places that stay the same through a run, so that what was found of them holds later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ssl3d.rng import numpy_rng
from ssl3d.views.compose import view_margin
from ssl3d.views.crops import (
    AXES,
    draw_crop,
    draw_overlapping,
    draw_positions,
    lay_flat,
    neighbour_position,
    read_crop,
    slab_size,
)
from ssl3d.views.outside import apply_torchio
from ssl3d.views.pairs import PairViews, crop_size, is_sliced

if TYPE_CHECKING:
    from ssl3d.data.store.volume import Volume


def draw_places(config: PairViews, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw two views of each of a volume's `per_volume` places, with the margin that augmentation needs.

    A place is a crop, or a slice, that depends on the volume's name and the place's number only. Its
    views are drawn around it anew each time, with half the play that `draw_pairs` gives the second view
    against the first; so they overlap each other as much as those do.

    Args:
        config: Options of the views.
        volume: Volume to draw from.
        rng: Generator of the views; the places have their own.

    Returns:
        `a` and `b`, (K, C, d, h, w) each, slices laid flat, and their `spacing`, (3,), mm.

    Raises:
        DataError: The volume has no foreground, or no room for so many slabs.
    """
    if is_sliced(config, volume):
        pairs, spacing = _slices(config, volume, rng), lay_flat(volume.spacing, AXES.index(config.axis))
    else:
        pairs, spacing = _crops(config, volume, rng), volume.spacing
    a, b = ([apply_torchio(config.torchio, x, rng) for x in side] for side in zip(*pairs, strict=True))
    return {"a": torch.stack(a), "b": torch.stack(b), "spacing": torch.tensor(spacing, dtype=torch.float32)}


def _fixed(volume: Volume, *parts: object) -> np.random.Generator:
    return numpy_rng("place", volume.dataset, volume.id, *parts)


def _crops(config: PairViews, volume: Volume, rng: np.random.Generator) -> list[list[Tensor]]:
    size = crop_size(config, volume)
    margin = view_margin(config, size)
    least, share = config.min_foreground, (1 + config.min_overlap) / 2
    pairs = []
    for place in range(config.per_volume):
        at = draw_crop(volume, size, _fixed(volume, place), least)
        starts = [draw_overlapping(volume, size, at, rng, share, config.min_iou, least) for _ in range(2)]
        pairs.append([read_crop(volume, start, size, margin) for start in starts])
    return pairs


def _slices(config: PairViews, volume: Volume, rng: np.random.Generator) -> list[list[Tensor]]:
    axis = AXES.index(config.axis)
    size = slab_size(axis, config.slab, config.plane)
    margin = slab_size(axis, 0, view_margin(config, (config.slab, *config.plane), (1, 2))[1:])
    least, share = config.min_foreground, (1 + config.min_overlap) / 2
    pairs = []
    slabs = draw_positions(volume, axis, config.per_volume, _fixed(volume), config.slab)
    for place, slab in enumerate(slabs.tolist()):
        at = draw_crop(volume, size, _fixed(volume, place), least, {axis: slab})
        views = []
        for _ in range(2):
            near = neighbour_position(volume, axis, slab, rng, config.slab, config.max_distance_mm / 2)
            start = draw_overlapping(
                volume, size, at, rng, share, config.min_iou, least, fixed={axis: near}
            )
            views.append(read_crop(volume, start, size, margin).movedim(axis + 1, 1))
        pairs.append(views)
    return pairs
