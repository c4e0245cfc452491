"""Ranks over the tasks of a leaderboard: which contestants are the same, and how sure their order is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.names import across, learning_rates, worded
from ssl3d_benchmarks.leaderboard.report.statistics import network_of, rank_draws, ranks_of

Array = NDArray[Any]

TASKS_FOR_PICTURE = 6
"""Least tasks for a critical-difference picture; below, its test has next to no power."""


@dataclass
class Overall:
    """Ranks over the tasks of one protocol and family.

    Attributes:
        protocol: Protocol of the tasks.
        family: Segmentation, classification, detection or regression.
        boards: Boards, one per task.
        methods: Names of the methods, best average rank first.
        ranks: Rank of every method on every task, (M, T).
        average: Average ranks (M,).
        intervals: Ends of the range of 95 % of the average ranks over the resamples.
        first_share: Share of the resamples in which each is first.
        above: Share of the resamples in which the method of the row is above that of the column, (M, M).
        changes: Share of the resamples in which the order is another.
        tau: Kendall's tau between the order and that of a resample, mean.
        critical: Friedman's p, Nemenyi's critical difference and cliques; None below six tasks.
        left_out: Contestants that are not on every task.
        tasks_left_out: Tasks that have too few of the others' contestants.
    """

    protocol: str
    family: str
    boards: list[Board]
    methods: list[str]
    ranks: Array
    average: Array
    intervals: list[tuple[float, float]]
    first_share: Array
    above: Array
    changes: float
    tau: float
    critical: CriticalDifference | None
    left_out: list[str]
    tasks_left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CriticalDifference:
    """Friedman's test, then Nemenyi's, as in Demšar 2006.

    Attributes:
        p: Friedman's p of the hypothesis that all methods are alike.
        difference: Smallest difference of average ranks that is significant at .05.
        cliques: Methods that cannot be told apart, as positions in the order of average ranks.
    """

    p: float
    difference: float
    cliques: list[tuple[int, int]]


def overall_of(boards: Iterable[Board]) -> list[Overall]:
    """Rank over tasks, once for each protocol and family; a data set and target counts once."""
    every = [_overall(*about, _matched(choices)) for about, choices in _tasks(boards)]
    return [ranks for ranks in every if ranks is not None]


def no_overall(boards: Iterable[Board]) -> list[str]:
    """Say why there are no ranks over the tasks of a protocol and family, a sentence each."""
    lines = []
    for (protocol, family), choices in _tasks(boards):
        if _matched(choices) is not None:
            continue
        firsts = [same[0].table for same in choices]
        tables = [table.title.removesuffix(f" ({table.number})") for table in firsts]
        why = (
            f"{tables[0]} is the only task that was trained with all labels"
            if len(tables) == 1
            else f"no two of the {len(tables)} tasks ({'; '.join(tables)}) have two contestants in common"
        )
        lines.append(f"There are no ranks over tasks for {family} ({protocol}), because {why}.")
    return lines


def _tasks(boards: Iterable[Board]) -> list[tuple[tuple[str, str], list[list[Board]]]]:
    """Group the boards with all labels by protocol and family, then by task."""
    groups: dict[tuple[str, str], dict[tuple[str, ...], list[Board]]] = {}
    for board in boards:
        if not board.few and board.ranked():
            table = board.table
            tasks = groups.setdefault((table.protocol, table.family), {})
            tasks.setdefault((*table.dataset, table.target), []).append(board)
    return [(about, list(tasks.values())) for about, tasks in sorted(groups.items())]


@dataclass(frozen=True)
class _Matched:
    """Which contestants of some tables are the same.

    Attributes:
        boards: Boards, one per task.
        methods: Names and, in the order of the boards, the arms that stand for each.
        left_out: Contestants that are not on every board, in words.
        tasks_left_out: Tables that share less than half of the contestants of the others, by title.
    """

    boards: list[Board]
    methods: list[tuple[str, list[Arm]]]
    left_out: list[str]
    tasks_left_out: list[str]


def _matched(choices: Sequence[Sequence[Board]]) -> _Matched | None:
    """Match the tasks and the contestants that are on all of them; None where there are not two of both.

    A task that would more than halve the contestants is left out instead of them.
    """
    if len(choices) < 2:
        return None
    every = _together(choices)
    boards, tried = every, []
    while len(boards) > 1:
        tried.append((boards, *_methods(boards)))
        without = [[other for other in boards if other is not board] for board in boards]
        # Of tasks that cost as many contestants the one goes that has fewest.
        boards = max(without, key=lambda some: (len(_methods(some)[0]), sum(len(b.ranked()) for b in some)))
    most = 0
    best = None
    for boards, methods, left_out in reversed(tried):
        if len(methods) >= 2 and 2 * len(methods) >= most:
            gone = [board.table.title for board in every if board not in boards]
            best = _Matched(boards, methods, left_out, gone)
        most = max(most, len(methods))
    return best


def _together(choices: Sequence[Sequence[Board]]) -> list[Board]:
    """Choose of each task's tables the one that shares most contestants with the other tasks' tables."""
    names = _identities([board for boards in choices for board in boards])
    known = {
        id(board): {name for arm in board.ranked() for name in (names[id(arm)], across(arm, board.table))}
        for boards in choices
        for board in boards
    }

    def shared(boards: Iterable[Board]) -> tuple[int, int, int]:
        own = [known[id(board)] for board in boards]
        counts = Counter(name for names in own for name in names)
        return len(set.intersection(*own)), sum(n * n for n in counts.values()), sum(map(len, own))

    some: Iterable[tuple[Board, ...]] = itertools.islice(itertools.product(*choices), 5000)
    return list(max(some, key=shared))


def _identities(boards: Sequence[Board]) -> dict[int, Any]:
    """Map the id of an arm to what is the same wherever the same encoder is scored in the same way.

    The same are arms that share weights, or, where a table has other seeds of a run, name and training.
    """
    identities: dict[int, Any] = {}
    by_clue: dict[Any, Any] = {}
    for board in boards:
        taken: set[Any] = set()
        for arm in board.arms:
            about = arm.first.arm
            pool = arm.first.result.contestant.get("pool")
            how = (arm.kind, arm.first.recalibrated, pool, network_of(arm))
            recipe = str(sorted(max((record.recipe for record in arm.records()), key=len).items()))
            clues: list[Any] = [("training", about, recipe)]
            if arm.kind == "pretrained":
                digests = {str(record.result.contestant["digest"]) for record in arm.records()}
                clues += [("weights", *how, digest) for digest in sorted(digests)]
            known = next((by_clue[clue] for clue in clues if clue in by_clue), clues[0])
            if known in taken:  # two names for the same weights in one table: two contestants
                known, clues = clues[0], clues[:1]
            if known in taken:  # trained at two learning rates
                known = (*known, arm.first.rates)
                clues = [known]
            taken.add(known)
            for clue in clues:
                by_clue.setdefault(clue, known)
            identities[id(arm)] = known
    return identities


def _methods(boards: Sequence[Board]) -> tuple[list[tuple[str, list[Arm]]], list[str]]:
    """List the methods that are on all boards, and in words the contestants that are not.

    The same encoder on all of them is one, whatever it was trained on. Of the others, those stand
    together that have the same name, such as a proxy's encoders that were each trained on the task's own
    data.
    """
    identity = _identities(boards)
    by_encoder: dict[Any, dict[int, Arm]] = {}  # at most one a board: `_identities` sees to it
    for number, board in enumerate(boards):
        for arm in board.ranked():
            by_encoder.setdefault(identity[id(arm)], {})[number] = arm
    groups: list[tuple[str, list[Arm]]] = []
    rest: dict[Any, list[tuple[int, Arm]]] = {}
    for key, places in by_encoder.items():
        if len(places) == len(boards):
            chosen = [places[number] for number in range(len(boards))]
            groups.append((across(chosen[0], None), chosen))
        else:
            rest[key] = list(places.items())
    others = [place for places_of in rest.values() for place in places_of]
    called = [across(arm, boards[number].table) for number, arm in others]
    several = Counter((name, number) for name, (number, _) in zip(called, others, strict=True))
    by_name: dict[str, dict[int, list[Arm]]] = {}
    for name, (number, arm) in zip(called, others, strict=True):
        # Two of a kind in one table: only what they were called tells which of them is which elsewhere.
        if any(several[name, n] > 1 for n in range(len(boards))):
            name = f"{name}, {arm.first.result.contestant['name']}"
        by_name.setdefault(name, {}).setdefault(number, []).append(arm)
    used = set()
    for name, by_board in by_name.items():
        if len(by_board) == len(boards) and all(len(arms) == 1 for arms in by_board.values()):
            chosen = [by_board[number][0] for number in range(len(boards))]
            used |= {id(arm) for arm in chosen}
            groups.append((name, chosen))
    left_out = []
    for places_of in rest.values():
        if not any(id(arm) in used for _, arm in places_of):
            arm = places_of[0][1]
            left_out.append((across(arm, None), f"on {len(places_of)} of {len(boards)}", arm))
    same = Counter(name for name, _ in groups)
    named = [
        (name if same[name] == 1 else ", ".join(word for word in (name, *_in_full(arms[0])) if word), arms)
        for name, arms in groups
    ]
    crowded = Counter(name for name, _, _ in left_out)
    absent = [
        f"{', '.join(word for word in (name, *_in_full(arm) * (crowded[name] > 1)) if word)} ({on})"
        for name, on, arm in left_out
    ]
    return named, sorted(absent)


def _in_full(arm: Arm) -> tuple[str, ...]:
    """Return what else tells a contestant from others of its name."""
    return str(arm.first.result.contestant["name"]), learning_rates(arm)


def _overall(protocol: str, family: str, matched: _Matched | None) -> Overall | None:
    if matched is None:
        return None
    boards, left_out = matched.boards, matched.left_out
    names = [name for name, _ in matched.methods]
    ranks, drawn = [], []
    for number, board in enumerate(boards):
        arms = [chosen[number] for _, chosen in matched.methods]
        ranks.append(ranks_of(np.array([[arm.interval.value] for arm in arms]))[:, 0])
        drawn.append(rank_draws(arms, board))
    table = np.stack(ranks, axis=1)
    average = table.mean(axis=1)
    order = np.argsort(average, kind="stable")
    names = _shortened(names, [arms[0].kind != "imagenet" for _, arms in matched.methods])
    names, table, average = [worded(names[k]) for k in order], table[order], average[order]
    means = np.mean([draws[order] for draws in drawn], axis=0)  # (M, R)
    ends = np.quantile(means, [0.025, 0.975], axis=1)
    best = means == means.min(axis=0)
    above = np.mean(means[:, None] < means[None], axis=2) + 0.5 * np.mean(
        means[:, None] == means[None], axis=2
    )
    concordant = [
        np.sign(means[j] - means[i]) * np.sign(average[j] - average[i])
        for i, j in itertools.combinations(range(len(names)), 2)
    ]
    agreeing = np.stack(concordant)
    untied = [average[j] != average[i] for i, j in itertools.combinations(range(len(names)), 2)]
    changes = float(np.mean((agreeing[untied] < 0).any(axis=0))) if any(untied) else 1.0
    return Overall(
        protocol, family, boards, names, table, average,
        [(float(low), float(high)) for low, high in ends.T],
        (best / best.sum(axis=0)).mean(axis=1), above, changes, float(agreeing.mean()),
        critical_difference(table) if len(boards) >= TASKS_FOR_PICTURE else None,
        list(map(worded, left_out)),
        matched.tasks_left_out,
    )  # fmt: skip


def _shortened(names: list[str], ours: Sequence[bool]) -> list[str]:
    """Drop the words that all have that are no conversion, such as the architecture."""
    split = [name.split(", ") for name in names]
    sets = [set(words) for words, own in zip(split, ours, strict=True) if own]
    same = set.intersection(*sets) if len(sets) > 1 else set()
    return [", ".join(word for word in words if word not in same) or ", ".join(words) for words in split]


def critical_difference(ranks: Array) -> CriticalDifference:
    """Test ranks (M, T), best average first, by Friedman, with Nemenyi's critical difference at .05."""
    from scipy.stats import chi2, rankdata, studentized_range

    methods, tasks = ranks.shape
    ranks = rankdata(ranks, axis=0)
    average = ranks.mean(axis=1)
    ties = sum(
        float((counts**3 - counts).sum())
        for counts in (np.unique(column, return_counts=True)[1] for column in ranks.T)
    )
    spread = float(((average - (methods + 1) / 2) ** 2).sum())
    scale = methods * (methods + 1) / 12 / tasks * (1 - ties / (tasks * (methods**3 - methods)))
    p = float(chi2.sf(spread / scale, methods - 1)) if scale > 0 else 1.0
    quantile = float(studentized_range.ppf(0.95, methods, np.inf)) / np.sqrt(2)
    difference = quantile * np.sqrt(methods * (methods + 1) / (6 * tasks))
    order = np.sort(average)
    cliques: list[tuple[int, int]] = []
    for begin in range(methods):
        end = int(np.searchsorted(order, order[begin] + difference, side="right")) - 1
        if end > begin and not (cliques and cliques[-1][1] >= end):
            cliques.append((begin, end))
    return CriticalDifference(p, float(difference), cliques)
