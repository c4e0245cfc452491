"""Does the jobs of a leaderboard: on one machine, or on as many as share its folder."""

from __future__ import annotations

import os
import shlex
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ssl3d.api import UsageError, not_written, record_files, submit_jobs, unpacked_place
from ssl3d_benchmarks.leaderboard.suite.check import check
from ssl3d_benchmarks.leaderboard.suite.commands import Places
from ssl3d_benchmarks.leaderboard.suite.jobs import Job
from ssl3d_benchmarks.leaderboard.suite.plan import SuitePlan
from ssl3d_benchmarks.leaderboard.suite.runner import Runner
from ssl3d_benchmarks.leaderboard.suite.suite import load_suite


@dataclass(frozen=True)
class RunOptions:
    """Do the jobs of a suite: stores, pretraining, scores. What is done is not done again.

    Attributes:
        suite: Name of a built-in suite, or a YAML file.
        out: Folder for the records, with one folder for each task.
        data_root: Folder of the data that the suite names; $SSL3D_DATA if left out.
        work: Folder for stores and runs; OUT/work if left out.
        only: Patterns of names of runs and tasks to do. The jobs that they need are done too.
        seeds: Seeds of pretraining to do; those of the suite if left out.
        launch: Words in front of `ssl3d` for pretraining, such as "torchrun --nproc-per-node 4 -m".
        slurm: Number of workers to put into SLURM's queue instead of working here.
        slurm_options: Options of submitit as KEY=VALUE, such as slurm_partition=gpu gpus_per_node=1
            timeout_min=600.
        cluster: Cluster that submitit submits to: slurm, or local (processes of this machine).
        report: Whether `ssl3d leaderboard report` writes OUT/report when the jobs are done.
        dry_run: Whether the commands are printed and nothing is done.
        verbose: Whether the output of the jobs is shown.
    """

    suite: str = field(metadata={"positional": True})
    out: Path = Path("runs/leaderboard")
    data_root: Path | None = None
    work: Path | None = None
    only: tuple[str, ...] = ("*",)
    seeds: tuple[int, ...] = ()
    launch: str = ""
    slurm: int = 0
    slurm_options: tuple[str, ...] = ()
    cluster: str = "slurm"
    report: bool = True
    dry_run: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        if self.slurm < 0:
            raise ValueError(f"slurm is {self.slurm}, must be 0 or more")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds are {self.seeds}, must be 0 or more")
        if self.cluster not in ("slurm", "local"):
            raise ValueError(f"cluster is {self.cluster!r}, must be slurm or local")


def run(options: RunOptions) -> int:
    """Do what is left of a suite, and return the exit status: 1 if a job failed.

    Raises:
        UsageError: The suite, or the root of the data, is not there.
    """
    suite = load_suite(options.suite)
    if options.seeds:
        suite = replace(suite, seeds=tuple(dict.fromkeys(options.seeds)))
    root = options.data_root or Path(os.environ.get("SSL3D_DATA", "."))
    if options.data_root and not root.is_dir():
        raise UsageError(f"--data-root {root}: no such folder")
    places = Places(root, options.work or options.out / "work", options.out)
    plan = SuitePlan(suite, places, options.only)
    check(plan)
    if options.dry_run:
        for job in plan.jobs:
            print(f"{job.name}: {_shown(job)}")
        return 0
    try:
        (options.out / ".jobs").mkdir(parents=True, exist_ok=True)
        places.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(error, f"--out {options.out}: {error.strerror}") from error
    if options.slurm:
        return submit(options)
    status = Runner(
        suite.name, plan.jobs, options.out / ".jobs", options.launch, options.verbose,
        plan.commands.plugin_files(),
    ).run()  # fmt: skip
    records = (unpacked_place(path).parent.parent == options.out for path in record_files(options.out))
    if status < 128 and options.report and any(records):
        from ssl3d_benchmarks.leaderboard.report.output import ReportOptions, report

        title = f"Leaderboard {suite.name}"
        report(ReportOptions((options.out,), options.out / "report", title, suite.published))
    return status


def _shown(job: Job) -> str:
    try:
        return f"ssl3d {shlex.join(job.command())}"
    except (FileNotFoundError, UsageError):  # its length is not measured yet
        return f"({job.kind}, after {', '.join(job.needs)})"


def submit(options: RunOptions) -> int:
    """Put workers into SLURM's queue; each runs this command and takes what is free.

    Raises:
        UsageError: submitit is not installed, or SLURM is not there.
    """
    works = [Worker(replace(options, slurm=0))] * options.slurm
    folder, name = options.out / ".jobs" / "slurm", f"ssl3d-{Path(options.suite).stem}"
    for job in submit_jobs(works, folder, name, options.slurm_options, options.cluster):
        print(f"submitted {job}")
    return 0


@dataclass(frozen=True)
class Worker:
    """A worker as submitit calls it, which is queued again when its time is over.

    Attributes:
        options: Options of the command, without SLURM.
    """

    options: RunOptions

    def __call__(self) -> None:
        """Do what is free until nothing is left, or until a signal comes.

        Raises:
            SystemExit: A job failed, or a signal came.
        """
        status = run(self.options)
        if status > 128:
            # The job in work has saved; now submitit's handler, whose place the runner's had taken.
            handler = signal.getsignal(status - 128)
            if callable(handler):
                handler(status - 128, None)
        if status:
            raise SystemExit(status)

    def checkpoint(self) -> Any:
        """Return what submitit queues when the time is over: the same, for the files tell what is done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
