"""Reports of a run: metrics.jsonl, pictures, train.log, and a line on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ssl3d.amounts import duration
from ssl3d.files import whole_file, write_whole
from ssl3d.json_files import parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.training.loggers import Loggers

METRICS = "metrics.jsonl"


class Log:
    """Lines for the user, on the terminal and in `train.log`; other ranks than 0 only warn.

    Args:
        on: Whether this is rank 0.
        stream: Stream that lines go to beside the file; standard output by default.
    """

    def __init__(self, on: bool = True, stream: TextIO | None = None) -> None:
        self.on = on
        self.stream = stream or sys.stdout
        self.before = 0  # width of the progress line to wipe
        self._held: list[str] = []
        self._file: TextIO | None = None

    def open(self, folder: Path) -> None:
        """Start writing to the run's `train.log`, with what was said so far."""
        if self.on:
            self._file = (folder / "train.log").open("a", encoding="utf-8")
            for line in self._held:
                self._record(line)
            self._held = []

    def say(self, line: str) -> None:
        """Print a line, and write it to the file."""
        if not self.on:
            return
        self.wipe()
        print(line, file=self.stream, flush=True)
        self.note(line)

    def warn(self, line: str) -> None:
        """Print a line that another rank may be the only one to know; off rank 0 it goes to stderr."""
        if self.on:
            self.say(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        """Write a line to the file alone."""
        if self.on and self._file is None:
            self._held.append(line)
        elif self.on:
            self._record(line)

    def wipe(self) -> None:
        """Clear the progress line on the terminal."""
        if self.before:
            self.stream.write("\r" + " " * self.before + "\r")
            self.before = 0

    def _record(self, line: str) -> None:
        if self._file is not None:
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file of the log."""
        self.wipe()
        if self._file is not None:
            self._file.close()
            self._file = None


class Monitor:
    """Record of every step in files, and progress on the terminal; only rank 0 has one.

    Args:
        folder: Folder of the run.
        start: Steps already done; later lines and events are dropped, as they will come again.
        total: Steps of the run.
        log_every: Steps between lines off a terminal, and between points in the loggers.
        main: Metrics to show, as in "sorting/kendall_tau".
        log: Log that lines go to.
        loggers: Loggers of the run, which whoever made them closes.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        log_every: int,
        main: list[str],
        log: Log,
        loggers: Loggers | None = None,
    ) -> None:
        self.folder, self.total, self.log_every, self.main, self.log = folder, total, log_every, main, log
        trim(folder / METRICS, start)
        self._metrics = (folder / METRICS).open("a", encoding="utf-8")
        self._loggers = loggers
        self._started, self._start = time.monotonic(), start
        self._shown = 0.0
        self._speed: float | None = None
        self._terminal = log.stream.isatty()

    def step(self, record: Mapping[str, Any]) -> None:
        """Write one line of `metrics.jsonl`, flush it, and show the progress."""
        self._metrics.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")
        self._metrics.flush()
        step = int(record["step"])
        seconds = float(record["seconds"])
        # A moving mean, so that the time left follows a machine whose load changes.
        self._speed = seconds if self._speed is None else 0.95 * self._speed + 0.05 * seconds
        if step % self.log_every == 0 or step == self.total or step == 1:
            if self._loggers is not None:
                self._loggers.scalars({k: v for k, v in record.items() if k not in ("step", "epoch")}, step)
            if not self._terminal:
                self.log.say(self._line(record))
        if self._terminal and (time.monotonic() - self._shown > 0.2 or step == self.total):
            self._shown = time.monotonic()
            self._draw(record)
            if step % self.log_every == 0:
                self.log.note(self._line(record))

    def pictures(self, figures: Mapping[str, Callable[[], Figure]], step: int) -> None:
        """Draw every proxy's picture, into `pictures/` and the loggers."""
        folder = self.folder / "pictures"
        for name, draw in figures.items():
            figure = draw()
            path = folder / f"{name}-{step:08d}.png"
            with whole_file(path) as temporary:
                figure.savefig(temporary, format="png", dpi=100)
            if self._loggers is not None:
                self._loggers.picture(name, figure, path, step)

    def _line(self, record: Mapping[str, Any]) -> str:
        return "  ".join(self._words(record))

    def _words(self, record: Mapping[str, Any]) -> list[str]:
        """Return what a line says, the indispensable first."""
        step = int(record["step"])
        several = len(self.main) > 1  # then a score needs the name of its proxy
        names = {n: n if several else n.split("/", 1)[1] for n in self.main}
        return [
            f"step {step}/{self.total}",
            f"{record['volumes_per_s']:.3g} volumes/s",
            f"{duration((self._speed or 0) * (self.total - step))} left",
            f"loss {record['loss']:.4g}",
            *(f"{names[n]} {record[n]:.3f}" for n in self.main if n in record),
            *(
                f"held out {f'{names[n]} ' if several else ''}{record[f'holdout/{n}']:.3f}"
                for n in self.main
                if f"holdout/{n}" in record
            ),
            f"waiting {100 * record['waiting']:.0f} %",
        ]

    def _draw(self, record: Mapping[str, Any]) -> None:
        """Draw the line of progress, with as many words as the terminal has room for."""
        width = shutil.get_terminal_size().columns - 1
        filled = round(10 * int(record["step"]) / self.total)
        text = f"[{'#' * filled}{'.' * (10 - filled)}]"
        for word in self._words(record):
            if len(text) + 2 + len(word) > width:
                break
            text += f"  {word}"
        text = text[:width]
        self.log.stream.write("\r" + text.ljust(self.log.before))
        self.log.stream.flush()
        self.log.before = len(text)

    def close(self) -> None:
        """Flush and close all files."""
        self._metrics.close()
        self.log.wipe()


def trim(path: Path, step: int) -> None:
    """Drop the lines of `metrics.jsonl` after a step, and a last line that was cut short."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
            if int(parse_json(line)["step"]) <= step:
                kept.append(line + "\n")
    write_whole(path, "".join(kept))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's `metrics.jsonl`, a record each."""
    path = Path(run) / METRICS
    return (
        [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
