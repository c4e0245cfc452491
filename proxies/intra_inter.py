"""Intra-inter: clusters slices and images (2D) and whole volumes (3D) with one encoder, jointly."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl3d.api import (
    AggregatorConfig,
    Attended,
    BatchRng,
    DataError,
    Encoder,
    MemoryBank,
    Prototypes,
    Proxy,
    SliceAggregator,
    StepOutput,
    TrainingError,
    UsageError,
    ViewRng,
    Views,
    agreement,
    apply_torchio,
    attended_offset,
    augment,
    default_prototypes,
    draw_crop,
    evaluating,
    gather,
    lay_flat,
    projection_head,
    read_slab,
    row_counts,
    shard,
    sinkhorn,
    slab_size,
    swav_loss,
    view_margin,
    world_size,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from ssl3d.api import Collection, Volume

IGNORED = -100  # target of what has no cluster yet
# Of torchio's transforms, those that stay in the plane of a slice.
_IN_PLANE = ("RandomBiasField", "RandomBlur", "RandomGamma", "RandomGhosting", "RandomNoise", "RandomSpike")


@dataclass
class IntraInterConfig(Views):
    """Options of the intra-inter proxy.

    Both views of a volume show the same slices, augmented differently; nothing moves across slices.

    Attributes:
        slices: Slices (slabs) of a volume, in their order; a thinner volume gives what it has. An image
            (D = 1) is one slice.
        slab: Adjacent slices per slab. 1 suits the convolution kinds acs and 2.5d; a 3d or p3d encoder
            needs slabs deeper than its stride along D.
        axis: Axis that the slices lie across.
        plane: Size of the slices (height, width), voxels; the same place in all slices of a volume.
        stack: Which slices: evenly spread over the volume (spread), a random set (random), or neighbours
            at a regular distance (block).
        step_mm: Distance of neighbours in a block; 0 takes adjacent ones.
        augmentation: Every slice on its own (slice), or, as in the paper, the volume: its slices turn,
            blur and change their contrast alike (volume). Then how strongly can be read off the slices
            that are seen: on volumes of pure noise, half of a masked slice's embedding.
        min_foreground: Least share of foreground in what is drawn.
        clustering: How views agree: swav (balanced assignments of the batch) or deepcluster_v2 (k-means
            over a bank of the whole data, anew in each epoch).
        weights: Of the three losses: intra (2D clustering), inter (3D clustering), masked slices. 1 0 0
            is 2D only, 0 1 1 is 3D only.
        stages: All losses at once (joint), or intra, then masked slices on the frozen encoder, then inter
            end to end (staged).
        stage_shares: Shares of the steps of the three stages.
        pooling: How slices become a volume's embedding: deformable (attention), attention, or mean, with
            which nothing can be predicted: weights 1 1 0.
        prototypes: How many, intra and inter; 0 takes a tenth of what the data have to show, 8 to 3000.
        temperature: Divides similarities to the prototypes before the softmax.
        epsilon: Of swav's assignments: lower is harder. At the paper's .05 small batches stay at the loss
            of equal assignments, the logarithm of the prototypes.
        iterations: Of Sinkhorn (swav: 3 in the paper) and of k-means (deepcluster_v2: 10 in the paper).
            0 takes the paper's.
        queue: Earlier pairs that swav's assignments are balanced over beside the batch; for batches
            smaller than the prototypes, once features change slowly.
        queue_from: Share of the training from which on the queue is used.
        freeze: Share of the training in which swav's prototypes stay as they began.
        clusterings: Of deepcluster_v2, each from its own start; they take the views' banks in turn.
        mask_share: Least and largest share of a volume's slices that are masked, in one block, at least
            one slice.
        target: What masked slices are predicted as: their embeddings as they are, without gradient
            (detach), or those of a moving average of the encoder (ema).
        momentum: Of the moving average.
        hidden: Width of the 2D projection head's hidden layer.
        out: Length of a 2D projection.
        head_norm: Norm of the 2D projection head: layer or none.
        width: Length of a slice token and of a volume's embedding.
        layers: Of the aggregator.
        heads: Of its attention.
        downsample: Slices per key of the deformable attention.
        offset_scale: Its largest offset, in distances between keys.
        dropout: Of the aggregator.
    """

    flip: float = 0.0
    rotate: float = 10.0
    scale: float = 0.1
    gamma: float = 0.3
    contrast: float = 0.2
    slices: int = 8
    slab: int = 1
    axis: Literal["D", "H", "W"] = "D"
    plane: tuple[int, int] = (64, 64)
    stack: Literal["spread", "random", "block"] = "spread"
    step_mm: float = 0.0
    augmentation: Literal["slice", "volume"] = "slice"
    min_foreground: float = 0.1
    clustering: Literal["swav", "deepcluster_v2"] = "swav"
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    stages: Literal["joint", "staged"] = "joint"
    stage_shares: tuple[float, float, float] = (0.4, 0.2, 0.4)
    pooling: Literal["deformable", "attention", "mean"] = "deformable"
    prototypes: tuple[int, int] = (0, 0)
    temperature: float = 0.1
    epsilon: float = 0.03
    iterations: int = 0
    queue: int = 0
    queue_from: float = 0.1
    freeze: float = 0.0
    clusterings: int = 2
    mask_share: tuple[float, float] = (0.1, 0.3)
    target: Literal["detach", "ema"] = "detach"
    momentum: float = 0.99
    hidden: int = 512
    out: int = 128
    head_norm: Literal["layer", "none"] = "layer"
    width: int = 128
    layers: int = 4
    heads: int = 4
    downsample: int = 2
    offset_scale: float = 2.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        for name, least in (
            ("slices", 2), ("slab", 1), ("clusterings", 1), ("hidden", 1), ("out", 1), ("width", 2),
            ("layers", 1), ("heads", 1), ("downsample", 1), ("iterations", 0), ("queue", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if len(self.plane) != 2 or min(self.plane) < 1:
            raise ValueError(f"plane needs two sizes of at least 1, not {self.plane}")
        for name in ("temperature", "epsilon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name):g}")
        for name in ("min_foreground", "queue_from", "freeze", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, not {getattr(self, name):g}")
        if self.step_mm < 0:
            raise ValueError(f"step_mm must be 0 or more, not {self.step_mm:g}")
        low, high = self.mask_share
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_share needs two rising shares between 0 and 1, not {self.mask_share}")
        if len(self.weights) != 3 or min(self.weights) < 0 or not any(self.weights):
            raise ValueError(f"weights needs three numbers, 0 or more, one above 0, not {self.weights}")
        if len(self.prototypes) != 2 or any(n < 0 or n == 1 for n in self.prototypes):
            raise ValueError(f"prototypes needs two numbers, 0 (automatic) or above 1: {self.prototypes}")
        if self.pooling == "mean" and self.weights[2]:
            raise ValueError("weights must end in 0 with pooling mean, in which no slice sees another")
        if self.stages == "staged":
            shares = self.stage_shares
            if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
                raise ValueError(f"stage_shares needs three shares that sum to 1, not {shares}")
            order = (self.weights[0], self.weights[2], self.weights[1])
            if any(share and not weight for share, weight in zip(shares, order, strict=True)):
                raise ValueError(f"stage_shares {shares} gives steps to a loss of weight 0: {self.weights}")
        across = [name for name in self.torchio if name not in _IN_PLANE]
        if across:
            raise ValueError(
                f"torchio's {', '.join(across)} may leave the plane; use {', '.join(_IN_PLANE)}"
            )
        try:
            self.aggregator(1)
        except ValueError as error:
            raise ValueError(str(error)) from None

    def aggregator(self, features: int) -> AggregatorConfig:
        """The aggregator's options, for embeddings of a length."""
        return AggregatorConfig(
            features,
            width=self.width,
            pooling=self.pooling,
            layers=self.layers,
            heads=self.heads,
            hidden=2 * self.width,
            downsample=self.downsample,
            offset_scale=self.offset_scale,
            dropout=self.dropout,
            slices=self.slices,
            slab=self.slab,
            axis=self.axis,
            plane=self.plane,
        )


class IntraInter(Proxy):
    """The network must work out what kind of slice, and of volume, it sees, and what hidden slices show.

    Nguyen, Nguyen, Mai, Cao, Nguyen, Ho, Swoboda, Albarqouni, Xie, Sonntag: Joint Self-Supervised
    Image-Volume Representation Learning with Intra-Inter Contrastive Clustering, AAAI 2023
    (arXiv:2212.01893).

    2D images and slices of volumes pass through the shared encoder. *Intra*: both views of a slice or an
    image belong to the same cluster. A deformable attention along the slices makes their embeddings one
    embedding of the volume. *Inter*: both views of a volume belong to the same cluster. *Masked*: a block
    of slice tokens is replaced by a learned one, and the slices' embeddings are predicted from the rest.

    Differs from the paper: the three losses are joined unless asked for in stages; the masked loss is on
    masked slices only, whose targets have no gradient and are standardised over the batch, since a joint
    loss would be least with all slices alike; slices are drawn anew in each step, and augmented in plane;
    prototypes scale with the data instead of 3000; a small aggregator; every slice is augmented on its
    own, since what slices share of an augmentation is a short cut to masked ones. Differs from the
    released code: attention runs along the slices (there along the features), the projection of the
    tokens is trained and saved, views are drawn anew in each epoch, and the entries of the memory bank
    of several data sets do not collide. Pooling by plain attention or the mean is for ablation.

    In the frozen stage of `stages` staged the encoder keeps its parameters exactly, so no other proxy can
    learn on it meanwhile, and norms use the statistics that they have; its weights are held once more.
    Not for sharded parameters (FSDP).
    """

    Config = IntraInterConfig
    paper: ClassVar[str] = (
        "Nguyen, Nguyen, Mai, Cao, Nguyen, Ho, Swoboda, Albarqouni, Xie, Sonntag: Joint Self-Supervised "
        "Image-Volume Representation Learning with Intra-Inter Contrastive Clustering, AAAI 2023"
    )
    main: ClassVar[str] = "kappa"
    mixed: ClassVar[bool] = True  # images and volumes share assignments
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 16, "lr": 2e-3}

    progress: Tensor
    kept: Tensor

    def __init__(self, config: IntraInterConfig, encoder: Encoder) -> None:
        """Adds the aggregator, what clusters, and what predicts.

        Raises:
            UsageError: Slabs too thin for the encoder's kernels.
        """
        super().__init__(config, encoder)
        kind, stride = getattr(encoder.config, "kind", ""), encoder.strides[-1][0]
        if kind in ("3d", "p3d") and config.slab <= stride:
            raise UsageError(
                f"slab is {config.slab}, but kernels of kind {kind} at a stride of {stride} along D learn "
                f"nothing off-plane from slabs of fewer than {stride + 1} slices: deepen them, or take "
                "kind acs"
            )
        _, inter, masked = config.weights
        if inter or masked:
            self.aggregator = SliceAggregator(config.aggregator(encoder.embed_dim))
        if masked:
            self.mask_token = nn.Parameter(torch.randn(config.width) * 0.02)
            self.decoder = nn.Linear(config.width, encoder.embed_dim)
            if config.target == "ema":
                self.teacher = copy.deepcopy(encoder).requires_grad_(False).eval()
        self._add_clusterings([], [])
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        if config.stages == "staged" and config.stage_shares[1]:
            self.register_buffer("kept", self._flat())  # the frozen stage may be the first

    def _add_clusterings(self, places: Sequence[int], volumes: Sequence[int]) -> None:
        config, features = self.config, self.encoder.embed_dim
        if config.weights[0]:
            head = projection_head(
                features, config.hidden, config.out, norm=config.head_norm, norm_last=False
            )
            self.intra = Clustering(config, config.out, config.prototypes[0], places, head)
        if config.weights[1]:
            # As released, without a head: what is clustered is the volume's embedding.
            self.inter = Clustering(config, config.width, config.prototypes[1], volumes)

    def setup(self, data: Collection) -> None:
        """Sizes prototypes and memory banks by the data: places along volumes, images, and volumes.

        Raises:
            DataError: A loss or a stage needs stacks of slices, and no volume has two slabs.
        """
        config = self.config
        places: list[int] = []
        volumes: list[int] = []
        stacks = 0
        for volume in data:
            image = volume.shape[1] == 1
            first = volume.index * config.slices
            places += [first] if image else range(first, first + config.slices)
            volumes += [] if image else [volume.index]
            stacks += not image and volume.shape[1 + "DHW".index(config.axis)] >= 2 * config.slab
        staged = config.stages == "staged" and config.stage_shares[0] < 1
        if not stacks and (staged or not config.weights[0]):
            what = "stages staged" if staged else "weights " + " ".join(f"{w:g}" for w in config.weights)
            raise DataError(
                f"intra_inter with {what} needs stacks of slices, and none of the {len(data)} volumes to "
                f"train on has two slabs of {config.slab} along {config.axis}: add volumes, or take "
                + ("stages joint" if staged and config.weights[0] else "weights 1 0 0")
            )
        self._add_clusterings(places, volumes)

    def travels(self) -> Mapping[str, nn.Module]:
        """The aggregator, which pools a volume's slices: `--pool aggregator`."""
        return {"aggregator": self.aggregator} if hasattr(self, "aggregator") else {}

    def train(self, mode: bool = True) -> IntraInter:
        """The moving average of the encoder always evaluates."""
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
        return self

    @classmethod
    def draw(cls, config: IntraInterConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Cuts `slices` (V, S, C, slab, h, w) in their order; V is 2 where torchio alters each view.

        `places` (S,) are their relative places, 0 to 1, and `spacing` (3,) is in mm, slices laid flat.

        Raises:
            DataError: The volume has no foreground.
        """
        image = volume.shape[1] == 1
        axis, slab = (0, 1) if image else ("DHW".index(config.axis), config.slab)
        starts, places = draw_stack(config, volume, axis, slab, rng)
        way = slab_size(axis, starts[-1] - starts[0] + slab, config.plane)
        corner = list(draw_crop(volume, way, rng, config.min_foreground, {axis: starts[0]}))
        margin = view_margin(config, (slab, *config.plane), axes=(1, 2))[1:]
        size = slab_size(axis, slab, [n + 2 * m for n, m in zip(config.plane, margin, strict=True)])
        corner = [c - m for c, m in zip(corner, slab_size(axis, 0, margin), strict=True)]
        slabs = []
        for start in starts:
            corner[axis] = start
            slabs.append(read_slab(volume, axis, corner, size))
        read = torch.stack(slabs)
        views = [read]
        if config.torchio:  # slices as channels: one draw for a volume's view
            flat = read.flatten(0, 1)
            views = [apply_torchio(config.torchio, flat, rng).view_as(read) for _ in range(2)]
        return {
            "slices": torch.stack(views),
            "places": torch.tensor(places, dtype=torch.float32),
            "spacing": torch.tensor(lay_flat(volume.spacing, axis), dtype=torch.float32),
        }

    def forward(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> StepOutput:
        """Augments and encodes all slices and images at once, and clusters, aggregates and predicts."""
        config = self.config
        groups = [batch] if isinstance(batch, dict) else batch
        rngs = [rng] if isinstance(rng, BatchRng) else rng
        weights = self._weights()
        views = [augment_stack(config, group, each) for group, each in zip(groups, rngs, strict=True)]
        if self._frozen():
            with torch.no_grad(), evaluating(self.encoder):
                embedded = encode(self.encoder, views)
        else:
            embedded = encode(self.encoder, views)
        loss = torch.stack([e.float().sum() for e in embedded]).sum() * 0
        metrics: dict[str, Tensor] = {}
        picture = Picture(views[_longest(views)], groups[_longest(views)]["places"])
        kappas: list[Tensor] = []
        steady = bool(self.progress < config.freeze)
        queued = bool(self.progress >= config.queue_from)
        # Slices and images, 2D.
        if weights[0]:
            rows = torch.cat([e.transpose(1, 2).flatten(0, 1) for e in embedded])
            codes = torch.cat([_place_codes(config, group).flatten() for group in groups])
            found = self.intra(rows, codes, steady, queued)
            loss = loss + weights[0] * found.loss
            metrics |= found.metrics("intra")
            kappas += [found.kappa]
            before = sum(e.shape[0] * e.shape[2] for e in embedded[: _longest(views)])
            count = views[_longest(views)].shape[2]
            picture.slices = found.chosen[before : before + count]
        # Volumes, 3D. All ranks know whether any of them has one.
        stacks = [n for n, e in enumerate(embedded) if e.shape[2] > 1]
        if weights[1] or weights[2]:
            number = sum(row_counts(sum(len(embedded[n]) for n in stacks), embedded[0].device))
        if weights[1] and number:
            pooled = [
                self._aggregate(embedded[n], picture if n == _longest(views) else None) for n in stacks
            ]
            volumes = _joined(pooled, (2, config.width), embedded[0])
            codes = _joined([groups[n]["index"] for n in stacks], (), groups[0]["index"])
            found = self.inter(volumes, codes, steady, queued)
            loss = loss + weights[1] * found.loss
            metrics |= found.metrics("inter")
            kappas += [found.kappa]
            before = sum(len(embedded[n]) for n in stacks if n < _longest(views))
            picture.volume = found.chosen[before : before + 1]
        if weights[2] and number:
            error, told = self._masked(embedded, views, stacks, rngs, picture)
            loss = loss + weights[2] * error
            metrics |= told
            if config.stages == "staged" and config.weights[1]:
                self._fill_inter(embedded, groups, stacks)
        metrics["kappa"] = torch.stack(kappas).mean() if kappas else loss.new_zeros(())
        return StepOutput(loss, {k: v.detach() for k, v in metrics.items()}, picture.draw)

    def start_epoch(self, epoch: int, loader: Any) -> None:
        """Clusters the memory banks anew, filled before the first epoch."""
        if self.config.clustering != "deepcluster_v2":
            return
        if epoch == 0:
            self._fill(loader)
        for level in self._levels():
            level.cluster(epoch)

    def after_step(self, step: int, total: int) -> None:
        """Keeps a frozen encoder as it was, normalises the prototypes, moves the average, notes the time.

        Raises:
            TrainingError: A stage freezes the encoder, and this process holds a part of it only.
        """
        config, before, frozen = self.config, self._weights(), self._frozen()
        if hasattr(self, "kept") and len(self.kept) != sum(p.numel() for p in self.encoder.parameters()):
            raise TrainingError(
                "intra_inter: stages staged freezes the encoder, for which every process needs all of its "
                "weights: take --strategy ddp, or stages joint"
            )
        if frozen:
            self._restore()  # from the optimizer's momentum and weight decay
        self.progress.fill_((step + 1) / max(total, 1))
        if self._frozen() and not frozen:
            self.kept.copy_(self._flat())
        for level in self._levels():
            if config.clustering == "swav":
                level.prototypes.normalize_()
            elif self._weights() != before:
                level.cluster(10**6 + step)  # a stage begins: not on the clusters of the start
        if hasattr(self, "teacher"):
            with torch.no_grad():
                pairs = zip(
                    self.teacher.state_dict().values(), self.encoder.state_dict().values(), strict=True
                )
                for old, new in pairs:
                    if old.is_floating_point():
                        old.lerp_(new.to(old.dtype), 1 - config.momentum)
                    else:
                        old.copy_(new)

    def _weights(self) -> tuple[float, float, float]:
        """Of the losses, in the stage that the run is in."""
        intra, inter, masked = self.config.weights
        if self.config.stages == "joint":
            return intra, inter, masked
        first, second, _ = self.config.stage_shares
        at = float(self.progress)
        if at < first:
            return intra, 0.0, 0.0
        return (0.0, 0.0, masked) if at < first + second - 1e-9 else (0.0, inter, 0.0)

    def _frozen(self) -> bool:
        """Whether the run is in the stage that keeps the encoder as it is."""
        return hasattr(self, "kept") and not any(self._weights()[:2])

    def _flat(self) -> Tensor:
        """All parameters of the encoder in a row."""
        return torch.cat([p.detach().reshape(-1) for p in self.encoder.parameters()])

    @torch.no_grad()
    def _restore(self) -> None:
        at = 0
        for parameter in self.encoder.parameters():
            own = self.kept[at : at + parameter.numel()]
            parameter.copy_(own.view_as(parameter))
            at += parameter.numel()

    def _levels(self) -> list[Clustering]:
        return [getattr(self, name) for name in ("intra", "inter") if hasattr(self, name)]

    def _aggregate(self, embedded: Tensor, picture: Picture | None = None) -> Tensor:
        """Embeddings (B, 2, E) of volumes from those of their slices (B, 2, S, F)."""
        details: list[Attended] = []
        pooled: Tensor = self.aggregator(embedded.flatten(0, 1), details=details)[1]
        if picture is not None:
            picture.details = details
        return pooled.unflatten(0, embedded.shape[:2])

    def _masked(
        self,
        embedded: Sequence[Tensor],
        views: Sequence[Tensor],
        stacks: Sequence[int],
        rngs: Sequence[BatchRng],
        picture: Picture,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The error of the predicted embeddings of masked slices, over all ranks' masked slices."""
        config, like = self.config, embedded[0]
        teacher = getattr(self, "teacher", None)
        with torch.no_grad():
            known = embedded if teacher is None else encode(teacher, views)
        standard = standardised([known[n] for n in stacks], like)
        sums: list[Tensor] = []
        offsets: list[Tensor] = []
        details: list[Attended] = []
        for n, target in zip(stacks, standard, strict=True):
            tokens = embedded[n].flatten(0, 1)
            mask = draw_mask(ViewRng(rngs[n], 2), tokens.shape[1], config.mask_share)
            with torch.autocast(tokens.device.type, enabled=False):
                projected = self.aggregator.project(tokens.float())
                hidden = torch.where(mask.unsqueeze(2), self.mask_token, projected)
                details = []
                found, _ = self.aggregator.attend(hidden, details=details)
                predicted = self.decoder(found)
                wanted = target.flatten(0, 1)
                between = neighbours(wanted, mask)
                each = [
                    (p - wanted).square().mean(2) for p in (predicted, torch.zeros_like(wanted), between)
                ]
                sums.append(torch.stack([(e * mask).sum() for e in each] + [mask.sum().float()]))
            offsets.append(attended_offset(details))
            if n == _longest(views):
                picture.mask = mask[:2]
                picture.details = picture.details or details
        own = torch.stack(sums).sum(0) if sums else like.new_zeros(4, dtype=torch.float32)
        every = gather(own.detach()[None]).sum(0)
        # A sum over own slices, scaled so that the mean over ranks is that of the global batch.
        error = own[0] * world_size() / every[3].clamp_min(1)
        told = {
            "masked_error": every[0] / every[3].clamp_min(1),
            "masked_vs_mean": every[0] / every[1].clamp_min(1e-12),
            "masked_vs_neighbours": every[0] / every[2].clamp_min(1e-12),
        }
        if offsets and config.pooling == "deformable":
            told["offset"] = torch.stack(offsets).mean()
        return error, told

    @torch.no_grad()
    def _fill_inter(
        self, embedded: Sequence[Tensor], groups: Sequence[dict[str, Tensor]], stacks: Sequence[int]
    ) -> None:
        """Keeps the bank of volumes fresh before the stage that clusters them."""
        if self.config.clustering == "deepcluster_v2" and self.training:
            pooled = [self._aggregate(embedded[n]) for n in stacks]
            codes = _joined([groups[n]["index"] for n in stacks], (), groups[0]["index"])
            self.inter.bank.write(codes, _joined(pooled, (2, self.config.width), embedded[0]))

    @torch.no_grad()
    def _fill(self, loader: Any) -> None:
        """Writes every volume and image into the memory banks; each rank embeds its share."""
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {"intra": [], "inter": []}
        with evaluating(self):
            for groups in loader:
                for whole in groups:
                    group = {name: shard(value) for name, value in whole.items()}
                    if not len(group["index"]):
                        continue
                    size = (group["slices"].shape[4], *self.config.plane)
                    plain = _both(centre(group["slices"], size))
                    embedded = encode(self.encoder, [plain])[0]
                    if hasattr(self, "intra"):
                        flat = embedded.transpose(1, 2).flatten(0, 1)
                        projected = self.intra.project(flat)
                        rows["intra"].append((_place_codes(self.config, group).flatten(), projected))
                    if hasattr(self, "inter") and embedded.shape[2] > 1:
                        rows["inter"].append((group["index"], self._aggregate(embedded)))
        for name, found in rows.items():
            if hasattr(self, name):
                bank = getattr(self, name).bank
                codes = _joined([c for c, _ in found], (), bank.codes)
                features = _joined([f for _, f in found], (2, bank.features.shape[2]), bank.features)
                bank.write(codes, features)


class Found(NamedTuple):
    """What clustering gives.

    Attributes:
        loss: Scalar; the mean over ranks is that of the global batch.
        kappa: Agreement of both views' clusters, 0 being chance.
        agreement: Share of rows whose views chose the same.
        chance: Of that.
        used: Effective number of clusters chosen.
        chosen: (R, 2), clusters of each row's views.
    """

    loss: Tensor
    kappa: Tensor
    agreement: Tensor
    chance: Tensor
    used: Tensor
    chosen: Tensor

    def metrics(self, level: str) -> dict[str, Tensor]:
        """Scalars by name."""
        return {
            f"{level}_loss": self.loss,
            f"{level}_kappa": self.kappa,
            f"{level}_agreement": self.agreement,
            f"{level}_chance": self.chance,
            f"{level}_used": self.used,
        }


class Clustering(nn.Module):
    """Clusters that both views of an item are to share: SwAV's prototypes or DeepCluster-v2's k-means.

    Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, NeurIPS
    2020 (both methods).

    Args:
        config: Of the proxy.
        features: Length of what is clustered.
        count: Clusters; 0 takes as many as the items are worth.
        codes: Of the items, which the memory bank keeps.
        head: Projects first; None for none.
    """

    queue: Tensor
    queued: Tensor
    centroids: Tensor
    assignment: Tensor

    def __init__(
        self,
        config: IntraInterConfig,
        features: int,
        count: int,
        codes: Sequence[int],
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Identity() if head is None else head
        self.count = count or default_prototypes(len(codes))
        if config.clustering == "swav":
            self.prototypes = Prototypes(features, self.count)
            self.register_buffer("queue", torch.zeros(config.queue, 2, features))
            self.register_buffer("queued", torch.zeros((), dtype=torch.int64))
        else:
            self.bank = MemoryBank(list(codes), features)
            heads = config.clusterings
            start = functional.normalize(torch.randn(heads, self.count, features), dim=2)
            self.register_buffer("centroids", start)
            self.register_buffer("assignment", torch.full((heads, len(codes)), IGNORED))

    def project(self, x: Tensor) -> Tensor:
        """What is clustered, of (R, 2, F)."""
        return torch.as_tensor(self.head(x.flatten(0, 1))).unflatten(0, x.shape[:2]).float()

    def forward(self, x: Tensor, codes: Tensor, steady: bool, queued: bool) -> Found:
        """Assigns both views of every row to clusters, and how far each is from where it belongs.

        Every rank must call it, with any number of rows.

        Args:
            x: (R, 2, F).
            codes: Of the rows' items (R,).
            steady: Whether prototypes get no gradient.
            queued: Whether the queue takes part.
        """
        projected = self.project(x)
        with torch.autocast(x.device.type, enabled=False):
            if self.config.clustering == "swav":
                loss, scores = self._swav(projected, codes, steady, queued)
            else:
                loss, scores = self._deepcluster(projected, codes)
            chosen = scores.detach().argmax(2)
            found = agreement(chosen[:, 0], chosen[:, 1], self.count)
        return Found(loss, found.kappa, found.agreement, found.chance, found.used, chosen)

    def _swav(self, projected: Tensor, codes: Tensor, steady: bool, queued: bool) -> tuple[Tensor, Tensor]:
        config, own = self.config, len(projected)
        scores = self.prototypes(projected, steady)
        rows = scores.detach()
        if queued and config.queue and self.queued >= config.queue:
            with torch.no_grad():
                rows = torch.cat([rows, self.prototypes(shard(self.queue))])
        assigned = [sinkhorn(view, config.epsilon, config.iterations or 3)[:own] for view in rows.unbind(1)]
        loss = swav_loss(scores.unbind(1), assigned, config.temperature)
        if self.training and config.queue:
            with torch.no_grad():
                newest = gather(projected.detach())
                # In the order of the items: then the queue is the same on any number of ranks.
                newest = newest[gather(codes).argsort(stable=True)]
                self.queue.copy_(torch.cat([newest, self.queue])[: config.queue])
                self.queued += len(newest)
        return loss, scores

    def _deepcluster(self, projected: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        unit = functional.normalize(projected, dim=2)
        scores = torch.einsum("rvf,hkf->hrvk", unit, self.centroids)
        wanted = self.bank.targets(self.assignment, codes)
        number = sum(row_counts(int((wanted >= 0).sum()), wanted.device))
        # Both views of a row belong where its item does, in each of the clusterings.
        total = functional.cross_entropy(
            (scores / self.config.temperature).flatten(0, 2),
            wanted.unsqueeze(2).expand(-1, -1, 2).flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        if self.training:
            self.bank.write(codes, projected)
        return total * world_size() / max(2 * number, 1), scores[0]

    def cluster(self, seed: int) -> None:
        """Clusters the bank anew; every rank must call it."""
        if not bool(self.bank.filled.any()):
            return
        for n in range(len(self.centroids)):
            generator = torch.Generator().manual_seed(seed * len(self.centroids) + n)
            found = self.bank.cluster(n % 2, self.count, self.config.iterations or 10, generator)
            self.centroids[n], self.assignment[n] = found.centroids, found.assignment


# Drawing and augmenting ----------------------------------------------------------------------------


def draw_stack(
    config: IntraInterConfig, volume: Volume, axis: int, slab: int, rng: np.random.Generator
) -> tuple[list[int], list[float]]:
    """First slices of slabs along an axis, increasing, without overlap, within the foreground.

    Returns:
        Starts, `config.slices` or as many as there is room for; and relative places in the foreground.
    """
    low, high = (int(end[axis]) for end in volume.foreground_box())
    room = max(high - low, 1)
    count = max(1, min(config.slices, room // slab))
    if config.stack == "block":
        step = max(slab, round(config.step_mm / volume.spacing[axis]))
        # A block that would be longer than the volume has its slabs closer to each other.
        step = min(step, max(slab, (room - slab) // max(count - 1, 1)))
        free = max(room - (count - 1) * step - slab, 0)
        first = int(rng.integers(free + 1))
        starts = [low + first + n * step for n in range(count)]
    elif config.stack == "random":
        free = max(room - count * slab, 0)
        gaps = sorted(rng.choice(free + count, count, replace=False).tolist())
        starts = [low + gap + n * (slab - 1) for n, gap in enumerate(gaps)]
    else:
        # Evenly spread, at a random phase: each in its share of the volume, no two of them overlapping.
        share = (room - slab + 1) / count
        phase = float(rng.random())
        starts = [low + int((n + phase) * share) for n in range(count)]
        if count > 1 and share < slab:
            free = max(room - count * slab, 0)
            first = int(rng.integers(free + 1))
            starts = [low + first + n * slab for n in range(count)]
    places = [min(max((start + slab / 2 - low) / room, 0.0), 1.0) for start in starts]
    return starts, places


def augment_stack(config: IntraInterConfig, batch: dict[str, Tensor], rng: BatchRng) -> Tensor:
    """Two augmented views of every stack: (B, 2, S, C, slab, h, w)."""
    x = _both(batch["slices"])
    examples, _, count, channels, slab = x.shape[:5]
    size = (slab, *config.plane)
    if config.augmentation == "volume":
        # Slices as channels: one geometry per view of a volume, contrast by slice.
        flat = x.flatten(2, 3).flatten(0, 1)
        spacing = batch["spacing"].repeat_interleave(2, 0)
        flat = augment(config, flat, ViewRng(rng, 2), size, spacing, axes=(1, 2))
    else:
        flat = x.flatten(0, 2)
        spacing = batch["spacing"].repeat_interleave(2 * count, 0)
        flat = augment(config, flat, ViewRng(rng, 2 * count), size, spacing, axes=(1, 2))
    return flat.reshape(examples, 2, count, channels, *size)


def centre(x: Tensor, size: Sequence[int]) -> Tensor:
    """The middle of (..., D, H, W), of a size."""
    for axis, length in enumerate(size):
        x = x.narrow(axis - 3, (x.shape[axis - 3] - length) // 2, length)
    return x


def _both(x: Tensor) -> Tensor:
    """Both views of (B, V, ...), V being 1 where they start from the same."""
    return x.expand(-1, 2, *x.shape[2:])


def encode(encoder: Encoder, views: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings (B, 2, S, F) of stacks (B, 2, S, C, slab, h, w); equal slabs in one batch.

    So norms see slices and images of all data sets together.
    """
    shapes = sorted({tuple(x.shape[3:]) for x in views})
    found: dict[int, Tensor] = {}
    for shape in shapes:
        same = [n for n, x in enumerate(views) if tuple(x.shape[3:]) == shape]
        rows = [views[n].flatten(0, 2) for n in same]
        embedded = encoder.embed(torch.cat(rows)).split([len(row) for row in rows])
        for n, part in zip(same, embedded, strict=True):
            found[n] = part.unflatten(0, views[n].shape[:3])
    return [found[n] for n in range(len(views))]


def _longest(views: Sequence[Tensor]) -> int:
    """Which group to show: of the longest stacks."""
    return max(range(len(views)), key=lambda n: views[n].shape[2])


def _place_codes(config: IntraInterConfig, group: dict[str, Tensor]) -> Tensor:
    """Items (B, S) of the 2D bank: as many places along each volume as slices are drawn."""
    places = group["places"]
    if places.shape[1] == 1:
        places = torch.zeros_like(places)
    number = (places * config.slices).long().clamp(0, config.slices - 1)
    return group["index"].unsqueeze(1) * config.slices + number


def _joined(parts: Sequence[Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else like.new_zeros(0, *shape)


# Masked slices -------------------------------------------------------------------------------------


def draw_mask(rng: BatchRng, count: int, share: tuple[float, float]) -> Tensor:
    """One block of masked slices per row, at least one slice and not all: (B, count), True where masked."""
    low, high = share
    length = (rng.uniform(low=low, high=high) * count).round().long().clamp(1, count - 1)
    first = (rng.uniform() * (count - length + 1)).long().minimum(count - length)
    number = torch.arange(count, device=first.device)
    return (number >= first.unsqueeze(1)) & (number < (first + length).unsqueeze(1))


@torch.no_grad()
def standardised(embedded: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Embeddings (..., F) less their mean and over their deviation, of all groups and ranks, by feature.

    Every rank must call it. So constant embeddings are no solution: their error is that of the mean.
    """
    flat = _joined([e.detach().float().flatten(0, -2) for e in embedded], like.shape[-1:], like.float())
    every = gather(flat)
    mean, variance = every.mean(0), every.var(0, correction=0)
    scale = (variance + 1e-3 * variance.mean() + 1e-12).sqrt()
    return [(e.detach().float() - mean) / scale for e in embedded]


def neighbours(x: Tensor, mask: Tensor) -> Tensor:
    """What lies linearly between the slices next to each row's masked block; one of them at an end.

    Args:
        x: (B, S, F).
        mask: One block per row, (B, S).
    """
    count = mask.shape[1]
    first = mask.to(torch.uint8).argmax(1)
    length = mask.sum(1)
    left, right = first - 1, first + length
    number = torch.arange(count, device=x.device)
    share = (number - left.unsqueeze(1)) / (length + 1).unsqueeze(1)
    share = torch.where(left.unsqueeze(1) < 0, 1.0, share)
    share = torch.where(right.unsqueeze(1) >= count, 0.0, share).unsqueeze(2)
    row = torch.arange(len(x), device=x.device)
    before, after = x[row, left.clamp_min(0)], x[row, right.clamp_max(count - 1)]
    return before.unsqueeze(1) * (1 - share) + after.unsqueeze(1) * share


# Picture -------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """What there is to see of the first stack of a batch.

    Attributes:
        views: (B, 2, S, C, slab, h, w).
        places: (B, S).
        slices: 2D clusters of its slices' views, (S, 2).
        volume: 3D clusters of its views, (1, 2).
        mask: Masked slices of its views, (2, S).
        details: What the aggregator attended to.
    """

    views: Tensor
    places: Tensor
    slices: Tensor | None = None
    volume: Tensor | None = None
    mask: Tensor | None = None
    details: Sequence[Attended] = ()

    def draw(self) -> Figure:
        """Slices of both views with their clusters, masked ones framed; where the attention goes."""
        from matplotlib.figure import Figure

        images = self.views[0, :, :, 0, self.views.shape[4] // 2].detach().float().cpu().numpy()
        count = images.shape[1]
        wide = max(count, 4)
        figure = Figure(
            figsize=(1.15 * wide + 0.4, 3.0 + (2.4 if self.details else 0)), layout="constrained"
        )
        grid = figure.add_gridspec(4 if self.details else 2, wide)
        clusters = None if self.slices is None else self.slices.tolist()
        low, high = float(images.min()), float(images.max())
        for view in range(2):
            for n in range(count):
                panel = figure.add_subplot(grid[view, n])
                panel.imshow(images[view, n], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
                panel.set_xticks([])
                panel.set_yticks([])
                if clusters is not None:
                    same = clusters[n][0] == clusters[n][1]
                    panel.set_title(f"{clusters[n][view]}", fontsize=8, color="green" if same else "red")
                hidden = self.mask is not None and bool(self.mask[view, n])
                for side in panel.spines.values():
                    side.set_color("orange" if hidden else "black")
                    side.set_linewidth(3 if hidden else 0.5)
                if n == 0:
                    panel.set_ylabel(f"view {'ab'[view]}", fontsize=8)
        if self.volume is not None and len(self.volume):
            a, b = self.volume[0].tolist()
            figure.suptitle(
                f"volume: cluster {a}" if a == b else f"volume: clusters {a} and {b}",
                fontsize=9,
                color="green" if a == b else "red",
            )
        if self.details:
            self._attention(figure.add_subplot(grid[2:, : wide // 2]))
            self._offsets(figure.add_subplot(grid[2:, wide // 2 :]))
        return figure

    def _attention(self, panel: Any) -> None:
        attention = self.details[-1].attention[0].mean(0).float().cpu().numpy()
        panel.imshow(attention, cmap="viridis", vmin=0, aspect="auto")
        panel.set_xlabel("key", fontsize=8)
        panel.set_ylabel("slice", fontsize=8)
        panel.set_title("attention, last layer", fontsize=8)

    def _offsets(self, panel: Any) -> None:
        for n, one in enumerate(self.details):
            places, offsets = one.places[0].float().cpu(), one.offsets[0].float().cpu()
            for head, (end, moved) in enumerate(zip(places.tolist(), offsets.tolist(), strict=True)):
                height = n + (head + 0.5) / len(places)
                for to, by in zip(end, moved, strict=True):
                    panel.plot([to - by, to], [height, height], color="tab:red", linewidth=1)
                panel.plot(end, [height] * len(end), "k.", markersize=3)
        panel.set_xlabel("slice", fontsize=8)
        panel.set_ylabel("layer", fontsize=8)
        panel.set_title("where heads look, and how far that was moved", fontsize=8)
