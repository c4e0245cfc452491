"""The options of `ssl3d predict`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass
class PredictOptions:
    """Predict scans with models that ssl3d finetune kept.

    Attributes:
        model: One or several models, an ensemble: folders of models, folders with one model for each fold,
            or folders of ssl3d finetune that hold one model.
        data: Scans, anything that `ssl3d prepare` takes, or stores and phantoms[:N]. Scans are prepared as
            the training data were; masks and labels beside them are not looked at.
        out: Folder for the predictions.
        probabilities: Whether to write the probabilities of the classes of every voxel too.
        flip: Whether to average over mirrored copies, along the axes that training mirrored: up to 8 times
            the work.
        format: Format of masks: nifti, or own for the format of the scan where that is NRRD or MetaImage.
        dicom_seg: Whether masks of DICOM series are written as DICOM SEG beside NIfTI: auto (where the
            extra dicom-seg is installed), yes or no.
        normalize: Normalisation of intensities, where that of the training data cannot be told from a
            scan: ct, mr, unit or none; auto decides as ssl3d prepare did.
        device: Device that computes: auto, cpu, cuda or mps.
        threads: Number of CPU threads; 0 for torch's own number.
        overwrite: Whether to predict again what is predicted already.
    """

    model: tuple[str, ...] = field(metadata={"positional": True})
    data: tuple[str, ...] = ()
    out: Path = Path("predicted")
    probabilities: bool = False
    flip: bool = False
    format: Literal["nifti", "own"] = "nifti"
    dicom_seg: Literal["auto", "yes", "no"] = "auto"
    normalize: Literal["auto", "ct", "mr", "unit", "none"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse, by a ValueError that names the field, a value that cannot be used."""
        if not self.model:
            raise ValueError("model: name a folder that ssl3d finetune kept, such as tuned/models/NAME")
        if not self.data:
            raise ValueError("data: name scans, or folders of them")
        if self.threads < 0:
            raise ValueError(f"threads: {self.threads} must be 0 or more")
