"""Recipes of fine-tuning: defaults that a task proposes for the options not given."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ssl3d.api import Benchmark, Contestant, Scores, UsageError
from ssl3d_benchmarks.finetune.job import score_fold
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.protocol import FinetuneTask, task_class
from ssl3d_benchmarks.finetune.train import TrainingPlan

if TYPE_CHECKING:
    from ssl3d.api import Collection


def resolve(options: FinetuneOptions, config: Any, asked: set[str]) -> tuple[FinetuneOptions, Any]:
    """Fill the options that were not given from the preset and from the recipe of the task.

    Args:
        options: Options of the command.
        config: Options of the task.
        asked: Names of the options that were given, those of the task as TASK.FIELD.

    Raises:
        UsageError: The preset is unknown, or there is no learning rate or no number of steps.
    """
    kind = task_class(options.task)
    below: dict[str, Any] = dict(kind.recipe)
    if options.preset:
        if options.preset not in kind.presets:
            known = ", ".join(kind.presets) or "none"
            raise UsageError(f"--preset {options.preset}: --task {options.task} has {known}")
        below |= kind.presets[options.preset]
        lasting = {"steps", "epochs"} & set(kind.presets[options.preset])
        for name in {"steps", "epochs"} - lasting if lasting else ():
            below.pop(name, None)
    if options.steps and options.epochs:
        raise UsageError(f"--steps {options.steps} and --epochs {options.epochs}: give one of them")
    if options.steps or options.epochs:
        below = {key: value for key, value in below.items() if key not in ("steps", "epochs")}
    if "lr" in asked:
        below.pop("lr_scratch", None)  # it belongs to another learning rate
    own = {key: value for key, value in below.items() if "." not in key and key not in asked}
    options = replace(options, **own)
    own = {key: value for key, value in below.items() if "." in key and key not in asked}
    inner = {key.partition(".")[2]: value for key, value in own.items()}
    if options.tune and "lr_scratch" in asked:
        raise UsageError(
            "--lr-scratch beside --tune: give --tune-scratch instead, with as many rates as --tune"
        )
    if options.lr is None and not options.tune:
        raise UsageError(f"--lr: {options.task} has no learning rate of its own; give --lr or --tune")
    if not options.steps and not options.epochs and "steps" not in kind.planned:
        raise UsageError(f"--steps: {options.task} has no length of its own; give --steps or --epochs")
    if options.batch_size is None and "batch_size" not in kind.planned:
        options = replace(options, batch_size=8)
    return options, replace(config, **inner)


def planned(options: FinetuneOptions, task: FinetuneTask, train: Collection) -> FinetuneOptions:
    """Fill the options that are still open by the task's plan, whose `reasons` then say why.

    Args:
        options: Options of the command, resolved.
        task: Downstream task, whose own open options the plan settles.
        train: Volumes of training and validation.
    """
    proposed = task.plan(train)
    still_open = {"batch_size"} if options.batch_size is None else set()
    if not options.steps and not options.epochs:
        still_open.add("steps")
    own = {name: value for name, (value, _) in proposed.items() if name in still_open}
    said = (f"{name} {value}: {proposed[name][1]}" for name, value in own.items())
    task.reasons = (*task.reasons, *said)
    return replace(options, **own)


def score_by_recipe(
    benchmark: Benchmark,
    task: FinetuneTask,
    contestant: Contestant,
    train: Collection,
    val: Collection,
    test: Collection,
    seed: int,
) -> Scores:
    """Train a contestant by the task's recipe and score it: the whole protocol, without records."""
    if contestant.encoder is None:
        rows = task.predict_trivial(contestant.name, train, val, test, seed)
        return benchmark.summarise(rows)
    if getattr(task.config, "init", "new") != "new":
        raise UsageError(f"init {task.config.init}: only the command finetune knows where decoders lie")
    options, _ = resolve(FinetuneOptions(("given",), task=task.name), task.config, set())
    options = planned(options, task, train)
    encoder = contestant.encoder
    device = next(encoder.parameters()).device
    plan = TrainingPlan(benchmark, task, train, val, options, seed, device, contestant.name)
    rate = options.lr_scratch if contestant.kind == "untrained" and options.lr_scratch else options.lr
    assert rate is not None
    began = time.perf_counter()
    part = score_fold(plan, lambda: copy.deepcopy(encoder), rates=(rate,), test=test)
    scores = benchmark.summarise(part["predictions"])
    scores.details, scores.seconds = part["details"], time.perf_counter() - began
    return scores
