"""Elements of a page: tables that can be sorted, paragraphs, warnings, figures and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

UNKNOWN = "–"
"""Text of a cell without a value."""
PICTURE_WIDTH = 900
"""Largest width of a picture in the page, in pixels."""
_LARGEST_PICTURE = 1 << 26  # pixels, four times those of the largest page that is drawn


class Cell(NamedTuple):
    """A cell of a table in the page.

    Attributes:
        text: Words that are shown.
        key: Number or text to sort by; None for a cell that is last in either order.
        tone: CSS class, or an empty string.
    """

    text: str
    key: Any = None
    tone: str = ""


class Row(NamedTuple):
    """A row of a table in the page.

    Attributes:
        name: Words in the first column.
        cells: Cells of the other columns.
        about: What stands below the name, always in sight.
        kind: CSS class, or an empty string.
        settings: What is shown at a click on the name.
    """

    name: str
    cells: Sequence[Cell]
    about: str = ""
    kind: str = ""
    settings: str = ""


def table(caption: str, head: Sequence[str], rows: Sequence[Row], heat: bool = False) -> str:
    """Return a table that the script can sort: every cell has its key, and without one it stays last.

    Args:
        caption: Caption of the table, as text; so is all else.
        head: Headings of the columns.
        rows: Rows with as many cells as there are columns after the first.
        heat: Whether cells are coloured by their keys, from 0 to 1.

    Example:
        >>> 'data-v="0.5">.50</td>' in table("Dice", ["scan", "Dice"], [Row("a", [Cell(".50", 0.5)])])
        True
    """
    right = [any(_is_number(row.cells[k]) for row in rows) for k in range(len(head) - 1)]
    columns = f'<th scope="col">{escape(head[0])}</th>' + "".join(
        f'<th scope="col"{" class=n" * number}>{escape(name)}</th>'
        for name, number in zip(head[1:], right, strict=True)
    )
    body = "".join(_row(row, right, heat) for row in rows)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption, quote=True)}">'
        f'<table class="sort"><caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(row: Row, right: Sequence[bool], heat: bool) -> str:
    below = f"<small>{escape(row.about)}</small>" if row.about else ""
    words = escape(row.name)
    if row.settings:
        words = f"<details><summary>{words}</summary><small>{escape(row.settings)}</small></details>"
    name = f'<th scope="row" data-v="{escape(row.name, quote=True)}">{words}{below}</th>'
    kind = f' class="{row.kind}"' if row.kind else ""
    cells = "".join(_cell(cell, number, heat) for cell, number in zip(row.cells, right, strict=True))
    return f"<tr{kind}>{name}{cells}</tr>"


def _cell(cell: Cell, right: bool, heat: bool) -> str:
    look, style = ["n"] * right, ""
    if heat and cell.key is not None:
        share = int(60 * float(cell.key))
        style = f' style="background:color-mix(in srgb,var(--accent) {share}%,transparent)"'
    look += [cell.tone] * bool(cell.tone)
    classes = f' class="{" ".join(look)}"' if look else ""
    undefined = cell.key is None or (isinstance(cell.key, float) and not isfinite(cell.key))
    key = escape("" if undefined else str(cell.key), quote=True)
    return f'<td{classes}{style} data-v="{key}">{escape(cell.text)}</td>'


def _is_number(cell: Cell) -> bool:
    return isinstance(cell.key, int | float) or cell.text in ("-", UNKNOWN)


def paragraphs(lines: Iterable[str]) -> list[str]:
    """Return a paragraph of each line of text."""
    return [f"<p>{escape(line)}</p>" for line in lines]


def small(lines: Iterable[str]) -> list[str]:
    """Return a paragraph in small letters of each line of text."""
    return [f"<p><small>{escape(line)}</small></p>" for line in lines]


def warnings(lines: Iterable[str]) -> list[str]:
    """Return a box that stands out for each line of text."""
    return [f'<p class="loud" role="note">{escape(line)}</p>' for line in lines]


def figure(picture: str, caption: str) -> str:
    """Put a caption below a picture; without a picture, return an empty string.

    Args:
        picture: Picture as HTML.
        caption: Caption as text.
    """
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>" if picture else ""


def image(source: str, about: str) -> str:
    """Return a picture that is there as soon as the page is, on a screenshot and on paper too.

    Args:
        source: Data URI of the picture.
        about: What the picture shows, for readers who cannot see it.
    """
    return f'<img alt="{escape(about, quote=True)}" src="{source}">'


def inline(path: Path) -> str | None:
    """Return a picture of a file, down-sized, as a data URI; None where it cannot be read."""
    from PIL import Image

    if not path.is_file():  # to open a pipe is to wait for ever
        return None
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > _LARGEST_PICTURE:
                return None
            plain = picture.convert("RGB")
    except Exception:  # Pillow raises nearly anything on damaged files
        return None
    if plain.width > PICTURE_WIDTH:
        height = max(1, round(plain.height * PICTURE_WIDTH / plain.width))
        plain = plain.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    return data_uri(plain, "JPEG", quality=72, optimize=True)


def data_uri(picture: Any, kind: str, **options: Any) -> str:
    """Encode a picture of Pillow's as a data URI.

    Args:
        picture: Picture to encode.
        kind: Format, JPEG or PNG.
        options: Options of that format.
    """
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
