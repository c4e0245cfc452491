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
    """A batch's generator for several views of each example: B examples, B x `views` rows, views inside.

    Args:
        rng: Of the B examples.
        views: Rows per example.
        shared: Whether the views of an example get the same numbers.
    """

    def __init__(self, rng: BatchRng, views: int, shared: bool = False) -> None:
        self._rng, self._views, self._shared = rng, views, shared
        self.device, self.generator = rng.device, rng.generator

    def __len__(self) -> int:
        """Rows: examples times views."""
        return len(self._rng) * self._views

    def _spread(self, drawn: Tensor) -> Tensor:
        if self._shared:
            drawn = drawn.expand(-1, self._views, *drawn.shape[2:])
        return drawn.flatten(0, 1)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high), shape (B x views, *shape)."""
        return self._spread(self._rng.uniform(self._each, *shape, low=low, high=high))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, shape (B x views, *shape)."""
        return self._spread(self._rng.normal(self._each, *shape))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high), shape (B x views, *shape), int64."""
        return self._spread(self._rng.integers(low, high, self._each, *shape))

    @property
    def _each(self) -> int:
        return 1 if self._shared else self._views


class _Recorded(BatchRng):
    """Gives parts of the batch the rows of the same draws, as long as each part asks for the same ones."""

    def __init__(self, rng: BatchRng) -> None:
        self._rng, self._drawn = rng, list[Tensor]()
        self.device = rng.device

    def of(self, rows: slice) -> _Recorded:
        """The generator of some rows, from the first draw on."""
        self._part, self._next = rows, 0
        return self

    def __len__(self) -> int:
        """Rows of the part."""
        return len(range(len(self._rng))[self._part])

    def _draw(self, draw: Callable[[], Tensor]) -> Tensor:
        if self._next == len(self._drawn):
            self._drawn.append(draw())
        self._next += 1
        return self._drawn[self._next - 1][self._part]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """As of the whole batch."""
        return self._draw(lambda: self._rng.uniform(*shape, low=low, high=high))

    def normal(self, *shape: int) -> Tensor:
        """As of the whole batch."""
        return self._draw(lambda: self._rng.normal(*shape))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """As of the whole batch."""
        return self._draw(lambda: self._rng.integers(low, high, *shape))


@dataclasses.dataclass
class Views:
    """How views are augmented; 0 turns one off. A proxy's `Config` inherits these options.

    Attributes:
        chance: Probability of each augmentation, per example, except flip and turn.
        flip: Probability of mirroring along each axis.
        turn: Probability of a 90, 180 or 270 degree turn in each plane where crop and voxels are square.
        rotate: Largest rotation about each axis, degrees.
        scale: Largest zoom, less 1: 0.2 is 1/1.2 to 1.2.
        stretch: Largest zoom of a single axis, less 1.
        shift: Largest shift, as a share of the crop's side.
        blur: Largest standard deviation of a Gaussian blur, voxels.
        bias: Largest coefficient of the logarithm of a smooth multiplicative field.
        gamma: Largest gamma, less 1.
        contrast: Largest contrast factor, less 1, and brightness, in standard deviations.
        noise: Largest standard deviation of Gaussian noise, in those of the crop.
        cutout: Largest side of a box filled with the mean, as a share of the crop's.
        torchio: torchio transforms by name, such as RandomMotion RandomGhosting; on the CPU, slow.
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
    torchio: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: A field is out of range; the message names it.
        """
        for name in ("chance", "flip", "turn"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, 0 to 1, not {getattr(self, name):g}")
        for name, top in (("rotate", 180.0), ("shift", 0.5), ("cutout", 1.0)):
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name} must lie in 0 to {top:g}, not {getattr(self, name):g}")
        for name in ("scale", "stretch", "blur", "bias", "gamma", "contrast", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (off) or more, not {getattr(self, name):g}")
        check_torchio(self.torchio)


def view_margin(views: Views, size: Sequence[int], axes: Sequence[int] = (0, 1, 2)) -> tuple[int, int, int]:
    """Voxels to read around a crop of `size`, per side, so that `augment` finds no empty corners."""
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
    noise, cut-out.

    Args:
        views: Strengths.
        x: (B, C, D, H, W), `size` plus the margin of `view_margin`.
        rng: For the B rows of x; `ViewRng` where an example has several.
        size: Of the result, (D, H, W).
        spacing: (B, 3), mm, of x's axes; None for cubes. Rotations, turns and blur respect it.
        axes: Axes, 0 to 2, along which anything may move. A proxy whose answer lies along an axis (the
            order of slices) leaves it out.

    Returns:
        (B, C, *size), of x's dtype.
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
    """Augment crops as `augment` does, and moves their label maps alike, by the nearest voxel.

    Args:
        views: Strengths; those of the intensities leave the mask alone.
        x: (B, C, D, H, W), `size` plus the margin of `view_margin`.
        mask: (B, D, H, W), of x's size, whole numbers up to 2^24.
        rng: For the B rows of x.
        size: Of the result, (D, H, W).
        spacing: As of `augment`.
        axes: As of `augment`.

    Returns:
        (B, C, *size), of x's dtype, and (B, *size), of the mask's.
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
    if views.cutout:
        x = intensity.cutout(x, rng, views.chance, views.cutout)

    return x
