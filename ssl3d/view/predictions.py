"""The page of predictions: scan, truth, prediction and difference, the worst first."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.amounts import count_of
from ssl3d.data.open import open_data
from ssl3d.data.preparation.progress import Progress
from ssl3d.errors import DataError
from ssl3d.json_files import parse_json
from ssl3d.pages import elements
from ssl3d.view import parts
from ssl3d.view.gallery import Card, gallery, side_of
from ssl3d.view.predicted import Predicted
from ssl3d.view.predicted_boxes import PredictedBoxes
from ssl3d.view.predicted_labels import PredictedLabels
from ssl3d.view.predicted_masks import PredictedMasks

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection


def predictions_page(folder: Path, words: Sequence[str], most: int) -> tuple[str, str]:
    """Return the page of a folder of predictions, and a line that says what is in it.

    Args:
        folder: Folder that `ssl3d predict` wrote.
        words: Scans that were predicted, as `open_data` takes them; empty for those that the folder names.
        most: Largest number of volumes that are shown.

    Raises:
        DataError: The folder's tables cannot be read, or scans that are named cannot.
    """
    about = _about(folder)
    rows = _rows(folder)
    data, note = _scans(about, words)
    kind = _kind(rows)
    predicted = kind(folder, rows, about, data)
    progress, begun = Progress(min(len(predicted), most)), time.monotonic()
    shown = _chosen(len(predicted), most)
    side = side_of(2 * len(shown))
    cards: list[tuple[float, Card]] = []
    for number, position in enumerate(shown):
        try:
            card, order = predicted.card(position, side, number)
        except DataError as error:
            card, order = Card(predicted.name(position), "", fault=str(error)), float("-inf")
        cards.append((order, card))
        progress.show(number + 1, time.monotonic() - begun)
    progress.clear()
    cards.sort(key=lambda pair: pair[0])  # stable: what has one score keeps its place
    ordered = [card for _, card in cards]
    faults = sum(bool(card.fault) for card in ordered)
    body = [parts.summary(predicted.summary(len(shown)))]
    missing = note or predicted.strangers()
    if missing:
        print(missing, file=sys.stderr)
    body += elements.warnings(line for line in (_seen(about), missing) if line)
    if faults:
        body += elements.warnings([f"{count_of(faults, 'scan')} cannot be compared: see the first cards."])
    body += [*predicted.tables(), f"<h2>Scans{', the worst first' * predicted.known}</h2>"]
    body += [predicted.legend(), *elements.small([predicted.explained()]), gallery(ordered, "scan")]
    aside = parts.listed(folder / "rejected.csv")
    body.append(parts.files("Set aside", "These scans could not be predicted.", aside))
    body.append(parts.settings("How they were predicted", _settings(about)))
    return parts.page(str(folder), body), f"{count_of(len(shown), 'predicted scan')}"


def _seen(about: Mapping[str, Any]) -> str:
    """Warn of scans whose subjects a model was trained on: their scores do not hold for other people."""
    seen, predicted = about.get("of_training_subjects"), about.get("predicted")
    if not isinstance(seen, int) or not seen:
        return ""
    return (
        f"{seen:,} of {predicted:,} volumes are of subjects that a model was trained or chosen on, so "
        "these scores are better than those of other people."
    )


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "predict.json"
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); let ssl3d predict write it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not what ssl3d predict writes")
    return content


def _rows(folder: Path) -> list[dict[str, str]]:
    path = folder / "predictions.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); let ssl3d predict write it again") from error


def _kind(rows: Sequence[Mapping[str, str]]) -> type[Predicted]:
    columns = set(rows[0]) if rows else set()
    if "file" in columns:
        return PredictedMasks
    return PredictedLabels if "prediction" in columns else PredictedBoxes


def _scans(about: Mapping[str, Any], words: Sequence[str]) -> tuple[Collection | None, str]:
    """Open the scans that were predicted; without them, say in words what is missing.

    Raises:
        DataError: Scans that the user names cannot be opened.
    """
    if words:
        return open_data(words), ""
    noted = [str(word) for word in about.get("data") or ()]
    if not noted:
        return (
            None,
            "The scans are not known: name them with --data to see them, and their masks or labels.",
        )
    try:
        return open_data(noted), ""
    except DataError as error:
        return None, f"The scans cannot be opened ({error}): name them with --data."


def _chosen(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / max(most - 1, 1)) for k in range(most)})


def _settings(about: Mapping[str, Any]) -> dict[str, str]:
    models = [
        str(model.get("folder", "")) for model in about.get("models") or () if isinstance(model, dict)
    ]
    pairs = {
        "models": ", ".join(models),
        "task": str(about.get("task", "")),
        "data": " ".join(map(str, about.get("data") or ())),
        "mirrored copies": "yes" if about.get("flip") else "no",
        "subjects of the training data": str(about.get("of_training_subjects", "")),
        "to be cited": "; ".join(map(str, (about.get("citations") or {}).values())),
        **{f"version of {name}": str(value) for name, value in (about.get("versions") or {}).items()},
    }
    return {name: value for name, value in pairs.items() if value}
