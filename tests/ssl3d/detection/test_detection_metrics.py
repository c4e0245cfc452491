"""Average precision and FROC against hand-computed values, a plain reference, and MONAI."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.api import Detections, DetectionScores, Truths, average_precision, box_iou, froc, statistics
from ssl3d.detection.metrics import match


def boxes_of(rng, count, dimension=3, size=40):
    low = rng.uniform(0, size, (count, dimension))
    return np.concatenate([low, low + rng.uniform(2, 12, (count, dimension))], axis=1)


def case(seed, scans=6, classes=1, dimension=3):
    """Scans with truths, and detections some of which are those truths, moved a little."""
    rng = np.random.default_rng(seed)
    detections, truths = [], []
    for _ in range(scans):
        real = boxes_of(rng, int(rng.integers(0, 4)), dimension)
        labels = rng.integers(classes, size=len(real))
        kept = rng.random(len(real)) < 0.8
        moved = real[kept] + rng.uniform(-1.5, 1.5, (kept.sum(), 1))
        noise = boxes_of(rng, int(rng.integers(0, 5)), dimension)
        found = np.concatenate([moved, noise])
        kinds = np.concatenate([labels[kept], rng.integers(classes, size=len(noise))])
        detections.append(Detections(found, rng.random(len(found)), kinds))
        truths.append(Truths(real, labels))
    return detections, truths


def iou_of(a, b):
    shared = whole_a = whole_b = 1.0
    for n in range(len(a) // 2):
        m = n + len(a) // 2
        shared *= max(0.0, min(a[m], b[m]) - max(a[n], b[n]))
        whole_a *= a[m] - a[n]
        whole_b *= b[m] - b[n]
    return shared / (whole_a + whole_b - shared)


def plain_rows(detections, truths, iou, kind):
    """(score, hit) of all detections of a class, and the number of its truths: loops, nothing else."""
    rows, number = [], 0
    for found, there in zip(detections, truths):
        real = [box for box, label in zip(there.boxes, there.labels) if label == kind]
        number += len(real)
        free = list(range(len(real)))
        mine = [(s, box) for s, box, label in zip(found.scores, found.boxes, found.labels) if label == kind]
        for score, box in sorted(mine, key=lambda row: -row[0]):
            overlaps = [(iou_of(box, real[n]), n) for n in free]
            best = max(overlaps, default=(0.0, -1))
            if best[0] >= iou:
                free.remove(best[1])
            rows.append((score, best[0] >= iou))
    return sorted(rows, key=lambda row: -row[0]), number


def plain_average_precision(detections, truths, iou, kind, points=None):
    rows, number = plain_rows(detections, truths, iou, kind)
    if not number:
        return None
    recall, precision, hits = [], [], 0
    for n, (_, hit) in enumerate(rows, 1):
        hits += hit
        recall.append(hits / number)
        precision.append(hits / n)
    best = [max(precision[n:]) for n in range(len(rows))]
    if points is None:
        before = [0.0, *recall[:-1]]
        return sum((r - b) * p for r, b, p in zip(recall, before, best))
    values = []
    for n in range(points):
        reached = [p for r, p in zip(recall, best) if r >= n / (points - 1) - 1e-12]
        values.append(reached[0] if reached else 0.0)
    return sum(values) / points


def test_overlap_of_boxes_by_hand():
    a = [[0, 0, 0, 2, 2, 2]]
    b = [[1, 1, 1, 3, 3, 3], [0, 0, 0, 2, 2, 2], [2, 0, 0, 4, 2, 2], [0, 0, 0, 1, 2, 2]]
    assert box_iou(a, b).tolist() == [[1 / 15, 1.0, 0.0, 0.5]]
    assert box_iou([[0, 0, 2, 2]], [[1, 0, 3, 2]]).tolist() == [[1 / 3]]


def test_overlap_agrees_with_monai():
    utils = pytest.importorskip("monai.data.box_utils")
    rng = np.random.default_rng(0)
    a, b = boxes_of(rng, 7), boxes_of(rng, 5)
    np.testing.assert_allclose(box_iou(a, b), utils.box_iou(a, b), rtol=1e-5)


def test_second_detection_of_an_object_is_a_false_positive():
    truth = [[0, 0, 0, 4, 4, 4], [10, 10, 10, 14, 14, 14]]
    boxes = [[0, 0, 0, 4, 4, 4], [0, 0, 1, 4, 4, 5], [10, 10, 10, 14, 14, 14]]
    assert match(boxes, [0.5, 0.9, 0.1], truth, 0.3).tolist() == [-1, 0, 1]


def test_overlap_of_exactly_the_threshold_counts():
    assert match([[0, 0, 1, 2]], [1.0], [[0, 0, 2, 2]], 0.5).tolist() == [0]
    assert match([[0, 0, 1, 2]], [1.0], [[0, 0, 2, 2]], 0.51).tolist() == [-1]


def test_perfect_predictor_scores_one():
    _, truths = case(1)
    detections = [Detections(t.boxes, np.linspace(1, 0.5, len(t.boxes)), t.labels) for t in truths]
    assert average_precision(detections, truths, 0.5).mean.tolist() == [1.0]
    found = froc(detections, truths)
    assert found.cpm.tolist() == [1.0]
    assert found.sensitivities.tolist() == [[1.0] * 7]


def test_average_precision_by_hand():
    """Three truths; hits and misses in order of score + - + - -: precision 1, 2/3 at recall 1/3, 2/3."""
    truths = [Truths([[0, 0, 4, 4], [10, 10, 14, 14], [20, 20, 24, 24]])]
    boxes = [[0, 0, 4, 4], [30, 30, 31, 31], [10, 10, 14, 14], [40, 40, 41, 41], [50, 50, 51, 51]]
    detections = [Detections(boxes, [0.9, 0.8, 0.7, 0.6, 0.5])]
    assert average_precision(detections, truths, 0.5).mean[0] == pytest.approx((1 + 2 / 3) / 3)
    # Read at 101 recalls: 34 of them (0 ... .33) at precision 1, 33 (.34 ... .66) at 2/3.
    expected = (34 + 33 * 2 / 3) / 101
    assert average_precision(detections, truths, 0.5, points=101).mean[0] == pytest.approx(expected)


def test_froc_by_hand():
    """Two scans, 4 truths; in order of score: + - + - - +. Rates of 1/2 allow one false positive, 1 two."""
    truths = [Truths([[0, 0, 4, 4], [10, 10, 14, 14]]), Truths([[0, 0, 4, 4], [20, 20, 24, 24]])]
    detections = [
        Detections([[0, 0, 4, 4], [60, 60, 64, 64], [10, 10, 14, 14]], [0.9, 0.8, 0.7]),
        Detections([[60, 60, 64, 64], [70, 70, 74, 74], [20, 20, 24, 24]], [0.6, 0.5, 0.4]),
    ]
    found = froc(detections, truths, at=(0.25, 0.5, 1.0, 1.5, 2.0))
    assert found.sensitivities.tolist() == [[0.25, 0.5, 0.5, 0.75, 0.75]]
    assert found.cpm[0] == pytest.approx(np.mean([0.25, 0.5, 0.5, 0.75, 0.75]))
    # Rate .75 lies half way between 1 and 2 false positives, both at sensitivity 1/2; 1.25 half way
    # between (2, 1/2) and (3, 1/2); .25 half way between (0, 1/4) and (1, 1/4).
    lines = froc(detections, truths, at=(0.25, 0.75, 1.25), interpolate=True)
    assert lines.sensitivities.tolist() == [[0.25, 0.5, 0.5]]


@pytest.mark.parametrize("dimension, classes, iou", [*itertools.product((2, 3), (1, 3), (0.1, 0.5))])
def test_average_precision_agrees_with_a_plain_reference(dimension, classes, iou):
    for seed in range(10):
        detections, truths = case(seed, classes=classes, dimension=dimension)
        for points in (None, 101):
            found = average_precision(detections, truths, iou, points=points)
            expected = {
                kind: plain_average_precision(detections, truths, iou, kind, points)
                for kind in range(classes)
            }
            expected = {kind: value for kind, value in expected.items() if value is not None}
            assert set(found.classes) == set(expected)
            for kind, value in expected.items():
                assert found.classes[kind][0] == pytest.approx(value, abs=1e-12)
            assert found.mean[0] == pytest.approx(np.mean(list(expected.values())))


def test_average_precision_agrees_with_monai():
    coco = pytest.importorskip("monai.apps.detection.metrics.coco")
    matching = pytest.importorskip("monai.apps.detection.metrics.matching")
    utils = pytest.importorskip("monai.data.box_utils")
    metric = coco.COCOMetric(
        classes=["a", "b"], iou_list=[0.1, 0.5], iou_range=(0.1, 0.5, 0.4), max_detection=[100]
    )
    for seed in range(3):
        detections, truths = case(seed, scans=12, classes=2)
        rows = matching.matching_batch(
            iou_fn=utils.box_iou,
            iou_thresholds=metric.iou_thresholds,
            pred_boxes=[np.asarray(d.boxes) for d in detections],
            pred_classes=[np.asarray(d.labels) for d in detections],
            pred_scores=[np.asarray(d.scores) for d in detections],
            gt_boxes=[np.asarray(t.boxes) for t in truths],
            gt_classes=[np.asarray(t.labels) for t in truths],
        )
        theirs = metric(rows)[0]
        for iou in (0.1, 0.5):
            ours = average_precision(detections, truths, iou, points=101).classes
            for kind, name in enumerate("ab"):
                assert ours[kind][0] == pytest.approx(theirs[f"{name}_AP_IoU_{iou:.2f}_MaxDet_100"])


def test_interpolated_froc_agrees_with_monai():
    monai = pytest.importorskip("monai.metrics")
    for seed in range(5):
        detections, truths = case(seed, scans=20)
        rows, number = plain_rows(detections, truths, 0.1, 0)
        hits = np.array([score for score, hit in rows if hit])
        misses = np.array([score for score, hit in rows if not hit])
        rates, sensitivity = monai.compute_froc_curve_data(misses, hits, number, 20)
        theirs = monai.compute_froc_score(rates, sensitivity, (0.1, 0.25, 0.5, 1))
        ours = froc(detections, truths, at=(0.1, 0.25, 0.5, 1), interpolate=True)
        # MONAI's curve is read by np.interp, which takes any one of several points at one rate.
        assert ours.cpm[0] == pytest.approx(theirs, abs=0.02)


def test_random_scores_have_the_precision_of_the_heap():
    """Where every truth is found and the score says nothing, AP is the share of hits, FROC a diagonal."""
    rng = np.random.default_rng(0)
    scans, wrong = 400, 8
    truth = [[0.0, 0.0, 0.0, 4.0, 4.0, 4.0]]
    far = np.arange(wrong)[:, None] * 10 + 100 + np.array([0, 0, 0, 4, 4, 4.0])
    boxes = np.concatenate([truth, far])
    detections = [Detections(boxes, rng.random(1 + wrong)) for _ in range(scans)]
    truths = [Truths(truth)] * scans
    assert average_precision(detections, truths, 0.5).mean[0] == pytest.approx(1 / (1 + wrong), abs=0.02)
    found = froc(detections, truths, at=(1, 2, 4, 8))
    np.testing.assert_allclose(found.sensitivities[0], [1 / 8, 1 / 4, 1 / 2, 1], atol=0.05)


def test_random_boxes_score_next_to_nothing():
    rng = np.random.default_rng(1)
    truths = [Truths(boxes_of(rng, 2, size=100)) for _ in range(50)]
    detections = [Detections(boxes_of(rng, 5, size=100), rng.random(5)) for _ in range(50)]
    assert average_precision(detections, truths, 0.5).mean[0] < 0.01
    assert froc(detections, truths).cpm[0] < 0.1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_weights_are_repeated_scans(seed, counts):
    """A bootstrap resample: every score equals the plain one of the scans drawn."""
    if not sum(counts):
        return
    detections, truths = case(seed, classes=2)
    again = [n for n, count in enumerate(counts) for _ in range(count)]
    drawn = DetectionScores([detections[n] for n in again], [truths[n] for n in again], 0.3)
    weighted = DetectionScores(detections, truths, 0.3)
    weights = np.array([counts, [1.0] * 6])
    ours, plain = weighted.average_precision(weights), drawn.average_precision()
    np.testing.assert_allclose(ours.mean[0], plain.mean[0], rtol=1e-12)
    np.testing.assert_allclose(ours.mean[1], weighted.average_precision().mean[0], rtol=1e-12)
    for lines in (False, True):
        np.testing.assert_allclose(
            weighted.froc(weights, interpolate=lines).sensitivities[0],
            drawn.froc(interpolate=lines).sensitivities[0],
            rtol=1e-9,
        )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_order_of_scans_and_detections_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    detections, truths = case(seed)
    # Scores in steps of .1: ties.
    detections = [d._replace(scores=np.round(d.scores, 1)) for d in detections]
    expected = average_precision(detections, truths, 0.3).mean, froc(detections, truths).cpm
    order = rng.permutation(len(truths))
    detections, truths = [detections[n] for n in order], [truths[n] for n in order]
    np.testing.assert_allclose(average_precision(detections, truths, 0.3).mean, expected[0])
    np.testing.assert_allclose(froc(detections, truths).cpm, expected[1])


def test_interval_over_subjects():
    detections, truths = case(3, scans=20)
    scores = DetectionScores(detections, truths, 0.1)
    subjects = [f"subject-{n // 2}" for n in range(20)]
    found = statistics.interval(lambda w: scores.froc(w).cpm, subjects, resamples=300)
    assert 0 <= found.low < found.value < found.high <= 1


def test_nothing_found_scores_zero_and_no_truths_is_undefined():
    nothing, empty = Detections(np.zeros((0, 6)), []), Truths(np.zeros((0, 6)))
    there = Truths([[0, 0, 0, 1, 1, 1]])
    assert average_precision([nothing], [there]).mean.tolist() == [0.0]
    assert froc([nothing], [there]).cpm.tolist() == [0.0]
    assert np.isnan(average_precision([nothing], [empty]).mean).all()
    assert np.isnan(froc([nothing], [empty]).cpm).all()
    # False positives on a scan without truths cost precision.
    wrong = Detections([[5, 5, 5, 6, 6, 6]], [0.9])
    right = Detections([[0, 0, 0, 1, 1, 1]], [0.5])
    assert average_precision([wrong, right], [empty, there]).mean.tolist() == [0.5]


def test_limit_keeps_the_surest():
    truth = Truths([[0, 0, 4, 4]])
    found = Detections([[9, 9, 10, 10], [0, 0, 4, 4]], [0.9, 0.8])
    assert DetectionScores([found], [truth], 0.5, limit=1).average_precision().mean[0] == 0.0
    assert DetectionScores([found], [truth], 0.5, limit=2).average_precision().mean[0] == 0.5


@pytest.mark.parametrize(
    "boxes, scores, iou, message",
    [
        ([[0, 0, 1, 1]], [1.0, 2.0], 0.5, "1 boxes but 2 scores"),
        ([[0, 0, 1, 1]], [np.nan], 0.5, "not a finite number"),
        ([[0, 0, 1, 1]], [1.0], 0.0, "iou: 0.0 is not in"),
        ([[0, 0, 1]], [1.0], 0.5, "expected \\(n, 2 x dimensions\\)"),
        ([[2, 0, 1, 1]], [1.0], 0.5, "upper corner lies below"),
        ([[0, 0, 0, 1, 1, 1]], [1.0], 0.5, "boxes of 6 and of 4 numbers"),
    ],
)
def test_bad_input_is_named(boxes, scores, iou, message):
    with pytest.raises(ValueError, match=message):
        match(boxes, scores, [[0, 0, 1, 1]], iou)


def test_scans_must_fit():
    with pytest.raises(ValueError, match="1 scans but truths of 2"):
        froc([Detections([], [])], [Truths([]), Truths([])])
    with pytest.raises(ValueError, match="truths of scan 0: 1 boxes but 2 labels"):
        froc([Detections([], [])], [Truths([[0, 0, 1, 1]], [1, 2])])
