"""The folder of a run: made, described, and checked when the run goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d import plugins
from ssl3d.checkpoint.card import encoder_folder, read_card
from ssl3d.checkpoint.volumes_seen import hashes_complete, hashes_in, hashes_together, pack_hashes
from ssl3d.config import to_dict
from ssl3d.data.identity import identity_hash
from ssl3d.errors import (
    FULL_DISK,
    CheckpointError,
    TransientError,
    UsageError,
    is_out_of_memory,
    not_written,
)
from ssl3d.evaluation.leaks import volume_hashes
from ssl3d.files import NOT_OURS, write_whole
from ssl3d.training.monitor import Log
from ssl3d.training.options import PretrainPlan
from ssl3d.training.preempt import restarted
from ssl3d.training.selection import BY_TARGET
from ssl3d.yaml_files import dump_yaml

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ssl3d.data.store.collection import Collection

_JOBS = {"slurm-job": "SLURM_JOB_ID", "torchrun-job": "TORCHELASTIC_RUN_ID"}
"""Files that name the job of a run, and the variables that hold its name."""

_OF_THE_MACHINE = frozenset(("precision", "memory_format", "threads", "compile", "strategy"))
"""Options that another machine may need otherwise: a run goes on with them, but not to the same bytes."""


def settle(fabric: Fabric, plan: PretrainPlan, folder: Path | None) -> Path:
    """Settle the folder of a run, which rank 0 makes and all ranks know.

    Raises:
        UsageError: The folder is not empty and --overwrite was not given, or it cannot be made.
    """
    answer = ""
    if folder is None and fabric.is_global_zero:
        folder, answer = _new_folder(plan)
    settled = fabric.broadcast((str(folder), answer))
    if settled[1]:
        raise UsageError(settled[1])
    return Path(settled[0])


def _new_folder(plan: PretrainPlan) -> tuple[Path, str]:
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
        return out, f"--out {out}: is a file, not a folder; name another one"
    if out.is_dir() and not _is_unused(out):
        if not plan.options.overwrite:
            return (
                out,
                f"--out {out}: is not empty; --overwrite replaces it, --resume {out} goes on with it",
            )
        if not (out / "config.yaml").is_file():
            return out, f"--out {out}: holds no run, so --overwrite does not delete it; name another folder"
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return out, f"--out {out}: {error.strerror}"
    return out, ""


def _is_unused(folder: Path) -> bool:
    """Tell whether a folder holds at most the first file of a run that was killed while it wrote it."""
    return all(path.name.startswith(".config.yaml.") and path.suffix == ".tmp" for path in folder.iterdir())


def write_config(folder: Path, plan: PretrainPlan) -> None:
    """Write `config.yaml`, which `--config` and `--resume` read; without it the folder goes."""
    try:
        write_whole(folder / "config.yaml", dump_yaml(plan.as_config()))
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    for name, variable in _JOBS.items():
        if os.environ.get(variable):
            (folder / name).write_text(os.environ[variable] + "\n", encoding="utf-8")


def metadata(
    plan: PretrainPlan, data: Collection, digest: str, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what `encoder.json` says of a run beside architecture and steps.

    Args:
        plan: Plan of the run, everything decided.
        data: Volumes to train on.
        digest: Digest of those volumes.
        before: Card of the encoder that --init starts from; None where the run starts from new weights.
    """
    import numpy as np

    identities = {identity_hash(*person) for person in data.identities()}
    own = volume_hashes(data)
    volumes, unread = frozenset[str]().union(*own), sum(not hashes for hashes in own)
    labels = any(kind.uses_labels for kind, _ in plan.proxies.values())
    init = None
    for card in [*([] if before is None else [before]), *_cards_used(plan)]:
        identities |= set(card.get("identities", []))
        volumes |= hashes_in(card) or frozenset()
        unread += not hashes_complete(card)
        labels = labels or bool(card.get("labels_seen", False))
    if before is not None:
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
            **({"modalities": kinds} if (kinds := _modalities(data)) else {}),
            "chosen_by": BY_TARGET,
        },
        "identities": sorted(identities),
        "volumes_seen": pack_hashes(volumes) | ({"incomplete": True} if unread else {}),
        "labels_seen": labels,
        "citations": citations | {plan.encoder_name: plan.encoder.paper},
    }


def _modalities(data: Collection) -> dict[str, str]:
    """Return the modality of each data set whose scans say it, and all the same."""
    kinds_of: dict[str, set[str]] = {}
    for settings in data.settings:
        for name, kind in (settings.get("modalities") or {}).items():
            kinds_of.setdefault(str(name), set()).add(str(kind))
    names = set(map(str, data.datasets))
    return {
        name: kinds.pop() for name, kinds in sorted(kinds_of.items()) if name in names and len(kinds) == 1
    }


def _cards_used(plan: PretrainPlan) -> list[dict[str, Any]]:
    """Read the cards of the runs that the proxies learn from."""
    folders = [Path(run) for kind, own in plan.proxies.values() for run in kind.runs_used(own)]
    return [hashes_together(read_card(encoder_folder(path)), encoder_folder(path)) for path in folders]


def _sources(plan: PretrainPlan) -> dict[str, dict[str, str]]:
    """Record the origin of plugins that are not installed, and the hash of their files."""
    classes = {name: (plugins.PROXIES, kind) for name, (kind, _) in plan.proxies.items()}
    classes[plan.encoder_name] = plugins.ENCODERS, plan.encoder
    sources = {name: plugins.source_of(group, kind) for name, (group, kind) in classes.items()}
    return {name: source for name, source in sources.items() if source is not None}


def check_code(checkpoint: dict[str, Any], plan: PretrainPlan, folder: Path) -> None:
    """Check that plugins in files compute what they computed when the run began.

    Raises:
        CheckpointError: The code of a plugin has changed.
    """
    before = checkpoint["about"].get("plugins", {})
    classes = {name: (plugins.PROXIES, kind) for name, (kind, _) in plan.proxies.items()}
    classes[plan.encoder_name] = plugins.ENCODERS, plan.encoder
    for name, (group, kind) in classes.items():
        changed = plugins.change_of(group, kind, before[name]) if name in before else ""
        if changed:
            raise CheckpointError(
                f"{folder}: {changed}; --resume needs the code that the run began with: put it back, or "
                "start a new run"
            )


def check_same(
    checkpoint: dict[str, Any],
    digest: str,
    fabric: Fabric,
    plan: PretrainPlan,
    folder: Path,
    log: Log,
) -> None:
    """Check that a run goes on with its own data and options, and note a change of machine.

    Raises:
        CheckpointError: The data, or an option that decides what is learnt, have changed.
    """
    if checkpoint["about"]["data"]["digest"] != digest:
        before = checkpoint["about"]["data"]["digest"]
        raise CheckpointError(
            f"{folder}: its data have changed (digest {before[:12]} then, {digest[:12]} now); "
            "give the same with --data, or start a new run with --init"
        )
    differ = _options_that_differ(checkpoint.get("options") or {"steps": checkpoint["steps"]}, plan)
    for name, (then, now) in differ.items():
        if name not in _OF_THE_MACHINE:
            raise CheckpointError(
                f"{folder}: config.yaml says {name} {now}, its checkpoint {then}; write that of the "
                "checkpoint into config.yaml, or start a new run with --init"
            )
    of_machine = {
        "processes": (checkpoint["world"], fabric.world_size),
        "device": (checkpoint["device"], fabric.device.type),
    } | differ
    for name, (then, now) in of_machine.items():
        if then != now:
            kept = "; every process starts with the buffers of the first" if name == "processes" else ""
            log.say(
                f"note: {name} {then} before, {now} now; the run goes on, but not to the same bytes{kept}"
            )


def _options_that_differ(before: Mapping[str, Any], plan: PretrainPlan) -> dict[str, tuple[Any, Any]]:
    """Return the options that are not those of a checkpoint, then and now; a section's as `section.name`.

    Options that one of the two versions of ssl3d does not have are left out.
    """

    def flat(options: Mapping[str, Any]) -> dict[str, Any]:
        lines: dict[str, Any] = {}
        for name, value in options.items():
            if isinstance(value, Mapping):
                lines |= {f"{name}.{key}": own for key, own in value.items()}
            else:
                lines[name] = value
        return lines

    def parts(options: Mapping[str, Any]) -> list[str]:
        return sorted(name for name, value in options.items() if isinstance(value, Mapping))

    own = plan.compared()
    if parts(before) and parts(before) != parts(own):
        return {"encoder and proxies": (", ".join(parts(before)), ", ".join(parts(own)))}
    then, now = flat(before), flat(own)
    return {name: (then[name], now[name]) for name in then if name in now and then[name] != now[name]}


def requeued_run(plan: PretrainPlan) -> Path | None:
    """Find the run that this job was at before SLURM or torchrun started it again, if any."""
    variables = restarted()
    if not variables:
        return None
    out = plan.options.out
    several = [out] if out else sorted(Path("runs").glob(f"{'-'.join(plan.proxies)}-*"))
    for folder in several:
        own = any(
            _text_of(folder / name) == os.environ.get(variable)
            for name, variable in _JOBS.items()
            if variable in variables
        )
        if own and (folder / "config.yaml").is_file():
            return folder
    return None


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


_RANK_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What gloo and NCCL say where another rank is gone."""


class plain_errors:
    """Context that turns a failure of the machine into one line; other errors stay what they are."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __enter__(self) -> plain_errors:
        """Return the context, whose folder is set once the run has one."""
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno in NOT_OURS:
            needed = "make room" if error.errno in FULL_DISK else "mend that"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                needed = "raise `ulimit -n`, or give --workers 0"
            failure = f"{self._where}: {os.strerror(error.errno)}"
        elif (isinstance(error, RuntimeError) and "DataLoader worker" in str(error)) or (
            isinstance(error, ConnectionError) and _of_a_socket(error)
        ):
            needed = "give fewer --workers, or smaller crops"
            failure = f"{self._where}: a process that reads data has died, as it does where memory is short"
        elif isinstance(error, FileNotFoundError) and _of_a_socket(error):
            needed = "leave that folder alone, or set TMPDIR to another"
            failure = (
                f"{self._where}: the processes that read data cannot be reached; has something emptied "
                f"{tempfile.gettempdir()}, where they listen?"
            )
        elif isinstance(error, RuntimeError) and "Too many open files" in str(error):
            needed = "raise `ulimit -n`, or give --workers 0"
            failure = f"{self._where}: too many open files"
        elif isinstance(error, RuntimeError) and any(word in str(error) for word in _RANK_GONE):
            needed = "see what ended it"
            failure = f"{self._where}: the process of another rank has ended"
        elif is_out_of_memory(error):
            needed = "give a smaller --batch-size, or smaller crops"
            failure = f"{self._where}: out of memory"
        else:
            return
        if self.folder is None or not (self.folder / "config.yaml").is_file():
            message = f"{failure}; nothing is saved: {needed}, and start again"
        else:
            message = (
                f"{failure}; checkpoints are intact: {needed}, then ssl3d pretrain --resume {self.folder}"
            )
        if isinstance(error, OSError) and error.errno in NOT_OURS:
            raise not_written(error, message) from error
        raise TransientError(message) from error

    @property
    def _where(self) -> Path | str:
        return self.folder or "runs"


def _of_a_socket(error: OSError) -> bool:
    """Tell whether a connection between processes failed; no file is named, and no worker raised it."""
    return error.errno is not None and error.filename is None
