"""Intra-inter: clusters slices and images (2D) and whole volumes (3D) with one encoder, jointly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ssl3d.api import (
    AggregatorConfig,
    Attended,
    BalancedClustering,
    BatchRng,
    DataError,
    Encoder,
    KMeansClustering,
    PairClustering,
    Proxy,
    SliceAggregator,
    StepOutput,
    ViewRng,
    Views,
    added_option,
    apply_torchio,
    attended_offset,
    augment,
    centre_crop,
    check_in_plane,
    check_slab,
    draw_crop,
    draw_stack,
    evaluating,
    flat_parameters,
    follow,
    gather,
    interpolate_masked,
    lay_flat,
    mask_block,
    mask_scattered,
    momentum_teacher,
    projection_head,
    read_number,
    read_slab,
    restore_parameters,
    row_counts,
    shard,
    slab_size,
    stage_features,
    stage_width,
    standardise,
    view_margin,
    world_size,
    write_number,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from ssl3d.api import Collection, Volume

Group = dict[str, Tensor]


@dataclass
class IntraInterConfig(Views):
    """Options of the intra-inter proxy.

    Both views of a volume show the same slices, augmented differently; nothing moves across slices.

    Attributes:
        slices: Number of slices (slabs) drawn from a volume, in their order; a thinner volume gives as
            many as it has, and an image (D = 1) is one slice.
        slab: Adjacent slices per slab. 1 suits the convolution kinds acs and 2.5d; a 3d or p3d encoder
            needs slabs deeper than its stride along D.
        axis: Axis that the slices lie across.
        plane: Size of the slices (height, width) in voxels; the same place in all slices of a volume.
        stack: Choice of the slices: evenly spread over the volume (spread), a random set (random), or
            neighbours at a regular distance (block).
        step_mm: Distance of neighbours in a block, in mm; 0 takes adjacent slices.
        augmentation: Unit that is augmented: every slice on its own (slice), or, as in the paper, the
            volume, whose slices turn, blur and change their contrast alike (volume). The latter lets a
            network read the strength of an augmentation off the slices that it sees: on volumes of pure
            noise that gives half of a masked slice's embedding away.
        min_foreground: Least share of foreground in what is drawn.
        clustering: Method that makes views agree: swav (balanced assignments of the batch) or
            deepcluster_v2 (k-means over a bank of the whole data, anew in each epoch).
        weights: Weights of the three losses: intra (2D clustering), inter (3D clustering) and masked
            slices. 1 0 0 is 2D only, 0 1 1 is 3D only.
        stages: Order of the losses: all at once (joint), or intra, then masked slices on the frozen
            encoder, then inter end to end (staged).
        stage_shares: Shares of the steps that the three stages take; they sum to 1.
        slice_features: Features of a slice that are pooled and predicted: the averages of the encoder's
            last four stages and its embedding, each of length 1, side by side (stages), as published; or
            its embedding alone (last).
        pooling: Way from slices to a volume's embedding: deformable (attention), attention, or mean, with
            which no slice can be predicted from others: it needs weights 1 1 0.
        prototypes: Numbers of clusters, intra and inter; 0 takes a tenth of the items that the data have
            to show, within 8 and 3000.
        temperature: Divisor of the similarities to the clusters before the softmax.
        epsilon: Softness of swav's assignments; lower is harder. At the paper's 0.05 small batches stay at
            the loss of equal assignments, the logarithm of the number of clusters.
        iterations: Iterations of swav's assignments (3 in the paper) or of deepcluster_v2's k-means (10 in
            the paper); 0 takes the paper's.
        queue: Number of earlier pairs that swav's assignments are balanced over beside the batch; of use
            for batches smaller than the number of clusters, once features change slowly.
        queue_from: Share of the training after which the queue is used.
        freeze: Share of the training in which swav's prototypes stay as they began.
        clusterings: Number of deepcluster_v2's clusterings, each from its own start; they take the banks
            of the two views in turn.
        mask_share: Share of a volume's slices that are masked: share ~ U(low, high), and one slice at
            least.
        masks: Place of the masked slices: one block in each view (block), or scattered over the slices and
            the same in both views (scattered), as released, where more of them have neighbours that are
            seen.
        target: Embeddings that masked slices are predicted as: the encoder's own without gradient
            (detach), or those of a moving average of the encoder (ema).
        momentum: Momentum of the moving average of the encoder, where target is ema.
        hidden: Width of the hidden layer of the 2D projection head.
        out: Length of a 2D projection.
        head_norm: Norm of the 2D projection head: layer or none.
        width: Length of a slice token and of a volume's embedding.
        layers: Layers of the aggregator, which pools slices.
        heads: Heads of the aggregator's attention.
        downsample: Slices per key of the deformable attention.
        offset_scale: Largest offset of the deformable attention, in distances between keys.
        position_bias: Whether the attention has a bias of the distance between slice and key.
        dropout: Dropout rate of the aggregator.
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
    slice_features: Literal["stages", "last"] = added_option("stages", before="last")
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
    masks: Literal["block", "scattered"] = "block"
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
    position_bias: bool = added_option(True, before=False)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: A value cannot be used; the message names the field.
        """
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
        if len(self.prototypes) != 2 or any(n < 0 or n == 1 for n in self.prototypes):
            raise ValueError(f"prototypes needs two numbers, 0 (automatic) or above 1: {self.prototypes}")
        self._check_weights()
        check_in_plane(self.torchio)
        self.aggregator(1)  # checks its own fields

    def _check_weights(self) -> None:
        if len(self.weights) != 3 or min(self.weights) < 0 or not any(self.weights):
            raise ValueError(f"weights needs three numbers, 0 or more, one above 0, not {self.weights}")
        if self.pooling == "mean" and self.weights[2]:
            raise ValueError("weights must end in 0 with pooling mean, in which no slice sees another")
        if self.stages == "joint":
            return
        shares = self.stage_shares
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"stage_shares needs three shares that sum to 1, not {shares}")
        order = (self.weights[0], self.weights[2], self.weights[1])
        if any(share and not weight for share, weight in zip(shares, order, strict=True)):
            raise ValueError(f"stage_shares {shares} gives steps to a loss of weight 0: {self.weights}")

    def aggregator(self, features: int) -> AggregatorConfig:
        """Return the options of the aggregator for slices of so many features."""
        return AggregatorConfig(
            features,
            width=self.width,
            pooling=self.pooling,
            layers=self.layers,
            heads=self.heads,
            hidden=2 * self.width,
            downsample=self.downsample,
            offset_scale=self.offset_scale,
            position_bias=self.position_bias,
            dropout=self.dropout,
            slices=self.slices,
            slab=self.slab,
            axis=self.axis,
            plane=self.plane,
            slice_features=self.slice_features,
        )

    def weights_at(self, progress: float) -> tuple[float, float, float]:
        """Return the losses' weights (intra, inter, masked) at a share of the training, 0 to 1."""
        intra, inter, masked = self.weights
        if self.stages == "joint":
            return intra, inter, masked
        first, second, _ = self.stage_shares
        if progress < first:
            return intra, 0.0, 0.0
        return (0.0, 0.0, masked) if progress < first + second - 1e-9 else (0.0, inter, 0.0)

    @property
    def freezes(self) -> bool:
        """Whether one of the stages keeps the encoder as it is."""
        return self.stages == "staged" and self.stage_shares[1] > 0

    def frozen_at(self, progress: float) -> bool:
        """Tell whether the encoder stays as it is at a share of the training, 0 to 1."""
        return self.freezes and not any(self.weights_at(progress)[:2])


class IntraInter(Proxy):
    """The network must work out what kind of slice, and of volume, it sees, and what hidden slices show.

    Nguyen, Nguyen, Mai, Cao, Nguyen, Ho, Swoboda, Albarqouni, Xie, Sonntag: Joint Self-Supervised
    Image-Volume Representation Learning with Intra-Inter Contrastive Clustering, AAAI 2023
    (arXiv:2212.01893).

    2D images and slices of volumes pass through the shared encoder. *Intra*: both views of a slice or an
    image belong to the same cluster. A slice's features are the averages of the encoder's last four stages
    and its embedding, each scaled to length 1, side by side; a deformable attention along the slices, with
    a continuous bias of their distances, makes them one embedding of the volume. *Inter*: both views of a
    volume belong to the same cluster. *Masked*: some slices' tokens are replaced by a learned one, and the
    slices' features are predicted from the rest.

    Differs from the paper: the three losses are joined unless asked for in stages, so that one run does;
    the masked loss is on masked slices only, whose targets have no gradient and are standardised over the
    batch, since a joint loss would be least with all slices alike; a view's masked slices are one block,
    since most scattered ones have seen neighbours on both sides (`masks scattered` is the paper's way);
    slices are drawn anew in each step, and augmented in plane; prototypes scale with the data instead of
    3000; the aggregator is small; every slice is augmented on its own by the views of all contrastive
    proxies, since what slices share of an augmentation is a short cut to masked ones, where the paper gives
    each view of a volume one transform of torchio (`augmentation volume` and `torchio`). A volume gives 8
    slices of 64 x 64 where there it gives 64 of 128 x 128, 10 to 30 % of them masked where there 10 % are;
    an epsilon of 0.03 and prototypes that learn from the first step, since batches are small (there 0.05,
    and still for 313 steps); two clusterings by k-means, one for each view (there three); layer norm in the
    head of slices, since images and volumes make batches of any mixture. The recipe is that of the other
    proxies here, so that they compare: AdamW and some hundred steps, instead of SGD with LARS (LARC, rate
    0.01, weight decay 1e-6) for 105 epochs in 2D and twice 100 in 3D.

    Differs from the released code: attention runs along the slices (there along the features), as
    `SliceAggregator` says in full; the projection of the tokens is trained and saved; predicted are the
    features before it, not what a random projection leaves of them; the error is a mean over masked
    slices, where there that over all is divided by the number of masked ones; views are drawn anew in each
    epoch, where a cache there keeps the first ones; and the entries of the memory bank of several data
    sets do not collide. Pooling by plain attention or the mean is for ablation.

    In the frozen stage of `stages` staged the encoder keeps its parameters exactly, so no other proxy can
    learn on it meanwhile, and norms use the statistics that they have; its weights are held once more.
    That does not work with sharded parameters (FSDP).
    """

    Config = IntraInterConfig
    paper: ClassVar[str] = (
        "Nguyen, Nguyen, Mai, Cao, Nguyen, Ho, Swoboda, Albarqouni, Xie, Sonntag: Joint Self-Supervised "
        "Image-Volume Representation Learning with Intra-Inter Contrastive Clustering, AAAI 2023"
    )
    main: ClassVar[str] = "kappa"
    mixed: ClassVar[bool] = True  # images and volumes share assignments
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 16, "lr": 2e-3}

    aggregator: SliceAggregator | None
    teacher: Encoder | None
    intra: PairClustering | None
    inter: PairClustering | None
    progress: Tensor
    kept: Tensor

    def __init__(self, config: IntraInterConfig, encoder: Encoder) -> None:
        """Add the aggregator, the clusterings, and the decoder of masked slices.

        Raises:
            UsageError: Slabs are too thin for the encoder's kernels.
        """
        super().__init__(config, encoder)
        check_slab(encoder, config.slab)
        _, inter, masked = config.weights
        self.aggregator = self.teacher = None
        features = encoder.embed_dim if config.slice_features == "last" else stage_width(encoder)
        if inter or masked:
            self.aggregator = SliceAggregator(config.aggregator(features))
        if masked:
            self.mask_token = nn.Parameter(torch.randn(config.width) * 0.02)
            self.decoder = nn.Linear(config.width, features)
            if config.target == "ema":
                self.teacher = momentum_teacher(encoder)
        self._add_clusterings([], [])
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        if config.freezes:
            self.register_buffer("kept", flat_parameters(encoder))  # the frozen stage may be the first

    def _add_clusterings(self, places: Sequence[int], volumes: Sequence[int]) -> None:
        config, features = self.config, self.encoder.embed_dim
        self.intra = self.inter = None
        if config.weights[0]:
            head = projection_head(
                features, config.hidden, config.out, norm=config.head_norm, norm_last=False
            )
            self.intra = self._clustering(config.out, config.prototypes[0], places, head)
        if config.weights[1]:
            # As released, without a head: what is clustered is the volume's embedding.
            self.inter = self._clustering(config.width, config.prototypes[1], volumes)

    def _clustering(
        self, features: int, count: int, codes: Sequence[int], head: nn.Module | None = None
    ) -> PairClustering:
        config = self.config
        if config.clustering == "swav":
            balance = (config.epsilon, config.iterations or 3, config.queue)
            return BalancedClustering(features, count, len(codes), head, config.temperature, *balance)
        means = (config.clusterings, config.iterations or 10)
        return KMeansClustering(features, count, codes, head, config.temperature, *means)

    def setup(self, data: Collection) -> None:
        """Size clusterings and memory banks by the data: places along volumes, images, and volumes.

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
            asked = "stages staged" if staged else "weights " + " ".join(f"{w:g}" for w in config.weights)
            raise DataError(
                f"intra_inter with {asked} needs stacks of slices, and none of the {len(data)} volumes to "
                f"train on has two slabs of {config.slab} along {config.axis}: add volumes, or take "
                + ("stages joint" if staged and config.weights[0] else "weights 1 0 0")
            )
        self._add_clusterings(places, volumes)

    def travels(self) -> Mapping[str, nn.Module]:
        """Hand on the aggregator, which pools a volume's slices: `--pool aggregator`."""
        return {} if self.aggregator is None else {"aggregator": self.aggregator}

    def train(self, mode: bool = True) -> IntraInter:
        """Set the mode of all parts but the moving average of the encoder, which always evaluates."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @classmethod
    def draw(cls, config: IntraInterConfig, volume: Volume, rng: np.random.Generator) -> Group:
        """Cut `slices` (V, S, C, slab, h, w) in their order; V is 2 where torchio alters each view.

        `places` (S,) are their relative places, 0 to 1, and `spacing` (3,) is in mm, slices laid flat.

        Raises:
            DataError: The volume has no foreground.
        """
        image = volume.shape[1] == 1
        axis, slab = (0, 1) if image else ("DHW".index(config.axis), config.slab)
        starts, places = draw_stack(volume, axis, config.slices, slab, rng, config.stack, config.step_mm)
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

    def forward(self, batch: Group | list[Group], rng: BatchRng | list[BatchRng]) -> StepOutput:
        """Augment and encode all slices and images at once, then cluster, aggregate and predict."""
        config = self.config
        groups = [batch] if isinstance(batch, dict) else batch
        rngs = [rng] if isinstance(rng, BatchRng) else rng
        progress = read_number(self.progress)
        intra, inter, masked = config.weights_at(progress)
        how = (progress < config.freeze, progress >= config.queue_from)
        stacks = self._embed(groups, rngs)
        seen = stacks.embedded if self.intra is not None and intra else stacks.features
        loss = torch.stack([e.float().sum() for e in seen]).sum() * 0
        metrics: dict[str, Tensor] = {}
        picture = Picture(stacks.views[stacks.longest])
        if self.intra is not None and intra:
            clustered = self.intra(*slice_rows(config, groups, stacks.embedded), *how)
            loss = loss + intra * clustered.loss
            metrics |= clustered.metrics("intra")
            picture.slices = clustered.chosen[stacks.shown_slices]
        # All ranks know whether any of them has a volume.
        there = (inter or masked) and stacks.has_volumes()
        if self.inter is not None and inter and there:
            clustered = self.inter(*self._volumes(stacks, picture), *how)
            loss = loss + inter * clustered.loss
            metrics |= clustered.metrics("inter")
            picture.volume = clustered.chosen[stacks.shown_volume]
        if masked and there:
            error, measured = self._masked(stacks, picture)
            loss = loss + masked * error
            metrics |= measured
            self._refresh_bank(stacks)
        kappas = [metrics[name] for name in ("intra_kappa", "inter_kappa") if name in metrics]
        metrics["kappa"] = torch.stack(kappas).mean() if kappas else loss.new_zeros(())
        return StepOutput(loss, {k: v.detach() for k, v in metrics.items()}, picture.draw)

    def start_epoch(self, epoch: int, loader: Any) -> None:
        """Cluster the memory banks anew, filled before the first epoch."""
        levels = self._levels()
        banked = {name: level for name, level in levels.items() if isinstance(level, KMeansClustering)}
        if banked and epoch == 0:
            self._fill(loader, banked)
        for level in banked.values():
            level.cluster(epoch)

    def after_step(self, step: int, total: int) -> None:
        """Keep a frozen encoder as it was, update clusters and the moving average, note the time."""
        config, before = self.config, read_number(self.progress)
        now = (step + 1) / max(total, 1)
        if config.frozen_at(before):
            restore_parameters(self.encoder, self.kept)  # from the optimizer's momentum and weight decay
        elif config.frozen_at(now):
            self.kept.copy_(flat_parameters(self.encoder))
        write_number(self.progress, now)
        for level in self._levels().values():
            level.after_step(step, stage_begins=config.weights_at(now) != config.weights_at(before))
        if self.teacher is not None:
            follow(self.teacher, self.encoder, config.momentum)

    def _levels(self) -> dict[str, PairClustering]:
        levels = {"intra": self.intra, "inter": self.inter}
        return {name: level for name, level in levels.items() if level is not None}

    def _embed(self, groups: list[Group], rngs: list[BatchRng]) -> Stacks:
        """Augment the groups of a batch and embed their slices, without gradient where frozen."""
        views = [augment_stack(self.config, group, each) for group, each in zip(groups, rngs, strict=True)]
        if not self.config.frozen_at(read_number(self.progress)):
            return Stacks(groups, rngs, views, *self._encode(self.encoder, views))
        with torch.no_grad(), evaluating(self.encoder):
            return Stacks(groups, rngs, views, *self._encode(self.encoder, views))

    def _encode(self, encoder: Encoder, views: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Embed slices, and compute the features of which volumes are pooled."""
        stages = self.config.slice_features == "stages" and self.aggregator is not None
        return encode(encoder, views, stages)

    def _aggregate(self, features: Tensor, details: list[Attended] | None = None) -> Tensor:
        """Pool features of slices (B, 2, S, F) to embeddings of volumes (B, 2, E)."""
        assert self.aggregator is not None  # there is one wherever volumes count
        pooled: Tensor = self.aggregator(features.flatten(0, 1), details=details)[1]
        return pooled.unflatten(0, features.shape[:2])

    def _volumes(self, stacks: Stacks, picture: Picture | None = None) -> tuple[Tensor, Tensor]:
        """Pool the volumes of a batch: embeddings (R, 2, E) and codes (R,)."""
        pooled, codes = [], []
        for n in stacks.volumes:
            details = picture.details if picture is not None and n == stacks.longest else None
            pooled.append(self._aggregate(stacks.features[n], details))
            codes.append(stacks.groups[n]["index"])
        rows = _joined(pooled, (2, self.config.width), stacks.features[0])
        return rows, _joined(codes, (), stacks.groups[0]["index"])

    # Masked slices ------------------------------------------------------------------------------------

    def _masked(self, stacks: Stacks, picture: Picture) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict the features of masked slices: the error over all ranks' masked slices, and metrics."""
        like = stacks.features[0]
        with torch.no_grad():
            known = stacks.features if self.teacher is None else self._encode(self.teacher, stacks.views)[1]
        targets = standardise([known[n] for n in stacks.volumes], like)
        sums: list[Tensor] = []
        offsets: list[Tensor] = []
        for n, target in zip(stacks.volumes, targets, strict=True):
            mask = self._mask(stacks.rngs[n], target.shape[2])
            details: list[Attended] = []
            tokens = stacks.features[n].flatten(0, 1)
            sums.append(self._masked_errors(tokens, target.flatten(0, 1), mask, details))
            offsets.append(attended_offset(details))
            if n == stacks.longest:
                picture.mask = mask[:2]
                picture.details = picture.details or details
        own = torch.stack(sums).sum(0) if sums else like.new_zeros(4, dtype=torch.float32)
        every = gather(own.detach()[None]).sum(0)
        # A sum over own slices, scaled so that the mean over ranks is that of the global batch.
        error = own[0] * world_size() / every[3].clamp_min(1)
        metrics = {
            "masked_error": every[0] / every[3].clamp_min(1),
            "masked_vs_mean": every[0] / every[1].clamp_min(1e-12),
            "masked_vs_neighbours": every[0] / every[2].clamp_min(1e-12),
        }
        if offsets and self.config.pooling == "deformable":
            metrics["offset"] = torch.stack(offsets).mean()
        return error, metrics

    def _mask(self, rng: BatchRng, count: int) -> Tensor:
        """Choose the masked slices of both views of each stack of `count` slices, (2 B, count)."""
        share = self.config.mask_share
        if self.config.masks == "block":
            return mask_block(ViewRng(rng, 2), count, share)
        return mask_scattered(ViewRng(rng, 2, shared=True), count, share)

    def _masked_errors(
        self, tokens: Tensor, target: Tensor, mask: Tensor, details: list[Attended]
    ) -> Tensor:
        """Sum squared errors over masked slices (R, S): of the prediction, the mean and the neighbours.

        Returns:
            The three sums, and the number of masked slices, (4,).
        """
        assert self.aggregator is not None  # masked slices need one
        with torch.autocast(tokens.device.type, enabled=False):
            projected = self.aggregator.project(tokens.float())
            hidden = torch.where(mask.unsqueeze(2), self.mask_token, projected)
            attended, _ = self.aggregator.attend(hidden, details=details)
            guesses = (self.decoder(attended), torch.zeros_like(target), interpolate_masked(target, mask))
            errors = [(guess - target).square().mean(2) for guess in guesses]
            return torch.stack([(error * mask).sum() for error in errors] + [mask.sum().float()])

    # Memory banks -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _refresh_bank(self, stacks: Stacks) -> None:
        """Keep the bank of volumes fresh in the stage before the one that clusters them."""
        staged = self.config.stages == "staged" and self.training
        if staged and isinstance(self.inter, KMeansClustering):
            rows, codes = self._volumes(stacks)
            self.inter.bank.write(codes, rows)

    @torch.no_grad()
    def _fill(self, loader: Any, levels: Mapping[str, KMeansClustering]) -> None:
        """Write every volume and image into the memory banks; each rank embeds its share."""
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in levels}
        with evaluating(self):
            for group in (group for groups in loader for group in groups):
                own = {name: shard(value) for name, value in group.items()}
                if not len(own["index"]):
                    continue
                embedded, features = self._encode(self.encoder, [plain_stack(self.config, own)])
                if "intra" in levels:
                    slices, codes = slice_rows(self.config, [own], embedded)
                    rows["intra"].append((levels["intra"].project(slices), codes))
                if "inter" in levels and embedded[0].shape[2] > 1:
                    rows["inter"].append((self._aggregate(features[0]), own["index"]))
        for name, level in levels.items():
            bank = level.bank
            written = _joined([f for f, _ in rows[name]], (2, bank.features.shape[2]), bank.features)
            bank.write(_joined([c for _, c in rows[name]], (), bank.codes), written)


# Stacks of slices ----------------------------------------------------------------------------------


@dataclass
class Stacks:
    """Stacks of slices of a batch, in groups of equal shape; an image is a stack of one slice.

    Attributes:
        groups: Examples of each group, as they were drawn.
        rngs: Generator of each group.
        views: Augmented slices of each group, (B, 2, S, C, slab, h, w).
        embedded: Embeddings of those slices, (B, 2, S, F).
        features: Features of those slices that are pooled and predicted, (B, 2, S, F').
    """

    groups: Sequence[Group]
    rngs: Sequence[BatchRng]
    views: Sequence[Tensor]
    embedded: Sequence[Tensor]
    features: Sequence[Tensor]

    @property
    def longest(self) -> int:
        """Number of the group with the longest stacks, whose first one is shown."""
        return max(range(len(self.views)), key=lambda n: self.views[n].shape[2])

    @property
    def volumes(self) -> list[int]:
        """Numbers of the groups that have volumes, not images."""
        return [n for n, each in enumerate(self.embedded) if each.shape[2] > 1]

    def has_volumes(self) -> bool:
        """Tell whether any rank has a volume; every rank must call it."""
        own = sum(len(self.embedded[n]) for n in self.volumes)
        return any(row_counts(own, self.embedded[0].device))

    @property
    def shown_slices(self) -> slice:
        """Rows of the shown stack among the slices of all groups."""
        before = sum(e.shape[0] * e.shape[2] for e in self.embedded[: self.longest])
        return slice(before, before + self.views[self.longest].shape[2])

    @property
    def shown_volume(self) -> slice:
        """Row of the shown stack among the volumes of all groups."""
        before = sum(len(self.embedded[n]) for n in self.volumes if n < self.longest)
        return slice(before, before + 1)


def augment_stack(config: IntraInterConfig, batch: Group, rng: BatchRng) -> Tensor:
    """Augment two views of every stack of a group: (B, 2, S, C, slab, h, w)."""
    x = batch["slices"].expand(-1, 2, *batch["slices"].shape[2:])
    examples, _, count, channels, slab = x.shape[:5]
    size = (slab, *config.plane)
    if config.augmentation == "volume":
        # Slices as channels: one geometry per view of a volume, contrast by slice.
        flat, rows = x.flatten(2, 3).flatten(0, 1), 2
    else:
        flat, rows = x.flatten(0, 2), 2 * count
    spacing = batch["spacing"].repeat_interleave(rows, 0)
    flat = augment(config, flat, ViewRng(rng, rows), size, spacing, axes=(1, 2))
    return flat.reshape(examples, 2, count, channels, *size)


def plain_stack(config: IntraInterConfig, batch: Group) -> Tensor:
    """Crop both views of every stack of a group without augmentation: (B, 2, S, C, slab, h, w)."""
    x = batch["slices"].expand(-1, 2, *batch["slices"].shape[2:])
    return centre_crop(x.flatten(0, 2), (x.shape[4], *config.plane)).unflatten(0, x.shape[:3])


def encode(
    encoder: Encoder, views: Sequence[Tensor], stages: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Embed stacks (B, 2, S, C, slab, h, w) to (B, 2, S, F), equal slabs of all groups in one batch.

    So norms see slices and images of all data sets together.

    Returns:
        Embeddings, and features of the encoder's stages beside them; the embeddings again without `stages`.
    """
    embeddings: dict[int, Tensor] = {}
    features: dict[int, Tensor] = {}
    for shape in sorted({tuple(x.shape[3:]) for x in views}):
        same = [n for n, x in enumerate(views) if tuple(x.shape[3:]) == shape]
        rows = [views[n].flatten(0, 2) for n in same]
        if stages:
            maps = encoder(torch.cat(rows))
            both = encoder.pool(maps), stage_features(encoder, maps)
        else:
            both = (encoder.embed(torch.cat(rows)),) * 2
        for by_group, joined in zip((embeddings, features), both, strict=True):
            for n, part in zip(same, joined.split([len(row) for row in rows]), strict=True):
                by_group[n] = part.unflatten(0, views[n].shape[:3])
    return [embeddings[n] for n in range(len(views))], [features[n] for n in range(len(views))]


def slice_rows(
    config: IntraInterConfig, groups: Sequence[Group], embedded: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Join the slices of all groups: embeddings (R, 2, F), and codes (R,) in the 2D bank.

    The bank knows as many places along each volume as slices are drawn.
    """
    codes = []
    for group in groups:
        places = group["places"]
        if places.shape[1] == 1:
            places = torch.zeros_like(places)
        number = (places * config.slices).long().clamp(0, config.slices - 1)
        codes.append((group["index"].unsqueeze(1) * config.slices + number).flatten())
    return torch.cat([e.transpose(1, 2).flatten(0, 1) for e in embedded]), torch.cat(codes)


def _joined(parts: Sequence[Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else like.new_zeros(0, *shape)


# Picture -------------------------------------------------------------------------------------------


class Picture:
    """First of a batch's longest stacks, with its clusters, mask and attention, to be drawn.

    Args:
        views: Slices of the group, (B, 2, S, C, slab, h, w).

    Attributes:
        slices: 2D clusters of both views of its slices, (S, 2).
        volume: 3D clusters of its views, (1, 2).
        mask: Masked slices of its views, (2, S).
        details: Places that the aggregator attended to, layer by layer.
    """

    def __init__(self, views: Tensor) -> None:
        self.views = views
        self.slices: Tensor | None = None
        self.volume: Tensor | None = None
        self.mask: Tensor | None = None
        self.details: list[Attended] = []

    def draw(self) -> Figure:
        """Draw the slices of both views with their clusters, masked ones framed, and the attention."""
        from matplotlib.figure import Figure

        count = self.views.shape[2]
        wide = max(count, 4)
        figure = Figure(
            figsize=(1.15 * wide + 0.4, 3.0 + (2.4 if self.details else 0)), layout="constrained"
        )
        grid = figure.add_gridspec(4 if self.details else 2, wide)
        self._draw_slices([[figure.add_subplot(grid[v, n]) for n in range(count)] for v in range(2)])
        if self.volume is not None and len(self.volume):
            a, b = self.volume[0].tolist()
            figure.suptitle(
                f"volume: cluster {a}" if a == b else f"volume: clusters {a} and {b}",
                fontsize=9,
                color="green" if a == b else "red",
            )
        if self.details:
            self._draw_attention(figure.add_subplot(grid[2:, : wide // 2]))
            self._draw_offsets(figure.add_subplot(grid[2:, wide // 2 :]))
        return figure

    def _draw_slices(self, panels: Sequence[Sequence[Any]]) -> None:
        images = self.views[0, :, :, 0, self.views.shape[4] // 2].detach().float().cpu().numpy()
        low, high = float(images.min()), float(images.max())
        clusters = None if self.slices is None else self.slices.tolist()
        for view, row in enumerate(panels):
            row[0].set_ylabel(f"view {'ab'[view]}", fontsize=8)
            for n, panel in enumerate(row):
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

    def _draw_attention(self, panel: Any) -> None:
        attention = self.details[-1].attention[0].mean(0).float().cpu().numpy()
        panel.imshow(attention, cmap="viridis", vmin=0, aspect="auto")
        panel.set_xlabel("key", fontsize=8)
        panel.set_ylabel("slice", fontsize=8)
        panel.set_title("attention, last layer", fontsize=8)

    def _draw_offsets(self, panel: Any) -> None:
        for n, layer in enumerate(self.details):
            places, offsets = layer.places[0].float().cpu(), layer.offsets[0].float().cpu()
            for head, (ends, moved) in enumerate(zip(places.tolist(), offsets.tolist(), strict=True)):
                height = n + (head + 0.5) / len(places)
                for end, by in zip(ends, moved, strict=True):
                    panel.plot([end - by, end], [height, height], color="tab:red", linewidth=1)
                panel.plot(ends, [height] * len(ends), "k.", markersize=3)
        panel.set_xlabel("slice", fontsize=8)
        panel.set_ylabel("layer", fontsize=8)
        panel.set_title("where heads look, and how far that was moved", fontsize=8)
