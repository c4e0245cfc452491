"""Prototypes, balanced assignments, spherical k-means and the bank of features that is clustered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ssl3d.distributed import gather, rank, row_counts, world_size
from ssl3d.errors import UsageError
from ssl3d.on_device import read_number, write_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IGNORED = -100
"""Target of an example that has none; `cross_entropy` of torch leaves it out."""
_ROWS = 4096  # features compared with all centroids at once


def default_prototypes(items: int) -> int:
    """Choose the number of prototypes for so many items: a tenth of them, within 8 and 3000.

    ImageNet's 3000 are one for 427 images. A prototype with one or two items is learnt by heart and
    parts a subject from all others; with ten it must hold what several subjects share. Fewer than 8
    ask too little, more than 3000 were no better in the paper. Never more than there are items.

    Args:
        items: Number of items to cluster: volumes, times places in each.

    Example:
        >>> default_prototypes(500), default_prototypes(20), default_prototypes(5)
        (50, 8, 5)
    """
    return max(2, min(items, max(8, min(items // 10, 3000))))


class Prototypes(nn.Module):
    """Unit vectors that features are compared with: a linear layer without bias, its rows normalised.

    Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS
    2020: rows are normalised before every forward pass. Here that is part of the graph, so a module may
    run several times before one backward pass; call `normalize_` after each step, else the rows grow
    and learn ever slower.

    Args:
        features: Length F of the features.
        count: Number K of prototypes.
    """

    def __init__(self, features: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, features), dim=1))

    def __len__(self) -> int:
        """The number of prototypes."""
        return len(self.weight)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Compare features (..., F): cosine similarities (..., K), in float32 whatever the precision.

        Args:
            x: Features of any length but 0; they are normalised here.
            frozen: Whether the prototypes get no gradient, as at first in the paper.
        """
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.detach() if frozen else self.weight
            return F.normalize(x.float(), dim=-1) @ F.normalize(weight.float(), dim=1).T

    @torch.no_grad()
    def normalize_(self) -> None:
        """Bring the rows back to length 1, in place; call it in `Proxy.after_step`."""
        self.weight.copy_(F.normalize(self.weight, dim=1))


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Assign rows softly to prototypes, every prototype used equally over the batch of all ranks.

    The authors' iteration on Q = exp(scores / epsilon): each prototype's share is divided by its sum and
    by K, then each row's by its sum and by B. It runs on logarithms in float32, where it cannot
    overflow, and on every rank on the rows of all of them, so ranks may hold unequal numbers of rows.
    Every rank must call it. On one rank it is lightly's `sinkhorn`.

    Caron et al., NeurIPS 2020; Cuturi, NeurIPS 2013.

    Args:
        scores: Cosine similarities of this rank's rows, (B, K).
        epsilon: Softness of the assignments; lower is harder.
        iterations: Number of iterations, 3 in the paper.

    Returns:
        Assignments (B, K), float32; each row sums to 1.

    Example:
        >>> sinkhorn(torch.tensor([[1.0, 0.9], [0.9, 0.1]])).argmax(1)  # both would rather have the first
        tensor([1, 0])
    """
    with torch.autocast(scores.device.type, enabled=False):
        counts = row_counts(len(scores), scores.device)
        logq = gather(scores.detach().float(), counts) / epsilon
        for _ in range(iterations):
            logq = logq - logq.logsumexp(0, keepdim=True)
            logq = logq - logq.logsumexp(1, keepdim=True)
        if not iterations:
            logq = logq - logq.logsumexp(1, keepdim=True)
        start = sum(counts[: rank()])
        return logq[start : start + counts[rank()]].exp()


def swav_loss(scores: Sequence[Tensor], assignments: Sequence[Tensor], temperature: float = 0.1) -> Tensor:
    """Compute SwAV's loss: each large view's assignment is predicted from all other views.

    1/I sum over views i of 1/(V - 1) sum over views v != i of -mean_b q_i . log softmax(scores_v / t).

    Caron et al., NeurIPS 2020, equation 1 and its multi-crop form.

    Args:
        scores: Cosine similarities of V views to the prototypes, (B, K) each; the I large views first.
        assignments: Assignments of the I large views by `sinkhorn`, (B, K) each.
        temperature: Divisor of the similarities.

    Returns:
        Scalar, the mean over the batch of all ranks: a sum over own rows, scaled so that the mean over
        ranks is that of the global batch.

    Raises:
        ValueError: There are fewer than two views, or more assignments than views.

    Example:
        >>> views = [torch.eye(2), torch.eye(2)]
        >>> round(swav_loss(views, [sinkhorn(view) for view in views], temperature=1.0).item(), 4)
        0.3133
    """
    if len(scores) < 2 or not 0 < len(assignments) <= len(scores):
        raise ValueError(
            f"{len(scores)} views with {len(assignments)} assignments: two views at least, and no more "
            "assignments than views"
        )
    with torch.autocast(scores[0].device.type, enabled=False):
        logs = [F.log_softmax(view.float() / temperature, dim=1) for view in scores]
        total = sum(row_counts(len(scores[0]), scores[0].device))
        terms = [
            -(q.float() * view).sum() / (len(logs) - 1)
            for i, q in enumerate(assignments)
            for v, view in enumerate(logs)
            if v != i
        ]
        return torch.stack(terms).sum() / len(assignments) * world_size() / max(total, 1)


def balanced_assignments(
    scores: Tensor, earlier: Tensor | None, epsilon: float, iterations: int
) -> list[Tensor]:
    """Assign the rows of each view to prototypes, balanced over all ranks and the rows of a queue.

    Every rank must call it.

    Args:
        scores: Cosine similarities of this rank's rows to the prototypes, (R, V, K).
        earlier: Similarities of this rank's share of the queue, (Q, V, K), by `queue_scores`; None for no
            queue.
        epsilon: Softness of the assignments, as for `sinkhorn`.
        iterations: Iterations of `sinkhorn`.

    Returns:
        Assignments (R, K) of the rows, one tensor for each of the V views.
    """
    rows = scores.detach() if earlier is None else torch.cat([scores.detach(), earlier])
    return [sinkhorn(view, epsilon, iterations)[: len(scores)] for view in rows.unbind(1)]


@torch.no_grad()
def queue_scores(prototypes: Prototypes, queue: Tensor, queued: Tensor) -> Tensor | None:
    """Compare this rank's share of a queue of features with the prototypes.

    Args:
        prototypes: Prototypes as they are now.
        queue: Features that all ranks hold alike, (Q, V, F).
        queued: Number of rows put into the queue since the start, a scalar.

    Returns:
        Cosine similarities (Q / ranks, V, K), or None until the queue is full.
    """
    if not len(queue) or read_number(queued) < len(queue):
        return None
    similarities: Tensor = prototypes(shard(queue))
    return similarities


@torch.no_grad()
def push_pairs(queue: Tensor, queued: Tensor, features: Tensor, codes: Tensor) -> None:
    """Put the features of all ranks at the head of a queue, in place, and drop the oldest ones.

    Every rank must call it, with any number of rows. A queue of length 0 stays as it is.

    Args:
        queue: Features that all ranks hold alike, the newest first, (Q, V, F).
        queued: Number of rows put into the queue since the start, a scalar.
        features: Features of this rank's rows, (R, V, F).
        codes: Codes of the rows' items, (R,).
    """
    if not len(queue):
        return
    newest = gather(features.detach().float())
    # In the order of the items: then the queue is the same on any number of ranks.
    newest = newest[gather(codes).argsort(stable=True)]
    queue.copy_(torch.cat([newest, queue])[: len(queue)])
    write_number(queued, read_number(queued) + len(newest))


def cluster_loss(scores: Tensor, targets: Tensor, temperature: float = 0.1) -> Tensor:
    """Tell each view's cluster from its similarities to the centroids of several clusterings.

    The cross-entropy of DeepCluster-v2, mean over the batch of all ranks. Every rank must call it, with
    any number of rows.

    Caron et al., NeurIPS 2020, appendix D.

    Args:
        scores: Cosine similarities to the centroids, (H, R, V, K), H being the clusterings.
        targets: Clusters (H, R, V), int64; negative ones (`IGNORED`) do not count.
        temperature: Divisor of the similarities.

    Returns:
        Scalar. A sum over own rows, scaled so that the mean over ranks is that of the global batch; 0
        where no rank has a target.

    Example:
        >>> scores = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
        >>> round(cluster_loss(scores, torch.tensor([[[0, IGNORED]]]), temperature=1.0).item(), 4)
        0.3133
    """
    valid = gather((targets >= 0).sum().view(1), [1] * world_size()).sum()
    total = F.cross_entropy(
        (scores / temperature).flatten(0, 2), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total * world_size() / valid.clamp_min(1)


class Clusters(NamedTuple):
    """Outcome of a spherical k-means.

    Attributes:
        centroids: Centroids (K, F) of unit length.
        assignment: Nearest centroid of each row, (N,) int64.
    """

    centroids: Tensor
    assignment: Tensor


@torch.no_grad()
def spherical_kmeans(
    features: Tensor, k: int, iterations: int = 10, generator: torch.Generator | None = None
) -> Clusters:
    """Cluster features by cosine similarity, as DeepCluster-v2 does.

    It starts from random rows, and takes a fixed number of iterations. A cluster that loses all its rows
    keeps its centroid. Sums run in a fixed order on any device.

    Caron et al., NeurIPS 2020, appendix D; Dhillon and Modha, Machine Learning 2001.

    Args:
        features: Features (N, F); they are normalised here, in float32 whatever the precision.
        k: Number K of clusters.
        iterations: Rounds of assigning and averaging; a last assignment follows.
        generator: Generator on the CPU that chooses the first centroids.

    Raises:
        UsageError: There are fewer rows than clusters.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> a, b, c = spherical_kmeans(x, 2, generator=torch.Generator().manual_seed(0)).assignment
        >>> bool(a == b), bool(a == c)
        (True, False)
    """
    if len(features) < k:
        raise UsageError(
            f"{len(features)} features cannot start {k} clusters; ask for at most {len(features)}"
        )
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=1)
        first = torch.randperm(len(x), generator=generator)[:k].to(x.device)
        centroids = x[first]
        for _ in range(iterations):
            sums, counts = torch.zeros_like(centroids), x.new_zeros(k)
            for part in x.split(_ROWS):
                # A product, not index_add, whose order of summation is not fixed on a GPU.
                member = F.one_hot(_nearest(part, centroids), k).to(x.dtype)
                sums += member.T @ part
                counts += member.sum(0)
            held = (counts > 0)[:, None]
            centroids = torch.where(held, F.normalize(sums, dim=1), centroids)
        return Clusters(centroids, torch.cat([_nearest(part, centroids) for part in x.split(_ROWS)]))


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    return (x @ centroids.T).argmax(1)


class MemoryBank(nn.Module):
    """Latest features of every item's views, in buffers: the same on all ranks, and in checkpoints.

    An item is whatever keeps its identity through the run: a volume, or the k-th place in a volume. Its
    code must be unique over all data sets: `Volume.index` is, and so is `index * places + place`.

    Attributes:
        codes: Codes of the items, increasing, (N,) int64.
        features: Features (V, N, F) float32, of unit length where filled.
        filled: Whether each item was ever written, (N,).

    Args:
        codes: Codes of all items, in any order.
        features: Length F of a feature.
        views: Number V of views, which are kept apart.

    Raises:
        ValueError: A code comes twice.
    """

    codes: Tensor
    features: Tensor
    filled: Tensor

    def __init__(self, codes: Iterable[int] | Tensor, features: int, views: int = 2) -> None:
        super().__init__()
        given = torch.as_tensor(codes if isinstance(codes, Tensor) else list(codes), dtype=torch.int64)
        ordered = given.unique()
        if len(ordered) < len(given):
            raise ValueError(f"{len(given)} items have {len(ordered)} different codes; each needs its own")
        self.register_buffer("codes", ordered)
        self.register_buffer("features", torch.zeros(views, len(ordered), features))
        self.register_buffer("filled", torch.zeros(len(ordered), dtype=torch.bool))

    def __len__(self) -> int:
        """The number of items."""
        return len(self.codes)

    def unassigned(self, clusterings: int) -> Tensor:
        """Return assignments (clusterings, N) of items that have no cluster yet."""
        return torch.full((clusterings, len(self)), IGNORED)

    def rows(self, codes: Tensor) -> Tensor:
        """Find the rows of items, int64; -1 for those that the bank does not know (held-out subjects)."""
        if not len(self):
            return torch.full_like(codes, -1)
        place = torch.searchsorted(self.codes, codes).clamp_max(len(self) - 1)
        return torch.where(self.codes[place] == codes, place, -1)

    def targets(self, assignment: Tensor, codes: Tensor) -> Tensor:
        """Look up each item in an assignment (..., N); -100, which losses ignore, if it is not known."""
        rows = self.rows(codes)
        # A last column for what is not known, so that an empty bank needs no case of its own.
        padded = F.pad(assignment, (0, 1), value=IGNORED)
        return padded[..., rows % (len(self) + 1)]

    @torch.no_grad()
    def write(self, codes: Tensor, features: Tensor) -> None:
        """Store the features of all ranks; every rank must call it, with any number of rows.

        Unknown items are left out; of an item that comes twice the last one stays.

        Args:
            codes: Codes of the rows' items, (R,).
            features: Features (R, V, F); they are normalised here.
        """
        counts = row_counts(len(codes), codes.device)
        codes = gather(codes, counts)
        given = F.normalize(gather(features.detach().float(), counts), dim=2)
        if not len(self) or not len(codes):
            return
        ordered, order = codes.sort(stable=True)
        # Which rows to write would have to be waited for: so all are, with what the last of the same item
        # has; those that are unknown write what a known one does, or where there is none, what is there.
        last = torch.searchsorted(ordered, ordered, right=True) - 1
        rows = self.rows(ordered)
        known = rows >= 0
        any_known, first = known.any(), known.int().argmax(0, keepdim=True)
        chosen = torch.where(known, last, last[first])
        rows = torch.where(known, rows, rows[first].clamp_min(0))
        values = given[order[chosen]].movedim(1, 0)
        self.features[:, rows] = torch.where(any_known, values, self.features[:, rows])
        self.filled[rows] |= any_known

    @torch.no_grad()
    def cluster(
        self, view: int, k: int, iterations: int = 10, generator: torch.Generator | None = None
    ) -> Clusters:
        """Cluster one view's features, the same on all ranks; every rank must call it.

        Where fewer than `k` items are filled, the last centroids are copies of others: nothing is nearest
        to them first, so they stay without items.

        Returns:
            Centroids (k, F), and assignments (N,), -100 for items that are not filled.

        Raises:
            UsageError: No item is filled.
        """
        known = self.features[view, self.filled]
        if not len(known):
            raise UsageError("nothing to cluster: no volume could be drawn, see what was set aside")
        fewer = min(k, len(known))
        clusters = spherical_kmeans(known, fewer, iterations, generator)
        copies = torch.arange(k, device=known.device) % fewer
        centroids = clusters.centroids[copies].contiguous()
        assignment = torch.full_like(self.codes, IGNORED)
        assignment[self.filled] = clusters.assignment
        if world_size() > 1:  # ranks on unequal hardware may differ in the last bit
            dist.broadcast(centroids, 0)
            dist.broadcast(assignment, 0)
        return Clusters(centroids, assignment)


def shard(rows: Tensor) -> Tensor:
    """Take this rank's part of rows that all ranks hold, so that over the ranks each counts once."""
    return rows[rank() :: world_size()]


# What a person reads -------------------------------------------------------------------------------


class Agreement(NamedTuple):
    """Agreement of two choices over the rows of all ranks; scalars.

    Attributes:
        agreement: Share of rows in which both chose the same prototype.
        chance: Agreement that two independent choices with these frequencies would reach.
        kappa: (agreement - chance) / (1 - chance): 1 is perfect; 0 is chance, and also collapse, where
            everything is given one prototype (Cohen 1960).
        used: Effective number of prototypes chosen: the exponential of their entropy, 1 to K.
    """

    agreement: Tensor
    chance: Tensor
    kappa: Tensor
    used: Tensor


@torch.no_grad()
def agreement(first: Tensor, second: Tensor, count: int) -> Agreement:
    """Measure how well two choices of prototypes agree, against chance; every rank must call it.

    Args:
        first: Prototypes of this rank's rows, (B,); rows with a negative one are left out.
        second: Prototypes by the other choice, (B,).
        count: Number of prototypes.

    Example:
        >>> agreed = agreement(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0]), 2)
        >>> agreed.agreement.item(), agreed.kappa.item()
        (0.75, 0.5)
    """
    both = gather(torch.stack([first, second], 1))
    # Left out by a weight of 0: to take some rows out, the device would have to be waited for.
    counts = (both >= 0).all(1)
    rows = counts.sum().clamp_min(1)
    same = ((both[:, 0] == both[:, 1]) & counts).sum() / rows
    clusters = torch.arange(count, device=both.device)
    shares = ((both[:, :, None] == clusters) & counts[:, None, None]).sum(0) / rows
    chance = (shares[0] * shares[1]).sum()
    kappa = torch.where(chance < 1, (same - chance) / (1 - chance).clamp_min(1e-6), 0.0)
    used = torch.where(counts.any(), perplexity(shares.mean(0)), 0.0)
    return Agreement(same, chance, kappa, used)


def perplexity(weights: Tensor) -> Tensor:
    """Count the prototypes in use: the exponential of the entropy of counts or shares (K,).

    Example:
        >>> round(perplexity(torch.tensor([5, 5, 0])).item(), 4)
        2.0
    """
    shares = weights.float() / weights.sum().clamp_min(1e-12)
    return torch.special.entr(shares).sum().exp()


def mutual_information(first: Tensor, second: Tensor) -> float:
    """Measure how alike two clusterings of the same items are, whatever the clusters are called.

    Mutual information, normalised and adjusted for chance: 1 is the same clustering, 0 what unrelated
    ones reach. (Unadjusted, ten items a cluster score above 0.4 when nothing is shared.) Items that are
    negative in either are left out.

    Vinh, Epps, Bailey, Journal of Machine Learning Research 11, 2010.

    Example:
        >>> round(mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0])), 4)
        1.0
    """
    from sklearn.metrics import adjusted_mutual_info_score

    both = (first >= 0) & (second >= 0)
    if not both.any():
        return 0.0
    return float(adjusted_mutual_info_score(first[both].cpu().numpy(), second[both].cpu().numpy()))


def prototype_picture(views: Tensor, target: Tensor, predicted: Tensor, most: int = 24) -> Figure:
    """Show views, those of one prototype together; the frame says whether the other view chose the same.

    Args:
        views: Views (B, C, d, h, w), of which the middle slice is shown.
        target: Prototype that each view was assigned, (B,); negative ones are left out.
        predicted: Prototype chosen for it from another view, (B,).
        most: Number of views shown, those of the largest prototypes first.
    """
    from matplotlib.figure import Figure

    target, predicted = target.cpu(), predicted.cpu()
    sizes = torch.bincount(target.clamp_min(0), weights=(target >= 0).double())
    shown = [int(i) for i in torch.argsort(-sizes[target.clamp_min(0)] * 1e6 + target, stable=True)]
    shown = [i for i in shown if target[i] >= 0][:most]
    columns = min(max(len(shown), 1), 8)
    rows = max(-(-len(shown) // columns), 1)
    figure = Figure(figsize=(1.3 * columns, 1.55 * rows + 0.2), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    middle = views[:, 0, views.shape[2] // 2].detach().float().cpu().numpy()
    for place, panel in enumerate(panels.flat):
        panel.set_xticks([])
        panel.set_yticks([])
        if place >= len(shown):
            panel.axis("off")
            continue
        i = shown[place]
        own, other = int(target[i]), int(predicted[i])
        colour = "green" if own == other else "red"
        panel.imshow(middle[i], cmap="gray")
        panel.set_title(f"{own}" if own == other else f"{own}, not {other}", fontsize=8, color=colour)
        for side in panel.spines.values():
            side.set_color(colour)
            side.set_linewidth(2)
    return figure
