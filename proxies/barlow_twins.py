"""Barlow Twins: features that agree over two views of a place and do not repeat each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from ssl3d.api import (
    BatchRng,
    EmbeddedViews,
    Encoder,
    PairViews,
    Proxy,
    StepOutput,
    barlow_twins_loss,
    check_depth,
    check_pairs,
    draw_pairs,
    embed_pairs,
    pair_picture,
    projection_head,
)

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.api import Volume


@dataclass
class BarlowTwinsConfig(PairViews):
    """Options of the Barlow Twins proxy.

    Attributes:
        off_diagonal: Weight of the squared correlations between different features.
        hidden: Width of the projection head's two hidden layers.
        out: Length of a projection. Take 4 to 8 times the batch size: if it is much longer than the batch,
            the sampling noise in its out x out correlations drowns what the views share.
        head_norm: Norm of the projection head: batch, layer or none.
    """

    off_diagonal: float = 0.0051
    hidden: int = 512
    out: int = 256
    head_norm: Literal["batch", "layer", "none"] = "batch"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if self.off_diagonal < 0:
            raise ValueError(f"off_diagonal must be 0 or more, not {self.off_diagonal:g}")
        for name, least in (("hidden", 1), ("out", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


class BarlowTwins(Proxy):
    """The network must work out what two views of a place share, in as many independent numbers as it can.

    Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins: Self-Supervised Learning via Redundancy Reduction,
    ICML 2021 (arXiv:2103.03230).

    Differs from the paper: crops that overlap, or slices, of volumes instead of resized crops of
    photographs, and augmentations of grey values instead of colour, by one law for both views (the paper
    blurs the first always, the second seldom, and solarises that one now and then); projections of 256
    numbers instead of 8192, as batches are of tens and not of 2048 (the paper has 4 numbers per example),
    and hidden layers of 512; AdamW instead of LARS in the recipe, whose biases there have a rate of their
    own. Both views pass the network in one batch, so its BatchNorm sees both, where the paper's sees one
    view of all ranks at a time; features are standardised over the global
    batch, as in the paper's pseudocode, on any number of ranks.
    """

    Config = BarlowTwinsConfig
    paper: ClassVar[str] = (
        "Zbontar, Jing, Misra, LeCun, Deny: Barlow Twins: Self-Supervised Learning via Redundancy "
        "Reduction, ICML 2021"
    )
    main: ClassVar[str] = "diagonal"
    mixed: ClassVar[bool] = True  # features are standardised over pairs of all shapes
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 32, "lr": 1e-3}

    def __init__(self, config: BarlowTwinsConfig, encoder: Encoder) -> None:
        """Add the projection head.

        Raises:
            UsageError: Slabs are too thin for the encoder's kernels.
        """
        super().__init__(config, encoder)
        check_depth(config, encoder)
        self.head = projection_head(
            encoder.embed_dim,
            config.hidden,
            config.out,
            layers=3,
            norm=config.head_norm,
            norm_last=False,
            bias_last=False,
        )

    @classmethod
    def draw(cls, config: BarlowTwinsConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw pairs of overlapping crops, or of slices: `a`, `b` (K, C, d, h, w) and `spacing` (3,).

        Raises:
            DataError: The volume has no foreground, or no room for so many slabs.
        """
        return draw_pairs(config, volume, rng)

    def forward(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> StepOutput:
        """Augment, embed and project both views, and correlate their features over all groups."""
        return self.compare(self.embed_views(batch, rng))

    def embed_views(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> EmbeddedViews:
        """Augment, embed and project both views of every pair: `projected` (R, 2, F)."""
        pairs = embed_pairs(self.config, self.encoder, batch, rng)
        projected = self.head(pairs.embeddings.flatten(0, 1)).unflatten(0, (-1, 2))
        views = pairs.views[0]
        shown = projected[: len(views)].detach()
        return EmbeddedViews({"projected": projected}, lambda: pair_picture(views, shown))

    def compare(self, embedded: EmbeddedViews) -> StepOutput:
        """Compute the correlations of features over all pairs and ranks."""
        projected = embedded.rows["projected"]
        if self.training:
            # Standardised, two rows are 1 and -1 in every feature, whatever they were: nothing to learn.
            check_pairs(self.config, len(projected), least=3)
        a, b = projected.unbind(1)
        loss, diagonal, off_diagonal = barlow_twins_loss(a, b, self.config.off_diagonal)
        metrics = {"diagonal": diagonal, "off_diagonal_rms": off_diagonal}
        return StepOutput(loss, metrics, embedded.picture)
