"""The page of a folder of `ssl3d finetune`: scores, validation curves, settings, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl3d.amounts import count_of, printable
from ssl3d.errors import DataError
from ssl3d.evaluation.record_archive import result_files
from ssl3d.evaluation.records import Result, read_result
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
    tasks: dict[tuple[str, str, float], list[Result]] = {}
    for record in records:
        about = (record.task, ", ".join(map(str, record.dataset)), record.fraction)
        tasks.setdefault(about, []).append(record)
    body = [parts.summary([_best(own) for own in tasks.values()])]
    for (task, data, share), own in sorted(tasks.items()):
        part = "" if share == 1 else f", {share:g} of the training subjects"
        body.append(f"<h2>{escape(printable(f'{task} on {data}{part}'))}</h2>")
        body += [_scores(own), _curve(own)]
    body += [_pictures(folder), parts.commands(_next(folder))]
    body.append(parts.files("Not read", "These files are no records, or damaged ones.", refused))
    first = records[0]
    training = first.settings.get("training")
    if isinstance(training, Mapping):
        body.append(
            parts.settings("Settings of the first record", {k: str(v) for k, v in training.items()})
        )
    body.append(parts.settings("Versions", {name: str(value) for name, value in first.versions.items()}))
    return parts.page(str(folder), body), count_of(len(records), "record")


def _best(records: Sequence[Result]) -> str:
    first = records[0]
    best = max(records, key=lambda record: _finite(record.scores.get(first.main)))
    low, high = best.intervals.get(first.main, (NAN, NAN))
    ends = f" [{low:.3f}, {high:.3f}]" if low == low and high == high else ""
    subjects = (first.split.get("test") or {}).get("subjects", "?")
    return (
        f"{first.task} on {', '.join(map(str, first.dataset))}, {subjects} test subjects: the highest "
        f"{first.main} is {best.scores.get(first.main, NAN):.3f}{ends}, of {best.contestant['name']}."
    )


def _finite(value: float | None) -> float:
    return value if value is not None and value == value else float("-inf")


def _scores(records: Sequence[Result]) -> str:
    names = list(dict.fromkeys(name for record in records for name in record.scores))
    rows = []
    for record in sorted(records, key=lambda own: -_finite(own.scores.get(own.main))):
        cells = [elements.Cell(str(record.seed), record.seed)]
        for name in names:
            value = record.scores.get(name)
            known = value is not None and value == value
            cells.append(
                elements.Cell(f"{value:.3f}" if known else elements.UNKNOWN, value if known else None)
            )
        rows.append(elements.Row(str(record.contestant["name"]), cells))
    return elements.table(f"Scores of {records[0].task}", ["contestant", "seed", *names], rows)


def _curve(records: Sequence[Result]) -> str:
    """Draw the validation score of each record over its steps of training."""
    curves = []
    for record in records:
        details = record.compute.get("details")
        several = details if isinstance(details, list) else [details]
        for number, own in enumerate(several):
            points = [point for point in map(_point, (own or {}).get("curve") or ()) if point]
            if len(points) > 1:
                fold = f", fold {number}" if len(several) > 1 else ""
                curves.append(charts.Line(f"{record.contestant['name']}, seed {record.seed}{fold}", points))
    title = f"{records[0].main} of validation subjects over the steps of training"
    drawn = charts.lines(curves, "steps", records[0].main, title)
    return f'<div class="charts">{elements.figure(drawn, title + ".")}</div>' if drawn else ""


def _point(entry: Any) -> charts.Point | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("score"), int | float):
        return None
    return float(entry.get("step") or 0), float(entry["score"]), NAN, NAN


def _pictures(folder: Path) -> str:
    drawn = []
    for path in sorted(folder.glob("*.png"))[:MOST_PICTURES]:
        source = elements.inline(path)
        if source:
            picture = elements.image(source, f"Picture {path.name}")
            drawn.append(elements.figure(picture, printable(path.stem)))
    return f'<h2>Pictures</h2><div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _next(folder: Path) -> list[str]:
    models = [place for place in sorted((folder / "models").glob("*")) if not place.name.startswith(".")]
    lines = [f"ssl3d predict {place} --data SCANS --out predicted" for place in models[:3]]
    return [*lines, f"ssl3d leaderboard report {folder} --out report"]
