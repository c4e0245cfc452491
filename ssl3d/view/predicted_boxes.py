"""Predicted boxes beside the true ones: what was found, missed, and found where nothing is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.amounts import count_of
from ssl3d.detection.files import to_mm
from ssl3d.detection.metrics import Detections, Truths, average_precision, froc, match
from ssl3d.errors import DataError
from ssl3d.json_files import parse_json
from ssl3d.pages import elements, palette
from ssl3d.view import parts, slices
from ssl3d.view.gallery import Card
from ssl3d.view.predicted import UNDEFINED, Predicted

Array = NDArray[Any]

IOU = 0.1
"""Overlap from which a box counts as found, that of fine-tuning's FROC by default."""
SURE = 0.5
"""Score from which a box that finds nothing counts as a false alarm in the order of the cards."""
SHOWN = 10
"""Most predicted boxes that are drawn of a scan."""


class PredictedBoxes(Predicted):
    """Boxes of scans, a file each."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.files = []
        for path in sorted(self.folder.glob("*.json")):
            if path.name in ("predict.json", "boxes.json"):
                continue
            try:
                content = parse_json(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                content = None
            self.files.append((path.name, content if isinstance(content, dict) else {}))
        self.detections: list[Detections] = []
        self.truths: list[Truths] = []
        self.counts: list[tuple[str, int, int, int]] = []

    def __len__(self) -> int:
        return len(self.files)

    def name(self, position: int) -> str:
        """Return the name of a predicted scan."""
        file, content = self.files[position]
        return str(content.get("id") or file)

    def sought(self) -> list[tuple[str, str]]:
        """Return the data set and the name of each prediction's scan."""
        return [
            (str(content.get("dataset", "")), self.name(k)) for k, (_, content) in enumerate(self.files)
        ]

    def card(self, position: int, side: int, number: int) -> tuple[Card, float]:
        """Return the card of a scan: the more objects missed, then the more false alarms, the earlier."""
        file, content = self.files[position]
        name = self.name(position)
        boxes, scores, words = _boxes(file, content)
        volume = self.volume(str(content.get("dataset", "")), name)
        if volume is None:
            return Card(name, "", [f"boxes predicted: {len(boxes)}"]), UNDEFINED
        boxes = _moved(boxes, np.array(content["affine"], float), np.array(volume.affine, float))
        truth = volume.boxes
        lines = [f"subject {volume.subject}"]
        order = UNDEFINED
        orders: dict[str, float | None] = {}
        if truth is not None:
            self.known = True
            hits = match(boxes, scores, truth, IOU) if len(boxes) else np.zeros(0, int)
            caught = len({int(hit) for hit in hits if hit >= 0})
            missed = len(truth) - caught
            alarms = int(((hits < 0) & (scores >= SURE)).sum()) if len(boxes) else 0
            self.detections.append(Detections(boxes, scores))
            self.truths.append(Truths(truth))
            self.counts.append((name, len(truth), caught, alarms))
            lines.append(
                f"{caught} of {len(truth)} found, {count_of(alarms, 'false alarm')} (score from {SURE:g})"
            )
            order = -(1000.0 * missed + alarms)
            orders = {"missed objects": -float(missed), "false alarms": -float(alarms)}
        best = np.argsort(-scores, kind="stable")[:SHOWN]
        pick = truth if truth is not None and len(truth) else boxes[best]
        shape = volume.shape[1:]
        at = slices.centre_of_boxes(pick, shape) or tuple(n // 2 for n in shape)
        plan = slices.layout(volume, at, side)
        source = slices.grey(plan, [slices.cut(volume, plane, shape) for plane in plan.planes])
        drawn = "" if truth is None else slices.rectangles(plan, truth, "true")
        drawn += slices.rectangles(
            plan, boxes[best], "found", [words[k] for k in best], scores[best].tolist()
        )
        picture = slices.picture(
            plan, source, [slices.Layer(), slices.Layer("", "", drawn)], f"Boxes of {name}", f"v{number}"
        )
        return Card(name, picture, lines, {"data set": volume.dataset}, orders), order

    def summary(self, shown: int) -> list[str]:
        """Return how many objects were found, and the scores over all scans."""
        if not self.counts:
            return [f"{count_of(shown, 'scan')} predicted; their true boxes are not known."]
        total, caught, alarms = (
            sum(column) for column in zip(*(own[1:] for own in self.counts), strict=True)
        )
        sentence = (
            f"{caught} of {count_of(total, 'object')} in {count_of(len(self.counts), 'scan')} are found by "
            f"a box of any score, with {count_of(alarms, 'false alarm')} of score {SURE:g} or more."
        )
        precision = float(average_precision(self.detections, self.truths, IOU).mean[0])
        mean = float(froc(self.detections, self.truths, IOU).cpm[0])
        over_all = (
            f"Average precision {precision:.3f}; mean sensitivity at 1/8 to 8 false positives per scan "
            f"{mean:.3f}; overlap (IoU) from {IOU:g}."
        )
        return [sentence, over_all]

    def tables(self) -> list[str]:
        """Return the counts of every scan."""
        if not self.counts:
            return []
        rows = [elements.Row(name, [elements.Cell(str(n), n) for n in own]) for name, *own in self.counts]
        table = elements.table("Boxes of every scan", ["scan", "objects", "found", "false alarms"], rows)
        return [parts.folded("Boxes of every scan", table)]

    def legend(self) -> str:
        """Return the colours of true and predicted boxes."""
        pairs = ((palette.BOX, "truth"), ("#e6550d", "prediction (dashed)"))
        return '<p class="legend">' + "".join(
            f'<i class="swatch" style="background:{colour}"></i>{words}' for colour, words in pairs
        ) + "</p>"  # fmt: skip

    def explained(self) -> str:
        """Say where the slices lie."""
        return (
            f"Slices go through the largest object. The {SHOWN} surest boxes of each scan are drawn, the "
            "less sure the fainter; a pointer on a box shows its score."
        )


def _boxes(file: str, content: dict[str, Any]) -> tuple[Array, Array, list[str]]:
    """Read boxes in voxels, their scores, and what a pointer shows of each.

    Raises:
        DataError: The file is damaged.
    """
    try:
        rows = content["boxes"]
        boxes = np.array([row["voxels"] for row in rows], float).reshape(-1, 6)
        scores = np.array([float(row["score"]) for row in rows])
        words = [f"{row['label']} {float(row['score']):.2f}" for row in rows]
        np.array(content["affine"], float).reshape(4, 4)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: is not what ssl3d predict writes of boxes ({error})") from error
    return boxes, scores, words


def _moved(boxes: Array, source: Array, target: Array) -> Array:
    """Bring boxes from the grid of a prediction to that of the data, through the scanner's mm."""
    if np.allclose(source, target) or not len(boxes):
        return boxes
    inverse = np.linalg.inv(target)
    moved = []
    for box in boxes:
        corners = to_mm(source, box) @ inverse[:3, :3].T + inverse[:3, 3] + 0.5
        moved.append([*corners.min(axis=0), *corners.max(axis=0)])
    return np.array(moved)
