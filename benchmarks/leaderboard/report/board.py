"""Boards: a table of records at one fraction of the labels, and the arms on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ssl3d.api import statistics
from ssl3d_benchmarks.leaderboard.report.records import Read, Table


@dataclass
class Arm:
    """A contestant at one fraction of the labels: its records over seeds and subsets.

    Attributes:
        rows: The records, seeds x subsets.
        kind: Of `leaderboard_records.KINDS`.
        runs: Its main score, resampled.
        interval: Of the main score.
        label: Short, and another for every contestant of the table.
        gain: Over the same network untrained or from scratch.
        over_imagenet: Over the best ImageNet conversion.
        p_holm: Of `gain`, corrected over the table.
        p_imagenet_holm: Of `over_imagenet`, likewise.
        rank: Among the ranked; None for who is not.
        rank_interval: 95 % of the ranks over the resamples.
        first_share: Share of the resamples in which it is first.
        why_unranked: In words, or empty.
        section: `main`, or `labels` for encoders pretrained with labels, which are ranked apart.
    """

    rows: list[list[Read]]
    kind: str
    runs: statistics.Runs
    interval: statistics.Interval
    label: str = ""
    gain: statistics.Difference | None = None
    over_imagenet: statistics.Difference | None = None
    p_holm: float | None = None
    p_imagenet_holm: float | None = None
    rank: float | None = None
    rank_interval: tuple[float, float] | None = None
    first_share: float | None = None
    why_unranked: str = ""
    section: str = "main"
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> Read:
        """Any of its records."""
        return self.rows[0][0]

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self.rows)

    @property
    def subsets(self) -> int:
        """Of the training data, at this fraction."""
        return len(self.rows[0])

    @property
    def measured(self) -> bool:
        """Whether time and memory of its pretraining are known."""
        compute = self.first.pretraining.get("compute") or {}
        seconds = compute.get("seconds") or self.first.pretraining.get("seconds")
        return bool(seconds and compute.get("peak_memory"))

    def records(self) -> list[Read]:
        """All of them."""
        return [one for row in self.rows for one in row]


@dataclass
class Board:
    """A table at one fraction of the labels, with its numbers.

    Attributes:
        table: Where the records come from.
        fraction: Of the training subjects.
        arms: Best first, of all kinds but encoders on the way.
        on_the_way: Encoders saved before pretraining ended.
        detectable: Smallest true difference from scratch that the test set shows with power .8, the median
            over the contestants; None where there is nothing to compare, or too few seeds or subsets.
        missing: Rows that have to be there and are not, in words.
        unlearned: Sentences about every network that is not shown to have learned its task (fine-tuning).
        notes: What was left out, in words.
    """

    table: Table
    fraction: float
    arms: list[Arm]
    on_the_way: list[Arm]
    detectable: float | None = None
    missing: list[str] = field(default_factory=list)
    unlearned: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """For links and file names."""
        return self.table.slug + ("" if self.fraction == 1 else f"-{self.fraction:g}".replace(".", "-"))

    @property
    def few(self) -> bool:
        """Whether a part of the training subjects, or of their slices, was learned from."""
        return self.fraction < 1 or self.table.slices > 0

    @property
    def people(self) -> str:
        """How many training subjects of how many, in words; empty for all of them."""
        train = self.arms[0].first.result.split.get("train", {})
        if self.fraction == 1:
            return ""
        some, of = train.get("subjects"), train.get("of_subjects")
        return f"{some} of {of} training subjects" if of else f"{self.fraction:g} of the training subjects"

    @property
    def amount(self) -> str:
        """What part of the annotation was learned from, in words; empty for all of it."""
        return ", ".join(part for part in (self.table.annotated, self.people) if part)

    def ranked(self, section: str = "main") -> list[Arm]:
        """Who is ranked there, best first."""
        return [arm for arm in self.arms if arm.rank is not None and arm.section == section]

    def of_section(self, section: str) -> list[Arm]:
        """The arms of `main`, with all that is not ranked, or of `labels`."""
        return [arm for arm in self.arms if arm.section == section]

    def of_kind(self, *kinds: str) -> list[Arm]:
        """The arms of some kinds."""
        return [arm for arm in self.arms if arm.kind in kinds]
