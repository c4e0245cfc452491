"""Records as files of a folder or in one compressed archive: listed and read alike, and packed.

An archive is a tar file compressed by xz. Where a record repeats what others say, the archive holds it
once, and every other tool reads it: `tar tJf records.tar.xz` lists it, `tar xJf` gives the folder back.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

from ssl3d import memory
from ssl3d.errors import DataError, UsageError
from ssl3d.files import whole_file

ARCHIVE = "records.tar.xz"
"""Name of the archive that stands for the records of a folder."""
SUFFIX = ".tar.xz"
UNPACKED = 2**28
"""Most bytes that an archive may unpack to; a small file can be made to unpack to a full memory."""
MEMORY = 2**27
"""Most bytes that xz may ask for its dictionary: twice as much as its highest preset does."""
STEP = 2**20
_PARSED = 12  # bytes of memory that a byte of JSON takes once it is parsed
SKIPPED = ("partial", ".jobs", "work")
MODEL = "model.json"
"""Folders whose JSON files are no records."""
PACKED = (".json", "table.txt")
"""Endings of the files that are packed: the records, and the table that a command printed of them."""
_RECORD = re.compile(r".+-[0-9a-f]{8}\.json")  # as `Result.filename` has it: other JSON lies beside scans


def record_files(folder: Path, endings: tuple[str, ...] = (".json",)) -> list[Path]:
    """Return the paths of all JSON files below a folder or in an archive, in the order of their names.

    An archive is listed as a folder: its file `cardiac/a.json` has the path
    `records.tar.xz/cardiac/a.json`, which `record_bytes` and `read_result` read. A file that lies where a
    file of an archive would be unpacked stands for that one. An archive that cannot be read is listed
    itself, and `record_bytes` raises what is wrong with it.

    Args:
        folder: A folder, in which every `records.tar.xz` is read, or one archive of any name.
        endings: What the names of the listed files end in.

    Raises:
        UsageError: There is no such folder or archive.
    """
    if not folder.is_dir() and _archive_of(folder) != folder:
        raise UsageError(f"{folder}: no such folder of records, or archive ({SUFFIX}) of them")
    there = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    paths: dict[Path, Path] = {}
    for path in there:
        if path == folder or path.name == ARCHIVE:
            paths |= _listed(path, endings)
    # To open a pipe is to wait for ever; a link that leads nowhere is listed, and told of by its reader.
    plain = (path for path in there if path.is_file() or not path.exists())
    paths |= {path: path for path in plain if path.name.endswith(endings)}
    return [paths[place] for place in sorted(paths) if not _skipped(paths[place].relative_to(folder))]


def result_files(path: Path) -> list[Path]:
    """Return the files below a folder, or in an archive, that are called as records are."""
    if path.is_file():
        return record_files(path) if path.name.endswith(ARCHIVE) else []
    return [place for place in record_files(path) if _RECORD.fullmatch(place.name)]


def record_bytes(path: Path) -> bytes:
    """Return the content of a file that `record_files` lists.

    Raises:
        DataError: The archive that the path names, or leads into, is damaged.
        OSError: There is no such file, or it cannot be read.
    """
    archive = _archive_of(path)
    if archive is None:
        memory.check(_PARSED * path.stat().st_size, f"{path}: ")
        return path.read_bytes()
    content = _read(archive).get(path.relative_to(archive).as_posix())
    if content is None:
        raise FileNotFoundError(2, "no such file in the archive", str(path))
    return content


def unpacked_place(path: Path) -> Path:
    """Return where a file of an archive lies after unpacking beside it, and any other path as it is."""
    archive = _archive_of(path)
    return path if archive is None else archive.parent / path.relative_to(archive)


def find_record(name: str, folder: Path) -> Path | None:
    """Return the path of a record: a file of the folder, or a file of an archive in it or in the one above.

    Raises:
        DataError: The archive is damaged: what it holds would be computed again.
    """
    if (folder / name).is_file():
        return folder / name
    own = Path(os.path.abspath(folder))
    for path in (own / ARCHIVE / name, own.parent / ARCHIVE / own.name / name):
        archive = _archive_of(path)
        if archive is not None and path.relative_to(archive).as_posix() in _read(archive):
            return path
    return None


def pack_records(folder: Path, remove: bool = False) -> tuple[Path, int]:
    """Write the records of a folder, those of its archives too, into its `records.tar.xz`.

    The same files make the same bytes (with the same version of liblzma). The archive is read back before
    it takes its place.

    Args:
        folder: Folder of the records, of one suite.
        remove: Whether to remove the files that the archive now holds, and the folders left empty.

    Returns:
        The path of the archive, and the number of files in it.

    Raises:
        UsageError: There is no such folder, no record in it, or the archive cannot be written.
        DataError: An archive in the folder is damaged, or the records exceed what an archive may hold.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of records")
    paths = {unpacked_place(path): path for path in record_files(folder, PACKED)}
    archive = folder / ARCHIVE
    try:
        contents = {
            place.relative_to(folder).as_posix(): record_bytes(path) for place, path in paths.items()
        }
        if not contents:
            raise UsageError(f"{folder}: no record to pack")
        data = _tar(contents)
        if len(data) > UNPACKED:
            raise DataError(
                f"{folder}: {len(data)} bytes, an archive holds {UNPACKED}: pack its folders apart"
            )
        with whole_file(archive) as partial:
            partial.write_bytes(lzma.compress(data))
            if _members(partial, partial.stat().st_mtime_ns, partial.stat().st_size) != contents:
                raise DataError(f"{partial}: reads back otherwise than it was written")
        if remove:
            _remove(folder, contents)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""  # a full disk names no file
        raise UsageError(f"cannot pack {folder}: {error.strerror}{where}") from error
    return archive, len(contents)


def _refused(archive: Path, why: str) -> DataError:
    return DataError(f"{archive}: archive refused: {why}")


def _listed(archive: Path, endings: tuple[str, ...]) -> dict[Path, Path]:
    """Return the files of an archive by their place after unpacking; the archive itself if refused."""
    try:
        names = list(_read(archive))
    except DataError:
        return {archive: archive}
    return {archive.parent / name: archive / name for name in names if name.endswith(endings)}


def _skipped(below: Path) -> bool:
    folders = below.parts[:-1]
    return below.name == MODEL or any(part.startswith(".") or part in SKIPPED for part in folders)


def _archive_of(path: Path) -> Path | None:
    """Return the archive that a path names or leads into."""
    for place in (path, *path.parents):
        if place.name.endswith(SUFFIX) and place.is_file():
            return place
    return None


def _read(archive: Path) -> Mapping[str, bytes]:
    """Return the files of an archive by their names; read once until the archive changes."""
    try:
        now = archive.stat()
        return _members(archive, now.st_mtime_ns, now.st_size)
    except OSError as error:
        raise DataError(f"{archive}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=2)
def _members(archive: Path, changed: int, size: int) -> Mapping[str, bytes]:
    data = _decompressed(archive)
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = _checked(archive, member, contents)
                contents[name] = data[member.offset_data : member.offset_data + member.size]
                if len(contents[name]) != member.size:
                    raise _refused(archive, f"{name} is cut short")
            rest = data[tar.offset :]
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise _refused(archive, f"no tar file: {' '.join(str(error).split())}") from error
    # At a header that it cannot read, tarfile ends as at the end: two blocks of zeros, and zeros only.
    if len(rest) < 2 * tarfile.BLOCKSIZE or rest.count(0) != len(rest):
        raise _refused(archive, f"it does not end as a tar file after {len(contents)} files")
    return contents


def _checked(archive: Path, member: tarfile.TarInfo, contents: Mapping[str, bytes]) -> str:
    """Return the name of a member that is a plain file inside the folder, and the first of its name."""
    name, shown = str(PurePosixPath(member.name)), ascii(member.name)
    place = PureWindowsPath(name)  # it knows every way to lead out, those of other systems too
    if not member.isreg() or member.issparse() or member.size < 0:
        raise _refused(archive, f"{shown} is no plain file")
    if place.anchor or ".." in place.parts or not place.parts or not name.isprintable():
        raise _refused(archive, f"{shown} leads out of the folder, or is no name")
    if name in contents:
        raise _refused(archive, f"{shown} is in it twice")
    return name


def _decompressed(archive: Path) -> bytes:
    """Return the tar file of an archive; xz checks its sums."""
    xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)
    parts: list[bytes] = []
    size = 0
    with archive.open("rb") as file:
        while not xz.eof:
            given = file.read(STEP) if xz.needs_input else b""
            if xz.needs_input and not given:
                raise _refused(archive, "it is cut short")
            try:
                parts.append(xz.decompress(given, STEP))
            except lzma.LZMAError as error:
                raise _refused(archive, f"no xz file, or a changed one: {error}") from error
            size += len(parts[-1])
            if size > UNPACKED:
                raise _refused(archive, f"it unpacks to more than {UNPACKED} bytes")
        if xz.unused_data or file.read(1):
            raise _refused(archive, "something stands after its end")
    return b"".join(parts)


def _tar(contents: Mapping[str, bytes]) -> bytes:
    """Return a tar file of files that have no owner and no time, in the order of their names."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def _remove(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Remove the files that are as they were packed, and the folders that this leaves empty."""
    for name, content in contents.items():
        path = folder / name
        if path.is_file() and path.read_bytes() == content:
            path.unlink()
            for parent in path.parents:
                if parent == folder or any(parent.iterdir()):
                    break
                parent.rmdir()
