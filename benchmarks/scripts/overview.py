"""The README's picture: a scan, the order that sorting found in unseen scans, and a predicted segmentation.

    ssl3d prepare DATA/hippocampus --out hippocampus.h5
    ssl3d pretrain --proxy sorting --sorting.crop 48 48 --encoder resnet10 --resnet10.width 16 \
        --resnet10.stem_stride 1 2 2 --data hippocampus.h5 --steps 150 --batch-size 8 --out runs/overview
    ssl3d finetune runs/overview --data hippocampus.h5 --task segmentation --fractions 0.14 \
        --repeats 1 --steps 250 --segmentation.width 16 --segmentation.patch 40 56 40 \
        --save-predictions true --out tuned
    python benchmarks/scripts/overview.py hippocampus.h5 runs/overview tuned docs/_static/overview.png

The test subject shown is the one with the median Dice of the record.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from matplotlib.figure import Figure

from ssl3d.api import Collection, house_split, load_proxies, open_data

COLOURS = ((0.20, 0.63, 0.93), (0.98, 0.65, 0.15))


def main() -> None:
    """Draw the three panels and save them as one picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("store", "run", "tuned", "picture"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    data = open_data([options.store])
    test = data.select(np.flatnonzero(house_split(data) == "test"))
    record = next(
        content
        for path in sorted(options.tuned.glob("*.json"))
        if (content := json.loads(path.read_text()))["contestant"]["kind"] == "encoder"
    )
    rows = sorted(record["predictions"], key=lambda row: np.mean(list(row["dice"].values())))
    shown = rows[len(rows) // 2]
    volume = next(volume for volume in test if volume.id == shown["id"])
    figure = Figure(figsize=(11, 3.4), layout="constrained", facecolor="white")
    panels = figure.subplot_mosaic("iiiimmmmmttttpppp")
    middle = int(np.argmax((volume.read_mask().numpy() > 0).sum(axis=(1, 2))))
    image = volume.read()[0, middle].numpy()
    draw_slice(panels["i"], image, None, "a scan (hippocampus MR)")
    draw_orders(panels["m"], options.run, test)
    draw_slice(panels["t"], image, volume.read_mask()[middle].numpy(), "drawn by hand")
    dice = np.mean(list(shown["dice"].values()))
    predicted = prediction_of(options.tuned, record, shown["id"], volume.shape[1:])[middle]
    draw_slice(panels["p"], image, predicted, f"predicted: Dice {dice:.2f}")
    figure.savefig(options.picture, dpi=110)


def draw_slice(panel: Any, image: np.ndarray, mask: np.ndarray | None, title: str) -> None:
    """Draw an axial slice (H, W), with outlines of its structures."""
    panel.imshow(image, cmap="gray", origin="lower", vmin=np.percentile(image, 1), vmax=image.max())
    for value, colour in enumerate(COLOURS, start=1):
        if mask is not None and (mask == value).any():
            panel.contourf(mask == value, levels=[0.5, 1.5], colors=[colour], alpha=0.45)
            panel.contour(mask == value, levels=[0.5], colors=[colour], linewidths=1.2)
    panel.set_title(title, fontsize=10)
    panel.axis("off")


def draw_orders(panel: Any, run: Path, test: Collection) -> None:
    """Draw the score of every slice of some unseen scans against its true place."""
    proxy: Any = load_proxies(run)["sorting"]
    for volume in test[:12]:
        positions, scores = proxy.profile(volume)
        panel.plot(positions / positions.max(), scores, color="0.35", linewidth=0.8, alpha=0.7)
    panel.set_title("learned without labels:\nthe order of slices, 12 unseen scans", fontsize=10)
    panel.set_xlabel("true place along the body")
    panel.set_ylabel("score of the slice")
    panel.set_yticks([])
    panel.spines[["top", "right"]].set_visible(False)


def prediction_of(tuned: Path, record: dict[str, Any], name: str, shape: Any) -> np.ndarray:
    """Return the prediction of a volume as class values on the stored grid (D, H, W)."""
    folder = next((tuned / "predictions").glob(f"*-{record['key'][:8]}"))
    file = next(
        path
        for path in folder.glob("*.nii.gz")
        if path.name.removesuffix(".nii.gz").endswith(name.split("/")[-1])
    )
    image = nibabel.as_closest_canonical(nibabel.load(file))
    return np.transpose(np.asarray(image.dataobj), (2, 1, 0)).astype(int).reshape(shape)


if __name__ == "__main__":
    main()
