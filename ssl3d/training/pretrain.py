"""Pretraining, from the command line and from Python: a run is built, started or resumed, and exported."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ssl3d import plugins
from ssl3d.amounts import count_of
from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.card import CARD
from ssl3d.checkpoint.encoders import load_encoder
from ssl3d.checkpoint.proxies import load_proxies
from ssl3d.checkpoint.snapshot import config_of
from ssl3d.encoder import Encoder
from ssl3d.errors import PluginError, Ssl3dError
from ssl3d.specs import encoder_from
from ssl3d.training.build import build_encoder, build_trainee, channels, lengths, size_notes
from ssl3d.training.device import (
    accelerator_of,
    apply_layout,
    check_compiler,
    check_descriptors,
    default_workers,
    device_words,
    launch,
    resolve_precision,
    set_threads,
)
from ssl3d.training.loggers import missing_loggers
from ssl3d.training.monitor import Log, read_metrics
from ssl3d.training.options import PretrainOptions, PretrainPlan, fold_of, plan_from, preset_values
from ssl3d.training.preempt import name_of, requeue
from ssl3d.training.run_folder import (
    check_code,
    check_same,
    metadata,
    plain_errors,
    settle,
    write_config,
)
from ssl3d.training.run_state import RunState
from ssl3d.training.selection import BY_TARGET, select

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection
    from ssl3d.proxy import Proxy


@dataclass
class Run:
    """Pretraining run in a folder on disk.

    Attributes:
        folder: Folder of the run.
        steps: Optimizer steps that the run takes.
        done: Optimizer steps that are saved.
        stopped: Number of the signal that stopped the run, 0 if none did.
    """

    folder: Path
    steps: int
    done: int
    stopped: int = 0

    @property
    def finished(self) -> bool:
        """Whether all steps are done and the encoder is written."""
        return self.done >= self.steps and (self.folder / "encoder" / CARD).is_file()

    @property
    def encoder(self) -> Encoder:
        """Pretrained encoder, read from the disk."""
        return load_encoder(self.folder)

    @property
    def proxies(self) -> dict[str, Proxy]:
        """Proxies by name, with their trained heads."""
        return load_proxies(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Records of the steps, one each."""
        return read_metrics(self.folder)


def pretrain(
    proxy: str | Path | type[Proxy] | Sequence[str | Path | type[Proxy]],
    data: str | Path | Collection | Sequence[str | Path] = "phantoms",
    out: str | Path | None = None,
    **options: Any,
) -> Run:
    """Pretrain an encoder, as `ssl3d pretrain` does.

    >>> run = ssl3d.pretrain("sorting", data="store.h5", steps=2000)  # doctest: +SKIP
    >>> encoder = run.encoder  # doctest: +SKIP

    Args:
        proxy: Name, file (PATH/file.py) or class of a proxy, or several of them.
        data: Stores, scans, phantoms[:N], or an open collection.
        out: Folder of the run.
        options: Fields of `PretrainOptions`, and dictionaries of a proxy's or encoder's options under
            its name, as in `encoder="resnet18", resnet18={"width": 32}, sorting={"slices": 8}`. An
            encoder may be a class too. With `preset="quick"`, say, they stand above the preset's.

    Returns:
        The run, finished, or stopped by a signal and ready to go on.

    Raises:
        Ssl3dError: The options, the data or the training fail as they do in the command.
    """
    named: dict[str, Any] = {}

    def name_and_keep(value: Any, group: str) -> str:
        if isinstance(value, str | Path):
            return str(value)
        name = plugins.remember(group, value)
        named[name] = value
        return name

    several = [proxy] if isinstance(proxy, str | Path | type) else list(proxy)
    values = preset_values(options.pop("preset", None), several) | options
    values["proxy"] = [name_and_keep(entry, plugins.PROXIES) for entry in several]
    if "encoder" in values:
        values["encoder"] = name_and_keep(values["encoder"], plugins.ENCODERS)
    collection: Collection | None = None
    if isinstance(data, str | Path):
        values["data"] = [str(data)]
    elif not isinstance(data, Sequence) or hasattr(data, "select"):
        collection = cast("Collection", data)
        values["data"] = [str(store.path) for store in collection.stores]
    else:
        values["data"] = [str(entry) for entry in data]
    plan = plan_from(values | ({"out": str(out)} if out else {}), "pretrain", named)
    return start(plan, collection)


def start(plan: PretrainPlan, data: Collection | None = None) -> Run:
    """Start a run in a new folder.

    Raises:
        UsageError: The folder is not empty, or options do not fit the data or the device.
        TrainingError: The loss is not finite, or the disk is full.
    """
    with plain_errors(plan.options.out) as settled:
        return _execute(plan, None, data, settled)


def resume(
    folder: str | Path, changes: PretrainOptions | None = None, given: set[str] | None = None
) -> Run:
    """Resume a run, which ends with the bytes that it would have ended with.

    Args:
        folder: Folder of the run.
        changes: Options that hold instead of the run's own, for the names in `given`.
        given: Names of the options to take from `changes`.

    Raises:
        CheckpointError: The folder holds no run, or none of its checkpoints is whole.
    """
    folder = Path(folder)
    values = config_of(folder)
    for name in given or set():
        if name != "resume":
            values[name] = getattr(changes, name)
    try:
        plan = plan_from(values, str(folder / "config.yaml"), recorded=True)
    except PluginError as error:
        raise PluginError(
            f"{error}; --resume needs it: put it back, or write its new name into config.yaml"
        ) from error
    with plain_errors(folder) as settled:
        return _execute(plan, folder, None, settled)


# ------------------------------------------------------------------------------------------------


def _execute(
    plan: PretrainPlan, folder: Path | None, data: Collection | None, settled: plain_errors
) -> Run:
    """Start the run of a plan, or go on with the one in a folder."""
    from ssl3d.data.open import open_data

    options = plan.options
    threads, precision = set_threads(options), resolve_precision(options)
    fabric = launch(options, precision)
    check_descriptors(default_workers(options, accelerator_of(options), fabric.world_size))
    if options.compile:
        check_compiler(fabric.device)
    log = Log(on=fabric.is_global_zero)
    checkpoint = snapshot.load_checkpoint(folder, log.say) if folder is not None else None
    initial = None
    if checkpoint is None and options.init is not None:  # a checkpoint has the weights; --init may be gone
        # Before the data: a typing error must not cost a long preparation.
        initial = encoder_from(options.init, options.seed)
    if data is None:
        with fabric.rank_zero_first(local=True):  # scans are prepared once per node
            data = open_data(options.data)
    by = str(checkpoint["about"]["data"].get("chosen_by", "")) if checkpoint else BY_TARGET
    selection = select(data, options.subjects, options.holdout, by, fold_of(options.leave_out))
    digest = selection.train.digest()
    config = channels(plan, selection.train)
    encoder = build_encoder(plan, config, initial)
    layout = apply_layout(encoder, encoder, fabric.device, options.memory_format)
    plan = plan.decided(
        encoder,
        precision=precision,
        threads=threads,
        memory_format=layout,
        **lengths(options, len(selection.train)),
    )
    if checkpoint is not None and folder is not None:
        check_code(checkpoint, plan, folder)
        check_same(checkpoint, digest, fabric, plan, folder, log)
        run = Run(folder, plan.options.steps, int(checkpoint["step"]))
        if run.finished:
            log.say(f"{folder} is finished: {count_of(run.steps, 'step')}, encoder in {folder / 'encoder'}")
            return Run(folder, run.steps, run.steps)
        card, outline = checkpoint["about"], checkpoint.get("outline")
    else:
        card = metadata(plan, selection.train, digest, initial.metadata if initial else None)
        outline = None
    # Whatever can be refused has been by now: only then is there a folder.
    trainee = build_trainee(plan, encoder, selection.train, outline)
    state = RunState(fabric, plan, selection, trainee, card, log, checkpoint)
    state.folder = settled.folder = settle(fabric, plan, folder)
    if fabric.is_global_zero:
        write_config(state.folder, plan)
        log.open(state.folder)
    log.say(f"run {state.folder}, {device_words(fabric, plan.options)}")
    for line in [
        *missing_loggers(plan.options.logger),
        *selection.notes,
        *size_notes(plan, selection.train),
    ]:
        log.say(line)
    if folder is not None:
        log.say(f"resuming at step {state.begin} of {plan.options.steps}")
    try:
        return _finish(state, *state.train())
    except Ssl3dError as error:
        log.note(str(error))
        raise
    finally:
        state.close_loggers(finished=False)  # a finished run has closed them
        log.close()


def _finish(state: RunState, done: int, signum: int) -> Run:
    """Export the encoder of a run that is done, and say where it is and what may come next."""
    folder, log, options = state.folder, state.log, state.plan.options
    if signum:
        queued = requeue() if name_of(signum) == "SIGUSR1" and state.fabric.is_global_zero else ""
        log.say(
            f"stopped by {name_of(signum)} after step {done} of {options.steps}, saved"
            f"{'; ' + queued if queued else ''}; go on with: ssl3d pretrain --resume "
            f"{shlex.quote(str(folder))}"
        )
        return Run(folder, options.steps, done, signum)
    state.export("encoder", options.steps)
    state.close_loggers(finished=True)
    beside = "".join(f"; {name} in {folder / name}" for name in state.exports)
    log.say(f"done: {count_of(options.steps, 'step')}; encoder in {folder / 'encoder'}{beside}")
    place, probe = (shlex.quote(str(path)) for path in (folder, folder / "probe"))
    log.say(f"next: ssl3d linear-probe {place} --data {_data_to_probe(state)} --out {probe}")
    return Run(folder, options.steps, options.steps)


def _data_to_probe(state: RunState) -> str:
    """Return words for data that a linear probe of the run's encoder can be fitted to."""
    train = state.selection.train
    if int(train.shapes[0][0]) != state.plan.encoder_config.in_channels:
        return "VOLUMES"  # the proxies took colours for slices
    labelled = bool(train.has_mask.any()) or any(label is not None for label in train.labels)
    return shlex.join(map(str, state.plan.options.data)) if labelled else "LABELLED.csv"
