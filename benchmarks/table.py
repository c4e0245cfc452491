"""What the tables that protocols print have in common: rows, their runs, and cells as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ssl3d.api import Result, statistics

if TYPE_CHECKING:
    from ssl3d.api import Benchmark


@dataclass(frozen=True)
class Row:
    """A record, and where it stands in the table.

    Attributes:
        kind: `encoder`, `untrained` or `trivial`.
        group: Architecture; untrained rows stand beside the encoders of theirs.
        result: The record.
    """

    kind: str
    group: str
    result: Result

    @property
    def recalibrated(self) -> bool:
        """Whether its norm statistics were taken anew."""
        return bool(self.result.contestant.get("norm_recalibrated"))


@dataclass(frozen=True)
class Line:
    """One contestant at one fraction.

    Attributes:
        rows: Its records, by seed and subset.
        runs: Its main score over subjects, seeds and subsets.
    """

    rows: list[Row]
    runs: statistics.Runs

    @property
    def first(self) -> Row:
        """Any of its records."""
        return self.rows[0]

    @property
    def subsets(self) -> list[int]:
        """Of the training data, the same for all its seeds."""
        return sorted({row.result.repeat for row in self.rows})

    @property
    def name(self) -> str:
        """Of the contestant."""
        return str(self.first.result.contestant["name"])

    def mean(self, score: str) -> float:
        """A score, mean over seeds and subsets."""
        return float(np.mean([row.result.scores[score] for row in self.rows]))


def make_line(rows: Sequence[Row], benchmark: Benchmark) -> Line:
    """Resamples the main score of a contestant, or of several that differ in the seed of their weights."""
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
            clusters, found = benchmark.score_functions(predictions)
            line.append(found[benchmark.main])
        scores.append(line)
    assert clusters is not None
    return Line([row for of_seed in kept for row in of_seed], statistics.runs_of(scores, clusters))


T = TypeVar("T")


def same_subsets(grid: Mapping[Any, Mapping[int, T]]) -> list[list[T]]:
    """Seeds x subsets of the training data, from what there is by seed and by subset.

    The subsets are those that the seeds with the most of them have, of several choices the most usual;
    seeds with others (a job failed) are left out.
    """
    found = Counter(tuple(sorted(by_subset)) for by_subset in grid.values()).most_common()
    usual = max(found, key=lambda item: (len(item[0]), item[1]))[0]
    return [[one[k] for k in usual] for _, one in sorted(grid.items()) if tuple(sorted(one)) == usual]


def difference_of(a: Line, b: Line) -> statistics.Difference:
    """Of two contestants; their subsets are paired where they are the same."""
    return statistics.paired_difference(a.runs, b.runs, a.subsets == b.subsets)


def detectable(found: Sequence[statistics.Difference], main: str) -> list[str]:
    """The smallest difference that the test set shows, the median over comparisons, as a line or none."""
    known = [one for one in found if np.isfinite(one.error) and one.error > 0]
    told = [one.detectable for one in known if np.isfinite(one.detectable)]
    if told:
        return [
            f"minimum detectable difference in {main}: {np.median(told):.3f} ((t[.975] + t[.8]) x the "
            "standard error of a paired difference; alpha .05, power .8)"
        ]
    return [f"minimum detectable difference in {main}: unknown, too few seeds or subsets"] * bool(known)


def number(value: Any) -> str:
    """As a table shows it."""
    return f"{value:.3f}" if np.isfinite(value) else "-"


def signed(value: float) -> str:
    """As a table shows a difference."""
    return f"{value:+.3f}" if np.isfinite(value) else "-"


def aligned(lines: list[list[str]]) -> list[str]:
    """Columns of equal width, a line below the first row."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines
    ]
    return (
        [line.rstrip() for line in text[:1]]
        + ["-" * len(text[0].rstrip())]
        + [t.rstrip() for t in text[1:]]
    )
