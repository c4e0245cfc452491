"""Intervals and tests with seeds and subsets: against textbook formulas, and against simulated truth."""

from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_rel

from ssl3d.evaluation import statistics as st


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


@pytest.mark.parametrize("several", [False, True])
def test_intervals_of_r_squared_hold_the_truth_and_seldom_end_at_1(several):
    """With the skew and the error taken on R2's own scale, four of five of them ended at 1."""
    rng, bounds, n, share = np.random.default_rng(0), st.bounds_of("r2"), 8, 0.5
    hits = ends = 0
    for number in range(120):
        target = rng.normal(size=n)  # of which the prediction explains a half
        predicted = share * target + np.sqrt(share * (1 - share)) * rng.normal(size=n)

        def score(weights, target=target, predicted=predicted):
            return st.r_squared(target, predicted, weights)

        if several:
            found = st.nested_interval(st.runs_of([[score]], np.arange(n), 500, number, bounds=bounds))
        else:
            found = st.interval(score, np.arange(n), resamples=500, seed=number, bounds=bounds)
        assert found.low < found.value < found.high < 1
        hits += found.low <= share <= found.high
        ends += found.high > 0.99
    assert hits / 120 >= 0.92 and ends / 120 < 0.05


def test_a_score_at_its_bound_has_no_interval_and_no_gain_over_another():
    """An AUC of 1 said [1, 1]: with five subjects a class and a true .92, in a third of experiments."""
    target = np.repeat([0, 1], 5)
    perfect = [lambda w: st.auc(target, np.arange(10.0), w)]
    good = [lambda w: st.auc(target, np.array([0, 1, 2, 3, 6, 4, 5, 7, 8, 9.0]), w)]
    at_1, below = (st.runs_of([each], np.arange(10), bounds=(0, 1)) for each in (perfect, good))
    assert at_1.at_bound and not below.at_bound
    for found in (st.nested_interval(at_1), st.interval(perfect[0], np.arange(10), bounds=(0, 1))):
        assert found.value == 1 and np.isnan(found.low) and np.isnan(found.high)
    gain = st.paired_difference(at_1, at_1)
    assert gain.value == 0 and np.isnan(gain.low) and np.isnan(gain.p)
    assert st.paired_difference(at_1, below).low < st.paired_difference(at_1, below).high
    assert "No interval is given of 1.000" in st.at_bound_note(1.0)
    constant = [lambda w: st.auc(target, np.zeros(10), w)]  # .5 whoever is drawn, and of whomever
    found = st.nested_interval(st.runs_of([constant], np.arange(10), bounds=(0, 1)))
    assert (found.low, found.high) == (0.5, 0.5)


def test_rows_of_one_subject_are_drawn_together():
    values = np.repeat(RNG.normal(size=(1, 1, 12)), 5, axis=2)
    clustered = st.nested_interval(runs(values, clusters=np.repeat(np.arange(12), 5)))
    assert clustered.error == pytest.approx(values.std(ddof=1) / np.sqrt(12), rel=0.15)
    assert clustered.error > 1.8 * st.nested_interval(runs(values)).error


def test_an_interval_goes_as_far_as_students_t_however_many_resamples():
    people = 0.01 * RNG.normal(size=(1, 1, 40))
    values = people + np.array([0.0, 1.0])[:, None, None]
    far = 12.706 * 0.5  # t[.975] at one degree of freedom x the standard error of two seeds
    for resamples in (300, 4000):
        found = st.nested_interval(runs(values - 10.0, resamples=resamples))
        assert (found.low, found.high) == pytest.approx((found.value - far, found.value + far), rel=0.01)


def test_few_subjects_reach_further_than_the_resamples():
    values = np.array([0.1, 0.2, 0.5, 0.3])
    found = st.interval(mean_of(values), np.arange(4), resamples=2000)
    # Student's t at 3 degrees of freedom, 3.18, in units of the bootstrap's error, sqrt(3 / 4) of the right
    # one; no resample lies that far, and none further than 2.6.
    assert found.high - found.low == pytest.approx(2 * 3.182 * np.sqrt(4 / 3) * found.error, rel=0.15)


def test_the_reach_is_each_variance_at_its_own_t():
    parts = [st.Part(0.5, 0.75, 3, 0.25), st.Part(0.0, 0.25, 2, 0.5)]
    by_hand = np.sqrt((2.0 - 0.75) * t.ppf(0.975, 10) ** 2 + 0.75 * 4.3027**2 + 0.25 * 12.7062**2)
    assert st.reach_of(2.0, 11, parts) == pytest.approx(by_hand, rel=1e-4)
    assert st.standard_error(2.0, parts) == pytest.approx(np.sqrt(2.25))
    # Seeds that agree by luck: not nearer than the subjects alone.
    parts = [st.Part(0.0, 1e-9, 2, 1.5)]
    assert st.reach_of(2.0, 11, parts) == pytest.approx(np.sqrt(2.0) * t.ppf(0.975, 10))
    assert st.standard_error(2.0, parts) == pytest.approx(np.sqrt(2.0))


@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_p_is_the_level_at_which_the_interval_meets_0(seeds):
    rng = np.random.default_rng(seeds)
    people = rng.normal(size=(1, 1, 25))
    a, b = (
        runs(people + gain + 0.2 * rng.normal(size=(seeds, 1, 1)) + 0.3 * rng.normal(size=(seeds, 1, 25)))
        for gain in (0.3, 0.0)
    )
    found = st.paired_difference(a, b)
    meeting = st.paired_difference(a, b, level=1 - found.p)
    assert min(abs(meeting.low), abs(meeting.high)) == pytest.approx(0, abs=1e-6)
    assert (found.low > 0 or found.high < 0) == (found.p < 0.05)
    assert found.high - found.value == pytest.approx(t.ppf(0.975, found.freedom) * found.error, rel=1e-6)


def test_one_seed_against_several_is_one_observation_against_a_sample():
    people = 1e-6 * RNG.normal(size=(1, 1, 40))
    several = np.array([0.0, 0.1, 0.3, 0.4])
    sample, one = runs(people + several[:, None, None]), runs(people + np.full((1, 1, 1), 0.9))
    for a, b in ((sample, one), (one, sample)):
        found = st.paired_difference(a, b)
        assert found.borrowed
        error = several.std(ddof=1) * np.sqrt(1 + 1 / 4)  # Crawford and Howell 1998
        assert found.error == pytest.approx(error, rel=1e-3)
        assert found.freedom == pytest.approx(3, rel=1e-3)
        assert found.p == pytest.approx(2 * t.sf(0.7 / error, 3), rel=1e-3)
    assert not st.paired_difference(sample, sample).borrowed
    assert not st.paired_difference(one, runs(people)).borrowed


def test_what_can_be_detected_is_more_than_the_interval_spans():
    people = RNG.normal(size=(1, 1, 40))
    a, b = (runs(people + 0.3 * RNG.normal(size=(6, 1, 40))) for _ in range(2))
    found = st.paired_difference(a, b)
    factor = t.ppf(0.975, found.freedom) + t.ppf(0.8, found.freedom)
    assert found.detectable == pytest.approx(factor * found.error)
    assert found.detectable > (found.high - found.low) / 2


def test_two_seeds_cannot_tell_what_they_could_detect():
    people = 0.1 * RNG.normal(size=(1, 1, 40))
    a, b = (runs(people + RNG.normal(size=(2, 1, 1))) for _ in range(2))
    assert np.isnan(st.paired_difference(a, b).detectable)


# Draws for ranks ----------------------------------------------------------------------------------


def of_subsets(gain, luck, seed):
    """One seed on three subsets, of which one is good and one bad for all."""
    rng = np.random.default_rng(seed)
    people = np.random.default_rng(0).normal(size=(1, 1, 40))
    return runs(people + gain + np.array(luck)[None, :, None] + 0.05 * rng.normal(size=(1, 3, 40)))


def test_subsets_that_are_hard_for_all_change_no_order():
    a, b = of_subsets(0.1, [0, 2, 4], 1), of_subsets(0.0, [0, 2, 4], 2)
    assert st.paired_difference(a, b).p < 0.02
    first, second = st.joint_draws([a, b], ["same", "same"], ["a", "b"])
    assert np.mean(first > second) > 0.99
    assert np.std(first) > 0.5  # the draws themselves know that there are easy subsets and hard ones
    first, second = st.joint_draws([a, b], ["some", "others"], ["a", "b"])
    assert np.mean(first > second) < 0.8


def test_draws_of_two_differ_as_their_paired_difference_does():
    a, b = of_subsets(0.1, [0, 1, 2], 1), of_subsets(0.0, [0.5, 1, 1], 2)
    first, second = st.joint_draws([a, b], ["same", "same"], ["a", "b"])
    assert np.std(first - second) == pytest.approx(st.paired_difference(a, b).error, rel=0.1)
    assert np.mean(first - second) == pytest.approx(a.value - b.value, abs=0.05)


def test_draws_of_seeds_are_each_contestants_own():
    people = 0.01 * RNG.normal(size=(1, 1, 40))
    three = people + np.array([0.0, 0.3, 0.6])[:, None, None]
    one = people + np.full((1, 1, 1), 0.3)
    found = [runs(three), runs(three), runs(one)]
    draws = st.joint_draws(found, ["same"] * 3, ["a", "b", "c"])
    assert abs(np.corrcoef(draws)[np.triu_indices(3, 1)]).max() < 0.15
    of_one = 0.3
    assert draws.std(axis=1) == pytest.approx([of_one / np.sqrt(3), of_one / np.sqrt(3), of_one], rel=0.1)
    assert np.array_equal(draws, st.joint_draws(found, ["same"] * 3, ["a", "b", "c"]))
    alone = st.joint_draws([runs(one), runs(people)], ["same"] * 2, ["a", "b"])
    assert alone.std(axis=1).max() < 0.01  # of seeds nothing is known


# Simulations with a known truth -------------------------------------------------------------------


class Design(NamedTuple):
    """Two contestants who do not differ, and how their scores vary; sd of the subjects is 1.

    Subsets are the same for both, and help both alike by `sd_subset`, each in its own way by `sd_own`.
    """

    subjects: int
    seeds: tuple[int, int] = (1, 1)
    sd_seed: float = 0.0
    sd_both: float = 0.3
    rows: int = 1
    subsets: int = 1
    sd_subset: float = 0.0
    sd_own: float = 0.0

    @property
    def most(self):
        """Of the experiments that an interval may cover: more where two or three had to tell of all."""
        return 1.0 if 1 < self.subsets < 5 or 1 < self.seeds[0] < 5 else 0.97


DESIGNS = {
    "14 subjects": Design(14),
    "20 subjects, 3 seeds that differ": Design(20, (3, 3), 0.3),
    "40 subjects, 3 and 5 seeds": Design(40, (3, 5), 0.1, 0.5),
    "14 subjects of 3 rows, 5 seeds": Design(14, (5, 5), 0.3, rows=3),
    "40 subjects, unstable seeds": Design(40, (5, 5), 0.2, 1.0),
    "40 subjects, 2 seeds": Design(40, (2, 2), 0.1),
    "40 subjects, 2 seeds that dominate": Design(40, (2, 2), 2.0),
    "40 subjects, 3 seeds that dominate": Design(40, (3, 3), 2.0),
    "40 subjects, 2 and 5 seeds": Design(40, (2, 5), 0.5),
    "40 subjects, 2 subsets": Design(40, subsets=2, sd_subset=0.3, sd_own=0.1),
    "14 subjects, 2 subsets": Design(14, subsets=2, sd_subset=0.3, sd_own=0.2),
    "40 subjects, 2 subsets that dominate": Design(40, subsets=2, sd_subset=2.0, sd_own=0.4),
    "40 subjects, 3 subsets": Design(40, subsets=3, sd_subset=0.3, sd_own=0.2),
    "40 subjects, 3 subsets that dominate": Design(40, subsets=3, sd_subset=2.0, sd_own=0.4),
    "14 subjects, 3 subsets, 2 seeds": Design(14, (2, 2), 0.2, subsets=3, sd_subset=0.3, sd_own=0.1),
    "40 subjects, 3 seeds against 1": Design(40, (3, 1), 0.2),
    "40 subjects, 5 seeds against 1": Design(40, (5, 1), 0.1),
}


def simulate(design, simulations, resamples, skewed=False):
    """Shares of intervals that hold the truth, and of tests that find a difference where there is none."""
    subjects, rows = design.subjects, design.rows
    rng = np.random.default_rng(subjects)
    clusters = np.repeat(np.arange(subjects), rows)
    resampled = [st.resampling_weights(clusters, resamples, number) for number in range(20)]
    covered = false = 0
    for number in range(simulations):
        # Dice-like, with a tail below; 0 on average.
        people = (0.8 - rng.beta(16, 4, subjects)) / 0.0873 if skewed else rng.normal(size=subjects)
        subsets = design.sd_subset * rng.normal(size=(design.subsets, 1))
        weights = resampled[number % len(resampled)]

        def contestant(seeds, people=people, subsets=subsets, weights=weights):
            own = people + 0.3 * rng.normal(size=subjects)
            table = own + subsets + design.sd_own * rng.normal(size=(design.subsets, 1))
            table = table + design.sd_seed * rng.normal(size=(seeds, 1, 1))
            table = table + design.sd_both * rng.normal(size=(seeds, design.subsets, subjects))
            values = np.repeat(table, rows, axis=-1)
            if rows > 1:
                values = values + 0.3 * rng.normal(size=values.shape)
            drawn = values @ weights.T / weights.sum(axis=1)
            per_subject = values.reshape(-1, subjects, rows).mean(axis=(0, 2))
            centred = per_subject.mean() - per_subject
            skew = -(centred**3).sum() / (6 * (centred**2).sum() ** 1.5)
            return st.Runs(values.mean(axis=-1), drawn, subjects, float(skew))

        a, b = map(contestant, design.seeds)
        interval = st.nested_interval(a)
        covered += interval.low <= 0 <= interval.high
        false += st.paired_difference(a, b).p < 0.05
    return covered / simulations, false / simulations


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_coverage_and_false_positives_in_short(design):
    simulations = 1000
    covered, false = simulate(design, simulations, 400)
    chance = np.sqrt(0.05 * 0.95 / simulations)
    assert 0.93 - 2.6 * chance < covered < design.most + 2.6 * chance
    assert false < 0.055 + 2.6 * chance


@pytest.mark.slow
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
def test_coverage_is_93_to_97_and_false_positives_at_most_5_5_percent(design, skewed):
    simulations = 4000
    covered, false = simulate(design, simulations, 1000, skewed)
    chance = np.sqrt(0.05 * 0.95 / simulations)  # .0034
    assert 0.93 - chance < covered < design.most + chance
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
