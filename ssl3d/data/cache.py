"""The folder in which prepared stores and phantoms are kept between calls."""

from __future__ import annotations

import os
from pathlib import Path

from ssl3d.errors import not_written


def cache_folder() -> Path:
    """Return the folder of prepared data: $SSL3D_CACHE, else ~/.cache/ssl3d."""
    return Path(os.environ.get("SSL3D_CACHE") or Path.home() / ".cache" / "ssl3d").expanduser()


def make_cache(folder: Path) -> None:
    """Make a folder of the cache, unless it is there.

    Raises:
        UsageError: It cannot be made; the message says what to do.
        TransientError: The disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(
            error,
            f"{folder}: the cache cannot be written ({error.strerror}); name another folder in SSL3D_CACHE",
        ) from error
