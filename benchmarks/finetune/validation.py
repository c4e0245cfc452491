"""Scores on the validation subjects in a file of their own, for whoever may not see test scores."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl3d.api import not_written, parse_json


@dataclass(frozen=True)
class ValidationScores:
    """File of a job's validation scores: a line of JSON for each scoring, and a last one for the job.

    A scoring after a stop may stand there twice, with the same score.

    Attributes:
        path: Path of the file.
    """

    path: Path

    def add(self, part: str, lr: float, step: int, score: float | None) -> None:
        """Add the score at a step of the training with a learning rate; None for no number.

        Raises:
            TransientError: The disk is full, or failed.
            UsageError: The file cannot be written.
        """
        self._write({"part": part, "lr": lr, "step": step, "score": score})

    def finish(self, scores: Sequence[float]) -> None:
        """Add the score of the job: the mean over the folds of the scores at the steps chosen.

        Raises:
            TransientError: The disk is full, or failed.
            UsageError: The file cannot be written.
        """
        mean = sum(scores) / len(scores)
        self._write({"finished": True, "score": mean if math.isfinite(mean) else None})

    def final(self) -> float | None:
        """Return the score of the job, NaN where it is no number; None while there is none."""
        lines = [line for line in self.lines() if line.get("finished")]
        if not lines:
            return None
        return math.nan if lines[-1]["score"] is None else float(lines[-1]["score"])

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines; one that was cut short by a kill is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                content = parse_json(line)
            except ValueError:
                continue
            if isinstance(content, dict):
                yield content

    def _write(self, content: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")
        except OSError as error:
            raise not_written(error, f"cannot write {self.path}: {error.strerror}") from error
