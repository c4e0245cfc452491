"""Hashes of what a store holds: of its index, and of each volume's content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ssl3d.data.store.chunks import Chunked

_SLAB = 1 << 26  # bytes hashed at a time


def index_digest(table: np.ndarray, text: bytes, head: bytes) -> str:
    """Hash the three parts of an index, which are read when a store is opened."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (np.ascontiguousarray(table).tobytes(), text, head):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def content_digest(
    stored: np.ndarray | Chunked,
    mask: np.ndarray | Chunked | None,
    boxes: np.ndarray | None,
    scale: float,
    offset: float,
    ignored: np.ndarray | Chunked | None = None,
) -> str:
    """Hash a volume as it is stored: `Record.voxels`, and `content` in the index.

    Args:
        stored: Voxels (C, D, H, W); a data set of a file is read in slabs.
        mask: (D, H, W), of its smallest type, or None.
        boxes: (n, 6) float32, or None.
        scale: Factor of the stored values; it counts for int16 only.
        offset: Summand of the stored values; it counts for int16 only.
        ignored: (D, H, W) booleans, or None.
    """
    digest = hashlib.blake2b(digest_size=16)
    for array in (stored, mask, boxes, ignored):
        if array is not None:
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            for slab in _slabs(array):
                digest.update(np.ascontiguousarray(slab).data)
    if stored.dtype == np.int16:  # the same numbers are other voxels at another scale
        digest.update(np.array([scale, offset]).tobytes())
    return digest.hexdigest()


def _slabs(array: Any) -> Iterator[np.ndarray]:
    """Cut an array into slabs that follow each other in memory; one of a file is not read at once."""
    if array.ndim < 3 or array.nbytes <= _SLAB:
        yield array[()]
        return
    channels: Iterable[tuple[int, ...]] = np.ndindex(array.shape[:-3])
    layers = max(1, _SLAB // max(1, array.nbytes // int(np.prod(array.shape[:-2]))))
    if isinstance(array, Chunked) and array.chunks:  # no chunk is read twice
        layers = max(1, layers // array.chunks[-3]) * array.chunks[-3]
    for channel in channels:
        for first in range(0, array.shape[-3], layers):
            yield array[(*channel, slice(first, first + layers))]
