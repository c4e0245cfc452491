"""The arithmetic of a study: what fits into the hours given, and what it will be able to show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssl3d.api import UsageError, statistics

RESERVE = 0.15
"""Share of the time that is kept for what was not timed: reports, saving, a busier machine."""
SPREADS = {"masks": (0.05, 0.01), "boxes": (0.15, 0.02), "classes": (0.35, 0.02)}
"""Standard deviation of the gain between subjects, and of a score between seeds, and between subsets.

From the fine-tuned networks of `benchmarks/results/real-small`: the standard error of a gain times the
root of the number of test subjects is .03 on the hippocampus, .05 to .06 on ACDC and the left atrium, .15
on nodule slices and .34 on AdrenalMNIST3D.
"""
OTHER = (0.5, 0.02)
GENEROUS = 0.5
"""Share of the wanted steps from which a richer design is taken."""
LONGEST = 20
"""Most of the wanted steps that pretraining takes where there is time left."""
WANTED_PRETRAINING = 1000
BUSY = 0.7
"""Share of a core below which other programs are known to be at work."""
LEAST_STEPS = 100


@dataclass(frozen=True)
class RunCost:
    """Cost of pretraining by a recipe.

    Attributes:
        step: Seconds of a step.
        flops: FLOPs of a step.
    """

    step: float
    flops: float


@dataclass(frozen=True)
class ArmCost:
    """Cost of fine-tuning a network.

    Attributes:
        step: Seconds of a step.
        volume: Seconds of predicting and scoring a volume.
    """

    step: float
    volume: float


@dataclass(frozen=True)
class Costs:
    """Measured costs of the parts of a study.

    Attributes:
        runs: Cost of each recipe, the first deciding the budget.
        network: Cost of the network that is pretrained.
        imagenet: Cost of the network with ImageNet's weights; None without one.
        start: Seconds from the start of a job to its first step.
        volumes: Numbers of volumes to train on, choose on and test on, of one fold.
        folds: Number of trainings of an arm on a subset: the folds, or one.
        scorings: Number of times that a training scores the validation volumes.
        share: Share of a core that fine-tuning had while it was timed; above 1 for several threads.
    """

    runs: Mapping[str, RunCost]
    network: ArmCost
    imagenet: ArmCost | None
    start: float
    volumes: tuple[int, int, int]
    folds: int
    scorings: int
    share: float = 1.0

    def busy(self) -> str:
        """Say that other programs slowed what was timed; nothing where they did not."""
        if self.share >= BUSY:
            return ""
        return f"other programs are at work: timing had {self.share:.0%} of one core"


@dataclass(frozen=True)
class Design:
    """Parts of a study.

    Attributes:
        recipes: Number of recipes.
        seeds: Number of seeds.
        few: Shares of the training subjects, beside all of them.
        repeats: Number of subsets of each share.
        imagenet: Whether the network with ImageNet's weights is trained, where there is one.
    """

    recipes: int
    seeds: int
    few: tuple[float, ...]
    repeats: int
    imagenet: bool = True

    @property
    def subsets(self) -> int:
        """Number of subsets of the training subjects, all of them together being one."""
        return 1 + len(self.few) * self.repeats


@dataclass(frozen=True)
class StudyPlan:
    """Plan of a study.

    Attributes:
        design: Its parts.
        pretrain_steps: Steps of the first recipe.
        finetune_steps: Steps of every fine-tuning.
        seconds: Seconds that it takes by one worker.
    """

    design: Design
    pretrain_steps: int
    finetune_steps: int
    seconds: float


def designs(recipes: int, few: Sequence[float], seeds: int = 0) -> list[Design]:
    """List designs, the richest first.

    Args:
        recipes: Number of recipes there are.
        few: Shares of the training subjects that are worth a try, the smallest first.
        seeds: Number of seeds asked for; 0 for any.
    """
    shapes = [(recipes, 3, 2, 3), (recipes, 3, 1, 3), (recipes, 2, 1, 2), (1, 3, 1, 2), (1, 2, 1, 1),
              (1, 1, 1, 1)]  # fmt: skip
    every = [Design(min(r, recipes), seeds or s, tuple(few[:f]), p) for r, s, f, p in shapes]
    return list(dict.fromkeys(every))


def last_designs(few: Sequence[float], seeds: int, asked: bool) -> list[Design]:
    """List what is tried where no design fits: without few labels, and without ImageNet's weights.

    Args:
        few: Shares of the training subjects that are worth a try, the smallest first.
        seeds: Number of seeds asked for; 0 for one.
        asked: Whether ImageNet's weights are asked for: few labels are given up before them.
    """
    first = Design(1, seeds or 1, (), 1) if asked else Design(1, seeds or 1, tuple(few[:1]), 1, False)
    return [first, Design(1, seeds or 1, (), 1, False)]


def few_shares(train: int) -> tuple[float, ...]:
    """Return the shares of the training subjects with which a study asks for few labels.

    A tenth of the subjects, but 4 at least, and four times as many; none that is above three fifths.

    Example:
        >>> few_shares(120), few_shares(27), few_shares(5)
        ((0.1, 0.4), (0.148, 0.593), ())
    """
    least = max(4, round(train / 10))
    return tuple(round(number / train, 3) for number in (least, 4 * least) if number <= 0.6 * train)


def trainings(design: Design, costs: Costs) -> tuple[int, int]:
    """Count the trainings of fine-tuning: of the network, and of that with ImageNet's weights."""
    each = design.seeds * design.subsets * costs.folds
    # From scratch each network is trained too.
    return (design.recipes + 1) * each, 2 * each if costs.imagenet and design.imagenet else 0


def fixed_seconds(design: Design, costs: Costs) -> float:
    """Return the seconds that a design takes whatever its steps: starts, and the scoring of volumes."""
    runs = design.recipes * design.seeds
    jobs = 2 * runs + 1 + bool(costs.imagenet and design.imagenet)
    _, val, test = costs.volumes
    scored = costs.scorings * val + test
    own, others = trainings(design, costs)
    volumes = own * costs.network.volume + (others * costs.imagenet.volume if costs.imagenet else 0.0)
    return jobs * costs.start + scored * volumes


def step_seconds(design: Design, costs: Costs) -> tuple[float, float]:
    """Return the seconds of one more step of the first recipe, and of one of every fine-tuning."""
    runs = list(costs.runs.values())[: design.recipes]
    pretraining = design.seeds * sum(run.step * runs[0].flops / run.flops for run in runs)
    own, others = trainings(design, costs)
    tuning = own * costs.network.step + (others * costs.imagenet.step if costs.imagenet else 0.0)
    return pretraining, tuning


@dataclass(frozen=True)
class Time:
    """Time that a study may take.

    Attributes:
        hours: Hours that were given.
        workers: Number of workers that share the study.
        spent: Seconds that looking and timing took already.
    """

    hours: float
    workers: int = 1
    spent: float = 0.0

    @property
    def usable(self) -> float:
        """Seconds of all workers together, less the reserve."""
        return (self.hours * 3600 - self.spent) * self.workers * (1 - RESERVE)

    def needed(self, seconds: float) -> float:
        """Return the hours to give for so many seconds of work, rounded up to a hundredth."""
        return math.ceil((seconds / (1 - RESERVE) / self.workers + self.spent) / 36) / 100


def choose(
    choices: Sequence[Design],
    costs: Costs,
    time: Time,
    wanted: int,
    pretraining: int = 0,
    tuning: int = 0,
    last: Sequence[Design] = (),
) -> StudyPlan:
    """Choose the richest design that the time allows at half of the wanted steps, and its steps.

    What is over when fine-tuning has all the steps wanted goes to pretraining. Where no design gets half
    of the steps, the leanest is taken with what it gets; where none
    fits at all, the first of the last ones.

    Args:
        choices: Designs, the richest first.
        costs: Measured costs.
        time: Time that is given.
        wanted: Steps that fine-tuning should have.
        pretraining: Steps of the first recipe that are asked for; 0 to plan them.
        tuning: Steps of fine-tuning that are asked for; 0 to plan them.
        last: Designs that give up more, the richest first.

    Raises:
        UsageError: The time is too short for the leanest; the message says how much it needs.
    """
    goals = (pretraining or WANTED_PRETRAINING, tuning or wanted)
    least = (pretraining or LEAST_STEPS, tuning or min(LEAST_STEPS, wanted))
    plan, given = None, (pretraining > 0, tuning > 0)
    for design in choices:
        plan = _fill(design, costs, time.usable, goals, least, given)
        if (
            plan
            and plan.pretrain_steps >= GENEROUS * goals[0]
            and plan.finetune_steps >= GENEROUS * goals[1]
        ):
            return plan
    plan = plan or next(
        filter(None, (_fill(d, costs, time.usable, goals, least, given) for d in last)), None
    )
    if plan:
        return plan
    leanest = [*choices, *last][-1]
    hours = time.needed(_total(leanest, costs, *least))
    networks, busy = sum(trainings(leanest, costs)), costs.busy()
    raise UsageError(
        f"--hours {time.hours:g} are too few: the smallest study of these scans needs {hours:.2f} here "
        f"({least[0]} steps of pretraining, {networks} networks fine-tuned by {least[1]} steps of "
        f"{costs.network.step:.2g} s{f'; {busy}' if busy else ''}); give --hours {hours:.2f}"
    )


def _fill(
    design: Design, costs: Costs, usable: float, goals: tuple[int, int], least: tuple[int, int],
    given: tuple[bool, bool],
) -> StudyPlan | None:  # fmt: skip
    """Give a design the steps that the time allows; None where these are too few."""
    if _total(design, costs, *least) > usable:
        return None
    left = usable - fixed_seconds(design, costs)
    each = step_seconds(design, costs)
    share = min(1.0, left / (each[0] * goals[0] + each[1] * goals[1]))
    steps = [goals[k] if given[k] else max(least[k], int(share * goals[k])) for k in range(2)]
    for k in range(2):  # what the other's least or given steps leave
        if not given[k]:
            rest = int((left - each[1 - k] * steps[1 - k]) / each[k])
            steps[k] = max(least[k], min(steps[k], rest))
    if not given[0]:
        rest = int((left - each[1] * steps[1]) / each[0])
        steps[0] = max(steps[0], min(rest, LONGEST * goals[0]))
    return StudyPlan(design, steps[0], steps[1], _total(design, costs, *steps))


def _total(design: Design, costs: Costs, pretraining: int, tuning: int) -> float:
    each = step_seconds(design, costs)
    return fixed_seconds(design, costs) + each[0] * pretraining + each[1] * tuning


# What can be shown --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power:
    """What decides how small a gain a table can show.

    Attributes:
        subject: Assumed standard deviation of the gain between subjects.
        luck: Assumed standard deviation of a score between seeds, and of the gain between subsets.
        tests: Number of tests of a table, for which Holm's procedure corrects the smallest p.
    """

    subject: float
    luck: float
    tests: int

    def smallest(self, subjects: int, seeds: int, subsets: int) -> float:
        """Return the smallest gain that is shown in four of five such studies.

        The variance of a gain is that of subjects, of the seeds of both arms, and of subsets of the
        training subjects where there are several; its degrees of freedom are Satterthwaite's. A single
        seed tells nothing of its luck, which is then not counted.

        Args:
            subjects: Number of test subjects.
            seeds: Number of seeds.
            subsets: Number of subsets.
        """
        parts = [(self.subject**2 / subjects, subjects - 1)]
        if seeds > 1:
            parts.append((2 * self.luck**2 / seeds, 2 * (seeds - 1)))
        if subsets > 1:
            parts.append((self.luck**2 / subsets, subsets - 1))
        variance = sum(part for part, _ in parts)
        freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
        return statistics.minimum_detectable_difference(
            math.sqrt(variance), alpha=0.05 / self.tests, freedom=freedom
        )

    def needed(self, gain: float, seeds: int, most: int = 100_000) -> tuple[int, int] | None:
        """Return the subjects and the seeds with which a gain could be shown; None where none would do.

        Seeds are added only where no number of subjects does without.

        Args:
            gain: Gain to be shown.
            seeds: Number of seeds to begin with.
            most: Largest number of subjects to think of.
        """
        for number in dict.fromkeys((seeds, *(n for n in (3, 5, 10, 20, 40) if n > seeds))):
            if self.smallest(most, number, 1) > gain:
                continue
            low, high = 2, most
            while low < high:
                middle = (low + high) // 2
                if self.smallest(middle, number, 1) <= gain:
                    high = middle
                else:
                    low = middle + 1
            return low, number
        return None
