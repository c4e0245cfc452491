"""The contract of a proxy, tested on any class that claims to be one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl3d import plugins
from ssl3d.command_help import field_help
from ssl3d.config import from_dict, to_dict
from ssl3d.encoder import Encoder
from ssl3d.errors import DataError, PluginError
from ssl3d.proxy import Proxy, StepOutput
from ssl3d.rng import BatchRng, numpy_rng, one_group, seed_of
from ssl3d.testing.encoders import dead_taps
from ssl3d.training.options import PretrainOptions

if TYPE_CHECKING:
    from ssl3d.data.store.volume import Volume

_ADDED = ("index", "subject", "dataset")  # what the toolkit puts into every example
_BATCHES = 4  # drawn once, trained on again and again, with the same random numbers: learning by heart
_LEARNT = 10_000  # seed of those numbers


def check_proxy(
    proxy: str | Path | type[Proxy],
    config: Any = None,
    encoder: Callable[[], Encoder] | None = None,
    data: Sequence[Volume] | None = None,
    *,
    steps: int = 40,
    batch_size: int = 6,
    lr: float = 1e-3,
    fall: float = 0.05,
    bfloat16: bool = False,
) -> None:
    """Test that a proxy keeps the contract of `ssl3d.api.Proxy`, by training it for a moment.

    - It has a docstring, a citation, and a `Config` dataclass that can be built without arguments,
      annotates and documents every field, pickles, and survives YAML.
    - `draw` takes all its randomness from its generator, leaves the global ones alone, reads no labels
      unless the class says so in `uses_labels`, and gives finite tensors that stack.
    - `forward` gives a finite scalar loss and detached scalar metrics, `main` among them; it takes its
      randomness from its generator (dropout excepted), leaves its batch as it was, and works in eval
      mode, on a batch of 2 that is part of a larger one, and under bfloat16 autocast.
    - The encoder is fed as many channels as `in_channels` says, by `forward` and by `present`.
    - `forward` makes no parameters, and in eval mode changes no buffers.
    - A gradient reaches every trainable parameter and every kernel tap.
    - The loss falls on a few batches shown again and again, always with the same random numbers.
    - The state dict holds all that the next step depends on.
    - The picture, where there is one, is a matplotlib figure.

    Args:
        proxy: Registered name, file (PATH/file.py or PATH/file.py:Class), module:Class, or class.
        config: Configuration of the proxy; None takes the default one. Small ones are tested faster.
        encoder: Function that makes the encoder, called under a fixed seed of torch; None takes a narrow
            resnet10 of kind acs.
        data: Volumes to draw from, 4 at least; None takes phantoms.
        steps: Number of training steps.
        batch_size: Examples in a batch.
        lr: Peak learning rate of AdamW.
        fall: Share of its first value by which the loss must fall, on the batches trained on.
        bfloat16: Whether to train under bfloat16 autocast.

    Raises:
        AssertionError: The contract is broken; the message says how.
        PluginError: There is no such plugin, or it does not import.
    """
    cls = proxy if isinstance(proxy, type) else plugins.find(plugins.PROXIES, str(proxy))[1]
    with global_state_kept():
        _check_class(cls)
        config = cls.Config() if config is None else config
        _check_config(cls, config)
        volumes = _phantoms() if data is None else data
        fed = _check_in_channels(cls, config, volumes[0].shape[0])
        make = _default_encoder(fed) if encoder is None else encoder
        examples = _check_draw(cls, config, volumes, batch_size)
        groups = [_group(cls, examples, n, batch_size) for n in range(_BATCHES)]

        instance = _make(cls, config, make, data=volumes)
        started = copy.deepcopy(instance)
        _start_epoch(instance, groups)
        _check_step(instance, groups[0])
        _check_fed(instance, groups[0], volumes[0], fed)
        _check_randomness(instance, groups[0])
        _check_gradients(instance, groups)
        _check_eval(instance, groups[0])
        _check_autocast(instance, groups[0])
        trained = _check_learning(started, groups, steps, lr, fall, bfloat16)
        _check_state(trained, cls, config, make, volumes, groups)


# What a class says about itself --------------------------------------------------------------------


def _check_class(cls: type[Proxy]) -> None:
    assert inspect.isclass(cls) and issubclass(cls, Proxy), f"{cls!r} is not a subclass of ssl3d's Proxy"
    who = cls.__name__
    left = sorted(getattr(cls, "__abstractmethods__", ()))
    assert not left, f"{who}: {', '.join(left)} not written"
    for name in ("Config", "paper", "main"):
        assert hasattr(cls, name), f"{who}: has no class attribute {name!r}"
    assert dataclasses.is_dataclass(cls.Config), f"{who}: Config is not a dataclass"
    try:
        cls.Config()
    except Exception as error:
        raise AssertionError(f"{who}: Config() fails: {error}; every option needs a default") from error
    assert isinstance(cls.paper, str) and cls.paper.strip(), (
        f"{who}: paper is empty; cite what it implements"
    )
    assert cls.__doc__ and cls.__doc__ != Proxy.__doc__, f"{who}: has no docstring; say what is worked out"
    assert isinstance(cls.main, str) and cls.main, f"{who}: main does not name a metric"
    assert isinstance(cls.recipe, Mapping), f"{who}: recipe is not a mapping of pretrain options"
    unknown = sorted(set(cls.recipe) - {f.name for f in dataclasses.fields(PretrainOptions)})
    assert not unknown, f"{who}: recipe names {', '.join(unknown)}, no option of ssl3d pretrain"
    assert isinstance(inspect.getattr_static(cls, "draw"), classmethod), (
        f"{who}: draw is not a classmethod; workers call it without an instance"
    )


def _check_config(cls: type[Proxy], config: Any) -> None:
    who = cls.__name__
    documented = field_help(cls.Config)
    known = {f.name for f in dataclasses.fields(cls.Config)}
    plain = [
        name
        for base in cls.Config.__mro__[:-1]
        for name, value in vars(base).items()
        if not name.startswith("_")
        and name not in known
        and name not in vars(base).get("__annotations__", {})
        and not callable(value)
        and not hasattr(value, "__get__")
    ]
    assert not plain, (
        f"{who}: {', '.join(plain)} of its Config has no type annotation, so is no option (annotate a "
        "constant as ClassVar)"
    )
    bare = [f.name for f in dataclasses.fields(cls.Config) if f.init and not documented.get(f.name)]
    assert not bare, f"{who}: options without help: {', '.join(bare)}; describe them under Attributes:"
    try:
        copied = pickle.loads(pickle.dumps(config))
    except Exception as error:
        raise AssertionError(
            f"{who}: its Config does not pickle, so workers cannot get it: {error}"
        ) from error
    assert copied == config, f"{who}: its Config changes when pickled"
    again = from_dict(type(config), to_dict(config), f"{who}.Config")
    assert again == config, f"{who}: its Config changes when written to YAML and read again"


def _check_in_channels(cls: type[Proxy], config: Any, channels: int) -> int:
    who = cls.__name__
    assert isinstance(inspect.getattr_static(cls, "in_channels"), classmethod), (
        f"{who}: in_channels is not a classmethod; it is asked before there is an encoder"
    )
    fed: Any = cls.in_channels(config, channels)
    assert isinstance(fed, int) and fed >= 1, f"{who}: in_channels gives {fed!r}, not a number of channels"
    return fed


# Drawing -------------------------------------------------------------------------------------------


def _check_draw(
    cls: type[Proxy], config: Any, volumes: Sequence[Volume], batch_size: int
) -> list[dict[str, Tensor]]:
    """Check `draw`, and return examples of one shape, enough for all batches."""
    who, before = cls.__name__, to_dict(config)
    examples: list[dict[str, Tensor]] = []
    refused: list[DataError] = []
    people: dict[tuple[str, str], int] = {}
    datasets: dict[str, int] = {}
    needed = _BATCHES * batch_size
    for n in range(4 * needed):
        volume = volumes[n % len(volumes)]
        try:
            example = (
                _draw_twice(cls, config, volume, n) if n < len(volumes) else _draw(cls, config, volume, n)
            )
        except DataError as error:
            refused.append(error)
            continue
        person = people.setdefault((volume.dataset, volume.subject), len(people))
        codes = (volume.index, person, datasets.setdefault(volume.dataset, len(datasets)))
        example = example | {name: torch.tensor(code) for name, code in zip(_ADDED, codes)}
        if not examples or _shapes(example) == _shapes(examples[0]):
            examples.append(example)
        if len(examples) == needed:
            break
    assert examples, f"{who}: draw refuses every one of {len(volumes)} volumes: {refused[0]}"
    assert len(examples) == needed, (
        f"{who}: only {len(examples)} of {4 * needed} examples have the names and shapes of the first, "
        f"{_shape_text(examples[0])}: they do not stack"
    )
    assert to_dict(config) == before, f"{who}: draw changes its config"
    return examples


def _draw_twice(cls: type[Proxy], config: Any, volume: Volume, n: int) -> dict[str, Tensor]:
    who = cls.__name__
    _seed_everything(n)
    state = _global_state()
    example = _draw(cls, config, volume, n)
    moved = [name for name, was, now in zip(_STATES, state, _global_state()) if not _same_state(was, now)]
    assert not moved, (
        f"{who}: draw uses the global random state of {', '.join(moved)}; take every number from its rng"
    )
    _seed_everything(n + 1000)
    again = _draw(cls, config, volume, n)
    _assert_example(who, example)
    for name, value in example.items():
        assert name in again and _equal(value, again[name]), (
            f"{who}: draw gives another {name!r} for the same volume and the same rng; take every number "
            "from its rng"
        )
    return example


def _draw(cls: type[Proxy], config: Any, volume: Volume, n: int) -> dict[str, Tensor]:
    if not cls.uses_labels and hasattr(volume, "withhold_labels"):
        volume = copy.copy(volume)  # the caller's own stays as it was
        volume.withhold_labels(f"{cls.__name__}: draw")
    try:
        return cls.draw(config, volume, numpy_rng("check_proxy", n))
    except PluginError as error:
        raise AssertionError(str(error)) from error


def _assert_example(who: str, example: Any) -> None:
    assert isinstance(example, dict) and example, (
        f"{who}: draw gives {_what(example)}, not a dict of tensors"
    )
    for name, value in example.items():
        assert isinstance(name, str), f"{who}: draw names a tensor {name!r}, not a string"
        assert name not in _ADDED, f"{who}: draw gives {name!r}, which the toolkit adds itself"
        assert isinstance(value, Tensor), f"{who}: draw gives {_what(value)} for {name!r}, not a tensor"
        assert value.device.type == "cpu", f"{who}: draw's {name!r} is on {value.device}, not on the CPU"
        assert not value.requires_grad, f"{who}: draw's {name!r} requires a gradient"
        assert bool(value.isfinite().all()), f"{who}: draw's {name!r} is not finite"


def _shapes(example: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in example.items()}


def _shape_text(example: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{k} {tuple(v.shape)}" for k, v in example.items() if k not in _ADDED)


# One step ------------------------------------------------------------------------------------------


def _run(proxy: Proxy, group: dict[str, Tensor], rng: BatchRng) -> StepOutput:
    return proxy([group] if proxy.mixed else group, [rng] if proxy.mixed else rng)


def _step(proxy: Proxy, group: dict[str, Tensor], seed: int = 0) -> StepOutput:
    return _run(proxy, group, one_group(seed, len(group["index"])))


def _state_names(proxy: Proxy) -> set[str]:
    """List parameters and buffers by name, without those of lazy layers, which have no shape yet."""
    named = [*proxy.named_parameters(), *proxy.named_buffers()]
    return {name for name, value in named if not nn.parameter.is_lazy(value)}


def _check_step(proxy: Proxy, group: dict[str, Tensor]) -> None:
    who = type(proxy).__name__
    before = {name: value.clone() for name, value in group.items()}
    trial = copy.deepcopy(proxy).train()
    known = _state_names(trial)
    output = _step(trial, group)
    late = sorted(_state_names(trial) - known)
    assert not late, (
        f"{who}: forward makes {', '.join(late[:5])}, which no optimizer trains and no checkpoint of a new "
        "run can take: make it in __init__ or setup"
    )
    assert isinstance(output, StepOutput), f"{who}: forward gives {_what(output)}, not a StepOutput"
    _assert_output(who, output, proxy.main)
    assert output.loss.requires_grad, f"{who}: the loss does not depend on any trainable parameter"
    changed = [name for name, value in before.items() if not _equal(value, group[name])]
    assert not changed and set(group) == set(before), f"{who}: forward changes its batch ({changed})"
    if output.picture is not None:
        _assert_picture(who, output.picture)


def _check_fed(proxy: Proxy, group: dict[str, Tensor], volume: Volume, fed: int) -> None:
    """Check that the encoder is fed what `in_channels` promised when it was built."""
    who = type(proxy).__name__
    trial = copy.deepcopy(proxy).train()
    seen: set[int] = set()
    hook = trial.encoder.register_forward_pre_hook(lambda _, inputs: seen.add(int(inputs[0].shape[1])))
    _step(trial, group)
    hook.remove()
    assert seen <= {fed}, f"{who}: in_channels says {fed}, but forward feeds the encoder {sorted(seen)}"
    shown = trial.present(torch.zeros(2, *volume.shape))
    assert isinstance(shown, Tensor) and shown.ndim == 5 and tuple(shown.shape[:2]) == (2, fed), (
        f"{who}: present makes {_what(shown)} of volumes (2, {', '.join(map(str, volume.shape))}); "
        f"expected (2, {fed}, D, H, W), as in_channels says"
    )


def _assert_output(who: str, output: StepOutput, main: str, where: str = "") -> None:
    loss, metrics = output.loss, output.metrics
    assert isinstance(loss, Tensor) and loss.ndim == 0, (
        f"{who}: the loss{where} is {_what(loss)}, not a scalar tensor"
    )
    assert bool(loss.isfinite()), f"{who}: the loss{where} is {loss.item()}"
    assert main in metrics, f"{who}: main is {main!r}, but the metrics{where} are {sorted(metrics)}"
    for name, value in metrics.items():
        assert isinstance(value, Tensor) and value.ndim == 0, (
            f"{who}: metric {name!r}{where} is {_what(value)}, not a scalar tensor"
        )
        assert not value.requires_grad, f"{who}: metric {name!r} keeps the graph alive; detach it"
        assert bool(value.isfinite()), f"{who}: metric {name!r}{where} is {value.item()}"


def _assert_picture(who: str, picture: Any) -> None:
    from matplotlib.figure import Figure

    assert callable(picture), f"{who}: picture is {_what(picture)}, not a function without arguments"
    figure = picture()
    assert isinstance(figure, Figure), f"{who}: picture() gives {_what(figure)}, not a matplotlib Figure"
    figure.savefig(io.BytesIO(), format="png")


def _check_randomness(proxy: Proxy, group: dict[str, Tensor]) -> None:
    who = type(proxy).__name__

    def outcome(global_seed: int, train: bool) -> list[Tensor]:
        trial = copy.deepcopy(proxy).train(train)
        _seed_everything(global_seed)
        output = _step(trial, group, seed=5)
        return [output.loss.detach(), *output.metrics.values()]

    for train in (True, False):
        mode = "train" if train else "eval"
        first, again = outcome(1, train), outcome(1, train)
        assert all(map(_equal, first, again)), (
            f"{who}: forward in {mode} mode gives another loss for the same batch and rng (state outside "
            "the module, or a random number that is not its rng's)"
        )
        # Dropout takes no generator; a proxy with it is excused in train mode.
        if train and any("drop" in type(m).__name__.lower() for m in proxy.modules()):
            continue
        assert all(map(_equal, first, outcome(2, train))), (
            f"{who}: forward in {mode} mode uses the global random state; take every number from its rng"
        )


def _check_gradients(proxy: Proxy, groups: Sequence[dict[str, Tensor]]) -> None:
    who = type(proxy).__name__
    trial = copy.deepcopy(proxy).train()
    trial.zero_grad(set_to_none=True)
    for seed, group in enumerate(groups[:3]):
        _step(trial, group, seed).loss.backward()
    assert any(p.requires_grad for p in trial.encoder.parameters()), (
        f"{who}: no parameter of the encoder is trainable: nothing would be learnt"
    )
    for name, parameter in trial.named_parameters():
        if parameter.grad is not None:
            assert bool(parameter.grad.isfinite().all()), f"{who}: the gradient of {name} is not finite"
    dead = dead_taps(trial)
    shown = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
    assert not dead, (
        f"{who}: no gradient reaches {shown} (freeze what is not to be trained with requires_grad_(False); "
        f"taps need inputs of more than the encoder's stride, {trial.encoder.strides[-1]} along D H W, "
        "off-plane ones kind acs where inputs are thin)"
    )


def _check_eval(proxy: Proxy, group: dict[str, Tensor]) -> None:
    who = type(proxy).__name__
    trial = copy.deepcopy(proxy).eval()
    two = {name: value[:2] for name, value in group.items()}
    before = {name: value.clone() for name, value in trial.state_dict().items()}
    with torch.no_grad():
        output = _run(trial, two, BatchRng(7, (1, 3), 4))
    _assert_output(who, output, proxy.main, " of a batch of 2 in eval mode")
    moved = [name for name, value in trial.state_dict().items() if not _equal(value, before.get(name))]
    assert not moved, (
        f"{who}: forward in eval mode changes {', '.join(moved[:5])}: held-out subjects would train the "
        "proxy; ask self.training first"
    )


def _check_autocast(proxy: Proxy, group: dict[str, Tensor]) -> None:
    who = type(proxy).__name__
    trial = copy.deepcopy(proxy).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = _step(trial, group)
    _assert_output(who, output, proxy.main, " under bfloat16 autocast")
    output.loss.backward()
    for name, parameter in trial.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), (
            f"{who}: the gradient of {name} is not finite under bfloat16 autocast"
        )


# Learning and keeping ------------------------------------------------------------------------------


def _check_learning(
    proxy: Proxy,
    groups: Sequence[dict[str, Tensor]],
    steps: int,
    lr: float,
    fall: float,
    bfloat16: bool,
) -> Proxy:
    who = type(proxy).__name__
    proxy.train()
    _start_epoch(proxy, groups)
    before = _mean_loss(proxy, groups)
    optimizer = torch.optim.AdamW([p for p in proxy.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        _seed_everything(step)
        if step and step % len(groups) == 0:
            _start_epoch(proxy, groups, step // len(groups))
        for settings in optimizer.param_groups:  # warm-up and cosine
            settings["lr"] = lr * min(
                (step + 1) / (0.2 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            )
        n = step % len(groups)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            output = _step(proxy, groups[n], _LEARNT + n)
        assert bool(output.loss.isfinite()), f"{who}: the loss is {output.loss.item()} at step {step}"
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        nn.utils.clip_grad_norm_(proxy.parameters(), 5.0)
        optimizer.step()
        proxy.after_step(step, steps)
    after = _mean_loss(proxy, groups)
    assert after < before - fall * abs(before), (
        f"{who}: the loss does not fall: {before:.4g} before, {after:.4g} after {steps} steps on "
        f"{len(groups)} batches (asked: {100 * fall:g} % less; where it first rises by design, as while a "
        "queue fills, ask later by steps=, or for less by fall=)"
    )
    return proxy


def _mean_loss(proxy: Proxy, groups: Sequence[dict[str, Tensor]]) -> float:
    """Compute the loss in train mode, with the same random numbers every time, on a copy."""
    trial = copy.deepcopy(proxy).train()
    _seed_everything(11)
    with torch.no_grad():
        return float(
            np.mean([_step(trial, group, _LEARNT + n).loss.item() for n, group in enumerate(groups)])
        )


def _check_state(
    proxy: Proxy,
    cls: type[Proxy],
    config: Any,
    make: Callable[[], Encoder],
    volumes: Sequence[Volume],
    groups: Sequence[dict[str, Tensor]],
) -> None:
    who = cls.__name__
    file = io.BytesIO()
    try:
        torch.save(proxy.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    except Exception as error:
        raise AssertionError(f"{who}: its state dict cannot be saved and loaded safely: {error}") from error
    other = _make(cls, config, make, data=volumes, seed=99)
    try:
        other.load_state_dict(state)
    except RuntimeError as error:
        raise AssertionError(f"{who}: its state dict does not load into a new one: {error}") from error
    for mode in (False, True):
        outcomes = []
        for module in (proxy, other):
            trial = copy.deepcopy(module).train(mode)
            _seed_everything(3)
            with torch.no_grad():
                outcomes.append(_step(trial, groups[1], seed=3).loss)
        assert _equal(*outcomes), (
            f"{who}: the loss is {outcomes[0].item():.6g}, but {outcomes[1].item():.6g} after saving and "
            "loading the state dict: something it depends on is neither a parameter nor a buffer"
        )


# Making --------------------------------------------------------------------------------------------


def _phantoms() -> Sequence[Volume]:
    from ssl3d.data.open import open_data

    return open_data(["phantoms:16"])


def _default_encoder(in_channels: int) -> Callable[[], Encoder]:
    cls = plugins.load(plugins.ENCODERS, "resnet10")
    return lambda: cls(cls.Config(width=8, in_channels=in_channels))


def _make(
    cls: type[Proxy], config: Any, make: Callable[[], Encoder], data: Sequence[Volume], seed: int = 0
) -> Proxy:
    who = cls.__name__
    torch.manual_seed(seed)
    encoder = make()
    proxy = cls(config, encoder)
    assert getattr(proxy, "encoder", None) is encoder, (
        f"{who}: self.encoder is not the encoder it was given"
    )
    assert getattr(proxy, "config", None) == config, f"{who}: self.config is not the config it was given"
    proxy.setup(data)  # type: ignore[arg-type]
    return proxy


def _group(
    cls: type[Proxy], examples: Sequence[dict[str, Tensor]], n: int, batch_size: int
) -> dict[str, Tensor]:
    some = examples[n * batch_size : (n + 1) * batch_size]
    return {name: torch.stack([example[name] for example in some]) for name in some[0]}


def _start_epoch(proxy: Proxy, groups: Sequence[dict[str, Tensor]], epoch: int = 0) -> None:
    proxy.start_epoch(epoch, [[group] for group in groups])


# Random state --------------------------------------------------------------------------------------

_STATES = ("torch", "numpy", "python")


def _global_state() -> tuple[Any, Any, Any]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _same_state(was: Any, now: Any) -> bool:
    if isinstance(was, Tensor):
        return torch.equal(was, now)
    return all(np.array_equal(a, b) for a, b in zip(was, now))


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed_of("check_proxy", seed))
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def global_state_kept() -> Iterator[None]:
    """Keep the global random states of torch, numpy and Python as they were, whatever happens inside."""
    state = _global_state()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def _what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
