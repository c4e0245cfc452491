"""Clusterings of pairs of views, as modules: SwAV's prototypes and DeepCluster-v2's k-means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl3d.objectives.clustering import (
    MemoryBank,
    Prototypes,
    agreement,
    balanced_assignments,
    cluster_loss,
    default_prototypes,
    push_pairs,
    queue_scores,
    swav_loss,
)


class ClusteredPairs(NamedTuple):
    """Loss and choices of one clustering of a batch of pairs.

    Attributes:
        loss: Scalar; its mean over ranks is that of the global batch.
        kappa: Agreement of both views' clusters beyond chance, 0 being chance.
        agreement: Share of rows whose views chose the same cluster.
        chance: Agreement that independent choices would reach.
        used: Effective number of clusters chosen.
        chosen: Clusters of each row's views, (R, 2).
    """

    loss: Tensor
    kappa: Tensor
    agreement: Tensor
    chance: Tensor
    used: Tensor
    chosen: Tensor

    def metrics(self, prefix: str) -> dict[str, Tensor]:
        """Name the scalars for a run's log, each with a prefix."""
        return {f"{prefix}_{name}": getattr(self, name) for name in self._fields[:-1]}


class PairClustering(nn.Module, ABC):
    """Clusters that both views of an item are to share.

    Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS
    2020 (both of its methods).

    Args:
        count: Number of clusters.
        temperature: Divisor of the similarities before the softmax.
        head: Projection before the clustering; None for none.
    """

    def __init__(self, count: int, temperature: float, head: nn.Module | None) -> None:
        super().__init__()
        self.count, self.temperature = count, temperature
        self.head = nn.Identity() if head is None else head

    def project(self, x: Tensor) -> Tensor:
        """Project embeddings (R, 2, E) to the features (R, 2, F) that are clustered, in float32."""
        return torch.as_tensor(self.head(x.flatten(0, 1))).unflatten(0, x.shape[:2]).float()

    def forward(self, x: Tensor, codes: Tensor, frozen: bool, queued: bool) -> ClusteredPairs:
        """Assign both views of every row to clusters, and measure how far each is from where it belongs.

        Every rank must call it, with any number of rows.

        Args:
            x: Embeddings of both views, (R, 2, E).
            codes: Codes of the rows' items, (R,).
            frozen: Whether learned prototypes get no gradient.
            queued: Whether a queue takes part.
        """
        projected = self.project(x)
        with torch.autocast(x.device.type, enabled=False):
            loss, scores = self.compare(projected, codes, frozen, queued)
            chosen = scores.detach().argmax(2)
            agreed = agreement(chosen[:, 0], chosen[:, 1], self.count)
        return ClusteredPairs(loss, agreed.kappa, agreed.agreement, agreed.chance, agreed.used, chosen)

    @abstractmethod
    def compare(
        self, projected: Tensor, codes: Tensor, frozen: bool, queued: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the similarities (R, 2, K) of projections (R, 2, F) to the clusters."""

    @abstractmethod
    def after_step(self, step: int, stage_begins: bool) -> None:
        """Bring the clusters up to date after an optimizer step; every rank must call it.

        Args:
            step: Number of the step, from 0.
            stage_begins: Whether the losses have other weights from the next step on.
        """


class BalancedClustering(PairClustering):
    """SwAV's learned prototypes, all of them used equally over the batch and a queue of earlier pairs.

    Args:
        features: Length of the features that are clustered.
        count: Number of prototypes; 0 takes as many as the items are worth.
        items: Number of items that the data have.
        head: Projection before the clustering; None for none.
        temperature: Divisor of the similarities before the softmax.
        epsilon: Softness of the assignments.
        iterations: Iterations of `sinkhorn`.
        queue: Length of the queue, in pairs; 0 for none.
    """

    queue: Tensor
    queued: Tensor

    def __init__(
        self,
        features: int,
        count: int,
        items: int,
        head: nn.Module | None = None,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue: int = 0,
    ) -> None:
        super().__init__(count or default_prototypes(items), temperature, head)
        self.epsilon, self.iterations = epsilon, iterations
        self.prototypes = Prototypes(features, self.count)
        self.register_buffer("queue", torch.zeros(queue, 2, features))
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))

    def compare(
        self, projected: Tensor, codes: Tensor, frozen: bool, queued: bool
    ) -> tuple[Tensor, Tensor]:
        """Predict each view's balanced assignment from the other view, and queue the pairs."""
        scores = self.prototypes(projected, frozen)
        earlier = queue_scores(self.prototypes, self.queue, self.queued) if queued else None
        assigned = balanced_assignments(scores, earlier, self.epsilon, self.iterations)
        loss = swav_loss(scores.unbind(1), assigned, self.temperature)
        if self.training:
            push_pairs(self.queue, self.queued, projected, codes)
        return loss, scores

    def after_step(self, step: int, stage_begins: bool) -> None:
        """Bring the prototypes back to length 1."""
        self.prototypes.normalize_()


class KMeansClustering(PairClustering):
    """DeepCluster-v2's clusters: k-means, several times, over a bank of the features of all items.

    Args:
        features: Length of the features that are clustered.
        count: Number of clusters; 0 takes as many as the items are worth.
        codes: Codes of all items, which the memory bank keeps.
        head: Projection before the clustering; None for none.
        temperature: Divisor of the similarities before the softmax.
        clusterings: Number of clusterings; they take the views' banks in turn.
        iterations: Iterations of k-means.
    """

    centroids: Tensor
    assignment: Tensor

    def __init__(
        self,
        features: int,
        count: int,
        codes: Sequence[int],
        head: nn.Module | None = None,
        temperature: float = 0.1,
        clusterings: int = 2,
        iterations: int = 10,
    ) -> None:
        super().__init__(count or default_prototypes(len(codes)), temperature, head)
        self.iterations = iterations
        self.bank = MemoryBank(codes, features)
        start = F.normalize(torch.randn(clusterings, self.count, features), dim=2)
        self.register_buffer("centroids", start)
        self.register_buffer("assignment", self.bank.unassigned(clusterings))

    def compare(
        self, projected: Tensor, codes: Tensor, frozen: bool, queued: bool
    ) -> tuple[Tensor, Tensor]:
        """Tell each view's cluster in every clustering, and write the features into the bank.

        The similarities are those of the first clustering.
        """
        scores = torch.einsum("rvf,hkf->hrvk", F.normalize(projected, dim=2), self.centroids)
        # Both views of a row belong where its item does, in each of the clusterings.
        targets = self.bank.targets(self.assignment, codes).unsqueeze(2).expand(-1, -1, 2)
        loss = cluster_loss(scores, targets, self.temperature)
        if self.training:
            self.bank.write(codes, projected)
        return loss, scores[0]

    def after_step(self, step: int, stage_begins: bool) -> None:
        """Cluster anew where a stage begins, so that it does not follow the clusters of the start."""
        if stage_begins:
            self.cluster(10**6 + step)

    def cluster(self, seed: int) -> None:
        """Cluster the bank anew, unless nothing was written yet; every rank must call it."""
        if not bool(self.bank.filled.any()):
            return
        for n in range(len(self.centroids)):
            generator = torch.Generator().manual_seed(seed * len(self.centroids) + n)
            self.centroids[n], self.assignment[n] = self.bank.cluster(
                n % 2, self.count, self.iterations, generator
            )
