"""Losses over the embeddings of two views, over the global batch, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl3d.distributed import gather, rank, row_counts, world_size


class Contrast(NamedTuple):
    """Loss and accuracy of a contrast by `nt_xent`.

    Attributes:
        loss: Loss with gradient, a scalar.
        accuracy: Share of anchors whose positive is nearer than every negative, of which there must be one.
        chance: Accuracy that guessing would reach: the mean of 1 / (1 + negatives), 0 without a negative.
    """

    loss: Tensor
    accuracy: Tensor
    chance: Tensor


def nt_xent(
    a: Tensor,
    b: Tensor,
    subject: Tensor,
    temperature: float = 0.1,
    same_subject_negatives: bool = False,
) -> Contrast:
    """Compute SimCLR's cross entropy of pairs, with negatives of other subjects only.

    Row i of `a` and of `b` are each other's positive; negatives are all other rows of both, over all
    ranks. Rows of the same subject, which may show the same anatomy, are left out of each other's
    denominators unless asked for. With one row per subject this is lightly's `NTXentLoss`.

    Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020.

    Args:
        a: Projections of the first views, (B, F).
        b: Projections of the second views, (B, F).
        subject: Code of the subject of each row, (B,), unique over data sets.
        temperature: Divisor of the cosine similarities.
        same_subject_negatives: Whether rows of the same subject may be negatives.

    Example:
        >>> contrast = nt_xent(torch.eye(2), torch.eye(2), torch.tensor([7, 8]), temperature=1.0)
        >>> round(contrast.loss.item(), 4), contrast.accuracy.item()
        (0.5514, 1.0)
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
        counts = row_counts(len(a), a.device)
        start, total = sum(counts[: rank()]), sum(counts)
        candidates = torch.cat([gather(a, counts), gather(b, counts)])
        subjects = gather(subject, counts)
        own = torch.arange(start, start + len(a), device=a.device)
        positive = torch.cat([own + total, own])
        itself = torch.cat([own, own + total])
        logits = torch.cat([a, b]) @ candidates.T / temperature
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if not same_subject_negatives:
            allowed = (subject[:, None] != subjects).repeat(2, 2)
        allowed = allowed.scatter(1, itself[:, None], False).scatter(1, positive[:, None], True)
        logits = logits.masked_fill(~allowed, -torch.inf)
        # A sum over own rows, scaled so that the mean over ranks is the mean over the global batch even
        # where ranks hold unequal numbers of this group.
        loss = F.cross_entropy(logits, positive, reduction="sum") * world_size() / (2 * total)
        with torch.no_grad():
            # Strictly nearer than all others: collapsed embeddings, all alike, recognise nothing.
            others = logits.scatter(1, positive[:, None], -torch.inf).amax(1)
            correct = logits.gather(1, positive[:, None])[:, 0] > others
            # An anchor without negatives was asked nothing: its positive is nearer than none.
            choices = allowed.sum(1)
            asked = choices > 1
        return Contrast(loss, (correct & asked).float().mean(), (asked / choices).mean())


class Relations(NamedTuple):
    """Relations of rows to all rows, (R, N) bool each; a row is nothing to itself, whatever stands there.

    Attributes:
        positive: Whether the other row is to be near.
        negative: Whether the other row is to be far.
        judged: Whether the other row counts for the accuracy.
    """

    positive: Tensor
    negative: Tensor
    judged: Tensor


_NEVER = -1e4
"""Similarity of what is left out: finite, for a sum of nothing has no gradient else."""


def set_contrast(
    x: Tensor,
    keys: Tensor,
    relate: Callable[[Tensor, Tensor], Relations],
    temperature: float = 0.1,
    rivals: bool = True,
) -> Contrast:
    """Compute the cross entropy of sets of positives, over the rows of all ranks.

    The loss of row i is the mean over its positives p of -log(exp(s_ip) / (sum of exp(s_in) over its
    negatives n, and over its positives)), s being cosine similarities over the temperature; of the
    positives, all are in that sum with `rivals`, and p alone without. The whole is the mean over the rows
    that have a positive.

    With `rivals`: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020 (L_out), as Zeng et al.,
    MICCAI 2021, use it. Without: Chaitanya et al., NeurIPS 2020.

    Args:
        x: Projections, (R, F).
        keys: Numbers by which rows are related, (R, K).
        relate: Function of the keys of R rows and those of all N rows that gives their relations.
        temperature: Divisor of the cosine similarities.
        rivals: Whether the other positives of a row stand in the sum below.

    Returns:
        Contrast whose accuracy is that of judged rows alone: the share of rows to which a judged positive
        is nearer than every judged negative; rows without one of either are not asked.

    Example:
        >>> x, place = torch.eye(2).repeat(2, 1), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        >>> def relate(own, other):
        ...     same = own[:, None, 0] == other[:, 0]
        ...     return Relations(same, ~same, torch.ones_like(same))
        >>> contrast = set_contrast(x, place, relate, temperature=1.0)
        >>> round(contrast.loss.item(), 4), contrast.accuracy.item()
        (0.5514, 1.0)
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=1)
        counts = row_counts(len(x), x.device)
        start = sum(counts[: rank()])
        logits = x @ gather(x, counts).T / temperature
        other = torch.ones_like(logits, dtype=torch.bool)
        other[torch.arange(len(x)), torch.arange(start, start + len(x))] = False
        positive, negative, judged = (mask & other for mask in relate(keys, gather(keys, counts)))
        below = positive | negative if rivals else negative
        total = logits.masked_fill(~below, _NEVER).logsumexp(1, keepdim=True)
        each = total - logits if rivals else F.softplus(total - logits)
        number = positive.sum(1)
        own = (each * positive).sum(1) / number.clamp_min(1)
        # A sum over own rows, scaled so that the mean over ranks is the mean over the global batch.
        rows = gather((number > 0).float(), counts).sum().clamp_min(1)
        return Contrast(own.sum() * world_size() / rows, *_judged(logits, positive, negative, judged))


@torch.no_grad()
def _judged(logits: Tensor, positive: Tensor, negative: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    """Measure the share of rows whose nearest judged row is a positive, and what guessing would reach."""
    positive, negative = positive & judged, negative & judged
    near, far = (logits.masked_fill(~mask, -torch.inf).amax(1) for mask in (positive, negative))
    asked = positive.any(1) & negative.any(1)
    # Strictly nearer: collapsed projections, all alike, recognise nothing.
    correct = (near > far) & asked
    share = positive.sum(1) / (positive.sum(1) + negative.sum(1)).clamp_min(1)
    return correct.float().mean(), (share * asked).mean()


def local_contrast(a: Tensor, b: Tensor, negatives: Tensor, temperature: float = 0.1) -> Contrast:
    """Compute the contrast of the regions of two maps that show the same places.

    Region i of either map has region i of the other as its positive, and its negatives in both maps:
    l(a_i, b_i) = -log(exp(s(a_i, b_i)) / (exp(s(a_i, b_i)) + sum over its negatives k of exp(s(a_i, a_k))
    + exp(s(a_i, b_k)))), s being cosine similarities over the temperature. The loss is the mean of both
    directions over all regions of all pairs of maps, of all ranks.

    Chaitanya et al.: Contrastive learning of global and local features for medical image segmentation with
    limited annotations, NeurIPS 2020.

    Args:
        a: Projections of the regions of the first maps, (P, A, F).
        b: Projections of the regions of the second maps, (P, A, F).
        negatives: Numbers of the regions that are negatives of each region, (A, K).
        temperature: Divisor of the cosine similarities.

    Example:
        >>> regions = torch.eye(2)[None]
        >>> contrast = local_contrast(regions, regions, torch.tensor([[1], [0]]), temperature=1.0)
        >>> round(contrast.loss.item(), 4), contrast.accuracy.item()
        (0.5514, 1.0)
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=2), F.normalize(b.float(), dim=2)
        near = (a * b).sum(2) / temperature
        index = negatives.expand(len(a), -1, -1)
        far = [
            torch.cat([(x @ other.mT / temperature).gather(2, index) for other in (a, b)], 2)
            for x in (a, b)
        ]
        each = torch.stack([F.softplus(x.logsumexp(2) - near) for x in far])
        maps = sum(row_counts(len(a), a.device))
        loss = each.sum() * world_size() / (2 * maps * a.shape[1])
        with torch.no_grad():
            correct = torch.stack([near > x.amax(2) for x in far]).float().mean()
            chance = correct.new_tensor(1 / (1 + 2 * negatives.shape[1]))
        return Contrast(loss, correct, chance)


def alignment(a: Tensor, b: Tensor) -> Tensor:
    """Average the squared distance of positives on the unit sphere, 0 to 4 (Wang and Isola, ICML 2020).

    Example:
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])).item()
        2.0
    """
    a, b = F.normalize(a.detach().float(), dim=1), F.normalize(b.detach().float(), dim=1)
    return (a - b).square().sum(1).mean()


def uniformity(x: Tensor) -> Tensor:
    """Average exp(-2 d²) over pairs on the unit sphere, and take its log (Wang and Isola, ICML 2020).

    0 is collapse; a batch of one row has 0 too.

    Example:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item()
        -8.0
    """
    x = F.normalize(x.detach().float(), dim=1)
    if len(x) < 2:
        return x.new_zeros(())
    return torch.pdist(x).square().mul(-2).exp().mean().log()


class Redundancy(NamedTuple):
    """Loss and correlations by `barlow_twins_loss`.

    Attributes:
        loss: Loss with gradient, a scalar.
        diagonal: Mean correlation of a feature with itself over views; 1 is invariance.
        off_diagonal: Root mean square correlation of different features; 0 is no redundancy.
    """

    loss: Tensor
    diagonal: Tensor
    off_diagonal: Tensor


def barlow_twins_loss(a: Tensor, b: Tensor, off_diagonal: float = 0.0051) -> Redundancy:
    """Compute how far the correlation of two views' features is from the identity, over the global batch.

    C is the correlation matrix of standardised features; the loss is the sum of (C_ii - 1)² and of
    `off_diagonal` C_ij². lightly's `BarlowTwinsLoss` computes it, from the rows of all ranks, because its
    own gathering standardises each rank by itself. A group of a single row has no correlation: 0.

    Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, ICML 2021.

    Args:
        a: Projections of the first views, (B, F).
        b: Projections of the second views, (B, F).
        off_diagonal: Weight of the second sum.

    Example:
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
        >>> round(barlow_twins_loss(x, x).loss.item(), 4)
        0.0
    """
    from lightly.loss import BarlowTwinsLoss

    with torch.autocast(a.device.type, enabled=False):
        counts = row_counts(len(a), a.device)
        a, b = gather(a.float(), counts), gather(b.float(), counts)
        if len(a) < 2:
            zero = a.new_zeros(())
            return Redundancy((a.sum() + b.sum()) * 0, zero, zero)
        loss: Tensor = BarlowTwinsLoss(lambda_param=off_diagonal)(a, b)
        with torch.no_grad():
            standard = [F.batch_norm(x, None, None, training=True) for x in (a, b)]
            c = standard[0].T @ standard[1] / len(a)
            diagonal, features = c.diagonal(), len(c)
            rest = c.square().sum() - diagonal.square().sum()
            rms = (rest.clamp_min(0) / max(features * (features - 1), 1)).sqrt()
        return Redundancy(loss, diagonal.mean(), rms)
