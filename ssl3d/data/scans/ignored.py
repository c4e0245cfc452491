"""Finds the masks of voxels to ignore, as defaced ones are, and whose they are.

BIDS names them `sub-1_desc-deface_mask.nii.gz`, beside the scan or in its derivatives; others keep them in
a folder, or tell them by a part of the name. None is taken without being asked for (`--ignore-mask`, a
column `ignore_mask`): there are tools whose masks hold what was kept instead.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ssl3d.amounts import count_of
from ssl3d.data.scans.folders import first_few, tokens, walk, without_part
from ssl3d.data.scans.found import Found, Scan
from ssl3d.data.scans.read import is_whole, stem_of
from ssl3d.errors import DataError

_SAYS_MASK = re.compile(r"masks?|ignored?|(?:de)?fac(?:e|ed|ing)|anon\w*|(?:desc|label)-.*")
OF_NO_SCAN = "a mask of voxels to ignore, of no scan"


def is_ignore_mask(path: Path, ignore_mask: str) -> bool:
    """Tell whether a file is meant by `--ignore-mask`.

    Args:
        path: File.
        ignore_mask: Folder of masks, part of their names, or pattern of their names with * and ?; "" means
            none.

    Example:
        >>> [is_ignore_mask(Path(f"p1_{name}.nii.gz"), "*_def*") for name in ("t1", "deface", "defaced")]
        [False, True, True]
    """
    if not ignore_mask or not is_whole(path):
        return False
    if os.path.isdir(ignore_mask):
        return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(ignore_mask))
    if re.search(r"[*?]", ignore_mask):
        names = (path.name.lower(), stem_of(path).lower())
        return any(fnmatch.fnmatchcase(name, ignore_mask.lower()) for name in names)
    return without_part(tokens(path), ignore_mask) is not None


def with_ignored(contents: Found, sources: Sequence[Path], ignore_mask: str) -> None:
    """Give scans their masks of voxels to ignore, and take these out of the scans.

    A mask is that of the scans whose names have all its words but those that say mask, if these scans are
    one subject's; those in its own folder come first.

    Args:
        contents: What was found; its scans and notes are changed.
        sources: Folders, scans and lists that were searched.
        ignore_mask: Folder of masks, part or pattern of their names; "" keeps what lists say.

    Raises:
        DataError: No scan has a mask.
    """
    if ignore_mask:
        maps = _masks(sources, ignore_mask)
        masks: dict[int, list[Path]] = {}
        for path in maps:
            places = _places_of(path, contents.scans, ignore_mask)
            if len({(contents.scans[i].dataset, contents.scans[i].subject) for i in places}) == 1:
                for i in places:
                    masks.setdefault(i, []).append(path)
        for i, own in masks.items():
            if len(own) == 1 and contents.scans[i].ignore is None:
                contents.scans[i] = dataclasses.replace(contents.scans[i], ignore=own[0])
        _tell(contents, maps, ignore_mask)
    used = {scan.ignore.resolve() for scan in contents.scans if scan.ignore}
    if used:
        contents.scans = [
            scan for scan in contents.scans if not (used & {path.resolve() for path in _images(scan)})
        ]


def _tell(contents: Found, maps: Sequence[Path], ignore_mask: str) -> None:
    """Add the line that counts the scans with a mask, and name the masks of none.

    Raises:
        DataError: No scan has a mask.
    """
    having = sum(scan.ignore is not None for scan in contents.scans)
    if contents.scans and not having:
        here = f"{first_few([path.name for path in maps])}: of no scan, or of several people's"
        here = here if maps else "no file's name is like that"
        raise DataError(
            f"--ignore-mask {ignore_mask}: no scan has a mask by it; {here}; a CSV with the columns path "
            "and ignore_mask says whose they are"
        )
    count = count_of(len(contents.scans), "scan")
    line = f"--ignore-mask {ignore_mask}: {having} of {count} with a mask of voxels to ignore"
    used = {scan.ignore for scan in contents.scans}
    left = [path.name for path in maps if path not in used]
    contents.notes.append(line + (f"; of no scan: {first_few(left)}" if left else ""))


def _masks(sources: Sequence[Path], ignore_mask: str) -> list[Path]:
    """List the files that the option means, in a stable order."""
    folders = [source for source in sources if source.is_dir()]
    roots = [Path(ignore_mask)] if os.path.isdir(ignore_mask) else folders
    paths = (path for root in roots for path in walk(root) if is_ignore_mask(path, ignore_mask))
    return list(dict.fromkeys(Path(os.path.abspath(path)) for path in paths))


def _places_of(path: Path, scans: Sequence[Scan], ignore_mask: str) -> list[int]:
    """Find the positions of the scans whose names have all words of a mask's name that say whose it is."""
    own = _telling(path, ignore_mask)
    files = {i: Path(os.path.abspath(files[0])) for i, scan in enumerate(scans) if (files := _images(scan))}
    like = [i for i, file in files.items() if own <= _pieces(file)]
    beside = [i for i in like if files[i].parent == path.parent]
    return beside or (like if own else [])


def _telling(path: Path, ignore_mask: str) -> set[str]:
    """Return the words of a mask's name but those of the option, and those that say mask."""
    named = "" if os.path.isdir(ignore_mask) else ignore_mask.lower()
    said = {word for word in re.split(r"[_. ]+", named) if word.strip("*?")}
    rest = without_part(tokens(path), named) if named else None
    pieces = _pieces(path) if _is_bids(path) or rest is None else set(rest)
    return {
        piece
        for piece in pieces
        if not _SAYS_MASK.fullmatch(piece) and not any(fnmatch.fnmatchcase(piece, word) for word in said)
    }


def _pieces(path: Path) -> set[str]:
    """Return the words of a name; entities of BIDS (run-01) stay whole, as run-01 is not echo-01."""
    return set(stem_of(path).lower().split("_")) if _is_bids(path) else set(tokens(path))


def _is_bids(path: Path) -> bool:
    return path.name.lower().startswith("sub-")


def _images(scan: Scan) -> tuple[Path, ...]:
    return next((group for group in scan.files if group), ())
