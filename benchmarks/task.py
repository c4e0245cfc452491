"""What every protocol shares about data: targets and classes, folds and their digest, nested subsets."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import DataError, UsageError, house_split, split_digest, statistics

if TYPE_CHECKING:
    from ssl3d.api import Collection, Result

Array = NDArray[Any]

CSV_HELP = (
    "write a CSV with the columns path,subject,label (such as `scans/p01.nii.gz,p01,healthy`; a column "
    "`mask` for the dense probe, `split` if you have one) and give it as --data"
)
_LEAK_HELP = (
    "pretrain on the labelled list itself, whose test subjects are then left out, or give both lists a "
    "column `split` (train, val, test)"
)

_FOLDS_LEAK_HELP = (
    "with --folds every labelled subject is tested on: pretrain on scans of other people alone, or leave "
    "out --folds and pretrain on this list itself, whose test subjects are then left out"
)


@dataclass(frozen=True)
class Fold:
    """Rows of the data in each part, as masks (N,)."""

    train: Array
    val: Array
    test: Array


@dataclass(frozen=True)
class Task:
    """What is learned: the data with its targets, its folds and their digest.

    Attributes:
        data: The volumes that have a target.
        config: The benchmark's options, with the target and the classes resolved.
        folds: One, unless cross-validated.
        digest: Of the folds.
        how: How the split was made.
        strata: Class of each volume for stratified subsets, None for values and masks.
    """

    data: Collection
    config: Any
    folds: list[Fold]
    digest: str
    how: str
    strata: Array | None


@dataclass(frozen=True)
class Job:
    """A subset of the training data.

    Attributes:
        fraction: Of the training subjects.
        repeat: Which subset of that size.
        subsets: Per fold, the rows of train and of val, as masks (N,).
    """

    fraction: float
    repeat: int
    subsets: tuple[tuple[Array, Array], ...]


# Targets ------------------------------------------------------------------------------------------


def known_label(label: Any) -> bool:
    """Whether it is one."""
    return label is not None and label != "" and not (isinstance(label, float) and np.isnan(label))


def find_target(data: Collection, asked: str, where: str) -> str:
    """The kind of target: as said, or by what the labels are.

    Args:
        data: All of it.
        asked: auto, classes, ordinal, real or masks.
        where: The data's name, for messages.

    Raises:
        DataError: The data has no labels and no masks (or not what was asked for).
    """
    labels = [label for label in data.labels if known_label(label)]
    masks = bool(data.has_mask.any())
    if asked == "masks":
        if not masks:
            raise DataError(f"{where}: no volume has a mask, which --target masks needs; {CSV_HELP}")
        return "masks"
    if asked != "auto":
        if not labels:
            raise DataError(f"{where}: no volume has a label, which --target {asked} needs; {CSV_HELP}")
        return asked
    if not labels and not masks:
        raise DataError(f"{where}: the {len(data)} volumes have neither labels nor masks; {CSV_HELP}")
    if not labels:
        return "masks"
    if masks:
        say("the data has masks too: --target masks probes them")
    return kind_of_labels(labels, where)


def kind_of_labels(labels: Sequence[Any], where: str) -> str:
    """`real` if one is a fraction, else `classes`.

    Raises:
        DataError: Most are fractions, and some are no number at all.
    """
    odd = [label for label in labels if not _is_number(label)]
    fractions = [label for label in labels if _is_number(label) and not float(label).is_integer()]
    if odd and len(fractions) > len(labels) / 2:
        raise DataError(
            f"{where}: {len(fractions)} of {len(labels)} labels are numbers like {fractions[0]}, but not "
            f"{odd[0]!r}: correct or empty it in the list and prepare again, or ask for classes"
        )
    real = any(isinstance(label, float) and not float(label).is_integer() for label in labels)
    return "real" if real else "classes"


def mask_values(data: Collection) -> tuple[int, ...]:
    """The values in the masks, sorted, 0 among them."""
    from ssl3d.api import mask_values as values_in

    return tuple(sorted({0}.union(*(values_in(volume).tolist() for volume in data))))


def class_names(data: Collection) -> tuple[str, ...]:
    """The labels as classes, in their order.

    Raises:
        DataError: There is one class only, or so many that they are none.
    """
    labels = set(data.labels)
    try:
        ordered = sorted(labels)
    except TypeError:  # numbers and names
        ordered = sorted(labels, key=str)
    names = tuple(dict.fromkeys(str(label) for label in ordered))
    if len(names) < 2:
        raise DataError(
            f"all {len(data)} labelled volumes are of class {names[0]!r}: a probe needs two classes"
        )
    if len(names) > max(20, len(data) // 4):
        raise DataError(
            f"{len(names)} classes in {len(data)} volumes: not classes; use --target real or ordinal"
        )
    return names


def tell_lone_values(data: Collection, values: Sequence[set[int]], help: str = "") -> None:
    """Says which mask values one subject alone has: the mean over classes counts each as much as any other.

    Args:
        data: Volumes with masks.
        values: Of each one's mask.
        help: What else can be done about it.
    """
    people = data.subject_codes
    if len(np.unique(people)) < 4:
        return
    for value in sorted(set().union(*values) - {0}):
        own = [k for k, has in enumerate(values) if value in has]
        if len(np.unique(people[own])) == 1:
            say(
                f"mask value {value}: in the mask of one subject alone ({data[own[0]].id}), and scored as "
                f"a class as much as any other; if it is none, correct the mask{help}"
            )


def mask_names(data: Collection) -> tuple[str, ...]:
    """The mask values as classes, background first.

    Raises:
        DataError: Every mask is empty.
    """
    from ssl3d.api import mask_values as values_in

    each = [set(values_in(volume).tolist()) for volume in data]
    values = sorted({0}.union(*each))
    tell_lone_values(data, each)
    if len(values) < 2:
        raise DataError("every mask is empty: the dense probe needs a class to find")
    return tuple(map(str, values))


def check_numbers(labels: Array, target: str) -> None:
    """Raises a DataError for a label that is no number, or none that there is an end to."""
    for label in labels:
        if not _is_number(label):
            raise DataError(f"--target {target}: label {label!r} is not a number")


def _is_number(label: Any) -> bool:
    try:
        return math.isfinite(float(label))
    except (TypeError, ValueError):
        return False


# Folds --------------------------------------------------------------------------------------------


def leak_help(result: Result) -> str:
    """What to do about test subjects that pretraining saw."""
    return _FOLDS_LEAK_HELP if int(result.split.get("folds") or 0) > 1 else _LEAK_HELP


def split_up(
    whole: Collection,
    known: Array,
    config: Any,
    strata: Array | None,
    where: str,
    folds: int = 0,
    seed: int = 0,
    choose: bool = False,
    noun: str = "a probe",
) -> Task:
    """The data that has a target, in its folds.

    The split is that of the whole data, as pretraining makes it, so that test subjects are the same.

    Args:
        whole: All the data.
        known: Which volumes have a target (N,).
        config: Kept by the task.
        strata: Class of each volume that is known, or None.
        where: The data's name, for messages.
        folds: Of a cross-validation by subject; 0 for the split of pretraining.
        seed: Of the folds.
        choose: Whether folds need validation subjects (a sixth of the training subjects).
        noun: What needs subjects, for messages.

    Raises:
        DataError: There are too few subjects.
        UsageError: There are more folds than subjects.
    """
    parts = house_split(whole)[known]
    data = whole.select(known)
    if folds:
        people = len(np.unique(data.subject_codes))
        if folds > people:
            raise UsageError(f"--folds {folds}: the data has {people} subjects")
        number = statistics.grouped_folds(data.subject_codes, strata, folds, seed)
        made = [_fold(data, number == k, strata, choose, seed) for k in range(folds)]
        how = f"{folds}-fold cross-validation by subject"
        digest = split_digest(data, [str(k) for k in number])
    else:
        made = [Fold(parts == "train", parts == "val", parts == "test")]
        how = "the data's own split" if any(data.splits) else "house split by subject"
        digest = split_digest(data, list(parts))
    for fold in made:
        codes = data.subject_codes
        train, test = len(np.unique(codes[fold.train])), len(np.unique(codes[fold.test]))
        if train < 2 or test < 2 - (len(made) > 1):  # the folds' test subjects are scored together
            raise DataError(
                f"{where}: {train} subjects to train on and {test} to test on; {noun} "
                "needs two of each: give more data, or use --folds"
            )
    return Task(data, config, made, digest, how, strata)


def _fold(data: Collection, test: Array, strata: Array | None, choose: bool, seed: int) -> Fold:
    """One fold; what must choose on validation subjects gets a sixth of the training subjects."""
    rest = np.flatnonzero(~test)
    val = np.zeros(len(data), dtype=bool)
    people = data.subject_codes[rest]
    if choose and len(np.unique(people)) >= 6:
        kinds = None if strata is None else strata[rest]
        val[rest[statistics.grouped_folds(people, kinds, 6, ("val", seed)) == 0]] = True
    return Fold(~test & ~val, val, test)


def headline(task: Task, target: str, classes: Sequence[str]) -> str:
    """One line: the data, the target, how many subjects for what."""
    people = task.data.subject_codes
    if len(task.folds) > 1:
        counts = f"{len(np.unique(people))} subjects"
    else:
        fold = task.folds[0]
        sizes = [len(np.unique(people[part])) for part in (fold.train, fold.val, fold.test)]
        counts = f"{sizes[0]} / {sizes[1]} / {sizes[2]} subjects to train, choose, test"
    names = ", ".join(sorted(set(task.data.datasets)))
    what = f"{target} ({', '.join(classes)})" if classes else target
    return f"{names}: {what}; {len(task.data)} volumes, {counts}, {task.how}"


# Subsets ------------------------------------------------------------------------------------------


def jobs(task: Task, fractions: Sequence[float], repeats: int, seed: int) -> Iterator[Job]:
    """Nested subsets, the same for every contestant; largest fraction first, validation shrinks too."""
    for fraction in sorted(set(fractions), reverse=True):
        for repeat in range(1 if fraction == 1 else repeats):
            subsets = []
            for number, fold in enumerate(task.folds):
                key = (seed, repeat, number)
                train = _subset(task, fold.train, fractions, key, fraction, 2)
                val = _subset(task, fold.val, fractions, (*key, "val"), fraction, 1)
                subsets.append((train, val))
            yield Job(fraction, repeat, tuple(subsets))


def _subset(
    task: Task, rows: Array, fractions: Sequence[float], seed: object, fraction: float, least: int
) -> Array:
    if fraction == 1 or not rows.any():
        return rows
    inside = np.flatnonzero(rows)
    strata = None if task.strata is None else task.strata[inside]
    chosen = statistics.nested_subsets(task.data.subject_codes[inside], strata, fractions, seed, least)[
        fraction
    ]
    kept = np.zeros(len(rows), dtype=bool)
    kept[inside[chosen]] = True
    return kept


def counts(task: Task, job: Job) -> dict[str, Any]:
    """Subjects and volumes of each part (of the first fold), for a record."""
    people = task.data.subject_codes
    test = np.any([fold.test for fold in task.folds], axis=0)
    found: dict[str, Any] = {"how": task.how, "folds": len(task.folds)}
    train, val = job.subsets[0]
    for name, rows in (("train", train), ("val", val), ("test", test)):
        found[name] = {"subjects": len(np.unique(people[rows])), "volumes": int(rows.sum())}
    found["train"]["of_subjects"] = len(np.unique(people[task.folds[0].train]))
    return found


def say(text: str) -> None:
    """To the terminal, not into what is piped on."""
    print(text, file=sys.stderr, flush=True)
