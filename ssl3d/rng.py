"""Randomness as a function of (seed, step): the same for any number of workers and of ranks."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ssl3d.on_device import sent


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed of anything with a stable `repr`, the same in every process and version.

    Example:
        >>> seed_of("view", 7)
        7917393415210586643
    """
    digest = hashlib.blake2b("/".join(map(repr, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_rng(*parts: object) -> np.random.Generator:
    """Return a numpy generator seeded by `seed_of(*parts)`.

    Example:
        >>> int(numpy_rng("view", 7).integers(100))
        55
    """
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))


_AT_ONCE = 2**22  # numbers; those of a draw that is larger are made by so many, not all at one time


class BatchRng:
    """Random numbers for the examples of one group of a batch, on the device.

    Every method returns one draw per example, first axis B. The draw is made for the whole global
    batch and this rank keeps the rows of its own examples, so a run over many ranks sees the numbers
    of the run over one. Large draws, such as a number per voxel, are made part by part: a rank holds
    its own rows and one part.

    Args:
        seed: Seed of this step.
        rows: Position of each of the B examples in the global batch.
        total: Number of examples in the global batch, over all ranks.
        device: Device on which the numbers are made.
    """

    def __init__(self, seed: int, rows: Sequence[int], total: int, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.total = total
        self._rows = list(rows)
        self._whole = self._rows == list(range(total))

    def __len__(self) -> int:
        """Return the number of examples B."""
        return len(self._rows)

    @functools.cached_property
    def _index(self) -> Tensor:
        return sent(self._rows, self.device, torch.int64)

    def _made(self, shape: tuple[int, ...], fill: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """Return this rank's rows of a draw of shape (total, *shape), made by `fill` in place."""
        each = math.prod(shape)

        def part(rows: int) -> Tensor:
            return fill(torch.empty(rows, *shape, dtype=dtype, device=self.device))

        if self.total * each <= _AT_ONCE:
            drawn = part(self.total)
            return drawn if self._whole else drawn[self._index]
        # By sixteen rows: the CPU makes normal numbers by sixteen, and so the parts are those of one draw.
        step = max(1, _AT_ONCE // each // 16 * 16 or _AT_ONCE // each)
        drawn = torch.empty(len(self), *shape, dtype=dtype, device=self.device)
        for start in range(0, self.total, step):
            stop = min(start + step, self.total)
            if self._whole:
                fill(drawn[start:stop])
                continue
            part_rows = part(stop - start)
            for at, row in enumerate(self._rows):
                if start <= row < stop:
                    drawn[at] = part_rows[row - start]
        return drawn

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw x ~ U(low, high), shape (B, *shape), float32."""
        drawn = self._made(shape, lambda x: x.uniform_(generator=self.generator), torch.float32)
        return drawn * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Draw x ~ N(0, 1), shape (B, *shape), float32."""
        return self._made(shape, lambda x: x.normal_(generator=self.generator), torch.float32)

    def chance(self, p: float, *shape: int) -> Tensor:
        """Draw True with probability `p`, shape (B, *shape)."""
        return self.uniform(*shape) < p

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw integers from [low, high) uniformly, shape (B, *shape), int64."""
        return self._made(shape, lambda x: x.random_(low, high, generator=self.generator), torch.int64)

    def permutation(self, n: int) -> Tensor:
        """Draw a random order of n items per example, shape (B, n), int64."""
        return self.uniform(n).argsort(dim=1)


def one_group(seed: int, size: int, device: torch.device | str = "cpu") -> BatchRng:
    """Return the generator of a batch of `size` examples on one rank, as tests and notebooks need it.

    Example:
        >>> one_group(0, 2).uniform(3).shape
        torch.Size([2, 3])
    """
    return BatchRng(seed, range(size), size, device)
