"""Weights of several proxies' losses that are learned in training: by uncertainty, or by gradient norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d.distributed import world_size
from ssl3d.errors import TrainingError, UsageError

RATE = 0.025
"""Learning rate of the weights of gradnorm, that of its authors."""


class Balance(nn.Module):
    """Sum of the losses of several proxies with learned weights, which are in its state.

    Args:
        weights: Weights at the start, by proxy; above 0.

    Raises:
        UsageError: A weight is 0.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.names = list(weights)
        for name, weight in weights.items():
            if not 0 < weight < math.inf:
                raise UsageError(
                    f"--weights: {name} has {weight:g}; a weight that is learned must start above 0"
                )

    def forward(self, losses: Mapping[str, Tensor], shared: Tensor | None) -> Tensor:
        """Return the weighted sum of the losses, a scalar.

        Args:
            losses: Scalar losses by proxy, for this part of the batch on this rank.
            shared: Last weight that the proxies share; None where nothing is to be learned.
        """
        raise NotImplementedError

    def current(self) -> Tensor:
        """Return the weights, in the order of `names`, detached."""
        raise NotImplementedError

    def step(self) -> None:
        """Update the weights after an optimizer step; every rank calls it."""


class Uncertainty(Balance):
    """Weights of the losses by their homoscedastic uncertainty, learned with everything else.

    The sum over the losses of exp(-s) L + s / 2, where s is a learned log-variance: the classification
    form of Kendall, Gal, Cipolla: Multi-Task Learning Using Uncertainty to Weigh Losses for Scene
    Geometry and Semantics, CVPR 2018 (arXiv:1705.07115), with the weights exp(-s) at 1 to begin with. At
    rest a weight is 1 / (2 L). As in the authors' code, s is learned rather than the variance; for
    losses below 0 it has no minimum. Weight decay leaves it alone, as every vector.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        self.log_variances = nn.Parameter(-torch.tensor([math.log(w) for w in weights.values()]))

    def forward(self, losses: Mapping[str, Tensor], shared: Tensor | None) -> Tensor:
        """Sum the weighted losses, and the log-variances of all proxies, also those without a loss here."""
        total = 0.5 * self.log_variances.sum()
        for name, loss in losses.items():
            total = total + torch.exp(-self.log_variances[self.names.index(name)]) * loss.float()
        return total

    def current(self) -> Tensor:
        """Return the weights exp(-s), detached."""
        return torch.exp(-self.log_variances.detach())


class GradNorm(Balance):
    """Weights that bring the gradients of the losses to a common size, larger where learning is slow.

    Chen, Badrinarayanan, Lee, Rabinovich: GradNorm: Gradient Normalization for Adaptive Loss Balancing in
    Deep Multitask Networks, ICML 2018 (arXiv:1711.02257). G is the norm of a weighted loss' gradient at
    the last shared weight; its target is the mean G times (relative inverse training rate) ** alpha, where
    the training rate is a loss over what it was at the first step. The weights go down the gradient of
    the sum of |G - target|, the targets held fixed; then they are scaled to sum to their number.

    Differs from the paper: the gradient is taken for the weights' logarithms and divided by the mean G, so
    that the rate of .025 suits losses of any scale and no weight falls to 0, and is followed without
    momentum; the relative sizes of the weights to begin with may be given. Gradients are of the whole
    batch: averaged over ranks and parts before their norm is taken.

    Args:
        weights: Weights at the start; only their ratios count.
        alpha: Strength with which slow learning is made up for; 0 equalises the gradients.
        rate: Learning rate of the weights.
    """

    weights: Tensor
    first: Tensor

    def __init__(self, weights: Mapping[str, float], alpha: float = 1.5, rate: float = RATE) -> None:
        super().__init__(weights)
        self.alpha, self.rate = alpha, rate
        given = torch.tensor(list(weights.values()), dtype=torch.float32)
        self.register_buffer("weights", given * (len(given) / given.sum()))
        self.register_buffer("first", torch.full_like(given, math.nan))
        self._begun = False
        self._losses: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def forward(self, losses: Mapping[str, Tensor], shared: Tensor | None) -> Tensor:
        """Sum the weighted losses, and note each one's gradient at the shared weight."""
        weights = self.weights.clone()  # `step` changes them before the graph is gone
        if shared is not None:
            noted = {name: loss.detach().float() for name, loss in losses.items()}
            zero = torch.zeros_like(shared, dtype=torch.float32)
            gradients = []
            for name in self.names:
                gradient = None
                if name in losses and losses[name].requires_grad:
                    (gradient,) = torch.autograd.grad(
                        losses[name], shared, retain_graph=True, allow_unused=True
                    )
                gradients.append(zero if gradient is None else gradient.detach().float())
            self._losses.append(torch.stack([noted.get(name, zero.new_zeros(())) for name in self.names]))
            self._gradients.append(torch.stack(gradients).flatten(1))
        parts = [weights[self.names.index(name)] * loss.float() for name, loss in losses.items()]
        return torch.stack(parts).sum()

    def current(self) -> Tensor:
        """Return the weights; they sum to their number."""
        return self.weights.clone()

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights by the gradients of all parts and ranks.

        Raises:
            TrainingError: A loss is not above 0 at the first step.
        """
        if not self._losses:
            return
        losses, gradients = torch.stack(self._losses).mean(0), torch.stack(self._gradients).mean(0)
        self._losses, self._gradients = [], []
        if world_size() > 1:
            import torch.distributed as dist

            both = torch.cat([losses.unsqueeze(1), gradients], dim=1)
            dist.all_reduce(both)
            both /= world_size()
            losses, gradients = both[:, 0], both[:, 1:]
        if not self._begun and bool(self.first.isnan().any()):  # asked once: the device is waited for
            wrong = [(n, v) for n, v in zip(self.names, losses.tolist(), strict=True) if not v > 0]
            if wrong:
                raise TrainingError(
                    f"--balance gradnorm: the loss of {wrong[0][0]} is {wrong[0][1]:.4g} at the first "
                    "step, but training rates are ratios of losses above 0: use --balance fixed"
                )
            self.first.copy_(losses)
        self._begun = True
        sizes = self.weights * gradients.norm(dim=1)
        mean = sizes.mean()
        rates = (losses / self.first).clamp_min(1e-8)
        target = mean * (rates / rates.mean()) ** self.alpha
        moved = self.weights * torch.exp(-self.rate * torch.sign(sizes - target) * sizes / mean)
        moved = moved * (len(self.names) / moved.sum())
        # They stay in a step that a scaler skips, or where nothing reaches the shared weight.
        self.weights.copy_(torch.where(torch.isfinite(mean) & (mean > 0), moved, self.weights))


def build_balance(kind: str, weights: Mapping[str, float], alpha: float) -> Balance | None:
    """Build what `--balance` asks for; None where the weights are fixed, or there is one proxy only.

    Raises:
        UsageError: A weight is 0 at the start.
    """
    if kind == "fixed" or len(weights) < 2:
        return None
    return Uncertainty(weights) if kind == "uncertainty" else GradNorm(weights, alpha)


def last_shared(encoder: nn.Module) -> Any:
    """Return the encoder's last trainable weight with several axes: the last layer that proxies share."""
    weights = [p for p in encoder.parameters() if p.requires_grad and p.ndim > 1]
    return weights[-1] if weights else None
