"""Pictures of detections beside the truth, and of FROC curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ssl3d.api import DetectionScores, Volume

Array = NDArray[Any]

_TRUE, _FOUND = palette.BOX, palette.colour(1)
_SHOWN = 5  # detections of a volume that are drawn at most


def detection_picture(
    volumes: Sequence[Volume], truths: Sequence[Array], detections: Sequence[Any], scores: DetectionScores,
    roles: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """Draw truth and detections on the slice through each volume's largest object, and the FROC curve.

    Args:
        volumes: Volumes to show, by their first channel.
        truths: True boxes (n, 6) of each volume.
        detections: Predicted `boxes`, `scores` and `labels` of each volume.
        scores: Scores over all test volumes.
        roles: Words for what each volume is among those that were predicted, such as "worst".
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(2.6 * len(volumes) + 3.4, 3.2), layout="constrained")
    panels = figure.subplots(1, len(volumes) + 1, squeeze=False, width_ratios=[2.6] * len(volumes) + [3.4])[
        0
    ]
    roles = roles or [""] * len(volumes)
    for panel, volume, role, boxes, predicted in zip(
        panels, volumes, roles, truths, detections, strict=False
    ):
        _slice(panel, volume, boxes, predicted)
        panel.set_title("\n".join(filter(None, (role, panel.get_title()))), fontsize=7)
    draw_froc(panels[-1], {"": scores})
    handles = [Patch(color=_TRUE, label="truth"), Patch(color=_FOUND, label="detected, with score")]
    figure.legend(handles=handles, loc="outside lower left", ncol=2, fontsize=8, frameon=False)
    return figure


def froc_picture(curves: Mapping[str, DetectionScores]) -> Figure:
    """Draw the FROC curves of several contestants in one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    draw_froc(figure.subplots(), curves)
    return figure


def draw_froc(panel: Axes, curves: Mapping[str, DetectionScores]) -> None:
    """Draw sensitivity against false positives per scan, a line and the CPM for each name."""
    for name, scores in curves.items():
        wrong, caught, _ = scores.froc_curve()
        cpm = float(scores.froc().cpm[0])
        rates = np.concatenate([[1 / 16], np.clip(wrong, 1 / 16, None), [16.0]])
        sensitivity = np.concatenate([[0.0], caught, [caught[-1] if len(caught) else 0.0]])
        label = f"{name}  CPM {cpm:.2f}".strip()
        panel.step(rates, sensitivity, where="post", label=label, linewidth=1.5)
    ticks = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]
    panel.set_xscale("log", base=2)
    panel.set_xlim(1 / 10, 10)
    panel.set_ylim(0, 1.02)
    panel.set_xticks(ticks, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    panel.grid(alpha=0.3)
    panel.set_xlabel("false positives per scan", fontsize=8)
    panel.set_ylabel("sensitivity", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.legend(fontsize=7, loc="lower right")


def _slice(panel: Axes, volume: Volume, boxes: Array, predicted: Any) -> None:
    from matplotlib.patches import Rectangle

    pick = boxes if len(boxes) else predicted.boxes
    at = volume.shape[1] // 2
    if len(pick):
        largest = pick[int((pick[:, 3:] - pick[:, :3]).prod(axis=1).argmax())]
        at = int(min(max((largest[0] + largest[3]) / 2, 0), volume.shape[1] - 1))
    image = volume.read((at, 0, 0), (1, *volume.shape[2:]))[0, 0].numpy()
    low, high = np.percentile(image, (1, 99.5))
    _, y, x = volume.spacing
    # In patient space rows run upwards, so that anterior is on top; pictures begin at their top.
    origin = "upper" if volume.orientation == "unknown" else "lower"
    panel.imshow(image, "gray", vmin=low, vmax=high, origin=origin, aspect=y / x)  # type: ignore[arg-type]

    def draw(box: Array, colour: str, style: str, alpha: float = 1.0) -> None:
        corner = (box[2] - 0.5, box[1] - 0.5)
        panel.add_patch(
            Rectangle(
                corner,
                box[5] - box[2],
                box[4] - box[1],
                fill=False,
                color=colour,
                linestyle=style,
                lw=1.3,
                alpha=alpha,
            )
        )

    for box in boxes:
        if box[0] <= at < box[3]:
            draw(box, _TRUE, "-")
    here = [n for n, box in enumerate(predicted.boxes) if box[0] <= at + 0.5 < box[3]][:_SHOWN]
    for n in here:
        alpha = 0.25 + 0.75 * min(float(predicted.scores[n]), 1.0)  # unsure ones are pale
        draw(predicted.boxes[n], _FOUND, "--", alpha)
        panel.text(
            predicted.boxes[n][5],
            predicted.boxes[n][4],
            f"{predicted.scores[n]:.2f}",
            color=_FOUND,
            fontsize=6,
            alpha=alpha,
        )
    panel.set_axis_off()
    title = f"{volume.id}, slice {at}"
    panel.set_title(title if len(title) <= 34 else f"…{title[-33:]}", fontsize=7)
