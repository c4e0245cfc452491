"""What the cache of prepared scans is keyed by: the state of every file that `prepare` reads, and no other.

A list is often in the folder where results are written too, and the scans that it names are elsewhere: what
lies beside it says nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl3d.data.preparation.parts import stamp
from ssl3d.data.scans import csv_lists, dataset_json
from ssl3d.data.scans.boxes import list_files
from ssl3d.data.scans.folders import walk
from ssl3d.data.scans.read import LISTS, NO_SCANS, OWN_TABLES, suffix_of, with_voxels
from ssl3d.errors import DataError

FOUND = 4  # of what is made of the names of files, such as subjects: raise it, and no cache is reused


def state_of(root: Path) -> list[list[Any]]:
    """List [path, size, time of change] of all files that decide what becomes of a source.

    The order is stable. A list given as the source counts by its content, so that copying or touching it
    changes nothing.

    Args:
        root: Folder or file, absolute.

    Raises:
        DataError: The source is a list that cannot be used.
    """
    first: list[list[Any]] = []
    if root.is_dir():
        files = _of_folder(root)
    elif root.name == "dataset.json":
        files = _of_folder(root.parent)
    elif suffix_of(root) in LISTS:
        content = root.read_bytes()
        first = [[str(root), len(content), hashlib.sha256(content).hexdigest()]]
        files = _of_list(root)
    else:
        files = iter([root])
    seen = dict.fromkeys(whole for path in files for whole in with_voxels(path))
    return first + [[str(path), *stamp(path)] for path in seen]


def _of_folder(root: Path) -> Iterator[Path]:
    read = {*root.glob("*.csv"), *list_files(root), root / "dataset.json"}
    read -= {root / name for name in OWN_TABLES}
    for path in walk(root):
        if suffix_of(path) not in NO_SCANS or path in read:
            yield path
    # What lists name may lie outside.
    if (root / "dataset.json").is_file():
        yield from dataset_json.named_in_json(root / "dataset.json")
    for path in sorted(root.glob("*.csv")):
        try:
            yield from csv_lists.named_in(path)
        except DataError:  # then it is none, and not used
            continue


def _of_list(path: Path) -> Iterator[Path]:
    yield path.parent / "dataset.json"  # modality and names of the labels
    for named in csv_lists.named_in(path):
        if os.path.isdir(named):  # a name of any length
            yield from walk(named)
        else:
            yield named
