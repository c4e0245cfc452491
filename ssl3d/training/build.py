"""Builds the parts of a pretraining run from its plan: encoder, proxies, loaders."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ssl3d import plugins
from ssl3d.checkpoint.outline import outline_of
from ssl3d.checkpoint.travellers import make_traveller, traveller_class
from ssl3d.data.size_notes import large_batch_note, large_crop_note
from ssl3d.encoder import Encoder
from ssl3d.errors import PluginError, UsageError
from ssl3d.rng import seed_of
from ssl3d.specs import encoder_from, fitting
from ssl3d.training.balance import build_balance
from ssl3d.training.batch import Group
from ssl3d.training.device import accelerator_of, default_workers
from ssl3d.training.monitor import Log
from ssl3d.training.online import BATCHES
from ssl3d.training.options import PretrainOptions, PretrainPlan
from ssl3d.training.trainee import Trainee

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ssl3d.data.store.collection import Collection
    from ssl3d.training.loader import Loader


_TAKEN = ("encoder", "heads", "checkpoints", "pictures", "tensorboard")  # names of folders of a run


def lengths(options: PretrainOptions, volumes: int) -> dict[str, Any]:
    """Return the number of steps, and the intervals that are shares of it."""
    steps = options.steps or max(1, round(options.epochs * volumes / options.batch_size))
    return {
        "steps": steps,
        "epochs": 0.0,
        "eval_every": options.eval_every or max(1, steps // 10),
        "log_every": options.log_every or max(1, steps // 40),
    }


def size_notes(plan: PretrainPlan, data: Collection) -> list[str]:
    """Return a line for each crop larger than most volumes, and for a batch larger than the data."""
    crops = {name: getattr(config, "crop", None) for name, (_, config) in plan.proxies.items()}
    notes = [
        large_crop_note(f"{name}.crop", crop, data.shapes)
        for name, crop in crops.items()
        if isinstance(crop, tuple) and len(crop) == 3
    ]
    batch = large_batch_note(plan.options.batch_size, len(data.shapes), "a batch holds some of them twice")
    return [note for note in [*notes, batch] if note]


def channels(plan: PretrainPlan, data: Collection) -> Any:
    """Return the options of the encoder with as many input channels as the proxies feed it.

    These are the channels of the data, unless a proxy says otherwise (`Proxy.in_channels`).

    Raises:
        UsageError: Volumes, proxies or the encoder's options disagree.
    """
    counts = sorted({int(shape[0]) for shape in data.shapes})
    if len(counts) > 1:
        raise UsageError(
            f"the volumes have {' and '.join(map(str, counts))} channels, but one encoder takes one number "
            "of them: pretrain on each kind apart"
        )
    fed = {name: kind.in_channels(own, counts[0]) for name, (kind, own) in plan.proxies.items()}
    needed = sorted(set(fed.values()))
    if len(needed) > 1:
        each = ", ".join(f"{name} feeds it {count}" for name, count in fed.items())
        raise UsageError(f"one encoder takes one number of channels: {each}; train them one by one")
    config = plan.encoder_config
    if config.in_channels == needed[0]:
        return config
    if config.in_channels == 1:
        return replace(config, in_channels=needed[0])
    why = f"the volumes have {counts[0]}" if needed == counts else f"{next(iter(fed))} feeds it {needed[0]}"
    raise UsageError(f"--{plan.encoder_name}.in-channels is {config.in_channels}, {why} channels")


def build_encoder(plan: PretrainPlan, config: Any, initial: Encoder | None) -> Encoder:
    """Return the encoder to begin with: that of --init, or one with new weights of the run's seed.

    Args:
        plan: Plan of the run.
        config: Options of a new encoder, with as many channels as the proxies feed it.
        initial: Encoder of --init; None where there is none, or a checkpoint's weights will follow.

    Raises:
        UsageError: --init is of another architecture than --encoder, or takes other channels.
    """
    options = plan.options
    if initial is None or options.init is None:
        torch.manual_seed(seed_of(options.seed, "encoder"))
        encoder: Encoder = plan.encoder(config)
        return encoder
    words = fitting(options.init, config.in_channels)
    if words != options.init:  # its channels are free, and the data say now how many
        initial = encoder_from(words, options.seed)
    name = plugins.name_of(plugins.ENCODERS, type(initial))
    if "encoder" in plan.given and name != options.encoder:
        raise UsageError(f"--encoder {options.encoder}: --init {options.init} is a {name}")
    if initial.config.in_channels != config.in_channels:
        raise UsageError(
            f"--init {options.init}: takes {initial.config.in_channels} channels, the volumes have "
            f"{config.in_channels}"
        )
    return initial


def build_trainee(
    plan: PretrainPlan, encoder: Encoder, data: Collection, known: Mapping[str, Tensor] | None = None
) -> Trainee:
    """Build the proxies on their encoder, sized by the data; the run's seed makes the weights of the heads.

    Args:
        plan: Plan of the run.
        encoder: Encoder that the proxies share.
        data: Volumes to train on.
        known: Outline of the same data in a checkpoint; proxies do not measure that again.

    Raises:
        PluginError: A proxy has a layer whose size is not known.
    """
    options = plan.options
    torch.manual_seed(seed_of(options.seed, "heads"))
    proxies = {}
    for name, (kind, config) in plan.proxies.items():
        proxies[name] = kind(config, encoder)
        proxies[name].setup(_with_found(data, known or {}, name))
        lazy = [key for key, value in proxies[name].named_parameters() if nn.parameter.is_lazy(value)]
        if lazy:
            raise PluginError(
                f"proxy {name!r}: {lazy[0]} is of a lazy layer, whose size is not known before the first "
                "step; give the size (encoder.embed_dim, encoder.channels)"
            )
    weights = dict(zip(proxies, options.weights or (1.0,) * len(proxies), strict=True))
    balance = build_balance(options.balance, weights, options.balance_alpha)
    trainee = Trainee(encoder, proxies, weights, options.seed, balance)
    trainee.outline = outline_of(data)
    for name, proxy in proxies.items():
        trainee.outline |= {f"{name}/{key}": value for key, value in proxy.outline().items()}
    return trainee


def _with_found(data: Collection, known: Mapping[str, Tensor], proxy: str) -> Collection:
    """Add to the data, as attribute `found`, what the proxy's own `outline` kept of them, if anything."""
    own = f"{proxy}/"
    kept = {key.removeprefix(own): value for key, value in known.items() if key.startswith(own)}
    if not kept:
        return data
    data = copy.copy(data)
    vars(data)["found"] = kept
    return data


def encoder_with(plan: PretrainPlan, state: dict[str, Tensor], prefix: str = "encoder.") -> Encoder:
    """Build an encoder of the plan with the weights that have a prefix in a trainee's state."""
    with torch.random.fork_rng(devices=[]):
        encoder: Encoder = plan.encoder(plan.encoder_config)
    own = {k.removeprefix(prefix): v.cpu() for k, v in state.items() if k.startswith(prefix)}
    encoder.load_state_dict(own)
    return encoder


def exports_of(trainee: Trainee) -> dict[str, str]:
    """Collect the encoders that proxies export beside the shared one.

    Returns:
        Name of the folder -> prefix of the weights in a trainee's state.

    Raises:
        PluginError: One is no copy of the shared one, no part of its proxy, or has a name that cannot be.
    """
    names = {id(module): name for name, module in trainee.named_modules()}
    prefixes: dict[str, str] = {}
    for proxy_name, proxy in trainee.each():
        for name, module in proxy.exports().items():
            where = f"proxy {proxy_name!r}: exports(): {name!r}"
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in _TAKEN:
                raise PluginError(f"{where} cannot be the name of a folder beside the encoder; try teacher")
            alike = type(module) is type(trainee.encoder) and _shapes(module) == _shapes(trainee.encoder)
            if not alike:
                raise PluginError(f"{where} is no copy of the encoder; copy.deepcopy(encoder) is")
            if module is trainee.encoder or id(module) not in names:
                raise PluginError(f"{where} is no module of the proxy's own")
            prefixes[f"{name}_{proxy_name}" if name in prefixes else name] = f"{names[id(module)]}."
    return prefixes


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


class Traveller(NamedTuple):
    """A module of a proxy that is exported beside the encoder.

    Attributes:
        prefix: Prefix of its weights in a trainee's state.
        kind: Class of the module.
        config: Options of the module.
    """

    prefix: str
    kind: Any
    config: Any


def travellers_of(trainee: Trainee) -> dict[str, Traveller]:
    """Collect what travels with a trainee's encoder, by name.

    Where two proxies use one name, that of the later one begins with the name of its proxy.

    Raises:
        PluginError: A module cannot be written so that it can be loaded again.
    """
    names = {id(module): name for name, module in trainee.named_modules()}
    travellers: dict[str, Traveller] = {}
    for proxy_name, proxy in trainee.each():
        for name, module in proxy.travels().items():
            traveller_class(name, module)
            if id(module) not in names:
                raise PluginError(f"proxy {proxy_name!r}: travels(): {name} is no part of the proxy")
            key = f"{proxy_name}_{name}" if name in travellers else name
            travellers[key] = Traveller(f"{names[id(module)]}.", type(module), module.config)
    return travellers


def travellers_with(
    travellers: Mapping[str, Traveller], state: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """Build the modules that travel anew, with the weights in a trainee's state."""
    modules: dict[str, nn.Module] = {}
    for name, (prefix, kind, config) in travellers.items():
        with torch.random.fork_rng(devices=[]):
            modules[name] = make_traveller(kind, config)
        modules[name].load_state_dict(
            {k.removeprefix(prefix): v.cpu() for k, v in state.items() if k.startswith(prefix)}
        )
    return modules


def loader_of(data: Collection, plan: PretrainPlan, fabric: Fabric, begin: int, log: Log) -> Loader:
    """Return the loader of this rank's batches, from a step on."""
    from ssl3d.training.loader import Loader

    options = plan.options
    return Loader(
        data,
        plan.proxies,
        options.batch_size,
        seed=options.seed,
        workers=default_workers(options, accelerator_of(options), fabric.world_size),
        rank=fabric.global_rank,
        world=fabric.world_size,
        start_step=begin,
        on_set_aside=lambda name, reason: log.warn(f"set aside: {name}: {reason}"),
        pin=fabric.device.type == "cuda",
    )


def holdout_batches(data: Collection, plan: PretrainPlan, fabric: Fabric, log: Log) -> list[list[Group]]:
    """Draw this rank's examples of the held-out subjects, the same ones at every look."""
    from ssl3d.training.loader import Loader

    world = fabric.world_size
    most = plan.options.batch_size // plan.options.accumulate // world
    # Two at least: contrastive losses have nothing to compare one example with.
    size = max(2, min(most, -(-len(data) // world))) * world
    count = min(BATCHES, -(-len(data) // size))
    loader = Loader(
        data, plan.proxies, size, seed=0, rank=fabric.global_rank, world=world, steps=count, pin=False,
        on_set_aside=lambda name, reason: log.warn(f"set aside: {name}: {reason}"),
    )  # fmt: skip
    return [batch.groups for batch in loader]


@dataclass
class EpochBatches:
    """Batches for `Proxy.start_epoch`: lists of groups on the device, every volume once."""

    loader: Loader
    proxy: str
    epoch: int
    device: torch.device

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        for batch in self.loader.once(self.proxy, key=("epoch", self.epoch)):
            yield [group.tensors for group in batch.to(self.device).groups]
