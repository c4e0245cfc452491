"""Finds whose a scan is from the names of its file and folders, as far as they tell."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from pathlib import Path

from ssl3d.data.scans.read import stem_of

# Names that say what was scanned and not who: the folder then names the subject.
_SEQUENCE = re.compile(
    r"t1|t1w|t1c|t1ce|t1gd|t2|t2w|flair|pd|adc|dwi|swi|bold|ct|mri?|pet|image|img|scan|volume",
    re.IGNORECASE,
)
# Folders that say when, or how, somebody was scanned, and those of a group of people.
_VISIT = re.compile(
    r"(?:ses(?:sion)?|visit|time_?-?point|baseline|follow_?-?up|pre_?-?op|post_?-?op|retest)[_\-. ]?\d*"
    r"|anat|func|fmap|perf",
    re.IGNORECASE,
)
# People of BraTS since 2023, OASIS and ADNI, whose visits are numbered behind them.
_KNOWN = re.compile(r"(?:BraTS-[A-Za-z]+-\d{5}|OAS\d_?\d{4}|\d{3}_S_\d{4})(?=[-_]|$)", re.IGNORECASE)
_MOMENT = rf"{_VISIT.pattern}|frame[_\-. ]?\d+"  # at the end of a name
_MONTH, _DAY = r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_DATE = rf"(?:19|20)\d\d(?:{_MONTH}{_DAY}|[-_.]{_MONTH}(?:[-_.]{_DAY})?)"
_GROUP = re.compile(
    r"(?:site|cent(?:er|re)|hospital|scanner|vendor|batch|fold|part|group|cohort|class|grade|stage|type|level"
    r"|dataset|task|set|study)[_\-. ]?[a-z]?\d*(?:[_\-. ].*)?|(?:images?|labels?)(?:tr|ts|val?)?"
    r"|data|raw|nifti|dicom",
    re.IGNORECASE,
)
_PERSON = re.compile(r"[_\-. ]*(?:case|pat(?:ient)?|subj?(?:ect)?|person|p)[_\-. ]?\d", re.IGNORECASE)
_CHANNEL = len("_0000")
_FEW = 10  # scans in a folder that may still be one person's, where there are few such folders
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "": "",
}


def subjects_of(paths: Sequence[Path], root: Path, classes: Container[Path] = ()) -> dict[Path, str]:
    """Find the subject of each scan: the person's own folder, if it is in one, else what its name says.

    By name it is BIDS `sub-*`; else the file's name less the sequence, visit and frame at its end; where
    names repeat, the folders, less those of visits and sequences.

    Args:
        paths: Files of the scans.
        root: Folder above them.
        classes: Files that lie in the folder of a class, whose name is nobody's.
    """
    subjects = subjects_by_name(paths, root, classes) | _own_folders(paths, root)
    dates, numbered = _dated(paths, root), _channelled(paths)
    whose = {}
    for path, name in subjects.items():
        if path in numbered:
            name = name.removesuffix(stem_of(path)[-_CHANNEL:])
        above, _, last = name.rpartition("/")
        who = above if above and last in dates else name
        bids = who.startswith("sub-")
        whose[path] = who if bids else person_of(who, sequences=name == _less_sequence(path))
    return whose


def person_of(name: str, sequences: bool = True) -> str:
    """Cut visits, frames and dates off a name's end: p of p_ses-2 and p_frame01, p1 of p1_20190702.

    Args:
        name: Name of a file, or of folders.
        sequences: Whether to cut sequences off too (p_flair). Folders images_ct and images_mr are nobody.

    Example:
        >>> person_of("case7_ses-2"), person_of("case7_flair"), person_of("case7_20190702")
        ('case7', 'case7', 'case7')
    """
    known = _KNOWN.search(name)
    if known:
        return name[: known.end()]
    ends = f"{_SEQUENCE.pattern}|{_MOMENT}" if sequences else _MOMENT
    cuts = [rf"(.+?)[_\-. ]+(?:{ends})", rf"(.*\d.*?)[_\-. ]+{_DATE}"]  # scan_20190702 is nobody's
    while cut := next(filter(None, (re.fullmatch(cut, name, re.IGNORECASE) for cut in cuts)), None):
        if _SEQUENCE.fullmatch(cut[1]) or is_group(cut[1]):  # scan_visit2, site2_baseline: nothing of who
            break
        name = cut[1]
    return name


def _channelled(paths: Sequence[Path]) -> set[Path]:
    """Find scans whose last four digits are nnU-Net's channels: p_0000 and p_0001, q_0000 and q_0001.

    In a folder all names have the same digits, from 0000 on, and there are no fewer names than channels.
    """
    inside: dict[Path, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        if match := re.fullmatch(r"(.+)_\d{4}", stem_of(path)):
            inside[path.parent][match[1]].append(path)
    channels: set[Path] = set()
    for names in inside.values():
        digits = {tuple(sorted(stem_of(path)[1 - _CHANNEL :] for path in own)) for own in names.values()}
        count = len(next(iter(digits)))
        even = digits == {tuple(f"{number:04}" for number in range(count))} and 1 < count <= len(names)
        if even and not any(map(is_group, names)):
            channels |= {path for own in names.values() for path in own}
    return channels


def _dated(paths: Sequence[Path], root: Path) -> set[str]:
    """Find the names of folders that are dates of visits, as of patient1/2019-07-02/t1.

    There are none where the folders above are few, with more dates below each than there are of them: a
    hospital is no person.
    """
    visits = {
        (folders[:depth], folders[depth])
        for folders in {tuple(relative(path.parent, root).split("/")) for path in paths}
        for depth in range(1, len(folders))
        if re.fullmatch(_DATE, folders[depth]) and not is_group(folders[depth - 1])
    }
    above = {parent for parent, _ in visits}
    return {date for _, date in visits} if len(visits) <= len(above) ** 2 and len(above) > 1 else set()


def _own_folders(paths: Sequence[Path], root: Path) -> dict[Path, str]:
    """Find the subjects of scans in folders that are one person's, as of patient001/patient001_frame01.

    One person taken for two may be in train and in test; but liver/liver_1, site1/site1_001 and
    lung2/lung2_001 to lung2_400 are people. So a folder is one person's where a scan in it is named after
    it, another such folder lies beside it, they hold few scans (on average ten at most, or no more than
    there are such folders), its name has a digit and is not that of a sequence, split, visit or group, and
    its scans do not go on with a person's number (a1/a1_patient3).
    """
    inside: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    beside: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for path in paths:
        folders = tuple(relative(path.parent, root).split("/"))
        if any(part.startswith("sub-") for part in folders):
            continue  # BIDS says it
        for depth, name in enumerate(folders, start=1):
            inside[folders[:depth]].append(path)
            if _may_be_a_person(name) and _named_after(stem_of(path), name):
                beside[folders[: depth - 1]].add(folders[:depth])
    own = [
        folder
        for folders in beside.values()
        if len(folders) > 1
        and sum(len(inside[folder]) for folder in folders) <= len(folders) * max(_FEW, len(folders))
        for folder in sorted(folders)
    ]
    names = Counter(folder[-1] for folder in own)
    subjects: dict[Path, str] = {}
    for folder in sorted(own, key=len, reverse=True):  # of several, the outermost
        name = folder[-1] if names[folder[-1]] == 1 else "/".join(telling(folder) or folder)
        subjects |= dict.fromkeys(inside[folder], name)
    return subjects


def _may_be_a_person(folder: str) -> bool:
    no_person = (_SEQUENCE, _VISIT, _GROUP)
    return bool(re.search(r"\d", folder)) and not any(known.fullmatch(folder) for known in no_person)


def _named_after(stem: str, folder: str) -> bool:
    """Tell whether a name is the folder's, or the folder's and more that is not a person's number."""
    head, rest = stem[: len(folder)], stem[len(folder) :]  # not by a pattern: each would be compiled anew
    if head.lower() != folder.lower() or re.match("[A-Za-z0-9]", rest):
        return False
    return not _PERSON.match(rest)


def is_group(part: str) -> bool:
    """Tell whether a folder's name is that of many people's: a split, a site, all images."""
    return bool(_GROUP.fullmatch(part)) or split_of(part) is not None


def telling(folders: Sequence[str]) -> list[str]:
    """Select the folders that may say who was scanned, and not when or how."""
    return [part for part in folders if not (_VISIT.fullmatch(part) or _SEQUENCE.fullmatch(part))]


def subjects_by_name(paths: Sequence[Path], root: Path, classes: Container[Path] = ()) -> dict[Path, str]:
    """Find the subject of each scan by its name alone, whoever's its folder may be; see `subjects_of`.

    Visits and frames are left in the name.
    """
    stems = Counter(stem_of(path) for path in paths)
    subjects = {}
    for path in paths:
        parts = relative(path, root).split("/")
        bids = next((part for part in parts[:-1] if re.fullmatch(r"sub-[^/]+", part)), None)
        bids = bids or next(iter(re.findall(r"^sub-[A-Za-z0-9]+", parts[-1])), None)
        stem = stem_of(path)
        anonymous = bool(_SEQUENCE.fullmatch(stem))
        if bids:
            subjects[path] = bids
        elif len(parts) > 1 and (stems[stem] > 1 or anonymous):
            folders = telling(parts[:-1])
            crowd = path in classes or _class_like(parts[:-1]) or (folders and all(map(is_group, folders)))
            if not anonymous and crowd:
                folders = [*parts[:-1], stem]
            elif not folders:  # t1/p1 and flair/p1
                folders = parts[:-1] if anonymous else [stem]
            subjects[path] = "/".join(folders)
        else:
            subjects[path] = _less_sequence(path)
    return subjects


def _less_sequence(path: Path) -> str:
    """Cut the sequence off a name: p_flair and p_t1 as two subjects would leak from split to split."""
    who = re.fullmatch(r"(.+?)[_\-. ]+([^_\-. ]+)", stem_of(path))
    return who[1] if who and _SEQUENCE.fullmatch(who[2]) else stem_of(path)


def _class_like(parts: Sequence[str]) -> bool:
    return bool(parts) and any(split_of(part) for part in parts)


def split_of(name: str) -> str | None:
    """Return a split's canonical name; None if the name is no split's."""
    return _SPLIT_NAMES.get(name.strip().lower())


def relative(path: Path, root: Path) -> str:
    """Return a path relative to the root, POSIX; as it is where it lies elsewhere."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        try:
            return path.resolve().relative_to(root.resolve()).as_posix()
        except ValueError:
            return path.as_posix()
