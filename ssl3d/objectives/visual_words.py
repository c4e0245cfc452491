"""Visual words: the same place in the bodies of people who look alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.data.preparation.progress import Progress
from ssl3d.distributed import gather, rank, world_size
from ssl3d.errors import DataError
from ssl3d.rng import numpy_rng

if TYPE_CHECKING:
    from ssl3d.data.store.volume import Volume

_GOLDEN = 1.2207440846057596  # x⁴ = x + 1: three-dimensional golden ratio
_MOST_FITTED = 1024  # volumes that the principal components are taken from


class Likeness(NamedTuple):
    """References of words and the volumes like them, the same on every rank.

    Attributes:
        references: Position in `volumes` of each word's reference, (K,) int64.
        alike: Whether each volume is among the nearest to each reference, (N, K) booleans.
    """

    references: Tensor
    alike: Tensor


def word_places(words: int, seed: int = 0) -> np.ndarray:
    """Place words, (K, 3) in [0, 1), relative to a box: evenly spread, in no order along any axis.

    The additive recurrence with the three-dimensional golden ratio: no two places of it are close, and
    more words leave the first ones where they are.

    Example:
        >>> word_places(44).shape, bool((word_places(8) == word_places(44)[:8]).all())
        ((44, 3), True)
    """
    steps = (1 / _GOLDEN) ** np.arange(1, 4)
    shift = numpy_rng("words", seed).uniform(size=3)
    return (shift + np.arange(words)[:, None] * steps) % 1.0


def find_alike(
    volumes: Sequence[Volume],
    words: int,
    share: float,
    seed: int = 0,
    side: int = 12,
    features: int = 32,
    device: torch.device | str = "cpu",
) -> Likeness:
    """Draw a reference volume for every word, and find the volumes that look most like it.

    Volumes are compared by the principal components of thumbnails of their foreground. Every rank reads
    its share of the volumes and must call it. Nothing depends on the number of ranks. A volume that
    cannot be read is like no other.

    Args:
        volumes: Volumes to compare, N of them.
        words: Number K of words.
        share: Share of the volumes that count as alike, 0 to 1; at least two do.
        seed: Seed of the draw of references.
        side: Side of the thumbnails, in voxels.
        features: Number of principal components.
        device: Device of collectives, where there are several ranks.

    Raises:
        DataError: Fewer than two volumes can be read.
    """
    small = _thumbnails(volumes, side, torch.device(device))
    readable = small.isfinite().all(1).nonzero()[:, 0]
    if len(readable) < 2:
        raise DataError(
            f"visual words: {len(readable)} of {len(volumes)} volumes can be read; 2 are needed"
        )
    compared = principal_features(small[readable], features)
    drawn = numpy_rng("references", seed).permutation(len(readable))
    references = torch.from_numpy(np.resize(drawn, words))  # no volume twice, as long as there are others
    count = min(max(2, round(share * len(readable))), len(readable))
    distance = torch.cdist(compared[references], compared, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.argsort(dim=1, stable=True)[:, :count]
    alike = torch.zeros(len(volumes), words, dtype=torch.bool)
    alike[readable[nearest].T, torch.arange(words)] = True
    # Ranks may be machines that round differently, and near ties fall either way: rank 0 decides.
    table = torch.cat([readable[references], alike.flatten().long()]).to(device)
    if world_size() > 1:
        torch.distributed.broadcast(table, 0)
    table = table.cpu()
    return Likeness(table[:words], table[words:].view_as(alike).bool())


def principal_features(x: Tensor, count: int) -> Tensor:
    """Project (N, F) on up to `count` principal components, in float64.

    The projections are what a linear auto-encoder of that width encodes, found in closed form, from 1024
    rows at most, evenly spaced.
    """
    x = x.double()
    some = x[torch.arange(min(len(x), _MOST_FITTED)) * len(x) // min(len(x), _MOST_FITTED)]
    mean = some.mean(0)
    some = some - mean
    values, vectors = torch.linalg.eigh(some @ some.T)  # rising
    kept = values > 1e-9 * values[-1].clamp_min(1e-300)
    kept[:-count] = False
    if not kept.any():  # all alike
        return x.new_zeros(len(x), 1)
    return (x - mean) @ (some.T @ (vectors[:, kept] / values[kept].sqrt()))


def thumbnail(volume: Volume, side: int = 12) -> Tensor:
    """Shrink a volume's foreground box to `side` voxels along every axis, standardised: (C x side³,).

    Read slab by slab, so that large volumes take little memory.

    Raises:
        DataError: The volume cannot be read.
    """
    low, high = volume.foreground_box()
    extent = [b - a for a, b in zip(low, high, strict=True)]
    edges = np.linspace(low[0], high[0], side + 1)
    slabs = []
    for n in range(side):
        first = min(int(edges[n]), high[0] - 1)
        depth = max(int(np.ceil(edges[n + 1] - 1e-9)) - first, 1)
        slab = volume.read((first, low[1], low[2]), (depth, extent[1], extent[2]))
        slabs.append(F.adaptive_avg_pool2d(slab.mean(1), side))
    small = torch.stack(slabs, 1).flatten()
    deviation = torch.linalg.vector_norm(small - small.mean()) / len(small) ** 0.5
    return (small - small.mean()) / deviation.clamp_min(1e-6)


def _thumbnails(volumes: Sequence[Volume], side: int, device: torch.device) -> Tensor:
    """Make thumbnails of all volumes, (N, C x side³), NaN where one cannot be read."""
    world, length = world_size(), volumes[0].shape[0] * side**3
    own = range(rank(), len(volumes), world)
    small = torch.full((len(own), length), float("nan"))
    bar, began = Progress(len(own) if rank() == 0 else 0), time.perf_counter()
    for row, position in enumerate(own):
        try:
            small[row] = thumbnail(volumes[position], side)
        except (DataError, OSError):
            continue  # its turn to be named comes when a crop is drawn from it
        finally:
            bar.show(row + 1, time.perf_counter() - began)
    bar.clear()
    if world == 1:
        return small
    counts = [len(range(r, len(volumes), world)) for r in range(world)]
    gathered = gather(small.to(device), counts).cpu()
    order = torch.cat([torch.arange(r, len(volumes), world) for r in range(world)])
    everything = torch.empty_like(gathered)
    everything[order] = gathered
    return everything
