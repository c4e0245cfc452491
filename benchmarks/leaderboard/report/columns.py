"""Columns of a leaderboard's tables, each written once and read by the page, the Markdown and the CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Any

import numpy as np

from ssl3d.api import duration, elements, size, statistics
from ssl3d_benchmarks.leaderboard.report.board import NO_NETWORK, Arm, Board
from ssl3d_benchmarks.leaderboard.report.names import scratch_words
from ssl3d_benchmarks.leaderboard.report.statistics import reference_of
from ssl3d_benchmarks.table import signed, with_interval
from ssl3d_benchmarks.trivial_rows import TRUE_MASKS, reads_true_masks

Published = Mapping[str, Any]
"""Row of published numbers: its name, source, note and scores."""

CI, RANGE = "[95\u00a0%\u00a0CI]", "[95\u00a0%\u00a0range]"
"""Ends of headings, in one piece where a heading is broken into lines."""
LOWER_IS_BETTER = ("hd95", "mae")
"""Scores, and beginnings of the names of their classes' scores, of which a lower one is better."""


def _no_tone(arm: Arm) -> str:
    return ""


def _nothing(board: Board, row: Published) -> tuple[str, Any]:
    return "", None


@dataclass(frozen=True)
class Column:
    """A column of the tables of a report.

    Attributes:
        key: Name in the CSV, unique among the columns.
        sort_key: Unrounded value of a row: the page sorts by it, and the CSV holds it.
        heading: Words above the column, in which {score} and {reference} are filled in; empty for a column
            that only the CSV has.
        cell: Text of a row's cell in the page and the Markdown.
        tone: CSS class of a row's cell in the page, or an empty string.
        published: Cell and value in a row of published numbers.
    """

    key: str
    sort_key: Callable[[Board, Arm], Any]
    heading: str = ""
    cell: Callable[[Board, Arm], str] = lambda board, arm: ""
    tone: Callable[[Arm], str] = _no_tone
    published: Callable[[Board, Published], tuple[str, Any]] = _nothing

    def heading_on(self, board: Board) -> str:
        """Return the heading of the column on a board."""
        reference = scratch_words(board.table.task).removeprefix("from ")
        return self.heading.format(score=board.table.main, reference=reference)


def shown_columns() -> list[Column]:
    """Return the columns of a comparison, which the page and the Markdown show."""
    return [column for column in COLUMNS if column.heading]


def score_columns(board: Board) -> list[Column]:
    """Return the columns of the table of all scores, the main one first; none for a task of one."""
    names = other_scores([board])
    if not names:
        return []
    contestant = next(column for column in COLUMNS if column.key == "contestant")
    return [contestant, *(_mean_score(name) for name in (board.table.main, *names))]


def csv_columns(boards: Sequence[Board]) -> list[Column]:
    """Return the columns of the CSV: those of every table, then one for each further score of any board."""
    return [*COLUMNS, *(_mean_score(name) for name in other_scores(boards))]


def other_scores(boards: Iterable[Board]) -> list[str]:
    """Return the names of the scores beside the main one that any record of some boards has."""
    names = {
        name: None
        for board in boards
        for arm in (*board.arms, *board.on_the_way)
        for record in arm.records()
        for name in record.result.scores
        if name != board.table.main
    }
    return list(names)


def _mean_score(name: str) -> Column:
    """Return the column of a score: its mean over the seeds and subsets of a contestant."""
    arrow = " ↓" if name.startswith(LOWER_IS_BETTER) else ""

    def mean(board: Board, arm: Arm) -> float | None:
        values = [record.result.scores.get(name) for record in arm.records()]
        return None if None in values else float(np.mean(np.array(values, dtype=float)))

    def published(board: Board, row: Published) -> tuple[str, Any]:
        return number(row.get(name)), row.get(name)

    return Column(
        f"score_{name}",
        mean,
        (name + arrow).replace("{", "{{").replace("}", "}}"),
        lambda board, arm: number(mean(board, arm)),
        published=published,
    )


# Cells --------------------------------------------------------------------------------------------


def rank_text(arm: Arm) -> str:
    """Return a rank with the range that resampling gives it."""
    if arm.rank is None:
        return "not ranked" if arm.why_unranked not in (NO_NETWORK, "") else "-"
    rank = f"{arm.rank:g}"
    if arm.rank_interval:
        low, high = arm.rank_interval
        rank += f" ({round(low, 1):g}–{round(high, 1):g})"
    return f"{rank}, with labels" if arm.section == "labels" else rank


def p_text(p: float | None) -> str:
    """Return a p-value in the form of journals; an empty string where there is none."""
    if p is None or not isfinite(p):
        return ""
    if p < 1e-4:
        return "< .0001"
    return f"{p:.{4 if p < 0.01 else 3}f}".lstrip("0") if p < 1 else "1"


def seconds_of(arm: Arm) -> float | None:
    """Return the mean wall time of a pretraining over all seeds, seconds; None where one is unknown."""
    seconds = [record.seconds for record in arm.encoders()]
    return None if None in seconds else fmean(filter(None, seconds))


def memory_of(arm: Arm) -> float | None:
    """Return the largest peak memory of a pretraining of all seeds, bytes; None where one is unknown."""
    memory = [record.peak_memory for record in arm.encoders()]
    return None if None in memory else max(filter(None, memory))


def notes_of(board: Board, arm: Arm) -> list[str]:
    """Return what a reader has to know about a row."""
    notes = []
    if arm.why_unranked and arm.why_unranked != NO_NETWORK:
        notes.append(f"NOT RANKED: {arm.why_unranked}")
    if arm.section == "labels":
        notes.append("pretrained with labels, so ranked apart")
    if arm.kind == "trivial":
        networks = board.ranked()
        below = sum(1 for other in networks if other.interval.value < arm.interval.value)
        notes.append(
            f"{NO_NETWORK}, yet better than {below} of {len(networks)} networks" if below else NO_NETWORK
        )
        notes += [TRUE_MASKS] * reads_true_masks(arm.first.result.contestant)
    if arm.seeds > 1:
        notes.append(f"{arm.seeds} seeds")
    elif arm.kind != "trivial":
        notes.append("1 seed")
    if arm.subsets > 1:
        notes.append(f"{arm.subsets} subsets of the training subjects")
    return notes


def settings_of(arm: Arm) -> str:
    """Return the full settings of a contestant's pretraining and network in words."""
    who, about = arm.first.result.contestant, arm.first.pretraining
    data = _data(arm)
    volumes = f"{data.get('volumes', '?')} volumes of {_datasets(arm) or '?'}" if data else ""
    steps = f"{arm.first.steps:,} steps" if arm.first.steps else ""
    words = {
        "recorded as": "; ".join(
            sorted({str(record.result.contestant["name"]) for record in arm.records()})
        ),
        "network": str(who.get("group") or who.get("source") or "").removeprefix("scratch:"),
        "pretrained": ", ".join(part for part in (steps, volumes) if part),
        "patch": " x ".join(map(str, about["patch"])) if isinstance(about.get("patch"), list) else "",
        "batch size": about.get("batch_size"),
        "optimizer": about.get("optimizer"),
        "learning rate": about.get("lr"),
        "started from": (arm.first.recipe.get("init") or {}).get("from"),
        "pooling": who.get("pool"),
        "decoder": who.get("decoder"),
        "learning rates tried": " ".join(f"{rate:g}" for rate in arm.first.rates),
        "weights": str(who["digest"])[:12],
    }
    return "; ".join(f"{key} {value}" for key, value in words.items() if value)


def number(value: float | None) -> str:
    """Return a score with three decimals, or a dash where there is none."""
    return f"{value:.3f}" if value is not None and isfinite(value) else elements.UNKNOWN


def gain_text(gain: statistics.Difference | None) -> str:
    """Return a difference with its interval, where it has one; an empty string where there is none."""
    return with_interval(gain, signed) if gain else ""


def _difference_tone(difference: Any, p: float | None) -> str:
    if not difference or p is None or p >= 0.05:
        return ""
    return "up" if difference.value > 0 else "down"


def _detectable(arm: Arm) -> float | None:
    return arm.gain.detectable if arm.gain and isfinite(arm.gain.detectable) else None


def _flops_text(arm: Arm) -> str:
    flops = arm.first.flops()
    return f"{flops:.2g}".replace("e+", "e") if flops else ""


def _known(words: Callable[[float], str], amount: float | None, arm: Arm) -> str:
    """Return an amount in words; a dash where an encoder was pretrained and its checkpoint lacks it."""
    if amount:
        return words(amount)
    return elements.UNKNOWN if arm.first.flops() else ""


def _reference(board: Board, arm: Arm) -> str | None:
    reference = reference_of(arm, board)
    return reference.label if reference and arm.gain else None


def _datasets(arm: Arm) -> str | None:
    return " ".join(_data(arm).get("datasets") or ()) or None


def _names(board: Board, arm: Arm) -> str:
    return " ".join(sorted({str(record.result.contestant["name"]) for record in arm.records()}))


def _data(arm: Arm) -> Mapping[str, Any]:
    return arm.first.pretraining.get("data") or {}


def _same(value: Callable[[Board], Any]) -> dict[str, Any]:
    """Return what a column of the CSV is made of that is the same for all rows of a board."""
    return {"sort_key": lambda board, arm: value(board), "published": lambda board, row: ("", value(board))}


# The list -----------------------------------------------------------------------------------------

COLUMNS = (
    Column("family", **_same(lambda board: board.table.family)),
    Column("table", **_same(lambda board: board.table.title)),
    Column("task", **_same(lambda board: board.table.task)),
    Column("version", lambda board, arm: board.table.version),
    Column("dataset", **_same(lambda board: " ".join(board.table.dataset))),
    Column("fraction", lambda board, arm: board.fraction, published=lambda board, row: ("", 1)),
    Column("rank", lambda board, arm: arm.rank, f"rank {RANGE}", lambda board, arm: rank_text(arm),
           published=lambda board, row: ("published", None)),
    Column("rank_low", lambda board, arm: arm.rank_interval and arm.rank_interval[0]),
    Column("rank_high", lambda board, arm: arm.rank_interval and arm.rank_interval[1]),
    Column("first_share", lambda board, arm: arm.first_share),
    Column("contestant", lambda board, arm: arm.label, "contestant", lambda board, arm: arm.title,
           published=lambda board, row: (row["name"], row["name"])),
    Column("title", lambda board, arm: arm.title, published=lambda board, row: ("", row["name"])),
    Column("kind", lambda board, arm: arm.kind, published=lambda board, row: ("", "published")),
    Column("section", lambda board, arm: arm.section),
    Column("score", **_same(lambda board: board.table.main)),
    Column("value", lambda board, arm: arm.interval.value, f"{{score}} {CI}",
           lambda board, arm: with_interval(arm.interval, number),
           published=lambda board, row: (number(row[board.table.main]), row[board.table.main])),
    Column("low", lambda board, arm: arm.interval.low),
    Column("high", lambda board, arm: arm.interval.high),
    Column("error", lambda board, arm: arm.interval.error),
    Column("seeds", lambda board, arm: arm.seeds),
    Column("subsets", lambda board, arm: arm.subsets),
    Column("subjects", lambda board, arm: arm.runs.subjects),
    Column("reference", _reference),
    Column("gain", lambda board, arm: arm.gain and arm.gain.value, f"gain over {{reference}} {CI}",
           lambda board, arm: gain_text(arm.gain),
           lambda arm: _difference_tone(arm.gain, arm.p_holm)),
    Column("gain_low", lambda board, arm: arm.gain and arm.gain.low),
    Column("gain_high", lambda board, arm: arm.gain and arm.gain.high),
    Column("gain_error", lambda board, arm: arm.gain and arm.gain.error),
    Column("gain_p", lambda board, arm: arm.gain and arm.gain.p),
    Column("gain_p_holm", lambda board, arm: arm.p_holm, "adjusted p",
           lambda board, arm: p_text(arm.p_holm)),
    Column("gain_detectable", lambda board, arm: _detectable(arm), "detectable gain",
           lambda board, arm: "" if _detectable(arm) is None else number(_detectable(arm))),
    Column("detectable", lambda board, arm: board.detectable),
    Column("imagenet_gain", lambda board, arm: arm.over_imagenet and arm.over_imagenet.value,
           f"gain over ImageNet {CI}", lambda board, arm: gain_text(arm.over_imagenet),
           lambda arm: _difference_tone(arm.over_imagenet, arm.p_imagenet_holm)),
    Column("imagenet_low", lambda board, arm: arm.over_imagenet and arm.over_imagenet.low),
    Column("imagenet_high", lambda board, arm: arm.over_imagenet and arm.over_imagenet.high),
    Column("imagenet_p_holm", lambda board, arm: arm.p_imagenet_holm, "adjusted p (ImageNet)",
           lambda board, arm: p_text(arm.p_imagenet_holm)),
    Column("flops", lambda board, arm: arm.first.flops(), "FLOPs", lambda board, arm: _flops_text(arm)),
    Column("seconds", lambda board, arm: seconds_of(arm), "time",
           lambda board, arm: _known(duration, seconds_of(arm), arm)),
    Column("peak_memory_bytes", lambda board, arm: memory_of(arm), "memory",
           lambda board, arm: _known(size, memory_of(arm), arm)),
    Column("pretraining_volumes", lambda board, arm: _data(arm).get("volumes")),
    Column("pretraining_datasets", lambda board, arm: _datasets(arm)),
    Column("seen_test_subjects", lambda board, arm: arm.flags.get("seen_test_subjects")),
    Column("seen_test_volumes", lambda board, arm: arm.flags.get("seen_test_volumes")),
    Column("saw_labels", lambda board, arm: arm.flags.get("saw_labels")),
    Column("unranked", lambda board, arm: "on the way" if arm.first.share is not None else arm.why_unranked,
           published=lambda board, row: ("", f"published: {row['source']}")),
    Column("names", _names),
    Column("notes", lambda board, arm: "; ".join(notes_of(board, arm)), "notes",
           lambda board, arm: "; ".join(notes_of(board, arm)),
           published=lambda board, row: (row["note"] or row["source"], row["note"] or row["source"])),
)  # fmt: skip
"""Columns of every table, in the order of the CSV; the page and the Markdown show those with a heading."""
