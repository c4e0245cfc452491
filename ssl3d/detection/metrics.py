"""Scores of detection: average precision and FROC, as functions of resampling weights over scans.

Boxes have any dimension d: (n, 2d), lower corner first, upper corner exclusive, such as y1 x1 y2 x2 or
z1 y1 x1 z2 y2 x2. Detections are matched to the truths of their scan once; every score is then a few
cumulative sums for each row of weights (R, N scans), as `ssl3d.evaluation.statistics` wants it, equal to
the plain score of the resampled scans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

FROC_AT = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
"""False positives per scan at which LUNA16 reads the FROC curve."""


class Detections(NamedTuple):
    """Boxes that were found in one scan.

    Attributes:
        boxes: Boxes (n, 2d).
        scores: Scores (n,); higher means surer.
        labels: Labels (n,), integers; None: all of one class.
    """

    boxes: ArrayLike
    scores: ArrayLike
    labels: ArrayLike | None = None


class Truths(NamedTuple):
    """True boxes of one scan.

    Attributes:
        boxes: Boxes (n, 2d); n may be 0.
        labels: Labels (n,), integers; None: all of one class.
    """

    boxes: ArrayLike
    labels: ArrayLike | None = None


class AveragePrecision(NamedTuple):
    """Average precision, one value per row of weights.

    Attributes:
        mean: Mean over the classes that have a truth in the (resampled) scans (R,); NaN without any.
        classes: Average precision of each class (R,).
    """

    mean: Array
    classes: dict[int, Array]


class Froc(NamedTuple):
    """Sensitivities at given rates of false positives, one row per row of weights.

    Attributes:
        cpm: Mean of the sensitivities (the competition performance metric of LUNA16), (R,).
        sensitivities: Sensitivity at each rate (R, number of rates).
        at: Rates of false positives per scan.
    """

    cpm: Array
    sensitivities: Array
    at: tuple[float, ...]


def box_iou(a: ArrayLike, b: ArrayLike) -> Array:
    """Compute the intersection over union of every pair, (n, m), for boxes (n, 2d) and (m, 2d).

    Raises:
        ValueError: The boxes are not of one dimension, or a corner lies on the wrong side of the other.

    Example:
        >>> box_iou([[0, 0, 0, 4, 4, 4]], [[0, 0, 0, 4, 4, 3], [8, 8, 8, 9, 9, 9]])
        array([[0.75, 0.  ]])
    """
    a, b = _as_boxes(a), _as_boxes(b)
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"boxes of {a.shape[1]} and of {b.shape[1]} numbers cannot be compared")
    half = a.shape[1] // 2
    low = np.maximum(a[:, None, :half], b[None, :, :half])
    high = np.minimum(a[:, None, half:], b[None, :, half:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    whole = _volume(a)[:, None] + _volume(b)[None] - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)


def match(boxes: ArrayLike, scores: ArrayLike, truths: ArrayLike, iou: float) -> NDArray[np.int64]:
    """Match each detection to the truth it finds, or to -1; (n,).

    As in COCO: in order of falling score (ties in the order given) each detection takes, of the truths
    still free, the one it overlaps most, if by `iou` at least. So a second detection of the same object
    is a false positive.

    Args:
        boxes: Detected boxes (n, 2d).
        scores: Scores of the detections (n,).
        truths: True boxes (m, 2d).
        iou: Least overlap, above 0 and at most 1.

    Raises:
        ValueError: `iou` is outside (0, 1], the scores are not one finite number per box, or the boxes
            are not boxes.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou: {iou} is not in (0, 1]")
    boxes, truths = _as_boxes(boxes), _as_boxes(truths)
    scores = np.asarray(scores, dtype=np.float64).reshape(-1)
    if len(scores) != len(boxes):
        raise ValueError(f"{len(boxes)} boxes but {len(scores)} scores")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not a finite number")
    matched = np.full(len(boxes), -1, dtype=np.int64)
    overlap = box_iou(boxes, truths)
    if not overlap.size:
        return matched
    for n in np.argsort(-scores, kind="stable"):
        best = int(overlap[n].argmax())
        # A hair below, so that an overlap of exactly the threshold counts whatever the rounding.
        if overlap[n, best] >= iou - 1e-9:
            matched[n] = best
            overlap[:, best] = -1.0
    return matched


class DetectionScores:
    """Detections of N scans, matched once at one overlap; every score is a method of weights.

    Args:
        detections: Detections of each scan.
        truths: Truths of each scan, in the same order.
        iou: Least overlap of a detection with the truth that it finds; only truths of its own class.
        limit: Number of detections of a scan that count, the surest first (COCO: 100); None: all.

    Attributes:
        classes: The classes that have truths, rising.

    Raises:
        ValueError: Not as many detections as truths, or boxes, scores and labels do not fit.
    """

    def __init__(
        self,
        detections: Sequence[Detections],
        truths: Sequence[Truths],
        iou: float,
        limit: int | None = None,
    ) -> None:
        if len(detections) != len(truths):
            raise ValueError(f"detections of {len(detections)} scans but truths of {len(truths)}")
        self.scans = len(truths)
        scan, score, hit, label = [], [], [], []
        owners, kinds = [], []
        for n, (detected, there) in enumerate(zip(detections, truths, strict=True)):
            boxes, scores = (
                _as_boxes(detected.boxes),
                np.asarray(detected.scores, dtype=np.float64).reshape(-1),
            )
            labels = _labels(detected.labels, len(boxes), f"detections of scan {n}")
            real = _as_boxes(there.boxes)
            real_labels = _labels(there.labels, len(real), f"truths of scan {n}")
            if limit is not None and len(boxes) > limit:
                kept = np.argsort(-scores, kind="stable")[:limit]
                boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
            right = np.zeros(len(boxes), dtype=bool)
            for kind in np.unique(labels):
                of = labels == kind
                right[of] = match(boxes[of], scores[of], real[real_labels == kind], iou) >= 0
            scan.append(np.full(len(boxes), n))
            score.append(scores)
            hit.append(right)
            label.append(labels)
            owners.append(np.full(len(real), n))
            kinds.append(real_labels)
        self._scan, self._score = _joined(scan, int), _joined(score, float)
        self._hit, self._label = _joined(hit, bool), _joined(label, int)
        owner, kind_of = _joined(owners, int), _joined(kinds, int)
        self.classes = [int(kind) for kind in np.unique(kind_of)]
        # Truths per scan, of each class.
        self._counts = {
            kind: np.bincount(owner[kind_of == kind], minlength=self.scans).astype(np.float64)
            for kind in self.classes
        }

    def average_precision(
        self, weights: Array | None = None, points: int | None = None
    ) -> AveragePrecision:
        """Integrate the precision-recall curve of each class, and average over the classes.

        Precision is made non-increasing in recall first (each value is the best at that recall or
        beyond). The area is exact, over all points, as PASCAL VOC has it since 2010; with `points` 101
        precision is read at recalls 0, .01, ..., 1, as COCO (and nnDetection) do.
        Detections of equal score are one point of the curve, so their order does not matter.

        Args:
            weights: Weights of the scans (R, N); all ones, R = 1, if not given.
            points: Number of recalls to read at, 2 or more; None: the exact area.
        """
        weights = self._weights(weights)
        values = {}
        for kind in self.classes:
            caught, wrong = self._cumulative(weights, self._label == kind)
            number = (weights @ self._counts[kind])[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                recall = caught / number
                precision = np.where(caught + wrong > 0, caught / (caught + wrong), 0.0)
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            if points is None:
                area = (np.diff(recall, axis=1, prepend=0.0) * best).sum(axis=1)
            else:
                area = _read_at(recall, best, np.linspace(0, 1, points))
            values[kind] = np.where(number[:, 0] > 0, area, np.nan)
        if not values:
            return AveragePrecision(np.full(len(weights), np.nan), {})
        table = np.stack(list(values.values()))
        known = np.isfinite(table)
        count = known.sum(axis=0)
        total = np.where(known, table, 0.0).sum(axis=0)
        mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return AveragePrecision(mean, values)

    def froc(
        self,
        weights: Array | None = None,
        at: Sequence[float] = FROC_AT,
        interpolate: bool = False,
    ) -> Froc:
        """Measure the sensitivity at given numbers of false positives per scan, over all classes together.

        The sensitivity at a rate is the highest of an operating point (a threshold on the score) that
        does not exceed it. LUNA16's script and MONAI draw straight lines between the operating points:
        `interpolate` does that, and gives values that no threshold reaches where scans are few. A second
        detection of the same object is a false positive (LUNA16 leaves it out).

        Args:
            weights: Weights of the scans (R, N); all ones, R = 1, if not given.
            at: Rates of false positives per scan, each at least 0.
            interpolate: Whether to draw straight lines between the operating points.

        Returns:
            Sensitivities and their mean, NaN where the (resampled) scans have no truth.
        """
        weights = self._weights(weights)
        caught, wrong = self._cumulative(weights, np.ones(len(self._scan), bool))
        scans = weights.sum(axis=1)
        number = weights @ sum(self._counts.values(), np.zeros(self.scans))
        caught, wrong = (np.concatenate([np.zeros((len(weights), 1)), c], axis=1) for c in (caught, wrong))
        rows = np.arange(len(weights))
        columns = []
        for rate in at:
            allowed = rate * scans + 1e-9
            last = (wrong <= allowed[:, None]).sum(axis=1) - 1
            value = caught[rows, last]
            if interpolate:
                beyond = np.minimum(last + 1, wrong.shape[1] - 1)
                gap = wrong[rows, beyond] - wrong[rows, last]
                share = np.clip((rate * scans - wrong[rows, last]) / np.maximum(gap, 1e-12), 0, 1)
                value = value + np.where(gap > 0, share * (caught[rows, beyond] - value), 0.0)
            with np.errstate(divide="ignore", invalid="ignore"):
                columns.append(np.where(number > 0, value / number, np.nan))
        sensitivities = np.stack(columns, axis=1)
        return Froc(sensitivities.mean(axis=1), sensitivities, tuple(float(rate) for rate in at))

    def froc_curve(self) -> tuple[Array, Array, Array]:
        """Return false positives per scan, sensitivity and threshold of every operating point."""
        ones = np.ones((1, self.scans))
        caught, wrong = self._cumulative(ones, np.ones(len(self._scan), bool))
        number = max(sum(float(count.sum()) for count in self._counts.values()), 1.0)
        thresholds = np.unique(self._score)[::-1]
        return wrong[0] / max(self.scans, 1), caught[0] / number, thresholds

    def _weights(self, weights: Array | None) -> Array:
        if weights is None:
            return np.ones((1, self.scans))
        weights = np.asarray(weights, dtype=np.float64)
        if weights.ndim != 2 or weights.shape[1] != self.scans:
            raise ValueError(f"weights of shape {weights.shape} for {self.scans} scans; give (R, scans)")
        return weights

    def _cumulative(self, weights: Array, of: Array) -> tuple[Array, Array]:
        """Count true and false positives at each distinct score, from the highest down; (R, scores)."""
        scan, score, hit = self._scan[of], self._score[of], self._hit[of]
        if not len(scan):
            return np.zeros((len(weights), 0)), np.zeros((len(weights), 0))
        order = np.argsort(-score, kind="stable")
        score, hit, weighted = score[order], hit[order], weights[:, scan[order]]
        ends = np.flatnonzero(np.r_[score[1:] != score[:-1], True])
        caught = np.cumsum(np.where(hit, weighted, 0.0), axis=1)[:, ends]
        wrong = np.cumsum(np.where(hit, 0.0, weighted), axis=1)[:, ends]
        return caught, wrong


def average_precision(
    detections: Sequence[Detections],
    truths: Sequence[Truths],
    iou: float = 0.5,
    weights: Array | None = None,
    points: int | None = None,
) -> AveragePrecision:
    """Average precision per class and its mean; see `DetectionScores.average_precision`.

    Example:
        >>> found = [Detections([[0, 0, 0, 4, 4, 4], [8, 8, 8, 9, 9, 9]], [0.9, 0.4])]
        >>> average_precision(found, [Truths([[0, 0, 0, 4, 4, 3]])]).mean
        array([1.])
    """
    return DetectionScores(detections, truths, iou).average_precision(weights, points)


def froc(
    detections: Sequence[Detections],
    truths: Sequence[Truths],
    iou: float = 0.1,
    at: Sequence[float] = FROC_AT,
    weights: Array | None = None,
    interpolate: bool = False,
) -> Froc:
    """Measure the sensitivities at `at` false positives per scan, and their mean.

    An overlap of .1 is nnDetection's: a small lesion is found when it is pointed at.

    Example:
        >>> found = [Detections([[0, 0, 0, 4, 4, 4], [8, 8, 8, 9, 9, 9]], [0.4, 0.9])]
        >>> froc(found, [Truths([[0, 0, 0, 4, 4, 3]])], at=(0.5, 1.0)).sensitivities
        array([[0., 1.]])
    """
    return DetectionScores(detections, truths, iou).froc(weights, at, interpolate)


# Within -------------------------------------------------------------------------------------------


def _as_boxes(boxes: ArrayLike) -> Array:
    array = np.asarray(boxes, dtype=np.float64)
    if not array.size:
        return np.zeros((0, array.shape[1] if array.ndim == 2 and array.shape[1] else 6))
    if array.ndim != 2 or array.shape[1] % 2:
        raise ValueError(f"boxes of shape {array.shape}; expected (n, 2 x dimensions)")
    half = array.shape[1] // 2
    if not (array[:, half:] >= array[:, :half]).all():
        worst = array[~(array[:, half:] >= array[:, :half]).all(axis=1)][0]
        raise ValueError(f"box {worst.tolist()}: its upper corner lies below its lower one")
    return array


def _volume(boxes: Array) -> Array:
    half = boxes.shape[1] // 2
    return (boxes[:, half:] - boxes[:, :half]).prod(axis=1)


def _labels(labels: ArrayLike | None, count: int, owner: str) -> Array:
    if labels is None:
        return np.zeros(count, dtype=np.int64)
    array = np.asarray(labels, dtype=np.int64).reshape(-1)
    if len(array) != count:
        raise ValueError(f"{owner}: {count} boxes but {len(array)} labels")
    return array


def _joined(parts: Sequence[Array], kind: type) -> Array:
    return np.concatenate(parts).astype(kind) if parts else np.zeros(0, kind)


def _read_at(recall: Array, best: Array, recalls: Array) -> Array:
    """Average the best precision at each of `recalls` or beyond, 0 where it is not reached."""
    total = np.zeros(len(recall))
    padded = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
    rows = np.arange(len(recall))
    for level in recalls:
        total += padded[rows, (recall < level - 1e-12).sum(axis=1)]
    return total / len(recalls)
