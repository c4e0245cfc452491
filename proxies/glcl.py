"""Global and local contrast: parts of aligned volumes for the encoder, regions for the decoder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ssl3d.api import (
    BatchRng,
    DataError,
    Encoder,
    Proxy,
    Relations,
    SlabViews,
    StepOutput,
    UsageError,
    ViewRng,
    augment,
    check_slab,
    draw_slabs,
    evaluating,
    gather,
    intensities,
    local_contrast,
    movements,
    pair_picture,
    projection_head,
    read_number,
    region_places,
    regions_at,
    restoring_decoder,
    row_counts,
    set_contrast,
    travelling,
    write_number,
)

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.api import Volume

_REGION = 3  # side of a local region, in cells of the decoder's map


@dataclass
class GLCLConfig(SlabViews):
    """Options of global and local contrast.

    Attributes:
        partitions: Number of parts that every volume is cut into along the axis; each gives one slice.
        across: Whether slices of one partition of all volumes are positives (published as G^D), or only
            left out of the negatives, so that the two views of a slice are the positives (G^D-).
        schedule: Order of the losses: stages trains the encoder by the global one and then the decoder by
            the local one, with the encoder fixed, as published; joint trains both by both at once.
        global_share: Share of the steps that train the encoder, with schedule stages.
        local_weight: Weight of the local loss beside the global one, with schedule joint.
        local_across: Whether regions at one place in the same partition of other volumes are positives too
            (published as L^D), or those of the two views of a slice alone (L^R).
        negatives: Number of the nearest of the 13 regions, none overlapping it, that are a region's
            negatives.
        local_stride: Stride in plane of the decoder's map that regions of 3 x 3 cells are taken from;
            finer steps of the decoder stay as they began.
        temperature: Divisor of the cosine similarities before the softmax.
        width: Channels of the decoder at half resolution.
        hidden: Width of the hidden layer of the global projection head.
        out: Length of a projection.
        head_norm: Norm of the projection heads: batch, layer or none.
    """

    flip: float = 0.0
    partitions: int = 4
    across: bool = True
    schedule: Literal["stages", "joint"] = "stages"
    global_share: float = 0.5
    local_weight: float = 1.0
    local_across: bool = False
    negatives: int = 5
    local_stride: int = 4
    temperature: float = 0.1
    width: int = 16
    hidden: int = 512
    out: int = 128
    head_norm: Literal["batch", "layer", "none"] = "batch"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if not 0 <= self.global_share <= 1:
            raise ValueError(f"global_share is a share, 0 to 1, not {self.global_share:g}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature:g}")
        if not 0 <= self.local_weight < float("inf"):
            raise ValueError(f"local_weight must be 0 or more, not {self.local_weight:g}")
        for name in ("partitions", "width", "negatives", "local_stride", "hidden", "out"):
            least = 2 if name in ("partitions", "width") else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


class GLCL(Proxy):
    """The network must work out which part of the body a slice shows, and which place a region of it.

    Chaitanya, Erdil, Karani, Konukoglu: Contrastive learning of global and local features for medical image
    segmentation with limited annotations, NeurIPS 2020 (arXiv:2006.10511).

    Volumes are cut into equal parts along the axis. Global loss: the views of slices of one part are
    positives, those of other parts negatives. Local loss: 3 x 3 regions at 13 places of a decoder's map,
    each of which has the same region under another change of grey values as its positive, and other regions
    of both maps as negatives. The encoder is trained first, then the decoder on the fixed encoder.
    Temperature, parts, places and sizes of the regions, the local heads and, but for constant factors, the
    losses are those of the released code. The decoder is the U-Net head of segmentation, travels with the
    encoder and can start that head.

    Differs from it: the global head is on the encoder's embedding, 512 wide and with batch norm, where
    there it is on the flattened map, 1024 wide and without norm, since the embedding is what is used later;
    grey values change in every way of the contrastive proxies' views, where there only brightness and
    contrast do; two augmented views of each slice, where there the slice itself is a third; of G^D all
    pairs of a part are positives, where there each slice has four pairs; a region's negatives are the
    nearest of the 13 that do not overlap it, where there a table lists them; slices are slabs, laid flat,
    through a 3D encoder, and the decoder's map is averaged over the depth; whole slices are shrunk to the
    crop and turned and zoomed, where there boxes are cut out and resized; nothing is mirrored; AdamW. In
    the second stage the fixed encoder runs in eval mode; it gets no gradient, but the optimizer's momentum
    and weight decay go on.

    Volumes must lie alike, and show about the same part of the body.

    In a small trial (cardiac cine MR, crops of 64, 120 steps, one seed) the local task was solved within a
    dozen steps. The FLOPs of a run count steps as its first one; the decoder's take about 1.3 times that.

    `accuracy` is the share of views whose nearest view of another subject is of the same part, `chance`
    what guessing would reach; `local_accuracy` the share of regions that are nearer to their positive than
    to each of their negatives.
    """

    Config = GLCLConfig
    paper: ClassVar[str] = (
        "Chaitanya, Erdil, Karani, Konukoglu: Contrastive learning of global and local features for "
        "medical image segmentation with limited annotations, NeurIPS 2020"
    )
    main: ClassVar[str] = "accuracy"
    mixed: ClassVar[bool] = True  # slices of all shapes are each other's positives and negatives
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 16, "lr": 1e-3}

    local_stage: Tensor
    negatives: Tensor

    def __init__(self, config: GLCLConfig, encoder: Encoder) -> None:
        """Add the decoder and the projection heads.

        Raises:
            UsageError: Slabs are too thin for the encoder's kernels, no map of the decoder is as coarse as
                `local_stride`, or it has no room for so many regions.
        """
        super().__init__(config, encoder)
        check_slab(encoder, config.slab)
        unet: Any = restoring_decoder("unet", encoder, config.width)
        self.decoder = unet
        coarse = [n for n, stride in enumerate(unet.path) if max(stride[1:]) >= config.local_stride]
        if not coarse:
            raise UsageError(
                f"glcl.local_stride is {config.local_stride}, the decoder's coarsest map has stride "
                f"{max(unet.path[0][1:])}: choose that or less"
            )
        self._steps = coarse[-1] + 1
        stride = unet.path[coarse[-1]][1:]
        sides = [-(-n // s) for n, s in zip(config.crop, stride, strict=True)]
        self.places, negatives = region_places((sides[0], sides[1]), _REGION, config.negatives)
        self.register_buffer("negatives", negatives, persistent=False)
        self.register_buffer("local_stage", torch.tensor(config.schedule == "joint"))
        # Steps that are not trained get no gradient; `out` has the classes' place.
        unused = [unet.out, *unet.mixes[self._steps :], *unet.convs[self._steps :]]
        if self._steps < len(unet.path) and unet.stem is not None:
            unused.append(unet.stem)
        for module in unused:
            module.requires_grad_(False)
        norm, width = config.head_norm, int(unet.convs[coarse[-1]].weight.shape[0])
        self.head = projection_head(encoder.embed_dim, config.hidden, config.out, norm=norm)
        self.voxel_head = projection_head(width, width, width, norm=norm, norm_last=False, bias_last=False)
        self.region_head = nn.Linear(_REGION**2 * width, config.out, bias=False)

    @classmethod
    def draw(cls, config: GLCLConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Cut one slab of each part: `slabs` (S, C, slab, height, width), and `spacing` (3,).

        Raises:
            DataError: The volume has fewer slabs along the axis than parts, or no foreground.
        """
        length = volume.shape[1 + "DHW".index(config.axis)]
        room = length - config.slab + 1
        if room < config.partitions:
            raise DataError(
                f"{volume.id}: {length} slices along {config.axis} hold {max(room, 0)} slabs, and each of "
                f"{config.partitions} parts needs one: choose fewer (--glcl.partitions)"
            )
        edges = [part * room // config.partitions for part in range(config.partitions + 1)]
        starts = [int(rng.integers(a, b)) for a, b in itertools.pairwise(edges)]
        return draw_slabs(config, volume, starts, rng)

    def travels(self) -> dict[str, nn.Module]:
        """Send the decoder along with the encoder, to start a segmentation head."""
        return travelling(self.decoder)

    def after_step(self, step: int, total: int) -> None:
        """Begin the stage of the decoder when its time has come."""
        if self.config.schedule == "stages" and step >= self.config.global_share * total:
            write_number(self.local_stage, True)

    def forward(
        self, batch: dict[str, Tensor] | list[dict[str, Tensor]], rng: BatchRng | list[BatchRng]
    ) -> StepOutput:
        """Compute the loss of this stage, global or local, or both."""
        config = self.config
        groups = [batch] if isinstance(batch, dict) else batch
        rngs = [rng] if isinstance(rng, BatchRng) else rng
        keys = torch.cat([self._keys(group) for group in groups])
        local, joint = bool(read_number(self.local_stage)), config.schedule == "joint"
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if joint or not local:
            views = [self._views(group, each) for group, each in zip(groups, rngs, strict=True)]
            embeddings = torch.cat([self.encoder.embed(x.flatten(0, 1)) for x in views])
            loss, projected = self._global(embeddings, keys, metrics)
            losses.append(loss)
        if local:
            alike = [self._recoloured(group, each) for group, each in zip(groups, rngs, strict=True)]
            if joint:
                maps = [self.encoder(x.flatten(0, 1)) for x in alike]
            else:
                views = alike
                with torch.no_grad(), evaluating(self.encoder):
                    maps = [self.encoder(x.flatten(0, 1)) for x in alike]
                    embeddings = torch.cat([self.encoder.pool(each) for each in maps])
                    _, projected = self._global(embeddings, keys, metrics)
            regions = torch.cat([self._regions(x, each) for x, each in zip(alike, maps, strict=True)])
            contrast = self._local(regions, keys)
            metrics |= {"local_loss": contrast.loss.detach(), "local_accuracy": contrast.accuracy}
            losses.append(contrast.loss * (config.local_weight if joint else 1))
        shown, pairs = views[0], projected.detach().unflatten(0, (-1, 2))
        return StepOutput(
            torch.stack(losses).sum(), metrics, lambda: pair_picture(shown, pairs[: len(shown)])
        )

    def _global(
        self, embeddings: Tensor, keys: Tensor, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute the global loss and the projections of the views, and add its metrics."""
        projected = self.head(embeddings)
        keys = keys.repeat_interleave(2, 0)
        contrast = set_contrast(projected, keys, self._relate, self.config.temperature, rivals=False)
        metrics |= {"accuracy": contrast.accuracy, "chance": contrast.chance}
        metrics["global_loss"] = contrast.loss.detach()
        return contrast.loss, projected

    def _relate(self, own: Tensor, other: Tensor) -> Relations:
        """Compare views by part, volume and subject."""
        part, volume, person = (own[:, None, n] == other[:, n] for n in range(3))
        return Relations(part if self.config.across else part & volume, ~part, ~person)

    def _keys(self, group: dict[str, Tensor]) -> Tensor:
        """Return part, volume and subject of every slab, (B x S, 3)."""
        parts = self.config.partitions
        part = torch.arange(parts, device=group["index"].device).repeat(len(group["index"]))
        rest = [group[name].repeat_interleave(parts) for name in ("index", "subject")]
        return torch.stack([part, *rest], 1).float()

    def _views(self, group: dict[str, Tensor], rng: BatchRng) -> Tensor:
        """Augment every slab twice: (B x S, 2, C, slab, height, width)."""
        config, slabs = self.config, group["slabs"]
        count = 2 * slabs.shape[1]
        x = slabs.flatten(0, 1).repeat_interleave(2, 0)
        spacing = group["spacing"].repeat_interleave(count, 0)
        x = augment(config, x, ViewRng(rng, count), config.size, spacing, axes=(1, 2))
        return x.unflatten(0, (-1, 2))

    def _recoloured(self, group: dict[str, Tensor], rng: BatchRng) -> Tensor:
        """Move every slab once, and change its grey values twice: (B x S, 2, C, slab, height, width)."""
        config, slabs = self.config, group["slabs"]
        count = slabs.shape[1]
        spacing = group["spacing"].repeat_interleave(count, 0)
        x = slabs.flatten(0, 1)
        x = augment(movements(config), x, ViewRng(rng, count), config.size, spacing, axes=(1, 2))
        x, spacing = x.repeat_interleave(2, 0), spacing.repeat_interleave(2, 0)
        x = augment(intensities(config), x, ViewRng(rng, 2 * count), config.size, spacing, axes=(1, 2))
        return x.unflatten(0, (-1, 2))

    def _regions(self, views: Tensor, maps: list[Tensor]) -> Tensor:
        """Decode the maps of views and project their regions: (B x S, 2, 13, out)."""
        *_, y = itertools.islice(self.decoder.steps(views.flatten(0, 1), maps), self._steps)
        voxels = regions_at(y.mean(2), self.places, _REGION)  # (N, 13, 9, C)
        projected = self.voxel_head(voxels.flatten(0, 2)).view_as(voxels)
        return self.region_head(projected.flatten(2)).unflatten(0, (-1, 2))

    def _local(self, regions: Tensor, keys: Tensor) -> Any:
        """Compare the regions of both views of a slice, and of others of its part where asked."""
        a, b = regions.unbind(1)
        if self.config.local_across:
            counts = row_counts(len(regions), regions.device)
            everything, others = gather(regions, counts), gather(keys, counts)
            same = (keys[:, None, 0] == others[:, 0]) & (keys[:, None, 1] != others[:, 1])
            own, other = same.nonzero(as_tuple=True)
            pairs = [(v, w) for v in (0, 1) for w in (0, 1)]
            a = torch.cat([a, *(regions[own, v] for v, _ in pairs)])
            b = torch.cat([b, *(everything[other, w] for _, w in pairs)])
        return local_contrast(a, b, self.negatives, self.config.temperature)
