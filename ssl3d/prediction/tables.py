"""Tables over all predicted volumes: a row for each subject or volume, and what was set aside."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.amounts import printable
from ssl3d.files import write_whole

Rows = list[list[Any]]


def write(
    out: Path, entries: Sequence[dict[str, Any]], kind: str, classes: Sequence[dict[str, Any]]
) -> list[Path]:
    """Write the tables of all entries, each whole, and return their paths.

    Args:
        out: Folder of the predictions.
        entries: What is known of each predicted volume, in order.
        kind: Name of the task.
        classes: Value and name of each class.

    Raises:
        OSError: A table cannot be written.
    """
    path = out / "predictions.csv"
    names = [str(known["name"]) for known in classes]
    if kind == "classification":
        header, rows = _of_subjects(entries, names)
        files = [path]
        if any(row[2] > 1 for row in rows):
            each = out / "scans.csv"
            _write(each, ["dataset", "subject", "id", *_heads(names)],
                   [[e["dataset"], e["subject"], e["id"], *_answer(e["row"]["numbers"], names)]
                    for e in entries])  # fmt: skip
            files.append(each)
    elif kind == "segmentation":
        header = ["dataset", "subject", "id", "source", "file", *(f"ml of {name}" for name in names[1:])]
        rows = [[e["dataset"], e["subject"], e["id"], e["source"], e["files"][0],
                 *(e["row"]["millilitres"][name] for name in names[1:])] for e in entries]  # fmt: skip
        files = [path]
    else:
        header = ["id", "label", "score", "x_mm", "y_mm", "z_mm", "w_mm", "h_mm", "d_mm"]
        rows = [[e["id"], box["label"], box["score"], *box["box"]] for e in entries
                for box in e["row"]["boxes"]]  # fmt: skip
        files = [path, out / "boxes.json"]
        write_whole(files[1], json.dumps(_monai(entries, names), indent=1) + "\n")
    _write(path, header, rows)
    return files


def write_rejected(out: Path, rejected: Sequence[tuple[str, str]]) -> None:
    """List what was set aside in `rejected.csv`; there is no such file where nothing was.

    Raises:
        OSError: The file cannot be written.
    """
    path = out / "rejected.csv"
    if rejected:
        _write(path, ["path", "reason"], [list(map(printable, row)) for row in rejected])
    else:
        path.unlink(missing_ok=True)


def _of_subjects(entries: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[list[str], Rows]:
    """Return a row for each subject: the mean over the subject's volumes."""
    people: dict[tuple[str, str], list[list[float]]] = {}
    for entry in entries:
        people.setdefault((entry["dataset"], entry["subject"]), []).append(entry["row"]["numbers"])
    rows = [[*person, len(own), *_answer(np.mean(own, axis=0).tolist() if len(own) > 1 else own[0], names)]
            for person, own in people.items()]  # fmt: skip
    return ["dataset", "subject", "scans", *_heads(names)], rows


def _heads(names: Sequence[str]) -> list[str]:
    return ["prediction", *(f"probability of {name}" for name in names)]


def _answer(numbers: Sequence[float], names: Sequence[str]) -> list[Any]:
    if not names:
        return [numbers[0]]
    return [names[int(np.argmax(numbers))], *numbers]


def _monai(entries: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return MONAI's list of boxes: centre and size in RAS+ mm, an index for the kind, a score."""
    return {
        "validation": [
            {
                "image": entry["source"],
                "box": [box["box"] for box in entry["row"]["boxes"]],
                "label": [names.index(box["label"]) for box in entry["row"]["boxes"]],
                "label_scores": [box["score"] for box in entry["row"]["boxes"]],
            }
            for entry in entries
        ]
    }


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_whole(path, text.getvalue())
