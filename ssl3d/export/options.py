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
            TorchScript, which torch has deprecated; monai-bundle, which segments scans without ssl3d; hf,
            a folder with a model card for the Hugging Face hub; timm, a folder that timm.create_model opens
            as a 2D network, of encoders of kind acs or 2.5d; nnunet, a checkpoint for nnU-Net.
        out: Folder for the files; by default the source's name and the format.
        patch: Size D H W in voxels of the volumes that the network takes, and that nnunet recommends (timm
            takes H W); left out, that of the training, or 160 160 160 for nnunet.
        licence: Licence of the weights by the hub's identifier, such as apache-2.0, for the card of hf.
        push: Repository OWNER/NAME of the hub to which hf is uploaded, private where it is new. The token
            is that of the environment variable HF_TOKEN.
        overwrite: Permission to replace an export that is there.
    """

    source: str = field(metadata={"positional": True})
    to: Literal["onnx", "torch-export", "monai-bundle", "hf", "timm", "nnunet", "torchscript"] = "onnx"
    out: Path | None = None
    patch: tuple[int, int, int] | None = None
    licence: str = ""
    push: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse, by a ValueError that names the field, a value that cannot be used."""
        if self.to == "torchscript":
            raise ValueError("to: torch has deprecated TorchScript; torch-export needs no ssl3d either")
        for name in ("licence", "push"):
            if getattr(self, name) and self.to != "hf":
                raise ValueError(f"{name}: is an option of --to hf only")
        if self.patch is not None and self.to == "hf":
            raise ValueError("patch: --to hf writes the weights, which no size of volumes changes")
        if self.patch is not None and min(self.patch) < 1:
            raise ValueError(f"patch: {self.patch}; give three sizes from 1")
