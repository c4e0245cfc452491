"""Several models as one: probabilities averaged slab by slab, boxes clustered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl3d.checkpoint.models import load_model, model_folders
from ssl3d.detection.boxes3d import weighted_clusters
from ssl3d.errors import UsageError
from ssl3d.model import BoxPrediction, LabelPrediction, MaskPrediction, Model, Prediction


class Ensemble:
    """Models of one task that predict together.

    Attributes:
        models: Models in evaluation mode.
        kind: Name of the task.
        classes: Value and name of each class.

    Args:
        words: Folders that name models, as `model_folders` reads them.
        device: Device that computes.

    Raises:
        CheckpointError: A model is missing or damaged.
        UsageError: The models do not predict the same, or one is given twice.
    """

    def __init__(self, words: Sequence[str], device: str = "cpu") -> None:
        folders = [folder for word in words for folder in model_folders(Path(word))]
        places = [folder.resolve() for folder in folders]
        for folder, place in zip(folders, places, strict=True):
            if places.count(place) > 1:
                raise UsageError(f"{folder}: given twice; it would count double")
        self.folders = folders
        self.models: list[Model] = [load_model(folder).to(device) for folder in folders]
        first = self.cards[0]
        for folder, card in zip(folders[1:], self.cards[1:], strict=True):
            for aspect in ("task", "classes", "channels"):
                if _told(card, aspect) != _told(first, aspect):
                    raise UsageError(
                        f"{folder} and {folders[0]} do not predict the same: {aspect} "
                        f"{_told(card, aspect)} and {_told(first, aspect)}"
                    )
        self.kind: str = first["task"]["name"]
        self.classes: list[dict[str, Any]] = first["classes"]

    @property
    def cards(self) -> list[dict[str, Any]]:
        """Cards of the models."""
        return [model.card for model in self.models]

    @property
    def can_flip(self) -> bool:
        """Whether every model was trained on mirrored volumes."""
        return all(model.can_flip for model in self.models)

    def infer(self, volume: Any, flip: bool = False) -> Prediction:
        """Predict a volume by all models."""
        predictions = [model.infer(volume, flip) for model in self.models]
        return predictions[0] if len(predictions) == 1 else joined(predictions)


def joined(predictions: Sequence[Any]) -> Prediction:
    """Join the predictions of several models of one volume.

    Probabilities and values are averaged. Boxes are clustered by weight (`weighted_clusters`), with the
    number of models as that of the boxes expected of an object.

    Args:
        predictions: Predictions of one kind.
    """
    first = predictions[0]
    if isinstance(first, MaskPrediction):
        slabs = mean_slabs([iter(own.slabs) for own in predictions])
        return MaskPrediction(first.values, first.names, first.shape, slabs)
    if isinstance(first, LabelPrediction):
        numbers = np.mean([own.numbers for own in predictions], axis=0).tolist()
        return LabelPrediction(first.names, tuple(numbers))
    boxes = torch.from_numpy(np.concatenate([own.boxes for own in predictions])).float()
    scores = torch.from_numpy(np.concatenate([own.scores for own in predictions])).float()
    labels = torch.from_numpy(np.concatenate([own.labels for own in predictions]))
    expected = torch.full((len(boxes),), float(len(predictions)))
    means, sure, heads = weighted_clusters(boxes, scores, first.merge_iou, labels, expected)
    kept = slice(0, first.limit)
    return BoxPrediction(
        first.names, means[kept].double().numpy(), sure[kept].double().numpy(),
        labels[heads][kept].numpy(), first.merge_iou, first.limit,
    )  # fmt: skip


def mean_slabs(streams: Sequence[Iterator[Tensor]]) -> Iterator[Tensor]:
    """Average streams of slabs (K, d, H, W) of one volume, whatever the depths of their slabs.

    Each stream is read no further than the slowest one's slab needs.
    """
    waiting = [next(stream, None) for stream in streams]
    while all(slab is not None for slab in waiting):
        depth = min(slab.shape[1] for slab in waiting if slab is not None)
        total = sum(slab[:, :depth].double() for slab in waiting if slab is not None)
        assert isinstance(total, Tensor)
        yield (total / len(streams)).float()
        for n, slab in enumerate(waiting):
            assert slab is not None
            waiting[n] = slab[:, depth:] if slab.shape[1] > depth else next(streams[n], None)


def _told(card: dict[str, Any], aspect: str) -> Any:
    if aspect == "task":
        return card["task"]["record"]
    if aspect == "channels":
        return card["architecture"]["config"]["in_channels"]
    return [kind["value"] for kind in card[aspect]]
