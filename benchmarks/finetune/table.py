"""The table of fine-tuning: scores with intervals, differences from scratch; and the curves over steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssl3d.api import statistics, write_result
from ssl3d_benchmarks.table import Line, Row, aligned, detectable, difference_of, make_line, number, signed
from ssl3d_benchmarks.task import leak_help
from ssl3d_benchmarks.unlearned import floor_words, unlearned

if TYPE_CHECKING:
    from ssl3d.api import Result
    from ssl3d_benchmarks.finetune.benchmark import Finetune


BESIDE = 4
"""Scores that stand beside the main one; the others have a table of their own."""


@dataclass(frozen=True)
class Block:
    """The rows of a table that stand together: of one fraction and one number of annotated slices.

    Attributes:
        rows: The records.
        lines: The contestants.
        warnings: A sentence for every network that is not shown to have learned its task.
        unchecked: Why nothing can be said of that; empty where it can.
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
    floor = benchmark.work.floors.get(benchmark.target)
    if floor is None or all(line.first.kind == "trivial" for line in lines):
        return Block(rows, lines, [])
    if isinstance(floor, str) and all(line.name != floor for line in lines):
        unchecked = f"whether the networks learned their task is not checked: there is no row {floor!r}"
        return Block(rows, lines, [], unchecked)
    return Block(rows, lines, _warnings(lines, floor, benchmark.main))


def _warnings(lines: Sequence[Line], floor: str | float, main: str) -> list[str]:
    """Return a sentence for every network that is not clearly above the floor, which is among the lines."""
    runs = floor if isinstance(floor, float) else next(one.runs for one in lines if one.name == floor)
    networks = [line for line in lines if line.first.kind != "trivial"]
    told = [unlearned(line.name, line.runs, runs, floor_words(floor), main) for line in networks]
    return [words for words in told if words]


def note_warnings(rows: Sequence[Row], benchmark: Finetune, folder: Path) -> None:
    """Write into every record whether its network learned its task (`flags["warnings"]`).

    From the record alone, and the row without a network on its subset: other seeds and subsets change
    nothing, and where that row is missing the record stays as it is.
    """
    floor = benchmark.work.floors.get(benchmark.target)
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
            found = [make_line([row], benchmark), *([beside] if beside else [])]
            words, flags = _warnings(found, floor, benchmark.main), row.result.flags
            if flags.get("warnings", []) != words:
                flags["warnings"] = words
                write_result(row.result, folder)


def format_table(blocks: Sequence[Block], benchmark: Finetune, how: str) -> str:
    """The table as text, one block per fraction and number of annotated slices, with its notes."""
    return "\n\n".join(_block(block, benchmark, how) for block in blocks)


def annotated_slices(result: Result) -> int:
    """Annotated slices per volume that were trained on; 0 for all."""
    return int(result.settings["task"].get("sparse_slices") or 0)


def _blocks(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that stand together: most data first, all slices first."""

    def key(row: Row) -> tuple[float, float]:
        return -row.result.fraction, -(annotated_slices(row.result) or float("inf"))

    return [[row for row in rows if key(row) == one] for one in sorted({key(row) for row in rows})]


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
    found: list[statistics.Difference] = []
    for line in lines:
        difference, p = "", ""
        beside = scratch.get(line.first.group)
        if line.first.kind == "encoder" and beside is not None:
            gain = difference_of(line, beside)
            found.append(gain)
            difference = f"{signed(gain.value)} [{signed(gain.low)}, {signed(gain.high)}]"
            p = number(gain.p) if gain.p >= 0.001 else "<.001"
        own = statistics.nested_interval(line.runs)
        score = f"{number(own.value)} [{number(own.low)}, {number(own.high)}]"
        means = [_mean(line, name) for name in others]
        table.append([line.name, score, *means, difference, p, *_chosen(line), _notes(line)])
    if not found:
        networks = [line for line in lines if line.first.kind != "trivial"]
        pairs = [(a, b) for k, a in enumerate(networks) for b in networks[k + 1 :]]
        found = [difference_of(a, b) for a, b in pairs]
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
    text += detectable(found, benchmark.main)
    one = "" if seeds > 1 else "; one seed: how much seeds differ is not in them"
    text.append(
        f"intervals: 95 %, over test subjects, {seeds} seed{'s' * (seeds > 1)}, {subsets} "
        f"subset{'s' * (subsets > 1)} of the training data{one}; differences are paired, p is not corrected"
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
    """Learning rates and best steps over the records."""
    details: list[dict[str, Any]] = []
    for row in line.rows:
        found = row.result.compute.get("details") or []
        details += found if isinstance(found, list) else [found]
    if not details:
        return ["", ""]
    rates = sorted({float(one["lr"]) for one in details})
    steps = [one["best_step"] for one in details if one["best_step"] is not None]
    total = max(int(one["steps"]) for one in details)
    best = f"{np.median(steps):.0f}/{total}" if steps else f"-/{total}"
    return [" ".join(f"{rate:g}" for rate in rates), best]


def _notes(line: Line) -> str:
    flags = line.first.result.flags
    notes = ["from scratch"] if line.first.kind == "untrained" else []
    if line.first.kind == "trivial":
        notes.append("no network")
    if flags.get("seen_test_subjects"):
        notes.append(f"saw {flags['seen_test_subjects']} test subjects: not ranked")
    if flags.get("saw_labels"):
        notes.append("pretrained with labels")
    return "; ".join(notes)


# Curves -------------------------------------------------------------------------------------------


def curve_of(result: Result) -> list[tuple[int, float]]:
    """(step, validation score) of a record, mean over its folds where they were scored alike."""
    found = result.compute.get("details") or []
    folds = found if isinstance(found, list) else [found]
    points: dict[int, list[float]] = {}
    for fold in folds:
        for point in fold.get("curve", ()):
            if point["score"] is not None:
                points.setdefault(int(point["step"]), []).append(float(point["score"]))
    return [(step, float(np.mean(v))) for step, v in sorted(points.items()) if len(v) == len(folds)]


def draw_curves(rows: Sequence[Row], benchmark: Finetune, folder: Path) -> list[Path]:
    """Score on the validation subjects against steps, one picture per fraction and number of slices."""
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
    """Mean over seeds and subsets as a line, each of them as a thin one; the best steps' mean as a dot."""
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
    """Score against annotated slices per volume, a picture per fraction; none for one number of slices."""
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
    """Test score with its interval against annotated slices, all of them at the right end."""
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
                found = statistics.nested_interval(make_line(group, benchmark).runs)
                places.append(place + 0.04 * (k - (len(names) - 1) / 2))
                values.append(found.value)
                spread.append((found.value - found.low, found.high - found.value))
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
