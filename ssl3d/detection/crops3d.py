"""Crops of volumes with the boxes in them: drawn in a worker, moved together on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ssl3d.detection.boxes3d import box_volume, clip
from ssl3d.rng import BatchRng
from ssl3d.views.compose import Views, augment
from ssl3d.views.crops import draw_crop

if TYPE_CHECKING:
    from ssl3d.data.store.volume import Volume

Triple = tuple[int, int, int]

_LEAST = 1.0  # voxels; of an object that is cut at the border, what has a shorter side is not asked for


@dataclass
class BoxViews3d:
    """Options of volume crops with boxes.

    Attributes:
        around: Probability that a crop holds an object, if there is any; else it lies anywhere.
        visible: Share of a box that must lie in the crop for it to be asked for.
        most: Largest number of boxes asked for in one crop; of more, as many at random.
        axes: Axes 0 to 2 (D H W) along which crops are mirrored.
        zoom: Largest zoom z, less 1; log zoom ~ U(-log(1 + z), log(1 + z)).
        intensity: Probability of each of gamma, contrast and noise.
    """

    around: float = 0.7
    visible: float = 0.5
    most: int = 32
    axes: tuple[int, ...] = (0, 1, 2)
    zoom: float = 0.2
    intensity: float = 0.3

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        for name in ("around", "intensity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, 0 to 1, not {getattr(self, name):g}")
        if not 0 < self.visible <= 1:
            raise ValueError(f"visible is a share, above 0 and up to 1, not {self.visible:g}")
        if self.most < 1:
            raise ValueError(f"most must be at least 1, not {self.most}")
        if any(axis not in (0, 1, 2) for axis in self.axes):
            raise ValueError(f"axes are 0, 1 and 2 for D, H and W, not {self.axes}")
        if not 0 <= self.zoom <= 1:
            raise ValueError(f"zoom must lie in 0 to 1, not {self.zoom:g}")

    def margin(self, size: Sequence[int]) -> Triple:
        """Return the voxels read around a crop, per side, for smaller zooms that see more of the volume."""
        d, h, w = (math.ceil(n * self.zoom / 2) if n > 1 else 0 for n in size)
        return (d, h, w)


class Boxed3d(NamedTuple):
    """Batch of volumes with boxes.

    Attributes:
        images: Volumes (B, C, D, H, W).
        boxes: Boxes of each volume (n, 6), z1 y1 x1 z2 y2 x2 in voxels of the crop.
        labels: Labels of each volume (n,), int64.
    """

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]


def draw_boxed3d(
    config: BoxViews3d,
    volume: Volume,
    boxes: np.ndarray,
    labels: np.ndarray,
    size: Sequence[int],
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """Draw a crop of `size`, with its margin, and the boxes that touch it.

    With probability `around` a box is drawn, and the crop from all those that hold it (its middle, if it
    is the larger), so that objects are not always in the middle. A smaller volume lies in the crop's
    middle.

    Args:
        config: Options of the crops.
        volume: Volume to draw from.
        boxes: Boxes of the volume (n, 6).
        labels: Classes of the boxes (n,), from 0.
        size: Size of the crop (D, H, W).
        rng: Generator of all randomness.

    Returns:
        `image` (C, d, h, w), float32, with the margin; `boxes` (most, 6), in its voxels, zeros where there
        is none; `labels` (most,), int64; `count`, how many there are.
    """
    shape, lengths = np.array(volume.shape[1:]), np.array(size)
    if len(boxes) and rng.random() < config.around:
        box = np.asarray(boxes[int(rng.integers(len(boxes)))], dtype=np.float64)
        low, high = box[:3], box[3:]
        whole = high - low <= lengths
        middle = (low + high) / 2
        low, high = np.where(whole, low, middle), np.where(whole, high, middle)
        first = np.maximum(np.ceil(high - lengths - 1e-6), 0)
        last = np.minimum(np.floor(low + 1e-6), np.maximum(shape - lengths, 0))
        start = rng.integers(np.minimum(first, last).astype(int), last.astype(int) + 1)
        start = np.where(shape < lengths, -((lengths - shape) // 2), start)
    else:
        start = np.array(draw_crop(volume, size, rng, min_foreground=0.0))
    margin = np.array(config.margin(size))
    begin = start - margin
    outer = lengths + 2 * margin
    image = volume.read(begin.tolist(), outer.tolist())
    moved = np.asarray(boxes, dtype=np.float64).reshape(-1, 6) - np.tile(begin, 2)
    touch = np.flatnonzero(((moved[:, 3:] > 0) & (moved[:, :3] < outer)).all(axis=1))
    if len(touch) > config.most:
        touch = np.sort(rng.permutation(touch)[: config.most])
    padded, kinds = torch.zeros(config.most, 6), torch.zeros(config.most, dtype=torch.int64)
    padded[: len(touch)] = torch.from_numpy(moved[touch].astype(np.float32))
    kinds[: len(touch)] = torch.from_numpy(np.asarray(labels, dtype=np.int64)[touch])
    return {"image": image, "boxes": padded, "labels": kinds, "count": torch.tensor(len(touch))}


@torch.no_grad()
def move_boxed3d(
    config: BoxViews3d, batch: dict[str, Tensor], size: Sequence[int], rng: BatchRng, training: bool = True
) -> Boxed3d:
    """Cut the margin off the crops of a batch, augment them while training, and move their boxes.

    A zoom about the middle (of an image in its plane), log-uniform in [1 / (1 + zoom), 1 + zoom],
    mirroring, then gamma, contrast and noise. Boxes go where the voxels go; those of which less than
    `visible` is left are not asked for.
    """
    images, boxes = batch["image"], batch["boxes"]
    there = torch.arange(boxes.shape[1], device=boxes.device) < batch["count"].unsqueeze(1)
    with torch.autocast(images.device.type, enabled=False):
        zoom = torch.ones(len(images), device=images.device)
        if training and config.zoom:
            zoom = torch.exp(rng.uniform(low=-1.0, high=1.0) * math.log1p(config.zoom))
        images, boxes = zoom_boxed3d(images, boxes, zoom, size)
        if training:
            for axis in config.axes:
                images, boxes = flip_boxed3d(images, boxes, rng.chance(0.5), axis)
        flat = boxes.flatten(0, 1)
        cut = clip(flat, size)
        share = (box_volume(cut) / box_volume(flat).clamp_min(1e-6)).view(boxes.shape[:2])
        sides = (cut[:, 3:] - cut[:, :3]).amin(dim=1).view(boxes.shape[:2])
        whole = (flat[:, 3:] - flat[:, :3]).amin(dim=1).view(boxes.shape[:2])
        there = there & (share >= config.visible) & (sides >= whole.clamp(max=_LEAST) - 1e-3)
        if training and config.intensity:
            still = Views(chance=config.intensity, flip=0, rotate=0, scale=0, blur=0, bias=0)
            images = augment(still, images, rng, images.shape[2:])
    cut = cut.view(boxes.shape)
    return Boxed3d(
        images,
        [own[here] for own, here in zip(cut, there, strict=True)],
        [own[here] for own, here in zip(batch["labels"], there, strict=True)],
    )


def zoom_boxed3d(x: Tensor, boxes: Tensor, zoom: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Zoom each volume about its middle (D, H, W), with its boxes.

    Args:
        x: Volumes (B, C, d, h, w) with margins; those of depth 1 are zoomed in their plane.
        boxes: Boxes (B, M, 6) in voxels of x; they may lie outside.
        zoom: Zoom of each volume (B,); above 1 enlarges.
        size: Size (D, H, W) of the result.

    Returns:
        (B, C, D, H, W) and (B, M, 6), not cut.
    """
    outer = torch.tensor(x.shape[2:], dtype=torch.float32, device=x.device)
    inner = torch.tensor(list(size), dtype=torch.float32, device=x.device)
    factor = torch.where(outer > 1, zoom[:, None], torch.ones_like(zoom)[:, None])  # (B, 3)
    twice = factor.repeat(1, 2)[:, None]
    moved = (boxes - (outer / 2).repeat(2)) * twice + (inner / 2).repeat(2)
    if bool((factor == 1).all()) and not any((n - m) % 2 for n, m in zip(x.shape[2:], size, strict=True)):
        d, h, w = ((n - m) // 2 for n, m in zip(x.shape[2:], size, strict=True))
        return x[:, :, d : d + size[0], h : h + size[1], w : w + size[2]], moved
    ways = [
        2 * (torch.arange(n, device=x.device) + 0.5 - n / 2) / factor[:, axis, None] / outer[axis]
        for axis, n in enumerate(size)
    ]
    grid = torch.stack(
        torch.broadcast_tensors(
            ways[2][:, None, None, :], ways[1][:, None, :, None], ways[0][:, :, None, None]
        ),
        dim=-1,
    )
    sampled = functional.grid_sample(
        x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled.to(x.dtype), moved


def flip_boxed3d(x: Tensor, boxes: Tensor, chosen: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mirror the `chosen` (B,) volumes and their boxes (B, M, 6) along axis 0, 1 or 2 (D, H, W)."""
    length = x.shape[2 + axis]
    turned = boxes.clone()
    turned[..., axis], turned[..., 3 + axis] = length - boxes[..., 3 + axis], length - boxes[..., axis]
    images = torch.where(chosen.view(-1, 1, 1, 1, 1), x.flip(2 + axis), x)
    return images, torch.where(chosen.view(-1, 1, 1), turned, boxes)
