"""Stores on object storage or a web server, read by blocks that are kept on the local disk.

fsspec speaks to the server: `s3://`, `gs://`, `az://`, `https://` and what else it knows, with the
credentials and options of its own configuration (`FSSPEC_S3_ENDPOINT_URL` and the like).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import os
import random
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import sleep
from typing import Any, TypeVar

from ssl3d.data.cache import cache_folder
from ssl3d.errors import DataError, TransientError, UsageError, reason_of
from ssl3d.files import whole_file
from ssl3d.memory import parse_size

VARIABLE = "SSL3D_REMOTE_CACHE"
"""Environment variable with the bytes of the local disk that blocks of remote files may take."""

BLOCK = 1 << 20
"""Bytes of a block, which is fetched and kept whole: several chunks of a store, and one request."""

DEFAULT_BOUND = 20 * 10**9
"""Bytes of the local disk that blocks may take where nothing else is told."""

TRIES = 5
"""Number of times that a request is sent before the call fails."""

SECONDS = 60.0
"""Time after which a request that has no answer is sent again."""

_KEPT = 16  # blocks that a process keeps in memory: HDF5 reads what describes a data set in small pieces
_TOGETHER = 16  # stores asked for at the same time
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?=[^/])")

T = TypeVar("T")


def is_address(path: str | Path) -> bool:
    """Tell whether a path names a file on a server, such as `s3://bucket/scans.h5`.

    Example:
        >>> is_address("s3://bucket/scans.h5"), is_address("scans.h5"), is_address("C:/scans.h5")
        (True, False, False)
    """
    text = str(path)
    return _ADDRESS.match(text) is not None and ("://" in text or not Path(text).exists())


@dataclass(frozen=True)
class Remote:
    """A file on a server, with as much of the interface of a path as a store asks for.

    Attributes:
        url: Address of the file, such as `s3://bucket/scans.h5`.
    """

    url: str

    @classmethod
    def of(cls, address: str | Path) -> Remote:
        """Make one of an address, of which a Path may have taken a slash."""
        return cls(_ADDRESS.sub(r"\1://", str(address), count=1))

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.url.split("?")[0].rstrip("/").rsplit("/", 1)[-1]

    def absolute(self) -> Remote:
        """Return the address itself."""
        return self

    resolve = absolute

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the server says of the file: its size, and what changes when the file does.

        Raises:
            DataError: There is no such file, it may not be read, or its size is not told.
            TransientError: The server does not answer.
        """
        status = asked(self.url, lambda server, path: server.info(path))
        if status.get("type") == "directory" or status.get("size") is None:
            reason = (
                "a folder, not a store" if status.get("type") == "directory" else "the server tells no size"
            )
            raise DataError(f"{self.url}: {reason}")
        return status

    @property
    def state(self) -> tuple[int, int, int]:
        """Numbers that change when the file does, like a local file's status: 0, a hash, its size."""
        marks = [
            str(self.about.get(key))
            for key in ("ETag", "etag", "LastModified", "mtime", "updated", "generation")
        ]
        mark = hashlib.blake2b("\0".join(marks).encode(), digest_size=6).digest()
        return 0, int.from_bytes(mark, "big"), int(self.about["size"])

    def opened(self) -> RemoteFile:
        """Open the file for reading."""
        return RemoteFile(self.url, self.state)


def stores_at(address: str | Path, suffixes: tuple[str, ...]) -> list[Remote]:
    """List the stores at an address: itself, or those in the folder that it names.

    Args:
        address: Address of a store or of a folder.
        suffixes: Endings of the names of stores.

    Raises:
        DataError: There is nothing, or a folder without stores.
        TransientError: The server does not answer.
    """
    remote = Remote.of(address)
    if remote.name.lower().endswith(suffixes):
        return [remote]
    names = asked(
        remote.url, lambda server, path: [server.unstrip_protocol(entry) for entry in server.find(path)]
    )
    stores = [Remote(name) for name in sorted(names) if name.lower().endswith(suffixes)]
    if not stores:
        raise DataError(
            f"{remote}: no stores ({suffixes[0]}) there; scans are prepared on a local disk "
            "(ssl3d prepare), and the store is copied to the server"
        )
    _fetch_ends(stores)
    return stores


def _fetch_ends(stores: list[Remote]) -> None:
    """Fetch what opening many stores reads of each, the first and the last block, several at a time."""
    if len(stores) < 2:
        return

    def fetch(store: Remote) -> None:
        with contextlib.suppress(DataError), store.opened() as file:  # opening it says what is wrong
            for whence in (io.SEEK_SET, io.SEEK_END):
                file.seek(-min(1, store.state[2]) if whence else 0, whence)
                file.read(1)

    with ThreadPoolExecutor(_TOGETHER) as pool:
        for _ in pool.map(fetch, stores):
            pass


def asked(url: str, question: Callable[[Any, str], T]) -> T:
    """Ask a server, again and at growing intervals where it fails for a while.

    Args:
        url: Address of the file.
        question: Function of fsspec's file system and of the path there.

    Raises:
        DataError: There is no such file, or it may not be read.
        TransientError: The server does not answer.
        UsageError: The package that speaks to such servers is not installed.
    """
    protocol = url.split("://", 1)[0]
    try:
        import fsspec
        from fsspec.core import url_to_fs

        server, path = url_to_fs(url, **_patience(protocol))
    except ImportError as error:
        raise UsageError(
            f"{url}: {reason_of(error)}; pip install 'ssl3d[remote]' brings s3 and https"
        ) from error
    except ValueError as error:
        known = ", ".join(sorted(fsspec.available_protocols())[:12])
        raise UsageError(f"{url}: {reason_of(error)}; known are {known} and others") from error
    last: BaseException
    for attempt in range(1, TRIES + 1):
        try:
            with _no_collection():
                return question(server, path)
        except FileNotFoundError as error:
            if error.__cause__ is None or _status(error) in (404, 410):
                raise DataError(f"{url}: no such file on the server") from error
            last = error.__cause__  # fsspec says so of a server that does not answer, too
        except PermissionError as error:
            raise DataError(
                f"{url}: the server refuses to let it be read ({reason_of(error)}); give the credentials "
                "as fsspec takes them, in its configuration or in the environment"
            ) from error
        except Exception as error:  # each server has errors of its own
            last = error
        if _status(last) in (400, 401, 403, 404, 410, 416):
            raise DataError(f"{url}: the server refuses ({_status(last)}: {reason_of(last)})") from last
        if attempt < TRIES:
            sleep(0.2 * 3 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise TransientError(
        f"{url}: the server does not answer, asked {TRIES} times ({type(last).__name__}: "
        f"{reason_of(last)}); call again"
    ) from last


_counting = threading.Lock()
_waiting: list[bool] = []  # one for each question that is asked just now: is garbage collected after it?


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep cyclic garbage until the server has answered.

    h5py holds its lock while it reads through a file object, and takes the same lock to free an object of
    its own. fsspec asks in a thread: were garbage collected there, both would wait for each other for ever.
    """
    with _counting:
        _waiting.append(_waiting[0] if _waiting else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _counting:
            if _waiting.pop() and not _waiting:
                gc.enable()


def _patience(protocol: str) -> dict[str, Any]:
    """Return the options by which a server's library gives a silent request up."""
    if protocol in ("http", "https"):
        import aiohttp

        return {
            "client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=SECONDS / 4, sock_read=SECONDS)}
        }
    if protocol in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": SECONDS / 4, "read_timeout": SECONDS}}
    return {}


def _status(error: BaseException) -> int | None:
    """Return the number of the HTTP answer that an error is about, as aiohttp and botocore keep it."""
    for at in (error, error.__cause__):
        status = getattr(at, "status", None)
        if status is None:
            answer = getattr(at, "response", None)
            status = (
                answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
                if isinstance(answer, dict)
                else None
            )
        if isinstance(status, int):
            return status
    return None


class RemoteFile(io.RawIOBase):
    """A file on a server, open for reading, whose blocks are fetched once and kept on the local disk.

    Every process may have one over the same file; they share what is on the disk. A block that was dropped
    there is fetched again.

    Args:
        url: Address of the file.
        state: State of the file when it was first asked for, the last number its size.
    """

    def __init__(self, url: str, state: tuple[int, int, int]):
        super().__init__()
        self.url, self._size, self._at = url, state[2], 0
        key = hashlib.blake2b(repr((url, state, BLOCK)).encode(), digest_size=12).hexdigest()
        self._folder = _folder() / key

    def readable(self) -> bool:
        """Return True, for it can be read."""
        return True

    def seekable(self) -> bool:
        """Return True, for any place can be read."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, and return it."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        """Return the place where reading goes on."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read from the place on, until the buffer is full or the file at its end.

        Raises:
            DataError: The file is not what it was.
            TransientError: The server does not answer.
        """
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size - self._at))
        done = 0
        while done < length:
            number, offset = divmod(self._at + done, BLOCK)
            part = self._block(number)[offset : offset + length - done]
            view[done : done + len(part)] = part
            done += len(part)
        self._at += length
        return length

    def _block(self, number: int) -> bytes:
        path = self._folder / str(number)
        if path in _recent:
            with contextlib.suppress(KeyError):  # another thread may have dropped it just now
                _recent.move_to_end(path)
                return _recent[path]
        first = number * BLOCK
        last = min(first + BLOCK, self._size)
        try:
            content = path.read_bytes()
            os.utime(path)  # the least recently used goes first
        except OSError:
            content = b""
        if len(content) != last - first:
            content = self._fetched(first, last)
            _keep_on_disk(path, content)
        _recent[path] = content
        while len(_recent) > _KEPT:
            with contextlib.suppress(KeyError):
                _recent.popitem(last=False)
        return content

    def _fetched(self, first: int, last: int) -> bytes:
        content: bytes = asked(self.url, lambda server, path: _part(server, path, first, last))
        if len(content) != last - first:
            raise DataError(
                f"{self.url}: bytes {first} to {last} came as {len(content)} bytes: the file changed, or "
                "the server knows no ranges; a store needs a server that sends parts of files"
            )
        return content


def _part(server: Any, path: str, first: int, last: int) -> bytes:
    content: bytes = server.cat_file(path, start=first, end=last)
    if len(content) < last - first:  # a connection that broke off
        raise ConnectionError(f"{len(content)} of {last - first} bytes came")
    return content


_recent: OrderedDict[Path, bytes] = OrderedDict()  # blocks used last, of all files of this process
_written = [0]  # bytes of blocks that this process wrote since it last looked at all of them


def _folder() -> Path:
    return cache_folder() / "remote"


def bound() -> int:
    """Return the bytes of the local disk that blocks may take, by `$SSL3D_REMOTE_CACHE`, such as 50GB.

    Raises:
        UsageError: The variable holds no number of bytes.
    """
    text = os.environ.get(VARIABLE)
    return parse_size(text, f"${VARIABLE}") if text else DEFAULT_BOUND


def _keep_on_disk(path: Path, content: bytes) -> None:
    # What cannot be kept costs time, not results.
    with contextlib.suppress(OSError):
        limit = bound()
        _written[0] += len(content)
        if _written[0] >= limit / 20 or _written[0] == len(content):
            _written[0] = len(content)
            drop_oldest(limit - len(content))
        with whole_file(path) as temporary:
            temporary.write_bytes(content)


def drop_oldest(limit: int) -> int:
    """Remove the blocks of the local disk that were not used for longest, until the others fit a limit.

    Args:
        limit: Bytes that may stay; where they are more, nine tenths of it do.

    Returns:
        Number of bytes removed.
    """
    blocks = []
    for path in _folder().glob("*/*"):
        with contextlib.suppress(OSError):
            state = path.stat()
            blocks.append((state.st_mtime_ns, state.st_size, path))
    held = sum(length for _, length, _ in blocks)
    removed = 0
    if held > limit:
        for _, length, path in sorted(blocks):
            if held - removed <= 0.9 * limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                removed += length
    return removed
