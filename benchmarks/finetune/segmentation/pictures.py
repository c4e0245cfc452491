"""Pictures of predicted segmentations beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.api import Volume

Array = NDArray[Any]


def segmentation_picture(
    volumes: Sequence[Volume], truth: Sequence[Array], predicted: Sequence[Array], names: Sequence[str],
    roles: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """Draw a row per volume: axial, coronal and sagittal slice, each with the truth and the prediction.

    The slices go through the middle of the true objects (of the predicted ones, or of the volume, if there
    are none). Images (D = 1) have a single pair. The Dice of the whole volume stands below the first
    prediction.

    Args:
        volumes: Volumes to show, by their first channel.
        truth: True class indices (D, H, W), negative where unknown.
        predicted: Predicted class indices (D, H, W).
        names: Names of the classes, background first.
        roles: Words for what each volume is among those that were predicted, such as "worst".
    """
    from matplotlib.figure import Figure

    planes = 1 if volumes[0].shape[1] == 1 else 3
    captions = [palette.dice_words(*both, names, 34) for both in zip(truth, predicted, strict=True)]
    tall = 1.9 + 0.12 * max(caption.count("\n") + 1 for caption in captions)
    figure = Figure(figsize=(3.4 * planes, tall * len(volumes) + 0.8), layout="constrained")
    axes = figure.subplots(len(volumes), 2 * planes, squeeze=False)
    roles = roles or [""] * len(volumes)
    for row, volume, role, true, labels, caption in zip(
        axes.tolist(), volumes, roles, truth, predicted, captions, strict=True
    ):
        image = volume.read()[0].numpy()
        low, high = np.percentile(image, (1, 99))
        at = _middle(true, labels)
        for plane in range(planes):
            others = [axis for axis in range(3) if axis != plane]
            aspect = volume.spacing[others[0]] / volume.spacing[others[1]]
            for panel, shown, title in zip(
                row[2 * plane : 2 * plane + 2], (true, labels), ("truth", "predicted"), strict=True
            ):
                # Rows run upwards, so that anterior and superior are on top.
                panel.imshow(
                    image.take(at[plane], axis=plane),
                    "gray",
                    vmin=low,
                    vmax=high,
                    origin="lower",
                    aspect=aspect,
                )
                _outline(panel, shown.take(at[plane], axis=plane), len(names))
                panel.set_axis_off()
                if volume is volumes[0]:
                    panel.set_title(f"{('axial', 'coronal', 'sagittal')[plane]}, {title}", fontsize=8)
        title = ": ".join(filter(None, (role, volume.id.split("/")[-1])))
        # Below the panels: over an image no colour can be read everywhere.
        for panel, words in ((row[0], title), (row[1], caption)):
            panel.text(0.5, -0.03, words, fontsize=7, ha="center", va="top", transform=panel.transAxes)
    palette.legend(figure, names)
    return figure


def _outline(panel: Any, labels: Array, classes: int) -> None:
    for k in range(1, classes):
        mask = labels == k
        if mask.any() and not mask.all() and min(mask.shape) > 1:
            panel.contour(mask.astype(float), levels=[0.5], colors=[palette.colour(k)], linewidths=1.2)


def _middle(true: Array, predicted: Array) -> tuple[int, int, int]:
    mask = true > 0 if (true > 0).any() else predicted > 0
    if not mask.any():
        return (true.shape[0] // 2, true.shape[1] // 2, true.shape[2] // 2)
    d, h, w = (int(mask.sum(axis=tuple(a for a in range(3) if a != axis)).argmax()) for axis in range(3))
    return d, h, w
