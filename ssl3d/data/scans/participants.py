"""The table of people of a BIDS data set, `participants.tsv`: labels of subjects, where asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ssl3d.amounts import count_of
from ssl3d.data.scans.csv_lists import label_type
from ssl3d.data.scans.found import Found
from ssl3d.data.scans.tables import NotText, read_table
from ssl3d.errors import DataError

TABLE = "participants.tsv"


def with_participants(contents: Found, root: Path, label: str = "") -> Found:
    """Give scans without a label that of their subject in `participants.tsv`, or say that it is there.

    Args:
        contents: Scans of the folder.
        root: Folder of the data set.
        label: Name of the column of labels; without it nothing is taken.

    Raises:
        DataError: A subject has two labels.
    """
    path = root / TABLE
    if not path.is_file():
        return contents
    try:
        table = read_table(path)
    except NotText as error:
        contents.notes.append(f"{error}; not used")
        return contents
    name = table.header.get("participant_id")
    rows = [(line, _subject(row[name]), row) for line, row in table.rows if row[name]] if name else []
    people = {subject for _, subject, _ in rows}
    column = table.header.get(label.strip().lower(), "") if label else ""
    others = [word.strip() for word in table.header.values() if word not in (name, column) and word.strip()]
    if not any(_subject(scan.subject) in people for scan in contents.scans) or not (others or column):
        return contents
    if column:
        given: dict[str, str] = {}
        for line, subject, row in rows:
            if row[column] and given.setdefault(subject, row[column]) != row[column]:
                raise DataError(f"{path}, line {line}: a second {label} of {subject}")
        kind = label_type(list(given.values()))
        known = 0
        for place, scan in enumerate(contents.scans):
            text = given.get(_subject(scan.subject))
            if scan.label is None and text:
                contents.scans[place] = dataclasses.replace(scan, label=kind(text))
                known += 1
        contents.notes.append(
            f"{TABLE}: labels of {known} of {count_of(len(contents.scans), 'scan')} from its column {label}"
        )
    else:
        contents.notes.append(
            f"{TABLE}: columns not used: {', '.join(others)}; --label NAME takes one as labels"
        )
    return contents


def _subject(text: str) -> str:
    return text.removeprefix("sub-")
