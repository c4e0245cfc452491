"""Sorting: put shuffled slices of a volume back into their order (SortingLoss)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ssl3d.api import (
    BatchRng,
    DataError,
    Encoder,
    Proxy,
    SlabViews,
    StepOutput,
    augment,
    centre_crop,
    check_slab,
    draw_positions,
    draw_slabs,
    in_order,
    kendall_tau,
    read_field,
    slab_size,
    sorting_loss,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from ssl3d.api import Volume


@dataclass
class SortingConfig(SlabViews):
    """Options of the sorting proxy; views are in plane, their geometry shared by the slices of a volume.

    Contrast, gamma and noise change every slice on its own, so that a slow change of intensity along the
    axis cannot be read off.

    Attributes:
        slices: Number of slices (slabs) drawn from each volume, at random distinct positions.
        min_gap_mm: Least distance between two slices' positions, in mm.
        relaxation: The differentiable sort: softsort, neuralsort, odd_even (sorting network) or pairwise
            (logistic, no permutation matrix).
        tau: Temperature of softsort, neuralsort and pairwise.
        power: Exponent of the distance in softsort, 1 or 2 in its paper.
        steepness: Steepness of the comparators of odd_even.
        distribution: Cumulative distribution function of odd_even's comparators: cauchy, logistic,
            reciprocal or optimal.
        regularization: Weight of the mean squared score, which keeps the scale of the scores finite.
        direction: Direction of the order that is asked: `fixed` where the volumes' orientation is known;
            `either` takes, for each volume, the smaller loss of the two directions; `auto` does so for
            the volumes of unknown orientation. Where either direction counts, kendall_tau is that of
            the better one, so its chance level is above 0.
    """

    slices: int = 8
    min_gap_mm: float = 2.0
    relaxation: Literal["softsort", "neuralsort", "odd_even", "pairwise"] = "softsort"
    tau: float = 1.0
    power: float = 1.0
    steepness: float = 10.0
    distribution: Literal["cauchy", "logistic", "reciprocal", "optimal"] = "cauchy"
    regularization: float = 1e-3
    direction: Literal["auto", "fixed", "either"] = "auto"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if self.slices < 2:
            raise ValueError(f"slices is {self.slices}, must be at least 2")
        for name in ("tau", "steepness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0")
        if self.power < 1:
            raise ValueError(
                f"power is {self.power}, must be at least 1: below, the gradient is infinite at 0"
            )
        for name in ("min_gap_mm", "regularization"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")


class Sorting(Proxy):
    """The network must work out how far along the body each slice was cut, from its anatomy alone.

    Slices at random positions along one axis of a volume are shuffled; the shared encoder and a linear
    head give each one number, on its own; the loss brings the soft permutation that sorts the numbers to
    the true order. All slices of a volume share one in-plane crop and one in-plane transformation, so
    that neither tells them apart, and nothing is ever mirrored or turned across the axis.

    Reconstructed from the abstract (no code or full text was at hand): the relaxation, its temperature,
    the number of slices and the augmentations are ours. Differs from the abstract: slices may be slabs,
    and pass through a 3D encoder.

    In training, BatchNorm sees the slices of the whole batch at once; with one volume in it the mean
    tells a slice where it lies among the others, so train with several, and read the metrics of
    held-back subjects, which are taken in eval mode.
    """

    Config = SortingConfig
    paper: ClassVar[str] = (
        "Zharov, Ershov, Baumbach, Heuveline: Using the Order of Tomographic Slices as a Prior for Neural "
        "Networks Pre-Training, arXiv:2203.09372, 2022"
    )
    main: ClassVar[str] = "kendall_tau"
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 8, "lr": 2e-3, "steps": 300}

    def __init__(self, config: SortingConfig, encoder: Encoder) -> None:
        """Add the head that scores slices.

        Raises:
            UsageError: The slabs are so thin that some taps of the encoder's kernels never see data.
        """
        super().__init__(config, encoder)
        check_slab(encoder, config.slab)
        # Without a bias: the order does not depend on it.
        self.head = nn.Linear(encoder.embed_dim, 1, bias=False)

    @classmethod
    def draw(cls, config: SortingConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Cut `slabs` (S, C, slab, height, width), in their true order along the axis.

        `oriented` says whether the direction of the axis is known.

        Raises:
            DataError: The foreground is too short for so many slices so far apart.
        """
        axis = "DHW".index(config.axis)
        positions = draw_positions(
            volume, axis, config.slices, rng, slab=config.slab, min_gap_mm=config.min_gap_mm
        )
        return {
            **draw_slabs(config, volume, positions, rng),
            "oriented": torch.tensor(volume.orientation != "unknown"),
        }

    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Augment, shuffle and score the slabs (B, S, C, slab, height, width)."""
        config, oriented, size = self.config, batch["oriented"], self.config.size
        # Slabs are channels to the views: one draw of geometry per volume, of contrast per slab.
        flat = batch["slabs"].flatten(1, 2)
        plain = centre_crop(flat, size)
        if self.training:
            flat = augment(config, flat, rng, size, batch["spacing"], axes=(1, 2))
        slabs = (flat if self.training else plain).view(*batch["slabs"].shape[:3], *size)
        count = slabs.shape[1]
        plain = plain.view_as(slabs)
        repeats = (plain[:, 1:] == plain[:, :-1]).flatten(2).all(dim=2).any(dim=1)
        ranks = rng.permutation(count)
        shown = slabs[torch.arange(len(slabs), device=slabs.device).unsqueeze(1), ranks]
        scores = self.score(shown.flatten(0, 1)).view(-1, count)
        with torch.autocast(scores.device.type, enabled=False):
            loss, backwards = self._loss(scores, ranks), torch.zeros_like(oriented)
            if config.direction != "fixed":
                other = self._loss(scores, count - 1 - ranks)
                backwards = other < loss
                if config.direction == "auto":
                    backwards &= ~oriented
                loss = torch.where(backwards, other, loss)
            total = loss.mean() + config.regularization * scores.square().mean()
        scores = scores.detach()
        ranks = torch.where(backwards.unsqueeze(1), count - 1 - ranks, ranks)
        metrics = {
            "kendall_tau": kendall_tau(scores, ranks).mean(),
            "exact": in_order(scores, ranks).float().mean(),
            "undecidable": repeats.float().mean(),
        }
        return StepOutput(total, metrics, lambda: _picture(shown[0], scores[0], ranks[0]))

    def score(self, slabs: Tensor) -> Tensor:
        """Score the positions (N,) of slabs (N, C, slab, height, width), higher towards the axis' end."""
        embedded = self.encoder.embed(slabs)
        with torch.autocast(embedded.device.type, enabled=False):
            return self.head(embedded.float()).squeeze(1)

    @torch.no_grad()
    def profile(
        self, volume: Volume, start: int | None = None, stop: int | None = None, batch: int = 64
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score every slab of a volume's foreground, as it is, in eval mode.

        With `field` crop, where the foreground is wider than the crop, the crop is tiled over it and
        scores are averaged.

        Args:
            volume: Volume of any size.
            start: First slice along the axis that may be looked at; the foreground's if None.
            stop: End of the slices that may be looked at, exclusive; the foreground's if None.
            batch: Slabs per pass through the encoder.

        Returns:
            Centres of the slabs along the axis, in voxels, and their scores.

        Raises:
            DataError: The foreground is shorter than a slab.
        """
        config, axis = self.config, "DHW".index(self.config.axis)
        low, high = _foreground(volume, axis, start, stop)
        if high[axis] - low[axis] < config.slab:
            raise DataError(
                f"{volume.id}: the foreground has {high[axis] - low[axis]} slices along {config.axis}, a "
                f"slab needs {config.slab}"
            )
        device, training = self.head.weight.device, self.training
        starts = np.arange(low[axis], high[axis] - config.slab + 1)
        corners: list[Sequence[int] | None] = [None]
        if config.field == "crop":
            corners = list(_tiles(slab_size(axis, config.slab, config.crop), axis, low, high))
        total = np.zeros(len(starts))
        self.eval()
        try:
            for corner in corners:
                for first in range(0, len(starts), batch):
                    some = starts[first : first + batch]
                    slabs = torch.stack([read_field(config, volume, int(s), corner) for s in some])
                    total[first : first + len(some)] += self.score(slabs.to(device)).double().cpu().numpy()
        finally:
            self.train(training)
        return starts + (config.slab - 1) / 2, total / len(corners)

    def _loss(self, scores: Tensor, ranks: Tensor) -> Tensor:
        c = self.config
        return sorting_loss(scores, ranks, c.relaxation, c.tau, c.power, c.steepness, c.distribution)


def _foreground(
    volume: Volume, axis: int, start: int | None, stop: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the foreground's box (first voxel, end), as if the volume had only these slices along `axis`."""
    low, high = (np.array(side) for side in volume.foreground_box())
    if start is None and stop is None:
        return low, high
    first, end = low[axis] if start is None else start, high[axis] if stop is None else stop
    block, occupied = np.asarray(volume.block), volume.foreground() >= 0.1
    occupied = occupied.take(range(first // block[axis], -(-end // block[axis])), axis)
    for i in range(3):
        blocks = np.flatnonzero(occupied.any(axis=tuple(j for j in range(3) if j != i)))
        if i != axis and len(blocks):
            low[i], high[i] = blocks[0] * block[i], min((blocks[-1] + 1) * block[i], volume.shape[i + 1])
    low[axis], high[axis] = first, end
    return low, high


def _tiles(size: Sequence[int], axis: int, start: np.ndarray, stop: np.ndarray) -> list[list[int]]:
    """Place the fewest crops that cover a box in plane, evenly spread, or one in its middle."""
    places = []
    for i in range(3):
        room = int(stop[i] - start[i]) - size[i]
        count = 1 if i == axis else max(1, math.ceil((room + size[i]) / size[i]))
        spread = np.linspace(0, room, count) if count > 1 else np.array([room // 2])
        places.append((start[i] + spread).round().astype(int).tolist())
    return [list(corner) for corner in itertools.product(*places)]


def _picture(slabs: Tensor, scores: Tensor, ranks: Tensor) -> Figure:
    """Show the middle slices of one volume's slabs, above in their true order, below in the predicted."""
    from matplotlib.figure import Figure

    count = len(slabs)
    middle = slabs[:, 0, slabs.shape[2] // 2].detach().float().cpu().numpy()
    scores, ranks = scores.float().cpu(), ranks.cpu()
    figure = Figure(figsize=(1.2 * count, 3.2), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    low, high = np.percentile(middle, (1, 99))
    for row, (order, name) in zip(axes, ((ranks.argsort(), "true"), (scores.argsort(), "predicted"))):
        for place, (panel, item) in enumerate(zip(row, order.tolist())):
            panel.imshow(middle[item], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            right = int(ranks[item]) == place
            panel.set_title(
                f"{int(ranks[item]) + 1}: {scores[item]:.2f}", fontsize=8, color="k" if right else "r"
            )
            panel.set_xticks([])
            panel.set_yticks([])
        row[0].set_ylabel(name)
    return figure
