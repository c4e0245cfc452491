"""SortingLoss against SimCLR on slices: step time, peak memory, and with --train-steps the quality.

python benchmarks/scripts/speed_sorting_vs_simclr.py [--data phantoms:32] [--volumes 8]
    [--slices 8] [--crop 64] [--encoder scratch:resnet18:acs:width=32]
    [--steps 8] [--rounds 3] [--train-steps 0] [--out DIR]

The paper (arXiv:2203.09372) claims that sorting is 2x faster and needs 1.5x less memory than SimCLR on a
par in quality. What "the same" means decides, so SimCLR is measured twice: on the same slices, of which it
needs two views each and so twice the passes through the encoder; and on half of the slices, with the same
passes. Same encoder, volumes, slice size, precision and optimizer, views of default strength; every
measurement in a fresh process, contestants taking turns for --rounds rounds; medians are printed. Time is
of forward, backward and update on batches drawn beforehand; drawing is timed on its own. Memory is the
peak of the process (VmHWM; CUDA: the allocator's), and that less what it held before its first step.

With --train-steps N each is pretrained for N steps by `ssl3d pretrain`, and `ssl3d linear-probe` scores
them side by side with untrained encoders.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

CONTESTANTS = {
    "sorting": "sorting",
    "simclr, same slices": "simclr",
    "simclr, same passes": "simclr",
}


def slices_of(contestant: str, slices: int) -> int:
    """Count the slices per volume that a contestant draws."""
    return slices // 2 if contestant.endswith("same passes") else slices


def passes_of(contestant: str, volumes: int, slices: int) -> int:
    """Count the slices that go through the encoder in a step."""
    return volumes * slices_of(contestant, slices) * (1 if contestant == "sorting" else 2)


def flags_of(contestant: str, slices: int, crop: int) -> dict[str, Any]:
    """Return the options of the proxy."""
    count = slices_of(contestant, slices)
    if contestant == "sorting":
        return {"slices": count, "crop": (crop, crop)}
    return {"views": "slices", "per_volume": count, "plane": (crop, crop)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["phantoms:32"])
    parser.add_argument("--volumes", type=int, default=8, help="volumes per step")
    parser.add_argument("--slices", type=int, default=8, help="slices per volume, an even number")
    parser.add_argument("--crop", type=int, default=64, help="side of the slices")
    parser.add_argument("--encoder", default="scratch:resnet18:acs:width=32")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after 2 untimed ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--train-steps", type=int, default=0, help="steps of pretraining, for the quality")
    parser.add_argument(
        "--out", type=Path, help="folder for runs and probe; a temporary folder if left out"
    )
    parser.add_argument("--json", type=Path, help="the measurements as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.slices % 2:
        parser.error(f"--slices {options.slices}: must be even, to halve it")
    if options.worker:
        print(json.dumps(measure(options.worker, options)))
        return
    given = list(sys.argv[1:] if argv is None else argv)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for turn in range(options.rounds):
        names = list(CONTESTANTS)
        for name in names[turn % 3 :] + names[: turn % 3]:
            command = [sys.executable, str(Path(__file__).resolve()), *given, "--worker", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            measured[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in measured.items()
    }
    report(medians, options)
    if options.json:
        content = {
            "options": vars(options) | {"out": None, "json": None},
            "machine": platform.processor() or platform.machine(),
            "measured": measured,
            "medians": medians,
        }
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if options.train_steps:
        with tempfile.TemporaryDirectory() as temporary:
            quality(options, options.out or Path(temporary))


def measure(contestant: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one contestant in this process: seconds per step, of drawing, and memory in MB."""
    import torch

    from ssl3d.api import BatchRng, encoder_from, numpy_rng, open_data

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    volumes = open_data(options.data)
    (point,) = entry_points(group="ssl3d.proxies", name=CONTESTANTS[contestant])
    cls = point.load()
    config = cls.Config(**flags_of(contestant, options.slices, options.crop))
    encoder = encoder_from(options.encoder)
    torch.manual_seed(0)
    proxy = cls(config, encoder).to(device).train()
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=1e-4)
    people = {code: n for n, code in enumerate(dict.fromkeys(volumes.subject_codes.tolist()))}

    start, batches = clock(), []
    for step in range(options.steps + 2):
        chosen = numpy_rng("speed", step).permutation(len(volumes))[: options.volumes]
        drawn = [cls.draw(config, volumes[int(i)], numpy_rng("speed", step, int(i))) for i in chosen]
        batch = {key: torch.stack([example[key] for example in drawn]) for key in drawn[0]}
        batch["subject"] = torch.tensor([people[int(volumes.subject_codes[i])] for i in chosen])
        batch["index"] = torch.as_tensor(chosen)
        batch["dataset"] = torch.zeros(len(chosen), dtype=torch.int64)
        batches.append(batch)
    drawing = (clock() - start) / len(batches)

    held = memory(device)
    seconds = []
    for step, batch in enumerate(batches):
        moved = {key: value.to(device) for key, value in batch.items()}
        synchronize(device)
        start = clock()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            output = proxy(moved, BatchRng(step, range(len(batch["index"])), len(batch["index"]), device))
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        optimizer.step()
        synchronize(device)
        seconds.append(clock() - start)
    peak = memory(device)
    return {
        "step_s": statistics.median(seconds[2:]),
        "draw_s": drawing,
        "peak_mb": peak,
        "step_mb": peak - held,
    }


def memory(device: Any) -> float:
    """Read the peak memory so far, MB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        line = next(
            line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
        )
        return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def report(medians: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    from ssl3d.api import print_table

    own = medians["sorting"]
    rows = []
    for name, row in medians.items():
        passes = passes_of(name, options.volumes, options.slices)
        rows.append(
            [
                name,
                str(options.volumes * slices_of(name, options.slices)),
                str(passes),
                f"{1e3 * row['step_s']:.0f}",
                f"{row['step_s'] / own['step_s']:.2f}",
                f"{1e3 * row['step_s'] / passes:.2f}",
                f"{1e3 * row['draw_s']:.0f}",
                f"{row['peak_mb']:.0f}",
                f"{row['peak_mb'] / own['peak_mb']:.2f}",
                f"{row['step_mb']:.0f}",
                f"{row['step_mb'] / max(own['step_mb'], 1e-9):.2f}",
            ]
        )
    print(
        f"{options.encoder}, {options.volumes} volumes a step of {' '.join(options.data)}, slices of "
        f"{options.crop} x {options.crop}, {'bf16' if options.bf16 else 'fp32'}, {options.device}; "
        f"{options.clock} time, medians of {options.rounds} rounds of {options.steps} steps"
    )
    head = ["", "slices", "passes", "step, ms", "x sorting", "ms/pass", "draw, ms"]
    print_table(rows, [*head, "peak, MB", "x sorting", "of the step, MB", "x sorting"])


def quality(options: argparse.Namespace, out: Path) -> None:
    """Pretrain every contestant alike, and probe them side by side."""
    name, *words = options.encoder.removeprefix("scratch:").split(":")
    encoder = ["--encoder", name]
    for word in words:
        key, equals, value = word.partition("=")
        key, value = (key, value) if equals else ("kind", word)
        encoder += [f"--{name}.{key.replace('_', '-')}", *value.split(",")]
    runs = []
    for contestant, proxy in CONTESTANTS.items():
        run = out / contestant.replace(", ", "-").replace(" ", "-")
        flags: list[str] = []
        for key, value in flags_of(contestant, options.slices, options.crop).items():
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{proxy}.{key.replace('_', '-')}", *map(str, values)]
        command = ["pretrain", "--proxy", proxy, *encoder, *flags, "--data", *options.data]
        command += [
            "--steps",
            str(options.train_steps),
            "--batch-size",
            str(options.volumes),
            "--lr",
            "0.001",
        ]
        start = time.perf_counter()
        ssl3d([*command, "--out", str(run), "--overwrite", "--eval-every", "-1"])
        print(
            f"{contestant}: {options.train_steps} steps in {time.perf_counter() - start:.0f} s", flush=True
        )
        runs.append(str(run))
    print(ssl3d(["linear-probe", *runs, "--data", *options.data, "--out", str(out / "probe")]))


def ssl3d(words: Sequence[str]) -> str:
    """Run a command of ssl3d in a fresh process, and return what it printed."""
    done = subprocess.run([sys.executable, "-m", "ssl3d", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ssl3d {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
