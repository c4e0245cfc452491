"""How long augmentations take: batched on the device against torchio's equivalents crop by crop.

python benchmarks/scripts/speed_views.py [--sizes 32 96] [--batch 16] [--device cpu] [--seconds 1]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

# Each of our augmentations, and the torchio transform that does the like.
PAIRS: dict[str, tuple[dict[str, float], str, dict[str, Any]]] = {
    "flip": ({"flip": 0.5}, "RandomFlip", {"axes": (0, 1, 2)}),
    "affine": (
        {"rotate": 15.0, "scale": 0.2},
        "RandomAffine",
        {"scales": (0.83, 1.2), "degrees": 15},
    ),
    "blur": ({"blur": 0.7}, "RandomBlur", {"std": (0, 0.7)}),
    "bias": ({"bias": 0.2}, "RandomBiasField", {"coefficients": 0.2}),
    "gamma": ({"gamma": 0.5}, "RandomGamma", {"log_gamma": 0.4}),
    "contrast": ({"contrast": 0.3}, "", {}),
    "noise": ({"noise": 0.2}, "RandomNoise", {"std": (0, 0.2)}),
    "cutout": ({"cutout": 0.4}, "", {}),
}


def _milliseconds(call: Callable[[], object], seconds: float) -> float:
    call()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 2:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return 1e3 * sorted(times)[len(times) // 2]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per measurement")
    options = parser.parse_args(argv)

    import SimpleITK as sitk
    import torch
    import torchio

    from ssl3d.api import BatchRng, Views, augment, view_margin

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    off = {f.name: 0.0 for f in dataclasses.fields(Views) if f.name not in ("chance", "torchio")}
    threads = torch.get_num_threads()
    print(f"batch {options.batch}, {options.device}, {threads} thread(s), torch {torch.__version__}")
    print("ms per crop, every example augmented (torchio: one crop at a time, on the CPU)\n")
    print(f"{'size':>5} {'augmentation':>14} {'ours':>8} {'torchio':>8} {'ratio':>6}")

    def ours(views: Views, x: torch.Tensor, size: tuple[int, int, int]) -> None:
        rng = BatchRng(0, range(len(x)), len(x), options.device)
        if augment(views, x, rng, size).is_cuda:
            torch.cuda.synchronize()

    for side in options.sizes:
        size = (side, side, side)
        rows: list[tuple[str, Views, str, dict[str, Any]]] = [
            (name, Views(**{**off, "chance": 1.0, **mine}), transform, arguments)  # type: ignore[arg-type]
            for name, (mine, transform, arguments) in PAIRS.items()
        ]
        for name, views, transform, arguments in [*rows, ("all defaults", Views(), "", {})]:
            margin = view_margin(views, size)
            x = torch.randn(options.batch, 1, *(n + 2 * m for n, m in zip(size, margin, strict=True)))
            call = partial(ours, views, x.to(options.device), size)
            batched = _milliseconds(call, options.seconds) / options.batch
            other, ratio = "", ""
            if transform:
                theirs = getattr(torchio, transform)(copy=False, **arguments)
                single = _milliseconds(partial(theirs, torch.randn(1, *size)), options.seconds)
                other, ratio = f"{single:.2f}", f"{single / batched:.1f}x"
            print(f"{side:>5} {name:>14} {batched:>8.2f} {other:>8} {ratio:>6}", flush=True)


if __name__ == "__main__":
    main()
