"""The README's gallery: every proxy's picture of unseen phantoms, before and after a run on phantoms.

    python benchmarks/scripts/gallery.py --steps 300 --out benchmarks/results/gallery

Writes one PNG per proxy and `gallery.json`: the main metric on the same unseen people, before and after.
"""

from __future__ import annotations

import argparse
import json
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ssl3d.api import Collection, Loader, Proxy, house_split, load_proxies, one_group, open_data

DATA = "phantoms:64"
SHOWN = 6
"""Examples in a picture."""


def main() -> None:
    """Train each proxy for one step and for many, and draw its output for the same subjects."""
    parser = argparse.ArgumentParser(description="Pictures of every proxy, before and after training.")
    parser.add_argument("--proxy", nargs="+", help="default: all")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gallery"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = open_data([DATA])
    test = data.select(np.flatnonzero(house_split(data) == "test"))
    for name in options.proxy or installed():
        began = time.perf_counter()
        looks = {}
        for moment, steps in (("before", 1), ("after", options.steps)):
            run = pretrained(name, steps, options.work)
            looks[moment] = look(name, load_proxies(run)[name], test)
        seconds = time.perf_counter() - began
        save(options.out / f"{name}.png", name, options.steps, looks)
        record(options.out / "gallery.json", name, options.steps, looks)
        before, after = (looks[moment]["metrics"][looks[moment]["main"]] for moment in ("before", "after"))
        print(f"{name}: {looks['after']['main']} {before:.3f} -> {after:.3f}, {seconds:.0f} s", flush=True)


def installed() -> list[str]:
    """List the names of the proxies."""
    from importlib.metadata import entry_points

    return sorted(point.name for point in entry_points(group="ssl3d.proxies"))


def pretrained(name: str, steps: int, work: Path) -> Path:
    """Return a run on the training subjects, pretrained where it is not there."""
    import ssl3d

    folder = work / f"{name}-{steps}"
    if not (folder / "encoder" / "encoder.json").exists():
        ssl3d.pretrain(
            name, DATA, folder, steps=steps, encoder="resnet18", resnet18={"width": 16}, overwrite=True,
            eval_every=-1,
        )  # fmt: skip
    return folder


def look(name: str, proxy: Proxy, people: Collection) -> dict[str, Any]:
    """Return the picture and metrics of one batch of subjects, the same for every call."""
    import torch

    batch = next(iter(Loader(people, {name: (type(proxy), proxy.config)}, SHOWN, seed=0, steps=1)))
    rngs = [one_group(0, len(group.rows)) for group in batch.groups]
    with torch.no_grad():
        if proxy.mixed:
            out = proxy([group.tensors for group in batch.groups], rngs)
        else:
            out = proxy(batch.groups[0].tensors, rngs[0])
    metrics = {key: round(float(value), 4) for key, value in out.metrics.items()}
    return {"main": proxy.main, "metrics": metrics, "figure": out.picture() if out.picture else None}


def save(path: Path, name: str, steps: int, looks: dict[str, Any]) -> None:
    """Write both pictures, one above the other."""
    from PIL import Image, ImageDraw

    pictures = []
    for moment, title in (("before", "after 1 step"), ("after", f"after {steps} steps")):
        if looks[moment]["figure"] is None:
            return
        file = BytesIO()
        looks[moment]["figure"].savefig(file, dpi=64, format="png")
        score = f"{looks[moment]['main']} {looks[moment]['metrics'][looks[moment]['main']]:.3f}"
        pictures.append((f"{name}, {title}: {score}", Image.open(file).convert("RGB")))
    width = max(picture.width for _, picture in pictures)
    whole = Image.new("RGB", (width, sum(picture.height + 18 for _, picture in pictures)), "white")
    top = 0
    for title, picture in pictures:
        ImageDraw.Draw(whole).text((6, top + 3), title, fill="black")
        whole.paste(picture, (0, top + 18))
        top += picture.height + 18
    whole.quantize(64).save(path, optimize=True)


def record(path: Path, name: str, steps: int, looks: dict[str, Any]) -> None:
    """Add a proxy's metrics to the record."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = {"steps": steps, "main": looks["after"]["main"]}
    known[name] |= {moment: looks[moment]["metrics"] for moment in ("before", "after")}
    path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
