"""Two views of one place: what joint-embedding proxies draw and augment."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from ssl3d.distributed import world_size
from ssl3d.encoder import Encoder
from ssl3d.errors import UsageError
from ssl3d.rng import BatchRng
from ssl3d.views.compose import ViewRng, Views, augment, view_margin
from ssl3d.views.crops import (
    AXES,
    Triple,
    draw_crop,
    draw_overlapping,
    draw_positions,
    fit_size,
    lay_flat,
    neighbour_position,
    read_crop,
    slab_size,
)
from ssl3d.views.outside import apply_torchio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.data.store.volume import Volume


@dataclasses.dataclass
class PairViews(Views):
    """Options of proxies that compare two views of one place.

    Volumes lie in a known orientation, and which way is up is something to know: no flips by default.
    The other strengths are lower than those of `Views`, because a pair meets them twice.

    Attributes:
        views: Content of a pair: two overlapping crops (volumes), or a slice twice or two slices close
            to each other (slices). Images (D = 1) give crops in both cases.
        per_volume: Number of pairs drawn from each volume; they are one subject's.
        crop: Size of the crops along D H W, in voxels, where views are volumes; images (D = 1) give crops
            of depth 1.
        min_overlap: Least overlap of a pair's crops along each axis, as a share of the crop's side.
        min_iou: Least intersection over union of a pair's crops.
        plane: Size of the slices (height, width) in voxels, where views are slices, and of the crops of
            images.
        slab: Adjacent slices per slab, where views are slices; images have 1. 1 suits the convolution
            kinds acs and 2.5d; 3d and p3d need slabs deeper than the encoder's stride along D.
        axis: Axis that the slices lie across, where views are slices.
        max_distance_mm: Largest distance of a pair's slices in mm, where views are slices; 0 shows the
            same slice twice.
        min_foreground: Least share of foreground in a crop.
    """

    views: Literal["volumes", "slices"] = "volumes"
    per_volume: int = 1
    crop: tuple[int, int, int] = (32, 32, 32)
    flip: float = 0.0
    rotate: float = 10.0
    scale: float = 0.1
    gamma: float = 0.3
    contrast: float = 0.2
    min_overlap: float = 0.75
    min_iou: float = 0.25
    plane: tuple[int, int] = (64, 64)
    slab: int = 1
    axis: Literal["D", "H", "W"] = "D"
    max_distance_mm: float = 0.0
    min_foreground: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges of all fields.

        Raises:
            ValueError: A field is out of range; the message names it.
        """
        super().__post_init__()
        for name, sizes in (("crop", 3), ("plane", 2)):
            value = getattr(self, name)
            if len(value) != sizes or min(value) < 1:
                raise ValueError(f"{name} needs {sizes} sizes of at least 1, not {value}")
        for name in ("per_volume", "slab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("min_overlap", "min_iou", "min_foreground"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, not {getattr(self, name):g}")
        if self.max_distance_mm < 0:
            raise ValueError(f"max_distance_mm must be 0 or more, not {self.max_distance_mm:g}")


def check_slab(encoder: Encoder, slab: int) -> None:
    """Refuse slabs so thin that some taps of the encoder's kernels never see data.

    Args:
        encoder: Encoder that the slabs are for; only kinds 3d and p3d have taps across slices.
        slab: Adjacent slices in a slab.

    Raises:
        UsageError: The slab is no deeper than the encoder's stride along D; the message says what to
            change.
    """
    kind, stride = getattr(encoder.config, "kind", ""), encoder.strides[-1][0]
    if kind in ("3d", "p3d") and slab <= stride:
        raise UsageError(
            f"slab is {slab}, but kernels of kind {kind} at a stride of {stride} along D learn nothing "
            f"off-plane from slabs of fewer than {stride + 1} slices: deepen them, use strides of 1 along "
            "D, or take kind acs"
        )


def check_depth(config: PairViews, encoder: Encoder) -> None:
    """Refuse pairs of slices in slabs too thin for the encoder's kernels, as `check_slab` does.

    Raises:
        UsageError: Views are slices, and their slabs are too thin.
    """
    if config.views == "slices":
        check_slab(encoder, config.slab)


def is_sliced(config: PairViews, volume: Volume) -> bool:
    """Tell whether slices of a volume are shown, not crops: an image (D = 1) is one slice already."""
    return config.views == "slices" and volume.shape[1] > 1


def crop_size(config: PairViews, volume: Volume) -> Triple:
    """Size the crops (D, H, W) of a volume that is not sliced; those of an image have depth 1."""
    return (1, *config.plane) if config.views == "slices" else fit_size(volume, config.crop)


def draw_pairs(config: PairViews, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw `per_volume` pairs of crops from one volume, with the margin that augmentation needs.

    Returns:
        `a` and `b`, (K, C, d, h, w) each, slices laid flat, and their `spacing`, (3,), mm.

    Raises:
        DataError: The volume has no foreground, or no room for so many slabs.
    """
    # torchio runs on what is read, margin and all: its artefacts then turn with the anatomy.
    if is_sliced(config, volume):
        pairs, spacing = _slices(config, volume, rng), lay_flat(volume.spacing, AXES.index(config.axis))
    else:
        pairs, spacing = _crops(config, volume, rng), volume.spacing
    a, b = ([apply_torchio(config.torchio, x, rng) for x in side] for side in zip(*pairs, strict=True))
    return {"a": torch.stack(a), "b": torch.stack(b), "spacing": torch.tensor(spacing, dtype=torch.float32)}


def augment_pairs(config: PairViews, batch: dict[str, Tensor], rng: BatchRng) -> Tensor:
    """Augment both views of every pair of `draw_pairs`, each on its own: (B x K, 2, C, d, h, w)."""
    x = torch.stack([batch["a"], batch["b"]], dim=2)
    examples, count = x.shape[:2]
    axes, size = _result(config, x)
    spacing = batch["spacing"].repeat_interleave(2 * count, 0)
    # Filling the layout that convolutions like is left to the encoder; rows are views, then pairs.
    x = augment(config, x.flatten(0, 2), ViewRng(rng, 2 * count), size, spacing, axes)
    return x.unflatten(0, (examples * count, 2))


@dataclasses.dataclass
class Embedded:
    """Pairs of a batch, of all its groups.

    Attributes:
        views: Augmented views of each group, (B x K, 2, C, d, h, w).
        embeddings: Embeddings of the R pairs of all groups, (R, 2, E).
        subjects: Codes of the pairs' subjects, (R,).
    """

    views: list[Tensor]
    embeddings: Tensor
    subjects: Tensor


def embed_pairs(
    config: PairViews,
    encoder: Encoder,
    batch: dict[str, Tensor] | list[dict[str, Tensor]],
    rng: BatchRng | list[BatchRng],
    least: int = 1,
) -> Embedded:
    """Augment and embed both views of every pair of a batch, mixed or of one group.

    Args:
        config: Options of the views.
        encoder: Encoder that embeds the views.
        batch: Pairs of `draw_pairs`, stacked, of one group or several.
        rng: Generator of each group.
        least: Number of pairs, over all ranks, that a loss needs to compare; fewer are refused while
            training.

    Raises:
        UsageError: There are fewer pairs than `least`, while training.
    """
    groups = [batch] if isinstance(batch, dict) else batch
    rngs = [rng] if isinstance(rng, BatchRng) else rng
    if encoder.training:
        check_pairs(config, sum(len(group["a"]) for group in groups) * config.per_volume, least)
    views = [augment_pairs(config, group, each) for group, each in zip(groups, rngs, strict=True)]
    embeddings = [encoder.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in views]
    subjects = [group["subject"].repeat_interleave(group["a"].shape[1], 0) for group in groups]
    return Embedded(views, torch.cat(embeddings), torch.cat(subjects))


def check_pairs(config: PairViews, pairs: int, least: int) -> None:
    """Refuse, while training, fewer pairs than a loss needs to compare.

    The parts that a batch is cut into are equally large, in all steps and on all ranks: too small a one is
    found at the first step. Evaluation may end with an odd one.

    Args:
        config: Options of the views.
        pairs: Number of pairs on this rank.
        least: Number of pairs, over all ranks, that the loss needs.

    Raises:
        UsageError: There are fewer.
    """
    volumes = world_size() * pairs // config.per_volume
    if volumes * config.per_volume < least:
        raise UsageError(
            f"a pair is compared with the others of its part of the batch: --batch-size divided by "
            f"--accumulate must be at least {-(-least // config.per_volume)}, not {volumes}; with "
            "--grad-cache, which compares all parts, --batch-size alone"
        )


def pair_picture(views: Tensor, projected: Tensor) -> Figure:
    """Show pairs of views, above and below; the frame says whether the nearest b of each a is its own.

    Args:
        views: Views of the pairs, (B, 2, C, d, h, w).
        projected: Projections of the pairs, (B, 2, F).
    """
    from matplotlib.figure import Figure

    a, b = torch.nn.functional.normalize(projected.detach().float(), dim=2).unbind(1)
    nearest = (a @ b.T).argmax(1).tolist()
    count = min(len(views), 8)
    middle = views[:, :, 0, views.shape[3] // 2].detach().float().cpu().numpy()
    figure = Figure(figsize=(1.4 * count + 0.3, 4.6), layout="constrained")
    panels = figure.subplots(3, count, squeeze=False)
    for i in range(count):
        right = nearest[i] == i
        shown = (
            (f"a{i}", middle[i, 0]),
            (f"b{i}", middle[i, 1]),
            (f"b{nearest[i]}", middle[nearest[i], 1]),
        )
        for row, (name, image) in enumerate(shown):
            panel = panels[row, i]
            panel.imshow(image, cmap="gray")
            colour = "black" if row < 2 else "green" if right else "red"
            panel.set_title(name, fontsize=8, color=colour)
            panel.set_xticks([])
            panel.set_yticks([])
            for side in panel.spines.values():
                side.set_color(colour)
                side.set_linewidth(2 if row == 2 else 0.5)
    for row, name in enumerate(("view a", "view b", "nearest to a")):
        panels[row, 0].set_ylabel(name, fontsize=8)
    return figure


def _result(config: PairViews, x: Tensor) -> tuple[tuple[int, ...], Triple]:
    """Return the axes along which views may move, and the size of a view, from what was read."""
    depth = int(x.shape[-3])
    if config.views == "slices":
        return (1, 2), (depth, *config.plane)
    return (1, 2) if depth == 1 else (0, 1, 2), fit_size(x, config.crop)


def _crops(config: PairViews, volume: Volume, rng: np.random.Generator) -> list[tuple[Tensor, Tensor]]:
    size = crop_size(config, volume)
    margin = view_margin(config, size)
    pairs = []
    for _ in range(config.per_volume):
        a = draw_crop(volume, size, rng, config.min_foreground)
        b = draw_overlapping(
            volume, size, a, rng, config.min_overlap, config.min_iou, config.min_foreground
        )
        pairs.append((read_crop(volume, a, size, margin), read_crop(volume, b, size, margin)))
    return pairs


def _slices(config: PairViews, volume: Volume, rng: np.random.Generator) -> list[tuple[Tensor, Tensor]]:
    axis = AXES.index(config.axis)
    size = slab_size(axis, config.slab, config.plane)
    margin = slab_size(axis, 0, view_margin(config, (config.slab, *config.plane), (1, 2))[1:])
    pairs = []
    for at in draw_positions(volume, axis, config.per_volume, rng, config.slab):
        near = neighbour_position(volume, axis, int(at), rng, config.slab, config.max_distance_mm)
        a = draw_crop(volume, size, rng, config.min_foreground, {axis: int(at)})
        b = draw_overlapping(
            volume,
            size,
            a,
            rng,
            config.min_overlap,
            config.min_iou,
            config.min_foreground,
            fixed={axis: near},
        )
        flat = [read_crop(volume, start, size, margin).movedim(axis + 1, 1) for start in (a, b)]
        pairs.append((flat[0], flat[1]))
    return pairs
