"""A pretraining run while it trains: what it holds, and how checkpoints and encoders are written of it."""

from __future__ import annotations

import copy
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.card import FORMAT
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.checkpoint.weights import load_strictly, restore_optimizer, tensor_bytes
from ssl3d.config import to_dict
from ssl3d.errors import CheckpointError
from ssl3d.training.build import (
    EpochBatches,
    encoder_with,
    exports_of,
    holdout_batches,
    loader_of,
    travellers_of,
    travellers_with,
)
from ssl3d.training.device import apply_layout, compile_encoders, device_words, peak_memory
from ssl3d.training.loggers import Loggers
from ssl3d.training.loop import Feed, Loop
from ssl3d.training.monitor import Log, Monitor
from ssl3d.training.optim import build_optimizer, without_decay
from ssl3d.training.options import PretrainPlan
from ssl3d.training.selection import Selection
from ssl3d.training.trainee import Trainee

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class RunState:
    """A pretraining run in this process, built and ready, on every rank.

    Attributes:
        folder: Folder of the run; set when it exists.
        begin: Step that the run starts with: 0, or that of the checkpoint it goes on from.
        exports: Encoders that proxies export beside the shared one: folder -> prefix in a trainee's state.
        loggers: Loggers of the run, on rank 0 alone; set when it trains.

    Args:
        fabric: Fabric, launched.
        plan: Plan of the run, everything decided.
        selection: Volumes to train on, to keep out, and to score.
        trainee: Encoder and proxies, not wrapped yet.
        card: Content of `encoder.json` beside architecture, patch and steps.
        log: Log of the run.
        checkpoint: Checkpoint to go on from; None for a new run.

    Raises:
        PluginError: A proxy exports, or sends along, what cannot be written.
    """

    def __init__(
        self,
        fabric: Fabric,
        plan: PretrainPlan,
        selection: Selection,
        trainee: Trainee,
        card: dict[str, Any],
        log: Log,
        checkpoint: dict[str, Any] | None,
    ) -> None:
        self.fabric, self.plan, self.selection, self.trainee = fabric, plan, selection, trainee
        self.card, self.log, self.checkpoint = card, log, checkpoint
        self.begin = int(checkpoint["step"]) if checkpoint else 0
        self.travellers, self.exports = travellers_of(trainee), exports_of(trainee)
        self.folder = Path()
        self.loop: Loop
        self.loggers: Loggers | None = None
        self._began = time.perf_counter()
        self._earlier = float(card.get("compute", {}).get("seconds", 0.0))

    @property
    def _origin(self) -> str:
        """Checkpoint that the run goes on from, for messages."""
        return f"{self.folder}, checkpoint of step {self.begin}"

    def train(self) -> tuple[int, int]:
        """Train to the end, or until a signal stops the run.

        Returns:
            Steps that are saved, and the signal, or 0.

        Raises:
            TrainingError: The loss or a gradient is not finite, or the disk is full.
        """
        self._wrap()
        steps, loop = self.plan.options.steps, self.loop
        if self.begin >= steps:
            self._start_loggers()  # the encoder is still to come
            return self.begin, 0
        try:  # the first step is tried here, and may fail: workers are waiting by then
            loop.foretell(self.begin)
            # A run that goes on keeps the number it began with.
            self.card.setdefault("compute", {"flops_per_step": loop.flops_per_step})
            # After the workers were forked: they inherit no thread of a logger.
            self._start_loggers()
            if self.fabric.is_global_zero:
                every, mains = self.plan.options.log_every, self.plan.mains
                loop.monitor = Monitor(self.folder, self.begin, steps, every, mains, self.log, self.loggers)
            return loop.run(self.begin)
        finally:
            loop.feed.close()
            if loop.monitor is not None:
                loop.monitor.close()

    def _start_loggers(self) -> None:
        if self.fabric.is_global_zero:
            names, config = self.plan.options.logger, self.plan.as_config()
            name = self.folder.resolve().name
            self.loggers = Loggers(names, self.folder, name, config, self.log.say, begin=self.begin)

    def close_loggers(self, finished: bool) -> None:
        """Hand what a finished run has exported to its loggers, and close them."""
        if self.loggers is None:
            return
        if finished:
            for name in ("encoder", *self.exports):
                self.loggers.artefact(name, self.folder / name)
        self.loggers.close(finished)
        self.loggers = None

    def save(self, done: int) -> None:
        """Write a checkpoint after so many steps; every rank calls it.

        Raises:
            TrainingError: The disk is full; older checkpoints are intact.
        """
        self._account(done)
        fabric, plan, trainee, folder = self.fabric, self.plan, self.trainee, self.folder
        state: dict[str, Any] = {
            "format": FORMAT,
            "step": done,
            "steps": plan.options.steps,
            "patch": list(trainee.patch),
            "about": self.card,
            "world": fabric.world_size,
            "device": fabric.device.type,
            "spec": {
                "encoder": plan.encoder_name,
                "encoder_config": to_dict(plan.encoder_config),
                "proxies": {name: to_dict(config) for name, (_, config) in plan.proxies.items()},
            },
            "options": plan.compared(),
            "outline": trainee.outline,
            "precision": fabric.strategy.precision.state_dict(),
            "ranks": _own_buffers(fabric, trainee),
        }
        state |= {"module": self._weights(), "optimizer": self._moments()}
        if fabric.is_global_zero:
            snapshot.save_checkpoint(folder, done, lambda path: snapshot.write_state(state, path))
        fabric.barrier()

    def export(self, name: str, done: int) -> None:
        """Write the encoder, and what goes beside it, into a folder of the run; every rank calls it.

        Raises:
            TrainingError: The disk is full or the folder cannot be written.
        """
        self._account(done)
        plan, weights = self.plan, self._weights()
        if self.fabric.is_global_zero:
            card = self.card | {"patch": list(self.trainee.patch), "steps": done}
            travellers = travellers_with(self.travellers, weights)
            save_encoder(encoder_with(plan, weights), self.folder / name, card, travellers)
            for other, prefix in self.exports.items():
                place = self.folder / name.replace("encoder", other)
                save_encoder(encoder_with(plan, weights, prefix), place, card | {"exported": other})
        self.fabric.barrier()

    def _wrap(self) -> None:
        """Put the weights in place, wrap them for the ranks, and make optimizer and loop."""
        fabric, plan, trainee, checkpoint = self.fabric, self.plan, self.trainee, self.checkpoint
        options, train = plan.options, self.selection.train
        if checkpoint:
            trainee.patch[:] = checkpoint["patch"]
            load_strictly(trainee, checkpoint["module"], self._origin, "the run")
        apply_layout(trainee, trainee.encoder, fabric.device, options.memory_format)
        trainee.train()
        loader = loader_of(train, plan, fabric, self.begin, self.log)
        spared = without_decay(trainee)
        spare = copy.deepcopy(trainee) if _sharded(fabric) else None  # impossible once it is sharded
        self.module: Any = fabric.setup_module(trainee)
        if options.compile:
            compile_encoders(trainee)
        self.optimizer: Any = fabric.setup_optimizers(
            build_optimizer(self.module.named_parameters(), spared, options)
        )
        if checkpoint:
            self._restore(checkpoint)
        self.loop = Loop(
            fabric=fabric,
            options=options,
            trainee=trainee,
            module=self.module,
            optimizer=self.optimizer,
            feed=Feed(iter(loader)),
            selection=self.selection,
            holdout=lambda: holdout_batches(self.selection.holdout, plan, fabric, self.log),
            steps_per_epoch=max(len(train) / options.batch_size, 1e-9),
            once=lambda name, epoch: EpochBatches(loader, name, epoch, fabric.device),
            log=self.log,
            save=self.save,
            export=self.export,
            spare=spare,
            flops_between=int(self.card.get("compute", {}).get("flops_between_epochs", 0)),
        )

    def _account(self, done: int) -> None:
        """Add up what so many steps, and what went between epochs, have cost so far."""
        if "compute" not in self.card:
            return
        compute, between = self.card["compute"], self.loop.flops_between
        self.card["compute"] = compute | {
            "flops_between_epochs": between,
            "flops": compute["flops_per_step"] * done + between,
            "seconds": round(self._earlier + time.perf_counter() - self._began, 1),
            "peak_memory": max(int(compute.get("peak_memory", 0)), peak_memory(self.fabric.device)),
            "where": device_words(self.fabric, self.plan.options),
        }

    def _weights(self) -> dict[str, Tensor]:
        """Return all weights and buffers, on rank 0; they are gathered where they are sharded."""
        if not _sharded(self.fabric):
            return self.trainee.state_dict()
        from torch.distributed.checkpoint import state_dict as gathering

        whole = gathering.StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered: Any = gathering.get_model_state_dict(self.trainee, options=whole)
        weights: dict[str, Tensor] = gathered
        return weights

    def _moments(self) -> dict[str, Any]:
        """Return the state of the optimizer, on rank 0; where it is sharded it is gathered, by names."""
        if not _sharded(self.fabric):
            state: dict[str, Any] = self.optimizer.state_dict()
            return state
        from torch.distributed.checkpoint import state_dict as gathering

        whole = gathering.StateDictOptions(full_state_dict=True, cpu_offload=True)
        inner = self.optimizer.optimizer
        return dict(gathering.get_optimizer_state_dict(self.trainee, inner, options=whole))

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        """Give the optimizer, the scaler of 16 bit, and each rank its own buffers, their state of then.

        With another number of ranks, all keep rank 0's buffers.

        Raises:
            CheckpointError: They are not those of this run.
        """
        try:
            self._restore_parts(checkpoint)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CheckpointError(f"{self._origin}: is not one of this run ({reason})") from error

    def _restore_parts(self, checkpoint: dict[str, Any]) -> None:
        fabric, optimizer = self.fabric, self.optimizer
        ranks = checkpoint.get("ranks") or []
        if len(ranks) == fabric.world_size:
            own = _persistent_buffers(self.trainee)
            with torch.no_grad():
                for name, value in ranks[fabric.global_rank].items():
                    own[name].copy_(value)
        if _sharded(fabric):
            from torch.distributed.checkpoint import state_dict as gathering

            gathering.set_optimizer_state_dict(
                self.trainee,
                optimizer.optimizer,
                checkpoint["optimizer"],
                options=gathering.StateDictOptions(full_state_dict=True),
            )
        else:
            restore_optimizer(optimizer.optimizer, checkpoint["optimizer"])
        fabric.strategy.precision.load_state_dict(checkpoint["precision"])


def _sharded(fabric: Fabric) -> bool:
    """Tell whether each rank holds a part of the weights (FSDP)."""
    return type(fabric.strategy).__name__ == "ModelParallelStrategy"


def _own_buffers(fabric: Fabric, trainee: Trainee) -> list[dict[str, Tensor]]:
    """Gather each rank's buffers that differ between ranks: statistics of batch norm, queues, banks.

    Every rank calls it; only rank 0 is given them. Rank 0's own are in the state of the module.
    """
    if fabric.world_size == 1:
        return []
    import torch.distributed as dist

    own = _persistent_buffers(trainee)
    offered: list[Any] = [None] * fabric.world_size
    dist.all_gather_object(offered, {name: _digest(value) for name, value in own.items()})
    differ = [name for name in own if len({digests.get(name) for digests in offered}) > 1]
    if not differ:
        return []
    mine: dict[str, Tensor] = {}
    if not fabric.is_global_zero:
        mine = {name: own[name].detach().cpu() for name in differ}
    gathered: list[Any] | None = [None] * fabric.world_size if fabric.is_global_zero else None
    dist.gather_object(mine, gathered, dst=0)
    return gathered or []


def _persistent_buffers(trainee: Trainee) -> dict[str, Tensor]:
    """Collect the buffers that a state dict holds, by their names there."""
    buffers = {}
    for prefix, module in trainee.named_modules():
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                buffers[f"{prefix}.{name}" if prefix else name] = value
    return buffers


def _digest(value: Tensor) -> str:
    return f"{tuple(value.shape)} {hashlib.sha256(tensor_bytes(value)).hexdigest()}"
