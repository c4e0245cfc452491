"""Positional contrastive learning: slices at nearby positions of the body, whoever's, are alike."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ssl3d.api import (
    BatchRng,
    DataError,
    EmbeddedViews,
    Encoder,
    Proxy,
    Relations,
    SlabViews,
    StepOutput,
    UsageError,
    ViewRng,
    alignment,
    augment,
    check_slab,
    draw_positions,
    draw_slabs,
    load_proxies,
    pair_picture,
    projection_head,
    set_contrast,
    uniformity,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ssl3d.api import Volume

_LEVELS = 256  # quantiles of sorting scores


@dataclass
class PCLConfig(SlabViews):
    """Options of positional contrastive learning.

    Attributes:
        slices: Number of slices (slabs) drawn from each volume, at random distinct positions.
        threshold: Distance of two positions below which slices are positives; a position is a share of the
            volume's length, 0 to 1. Published: 0.35 for the 6 to 18 slices of cardiac MR, 0.1 for CT.
        temperature: Divisor of the cosine similarities before the softmax.
        sorted_by: Folder of a run of the proxy sorting whose scores are the positions, for data whose
            headers cannot be trusted: of each score its quantile among those of the training slices. The
            place in the file is the position where none is given.
        hidden: Width of the projection head's hidden layer.
        out: Length of a projection.
        head_norm: Norm of the projection head: batch, layer or none.
    """

    slices: int = 4
    flip: float = 0.0
    threshold: float = 0.1
    temperature: float = 0.1
    sorted_by: str = ""
    hidden: int = 512
    out: int = 128
    head_norm: Literal["batch", "layer", "none"] = "batch"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, not {self.threshold:g}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature:g}")
        for name in ("slices", "hidden", "out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class PCL(Proxy):
    """The network must work out which slices, of other people too, lie at the same height of the body.

    Zeng, Wu, Hu, Xu, Yuan, Huang, Zhuang, Hu, Shi: Positional Contrastive Learning for Volumetric Medical
    Image Segmentation, MICCAI 2021 (arXiv:2106.09157).

    Every slice is augmented twice. Two views are positives where their slices' positions differ by less
    than a threshold, be they of one volume or of two; all others are negatives. The loss is that of the
    released code, but for a constant factor of 1.43 there (its temperature divided by 0.07).

    Differs from it: a batch has several slices of each of its volumes instead of any slices; slices are
    slabs, laid flat, and pass through a 3D encoder; whole slices are shrunk to the crop, where there a
    random crop of nearly the whole is taken; the views are those of all contrastive proxies, so that they
    compare: small turns and zooms and changes of grey values, where there slices are mirrored, turned by
    any angle and deformed elastically, and keep their grey values; the head has batch norm and gives 128
    numbers, where there it has no norm and gives 512; the position is that of a slab's middle (there of its
    end), and AdamW takes the place of SGD. Positions by sorting scores are ours: a run of `sorting` scores
    each slice, and the quantile of its score among those of the training slices, taken before the first
    step, is its position. The subjects that that run saw count as seen.

    The metrics ask for slices of other subjects alone, as the two views of a slice are easily matched:
    `accuracy` is the share of views whose nearest one of another subject is a positive; `chance` is what
    guessing would reach.
    """

    Config = PCLConfig
    paper: ClassVar[str] = (
        "Zeng, Wu, Hu, Xu, Yuan, Huang, Zhuang, Hu, Shi: Positional Contrastive Learning for Volumetric "
        "Medical Image Segmentation, MICCAI 2021"
    )
    main: ClassVar[str] = "accuracy"
    mixed: ClassVar[bool] = True  # slices of all shapes are each other's positives and negatives
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 16, "lr": 2e-3}

    quantiles: Tensor

    def __init__(self, config: PCLConfig, encoder: Encoder) -> None:
        """Add the projection head.

        Raises:
            UsageError: Slabs are too thin for the encoder's kernels, or `sorted_by` cannot sort them.
            CheckpointError: `sorted_by` is no run.
        """
        super().__init__(config, encoder)
        check_slab(encoder, config.slab)
        self.head = projection_head(encoder.embed_dim, config.hidden, config.out, norm=config.head_norm)
        if config.sorted_by:
            _sorter(config.sorted_by, config.axis)
            self.register_buffer("quantiles", torch.full((_LEVELS - 1,), torch.nan))

    @classmethod
    def runs_used(cls, config: PCLConfig) -> tuple[str, ...]:
        """Return the run of `sorting` that says where slices lie."""
        return (config.sorted_by,) if config.sorted_by else ()

    @classmethod
    def draw(cls, config: PCLConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Cut `slabs` (S, C, slab, height, width) and tell each one's `position`, (S,): share or score.

        Raises:
            DataError: The volume has one slice, or its foreground is too short for so many slabs.
        """
        axis = "DHW".index(config.axis)
        length = volume.shape[1 + axis]
        if length == 1:
            raise DataError(f"{volume.id}: has one slice along {config.axis}, and so no position to learn")
        starts = draw_positions(volume, axis, config.slices, rng, slab=config.slab)
        if config.sorted_by:
            positions = _scores(config, volume, starts)
        else:
            positions = (starts + config.slab / 2) / length
        return {
            **draw_slabs(config, volume, starts, rng),
            "position": torch.as_tensor(positions, dtype=torch.float32),
        }

    def start_epoch(self, epoch: int, loader: Iterable[list[dict[str, Tensor]]]) -> None:
        """Measure, once, which scores the training slices have."""
        if not self.config.sorted_by or not bool(self.quantiles.isnan().any()):
            return
        scores = torch.cat([group["position"].flatten() for groups in loader for group in groups])
        levels = torch.arange(1, _LEVELS, device=scores.device, dtype=scores.dtype) / _LEVELS
        self.quantiles.copy_(scores.quantile(levels))

    def forward(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> StepOutput:
        """Augment every slab twice, embed and project the views, and compare those of all groups."""
        return self.compare(self.embed_views(batch, rng))

    def embed_views(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> EmbeddedViews:
        """Augment every slab twice, embed and project: `projected` (R, F) and `keys` (R, 2) of R views."""
        groups = [batch] if isinstance(batch, dict) else batch
        rngs = [rng] if isinstance(rng, BatchRng) else rng
        views = [self._views(group, each) for group, each in zip(groups, rngs, strict=True)]
        embeddings = torch.cat([self.encoder.embed(x.flatten(0, 1)) for x in views])
        projected = self.head(embeddings)
        keys = torch.cat([self._keys(group) for group in groups]).repeat_interleave(2, 0)
        shown = views[0]
        pairs = projected.detach().unflatten(0, (-1, 2))[: len(shown)]
        return EmbeddedViews({"projected": projected, "keys": keys}, lambda: pair_picture(shown, pairs))

    def compare(self, embedded: EmbeddedViews) -> StepOutput:
        """Compare the views of all slabs and ranks."""
        projected = embedded.rows["projected"]
        contrast = set_contrast(projected, embedded.rows["keys"], self._relate, self.config.temperature)
        a, b = projected.unflatten(0, (-1, 2)).detach().unbind(1)
        metrics = {
            "accuracy": contrast.accuracy,
            "chance": contrast.chance,
            "alignment": alignment(a, b),
            "uniformity": uniformity(a),
        }
        return StepOutput(contrast.loss, metrics, embedded.picture)

    def _views(self, group: dict[str, Tensor], rng: BatchRng) -> Tensor:
        """Augment every slab twice: (B x S, 2, C, slab, height, width)."""
        config, slabs = self.config, group["slabs"]
        count = slabs.shape[1]
        x = slabs.flatten(0, 1).repeat_interleave(2, 0)
        spacing = group["spacing"].repeat_interleave(2 * count, 0)
        x = augment(config, x, ViewRng(rng, 2 * count), config.size, spacing, axes=(1, 2))
        return x.unflatten(0, (-1, 2))

    def _keys(self, group: dict[str, Tensor]) -> Tensor:
        """Return position and subject of every slab, (B x S, 2)."""
        position = group["position"]
        if self.config.sorted_by:
            position = torch.bucketize(position, self.quantiles) / (_LEVELS - 1)
        subject = group["subject"].unsqueeze(1).expand_as(position)
        return torch.stack([position, subject.to(position.dtype)], -1).flatten(0, 1)

    def _relate(self, own: Tensor, other: Tensor) -> Relations:
        near = (own[:, None, 0] - other[:, 0]).abs() < self.config.threshold
        return Relations(near, ~near, own[:, None, 1] != other[:, 1])


@functools.lru_cache(maxsize=4)
def _sorter(run: str, axis: str) -> Any:
    """Load the proxy that sorts, once in each process."""
    proxy: Any = load_proxies(run).get("sorting")
    if proxy is None:
        raise UsageError(f"pcl.sorted_by {run}: is no run of the proxy sorting")
    if proxy.config.axis != axis:
        raise UsageError(
            f"pcl.sorted_by {run}: sorts along {proxy.config.axis}, and slices are drawn along {axis}: "
            f"choose --pcl.axis {proxy.config.axis}"
        )
    return proxy


def _scores(config: PCLConfig, volume: Volume, starts: np.ndarray) -> np.ndarray:
    """Score the slabs by the run that sorts, whose own slab lies in the middle of each."""
    sorter = _sorter(config.sorted_by, config.axis)
    length, slab = volume.shape[1 + "DHW".index(config.axis)], sorter.config.slab
    scores = []
    for start in starts:
        first = int(np.clip(start + (config.slab - slab) // 2, 0, max(length - slab, 0)))
        scores.append(float(sorter.profile(volume, first, first + slab)[1][0]))
    return np.array(scores)
