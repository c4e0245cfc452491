"""Linear probe: how much of a target a linear model reads off a frozen encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import Benchmark, DataError, Scores, metric_name, statistics
from ssl3d_benchmarks.features import embeddings
from ssl3d_benchmarks.linear_probe.config import LinearProbeConfig
from ssl3d_benchmarks.subject_scores import class_statistics, subject_scores

if TYPE_CHECKING:
    from ssl3d.api import Collection, Contestant
    from ssl3d_benchmarks.linear_probe.dense import DenseFeatures

Array = NDArray[Any]


L2_CLASSES = tuple(10.0**k for k in range(4, -3, -1))
"""Strengths tried for the logistic regression (1 / C), strong first, as each starts from the last."""
L2_RIDGE = tuple(10.0**k for k in range(6, -3, -1))
"""Strengths tried for the ridge regression."""
FOLDS, ROUNDS = 5, 3
"""The repeated cross-validation inside train that chooses among them."""


class LinearProbe(Benchmark):
    """A linear model on frozen features; the protocol follows from the kind of target.

    *classes*: embeddings, standardised, multinomial logistic regression; AUC and accuracy as MedMNIST's
    evaluator has them, balanced accuracy. *ordinal*, *real*: ridge regression; Spearman's correlation,
    mean absolute error, R2. L2 is chosen by repeated, stratified cross-validation over the subjects of
    train. *masks*: a 1 x 1 x 1 convolution on the up-sampled feature maps (see `dense`); Dice.
    """

    Config: ClassVar[type] = LinearProbeConfig
    name = "linear-probe"
    version = 1
    description = "a linear model on the frozen encoder: classes, ordinal or real targets, or masks (dense)"
    reference = (
        "Alain, Bengio: Understanding intermediate layers using linear probes, arXiv 1610.01644; "
        "metrics of Yang et al.: MedMNIST v2, Sci Data 2023, arXiv 2110.14795"
    )
    mains: ClassVar[Mapping[str, str]] = {
        "classes": "auc",
        "ordinal": "spearman",
        "real": "r2",
        "masks": "dice",
    }

    config: LinearProbeConfig

    def __init__(self, config: LinearProbeConfig):
        """Keep the resolved options."""
        super().__init__(config)
        self.target = config.target
        self.report: Callable[[int, int], None] | None = None
        self._ready: tuple[str, dict[int, Array]] | None = None
        self._dense: tuple[str, DenseFeatures] | None = None

    @property
    def task_version(self) -> int:
        """Return 2 for masks with windows below 96 voxels: in version 1 encoders saw more than those."""
        # 96 is three of the largest usual stride, 32: from there on windows were never exceeded.
        return 2 if self.target == "masks" and min(self.config.window) < 96 else self.version

    def prepare(self, contestant: Contestant, data: Collection) -> None:
        """Compute the features of all the data for a contestant, and let those of the one before go."""
        config = self.config
        if self.target == "masks":
            from ssl3d_benchmarks.linear_probe.dense import DenseFeatures

            self._dense = None  # freed before the next is filled
            self._dense = (contestant.digest, DenseFeatures(contestant, data, config, self.report))
            return
        features = embeddings(
            contestant, data, config.window, config.precision, config.mask_classes, self.report
        )
        by_index = {volume.index: row for volume, row in zip(data, features, strict=True)}
        self._ready = (contestant.digest, by_index)

    def score(
        self, contestant: Contestant, train: Collection, val: Collection, test: Collection, seed: int
    ) -> Scores:
        """Fit on `train` and predict `test`; `val` chooses the dense probe's L2 and nothing else."""
        began = time.perf_counter()
        if self.target == "masks":
            from ssl3d_benchmarks.linear_probe.dense import fit_dense

            if self._dense is None or self._dense[0] != contestant.digest:
                raise RuntimeError("prepare() comes before score()")
            predictions, details = fit_dense(self._dense[1], train, val, test, self.config, seed)
        else:
            predictions, details = self._fit(contestant, train, val, test, seed)
        scores = self.summarise(predictions)
        scores.details, scores.seconds = details, time.perf_counter() - began
        return scores

    def _fit(
        self, contestant: Contestant, train: Collection, val: Collection, test: Collection, seed: int
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        x, y, subjects, x_val, y_val, x_test, y_test, about = self._standardised(
            contestant, train, val, test
        )
        details: dict[str, Any] = {"features": x.shape[1], "train_rows": len(x)}
        if self.target == "classes":
            model, l2 = fit_classifier(x, y, subjects, len(self.config.classes), seed)
            details["l2"] = l2
            probability = model(x_test)
            if len(x_val):
                details["validation"] = {"auc": _number(statistics.multiclass_auc(y_val, model(x_val)))}
            for row, target, values in zip(about, y_test, probability, strict=True):
                row["target"] = self.config.classes[int(target)]
                row["probability"] = [float(v) for v in values]
        else:
            model, l2 = fit_ridge(x, y, subjects, seed)
            details["l2"] = l2
            if len(x_val) > 1:
                value = statistics.spearman(y_val, model(x_val))
                details["validation"] = {"spearman": _number(value)}
            for row, target, value in zip(about, y_test, model(x_test), strict=True):
                row["target"], row["prediction"] = float(target), float(value)
        return about, details

    def _standardised(
        self, contestant: Contestant, train: Collection, val: Collection, test: Collection
    ) -> tuple[Array, Array, Array, Array, Array, Array, Array, list[dict[str, Any]]]:
        """Return standardised features and targets of train (and subjects), val and test (and who)."""
        if self._ready is None or self._ready[0] != contestant.digest:
            everything = train.select(np.arange(len(train)))
            everything.rows = np.concatenate([train.rows, val.rows, test.rows])
            self.prepare(contestant, everything)
        rows = [self._rows(part) for part in (train, val, test)]
        (x, y, subjects, _), (x_val, y_val, _, _), (x_test, y_test, _, about) = rows
        centre, scale = x.mean(axis=0), x.std(axis=0)
        # A feature that never varies in train says nothing; dividing by its zero would.
        scale = np.where(scale > 1e-8 * np.maximum(1.0, np.abs(centre)), scale, np.inf)
        x, x_val, x_test = ((part - centre) / scale for part in (x, x_val, x_test))
        return x, y, subjects, x_val, y_val, x_test, y_test, about

    def _rows(self, part: Collection) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Return features (n, f), targets (n,), subject codes (n,) and identities, after pooling."""
        assert self._ready is not None
        features = [self._ready[1][int(index)] for index in part.rows]
        x = np.stack(features).astype(np.float64) if features else np.zeros((0, 1))
        targets = self.targets(part)
        people = part.subject_codes
        about = [
            {"dataset": str(dataset), "subject": str(subject), "id": str(name)}
            for dataset, subject, name in zip(part.datasets, part.subjects, part.ids, strict=True)
        ]
        if self.config.pool_subject == "none" or not features:
            return x, targets, people, about
        pooled, kept = [], []
        for person in np.unique(people):
            mine = sorted(np.flatnonzero(people == person), key=lambda i: about[i]["id"])
            own = x[mine]
            pooled.append(own.mean(axis=0) if self.config.pool_subject == "mean" else own.ravel())
            kept.append(mine[0])
        return np.stack(pooled), targets[kept], people[kept], [about[i] for i in kept]

    def features_and_targets(self, part: Collection) -> tuple[Array, Array]:
        """Return features (n, f) and targets (n,) of prepared data, pooled over subjects if configured."""
        x, y, _, _ = self._rows(part)
        return x, y

    @property
    def dense(self) -> DenseFeatures:
        """The dense features of the contestant prepared last."""
        if self._dense is None:
            raise RuntimeError("prepare() comes first")
        return self._dense[1]

    def targets(self, data: Collection) -> Array:
        """Return the class indices, or the values, of the volumes (N,)."""
        if self.target == "classes":
            number = {name: k for k, name in enumerate(self.config.classes)}
            return np.array([number[str(label)] for label in data.labels], dtype=np.int64)
        return np.array([float(label) for label in data.labels], dtype=np.float64)

    def score_functions(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, statistics.Statistic]]:
        """Return the scores of this kind of target as functions of resampling weights."""
        if self.target == "masks":
            return self._dice_statistics(predictions)
        clusters = np.array([f"{row['dataset']}\t{row['subject']}" for row in predictions])
        if self.target == "classes":
            number = {name: k for k, name in enumerate(self.config.classes)}
            target = np.array([number[row["target"]] for row in predictions])
            scores = np.array([row["probability"] for row in predictions], dtype=np.float64)
            # MedMNIST's evaluator: above one half if there are two classes, else the most probable.
            predicted = (scores[:, 1] > 0.5).astype(int) if scores.shape[1] == 2 else scores.argmax(axis=1)
            return clusters, {
                "auc": lambda w: statistics.multiclass_auc(target, scores, w),
                "accuracy": lambda w: statistics.mean(predicted == target, w),
                "balanced_accuracy": lambda w: statistics.balanced_accuracy(target, predicted, w),
            }
        truth = np.array([row["target"] for row in predictions], dtype=np.float64)
        value = np.array([row["prediction"] for row in predictions], dtype=np.float64)
        functions: dict[str, statistics.Statistic] = {
            "spearman": lambda w: statistics.spearman(truth, value, w),
            "mae": lambda w: statistics.mean(np.abs(truth - value), w),
        }
        if self.target == "real":
            functions["r2"] = lambda w: statistics.r_squared(truth, value, w)
        return clusters, functions

    def _dice_statistics(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, statistics.Statistic]]:
        """Return the Dice of each class and their mean, over subjects, as functions of weights."""
        names = self.config.classes[1:]
        functions: dict[str, statistics.Statistic] = {}
        clusters: Array = np.zeros(0)
        for score in ("dice", *map(metric_name, self.config.metric)):
            clusters, table = subject_scores(predictions, names, score)
            functions |= class_statistics(table, names, score)
        return clusters, functions


# Fits ---------------------------------------------------------------------------------------------


def fit_classifier(
    x: Array, y: Array, subjects: Array, classes: int, seed: int
) -> tuple[Callable[[Array], Array], float]:
    """Fit a multinomial logistic regression, with the L2 of least cross-validated log loss.

    Args:
        x: Standardised features (n, f).
        y: Class indices (n,).
        subjects: Subject code of each row, whose rows stay in one fold (n,).
        classes: Number of classes; one that the training part lacks gets probability 0.
        seed: Seed of the folds.

    Returns:
        Features to probabilities (m, classes), and the L2 strength.

    Raises:
        DataError: Train has one class only.
    """
    present = np.unique(y)
    if len(present) < 2:
        raise DataError(
            f"the training part has rows of one class only ({len(y)} rows): a probe needs two classes"
        )
    z, turn = _compact(x)
    losses = np.zeros(len(L2_CLASSES))
    rounds = list(_folds(subjects, y, seed))
    for chosen in rounds:
        held = ~chosen
        known = np.isin(y[held], np.unique(y[chosen]))
        for k, model in enumerate(_logistic_path(z[chosen], y[chosen], L2_CLASSES)):
            probability = np.clip(_spread(model, z[held], classes), 1e-7, 1.0)
            losses[k] -= np.log(probability[np.arange(len(probability)), y[held]])[known].mean()
    best = int(np.argmin(losses)) if rounds else L2_CLASSES.index(1.0)
    *_, model = _logistic_path(z, y, L2_CLASSES[: best + 1])
    return (lambda new: _spread(model, new @ turn, classes)), L2_CLASSES[best]


def fit_ridge(x: Array, y: Array, subjects: Array, seed: int) -> tuple[Callable[[Array], Array], float]:
    """Fit a ridge regression, with the L2 of least cross-validated squared error.

    Raises:
        DataError: Train has one value only.
    """
    from sklearn.linear_model import Ridge

    if len(y) < 2 or np.ptp(y) == 0:
        raise DataError(f"the training part has one target value only ({len(y)} rows): nothing to predict")
    z, turn = _compact(x)
    losses = np.zeros(len(L2_RIDGE))
    rounds = list(_folds(subjects, None, seed))
    for chosen in rounds:
        for k, l2 in enumerate(L2_RIDGE):
            model = Ridge(alpha=l2).fit(z[chosen], y[chosen])
            losses[k] += np.mean((model.predict(z[~chosen]) - y[~chosen]) ** 2)
    best = int(np.argmin(losses)) if rounds else L2_RIDGE.index(1.0)
    model = Ridge(alpha=L2_RIDGE[best]).fit(z, y)
    return (lambda new: model.predict(new @ turn)), L2_RIDGE[best]


def _folds(subjects: Array, y: Array | None, seed: int) -> list[Array]:
    """Return a mask of the rows to fit on per fold and round; none for fewer than four subjects."""
    people = np.unique(subjects)
    if len(people) < 4:
        return []
    masks = []
    for turn in range(ROUNDS):
        fold = statistics.grouped_folds(subjects, y, min(FOLDS, len(people)), (seed, turn))
        for k in range(int(fold.max()) + 1):
            chosen = fold != k
            if y is None or len(np.unique(y[chosen])) > 1:
                masks.append(chosen)
    return masks


def _compact(x: Array) -> tuple[Array, Array]:
    """Rotate the rows into a basis of their own span, where the same solution is found faster."""
    if x.shape[0] >= x.shape[1]:
        return x, np.eye(x.shape[1])
    _, singular, right = np.linalg.svd(x, full_matrices=False)
    spanned = singular > 1e-10 * max(singular[0], 1e-300)
    spanned[0] = True  # of features that never vary, one is left, and predicts the classes' shares
    turn = right[spanned].T
    return x @ turn, turn


def _logistic_path(x: Array, y: Array, strengths: Sequence[float]) -> Any:
    """Yield models of falling L2; each starts where the one before ended."""
    import copy
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    count = len(np.unique(y))
    # Newton's method needs a tenth of the time while its Hessian is small; its side is this product.
    small = x.shape[1] * (count if count > 2 else 1) <= 1024
    solver = "newton-cholesky" if small else "lbfgs"
    model = LogisticRegression(solver=solver, max_iter=300, tol=1e-4, warm_start=True)
    for l2 in strengths:
        model.C = 1.0 / l2
        with warnings.catch_warnings():
            # Nearly separable rows under weak L2 creep; cross-validation sees what that is worth.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, y)
        yield copy.deepcopy(model)


def _spread(model: Any, x: Array, classes: int) -> Array:
    """Predict probabilities with a column for every class, those the model has not seen at 0."""
    probability = np.zeros((len(x), classes))
    probability[:, model.classes_] = model.predict_proba(x) if len(x) else 0.0
    return probability


def _number(values: Array) -> float:
    return float(values[0])
