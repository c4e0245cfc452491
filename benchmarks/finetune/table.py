"""The table of fine-tuning: scores with intervals, differences from scratch; and the curves over steps."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssl3d.api import Ssl3dError, count_of, statistics, write_result
from ssl3d_benchmarks.table import (
    Line,
    Row,
    aligned,
    detectable,
    difference_of,
    make_line,
    number,
    signed,
    why_no_interval,
    with_interval,
)
from ssl3d_benchmarks.task import leak_help
from ssl3d_benchmarks.trivial_rows import TRUE_MASKS, reads_true_masks
from ssl3d_benchmarks.unlearned import floor_words, unlearned

if TYPE_CHECKING:
    from ssl3d.api import Result
    from ssl3d_benchmarks.finetune.benchmark import Finetune


BESIDE = 4
"""Scores that stand beside the main one; the others have a table of their own."""


@dataclass(frozen=True)
class Block:
    """Part of a table: the rows of one fraction and one number of annotated slices.

    Attributes:
        rows: Records of the block.
        lines: Contestants of the block.
        warnings: Sentences about the networks that are not shown to have learned their task.
        unchecked: Reason why this was not checked; empty where it was.
    """

    rows: list[Row]
    lines: list[Line]
    warnings: list[str]
    unchecked: str = ""


def blocks_of(rows: Sequence[Row], benchmark: Finetune) -> list[Block]:
    """Return the blocks of a table, each contestant's score resampled once."""
    return [_block_of(same, benchmark) for same in _blocks(rows)]


def _block_of(rows: list[Row], benchmark: Finetune) -> Block:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(str(row.result.contestant["name"]), []).append(row)
    lines = [make_line(group, benchmark) for group in by_name.values()]
    floor = benchmark.downstream.floors.get(benchmark.target)
    if floor is None or all(line.first.kind == "trivial" for line in lines):
        return Block(rows, lines, [])
    if isinstance(floor, str) and all(line.name != floor for line in lines):
        unchecked = f"whether the networks learned their task is not checked: there is no row {floor!r}"
        return Block(rows, lines, [], unchecked)
    return Block(rows, lines, _warnings(lines, floor, benchmark.main))


def _warnings(lines: Sequence[Line], floor: str | float, main: str) -> list[str]:
    """Return a sentence for every network that is not clearly above the floor, which is among the lines."""
    runs = floor if isinstance(floor, float) else next(line.runs for line in lines if line.name == floor)
    networks = [line for line in lines if line.first.kind != "trivial"]
    sentences = [unlearned(line.name, line.runs, runs, floor_words(floor), main) for line in networks]
    return [words for words in sentences if words]


def note_warnings(rows: Sequence[Row], benchmark: Finetune, folder: Path) -> None:
    """Write into every record whether its network learned its task (`flags["warnings"]`).

    The answer depends on the record alone, and on the row without a network on its subset: other seeds and
    subsets change nothing, and where that row is missing the record stays as it is. So does one that lies
    in an archive alone.
    """
    floor = benchmark.downstream.floors.get(benchmark.target)
    if floor is None:
        return
    for same in _blocks(rows):
        lines = {
            row.result.repeat: make_line([row], benchmark)
            for row in same
            if row.result.contestant["name"] == floor
        }
        for row in same:
            beside = lines.get(row.result.repeat)
            if row.kind == "trivial" or (isinstance(floor, str) and beside is None):
                continue
            pair = [make_line([row], benchmark), *([beside] if beside else [])]
            words, flags = _warnings(pair, floor, benchmark.main), row.result.flags
            if flags.get("warnings", []) != words and (folder / row.result.filename).is_file():
                flags["warnings"] = words
                with contextlib.suppress(
                    OSError, Ssl3dError
                ):  # a folder to read alone: it is printed anyway
                    write_result(row.result, folder)


def format_table(blocks: Sequence[Block], benchmark: Finetune, how: str) -> str:
    """Format the table as text, one block per fraction and number of annotated slices, with notes."""
    return "\n\n".join(_block(block, benchmark, how) for block in blocks)


def annotated_slices(result: Result) -> int:
    """Return the number of annotated slices per volume that were trained on; 0 for all."""
    return int(result.settings["task"].get("sparse_slices") or 0)


def _blocks(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows that stand together, those with most data and most slices first."""

    def key(row: Row) -> tuple[float, float]:
        return -row.result.fraction, -(annotated_slices(row.result) or float("inf"))

    return [[row for row in rows if key(row) == place] for place in sorted({key(row) for row in rows})]


def _block(block: Block, benchmark: Finetune, how: str) -> str:
    rows, lines = block.rows, block.lines
    scratch = {line.first.group: line for line in lines if line.first.kind == "untrained"}
    result = rows[0].result
    others, further = _other_scores(rows, benchmark.main)
    table = [
        [
            "contestant",
            f"{benchmark.main} [95 %]",
            *others,
            "over scratch [95 %]",
            "p",
            "lr",
            "best step",
            "",
        ]
    ]
    differences: list[statistics.Difference] = []
    for line in lines:
        difference, p = "", ""
        beside = scratch.get(line.first.group)
        if line.first.kind == "encoder" and beside is not None:
            gain = difference_of(line, beside)
            differences.append(gain)
            difference = with_interval(gain, signed)
            p = "<.001" if gain.p < 0.001 else number(gain.p)
        score = with_interval(statistics.nested_interval(line.runs), number)
        means = [_mean(line, name) for name in others]
        table.append([line.name, score, *means, difference, p, *_chosen(line), _notes(line)])
    if not differences:
        networks = [line for line in lines if line.first.kind != "trivial"]
        pairs = [(a, b) for k, a in enumerate(networks) for b in networks[k + 1 :]]
        differences = [difference_of(a, b) for a, b in pairs]
    train, tested, val = (result.split[part] for part in ("train", "test", "val"))
    most = max(lines, key=lambda line: len(line.rows))
    seeds = len({row.result.seed for row in most.rows})
    subsets = len({row.result.repeat for row in most.rows})
    head = (
        f"{result.task} v{result.version} on {', '.join(result.dataset)}: {train['subjects']} of "
        f"{train['of_subjects']} training subjects{_sparse(result)}, {val['subjects']} to choose on; test "
        f"{tested['subjects']} subjects, {tested['volumes']} volumes; {how}"
    )
    text = [head, *aligned(table)]
    if further:  # in a table of their own: a terminal is not that wide
        text += ["", *aligned([["contestant", *further]] + [
            [line.name, *(_mean(line, name) for name in further)] for line in lines
        ]), ""]  # fmt: skip
    text += [*detectable(differences, benchmark.main), *why_no_interval(lines)]
    lone = "" if seeds > 1 else "; one seed: the spread between seeds is not in them"
    text.append(
        f"intervals: 95 %, over test subjects, {seeds} seed{'s' * (seeds > 1)}, {subsets} subset"
        f"{'s' * (subsets > 1)} of the training data{lone}; differences are paired, p is not corrected"
    )
    if any(row.result.flags.get("seen_test_subjects") for row in rows):
        text.append(f"not ranked: pretraining saw subjects of the test part; {leak_help(result)}")
    text += [f"WARNING: {words}" for words in block.warnings]
    if block.unchecked:
        text.append(block.unchecked)
    return "\n".join(text)


def _other_scores(rows: Sequence[Row], main: str) -> tuple[list[str], list[str]]:
    """List the scores beside the main one: those that stand beside it, and those of the second table."""
    names = list(dict.fromkeys(name for row in rows for name in row.result.scores if name != main))
    return names[:BESIDE], names[BESIDE:]


def _mean(line: Line, name: str) -> str:
    """Return the mean of a score over seeds and subsets; a dash where a record does not have it."""
    has = all(name in row.result.scores for row in line.rows)
    return number(line.mean(name)) if has else "-"


def _sparse(result: Result) -> str:
    count = annotated_slices(result)
    return f" ({count} annotated slice{'s' * (count > 1)} of each volume)" if count else ""


def _chosen(line: Line) -> list[str]:
    """Return the cells with learning rates and best steps over the records."""
    details: list[dict[str, Any]] = []
    for row in line.rows:
        folds = row.result.compute.get("details") or []
        details += folds if isinstance(folds, list) else [folds]
    if not details:
        return ["", ""]
    rates = sorted({float(fold["lr"]) for fold in details})
    steps = [fold["best_step"] for fold in details if fold["best_step"] is not None]
    total = max(int(fold["steps"]) for fold in details)
    best = f"{np.median(steps):.0f}/{total}" if steps else f"-/{total}"
    return [" ".join(f"{rate:g}" for rate in rates), best]


def _notes(line: Line) -> str:
    flags = line.first.result.flags
    notes = ["from scratch"] if line.first.kind == "untrained" else []
    if line.first.kind == "trivial":
        notes.append("no network")
        notes += [TRUE_MASKS] * reads_true_masks(line.first.result.contestant)
    if flags.get("seen_test_subjects"):
        notes.append(f"saw {count_of(flags['seen_test_subjects'], 'test subject')}: not ranked")
    if flags.get("saw_labels"):
        notes.append("pretrained with labels")
    return "; ".join(notes)


# Curves -------------------------------------------------------------------------------------------


def curve_of(result: Result) -> list[tuple[int, float]]:
    """Return (step, validation score) of a record, averaged over folds at the steps that all have."""
    details = result.compute.get("details") or []
    folds = details if isinstance(details, list) else [details]
    points: dict[int, list[float]] = {}
    for fold in folds:
        for point in fold.get("curve", ()):
            if point["score"] is not None:
                points.setdefault(int(point["step"]), []).append(float(point["score"]))
    return [(step, float(np.mean(v))) for step, v in sorted(points.items()) if len(v) == len(folds)]


def draw_curves(rows: Sequence[Row], benchmark: Finetune, folder: Path) -> list[Path]:
    """Draw validation scores against steps, one picture per fraction and number of slices."""
    paths = []
    for same in _blocks(rows):
        chosen = [row for row in same if curve_of(row.result)]
        if not chosen:
            continue
        fraction = chosen[0].result.fraction
        keys = "".join(sorted(row.result.key for row in chosen))
        name = hashlib.sha256(keys.encode()).hexdigest()[:8]
        path = folder / f"curves-f{fraction:g}-{name}.png"
        if not path.exists():
            curve_figure(chosen, benchmark.main).savefig(path, dpi=110)
        paths.append(path)
    return paths


def curve_figure(rows: Sequence[Row], main: str) -> Any:
    """Draw the mean curve of every contestant as a line, and each seed and subset as a thin one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot = figure.add_subplot()
    names = list(dict.fromkeys(str(row.result.contestant["name"]) for row in rows))
    for k, name in enumerate(names):
        curves = [dict(curve_of(row.result)) for row in rows if row.result.contestant["name"] == name]
        colour = f"C{k % 10}"
        for curve in curves if len(curves) > 1 else ():
            plot.plot(list(curve), list(curve.values()), color=colour, alpha=0.25, linewidth=0.8)
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        mean = [float(np.mean([curve[step] for curve in curves])) for step in shared]
        plot.plot(shared, mean, color=colour, marker=".", label=name[-60:])
    plot.set_xlabel("optimizer steps")
    plot.set_ylabel(f"{main} on the validation subjects")
    first = rows[0].result
    plot.set_title(
        f"{first.task}, {first.split['train']['subjects']} subjects{_sparse(first)}", fontsize=10
    )
    plot.legend(fontsize=7)
    return figure


def draw_slices(rows: Sequence[Row], benchmark: Finetune, folder: Path) -> list[Path]:
    """Draw scores against annotated slices per volume, one picture per fraction with several numbers."""
    paths = []
    for fraction in sorted({row.result.fraction for row in rows}, reverse=True):
        chosen = [row for row in rows if row.result.fraction == fraction]
        if len({annotated_slices(row.result) for row in chosen}) < 2:
            continue
        keys = "".join(sorted(row.result.key for row in chosen))
        path = folder / f"slices-f{fraction:g}-{hashlib.sha256(keys.encode()).hexdigest()[:8]}.png"
        if not path.exists():
            slices_figure(chosen, benchmark).savefig(path, dpi=110)
        paths.append(path)
    return paths


def slices_figure(rows: Sequence[Row], benchmark: Finetune) -> Any:
    """Draw test scores with intervals against annotated slices, all slices at the right end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot = figure.add_subplot()
    counts = sorted({annotated_slices(row.result) for row in rows}, key=lambda n: n or float("inf"))
    names = list(dict.fromkeys(str(row.result.contestant["name"]) for row in rows))
    for k, name in enumerate(names):
        places, values, spread = [], [], []
        for place, count in enumerate(counts):
            group = [
                row
                for row in rows
                if row.result.contestant["name"] == name and annotated_slices(row.result) == count
            ]
            if group:
                score = statistics.nested_interval(make_line(group, benchmark).runs)
                places.append(place + 0.04 * (k - (len(names) - 1) / 2))
                values.append(score.value)
                spread.append((score.value - score.low, score.high - score.value))
        plot.errorbar(
            places, values, np.array(spread).T, marker="o", capsize=3, linewidth=1.2, label=name[-60:]
        )
    plot.set_xticks(range(len(counts)), [str(count or "all") for count in counts])
    plot.set_xlabel("annotated slices per volume")
    plot.set_ylabel(f"{benchmark.main} on the test subjects, 95 % intervals")
    first = rows[0].result
    plot.set_title(f"{first.task}, {first.split['train']['subjects']} training subjects", fontsize=10)
    plot.legend(fontsize=7)
    return figure
