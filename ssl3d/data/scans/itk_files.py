"""Where the voxels of NRRD and MetaImage files lie, in which form, and whether all of them are there.

ITK takes memory for what a header promises, and gives what that memory holds where the voxels of a
MetaImage file do not inflate, or its header does not say to how many bytes they were deflated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ssl3d import memory
from ssl3d.data.scans.streams import check_deflated, check_promise
from ssl3d.errors import DataError

_UNTOLD = "unreadable: its header does not tell size, type and place of its voxels"
_HEAD = 1 << 16  # bytes in which a header ends
# Bytes of a number by a part of its type's name; NRRD's and MetaImage's names, the longer ones first.
_BYTES = {"long_long": 8, "long long": 8, "longlong": 8, "64": 8, "double": 8, "16": 2, "short": 2, "32": 4,
          "float": 4, "long": 4, "8": 1, "char": 1, "int": 4}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StoredVoxels:
    """Place and form of a volume's voxels in a file.

    Attributes:
        path: File that holds them.
        offset: Byte at which they begin; None where they are the file's last.
        form: raw, deflated (by zlib or gzip), or another that only the reader knows.
        needed: Bytes of all voxels by the header.
        sizes: Number of voxels along each axis, the fastest first; of NRRD the values of a voxel are one.
        big: Whether the first byte of a number is the highest.
    """

    path: Path
    offset: int | None
    form: Literal["raw", "deflated", "other"]
    needed: int
    sizes: tuple[int, ...]
    big: bool

    def check_there(self) -> None:
        """Refuse a header whose file of voxels is missing.

        Raises:
            DataError: The file is not there.
        """
        if not self.path.is_file():
            raise DataError(f"its voxels are missing: no file {self.path.name} beside it")

    def check(self) -> None:
        """Look at all bytes before any is used.

        Raises:
            DataError: The file is cut short, damaged, or longer than its header says.
        """
        if self.form == "other":
            return
        offset = self.offset or 0
        deflated = self.form == "deflated"
        # Less than a slice, row or column: a length that is too small in the header leaves more.
        spare = max(self.needed // max(self.sizes) - 1, 0) if self.offset is not None else _HEAD
        check_promise(self.path, offset + self.needed, deflated, spare)
        if deflated:
            check_deflated(self.path, offset, self.needed)

    def read(self, dtype: np.dtype, size: Sequence[int], components: int) -> np.ndarray | None:
        """Read the voxels, (..., K, J, I[, C]); those that are not deflated stay on the disk until used.

        Args:
            dtype: Type of a value.
            size: Number of voxels along I, J, K and so on, as the reader understood the header.
            components: Number of values of a voxel.

        Returns:
            Voxels; None where only the reader knows their form or the order of their axes.

        Raises:
            DataError: The file is cut short, damaged, or longer than its header says.
        """
        whole = [components, *size] if components > 1 else list(size)
        # Of as many values as voxels along every axis nothing tells which axis of NRRD the values are.
        known = self.sizes == tuple(size) or (self.sizes == tuple(whole) and len(set(whole)) > 1)
        if self.form == "other" or not known or math.prod(whole) * dtype.itemsize != self.needed:
            self.check()
            return None
        dtype, shape = dtype.newbyteorder(">" if self.big else "<"), tuple(reversed(whole))
        if components > 1:
            shape = (*shape[:-1], components)
        if self.form == "raw":
            self.check()
            last = self.path.stat().st_size - self.needed
            memory.check_mapping(self.needed)
            return np.memmap(self.path, dtype, "r", last if self.offset is None else self.offset, shape)
        offset = self.offset or 0
        check_promise(self.path, offset + self.needed, zipped=True)
        memory.check(self.needed)
        voxels = np.empty(shape, dtype)
        check_deflated(self.path, offset, self.needed, voxels.reshape(-1).view(np.uint8).data)
        return voxels


def detached_voxels(path: Path) -> Iterator[Path]:
    """Yield the file that holds the voxels of a header, where that is another."""
    with contextlib.suppress(DataError):  # its reader tells it
        stored = stored_voxels(path)
        if stored is not None and stored.path != path:
            yield stored.path


def stored_voxels(path: Path) -> StoredVoxels | None:
    """Find the voxels of a NRRD or MetaImage file; None where they lie in several files.

    Raises:
        DataError: The header does not tell where they lie, or how many there are: ITK makes something of
            some that are damaged.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    return _of_nrrd(path, head) if head.startswith(b"NRRD") else _of_metaimage(path, head)


def _of_nrrd(path: Path, head: bytes) -> StoredVoxels | None:
    text, blank, _ = head.partition(b"\n\n") if b"\n\n" in head else head.partition(b"\r\n\r\n")
    fields = {
        name.strip().lower().replace(b" ", b""): value.strip()
        for name, colon, value in (line.partition(b":") for line in text.splitlines())
        if colon and not name.startswith(b"#")
    }
    sizes, size = _numbers(fields.get(b"sizes", b"")), _size(fields.get(b"type", b""))
    data = fields.get(b"datafile")
    if data is not None and (data.split()[:1] == [b"LIST"] or b"%" in data):
        return None
    if not sizes or not size or (data is None and not blank):
        raise DataError(_UNTOLD)
    form = {b"raw": "raw", b"gzip": "deflated", b"gz": "deflated"}.get(fields.get(b"encoding", b"").lower())
    skipped = [fields.get(name, b"0") for name in (b"lineskip", b"byteskip")]
    if any(skip != b"0" for skip in skipped):
        form = "raw" if form == "raw" and skipped == [b"0", b"-1"] else None
        last = form is not None
    else:
        last = False
    begin = 0 if data is not None else len(text) + len(blank)
    place = path if data is None else path.parent / os.fsdecode(data)
    needed = math.prod(sizes) * size
    big = fields.get(b"endian", b"").lower() == b"big"
    return StoredVoxels(place, None if last else begin, form or "other", needed, tuple(sizes), big)  # type: ignore[arg-type]


def _of_metaimage(path: Path, head: bytes) -> StoredVoxels | None:
    match = re.search(rb"^[ \t]*ElementDataFile[ \t]*=[ \t]*(.+?)[ \t]*\r?\n", head + b"\n", re.MULTILINE)
    if match is None:
        raise DataError(_UNTOLD)
    fields = {
        name.strip(): value.strip()
        for name, equals, value in (line.partition(b"=") for line in head[: match.start()].splitlines())
        if equals
    }
    data = match[1]
    sizes, size = _numbers(fields.get(b"DimSize", b"")), _size(fields.get(b"ElementType", b""))
    channels = _numbers(fields.get(b"ElementNumberOfChannels", b"1"))
    if data.startswith(b"LIST") or b"%" in data:
        return None
    if not sizes or not size or not channels:
        raise DataError(_UNTOLD)
    local = data in (b"LOCAL", b"Local", b"local")
    place = path if local else path.parent / os.fsdecode(data)
    skip = _numbers(fields.get(b"HeaderSize", b"0"))
    order = fields.get(b"BinaryDataByteOrderMSB", fields.get(b"ElementByteOrderMSB", b"False"))
    form: Literal["raw", "deflated", "other"] = "raw"
    if fields.get(b"BinaryData", b"True").lower() == b"false":
        form = "other"
    elif fields.get(b"CompressedData", b"False").lower() == b"true":
        form = "deflated"
    offset = match.end() if local else skip[0] if skip else None
    needed = math.prod(sizes) * channels[0] * size
    return StoredVoxels(place, offset, form, needed, tuple(sizes), order[:1] in b"Tt1")


def _numbers(text: bytes) -> list[int]:
    """Parse whole numbers; none where one is not, or is below 0 (MetaImage's -1: the file's last bytes)."""
    words = text.split()
    return [int(word) for word in words] if words and all(word.isdigit() for word in words) else []


def _size(kind: bytes) -> int:
    """Return the bytes of a number of a type; 0 where it is not known."""
    name = kind.decode("ascii", "replace").lower()
    return next((size for part, size in _BYTES.items() if part in name), 0)
