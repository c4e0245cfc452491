"""Check sums of chunks: a CRC-32 each, compared once in each process, as a chunk is first read.

HDF5's own filter (Fletcher32) sums a chunk whenever it is read: half the time of a large crop.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np

from ssl3d.errors import DataError

UNREADABLE = (
    OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError, OverflowError,
    DataError,
)  # fmt: skip
"""Errors of HDF5 and of the parsers over bytes that are damaged."""

_SUMS = "crc32"


def put(file: h5py.File, name: str, values: np.ndarray, chunks: tuple[int, ...]) -> h5py.Dataset:
    """Write a data set of many chunks, with the check sum of each in an attribute.

    Args:
        file: File to write to.
        name: Name of the data set.
        values: What is written, not empty.
        chunks: Shape of a chunk.
    """
    # Without a fill value, border chunks end in whatever was in memory.
    data = file.create_dataset(name, data=values, chunks=chunks, fillvalue=0)
    sums = np.zeros(_grid(values.shape, chunks), np.uint32)
    for place in np.ndindex(sums.shape):
        part = values[tuple(slice(p * side, (p + 1) * side) for p, side in zip(place, chunks, strict=True))]
        whole = part
        if part.shape != chunks:
            whole = np.zeros(chunks, values.dtype)
            whole[tuple(map(slice, part.shape))] = part
        sums[place] = zlib.crc32(np.ascontiguousarray(whole).data)
    data.attrs[_SUMS] = sums
    return data


class Chunked:
    """Data set of a file, read in parts, whose chunks are compared with their check sums.

    One without check sums, as older files have them, is read as it is.

    Args:
        data: Data set in chunks.
        pending: Which chunks are not compared yet, as an earlier object over the same data has left it.

    Attributes:
        shape: Shape of the data set.
        dtype: Type of its entries.
        chunks: Shape of a chunk; None where the data set has no chunks.
        attrs: Attributes of the data set.
        pending: Which chunks are not compared yet, booleans; None where none is.
        summed: Whether its chunks have check sums.
    """

    def __init__(self, data: h5py.Dataset, pending: np.ndarray | None = None):
        self._data = data
        self.shape: tuple[int, ...] = data.shape
        self.dtype: np.dtype[Any] = data.dtype
        self.chunks: tuple[int, ...] | None = data.chunks
        self.attrs = data.attrs
        self.pending: np.ndarray | None = None
        self.summed = bool(self.chunks) and _SUMS in data.attrs
        if self.chunks and self.summed:
            self._sums: np.ndarray = data.attrs[_SUMS]
            grid = _grid(self.shape, self.chunks)
            if self._sums.shape != grid:
                raise ValueError(f"check sums of {self._sums.shape} chunks, there are {grid}")
            pending = np.ones(grid, bool) if pending is None else pending
            self.pending = pending if pending.any() else None

    @property
    def ndim(self) -> int:
        """Number of axes of the data set."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all entries."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: Any) -> np.ndarray:
        """Read a part: indices and slices without steps, `...` or `()` for all.

        Raises:
            ValueError: A check sum does not hold.
        """
        if self.pending is not None:
            self._compare(part, self.pending)
        values: np.ndarray = self._data[part]
        return values

    def check(self) -> None:
        """Compare all chunks, and keep nothing of them.

        Raises:
            ValueError: A check sum does not hold.
        """
        if self.pending is not None:
            self._compare(..., self.pending)

    def _compare(self, part: Any, pending: np.ndarray) -> None:
        sides = self.chunks or ()
        touched = tuple(_span(p, side, n) for p, side, n in zip(_full(part), sides, self.shape))
        waiting = pending[touched]
        if not waiting.any():
            return
        first = [span.start for span in touched]
        for offset in np.argwhere(waiting):
            place = tuple(int(a + b) for a, b in zip(first, offset, strict=True))
            corner = tuple(p * side for p, side in zip(place, sides, strict=True))
            if zlib.crc32(self._data.id.read_direct_chunk(corner)[1]) != self._sums[place]:
                raise ValueError("a check sum does not hold")
            pending[place] = False
        if not pending.any():
            self.pending = None


# ------------------------------------------------------------------------------------------------


def _grid(shape: Sequence[int], chunks: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // side) for n, side in zip(shape, chunks, strict=True))


def _full(part: Any) -> Iterator[Any]:
    """Yield the part along each axis; axes that it does not name are whole."""
    if part is not Ellipsis:
        yield from part if isinstance(part, tuple) else (part,)
    while True:
        yield slice(None)


def _span(part: Any, side: int, length: int) -> slice:
    """Return the chunks that a part of an axis touches."""
    first, last, _ = (part if isinstance(part, slice) else slice(part, part + 1)).indices(length)
    return slice(first // side, -(-last // side))
