"""The memory that a command may take, told by `--max-memory` and compared before a large piece is taken."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from ssl3d.amounts import size
from ssl3d.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np

VARIABLE = "SSL3D_MAX_MEMORY"
"""Environment variable with the budget, for commands that a command starts, too."""

FLAG = "--max-memory"

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}
_SMALL = 1 << 26  # bytes for which nobody asks how many are free, where no budget was told
_share: ContextVar[int | None] = ContextVar("share", default=None)


class TooLarge(DataError):
    """Something needs more memory than the budget."""


def parse_size(text: str, name: str = FLAG) -> int:
    """Parse a number of bytes, such as 8GB, 500M or 1.5 GiB.

    Args:
        text: Number with its unit.
        name: Option or variable that holds it, for the message.

    Raises:
        UsageError: The text is no such number, or it is 0.

    Example:
        >>> parse_size("8GB"), parse_size("1.5 GiB"), parse_size("500000")
        (8000000000, 1610612736, 500000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]I?)?B?", text.strip().upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        raise UsageError(f"{name} {text}: expected a number of bytes above 0, such as 8GB or 500MB")
    return count


def allow(text: str) -> None:
    """Set the budget of this process and of all that it starts.

    Raises:
        UsageError: The text is no number of bytes.
    """
    parse_size(text)
    os.environ[VARIABLE] = text


def budget() -> int:
    """Return the bytes that may be taken at once: as told, else half of what is free.

    Within `sharing` it is the share of this task.

    Raises:
        UsageError: The environment variable holds no number of bytes.
    """
    share = _share.get()
    if share is not None:
        return share
    allowed = os.environ.get(VARIABLE)
    return parse_size(allowed) if allowed else free() // 2


@contextlib.contextmanager
def sharing(share: int | None) -> Iterator[None]:
    """Make the budget a share of it in the block; None leaves it as it is."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def check(needed: int, subject: str = "") -> None:
    """Refuse to take more memory than the budget.

    Args:
        needed: Bytes that are about to be taken.
        subject: Beginning of the message of an error.

    Raises:
        TooLarge: They are more than the budget.
    """
    if needed > _SMALL or os.environ.get(VARIABLE) or _share.get() is not None:
        most = budget()
        if needed > most:
            raise TooLarge(f"{subject}needs {size(needed)} of memory, more than the {size(most)} of {FLAG}")


def check_mapping(needed: int, subject: str = "") -> None:
    """Refuse to map more of a file than this process has addresses for; it takes no memory.

    Args:
        needed: Bytes of the file.
        subject: Beginning of the message of an error.

    Raises:
        TooLarge: They are more than `ulimit -v` leaves.
    """
    most = min(_own_free(), default=needed)
    if needed > most:
        raise TooLarge(
            f"{subject}needs {size(needed)} of addresses, and `ulimit -v` leaves {size(max(most, 0))}"
        )


@contextlib.contextmanager
def bounded(room: int) -> Iterator[None]:
    """Let this process take no more than some bytes beside what it has, where the system can see to that.

    It is for readers of other makers, which take memory for whatever a damaged file asks for.

    Args:
        room: Bytes of addresses; to a reader, more are out of memory.
    """
    try:
        import resource

        limits = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError, ValueError, IndexError):
        yield
        return
    most = pages * resource.getpagesize() + room
    if limits[0] != resource.RLIM_INFINITY:
        most = min(most, limits[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def fits(needed: int) -> bool:
    """Tell whether bytes that are about to be taken are within the budget."""
    try:
        check(needed)
    except TooLarge:
        return False
    return True


def held(array: np.ndarray) -> int:
    """Return the bytes of memory that an array keeps; of one that is mapped from a file none."""
    import numpy as np  # not for the help of the command line

    owner = array
    while isinstance(owner, np.ndarray) and owner.base is not None and not isinstance(owner, np.memmap):
        owner = owner.base
    if isinstance(owner, np.memmap):
        return 0
    return owner.nbytes if isinstance(owner, np.ndarray) else array.nbytes


def free() -> int:
    """Return the bytes that this process may still take, by the machine, its cgroups and its own limit."""
    return max(min([_machine_free(), *_cgroups_free(), *_own_free()]), 0)


# ------------------------------------------------------------------------------------------------


def _machine_free() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroups_free(
    root: Path = Path("/sys/fs/cgroup"), about: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """List what is left in each cgroup above this process that has a limit, of version 1 or 2."""
    left = []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in about.read_text(encoding="utf-8").splitlines():
            _, kinds, place = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            most, used, cached = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                if kinds
                else ("memory.max", "memory.current", "inactive_file")
            )
            top = root / kinds
            folder = top / place.lstrip("/")
            for group in (folder, *folder.parents):
                if not group.is_relative_to(top):
                    break
                with contextlib.suppress(OSError, ValueError):  # "max": no limit
                    limit = int((group / most).read_text(encoding="ascii"))
                    taken = int((group / used).read_text(encoding="ascii"))
                    # Files that were read count as taken, and are dropped when memory is short.
                    counts = (group / "memory.stat").read_text(encoding="ascii")
                    files = re.search(rf"^{cached} (\d+)", counts, re.MULTILINE)
                    left.append(limit - taken + (int(files[1]) if files else 0))
    return left


def _own_free() -> list[int]:
    """List what is left of this process's own limit of addresses (`ulimit -v`), if it has one."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return []
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return [limit - pages * resource.getpagesize()]
    return [limit]
