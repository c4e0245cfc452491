"""Windows and slabs of predicted probabilities, and their places in the volume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ssl3d_benchmarks.finetune.segmentation.data import SLAB

Triple = tuple[int, int, int]


class WindowNetwork(nn.Module):
    """Network of one window, from its voxels to the probabilities of the classes.

    Args:
        network: Network whose first output is logits (B, K, D, H, W).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Compute the probabilities (B, K, D, H, W) of windows (B, C, D, H, W)."""
        logits: Tensor = self.network(x)[0]
        return logits.float().softmax(dim=1)


def within_volume(slabs: Iterator[Tensor], start: Sequence[int], shape: Sequence[int]) -> Iterator[Tensor]:
    """Turn the slabs of a region into those of its volume, which is background elsewhere.

    Args:
        slabs: Probabilities (K, d, h, w) of the region, from its first slice to its last.
        start: First voxel of the region; may lie outside the volume.
        shape: Shape (D, H, W) of the volume.
    """
    at, done, classes = start[0], 0, 1
    for slab in slabs:
        classes, depth = slab.shape[:2]
        first, end = max(at, 0), min(at + depth, shape[0])
        if end > first:
            yield from _background(classes, first - done, shape, slab)
            inner = slab[:, first - at : end - at]
            if tuple(start[1:]) != (0, 0) or inner.shape[2:] != tuple(shape[1:]):
                inner = _placed(inner, start, shape)
            yield inner
            done = end
        at += depth
        last = slab
    yield from _background(classes, shape[0] - done, shape, last)


def _background(classes: int, depth: int, shape: Sequence[int], like: Tensor) -> Iterator[Tensor]:
    """Yield slices of background, few at a time."""
    for first in range(0, depth, SLAB):
        slab = like.new_zeros(classes, min(SLAB, depth - first), *shape[1:])
        slab[0] = 1
        yield slab


def _placed(slab: Tensor, start: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Put a slab (K, d, h, w) at its rows and columns of the volume."""
    whole = slab.new_zeros(*slab.shape[:2], *shape[1:])
    whole[0] = 1
    pairs = list(zip(start[1:], slab.shape[2:], shape[1:], strict=True))
    here = tuple(slice(max(s, 0), min(s + n, limit)) for s, n, limit in pairs)
    there = tuple(slice(cut.start - s, cut.stop - s) for cut, (s, _, _) in zip(here, pairs, strict=True))
    whole[(slice(None), slice(None), *here)] = slab[(slice(None), slice(None), *there)]
    return whole


def padded(box: Sequence[int], size: Triple) -> tuple[list[int], list[int]]:
    """Return start and size of the crop that is read for a box; a smaller box lies in its middle."""
    start, extent = [], []
    for axis in range(3):
        length = box[axis + 3] - box[axis]
        short = max(size[axis] - length, 0)
        start.append(box[axis] - short // 2)
        extent.append(length + short)
    return start, extent
