"""Frozen features of whole volumes: equal input for every contestant, in batches, cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import (
    AggregatedEncoder,
    autocast,
    cache_folder,
    whole_file,
)
from ssl3d_benchmarks.trivial_rows import trivial_features

if TYPE_CHECKING:
    from ssl3d.api import Collection, Contestant, Encoder

Array = NDArray[Any]

VERSION = 1
"""Part of the cache's keys: raised when the same encoder gives other features."""

BATCH_VOXELS = 2**20
"""Voxels of one batch of equal volumes; bounds the memory of the forward pass."""


def embeddings(
    contestant: Contestant,
    data: Collection,
    window: tuple[int, int, int],
    precision: str,
    mask_classes: tuple[int, ...],
    report: Callable[[int, int], None] | None = None,
) -> Array:
    """Compute the features of every volume, (N, n) float32, or read them from the cache.

    A volume that the window holds goes through the encoder whole, together with others of its shape; a
    larger one window by window, the embeddings averaged.

    Args:
        contestant: Encoder, or trivial row (`details["features"]`).
        data: Volumes to embed.
        window: Largest input along (D, H, W), voxels, the same for every contestant.
        precision: Precision of the forward pass, `32` or `bf16`.
        mask_classes: Mask values that the trivial rows measure.
        report: Function that is called with the numbers of volumes done and in total.
    """
    settings = (VERSION, contestant.digest, data.digest(), window, precision, mask_classes)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:24]
    path = cache_folder() / "features" / f"{key}.npy"
    cached = _load(path, len(data))
    if cached is not None:
        return cached
    rows: list[Array | None] = [None] * len(data)
    done = 0
    if contestant.encoder is None:
        deep = any(volume.shape[1] > 1 for volume in data)
        for position, volume in enumerate(data):
            rows[position] = trivial_features(contestant.details["features"], volume, mask_classes, deep)
            done += 1
            if report:
                report(done, len(data))
    else:
        for positions, features in _encoded(contestant.encoder, data, window, precision):
            for position, row in zip(positions, features, strict=True):
                rows[position] = row
            done += len(positions)
            if report:
                report(done, len(data))
    stacked = np.stack([row for row in rows if row is not None]).astype(np.float32)
    _save(path, stacked)
    return stacked


def _encoded(
    encoder: Encoder, data: Collection, window: tuple[int, int, int], precision: str
) -> Iterator[tuple[list[int], Array]]:
    import torch

    device = next(iter(encoder.parameters())).device
    shapes = [tuple(int(n) for n in shape) for shape in data.shapes]
    with torch.inference_mode(), autocast(device, precision):
        for shape in sorted(set(shapes)):
            same = [position for position, own in enumerate(shapes) if own == shape]
            # An aggregator takes slices out of a volume of any depth, and windows in plane itself.
            whole = isinstance(encoder, AggregatedEncoder)
            if not whole and any(n > w for n, w in zip(shape[1:], window, strict=True)):
                from ssl3d.api import embed_volume, voxels_of

                for position in same:
                    image = voxels_of(data[position], device)
                    embedding = embed_volume(
                        encoder, image, window, autocast=torch.bfloat16 if precision == "bf16" else None
                    )
                    yield [position], embedding.float().cpu().numpy()[None]
                continue
            size = max(1, BATCH_VOXELS // int(np.prod(shape)))
            for start in range(0, len(same), size):
                chosen = same[start : start + size]
                batch = torch.stack([data[position].read() for position in chosen]).to(device)
                yield chosen, encoder.embed(batch).float().cpu().numpy()


def _load(path: Path, rows: int) -> Array | None:
    try:
        features: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not there, or cut short: computed again
        return None
    return features if features.ndim == 2 and len(features) == rows else None


def _save(path: Path, features: Array) -> None:
    # A cache that cannot be written costs time, not results.
    with contextlib.suppress(OSError), whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, features)
