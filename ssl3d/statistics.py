"""Metrics as functions of resampling weights, and what is built on them: intervals, tests, subsets, folds.

A bootstrap resample is a vector of counts, one per row. Every metric here takes such weights, (R, N), and
gives R values at once, equal to the plain metric of the resampled rows; so two thousand resamples of an
AUC are one sort and a few cumulative sums, the jackknife is another weight matrix, and a paired
difference is a difference of two calls on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl3d.rng import numpy_rng

Array = NDArray[Any]
Statistic = Callable[[Array], Array]  # weights (R, N) -> values (R,)

LEVEL = 0.95
RESAMPLES = 2000
BLOCK = 10_000_000  # weights in memory at a time


class Interval(NamedTuple):
    """A value with its confidence interval.

    Attributes:
        value: The statistic of the data.
        low: Lower end.
        high: Upper end.
        error: Standard error: the standard deviation over the resamples.
        undefined: Share of the resamples in which the statistic is undefined (a class missing, say).
    """

    value: float
    low: float
    high: float
    error: float
    undefined: float


# Metrics ------------------------------------------------------------------------------------------


def auc(target: ArrayLike, score: ArrayLike, weights: Array | None = None) -> Array:
    """Area under the ROC curve, ties counted half; (R,), NaN where a class has no weight.

    Args:
        target: 0 or 1, (N,).
        score: Higher means class 1, (N,).
        weights: (R, N); all ones, R = 1, if not given.
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
    """AUC as MedMNIST's evaluator has it: of class 1 if there are two, else the mean of one-vs-rest.

    Args:
        target: Class indices, (N,).
        scores: One column per class, (N, K).
        weights: (R, N).
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
    """Weighted mean of (N,), rows of NaN left out; (R,). Accuracy is the mean of the hits."""
    values = np.asarray(values, dtype=np.float64)
    weights = _weights(weights, len(values))
    known = np.isfinite(values)
    return _divide(weights[:, known] @ values[known], weights[:, known].sum(axis=1))


def balanced_accuracy(target: ArrayLike, predicted: ArrayLike, weights: Array | None = None) -> Array:
    """Mean recall over the classes present in `target`; (R,), NaN where one of them has no weight."""
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
    """Spearman's rank correlation with mid-ranks for ties; (R,), NaN where one side is constant."""
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
    """Share of the variance explained, 1 - SSE / SST; (R,). Below 0: worse than the mean."""
    target, predicted = np.asarray(target, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    weights = _weights(weights, len(target))
    centre = (weights @ target) / weights.sum(axis=1)
    spread = (weights * (target[None] - centre[:, None]) ** 2).sum(axis=1)
    return 1.0 - _divide(weights @ (target - predicted) ** 2, spread)


# Intervals and tests ------------------------------------------------------------------------------


def resampling_weights(clusters: ArrayLike, resamples: int = RESAMPLES, seed: object = 0) -> Array:
    """How often each row is drawn when whole clusters (subjects) are drawn with replacement; (R, N).

    The same clusters, count and seed give the same weights, so contestants scored on the same rows are
    compared on the same resamples.
    """
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    number = int(codes.max()) + 1
    drawn = numpy_rng("bootstrap", seed, number).integers(number, size=(resamples, number))
    drawn += number * np.arange(resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=resamples * number).reshape(resamples, number)
    return counts[:, codes.ravel()].astype(np.float64)


def resample(statistic: Statistic, clusters: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """A statistic on every resample (R,), a block of them at a time, so that memory is bounded."""
    clusters = np.asarray(clusters)
    block = max(1, min(resamples, BLOCK // max(1, len(clusters))))
    drawn = [
        statistic(resampling_weights(clusters, min(block, resamples - first), (seed, first)))
        for first in range(0, resamples, block)
    ]
    return np.concatenate(drawn)


def interval(
    statistic: Statistic,
    clusters: ArrayLike,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval over clusters: bias-corrected, accelerated, widened for few clusters.

    BCa (Efron 1987) corrects for skew, which Dice and AUC near 1 have; the widening (Hesterberg 2015,
    "expanded percentile": Student's t in place of the normal, and n - 1 in place of n) makes up for the
    bootstrap's too narrow intervals at twenty or forty subjects. Resamples where the statistic is
    undefined are left out and counted.

    Args:
        statistic: Weights (R, N) to values (R,); a paired difference is the difference of two.
        clusters: What is drawn as one, per row (N,): the subjects.
        level: Of confidence.
        resamples: R.
        seed: Of the resampling.
    """
    clusters = np.asarray(clusters)
    value = float(statistic(np.ones((1, len(clusters))))[0])
    drawn = resample(statistic, clusters, resamples, seed)
    return summarise(value, drawn, clusters, statistic, level)


def summarise(
    value: float, drawn: Array, clusters: Array, statistic: Statistic | None, level: float = LEVEL
) -> Interval:
    """As `interval`, from resampled values at hand (without skew where no statistic is given)."""
    from scipy.stats import norm, t

    defined = drawn[np.isfinite(drawn)]
    undefined = 1.0 - len(defined) / len(drawn)
    number = len(np.unique(clusters))
    if len(defined) < 2 or number < 2 or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"), float("nan"), undefined)
    spread = float(defined.std(ddof=1))
    if spread == 0.0:
        return Interval(value, float(defined.min()), float(defined.max()), 0.0, undefined)
    # Expanded: the t quantile, and sqrt(n / (n - 1)) for the bootstrap's variance of (n - 1) / n.
    reach = float(t.ppf(0.5 + level / 2, number - 1)) * np.sqrt(number / (number - 1))
    share = (np.sum(defined < value) + 0.5 * np.sum(defined == value)) / len(defined)
    bias = float(norm.ppf(np.clip(share, 1 / len(defined), 1 - 1 / len(defined))))
    skew = 0.0 if statistic is None else _acceleration(statistic, clusters)
    ends = []
    for side in (-reach, reach):
        shifted = bias + side
        denominator = max(1.0 - skew * shifted, 0.1)
        ends.append(float(np.quantile(defined, norm.cdf(bias + shifted / denominator))))
    return Interval(value, min(ends), max(ends), spread, undefined)


def permutation_test(
    metric: Callable[[Array], float],
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Two-sided p of "a and b score the same": the predictions of random subjects change sides.

    Args:
        metric: A contestant's predictions, (N, ...), to its score.
        a: Predictions of one contestant, (N, ...).
        b: Of the other, for the same rows. Give ranks where the metric is one of ranks (AUC) and the
            two have different scales.
        clusters: Rows of one cluster change sides together, (N,).
        resamples: Number of permutations.
        seed: Of the permutations.
    """
    a, b = np.asarray(a), np.asarray(b)
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    rng = numpy_rng("permutation", seed)
    observed = abs(metric(a) - metric(b))
    swaps = rng.integers(2, size=(resamples, int(codes.max()) + 1)).astype(bool)[:, codes.ravel()]
    tail = (slice(None), *[None] * (a.ndim - 1))
    extreme = 0
    for swap in swaps:
        mask = swap[tail]
        difference = abs(metric(np.where(mask, b, a)) - metric(np.where(mask, a, b)))
        extreme += bool(difference >= observed - 1e-12)
    return (1 + extreme) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values for their number."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(order))
    running = 0.0
    for position, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - position) * p_values[index]))
        adjusted[index] = running
    return [float(p) for p in adjusted]


def minimum_detectable_difference(error: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided test at `alpha` finds with probability `power`.

    (z[1 - alpha / 2] + z[power]) x the standard error of the paired difference: 2.80 errors by default.
    """
    from scipy.stats import norm

    return float((norm.ppf(1 - alpha / 2) + norm.ppf(power)) * error)


# Subsets and folds --------------------------------------------------------------------------------


def nested_subsets(
    subjects: ArrayLike,
    classes: ArrayLike | None,
    fractions: Sequence[float],
    seed: object = 0,
    least: int = 2,
) -> dict[float, NDArray[np.bool_]]:
    """Rows of the first so many subjects of one random order, so that a smaller subset is in a larger.

    The order keeps the classes' proportions in every prefix as nearly as whole subjects allow, after
    `least` subjects of every class (no classifier learns a class of which it has none).

    Args:
        subjects: Per row (N,).
        classes: Per row (N,), a subject counts as the class of its first row; None for no classes.
        fractions: Of the subjects, each in (0, 1].
        seed: Anything with a stable repr: another one, another order.
        least: Subjects that every class has in the smallest subset, where it has them at all.

    Raises:
        ValueError: A fraction is outside (0, 1].
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
    """A fold per row: whole subjects, every class (and the subjects) spread evenly over the folds.

    Raises:
        ValueError: There are fewer subjects than folds, or fewer than two folds.
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
    """A random order in which every prefix has the classes' proportions, after `least` of each."""
    place = np.empty(len(kinds))
    for kind in np.unique(kinds):
        members = rng.permutation(np.flatnonzero(kinds == kind))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
        place[members[:least]] -= 2.0
    return np.argsort(place, kind="stable")


# Within -------------------------------------------------------------------------------------------


def _weights(weights: Array | None, rows: int) -> Array:
    return np.ones((1, rows)) if weights is None else np.asarray(weights, dtype=np.float64)


def _divide(numerator: Array, denominator: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)


def _tie_starts(ordered: Array) -> Array:
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _midranks(values: Array, weights: Array) -> Array:
    """Mid-ranks (R, N) of the rows within each resample, a row of weight w standing there w times."""
    order = np.argsort(values, kind="stable")
    starts = _tie_starts(values[order])
    group = np.add.reduceat(weights[:, order], starts, axis=1)
    rank = np.cumsum(group, axis=1) - group + (group + 1) / 2
    sizes = np.diff(np.r_[starts, len(values)])
    ranks = np.empty_like(weights)
    ranks[:, order] = np.repeat(rank, sizes, axis=1)
    return ranks


def _acceleration(statistic: Statistic, clusters: Array) -> float:
    """Efron's acceleration from the jackknife over clusters; nothing to gain above a thousand."""
    _, codes = np.unique(clusters, return_inverse=True)
    number = int(codes.max()) + 1
    if number > 1000:
        return 0.0
    left_out = statistic(1.0 - (codes.ravel()[None] == np.arange(number)[:, None]))
    left_out = left_out[np.isfinite(left_out)]
    if len(left_out) < 3:
        return 0.0
    centred = left_out.mean() - left_out
    scale = float((centred**2).sum()) ** 1.5
    return 0.0 if scale < 1e-30 else float((centred**3).sum()) / (6 * scale)
