"""The house split: by subject, within each data set, by a stable hash, stratified by class and target."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl3d.data.store.collection import Collection
from ssl3d.rng import seed_of

NAMES = ("train", "val", "test")


def house_split(
    collection: Collection,
    seed: int = 0,
    fractions: Sequence[float] = (0.6, 0.2, 0.2),
    by_target: bool = True,
) -> np.ndarray:
    """Assign train, val or test to every volume; a subject is never in two of them.

    The data's own split holds wherever a data set has one: subjects with a split keep it (of several,
    the one furthest from training), the rest of that data set trains. Data that comes as train and test
    only gets its validation subjects from train. A data set without any is cut at the fractions, its
    subjects ordered by a hash of (seed, data set, subject), each class apart so that every part has its
    share; those without a label, a mask or boxes apart from those with, or the few annotated ones of many
    might all land in one part. A subject's place depends on its own data set only, so adding another moves
    nobody.

    Args:
        collection: Volumes of any stores.
        seed: Seed of the hash.
        fractions: Shares of train, val and test; they sum to 1.
        by_target: Whether subjects with a label, a mask or boxes are cut apart from those without; False
            cuts as was done before, which runs that go on need.

    Returns:
        (N,) strings.

    Raises:
        ValueError: The fractions are negative or do not sum to 1.

    Example:
        >>> from ssl3d.api import house_split, open_data
        >>> sorted(house_split(open_data(["phantoms:4"])).tolist())
        ['test', 'train', 'train', 'val']
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions {tuple(fractions)}: expected three from 0 that sum to 1")
    people = collection.subject_codes
    codes, first = np.unique(people, return_index=True)
    position = np.searchsorted(codes, people)
    given = _own_split(collection.splits, position, len(codes))
    names, subjects = collection.datasets[first], collection.subjects[first]
    classes = _classes(collection.datasets, collection.labels, position, len(codes))
    targets = _targets(collection, position, len(codes)) if by_target else [()] * len(codes)
    strata = list(zip(classes, targets, strict=True))
    part = np.empty(len(codes), dtype=object)
    by_dataset: dict[str, list[int]] = defaultdict(list)
    for person, name in enumerate(names):
        by_dataset[name].append(person)
    for name, members in by_dataset.items():
        own = {given[person] for person in members} - {""}
        if own:
            for person in members:
                part[person] = given[person] or "train"
            if own & {"val"} or fractions[1] == 0 or fractions[0] + fractions[1] == 0:
                continue
            cut, share = (
                [p for p in members if part[p] == "train"],
                fractions[1] / (fractions[0] + fractions[1]),
            )
            shares: tuple[float, ...] = (1 - share, share, 0.0)
        else:
            cut, shares = members, tuple(fractions)
        order = sorted(cut, key=lambda p: seed_of("split", seed, name, subjects[p]))
        for person, where in zip(order, _cut([strata[p] for p in order], shares), strict=True):
            part[person] = where
    return part[position].astype(str)


def _own_split(splits: np.ndarray, position: np.ndarray, count: int) -> list[str]:
    rank = {"": 0, "train": 1, "val": 2, "test": 3}
    given = np.zeros(count, np.int64)
    np.maximum.at(given, position, np.array([rank[s] for s in splits], np.int64))
    return [("", *NAMES)[r] for r in given]


def _targets(collection: Collection, position: np.ndarray, count: int) -> list[tuple[bool, ...]]:
    """Tell whether each person has a label, a mask and boxes, in any volume."""
    labelled = np.array([label is not None for label in collection.labels], dtype=bool)
    annotated = np.zeros((count, 3), dtype=bool)
    for kind, has in enumerate((labelled, collection.has_mask, collection.has_boxes)):
        annotated[position[np.asarray(has, dtype=bool)], kind] = True
    return [tuple(row) for row in annotated.tolist()]


def _classes(datasets: np.ndarray, labels: np.ndarray, position: np.ndarray, count: int) -> list[str]:
    """Return the class of each person (of several volumes, the first that has one); "" for real values.

    A class is told from a real value by the labels of a person's own data set. Whole numbers stored as
    floats (0.0 and 1.0, as pandas writes 0 and 1 of a column with gaps) are classes as 0 and 1 are.
    """
    classes = [""] * count
    by_dataset: dict[str, set[object]] = defaultdict(set)
    for name, label in zip(datasets, labels, strict=True):
        by_dataset[name].add(_whole(label))
    real = {
        name
        for name, values in by_dataset.items()
        if len(values) > 50 or any(isinstance(value, float) for value in values)
    }
    for name, person, label in zip(datasets, position, labels, strict=True):
        if label is not None and not classes[person] and name not in real:
            classes[person] = str(_whole(label))
    return classes


def _whole(label: object) -> object:
    """Return a label as it is; an int if it is a float without a fraction."""
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _cut(strata: Sequence[tuple[Any, ...]], shares: Sequence[float]) -> list[str]:
    """Share people out, stratum after stratum, so that both strata and the whole come out at the shares.

    Person k of the queue of all strata goes to the part that is furthest behind its share; counted
    over the whole queue, rounding does not add up over strata.
    """
    result = [""] * len(strata)
    dealt = dict.fromkeys(range(3), 0)
    queue = [i for kind in sorted(set(strata)) for i in range(len(strata)) if strata[i] == kind]
    for number, person in enumerate(queue, start=1):
        behind = [shares[k] * number - dealt[k] if shares[k] > 0 else -np.inf for k in range(3)]
        chosen = int(np.argmax(behind))
        dealt[chosen] += 1
        result[person] = NAMES[chosen]
    return result
