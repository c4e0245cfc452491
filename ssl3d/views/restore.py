"""One crop to be damaged and restored: what reconstruction proxies draw, mirror and show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl3d.rng import BatchRng
from ssl3d.views import spatial
from ssl3d.views.crops import draw_crop, fit_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.data.store.volume import Volume

_SHOWN = 6  # examples in a picture


@dataclasses.dataclass
class RestoreViews:
    """Options of proxies that damage a crop and have it restored.

    Attributes:
        crop: Size of the crops along D H W, in voxels; images (D = 1) give crops of depth 1.
        flip: Probability that a crop is mirrored before it is damaged, along each axis.
        min_foreground: Least share of foreground in a crop.
    """

    crop: tuple[int, int, int] = (32, 32, 32)
    flip: float = 0.5
    min_foreground: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges of all fields.

        Raises:
            ValueError: A field is out of range; the message names it.
        """
        if len(self.crop) != 3 or min(self.crop) < 1:
            raise ValueError(f"crop needs 3 sizes of at least 1, not {self.crop}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability, 0 to 1, not {self.flip:g}")
        if not 0 <= self.min_foreground <= 1:
            raise ValueError(f"min_foreground is a share, 0 to 1, not {self.min_foreground:g}")


def draw_one(config: RestoreViews, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw one crop of a volume.

    Returns:
        `crop` (C, d, h, w), float32, and `foreground` (d, h, w), bool: see `read_foreground`. Where the
        store has voxels to ignore, `ignored` (d, h, w), bool, too.

    Raises:
        DataError: The volume has no foreground.
    """
    size = fit_size(volume, config.crop)
    start = draw_crop(volume, size, rng, config.min_foreground)
    crop, foreground = volume.read(start, size), read_foreground(volume, start, size)
    if not volume.may_ignore:
        return {"crop": crop, "foreground": foreground}
    ignored = volume.read_ignored(start, size)
    return {"crop": crop, "foreground": foreground & ~ignored, "ignored": ignored}


def read_foreground(volume: Volume, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """Mark the voxels of a crop that lie in a block of at least half foreground: (d, h, w), bool.

    As coarse as the volume's foreground map (`volume.block`). Outside the volume nothing is foreground.
    Where a crop has no such block at all, every block with some foreground counts.
    """
    share = volume.foreground()
    inside = np.ones(tuple(size), bool)
    places = []
    for axis, (first, length) in enumerate(zip(start, size, strict=True)):
        at = np.arange(first, first + length)
        exists = (at >= 0) & (at < volume.shape[1 + axis])
        inside &= exists.reshape([-1 if a == axis else 1 for a in range(3)])
        places.append(np.clip(at, 0, volume.shape[1 + axis] - 1) // volume.block[axis])
    shares = np.where(inside, share[np.ix_(*places)], 0)
    return torch.from_numpy((shares >= 0.5) if (shares >= 0.5).any() else (shares > 0))


def mirror_one(
    config: RestoreViews, batch: dict[str, Tensor], rng: BatchRng, training: bool = True
) -> tuple[Tensor, Tensor]:
    """Mirror the crops of a batch at random while training, and their foreground alike.

    Returns:
        Crops (B, C, D, H, W), and foreground (B, D, H, W), bool. They may be the batch's own tensors: never
        write to them.
    """
    mirrored = mirror_counted(config, batch, rng, training)
    return mirrored.crop, mirrored.foreground


class Restorable(NamedTuple):
    """Crops to be damaged and restored.

    Attributes:
        crop: Crops (B, C, D, H, W).
        foreground: Foreground, (B, D, H, W), bool.
        counted: Voxels that losses count, (B, 1, D, H, W), bool; None where that is all of them.
    """

    crop: Tensor
    foreground: Tensor
    counted: Tensor | None


def mirror_counted(
    config: RestoreViews, batch: dict[str, Tensor], rng: BatchRng, training: bool = True
) -> Restorable:
    """Mirror crops as `mirror_one` does, and tell which of their voxels a loss is to count."""
    return _mirrored(batch, lambda x: spatial.flip(x, rng, config.flip) if training and config.flip else x)


def flip_counted(
    batch: dict[str, Tensor], rng: BatchRng, chance: float, training: bool = True
) -> Restorable:
    """Mirror crops as `flip_in_turn` does while training, and tell which voxels a loss is to count."""
    return _mirrored(batch, lambda x: spatial.flip_in_turn(x, rng, chance) if training else x)


def _mirrored(batch: dict[str, Tensor], mirror: Callable[[Tensor], Tensor]) -> Restorable:
    """Mirror crops and maps of a batch alike, the maps as further channels."""
    crop = batch["crop"]
    names = [name for name in ("foreground", "ignored") if name in batch]
    maps = torch.stack([batch[name].to(crop.dtype) for name in names], 1)
    both = mirror(torch.cat([crop, maps], 1))
    own = {name: both[:, crop.shape[1] + n] > 0.5 for n, name in enumerate(names)}
    counted = ~own["ignored"].unsqueeze(1) if "ignored" in own else None
    return Restorable(both[:, : crop.shape[1]], own["foreground"], counted)


def restoration_picture(original: Tensor, corrupted: Tensor, restored: Tensor) -> Figure:
    """Show slices of the first examples: the network's input, its output, and the original.

    Each example shows the slice across D that was damaged as much as slices are on average, in the grey
    window of the original.

    Args:
        original: Original crops, (B, C, D, H, W), of which the first channel is shown.
        corrupted: Input of the encoder, (B, C, D, H, W).
        restored: Output of the network, (B, C, D, H, W).
    """
    from matplotlib.figure import Figure

    count = min(len(original), _SHOWN)
    parts = [x[:count, 0].detach().float().cpu() for x in (corrupted, restored, original)]
    damage = (parts[0] - parts[2]).abs().sum(dim=(2, 3))
    places = (damage - damage.mean(1, keepdim=True)).abs().argmin(1).tolist()
    figure = Figure(figsize=(1.7 * count + 0.3, 5.2), layout="constrained")
    panels = figure.subplots(3, count, squeeze=False)
    for i, place in enumerate(places):
        low, high = np.percentile(parts[2][i].numpy(), (0.5, 99.5))
        for row, part in enumerate(parts):
            panel = panels[row, i]
            panel.imshow(part[i, place].numpy(), cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            panel.set_xticks([])
            panel.set_yticks([])
    for row, name in enumerate(("input", "restored", "original")):
        panels[row, 0].set_ylabel(name, fontsize=9)
    return figure
