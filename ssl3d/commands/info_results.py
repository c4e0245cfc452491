"""What `ssl3d info` says of folders of records: of a probe, fine-tuning, a board; and its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.amounts import count_of
from ssl3d.data.scans.tables import number, read_table
from ssl3d.errors import DataError
from ssl3d.evaluation.result_tables import describe_table, kind_words, leak_words, tables_of

if TYPE_CHECKING:
    from ssl3d.evaluation.records import Result

SHOWN = 4
"""Scores beside the main one that stand in the table; JSON has all."""


def describe_results(path: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """Describe records in plain values: a table for each task, and the files that are no records.

    Raises:
        DataError: None of the files is a record.
    """
    from ssl3d.evaluation.records import read_result

    records: list[Result] = []
    refused = []
    for place in paths:
        try:
            records.append(read_result(place))
        except DataError as error:
            refused.append({"path": str(place), "reason": str(error).removeprefix(f"{place}: ")})
    if not records:
        raise DataError(f"{path}: none of its {len(refused)} records can be read: {refused[0]['reason']}")
    return {
        "kind": "results",
        "path": str(path),
        "records": len(records),
        "refused": refused,
        "tables": [describe_table(same) for same in tables_of(records)],
    }


def result_lines(info: dict[str, Any]) -> list[str]:
    """Return the lines that show records: a table for each task, best contestant first."""
    tables = count_of(len(info["tables"]), "table")
    lines = [f"{info['path']}: {count_of(info['records'], 'record')} in {tables}"]
    lines += [f"  refused {entry['path']}: {entry['reason']}" for entry in info["refused"][:20]]
    for table in info["tables"]:
        lines += [
            "",
            f"{table['title']} (version {table['version']}); {table['test_subjects']} test subjects",
        ]
        others = [name for name in table["rows"][0]["scores"] if name != table["main"]]
        head = ["contestant", f"{table['main']} [95 %]", *others[:SHOWN], "records", ""]
        lines += _aligned([head, *(_cells(row, table, others[:SHOWN]) for row in table["rows"])])
        if others[SHOWN:]:
            lines.append(f"  and {', '.join(others[SHOWN:])} (--json has them)")
    return [*lines, "", f"gains, tests and ranks: ssl3d leaderboard report {info['path']}"]


def is_report(folder: Path) -> bool:
    """Tell whether `ssl3d leaderboard report` wrote a folder."""
    return (folder / "scores.csv").is_file() and (folder / "report.md").is_file()


def describe_report(folder: Path) -> dict[str, Any]:
    """Describe what `ssl3d leaderboard report` wrote in plain values: the rows of each of its tables.

    Raises:
        DataError: Its `scores.csv` is no such list.
    """
    tables: dict[str, list[dict[str, str]]] = {}
    for _, row in read_table(folder / "scores.csv").rows:
        if not {"table", "title", "score", "value"} <= set(row):
            raise DataError(f"{folder}: its scores.csv is not what ssl3d leaderboard report writes")
        tables.setdefault(row["table"], []).append(row)
    return {"kind": "report", "path": str(folder), "tables": tables}


def report_lines(info: dict[str, Any]) -> list[str]:
    """Return the lines that show a report: its tables in their own order, with gains where there are."""
    lines = [f"{info['path']}: a report of {count_of(len(info['tables']), 'table')}: index.html"]
    for title, rows in info["tables"].items():
        head = ["contestant", f"{rows[0]['score']} [95 %]", "gain [95 %]"]
        shown = [[row["title"], _spanned(row, "value", ""), _spanned(row, "gain", "gain_")] for row in rows]
        lines += ["", title, *_aligned([head, *shown])]
    return lines


def _spanned(row: Mapping[str, str], name: str, prefix: str) -> str:
    value, low, high = (number(row.get(key, "")) for key in (name, f"{prefix}low", f"{prefix}high"))
    ends = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{value:.3f}{ends}" if value is not None else "-"


def _cells(row: dict[str, Any], table: dict[str, Any], others: Sequence[str]) -> list[str]:
    main = table["main"]
    low, high = row["intervals"].get(main, (math.nan, math.nan))
    ends = f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) and math.isfinite(high) else ""
    words = (kind_words(row["kind"], table["task"], row["settings"]), leak_words(row["seen_test_subjects"]))
    return [
        row["contestant"],
        f"{_number(row['scores'].get(main))}{ends}",
        *(_number(row["scores"].get(name)) for name in others),
        str(row["records"]),
        ", ".join(filter(None, words)),
    ]


def _number(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and math.isfinite(value) else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
