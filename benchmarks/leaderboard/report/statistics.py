"""The numbers of the tables of a leaderboard: scores, paired differences, ranks, and their error."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import statistics
from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.names import label, scratch_words
from ssl3d_benchmarks.leaderboard.report.records import Read, Table, contestants_of, score_functions
from ssl3d_benchmarks.table import same_subsets
from ssl3d_benchmarks.trivial_rows import TRIVIAL
from ssl3d_benchmarks.unlearned import floor_words, unlearned

Array = NDArray[Any]


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
        label(arms, table)
        label(on_the_way, table)
        board = Board(table, fraction, arms, on_the_way, notes=notes)
        _flag(board)
        _differences(board)
        _rank(board)
        board.arms.sort(key=lambda arm: -arm.interval.value if np.isfinite(arm.interval.value) else np.inf)
        _missing(board)
        board.unlearned = _unlearned(board)
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
    kept = same_subsets(grid)
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
    same = [one for one in board.of_kind("scratch") if network_of(one) == network_of(arm)]
    return max(same, key=lambda one: one.interval.value, default=None)


def network_of(arm: Arm) -> str:
    """Architecture, kernels and width: what scratch and pretrained rows of one network share."""
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
    told = [unlearned(arm.label, arm.runs, level, floor_words(floor), board.table.main) for arm in networks]
    return [words for words in told if words]


def _knows_nothing(arm: Arm) -> bool:
    """Whether neither the people nor the volumes are known that it was pretrained on."""
    return arm.flags.get("seen_test_volumes") is None and not any(
        one.result.contestant.get("identities_seen") for one in arm.records()
    )


def _tries(arm: Arm) -> int:
    """Learning rates that were tried, the most of its records; 0 where a protocol has none."""
    return max(len(one.rates) for one in arm.records())


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
