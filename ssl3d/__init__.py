"""Self-supervised pretraining of 3D medical image encoders, with pluggable proxy tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl3d.checkpoint.encoders import load_encoder as load_encoder
    from ssl3d.checkpoint.proxies import load_proxies as load_proxies
    from ssl3d.specs import encoder_from as encoder_from
    from ssl3d.training.pretrain import pretrain as pretrain
    from ssl3d.training.pretrain import resume as resume

_HOME = {
    "load_encoder": "checkpoint.encoders",
    "load_proxies": "checkpoint.proxies",
    "encoder_from": "specs",
    "pretrain": "training.pretrain",
    "resume": "training.pretrain",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"ssl3d has no {name!r}")
    import importlib

    return getattr(importlib.import_module(f"ssl3d.{_HOME[name]}"), name)
