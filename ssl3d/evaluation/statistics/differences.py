"""Paired differences of contestants, and their tests."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ssl3d.evaluation.statistics.intervals import (
    LEVEL,
    Part,
    Runs,
    between_levels,
    reach_of,
    standard_error,
)
from ssl3d.evaluation.statistics.metrics import Array
from ssl3d.rng import numpy_rng


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down procedure.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
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
    """Return the smallest true difference that a test at `alpha` finds with probability `power`.

    (t[1 - alpha / 2] + t[power]) x the standard error of the paired difference: 2.80 errors where the error
    is known, 2.87 where 40 subjects tell it, 4.16 at 3 degrees of freedom. It is as uncertain as the error.

    Args:
        error: Standard error of the difference.
        alpha: Level of the test.
        power: Share of experiments that find it.
        freedom: Degrees of freedom of the error.
    """
    from scipy.special import ndtri, stdtrit

    levels = np.array([1 - alpha / 2, power])
    quantiles = ndtri(levels) if np.isinf(freedom) else stdtrit(freedom, levels)
    return float(quantiles.sum() * error)


class Difference(NamedTuple):
    """Paired difference between two contestants.

    Attributes:
        value: Score of the first less that of the second.
        low: Lower end of the 95 % interval.
        high: Upper end.
        error: Standard error, over subjects, seeds and subsets.
        p: Two-sided p-value of "no difference"; below .05 just where the interval spares 0.
        freedom: Degrees of freedom: those at which Student's t gives the interval.
        borrowed: Whether one of the two has a single seed and the other more, so that the luck of the
            single one was taken to be as large as that of the other's seeds. Where both have one seed
            nothing is known of seeds, and nothing of them is in the test.
        span: Largest difference that is possible.
    """

    value: float
    low: float
    high: float
    error: float
    p: float
    freedom: float
    borrowed: bool = False
    span: float = float("inf")

    @property
    def detectable(self) -> float:
        """Smallest true difference that such a test finds with power .8; NaN below 3 degrees of freedom.

        With fewer the error itself may be off by a factor of three and more, and this with it. NaN too
        where no difference that is possible would be found.
        """
        if not self.freedom >= 3:  # NaN too
            return float("nan")
        smallest = minimum_detectable_difference(self.error, freedom=self.freedom)
        return smallest if smallest <= self.span else float("nan")


def without_interval(difference: Difference) -> Difference:
    """Return a difference without what would be wrong to say of it: its error, interval and p.

    Such as that over one network of random weights: how much another draw of them would change is unknown.
    """
    unknown = float("nan")
    return difference._replace(low=unknown, high=unknown, error=unknown, p=unknown, freedom=unknown)


def paired_difference(a: Runs, b: Runs, paired_subsets: bool = True, level: float = LEVEL) -> Difference:
    """Compare two contestants on the same subjects: interval and p-value from one model.

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

    There is no interval where one of the two has none for lack of test subjects (`Runs.sure`), or where
    both scores are at a bound (`Runs.at_bound`), and none goes beyond the differences that are possible.

    Args:
        a: Runs of one contestant.
        b: Runs of the other.
        paired_subsets: Whether the subsets of the training data are the same for both, in order.
        level: Level of confidence.
    """
    value = a.value - b.value
    draws = a.mean_drawn - b.mean_drawn
    draws = draws[np.isfinite(draws)]
    span = min(a.bounds[1], b.bounds[1]) - max(a.bounds[0], b.bounds[0])
    known = a.sure and b.sure and not (a.at_bound and b.at_bound)
    if len(draws) < 2 or a.subjects < 2 or not np.isfinite(value) or not known:
        unknown = float("nan")
        return Difference(value, unknown, unknown, unknown, unknown, unknown)
    of_subjects = float(draws.var(ddof=1)) * a.subjects / (a.subjects - 1)
    parts, borrowed = _either(
        [between_levels(runs.each.mean(1), runs.drawn.mean(1), runs.subjects) for runs in (a, b)]
    )
    if paired_subsets and a.each.shape[1] == b.each.shape[1]:
        each = a.each.mean(0) - b.each.mean(0)
        parts.append(between_levels(each, a.drawn.mean(0) - b.drawn.mean(0), a.subjects))
    else:
        parts += _either(
            [between_levels(runs.each.mean(0), runs.drawn.mean(0), runs.subjects) for runs in (a, b)]
        )[0]
    error = standard_error(of_subjects, parts)
    if error == 0.0:
        p = 1.0 if value == 0.0 else float("nan")
        return Difference(value, value, value, 0.0, p, float("nan"), borrowed, span)
    reach = reach_of(of_subjects, a.subjects, parts, 1 - level)
    p = _p_value(abs(value), of_subjects, a.subjects, parts)
    degrees = freedom(reach / error, a.subjects, level)
    low, high = max(value - reach, -span), min(value + reach, span)
    return Difference(value, low, high, error, p, degrees, borrowed, span)


def freedom(quantile: float, subjects: int, level: float = LEVEL) -> float:
    """Find the degrees of freedom at which Student's t has this quantile of 1/2 + level / 2."""
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
    """Draw the mean scores of contestants who are compared with each other, (M, R).

    The subjects are those of the bootstrap, the same for all, widened to n - 1. To this come draws of the
    subsets of the training data, one for all contestants that share the subsets, so that a subset that is
    hard for all of them changes no order; and of the seeds, one for each contestant. Where others
    have several seeds, one that has a single seed is given their mean variance.

    Seeds and subsets are drawn from normal distributions, so shares of these draws are no p-values: with
    two or three seeds or subsets they are surer than `paired_difference`, which knows how little it knows.

    Args:
        runs: Runs of each contestant.
        shared: Subsets of the training data that each has: the same value for those who share them.
        names: Names of the contestants: another name, other draws of its seeds.
    """
    number = len(runs[0].mean_drawn)
    scores = []
    of_seeds = [between_levels(run.each.mean(1), run.drawn.mean(1), run.subjects) for run in runs]
    several = [part for part in of_seeds if part.levels > 1]
    for run, part, name in zip(runs, of_seeds, names, strict=True):
        draws = run.mean_drawn
        draws = np.where(np.isfinite(draws), draws, np.nanmean(draws)) - run.value
        draws = draws * np.sqrt(run.subjects / max(run.subjects - 1, 1))
        variance = part.variance
        if part.levels == 1 and several:
            variance = float(np.mean([other.variance * other.levels for other in several]))
        if variance > 0.0:
            draws = draws + np.sqrt(variance) * numpy_rng("seeds", name).normal(size=number)
        scores.append(run.value + draws)
    for group in dict.fromkeys(shared):
        members = [k for k, other in enumerate(shared) if other == group]
        if runs[members[0]].each.shape[1] > 1:
            for k, noise in zip(members, _subset_noise([runs[k] for k in members], group), strict=True):
                scores[k] = scores[k] + noise
    return np.stack(scores)


def _subset_noise(runs: Sequence[Runs], seed: object) -> Array:
    """Draw what other training subsets would do to contestants that share them, (M, R)."""
    each = np.stack([run.each.mean(0) for run in runs])  # (M, P)
    drawn = np.stack([run.drawn.mean(0) for run in runs])  # (M, P, R)
    count, number = drawn.shape[1:]
    luck = numpy_rng("subset noise", seed).normal(size=(count, number))
    noise = np.zeros((len(runs), number))
    # What they have in common, and what sets them apart: the subjects' share is another in each.
    common, common_drawn = each.mean(axis=0, keepdims=True), drawn.mean(axis=0, keepdims=True)
    for scores, resampled in ((common, common_drawn), (each - common, drawn - common_drawn)):
        parts = [between_levels(a, b, runs[0].subjects) for a, b in zip(scores, resampled, strict=True)]
        gross, own = sum(part.gross for part in parts), sum(part.own for part in parts)
        if gross > own:
            scale = np.sqrt((1.0 - own / gross) / (count * (count - 1)))
            noise = noise + scale * (scores - scores.mean(axis=1, keepdims=True)) @ luck
    return noise


def _either(parts: Sequence[Part]) -> tuple[list[Part], bool]:
    """Return the parts of two contestants; one with a single level borrows the other's variance."""
    for single, other in (parts, parts[::-1]):
        if single.levels == 1 and other.levels > 1:
            # s^2 / K of the one and s^2 of the other, both from the same K levels: one part.
            scale = 1 + other.levels
            return [
                Part(scale * other.variance, scale * other.gross, other.levels, scale * other.own)
            ], True
    return list(parts), False


def _p_value(value: float, of_subjects: float, subjects: int, others: Sequence[Part]) -> float:
    """Find the alpha at which `reach_of` is this far."""
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
