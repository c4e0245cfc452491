"""What a report says in sentences, and the whole report as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from ssl3d.api import printable
from ssl3d_benchmarks.leaderboard.report.answer import answer
from ssl3d_benchmarks.leaderboard.report.board import Board
from ssl3d_benchmarks.leaderboard.report.columns import (
    Column,
    csv_columns,
    p_text,
    score_columns,
    shown_columns,
)
from ssl3d_benchmarks.leaderboard.report.overall import Overall, no_overall
from ssl3d_benchmarks.leaderboard.report.records import Refused

OVER_TASKS = (
    "An encoder that was scored on every task is one method and is named by the data that it was "
    "pretrained on. A method on 'own data' is a different encoder on every task, pretrained on the data "
    "of that task."
)
ABOUT_SCORES = (
    "All scores of the task, as means over seeds and subsets (↓: lower is better; –: undefined or not in "
    "the records). Only the first one ranks."
)


def csv_text(boards: Sequence[Board]) -> str:
    """Write every row of every table as CSV, published ones and encoders on the way too, unrounded."""
    columns = csv_columns(boards)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.key for column in columns])
    for board in boards:
        for arm in (*board.arms, *board.on_the_way):
            writer.writerow([_plain(column.sort_key(board, arm)) for column in columns])
        for row in published_rows(board):
            writer.writerow([_plain(column.published(board, row)[1]) for column in columns])
    return out.getvalue()


def markdown_text(
    title: str, boards: Sequence[Board], overall: Sequence[Overall], refused: Sequence[Refused],
    conditions: Sequence[tuple[str, str]],
) -> str:  # fmt: skip
    """Write the report without its pictures as Markdown."""
    lines = [f"# {title}", ""]
    lines += [f"- {line}" for line in answer(boards)]
    for ranks in overall:
        lines += ["", f"## {heading_over_tasks(ranks)}", ""]
        lines += [_line(("method", "average rank [95 % range]", "first in")), "|---|---|---|"]
        lines += [
            _line((name, f"{average:.2f} [{low:.2f}, {high:.2f}]", f"{share:.0%}"))
            for name, average, (low, high), share in zip(
                ranks.methods, ranks.average, ranks.intervals, ranks.first_share, strict=True
            )
        ]
        lines += ["", OVER_TASKS, "", stability(ranks), "", left_out(ranks)]
    lines += [line for words in no_overall(boards) for line in ("", words)]
    for board in boards:
        lines += ["", f"## {heading(board)}", ""]
        loud = [*board.unlearned, *board.missing]
        lines += [f"**{note}**" for note in loud]
        if loud:
            lines.append("")
        lines += _table_of(board, shown_columns())
        lines += ["", about(board)]
        lines += [f"- {note}" for note in board.notes]
        if columns := score_columns(board):
            lines += ["", ABOUT_SCORES, "", *_table_of(board, columns)]
    lines += ["", "## Refused records", ""]
    if refused:
        lines += [_line(("file", "contestant", "reason")), "|---|---|---|"]
        lines += [_line((record.where, record.who, record.why)) for record in refused]
    else:
        lines.append("No record was refused.")
    lines += ["", "## Conditions", "", "| | |", "|---|---|"]
    lines += [_line(pair) for pair in conditions]
    return "\n".join(map(_harmless, lines)) + "\n"


def _table_of(board: Board, columns: Sequence[Column]) -> list[str]:
    """Return the lines of a table of a board's contestants and published numbers in Markdown."""
    lines = [_line(column.heading_on(board) for column in columns), "|" + "---|" * len(columns)]
    for arm in (*board.of_section("main"), *board.of_section("labels")):
        lines.append(_line(column.cell(board, arm) for column in columns))
    for row in published_rows(board):
        lines.append(_line(column.published(board, row)[0] for column in columns))
    return lines


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


# Sentences ----------------------------------------------------------------------------------------


def heading(board: Board) -> str:
    """Return the heading of a board: its table, and the training subjects if not all were used."""
    return ", ".join(part for part in (board.table.title, board.people) if part)


def heading_over_tasks(ranks: Overall) -> str:
    """Return the heading of the ranks over the tasks of a family."""
    return f"{ranks.family.capitalize()} over {len(ranks.boards)} tasks ({ranks.protocol})"


def published_rows(board: Board) -> Sequence[Mapping[str, Any]]:
    """Return the published numbers that stand beside a board: none where fewer subjects were trained on."""
    return board.table.published if board.fraction == 1 else ()


def about_published(board: Board) -> list[str]:
    """Say what the published numbers of a board are and where they come from, each source once."""
    sources: dict[str, list[str]] = {}
    for row in published_rows(board):
        source = f"{row['source']}. {row['note']}".strip() if row["note"] else row["source"]
        sources.setdefault(source, []).append(row["name"])
    if len(sources) == 1:
        return [f"Published: {next(iter(sources))}"]
    return [f"Published ({', '.join(names)}): {source}" for source, names in sources.items()]


def about(board: Board) -> str:
    """Say what the numbers of a board were made from, and how small a difference they can show."""
    result = board.arms[0].first.result
    train, tested = result.split.get("train", {}), result.split.get("test", {})
    sentences = [f"This table has: {board.table.differs}."] if board.table.differs else []
    sentences.append(
        f"The networks learned from {train.get('subjects', '?')} of {train.get('of_subjects', '?')} "
        f"training subjects and were scored on {tested.get('subjects', '?')} test subjects "
        f"({tested.get('volumes', '?')} volumes); split: {result.split.get('how', 'unknown')}; task "
        f"version {board.table.version}."
    )
    if not board.of_kind("imagenet"):
        sentences.append("There is no ImageNet conversion to compare with.")
    if board.detectable is not None:
        sentences.append(
            "The smallest true gain that this test set detects with a power of 0.8 is "
            f"{board.detectable:.3f} {board.table.main} (median over the contestants). Do not read much "
            "into smaller gains: noise alone can make them."
        )
    return " ".join(sentences)


def stability(ranks: Overall) -> str:
    """Say how stable an order over tasks is under resampling."""
    sentences = [
        f"The order changes in {ranks.changes:.0%} of the resamples of subjects and seeds (mean "
        f"Kendall's tau between this order and that of a resample: {ranks.tau:.2f})."
    ]
    if ranks.critical is None:
        sentences.append(
            f"There is no critical-difference picture, because it needs six tasks and there are "
            f"{len(ranks.boards)}."
        )
    else:
        sentences.append(
            f"Friedman's test gives p = {p_text(ranks.critical.p)}, and Nemenyi's critical difference is "
            f"{ranks.critical.difference:.2f}."
        )
    return " ".join(sentences)


def left_out(ranks: Overall) -> str:
    """Say which tasks do not count, and which contestants were not scored on every task that does."""
    sentences = []
    if ranks.tasks_left_out:
        sentences.append(
            "These tasks do not count, because they have fewer than half of the contestants that the other "
            f"tasks share: {'; '.join(ranks.tasks_left_out)}."
        )
    if ranks.left_out:
        sentences.append(
            f"These contestants were not scored on every task and have no rank here: "
            f"{'; '.join(ranks.left_out)}."
        )
    return " ".join(sentences)


def _plain(value: Any) -> Any:
    """Return a cell of the CSV; a text that a spreadsheet would compute begins with an apostrophe."""
    if isinstance(value, str):
        text = printable(value)
        return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    if isinstance(value, float) and not isfinite(value):
        return ""
    return "" if value is None else value


def _escaped(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _harmless(line: str) -> str:
    """Return a line of Markdown in which no name can be HTML or a link, nor a line of its own."""
    return printable(line.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\("))
