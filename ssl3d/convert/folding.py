"""Volumes folded into a batch of slices, and what of a 2D network must see them whole.

A converted network runs on (B D, C, H, W): the 2D network's own shapes, so that its views, permutations
and unpacked sizes keep their meaning. What mixes voxels (convolutions, pools, interpolation, means over
space) unfolds to (B, C, D, H, W), works, and folds again. With the channels last in memory both are views.

Every function takes `batch`, the B of this call, and `image`, whether the network's input has depth 1:
they are arguments and never kept, so that activation checkpointing sees the same as the first pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]
Size = int | tuple[int, ...]


def fold(x: Tensor) -> Tensor:
    """Fold (B, C, D, H, W) to (B D, C, H, W)."""
    return x.movedim(2, 1).flatten(0, 1)


def unfold(x: Tensor, batch: int) -> Tensor:
    """Unfold (B D, C, H, W) to (B, C, D, H, W)."""
    return x.unflatten(0, (batch, -1)).movedim(1, 2)


def enter(x: Tensor) -> Tensor:
    """Fold the network's input, with the channels last in memory."""
    if x.ndim != 5:
        raise ValueError(f"the network takes (B, C, D, H, W), got {tuple(x.shape)}")
    return fold(x.contiguous(memory_format=torch.channels_last_3d))


def leave(x: Any, batch: int) -> Any:
    """Unfold the maps that a forward pass returns.

    Raises:
        RuntimeError: Slices were flattened into features; each would have an answer of its own.
    """
    if isinstance(x, dict):
        return {key: leave(value, batch) for key, value in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(leave(value, batch) for value in x))
    if isinstance(x, list | tuple):
        return type(x)(leave(value, batch) for value in x)
    if not isinstance(x, Tensor) or x.ndim == 0:
        return x
    if x.ndim == 4:
        return unfold(x, batch)
    if x.shape[0] != batch:
        raise RuntimeError(
            f"the network flattens space without pooling it: {x.shape[0] // batch} answers per volume, "
            f"of shape {tuple(x.shape[1:])}; pool the maps to one cell before they are flattened"
        )
    return x


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return one number for both H and W, or the two given."""
    if isinstance(value, int):
        return (value, value)
    height, width = value
    return (height, width)


def along_depth(value: Sequence[int]) -> int:
    """Return what holds for depth where height and width have values: the smaller."""
    return min(value)


def output_size(
    n: int, kernel: int, stride: int, pads: tuple[int, int], dilation: int, ceil: bool = False
) -> int:
    """Return the length of an axis after a convolution or pool; 0 or less where nothing is left."""
    free = n + sum(pads) - dilation * (kernel - 1) - 1
    if free < 0:
        return 0
    size = (-(-free // stride) if ceil else free // stride) + 1
    if ceil and (size - 1) * stride >= n + pads[0]:  # the last window must start inside, as in torch
        size -= 1
    return size


# Functions of torch, on folded slices -------------------------------------------------------------


def max_pool(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    batch: int,
    image: bool,
    cells: Cells | tuple[int, ...] | None = None,
) -> Tensor:
    """Apply `F.max_pool2d` over depth too."""
    if return_indices:
        raise ValueError("max-pooling with indices has no counterpart here")
    if cells is not None:
        whole = unfold(x, batch)
        kernel, steps, pads, dilations, behind = _cells(cells).window(
            whole.shape, kernel_size, stride, padding, dilation, image
        )
        if any(behind):
            whole = F.pad(whole, [n for b in reversed(behind) for n in (0, b)], value=-torch.inf)
        return fold(F.max_pool3d(whole, kernel, steps, pads, dilations))
    if image:
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    whole = unfold(x, batch)
    window = _window(whole.shape[2], kernel_size, stride, padding, dilation, ceil_mode)
    return fold(F.max_pool3d(whole, *window, ceil_mode))


def avg_pool(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    batch: int,
    image: bool,
    cells: Cells | tuple[int, ...] | None = None,
) -> Tensor:
    """Apply `F.avg_pool2d` over depth too."""
    if divisor_override is not None:
        raise ValueError("average pooling with divisor_override has no counterpart here")
    if cells is not None:
        return _avg_pool_cells(
            x, kernel_size, stride, padding, count_include_pad, batch, image, _cells(cells)
        )
    if image:
        return F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
    whole = unfold(x, batch)
    kernel, steps, pads, _ = _window(whole.shape[2], kernel_size, stride, padding, 1, ceil_mode)
    if all(n >= k for n, k in zip(whole.shape[2:], kernel, strict=True)):
        return fold(F.avg_pool3d(whole, kernel, steps, pads, ceil_mode, count_include_pad))
    # torch's 3D average pool refuses axes shorter than the kernel, padded or not; its 2D one does not.
    around = [n for p in reversed(pads) for n in (p, p)]
    y = F.avg_pool3d(F.pad(whole, around), kernel, steps, 0, ceil_mode)
    if not count_include_pad:
        y = y / F.avg_pool3d(F.pad(torch.ones_like(whole[:1, :1]), around), kernel, steps, 0, ceil_mode)
    return fold(y)


def _avg_pool_cells(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    count_include_pad: bool,
    batch: int,
    image: bool,
    cells: Cells,
) -> Tensor:
    whole = unfold(x, batch)
    kernel, steps, pads, _, behind = cells.window(whole.shape, kernel_size, stride, padding, 1, image)
    if not any(pads) and not any(behind):
        return fold(F.avg_pool3d(whole, kernel, steps))
    own = [n for p in reversed(pads) for n in (p, p)]
    more = [n for b in reversed(behind) for n in (0, b)]
    y = F.avg_pool3d(F.pad(F.pad(whole, own), more), kernel, steps)
    # What counts: the data, and the layer's own padding where it says so, but never what completes a cell.
    counted = F.pad(torch.ones_like(whole[:1, :1]), own, value=1.0 if count_include_pad else 0.0)
    return fold(y / F.avg_pool3d(F.pad(counted, more), kernel, steps))


def lp_pool(
    x: Tensor,
    norm_type: float,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
    *,
    batch: int,
    image: bool,
) -> Tensor:
    """Apply `F.lp_pool2d` over depth too."""
    if image:
        return F.lp_pool2d(x, norm_type, kernel_size, stride, ceil_mode)  # type: ignore[arg-type]
    whole = unfold(x, batch)
    kernel, steps, _, _ = _window(whole.shape[2], kernel_size, stride, 0, 1, ceil_mode)
    return fold(F.lp_pool3d(whole, norm_type, kernel, steps, ceil_mode))


def adaptive_avg_pool(x: Tensor, output_size: Any, *, batch: int, image: bool) -> Tensor:
    """Apply `F.adaptive_avg_pool2d`; a fixed size leaves one slice, None leaves the depth."""
    if image:
        return F.adaptive_avg_pool2d(x, output_size)
    return fold(F.adaptive_avg_pool3d(unfold(x, batch), _adaptive_size(output_size)))


def adaptive_max_pool(
    x: Tensor, output_size: Any, return_indices: bool = False, *, batch: int, image: bool
) -> Tensor:
    """Apply `F.adaptive_max_pool2d`; a fixed size leaves one slice, None leaves the depth."""
    if return_indices:
        raise ValueError("max-pooling with indices has no counterpart here")
    if image:
        return F.adaptive_max_pool2d(x, output_size)
    return fold(F.adaptive_max_pool3d(unfold(x, batch), _adaptive_size(output_size)))


def interpolate(
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
    *,
    batch: int,
    image: bool,
    like: Tensor | None = None,
) -> Tensor:
    """Apply `F.interpolate` along three axes.

    Args:
        x: Folded maps (B D, C, H, W).
        size: Size along H and W. The depth is that of `like`; without it, depth is scaled as height is.
        scale_factor: Factor of all three axes, or factors of H and W, of which the first holds for depth.
        mode: Mode of the 2D interpolation.
        align_corners: Same meaning as in torch.
        recompute_scale_factor: Same meaning as in torch.
        antialias: Antialiasing, which must be off.
        batch: Number of volumes B of the call.
        image: Whether the network's input has depth 1.
        like: Folded maps whose height and width `size` are.
    """
    if image:
        return F.interpolate(x, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if mode not in _MODES or antialias:
        raise ValueError(
            f"interpolation of mode {mode}{', antialiased,' if antialias else ''} has no 3D counterpart"
        )
    whole = unfold(x, batch)
    if size is not None:
        height, width = pair(size)
        if like is not None:
            depth = like.shape[0] // batch
        else:
            depth = max(1, round(whole.shape[2] * height / whole.shape[3]))
        size = (depth, height, width)
    elif isinstance(scale_factor, list | tuple):
        scale_factor = (scale_factor[0], *scale_factor)
    return fold(
        F.interpolate(whole, size, scale_factor, _MODES[mode], align_corners, recompute_scale_factor)
    )


_MODES = {"bilinear": "trilinear", "nearest": "nearest", "area": "area", "nearest-exact": "nearest-exact"}


def pad(
    x: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
    *,
    batch: int,
    image: bool,
) -> Tensor:
    """Pad height and width, and depth as height, by `F.pad`; pad channels or width alone as it is."""
    if image or len(pad) != 4:
        return F.pad(x, pad, mode, value)
    return fold(pad_volume(unfold(x, batch), (*pad, pad[2], pad[3]), mode, value))


def pad_volume(
    x: Tensor, pads: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    """Pad (B, C, D, H, W) by `F.pad`; continue a depth too thin to be reflected or wrapped."""
    if not any(pads):
        return x
    deep = max(pads[4:6])
    least = {"reflect": deep + 1, "circular": deep}.get(mode, 0)
    if x.shape[2] < least:
        x = F.pad(x, (0, 0, 0, 0, *pads[4:6]), "replicate")
        pads = (*pads[:4], 0, 0)
    return F.pad(x, tuple(pads), mode, value)


def reduce_space(
    x: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    reduction: str,
    batch: int,
    image: bool,
) -> Tensor:
    """Apply torch's mean, sum or amax, over depth too where it is over height and width."""
    reduce: Callable[..., Tensor] = getattr(torch, reduction)
    y = reduce(x) if dim is None else reduce(x, dim, keepdim=keepdim)
    if dim is None or image or y.shape[0] == batch:
        return y
    dims = {d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)}
    # (N, C, H, W), (N, H, W, C) and (N, C, H W): all of space at once. Along one axis, or over channels,
    # every slice keeps its own.
    spatial = {2, 3} <= dims or dims == {1, 2} if x.ndim == 4 else x.ndim == 3 and dims == {2}
    return reduce(y.unflatten(0, (batch, -1)), 1) if spatial else y


def matched(*given: Any, operation: str, batch: int, **options: Any) -> Tensor:
    """Apply a function of torch to tensors of which some have all slices, and some one per volume."""
    result: Tensor = getattr(torch, operation)(*match(given, batch), **options)
    return result


def joined(tensors: Sequence[Tensor], *args: Any, operation: str, batch: int, **options: Any) -> Tensor:
    """Apply `torch.cat` or `torch.stack` to tensors with all slices or one per volume."""
    result: Tensor = getattr(torch, operation)(match(tensors, batch), *args, **options)
    return result


def resized(x: Tensor, *sizes: int, method: str) -> Tensor:
    """Apply `x.view(len(x), *sizes)` or reshape: whether `x` holds slices or one row for each volume.

    A forward pass takes that first size from another tensor, which may hold the other of the two.
    """
    result: Tensor = getattr(x, method)(x.shape[0], *sizes)
    return result


def expanded(x: Tensor, first: int, *sizes: int, batch: int) -> Tensor:
    """Apply `x.expand(first, *sizes)`, where `first` may count slices and `x` hold one row per volume."""
    if x.shape[0] == batch and first > batch and first % batch == 0:
        x = _repeat(x, first // batch)
    return x.expand(first, *sizes)


def expanded_as(x: Tensor, other: Tensor, *, batch: int) -> Tensor:
    """Apply `x.expand_as(other)`, where one may hold all slices and the other one row per volume."""
    x, other = match((x, other), batch)
    return x.expand_as(other)


def match(given: Sequence[Any], batch: int) -> list[Any]:
    """Repeat tensors of one slice per volume to as many slices as the others have."""
    # Weights (C, 1, 1) that broadcast have fewer axes than the maps.
    axes = max((t.ndim for t in given if isinstance(t, Tensor)), default=0)
    maps = [isinstance(t, Tensor) and t.ndim == axes >= 2 for t in given]
    most = max((t.shape[0] for t, is_map in zip(given, maps, strict=True) if is_map), default=0)
    return [
        _repeat(t, most // batch) if is_map and t.shape[0] == batch < most else t
        for t, is_map in zip(given, maps, strict=True)
    ]


def _repeat(x: Tensor, depth: int) -> Tensor:
    return x.unsqueeze(1).expand(-1, depth, *x.shape[1:]).flatten(0, 1)


@dataclass(frozen=True)
class Cells:
    """Settings that make a strided layer give ceil(n / stride) voxels along an axis of n.

    As an `Encoder` promises. Where n is a multiple of the stride, and the layer gave n / stride voxels
    before, nothing changes; else a last cell is added that is partly empty.

    Attributes:
        steps: Stride along D, H, W, in place of the layer's own.
    """

    steps: Triple | None = None

    def strides(self, own: Triple) -> Triple:
        """Return the stride along D, H, W of a layer with a stride of its own."""
        return own if self.steps is None else self.steps

    def pads(
        self, n: int, kernel: int, step: int, own: int, dilation: int, pads: tuple[int, int]
    ) -> tuple[int, int]:
        """Return the padding of one axis of a convolution, before and behind.

        Where the stride became smaller, the kernel stays where it was relative to the middle of a cell.
        """
        if own == 1 and step == 1:
            return pads
        before = pads[0] + max(0, (own - step) // 2)
        return before, pads[1] + _missing(n, kernel, step, dilation, (before, pads[1]))

    def window(
        self, shape: Sequence[int], kernel_size: Any, stride: Any, padding: Any, dilation: Any, image: bool
    ) -> tuple[Triple, Triple, Triple, Triple, Triple]:
        """Return kernel, stride, padding, dilation and voxels to add behind, of a pool over a volume.

        An axis whose stride became 1 is not pooled along at all.
        """
        kernel, dilations, sides = pair(kernel_size), pair(dilation), pair(padding)
        own = kernel if stride is None or stride == [] else pair(stride)
        sizes, owns, pads, gaps = ([along_depth(v), *v] for v in (kernel, own, sides, dilations))
        steps = list(self.strides((owns[0], owns[1], owns[2])))
        if image:
            steps[0] = sizes[0] = gaps[0] = 1
            pads[0] = 0
        for axis in range(3):
            if steps[axis] == 1 and owns[axis] > 1:
                sizes[axis], pads[axis], gaps[axis] = 1, 0, 1
        behind = [
            0 if steps[a] == 1
            else _missing(shape[2 + a], sizes[a], steps[a], gaps[a], (pads[a], pads[a]))
            for a in range(3)
        ]  # fmt: skip
        a, b, c, d, e = ((v[0], v[1], v[2]) for v in (sizes, steps, pads, gaps, behind))
        return a, b, c, d, e


def _cells(given: Cells | tuple[int, ...]) -> Cells:
    """Build cells from plain numbers: a stride, or none for the layer's own."""
    if isinstance(given, Cells):
        return given
    return Cells((given[0], given[1], given[2]) if given else None)


def _missing(n: int, kernel: int, step: int, dilation: int, pads: tuple[int, int]) -> int:
    """Count the voxels to add behind an axis for ceil(n / step) outputs."""
    return max(0, (-(-n // step) - 1) * step + dilation * (kernel - 1) + 1 - n - sum(pads))


def _adaptive_size(given: Any) -> Any:
    height, width = given if isinstance(given, list | tuple) else (given, given)
    return (None if height is None else 1, height, width)


def _window(
    depth: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> tuple[Triple, Triple, Triple, Triple]:
    """Return kernel, stride, padding and dilation along D, H, W; flat where the depth would not last."""
    kernel, dilations, pads = pair(kernel_size), pair(dilation), pair(padding)
    steps = kernel if stride is None or stride == [] else pair(stride)
    k, s, p, d = (along_depth(v) for v in (kernel, steps, pads, dilations))
    if output_size(depth, k, s, (p, p), d, ceil) < 1:
        k, s, p, d = 1, 1, 0, 1
    return (k, *kernel), (s, *steps), (p, *pads), (d, *dilations)


def same_pads(n: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return the padding of TensorFlow's `SAME`: ceil(n / stride) outputs, the odd voxel behind."""
    total = max((math.ceil(n / stride) - 1) * stride + dilation * (kernel - 1) + 1 - n, 0)
    return (total // 2, total - total // 2)
