"""Small numbers that Python and a device share, without the one waiting for the other."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FREE = frozenset({"cpu"})
"""Kinds of device whose values can be looked at without waiting for work that is still to be done."""


def can_ask(x: Tensor) -> bool:
    """Tell whether a tensor's values can be looked at without waiting: on the CPU, where it saves work."""
    return x.device.type in FREE


def constant(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers that never change as a tensor on the device of another, copied there once.

    Args:
        values: Numbers, (N,).
        like: Tensor on the device.
        dtype: Type; None takes int64 for integers and float32 for others, as `torch.tensor` does.

    Returns:
        Tensor (N,), the same one each time: it must not be changed in place.

    Example:
        >>> constant((1, 2), torch.zeros(3))
        tensor([1, 2])
    """
    return _constant(tuple(values), tuple(map(type, values)), like.device, dtype)


@functools.lru_cache(maxsize=1024)
def _constant(
    values: tuple[float, ...], kinds: tuple[type, ...], device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    with torch.inference_mode(False):  # one made there could take part in no training later
        return torch.tensor(values, dtype=dtype, device=device)


def sent(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Send numbers (N,) to a device, from page-locked memory where that lets it go on meanwhile."""
    if device.type != "cuda":
        return torch.as_tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


_known: dict[int, tuple[weakref.ref[Tensor], int, float]] = {}
"""Numbers in buffers, by the buffer's id: the buffer, its version that held the number, the number."""


def read_number(scalar: Tensor) -> float:
    """Return the number in a buffer, waiting for the device only where something else has changed it.

    Args:
        scalar: Buffer without axes.

    Example:
        >>> progress = torch.zeros(())
        >>> write_number(progress, 0.5)
        >>> read_number(progress)
        0.5
    """
    buffer, version, value = _known.get(id(scalar), (None, -1, 0.0))
    if buffer is not None and buffer() is scalar and version == scalar._version:
        return value
    return _remember(scalar, scalar.item())


def write_number(scalar: Tensor, value: float) -> None:
    """Put a number into a buffer without axes, and remember it as the buffer holds it.

    Args:
        scalar: Buffer of float32, float64, integers or booleans.
        value: Number.
    """
    scalar.fill_(value)
    _remember(scalar, float(np.float32(value)) if scalar.dtype == torch.float32 else value)


def _remember(scalar: Tensor, value: float) -> float:
    place = id(scalar)
    # The next one of this id is another buffer, of which nothing is known.
    gone = weakref.ref(scalar, lambda _: _known.pop(place, None))
    _known[place] = gone, scalar._version, value
    return value
