"""Records of a folder as tables: what can be compared stands together, what cannot is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import (
    DataError,
    Result,
    Ssl3dError,
    UsageError,
    parse_json,
    read_yaml,
    record_bytes,
    record_files,
    result_of,
    statistics,
)

Array = NDArray[Any]

SAME = 1e-3
"""Scores of one record made twice may differ by so much: half precision on another number of threads."""
KINDS = ("pretrained", "imagenet", "scratch", "trivial", "published")
FAMILIES = {
    "masks": "segmentation",
    "segmentation": "segmentation",
    "detection": "detection",
    "boxes": "detection",
    "real": "regression",
}
"""Kind of target -> the tasks it is averaged with; all others are classification."""
ON_THE_WAY = re.compile(r"[/\\][A-Za-z]\w*-at-(\d+)")
APART = ("fractions", "rates", "training", "preset", "seed", "annotated")
RECIPE = ("batch_size", "optimizer", "lr", "init")
"""What of a pretraining tells contestants apart; old records say nothing of it."""
SEED = re.compile(r"[-_](?:seed)?(\d+)$")


ODD = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
"""What reading a record of odd content may raise; it is refused by name, and ends no report."""


@dataclass(frozen=True)
class Refused:
    """A file or a record that is in no table.

    Attributes:
        where: File, below the folder of the records.
        who: Name of the contestant, or an empty string.
        why: Reason in one line.
    """

    where: str
    who: str
    why: str


@dataclass(frozen=True)
class Scorer:
    """What tables need of the predictions of a record.

    Attributes:
        clusters: Subject of every row, as a number (N,).
        functions: Scores by name, as functions of resampling weights (R, N).
        support: Number of test subjects of each class; empty where there are no classes.
        volumes: Number of volumes, and a hash of which they are.
    """

    clusters: Array
    functions: dict[str, statistics.Statistic]
    support: Mapping[str, int]
    volumes: str


@dataclass(frozen=True)
class ReadRecord:
    """A record as it was read, and what it says of its contestant.

    Attributes:
        path: File of the record.
        where: The same file, below the folder of the records.
        result: Content of the record. `release_predictions` empties its predictions, which are most of it.
    """

    path: Path
    where: str
    result: Result

    @cached_property
    def scorer(self) -> Scorer:
        """What tables need of the predictions.

        Raises:
            Ssl3dError: The protocol is not installed, or its predictions are not its own.
        """
        rows = self.result.predictions
        # In an order that is the same for all contestants.
        ordered = sorted(rows, key=lambda p: (p["dataset"], p["subject"], str(p.get("id"))))
        clusters, functions = score_functions(self.result, ordered)
        codes = np.unique(clusters, return_inverse=True)[1].ravel()
        return Scorer(codes, functions, statistics.class_support(rows), _volumes(rows))

    def release_predictions(self) -> None:
        """Keep `scorer` in place of the predictions: thousands of records fit into memory."""
        assert self.scorer
        self.result.predictions = []

    @cached_property
    def kind(self) -> str:
        """Kind of the contestant: one of `KINDS`, never published."""
        who = self.result.contestant
        if who["kind"] in ("trivial", "untrained"):
            return "trivial" if who["kind"] == "trivial" else "scratch"
        source = str(who.get("source", ""))
        if self.proxies or self.steps:
            return "pretrained"
        converted = who.get("architecture", {}).get("name") == "converted"
        if source.startswith("imagenet:") or converted:
            return "imagenet"
        return "pretrained"

    @property
    def pretraining(self) -> Mapping[str, Any]:
        """What the checkpoint said of its training."""
        pretraining = self.result.contestant.get("pretraining")
        return pretraining if isinstance(pretraining, Mapping) else {}

    @property
    def proxies(self) -> list[str]:
        """Names of the proxies of pretraining."""
        return list(self.pretraining.get("proxies") or {})

    @property
    def steps(self) -> int:
        """Optimizer steps of the pretraining."""
        return int(self.pretraining.get("steps") or 0)

    @property
    def share(self) -> int | None:
        """Percent of the budget after which an encoder on the way was saved; None for finished ones."""
        who = self.result.contestant
        match = ON_THE_WAY.search(str(who["name"])) or ON_THE_WAY.search(str(who.get("source", "")))
        return int(match[1]) if match else None

    @property
    def recalibrated(self) -> bool:
        """Whether its norm statistics were taken anew."""
        return bool(self.result.contestant.get("norm_recalibrated"))

    @cached_property
    def stem(self) -> str:
        """Name without folder, seed and what was done to its norms."""
        name = str(self.result.contestant["name"]).partition(",")[0]
        return name if self.kind != "pretrained" else self._without_seed(name)

    def _without_seed(self, name: str) -> str:
        """Return the last part of a path without the seed of pretraining, where it ends in that."""
        parts = [part for part in re.split(r"[/\\]", name) if part and part != "encoder"]
        if len(parts) > 1 and ON_THE_WAY.search("/" + parts[-1]):
            parts.pop()
        if not parts:
            return name
        match, seed = SEED.search(parts[-1]), self.pretraining.get("seed")
        # simclr-16 can be a batch size; records that know no seed were all named by it.
        its_seed = match is not None and (seed is None or int(match[1]) == seed)
        return parts[-1][: match.start()] if match and its_seed else parts[-1]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Recipe of its pretraining beside what `arm` has, as far as the record says: old ones say less."""
        if self.kind != "pretrained" or "batch_size" not in self.pretraining:
            return {}
        recipe = {key: self.pretraining[key] for key in RECIPE if key in self.pretraining}
        if isinstance(recipe.get("init"), Mapping):
            start = str(recipe["init"].get("from", ""))
            # Every seed may start from a run of its own seed.
            if not start.startswith(("imagenet:", "scratch:")):
                start = self._without_seed(start)
            recipe["init"] = {"from": start, "steps": recipe["init"].get("steps")}
        return recipe

    @cached_property
    def arm(self) -> tuple[Any, ...]:
        """What is the same for the seeds of one contestant, but for its recipe."""
        who = self.result.contestant
        same = {key: self.pretraining.get(key) for key in ("proxies", "steps", "patch")}
        # Which volumes they were, the digest says; how they were chosen, old records do not.
        data = self.pretraining.get("data") or {}
        same["data"] = {key: value for key, value in data.items() if key != "chosen_by"}
        decoded = bool(who.get("decoder"))
        about = [
            self.kind,
            who.get("group"),
            self.recalibrated,
            who.get("pool"),
            decoded,
            self.share,
            self.stem,
        ]
        if self.kind == "scratch":
            about[-1] = ""
        if self.kind == "imagenet":
            about.append(who["digest"])
        return (*about, json.dumps(same, sort_keys=True, default=str) if self.kind == "pretrained" else "")

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that were tried; none where a protocol has none."""
        return tuple(self.result.settings.get("rates") or ())

    @property
    def seconds(self) -> float | None:
        """Wall time of its pretraining in seconds; None where the checkpoint does not have it."""
        compute = self.pretraining.get("compute") or {}
        seconds = compute.get("seconds") or self.pretraining.get("seconds")
        return float(seconds) if seconds else None

    @property
    def peak_memory(self) -> float | None:
        """Peak memory of its pretraining in bytes; None where the checkpoint does not have it."""
        memory = (self.pretraining.get("compute") or {}).get("peak_memory")
        return float(memory) if memory else None

    def flops(self) -> float | None:
        """Return the training FLOPs of the pretraining up to here."""
        compute = self.pretraining.get("compute") or {}
        per_step = compute.get("flops_per_step")
        if per_step:  # old checkpoints on the way hold the whole run's sum
            return float(per_step) * self.steps + float(compute.get("flops_between_epochs") or 0)
        total = compute.get("flops") or self.pretraining.get("flops")
        return float(total) if total else None

    @cached_property
    def curve(self) -> list[tuple[int, float]]:
        """Steps of fine-tuning and the validation score at each, those of all folds."""
        details = self.result.compute.get("details")
        folds = details if isinstance(details, list) else [details]
        points = [point for fold in folds if isinstance(fold, Mapping) for point in fold.get("curve") or ()]
        scores = [(int(point["step"]), point.get("score")) for point in points]
        return [(step, float(score)) for step, score in scores if score is not None and np.isfinite(score)]

    def read_all(self) -> None:
        """Read all that a report asks of the record, so that what is odd in it shows at once."""
        for name in (
            "proxies",
            "steps",
            "share",
            "recalibrated",
            "stem",
            "arm",
            "rates",
            "seconds",
            "curve",
        ):
            hash(str(getattr(self, name)))
        self.flops()


def contestants_of(rows: Iterable[ReadRecord]) -> list[list[ReadRecord]]:
    """Group records by contestant; its seeds, subsets and repetitions stay together.

    Trained at other learning rates it is another: of one seed at two rates, one would stand for both.
    A record that is too old to tell its whole recipe goes with those that do, where those that agree with
    what it tells all have the same.
    """
    alike: dict[Any, dict[str, list[ReadRecord]]] = {}
    for record in rows:
        recipe = json.dumps(record.recipe, sort_keys=True, default=str)
        alike.setdefault((record.arm, record.rates), {}).setdefault(recipe, []).append(record)
    contestants: list[list[ReadRecord]] = []
    for by_recipe in alike.values():
        groups: list[list[ReadRecord]] = []
        for same in sorted(by_recipe.values(), key=lambda group: -len(group[0].recipe)):
            known = same[0].recipe
            fuller = [
                group
                for group in groups
                if len(known) < len(group[0].recipe) and known.items() <= group[0].recipe.items()
            ]
            if len(fuller) == 1:
                fuller[0].extend(same)
            else:
                groups.append(same)
        contestants += groups
    return contestants


@dataclass
class Table:
    """What can be compared: one task on one split of one data set with the same settings.

    Attributes:
        task: Name of the task in the records.
        version: Version of the task.
        dataset: Names of the data sets.
        settings: Settings of the protocol that all rows share.
        main: Name of the score that ranks.
        rows: Records of the table.
        published: Published numbers for this data set, to read beside; never ranked, never tested.
        number: Number among the tables of the same title, from 1; 0 where there is one.
        differs: Settings in which tables of the same title differ, in words.
    """

    task: str
    version: int
    dataset: tuple[str, ...]
    settings: dict[str, Any]
    main: str
    rows: list[ReadRecord]
    published: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0
    differs: str = ""

    @property
    def protocol(self) -> str:
        """Name of the protocol, such as linear-probe."""
        return self.task.partition("/")[0].partition("-segmentation")[0].partition("-classification")[0]

    @property
    def target(self) -> str:
        """Kind of the task's target."""
        return self.task.partition("/")[2]

    @property
    def family(self) -> str:
        """Tasks that are averaged together: segmentation, classification, detection, regression."""
        for word in (self.target, self.task.partition("/")[0].rpartition("-")[2]):
            if word in FAMILIES:
                return FAMILIES[word]
        return "classification"

    @property
    def slices(self) -> int:
        """Annotated slices per volume that were trained on; 0 for all."""
        task = self.settings.get("task")
        return int(task.get("sparse_slices") or 0) if isinstance(task, Mapping) else 0

    @property
    def but_for_slices(self) -> str:
        """What tables have in common that differ in the number of annotated slices alone."""
        settings = {key: value for key, value in self.settings.items() if key not in APART[:1]}
        if isinstance(settings.get("task"), Mapping):
            hidden = ("sparse_slices", "annotated")
            settings["task"] = {k: v for k, v in settings["task"].items() if k not in hidden}
        about = [self.task, self.version, self.dataset, self.main, settings]
        return json.dumps(about, sort_keys=True, default=str)

    @property
    def title(self) -> str:
        """Name of the table for people."""
        number = f" ({self.number})" if self.number else ""
        sparse = f", {self.annotated}" if self.slices else ""
        return f"{', '.join(self.dataset)}: {self.task.replace('/', ', ')}{sparse}{number}"

    @property
    def annotated(self) -> str:
        """Number of annotated slices in words; empty for all."""
        return f"{self.slices} annotated slice{'s' * (self.slices > 1)} a volume" if self.slices else ""

    @property
    def slug(self) -> str:
        """Name for links and files."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Records:
    """Records of a folder, as tables.

    Attributes:
        tables: Tables, sorted by task and data set.
        refused: Files and records that are in none of them, and why.
        files: Number of JSON files looked at.
    """

    tables: list[Table]
    refused: list[Refused]
    files: int


def read_records(folders: Sequence[Path], published: Sequence[Path] = ()) -> Records:
    """Read all records below some folders, or in archives of them.

    Raises:
        UsageError: A folder or an archive is missing, or holds no record; a file of published numbers
            cannot be read.
    """
    refused: list[Refused] = []
    by_key: dict[str, ReadRecord] = {}
    files = 0
    for folder in folders:
        for path in record_files(folder):
            files += 1
            below = path.relative_to(folder) if len(folders) == 1 and path != folder else path
            _read_one(path, below.as_posix(), by_key, refused)
    records = list(by_key.values())
    if not records:
        why = f" ({refused[0].where}: {refused[0].why})" if refused else ""
        raise UsageError(f"{' '.join(map(str, folders))}: no record of a benchmark{why}")
    tables = _tables(records, refused)
    _number(tables)
    for path in published:
        _add_published(tables, path)
    return Records(tables, refused, files)


def _tables(records: Sequence[ReadRecord], refused: list[Refused]) -> list[Table]:
    """Put together the records that can be compared, and refuse the others by name."""
    tables: list[Table] = []
    trained: dict[tuple[str, ...], list[int]] = {}
    loose: dict[tuple[str, ...], list[int]] = {}
    for number, record in enumerate(records):
        if _loose(record):
            loose.setdefault(_base_key(record.result), []).append(number)
        else:
            trained.setdefault(_table_key(record), []).append(number)
    for key in sorted(trained):
        same = sorted(trained[key] + loose.get(key[:-1], []))
        kept = _comparable([records[number] for number in same], refused)
        if kept:
            first = next(record.result for record in kept if not _loose(record))
            settings = {k: v for k, v in first.settings.items() if k not in ("fractions", "rates")}
            tables.append(
                Table(first.task, first.version, tuple(first.dataset), settings, first.main, kept)
            )
    placed = {id(record) for table in tables for record in table.rows}
    named = {(entry.where, entry.who) for entry in refused}
    for record in records:
        name = str(record.result.contestant["name"])
        if id(record) not in placed and (record.where, name) not in named:
            refused.append(Refused(record.where, name, "no other record has its task and settings"))
    return tables


def _number(tables: Sequence[Table]) -> None:
    """Number the tables of one title, and say in what they differ."""
    alike: dict[str, list[Table]] = {}
    for table in tables:
        alike.setdefault(table.title, []).append(table)
    for same in alike.values():
        if len(same) > 1:
            for number, table in enumerate(same, 1):
                table.number = number
            _say_what_differs(same)


def score_functions(
    result: Result, predictions: Sequence[Mapping[str, Any]]
) -> tuple[Array, dict[str, statistics.Statistic]]:
    """Make the scores of a record's protocol anew from its settings.

    Raises:
        Ssl3dError: The protocol is not installed.
        KeyError, ValueError, TypeError: The record's settings or predictions are not the protocol's.
    """
    name, _, target = result.task.partition("/")
    protocol, _, work = name.partition("-") if name.startswith("finetune-") else (name, "", "")
    if work:
        from ssl3d_benchmarks.finetune.protocol import task_class

        settings = dict(result.settings["task"])
        if work == "classification":
            return _of_plugin("linear-probe", {"target": target, **settings}).score_functions(predictions)
        return task_class(work).scorer(settings, target).score_functions(predictions)
    return _of_plugin(protocol, result.settings).score_functions(predictions)


def _of_plugin(name: str, settings: Mapping[str, Any]) -> Any:
    from ssl3d.api import plugins

    kind = plugins.load("ssl3d.benchmarks", name)
    known = {option.name for option in dataclasses.fields(kind.Config)}
    values = {key: value for key, value in settings.items() if key in known}
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return kind(kind.Config(**lists))


# --------------------------------------------------------------------------------------------------


def _read_one(path: Path, where: str, by_key: dict[str, ReadRecord], refused: list[Refused]) -> None:
    try:
        content = parse_json(record_bytes(path).decode("utf-8"))
    except DataError as error:  # a damaged archive
        refused.append(Refused(where, "", str(error).removeprefix(f"{path}: ")))
        return
    except (OSError, ValueError) as error:
        refused.append(Refused(where, "", f"not readable: {' '.join(str(error).split())}"))
        return
    if isinstance(content, dict) and not {"task", "contestant"} & set(content):
        return  # another JSON file: timings, localize
    try:
        record = ReadRecord(path, where, result_of(content, str(path)))
    except Ssl3dError as error:
        refused.append(Refused(where, "", str(error).removeprefix(f"{path}: ")))
        return
    name = str(record.result.contestant["name"])
    why = _wrong(record)
    if why:
        refused.append(Refused(where, name, why))
        return
    record.release_predictions()
    key = f"{record.result.key} {' '.join(record.result.dataset)}"
    if key in by_key:
        other = by_key[key]
        theirs, mine = (same.result.scores[same.result.main] for same in (other, record))
        if not abs(theirs - mine) < SAME:
            why = f"its score is {mine:.4f}, but {theirs:.4f} in {other.where} with equal settings and data"
            refused.append(Refused(where, name, why))
        return
    by_key[key] = record


def _wrong(record: ReadRecord) -> str:
    """Say why a record cannot be believed; an empty string if it can."""
    result = record.result
    if not result.predictions:
        return "it has no predictions, so no interval can be computed"
    try:
        record.read_all()
    except ODD as error:
        return f"its contestant or its curve cannot be read: {type(error).__name__} {error}"
    try:
        scorer = record.scorer
        value = float(scorer.functions[result.main](np.ones((1, len(scorer.clusters))))[0])
    except ODD as error:
        return f"its predictions cannot be scored as {result.task}: {type(error).__name__} {error}"
    except Ssl3dError as error:
        return f"its predictions cannot be scored: {error}"
    said = result.scores[result.main]
    if not (abs(value - said) < 1e-6 or (np.isnan(value) and np.isnan(said))):
        return f"its predictions give {result.main} {value:.4f}, but it says {said:.4f}: was it edited?"
    return ""


def _loose(record: ReadRecord) -> bool:
    """Return whether a row has no network: it has no training, and stands beside all that have."""
    return record.kind == "trivial"


def _table_key(record: ReadRecord) -> tuple[str, ...]:
    result = record.result
    training = [result.settings.get("training"), result.settings.get("preset")]
    return (*_base_key(result), json.dumps(training, sort_keys=True, default=str))


def _base_key(result: Result) -> tuple[str, ...]:
    settings = {key: value for key, value in result.settings.items() if key not in APART}
    if isinstance(settings.get("task"), Mapping):
        settings["task"] = {k: v for k, v in settings["task"].items() if k not in APART}
    text = json.dumps(settings, sort_keys=True, default=str)
    return (result.task, "|".join(result.dataset), text, result.main)


def _comparable(same: list[ReadRecord], refused: list[Refused]) -> list[ReadRecord]:
    """Keep the networks' newest version, then the split, data, and volumes that most rows have."""
    # A row without a network may be of a newer version: it must not refuse all that are compared.
    newest = max(record.result.version for record in same if not _loose(record))
    kept = _agreeing(
        same, lambda r: r.result.version, newest, "task version {mine}, the table has {theirs}", refused
    )
    tests = (
        (lambda r: r.result.split_digest, "another split of the subjects ({mine}; the table has {theirs})"),
        (
            lambda r: r.result.data_digest,
            "the data or their preprocessing differ (data digest {mine}; the table has {theirs})",
        ),
        (
            lambda r: r.scorer.volumes,
            "predicts other test volumes ({mine}; the table has {theirs})",
        ),
    )
    for of, words in tests:
        counts = Counter(of(record) for record in kept if not _loose(record))
        if not counts:
            return []
        usual = max(counts, key=lambda value: (counts[value], str(value)))
        kept = _agreeing(kept, of, usual, words, refused)
    return kept


def _agreeing(
    rows: Iterable[ReadRecord], of: Any, usual: Any, words: str, refused: list[Refused]
) -> list[ReadRecord]:
    kept = []
    for record in rows:
        mine = of(record)
        if mine == usual:
            kept.append(record)
            continue
        why = words.format(mine=str(mine)[:12], theirs=str(usual)[:12])
        entry = Refused(record.where, str(record.result.contestant["name"]), why)
        if entry not in refused:
            refused.append(entry)
    return kept


def _volumes(predictions: Iterable[Mapping[str, Any]]) -> str:
    names = sorted(f"{row['dataset']}\t{row['subject']}\t{row.get('id')}" for row in predictions)
    return f"{len(names)}:" + hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]


NETWORK = "network"
SAID = 5
"""Most settings that are named to tell two tables apart."""


def _say_what_differs(tables: Sequence[Table]) -> None:
    """Name the settings in which tables of one title differ."""
    every = [{**_networks(table), **_flat(table.settings)} for table in tables]
    names = [
        name
        for name in dict.fromkeys(name for settings in every for name in settings)
        if len({settings.get(name, "none") for settings in every}) > 1
    ]
    newest = max(table.version for table in tables)
    # What is shortest said is said first: a size tells more than a list of moments.
    names.sort(key=lambda name: name != NETWORK and max(len(settings.get(name, "")) for settings in every))
    for table, own in zip(tables, every, strict=True):
        older = f"an older version of the task ({table.version}; the newest has {newest})"
        words = [older] if table.version < newest else []
        words += [f"{name.rpartition('.')[2].replace('_', ' ')} {own.get(name, 'none')}" for name in names]
        more = f" and {len(words) - SAID} other settings" if len(words) > SAID else ""
        table.differs = ", ".join(words[:SAID]) + more


def _networks(table: Table) -> dict[str, str]:
    """Name the networks of a table, where they are few."""
    groups = {str(r.result.contestant.get("group", "")) for r in table.rows if not _loose(r)}
    names = sorted(group.removeprefix("scratch:") for group in groups if group)
    return {NETWORK: " and ".join(names)} if 0 < len(names) < 3 else {}


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Put settings within settings on one level, their values in words."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        elif key not in ("annotated", "seed"):
            words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            flat[f"{before}{key}"] = words if words else "none"
    return flat


def _add_published(tables: list[Table], path: Path) -> None:
    """Put a file's published numbers beside the tables of their data sets."""
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: no file of published numbers: {' '.join(str(error).split())}") from error
    try:
        source, scores = str(content["source"]), content["scores"]
        for dataset, rows in scores.items():
            for table in tables:
                if table.family != content["family"] or table.dataset != (dataset,):
                    continue
                for name, values in rows.items():
                    if table.main in values:
                        table.published.append({
                            "name": str(name), "source": source, "note": str(content.get("note", "")),
                            **{key: float(value) for key, value in values.items()},
                        })  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{path}: published numbers need source, family and scores: DATA SET: NAME: {{score: value}} "
            f"({type(error).__name__} {error})"
        ) from error
