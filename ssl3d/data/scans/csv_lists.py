"""CSV and TSV lists of scans, with subjects, labels, splits and masks."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from ssl3d.amounts import count_of
from ssl3d.data.scans.boxes import COLUMNS_OF_BOXES, add_boxes, lists_boxes
from ssl3d.data.scans.dataset_json import add_mask_labels, read_json_object
from ssl3d.data.scans.dicom import dicom_tags
from ssl3d.data.scans.folders import (
    dataset_name,
    first_few,
    in_class_folders,
    missing,
    missing_masks,
    walk,
)
from ssl3d.data.scans.found import Found, Scan, Wanted, modality_code
from ssl3d.data.scans.read import (
    OWN_TABLES,
    is_picture,
    is_slice,
    is_whole,
    stem_of,
    suffix_of,
    without_suffix,
)
from ssl3d.data.scans.series import from_dicom, nameless_patients
from ssl3d.data.scans.subjects import relative, split_of, subjects_of
from ssl3d.data.scans.tables import NotText, Table, number, read_table, read_text
from ssl3d.errors import DataError

_COLUMNS = {
    "path": ("path", "file", "filename", "image"),
    # The last three: as pandas writes DICOM's PatientID, as many spreadsheets have it, as BIDS has it.
    "subject": (
        "subject",
        "patient",
        "subject_id",
        "patient_id",
        "patientid",
        "patient id",
        "participant_id",
    ),
    "label": ("label", "class", "class_index", "diagnosis"),
    "split": ("split",),
    "mask": ("mask",),
    "ignore": ("ignore_mask",),
}


@dataclasses.dataclass(frozen=True)
class _Row:
    """A line of a list, with what its columns say of a scan."""

    line: int
    path: Path
    name: str
    subject: str
    label: int | float | str | None
    split: str
    mask: Path | None
    ignore: Path | None


def from_csv(path: Path, wanted: Wanted) -> Found:
    """Read the scans that a CSV lists, with what its columns say about them.

    A list of boxes (a line per box) says nothing of labels: those are the boxes' own.
    """
    contents = Found()
    table, columns = _table(path, wanted.label)
    root = _folder_of(path, table, columns)
    described = read_json_object(root / "dataset.json") if (root / "dataset.json").is_file() else {}
    wanted = dataclasses.replace(wanted, dataset=wanted.dataset or str(described.get("name") or ""))
    dataset = dataset_name(root, wanted)
    modality = _modality(described)
    add_mask_labels(contents, dataset, described)
    of_boxes = lists_boxes(path)
    seen: set[Path] = set()
    contents.notes += _unused(path, of_boxes, wanted.label)
    nameless: list[int] = []  # scans whose row names no subject
    for row in _rows(path, contents, of_boxes, wanted.label):
        if row.path in seen:
            if not of_boxes:
                contents.rejected.append((row.name, f"listed twice (line {row.line} of {path.name})"))
            continue
        seen.add(row.path)
        scan = _listed_scan(row, root, modality, contents, dataclasses.replace(wanted, dataset=dataset))
        if scan is not None:
            if not row.subject:
                nameless.append(len(contents.scans))
            contents.scans.append(_with_row(scan, row))
    if nameless:
        why = "no subject in " + count_of(len(nameless), "line")
        why = why if "subject" in columns else "no column subject"
        natural = wanted.colour == "rgb"
        contents.notes.append(f"{path.name}: {why}: {_name_subjects(contents, nameless, root, natural)}")
    if of_boxes:
        add_boxes(contents, path, wanted.box_readers)
    return contents


def _folder_of(path: Path, table: Table, columns: dict[str, str]) -> Path:
    """Return the folder that a list's paths are relative to: its own, or that of the file it links to.

    The latter only where nothing that the list names is beside the link.
    """
    if not path.is_symlink():
        return path.parent
    beside = path.resolve().parent
    names = [name for _, row in table.rows[:50] if (name := row[columns["path"]])]
    if any(os.path.exists(path.parent / name) for name in names):
        return path.parent
    return beside if any(os.path.exists(beside / name) for name in names) else path.parent


def _name_subjects(contents: Found, nameless: Sequence[int], root: Path, natural: bool) -> str:
    """Name subjects as in a folder for the scans (by position) without one; say from what.

    Subjects of DICOM are named by the PatientID. Natural pictures are each a subject of their own.
    """
    plain = [i for i in nameless if not is_slice(contents.scans[i].files[0][0])]
    files = [Path(os.path.abspath(contents.scans[i].files[0][0])) for i in plain]  # less `..`
    common = _common(files, Path(os.path.abspath(root)))
    whose = subjects_of(files, common, in_class_folders(files, common))
    for i, file in zip(plain, files, strict=True):
        own = natural and is_picture(file)
        subject = without_suffix(relative(file, common)) if own else whose[file]
        contents.scans[i] = dataclasses.replace(contents.scans[i], subject=subject)
    headers = {i: dicom_tags(contents.scans[i].files[0][0]) for i in sorted({*nameless} - {*plain})}
    blank = {
        i: (tag["study"], contents.scans[i].files[0]) for i, tag in headers.items() if not tag["patient"]
    }
    for i, subject in nameless_patients(blank, root).items():  # not each line by itself, as they were read
        contents.scans[i] = dataclasses.replace(contents.scans[i], subject=subject)
    origins = ["the names of files and folders"] if plain else []
    if len(blank) < len(headers):
        origins.append("DICOM's PatientID")
    if blank:
        origins.append("the folders of DICOM studies, as their PatientID is blank")
    count = count_of(len({contents.scans[i].subject for i in nameless}), "subject")
    return f"{count} taken from {' and '.join(origins)}"


def _common(files: Sequence[Path], root: Path) -> Path:
    """Return the list's folder, or where some files lie elsewhere a folder that holds them all."""
    if all(file.is_relative_to(root) for file in files):
        return root
    common = Path(os.path.commonpath([file.parent for file in files]))
    return common.parent if any(file.parent == common for file in files) else common


def _modality(described: dict[str, Any]) -> str:
    channels = described.get("channel_names") or described.get("modality") or {}
    values = list(channels.values()) if isinstance(channels, dict) else []
    return modality_code(str(values[0])) if len(values) == 1 else ""


def _listed_scan(row: _Row, root: Path, modality: str, contents: Found, wanted: Wanted) -> Scan | None:
    """Make the scan that a row names, without what else the row says; None if refused."""
    if row.path.is_dir():
        files = [file for file in walk(row.path) if is_slice(file)]
        by_folder: dict[Path, list[Path]] = defaultdict(list)
        for file in files:
            by_folder[file.parent].append(file)
        series = from_dicom(by_folder, root, wanted)
        contents.rejected += series.rejected
        if len(series.scans) != 1:
            contents.rejected.append((row.name, _which_series(series.scans, row.path)))
            return None
        return series.scans[0]
    if is_slice(row.path):
        series = from_dicom({row.path.parent: [row.path]}, root, wanted)
        contents.rejected += series.rejected
        if not series.scans and not series.rejected:
            contents.rejected.append(
                (row.name, "DICOM, but not a scan (a segmentation, a plan or a report)")
            )
        return series.scans[0] if series.scans else None
    if not is_whole(row.path):
        contents.rejected.append((row.name, "not a known format"))
        return None
    return Scan(
        id=f"{wanted.dataset}/{without_suffix(relative(row.path, root))}",
        dataset=wanted.dataset,
        subject=stem_of(row.path),
        source=relative(row.path, root),
        files=((row.path,),),
        modality=modality,
        named=True,
    )


def _which_series(scans: Sequence[Scan], folder: Path) -> str:
    """Say why a row that names a folder is of no use, and what to list instead."""
    if not scans:
        return "a folder without a DICOM series; a line names one file, or the folder of one series"
    first = [scan.files[0][0] for scan in scans]
    by_folder = Counter(path.parent for path in first)
    shown = ", ".join(
        f"{relative(path, folder)} and {count_of(len(scan.files[0]) - 1, 'more file')}"
        for scan, path in list(zip(scans, first, strict=True))[:3]
    ) + (", ..." if len(scans) > 3 else "")
    apart = all(count == 1 for count in by_folder.values())
    advice = (
        "list these folders instead, a line each"
        if apart
        else "move each series to a folder of its own, and list the one that is meant"
    )
    return f"a folder with {len(scans)} DICOM series ({shown}): {advice}"


def _with_row(scan: Scan, row: _Row) -> Scan:
    return dataclasses.replace(
        scan,
        subject=row.subject or scan.subject,
        label=row.label if row.label is not None else scan.label,
        split=row.split or scan.split,
        mask=row.mask or scan.mask,
        ignore=row.ignore or scan.ignore,
        named=True,
    )


def named_in(path: Path) -> Iterator[Path]:
    """Yield the files and folders that a CSV names, scans and masks, whether they exist or not.

    Raises:
        DataError: The list cannot be used.
    """
    table, columns = _table(path)
    folder = _folder_of(path, table, columns)
    for _, row in table.rows:
        for name in ("path", "mask", "ignore"):
            if name in columns and (named := row[columns[name]]):
                yield folder / named


def with_listing(contents: Found, root: Path, label: str = "") -> Found:
    """Add what one CSV beside the scans (`labels.csv`, `patients.csv`) says about them.

    A list of boxes is asked for subjects, splits and masks where there is no other; never for labels, as
    its labels are those of the boxes.
    """
    series = _series_folders(contents.scans, root)
    listings, of_boxes = _listings(contents, root, series)
    boxes = not listings
    listings = listings or of_boxes
    if len(listings) > 1:
        names = ", ".join(path.name for path in listings)
        contents.notes.append(
            f"{root}: several lists ({names}); none was used, give the one you mean as the source"
        )
    elif listings:
        said = Found()
        rows = {row.path.resolve(): row for row in _rows(listings[0], said, boxes, label)}
        contents.notes += said.notes
        if said.rejected:
            lines = [f"{name}: {reason}" for name, reason in said.rejected]
            contents.notes.append(
                f"{listings[0].name}: {count_of(len(lines), 'line')} not used ({first_few(lines)})"
            )
        named = {i: rows[folder] for folder, i in series.items() if folder in rows}
        matched = 0
        for i, scan in enumerate(contents.scans):
            row = None
            if scan.files[0] and scan.member is None:
                row = rows.get(scan.files[0][0].resolve()) or named.get(i)
            if row is not None:
                contents.scans[i] = _with_row(scan, row)
                matched += 1
        contents.notes.append(
            f"{listings[0].name}: what it says was added to {matched} of {len(contents.scans)} scans"
        )
        contents.notes += _unused(listings[0], boxes, label)
    return contents


def _listings(contents: Found, root: Path, series: Container[Path]) -> tuple[list[Path], list[Path]]:
    """Find the lists of scans in a folder, and the lists of boxes that say more of scans than boxes."""
    listings: list[Path] = []
    of_boxes: list[Path] = []
    for path in sorted(root.glob("*.csv")):
        try:
            names = _column(path, "path")
            boxes = lists_boxes(path)
        except NotText as error:
            contents.notes.append(f"{error}; not used")
            continue
        except DataError:
            continue
        if (
            names is None
            or path.name in OWN_TABLES
            or not any(_is_there(root / name, series) for name in names[:50])
        ):
            continue
        if not boxes:
            listings.append(path)
        elif any(_column(path, name) is not None for name in ("subject", "split", "mask", "ignore")):
            of_boxes.append(path)
    return listings, of_boxes


def _is_there(path: Path, series: Container[Path]) -> bool:
    """Tell whether a list's name is that of a file, or of the folder of a series."""
    return os.path.isfile(path) or (os.path.isdir(path) and path.resolve() in series)


def _series_folders(scans: Sequence[Scan], root: Path) -> dict[Path, int]:
    """Find the folders that hold one DICOM series and no more, with its position; a list may name them."""
    inside: dict[Path, set[int]] = defaultdict(set)
    for i, scan in enumerate(scans):
        if len(scan.files) == 1 and scan.files[0] and is_slice(scan.files[0][0]):
            for parent in {folder.resolve() for folder in {path.parent for path in scan.files[0]}}:
                for folder in (parent, *parent.parents):
                    if folder != root.resolve():
                        inside[folder].add(i)
    return {folder: next(iter(held)) for folder, held in inside.items() if len(held) == 1}


def _rows(path: Path, contents: Found, of_boxes: bool, label: str = "") -> Iterator[_Row]:
    """Yield the lines of a list whose files are there, without boxes' labels; reject the other lines."""
    table, columns = _table(path, label)
    folder = _folder_of(path, table, columns)
    if of_boxes:
        columns.pop("label", None)
    labels = _labels(path, table, columns)
    kind = label_type(labels)
    maskless: list[str] = []
    for place, (line, row) in enumerate(table.rows):
        values = {name: row[column] for name, column in columns.items()}
        name = values["path"]
        if not name:
            contents.rejected.append((f"{path.name}:{line}", "no path in this line"))
            continue
        target, mask, ignore = folder / name, values.get("mask", ""), values.get("ignore", "")
        if not os.path.exists(target):  # not `target.exists()`, which raises for a name that is too long
            why = missing(target) if os.path.islink(target) else "no such file"
            contents.rejected.append((name, f"line {line} of {path.name}: {why}"))
            continue
        lost = [own for own in (mask, ignore) if own and not os.path.exists(folder / own)]
        if lost:
            reason = f"line {line} of {path.name}: its mask {lost[0]} does not exist"
            contents.rejected.append((name, reason))
            maskless.append(f"{lost[0]} of {name}")
            continue
        if ignore and os.path.samefile(target, folder / ignore):  # else it would leave the scans as a mask
            reason = f"line {line} of {path.name}: its ignore_mask is the scan itself"
            contents.rejected.append((name, reason))
            continue
        split = split_of(values.get("split", ""))
        if split is None:
            raise DataError(
                f"{path}, line {line}: split {values['split']!r}; known: train, val, test, or nothing"
            )
        given = labels[place] if labels else ""
        yield _Row(
            line,
            target,
            name,
            values.get("subject", ""),
            kind(given) if given else None,
            split,
            folder / mask if mask else None,
            folder / ignore if ignore else None,
        )
    if maskless:
        contents.notes.append(missing_masks(path.name, maskless))


def _table(path: Path, label: str = "") -> tuple[Table, dict[str, str]]:
    """Read a list, and the header's word for each known column; `label` names the column of labels."""
    table = read_table(path)
    columns = table.columns(_COLUMNS)
    if label:
        if label.strip().lower() not in table.header:
            raise DataError(
                f"{path}: no column {label!r}, as --label has it (columns: {', '.join(table.header)})"
            )
        columns["label"] = table.header[label.strip().lower()]
    if "path" not in columns:
        raise DataError(
            f"{path}: no column `path` (columns: {', '.join(table.header) or 'none'}); "
            "expected path, and if you like subject, label, split, mask"
        )
    return table, columns


def _unused(path: Path, of_boxes: bool, label: str = "") -> list[str]:
    """Say what of a list is not used: a column's name may be misspelt, and then its labels are missed.

    Args:
        path: File of the list.
        of_boxes: Whether it lists boxes, whose columns are read elsewhere.
        label: Name of the column of labels, if it is none of the usual ones.
    """
    table, columns = _table(path, label)
    known = COLUMNS_OF_BOXES if of_boxes else frozenset()
    notes = []
    own = [word.strip() for key, word in table.header.items()
           if key and key not in known and word not in columns.values()]  # fmt: skip
    if own:
        more = {"label": ", or the column that --label names"}
        where = [f"{name}s are read from {', '.join(_COLUMNS[name])}{more.get(name, '')}"
                 for name in ("label", "subject") if name not in columns]  # fmt: skip
        hint = f" ({'; '.join(where)})" if where else ""
        notes.append(f"{path.name}: columns not used: {', '.join(own)}{hint}")
    if table.overfull:
        lines = "1 line has" if table.overfull == 1 else f"{table.overfull} lines have"
        notes.append(
            f"{path.name}: {lines} more cells than the header; what is in those was not read (a "
            "delimiter within a cell needs quotes around it)"
        )
    for name, column in columns.items():
        if table.words_for_missing[column] and not (of_boxes and name == "label"):
            count = count_of(table.words_for_missing[column], "cell")
            notes.append(f"{path.name}: {count} of n/a or the like in {column.strip()}, taken for none")
    if "label" in columns and not of_boxes:
        notes += _odd_labels(path, table, columns)
    return notes


def _odd_labels(path: Path, table: Table, columns: dict[str, str]) -> list[str]:
    """Note labels that are masks, or words among numbers, which make all of them words."""
    notes = []
    given = [row[columns["label"]] for _, row in table.rows]
    folder = _folder_of(path, table, columns)
    files = [label for label in given[:50] if suffix_of(Path(label)) and os.path.isfile(folder / label)]
    if files:
        notes.append(
            f"{path.name}: labels that are files, such as {files[0]}: each is taken for a class; "
            "masks are read from a column named mask"
        )
    written = zip(table.rows, _labels(path, table, columns), strict=True)
    labels = [(line, text) for (line, _), text in written if text]
    words = [(line, label) for line, label in labels if label_type([label]) is str]
    if words and 2 * len(words) <= len(labels):
        line, word = words[0]
        more = f" and {len(words) - 1} more" if len(words) > 1 else ""
        notes.append(
            f"{path.name}, line {line}: the label {word!r}{more} is no number, so the other labels, which "
            "are numbers, are names of classes too; correct it, or leave it empty"
        )
    return notes


def _labels(path: Path, table: Table, columns: dict[str, str]) -> list[str]:
    """Return the labels as written, with a point where the whole column has numbers with a decimal comma.

    A comma is a decimal one only where cells are not delimited by commas: there it may be a set of classes
    ("1,2").
    """
    if "label" not in columns:
        return []
    given = [row[columns["label"]] for _, row in table.rows]
    head = read_text(path).split("\n", 1)[0]
    known = [label for label in given if label]
    if head.count(",") < max(head.count(";"), head.count("\t")) and all(
        re.fullmatch(r"[+-]?[0-9]+(?:,[0-9]+)?", label) for label in known
    ):
        return [label.replace(",", ".") for label in given]
    return given


def _column(path: Path, name: str) -> list[str] | None:
    table, columns = _table(path)
    return [row[columns[name]] for _, row in table.rows] if name in columns else None


def label_type(values: Sequence[str]) -> Callable[[str], int | float | str]:
    """Choose the type of a column: int if all labels are whole numbers, float if all are numbers, else str.

    0.0 and 1.0 are whole: so pandas writes 0 and 1 of a column with gaps. What begins with zeros (007) is a
    code: without them it would be another.
    """
    numbers = [number(value) for value in values if value]
    if None in numbers or any(re.match("[+-]?0[0-9]", value) for value in values):
        return str
    return _whole if all(value is not None and value.is_integer() for value in numbers) else float


def _whole(text: str) -> int:
    return int(float(text))
