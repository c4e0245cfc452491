"""Boards: a table of records at one fraction of the labels, and the arms on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ssl3d.api import statistics
from ssl3d_benchmarks.leaderboard.report.records import ReadRecord, Table

NO_NETWORK = "no network"
"""Why a row without a network is not ranked: not a fault, unlike any other reason."""


@dataclass
class Arm:
    """A contestant at one fraction of the labels: its records over seeds and subsets.

    Attributes:
        rows: Records, seeds x subsets.
        kind: One of `records.KINDS`.
        runs: Resamples of the main score.
        interval: Main score with its interval.
        label: Short name, different for every contestant of the table.
        title: The same with the names that people use.
        gain: Difference from the same network untrained or from scratch.
        over_imagenet: Difference from the best ImageNet conversion.
        p_holm: p of `gain`, corrected over the table.
        p_imagenet_holm: p of `over_imagenet`, corrected over the table.
        rank: Rank among the ranked contestants; None for those that are not ranked.
        rank_interval: Ends of the range of 95 % of the ranks over the resamples.
        first_share: Share of the resamples in which the contestant is first.
        why_unranked: Reason in words for having no rank, or an empty string.
        section: `main`, or `labels` for encoders pretrained with labels, which are ranked apart.
        scores: Names of the scores that its protocol computes.
        flags: Counts `seen_test_subjects` and `seen_test_volumes`, and whether it `saw_labels`.
    """

    rows: list[list[ReadRecord]]
    kind: str
    runs: statistics.Runs
    interval: statistics.Interval
    label: str = ""
    title: str = ""
    gain: statistics.Difference | None = None
    over_imagenet: statistics.Difference | None = None
    p_holm: float | None = None
    p_imagenet_holm: float | None = None
    rank: float | None = None
    rank_interval: tuple[float, float] | None = None
    first_share: float | None = None
    why_unranked: str = ""
    section: str = "main"
    scores: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> ReadRecord:
        """First record, which stands for what all of them share."""
        return self.rows[0][0]

    @property
    def seeds(self) -> int:
        """Number of seeds that were scored."""
        return len(self.rows)

    @property
    def subsets(self) -> int:
        """Number of subsets of the training subjects at this fraction."""
        return len(self.rows[0])

    @property
    def measured(self) -> bool:
        """Whether time and memory of its pretraining are known, for every seed."""
        return all(record.seconds and record.peak_memory for record in self.encoders())

    @property
    def fair(self) -> bool:
        """Whether it may be drawn beside others: not where pretraining saw test subjects."""
        return self.why_unranked in ("", NO_NETWORK)

    def encoders(self) -> list[ReadRecord]:
        """Return one record of each of its encoders, which are its seeds of pretraining."""
        return list({record.result.contestant["digest"]: record for record in self.records()}.values())

    def records(self) -> list[ReadRecord]:
        """Return the records of all seeds and subsets."""
        return [record for row in self.rows for record in row]


@dataclass
class Board:
    """A table of records at one fraction of the labels, with its numbers.

    Attributes:
        table: Table that the records come from.
        fraction: Share of the training subjects that was learned from.
        arms: Contestants of all kinds but encoders on the way, best first.
        on_the_way: Encoders saved before pretraining ended.
        detectable: Smallest true difference from scratch that the test set shows with power .8, the median
            over the contestants; None where there is nothing to compare, or too few subjects, seeds
            or subsets.
        missing: Rows that have to be there and are not, in words.
        unlearned: Sentences about every network that is not shown to have learned its task (fine-tuning).
        notes: What a reader has to know about the table, in words.
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
        """Name for links and files."""
        return self.table.slug + ("" if self.fraction == 1 else f"-{self.fraction:g}".replace(".", "-"))

    @property
    def why_no_interval(self) -> str:
        """Sentence that says why the scores have no intervals; empty where they have."""
        for arm in self.arms:
            folds = int(arm.first.result.split.get("folds") or 0)
            if reason := statistics.why_no_interval(arm.runs.support, arm.runs.undefined, folds < 2):
                return reason
        return ""

    @property
    def few(self) -> bool:
        """Whether a part of the training subjects, or of their slices, was learned from."""
        return self.fraction < 1 or self.table.slices > 0

    @property
    def people(self) -> str:
        """Number of training subjects in words; empty for all of them."""
        if self.fraction == 1:
            return ""
        train = self.arms[0].first.result.split.get("train", {})
        some, total = train.get("subjects"), train.get("of_subjects")
        return (
            f"{some} of {total} training subjects"
            if total
            else f"{self.fraction:g} of the training subjects"
        )

    @property
    def amount(self) -> str:
        """Part of the annotation that was learned from, in words; empty for all of it."""
        return ", ".join(part for part in (self.table.annotated, self.people) if part)

    def ranked(self, section: str = "main") -> list[Arm]:
        """Return the contestants that are ranked in a section, best first."""
        return [arm for arm in self.arms if arm.rank is not None and arm.section == section]

    def of_section(self, section: str) -> list[Arm]:
        """Return the contestants of `main`, with all that are not ranked, or of `labels`."""
        return [arm for arm in self.arms if arm.section == section]

    def of_kind(self, *kinds: str) -> list[Arm]:
        """Return the contestants of some kinds."""
        return [arm for arm in self.arms if arm.kind in kinds]
