"""Dense predictions of whole volumes: sliding windows, blended by a Gaussian, and mirrored copies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

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
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, not {overlap}")
    device = image.device if device is None else torch.device(device)
    shape = image.shape[1:]
    size: Triple = tuple(min(w, n) for w, n in zip(window, shape, strict=True))  # type: ignore[assignment]
    starts = [window_starts(n, s, overlap) for n, s in zip(shape, size, strict=True)]
    weight = gaussian_weight([torch.arange(n) for n in size], size).to(image.device)
    flips = _flips([axis for axis in mirror if size[axis] > 1])
    places = list(itertools.product(*starts))
    total: Tensor | None = None
    seen = torch.zeros(tuple(shape), device=image.device)
    for first in range(0, len(places), batch):
        cuts = [
            tuple(slice(at, at + length) for at, length in zip(place, size, strict=True))
            for place in places[first : first + batch]
        ]
        crops = torch.stack([image[(slice(None), *cut)].float() for cut in cuts]).to(device)
        predictions = _mirrored(network, crops, flips).float().to(image.device)
        if total is None:
            total = torch.zeros(predictions.shape[1], *shape, device=image.device)
        for cut, prediction in zip(cuts, predictions, strict=True):
            total[(slice(None), *cut)] += prediction * weight
            seen[cut] += weight
    assert total is not None  # there is one window at least
    return total.div_(seen)


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
