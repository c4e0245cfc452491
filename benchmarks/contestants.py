"""Contestants: the encoders given, untrained ones of their kind, rows without a network; and records."""

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
    load_decoder,
    pooled_by,
)
from ssl3d_benchmarks.task import counts
from ssl3d_benchmarks.trivial_rows import TRIVIAL, VERSION

if TYPE_CHECKING:
    from ssl3d.api import Benchmark, Collection, Encoder, PretrainedDecoder
    from ssl3d_benchmarks.task import SplitData, TrainingSubset

Array = NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """Contestant whose encoder is made when its turn comes, so that one is in memory at a time.

    Attributes:
        name: Name of the row in tables.
        kind: Kind of contestant: encoder, untrained or trivial.
        group: Architecture, by which untrained rows stand beside encoders.
        make: Function that returns the encoder; None for a trivial row.
        source: Encoder as given on the command line.
        recalibrate: Whether the norm statistics are taken anew.
        in_channels: Channels that the encoder takes; 0 for a trivial row.
        decoder: Decoder that the head starts from; None for new weights.
        folds: Entry of each fold of a cross-validation, where each has an encoder of its own.
    """

    name: str
    kind: str
    group: str
    make: Callable[[], Encoder] | None
    source: str = ""
    recalibrate: bool = False
    in_channels: int = 0
    decoder: PretrainedDecoder | None = None
    folds: tuple[Entry, ...] = ()

    def of_fold(self, number: int) -> Entry:
        """Return the entry of a fold: its own, or this one, whose encoder all folds start from."""
        return self.folds[number] if self.folds else self


FOLD = "{fold}"
"""Place of the fold's number in an encoder's words, where every fold has an encoder of its own."""


def named(spec: str) -> tuple[str, str]:
    """Split `NAME=ENCODER` into both; the name is empty where none is given."""
    name, _, encoder = spec.partition("=")
    if encoder and name and all(c.isalnum() or c in "-_.+" for c in name):
        return name, encoder
    return "", spec


class Loaded(dict[str, "Encoder"]):
    """Encoders of one command by their words, each loaded when it is first asked for, and then kept."""

    def __missing__(self, spec: str) -> Encoder:
        # The first fold's stands for all: they have one architecture, and saw data prepared alike.
        self[spec] = encoder = encoder_from(spec.replace(FOLD, "0"), seed=0)
        return encoder

    def trained(self, specs: Sequence[str]) -> list[Encoder]:
        """Return the encoders among the words, names taken off, that are not untrained ones."""
        words = [named(spec)[1] for spec in specs]
        return [self[spec] for spec in words if not spec.startswith("scratch:")]


def given(
    specs: Sequence[str],
    pool: str = "mean",
    loaded: Loaded | None = None,
    decoders: bool = False,
    folds: int = 0,
) -> Iterator[tuple[str, Encoder, Entry]]:
    """Load every encoder that the command line names, one after the other.

    Yields the word without its name, the encoder (seed 0 where it is untrained) and its entry. The entry
    of a `scratch:` word is of kind `untrained`, named by its architecture. With `decoders`, that of any
    other has the decoder that travelled with it, and says so in its name. Words with `{fold}` name an
    encoder for each of the `folds`.

    Raises:
        CheckpointError: An encoder cannot be loaded, or has no decoder where one is asked for.
        UsageError: A name is given twice; or encoders of folds are given without folds, or differ in
            architecture.
    """
    loaded = Loaded() if loaded is None else loaded
    names: set[str] = set()
    for text in specs:
        called, spec = named(text)
        if FOLD in spec and folds < 2:
            raise UsageError(f"{spec}: names an encoder for each fold, which finetune --folds 5 has")
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
            if decoders:
                first = spec.replace(FOLD, "0")
                entry = replace(entry, name=f"{name}, with decoder", decoder=load_decoder(first))
            if FOLD in spec:
                every = (spec.replace(FOLD, str(number)) for number in range(folds))
                own = tuple(entry for _, _, entry in given([*every], pool, decoders=decoders))
                for other in own:
                    if other.group != group:
                        raise UsageError(f"{other.source}: is {other.group}, and that of fold 0 {group}")
                entry = replace(entry, folds=own)
        yield spec, encoder, entry


def untrained(entry: Entry, seed: int, like: Encoder) -> Entry:
    """Return the entry of an untrained encoder with the architecture (and aggregator) of `like`."""
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
    """Return an entry for each row without a network."""
    return [Entry(name, "trivial", "", None, "trivial") for name in names]


def trivial_contestant(entry: Entry, measured: Sequence[int] = ()) -> Contestant:
    """Return the contestant of a row without a network, which measures the mask values `measured`."""
    return Contestant(
        entry.name,
        "trivial",
        f"{entry.name} v{VERSION}",
        source=entry.source,
        volumes_seen=frozenset(),
        details={"features": entry.name, "mask_classes": list(measured)},
    )


def with_norm(entry: Entry, encoder: Encoder, asked: str) -> list[Entry]:
    """Return the entry as it is (asked: no), with norm statistics taken anew (yes), or both."""
    again = replace(entry, name=f"{entry.name}, norm recalibrated", recalibrate=True)
    if not has_batch_norm(encoder) or asked == "no":
        return [entry]
    return [again] if asked == "yes" else [entry, again]


def has_batch_norm(encoder: Encoder) -> bool:
    """Return whether an encoder has norm statistics to take anew."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(m, _BatchNorm) and m.track_running_stats for m in encoder.modules())


def described(entry: Entry, encoder: Encoder, details: dict[str, Any]) -> Contestant:
    """Describe the contestant of an entry by the metadata of its encoder."""
    card: dict[str, Any] = encoder.metadata
    details = dict(details)
    if entry.kind == "untrained":
        details["weights_seed"] = card["seed"]
    if entry.decoder is not None:
        details["decoder"] = entry.decoder.digest
    digest = _digest(entry, encoder)
    if entry.folds:
        details["folds"] = [_digest(own, own.make()) for own in entry.folds if own.make is not None]
        digest = hashlib.sha256(" ".join(details["folds"]).encode()).hexdigest()[:16]
    kept = (
        "proxies", "steps", "compute", "flops", "seconds", "patch", "data", "sha256",
        # What tells two encoders of one proxy apart, and a seed from a batch size in a name.
        "init", "batch_size", "optimizer", "lr", "seed",
    )  # fmt: skip
    return Contestant(
        entry.name,
        entry.kind,
        digest,
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
    """Return the digest by which records know an encoder; with an aggregator, its pooling is part of it."""
    digest = encoder_digest(encoder)
    if not isinstance(encoder, AggregatedEncoder):
        return digest
    return hashlib.sha256(f"{digest} aggregator v{encoder.version}".encode()).hexdigest()[:16]


def _digest(entry: Entry, encoder: Encoder) -> str:
    """Return the digest of an encoder, and of the decoder that came with it where one starts the head."""
    digest = pooling_digest(encoder)
    if entry.decoder is None:
        return digest
    return hashlib.sha256(f"{digest} decoder {entry.decoder.digest}".encode()).hexdigest()[:16]


def record(
    contestant: Contestant,
    benchmark: Benchmark,
    split: SplitData,
    subset: TrainingSubset,
    seed: int,
    settings: dict[str, Any],
    by_fold: Sequence[Contestant] = (),
) -> Result:
    """Begin the record of a contestant on a subset: all that decides its key, and its flags.

    Test subjects that pretraining saw, by identity, file or voxels, are counted; a record with such
    subjects is not ranked. Where each fold has a contestant of its own, the test subjects of a fold are
    looked for among those that this one saw.
    """
    return Result(
        task=benchmark.task,
        version=benchmark.task_version,
        dataset=sorted(set(split.data.datasets)),
        data_digest=split.data.digest(),
        split=counts(split, subset),
        split_digest=split.digest,
        fraction=float(subset.fraction),
        repeat=subset.repeat,
        seed=seed,
        contestant=contestant.described(),
        settings=settings,
        main=benchmark.main,
        compute={"pretraining": contestant.pretraining},
        flags=_flags(contestant, split, by_fold),
    )


def _flags(contestant: Contestant, split: SplitData, by_fold: Sequence[Contestant]) -> dict[str, Any]:
    """Return the flags of a record, with the people of all folds counted together."""
    tests = [fold.test for fold in split.folds]
    pairs = [*zip(by_fold, tests, strict=True)] if by_fold else [(contestant, np.any(tests, axis=0))]
    each = [
        leak_flags(
            split.data.select(np.flatnonzero(test)),
            own.identities,
            own.volumes_seen,
            own.saw_labels,
            own.volumes_complete,
        )
        for own, test in pairs
    ]
    volumes = [flags["seen_test_volumes"] for flags in each]
    return {
        "seen_test_subjects": sum(flags["seen_test_subjects"] for flags in each),
        "seen_test_volumes": None if None in volumes else sum(volumes),
        "saw_labels": any(flags["saw_labels"] for flags in each),
        "ranked": all(flags["ranked"] for flags in each),
    }


def check_channels(entries: Sequence[Entry], data: Collection) -> None:
    """Raise a DataError where an encoder takes other channels than the data has."""
    channels = sorted({int(n) for n in data.shapes[:, 0]})
    for entry in entries:
        if entry.in_channels and channels != [entry.in_channels]:
            raise DataError(
                f"{entry.name} takes {entry.in_channels} channels, but the data has "
                f"{' and '.join(map(str, channels))}; give an encoder that takes as many"
            )


def fitting_all(specs: Sequence[str], data: Collection) -> tuple[str, ...]:
    """Let encoders that saw no volumes take the channels of the data, unless they name their own."""
    channels = {int(n) for n in data.shapes[:, 0]}
    if channels == {1} or len(channels) > 1:
        return tuple(specs)
    count = channels.pop()
    pairs = [named(spec) for spec in specs]
    return tuple(f"{name}={fitting(spec, count)}" if name else fitting(spec, count) for name, spec in pairs)


def architecture(encoder: Encoder) -> str:
    """Return `scratch:NAME:field=value...` with the fields that are not at their default."""
    words = ["scratch:" + str(encoder.metadata["architecture"])]
    for field in dataclasses.fields(encoder.config):
        value = getattr(encoder.config, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value != default:
            words.append(f"{field.name}={_word(value)}")
    return ":".join(words)


def pooled(pool: str) -> str:
    """Return the part of a row's name that says its pooling."""
    return "" if pool == "mean" else f", {pool}"


def pool_details(pool: str) -> dict[str, str]:
    """Return the pooling and its version for a record; nothing where it is the mean."""
    return {} if pool == "mean" else {"pool": f"{pool} v{AggregatedEncoder.version}"}


RECALIBRATION_VOLUMES = 256
"""Training volumes that norm statistics are taken from at most."""


def recalibrate(encoder: Encoder, train: Collection, window: Sequence[int], device: str) -> None:
    """Take the norm statistics anew from training volumes, without labels, on the probe's own input."""
    from ssl3d.api import recalibrate_norm

    batches = _batches(train, window, device)
    if isinstance(encoder, AggregatedEncoder):
        # The encoder inside sees slices, and so do its norms.
        stacks = map(encoder.stacks, batches)
        recalibrate_norm(encoder.encoder, (slabs[own] for slabs, own in stacks))
    else:
        recalibrate_norm(encoder, batches)


def _batches(train: Collection, window: Sequence[int], device: str) -> Iterator[Any]:
    """Yield batches of equal training volumes or their central windows, of evenly spread volumes."""
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
    """Return a function that makes an untrained encoder, with an aggregator where `like` has one."""
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
