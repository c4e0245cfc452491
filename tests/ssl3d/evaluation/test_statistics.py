"""Metrics against scikit-learn and scipy, intervals and tests against simulated truth, subsets, folds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, spearmanr, t
from sklearn import metrics

from ssl3d.evaluation import statistics

rows = st.integers(0, 2**31).map(np.random.default_rng)


def a_sample(rng, n=40, classes=3):
    target = np.r_[np.arange(classes), rng.integers(classes, size=n - classes)]
    scores = np.round(rng.random((n, classes)) + 0.3 * np.eye(classes)[target], 1)  # with ties
    return target, scores / scores.sum(axis=1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(rows)
def test_metrics_equal_the_libraries(rng):
    target, scores = a_sample(rng)
    predicted = scores.argmax(axis=1)
    value, other = rng.normal(size=40), np.round(rng.normal(size=40), 1)
    binary = np.c_[1 - scores[:, 1], scores[:, 1]]
    one_class = [metrics.roc_auc_score(target == k, scores[:, k]) for k in range(3)]
    for ours, theirs in (
        (statistics.multiclass_auc(target, scores), np.mean(one_class)),
        (
            statistics.multiclass_auc((target == 1).astype(int), binary),
            metrics.roc_auc_score(target == 1, binary[:, 1]),
        ),
        (statistics.mean(predicted == target), metrics.accuracy_score(target, predicted)),
        (
            statistics.balanced_accuracy(target, predicted),
            metrics.balanced_accuracy_score(target, predicted),
        ),
        (statistics.spearman(other, value), spearmanr(other, value).statistic),
        (statistics.r_squared(value, other), metrics.r2_score(value, other)),
    ):
        assert ours.shape == (1,)
        assert ours[0] == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(rows)
def test_weights_are_repetitions_of_rows(rng):
    target, scores = a_sample(rng)
    value, other = rng.normal(size=40), np.round(rng.normal(size=40), 1)
    counts = rng.integers(3, size=40)
    counts[:3] = 1
    again = np.repeat(np.arange(40), counts)
    for metric, a, b in (
        (statistics.multiclass_auc, target, scores),
        (statistics.balanced_accuracy, target, scores.argmax(axis=1)),
        (statistics.spearman, other, value),
        (statistics.r_squared, value, other),
    ):
        weighted = metric(a, b, counts[None].astype(float))[0]
        assert weighted == pytest.approx(metric(a[again], b[again])[0], abs=1e-12)
    assert statistics.mean(value, counts[None])[0] == pytest.approx(value[again].mean())


def test_auc_by_hand():
    # Pairs of (positive, negative): .8 > .1, .8 > .4, .4 > .1, .4 = .4: 3.5 of 4.
    assert statistics.auc([0, 1, 0, 1], [0.1, 0.8, 0.4, 0.4])[0] == 3.5 / 4


def test_auc_of_one_class_is_undefined():
    assert np.isnan(statistics.auc([1, 1], [0.2, 0.3])[0])


def test_perfect_predictor_scores_one_and_a_random_one_scores_chance():
    rng = np.random.default_rng(0)
    target = rng.integers(4, size=4000)
    assert statistics.multiclass_auc(target, np.eye(4)[target])[0] == 1
    assert statistics.multiclass_auc(target, rng.random((4000, 4)))[0] == pytest.approx(0.5, abs=0.02)
    assert statistics.balanced_accuracy(target, rng.integers(4, size=4000))[0] == pytest.approx(
        0.25, abs=0.03
    )


def test_mean_leaves_undefined_rows_out():
    assert statistics.mean([1.0, np.nan, 0.5])[0] == 0.75


def coverage(draw, truth, trials, resamples=600):
    hits = 0
    for seed in range(trials):
        statistic, clusters = draw(np.random.default_rng(seed))
        found = statistics.interval(statistic, clusters, resamples=resamples, seed=seed)
        hits += found.low <= truth <= found.high
    return hits / trials


def an_auc(rng, n=60):
    target = (np.arange(n) < n // 4).astype(int)
    score = rng.normal(size=n) + 1.2 * target
    return (lambda w: statistics.auc(target, score, w)), np.arange(n)


def a_dice(rng, n=40):
    values = rng.beta(12, 3, size=n)  # skewed to the left, mean .8
    return (lambda w: statistics.mean(values, w)), np.arange(n)


def repeated_volumes(rng, n=40):
    people = np.repeat(np.arange(n), 4)
    values = rng.normal(size=n)[people] + 0.2 * rng.normal(size=4 * n)
    return (lambda w: statistics.mean(values, w)), people


@pytest.mark.parametrize(
    ("draw", "truth"), [(an_auc, norm.cdf(1.2 / np.sqrt(2))), (a_dice, 0.8), (repeated_volumes, 0.0)]
)
def test_intervals_cover_the_truth_93_to_97_percent(draw, truth):
    assert 0.93 <= coverage(draw, truth, 1000) <= 0.97


def test_ignoring_that_volumes_share_a_subject_covers_too_little():
    def naive(rng):
        statistic, people = repeated_volumes(rng)
        return statistic, np.arange(len(people))

    assert coverage(naive, 0.0, 300) < 0.8


def test_resampling_in_blocks_bounds_memory_and_repeats(monkeypatch):
    values, sizes = np.random.default_rng(0).normal(size=50), []

    def statistic(weights):
        sizes.append(weights.shape)
        return statistics.mean(values, weights)

    whole = statistics.resample(statistic, np.arange(50), 1000)
    monkeypatch.setattr("ssl3d.evaluation.statistics.intervals.BLOCK", 5000)
    sizes.clear()
    blocks = statistics.resample(statistic, np.arange(50), 1000)
    assert max(rows * columns for rows, columns in sizes) <= 5000 and len(blocks) == 1000
    assert np.std(blocks) == pytest.approx(np.std(whole), rel=0.1)
    assert len(np.unique(blocks)) > 990  # no block repeats another
    assert np.array_equal(blocks, statistics.resample(statistic, np.arange(50), 1000))


def test_interval_of_a_constant_is_a_point():
    found = statistics.interval(lambda w: statistics.mean(np.ones(5), w), np.arange(5))
    assert (found.value, found.low, found.high, found.error) == (1, 1, 1, 0)


def test_interval_counts_resamples_without_a_class():
    target, score = np.array([1, 0, 0, 0, 0]), np.arange(5.0)
    found = statistics.interval(lambda w: statistics.auc(target, score, w), np.arange(5))
    assert found.undefined == pytest.approx(0.8**5, abs=0.05)  # the one positive not drawn


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_minimum_detectable_difference_is_what_80_percent_of_experiments_find():
    error = 0.034
    difference = statistics.minimum_detectable_difference(error)
    found = np.random.default_rng(0).normal(difference, error, size=20000)
    assert np.mean(np.abs(found / error) > 1.96) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("freedom", [4, 10, 39])
def test_the_detectable_difference_knows_how_well_its_error_is_known(freedom):
    rng = np.random.default_rng(0)
    found = rng.normal(statistics.minimum_detectable_difference(0.034, freedom=freedom), 0.034, size=20000)
    errors = 0.034 * np.sqrt(rng.chisquare(freedom, size=20000) / freedom)
    assert np.mean(np.abs(found / errors) > t.ppf(0.975, freedom)) == pytest.approx(0.8, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(rows, st.integers(12, 60))
def test_subsets_are_nested_and_never_cut_a_subject(rng, people):
    subjects = np.repeat(np.arange(people), rng.integers(1, 4, size=people))
    kinds = rng.integers(3, size=people)[subjects]
    fractions = (0.05, 0.3, 0.5, 1.0)
    chosen = statistics.nested_subsets(subjects, kinds, fractions, seed=7)
    for smaller, larger in itertools.pairwise(fractions):
        assert np.all(chosen[larger][chosen[smaller]])
    for fraction in fractions:
        inside = set(subjects[chosen[fraction]])
        assert inside.isdisjoint(subjects[~chosen[fraction]])
        for kind in np.unique(kinds):
            available = len(set(subjects[kinds == kind]))
            assert len(inside & set(subjects[kinds == kind])) >= min(2, available)
    assert chosen[1.0].all()


def test_subsets_keep_class_shares_and_differ_between_seeds():
    kinds = np.repeat([0, 1], [160, 40])
    first = statistics.nested_subsets(np.arange(200), kinds, [0.1, 0.5], seed=1)
    assert first[0.5].sum() == 100 and abs(kinds[first[0.5]].sum() - 20) <= 2
    assert first[0.1].sum() == 20 and abs(kinds[first[0.1]].sum() - 4) <= 2
    again = statistics.nested_subsets(np.arange(200), kinds, [0.1, 0.5], seed=1)
    other = statistics.nested_subsets(np.arange(200), kinds, [0.1, 0.5], seed=2)
    assert np.array_equal(first[0.5], again[0.5]) and not np.array_equal(first[0.5], other[0.5])


def test_a_fraction_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"fractions: 1\.5"):
        statistics.nested_subsets(np.arange(4), None, [1.5])


@settings(max_examples=30, deadline=None)
@given(rows, st.integers(2, 5))
def test_folds_keep_subjects_whole_and_classes_even(rng, folds):
    subjects = np.repeat(np.arange(30), rng.integers(1, 4, size=30))
    kinds = (np.arange(30) % 3)[subjects]
    fold = statistics.grouped_folds(subjects, kinds, folds, seed=3)
    by_subject = {person: set(fold[subjects == person]) for person in range(30)}
    assert all(len(found) == 1 for found in by_subject.values())
    for kind in range(3):
        sizes = np.bincount([min(by_subject[p]) for p in range(30) if p % 3 == kind], minlength=folds)
        assert sizes.max() - sizes.min() <= 1


def test_more_folds_than_subjects_is_refused():
    with pytest.raises(ValueError, match="5 folds of 3 subjects"):
        statistics.grouped_folds([1, 2, 3], None, 5)


def of_classes(rng, each):
    """An AUC of two classes with so many subjects each, and the rows of its predictions."""
    target = np.repeat([0, 1], each)
    score = rng.normal(size=2 * each) + target
    rows = [{"dataset": "a", "subject": k, "target": str(t)} for k, t in enumerate(target)]
    return target, score, rows


@pytest.mark.parametrize(("each", "lowest", "highest"), [(1, 0, 0.2), (3, 0.5, 0.85), (5, 0.9, 1.0)])
def test_an_auc_is_covered_from_five_subjects_of_a_class_on(each, lowest, highest):
    """Why there are no intervals below: they would hold the truth too rarely."""
    truth, hits, simulations = norm.cdf(1 / np.sqrt(2)), 0, 200
    rng = np.random.default_rng(each)
    for number in range(simulations):
        target, score, rows = of_classes(rng, each)

        def statistic(weights, target=target, score=score):
            return statistics.auc(target, score, weights)

        weights = statistics.resampling_weights(np.arange(2 * each), 500, number)
        drawn = statistics.auc(target, score, weights)
        known = drawn[np.isfinite(drawn)]  # as it was computed before: what is undefined is left out
        found = statistics.summarise(statistic(None)[0], known, np.arange(2 * each), statistic)
        hits += found.low <= truth <= found.high
        runs = statistics.runs_of(
            [[statistic]], np.arange(2 * each), 100, support=statistics.class_support(rows)
        )
        assert np.isfinite(statistics.nested_interval(runs).low) == runs.sure == (each >= 5)
    assert lowest <= hits / simulations <= highest


def test_where_a_class_is_missed_in_a_tenth_of_the_resamples_there_is_no_interval():
    target, score = np.arange(20) < 2, np.arange(20.0)
    found = statistics.interval(lambda w: statistics.auc(target, score, w), np.arange(20))
    assert found.undefined == pytest.approx((1 - 2 / 20) ** 20, abs=0.03) and np.isnan(found.low)
    assert statistics.why_no_interval({}, found.undefined).endswith("--folds 5 tests on every subject.")
    found = statistics.interval(lambda w: statistics.auc(np.arange(20) < 5, score, w), np.arange(20))
    assert found.undefined < 0.01 and np.isfinite(found.low)


def test_why_there_is_no_interval_names_the_rarest_class():
    words = statistics.why_no_interval({"well": 9, "ill": 1}, 0.0)
    assert words.startswith("No interval is given, because class ill has 1 test subject and 5 of each")
    assert "--folds" not in statistics.why_no_interval({"ill": 1}, 0.0, folds=False)
    assert not statistics.why_no_interval({"well": 5, "ill": 5}, 0.1) and not statistics.why_no_interval(
        {}, 0
    )


def test_intervals_and_gains_of_bounded_scores_stay_inside_what_is_possible():
    rng = np.random.default_rng(1)
    hits = [rng.random(4) < share for share in (0.9, 0.2)]
    a, b = (
        statistics.runs_of(
            [[lambda w, h=h: statistics.mean(h, w)]], np.arange(4), bounds=statistics.bounds_of("accuracy")
        )
        for h in hits
    )
    gain = statistics.paired_difference(a, b)
    assert -1 <= gain.low < gain.value < gain.high <= 1
    assert np.isnan(gain._replace(error=0.9).detectable)  # nothing that is possible would be found
    free = statistics.paired_difference(
        a._replace(bounds=(-np.inf, np.inf)), b._replace(bounds=(-np.inf, np.inf))
    )
    assert free.high > 1


def test_a_correlation_has_no_end_at_0_and_an_error_none_at_1():
    """Both were cut where no resample happened to lie beyond."""
    target = np.arange(12.0)
    predicted = target + np.random.default_rng(3).normal(size=12) * 4
    found = statistics.interval(
        lambda w: statistics.spearman(target, predicted, w),
        np.arange(12),
        bounds=statistics.bounds_of("spearman"),
    )
    assert found.low < found.value < found.high <= 1
    errors = np.array([0.0, 0.0, 0.0, 1.0])
    mae = statistics.interval(
        lambda w: statistics.mean(errors, w), np.arange(4), bounds=statistics.bounds_of("mae")
    )
    assert mae.low == 0 and mae.high > 1
