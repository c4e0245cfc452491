"""Files of predicted boxes for other programs: JSON and CSV, in the scanner's coordinates."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ssl3d.data.store.volume import Volume

Array = NDArray[Any]


def write_boxes(
    path: Path, volume: Volume, boxes: Array, scores: Array, labels: Array, classes: Sequence[str]
) -> Path:
    """Write boxes as JSON to `path`, as `describe_boxes` has them, and as CSV beside it; return `path`."""
    content = describe_boxes(volume, boxes, scores, labels, classes)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "score", "x_mm", "y_mm", "z_mm", "w_mm", "h_mm", "d_mm"])
        for entry in content["boxes"]:
            writer.writerow([volume.id, entry["label"], entry["score"], *entry["box"]])
    return path


def describe_boxes(
    volume: Volume, boxes: Array, scores: Array, labels: Array, classes: Sequence[str]
) -> dict[str, Any]:
    """Describe the boxes of a volume for other programs, as JSON holds it.

    Each box has `score`, `label` and `voxels` (z1 y1 x1 z2 y2 x2 on the stored grid, upper corner
    exclusive), and in mm of the scanner (RAS+) `centre`, `size` along the stored axes D H W, and `low` and
    `high` of the smallest upright box round it. `box` is centre and upright size, x y z w h d, the form of
    MONAI's LUNA16 lists. A scan without a known orientation has coordinates along its own axes; `space`
    says so.

    Args:
        volume: Volume of a store.
        boxes: Boxes (n, 6) in voxels.
        scores: Score of each box, (n,).
        labels: Index in `classes` of each box, (n,).
        classes: Names of the kinds of objects.
    """
    matrix = np.asarray(volume.affine, dtype=np.float64)
    entries: list[dict[str, Any]] = []
    for box, score, label in zip(boxes, scores, labels, strict=True):
        corners = to_mm(matrix, box)
        low, high = corners.min(axis=0), corners.max(axis=0)
        sides = (box[3:] - box[:3]) * np.linalg.norm(matrix[:3, :3], axis=0)
        centre = (low + high) / 2
        entries.append(
            {
                "score": round(float(score), 5),
                "label": classes[int(label)],
                "box": _rounded([*centre, *(high - low)]),
                "centre": _rounded(centre),
                "size": _rounded(sides),
                "low": _rounded(low),
                "high": _rounded(high),
                "voxels": _rounded(box),
            }
        )
    return {
        "id": volume.id,
        "dataset": volume.dataset,
        "subject": volume.subject,
        "source": volume.record.source,
        "space": "RAS+ mm" if volume.orientation != "unknown" else "mm along the stored axes",
        "affine": matrix.tolist(),
        "boxes": entries,
    }


def to_mm(affine: Array, box: Array) -> Array:
    """Convert a box in voxels to its eight corners, (8, 3) mm; the affine maps the middles of voxels."""
    ends = [(box[axis] - 0.5, box[axis + 3] - 0.5) for axis in range(3)]
    corners = np.array(list(itertools.product(*ends)))
    moved: Array = corners @ affine[:3, :3].T + affine[:3, 3]
    return moved


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]
