"""Lines on options that do not fit the data: crops larger than volumes, batches of more than there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl3d.amounts import count_of


def large_crop_note(option: str, crop: Sequence[int], shapes: Any) -> str:
    """Write the line on a crop that is larger than most volumes along some axis; "" where it is not.

    Args:
        option: Name of the option that gives the crop, without dashes.
        crop: Size D H W, voxels.
        shapes: Shapes of the volumes, (n, 3 or more), of which the last three are D H W.

    Example:
        >>> large_crop_note("mae.crop", (32, 32, 32), [(30, 40, 40), (20, 64, 64), (32, 32, 32)])[:53]
        'note: --mae.crop 32 32 32 is larger than 2 of 3 volum'
    """
    sizes = np.array([tuple(shape)[-3:] for shape in shapes])
    asked = np.tile(np.array(crop), (len(sizes), 1))
    asked[sizes[:, 0] == 1, 0] = 1  # an image has crops of depth 1
    smaller = int((sizes < asked).any(axis=1).sum())
    if 2 * smaller <= len(sizes):
        return ""
    usual = " x ".join(f"{size:.0f}" for size in np.median(sizes, axis=0))
    return (
        f"note: --{option} {' '.join(map(str, crop))} is larger than {smaller} of "
        f"{count_of(len(sizes), 'volume')} (median {usual} voxels): give a smaller one"
    )


def large_batch_note(batch: int, volumes: int, then: str) -> str:
    """Write the line on a batch that is larger than the number of volumes; "" where it is not.

    Args:
        batch: Number of examples of a step that is asked for.
        volumes: Number of volumes to train on.
        then: What becomes of the batch.
    """
    if batch <= volumes:
        return ""
    return f"note: --batch-size {batch} is larger than the number of volumes, {volumes}: {then}"
