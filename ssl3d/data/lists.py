"""Sources that say themselves what they hold: `dataset.json`, CSV files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.data import sources
from ssl3d.data.boxes import COLUMNS_OF_BOXES
from ssl3d.data.dicom import is_dicom
from ssl3d.data.normalize import modality_code
from ssl3d.data.progress import count_of
from ssl3d.data.read import ITK, NIFTI, PICTURES, stem_of, suffix_of
from ssl3d.data.series import from_dicom
from ssl3d.data.sources import Found, Scan, Wanted, dataset_name, relative, walk
from ssl3d.data.tables import NotText, Table, read_table
from ssl3d.errors import DataError

_COLUMNS = {
    "path": ("path", "file", "filename", "image"),
    "subject": ("subject", "patient", "subject_id", "patient_id"),
    "label": ("label", "class", "class_index", "diagnosis"),
    "split": ("split",),
    "mask": ("mask",),
}


# dataset.json -------------------------------------------------------------------------------------


def from_dataset_json(root: Path, wanted: Wanted) -> Found:
    """A Medical Segmentation Decathlon or nnU-Net folder: `imagesTr`, `labelsTr`, `imagesTs`."""
    described = _json(root / "dataset.json")
    channels = described.get("channel_names") or described.get("modality") or {}
    if not isinstance(channels, dict):
        channels = dict(enumerate(channels if isinstance(channels, list) else [channels]))
    names = tuple(str(channels[key]) for key in sorted(channels, key=lambda k: int(k)))
    listed = described.get("training")
    named = dataclasses.replace(wanted, dataset=wanted.dataset or str(described.get("name") or ""))
    if isinstance(listed, list) and listed and isinstance(listed[0], dict):
        found = _from_listed(root, named, described, names)
    else:
        found = from_nnunet(root, named, names)
    labels = described.get("labels") or {}
    if isinstance(labels, dict):
        numbered = all(str(key).isdigit() for key in labels)
        pairs = labels.items() if numbered else ((v, k) for k, v in labels.items())
        found.label_names[dataset_name(root, named)] = {str(value): str(name) for value, name in pairs}
    return found


def _from_listed(root: Path, wanted: Wanted, described: dict[str, Any], names: tuple[str, ...]) -> Found:
    found = Found()
    dataset = dataset_name(root, wanted)
    pairs = [(entry.get("image", ""), entry.get("label")) for entry in described["training"]]
    pairs += [
        (entry if isinstance(entry, str) else entry.get("image", ""), None)
        for entry in described.get("test") or []
    ]
    for image, label in pairs:
        path = root / image
        if not path.is_file():
            found.rejected.append((str(image), "listed in dataset.json, no such file"))
            continue
        mask = root / label if label else None
        if mask is not None and not mask.is_file():
            found.rejected.append((str(image), f"its mask {label}, listed in dataset.json, does not exist"))
            continue
        found.scans.append(_listed_scan(dataset, root, path, mask, names))
    return found


def _listed_scan(dataset: str, root: Path, path: Path, mask: Path | None, names: tuple[str, ...]) -> Scan:
    return Scan(
        id=f"{dataset}/{stem_of(path)}",
        dataset=dataset,
        subject=stem_of(path),
        source=relative(path, root),
        files=((path,),),
        channels=names or ("image",),
        frames_are_channels=len(names) > 1,
        mask=mask,
        modality=modality_code(names[0]) if names else "",
        named=True,
    )


def from_nnunet(root: Path, wanted: Wanted, names: tuple[str, ...] = ()) -> Found:
    """`imagesTr/CASE_0000.nii.gz` with one file per channel, `labelsTr/CASE.nii.gz`."""
    found = Found()
    dataset = dataset_name(root, wanted)
    for images, labels in (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs")):
        if not (root / images).is_dir():
            continue
        maps = {stem_of(path): path for path in walk(root / labels)} if (root / labels).is_dir() else {}
        cases: dict[str, dict[int, Path]] = defaultdict(dict)
        for path in walk(root / images):
            if suffix_of(path) not in (*NIFTI, *ITK, *PICTURES):
                continue
            channel = re.fullmatch(r"(.+)_(\d{4})", stem_of(path))
            if channel:
                cases[channel[1]][int(channel[2])] = path
            else:
                cases[stem_of(path)][0] = path
        count = max([len(names), *(max(case) + 1 for case in cases.values())], default=0)
        channels = names or (("image",) if count == 1 else tuple(f"channel{i}" for i in range(count)))
        if len(channels) < count:
            raise DataError(f"{root}: {count} channels in {images}, {len(channels)} named in dataset.json")
        for case, members in cases.items():
            first = members[min(members)]
            alone = len(members) == 1 and len(channels) > 1 and not re.search(r"_\d{4}$", stem_of(first))
            found.scans.append(
                Scan(
                    id=f"{dataset}/{case}",
                    dataset=dataset,
                    subject=case,
                    source=relative(first, root),
                    files=((first,),)
                    if alone
                    else tuple((members[i],) if i in members else () for i in range(len(channels))),
                    channels=channels,
                    frames_are_channels=alone,
                    mask=maps.get(case),
                    modality=modality_code(channels[0]),
                    named=True,
                )
            )
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected one JSON object")
    return content


# CSV ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
    line: int
    path: Path
    name: str
    subject: str
    label: int | float | str | None
    split: str
    mask: Path | None


def from_csv(path: Path, wanted: Wanted) -> Found:
    """The scans that a CSV lists, with what its columns say about them."""
    found = Found()
    root = path.parent
    described = _json(root / "dataset.json") if (root / "dataset.json").is_file() else {}
    wanted = dataclasses.replace(wanted, dataset=wanted.dataset or str(described.get("name") or ""))
    dataset = dataset_name(root, wanted)
    modality = _modality(described)
    if isinstance(described.get("labels"), dict) and all(str(k).isdigit() for k in described["labels"]):
        found.label_names[dataset] = {str(k): str(v) for k, v in described["labels"].items()}
    seen: set[Path] = set()
    found.notes += _unused(path)
    for row in _rows(path, found):
        if row.path in seen:
            found.rejected.append((row.name, f"listed twice (line {row.line} of {path.name})"))
            continue
        seen.add(row.path)
        found.scans += _listed_scans(row, root, dataset, modality, found, wanted)
    return found


def _modality(described: dict[str, Any]) -> str:
    channels = described.get("channel_names") or described.get("modality") or {}
    values = list(channels.values()) if isinstance(channels, dict) else []
    return modality_code(str(values[0])) if len(values) == 1 else ""


def _listed_scans(
    row: _Row, root: Path, dataset: str, modality: str, found: Found, wanted: Wanted
) -> list[Scan]:
    if row.path.is_dir():
        files = [file for file in walk(row.path) if is_dicom(file)]
        by_folder: dict[Path, list[Path]] = defaultdict(list)
        for file in files:
            by_folder[file.parent].append(file)
        series = from_dicom(by_folder, root, dataclasses.replace(wanted, dataset=dataset))
        found.rejected += series.rejected
        if len(series.scans) != 1:
            found.rejected.append(
                (row.name, f"a folder with {len(series.scans)} DICOM series; list one per line")
            )
            return []
        scan = series.scans[0]
        return [_with_row(scan, row)]
    if suffix_of(row.path) not in (*NIFTI, *ITK, *PICTURES) and not is_dicom(row.path):
        found.rejected.append((row.name, "not a known format"))
        return []
    scan = Scan(
        id=f"{dataset}/{relative(row.path, root).removesuffix(row.path.name) + stem_of(row.path)}",
        dataset=dataset,
        subject=stem_of(row.path),
        source=relative(row.path, root),
        files=((row.path,),),
        modality=modality,
        named=True,
    )
    return [_with_row(scan, row)]


def _with_row(scan: Scan, row: _Row) -> Scan:
    return dataclasses.replace(
        scan,
        subject=row.subject or scan.subject,
        label=row.label if row.label is not None else scan.label,
        split=row.split or scan.split,
        mask=row.mask or scan.mask,
        named=True,
    )


def named_in(path: Path) -> Iterator[Path]:
    """The files and folders that a CSV names, scans and masks, whether they exist or not.

    Raises:
        DataError: It cannot be used.
    """
    table, columns = _table(path)
    for _, row in table.rows:
        for name in ("path", "mask"):
            if name in columns and (named := row[columns[name]].strip()):
                yield path.parent / named


def named_in_json(path: Path) -> Iterator[Path]:
    """The scans and masks that a `dataset.json` lists, whether they exist or not.

    Raises:
        DataError: It is no JSON.
    """
    described = _json(path)
    for part in ("training", "test"):
        listed = described.get(part)
        for entry in listed if isinstance(listed, list) else ():
            names = entry.values() if isinstance(entry, dict) else [entry]
            yield from (path.parent / name for name in names if isinstance(name, str))


def with_listing(found: Found, root: Path) -> Found:
    """Adds what one CSV beside the scans (`labels.csv`, `patients.csv`) says about them."""
    listings = []
    for path in sorted(root.glob("*.csv")):
        try:
            mine = _column(path, "path")
        except NotText as error:
            found.notes.append(f"{error}; not used")
            continue
        except DataError:
            continue
        if (
            mine is not None
            and path.name != "rejected.csv"
            and any((root / name).is_file() for name in mine[:50])
        ):
            listings.append(path)
    if len(listings) > 1:
        names = ", ".join(path.name for path in listings)
        found.notes.append(
            f"{root}: several lists ({names}); none was used, give the one you mean as the source"
        )
    elif listings:
        rows = {row.path.resolve(): row for row in _rows(listings[0], Found())}
        matched = 0
        for i, scan in enumerate(found.scans):
            row = rows.get(scan.files[0][0].resolve()) if scan.files[0] and scan.member is None else None
            if row is not None:
                found.scans[i] = _with_row(scan, row)
                matched += 1
        found.notes.append(
            f"{listings[0].name}: what it says was added to {matched} of {len(found.scans)} scans"
        )
        found.notes += _unused(listings[0], known=COLUMNS_OF_BOXES)
    return found


def _rows(path: Path, found: Found) -> Iterator[_Row]:
    table, columns = _table(path)
    kind = _label_type([row[columns["label"]] for _, row in table.rows] if "label" in columns else [])
    for line, row in table.rows:
        values = {name: (row[column] or "").strip() for name, column in columns.items()}
        name = values["path"]
        if not name:
            found.rejected.append((f"{path.name}:{line}", "no path in this line"))
            continue
        target, mask = path.parent / name, values.get("mask", "")
        if not target.exists():
            found.rejected.append((name, f"line {line} of {path.name}: no such file"))
            continue
        if mask and not (path.parent / mask).exists():
            found.rejected.append((name, f"line {line} of {path.name}: its mask {mask} does not exist"))
            continue
        split = sources.split_of(values.get("split", ""))
        if split is None:
            raise DataError(
                f"{path}, line {line}: split {values['split']!r}; known: train, val, test, or nothing"
            )
        label = _known(values.get("label", ""))
        yield _Row(
            line,
            target,
            name,
            values.get("subject", ""),
            kind(label) if label else None,
            split,
            path.parent / mask if mask else None,
        )


def _table(path: Path) -> tuple[Table, dict[str, str]]:
    """A list, and the header's word for each column known."""
    table = read_table(path)
    columns = table.columns(_COLUMNS)
    if "path" not in columns:
        raise DataError(
            f"{path}: no column `path` (columns: {', '.join(table.header) or 'none'}); "
            "expected path, and if you like subject, label, split, mask"
        )
    return table, columns


def _unused(path: Path, known: Collection[str] = ()) -> list[str]:
    """What of a list is not used: a column's name may be misspelt, and then its labels are missed.

    Args:
        path: Of the list.
        known: Columns that something else reads.
    """
    table, columns = _table(path)
    notes = []
    own = [word.strip() for key, word in table.header.items()
           if key and key not in known and word not in columns.values()]  # fmt: skip
    if own:
        where = [f"{name}s are read from {', '.join(_COLUMNS[name])}"
                 for name in ("label", "subject") if name not in columns]  # fmt: skip
        hint = f" ({'; '.join(where)})" if where else ""
        notes.append(f"{path.name}: columns not used: {', '.join(own)}{hint}")
    if table.overfull:
        lines = "1 line has" if table.overfull == 1 else f"{table.overfull} lines have"
        notes.append(
            f"{path.name}: {lines} more cells than the header; what is in those was not read (a "
            "delimiter within a cell needs quotes around it)"
        )
    given = [row[columns["label"]].strip() for _, row in table.rows] if "label" in columns else []
    unknown = sum(bool(label) and not _known(label) for label in given)
    if unknown:
        notes.append(f"{path.name}: {count_of(unknown, 'label')} of nan, NA, N/A or null: taken for none")
    return notes


def _column(path: Path, name: str) -> list[str] | None:
    table, columns = _table(path)
    return [row[columns[name]] for _, row in table.rows] if name in columns else None


def _known(label: str) -> str:
    """A label as written, or nothing where tables write that there is none."""
    label = (label or "").strip()
    return "" if label.lower() in ("nan", "na", "n/a", "null") else label


def _label_type(values: Sequence[str]) -> Any:
    """The type of a column: int if all labels are whole numbers, float if all are numbers, else str."""
    given = [known for value in values if (known := _known(value))]
    for kind in (int, float):
        try:
            for value in given:
                if not np.isfinite(kind(value)):
                    raise ValueError
        except ValueError:
            continue
        return kind
    return str
