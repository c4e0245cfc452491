"""Lists as CSV: whatever encoding and delimiter a spreadsheet wrote them in."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ssl3d.errors import DataError


class NotText(DataError):
    """A file that cannot be read as text."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The header and rows of a CSV.

    Attributes:
        header: Column in lower case -> the word in the file.
        rows: (line in the file, cells by column) of each row.
        overfull: Number of rows with more cells than the header, where those hold anything.
    """

    header: dict[str, str]
    rows: list[tuple[int, dict[str, str]]]
    overfull: int = 0

    def columns(self, known: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Return the header's word for each known column; the first of its names counts."""
        return {
            name: next(self.header[alias] for alias in aliases if alias in self.header)
            for name, aliases in known.items()
            if any(alias in self.header for alias in aliases)
        }


def read_table(path: Path) -> Table:
    """Read a CSV that is delimited by commas, semicolons or tabs.

    Raises:
        NotText: The file cannot be read, or is no text.
    """
    text = read_text(path)
    head = text.split("\n", 1)[0]
    delimiter = max((",", ";", "\t"), key=head.count)
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, restval="")
    header = {(word or "").strip().lower(): word for word in reader.fieldnames or []}
    rows, overfull = [], 0
    try:
        for row in reader:
            overfull += any(cell.strip() for cell in row.pop(None, ()))
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise NotText(f"{path}: not a CSV ({error})") from error
    return Table(header, rows, overfull)


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
