"""What is written of one volume: files of masks and boxes, and its row of the tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl3d.errors import UsageError
from ssl3d.model import BoxPrediction, LabelPrediction, MaskPrediction, Prediction
from ssl3d.prediction.inputs import Item
from ssl3d.prediction.options import PredictOptions
from ssl3d.prediction.write import write_mask


class Writer:
    """Writer of the predictions of one kind.

    Args:
        options: Options of the command.
        kind: Name of the task.
        classes: Value and name of each class.

    Raises:
        UsageError: An option asks for files that such predictions do not have.
    """

    def __init__(self, options: PredictOptions, kind: str, classes: Sequence[dict[str, Any]]) -> None:
        self.options, self.kind, self.classes = options, kind, classes
        if kind != "segmentation" and (options.probabilities or options.dicom_seg == "yes"):
            flag = "--probabilities" if options.probabilities else "--dicom-seg yes"
            raise UsageError(f"{flag}: the model predicts no masks ({kind})")
        self.seg = kind == "segmentation" and _seg_wanted(options.dicom_seg)

    def settings(self) -> list[Any]:
        """Return what decides which files are written."""
        return [self.options.probabilities, self.options.format, self.seg]

    def write(
        self, prediction: Prediction, volume: Any, item: Item, name: str, scratch: Path
    ) -> tuple[list[Path], dict[str, Any]]:
        """Write files into the scratch folder, and return them and the row of the tables.

        Args:
            prediction: Prediction of the volume.
            volume: Volume of a store.
            item: Scan that the volume was made of.
            name: Name of the files, without suffix.
            scratch: Folder to write into.
        """
        if isinstance(prediction, LabelPrediction):
            return [], {"numbers": list(prediction.numbers)}
        if isinstance(prediction, BoxPrediction):
            from ssl3d.prediction.boxes import write_boxes

            return write_boxes(prediction, volume, name, scratch)
        assert isinstance(prediction, MaskPrediction)
        named = [str(kind["name"]) for kind in self.classes]
        files, labels, millilitres = write_mask(
            MaskPrediction(prediction.values, tuple(named), prediction.shape, prediction.slabs),
            volume, name, scratch,
            probabilities=self.options.probabilities, own_format=self.options.format == "own",
        )  # fmt: skip
        if self.seg and item.series and labels is not None:
            from ssl3d.prediction.dicom_seg import write_dicom_seg

            seg = scratch / f"{name}.dcm"
            if write_dicom_seg(item.series, labels, self.classes, seg):
                files.append(seg)
        return files, {"millilitres": millilitres}


def _seg_wanted(asked: str) -> bool:
    """Return whether DICOM SEG is written, for which highdicom must be there.

    Raises:
        UsageError: It is asked for and highdicom is missing.
    """
    if asked == "no":
        return False
    from importlib.util import find_spec

    there = find_spec("highdicom") is not None
    if asked == "yes" and not there:
        raise UsageError('--dicom-seg yes: needs highdicom; pip install "ssl3d[dicom-seg]"')
    return there
