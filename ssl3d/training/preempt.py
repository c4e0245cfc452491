"""Signals that ask a run to stop: noted, and acted upon at the end of the step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

ONCE = 1.0
"""Seconds in which a signal that comes again is the same one, handed on by `timeout` or torchrun too."""
SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n))


class Preemption:
    """Context in which SIGTERM, SIGUSR1 and SIGINT are noted instead of ending the process.

    Attributes:
        signum: Number of the signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._owner = os.getpid()
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        """Install the handlers; does nothing outside the main thread, where Python allows none."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and time.monotonic() - self._since < ONCE:
            return
        if os.getpid() != self._owner or self.signum:
            # Forked workers inherit this handler. A signal to the whole process group must leave them
            # alive until the step is done, and a second one ends them, or an impatient user's run.
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
            if os.getpid() == self._owner:
                os.kill(self._owner, signum)
            return
        self.signum, self._since = signum, time.monotonic()


class Stopped(BaseException):
    """A signal asks the command to end, where no loop notes it.

    Attributes:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Stoppable:
    """Context in which SIGTERM and SIGUSR1 raise `Stopped`, so that files are closed and removed."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}
        self._ignored = sys.unraisablehook

    def __enter__(self) -> Stoppable:
        """Install the handlers; does nothing outside the main thread, where Python allows none."""
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in SIGNALS if number != signal.SIGINT]  # which Python raises itself
            # A handler that is not the system's own is somebody's who knows better.
            ours = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
            self._before = {number: signal.signal(number, self._raise) for number in ours}
            self._ignored, sys.unraisablehook = sys.unraisablehook, self._raise_again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the former handlers back."""
        sys.unraisablehook = self._ignored
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)  # a second one ends what does not end by itself
        if os.getpid() != self._owner:  # a worker that was forked: nobody catches it there
            os.kill(os.getpid(), signum)
            return
        raise Stopped(signum)

    def _raise_again(self, ignored: sys.UnraisableHookArgs) -> None:
        """Send a signal once more whose exception was raised where Python drops it, in a callback."""
        if isinstance(ignored.exc_value, Stopped):
            number = ignored.exc_value.signum
            signal.signal(number, self._raise)
        elif isinstance(ignored.exc_value, KeyboardInterrupt):
            number = signal.SIGINT
        else:
            self._ignored(ignored)
            return
        # After this hook, in which it would be dropped as well.
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()


def name_of(signum: int) -> str:
    """Return the name of a signal, as in SIGTERM."""
    return signal.Signals(signum).name


def requeue() -> str:
    """Put a SLURM job back into the queue; return in words what was done, or why not, empty off SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return ""
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)} failed: {error}"
    if done.returncode:
        return f"{' '.join(command)} failed: {' '.join(done.stderr.split())}"
    return f"SLURM job {job} is queued again"


def restarted() -> list[str]:
    """List the variables that name this job where it was started again: by SLURM, or by torchrun.

    torchrun calls every job "none" that was given no name (by --standalone or --rdzv-id): such a name tells
    no run from another.
    """
    variables = []
    if int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0) > 0:
        variables.append("SLURM_JOB_ID")
    named = os.environ.get("TORCHELASTIC_RUN_ID", "none") != "none"
    if named and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0) > 0:
        variables.append("TORCHELASTIC_RUN_ID")
    return variables
