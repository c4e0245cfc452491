"""The jobs of a suite: what is prepared, pretrained and scored, where, by which command."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ssl3d.api import UsageError
from ssl3d_benchmarks.leaderboard.suite.made import Made, options_in
from ssl3d_benchmarks.leaderboard.suite.suite import Suite, SuiteTask

PHANTOMS = "phantoms"

CURVE = (25, 50)
"""Percent of the budget at which encoders are scored on the way; 0 and 100 are always there."""


@dataclass(frozen=True)
class Job:
    """One command that can be stopped, repeated and done anywhere.

    Attributes:
        name: Unique in the suite, usable as the name of a file.
        kind: prepare, measure, pretrain or score.
        command: Words after `ssl3d`, found when its turn comes: they may depend on what others found.
        needs: Names of the jobs to be done before.
        product: What is there once it is done; None for scores, whose marker alone tells.
        missing: What it would need and is not there; empty if nothing.
        inputs: Files whose content, beside the command, decides whether it was done.
        after: Names of jobs that come before, if they can be done: what they fail at, this may do.
        made: What the product is made with; None for scores.
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
    made: Made | None = None
    begun: Callable[[], bool] = bool

    def digest(self) -> str:
        """Of what is made, or of command and inputs: scores of another encoder are other scores."""
        found = hashlib.sha256(json.dumps(self.made.now() if self.made else self.command()).encode())
        for path in self.inputs:
            found.update(path.read_bytes() if path.is_file() else b"missing")
        return found.hexdigest()[:16]

    def difference(self) -> str:
        """Why what is there was made with other options than those of now; empty if it was not."""
        there = self.product is not None and (self.product.exists() or self.begun())
        return self.made.difference() if there and self.made else ""


@dataclass(frozen=True)
class Places:
    """Where things lie.

    Attributes:
        root: Of the data.
        work: Stores and runs.
        out: Records, a folder per task.
    """

    root: Path
    work: Path
    out: Path


class SuitePlan:
    """The jobs of a suite, in an order in which they can be done.

    Args:
        suite: What to do.
        places: Where.
        only: Patterns of names of runs and tasks; the jobs that those need are done too.

    Raises:
        UsageError: A pattern matches nothing, or a store's or task's words name no store.
    """

    def __init__(self, suite: Suite, places: Places, only: Sequence[str] = ("*",)) -> None:
        self.suite, self.places = suite, places
        for text in (*suite.runs.values(), *suite.contestants.values(), *(t.options for t in suite.tasks)):
            self.words(text)
        names = [*suite.runs, *(task.name for task in suite.tasks)]
        for pattern in only:
            if not fnmatch.filter(names, pattern):
                raise UsageError(
                    f"--only {pattern}: no such run or task in {suite.name}: {', '.join(names)}"
                )
        everything = {job.name: job for job in self._all()}
        wanted: set[str] = set()

        def want(name: str) -> None:
            if name not in wanted:
                wanted.add(name)
                for other in everything[name].needs:
                    want(other)

        for job in everything.values():
            of, *more = job.name.split(":")[1:]
            if job.kind not in ("pretrain", "score") or not any(fnmatch.fnmatch(of, p) for p in only):
                continue
            if job.kind == "score" or int(more[0]) in suite.seeds:
                want(job.name)
        ordered: dict[str, Job] = {}

        def place(job: Job) -> None:
            for need in job.needs:  # a run may begin with one that is measured, and made, later in the file
                if need not in ordered:
                    place(everything[need])
            ordered[job.name] = job

        for job in everything.values():
            if job.name in wanted and job.name not in ordered:
                place(job)
        self.jobs = list(ordered.values())

    def _all(self) -> Iterator[Job]:
        suite = self.suite
        for name, source in suite.stores.items():
            if not _is_phantoms(source):
                yield self._prepare(name, source)
        for name in suite.runs:
            if suite.budget:
                yield self._measure(name)
        for seed in dict.fromkeys((*suite.seeds, suite.first)):
            for name in suite.runs:
                yield self._pretrain(name, seed)
        for task in suite.tasks:
            yield from self._scores(task)

    def _prepare(self, name: str, source: str) -> Job:
        store = Path(self._store(name))
        ways = [shlex.split(way) for way in source.split("|")]
        chosen = next((way for way in ways if not _located(way, self.places.root)[1]), ways[0])
        words, lacking = _located(chosen, self.places.root)
        # Any way will do: the data of the one that it was made in may have gone since.
        meant = [options_in(way) for way in (chosen, *(way for way in ways if way != chosen))]
        return Job(
            f"prepare:{name}",
            "prepare",
            lambda: ["prepare", *words, "--out", str(store)],
            product=store,
            missing="" if store.exists() else ", ".join(lacking),
            made=Made(store, lambda: meant),
        )

    def _measure(self, name: str) -> Job:
        """One step, whose FLOPs are counted."""
        folder, seed = self.places.work / f"flops-{name}", self.suite.first

        def command() -> list[str]:
            words = self.pretraining(name, 1, seed)
            return ["pretrain", *words, "--eval-every", "-1", "--out", str(folder), "--overwrite"]

        def ways() -> list[dict[str, list[str]]]:
            return [options_in(self.pretraining(name, None, seed, meant=True), apart=("seed",))]

        def runs() -> list[Path]:
            return sorted(
                path for path in self.places.work.glob(f"{name}-*") if path.name[len(name) + 1 :].isdigit()
            )

        needs = self._needs(self.suite.runs[name])
        made = Made(folder, ways, self._sources(needs), runs)
        return Job(f"measure:{name}", "measure", command, needs, _card(folder), made=made)

    def _pretrain(self, name: str, seed: int) -> Job:
        suite, folder = self.suite, self.folder(name, seed)
        needs = list(self._needs(suite.runs[name], seed))
        sources = self._sources(needs)
        if suite.budget:
            needs.append(f"measure:{name}")
            if "run" in suite.budget:
                needs.append(f"measure:{suite.budget['run']}")

        def begun() -> bool:
            return (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())

        def ways() -> list[dict[str, list[str]]]:
            return [options_in(self.pretraining(name, self.steps(name), seed, meant=True))]

        def command() -> list[str]:
            if begun():
                return ["pretrain", "--resume", str(folder)]
            marks = ["--save-at", "0", *(str(share / 100) for share in CURVE)]
            words = self.pretraining(name, self.steps(name), seed)
            return ["pretrain", *words, *marks, "--out", str(folder), "--overwrite"]

        return Job(
            f"pretrain:{name}:{seed}",
            "pretrain",
            command,
            tuple(dict.fromkeys(needs)),
            product=_card(folder),
            made=Made(folder, ways, sources),
            begun=begun,
        )

    def _scores(self, task: SuiteTask) -> Iterator[Job]:
        suite = self.suite
        others = [n for n in suite.contestants if any(fnmatch.fnmatch(n, p) for p in task.contestants)]
        runs = [n for n in suite.runs if any(fnmatch.fnmatch(n, p) for p in task.runs)]
        # Untrained rows first: they are beside everyone, and are found again by those who come later.
        others.sort(key=lambda n: not suite.contestants[n].startswith("scratch:"))
        first: list[str] = []
        named = any(word.partition("=")[0] == "--seeds" for word in self.words(task.options))

        def job(
            label: str, encoder: str, folder: str, needs: tuple[str, ...], card: Path | None,
            seeds: Sequence[int], more: tuple[str, ...] = (),
        ) -> Job:  # fmt: skip
            name = f"score:{folder}:{label}"
            out = self.places.out / folder
            if task.protocol == "finetune" and not named:
                # The network from scratch has a seed for each of the pretrained ones that it stands beside.
                more = (*more, "--seeds", *map(str, seeds))
            command = [task.protocol, encoder, *self.words(task.options), *more, "--out", str(out)]
            waits = tuple(dict.fromkeys((*self._needs(task.options), *needs)))
            # The first computes what all stand beside, the others find it; fine-tuning shares by locks.
            after = () if task.protocol == "finetune" else tuple(first)
            if not first:
                first.append(name)
            return Job(name, "score", lambda: command, waits, inputs=(card,) if card else (), after=after)

        for name in others:
            text = suite.contestants[name]
            encoder = self.words(text)[0]
            card = next(
                (_card(self.folder(r, suite.first)) for r in suite.runs if f"{{{r}}}" in text), None
            )
            seeds = (suite.first,) if card else suite.seeds
            yield job(name, f"{name}={encoder}", task.name, self._needs(text), card, seeds)
        for seed in suite.seeds:
            for name in runs:
                folder = self.folder(name, seed)
                needs = (f"pretrain:{name}:{seed}",)
                yield job(f"{name}-{seed}", f"{name}={folder}", task.name, needs, _card(folder), (seed,))
        if not task.curve:
            return
        first.clear()
        alone = {"finetune": ("--no-scratch", "true", "--no-trivial", "true")}.get(
            task.protocol, ("--untrained", "0")
        )
        begun: set[tuple[int, str]] = set()
        for seed in suite.seeds:
            for name in runs:
                folder = self.folder(name, seed)
                for share in (0, *CURVE):
                    if share == 0 and (seed, self._beginning(name)) in begun:
                        continue  # the same weights as another run's
                    begun.add((seed, self._beginning(name)))
                    mark = folder / f"encoder-at-{share:02d}"
                    needs = (f"pretrain:{name}:{seed}",)
                    card = mark / "encoder.json"
                    label = f"{name}-at-{share:02d}-{seed}"
                    yield job(label, f"{name}={mark}", f"{task.name}-curve", needs, card, (seed,), alone)

    def _beginning(self, name: str) -> str:
        """What decides the weights that a run begins with, beside the seed."""
        words = self.pretraining(name, None, 0)
        if "--init" in words:
            return name
        return " ".join(words[words.index("--encoder") :]) if "--encoder" in words else ""

    def plugin_files(self) -> list[str]:
        """The files and module:Class of encoders that the suite's runs name."""
        found: dict[str, None] = {}
        for text in self.suite.runs:
            words = self.pretraining(text, None, 0)
            for flag, word in pairwise([w for one in words for w in one.split("=", 1)]):
                if flag == "--encoder" and (".py" in word or ":" in word):
                    found[word] = None
        return list(found)

    # Words -----------------------------------------------------------------------------------------

    def words(self, text: str, seed: int | None = None, meant: bool = False) -> list[str]:
        """Splits a command's words: {STORE} becomes its path, {RUN} its folder, {root} that of the data.

        Args:
            text: Of the suite.
            seed: Of the runs named in it; the first if None.
            meant: Put names for paths: what is meant, wherever the folders lie.

        Raises:
            UsageError: There is no such store or run.
        """
        seed = self.suite.first if seed is None else seed
        places = {name: str(self.folder(name, seed)) for name in self.suite.runs}
        places |= {name: str(self._store(name)) for name in self.suite.stores}
        places["root"] = str(self.places.root)
        if meant:
            places = {
                name: place if _is_phantoms(place) else f"{{{name}}}" for name, place in places.items()
            }
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"suite {self.suite.name}: {text!r} are no words: {error}") from error
        try:
            return [word.format(**places) for word in words]
        except (KeyError, IndexError, ValueError) as error:
            there = ", ".join(sorted({*self.suite.runs, *self.suite.stores}))
            raise UsageError(
                f"suite {self.suite.name}: {text!r}: {error} names no store and no run: there are {there}"
            ) from error

    def pretraining(self, name: str, steps: int | None, seed: int, meant: bool = False) -> list[str]:
        """What follows `ssl3d pretrain`."""
        words = self.words(self.suite.runs[name], seed, meant)
        encoder = [] if "--encoder" in words else self.words(self.suite.encoder, meant=meant)
        length = [] if steps is None else ["--steps", str(steps)]
        return [*words, *encoder, *length, "--seed", str(seed)]

    def steps(self, name: str) -> int | None:
        """Of a run, from the budget and what a step of it was measured to cost; None without a budget."""
        budget = self.suite.budget
        if not budget:
            return None
        flops = (
            float(budget["flops"])
            if "flops" in budget
            else int(budget["steps"]) * self._flops(budget["run"])
        )
        return max(1, round(flops / self._flops(name)))

    def _flops(self, name: str) -> int:
        card = _card(self.places.work / f"flops-{name}")
        try:
            flops = int(json.loads(card.read_text(encoding="utf-8"))["compute"]["flops_per_step"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{card} does not tell what a step costs: no number flops_per_step") from error
        if flops <= 0:
            raise UsageError(f"{card}: flops_per_step is {flops}, must be above 0")
        return flops

    def folder(self, name: str, seed: int) -> Path:
        """Of a run."""
        return self.places.work / f"{name}-{seed}"

    def _store(self, name: str) -> Path | str:
        source = self.suite.stores[name]
        return source if _is_phantoms(source) else self.places.work / f"{name}.h5"

    def _needs(self, text: str, seed: int | None = None) -> tuple[str, ...]:
        """The jobs that make the stores and runs named in a text."""
        seed = self.suite.first if seed is None else seed
        real = [n for n, source in self.suite.stores.items() if not _is_phantoms(source)]
        return (
            *(f"prepare:{name}" for name in real if f"{{{name}}}" in text),
            *(f"pretrain:{name}:{seed}" for name in self.suite.runs if f"{{{name}}}" in text),
        )

    def _sources(self, needs: Sequence[str]) -> dict[str, Path]:
        """The stores and runs that jobs make, by name."""
        found = {}
        for need in needs:
            kind, name, *seed = need.split(":")
            found[name] = Path(self._store(name)) if kind == "prepare" else self.folder(name, int(seed[0]))
        return found


def _located(words: list[str], root: Path) -> tuple[list[str], list[str]]:
    """What follows `ssl3d prepare`, with paths below the root; and those that are not there.

    Words from the first flag on are options.
    """
    flags = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    paths = [root / word for word in words[:flags]]
    return [*map(str, paths), *words[flags:]], [str(path) for path in paths if not path.exists()]


def _is_phantoms(source: str) -> bool:
    return source.split(":")[0] == PHANTOMS


def _card(folder: Path) -> Path:
    return folder / "encoder" / "encoder.json"
