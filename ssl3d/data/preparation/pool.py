"""Worker processes that may die: their task is tried again alone, and no other is lost.

`concurrent.futures` gives up the whole pool when the system kills one worker for memory.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from ssl3d.errors import is_transient, reason_of

T = TypeVar("T")
R = TypeVar("R")


class Died:
    """Result of a task whose worker died or raised.

    Args:
        reason: Description of what happened.
        transient: Whether it says nothing of the task: memory, disk, descriptors, network, a kill.
        crashed: Whether the worker's own code ended it (SIGSEGV and the like): the task may be to blame.
    """

    def __init__(self, reason: str, transient: bool = False, crashed: bool = False):
        self.reason = reason
        self.transient = transient
        self.crashed = crashed


def run(
    function: Callable[[T], R],
    tasks: Iterator[T],
    workers: int,
    start: Callable[[], None] | None = None,
    alone: Callable[[T], T] = lambda task: task,
) -> Iterator[tuple[T, R | Died]]:
    """Apply a function to tasks in worker processes; results come as they are ready.

    A task is drawn from `tasks` when a worker is free for it, so memory is bounded by the workers. One that
    fails by no fault of its own, or crashes its worker, is tried once more at the end, alone; if it crashes
    again, it is to blame.

    Args:
        function: Function that can be imported by name.
        tasks: Tasks, drawn one by one in this process.
        workers: Number of processes; 0 works in this one.
        start: Function that is called once in every worker.
        alone: Function that returns a task as it is tried again, when no other runs beside it.

    Raises:
        OSError: No worker can be started, for want of memory or descriptors.
    """
    again: list[T] = []
    for task, result in _once(function, tasks, workers, start):
        if isinstance(result, Died) and (result.transient or result.crashed):
            again.append(task)
        else:
            yield task, result
    for task in again:
        yield from _once(function, iter([alone(task)]), min(workers, 1), start)


def _once(
    function: Callable[[T], R],
    tasks: Iterator[T],
    workers: int,
    start: Callable[[], None] | None = None,
) -> Iterator[tuple[T, R | Died]]:
    """Apply a function to each task once, as `run` does."""
    if workers <= 0:
        if start is not None:
            start()
        for task in tasks:
            yield task, _result_of(function, task)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    idle: list[_Worker] = []
    busy: dict[Any, tuple[_Worker, T]] = {}
    exhausted = False
    try:
        while True:
            while not exhausted and len(busy) < workers:
                task = next(tasks, _END)
                if task is _END:
                    exhausted = True
                    break
                worker = _sent(task, idle) or _sent(task, [_Worker(context, function, start)])
                if worker is None:
                    raise ChildProcessError(errno.EAGAIN, "workers do not start")
                busy[worker.connection] = (worker, task)
            if not busy:
                return
            for ready in wait(list(busy)):
                worker, done = busy.pop(ready)
                try:
                    result = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    yield done, _death(worker.process.exitcode)
                    continue
                idle.append(worker)
                yield done, result
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.stop()


_END: Any = object()


def _sent(task: Any, idle: list[_Worker]) -> _Worker | None:
    """Send the task to an idle worker, and return the worker; those found dead are dropped."""
    while idle:
        worker = idle.pop()
        try:
            worker.connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            worker.process.join()
            continue
        return worker
    return None


class _Worker:
    def __init__(self, context: Any, function: Callable[..., Any], start: Callable[[], None] | None):
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, function, start, os.getpid()), daemon=True
        )
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def _serve(
    connection: Connection, function: Callable[..., Any], start: Callable[[], None] | None, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Readers in C print about damaged files, past Python; the parent reports those by name.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    if start is not None:
        start()
    while True:
        # Brothers hold copies of the parent's end, so its death does not close the pipe: look for it.
        while not connection.poll(1.0):
            if os.getppid() != parent:
                os._exit(1)
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_result_of(function, task))


def _result_of(function: Callable[[T], R], task: T) -> R | Died:
    try:
        return function(task)
    except Exception as error:  # reported by the caller, with the task's name
        if is_transient(error):
            return Died(reason_of(error), transient=True)
        return Died(f"{type(error).__name__}: {reason_of(error)[:300]}")


def _death(code: int | None) -> Died:
    if code is None or code >= 0:
        return Died(f"the worker ended with status {code}", transient=True)
    name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else str(-code)
    crashed = name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
    hint = ", perhaps out of memory: fewer --workers" if name == "SIGKILL" else ""
    return Died(f"the worker was killed by {name}{hint}", transient=not crashed, crashed=crashed)
