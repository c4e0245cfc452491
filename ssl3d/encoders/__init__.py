"""The built-in encoders."""

from __future__ import annotations

import torch
from torch import nn


def memory_format(encoder: nn.Module, device: torch.device | str) -> torch.memory_format:
    """The layout of the volumes in which `encoder` trains fastest on `device`.

    Args:
        encoder: Any registered encoder.
        device: Where it runs.
    """
    return torch.channels_last_3d


def to_memory_format(module: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Brings the 3D kernels of `module` into a layout; `Module.to` refuses the 2D ones beside them."""
    for parameter in module.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return module
