"""The built-in encoders."""

from __future__ import annotations

import torch
from torch import nn


def memory_format(encoder: nn.Module, device: torch.device | str) -> torch.memory_format:
    """Return the memory layout in which an encoder trains fastest on a device.

    Args:
        encoder: Encoder; one without `prefers_channels_last(device)` gets channels last on CUDA only.
        device: Device that it runs on.
    """
    device = torch.device(device)
    prefers = getattr(encoder, "prefers_channels_last", None)
    last = device.type == "cuda" if prefers is None else prefers(device)
    return torch.channels_last_3d if last else torch.contiguous_format


def to_memory_format(module: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Let the encoders and the 3D kernels inside a module use a memory format.

    `Module.to` will not do: it refuses the 2D kernels beside them.

    Args:
        module: An encoder, or a proxy with its encoder; changed in place and returned.
        layout: Memory format, torch.channels_last_3d or torch.contiguous_format.
    """
    for parameter in module.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    for part in module.modules():
        if hasattr(part, "channels_last"):
            setattr(part, "channels_last", layout == torch.channels_last_3d)  # noqa: B010
    return module
