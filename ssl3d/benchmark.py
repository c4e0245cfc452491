"""The benchmark interface: an encoder in, numbers out; and the JSON record that every number is kept in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ssl3d.evaluation.records import KINDS
from ssl3d.evaluation.statistics.intervals import RESAMPLES, interval
from ssl3d.evaluation.statistics.metrics import Array, Statistic

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection
    from ssl3d.encoder import Encoder


@dataclass
class Contestant:
    """Who is scored.

    Attributes:
        name: As shown in the table and in the record.
        kind: `encoder` (given by the user), `untrained` (the same architecture, random weights) or
            `trivial` (a row without a network that any network has to beat).
        digest: Hash of the weights and the architecture, or the name and version of a trivial row.
        encoder: The network, in evaluation mode; None for a trivial row.
        group: Name of the encoder that an `untrained` row stands beside, else empty.
        source: Where the encoder came from: a path as given, or `scratch:...`.
        architecture: Name and configuration of the encoder.
        pretraining: What the checkpoint says of its training: proxies, steps, compute, data digest.
        identities: Hashes of the subjects that pretraining saw.
        volumes_seen: Hashes of the files and voxels that pretraining saw (`ssl3d.evaluation.leaks`); None
            where they are not known.
        saw_labels: Whether pretraining saw labels.
        volumes_complete: Whether `volumes_seen` has all of them.
        details: Whatever else belongs in the record (the seed of random weights, recalibration).
    """

    name: str
    kind: str
    digest: str
    encoder: Encoder | None = None
    group: str = ""
    source: str = ""
    architecture: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    identities: frozenset[str] = frozenset()
    volumes_seen: frozenset[str] | None = None
    saw_labels: bool = False
    volumes_complete: bool = True
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses an unknown kind."""
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is none of {', '.join(KINDS)}")

    def described(self) -> dict[str, Any]:
        """What a record keeps of it; the identities stay in the checkpoint."""
        plain = {key: getattr(self, key) for key in ("name", "kind", "digest", "group", "source")}
        return {
            **plain,
            "architecture": self.architecture,
            "pretraining": self.pretraining,
            "identities_seen": len(self.identities),
            "hashes_seen": None if self.volumes_seen is None else len(self.volumes_seen),
            "hashes_complete": self.volumes_complete,
            "saw_labels": self.saw_labels,
            **self.details,
        }


@dataclass
class Scores:
    """What a benchmark says of a contestant.

    Attributes:
        scores: By name; `main` of the benchmark among them.
        intervals: 95 % interval of each score, (low, high), over the test subjects.
        predictions: One entry per row of the test set, with `dataset`, `subject` and what the scores are
            computed from; enough to compute them again.
        details: What was chosen on the way (the L2 strength, say).
        seconds: Time spent.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    predictions: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Benchmark(ABC):
    """A protocol. One file, one class, registered under the entry-point group `ssl3d.benchmarks`.

    Records name it, and `ssl3d leaderboard report` finds it by that name to draw its intervals anew. A
    suite's tasks may be scored by it where a command of the same name (`ssl3d.commands`) takes the options
    of `ssl3d knn`: the encoders, --data, --out, --untrained.

    Attributes:
        Config: A dataclass of options that checks itself in `__post_init__`.
        name: As registered.
        version: Raised whenever the same contestant on the same data would get another score.
        description: One line: what is measured and how.
        reference: Where the protocol comes from.
        mains: Kind of target that this benchmark takes -> the score that ranks contestants, higher being
            better.
    """

    Config: ClassVar[type]
    name: ClassVar[str]
    version: ClassVar[int]
    description: ClassVar[str]
    reference: ClassVar[str]
    mains: ClassVar[Mapping[str, str]]

    config: Any
    target: str

    def __init__(self, config: Any) -> None:
        """Keeps the configuration."""
        self.config = config

    @property
    def main(self) -> str:
        """The score that ranks contestants."""
        return self.mains[self.target]

    @property
    def task(self) -> str:
        """Name of the task, as records have it: the benchmark's name and the kind of target."""
        return f"{self.name}/{self.target}"

    @property
    def task_version(self) -> int:
        """Return the version that records have: the class's, or a later one where options ask for it."""
        return self.version

    def value(self, predictions: Sequence[Mapping[str, Any]]) -> float:
        """Return the main score alone, without resampling; NaN of no predictions."""
        if not predictions:
            return float("nan")
        clusters, found = self.score_functions(predictions)
        return float(found[self.main](np.ones((1, len(clusters))))[0])

    @abstractmethod
    def score(
        self, contestant: Contestant, train: Collection, val: Collection, test: Collection, seed: int
    ) -> Scores:
        """Fits on `train`, chooses on `train` and `val`, scores on `test`.

        Everything random follows from `seed`; the same arguments give the same scores.
        """

    @abstractmethod
    def score_functions(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, Statistic]]:
        """Return every score as a function of resampling weights, and the clusters.

        See `ssl3d.evaluation.statistics` for such functions.

        Args:
            predictions: As `score` gives them, of several folds perhaps.

        Returns:
            Per row of the weights, the subject it belongs to; and per score its statistic.
        """

    def prepare(self, contestant: Contestant, data: Collection) -> None:
        """Computes once what every `score` of this contestant needs, such as its features; optional."""
        return

    def summarise(self, predictions: list[dict[str, Any]], resamples: int = RESAMPLES) -> Scores:
        """Scores and their intervals over the test subjects, from predictions."""
        clusters, statistics = self.score_functions(predictions)
        found = {name: interval(value, clusters, resamples=resamples) for name, value in statistics.items()}
        return Scores(
            {name: one.value for name, one in found.items()},
            {name: (one.low, one.high) for name, one in found.items()},
            predictions,
        )


# Records ------------------------------------------------------------------------------------------
