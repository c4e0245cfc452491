"""Resolved options of nearest neighbours, as a record keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ssl3d_benchmarks.linear_probe.config import FrozenEncoderConfig

TARGETS = ("classes", "ordinal", "real")

WEIGHTS = ("similarity", "even")


def check_votes(neighbours: int, temperature: float) -> None:
    """Check that at least one neighbour votes, at a temperature above 0.

    Raises:
        ValueError: It does not.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours: {neighbours} must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} must be above 0")


@dataclass(frozen=True)
class KNNConfig(FrozenEncoderConfig):
    """Resolved options of nearest neighbours.

    Attributes:
        target: Kind of target to predict: classes, ordinal or real.
        classes: Names of the classes in the order of the probabilities.
        neighbours: Number of training rows that vote, at most as many as there are.
        temperature: Temperature of the votes; a neighbour of cosine similarity s counts
            exp(s / temperature).
        weights: Weighting of the votes: by similarity, or even.
    """

    neighbours: int = 20
    temperature: float = 0.07
    weights: str = "similarity"

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **FrozenEncoderConfig.choices,
        "target": TARGETS,
        "weights": WEIGHTS,
    }

    def __post_init__(self) -> None:
        """Check the value of every field."""
        super().__post_init__()
        check_votes(self.neighbours, self.temperature)
