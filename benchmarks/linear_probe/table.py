"""The table of a linear probe: scores with intervals, the difference from untrained, what is detectable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ssl3d.api import statistics
from ssl3d_benchmarks.table import Line, Row, aligned, detectable, difference_of, make_line, number, signed
from ssl3d_benchmarks.task import leak_help

if TYPE_CHECKING:
    from ssl3d.api import Benchmark


def format_table(rows: Sequence[Row], benchmark: Benchmark, how: str) -> str:
    """Format the table as text, one block per fraction, with its notes."""
    fractions = sorted({row.result.fraction for row in rows}, reverse=True)
    blocks = [_block([row for row in rows if row.result.fraction == f], benchmark, how) for f in fractions]
    return "\n\n".join(blocks)


def _block(rows: list[Row], benchmark: Benchmark, how: str) -> str:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(str(row.result.contestant["name"]), []).append(row)
    lines = [make_line(group, benchmark) for group in by_name.values()]
    result = rows[0].result
    others = [name for name in result.scores if name != benchmark.main]
    untrained: dict[tuple[str, bool], list[Line]] = {}
    for line in lines:
        if line.first.kind == "untrained":
            untrained.setdefault((line.first.group, line.first.recalibrated), []).append(line)
    reference = {
        about: make_line([row for line in seeds for row in line.rows], benchmark)
        for about, seeds in untrained.items()
    }
    table = [["contestant", f"{benchmark.main} [95 %]", *others, "over untrained [95 %]", ""]]
    differences: list[statistics.Difference] = []
    for line in lines:
        if line.first.kind == "untrained":
            continue
        beside = reference.get((line.first.group, line.first.recalibrated))
        difference = ""
        if beside is not None and line.first.kind == "encoder":
            gain = difference_of(line, beside)
            differences.append(gain)
            difference = f"{signed(gain.value)} [{signed(gain.low)}, {signed(gain.high)}]"
        table.append([line.name, _main(line), *_others(line, others), difference, _notes(line)])
    at = 1 + sum(line.first.kind == "encoder" for line in lines)
    inserted = []
    for (group, again), seeds in untrained.items():
        values = [line.runs.value for line in seeds]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        means = [number(np.mean([line.mean(name) for line in seeds])) for name in others]
        title = group + (", norm recalibrated" if again else "")
        counted = f"{len(seeds)} untrained seeds, mean{' ± sd' if spread else ''}"
        inserted.append([title, f"{number(np.mean(values))}{spread}", *means, "", counted])
        for line in seeds:
            seed = line.first.result.contestant["weights_seed"]
            inserted.append([f"  seed {seed}", _main(line), *_others(line, others), "", _notes(line)])
    table[at:at] = inserted
    if not differences:  # no encoder over untrained ones: any two rows
        pairs = [(a, b) for k, a in enumerate(lines) for b in lines[k + 1 :]]
        differences = [difference_of(a, b) for a, b in pairs]
    tested = result.split["test"]
    train = result.split["train"]
    repeats = max(len(line.rows) for line in lines)
    subset = "" if result.fraction == 1 else f" ({result.fraction:g}), mean of {repeats} nested subsets"
    head = (
        f"{result.task} v{result.version} on {', '.join(result.dataset)}: {train['subjects']} of "
        f"{train['of_subjects']} training subjects{subset}; test {tested['subjects']} subjects, "
        f"{tested['volumes']} volumes; {how}"
    )
    text = [head, *aligned(table), *detectable(differences, benchmark.main)]
    luck = (
        "; one pretraining is taken to vary as much as the untrained seeds do"
        if any(gain.borrowed for gain in differences)
        else ""
    )
    text.append(f"intervals: 95 %, over test subjects and repeats; differences are paired{luck}")
    if any(row.result.flags.get("seen_test_subjects") for row in rows):
        text.append(f"not ranked: pretraining saw subjects of the test part; {leak_help(result)}")
    return "\n".join(text)


def _main(line: Line) -> str:
    if len(line.rows) == 1:
        low, high = line.first.result.intervals[line.first.result.main]
        return f"{number(line.runs.value)} [{number(low)}, {number(high)}]"
    interval = statistics.nested_interval(line.runs)
    spread = np.std([row.result.scores[row.result.main] for row in line.rows], ddof=1)
    return f"{number(interval.value)} [{number(interval.low)}, {number(interval.high)}] ± {spread:.3f}"


def _others(line: Line, names: Sequence[str]) -> list[str]:
    return [number(line.mean(name)) for name in names]


def _notes(line: Line) -> str:
    flags = line.first.result.flags
    notes = []
    if flags.get("seen_test_subjects"):
        notes.append(f"saw {flags['seen_test_subjects']} test subjects: not ranked")
    if line.first.result.contestant.get("mask_classes"):
        notes.append("from the true masks")
    if flags.get("saw_labels"):
        notes.append("pretrained with labels")
    return "; ".join(notes)
