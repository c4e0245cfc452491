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
    from ssl3d.distributed import gather as gather
    from ssl3d.encoder import Encoder as Encoder
    from ssl3d.errors import CheckpointError as CheckpointError
    from ssl3d.errors import DataError as DataError
    from ssl3d.errors import Ssl3dError as Ssl3dError
    from ssl3d.errors import UsageError as UsageError
    from ssl3d.heads import projection_head as projection_head
    from ssl3d.losses import alignment as alignment
    from ssl3d.losses import cross_correlation as cross_correlation
    from ssl3d.losses import nt_xent as nt_xent
    from ssl3d.losses import uniformity as uniformity
    from ssl3d.proxy import Proxy as Proxy
    from ssl3d.proxy import StepOutput as StepOutput
    from ssl3d.rng import BatchRng as BatchRng
    from ssl3d.sorting import in_order as in_order
    from ssl3d.sorting import kendall_tau as kendall_tau
    from ssl3d.sorting import sorting_loss as sorting_loss
    from ssl3d.views.compose import ViewRng as ViewRng
    from ssl3d.views.compose import Views as Views
    from ssl3d.views.compose import augment as augment
    from ssl3d.views.compose import view_margin as view_margin
    from ssl3d.views.crops import draw_crop as draw_crop
    from ssl3d.views.crops import draw_overlapping as draw_overlapping
    from ssl3d.views.crops import draw_positions as draw_positions
    from ssl3d.views.crops import fit_size as fit_size
    from ssl3d.views.crops import lay_flat as lay_flat
    from ssl3d.views.crops import neighbour_position as neighbour_position
    from ssl3d.views.crops import read_crop as read_crop
    from ssl3d.views.crops import read_slab as read_slab
    from ssl3d.views.crops import slab_size as slab_size
    from ssl3d.views.outside import apply_torchio as apply_torchio
    from ssl3d.views.picture import view_pairs as view_pairs
    from ssl3d.views.spatial import centre_crop as centre_crop

_HOME = {
    "alignment": "losses",
    "apply_torchio": "views.outside",
    "augment": "views.compose",
    "BatchRng": "rng",
    "centre_crop": "views.spatial",
    "CheckpointError": "errors",
    "cross_correlation": "losses",
    "DataError": "errors",
    "draw_crop": "views.crops",
    "draw_overlapping": "views.crops",
    "draw_positions": "views.crops",
    "Encoder": "encoder",
    "encoder_from": "checkpoint",
    "fit_size": "views.crops",
    "gather": "distributed",
    "identity_hash": "checkpoint",
    "in_order": "sorting",
    "kendall_tau": "sorting",
    "lay_flat": "views.crops",
    "load_encoder": "checkpoint",
    "load_proxies": "checkpoint",
    "neighbour_position": "views.crops",
    "nt_xent": "losses",
    "projection_head": "heads",
    "Proxy": "proxy",
    "read_crop": "views.crops",
    "read_slab": "views.crops",
    "slab_size": "views.crops",
    "sorting_loss": "sorting",
    "Ssl3dError": "errors",
    "StepOutput": "proxy",
    "uniformity": "losses",
    "UsageError": "errors",
    "view_margin": "views.compose",
    "view_pairs": "views.picture",
    "ViewRng": "views.compose",
    "Views": "views.compose",
    "Volume": "data.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"ssl3d.api has no {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(importlib.import_module(f"ssl3d.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
