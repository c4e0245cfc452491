"""What convolutional encoders share: an image is seen once, memory format, checkpointing, strides."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssl3d.encoder import Encoder
from ssl3d.encoders.convolutions import KINDS, Triple, triple
from ssl3d.encoders.norms import NORMS, recomputation, refuse_one_voxel


class ConvolutionOptions(Protocol):
    """Fields of a configuration that `check_options` reads."""

    @property
    def kind(self) -> str:
        """Kind of the encoder's convolutions."""

    @property
    def norm(self) -> str:
        """Kind of the encoder's norms."""

    @property
    def norm_groups(self) -> int:
        """Number of groups of the group norm."""


def check_options(
    config: ConvolutionOptions, at_least_1: tuple[str, ...], strides: dict[str, int | None]
) -> None:
    """Check the fields of a configuration.

    Args:
        config: Configuration with `kind` and `norm`.
        at_least_1: Fields that hold whole numbers of at least 1.
        strides: Fields that hold one stride (None), or so many of them.

    Raises:
        ValueError: A value cannot be used; the message names the field.
    """
    for field, allowed in (("kind", KINDS), ("norm", NORMS)):
        if getattr(config, field) not in allowed:
            raise ValueError(f"{field} is {getattr(config, field)!r}; choose {', '.join(allowed)}")
    for field in at_least_1:
        if getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1, not {getattr(config, field)}")
    for field, count in strides.items():
        given = getattr(config, field)
        if count is not None and len(given) != count:
            raise ValueError(f"{field} needs {count} strides along D H W, got {len(given)}")
        for stride in (given,) if count is None else given:
            if len(stride) != 3 or min(stride) < 1:
                raise ValueError(f"{field} needs strides of at least 1 along D, H and W, got {stride}")


class ConvolutionalEncoder(Encoder):
    """An encoder that runs in 2D on an input of depth 1, which it decides once per forward pass.

    A subclass writes `maps`, and hands its `image` on as an argument to every layer. Its configuration
    has `kind`, `in_channels`, `norm` and `checkpointing`.

    Attributes:
        channels_last: Memory format of the feature maps; None for the faster one. It changes the time
            and nothing else.

    Raises:
        UsageError: In `forward` while training, if instance norm would see a map of one voxel, which it
            sets to zero.
    """

    channels_last: bool | None = None

    @abstractmethod
    def maps(self, x: Tensor, image: bool) -> list[Tensor]:
        """Compute feature maps of (B, C, H, W) where `image`, else of (B, C, D, H, W)."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute feature maps of (B, C, D, H, W), shallow to deep."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"the encoder takes (B, {self.config.in_channels}, D, H, W), got {tuple(x.shape)}"
            )
        if self.training:  # in use, the shallow maps of a small volume may be all that is wanted
            refuse_one_voxel(self.config.norm, x.shape[2:], self.strides[-1])
        if x.shape[2] == 1:
            return [m.unsqueeze(2) for m in self.maps(x.squeeze(2), True)]
        return self.maps(x, False)

    def prefers_channels_last(self, device: torch.device | str) -> bool:
        """Tell whether it trains faster with the channels last in memory.

        Measured on an AVX-512 processor, DenseNet-121 and MobileNetV2, training: every kind as fast or
        up to a third faster so, in float32 and in bfloat16, thanks to their many kernels of one tap.
        """
        return torch.device(device).type in ("cuda", "cpu")

    def in_layout(self, x: Tensor, image: bool) -> Tensor:
        """Bring the first convolution's output into the memory format of all that follows.

        That comes after the convolution: with one channel in, its input has no layout that the output could
        take.
        """
        last = self.channels_last
        if last is None:
            last = self.prefers_channels_last(x.device)
        if not last:
            return x.contiguous()
        return x.contiguous(memory_format=torch.channels_last if image else torch.channels_last_3d)

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Run block(*inputs), to be computed again in the backward pass where the options say so."""
        if self.config.checkpointing and self.training and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, *inputs, use_reentrant=False, context_fn=count_once)
            return again
        out: Tensor = block(*inputs)
        return out


def count_once() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Make the contexts of a checkpoint's two passes; batch norms count the batch in the first only."""
    return nullcontext(), recomputation()


def max_pool(x: Tensor, stride: Triple, image: bool) -> Tensor:
    """Pool the maximum over windows of size 3, to ceil(n / stride)."""
    return F.max_pool2d(x, 3, stride[1:], 1) if image else F.max_pool3d(x, 3, stride, 1)


def average_pool(x: Tensor, stride: Triple, image: bool) -> Tensor:
    """Average each cell of `stride` voxels, to ceil(n / stride): the last cells may be cut.

    torchvision's pools leave out what does not fill a cell, ours do not: equal where sizes are multiples.
    """
    steps = stride[1:] if image else stride
    cell = [min(step, size) for step, size in zip(steps, x.shape[2:], strict=True)]  # torch wants no larger
    pool = F.avg_pool2d if image else F.avg_pool3d
    return pool(x, cell, steps, ceil_mode=True, count_include_pad=False)


def times(a: Triple, b: Triple) -> Triple:
    """Multiply strides that follow one another.

    Example:
        >>> times((1, 2, 2), (2, 2, 2))
        (2, 4, 4)
    """
    a, b = triple(a), triple(b)
    return (a[0] * b[0], a[1] * b[1], a[2] * b[2])
