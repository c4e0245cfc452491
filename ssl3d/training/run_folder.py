"""A run's folder: made, described, saved into, and checked when a run goes on."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl3d import plugins
from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.volumes_seen import hashes_complete, hashes_in, pack_hashes
from ssl3d.config import to_dict
from ssl3d.data.identity import identity_hash
from ssl3d.errors import CheckpointError, TrainingError, UsageError
from ssl3d.evaluation.leaks import volume_hashes
from ssl3d.specs import encoder_from
from ssl3d.training.monitor import Log
from ssl3d.training.options import Plan, PretrainOptions
from ssl3d.training.preempt import requeued
from ssl3d.training.selection import BY_TARGET
from ssl3d.training.trainee import Trainee

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ssl3d.data.store.collection import Collection

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_JOB = "slurm-job"


def settle(fabric: Fabric, plan: Plan, folder: Path | None) -> Path:
    """The run's folder, made by rank 0 and known to all.

    Raises:
        UsageError: It holds something, and --overwrite was not given.
    """
    answer = ""
    if folder is None and fabric.is_global_zero:
        folder, answer = _new_folder(plan)
    told = fabric.broadcast((str(folder), answer))
    if told[1]:
        raise UsageError(told[1])
    return Path(told[0])


def _new_folder(plan: Plan) -> tuple[Path, str]:
    out = plan.options.out
    if out is None:
        name, number = "-".join(plan.proxies), 1
        while True:
            folder = Path("runs") / f"{name}-{number}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                number += 1
                continue
            except OSError as error:
                return folder, f"--out {folder}: {error.strerror}"
            return folder, ""
    if out.exists() and not out.is_dir():
        return out, f"--out {out}: a file, not a folder"
    if out.is_dir() and any(out.iterdir()):
        if not plan.options.overwrite:
            return out, f"--out {out}: not empty; --overwrite replaces it, --resume {out} goes on with it"
        if not (out / "config.yaml").is_file():
            return out, f"--out {out}: holds no run, so --overwrite will not delete it"
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return out, f"--out {out}: {error.strerror}"
    return out, ""


def write_config(folder: Path, plan: Plan) -> None:
    """Writes `config.yaml`, which `--config` and `--resume` read."""
    import yaml

    temporary = folder / ".config.yaml.tmp"
    temporary.write_text(yaml.safe_dump(plan.as_config(), sort_keys=False), encoding="utf-8")
    temporary.replace(folder / "config.yaml")
    if os.environ.get("SLURM_JOB_ID"):
        (folder / _JOB).write_text(os.environ["SLURM_JOB_ID"] + "\n", encoding="utf-8")


def save_state(
    fabric: Fabric,
    plan: Plan,
    module: Any,
    trainee: Trainee,
    optimizer: Any,
    folder: Path,
    done: int,
    about: dict[str, Any],
) -> None:
    """Writes a checkpoint of so many steps; called on every rank."""
    spec = {
        "encoder": plan.encoder_name,
        "encoder_config": to_dict(plan.encoder_config),
        "proxies": {name: to_dict(config) for name, (_, config) in plan.proxies.items()},
    }
    state: dict[str, Any] = {
        "format": snapshot.FORMAT, "step": done, "steps": plan.options.steps, "patch": list(trainee.patch),
        "about": about, "world": fabric.world_size, "device": fabric.device.type, "spec": spec,
        "outline": trainee.outline,
        "precision": fabric.strategy.precision.state_dict(), "ranks": _own_buffers(fabric, trainee),
    }  # fmt: skip
    if sharded(fabric):
        whole = folder / ".sharded.tmp"
        fabric.save(whole, state | {"module": module, "optimizer": optimizer})
        if fabric.is_global_zero:
            snapshot.save_checkpoint(folder, done, lambda path: os.replace(whole, path))
    elif fabric.is_global_zero:
        state |= {"module": trainee.state_dict(), "optimizer": optimizer.state_dict()}
        snapshot.save_checkpoint(folder, done, lambda path: _torch_save(state, path))
    fabric.barrier()


def _own_buffers(fabric: Fabric, trainee: Trainee) -> list[dict[str, Tensor]]:
    """Each rank's buffers that are not the same on all ranks: statistics of batch norm, queues, banks.

    Called on every rank; only rank 0 is given them. Rank 0's own are in the state of the module.
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
    """The buffers that a state dict holds, by their names there, wrapped or not."""
    found = {}
    for prefix, module in trainee.named_modules():
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                place = f"{prefix}.{name}" if prefix else name
                for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
                    place = place.replace(wrapper, "")
                found[place] = value
    return found


def _digest(value: Tensor) -> str:
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(value.shape)} {hashlib.sha256(content.tobytes()).hexdigest()}"


def _torch_save(state: dict[str, Any], path: Path) -> None:
    # Through a file of Python's: a full disk is an OSError then, though torch hides it behind another.
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        raise cause or error from error


def restore(fabric: Fabric, module: Any, trainee: Trainee, optimizer: Any, found: dict[str, Any]) -> None:
    """Gives the optimizer, the scaler of 16 bit, and each rank its own buffers, the state of a checkpoint.

    With another number of ranks, all keep rank 0's buffers.
    """
    ranks = found.get("ranks") or []
    if len(ranks) == fabric.world_size:
        own = _persistent_buffers(trainee)
        with torch.no_grad():
            for name, value in ranks[fabric.global_rank].items():
                own[name].copy_(value)
    if sharded(fabric):
        from torch.distributed.fsdp import FullyShardedDataParallel

        inner = module._forward_module
        state = FullyShardedDataParallel.optim_state_dict_to_load(
            inner, optimizer.optimizer, found["optimizer"]
        )
        optimizer.optimizer.load_state_dict(state)
    else:
        optimizer.load_state_dict(found["optimizer"])
    fabric.strategy.precision.load_state_dict(found["precision"])


def full_state(fabric: Fabric, module: Any, trainee: Trainee) -> dict[str, Tensor]:
    """All weights and buffers, on rank 0; gathered where they are sharded."""
    if sharded(fabric):
        from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

        inner = module._forward_module
        whole = FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(inner, StateDictType.FULL_STATE_DICT, whole):
            gathered: dict[str, Tensor] = inner.state_dict()
        return gathered
    return trainee.state_dict()


def sharded(fabric: Fabric) -> bool:
    """Whether each rank holds a part of the weights (FSDP)."""
    return type(fabric.strategy).__name__ == "FSDPStrategy"


def metadata(plan: Plan, data: Collection, digest: str) -> dict[str, Any]:
    """What `encoder.json` says beside architecture and steps."""
    import numpy as np

    identities = {identity_hash(*person) for person in data.identities()}
    own = volume_hashes(data)
    volumes, unread = frozenset[str]().union(*own), sum(not one for one in own)
    labels = any(kind.uses_labels for kind, _ in plan.proxies.values())
    init = None
    if plan.options.init is not None:
        before = encoder_from(plan.options.init, plan.options.seed).metadata
        identities |= set(before.get("identities", []))
        volumes |= hashes_in(before) or frozenset()
        unread += not hashes_complete(before)
        labels = labels or bool(before.get("labels_seen", False))
        init = {"from": plan.options.init, "sha256": before.get("sha256"), "steps": before.get("steps")}
        if "foreign" in before:  # another toolkit's weights: whose, and what is to be cited
            init |= {"foreign": before["foreign"], "citation": before["citations"]["weights"]}
    citations = {name: kind.paper for name, (kind, _) in plan.proxies.items()}
    return {
        "spacing": [round(float(v), 6) for v in np.median(np.asarray(data.spacings, float), axis=0)],
        "preprocessing": data.settings,
        "proxies": {name: to_dict(config) for name, (_, config) in plan.proxies.items()},
        "batch_size": plan.options.batch_size,
        "optimizer": plan.options.optimizer,
        "lr": plan.options.lr,
        **({"plugins": sources} if (sources := _sources(plan)) else {}),
        "seed": plan.options.seed,
        "precision": plan.options.precision,
        "init": init,
        "data": {
            "digest": digest,
            "volumes": len(data),
            "datasets": sorted(set(map(str, data.datasets))),
            "chosen_by": BY_TARGET,
        },
        "identities": sorted(identities),
        "volumes_seen": pack_hashes(volumes) | ({"incomplete": True} if unread else {}),
        "labels_seen": labels,
        "citations": citations | {plan.encoder_name: plan.encoder.paper},
    }


def _sources(plan: Plan) -> dict[str, dict[str, str]]:
    """Where the plugins came from that are not installed, and the hash of their files."""
    classes = {name: (plugins.PROXIES, kind) for name, (kind, _) in plan.proxies.items()}
    classes[plan.encoder_name] = plugins.ENCODERS, plan.encoder
    found = {name: plugins.source_of(group, kind) for name, (group, kind) in classes.items()}
    return {name: source for name, source in found.items() if source is not None}


def check_code(found: dict[str, Any], plan: Plan, folder: Path) -> None:
    """Checks that plugins in files compute what they computed when the run began.

    Raises:
        CheckpointError: One does not.
    """
    before = found["about"].get("plugins", {})
    classes = {name: (plugins.PROXIES, kind) for name, (kind, _) in plan.proxies.items()}
    classes[plan.encoder_name] = plugins.ENCODERS, plan.encoder
    for name, (group, kind) in classes.items():
        changed = plugins.change_of(group, kind, before[name]) if name in before else ""
        if changed:
            raise CheckpointError(
                f"{folder}: {changed}; --resume goes on with the code that the run began with: put it "
                "back, or start a new run"
            )


def check_same(
    found: dict[str, Any], digest: str, fabric: Fabric, options: PretrainOptions, folder: Path, log: Log
) -> None:
    """Checks that a run goes on with its own data and length; notes a change of device or ranks.

    Raises:
        CheckpointError: It does not.
    """
    if found["about"]["data"]["digest"] != digest:
        before = found["about"]["data"]["digest"]
        raise CheckpointError(
            f"{folder}: its data have changed (digest {before[:12]} then, {digest[:12]} now); "
            "give the same with --data, or start a new run with --init"
        )
    if found["steps"] != options.steps:
        raise CheckpointError(
            f"{folder}: config.yaml says {options.steps} steps, its checkpoint {found['steps']}"
        )
    for what, then, now in (
        ("processes", found["world"], fabric.world_size),
        ("device", found["device"], fabric.device.type),
    ):
        if then != now:
            kept = "; every process starts with the buffers of the first" if what == "processes" else ""
            log.say(
                f"note: {what} {then} before, {now} now: the run goes on, but not to the same bytes{kept}"
            )


def requeued_run(plan: Plan) -> Path | None:
    """The run that this SLURM job was at before it was put back into the queue, if any."""
    if not requeued():
        return None
    out = plan.options.out
    several = [out] if out else sorted(Path("runs").glob(f"{'-'.join(plan.proxies)}-*"))
    for folder in several:
        if _job_of(folder) == os.environ.get("SLURM_JOB_ID") and (folder / "config.yaml").is_file():
            return folder
    return None


def _job_of(folder: Path) -> str | None:
    path = folder / _JOB
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


class plain_errors:
    """Turns a full disk into one line; other errors stay what they are."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            raise TrainingError(
                f"{self.folder or 'runs'}: cannot be written ({error.strerror}); checkpoints are intact: "
                f"make room, then ssl3d pretrain --resume {self.folder or 'RUN'}"
            ) from error
