"""How fast SimCLR pretrains large 3D encoders on one device and on several, beside the stock recipe.

python benchmarks/scripts/speed_gpu.py [--encoders resnet50 vit_b] [--sizes 96 128] [--devices 1 8]
    [--sides ssl3d compiled stock] [--batch 16] [--out benchmarks/results/speed_gpu.json]

`ssl3d` is `ssl3d pretrain` as a user calls it: reading, views on the device, loss, optimizer and log;
`compiled` is that with --compile. `stock` is MONAI's network of the same kind, torchio's views in worker
processes, lightly's projection head and NT-Xent loss, torch's AdamW and DistributedDataParallel, in the
same precision, on volumes that lie in memory already. Seconds of a step are the median after the first
`--warmup` steps. MFU is the FLOPs of a step (forward and backward, by torch.utils.flop_counter, views not
counted) per second, over the device's own rate: that of its data sheet for those in `PEAKS`, else that of
a large matrix product measured just before. Memory is the peak of a device, on a CPU of the process.

The measurements go into a file, one entry for each encoder, size, number of devices and side; what was
there before stays. The page docs/explanation/speed.md shows them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""FLOP/s of dense bf16 matrix products by the data sheet, for devices whose name has such a part."""
ENCODERS: dict[str, dict[str, Any]] = {
    "resnet50": {"encoder": "resnet50", "resnet50": {"kind": "3d", "stem_pool": True}},
    "vit_b": {"encoder": "vit", "vit": {"patch": [16, 16, 16], "width": 768, "layers": 12, "heads": 12}},
    "tiny_resnet": {
        "encoder": "resnet10",
        "resnet10": {"kind": "3d", "width": 4, "stem_stride": [1, 1, 1], "stem_pool": True},
    },
    "tiny_vit": {"encoder": "vit", "vit": {"patch": [8, 8, 8], "width": 24, "layers": 4, "heads": 2}},
}
SIDES = ("ssl3d", "compiled", "stock")
OUT = Path(__file__).parents[1] / "results" / "speed_gpu.json"


def launched(devices: int, words: list[str]) -> list[str]:
    """Return the command that starts `python words` in one process for each device."""
    if devices == 1:
        return [sys.executable, *words]
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
    return [sys.executable, *run, *words]


def done(command: list[str]) -> str:
    """Run a command and return what it printed; show that, and end, if it fails."""
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{ended.stdout[-2000:]}{ended.stderr[-4000:]}")
    return ended.stdout


def measure_ours(name: str, size: int, devices: int, options: argparse.Namespace, side: str) -> dict:
    """Measure `ssl3d pretrain` as a user starts it."""
    chosen = {k: dict(v) if isinstance(v, dict) else v for k, v in ENCODERS[name].items()}
    if chosen["encoder"] == "vit":
        chosen["vit"]["grid"] = [size // side_ for side_ in chosen["vit"]["patch"]]
    steps = options.warmup + options.steps
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "proxy": "simclr", "data": [f"phantoms:{options.volumes}"], "steps": steps,
            "workers": options.workers,
            "batch_size": options.batch * devices, "precision": options.precision, "eval_every": -1,
            "checkpoint_every": steps + 1, "compile": side == "compiled", "device": options.device,
            "subjects": "all", "holdout": 0.0, "simclr": {"crop": [size] * 3}, **chosen,
        }  # fmt: skip
        config, out = Path(folder, "config.yaml"), Path(folder, "run")
        config.write_text(json.dumps(values), encoding="utf-8")
        done(launched(devices, ["-m", "ssl3d", "pretrain", "--config", str(config), "--out", str(out)]))
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines][options.warmup :]
        compute = json.loads((out / "encoder" / "encoder.json").read_text(encoding="utf-8"))["compute"]
    return {
        "seconds": statistics.median(record["seconds"] for record in records),
        "waiting": statistics.median(record["waiting"] for record in records),
        "flops": compute["flops_per_step"],
        "memory": compute["peak_memory"],
    }


def measure_stock(name: str, size: int, devices: int, options: argparse.Namespace) -> dict:
    """Measure the stock recipe, in processes of its own."""
    words = [__file__, "--one", name, str(size)]
    for flag in ("batch", "steps", "warmup", "workers", "device", "precision"):
        words += [f"--{flag}", str(getattr(options, flag))]
    output = done(launched(devices, words))
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"seconds"')))


def stock(name: str, size: int, options: argparse.Namespace) -> None:
    """Train by the stock recipe in this process, and print its measurements from the first rank."""
    import torch
    import torch.distributed as dist
    import torchio
    from lightly.loss import NTXentLoss
    from lightly.models.modules.heads import SimCLRProjectionHead
    from torch import nn
    from torch.utils.data import DataLoader, Dataset
    from torch.utils.flop_counter import FlopCounterMode

    from ssl3d.api import device_of, peak_memory

    several = "WORLD_SIZE" in os.environ
    kind = device_of(options.device)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
    if several:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")

    class Pairs(Dataset):
        """Two views of a volume, by torchio, as its documentation has them."""

        def __init__(self, count: int) -> None:
            self.count, self.volume = count, torch.rand(1, size, size, size)
            self.views = torchio.Compose([
                torchio.RandomAffine(scales=0.1, degrees=10), torchio.RandomBlur(0.7),
                torchio.RandomNoise(std=0.1), torchio.RandomBiasField(0.2), torchio.RandomGamma(0.3),
            ])  # fmt: skip

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            return self.views(self.volume), self.views(self.volume)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, width = stock_encoder(name, size)
            self.head = SimCLRProjectionHead(width, 512, 128)

        def forward(self, x: Any) -> Any:
            features = self.encoder(x)
            tokens = features[0] if isinstance(features, tuple) else features
            return self.head(tokens.mean(1) if tokens.ndim == 3 else tokens)

    network: Any = Network().to(device)
    module = nn.parallel.DistributedDataParallel(network) if several else network
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    loss_of = NTXentLoss(0.2, gather_distributed=several)
    count = options.warmup + options.steps
    loader = DataLoader(
        Pairs(count * options.batch), options.batch, num_workers=options.workers, pin_memory=kind == "cuda"
    )
    seconds: list[float] = []
    counter = FlopCounterMode(display=False)
    began = time.perf_counter()
    for step, (a, b) in enumerate(loader):
        x = torch.cat([a, b]).to(device, non_blocking=True)
        with counter if step == 0 else torch.enable_grad():
            with torch.autocast(kind, torch.bfloat16, enabled=options.precision == "bf16"):
                projected = module(x)
            first, second = projected.float().chunk(2)
            loss = loss_of(first, second)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss)  # as a log of every step wants it; it waits for the device
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    world = dist.get_world_size() if several else 1
    if not several or dist.get_rank() == 0:
        measured = {
            "seconds": statistics.median(seconds[options.warmup :]),
            "flops": counter.get_total_flops() * world,
            "memory": peak_memory(device),
        }
        print(json.dumps(measured), flush=True)
    if several:
        dist.barrier()
        dist.destroy_process_group()


def stock_encoder(name: str, size: int) -> tuple[Any, int]:
    """Make MONAI's network of an encoder's kind, and say how long its embedding is."""
    from monai.networks.nets import ResNet, ViT

    own = ENCODERS[name]
    if own["encoder"] == "vit":
        vit = own["vit"]
        layers, heads, width = vit["layers"], vit["heads"], vit["width"]
        return ViT(1, [size] * 3, vit["patch"], width, 4 * width, layers, heads), width
    if own["encoder"] == "resnet50":
        planes = [64, 128, 256, 512]
        network = ResNet("bottleneck", [3, 4, 6, 3], planes, 3, 1, 7, 2, feed_forward=False)
        return network, 2048
    return ResNet("basic", [1, 1, 1, 1], [4, 8, 16, 32], 3, 1, 7, 1, feed_forward=False), 32


def matrix_rate(options: argparse.Namespace) -> tuple[str, float]:
    """Return the name of the device, and the FLOP/s of its data sheet or of a large matrix product."""
    import torch

    from ssl3d.api import device_of

    kind = device_of(options.device)
    name = torch.cuda.get_device_name() if kind == "cuda" else kind
    for part, rate in PEAKS.items():
        if part in name and options.precision == "bf16":
            return name, rate
    side = 8192 if kind == "cuda" else 1024
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    a = torch.ones(side, side, device=kind, dtype=dtype)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return name, 2 * side**3 / min(times)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoders", nargs="+", choices=list(ENCODERS), default=["resnet50", "vit_b"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128])
    parser.add_argument("--devices", type=int, nargs="+", default=[1])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch", type=int, default=16, help="volumes per device and step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--volumes", type=int, default=64, help="phantoms to read")
    parser.add_argument("--workers", type=int, default=8, help="processes that read, for each device")
    parser.add_argument("--precision", choices=["32", "bf16"], default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", nargs=2, metavar=("ENCODER", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        stock(options.one[0], int(options.one[1]), options)
        return
    device, peak = matrix_rate(options)
    print(f"{device}, {peak / 1e12:.3g} TFLOP/s, precision {options.precision}, batch {options.batch}")
    print("encoder      size  devices  side      ms/step  volumes/s    MFU  memory MB")
    kept = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    grid = itertools.product(options.encoders, options.sizes, options.devices, options.sides)
    for name, size, devices, side in grid:
        if side == "stock":
            row = measure_stock(name, size, devices, options)
        else:
            row = measure_ours(name, size, devices, options, side)
        row |= {
            "device": device,
            "precision": options.precision,
            "batch": options.batch,
            "volumes_per_s": options.batch * devices / row["seconds"],
            "mfu": row["flops"] / row["seconds"] / devices / peak,
        }
        kept[f"{name} {size} {devices} {side}"] = row
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(
            f"{name:<12} {size:>4}  {devices:>7}  {side:<8}  {1e3 * row['seconds']:>7.1f}"
            f"  {row['volumes_per_s']:>9.3g}  {row['mfu']:>5.2f}  {row['memory'] / 1e6:>9.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
