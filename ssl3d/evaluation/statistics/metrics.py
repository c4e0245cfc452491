"""Metrics as functions of resampling weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

Statistic = Callable[[Array], Array]  # weights (R, N) -> values (R,)

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
    weights = _weights(weights, len(score))
    order = np.argsort(score, kind="stable")
    starts = _tie_starts(score[order])
    up = np.add.reduceat(np.where(positive[order], weights[:, order], 0.0), starts, axis=1)
    down = np.add.reduceat(np.where(positive[order], 0.0, weights[:, order]), starts, axis=1)
    below = np.cumsum(down, axis=1) - down
    pairs = up.sum(axis=1) * down.sum(axis=1)
    return _divide((up * (below + 0.5 * down)).sum(axis=1), pairs)


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
    return _divide(weights[:, known] @ values[known], weights[:, known].sum(axis=1))


def balanced_accuracy(target: ArrayLike, predicted: ArrayLike, weights: Array | None = None) -> Array:
    """Average the recall of the classes in `target`; (R,), NaN where one of them has no weight.

    Example:
        >>> balanced_accuracy([0, 0, 1], [0, 1, 1])
        array([0.75])
    """
    target, predicted = np.asarray(target), np.asarray(predicted)
    weights = _weights(weights, len(target))
    recalls = [
        _divide(
            weights[:, target == k] @ (predicted[target == k] == k), weights[:, target == k].sum(axis=1)
        )
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
    weights = _weights(weights, len(target))
    a, b = _midranks(target, weights), _midranks(predicted, weights)
    total = weights.sum(axis=1, keepdims=True)
    a -= (weights * a).sum(axis=1, keepdims=True) / total
    b -= (weights * b).sum(axis=1, keepdims=True) / total
    covariance = (weights * a * b).sum(axis=1)
    scale = (weights * a**2).sum(axis=1) * (weights * b**2).sum(axis=1)
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
    spread = (weights * (target[None] - centre[:, None]) ** 2).sum(axis=1)
    return 1.0 - _divide(weights @ (target - predicted) ** 2, spread)


def _weights(weights: Array | None, rows: int) -> Array:
    return np.ones((1, rows)) if weights is None else np.asarray(weights, dtype=np.float64)


def _divide(numerator: Array, denominator: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def _tie_starts(ordered: Array) -> Array:
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _midranks(values: Array, weights: Array) -> Array:
    """Rank the rows within each resample (R, N) by mid-ranks, a row of weight w standing there w times."""
    order = np.argsort(values, kind="stable")
    starts = _tie_starts(values[order])
    group = np.add.reduceat(weights[:, order], starts, axis=1)
    rank = np.cumsum(group, axis=1) - group + (group + 1) / 2
    sizes = np.diff(np.r_[starts, len(values)])
    ranks = np.empty_like(weights)
    ranks[:, order] = np.repeat(rank, sizes, axis=1)
    return ranks
