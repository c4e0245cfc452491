"""Training of a model on one subset: scored on validation subjects as it goes, resumed when killed."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssl3d.api import (
    BatchRng,
    Loader,
    TrainingError,
    autocast,
    check_compiler,
    compile_encoders,
    duration,
    lone_values,
    memory_format,
    seed_of,
    start_from,
    to_memory_format,
)
from ssl3d_benchmarks.finetune.checkpoint import Trial, resume, save
from ssl3d_benchmarks.finetune.parameters import freeze, optimizer_of, set_training, shared_encoder

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.api import Benchmark, Collection, Encoder, Loggers, PretrainedDecoder, Volume
    from ssl3d_benchmarks.finetune.options import FinetuneOptions
    from ssl3d_benchmarks.finetune.protocol import FinetuneTask
    from ssl3d_benchmarks.finetune.validation import ValidationScores

REPORT_EVERY = 30.0
"""Seconds between two lines about the progress of a training."""
POINTS = 40
"""Number of points in the curves of a training's loggers, about."""


@dataclass(frozen=True)
class TrainingPlan:
    """Settings and data of a training.

    Attributes:
        benchmark: Benchmark that scores the predictions.
        task: Downstream task to learn.
        train: Volumes to train on.
        val: Volumes to choose the step on; may be empty.
        options: Options of the command, resolved.
        seed: Seed of everything random in the training.
        device: Device that trains.
        name: Name of the job, for messages.
        folder: Folder of the checkpoints; None for no checkpoints.
        say: Function that prints a message.
        decoder: Decoder that the model's head starts from; None for new weights.
        loggers: Loggers of the job; None where it has none.
        scores: File of the job's validation scores; None where records hold them.
        part: Words that tell this training from the others of its job in the loggers, as in "fold-1/".
    """

    benchmark: Benchmark
    task: FinetuneTask
    train: Collection
    val: Collection
    options: FinetuneOptions
    seed: int
    device: torch.device
    name: str
    folder: Path | None = None
    say: Callable[[str], None] = print
    decoder: PretrainedDecoder | None = None
    loggers: Loggers | None = None
    scores: ValidationScores | None = None
    part: str = ""

    def log(self, trial: Trial, values: Mapping[str, Any]) -> None:
        """Log numbers of a training after its last step; those that are None or not finite are left out."""
        if self.loggers is not None:
            several = f"lr-{trial.lr:g}/" if len(self.options.tune) > 1 else ""
            named = {f"{self.part}{several}{name}": value for name, value in values.items()}
            self.loggers.scalars(named, trial.step)

    @property
    def batch_size(self) -> int:
        """Number of examples per step, no larger than the training part unless volumes may come again."""
        asked = self.options.batch_size
        assert asked is not None  # the recipe or the plan has filled it
        return asked if self.task.repeats_volumes else min(asked, len(self.train))

    @property
    def total(self) -> int:
        """Number of steps of the training."""
        return self.options.steps or self.options.epochs * -(-len(self.train) // self.batch_size)


class Diverged(TrainingError):
    """The loss is no longer a number.

    Attributes:
        trial: Training up to that step.
    """

    def __init__(self, message: str, trial: Trial):
        super().__init__(message)
        self.trial = trial


def train(plan: TrainingPlan, make: Callable[[], Encoder], lr: float) -> tuple[nn.Module, Trial]:
    """Train with one learning rate and return the model with the weights kept.

    Args:
        plan: Settings and data of the training.
        make: Function that returns the encoder to start from, always the same.
        lr: Peak learning rate.

    Raises:
        Diverged: The loss is no longer a number; the message names the volumes of the batch.
        TrainingError: A batch norm sees a single number per channel.
    """
    options = plan.options
    model = build(plan.task, make(), plan.train, plan.seed, plan.device)
    if plan.decoder is not None:
        plan.say(f"{plan.name}: {start_from(model.get_submodule('head'), plan.decoder)}")
    frozen = freeze(model, options.freeze, options.freeze_norm)
    optimizer = optimizer_of(model, options)
    trial = Trial(lr, plan.total)
    path = None if plan.folder is None else plan.folder / f"lr-{lr:g}.pt"
    if path is not None:
        resume(path, trial, model, optimizer, plan.name, plan.say)
    if trial.step < trial.total or not trial.curve:
        _run(plan, model, frozen, optimizer, trial, path)
    if trial.weights:
        model.load_state_dict(trial.weights)
    return model.eval(), trial


def build(
    task: FinetuneTask, encoder: Encoder, data: Collection, seed: int, device: torch.device
) -> nn.Module:
    """Build the model around an encoder; new weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "head"))
        model = task.model(encoder, data)
    task.start(model, data)
    model.to(device)
    layout = memory_format(shared_encoder(encoder), device)
    if layout is not torch.contiguous_format:
        to_memory_format(model, layout)
    return model


def _run(
    plan: TrainingPlan,
    model: nn.Module,
    frozen: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    trial: Trial,
    path: Path | None,
) -> None:
    options, device = plan.options, plan.device
    points = scoring_steps(options.eval_at, trial.total)
    workers = options.workers if options.workers >= 0 else (4 if device.type == "cuda" else 0)
    loader = Loader(
        plan.train,
        {"finetune": (Drawing, plan.task)},  # type: ignore[dict-item]
        plan.batch_size,
        seed=seed_of(plan.seed, "order"),
        workers=workers,
        start_step=trial.step,
        steps=trial.total,
        balance=False,
        on_set_aside=lambda name, reason: plan.say(f"{plan.name}: volume {name} is set aside: {reason}"),
    )
    if options.compile:
        check_compiler(device)
    compiled = False
    if trial.step == 0 and 0 in points and not trial.curve:
        _score(plan, model, trial)
    set_training(model, frozen)
    every = max(1, trial.total // POINTS)
    saved = began = time.perf_counter()
    progress = _Progress(plan, trial)
    for batch in loader:
        if options.compile and trial.flops and not compiled:  # those of a compiled network are not counted
            compile_encoders(model)
            compiled = True
        trial.waited += batch.waited
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * rate(trial.step, trial.total, trial.lr, options)
        torch.manual_seed(seed_of(plan.seed, "step", trial.step))  # dropout takes no generator
        optimizer.zero_grad(set_to_none=True)
        value, trial.flops = gradients(plan, model, batch.to(device).groups, trial)
        if not math.isfinite(value):
            raise Diverged(
                f"{plan.name}: the loss is {value} at step {trial.step + 1} of {trial.total}, learning "
                f"rate {trial.lr:g}; volumes: {', '.join(batch.volume_ids)}",
                trial,
            )
        if options.clip:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], options.clip)
        optimizer.step()
        trial.step += 1
        if options.ema:
            update_average(trial.average, model, trial.step, options.ema * trial.total)
        trial.losses.append(value)
        if trial.step % every == 0 or trial.step == trial.total:
            plan.log(trial, {"train/loss": value, "train/lr": optimizer.param_groups[0]["lr"]})
        now = time.perf_counter()
        trial.seconds += now - began
        if trial.step in points:
            _score(plan, model, trial)
            set_training(model, frozen)
        if path is not None and (
            trial.step == trial.total or time.perf_counter() - saved >= options.checkpoint_seconds
        ):
            save(path, trial, model, optimizer)
            saved = time.perf_counter()
        progress.step(value, now - began)
        began = time.perf_counter()


class _Progress:
    """Lines on stderr about the progress of a long training; no record has them."""

    def __init__(self, plan: TrainingPlan, trial: Trial):
        self._plan, self._trial, self._first = plan, trial, trial.step
        self._began = self._printed = time.perf_counter()
        self._losses: list[float] = []
        self._seconds = 0.0

    def step(self, loss: float, seconds: float) -> None:
        """Print a line after a step, if the last is long ago and there are steps to come."""
        self._losses.append(loss)
        self._seconds += seconds
        now, trial = time.perf_counter(), self._trial
        if now - self._printed < REPORT_EVERY or trial.step >= trial.total:
            return
        # The time that went by includes scoring, since more scoring is to come as well.
        left = (now - self._began) / (trial.step - self._first) * (trial.total - trial.step)
        count = len(self._losses)
        print(
            f"{self._plan.name}, lr {trial.lr:g}: step {trial.step}/{trial.total}, loss "
            f"{sum(self._losses) / count:.4g}, {self._seconds / count:.3g} s a step, {duration(left)} left",
            file=sys.stderr,
            flush=True,
        )
        self._printed, self._losses, self._seconds = now, [], 0.0


LONE_HELP = "--freeze-norm or, of volumes of several shapes, --classification.pad true"


def gradients(
    plan: TrainingPlan, model: nn.Module, groups: Sequence[Any], trial: Trial
) -> tuple[float, float]:
    """Return the loss of a batch, its gradients left on the parameters; and FLOPs, counted once."""
    from torch.utils.flop_counter import FlopCounterMode

    count = sum(len(group.rows) for group in groups)
    total = 0.0
    counter = None if trial.flops else FlopCounterMode(display=False)
    with counter or contextlib.nullcontext():
        for group in groups:
            # A row draws the same numbers, whichever group it is in.
            rng = BatchRng(seed_of(plan.seed, "views", trial.step), group.rows, group.total, plan.device)
            lone = lone_values(plan.name, len(group.rows), LONE_HELP)
            with autocast(plan.device, plan.options.precision), lone:
                loss, _ = plan.task.loss(model, group.tensors, rng)
            part = loss.float() * (len(group.rows) / count)
            part.backward()
            total += float(part.detach())
    return total, trial.flops or float(counter.get_total_flops() if counter else 0)


def predict(
    plan: TrainingPlan, model: nn.Module, data: Collection, choosing: bool = False
) -> list[dict[str, Any]]:
    """Predict volumes, and name each in its row; with `choosing`, by no more labels than training sees."""
    model.eval()
    task = plan.task
    with torch.inference_mode(), autocast(plan.device, plan.options.precision):
        rows = (task.predict_for_choosing if choosing else task.predict_all)(model, data)
    about = zip(data.datasets, data.subjects, data.ids, strict=True)
    return [
        {"dataset": str(dataset), "subject": str(subject), "id": str(name), **row}
        for (dataset, subject, name), row in zip(about, rows, strict=True)
    ]


def _score(plan: TrainingPlan, model: nn.Module, trial: Trial) -> None:
    began = time.perf_counter()
    own = model.state_dict()
    if trial.average:
        own = {key: value.clone() for key, value in own.items()}
        model.load_state_dict(trial.average)
    value = math.nan
    if len(plan.val):
        value = plan.benchmark.value(predict(plan, model, plan.val, choosing=True))
    recent = trial.losses
    trial.curve.append(
        {
            "step": trial.step,
            "score": value if math.isfinite(value) else None,
            "loss": sum(recent) / len(recent) if recent else None,
        }
    )
    trial.losses = []
    plan.log(trial, {f"validation/{plan.benchmark.main}": trial.curve[-1]["score"]})
    if plan.scores is not None:
        plan.scores.add(plan.part, trial.lr, trial.step, trial.curve[-1]["score"])
    # Of equal scores the later one counts: it was trained longer. A NaN never replaces a score.
    before = trial.best.get("score")
    better = before is None or (math.isfinite(value) and value >= before)
    if plan.options.keep == "last":
        better = trial.step == trial.total
    if better:
        trial.best = {"step": trial.step, "score": trial.curve[-1]["score"]}
        trial.weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    if trial.average:
        model.load_state_dict(own)
    trial.scoring += time.perf_counter() - began


@torch.no_grad()
def update_average(average: dict[str, Tensor], model: nn.Module, step: int, reach: float) -> None:
    """Update the exponential moving average of a model's state after a step.

    The decay is 1 - 1 / reach, but (step - 1) / (step + 8) at most, so that the first weights, which are
    random, are soon forgotten. Counters are copied.

    Args:
        average: Average to update; filled with the state where it is empty.
        model: Model after the step.
        step: Number of steps done, from 1.
        reach: Number of steps over which the average reaches back.

    Example:
        >>> layer, average = nn.Linear(1, 1, bias=False), {}
        >>> for step, weight in enumerate((4.0, 8.0), start=1):
        ...     _ = nn.init.constant_(layer.weight, weight)
        ...     update_average(average, layer, step, reach=10.0)
        >>> round(average["weight"].item(), 3)  # 0.1 * 4 + 0.9 * 8
        7.6
    """
    state = {key: value.detach() for key, value in model.state_dict().items()}
    if not average:
        average |= {key: value.clone() for key, value in state.items()}
        return
    decay = max(0.0, min(1 - 1 / max(reach, 1.0), (step - 1) / (step + 8)))
    moving = [key for key, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[key] for key in moving], [state[key] for key in moving], 1 - decay)
    for key in state.keys() - set(moving):
        average[key].copy_(state[key])


class Drawing:
    """Adapter by which the toolkit's loader draws for a task, in place of a proxy."""

    @staticmethod
    def draw(task: FinetuneTask, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw one training example."""
        return task.draw(volume, rng)


def scoring_steps(points: Sequence[float], total: int) -> set[int]:
    """Convert shares of the steps (at most 1) or steps to steps; the last one is always among them.

    >>> sorted(scoring_steps((0.001, 0.5, 7), 10))
    [1, 5, 7, 10]
    """
    steps = {total}
    for point in points:
        if point == 0:
            steps.add(0)
        elif point <= 1:
            steps.add(max(1, round(point * total)))
        elif point <= total:
            steps.add(int(point))
    return steps


def rate(step: int, total: int, peak: float, options: FinetuneOptions) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then the fall of the schedule."""
    rising = round(options.warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(total - rising, 1)
    if options.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    if options.schedule == "poly":
        return peak * (1 - done) ** 0.9
    if options.schedule == "milestones":
        passed = sum(step >= round(share * total) for share in options.milestones)
        return float(peak * options.gamma**passed)
    return peak
