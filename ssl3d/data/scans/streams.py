"""Voxels in files, looked at before any is used: whether all are there, and whether check sums hold.

Other libraries' readers stop behind the last voxel, before the check sum, and take memory for what a header
promises.
"""

from __future__ import annotations

import contextlib
import gzip
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl3d.errors import DataError

DEFLATED = 1032
"""Most bytes that one byte of a deflated stream stands for."""

_BLOCK = 1 << 20
_SPARE = 1 << 16  # bytes behind the voxels that mean nothing


def is_zipped(path: Path) -> bool:
    """Tell by its first bytes whether a file is gzipped."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def check_promise(path: Path, needed: int, zipped: bool = False, spare: int = _SPARE) -> None:
    """Refuse a file that cannot hold what its header promises, before memory is taken for it.

    Args:
        path: File.
        needed: Bytes that the header promises, from the file's first on.
        zipped: Whether these bytes are deflated.
        spare: Most bytes that may be left over in a file that is not deflated.

    Raises:
        DataError: The file is too short, or goes on behind its voxels.
    """
    here = path.stat().st_size
    if here * (DEFLATED if zipped else 1) < needed:
        held = f"{here:,} bytes{' gzipped' if zipped else ''}"
        raise DataError(f"cut short: {held}, its header promises {needed:,}")
    if not zipped and here > needed + spare:
        raise DataError(f"damaged: {here:,} bytes, its header tells of {needed:,} alone")


@contextlib.contextmanager
def unzipped(path: Path, spare: int = _SPARE) -> Iterator[gzip.GzipFile]:
    """Open a gzipped file, and see at the end whether its check sum and length hold.

    Args:
        path: File.
        spare: Most bytes that may be left over behind those that are read.

    Raises:
        DataError: The file is damaged or cut short, or goes on behind its voxels.
    """
    try:
        with gzip.open(path) as stream:
            yield stream
            left = 0
            while block := stream.read(_BLOCK):
                left += len(block)
                if left > spare:
                    raise DataError(f"damaged: it goes on for over {spare:,} bytes behind its voxels")
    except EOFError as error:
        raise DataError("cut short: its gzip stream does not end") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"damaged: {str(error)[:80]}") from error


@contextlib.contextmanager
def copy_of(path: Path, most: int) -> Iterator[Path]:
    """Yield a copy of a gzipped file that is not, which goes again.

    Args:
        path: File.
        most: Most bytes of the copy.

    Raises:
        DataError: The file is damaged, cut short, or larger.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "scan")
        with unzipped(path) as stream, open(plain, "wb") as copy:
            while block := stream.read(_BLOCK):
                copy.write(block)
                if copy.tell() > most:
                    raise DataError(f"inflates to more than {most:,} bytes")
        yield plain


def check_deflated(path: Path, offset: int, needed: int, into: memoryview | None = None) -> None:
    """Read a zlib or gzip stream to its end, for its check sum and length, in little memory.

    Args:
        path: File.
        offset: Place in the file where the stream begins.
        needed: Bytes that it holds by the header.
        into: Place of as many bytes for what is read; None drops it.

    Raises:
        DataError: The stream is damaged, cut short, or of another length.
    """
    stream: Any = zlib.decompressobj(zlib.MAX_WBITS | 32)  # with the head of zlib or of gzip
    held = 0
    with open(path, "rb") as file:
        file.seek(offset)
        while not stream.eof:
            block = stream.unconsumed_tail or file.read(_BLOCK)
            if not block:
                raise DataError("cut short: its compressed voxels do not end")
            try:
                part = stream.decompress(block, _BLOCK)
            except zlib.error as error:
                raise DataError(f"damaged: {str(error)[:80]}") from error
            if into is not None:
                into[held : held + len(part)] = part[: needed - held]
            held += len(part)
            if held > needed:
                break
    if held != needed:
        here = f"more than {needed:,}" if held > needed else f"{held:,}"
        raise DataError(f"damaged: {here} bytes of voxels, its header promises {needed:,}")
