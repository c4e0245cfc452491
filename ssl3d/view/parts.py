"""Parts that the pages of `ssl3d view` share: the frame, facts, commands to type, tables of files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from ssl3d.amounts import count_of, printable
from ssl3d.pages import elements, palette
from ssl3d.pages.document import beside, document

MOST_FILES = 500
"""Most files of a table of what was refused or left out."""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page of `ssl3d view`."""
    body = "\n".join(part for part in [f"<h1>{escape(title)}</h1>", *parts] if part)
    return document(title, body, [beside(__package__, "view.css")], [beside(__package__, "view.js")])


def summary(lines: Iterable[str]) -> str:
    """Return the sentences that stand first in the page."""
    return f'<section class="answer" aria-label="Summary">{"".join(elements.paragraphs(lines))}</section>'


def facts(pairs: Mapping[str, str]) -> str:
    """Return short facts side by side, without those that are empty."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in pairs.items()
        if value
    )
    return f'<dl class="facts">{items}</dl>'


def commands(lines: Sequence[str]) -> str:
    """Return what to type next."""
    if not lines:
        return ""
    return f'<h2>What to type next</h2><pre class="next">{escape(chr(10).join(lines))}</pre>'


def settings(title: str, pairs: Mapping[str, str]) -> str:
    """Return a folded table of names and values."""
    if not pairs:
        return ""
    rows = [elements.Row(name, [elements.Cell(value, value)]) for name, value in pairs.items()]
    return folded(title, elements.table(title, ["name", "value"], rows))


def folded(title: str, inside: str) -> str:
    """Return a part of the page that is folded, but on paper."""
    return f'<details class="paper"><summary>{escape(title)}</summary>{inside}</details>'


def files(title: str, explained: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of files and reasons; an empty string where there are none.

    Args:
        title: Heading of the table.
        explained: What the files have in common, a sentence.
        rows: Path and reason of each.
    """
    if not rows:
        return ""
    reasons: dict[str, int] = {}
    for _, reason in rows:
        reasons[reason] = reasons.get(reason, 0) + 1
    shown = [
        elements.Row(printable(path), [elements.Cell(printable(why), why)])
        for path, why in rows[:MOST_FILES]
    ]
    more = f" The first {MOST_FILES:,} are shown." if len(rows) > MOST_FILES else ""
    common = sorted(reasons.items(), key=lambda pair: -pair[1])[:3]
    why = (
        "; ".join(f"{count:,} × {printable(reason)}" for reason, count in common)
        if len(reasons) < len(rows)
        else ""
    )
    said = f"{explained}{more}" + (f" Most often: {why}." if why else "")
    return (
        f"<h2>{escape(title)}: {count_of(len(rows), 'file')}</h2><p>{escape(said)}</p>"
        f"{elements.table(title, ['file', 'reason'], shown)}"
    )


def listed(path: Path, store: str = "") -> list[tuple[str, str]]:
    """Read a table of paths and reasons that `ssl3d prepare` or `ssl3d predict` wrote; none if missing.

    Args:
        path: The table.
        store: File name of the store whose rows are meant, where several stores share the table.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = [row for row in list(csv.reader(file))[1:] if len(row) > 1]
    return [(row[0], row[1]) for row in rows if not store or len(row) < 3 or row[2] == store]


def legend(titles: Mapping[int, str], boxes: str = "") -> str:
    """Return the colours and names of mask values, and of boxes where they have a name.

    Args:
        titles: Names of the mask values.
        boxes: Name of the boxes; empty where there are none.
    """
    items = "".join(
        f'<i class="swatch" style="background:{palette.colour(value)}"></i>{escape(printable(title))}'
        for value, title in titles.items()
    )
    if boxes:
        items += f'<i class="swatch" style="background:{palette.BOX}"></i>{escape(boxes)}'
    return f'<p class="legend">{items}</p>' if items else ""
