"""How fast masks are predicted, beside MONAI's and nnU-Net's sliding windows with the same network.

python benchmarks/scripts/speed_predict.py [--encoder resenc] [--shape 96 192 192] [--patch 48 96 96]
    [--classes 3] [--repeats 3] [--flip]

Every row predicts one scan of random voxels with the same weights, windows (half of each is shared with the
next) and Gaussian, in a process of its own: `seconds` is the fastest of several calls, `memory` what the
process took at most beyond what it had before. `ssl3d` runs in the precision that a model is kept with
(bf16 for segmentation), `ssl3d fp32` in single precision, as the peers do on a CPU: MONAI has no autocast
of its own, and nnU-Net turns it off there. `agree` is the share of voxels whose label is that of `ssl3d
fp32`. The last lines say where the time of `ssl3d` goes. Rows of nnU-Net and MONAI need nnunetv2 and monai.
With other work on the machine take --clock cpu and --threads 1, which counts processor time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
METHODS = ("ssl3d fp32", "ssl3d", "monai", "nnunet")


class Logits(nn.Module):
    """The network as the peers take it: logits of the finest step alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (B, K, D, H, W) of (B, C, D, H, W)."""
        logits: Tensor = self.network(x)[0]
        return logits


def network_of(arguments: argparse.Namespace) -> nn.Module:
    """Build the network with the weights of a seed, as fine-tuning does."""
    from ssl3d.api import (
        SegmentationNetwork,
        encoder_from,
        memory_format,
        segmentation_head,
        to_memory_format,
    )

    torch.manual_seed(0)
    encoder = encoder_from(f"scratch:{arguments.encoder}", seed=0)
    network = SegmentationNetwork(encoder, segmentation_head("unet", encoder, arguments.classes)).eval()
    layout = memory_format(encoder, "cpu")
    return network if layout is torch.contiguous_format else to_memory_format(network, layout)


def by_ssl3d(network: nn.Module, image: Tensor, arguments: argparse.Namespace, precision: str) -> Any:
    """Predict as `ssl3d predict` does, slab by slab, and return labels and the seconds of each part."""
    clock = CLOCKS[arguments.clock]
    from ssl3d.api import autocast, best_class, predict_slabs

    spent = {"network": 0.0}

    def run(x: Tensor) -> Tensor:
        began = clock()
        with autocast(torch.device("cpu"), precision):
            probability: Tensor = network(x)[0].float().softmax(dim=1)
        spent["network"] += clock() - began
        return probability

    slabs = predict_slabs(
        run, lambda first, depth: image[:, first : first + depth], image.shape[1:], arguments.patch, 0.5, 4,
        (0, 1, 2) if arguments.flip else (),
    )  # fmt: skip
    began = clock()
    with torch.inference_mode():
        labels = torch.cat([best_class(slab) for slab in slabs])
    spent["the rest (blending, labels)"] = clock() - began - spent["network"]
    return labels, spent


def by_monai(network: nn.Module, image: Tensor, arguments: argparse.Namespace) -> Any:
    """Predict by MONAI's `sliding_window_inference`."""
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        logits: Any = sliding_window_inference(
            image[None], tuple(arguments.patch), 4, Logits(network), overlap=0.5, mode="gaussian"
        )
        return logits[0].argmax(dim=0), {}


def by_nnunet(network: nn.Module, image: Tensor, arguments: argparse.Namespace) -> Any:
    """Predict by nnU-Net's predictor."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_gaussian=True, use_mirroring=arguments.flip,
        perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False,
    )  # fmt: skip
    predictor.network = Logits(network)
    predictor.allowed_mirroring_axes = (0, 1, 2) if arguments.flip else None
    predictor.configuration_manager = SimpleNamespace(patch_size=tuple(arguments.patch))
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=arguments.classes)
    with torch.inference_mode():
        return predictor.predict_sliding_window_return_logits(image).argmax(dim=0), {}


def measure(arguments: argparse.Namespace) -> None:
    """Measure one method, write its labels, and print what it took as JSON."""
    torch.set_num_threads(arguments.threads)
    clock = CLOCKS[arguments.clock]
    network = network_of(arguments)
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, *arguments.shape)).astype(np.float32))
    calls: dict[str, Callable[[], Any]] = {
        "ssl3d": lambda: by_ssl3d(network, image, arguments, "bf16"),
        "ssl3d fp32": lambda: by_ssl3d(network, image, arguments, "32"),
        "monai": lambda: by_monai(network, image, arguments),
        "nnunet": lambda: by_nnunet(network, image, arguments),
    }
    with torch.inference_mode():
        network(image[(slice(None), *(slice(side) for side in arguments.patch))][None])  # warms up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best, spent, labels = float("inf"), {}, torch.empty(0)
    for _ in range(arguments.repeats):
        began = clock()
        labels, parts = calls[arguments.method]()
        seconds = clock() - began
        if seconds < best:
            best, spent = seconds, parts
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    np.save(arguments.labels, labels.numpy().astype(np.int16))
    print(json.dumps({"seconds": best, "memory": memory * 1024, "spent": spent}))


def main() -> None:
    """Measure every method in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--encoder", default="resenc")
    parser.add_argument("--shape", type=int, nargs=3, default=(96, 192, 192))
    parser.add_argument("--patch", type=int, nargs=3, default=(48, 96, 96))
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--labels", type=Path)
    arguments = parser.parse_args()
    if arguments.method:
        measure(arguments)
        return
    rows, labels = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            if (
                method in ("monai", "nnunet")
                and find_spec({"nnunet": "nnunetv2"}.get(method, method)) is None
            ):
                continue
            file = Path(folder) / "labels.npy"
            words = [sys.executable, __file__, *sys.argv[1:], "--method", method, "--labels", str(file)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                print(f"{method}: {done.stderr.strip().splitlines()[-1]}")
                continue
            rows[method] = json.loads(done.stdout.strip().splitlines()[-1])
            labels[method] = np.load(file)
    first = rows["ssl3d fp32"]["seconds"]
    size = " x ".join(map(str, arguments.shape))
    print(f"{arguments.encoder}, one scan of {size}, windows of {' x '.join(map(str, arguments.patch))}, "
          f"{arguments.threads} threads")  # fmt: skip
    print(f"{'':12} {'seconds':>8} {'memory':>9} {'speed':>6} {'agree':>7}")
    for method, row in rows.items():
        agree = float((labels[method] == labels["ssl3d fp32"]).mean())
        seconds, memory = row["seconds"], row["memory"] / 1e6
        print(f"{method:12} {seconds:8.2f} {memory:6.0f} MB {first / seconds:6.2f} {agree:7.4f}")
    if "nnunet" in rows:
        print(
            f"ssl3d is {rows['nnunet']['seconds'] / rows['ssl3d']['seconds']:.2f} times as fast as nnU-Net"
        )
    for method in ("ssl3d", "ssl3d fp32"):
        with contextlib.suppress(ZeroDivisionError):
            total = sum(rows[method]["spent"].values())
            shares = ", ".join(
                f"{name} {value / total:.0%}" for name, value in rows[method]["spent"].items()
            )
            print(f"time of {method}: {shares}")


if __name__ == "__main__":
    main()
