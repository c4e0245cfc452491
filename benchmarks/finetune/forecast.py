"""Lines of `ssl3d finetune` before it trains: how many trainings, how long, and sizes that do not fit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ssl3d.api import Ssl3dError, count_of, duration, large_batch_note, large_crop_note
from ssl3d_benchmarks.finetune.job import FinetuneJob
from ssl3d_benchmarks.finetune.train import TrainingPlan, predict, train

if TYPE_CHECKING:
    from ssl3d.api import Collection

WORTH_MEASURING = 200
"""Steps in all from which a few of them are timed before the first training."""
_TIMED = 3


def forecast(jobs: Sequence[FinetuneJob]) -> str:
    """Return how many trainings jobs take, and how long; empty where none of them trains.

    Args:
        jobs: Jobs of a run; those that a record spares are counted too, as none was looked for yet.
    """
    lengths: list[int] = []
    for job in jobs:
        if job.entry.make is not None:
            for fit, _, _ in job.folds():
                lengths += [_plan(job, fit).total] * len(job.arm.rates)
    if not lengths:
        return ""
    shortest, longest, total = min(lengths), max(lengths), sum(lengths)
    each = count_of(longest, "step") if shortest == longest else f"{shortest:,} to {longest:,} steps"
    line = f"to do: {count_of(len(lengths), 'training')} of {each}"
    seconds = _seconds_a_step(jobs) if total >= WORTH_MEASURING else 0.0
    if seconds:
        line += (
            f", about {duration(seconds * total)} in all ({seconds:.2g} s a step) and the time of scoring"
        )
    return line


def size_notes(jobs: Sequence[FinetuneJob], patch: Sequence[int] | None) -> list[str]:
    """Return a line for a patch larger than most volumes, and one for a batch of more than there are.

    Args:
        jobs: Jobs of a run; of several trainings that with the fewest volumes is told of.
        patch: Patch D H W of the options; None where it is planned, to the next multiple of the stride.
    """
    parts = [(fit, job) for job in jobs if job.entry.make is not None for fit, _, _ in job.folds()]
    if not parts:
        return []
    fit, job = min(parts, key=lambda part: len(part[0]))
    notes = [large_crop_note(f"{job.options.task}.patch", patch, fit.shapes)] if patch else []
    then = "a batch holds some of them twice" if job.task.repeats_volumes else f"a batch holds {len(fit)}"
    batch = job.options.batch_size
    return [note for note in [*notes, large_batch_note(batch or 0, len(fit), then)] if note]


def _seconds_a_step(jobs: Sequence[FinetuneJob]) -> float:
    """Time a few steps of the first training on copies that are thrown away; 0 where it cannot train."""
    with contextlib.suppress(Ssl3dError):  # the training itself will say so
        return timed(next(job for job in jobs if job.entry.make is not None), volumes=0)[0]
    return 0.0


def timed(job: FinetuneJob, volumes: int = 2) -> tuple[float, float]:
    """Time a few steps of a job's first training, and predictions, on copies that are thrown away.

    Args:
        job: Job whose entry has a network.
        volumes: Number of volumes to predict, at most.

    Returns:
        Seconds of a step, and of predicting a volume (0 without any).
    """
    make, fit = job.entry.make, next(job.folds())[0]
    assert make is not None
    plan = _plan(job, fit)
    seconds = {}
    # The first step also counts FLOPs, so that it is slower than the others.
    for steps in (1, 1 + _TIMED):
        plan = replace(plan, options=replace(plan.options, steps=steps, epochs=0, eval_at=(1.0,)))
        model, trial = train(plan, make, job.arm.rates[0])
        seconds[steps] = trial.seconds
    chosen = fit.select(range(min(volumes, len(fit))))
    began = time.perf_counter()
    if len(chosen):
        predict(plan, model, chosen)
    each = (time.perf_counter() - began) / max(len(chosen), 1)
    return max(seconds[1 + _TIMED] - seconds[1], 0.0) / _TIMED, each if len(chosen) else 0.0


def longest(job: FinetuneJob) -> int:
    """Return the number of steps of a job's longest training."""
    return max(_plan(job, fit).total for fit, _, _ in job.folds())


def _plan(job: FinetuneJob, fit: Collection) -> TrainingPlan:
    """Return the plan of a training that scores and saves nothing."""
    return TrainingPlan(
        benchmark=job.benchmark,
        task=job.task,
        train=fit,
        val=fit.select([]),
        options=job.options,
        seed=job.seed,
        device=job.device,
        name=job.name,
        say=lambda line: None,
    )
