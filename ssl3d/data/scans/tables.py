"""Lists of any origin: CSV in whatever encoding and delimiter, what its cells mean, and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl3d.errors import DataError, is_transient
from ssl3d.json_files import parse_json

_MISSING = frozenset(("n/a", "na", "nan", "null", "none", "-", "<na>", "#n/a"))
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_LARGEST_JSON = 2**30  # bytes


class NotText(DataError):
    """A file that cannot be read as text."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The header and rows of a CSV.

    Attributes:
        header: Column in lower case -> the word in the file.
        rows: (line in the file, cells by column) of each row; a cell is as `cell` reads it.
        overfull: Number of rows with more cells than the header, where those hold anything.
        words_for_missing: Column -> number of its cells that say with a word that they hold nothing.
    """

    header: dict[str, str]
    rows: list[tuple[int, dict[str, str]]]
    overfull: int = 0
    words_for_missing: Counter[str] = dataclasses.field(default_factory=Counter)

    def columns(self, known: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Return the header's word for each known column; the first of its names counts."""
        return {
            name: next(self.header[alias] for alias in aliases if alias in self.header)
            for name, aliases in known.items()
            if any(alias in self.header for alias in aliases)
        }


def cell(text: str) -> str:
    """Return what a cell of a list says, without blanks around it; "" where tables write for nothing.

    So do BIDS (n/a), pandas (nan, <NA>, None), R (NA), databases (null) and spreadsheets (#N/A, -).

    Example:
        >>> [cell(text) for text in (" 007 ", "n/a", "NaN", "-", "1_0")]
        ['007', '', '', '', '1_0']
    """
    text = text.strip()
    return "" if text.lower() in _MISSING else text


def number(text: str) -> float | None:
    """Read a finite number as lists write it; None where a cell holds a word.

    Python's own reading takes more: 1_0 for 10, and infinity.

    Example:
        >>> [number(text) for text in ("10", "-2.50", "1e3", "1_0", "inf", "")]
        [10.0, -2.5, 1000.0, None, None, None]
    """
    value = float(text) if _NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def read_table(path: Path) -> Table:
    """Read a CSV that is delimited by commas, semicolons or tabs.

    Raises:
        NotText: The file cannot be read, or is no text.
    """
    text = read_text(path)
    head = text.split("\n", 1)[0]
    delimiter = max((",", ";", "\t"), key=head.count)
    # Not by str.splitlines, which cuts lines at more characters than a CSV does.
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, restval="")
    rows: list[tuple[int, dict[str, str]]] = []
    overfull, words = 0, Counter[str]()
    limit = csv.field_size_limit(max(len(text), 1))  # a cell of any length is one bad cell, not a bad list
    try:
        header = {(word or "").strip().lower(): word for word in reader.fieldnames or []}
        for row in reader:
            overfull += any(map(cell, row.pop(None, ())))
            read = {column: cell(content) for column, content in row.items()}
            words.update(column for column, content in row.items() if content.strip() and not read[column])
            rows.append((reader.line_num, read))
    except csv.Error as error:
        raise NotText(f"{path}: not a CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)
    return Table(header, rows, overfull, words)


def read_json(path: Path) -> Any:
    """Read a JSON file, in any encoding that `read_text` knows.

    Raises:
        NotText: The file cannot be read, is no JSON, or is larger than any list.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise NotText(f"{path}: {size:,} bytes of JSON; lists have at most {_LARGEST_JSON:,}")
        return parse_json(read_text(path))
    except OSError as error:
        if is_transient(error):
            raise
        raise NotText(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise NotText(f"{path}: not JSON ({error})") from error


def read_text(path: Path) -> str:
    """Read text in UTF-8, in UTF-16 with its mark, or in cp1252, which Excel writes in the West.

    Raises:
        NotText: The file cannot be read, or is in none of these.
    """
    if path.exists() and not path.is_file():  # to open a pipe is to wait for ever
        raise NotText(f"{path}: no regular file")
    try:
        content = path.read_bytes()
    except OSError as error:
        if is_transient(error):
            raise
        raise NotText(f"{path}: {error.strerror}") from error
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ("utf-16",) if marked else ("utf-8-sig", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise NotText(f"{path}: not text in UTF-8, UTF-16 or cp1252")
