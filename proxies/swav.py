"""SwAV: views of one place are given the same prototype, and all prototypes are used equally."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ssl3d.api import (
    BatchRng,
    Encoder,
    PairViews,
    Prototypes,
    Proxy,
    StepOutput,
    ViewRng,
    agreement,
    augment,
    balanced_assignments,
    check_depth,
    default_prototypes,
    draw_pairs,
    embed_pairs,
    projection_head,
    prototype_picture,
    push_pairs,
    queue_scores,
    read_number,
    swav_loss,
    view_margin,
    write_number,
)

if TYPE_CHECKING:
    from ssl3d.api import Collection, Volume

_PLACES = 4  # most places in a volume that count as items of their own; more show the same again


@dataclass
class SwAVConfig(PairViews):
    """Options of the SwAV proxy.

    Attributes:
        prototypes: Number of prototypes; 0 takes a tenth of the places that the data have to show (at most
            4 in each volume), within 8 and 3000.
        temperature: Divisor of the similarities to the prototypes before the softmax.
        epsilon: Softness of the assignments; lower is harder. Raise it where few prototypes are used; lower
            it where the loss stays at the logarithm of their number.
        iterations: Iterations of the Sinkhorn algorithm that balances the assignments.
        queue: Number of earlier pairs that assignments are balanced over beside the batch, for batches much
            smaller than the number of prototypes; 0 is none. Features that still change fast would be
            set apart from older ones rather than from each other.
        queue_from: Share of the training after which the queue is used.
        freeze: Share of the training in which prototypes stay as they began.
        small_crops: Number of further views of the same place, of half the side, whose prototypes are
            predicted too.
        hidden: Width of the projection head's hidden layer.
        out: Length of a projection.
        head_norm: Norm of the projection head: batch, layer or none.
    """

    prototypes: int = 0
    temperature: float = 0.1
    epsilon: float = 0.02
    iterations: int = 3
    queue: int = 0
    queue_from: float = 0.3
    freeze: float = 0.01
    small_crops: int = 0
    hidden: int = 512
    out: int = 128
    head_norm: Literal["batch", "layer", "none"] = "batch"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        for name in ("temperature", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name):g}")
        for name, least in (("iterations", 1), ("queue", 0), ("small_crops", 0), ("hidden", 1), ("out", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("queue_from", "freeze"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the training, 0 to 1, not {getattr(self, name):g}")
        if self.prototypes < 0 or self.prototypes == 1:
            raise ValueError(f"prototypes must be 0 (automatic) or at least 2, not {self.prototypes}")


class SwAV(Proxy):
    """The network must work out which kind of place a crop shows, the same for every view of the place.

    Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by
    Contrasting Cluster Assignments, NeurIPS 2020 (arXiv:2006.09882).

    Differs from the paper: crops that overlap, or slices, of volumes instead of resized crops of
    photographs, and augmentations of grey values instead of colour; prototypes scale with the data instead
    of 3000. Epsilon is 0.02 instead of 0.05: assignments must be sharper than predictions by more than the
    views differ, else equal scores are where training ends, and on small batches of weakly agreeing crops
    it did. Projections are normalised over the batch as well, which removes the direction that all
    features share at first. No queue unless asked for; it then holds the batches of all ranks, where there
    each keeps its own. A head 512 wide instead of 2048. No small crops unless asked for, where the paper
    has six: on volumes each costs an eighth of a large one and shows little; they have half the side at
    the same resolution, and lie within the large ones. AdamW instead of LARS in the recipe. A prototype's
    gradient runs through its normalisation, where the released code normalises before each step, and
    prototypes keep still for a share of the training (`freeze`), not for a number of steps, as the queue is
    used from a share of it on (`queue_from`), not from an epoch on. BatchNorm sees each rank's own
    examples, where theirs sees those of several.
    """

    Config = SwAVConfig
    paper: ClassVar[str] = (
        "Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by "
        "Contrasting Cluster Assignments, NeurIPS 2020"
    )
    main: ClassVar[str] = "kappa"
    mixed: ClassVar[bool] = True  # assignments are balanced over pairs of all shapes
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 32, "lr": 2e-3}

    queue: Tensor
    queued: Tensor
    progress: Tensor

    def __init__(self, config: SwAVConfig, encoder: Encoder) -> None:
        """Add the projection head, the prototypes and the queue.

        Raises:
            UsageError: Slabs are too thin for the encoder's kernels.
        """
        super().__init__(config, encoder)
        check_depth(config, encoder)
        self.head = projection_head(encoder.embed_dim, config.hidden, config.out, norm=config.head_norm)
        self.prototypes = Prototypes(config.out, config.prototypes or default_prototypes(0))
        self.register_buffer("queue", torch.zeros(config.queue, 2, config.out))
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))

    def setup(self, data: Collection) -> None:
        """Choose the number of prototypes by what there is to tell apart, unless it is given."""
        if not self.config.prototypes:
            items = sum(_places(self.config, volume.shape[1:]) for volume in data)
            self.prototypes = Prototypes(self.config.out, default_prototypes(items))

    @classmethod
    def draw(cls, config: SwAVConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw pairs of overlapping crops, or of slices: `a`, `b` (K, C, d, h, w) and `spacing` (3,).

        Raises:
            DataError: The volume has no foreground, or no room for so many slabs.
        """
        return draw_pairs(config, volume, rng)

    def forward(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> StepOutput:
        """Assign the large views of all groups to prototypes, and predict that from the other views."""
        config = self.config
        groups = [batch] if isinstance(batch, dict) else batch
        rngs = [rng] if isinstance(rng, BatchRng) else rng
        # Balanced over the prototypes, a single row belongs to all of them alike.
        pairs = embed_pairs(config, self.encoder, groups, rngs, least=2)
        embeddings = [pairs.embeddings]
        if config.small_crops:
            small = [small_views(config, group, each) for group, each in zip(groups, rngs, strict=True)]
            parts = [self.encoder.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in small]
            embeddings.append(torch.cat(parts))
        together = torch.cat(embeddings, dim=1)
        projected = self.head(together.flatten(0, 1)).unflatten(0, together.shape[:2])
        # Compared as the buffer holds them, in float32.
        progress = np.float32(read_number(self.progress))
        frozen = bool(progress < np.float32(config.freeze))
        similarities = self.prototypes(projected, frozen)
        queued = bool(progress >= np.float32(config.queue_from))
        earlier = queue_scores(self.prototypes, self.queue, self.queued) if queued else None
        assigned = balanced_assignments(similarities[:, :2], earlier, config.epsilon, config.iterations)
        scores = similarities.unbind(1)
        loss = swav_loss(scores, assigned, config.temperature)
        if self.training:
            codes = [group["index"].repeat_interleave(group["a"].shape[1]) for group in groups]
            push_pairs(self.queue, self.queued, projected[:, :2], torch.cat(codes))
        chosen = [view.detach().argmax(1) for view in scores[:2]]
        agreed = agreement(chosen[0], chosen[1], len(self.prototypes))
        metrics = {
            "kappa": agreed.kappa,
            "agreement": agreed.agreement,
            "chance": agreed.chance,
            "used": agreed.used,
        }
        shown = pairs.views[0][:, 0]
        a, b = (side[: len(shown)] for side in chosen)
        return StepOutput(loss, metrics, lambda: prototype_picture(shown, a, b))

    def after_step(self, step: int, total: int) -> None:
        """Normalise the prototypes, and note how far the training has come."""
        self.prototypes.normalize_()
        write_number(self.progress, (step + 1) / max(total, 1))


@torch.no_grad()
def small_views(config: SwAVConfig, batch: dict[str, Tensor], rng: BatchRng) -> Tensor:
    """Cut small views out of the drawn pairs, from a and b in turn, at random places, and augment them.

    Returns:
        (B x K, small_crops, C, d, h, w), half as high and wide as the large views; half as deep where
        these are volumes.
    """
    x = torch.stack([batch["a"], batch["b"]], dim=2)
    examples, count = x.shape[:2]
    flat = config.views == "slices" or x.shape[4] == 1
    size: tuple[int, ...]
    axes: tuple[int, ...]
    if flat:
        plane = config.plane if config.views == "slices" else config.crop[1:]
        size, axes = (int(x.shape[4]), *_half(plane)), (1, 2)
    else:
        size, axes = _half(config.crop), (0, 1, 2)
    margin = view_margin(config, size, axes)
    views = ViewRng(rng, count * config.small_crops)
    source = x.flatten(0, 1)[:, [i % 2 for i in range(config.small_crops)]].flatten(0, 1)
    cut = _cut(source, [n + 2 * m for n, m in zip(size, margin, strict=True)], views.uniform(3))
    spacing = batch["spacing"].repeat_interleave(count * config.small_crops, 0)
    return augment(config, cut, views, size, spacing, axes).unflatten(0, (examples * count, -1))


def _cut(x: Tensor, size: Sequence[int], where: Tensor) -> Tensor:
    """Cut a box of `size` out of each of (R, C, D, H, W), at `where` (R, 3) in 0 to 1 of the free room."""
    index = [torch.arange(len(x), device=x.device)[:, None, None, None]]
    for axis, length in enumerate(size):
        room = x.shape[axis + 2] - length
        start = (where[:, axis] * (room + 1)).long().clamp_max(room)
        places = start[:, None] + torch.arange(length, device=x.device)
        index.append(places.view(len(x), *(-1 if a == axis else 1 for a in range(3))))
    return x[index[0], :, index[1], index[2], index[3]].movedim(-1, 1)


def _half(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // 2) for n in sizes)


def _places(config: SwAVConfig, shape: Sequence[int]) -> int:
    """Count the crops side by side that cover a volume, or its slabs; at most `_PLACES`."""
    if config.views == "slices" and shape[0] > 1:
        return min(_PLACES, max(1, shape["DHW".index(config.axis)] // config.slab))
    crop = (1, *config.plane) if config.views == "slices" else config.crop
    return min(_PLACES, math.prod(max(1, round(n / side)) for n, side in zip(shape, crop, strict=True)))
