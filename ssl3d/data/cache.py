"""The folder in which prepared stores and phantoms are kept between calls."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of prepared data: $SSL3D_CACHE, else ~/.cache/ssl3d."""
    return Path(os.environ.get("SSL3D_CACHE") or Path.home() / ".cache" / "ssl3d").expanduser()
