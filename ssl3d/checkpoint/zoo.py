"""Encoders by name: an index says where each archive lies and what its bytes must be."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import urlopen

from ssl3d.data.cache import cache_folder
from ssl3d.errors import CheckpointError
from ssl3d.files import whole_file, whole_folder
from ssl3d.json_files import parse_json

ZOO = "zoo:"
VARIABLE = "SSL3D_ZOO"
"""Environment variable that holds the index: its URL (https, http or file) or its path."""
FORMAT = 1
LARGEST = 15_000_000
"""Bytes of an archive at most."""
_INDEX_BYTES = 1_000_000
_UNPACKED_BYTES = 4 * LARGEST
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SECONDS = 30.0


@dataclass(frozen=True)
class ZooEntry:
    """Entry of the index.

    Attributes:
        name: Name of the encoder.
        file: Place of the archive, as the index has it: a URL, or a path beside the index.
        sha256: Hash of the archive.
        bytes: Size of the archive.
        licence: Licence of the weights.
        about: Training of the encoder in one line.
    """

    name: str
    file: str
    sha256: str
    bytes: int
    licence: str
    about: str


def index_place(place: str = "") -> str:
    """Return the URL of an index: the one given, or else the configured one.

    Raises:
        CheckpointError: None is configured.
    """
    place = place or os.environ.get(VARIABLE, "")
    if not place:
        raise CheckpointError(
            f"zoo: no index is configured: set ${VARIABLE} to the URL or path of an index.json"
        )
    return place if urlsplit(place).scheme in ("http", "https", "file") else Path(place).absolute().as_uri()


def read_index(place: str = "") -> dict[str, ZooEntry]:
    """Read the entries of an index by name: of the one given, or else of the configured one.

    Raises:
        CheckpointError: It cannot be had, or is no index.
    """
    place = index_place(place)
    content = _bytes(place, _INDEX_BYTES)
    try:
        return entries_of(parse_json(content.decode("utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        name = type(error).__name__
        raise CheckpointError(f"{place}: is no index of encoders ({name}: {reason})") from error


def entries_of(content: Any) -> dict[str, ZooEntry]:
    """Check the content of an index and return its entries by name.

    Raises:
        ValueError: It is of another format, or an entry is not what it must be.
        KeyError: Something is missing.
    """
    if not isinstance(content, Mapping) or content["format"] != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    entries = {}
    for name, about in content["encoders"].items():
        keys = ("file", "sha256", "bytes", "licence", "about")
        entry = ZooEntry(str(name), **{key: about[key] for key in keys})
        if not _NAME.fullmatch(entry.name):
            raise ValueError(f"{entry.name!r} is no name: use a to z, digits, - and _")
        if not all(isinstance(getattr(entry, key), str) for key in ("file", "sha256", "licence", "about")):
            raise ValueError(f"{entry.name}: file, sha256, licence and about must be texts")
        if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise ValueError(f"{entry.name}: sha256 is not 64 hexadecimal digits")
        if type(entry.bytes) is not int or not 0 < entry.bytes <= LARGEST:
            raise ValueError(f"{entry.name}: bytes is {entry.bytes!r}, must be 1 to {LARGEST}")
        entries[entry.name] = entry
    return entries


def fetched(word: str) -> Path:
    """Return the folder of an encoder of the zoo: that of an earlier call, or fetched now and verified.

    Where the index cannot be had, what was fetched last under this name is taken.

    Args:
        word: Name, with or without `zoo:` before it.

    Raises:
        CheckpointError: There is none of that name, it cannot be had, or its bytes are not those of the
            index.
    """
    name = word.removeprefix(ZOO)
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{ZOO}{name}: is no name: use a to z, digits, - and _")
    folder = cache_folder() / "zoo"
    try:
        entries = read_index()
    except CheckpointError:
        earlier = sorted(folder.glob(f"{name}.*"), key=lambda path: path.stat().st_mtime)
        if not earlier:
            raise
        return earlier[-1]
    if name not in entries:
        known = ", ".join(sorted(entries)) or "none"
        raise CheckpointError(
            f"{ZOO}{name}: no encoder of that name in {index_place()}; there are: {known}"
        )
    entry = entries[name]
    place = folder / f"{name}.{entry.sha256[:16]}"
    if not place.is_dir():
        content = _verified(entry)
        try:
            with whole_folder(place) as temporary:
                _unpack(content, temporary, f"{ZOO}{name}")
        except OSError as error:
            raise CheckpointError(f"{place}: cannot be written: {error.strerror or error}") from error
    return place


def _verified(entry: ZooEntry) -> bytes:
    """Fetch an archive and compare its bytes with the index."""
    place = urljoin(index_place(), entry.file)
    content = _bytes(place, entry.bytes)
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry.sha256:
        raise CheckpointError(
            f"{place}: has {len(content)} bytes with SHA-256 {digest[:16]}…, the index says {entry.bytes} "
            f"with {entry.sha256[:16]}…: refused; ask who keeps the index"
        )
    return content


def _bytes(place: str, most: int) -> bytes:
    """Read a URL of at most so many bytes.

    Raises:
        CheckpointError: It cannot be read, or is larger.
    """
    if urlsplit(place).scheme not in ("http", "https", "file"):
        raise CheckpointError(f"{place}: only https, http and file are fetched")
    try:
        with urlopen(place, timeout=_SECONDS) as answer:
            content: bytes = answer.read(most + 1)
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise CheckpointError(f"{place}: cannot be fetched: {reason}") from error
    if len(content) > most:
        raise CheckpointError(f"{place}: is larger than the {most} bytes that it may have")
    return content


def _unpack(content: bytes, folder: Path, where: str) -> None:
    """Write the files of an archive: plain files without folders, no more than there is room for."""
    left = _UNPACKED_BYTES
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                left -= member.size
                if not member.isfile() or not _FILE.fullmatch(member.name) or left < 0:
                    raise CheckpointError(
                        f"{where}: {member.name!r} in its archive is no file of an encoder"
                    )
                file = archive.extractfile(member)
                assert file is not None
                (folder / member.name).write_bytes(file.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise CheckpointError(f"{where}: its archive is damaged ({error})") from error


def pack_archive(folder: Path, archive: Path) -> bytes:
    """Pack the files of an encoder's folder, the same bytes for the same files, and return them.

    Args:
        folder: Folder of the encoder.
        archive: File to write.

    Raises:
        CheckpointError: The archive would be too large; nothing is written then.
        OSError: It cannot be written.
    """
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name)):
            if not path.is_file():
                continue
            member = tarfile.TarInfo(path.name)
            member.size, member.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                tar.addfile(member, file)
    content = gzip.compress(raw.getvalue(), mtime=0)
    if len(content) > LARGEST:
        raise CheckpointError(
            f"{folder}: packed it has {len(content)} bytes, at most {LARGEST} are possible: use a narrower "
            "encoder"
        )
    with whole_file(archive) as temporary:
        temporary.write_bytes(content)
    return content
