"""What is exported: an encoder or a kept model, its card, and its network as other programs use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d.checkpoint.card import CARD as ENCODER_CARD
from ssl3d.checkpoint.card import encoder_folder
from ssl3d.checkpoint.models import CARD, load_model, model_folders
from ssl3d.encoder import Encoder
from ssl3d.errors import CheckpointError, TrainingError, UsageError
from ssl3d.model import Model, Portable
from ssl3d.specs import FOREIGN, IMAGENET, SCRATCH, encoder_from, is_foreign

TOLERANCE = 1e-4
"""Largest difference from ssl3d's own outputs; a share of their largest magnitude where that is over 1."""
SEEN = ("identities", "volumes_seen")
"""Entries of an encoder's card that are hashes of subjects and volumes."""
_SIZE = (64, 64, 64)  # of encoders whose card knows no crop


class EncoderNetwork(nn.Module):
    """Encoder as a network with a tuple of tensors as its output.

    Args:
        encoder: Encoder in evaluation mode.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the embedding (B, F), and the feature maps from shallow to deep."""
        maps = self.encoder(x)
        return (self.encoder.pool(maps), *maps)


@dataclass(frozen=True)
class Source:
    """An encoder or a kept model that is to be exported.

    Attributes:
        word: Word that named it on the command line.
        module: Encoder or kept model, in evaluation mode, on the CPU.
        card: Content of its card.
        folder: Folder with the card and the weights.
    """

    word: str
    module: Encoder | Model
    card: Mapping[str, Any]
    folder: Path

    @property
    def encoder(self) -> Encoder:
        """Encoder itself, or that of the model."""
        if isinstance(self.module, Encoder):
            return self.module
        encoder: Any = self.module.network.encoder
        return encoder.encoder if hasattr(encoder, "aggregator") else encoder

    @property
    def channels(self) -> int:
        """Number of channels of the volumes."""
        return int(self.encoder.config.in_channels)

    def portable(self) -> Portable:
        """Return the network as other programs use it.

        Raises:
            UsageError: There is no such network of this model.
        """
        if isinstance(self.module, Model):
            return self.module.portable()
        count = len(self.module.channels)
        names = ("embedding", *(f"map_{n}" for n in range(count)))
        patch = self.card.get("patch") or _SIZE
        d, h, w = (int(side) for side in patch)
        return Portable(EncoderNetwork(self.module), names, (d, h, w), fixed=False)

    def public_card(self) -> dict[str, Any]:
        """Return the card without hashes of subjects and volumes, which are of use in ssl3d only."""
        card = {key: value for key, value in self.card.items() if key not in SEEN}
        if isinstance(card.get("training"), Mapping):
            card["training"] = {k: v for k, v in card["training"].items() if k != "subjects"}
        return card


def read_source(word: str) -> Source:
    """Load what a word on the command line names: a run, an encoder or a kept model.

    Raises:
        CheckpointError: There is nothing of the kind, it is damaged, or there are several models.
        UsageError: It is no trained encoder or model of ssl3d.
    """
    if word.startswith((SCRATCH, IMAGENET, FOREIGN)) or is_foreign(word):
        raise UsageError(f"{word}: is no encoder that ssl3d trained or converted; ssl3d convert makes one")
    place = Path(word)
    if not _has_encoder(place) and (_has_model(place) or not place.exists()):
        folders = model_folders(place)
        if len(folders) > 1:
            raise UsageError(
                f"{word}: {len(folders)} models, one for each fold; name one of them, such as {folders[0]}"
            )
        model = load_model(folders[0])
        return Source(word, model, model.card, folders[0])
    encoder = encoder_from(word)
    return Source(word, encoder, encoder.metadata, encoder_folder(place))


def _has_encoder(place: Path) -> bool:
    return any((folder / ENCODER_CARD).is_file() for folder in (place, place / "encoder", place.parent))


def _has_model(place: Path) -> bool:
    if (place / CARD).is_file() or place.name == CARD:
        return True
    try:
        return bool(model_folders(place))
    except CheckpointError as error:
        if "holds no model" in str(error):
            return False
        raise


def sample(channels: int, size: tuple[int, int, int], count: int = 2, seed: int = 0) -> Tensor:
    """Return volumes (count, channels, *size) of a body in air, as a check of a network sees them."""
    from ssl3d.data.phantoms import phantom

    images = [
        torch.from_numpy(phantom(seed + n * channels + c, size).image[0]).float()
        for n in range(count)
        for c in range(channels)
    ]
    return torch.stack(images).view(count, channels, *size)


def largest_difference(computed: Any, wanted: Any) -> float:
    """Return the largest difference between two tuples of tensors, as a share of their magnitude over 1."""
    first, second = ((v,) if isinstance(v, Tensor) else tuple(v) for v in (computed, wanted))
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return float("inf")
        apart = float((a.double() - b.double()).abs().max()) / max(1.0, float(b.abs().max()))
        worst = max(worst, apart) if apart == apart else float("inf")
    return worst


def require_equal(difference: float, label: str) -> None:
    """Refuse a file whose outputs differ from those of ssl3d.

    Raises:
        TrainingError: They differ by more than `TOLERANCE`; nothing is kept.
    """
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"{label}: its outputs differ from ours by {difference:.3g}, more than {TOLERANCE:g}; "
            "nothing was written"
        )
