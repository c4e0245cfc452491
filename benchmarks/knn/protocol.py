"""Nearest neighbours: how far an encoder's features alone put like beside like, with nothing trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import DataError
from ssl3d_benchmarks.linear_probe.config import POOLING
from ssl3d_benchmarks.linear_probe.protocol import LinearProbe

if TYPE_CHECKING:
    from ssl3d.api import Collection, Contestant

Array = NDArray[Any]

TARGETS = ("classes", "ordinal", "real")
WEIGHTS = ("similarity", "even")


@dataclass(frozen=True)
class KNNConfig:
    """Which neighbours count, and how much.

    Attributes:
        target: classes, ordinal or real.
        classes: Names of the classes in the order of the probabilities.
        pool_subject: What several volumes of a subject become: one row each (none), the mean of their
            features, or their features side by side (concat).
        window: Largest input of the encoder along D H W; a larger volume is taken window by window.
        precision: Of the frozen encoder, 32 or bf16.
        mask_classes: Mask values that the trivial rows measure; empty: thresholded voxels.
        neighbours: How many training rows are looked at, at most as many as there are.
        temperature: A neighbour of cosine similarity s counts exp(s / temperature).
        weights: similarity as above, or even.
    """

    target: str = "classes"
    classes: tuple[str, ...] = ()
    pool_subject: str = "none"
    window: tuple[int, int, int] = (128, 256, 256)
    precision: str = "32"
    mask_classes: tuple[int, ...] = ()
    neighbours: int = 20
    temperature: float = 0.07
    weights: str = "similarity"

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, allowed in (
            ("target", TARGETS),
            ("pool_subject", POOLING),
            ("precision", ("32", "bf16")),
            ("weights", WEIGHTS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if len(self.window) != 3 or min(self.window) < 1:
            raise ValueError(f"window: expected three sizes from 1, got {self.window}")
        if self.target == "classes" and len(set(self.classes)) < 2:
            raise ValueError(f"classes: needs two, got {list(self.classes)}")
        if self.neighbours < 1:
            raise ValueError(f"neighbours: {self.neighbours}; at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}; must be above 0")


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
            found = neighbours_mean(x, y[:, None], x_test, count, temperature)[:, 0]
            for row, target, value in zip(about, y_test, found, strict=True):
                row["target"], row["prediction"] = float(target), float(value)
        return about, details


def neighbours_mean(
    x: Array, values: Array, new: Array, count: int, temperature: float | None = 0.07
) -> Array:
    """Weighted mean of the values of the nearest rows by cosine; of equally near ones, the first.

    Args:
        x: Features of the bank (n, f).
        values: Of its rows (n, v).
        new: Features of queries (m, f).
        count: Rows that count, at most n.
        temperature: Of the weights exp(similarity / temperature); None for equal weights.

    Returns:
        (m, v).
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
