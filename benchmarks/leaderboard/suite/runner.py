"""A worker: takes a job that is free, does it, and looks again, beside any number of other workers."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ssl3d.api import UsageError, locks
from ssl3d_benchmarks.child import Child
from ssl3d_benchmarks.leaderboard.suite.jobs import Job
from ssl3d_benchmarks.leaderboard.suite.marks import Marks

FRONT = (sys.executable, "-m", "ssl3d")
"""Words in front of a job's command."""


@dataclass
class Runner:
    """A worker that does the jobs of a suite.

    Attributes:
        name: Name of the suite.
        jobs: Jobs, in an order in which they can be done.
        folder: Folder of the marks of what was done.
        launch: Words in front of `ssl3d` for pretraining, as in `torchrun --nproc-per-node 4 -m`.
        verbose: Whether a job's output is shown, too.
        plugin_files: Files of encoders that the suite's runs name, which every job has to know.
        failed: Reasons of the jobs that failed, by name.
        skipped: Reasons of the jobs that cannot be done here, by name.
        done: Names of the jobs that are done, by anyone.
        seconds: Durations of the jobs that this worker did, by kind.
        began: Time of the start; what failed elsewhere since then is not tried again here.
    """

    name: str
    jobs: list[Job]
    folder: Path
    launch: str = ""
    verbose: bool = False
    plugin_files: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        """Make the marks and the process of a job."""
        self.marks, self.child = Marks(self.folder), Child()

    def run(self) -> int:
        """Do jobs until nothing is left to do; return the exit status."""
        with self.child.signals():
            self._settle()
            skipped = f", {len(self.skipped)} cannot be done here" if self.skipped else ""
            print(f"{self.name}: {len(self.jobs)} jobs, {len(self.done)} done before{skipped}", flush=True)
            for name, why in self.skipped.items():
                print(f"skipped {name}: {why}", flush=True)
            waiting = False
            while not self.child.asked:
                job = self._free()
                if job is None:
                    if not self._left():
                        break
                    if not waiting:
                        print("other workers do the rest: waiting for them", flush=True)
                    waiting = True
                    time.sleep(locks.WAIT)
                else:
                    waiting = False
                    self._do(job)
                self._settle()
        return self._end()

    def _end(self) -> int:
        if self.child.asked:
            name = signal.Signals(self.child.asked).name
            print(f"stopped by {name}; the same command goes on where it was", flush=True)
            return 128 + self.child.asked
        settled = self.done | set(self.failed) | set(self.skipped)
        print(f"{len(self.done)} of {len(self.jobs)} jobs done", flush=True)
        for name, why in self.failed.items():
            print(f"failed {name}: {why}{self.marks.log_hint(name)}", flush=True)
        for job in self.jobs:
            if job.name not in settled:
                print(f"not done {job.name}: it needs a job that failed", flush=True)
        if self.skipped and not self.done:
            print("nothing could be done: is --data-root (or $SSL3D_DATA) right?", flush=True)
            return 1
        return 1 if self.failed else 0

    # Which --------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Find out what is done, by anyone, and what cannot be."""
        for job in self.jobs:
            if job.name in self.done or job.name in self.skipped:
                continue
            why = next((self.skipped[need] for need in job.needs if self.skipped.get(need)), "")
            if job.missing:
                why = f"{job.missing} is missing"
            if why:
                self.skipped[job.name] = why
            elif all(need in self.done for need in job.needs):
                self._look(job)

    def _look(self, job: Job) -> None:
        """Note whether a job whose time has come is done, by anyone, or cannot be."""
        try:
            why = job.difference()
            done = not why and self.marks.is_done(job)
            if not why and not done and job.name not in self.failed:
                # It would fail here, too. A new start tries again.
                why = self.marks.failure_since(job, self.began)
        except Exception as error:  # a card that cannot be read, say: it ends this job, not the worker
            why, done = _line(error), False
        if done:
            self.done.add(job.name)
            self.failed.pop(job.name, None)  # another worker had more luck
        elif why and self.failed.get(job.name) != why:
            self.failed[job.name] = why
            print(f"failed {job.name}: {why}", flush=True)

    def _left(self) -> list[Job]:
        """List the jobs that are not done and could be: nothing that they need has failed."""
        lost = set(self.failed) | set(self.skipped)
        left = []
        for job in self.jobs:
            if job.name in self.done or job.name in lost:
                continue
            if any(need in lost for need in job.needs):
                lost.add(job.name)
                continue
            left.append(job)
        return left

    def _free(self) -> Job | None:
        """Take the first job that can be done now and that nobody has in hand."""
        left = self._left()
        waited_for = {job.name for job in left}
        for job in left:
            if not all(need in self.done for need in job.needs) or waited_for.intersection(job.after):
                continue
            lock = self.marks.path(job.name, "lock")
            if locks.take(lock):
                self._look(job)  # another may have done it, just before it was taken
                if job.name not in self.done and job.name not in self.failed:
                    return job
                locks.release(lock)
        return None

    # Doing --------------------------------------------------------------------------------------

    def _do(self, job: Job) -> None:
        """Do a job that was taken, from its lock to its mark."""
        number = len(self.done) + len(self.failed) + 1
        count = len(self.jobs) - len(self.skipped)
        print(f"[{number}/{count}] {_clock()} {job.name}{self._forecast(job)}", flush=True)
        with locks.holding(self.marks.path(job.name, "lock")):  # until the mark says that it is done
            self._do_held(job)

    def _do_held(self, job: Job) -> None:
        began = time.monotonic()
        status, why = 1, ""
        digest = ""
        words: list[str] = []
        try:
            digest = job.digest()
            words = job.command()
            if job.provenance and not job.begun():
                job.provenance.note()
            status, why = self._execute(job, words)
        except OSError as error:  # a full disk, which names no file
            why = ": ".join(filter(None, [error.strerror, error.filename]))
        except Exception as error:
            why = _line(error)
        if self.child.asked:
            return
        if status == 0 and job.product is not None and not job.product.exists():
            status, why = 1, f"ended well, but {job.product} is not there"
        seconds = time.monotonic() - began
        with contextlib.suppress(OSError):
            self.marks.write(job, {
                "job": job.name, "state": "failed" if status else "done", "digest": digest,
                "seconds": round(seconds, 1), "host": socket.gethostname(),
                "ended": datetime.now().astimezone().isoformat(timespec="milliseconds"),
                "command": words, "why": why,
            })  # fmt: skip
        self._count(job, status, why, seconds)

    def _count(self, job: Job, status: int, why: str, seconds: float) -> None:
        if status:
            self.failed[job.name] = why
            print(f"    failed after {_span(seconds)}: {why}{self.marks.log_hint(job.name)}", flush=True)
        else:
            self.done.add(job.name)
            self.seconds.setdefault(job.kind, []).append(seconds)
            print(f"    done in {_span(seconds)}", flush=True)

    def _execute(self, job: Job, words: list[str]) -> tuple[int, str]:
        """Run a job's command; return its status, and the last line it printed."""
        front: tuple[str, ...] = FRONT
        if self.launch and job.kind == "pretrain":
            front = (*shlex.split(self.launch), "ssl3d")
        # An encoder's file that a run of the suite names is known where it is scored, too.
        plugins = ",".join(filter(None, [os.environ.get("SSL3D_PLUGINS", ""), *self.plugin_files]))
        environment = {**os.environ, "SSL3D_PLUGINS": plugins}
        status, last = self.child.run(
            [*front, *words], self.marks.path(job.name, "log"), environment, self.verbose
        )
        return status, last.removeprefix("ssl3d: ")

    def _forecast(self, job: Job) -> str:
        """Say how long the jobs of a kind took."""
        before = self.seconds.get(job.kind)
        return f" (such jobs took {_span(sum(before) / len(before))})" if before else ""


def _line(error: Exception) -> str:
    """Write an error in one line; with its kind, where its text was not written for people."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UsageError) else f"{type(error).__name__}: {text}"


def _clock() -> str:
    return datetime.now().strftime("%H:%M")


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
