"""Convolutional encoders on part of their input, as if convolutions were sparse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ssl3d.encoder import Encoder
from ssl3d.encoders.norms import recomputing, surroundings

_At = Callable[[Tensor], Tensor]


def can_mask(encoder: nn.Module) -> bool:
    """Tell whether `only_visible` holds for an encoder.

    It does not where attention would carry masked places into others, nor where slices along several axes
    go through it, as in converted networks of kind triplanar: a mask would fit those along D alone.
    """
    return getattr(getattr(encoder, "config", None), "kind", None) != "triplanar" and not any(
        isinstance(module, nn.LayerNorm | nn.MultiheadAttention)
        or "attention" in type(module).__name__.lower()
        # In converted networks, these see the slices of a volume together, as a hook would not.
        or (hasattr(module, "on_slices") and isinstance(module, nn.GroupNorm | _InstanceNorm))
        for module in encoder.modules()
    )


@contextmanager
def only_visible(encoder: nn.Module, visible: Tensor) -> Iterator[None]:
    """Let an encoder compute from the visible voxels alone, at every one of its stages.

    What a convolution or norm gives is set to 0 wherever no voxel beneath it is visible, so that the
    pattern of the mask is the same at all depths instead of being closed layer by layer; and norms take
    their statistics, the running ones too, over visible places alone. It is what SparK does (Tian et al.,
    Designing BERT for Convolutional Networks, ICLR 2023), there by replacing the modules.

    The input has to be zero where it is masked, already. Exact where the mask consists of blocks that are
    multiples of the encoder's deepest stride, counted from the first voxel (the far border may cut them),
    and where no windows of a max-pool overlap (those see one place beyond the visible). The encoder is as
    before on leaving, pickles and copies; blocks that are computed again in the backward pass (activation
    checkpointing in ssl3d's encoders) are so under the same mask, through `norms.recomputation`.

    Args:
        encoder: Encoder with norms of torch: batch, instance or group; see `can_mask`.
        visible: Visible voxels of the encoder's input, (B, 1, D, H, W), bool.
    """
    levels: dict[tuple[int, ...], Tensor] = {}
    strides = encoder.strides if isinstance(encoder, Encoder) else ()

    def at(x: Tensor) -> Tensor:
        folded = x.ndim == 4  # an image, or slices in the batch, as in converted networks
        shape = (x.shape[0] // len(visible), *x.shape[2:]) if folded else tuple(x.shape[2:])
        if (folded, *shape) not in levels:
            level = _visible_at(visible, shape, strides)
            levels[folded, *shape] = level.movedim(2, 1).flatten(0, 1) if folded else level
        return levels[folded, *shape]

    handles = []
    patched: list[nn.Module] = []
    token = surroundings.set(functools.partial(only_visible, encoder, visible))
    try:
        for module in encoder.modules():
            if isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm):
                module.forward = functools.partial(_norm, module, at)  # type: ignore[method-assign]
                patched.append(module)
            elif next(module.parameters(recurse=False), None) is not None:
                handles.append(module.register_forward_hook(functools.partial(_hide, at)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in patched:
            del module.forward
        surroundings.reset(token)


def norm_visible(norm: nn.Module, x: Tensor, visible: Tensor) -> Tensor:
    """Normalise the visible places of a map with statistics over them alone, and set the others to 0.

    Args:
        norm: Batch, instance or group norm of torch, whose running statistics are kept as it keeps them.
        x: Map (B, C, D, H, W).
        visible: Visible places of the map, (B, 1, D, H, W), bool.
    """
    return _norm(norm, lambda _: visible, x)


def visible_at(visible: Tensor, shape: tuple[int, ...], stride: Sequence[int] | None = None) -> Tensor:
    """Reduce a mask (B, 1, D, H, W) to the resolution of a feature map: visible where any voxel beneath is.

    Voxel i of a map of stride s lies above the voxels i s to (i + 1) s - 1; the last one, above those that
    are there.

    Args:
        visible: Visible voxels, bool.
        shape: Size (d, h, w) of the map; for an image it may leave out the depth.
        stride: Strides of the map along (D, H, W). They are needed where a size is no multiple of it, for
            then the sizes do not tell it: 24 voxels become 2 at strides of 12 to 23. Without one it is the
            power of two that gives this size, or else the smallest number that does.

    Returns:
        Mask (B, 1, *shape), bool.

    Example:
        >>> visible = torch.tensor([True, False, False, False]).view(1, 1, 1, 1, 4)
        >>> visible_at(visible, (1, 1, 2), (1, 1, 2)).flatten()
        tensor([ True, False])
    """
    return _visible_at(visible, shape, () if stride is None else (stride,))


def _visible_at(visible: Tensor, shape: tuple[int, ...], strides: Iterable[Sequence[int]]) -> Tensor:
    """Compute `visible_at` for a map whose stride may be, along each axis, that of any of these."""
    space = shape if len(shape) == 3 else (1, *shape)
    known = tuple(zip(*strides, strict=True)) or ((), (), ())
    cell = [
        _cell(length, side, steps)
        for length, side, steps in zip(visible.shape[2:], space, known, strict=True)
    ]
    share = F.max_pool3d(visible.float(), cell, cell, ceil_mode=True)
    # Else a size that no stride gives: a finer map than its input, or convolutions that do not pad.
    if tuple(share.shape[2:]) != tuple(space):
        share = F.adaptive_max_pool3d(share, space)
    return share > 0 if len(shape) == 3 else share.squeeze(2) > 0


def _cell(length: int, side: int, known: Iterable[int]) -> int:
    """Find the stride that leaves `side` of `length` voxels, a known one first; 1 where none does."""
    powers = (2**n for n in range(length.bit_length() + 1))
    fitting = (step for step in (*known, *powers, -(-length // side)) if -(-length // step) == side)
    return min(next(fitting, 1), length)  # torch wants no cell larger than its input


def _hide(at: _At, module: nn.Module, inputs: Any, output: Any) -> Any:
    return output * at(output) if isinstance(output, Tensor) and output.ndim in (4, 5) else output


def _norm(module: Any, at: _At, x: Tensor) -> Tensor:
    """Normalise with statistics over visible places, and set 0 elsewhere."""
    if x.ndim not in (4, 5):
        return type(module).forward(module, x)
    mask, axes = at(x), tuple(range(2, x.ndim))
    with torch.autocast(x.device.type, enabled=False):
        y, shown = x.float(), mask.float()
        wide = (1, -1, *(1 for _ in axes))
        if isinstance(module, _BatchNorm):
            if module.training or module.running_mean is None:
                mean, var, count = _statistics(y, shown, (0, *axes))
                if module.training and module.running_mean is not None and not recomputing():
                    _count(module, mean.detach().flatten(), var.detach().flatten(), count)
            else:
                assert module.running_mean is not None and module.running_var is not None
                mean, var = module.running_mean.view(wide), module.running_var.view(wide)
        else:
            groups = module.num_groups if isinstance(module, nn.GroupNorm) else x.shape[1]
            grouped, each = y.unflatten(1, (groups, -1)), x.shape[1] // groups
            mean, var, _ = _statistics(grouped, shown.unsqueeze(2), tuple(range(2, grouped.ndim)), each)
            mean, var = (s.expand(-1, -1, each, *s.shape[3:]).flatten(1, 2) for s in (mean, var))
        y = (y - mean) * torch.rsqrt(var + module.eps)
        if module.weight is not None:
            y = y * module.weight.view(wide) + module.bias.view(wide)
        return (y * shown).to(x.dtype)


def _statistics(
    x: Tensor, shown: Tensor, axes: tuple[int, ...], each: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance (biased) and number of values in visible places, each with `each` values."""
    count = (each * shown.sum(axes, keepdim=True)).clamp_min(1)
    mean = (x * shown).sum(axes, keepdim=True) / count
    var = ((x - mean).square() * shown).sum(axes, keepdim=True) / count
    return mean, var, count


def _count(module: Any, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Update the running statistics, as torch's batch norm keeps them."""
    module.num_batches_tracked.add_(1)
    share = module.momentum if module.momentum is not None else 1 / float(module.num_batches_tracked)
    n = count.flatten()[:1]
    module.running_mean.lerp_(mean.to(module.running_mean.dtype), share)
    module.running_var.lerp_((var * n / (n - 1).clamp_min(1)).to(module.running_var.dtype), share)
