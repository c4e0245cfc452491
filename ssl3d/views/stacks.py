"""Stacks of slices of one volume: where their slabs lie along an axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.data.store.volume import Volume

Spread = Literal["spread", "random", "block"]


def draw_stack(
    volume: Volume,
    axis: int,
    count: int,
    slab: int,
    rng: np.random.Generator,
    spread: Spread = "spread",
    step_mm: float = 0.0,
) -> tuple[list[int], list[float]]:
    """Draw where the slabs of a stack start along an axis: increasing, apart, within the foreground.

    Args:
        volume: Volume whose foreground box and spacing are looked at; no voxel is read.
        axis: Axis 0 to 2, for D, H, W.
        count: Number of slabs; a thinner volume has as many as it has room for, at least one.
        slab: Adjacent slices in a slab.
        rng: Generator of all randomness.
        spread: `spread` for even distances at a phase ~ U(0, 1), `random` for a uniformly drawn set,
            `block` for regular distances from a uniformly drawn start.
        step_mm: Distance of neighbours in a block, in mm; slabs never overlap, so 0 makes them touch.

    Returns:
        Starts of the slabs in voxels, and their centres as shares of the foreground, 0 to 1.
    """
    low, high = (int(end[axis]) for end in volume.foreground_box())
    room = max(high - low, 1)
    count = max(1, min(count, room // slab))
    if spread == "block":
        step = max(slab, round(step_mm / volume.spacing[axis]))
        # A block that would be longer than the volume has its slabs closer to each other.
        step = min(step, max(slab, (room - slab) // max(count - 1, 1)))
        free = max(room - (count - 1) * step - slab, 0)
        first = int(rng.integers(free + 1))
        starts = [low + first + n * step for n in range(count)]
    elif spread == "random":
        free = max(room - count * slab, 0)
        gaps = sorted(rng.choice(free + count, count, replace=False).tolist())
        starts = [low + gap + n * (slab - 1) for n, gap in enumerate(gaps)]
    else:
        # Evenly spread, at a random phase: each in its share of the volume, no two of them overlapping.
        share = (room - slab + 1) / count
        phase = float(rng.random())
        starts = [low + int((n + phase) * share) for n in range(count)]
        if count > 1 and share < slab:
            free = max(room - count * slab, 0)
            first = int(rng.integers(free + 1))
            starts = [low + first + n * slab for n in range(count)]
    places = [min(max((start + slab / 2 - low) / room, 0.0), 1.0) for start in starts]
    return starts, places
