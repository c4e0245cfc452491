"""Whether pretraining pays, in sentences made of a leaderboard's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.columns import gain_text, p_text
from ssl3d_benchmarks.leaderboard.report.names import scratch_words
from ssl3d_benchmarks.leaderboard.report.statistics import best_imagenet, reference_of
from ssl3d_benchmarks.leaderboard.report.worth import Worth, best_of_each, by_table
from ssl3d_benchmarks.trivial_rows import TRUE_MASKS, reads_true_masks


def answer(boards: Sequence[Board]) -> list[str]:
    """Say whether pretraining pays on these data, from the numbers, in sentences."""
    lines = _not_learned(boards)
    tried = [board for board in boards if board.of_kind("pretrained")]
    groups: dict[tuple[str, str, bool], list[Board]] = {}
    for board in tried:
        groups.setdefault((board.table.protocol, board.table.family, board.few), []).append(board)
    families = [_Family(*about, members) for about, members in sorted(groups.items())]
    lines += [line for family in families for line in _gains(family)]
    lines += [line for group in by_table(boards) for line in _worth(group)]
    lines += _over_imagenet([board for board in tried if not board.few])
    lines += [line for family in families for line in _gains_with_labels(family)]
    lines += _without_networks(tried)
    return lines if tried else [*lines, "There is no pretrained encoder in these records."]


def _not_learned(boards: Sequence[Board]) -> list[str]:
    """Return where trained networks are not shown to have learned their task: before all that they say."""
    unsure = [
        f"{_where(board)} ({len(board.unlearned)} of {len(board.arms) - len(board.of_kind('trivial'))})"
        for board in boards
        if board.unlearned
    ]
    tables = sum(board.table.task.startswith("finetune-") for board in boards)
    if not unsure:
        return []
    return [
        f"WARNING: on {len(unsure)} of {tables} tables of fine-tuning, networks are not clearly above what "
        f"needs no training, and nothing can be concluded from them: {'; '.join(unsure)}. They were "
        "trained too briefly, the recipe or the data is at fault, or the test set is too small to tell."
    ]


def _worth(boards: Sequence[Board]) -> list[str]:
    """Say, for each number of labelled subjects of a table, what the best pretraining adds and is worth."""
    lines = []
    for worth in best_of_each(boards):
        arm, board = worth.arm, worth.board
        title, metric = board.table.title.partition(":")[0], board.table.main
        start = f"{title}: with {worth.labelled:.0f} labelled subjects,"
        scratch, pretrained = (f"{score.interval.value:.3f}" for score in (worth.scratch, arm))
        p = f", p {words} after Holm" if (words := p_text(arm.p_holm)) else ""
        if not shown(arm):
            lines.append(
                f"{start} no gain is shown: {metric} is {scratch} from scratch and {pretrained} pretrained "
                f"({arm.title}, {gain_text(arm.gain)}{p})."
            )
            continue
        line = (
            f"{start} pretraining ({arm.title}) {'lifts' if _gain(arm) > 0 else 'takes'} {metric} from "
            f"{scratch} to {pretrained} ({gain_text(arm.gain)}{p})"
        )
        if _gain(arm) > 0 and np.isfinite(worth.most) and worth.most > worth.labelled:
            line += f"; from scratch, the same network reaches that with {_labels(worth)}"
        lines.append(f"{line}.")
    return lines


def _labels(worth: Worth) -> str:
    """Write a number of labelled subjects, with its interval, as far as it was measured."""

    def words(amount: float) -> str:
        return f"{amount:.0f}" if np.isfinite(amount) else f"more than {worth.most:.0f}"

    interval = "" if np.isnan(worth.low) else f" [{words(worth.low)}, {words(worth.high)}]"
    return f"{words(worth.equal)}{interval} labelled subjects"


@dataclass(frozen=True)
class _Family:
    """Boards that one sentence speaks of.

    Attributes:
        protocol: Protocol of their tasks.
        name: Family of their tasks.
        few: Whether a part of the labels was learned from.
        boards: Boards with a pretrained encoder.
    """

    protocol: str
    name: str
    few: bool
    boards: list[Board]

    @property
    def head(self) -> str:
        """Beginning of the sentence about the family."""
        return f"{self.name.capitalize()}{' with few labels' * self.few} ({self.protocol})"

    @property
    def reference(self) -> str:
        """Name of what pretraining is compared with."""
        return f"the same network {scratch_words(self.protocol)}"


def _gains(family: _Family) -> list[str]:
    better: list[str] = []
    worse: list[str] = []
    neither: list[Board] = []
    blind: list[str] = []
    for board in family.boards:
        tested = _tested(board, "main")
        up = [arm for arm in tested if shown(arm) and _gain(arm) > 0]
        down = [arm for arm in tested if shown(arm) and _gain(arm) < 0]
        name = _where(board)
        if not tested:
            main = [arm for arm in board.of_kind("pretrained") if arm.section == "main"]
            if main:
                blind.append(f"{name} ({why_untold(board, main[0])})")
            continue
        if up:
            best = gained(max(up, key=_gain))
            better.append(f"{name} ({len(up)} of {len(tested)} encoders, the best is {best})")
        else:
            neither.append(board)
        if down:
            worst = gained(min(down, key=_gain))
            worse.append(f"{name} ({len(down)} of {len(tested)} encoders, the worst is {worst})")
    lines = []
    count = len(better) + len(neither)
    if better:
        lines.append(
            f"{family.head}: yes on {len(better)} of {count} table{'s' * (count > 1)}. A pretrained "
            f"encoder is significantly better than {family.reference} on "
            f"{'; '.join(better)}.{_by_luck(count)}"
        )
    if neither:
        tables = f"any of {len(neither)} tables: " if len(neither) > 1 and not better else ""
        lines.append(f"{family.head}: no gain is shown on {tables}{_listed(neither)}.{_unknown(neither)}")
    if worse:
        lines.append(
            f"{family.head}: pretraining is significantly worse than {family.reference} on "
            f"{'; '.join(worse)}."
        )
    if blind:
        lines.append(f"{family.head}: nothing can be said on {'; '.join(blind)}.")
    return lines


def _listed(boards: Sequence[Board]) -> str:
    """Name boards and the gains that they detect, those of one table title together."""
    by_title: dict[str, list[Board]] = {}
    for board in boards:
        by_title.setdefault(board.table.title.partition(":")[0], []).append(board)
    names = []
    for title, same in by_title.items():
        least = [f"detects gains from {board.detectable:.3f}" if board.detectable else "" for board in same]
        if len(same) == 1 or not all(board.few for board in same):
            names += [
                f"{_where(board)} ({words})" if words else _where(board)
                for board, words in zip(same, least, strict=True)
            ]
        else:
            amounts = [
                f"{board.amount}: {words}" if words else board.amount
                for board, words in zip(same, least, strict=True)
            ]
            names.append(f"{title} ({'; '.join(amounts)})")
    return "; ".join(names)


def _unknown(boards: Sequence[Board]) -> str:
    """Say that a board without a number says nothing of how small a gain it detects."""
    count = sum(not board.detectable for board in boards)
    if not count:
        return ""
    where = "there" if count == len(boards) else "where no number is given"
    return (
        f" There are too few subjects, seeds or subsets to say how small a gain would be detected {where}."
    )


def _by_luck(tables: int) -> str:
    """Say how many tables show a gain by chance: Holm's correction is within a table."""
    if tables < 2:
        return ""
    return f" By chance alone, up to {0.05 * tables:.2g} of {tables} tables would show a gain."


def _gains_with_labels(family: _Family) -> list[str]:
    """Say apart what encoders pretrained with labels gain: it is no gain of self-supervision."""
    tested = [(board, _tested(board, "labels")) for board in family.boards]
    tested = [(board, arms) for board, arms in tested if arms]
    if not tested:
        return []
    better, worse = (
        [
            f"{_where(board)} ({max(some, key=lambda arm: abs(_gain(arm))).title})"
            for board, arms in tested
            for some in [[arm for arm in arms if shown(arm) and sign * _gain(arm) > 0]]
            if some
        ]
        for sign in (1, -1)
    )
    return [
        f"{family.head}: an encoder pretrained with labels, which is ranked apart, is significantly "
        f"better than {family.reference} on {len(better)} of {len(tested)} "
        f"table{'s' * (len(tested) > 1)}{_bracketed(better)} and significantly worse on "
        f"{len(worse)}{_bracketed(worse)}."
    ]


def _tested(board: Board, section: str) -> list[Arm]:
    return [
        arm
        for arm in board.of_kind("pretrained")
        if arm.gain and np.isfinite(arm.gain.low) and not arm.why_unranked and arm.section == section
    ]


def _where(board: Board) -> str:
    """Name a board in a sentence."""
    words = board.table.title.partition(":")[0] + (f", {board.amount}" if board.few else "")
    return words + (f" ({board.table.number})" if board.table.number else "")


def _over_imagenet(boards: Sequence[Board]) -> list[str]:
    compared = [board for board in boards if best_imagenet(board) is not None]
    if not compared:
        none = "These records contain no ImageNet conversion, so pretraining cannot be compared with it."
        return [none] if boards else []
    won, lost = [], []
    for board in compared:
        gains = [
            arm.over_imagenet.value
            for arm in board.of_kind("pretrained")
            if arm.over_imagenet and not arm.why_unranked and arm.section == "main"
            if arm.p_imagenet_holm is not None and arm.p_imagenet_holm < 0.05
        ]
        if any(gain > 0 for gain in gains):
            won.append(board.table.title)
        if any(gain < 0 for gain in gains):
            lost.append(board.table.title)
    return [
        "Compared with the best ImageNet conversion, some pretrained encoder is significantly better on "
        f"{len(won)} of {len(compared)} table{'s' * (len(compared) > 1)}{_bracketed(won)} and some "
        f"pretrained encoder is significantly worse on {len(lost)}{_bracketed(lost)}."
    ]


def _without_networks(boards: Sequence[Board]) -> list[str]:
    """Say where a row without a network is ahead of all networks: they have not learned what is easy."""
    ahead: dict[str, list[str]] = {}
    for board in boards:
        if words := ahead_of_networks(board):
            title = board.table.title.partition(":")[0]
            ahead.setdefault(title, []).append(f"{board.amount}: {words}" if board.few else words)
    if not ahead:
        return []
    where = "; ".join(f"{title} ({'; '.join(words)})" for title, words in ahead.items())
    count = sum(map(len, ahead.values()))
    return [
        f"A row without a network is better than every network on {count} of {len(boards)} "
        f"table{'s' * (len(boards) > 1)}: {where}. Differences between networks say little about "
        "pretraining there. Train the networks longer, or give them what the row uses."
    ]


def ahead_of_networks(board: Board) -> str:
    """Name the best row without a network, with both scores, where it is above every network."""
    networks = [arm for arm in board.arms if arm.kind != "trivial" and np.isfinite(arm.interval.value)]
    rows = [arm for arm in board.of_kind("trivial") if np.isfinite(arm.interval.value)]
    if not networks or not rows:
        return ""
    best, row = (max(some, key=lambda arm: arm.interval.value) for some in (networks, rows))
    if row.interval.value <= best.interval.value:
        return ""
    masks = f", {TRUE_MASKS}" * reads_true_masks(row.first.result.contestant)
    return f"{row.title} {row.interval.value:.3f}{masks}, best network {best.interval.value:.3f}"


def _bracketed(names: Sequence[str]) -> str:
    return f" ({'; '.join(names)})" if names else ""


def gained(arm: Arm) -> str:
    """Return a contestant's title and its gain with the interval."""
    return f"{arm.title} {gain_text(arm.gain)}".strip()


def shown(arm: Arm) -> bool:
    """Return whether a gain is significant after the correction over its table."""
    return arm.p_holm is not None and arm.p_holm < 0.05


def _gain(arm: Arm) -> float:
    return arm.gain.value if arm.gain else float("nan")


def why_untold(board: Board, arm: Arm) -> str:
    """Say why nothing can be told of a contestant's gain on a board; an empty string where it can."""
    reference = reference_of(arm, board)
    if arm.why_unranked:
        return arm.why_unranked
    if arm.gain is None or reference is None:
        return f"there is no row of the same network {scratch_words(board.table.protocol)}"
    ended = tuple(f"{row.title} ended at" for row in (arm, reference))
    if any(words.startswith(ended) for words in board.unlearned):
        return "a network is not shown to have learned its task"
    if not np.isfinite(arm.gain.low):
        if board.why_no_interval:
            return "a class has too few test subjects"
        if arm.runs.at_bound and reference.runs.at_bound:
            return "both scores are at their bound"
        return "one untrained seed tells no interval"
    return ""
