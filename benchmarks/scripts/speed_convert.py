"""Converted networks against the 2D network they were and against plain 3D: parameters, time, memory.

python benchmarks/scripts/speed_convert.py [--networks resnet18 mobilenet_v2] [--depths 9 28] [--size 64]
    [--kinds 2d acs soft-acs 2.5d i3d p3d triplanar 3d] [--batch 4] [--rounds 3] [--json FILE]

All see the same voxels, --batch volumes of --depths slices of --size x --size in three channels, and train
one step: forward to the mean over the deepest map, and backward. `2d` is the 2D network itself, on the
slices as a batch of pictures; `3d` is what replacing its layers by torch's Conv3d, BatchNorm3d and 3D pools
gives, with full kernels. Every measurement is made in a fresh process, the arms taking turns for --rounds
rounds, each round beginning with another one; medians are printed, and the time as a multiple of the 2D
network's. Memory is what the steps added to the process at their peak (VmHWM; CUDA: the allocator's).
Weights are random: they change none of this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = ("2d", "acs", "soft-acs", "2.5d", "i3d", "p3d", "triplanar", "3d")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all arms, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--depths", nargs="+", type=int, default=[9, 28])
    parser.add_argument(
        "--size", type=int, default=64, help="side of a slice; smaller ones vanish in the strides"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="timed steps, of which the fastest counts, after an untimed one",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "32"), default="32")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="the measurements as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        network, kind, depth = options.worker.split(",")
        # What a library prints must not be taken for the answer.
        with contextlib.redirect_stdout(sys.stderr):
            result = measure(network, kind, int(depth), options)
        print(json.dumps(result))
        return
    given = list(sys.argv[1:] if argv is None else argv)
    arms = [f"{n},{k},{d}" for n in options.networks for d in options.depths for k in options.kinds]
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    for turn in range(options.rounds):
        first = turn % len(arms)
        for arm in arms[first:] + arms[:first]:
            command = [sys.executable, str(Path(__file__).resolve()), *given, "--worker", arm]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{arm}: {done.stderr.strip()}")
            measured[arm].append(json.loads(done.stdout.strip().splitlines()[-1]))
            step = 1e3 * measured[arm][-1]["step_s"]
            print(
                f"round {turn + 1} of {options.rounds}, {arm}: {step:.0f} ms", file=sys.stderr, flush=True
            )
    medians = {
        arm: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for arm, results in measured.items()
    }
    import torch

    threads = options.threads or torch.get_num_threads()
    machine = (
        f"torch {torch.__version__}, {options.device}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{threads} threads, {platform.machine()}"
    )
    report(medians, options, machine)
    if options.json:
        content = {
            "options": {k: v for k, v in vars(options).items() if k not in ("json", "worker")},
            "machine": machine,
            "measured": measured,
            "medians": medians,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def report(medians: dict[str, dict[str, float]], options: argparse.Namespace, machine: str) -> None:
    """Print the table of the medians."""
    precision = "bf16" if options.precision == "bf16" else "fp32"
    print(
        f"{options.batch} volumes of D x {options.size} x {options.size}, {precision}, {options.clock} "
        f"time, median of {options.rounds}; {machine}"
    )
    print("network           slices  kind        parameters   ms/step   x 2D   MB added")
    for arm, row in medians.items():
        network, kind, depth = arm.split(",")
        flat = medians.get(f"{network},2d,{depth}")
        times = f"{row['step_s'] / flat['step_s']:6.2f}" if flat else "     -"
        print(
            f"{network:<16}  {depth:>6}  {kind:<10}  {int(row['parameters']):>10,}"
            f"  {1e3 * row['step_s']:>8.0f}  {times}  {row['added_mb']:>8.0f}"
        )


def measure(network: str, kind: str, depth: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure one arm in this process."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = make(network, kind).to(device).train()
    x = torch.randn(options.batch, 3, depth, options.size, options.size, device=device)
    if kind == "2d":
        x = x.movedim(2, 1).flatten(0, 1)
    x = x.contiguous(memory_format=torch.channels_last if kind == "2d" else torch.channels_last_3d)
    if kind == "2d":
        model = model.to(memory_format=torch.channels_last)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            y = model(x)
            loss = y.float().flatten(2).mean(2).square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    before = peak(device, reset=True)
    step()
    seconds = []
    for _ in range(options.steps):
        start = clock()
        step()
        seconds.append(clock() - start)
    return {
        "step_s": min(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "added_mb": peak(device) - before,
    }


def make(network: str, kind: str) -> Any:
    """Make a module from the input to the deepest map."""
    from torch import nn

    from ssl3d.api import ConvertedConfig, ConvertedEncoder, network_2d

    class Deepest(nn.Module):
        def __init__(self, encoder: nn.Module):
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Any) -> Any:
            return self.encoder(x)[-1]

    if kind in ("2d", "3d"):
        net = network_2d(network)
        inner = net.features if hasattr(net, "features") else nn.Sequential(*list(net.children())[:-2])
        return inner if kind == "2d" else plain_3d(inner)
    return Deepest(ConvertedEncoder(ConvertedConfig(network=network, kind=kind, in_channels=3)))


def plain_3d(module: Any) -> Any:
    """Replace a network's 2D layers by torch's 3D ones, in place."""
    from torch import nn

    def threefold(value: Any) -> tuple[int, int, int]:
        height, width = value if isinstance(value, tuple) else (value, value)
        return (min(height, width), height, width)

    for name, child in module.named_children():
        new: Any = None
        if isinstance(child, nn.Conv2d):
            new = nn.Conv3d(
                child.in_channels, child.out_channels, threefold(child.kernel_size),
                threefold(child.stride), threefold(child.padding), threefold(child.dilation),
                child.groups, child.bias is not None,
            )  # fmt: skip
        elif isinstance(child, nn.BatchNorm2d):
            new = nn.BatchNorm3d(child.num_features, child.eps, child.momentum)
        elif isinstance(child, nn.MaxPool2d | nn.AvgPool2d):
            pool: Any = nn.MaxPool3d if isinstance(child, nn.MaxPool2d) else nn.AvgPool3d
            new = pool(threefold(child.kernel_size), threefold(child.stride), threefold(child.padding))
        if new is None:
            plain_3d(child)
        else:
            setattr(module, name, new)
    return module


def peak(device: Any, reset: bool = False) -> float:
    """Read the peak memory so far, MB; it is counted anew where that can be."""
    import torch

    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 1e6
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3


if __name__ == "__main__":
    main()
