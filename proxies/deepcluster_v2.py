"""DeepCluster-v2: tell from each view in which cluster of the whole data set its place was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl3d.api import (
    IGNORED,
    BatchRng,
    Encoder,
    MemoryBank,
    PairViews,
    Proxy,
    StepOutput,
    agreement,
    check_depth,
    cluster_loss,
    default_prototypes,
    draw_places,
    embed_pairs,
    mutual_information,
    perplexity,
    projection_head,
    prototype_picture,
    rank,
    world_size,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from ssl3d.api import Collection, Volume


@dataclass
class DeepClusterV2Config(PairViews):
    """Options of the DeepCluster-v2 proxy.

    Attributes:
        per_volume: Number of places of each volume in the memory bank; they stay where they are, and all of
            them are drawn whenever the volume is. 1 suits images.
        prototypes: Number of clusters per head; 0 takes a tenth of the places in the bank, within 8
            and 3000.
        heads: Number of clusterings held side by side, by turns of the first and the second views.
        every: Least number of steps from one clustering to the next, which then comes with the next pass
            over the data.
        iterations: Iterations of k-means.
        temperature: Divisor of the similarities to the centroids before the softmax.
        hidden: Width of the projection head's hidden layer.
        out: Length of a projection.
        head_norm: Norm of the projection head: batch, layer or none.
    """

    per_volume: int = 4
    prototypes: int = 0
    heads: int = 3
    every: int = 20
    iterations: int = 10
    temperature: float = 0.1
    hidden: int = 512
    out: int = 128
    head_norm: Literal["batch", "layer", "none"] = "batch"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature:g}")
        for name in ("heads", "every", "iterations", "hidden", "out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.prototypes < 0 or self.prototypes == 1:
            raise ValueError(f"prototypes must be 0 (automatic) or at least 2, not {self.prototypes}")


class DeepClusterV2(Proxy):
    """The network must work out to which cluster of places, found in its own features, a view belongs.

    Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by
    Contrasting Cluster Assignments, NeurIPS 2020 (arXiv:2006.09882), appendix D; after Caron,
    Bojanowski, Joulin, Douze: Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018.

    Differs from the paper: instead of photographs, places in volumes, which stay the same through the run
    (crops anywhere would make a cluster a matter of the subject alone), and augmentations of grey values
    instead of colour; two views, no small crops, which the paper has beside them; clusters scale with the
    data instead of 3000; a head 512 wide instead of 2048; AdamW instead of LARS in the recipe. The paper
    clusters at every pass over 1.3 million images; a pass here may be two steps, too few to learn anything
    of new targets, so that a number of steps lies between. BatchNorm sees each rank's own examples, where
    theirs sees those of several. As released, the bank is filled by a pass over the data before the first.

    On held-out subjects, which are not in the bank, a head's target is the centroid nearest to the view
    it is of, predicted from the other.
    """

    Config = DeepClusterV2Config
    paper: ClassVar[str] = (
        "Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by "
        "Contrasting Cluster Assignments (DeepCluster-v2), NeurIPS 2020"
    )
    main: ClassVar[str] = "kappa"
    mixed: ClassVar[bool] = True  # the bank is written by all ranks, whichever groups they have
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 8, "lr": 2e-3}

    prototypes: Tensor
    assignments: Tensor
    waited: Tensor

    def __init__(self, config: DeepClusterV2Config, encoder: Encoder) -> None:
        """Add the projection head, and an empty bank.

        Raises:
            UsageError: Slabs are too thin for the encoder's kernels.
        """
        super().__init__(config, encoder)
        check_depth(config, encoder)
        self.head = projection_head(
            encoder.embed_dim, config.hidden, config.out, norm=config.head_norm, norm_last=False
        )
        self.register_buffer("waited", torch.zeros((), dtype=torch.int64))  # steps since the clustering
        self.register_buffer("told", torch.zeros(2))
        self._size(torch.zeros(0, dtype=torch.int64))

    @property
    def last(self) -> Tensor:
        """Effective number of clusters used, and stability, of the last clustering; the buffer `told`."""
        return self.get_buffer("told")

    def setup(self, data: Collection) -> None:
        """Give every place of every volume its row in the bank, and choose the number of clusters."""
        indices = torch.tensor([volume.index for volume in data], dtype=torch.int64)
        self._size(self._codes(indices))

    def _size(self, codes: Tensor) -> None:
        config = self.config
        count = config.prototypes or default_prototypes(len(codes))
        self.bank = MemoryBank(codes, config.out)
        centroids = F.normalize(torch.randn(config.heads, count, config.out), dim=2)
        self.register_buffer("prototypes", centroids)
        self.register_buffer("assignments", self.bank.unassigned(config.heads))

    def _codes(self, indices: Tensor) -> Tensor:
        """Return the codes of all places of volumes, (B x per_volume,)."""
        places = torch.arange(self.config.per_volume, device=indices.device)
        return (indices[:, None] * self.config.per_volume + places).flatten()

    @classmethod
    def draw(
        cls, config: DeepClusterV2Config, volume: Volume, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Draw two views of every place of the volume: `a`, `b` (K, C, d, h, w) and `spacing` (3,).

        Raises:
            DataError: The volume has no foreground, or no room for so many slabs.
        """
        return draw_places(config, volume, rng)

    # Clustering -----------------------------------------------------------------------------------

    def start_epoch(self, epoch: int, loader: Iterable[list[dict[str, Tensor]]]) -> None:
        """Cluster what the bank holds, if the last time is long enough ago; fill it before the first time.

        Random numbers come from the global generator, which the loop seeds equally on all ranks.
        """
        if not bool(self.bank.filled.any()):
            self._fill(loader)
        elif int(self.waited) < self.config.every:
            return
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        count = self.prototypes.shape[1]
        used, alike = [], []
        for head in range(self.config.heads):
            view = head % self.bank.features.shape[0]
            clusters = self.bank.cluster(view, count, self.config.iterations, generator)
            alike.append(mutual_information(self.assignments[head], clusters.assignment))
            used.append(perplexity(torch.bincount(clusters.assignment[self.bank.filled], minlength=count)))
            self.prototypes[head], self.assignments[head] = clusters
        self.last.copy_(torch.stack([torch.stack(used).mean(), self.last.new_tensor(alike).mean()]))
        self.waited.zero_()

    @torch.no_grad()
    def _fill(self, loader: Iterable[list[dict[str, Tensor]]]) -> None:
        """Embed every place once; ranks take turns with the batches."""
        device = self.prototypes.device
        seed = int(torch.randint(2**62, ()))
        codes = [torch.zeros(0, dtype=torch.int64, device=device)]
        features = [torch.zeros(0, 2, self.config.out, device=device)]
        for number, groups in enumerate(loader):
            if number % world_size() != rank():
                continue
            rngs = [
                BatchRng(seed + number, range(len(group["index"])), len(group["index"]), device)
                for group in groups
            ]
            pairs = embed_pairs(self.config, self.encoder, groups, rngs)
            features.append(self._project(pairs.embeddings).float())
            codes.append(torch.cat([self._codes(group["index"]) for group in groups]))
        self.bank.write(torch.cat(codes), torch.cat(features))

    def _project(self, embeddings: Tensor) -> Tensor:
        projected: Tensor = self.head(embeddings.flatten(0, 1))
        return projected.unflatten(0, embeddings.shape[:2])

    def after_step(self, step: int, total: int) -> None:
        """Count the steps since the last clustering."""
        self.waited += 1

    # Training -------------------------------------------------------------------------------------

    def forward(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> StepOutput:
        """Embed both views of every place, and tell each one's cluster in every head."""
        groups = [batch] if isinstance(batch, dict) else batch
        pairs = embed_pairs(self.config, self.encoder, groups, rng)
        projected = self._project(pairs.embeddings)
        codes = torch.cat([self._codes(group["index"]) for group in groups])
        with torch.autocast(projected.device.type, enabled=False):
            scores = torch.einsum("rvf,hkf->hrvk", F.normalize(projected.float(), dim=2), self.prototypes)
            chosen = scores.detach().argmax(3)
            targets = self._targets(chosen, codes)
            loss = cluster_loss(scores, targets, self.config.temperature)
        count = self.prototypes.shape[1]
        agreed = [agreement(t.flatten(), c.flatten(), count) for t, c in zip(targets, chosen, strict=True)]
        metrics = {
            "kappa": torch.stack([head.kappa for head in agreed]).mean(),
            "accuracy": torch.stack([head.agreement for head in agreed]).mean(),
            "chance": torch.stack([head.chance for head in agreed]).mean(),
            "used": self.last[0].clone(),
            "stability": self.last[1].clone(),
        }
        if self.training:
            self.bank.write(codes, projected)
        shown = pairs.views[0][:, 1]
        target, guess = (targets[0].amax(1)[: len(shown)], chosen[0, : len(shown), 1])
        return StepOutput(loss, metrics, lambda: prototype_picture(shown, target, guess))

    def _targets(self, chosen: Tensor, codes: Tensor) -> Tensor:
        """Look up clusters (heads, R, 2) in the bank; take the head's own view for strangers."""
        if self.training:
            return self.bank.targets(self.assignments, codes)[..., None].expand_as(chosen)
        targets = torch.full_like(chosen, IGNORED)
        for head in range(len(chosen)):
            own = head % 2
            targets[head, :, 1 - own] = chosen[head, :, own]
        return targets
