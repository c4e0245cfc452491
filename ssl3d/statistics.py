"""Metrics as functions of resampling weights, and what is built on them: intervals, tests, subsets, folds.

A bootstrap resample is a vector of counts, one per row. Every metric here takes such weights, (R, N), and
gives R values at once, equal to the plain metric of the resampled rows; so two thousand resamples of an
AUC are one sort and a few cumulative sums, the jackknife is another weight matrix, and a paired
difference is a difference of two calls on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssl3d.rng import numpy_rng

Array = NDArray[Any]
Statistic = Callable[[Array], Array]  # weights (R, N) -> values (R,)

LEVEL = 0.95
RESAMPLES = 2000
BLOCK = 10_000_000  # weights in memory at a time
TAIL = 5  # resamples that an end of an interval has beyond it, at least


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
    low, high = _accelerated(defined, spread, reach, bias, skew)
    return Interval(value, *_in_range(low, high, defined), spread, undefined)


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


def minimum_detectable_difference(
    error: float, alpha: float = 0.05, power: float = 0.8, freedom: float = float("inf")
) -> float:
    """The smallest true difference that a two-sided test at `alpha` finds with probability `power`.

    (t[1 - alpha / 2] + t[power]) x the standard error of the paired difference: 2.80 errors where the error
    is known, 2.87 where 40 subjects tell it, 4.16 at 3 degrees of freedom. It is as uncertain as the error.

    Args:
        error: Standard error of the difference.
        alpha: Level of the test.
        power: Share of experiments that find it.
        freedom: Degrees of freedom of the error.
    """
    from scipy.stats import t

    return float((t.ppf(1 - alpha / 2, freedom) + t.ppf(power, freedom)) * error)


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
        variance: Due to them; 0 where the subjects explain all of `gross`.
        gross: As found between the levels, what the subjects make of each level included.
        levels: How many seeds or subsets.
        own: What the subjects make of them, which a bootstrap over subjects counts too.
    """

    variance: float
    gross: float
    levels: int
    own: float = 0.0


class Difference(NamedTuple):
    """A paired difference between two contestants.

    Attributes:
        value: Of the first over the second.
        low: Lower end of the 95 % interval.
        high: Upper end.
        error: Standard error, over subjects, seeds and subsets.
        p: Of "no difference", two-sided; below .05 just where the interval spares 0.
        freedom: Degrees of freedom: those at which Student's t gives the interval.
        borrowed: Whether one of the two has a single seed and the other more, so that the luck of the
            single one was taken to be as large as that of the other's seeds. Where both have one seed
            nothing is known of seeds, and nothing of them is in the test.
    """

    value: float
    low: float
    high: float
    error: float
    p: float
    freedom: float
    borrowed: bool = False

    @property
    def detectable(self) -> float:
        """Smallest true difference that such a test finds with power .8; NaN below 3 degrees of freedom.

        With fewer the error itself may be off by a factor of three and more, and this with it.
        """
        if not self.freedom >= 3:  # NaN too
            return float("nan")
        return minimum_detectable_difference(self.error, freedom=self.freedom)


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

    Of the subjects alone it is that of `interval`: a bootstrap, corrected for bias and skew. Seeds and
    subsets move each end out, in quadrature ("MOVER", Zou and Donner 2008), by what they add to `reach_of`.
    One seed says nothing of seeds: the interval is then of that seed alone.

    It covers the truth in 93 to 97 % of experiments without seeds and subsets, or with five and more of
    them; with two or three in at least 93 %, and in up to 99.5 %: nobody who saw two seeds agree knows that
    the third does.
    """
    from scipy.stats import norm, t

    draws = runs.mean_drawn
    known = draws[np.isfinite(draws)]
    undefined = 1.0 - len(known) / len(draws)
    value = runs.value
    if len(known) < 2 or runs.subjects < 2 or not np.isfinite(value):
        return Interval(value, float("nan"), float("nan"), float("nan"), undefined)
    of_subjects, others = variances(runs)
    error = standard_error(of_subjects, others)
    if error == 0.0:
        return Interval(value, value, value, 0.0, undefined)
    share = float(np.mean(known < value) + 0.5 * np.mean(known == value))
    bias = float(norm.ppf(np.clip(share, 1 / len(known), 1 - 1 / len(known))))
    quantile = float(t.ppf(0.5 + level / 2, runs.subjects - 1))
    widened = quantile * np.sqrt(runs.subjects / (runs.subjects - 1))
    low, high = _accelerated(known, float(known.std(ddof=1)), widened, bias, runs.skew)
    added = reach_of(of_subjects, runs.subjects, others, 1 - level) ** 2 - quantile**2 * of_subjects
    if added > 0.0:  # a bias may put both ends of the subjects' interval on one side of the value
        low = min(low, value - float(np.hypot(max(value - low, 0.0), np.sqrt(added))))
        high = max(high, value + float(np.hypot(max(high - value, 0.0), np.sqrt(added))))
    return Interval(value, *_in_range(low, high, runs.drawn[np.isfinite(runs.drawn)]), error, undefined)


def paired_difference(a: Runs, b: Runs, paired_subsets: bool = True, level: float = LEVEL) -> Difference:
    """The difference of two contestants on the same subjects: interval and p-value from one model.

    Its variance is that of the bootstrap over subjects (both on the same resamples), of the seeds of either
    (independent of each other), and of the subsets (drawn alike for both, so that only their difference
    counts); `reach_of` says how far the interval goes, and p is the level at which it just meets 0. Unlike
    a permutation of subjects it counts the seeds: two lucky seeds are no finding.

    Where there is no difference it finds one in at most 5.5 % of experiments, however few the seeds and
    subsets; with two or three of them in fewer (0.2 to 5 %), which costs power.

    Where one of the two has a single seed and the other more, the luck of the single one is counted as
    well, and taken to be as large as that of the other's seeds: one observation against a sample (Crawford
    and Howell 1998). That is an assumption, and `borrowed` says that it was made; if the single one's seeds
    differ twice as much as the other's, 14 % of such tests are false with three of those, 21 % with five.

    Args:
        a: One contestant.
        b: The other.
        paired_subsets: Whether the subsets of the training data are the same for both, in order.
        level: Of confidence.
    """
    value = a.value - b.value
    draws = a.mean_drawn - b.mean_drawn
    draws = draws[np.isfinite(draws)]
    if len(draws) < 2 or a.subjects < 2 or not np.isfinite(value):
        unknown = float("nan")
        return Difference(value, unknown, unknown, unknown, unknown, unknown)
    of_subjects = float(draws.var(ddof=1)) * a.subjects / (a.subjects - 1)
    parts, borrowed = _either(
        [_between(one.each.mean(1), one.drawn.mean(1), one.subjects) for one in (a, b)]
    )
    if paired_subsets and a.each.shape[1] == b.each.shape[1]:
        each = a.each.mean(0) - b.each.mean(0)
        parts.append(_between(each, a.drawn.mean(0) - b.drawn.mean(0), a.subjects))
    else:
        parts += _either([_between(one.each.mean(0), one.drawn.mean(0), one.subjects) for one in (a, b)])[0]
    error = standard_error(of_subjects, parts)
    if error == 0.0:
        p = 1.0 if value == 0.0 else float("nan")
        return Difference(value, value, value, 0.0, p, float("nan"), borrowed)
    reach = reach_of(of_subjects, a.subjects, parts, 1 - level)
    p = _p_value(abs(value), of_subjects, a.subjects, parts)
    degrees = freedom(reach / error, a.subjects, level)
    return Difference(value, value - reach, value + reach, error, p, degrees, borrowed)


def variances(runs: Runs) -> tuple[float, list[Part]]:
    """Variance of the mean score due to subjects; and due to seeds and to subsets."""
    draws = runs.mean_drawn
    of_subjects = float(np.nanvar(draws, ddof=1)) * runs.subjects / max(runs.subjects - 1, 1)
    return of_subjects, [
        _between(runs.each.mean(axis), runs.drawn.mean(axis), runs.subjects) for axis in (1, 0)
    ]


def standard_error(of_subjects: float, others: Sequence[Part]) -> float:
    """Of a mean over subjects, seeds and subsets; never less than that over subjects alone."""
    return float(np.sqrt(max(of_subjects, sum(_split(of_subjects, others)))))


def reach_of(of_subjects: float, subjects: int, others: Sequence[Part], alpha: float = 1 - LEVEL) -> float:
    """How far to either side of a mean its interval of confidence 1 - alpha goes.

    The square root of the sum of the variances, each times the square of Student's t at its own degrees of
    freedom (Banerjee 1961, for two means of unequal variances): of the subjects less what they make of the
    levels, and between the levels of each kind. With independent variances it covers the truth in at least
    1 - alpha of experiments, whatever the variances are. The usual t at Satterthwaite's degrees of freedom
    does not: two seeds that agree by luck look like a variance of nothing, known well, and in up to 12 % of
    experiments a test finds a difference that is not there. Never less than for subjects alone.
    """
    from scipy.special import stdtrit

    split = _split(of_subjects, others)
    degrees = [subjects - 1, *[max(part.levels - 1, 1) for part in others]]
    quantiles = stdtrit(np.array(degrees, dtype=float), alpha / 2) ** 2
    return float(np.sqrt(max(of_subjects * quantiles[0], float(quantiles @ np.array(split)))))


def freedom(quantile: float, subjects: int, level: float = LEVEL) -> float:
    """Degrees of freedom, 1 to subjects - 1, at which Student's t has this quantile of 1/2 + level / 2."""
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    most = max(subjects - 1, 1)

    def surplus(log_degrees: float) -> float:
        return float(stdtrit(np.exp(log_degrees), 0.5 + level / 2)) - quantile

    if surplus(np.log(most)) >= -1e-9:
        return float(most)
    if surplus(0.0) <= 0.0:
        return 1.0
    return float(np.exp(brentq(surplus, 0.0, np.log(most))))


def joint_draws(runs: Sequence[Runs], shared: Sequence[Hashable], names: Sequence[object]) -> Array:
    """Draws of the mean scores of contestants who are compared with each other, (M, R).

    The subjects are those of the bootstrap, the same for all, widened to n - 1. To this come draws of the
    subsets of the training data, one for all contestants that share the subsets, so that a subset that is
    hard for all of them changes no order; and of the seeds, one for each contestant. Where others
    have several seeds, one that has a single seed is given their mean variance.

    Seeds and subsets are drawn from normal distributions, so shares of these draws are no p-values: with
    two or three seeds or subsets they are surer than `paired_difference`, which knows how little it knows.

    Args:
        runs: One a contestant.
        shared: Which subsets of the training data each has: the same for those who share them.
        names: Of the contestants: another name, other draws of its seeds.
    """
    number = len(runs[0].mean_drawn)
    found = []
    of_seeds = [_between(one.each.mean(1), one.drawn.mean(1), one.subjects) for one in runs]
    several = [part for part in of_seeds if part.levels > 1]
    for one, part, name in zip(runs, of_seeds, names, strict=True):
        draws = one.mean_drawn
        draws = np.where(np.isfinite(draws), draws, np.nanmean(draws)) - one.value
        draws = draws * np.sqrt(one.subjects / max(one.subjects - 1, 1))
        variance = part.variance
        if part.levels == 1 and several:
            variance = float(np.mean([other.variance * other.levels for other in several]))
        if variance > 0.0:
            draws = draws + np.sqrt(variance) * numpy_rng("seeds", name).normal(size=number)
        found.append(one.value + draws)
    for group in dict.fromkeys(shared):
        members = [k for k, other in enumerate(shared) if other == group]
        if runs[members[0]].each.shape[1] > 1:
            for k, noise in zip(members, _subset_noise([runs[k] for k in members], group), strict=True):
                found[k] = found[k] + noise
    return np.stack(found)


def _subset_noise(runs: Sequence[Runs], seed: object) -> Array:
    """What other subsets of the training data would do to contestants that share them, (M, R)."""
    each = np.stack([one.each.mean(0) for one in runs])  # (M, P)
    drawn = np.stack([one.drawn.mean(0) for one in runs])  # (M, P, R)
    count, number = drawn.shape[1:]
    luck = numpy_rng("subset noise", seed).normal(size=(count, number))
    noise = np.zeros((len(runs), number))
    # What they have in common, and what sets them apart: the subjects' share is another in each.
    common, common_drawn = each.mean(axis=0, keepdims=True), drawn.mean(axis=0, keepdims=True)
    for scores, resampled in ((common, common_drawn), (each - common, drawn - common_drawn)):
        parts = [_between(a, b, runs[0].subjects) for a, b in zip(scores, resampled, strict=True)]
        gross, own = sum(part.gross for part in parts), sum(part.own for part in parts)
        if gross > own:
            scale = np.sqrt((1.0 - own / gross) / (count * (count - 1)))
            noise = noise + scale * (scores - scores.mean(axis=1, keepdims=True)) @ luck
    return noise


def _between(each: Array, drawn: Array, subjects: int) -> Part:
    """Variance of a mean over K levels (seeds, subsets) due to the levels.

    Between the scores lies more than the levels: each reacts to the subjects in its own way, which the
    bootstrap over subjects has counted already; that part is taken off.
    """
    count = len(each)
    if count < 2:
        return Part(0.0, 0.0, count)
    own = float(np.nanvar(drawn - drawn.mean(axis=0), axis=1, ddof=1).mean()) * count / (count - 1)
    own *= subjects / max(subjects - 1, 1)
    found = float(each.var(ddof=1))
    return Part(max(0.0, found - own) / count, found / count, count, own / count)


def _either(parts: Sequence[Part]) -> tuple[list[Part], bool]:
    """The parts of the two of a comparison; one of a single level borrows the variance of the other's."""
    for one, other in (parts, parts[::-1]):
        if one.levels == 1 and other.levels > 1:
            # s^2 / K of the one and s^2 of the other, both from the same K levels: one part.
            scale = 1 + other.levels
            return [
                Part(scale * other.variance, scale * other.gross, other.levels, scale * other.own)
            ], True
    return list(parts), False


def _split(of_subjects: float, others: Sequence[Part]) -> list[float]:
    """A variance over subjects without what they make of the levels, and the variances between levels."""
    rest = of_subjects - sum(part.own for part in others)
    return [max(0.0, rest), *[part.gross for part in others]]


def _p_value(value: float, of_subjects: float, subjects: int, others: Sequence[Part]) -> float:
    """The alpha at which `reach_of` is this far."""
    from scipy.optimize import brentq
    from scipy.special import stdtr

    if all(part.gross == 0.0 for part in others):
        return float(2 * stdtr(subjects - 1, -value / np.sqrt(of_subjects)))

    def surplus(log_alpha: float) -> float:
        return reach_of(of_subjects, subjects, others, float(np.exp(log_alpha))) - value

    least = -300.0
    if value == 0.0 or surplus(0.0) >= 0.0:
        return 1.0
    return float(np.exp(brentq(surplus, least, 0.0))) if surplus(least) > 0.0 else float(np.exp(least))


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


def _accelerated(
    drawn: Array, spread: float, reach: float, bias: float, skew: float
) -> tuple[float, float]:
    """Ends of a BCa interval (Efron 1987) that reaches `reach` standard errors to either side.

    So far out that fewer than `TAIL` of the resamples are left there is nothing to read a quantile from:
    from there on the ends go on with the standard error, as a normal distribution's would. (Student's t at
    few degrees of freedom goes far out: 12.7 at one.)
    """
    from scipy.stats import norm

    furthest = float(norm.isf(min(0.25, TAIL / len(drawn))))
    ends = []
    for side in (-reach, reach):
        shifted = bias + side
        at = bias + shifted / max(1.0 - skew * shifted, 0.1)
        inside = min(max(at, -furthest), furthest)
        ends.append(float(np.quantile(drawn, norm.cdf(inside))) + (at - inside) * spread)
    return min(ends), max(ends)


def _in_range(low: float, high: float, scores: Array) -> tuple[float, float]:
    """An interval cut at 0 or 1 if no score lies beyond: Dice, AUC, accuracy; R2 has no lower end."""
    if scores.min() >= 0.0:
        low = max(low, 0.0)
    return low, min(high, 1.0) if scores.max() <= 1.0 else high


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
