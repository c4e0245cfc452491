"""Pretraining, from the command line and from Python: builds a run, starts or resumes it, exports it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ssl3d import plugins
from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.card import CARD
from ssl3d.checkpoint.encoders import load_encoder, save_encoder
from ssl3d.checkpoint.proxies import load_proxies
from ssl3d.checkpoint.snapshot import config_of
from ssl3d.encoder import Encoder
from ssl3d.errors import PluginError, Ssl3dError, UsageError
from ssl3d.specs import encoder_from
from ssl3d.training.build import (
    Once,
    Traveller,
    build_encoder,
    build_trainee,
    channels,
    encoder_with,
    exports_of,
    holdout_batches,
    lengths,
    loader_of,
    travellers_of,
    travellers_with,
)
from ssl3d.training.device import apply_layout, make_fabric, peak_memory, resolve_precision, set_threads
from ssl3d.training.loop import Feed, Loop
from ssl3d.training.monitor import Log, Monitor, read_metrics
from ssl3d.training.optim import build_optimizer, without_decay
from ssl3d.training.options import Plan, PretrainOptions, plan_from, preset_values
from ssl3d.training.preempt import name_of, requeue
from ssl3d.training.run_folder import (
    check_code,
    check_same,
    full_state,
    metadata,
    plain_errors,
    restore,
    save_state,
    settle,
    write_config,
)
from ssl3d.training.selection import BY_TARGET, Selection, select
from ssl3d.training.trainee import Trainee

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ssl3d.data.store.collection import Collection
    from ssl3d.proxy import Proxy


@dataclass
class Run:
    """A pretraining run on disk.

    Attributes:
        folder: Of the run.
        steps: Optimizer steps it has.
        done: Steps that are saved.
        stopped: The signal that stopped it, 0 if none did.
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
        """The pretrained encoder, from the disk."""
        return load_encoder(self.folder)

    @property
    def proxies(self) -> dict[str, Proxy]:
        """The proxies with their trained heads."""
        return load_proxies(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per step."""
        return read_metrics(self.folder)


def pretrain(
    proxy: str | Path | type[Proxy] | Sequence[str | Path | type[Proxy]],
    data: str | Path | Collection | Sequence[str | Path] = "phantoms",
    out: str | Path | None = None,
    **options: Any,
) -> Run:
    """Pretrains an encoder; the same as `ssl3d pretrain`.

    >>> run = ssl3d.pretrain("sorting", data="store.h5", steps=2000)  # doctest: +SKIP
    >>> encoder = run.encoder  # doctest: +SKIP

    Args:
        proxy: Name, file (PATH/file.py) or class of a proxy, or several.
        data: Stores, scans, phantoms[:N], or an open collection.
        out: Run folder.
        options: Fields of `PretrainOptions`, and dictionaries of a proxy's or encoder's options under
            its name, as in `encoder="resnet18", resnet18={"width": 32}, sorting={"slices": 8}`. An
            encoder may be a class too. With `preset="quick"`, say, they stand above the preset's.

    Raises:
        Ssl3dError: As the command does.
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
    values["proxy"] = [name_and_keep(one, plugins.PROXIES) for one in several]
    if "encoder" in values:
        values["encoder"] = name_and_keep(values["encoder"], plugins.ENCODERS)
    collection: Collection | None = None
    if isinstance(data, str | Path):
        values["data"] = [str(data)]
    elif not isinstance(data, Sequence) or hasattr(data, "select"):
        collection = cast("Collection", data)
        values["data"] = [str(store.path) for store in collection.stores]
    else:
        values["data"] = [str(one) for one in data]
    plan = plan_from(values | ({"out": str(out)} if out else {}), "pretrain", named)
    return start(plan, collection)


def start(plan: Plan, data: Collection | None = None) -> Run:
    """Starts a run in a new folder.

    Raises:
        UsageError: The folder is not empty, or options do not fit the data or the device.
        TrainingError: The loss is not finite, or the disk is full.
    """
    with plain_errors(plan.options.out):
        return _execute(plan, None, data)


def resume(
    folder: str | Path, changes: PretrainOptions | None = None, given: set[str] | None = None
) -> Run:
    """Goes on with a run; it ends with the bytes that it would have ended with.

    Args:
        folder: Of the run.
        changes: Options that hold instead of the run's own, for the names in `given`.
        given: See `changes`.

    Raises:
        CheckpointError: There is no run, or none of its checkpoints is whole.
    """
    folder = Path(folder)
    values = config_of(folder)
    for name in given or set():
        if name != "resume":
            values[name] = getattr(changes, name)
    try:
        plan = plan_from(values, str(folder / "config.yaml"))
    except PluginError as error:
        raise PluginError(
            f"{error}; --resume needs it: put it back, or write into config.yaml what it is called now"
        ) from error
    with plain_errors(folder):
        return _execute(plan, folder, None)


# ------------------------------------------------------------------------------------------------


def _execute(plan: Plan, folder: Path | None, data: Collection | None) -> Run:
    from ssl3d.data.open import open_data

    resuming = folder is not None
    options = plan.options
    threads = set_threads(options)
    precision = resolve_precision(options)
    fabric = make_fabric(options, precision)
    if fabric.world_size > 1 or fabric.strategy.launcher is not None:
        fabric.launch()
    log = Log(on=fabric.is_global_zero)
    if options.batch_size % (options.accumulate * fabric.world_size):
        raise UsageError(
            f"--batch-size {options.batch_size}: must be a multiple of --accumulate {options.accumulate} "
            f"times {fabric.world_size} processes"
        )
    if options.init is not None and not resuming:
        encoder_from(options.init, options.seed)  # a typing error must not cost a long preparation
    if data is None:
        with fabric.rank_zero_first(local=True):  # scans are prepared once per node
            data = open_data(options.data)
    found = snapshot.load_checkpoint(folder, log.say) if folder is not None else None
    by = str(found["about"]["data"].get("chosen_by", "")) if found else BY_TARGET
    selection = select(data, options.subjects, options.holdout, by)
    digest = selection.train.digest()
    options = replace(options, precision=precision, threads=threads)
    options = replace(options, **lengths(options, len(selection.train)))
    plan = replace(plan, options=options, encoder_config=channels(plan, selection.train))
    encoder = build_encoder(plan, found is not None)
    layout = apply_layout(encoder, encoder, fabric.device, options.memory_format)
    plan = replace(plan, encoder=type(encoder), encoder_config=encoder.config)
    options = replace(options, memory_format=layout, encoder=plan.encoder_name)
    plan = replace(plan, options=options)
    about = found["about"] if found else metadata(plan, selection.train, digest)
    if found is not None and folder is not None:
        check_code(found, plan, folder)
        check_same(found, digest, fabric, options, folder, log)
        if Run(folder, options.steps, int(found["step"])).finished:
            log.say(f"{folder} is finished: {options.steps} steps, encoder in {folder / 'encoder'}")
            return Run(folder, options.steps, options.steps)
    # Whatever can be refused has been by now: only then is there a folder.
    trainee = build_trainee(plan, encoder, selection.train, found.get("outline") if found else None)
    travelling, exported = travellers_of(trainee), exports_of(trainee)
    folder = settle(fabric, plan, folder)
    if fabric.is_global_zero:
        write_config(folder, plan)
        log.open(folder)
    log.say(f"run {folder}, {_where(fabric, options)}")
    for line in selection.told:
        log.say(line)
    if resuming:
        log.say(f"resuming at step {found['step'] if found else 0} of {options.steps}")
    try:
        return _train(fabric, plan, folder, selection, trainee, travelling, exported, found, about, log)
    except Ssl3dError as error:
        log.note(str(error))
        raise
    finally:
        log.close()


def _train(
    fabric: Fabric,
    plan: Plan,
    folder: Path,
    selection: Selection,
    trainee: Trainee,
    travelling: Mapping[str, Traveller],
    exported: Mapping[str, str],
    found: dict[str, Any] | None,
    about: dict[str, Any],
    log: Log,
) -> Run:
    options = plan.options
    began, earlier = time.perf_counter(), float(about.get("compute", {}).get("seconds", 0.0))
    begin = int(found["step"]) if found else 0
    run = Run(folder, options.steps, begin)
    patch = trainee.patch
    if found:
        patch[:] = found["patch"]
        trainee.load_state_dict(found["module"])
    apply_layout(trainee, trainee.encoder, fabric.device, options.memory_format)
    trainee.train()
    loader = loader_of(selection.train, plan, fabric, begin, log)
    batches = iter(loader)
    spared = without_decay(trainee)
    module = fabric.setup_module(trainee)
    optimizer: Any = fabric.setup_optimizers(build_optimizer(module.named_parameters(), spared, options))
    if found:
        restore(fabric, module, trainee, optimizer, found)

    def export(name: str, done: int) -> None:
        spent(done)
        state = full_state(fabric, module, trainee)
        if fabric.is_global_zero:
            plain = encoder_with(plan, state)
            others = travellers_with(travelling, state)
            card = about | {"patch": list(patch), "steps": done}
            save_encoder(plain, folder / name, card, others)
            for other, prefix in exported.items():
                own = folder / name.replace("encoder", other)
                save_encoder(encoder_with(plan, state, prefix), own, card | {"exported": other})
        fabric.barrier()

    def spent(done: int) -> None:
        """Adds up the FLOPs of so many steps, and of what went between epochs."""
        if "compute" in about:
            compute = about["compute"]
            between = loop.flops_between
            about["compute"] = compute | {
                "flops_between_epochs": between,
                "flops": compute["flops_per_step"] * done + between,
                "seconds": round(earlier + time.perf_counter() - began, 1),
                "peak_memory": max(int(compute.get("peak_memory", 0)), peak_memory(fabric.device)),
                "where": _where(fabric, options),
            }

    def save(done: int) -> None:
        spent(done)
        save_state(fabric, plan, module, trainee, optimizer, folder, done, about)

    loop = Loop(
        fabric=fabric,
        options=options,
        trainee=trainee,
        module=module,
        optimizer=optimizer,
        feed=Feed(batches),
        selection=selection,
        holdout=lambda: holdout_batches(selection.holdout, plan, fabric, log),
        steps_per_epoch=max(len(selection.train) / options.batch_size, 1e-9),
        once=lambda name, epoch: Once(loader, name, epoch, fabric.device),
        log=log,
        monitor=None,
        save=save,
        export=export,
        patch=patch,
        flops_between=int(about.get("compute", {}).get("flops_between_epochs", 0)),
    )
    stop = 0
    if begin < options.steps:
        try:  # the first step is tried here, and may fail: workers are waiting by then
            loop.foretell(begin)
            about.setdefault("compute", {"flops_per_step": loop.flops_per_step})  # a resumed run: its own
            if fabric.is_global_zero:
                main = [f"{name}/{kind.main}" for name, (kind, _) in plan.proxies.items()]
                loop.monitor = Monitor(folder, begin, options.steps, options.log_every, main, log)
            run.done, stop = loop.run(begin)
        finally:
            batches.close()  # type: ignore[attr-defined]
            if loop.monitor is not None:
                loop.monitor.close()
    if stop:
        queued = requeue() if name_of(stop) == "SIGUSR1" and fabric.is_global_zero else ""
        log.say(
            f"stopped by {name_of(stop)} after step {run.done} of {options.steps}, saved"
            f"{'; ' + queued if queued else ''}; go on with: ssl3d pretrain --resume "
            f"{shlex.quote(str(folder))}"
        )
        return replace(run, stopped=stop)
    export("encoder", options.steps)
    run.done = options.steps
    same = int(selection.train.shapes[0][0]) == plan.encoder_config.in_channels  # else colours were slices
    words = shlex.join(map(str, options.data)) if same else "VOLUMES"
    if same and not _has_targets(selection.train):
        words = "LABELLED.csv"
    beside = "".join(f"; {name} in {folder / name}" for name in exported)
    log.say(f"done: {options.steps} steps; encoder in {folder / 'encoder'}{beside}")
    place, probe = (shlex.quote(str(path)) for path in (folder, folder / "probe"))
    log.say(f"next: ssl3d linear-probe {place} --data {words} --out {probe}")
    return run


def _has_targets(data: Collection) -> bool:
    """Whether there is something that a linear probe can be fitted to: labels or masks."""
    return bool(data.has_mask.any()) or any(label is not None for label in data.labels)


def _where(fabric: Fabric, options: PretrainOptions) -> str:
    if fabric.device.type == "cuda":
        from torch import cuda

        where = cuda.get_device_name(fabric.device)
    else:
        where = f"{fabric.device.type}, {options.threads} threads"
    many = f"{fabric.world_size} processes on " if fabric.world_size > 1 else ""
    return f"{many}{where}, precision {options.precision}, {options.memory_format}"
