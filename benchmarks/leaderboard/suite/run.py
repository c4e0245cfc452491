"""Does the jobs of a leaderboard: on one machine, or on as many as share its folder."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ssl3d.api import (
    UsageError,
    record_files,
    unpacked_place,
    write_whole,
)
from ssl3d_benchmarks import locks
from ssl3d_benchmarks.leaderboard.suite.check import check
from ssl3d_benchmarks.leaderboard.suite.plan import Job, Places, SuitePlan
from ssl3d_benchmarks.leaderboard.suite.suite import load_suite

FRONT = (sys.executable, "-m", "ssl3d")
REQUEUES = 100
"""How often a worker is queued again when its time is over."""


@dataclass(frozen=True)
class RunOptions:
    """Does the jobs of a suite: stores, pretraining, scores. What is done is not done again.

    Attributes:
        suite: Name of a built-in suite, or a YAML file.
        out: Folder for the records, one folder per task.
        data_root: Where the data lives that the suite names; $SSL3D_DATA if left out.
        work: Folder for stores and runs; OUT/work if left out.
        only: Patterns of names of runs and tasks to do; what they need is done too.
        seeds: Seeds of pretraining to do; those of the suite if left out.
        launch: Words in front of `ssl3d` for pretraining, such as "torchrun --nproc-per-node 4 -m".
        slurm: Workers to put into SLURM's queue instead of working here.
        slurm_options: KEY=VALUE for submitit, such as slurm_partition=gpu gpus_per_node=1 timeout_min=600.
        cluster: What submitit submits to: slurm, or local (processes of this machine).
        report: Write OUT/report when the jobs are done, as `ssl3d leaderboard report OUT` does.
        dry_run: Print the commands and do nothing.
        verbose: Show what the jobs print.
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
        """Checks every field."""
        if self.slurm < 0:
            raise ValueError(f"slurm is {self.slurm}, must be 0 or more")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds are {self.seeds}: numbers from 0")
        if self.cluster not in ("slurm", "local"):
            raise ValueError(f"cluster: {self.cluster!r} is none of slurm, local")


def run(options: RunOptions) -> int:
    """Does what is left of a suite, and returns the exit status: 1 if a job failed.

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
        raise UsageError(f"--out {options.out}: {error.strerror}") from error
    if options.slurm:
        return submit(options)
    status = Runner(plan, options.out / ".jobs", options.launch, options.verbose).run()
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


@dataclass
class Runner:
    """One worker: takes a job that is free, does it, looks again.

    Attributes:
        plan: The jobs.
        marks: Folder of what was done: NAME.json, NAME.log, and NAME.lock while in work.
        launch: Words in front of `ssl3d` for pretraining, as in `torchrun --nproc-per-node 4 -m`.
        verbose: Whether a job's output is shown, too.
        began: When; what failed elsewhere since then is not tried again here.
    """

    plan: SuitePlan
    marks: Path
    launch: str = ""
    verbose: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    asked: int = 0
    began: float = field(default_factory=time.time)
    _child: subprocess.Popen[Any] | None = None

    def run(self) -> int:
        """Until nothing is left to do; the exit status."""
        with self._signals():
            self._settle(say=False)
            count = len(self.plan.jobs)
            print(
                f"{self.plan.suite.name}: {count} jobs, {len(self.done)} done before"
                f"{'' if not self.skipped else f', {len(self.skipped)} cannot be done here'}", flush=True,
            )  # fmt: skip
            for name, why in self.skipped.items():
                print(f"skipped {name}: {why}", flush=True)
            waiting = False
            while not self.asked:
                job = self._free()
                if job is None:
                    if not self._left():
                        break
                    if not waiting:
                        print("the rest is in the hands of others: waiting", flush=True)
                    waiting = True
                    time.sleep(locks.WAIT)
                    self._settle()
                    continue
                waiting = False
                self._do(job)
                self._settle()
        return self._end()

    def _end(self) -> int:
        if self.asked:
            name = signal.Signals(self.asked).name
            print(f"stopped by {name}; the same command goes on where it was", flush=True)
            return 128 + self.asked
        settled = self.done | set(self.failed) | set(self.skipped)
        left = [job for job in self.plan.jobs if job.name not in settled]
        print(f"{len(self.done)} of {len(self.plan.jobs)} jobs done", flush=True)
        for name, why in self.failed.items():
            print(f"failed {name}: {why}{self._log(name)}", flush=True)
        for job in left:
            print(f"not done {job.name}: it needs what failed", flush=True)
        if self.skipped and not self.done:
            print("nothing could be done: is --data-root (or $SSL3D_DATA) right?", flush=True)
            return 1
        return 1 if self.failed else 0

    # Which --------------------------------------------------------------------------------------

    def _settle(self, say: bool = True) -> None:
        """Finds out what is done, by anyone, and what cannot be."""
        for job in self.plan.jobs:
            if job.name in self.done or job.name in self.skipped:
                continue
            why = job.missing
            for need in job.needs:
                why = why or self.skipped.get(need, "")
            if why:
                self.skipped[job.name] = why if not job.missing else f"{why} is missing"
            elif all(need in self.done for need in job.needs):
                self._look(job)

    def _look(self, job: Job) -> None:
        """Notes whether a job whose time has come is done, by anyone, or cannot be."""
        try:
            why = job.difference()
            done = not why and self._is_done(job)
            if not why and not done and job.name not in self.failed:
                why = self._failed_elsewhere(job)
        except Exception as error:  # a card that cannot be read, say: it ends this job, not the worker
            why, done = _line(error), False
        if done:
            self.done.add(job.name)
            self.failed.pop(job.name, None)  # another worker had more luck
        elif why and self.failed.get(job.name) != why:
            self.failed[job.name] = why
            print(f"failed {job.name}: {why}", flush=True)

    def _is_done(self, job: Job) -> bool:
        if job.product is not None:
            return job.product.exists()
        mark = self._mark(job)
        return mark.get("state") == "done" and mark.get("digest") == job.digest()

    def _failed_elsewhere(self, job: Job) -> str:
        """Why the same job failed since this worker began: it would here, too. A new start tries again."""
        mark = self._mark(job)
        if mark.get("state") != "failed" or mark.get("digest") != job.digest():
            return ""
        try:
            ended = datetime.fromisoformat(mark["ended"]).timestamp()
        except (KeyError, TypeError, ValueError):
            return ""
        return f"{mark.get('why')} (on {mark.get('host')})" if ended > self.began else ""

    def _left(self) -> list[Job]:
        """Not done, and could be: nothing that it needs has failed."""
        lost = set(self.failed) | set(self.skipped)
        left = []
        for job in self.plan.jobs:
            if job.name in self.done or job.name in lost:
                continue
            if any(need in lost for need in job.needs):
                lost.add(job.name)
                continue
            left.append(job)
        return left

    def _free(self) -> Job | None:
        """The first job that can be done now and that nobody has in hand; it is taken."""
        left = self._left()
        waited_for = {job.name for job in left}
        for job in left:
            if not all(need in self.done for need in job.needs) or waited_for.intersection(job.after):
                continue
            lock = self._path(job.name, "lock")
            if locks.take(lock):
                self._look(job)  # another may have done it, just before it was taken
                if job.name not in self.done and job.name not in self.failed:
                    return job
                locks.release(lock)
        return None

    # Doing --------------------------------------------------------------------------------------

    def _do(self, job: Job) -> None:
        """One job that was taken, from its lock to its mark."""
        number = len(self.done) + len(self.failed) + 1
        of = len(self.plan.jobs) - len(self.skipped)
        print(f"[{number}/{of}] {_clock()} {job.name}{self._forecast(job)}", flush=True)
        with locks.holding(self._path(job.name, "lock")):  # until the mark says that it is done
            self._do_held(job)

    def _do_held(self, job: Job) -> None:
        began = time.time()
        status, why = 1, ""
        digest = ""
        words: list[str] = []
        try:
            digest = job.digest()
            words = job.command()
            if job.made and not job.begun():
                job.made.note()
            status, why = self._execute(job, words)
        except OSError as error:  # a full disk
            why = f"{error.strerror}: {error.filename}"
        except Exception as error:
            why = _line(error)
        seconds = time.time() - began
        if self.asked:
            return
        if status == 0 and job.product is not None and not job.product.exists():
            status, why = 1, f"ended well, but {job.product} is not there"
        state = "failed" if status else "done"
        mark = {
            "job": job.name, "state": state, "digest": digest, "seconds": round(seconds, 1),
            "host": socket.gethostname(),
            "ended": datetime.now().astimezone().isoformat(timespec="milliseconds"),
            "command": words, "why": why,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            self._write(job, mark)
        if status:
            self.failed[job.name] = why
            print(f"    failed after {_span(seconds)}: {why}{self._log(job.name)}", flush=True)
        else:
            self.done.add(job.name)
            self.seconds.setdefault(job.kind, []).append(seconds)
            print(f"    done in {_span(seconds)}", flush=True)

    def _environment(self) -> dict[str, str]:
        """Of the jobs: an encoder's file that a run of the suite names is known where it is scored, too."""
        named = [os.environ.get("SSL3D_PLUGINS", ""), *self.plan.plugin_files()]
        return {**os.environ, "SSL3D_PLUGINS": ",".join(filter(None, named))}

    def _execute(self, job: Job, words: list[str]) -> tuple[int, str]:
        """Runs the command; its status, and the last line it said if it is not 0."""
        front: tuple[str, ...] = FRONT
        if self.launch and job.kind == "pretrain":
            front = (*shlex.split(self.launch), "ssl3d")
        argv = [*front, *words]
        log = self._path(job.name, "log")
        with log.open("a", encoding="utf-8") as file:
            print(f"$ {shlex.join(argv)}", file=file, flush=True)
            # A session of its own: Ctrl-C reaches this process, which hands it on once.
            self._child = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                errors="replace", start_new_session=True, preexec_fn=_die_with(os.getpid()),
                env=self._environment(),
            )  # fmt: skip
            try:
                if self.asked:  # just before there was a job to hand it on to
                    os.killpg(self._child.pid, signal.SIGTERM)
                last = ""
                assert self._child.stdout is not None
                for line in self._child.stdout:
                    file.write(line)
                    file.flush()
                    last = line.strip() or last
                    if self.verbose:
                        print("    " + line, end="", flush=True)
                status = self._child.wait()
            finally:
                if self._child.poll() is None:  # its log cannot be written: nobody would hear of it
                    os.killpg(self._child.pid, signal.SIGTERM)
                    self._child.communicate()
                self._child = None
        if status < 0:
            last = f"killed by signal {-status} (out of memory?); {last}"
        return status, last.removeprefix("ssl3d: ")

    def _forecast(self, job: Job) -> str:
        """How long the jobs of this kind took."""
        before = self.seconds.get(job.kind)
        return f" (such jobs took {_span(sum(before) / len(before))})" if before else ""

    # Marks --------------------------------------------------------------------------------------

    def _path(self, name: str, kind: str) -> Path:
        return self.marks / f"{name.replace(':', '__')}.{kind}"

    def _log(self, name: str) -> str:
        path = self._path(name, "log")
        return f"; log: {path}" if path.exists() else ""

    def _mark(self, job: Job) -> dict[str, Any]:
        try:
            found = json.loads(self._path(job.name, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, job: Job, mark: dict[str, Any]) -> None:
        path = self._path(job.name, "json")
        write_whole(path, json.dumps(mark, indent=1) + "\n")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """A signal goes to the job in work, which saves and ends; then this ends."""

        def hand_on(signum: int, frame: Any) -> None:
            self.asked = self.asked or signum
            child = self._child
            if child is not None:
                with contextlib.suppress(ProcessLookupError):
                    # submitit's signal tells workers that their time is over; jobs do not know it.
                    os.killpg(child.pid, signal.SIGTERM if signum == signal.SIGUSR2 else signum)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        before = {number: signal.signal(number, hand_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _die_with(parent: int) -> Callable[[], None] | None:
    """On Linux, has the job told to save and end when this process is killed: another will take it up."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded here: little is safe between fork and exec

    def prepare() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM sends it to every process of a step
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # killed in between
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


def submit(options: RunOptions) -> int:
    """Puts workers into SLURM's queue; each runs this command and takes what is free.

    Raises:
        UsageError: submitit is not installed, or SLURM is not there.
    """
    try:
        import submitit
    except ImportError as error:
        raise UsageError('--slurm needs submitit: pip install "ssl3d[slurm]"') from error
    given: dict[str, Any] = {}
    for text in options.slurm_options:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--slurm-options {text}: expected KEY=VALUE, as in partition=gpu")
        given[key] = int(value) if value.isdigit() else value
    folder = options.out / ".jobs" / "slurm"
    try:
        executor = submitit.AutoExecutor(folder, options.cluster, slurm_max_num_timeout=REQUEUES)
    except RuntimeError as error:
        raise UsageError(f"--slurm {options.slurm}: {error}") from error
    executor.update_parameters(name=f"ssl3d-{Path(options.suite).stem}", **given)
    with executor.batch():
        jobs = [executor.submit(Worker(replace(options, slurm=0))) for _ in range(options.slurm)]
    for job in jobs:
        print(f"submitted {job.job_id}")
    return 0


@dataclass(frozen=True)
class Worker:
    """What submitit calls: one worker, which is queued again when its time is over.

    Attributes:
        options: Those of the command, without SLURM.
    """

    options: RunOptions

    def __call__(self) -> None:
        """Does what is free until nothing is left, or until a signal comes.

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
        """What submitit queues when the time is over: the same, for the files tell what is done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _line(error: Exception) -> str:
    """An error in one line; of what kind it is, where its text was not written for people."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UsageError) else f"{type(error).__name__}: {text}"


def _clock() -> str:
    return datetime.now().strftime("%H:%M")


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
