"""From a command line to records: contestants, splits, subsets, then the table and the pictures."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import (
    AggregatedEncoder,
    Collection,
    Contestant,
    DataError,
    Result,
    Scores,
    SliceAggregator,
    UsageError,
    encoder_from,
    find_result,
    fitting,
    house_split,
    identity_hash,
    open_data_for,
    pooled_by,
    split_digest,
    statistics,
    write_result,
)
from ssl3d_benchmarks.linear_probe import LinearProbe, LinearProbeConfig
from ssl3d_benchmarks.linear_probe_features import digest_of
from ssl3d_benchmarks.linear_probe_table import Row, format_table
from ssl3d_benchmarks.shape_features import TRIVIAL, VERSION

if TYPE_CHECKING:
    from ssl3d.api import Encoder
    from ssl3d_benchmarks.linear_probe_command import Options

Array = NDArray[Any]

CSV_HELP = (
    "write a CSV with the columns path,subject,label (such as `scans/p01.nii.gz,p01,healthy`; a column "
    "`mask` for the dense probe, `split` if you have one) and give it as --data"
)


@dataclass(frozen=True)
class Fold:
    """Rows of the data in each part, as masks (N,)."""

    train: Array
    val: Array
    test: Array


@dataclass(frozen=True)
class Task:
    """What is probed: the data with its targets, its folds and their digest.

    Attributes:
        data: The volumes that have a target.
        config: The benchmark's options, with the target and the classes resolved.
        folds: One, unless cross-validated.
        digest: Of the folds.
        how: How the split was made.
        strata: Class of each volume for stratified subsets, None for values and masks.
    """

    data: Collection
    config: LinearProbeConfig
    folds: list[Fold]
    digest: str
    how: str
    strata: Array | None


def run(options: Options) -> list[Row]:
    """Scores every contestant, writes records, table and pictures, prints the table."""
    contestants(options)  # a wrong path is said before anything is read
    trained = [encoder_from(spec) for spec in options.encoder if not spec.startswith("scratch:")]
    task = make_task(open_data_for(trained, options.data), options)
    entries = contestants(replace(options, encoder=_fitting(options.encoder, task.data)))
    check_channels(entries, task)
    _say(_headline(task))
    if not isinstance(options.out, Path) or (options.out.exists() and not options.out.is_dir()):
        raise UsageError(f"--out {options.out}: not a folder")
    benchmark = LinearProbe(task.config)
    rows: list[Row] = []
    for entry in entries:
        rows += score_entry(entry, benchmark, task, options)
    text = format_table(rows, benchmark, task.how)
    print(text)
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    from ssl3d_benchmarks.linear_probe_pictures import draw

    for path in draw(rows, benchmark, task, entries, options):
        print(f"picture: {path}")
    print(f"records: {options.out}")
    return rows


# The task -----------------------------------------------------------------------------------------


def make_task(data: Collection, options: Options) -> Task:
    """Finds the target, leaves out what has none, splits.

    Raises:
        DataError: There is nothing to predict, one class only, or too few subjects.
    """
    if not len(data):
        raise DataError(f"{' '.join(options.data)}: holds no volumes")
    target = find_target(data, options)
    if target == "masks" and options.pool != "mean":
        raise UsageError(
            f"--pool {options.pool}: the dense probe of masks reads feature maps and pools nothing; it is "
            "for --target classes, ordinal or real"
        )
    labels = data.labels
    known = np.array([_known(label) for label in labels]) if target != "masks" else data.has_mask
    config = LinearProbeConfig(
        target=target,
        classes=_classes(data.select(known), target),
        pool_subject=options.pool_subject if target != "masks" else "none",
        window=options.window,
        precision=options.precision,
        mask_classes=mask_values(data.select(known))[1:]
        if target != "masks" and data.has_mask.all()
        else (),
        samples=options.samples,
    )
    if target in ("ordinal", "real"):
        _check_numbers(labels[known], target)
    # The split is that of the whole data, as pretraining makes it, so that test subjects are the same.
    parts = house_split(data)[known]
    if (~known).any():
        _say(f"{int((~known).sum())} of {len(data)} volumes have no {target} target and are left out")
    data = data.select(known)
    strata = np.array([str(label) for label in data.labels]) if target in ("classes", "ordinal") else None
    if options.pool_subject == "concat" and target != "masks":
        counts = np.unique(data.subject_codes, return_counts=True)[1]
        if counts.min() != counts.max():
            raise DataError(
                f"--pool-subject concat: subjects have {counts.min()} to {counts.max()} volumes; it needs "
                "the same number of each; use mean"
            )
    if options.folds:
        people = len(np.unique(data.subject_codes))
        if options.folds > people:
            raise UsageError(f"--folds {options.folds}: the data has {people} subjects")
        number = statistics.grouped_folds(data.subject_codes, strata, options.folds, options.seed)
        folds = [_fold(data, number == k, target, options.seed) for k in range(options.folds)]
        how = f"{options.folds}-fold cross-validation by subject"
        digest = split_digest(data, [str(k) for k in number])
    else:
        folds = [Fold(parts == "train", parts == "val", parts == "test")]
        how = "the data's own split" if any(data.splits) else "house split by subject"
        digest = split_digest(data, list(parts))
    for fold in folds:
        _check_fold(data, fold, options)
    return Task(data, config, folds, digest, how, strata)


def find_target(data: Collection, options: Options) -> str:
    """The kind of target: as said, or by what the labels are.

    Raises:
        DataError: The data has no labels and no masks (or not what was asked for).
    """
    labels = [label for label in data.labels if _known(label)]
    masks = bool(data.has_mask.any())
    where = " ".join(options.data)
    if options.target == "masks":
        if not masks:
            raise DataError(f"{where}: no volume has a mask, which --target masks needs; {CSV_HELP}")
        return "masks"
    if options.target != "auto":
        if not labels:
            raise DataError(
                f"{where}: no volume has a label, which --target {options.target} needs; {CSV_HELP}"
            )
        return options.target
    if not labels and not masks:
        raise DataError(f"{where}: the {len(data)} volumes have neither labels nor masks; {CSV_HELP}")
    if not labels:
        return "masks"
    if masks:
        _say("the data has masks too: --target masks probes them")
    real = any(isinstance(label, float) and not float(label).is_integer() for label in labels)
    return "real" if real else "classes"


def mask_values(data: Collection) -> tuple[int, ...]:
    """The values in the masks, sorted, 0 among them."""
    import torch

    found = {0}
    for volume in data:
        found |= set(torch.unique(volume.read_mask()).tolist())
    return tuple(sorted(found))


def _classes(data: Collection, target: str) -> tuple[str, ...]:
    if target == "masks":
        values = mask_values(data)
        if len(values) < 2:
            raise DataError("every mask is empty: the dense probe needs a class to find")
        return tuple(map(str, values))
    if target != "classes":
        return ()
    labels = set(data.labels)
    try:
        ordered = sorted(labels)
    except TypeError:  # numbers and names
        ordered = sorted(labels, key=str)
    names = tuple(dict.fromkeys(str(label) for label in ordered))
    if len(names) < 2:
        raise DataError(
            f"all {len(data)} labelled volumes are of class {names[0]!r}: a probe needs two classes"
        )
    if len(names) > max(20, len(data) // 4):
        raise DataError(
            f"{len(names)} classes in {len(data)} volumes: not classes; use --target real or ordinal"
        )
    return names


def _check_numbers(labels: Array, target: str) -> None:
    for label in labels:
        try:
            float(label)
        except (TypeError, ValueError) as error:
            raise DataError(f"--target {target}: label {label!r} is not a number") from error


def _known(label: Any) -> bool:
    return label is not None and label != "" and not (isinstance(label, float) and np.isnan(label))


def _fold(data: Collection, test: Array, target: str, seed: int) -> Fold:
    """One fold; the dense probe chooses its L2 on a sixth of the training subjects."""
    rest = np.flatnonzero(~test)
    val = np.zeros(len(data), dtype=bool)
    people = data.subject_codes[rest]
    if target == "masks" and len(np.unique(people)) >= 6:
        val[rest[statistics.grouped_folds(people, None, 6, ("val", seed)) == 0]] = True
    return Fold(~test & ~val, val, test)


def _check_fold(data: Collection, fold: Fold, options: Options) -> None:
    people = data.subject_codes
    train, test = len(np.unique(people[fold.train])), len(np.unique(people[fold.test]))
    if train < 2 or test < 2:
        raise DataError(
            f"{' '.join(options.data)}: {train} subjects to train on and {test} to test on; a probe "
            "needs two of each: give more data, or use --folds"
        )


def _headline(task: Task) -> str:
    people = task.data.subject_codes
    if len(task.folds) > 1:
        counts = f"{len(np.unique(people))} subjects"
    else:
        fold = task.folds[0]
        sizes = [len(np.unique(people[part])) for part in (fold.train, fold.val, fold.test)]
        counts = f"{sizes[0]} / {sizes[1]} / {sizes[2]} subjects to train, choose, test"
    names = ", ".join(sorted(set(task.data.datasets)))
    what = task.config.target
    if what in ("classes", "masks"):
        what += f" ({', '.join(task.config.classes)})"
    return f"{names}: {what}; {len(task.data)} volumes, {counts}, {task.how}"


# Contestants --------------------------------------------------------------------------------------


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


def contestants(options: Options) -> list[Entry]:
    """The encoders, the untrained ones of every architecture among them, the trivial rows.

    Raises:
        CheckpointError: An encoder cannot be loaded.
        UsageError: A name is given twice.
    """
    given: list[Entry] = []
    untrained: dict[str, list[Entry]] = {}
    for spec in options.encoder:
        encoder = pooled_by(options.pool, encoder_from(spec, seed=0), spec)
        words = _architecture(encoder)
        group = words + _pooled(options.pool)
        channels = encoder.config.in_channels
        if not spec.startswith("scratch:"):
            name = str(Path(spec)) + _pooled(options.pool)
            if name in [entry.name for entry in given]:
                raise UsageError(f"{spec}: given twice")
            make = _maker(spec, 0, options.pool)
            given += _with_norm(
                Entry(name, "encoder", group, make, spec, in_channels=channels), encoder, options
            )
        if group not in untrained:
            seeds = range(max(options.untrained, 1) if spec.startswith("scratch:") else options.untrained)
            untrained[group] = [
                row
                for seed in seeds
                for row in _with_norm(
                    Entry(
                        f"{group}, seed {seed}", "untrained", group, _untrained(words, seed, encoder),
                        words, in_channels=channels,
                    ),
                    encoder,
                    options,
                )
            ]  # fmt: skip
    trivial = [Entry(name, "trivial", "", None, "trivial") for name in TRIVIAL]
    return given + [entry for rows in untrained.values() for entry in rows] + trivial


def check_channels(entries: list[Entry], task: Task) -> None:
    """Raises a DataError where an encoder takes other channels than the data has."""
    found = sorted({int(n) for n in task.data.shapes[:, 0]})
    for entry in entries:
        if entry.in_channels and found != [entry.in_channels]:
            raise DataError(
                f"{entry.name}: takes {entry.in_channels} channels, the data has "
                f"{' and '.join(map(str, found))}"
            )


def _fitting(specs: tuple[str, ...], data: Collection) -> tuple[str, ...]:
    """Encoders that saw no volumes take the data's channels unless told otherwise."""
    channels = {int(n) for n in data.shapes[:, 0]}
    if channels == {1} or len(channels) > 1:
        return specs
    count = channels.pop()
    return tuple(fitting(spec, count) for spec in specs)


def _maker(spec: str, seed: int, pool: str) -> Callable[[], Encoder]:
    return lambda: pooled_by(pool, encoder_from(spec, seed=seed), spec)


def _untrained(group: str, seed: int, like: Encoder) -> Callable[[], Encoder]:
    """Makes an untrained encoder, with an untrained aggregator where `like` has one."""

    def make() -> Encoder:
        encoder = encoder_from(group, seed=seed)
        if not isinstance(like, AggregatedEncoder):
            return encoder
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AggregatedEncoder(encoder, SliceAggregator(like.aggregator.config)).eval()

    return make


def _pooled(pool: str) -> str:
    return "" if pool == "mean" else f", {pool}"


def _with_norm(entry: Entry, encoder: Encoder, options: Options) -> list[Entry]:
    """The entry as it is, with norm statistics taken anew, or both."""
    from torch.nn.modules.batchnorm import _BatchNorm

    normed = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in encoder.modules())
    again = replace(entry, name=f"{entry.name}, norm recalibrated", recalibrate=True)
    if not normed or options.recalibrate == "no":
        return [entry]
    return [again] if options.recalibrate == "yes" else [entry, again]


def _architecture(encoder: Encoder) -> str:
    """`scratch:NAME:field=value...` with the fields that are not at their default."""
    import dataclasses

    words = ["scratch:" + str(encoder.metadata["architecture"])]
    for one in dataclasses.fields(encoder.config):
        value = getattr(encoder.config, one.name)
        default = one.default
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        if value != default:
            words.append(f"{one.name}={_word(value)}")
    return ":".join(words)


def _word(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return "[" + ",".join(f"[{_word(item)}]" for item in value) + "]"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def build(entry: Entry, task: Task, fold: Fold, options: Options) -> Contestant:
    """The contestant itself, its norm statistics taken from this fold's training volumes if asked for."""
    if entry.make is None:
        measured = task.config.mask_classes if entry.name != "pooled voxels" else ()
        return Contestant(
            entry.name,
            "trivial",
            f"{entry.name} v{VERSION}",
            source=entry.source,
            details={"features": entry.name, "mask_classes": list(measured)},
        )
    encoder = entry.make()
    card: dict[str, Any] = encoder.metadata
    details: dict[str, Any] = {"norm_recalibrated": entry.recalibrate}
    if options.pool != "mean":
        details["pool"] = options.pool
    if entry.kind == "untrained":
        details["weights_seed"] = card["seed"]
    encoder.to(_device(options)).eval()
    if entry.recalibrate:
        recalibrate(encoder, task.data.select(fold.train), options)
    kept = ("proxies", "steps", "compute", "flops", "seconds", "patch", "data", "sha256")
    return Contestant(
        entry.name,
        entry.kind,
        digest_of(encoder),
        encoder,
        group=entry.group,
        source=entry.source,
        architecture={"name": card["architecture"], "config": card["config"]},
        pretraining={key: card[key] for key in kept if key in card} if entry.kind == "encoder" else {},
        identities=frozenset(card.get("identities") or ()),
        saw_labels=bool(card.get("labels_seen", False)),
        details=details,
    )


def _device(options: Options) -> str:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; use cpu")
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


# Scoring ------------------------------------------------------------------------------------------


def score_entry(entry: Entry, benchmark: LinearProbe, task: Task, options: Options) -> list[Row]:
    """Records of one contestant on every fraction and repeat, read where they are there already."""
    if benchmark.target == "masks" and entry.make is None:
        if entry.name != TRIVIAL[0]:
            return []
        entry = replace(entry, name="intensities and position")
    jobs = list(_jobs(task, options))
    built = [build(entry, task, fold, options) for fold in task.folds[:1]]
    # Every fold has its own norm statistics; the record's digest covers them all.
    several = entry.recalibrate and len(task.folds) > 1
    if several:
        built += [build(entry, task, fold, options) for fold in task.folds[1:]]
    contestant = built[0]
    if several:
        joined = hashlib.sha256("".join(one.digest for one in built).encode()).hexdigest()[:16]
        contestant = replace(built[0], digest=joined)
    results = [_record(contestant, benchmark, task, job, options) for job in jobs]
    found = [None if options.overwrite else find_result(result, options.out) for result in results]
    if all(found):
        _say(f"{entry.name}: {len(found)} record{'s' * (len(found) > 1)} found in {options.out}")
        return [Row(entry.kind, entry.group, result) for result in found if result]
    began = time.perf_counter()
    parts: list[list[Scores]] = [[] for _ in jobs]
    for number, fold in enumerate(task.folds):
        own = built[number if several else 0]
        benchmark.report = _progress(entry.name)
        if number == 0 or several:
            benchmark.prepare(own, task.data)
        for job, (_, _, subsets) in enumerate(jobs):
            if found[job]:
                continue
            train, val = subsets[number]
            fit, choose, test = (task.data.select(np.flatnonzero(rows)) for rows in (train, val, fold.test))
            parts[job].append(benchmark.score(own, fit, choose, test, options.seed))
    for job, result in enumerate(results):
        if found[job]:
            continue
        merged = benchmark.summarise([row for part in parts[job] for row in part.predictions])
        result.scores, result.intervals = merged.scores, merged.intervals
        result.predictions = merged.predictions
        details = [part.details for part in parts[job]]
        result.compute["details"] = details[0] if len(details) == 1 else details
        result.compute["probe_seconds"] = round(sum(part.seconds for part in parts[job]), 3)
        write_result(result, options.out)
        found[job] = result
    _say(f"{entry.name}: {benchmark.main} {results[0].scores[benchmark.main]:.3f}"
         f" ({time.perf_counter() - began:.0f} s)")  # fmt: skip
    return [Row(entry.kind, entry.group, result) for result in found if result]


def _jobs(task: Task, options: Options) -> Iterator[tuple[float, int, list[tuple[Array, Array]]]]:
    """(fraction, repeat, rows of train and val per fold); largest fraction first."""
    usual = 5 if task.config.target == "masks" else 20
    for fraction in sorted(set(options.fractions), reverse=True):
        for repeat in range(1 if fraction == 1 else options.repeats or usual):
            subsets = []
            for number, fold in enumerate(task.folds):
                train = _subset(task, fold.train, options, (options.seed, repeat, number), fraction, 2)
                val = _subset(task, fold.val, options, (options.seed, repeat, number, "val"), fraction, 1)
                subsets.append((train, val))
            yield fraction, repeat, subsets


def _subset(task: Task, rows: Array, options: Options, seed: object, fraction: float, least: int) -> Array:
    if fraction == 1 or not rows.any():
        return rows
    inside = np.flatnonzero(rows)
    strata = None if task.strata is None else task.strata[inside]
    chosen = statistics.nested_subsets(
        task.data.subject_codes[inside], strata, options.fractions, seed, least
    )[fraction]
    kept = np.zeros(len(rows), dtype=bool)
    kept[inside[chosen]] = True
    return kept


def _record(
    contestant: Contestant,
    benchmark: LinearProbe,
    task: Task,
    job: tuple[float, int, list[tuple[Array, Array]]],
    options: Options,
) -> Result:
    import dataclasses

    fraction, repeat, subsets = job

    people = task.data.subject_codes
    test = np.any([fold.test for fold in task.folds], axis=0)
    first = task.folds[0]
    counts: dict[str, Any] = {"how": task.how, "folds": len(task.folds)}
    train, val = subsets[0]
    for name, rows in (("train", train), ("val", val), ("test", test)):
        counts[name] = {"subjects": len(np.unique(people[rows])), "volumes": int(rows.sum())}
    counts["train"]["of_subjects"] = len(np.unique(people[first.train]))
    tested = task.data.select(np.flatnonzero(test))
    seen = sum(identity_hash(*person) in contestant.identities for person in set(_people(tested)))
    settings = dataclasses.asdict(task.config)
    return Result(
        task=benchmark.task,
        version=benchmark.version,
        dataset=sorted(set(task.data.datasets)),
        data_digest=task.data.digest(),
        split=counts,
        split_digest=task.digest,
        fraction=float(fraction),
        repeat=repeat,
        seed=options.seed,
        contestant=contestant.described(),
        settings={**settings, "fractions": _fractions(fraction)},
        main=benchmark.main,
        compute={"pretraining": contestant.pretraining},
        flags={
            "seen_test_subjects": seen,
            "saw_labels": contestant.saw_labels,
            "ranked": seen == 0,
        },
    )


def _fractions(fraction: float) -> str:
    return "all" if fraction == 1 else f"{fraction:g} of the training subjects, nested"


def _people(data: Collection) -> list[tuple[str, str]]:
    return [(str(d), str(s)) for d, s in zip(data.datasets, data.subjects, strict=True)]


def recalibrate(encoder: Encoder, train: Collection, options: Options) -> None:
    """Takes the norm statistics anew from training volumes, without labels, on the probe's own input."""
    from ssl3d.api import recalibrate_norm

    batches = _batches(train, options)
    if isinstance(encoder, AggregatedEncoder):
        # Sees slices, and so do its norms.
        recalibrate_norm(encoder.encoder, map(encoder.slabs, batches))
    else:
        recalibrate_norm(encoder, batches)


RECALIBRATION_VOLUMES = 256


def _batches(train: Collection, options: Options) -> Iterator[Any]:
    """Batches of equal training volumes (or their central windows); at most 256 volumes, spread evenly."""
    import torch

    from ssl3d_benchmarks.linear_probe_features import BATCH_VOXELS

    step = max(1, len(train) // RECALIBRATION_VOLUMES)
    chosen = train.select(np.arange(0, len(train), step)[:RECALIBRATION_VOLUMES])
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for position, shape in enumerate(chosen.shapes):
        by_shape.setdefault(tuple(int(n) for n in shape), []).append(position)
    device = _device(options)
    for shape, positions in sorted(by_shape.items()):
        size = [min(n, w) for n, w in zip(shape[1:], options.window, strict=True)]
        start = [(n - s) // 2 for n, s in zip(shape[1:], size, strict=True)]
        number = max(1, BATCH_VOXELS // int(np.prod(size)))
        for first in range(0, len(positions), number):
            volumes = [chosen[position].read(start, size) for position in positions[first : first + number]]
            yield torch.stack(volumes).to(device)


def _progress(name: str) -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def report(done: int, total: int) -> None:
        print(f"\r{name[:60]}: {done}/{total} volumes", end="\n" if done == total else "", file=sys.stderr)

    return report


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
