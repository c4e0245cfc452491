"""Every registered proxy at the same budget: step time, volumes per second, peak memory, training FLOPs.

python benchmarks/scripts/speed_proxies.py [--data phantoms:64] [--proxies NAME ...] [--crops 64]
    [--encoder scratch:resnet18:acs:width=32] [--steps 6] [--rounds 3] [--precision bf16] [--json FILE]

The budget is what passes through the encoder in a step: as many voxels as --crops crops of 32 x 32 x 32
have, counted at the encoder's input, both views included. Each proxy takes as many volumes as that allows,
with crops of 32 x 32 x 32 (slices of 64 x 64, cubes of 18 x 18 x 18) and its defaults beside.

Every measurement is made in a fresh process, the proxies taking turns for --rounds rounds, each round
beginning with another one; medians are printed. A step is forward, backward, clipping, update and
`after_step`, on batches drawn beforehand; drawing them, and `setup` with `start_epoch` (clustering, words),
are timed apart. Memory is the peak of the process (VmHWM; CUDA: the allocator's), and that less what it
held before its first step. FLOPs are those of forward and backward, as torch counts them: products and
convolutions only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

CROP = 32**3

# Where the default is another size; a `crop` of three sides is 32 x 32 x 32 in any case.
OPTIONS: dict[str, dict[str, Any]] = {
    "cube_ordering": {"crop": (48, 48, 48)},  # 2 x 2 x 2 cubes of 18: 24 less gap and jitter
    "sorting": {"crop": (64, 64)},
    "intra_inter": {"plane": (64, 64)},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms, print a table and write JSON."""
    names = sorted(point.name for point in entry_points(group="ssl3d.proxies"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["phantoms:64"])
    parser.add_argument("--proxies", nargs="+", default=names, choices=names)
    parser.add_argument(
        "--crops", type=int, default=64, help="crops of 32 x 32 x 32 that go through the encoder in a step"
    )
    parser.add_argument("--encoder", default="scratch:resnet18:acs:width=32")
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after 2 untimed ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "32"), default="bf16")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="the measurements as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        # What a plugin prints must not be taken for the answer.
        with contextlib.redirect_stdout(sys.stderr):
            result = measure(options.worker, options)
        print(json.dumps(result))
        return
    given = list(sys.argv[1:] if argv is None else argv)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in options.proxies}
    for turn in range(options.rounds):
        first = turn % len(options.proxies)
        for name in options.proxies[first:] + options.proxies[:first]:
            command = [sys.executable, str(Path(__file__).resolve()), *given, "--worker", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr.strip()}")
            measured[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            step = 1e3 * measured[name][-1]["step_s"]
            print(
                f"round {turn + 1} of {options.rounds}, {name}: {step:.0f} ms", file=sys.stderr, flush=True
            )
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in measured.items()
    }
    report(medians, options)
    if options.json:
        content = {
            "options": {k: v for k, v in vars(options).items() if k not in ("json", "worker")},
            "machine": machine(options.device),
            "measured": measured,
            "medians": medians,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def config_of(name: str, cls: Any) -> Any:
    """Make the options of the size that the budget is counted in."""
    own = dict(OPTIONS.get(name, {}))
    if "crop" not in own and len(getattr(cls.Config(), "crop", ())) == 3:
        own["crop"] = (32, 32, 32)
    return cls.Config(**own)


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one proxy in this process."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ssl3d.api import BatchRng, Loader, encoder_from, open_data

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    data = open_data(options.data)
    (point,) = entry_points(group="ssl3d.proxies", name=name)
    cls = point.load()
    config = config_of(name, cls)
    encoder = encoder_from(options.encoder)
    voxels = 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal voxels
        voxels += inputs[0].shape[0] * inputs[0][0, 0].numel()

    hook = encoder.register_forward_pre_hook(count)
    torch.manual_seed(0)
    proxy = cls(config, encoder)

    def loader(volumes: int, steps: int) -> Any:
        return Loader(data, {name: (cls, config)}, volumes, steps=steps, pin=False)

    # Setting up, as before the first epoch, with a batch size that cannot be known yet.
    start = clock()
    proxy.setup(data)
    proxy.to(device).train()
    proxy.start_epoch(0, _Once(loader(8, 1), name, device))
    prepared = clock() - start

    def loss_of(batch: Any, step: int) -> Any:
        """Compute the loss of a batch's groups, weighted by their examples, as in `ssl3d pretrain`."""
        groups = [group.to(device) for group in batch.groups]
        rngs = [BatchRng(step, group.rows, group.total, device) for group in groups]
        with torch.autocast(device.type, torch.bfloat16, options.precision == "bf16"):
            if proxy.mixed:
                return proxy([group.tensors for group in groups], rngs).loss
            total = sum(len(group.rows) for group in groups)
            pairs = zip(groups, rngs, strict=True)
            return sum(proxy(group.tensors, rng).loss * (len(group.rows) / total) for group, rng in pairs)

    # How many voxels a volume costs: of two, without a gradient.
    voxels = 0
    buffers = {key: value.clone() for key, value in proxy.named_buffers()}
    with torch.no_grad():
        loss_of(next(iter(loader(2, 1))), 0)
        for key, value in proxy.named_buffers():
            value.copy_(buffers[key])
    volumes = max(2, round(options.crops * CROP / (voxels / 2)))

    start = clock()
    batches = list(loader(volumes, options.steps + 2))
    drawing = (clock() - start) / len(batches)

    optimizer = torch.optim.AdamW([p for p in proxy.parameters() if p.requires_grad], lr=1e-4)
    held = memory(device)
    seconds, flops, passed = [], 0, 0
    for step, batch in enumerate(batches):
        batch = batch.to(device)
        torch.manual_seed(step)
        synchronize(device)
        voxels, start = 0, clock()
        counter = FlopCounterMode(display=False)
        with counter if step == 0 else contextlib.nullcontext():
            loss_of(batch, step).backward()
        torch.nn.utils.clip_grad_norm_(proxy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        proxy.after_step(step, 1000)
        synchronize(device)
        seconds.append(clock() - start)
        if step == 0:
            flops, passed = counter.get_total_flops(), voxels
            hook.remove()
    peak = memory(device)
    return {
        "volumes": volumes,
        "voxels": passed,
        "step_s": statistics.median(seconds[2:]),
        "volumes_per_s": volumes / statistics.median(seconds[2:]),
        "draw_s": drawing,
        "prepare_s": prepared,
        "peak_mb": peak,
        "step_mb": peak - held,
        "flops": flops,
    }


class _Once:
    """An iterable of every volume once, as `Proxy.start_epoch` gets it."""

    def __init__(self, loader: Any, name: str, device: Any) -> None:
        self.loader, self.name, self.device = loader, name, device

    def __iter__(self) -> Any:
        for batch in self.loader.once(self.name, key=("epoch", 0)):
            yield [group.tensors for group in batch.to(self.device).groups]


def memory(device: Any) -> float:
    """Read the peak memory so far, MB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def synchronize(device: Any) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def machine(device: str) -> str:
    """Name the machine that the numbers were taken on."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def report(medians: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    """Print the table of the medians."""
    from ssl3d.api import print_table

    rows = [
        [
            name,
            f"{row['volumes']:.0f}",
            f"{row['voxels'] / CROP:.1f}",
            f"{1e3 * row['step_s']:.0f}",
            f"{row['volumes_per_s']:.1f}",
            f"{row['flops'] / 1e9:.1f}",
            f"{row['peak_mb']:.0f}",
            f"{row['step_mb']:.0f}",
            f"{1e3 * row['draw_s']:.0f}",
            f"{row['prepare_s']:.1f}",
        ]
        for name, row in sorted(medians.items(), key=lambda item: item[1]["step_s"])
    ]
    print(
        f"{options.encoder}, {options.precision}, {' '.join(options.data)}, {machine(options.device)}; "
        f"{options.clock} time, medians of {options.rounds} rounds of {options.steps} steps"
    )
    head = ["", "volumes", "crops", "step, ms", "volumes/s", "GFLOPs", "peak, MB", "of the step, MB"]
    print_table(rows, [*head, "draw, ms", "prepare, s"])


if __name__ == "__main__":
    main()
