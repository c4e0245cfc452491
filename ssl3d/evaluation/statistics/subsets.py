"""Nested subsets for few-label runs, and folds that keep groups together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl3d.evaluation.statistics.metrics import Array
from ssl3d.rng import numpy_rng


def nested_subsets(
    subjects: ArrayLike,
    classes: ArrayLike | None,
    fractions: Sequence[float],
    seed: object = 0,
    least: int = 2,
) -> dict[float, NDArray[np.bool_]]:
    """Select the rows of the first subjects of one random order: a smaller subset is in a larger.

    The order keeps the classes' proportions in every prefix as nearly as whole subjects allow, after
    `least` subjects of every class (no classifier learns a class of which it has none).

    Args:
        subjects: Subject of each row (N,).
        classes: Class of each row (N,), a subject counts as the class of its first row; None for no
            classes.
        fractions: Shares of the subjects, each in (0, 1].
        seed: Seed with a stable repr: another one, another order.
        least: Number of subjects that every class has in the smallest subset, where it has them at all.

    Raises:
        ValueError: A fraction is outside (0, 1].

    Example:
        >>> nested_subsets(["a", "b", "c", "d"], None, (0.5, 1.0))[0.5]
        array([ True,  True, False, False])
    """
    subjects = np.asarray(subjects)
    names, first, codes = np.unique(subjects, return_index=True, return_inverse=True)
    kinds = np.zeros(len(names), dtype=int)
    if classes is not None:
        kinds = np.unique(np.asarray(classes)[first], return_inverse=True)[1].ravel()
    order = _stratified_order(kinds, numpy_rng("subsets", seed), least)
    floor = sum(min(least, int(np.sum(kinds == kind))) for kind in np.unique(kinds))
    chosen = {}
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"fractions: {fraction} is not in (0, 1]")
        size = min(len(names), max(floor, round(fraction * len(names))))
        chosen[fraction] = np.isin(codes.ravel(), order[:size])
    return chosen


def grouped_folds(
    subjects: ArrayLike, classes: ArrayLike | None, folds: int, seed: object = 0
) -> NDArray[np.int64]:
    """Assign a fold to each row: whole subjects, every class (and the subjects) spread evenly.

    Raises:
        ValueError: There are fewer subjects than folds, or fewer than two folds.

    Example:
        >>> grouped_folds(["a", "a", "b", "b", "c", "d"], None, folds=2)
        array([0, 0, 1, 1, 0, 1])
    """
    names, first, codes = np.unique(np.asarray(subjects), return_index=True, return_inverse=True)
    if not 2 <= folds <= len(names):
        raise ValueError(f"folds: {folds} folds of {len(names)} subjects; use 2 to {len(names)}")
    kinds = np.zeros(len(names), dtype=int)
    if classes is not None:
        kinds = np.unique(np.asarray(classes)[first], return_inverse=True)[1].ravel()
    shuffled = numpy_rng("folds", seed).permutation(len(names))
    order = shuffled[np.argsort(kinds[shuffled], kind="stable")]
    fold = np.empty(len(names), dtype=np.int64)
    fold[order] = np.arange(len(names)) % folds  # dealt out like cards, class after class
    return fold[codes.ravel()]


def _stratified_order(kinds: Array, rng: np.random.Generator, least: int) -> Array:
    """Draw an order in which every prefix has the classes' proportions, after `least` of each."""
    place = np.empty(len(kinds))
    for kind in np.unique(kinds):
        members = rng.permutation(np.flatnonzero(kinds == kind))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        place[members[:least]] -= 2.0
    return np.argsort(place, kind="stable")
