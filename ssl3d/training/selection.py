"""Choice of the volumes to train on, of the people to keep out, and of queries for the kNN score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ssl3d.amounts import count_of
from ssl3d.errors import DataError
from ssl3d.evaluation.statistics.subsets import grouped_folds
from ssl3d.rng import seed_of

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection

LEAST_FOR_HOLDOUT = 8
BY_SUBJECT = "subject"
BY_TARGET = "subject and target"
"""In a run's record: labelled is who has a label, and the split deals subjects with and without targets
apart. Older runs of `BY_SUBJECT` had them dealt together; runs without either took whole data sets for
labelled."""


@dataclass
class Selection:
    """Parts of the data of a run.

    Attributes:
        train: Volumes that the proxies learn from.
        holdout: Volumes of other people, for the proxies' metrics; may be empty.
        queries: Labelled volumes for the online kNN score, of nobody in `train`; may be empty.
        notes: Lines for the user on what was chosen.
    """

    train: Collection
    holdout: Collection
    queries: Collection
    notes: list[str]


def select(
    data: Collection,
    subjects: str,
    share: float,
    by: str = BY_TARGET,
    leave_out: tuple[int, int] | None = None,
) -> Selection:
    """Choose the volumes by subject, from the data alone, so that runs with other seeds compare.

    Labelled subjects (one of their volumes has a class, a mask, boxes, or the split that it came with)
    give those of the train split, so that a benchmark's test subjects stay unseen. All others are used:
    no benchmark scores them.

    Args:
        data: Volumes to choose from.
        subjects: Labelled subjects to use: "train", "all" of every split, or none ("unlabelled"), so that a
            cross-validation may test on each of them.
        share: Share of the chosen subjects to keep out; at least one subject where there are 8 or more.
        by: Rule of the choice: `BY_TARGET`, or that of an older run that goes on: `BY_SUBJECT`, or anything
            else to take all subjects of a data set for labelled where one is.
        leave_out: Fold of a cross-validation, from 0, and the number of folds: labelled subjects of the
            others are used then, whatever the split.

    Raises:
        DataError: No volume is left to train on, or a data set has fewer labelled subjects than folds.
    """
    from ssl3d.data.split import house_split

    count = len(data)
    codes, names = data.dataset_codes, data.dataset_names
    classes = np.array([label is not None for label in data.labels], dtype=bool)
    known = classes | data.has_mask | data.has_boxes | (data.splits != "")
    by_target = by == BY_TARGET
    split = house_split(data, by_target=by_target) if known.any() else np.full(count, "train", dtype=object)
    unit = data.subject_codes if by in (BY_SUBJECT, BY_TARGET) else codes
    labelled = np.isin(unit, unit[known])
    wanted = {"train": split == "train", "all": np.ones(count, dtype=bool)}
    if leave_out is not None:
        wanted["train"] = ~_tested_on(data, known, *leave_out)
    used = ~labelled | wanted.get(subjects, np.zeros(count, dtype=bool))
    notes = []
    for code in np.unique(codes):
        own = codes == code
        chosen = own & used
        free = int((own & ~labelled).sum())
        why = "labelled in part" if 0 < free < own.sum() else "unlabelled" if free else "labelled"
        part = "all" if subjects == "all" or why == "unlabelled" else "the train split"
        if leave_out is not None and part == "the train split":
            part = f"all but fold {leave_out[0]} of {leave_out[1]}"
        if why != "unlabelled" and subjects == "unlabelled":
            part = "those without a target"
        if why == "labelled in part" and subjects == "train":
            part = f"{int((chosen & labelled).sum())} of {part} + {free} unlabelled"
        people = len(np.unique(data.subject_codes[chosen]))
        notes.append(
            f"{names[code]} ({why}): {part}, {chosen.sum()} of {count_of(own.sum(), 'volume')}, "
            f"{count_of(people, 'subject')}"
        )
    notes += _namesakes(data, used)
    held = _held_out(data, used, share)
    train = used & ~held
    if not train.any():
        raise DataError(f"no volume of {count} is left to train on; --subjects all uses every split")
    if held.any():
        people = len(np.unique(data.subject_codes[held]))
        notes.append(
            f"kept out to report on: {count_of(held.sum(), 'volume')}, {count_of(people, 'subject')}"
        )
    queries = classes & ((split == "val") & ~used | held)
    return Selection(data.select(train), data.select(held), data.select(queries), notes)


def _tested_on(data: Collection, known: np.ndarray, fold: int, folds: int) -> np.ndarray:
    """Tell which volumes are of subjects of a fold, as fine-tuning deals each data set out; (N,)."""
    left = np.zeros(len(data), dtype=bool)
    for code, name in enumerate(data.dataset_names):
        own = data.dataset_codes == code
        rows = own & data.has_mask if (own & data.has_mask).any() else own & known
        people = data.subject_codes
        if not rows.any():
            continue
        count = len(np.unique(people[rows]))
        if count < folds:
            raise DataError(
                f"{name}: --leave-out {fold}/{folds} needs {folds} labelled subjects, not {count}"
            )
        number = grouped_folds(people[rows], None, folds)
        left |= np.isin(people, people[rows][number == fold])
    return left


def _namesakes(data: Collection, used: np.ndarray) -> list[str]:
    """Warn of people kept for tests of one data set whose names are trained on in another.

    P01 may be two people of two hospitals, or one person whose second visit is in another folder, which
    would leak: only the user knows.
    """
    away: dict[str, set[int]] = {}
    codes, subjects = data.dataset_codes, data.subjects
    for code, subject in zip(codes[~used].tolist(), subjects[~used].tolist(), strict=True):
        away.setdefault(subject, set()).add(code)
    pairs = set(zip(codes[used].tolist(), subjects[used].tolist(), strict=True)) if away else set()
    like = sorted({subject for code, subject in pairs if away.get(subject, set()) - {code}})
    if not like:
        return []
    few = ", ".join(like[:3]) + (f" and {len(like) - 3} more" if len(like) > 3 else "")
    return [
        "subjects kept for validation and test have the names of subjects of another data set that are "
        f"trained on: {few}; if they are the same people, prepare both with one name, --dataset NAME"
    ]


def _held_out(data: Collection, used: np.ndarray, share: float) -> np.ndarray:
    held = np.zeros(len(data), dtype=bool)
    if share == 0 or not used.any():
        return held
    people = data.subject_codes
    codes = data.dataset_codes
    identity = dict(zip(people.tolist(), zip(data.datasets.tolist(), data.subjects.tolist()), strict=True))
    every = np.unique(people[used]).tolist()
    order = sorted(every, key=lambda code: seed_of("holdout", *map(str, identity[code])))
    chosen: list[int] = []
    for code in np.unique(codes[used]):
        own = set(np.unique(people[used & (codes == code)]).tolist())
        chosen += [person for person in order if person in own][: int(share * len(own) + 0.5)]
    if not chosen and len(every) >= LEAST_FOR_HOLDOUT:
        chosen = order[:1]
    if len(chosen) >= len(every):
        chosen = chosen[: len(every) - 1]
    return used & np.isin(people, chosen)
