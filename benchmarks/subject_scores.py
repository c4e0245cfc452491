"""Scores of volumes by class as scores of subjects, and their means as functions of resampling weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import statistics

Array = NDArray[Any]


def subject_scores(
    predictions: Sequence[Mapping[str, Any]], names: Sequence[str], score: str
) -> tuple[Array, Array]:
    """Return the subjects (S,) and their mean score over volumes by class (S, K), NaN where undefined.

    Example:
        >>> rows = [{"dataset": "a", "subject": "p1", "dice": {"1": value}} for value in (0.5, 0.75, None)]
        >>> subject_scores(rows, ["1"], "dice")[1]
        array([[0.625]])
    """
    people: dict[str, int] = {}
    codes = [people.setdefault(f"{row['dataset']}\t{row['subject']}", len(people)) for row in predictions]
    values = np.array([
        [np.nan if row[score][name] is None else row[score][name] for name in names] for row in predictions
    ]).reshape(len(predictions), len(names))  # fmt: skip
    known = np.isfinite(values)
    total, count = np.zeros((2, len(people), len(names)))
    np.add.at(total, codes, np.where(known, values, 0.0))
    np.add.at(count, codes, known)
    return np.array(list(people)), np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def class_statistics(table: Array, names: Sequence[str], score: str) -> dict[str, statistics.Statistic]:
    """Return the mean over classes of a table (S, K), and each class, as functions of weights (R, S)."""
    of_class = {
        f"{score}_{name}": partial(statistics.mean, table[:, column]) for column, name in enumerate(names)
    }
    return {score: partial(_over_classes, table), **of_class}


def _over_classes(table: Array, weights: Array) -> Array:
    """Average the defined means of the classes, NaN where none is."""
    each = np.stack([statistics.mean(column, weights) for column in table.T])
    known = np.isfinite(each)
    total = np.where(known, each, 0.0).sum(axis=0)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)
