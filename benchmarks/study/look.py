"""A look at the data of a study: subjects, targets, shapes, spacing, and how subjects can be tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ssl3d.api import DataError, count_of, house_split
from ssl3d_benchmarks.task import CSV_HELP, kind_of_labels, known_label

if TYPE_CHECKING:
    from ssl3d.api import Collection

FOLDS = 5
LEAST = 4
"""Subjects with a target below which nothing can be trained, chosen and tested."""
TASKS = {"masks": "segmentation", "boxes": "detection"}


@dataclass(frozen=True)
class Look:
    """What a study has to know of its data.

    Attributes:
        datasets: Names of the data sets.
        subjects: Number of subjects.
        volumes: Number of volumes.
        target: Kind of target: masks, boxes, classes, ordinal or real.
        labelled: Number of subjects that have a target.
        unlabelled: Number of subjects without a target and without a split of their own.
        shape: Median shape (D, H, W), voxels.
        spacing: Median spacing (D, H, W), mm.
        folds: Number of folds; 0 for one split.
        why: Reason for the folds, in words.
        train: Numbers of volumes with a target to train on, choose on and test on, of one fold.
        tested: Number of subjects that are tested, over all folds.
        pretrained_on: Number of subjects that pretraining may see.
    """

    datasets: tuple[str, ...]
    subjects: int
    volumes: int
    target: str
    labelled: int
    unlabelled: int
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    folds: int
    why: str
    train: tuple[int, int, int]
    tested: int
    pretrained_on: int

    @property
    def task(self) -> str:
        """Name of the task of fine-tuning."""
        return TASKS.get(self.target, "classification")

    @property
    def images(self) -> bool:
        """Whether most volumes are images."""
        return self.shape[0] == 1

    @property
    def thick(self) -> bool:
        """Whether slices are thick: voxels more than 3 times as long along D, or few slices."""
        depth, height, width = self.spacing
        return not self.images and (depth > 3 * max(height, width) or self.shape[0] < 16)


def look(data: Collection, target: str, folds: int | None, where: str) -> Look:
    """Look at the data of a study.

    Args:
        data: All volumes.
        target: Kind of target that is asked for, or auto.
        folds: Number of folds that is asked for; None to choose.
        where: Name of the data, for messages.

    Raises:
        DataError: No subject has the target, too few have it, or folds leave nobody to pretrain on.
    """
    target = find_target(data, target, where)
    codes = data.subject_codes
    has = _having(data, target)
    known = np.unique(codes[has])
    # Pretraining takes subjects of any other target, or of a split of their own, for labelled ones.
    classes = np.array([known_label(label) for label in data.labels], dtype=bool)
    marked = np.isin(codes, codes[classes | data.has_mask | data.has_boxes | (data.splits != "")])
    free = np.unique(codes[~marked])
    if len(known) < LEAST:
        raise DataError(
            f"{where}: {count_of(len(known), 'subject')} of {len(np.unique(codes))} with {target}; a study "
            f"needs {LEAST} or more to train and test on"
        )
    own = bool((data.splits != "").any())
    folds, why = _folds(folds, len(known), len(free), own, where)
    split = house_split(data)
    if folds:
        rest = len(known) - -(-len(known) // folds)
        people = (rest - rest // 6 if rest >= 6 else rest, rest // 6 if rest >= 6 else 0, len(known) - rest)
        tested, pretrained_on = len(known), len(free)
    else:
        parts = [len(np.unique(codes[has & (split == part)])) for part in ("train", "val", "test")]
        people = (parts[0], parts[1], parts[2])
        tested = people[2]
        pretrained_on = len(free) + len(np.unique(codes[marked & (split == "train")]))
        if people[0] < 2 or people[2] < 2:
            raise DataError(
                f"{where}: {people[0]} subjects with {target} to train on and {people[2]} to test on; a "
                "study needs two of each: give more data"
            )
    each = int(has.sum()) / len(known)
    return Look(
        tuple(sorted(set(map(str, data.datasets)))), len(np.unique(codes)), len(data), target, len(known),
        len(free), _median(data.shapes[:, 1:]), _spacing(data), folds, why,
        (round(people[0] * each), round(people[1] * each), round(people[2] * each)), tested, pretrained_on,
    )  # fmt: skip


def find_target(data: Collection, asked: str, where: str) -> str:
    """Return the kind of target that is asked for, or of auto masks, boxes or labels, in this order.

    Raises:
        DataError: The data does not have it.
    """
    labels = [label for label in data.labels if known_label(label)]
    there = {"masks": bool(data.has_mask.any()), "boxes": bool(data.has_boxes.any())}
    if asked == "auto":
        kind = next((kind for kind, has in there.items() if has), "")
        if not kind and labels:
            kind = kind_of_labels(labels, where)
        if not kind:
            raise DataError(
                f"{where}: none of {count_of(len(data), 'volume')} has a mask, a box or a label, so "
                f"nothing can be fine-tuned; {CSV_HELP}"
            )
        return kind
    if not there.get(asked, bool(labels)):
        raise DataError(f"{where}: no volume has what --target {asked} needs; {CSV_HELP}")
    return asked


def _having(data: Collection, target: str) -> np.ndarray:
    if target in ("masks", "boxes"):
        return np.asarray(data.has_mask if target == "masks" else data.has_boxes, dtype=bool)
    return np.array([known_label(label) for label in data.labels], dtype=bool)


def _folds(asked: int | None, labelled: int, free: int, own: bool, where: str) -> tuple[int, str]:
    """Return the number of folds, and why."""
    if asked:
        if not free:
            raise DataError(
                f"{where}: --folds {asked} tests every subject with a target, so that pretraining needs "
                "subjects without one, and there are none; leave out --folds, or give more scans"
            )
        if asked > labelled:
            raise DataError(f"{where}: --folds {asked}, but {labelled} subjects have a target")
        return asked, "as asked for"
    if asked == 0:
        return 0, "as asked for"
    if own:
        return 0, "the data has a split of its own"
    if free >= labelled:
        return min(FOLDS, labelled), (
            f"{free} subjects without a target are enough to pretrain on, so each of the {labelled} others "
            "is tested once"
        )
    return 0, (
        f"only {free} subjects have no target, so pretraining needs the training subjects too (their "
        "targets unseen), and must never see the test subjects"
    )


def _median(rows: np.ndarray) -> tuple[int, int, int]:
    d, h, w = (int(side) for side in np.median(np.asarray(rows), axis=0))
    return d, h, w


def _spacing(data: Collection) -> tuple[float, float, float]:
    d, h, w = (float(side) for side in np.nanmedian(np.asarray(data.spacings, dtype=float), axis=0))
    return d, h, w
