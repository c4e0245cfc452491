"""Predicted masks beside the true ones: scores of each scan, and where both differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.amounts import count_of, printable
from ssl3d.data.geometry import UNKNOWN, regrid
from ssl3d.data.scans.read import read
from ssl3d.errors import DataError
from ssl3d.pages import charts, elements
from ssl3d.segmentation.metrics import MaskScores, mask_scores
from ssl3d.view import parts, slices
from ssl3d.view.gallery import Card
from ssl3d.view.predicted import UNDEFINED, Predicted

Array = NDArray[Any]

MISSED, EXTRA = "#f032a0", "#ffd92f"
"""Colours of voxels that are in the truth alone, and in the prediction alone."""
BINS = 20
"""Bars of the histogram of Dice."""


class PredictedMasks(Predicted):
    """Masks on the scans' own grids, compared on the grid of the data."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        labels = self.about.get("labels") or {}
        self.names = {int(value): str(name) for value, name in labels.items() if int(value) > 0}
        self.scores: dict[int, dict[int, MaskScores]] = {}
        self.ignored: dict[str, int] = {}
        for settings in self.data.settings if self.data is not None else ():
            self.ignored |= {
                name: int(value) for name, value in (settings.get("mask_ignore") or {}).items()
            }

    def card(self, position: int, side: int, number: int) -> tuple[Card, float]:
        """Return the card of a scan, and its mean Dice, by which the worst come first."""
        row = self.rows[position]
        volume = self.volume(row["dataset"], row["id"])
        if volume is None:
            return Card(row["id"], "", self._amounts(row)), UNDEFINED
        mask = predicted_mask(self.folder / row["file"], volume)
        truth = volume.read_mask().numpy() if volume.has_mask else None
        if truth is not None and volume.dataset in self.ignored:
            unknown = truth == self.ignored[volume.dataset]
            truth, mask = np.where(unknown, 0, truth), np.where(unknown, 0, mask)
        at = _middle(mask if truth is None or not self._inside(truth).any() else truth, self)
        plan = slices.layout(volume, at, side)
        shape = volume.shape[1:]
        source = slices.grey(plan, [slices.cut(volume, plane, shape) for plane in plan.planes])
        layers = [slices.Layer("scan")]
        lines = [f"subject {row['subject']}", *self._amounts(row)]
        dice = UNDEFINED
        if truth is not None:
            self.known = True
            scores = self.scores[position] = {
                value: mask_scores(mask == value, truth == value, volume.spacing) for value in self.names
            }
            dice = mean_dice(scores)
            lines[1:] = _lines(scores, self.names)
            layers.append(slices.Layer("truth", self._drawn(plan, truth)))
        layers.append(slices.Layer("prediction", self._drawn(plan, mask)))
        if truth is not None:
            wrong = np.where(self._differs(mask, truth), np.where(self._inside(truth), 1, 2), 0)
            drawn = slices.areas(plan, [slices.cut(wrong, p, shape) for p in plan.planes], (MISSED, EXTRA))
            layers.append(slices.Layer("difference", drawn))
        about = f"Scan, truth and prediction of {row['id']}"
        picture = slices.picture(plan, source, layers, about, f"v{number}")
        orders = {"Dice, worst first": None if dice == UNDEFINED else dice} if truth is not None else {}
        if truth is not None and dice != UNDEFINED:
            orders["Dice, best first"] = -dice
        filters = {"data set": row["dataset"]}
        return Card(row["id"], picture, lines, filters, orders), dice

    def _inside(self, mask: Array) -> Array:
        return np.isin(mask, list(self.names))

    def _differs(self, mask: Array, truth: Array) -> Array:
        return np.where(self._inside(mask), mask, 0) != np.where(self._inside(truth), truth, 0)

    def _drawn(self, plan: slices.Layout, mask: Array) -> str:
        planes = [slices.cut(mask, plane, plan.shape) for plane in plan.planes]
        return slices.outlines(plan, [np.where(self._inside(own), own, 0) for own in planes])

    def _amounts(self, row: Any) -> list[str]:
        amounts = [f"{name.removeprefix('ml of ')} {float(value):.2f} ml"
                   for name, value in row.items() if name.startswith("ml of ") and value]  # fmt: skip
        return [", ".join(amounts)] if amounts else []

    def summary(self, shown: int) -> list[str]:
        """Return the mean Dice, that of each class, and the worst scan."""
        if not self.scores:
            unknown = "their true masks are not known, so there are no scores"
            return [f"{count_of(shown, 'scan')} predicted; {unknown}."]
        means = {k: mean_dice(scores) for k, scores in self.scores.items()}
        defined = {k: value for k, value in means.items() if value != UNDEFINED}
        if not defined:
            return [f"{count_of(shown, 'scan')} predicted; neither truth nor prediction has any object."]
        worst = min(defined, key=lambda k: defined[k])
        middle = float(np.median(list(defined.values())))
        sentence = (
            f"The mean Dice of {count_of(len(defined), 'scan')} is {np.mean(list(defined.values())):.3f} "
            f"(median {middle:.3f}). The worst is {printable(self.name(worst))} with {defined[worst]:.3f}."
        )
        seen = int(self.about.get("of_training_subjects") or 0)
        warning = (
            f"{count_of(seen, 'scan')} are of subjects that the model was trained or chosen on: their "
            "scores are better than those of other people."
        )
        return [sentence, warning] if seen else [sentence]

    def tables(self) -> list[str]:
        """Return the mean scores of each class, a histogram of Dice and all scores."""
        if not self.scores:
            return []
        rows = []
        for value, name in self.names.items():
            columns = zip(*(scores[value] for scores in self.scores.values()), strict=True)
            cells = []
            for column in columns:
                known = [float(x) for x in column if x is not None]
                mean = float(np.mean(known)) if known else None
                cells.append(_cell(mean))
            rows.append(elements.Row(f"{value} ({name})", cells))
        table = elements.table("Means over scans", ["class", *_HEADS], rows)
        means = [mean_dice(scores) for scores in self.scores.values()]
        counts, _ = np.histogram([value for value in means if value != UNDEFINED], BINS, (0, 1))
        title = "Scans by mean Dice"
        bars = charts.bars(0.0, 1.0, counts.tolist(), "mean Dice over classes", title)
        every = [
            elements.Row(
                self.name(k), [_cell(mean_dice(own)), *(_cell(x) for s in own.values() for x in s)]
            )
            for k, own in sorted(self.scores.items(), key=lambda pair: mean_dice(pair[1]))
        ]
        heads = [f"{name}: {head}" for name in self.names.values() for head in _HEADS]
        scores = elements.table(
            "Scores of every scan, the worst first", ["scan", "mean Dice", *heads], every
        )
        return [table, f'<div class="charts">{elements.figure(bars, title + ".")}</div>',
                parts.folded("Scores of every scan", scores)]  # fmt: skip

    def legend(self) -> str:
        """Return the colours of the classes and of the differences."""
        titles = {value: f"{value} ({name})" for value, name in self.names.items()}
        if not self.known:
            return parts.legend(titles)
        words = ((MISSED, "difference: missed, or another class"), (EXTRA, "difference: too much"))
        extra = "".join(f'<i class="swatch" style="background:{c}"></i>{w}' for c, w in words)
        return parts.legend(titles) + f'<p class="legend">{extra}</p>'

    def explained(self) -> str:
        """Say where the slices lie and how the scores are computed."""
        words = (
            "Slices go through the middle of the true objects, or of the predicted where there are none."
        )
        if self.known:
            words += (
                " Scores are those of whole volumes, by the code that scores fine-tuning; HD95 and surface "
                "Dice are in mm, with a tolerance of 1 mm or the largest voxel side."
            )
        return words


_HEADS = ("Dice", "HD95, mm", "surface Dice")


def predicted_mask(path: Path, volume: Any) -> Array:
    """Read a predicted mask, and bring it to the grid of its scan as stored, (D, H, W).

    Raises:
        DataError: The file is missing or damaged, or of another shape where nobody knows how they lie.
    """
    if not path.is_file():
        raise DataError(f"{path.name}: no such file; let ssl3d predict write it again")
    try:
        pixels = read([path])
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from error
    mask: Array = np.rint(pixels.voxels[0]).astype(np.int64)
    shape = tuple(volume.shape[1:])
    if volume.orientation == UNKNOWN:
        if mask.shape != shape:
            raise DataError(
                f"{path.name}: its shape {mask.shape} is not the scan's {shape}, and its place is unknown"
            )
        return mask
    return regrid(mask, pixels.affine, shape, np.array(volume.affine), nearest=True, outside=0)


def mean_dice(scores: dict[int, MaskScores]) -> float:
    """Return the mean Dice over the classes that truth or prediction have; `UNDEFINED` for none."""
    known = [own.dice for own in scores.values() if own.dice is not None]
    return float(np.mean(known)) if known else UNDEFINED


def _middle(mask: Array, predicted: PredictedMasks) -> tuple[int, int, int]:
    inside = np.isin(mask, list(predicted.names))
    if not inside.any():
        d, h, w = (n // 2 for n in mask.shape)
        return d, h, w
    counts = (inside.sum(axis=(1, 2)), inside.sum(axis=(0, 2)), inside.sum(axis=(0, 1)))
    d, h, w = (int(count.argmax()) for count in counts)
    return d, h, w


def _lines(scores: dict[int, MaskScores], names: dict[int, str]) -> list[str]:
    lines = []
    for value, own in scores.items():
        if own.dice is None:
            lines.append(f"{names[value]}: in neither")
        else:
            lines.append(f"{names[value]}: Dice {own.dice:.3f}, HD95 {own.hd95:.1f} mm")
    return lines


def _cell(value: float | None) -> elements.Cell:
    if value is None or value == UNDEFINED:
        return elements.Cell(elements.UNKNOWN)
    return elements.Cell(f"{value:.3f}", value)
