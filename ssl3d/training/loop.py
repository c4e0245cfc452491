"""The training loop: flat, one optimizer step after the other, on Lightning Fabric."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl3d.amounts import count_of, duration, parameters, size
from ssl3d.errors import DataError, TrainingError
from ssl3d.rng import seed_of
from ssl3d.training.batch import Batch, Group, cut
from ssl3d.training.device import peak_memory
from ssl3d.training.monitor import Log, Monitor
from ssl3d.training.online import BATCHES, held_out, look
from ssl3d.training.optim import lr_at
from ssl3d.training.options import PretrainOptions
from ssl3d.training.preempt import Preemption
from ssl3d.training.selection import Selection
from ssl3d.training.trainee import Reducer, Sums, Trainee, finite

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Feed:
    """Batches of a run, one step after the other; the next one can be looked at before it is used.

    Attributes:
        batches: Endless generator of batches.
    """

    batches: Generator[Batch, None, None]
    _ahead: list[Batch] = field(default_factory=list)

    def peek(self) -> Batch:
        """Return the next batch, which stays the next one."""
        if not self._ahead:
            self._ahead.append(next(self.batches))
        return self._ahead[0]

    def next(self) -> tuple[list[Group], float]:
        """Take the groups of the next batch, and the seconds that it was waited for."""
        if self._ahead:
            return self._ahead.pop().groups, 0.0
        batch = next(self.batches)
        return batch.groups, batch.waited

    def close(self) -> None:
        """End the workers that draw the batches."""
        self.batches.close()


@dataclass
class Loop:
    """Training loop of one run, with all that it works on.

    Attributes:
        fabric: Fabric, launched.
        options: Options of the run, everything decided.
        trainee: Encoder and proxies, not wrapped.
        module: Trainee as Fabric wrapped it.
        optimizer: Optimizer as Fabric wrapped it.
        feed: Batches from the step to start with.
        selection: Volumes to train on, to keep out, and to score.
        holdout: Function that draws the batches of held-out subjects; called once, at the first look.
        steps_per_epoch: Steps in one pass over the training data.
        once: Function of a proxy's name and an epoch that gives every volume once, for `start_epoch`.
        log: Log of the run.
        save: Function that writes a checkpoint after so many steps.
        export: Function that writes the encoder into a folder of the run after so many steps.
        spare: Copy of the trainee to try a step on; None where one can be made.
        flops_between: FLOPs spent between epochs so far (clustering), on all ranks.
        monitor: Monitor of the steps, on rank 0 alone.
    """

    fabric: Fabric
    options: PretrainOptions
    trainee: Trainee
    module: Any
    optimizer: Any
    feed: Feed
    selection: Selection
    holdout: Callable[[], list[list[Group]]]
    steps_per_epoch: float
    once: Callable[[str, int], Any]
    log: Log
    save: Callable[[int], None]
    export: Callable[[str, int], None]
    spare: Trainee | None = None
    flops_between: int = 0
    monitor: Monitor | None = None

    def __post_init__(self) -> None:
        """Prepare the means over ranks."""
        self.reducer = Reducer(self.fabric.world_size, self.fabric.device)
        self.looks = Reducer(self.fabric.world_size, self.fabric.device)
        self._examined: list[list[Group]] | None = None
        self.flops_per_step = 0
        self._begun = -1

    def run(self, start: int) -> tuple[int, int]:
        """Train from a step to the end of the run.

        Returns:
            Steps that are saved, and the signal that stopped the run, or 0.

        Raises:
            TrainingError: The loss or a gradient is not finite, or the disk is full.
        """
        total = self.options.steps
        exports = {
            round(share * total): f"encoder-at-{round(100 * share):02d}" for share in self.options.save_at
        }
        if start == 0 and 0 in exports:
            self.export(exports[0], 0)
        saved = start
        with Preemption() as asked:
            for step in range(start, total):
                record, drawn, stop = self._step(step, asked)
                done = step + 1
                if self.fabric.world_size == 1:
                    stop = asked.signum  # also what came after the ranks agreed on stopping
                pictures: dict[str, Any] = {}
                if self.options.eval_every > 0 and (done % self.options.eval_every == 0 or done == total):
                    values, pictures = self._look(drawn)
                    record |= values
                if self.monitor is not None:
                    self.monitor.step(record)
                    if pictures:
                        self.monitor.pictures(pictures, done)
                if done in exports:
                    self.export(exports[done], done)
                if done % self.options.checkpoint_every == 0 or done == total or stop:
                    self.save(done)
                    saved = done
                if stop and done < total:
                    return saved, stop
        return total, 0

    def _step(self, step: int, asked: Preemption) -> tuple[dict[str, Any], dict[str, Any], int]:
        began = time.perf_counter()
        options, world = self.options, self.fabric.world_size
        self._new_epoch(step)
        reseed(options.seed, step, self.fabric.global_rank)
        rate = lr_at(step, options.steps, options.lr, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: list[Sums] = []
        batch, waited = self.feed.next()
        passes = self._passes(batch)
        for number, parts in enumerate(passes):
            moved = [[group.to(self.fabric.device) for group in part] for part in parts]
            last = number == len(passes) - 1
            with self.fabric.no_backward_sync(self.module, enabled=not last and world > 1):
                loss, part_sums = self.module("loss of parts", moved, step)
                self.fabric.backward(loss / len(passes))
            sums.append(part_sums)
        limit = options.clip or float("inf")
        norm: Any = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=limit, error_if_nonfinite=False
        )
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
        # The one place of a step that waits for the device: this decides whether weights may change.
        measured = [part.values for part in sums]
        measured += [] if norm is None else [{"grad_norm": (norm.detach(), 1)}]
        means, stop = self.reducer.mean(measured, asked.signum)
        gradient = means.pop("grad_norm", math.nan)
        # With 16 bit the scaler skips such a step and lowers its scale.
        bad_gradient = norm is not None and options.precision != "16" and not math.isfinite(gradient)
        if not finite(means) or bad_gradient:
            raise TrainingError(self._blame(step, sums, means))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.trainee.balance is not None:
            self.trainee.balance.step()
        with whole(self.trainee):
            for _, proxy in self.trainee.each():
                proxy.after_step(step, options.steps)
        seconds = time.perf_counter() - began
        record = {"step": step + 1, "loss": means.pop("loss"), **means, "lr": rate}
        record |= {
            "grad_norm": gradient,
            "epoch": int(step / self.steps_per_epoch),
            "seconds": seconds,
            "waiting": min(waited / seconds, 1.0),
            "volumes_per_s": options.batch_size / seconds,
        }
        return record, sums[0].pictures, stop if isinstance(stop, int) else 0

    def _passes(self, batch: list[Group]) -> list[list[list[Group]]]:
        """Cut a batch into the parts of its passes: a pass for each part, or one that compares them all."""
        parts = cut(batch, self.options.accumulate)
        return [parts] if self.options.grad_cache else [[part] for part in parts]

    def _look(self, fallback: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
        """Measure held-out subjects, kNN and collapse, and collect pictures."""
        values: dict[str, float] = {}
        pictures = fallback
        if len(self.selection.holdout):
            if self._examined is None:
                self._examined = self._draw_holdout()
            if self._examined:
                values, pictures = held_out(self.module, self._examined, self.looks, self.fabric.device)
        patch = self.trainee.patch if all(self.trainee.patch) else [1, 1, 1]
        values |= look(self.module, self.selection.train, self.selection.queries, patch, self.fabric.device)
        return values, pictures

    def _draw_holdout(self) -> list[list[Group]]:
        """Draw batches of held-out subjects; none, on every rank, where one rank cannot draw them."""
        drawn: list[list[Group]] = []
        reason = ""
        try:
            drawn = self.holdout()[:BATCHES]
        except DataError as error:
            reason = str(error)
        _, failed = self.looks.mean([], int(bool(reason)))
        if failed:
            self.log.say(f"held-out subjects have no metrics: {reason or 'another rank cannot draw them'}")
            return []
        return drawn

    def _new_epoch(self, step: int) -> None:
        epoch = int(step / self.steps_per_epoch)
        if step != self._begun and (step == 0 or epoch != int((step - 1) / self.steps_per_epoch)):
            self._begun = step
            # Equal on all ranks, as they all cluster the same; and after a resumption.
            reseed(self.options.seed, f"epoch {epoch}", 0)
            counter = FlopCounterMode(display=False)
            with counter:
                for name, proxy in self.trainee.each():
                    with whole(self.trainee):
                        proxy.start_epoch(epoch, self.once(name, epoch))
            self.flops_between += counter.get_total_flops() * self.fabric.world_size

    def _blame(self, step: int, sums: list[Sums], means: dict[str, float]) -> str:
        losses = [entry for part in sums for entry in part.losses]
        bad = [(name, volumes) for name, loss, volumes in losses if not torch.isfinite(loss)]
        if not bad and finite(means):
            every = ", ".join(sorted({volume for _, _, volumes in losses for volume in volumes}))
            return (
                f"step {step + 1}: a gradient is not finite, though the loss is {means['loss']:.4g}; "
                f"volumes of the batch: {every}; lower --lr, or use --precision 32; the last checkpoint is "
                f"intact"
            )
        if not bad:
            return (
                f"step {step + 1}: the loss is {means.get('loss')} on another rank; its message says more"
            )
        names = ", ".join(sorted({name for name, _ in bad}))
        suspects = sorted({volume for _, volumes in bad for volume in volumes})
        return (
            f"step {step + 1}: the loss of {names} is not finite; volumes of the batch: "
            f"{', '.join(suspects)}; look at them with `ssl3d info`, lower --lr, or use --precision 32; "
            f"the last checkpoint is intact"
        )

    # Before the first step ------------------------------------------------------------------------

    def foretell(self, start: int) -> None:
        """Estimate how long the run will take and what it needs, from trial steps on a copy, and log it."""
        left = self.options.steps - start
        if start == 0:
            self._new_epoch(0)  # a proxy that clusters cannot be tried before
        seconds, flops, share = self._trial()
        seconds /= share
        self.flops_per_step = round(flops / share) * self.fabric.world_size
        weights = sum(p.numel() * p.element_size() for p in self.trainee.parameters())
        encoder = sum(p.numel() * p.element_size() for p in self.trainee.encoder.parameters())
        count = sum(p.numel() for p in self.trainee.encoder.parameters())
        heads = sum(p.numel() for p in self.trainee.parameters()) - count
        moments = {"adamw": 2, "sgd": 1, "lars": 1}[self.options.optimizer]
        buffers = sum(b.numel() * b.element_size() for b in self.trainee.buffers())
        disk = 3 * (weights * (1 + moments) + buffers) + encoder * (1 + len(self.options.save_at))
        held = weights * moments
        memory = peak_memory(self.fabric.device) + held
        self.log.say(
            f"encoder {parameters(count)}, heads {parameters(heads)}; "
            f"{count_of(left, 'step')} of "
            f"{count_of(self.options.batch_size, 'volume')}, {self.flops_per_step:.3g} FLOPs a step"
        )
        self.log.say(
            f"expected: about {duration(seconds * left)} ({seconds:.3g} s a step), "
            f"{size(memory)} of memory, {size(disk)} on disk"
        )

    def _trial(self) -> tuple[float, int, float]:
        """Time and count a part of a step, forward and backward of a copy on the first data.

        Returns:
            Seconds, FLOPs, and the share of a step that they are for.

        Raises:
            TrainingError: A proxy makes parameters in `forward`, too late for the optimizer.
        """
        copied = self.spare or copy.deepcopy(self.trainee)
        self.spare = None
        for own, now in zip(copied.buffers(), self.trainee.buffers(), strict=True):
            own.copy_(now)  # what clustering before the first step has left
        # Of parts that are compared, two, and four volumes, which every loss can compare: of all that it
        # sees, the counter keeps alive what is computed again.
        volumes = self.options.batch_size // self.options.accumulate // self.fabric.world_size
        first = self._passes(self.feed.peek().groups)[0][: max(2, -(-4 // volumes))]
        share = len(first) / self.options.accumulate
        parts = [[group.to(self.fabric.device) for group in part] for part in first]
        seconds = 0.0
        counter = FlopCounterMode(display=False)
        balance = copied.balance
        known = {name for name, _ in copied.named_parameters()}
        for attempt in range(2):
            began = time.perf_counter()
            # The counter's hooks refuse the gradients that gradnorm takes in a forward pass: not counted.
            copied.balance = None if attempt == 0 else balance
            with counter if attempt == 0 else nullcontext():
                with self.fabric.autocast():
                    loss, _ = copied("loss of parts", parts, "trial")
                loss.backward()
            late = sorted({name for name, _ in copied.named_parameters()} - known)
            if late:
                raise TrainingError(
                    f"{late[0].removeprefix('proxies.')}: made by forward, when the optimizer has its "
                    "parameters already: make it in the proxy's __init__ or setup"
                )
            if self.fabric.device.type == "cuda":
                torch.cuda.synchronize(self.fabric.device)
            seconds = time.perf_counter() - began
            # Agreed on: losses gather over the ranks, so all go on or none does.
            _, enough = self.reducer.mean([], int(seconds > 5))
            if enough:
                break  # warm-up matters little by then
        # The gradient of zero that every parameter gets says nothing.
        if not any(p.grad is not None and bool(p.grad.any()) for p in copied.encoder.parameters()):
            self.log.say(
                "no gradient reached the encoder in a trial step: unless the proxy means it (as with a "
                "last layer that begins at zero), the encoder learns nothing; ssl3d.testing.check_proxy "
                "says more"
            )
        return seconds, counter.get_total_flops(), share


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a module for calls that do not go through it, where each rank holds a part.

    What such a call changes in them, on every rank alike, goes back into the parts.
    """
    if not hasattr(module, "unshard"):
        yield
        return
    from torch.distributed.tensor import distribute_tensor

    module.unshard()  # type: ignore[operator]
    before = {name: value._version for name, value in module.named_parameters()}
    yield
    changed = {
        name: value.detach().clone()
        for name, value in module.named_parameters()
        if value._version != before[name]
    }
    module.reshard()  # type: ignore[operator]
    with torch.no_grad():
        for name, value in module.named_parameters():
            if name in changed:
                value.copy_(distribute_tensor(changed[name], value.device_mesh, value.placements))  # type: ignore[attr-defined]


def reseed(seed: int, step: object, rank: int) -> None:
    """Seed the global generators for a step or epoch; dropout and the like take no generator."""
    number = seed_of(seed, "global", step, rank)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)
