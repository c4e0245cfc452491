"""Options of a pretraining run: flags, presets, and what each proxy recommends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from ssl3d import config, plugins
from ssl3d.command_help import HelpSection
from ssl3d.errors import PluginError, UsageError
from ssl3d.training.loggers import check_loggers

PROG = "ssl3d pretrain"
STEPS = 1000
"""Length of a run where neither the user nor a proxy says it."""

NOT_RECORDED = ("out", "overwrite", "resume", "preset")
FREE_ON_RESUME = frozenset(
    ("resume", "workers", "data", "checkpoint_every", "log_every", "logger", "devices", "nodes", "device")
)
"""Options beside `--resume`: none of them changes what is learnt (data are checked by their digest)."""
NOT_COMPARED = FREE_ON_RESUME | {"proxy", "encoder", "init"}
"""What `config.yaml` may say otherwise than a checkpoint: a plugin's file may have another place by now."""


@dataclass
class PretrainOptions:
    """Pretrain an encoder on unlabelled volumes with one proxy task or several.

    Attributes:
        proxy: Proxy tasks that train the encoder together: names (listed by `ssl3d proxies`), PATH/file.py,
            PATH/file.py:Class or module:Class.
        encoder: Architecture of the encoder: a name (listed by `ssl3d encoders`), PATH/file.py or
            module:Class.
        data: Stores, folders of stores, phantoms[:N], or anything that `ssl3d prepare` takes, which is
            prepared once and kept in $SSL3D_CACHE, else ~/.cache/ssl3d. Several sources are read as one,
            with an equal share for each data set.
        subjects: Labelled subjects to train on: train leaves the validation and test subjects of the house
            split to the benchmarks, all takes everybody, unlabelled takes none. Subjects without a label, a
            mask, boxes or a split of their own are always used.
        leave_out: Fold K/N of a cross-validation whose subjects are left out, in place of the house split:
            those that `ssl3d finetune --folds N` tests on in its fold K, from 0. Of each data set by
            itself, subjects with a mask where it has masks, else those with a label or boxes.
        holdout: Share of the subjects that is kept out of training, to report the proxies' metrics on
            people never seen.
        steps: Number of optimizer steps; 0 takes what the proxy recommends, else 1000.
        epochs: Number of passes over the data, in place of steps.
        batch_size: Volumes per optimizer step, over all devices.
        accumulate: Number of parts that a batch is cut into, which are computed one after the other to save
            memory. Contrastive losses compare within a part only, unless grad_cache is on.
        grad_cache: Whether contrastive losses compare the whole batch though it is computed in parts: each
            part is embedded twice, a third more time, and the gradients are those of the uncut batch, but
            for batch norm, which sees a part (gradient caching, Gao et al., 2021).
        workers: Processes per device that read data; -1 chooses by the number of cores.
        optimizer: Optimizer of all weights: adamw, sgd or lars.
        lr: Peak learning rate.
        weight_decay: Weight decay of all weights but biases and norms.
        momentum: Momentum of sgd and lars.
        warmup: Share of the steps over which the learning rate rises linearly; afterwards it falls to 0
            along half a cosine.
        clip: Largest norm of the gradient, to which larger ones are scaled down; 0 switches clipping off.
        weights: Weights of the proxies' losses, in the order of the proxies; 1 each if left out.
        balance: Weighting of several proxies' losses. fixed keeps the weights. The others start from them:
            uncertainty learns each loss' variance (Kendall et al., 2018); gradnorm makes the gradients at
            the encoder's last layer equally large, larger where a proxy learns slowly (Chen et al., 2018).
        balance_alpha: Strength with which gradnorm favours a proxy that learns slowly; 0 favours none.
        precision: Floating-point precision: 32, bf16, 16 (CUDA only), or auto, which takes bf16 where the
            device is fast at it, else 32. tf32 is 32 whose products are rounded to 10 bits, on CUDA devices
            that can; with 32 torch does so in convolutions alone.
        compile: Compilation of the encoder by torch.compile: minutes at the start, and faster steps, on
            GPUs above all. It needs a C++ compiler, on GPUs Triton.
        memory_format: Memory layout of the convolution kernels; auto takes the one in which the encoder is
            faster.
        threads: CPU threads of the main process; 0 leaves torch's number. A run that goes on keeps its own.
        device: Kind of device that computes: auto, cpu, cuda or mps.
        devices: Number of devices per node; 0 takes those that torchrun or SLURM started, else every GPU,
            or one CPU process.
        nodes: Number of nodes; 0 takes those that torchrun or SLURM started, else 1.
        strategy: Distribution over several devices: ddp keeps all weights on each of them, fsdp gives each
            a part of weights, gradients and moments, auto takes ddp.
        init: Run, encoder or zoo:NAME whose weights and architecture the run starts from.
        seed: Seed of everything random: weights, order, crops and views.
        checkpoint_every: Steps between checkpoints; the last two are kept.
        eval_every: Steps between evaluations: the metrics of held-out subjects, pictures and the online kNN
            score. 0 makes it a tenth of the run, -1 switches evaluations off.
        log_every: Steps between points in the loggers, and between lines where the output is no terminal; 0
            makes it a fortieth of the run.
        logger: Loggers of curves, pictures, options and the encoder: tensorboard, wandb (Weights & Biases,
            offline where no account is known) and mlflow, any number of them.
        save_at: Shares of the run after which the encoder is exported too, into encoder-at-25/ and the
            like.
        out: Folder of the run; runs/<proxy>-<n> if left out.
        overwrite: Permission to delete the run that is in `out`.
        resume: Folder of a run to go on with, under its own options.
        preset: Name of a set of options, which flags override: gpu-96, pseudo3d or quick.
    """

    proxy: tuple[str, ...] = ()
    encoder: str = "resnet18"
    data: tuple[str, ...] = ("phantoms",)
    subjects: Literal["train", "all", "unlabelled"] = "train"
    leave_out: str = ""
    holdout: float = 0.1
    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 16
    accumulate: int = 1
    grad_cache: bool = False
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
    precision: Literal["auto", "32", "tf32", "bf16", "16"] = "auto"
    compile: bool = False
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    threads: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 0
    nodes: int = 0
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    init: str | None = None
    seed: int = 0
    checkpoint_every: int = 200
    eval_every: int = 0
    log_every: int = 0
    logger: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    save_at: tuple[float, ...] = ()
    out: Path | None = None
    overwrite: bool = False
    resume: Path | None = None
    preset: str | None = None

    help_sections: ClassVar[tuple[HelpSection, ...]] = (
        HelpSection("data", ("data", "subjects"), ("leave_out", "holdout")),
        HelpSection(
            "training",
            ("steps", "epochs", "batch_size", "lr", "seed", "preset", "out", "resume", "overwrite",
             "logger"),
            ("optimizer", "weight_decay", "momentum", "warmup", "clip", "accumulate", "grad_cache",
             "eval_every", "checkpoint_every", "log_every", "save_at"),
        ),
        HelpSection("encoder", ("encoder", "init")),
        HelpSection("proxy", ("proxy",), ("weights", "balance", "balance_alpha")),
        HelpSection(
            "hardware",
            ("device", "workers", "precision", "devices"),
            ("nodes", "strategy", "threads", "memory_format", "compile"),
        ),
    )  # fmt: skip
    """Sections of the help."""

    def __post_init__(self) -> None:
        """Refuse, by a ValueError that names the field, a value that cannot be used."""
        for name, least in (("batch_size", 1), ("accumulate", 1), ("checkpoint_every", 1), ("workers", -1),
                            ("steps", 0), ("threads", 0), ("devices", 0), ("nodes", 0), ("eval_every", -1),
                            ("log_every", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if self.leave_out and fold_of(self.leave_out) is None:
            raise ValueError(f"leave_out is {self.leave_out!r}, must be a fold K/N, such as 0/5")
        if self.leave_out and self.subjects != "train":
            raise ValueError(f"leave_out is {self.leave_out}: leave out subjects {self.subjects}")
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
        if self.grad_cache and self.accumulate == 1:
            raise ValueError("grad_cache is for batches in parts, but accumulate is 1: give 2 or more")
        if self.optimizer == "lars" and self.weight_decay == 0:
            raise ValueError("weight_decay is 0, which switches the scaling of lars off; give it 1e-6, say")
        if any(not 0 <= share <= 1 for share in self.save_at):
            raise ValueError(f"save_at is {self.save_at}, must be shares of the run from 0 to 1")
        if self.weights and len(self.weights) != len(self.proxy):
            raise ValueError(
                f"weights has {len(self.weights)} values for {len(self.proxy)} proxies: give one for each"
            )
        if any(not weight >= 0 for weight in self.weights):
            raise ValueError(f"weights is {self.weights}, must be 0 or more each")
        if self.balance != "fixed" and any(weight == 0 for weight in self.weights):
            raise ValueError(f"weights is {self.weights}, must be above 0 each with balance {self.balance}")
        if not 0 <= self.balance_alpha < float("inf"):
            raise ValueError(f"balance_alpha is {self.balance_alpha}, must be 0 or more")
        if self.balance == "gradnorm" and (self.strategy == "fsdp" or self.precision == "16"):
            cause = "strategy fsdp" if self.strategy == "fsdp" else "precision 16"
            raise ValueError(
                f"balance gradnorm needs whole, unscaled gradients, which {cause} does not give"
            )
        if len(set(self.proxy)) < len(self.proxy):
            raise ValueError(f"proxy names a proxy twice: {' '.join(self.proxy)}; name each once")
        if not self.data:
            raise ValueError("data is empty: name a store, scans or phantoms")
        check_loggers(self.logger)


def fold_of(words: str) -> tuple[int, int] | None:
    """Read `K/N`, a fold from 0 and the number of folds; None where it is no fold.

    >>> fold_of("4/5"), fold_of("5/5")
    ((4, 5), None)
    """
    fold, slash, folds = words.partition("/")
    if not (slash and fold.isdigit() and folds.isdigit() and int(fold) < int(folds) and int(folds) > 1):
        return None
    return int(fold), int(folds)


@dataclass
class PretrainPlan:
    """Plan of a pretraining run: options, classes and their options, ready to start.

    Attributes:
        options: Options of the run.
        proxies: Class and options of each proxy, by name.
        encoder: Class of the encoder.
        encoder_config: Options of the encoder.
        given: Names of the options that the user set.
    """

    options: PretrainOptions
    proxies: dict[str, tuple[Any, Any]]
    encoder: Any
    encoder_config: Any
    given: set[str] = field(default_factory=set)

    @property
    def encoder_name(self) -> str:
        """Name under which the encoder is registered."""
        return plugins.name_of(plugins.ENCODERS, self.encoder)

    @property
    def mains(self) -> list[str]:
        """Main metric of each proxy, as in sorting/kendall_tau."""
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
        """Return the content of `config.yaml`, which `--config` reads back."""
        own = {k: v for k, v in config.to_dict(self.options).items() if k not in NOT_RECORDED}
        # What is not installed is named by its file or module: its name alone would not find it again.
        own["proxy"] = [plugins.spec_of(plugins.PROXIES, kind) for kind, _ in self.proxies.values()]
        own["encoder"] = plugins.spec_of(plugins.ENCODERS, self.encoder)
        sections = {name: config.to_dict(options) for name, (_, options) in self.proxies.items()}
        return own | {self.encoder_name: config.to_dict(self.encoder_config)} | sections

    def compared(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the options, to be compared with those it goes on with."""
        return {name: value for name, value in self.as_config().items() if name not in NOT_COMPARED}


class Request(NamedTuple):
    """Request of a command line: a new run, one to go on with, or its configuration alone.

    Attributes:
        plan: Plan of a new run; None with --resume, as the run's own options hold.
        options: Options of the command line.
        given: Names of the options that the user set.
        printed: Words of `--print_config`, where only the configuration is to be printed; else None.
    """

    plan: PretrainPlan | None
    options: PretrainOptions
    given: set[str]
    printed: set[str] | None


def request_of(argv: Sequence[str]) -> Request:
    """Read the command line of `ssl3d pretrain`.

    Raises:
        UsageError: No proxy is named, or a flag is wrong; the message names it.
    """
    words, printed = config.without_print_config(argv)
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
        return Request(None, options, parsed.given, printed)
    if not options.proxy:
        raise UsageError(
            f"{PROG}: --proxy: name one or more of {', '.join(plugins.names(plugins.PROXIES))}"
        )
    options, classes, encoder = _found(options, PROG, {})
    proxies = {name: (kind, parsed.sections[name]) for name, kind in classes.items()}
    plan = make_plan(options, parsed.given, proxies, encoder, parsed.sections[options.encoder])
    return Request(plan, options, parsed.given, printed)


def make_plan(
    options: PretrainOptions,
    given: set[str],
    proxies: Mapping[str, tuple[Any, Any]],
    encoder: Any,
    encoder_config: Any,
) -> PretrainPlan:
    """Fill in what the proxies recommend where the user said nothing; the first proxy decides.

    Raises:
        PluginError: A proxy recommends an option that does not exist.
        UsageError: A proxy recommends a value that cannot be used.
    """
    known = {f.name for f in dataclasses.fields(PretrainOptions)}
    chosen: dict[str, Any] = {}
    # A 0 that was given says no more of the length than nothing does.
    fixed = {name for name in given if name not in ("steps", "epochs") or getattr(options, name)}
    for name, (proxy, _) in proxies.items():
        unknown = sorted(set(proxy.recipe) - known)
        if unknown:
            raise PluginError(
                f"proxy {name!r} recommends {', '.join(unknown)}, which {PROG} has no option for"
            )
        for key, value in proxy.recipe.items():
            rival = {"steps": "epochs", "epochs": "steps"}.get(key)
            if key not in fixed and rival not in fixed and rival not in chosen:
                chosen.setdefault(key, value)
    if options.grad_cache:
        from ssl3d.proxy import Proxy

        without = [name for name, (proxy, _) in proxies.items() if proxy.embed_views is Proxy.embed_views]
        if without:
            raise UsageError(
                f"{PROG}: --grad-cache: the loss of {' and of '.join(without)} is no function of "
                "embeddings alone (it has no embed_views): leave the flag out, or train other proxies"
            )
    if not (chosen.keys() | fixed) & {"steps", "epochs"}:
        chosen["steps"] = STEPS
    try:
        options = dataclasses.replace(options, **chosen)
    except ValueError as error:
        raise UsageError(f"{PROG}: {error} (recommended by the proxy: {chosen})") from error
    return PretrainPlan(options, dict(proxies), encoder, encoder_config, set(given))


def plan_from(
    values: Mapping[str, Any],
    where: str,
    classes: Mapping[str, Any] | None = None,
    recorded: bool = False,
) -> PretrainPlan:
    """Make a plan of plain values: a run's `config.yaml`, or keyword arguments from Python.

    Args:
        values: Options by name; the options of proxies and of the encoder are dictionaries by name.
        where: Beginning of the message of an error.
        classes: Proxies and encoders that are not registered, by name.
        recorded: Whether a run recorded the values: options that are missing mean what they meant before
            there were any.

    Raises:
        UsageError: An option is unknown or its value unusable.
    """
    classes = classes or {}
    known = {f.name for f in dataclasses.fields(PretrainOptions)}
    values = config.todays(PretrainOptions, values)
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
    configured: dict[str, tuple[Any, Any]] = {}
    for name, proxy in proxies.items():
        own_section = values.get(name) or {}
        configured[name] = proxy, config.from_dict(proxy.Config, own_section, f"{where}, {name}", recorded)
    unknown = sorted(map(str, set(values) - known - set(configured) - {options.encoder}))
    if unknown:
        raise UsageError(f"{where}: unknown option {', '.join(unknown)}")
    section = values.get(options.encoder) or {}
    encoder_config = config.from_dict(encoder.Config, section, f"{where}, {options.encoder}", recorded)
    return make_plan(options, set(own), configured, encoder, encoder_config)


def _found(
    options: PretrainOptions, where: str, classes: Mapping[str, Any]
) -> tuple[PretrainOptions, dict[str, Any], Any]:
    """Find the proxies and the encoder that options name; the options then hold names alone.

    Raises:
        PluginError: A proxy or the encoder is not found.
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
        raise UsageError(
            f"{where}: two of {', '.join(taken)} have the same name; give a class another `name`"
        )
    return dataclasses.replace(options, proxy=tuple(proxies), encoder=encoder_name), proxies, encoder


def _find(group: str, spec: str, where: str) -> tuple[str, Any]:
    """Find a plugin and its name, which no option may have: its section would take the option's place.

    Raises:
        UsageError: The plugin is called as an option is.
    """
    name, kind = plugins.find(group, spec)
    reserved = {f.name for f in dataclasses.fields(PretrainOptions)} | {"config", "print_config", "help"}
    if name in reserved:
        raise UsageError(
            f"{where}: {spec} is called {name!r} like an option of {PROG}; give the class another `name`"
        )
    return name, kind


def presets() -> dict[str, Path]:
    """List the files of the presets by name."""
    folder = Path(str(files("ssl3d") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset_values(name: str | None, proxies: Sequence[Any]) -> dict[str, Any]:
    """Read the options of a preset, without the sections of proxies that are not trained.

    Raises:
        UsageError: There is no such preset.
    """
    if name is None:
        return {}
    from ssl3d.yaml_files import read_yaml

    values: dict[str, Any] = read_yaml(_preset(name))
    known = {f.name for f in dataclasses.fields(PretrainOptions)}
    return {
        key: value
        for key, value in values.items()
        if key in {*known, *map(str, proxies), values.get("encoder")}
    }


def _preset(name: str) -> Path:
    known = presets()
    if name not in known:
        raise UsageError(f"{PROG}: --preset: no preset {name!r}; there are {', '.join(known)}")
    return known[name]


def _with_preset(argv: Sequence[str]) -> list[str]:
    """Put the file of `--preset NAME` in place of the flag, below everything else."""
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
        silent=[str(path) for path in presets().values()],
        called={"proxy": name_in(plugins.PROXIES), "encoder": name_in(plugins.ENCODERS)},
    )


def _epilog() -> str:
    return (
        "Every proxy and encoder has options of its own, such as --sorting.slices 8 or --resnet18.kind "
        "acs; --help lists those of the proxies and the encoder that are named beside it. Example: ssl3d "
        "pretrain --proxy sorting --data store.h5 --steps 2000 --out runs/first. A proxy of your own needs "
        "no installation: --proxy my/rotation.py, whose options are --rotation.crop and the like."
    )
