"""Crops of images and slabs with the boxes in them: drawn in a worker, moved together on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ssl3d.errors import DataError
from ssl3d.rng import BatchRng
from ssl3d.views.compose import Views, augment

if TYPE_CHECKING:
    from ssl3d.data.store.volume import Volume


@dataclass
class BoxViews:
    """Options of image crops with boxes.

    Attributes:
        crop: Height and width of the crops in pixels; images that are smaller are filled up.
        slab: Number of slices around the one whose boxes are asked for, in volumes; images (D = 1) give
            one.
        span: Least and largest part of an image that a crop spans, in longer sides of the image, which is
            scaled to the crop; 0 0 takes the pixels as they are.
        around: Probability that a crop holds a box, or the middle of a larger one (and a slab a slice of
            it), where there is any; else it lies anywhere.
        visible: Share of a box that must lie in the crop for it to be asked for.
        least: Shortest side, in pixels of the crop, of a box that is asked for.
        most: Largest number of boxes asked for in one crop; of more, as many at random.
        flip: Probabilities of mirroring along H and W.
        scale: Largest zoom s, less 1; log zoom ~ U(-log(1 + s), log(1 + s)).
        intensity: Probability of each of gamma, contrast and noise.
    """

    crop: tuple[int, int] = (96, 96)
    slab: int = 1
    span: tuple[float, float] = (0.0, 0.0)
    around: float = 0.5
    visible: float = 0.3
    least: float = 2.0
    most: int = 32
    flip: tuple[float, float] = (0.5, 0.5)
    scale: float = 0.2
    intensity: float = 0.5

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f"crop needs 2 sizes of at least 1, not {self.crop}")
        for name in ("slab", "most"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(self.span) != 2 or not (tuple(self.span) == (0, 0) or 0 < self.span[0] <= self.span[1]):
            raise ValueError(f"span needs two positive numbers, the smaller first, or 0 0, not {self.span}")
        if len(self.flip) != 2 or not all(0 <= p <= 1 for p in self.flip):
            raise ValueError(f"flip needs two probabilities, 0 to 1, not {self.flip}")
        for name in ("around", "intensity"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, 0 to 1, not {getattr(self, name):g}")
        if not 0 < self.visible <= 1:
            raise ValueError(f"visible is a share, above 0 and up to 1, not {self.visible:g}")
        if self.least < 0:
            raise ValueError(f"least must be 0 or more pixels, not {self.least:g}")
        if not 0 <= self.scale <= 1:
            raise ValueError(f"scale must lie in 0 to 1, not {self.scale:g}")

    @property
    def margin(self) -> tuple[int, int]:
        """Pixels that are read around a crop, per side, so that a smaller zoom sees more of the image."""
        return (math.ceil(self.crop[0] * self.scale / 2), math.ceil(self.crop[1] * self.scale / 2))


class Boxed(NamedTuple):
    """Batch of images with boxes.

    Attributes:
        images: Images (B, C, D, H, W).
        boxes: Boxes (B, M, 4), y1 x1 y2 x2 in pixels.
        there: Mask (B, M), bool, of those of the M that are boxes.
    """

    images: Tensor
    boxes: Tensor
    there: Tensor


def draw_boxed(config: BoxViews, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw a crop, with its margin, and the boxes that touch it.

    Returns:
        `crop` (C, slab, h, w), float32; `boxes` (most, 4), y1 x1 y2 x2, zeros where there is none; `count`,
        how many there are; `labels` (most,), int64.

    Raises:
        DataError: Nobody looked for boxes in the volume.
    """
    boxes, labels = volume.boxes, volume.box_labels
    if boxes is None or labels is None:
        raise DataError(f"{volume.id}: nobody looked for boxes in it, so nothing to be learned from it")
    depth, height, width = volume.shape[1:]
    slab = 1 if depth == 1 else config.slab
    aimed = int(rng.integers(len(boxes))) if len(boxes) and rng.random() < config.around else None
    place = int(rng.integers(depth))
    if depth > 1 and aimed is not None:
        first, last = _slices(boxes[aimed], depth)
        place = int(rng.integers(first, last))
    here = (boxes[:, 0] <= place + 0.5) & (place + 0.5 < boxes[:, 3])
    if depth == 1:
        here[:] = True

    part = 1.0  # pixels of the image per pixel of the crop
    if config.span[1]:
        low, high = np.log(config.span)
        part = float(np.exp(rng.uniform(low, high))) * max(height, width) / max(config.crop)
    outer = [n + 2 * m for n, m in zip(config.crop, config.margin, strict=True)]
    window = [max(1, round(part * n)) for n in outer]
    start = []
    for axis, (length, side, inner) in enumerate(zip((height, width), window, config.crop, strict=True)):
        shown = min(side, max(1, round(part * inner)))
        low, high = min(0, length - shown), max(0, length - shown)
        if aimed is not None:  # wherever the crop holds the box, or its middle
            near, far = float(boxes[aimed, 1 + axis]), float(boxes[aimed, 4 + axis])
            if far - near > shown - 1:
                near = far = (near + far) / 2
            low, high = max(low, math.ceil(far - shown)), min(high, math.floor(near))
        start.append(int(rng.integers(low, max(low, high) + 1)) - (side - shown) // 2)

    crop = volume.read((place - slab // 2 if depth > 1 else 0, *start), (slab, *window))
    if window != outer:
        flat = crop.flatten(0, 1)[None]
        flat = functional.interpolate(flat, outer, mode="bilinear", align_corners=False, antialias=True)
        crop = flat[0].unflatten(0, crop.shape[:2])
    moved = (boxes[:, [1, 2, 4, 5]] - np.array(start * 2)) * (np.array(outer * 2) / np.array(window * 2))
    touch = (moved[:, :2] < np.array(outer)).all(1) & (moved[:, 2:] > 0).all(1)
    chosen = np.flatnonzero(here & touch)
    if len(chosen) > config.most:
        chosen = np.sort(rng.permutation(chosen)[: config.most])
    padded, kinds = torch.zeros(config.most, 4), torch.zeros(config.most, dtype=torch.int64)
    padded[: len(chosen)] = torch.from_numpy(moved[chosen].astype(np.float32))
    kinds[: len(chosen)] = torch.from_numpy(np.asarray(labels)[chosen])
    return {"crop": crop, "boxes": padded, "labels": kinds, "count": torch.tensor(len(chosen))}


@torch.no_grad()
def move_boxed(config: BoxViews, batch: dict[str, Tensor], rng: BatchRng, training: bool) -> Boxed:
    """Cut the margin off the crops of a batch, augment them while training, and move their boxes.

    A zoom about the middle, log-uniform in [1/(1 + scale), 1 + scale], mirroring along H and W, then gamma,
    contrast and noise. Boxes go where the pixels go; those of which less than `visible` is left, or less
    than `least` along a side, are not asked for.
    """
    crop, boxes = batch["crop"], batch["boxes"]
    there = torch.arange(boxes.shape[1], device=boxes.device) < batch["count"].unsqueeze(1)
    with torch.autocast(crop.device.type, enabled=False):
        zoom = torch.ones(len(crop), 1, device=crop.device)
        if training and config.scale:
            zoom = torch.exp(rng.uniform(1, low=-1.0, high=1.0) * math.log1p(config.scale))
        images, boxes = zoom_boxed(crop, boxes, zoom[:, 0], config.crop)
        if training:
            for axis, p in enumerate(config.flip):
                images, boxes = flip_boxed(images, boxes, rng.chance(p), axis)
        cut = cut_boxes(boxes, config.crop)
        share = _area(cut) / _area(boxes).clamp_min(1e-6)
        sides = (cut[..., 2:] - cut[..., :2]).amin(-1)
        there = there & (share >= config.visible) & (sides >= config.least)
        if training and config.intensity:
            still = Views(chance=config.intensity, flip=0, rotate=0, scale=0, blur=0, bias=0)
            images = augment(still, images, rng, images.shape[2:])
    return Boxed(images, cut, there)


def zoom_boxed(x: Tensor, boxes: Tensor, zoom: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Zoom each image about its middle (H, W), with its boxes.

    Args:
        x: Images (B, C, D, h, w) with margins.
        boxes: Boxes (B, M, 4), y1 x1 y2 x2 in pixels of x; they may lie outside.
        zoom: Zoom of each image (B,); above 1 enlarges.
        size: Size (H, W) of the result.

    Returns:
        (B, C, D, H, W) and (B, M, 4), not cut.
    """
    inner = torch.tensor(list(size), dtype=torch.float32, device=x.device)
    outer = torch.tensor(list(x.shape[-2:]), dtype=torch.float32, device=x.device)
    moved = (boxes - (outer / 2).repeat(2)) * zoom.view(-1, 1, 1) + (inner / 2).repeat(2)
    if bool((zoom == 1).all()) and not any((n - m) % 2 for n, m in zip(x.shape[-2:], size, strict=True)):
        top, left = ((n - m) // 2 for n, m in zip(x.shape[-2:], size, strict=True))
        return x[..., top : top + size[0], left : left + size[1]], moved
    rows, columns = (
        2 * ((torch.arange(n, device=x.device) + 0.5 - n / 2) / zoom.view(-1, 1)) / outer[axis]
        for axis, n in enumerate(size)
    )
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)
    flat = functional.grid_sample(
        x.flatten(1, 2).float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return flat.unflatten(1, x.shape[1:3]).to(x.dtype), moved


def flip_boxed(x: Tensor, boxes: Tensor, chosen: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mirror the `chosen` (B,) images along H (axis 0) or W (1), and their boxes (B, M, 4)."""
    length = x.shape[3 + axis]
    turned = boxes.clone()
    turned[..., axis], turned[..., 2 + axis] = length - boxes[..., 2 + axis], length - boxes[..., axis]
    images = torch.where(chosen.view(-1, 1, 1, 1, 1), x.flip(3 + axis), x)
    return images, torch.where(chosen.view(-1, 1, 1), turned, boxes)


def cut_boxes(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Cut boxes (..., 4), y1 x1 y2 x2, to an image (H, W)."""
    limit = torch.tensor([*size, *size], dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp_min(0), limit)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def _slices(box: np.ndarray, depth: int) -> tuple[int, int]:
    """Return the first slice of a box, and the end; at least one, within the volume."""
    first = min(max(math.ceil(float(box[0]) - 0.5), 0), depth - 1)
    return first, min(max(math.ceil(float(box[3]) - 0.5), first + 1), depth)
