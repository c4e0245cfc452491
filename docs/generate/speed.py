"""The table of how long a step of every proxy takes, from the measurements that are kept."""

import json
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


def write(pages: Pages) -> None:
    """Writes the table that `explanation/speed.md` includes."""
    kept = json.loads((pages.root / "benchmarks/results/speed_proxies.json").read_text(encoding="utf-8"))
    rows = [(_means(rounds), name) for name, rounds in kept["measured"].items()]
    rows.sort(key=lambda row: row[0][1])
    lines = [f"| proxy | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    lines += [f"| `{name}` | {' | '.join(f'{value:.0f}' for value in values)} |" for values, name in rows]
    pages.write("explanation/speed-proxies.inc", "\n".join(lines) + "\n")


def _means(rounds: list[dict[str, Any]]) -> list[float]:
    """Mean over the rounds, in the order of the columns."""
    return [mean(one[key] for one in rounds) * factor for key, factor in _COLUMNS.values()]
