"""The tables of how long steps take, of every proxy and on GPUs, from the measurements that are kept."""

import json
from itertools import product
from statistics import mean
from typing import Any

from generate.pages import Pages

_COLUMNS = {
    "volumes a step": ("volumes", 1),
    "step, ms": ("step_s", 1000),
    "volumes/s": ("volumes_per_s", 1),
    "GFLOPs a step": ("flops", 1e-9),
    "peak, MB": ("peak_mb", 1),
    "of the step, MB": ("step_mb", 1),
}
"""Heading -> key of a measurement, and what brings it to the heading's unit."""


_SIDES = ("ssl3d", "compiled", "stock")


def write(pages: Pages) -> None:
    """Writes the tables that `explanation/speed.md` includes."""
    _write_proxies(pages)
    _write_gpu(pages)


def _write_gpu(pages: Pages) -> None:
    path = pages.root / "benchmarks/results/speed_gpu.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    planned = [" ".join(words) for words in product(("resnet50", "vit_b"), ("96", "128"), ("1", "8"))]
    others = [key.rpartition(" ")[0] for key in kept]
    lines = [f"| encoder, crop, devices | {' | '.join(_SIDES)} |", "|---" * (len(_SIDES) + 1) + "|"]
    for case in dict.fromkeys([*planned, *others]):
        encoder, size, devices = case.split()
        cells = [_gpu_cell(kept.get(f"{case} {side}")) for side in _SIDES]
        lines.append(f"| `{encoder}`, {size}³, {devices} | {' | '.join(cells)} |")
    pages.write("explanation/speed-gpu.inc", "\n".join(lines) + "\n")


def _gpu_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    where = f"{row['device']}, {row['precision']}, {row['batch']} a device"
    speed = f"{row['volumes_per_s']:.3g} volumes/s, MFU {row['mfu']:.2f}"
    return f"{speed}, {row['memory'] / 1e9:.3g} GB ({where})"


def _write_proxies(pages: Pages) -> None:
    kept = json.loads((pages.root / "benchmarks/results/speed_proxies.json").read_text(encoding="utf-8"))
    rows = [(_means(rounds), name) for name, rounds in kept["measured"].items()]
    rows.sort(key=lambda row: row[0][1])
    lines = [f"| proxy | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    lines += [f"| `{name}` | {' | '.join(f'{value:.0f}' for value in values)} |" for values, name in rows]
    pages.write("explanation/speed-proxies.inc", "\n".join(lines) + "\n")


def _means(rounds: list[dict[str, Any]]) -> list[float]:
    """Mean over the rounds, in the order of the columns."""
    return [mean(one[key] for one in rounds) * factor for key, factor in _COLUMNS.values()]
