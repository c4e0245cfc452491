"""The shared encoder's contract: channels, strides, feature maps, embedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """Network from 3D volumes to feature maps, for any depth D >= 1.

    A subclass registered under `ssl3d.encoders` is made as `cls(config)`, `config` being its `Config`
    dataclass, whose field `in_channels` every encoder has.

    Attributes:
        channels: Channels of each feature map, shallow to deep.
        strides: Down-sampling of each feature map along (D, H, W), relative to the input.
        embed_dim: Length of an embedding.
        metadata: Content of `encoder.json`, on an encoder that was loaded.
    """

    Config: ClassVar[type]
    paper: ClassVar[str]

    config: Any
    channels: tuple[int, ...]
    strides: tuple[tuple[int, int, int], ...]
    embed_dim: int
    metadata: dict[str, Any]

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the feature maps of (B, C, D, H, W), shallow to deep.

        Map i has shape (B, channels[i], ceil(D / strides[i][0]), ...). Whether the input is an image
        (D = 1) or a volume is decided here, once, from D.
        """

    def embed(self, x: Tensor) -> Tensor:
        """Embed volumes (B, C, D, H, W) as (B, embed_dim): the mean over the deepest feature map."""
        return self.pool(self(x))

    def pool(self, maps: list[Tensor]) -> Tensor:
        """Pool the feature maps of `forward` into embeddings (B, embed_dim)."""
        return maps[-1].mean(dim=(2, 3, 4))
