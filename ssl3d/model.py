"""The contract of a kept model: a trained network of a downstream task, and what it predicts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl3d.errors import UsageError

Array = NDArray[Any]


@dataclass(frozen=True)
class MaskPrediction:
    """Prediction of a class for every voxel of a volume, slab by slab, so that none is held whole.

    Attributes:
        values: Mask value of each class, background first.
        names: Name of each class.
        shape: Shape (D, H, W) of the volume.
        slabs: Probabilities (K, d, H, W) float32 of adjacent slabs along D, from the first slice to the
            last; they can be read once.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]
    shape: tuple[int, int, int]
    slabs: Iterable[Tensor]

    def mask(self) -> Array:
        """Read the slabs and return the most probable mask values, (D, H, W)."""
        values = np.array(self.values)
        values = values.astype(np.min_scalar_type(int(values.max())))
        parts = [values[best_class(slab).cpu().numpy()] for slab in self.slabs]
        whole: Array = np.concatenate(parts)
        return whole


@dataclass(frozen=True)
class LabelPrediction:
    """Prediction of a class or a value for a whole volume.

    Attributes:
        names: Names of the classes; none where a value is predicted.
        numbers: Probability of each class, or the value alone; float64.
    """

    names: tuple[str, ...]
    numbers: tuple[float, ...]

    @property
    def answer(self) -> str | float:
        """Most probable class, or the value."""
        return self.names[int(np.argmax(self.numbers))] if self.names else self.numbers[0]


@dataclass(frozen=True)
class BoxPrediction:
    """Prediction of boxes round the objects in a volume.

    Attributes:
        names: Names of the kinds of objects.
        boxes: Boxes (n, 6), z1 y1 x1 z2 y2 x2 in voxels of the volume, upper corner exclusive, by falling
            score.
        scores: Score of each box, (n,), from 0 to 1.
        labels: Index in `names` of each box, (n,).
        merge_iou: Overlap (IoU) above which two boxes of a kind are one object's.
        limit: Largest number of boxes of a volume.
    """

    names: tuple[str, ...]
    boxes: Array
    scores: Array
    labels: Array
    merge_iou: float
    limit: int


Prediction = MaskPrediction | LabelPrediction | BoxPrediction


@dataclass(frozen=True)
class Portable:
    """Network as other programs use it, of one tensor in and tensors out.

    Attributes:
        network: Network of volumes (B, C, D, H, W), in single precision, that returns a tensor or several.
        outputs: Name of each tensor that it returns.
        size: Size (D, H, W) of the volumes, voxels.
        fixed: Whether it takes volumes of that size alone.
    """

    network: nn.Module
    outputs: tuple[str, ...]
    size: tuple[int, int, int]
    fixed: bool


class Model(nn.Module, ABC):
    """Trained network of a downstream task, in evaluation mode, as `ssl3d.load_model` returns it.

    Attributes:
        network: Network itself, from volumes (B, C, D, H, W) to what the task makes of them.
        card: Content of `model.json`.
        can_flip: Whether training mirrored volumes, so that predictions may be averaged over mirrored
            copies.
    """

    can_flip = False

    def __init__(self, network: nn.Module, card: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.card = network, card

    def forward(self, x: Tensor) -> Any:
        """Compute the network's outputs of (B, C, D, H, W), normalised as the training data were."""
        return self.network(x)

    @abstractmethod
    def infer(self, volume: Any, flip: bool = False) -> Prediction:
        """Predict a `Volume`, or anything that has its `shape`, `spacing` and `read`.

        Args:
            volume: Volume prepared as the training data were.
            flip: Whether to average over mirrored copies; only where `can_flip`.
        """

    def portable(self) -> Portable:
        """Return the network of one window, with probabilities or values as its output.

        Raises:
            UsageError: What the model does with a window cannot be said by one network.
        """
        raise UsageError(f"a model of {self.card['task']['name']} is no network of one tensor; use --to hf")

    def predict(self, volume: Any, flip: bool = False) -> Any:
        """Predict one volume for its user.

        Args:
            volume: `Volume` of `ssl3d.api.open_data`, or a tensor (C, D, H, W); prepared as the training
                data were (`card["preprocessing"]`).
            flip: Whether to average over mirrored copies; only where `can_flip`.

        Returns:
            Mask values (D, H, W) of a segmentation, else a `LabelPrediction` or a `BoxPrediction`.

        Raises:
            ValueError: The volume has another number of channels or axes than the model takes.
        """
        if isinstance(volume, Tensor):
            volume = TensorVolume(volume, self.card["spacing"]["median"])
        channels = self.card["architecture"]["config"]["in_channels"]
        if volume.shape[0] != channels:
            raise ValueError(f"a volume of {volume.shape[0]} channels; the model takes {channels}")
        predicted = self.infer(volume, flip)
        return predicted.mask() if isinstance(predicted, MaskPrediction) else predicted


class TensorVolume:
    """Volume in memory, with as much of a stored one as predictions need.

    Args:
        voxels: Voxels (C, D, H, W), of any type.
        spacing: Voxel sides, mm along (D, H, W).
        background: Value of air per channel, which `read` fills in outside the volume; by default the
            lowest value of the channel.
        scale: Factor that gives the normalised value of a voxel.
        offset: Number to be added to that.
    """

    dataset, subject, id, index, label = "", "", "", 0, None

    def __init__(
        self,
        voxels: Tensor,
        spacing: Sequence[float],
        background: Sequence[float] | None = None,
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        if voxels.ndim != 4:
            raise ValueError(f"a volume is (C, D, H, W), got {tuple(voxels.shape)}")
        self._voxels, self._scale, self._offset = voxels, scale, offset
        self.shape = tuple(voxels.shape)
        self.spacing = tuple(spacing)
        lowest = voxels.amin(dim=(1, 2, 3)).float() * scale + offset if background is None else background
        self.background = torch.as_tensor(lowest, dtype=torch.float32)

    def read(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Read voxels (C, d, h, w), float32; where a crop reaches outside, the background is filled in."""
        begin = [0, 0, 0] if start is None else list(start)
        extent = [n - b for n, b in zip(self.shape[1:], begin, strict=True)] if size is None else list(size)
        inside = [
            slice(min(max(b, 0), m), min(max(b + n, 0), m))
            for b, n, m in zip(begin, extent, self.shape[1:], strict=True)
        ]
        there = self._voxels[(slice(None), *inside)].float()
        if (self._scale, self._offset) != (1.0, 0.0):
            there = there * self._scale + self._offset
        if list(there.shape[1:]) == extent:
            return there
        out = self.background.view(-1, 1, 1, 1).repeat(1, *extent)
        place = tuple(slice(s.start - b, s.stop - b) for s, b in zip(inside, begin, strict=True))
        out[(slice(None), *place)] = there
        return out


def best_class(probability: Tensor) -> Tensor:
    """Return the index of the most probable class of (K, ...), the first of equal ones, int16.

    Class by class: `argmax` over a strided axis is slow on a CPU.
    """
    best, index = probability[0].clone(), torch.zeros_like(probability[0], dtype=torch.int16)
    for k in range(1, len(probability)):
        better = probability[k] > best
        index[better] = k
        torch.maximum(best, probability[k], out=best)
    return index
