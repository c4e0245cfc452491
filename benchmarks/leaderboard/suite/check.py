"""Reads every command of a suite before its first job, so that a typing error costs no hours."""

from __future__ import annotations

from typing import Any

from ssl3d.api import Plugins, PrepareOptions, Ssl3dError, UsageError, encoder_from, parse, request_of
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.protocol import TASKS, task_class
from ssl3d_benchmarks.finetune.recipe import resolve
from ssl3d_benchmarks.knn.command import KNNOptions
from ssl3d_benchmarks.leaderboard.suite.plan import SuitePlan
from ssl3d_benchmarks.linear_probe.options import LinearProbeOptions

SCORERS = {"linear-probe": LinearProbeOptions, "knn": KNNOptions, "finetune": FinetuneOptions}


def check(plan: SuitePlan) -> None:
    """Check that the commands of a suite's jobs can be read, and its untrained encoders made.

    Raises:
        UsageError: One cannot; the message names the store, run, contestant or task.
    """
    suite = plan.suite
    there = {(job.kind, job.name.split(":")[1]) for job in plan.jobs}
    for kind, name in sorted(
        there, key=lambda pair: ("prepare", "measure", "pretrain", "score").index(pair[0])
    ):
        job = next(job for job in plan.jobs if (job.kind, job.name.split(":")[1]) == (kind, name))
        where = {"prepare": "stores", "measure": "runs", "pretrain": "runs", "score": "tasks"}[kind]
        where = f"{where}: {name.removesuffix('-curve') if kind == 'score' else name}"
        try:
            if kind == "prepare":
                parse("ssl3d prepare", PrepareOptions, job.command()[1:])
            elif kind in ("measure", "pretrain"):
                _run(plan, name)
            else:
                _check_task(job.command(), bool(suite.folds))
        except Ssl3dError as error:
            raise UsageError(f"suite {suite.name}: {where}: {error}") from error
    for name, text in suite.contestants.items():
        word = (plan.commands.words(text) or [""])[0]
        try:
            if not word:
                raise UsageError("no encoder")
            if word.startswith("scratch:"):
                encoder_from(word)
        except Ssl3dError as error:
            raise UsageError(f"suite {suite.name}: contestants: {name}: {error}") from error


def _run(plan: SuitePlan, name: str) -> None:
    given = {word.partition("=")[0] for word in plan.commands.words(plan.suite.runs[name])}
    theirs = {"--seed": "seeds", "--out": "folder for runs"}
    if plan.suite.budget:
        theirs |= {"--steps": "budget", "--epochs": "budget"}
    if plan.suite.folds:
        theirs |= {"--leave-out": "folds"}
    for flag, by in theirs.items():
        if flag in given:
            raise UsageError(f"{flag} is set by the suite's {by}, so leave it out")
    request_of(plan.commands.pretraining(name, 1, 0, fold=plan.commands.folds[0]))


def _check_task(command: list[str], folds: bool) -> None:
    protocol, *words = command
    given = [word.partition("=")[0] for word in words]
    if given.count("--out") > 1:
        raise UsageError("options: --out is set by the suite, a folder for each task, so leave it out")
    if folds and (protocol != "finetune" or given.count("--folds") > 1):
        wrong = "--folds is set by the suite's folds, so leave it out"
        if protocol != "finetune":
            wrong = f"protocol {protocol} has no encoder for each of the suite's folds; use finetune"
        raise UsageError(f"options: {wrong}")
    if "--data" not in given:
        raise UsageError("options: --data is missing")
    check_scoring(command)


def check_scoring(command: list[str]) -> None:
    """Check that a command which scores encoders can be read.

    Raises:
        UsageError: An option is unknown, or its value unusable.
    """
    from ssl3d.api import plugins as installed

    protocol, *words = command
    plugins: Any = None
    if protocol == "finetune":
        plugins = Plugins({"task": lambda name: task_class(name).Config}, {"task": tuple(TASKS)})
    options: Any = SCORERS.get(protocol)
    if options is None:
        options = getattr(installed.load(installed.COMMANDS, protocol), "Options", None)
    if options is None:  # it reads its words itself
        return
    parsed = parse(f"ssl3d {protocol}", options, words, plugins)
    if protocol == "finetune":
        resolve(parsed.options, parsed.sections[parsed.options.task], parsed.given)
