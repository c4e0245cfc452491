"""The process of a job: its output goes to a log, and signals are handed on to it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Child:
    """At most one process at a time, which a signal to this one reaches.

    Attributes:
        asked: Number of the signal that came first; 0 if none came.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._process: subprocess.Popen[Any] | None = None

    def run(
        self,
        argv: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        verbose: bool,
        files: Sequence[int] = (),
    ) -> tuple[int, str]:
        """Run a command, to which descriptors of open files are left; return its status and its last line.

        Raises:
            OSError: The command cannot be started, or its log cannot be written.
        """
        with log.open("a", encoding="utf-8") as file:
            print(f"$ {shlex.join(argv)}", file=file, flush=True)
            # A session of its own: Ctrl-C reaches this process, which hands it on once.
            process = self._process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                errors="replace", start_new_session=True, preexec_fn=_die_with(os.getpid()),
                env=dict(environment),
                pass_fds=files,
            )  # fmt: skip
            try:
                if self.asked:  # just before there was a job to hand it on to
                    os.killpg(process.pid, signal.SIGTERM)
                last = ""
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    last = line.strip() or last
                    if verbose:
                        print("    " + line, end="", flush=True)
                status = process.wait()
            finally:
                if process.poll() is None:  # its log cannot be written: nobody would hear of it
                    os.killpg(process.pid, signal.SIGTERM)
                    process.communicate()
                self._process = None
        if status < 0:
            last = f"killed by signal {-status} (out of memory?); {last}"
        return status, last

    def stop(self) -> None:
        """Ask the process, from any thread, to save and end."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Pass signals on to the job in work, which saves and ends; then this process ends."""

        def hand_on(signum: int, frame: Any) -> None:
            self.asked = self.asked or signum
            process = self._process
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    # submitit's signal tells workers that their time is over; jobs do not know it.
                    os.killpg(process.pid, signal.SIGTERM if signum == signal.SIGUSR2 else signum)

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
    """Prepare a job, on Linux, to save and end when this process is killed: another will take it up."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # loaded here: little is safe between fork and exec

    def prepare() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM sends it to every process of a step
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # killed in between
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare
