"""The page of a run of `ssl3d pretrain`: curves, pictures over time, settings, and what to type next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ssl3d.amounts import count_of, duration, printable, size
from ssl3d.checkpoint.card import CARD, read_card
from ssl3d.checkpoint.snapshot import config_of
from ssl3d.errors import CheckpointError
from ssl3d.pages import elements
from ssl3d.view import parts
from ssl3d.view.curves import Curve, chart, read_curves

MOST_PICTURES = 12
"""Most pictures of a proxy; of more, the first, the last, and some between."""
HOLDOUT = "holdout/"
PACE = ("seconds", "waiting", "volumes_per_s", "epoch")


def run_page(run: Path) -> tuple[str, str]:
    """Return the page of a run, and a line that says what is in it.

    Args:
        run: Folder of the run.

    Raises:
        CheckpointError: The settings of the run are missing or damaged.
    """
    options = config_of(run)
    curves, last = read_curves(run / "metrics.jsonl")
    card = _card(run)
    total = int(options.get("steps") or last)
    body = [parts.summary([_state(run, card, last, total)]), parts.facts(_facts(card, last, curves))]
    still = {name: curve for name, curve in curves.items() if curve.is_constant() and name != "loss"}
    drawn = _charts({name: curve for name, curve in curves.items() if name not in still})
    body.append(f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else "")
    body += elements.small(_constants(still))
    pictures = _pictures(run / "pictures")
    body += [pictures, parts.commands(_next(run, card))]
    body.append(_citations(card))
    body.append(parts.settings("Settings", _flat(options)))
    body.append(parts.settings("Versions", {k: str(v) for k, v in (card.get("versions") or {}).items()}))
    return parts.page(str(run), body), f"a run of {count_of(last, 'step')}"


def _card(run: Path) -> dict[str, Any]:
    """Read the card of the run's encoder; empty where the run has not ended."""
    if not (run / "encoder" / CARD).is_file():
        return {}
    try:
        return read_card(run / "encoder")
    except CheckpointError:
        return {}


def _state(run: Path, card: Mapping[str, Any], last: int, total: int) -> str:
    proxies = " and ".join(card.get("proxies") or ()) or "Pretraining"
    data = card.get("data") or {}
    if not card:
        return f"This run is not finished: {last:,} of {total:,} steps are logged."
    volumes = f" on {count_of(int(data['volumes']), 'volume')}" if data.get("volumes") else ""
    sets = f" of {', '.join(data['datasets'])}" if data.get("datasets") else ""
    return f"{proxies} trained a {card.get('architecture', 'network')} for {last:,} steps{volumes}{sets}."


def _facts(card: Mapping[str, Any], last: int, curves: Mapping[str, Curve]) -> dict[str, str]:
    compute = card.get("compute") or {}
    loss = curves.get("loss")
    return {
        "steps": f"{last:,}",
        "loss at the end": f"{loss.points()[-1][1]:.4g}" if loss else "",
        "time": duration(compute["seconds"]) if compute.get("seconds") else "",
        "peak memory": size(compute["peak_memory"]) if compute.get("peak_memory") else "",
        "training FLOPs": f"{compute['flops']:.2g}" if compute.get("flops") else "",
        "labels seen": ("yes" if card.get("labels_seen") else "no") if card else "",
    }


def _constants(still: Mapping[str, Curve]) -> list[str]:
    """Say which metrics had one value from the first step to the last: they need no chart."""
    values = {name: curve.values[0] for name, curve in still.items() if name not in PACE}
    words = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return [f"The same at every step: {printable(words)}."] if words else []


def _losses(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Name the losses as people do: the sum and its parts, or, of a single proxy, its only loss."""
    measured = {name: curve for name, curve in curves.items() if name == "loss" or name.endswith("/loss")}
    titles = {name: name.replace(HOLDOUT, "held out, ").replace("/loss", "") for name in measured}
    titles |= {"loss": "training", f"{HOLDOUT}loss": "held out"}
    losses: dict[str, Curve] = {}
    for name, curve in sorted(measured.items(), key=lambda pair: pair[0] not in ("loss", f"{HOLDOUT}loss")):
        if all(curve.values != other.values for other in losses.values()):
            losses[titles[name]] = curve
    return losses


def _charts(curves: Mapping[str, Curve]) -> list[str]:
    """Draw the losses, each score of training beside that of held-out subjects, the rate and the pace."""
    losses = _losses(curves)
    drawn = [chart("Loss of training, and of held-out subjects where it is measured", losses, "loss")]
    rates = {name: curve for name, curve in curves.items() if name == "lr" or name.endswith("/lr")}
    used = {*rates, *PACE, *(name for name in curves if name == "loss" or name.endswith("/loss"))}
    for name in curves:
        if name in used or name.startswith(HOLDOUT):
            continue
        pair = {"training": curves[name]}
        if HOLDOUT + name in curves:
            pair["held out"] = curves[HOLDOUT + name]
        used |= {name, HOLDOUT + name}
        drawn.append(chart(name, pair, name.rpartition("/")[2]))
    left = {name: curve for name, curve in curves.items() if name not in used}
    drawn += [chart(name, {name: curve}, name.rpartition("/")[2]) for name, curve in left.items()]
    drawn.append(chart("Learning rate", rates, "learning rate"))
    if "waiting" in curves:
        pace = {"waiting": curves["waiting"]}
        drawn.append(chart("Share of the time that training waits for data", pace, "share"))
    return drawn


def _pictures(folder: Path) -> str:
    """Return the pictures of each proxy in the order of their steps."""
    series: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
        if match := re.fullmatch(r"(.+)-(\d+)\.png", path.name):
            series.setdefault(match[1], []).append((int(match[2]), path))
    sections = []
    for name, steps in series.items():
        figures = []
        for step, path in _some(steps):
            source = elements.inline(path)
            if source:
                picture = elements.image(source, f"{name} at step {step}")
                figures.append(elements.figure(picture, f"step {step:,}"))
        if figures:
            sections.append(
                f'<h3>{escape(printable(name))}</h3><div class="strip">{"".join(figures)}</div>'
            )
    return f"<h2>Pictures over time</h2>{''.join(sections)}" if sections else ""


def _some(steps: Sequence[tuple[int, Path]]) -> Iterable[tuple[int, Path]]:
    ordered = sorted(steps)
    count = min(MOST_PICTURES, len(ordered))
    chosen = {round(k * (len(ordered) - 1) / max(count - 1, 1)) for k in range(count)}
    return [ordered[k] for k in sorted(chosen)]


def _next(run: Path, card: Mapping[str, Any]) -> list[str]:
    if not card:
        return [f"ssl3d pretrain --resume {run}"]
    return [
        f"ssl3d linear-probe {run} --data STORE --target masks --out results",
        f"ssl3d finetune {run} --data STORE --task segmentation --out tuned",
        f"ssl3d embed {run} --data STORE --out features.h5",
    ]


def _citations(card: Mapping[str, Any]) -> str:
    papers = list(dict.fromkeys(str(paper) for paper in (card.get("citations") or {}).values() if paper))
    if not papers:
        return ""
    items = "".join(f"<li>{escape(printable(paper))}</li>" for paper in papers)
    return f"<h2>To be cited</h2><ul>{items}</ul>"


def _flat(options: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Write nested options as lines, those of a proxy below its name."""
    lines: dict[str, str] = {}
    for key, value in options.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            lines |= _flat(value, f"{name}.")
        elif value not in (None, "", [], ()):
            lines[name] = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return lines
