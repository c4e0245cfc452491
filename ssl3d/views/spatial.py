"""Flips, turns, affine and elastic transforms of batches of crops, on the device, one draw per example."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl3d.on_device import can_ask, constant
from ssl3d.rng import BatchRng

_ISOTROPIC = 1.25  # voxel sides whose ratio is below this may change places
_FLIPS = 3  # in turn, at most
# The released elastic deformation: noise smoothed by 8 voxels, times 991, of crops of 32 x 64 x 64 voxels.
_ALPHA, _SIGMA, _SIDES = 991.0, 8.0, (32, 64, 64)


def flip(x: Tensor, rng: BatchRng, p: float = 0.5, axes: Sequence[int] = (0, 1, 2)) -> Tensor:
    """Mirror each example along each axis, independently, with probability `p`.

    Args:
        x: Crops (B, C, D, H, W).
        rng: Generator of the B examples.
        p: Probability for each example and axis.
        axes: Axes that may be mirrored, 0 to 2 for D, H, W.

    Example:
        >>> from ssl3d.rng import one_group
        >>> flip(torch.arange(4).view(1, 1, 1, 1, 4), one_group(0, 1), p=1.0).flatten()
        tensor([3, 2, 1, 0])
    """
    chosen = rng.chance(p, 3)
    for axis in axes:
        if x.shape[axis + 2] > 1 and not none_chosen(chosen[:, axis]):
            x = torch.where(_wide(chosen[:, axis]), x.flip(axis + 2), x)
    return x


def flip_in_turn(x: Tensor, rng: BatchRng, p: float = 0.4, axes: Sequence[int] = (1, 2)) -> Tensor:
    """Mirror each example up to three times in turn, as the released code of Models Genesis does.

    As long as a chance of `p` holds, one of `axes` or none, each as likely, is drawn and the example is
    mirrored along it: twice along one is as it was. (There one of the first three axes of an array is
    drawn, which are its channel, x and y; the channel has nothing to mirror.)

    Args:
        x: Crops (B, C, D, H, W).
        rng: Generator of the B examples.
        p: Probability of the first time, and of each further one after it.
        axes: Axes that may be mirrored, 0 to 2 for D, H, W.

    Example:
        >>> from ssl3d.rng import one_group
        >>> flip_in_turn(torch.arange(2.0).view(1, 1, 1, 1, 2), one_group(1, 1), p=0.0).flatten()
        tensor([0., 1.])
    """
    going = rng.chance(p, _FLIPS).int().cumprod(1).bool()
    drawn = rng.integers(0, len(axes) + 1, _FLIPS)
    for number, axis in enumerate(axes):
        odd = (going & (drawn == number)).sum(1) % 2 == 1
        if x.shape[axis + 2] > 1 and not none_chosen(odd):
            x = torch.where(_wide(odd), x.flip(axis + 2), x)
    return x


def turn(
    x: Tensor,
    rng: BatchRng,
    p: float = 0.5,
    axes: Sequence[int] = (0, 1, 2),
    spacing: Tensor | None = None,
) -> Tensor:
    """Turn each example by 90, 180 or 270 degrees, each as likely, with probability `p` per plane.

    That happens only in planes whose both axes are in `axes`, in which the crop is square and, for the
    example, the voxels are too (`spacing`, (B, 3) in mm, or None for cubes): a turn must not change
    anatomy's proportions.
    """
    quarter = torch.where(rng.chance(p, 3), rng.integers(1, 4, 3), 0)
    for i, (a, b) in enumerate(itertools.combinations(range(3), 2)):
        if a not in axes or b not in axes or x.shape[a + 2] != x.shape[b + 2] or x.shape[a + 2] == 1:
            continue
        quarters = quarter[:, i]
        if spacing is not None:
            ratio = spacing[:, a] / spacing[:, b]
            quarters = quarters * ((ratio < _ISOTROPIC) & (ratio > 1 / _ISOTROPIC))
        if none_chosen(quarters > 0):
            continue
        half = _wide(quarters >= 2)
        x = torch.where(half, x.flip((a + 2, b + 2)), x)
        x = torch.where(_wide(quarters % 2 == 1), x.rot90(1, (a + 2, b + 2)), x)
    return x


def affine(
    x: Tensor,
    rng: BatchRng,
    size: Sequence[int],
    p: float = 1.0,
    rotate: float = 15.0,
    scale: float = 0.2,
    stretch: float = 0.0,
    shift: float = 0.0,
    axes: Sequence[int] = (0, 1, 2),
    spacing: Tensor | None = None,
    nearest: bool = False,
) -> Tensor:
    """Crop the middle `size` out of each example through a random affine map: one trilinear sampling.

    With probability `p` per example, about the crop's centre: a rotation about each axis by an angle ~
    U(-rotate, rotate) degrees; a zoom, factor ~ LogUniform(1/(1 + scale), 1 + scale), times one per
    axis, factor ~ LogUniform(1/(1 + stretch), 1 + stretch); a shift ~ U(-shift, shift) times the crop's
    side. The rest are cropped, exactly. Rotations hold in mm: across voxels of unequal sides the angle is
    multiplied by the ratio of the sides, so that the corners move no further, in voxels, than in a cube.
    Where the sampling reaches beyond x, its border goes on.

    Args:
        x: Crops (B, C, D, H, W), of `size` plus the margin of `affine_margin` on every side, or less.
        rng: Generator of the B examples.
        size: Size (D, H, W) of the result.
        p: Probability for each example.
        rotate: Range of the rotation about each axis, in degrees.
        scale: Strength of the zoom.
        stretch: Strength of the zoom of each axis on its own.
        shift: Range of the shift, as a share of the crop's side.
        axes: Axes 0 to 2 that may be rotated, stretched and shifted; the others stay as they are.
        spacing: Spacing of the voxels, (B, 3), mm; None for cubes.
        nearest: Whether the nearest voxel's value is taken, as label maps need it.

    Returns:
        Views (B, C, *size), of x's dtype.
    """
    examples = len(x)
    side = constant(size, x, torch.float32)
    movable = [a in axes and size[a] > 1 for a in range(3)]
    moves = constant([float(each) for each in movable], x)
    angles = rng.uniform(3, low=-1.0, high=1.0) * math.radians(rotate)
    zoom = torch.exp(rng.uniform(1, low=-1.0, high=1.0) * math.log1p(scale))
    stretches = torch.exp(rng.uniform(3, low=-1.0, high=1.0) * math.log1p(stretch) * moves)
    shifts = rng.uniform(3, low=-1.0, high=1.0) * shift * side * moves
    chosen = rng.chance(p)
    if none_chosen(chosen):
        return centre_crop(x, size)

    matrix = torch.eye(3, device=x.device).repeat(examples, 1, 1)
    mm = torch.ones(examples, 3, device=x.device) if spacing is None else spacing.float()
    for about in range(3):
        a, b = (i for i in range(3) if i != about)
        if not (movable[a] and movable[b]):
            continue
        sides = mm[:, [a, b]]
        angle = angles[:, about] * sides.amin(1) / sides.amax(1)
        plane = torch.eye(3, device=x.device).repeat(examples, 1, 1)
        plane[:, a, a] = plane[:, b, b] = angle.cos()
        plane[:, a, b], plane[:, b, a] = -angle.sin(), angle.sin()
        matrix = matrix @ plane
    # Output voxel -> input voxel, both from the centre: rotate in mm, then zoom; a depth-1 axis stays.
    matrix = matrix * mm[:, None, :] / mm[:, :, None]
    matrix = matrix / torch.where(moves.bool(), zoom * stretches, torch.ones_like(stretches))[:, None, :]
    matrix = torch.where(chosen[:, None, None], matrix, torch.eye(3, device=x.device))
    shifts = torch.where(chosen[:, None], shifts, 0.0)
    return _sample(x, matrix, shifts, size, "nearest" if nearest else "bilinear")


@torch.no_grad()
def elastic(x: Tensor, rng: BatchRng, strength: float = 1.0) -> Tensor:
    """Deform each example elastically within its slices, as the released code of TransVW does.

    Displacements along H and W are noise ~ U(-1, 1) of every voxel, smoothed by a Gaussian along all three
    axes, with zeros around the crop, and multiplied. A crop of 32 x 64 x 64 voxels has the released
    numbers: a standard deviation of 8 voxels, times 991, which moves voxels in the middle by 3.8 (standard
    deviation). Other crops look alike: both scale with their sides. Beyond the crop its mirror image goes
    on.

    Args:
        x: Crops (B, C, D, H, W).
        rng: Generator of the B examples.
        strength: Factor of the displacements.

    Example:
        >>> from ssl3d.rng import one_group
        >>> x = torch.rand(2, 1, 8, 16, 16)
        >>> torch.equal(elastic(x, one_group(0, 2), strength=0.0), x), elastic(x, one_group(0, 2)).shape
        (True, torch.Size([2, 1, 8, 16, 16]))
    """
    if not strength:
        return x
    size = x.shape[2:]
    moves = rng.uniform(2, *size, low=-1.0, high=1.0)
    factor = strength * _ALPHA
    for axis, (length, released) in enumerate(zip(size, _SIDES, strict=True)):
        smooth, ratio = _smoothing(length, released, moves.device, moves.dtype)
        factor *= ratio
        moves = (moves.movedim(axis + 2, -1) @ smooth).movedim(-1, axis + 2)
    # Slices as images of one batch: nothing moves across them.
    grids = []
    for axis in (2, 1):  # grid_sample wants W before H, and places in [-1, 1] from edge to edge
        at = torch.arange(size[axis], device=x.device, dtype=torch.float32)
        at = at.view([-1 if a == axis else 1 for a in range(3)])
        place = at + factor * size[axis] / _SIDES[axis] * moves[:, axis - 1]
        grids.append((2 * place + 1) / size[axis] - 1)
    flat = x.transpose(1, 2).flatten(0, 1).float()
    moved = F.grid_sample(
        flat, torch.stack(grids, dim=-1).flatten(0, 1), padding_mode="reflection", align_corners=False
    )
    return moved.unflatten(0, (len(x), size[0])).transpose(1, 2).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _smoothing(
    length: int, released: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Return the matrix (length, length) that smooths along an axis, and the factor of the result."""
    kernel = _gaussian(_SIGMA * length / released)
    at = torch.arange(length)
    away = (at[:, None] - at).abs()
    reach = len(kernel) // 2
    smooth = torch.where(away <= reach, kernel[(away + reach).clamp(max=2 * reach)], 0.0)
    # A wider kernel averages more noise away, by the ratio of the norms.
    return smooth.to(device, dtype), float(_gaussian(_SIGMA).norm() / kernel.norm())


def _gaussian(sigma: float) -> Tensor:
    """Return the weights of a Gaussian to four standard deviations on either side, which sum to 1."""
    reach = int(4 * sigma + 0.5)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    return weights / weights.sum()


def affine_margin(
    size: Sequence[int],
    rotate: float = 15.0,
    scale: float = 0.2,
    stretch: float = 0.0,
    shift: float = 0.0,
    axes: Sequence[int] = (0, 1, 2),
    limit: float = 0.25,
) -> tuple[int, int, int]:
    """Return the voxels to read around a crop, per side and axis, for `affine` with the same arguments.

    They are enough for the corners of the crop at the largest angles, but at most `limit` of the crop's
    side: the read volume grows with its cube, and the corners of rare draws may repeat the border.

    Example:
        >>> affine_margin((1, 64, 64), rotate=10.0, scale=0.0)
        (0, 6, 6)
    """
    moves = [a in axes and size[a] > 1 for a in range(3)]
    reach = [0.0, 0.0, 0.0]
    # The largest |matrix| over the extreme angles, up to 45 degrees, beyond which corners come back.
    top = math.radians(min(rotate, 45.0))
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        matrix = torch.eye(3, dtype=torch.float64)
        for about in range(3):
            a, b = (i for i in range(3) if i != about)
            if not (moves[a] and moves[b]):
                continue
            plane = torch.eye(3, dtype=torch.float64)
            plane[a, a] = plane[b, b] = math.cos(top)
            plane[a, b], plane[b, a] = -signs[about] * math.sin(top), signs[about] * math.sin(top)
            matrix = matrix @ plane
        for k in range(3):
            corner = sum(abs(float(matrix[k, j])) * size[j] / 2 for j in range(3))
            reach[k] = max(reach[k], corner)
    margin = []
    for k in range(3):
        grown = reach[k] * (1 + scale) * (1 + stretch) + shift * size[k] if moves[k] else size[k] / 2
        margin.append(min(math.ceil(grown - size[k] / 2 - 1e-9), int(limit * size[k])))
    return (margin[0], margin[1], margin[2])


def centre_crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Crop the middle `size` (D, H, W) out of (B, C, D, H, W).

    Example:
        >>> centre_crop(torch.arange(5).view(1, 1, 1, 1, 5), (1, 1, 3)).flatten()
        tensor([1, 2, 3])
    """
    for axis, length in enumerate(size):
        x = x.narrow(axis + 2, (x.shape[axis + 2] - length) // 2, length)
    return x


def _sample(x: Tensor, matrix: Tensor, shifts: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Sample x at matrix @ (output voxel from the centre) + shifts."""
    centre = (constant(x.shape[2:], x) - 1) / 2
    # As centre_crop does: an odd margin leaves the middle half a voxel low.
    middle = constant([(n - m) // 2 + (m - 1) / 2 for n, m in zip(x.shape[2:], size, strict=True)], x)
    # grid_sample wants places in [-1, 1] over voxel centres (align_corners), in the order W, H, D.
    unit = centre.clamp_min(0.5)
    offset = ((shifts + middle - centre) / unit).flip(1)[:, :, None, None, None]
    matrix = (matrix / unit[:, None]).flip(1)
    # The map is linear: the sum of three rays is cheaper than a product per voxel.
    d, h, w = (torch.arange(n, device=x.device, dtype=torch.float32) - (n - 1) / 2 for n in size)
    planes = (
        matrix[:, :, 0, None, None, None] * d[:, None, None]
        + matrix[:, :, 1, None, None, None] * h[:, None]
    )
    grid = planes + (matrix[:, :, 2, None, None, None] * w + offset)
    grid = grid.permute(0, 2, 3, 4, 1)
    sampled = F.grid_sample(x.float(), grid, mode=mode, padding_mode="border", align_corners=True)
    return sampled.to(x.dtype)


def none_chosen(flags: Tensor) -> bool:
    """Tell whether no example is to be changed, where asking costs nothing; else say no."""
    return can_ask(flags) and not flags.any()


def _wide(flags: Tensor) -> Tensor:
    return flags.view(-1, 1, 1, 1, 1)
