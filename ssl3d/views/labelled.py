"""Crops with their label map: where they are drawn from, so that rare structures are met."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, distributed

from ssl3d.data.preparation.progress import Progress
from ssl3d.distributed import rank, world_size
from ssl3d.errors import DataError
from ssl3d.rng import numpy_rng
from ssl3d.views.crops import Triple, draw_crop, read_crop, start_range, to_triple

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection
    from ssl3d.data.store.volume import Volume

_SLAB = 16  # slices of a mask that are looked at together
_KEPT = 1024  # volumes whose places a process remembers

_places: OrderedDict[tuple[str, str, int], dict[int, np.ndarray]] = OrderedDict()
_places_of = os.getpid()


def draw_labelled(
    volume: Volume,
    size: Sequence[int],
    rng: np.random.Generator,
    around: float = 0.5,
    min_foreground: float = 0.1,
) -> Triple:
    """Draw the start (D, H, W) of a crop of a volume with a mask.

    With probability `around` the crop holds a voxel of a structure: the structure is drawn from those of
    the volume, each as likely (as nnU-Net's oversampling), the voxel from its voxels, and the crop from
    all crops that hold it, so that structures are not always in the middle. The rest are `draw_crop`'s,
    and so are the crops of a volume whose mask is empty.

    Args:
        volume: Volume to crop.
        size: Size (D, H, W) of the crop; a smaller volume lies in its middle.
        rng: Generator of all randomness.
        around: Probability of a crop that holds a structure.
        min_foreground: Least share of foreground in the other crops.

    Raises:
        DataError: The volume has no mask, or no foreground.
    """
    places = mask_places(volume) if around else {}
    if rng.random() >= around or not places:
        return draw_crop(volume, size, rng, min_foreground)
    value = sorted(places)[int(rng.integers(len(places)))]
    voxel = places[value][int(rng.integers(len(places[value])))]
    low, high = start_range(volume, size, None)
    first, last = np.maximum(low, voxel - np.asarray(size) + 1), np.minimum(high, voxel)
    return to_triple(rng.integers(first, last + 1))


def read_labelled(
    volume: Volume, start: Sequence[int], size: Sequence[int], margin: Sequence[int] = (0, 0, 0)
) -> tuple[Tensor, Tensor]:
    """Read a crop and its mask, with `margin` more voxels on every side.

    Returns:
        Crop (C, D + 2 margin, ...), float32, and mask (D + 2 margin, ...), int32, 0 outside the volume.

    Raises:
        DataError: The volume has no mask.
    """
    first = tuple(int(s) - m for s, m in zip(start, margin, strict=True))
    extent = tuple(int(n) + 2 * m for n, m in zip(size, margin, strict=True))
    return read_crop(volume, start, size, margin), volume.read_mask(first, extent).to(torch.int32)


def mask_values(volume: Volume) -> np.ndarray:
    """List the values in a volume's mask, increasing, int64; read it slab by slab.

    Raises:
        DataError: The volume has no mask.
    """
    if not volume.has_mask:
        raise DataError(f"{volume.dataset}/{volume.id}: has no mask")
    stored = volume.stored("masks")  # `read_mask` widens every voxel to 8 bytes
    values = []
    for first in range(0, len(stored), _SLAB):
        with volume.place[0].reading(f"the mask of {volume.dataset}/{volume.id}"):
            flat = stored[first : first + _SLAB].reshape(-1)
        # A structure is a run of equal voxels: where runs end, every value is met, and few voxels are.
        ends = np.flatnonzero(flat[1:] != flat[:-1])
        values.append(np.unique(flat[np.append(ends, len(flat) - 1)]))
    return np.unique(np.concatenate(values)).astype(np.int64)


def dataset_labels(data: Collection) -> dict[int, np.ndarray]:
    """List the values in the masks of each data set: code of the data set -> increasing, int64.

    Every mask is read, by one of the ranks; every rank must call it. Data sets without masks are left
    out, and so are masks that cannot be read: those volumes are named when it is their turn to be drawn.
    """
    masked = np.flatnonzero(data.has_mask)[rank() :: world_size()]
    own: dict[int, set[int]] = {}
    bar, began = Progress(len(masked) if rank() == 0 else 0), time.perf_counter()
    for number, position in enumerate(masked.tolist(), start=1):
        try:
            values_here = mask_values(data[position])
        except (DataError, OSError):
            continue
        own.setdefault(int(data.dataset_codes[position]), set()).update(values_here.tolist())
        bar.show(number, time.perf_counter() - began)
    bar.clear()
    parts = [own] * world_size()
    if len(parts) > 1:
        distributed.all_gather_object(parts, own)
    joined: dict[int, set[int]] = {}
    for part in parts:
        for code, values in part.items():
            joined.setdefault(code, set()).update(values)
    return {code: np.array(sorted(values), np.int64) for code, values in sorted(joined.items())}


def mask_places(volume: Volume, most: int = 1000) -> dict[int, np.ndarray]:
    """Locate each structure of a mask: value above 0 -> voxels (n, 3), int32, at most `most` of them.

    They are all its voxels, or so many drawn at random, the same ones every time. A process remembers them.

    Raises:
        DataError: The volume has no mask.
    """
    global _places, _places_of
    if _places_of != os.getpid():  # a worker's memory is its own
        _places, _places_of = OrderedDict(), os.getpid()
    key = (volume.id, volume.record.voxels, most)
    if key in _places:
        _places.move_to_end(key)
        return _places[key]
    rng = numpy_rng("mask places", volume.dataset, volume.id)
    parts: dict[int, list[tuple[int, np.ndarray]]] = {}
    for first, slab in _slabs(volume):
        where = torch.nonzero(slab > 0)
        values = slab[tuple(where.T)].numpy()
        voxels = where.numpy().astype(np.int32) + np.array([first, 0, 0], np.int32)
        for value in np.unique(values).tolist():
            own = voxels[values == value]
            # In random order: any number of the first ones are a fair sample.
            chosen = own[rng.permutation(len(own))[:most]]
            parts.setdefault(int(value), []).append((len(own), chosen))
    places = {value: _thinned(some, most, rng) for value, some in sorted(parts.items())}
    _places[key] = places
    if len(_places) > _KEPT:
        _places.popitem(last=False)
    return places


def _thinned(parts: Sequence[tuple[int, np.ndarray]], most: int, rng: np.random.Generator) -> np.ndarray:
    """Sample at most so many of the slabs' voxels, from each slab as many as its share is."""
    counts = np.array([count for count, _ in parts])
    if counts.sum() <= most:
        return np.concatenate([chosen for _, chosen in parts])
    shares = rng.multivariate_hypergeometric(counts, most)
    return np.concatenate([chosen[:n] for n, (_, chosen) in zip(shares, parts, strict=True)])


def _slabs(volume: Volume) -> Iterator[tuple[int, Tensor]]:
    """Read a mask in slabs along D: the first slice, and (d, H, W)."""
    _, depth, height, width = volume.shape
    for first in range(0, depth, _SLAB):
        yield first, volume.read_mask((first, 0, 0), (min(_SLAB, depth - first), height, width))
