"""Scores of a trial while it runs and at its end, read from the files that its command writes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssl3d.api import DataError, parse_json
from ssl3d_benchmarks.finetune.validation import ValidationScores
from ssl3d_benchmarks.sweep.space import VALIDATION


def points(folder: Path, value: str) -> list[tuple[int, float]]:
    """Return the scores so far as pairs of step and score, in the order in which they came.

    The steps of a fine-tuning are counted by scorings, over its folds, seeds and learning rates.

    Args:
        folder: Folder of the trial.
        value: Name of the score.
    """
    if value != VALIDATION:
        rows = [(int(row["step"]), row[value]) for row in _metrics(folder) if row.get(value) is not None]
        return [(step, float(score)) for step, score in rows if math.isfinite(score)]
    scores: dict[Any, float | None] = {}
    for path in _files(folder):
        for line in ValidationScores(path).lines():
            if not line.get("finished"):
                # After a stop the same scoring comes again.
                scores.setdefault((path.name, line["part"], line["lr"], line["step"]), line["score"])
    return [(n, score) for n, score in enumerate(scores.values(), start=1) if score is not None]


def final(folder: Path, value: str) -> float:
    """Return the score of a trial that has ended: the last one, or the mean over a fine-tuning's jobs.

    Raises:
        DataError: There is no such score; the message names those that there are.
    """
    if value != VALIDATION:
        scores = points(folder, value)
        if scores:
            return scores[-1][1]
        names = {name for row in _metrics(folder) for name in row if "/" in name}
        raise DataError(f"the run has no finite {value}; it has {', '.join(sorted(names)) or 'no scores'}")
    ends = [ValidationScores(path).final() for path in _files(folder)]
    if not ends or any(score is None or not math.isfinite(score) for score in ends):
        raise DataError("a job of the fine-tuning has no score on its validation subjects")
    return sum(score for score in ends if score is not None) / len(ends)


def _files(folder: Path) -> list[Path]:
    files = (folder / "validation").glob("*.jsonl")
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _metrics(folder: Path) -> Iterator[Mapping[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = parse_json(line)
        except ValueError:  # being written
            continue
        if isinstance(content, dict):
            yield content
