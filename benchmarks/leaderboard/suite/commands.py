"""Commands of a suite's runs and stores, and where both lie."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ssl3d.api import UsageError, parse_json
from ssl3d_benchmarks.leaderboard.suite.suite import Suite

PHANTOMS = "phantoms"


@dataclass(frozen=True)
class Places:
    """Folders that a suite reads and writes.

    Attributes:
        root: Root of the data.
        work: Folder of the stores and runs.
        out: Folder of the records, which has a folder for each task.
    """

    root: Path
    work: Path
    out: Path


@dataclass(frozen=True)
class SuiteCommands:
    """Words of a suite as commands, with names of stores and runs replaced by paths.

    Attributes:
        suite: Suite whose words they are.
        places: Folders of its data, stores, runs and records.
    """

    suite: Suite
    places: Places

    def words(
        self, text: str, seed: int | None = None, meant: bool = False, fold: int | None = None
    ) -> list[str]:
        """Split a command's words: {STORE} becomes its path, {RUN} its folder, {root} that of the data.

        Args:
            text: Text of the suite.
            seed: Seed of the runs that the text names; the first of the suite if None.
            meant: Whether names stand for paths: what is meant, wherever the folders lie.
            fold: Fold of the runs that the text names; None for those of all folds, whose folders have
                `{fold}` for its number.

        Raises:
            UsageError: There is no such store or run.
        """
        seed = self.suite.first if seed is None else seed
        places = {name: str(self.run_folder(name, seed, fold)) for name in self.suite.runs}
        places |= {name: str(self.store(name)) for name in self.suite.stores}
        places["root"] = str(self.places.root)
        if meant:
            places = {
                name: place if is_phantoms(place) else f"{{{name}}}" for name, place in places.items()
            }
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(
                f"suite {self.suite.name}: {text!r} cannot be split into words: {error}"
            ) from error
        try:
            return [word.format(**places) for word in words]
        except (KeyError, IndexError, ValueError) as error:
            there = ", ".join(sorted({*self.suite.runs, *self.suite.stores}))
            raise UsageError(
                f"suite {self.suite.name}: {text!r}: {error} names no store and no run: there are {there}"
            ) from error

    def pretraining(
        self, name: str, steps: int | None, seed: int, meant: bool = False, fold: int | None = None
    ) -> list[str]:
        """Return the words of a run that follow `ssl3d pretrain`."""
        words = self.words(self.suite.runs[name], seed, meant, fold)
        encoder = [] if "--encoder" in words else self.words(self.suite.encoder, meant=meant)
        length = [] if steps is None else ["--steps", str(steps)]
        left_out = [] if fold is None else ["--leave-out", f"{fold}/{self.suite.folds}"]
        return [*words, *encoder, *length, *left_out, "--seed", str(seed)]

    def steps(self, name: str) -> int | None:
        """Compute a run's steps from the budget and the measured cost of a step; None without a budget."""
        budget = self.suite.budget
        if not budget:
            return None
        flops = (
            float(budget["flops"])
            if "flops" in budget
            else int(budget["steps"]) * self._flops_per_step(budget["run"])
        )
        return max(1, round(flops / self._flops_per_step(name)))

    def _flops_per_step(self, name: str) -> int:
        card = card_of(self.measured_folder(name))
        try:
            flops = int(parse_json(card.read_text(encoding="utf-8"))["compute"]["flops_per_step"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{card} has no number flops_per_step, the cost of a step") from error
        if flops <= 0:
            raise UsageError(f"{card}: flops_per_step is {flops}, must be above 0")
        return flops

    def beginning(self, name: str) -> str:
        """Return what decides the weights that a run begins with, beside the seed."""
        words = self.pretraining(name, None, 0)
        if "--init" in words:
            return name
        return " ".join(words[words.index("--encoder") :]) if "--encoder" in words else ""

    def plugin_files(self) -> list[str]:
        """List the files and module:Class of encoders that the suite's runs name."""
        files: dict[str, None] = {}
        for name in self.suite.runs:
            words = [part for word in self.pretraining(name, None, 0) for part in word.split("=", 1)]
            for flag, word in pairwise(words):
                if flag == "--encoder" and (".py" in word or ":" in word):
                    files[word] = None
        return list(files)

    @property
    def folds(self) -> tuple[int | None, ...]:
        """Folds that every run is done for; None alone, where there is no cross-validation."""
        return tuple(range(self.suite.folds)) or (None,)

    def run_folder(self, name: str, seed: int, fold: int | None = None) -> Path:
        """Return the folder of a run at one seed, and of a fold; with `{fold}` where none is given."""
        of_fold = f"-fold{'{fold}' if fold is None else fold}" if self.suite.folds else ""
        return self.places.work / f"{name}-{seed}{of_fold}"

    def cards(self, name: str, seed: int, folder: str = "encoder") -> tuple[Path, ...]:
        """Return the cards of a run's encoder, one for each fold."""
        return tuple(self.run_folder(name, seed, fold) / folder / "encoder.json" for fold in self.folds)

    def measured_folder(self, name: str) -> Path:
        """Return the folder of the one step of a run whose FLOPs are counted."""
        return self.places.work / f"flops-{name}"

    def store(self, name: str) -> Path | str:
        """Return the path of a store, or the words of phantoms, which are made without one."""
        source = self.suite.stores[name]
        return source if is_phantoms(source) else self.places.work / f"{name}.h5"

    def needs(self, text: str, seed: int | None = None, fold: int | None = None) -> tuple[str, ...]:
        """Name the jobs that make the stores and runs named in a text; of all folds if none is given."""
        seed = self.suite.first if seed is None else seed
        real = [name for name, source in self.suite.stores.items() if not is_phantoms(source)]
        return (
            *(f"prepare:{name}" for name in real if f"{{{name}}}" in text),
            *(
                need
                for name in self.suite.runs
                if f"{{{name}}}" in text
                for need in self.pretrained(name, seed, fold)
            ),
        )

    def pretrained(self, name: str, seed: int, fold: int | None = None) -> tuple[str, ...]:
        """Name the jobs that make a run: one, or one for each fold."""
        folds = self.folds if fold is None else (fold,)
        return tuple(f"pretrain:{name}:{seed}" + ("" if k is None else f":{k}") for k in folds)

    def sources(self, needs: Sequence[str]) -> dict[str, Path]:
        """Return the paths of the stores and runs that jobs make, by name."""
        sources = {}
        for need in needs:
            kind, name, *run = need.split(":")
            sources[name] = (
                Path(self.store(name)) if kind == "prepare" else self.run_folder(name, *map(int, run))
            )
        return sources


def is_phantoms(source: str) -> bool:
    """Return whether a store of a suite is phantoms, which need no preparation."""
    return source.split(":")[0] == PHANTOMS


def card_of(folder: Path) -> Path:
    """Return the card of a run's encoder, which is there once the run is done."""
    return folder / "encoder" / "encoder.json"
