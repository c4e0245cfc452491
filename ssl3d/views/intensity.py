"""Contrast, noise, blur, bias fields and holes for batches of crops, on the device, one draw per example.

All keep shape and dtype, take any D >= 1, and compute in float32. Strengths are relative to the
example's own intensities, so they mean the same for z-scored MR, windowed CT and binary shapes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssl3d.rng import BatchRng
from ssl3d.views.spatial import none_chosen


def gamma(x: Tensor, rng: BatchRng, p: float = 0.5, strength: float = 0.5) -> Tensor:
    """Raise intensities, scaled to [0, 1] by the channel's range, to a power.

    The range is restored. With probability `p` per example; exponent ~ LogUniform(1/(1 + s), 1 + s), s
    being the strength, per example and channel.

    Args:
        x: Crops (B, C, D, H, W).
        rng: Generator of the B examples.
        p: Probability of the change, for each example.
        strength: Strength s of the curve.

    Example:
        >>> from ssl3d.rng import one_group
        >>> x = torch.linspace(0, 1, 8).view(1, 1, 2, 2, 2)
        >>> y = gamma(x, one_group(0, 1), p=1.0)
        >>> (y.min().item(), y.max().item()), torch.equal(x, y)
        ((0.0, 1.0), False)
    """
    exponent = torch.exp(rng.uniform(x.shape[1], low=-1.0, high=1.0) * math.log1p(strength))
    flags = rng.chance(p)
    if none_chosen(flags):
        return x
    low, high = _limits(x)
    span = (high - low).clamp_min(1e-6)
    scaled = ((x.float() - low) / span).clamp(0, 1)
    powered = (scaled.log() * _wide(exponent)).exp()  # pow with an exponent per example is slower
    return _chosen(flags, powered * span + low, x)


def contrast(x: Tensor, rng: BatchRng, p: float = 0.5, strength: float = 0.3) -> Tensor:
    """Stretch intensities about the channel's mean, and add a constant.

    With probability `p` per example; factor ~ LogUniform(1/(1 + s), 1 + s), and constant ~ U(-s, s)
    standard deviations of the channel, s being the strength, both per example and channel.
    """
    factor = torch.exp(rng.uniform(x.shape[1], low=-1.0, high=1.0) * math.log1p(strength))
    constant = rng.uniform(x.shape[1], low=-strength, high=strength)
    flags = rng.chance(p)
    if none_chosen(flags):
        return x
    mean, deviation = _moments(x)
    changed = (x.float() - mean) * _wide(factor) + mean + deviation * _wide(constant)
    return _chosen(flags, changed, x)


def noise(x: Tensor, rng: BatchRng, p: float = 0.5, strength: float = 0.2) -> Tensor:
    """Add Gaussian noise, whose standard deviation ~ U(0, strength) times the channel's.

    With probability `p` per example.
    """
    share = rng.uniform(1, high=strength)
    drawn = rng.normal(*x.shape[1:])
    flags = rng.chance(p)
    if none_chosen(flags):
        return x
    _, deviation = _moments(x)
    return _chosen(flags, x.float() + drawn * deviation * _wide(share), x)


def blur(
    x: Tensor, rng: BatchRng, p: float = 0.5, strength: float = 1.0, spacing: Tensor | None = None
) -> Tensor:
    """Blur with a Gaussian, whose standard deviation ~ U(0, strength) voxels.

    These are voxels of the finest axis: along an axis of coarser spacing ((B, 3), mm) the blur is narrower
    in proportion. At the border the kernel is cut and renormalised. With probability `p` per example.
    """
    width = rng.uniform(1, high=strength)
    flags = rng.chance(p)
    if none_chosen(flags):
        return x
    width = torch.where(flags[:, None], width, 0.0)
    blurred = x.float()
    for axis in range(3):
        n = x.shape[axis + 2]
        if n == 1:
            continue
        sigma = width
        if spacing is not None:
            sigma = width * (spacing.amin(1) / spacing[:, axis])[:, None]
        # A band matrix per example: a product is faster than convolutions with a kernel per example.
        place = torch.arange(n, device=x.device, dtype=torch.float32)
        exponent = -0.5 * ((place[:, None] - place) / sigma.clamp_min(1e-3)[..., None]) ** 2
        blurred = _along(blurred, exponent.softmax(dim=-1), axis)
    return torch.where(_flags(flags), blurred.to(x.dtype), x)


def low_resolution(
    x: Tensor, rng: BatchRng, p: float = 0.5, strength: float = 1.0, axes: Sequence[int] = (0, 1, 2)
) -> Tensor:
    """Sample along `axes` at a lower resolution, by the nearest voxel, and interpolate linearly back.

    A voxel of the lower resolution is f voxels long, f ~ U(1, 1 + strength), the same along all axes, as in
    nnU-Net's simulation of low resolution (there 1 to 2, with cubic interpolation). With probability `p`
    per example.
    """
    factor = 1 + rng.uniform(1, high=strength)
    flags = rng.chance(p)
    if none_chosen(flags):
        return x
    factor = torch.where(flags[:, None], factor, 1.0)
    changed = x.float()
    for axis in axes:
        if x.shape[axis + 2] > 1:
            changed = _along(changed, _resampling(factor, x.shape[axis + 2]), axis)
    return _chosen(flags, changed, x)


def _resampling(factor: Tensor, n: int) -> Tensor:
    """Return the matrices (B, n, n) that sample n voxels at `factor` (B, 1) and interpolate back."""
    place = torch.arange(n, device=factor.device, dtype=torch.float32)
    count = (n / factor).round().clamp_min(1)
    step = n / count  # whole cells, so that both ends are met alike
    at = ((place + 0.5) / step - 0.5).clamp_min(0)
    below = torch.minimum(at.floor(), count - 1)
    above = torch.minimum(below + 1, count - 1)
    matrix = factor.new_zeros(len(factor), n, n)
    for cell, weight in ((below, 1 - (at - below)), (above, at - below)):
        source = ((cell + 0.5) * step).floor().clamp(0, n - 1).long()
        matrix.scatter_add_(2, source[..., None], weight[..., None])
    return matrix


def _along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply each example by its own matrix (B, n, n) along an axis of D, H, W."""
    moved = x.movedim(axis + 2, -1)
    product = moved.reshape(len(x), -1, moved.shape[-1]) @ matrix.transpose(1, 2)
    return product.view(moved.shape).movedim(-1, axis + 2)


def bias_field(x: Tensor, rng: BatchRng, p: float = 0.5, strength: float = 0.3, order: int = 3) -> Tensor:
    """Multiply intensities, counted from the channel's lowest, by a smooth field, as MR coils do.

    The field is exp of a polynomial in the crop's coordinates (each in [-1, 1]) of the given total
    order, without a constant, its coefficients ~ U(-strength, strength). With probability `p` per example.
    """
    powers = [
        power
        for power in itertools.product(range(order + 1), repeat=3)
        if 0 < sum(power) <= order
        and all(n > 1 or not exponent for n, exponent in zip(x.shape[2:], power, strict=True))
    ]
    if not powers:
        return x
    drawn = rng.uniform(len(powers), low=-strength, high=strength)
    flags = rng.chance(p)
    if none_chosen(flags):
        return x
    coefficients = drawn.new_zeros(len(x), *[order + 1] * 3)
    i, j, k = (list(power) for power in zip(*powers, strict=True))
    coefficients[:, i, j, k] = drawn
    exponents = torch.arange(order + 1, device=x.device)
    d, h, w = (torch.linspace(-1, 1, n, device=x.device) ** exponents[:, None] for n in x.shape[2:])
    # One axis after the other: the terms of the polynomial never exist in full size.
    plane = torch.einsum("bijk,kw,jh->bihw", coefficients, w, h)
    field = torch.einsum("bihw,id->bdhw", plane, d).exp()[:, None]
    low, _ = _limits(x)
    return _chosen(flags, (x.float() - low) * field + low, x)


def cutout(x: Tensor, rng: BatchRng, p: float = 0.5, strength: float = 0.4) -> Tensor:
    """Fill one box with the channel's mean, each of its sides ~ U(0, strength) times the crop's.

    The box lies anywhere within the crop, uniformly; an axis of one voxel it spans whole. With
    probability `p` per example.
    """
    sides = rng.uniform(3, high=strength)
    place = rng.uniform(3)
    flags = rng.chance(p)
    if none_chosen(flags):
        return x
    inside: Tensor | None = None
    for axis, n in enumerate(x.shape[2:]):
        if n == 1:
            continue
        centres = (torch.arange(n, device=x.device, dtype=torch.float32) + 0.5) / n
        start = (place * (1 - sides))[:, axis, None]
        shape = [len(x), 1, 1, 1, 1]
        shape[axis + 2] = n
        along = ((centres >= start) & (centres < start + sides[:, axis, None])).view(shape)
        inside = along if inside is None else inside & along
    if inside is None:
        return x
    mean, _ = _moments(x)
    return _chosen(flags, torch.where(inside, mean, x.float()), x)


def _chosen(flags: Tensor, changed: Tensor, x: Tensor) -> Tensor:
    return torch.where(_flags(flags), changed.to(x.dtype), x)


def _flags(flags: Tensor) -> Tensor:
    return flags.view(-1, 1, 1, 1, 1)


def _wide(per_channel: Tensor) -> Tensor:
    return per_channel[:, :, None, None, None]


def _limits(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = x.flatten(2).aminmax(dim=2)
    return _wide(low.float()), _wide(high.float())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per example and channel; one voxel has deviation 0."""
    x = x.float()
    mean = x.mean(dim=(2, 3, 4), keepdim=True)
    norm = torch.linalg.vector_norm(x - mean, dim=(2, 3, 4), keepdim=True)
    return mean, norm / math.sqrt(x[0, 0].numel())
