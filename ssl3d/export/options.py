"""The options of `ssl3d export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ExportOptions:
    """Write an encoder or a fine-tuned model for another program, and check what was written.

    Attributes:
        source: Run of ssl3d pretrain or its encoder/, an encoder that ssl3d convert made, or a model that
            ssl3d finetune kept.
        to: Format: onnx; torch-export, a program that torch.export.load opens without ssl3d, in place of
            TorchScript, which torch has deprecated.
        out: Folder for the files; by default the source's name and the format.
        patch: Size D H W in voxels of the volumes that the network takes; left out, that of the training.
        overwrite: Permission to replace an export that is there.
    """

    source: str = field(metadata={"positional": True})
    to: Literal["onnx", "torch-export", "torchscript"] = "onnx"
    out: Path | None = None
    patch: tuple[int, int, int] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse, by a ValueError that names the field, a value that cannot be used."""
        if self.to == "torchscript":
            raise ValueError("to: torch has deprecated TorchScript; torch-export needs no ssl3d either")
        if self.patch is not None and min(self.patch) < 1:
            raise ValueError(f"patch: {self.patch}; give three sizes from 1")
