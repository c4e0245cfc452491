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


# Seeds nested in contestants, and repeats of subsets -----------------------------------------------


class Runs(NamedTuple):
    """A contestant's score: how it varies over subjects, over its seeds, over subsets of the training data.

    Attributes:
        each: Score of every seed on every subset, (S, P).
        drawn: The same on every resample of the test subjects, (S, P, R); contestants are compared on the
            same resamples.
        subjects: Number of test subjects.
        skew: Acceleration of the mean score (Efron), for its interval.
    """

    each: Array
    drawn: Array
    subjects: int
    skew: float = 0.0

    @property
    def value(self) -> float:
        """Mean over seeds and subsets."""
        return float(self.each.mean())

    @property
    def mean_drawn(self) -> Array:
        """Mean over seeds and subsets on every resample of the subjects, (R,)."""
        return self.drawn.mean(axis=(0, 1))


class Part(NamedTuple):
    """A part of the variance of a mean: that of its seeds, or of its subsets.

    Attributes:
        variance: Due to them.
        gross: Before the subjects' share was taken off; how well it is known goes by this.
        levels: How many seeds or subsets.
    """

    variance: float
    gross: float
    levels: int


class Difference(NamedTuple):
    """A paired difference between two contestants.

    Attributes:
        value: Of the first over the second.
        low: Lower end of the 95 % interval.
        high: Upper end.
        error: Standard error, over subjects, seeds and subsets.
        p: Of "no difference", two-sided; below .05 just where the interval spares 0.
        freedom: Degrees of freedom.
    """

    value: float
    low: float
    high: float
    error: float
    p: float
    freedom: float


def runs_of(
    scores: Sequence[Sequence[Statistic]], clusters: ArrayLike, resamples: int = RESAMPLES, seed: object = 0
) -> Runs:
    """Resamples a contestant's scores.

    Args:
        scores: A statistic for every seed and subset, S x P.
        clusters: Subject of every row of the weights, (N,), the same for all.
        resamples: R.
        seed: The same seed and subjects, the same resamples.
    """
    clusters = np.asarray(clusters)
    ones = np.ones((1, len(clusters)))
    each = np.array([[float(one(ones)[0]) for one in row] for row in scores])
    flat = [one for row in scores for one in row]
    block = max(1, min(resamples, BLOCK // max(1, len(clusters))))
    pieces = []
    for first in range(0, resamples, block):
        weights = resampling_weights(clusters, min(block, resamples - first), (seed, first))
        pieces.append(np.stack([one(weights) for one in flat]))
    drawn = np.concatenate(pieces, axis=1).reshape(*each.shape, resamples)

    def average(weights: Array) -> Array:
        return np.mean([one(weights) for one in flat], axis=0)

    return Runs(each, drawn, len(np.unique(clusters)), _acceleration(average, clusters))


def nested_interval(runs: Runs, level: float = LEVEL) -> Interval:
    """Interval of a mean score over subjects, seeds and subsets.

    The subjects' part is a bootstrap over subjects, corrected for bias and skew as in `interval`; the
    seeds' part is normal, its variance that between the seeds less what the few subjects make of it (they
    are crossed with the seeds). Both are widened by Student's t at Satterthwaite's degrees of freedom, so
    that twenty subjects or three seeds are not taken for many. One seed says nothing of seeds: the
    interval is then of that seed alone.
    """
    from scipy.stats import norm, t

    draws = runs.mean_drawn
    known = np.isfinite(draws)
    undefined = 1.0 - float(known.mean())
    value = runs.value
    if known.sum() < 2 or runs.subjects < 2 or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"), float("nan"), undefined)
    of_subjects, others = variances(runs)
    total = of_subjects + sum(part.variance for part in others)
    if total == 0.0:
        return Interval(value, value, value, 0.0, undefined)
    reach = float(t.ppf(0.5 + level / 2, freedom(of_subjects, runs.subjects, others)))
    spread = with_seeds(runs)
    share = float(np.mean(draws[known] < value) + 0.5 * np.mean(draws[known] == value))
    bias = float(norm.ppf(np.clip(share, 1 / known.sum(), 1 - 1 / known.sum())))
    skew = runs.skew * (of_subjects / total) ** 1.5  # the other parts have none
    bias *= (of_subjects / total) ** 0.5
    ends = []
    for side in (-reach, reach):
        shifted = bias + side
        ends.append(float(np.quantile(spread, norm.cdf(bias + shifted / max(1.0 - skew * shifted, 0.1)))))
    low, high = min(ends), max(ends)
    values = runs.drawn[np.isfinite(runs.drawn)]
    if values.min() >= 0.0 and values.max() <= 1.0:
        low, high = max(low, 0.0), min(high, 1.0)
    return Interval(value, low, high, float(np.sqrt(total)), undefined)


def paired_difference(a: Runs, b: Runs, paired_subsets: bool = True, level: float = LEVEL) -> Difference:
    """The difference of two contestants on the same subjects: interval and p-value from one model.

    Student's t with the standard error of the bootstrap over subjects (both on the same resamples), of the
    seeds of either (independent of each other), and of the subsets (drawn alike for both, so that only
    their difference counts); Satterthwaite's degrees of freedom. Unlike a permutation of subjects it
    counts the seeds: two lucky seeds are no finding.

    Args:
        a: One contestant.
        b: The other.
        paired_subsets: Whether the subsets of the training data are the same for both, in order.
        level: Of confidence.
    """
    from scipy.stats import t

    value = a.value - b.value
    draws = a.mean_drawn - b.mean_drawn
    draws = draws[np.isfinite(draws)]
    if len(draws) < 2 or a.subjects < 2 or not np.isfinite(value):
        return Difference(value, *[float("nan")] * 5)
    of_subjects = float(draws.var(ddof=1)) * a.subjects / (a.subjects - 1)
    parts = [_between(one.each.mean(1), one.drawn.mean(1), one.subjects) for one in (a, b)]
    if paired_subsets and a.each.shape[1] == b.each.shape[1]:
        each = a.each.mean(0) - b.each.mean(0)
        parts.append(_between(each, a.drawn.mean(0) - b.drawn.mean(0), a.subjects))
    else:
        parts += [_between(one.each.mean(0), one.drawn.mean(0), one.subjects) for one in (a, b)]
    error = float(np.sqrt(of_subjects + sum(part.variance for part in parts)))
    if error == 0.0:
        return Difference(value, value, value, 0.0, 1.0 if value == 0.0 else float("nan"), float("nan"))
    degrees = freedom(of_subjects, a.subjects, parts)
    reach = float(t.ppf(0.5 + level / 2, degrees)) * error
    p = float(2 * t.sf(abs(value) / error, degrees))
    return Difference(value, value - reach, value + reach, error, p, degrees)


def variances(runs: Runs) -> tuple[float, list[Part]]:
    """Variance of the mean score due to subjects; and due to seeds and to subsets."""
    draws = runs.mean_drawn
    of_subjects = float(np.nanvar(draws, ddof=1)) * runs.subjects / max(runs.subjects - 1, 1)
    return of_subjects, [
        _between(runs.each.mean(axis), runs.drawn.mean(axis), runs.subjects) for axis in (1, 0)
    ]


def freedom(of_subjects: float, subjects: int, others: Sequence[Part]) -> float:
    """Satterthwaite's degrees of freedom of a sum of variances."""
    total = of_subjects + sum(part.variance for part in others)
    weight = of_subjects**2 / max(subjects - 1, 1)
    weight += sum(part.gross**2 / (part.levels - 1) for part in others if part.levels > 1)
    return max(1.0, total**2 / weight) if weight > 0 else float(max(subjects - 1, 1))


def with_seeds(runs: Runs, seed: object = 0) -> Array:
    """Draws of the mean score, (R,): of the subjects, widened to n - 1, with normal noise of the seeds."""
    from scipy.stats import norm

    draws = runs.mean_drawn
    draws = np.where(np.isfinite(draws), draws, np.nanmean(draws))
    centre = runs.value
    draws = centre + (draws - centre) * np.sqrt(runs.subjects / max(runs.subjects - 1, 1))
    _, others = variances(runs)
    of_seeds = sum(part.variance for part in others)
    if of_seeds > 0:
        quantiles = norm.ppf((np.arange(len(draws)) + 0.5) / len(draws))  # their variance is 1, not nearly
        draws = draws + np.sqrt(of_seeds) * numpy_rng("seeds", seed).permutation(quantiles)
    return draws


def _between(each: Array, drawn: Array, subjects: int) -> Part:
    """Variance of a mean over K levels (seeds, subsets) due to the levels.

    Between the scores lies more than the levels: each reacts to the subjects in its own way, which the
    bootstrap over subjects has counted already; that part is taken off.
    """
    count = len(each)
    if count < 2:
        return Part(0.0, 0.0, count)
    own = np.nanvar(drawn - drawn.mean(axis=0), axis=1, ddof=1).mean() * count / (count - 1)
    own *= subjects / max(subjects - 1, 1)
    found = float(each.var(ddof=1))
    return Part(max(0.0, found - own) / count, found / count, count)


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
