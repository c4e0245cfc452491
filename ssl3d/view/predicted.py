"""What the pages of masks, boxes and labels share: predictions beside what is known of their scans."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d.data.identity import source_hash
from ssl3d.view.gallery import Card

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection
    from ssl3d.data.store.volume import Volume

UNDEFINED = float("inf")
"""Order of a scan without a score: after all others."""


class Predicted(ABC):
    """Predictions of one kind.

    Attributes:
        known: Whether the truth of a scan is known.
        unit: What a prediction is of: a scan, or a subject.

    Args:
        folder: Folder that `ssl3d predict` wrote.
        rows: Rows of its `predictions.csv`.
        about: Content of its `predict.json`.
        data: Scans that were predicted; None where nobody knows them.
    """

    known = False
    unit = "scan"

    def __init__(
        self, folder: Path, rows: Sequence[Mapping[str, str]], about: Mapping[str, Any],
        data: Collection | None,
    ) -> None:  # fmt: skip
        self.folder, self.rows, self.about, self.data = folder, rows, about, data
        self._places: dict[tuple[str, str], int] = {}
        if data is not None:
            names = zip(data.datasets, data.ids, strict=True)
            self._places = {(str(dataset), str(name)): k for k, (dataset, name) in enumerate(names)}
        self.people: dict[tuple[str, str], tuple[str, str]] = {}
        """(data set, subject) of the data for each of the predictions that has another name there."""
        self._find_by_content()

    def _find_by_content(self) -> None:
        """Find scans that have other names among the data by the hashes of their files."""
        if self.data is None:
            return
        noted = [own for own in self.about.get("scans") or () if isinstance(own, Mapping)]
        named = [(str(own.get("dataset")), str(own.get("id")), str(own.get("subject"))) for own in noted]
        if all(own[:2] in self._places for own in named):
            return
        places: dict[str, list[int]] = {}
        for k, volume in enumerate(self.data):
            record = volume.record
            places.setdefault(source_hash(record.sha256, record.source), []).append(k)
        places.pop("", None)  # a hash that nobody computed
        for own, (dataset, name, subject) in zip(noted, named, strict=True):
            positions = places.get(str(own["scan"]), [])
            if (dataset, name) not in self._places and len(positions) == 1:
                self._places[dataset, name] = positions[0]
                volume = self.data[positions[0]]
                self.people[dataset, subject] = (volume.dataset, volume.subject)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, position: int) -> str:
        """Return the name of a predicted scan."""
        return self.rows[position].get("id") or self.rows[position].get("subject", "")

    def sought(self) -> list[tuple[str, str]]:
        """Return the data set and the name of each prediction's scan, or subject."""
        return [(row["dataset"], row["id"]) for row in self.rows]

    def strangers(self) -> str:
        """Say in a sentence which predictions have no scan among the data; nothing where all have one."""
        if self.data is None or not len(self.data):
            return ""
        if self.unit == "scan":
            theirs, known = self.data.ids, set(self._places)
        else:
            theirs = self.data.subjects
            pairs = zip(self.data.datasets, theirs, strict=True)
            known = {(str(a), str(b)) for a, b in pairs} | set(self.people)
        wanted = dict.fromkeys(self.sought())
        lost = [pair for pair in wanted if pair not in known]
        if not lost:
            return ""
        return (
            f"{len(lost):,} of {len(wanted):,} predicted {self.unit}s are not among the data, such as "
            f"{lost[0][1]} of data set {lost[0][0]}; the data begin with {theirs[0]} of data set "
            f"{self.data.datasets[0]}. Give --data the store or the folder that was predicted, "
            "or a list in that folder."
        )

    def volume(self, dataset: str, name: str) -> Volume | None:
        """Return the scan of a prediction, if it is among the data."""
        place = self._places.get((dataset, name))
        return None if place is None or self.data is None else self.data[place]

    @abstractmethod
    def card(self, position: int, side: int, number: int) -> tuple[Card, float]:
        """Return the card of a scan, and its place in the order: the lower, the worse.

        Args:
            position: Number of the prediction.
            side: Pixels of the volume's longest side.
            number: Number of the card in the page.

        Raises:
            DataError: A file is missing or damaged, or prediction and scan do not fit.
        """

    @abstractmethod
    def summary(self, shown: int) -> list[str]:
        """Return what the predictions come to, in sentences, once their cards are made."""

    def tables(self) -> list[str]:
        """Return tables and charts of all scores."""
        return []

    def legend(self) -> str:
        """Return the colours and what they mean."""
        return ""

    def explained(self) -> str:
        """Say how the cards are to be read."""
        return ""
