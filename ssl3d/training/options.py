"""What a pretraining run is told: options, presets, and what each proxy recommends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ssl3d import config, plugins
from ssl3d.errors import PluginError, UsageError

PROG = "ssl3d pretrain"
STEPS = 1000
"""Where neither the user nor a proxy says how long."""

NOT_RECORDED = ("out", "overwrite", "resume", "preset")
FREE_ON_RESUME = frozenset(
    ("resume", "workers", "data", "checkpoint_every", "log_every", "devices", "nodes", "accelerator")
)
"""Options that `--resume` takes: none of them changes what is learnt (data is checked by its digest)."""


@dataclass
class PretrainOptions:
    """Pretrains an encoder on unlabelled volumes with one proxy task or several.

    Attributes:
        proxy: Proxy tasks to train together on the one encoder: names (see `ssl3d proxies`), PATH/file.py,
            PATH/file.py:Class or module:Class.
        encoder: Its architecture: a name (see `ssl3d encoders`), PATH/file.py or module:Class.
        data: Stores, folders of stores, anything that `ssl3d prepare` takes (kept prepared in $SSL3D_CACHE,
            else ~/.cache/ssl3d), or phantoms[:N]. Several are read as one, balanced over their data sets.
        subjects: Which labelled subjects are used: train (the house split leaves validation and test
            subjects to the benchmarks) or all. Subjects without label, mask, boxes or a split of their
            own are always used.
        holdout: Share of the subjects kept out of training, to report the proxies' metrics on people
            never seen.
        steps: Optimizer steps.
        epochs: Passes over the data, instead of steps.
        batch_size: Volumes per optimizer step, over all devices.
        accumulate: Parts a batch is cut into, one after the other, to save memory. Contrastive losses
            compare within a part only.
        workers: Processes that read data, per device; -1 chooses by the cores.
        optimizer: adamw, sgd or lars.
        lr: Peak learning rate.
        weight_decay: Not applied to biases and norms.
        momentum: Of sgd and lars.
        warmup: Share of the steps over which the learning rate rises; afterwards it falls as a cosine.
        clip: Largest norm of the gradient; 0 lets any pass.
        weights: Of the proxies' losses, in their order; 1 each if left out.
        balance: Of several proxies: fixed keeps the weights; uncertainty and gradnorm start from them and
            go on by each loss' learned variance (Kendall et al., 2018), or so that the gradients at the
            encoder's last layer are equally large, larger where a proxy learns slowly (Chen et al., 2018).
        balance_alpha: Of gradnorm, how strongly a proxy that learns slowly is favoured; 0 not at all.
        precision: auto takes bf16 where the device is fast at it, else 32.
        memory_format: Layout of the kernels; auto takes what the encoder is faster in.
        threads: CPU threads of the main process; 0 leaves torch's number. Kept by --resume.
        accelerator: auto, cpu, cuda or mps.
        devices: Per node; 0 takes what torchrun or SLURM started, else every GPU, or one CPU process.
        nodes: 0 takes what torchrun or SLURM started, else 1.
        strategy: auto is ddp where there are several devices; fsdp shards the weights (CUDA only).
        init: A run or encoder to start from; its architecture is used.
        seed: Of everything random: weights, order, crops, views.
        checkpoint_every: Steps between checkpoints; the last two are kept.
        eval_every: Steps between looks at held-out subjects, pictures and the online kNN score; 0 makes
            it a tenth of the run, -1 never.
        log_every: Steps between lines off a terminal and TensorBoard points; 0 makes it a fortieth.
        save_at: Shares of the run at which the encoder is exported, to encoder-at-25/ and the like.
        out: Run folder; runs/<proxy>-<n> if left out.
        overwrite: Delete the run that is in `out`.
        resume: Run folder to go on with; its options hold.
        preset: Options by name, below every flag: gpu-96 or quick.
    """

    proxy: tuple[str, ...] = ()
    encoder: str = "resnet18"
    data: tuple[str, ...] = ("phantoms",)
    subjects: Literal["train", "all"] = "train"
    holdout: float = 0.1
    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 16
    accumulate: int = 1
    workers: int = -1
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    warmup: float = 0.1
    clip: float = 1.0
    weights: tuple[float, ...] = ()
    balance: Literal["fixed", "uncertainty", "gradnorm"] = "fixed"
    balance_alpha: float = 1.5
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    threads: int = 0
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 0
    nodes: int = 0
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    init: str | None = None
    seed: int = 0
    checkpoint_every: int = 200
    eval_every: int = 0
    log_every: int = 0
    save_at: tuple[float, ...] = ()
    out: Path | None = None
    overwrite: bool = False
    resume: Path | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value that cannot be used."""
        for name, least in (("batch_size", 1), ("accumulate", 1), ("checkpoint_every", 1), ("workers", -1),
                            ("steps", 0), ("threads", 0), ("devices", 0), ("nodes", 0), ("eval_every", -1),
                            ("log_every", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if self.steps and self.epochs:
            raise ValueError(
                f"epochs is {self.epochs}, but steps is {self.steps} already: give one of them"
            )
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}, must be above 0")
        for name in ("weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is {self.lr}, must be above 0")
        for name in ("holdout", "warmup", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be a share from 0 to below 1")
        if self.optimizer == "lars" and self.weight_decay == 0:
            raise ValueError("weight_decay is 0, which switches the scaling of lars off; give it 1e-6, say")
        if any(not 0 <= share <= 1 for share in self.save_at):
            raise ValueError(f"save_at is {self.save_at}, must be shares of the run from 0 to 1")
        if self.weights and len(self.weights) != len(self.proxy):
            raise ValueError(f"weights has {len(self.weights)} values for {len(self.proxy)} proxies")
        if any(not weight >= 0 for weight in self.weights):
            raise ValueError(f"weights is {self.weights}, must be 0 or more each")
        if self.balance != "fixed" and any(weight == 0 for weight in self.weights):
            raise ValueError(f"weights is {self.weights}; with balance {self.balance} each starts above 0")
        if not 0 <= self.balance_alpha < float("inf"):
            raise ValueError(f"balance_alpha is {self.balance_alpha}, must be 0 or more")
        if self.balance == "gradnorm" and (self.strategy == "fsdp" or self.precision == "16"):
            what = "strategy fsdp" if self.strategy == "fsdp" else "precision 16"
            raise ValueError(f"balance gradnorm needs whole gradients, unscaled: not with {what}")
        if len(set(self.proxy)) < len(self.proxy):
            raise ValueError(f"proxy names one twice: {' '.join(self.proxy)}")
        if not self.data:
            raise ValueError("data is empty: name a store, scans or phantoms")


@dataclass
class PretrainPlan:
    """A run, ready to start: every value decided that does not depend on the machine.

    Attributes:
        options: Of the run.
        proxies: Name -> class and options.
        encoder: Class of the encoder.
        encoder_config: Its options.
        given: Options that the user set.
    """

    options: PretrainOptions
    proxies: dict[str, tuple[Any, Any]]
    encoder: Any
    encoder_config: Any
    given: set[str] = field(default_factory=set)

    @property
    def encoder_name(self) -> str:
        """As registered."""
        return plugins.name_of(plugins.ENCODERS, self.encoder)

    @property
    def mains(self) -> list[str]:
        """The metric of each proxy to show, as in sorting/kendall_tau."""
        return [f"{name}/{kind.main}" for name, (kind, _) in self.proxies.items()]

    def decided(self, encoder: Any, **options: Any) -> PretrainPlan:
        """Return the plan with the encoder that was built, and options that machine and data decide."""
        name = plugins.name_of(plugins.ENCODERS, type(encoder))
        return dataclasses.replace(
            self,
            options=dataclasses.replace(self.options, encoder=name, **options),
            encoder=type(encoder),
            encoder_config=encoder.config,
        )

    def as_config(self) -> dict[str, Any]:
        """What `config.yaml` holds; `--config` reads it back."""
        own = {k: v for k, v in config.to_dict(self.options).items() if k not in NOT_RECORDED}
        # What is not installed is named by its file or module: its name alone would not find it again.
        own["proxy"] = [plugins.spec_of(plugins.PROXIES, kind) for kind, _ in self.proxies.values()]
        own["encoder"] = plugins.spec_of(plugins.ENCODERS, self.encoder)
        sections = {name: config.to_dict(made) for name, (_, made) in self.proxies.items()}
        return own | {self.encoder_name: config.to_dict(self.encoder_config)} | sections


class Request(NamedTuple):
    """What a command line asks for.

    Attributes:
        plan: None with --resume: the run's own options hold.
        options: As given.
        given: Names of the options that the user set.
        print_only: Whether only the configuration is to be printed.
    """

    plan: PretrainPlan | None
    options: PretrainOptions
    given: set[str]
    print_only: bool


def request_of(argv: Sequence[str]) -> Request:
    """Reads a command line.

    Raises:
        UsageError: No proxy is named, or a flag is wrong; the message names it.
    """
    words = [word for word in argv if word not in ("--print_config", "--print-config")]
    # With --resume no plugin is named: the run's own options hold, and flags beside it are judged below.
    named = _plugins(strict=not any(word.split("=")[0] == "--resume" for word in words))
    parsed = config.parse(PROG, PretrainOptions, _with_preset(words), named, epilog=_epilog())
    options: PretrainOptions = parsed.options
    if options.resume is not None:
        changed = sorted((parsed.given | _sections_given(words)) - FREE_ON_RESUME)
        if changed:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            allowed = ", ".join(f"--{n.replace('_', '-')}" for n in sorted(FREE_ON_RESUME - {"resume"}))
            raise UsageError(
                f"{PROG}: --resume goes on with the run's own options; {flags} would change the result "
                f"(allowed beside it: {allowed})"
            )
        return Request(None, options, parsed.given, len(words) < len(argv))
    if not options.proxy:
        raise UsageError(
            f"{PROG}: --proxy: name one or more of {', '.join(plugins.names(plugins.PROXIES))}"
        )
    options, classes, encoder = _found(options, PROG, {})
    proxies = {name: (made, parsed.sections[name]) for name, made in classes.items()}
    plan = make_plan(options, parsed.given, proxies, encoder, parsed.sections[options.encoder])
    return Request(plan, options, parsed.given, len(words) < len(argv))


def make_plan(
    options: PretrainOptions,
    given: set[str],
    proxies: Mapping[str, tuple[Any, Any]],
    encoder: Any,
    encoder_config: Any,
) -> PretrainPlan:
    """Fills in what the proxies recommend where the user said nothing; the first proxy named decides.

    Raises:
        PluginError: A proxy recommends a value for an option that there is not.
        UsageError: Or a value that cannot be used.
    """
    known = {f.name for f in dataclasses.fields(PretrainOptions)}
    chosen: dict[str, Any] = {}
    for name, (proxy, _) in proxies.items():
        unknown = sorted(set(proxy.recipe) - known)
        if unknown:
            raise PluginError(f"proxy {name!r} recommends {', '.join(unknown)}, no option of {PROG}")
        for key, value in proxy.recipe.items():
            rival = {"steps": "epochs", "epochs": "steps"}.get(key)
            if key not in given and rival not in given and rival not in chosen:
                chosen.setdefault(key, value)
    if not (chosen.keys() | given) & {"steps", "epochs"}:
        chosen["steps"] = STEPS
    try:
        options = dataclasses.replace(options, **chosen)
    except ValueError as error:
        raise UsageError(f"{PROG}: {error} (recommended by the proxy: {chosen})") from error
    return PretrainPlan(options, dict(proxies), encoder, encoder_config, set(given))


def plan_from(
    values: Mapping[str, Any], where: str, classes: Mapping[str, Any] | None = None
) -> PretrainPlan:
    """A plan from plain values: a run's `config.yaml`, or keyword arguments from Python.

    Args:
        values: Options by name; the options of proxies and of the encoder are dictionaries by name.
        where: Begins the message of an error.
        classes: Proxies and encoders that are not registered, by name.

    Raises:
        UsageError: An option is unknown or its value unusable.
    """
    classes = classes or {}
    known = {f.name for f in dataclasses.fields(PretrainOptions)}
    own = {key: value for key, value in values.items() if key in known}
    for key in ("proxy", "data"):
        if isinstance(own.get(key), str | Path):
            own[key] = [str(own[key])]
    if "precision" in own:
        own["precision"] = str(own["precision"])
    options: PretrainOptions = config.from_dict(PretrainOptions, own, where)
    if not options.proxy:
        raise UsageError(f"{where}: names no proxy")
    options, proxies, encoder = _found(options, where, classes)
    made: dict[str, tuple[Any, Any]] = {}
    for name, proxy in proxies.items():
        made[name] = proxy, config.from_dict(proxy.Config, values.get(name) or {}, f"{where}, {name}")
    unknown = sorted(set(values) - known - set(made) - {options.encoder})
    if unknown:
        raise UsageError(f"{where}: unknown option {', '.join(unknown)}")
    section = values.get(options.encoder) or {}
    encoder_config = config.from_dict(encoder.Config, section, f"{where}, {options.encoder}")
    return make_plan(options, set(own), made, encoder, encoder_config)


def _found(
    options: PretrainOptions, where: str, classes: Mapping[str, Any]
) -> tuple[PretrainOptions, dict[str, Any], Any]:
    """The proxies by name and the encoder that options name; the options then hold names alone.

    Raises:
        PluginError: One is not found.
        UsageError: Two have the same name, or one that of an option.
    """

    def found(group: str, spec: str) -> tuple[str, Any]:
        if spec in classes:
            return spec, classes[spec]
        try:
            return _find(group, spec, where)
        except PluginError as error:
            if where == PROG:
                raise
            raise PluginError(f"{where}: {error}") from error

    encoder_name, encoder = found(plugins.ENCODERS, options.encoder)
    named = [found(plugins.PROXIES, spec) for spec in options.proxy]
    proxies = dict(named)
    taken = [name for name, _ in named] + [encoder_name]
    if len(set(taken)) < len(taken):
        raise UsageError(f"{where}: two of {', '.join(taken)} have one name; give a class another `name`")
    return dataclasses.replace(options, proxy=tuple(proxies), encoder=encoder_name), proxies, encoder


def _find(group: str, spec: str, where: str) -> tuple[str, Any]:
    """A plugin and its name, which is none of an option: its section would take the option's place."""
    name, made = plugins.find(group, spec)
    reserved = {f.name for f in dataclasses.fields(PretrainOptions)} | {"config", "print_config", "help"}
    if name in reserved:
        raise UsageError(
            f"{where}: {spec}: called {name!r}, as an option of {PROG}; give the class another `name`"
        )
    return name, made


def presets() -> dict[str, Path]:
    """Names and files of the presets."""
    folder = Path(str(files("ssl3d") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset_values(name: str | None, proxies: Sequence[Any]) -> dict[str, Any]:
    """The options of a preset, less the sections of proxies that are not trained.

    Raises:
        UsageError: There is no such preset.
    """
    if name is None:
        return {}
    import yaml

    values: dict[str, Any] = yaml.safe_load(_preset(name).read_text(encoding="utf-8"))
    known = {f.name for f in dataclasses.fields(PretrainOptions)}
    return {
        key: value
        for key, value in values.items()
        if key in {*known, *map(str, proxies), values.get("encoder")}
    }


def _preset(name: str) -> Path:
    found = presets()
    if name not in found:
        raise UsageError(f"{PROG}: --preset: no preset {name!r}; there are {', '.join(found)}")
    return found[name]


def _with_preset(argv: Sequence[str]) -> list[str]:
    """Puts the file of `--preset NAME` in place of the flag, below everything else."""
    words: list[str] = []
    first: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word != "--preset" and not word.startswith("--preset="):
            words.append(word)
            continue
        name = word.partition("=")[2] or (rest.pop(0) if rest else "")
        first = ["--config", str(_preset(name))]
    return first + words


def _sections_given(argv: Sequence[str]) -> set[str]:
    names = [word[2:].partition("=")[0] for word in argv if word.startswith("--")]
    return {name.replace("-", "_") for name in names if "." in name}


def _plugins(strict: bool = True) -> config.Plugins:
    def options_of(group: str) -> Any:
        return lambda said: _find(group, said, PROG)[1].Config

    def name_in(group: str) -> Any:
        return lambda said: _find(group, said, PROG)[0]

    return config.Plugins(
        options={"proxy": options_of(plugins.PROXIES), "encoder": options_of(plugins.ENCODERS)},
        known={"proxy": plugins.names(plugins.PROXIES), "encoder": plugins.names(plugins.ENCODERS)},
        strict=strict,
        called={"proxy": name_in(plugins.PROXIES), "encoder": name_in(plugins.ENCODERS)},
    )


def _epilog() -> str:
    return (
        "Each proxy and the encoder have options of their own, as in --sorting.slices 8 or "
        "--resnet18.kind acs: name them, then --help. Example: ssl3d pretrain --proxy sorting "
        "--data store.h5 --steps 2000 --out runs/first. A proxy of your own needs no installation: --proxy "
        "my/rotation.py, its options --rotation.crop."
    )
