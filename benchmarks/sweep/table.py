"""The table of a sweep, and its best flags as a command to type."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.api import UsageError, count_of, duration
from ssl3d_benchmarks.sweep.space import SweepPlan, read_plan
from ssl3d_benchmarks.table import aligned

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

NAME = "sweep"
"""Name of the study in the journal, and of the folder of the best command."""
PLAN = "sweep.yaml"
JOURNAL = "journal.log"
TRIALS = "trials"
_WORDS = {"COMPLETE": "done", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "unfinished"}


def journal(folder: Path) -> BaseStorage:
    """Open the journal of a sweep, a file that any number of machines may append to.

    Raises:
        UsageError: Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UsageError("ssl3d sweep needs Optuna; pip install 'ssl3d[sweep]' brings it") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # That parts of it may change yet is no news to who searches flags.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))


def describe(folder: Path) -> dict[str, Any]:
    """Describe a sweep in plain values.

    Raises:
        UsageError: The sweep cannot be read.
    """
    import optuna

    plan = read_plan(folder / PLAN)
    trials: list[FrozenTrial] = []
    if (folder / JOURNAL).exists():
        study = optuna.load_study(storage=journal(folder), study_name=NAME)
        trials = study.get_trials(deepcopy=False)
    rows = [_row(trial) for trial in trials]
    done = [row for row in rows if row["state"] == "done"]
    sign = -1 if plan.direction == "maximize" else 1
    done.sort(key=lambda row: (sign * row["value"], row["number"]))
    return {
        "kind": "sweep",
        "path": str(folder),
        "command": plan.command,
        "value": plan.value,
        "direction": plan.direction,
        "trials": done + [row for row in rows if row["state"] != "done"],
        "best": best_command(plan, done[0]["flags"]) if done else None,
    }


def best_command(plan: SweepPlan, values: dict[str, Any]) -> str:
    """Return the command line with the values of the best trial."""
    return shlex.join(["ssl3d", *plan.words(values), "--out", "runs/best"])


def lines(folder: Path) -> list[str]:
    """Return the lines that show a sweep: its trials, the best first, and the command of the best."""
    return lines_of(describe(folder))


def lines_of(info: dict[str, Any]) -> list[str]:
    """Return the lines that show the description of a sweep."""
    trials = info["trials"]
    names = list(trials[0]["flags"]) if trials else []
    head = ["trial", info["value"], *names, "time", "state"]
    rows = [
        [
            str(row["number"]),
            "-" if row["value"] is None else f"{row['value']:.4g}",
            *(f"{v:.4g}" if isinstance(v := row["flags"][name], float) else str(v) for name in names),
            "-" if row["seconds"] is None else duration(row["seconds"]),
            row["state"] + (f": {row['reason']}" if row["reason"] else ""),
        ]
        for row in trials
    ]
    counts = {word: sum(row["state"] == word for row in trials) for word in _WORDS.values()}
    states = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    text = [
        f"{info['path']}: {count_of(len(trials), 'trial')} of {info['command']}, {states or 'none yet'}"
    ]
    if rows:
        text += ["", *aligned([head, *rows])]
    if info["best"]:
        text += ["", f"best: {info['best']}"]
    return text


def _row(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": _WORDS.get(trial.state.name, "unfinished"),
        "value": trial.value if trial.state.name == "COMPLETE" else None,
        "flags": dict(trial.params),
        "seconds": trial.user_attrs.get("seconds"),
        "reason": trial.user_attrs.get("reason", ""),
        "folder": f"{TRIALS}/{trial.number:04d}",
    }
