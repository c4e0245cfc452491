"""Annotated slices of masks, and the places of training crops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import DataError, numpy_rng
from ssl3d_benchmarks.task import tell_lone_values

if TYPE_CHECKING:
    from ssl3d.api import Collection, Volume

Array = NDArray[Any]
Triple = tuple[int, int, int]
Box = tuple[int, int, int, int, int, int]

SLAB = 32
"""Slices of a mask read at a time, since the whole mask of a CT takes a gigabyte."""
KEPT = 1000
"""Voxels of each class that are remembered per volume, to centre crops on."""


@dataclass
class Annotation:
    """Summary of a volume's mask, which spares reading it again.

    Attributes:
        slices: Annotated slices along D, increasing; None where all are annotated.
        box: Box round all annotated objects, in voxels; None where there are none.
        places: Class index -> sample of its annotated voxels (n, 3), int16.
    """

    slices: Array | None
    box: Box | None
    places: dict[int, Array]


def refuse_regions(data: Collection) -> None:
    """Raise a DataError for masks whose structures overlap, which nnU-Net trains and scores as regions."""
    names = set(data.datasets)
    for settings in data.settings:
        for dataset, regions in (settings.get("mask_regions") or {}).items():
            if dataset in names:
                structures = ", ".join(region["name"] for region in regions)
                values = sorted({value for region in regions for value in region["values"]})
                raise DataError(
                    f"{dataset}: its structures overlap ({structures}), and --task segmentation does not "
                    "train and score regions; give --segmentation.classes 0 "
                    f"{' '.join(map(str, values))} to segment the values of the mask one by one"
                )


def mask_values(data: Collection, ignore: int | Mapping[str, int], tell: bool = False) -> tuple[int, ...]:
    """Return the sorted values in the masks, with 0 and without `ignore`.

    Args:
        data: Volumes with masks.
        ignore: Mask value of voxels without an annotation, of all volumes or by the name of the data set.
        tell: Whether to warn of values that one subject alone has.

    Raises:
        DataError: There is background only.
    """
    each: list[set[int]] = []
    for volume in data:
        own: set[int] = set()
        for _, slab in slabs(volume):
            own |= set(np.unique(slab).tolist())
        each.append(own - {ignore if isinstance(ignore, int) else ignore.get(volume.dataset, -1)})
    values = {0}.union(*each) - ({ignore} if isinstance(ignore, int) else set())
    if tell:
        tell_lone_values(data, each, ", or give --segmentation.classes or --segmentation.ignore")
    if len(values) == 1:
        raise DataError(f"the masks of all {len(data)} volumes are empty: there is nothing to segment")
    return tuple(sorted(values))


def slabs(volume: Volume) -> Any:
    """Yield the first slice and the mask (d, H, W) of one slab after the other."""
    depth, height, width = volume.shape[1:]
    for first in range(0, depth, SLAB):
        size = (min(SLAB, depth - first), height, width)
        yield first, volume.read_mask((first, 0, 0), size).numpy()


def class_table(values: Sequence[int], ignore: int) -> Array:
    """Build the table for `class_indices`: mask value -> class index, -1 for `ignore`, 0 for others."""
    table = np.zeros(2 + max(*values, ignore), np.int16)  # the last entry is for all larger values
    table[list(values)] = np.arange(len(values))
    if ignore >= 0:
        table[ignore] = -1
    return table


def class_indices(table: Array, mask: Array) -> Array:
    """Look up the class indices of mask values, int16."""
    indices: Array = table[np.clip(mask, 0, len(table) - 1)]
    return indices


def annotate(volume: Volume, table: Array, number: int, choice: str, seed: int) -> Annotation:
    """Choose the annotated slices of a volume, and note the places of its objects on them.

    Args:
        volume: Volume with a mask.
        table: Table of class indices by `class_table`.
        number: Number of annotated slices; 0 for all.
        choice: Choice of the slices: random or equidistant.
        seed: Seed of the choice, beside the name of the volume.
    """
    occupied = np.zeros(volume.shape[1], dtype=bool)
    slices: Array | None = None
    if number and volume.shape[1] > 1:
        for first, slab in slabs(volume):
            occupied[first : first + len(slab)] = (class_indices(table, slab) > 0).any(axis=(1, 2))
        slices = sparse_slices(occupied, number, choice, (seed, volume.dataset, volume.id))
    rng = numpy_rng("annotated voxels", volume.dataset, volume.id)
    voxels: dict[int, list[Array]] = {}
    counts: dict[int, list[int]] = {}
    low, high = np.full(3, 2**31), np.full(3, -1)
    for first, slab in slabs(volume):
        chosen = (
            np.arange(len(slab)) if slices is None else slices[_within(slices, first, len(slab))] - first
        )
        if not len(chosen):
            continue
        labels = class_indices(table, slab[chosen])
        for k in np.unique(labels[labels > 0]).tolist():
            at = np.argwhere(labels == k)
            at[:, 0] = chosen[at[:, 0]] + first
            low, high = np.minimum(low, at.min(axis=0)), np.maximum(high, at.max(axis=0))
            counts.setdefault(k, []).append(len(at))
            voxels.setdefault(k, []).append(at if len(at) <= KEPT else at[rng.choice(len(at), KEPT, False)])
    places = {k: _some(voxels[k], counts[k], rng) for k in voxels}
    box = None if not places else tuple(int(n) for n in (*low, *(high + 1)))
    return Annotation(slices, box, places)  # type: ignore[arg-type]


def _within(slices: Array, first: int, length: int) -> Array:
    return (slices >= first) & (slices < first + length)


def _some(parts: list[Array], counts: list[int], rng: np.random.Generator) -> Array:
    """Draw `KEPT` of the voxels kept per slab, each voxel of the volume with equal probability."""
    voxels = np.concatenate(parts)
    if len(voxels) > KEPT:
        weight = np.concatenate(
            [np.full(len(part), n / len(part)) for part, n in zip(parts, counts, strict=True)]
        )
        voxels = voxels[rng.choice(len(voxels), KEPT, replace=False, p=weight / weight.sum())]
    return voxels.astype(np.int16)


def sparse_slices(occupied: Array, number: int, choice: str, seed: Sequence[object]) -> Array:
    """Choose the slices along D that an annotator with time for a few would have drawn.

    The slices of a smaller number are among those of a larger one. `random` draws them among the slices
    that hold an object; `equidistant` takes the middle, quarters and eighths of these. When all of these
    are taken, the nearest others follow. In a volume without any object all slices count alike.

    Args:
        occupied: Mask (D,) of the slices that hold an object.
        number: Number of slices to choose, at most all of them.
        choice: Choice of the slices: random or equidistant.
        seed: Seed of the volume.

    Returns:
        (min(number, D),) int64, increasing.
    """
    candidates = np.flatnonzero(occupied) if occupied.any() else np.arange(len(occupied))
    rng = numpy_rng("sparse slices", *seed)
    if choice == "random":
        order = rng.permutation(candidates)
    else:
        order, taken = np.zeros(0, np.int64), np.zeros(len(candidates), dtype=bool)
        for n in range(1, 4 * len(candidates) + 1):
            index = min(int(_halving(n) * len(candidates)), len(candidates) - 1)
            if not taken[index]:
                taken[index], order = True, np.append(order, candidates[index])
        order = np.append(order, candidates[~taken])
    rest = np.setdiff1d(np.arange(len(occupied)), candidates)
    if len(rest):
        away = np.abs(rest[:, None] - candidates[None]).min(axis=1)
        order = np.append(order, rest[np.argsort(away, kind="stable")])
    return np.sort(order[:number])


def _halving(n: int) -> float:
    """Return an element of the van der Corput sequence: 1/2, 1/4, 3/4, 1/8, 5/8, ..."""
    value, share = 0.0, 0.5
    while n:
        value += share * (n & 1)
        n >>= 1
        share /= 2
    return value


def place_patch(
    shape: Sequence[int],
    patch: Triple,
    annotation: Annotation,
    oversample: float,
    rng: np.random.Generator,
    region: Box | None = None,
) -> Triple:
    """Draw the start of a training crop, which holds at least one annotated slice.

    With probability `oversample` the crop is centred on a voxel of a class, each class of the volume with
    equal probability; otherwise it is drawn uniformly. A volume smaller than the crop lies in its middle.

    Args:
        shape: Shape of the volume, (D, H, W).
        patch: Size of the crop, (D, H, W).
        annotation: Summary of the volume's mask.
        oversample: Share of crops on a class, in [0, 1].
        rng: Source of all randomness.
        region: Box from which crops are drawn where it is larger than they are, and round which they lie
            where it is smaller.
    """
    low, high = _range(shape, patch, region)
    if annotation.places and rng.random() < oversample:
        classes = sorted(annotation.places)
        voxels = annotation.places[classes[int(rng.integers(len(classes)))]]
        voxel = voxels[int(rng.integers(len(voxels)))].astype(np.int64)
        start = np.clip(voxel - np.array(patch) // 2, low, high)
        if annotation.slices is None or ((start[0] <= voxel[0]) and (voxel[0] < start[0] + patch[0])):
            return (int(start[0]), int(start[1]), int(start[2]))
    if annotation.slices is not None:
        # A slice is drawn among those that some start of the range can hold; the crop must hold it.
        near = annotation.slices[(annotation.slices >= low[0]) & (annotation.slices < high[0] + patch[0])]
        if len(near):
            chosen = int(near[int(rng.integers(len(near)))])
        else:  # no crop in the region holds an annotated slice, so the crop leaves the region
            chosen = int(annotation.slices[np.abs(annotation.slices - low[0]).argmin()])
            whole_low, whole_high = _range(shape, patch, None)
            low[0], high[0] = whole_low[0], whole_high[0]
        low[0] = min(max(low[0], chosen - patch[0] + 1), high[0])
        high[0] = max(min(high[0], chosen), low[0])
    start = rng.integers(low, high + 1)
    return (int(start[0]), int(start[1]), int(start[2]))


def _range(shape: Sequence[int], patch: Triple, region: Box | None) -> tuple[Array, Array]:
    """Return the first and the last start along every axis."""
    room = np.array(shape) - np.array(patch)
    low = np.where(room < 0, -((-room) // 2), 0)
    high = np.where(room < 0, low, room)
    if region is not None:
        first, end = np.array(region[:3]), np.array(region[3:])
        # A region smaller than the crop lies anywhere in it.
        inner = np.sort(np.stack([first, end - np.array(patch)]), axis=0)
        low, high = np.clip(inner[0], low, high), np.clip(inner[1], low, high)
    return low, high
