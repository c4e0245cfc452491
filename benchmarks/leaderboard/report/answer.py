"""Whether pretraining pays, in sentences made of a leaderboard's numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.names import scratch_words
from ssl3d_benchmarks.leaderboard.report.statistics import best_imagenet


def answer(boards: Sequence[Board]) -> list[str]:
    """Whether pretraining pays on these data, from the numbers, in sentences."""
    lines = _not_learned(boards)
    tried = [board for board in boards if board.of_kind("pretrained")]
    groups: dict[tuple[str, str, bool], list[Board]] = {}
    for board in tried:
        groups.setdefault((board.table.protocol, board.table.family, board.few), []).append(board)
    for about, members in sorted(groups.items()):
        lines += _gains(*about, members)
    lines += _over_imagenet([board for board in tried if not board.few])
    for about, members in sorted(groups.items()):
        lines += _gains_with_labels(*about, members)
    lines += _without_networks(tried)
    return lines if tried else [*lines, "There is no pretrained encoder in these records."]


def _not_learned(boards: Sequence[Board]) -> list[str]:
    """Return where trained networks are not shown to have learned their task: before all that they say."""
    told = [
        f"{_where(board)} ({len(board.unlearned)} of {len(board.arms) - len(board.of_kind('trivial'))})"
        for board in boards
        if board.unlearned
    ]
    tables = sum(board.table.task.startswith("finetune-") for board in boards)
    if not told:
        return []
    return [
        f"WARNING: on {len(told)} of {tables} tables of fine-tuning, networks are not clearly above what "
        f"needs no training, and nothing can be concluded from them: {'; '.join(told)}. The recipe or the "
        "data is at fault, or the test set is too small to tell."
    ]


def _gains(protocol: str, family: str, few: bool, boards: Sequence[Board]) -> list[str]:
    lines: list[str] = []
    better: list[str] = []
    worse: list[str] = []
    neither: list[Board] = []
    blind: list[str] = []
    for board in boards:
        tested = _tested(board, "main")
        up = [arm for arm in tested if _shown(arm) and _gain(arm) > 0]
        down = [arm for arm in tested if _shown(arm) and _gain(arm) < 0]
        name = _where(board)
        if not tested:
            if any(arm.section == "main" for arm in board.of_kind("pretrained")):
                blind.append(name)
            continue
        if up:
            best = max(up, key=_gain)
            better.append(f"{name} ({len(up)} of {len(tested)}, {_gained(best)})")
        else:
            neither.append(board)
        if down:
            worst = min(down, key=_gain)
            worse.append(f"{name} ({len(down)} of {len(tested)}, {_gained(worst)})")
    words = scratch_words(protocol)
    head = f"{family.capitalize()}{' with few labels' * few} ({protocol})"
    count = len(better) + len(neither)
    if better:
        lines.append(
            f"{head}: yes on {len(better)} of {count} tables: a pretrained encoder beats the same network "
            f"{words} beyond chance on {'; '.join(better)}.{_by_luck(count)}"
        )
        if neither:
            lines.append(f"{head}: no gain could be shown on {_listed(neither)}.{_unknown(neither)}")
    elif count:
        tables = f"any of {count} tables: " if count > 1 else ""
        lines.append(f"{head}: no gain is shown on {tables}{_listed(neither)}.{_unknown(neither)}")
    if worse:
        lines.append(f"{head}: pretraining made it worse on {'; '.join(worse)}.")
    if blind:
        lines.append(
            f"{head}: nothing can be said on {'; '.join(blind)}: the row {words} is missing, "
            "or pretraining saw test subjects."
        )
    return lines


def _listed(boards: Sequence[Board]) -> str:
    """Boards and what they could show, those of one table title together."""
    by_title: dict[str, list[Board]] = {}
    for board in boards:
        by_title.setdefault(board.table.title.partition(":")[0], []).append(board)
    told = []
    for title, same in by_title.items():
        least = [f", which could show {one.detectable:.3f}" if one.detectable else "" for one in same]
        if len(same) == 1 or not all(one.few for one in same):
            told += [f"{_where(one)}{words}" for one, words in zip(same, least, strict=True)]
        else:
            amounts = [f"{one.amount}{words}" for one, words in zip(same, least, strict=True)]
            told.append(f"{title} ({'; '.join(amounts)})")
    return "; ".join(told)


def _unknown(boards: Sequence[Board]) -> str:
    """That a board without a number says nothing of how much it could have shown."""
    count = sum(not board.detectable for board in boards)
    if not count:
        return ""
    where = "there" if count == len(boards) else "where no number stands"
    return f" Subjects, seeds or subsets are too few to say what could be shown {where}."


def _by_luck(tables: int) -> str:
    """Holm's correction is within a table: among many tables, some find something in nothing."""
    return f" With nothing to find, up to {0.05 * tables:.2g} of {tables} would." if tables > 1 else ""


def _gains_with_labels(protocol: str, family: str, few: bool, boards: Sequence[Board]) -> list[str]:
    """Encoders pretrained with labels have a sentence of their own: it is no gain of self-supervision."""
    tested = [(board, _tested(board, "labels")) for board in boards]
    tested = [(board, arms) for board, arms in tested if arms]
    if not tested:
        return []
    better, worse = (
        [
            f"{_where(board)} ({max(some, key=lambda arm: abs(_gain(arm))).label})"
            for board, arms in tested
            for some in [[arm for arm in arms if _shown(arm) and sign * _gain(arm) > 0]]
            if some
        ]
        for sign in (1, -1)
    )
    found = (
        f"beats the same network {scratch_words(protocol)} beyond chance on {len(better)} of {len(tested)}"
    )
    return [
        f"{family.capitalize()}{' with few labels' * few} ({protocol}), pretrained with labels, ranked "
        f"apart: an encoder {found} tables{' (' + '; '.join(better) + ')' if better else ''}, is worse on "
        f"{len(worse)}{' (' + '; '.join(worse) + ')' if worse else ''}."
    ]


def _tested(board: Board, section: str) -> list[Arm]:
    return [
        arm
        for arm in board.of_kind("pretrained")
        if arm.gain and not arm.why_unranked and arm.section == section
    ]


def _where(board: Board) -> str:
    """A board in a sentence."""
    words = board.table.title.partition(":")[0] + (f", {board.amount}" if board.few else "")
    return words + (f" ({board.table.number})" if board.table.number else "")


def _over_imagenet(boards: Sequence[Board]) -> list[str]:
    compared = [board for board in boards if best_imagenet(board) is not None]
    if not compared:
        return ["Nothing is said of ImageNet: no record is of a converted network."] if boards else []
    won, lost = [], []
    for board in compared:
        arms = [
            arm
            for arm in board.of_kind("pretrained")
            if arm.over_imagenet and not arm.why_unranked and arm.section == "main"
        ]
        shown = [arm for arm in arms if arm.p_imagenet_holm is not None and arm.p_imagenet_holm < 0.05]
        title = board.table.title
        if any(arm.over_imagenet and arm.over_imagenet.value > 0 for arm in shown):
            won.append(title)
        if any(arm.over_imagenet and arm.over_imagenet.value < 0 for arm in shown):
            lost.append(title)
    return [
        f"Against the best ImageNet conversion: a pretrained encoder is ahead beyond chance on "
        f"{len(won)} of "
        f"{len(compared)} tables{' (' + '; '.join(won) + ')' if won else ''}, one is behind on {len(lost)}"
        f"{' (' + '; '.join(lost) + ')' if lost else ''}."
    ]


def _without_networks(boards: Sequence[Board]) -> list[str]:
    """Where a row without a network is ahead of all networks: they have not learned what is easy."""
    told: dict[str, list[str]] = {}
    for board in boards:
        networks = [arm for arm in board.arms if arm.kind != "trivial" and np.isfinite(arm.interval.value)]
        rows = [arm for arm in board.of_kind("trivial") if np.isfinite(arm.interval.value)]
        if not networks or not rows:
            continue
        best, row = (max(some, key=lambda arm: arm.interval.value) for some in (networks, rows))
        if row.interval.value > best.interval.value:
            words = f"{row.label} {row.interval.value:.3f}, the best network {best.interval.value:.3f}"
            title = board.table.title.partition(":")[0]
            told.setdefault(title, []).append(f"{board.amount}: {words}" if board.few else words)
    if not told:
        return []
    where = "; ".join(f"{title} ({'; '.join(words)})" for title, words in told.items())
    count = sum(map(len, told.values()))
    return [
        f"A row without a network is ahead of every network on {count} of {len(boards)} tables: {where}. "
        "What separates networks there says little of what pretraining is worth: train them longer, or "
        "take what the row takes."
    ]


def _gained(arm: Arm) -> str:
    found = arm.gain
    return f"{arm.label} {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]" if found else arm.label


def _shown(arm: Arm) -> bool:
    return arm.p_holm is not None and arm.p_holm < 0.05


def _gain(arm: Arm) -> float:
    return arm.gain.value if arm.gain else float("nan")
