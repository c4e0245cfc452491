"""Fine-tuning: an encoder trained further on a task, beside the same network from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d_benchmarks import Words, words_of

if TYPE_CHECKING:
    from ssl3d.api import Result


def score(
    encoder: Words,
    data: Words = "phantoms",
    out: str | Path = "runs/finetune",
    task: str = "classification",
    task_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Result]:
    """Train encoders on a task beside the same network from scratch, as `ssl3d finetune` does.

    Args:
        encoder: Runs, encoder folders, `scratch:...` or `imagenet:...`.
        data: Stores, scans or phantoms[:N].
        out: Folder for the records.
        task: Downstream task: classification, segmentation or detection.
        task_options: Options of the task: `{"patch": (32, 32, 32)}` for `--segmentation.patch 32 32 32`.
        options: Options of the command, with underscores: `steps=500, fractions=(0.1, 1.0)`.

    Returns:
        The records, one per job.

    Raises:
        Ssl3dError: The command would end with this error too; TrainingError if a job failed.
    """
    from ssl3d.api import TrainingError
    from ssl3d_benchmarks.finetune.options import FinetuneOptions
    from ssl3d_benchmarks.finetune.protocol import task_class
    from ssl3d_benchmarks.finetune.recipe import resolve
    from ssl3d_benchmarks.finetune.run import run

    given = FinetuneOptions(words_of(encoder), words_of(data), task=task, out=Path(out), **options)
    outcome = run(*resolve(given, task_class(task).Config(**(task_options or {})), set(options)))
    if outcome.failed:
        raise TrainingError("; ".join(f"{name}: {why}" for name, why in outcome.failed.items()))
    return [row.result for row in outcome.rows]
