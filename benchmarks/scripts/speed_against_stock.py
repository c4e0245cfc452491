"""A SimCLR step of ssl3d beside the stock recipe: MONAI's ResNet-18, torchio's views, lightly's loss.

python benchmarks/scripts/speed_against_stock.py [--sizes 32 64] [--batch 8] [--rounds 3] [--clock cpu]
    [--threads 1] [--data phantoms:16]

The stock recipe is what one writes in an afternoon: a ResNet-18 of MONAI's architecture (first convolution
7 x 7 x 7 of stride 1, max-pool, basic blocks, 64 to 512 channels) in float32, whose layers are written anew
here, random crops augmented twice by torchio, lightly's NTXentLoss and projection head, AdamW. The rows:

    stock           that recipe
    same network    `simclr` of ssl3d with kernels, widths, strides and head of the stock recipe, in bf16
    own stem        the same with ssl3d's first convolution, of stride 2 and without a max-pool
    acs             ssl3d's default kind of convolution, with its own stem

All rows take turns in one process. `step` is forward, backward and update of one batch, `views` what is
spent on drawing and augmenting it; both are medians over the rounds, the first of which does not count.
`share` is the rate of the step's products as a share of a 2048 x 2048 matrix product in the row's own
precision, measured in the same run: where both shares are equal, the ratio is that of the two precisions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl3d.api import BatchRng, Loader, open_data, plugins, print_table


class BasicBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv3d(before, width, 1, stride, bias=False), nn.BatchNorm3d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block's output."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        out: Tensor = (y + self.shortcut(x)).relu()
        return out


def stock_network() -> nn.Module:
    """Build MONAI's ResNet-18 for volumes of one channel, to the pooled features (B, 512)."""
    blocks = [BasicBlock(64, 64, 1), BasicBlock(64, 64, 1)]
    for width in (128, 256, 512):
        blocks += [BasicBlock(width // 2, width, 2), BasicBlock(width, width, 1)]
    return nn.Sequential(
        nn.Conv3d(1, 64, 7, 1, 3, bias=False), nn.BatchNorm3d(64), nn.ReLU(), nn.MaxPool3d(3, 2, 1),
        *blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(),
    )  # fmt: skip


class Stock:
    """The recipe that one writes by hand."""

    precision = torch.float32

    def __init__(self, data: Any, size: int) -> None:
        import torchio as tio
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        torch.manual_seed(0)
        self.network = nn.Sequential(stock_network(), SimCLRProjectionHead(512, 512, 128))
        self.loss = NTXentLoss(temperature=0.2)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        self.volumes = [tio.ScalarImage(tensor=volume.read()) for volume in data]
        self.views = tio.Compose([
            tio.CropOrPad(size), tio.RandomFlip(axes=(0, 1, 2)),
            tio.RandomAffine(scales=0.1, degrees=10, translation=4),
            tio.RandomGamma(), tio.RandomNoise(), tio.RandomBlur((0, 1)),
        ])  # fmt: skip
        self.rng = np.random.default_rng(0)

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Draw two views of so many volumes."""
        chosen = self.rng.choice(len(self.volumes), batch, replace=False)
        first, second = (
            torch.stack([self.views(self.volumes[k]).data.float() for k in chosen]) for _ in range(2)
        )
        return first, second

    def step(self, views: tuple[Tensor, Tensor], number: int) -> None:
        """Train the network for one step."""
        first, second = self.network(torch.cat(views)).chunk(2)
        self.loss(first, second).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Ours:
    """`simclr` of ssl3d, with the options of an encoder."""

    precision = torch.bfloat16

    def __init__(self, data: Any, size: int, **encoder: Any) -> None:
        from ssl3d.api import memory_format, to_memory_format

        network = plugins.load("ssl3d.encoders", "resnet18")
        self.proxy_class = plugins.load("ssl3d.proxies", "simclr")
        self.config = self.proxy_class.Config(crop=(size,) * 3)
        torch.manual_seed(0)
        built = network(network.Config(width=64, **encoder))
        proxy = self.proxy_class(self.config, built).train()
        layout = memory_format(built, "cpu")
        self.network = proxy if layout is torch.contiguous_format else to_memory_format(proxy, layout)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        self.data = data

    def draw(self, batch: int) -> Any:
        """Draw a batch; its views are made in the step, where they count."""
        proxies = {"simclr": (self.proxy_class, self.config)}
        return next(iter(Loader(self.data, proxies, batch, steps=1, pin=False)))

    def step(self, batch: Any, number: int) -> None:
        """Train the network for one step."""
        (group,) = batch.groups
        rng = BatchRng(number, group.rows, group.total, "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.network(group.tensors, rng).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


ROWS: dict[str, Callable[[Any, int], Any]] = {
    "stock": Stock,
    "same network": lambda data, size: Ours(data, size, kind="3d", stem_stride=(1, 1, 1), stem_pool=True),
    "own stem": lambda data, size: Ours(data, size, kind="3d"),
    "acs": lambda data, size: Ours(data, size, kind="acs"),
}


def matrix_rate(precision: torch.dtype, clock: Callable[[], float]) -> float:
    """Measure the products per second of a matrix product, the fastest of three."""
    a = torch.randn(2048, 2048).to(precision)
    best = float("inf")
    for _ in range(4):
        began = clock()
        a @ a
        best = min(best, clock() - began)
    return 2 * 2048**3 / best


def main() -> None:
    """Measure all rows at all sizes, and print a table."""
    from torch.utils.flop_counter import FlopCounterMode

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batch", type=int, default=8, help="volumes in a step, of two views each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--data", nargs="+", default=["phantoms:16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a busy machine")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    data, lines = open_data(arguments.data), []
    for size in arguments.sizes:
        sides = {name: ROWS[name](data, size) for name in arguments.rows}
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        flops = {}
        for number in range(arguments.rounds + 1):
            for name, side in sides.items():
                began = clock()
                batch = side.draw(arguments.batch)
                drawn = clock()
                if number:
                    side.step(batch, number)
                    spent[name].append((drawn - began, clock() - drawn))
                    continue
                with FlopCounterMode(display=False) as counter:
                    side.step(batch, number)
                flops[name] = counter.get_total_flops()
        rates = {kind: matrix_rate(kind, clock) for kind in (torch.float32, torch.bfloat16)}
        whole = {name: statistics.median(map(sum, times)) for name, times in spent.items()}
        first = next(iter(whole.values()))
        for name, times in spent.items():
            views, step = (statistics.median(column) for column in zip(*times, strict=True))
            lines.append([
                f"{size}³", name, f"{1e3 * step:.0f}", f"{1e3 * views:.0f}",
                f"{arguments.batch / whole[name]:.2f}", f"{first / whole[name]:.2f}",
                f"{flops[name] / 1e9:.0f}", f"{flops[name] / step / rates[sides[name].precision]:.2f}",
            ])  # fmt: skip
        print(
            f"{size}³: matrix products at {rates[torch.float32] / 1e9:.0f} GFLOP/s in float32, "
            f"{rates[torch.bfloat16] / 1e9:.0f} in bf16"
        )
    head = ["size", "", "step, ms", "views, ms", "volumes/s", "ratio", "GFLOPs of a step", "share"]
    print_table(lines, head)


if __name__ == "__main__":
    main()
