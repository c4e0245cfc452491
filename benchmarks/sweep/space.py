"""The file of a sweep: a command, its fixed options, the flags to search, and the score to go by."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssl3d.api import Ssl3dError, UsageError, read_yaml, request_of
from ssl3d_benchmarks.leaderboard.suite.check import check_scoring

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

COMMANDS = ("pretrain", "finetune")
VALIDATION = "validation"
"""Name of the score of a fine-tuning: the task's main score on the validation subjects."""
_KEYS = ("command", "options", "search", "value", "direction")
_OURS = ("--out", "--resume", "--overwrite")
_TRIAL_OF_FINETUNE = ("--no-scratch", "--no-trivial", "--validation-only")


@dataclass(frozen=True)
class Interval:
    """Range of a flag's values, its ends included.

    Attributes:
        low: Least value.
        high: Largest value.
        log: Whether the logarithm of the value is uniform.
        step: Distance between the values; None for every number, or whole numbers from 1 to 1.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether values are whole numbers, as both ends are."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def corners(self) -> tuple[Any, ...]:
        """Return the values to check before anything is trained."""
        return self.low, self.high

    def distribution(self) -> BaseDistribution:
        """Return the distribution that Optuna draws from."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            step = 1 if self.step is None else int(self.step)
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return FloatDistribution(float(self.low), float(self.high), log=self.log, step=self.step)


@dataclass(frozen=True)
class Choices:
    """List of a flag's values.

    Attributes:
        values: Values, each as it is typed.
    """

    values: tuple[str, ...]

    def corners(self) -> tuple[Any, ...]:
        """Return the values to check before anything is trained."""
        return self.values

    def distribution(self) -> BaseDistribution:
        """Return the distribution that Optuna draws from."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)


@dataclass(frozen=True)
class SweepPlan:
    """Content of a sweep's file.

    Attributes:
        command: Command whose flags are searched: pretrain or finetune.
        fixed: Words of its other options.
        search: Range or choices of each flag, by its name without dashes.
        value: Name of the score: one of `metrics.jsonl`, or `validation`.
        direction: Whether the score is to be maximized or minimized.
    """

    command: str
    fixed: tuple[str, ...]
    search: Mapping[str, Interval | Choices]
    value: str
    direction: Literal["maximize", "minimize"]

    def flags(self, values: Mapping[str, Any]) -> list[str]:
        """Return the words of the flags that were searched, as they are typed."""
        words: list[str] = []
        for name in self.search:
            words += [f"--{name}", *(shlex.split(v) if isinstance(v := values[name], str) else [repr(v)])]
        return words

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """Return the words of a command with the values of a trial, all but its folder."""
        return [self.command, *self.fixed, *self.flags(values)]

    def trial(self, values: Mapping[str, Any]) -> list[str]:
        """Return the words of a trial: without what costs time and is no part of the score."""
        words = self.words(values)
        if self.command == "finetune":
            given = {word.partition("=")[0] for word in self.fixed}
            words += [flag for flag in _TRIAL_OF_FINETUNE if flag not in given]
        return words


def read_plan(path: Path) -> SweepPlan:
    """Read the file of a sweep, and check its commands at every end of every range.

    Raises:
        UsageError: The file cannot be used; the message names the key.
    """
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        plan = plan_of(content)
        _check(plan)
    except Ssl3dError as error:
        raise UsageError(f"{path}: {error}") from error
    return plan


def plan_of(content: Any) -> SweepPlan:
    """Return the plan of a sweep's content.

    Raises:
        UsageError: A key is missing, unknown or of the wrong kind.

    Example:
        >>> search = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "batch_size": [8, 16]}
        >>> plan = plan_of({"command": "pretrain", "options": "--proxy simclr", "search": search,
        ...                 "value": "online/knn_accuracy"})
        >>> plan.words({"lr": 0.002, "batch_size": "8"})
        ['pretrain', '--proxy', 'simclr', '--lr', '0.002', '--batch_size', '8']
        >>> plan.direction
        'maximize'
    """
    if not isinstance(content, dict):
        raise UsageError(f"holds no sweep (expected {', '.join(_KEYS)})")
    unknown = sorted(set(map(str, content)) - set(_KEYS))
    if unknown:
        raise UsageError(f"{unknown[0]}: unknown; a sweep has {', '.join(_KEYS)}")
    command = content.get("command")
    if command not in COMMANDS:
        raise UsageError(f"command: {command!r}, must be {' or '.join(COMMANDS)}")
    try:
        fixed = tuple(shlex.split(str(content.get("options") or "")))
    except ValueError as error:
        raise UsageError(f"options: {error}") from error
    search = content.get("search")
    if not isinstance(search, dict) or not search:
        raise UsageError("search: names no flag; give each a range {low, high} or a list of values")
    ranges = {str(name).removeprefix("--"): _range(str(name), entry) for name, entry in search.items()}
    given = {_flag(word) for word in fixed if word.startswith("--")}
    for name in _OURS:
        if _flag(name) in given or _flag(name) in map(_flag, ranges):
            raise UsageError(f"{name}: is set by the sweep, so leave it out")
    twice = sorted(given & set(map(_flag, ranges)))
    if twice:
        raise UsageError(f"search: {twice[0]} is fixed in options too; leave it out of one of them")
    value = content.get("value") or (VALIDATION if command == "finetune" else "")
    if not value:
        raise UsageError(
            "value: names no score of metrics.jsonl, such as online/knn_accuracy or holdout/loss"
        )
    if command == "finetune" and value != VALIDATION:
        raise UsageError(f"value: {value!r}, must be {VALIDATION} for finetune")
    lower = str(value).rpartition("/")[2] == "loss"
    asked = content.get("direction") or ("minimize" if lower else "maximize")
    if asked not in ("minimize", "maximize"):
        raise UsageError(f"direction: {asked!r}, must be minimize or maximize")
    direction: Literal["maximize", "minimize"] = "minimize" if asked == "minimize" else "maximize"
    return SweepPlan(str(command), fixed, ranges, str(value), direction)


def _flag(word: str) -> str:
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def _range(name: str, entry: Any) -> Interval | Choices:
    if isinstance(entry, list) and entry:
        return Choices(tuple(map(_typed, entry)))
    if not isinstance(entry, dict) or not {"low", "high"} <= set(entry) <= {"low", "high", "log", "step"}:
        raise UsageError(f"search: {name}: {entry!r}, must be {{low, high, log, step}} or a list of values")
    low, high, log, step = entry["low"], entry["high"], entry.get("log", False), entry.get("step")
    numbers = [low, high] if step is None else [low, high, step]
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers) or type(log) is not bool:
        raise UsageError(f"search: {name}: low, high and step must be numbers, and log true or false")
    if not low < high:
        raise UsageError(f"search: {name}: low is {low} and high {high}; low must be below high")
    if log and (low <= 0 or step is not None):
        raise UsageError(f"search: {name}: log needs low above 0 (it is {low}) and no step")
    if step is not None and not step > 0:
        raise UsageError(f"search: {name}: step is {step}, must be above 0")
    return Interval(low, high, log, step)


def _typed(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_typed, value))
    if isinstance(value, bool):
        return str(value).lower()
    return shlex.quote(value) if isinstance(value, str) else str(value)


def _check(plan: SweepPlan) -> None:
    """Read the command at every end of every range, so that a typing error fails no trial."""
    first = {name: entry.corners()[0] for name, entry in plan.search.items()}
    for name, entry in plan.search.items():
        for value in entry.corners():
            words = plan.trial(first | {name: value})
            try:
                if plan.command == "pretrain":
                    request_of(words[1:])
                else:
                    check_scoring(words)
            except Ssl3dError as error:
                raise UsageError(f"search: {name}: {value}: {error}") from error
