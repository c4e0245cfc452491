"""The benchmark interface: an encoder in, numbers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ssl3d.evaluation.records import KINDS
from ssl3d.evaluation.statistics.intervals import RESAMPLES, class_support, interval, why_no_interval
from ssl3d.evaluation.statistics.metrics import Array, Statistic, bounds_of

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection
    from ssl3d.encoder import Encoder
    from ssl3d.model import Model


@dataclass
class Contestant:
    """Contestant of a benchmark: an encoder, or a trivial row beside encoders.

    Attributes:
        name: Name in the table and in the record.
        kind: Kind: `encoder` (given by the user), `untrained` (the same architecture, random weights) or
            `trivial` (a row without a network that any network has to beat).
        digest: Hash of the weights and the architecture, or the name and version of a trivial row.
        encoder: Network in evaluation mode; None for a trivial row.
        group: Name of the encoder that an `untrained` row stands beside, else empty.
        source: Words that name the encoder: a path as given, or `scratch:...`.
        architecture: Name and configuration of the encoder.
        pretraining: Record of its training in the checkpoint: proxies, steps, compute, data digest.
        identities: Hashes of the subjects that pretraining saw.
        volumes_seen: Hashes of the files and voxels that pretraining saw (`ssl3d.evaluation.leaks`); None
            where they are not known.
        saw_labels: Whether pretraining saw labels.
        volumes_complete: Whether `volumes_seen` has all of them.
        details: Further entries of the record (the seed of random weights, recalibration).
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
        """Refuse a kind that is not known."""
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is none of {', '.join(KINDS)}")

    def described(self) -> dict[str, Any]:
        """Return what a record keeps of the contestant; the identities stay in the checkpoint."""
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
    """Scores of a contestant in a benchmark.

    Attributes:
        scores: Scores by name, the benchmark's `main` among them.
        intervals: 95 % interval (low, high) of each score over the test subjects.
        predictions: Entries of the rows of the test set, with `dataset`, `subject` and what the scores are
            computed from; enough to compute them again.
        details: Choices made on the way, such as the L2 strength.
        seconds: Seconds that the scoring took.
    """

    scores: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    predictions: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Benchmark(ABC):
    """Protocol of a benchmark: one file, one class, registered under the entry points `ssl3d.benchmarks`.

    Records name it, and `ssl3d leaderboard report` finds it by that name to draw its intervals anew. A
    suite's tasks may be scored by it where a command of the same name (`ssl3d.commands`) takes the options
    of `ssl3d knn`: the encoders, --data, --out, --untrained.

    Attributes:
        Config: Dataclass of options, which checks itself in `__post_init__`.
        name: Name under which the benchmark is registered.
        version: Number that rises whenever the same contestant on the same data would get another score.
        description: Line that says what is measured and how.
        reference: Source of the protocol.
        mains: Score that ranks contestants, higher being better, for each kind of target.
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
        """Keep the configuration of the benchmark."""
        self.config = config

    @property
    def main(self) -> str:
        """Score that ranks the contestants."""
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
        clusters, statistics = self.score_functions(predictions)
        return float(statistics[self.main](np.ones((1, len(clusters))))[0])

    @abstractmethod
    def score(
        self, contestant: Contestant, train: Collection, val: Collection, test: Collection, seed: int
    ) -> Scores:
        """Score a contestant: fit on `train`, choose on `train` and `val`, score on `test`.

        Everything random follows from `seed`; the same arguments give the same scores.
        """

    @abstractmethod
    def score_functions(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, Statistic]]:
        """Return every score as a function of resampling weights, and the clusters.

        See `ssl3d.evaluation.statistics` for such functions.

        Args:
            predictions: Predictions of `score`, of one fold or several.

        Returns:
            Per row of the weights, the subject it belongs to; and per score its statistic.
        """

    @classmethod
    def restore(cls, encoder: Encoder, card: dict[str, Any]) -> Model:
        """Build a model that the benchmark kept, with new weights, for `ssl3d.load_model`; optional.

        Args:
            encoder: Encoder of the model's architecture.
            card: Content of `model.json`.

        Raises:
            ValueError: The benchmark keeps no models, or the card is not one of its own.
        """
        raise ValueError(f"the benchmark {cls.name} keeps no models")

    def prepare(self, contestant: Contestant, data: Collection) -> None:
        """Prepare once what every `score` of this contestant needs, such as its features; optional."""
        return

    def summarise(self, predictions: list[dict[str, Any]], resamples: int = RESAMPLES) -> Scores:
        """Summarise predictions as scores and their intervals over the test subjects.

        Where a class has too few of them, the ends of every interval are NaN.
        """
        clusters, statistics = self.score_functions(predictions)
        intervals = {
            name: interval(value, clusters, resamples=resamples, bounds=bounds_of(name))
            for name, value in statistics.items()
        }
        few = bool(why_no_interval(class_support(predictions), 0.0))
        unknown = (float("nan"), float("nan"))
        return Scores(
            {name: score.value for name, score in intervals.items()},
            {name: unknown if few else (score.low, score.high) for name, score in intervals.items()},
            predictions,
        )
