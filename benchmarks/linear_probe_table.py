"""The table of a linear probe: scores with intervals, the difference from untrained, what is detectable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import Result, statistics
from ssl3d_benchmarks.task import LEAK_HELP

if TYPE_CHECKING:
    from ssl3d.api import Benchmark

Array = NDArray[Any]


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
class Arm:
    """One contestant at one fraction: its records over the repeats, as resampled main scores.

    Attributes:
        rows: One per repeat.
        drawn: Main score on every bootstrap resample, mean over the repeats (R,).
        value: Main score, mean over the repeats.
        clusters: Subject of every row of the weights.
    """

    rows: list[Row]
    drawn: Array
    value: float
    clusters: Array

    @property
    def first(self) -> Row:
        """Of the repeats."""
        return self.rows[0]

    @property
    def name(self) -> str:
        """Of the contestant."""
        return str(self.first.result.contestant["name"])

    def mean(self, score: str) -> float:
        """A score, mean over the repeats."""
        return float(np.mean([row.result.scores[score] for row in self.rows]))


def make_arm(rows: list[Row], benchmark: Benchmark) -> Arm:
    """Resamples the main score of a contestant's records; the same weights for every contestant."""
    total: Array | None = None
    values = []
    for row in rows:
        ordered = sorted(
            row.result.predictions, key=lambda p: (p["dataset"], p["subject"], str(p.get("id")))
        )
        clusters, found = benchmark.score_functions(ordered)
        statistic = found[benchmark.main]
        drawn = statistics.resample(statistic, clusters)
        values.append(float(statistic(np.ones((1, len(clusters))))[0]))
        total = drawn if total is None else total + drawn
    assert total is not None
    return Arm(rows, total / len(rows), float(np.mean(values)), clusters)


def over_untrained(arm: Arm, untrained: Sequence[Arm]) -> statistics.Interval:
    """Difference from the mean untrained encoder: subjects and untrained seeds resampled together."""
    seeds = np.stack([one.drawn for one in untrained])  # (S, R)
    rng = np.random.default_rng(0)
    picks = rng.integers(len(seeds), size=(len(seeds), seeds.shape[1]))
    reference = np.take_along_axis(seeds, picks, axis=0).mean(axis=0)
    value = arm.value - float(np.mean([one.value for one in untrained]))
    return statistics.summarise(value, arm.drawn - reference, arm.clusters, None)


def format_table(rows: Sequence[Row], benchmark: Benchmark, how: str) -> str:
    """The table as text, one block per fraction, with its notes."""
    fractions = sorted({row.result.fraction for row in rows}, reverse=True)
    blocks = [_block([row for row in rows if row.result.fraction == f], benchmark, how) for f in fractions]
    return "\n\n".join(blocks)


def _block(rows: list[Row], benchmark: Benchmark, how: str) -> str:
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(str(row.result.contestant["name"]), []).append(row)
    made = [make_arm(group, benchmark) for group in arms.values()]
    result = rows[0].result
    others = [name for name in result.scores if name != benchmark.main]
    reference: dict[tuple[str, bool], list[Arm]] = {}
    for arm in made:
        if arm.first.kind == "untrained":
            reference.setdefault((arm.first.group, arm.first.recalibrated), []).append(arm)
    lines = [["contestant", f"{benchmark.main} [95 %]", *others, "over untrained [95 %]", ""]]
    errors = []
    flagged = False
    for arm in made:
        if arm.first.kind == "untrained":
            continue
        beside = reference.get((arm.first.group, arm.first.recalibrated), [])
        difference = ""
        if beside and arm.first.kind == "encoder":
            gain = over_untrained(arm, beside)
            errors.append(gain.error)
            difference = f"{signed(gain.value)} [{signed(gain.low)}, {signed(gain.high)}]"
        notes = _notes(arm)
        flagged = flagged or "saw" in notes
        lines.append([arm.name, _main(arm), *_others(arm, others), difference, notes])
    at = 1 + sum(arm.first.kind == "encoder" for arm in made)
    inserted = []
    for (group, again), seeds in reference.items():
        values = [arm.value for arm in seeds]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        means = [number(np.mean([arm.mean(name) for arm in seeds])) for name in others]
        title = group + (", norm recalibrated" if again else "")
        counted = f"{len(seeds)} untrained seeds, mean{' ± sd' if spread else ''}"
        inserted.append([title, f"{number(np.mean(values))}{spread}", *means, "", counted])
        for arm in seeds:
            seed = arm.first.result.contestant["weights_seed"]
            inserted.append([f"  seed {seed}", _main(arm), *_others(arm, others), "", _notes(arm)])
    lines[at:at] = inserted
    if not errors:  # no encoder over untrained ones: any two rows
        pairs = [a.drawn - b.drawn for k, a in enumerate(made) for b in made[k + 1 :]]
        errors = [float(np.nanstd(pair, ddof=1)) for pair in pairs]
    tested = result.split["test"]
    train = result.split["train"]
    repeats = max(len(arm.rows) for arm in made)
    subset = "" if result.fraction == 1 else f" ({result.fraction:g}), mean of {repeats} nested subsets"
    head = (
        f"{result.task} v{result.version} on {', '.join(result.dataset)}: {train['subjects']} of "
        f"{train['of_subjects']} training subjects{subset}; test {tested['subjects']} subjects, "
        f"{tested['volumes']} volumes; {how}"
    )
    text = [head, *aligned(lines)]
    if any(np.isfinite(errors)):
        error = float(np.nanmedian(errors))
        freedom = tested["subjects"] - 1
        factor = statistics.minimum_detectable_difference(1.0, freedom=freedom)
        text.append(
            f"minimum detectable difference in {benchmark.main}: {factor * error:.3f} ({factor:.2f} x "
            f"{error:.4f}, the standard error of a paired difference over the test subjects; alpha .05, "
            "power .8)"
        )
    text.append(
        "intervals: 95 %, bootstrap over test subjects (BCa, 2000 resamples); differences are paired"
    )
    if flagged:
        text.append(f"not ranked: pretraining saw subjects of the test part; {LEAK_HELP}")
    return "\n".join(text)


def _main(arm: Arm) -> str:
    if len(arm.rows) == 1:
        low, high = arm.first.result.intervals[arm.first.result.main]
    else:
        found = statistics.summarise(arm.value, arm.drawn, arm.clusters, None)
        low, high = found.low, found.high
    spread = ""
    if len(arm.rows) > 1:
        spread = f" ± {np.std([row.result.scores[row.result.main] for row in arm.rows], ddof=1):.3f}"
    return f"{number(arm.value)} [{number(low)}, {number(high)}]{spread}"


def _others(arm: Arm, names: Sequence[str]) -> list[str]:
    return [number(arm.mean(name)) for name in names]


def _notes(arm: Arm) -> str:
    flags = arm.first.result.flags
    notes = []
    if flags.get("seen_test_subjects"):
        notes.append(f"saw {flags['seen_test_subjects']} test subjects: not ranked")
    if arm.first.result.contestant.get("mask_classes"):
        notes.append("from the true masks")
    if flags.get("saw_labels"):
        notes.append("pretrained with labels")
    return "; ".join(notes)


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
