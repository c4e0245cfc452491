"""The public interface: all that plugins import. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl3d.checkpoint import encoder_from as encoder_from
    from ssl3d.checkpoint import identity_hash as identity_hash
    from ssl3d.checkpoint import load_encoder as load_encoder
    from ssl3d.checkpoint import load_proxies as load_proxies
    from ssl3d.encoder import Encoder as Encoder
    from ssl3d.errors import CheckpointError as CheckpointError
    from ssl3d.errors import DataError as DataError
    from ssl3d.errors import Ssl3dError as Ssl3dError
    from ssl3d.errors import UsageError as UsageError
    from ssl3d.proxy import Proxy as Proxy
    from ssl3d.proxy import StepOutput as StepOutput
    from ssl3d.rng import BatchRng as BatchRng

_HOME = {
    "BatchRng": "rng",
    "CheckpointError": "errors",
    "DataError": "errors",
    "Encoder": "encoder",
    "Proxy": "proxy",
    "Ssl3dError": "errors",
    "StepOutput": "proxy",
    "UsageError": "errors",
    "encoder_from": "checkpoint",
    "identity_hash": "checkpoint",
    "load_encoder": "checkpoint",
    "load_proxies": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"ssl3d.api has no {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(f"ssl3d.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
