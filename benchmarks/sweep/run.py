"""A worker of a sweep: takes trials one after the other, runs each in a process, and tells Optuna."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ssl3d.api import DataError, UsageError, count_of, locks, printable, seed_of, write_whole
from ssl3d_benchmarks.child import Child
from ssl3d_benchmarks.sweep.options import SweepOptions
from ssl3d_benchmarks.sweep.scores import final, points
from ssl3d_benchmarks.sweep.space import SweepPlan, read_plan
from ssl3d_benchmarks.sweep.table import NAME, PLAN, TRIALS, journal, lines

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

PROGRAM = (sys.executable, "-m", "ssl3d")
"""Words before the command of a trial."""
LOOK = 1.0
"""Seconds between two looks at the scores of a trial."""
ATTEMPTS = 3
"""Number of workers that a trial may lose before it counts as failed."""
_STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)  # having saved, or before there was anything to save


def sweep(options: SweepOptions) -> int:
    """Run trials until there are as many as asked for, then print the table and the best command.

    Returns:
        Exit status: 1 where no trial ended well, 128 and its number after a signal.

    Raises:
        UsageError: The file or the folder cannot be used, or Optuna is not installed.
    """
    plan = read_plan(options.file)
    _settle(options)
    worker = Worker(options, plan)
    with worker.child.signals():
        worker.run()
    print("\n".join(map(printable, lines(options.out))), flush=True)
    if worker.child.asked:
        return 128 + worker.child.asked
    return 0 if any(trial.state.name == "COMPLETE" for trial in worker.trials()) else 1


def _settle(options: SweepOptions) -> None:
    """Make the folder, and keep the file of the sweep in it.

    Raises:
        UsageError: The folder cannot be written, or holds another sweep.
    """
    kept = options.out / PLAN
    try:
        content = options.file.read_text(encoding="utf-8")
        (options.out / TRIALS).mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            write_whole(kept, content)
    except OSError as error:
        raise UsageError(f"{error.filename or options.out}: {error.strerror}") from error
    if read_plan(kept) != read_plan(options.file):
        raise UsageError(f"--out {options.out}: holds another sweep ({kept}); name another folder")


class Worker:
    """One of the processes that work on a sweep.

    Attributes:
        child: Process of the trial in work.

    Args:
        options: Options of the command.
        plan: Content of the sweep's file.
    """

    def __init__(self, options: SweepOptions, plan: SweepPlan) -> None:
        self.options, self.plan = options, plan
        self.child = Child()
        self._storage = journal(options.out)
        with self._asking():
            self._study(0, create=True)

    def trials(self) -> list[FrozenTrial]:
        """Return the trials of all workers."""
        trials: list[FrozenTrial] = self._study(0).get_trials(deepcopy=False)
        return trials

    def run(self) -> None:
        """Take and run trials until there are enough, or a signal comes."""
        waiting = False
        while not self.child.asked:
            taken = self._take()
            if taken is not None:
                lock = self._path(taken.number, "lock")
                with locks.holding(lock):
                    self._run(taken)
            elif any(trial.state.name == "RUNNING" for trial in self.trials()):
                if not waiting:
                    print("waiting for trials that other processes are running", flush=True)
                waiting = True
                time.sleep(locks.WAIT)
            else:
                return

    # Which ------------------------------------------------------------------------------------------

    def _take(self) -> Trial | None:
        """Take a trial that a dead worker left, else a new one; None where there are enough."""
        from optuna.trial import Trial

        with self._asking():
            trials = self.trials()
            for trial in trials:
                if trial.state.name == "RUNNING" and locks.take(self._path(trial.number, "lock")):
                    return Trial(self._study(trial.number), trial._trial_id)
            number = len(trials)
            if number >= self.options.trials or self.child.asked:
                return None
            ranges = {name: entry.distribution() for name, entry in self.plan.search.items()}
            new = self._study(number).ask(ranges)
            if not locks.take(self._path(new.number, "lock")):
                raise UsageError(f"{self._path(new.number, 'lock')}: is another process's; remove it")
            return new

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Hold the lock of asking, so that a new trial has a worker before others see it."""
        lock = self.options.out / ".asking.lock"
        while not locks.take(lock):
            time.sleep(0.2)
        with locks.holding(lock):
            yield

    def _study(self, number: int, create: bool = False) -> Study:
        """Return the study, whose sampler draws by the seed and the number of the trial alone."""
        import optuna

        seed, startup = seed_of(self.options.seed, "sweep", number) % 2**32, self.options.startup
        samplers: dict[str, Any] = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }
        pruners: dict[str, Any] = {
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=startup),
            "hyperband": optuna.pruners.HyperbandPruner,
            "none": optuna.pruners.NopPruner,
        }
        chosen = {
            "storage": self._storage,
            "study_name": NAME,
            "sampler": samplers[self.options.sampler](),
            "pruner": pruners[self.options.pruner](),
        }
        if create:
            return optuna.create_study(**chosen, direction=self.plan.direction, load_if_exists=True)
        return optuna.load_study(**chosen)

    # Doing ------------------------------------------------------------------------------------------

    def _run(self, trial: Trial) -> None:
        """Run a trial that was taken to its end, and tell the study; after a signal it stays unfinished."""
        from optuna.trial import TrialState

        attempts = int(trial.user_attrs.get("attempts", 0)) + 1
        if attempts > ATTEMPTS:
            self._tell(trial, None, TrialState.FAIL, f"its worker died {count_of(ATTEMPTS, 'time')}")
            return
        trial.set_user_attr("attempts", attempts)
        shown = " ".join(self.plan.flags(trial.params))
        again = "" if attempts == 1 else ", again"
        print(
            f"[{trial.number + 1}/{self.options.trials}] trial {trial.number}{again}: {shown}", flush=True
        )
        began = time.monotonic()
        try:
            status, last, pruned = self._execute(trial)
            if self.child.asked:
                trial.set_user_attr("attempts", attempts - 1)  # it was stopped, not lost
                return
            seconds = float(trial.user_attrs.get("seconds", 0.0)) + time.monotonic() - began
            trial.set_user_attr("seconds", round(seconds, 1))
            if pruned:
                self._tell(trial, None, TrialState.PRUNED)
            elif status:
                self._tell(trial, None, TrialState.FAIL, last or f"exit status {status}")
            else:
                self._tell(trial, final(self._folder(trial.number), self.plan.value), TrialState.COMPLETE)
        except DataError as error:
            self._tell(trial, None, TrialState.FAIL, str(error))
        except OSError as error:
            reason = ": ".join(filter(None, [error.strerror, error.filename]))
            self._tell(trial, None, TrialState.FAIL, reason)

    def _tell(self, trial: Trial, value: float | None, state: Any, reason: str = "") -> None:
        if reason:
            trial.set_user_attr("reason", reason)
        self._study(trial.number).tell(trial.number, value, state)
        words = {"COMPLETE": f"{self.plan.value} {value}", "PRUNED": "stopped early"}
        said = words.get(
            state.name, f"failed: {reason}; its output is in {self._path(trial.number, 'log')}"
        )
        print(printable(f"  trial {trial.number}: {said}"), flush=True)

    def _execute(self, trial: Trial) -> tuple[int, str, bool]:
        """Run the process of a trial; return its status, its last line, and whether it was pruned."""
        ended, pruned = threading.Event(), threading.Event()
        watch = threading.Thread(target=self._watch, args=(trial, ended, pruned), daemon=True)
        watch.start()
        try:
            with self._path(trial.number, "running").open("a") as mark:
                _wait_for(mark)
                status, last = self.child.run(
                    self._command(trial), self._path(trial.number, "log"), os.environ,
                    self.options.verbose, [mark.fileno()],
                )  # fmt: skip
        finally:
            ended.set()
            watch.join()
        # A process that was asked to stop may have come to its end just before.
        return status, last, pruned.is_set() and status in _STOPPED

    def _command(self, trial: Trial) -> list[str]:
        folder = self._folder(trial.number)
        if self.plan.command == "pretrain" and folder.exists():
            if any(folder.glob("checkpoints/*")):
                return [*PROGRAM, "pretrain", "--resume", str(folder)]
            shutil.rmtree(folder)  # killed before its first checkpoint
        return [*PROGRAM, *self.plan.trial(trial.params), "--out", str(folder)]

    def _watch(self, trial: Trial, ended: threading.Event, pruned: threading.Event) -> None:
        """Report each score as it comes, and stop the process where the pruner says so."""
        known = set(self._study(trial.number).get_trials(deepcopy=False)[trial.number].intermediate_values)
        while not ended.wait(LOOK):
            for step, score in points(self._folder(trial.number), self.plan.value):
                if step in known:
                    continue
                known.add(step)
                trial.report(score, step)
                if trial.should_prune() and not ended.is_set():
                    pruned.set()
                    self.child.stop()
                    return

    def _folder(self, number: int) -> Path:
        return self.options.out / TRIALS / f"{number:04d}"

    def _path(self, number: int, ending: str) -> Path:
        return self.options.out / TRIALS / f"{number:04d}.{ending}"


def _wait_for(mark: TextIO) -> None:
    """Wait until no process has the file of a trial open, and lock it for the one to come.

    The process of a worker that was killed saves and ends by itself, but not at once.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        return
    with contextlib.suppress(OSError):  # not on this file system
        fcntl.flock(mark, fcntl.LOCK_EX)
