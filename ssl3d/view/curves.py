"""Curves of a run from its log, however long: means over equal parts of the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ssl3d.json_files import parse_json
from ssl3d.pages import charts, elements

POINTS = 120
"""Most points of a curve."""
NAN = float("nan")


@dataclass
class Curve:
    """Values of one metric over the steps, joined in pairs whenever there are too many.

    Attributes:
        steps: Mean step of each point.
        values: Mean value of each point.
    """

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    _width: int = 1
    _waiting: list[tuple[float, float]] = field(default_factory=list)

    def add(self, step: float, value: float) -> None:
        """Add the value of a step."""
        self._waiting.append((step, value))
        if len(self._waiting) < self._width:
            return
        self._flush()
        if len(self.steps) >= 2 * POINTS:
            self.steps = [sum(pair) / 2 for pair in zip(self.steps[::2], self.steps[1::2], strict=True)]
            self.values = [sum(pair) / 2 for pair in zip(self.values[::2], self.values[1::2], strict=True)]
            self._width *= 2

    def _flush(self) -> None:
        count = len(self._waiting)
        self.steps.append(sum(step for step, _ in self._waiting) / count)
        self.values.append(sum(value for _, value in self._waiting) / count)
        self._waiting = []

    def is_constant(self) -> bool:
        """Return whether every point has the same value."""
        return len({value for _, value, *_ in self.points()}) == 1

    def points(self) -> list[charts.Point]:
        """Return the points of the curve, as charts take them."""
        if self._waiting:
            self._flush()
        return [(step, value, NAN, NAN) for step, value in zip(self.steps, self.values, strict=True)]


def read_curves(log: Path) -> tuple[dict[str, Curve], int]:
    """Read the curves of a `metrics.jsonl` and the last step, line by line.

    A line that was cut by a kill ends nothing; it is left out.
    """
    curves: dict[str, Curve] = {}
    last = 0
    if not log.is_file():
        return curves, last
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = parse_json(line)
                step = int(record["step"])
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            last = max(last, step)
            for name, value in record.items():
                plain = isinstance(value, int | float) and not isinstance(value, bool)
                if name != "step" and plain and math.isfinite(value):
                    curves.setdefault(str(name), Curve()).add(step, float(value))
    return curves, last


def chart(title: str, names: Mapping[str, Curve], axis: str) -> str:
    """Draw curves in one chart; an empty string where there are none.

    Args:
        title: Title and caption of the chart.
        names: Curves by the names beside them.
        axis: Name of the axis of values.
    """
    curves = [charts.Line(name, curve.points(), "plain") for name, curve in names.items()]
    curves = [curve for curve in curves if len(curve.points) > 1]
    return elements.figure(charts.lines(curves, "steps", axis, title), f"{title}.") if curves else ""
