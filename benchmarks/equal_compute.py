"""Pretrains the runs of a suite with the same training FLOPs each, and probes their encoders.

    python benchmarks/equal_compute.py benchmarks/suites/first.yaml --data-root ../shared/data

Every step is a command that it prints and that can be typed by hand; a step whose result is there is not
done again, so the script can be stopped anywhere.

A suite is a YAML file:

    encoder: --encoder resnet18 ...           # of every run that names none
    reference: {run: NAME, steps: 200}        # whose FLOPs every run spends
    stores: {NAME: SOURCE [--FLAG ...], ...}  # what `ssl3d prepare` makes of the data root
    runs: {NAME: --proxy ... --data {STORE} ..., ...}     # what follows `ssl3d pretrain`
    probes:                                   # what follows `ssl3d linear-probe`
      NAME: {runs: [PATTERN, ...], encoders: [imagenet:..., ...], options: --data {STORE} ..., curve: true}

`{root}` is the folder of the data, `{RUN}` that of a run. With `curve`, the encoders at 25 and 50 % of the
budget are probed too, in a folder of their own.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Suite:
    """A suite file and where its runs lie.

    Attributes:
        content: Of the file.
        work: Folder of stores and runs.
        root: Of the data.
        seed: Of pretraining; part of a run's name.
    """

    content: dict[str, Any]
    work: Path
    root: Path
    seed: int
    _budget: int = field(default=0)

    def words(self, text: str) -> list[str]:
        """Splits a command's words, {NAME} made the path of that store or run, {root} that of the data."""
        places = {name: str(self.folder(name)) for name in self.content["runs"]}
        places |= {name: str(self.work / f"{name}.h5") for name in self.content["stores"]}
        return [word.format(root=self.root, **places) for word in shlex.split(text)]

    def prepare(self) -> None:
        """Makes the stores that are not there."""
        for name, sources in self.content["stores"].items():
            out = self.work / f"{name}.h5"
            if not out.exists():
                words = shlex.split(sources)
                count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
                ssl3d("prepare", *(self.root / s for s in words[:count]), *words[count:], "--out", out)

    def folder(self, name: str) -> Path:
        """Of a run."""
        return self.work / f"{name}-{self.seed}"

    def pretrain(self, name: str) -> None:
        """Does a run, or the rest of it."""
        run = self.folder(name)
        if (run / "encoder" / "encoder.json").exists():
            return
        if (run / "checkpoints").exists():
            ssl3d("pretrain", "--resume", run)
            return
        if not self._budget:
            reference = self.content["reference"]
            self._budget = int(reference["steps"]) * self.flops(reference["run"])
        steps = max(1, round(self._budget / self.flops(name)))
        ssl3d(
            "pretrain",
            *self.command(name, steps),
            "--out",
            run,
            "--save-at",
            "0",
            "0.25",
            "0.5",
            "--overwrite",
        )

    def command(self, name: str, steps: int) -> list[object]:
        """What follows `ssl3d pretrain`."""
        words = self.words(self.content["runs"][name])
        encoder = [] if "--encoder" in words else self.words(self.content["encoder"])
        return [*words, *encoder, "--steps", steps, "--seed", self.seed]

    def flops(self, name: str) -> int:
        """Training FLOPs of one step, as a run of one step measures them."""
        run = self.work / f"flops-{name}"
        card = run / "encoder" / "encoder.json"
        if not card.exists():
            ssl3d("pretrain", *self.command(name, 1), "--eval-every", "-1", "--out", run, "--overwrite")
        return int(json.loads(card.read_text(encoding="utf-8"))["compute"]["flops_per_step"])

    def probe(self, name: str, out: Path) -> None:
        """Probes the encoders of a task, and what they were on the way."""
        task = self.content["probes"][name]
        runs = [n for n in self.content["runs"] if any(fnmatch.fnmatch(n, p) for p in task["runs"])]
        folders = [self.folder(run) for run in runs]
        options = self.words(task["options"])
        others = [word for spec in task.get("encoders", ()) for word in self.words(spec)]
        ssl3d("linear-probe", *folders, *others, *options, "--out", out / name)
        if task.get("curve"):
            # The first is every run's: untrained, of this seed.
            marks = [folders[0] / "encoder-at-00"]
            marks += [folder / f"encoder-at-{share}" for folder in folders for share in (25, 50)]
            shown = ["--untrained", "0", "--recalibrate", "no"]
            ssl3d("linear-probe", *marks, *options, *shown, "--out", out / f"{name}-curve")


def ssl3d(*words: object) -> None:
    """Runs one command, or ends."""
    argv = [str(word) for word in words]
    print("$ ssl3d", shlex.join(argv), flush=True)
    done = subprocess.run([sys.executable, "-m", "ssl3d", *argv])
    if done.returncode:
        sys.exit(f"equal_compute: ssl3d {argv[0]} ended with status {done.returncode}")


def main() -> None:
    """Prepares, pretrains, probes."""
    parser = argparse.ArgumentParser(description="Runs a suite at equal training FLOPs.")
    parser.add_argument("suite", type=Path)
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, help="stores and runs; default runs/SUITE")
    parser.add_argument("--out", type=Path, help="records; default benchmarks/results/SUITE")
    parser.add_argument("--seed", type=int, default=0, help="of pretraining")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="runs and probes to do")
    options = parser.parse_args()
    if not options.data_root.is_dir():
        sys.exit(f"equal_compute: {options.data_root} is missing; name the data with --data-root")
    content = yaml.safe_load(options.suite.read_text(encoding="utf-8"))
    work = options.work or Path("runs") / options.suite.stem
    out = options.out or Path("benchmarks/results") / options.suite.stem
    suite = Suite(content, work, options.data_root, options.seed)
    suite.prepare()
    for name in content["runs"]:
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
            suite.pretrain(name)
    for name in content["probes"]:
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
            suite.probe(name, out)


if __name__ == "__main__":
    main()
