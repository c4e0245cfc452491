"""Timing of the parts of a study: a step of each recipe by the suite's own jobs, a few of fine-tuning."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ssl3d.api import Plugins, UsageError, device_of, parse, parse_json
from ssl3d_benchmarks.finetune.forecast import longest, timed
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.protocol import TASKS, task_class
from ssl3d_benchmarks.finetune.recipe import planned, resolve
from ssl3d_benchmarks.finetune.run import make_arms, make_jobs, make_task, planned_on
from ssl3d_benchmarks.finetune.train import scoring_steps
from ssl3d_benchmarks.leaderboard.suite.jobs import Job
from ssl3d_benchmarks.leaderboard.suite.marks import Marks
from ssl3d_benchmarks.leaderboard.suite.plan import SuitePlan
from ssl3d_benchmarks.leaderboard.suite.runner import Runner
from ssl3d_benchmarks.study.draft import IMAGENET, TASK
from ssl3d_benchmarks.study.look import Look
from ssl3d_benchmarks.study.plan import ArmCost, Costs, RunCost


def do(plan: SuitePlan, kinds: tuple[str, ...], verbose: bool) -> None:
    """Do the jobs of some kinds, as the suite would: their marks are found when it runs.

    Raises:
        UsageError: A job failed; the message ends with its own.
    """
    jobs = [job for job in plan.jobs if job.kind in kinds]
    if not jobs:
        return
    folder = plan.places.out / ".jobs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plan.places.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {plan.places.out}: {error.strerror}") from error
    marks = Marks(folder)
    for job in jobs:  # killed before its time was noted: it is measured again
        if job.kind == "measure" and job.product and not marks.path(job.name, "json").exists():
            job.product.unlink(missing_ok=True)
    runner = Runner("study", jobs, folder, verbose=verbose, plugin_files=plan.commands.plugin_files())
    status = runner.run()
    if status >= 128:
        raise SystemExit(status)
    wrong = runner.failed | runner.skipped
    if wrong:
        raise UsageError("; ".join(f"{name}: {why}" for name, why in wrong.items()))


def measure(plan: SuitePlan, look: Look) -> tuple[Costs, int]:
    """Read the costs of pretraining that the suite's jobs measured, and time fine-tuning here.

    Returns:
        Costs, and the number of steps that the task would take by itself.

    Raises:
        Ssl3dError: A network cannot be trained on these data.
    """
    marks = Marks(plan.places.out / ".jobs")
    runs, starts = {}, []
    for job in plan.jobs:
        if job.kind == "measure":
            name = job.name.partition(":")[2]
            runs[name] = _run_cost(plan, name)
            starts.append(max(_seconds(marks, job) - runs[name].step, 0.0))
    contestants = plan.suite.contestants
    began = time.perf_counter(), time.process_time()
    network, wanted, scorings = _tuned(plan, contestants["scratch"])
    share = (time.process_time() - began[1]) / (time.perf_counter() - began[0])
    imagenet = _tuned(plan, contestants[IMAGENET])[0] if IMAGENET in contestants else None
    start = sum(starts) / len(starts)
    folds = max(look.folds, 1)
    return Costs(runs, network, imagenet, start, look.train, folds, scorings, share), wanted


def _seconds(marks: Marks, job: Job) -> float:
    return float(_read(marks.path(job.name, "json"))["seconds"])


def _run_cost(plan: SuitePlan, name: str) -> RunCost:
    folder = plan.commands.measured_folder(name)
    flops = float(_read(folder / "encoder" / "encoder.json")["compute"]["flops_per_step"])
    last = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return RunCost(float(parse_json(last)["seconds"]), flops)


def _read(path: Path) -> Any:
    return parse_json(path.read_text(encoding="utf-8"))


def _tuned(plan: SuitePlan, encoder: str) -> tuple[ArmCost, int, int]:
    """Time fine-tuning of a contestant, on copies; return its steps and its scorings, too."""
    words = plan.commands.words(next(task.options for task in plan.suite.tasks if task.name == TASK))
    parsed = parse(
        "ssl3d finetune", FinetuneOptions, [*shlex.split(encoder), *words],
        Plugins({"task": lambda name: task_class(name).Config}, {"task": tuple(TASKS)}),
    )  # fmt: skip
    options, config = resolve(parsed.options, parsed.sections[parsed.options.task], parsed.given)
    options = replace(options, fractions=(1.0,), seeds=(0,), no_trivial=True)
    split, benchmark = make_task(options, config)
    options = planned(options, benchmark.downstream, planned_on(split))
    jobs = make_jobs(make_arms(options), split, benchmark, options, torch.device(device_of(options.device)))
    step, volume = timed(jobs[0])
    steps = longest(jobs[0])
    return ArmCost(step, volume), steps, len(scoring_steps(options.eval_at, steps))
