"""The options of a view, and all its augmentations in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssl3d.rng import BatchRng
from ssl3d.views import intensity, spatial
from ssl3d.views.outside import check_torchio

_CACHE = 2**18  # voxels that a core's cache holds, several times


class ViewRng(BatchRng):
    """Generator for several views of each example of a batch: B x `views` rows, views inside.

    Args:
        rng: Generator of the B examples.
        views: Number of rows per example.
        shared: Whether the views of an example get the same numbers.
    """

    def __init__(self, rng: BatchRng, views: int, shared: bool = False) -> None:
        self._rng, self._views, self._shared = rng, views, shared
        self.device, self.generator = rng.device, rng.generator

    def __len__(self) -> int:
        """Number of rows: examples times views."""
        return len(self._rng) * self._views

    def _spread(self, drawn: Tensor) -> Tensor:
        if self._shared:
            drawn = drawn.expand(-1, self._views, *drawn.shape[2:])
        return drawn.flatten(0, 1)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw uniform numbers in [low, high), shape (B x views, *shape)."""
        return self._spread(self._rng.uniform(self._each, *shape, low=low, high=high))

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, shape (B x views, *shape)."""
        return self._spread(self._rng.normal(self._each, *shape))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw integers in [low, high), shape (B x views, *shape), int64."""
        return self._spread(self._rng.integers(low, high, self._each, *shape))

    @property
    def _each(self) -> int:
        return 1 if self._shared else self._views


class _Recorded(BatchRng):
    """Generator that gives each part of a batch its rows of the same draws, made for the whole."""

    def __init__(self, rng: BatchRng) -> None:
        self._rng, self._drawn = rng, list[Tensor]()
        self.device = rng.device

    def of(self, rows: slice) -> _Recorded:
        """Return the generator of some rows, from the first draw on."""
        self._part, self._next = rows, 0
        return self

    def __len__(self) -> int:
        """Number of rows of the part."""
        return len(range(len(self._rng))[self._part])

    def _draw(self, draw: Callable[[], Tensor]) -> Tensor:
        if self._next == len(self._drawn):
            self._drawn.append(draw())
        self._next += 1
        return self._drawn[self._next - 1][self._part]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw the part's rows of uniform numbers in [low, high)."""
        return self._draw(lambda: self._rng.uniform(*shape, low=low, high=high))

    def normal(self, *shape: int) -> Tensor:
        """Draw the part's rows of standard normal numbers."""
        return self._draw(lambda: self._rng.normal(*shape))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw the part's rows of integers in [low, high)."""
        return self._draw(lambda: self._rng.integers(low, high, *shape))


@dataclasses.dataclass
class Views:
    """Options of the augmentations of a view; 0 turns one off. A proxy's `Config` inherits them.

    Attributes:
        chance: Probability of each augmentation, for each example, except flip and turn.
        flip: Probability of mirroring along each axis.
        turn: Probability of a turn by 90, 180 or 270 degrees in each plane where crop and voxels are
            square.
        rotate: Range r of the rotation about each axis, in degrees: angle ~ U(-r, r).
        scale: Strength s of the zoom: factor ~ LogUniform(1/(1 + s), 1 + s).
        stretch: Strength s of a further zoom of each axis on its own: factor ~ LogUniform(1/(1 + s), 1 +
            s).
        shift: Range s of the shift along each axis: shift ~ U(-s, s) times the crop's side.
        blur: Strength b of a Gaussian blur, whose standard deviation ~ U(0, b) voxels.
        bias: Strength b of a smooth multiplicative field, exp of a cubic polynomial whose coefficients ~
            U(-b, b).
        gamma: Strength g of a gamma curve: exponent ~ LogUniform(1/(1 + g), 1 + g).
        contrast: Strength c of a change of contrast, factor ~ LogUniform(1/(1 + c), 1 + c), and of
            brightness, offset ~ U(-c, c) standard deviations of the crop.
        noise: Strength n of Gaussian noise, whose standard deviation ~ U(0, n) times the crop's.
        cutout: Strength c of a cut-out: a box is filled with the mean, each of its sides ~ U(0, c) times
            the crop's.
        low_resolution: Strength l of a lower resolution along the axes that may move, by the nearest voxel
            and linearly back: its voxels are f times as long, f ~ U(1, 1 + l).
        torchio: Transforms of torchio by name, such as RandomMotion RandomGhosting; they are slow, as they
            run on the CPU.
    """

    chance: float = 0.5
    flip: float = 0.5
    turn: float = 0.0
    rotate: float = 15.0
    scale: float = 0.2
    stretch: float = 0.0
    shift: float = 0.0
    blur: float = 0.7
    bias: float = 0.2
    gamma: float = 0.5
    contrast: float = 0.3
    noise: float = 0.2
    cutout: float = 0.0
    low_resolution: float = 0.0
    torchio: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges of all fields.

        Raises:
            ValueError: A field is out of range; the message names it.
        """
        for name in ("chance", "flip", "turn"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, 0 to 1, not {getattr(self, name):g}")
        for name, top in (("rotate", 180.0), ("shift", 0.5), ("cutout", 1.0)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name} must lie in 0 to {top:g}, not {getattr(self, name):g}")
        for name in ("scale", "stretch", "blur", "bias", "gamma", "contrast", "noise", "low_resolution"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (off) or more, not {getattr(self, name):g}")
        check_torchio(self.torchio)


def movements(views: Views) -> Views:
    """Return the views without their changes of grey values."""
    return dataclasses.replace(
        views, blur=0.0, bias=0.0, gamma=0.0, contrast=0.0, noise=0.0, low_resolution=0.0, cutout=0.0
    )


def intensities(views: Views) -> Views:
    """Return the views without their movements: voxels stay where they are."""
    return dataclasses.replace(views, flip=0.0, turn=0.0, rotate=0.0, scale=0.0, stretch=0.0, shift=0.0)


def view_margin(views: Views, size: Sequence[int], axes: Sequence[int] = (0, 1, 2)) -> tuple[int, int, int]:
    """Return the voxels to read on every side of a crop, so that `augment` finds no empty corners.

    Example:
        >>> view_margin(Views(rotate=10.0, scale=0.1), (32, 32, 32))
        (8, 8, 8)
    """
    if not views.chance:
        return (0, 0, 0)
    return spatial.affine_margin(size, views.rotate, views.scale, views.stretch, views.shift, axes)


@torch.no_grad()
def augment(
    views: Views,
    x: Tensor,
    rng: BatchRng,
    size: Sequence[int],
    spacing: Tensor | None = None,
    axes: Sequence[int] = (0, 1, 2),
) -> Tensor:
    """Augment a batch of crops; every example gets its own draw of every augmentation.

    In this order: affine (which cuts the margin off), turns, flips, blur, bias field, gamma, contrast,
    noise, low resolution, cut-out.

    Args:
        views: Strengths of the augmentations.
        x: Crops (B, C, D, H, W), of `size` plus the margin of `view_margin`.
        rng: Generator of the B rows of x; `ViewRng` where an example has several.
        size: Size (D, H, W) of the result.
        spacing: Spacing of x's axes, (B, 3), mm, which rotations, turns and blur respect; None for cubes.
        axes: Axes, 0 to 2, along which anything may move. A proxy whose answer lies along an axis (the
            order of slices) leaves it out.

    Returns:
        Views (B, C, *size), of x's dtype.

    Example:
        >>> from ssl3d.rng import one_group
        >>> augment(Views(), torch.rand(2, 1, 24, 24, 24), one_group(0, 2), (16, 16, 16)).shape
        torch.Size([2, 1, 16, 16, 16])
    """
    with torch.autocast(x.device.type, enabled=False):
        rows = max(1, _CACHE // x[0].numel()) if x.device.type == "cpu" and len(x) else len(x)
        if rows >= len(x):
            return _augment(views, x, rng, size, spacing, axes)
        # On a CPU, memory is the limit: as many examples as fit its cache go through everything at once.
        recorded = _Recorded(rng)
        y = x.new_empty(*x.shape[:2], *size)
        for start in range(0, len(x), rows):
            some = slice(start, start + rows)
            mm = None if spacing is None else spacing[some]
            y[some] = _augment(views, x[some], recorded.of(some), size, mm, axes)
        return y


@torch.no_grad()
def augment_labelled(
    views: Views,
    x: Tensor,
    mask: Tensor,
    rng: BatchRng,
    size: Sequence[int],
    spacing: Tensor | None = None,
    axes: Sequence[int] = (0, 1, 2),
) -> tuple[Tensor, Tensor]:
    """Augment crops as `augment` does, and move their label maps alike, by the nearest voxel.

    Args:
        views: Strengths of the augmentations; those of the intensities leave the mask alone.
        x: Crops (B, C, D, H, W), of `size` plus the margin of `view_margin`.
        mask: Label maps (B, D, H, W), of x's size, with whole numbers up to 2^24.
        rng: Generator of the B rows of x.
        size: Size (D, H, W) of the result.
        spacing: Spacing of x's axes, (B, 3), mm; None for cubes.
        axes: Axes, 0 to 2, along which anything may move.

    Returns:
        Views (B, C, *size), of x's dtype, and label maps (B, *size), of the mask's.
    """
    recorded = _Recorded(rng)
    image = augment(views, x, recorded.of(slice(None)), size, spacing, axes)
    # What moves voxels is drawn first, so the mask meets the same numbers.
    with torch.autocast(x.device.type, enabled=False):
        again = recorded.of(slice(None))
        moved = _move(views, mask.unsqueeze(1).float(), again, size, spacing, axes, nearest=True)
    return image, moved.squeeze(1).to(mask.dtype)


def _move(
    views: Views,
    x: Tensor,
    rng: BatchRng,
    size: Sequence[int],
    spacing: Tensor | None,
    axes: Sequence[int],
    nearest: bool = False,
) -> Tensor:
    if views.chance and (views.rotate or views.scale or views.stretch or views.shift):
        strengths = (views.rotate, views.scale, views.stretch, views.shift)
        x = spatial.affine(x, rng, size, views.chance, *strengths, axes, spacing, nearest)
    else:
        x = spatial.centre_crop(x, size)
    if views.turn:
        x = spatial.turn(x, rng, views.turn, axes, spacing)
    if views.flip:
        x = spatial.flip(x, rng, views.flip, axes)
    return x


def _augment(
    views: Views,
    x: Tensor,
    rng: BatchRng,
    size: Sequence[int],
    spacing: Tensor | None,
    axes: Sequence[int],
) -> Tensor:
    x = _move(views, x, rng, size, spacing, axes)
    if views.blur:
        x = intensity.blur(x, rng, views.chance, views.blur, spacing)
    if views.bias:
        x = intensity.bias_field(x, rng, views.chance, views.bias)
    if views.gamma:
        x = intensity.gamma(x, rng, views.chance, views.gamma)
    if views.contrast:
        x = intensity.contrast(x, rng, views.chance, views.contrast)
    if views.noise:
        x = intensity.noise(x, rng, views.chance, views.noise)
    if views.low_resolution:
        x = intensity.low_resolution(x, rng, views.chance, views.low_resolution, axes)
    if views.cutout:
        x = intensity.cutout(x, rng, views.chance, views.cutout)

    return x
