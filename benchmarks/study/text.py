"""What a study says: the plan before it starts, and the answer at its end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ssl3d.api import count_of, duration
from ssl3d_benchmarks.study.look import Look
from ssl3d_benchmarks.study.plan import OTHER, SPREADS, Costs, Power, StudyPlan, few_shares, trainings
from ssl3d_benchmarks.study.recipes import Recipes

SCORES = {"masks": "Dice", "boxes": "CPM", "classes": "AUC", "ordinal": "Spearman", "real": "R2"}
GAINS = {"masks": 0.01, "boxes": 0.05}
"""Gains that one would like to see, smaller ones being of little use."""


def plan_lines(
    look: Look, recipes: Recipes, imagenet: tuple[str, str], plan: StudyPlan, costs: Costs, hours: float,
    workers: int, spread: float,
) -> list[str]:  # fmt: skip
    """Say what a study will do, how long it takes, and what it will be able to show.

    Args:
        look: What the data are.
        recipes: Recipes of pretraining.
        imagenet: Encoder with ImageNet's weights or an empty text, and why.
        plan: Plan of the study.
        costs: Measured costs.
        hours: Hours that were given.
        workers: Number of workers that share the study.
        spread: Assumed standard deviation of the gain between subjects; 0 for that of our records.
    """
    parts = (
        _data(look),
        _work(look, recipes, imagenet, plan, costs, hours, workers),
        _power(look, recipes, plan, spread),
    )
    return [line for part in parts for line in ("", *map(_wrapped, part))][1:]


def _wrapped(line: str) -> str:
    """Wrap a line for a terminal, its rest below its beginning."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, 100, subsequent_indent=indent, break_on_hyphens=False)


def _data(look: Look) -> list[str]:
    rest = look.subjects - look.labelled
    shape = " x ".join(map(str, look.shape))
    spacing = " x ".join("unknown" if np.isnan(side) else f"{side:.3g}" for side in look.spacing)
    how = f"{look.folds}-fold cross-validation by subject" if look.folds else "one split by subject"
    kind = "images" if look.images else "stacks of thick slices" if look.thick else "volumes"
    return [
        f"Data: {', '.join(look.datasets)}: {count_of(look.subjects, 'subject')}, "
        f"{count_of(look.volumes, 'volume')}; {look.labelled} with {look.target}, {rest} without",
        f"  {kind} of {shape} voxels of {spacing} mm (D x H x W, medians)",
        f"  {how}: {look.why}",
    ]


def _work(
    look: Look, recipes: Recipes, imagenet: tuple[str, str], plan: StudyPlan, costs: Costs, hours: float,
    workers: int,
) -> list[str]:  # fmt: skip
    design = plan.design
    names = list(costs.runs)[: design.recipes]
    first = costs.runs[names[0]]
    steps = {name: plan.pretrain_steps * first.flops / costs.runs[name].flops for name in names}
    each = ", ".join(
        f"{name} {max(1, round(steps[name])):,} steps of {costs.runs[name].step:.2g} s" for name in names
    )
    own, others = trainings(design, costs)
    sizes = [max(2, round(share * look.train[0])) for share in (*design.few, 1.0)]
    subsets = [f"{count_of(design.repeats, 'subset')} of {size}" for size in sizes[:-1]]
    labels = ", ".join([*subsets, f"all {sizes[-1]}"])
    network = costs.network
    dropped = recipes.names[design.recipes :]
    if not design.few and few_shares(look.train[0]):
        labels += "; no time for fewer"
    arm = f"  ImageNet: {imagenet[1]}" if imagenet[0] else f"  {imagenet[1]}"
    if imagenet[0] and not design.imagenet:
        arm = "  ImageNet: no time for it"
    busy = costs.busy()
    return [
        f"Plan: about {duration(plan.seconds / workers)} of the {hours:g} hours given"
        f"{f', by {workers} workers' if workers > 1 else ''}, as timed on this machine just now",
        *([f"  {busy}; the plan counts on no more"] if busy else []),
        f"  pretrain on {count_of(look.pretrained_on, 'subject')}, at equal training FLOPs, "
        f"{count_of(design.seeds, 'seed')} each: {each}",
        f"    {recipes.why}" + (f"; no time for {', '.join(dropped)}" if dropped else ""),
        f"  fine-tune {count_of(own + others, 'network')}, from scratch and pretrained, "
        f"{plan.finetune_steps:,} steps each ({network.step:.2g} s a step, {network.volume:.2g} s to score "
        "a volume)",
        f"    training volumes of a fold: {labels}" if look.folds else f"    training volumes: {labels}",
        arm,
    ]


def power_of(look: Look, recipes: int, spread: float) -> Power:
    """Return the assumptions from which the smallest gain that can be shown follows."""
    subject, luck = SPREADS.get(look.target, OTHER)
    return Power(spread or subject, luck, recipes)


def _power(look: Look, recipes: Recipes, plan: StudyPlan, spread: float) -> list[str]:
    design, score = plan.design, SCORES[look.target]
    power = power_of(look, design.recipes, spread)
    whole = power.smallest(look.tested, design.seeds, 1)
    few = power.smallest(look.tested, design.seeds, design.repeats) if design.few else None
    folds = f", {look.folds} folds" if look.folds else ""
    lines = [
        f"What it can show: {look.tested} test subjects{folds}: a gain below {_number(whole)} {score} "
        f"cannot be seen with all labels{f', below {_number(few)} with few' if few else ''}"
    ]
    gain = GAINS.get(look.target, 0.05)
    needed = power.needed(gain, design.seeds)
    if whole > gain and needed:
        more = "" if needed[1] == design.seeds else f" and {needed[1]} seeds"
        lines.append(f"  {_number(gain)} would need {needed[0]:,} test subjects{more}")
    lines.append(
        f"  assumed: gains differ by {_number(power.subject)} between subjects, scores by "
        f"{_number(power.luck)} between seeds and subsets (standard deviations"
        f"{'' if spread else ', from our own records'}); found in 4 of 5 such studies at p < .05 after Holm"
    )
    if design.seeds == 1:
        lines.append("  one seed tells nothing of the luck of pretraining: give more hours for three")
    return lines


def _number(value: float) -> str:
    return f"{value:.2g}".removeprefix("0") if value < 1 else f"{value:.2g}"


def ending(
    sentences: Sequence[str],
    models: Sequence[tuple[Path, str]],
    scans: Sequence[str],
    page: Path,
    methods: str,
    time: str = "",
    easy: str = "",
) -> str:
    """Write what a study ends with.

    Args:
        sentences: Answer.
        models: Folders of kept models, with what each is.
        scans: Words of the scans.
        page: Page of the report.
        methods: Paragraph for a paper.
        time: Time that it took, beside the plan.
        easy: Row without a network that is above every network, with both scores; empty where none is.
    """
    lines = ["Does pretraining pay here?", *(f"  {sentence}" for sentence in sentences), "", "What to use:"]
    if easy:
        lines.append(f"  No network of this study: a row without one is ahead ({easy}). Give more hours.")
    for folder, about in models:
        lines += [f"  {folder}", f"    {about}", f"    ssl3d predict {folder} --data SCANS --out predicted"]
    if not models:
        lines.append("  no model is kept: see the page")
    if time:
        lines += ["", f"Time: {time}"]
    return "\n".join([*lines, "", f"Everything else: {page}", "", "Methods:", f"  {methods}"])
