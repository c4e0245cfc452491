"""Metrics as functions of resampling weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

Statistic = Callable[[Array], Array]  # weights (R, N) -> values (R,)
# Metrics take and sort the rows of weights.T: of weights as `resampling_weights` makes them, the resamples
# of a row lie together, and a row moves in one piece.

BOUNDS = {
    **dict.fromkeys(
        ("auc", "accuracy", "balanced_accuracy", "dice", "surface_dice", "cpm", "froc", "ap"), (0.0, 1.0)
    ),
    "spearman": (-1.0, 1.0),
    "r2": (float("-inf"), 1.0),
    **dict.fromkeys(("mae", "hd95"), (0.0, float("inf"))),
}
"""Lowest and highest value of scores by name; those of a class, as `dice_liver`, have the same."""


def bounds_of(name: str) -> tuple[float, float]:
    """Return the lowest and the highest value that a score of this name can have, infinite where unknown.

    Example:
        >>> bounds_of("dice_liver"), bounds_of("spearman")
        ((0.0, 1.0), (-1.0, 1.0))
    """
    known = [key for key in BOUNDS if name == key or name.startswith(f"{key}_")]
    return BOUNDS[max(known, key=len)] if known else (float("-inf"), float("inf"))


def auc(target: ArrayLike, score: ArrayLike, weights: Array | None = None) -> Array:
    """Compute the area under the ROC curve, ties counted half; (R,), NaN where a class has no weight.

    Args:
        target: Classes 0 or 1, (N,).
        score: Scores (N,); higher means class 1.
        weights: Weights of the rows (R, N); all ones, R = 1, if not given.

    Example:
        >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        array([0.75])
        >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], np.array([[1.0, 0, 1, 1], [0, 1.0, 1, 0]]))
        array([1., 0.])
    """
    positive, score = np.asarray(target).astype(bool), np.asarray(score, dtype=np.float64)
    rows = _weights(weights, len(score)).T
    order = np.argsort(score, kind="stable")
    ups, downs = order[positive[order]], order[~positive[order]]
    up, down = rows[ups], rows[downs]
    below = np.zeros((len(downs) + 1, rows.shape[1]))  # weight of the k lowest of class 0
    for k in range(len(downs)):  # an eighth of the time that np.cumsum takes along the first axis
        np.add(below[k], down[k], out=below[k + 1])
    lower, not_higher = (np.searchsorted(score[downs], score[ups], side) for side in ("left", "right"))
    won = np.einsum("ij,ij->j", up, below[lower])
    if np.any(lower != not_higher):
        won = 0.5 * (won + np.einsum("ij,ij->j", up, below[not_higher]))
    return _divide(won, up.sum(axis=0) * below[-1])


def multiclass_auc(target: ArrayLike, scores: ArrayLike, weights: Array | None = None) -> Array:
    """Compute the AUC as MedMNIST's evaluator does: of class 1 of two, else the mean of one-vs-rest.

    Args:
        target: Class indices (N,).
        scores: Scores of each class (N, K).
        weights: Weights of the rows (R, N); all ones, R = 1, if not given.
    """
    target, scores = np.asarray(target), np.asarray(scores, dtype=np.float64)
    if scores.shape[1] == 2:
        return auc(target == 1, scores[:, 1], weights)
    # A class that has no test row says nothing about the ranking and is left out of the mean.
    columns = [auc(target == k, scores[:, k], weights) for k in range(scores.shape[1])]
    present = [np.any(target == k) and not np.all(target == k) for k in range(scores.shape[1])]
    kept = [column for column, there in zip(columns, present, strict=True) if there]
    return np.mean(kept, axis=0) if kept else np.full(len(columns[0]), np.nan)


def mean(values: ArrayLike, weights: Array | None = None) -> Array:
    """Average (N,) with weights, rows of NaN left out; (R,). Accuracy is the mean of the hits.

    Example:
        >>> mean([1.0, 2.0, np.nan])
        array([1.5])
    """
    values = np.asarray(values, dtype=np.float64)
    weights = _weights(weights, len(values))
    known = np.isfinite(values)
    return _divide(weights @ np.where(known, values, 0.0), weights @ known.astype(np.float64))


def balanced_accuracy(target: ArrayLike, predicted: ArrayLike, weights: Array | None = None) -> Array:
    """Average the recall of the classes in `target`; (R,), NaN where one of them has no weight.

    Example:
        >>> balanced_accuracy([0, 0, 1], [0, 1, 1])
        array([0.75])
    """
    target, predicted = np.asarray(target), np.asarray(predicted)
    weights = _weights(weights, len(target))
    recalls = [
        _divide(weights @ ((target == k) & (predicted == k)), weights @ (target == k))
        for k in np.unique(target)
    ]
    return np.mean(recalls, axis=0)


def spearman(target: ArrayLike, predicted: ArrayLike, weights: Array | None = None) -> Array:
    """Compute Spearman's rank correlation, mid-ranks for ties; (R,), NaN where one side is constant.

    Example:
        >>> spearman([1, 2, 3], [1, 4, 9])
        array([1.])
    """
    target, predicted = np.asarray(target, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    rows = _weights(weights, len(target)).T
    a, b = _midranks(target, rows), _midranks(predicted, rows)
    total = rows.sum(axis=0)
    a -= np.einsum("ij,ij->j", rows, a) / total
    b -= np.einsum("ij,ij->j", rows, b) / total
    of_a, of_b = rows * a, rows * b
    covariance = np.einsum("ij,ij->j", of_a, b)
    scale = np.einsum("ij,ij->j", of_a, a) * np.einsum("ij,ij->j", of_b, b)
    return _divide(covariance, np.sqrt(scale))


def r_squared(target: ArrayLike, predicted: ArrayLike, weights: Array | None = None) -> Array:
    """Compute the share of the variance explained, 1 - SSE / SST; (R,). Below 0: worse than the mean.

    Example:
        >>> r_squared([1, 2, 3], [1, 2, 4])
        array([0.5])
    """
    target, predicted = np.asarray(target, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    weights = _weights(weights, len(target))
    centre = (weights @ target) / weights.sum(axis=1)
    rows, apart = weights.T, target[:, None] - centre
    spread = np.einsum("ij,ij,ij->j", rows, apart, apart)
    return 1.0 - _divide(weights @ (target - predicted) ** 2, spread)


def _weights(weights: Array | None, rows: int) -> Array:
    return np.ones((1, rows)) if weights is None else np.asarray(weights, dtype=np.float64)


def _divide(numerator: Array, denominator: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def _tie_starts(ordered: Array) -> Array:
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _midranks(values: Array, rows: Array) -> Array:
    """Rank the rows (N, R) within each resample by mid-ranks, a row of weight w standing there w times."""
    order = np.argsort(values, kind="stable")
    starts = _tie_starts(values[order])
    group = rows[order] if len(starts) == len(values) else np.add.reduceat(rows[order], starts, axis=0)
    rank = np.cumsum(group, axis=0)
    rank += (1 - group) / 2
    sizes = np.diff(np.r_[starts, len(values)])
    ranks = np.empty(rows.shape)
    ranks[order] = rank if len(starts) == len(values) else np.repeat(rank, sizes, axis=0)
    return ranks
