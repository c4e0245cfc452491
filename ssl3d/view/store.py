"""The page of stores: what is in them, how every volume looks, and what was refused or left out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssl3d.amounts import count_of, size
from ssl3d.data.geometry import UNKNOWN
from ssl3d.data.open import open_data
from ssl3d.data.preparation.progress import Progress
from ssl3d.errors import DataError
from ssl3d.pages import charts, elements, palette
from ssl3d.view import parts, slices
from ssl3d.view.gallery import Card, gallery, side_of

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection
    from ssl3d.data.store.volume import Volume

Array = NDArray[Any]

BINS = 40
"""Bars of a histogram of intensities."""
WHOLE = 1 << 23
"""Most voxels of a volume of which all are counted; of a larger one, some slices."""
COUNTED = 16
"""Slices of a larger volume that are counted."""
NO_LABEL, NO_SPLIT = "no label", "no split of its own"
MOST_LABELS = 30
"""Most different labels of a table."""


class Histograms:
    """Histograms of stored intensities, on one axis for all volumes of a data set.

    Args:
        data: Volumes, whose stores say how their intensities spread.
    """

    def __init__(self, data: Collection) -> None:
        self.ends: dict[str, tuple[float, float]] = {}
        self.sums: dict[str, Array] = {}
        for store in data.stores:
            for name, print_ in store.fingerprint.items():
                known = [float(v) for own in print_["intensity"][:1] for v in own.values()]
                if not known or not np.isfinite(known).all():
                    continue
                low, high = min(known), max(known)
                before = self.ends.get(name, (low, high))
                self.ends[name] = min(low, before[0]), max(high, before[1])

    def count(self, volume: Volume) -> Array | None:
        """Count the first channel of a volume, in shares of its voxels; None where nothing is known."""
        if volume.dataset not in self.ends:
            return None
        low, high = self.ends[volume.dataset]
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        depth = volume.shape[1]
        if int(np.prod(volume.shape[1:])) <= WHOLE:
            counts = np.histogram(np.clip(volume.read()[0].numpy(), edges[0], edges[-1]), edges)[0]
        else:
            counts = np.zeros(BINS, np.int64)
            for at in np.unique(np.linspace(0, depth - 1, COUNTED).astype(int)):
                layer = volume.read((int(at), 0, 0), (1, *volume.shape[2:]))[0].numpy()
                counts += np.histogram(np.clip(layer, edges[0], edges[-1]), edges)[0]
        shares: Array = counts / max(int(counts.sum()), 1)
        self.sums[volume.dataset] = self.sums.get(volume.dataset, 0) + shares
        return shares

    def draw(self) -> str:
        """Draw the histogram of each data set, the mean over its volumes."""
        drawn = []
        for name, total in self.sums.items():
            low, high = self.ends[name]
            title = f"Intensities of {name}"
            bars = charts.bars(low, high, (total / total.sum()).tolist(), "stored intensity", title)
            drawn.append(
                elements.figure(bars, f"{title}: first channel, as stored; mean over the volumes shown.")
            )
        return "".join(drawn)


def store_page(path: str, most: int) -> tuple[str, str]:
    """Return the page of stores, and a line that says what is in it.

    Args:
        path: Store, folder of stores, or phantoms.
        most: Largest number of volumes that are shown.

    Raises:
        DataError: There is no store, or its index is damaged.
    """
    data = open_data([path])
    shown = np.unique(np.linspace(0, len(data) - 1, min(most, len(data))).astype(int)).tolist()
    histograms, side = Histograms(data), side_of(len(shown))
    values: set[int] = set()
    cards: list[Card] = []
    progress, begun = Progress(len(shown)), time.monotonic()
    for number, position in enumerate(shown):
        volume = data[position]
        try:
            card, there = _card(volume, side, histograms, number)
            values |= there
        except DataError as error:
            card = _unreadable(volume, str(error))
        cards.append(card)
        progress.show(number + 1, time.monotonic() - begun)
    progress.clear()
    faults = sum(bool(card.fault) for card in cards)
    body = [*_top(path, data, len(shown), faults), _beside(data, histograms), "<h2>Volumes</h2>"]
    known = sorted(values)
    titles = palette.class_titles(data, [0, *known])[1:]
    boxes = "box" if any('class="true"' in card.picture for card in cards) else ""
    body.append(parts.legend(dict(zip(known, titles, strict=True)), boxes))
    body += elements.small([
        "Slices go through the middle of the mask or of the largest box where there is one, else through "
        "the middle of the volume, in physical proportions. Letters: R and L are right and left of the "
        "patient, A and P anterior and posterior, S and I superior and inferior; without letters, the "
        "orientation is unknown."
    ])  # fmt: skip
    body.append(gallery(cards, flat=bool((data.shapes[:, 1] == 1).all())))
    body += _aside(data)
    body.append(_settings(data))
    aside = f", {count_of(faults, 'damaged volume')}" if faults else ""
    return parts.page(path, body), f"{count_of(len(shown), 'volume')}{aside}"


def _card(volume: Volume, side: int, histograms: Histograms, number: int) -> tuple[Card, set[int]]:
    boxes = volume.boxes
    middle = slices.centre_of_mask(volume)
    shape = volume.shape[1:]
    at = middle[0] if middle else slices.centre_of_boxes(boxes, shape) or tuple(n // 2 for n in shape)
    plan = slices.layout(volume, at, side)
    source = slices.grey(plan, [slices.cut(volume, plane, shape) for plane in plan.planes])
    overlay = ""
    if middle:
        overlay = slices.outlines(plan, [slices.cut_mask(volume, plane, shape) for plane in plan.planes])
    shapes = "" if boxes is None else slices.rectangles(plan, boxes, "true")
    drawn = slices.picture(
        plan, source, [slices.Layer("", overlay, shapes)], f"Slices of {volume.id}", f"v{number}"
    )
    counts = histograms.count(volume)
    card = Card(
        volume.id, drawn, describe(volume), _filters(volume),
        extra="" if counts is None else charts.spark(counts.tolist(), f"Intensities of {volume.id}"),
    )  # fmt: skip
    return card, set(middle[1]) if middle else set()


def _unreadable(volume: Volume, why: str) -> Card:
    return Card(volume.id, "", describe(volume), _filters(volume), fault=f"Damaged: {why}")


def describe(volume: Volume) -> list[str]:
    """Describe a volume in lines: who it is of, its grid, and what is known of it."""
    label = volume.label
    boxes = volume.boxes
    who = [f"subject {volume.subject}", volume.split, "" if label is None else f"label {label}"]
    if boxes is not None:
        who.append(f"boxes: {len(boxes)}")
    channels = f", {volume.shape[0]} channels" if volume.shape[0] > 1 else ""
    grid = (
        f"{_by(volume.shape[1:])} voxels (D, H, W){channels}; {_by(volume.spacing)} mm; "
        f"{'orientation unknown' if volume.orientation == UNKNOWN else volume.orientation}"
        f"{_file_letters(volume)}"
    )
    return [" · ".join(word for word in who if word), grid]


def _file_letters(volume: Volume) -> str:
    """Name the directions in which the axes of the file run, where it says so."""
    import nibabel

    try:
        affine = volume.record.original_affine
    except DataError:
        return ""
    if affine is None:
        return ""
    return f" ({''.join(nibabel.aff2axcodes(np.array(affine)))} in the file)"


def _filters(volume: Volume) -> dict[str, str]:
    label = volume.label
    return {
        "data set": volume.dataset,
        "split": volume.split or NO_SPLIT,
        "label": NO_LABEL if label is None else str(label),
        "mask": "with a mask" if volume.has_mask else "without a mask",
    }


def _by(sides: Sequence[float]) -> str:
    return " × ".join(f"{side:.4g}" for side in sides)


# About all of them --------------------------------------------------------------------------------


def _top(path: str, data: Collection, shown: int, faults: int) -> list[str]:
    people = len(data.identities())
    refused = sum(len(store.rejected) for store in data.stores)
    first = f"{count_of(len(data), 'volume')} of {count_of(people, 'subject')}"
    first += f" in {count_of(len(data.dataset_names), 'data set')}." if len(data.dataset_names) > 1 else "."
    sentences = [first]
    counts = {
        "a mask": int(data.has_mask.sum()),
        "boxes": int(data.has_boxes.sum()),
        "a label": sum(label is not None for label in data.labels),
    }
    known = [
        f"{count:,} {'has' if count == 1 else 'have'} {mark}" for mark, count in counts.items() if count
    ]
    if known:
        sentences.append(f"{', '.join(known)}.")
    if refused:
        sentences.append(
            f"{count_of(refused, 'file')} {'were' if refused > 1 else 'was'} refused: see below."
        )
    if shown < len(data):
        sentences.append(f"{shown:,} volumes, chosen evenly, are shown here.")
    lines = [parts.summary([" ".join(sentences)])]
    if faults:
        lines += elements.warnings(
            [f"{count_of(faults, 'volume')} cannot be read. Copy the store again, or prepare it again."]
        )
    shapes, spacings = data.shapes[:, 1:], data.spacings
    facts = {
        "volumes": f"{len(data):,}",
        "subjects": f"{people:,}",
        "voxels (D × H × W)": _ends(shapes),
        "spacing, mm": _ends(spacings),
        "orientation": ", ".join(sorted(set(map(str, data.orientations)))),
        "channels": ", ".join(map(str, sorted(set(data.shapes[:, 0].tolist())))),
        "size on disk": size(sum(store.state[2] for store in data.stores)),
    }
    return [*lines, parts.facts(facts)]


def _beside(data: Collection, histograms: Histograms) -> str:
    """Put the table of splits and the histograms side by side, so that the pictures follow soon."""
    splits = _splits(data)
    table = f"<div>{splits}</div>" if splits else ""
    return f'{_ranges(data)}<div class="charts">{table}{histograms.draw()}</div>'


def _ends(values: Array) -> str:
    """Write the smallest and the largest of each side."""
    ends = zip(np.min(values, axis=0), np.max(values, axis=0), strict=True)
    return " × ".join(f"{a:.4g}" if a == b else f"{a:.4g}–{b:.4g}" for a, b in ends)


def _ranges(data: Collection) -> str:
    """Return the table of data sets; of one, all that it would say stands above."""
    if len(data.dataset_names) < 2:
        return ""
    rows = []
    for code, name in enumerate(data.dataset_names):
        own = data.dataset_codes == code
        if not own.any():
            continue
        shapes, spacings = data.shapes[own, 1:], data.spacings[own]
        cells = [elements.Cell(f"{own.sum():,}", int(own.sum()))]
        cells.append(elements.Cell(f"{len(set(data.subject_codes[own].tolist())):,}", 0))
        for values in (shapes, spacings):
            cells.append(elements.Cell(_ends(values), float(np.prod(np.median(values, axis=0)))))
        rows.append(elements.Row(name, cells))
    head = ["data set", "volumes", "subjects", "voxels (D × H × W)", "mm"]
    return elements.table("Shapes and spacings of each data set", head, rows)


def _splits(data: Collection) -> str:
    """Return the table of subjects by split and label."""
    labels = [NO_LABEL if label is None else str(label) for label in data.labels]
    kinds = sorted(set(labels))
    splits = [split or NO_SPLIT for split in data.splits]
    order = sorted(set(splits))
    if len(order) < 2 and len(kinds) < 2:
        return ""
    if len(kinds) > MOST_LABELS:
        labels, kinds = ["any label"] * len(labels), ["any label"]
    people: Counter[tuple[str, str]] = Counter()
    for _, split, label in {
        (int(code), split, label)
        for code, split, label in zip(data.subject_codes, splits, labels, strict=True)
    }:
        people[split, label] += 1
    rows = [
        elements.Row(
            label, [elements.Cell(f"{people[split, label]:,}", people[split, label]) for split in order]
        )
        for label in kinds
    ]
    return elements.table("Subjects by label and split", ["label", *order], rows)


def _aside(data: Collection) -> list[str]:
    refused = [
        (str(entry.get("path", "")), str(entry.get("reason", "")))
        for store in data.stores for entry in store.rejected
    ]  # fmt: skip
    left = [
        row for store in data.stores if isinstance(store.path, Path)
        for row in parts.listed(store.path.parent / "left_out.csv", store.path.name)
    ]  # fmt: skip
    return [
        parts.files("Refused", "These files were to be prepared and could not be used.", refused),
        parts.files(
            "Left out", "These files lie beside the scans and are none, or belong to others.", left
        ),
    ]


def _settings(data: Collection) -> str:
    pairs: dict[str, str] = {}
    for store in data.stores[:1]:
        options = store.settings.get("options") or {}
        pairs |= {key: str(value) for key, value in options.items() if value not in ("", [], None, False)}
    return parts.settings("How the store was made", pairs)
