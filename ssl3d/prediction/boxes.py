"""Predicted boxes of a volume as files: JSON in the scanner's mm, and a NIfTI of filled boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.detection.files import describe_boxes
from ssl3d.model import BoxPrediction
from ssl3d.segmentation.save import save_segmentation


def write_boxes(
    prediction: BoxPrediction, volume: Any, name: str, scratch: Path
) -> tuple[list[Path], dict[str, Any]]:
    """Write NAME.json and NAME_boxes.nii.gz, and return them and the boxes in mm.

    In the NIfTI, which is on the scan's own grid, a voxel holds the number of its box, counted from 1 by
    falling score; where boxes overlap, that with the better score.

    Args:
        prediction: Prediction of the volume.
        volume: Volume of a store.
        name: Name of the files, without suffix.
        scratch: Folder to write into.
    """
    boxes = prediction.boxes
    content = describe_boxes(volume, boxes, prediction.scores, prediction.labels, prediction.names)
    path = scratch / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    filled = np.zeros(volume.shape[1:], np.uint8 if len(boxes) < 256 else np.int32)
    for rank in reversed(range(len(boxes))):
        low = np.clip(np.floor(boxes[rank][:3] + 0.5), 0, None).astype(int)
        high = np.maximum(np.floor(boxes[rank][3:] + 0.5).astype(int), low + 1)
        filled[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = rank + 1
    picture = scratch / f"{name}_boxes.nii.gz"
    if not save_segmentation(volume.record, filled, picture):
        picture = picture.replace(scratch / f"{name}_boxes_stored_grid.nii.gz")
    return [path, picture], {"boxes": content["boxes"]}
