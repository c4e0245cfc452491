"""The built-in benchmarks: one file, one protocol. Each command is a function too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl3d.api import Result
    from ssl3d_benchmarks.leaderboard_output import Report

Words = str | Path | Sequence[str | Path]


def linear_probe(
    encoder: Words, data: Words = "phantoms", out: str | Path = "runs/linear-probe", **options: Any
) -> list[Result]:
    """Scores frozen encoders by a linear model; the same as `ssl3d linear-probe`.

    Args:
        encoder: Runs, encoder folders, `scratch:...` or `imagenet:...`.
        data: Stores, scans or phantoms[:N].
        out: Folder of the records.
        options: Of the command, with underscores, as in `target="masks", untrained=3`.

    Returns:
        The records, in the order of the table.

    Raises:
        Ssl3dError: As the command does.
    """
    from ssl3d_benchmarks.linear_probe_command import Options
    from ssl3d_benchmarks.linear_probe_run import run

    return [row.result for row in run(Options(_words(encoder), _words(data), out=Path(out), **options))]


def knn(
    encoder: Words, data: Words = "phantoms", out: str | Path = "runs/knn", **options: Any
) -> list[Result]:
    """Scores frozen encoders by nearest neighbours: `ssl3d knn`; otherwise as `linear_probe`."""
    from ssl3d_benchmarks.knn_command import Options
    from ssl3d_benchmarks.knn_protocol import KNN
    from ssl3d_benchmarks.linear_probe_run import run

    asked: Any = Options(_words(encoder), _words(data), out=Path(out), **options)
    return [row.result for row in run(asked, KNN)]


def finetune(
    encoder: Words,
    data: Words = "phantoms",
    out: str | Path = "runs/finetune",
    task: str = "classification",
    task_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Result]:
    """Trains encoders on a task beside the same network from scratch; the same as `ssl3d finetune`.

    Args:
        encoder: Runs, encoder folders, `scratch:...` or `imagenet:...`.
        data: Stores, scans or phantoms[:N].
        out: Folder of the records.
        task: classification, segmentation or detection.
        task_options: Of the task, as in `{"patch": (32, 32, 32)}` for `--segmentation.patch 32 32 32`.
        options: Of the command, with underscores, as in `steps=500, fractions=(0.1, 1.0)`.

    Returns:
        The records.

    Raises:
        Ssl3dError: As the command does; TrainingError if a job failed.
    """
    from ssl3d.api import TrainingError
    from ssl3d_benchmarks.finetune_command import Options
    from ssl3d_benchmarks.finetune_protocol import task_class
    from ssl3d_benchmarks.finetune_run import resolve, run

    given = Options(_words(encoder), _words(data), task=task, out=Path(out), **options)
    outcome = run(*resolve(given, task_class(task).Config(**(task_options or {})), set(options)))
    if outcome.failed:
        raise TrainingError("; ".join(f"{name}: {why}" for name, why in outcome.failed.items()))
    return [row.result for row in outcome.rows]


def leaderboard(suite: str | Path, out: str | Path = "runs/leaderboard", **options: Any) -> int:
    """Does the jobs of a suite and writes OUT/report; the same as `ssl3d leaderboard run`.

    Args:
        suite: Name of a built-in suite, or a YAML file.
        out: Folder of the records.
        options: Of the command, with underscores.

    Returns:
        The exit status: 0, or 1 if a job failed.
    """
    from ssl3d_benchmarks.leaderboard_run import RunOptions, run

    return run(RunOptions(str(suite), Path(out), **options))


def leaderboard_report(results: Words, **options: Any) -> Report:
    """Everything that a report says of folders of records, as numbers.

    Args:
        results: Folders of records.
        options: `published`, `resamples`, as of `ssl3d leaderboard report`.
    """
    from ssl3d_benchmarks.leaderboard_output import read_report

    return read_report([Path(word) for word in _words(results)], **options)


def _words(given: Words) -> tuple[str, ...]:
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))
