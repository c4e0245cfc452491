"""The numbers of the tables of a leaderboard: scores, paired differences, ranks, and their error."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import statistics
from ssl3d_benchmarks.leaderboard.report.board import NO_NETWORK, Arm, Board
from ssl3d_benchmarks.leaderboard.report.names import label
from ssl3d_benchmarks.leaderboard.report.records import ReadRecord, Table, contestants_of
from ssl3d_benchmarks.table import same_subsets
from ssl3d_benchmarks.trivial_rows import TRIVIAL
from ssl3d_benchmarks.unlearned import floor_words, unlearned

Array = NDArray[Any]

UNTRAINED_SEEDS = 5
"""Seeds of random weights that a probe's untrained row needs."""


def boards_of(table: Table, resamples: int = statistics.RESAMPLES) -> list[Board]:
    """Compute the boards of a table, the largest fraction first."""
    boards: list[Board] = []
    for fraction in sorted({record.result.fraction for record in table.rows}, reverse=True):
        rows = [record for record in table.rows if record.result.fraction == fraction]
        notes: list[str] = []
        arms = [_arm(_grid(group, notes), table, resamples) for group in contestants_of(rows)]
        on_the_way = [arm for arm in arms if arm.first.share is not None]
        arms = [arm for arm in arms if arm.first.share is None]
        if not arms:
            continue
        label(arms, table)
        label(on_the_way, table)
        board = Board(table, fraction, arms, on_the_way, notes=notes)
        _flag(board)
        _differences(board)
        _rank(board)
        board.arms.sort(key=lambda arm: -arm.interval.value if np.isfinite(arm.interval.value) else np.inf)
        board.unlearned = _unlearned(board)
        board.missing += _missing(board)
        board.notes += _notes(board)
        boards.append(board)
    return boards


def _grid(group: Sequence[ReadRecord], notes: list[str]) -> list[list[ReadRecord]]:
    """Arrange records as seeds x subsets; seeds that lack a subset are left out, which is noted."""
    grid: dict[tuple[Any, ...], dict[int, ReadRecord]] = {}
    for record in group:
        who = record.result.contestant
        seed = (record.result.seed, str(who["name"]), who["digest"])
        if record.kind == "scratch":  # the same random weights, scored twice, are one seed
            seed = (record.result.seed, str(who.get("weights_seed")), "")
        grid.setdefault(seed, {}).setdefault(record.result.repeat, record)
    kept = same_subsets(grid)
    if len(kept) < len(grid):
        name = group[0].result.contestant["name"]
        notes.append(
            f"{len(grid) - len(kept)} of the {len(grid)} seeds of {name} do not count, because they were "
            "not scored on every subset of the training subjects."
        )
    return kept


def _arm(grid: list[list[ReadRecord]], table: Table, resamples: int) -> Arm:
    first, last = grid[0][0], grid[-1][-1]
    runs = statistics.runs_of(
        [[record.scorer.functions[table.main] for record in row] for row in grid],
        last.scorer.clusters,
        resamples,
        # The same people in two tasks are the same draw, other people are another.
        ("leaderboard", *table.dataset),
        first.scorer.support,
        statistics.bounds_of(table.main),
    )
    names = tuple(last.scorer.functions)
    return Arm(grid, first.kind, runs, statistics.nested_interval(runs), scores=names)


def _flag(board: Board) -> None:
    for arm in board.arms:
        flags = [record.result.flags for record in arm.records()]
        subjects = max(int(own.get("seen_test_subjects") or 0) for own in flags)
        known = [own.get("seen_test_volumes") for own in flags]
        volumes = None if arm.kind == "pretrained" and None in known else max((v or 0) for v in known)
        labels = any(bool(own.get("saw_labels")) for own in flags)
        arm.flags = {"seen_test_subjects": subjects, "seen_test_volumes": volumes, "saw_labels": labels}
        if subjects or volumes or any(own.get("ranked") is False for own in flags):
            seen = f"{subjects} test subjects" if subjects else f"{volumes} test volumes"
            arm.why_unranked = (
                f"pretraining saw {seen if subjects or volumes else 'what it should not have'}"
                f"{', and learned from labels' if labels else ''}"
            )
        elif arm.kind == "trivial":
            arm.why_unranked = NO_NETWORK
        elif not np.isfinite(arm.interval.value):
            arm.why_unranked = "its score is undefined"
        elif labels:
            arm.section = "labels"


def reference_of(arm: Arm, board: Board) -> Arm | None:
    """Return the same network untrained or from scratch; of both treatments of its norms the better one.

    An untrained network with new norm statistics can be far below the same with its own: a gain over that
    one alone would be a gain over a straw man.
    """
    same = [other for other in board.of_kind("scratch") if network_of(other) == network_of(arm)]
    return max(same, key=lambda other: other.interval.value, default=None)


def network_of(arm: Arm) -> str:
    """Return architecture, kernels and width: what scratch and pretrained rows of one network share."""
    return str(arm.first.result.contestant.get("group", ""))


def best_imagenet(board: Board) -> Arm | None:
    """Return the ImageNet conversion of the highest score."""
    conversions = [
        arm for arm in board.of_kind("imagenet") if not arm.why_unranked and arm.section == "main"
    ]
    return max(conversions, key=lambda arm: arm.interval.value, default=None)


def _differences(board: Board) -> None:
    """Compute the differences from scratch and from ImageNet.

    Holm's correction is over all tests of the table; encoders pretrained with labels are a family of their
    own.
    """
    imagenet = best_imagenet(board)
    tests: dict[str, list[tuple[Arm, str, float]]] = {"main": [], "labels": []}
    gains: list[statistics.Difference] = []
    for arm in board.of_kind("pretrained", "imagenet"):
        scratch = reference_of(arm, board)
        if scratch is not None:
            arm.gain = _paired(arm, scratch)
            if arm.seeds == scratch.seeds == 1 and not board.table.task.startswith("finetune"):
                arm.gain = statistics.without_interval(arm.gain)
            if arm.why_unranked:  # shown, but neither tested nor counted among the tests
                continue
            if np.isfinite(arm.gain.p):
                tests[arm.section].append((arm, "p_holm", arm.gain.p))
            if arm.section == "main":
                gains.append(arm.gain)
        if imagenet not in (None, arm) and arm.kind == "pretrained" and not arm.why_unranked:
            assert imagenet is not None
            arm.over_imagenet = _paired(arm, imagenet)
            if np.isfinite(arm.over_imagenet.p):
                tests[arm.section].append((arm, "p_imagenet_holm", arm.over_imagenet.p))
    for family in tests.values():
        for (arm, name, _), p in zip(family, statistics.holm([p for _, _, p in family]), strict=True):
            setattr(arm, name, p)
    if not any(np.isfinite(gain.error) for gain in gains):
        pairs = itertools.combinations([arm for arm in board.arms if arm.kind != "trivial"], 2)
        gains = [_paired(a, b) for a, b in pairs]
    _detectable(board, [gain for gain in gains if np.isfinite(gain.error) and gain.error > 0])


def _detectable(board: Board, gains: Sequence[statistics.Difference]) -> None:
    """Set the smallest difference that a board detects, or note that it is unknown."""
    detectable = [gain.detectable for gain in gains if np.isfinite(gain.detectable)]
    if detectable:
        board.detectable = float(np.median(detectable))
    elif gains:
        board.notes.append(
            "No smallest detectable gain is given, because there are too few test subjects, seeds or "
            "subsets of the training subjects to estimate how much they vary."
        )


def _paired(a: Arm, b: Arm) -> statistics.Difference:
    return statistics.paired_difference(a.runs, b.runs, _subsets(a) == _subsets(b))


def _subsets(arm: Arm) -> list[int]:
    """List the subsets of the training data that a contestant learned from, in order."""
    return [record.result.repeat for record in arm.rows[0]]


def _rank(board: Board) -> None:
    for section in ("main", "labels"):
        arms = [arm for arm in board.arms if not arm.why_unranked and arm.section == section]
        if not arms:
            continue
        ranks = ranks_of(np.array([[arm.interval.value] for arm in arms]))[:, 0]
        drawn = rank_draws(arms, board)
        for arm, rank, own in zip(arms, ranks, drawn, strict=True):
            arm.rank = float(rank)
            if not arm.runs.sure:  # too few test subjects of a class: resamples of them tell nothing
                continue
            low, high = np.quantile(own, [0.025, 0.975])
            arm.rank_interval = (float(low), float(high))
            arm.first_share = float(np.mean(own == 1))


def rank_draws(arms: Sequence[Arm], board: Board) -> Array:
    """Rank contestants on every resample of subjects, seeds and subsets, (M, R)."""
    subsets = [(board.slug, *_subsets(arm)) for arm in arms]
    names = [(board.slug, arm.label) for arm in arms]
    return ranks_of(statistics.joint_draws([arm.runs for arm in arms], subsets, names))


def ranks_of(scores: Array) -> Array:
    """Rank the rows in every column, 1 for the highest, ties shared."""
    from scipy.stats import rankdata

    ranks: Array = rankdata(-scores, axis=0)
    return ranks


def _missing(board: Board) -> list[str]:
    """Name the rows that the protocol requires and the board lacks, and unequal tuning."""
    trained = board.table.task.startswith("finetune")
    words = "from-scratch" if trained else "untrained"
    lines = []
    lacking = [
        arm.title for arm in board.of_kind("pretrained", "imagenet") if reference_of(arm, board) is None
    ]
    if not board.of_kind("scratch"):
        lines.append(f"There is no {words} row, so no score here can be called a gain.")
    elif lacking:
        lines.append(f"There is no {words} row of the same network for {', '.join(lacking)}.")
    few = [arm for arm in board.of_kind("scratch") if arm.seeds < UNTRAINED_SEEDS]
    if few and not trained:
        lines.append(
            f"{few[0].title} has {few[0].seeds} seed{'s' * (few[0].seeds != 1)} of random weights, and "
            f"{UNTRAINED_SEEDS} are required."
            + " Gains over one seed have no interval: it does not tell how much another would change them."
            * (few[0].seeds == 1)
        )
    return [*lines, *_unequal_tuning(board), *_missing_trivial(board)]


def _unequal_tuning(board: Board) -> list[str]:
    tries = {arm.title: _tries(arm) for arm in board.arms if arm.kind != "trivial"}
    if len(set(tries.values())) < 2:
        return []
    counts = "; ".join(
        f"{count} for {', '.join(name for name, own in tries.items() if own == count)}"
        for count in sorted(set(tries.values()), reverse=True)
    )
    return [
        "The tuning is unequal, so no difference here can be attributed to pretraining. "
        f"Number of learning rates tried: {counts}."
    ]


def _missing_trivial(board: Board) -> list[str]:
    there = {str(arm.first.result.contestant["name"]) for arm in board.of_kind("trivial")}
    lacking = [name for name in TRIVIAL if name not in there]
    if not there:
        return ["There is no trivial row: a row without a network that any network has to beat."]
    if lacking and board.table.family in ("classification", "regression"):
        return [
            f"There is no trivial row of {' and of '.join(lacking)}, so a network may have learned no more "
            "than that."
        ]
    return []


def _notes(board: Board) -> list[str]:
    """Say what is unknown about the rows of a board, and what limits its intervals."""
    pretrained, lines = board.of_kind("pretrained"), []
    unmeasured = [arm for arm in pretrained if arm.first.flops() and not arm.measured]
    if unmeasured:
        lines.append(
            f"The wall time or the peak memory of pretraining is unknown (–) for {len(unmeasured)} of "
            f"{len(pretrained)} encoders, because their checkpoints do not have it."
        )
    blind = [arm.title for arm in board.arms if arm.section == "labels" and _knows_nothing(arm)]
    if blind:
        lines.append(
            f"It is unknown whether {', '.join(blind)} learned from labels of test subjects, because the "
            "weights do not say which subjects they saw."
        )
    by_name = [arm.title for arm in pretrained if arm.flags.get("seen_test_volumes") is None]
    if by_name:
        rows = "all pretrained rows" if len(by_name) == len(pretrained) else ", ".join(by_name)
        lines.append(
            f"The leak check compared the names of subjects only for {rows}, because their checkpoints "
            "have no hashes of voxels."
        )
    if any(arm.seeds == 1 for arm in board.of_kind("pretrained", "imagenet")):
        lines.append(
            "Rows of one seed have intervals over the test subjects only, and so have the differences "
            "between two such rows: another seed of pretraining may differ by more. In a difference from a "
            "row of several seeds, the one seed is taken to vary as much as those."
        )
    lines += [*_absent_scores(board), *_ranks_and_gains(board)]
    undefined = max((arm.interval.undefined for arm in board.arms), default=0.0)
    if reason := board.why_no_interval:
        lines.append(reason)
    else:
        at_bound = [arm.runs.value for arm in board.arms if arm.runs.at_bound]
        lines += map(statistics.at_bound_note, dict.fromkeys(at_bound))
    if undefined > 0.01 and not reason:
        lines.append(
            f"In {undefined:.0%} of the resamples a class is missing and {board.table.main} is undefined; "
            "those resamples are left out."
        )
    return lines


def _absent_scores(board: Board) -> list[str]:
    """Say which scores the protocol computes today and no record of a board has."""
    there = {name for arm in board.arms for record in arm.records() for name in record.result.scores}
    absent = [name for arm in board.arms[:1] for name in arm.scores if name not in there]
    return [f"These records are too old to have {', '.join(absent)}."] if absent else []


def _ranks_and_gains(board: Board) -> list[str]:
    """Say why a range of ranks and the interval of a gain disagree, where they do."""
    for arm in board.ranked():
        reference = reference_of(arm, board) if arm.gain else None
        if not arm.gain or not arm.rank_interval or not reference or not reference.rank_interval:
            continue
        (low, high), (other_low, other_high) = arm.rank_interval, reference.rank_interval
        if (high < other_low or low > other_high) and arm.gain.low <= 0 <= arm.gain.high:
            return [
                f"The ranks of {arm.title} and of {reference.title} do not overlap, yet the gain may be "
                "zero. A range of ranks resamples the test subjects and draws seeds and subsets as they "
                "were seen to vary. The interval of a gain also counts how little a few seeds and subsets "
                "tell of how much they vary, and decides."
            ]
    return []


def _unlearned(board: Board) -> list[str]:
    """Return a sentence for each trained network that is not clearly above what needs no training."""
    protocol, _, target = board.table.task.partition("/")
    work = protocol.partition("finetune-")[2]
    if not work:  # probes train no network
        return []
    from ssl3d_benchmarks.finetune.protocol import task_class

    floor = task_class(work).floors.get(target)
    level: statistics.Runs | float | None = floor if isinstance(floor, float) else None
    for arm in board.of_kind("trivial"):
        if arm.first.result.contestant["name"] == floor:
            level = arm.runs
    if floor is None or level is None:
        return []
    networks = [arm for arm in board.arms if arm.kind != "trivial"]
    sentences = [
        unlearned(arm.title, arm.runs, level, floor_words(floor), board.table.main) for arm in networks
    ]
    return [words for words in sentences if words]


def _knows_nothing(arm: Arm) -> bool:
    """Return whether neither the people nor the volumes are known that a contestant was pretrained on."""
    return arm.flags.get("seen_test_volumes") is None and not any(
        record.result.contestant.get("identities_seen") for record in arm.records()
    )


def _tries(arm: Arm) -> int:
    """Count the learning rates that were tried, the most of the records; 0 where a protocol has none."""
    return max(len(record.rates) for record in arm.records())


def curve_of(arm: Arm) -> tuple[list[int], list[float], list[int]]:
    """Return steps of fine-tuning, the mean validation score at each, and the number of runs in it."""
    points: dict[int, list[float]] = {}
    for record in arm.records():
        for step, score in record.curve:
            points.setdefault(step, []).append(score)
    steps = sorted(points)
    return steps, [float(np.mean(points[s])) for s in steps], [len(points[s]) for s in steps]
