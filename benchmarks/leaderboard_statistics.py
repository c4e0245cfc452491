"""The numbers of a leaderboard: scores, paired differences, ranks, and how sure each of them is."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import statistics
from ssl3d_benchmarks.leaderboard_records import Read, Table, contestants_of, score_functions
from ssl3d_benchmarks.shape_features import TRIVIAL

Array = NDArray[Any]

TASKS_FOR_PICTURE = 6
"""Least tasks for a critical-difference picture; below, its test has next to no power."""


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
        notes: What was left out, in words.
    """

    table: Table
    fraction: float
    arms: list[Arm]
    on_the_way: list[Arm]
    detectable: float | None = None
    missing: list[str] = field(default_factory=list)
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


def boards_of(table: Table, resamples: int = statistics.RESAMPLES) -> list[Board]:
    """The boards of a table, the largest fraction first."""
    boards: list[Board] = []
    for fraction in sorted({one.result.fraction for one in table.rows}, reverse=True):
        rows = [one for one in table.rows if one.result.fraction == fraction]
        notes: list[str] = []
        arms = []
        for group in contestants_of(rows):
            grid = _grid(group, notes)
            arms.append(_arm(grid, table, resamples))
        on_the_way = [arm for arm in arms if arm.first.share is not None]
        arms = [arm for arm in arms if arm.first.share is None]
        if not arms:
            continue
        _label(arms, table)
        _label(on_the_way, table)
        board = Board(table, fraction, arms, on_the_way, notes=notes)
        _flag(board)
        _differences(board)
        _rank(board)
        board.arms.sort(key=lambda arm: -arm.interval.value if np.isfinite(arm.interval.value) else np.inf)
        _missing(board)
        boards.append(board)
    return boards


def _grid(group: Sequence[Read], notes: list[str]) -> list[list[Read]]:
    """Records as seeds x subsets; seeds that lack a subset are left out, which is noted."""
    grid: dict[tuple[Any, ...], dict[int, Read]] = {}
    for one in group:
        who = one.result.contestant
        seed = (one.result.seed, str(who["name"]), who["digest"])
        if one.kind == "scratch":  # the same random weights, scored twice, are one seed
            seed = (one.result.seed, str(who.get("weights_seed")), "")
        grid.setdefault(seed, {}).setdefault(one.result.repeat, one)
    most = Counter(tuple(sorted(found)) for found in grid.values()).most_common()
    usual = max(most, key=lambda item: (len(item[0]), item[1]))[0]
    kept = [[found[k] for k in usual] for _, found in sorted(grid.items()) if tuple(sorted(found)) == usual]
    if len(kept) < len(grid):
        name = group[0].result.contestant["name"]
        notes.append(
            f"{name}: {len(grid) - len(kept)} of {len(grid)} seeds lack subsets of the training data "
            "and are left out of its mean"
        )
    return kept


def _arm(grid: list[list[Read]], table: Table, resamples: int) -> Arm:
    scores = []
    clusters: Array = np.zeros(0)
    for row in grid:
        line = []
        for one in row:
            clusters, found = score_functions(one.result, one.ordered())
            line.append(found[table.main])
        scores.append(line)
    # The same people in two tasks are the same draw, other people are another.
    runs = statistics.runs_of(scores, clusters, resamples, ("leaderboard", *table.dataset))
    return Arm(grid, grid[0][0].kind, runs, statistics.nested_interval(runs))


# Names --------------------------------------------------------------------------------------------


def _label(arms: Sequence[Arm], table: Table) -> None:
    """Gives every arm the shortest name that no other has."""
    facets: list[Callable[[Arm], str]] = [
        _method,
        lambda arm: _at(arm),
        lambda arm: _relation(arm, table),
        lambda arm: "norm recalibrated" if arm.first.recalibrated else "",
        lambda arm: str(arm.first.result.contestant.get("group", "")).removeprefix("scratch:"),
        lambda arm: str(arm.first.result.contestant.get("pool") or ""),
        lambda arm: _words_of(arm, "init"),
        lambda arm: _words_of(arm, "batch_size"),
        lambda arm: _words_of(arm, "lr"),
        lambda arm: _words_of(arm, "optimizer"),
        lambda arm: arm.first.stem,
        lambda arm: str(arm.first.result.contestant["name"]).partition(",")[0],
        lambda arm: str(arm.first.result.contestant["digest"])[:8],
    ]
    names = [[facets[0](arm)] for arm in arms]
    for facet in facets[1:]:
        counts = Counter(map(tuple, names))
        crowded = [k for k, name in enumerate(names) if counts[tuple(name)] > 1]
        groups: dict[tuple[str, ...], set[str]] = {}
        for k in crowded:
            groups.setdefault(tuple(names[k]), set()).add(facet(arms[k]))
        said = {}
        for k in crowded:
            words = facet(arms[k])
            if len(groups[tuple(names[k])]) > 1 and words and words not in names[k]:
                said[k] = words
        for k, words in said.items():
            names[k].append(words)
    for arm, name in zip(arms, names, strict=True):
        arm.label = ", ".join(name)


def _method(arm: Arm) -> str:
    who = arm.first
    if who.kind == "pretrained":
        words = " + ".join(who.proxies) or who.stem
        init = str((who.pretraining.get("init") or {}).get("from", ""))
        return f"{words} after ImageNet" if init.startswith("imagenet:") else words
    if who.kind == "imagenet":
        name = str(who.result.contestant["name"])
        if not name.startswith("imagenet:"):
            return who.stem  # a name that somebody chose
        return "ImageNet " + re.sub(r":weights=[^:]*", "", name.removeprefix("imagenet:"))
    if who.kind == "scratch":
        return scratch_words(who.result.task)
    return str(who.result.contestant["name"])


def _at(arm: Arm) -> str:
    return "" if arm.first.share is None else f"at {arm.first.share} %"


def _relation(arm: Arm, table: Table) -> str:
    if arm.kind != "pretrained":
        return ""
    names = set(_trained_on(arm))
    if not names:
        return ""
    if names == set(table.dataset):
        return "own data"
    return "on " + " + ".join(sorted(names))


def _words_of(arm: Arm, what: str) -> str:
    """A part of the recipe of pretraining in words; empty where the records do not say."""
    recipe: Mapping[str, Any] = next((one.recipe for one in arm.records() if one.recipe), {})
    found = recipe.get(what)
    if not found:
        return ""
    if what == "init":
        return f"after {found['from']}"
    return {"batch_size": "batch ", "lr": "rate "}.get(what, "") + str(found)


def _trained_on(arm: Arm) -> list[str]:
    return list((arm.first.pretraining.get("data") or {}).get("datasets") or ())


def _across(arm: Arm, table: Table | None) -> str:
    """What it is called over tasks; without a table, so that it holds on any."""
    group = str(arm.first.result.contestant.get("group", "")).removeprefix("scratch:")
    names = sorted(set(_trained_on(arm))) if arm.kind == "pretrained" else []
    on = "on " + " + ".join(names) if names else ""
    words = [_method(arm), on if table is None else _relation(arm, table)]
    words += [group] if arm.kind in ("pretrained", "scratch") else []
    words += ["norm recalibrated"] if arm.first.recalibrated else []
    words += [str(arm.first.result.contestant.get("pool") or "")]
    return ", ".join(word for word in words if word)


# Flags, differences, ranks ------------------------------------------------------------------------


def _flag(board: Board) -> None:
    for arm in board.arms:
        flags = [one.result.flags for one in arm.records()]
        subjects = max(int(one.get("seen_test_subjects") or 0) for one in flags)
        known = [one.get("seen_test_volumes") for one in flags]
        volumes = None if arm.kind == "pretrained" and None in known else max((v or 0) for v in known)
        labels = any(bool(one.get("saw_labels")) for one in flags)
        arm.flags = {"seen_test_subjects": subjects, "seen_test_volumes": volumes, "saw_labels": labels}
        if subjects or volumes or any(one.get("ranked") is False for one in flags):
            seen = f"{subjects} test subjects" if subjects else f"{volumes} test volumes"
            arm.why_unranked = (
                f"pretraining saw {seen if subjects or volumes else 'what it should not have'}"
                f"{', and learned from labels' if labels else ''}"
            )
        elif arm.kind == "trivial":
            arm.why_unranked = "no network"
        elif not np.isfinite(arm.interval.value):
            arm.why_unranked = "its score is undefined"
        elif labels:
            arm.section = "labels"


def reference_of(arm: Arm, board: Board) -> Arm | None:
    """The same network untrained or from scratch; of both treatments of its norms the better one.

    An untrained network with new norm statistics can be far below the same with its own: a gain over that
    one alone would be a gain over a straw man.
    """
    same = [one for one in board.of_kind("scratch") if _network(one) == _network(arm)]
    return max(same, key=lambda one: one.interval.value, default=None)


def _network(arm: Arm) -> str:
    return str(arm.first.result.contestant.get("group", ""))


def best_imagenet(board: Board) -> Arm | None:
    """The ImageNet conversion of the highest score."""
    found = [arm for arm in board.of_kind("imagenet") if not arm.why_unranked and arm.section == "main"]
    return max(found, key=lambda arm: arm.interval.value, default=None)


def _differences(board: Board) -> None:
    """Differences from scratch and from ImageNet.

    Holm over all tests of the table; encoders pretrained with labels are a family of their own.
    """
    imagenet = best_imagenet(board)
    tests: dict[str, list[tuple[Arm, str, float]]] = {"main": [], "labels": []}
    found: list[statistics.Difference] = []
    for arm in board.of_kind("pretrained", "imagenet"):
        scratch = reference_of(arm, board)
        if scratch is not None:
            arm.gain = _paired(arm, scratch)
            if arm.why_unranked:  # shown, but neither tested nor counted among the tests
                continue
            if np.isfinite(arm.gain.p):
                tests[arm.section].append((arm, "p_holm", arm.gain.p))
            if arm.section == "main":
                found.append(arm.gain)
        if imagenet not in (None, arm) and arm.kind == "pretrained" and not arm.why_unranked:
            assert imagenet is not None
            arm.over_imagenet = _paired(arm, imagenet)
            if np.isfinite(arm.over_imagenet.p):
                tests[arm.section].append((arm, "p_imagenet_holm", arm.over_imagenet.p))
    for family in tests.values():
        for (arm, name, _), p in zip(family, statistics.holm([p for _, _, p in family]), strict=True):
            setattr(arm, name, p)
    if not any(np.isfinite(one.error) for one in found):
        pairs = itertools.combinations([arm for arm in board.arms if arm.kind != "trivial"], 2)
        found = [_paired(a, b) for a, b in pairs]
    found = [one for one in found if np.isfinite(one.error) and one.error > 0]
    detectable = [one.detectable for one in found if np.isfinite(one.detectable)]
    if detectable:
        board.detectable = float(np.median(detectable))
    elif found:
        board.notes.append(
            "No smallest detectable difference is given: there are too few seeds or subsets of the "
            "training data to know how much they differ."
        )


def _paired(a: Arm, b: Arm) -> statistics.Difference:
    return statistics.paired_difference(a.runs, b.runs, _subsets(a) == _subsets(b))


def _subsets(arm: Arm) -> list[int]:
    """Which subsets of the training data it learned from, in order."""
    return [one.result.repeat for one in arm.rows[0]]


def _rank(board: Board) -> None:
    for section in ("main", "labels"):
        arms = [arm for arm in board.arms if not arm.why_unranked and arm.section == section]
        if not arms:
            continue
        ranks = ranks_of(np.array([[arm.interval.value] for arm in arms]))[:, 0]
        drawn = rank_draws(arms, board)
        for arm, rank, own in zip(arms, ranks, drawn, strict=True):
            arm.rank = float(rank)
            low, high = np.quantile(own, [0.025, 0.975])
            arm.rank_interval = (float(low), float(high))
            arm.first_share = float(np.mean(own == 1))


def rank_draws(arms: Sequence[Arm], board: Board) -> Array:
    """Ranks on every resample of subjects, seeds and subsets, (M, R)."""
    subsets = [(board.slug, *_subsets(arm)) for arm in arms]
    names = [(board.slug, arm.label) for arm in arms]
    return ranks_of(statistics.joint_draws([arm.runs for arm in arms], subsets, names))


def ranks_of(scores: Array) -> Array:
    """Ranks of the rows in every column, 1 for the highest, ties shared."""
    from scipy.stats import rankdata

    ranks: Array = rankdata(-scores, axis=0)
    return ranks


def _missing(board: Board) -> None:
    """Rows that protocol.md says have to be there."""
    words = scratch_words(board.table.task).replace("from scratch", "from-scratch")
    lacking = [
        arm.label for arm in board.of_kind("pretrained", "imagenet") if reference_of(arm, board) is None
    ]
    if not board.of_kind("scratch"):
        board.missing.append(f"there is no {words} row: no score here can be called an improvement")
    elif lacking:
        board.missing.append(f"there is no {words} row of the same network for {', '.join(lacking)}")
    few = [arm for arm in board.of_kind("scratch") if arm.seeds < 5]
    if words == "untrained" and few:
        board.missing.append(
            f"{few[0].label}: {few[0].seeds} seed{'s' * (few[0].seeds != 1)} of random weights, five "
            f"are asked for"
        )
    tries = {arm.label: _tries(arm) for arm in board.arms if arm.kind != "trivial"}
    if len(set(tries.values())) > 1:
        told = "; ".join(
            f"{count} for {', '.join(name for name, own in tries.items() if own == count)}"
            for count in sorted(set(tries.values()), reverse=True)
        )
        board.missing.append(
            f"tuning is unequal, so no difference here is pretraining's: learning rates tried: {told}"
        )
    there = {str(arm.first.result.contestant["name"]) for arm in board.of_kind("trivial")}
    lacking = [name for name in TRIVIAL if name not in there]
    if not there:
        board.missing.append(
            "there is no trivial row (a row without a network that any network has to beat)"
        )
    elif lacking and board.table.family in ("classification", "regression"):
        board.missing.append(
            f"there is no trivial row of {' and of '.join(lacking)}: a network may have learned no more"
        )
    unmeasured = [arm for arm in board.of_kind("pretrained") if arm.first.flops() and not arm.measured]
    if unmeasured:
        count = len(board.of_kind("pretrained"))
        board.notes.append(
            f"Wall time or peak memory of pretraining is not known (–) for {len(unmeasured)} of {count} "
            "encoders: their checkpoints do not say, as old ones do not."
        )
    seen = [arm for arm in board.of_kind("pretrained") if arm.flags.get("seen_test_volumes") is None]
    blind = [arm for arm in board.arms if arm.section == "labels" and _knows_nothing(arm)]
    if blind:
        board.notes.append(
            f"Whether {', '.join(arm.label for arm in blind)} learned from labels of test subjects is not "
            "known: the weights say nothing of the people they saw."
        )
    if seen:
        every = "all pretrained rows" if len(seen) == len(board.of_kind("pretrained")) else ", ".join(
            arm.label for arm in seen)  # fmt: skip
        board.notes.append(
            f"Leak check by the names of subjects alone for {every}: their checkpoints have no hashes "
            f"of voxels."
        )
    single = [arm for arm in board.of_kind("pretrained", "imagenet") if arm.seeds == 1]
    if single:
        board.notes.append(
            "Rows of one seed: their intervals are of the test subjects alone, and so are tests of two "
            "such rows; another seed of pretraining may differ by more. Against a row of several seeds "
            "the one seed is taken to vary as much as those."
        )
    undefined = max((arm.interval.undefined for arm in board.arms), default=0.0)
    if undefined > 0.01:
        board.notes.append(
            f"In {undefined:.0%} of the resamples a class is missing and {board.table.main} is "
            f"undefined; those are left out."
        )


def _knows_nothing(arm: Arm) -> bool:
    """Whether neither the people nor the volumes are known that it was pretrained on."""
    return arm.flags.get("seen_test_volumes") is None and not any(
        one.result.contestant.get("identities_seen") for one in arm.records()
    )


def _tries(arm: Arm) -> int:
    """Learning rates that were tried, the most of its records; 0 where a protocol has none."""
    return max(len(one.result.settings.get("rates") or ()) for one in arm.records())


# Over tasks ---------------------------------------------------------------------------------------


@dataclass
class Overall:
    """Ranks over the tasks of one protocol and family.

    Attributes:
        protocol: Of the tasks.
        family: Segmentation, classification, detection or regression.
        boards: One per task.
        methods: Best average rank first.
        ranks: Rank of every method on every task, (M, T).
        average: Average ranks (M,).
        intervals: 95 % of the average rank over the resamples.
        first_share: How often each is first.
        above: How often the method of the row is above that of the column, (M, M).
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
    """Demšar 2006: Friedman's test, then Nemenyi's.

    Attributes:
        p: Of "all are alike" (Friedman).
        difference: Average ranks further apart than this differ at .05.
        cliques: Methods that cannot be told apart, as positions in the order of average ranks.
    """

    p: float
    difference: float
    cliques: list[tuple[int, int]]


def overall_of(boards: Iterable[Board]) -> list[Overall]:
    """Ranks over tasks, one for each protocol and family; a data set and target counts once."""
    found = [_overall(*about, _matched(choices)) for about, choices in _tasks(boards)]
    return [one for one in found if one is not None]


def no_overall(boards: Iterable[Board]) -> list[str]:
    """Why there are no ranks over the tasks of a protocol and family, a sentence each."""
    lines = []
    for (protocol, family), choices in _tasks(boards):
        if _matched(choices) is not None:
            continue
        tables = [one[0].table.title.removesuffix(f" ({one[0].table.number})") for one in choices]
        why = (
            f"{tables[0]} is the only task with all labels"
            if len(tables) == 1
            else f"no two of the {len(tables)} tasks ({'; '.join(tables)}) have two contestants in common"
        )
        lines.append(f"No ranks over tasks for {family} ({protocol}): {why}.")
    return lines


def _tasks(boards: Iterable[Board]) -> list[tuple[tuple[str, str], list[list[Board]]]]:
    """By protocol and family: of every task the boards with all labels."""
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
        boards: One per task.
        methods: Name and, in the order of the boards, the arms that stand for it.
        left_out: Contestants that are not on every board, in words.
        tasks_left_out: Tables that share less than half of the contestants of the others, by title.
    """

    boards: list[Board]
    methods: list[tuple[str, list[Arm]]]
    left_out: list[str]
    tasks_left_out: list[str]


def _matched(choices: Sequence[Sequence[Board]]) -> _Matched | None:
    """The tasks and the contestants that are on all of them; None where there are not two of both.

    A task that would more than halve the contestants is left out instead of them.
    """
    if len(choices) < 2:
        return None
    every = _together(choices)
    boards, tried = every, []
    while len(boards) > 1:
        tried.append((boards, *_methods(boards)))
        without = [[one for one in boards if one is not board] for board in boards]
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
    """Of each task's tables the one that shares most contestants with the other tasks' tables."""
    names = _identities([board for boards in choices for board in boards])
    known = {
        id(board): {name for arm in board.ranked() for name in (names[id(arm)], _across(arm, board.table))}
        for boards in choices
        for board in boards
    }

    def shared(boards: Iterable[Board]) -> tuple[int, int, int]:
        own = [known[id(board)] for board in boards]
        counts = Counter(name for one in own for name in one)
        return len(set.intersection(*own)), sum(n * n for n in counts.values()), sum(map(len, own))

    some: Iterable[tuple[Board, ...]] = itertools.islice(itertools.product(*choices), 5000)
    return list(max(some, key=shared))


def _identities(boards: Sequence[Board]) -> dict[int, Any]:
    """Arm (its id) -> what is the same wherever the same encoder is scored in the same way.

    The same are arms that share weights, or, where a table has other seeds of a run, name and training.
    """
    found: dict[int, Any] = {}
    by_clue: dict[Any, Any] = {}
    for board in boards:
        taken: set[Any] = set()
        for arm in board.arms:
            about = arm.first.arm
            how = (arm.kind, arm.first.recalibrated, arm.first.result.contestant.get("pool"), _network(arm))
            recipe = str(sorted(arm.first.recipe.items()))
            clues: list[Any] = [("training", about, recipe)]
            if arm.kind == "pretrained":
                digests = {str(one.result.contestant["digest"]) for one in arm.records()}
                clues += [("weights", *how, digest) for digest in sorted(digests)]
            known = next((by_clue[clue] for clue in clues if clue in by_clue), clues[0])
            if known in taken:  # two names for the same weights in one table: two contestants
                known, clues = clues[0], clues[:1]
            taken.add(known)
            for clue in clues:
                by_clue.setdefault(clue, known)
            found[id(arm)] = known
    return found


def _methods(boards: Sequence[Board]) -> tuple[list[tuple[str, list[Arm]]], list[str]]:
    """Methods that are on all boards, and in words who is not.

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
            groups.append((_across(chosen[0], None), chosen))
        else:
            rest[key] = list(places.items())
    others = [place for places_of in rest.values() for place in places_of]
    called = [_across(arm, boards[number].table) for number, arm in others]
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
            left_out.append((_across(arm, None), f"on {len(places_of)} of {len(boards)}", arm))
    same = Counter(name for name, _ in groups)
    named = [
        (name if same[name] == 1 else f"{name}, {arms[0].first.result.contestant['name']}", arms)
        for name, arms in groups
    ]
    crowded = Counter(name for name, _, _ in left_out)
    told = [
        f"{name if crowded[name] == 1 else name + ', ' + str(arm.first.result.contestant['name'])} ({on})"
        for name, on, arm in left_out
    ]
    return named, sorted(told)


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
    names, table, average = [names[k] for k in order], table[order], average[order]
    means = np.mean([one[order] for one in drawn], axis=0)  # (M, R)
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
    told = [average[j] != average[i] for i, j in itertools.combinations(range(len(names)), 2)]
    changes = float(np.mean((agreeing[told] < 0).any(axis=0))) if any(told) else 1.0
    return Overall(
        protocol, family, boards, names, table, average,
        [(float(low), float(high)) for low, high in ends.T],
        (best / best.sum(axis=0)).mean(axis=1), above, changes, float(agreeing.mean()),
        critical_difference(table) if len(boards) >= TASKS_FOR_PICTURE else None, left_out,
        matched.tasks_left_out,
    )  # fmt: skip


def _shortened(names: list[str], ours: Sequence[bool]) -> list[str]:
    """Without the words that all have that are no conversion, such as the architecture."""
    split = [name.split(", ") for name in names]
    sets = [set(words) for words, own in zip(split, ours, strict=True) if own]
    same = set.intersection(*sets) if len(sets) > 1 else set()
    return [", ".join(word for word in words if word not in same) or ", ".join(words) for words in split]


def critical_difference(ranks: Array) -> CriticalDifference:
    """Friedman's test and Nemenyi's critical difference at .05 of ranks (M, T), best average first."""
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


# In words -----------------------------------------------------------------------------------------


def answer(boards: Sequence[Board]) -> list[str]:
    """Whether pretraining pays on these data, from the numbers, in sentences."""
    lines = []
    tried = [board for board in boards if board.of_kind("pretrained")]
    groups: dict[tuple[str, str, bool], list[Board]] = {}
    for board in tried:
        groups.setdefault((board.table.protocol, board.table.family, board.few), []).append(board)
    for about, members in sorted(groups.items()):
        lines += _gains(*about, members)
    lines += _over_imagenet([board for board in tried if not board.few])
    for about, members in sorted(groups.items()):
        lines += _gains_with_labels(*about, members)
    return lines or ["There is no pretrained encoder in these records."]


def scratch_words(task: str) -> str:
    """What the rows without pretraining are called: fine-tuned ones have been trained."""
    return "from scratch" if task.startswith("finetune") else "untrained"


def _gains(protocol: str, family: str, few: bool, boards: Sequence[Board]) -> list[str]:
    lines: list[str] = []
    better: list[str] = []
    worse: list[str] = []
    neither: list[str] = []
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
            others = f" and {len(up) - 1} more" if len(up) > 1 else ""
            better.append(f"{name} ({best.label} {_gain(best):+.3f}{others} of {len(tested)})")
        else:
            least = f", which could show {board.detectable:.3f}" if board.detectable else ""
            neither.append(f"{name}{least}")
        if down:
            worst = min(down, key=_gain)
            worse.append(f"{name} ({len(down)} of {len(tested)}, {worst.label} {_gain(worst):+.3f})")
    words = scratch_words(protocol)
    head = f"{family.capitalize()}{' with few labels' * few} ({protocol})"
    count = len(better) + len(neither)
    if better:
        lines.append(
            f"{head}: yes on {len(better)} of {count} tables: a pretrained encoder beats the same network "
            f"{words} beyond chance on {'; '.join(better)}."
        )
    elif count:
        lines.append(f"{head}: not shown on any of {count} tables.")
    if neither:
        lines.append(f"{head}: no gain could be shown on {'; '.join(neither)}.")
    if worse:
        lines.append(f"{head}: pretraining made it worse on {'; '.join(worse)}.")
    if blind:
        lines.append(
            f"{head}: nothing can be said on {'; '.join(blind)}: the row {words} is missing, "
            "or pretraining saw test subjects."
        )
    return lines


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


def _shown(arm: Arm) -> bool:
    return arm.p_holm is not None and arm.p_holm < 0.05


def _gain(arm: Arm) -> float:
    return arm.gain.value if arm.gain else float("nan")


def curve_of(arm: Arm) -> tuple[list[int], list[float], list[int]]:
    """Validation score against fine-tuning steps: steps, mean over seeds and subsets, number of runs."""
    points: dict[int, list[float]] = {}
    for one in arm.records():
        details = one.result.compute.get("details")
        for fold in details if isinstance(details, list) else [details]:
            curve = fold.get("curve") if isinstance(fold, Mapping) else None
            for point in curve or ():
                score = point.get("score")
                if score is not None and np.isfinite(score):
                    points.setdefault(int(point["step"]), []).append(float(score))
    steps = sorted(points)
    return steps, [float(np.mean(points[s])) for s in steps], [len(points[s]) for s in steps]
