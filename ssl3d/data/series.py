"""Several files that make one volume: DICOM series, and sequences of a subject as channels."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ssl3d.data.dicom import dicom_tags
from ssl3d.data.read import stem_of
from ssl3d.data.sources import Found, Scan, Wanted, dataset_name, label_note, looks_like_label, relative
from ssl3d.errors import DataError


def from_dicom(folders: dict[Path, list[Path]], root: Path, wanted: Wanted) -> Found:
    """Series, told apart by SeriesInstanceUID within each folder; the PatientID is the subject."""
    found = Found()
    dataset = dataset_name(root, wanted)
    for folder, files in folders.items():
        series: dict[str, list[Path]] = defaultdict(list)
        tags: dict[str, dict[str, str]] = {}
        for path in files:
            try:
                tag = dicom_tags(path)
            except DataError as error:
                found.rejected.append((relative(path, root), _damage(path, error)))
                continue
            uid = tag["series"] or path.name
            series[uid].append(path)
            tags.setdefault(uid, tag)
        for uid, members in series.items():
            tag = tags[uid]
            if tag["modality"] in ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO"):
                found.notes.append(f"{relative(members[0], root)}: DICOM {tag['modality']}, not a scan")
                continue
            place = relative(folder, root)
            where = place if place != "." else ""
            alone = len(members) == 1
            name = stem_of(members[0]) if alone else uid
            found.scans.append(
                Scan(
                    id="/".join(part for part in (dataset, where, name) if part),
                    dataset=dataset,
                    subject=_bids(where) or tag["patient"] or (name if alone or not where else where),
                    source=relative(members[0], root) if alone else place,
                    files=(tuple(members),),
                    modality=tag["modality"],
                    named=True,
                )
            )
    return found


def _bids(where: str) -> str | None:
    return next((part for part in where.split("/") if part.startswith("sub-")), None)


def _damage(path: Path, error: DataError) -> str:
    return "empty file" if path.stat().st_size == 0 else str(error)


def from_channels(files: Sequence[Path], root: Path, wanted: Wanted) -> Found:
    """Sequences of one subject as channels: files whose paths agree but for the channel's name."""
    found = Found()
    names = [channel.lower() for channel in wanted.channels]
    groups: dict[tuple[str, ...], dict[str, Path]] = defaultdict(dict)
    masks: dict[tuple[str, ...], Path] = {}
    labels, others = [], []
    for path in files:
        parts = [*relative(path.parent, root).split("/"), stem_of(path)]
        cut = [[t for t in re.split(r"[_\-. ]+", part.lower()) if t] for part in parts]
        mine = {token for component in cut for token in component}
        if wanted.masks and wanted.masks.lower() in mine:
            masks[_group(parts, cut, [wanted.masks.lower()])] = path
            continue
        if looks_like_label(path, root) and not wanted.take_labels:
            labels.append(relative(path, root))
            continue
        channel = [name for name in names if name in mine]
        if not channel:
            others.append(relative(path, root))
        elif len(channel) > 1:
            found.rejected.append(
                (relative(path, root), f"its name says {' and '.join(channel)}: which channel?")
            )
        else:
            key = _group(parts, cut, names)
            if channel[0] in groups[key]:
                other = relative(groups[key][channel[0]], root)
                found.rejected.append(
                    (relative(path, root), f"{other} is {channel[0]} of the same subject too")
                )
            else:
                groups[key][channel[0]] = path
    if labels:
        found.notes.append(label_note(labels))
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        found.notes.append(f"no channel of {' '.join(wanted.channels)} in the name: {shown}")
    dataset = dataset_name(root, wanted)
    for key, members in sorted(groups.items()):
        first = next(members[name] for name in names if name in members)
        subject = next(
            (part for part in key if part.startswith("sub-")), key[-1] if key else stem_of(first)
        )
        found.scans.append(
            Scan(
                id=f"{dataset}/{'/'.join(key) or stem_of(first)}",
                dataset=dataset,
                subject=subject,
                source=relative(first, root),
                files=tuple((members[name],) if name in members else () for name in names),
                channels=tuple(wanted.channels),
                mask=masks.get(key),
                named=True,
            )
        )
    return found


def _group(parts: Sequence[str], cut: Sequence[Sequence[str]], names: Sequence[str]) -> tuple[str, ...]:
    """What the channels of one subject have in common: (sub, ses) in BIDS, else the rest of the path."""
    bids = [part for part in parts[:-1] if re.match(r"(sub|ses)-", part)]
    if bids:
        return tuple(bids)
    rest = ["_".join(token for token in component if token not in names) for component in cut]
    return tuple(part for part in rest if part)
