"""Where the voxels of NRRD and MetaImage files lie, in which form, and whether all of them are there.

ITK takes memory for what a header promises, and voxels whose check sum does not hold.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ssl3d.data.scans.streams import check_deflated, check_promise
from ssl3d.errors import DataError

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
        longest: Number of voxels along the longest axis.
    """

    path: Path
    offset: int | None
    form: Literal["raw", "deflated", "other"]
    needed: int
    longest: int

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
        spare = max(self.needed // self.longest - 1, 0) if self.offset is not None else _HEAD
        check_promise(self.path, offset + self.needed, deflated, spare)
        if deflated:
            check_deflated(self.path, offset, self.needed)


def detached_voxels(path: Path) -> Iterator[Path]:
    """Yield the file that holds the voxels of a header, where that is another."""
    stored = stored_voxels(path)
    if stored is not None and stored.path != path:
        yield stored.path


def stored_voxels(path: Path) -> StoredVoxels | None:
    """Find the voxels of a NRRD or MetaImage file; None where they lie in several files, or untold."""
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
    if not sizes or not size or (data is None and not blank):
        return None
    if data is not None and (data.split()[0] == b"LIST" or b"%" in data):
        return None
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
    return StoredVoxels(place, None if last else begin, form or "other", needed, max(sizes))  # type: ignore[arg-type]


def _of_metaimage(path: Path, head: bytes) -> StoredVoxels | None:
    match = re.search(rb"^[ \t]*ElementDataFile[ \t]*=[ \t]*(.+?)[ \t]*\r?\n", head + b"\n", re.MULTILINE)
    if match is None:
        return None
    fields = {
        name.strip(): value.strip()
        for name, equals, value in (line.partition(b"=") for line in head[: match.start()].splitlines())
        if equals
    }
    data = match[1]
    sizes, size = _numbers(fields.get(b"DimSize", b"")), _size(fields.get(b"ElementType", b""))
    channels = _numbers(fields.get(b"ElementNumberOfChannels", b"1"))
    if not sizes or not size or not channels or data.startswith(b"LIST") or b"%" in data:
        return None
    local = data in (b"LOCAL", b"Local", b"local")
    place = path if local else path.parent / os.fsdecode(data)
    skip = _numbers(fields.get(b"HeaderSize", b"0"))
    form: Literal["raw", "deflated", "other"] = "raw"
    if fields.get(b"BinaryData", b"True").lower() == b"false":
        form = "other"
    elif fields.get(b"CompressedData", b"False").lower() == b"true":
        form = "deflated"
    offset = match.end() if local else skip[0] if skip else None
    return StoredVoxels(place, offset, form, math.prod(sizes) * channels[0] * size, max(sizes))


def _numbers(text: bytes) -> list[int]:
    """Parse whole numbers; none where one is not, or is below 0 (MetaImage's -1: the file's last bytes)."""
    words = text.split()
    return [int(word) for word in words] if words and all(word.isdigit() for word in words) else []


def _size(kind: bytes) -> int:
    """Return the bytes of a number of a type; 0 where it is not known."""
    name = kind.decode("ascii", "replace").lower()
    return next((size for part, size in _BYTES.items() if part in name), 0)
