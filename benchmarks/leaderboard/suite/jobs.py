"""Jobs of a suite: each is one command that prepares a store, pretrains an encoder or scores one."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ssl3d_benchmarks.leaderboard.suite.commands import SuiteCommands, card_of
from ssl3d_benchmarks.leaderboard.suite.provenance import Provenance, options_in
from ssl3d_benchmarks.leaderboard.suite.suite import SuiteTask

CURVE = (25, 50)
"""Percent of the budget at which encoders are scored on the way; 0 and 100 are always there."""


@dataclass(frozen=True)
class Job:
    """One command that can be stopped, repeated and done anywhere.

    Attributes:
        name: Name, unique in the suite and usable as the name of a file.
        kind: prepare, measure, pretrain or score.
        command: Words after `ssl3d`, computed when its turn comes: they may depend on other jobs' results.
        needs: Names of the jobs to be done before.
        product: File that is there once the job is done; None for scores, whose marker alone tells.
        missing: What it would need and is not there; empty if nothing.
        inputs: Files whose content, beside the command, decides whether it was done.
        after: Names of jobs that come before, if they can be done: where they fail, this one may succeed.
        provenance: What the product is made with; None for scores.
        begun: Whether the command would go on with what is there, instead of making it anew.
    """

    name: str
    kind: str
    command: Callable[[], list[str]]
    needs: tuple[str, ...] = ()
    product: Path | None = None
    missing: str = ""
    inputs: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()
    provenance: Provenance | None = None
    begun: Callable[[], bool] = bool

    def digest(self) -> str:
        """Hash what decides the product, or command and inputs: another encoder has other scores."""
        about = self.provenance.now() if self.provenance else self.command()
        digest = hashlib.sha256(json.dumps(about).encode())
        for path in self.inputs:
            digest.update(path.read_bytes() if path.is_file() else b"missing")
        return digest.hexdigest()[:16]

    def difference(self) -> str:
        """Say why what is there was made with other options than those of now; empty if it was not."""
        there = self.product is not None and (self.product.exists() or self.begun())
        return self.provenance.difference() if there and self.provenance else ""


def prepare_job(commands: SuiteCommands, name: str) -> Job:
    """Make the job that prepares a store, in the first way whose paths are all there."""
    root, store = commands.places.root, Path(commands.store(name))
    ways = [shlex.split(way) for way in commands.suite.stores[name].split("|")]
    chosen = next((way for way in ways if not _located(way, root)[1]), ways[0])
    words, lacking = _located(chosen, root)
    # Any way will do: the data of the one that it was made in may have gone since.
    meant = [options_in(way) for way in (chosen, *(way for way in ways if way != chosen))]
    return Job(
        f"prepare:{name}",
        "prepare",
        lambda: ["prepare", *words, "--out", str(store)],
        product=store,
        missing="" if store.exists() else ", ".join(lacking),
        provenance=Provenance(store, lambda: meant),
    )


def _located(words: list[str], root: Path) -> tuple[list[str], list[str]]:
    """Put the paths after `ssl3d prepare` below the root, and list those that are not there.

    Words from the first flag on are options.
    """
    flags = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    paths = [root / word for word in words[:flags]]
    return [*map(str, paths), *words[flags:]], [str(path) for path in paths if not path.exists()]


def measure_job(commands: SuiteCommands, name: str) -> Job:
    """Make the job that counts the FLOPs of one step of a run."""
    folder, seed, fold = commands.measured_folder(name), commands.suite.first, commands.folds[0]

    def command() -> list[str]:
        words = commands.pretraining(name, 1, seed, fold=fold)
        return ["pretrain", *words, "--eval-every", "-1", "--out", str(folder), "--overwrite"]

    def ways() -> list[dict[str, list[str]]]:
        words = commands.pretraining(name, None, seed, meant=True, fold=fold)
        return [options_in(words, apart=("seed",))]

    def runs() -> list[Path]:
        every = commands.places.work.glob(f"{name}-*")
        theirs = re.compile(r"\d+(-fold\d+)?")
        return sorted(path for path in every if theirs.fullmatch(path.name[len(name) + 1 :]))

    needs = commands.needs(commands.suite.runs[name], fold=fold)
    provenance = Provenance(folder, ways, commands.sources(needs), runs)
    return Job(f"measure:{name}", "measure", command, needs, card_of(folder), provenance=provenance)


def pretrain_job(commands: SuiteCommands, name: str, seed: int, fold: int | None = None) -> Job:
    """Make the job that pretrains a run at one seed, or goes on with it where it was stopped.

    With a fold, the run leaves out the subjects that this fold tests.
    """
    suite, folder = commands.suite, commands.run_folder(name, seed, fold)
    needs = list(commands.needs(suite.runs[name], seed, fold))
    sources = commands.sources(needs)
    if suite.budget:
        needs.append(f"measure:{name}")
        if "run" in suite.budget:
            needs.append(f"measure:{suite.budget['run']}")

    def begun() -> bool:
        return (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())

    def ways() -> list[dict[str, list[str]]]:
        words = commands.pretraining(name, commands.steps(name), seed, meant=True, fold=fold)
        return [options_in(words)]

    def command() -> list[str]:
        if begun():
            return ["pretrain", "--resume", str(folder)]
        marks = ["--save-at", "0", *(str(share / 100) for share in CURVE)]
        words = commands.pretraining(name, commands.steps(name), seed, fold=fold)
        return ["pretrain", *words, *marks, "--out", str(folder), "--overwrite"]

    return Job(
        commands.pretrained(name, seed, fold)[0],
        "pretrain",
        command,
        tuple(dict.fromkeys(needs)),
        product=card_of(folder),
        provenance=Provenance(folder, ways, sources),
        begun=begun,
    )


class ScoreJobs:
    """The jobs that score the contestants and runs of one task.

    Args:
        commands: Commands of the suite.
        task: Task that is scored.
    """

    def __init__(self, commands: SuiteCommands, task: SuiteTask) -> None:
        self.commands, self.suite, self.task = commands, commands.suite, task
        self.runs = _matching(self.suite.runs, task.runs)
        # Whether the task's own options name seeds of the network from scratch.
        self.seeded = any(w.partition("=")[0] == "--seeds" for w in commands.words(task.options))

    def jobs(self) -> Iterator[Job]:
        """Make the jobs, those of untrained rows first, those of encoders on the way last."""
        yield from self._ordered([*self._of_contestants(), *self._of_runs()])
        if self.task.curve:
            yield from self._ordered(list(self._on_the_way()))

    def _of_contestants(self) -> Iterator[Job]:
        suite, commands = self.suite, self.commands
        names = _matching(suite.contestants, self.task.contestants)
        # Untrained rows first: they are beside everyone, and are found again by those who come later.
        names.sort(key=lambda name: not suite.contestants[name].startswith("scratch:"))
        for name in names:
            text = suite.contestants[name]
            run = next((run for run in suite.runs if f"{{{run}}}" in text), None)
            cards = () if run is None else commands.cards(run, suite.first)
            seeds = (suite.first,) if cards else suite.seeds
            encoder = f"{name}={commands.words(text)[0]}"
            yield self._job(name, encoder, commands.needs(text), cards, seeds)

    def _of_runs(self) -> Iterator[Job]:
        for seed in self.suite.seeds:
            for name in self.runs:
                folder = self.commands.run_folder(name, seed)
                needs, cards = self.commands.pretrained(name, seed), self.commands.cards(name, seed)
                yield self._job(f"{name}-{seed}", f"{name}={folder}", needs, cards, (seed,))

    def _on_the_way(self) -> Iterator[Job]:
        alone: tuple[str, ...] = ("--untrained", "0")
        if self.task.protocol == "finetune":
            alone = ("--no-scratch", "true", "--no-trivial", "true")
        begun: set[tuple[int, str]] = set()
        for seed in self.suite.seeds:
            for name in self.runs:
                start = (seed, self.commands.beginning(name))
                for share in (0, *CURVE):
                    if share == 0 and start in begun:
                        continue  # the same weights as another run's
                    begun.add(start)
                    way = f"encoder-at-{share:02d}"
                    mark = self.commands.run_folder(name, seed) / way
                    yield self._job(
                        f"{name}-at-{share:02d}-{seed}", f"{name}={mark}",
                        self.commands.pretrained(name, seed), self.commands.cards(name, seed, way),
                        (seed,), f"{self.task.name}-curve", alone,
                    )  # fmt: skip

    def _job(
        self, label: str, encoder: str, needs: tuple[str, ...], cards: tuple[Path, ...],
        seeds: Sequence[int], folder: str = "", more: tuple[str, ...] = (),
    ) -> Job:  # fmt: skip
        """Make the job that scores an encoder, whose cards decide whether it was done."""
        task, folder = self.task, folder or self.task.name
        if task.protocol == "finetune" and not self.seeded:
            # The network from scratch has a seed for each of the pretrained ones that it stands beside.
            more = (*more, "--seeds", *map(str, seeds))
        if self.suite.folds:
            more = (*more, "--folds", str(self.suite.folds))
        words = self.commands.words(task.options)
        out = str(self.commands.places.out / folder)
        command = [task.protocol, encoder, *words, *more, "--out", out]
        waits = tuple(dict.fromkeys((*self.commands.needs(task.options), *needs)))
        name = f"score:{folder}:{label}"
        return Job(name, "score", lambda: command, waits, inputs=cards)

    def _ordered(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """Order the jobs of a folder after the first, which computes what all stand beside."""
        for job in jobs:
            if job is jobs[0] or self.task.protocol == "finetune":  # fine-tuning shares by locks
                yield job
            else:
                yield replace(job, after=(jobs[0].name,))


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
