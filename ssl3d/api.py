"""The public interface: all that plugins import. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl3d.checkpoint import encoder_from as encoder_from
    from ssl3d.checkpoint import identity_hash as identity_hash
    from ssl3d.checkpoint import load_encoder as load_encoder
    from ssl3d.checkpoint import load_proxies as load_proxies
    from ssl3d.data.store import Volume as Volume
    from ssl3d.encoder import Encoder as Encoder
    from ssl3d.errors import CheckpointError as CheckpointError
    from ssl3d.errors import DataError as DataError
    from ssl3d.errors import Ssl3dError as Ssl3dError
    from ssl3d.errors import UsageError as UsageError
    from ssl3d.proxy import Proxy as Proxy
    from ssl3d.proxy import StepOutput as StepOutput
    from ssl3d.rng import BatchRng as BatchRng
    from ssl3d.sorting import in_order as in_order
    from ssl3d.sorting import kendall_tau as kendall_tau
    from ssl3d.sorting import sorting_loss as sorting_loss
    from ssl3d.views.crops import draw_crop as draw_crop
    from ssl3d.views.crops import draw_overlapping as draw_overlapping
    from ssl3d.views.crops import draw_positions as draw_positions
    from ssl3d.views.crops import fit_size as fit_size
    from ssl3d.views.crops import lay_flat as lay_flat
    from ssl3d.views.crops import neighbour_position as neighbour_position
    from ssl3d.views.crops import read_crop as read_crop
    from ssl3d.views.crops import read_slab as read_slab
    from ssl3d.views.crops import slab_size as slab_size

_HOME = {
    "BatchRng": "rng",
    "CheckpointError": "errors",
    "DataError": "errors",
    "draw_crop": "views.crops",
    "draw_overlapping": "views.crops",
    "draw_positions": "views.crops",
    "Encoder": "encoder",
    "encoder_from": "checkpoint",
    "fit_size": "views.crops",
    "identity_hash": "checkpoint",
    "in_order": "sorting",
    "kendall_tau": "sorting",
    "lay_flat": "views.crops",
    "load_encoder": "checkpoint",
    "load_proxies": "checkpoint",
    "neighbour_position": "views.crops",
    "Proxy": "proxy",
    "read_crop": "views.crops",
    "read_slab": "views.crops",
    "slab_size": "views.crops",
    "Ssl3dError": "errors",
    "sorting_loss": "sorting",
    "StepOutput": "proxy",
    "UsageError": "errors",
    "Volume": "data.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"ssl3d.api has no {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(f"ssl3d.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
