"""Pictures of a linear probe: embeddings on their principal axes, or predicted beside true masks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import palette

if TYPE_CHECKING:
    from ssl3d_benchmarks.contestants import Entry
    from ssl3d_benchmarks.linear_probe.options import FrozenEncoderOptions
    from ssl3d_benchmarks.linear_probe.protocol import LinearProbe
    from ssl3d_benchmarks.table import Row
    from ssl3d_benchmarks.task import SplitData

Array = NDArray[Any]

PEOPLE = 3
"""Test subjects shown of a dense probe."""


def draw(
    rows: Sequence[Row],
    benchmark: LinearProbe,
    task: SplitData,
    entries: Sequence[Entry],
    options: FrozenEncoderOptions,
) -> list[Path]:
    """Draw a picture of each encoder given (or of the first untrained one) and return the paths."""
    chosen = [entry for entry in entries if entry.kind == "encoder"]
    chosen = chosen or [entry for entry in entries if entry.kind == "untrained"][:1]
    paths = []
    for entry in chosen:
        result = next(row.result for row in rows if row.result.contestant["name"] == entry.name)
        slug = re.sub(r"[^A-Za-z0-9.=+-]+", "_", entry.name).strip("_")[:80]
        kind = "masks" if benchmark.target == "masks" else "embeddings"
        path = options.out / f"{slug}-{kind}-{result.key[:8]}.png"
        if not path.exists() or options.overwrite:
            _draw(entry, benchmark, task, options, path)
        paths.append(path)
    return paths


def _draw(
    entry: Entry, benchmark: LinearProbe, task: SplitData, options: FrozenEncoderOptions, path: Path
) -> None:
    from ssl3d_benchmarks.linear_probe.entries import build

    fold = task.folds[0]
    contestant = build(entry, task, fold, options)
    benchmark.report = None
    benchmark.prepare(contestant, task.data)
    train, val, test = (task.data.select(np.flatnonzero(r)) for r in (fold.train, fold.val, fold.test))
    if benchmark.target == "masks":
        from ssl3d_benchmarks.linear_probe.dense import predict_masks

        firsts = np.unique(test.subject_codes, return_index=True)[1]
        shown = test.select(
            np.sort(firsts)[np.linspace(0, len(firsts) - 1, min(PEOPLE, len(firsts))).astype(int)]
        )
        masks = predict_masks(benchmark.dense, train, val, shown, task.config, options.seed)
        figure = masks_figure(
            shown, masks, task.config.classes, palette.class_titles(task.data, task.config.classes)
        )
    else:
        figure = embedding_figure(benchmark, train, test)
    figure.suptitle(f"{entry.name}\n{benchmark.task}", fontsize=9)
    figure.savefig(path, dpi=110)


def embedding_figure(benchmark: LinearProbe, train: Any, test: Any) -> Any:
    """Plot the test rows on the first two principal axes of the training features, coloured by target."""
    from matplotlib.figure import Figure

    x, _ = benchmark.features_and_targets(train)
    z, target = benchmark.features_and_targets(test)
    scale = np.where(x.std(axis=0) > 1e-8, x.std(axis=0), np.inf)
    centre = x.mean(axis=0)
    _, singular, axes = np.linalg.svd((x - centre) / scale, full_matrices=False)
    share = singular**2 / max((singular**2).sum(), 1e-12)
    points = ((z - centre) / scale) @ axes[:2].T
    if points.shape[1] == 1:
        points = np.c_[points, np.zeros(len(points))]
    figure = Figure(figsize=(6, 5), layout="constrained")
    plot = figure.add_subplot()
    if benchmark.target == "classes":
        for k, name in enumerate(benchmark.config.classes):
            mine = target == k
            plot.scatter(
                points[mine, 0], points[mine, 1], s=14, alpha=0.8, color=palette.colour(k + 1),
                label=f"{name} ({mine.sum()})",
            )  # fmt: skip
        plot.legend(title="class (test rows)", fontsize=8)
    else:
        figure.colorbar(plot.scatter(points[:, 0], points[:, 1], c=target, s=14), label="target")
    plot.set_xlabel(f"principal axis 1 ({100 * share[0]:.0f} % of the variance of training features)")
    plot.set_ylabel(f"principal axis 2 ({100 * share[1]:.0f} % of it)" if len(share) > 1 else "")
    return figure


def masks_figure(
    volumes: Any, masks: Sequence[Array], values: Sequence[str | int], titles: Sequence[str]
) -> Any:
    """Show, for each volume, the slice with most truth: image, true mask, predicted mask with its Dice.

    Args:
        volumes: Volumes to show.
        masks: Predicted class indices of each, (D, H, W).
        values: Mask value of each class, ascending, background first.
        titles: Names of the classes, in the same order.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    classes = len(titles)
    colours = ListedColormap(["#00000000", *map(palette.colour, range(1, classes))])
    figure = Figure(figsize=(7.5, 2.6 * len(masks) + 0.5), layout="constrained")
    for number, (volume, mask) in enumerate(zip(volumes, masks, strict=True)):
        truth = np.searchsorted(np.array(values, dtype=int), volume.read_mask().numpy())
        z = int((truth > 0).sum(axis=(1, 2)).argmax())
        grey = volume.read((z, 0, 0), (1, *volume.shape[2:]))[0, 0].numpy()
        aspect = volume.spacing[1] / volume.spacing[2]
        for column, (title, overlay) in enumerate(
            (("image", None), ("truth", truth), ("prediction", mask))
        ):
            plot = figure.add_subplot(len(masks), 3, 3 * number + column + 1)
            plot.imshow(grey, cmap="gray", aspect=aspect, origin="lower")
            if overlay is not None:
                shown = np.ma.masked_equal(overlay[z], 0)
                plot.imshow(
                    shown, cmap=colours, vmin=0, vmax=classes - 1, alpha=0.6, aspect=aspect, origin="lower",
                    interpolation="nearest",
                )  # fmt: skip
            words = palette.dice_words(truth, mask, titles, 44) if column == 2 else ""
            plot.set_title("\n".join(filter(None, (title * (number == 0), words))), fontsize=8)
            plot.set_xticks([])
            plot.set_yticks([])
            if column == 0:
                plot.set_ylabel(f"{volume.subject}, slice {z}", fontsize=7)
    palette.legend(figure, titles)
    return figure
