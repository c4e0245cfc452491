"""Voxels of a volume for networks that see windows: in memory, or read by windows where they do not fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssl3d import memory
from ssl3d.data.store.volume import Volume


class WindowedVoxels:
    """Voxels (C, D, H, W) of a volume of a store, which are read as windows of them are taken.

    Args:
        volume: Volume.
        device: Device on which windows are put.

    Attributes:
        shape: Shape (C, D, H, W).
        ndim: Number of axes, 4.
        device: Device of the windows.
    """

    ndim = 4

    def __init__(self, volume: Volume, device: torch.device | str = "cpu") -> None:
        self._volume, self.shape, self.device = volume, volume.shape, torch.device(device)

    def __getitem__(self, place: tuple[slice, slice, slice, slice]) -> Tensor:
        """Read a window: slices without steps along D, H and W, and one of the channels."""
        channels, *sides = place
        spans = [side.indices(n) for side, n in zip(sides, self.shape[1:], strict=True)]
        window = self._volume.read([a for a, _, _ in spans], [b - a for a, b, _ in spans])
        return window[channels].to(self.device)


def voxels_of(volume: Volume, device: torch.device | str = "cpu") -> Any:
    """Return the voxels of a volume on a device, as a tensor where that fits into the memory budget.

    Args:
        volume: Volume of a store.
        device: Device on which they, or windows of them, are put.

    Returns:
        Tensor (C, D, H, W) float32, or `WindowedVoxels`, of which `embed_volume` and `dense_features` take
        windows as of a tensor.

    Raises:
        DataError: The store cannot be read here, or its check sum does not hold.
    """
    if memory.fits(8 * math.prod(volume.shape)):  # as it is stored, and in single precision
        return volume.read().to(device)
    return WindowedVoxels(volume, device)
