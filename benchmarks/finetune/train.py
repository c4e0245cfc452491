"""Training of a model on one subset: scored on validation subjects as it goes, resumed when killed."""

from __future__ import annotations

import contextlib
import hashlib
import math
import pickle
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl3d.api import (
    AggregatedEncoder,
    BatchRng,
    Loader,
    TrainingError,
    UsageError,
    autocast,
    check_compiler,
    compile_encoders,
    duration,
    lone_values,
    memory_format,
    restore_optimizer,
    seed_of,
    start_from,
    tensor_bytes,
    to_memory_format,
    whole_file,
    write_state,
)

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.api import Benchmark, Collection, Encoder, Loggers, PretrainedDecoder, Volume
    from ssl3d_benchmarks.finetune.options import FinetuneOptions
    from ssl3d_benchmarks.finetune.protocol import FinetuneTask
    from ssl3d_benchmarks.finetune.validation import ValidationScores

FORMAT = 1
REPORT_EVERY = 30.0
"""Seconds between two lines about the progress of a training."""
POINTS = 40
"""Number of points in the curves of a training's loggers, about."""


@dataclass
class Trial:
    """State of a training with one learning rate.

    Attributes:
        lr: Peak learning rate.
        total: Number of steps of the whole training.
        step: Number of steps done.
        curve: Step, score on the validation subjects (None where there are none) and mean training loss
            since the last entry, for each scoring.
        best: Step and score of the scoring whose weights are kept.
        weights: State of the model at that scoring, on the CPU.
        average: Exponential moving average of the model's state; empty without one.
        seconds: Seconds spent on steps, reading included.
        waited: Seconds spent on reading.
        scoring: Seconds spent on validation.
        flops: Floating-point operations of one step.
        losses: Training losses since the last scoring.
    """

    lr: float
    total: int
    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    scoring: float = 0.0
    flops: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def value(self) -> float:
        """Validation score of the weights kept; NaN without validation subjects."""
        score = self.best.get("score")
        return math.nan if score is None else float(score)


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
        _resume(path, trial, model, optimizer, plan)
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
    layout = memory_format(_inner(encoder), device)
    if layout is not torch.contiguous_format:
        to_memory_format(model, layout)
    return model


def _inner(encoder: Encoder) -> Encoder:
    inner: Encoder = encoder.encoder if isinstance(encoder, AggregatedEncoder) else encoder
    return inner


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
            _save(path, trial, model, optimizer)
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


# Parameters ---------------------------------------------------------------------------------------


def stages_of(encoder: Encoder) -> dict[str, int]:
    """Find the stage of every parameter of an encoder, by name: the first feature map that depends on it.

    Each map is differentiated, so this holds for any encoder. Parameters that no map depends on (those of
    an aggregator) count as beyond the last stage.
    """
    inner = _inner(encoder)
    prefix = "encoder." if inner is not encoder else ""
    count = len(inner.strides)
    stages = {name: count for name, _ in encoder.named_parameters()}
    named = [(prefix + name, parameter) for name, parameter in inner.named_parameters()]
    modes = [(part, part.training) for part in inner.modules()]
    wanted = [parameter.requires_grad for _, parameter in named]
    device = named[0][1].device
    # The input is a volume, whatever the depth of the data: some kernels see nothing of an image. The
    # deepest map has two cells, since instance norm makes zeros of a single one.
    size = [max(step, 8) * cells for step, cells in zip(inner.strides[-1], (1, 1, 2), strict=True)]
    inner.eval()
    try:
        for _, parameter in named:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            x = torch.zeros(1, inner.config.in_channels, *size, device=device)
            maps = inner(x)
            for stage in reversed(range(count)):
                reached = torch.autograd.grad(
                    maps[stage].sum(), [p for _, p in named], allow_unused=True, retain_graph=True
                )
                for (name, _), gradient in zip(named, reached, strict=True):
                    if gradient is not None:
                        stages[name] = stage
    finally:
        for (_, parameter), needed in zip(named, wanted, strict=True):
            parameter.requires_grad_(needed)
        for part, training in modes:
            part.training = training
    return stages


def check_freeze(encoder: Encoder, asked: str) -> None:
    """Raise a UsageError where an encoder has fewer stages than shall be frozen."""
    count = len(_inner(encoder).strides)
    if asked.isdigit() and int(asked) > count:
        raise UsageError(f"--freeze {asked}: the encoder has {count} stages; freeze fewer of them, or all")


def encoders_of(model: nn.Module) -> list[Encoder]:
    """List the encoders in a model: its `encoder`, and the copy that a coarse stage has."""
    encoders: list[Encoder] = []
    above: list[str] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "encoder" and not any(name.startswith(prefix) for prefix in above):
            above.append(f"{name}.")  # an aggregator's encoder is part of it
            encoders.append(module)
    return encoders


def freeze(model: nn.Module, asked: str, norms: bool) -> list[nn.Module]:
    """Freeze parameters of the encoders and return the modules that stay in evaluation mode.

    Args:
        model: Model with its `encoder`, and perhaps others of that name in it.
        asked: Stages to freeze: none, all, or a number of first stages.
        norms: Whether the batch norms of the encoder are frozen too.
    """
    return [module for encoder in encoders_of(model) for module in _freeze(encoder, asked, norms)]


def _freeze(encoder: Encoder, asked: str, norms: bool) -> list[nn.Module]:
    if asked == "all":
        encoder.requires_grad_(False)
        return [encoder]
    calm: list[nn.Module] = []
    if asked != "none":
        stages = stages_of(encoder)
        for name, parameter in encoder.named_parameters():
            if stages[name] < int(asked):
                parameter.requires_grad_(False)
        for module in encoder.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                calm.append(module)
    if norms:
        for module in encoder.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
                calm.append(module)
    return calm


def set_training(model: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """Set training mode for all but the frozen modules, whose norm statistics stay too."""
    model.train()
    for module in frozen:
        module.eval()


def parameter_groups(model: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay.

    The head has the full learning rate (`scale` 1), the encoder's last stage `layer_decay` of it, each
    stage before it `layer_decay` of the next. Biases, norms and other vectors are not decayed.
    """
    place: dict[int, int] = {}
    for encoder in encoders_of(model):
        count = len(_inner(encoder).strides)
        stages = stages_of(encoder) if layer_decay < 1 else {}
        place |= {id(p): count - stages.get(name, count) for name, p in encoder.named_parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** place.get(id(parameter), 0)
        decay = 0.0 if parameter.ndim <= 1 or name.endswith(".bias") else weight_decay
        group = groups.setdefault(
            (scale, decay), {"params": [], "names": [], "scale": scale, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def optimizer_of(model: nn.Module, options: FinetuneOptions) -> torch.optim.Optimizer:
    """Build the optimizer, whose learning rates are set at every step."""
    groups: list[dict[str, Any]] = [
        {key: value for key, value in group.items() if key != "names"}
        for group in parameter_groups(model, options.layer_decay, options.weight_decay)
    ]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    if options.optimizer == "adam":
        return torch.optim.Adam(groups, lr=0.0)
    nesterov = options.momentum > 0
    return torch.optim.SGD(groups, lr=0.0, momentum=options.momentum, nesterov=nesterov)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Hash the weights and buffers of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]


# Checkpoints --------------------------------------------------------------------------------------


def _save(path: Path, trial: Trial, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, whole or not at all.

    Raises:
        UsageError: The file cannot be written.
    """
    state = {
        "format": FORMAT,
        "trial": {key: getattr(trial, key) for key in Trial.__dataclass_fields__},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "threads": torch.get_num_threads(),
    }
    try:
        with whole_file(path, sync=True) as temporary:
            write_state(state, temporary)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _resume(
    path: Path, trial: Trial, model: nn.Module, optimizer: torch.optim.Optimizer, plan: TrainingPlan
) -> None:
    """Restore a checkpoint, if there is one and its bytes are those that were written.

    Raises:
        UsageError: Its bytes are right, and it is no checkpoint of this training.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes the check sum of each member, and reads none
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return
    except (
        OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError,
        pickle.UnpicklingError, zipfile.BadZipFile, zlib.error
    ):  # fmt: skip
        plan.say(f"{plan.name}: {path} is damaged; the training starts at step 0")
        return
    try:
        _restore(state, path, trial, model, optimizer, plan)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        # The model may be half restored: no training starts from that.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"{path}: is no checkpoint of {plan.name} ({reason}); delete it to start at step 0"
        ) from error


def _restore(
    state: dict[str, Any],
    path: Path,
    trial: Trial,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: TrainingPlan,
) -> None:
    if state.get("format") != FORMAT or state["trial"]["total"] != trial.total:
        plan.say(f"{plan.name}: {path} belongs to another training; this one starts at step 0")
        return
    if state["threads"] != torch.get_num_threads():
        plan.say(
            f"{plan.name}: the training began with {state['threads']} threads and goes on with "
            f"{torch.get_num_threads()}, so sums may differ in their last bits"
        )
    model.load_state_dict(state["model"])
    restore_optimizer(optimizer, state["optimizer"])
    _check_trial(state["trial"], trial, model)
    for key, value in state["trial"].items():
        setattr(trial, key, value)
    if trial.step < trial.total:
        plan.say(f"{plan.name}: the training goes on at step {trial.step} of {trial.total}")


def _check_trial(kept: dict[str, Any], trial: Trial, model: nn.Module) -> None:
    """Check that what a checkpoint keeps of a training is of the kinds that a training has.

    Raises:
        ValueError: A part is missing, unknown, or of the wrong kind.
    """
    if not {"step", "curve", "weights"} <= set(kept) <= set(Trial.__dataclass_fields__):
        raise ValueError(f"it keeps {', '.join(map(str, kept))}")
    for key, value in kept.items():
        own = getattr(trial, key)
        if type(value) is not type(own) and not {type(value), type(own)} <= {int, float}:
            raise ValueError(f"{key} is {type(value).__name__}, not {type(own).__name__}")
    if not 0 <= kept["step"] <= kept["total"] or type(kept["step"]) is not int:
        raise ValueError(f"it is of step {kept['step']} of {kept['total']}")
    if not all(isinstance(value, int | float) for value in kept.get("losses", ())):
        raise ValueError("a loss is no number")
    scored = [*kept["curve"], *([kept["best"]] if kept.get("best") else [])]
    if not all(isinstance(entry, dict) and isinstance(entry.get("step"), int) for entry in scored):
        raise ValueError("an entry of the curve has no step")
    if not all(isinstance(entry.get("score"), int | float | None) for entry in scored):
        raise ValueError("a score is no number")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for key in ("weights", "average"):
        state = kept.get(key)
        if state and {k: isinstance(v, Tensor) and v.shape for k, v in state.items()} != shapes:
            raise ValueError(f"its {key} are not those of the model")
