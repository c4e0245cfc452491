"""The suite file, which says what a leaderboard run consists of; read and checked."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl3d.api import UsageError, read_yaml

SUITES = Path(__file__).parents[2] / "suites"

KEYS = frozenset(
    ["description", "encoder", "seeds", "folds", "budget", "stores", "runs", "contestants", "tasks",
     "published"]
)  # fmt: skip
TASK_KEYS = frozenset(["protocol", "runs", "contestants", "options", "curve"])
PROTOCOLS = ("linear-probe", "knn", "finetune")


@dataclass(frozen=True)
class SuiteTask:
    """A task of a suite, and who is scored on it.

    Attributes:
        name: Name of the task, and of the folder that its records go to.
        protocol: Command that scores encoders.
        runs: Patterns of names of runs.
        contestants: Patterns of names of contestants that are not pretrained here.
        options: Words that follow the encoders on the command line.
        curve: Whether the encoders on the way are scored too, in a folder NAME-curve.
    """

    name: str
    protocol: str
    runs: tuple[str, ...]
    contestants: tuple[str, ...]
    options: str
    curve: bool


@dataclass(frozen=True)
class Suite:
    """A suite file, read and checked.

    Attributes:
        name: Name of the file, without .yaml.
        description: Description in one line.
        encoder: Options of `ssl3d pretrain` for every run that names no encoder.
        seeds: Seeds of pretraining; every run is done once for each.
        budget: `flops` of every run; or `run` and `steps`, a run whose FLOPs every run spends; or empty,
            where each run has a length of its own.
        stores: Names with the words of `ssl3d prepare`: paths below the root of the data, then options; of
            several ways, separated by |, the first whose paths are all there. Or phantoms:N.
        runs: Names with the words that follow `ssl3d pretrain`.
        contestants: Names with an encoder that is not pretrained here, or not as it is: `imagenet:...`,
            `scratch:...`, a path, `{RUN}:high_resolution=true`.
        tasks: Tasks that are scored.
        published: Names of files with published numbers, shown beside the records.
        first: First seed of the file, whichever are to be done: contestants name runs of this one.
        folds: Number of folds of a cross-validation over all subjects: every run is then done once for each
            fold, on the subjects that this fold does not test; 0 for the house split.
    """

    name: str
    description: str
    encoder: str
    seeds: tuple[int, ...]
    budget: Mapping[str, Any]
    stores: Mapping[str, str]
    runs: Mapping[str, str]
    contestants: Mapping[str, str]
    tasks: tuple[SuiteTask, ...]
    published: tuple[str, ...]
    first: int
    folds: int = 0


def protocols() -> list[str]:
    """List the protocols of tasks: the benchmarks here, and those that packages bring with a command."""
    from ssl3d.api import plugins

    brought = set(plugins.names(plugins.BENCHMARKS)) & set(plugins.names(plugins.COMMANDS))
    return [*PROTOCOLS, *sorted(brought - set(PROTOCOLS))]


def built_in() -> list[str]:
    """List the names of the suites that come with ssl3d."""
    return sorted(
        path.stem for path in SUITES.glob("*.yaml") if "tasks" in path.read_text(encoding="utf-8")
    )


def load_suite(name: str | Path) -> Suite:
    """Read a suite: the name of a built-in one, or a YAML file.

    Raises:
        UsageError: There is no such suite, or something in it cannot be meant.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SUITES / f"{name}.yaml"
        if not path.is_file():
            close = difflib.get_close_matches(str(name), built_in(), 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"no suite {name}: {hint}built in are {', '.join(built_in())}; or name a .yaml"
            )
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return checked_suite(path.stem, path, content)


def checked_suite(name: str, path: Path, content: Any) -> Suite:
    """Check the content of a suite file.

    Args:
        name: Name of the suite.
        path: File that holds it, for messages.
        content: Content of the file, as YAML holds it.

    Raises:
        UsageError: Something in it cannot be meant.
    """
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a suite (a mapping with tasks)")
    _known(path, "", content, KEYS)
    tasks = content.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise UsageError(f"{path}: tasks is missing: a suite scores at least one")
    texts: dict[str, dict[str, str]] = {}
    for key in ("stores", "runs", "contestants"):
        given = content.get(key) or {}
        if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
            raise UsageError(f"{path}: {key} maps names to text")
        for label in given:
            if not _plain(str(label)):
                raise UsageError(f"{path}: {key}: {label!r} is no name: use letters, digits, - _ . +")
        texts[key] = {str(k): v for k, v in given.items()}
    both = set(texts["runs"]) & set(texts["contestants"])
    if both:
        raise UsageError(f"{path}: {', '.join(sorted(both))}: a run and a contestant of one name")
    budget = content.get("budget") or {}
    if not isinstance(budget, dict) or set(budget) not in ({"flops"}, {"run", "steps"}, set()):
        raise UsageError(f"{path}: budget is {budget}: give flops, or run and steps")
    if "run" in budget and str(budget["run"]) not in texts["runs"]:
        raise UsageError(f"{path}: budget: no run {budget['run']}")
    for key in budget.keys() & {"flops", "steps"}:
        if type(budget[key]) not in ((int, float) if key == "flops" else (int,)) or budget[key] <= 0:
            raise UsageError(f"{path}: budget: {key} is {budget[key]!r}, must be a number above 0")
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and s >= 0 for s in seeds):
        raise UsageError(f"{path}: seeds is {seeds}: a list of numbers from 0")
    folds = content.get("folds", 0)
    if type(folds) is not int or folds < 0 or folds == 1:
        raise UsageError(f"{path}: folds is {folds!r}: a whole number from 2, or 0 for the house split")
    published = content.get("published") or []
    return Suite(
        name,
        str(content.get("description", "")),
        str(content.get("encoder", "")),
        tuple(dict.fromkeys(seeds)),
        budget,
        texts["stores"],
        texts["runs"],
        texts["contestants"],
        tuple(_task(path, str(label), task, texts) for label, task in tasks.items()),
        tuple(map(str, published if isinstance(published, list) else [published])),
        seeds[0],
        folds,
    )


def _task(path: Path, name: str, content: Any, texts: Mapping[str, Mapping[str, str]]) -> SuiteTask:
    where = f"tasks: {name}"
    if not isinstance(content, dict) or not isinstance(content.get("options"), str):
        raise UsageError(f"{path}: {where}: options is missing (what follows the encoders, --data first)")
    if not _plain(name):
        raise UsageError(f"{path}: {where} is no name: use letters, digits, - _ . +")
    _known(path, f"{where}: ", content, TASK_KEYS)
    protocol = content.get("protocol", "linear-probe")
    if protocol not in (known := protocols()):
        raise UsageError(
            f"{path}: {where}: protocol {protocol!r} is none of {', '.join(known)} (a package's benchmark "
            "needs a command of the same name, with the options of `ssl3d knn`)"
        )
    patterns: dict[str, tuple[str, ...]] = {}
    for key in ("runs", "contestants"):
        given = content.get(key) or []
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list):
            raise UsageError(f"{path}: {where}: {key} is {given!r}: a name, a pattern, or a list of them")
        for pattern in given:
            if not fnmatch.filter(texts[key], str(pattern)):
                raise UsageError(f"{path}: {where}: {key} {pattern} matches none")
        patterns[key] = tuple(map(str, given))
    if not any(patterns.values()):
        raise UsageError(f"{path}: {where}: nobody to score: give runs or contestants")
    return SuiteTask(
        name, protocol, patterns["runs"], patterns["contestants"], content["options"],
        bool(content.get("curve", False)),
    )  # fmt: skip


def _known(path: Path, where: str, content: Mapping[str, Any], keys: frozenset[str]) -> None:
    for key in content:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"{path}: {where}unknown key {key!r}: {hint}known are {', '.join(sorted(keys))}"
            )


def _plain(name: str) -> bool:
    return bool(name) and all(c.isalnum() or c in "-_.+" for c in name) and name[0] not in "-."
