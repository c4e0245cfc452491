"""The README's first table: three proxies at equal training FLOPs, probed on subjects they have not seen.

    python benchmarks/first_table.py --data-root ../shared/data --out benchmarks/results/first

Every step is a command that it prints and that can be typed by hand; a step whose result is there is not
done again, so the script can be stopped anywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ENCODER = ["--encoder", "resnet18", "--resnet18.kind", "acs", "--resnet18.width", "32"]
STORES = {
    "hippocampus": ["hippocampus"],
    "cardiac": ["cardiac/patients.csv"],
    "adrenal": ["adrenalmnist3d/adrenalmnist3d.npz"],
    "pneumonia": ["pneumonia/pneumoniamnist.npz"],
}
# The reference step is 64 crops of 32^3: SimCLR's two views of 32 subjects.
CROPS = {
    "hippocampus": ["32", "32", "32"],
    "cardiac": ["8", "64", "64"],  # 6 to 18 slices of 10 mm
    "adrenal": ["28", "28", "28"],
    "pneumonia": ["1", "28", "28"],
}
PROXIES = {
    "simclr": ["--batch-size", "32"],
    "barlow_twins": ["--batch-size", "32"],
    "sorting": ["--batch-size", "16", "--sorting.slices", "8"],
}
# ACDC: few slices, and headers whose direction is not to be trusted.
CARDIAC_SORTING = [
    *("--batch-size", "8", "--sorting.slices", "6"),
    *("--sorting.crop", "128", "128", "--sorting.direction", "either"),
]
IMAGES = ["--batch-size", "256"]  # a 28 x 28 image costs a fortieth of a crop
# What each store is pretrained with. Order means nothing on shape masks, and an image has no slices.
PRETRAIN = {
    "hippocampus": ["simclr", "barlow_twins", "sorting"],
    "cardiac": ["simclr", "barlow_twins", "sorting"],
    "adrenal": ["simclr", "barlow_twins"],
    "pneumonia": ["simclr", "barlow_twins"],
}
# Task -> store, runs, options of the probe.
PROBES: dict[str, tuple[str, list[str], list[str]]] = {
    "hippocampus": ("hippocampus", ["hippocampus"], ["--target", "masks"]),
    "cardiac": ("cardiac", ["cardiac"], ["--target", "masks", "--precision", "bf16"]),
    # Slice by slice: what was trained on slices alone, seen as it was trained.
    "cardiac_slices": (
        "cardiac",
        ["cardiac"],
        ["--target", "masks", "--precision", "bf16", "--recalibrate", "no", "--window", "1", "192", "192"],
    ),
    "diagnosis": ("cardiac", ["cardiac"], ["--target", "classes", "--pool-subject", "concat"]),
    "adrenal": ("adrenal", ["adrenal", "hippocampus"], ["--target", "classes"]),
    "pneumonia": ("pneumonia", ["pneumonia", "hippocampus"], ["--target", "classes"]),
}


def main() -> None:
    """Prepares, pretrains, probes."""
    parser = argparse.ArgumentParser(description="The first table, from the shared data.")
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/first"), help="stores and runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/first"), help="records")
    parser.add_argument("--steps", type=int, default=200, help="SimCLR's steps of 64 crops of 32 cubed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.data_root.is_dir():
        sys.exit(f"first_table: {options.data_root} is missing; name the data with --data-root")
    for name, sources in STORES.items():
        if not (options.work / f"{name}.h5").exists():
            paths = [str(options.data_root / source) for source in sources]
            ssl3d("prepare", *paths, "--out", options.work / f"{name}.h5")
    budget = options.steps * flops(options.work, "hippocampus", "simclr", options.seed)
    for store, proxies in PRETRAIN.items():
        for proxy in proxies:
            run = options.work / f"{store}-{proxy}-{options.seed}"
            if not (run / "encoder" / "encoder.json").exists():
                steps = round(budget / flops(options.work, store, proxy, options.seed))
                if (run / "config.yaml").exists():
                    ssl3d("pretrain", "--resume", run)
                else:
                    ssl3d("pretrain", *pretrain(options.work, store, proxy, run, steps, options.seed))
    for task, (store, sources, words) in PROBES.items():
        runs = [options.work / f"{s}-{p}-{options.seed}" for s in sources for p in PRETRAIN[s]]
        out = options.out / task
        if not (out / "table.txt").exists():
            ssl3d("linear-probe", *runs, "--data", options.work / f"{store}.h5", "--out", out, *words)


def pretrain(work: Path, store: str, proxy: str, run: Path, steps: int, seed: int) -> list[object]:
    """Words after `ssl3d pretrain`."""
    crop: list[str] = []
    if proxy != "sorting":
        crop = [f"--{proxy}.crop", *CROPS[store]]
    batch = IMAGES if store == "pneumonia" else PROXIES[proxy]
    if (store, proxy) == ("cardiac", "sorting"):
        batch = CARDIAC_SORTING
    words: list[object] = ["--proxy", proxy, "--data", work / f"{store}.h5", "--steps", steps, "--out", run]
    return [*words, *ENCODER, *batch, *crop, "--save-at", "0", "0.25", "0.5", "--seed", seed]


def flops(work: Path, store: str, proxy: str, seed: int) -> int:
    """Training FLOPs of one step, as a run of one step measures them."""
    run = work / f"flops-{store}-{proxy}"
    card = run / "encoder" / "encoder.json"
    if not card.exists():
        words = pretrain(work, store, proxy, run, 1, seed)
        ssl3d("pretrain", *words, "--eval-every", "-1", "--overwrite")
    return int(json.loads(card.read_text(encoding="utf-8"))["compute"]["flops_per_step"])


def ssl3d(*words: object) -> None:
    """Runs one command, or ends."""
    argv = [str(word) for word in words]
    print("$ ssl3d", *argv, flush=True)
    done = subprocess.run([sys.executable, "-m", "ssl3d", *argv])
    if done.returncode:
        sys.exit(f"first_table: ssl3d {argv[0]} ended with status {done.returncode}")


if __name__ == "__main__":
    main()
