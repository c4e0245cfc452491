"""Locks of jobs: files that one process holds, on one machine or on many that share a folder.

Not `fcntl` locks, which network file systems often do without: a file that is made by one alone, touched
now and then by who holds it, and taken from a holder who is dead or silent.
"""

from __future__ import annotations

import contextlib
import json
import os
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


def take(lock: Path) -> bool:
    """Whether the lock is now ours. One whose holder is dead or silent is broken.

    Args:
        lock: The file, in a folder that is there.

    Raises:
        OSError: It cannot be written.
    """
    mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    with contextlib.suppress(FileNotFoundError):
        if _abandoned(lock):
            # Renamed before it goes: of two who find it abandoned, one succeeds.
            grave = lock.with_name(f"{lock.name}.{socket.gethostname()}.{os.getpid()}")
            lock.rename(grave)
            grave.unlink()
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(mine)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def holding(lock: Path) -> Iterator[None]:
    """Touches a lock of ours now and then, so that others see that its holder lives; then lets it go."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(lock)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)


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
