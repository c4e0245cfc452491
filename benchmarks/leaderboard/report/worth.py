"""Worth of pretraining in labelled subjects: how many more the network from scratch needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf, isfinite, log

from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.statistics import network_of, reference_of

Curve = Sequence[tuple[float, float]]
"""Numbers of labelled subjects, ascending, with the score that each gives."""


@dataclass(frozen=True)
class Worth:
    """Gain of a contestant at one number of labelled subjects, as labels that it saves.

    Attributes:
        board: Board at that number.
        arm: Contestant.
        scratch: Same network from scratch, on the same board.
        labelled: Number of labelled subjects.
        equal: Number with which the network from scratch has the contestant's score; infinity where it does
            not reach it with any number that was measured, NaN where there is no curve.
        low: The same for the lower end of the gain's interval.
        high: The same for its upper end.
        most: Largest number that the network from scratch was measured with.
    """

    board: Board
    arm: Arm
    scratch: Arm
    labelled: float
    equal: float
    low: float
    high: float
    most: float


def equal_labels(curve: Curve, labelled: float, score: float) -> float:
    """Return the number of labels, from `labelled` on, with which a curve reaches a score.

    Between two points the curve is a straight line over the logarithm of the number.

    Args:
        curve: Points of the network from scratch, one of them at `labelled`.
        labelled: Number of labels to begin at.
        score: Score to reach.

    Returns:
        `labelled` itself where the curve is there already, infinity where it never is.

    Example:
        >>> equal_labels([(4, 0.7), (16, 0.8), (64, 0.85)], 4, 0.75)  # half of the way from 4 to 16
        8.0
        >>> equal_labels([(4, 0.7), (16, 0.8), (64, 0.85)], 4, 0.9)
        inf
    """
    points = sorted(point for point in curve if point[0] >= labelled and isfinite(point[1]))
    if points and points[0][1] >= score:
        return labelled
    for (few, low), (many, high) in pairwise(points):
        if high >= score:
            share = (score - low) / (high - low)
            return round(exp(log(few) + share * (log(many) - log(few))), 9)
    return inf


def labelled_subjects(board: Board) -> float:
    """Return the number of training subjects of a board; 0 where the records have none."""
    train = board.arms[0].first.result.split.get("train", {})
    return float(train.get("subjects") or 0)


def worths(boards: Sequence[Board]) -> list[Worth]:
    """Measure what each pretrained contestant of a table is worth, the fewest labels first."""
    measured: list[Worth] = []
    for board in sorted((b for b in boards if b.few), key=labelled_subjects):
        for arm in board.of_kind("pretrained"):
            scratch = reference_of(arm, board)
            if scratch is None or arm.gain is None or arm.why_unranked or arm.section != "main":
                continue
            curve = [
                (labelled_subjects(other), own.interval.value)
                for other in boards
                for own in other.of_kind("scratch")
                if network_of(own) == network_of(scratch)
            ]
            begin, base = labelled_subjects(board), scratch.interval.value
            equal, low, high = (
                equal_labels(curve, begin, base + gain) if isfinite(gain) else float("nan")
                for gain in (arm.gain.value, arm.gain.low, arm.gain.high)
            )
            most = max(amount for amount, _ in curve)
            measured.append(Worth(board, arm, scratch, begin, equal, low, high, most))
    return measured


def best_of_each(boards: Sequence[Board]) -> list[Worth]:
    """Choose, at each number of labels, the contestant of the highest score."""
    best: dict[float, Worth] = {}
    for worth in worths(boards):
        kept = best.get(worth.labelled)
        if kept is None or worth.arm.interval.value > kept.arm.interval.value:
            best[worth.labelled] = worth
    return list(best.values())


def by_table(boards: Sequence[Board]) -> list[list[Board]]:
    """Group boards by the table that they are of: they differ in the number of labelled subjects."""
    groups: dict[int, list[Board]] = {}
    for board in boards:
        groups.setdefault(id(board.table), []).append(board)
    return list(groups.values())
