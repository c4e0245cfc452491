"""How fast an encoder trains, as a share of this machine's own matrix-product rate.

python benchmarks/scripts/speed_encoder.py [--kinds 3d acs] [--widths 64 32] [--sizes 28]
    [--norms batch group]

Each line is one training step (forward and backward, no optimizer), the fastest of several, beside the
rate of a 2048 x 2048 matrix product measured just before it in the same process at the same precision.
`GFLOP/s` counts multiply-adds as two, over all taps of each kernel (as torch.utils.flop_counter does; for
acs the nine taps of the 2D kernels); `in data` leaves out the taps that fall on the padding, which a good
convolution skips: at 28 voxels they are a third of all. In fp32 the share can exceed 1 where the matrix
product (MKL) uses narrower vectors than the convolutions (oneDNN), as on AMD processors. With other work
on the machine take --clock cpu and one thread, which counts processor time.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

DTYPES = ("bf16", "fp32")


@dataclass
class Timing:
    """Timing of one encoder, a line of the table."""

    seconds: float
    matrix: float
    nominal: float
    in_data: float

    @property
    def share(self) -> float:
        """Share of the matrix-product rate, all taps counted."""
        return self.nominal / self.seconds / self.matrix

    @property
    def share_in_data(self) -> float:
        """Share of the matrix-product rate, without the taps on the padding."""
        return self.in_data / self.seconds / self.matrix


def fastest(call: Callable[[], object], clock: Callable[[], float], repeats: int) -> float:
    """Measure the seconds of the fastest call, after two to warm up."""
    call(), call()
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        call()
        best = min(best, clock() - start)
    return best


def count(encoder: Any, x: Any) -> tuple[float, float]:
    """Count the operations of a training step's convolutions, over all taps and over those in the data.

    Three products per convolution: output, input gradient (none for the first layer) and weight gradient.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    totals = [0.0, 0.0]

    def inside(size: int, kernel: int, stride: int, padding: int, out: int) -> int:
        """Count pairs of output and tap, along one axis, that read the data and not the padding."""
        return sum(0 <= o * stride - padding + k < size for o in range(out) for k in range(kernel))

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func._schema.name == "aten::convolution":
                data, weight, _, stride, padding = args[:5]
                products = 2 if data.shape[1] == x.shape[1] and data.shape[2:] == x.shape[2:] else 3
                rows = 2.0 * products * out.shape[0] * weight.shape[0] * weight.shape[1]
                nominal = in_data = rows
                for size, kernel, step, pad, length in zip(
                    data.shape[2:], weight.shape[2:], stride, padding, out.shape[2:], strict=True
                ):
                    nominal *= kernel * length
                    in_data *= inside(size, kernel, step, pad, length)
                totals[0] += nominal
                totals[1] += in_data
            return out

    with Counter():
        encoder(x)
    return totals[0], totals[1]


def measure(
    encoder: Any, x: Any, dtype: Any, channels_last: bool | None, clock: Callable[[], float], repeats: int
) -> Timing:
    """Measure training steps of `encoder` on `x`; `channels_last` None leaves the choice to the encoder."""
    import torch

    from ssl3d.api import to_memory_format

    if channels_last is not None:
        to_memory_format(encoder, torch.channels_last_3d if channels_last else torch.contiguous_format)
    a, b = (torch.randn(2048, 2048, device=x.device).to(dtype) for _ in range(2))
    on_gpu = x.device.type == "cuda"

    def product() -> None:
        a @ b
        if on_gpu:
            torch.cuda.synchronize()

    def autocast() -> AbstractContextManager[Any]:
        return nullcontext() if dtype == torch.float32 else torch.autocast(x.device.type, dtype)

    def step() -> None:
        encoder.zero_grad(set_to_none=True)
        with autocast():
            loss = encoder.embed(x).float().square().mean()
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()

    nominal, in_data = count(encoder, x)  # in fp32, where nothing is padded beforehand
    matrix = 2 * 2048**3 / fastest(product, clock, repeats)
    return Timing(fastest(step, clock, repeats), matrix, nominal, in_data)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--kinds", nargs="+", default=["3d", "acs"])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--sizes", type=int, nargs="+", default=[28])
    parser.add_argument("--depth", type=int, help="depth of the input; default: its height and width")
    parser.add_argument("--norms", nargs="+", default=["batch", "group"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--formats", nargs="+", choices=["last", "first", "auto"], default=["last", "first"]
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)

    import torch

    from ssl3d.api import encoder_from

    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    print(
        f"{options.encoder}, batch {options.batch}, {torch.get_num_threads()} threads, {options.clock} time"
        f", torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.device}"
    )
    print("kind  width  size  norm      type  channels   ms/step  GFLOP/s  share  in data  matrix GFLOP/s")
    grid = itertools.product(
        options.kinds, options.widths, options.sizes, options.norms, options.dtypes, options.formats
    )
    for kind, width, size, norm, dtype, layout in grid:
        encoder = encoder_from(f"scratch:{options.encoder}:{kind}:width={width}:norm={norm}").train()
        encoder = encoder.to(options.device)
        depth = size if options.depth is None else options.depth
        x = torch.randn(options.batch, 1, depth, size, size, device=options.device)
        timing = measure(
            encoder,
            x,
            torch.bfloat16 if dtype == "bf16" else torch.float32,
            {"last": True, "first": False, "auto": None}[layout],
            clock,
            options.repeats,
        )
        print(
            f"{kind:<5} {width:>5}  {size:>4}  {norm:<8}  {dtype}  {layout:<8}"
            f"  {1e3 * timing.seconds:>8.1f}  {timing.nominal / timing.seconds / 1e9:>7.0f}"
            f"  {timing.share:>5.2f}  {timing.share_in_data:>7.2f}  {timing.matrix / 1e9:>14.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
