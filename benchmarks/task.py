"""Targets and classes, folds and their digest, nested subsets: what every protocol shares about data."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import (
    DataError,
    UsageError,
    house_split,
    not_written,
    printable,
    split_digest,
    statistics,
    write_whole,
)

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
    """Masks (N,) of the training, validation and test volumes."""

    train: Array
    val: Array
    test: Array


@dataclass(frozen=True)
class SplitData:
    """Data with its targets, split into training, validation and test volumes.

    Attributes:
        data: Volumes that have a target.
        config: Options of the benchmark, with the target and the classes resolved.
        folds: Parts of the data; a single fold, unless cross-validated.
        digest: Hash of the folds.
        how: Origin of the split, for tables and records.
        strata: Class of each volume for stratified subsets; None for values and masks.
    """

    data: Collection
    config: Any
    folds: list[Fold]
    digest: str
    how: str
    strata: Array | None


@dataclass(frozen=True)
class TrainingSubset:
    """Part of the training and validation data, by which learning with fewer labels is measured.

    Attributes:
        fraction: Share of the training subjects.
        repeat: Number of the subset among those of its size.
        folds: Masks (N,) of the training and of the validation volumes, for each fold.
    """

    fraction: float
    repeat: int
    folds: tuple[tuple[Array, Array], ...]


# Targets ------------------------------------------------------------------------------------------


def known_label(label: Any) -> bool:
    """Return whether a volume has a label: neither None, nor empty, nor NaN."""
    return label is not None and label != "" and not (isinstance(label, float) and np.isnan(label))


def find_target(data: Collection, asked: str, where: str) -> str:
    """Return the kind of target: the one asked for, or the one that the labels suggest.

    Args:
        data: All volumes, with and without a label.
        asked: auto, classes, ordinal, real or masks.
        where: Name of the data, for messages.

    Raises:
        DataError: The data has no labels and no masks (or not what was asked for).
    """
    labels = [label for label in data.labels if known_label(label)]
    masks = bool(data.has_mask.any())
    if asked == "masks":
        if not masks:
            raise DataError(f"{where}: no volume has a mask, which --target masks needs; {CSV_HELP}")
        _tell_of_regions(data)
        return "masks"
    if asked != "auto":
        if not labels:
            raise DataError(f"{where}: no volume has a label, which --target {asked} needs; {CSV_HELP}")
        return asked
    if not labels and not masks:
        raise DataError(f"{where}: the {len(data)} volumes have neither labels nor masks; {CSV_HELP}")
    if not labels:
        _tell_of_regions(data)
        return "masks"
    if masks:
        say("the data has masks too; use --target masks to probe them")
    return kind_of_labels(labels, where)


def _tell_of_regions(data: Collection) -> None:
    """Say of which data sets the structures overlap, which a probe of the masks does not look at."""
    regions = {
        name: own
        for settings in data.settings
        for name, own in (settings.get("mask_regions") or {}).items()
    }
    for dataset in sorted(regions.keys() & set(data.datasets)):
        structures = ", ".join(region["name"] for region in regions[dataset])
        say(f"{dataset}: its structures overlap ({structures}); the mask's values are scored one by one")


def kind_of_labels(labels: Sequence[Any], where: str) -> str:
    """Return `real` if a label is a fraction, else `classes`.

    Raises:
        DataError: Most labels are fractions, and some are no number at all.
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
    """Return the values in the masks, sorted, 0 among them."""
    from ssl3d.api import mask_values as values_in

    return tuple(sorted({0}.union(*(values_in(volume).tolist() for volume in data))))


def class_names(data: Collection) -> tuple[str, ...]:
    """Return the labels as classes, in their order.

    Raises:
        DataError: There is one class only, or there are too many to be classes.
    """
    labels = set(data.labels)
    try:
        ordered = sorted(labels)
    except TypeError:  # numbers and names
        ordered = sorted(labels, key=str)
    names = tuple(dict.fromkeys(str(label) for label in ordered))
    if len(names) < 2:
        raise DataError(
            f"all {len(data)} labelled volumes are of class {names[0]!r}: classification needs two classes"
        )
    if len(names) > max(20, len(data) // 4):
        raise DataError(
            f"{len(names)} classes in {len(data)} volumes: not classes; use --target real or ordinal"
        )
    return names


def tell_lone_values(data: Collection, values: Sequence[set[int]], help: str = "") -> None:
    """Warn of mask values that one subject alone has; the mean over classes counts each value equally.

    Args:
        data: Volumes with masks.
        values: Values in the mask of each volume.
        help: Further advice that ends the warning.
    """
    people = data.subject_codes
    if len(np.unique(people)) < 4:
        return
    for value in sorted(set().union(*values) - {0}):
        own = [k for k, has in enumerate(values) if value in has]
        if len(np.unique(people[own])) == 1:
            say(
                f"mask value {value} is in the mask of one subject alone ({data[own[0]].id}) and is scored "
                f"like any other class; if it is no class, correct the mask{help}"
            )


def ignored_values(data: Collection) -> dict[str, int]:
    """Return the mask value of voxels that nobody annotated, for each data set that has one."""
    names = set(data.datasets)
    known: dict[str, int] = {}
    for settings in data.settings:
        known |= settings.get("mask_ignore") or {}
    return {name: int(value) for name, value in known.items() if name in names}


def mask_names(data: Collection) -> tuple[str, ...]:
    """Return the mask values as classes, background first, with a warning of lone ones.

    The value of voxels that nobody annotated is none.

    Raises:
        DataError: Every mask is empty.
    """
    from ssl3d.api import mask_values as values_in

    ignored = ignored_values(data)
    each = [set(values_in(volume).tolist()) - {ignored.get(volume.dataset)} for volume in data]
    values = sorted({0}.union(*each))
    tell_lone_values(data, each)
    if len(values) < 2:
        raise DataError("every mask is empty: the dense probe needs a class to find")
    return tuple(map(str, values))


def check_numbers(labels: Array, target: str) -> None:
    """Raise a DataError for a label that is no finite number."""
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
    """Return advice about test subjects that pretraining saw."""
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
) -> SplitData:
    """Split the data that has a target into its folds.

    The split is that of the whole data, as pretraining makes it, so that test subjects are the same.

    Args:
        whole: All volumes, with and without a target.
        known: Mask (N,) of the volumes that have a target.
        config: Options of the benchmark, which the result keeps.
        strata: Class of each volume that has a target, or None.
        where: Name of the data, for messages.
        folds: Number of folds of a cross-validation by subject; 0 for the split of pretraining.
        seed: Seed of the folds.
        choose: Whether folds need validation subjects (a sixth of the training subjects).
        noun: Name of the method that needs subjects, for messages.

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
        all_folds = [_fold(data, number == k, strata, choose, seed) for k in range(folds)]
        how = f"{folds}-fold cross-validation by subject"
        digest = split_digest(data, [str(k) for k in number])
    else:
        all_folds = [Fold(parts == "train", parts == "val", parts == "test")]
        how = "the data's own split" if any(data.splits) else "house split by subject"
        digest = split_digest(data, list(parts))
    for fold in all_folds:
        codes = data.subject_codes
        train, test = len(np.unique(codes[fold.train])), len(np.unique(codes[fold.test]))
        if train < 2 or test < 2 - (len(all_folds) > 1):  # the folds' test subjects are scored together
            raise DataError(
                f"{where}: {train} subjects to train on and {test} to test on; {noun} "
                "needs two of each: give more data, or use --folds"
            )
    return SplitData(data, config, all_folds, digest, how, strata)


def _fold(data: Collection, test: Array, strata: Array | None, choose: bool, seed: int) -> Fold:
    """Return one fold; with `choose`, a sixth of the training subjects become validation subjects."""
    rest = np.flatnonzero(~test)
    val = np.zeros(len(data), dtype=bool)
    people = data.subject_codes[rest]
    if choose and len(np.unique(people)) >= 6:
        kinds = None if strata is None else strata[rest]
        val[rest[statistics.grouped_folds(people, kinds, 6, ("val", seed)) == 0]] = True
    return Fold(~test & ~val, val, test)


def scored_on_validation(split: SplitData) -> SplitData:
    """Return the split whose validation subjects are scored; nobody is left to choose a step on.

    Raises:
        DataError: There are no validation subjects.
    """
    folds = [Fold(fold.train, np.zeros_like(fold.val), fold.val) for fold in split.folds]
    if not all(fold.test.any() for fold in folds):
        raise DataError("--part val: the data has no validation subjects; give more data")
    parts = np.select([folds[0].train, folds[0].test], ["train", "val scored"], "left out")
    digest = split_digest(split.data, list(parts))
    return replace(split, folds=folds, digest=digest, how=f"{split.how}, validation subjects scored")


def headline(split: SplitData, target: str, classes: Sequence[str]) -> str:
    """Describe data, target and numbers of subjects in one line."""
    people = split.data.subject_codes
    if len(split.folds) > 1:
        counts = f"{len(np.unique(people))} subjects"
    else:
        fold = split.folds[0]
        sizes = [len(np.unique(people[part])) for part in (fold.train, fold.val, fold.test)]
        counts = f"{sizes[0]} / {sizes[1]} / {sizes[2]} subjects to train, choose, test"
    names = ", ".join(sorted(set(split.data.datasets)))
    about = f"{target} ({', '.join(classes)})" if classes else target
    return f"{names}: {about}; {len(split.data)} volumes, {counts}, {split.how}"


# Subsets ------------------------------------------------------------------------------------------


def training_subsets(
    split: SplitData, fractions: Sequence[float], repeats: int, seed: int
) -> Iterator[TrainingSubset]:
    """Draw nested subsets, the largest first, the same for all contestants; validation shrinks too."""
    for fraction in sorted(set(fractions), reverse=True):
        for repeat in range(1 if fraction == 1 else repeats):
            folds = []
            for number, fold in enumerate(split.folds):
                key = (seed, repeat, number)
                train = _subset(split, fold.train, fractions, key, fraction, 2)
                val = _subset(split, fold.val, fractions, (*key, "val"), fraction, 1)
                folds.append((train, val))
            yield TrainingSubset(fraction, repeat, tuple(folds))


def _subset(
    split: SplitData, rows: Array, fractions: Sequence[float], seed: object, fraction: float, least: int
) -> Array:
    if fraction == 1 or not rows.any():
        return rows
    inside = np.flatnonzero(rows)
    strata = None if split.strata is None else split.strata[inside]
    chosen = statistics.nested_subsets(split.data.subject_codes[inside], strata, fractions, seed, least)[
        fraction
    ]
    kept = np.zeros(len(rows), dtype=bool)
    kept[inside[chosen]] = True
    return kept


def counts(split: SplitData, subset: TrainingSubset) -> dict[str, Any]:
    """Count subjects and volumes of each part (of the first fold), for a record."""
    people = split.data.subject_codes
    test = np.any([fold.test for fold in split.folds], axis=0)
    parts: dict[str, Any] = {"how": split.how, "folds": len(split.folds)}
    train, val = subset.folds[0]
    for name, rows in (("train", train), ("val", val), ("test", test)):
        parts[name] = {"subjects": len(np.unique(people[rows])), "volumes": int(rows.sum())}
    parts["train"]["of_subjects"] = len(np.unique(people[split.folds[0].train]))
    return parts


def say(text: str) -> None:
    """Print a line on stderr, so that a pipe gets results alone."""
    print(printable(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print the lines of a text on stdout, with what no terminal takes in names escaped."""
    print("\n".join(map(printable, text.split("\n"))), flush=True)


def write_table(folder: Path, text: str) -> None:
    """Write the table that a command shows beside its records, as `table.txt`.

    Raises:
        TransientError: The disk is full.
        UsageError: The folder cannot be written.
    """
    path = folder / "table.txt"
    try:
        write_whole(path, text + "\n")
    except OSError as error:
        raise not_written(error, f"cannot write {path}: {error.strerror}") from error
