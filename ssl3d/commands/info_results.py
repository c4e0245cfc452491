"""What `ssl3d info` says of folders of records: results of a probe, of fine-tuning, or a whole board."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.amounts import count_of
from ssl3d.errors import DataError

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
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for record in records:
        about = (record.task, record.version, _datasets(record), record.split_digest)
        groups.setdefault((*about, record.fraction, str(_slices(record))), []).append(record)
    return {
        "kind": "results",
        "path": str(path),
        "records": len(records),
        "refused": refused,
        "tables": [_table(same) for _, same in sorted(groups.items(), key=lambda item: str(item[0]))],
    }


def _table(records: Sequence[Result]) -> dict[str, Any]:
    first = records[0]
    by_name: dict[str, list[Result]] = {}
    for record in records:
        by_name.setdefault(str(record.contestant["name"]), []).append(record)
    rows = [_row(name, same) for name, same in by_name.items()]
    main = first.main
    rows.sort(key=lambda row: -row["scores"][main] if math.isfinite(row["scores"][main]) else math.inf)
    return {
        "task": first.task,
        "version": first.version,
        "datasets": list(_datasets(first)),
        "main": main,
        "fraction": first.fraction,
        "annotated_slices": _slices(first),
        "test_subjects": first.split.get("test", {}).get("subjects"),
        "rows": rows,
    }


def _row(name: str, records: Sequence[Result]) -> dict[str, Any]:
    from ssl3d.evaluation.statistics import bounds_of, class_support, why_no_interval

    names = dict.fromkeys(score for record in records for score in record.scores)
    scores = {
        score: sum(record.scores.get(score, math.nan) for record in records) / len(records)
        for score in names
    }
    # Older records have intervals of classes with too few test subjects, and of scores at a bound.
    sure = len(records) == 1 and not why_no_interval(class_support(records[0].predictions), 0.0)
    ends = records[0].intervals if sure else {}
    return {
        "contestant": name,
        "kind": records[0].contestant["kind"],
        "records": len(records),
        "scores": scores,
        "intervals": {
            score: list(own)
            for score, own in ends.items()
            if own[0] != own[1] or own[0] not in bounds_of(score)
        },
    }


def _datasets(record: Result) -> tuple[str, ...]:
    names: Any = record.dataset
    return (names,) if isinstance(names, str) else tuple(map(str, names))


def _slices(record: Result) -> int:
    task = record.settings.get("task")
    return int(task.get("sparse_slices") or 0) if isinstance(task, dict) else 0


def result_lines(info: dict[str, Any]) -> list[str]:
    """Return the lines that show records: a table for each task, best contestant first."""
    tables = count_of(len(info["tables"]), "table")
    lines = [f"{info['path']}: {count_of(info['records'], 'record')} in {tables}"]
    lines += [f"  refused {entry['path']}: {entry['reason']}" for entry in info["refused"][:20]]
    for table in info["tables"]:
        part = "" if table["fraction"] == 1 else f", {table['fraction']:g} of the training subjects"
        if table["annotated_slices"]:
            part += f", {table['annotated_slices']} annotated slices a volume"
        lines += [
            "",
            f"{table['task']} v{table['version']} on {', '.join(table['datasets'])}{part}; "
            f"{table['test_subjects']} test subjects",
        ]
        others = [name for name in table["rows"][0]["scores"] if name != table["main"]]
        head = ["contestant", f"{table['main']} [95 %]", *others[:SHOWN], "records"]
        lines += _aligned([head, *(_cells(row, table["main"], others[:SHOWN]) for row in table["rows"])])
        if others[SHOWN:]:
            lines.append(f"  and {', '.join(others[SHOWN:])} (--json has them)")
    return [*lines, "", f"gains, tests and ranks: ssl3d leaderboard report {info['path']}"]


def _cells(row: dict[str, Any], main: str, others: Sequence[str]) -> list[str]:
    low, high = row["intervals"].get(main, (math.nan, math.nan))
    ends = f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) and math.isfinite(high) else ""
    return [
        row["contestant"],
        f"{_number(row['scores'].get(main))}{ends}",
        *(_number(row["scores"].get(name)) for name in others),
        str(row["records"]),
    ]


def _number(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and math.isfinite(value) else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
