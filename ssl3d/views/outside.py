"""torchio's random transforms by name, in `draw`, on the CPU."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl3d.errors import UsageError

# Transforms of torchio 1.2 that keep the shape, need no labels, and take their randomness from torch.
TORCHIO = (
    "RandomAffine",
    "RandomAnisotropy",
    "RandomBiasField",
    "RandomBlur",
    "RandomElasticDeformation",
    "RandomFlip",
    "RandomGamma",
    "RandomGhosting",
    "RandomMotion",
    "RandomNoise",
    "RandomSpike",
    "RandomSwap",
)

IN_PLANE = ("RandomBiasField", "RandomBlur", "RandomGamma", "RandomGhosting", "RandomNoise", "RandomSpike")
"""Transforms of torchio that neither mirror nor move anything across slices."""


def check_in_plane(names: Sequence[str]) -> None:
    """Refuse the transforms of torchio that may move things out of the plane of a slice.

    Raises:
        ValueError: A name is not one of `IN_PLANE`; the message lists those that are.
    """
    across = [name for name in names if name not in IN_PLANE]
    if across:
        raise ValueError(
            f"torchio's {', '.join(across)} may move things out of the plane of a slice; use "
            f"{', '.join(IN_PLANE)}"
        )


def check_torchio(names: Sequence[str]) -> None:
    """Check the names of transforms without importing torchio.

    Raises:
        ValueError: A name is not one of `TORCHIO`; suggestions follow.
    """
    for name in names:
        if name not in TORCHIO:
            close = difflib.get_close_matches(name, TORCHIO, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"torchio has no {name!r} that fits.{hint} Available: {', '.join(TORCHIO)}")


def apply_torchio(names: Sequence[str], x: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply torchio's transforms, with their default strengths, to one crop (C, D, H, W), in order.

    They draw from torch's global generator: it is seeded from `rng` and put back afterwards.

    Raises:
        UsageError: torchio is not installed, or a transform fails on such a crop.
    """
    if not names:
        return x
    try:
        import SimpleITK as sitk
        import torchio
    except ImportError as error:
        raise UsageError(f"--torchio {' '.join(names)}: {error}; pip install torchio") from error
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # else every worker takes all cores
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        for name in names:
            try:
                with np.errstate(all="ignore"):
                    changed = getattr(torchio, name)(copy=False, **_fitting(name, x))(x.clone())
            except Exception as error:
                raise UsageError(
                    f"torchio's {name} fails on a crop of {tuple(x.shape)}: {error}"
                ) from error
            x = changed.to(x.dtype)
    return x


def _fitting(name: str, x: Tensor) -> dict[str, Any]:
    """Return arguments that fit a transform to a crop, where its default would fail on small ones."""
    if name == "RandomSwap":
        return {"patch_size": tuple(max(1, min(15, n // 4)) for n in x.shape[1:])}
    return {}
