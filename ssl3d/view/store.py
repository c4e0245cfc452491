"""The page of stores: what is in them, how every volume looks, and what was refused or left out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
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
        "size on disk": size(sum(store.path.stat().st_size for store in data.stores)),
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
    left = [row for store in data.stores
            for row in parts.listed(store.path.parent / "left_out.csv", store.path.name)]  # fmt: skip
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
