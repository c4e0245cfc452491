"""Intervals and tests with seeds and subsets: against textbook formulas, and against simulated truth."""

import numpy as np
import pytest
from scipy.stats import norm, ttest_rel

from ssl3d import statistics as st


def mean_of(values):
    return lambda weights: st.mean(values, weights)


def runs(values, seed=0, resamples=1000, clusters=None):
    """Scores (S, P, N) of subjects -> Runs of their means."""
    values = np.asarray(values, dtype=float)
    clusters = np.arange(values.shape[-1]) if clusters is None else clusters
    return st.runs_of([[mean_of(one) for one in row] for row in values], clusters, resamples, seed)


RNG = np.random.default_rng(0)


def test_one_seed_is_the_paired_t_test():
    a, b = RNG.normal(0.3, 1, (1, 1, 40)), RNG.normal(0, 1, (1, 1, 40))
    found = st.paired_difference(runs(a, resamples=8000), runs(b, resamples=8000))
    assert found.value == pytest.approx(float(a.mean() - b.mean()))
    assert found.p == pytest.approx(ttest_rel(a.ravel(), b.ravel()).pvalue, rel=0.15)
    assert found.freedom == 39
    assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_the_seeds_variance_is_that_of_a_crossed_analysis():
    values = RNG.normal(size=(4, 1, 30)) + RNG.normal(size=(4, 1, 1)) + RNG.normal(size=(1, 1, 30))
    _, (seeds, subsets) = st.variances(runs(values, resamples=6000))
    table = values[:, 0]
    grand, by_seed, by_subject = table.mean(), table.mean(1), table.mean(0)
    rest = table - by_seed[:, None] - by_subject[None] + grand
    mean_square_rest = (rest**2).sum() / (3 * 29)
    mean_square_seed = 30 * by_seed.var(ddof=1)
    expected = (mean_square_seed - mean_square_rest) / 30 / 4  # the textbook estimate, over 4 seeds
    assert seeds.variance == pytest.approx(expected, rel=0.05)
    assert seeds.gross == pytest.approx(by_seed.var(ddof=1) / 4)
    assert subsets == st.Part(0.0, 0.0, 1)


def test_subsets_that_help_both_alike_do_not_widen_the_difference():
    luck = RNG.normal(size=(1, 5, 1))
    people = RNG.normal(size=(1, 1, 25))
    a = runs(people + luck + 0.1 * RNG.normal(size=(1, 5, 25)))
    b = runs(people + luck + 0.1 * RNG.normal(size=(1, 5, 25)))
    assert st.paired_difference(a, b).error < 0.1 * st.paired_difference(a, b, paired_subsets=False).error


def test_identical_contestants_do_not_differ():
    one = runs(RNG.normal(size=(1, 1, 20)))
    assert st.paired_difference(one, one)[:5] == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_two_far_seeds_are_no_finding():
    people = 0.01 * RNG.normal(size=(1, 1, 50))
    lucky = runs(people + np.array([0.0, 1.0])[:, None, None])
    plain = runs(people + np.zeros((2, 1, 1)))
    assert st.paired_difference(lucky, plain).p > 0.2
    assert st.nested_interval(lucky).low < 0


def test_an_interval_stays_in_the_range_of_the_score():
    dice = np.clip(RNG.beta(20, 1, (3, 1, 15)), 0, 1)
    found = st.nested_interval(runs(dice))
    assert 0 <= found.low < found.value < found.high <= 1


def test_rows_of_one_subject_are_drawn_together():
    values = np.repeat(RNG.normal(size=(1, 1, 12)), 5, axis=2)
    clustered = st.nested_interval(runs(values, clusters=np.repeat(np.arange(12), 5)))
    assert clustered.error == pytest.approx(values.std(ddof=1) / np.sqrt(12), rel=0.15)
    assert clustered.error > 1.8 * st.nested_interval(runs(values)).error


# Simulations with a known truth -------------------------------------------------------------------

DESIGNS = {
    # subjects, seeds of either, sd of the seeds, sd of seed x subject, rows of a subject
    "14 subjects": (14, 1, 1, 0.0, 0.3, 1),
    "20 subjects, 3 seeds that differ": (20, 3, 3, 0.3, 0.3, 1),
    "40 subjects, 3 and 5 seeds": (40, 3, 5, 0.1, 0.5, 1),
    "14 subjects of 3 rows, 5 seeds": (14, 5, 5, 0.3, 0.3, 3),
    "40 subjects, unstable seeds": (40, 5, 5, 0.2, 1.0, 1),
}


def simulate(design, simulations, resamples, skewed=False):
    """Shares of intervals that hold the truth, and of tests that find a difference where there is none."""
    subjects, seeds_a, seeds_b, sd_seed, sd_both, rows = design
    rng = np.random.default_rng(subjects)
    clusters = np.repeat(np.arange(subjects), rows)
    covered = false = 0
    for number in range(simulations):
        # Dice-like, with a tail below; 0 on average.
        people = (0.8 - rng.beta(16, 4, subjects)) / 0.0873 if skewed else rng.normal(size=subjects)
        weights = st.resampling_weights(clusters, resamples, number)

        def contestant(seeds, people=people, weights=weights):
            own = people + 0.3 * rng.normal(size=subjects)
            table = (
                own + sd_seed * rng.normal(size=(seeds, 1)) + sd_both * rng.normal(size=(seeds, subjects))
            )
            values = np.repeat(table, rows, axis=1)
            if rows > 1:
                values = values + 0.3 * rng.normal(size=values.shape)
            drawn = values @ weights.T / weights.sum(axis=1)
            per_subject = values.reshape(seeds, subjects, rows).mean(axis=(0, 2))
            centred = per_subject.mean() - per_subject
            skew = -(centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
            return st.Runs(values.mean(axis=1)[:, None], drawn[:, None], subjects, float(skew))

        a, b = contestant(seeds_a), contestant(seeds_b)
        interval = st.nested_interval(a)
        covered += interval.low <= 0 <= interval.high
        false += st.paired_difference(a, b).p < 0.05
    return covered / simulations, false / simulations


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_coverage_and_false_positives_in_short(design):
    simulations = 250
    covered, false = simulate(design, simulations, 500)
    chance = np.sqrt(0.05 * 0.95 / simulations)
    assert 0.93 - 2.6 * chance < covered < 0.97 + 2.6 * chance
    assert false < 0.055 + 2.6 * chance


@pytest.mark.slow
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_coverage_is_93_to_97_and_false_positives_at_most_5_5_percent(design, skewed):
    simulations = 4000
    covered, false = simulate(design, simulations, 1000, skewed)
    chance = np.sqrt(0.05 * 0.95 / simulations)  # .0034
    assert 0.93 - chance < covered < 0.97 + chance
    assert false < 0.055 + chance


@pytest.mark.slow
@pytest.mark.parametrize(("subjects", "apart"), [(40, 1.0), (40, 2.0), (100, 2.0)])
def test_coverage_of_an_auc(subjects, apart):
    truth, covered = norm.cdf(apart / np.sqrt(2)), 0
    rng = np.random.default_rng(subjects)
    target = np.arange(subjects) < subjects // 3
    for number in range(2000):
        score = rng.normal(size=subjects) + apart * target
        found = st.runs_of([[lambda w, s=score: st.auc(target, s, w)]], np.arange(subjects), 1000, number)
        interval = st.nested_interval(found)
        covered += interval.low <= truth <= interval.high
    assert 0.93 - 0.005 < covered / 2000 < 0.975 + 0.005
