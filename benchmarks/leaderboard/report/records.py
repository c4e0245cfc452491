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
    read_result,
    record_bytes,
    record_files,
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


@dataclass(frozen=True)
class Refused:
    """A file or a row that is in no table.

    Attributes:
        where: File, below the folder of the records.
        who: The contestant, or empty.
        why: In one line.
    """

    where: str
    who: str
    why: str


@dataclass(frozen=True)
class Read:
    """A record and where it lies.

    Attributes:
        path: Of the file.
        where: The same below the folder of the records.
        result: The record.
    """

    path: Path
    where: str
    result: Result

    @cached_property
    def kind(self) -> str:
        """One of `KINDS`, never published."""
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
        found = self.result.contestant.get("pretraining")
        return found if isinstance(found, Mapping) else {}

    @property
    def proxies(self) -> list[str]:
        """Names of the proxies."""
        return list(self.pretraining.get("proxies") or {})

    @property
    def steps(self) -> int:
        """Of the pretraining."""
        return int(self.pretraining.get("steps") or 0)

    @property
    def share(self) -> int | None:
        """Percent of the budget after which an encoder on the way was saved; None for finished ones."""
        who = self.result.contestant
        found = ON_THE_WAY.search(str(who["name"])) or ON_THE_WAY.search(str(who.get("source", "")))
        return int(found[1]) if found else None

    @property
    def recalibrated(self) -> bool:
        """Whether its norm statistics were taken anew."""
        return bool(self.result.contestant.get("norm_recalibrated"))

    @cached_property
    def stem(self) -> str:
        """Its name without folder, seed and what was done to its norms."""
        name = str(self.result.contestant["name"]).partition(",")[0]
        return name if self.kind != "pretrained" else self._without_seed(name)

    def _without_seed(self, name: str) -> str:
        """The last part of a path without the seed of pretraining, where it ends in that."""
        parts = [one for one in re.split(r"[/\\]", name) if one and one != "encoder"]
        if len(parts) > 1 and ON_THE_WAY.search("/" + parts[-1]):
            parts.pop()
        if not parts:
            return name
        found, seed = SEED.search(parts[-1]), self.pretraining.get("seed")
        # simclr-16 can be a batch size; records that know no seed were all named by it.
        its_seed = found is not None and (seed is None or int(found[1]) == seed)
        return parts[-1][: found.start()] if found and its_seed else parts[-1]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """How it was pretrained, beside what `arm` has, as far as the record says: old ones say less."""
        if self.kind != "pretrained" or "batch_size" not in self.pretraining:
            return {}
        found = {key: self.pretraining[key] for key in RECIPE if key in self.pretraining}
        if isinstance(found.get("init"), Mapping):
            start = str(found["init"].get("from", ""))
            # Every seed may start from a run of its own seed.
            told = start if start.startswith(("imagenet:", "scratch:")) else self._without_seed(start)
            found["init"] = {"from": told, "steps": found["init"].get("steps")}
        return found

    @cached_property
    def arm(self) -> tuple[Any, ...]:
        """What is the same for the seeds of one contestant, but for its recipe."""
        who = self.result.contestant
        same = {key: self.pretraining.get(key) for key in ("proxies", "steps", "patch")}
        # Which volumes they were, the digest says; how they were chosen, old records do not.
        data = self.pretraining.get("data") or {}
        same["data"] = {key: value for key, value in data.items() if key != "chosen_by"}
        about = [self.kind, who.get("group"), self.recalibrated, who.get("pool"), self.share, self.stem]
        if self.kind == "scratch":
            about[-1] = ""
        if self.kind == "imagenet":
            about.append(who["digest"])
        return (*about, json.dumps(same, sort_keys=True, default=str) if self.kind == "pretrained" else "")

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates that were tried; none where a protocol has none."""
        return tuple(self.result.settings.get("rates") or ())

    def flops(self) -> float | None:
        """Training FLOPs of the pretraining up to here."""
        compute = self.pretraining.get("compute") or {}
        per_step = compute.get("flops_per_step")
        if per_step:  # old checkpoints on the way hold the whole run's sum
            return float(per_step) * self.steps + float(compute.get("flops_between_epochs") or 0)
        found = compute.get("flops") or self.pretraining.get("flops")
        return float(found) if found else None

    def ordered(self) -> list[dict[str, Any]]:
        """The predictions in an order that is the same for all contestants."""
        return sorted(self.result.predictions, key=lambda p: (p["dataset"], p["subject"], str(p.get("id"))))


def contestants_of(rows: Iterable[Read]) -> list[list[Read]]:
    """Records by contestant; its seeds, subsets and repetitions stay together.

    Trained at other learning rates it is another: of one seed at two rates, one would stand for both.
    A record that is too old to tell its whole recipe goes with those that do, where those that agree with
    what it tells all have the same.
    """
    alike: dict[Any, dict[str, list[Read]]] = {}
    for one in rows:
        recipe = json.dumps(one.recipe, sort_keys=True, default=str)
        alike.setdefault((one.arm, one.rates), {}).setdefault(recipe, []).append(one)
    found: list[list[Read]] = []
    for by_recipe in alike.values():
        groups: list[list[Read]] = []
        for same in sorted(by_recipe.values(), key=lambda group: -len(group[0].recipe)):
            told = same[0].recipe
            fuller = [
                group
                for group in groups
                if len(told) < len(group[0].recipe) and told.items() <= group[0].recipe.items()
            ]
            if len(fuller) == 1:
                fuller[0].extend(same)
            else:
                groups.append(same)
        found += groups
    return found


@dataclass
class Table:
    """What can be compared: one task on one split of one data set with the same settings.

    Attributes:
        task: As the records have it.
        version: Of the task.
        dataset: Names of the data sets.
        settings: Of the protocol, that all rows share.
        main: The score that ranks.
        rows: The records.
        published: Published numbers for this data set, to read beside; never ranked, never tested.
        number: To tell apart tables of the same title, from 1; 0 where there is one.
        differs: The settings that those of the same title have otherwise, in words.
    """

    task: str
    version: int
    dataset: tuple[str, ...]
    settings: dict[str, Any]
    main: str
    rows: list[Read]
    published: list[dict[str, Any]] = field(default_factory=list)
    number: int = 0
    differs: str = ""

    @property
    def protocol(self) -> str:
        """Such as linear-probe."""
        return self.task.partition("/")[0].partition("-segmentation")[0].partition("-classification")[0]

    @property
    def target(self) -> str:
        """Kind of target."""
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
        """For people."""
        number = f" ({self.number})" if self.number else ""
        sparse = f", {self.annotated}" if self.slices else ""
        return f"{', '.join(self.dataset)}: {self.task.replace('/', ', ')}{sparse}{number}"

    @property
    def annotated(self) -> str:
        """The slices in words; empty for all."""
        return f"{self.slices} annotated slice{'s' * (self.slices > 1)} a volume" if self.slices else ""

    @property
    def slug(self) -> str:
        """For links and file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Records:
    """What a folder holds.

    Attributes:
        tables: Sorted by task and data set.
        refused: What is in none of them, and why.
        files: Number of JSON files looked at.
    """

    tables: list[Table]
    refused: list[Refused]
    files: int


def read_records(folders: Sequence[Path], published: Sequence[Path] = ()) -> Records:
    """Reads all records below some folders, or in archives of them.

    Raises:
        UsageError: A folder or an archive is missing, or holds no record; a file of published numbers
            cannot be read.
    """
    refused: list[Refused] = []
    found: list[Read] = []
    seen: dict[str, Read] = {}
    files = 0
    for folder in folders:
        for path in record_files(folder):
            files += 1
            below = path.relative_to(folder) if len(folders) == 1 and path != folder else path
            _read_one(path, below.as_posix(), found, seen, refused)
    if not found:
        told = f" ({refused[0].where}: {refused[0].why})" if refused else ""
        raise UsageError(f"{' '.join(map(str, folders))}: no record of a benchmark{told}")
    tables: list[Table] = []
    for key in sorted({_table_key(one) for one in found if not _loose(one)}):
        same = [one for one in found if _belongs(one, key)]
        kept = _comparable(same, refused)
        if kept:
            first = next(one.result for one in kept if not _loose(one))
            settings = {k: v for k, v in first.settings.items() if k not in ("fractions", "rates")}
            tables.append(
                Table(first.task, first.version, tuple(first.dataset), settings, first.main, kept)
            )
    placed = {id(one) for table in tables for one in table.rows}
    named = {(one.where, one.who) for one in refused}
    for one in found:
        name = str(one.result.contestant["name"])
        if id(one) not in placed and (one.where, name) not in named:
            refused.append(
                Refused(one.where, name, "no other row of its task and settings to stand beside")
            )
    counted = Counter(table.title for table in tables)
    numbers: Counter[str] = Counter()
    alike: dict[str, list[Table]] = {}
    for table in tables:
        title = table.title
        if counted[title] > 1:
            numbers[title] += 1
            table.number = numbers[title]
            alike.setdefault(title, []).append(table)
    for same_title in alike.values():
        _say_what_differs(same_title)
    for path in published:
        _add_published(tables, path)
    return Records(tables, refused, files)


def score_functions(
    result: Result, predictions: Sequence[Mapping[str, Any]]
) -> tuple[Array, dict[str, statistics.Statistic]]:
    """The scores of a record's protocol, made anew from its settings.

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
    known = {one.name for one in dataclasses.fields(kind.Config)}
    values = {key: value for key, value in settings.items() if key in known}
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return kind(kind.Config(**lists))


# --------------------------------------------------------------------------------------------------


def _read_one(
    path: Path, where: str, found: list[Read], seen: dict[str, Read], refused: list[Refused]
) -> None:
    try:
        content = json.loads(record_bytes(path).decode("utf-8"))
    except DataError as error:  # a damaged archive
        refused.append(Refused(where, "", str(error).removeprefix(f"{path}: ")))
        return
    except (OSError, ValueError, RecursionError) as error:
        refused.append(Refused(where, "", f"not readable: {' '.join(str(error).split())}"))
        return
    if isinstance(content, dict) and not {"task", "contestant"} & set(content):
        return  # another JSON file: timings, localize
    try:
        one = Read(path, where, read_result(path))
    except Ssl3dError as error:
        refused.append(Refused(where, "", str(error).removeprefix(f"{path}: ")))
        return
    name = str(one.result.contestant["name"])
    why = _wrong(one)
    if why:
        refused.append(Refused(where, name, why))
        return
    key = f"{one.result.key} {' '.join(one.result.dataset)}"
    if key in seen:
        other = seen[key]
        theirs, mine = (x.result.scores[x.result.main] for x in (other, one))
        if not abs(theirs - mine) < SAME:
            why = f"{mine:.4f}, and {theirs:.4f} in {other.where}, though all that decides them is equal"
            refused.append(Refused(where, name, why))
        return
    seen[key] = one
    found.append(one)


def _wrong(one: Read) -> str:
    """Why a record cannot be believed, or nothing."""
    result = one.result
    if not result.predictions:
        return "it has no predictions, so no interval can be made"
    try:
        clusters, found = score_functions(result, one.ordered())
        value = float(found[result.main](np.ones((1, len(clusters))))[0])
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"its predictions cannot be scored as {result.task}: {type(error).__name__} {error}"
    except Ssl3dError as error:
        return f"its predictions cannot be scored: {error}"
    said = result.scores[result.main]
    if not (abs(value - said) < 1e-6 or (np.isnan(value) and np.isnan(said))):
        return f"its predictions give {result.main} {value:.4f}, it says {said:.4f}: edited?"
    return ""


def _loose(one: Read) -> bool:
    """A row without a network: it has no training, and stands beside all that have."""
    return one.kind == "trivial"


def _table_key(one: Read) -> tuple[str, ...]:
    result = one.result
    training = [result.settings.get("training"), result.settings.get("preset")]
    return (*_base_key(result), json.dumps(training, sort_keys=True, default=str))


def _base_key(result: Result) -> tuple[str, ...]:
    settings = {key: value for key, value in result.settings.items() if key not in APART}
    if isinstance(settings.get("task"), Mapping):
        settings["task"] = {k: v for k, v in settings["task"].items() if k not in APART}
    text = json.dumps(settings, sort_keys=True, default=str)
    return (result.task, "|".join(result.dataset), text, result.main)


def _belongs(one: Read, key: tuple[str, ...]) -> bool:
    return _base_key(one.result) == key[:-1] if _loose(one) else _table_key(one) == key


def _comparable(same: list[Read], refused: list[Refused]) -> list[Read]:
    """Rows of the networks' newest version; then of the split, data, and volumes that most rows have."""
    # A row without a network may be of a newer version: it must not refuse all that are compared.
    newest = max(one.result.version for one in same if not _loose(one))
    kept = _agreeing(
        same, lambda r: r.version, newest, "task version {mine}, the table has {theirs}", refused
    )
    tests = (
        (lambda r: r.split_digest, "another split of the subjects ({mine}; the table has {theirs})"),
        (
            lambda r: r.data_digest,
            "the data or their preprocessing differ (data digest {mine}; the table has {theirs})",
        ),
        (
            lambda r: _volumes(r.predictions),
            "predicts other test volumes ({mine}; the table has {theirs})",
        ),
    )
    for of, words in tests:
        counts = Counter(of(one.result) for one in kept if not _loose(one))
        if not counts:
            return []
        usual = max(counts, key=lambda value: (counts[value], str(value)))
        kept = _agreeing(kept, of, usual, words, refused)
    return kept


def _agreeing(rows: Iterable[Read], of: Any, usual: Any, words: str, refused: list[Refused]) -> list[Read]:
    kept = []
    for one in rows:
        mine = of(one.result)
        if mine == usual:
            kept.append(one)
            continue
        why = words.format(mine=str(mine)[:12], theirs=str(usual)[:12])
        entry = Refused(one.where, str(one.result.contestant["name"]), why)
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
    """Names the settings in which tables of one title differ."""
    every = [{**_networks(table), **_flat(table.settings)} for table in tables]
    names = [
        name
        for name in dict.fromkeys(name for one in every for name in one)
        if len({one.get(name, "none") for one in every}) > 1
    ]
    # What is shortest said is said first: a size tells more than a list of moments.
    names.sort(key=lambda name: name != NETWORK and max(len(one.get(name, "")) for one in every))
    for table, own in zip(tables, every, strict=True):
        told = [f"{name.rpartition('.')[2].replace('_', ' ')} {own.get(name, 'none')}" for name in names]
        more = f" and {len(told) - SAID} settings more" if len(told) > SAID else ""
        table.differs = ", ".join(told[:SAID]) + more


def _networks(table: Table) -> dict[str, str]:
    """The networks of a table, where they are few."""
    groups = {str(one.result.contestant.get("group", "")) for one in table.rows if not _loose(one)}
    names = sorted(group.removeprefix("scratch:") for group in groups if group)
    return {NETWORK: " and ".join(names)} if 0 < len(names) < 3 else {}


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Settings within settings as one level, their values in words."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}.")
        elif key not in ("annotated", "seed"):
            words = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            found[f"{before}{key}"] = words if words else "none"
    return found


def _add_published(tables: list[Table], path: Path) -> None:
    """Puts a file's published numbers beside the tables of their data sets."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
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
