"""Who is scored: encoders given, untrained ones of their kind, rows without a network; and records."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import (
    AggregatedEncoder,
    Contestant,
    DataError,
    Result,
    SliceAggregator,
    UsageError,
    encoder_digest,
    encoder_from,
    fitting,
    hashes_complete,
    hashes_in,
    leak_flags,
    pooled_by,
)
from ssl3d_benchmarks.task import counts
from ssl3d_benchmarks.trivial_rows import TRIVIAL, VERSION

if TYPE_CHECKING:
    from ssl3d.api import Benchmark, Collection, Encoder
    from ssl3d_benchmarks.task import Job, Task

Array = NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """A contestant to be; the encoder is made when its turn comes, so that one is in memory at a time.

    Attributes:
        name: Row name.
        kind: As of a contestant.
        group: Architecture, by which untrained rows stand beside encoders.
        make: Gives the encoder; None for a trivial row.
        source: As given on the command line.
        recalibrate: Whether the norm statistics are taken anew.
        in_channels: Of the encoder; 0 for a trivial row.
    """

    name: str
    kind: str
    group: str
    make: Callable[[], Encoder] | None
    source: str = ""
    recalibrate: bool = False
    in_channels: int = 0


def named(spec: str) -> tuple[str, str]:
    """`NAME=ENCODER` taken apart; the name is empty where none is given."""
    name, _, encoder = spec.partition("=")
    if encoder and name and all(c.isalnum() or c in "-_.+" for c in name):
        return name, encoder
    return "", spec


class Loaded(dict[str, "Encoder"]):
    """Encoders of one command by their words, each loaded when it is first asked for, and then kept."""

    def __missing__(self, spec: str) -> Encoder:
        self[spec] = encoder = encoder_from(spec, seed=0)
        return encoder

    def trained(self, specs: Sequence[str]) -> list[Encoder]:
        """Return the encoders among the words, names taken off, that are not untrained ones."""
        words = [named(spec)[1] for spec in specs]
        return [self[spec] for spec in words if not spec.startswith("scratch:")]


def given(
    specs: Sequence[str], pool: str = "mean", loaded: Loaded | None = None
) -> Iterator[tuple[str, Encoder, Entry]]:
    """Every word for an encoder, its name taken off, with its encoder (untrained: seed 0) and its entry.

    The entry of a `scratch:` word is of kind `untrained`, named by its architecture.

    Raises:
        CheckpointError: An encoder cannot be loaded.
        UsageError: A name is given twice.
    """
    loaded = Loaded() if loaded is None else loaded
    names: set[str] = set()
    for text in specs:
        called, spec = named(text)
        encoder = pooled_by(pool, loaded[spec], spec)
        words = architecture(encoder)
        group = words + pooled(pool)
        channels = encoder.config.in_channels
        if spec.startswith("scratch:"):
            entry = Entry(group, "untrained", group, None, words, in_channels=channels)
        else:
            name = (called or str(Path(spec))) + pooled(pool)
            if name in names:
                raise UsageError(f"{called or spec}: given twice")
            names.add(name)
            entry = Entry(name, "encoder", group, _copier(encoder), spec, in_channels=channels)
        yield spec, encoder, entry


def untrained(entry: Entry, seed: int, like: Encoder) -> Entry:
    """The entry of an untrained encoder of the same architecture (and aggregator) as another."""
    words = architecture(like)
    return Entry(
        f"{entry.group}, seed {seed}",
        "untrained",
        entry.group,
        _untrained(words, seed, like),
        words,
        in_channels=entry.in_channels,
    )


def trivial_entries(names: Sequence[str] = TRIVIAL) -> list[Entry]:
    """The rows without a network."""
    return [Entry(name, "trivial", "", None, "trivial") for name in names]


def trivial_contestant(entry: Entry, measured: Sequence[int] = ()) -> Contestant:
    """A row without a network; `measured` are the mask values that it measures."""
    return Contestant(
        entry.name,
        "trivial",
        f"{entry.name} v{VERSION}",
        source=entry.source,
        volumes_seen=frozenset(),
        details={"features": entry.name, "mask_classes": list(measured)},
    )


def with_norm(entry: Entry, encoder: Encoder, asked: str) -> list[Entry]:
    """The entry as it is (asked: no), with norm statistics taken anew (yes), or both."""
    again = replace(entry, name=f"{entry.name}, norm recalibrated", recalibrate=True)
    if not has_batch_norm(encoder) or asked == "no":
        return [entry]
    return [again] if asked == "yes" else [entry, again]


def has_batch_norm(encoder: Encoder) -> bool:
    """Whether it has norm statistics to take anew."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(m, _BatchNorm) and m.track_running_stats for m in encoder.modules())


def described(entry: Entry, encoder: Encoder, details: dict[str, Any]) -> Contestant:
    """The contestant of an entry, from its encoder's metadata."""
    card: dict[str, Any] = encoder.metadata
    details = dict(details)
    if entry.kind == "untrained":
        details["weights_seed"] = card["seed"]
    kept = (
        "proxies", "steps", "compute", "flops", "seconds", "patch", "data", "sha256",
        # What tells two encoders of one proxy apart, and a seed from a batch size in a name.
        "init", "batch_size", "optimizer", "lr", "seed",
    )  # fmt: skip
    return Contestant(
        entry.name,
        entry.kind,
        pooling_digest(encoder),
        encoder,
        group=entry.group,
        source=entry.source,
        architecture={"name": card["architecture"], "config": card["config"]},
        pretraining={key: card[key] for key in kept if key in card} if entry.kind == "encoder" else {},
        identities=frozenset(card.get("identities") or ()),
        volumes_seen=hashes_in(card),
        saw_labels=bool(card.get("labels_seen", False)),
        volumes_complete=hashes_complete(card),
        details=details,
    )


def pooling_digest(encoder: Encoder) -> str:
    """The digest by which records and caches know an encoder; with an aggregator, of its pooling too."""
    digest = encoder_digest(encoder)
    if not isinstance(encoder, AggregatedEncoder):
        return digest
    return hashlib.sha256(f"{digest} aggregator v{encoder.version}".encode()).hexdigest()[:16]


def record(
    contestant: Contestant,
    benchmark: Benchmark,
    version: int,
    task: Task,
    job: Job,
    seed: int,
    settings: dict[str, Any],
) -> Result:
    """The record to be of a contestant on a subset, with what decides its key, and its flags.

    A test subject that pretraining saw, by identity, file or voxels, is counted; the record is then not
    ranked.
    """
    test = np.any([fold.test for fold in task.folds], axis=0)
    tested = task.data.select(np.flatnonzero(test))
    return Result(
        task=benchmark.task,
        version=version,
        dataset=sorted(set(task.data.datasets)),
        data_digest=task.data.digest(),
        split=counts(task, job),
        split_digest=task.digest,
        fraction=float(job.fraction),
        repeat=job.repeat,
        seed=seed,
        contestant=contestant.described(),
        settings=settings,
        main=benchmark.main,
        compute={"pretraining": contestant.pretraining},
        flags=leak_flags(
            tested,
            contestant.identities,
            contestant.volumes_seen,
            contestant.saw_labels,
            contestant.volumes_complete,
        ),
    )


def check_channels(entries: Sequence[Entry], data: Collection) -> None:
    """Raises a DataError where an encoder takes other channels than the data has."""
    found = sorted({int(n) for n in data.shapes[:, 0]})
    for entry in entries:
        if entry.in_channels and found != [entry.in_channels]:
            raise DataError(
                f"{entry.name}: takes {entry.in_channels} channels, the data has "
                f"{' and '.join(map(str, found))}"
            )


def fitting_all(specs: Sequence[str], data: Collection) -> tuple[str, ...]:
    """Encoders that saw no volumes take the data's channels unless told otherwise."""
    channels = {int(n) for n in data.shapes[:, 0]}
    if channels == {1} or len(channels) > 1:
        return tuple(specs)
    count = channels.pop()
    pairs = [named(spec) for spec in specs]
    return tuple(f"{name}={fitting(spec, count)}" if name else fitting(spec, count) for name, spec in pairs)


def architecture(encoder: Encoder) -> str:
    """`scratch:NAME:field=value...` with the fields that are not at their default."""
    words = ["scratch:" + str(encoder.metadata["architecture"])]
    for one in dataclasses.fields(encoder.config):
        value = getattr(encoder.config, one.name)
        default = one.default
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        if value != default:
            words.append(f"{one.name}={_word(value)}")
    return ":".join(words)


def pooled(pool: str) -> str:
    """What a row's name says of its pooling."""
    return "" if pool == "mean" else f", {pool}"


def pool_details(pool: str) -> dict[str, str]:
    """What a record says of its pooling, its version with it; nothing where it is the mean."""
    return {} if pool == "mean" else {"pool": f"{pool} v{AggregatedEncoder.version}"}


RECALIBRATION_VOLUMES = 256


def recalibrate(encoder: Encoder, train: Collection, window: Sequence[int], device: str) -> None:
    """Takes the norm statistics anew from training volumes, without labels, on the probe's own input."""
    from ssl3d.api import recalibrate_norm

    batches = _batches(train, window, device)
    if isinstance(encoder, AggregatedEncoder):
        # Sees slices, and so do its norms.
        stacks = map(encoder.stacks, batches)
        recalibrate_norm(encoder.encoder, (slabs[own] for slabs, own in stacks))
    else:
        recalibrate_norm(encoder, batches)


def _batches(train: Collection, window: Sequence[int], device: str) -> Iterator[Any]:
    """Batches of equal training volumes (or their central windows); at most 256 volumes, spread evenly."""
    import torch

    from ssl3d_benchmarks.features import BATCH_VOXELS

    step = max(1, len(train) // RECALIBRATION_VOLUMES)
    chosen = train.select(np.arange(0, len(train), step)[:RECALIBRATION_VOLUMES])
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for position, shape in enumerate(chosen.shapes):
        by_shape.setdefault(tuple(int(n) for n in shape), []).append(position)
    for shape, positions in sorted(by_shape.items()):
        size = [min(n, w) for n, w in zip(shape[1:], window, strict=True)]
        start = [(n - s) // 2 for n, s in zip(shape[1:], size, strict=True)]
        number = max(1, BATCH_VOXELS // int(np.prod(size)))
        for first in range(0, len(positions), number):
            volumes = [chosen[position].read(start, size) for position in positions[first : first + number]]
            yield torch.stack(volumes).to(device)


def _copier(encoder: Encoder) -> Callable[[], Encoder]:
    """Return a function that copies an encoder: what a fold or a seed does to it stays with the copy."""
    return lambda: copy.deepcopy(encoder)


def _untrained(words: str, seed: int, like: Encoder) -> Callable[[], Encoder]:
    """Makes an untrained encoder, with an untrained aggregator where `like` has one."""
    aggregator = like.aggregator.config if isinstance(like, AggregatedEncoder) else None

    def make() -> Encoder:
        encoder = encoder_from(words, seed=seed)
        if aggregator is None:
            return encoder
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AggregatedEncoder(encoder, SliceAggregator(aggregator)).eval()

    return make


def _word(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "[" + ",".join(f"[{_word(item)}]" for item in value) + "]"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
