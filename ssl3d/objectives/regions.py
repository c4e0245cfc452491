"""Regions of a feature map in plane, and which of them are far enough apart to be told from each other."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ssl3d.errors import UsageError
from ssl3d.on_device import constant

Place = tuple[int, int]


def region_places(sides: Place, region: int, negatives: int) -> tuple[list[Place], Tensor]:
    """Place 13 square regions in a map, and choose the negatives of each.

    Negatives are the nearest regions that do not overlap it. The places are those of Chaitanya et al.
    (NeurIPS 2020): corners, middles of the sides and centre, and the middles between the centre and the
    corners.

    Args:
        sides: Height and width of the map, in cells.
        region: Side of a region, in cells.
        negatives: Number of negatives of each region.

    Returns:
        First cells of the regions, and the numbers of the negatives of each, (13, negatives).

    Raises:
        UsageError: The map has no room for so many regions apart; the message names both numbers.

    Example:
        >>> places, negatives = region_places((24, 24), 3, 5)
        >>> places[0], places[12], negatives.shape
        ((0, 0), (15, 15), torch.Size([13, 5]))
    """
    room = [max(side - region, 0) for side in sides]
    shares = [*itertools.product((0, 2, 4), repeat=2), *itertools.product((1, 3), repeat=2)]
    places = [(room[0] * y // 4, room[1] * x // 4) for y, x in shares]
    chosen = []
    for y, x in places:
        apart = [k for k, (v, u) in enumerate(places) if max(abs(v - y), abs(u - x)) >= region]
        if len(apart) < negatives:
            raise UsageError(
                f"in a map of {sides[0]} x {sides[1]} cells {len(apart)} regions of {region} x {region} do "
                f"not overlap one of the 13, and {negatives} negatives are asked for: enlarge the crop, or "
                "take a map of a smaller stride or fewer negatives"
            )
        apart.sort(key=lambda k: ((places[k][0] - y) ** 2 + (places[k][1] - x) ** 2, k))
        chosen.append(apart[:negatives])
    return places, torch.tensor(chosen)


def regions_at(maps: Tensor, places: list[Place], region: int) -> Tensor:
    """Cut square regions out of maps.

    Args:
        maps: Maps (N, C, H, W).
        places: First cells of the A regions.
        region: Side of a region, in cells.

    Returns:
        Cells of the regions, (N, A, region x region, C).

    Example:
        >>> regions_at(torch.arange(16.0).view(1, 1, 4, 4), [(1, 2)], 2).flatten().tolist()
        [6.0, 7.0, 10.0, 11.0]
    """
    rows, columns = (constant([place[k] for place in places], maps, torch.int64) for k in (0, 1))
    windows = maps.unfold(2, region, 1).unfold(3, region, 1)
    return windows[:, :, rows, columns].flatten(3).permute(0, 2, 3, 1)
