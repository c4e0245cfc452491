"""SimCLR: recognise the other view of the same place among those of other subjects."""

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
    UsageError,
    alignment,
    check_depth,
    check_pairs,
    draw_pairs,
    embed_pairs,
    nt_xent,
    pair_picture,
    projection_head,
    uniformity,
)

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.api import Collection, Volume


@dataclass
class SimCLRConfig(PairViews):
    """Options of the SimCLR proxy.

    Attributes:
        temperature: Divisor of the cosine similarities before the softmax; a lower one gives the nearest
            negatives more weight.
        hidden: Width of the projection head's hidden layer.
        out: Length of a projection.
        head_norm: Norm of the projection head: batch, layer or none.
        same_subject_negatives: Whether other crops of the same subject are negatives too, which data of a
            single subject need.
    """

    temperature: float = 0.2
    hidden: int = 512
    out: int = 128
    head_norm: Literal["batch", "layer", "none"] = "batch"
    same_subject_negatives: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature:g}")
        for name in ("hidden", "out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class SimCLR(Proxy):
    """The network must work out which two crops show the same place of the same person.

    Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual
    Representations, ICML 2020 (arXiv:2002.05709).

    Differs from the paper: crops that overlap by three quarters of each side (`min_overlap`), or slices, of
    volumes instead of resized crops of photographs, since other places are other anatomy, and augmentations
    of grey values instead of colour; pairs of one subject are not each other's negatives unless asked, for
    they may show the same; AdamW instead of LARS in the recipe, for batches of tens instead of 4096, and
    with them a temperature of 0.2 instead of 0.1; a head 512 wide instead of 2048, of two layers as in the
    paper (the released code now has three by default). The loss is the mean over both directions, which the
    released code sums. BatchNorm sees both views at once, as in the paper, but each rank's own examples,
    where the paper's sees those of all.
    """

    Config = SimCLRConfig
    paper: ClassVar[str] = (
        "Chen, Kornblith, Norouzi, Hinton: A Simple Framework for Contrastive Learning of Visual "
        "Representations, ICML 2020"
    )
    main: ClassVar[str] = "accuracy"
    mixed: ClassVar[bool] = True  # pairs of all shapes are each other's negatives
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 32, "lr": 2e-3}

    def __init__(self, config: SimCLRConfig, encoder: Encoder) -> None:
        """Add the projection head.

        Raises:
            UsageError: Slabs are too thin for the encoder's kernels.
        """
        super().__init__(config, encoder)
        check_depth(config, encoder)
        self.head = projection_head(encoder.embed_dim, config.hidden, config.out, norm=config.head_norm)

    def setup(self, data: Collection) -> None:
        """Refuse data that have no negatives.

        Raises:
            UsageError: All volumes are of one subject, whose pairs may not be each other's negatives.
        """
        if self.config.same_subject_negatives:
            return
        first = data[0]
        if all((each.dataset, each.subject) == (first.dataset, first.subject) for each in data):
            raise UsageError(
                "simclr tells a subject's pairs from those of others, and all volumes to train on are one "
                "subject's: give it more subjects, or --simclr.same_subject_negatives true"
            )

    @classmethod
    def draw(cls, config: SimCLRConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw pairs of overlapping crops, or of slices: `a`, `b` (K, C, d, h, w) and `spacing` (3,).

        Raises:
            DataError: The volume has no foreground, or no room for so many slabs.
        """
        return draw_pairs(config, volume, rng)

    def forward(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> StepOutput:
        """Augment, embed and project both views, and tell pairs from the negatives of all groups."""
        return self.compare(self.embed_views(batch, rng))

    def embed_views(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> EmbeddedViews:
        """Augment, embed and project both views of each pair: `projected` (R, 2, F), `subjects` (R,)."""
        pairs = embed_pairs(self.config, self.encoder, batch, rng)
        projected = self.head(pairs.embeddings.flatten(0, 1)).unflatten(0, (-1, 2))
        views = pairs.views[0]
        shown = projected[: len(views)].detach()
        rows = {"projected": projected, "subjects": pairs.subjects}
        return EmbeddedViews(rows, lambda: pair_picture(views, shown))

    def compare(self, embedded: EmbeddedViews) -> StepOutput:
        """Tell every pair from the negatives of all pairs and ranks."""
        config, rows = self.config, embedded.rows
        if self.training:
            # Pairs of one volume are of one subject: without another volume there is no negative.
            least = 2 if config.same_subject_negatives else config.per_volume + 1
            check_pairs(config, len(rows["subjects"]), least)
        a, b = rows["projected"].unbind(1)
        contrast = nt_xent(a, b, rows["subjects"], config.temperature, config.same_subject_negatives)
        metrics = {
            "accuracy": contrast.accuracy,
            "chance": contrast.chance,
            "alignment": alignment(a, b),
            "uniformity": uniformity(a),
        }
        return StepOutput(contrast.loss, metrics, embedded.picture)
