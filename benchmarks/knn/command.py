"""`ssl3d knn`: a frozen encoder's neighbours vote, with the rows they have to be read beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ssl3d.api import parse
from ssl3d_benchmarks.knn.config import TARGETS, WEIGHTS, check_votes
from ssl3d_benchmarks.linear_probe.options import FrozenEncoderOptions

summary = (
    "score frozen encoders: nearest neighbours of classes or values, beside untrained and trivial rows"
)

EPILOG = """Features, splits, records and table are those of `ssl3d linear-probe`; nothing is fitted.
Records are reused: the same contestant on the same split with the same options is not scored again."""


@dataclass(frozen=True)
class KNNOptions(FrozenEncoderOptions):
    """Score frozen encoders by the labels of the nearest training subjects.

    Attributes:
        neighbours: Number of training rows that vote, at most as many as there are.
        temperature: Temperature of the votes; a neighbour of cosine similarity s counts
            exp(s / temperature).
        weights: Weighting of the votes: by similarity, or even.
    """

    out: Path = Path("runs/knn")
    neighbours: int = 20
    temperature: float = 0.07
    weights: str = "similarity"

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **FrozenEncoderOptions.choices,
        "target": ("auto", *TARGETS),
        "weights": WEIGHTS,
    }

    def __post_init__(self) -> None:
        """Check the value of every field."""
        super().__post_init__()
        check_votes(self.neighbours, self.temperature)


def main(argv: Sequence[str]) -> int:
    """Run the command `ssl3d knn`."""
    options = parse("ssl3d knn", KNNOptions, argv, epilog=EPILOG).options
    from ssl3d_benchmarks.knn.protocol import KNN
    from ssl3d_benchmarks.linear_probe.run import run

    run(options, KNN)
    return 0
