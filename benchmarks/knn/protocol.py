"""Nearest neighbours: how far an encoder's features alone put like beside like, with nothing trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import DataError
from ssl3d_benchmarks.knn.config import KNNConfig
from ssl3d_benchmarks.linear_probe.protocol import LinearProbe

if TYPE_CHECKING:
    from ssl3d.api import Collection, Contestant

Array = NDArray[Any]


class KNN(LinearProbe):
    """The k nearest training rows vote, weighted by their similarity; nothing is fitted or chosen.

    Features are those of the linear probe, standardised on the training part and brought to length 1, so
    that similarity is a cosine. *classes*: the share of the votes is the probability. *ordinal*, *real*:
    the weighted mean of the neighbours' values. k and the temperature are fixed (20 and 0.07, k at most
    the training rows), so that there is nothing to tune and validation subjects are not used.

    Differs from the paper: features are standardised first, which embeddings of untrained and of
    regressing networks need for a cosine to mean anything; k is 20 for few rows, there 200 of ImageNet.
    """

    Config: ClassVar[type] = KNNConfig
    name = "knn"
    version = 1
    description = "the nearest training subjects in the frozen encoder's features vote: classes or values"
    reference = (
        "Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination, "
        "CVPR 2018, arXiv 1805.01978 (votes and temperature); DINO, arXiv 2104.14294 (k = 20)"
    )
    mains: ClassVar[Mapping[str, str]] = {"classes": "auc", "ordinal": "spearman", "real": "r2"}

    config: KNNConfig  # type: ignore[assignment]

    def _fit(
        self, contestant: Contestant, train: Collection, val: Collection, test: Collection, seed: int
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        x, y, _, _, _, x_test, y_test, about = self._standardised(contestant, train, val, test)
        config = self.config
        count = min(config.neighbours, len(x))
        details: dict[str, Any] = {"features": x.shape[1], "train_rows": len(x), "neighbours": count}
        temperature = config.temperature if config.weights == "similarity" else None
        if self.target == "classes":
            if len(np.unique(y)) < 2:
                raise DataError(
                    f"the training part has rows of one class only ({len(y)} rows): nothing to tell apart"
                )
            votes = np.eye(len(config.classes))[y]
            for row, target, shares in zip(
                about, y_test, neighbours_mean(x, votes, x_test, count, temperature), strict=True
            ):
                row["target"] = config.classes[int(target)]
                row["probability"] = [float(value) for value in shares]
        else:
            predicted = neighbours_mean(x, y[:, None], x_test, count, temperature)[:, 0]
            for row, target, value in zip(about, y_test, predicted, strict=True):
                row["target"], row["prediction"] = float(target), float(value)
        return about, details


def neighbours_mean(
    x: Array, values: Array, new: Array, count: int, temperature: float | None = 0.07
) -> Array:
    """Average the values of the nearest rows by cosine; of equally near rows, the first count.

    Args:
        x: Features of the bank (n, f).
        values: Values of the rows of the bank (n, v).
        new: Features of queries (m, f).
        count: Number of rows that count, at most n.
        temperature: Temperature of the weights exp(similarity / temperature); None for equal weights.

    Returns:
        Weighted means (m, v).

    Example:
        >>> bank, query = np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]]), np.array([[1.0, 0.0]])
        >>> neighbours_mean(bank, np.array([[4.0], [2.0], [9.0]]), query, count=2, temperature=None)
        array([[3.]])
    """
    count = min(count, len(x))
    similarity = _unit(new) @ _unit(x).T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    near = np.take_along_axis(similarity, nearest, axis=1)
    # Relative to the nearest: no overflow, whatever the temperature.
    weight = np.ones_like(near) if temperature is None else np.exp((near - near[:, :1]) / temperature)
    weight /= weight.sum(axis=1, keepdims=True)
    return np.asarray(np.einsum("mk,mkv->mv", weight, values[nearest]))


def _unit(x: Array) -> Array:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)
