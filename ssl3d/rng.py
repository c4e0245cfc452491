"""Randomness as a function of (seed, step): the same for any number of workers and of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything with a stable `repr`; the same in every process and version."""
    digest = hashlib.blake2b("/".join(map(repr, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_rng(*parts: object) -> np.random.Generator:
    """A numpy generator seeded by `seed_of(*parts)`."""
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))


class BatchRng:
    """Random numbers for the examples of one group of a batch, on the device.

    Every method returns one draw per example, first axis B. The draw is made for the whole global
    batch and this rank keeps the rows of its own examples, so a run over many ranks sees the numbers
    of the run over one.

    Args:
        seed: Of this step.
        rows: Position of each of the B examples in the global batch.
        total: Examples in the global batch, over all ranks.
        device: Where the numbers are made.
    """

    def __init__(self, seed: int, rows: Sequence[int], total: int, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.total = total
        self._all = list(rows) == list(range(total))
        self._rows = torch.as_tensor(list(rows), device=self.device)

    def __len__(self) -> int:
        """The number of examples B."""
        return len(self._rows)

    def _keep(self, drawn: Tensor) -> Tensor:
        return drawn if self._all else drawn[self._rows]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high), shape (B, *shape)."""
        drawn = torch.rand(self.total, *shape, generator=self.generator, device=self.device)
        return self._keep(drawn) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, shape (B, *shape)."""
        return self._keep(torch.randn(self.total, *shape, generator=self.generator, device=self.device))

    def chance(self, p: float, *shape: int) -> Tensor:
        """True with probability `p`, shape (B, *shape)."""
        return self.uniform(*shape) < p

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in [low, high), shape (B, *shape), int64."""
        return self._keep(
            torch.randint(low, high, (self.total, *shape), generator=self.generator, device=self.device)
        )

    def permutation(self, n: int) -> Tensor:
        """A random order of n items per example, shape (B, n), int64."""
        return self.uniform(n).argsort(dim=1)


def one_group(seed: int, size: int, device: torch.device | str = "cpu") -> BatchRng:
    """The generator of a batch of `size` examples on one rank, as tests and notebooks need it."""
    return BatchRng(seed, range(size), size, device)
