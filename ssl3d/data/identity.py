"""Identities of people, files and voxels as hashes that do not depend on names or formats."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def identity_hash(dataset: str, subject: str) -> str:
    """Hash (data set, subject) to 16 hexadecimal digits, as checkpoints name the people that they saw.

    Example:
        >>> identity_hash("abdomen", "patient-001")
        'b9d02a3c75a9b702'
    """
    return hashlib.sha256(f"{dataset}\0{subject}".encode()).hexdigest()[:16]


SIZE = 8
"""Bytes of a hash."""

LEVELS = 32

SMALLEST = 128
"""Least voxels of a shape in a volume of two values: two people's tiny masks can be the same by chance."""


def reading_of(image: NDArray[Any]) -> str:
    """Hash a volume's voxels to one or two hashes of 8 bytes, in hex; empty for a volume of one value.

    Args:
        image: (C, D, H, W), as stored.
    """
    image = np.asarray(image)
    low, high = float(image.min()), float(image.max())
    if not high > low:
        return ""
    middle = image == image.dtype.type(high)
    if bool(np.logical_or(middle, image == image.dtype.type(low)).all()):
        if min(middle.sum(), middle.size - middle.sum()) < SMALLEST:
            return ""
        return _hash(f"bits {image.shape}".encode(), np.packbits(middle).tobytes())
    means = _block_means(image)
    floor, span = means.min(), np.ptp(means)
    if not span > 1e-6 * (high - low):
        return ""
    place = (means - floor) / span * LEVELS
    kind = f"means {means.shape}".encode()
    return "".join(
        _hash(kind + which, np.floor(place + shift).astype(np.int8).tobytes())
        for which, shift in ((b"0", 0.25), (b"1", 0.75))
    )


def source_hash(sha256: str, source: str) -> str:
    """Hash a source file and the place of a volume in it, in hex; empty where the file is not known.

    Args:
        sha256: SHA-256 of the file.
        source: PATH, or PATH#MEMBER[ROW], from `Record.source`; the path does not count.
    """
    if not sha256:
        return ""
    return _hash(b"file", sha256.encode() + b"#" + source.partition("#")[2].encode())


def _hash(kind: bytes, content: bytes) -> str:
    return hashlib.blake2b(
        content, digest_size=SIZE, person=b"ssl3d", key=hashlib.sha256(kind).digest()
    ).hexdigest()


def _block_means(image: NDArray[Any]) -> NDArray[np.float64]:
    """Average over 4 x 4 x 4 blocks (1 x 8 x 8 of what is flat), per channel."""
    sides = (4, 4, 4) if image.shape[1] >= 4 else (1, 8, 8)
    # Slice by slice: a large volume is not copied in double precision.
    edges = [
        np.unique(np.linspace(0, n, min(side, n) + 1).astype(int))
        for n, side in zip(image.shape[1:], sides)
    ]
    rows = []
    for first, last in zip(edges[0][:-1], edges[0][1:]):
        total = image[:, first:last].sum(axis=1, dtype=np.float64)
        total = np.add.reduceat(total, edges[1][:-1], axis=1)
        rows.append(np.add.reduceat(total, edges[2][:-1], axis=2))
    sums = np.stack(rows, axis=1)
    sizes = [np.diff(edge) for edge in edges]
    return sums / (sizes[0][:, None, None] * sizes[1][:, None] * sizes[2])
