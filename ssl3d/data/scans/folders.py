"""Walks folders of scans, and reads what their names say: data sets, label maps, classes."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from ssl3d.amounts import count_of
from ssl3d.data.scans.found import Wanted
from ssl3d.data.scans.read import format_by_suffix, is_picture, stem_of, suffix_of
from ssl3d.data.scans.subjects import relative, split_of
from ssl3d.errors import is_transient

LABEL_NAME = re.compile(
    r"(?:^|[_\-. ])(?:\w*mask|\w*masks|seg|segs|segm|segmentation|segmentations|labels?|labelmaps?"
    r"|roi|rois|gt|dseg|aseg|annotation|annotations)\d*(?:$|[_\-. ])",
    re.IGNORECASE,
)

LABEL_FOLDER = re.compile(
    r"(?:labels?|masks?|segmentations?|annotations?|ground_?truth)(?:tr|ts|val?)?", re.IGNORECASE
)


def walk(
    root: Path, skip: Container[str] = (), lost: list[tuple[Path, str]] | None = None
) -> Iterator[Path]:
    """Yield the files below a folder in a stable order, without hidden ones and the toolkit's own.

    The toolkit's own are the parts of stores being made, and the folders of runs and of results, whose
    pictures and predictions are no scans. Links are followed, and every folder is visited once, by the
    first of the paths that lead to it; pipes and devices are never opened.

    Args:
        root: Folder.
        skip: Names of folders in it that are left out.
        lost: List to which is added, with the reason, what cannot be read: folders, and links that lead
            nowhere and whose names may be those of scans.
    """
    lost = [] if lost is None else lost
    seen = {_identity(above) for above in (root, *root.resolve().parents)}
    waiting = [_entries(root, lost)]  # a stack: a tree may be deeper than functions may call each other
    while waiting:
        path = next(waiting[-1], None)
        if path is None:
            waiting.pop()
        elif path.name.startswith(".") or path.name.endswith(".partial"):
            continue
        elif os.path.isdir(path):  # not `path.is_dir()`, which raises where it may not look
            skipped = len(waiting) == 1 and path.name in skip
            if not skipped and (identity := _identity(path)) not in seen and not _written_here(path):
                seen.add(identity)
                waiting.append(_entries(path, lost))
        elif os.path.isfile(path):
            yield path
        elif os.path.islink(path) and _may_be_a_scan(path):
            lost.append((path, missing(path)))


def _entries(folder: Path, lost: list[tuple[Path, str]]) -> Iterator[Path]:
    try:
        return iter(sorted(folder.iterdir()))
    except OSError as error:
        if is_transient(error):
            raise
        lost.append((folder, f"a folder that cannot be read: {error.strerror}"))
        return iter(())


def _identity(folder: Path) -> tuple[int, int]:
    """Return the device and number of a folder, the same whatever path led to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _may_be_a_scan(path: Path) -> bool:
    """Tell whether a name may be that of a scan; many of DICOM's have no suffix, or a number."""
    return format_by_suffix(path) is not None or not re.search("[a-z]", suffix_of(path))


def missing(path: Path) -> str:
    """Say why there is nothing at a path."""
    if os.path.islink(path):
        return "a link to a file that is not here (get the data first: datalad get, git annex get)"
    return "no such file or folder"


def _written_here(folder: Path) -> bool:
    """Tell whether a folder is a run, or a folder of results, of this toolkit."""
    if (folder / "config.yaml").is_file():
        return (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    if (folder / "table.txt").is_file():
        return any(re.search(r"-[0-9a-f]{8}$", path.stem) for path in folder.glob("*.json"))
    return (folder / ".jobs").is_dir()


def dataset_name(root: Path, wanted: Wanted) -> str:
    """Return `--dataset`, else the folder's name (for `imagesTr`, `images`, `data`: the parent's)."""
    if wanted.dataset:
        return wanted.dataset
    root = root.resolve()
    generic = re.fullmatch(r"images?(tr|ts)?|data|raw|nifti|dicom", root.name, re.IGNORECASE)
    return (root.parent.name if generic else root.name) or "data"


def looks_like_label(path: Path, root: Path) -> bool:
    """Tell whether the name of a file, or of a folder between it and the root, says label map."""
    if LABEL_NAME.search(stem_of(path)):
        return True
    parents = relative(path.parent, root).split("/")
    return any(LABEL_FOLDER.fullmatch(part) for part in parents)


def label_note(names: Sequence[str]) -> str:
    """Write the line that says which files were taken for label maps."""
    return (
        f"not taken for scans, they look like label maps: {first_few(names)} (--take-labels takes them, "
        "--masks PART or a CSV with a column `mask` keeps them as masks)"
    )


def missing_masks(source: str, names: Sequence[str]) -> str:
    """Write the line that says which masks of a list are not there."""
    return (
        f"{source}: {count_of(len(names), 'scan')} refused, as the masks listed for them do not exist: "
        f"{first_few(names)}"
    )


def first_few(names: Sequence[str]) -> str:
    """List the first five names, and say how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def tokens(path: Path) -> list[str]:
    """Split a file's name at _, -, . and blanks into parts in lower case."""
    return words_of(stem_of(path))


def words_of(name: str) -> list[str]:
    """Split a name at _, -, . and blanks into words in lower case: `_t1.post` is t1 and post."""
    return [word for word in re.split(r"[_\-. ]+", name.lower()) if word]


def without_part(words: Sequence[str], part: str) -> list[str] | None:
    """Return the words of a name without those of a part of it; None where the part is not in it.

    Example:
        >>> without_part(["p1", "t1", "post"], "T1.post"), without_part(["p1", "t1"], "t1.post")
        (['p1'], None)
    """
    sought = words_of(part)
    for start in range(len(words) - len(sought) + 1):
        if sought and list(words[start : start + len(sought)]) == sought:
            return [*words[:start], *words[start + len(sought) :]]
    return None


def class_folders(
    paths: Sequence[Path], root: Path, natural: bool = False
) -> dict[Path, tuple[str | None, str]]:
    """Find the class and split of pictures in folders named by their class, perhaps below train, val, test.

    Folders with one picture each are taken for classes only where the pictures are natural.
    """
    pictures = [path for path in paths if is_picture(path)]
    if not pictures or len(pictures) < len(paths):
        return {}
    placed = {}
    for path in pictures:
        folders = relative(path, root).split("/")[:-1]
        split = next((s for s in (split_of(part) for part in folders) if s), "")
        classes = [
            part for part in folders if not split_of(part) and part.lower() not in ("images", "image")
        ]
        placed[path] = (classes[-1] if classes else None, split)
    labels = {label for label, _ in placed.values()}
    usable = None not in labels and 1 < len(labels) < len(pictures) + natural
    return {path: (label if usable else None, split) for path, (label, split) in placed.items()}


def in_class_folders(paths: Sequence[Path], root: Path) -> set[Path]:
    """Select the pictures in folders of classes whose names are no person's, which have numbers."""
    folders = class_folders(paths, root)
    return {path for path, (label, _) in folders.items() if label and not re.search(r"\d", label)}


def one_person_each(classes: dict[Path, tuple[str | None, str]], subjects: dict[Path, str]) -> list[str]:
    """Write the line that says, if so, that every class is taken for one person, which cannot be split."""
    whose: dict[str, set[str]] = defaultdict(set)
    for path, (label, _) in classes.items():
        if label is not None:
            whose[label].add(subjects[path])
    if len(whose) < 2 or any(len(people) > 1 for people in whose.values()):
        return []
    return [
        f"pictures in folders named {first_few(sorted(whose))}: each is taken for a class, and for one "
        "person, as names repeat from folder to folder; a CSV with path, subject and label says what is "
        "meant"
    ]
