"""Embeddings and dense features of volumes of any size, by sliding windows; norm recalibration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ssl3d import memory
from ssl3d.encoder import Encoder

Triple = tuple[int, int, int]


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """Place the windows that cover one axis, evenly spread, at least `overlap` shared.

    Args:
        size: Length of the volume, in voxels.
        window: Length of a window, in voxels; one of `size` voxels is enough where it is not smaller.
        overlap: Share of a window that the next one covers too, in [0, 1).

    Returns:
        First voxels of the windows.

    Example:
        >>> window_starts(10, 4, 0.5)
        [0, 2, 4, 6]
    """
    if size <= window:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    count = math.ceil((size - window) / step) + 1
    return [round(n * (size - window) / (count - 1)) for n in range(count)]


def embed_volume(
    encoder: Encoder,
    volume: Tensor,
    patch: Sequence[int],
    overlap: float = 0.5,
    batch: int = 4,
    weighting: str = "even",
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Embed one volume: the weighted mean of the embeddings of windows that cover it.

    Nothing is padded. An axis shorter than the window is seen whole; a window of depth 1 is an image, as
    for an encoder that was trained on slices.

    Args:
        encoder: Encoder, used in eval mode on its own device.
        volume: Volume (C, D, H, W).
        patch: Size (D, H, W) of a window in voxels, that of the crops that the encoder was trained on.
        overlap: Share of a window that the next one covers too, in [0, 1).
        batch: Number of windows per forward pass.
        weighting: Weights of the windows. `even`: every voxel counts the same, however many windows cover
            it; `gaussian`: windows near the volume's centre count more (standard deviation a quarter of
            each axis).
        autocast: Precision of the encoder, such as torch.bfloat16; None for its own.

    Returns:
        Embedding (embed_dim,) float32, on the volume's device.
    """
    if weighting not in ("even", "gaussian"):
        raise ValueError(f"weighting is {weighting!r}; choose even or gaussian")
    size, windows = _windows(volume, patch, overlap)
    per_axis = [
        _axis_weights(starts, window, length, weighting)
        for starts, window, length in zip(windows, size, volume.shape[1:], strict=True)
    ]
    weights = torch.tensor([math.prod(w) for w in itertools.product(*per_axis)], dtype=torch.float64)
    total = torch.zeros(encoder.embed_dim, dtype=torch.float64)
    with _inference(encoder, autocast) as device:
        done = 0
        for crops, _ in _batches(volume, size, windows, batch):
            embeddings = encoder.embed(crops.to(device)).double().cpu()
            total += weights[done : done + len(crops)] @ embeddings
            done += len(crops)
    return (total / weights.sum()).float().to(volume.device)


def embed_slices(
    encoder: Encoder,
    volume: Tensor,
    slab: int = 1,
    plane: Sequence[int] | None = None,
    overlap: float = 0.5,
    batch: int = 64,
    autocast: torch.dtype | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Embed a volume's slabs, one after the other along D, each on its own.

    Args:
        encoder: Encoder, used in eval mode on its own device.
        volume: Volume (C, D, H, W).
        slab: Number of slices in a slab; what is left of D by whole slabs is not seen.
        plane: Size (H, W) of a window in voxels; a larger slab is the mean over windows, every voxel
            counting the same. None: slabs are seen whole.
        overlap: Share of a window that the next one covers too, in [0, 1).
        batch: Number of slabs per forward pass.
        autocast: Precision of the encoder, such as torch.bfloat16; None for its own.
        embed: Function of the encoder that embeds slabs (B, C, slab, h, w) as (B, F); None for its own.

    Returns:
        Embeddings (D // slab, F) float32, on the volume's device.
    """
    embed = encoder.embed if embed is None else embed
    count = volume.shape[1] // slab
    window = (count * slab, *(volume.shape[2:] if plane is None else plane))
    (_, high, wide), windows = _windows(volume, window, overlap)
    slabs = volume[:, : count * slab].unflatten(1, (count, slab)).transpose(0, 1)
    ways = [_axis_weights(windows[a], n, volume.shape[1 + a], "even") for a, n in ((1, high), (2, wide))]
    parts = []
    with _inference(encoder, autocast) as device:
        for first in range(0, count, batch):
            some = slabs[first : first + batch].float()
            part = torch.zeros((), device=volume.device)
            for (h, w), (along_h, along_w) in zip(
                itertools.product(*windows[1:]), itertools.product(*ways), strict=True
            ):
                crops = some[..., h : h + high, w : w + wide].to(device)
                part = part + embed(crops).float().to(volume.device) * (along_h * along_w)
            parts.append(part)
    return torch.cat(parts) / (sum(ways[0]) * sum(ways[1]))


def dense_features(
    encoder: Encoder,
    volume: Tensor,
    patch: Sequence[int],
    overlap: float = 0.5,
    batch: int = 4,
    levels: Sequence[int] | None = None,
    every: Sequence[int] = (1, 1, 1),
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Compute feature maps of one volume at its own resolution, stitched from windows.

    Every map is brought to the window's voxels (see `upsample`); where windows overlap, those in whose
    middle a voxel lies count more (a Gaussian, standard deviation an eighth of the window, as nnU-Net's).
    Nothing is padded.

    Args:
        encoder: Encoder, used in eval mode on its own device.
        volume: Volume (C, D, H, W).
        patch: Size (D, H, W) of a window in voxels.
        overlap: Share of a window that the next one covers too, in [0, 1).
        batch: Number of windows per forward pass.
        levels: Numbers of the feature maps, such as `[-1]`; all of them if None.
        every: Steps n along D, H, W; only voxels 0, n, 2n, ... get features, which takes less memory.
        autocast: Precision of the encoder, such as torch.bfloat16; None for its own.

    Returns:
        (sum of the maps' channels, ceil(D / every), ceil(H / every), ceil(W / every)) float32, on the
        volume's device.

    Raises:
        DataError: The feature maps need more memory than may be taken.
    """
    step: Triple = (every[0], every[1], every[2])
    count = len(encoder.channels)
    chosen = range(count) if levels is None else [range(count)[level] for level in levels]
    size, windows = _windows(volume, patch, overlap)
    shape = tuple(-(-n // s) for n, s in zip(volume.shape[1:], step, strict=True))
    width = sum(encoder.channels[level] for level in chosen)
    memory.check(4 * (width + 1) * math.prod(shape), f"feature maps of shape {(width, *shape)}: ")
    total = torch.zeros(width, *shape, device=volume.device)
    seen = torch.zeros(shape, device=volume.device)
    with _inference(encoder, autocast) as device:
        for crops, starts in _batches(volume, size, windows, batch):
            maps = encoder(crops.to(device))
            for n, start in enumerate(starts):
                # Positions inside this window of the voxels that are kept.
                inside = [
                    torch.arange(length, device=device)[-begin % s :: s]
                    for begin, length, s in zip(start, size, step, strict=True)
                ]
                if not all(len(positions) for positions in inside):
                    continue  # a window of depth 1 between the slices that are kept
                place = tuple(
                    slice(-(-begin // s), -(-begin // s) + len(positions))
                    for begin, s, positions in zip(start, step, inside, strict=True)
                )
                weight = gaussian_weight(inside, size).to(volume.device)
                first = 0
                for level in chosen:
                    fine = _sample(maps[level][n : n + 1].float(), inside, encoder.strides[level])[0]
                    last = first + encoder.channels[level]
                    total[(slice(first, last), *place)] += fine.to(volume.device) * weight
                    first = last
                seen[place] += weight
    return total.div_(seen)


def upsample(map_: Tensor, size: Sequence[int], stride: Sequence[float]) -> Tensor:
    """Interpolate a feature map linearly at the input's voxels.

    Voxel i of a map of stride s is centred on voxel i * s of the input, as in every network whose odd
    kernels are padded on both sides alike; `F.interpolate` would put it (s - 1) / 2 voxels further on,
    7.5 voxels at stride 16. Beyond the last centre the last value holds.

    Args:
        map_: Feature map (B, C, d, h, w).
        size: Size (D, H, W) of the input.
        stride: Strides of the map along (D, H, W).

    Returns:
        Map (B, C, D, H, W), in the map's precision, also under autocast.

    Example:
        >>> upsample(torch.tensor([0.0, 2.0]).view(1, 1, 1, 1, 2), (1, 1, 4), (1, 1, 2)).flatten()
        tensor([0., 1., 2., 2.])
    """
    return _sample(map_, [torch.arange(n, device=map_.device) for n in size], stride)


def recalibrate_norm(encoder: nn.Module, batches: Iterable[Tensor]) -> int:
    """Estimate the running statistics of every batch norm anew, from unlabelled volumes.

    For an encoder that is used on another depth, spacing or kind of image than it was trained on. The
    statistics become the mean over the batches; weights and all other modules stay as they are.

    Args:
        encoder: Encoder, changed in place; a network without batch norm is left alone.
        batches: Volumes (B, C, D, H, W) as the encoder will see them, of about equal size.

    Returns:
        The number of batches seen.

    Raises:
        ValueError: There was no batch.
    """
    norms = [
        module
        for module in encoder.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return 0
    modes = {module: module.training for module in encoder.modules()}
    momenta = [module.momentum for module in norms]
    kept = [{k: v.clone() for k, v in module.named_buffers()} for module in norms]
    device = next(encoder.parameters()).device
    encoder.eval()
    seen = 0
    try:
        for module in norms:
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
            module.train()
        with torch.no_grad():
            for x in batches:
                encoder(x.to(device))
                seen += 1
    finally:
        for module, momentum, buffers in zip(norms, momenta, kept, strict=True):
            module.momentum = momentum
            if not seen:
                for name, value in buffers.items():
                    getattr(module, name).copy_(value)
        for part, training in modes.items():
            part.training = training
    if not seen:
        raise ValueError("recalibrate_norm needs at least one batch of volumes, got none")
    return seen


# Windows ------------------------------------------------------------------------------------------


def _windows(volume: Tensor, patch: Sequence[int], overlap: float) -> tuple[Triple, list[list[int]]]:
    """Return the window's size, and its starts along each axis."""
    if volume.ndim != 4:
        raise ValueError(f"a volume is (C, D, H, W), got {tuple(volume.shape)}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, not {overlap}")
    if len(patch) != 3 or min(patch) < 1:
        raise ValueError(f"patch must be three sizes (D, H, W) of at least 1, not {tuple(patch)}")
    d, h, w = (min(p, n) for p, n in zip(patch, volume.shape[1:], strict=True))
    pairs = zip(volume.shape[1:], (d, h, w), strict=True)
    return (d, h, w), [window_starts(n, window, overlap) for n, window in pairs]


def _batches(
    volume: Tensor, size: Triple, windows: list[list[int]], batch: int
) -> Iterator[tuple[Tensor, list[Triple]]]:
    places = list(itertools.product(*windows))
    for n in range(0, len(places), batch):
        chosen = places[n : n + batch]
        crops = [volume[:, d : d + size[0], h : h + size[1], w : w + size[2]].float() for d, h, w in chosen]
        yield torch.stack(crops), [(d, h, w) for d, h, w in chosen]


def _axis_weights(starts: list[int], window: int, length: int, weighting: str) -> list[float]:
    if weighting == "gaussian":
        centre, sigma = (length - 1) / 2, max(length / 4, 1e-6)
        middles = [start + (window - 1) / 2 for start in starts]
        return [math.exp(-0.5 * ((middle - centre) / sigma) ** 2) for middle in middles]
    cover = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        cover[start : start + window] += 1
    return [float((1 / cover[start : start + window]).mean()) for start in starts]


def gaussian_weight(positions: Sequence[Tensor], size: Triple) -> Tensor:
    """Weigh a window's voxels, (d, h, w), by the Gaussian of nnU-Net v2: 1 at the voxel `size // 2`.

    The standard deviation is an eighth of each side, so that the zeros with which a network pads a window
    at its faces hardly enter a blend. The smallest weight is e^-24. nnU-Net scales its weights, and raises
    those that half precision rounds to 0; in single precision none is 0, and a common factor cancels.

    Args:
        positions: Positions along D, H and W, in voxels of the window.
        size: Size (D, H, W) of the window.
    """
    axes = []
    for position, length in zip(positions, size, strict=True):
        away = (position - length // 2) / (length / 8)
        axes.append(torch.exp(-0.5 * away**2))
    d, h, w = axes
    return d[:, None, None] * h[None, :, None] * w[None, None, :]


def _sample(map_: Tensor, positions: Sequence[Tensor], stride: Sequence[float]) -> Tensor:
    """Interpolate at input positions: one small matrix product per axis, in the map's own precision."""
    with torch.autocast(map_.device.type, enabled=False):  # which would round float32 to bfloat16
        for axis, (position, step) in enumerate(zip(positions, stride, strict=True)):
            length = map_.shape[2 + axis]
            if step == 1 and torch.equal(position, torch.arange(length, device=position.device)):
                continue
            # In float32 at least: bfloat16 does not count beyond 256.
            exact = torch.promote_types(map_.dtype, torch.float32)
            at = (position.to(exact) / step).clamp(max=length - 1)
            low = at.floor().long()
            high = (low + 1).clamp(max=length - 1)
            part = (at - low).unsqueeze(1)
            one_hot = torch.eye(length, dtype=exact, device=map_.device)
            matrix = (one_hot[low] * (1 - part) + one_hot[high] * part).to(map_.dtype)
            map_ = torch.movedim(torch.movedim(map_, 2 + axis, -1) @ matrix.T, -1, 2 + axis)
    return map_


@contextmanager
def _inference(encoder: Encoder, autocast: torch.dtype | None) -> Iterator[torch.device]:
    """Set eval mode, without gradients; yield the encoder's device and put every module's mode back."""
    device = next(encoder.parameters()).device
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            yield device
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode; afterwards every part of it is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
