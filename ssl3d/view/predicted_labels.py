"""Predicted classes and values beside the true ones: probabilities, a table of confusions, errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from ssl3d.amounts import count_of, printable
from ssl3d.evaluation.statistics import metrics
from ssl3d.pages import charts, elements
from ssl3d.view import parts as frame
from ssl3d.view import slices
from ssl3d.view.gallery import Card
from ssl3d.view.predicted import UNDEFINED, Predicted

PROBABILITY = "probability of "
MOST_CLASSES = 30
"""Most classes of a table of confusions."""
MOST_ROWS = 5000
"""Most rows of the table of all subjects."""


class PredictedLabels(Predicted):
    """Classes with probabilities, or values, of subjects."""

    unit = "subject"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        columns = self.rows[0] if self.rows else {}
        self.classes = [name.removeprefix(PROBABILITY) for name in columns if name.startswith(PROBABILITY)]
        self.truth: dict[tuple[str, str], str] = {}
        self.scans: dict[tuple[str, str], Any] = {}
        for volume in self.data or ():
            person = (volume.dataset, volume.subject)
            self.scans.setdefault(person, volume)
            if volume.label is not None:
                label = volume.label
                whole = isinstance(label, float) and label.is_integer()
                self.truth.setdefault(person, str(int(label) if whole else label))
        self.known = any(self._truth(row) is not None for row in self.rows)

    def _truth(self, row: Any) -> str | None:
        return self.truth.get(self._person(row))

    def _person(self, row: Any) -> tuple[str, str]:
        """Return the data set and the subject that the data call a predicted subject."""
        own = (row["dataset"], row["subject"])
        return own if own in self.scans else self.people.get(own, own)

    def _share(self, row: Any, name: str) -> float:
        return float(row.get(PROBABILITY + name) or 0)

    def sought(self) -> list[tuple[str, str]]:
        """Return the data set and the name of each prediction's subject."""
        return [(row["dataset"], row["subject"]) for row in self.rows]

    def card(self, position: int, side: int, number: int) -> tuple[Card, float]:
        """Return the card of a subject, by the probability of the true class, or by the error."""
        row, truth = self.rows[position], self._truth(self.rows[position])
        volume = self.scans.get(self._person(row))
        lines = [f"predicted {row['prediction']}" + (f", true {truth}" if truth is not None else "")]
        filters = {"data set": row["dataset"]}
        order = UNDEFINED
        if self.classes:
            shares = [f"{name} {self._share(row, name):.2f}" for name in self.classes[:MOST_CLASSES]]
            lines.append("probabilities: " + ", ".join(shares))
            filters["predicted"] = row["prediction"]
            if truth is not None:
                order = self._share(row, truth)
                right = "right" if truth == row["prediction"] else "wrong"
                filters |= {"true": truth, "prediction is": right}
        elif truth is not None:
            order = -abs(float(row["prediction"]) - float(truth))
            lines.append(f"error {-order:.4g}")
        picture = ""
        if volume is not None:
            shape = volume.shape[1:]
            plan = slices.layout(volume, [n // 2 for n in shape], side)
            source = slices.grey(plan, [slices.cut(volume, plane, shape) for plane in plan.planes])
            picture = slices.picture(
                plan, source, [slices.Layer()], f"Slices of {row['subject']}", f"v{number}"
            )
        return Card(row["subject"], picture, lines, filters), order

    def _pairs(self) -> list[tuple[Any, str]]:
        return [(row, truth) for row in self.rows if (truth := self._truth(row)) is not None]

    def summary(self, shown: int) -> list[str]:
        """Return how often the predictions are right, or how far they are off."""
        pairs = self._pairs()
        if not pairs:
            return [f"{count_of(len(self.rows), 'subject')} predicted; their labels are not known."]
        if not self.classes:
            errors = [abs(float(row["prediction"]) - float(truth)) for row, truth in pairs]
            return [f"The mean error of {count_of(len(pairs), 'subject')} is {np.mean(errors):.4g}."]
        right = sum(row["prediction"] == truth for row, truth in pairs)
        target = np.array([self._number(truth) for _, truth in pairs])
        answers = np.array([self._number(row["prediction"]) for row, _ in pairs])
        sentence = f"{right} of {count_of(len(pairs), 'subject')} are right ({right / len(pairs):.1%})"
        if (target >= 0).all() and len(set(target.tolist())) > 1:
            balanced = float(metrics.balanced_accuracy(target, answers)[0])
            shares = np.array([[self._share(row, name) for name in self.classes] for row, _ in pairs])
            area = float(metrics.multiclass_auc(target, shares)[0])
            sentence += f"; balanced accuracy {balanced:.3f}, AUC {area:.3f}"
        never = [name for name in self.classes if all(row["prediction"] != name for row, _ in pairs)]
        missed = [name for name in never if any(truth == name for _, truth in pairs)]
        if missed:
            sentence += f". Never predicted: {', '.join(missed)}"
        return [sentence + "."]

    def _number(self, name: str) -> int:
        return self.classes.index(name) if name in self.classes else -1

    def tables(self) -> list[str]:
        """Return the table of confusions, or a chart of predictions against true values, and all rows."""
        parts: list[str] = []
        pairs = self._pairs()
        if pairs and self.classes and len(self.classes) <= MOST_CLASSES:
            counts = {name: dict.fromkeys(self.classes, 0) for name in self.classes}
            for row, truth in pairs:
                if truth in counts and row["prediction"] in counts[truth]:
                    counts[truth][row["prediction"]] += 1
            rows = []
            for name, own in counts.items():
                total = max(sum(own.values()), 1)
                cells = [elements.Cell(str(n), n / total) for n in own.values()]
                rows.append(elements.Row(f"true {name}", cells))
            heads = ["", *(f"predicted {name}" for name in self.classes)]
            parts.append(
                elements.table("Confusions: subjects by true and predicted class", heads, rows, heat=True)
            )
        elif pairs and not self.classes:
            title = "Predicted against true values"
            points = [(float(truth), float(row["prediction"]), row["subject"]) for row, truth in pairs]
            dots = charts.dots(points, "true value", "predicted value", title)
            parts.append(elements.figure(dots, f"{title}; on the line both are equal."))
        rows = []
        for row in self.rows:
            answers = (self._truth(row) or elements.UNKNOWN, row["prediction"])
            cells = [elements.Cell(answer, answer) for answer in answers]
            shares = [self._share(row, name) for name in self.classes]
            cells += [elements.Cell(f"{share:.3f}", share) for share in shares]
            rows.append(elements.Row(printable(row["subject"]), cells))
        heads = ["subject", "true", "predicted", *(PROBABILITY + name for name in self.classes)]
        table = elements.table("Predictions of every subject", heads, rows[:MOST_ROWS])
        return [*parts, frame.folded("Predictions of every subject", table)]

    def explained(self) -> str:
        """Say what decides the order of the cards."""
        if not self.known:
            return "Slices go through the middle of each subject's first scan."
        by = "the probability of the true class" if self.classes else "the error"
        return f"The order is by {by}. Slices go through the middle of each subject's first scan."
