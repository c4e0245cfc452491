"""The table of a linear probe: scores with intervals, the difference from untrained, what is detectable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ssl3d.api import count_of, statistics
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

if TYPE_CHECKING:
    from ssl3d.api import Benchmark


ONE_SEED = (
    "No interval of the difference is given, because one untrained seed does not tell how much another "
    "draw of random weights would change it; --untrained 5 does."
)


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
    alone = False
    for line in lines:
        if line.first.kind == "untrained":
            continue
        beside = reference.get((line.first.group, line.first.recalibrated))
        difference = ""
        if beside is not None and line.first.kind == "encoder":
            gain = difference_of(line, beside)
            if len(line.runs.each) == len(beside.runs.each) == 1:
                gain, alone = statistics.without_interval(gain), True
            differences.append(gain)
            difference = with_interval(gain, signed)
        table.append([line.name, _main(line), *_others(line, others), difference, _notes(line)])
    at = 1 + sum(line.first.kind == "encoder" for line in lines)
    inserted = []
    for (group, again), seeds in untrained.items():
        values = [line.runs.value for line in seeds]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        means = [number(np.mean([line.mean(name) for line in seeds])) for name in others]
        title = group + (", norm recalibrated" if again else "")
        counted = f"{count_of(len(seeds), 'untrained seed')}{', mean ± sd' if spread else ''}"
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
    text = [head, *aligned(table), *detectable(differences, benchmark.main), *why_no_interval(lines)]
    if alone:
        text.append(ONE_SEED)
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
    text = with_interval(statistics.nested_interval(line.runs), number)
    if len(line.rows) == 1:
        return text
    spread = np.std([row.result.scores[row.result.main] for row in line.rows], ddof=1)
    return f"{text} ± {spread:.3f}"


def _others(line: Line, names: Sequence[str]) -> list[str]:
    return [number(line.mean(name)) for name in names]


def _notes(line: Line) -> str:
    flags = line.first.result.flags
    notes = []
    if flags.get("seen_test_subjects"):
        notes.append(f"saw {count_of(flags['seen_test_subjects'], 'test subject')}: not ranked")
    if reads_true_masks(line.first.result.contestant):
        notes.append(TRUE_MASKS)
    if flags.get("saw_labels"):
        notes.append("pretrained with labels")
    return "; ".join(notes)
