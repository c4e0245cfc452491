"""The plan of a suite: the jobs that are wanted, in an order in which they can be done."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ssl3d.api import UsageError
from ssl3d_benchmarks.leaderboard.suite.commands import Places, SuiteCommands, is_phantoms
from ssl3d_benchmarks.leaderboard.suite.jobs import (
    Job,
    ScoreJobs,
    measure_job,
    prepare_job,
    pretrain_job,
)
from ssl3d_benchmarks.leaderboard.suite.suite import Suite


class SuitePlan:
    """The jobs of a suite, in an order in which they can be done.

    Args:
        suite: Suite that is planned.
        places: Folders of its data, stores, runs and records.
        only: Patterns of names of runs and tasks; the jobs that those need are planned too.

    Raises:
        UsageError: A pattern matches nothing, or a store's or task's words name no store.
    """

    def __init__(self, suite: Suite, places: Places, only: Sequence[str] = ("*",)) -> None:
        self.suite, self.places = suite, places
        self.commands = SuiteCommands(suite, places)
        for text in (*suite.runs.values(), *suite.contestants.values(), *(t.options for t in suite.tasks)):
            self.commands.words(text)
        names = [*suite.runs, *(task.name for task in suite.tasks)]
        for pattern in only:
            if not fnmatch.filter(names, pattern):
                raise UsageError(
                    f"--only {pattern}: no such run or task in {suite.name}: {', '.join(names)}"
                )
        jobs = {job.name: job for job in self._all()}
        self.jobs = _in_order(jobs, _needed(jobs, self._wanted(jobs.values(), only)))

    def _all(self) -> Iterator[Job]:
        suite, commands = self.suite, self.commands
        for name, source in suite.stores.items():
            if not is_phantoms(source):
                yield prepare_job(commands, name)
        if suite.budget:
            for name in suite.runs:
                yield measure_job(commands, name)
        for seed in dict.fromkeys((*suite.seeds, suite.first)):
            for name in suite.runs:
                for fold in commands.folds:
                    yield pretrain_job(commands, name, seed, fold)
        for task in suite.tasks:
            yield from ScoreJobs(commands, task).jobs()

    def _wanted(self, jobs: Iterable[Job], only: Sequence[str]) -> Iterator[str]:
        """Name the runs and scores that are asked for by themselves."""
        for job in jobs:
            subject, *more = job.name.split(":")[1:]
            if job.kind not in ("pretrain", "score") or not any(fnmatch.fnmatch(subject, p) for p in only):
                continue
            if job.kind == "score" or int(more[0]) in self.suite.seeds:
                yield job.name


def _needed(jobs: Mapping[str, Job], names: Iterable[str]) -> set[str]:
    """Collect jobs and all that they need, directly or not."""
    needed: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left += jobs[name].needs
    return needed


def _in_order(jobs: Mapping[str, Job], needed: set[str]) -> list[Job]:
    """Sort jobs so that each comes after its needs, and else in the order of the file."""
    ordered: dict[str, Job] = {}

    def place(job: Job) -> None:
        for need in job.needs:  # a run may begin with one that is measured, and made, later in the file
            if need not in ordered:
                place(jobs[need])
        ordered[job.name] = job

    for job in jobs.values():
        if job.name in needed and job.name not in ordered:
            place(job)
    return list(ordered.values())
