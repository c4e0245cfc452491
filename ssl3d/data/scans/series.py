"""Several files that make one volume: DICOM series, and sequences of a subject as channels."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl3d.data.scans.dicom import dicom_tags
from ssl3d.data.scans.folders import (
    dataset_name,
    first_few,
    label_note,
    looks_like_label,
    without_part,
    words_of,
)
from ssl3d.data.scans.found import Found, Scan, Wanted
from ssl3d.data.scans.read import stem_of
from ssl3d.data.scans.subjects import is_group, person_of, relative, telling
from ssl3d.errors import DataError


def from_dicom(folders: dict[Path, list[Path]], root: Path, wanted: Wanted) -> Found:
    """Group DICOM files into series by SeriesInstanceUID, wherever they lie; the subject is the PatientID.

    Where that is blank, as some remove it, all series of a study are one subject.
    """
    contents = Found()
    dataset = dataset_name(root, wanted)
    series: dict[tuple[str, str], list[Path]] = defaultdict(list)
    tags: dict[tuple[str, str], dict[str, str]] = {}
    for path in (path for files in folders.values() for path in files):
        try:
            tag = dicom_tags(path)
        except DataError as error:
            contents.rejected.append((relative(path, root), _damage(path, error)))
            continue
        key = tag["patient"], tag["series"] or str(path)
        series[key].append(path)
        tags.setdefault(key, tag)
    nameless = nameless_patients(
        {key: (tags[key]["study"], members) for key, members in series.items() if not key[0]}, root
    )
    for key, members in series.items():
        tag = tags[key]
        if tag["modality"] in ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "SR", "PR", "KO"):
            contents.notes.append(f"{relative(members[0], root)}: DICOM {tag['modality']}, not a scan")
            continue
        place = relative(Path(os.path.commonpath([path.parent for path in members])), root)
        where = place if place != "." else ""
        alone = len(members) == 1
        name = stem_of(members[0]) if alone else tag["series"]
        contents.scans.append(
            Scan(
                id="/".join(part for part in (dataset, where, name) if part),
                dataset=dataset,
                subject=_bids(where) or tag["patient"] or nameless[key],
                source=relative(members[0], root) if alone else place,
                files=(tuple(members),),
                modality=tag["modality"],
                named=True,
            )
        )
    return contents


def nameless_patients(series: Mapping[Any, tuple[str, Sequence[Path]]], root: Path) -> dict[Any, str]:
    """Name the subjects of series without a PatientID: those of one study are one's, by their folder.

    Args:
        series: (StudyInstanceUID, files) of each series, by any key.
        root: Folder above them.
    """
    studies: dict[str, list[Any]] = defaultdict(list)
    for key, (study, files) in series.items():
        studies[study or str(files[0])].append(key)
    members = {study: [path for key in keys for path in series[key][1]] for study, keys in studies.items()}
    where = {
        study: relative(Path(os.path.commonpath([path.parent for path in files])), root)
        for study, files in members.items()
    }
    crowd = Counter(where.values())
    subjects: dict[Any, str] = {}
    for study, keys in studies.items():
        who, files = where[study], members[study]
        if who == "." or (len(files) == 1 and crowd[who] > 1):  # a folder of several people's
            own = stem_of(files[0]) if len(files) == 1 else study
            who = own if who == "." else f"{who}/{own}"
        subjects |= dict.fromkeys(keys, _bids(where[study]) or who)
    return subjects


def _bids(where: str) -> str | None:
    return next((part for part in where.split("/") if part.startswith("sub-")), None)


def _damage(path: Path, error: DataError) -> str:
    return "empty file" if path.stat().st_size == 0 else str(error)


def from_channels(files: Sequence[Path], root: Path, wanted: Wanted) -> Found:
    """Make sequences of one subject channels: files whose paths agree but for the channel's name."""
    contents = Found()
    names = wanted.channels
    groups: dict[tuple[str, ...], dict[str, Path]] = defaultdict(dict)
    masks: dict[tuple[str, ...], Path] = {}
    labels, others = [], []
    for path in files:
        parts = [*relative(path.parent, root).split("/"), stem_of(path)]
        if _names_in(parts, [wanted.masks]):
            masks[_group(parts, [wanted.masks])] = path
            continue
        if looks_like_label(path, root) and not wanted.take_labels:
            labels.append(relative(path, root))
            continue
        channel = _names_in(parts, names)
        if not channel:
            others.append(relative(path, root))
        elif len(channel) > 1:
            contents.rejected.append(
                (relative(path, root), f"its name says {' and '.join(channel)}: which channel?")
            )
        else:
            key = _group(parts, names)
            if channel[0] in groups[key]:
                other = relative(groups[key][channel[0]], root)
                contents.rejected.append(
                    (relative(path, root), f"{other} is {channel[0]} of the same subject too")
                )
            else:
                groups[key][channel[0]] = path
    if labels:
        contents.notes.append(label_note(labels))
    if others:
        contents.notes.append(f"no channel of {' '.join(wanted.channels)} in the name: {first_few(others)}")
    dataset = dataset_name(root, wanted)
    subjects = _subjects(groups)
    for key, members in sorted(groups.items()):
        first = next(members[name] for name in names if name in members)
        contents.scans.append(
            Scan(
                id=f"{dataset}/{'/'.join(key) or stem_of(first)}",
                dataset=dataset,
                subject=subjects[key] or stem_of(first),
                source=relative(first, root),
                files=tuple((members[name],) if name in members else () for name in names),
                channels=tuple(wanted.channels),
                mask=masks.get(key),
                named=True,
            )
        )
    return contents


def _names_in(parts: Sequence[str], names: Sequence[str]) -> list[str]:
    """List the names that a path has in it; t1.post is not t1 too, where both are names."""
    present = [name for name in names if any(without_part(words_of(p), name) is not None for p in parts)]
    return [
        name
        for name in present
        if not any(other != name and without_part(words_of(other), name) is not None for other in present)
    ]


def _group(parts: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return what a subject's channels have in common: (sub, ses) in BIDS, else the rest of the path."""
    bids = [part for part in parts[:-1] if re.match(r"(sub|ses)-", part)]
    if any(part.startswith("sub-") for part in bids):
        return tuple(bids)
    rest = []
    for part in parts:
        words = words_of(part)
        for name in sorted(names, key=lambda name: -len(words_of(name))):  # t1.post before t1
            while (less := without_part(words, name)) is not None:
                words = less
        rest.append("_".join(words))
    return tuple(part for part in rest if part)


def _subjects(keys: Collection[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Find the subject of each group of files; "" where its key is empty.

    The subject is BIDS `sub-*`; else a part of the key, without names of visits, sequences, sites and the
    like, and without visits at its end. Of several parts it is the first (patient1/week1); but where that
    names few, with more below each than there are of them (utrecht/57, utrecht/58, singapore/51), it is
    the last, lest a hospital be one person.
    """
    parts = {key: _who(key) for key in keys}
    while len({who[0] for who in parts.values() if who}) == 1 < len(set(parts.values())) and all(
        len(who) > 1 for who in parts.values()
    ):  # a folder above all
        parts = {key: who[1:] for key, who in parts.items()}
    deep = {(who[0], who[-1]) for who in parts.values() if len(who) > 1}
    outer = len(deep) <= len({first for first, _ in deep}) ** 2
    return {key: person_of(who[0] if outer else who[-1]) if who else "" for key, who in parts.items()}


def _who(key: tuple[str, ...]) -> tuple[str, ...]:
    """Select the parts of a key that may be a person's name."""
    bids = tuple(part for part in key if part.startswith("sub-"))[:1]
    said = tuple(part for part in telling(key) if not is_group(part))
    return bids or said or key[-1:]
