"""Dense predictions of whole volumes: sliding windows, blended by a Gaussian, and mirrored copies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ssl3d.encoders.inference import gaussian_weight, window_starts

Triple = tuple[int, int, int]


@torch.no_grad()
def predict_windows(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    window: Sequence[int],
    overlap: float = 0.5,
    batch: int = 4,
    mirror: Iterable[int] = (),
    device: torch.device | str | None = None,
) -> Tensor:
    """Predict every voxel of a volume by a network, window by window.

    Windows cover the volume evenly; where they overlap, those in whose middle a voxel lies count more (a
    Gaussian, standard deviation an eighth of the window, as nnU-Net's). A window is never larger than
    the volume, nothing is padded; windows of depth 1 segment slice by slice.

    Args:
        network: Function of (B, C, d, h, w) to (B, K, d, h, w), which are averaged: probabilities as a
            rule.
        image: Volume (C, D, H, W).
        window: Size (D, H, W) of a window in voxels.
        overlap: Share of a window that the next one covers too, in [0, 1).
        batch: Number of windows per pass.
        mirror: Axes among 0 to 2: the mean is taken over all combinations of mirrored axes among them, 8
            passes for three axes.
        device: Device of the network; that of `image` if None.

    Returns:
        (K, D, H, W) float32, on the image's device.
    """
    if image.ndim != 4:
        raise ValueError(f"a volume is (C, D, H, W), got {tuple(image.shape)}")
    device = image.device if device is None else torch.device(device)
    slabs = predict_slabs(
        network, lambda first, depth: image[:, first : first + depth], image.shape[1:],
        window, overlap, batch, mirror, device,
    )  # fmt: skip
    return torch.cat(list(slabs), dim=1)


@torch.no_grad()
def predict_slabs(
    network: Callable[[Tensor], Tensor],
    read: Callable[[int, int], Tensor],
    shape: Sequence[int],
    window: Sequence[int],
    overlap: float = 0.5,
    batch: int = 4,
    mirror: Iterable[int] = (),
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Predict a volume of any depth slab by slab, as `predict_windows` does, to the last bit.

    Windows go along D last, so that no more than the slices that they still reach is held: of image and
    predictions about a window's depth.

    Args:
        network: Function of (B, C, d, h, w) to (B, K, d, h, w), which are averaged.
        read: Function of the first slice and a number of slices that returns these, (C, d, H, W).
        shape: Shape (D, H, W) of the volume.
        window: Size (D, H, W) of a window in voxels.
        overlap: Share of a window that the next one covers too, in [0, 1).
        batch: Number of windows per pass.
        mirror: Axes among 0 to 2 that are mirrored.
        device: Device of the network.

    Yields:
        Slabs (K, d, H, W) float32 from the first slice to the last, on the device of what is read.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, not {overlap}")
    d, h, w = (min(side, length) for side, length in zip(window, shape, strict=True))
    size: Triple = (d, h, w)
    starts = [window_starts(length, side, overlap) for length, side in zip(shape, size, strict=True)]
    flips = _flips([axis for axis in mirror if size[axis] > 1])
    places: list[Triple] = list(itertools.product(*starts))  # type: ignore[arg-type]
    sums: _Sums | None = None
    image, at = torch.empty(0), -1
    weight = gaussian_weight([torch.arange(length) for length in size], size)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        if sums is not None:
            yield from sums.finish(some[0][0])
        crops = []
        for place in some:
            if place[0] != at:
                at, image = place[0], read(place[0], d)
            crops.append(image[:, :, place[1] : place[1] + h, place[2] : place[2] + w].float())
        predictions = _mirrored(network, torch.stack(crops).to(device), flips).float().to(image.device)
        if sums is None:
            weight = weight.to(image.device)
            sums = _Sums(predictions.shape[1], shape, image.device)
        for place, prediction in zip(some, predictions, strict=True):
            sums.add(place, prediction, weight)
    assert sums is not None  # there is one window at least
    yield from sums.finish(shape[0])


class _Sums:
    """Weighted sums of predictions, of the slices that windows still to come may reach.

    Args:
        classes: Number of classes.
        shape: Shape (D, H, W) of the volume.
        device: Device of the sums.
    """

    def __init__(self, classes: int, shape: Sequence[int], device: torch.device) -> None:
        self._first = 0
        self._total = torch.zeros(classes, 0, *shape[1:], device=device)
        self._seen = torch.zeros(0, *shape[1:], device=device)

    def add(self, place: Triple, prediction: Tensor, weight: Tensor) -> None:
        """Add the weighted prediction (K, d, h, w) of the window at a place."""
        lacking = place[0] + weight.shape[0] - self._first - self._seen.shape[0]
        if lacking > 0:
            rest = (lacking, *self._seen.shape[1:])
            self._total = torch.cat([self._total, self._total.new_zeros(len(self._total), *rest)], dim=1)
            self._seen = torch.cat([self._seen, self._seen.new_zeros(rest)])
        begin = (place[0] - self._first, place[1], place[2])
        cut = tuple(slice(b, b + n) for b, n in zip(begin, weight.shape, strict=True))
        self._total[(slice(None), *cut)] += prediction * weight
        self._seen[cut] += weight

    def finish(self, until: int) -> Iterator[Tensor]:
        """Yield the slices before `until`, which no window reaches any more, and drop them."""
        depth = until - self._first
        if depth <= 0:
            return
        done = self._total[:, :depth].div_(self._seen[:depth])
        # Copies, so that what is dropped is freed.
        self._total, self._seen = self._total[:, depth:].clone(), self._seen[depth:].clone()
        self._first = until
        yield done


def _flips(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """List every set of the axes, none of them first; as axes of (B, C, D, H, W)."""
    return [
        tuple(axis + 2 for axis in some)
        for count in range(len(axes) + 1)
        for some in itertools.combinations(axes, count)
    ]


def _mirrored(
    network: Callable[[Tensor], Tensor], crops: Tensor, flips: Sequence[tuple[int, ...]]
) -> Tensor:
    if len(flips) == 1:
        return network(crops)
    predictions = [
        network(crops.flip(axes)).float().flip(axes) if axes else network(crops) for axes in flips
    ]
    return torch.stack([prediction.float() for prediction in predictions]).mean(dim=0)
