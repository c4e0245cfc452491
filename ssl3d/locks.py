"""Locks of jobs: files that one process holds, on one machine or on many that share a folder.

Network file systems often lack `fcntl` locks. A lock is therefore a file that one process alone can make;
its holder touches it now and then, and a holder that is dead or silent loses it. Clocks of machines differ:
the file server's dates are compared with its own clock, and a date that stands still with a monotonic one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from ssl3d.files import time_of
from ssl3d.json_files import parse_json

BEAT = 20.0
"""Seconds between two signs of life of a running job."""
SILENT = 180.0
"""Seconds without a sign of life after which another machine takes the job."""
WAIT = 5.0
"""Seconds between two looks, when other processes hold all the jobs that are left."""

_held: dict[Path, str] = {}
"""Locks that this process took, with the text that it wrote into them."""
_watched: dict[Path, tuple[int, float]] = {}
"""Locks of others: the date last seen, and the monotonic time at which it was first seen."""


def take(lock: Path) -> bool:
    """Try to take a lock, from a dead or silent holder too, and return whether it is ours.

    Args:
        lock: File of the lock, in a folder that exists.

    Raises:
        OSError: The file cannot be written.
    """
    token = secrets.token_hex(8)  # the number of a process may come again
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": token})
    with contextlib.suppress(FileNotFoundError):
        if _abandoned(lock) and not _broken(lock, token):
            return False
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(mine)
    except FileExistsError:
        return False
    _held[lock] = mine
    return True


def release(lock: Path) -> None:
    """Remove a lock if it is still ours; after a long silence the job has a new holder."""
    with contextlib.suppress(OSError):
        if _is_ours(lock):
            lock.unlink()
    _held.pop(lock, None)


@contextlib.contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Hold a lock of ours: touch it now and then, as a sign of life, and release it at the end."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT):
            with contextlib.suppress(OSError):
                if _is_ours(lock):
                    os.utime(lock)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        release(lock)


def _is_ours(lock: Path) -> bool:
    return lock in _held and lock.read_text(encoding="utf-8") == _held[lock]


def _broken(lock: Path, token: str) -> bool:
    """Remove an abandoned lock; return False where a live one had come in its place.

    Raises:
        FileNotFoundError: Another process was faster.
    """
    # It is renamed before it is removed: of two processes that find it abandoned, one succeeds.
    grave = lock.with_name(f"{lock.name}.{token}")
    lock.rename(grave)
    if lock in _watched:
        _watched[grave] = _watched.pop(lock)
    try:
        if _abandoned(grave):
            return True
        # Another process had broken it already, and this is its lock; a third that came now keeps its own.
        with contextlib.suppress(FileExistsError):
            try:
                os.link(grave, lock)
            except (PermissionError, NotImplementedError):  # a file system without links
                with lock.open("x", encoding="utf-8") as file:
                    file.write(grave.read_text(encoding="utf-8"))
        return False
    finally:
        _watched.pop(grave, None)
        grave.unlink()


def _abandoned(lock: Path) -> bool:
    """Return whether the holder of a lock is dead (on this machine) or silent (on any)."""
    silent = _silence(lock)
    try:
        holder = parse_json(lock.read_bytes())
        host, number = holder["host"], holder["pid"]
    except (OSError, ValueError, KeyError, TypeError):  # being written, cut short, or of something else
        return silent > BEAT
    if type(host) is not str or type(number) is not int or number < 1:
        return silent > BEAT
    if host == socket.gethostname():
        try:
            os.kill(number, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass
    return silent > SILENT


def _silence(lock: Path) -> float:
    """Return for how many seconds the holder of a lock has given no sign of life."""
    state = lock.stat()
    now = time.monotonic()
    if _watched.get(lock, (0, 0.0))[0] != state.st_mtime_ns:
        _watched[lock] = state.st_mtime_ns, now
    return max(time_of(lock.parent) - state.st_mtime, now - _watched[lock][1])
