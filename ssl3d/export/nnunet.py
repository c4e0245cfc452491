"""Encoders and the encoders of fine-tuned models for nnU-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ssl3d.convert.nnunet import PATCH, export_nnunet
from ssl3d.encoders.plain_unet import PlainUNet
from ssl3d.encoders.resenc import ResEnc
from ssl3d.export.options import ExportOptions
from ssl3d.export.source import Source, largest_difference, require_equal, sample
from ssl3d.model import Model


def write_nnunet(source: Source, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Write the checkpoint, the adaptation plan and the architecture, and read the weights again.

    Args:
        source: What is exported; of a model its encoder, for no head of ssl3d is nnU-Net's decoder.
        folder: Folder to write into.
        options: Options of the command, of which `patch` counts.

    Raises:
        UsageError: nnU-Net has no such encoder.
        TrainingError: The outputs differ.
    """
    encoder, card = source.encoder, source.card
    if isinstance(source.module, Model):
        encoder.metadata = {
            "spacing": card["spacing"]["median"],
            "patch": card["task"]["settings"].get("patch"),
            "data": {"datasets": card["training"]["datasets"]},
            "citations": card["citations"],
            "sha256": card["sha256"],
        }
    file = export_nnunet(encoder, folder, options.patch or PATCH)
    assert isinstance(encoder, ResEnc | PlainUNet)
    state = torch.load(file, weights_only=True)["network_weights"]
    d, h, w = (max(2 * step, 8) for step in encoder.strides[-1])
    x, worst = sample(source.channels, (d, h, w)), 0.0
    for prefix in ("encoder.", "decoder.encoder."):
        again = type(encoder)(encoder.config).eval()
        again.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()
                               if key.startswith(prefix)})  # fmt: skip
        with torch.no_grad():
            worst = max(worst, largest_difference(again(x), encoder(x)))
    require_equal(worst, f"--to nnunet of {source.word}")
    return {"checkpoint": file.name, "decoder": "untrained", "largest_difference": worst}
