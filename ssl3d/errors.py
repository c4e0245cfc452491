"""The errors that a user can act on: one line each, exit status 2; and what is no fault of the data."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator


class Ssl3dError(Exception):
    """Root of every error that this toolkit raises on purpose.

    The command line prints the message as one line, without a traceback, and exits with `exit_status`.
    """

    exit_status = 2


class UsageError(Ssl3dError):
    """A flag or an option has a value that cannot be used."""


class DataError(Ssl3dError):
    """A scan, a folder or a store cannot be used."""


class CheckpointError(Ssl3dError):
    """A run folder, a checkpoint or an encoder file cannot be used."""


class PluginError(Ssl3dError):
    """A proxy, an encoder, a benchmark or a command is unknown or does not import."""


class TrainingError(Ssl3dError):
    """Training cannot go on, such as a loss that is not finite."""

    exit_status = 1


class TransientError(Ssl3dError):
    """Memory, the disk, a process or the network failed, and no data are to blame: call again."""

    exit_status = 3


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more, or of a limit of files (`ulimit -f`)."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as torch says it
_TRANSIENT = frozenset(
    (*FULL_DISK, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.EINTR,
     errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENOBUFS, errno.ECONNABORTED, errno.ECONNREFUSED,
     errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
     errno.ENOTCONN)
)  # fmt: skip


def is_full(error: BaseException) -> bool:
    """Tell whether an error is one of a full disk, or of a quota that is used up."""
    return _code(error) in FULL_DISK


def is_transient(error: BaseException) -> bool:
    """Tell whether an error says nothing of a file but that memory, disk, descriptors or network failed.

    Example:
        >>> is_transient(OSError(24, "Too many open files")), is_transient(FileNotFoundError(2, "gone"))
        (True, False)
    """
    return is_out_of_memory(error) or _code(error) in _TRANSIENT


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is one of memory, of torch's devices too.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
        True
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)


def not_written(error: OSError, message: str) -> Ssl3dError:
    """Make the error of something that cannot be written.

    Returns:
        TransientError where the machine failed, as where a disk is full; else UsageError, of a place that
        takes no files.
    """
    return TransientError(message) if is_transient(error) else UsageError(message)


@contextlib.contextmanager
def transient_reported(subject: str, advice: str = "call again") -> Iterator[None]:
    """Raise errors that are no fault of the data as one line.

    Args:
        subject: Subject of the line.
        advice: End of the line.

    Raises:
        TransientError: Such an error was raised in the block.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        if not is_transient(error):
            raise
        reason = "no space left on the disk" if is_full(error) else reason_of(error)
        raise TransientError(f"{subject}: {reason}; {advice}") from error


def reason_of(error: BaseException) -> str:
    """Return what an error says, on one line."""
    if is_out_of_memory(error):
        return "out of memory"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _code(error: BaseException) -> int | None:
    """Return the system's number of an error; HDF5 has it in its text only."""
    if not isinstance(error, OSError):
        return None
    match = re.search(r"errno = (\d+)", str(error))
    return int(match[1]) if match else error.errno
