"""Records of results: one JSON file each, written whole and checked when read."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.checkpoint.card import versions
from ssl3d.errors import DataError, Ssl3dError, not_written
from ssl3d.evaluation.record_archive import find_record, record_bytes
from ssl3d.evaluation.record_types import check_parts
from ssl3d.files import write_whole
from ssl3d.json_files import parse_json, was_changed, with_digest

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection


FORMAT = 1

KINDS = ("encoder", "untrained", "trivial")

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
    """Record of a contestant, scored once on one split.

    Attributes:
        task: Name of the benchmark and kind of target.
        version: Version of the task.
        dataset: Names of the data sets.
        data_digest: Digest of the volumes, their labels and masks.
        split: Numbers of subjects and rows of each part, and how the split was made.
        split_digest: Digest of who is in which part.
        fraction: Share of the training subjects used.
        repeat: Number of the subset among those of that size.
        seed: Seed of the scoring.
        contestant: Description from `Contestant.described()`.
        settings: Options of the benchmark that change the score.
        main: Name of the score that ranks.
        scores: Scores by name.
        intervals: Ends [low, high] of the 95 % intervals, by name.
        predictions: Prediction of each row of the test set.
        compute: Pretraining steps and FLOPs where known, seconds of the probe.
        versions: Versions of Python and the packages that made the numbers.
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
    versions: dict[str, str] = field(default_factory=versions)
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
        """Name of the file in a folder of records."""
        slug = re.sub(r"[^A-Za-z0-9.=+-]+", "_", self.contestant["name"]).strip("_")[:80]
        part = "" if self.fraction == 1 else f"-f{self.fraction:g}-r{self.repeat:02d}"
        return f"{slug}{part}-{self.key[:8]}.json"


def write_result(result: Result, folder: Path) -> Path:
    """Write a record atomically, and return its path; what cannot be a number becomes null."""
    content = {"format": FORMAT, "key": result.key, **asdict(result)}
    validate_result(content, result.filename)
    path = folder / result.filename
    try:
        write_whole(path, _text(with_digest(_finite(content))))
    except OSError as error:
        raise not_written(error, f"cannot write {path}: {error.strerror}") from error
    return path


def _text(content: dict[str, Any]) -> str:
    """Format a record as JSON with one prediction a line; one number a line doubled the space of boxes."""
    rows = [json.dumps(row, allow_nan=False) for row in content["predictions"]]
    text = json.dumps({**content, "predictions": []}, indent=1, allow_nan=False)
    return (
        text.replace('"predictions": []', '"predictions": [' + ",".join(f"\n  {r}" for r in rows) + "]", 1)
        + "\n"
    )


def read_result(path: Path) -> Result:
    """Read a record, a file or one in an archive, such as `records.tar.xz/cardiac/simclr-0-1a2b3c4d.json`.

    Raises:
        DataError: The file is not a record, or one of a newer format; or the archive is damaged.
    """
    try:
        content = parse_json(record_bytes(Path(path)).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a result record: {error}") from error
    return result_of(content, str(path))


def result_of(content: Any, where: str) -> Result:
    """Check the content of a record's file, and return the record.

    Args:
        content: What the file holds, parsed from JSON.
        where: Path of the file, for messages.

    Raises:
        DataError: The content is no record, one of a newer format, or not what was written.
    """
    validate_result(content, where)
    if was_changed(content):  # records of earlier versions have no digest
        raise DataError(
            f"{where}: was changed after it was written (its digest differs): take an intact copy"
        )
    values = {key: value for key, value in content.items() if key not in ("format", "key", "digest")}
    try:
        values["scores"] = {k: math.nan if v is None else float(v) for k, v in values["scores"].items()}
        values["intervals"] = {
            k: tuple(math.nan if end is None else float(end) for end in v)
            for k, v in values["intervals"].items()
        }
    except (TypeError, ValueError) as error:  # a word where a number belongs
        raise DataError(f"{where}: not a result record: {error}") from error
    known = Result.__dataclass_fields__
    return Result(**{key: value for key, value in values.items() if key in known})


def find_result(result: Result, folder: Path) -> Result | None:
    """Return the record of the same key, if it was scored before and can be read.

    It is a file of the folder, or lies in the `records.tar.xz` of the folder or of the one above it.

    Raises:
        DataError: That archive is damaged.
    """
    path = find_record(result.filename, folder)
    if path is None:
        return None
    try:
        record = read_result(path)
    except Ssl3dError:  # cut short, or edited: it is scored again and replaced
        return None
    return record if record.key == result.key else None


def validate_result(content: Any, where: str) -> None:
    """Check the content of a record.

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
    check_parts(content, where)
    unknown = set(content["intervals"]) - set(content["scores"])
    if unknown:
        raise DataError(f"{where}: interval of {', '.join(sorted(unknown))} without a score")
    for name, ends in content["intervals"].items():
        if None not in ends and ends[0] > ends[1]:
            raise DataError(f"{where}: interval of {name} is {list(ends)}, expected [low, high]")
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


def _finite(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by null, and numpy's scalars by Python's."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
