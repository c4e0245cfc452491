"""Rows, their runs, and cells as text: what the tables that protocols print have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ssl3d.api import Result, statistics

if TYPE_CHECKING:
    from ssl3d.api import Benchmark


@dataclass(frozen=True)
class Row:
    """A record and its place in the table.

    Attributes:
        kind: Kind of contestant: `encoder`, `untrained` or `trivial`.
        group: Architecture; untrained rows stand beside the encoders of theirs.
        result: Record with the scores.
    """

    kind: str
    group: str
    result: Result

    @property
    def recalibrated(self) -> bool:
        """Whether the norm statistics were taken anew."""
        return bool(self.result.contestant.get("norm_recalibrated"))


@dataclass(frozen=True)
class Line:
    """One contestant at one fraction.

    Attributes:
        rows: Records of the contestant, by seed and subset.
        runs: Main score over subjects, seeds and subsets.
    """

    rows: list[Row]
    runs: statistics.Runs

    @property
    def first(self) -> Row:
        """First of the contestant's records."""
        return self.rows[0]

    @property
    def subsets(self) -> list[int]:
        """Subsets of the training data, the same for all seeds."""
        return sorted({row.result.repeat for row in self.rows})

    @property
    def name(self) -> str:
        """Name of the contestant."""
        return str(self.first.result.contestant["name"])

    def mean(self, score: str) -> float:
        """Average a score over seeds and subsets."""
        return float(np.mean([row.result.scores[score] for row in self.rows]))


def make_line(rows: Sequence[Row], benchmark: Benchmark) -> Line:
    """Resample the main score of a contestant, or of several that differ in the seed of their weights."""
    grid: dict[tuple[int, str], dict[int, Row]] = {}
    for row in rows:  # untrained encoders of a probe have their seeds in their names
        seed = (row.result.seed, str(row.result.contestant["name"]))
        grid.setdefault(seed, {})[row.result.repeat] = row
    kept = same_subsets(grid)
    scores, clusters = [], None
    for of_seed in kept:
        line = []
        for row in of_seed:
            predictions = sorted(
                row.result.predictions, key=lambda p: (p["dataset"], p["subject"], str(p.get("id")))
            )
            clusters, functions = benchmark.score_functions(predictions)
            line.append(functions[benchmark.main])
        scores.append(line)
    assert clusters is not None
    runs = statistics.runs_of(
        scores,
        clusters,
        support=statistics.class_support(kept[0][0].result.predictions),
        bounds=statistics.bounds_of(benchmark.main),
    )
    return Line([row for of_seed in kept for row in of_seed], runs)


T = TypeVar("T")


def same_subsets(grid: Mapping[Any, Mapping[int, T]]) -> list[list[T]]:
    """Return the cells seeds x subsets, with the same subsets of the training data for every seed.

    The subsets kept are those of the seeds that have the most, and of several choices the most frequent;
    seeds with other subsets (a job failed) are left out.
    """
    choices = Counter(tuple(sorted(by_subset)) for by_subset in grid.values()).most_common()
    usual = max(choices, key=lambda item: (len(item[0]), item[1]))[0]
    return [[cells[k] for k in usual] for _, cells in sorted(grid.items()) if tuple(sorted(cells)) == usual]


def difference_of(a: Line, b: Line) -> statistics.Difference:
    """Return the difference between two contestants, paired by subset where these are the same."""
    return statistics.paired_difference(a.runs, b.runs, a.subsets == b.subsets)


def with_interval(score: statistics.Interval | statistics.Difference, text: Callable[[float], str]) -> str:
    """Format a number with its 95 % interval; the number alone where there is none."""
    ends = f" [{text(score.low)}, {text(score.high)}]" if np.isfinite(score.low) else ""
    return text(score.value) + ends


def why_no_interval(lines: Sequence[Line]) -> list[str]:
    """Say why scores of a table have no intervals, a line for all and a line for those at a bound."""
    reasons = [
        statistics.why_no_interval(
            line.runs.support, line.runs.undefined, int(line.first.result.split.get("folds") or 0) < 2
        )
        for line in lines
    ]
    few = [reason for reason in dict.fromkeys(reasons) if reason][:1]
    return few or list(
        dict.fromkeys(statistics.at_bound_note(line.runs.value) for line in lines if line.runs.at_bound)
    )


def detectable(differences: Sequence[statistics.Difference], main: str) -> list[str]:
    """Report the smallest difference that the test set can show, as a line or none."""
    known = [gain for gain in differences if np.isfinite(gain.error) and gain.error > 0]
    smallest = [gain.detectable for gain in known if np.isfinite(gain.detectable)]
    if smallest:
        return [
            f"minimum detectable difference in {main}: {np.median(smallest):.3f} ((t[.975] + t[.8]) x the "
            "standard error of a paired difference; alpha .05, power .8)"
        ]
    return [f"minimum detectable difference in {main}: unknown, too few subjects, seeds or subsets"] * bool(
        known
    )


def number(value: Any) -> str:
    """Format a number for a table."""
    return f"{value:.3f}" if np.isfinite(value) else "-"


def signed(value: float) -> str:
    """Format a difference, with its sign, for a table."""
    return f"{value:+.3f}" if np.isfinite(value) else "-"


def aligned(lines: list[list[str]]) -> list[str]:
    """Align columns of text and draw a line below the first row."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines
    ]
    return (
        [line.rstrip() for line in text[:1]]
        + ["-" * len(text[0].rstrip())]
        + [t.rstrip() for t in text[1:]]
    )
