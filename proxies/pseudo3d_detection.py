"""Pseudo-3D detection: find what natural images show, their three colours read as three slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ssl3d.api import BatchRng, Boxed, DataError, Detection2dOptions, DetectionProxy2d, Encoder, UsageError

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.api import Volume

_SLICES = 3


@dataclass
class Pseudo3DDetectionConfig(Detection2dOptions):
    """Options of pseudo-3D detection.

    Attributes:
        shuffle: Probability that the three slices are put into a random order.
        mean: Mean that is subtracted from pictures, whose values are 0 to 1; the paper's 114.495 of 255.
        std: Standard deviation that pictures are then divided by; the paper's 57.63 of 255.
        keep_depth: Whether an encoder that strides across slices is refused.
    """

    crop: tuple[int, int] = (224, 224)
    slab: int = _SLICES
    span: tuple[float, float] = (0.7, 1.0)
    most: int = 64
    flip: tuple[float, float] = (0.0, 0.5)
    shuffle: float = 0.0
    mean: float = 114.495 / 255
    std: float = 57.63 / 255
    keep_depth: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if self.slab != _SLICES:
            raise ValueError(f"slab is {self.slab}; three colours are {_SLICES} slices")
        if not 0 <= self.shuffle <= 1:
            raise ValueError(f"shuffle is a probability, 0 to 1, not {self.shuffle:g}")
        if not self.std > 0:
            raise ValueError(f"std must be above 0, not {self.std:g}")


class Pseudo3DDetection(DetectionProxy2d):
    """The network must work out what a natural image shows, and where.

    Zhang et al.: Advancing 3D Medical Image Analysis with Variable Dimension Transform based Supervised 3D
    Pre-training, arXiv 2201.01426 (2022); its predecessor MP3D, arXiv 2012.08770 (2020).

    Red, green and blue are read as three neighbouring slices of a volume of one channel: (B, 3, H, W)
    becomes (B, 1, 3, H, W), so that an ordinary 3D encoder for volumes of one channel learns from
    millions of boxes in pictures. A 2D feature pyramid, region proposal network and R-CNN head stand on
    the encoder's maps, whose depth is fused by a 1 x 1 convolution over slices in as many groups as
    channels (`fusion`), with group norm in the pyramid: `TwoStageDetector2d` says how. Losses are those
    of Faster R-CNN: cross-entropies, and smooth L1 of the boxes' offsets. Three neighbouring slices of
    volumes serve as well, with the boxes of the middle one.

    The paper's encoder strides within slices only, so that all three are there to the end, and has group
    norm: `--encoder resnet18 --resnet18.kind 3d --resnet18.norm group --resnet18.stem-stride 1 2 2
    --resnet18.stem-pool true --resnet18.pool-stride 1 2 2
    --resnet18.stage-strides [[1,1,1],[1,2,2],[1,2,2],[1,2,2]]`.

    Differs from the paper: crops span `span` of the longer side of a picture, and what lies outside of it
    is background, where the paper scales whole pictures; group norm everywhere, where some of its released
    configurations freeze batch norm; anchors that cross the border are trained too; the fusion begins as
    the mean over slices. AdamW and few steps are the recipe here, not SGD with rate 0.02 for 24 epochs on 8
    GPUs.

    The metrics: `recall`, the share of the boxes that one of the 100 best proposals of the first stage
    overlaps by half; on held-out pictures `ap50` too, the average precision at that overlap (mean over
    classes, of a batch; `score_boxes` scores all of a collection together).
    """

    Config = Pseudo3DDetectionConfig
    paper: ClassVar[str] = (
        "Zhang et al.: Advancing 3D Medical Image Analysis with Variable Dimension Transform based "
        "Supervised 3D Pre-training, arXiv 2201.01426, 2022"
    )
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 4, "lr": 5e-4}

    def __init__(self, config: Pseudo3DDetectionConfig, encoder: Encoder) -> None:
        """Check the encoder, before the classes are known.

        Raises:
            UsageError: The encoder takes several channels, or strides across the three slices.
        """
        super().__init__(config, encoder)
        channels = getattr(encoder.config, "in_channels", 1)
        if channels != 1:
            raise UsageError(
                f"pseudo3d_detection: the encoder takes {channels} channels; three colours become one "
                "channel of three slices, so it must take 1"
            )
        across = [stride[0] for stride in encoder.strides]
        if config.keep_depth and max(across) > 1:
            raise UsageError(
                f"pseudo3d_detection: the encoder strides across the three slices (by "
                f"{' '.join(map(str, across))} along D); give it strides of 1 along D, as in "
                "--resnet18.stem-stride 1 2 2 --resnet18.stage-strides [[1,1,1],[1,2,2],[1,2,2],[1,2,2]] "
                "(--pseudo3d_detection.keep-depth false takes any)"
            )

    @classmethod
    def in_channels(cls, config: Pseudo3DDetectionConfig, data_channels: int) -> int:
        """Return one channel, for three colours are three slices.

        Raises:
            UsageError: The data have neither three colours nor one channel.
        """
        if data_channels not in (1, 3):
            raise UsageError(
                f"pseudo3d_detection: reads three colours, or three slices of one channel, and the data "
                f"have {data_channels} channels"
            )
        return 1

    @classmethod
    def draw(
        cls, config: Pseudo3DDetectionConfig, volume: Volume, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Draw a crop as three slices, `crop` (1, 3, h, w), with its boxes; see `draw_boxed`.

        Raises:
            DataError: The volume is neither a picture nor one of one channel, or nobody looked for boxes in
                it.
        """
        channels, depth = volume.shape[:2]
        if (channels, depth > 1) not in ((3, False), (1, False), (1, True)):
            raise DataError(
                f"{volume.id}: has {channels} channels and depth {depth}; a picture has 3 or 1 channels "
                "and depth 1"
            )
        drawn = super().draw(config, volume, rng)
        drawn["crop"] = as_slices(drawn["crop"])
        drawn["natural"] = torch.tensor(depth == 1)
        return drawn

    def shown(self, batch: dict[str, Tensor], rng: BatchRng) -> Boxed:
        """Prepare the encoder's input: slices shuffled while training, pictures standardised."""
        config = self.config
        seen = super().shown(batch, rng)
        with torch.no_grad():
            images = seen.images
            if self.training and config.shuffle:
                order = rng.permutation(_SLICES)
                order = torch.where(
                    rng.chance(config.shuffle).unsqueeze(1),
                    order,
                    torch.arange(_SLICES, device=order.device),
                )
                images = images.gather(2, order.view(-1, 1, _SLICES, 1, 1).expand_as(images))
            natural = batch["natural"].view(-1, 1, 1, 1, 1)
            images = torch.where(natural, (images - config.mean) / config.std, images)
        return seen._replace(images=images)

    def present(self, volumes: Tensor) -> Tensor:
        """Turn colours (B, 3, 1, H, W) into standardised slices (B, 1, 3, H, W); leave volumes alone."""
        if volumes.shape[1] != _SLICES or volumes.shape[2] != 1:
            return volumes
        standard: Tensor = (volumes.transpose(1, 2) - self.config.mean) / self.config.std
        return standard


def as_slices(x: Tensor) -> Tensor:
    """Turn a crop into three slices, (1, 3, h, w): its colours, its slices, or its one slice thrice."""
    if x.shape[:2] == (_SLICES, 1):
        return x.transpose(0, 1)
    return x.expand(-1, _SLICES, -1, -1)
