"""The cells of a leaderboard's tables, and the tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from ssl3d.api import duration, size
from ssl3d_benchmarks.leaderboard.report.answer import answer
from ssl3d_benchmarks.leaderboard.report.board import Arm, Board
from ssl3d_benchmarks.leaderboard.report.overall import Overall, no_overall
from ssl3d_benchmarks.leaderboard.report.records import Refused
from ssl3d_benchmarks.leaderboard.report.statistics import reference_of

COLUMNS = (
    "family", "table", "task", "version", "dataset", "fraction", "rank", "rank_low", "rank_high",
    "first_share", "contestant", "kind", "section", "score", "value", "low", "high", "error", "seeds",
    "subsets", "subjects", "reference", "gain", "gain_low", "gain_high", "gain_error", "gain_p",
    "gain_p_holm", "detectable", "imagenet_gain", "imagenet_low", "imagenet_high", "imagenet_p_holm",
    "flops", "seconds", "peak_memory_bytes", "pretraining_volumes", "pretraining_datasets",
    "seen_test_subjects", "seen_test_volumes", "saw_labels", "unranked", "names",
)  # fmt: skip


OVER_TASKS = (
    "An encoder that is on every task is one method, named by what it was pretrained on; 'own data' "
    "stands for another encoder on every task, each pretrained on the data of its task."
)


def csv_text(boards: Sequence[Board]) -> str:
    """Every row of every table, published ones and encoders on the way too, unrounded."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for board in boards:
        for arm in [*board.arms, *board.on_the_way]:
            writer.writerow({key: _plain(value) for key, value in _row(board, arm).items()})
        for one in board.table.published if board.fraction == 1 else ():
            table = board.table
            writer.writerow({
                "family": table.family, "table": table.title, "task": table.task,
                "dataset": " ".join(table.dataset), "fraction": 1, "contestant": one["name"],
                "kind": "published", "score": table.main, "value": one[table.main],
                "unranked": f"published: {one['source']}",
            })  # fmt: skip
    return out.getvalue()


def _row(board: Board, arm: Arm) -> dict[str, Any]:
    table, gain, over = board.table, arm.gain, arm.over_imagenet
    reference = reference_of(arm, board)
    data = arm.first.pretraining.get("data") or {}
    on_the_way = arm.first.share is not None
    return {
        "family": table.family, "table": table.title, "task": table.task, "version": table.version,
        "dataset": " ".join(table.dataset), "fraction": board.fraction, "rank": arm.rank,
        "rank_low": arm.rank_interval and arm.rank_interval[0],
        "rank_high": arm.rank_interval and arm.rank_interval[1], "first_share": arm.first_share,
        "contestant": arm.label, "kind": arm.kind, "section": arm.section, "score": table.main,
        "value": arm.interval.value, "low": arm.interval.low, "high": arm.interval.high,
        "error": arm.interval.error, "seeds": arm.seeds, "subsets": arm.subsets,
        "subjects": arm.runs.subjects, "reference": reference.label if reference and gain else None,
        "gain": gain and gain.value, "gain_low": gain and gain.low, "gain_high": gain and gain.high,
        "gain_error": gain and gain.error, "gain_p": gain and gain.p, "gain_p_holm": arm.p_holm,
        "detectable": board.detectable, "imagenet_gain": over and over.value,
        "imagenet_low": over and over.low, "imagenet_high": over and over.high,
        "imagenet_p_holm": arm.p_imagenet_holm, "flops": arm.first.flops(), "seconds": seconds_of(arm),
        "peak_memory_bytes": memory_of(arm), "pretraining_volumes": data.get("volumes"),
        "pretraining_datasets": " ".join(data.get("datasets") or ()) or None,
        "seen_test_subjects": arm.flags.get("seen_test_subjects"),
        "seen_test_volumes": arm.flags.get("seen_test_volumes"), "saw_labels": arm.flags.get("saw_labels"),
        "unranked": "on the way" if on_the_way else arm.why_unranked,
        "names": " ".join(sorted({str(one.result.contestant["name"]) for one in arm.records()})),
    }  # fmt: skip


def markdown_text(
    title: str, boards: Sequence[Board], overall: Sequence[Overall], refused: Sequence[Refused],
    conditions: Sequence[tuple[str, str]],
) -> str:  # fmt: skip
    """The report without its pictures."""
    lines = [f"# {title}", ""]
    lines += [f"- {line}" for line in answer(boards)]
    for one in overall:
        lines += ["", f"## {one.family.capitalize()} over {len(one.boards)} tasks ({one.protocol})", ""]
        lines += ["| method | average rank [95 %] | first in |", "|---|---|---|"]
        lines += [
            f"| {_escaped(name)} | {average:.2f} [{low:.2f}, {high:.2f}] | {share:.0%} |"
            for name, average, (low, high), share in zip(
                one.methods, one.average, one.intervals, one.first_share, strict=True
            )
        ]
        lines += ["", OVER_TASKS, "", stability(one), "", left_out(one)]
    lines += [line for words in no_overall(boards) for line in ("", words)]
    for board in boards:
        lines += ["", f"## {heading(board)}", ""]
        loud = [*board.unlearned, *board.missing]
        lines += [f"**{note}**" for note in loud]
        if loud:
            lines.append("")
        lines += ["| " + " | ".join(headers(board)) + " |", "|" + "---|" * len(headers(board))]
        for arm in [*board.of_section("main"), *board.of_section("labels")]:
            lines.append("| " + " | ".join(_escaped(cell) for cell in cells(board, arm)) + " |")
        for row in published(board):
            lines.append("| " + " | ".join(_escaped(cell) for cell in row) + " |")
        lines += ["", told(board)]
        lines += [f"- {note}" for note in board.notes]
    lines += ["", "## Refused", ""]
    if refused:
        lines += ["| file | contestant | why |", "|---|---|---|"]
        lines += [f"| {_escaped(x.where)} | {_escaped(x.who)} | {_escaped(x.why)} |" for x in refused]
    else:
        lines.append("No record was refused.")
    lines += ["", "## Conditions", "", "| | |", "|---|---|"]
    lines += [f"| {_escaped(name)} | {_escaped(value)} |" for name, value in conditions]
    return "\n".join(lines) + "\n"


# Cells --------------------------------------------------------------------------------------------


def headers(board: Board) -> list[str]:
    """Of the columns of `cells`."""
    words = "scratch" if board.table.task.startswith("finetune") else "untrained"
    return [
        "rank", "contestant", f"{board.table.main} [95 %]", f"over {words} [95 %]", "p (Holm)",
        "over ImageNet [95 %]", "p (Holm) ", "smallest detectable", "FLOPs", "time", "memory",
        "notes",
    ]  # fmt: skip


def cells(board: Board, arm: Arm) -> list[str]:
    """A row of a board."""
    gain, over = arm.gain, arm.over_imagenet
    detectable = f"{gain.detectable:.3f}" if gain and isfinite(gain.detectable) else ""
    flops = arm.first.flops()
    unknown = "–" if flops else ""
    return [
        rank_text(arm),
        arm.label,
        f"{_number(arm.interval.value)} [{_number(arm.interval.low)}, {_number(arm.interval.high)}]",
        f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" if gain else "",
        p_text(arm.p_holm),
        f"{over.value:+.3f} [{over.low:+.3f}, {over.high:+.3f}]" if over else "",
        p_text(arm.p_imagenet_holm),
        detectable,
        f"{flops:.2g}".replace("e+", "e") if flops else "",
        _known(duration, seconds_of(arm)) or unknown,
        _known(size, memory_of(arm)) or unknown,
        "; ".join(notes(board, arm)),
    ]


def published(board: Board) -> list[list[str]]:
    """Rows of published numbers, on the whole training data."""
    if board.fraction != 1:
        return []
    blank = [""] * (len(headers(board)) - 4)
    return [
        ["published", one["name"], f"{one[board.table.main]:.3f}", *blank, one["note"] or one["source"]]
        for one in board.table.published
    ]


def rank_text(arm: Arm) -> str:
    """Rank with the range that resampling gives it."""
    if arm.rank is None:
        return "not ranked" if arm.why_unranked not in ("no network", "") else "-"
    rank = f"{arm.rank:g}"
    if arm.rank_interval:
        low, high = arm.rank_interval
        rank += f" ({low:g}–{high:g})"
    return f"{rank}, with labels" if arm.section == "labels" else rank


def notes(board: Board, arm: Arm) -> list[str]:
    """What has to be known about a row."""
    found = []
    if arm.why_unranked and arm.why_unranked != "no network":
        found.append(f"NOT RANKED: {arm.why_unranked}")
    if arm.section == "labels":
        found.append("pretrained with labels: ranked apart")
    if arm.kind == "trivial":
        below = sum(1 for one in board.ranked() if one.interval.value < arm.interval.value)
        total = len(board.ranked())
        found.append(f"no network; {below} of {total} networks are below it" if below else "no network")
        if arm.first.result.contestant.get("mask_classes"):
            found.append("from the true masks")
    if arm.seeds > 1:
        found.append(f"{arm.seeds} seeds")
    elif arm.kind != "trivial":
        found.append("1 seed")
    if arm.subsets > 1:
        found.append(f"{arm.subsets} subsets of the training subjects")
    return found


def heading(board: Board) -> str:
    """Of a board."""
    return ", ".join(part for part in (board.table.title, board.people) if part)


def about_published(board: Board) -> list[str]:
    """What published numbers are and where they come from, each source once."""
    if board.fraction != 1:
        return []
    sources: dict[str, list[str]] = {}
    for one in board.table.published:
        told = f"{one['source']}. {one['note']}".strip() if one["note"] else one["source"]
        sources.setdefault(told, []).append(one["name"])
    if len(sources) == 1:
        return [f"Published: {next(iter(sources))}"]
    return [f"Published ({', '.join(names)}): {told}" for told, names in sources.items()]


def told(board: Board) -> str:
    """What a board was made from, and what it can tell."""
    result = board.arms[0].first.result
    train, tested = result.split.get("train", {}), result.split.get("test", {})
    text = (
        f"Version {board.table.version}; {train.get('subjects', '?')} of "
        f"{train.get('of_subjects', '?')} training "
        f"subjects, {tested.get('subjects', '?')} test subjects ({tested.get('volumes', '?')} volumes), "
        f"{result.split.get('how', 'split unknown')}."
    )
    if board.table.differs:
        text = f"Here: {board.table.differs}. {text}"
    if not board.of_kind("imagenet"):
        text += " No ImageNet conversion to compare with."
    if board.detectable is not None:
        text += (
            f" Smallest true difference that this test set shows with power .8: {board.detectable:.3f} "
            f"{board.table.main}; smaller gains than that are mostly noise or luck."
        )
    return text


def stability(one: Overall) -> str:
    """How much an order is worth."""
    text = (
        f"In {one.changes:.0%} of the resamples of subjects and seeds the order is another "
        f"(Kendall's tau with it: {one.tau:.2f} on average)."
    )
    if one.critical is None:
        text += f" No critical-difference picture: {len(one.boards)} tasks, six are needed."
    else:
        text += f" Friedman p = {p_text(one.critical.p)}; critical difference "
        text += f"{one.critical.difference:.2f} (Nemenyi)."
    return text


def left_out(one: Overall) -> str:
    """Which tasks do not count, and who is not on every task that does."""
    told = []
    if one.tasks_left_out:
        told.append(
            "Left out, for less than half of the contestants that the other tasks share are there: "
            f"{'; '.join(one.tasks_left_out)}."
        )
    if one.left_out:
        told.append(f"Not on every task, so not here: {'; '.join(one.left_out)}.")
    return " ".join(told)


def p_text(p: float | None) -> str:
    """A p-value."""
    if p is None or not isfinite(p):
        return ""
    return (
        "< .0001"
        if p < 1e-4
        else f"{p:.4f}".lstrip("0")
        if p < 0.01
        else f"{p:.3f}".lstrip("0")
        if p < 1
        else "1"
    )


def seconds_of(arm: Arm) -> float | None:
    """Wall time of the pretraining, where its checkpoint says."""
    compute = arm.first.pretraining.get("compute") or {}
    found = compute.get("seconds") or arm.first.pretraining.get("seconds")
    return float(found) if found else None


def memory_of(arm: Arm) -> float | None:
    """Peak memory of the pretraining, in bytes."""
    found = (arm.first.pretraining.get("compute") or {}).get("peak_memory")
    return float(found) if found else None


def _known(words: Callable[[float], str], amount: float | None) -> str:
    return words(amount) if amount else ""


def _number(value: float) -> str:
    return f"{value:.3f}" if isfinite(value) else "–"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return ""
    return "" if value is None else value


def _escaped(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
