"""Differentiable sorting: soft permutations from scores, and the losses that make them the true order.

Throughout, `scores` is (B, n), one number per item, items in any order; sorting is ascending; a
permutation matrix is (B, n, n), row = rank, column = item; `ranks` is (B, n) int64, the true rank
0..n-1 of each item.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Relaxation = Literal["softsort", "neuralsort", "odd_even", "pairwise"]
Distribution = Literal["cauchy", "logistic", "reciprocal", "optimal"]


def softsort(scores: Tensor, tau: float = 1.0, power: float = 1.0) -> Tensor:
    """Compute the logarithm of SoftSort's matrix, with row i softmax_j(-|sort(s)_i - s_j|^power / tau).

    Rows sum to one. Prillo and Eisenschlos, ICML 2020 (arXiv 2006.16038), there in descending order.

    Example:
        >>> softsort(torch.tensor([[3.0, 1.0, 2.0]]), tau=0.1).argmax(2)
        tensor([[1, 2, 0]])
    """
    ordered = scores.sort(dim=-1).values
    distance = (ordered.unsqueeze(-1) - scores.unsqueeze(-2)).abs()
    return functional.log_softmax(-distance.pow(power) / tau, dim=-1)


def neuralsort(scores: Tensor, tau: float = 1.0) -> Tensor:
    """Compute the logarithm of NeuralSort's matrix.

    Row i is softmax_j(((2i - n - 1) s_j - sum_k |s_j - s_k|) / tau). Rows sum to one; i counts from 1.
    Grover, Wang, Zweig and Ermon, ICLR 2019 (arXiv 1903.08850), there in descending order, which is the
    same matrix with its rows reversed.

    Example:
        >>> neuralsort(torch.tensor([[3.0, 1.0, 2.0]]), tau=0.1).argmax(2)
        tensor([[1, 2, 0]])
    """
    n = scores.shape[-1]
    weight = torch.arange(1 - n, n, 2, dtype=scores.dtype, device=scores.device)
    spread = (scores.unsqueeze(-1) - scores.unsqueeze(-2)).abs().sum(dim=-1)
    logits = weight.unsqueeze(-1) * scores.unsqueeze(-2) - spread.unsqueeze(-2)
    return functional.log_softmax(logits / tau, dim=-1)


def odd_even(scores: Tensor, steepness: float = 10.0, distribution: Distribution = "cauchy") -> Tensor:
    """Compute the doubly stochastic matrix of a relaxed odd-even transposition network of n layers.

    Each comparator of neighbours a, b swaps them to the degree alpha = f(steepness (b - a)):
    min = alpha a + (1 - alpha) b, max = (1 - alpha) a + alpha b, and the rows of the matrix likewise.
    f is a cumulative distribution function; `cauchy`, `reciprocal` and `optimal` keep the network
    monotonic. Petersen, Borgelt, Kuehne and Deussen, ICML 2021 (arXiv 2105.04019) and ICLR 2022
    (arXiv 2203.09630).

    Example:
        >>> odd_even(torch.tensor([[3.0, 1.0, 2.0]])).argmax(2)
        tensor([[1, 2, 0]])
    """
    batch, n = scores.shape
    x = scores
    rows = torch.eye(n, dtype=scores.dtype, device=scores.device).expand(batch, n, n)
    for layer in range(n):
        first = layer % 2
        last = first + 2 * ((n - first) // 2)
        if last == first:
            continue
        low, high = x[:, first:last:2], x[:, first + 1 : last : 2]
        alpha = swap_degree(steepness * (high - low), distribution)
        x = _mix(x, alpha, first, last)
        rows = _mix(rows, alpha.unsqueeze(-1), first, last)
    return rows


def _mix(x: Tensor, alpha: Tensor, first: int, last: int) -> Tensor:
    """Apply one layer of comparators on axis 1; what has no partner passes through."""
    a, b = x[:, first:last:2], x[:, first + 1 : last : 2]
    pairs = torch.stack((alpha * a + (1 - alpha) * b, (1 - alpha) * a + alpha * b), dim=2)
    return torch.cat((x[:, :first], pairs.flatten(1, 2), x[:, last:]), dim=1)


def swap_degree(v: Tensor, distribution: Distribution) -> Tensor:
    """Evaluate the cumulative distribution function f(v) of `odd_even`, elementwise, with f(0) = 1/2."""
    if distribution == "cauchy":
        return torch.atan(v) / math.pi + 0.5
    if distribution == "logistic":
        return torch.sigmoid(v)
    if distribution == "reciprocal":
        return 0.5 * v / (2 + v.abs()) + 0.5
    if distribution == "optimal":
        # The tail's argument is kept away from 0, where its gradient would be inf * 0.
        tail = (1 - 1 / (16 * v.abs().clamp(min=0.25)) - 0.5) * v.sign() + 0.5
        return torch.where(v.abs() <= 0.25, v + 0.5, tail)
    raise ValueError(f"distribution {distribution!r} is none of {', '.join(get_args(Distribution))}")


def pairwise_logistic(scores: Tensor, ranks: Tensor, tau: float = 1.0) -> Tensor:
    """Average -log sigmoid((s_later - s_earlier) / tau) over pairs, per example, (B,).

    RankNet: Burges et al., ICML 2005.

    Example:
        >>> pairwise_logistic(torch.tensor([[0.0, 0.0]]), torch.tensor([[0, 1]])).round(decimals=4)
        tensor([0.6931])
    """
    ordered = scores.gather(1, ranks.argsort(dim=1))
    i, j = torch.triu_indices(ordered.shape[1], ordered.shape[1], 1, device=ordered.device)
    return functional.softplus((ordered[:, i] - ordered[:, j]) / tau).mean(dim=1)


def sorting_loss(
    scores: Tensor,
    ranks: Tensor,
    relaxation: Relaxation = "softsort",
    tau: float = 1.0,
    power: float = 1.0,
    steepness: float = 10.0,
    distribution: Distribution = "cauchy",
) -> Tensor:
    """Compute how far the soft permutation of the scores is from the true one, per example, (B,).

    Cross-entropy of every row for `softsort` and `neuralsort` (whose rows are distributions over
    items), binary cross-entropy of every entry for `odd_even` (doubly stochastic), as in the papers;
    `pairwise` has no matrix. Scale-free scores make it as small as they like: regularise them.

    Raises:
        ValueError: The relaxation or distribution is unknown.

    Example:
        >>> ranks = torch.tensor([[2, 0, 1]])
        >>> right, wrong = torch.tensor([[9.0, 0.0, 4.0]]), torch.tensor([[0.0, 9.0, 4.0]])
        >>> bool(sorting_loss(right, ranks) < sorting_loss(wrong, ranks))
        True
    """
    if relaxation == "pairwise":
        return pairwise_logistic(scores, ranks, tau)
    item = ranks.argsort(dim=1)
    if relaxation == "odd_even":
        matrix = odd_even(scores, steepness, distribution).clamp(0, 1)  # rounding may pass 1
        truth = functional.one_hot(item, scores.shape[1]).to(matrix.dtype)
        return functional.binary_cross_entropy(matrix, truth, reduction="none").mean(dim=(1, 2))
    if relaxation not in ("softsort", "neuralsort"):
        raise ValueError(f"relaxation {relaxation!r} is none of {', '.join(get_args(Relaxation))}")
    log_p = softsort(scores, tau, power) if relaxation == "softsort" else neuralsort(scores, tau)
    return -log_p.gather(2, item.unsqueeze(2)).mean(dim=(1, 2))


def kendall_tau(scores: Tensor, ranks: Tensor) -> Tensor:
    """Measure Kendall's tau-a per example, (B,): concordant less discordant pairs over all; a tie is 0.

    Example:
        >>> kendall_tau(torch.tensor([[0.1, 0.2, 0.15]]), torch.tensor([[0, 1, 2]])).round(decimals=4)
        tensor([0.3333])
    """
    ordered = scores.gather(1, ranks.argsort(dim=1))
    i, j = torch.triu_indices(ordered.shape[1], ordered.shape[1], 1, device=ordered.device)
    return (ordered[:, j] - ordered[:, i]).sign().mean(dim=1)


def in_order(scores: Tensor, ranks: Tensor) -> Tensor:
    """Tell whether the scores put every item at its true rank, per example, (B,) bool; a tie does not.

    Example:
        >>> in_order(torch.tensor([[0.1, 0.2], [0.2, 0.1]]), torch.tensor([[0, 1], [0, 1]]))
        tensor([ True, False])
    """
    ordered = scores.gather(1, ranks.argsort(dim=1))
    return (ordered[:, 1:] > ordered[:, :-1]).all(dim=1)
