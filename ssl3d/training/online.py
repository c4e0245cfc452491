"""What is looked at while a run goes on: held-out subjects, a kNN score, and whether it collapses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl3d.encoders.inference import evaluating
from ssl3d.errors import DataError
from ssl3d.training.batch import Group
from ssl3d.training.trainee import Reducer
from ssl3d.views.crops import fit_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.data.store.collection import Collection
    from ssl3d.data.store.volume import Volume

VOLUMES = 128
"""Most volumes embedded for the kNN score, of each side."""
BATCHES = 4
"""Most batches of held-out subjects per look."""


def held_out(
    module: nn.Module, batches: Sequence[Sequence[Group]], reducer: Reducer, device: torch.device
) -> tuple[dict[str, float], dict[str, Callable[[], Figure]]]:
    """The proxies' losses and metrics on people never trained on, the same examples at every look.

    Args:
        module: The trainee, wrapped or not.
        batches: Drawn from the held-out volumes.
        reducer: Means over the ranks.
        device: Where to.

    Returns:
        Means by name, and pictures by proxy.
    """
    parts: list[dict[str, tuple[Tensor, int]]] = []
    pictures: dict[str, Callable[[], Figure]] = {}
    with evaluating(module), torch.no_grad():
        for number, groups in enumerate(batches):
            moved = [group.to(device) for group in groups]
            _, sums = module("loss", moved, f"holdout {number}")
            parts.append(sums.values)
            for name, draw in sums.pictures.items():
                pictures.setdefault(name, draw)
    means, _ = reducer.mean(parts)
    return {f"holdout/{name}": value for name, value in means.items()}, pictures


def embed_centres(
    module: nn.Module, data: Collection, patch: Sequence[int], device: torch.device, most: int = VOLUMES
) -> tuple[Tensor, list[Any]]:
    """Embeddings (N, embed_dim) of the middle of each volume's foreground, and the volumes' labels.

    One crop, or the mean over a few slices where the encoder was trained on slices. Volumes that cannot
    be read are left out: it is the loader that names them.

    Args:
        module: The trainee, wrapped or not.
        data: At most `most` of its volumes are taken, evenly spread.
        patch: Crop size (D, H, W).
        device: Where to.
        most: See `data`.
    """
    found, labels = [torch.zeros(0)], []
    with evaluating(module), torch.no_grad():
        for volume in spread(data, most):
            try:
                crops = centre_crops(volume, patch).to(device)
            except (DataError, OSError):
                continue
            found.append(module("embed", crops).float().mean(dim=0, keepdim=True).cpu())
            labels.append(volume.label)
    return torch.cat(found[1:] or found), labels


def spread(data: Collection, most: int) -> list[Volume]:
    """At most so many volumes, evenly spread."""
    return [
        data[int(i)] for i in np.unique(np.linspace(0, len(data) - 1, min(most, len(data))).astype(int))
    ]


def centre_crops(volume: Volume, patch: Sequence[int], slices: int = 8) -> Tensor:
    """A crop (1, C, D, H, W) from the middle of the foreground, or evenly spread slices (S, C, 1, H, W)."""
    low, high = volume.foreground_box()
    extent = fit_size(volume, patch)
    start = [(a + b - n) // 2 for a, b, n in zip(low, high, extent, strict=True)]
    if patch[0] > 1 or volume.shape[1] == 1:
        return volume.read(start, extent)[None]
    places = np.unique(np.linspace(low[0], high[0] - 1, slices + 2).astype(int)[1:-1]).tolist()
    return torch.stack([volume.read([place, *start[1:]], extent) for place in places])


def knn_accuracy(bank: Tensor, bank_labels: Any, queries: Tensor, query_labels: Any) -> float:
    """Share of queries whose class the weighted vote of their nearest neighbours gets right.

    Args:
        bank: Embeddings (N, embed_dim) of known class.
        bank_labels: N classes.
        queries: Embeddings (M, embed_dim).
        query_labels: M classes.
    """
    from lightly.utils.benchmarking import knn_predict
    from torch.nn.functional import normalize

    names = sorted({*map(str, bank_labels), *map(str, query_labels)})
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[str(label)] for label in bank_labels])
    truth = torch.tensor([number[str(label)] for label in query_labels])
    # Lightly's default of 200 neighbours fails on a smaller bank.
    near = min(20, len(bank))
    ranked = knn_predict(
        normalize(queries), normalize(bank).T, labels, num_classes=len(names), knn_k=near, knn_t=0.1
    )
    return float((ranked[:, 0] == truth).float().mean())


def spread_of(embeddings: Tensor) -> float:
    """Standard deviation of the L2-normalised embeddings, times the root of their length.

    About 1 where they fill the sphere, 0 where all volumes give one vector (collapse).
    """
    from lightly.utils.debug import std_of_l2_normalized

    return float(std_of_l2_normalized(embeddings)) * embeddings.shape[1] ** 0.5


def look(
    module: nn.Module, train: Collection, queries: Collection, patch: Sequence[int], device: torch.device
) -> dict[str, float]:
    """The collapse measure, and the kNN score where classes exist.

    Args:
        module: The trainee, wrapped or not.
        train: What was trained on: the bank of the kNN score.
        queries: Labelled volumes of other people; may be empty.
        patch: Crop size (D, H, W).
        device: Where to.
    """
    labelled = [i for i, label in enumerate(train.labels) if _is_class(label)]
    known = train.select(labelled) if labelled else train
    bank, classes = embed_centres(module, known, patch, device)
    found = {"online/embedding_std": spread_of(bank)} if len(bank) > 1 else {}
    asked = [i for i, label in enumerate(queries.labels) if _is_class(label)]
    if not labelled or not asked or len(set(map(str, classes))) < 2:
        return found
    embedded, truth = embed_centres(module, queries.select(asked), patch, device)
    if not truth:
        return found
    found["online/knn_accuracy"] = knn_accuracy(bank, classes, embedded, truth)
    counts = [truth.count(label) for label in set(truth)]
    found["online/knn_majority"] = max(counts) / len(truth)
    return found


def _is_class(label: Any) -> bool:
    return isinstance(label, int | str)
