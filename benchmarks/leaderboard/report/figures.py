"""Figures of a board: charts of its numbers, and pictures that lie beside its records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from math import isfinite
from pathlib import Path
from statistics import fmean

from ssl3d.api import charts, elements, unpacked_place
from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.statistics import curve_of
from ssl3d_benchmarks.leaderboard.report.text import heading, published_rows
from ssl3d_benchmarks.leaderboard.report.worth import best_of_each

NAN = float("nan")


def forest(board: Board) -> str:
    """Draw the scores of all contestants with their intervals."""
    marks = [
        charts.Mark(arm.title, arm.interval.value, arm.interval.low, arm.interval.high, arm.kind,
             arm.rank is None and arm.kind != "trivial")
        for arm in board.arms
    ]  # fmt: skip
    marks += [
        charts.Mark(f"{row['name']} (published)", row[board.table.main], kind="published", faint=True)
        for row in published_rows(board)
    ]
    marks.sort(key=lambda mark: -mark.value if isfinite(mark.value) else float("inf"))
    title = f"{board.table.main} of {len(marks)} contestants with 95 % intervals: {heading(board)}"
    return elements.figure(
        charts.forest(marks, board.table.main, _reference(board), title),
        "Scores with 95 % intervals. Differences are paired, so two contestants can differ although their "
        "intervals overlap: the table shows the intervals of the differences.",
    )


def compute(board: Board) -> str:
    """Draw the score against compute: a curve for each contestant with encoders on the way, else points."""
    curves = [_compute_curve(board, arm) for arm in board.of_kind("pretrained") if arm.fair]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    several = any(len(curve.points) > 1 for curve in curves)
    if several:
        curves = [
            charts.Line(curve.label, [(x, v, NAN, NAN) for x, v, *_ in curve.points]) for curve in curves
        ]
    amounts = {point[0] for curve in curves for point in curve.points}
    if len(amounts) < 2 or (max(amounts) < 1.3 * max(min(amounts), 1e-9) and not several):
        return ""
    caption = "Score against the training FLOPs of pretraining."
    if several:
        caption = (
            "Score of encoders saved at 0, 25, 50 and 100 % of the pretraining budget; the encoder at 0 "
            "% is the untrained row. A flat curve is a sign of too short a pretraining, or of an error "
            "in it."
        )
    title = "Score against compute: " + heading(board)
    picture = charts.lines(
        curves, "training FLOPs of pretraining", board.table.main, title, not several, _reference(board)
    )
    return elements.figure(picture, caption)


def _compute_curve(board: Board, arm: Arm) -> charts.Line:
    """Return the score of a contestant against FLOPs; without points where its FLOPs are unknown."""
    flops = arm.first.flops()
    if not flops:
        return charts.Line(arm.title, [])
    points = [
        (way.first.flops() or 0.0, way.interval.value, NAN, NAN)
        for way in board.on_the_way
        if way.first.stem == arm.first.stem
        and way.first.recalibrated == arm.first.recalibrated
        and way.first.proxies == arm.first.proxies
        and way.first.recipe == arm.first.recipe
    ]
    reference = _reference(board)
    if points and reference is not None and min(x for x, *_ in points) > 0:
        points.append((0.0, reference, NAN, NAN))
    points.append((flops, arm.interval.value, arm.interval.low, arm.interval.high))
    return charts.Line(arm.title, sorted(points), arm.kind)


def data(board: Board) -> str:
    """Draw the score against the amount and variety of pretraining data."""
    points = []
    for arm in board.of_kind("pretrained"):
        about = arm.first.pretraining.get("data") or {}
        if about.get("volumes") and arm.fair:
            sets = len(list(about.get("datasets") or ()))
            label = f"{arm.title} ({sets} data set{'s' * (sets != 1)})"
            mark = charts.Mark(label, arm.interval.value, arm.interval.low, arm.interval.high, arm.kind)
            points.append((float(about["volumes"]), mark))
    amounts = [amount for amount, _ in points]
    if not amounts or max(amounts) < 1.5 * min(amounts):
        return ""
    title = "Score against pretraining data: " + heading(board)
    picture = charts.scatter(points, "volumes in pretraining", board.table.main, title, _reference(board))
    return elements.figure(
        picture,
        "Score against the number of pretraining volumes. Brackets give the number of data sets that the "
        "volumes come from.",
    )


def steps(board: Board) -> str:
    """Draw the validation score against the steps of fine-tuning."""
    curves = []
    for arm in board.arms:
        numbers, values, _ = curve_of(arm)
        if len(numbers) > 1 and arm.fair:
            points = [(float(step), value, NAN, NAN) for step, value in zip(numbers, values, strict=True)]
            curves.append(charts.Line(arm.title, points, arm.kind))
    picture = charts.lines(curves, "fine-tuning steps", f"{board.table.main} on validation subjects",
                           "Score against fine-tuning steps: " + heading(board))  # fmt: skip
    return elements.figure(
        picture,
        "Validation score during fine-tuning, as the mean over seeds. A curve that rises earlier "
        "belongs to a contestant that converges sooner.",
    )


def fractions(boards: Sequence[Board]) -> str:
    """Draw the score against the number of labelled subjects, over the boards of one table."""
    if len(boards) < 2:
        return ""
    counts = (board.arms[0].first.result.split.get("train", {}).get("subjects") for board in boards)
    curves = _over_boards((float(count or 0), board) for count, board in zip(counts, boards, strict=True))
    title = "Score against the number of labelled subjects: " + boards[0].table.title
    picture = charts.lines(
        [charts.Line(curve.label, sorted(curve.points), curve.kind) for curve in curves],
        "training subjects with labels", boards[0].table.main, title, log=True,
        distances=_distances(boards),
    )  # fmt: skip
    return elements.figure(
        picture,
        "Score against the number of training subjects. The subsets are nested and are the same for every "
        "contestant. A dashed level line joins the best pretrained contestant, where its gain is shown, "
        "with the number of subjects at which the same network from scratch has its score.",
    )


def _distances(boards: Sequence[Board]) -> list[tuple[float, float, float, str]]:
    """Return the way from a shown gain to the same score from scratch, or to the last number measured."""
    ways = []
    for worth in best_of_each(boards):
        arm = worth.arm
        if not (arm.p_holm is not None and arm.p_holm < 0.05 and worth.equal > worth.labelled):
            continue
        end = worth.equal if isfinite(worth.equal) else worth.most
        words = f"{worth.equal:.0f}" if isfinite(worth.equal) else f"more than {worth.most:.0f}"
        hint = f"{arm.title} with {worth.labelled:.0f} labelled subjects: from scratch {words}"
        ways.append((worth.labelled, end, arm.interval.value, hint))
    return ways


def sparse(boards: Sequence[Board]) -> str:
    """Draw the score against annotated slices; the boards go from few slices to many, all slices last."""
    if len(boards) < 2:
        return ""
    # There is no one number of all slices: they stand at the next power of two.
    every = 2.0 * max(board.table.slices for board in boards)
    curves = _over_boards((float(board.table.slices or every), board) for board in boards)
    last = boards[-1].table
    picture = charts.lines(
        curves, "annotated slices of each training volume", last.main,
        "Score against annotated slices: " + last.title, log=True,
        called={every: "all"} if last.slices == 0 else {},
    )  # fmt: skip
    return elements.figure(
        picture,
        "Score against the number of annotated slices. The loss uses those slices only; the score uses all "
        "slices of the test volumes.",
    )


def _over_boards(boards: Iterable[tuple[float, Board]]) -> list[charts.Line]:
    """Return the curves of the contestants that several boards have, over an amount of each board."""
    curves: dict[str, tuple[str, list[charts.Point]]] = {}
    for amount, board in boards:
        for arm in board.arms:
            if arm.fair and amount:
                points = curves.setdefault(arm.title, (arm.kind, []))[1]
                points.append((amount, arm.interval.value, arm.interval.low, arm.interval.high))
    return [charts.Line(label, points, kind) for label, (kind, points) in curves.items() if len(points) > 1]


def froc(board: Board) -> str:
    """Draw the sensitivity against false positives per scan, where the records have it."""
    curves = []
    for arm in board.arms:
        rates = [name for name in arm.first.result.scores if re.fullmatch(r"froc_[\d.]+", name)]
        if rates and arm.fair:
            points = [
                (float(name[5:]), fmean(record.result.scores[name] for record in arm.records()), NAN, NAN)
                for name in rates
            ]
            curves.append(charts.Line(arm.title, sorted(points), arm.kind))
    title = "FROC: " + heading(board)
    picture = charts.lines(curves, "false positives per scan", "sensitivity", title, log=True)
    return elements.figure(
        picture, "FROC: the share of the objects that is found, against the false positives per scan."
    )


def pictures(board: Board) -> str:
    """Show predictions beside the truth, or embeddings, of the best contestant and of the reference."""
    ranked = [arm for arm in board.ranked() if arm.kind in ("pretrained", "imagenet")]
    parts = []
    for arm in [*ranked[:1], *board.of_kind("scratch")[:1]]:
        beside = (path for record in arm.records() for path in _beside(record.path, record.result.key))
        path = next(beside, None)
        source = elements.inline(path) if path is not None else None
        if path is not None and source:
            embeddings = "embeddings of the test part on their principal axes"
            content = embeddings if "embeddings" in path.name else "predictions beside the truth"
            if "median-and-worst" in path.name:
                content += ", for the volumes with the median and the worst score"
            alt = escape(f"{arm.title}: {content}", quote=True)
            parts.append(
                f'<figure><img loading="lazy" alt="{alt}" src="{source}">'
                f"<figcaption>{escape(arm.title)}: {content}.</figcaption></figure>"
            )
    if not parts:
        return ""
    return f'<details open><summary>Pictures</summary><div class="charts">{"".join(parts)}</div></details>'


def _beside(path: Path, key: str) -> list[Path]:
    return sorted(unpacked_place(path).parent.glob(f"*{key[:8]}*.png"))


def _reference(board: Board) -> float | None:
    """Return the score of the untrained or from-scratch row, the better one of several."""
    return max((arm.interval.value for arm in board.of_kind("scratch")), default=None)
