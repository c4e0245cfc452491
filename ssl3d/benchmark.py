"""The benchmark interface: an encoder in, numbers out; and the JSON record that every number is kept in."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ssl3d.errors import DataError, Ssl3dError, UsageError
from ssl3d.statistics import RESAMPLES, Array, Statistic, interval

if TYPE_CHECKING:
    from ssl3d.data.store import Collection
    from ssl3d.encoder import Encoder

FORMAT = 1
KINDS = ("encoder", "untrained", "trivial")


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
        volumes_seen: Hashes of the files and voxels that pretraining saw (`ssl3d.leaks`); None: not known.
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
        """Every score as a function of resampling weights (see `ssl3d.statistics`), and the clusters.

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

REQUIRED: Mapping[str, type | tuple[type, ...]] = {
    "format": int,
    "key": str,
    "task": str,
    "version": int,
    "dataset": (str, list),
    "data_digest": str,
    "split": dict,
    "split_digest": str,
    "fraction": (int, float),
    "repeat": int,
    "seed": int,
    "contestant": dict,
    "settings": dict,
    "main": str,
    "scores": dict,
    "intervals": dict,
    "predictions": list,
    "compute": dict,
    "versions": dict,
    "flags": dict,
}
"""What every record has, and of which type."""


@dataclass
class Result:
    """One record: a contestant, scored once on one split.

    Attributes:
        task: Benchmark and kind of target.
        version: Of the task.
        dataset: Names of the data sets.
        data_digest: Of the volumes, their labels and masks.
        split: Numbers of subjects and rows of each part, and how the split was made.
        split_digest: Of who is in which part.
        fraction: Of the training subjects used.
        repeat: Which of the subsets of that size.
        seed: Of the scoring.
        contestant: `Contestant.described()`.
        settings: Options of the benchmark that change the score.
        main: Name of the score that ranks.
        scores: By name.
        intervals: 95 %, by name, [low, high].
        predictions: Per row of the test set.
        compute: Pretraining steps and FLOPs where known, seconds of the probe.
        versions: Of Python and the packages that made the numbers.
        flags: `seen_test_subjects` (count), `saw_labels`, `ranked`, and notes.
    """

    task: str
    version: int
    dataset: list[str]
    data_digest: str
    split: dict[str, Any]
    split_digest: str
    fraction: float
    repeat: int
    seed: int
    contestant: dict[str, Any]
    settings: dict[str, Any]
    main: str
    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    compute: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of everything that decides the scores: the same key, the same result."""
        parts = [self.task, self.version, self.data_digest, self.split_digest, self.fraction, self.repeat]
        parts += [self.seed, self.contestant["name"], self.contestant["digest"], self.settings]
        parts += [self.contestant["group"], self.contestant["kind"]]
        text = json.dumps(_finite(parts), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def filename(self) -> str:
        """Its name in a folder of records."""
        slug = re.sub(r"[^A-Za-z0-9.=+-]+", "_", self.contestant["name"]).strip("_")[:80]
        part = "" if self.fraction == 1 else f"-f{self.fraction:g}-r{self.repeat:02d}"
        return f"{slug}{part}-{self.key[:8]}.json"


def write_result(result: Result, folder: Path) -> Path:
    """Writes a record atomically, and returns where; what cannot be a number becomes null."""
    content = {"format": FORMAT, "key": result.key, **asdict(result)}
    validate_result(content, result.filename)
    path = folder / result.filename
    partial = path.with_suffix(f".partial{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(_text(_finite(content)), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return path


def _text(content: dict[str, Any]) -> str:
    """As JSON, a prediction on a line: with a number on a line, boxes took twice the space."""
    rows = [json.dumps(row, allow_nan=False) for row in content["predictions"]]
    text = json.dumps({**content, "predictions": []}, indent=1, allow_nan=False)
    return (
        text.replace('"predictions": []', '"predictions": [' + ",".join(f"\n  {r}" for r in rows) + "]", 1)
        + "\n"
    )


def read_result(path: Path) -> Result:
    """Reads a record.

    Raises:
        DataError: The file is not a record, or one of a newer format.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a result record: {error}") from error
    validate_result(content, str(path))
    values = {key: value for key, value in content.items() if key not in ("format", "key")}
    values["scores"] = {k: math.nan if v is None else float(v) for k, v in values["scores"].items()}
    values["intervals"] = {
        k: tuple(math.nan if end is None else float(end) for end in v)
        for k, v in values["intervals"].items()
    }
    known = Result.__dataclass_fields__
    return Result(**{key: value for key, value in values.items() if key in known})


def find_result(result: Result, folder: Path) -> Result | None:
    """The record of the same key in the folder, if it was scored before and can be read."""
    path = folder / result.filename
    if not path.is_file():
        return None
    try:
        found = read_result(path)
    except Ssl3dError:  # cut short, or edited: it is scored again and replaced
        return None
    return found if found.key == result.key else None


def validate_result(content: Any, where: str) -> None:
    """Checks a record's content.

    Raises:
        DataError: A key is missing or of another type, the format is newer than this code, `main` is not
            among the scores, or an interval does not hold its score.
    """
    if not isinstance(content, dict):
        raise DataError(f"{where}: not a result record (a JSON object)")
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise DataError(
            f"{where}: record format {content['format']}, this ssl3d reads up to {FORMAT}: update ssl3d"
        )
    for key, kind in REQUIRED.items():
        if key not in content:
            raise DataError(f"{where}: not a result record: no {key!r}")
        if not isinstance(content[key], kind):
            raise DataError(f"{where}: {key!r} is a {type(content[key]).__name__}")
    if content["main"] not in content["scores"]:
        raise DataError(f"{where}: main score {content['main']!r} is not among the scores")
    unknown = set(content["intervals"]) - set(content["scores"])
    if unknown:
        raise DataError(f"{where}: interval of {', '.join(sorted(unknown))} without a score")
    for name, ends in content["intervals"].items():
        if len(ends) != 2 or (None not in ends and ends[0] > ends[1]):
            raise DataError(f"{where}: interval of {name} is {list(ends)}, expected [low, high]")
    for row in content["predictions"]:
        if not isinstance(row, dict) or not {"dataset", "subject"} <= set(row):
            raise DataError(f"{where}: a prediction without dataset and subject")
    if not {"name", "kind", "digest"} <= set(content["contestant"]):
        raise DataError(f"{where}: the contestant lacks name, kind or digest")


def split_digest(collection: Collection, parts: Sequence[str]) -> str:
    """Hash of who is in which part: (data set, subject, id, part) of every row, in any order."""
    rows = sorted(
        f"{dataset}\t{subject}\t{name}\t{part}"
        for dataset, subject, name, part in zip(
            collection.datasets, collection.subjects, collection.ids, parts, strict=True
        )
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for package in ("ssl3d", "torch", "numpy", "scipy", "scikit-learn"):
        try:
            found[package] = installed_version(package)
        except PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead; numpy's scalars as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
