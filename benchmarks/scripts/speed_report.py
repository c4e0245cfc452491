"""How long `ssl3d leaderboard report` takes on many records, how much memory, and how large its page is.

python benchmarks/scripts/speed_report.py [--contestants 50] [--tasks 20] [--subjects 2000] [--seeds 1]
    [--keep FOLDER]

The records are made up: the same subjects for every contestant of a task, some easy and some hard, and
contestants that are a little better or worse. The tasks are in turn segmentation (Dice of three classes),
two classes, four classes and regression. Six contestants are ImageNet conversions, one is the untrained
network of five seeds, one needs no network. The report runs in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import Benchmark, Result, write_result

Array = NDArray[Any]

UNTRAINED_SEEDS = 5
CONVERSIONS = 6
KINDS = ("masks", "two", "four", "real")
MAIN = {"masks": "dice", "two": "auc", "four": "auc", "real": "r2"}


def protocol(kind: str) -> Benchmark:
    """Build the linear probe of a kind of target."""
    from ssl3d_benchmarks.linear_probe.config import LinearProbeConfig
    from ssl3d_benchmarks.linear_probe.protocol import LinearProbe

    classes = {"masks": 4, "two": 2, "four": 4}.get(kind, 0)
    target = {"masks": "masks", "real": "real"}.get(kind, "classes")
    return LinearProbe(LinearProbeConfig(target=target, classes=tuple(map(str, range(classes)))))


def contestants(count: int, seeds: int) -> list[dict[str, Any]]:
    """Describe the contestants, each as often as it has seeds."""
    rows = []
    for k in range(count - CONVERSIONS - 2):
        rows += [contestant(f"runs/method{k:02d}-{seed}", "encoder", proxy=f"method{k:02d}", seed=seed)
                 for seed in range(seeds)]  # fmt: skip
    rows += [contestant(f"imagenet:network{k}:acs", "encoder") for k in range(CONVERSIONS)]
    rows += [contestant(f"scratch:resnet18, seed {k}", "untrained", seed=k) for k in range(UNTRAINED_SEEDS)]
    return [*rows, contestant("intensities and position", "trivial")]


def contestant(name: str, kind: str, proxy: str = "", seed: int = 0) -> dict[str, Any]:
    """Describe one contestant as a benchmark does."""
    pretraining: dict[str, Any] = {}
    if proxy:
        pretraining = {
            "proxies": {proxy: {}}, "steps": 1000, "seed": seed, "batch_size": 16, "optimizer": "adamw",
            "lr": 1e-3, "patch": [32, 32, 32],
            "compute": {"flops_per_step": 10**12, "seconds": 3600 + seed, "peak_memory": 4 * 10**9},
            "data": {"volumes": 500, "datasets": ["scans"], "digest": "d"},
        }  # fmt: skip
    return {
        "name": name, "kind": kind, "digest": name, "source": name,
        "group": "" if kind == "trivial" else "scratch:resnet18", "architecture": {"name": "resnet18"},
        "pretraining": pretraining,
        "norm_recalibrated": False, "weights_seed": seed if kind == "untrained" else None,
    }  # fmt: skip


def predictions(kind: str, dataset: str, subjects: int, skill: float, rng: Any) -> list[dict[str, Any]]:
    """Make up the predictions of one contestant."""
    people = np.random.default_rng(7)  # the same for all contestants
    ease, target = people.normal(size=subjects), people.random(subjects)
    own = rng.normal(size=subjects)
    rows: list[dict[str, Any]] = [
        {"dataset": dataset, "subject": f"subject{k:05d}", "id": f"volume{k:05d}"} for k in range(subjects)
    ]
    if kind == "masks":
        dice = 1 / (1 + np.exp(-(1 + ease + skill + 0.3 * own)))
        for row, value in zip(rows, dice, strict=True):
            row["dice"] = {"1": float(value), "2": float(value**2), "3": float(value**3)}
        return rows
    if kind == "real":
        for row, truth, error in zip(rows, target, own, strict=True):
            row["target"], row["prediction"] = float(truth), float(truth + 0.3 * (1 - skill) * error)
        return rows
    classes = {"two": 2, "four": 4}[kind]
    truth = (classes * target).astype(int)
    logits = rng.normal(size=(subjects, classes))
    logits[np.arange(subjects), truth] += 1 + skill + ease
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, name, values in zip(rows, truth, share, strict=True):
        row["target"], row["probability"] = str(name), [float(value) for value in values]
    return rows


def write_records(folder: Path, count: int, tasks: int, subjects: int, seeds: int) -> int:
    """Write the records of all contestants on all tasks, and return how many there are."""
    written = 0
    for task in range(tasks):
        kind, dataset = KINDS[task % len(KINDS)], f"data{task:02d}"
        benchmark = protocol(kind)
        for who in contestants(count, seeds):
            rng = np.random.default_rng([task, *who["name"].encode()])
            skill = -0.5 if who["kind"] == "trivial" else 0.2 * rng.normal()
            rows = predictions(kind, dataset, subjects, skill, rng)
            clusters, functions = benchmark.score_functions(rows)
            ones = np.ones((1, len(clusters)))
            result = Result(
                f"linear-probe/{benchmark.config.target}", 1, [dataset], f"data of {dataset}",
                {"how": "house split", "train": {"subjects": 1000, "of_subjects": 1000, "volumes": 1000},
                 "test": {"subjects": subjects, "volumes": subjects}},
                "split", 1.0, 0, 0, who,
                {"target": benchmark.config.target, "classes": list(benchmark.config.classes),
                 "fractions": "all", "rates": []},
                MAIN[kind], {name: float(score(ones)[0]) for name, score in functions.items()},
                predictions=rows,
                flags={"seen_test_subjects": 0, "seen_test_volumes": 0, "saw_labels": False,
                       "ranked": True},
            )  # fmt: skip
            write_result(result, folder / dataset)
            written += 1
    return written


def main() -> None:
    """Make the records, run the report, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--contestants", type=int, default=50)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--subjects", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1, help="seeds of every pretrained contestant")
    parser.add_argument("--keep", type=Path, help="folder for the records, used again if it is there")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        records = folder / "records"
        if not records.exists():
            write_records(
                records, arguments.contestants, arguments.tasks, arguments.subjects, arguments.seeds
            )
        began = time.perf_counter()
        out = folder / "report"
        words = ["leaderboard", "report", str(records), "--out", str(out)]
        subprocess.run(
            [sys.executable, "-m", "ssl3d", *words], check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        files = list(records.rglob("*.json"))
        size = sum(path.stat().st_size for path in files)
        print(f"{len(files)} records of {size / 1e6:.0f} MB")
        print(
            f"{time.perf_counter() - began:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of processor time"
        )
        print(f"{used.ru_maxrss / 2**20:.2f} GB of memory at most")
        for path in sorted(out.iterdir()):
            print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
