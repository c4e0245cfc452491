"""Finds which of the files and folders given are scans, whose, and with which labels and masks.

Nothing but names, small lists (`dataset.json`, CSV) and DICOM headers is read here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl3d.amounts import count_of
from ssl3d.data.scans.csv_lists import from_csv, with_listing
from ssl3d.data.scans.dataset_json import from_dataset_json, from_nnunet
from ssl3d.data.scans.folders import (
    LABEL_FOLDER,
    LABEL_NAME,
    class_folders,
    dataset_name,
    first_few,
    in_class_folders,
    label_note,
    looks_like_label,
    missing,
    one_person_each,
    tokens,
    walk,
    without_part,
)
from ssl3d.data.scans.found import Found, Scan, Wanted
from ssl3d.data.scans.ignored import OF_NO_SCAN, is_ignore_mask, with_ignored
from ssl3d.data.scans.participants import with_participants
from ssl3d.data.scans.read import (
    KNOWN_FORMATS,
    LISTS,
    NO_SCANS,
    STORES,
    format_of,
    is_header_of_another,
    is_picture,
    is_slice,
    is_whole,
    stem_of,
    suffix_of,
    with_voxels,
    without_suffix,
)
from ssl3d.data.scans.subjects import relative, subjects_by_name, subjects_of
from ssl3d.errors import DataError

_LOOKED_FOR = f"looked for {KNOWN_FORMATS}, dataset.json and CSV lists"
_NO_RAW_SCANS = frozenset(("derivatives", "sourcedata", "code", "stimuli"))  # folders of a BIDS tree


def find(sources: Sequence[str | Path], wanted: Wanted) -> Found:
    """Find the scans in folders and files.

    Args:
        sources: Folders, scans and lists.
        wanted: Options that decide what is taken.

    Raises:
        DataError: A source does not exist, holds nothing known, or is a list that cannot be used; or no
            file's name has the part that tells masks.
    """
    contents = Found()
    for source in map(Path, sources):
        here = _find_in_folder(source, wanted) if source.is_dir() else _find_file(source, wanted)
        if not here.scans and not here.rejected and not here.notes:
            raise DataError(f"{source}: no scans found; {_LOOKED_FOR}")
        contents.add(here)
    with_ignored(contents, [Path(source) for source in sources], wanted.ignore_mask)
    if wanted.label and all(scan.label is None for scan in contents.scans):
        raise DataError(
            f"--label {wanted.label}: no scan has a label by it; a CSV with the columns path and "
            f"{wanted.label} says them, beside the scans or as the source, or a participants.tsv of BIDS"
        )
    if wanted.masks and contents.scans and not any(s.mask or s.member for s in contents.scans):
        contents.notes.append(_no_masks([Path(source) for source in sources], wanted.masks))
    contents.left_out = _left_out(contents, [Path(source) for source in sources], wanted)
    contents = _distinct(contents.printable())
    contents.notes += _in_two_splits(contents.scans)
    return contents


def in_part(name: str, index: int, count: int) -> bool:
    """Tell whether shard `index` of `count` (from 1) holds this name, the same everywhere and always."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % count == index - 1


def _in_two_splits(scans: Sequence[Scan]) -> list[str]:
    """Write the line that says whose scans are in several splits."""
    splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for scan in scans:
        splits[scan.dataset, scan.subject] |= {scan.split} - {""}
    several = [f"{subject} ({', '.join(sorted(own))})"
               for (_, subject), own in splits.items() if len(own) > 1]  # fmt: skip
    if not several:
        return []
    return [
        f"{count_of(len(several), 'subject')} with scans in several splits: {first_few(several)}; the "
        "house split puts all scans of a subject into the one furthest from training"
    ]


def _find_file(source: Path, wanted: Wanted) -> Found:
    """Find what one file is or lists.

    Raises:
        DataError: The file does not exist, or is neither a scan nor a list of scans.
    """
    from ssl3d.data.scans.arrays import from_arrays
    from ssl3d.data.scans.boxes import unread_boxes

    if not os.path.exists(source):
        raise DataError(f"{source}: {missing(source)}")
    if not source.is_file():
        raise DataError(f"{source}: neither a file nor a folder, but a pipe or a device")
    source = source.absolute()  # links stay: git-annex keeps what they lead to in folders of its own
    in_json = source.name == "dataset.json"
    if in_json or suffix_of(source) in LISTS:
        listed = from_dataset_json(source.parent, wanted) if in_json else from_csv(source, wanted)
        listed.notes += unread_boxes(listed, source)
        return listed
    if suffix_of(source) in STORES:
        raise DataError(f"{source}: a store is prepared already; give it to --data")
    form = format_of(source)
    if form is None:
        raise DataError(f"{source}: not a known format; {_LOOKED_FOR}")
    if form.kind == "rows":
        return from_arrays(source, wanted, source.parent)
    return _from_files([source], source.parent, wanted, named=True)


def _find_in_folder(source: Path, wanted: Wanted) -> Found:
    """Find the scans of a folder, with what lists beside them say."""
    from ssl3d.data.scans.boxes import with_boxes

    listed = from_dataset_json(source, wanted) if (source / "dataset.json").is_file() else Found()
    if listed.scans or listed.rejected:  # else such a file is something else's
        contents = listed
    elif _is_channelled(source):
        contents = from_nnunet(source, wanted)
    else:
        contents = from_folder(source, wanted)
    contents = with_participants(with_listing(contents, source, wanted.label), source, wanted.label)
    return with_boxes(contents, source, wanted.box_readers)


def from_folder(root: Path, wanted: Wanted) -> Found:
    """Find the scans of a folder tree without a list: BIDS, DICOM series, class folders, or just files."""
    from ssl3d.data.scans.arrays import from_arrays
    from ssl3d.data.scans.series import from_dicom

    contents, files = Found(), []
    bids = _is_bids(root)
    dicom: dict[Path, list[Path]] = defaultdict(list)
    lost: list[tuple[Path, str]] = []
    for path in walk(root, skip=_NO_RAW_SCANS if bids else frozenset(), lost=lost):
        if path.name.upper() == "DICOMDIR" or suffix_of(path) in NO_SCANS or is_header_of_another(path):
            continue
        form = format_of(path)
        if form is None or is_ignore_mask(path, wanted.ignore_mask):
            continue
        if form.kind == "rows":
            contents.add(from_arrays(path, wanted, root))
        elif form.kind == "slice":
            dicom[path.parent].append(path)
        else:
            files.append(path)
    contents.rejected += [(relative(path, root), reason) for path, reason in lost]
    plain = _from_files(files, root, wanted, named=False)
    series = from_dicom(dicom, root, wanted)
    for part in (plain, series):
        contents.add(part)
    return contents


def _is_bids(root: Path) -> bool:
    return any(path.is_dir() for path in root.glob("sub-*"))


# What was found and is not used -------------------------------------------------------------------


def _left_out(contents: Found, sources: Sequence[Path], wanted: Wanted) -> list[tuple[str, str]]:
    """List (path, reason) of the files in folders that are neither used nor refused, in a stable order.

    Documents and lists (`NO_SCANS`) are not counted, nor is what `walk` passes over.
    """
    left: dict[str, str] = {}
    used = {whole for scan in contents.scans for path in scan.all_files for whole in with_voxels(path)}
    real: set[Path] = set()  # looked up for what is left only: a link to a file that is used
    refused = {name for name, _ in contents.rejected}
    for source in sources:
        if not source.is_dir():
            continue
        bids = _is_bids(source)
        for path in walk(source):
            name = relative(path, source)
            if path in used or name in refused or path.name.upper() == "DICOMDIR":
                continue
            if suffix_of(path) in NO_SCANS:
                continue
            real = real or {scan_file.resolve() for scan_file in used}
            if path.resolve() in real:
                continue
            first = name.split("/")[0]
            if is_ignore_mask(path, wanted.ignore_mask):
                left.setdefault(name, OF_NO_SCAN)
            elif bids and first in _NO_RAW_SCANS and "/" in name:
                left.setdefault(name, f"in {first}/ of a BIDS data set, which holds no raw scans")
            else:
                left.setdefault(name, _why_left_out(path, source))
    return sorted(left.items())


def _why_left_out(path: Path, root: Path) -> str:
    """Say why a file that is no document was not used."""
    if format_of(path) is None:
        suffix = suffix_of(path)
        return f"files named *{suffix} are not read" if suffix else "no ending, and not DICOM"
    if looks_like_label(path, root):
        return "a label map of no scan"
    return "no scan, channel or mask by the folder's lists and layout"


# Plain files --------------------------------------------------------------------------------------


def _from_files(files: Sequence[Path], root: Path, wanted: Wanted, named: bool) -> Found:
    from ssl3d.data.scans.series import from_channels, from_dicom

    contents = Found()
    if wanted.channels and not named:
        return from_channels(files, root, wanted)
    scans: list[Path] = []
    maps: list[Path] = []
    for path in files:
        like_mask = without_part(tokens(path), wanted.masks) is not None
        natural = wanted.colour == "rgb" and is_picture(path)  # `mask` may be its class
        named_so = not (named or natural or wanted.take_labels) and looks_like_label(path, root)
        label = like_mask or named_so
        (maps if label else scans).append(path)
    masks = _beside(scans, maps, wanted.masks, root) if wanted.masks else {}
    unused = [relative(path, root) for path in maps if path not in masks.values()]
    if unused:
        contents.notes.append(label_note(unused))
    dataset = dataset_name(root, wanted)
    subjects = subjects_of(scans, root, in_class_folders(scans, root))
    classes = class_folders(scans, root, natural=wanted.colour == "rgb")
    if wanted.colour == "rgb":  # n01440764/10026.JPEG: the folder is no person
        subjects |= {path: without_suffix(relative(path, root)) for path in classes}
    contents.notes += one_person_each(classes, subjects)
    for path in scans:
        group, split = classes.get(path, (None, ""))
        if is_slice(path):
            contents.scans += from_dicom({path.parent: [path]}, root, wanted).scans
            continue
        contents.scans.append(
            Scan(
                id=f"{dataset}/{without_suffix(relative(path, root))}",
                dataset=dataset,
                subject=subjects[path],
                source=relative(path, root),
                files=((path,),),
                mask=masks.get(path),
                label=group,
                split=split,
                named=named or is_picture(path) or wanted.take_labels,
            )
        )
    return contents


def _no_masks(roots: Sequence[Path], part: str) -> str:
    """Write the line that says why no scan has a mask, where files have the part in their names.

    Raises:
        DataError: No file has the part in its name.
    """
    like: Counter[str] = Counter()
    matching = 0
    for root in roots:
        for path in walk(root) if root.is_dir() else ():
            if not is_whole(path):
                continue
            words = tokens(path)
            matching += without_part(words, part) is not None
            named = [word for word in words if LABEL_NAME.search(word)]
            parents = relative(path.parent, root).split("/")
            named = named or [f"{folder}/" for folder in parents if LABEL_FOLDER.fullmatch(folder)]
            like.update(set(named))
    if matching:
        return f"--masks {part}: {matching} files have it in their names, and none is one scan's alone"
    here = ", ".join(f"{word} ({count})" for word, count in like.most_common(8))
    if not any(root.is_dir() for root in roots):
        here = "a list names masks in its column `mask`"
    elif here:
        here = f"names like those of label maps here: {here}"
    else:
        here = "no name here is like those of label maps"
    raise DataError(f"--masks {part}: no file has it in its name; {here}")


def _beside(scans: Sequence[Path], maps: Sequence[Path], part: str, root: Path) -> dict[Path, Path]:
    """Match each scan with a label map of the same folder, by name.

    The name is the scan's with the part (`a`, `a_seg`); or what is left of it without the part is in the
    names of one subject's scans alone (`volume-0`, `segmentation-0`; `p_t1`, `p_t2`, `p_seg`; `ct`, `seg`).
    """
    rest = {path: own for path in maps if (own := without_part(tokens(path), part)) is not None}
    by_name = {(path.parent, tuple(others)): path for path, others in rest.items()}
    here: dict[Path, list[Path]] = {}
    for path in scans:
        here.setdefault(path.parent, []).append(path)
    # Not by folders: a map of one frame is not that of the others.
    whose = subjects_by_name(scans, root)
    matching: dict[Path, list[Path]] = {}
    for path, others in rest.items():
        like = [scan for scan in here.get(path.parent, ()) if set(others) <= set(tokens(scan))]
        if like and len({whose[scan] for scan in like}) == 1:
            for scan in like:
                matching.setdefault(scan, []).append(path)
    masks: dict[Path, Path] = {}
    for path in scans:
        exact = by_name.get((path.parent, tuple(tokens(path))))
        if exact is not None:
            masks[path] = exact
        elif len(matching.get(path, ())) == 1:
            masks[path] = matching[path][0]
    return masks


# ------------------------------------------------------------------------------------------------


def _is_channelled(root: Path) -> bool:
    """Tell whether the four digits at the ends of names are nnU-Net's channels, which begin at 0000.

    Digits of AMOS (amos_0001, amos_0004) are people, and so are digits that the label maps have too.
    """
    images, labels = ({stem_of(path) for path in walk(root / name)} if (root / name).is_dir() else set()
                      for name in ("imagesTr", "labelsTr"))  # fmt: skip
    numbered = {stem for stem in images if re.search(r"_\d{4}$", stem)}
    return any(stem.endswith("_0000") for stem in numbered) and not numbered & labels


def _distinct(contents: Found) -> Found:
    """Drop what was found twice, and make ids unique where different roots agree."""
    seen: set[Any] = set()
    scans: list[Scan] = []
    ids: Counter[str] = Counter()
    twice: list[str] = []
    for scan in contents.scans:
        key = (tuple(path.resolve() for group in scan.files for path in group), scan.member)
        if key in seen:
            twice.append(scan.source)
            continue
        seen.add(key)
        ids[scan.id] += 1
        if ids[scan.id] > 1:
            scan = dataclasses.replace(scan, id=f"{scan.id}~{ids[scan.id]}")
        scans.append(scan)
    contents.scans = scans
    if twice:
        contents.notes.append(f"{count_of(len(twice), 'scan')} found twice, taken once: {first_few(twice)}")
    contents.notes = list(dict.fromkeys(contents.notes))
    return contents
