"""Networks that segment: an encoder with a head, and two of them from coarse to fine."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl3d.encoder import Encoder
from ssl3d.segmentation.heads import LinearHead

Triple = tuple[int, int, int]
Box = tuple[int, int, int, int, int, int]


class SegmentationNetwork(nn.Module):
    """Network of an encoder and a head on its maps.

    Args:
        encoder: Encoder, kept as `encoder`.
        head: Head of `ssl3d.segmentation.heads`, kept as `head`.
    """

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute logits (B, K, D, H, W) of (B, C, D, H, W): the prediction, then deep supervision's."""
        logits: list[Tensor] = self.head(x, self.encoder(x))
        return logits


class CoarseToFine(SegmentationNetwork):
    """Network of two stages: a coarse one finds the region in the shrunk volume, a fine one segments it.

    As Med3D (Chen, Ma, Zheng, arXiv 1904.00625) segments livers: the first stage is the encoder, a
    1 x 1 x 1 convolution to two channels on its deepest map, and interpolation; the second is a network
    of its own on the crop round what the first found. Both begin with the encoder's weights, the coarse
    one with a copy (`coarse.encoder`), and part in training. `forward` is the fine stage.

    Args:
        encoder: Encoder of the fine stage, kept as `encoder`.
        head: Head of the fine stage, kept as `head`.
    """

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__(encoder, head)
        copied = copy.deepcopy(encoder)
        self.coarse = SegmentationNetwork(copied, LinearHead(copied, 2, levels=(-1,)))


def shrunk(image: Tensor, size: Sequence[int]) -> Tensor:
    """Shrink (C, D, H, W) to (C, *size), whatever its shape: the mean where it shrinks, else linear."""
    d, h, w = (min(n, s) for n, s in zip(image.shape[1:], size, strict=True))
    small = F.adaptive_avg_pool3d(image[None], (d, h, w))
    if (d, h, w) == tuple(size):
        return small[0]
    return F.interpolate(small, tuple(size), mode="trilinear", align_corners=False)[0]


def shrunk_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Shrink (D, H, W) bool to (*size) bool, true where any voxel of the cell is."""
    d, h, w = (min(n, s) for n, s in zip(mask.shape, size, strict=True))
    small = F.adaptive_max_pool3d(mask[None, None].float(), (d, h, w))
    return F.interpolate(small, tuple(size), mode="nearest-exact")[0, 0] > 0.5


def region_of(probability: Tensor, shape: Sequence[int], threshold: float = 0.5) -> Box | None:
    """Return the box of what a coarse stage found, in voxels of a volume; None where it found nothing.

    Of several parts those count that have at least a tenth of the largest one's cells: single cells that
    shine by mistake would make every region the whole volume.

    Args:
        probability: Probability of foreground (d, h, w) over the whole volume.
        shape: Shape of the volume (D, H, W).
        threshold: Least probability of a cell that counts.
    """
    from scipy import ndimage

    foreground = probability.float().cpu().numpy() >= threshold
    if not foreground.any():
        return None
    parts, count = ndimage.label(foreground)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    kept = np.isin(parts, 1 + np.flatnonzero(sizes >= 0.1 * sizes.max()))
    low, high = [], []
    for axis, length in enumerate(shape):
        where = np.flatnonzero(kept.any(axis=tuple(a for a in range(3) if a != axis)))
        cell = length / kept.shape[axis]
        low.append(int(np.floor(where[0] * cell)))
        high.append(int(np.ceil((where[-1] + 1) * cell)))
    return (low[0], low[1], low[2], high[0], high[1], high[2])


def expanded(box: Box, by: Sequence[float], shape: Sequence[int], least: Sequence[int] = (1, 1, 1)) -> Box:
    """Expand a box by shares `by` of its sides on both sides, to `least` voxels at least, kept inside."""
    low, high = [], []
    for axis in range(3):
        first, end = float(box[axis]), float(box[axis + 3])
        grown = (end - first) * by[axis]
        short = max(least[axis] - (end - first + 2 * grown), 0) / 2
        first, end = first - grown - short, end + grown + short
        # A box that sticks out on one side is pushed inside before it is cut.
        push = max(-first, 0.0) - max(end - shape[axis], 0.0)
        low.append(max(int(np.floor(first + push)), 0))
        high.append(min(int(np.ceil(end + push)), shape[axis]))
    return (low[0], low[1], low[2], high[0], high[1], high[2])


@torch.no_grad()
def find_region(
    coarse: nn.Module, image: Tensor, size: Sequence[int], margin: float, least: Sequence[int]
) -> Box:
    """Find the region of a volume by a coarse stage; the whole of it where it finds nothing.

    Args:
        coarse: Network that gives a list of logits, channel 1 of the first for foreground; in evaluation
            mode.
        image: Volume (C, D, H, W) on the coarse stage's device.
        size: Size to which the volume is shrunk.
        margin: Share of the box's sides added on each side.
        least: Least number of voxels of the region along D, H, W.
    """
    shape = image.shape[1:]
    logits = coarse(shrunk(image.float(), size)[None])[0][0].float()
    box = region_of(logits.softmax(dim=0)[1], shape)
    if box is None:
        return (0, 0, 0, shape[0], shape[1], shape[2])
    return expanded(box, [margin] * 3, shape, least)
