"""Conformance tests for plugins, to be called from a plugin's own tests."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl3d.testing.encoders import check_encoder as check_encoder
    from ssl3d.testing.encoders import dead_taps as dead_taps
    from ssl3d.testing.proxies import check_proxy as check_proxy
    from ssl3d.testing.ranks import check_ranks as check_ranks

_HOME = {
    "check_encoder": "encoders",
    "dead_taps": "encoders",
    "check_proxy": "proxies",
    "check_ranks": "ranks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"ssl3d.testing has no {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(f"ssl3d.testing.{_HOME[name]}"), name)
