"""Corruptions of crops before they are restored, as in Models Genesis: curves, shuffles, painted boxes.

All work on batches on the device, with one draw per example, keep shape and dtype, take any D >= 1, and
give a new tensor: what is to be restored is never touched. Strengths are relative to the example's own
range, so they mean the same for z-scored MR and windowed CT.

Zhou et al., Models Genesis, Medical Image Analysis 2021 (arXiv:2004.07882), and its released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssl3d.on_device import can_ask
from ssl3d.rng import BatchRng

_NODES = 1000  # of a curve, between which it is straight
_BLOCKS = 5  # boxes painted at most
_CONTINUE = 0.95  # chance of each further box
_BORDER = 3  # voxels at the border of a crop that no box touches


@dataclasses.dataclass
class Corruptions:
    """Options of what is done to a crop before it is restored. A proxy's `Config` inherits them.

    Attributes:
        shuffle: Probability that an example's voxels are shuffled within small blocks, whose sides ~
            U{1, ..., a tenth of the crop's} voxels.
        shuffled: Probability that each of those blocks is shuffled.
        curve: Probability that an example's grey values run through a random curve; with probability 1/2
            it falls, which inverts the image.
        paint: Probability that noise is painted over an example.
        outside: Probability that a painted example is painted outside of boxes instead of inside.
    """

    shuffle: float = 0.5
    shuffled: float = 0.82
    curve: float = 0.9
    paint: float = 0.9
    outside: float = 0.8

    def __post_init__(self) -> None:
        """Check the ranges of all fields.

        Raises:
            ValueError: A field is out of range, or nothing is corrupted; the message names it.
        """
        for name in ("shuffle", "shuffled", "curve", "paint", "outside"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, not {getattr(self, name):g}")
        if not (self.shuffle and self.shuffled) and not self.curve and not self.paint:
            raise ValueError("shuffle, curve and paint are all 0: nothing is corrupted, nothing to restore")


class Corrupted(NamedTuple):
    """Corrupted crops, and what befell them.

    Attributes:
        input: Crops that the network sees, (B, C, D, H, W).
        done: Corruptions of each example, name -> (B,) booleans: shuffle, curve, inpaint, outpaint.
    """

    input: Tensor
    done: dict[str, Tensor]


@torch.no_grad()
def corrupt(options: Corruptions, x: Tensor, rng: BatchRng) -> Corrupted:
    """Corrupt a batch of crops as Models Genesis does: shuffle, curve, then paint.

    Args:
        options: Probabilities of the corruptions.
        x: Crops to restore, (B, C, D, H, W); they stay as they are.
        rng: Generator of the B examples.

    Example:
        >>> from ssl3d.rng import one_group
        >>> options, x = Corruptions(paint=1.0, outside=0.0), torch.rand(2, 1, 8, 8, 8)
        >>> spoilt = corrupt(options, x, one_group(0, 2))
        >>> spoilt.input.shape, spoilt.done["inpaint"]
        (torch.Size([2, 1, 8, 8, 8]), tensor([True, True]))
    """
    with torch.autocast(x.device.type, enabled=False):
        shuffle, curve = rng.chance(options.shuffle), rng.chance(options.curve)
        paint, outside = rng.chance(options.paint), rng.chance(options.outside)
        seen = local_shuffle(x, rng, options.shuffled, shuffle)
        seen = _only(curve, bezier_intensity(seen, rng), seen)
        inpaint, outpaint = paint & ~outside, paint & outside
        seen = _only(inpaint, in_painting(seen, rng), _only(outpaint, out_painting(seen, rng), seen))
        done = {"shuffle": shuffle, "curve": curve, "inpaint": inpaint, "outpaint": outpaint}
        return Corrupted(seen, done)


@torch.no_grad()
def corrupt_once(x: Tensor, rng: BatchRng, shuffled: float = 0.82) -> Corrupted:
    """Corrupt each crop of a batch in exactly one of four ways, each as likely, as TransVW does.

    Its voxels are shuffled locally, its grey values run through a curve, or noise is painted inside or
    outside of one box.

    Args:
        x: Crops to restore, (B, C, D, H, W); they stay as they are.
        rng: Generator of the B examples.
        shuffled: Probability that each block of a shuffled crop is shuffled.

    Example:
        >>> from ssl3d.rng import one_group
        >>> done = corrupt_once(torch.rand(5, 1, 8, 8, 8), one_group(0, 5)).done
        >>> torch.stack(list(done.values())).sum(0)
        tensor([1, 1, 1, 1, 1])
    """
    with torch.autocast(x.device.type, enabled=False):
        way = rng.integers(0, 4)
        shuffle, curve, inpaint, outpaint = (way == number for number in range(4))
        seen = local_shuffle(x, rng, shuffled, shuffle)
        seen = _only(curve, bezier_intensity(x, rng), seen)
        seen = _only(inpaint, in_painting(x, rng, least=1, most=1), seen)
        seen = _only(outpaint, out_painting(x, rng, most=1), seen)
        done = {"shuffle": shuffle, "curve": curve, "inpaint": inpaint, "outpaint": outpaint}
        return Corrupted(seen, done)


# Grey values ------------------------------------------------------------------------------------------


def bezier_intensity(x: Tensor, rng: BatchRng, inverted: float = 0.5) -> Tensor:
    """Run each example's grey values through a random cubic Bézier curve over its range.

    The range of each channel is brought to [0, 1]; the curve goes from (0, 0) to (1, 1) by two control
    points uniform in the unit square, so it is monotone; with probability `inverted` it is mirrored and
    falls from (0, 1) to (1, 0). The range stays what it was. One curve per example and channel.

    Args:
        x: Crops (B, C, D, H, W).
        rng: Generator of the B examples.
        inverted: Probability of a falling curve.
    """
    channels = x.shape[1]
    points = rng.uniform(channels, 2, 2)
    falling = rng.chance(inverted, channels)
    low, span = value_range(x)
    across, up = bezier(points[..., 0]), bezier(points[..., 1])
    # The released code sorts the places and, unless inverted, the values: the values then run downwards.
    up = torch.where(falling[..., None], up.flip(-1), up)
    unit = ((x.float() - low) / span.clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)
    changed = _interpolate(unit.flatten(2), across, up).view_as(unit)
    return (low + changed * span).to(x.dtype)


def bezier(inner: Tensor, nodes: int = _NODES) -> Tensor:
    """Evaluate one coordinate along cubic Bézier curves from 0 to 1.

    Args:
        inner: Coordinates of the two inner control points, (..., 2), in [0, 1].
        nodes: Number of steps of the curve's parameter, from 0 to 1, both included.

    Returns:
        Coordinates (..., nodes), from 0 to 1, never falling.

    Example:
        >>> bezier(torch.tensor([1 / 3, 2 / 3]), nodes=3)
        tensor([0.0000, 0.5000, 1.0000])
    """
    t = torch.linspace(0, 1, nodes, device=inner.device, dtype=inner.dtype)
    a, b = inner[..., :1], inner[..., 1:]
    curve = 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3
    # Monotone but for rounding, which must not upset the search in it.
    return curve.cummax(-1).values.clamp(max=1.0)


def _interpolate(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Interpolate each row as `numpy.interp`: x (B, C, N) between places and values (B, C, nodes)."""
    after = torch.searchsorted(places, x, right=True).clamp_(1, places.shape[-1] - 1)
    before = after - 1
    left, width = places.gather(-1, before), places.diff(dim=-1).gather(-1, before)
    start, rise = values.gather(-1, before), values.diff(dim=-1).gather(-1, before)
    share = ((x - left) / width.clamp_min(torch.finfo(x.dtype).tiny)).clamp(0, 1)
    return start + share * rise


# Places -----------------------------------------------------------------------------------------------


def local_shuffle(x: Tensor, rng: BatchRng, share: float = 0.82, rows: Tensor | None = None) -> Tensor:
    """Permute the voxels within small blocks, all channels of a voxel together.

    Each axis is cut into pieces of random lengths, 1 voxel to a tenth of the side; the blocks between
    the cuts are shuffled, each with probability `share`.

    The released code draws 10 000 overlapping blocks for a crop of 64 x 64 x 32, with sides from the
    same range, one after the other, each filled with a permutation of what the crop held there at
    first. That touches 82 % of the voxels, and a voxel's value then comes from within one block around
    it, as here; only here no value is lost or doubled, and all blocks are done at once.

    Args:
        x: Crops (B, C, D, H, W).
        rng: Generator of the B examples.
        share: Probability that a block is shuffled.
        rows: Examples to shuffle, (B,) booleans; all of them if None. The others come back as they are.
    """
    size = x.shape[2:]
    voxels = size.numel()
    cuts = [_pieces(rng, side) for side in size]
    chance, order = rng.chance(share, voxels), rng.uniform(voxels)
    # Elsewhere than on the CPU all are shuffled, since a choice of rows would have to be waited for.
    every = rows is None or not can_ask(rows)
    some = torch.arange(len(x), device=x.device) if rows is None or every else rows.nonzero()[:, 0]
    starts, lengths = zip(*[(start[some], length[some]) for start, length in cuts], strict=True)
    z, y, w = (_along(axis, start) for axis, start in enumerate(starts))
    p, q, r = (_along(axis, length) for axis, length in enumerate(lengths))
    at = [_along(axis, torch.arange(side, device=x.device)[None]) for axis, side in enumerate(size)]
    # With the voxels sorted by block, where each block begins, and where each of its voxels comes.
    begin = z * size[1] * size[2] + p * y * size[2] + p * q * w
    slot = begin + (at[0] - z) * q * r + (at[1] - y) * r + (at[2] - w)
    # The same within the block by chance: float64, since the numbers go up to that of the voxels.
    shuffled = (begin.flatten(1).double() + order[some]).argsort(dim=1)
    corner = (z * size[1] + y) * size[2] + w
    source = torch.where(
        chance[some].gather(1, corner.flatten(1)),
        shuffled.gather(1, slot.flatten(1)),
        torch.arange(voxels, device=x.device),
    )
    flat = x[some].flatten(2)
    moved = flat.gather(2, source[:, None].expand_as(flat)).view(len(some), *x.shape[1:])
    if rows is not None and every:
        return torch.where(rows.view(-1, 1, 1, 1, 1), moved, x)
    return x.index_copy(0, some, moved)


def _pieces(rng: BatchRng, side: int) -> tuple[Tensor, Tensor]:
    """Cut an axis at random: for each place, where its piece starts, and the piece's length, (B, side)."""
    longest = max(1, side // 10)
    ends = rng.integers(1, longest + 1, side).cumsum(1).clamp(max=side)
    at = torch.arange(side, device=ends.device)
    piece = torch.searchsorted(ends, at.expand_as(ends).contiguous(), right=True)
    last = ends.gather(1, piece)
    first = torch.cat([torch.zeros_like(ends[:, :1]), ends], dim=1).gather(1, piece)
    return first, last - first


def _along(axis: int, values: Tensor) -> Tensor:
    """Reshape (B, side) to (B, D, H, W), 1 along the other axes."""
    return values[:, :, None, None].movedim(1, axis + 1)


# Boxes ------------------------------------------------------------------------------------------------


def in_painting(x: Tensor, rng: BatchRng, least: int = 0, most: int = _BLOCKS) -> Tensor:
    """Paint `least` to `most` boxes with noise, uniform over the channel's range, voxel by voxel.

    Sides are a sixth to a third of the crop's; beyond `least`, each box comes with probability .95 after
    the one before it, so from 0 one example in twenty has none. As released, boxes keep 3 voxels from the
    border, where there is room.
    """
    limits = [(n // 6, n // 3) for n in x.shape[2:]]
    inside = draw_boxes(rng, x.shape[2:], limits, least, most)
    return torch.where(inside[:, None], _noise(x, rng), x)


def out_painting(x: Tensor, rng: BatchRng, most: int = _BLOCKS) -> Tensor:
    """Paint all but up to `most` boxes with noise, uniform over the channel's range, voxel by voxel.

    A box's sides are the crop's less 3/7 to 4/7 of it; there is one, and after each comes another with
    probability .95. As released, boxes keep 3 voxels from the border, where there is room.
    """
    limits = [(n - 4 * n // 7, n - 3 * n // 7) for n in x.shape[2:]]
    inside = draw_boxes(rng, x.shape[2:], limits, 1, most)
    return torch.where(inside[:, None], x, _noise(x, rng))


def draw_boxes(
    rng: BatchRng,
    size: Sequence[int],
    limits: Sequence[tuple[int, int]],
    least: int,
    most: int = _BLOCKS,
) -> Tensor:
    """Draw `least` to `most` boxes per example, and say where any of them lies, (B, D, H, W) booleans.

    Args:
        rng: Generator of the B examples.
        size: Size (D, H, W) of the crops.
        limits: Least and largest side of a box, for each axis.
        least: Number of boxes that there are for certain.
        most: Number of boxes at most; each beyond `least` comes with probability .95 after the one before.
    """
    more = torch.cat([rng.chance(1.0, least), rng.chance(_CONTINUE, most - least)], dim=1)
    there = more.int().cumprod(1).bool()
    inside = []
    for length, (shortest, longest) in zip(size, limits, strict=True):
        sides = rng.integers(max(shortest, 1), max(longest, 1) + 1, most)
        border = (length - sides).div(2, rounding_mode="floor").clamp(0, _BORDER)
        room = length - sides - 2 * border + 1
        start = border + (rng.uniform(most) * room).long()
        at = torch.arange(length, device=start.device)
        inside.append((at >= start[..., None]) & (at < (start + sides)[..., None]))
    d, h, w = inside
    d = d & there[..., None]
    inside_any = torch.zeros(len(d), *size, dtype=torch.bool, device=d.device)
    for n in range(most):
        inside_any |= d[:, n, :, None, None] & h[:, n, None, :, None] & w[:, n, None, None, :]
    return inside_any


def value_range(x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return lowest value and range of each example's channels, (B, C, 1, 1, 1), float32.

    Args:
        x: Crops (B, C, D, H, W).
        counted: Voxels that have a say, (B, 1, D, H, W), bool; all of them if None.
    """
    if counted is not None:  # the others take a value of those that count, if any does
        first = counted.flatten(1).int().argmax(1).view(-1, 1, 1).expand(-1, x.shape[1], 1)
        x = torch.where(counted, x, x.flatten(2).gather(2, first)[..., None, None])
    low, high = x.flatten(2).aminmax(dim=2)
    low, high = low.float()[..., None, None, None], high.float()[..., None, None, None]
    return low, high - low


def mean_of(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """Average all values of (B, C, D, H, W), or those of the voxels (B, 1, D, H, W) that are counted.

    Example:
        >>> x, counted = torch.arange(4.0).view(1, 1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2, dtype=torch.bool)
        >>> counted[..., 1, 1] = False
        >>> mean_of(x), mean_of(x, counted)
        (tensor(1.5000), tensor(1.))
    """
    if counted is None:
        return x.mean()
    return torch.where(counted, x, 0).sum() / (counted.sum() * x.shape[1]).clamp_min(1)


def means_of(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """Average each example's channels over all voxels, or those that are counted: (B, C, 1, 1, 1)."""
    if counted is None:
        return x.mean((2, 3, 4), keepdim=True)
    total = torch.where(counted, x, 0).sum((2, 3, 4), keepdim=True)
    return total / counted.sum((2, 3, 4), keepdim=True).clamp_min(1)


def _noise(x: Tensor, rng: BatchRng) -> Tensor:
    low, span = value_range(x)
    return (low + rng.uniform(*x.shape[1:]) * span).to(x.dtype)


def _only(flags: Tensor, changed: Tensor, x: Tensor) -> Tensor:
    return torch.where(flags.view(-1, 1, 1, 1, 1), changed, x)


# Errors -----------------------------------------------------------------------------------------------


def relative_error(error: Tensor, trivial: Tensor) -> Tensor:
    """Divide an error by that of a trivial answer; 1, no better than that, where neither has any.

    Example:
        >>> relative_error(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))
        tensor([0.2500, 1.0000])
    """
    return torch.where(trivial > 0, error / trivial.clamp_min(1e-12), torch.ones_like(error))


class RestorationError(NamedTuple):
    """Error of a restoration, and those of trivial ones.

    Attributes:
        loss: Mean squared error in units of each example's range, with gradient.
        relative: Error relative to handing back the input: 1 restores nothing, 0 is perfect.
        flat: Relative error of each channel's true mean everywhere, the best that a network can give which
            sees no structure.
    """

    loss: Tensor
    relative: Tensor
    flat: Tensor


def restoration_error(
    restored: Tensor, corrupted: Tensor, original: Tensor, counted: Tensor | None = None
) -> RestorationError:
    """Compute how far a restored crop is from the original, and how far the corrupted and a flat one are.

    Squared errors are divided by the square of the range of each example's channel, as if it had been
    brought to [0, 1], so that volumes of strong contrast do not rule the loss; or by 1 where the range is
    smaller (in z-scored data a standard deviation), so that nearly empty crops do not either.

    Args:
        restored: Output of the network, (B, C, D, H, W).
        corrupted: Input of the network, (B, C, D, H, W).
        original: Crops before the corruption, (B, C, D, H, W).
        counted: Voxels that count, (B, 1, D, H, W), bool; None counts all.

    Example:
        >>> original, corrupted = torch.rand(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
        >>> round(restoration_error(corrupted, corrupted, original).relative.item(), 4)
        1.0
    """
    with torch.autocast(original.device.type, enabled=False):
        original = original.float()
        scale = value_range(original, counted)[1].clamp_min(1)
        loss = mean_of(((restored.float() - original) / scale).square(), counted)
        with torch.no_grad():
            copied = mean_of(((corrupted.float() - original) / scale).square(), counted)
            flat = mean_of(((original - means_of(original, counted)) / scale).square(), counted)
            # A batch that chance left uncorrupted has nothing to restore: as good as its input.
            spoilt = copied > 0
            relative, flat = (
                torch.where(spoilt, error / copied.where(spoilt, torch.ones_like(copied)), 1.0)
                for error in (loss.detach(), flat)
            )
        return RestorationError(loss, relative, flat)
