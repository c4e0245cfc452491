"""Files that appear whole or not at all: written beside their place, flushed, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from ssl3d.errors import FULL_DISK

NOT_OURS = (*FULL_DISK, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO)
"""Errors of the machine that no traceback explains better than their own words."""


def check_regular(path: Path) -> None:
    """Refuse a pipe or a device, which may give nothing for ever, or never end.

    What a shell hands over as /dev/fd/N is read.

    Raises:
        OSError: It is one, or the path cannot be looked at.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    handed_over = path.parent in (Path("/dev/fd"), Path("/proc/self/fd")) or path == Path("/dev/stdin")
    if not (handed_over and stat.S_ISFIFO(mode)):
        raise OSError(errno.EINVAL, "no file, but a pipe or a device", str(path))


@contextlib.contextmanager
def whole_file(path: Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path that takes the place of a file when the block ends, or is removed if it fails.

    Folders that are missing are made. What a killed process of this machine left of the same file goes.

    Args:
        path: Place of the file; one that is there is replaced.
        sync: Whether the file must last through a power cut from here on.

    Raises:
        OSError: The file cannot be written; the caller knows what to say.
    """
    here = _begin(path)
    temporary = path.with_name(f"{here}{os.getpid()}-{os.urandom(2).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent, here)
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _begin(path: Path) -> str:
    """Return how this machine's processes begin the names of what is to become a file or folder."""
    return f".{path.name}.{zlib.crc32(socket.gethostname().encode()) & 0xFFFF:04x}-"


def _remove_abandoned(folder: Path, begin: str) -> None:
    """Remove what processes left that ended without doing so; a folder that was moved aside comes back."""
    if os.name == "nt":  # where signal 0 is no question
        return
    for name in os.listdir(folder):
        number = name[len(begin) :].partition("-")[0]
        if name.startswith(begin) and name.endswith((".tmp", ".old")) and number.isdigit():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                with contextlib.suppress(OSError):
                    _give_up(folder / name)
            except OSError:  # it is there, and another user's
                continue


def _give_up(left: Path) -> None:
    """Remove a temporary file or folder; put back a folder whose successor never came.

    Raises:
        OSError: It cannot be moved or removed.
    """
    place = left.with_name(left.name[1:].rpartition(".")[0].rpartition(".")[0])
    if left.suffix == ".old" and not place.exists():
        left.rename(place)
    elif left.is_dir():
        shutil.rmtree(left)
    else:
        left.unlink()


def write_whole(path: Path, content: str | bytes, sync: bool = False) -> None:
    """Write a file so that nobody ever reads it half written.

    Args:
        path: Place of the file; one that is there is replaced, and folders that are missing are made.
        content: Bytes, or a text that is written as UTF-8.
        sync: Whether the file must last through a power cut from here on.

    Raises:
        OSError: The file cannot be written; the caller knows what to say.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp(), "notes", "first.txt")
        >>> write_whole(place, "whole")
        >>> place.read_text(), [path.name for path in place.parent.iterdir()]
        ('whole', ['first.txt'])
    """
    with whole_file(path, sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def time_of(folder: Path) -> float:
    """Return the time by the clock that dates the files of a folder, which may be a file server's.

    Args:
        folder: Folder that exists.

    Raises:
        OSError: The folder cannot be written to.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
        file.write(b"\0")  # some systems date an empty file by their own clock
        file.flush()
        return os.fstat(file.fileno()).st_mtime


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of another when the block ends, or is removed if it fails.

    At every moment one of the two is whole: what a process leaves that is killed between the renames, the
    next one puts back.

    Args:
        path: Place of the folder; one that is there is replaced.

    Raises:
        OSError: The folder cannot be written; the caller knows what to say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begin = _begin(path)
    here = f"{begin}{os.getpid()}-{os.urandom(2).hex()}"
    temporary, old = path.with_name(f"{here}.tmp"), path.with_name(f"{here}.old")
    try:
        _remove_abandoned(path.parent, begin)
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut; not every system can open a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
