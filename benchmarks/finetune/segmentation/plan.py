"""Plan of a segmentation: patch, slices, augmentation and length, by rule from the data's fingerprint."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ssl3d.api import Collection
    from ssl3d_benchmarks.finetune.segmentation.data import Annotation

Array = NDArray[Any]
Triple = tuple[int, int, int]

THICK = 3.0
"""Ratio of the longest to the shortest side of a voxel above which volumes are slices (nnU-Net's)."""
PATCH_VOXELS = 2**17
SLICE_VOXELS = 2**15
"""Most voxels of a patch, in 3D and of slices."""
STEP_VOXELS = 5 * 2**15
"""Voxels of all crops of a step."""
MOST_CROPS = 32
"""Most crops of a step."""
MULTIPLE = 8
"""Number whose multiples the sides of a patch are."""
SIDED = 0.95
"""Share of the volumes in which two places are in one order, from which on they tell sides apart."""


@dataclass(frozen=True)
class Fingerprint:
    """What a plan follows from.

    Attributes:
        count: Number of volumes.
        shape: Median shape (D, H, W), voxels.
        spacing: Median side of the voxels along D, H, W, mm.
        classes: Number of classes, background among them.
        sided: Axis 0 to 2 -> what lies on a fixed side along it, in words; see `fixed_sides`.
    """

    count: int
    shape: Triple
    spacing: tuple[float, float, float]
    classes: int
    sided: Mapping[int, str]

    @property
    def thick(self) -> float:
        """Ratio of the longest to the shortest side of a voxel; axes of one voxel do not count."""
        sides = [s for s, n in zip(self.spacing, self.shape, strict=True) if n > 1]
        return max(sides) / min(sides) if sides else 1.0

    @property
    def coarse_axis(self) -> int | None:
        """Axis along which voxels are longest, where they are too long to turn into the others."""
        sides = [s if n > 1 else 0.0 for s, n in zip(self.spacing, self.shape, strict=True)]
        return int(np.argmax(sides)) if self.thick > THICK else None


@dataclass(frozen=True)
class SegmentationPlan:
    """Settings that follow from a fingerprint, and why.

    Attributes:
        config: Options of the task by name.
        training: Options of the frame by name, batch_size and steps, each with its reason.
        lines: Sentences that say what was planned of the task, and why.
    """

    config: Mapping[str, Any]
    training: Mapping[str, tuple[int, str]]
    lines: tuple[str, ...]


def fingerprint(
    data: Collection, annotations: Mapping[int, Annotation], names: Sequence[str]
) -> Fingerprint:
    """Take the fingerprint of volumes with masks.

    Args:
        data: Volumes to plan for, those of the training alone.
        annotations: Summary of each volume's mask, by its index.
        names: Names of the classes, background first.
    """
    shapes = np.asarray(data.shapes)[:, 1:]
    spacings = np.array([volume.spacing for volume in data], dtype=np.float64)
    places = [annotations[volume.index].places for volume in data]
    d, h, w = (int(n) for n in np.median(shapes, axis=0))
    a, b, c = (float(s) for s in np.median(spacings, axis=0))
    return Fingerprint(len(data), (d, h, w), (a, b, c), len(names), fixed_sides(shapes, places, names))


def fixed_sides(
    shapes: Array, places: Sequence[Mapping[int, Array]], names: Sequence[str]
) -> dict[int, str]:
    """Find the axes along which mirroring would show what anatomy does not have.

    Along such an axis two classes lie in one order in 95% of the volumes that have both, their centres at
    least a quarter of the larger one's extent apart (a left and a right structure, front and back); or one
    class lies on one side of the volume's middle in 95% of the volumes, by a tenth of the volume's side
    or more (a liver). Four volumes at least must say so.

    Args:
        shapes: Shapes (N, 3) of the volumes, voxels.
        places: Class index -> sample of its voxels (n, 3), for each volume.
        names: Names of the classes by index.

    Returns:
        Axis -> what lies on a fixed side, in words.
    """
    sided: dict[int, str] = {}
    centres = [{k: at.mean(axis=0) for k, at in own.items()} for own in places]
    extents = [{k: np.ptp(at.astype(np.int64), axis=0) + 1 for k, at in own.items()} for own in places]
    for axis in range(3):
        for k in range(1, len(names)):
            offsets = [
                (own[k][axis] + 0.5) / shape[axis] - 0.5
                for own, shape in zip(centres, shapes, strict=True)
                if k in own
            ]
            if _one_sided(offsets, 0.1):
                sided[axis] = f"{names[k]} lies on one side of the volume"
                break
        for j, k in itertools.combinations(range(1, len(names)), 2):
            away = [
                (own[k][axis] - own[j][axis]) / max(wide[j][axis], wide[k][axis])
                for own, wide in zip(centres, extents, strict=True)
                if j in own and k in own
            ]
            if _one_sided(away, 0.25):
                sided[axis] = f"{names[j]} and {names[k]} lie in one order"
                break
    return sided


def _one_sided(offsets: Sequence[float], least: float) -> bool:
    """Tell whether offsets have one sign, as a rule, and are large, in the median."""
    if len(offsets) < 4 or abs(float(np.median(offsets))) < least:
        return False
    positive = float(np.mean(np.asarray(offsets) > 0))
    return max(positive, 1 - positive) >= SIDED


def patch_of(shape: Sequence[int], spacing: Sequence[float], voxels: int) -> Triple:
    """Return the largest patch (D, H, W) that is a cube in mm, or as much of one as the volume has.

    Its sides are multiples of 8, where an axis has more than one voxel, and it has `voxels` at most: the
    cube grows as long as that holds, and stops at the volume's sides, rounded up.

    Example:
        >>> patch_of((36, 50, 35), (1, 1, 1), 2**17), patch_of((44, 71, 96), (1.25, 1.25, 1.25), 2**17)
        ((40, 56, 40), (48, 48, 48))
    """
    limits = [1 if n == 1 else -(-n // MULTIPLE) * MULTIPLE for n in shape]
    edges = {
        k * side
        for side, limit in zip(spacing, limits, strict=True)
        for k in range(MULTIPLE, limit + 1, MULTIPLE)
    }
    best = [min(MULTIPLE, limit) for limit in limits]
    for edge in sorted(edges):
        patch = [
            1 if limit == 1 else max(min(int(edge / side + 1e-6) // MULTIPLE * MULTIPLE, limit), MULTIPLE)
            for side, limit in zip(spacing, limits, strict=True)
        ]
        if np.prod(patch) > voxels:
            break
        best = patch
    d, h, w = best
    return (d, h, w)


def plan_by_rule(data: Fingerprint, given: Mapping[str, Any]) -> SegmentationPlan:
    """Plan a segmentation by rule.

    * *Slices*: where voxels are more than 3 times as long along D as in the plane, each slice is an image
      (nnU-Net takes its 2D network into account there too); a patch that was given decides by its depth.
    * *Patch*: a cube in mm of 2^17 voxels at most (slices: a square of 2^15), cut to the median volume.
    * *Crops of a step*: as many as make 5 x 2^15 voxels, from 2 to 32.
    * *Axes*: turned and stretched along all but the one with long voxels or with few in the patch
      (nnU-Net's ratio 3); mirrored along those of them on which nothing lies on a fixed side.
    * *Soft Dice*: over the batch for slices, and where a patch is less than a quarter of the median volume
      (nnU-Net's); else of each crop.
    * *Width*: half of it, at full resolution, holds the classes: 16, or the next power of 2.
    * *Steps*: 750 times the third root of the number of volumes, from 1,000 to 6,000.

    Args:
        data: Fingerprint of the training volumes.
        given: Options of the task that were given and are kept; None where there is none.
    """
    lines = []
    config: dict[str, Any] = {}

    def choose(name: str, value: Any) -> Any:
        if given.get(name) is None:
            config[name] = value
            return value
        return given[name]

    patch = given.get("patch")
    flat = data.coarse_axis == 0 and patch is None and given.get("stages", 1) == 1
    slicewise = choose("slicewise", flat)
    size = " x ".join(f"{side:.3g}" for side in data.spacing)
    image = data.shape[0] == 1
    lines.append(
        f"{data.count} volumes, the median {_by(data.shape)} voxels of {size} mm: "
        + ("images" if image else "trained slice by slice" if slicewise else "trained on 3D crops")
        + ("" if image else f" (the longest side of a voxel is {data.thick:.3g} times the shortest)")
    )
    if slicewise or image:
        shape = (1, *data.shape[1:])
        patch = choose("patch", patch_of(shape, (1.0, *data.spacing[1:]), SLICE_VOXELS))
        patch = (1, *patch[1:])
    else:
        shape = data.shape
        patch = choose("patch", patch_of(shape, data.spacing, PATCH_VOXELS))
    voxels = int(np.prod(patch))
    batch = min(max(STEP_VOXELS // voxels, 2), MOST_CROPS)
    steps = int(min(max(round(15 * data.count ** (1 / 3)) * 50, 1000), 6000))
    inside = [n for n in patch if n > 1] or [1]
    moving = tuple(
        axis
        for axis in range(3)
        if patch[axis] > 1 and axis != data.coarse_axis and max(inside) <= THICK * patch[axis]
    )
    axes = choose("axes", moving)
    flips = choose("flip_axes", tuple(axis for axis in axes if axis not in data.sided))
    whole = int(np.prod([min(p, n) for p, n in zip(patch, shape, strict=True)])) / int(np.prod(shape))
    batch_dice = choose("batch_dice", bool(patch[0] == 1 or whole < 0.25))
    width = choose("width", max(16, 2 ** int(np.ceil(np.log2(max(2 * data.classes, 2))))))
    lines.append(
        f"patch {_by(patch)}, at most {SLICE_VOXELS if patch[0] == 1 else PATCH_VOXELS} voxels if planned; "
        f"head of {width} channels for {data.classes} classes; soft Dice over "
        f"{'the batch' if batch_dice else 'each crop'}"
    )
    sided = [f"{'DHW'[axis]}: {why}" for axis, why in data.sided.items() if axis in axes]
    lines.append(
        f"turned and stretched along {_axes(axes)}; mirrored along {_axes(flips)}"
        + (f" ({'; '.join(sided)})" if sided else "")
    )
    training = {
        "batch_size": (batch, f"crops of {voxels} voxels, about {STEP_VOXELS} a step"),
        "steps": (steps, f"{data.count} volumes"),
    }
    return SegmentationPlan(config, training, tuple(lines))


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _axes(axes: Sequence[int]) -> str:
    return " ".join("DHW"[axis] for axis in axes) or "none"
