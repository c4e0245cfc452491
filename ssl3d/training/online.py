"""Measures of a run while it goes on: held-out subjects, a kNN score, and collapse."""

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
"""Most volumes embedded for the kNN score, on each side."""
BATCHES = 4
"""Most batches of held-out subjects per look."""


def held_out(
    module: nn.Module, batches: Sequence[Sequence[Group]], reducer: Reducer, device: torch.device
) -> tuple[dict[str, float], dict[str, Callable[[], Figure]]]:
    """Measure the proxies' losses and metrics on people never trained on, the same examples every time.

    Args:
        module: Trainee, wrapped or not.
        batches: Batches drawn from the held-out volumes.
        reducer: Reducer that takes means over the ranks.
        device: Device to compute on.

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
    """Embed the middle of each volume's foreground.

    It is one crop, or the mean over a few slices where the encoder was trained on slices. Volumes that
    cannot be read are left out: it is the loader that names them.

    Args:
        module: Trainee, wrapped or not.
        data: Volumes to embed.
        patch: Crop size (D, H, W) in voxels.
        device: Device to compute on.
        most: Most volumes to take, evenly spread.

    Returns:
        Embeddings (N, embed_dim), and the labels of those N volumes.
    """
    embedded, labels = [torch.zeros(0)], []
    with evaluating(module), torch.no_grad():
        for volume in spread(data, most):
            try:
                crops = centre_crops(volume, patch).to(device)
            except (DataError, OSError):
                continue
            embedded.append(module("embed", crops).float().mean(dim=0, keepdim=True).cpu())
            labels.append(volume.label)
    return torch.cat(embedded[1:] or embedded), labels


def spread(data: Collection, most: int) -> list[Volume]:
    """Select at most so many volumes, evenly spread."""
    return [
        data[int(i)] for i in np.unique(np.linspace(0, len(data) - 1, min(most, len(data))).astype(int))
    ]


def centre_crops(volume: Volume, patch: Sequence[int], slices: int = 8) -> Tensor:
    """Read a crop (1, C, D, H, W) in the middle of the foreground, or spread slices (S, C, 1, H, W)."""
    low, high = volume.foreground_box()
    extent = fit_size(volume, patch)
    start = [(a + b - n) // 2 for a, b, n in zip(low, high, extent, strict=True)]
    if patch[0] > 1 or volume.shape[1] == 1:
        return volume.read(start, extent)[None]
    places = np.unique(np.linspace(low[0], high[0] - 1, slices + 2).astype(int)[1:-1]).tolist()
    return torch.stack([volume.read([place, *start[1:]], extent) for place in places])


def knn_accuracy(bank: Tensor, bank_labels: Any, queries: Tensor, query_labels: Any) -> float:
    """Score the share of queries whose class the weighted vote of their nearest neighbours gets right.

    Args:
        bank: Embeddings (N, embed_dim) of known class.
        bank_labels: Classes of the N embeddings.
        queries: Embeddings (M, embed_dim).
        query_labels: Classes of the M embeddings.
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
    """Measure the standard deviation of the L2-normalised embeddings, times the root of their length.

    It is about 1 where they fill the sphere, and 0 where all volumes give one vector (collapse).
    """
    from lightly.utils.debug import std_of_l2_normalized

    return float(std_of_l2_normalized(embeddings)) * embeddings.shape[1] ** 0.5


def look(
    module: nn.Module, train: Collection, queries: Collection, patch: Sequence[int], device: torch.device
) -> dict[str, float]:
    """Measure collapse, and the kNN score where classes exist.

    Args:
        module: Trainee, wrapped or not.
        train: Volumes that were trained on: the bank of the kNN score.
        queries: Labelled volumes of other people; may be empty.
        patch: Crop size (D, H, W) in voxels.
        device: Device to compute on.
    """
    labelled = [i for i, label in enumerate(train.labels) if _is_class(label)]
    known = train.select(labelled) if labelled else train
    bank, classes = embed_centres(module, known, patch, device)
    values = {"online/embedding_std": spread_of(bank)} if len(bank) > 1 else {}
    asked = [i for i, label in enumerate(queries.labels) if _is_class(label)]
    if not labelled or not asked or len(set(map(str, classes))) < 2:
        return values
    embedded, truth = embed_centres(module, queries.select(asked), patch, device)
    if not truth:
        return values
    values["online/knn_accuracy"] = knn_accuracy(bank, classes, embedded, truth)
    counts = [truth.count(label) for label in set(truth)]
    values["online/knn_majority"] = max(counts) / len(truth)
    return values


def _is_class(label: Any) -> bool:
    return isinstance(label, int | str)
