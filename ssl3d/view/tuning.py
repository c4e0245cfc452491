"""The page of a folder of `ssl3d finetune`: scores, validation curves, settings, and what to type next."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl3d.amounts import count_of, printable
from ssl3d.errors import DataError
from ssl3d.evaluation.record_archive import result_files
from ssl3d.evaluation.records import Result, read_result
from ssl3d.evaluation.result_tables import (
    describe_table,
    kind_words,
    leak_words,
    seen_test_subjects,
    settings_numbers,
    tables_of,
)
from ssl3d.pages import charts, elements
from ssl3d.view import parts

MOST_PICTURES = 24
"""Most pictures beside the records that are shown."""
NAN = float("nan")


def tuning_page(folder: Path) -> tuple[str, str]:
    """Return the page of a folder of records, and a line that says what is in it.

    Args:
        folder: Folder that a benchmark wrote, such as `ssl3d finetune`.

    Raises:
        DataError: None of the records can be read.
    """
    records: list[Result] = []
    refused: list[tuple[str, str]] = []
    for path in result_files(folder):
        try:
            records.append(read_result(path))
        except DataError as error:
            refused.append((str(path), str(error)))
    if not records:
        raise DataError(f"{folder}: none of its {len(refused)} records can be read: {refused[0][1]}")
    tables = tables_of(records)
    described = [describe_table(own) for own in tables]
    leaks = [_leaked(row, table) for table in described for row in table["rows"]]
    body = [parts.summary(map(_sentence, described)), *elements.warnings(filter(None, leaks))]
    body.append(parts.commands(_next(folder)))
    for own, table in zip(tables, described, strict=True):
        body.append(f"<h2>{escape(printable(table['title']))}</h2>")
        body += [_scores(own, table), _curve(own)]
    body.append(_pictures(folder))
    body.append(parts.files("Not read", "These files are no records, or damaged ones.", refused))
    first = records[0]
    training = first.settings.get("training")
    if isinstance(training, Mapping):
        body.append(
            parts.settings("Settings of the first record", {k: str(v) for k, v in training.items()})
        )
    body.append(parts.settings("Versions", {name: str(value) for name, value in first.versions.items()}))
    return parts.page(str(folder), body), count_of(len(records), "record")


def _sentence(table: Mapping[str, Any]) -> str:
    """Say how good the best network is, beside the same network from scratch and what needs no network."""
    main, rows = table["main"], table["rows"]
    subjects = count_of(int(table["test_subjects"] or 0), "test subject")
    ranked = [row for row in rows if not row["seen_test_subjects"]]
    if not ranked:
        return f"{table['title']}, {subjects}: no contestant is ranked."
    networks = [row for row in ranked if row["kind"] != "trivial"]
    best = (networks or ranked)[0]
    low, high = best["intervals"].get(main, (NAN, NAN))
    ends = f" [{low:.3f}, {high:.3f}]" if low == low and high == high else ""
    words = [f"{_named(best, table)} has the highest {main}, {_value(best, main)}{ends}"]
    for kind in ("untrained", "trivial"):
        others = [row for row in rows if row["kind"] == kind and row is not best]
        words += [f"{_named(row, table)} {_value(row, main)}" for row in others[:1]]
    sentence = f"{table['title']}, {subjects}: {'; '.join(words)}."
    if networks and ranked[0]["kind"] == "trivial":
        sentence += " No network is better than what needs none: train longer, or look at the recipe."
    return sentence


def _leaked(row: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """Say that a row's pretraining saw test subjects; nothing where it saw none."""
    if not row["seen_test_subjects"]:
        return ""
    seen = count_of(row["seen_test_subjects"], "test subject")
    return f"{table['title']}: {_named(row, table)} is not ranked, since its pretraining saw {seen}."


def _named(row: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    about = kind_words(row["kind"], table["task"], row["settings"])
    return f"{row['contestant']}{f' ({about})' if about else ''}"


def _value(row: Mapping[str, Any], name: str) -> str:
    value = row["scores"].get(name, NAN)
    return f"{value:.3f}" if value == value else "undefined"


def _finite(value: float | None) -> float:
    return value if value is not None and value == value else float("-inf")


def _scores(records: Sequence[Result], table: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys([records[0].main, *(name for record in records for name in record.scores)]))
    several = len({(record.seed, record.repeat) for record in records}) > 1
    rows = []
    numbers = settings_numbers(records)
    ordered = sorted(
        zip(records, numbers, strict=True), key=lambda own: -_finite(own[0].scores.get(own[0].main))
    )
    for record, number in ordered:
        cells = [elements.Cell(f"{record.seed}, {record.repeat}", record.seed)] if several else []
        for name in names:
            value = record.scores.get(name)
            known = value is not None and value == value
            cells.append(
                elements.Cell(f"{value:.3f}" if known else elements.UNKNOWN, value if known else None)
            )
        kind = str(record.contestant["kind"])
        words = (kind_words(kind, record.task, number), leak_words(seen_test_subjects(record)))
        about, look = ", ".join(filter(None, words)), {"untrained": "k-scratch", "trivial": "k-trivial"}
        rows.append(elements.Row(str(record.contestant["name"]), cells, about, look.get(kind, "")))
    head = ["contestant", *["seed, subset"] * several, *names]
    return elements.table(f"Scores on the test subjects: {table['title']}", head, rows)


def _curve(records: Sequence[Result]) -> str:
    """Draw the validation score of each record over its steps of training."""
    curves = []
    for record, settings in zip(records, settings_numbers(records), strict=True):
        details = record.compute.get("details")
        several = details if isinstance(details, list) else [details]
        for number, own in enumerate(several):
            points = [point for point in map(_point, (own or {}).get("curve") or ()) if point]
            if len(points) > 1:
                fold = f", fold {number}" if len(several) > 1 else ""
                seed = f", seed {record.seed}" if len({own.seed for own in records}) > 1 else ""
                subset = f", subset {record.repeat}" if len({own.repeat for own in records}) > 1 else ""
                kind = f", settings {settings}" if settings else ""
                label = f"{record.contestant['name']}{kind}{seed}{subset}{fold}"
                curves.append(charts.Line(label, points))
    title = f"{records[0].main} of validation subjects over the steps of training"
    drawn = charts.lines(curves, "steps", records[0].main, title)
    return f'<div class="charts">{elements.figure(drawn, title + ".")}</div>' if drawn else ""


def _point(entry: Any) -> charts.Point | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("score"), int | float):
        return None
    return float(entry.get("step") or 0), float(entry["score"]), NAN, NAN


def _pictures(folder: Path) -> str:
    drawn = []
    shown = [path for path in sorted(folder.glob("*.png")) if not path.name.startswith("curves-")]
    for path in shown[:MOST_PICTURES]:  # the curves are drawn above
        source = elements.inline(path)
        if source:
            picture = elements.image(source, f"Picture {path.name}")
            drawn.append(elements.figure(picture, _caption(path.stem)))
    return f'<h2>Pictures</h2><div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _caption(stem: str) -> str:
    """Name a picture as its record is named, without the hash at its end."""
    words = re.sub(r"-[0-9a-f]{8}$", "", stem).replace("-median-and-worst", ": the median and the worst")
    return printable(words.replace("_", " "))


def _next(folder: Path) -> list[str]:
    models = [place for place in sorted((folder / "models").glob("*")) if not place.name.startswith(".")]
    lines = [f"ssl3d predict {place} --data SCANS --out predicted" for place in models[:3]]
    return [*lines, f"ssl3d leaderboard report {folder} --out report"]
