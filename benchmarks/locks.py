"""Locks of jobs: files that one process holds, on one machine or on many that share a folder.

Not `fcntl` locks, which network file systems often do without: a file that is made by one alone, touched
now and then by who holds it, and taken from a holder who is dead or silent.
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

BEAT = 20.0
"""Seconds between two signs of life of a job in work."""
SILENT = 180.0
"""Seconds without one after which another machine takes the job."""
WAIT = 5.0
"""Seconds between two looks, when all that is left is in the hands of others."""

_held: dict[Path, str] = {}
"""Locks that this process took, and what it wrote into them."""


def take(lock: Path) -> bool:
    """Whether the lock is now ours. One whose holder is dead or silent is broken.

    Args:
        lock: The file, in a folder that is there.

    Raises:
        OSError: It cannot be written.
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
    """Lets a lock go, if it is still ours: the job of one who was silent for long has a new holder."""
    with contextlib.suppress(OSError):
        if _is_ours(lock):
            lock.unlink()
    _held.pop(lock, None)


@contextlib.contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Touches a lock of ours now and then, so that others see that its holder lives; then lets it go."""
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
    """Takes away a lock that was found abandoned; False if a live one had come in its place.

    Raises:
        FileNotFoundError: Another was faster.
    """
    # Renamed before it goes: of two who find it abandoned, one succeeds.
    grave = lock.with_name(f"{lock.name}.{token}")
    lock.rename(grave)
    try:
        if _abandoned(grave):
            return True
        # Another had broken it already, and this is its own. Who came in this moment keeps what it took.
        with contextlib.suppress(FileExistsError):
            try:
                os.link(grave, lock)
            except (PermissionError, NotImplementedError):  # a file system without links
                with lock.open("x", encoding="utf-8") as file:
                    file.write(grave.read_text(encoding="utf-8"))
        return False
    finally:
        grave.unlink()


def _abandoned(lock: Path) -> bool:
    """Whether the holder of a lock is dead (on this machine) or silent (on any)."""
    silent = time.time() - lock.stat().st_mtime
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # being written, or cut short
        return silent > BEAT
    if holder.get("host") == socket.gethostname():
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return silent > SILENT
