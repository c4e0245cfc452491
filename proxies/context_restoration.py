"""Context restoration: put swapped patches of a volume back where they were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl3d.api import (
    BatchRng,
    Encoder,
    Proxy,
    RestoreViews,
    StepOutput,
    constant,
    decode,
    draw_one,
    mean_of,
    means_of,
    mirror_counted,
    relative_error,
    restoration_picture,
    restoring_decoder,
    travelling,
)

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.api import Volume


@dataclass
class ContextRestorationConfig(RestoreViews):
    """Options of the context-restoration proxy.

    Attributes:
        moved: Share of the foreground that changes its place: share ~ U(low, high), for each example.
        patch: Side of a patch, as a share of the crop's side: share ~ U(low, high), for each example and
            axis. All patches of an example are equal.
        width: Channels of the decoder at half resolution.
        skips: Whether the decoder sees the encoder's shallower maps too, or the deepest one alone.
        decoder: Kind of decoder: light; or unet, the head of `ssl3d finetune --task segmentation`, which
            sees its input too, travels with the encoder and can start that head.
    """

    moved: tuple[float, float] = (0.2, 0.5)
    patch: tuple[float, float] = (1 / 16, 1 / 6)
    width: int = 32
    skips: bool = True
    decoder: Literal["light", "unet"] = "light"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if len(self.moved) != 2 or not 0 < self.moved[0] <= self.moved[1] <= 1:
            raise ValueError(f"moved needs two shares, above 0 and up to 1, not {self.moved}")
        if len(self.patch) != 2 or not 0 < self.patch[0] <= self.patch[1] <= 0.5:
            raise ValueError(f"patch needs two shares, above 0 and up to 0.5, not {self.patch}")
        if self.width < 2:
            raise ValueError(f"width must be at least 2, not {self.width}")


class ContextRestoration(Proxy):
    """The network must work out which patches do not belong where they are, and what was there.

    Chen, Bentley, Mori, Misawa, Fujiwara, Rueckert: Self-supervised learning for medical image analysis
    using image context restoration, Medical Image Analysis 58, 2019.

    In each crop pairs of equal patches change places, a light decoder restores the crop from the
    encoder's feature maps, and the loss is the mean squared error over all voxels.

    The authors' code was not found; this is after the paper. Differs from it: patches are 3D (2D in
    images), and no two of a crop overlap, so that what moved is known exactly. How many pairs are swapped
    is set by the share of the foreground that moves, in place of a fixed number of swaps, and their sides
    by those of the crop. One U-shaped decoder for all later tasks, where the paper trains a plainer one
    for classification. Crops are mirrored at random before. `swap_patches` says how patches are laid out.

    With an encoder whose stem has a stride, no map shows single voxels to copy, so skips are on: they
    restore better (`mean_error` 0.54 against 0.60 after 100 small steps on hippocampus MR). Without them
    the deepest map must hold everything; which leaves the better features was open after that trial.

    The metric `relative_error` is the squared error on moved voxels, divided by that of leaving the input
    as it is. Giving each example's mean everywhere would already make it about 0.5, so `mean_error` is
    the same divided by that of the mean: below 1, something of the anatomy is restored.
    """

    Config = ContextRestorationConfig
    paper: ClassVar[str] = (
        "Chen, Bentley, Mori, Misawa, Fujiwara, Rueckert: Self-supervised learning for medical image "
        "analysis using image context restoration, Medical Image Analysis 58, 2019"
    )
    main: ClassVar[str] = "relative_error"
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 8, "lr": 2e-3}

    def __init__(self, config: ContextRestorationConfig, encoder: Encoder) -> None:
        """Add the decoder that restores crops."""
        super().__init__(config, encoder)
        self.decoder = restoring_decoder(config.decoder, encoder, config.width, config.skips)

    @classmethod
    def draw(
        cls, config: ContextRestorationConfig, volume: Volume, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Draw one `crop` (C, d, h, w) and its `foreground` (d, h, w).

        Raises:
            DataError: The volume has no foreground.
        """
        return draw_one(config, volume, rng)

    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Swap patches of the crops (B, C, D, H, W) and restore them."""
        config = self.config
        original, foreground, counted = mirror_counted(config, batch, rng, self.training)
        damaged, moved = swap_patches(original, foreground, rng, config.moved, config.patch)
        restored = decode(self.decoder, damaged, self.encoder(damaged))
        with torch.autocast(original.device.type, enabled=False):
            restored, original = restored.float(), original.float()
            loss = mean_of((restored - original).square(), counted)
            metrics = _metrics(restored.detach(), damaged.float(), original, moved, foreground, counted)
        return StepOutput(loss, metrics, lambda: restoration_picture(original, damaged, restored))

    def travels(self) -> dict[str, nn.Module]:
        """Send the decoder along with the encoder, where it can start a segmentation head."""
        return travelling(self.decoder)


class Swapped(NamedTuple):
    """Crops whose patches have changed places.

    Attributes:
        image: Crops (B, C, D, H, W), a tensor of their own.
        moved: Voxels that lie in a swapped patch, (B, D, H, W), bool.
    """

    image: Tensor
    moved: Tensor


@torch.no_grad()
def swap_patches(
    x: Tensor,
    foreground: Tensor,
    rng: BatchRng,
    share: Sequence[float] = (0.2, 0.5),
    patch: Sequence[float] = (1 / 16, 1 / 6),
) -> Swapped:
    """Swap pairs of patches, until a drawn share of the foreground has changed its place.

    Patches are laid like bricks in a wall: per example all are equal, the layers along D, the rows of
    each layer and the bricks of each row each begin at a place of their own. So no two overlap (patches
    thrown at random jam at two fifths of a volume, before half of it could move), and no plane of seams
    runs through the whole crop. Pairs of bricks that hold foreground are swapped, at random, as many as
    bring the foreground voxels in them closest to the share.

    Args:
        x: Crops (B, C, D, H, W); an image (D = 1) has flat patches.
        foreground: Voxels of the body, (B, D, H, W), bool.
        rng: Generator of the B examples.
        share: Share of the foreground to be moved, ~ U(low, high). Foreground in a border that no whole
            brick covers cannot be reached and is left.
        patch: Side of a patch as a share of the crop's, ~ U(low, high) in whole voxels; at least 2 along
            axes of more than 8 voxels, and at most half of the crop's, so that two fit.
    """
    size, device = x.shape[2:], x.device
    if math.prod(size) == 1:  # nothing to change places with
        return Swapped(x.clone(), torch.zeros_like(foreground))
    half = [max(1, n // 2) for n in size]
    low = [min(b, max(min(2, -(-n // 8)), round(n * patch[0]))) for b, n in zip(half, size, strict=True)]
    high = [max(a, min(b, round(n * patch[1]))) for a, b, n in zip(low, half, size, strict=True)]
    sides = torch.stack(
        [rng.integers(a, b + 1) for a, b in zip(low, high, strict=True)], dim=1
    )  # (B, 3), voxels
    most = [n // a for n, a in zip(size, low, strict=True)]  # bricks along an axis, at most

    # Where layers, rows and bricks begin: within a brick's side, and so that two large ones still fit.
    begin_d, begin_h, begin_w = rng.uniform(1), rng.uniform(most[0], 1), rng.uniform(most[0], most[1], 1)
    room = torch.minimum(sides, constant(size, x) - 2 * sides + 1).clamp_min(1)
    d, h, w = (sides[:, a].view(-1, 1, 1, 1) for a in range(3))
    room_d, room_h, room_w = (room[:, a].view(-1, 1, 1, 1) for a in range(3))
    i, j, k = (torch.arange(n, device=device) for n in most)
    start_d = ((begin_d[:, :, None, None] * room_d).long() + i.view(-1, 1, 1) * d).expand(-1, *most)
    start_h = ((begin_h[:, :, :, None] * room_h).long() + j.view(-1, 1) * h).expand(-1, *most)
    start_w = (begin_w * room_w).long() + k * w
    starts = torch.stack([start_d, start_h, start_w], dim=-1).flatten(1, 3)  # (B, bricks, 3)
    ends = starts + sides.unsqueeze(1)
    exists = (ends <= constant(size, x)).all(-1)

    held = _held(foreground, starts, ends) * exists
    order = (rng.uniform(starts.shape[1]) + (held == 0)).argsort(dim=1)  # those with foreground come first
    order = order[:, : order.shape[1] // 2 * 2]
    first, second = order[:, 0::2], order[:, 1::2]
    pairs = held.gather(1, first) + held.gather(1, second)
    usable = held.gather(1, second) > 0
    total = foreground.flatten(1).sum(1, keepdim=True)
    target = rng.uniform(1, low=share[0], high=share[1]) * total
    reached = functional.pad((pairs * usable).cumsum(1), (1, 0))
    # As many pairs as come closest to the target, one at least, and only usable ones.
    count = (reached - target).abs()[:, 1:].argmin(1, keepdim=True) + 1
    swap = usable & (torch.arange(pairs.shape[1], device=device) < count)

    partner = torch.arange(starts.shape[1], device=device).repeat(len(x), 1)
    partner = partner.scatter(1, first, torch.where(swap, second, first))
    partner = partner.scatter(1, second, torch.where(swap, first, second))
    return _exchange(x, starts, sides, most, partner)


def _held(foreground: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Count the foreground voxels in each brick, (B, bricks), by differences of a summed volume."""
    total = foreground.long()
    for axis in (1, 2, 3):
        total = total.cumsum(axis)
    total = functional.pad(total, (1, 0) * 3)
    limits = constant(foreground.shape[1:], foreground)
    corners = [torch.minimum(starts, limits), torch.minimum(ends, limits)]
    rows = torch.arange(len(foreground), device=foreground.device).unsqueeze(1)
    held = torch.zeros_like(starts[..., 0])
    for a in (0, 1):
        for b in (0, 1):
            for c in (0, 1):
                sign = 1 if (a + b + c) % 2 else -1
                held += sign * total[rows, corners[a][..., 0], corners[b][..., 1], corners[c][..., 2]]
    return held


def _exchange(x: Tensor, starts: Tensor, sides: Tensor, most: Sequence[int], partner: Tensor) -> Swapped:
    """Take every voxel from the same place within the partner of its brick."""
    size, device = x.shape[2:], x.device
    wall = starts.unflatten(1, tuple(most))  # (B, layers, rows, bricks, 3)
    b = torch.arange(len(x), device=device).view(-1, 1, 1, 1)
    place = [
        torch.arange(n, device=device).view([-1 if a == axis else 1 for a in range(3)])
        for axis, n in enumerate(size)
    ]
    d, h, w = (sides[:, a].view(-1, 1, 1, 1) for a in range(3))

    def nth(at: Tensor, begin: Tensor, side: Tensor, limit: int) -> Tensor:
        return torch.div(at - begin, side, rounding_mode="floor").clamp(0, limit - 1)

    i = nth(place[0], wall[:, :1, :1, :1, 0], d, most[0])
    j = nth(place[1], wall[b, i, 0, 0, 1], h, most[1])
    k = nth(place[2], wall[b, i, j, 0, 2], w, most[2])
    brick = ((i * most[1] + j) * most[2] + k).flatten(1)
    other = partner.gather(1, brick)
    # Bricks of the wall cover neither its border nor bricks cut off by the crop's; those have no partner.
    away = starts.gather(1, other.unsqueeze(-1).expand(-1, -1, 3))
    own = starts.gather(1, brick.unsqueeze(-1).expand(-1, -1, 3))
    grid = torch.stack(torch.broadcast_tensors(*place), dim=-1).flatten(0, 2)
    inside = ((grid >= own) & (grid < own + sides.unsqueeze(1))).all(-1)
    moved = inside & (other != brick)
    source = torch.where(moved.unsqueeze(-1), grid + away - own, grid)
    flat = (source[..., 0] * size[1] + source[..., 1]) * size[2] + source[..., 2]
    image = x.flatten(2).gather(2, flat.unsqueeze(1).expand(-1, x.shape[1], -1)).view_as(x)
    return Swapped(image, moved.view(len(x), *size))


def _metrics(
    restored: Tensor,
    damaged: Tensor,
    original: Tensor,
    moved: Tensor,
    foreground: Tensor,
    counted: Tensor | None,
) -> dict[str, Tensor]:
    everywhere = torch.ones_like(moved).unsqueeze(1) if counted is None else counted
    where, still = moved.unsqueeze(1) & everywhere, ~moved.unsqueeze(1) & everywhere
    mean = means_of(original, counted)
    error, copying, guess = (
        ((y - original).square() * where).sum() for y in (restored, damaged, mean.expand_as(original))
    )
    rest = ((restored - original).square() * still).sum()
    spread = ((mean - original).square() * still).sum()
    return {
        "relative_error": relative_error(error, copying),
        "mean_error": relative_error(error, guess),
        "unmoved_error": relative_error(rest, spread),
        "moved": (moved & foreground).sum() / foreground.sum().clamp_min(1),
    }
