"""Fine-tuning for segmentation: training on patches, prediction by windows; also from few slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl3d.api import (
    CoarseToFine,
    DataError,
    MaskPrediction,
    Portable,
    SegmentationNetwork,
    Views,
    augment_labelled,
    best_class,
    class_values,
    dice_ce_loss,
    expanded,
    find_region,
    fit_size,
    mask_scores,
    metric_name,
    predict_slabs,
    recorded_metric,
    save_segmentation,
    segmentation_head,
    shrunk,
    shrunk_mask,
    statistics,
    view_margin,
)
from ssl3d_benchmarks.finetune.protocol import FinetuneTask, file_name, median_and_worst, patch_within
from ssl3d_benchmarks.finetune.segmentation.data import (
    SLAB,
    Annotation,
    annotate,
    class_indices,
    class_table,
    mask_values,
    place_patch,
    refuse_regions,
)
from ssl3d_benchmarks.finetune.segmentation.plan import fingerprint, plan_by_rule
from ssl3d_benchmarks.subject_scores import class_statistics, subject_scores
from ssl3d_benchmarks.task import ignored_values

if TYPE_CHECKING:
    from ssl3d.api import BatchRng, Collection, Encoder, Volume

Array = NDArray[Any]
Triple = tuple[int, int, int]

IGNORE = -1
MEASURES = ("dice", "hd95", "surface_dice")
KEPT_BYTES = 500_000_000
"""Bytes of shrunk volumes, for the coarse stage, that each process keeps in memory."""
ATLAS = (48, 48, 48)
"""Cells of the average mask along D H W."""


@dataclass
class SegmentationConfig(Views):
    """Options of segmentation; those of augmentation act on image and mask alike.

    Attributes:
        head: Decoder on the encoder: unet (U-shaped, with a skip of the input at full resolution), med3d
            (transposed convolutions on the deepest map), denseaspp (dilated convolutions) or linear
            (1x1x1, for frozen encoders).
        init: Weights that the unet head starts from: new; or pretrained, those of the decoder that came
            with each encoder, all but the layers of the classes, for a head of its width and norm.
            Networks from scratch start from new ones.
        width: Channels of the head at half resolution, planned if not given: 16, or more for many classes;
            32 gives med3d its 256 and 128 channels.
        head_norm: Normalisation in the head: batch, group or instance; group learns several times slower.
        deep_supervision: Whether the coarser steps of the unet head are trained too; the finer steps then
            refine their predictions.
        patch: Size D H W of training crops and prediction windows, voxels; no larger than the largest
            volume, and planned from shapes and spacing if not given.
        slicewise: Whether to segment slice by slice, with the encoder as a 2D network (crops of depth 1);
            planned if not given: where voxels are more than 3 times as long along D as in the plane.
        oversample: Share of the crops that are centred on a voxel of a class, each class with equal
            probability.
        axes: Axes 0 to 2 (D H W) along which crops are turned, rotated, stretched and shifted; if not
            given, all but those with long voxels or few of them.
        flip_axes: Axes along which crops are mirrored, with probability `flip`, and predictions with
            `mirror`; if not given, those of `axes` along which no class lies on a fixed side of another or
            of the volume: mirrored along H, the anterior and posterior hippocampus had a Dice of 0.3 after
            120 steps, else 0.8.
        classes: Mask values that count, 0 first; found in the masks if not given. Others are background.
        ignore: Mask value of voxels without an annotation, left out of the loss and of every score; -1 if
            there is none, and by default nnU-Net's `ignore` of each data set.
        sparse_slices: Number of annotated slices per volume, chosen along D once per volume; 0 for all.
            Training and the choice of the step see these alone; test subjects are scored on all slices.
        sparse_choice: Choice of the annotated slices: random (among those with objects) or equidistant; the
            slices of a smaller number are among those of a larger one.
        sparse_seed: Seed of the choice of slices, beside the name of the volume.
        batch_dice: Whether the soft Dice is taken over the whole batch, not averaged over its crops;
            planned if not given: over the batch for slices and for patches that show less than a quarter of
            a volume.
        dice_background: Whether background counts in the soft Dice.
        ce_weight: Weight of the cross-entropy in the loss.
        dice_weight: Weight of the soft Dice in the loss.
        overlap: Share of a prediction window that the next one covers too.
        windows: Number of windows predicted at a time.
        mirror: Whether to average predictions over copies mirrored along `flip_axes`: 8 times the work for
            three axes.
        tolerance: Tolerance of the surface Dice, mm; 0 for 1 mm, or the largest voxel side if that is more.
        metric: Metrics of your own beside Dice, FILE.py:FUNCTION.
        stages: Number of stages; with 2, a coarse network finds the region in the shrunk volume, and a
            fine one segments it.
        coarse: Size D H W of the shrunk volume for the coarse stage, voxels.
        margin: Margin m on each side of the region, as a share of its sides, in prediction; U(0, 2 m) in
            training.
    """

    head: Literal["unet", "med3d", "denseaspp", "linear"] = "unet"
    init: Literal["new", "pretrained"] = "new"
    width: int | None = None
    head_norm: Literal["batch", "group", "instance"] = "instance"
    deep_supervision: bool = True
    patch: tuple[int, int, int] | None = None
    slicewise: bool | None = None
    oversample: float = 1 / 3
    axes: tuple[int, ...] | None = None
    flip_axes: tuple[int, ...] | None = None
    classes: tuple[int, ...] = ()
    ignore: int | None = None
    sparse_slices: int = 0
    sparse_choice: Literal["random", "equidistant"] = "random"
    sparse_seed: int = 0
    batch_dice: bool | None = None
    dice_background: bool = False
    ce_weight: float = 1.0
    dice_weight: float = 1.0
    overlap: float = 0.5
    windows: int = 4
    mirror: bool = False
    tolerance: float = 0.0
    metric: tuple[str, ...] = ()
    stages: Literal[1, 2] = 1
    coarse: tuple[int, int, int] = (32, 32, 32)
    margin: float = 0.15
    chance: float = 0.3
    rotate: float = 20.0
    scale: float = 0.25
    contrast: float = 0.2
    noise: float = 0.1
    low_resolution: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        for name in ("patch", "coarse"):
            size = getattr(self, name)
            if size is not None and (len(size) != 3 or min(size) < 1):
                raise ValueError(f"{name} needs three sizes D H W of at least 1, not {size}")
        for name, least in (("width", 2), ("windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is too small: {value}")
        if not 0 <= self.oversample <= 1:
            raise ValueError(f"oversample is a share, 0 to 1, not {self.oversample:g}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, not {self.overlap:g}")
        for name in ("axes", "flip_axes"):
            if any(axis not in (0, 1, 2) for axis in getattr(self, name) or ()):
                raise ValueError(f"{name} are 0, 1 and 2 for D, H and W, not {getattr(self, name)}")
        for name in ("sparse_slices", "ce_weight", "dice_weight", "tolerance", "margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name):g}")
        if self.ce_weight + self.dice_weight == 0:
            raise ValueError("ce_weight and dice_weight are both 0: there is no loss")
        if self.classes and (self.classes[0] != 0 or len(set(self.classes)) < 2 or min(self.classes) < 0):
            raise ValueError(f"classes begin with 0, the background, and name another: not {self.classes}")
        if self.ignore in self.classes:
            raise ValueError(f"ignore: {self.ignore} is one of the classes {self.classes} too")
        if self.torchio:
            raise ValueError("torchio: its transforms do not move masks here; use the other augmentations")
        if self.init == "pretrained" and self.head != "unet":
            raise ValueError(
                f"init pretrained needs head unet, whose weights decoders have, not {self.head}"
            )
        if self.slicewise and self.stages == 2:
            raise ValueError("slicewise: a coarse stage finds regions of volumes, not of slices")


class WindowNetwork(nn.Module):
    """Network of one window, from its voxels to the probabilities of the classes.

    Args:
        network: Network whose first output is logits (B, K, D, H, W).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Compute the probabilities (B, K, D, H, W) of windows (B, C, D, H, W)."""
        logits: Tensor = self.network(x)[0]
        return logits.float().softmax(dim=1)


class Segmentation(FinetuneTask):
    """Segmentation of volumes from masks: every voxel gets a class.

    Patch, slices or volumes, the axes of augmentation, batch and length follow from the training volumes by
    rule (`ssl3d_benchmarks.finetune.segmentation.plan`), where they are not given. Training sees crops, a
    third of them on objects, augmented with their masks; the loss is cross-entropy plus soft Dice.
    Overlapping windows predict a volume. Scores are means over a subject's volumes, per class and over
    classes: Dice, the 95th percentile of the surface distance in mm, surface Dice; they are taken on the
    stored grid. `ssl3d.segmentation.metrics` defines them for empty masks.

    The trivial row *average mask* predicts each voxel from its relative place in the training masks alone.
    """

    Config = SegmentationConfig
    name = "segmentation"
    # The windows of versions 2 to 4 blended almost evenly near their faces. Version 3 was that of few
    # annotated slices, version 4 that of crops of depth 1. Version 6 plans from the data what was fixed.
    version = 6
    description = "every voxel gets a class; Dice, HD95 and surface Dice per class and subject"
    reference = (
        "Isensee et al.: nnU-Net, Nature Methods 2021 (patches, oversampling, windows); "
        "Chen, Ma, Zheng: Med3D, arXiv 1904.00625 (decoder, coarse to fine); "
        "Nikolov et al., arXiv 1809.04430 (surface Dice)"
    )
    mains: ClassVar[Mapping[str, str]] = {"masks": "dice"}
    recipe: ClassVar[Mapping[str, Any]] = {
        "lr": 2e-3,
        "optimizer": "adamw",
        "warmup": 0.05,
        "clip": 5.0,
        "ema": 0.1,
        "eval_at": (0.25, 0.5, 0.75, 1.0),
        "precision": "bf16",
    }
    planned: ClassVar[tuple[str, ...]] = ("steps", "batch_size")
    repeats_volumes: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "low-label": {"steps": 500, "batch_size": 4},
        "med3d-lung": {
            "lr": 1e-3,
            "lr_scratch": 1e-2,
            "optimizer": "adam",
            "weight_decay": 0.0,
            "segmentation.head": "med3d",
            "segmentation.width": 32,
        },
        "med3d-liver": {
            "segmentation.head": "denseaspp",
            "segmentation.width": 32,
            "segmentation.stages": 2,
        },
    }
    trivial: ClassVar[tuple[str, ...]] = ("average mask",)
    floors: ClassVar[Mapping[str, str | float]] = {"masks": "average mask"}

    config: SegmentationConfig
    _ignored: Mapping[str, int] = {}

    def __init__(self, config: SegmentationConfig, data: Collection) -> None:
        """Read every mask once: its classes, its slices and the places of its objects."""
        self.config, self.target = config, "masks"
        self._ignored = ignored_values(data) if config.ignore is None else {}
        ignore = self._ignored if config.ignore is None else config.ignore
        if not config.classes:
            refuse_regions(data)
        values = config.classes or mask_values(data, ignore, tell=True)
        if config.classes:
            _check_classes(config.classes, data, ignore)
        self.values: tuple[int, ...] = tuple(int(value) for value in values)
        self.names = tuple(str(value) for value in self.values)
        self.annotations: dict[int, Annotation] = {volume.index: self._annotate(volume) for volume in data}
        self._given, self._shapes = config, np.asarray(data.shapes)
        self.plan(data)
        self._slices = {
            f"{volume.dataset}/{volume.id}": slices.tolist()
            for volume in data
            if (slices := self.annotations[volume.index].slices) is not None
        }
        self._shrunk: dict[int, tuple[Tensor, Tensor]] = {}

    def plan(self, train: Collection) -> Mapping[str, tuple[Any, str]]:
        """Settle the options that were not given, and the patch, from volumes to learn from."""
        data = fingerprint(train, self.annotations, self.names)
        planned = plan_by_rule(data, dataclasses.asdict(self._given))
        self.config = c = dataclasses.replace(self._given, **planned.config)
        assert c.patch is not None
        self.patch = patch_within((1, *c.patch[1:]) if c.slicewise else c.patch, self._shapes)
        self.reasons = planned.lines
        return planned.training

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes along which crops are turned and stretched, as given or planned."""
        return self.config.axes or ()

    @property
    def flip_axes(self) -> tuple[int, ...]:
        """Axes along which crops are mirrored, as given or planned."""
        return self.config.flip_axes or ()

    def _table(self, volume: Volume) -> Array:
        """Return the table from mask values to class indices, by what the volume's data set ignores."""
        ignore = self.config.ignore
        return class_table(self.values, self._ignored.get(volume.dataset, -1) if ignore is None else ignore)

    def _annotate(self, volume: Volume) -> Annotation:
        c = self.config
        return annotate(volume, self._table(volume), c.sparse_slices, c.sparse_choice, c.sparse_seed)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out shrunk volumes, which each process makes again."""
        return {**self.__dict__, "_shrunk": {}}

    @classmethod
    def known(cls, config: SegmentationConfig, data: Collection) -> NDArray[np.bool_]:
        """Return a mask (N,) of the volumes that have one."""
        masked = np.asarray(data.has_mask, dtype=bool)
        if not masked.any():
            raise DataError(
                f"none of the {len(data)} volumes has a mask; give masks in a column `mask` of a CSV, "
                "by `ssl3d prepare --masks seg` (label maps beside their scans, seg in their names), or "
                "as a folder in MSD or nnU-Net layout"
            )
        return masked

    def settings(self) -> dict[str, Any]:
        """Return the options, resolved, and the annotated slices of each volume where there are few."""
        own = {**dataclasses.asdict(self.config), "classes": list(self.values), "patch": list(self.patch)}
        del own["init"]  # the contestant's own: arms with and without a decoder stand in one table
        own["ignore"] = -1 if self.config.ignore is None else self.config.ignore
        if self._ignored:
            own["ignored"] = self._ignored
        # Records of before these options stand in one table with those of today, and are found again.
        if not own["low_resolution"]:
            del own["low_resolution"]
        if metrics := own.pop("metric"):
            own["metric"] = [recorded_metric(metric) for metric in metrics]
        if self._slices:
            own["annotated"] = self._slices
        return own

    def annotated_slices(self, volume: Volume) -> Array:
        """Return the slices along D on which a volume is annotated for training."""
        slices = self.annotations[volume.index].slices
        return np.arange(volume.shape[1]) if slices is None else slices

    def kinds(self, data: Collection) -> list[dict[str, Any]]:
        """Return mask value and name of each class; names are those that came with the data."""
        known = {"0": "background"}
        for settings in data.settings:
            for names in (settings.get("mask_labels") or {}).values():
                known |= {str(value): str(name) for value, name in names.items()}
        return [{"value": value, "name": known.get(str(value), str(value))} for value in self.values]

    @property
    def can_flip(self) -> bool:  # type: ignore[override]
        """Permission to average predictions over mirrored volumes, where training mirrored them too."""
        return self.config.flip > 0 and bool(self.flip_axes)

    @classmethod
    def restore(
        cls, settings: Mapping[str, Any], target: str, kept: Mapping[str, Any], encoder: Encoder
    ) -> tuple[Segmentation, nn.Module]:
        """Restore the task and its network from a card."""
        task = cls.scorer(settings, target)
        assert isinstance(task, cls)
        assert task.config.patch is not None
        task.values, task.patch = task.config.classes, task.config.patch
        return task, task.model(encoder, None)

    # Training -------------------------------------------------------------------------------------

    def model(self, encoder: Encoder, train: Collection | None) -> nn.Module:
        """Build encoder and head, and a coarse stage before them if there are two stages."""
        c = self.config
        assert c.width is not None
        head = segmentation_head(
            c.head, encoder, len(self.values), c.width, c.head_norm, c.deep_supervision
        )
        return CoarseToFine(encoder, head) if c.stages == 2 else SegmentationNetwork(encoder, head)

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw a crop `image` (C, d, h, w), with the margin that its augmentation needs, and its `target`.

        Targets are class indices, `IGNORE` outside the volume and on slices that are not annotated.
        """
        annotation = self.annotations[volume.index]
        size = fit_size(volume, self.patch)
        region = None
        example: dict[str, Tensor] = {}
        if self.config.stages == 2:
            image, target = self._coarse(volume)
            example = {"coarse_image": image, "coarse_target": target}
            if annotation.box is not None:
                by = rng.uniform(0, 2 * self.config.margin, 3)
                region = expanded(annotation.box, by.tolist(), volume.shape[1:], (1, 1, 1))
        start = place_patch(volume.shape[1:], size, annotation, self.config.oversample, rng, region)
        margin = view_margin(self.config, size, self.axes)
        begin = [s - m for s, m in zip(start, margin, strict=True)]
        extent = [n + 2 * m for n, m in zip(size, margin, strict=True)]
        example["image"] = volume.read(begin, extent)
        example["target"] = torch.from_numpy(self._target(volume, begin, extent))
        example["spacing"] = torch.tensor(volume.spacing, dtype=torch.float32)
        return example

    def _target(self, volume: Volume, start: Sequence[int], size: Sequence[int]) -> Array:
        """Read the class indices of a crop, int16."""
        target = class_indices(self._table(volume), volume.read_mask(start, size).numpy())
        for axis, (begin, length, limit) in enumerate(zip(start, size, volume.shape[1:], strict=True)):
            inside = np.arange(begin, begin + length)
            outside = (inside < 0) | (inside >= limit)
            slices = self.annotations[volume.index].slices
            if axis == 0 and slices is not None:
                outside |= ~np.isin(inside, slices)
            target[(slice(None),) * axis + (outside,)] = IGNORE
        return target

    def _coarse(self, volume: Volume) -> tuple[Tensor, Tensor]:
        """Return the whole volume and its target (0, 1, IGNORE), shrunk; each process reads it once."""
        if volume.index in self._shrunk:
            return self._shrunk[volume.index]
        size = fit_size(volume, self.config.coarse)
        image = shrunk(volume.read(), size)
        target = torch.from_numpy(self._target(volume, (0, 0, 0), volume.shape[1:]))
        coarse = torch.where(shrunk_mask(target != IGNORE, size), 0, IGNORE).to(torch.int16)
        coarse[shrunk_mask(target > 0, size)] = 1
        if len(self._shrunk) * (image.nbytes + coarse.nbytes) < KEPT_BYTES:
            self._shrunk[volume.index] = (image, coarse)
        return image, coarse

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], rng: BatchRng
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute cross-entropy and soft Dice of augmented crops, and add that of the coarse stage."""
        image, target, spacing = batch["image"], batch["target"], batch["spacing"]
        total, values = self._one_loss(model, image, target, rng, self.patch, spacing)
        if self.config.stages == 2:
            image, target = batch["coarse_image"], batch["coarse_target"]
            assert isinstance(model, CoarseToFine)
            coarse, parts = self._one_loss(model.coarse, image, target, rng, self.config.coarse, None)
            total = total + coarse
            values |= {f"coarse_{name}": value for name, value in parts.items()}
        return total, values

    def _one_loss(
        self,
        model: nn.Module,
        image: Tensor,
        target: Tensor,
        rng: BatchRng,
        size: Sequence[int],
        spacing: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        c, size = self.config, fit_size(image, size)
        # The views would mirror along all of `axes`, so their own flip is off.
        views = dataclasses.replace(c, flip=0.0)
        x, moved = augment_labelled(views, image, target, rng, size, spacing, self.axes)
        x, truth = _mirrored(x, moved.long(), rng.chance(c.flip, 3), self.flip_axes)
        logits = model(x)
        shares = [0.5**n for n in range(len(logits))]
        weights = (c.ce_weight, c.dice_weight)
        total, values = image.new_zeros(()), dict[str, Tensor]()
        for n, level in enumerate(logits):
            loss, parts = dice_ce_loss(level, truth, bool(c.batch_dice), c.dice_background, weights)
            total = total + shares[n] / sum(shares) * loss
            values = values or dict(parts)
        values["dice"] = _batch_dice(logits[0].detach(), truth)
        return total, values

    # Prediction -----------------------------------------------------------------------------------

    def labels(self, model: nn.Module, volume: Volume) -> Array:
        """Predict the class indices of a volume, (D, H, W) int16, on the stored grid."""
        labels, _ = self._labels(model, volume)
        return labels

    def _labels(self, model: nn.Module, volume: Volume) -> tuple[Array, tuple[int, ...] | None]:
        """Predict class indices; also return the region that the coarse stage found."""
        slabs, region = self._slabs(model, volume)
        return np.concatenate([best_class(slab).cpu().numpy() for slab in slabs]), region

    def infer(self, model: nn.Module, volume: Volume, flip: bool = False) -> MaskPrediction:
        """Predict the probabilities of the classes of every voxel, slab by slab."""
        depth, height, width = volume.shape[1:]
        slabs, _ = self._slabs(model, volume, flip)
        return MaskPrediction(self.values, self.names, (depth, height, width), slabs)

    def _slabs(
        self, model: nn.Module, volume: Volume, flip: bool = False
    ) -> tuple[Iterator[Tensor], tuple[int, ...] | None]:
        """Predict slabs of probabilities; also return the region that the coarse stage found."""
        c, shape = self.config, volume.shape[1:]
        device = next(model.parameters()).device
        size = fit_size(volume, self.patch)
        region: tuple[int, ...] | None = None
        box: tuple[int, ...] = (0, 0, 0, *shape)
        if c.stages == 2:
            assert isinstance(model, CoarseToFine)
            whole = volume.read().to(device)
            box = region = find_region(model.coarse, whole, fit_size(whole, c.coarse), c.margin, size)
        start, extent = _padded(box, size)
        slabs = predict_slabs(
            WindowNetwork(model),
            lambda first, depth: volume.read((start[0] + first, *start[1:]), (depth, *extent[1:])),
            extent,
            size,
            c.overlap,
            c.windows,
            self.flip_axes if c.mirror or flip else (),
            device,
        )
        return within_volume(slabs, start, shape), region

    def portable(self, model: nn.Module) -> Portable | None:
        """Return the network of one window, whose output is the classes' probabilities."""
        if self.config.stages == 2:
            return None
        return Portable(WindowNetwork(model), ("probabilities",), self.patch, fixed=True)

    def predict(self, model: nn.Module, volume: Volume) -> dict[str, Any]:
        """Predict a volume and return Dice, HD95, surface Dice and voxel counts by class."""
        labels, region = self._labels(model, volume)
        row = self._scored(labels, volume)
        if region is not None:
            row["region"] = list(region)
        return row

    def predict_for_choosing(self, model: nn.Module, data: Collection) -> list[dict[str, Any]]:
        """Score by the annotated slices alone: an annotator of few has no others to choose a step by."""
        return [
            self._scored(self.labels(model, volume), volume, self.annotations[volume.index].slices)
            for volume in data
        ]

    def _scored(self, labels: Array, volume: Volume, slices: Array | None = None) -> dict[str, Any]:
        truth = class_indices(self._table(volume), volume.read_mask().numpy())
        if slices is not None:
            labels, truth = labels[slices], truth[slices]
        labels = np.where(truth == IGNORE, IGNORE, labels)
        own = tuple(map(metric_name, self.config.metric))
        row: dict[str, Any] = {measure: {} for measure in (*MEASURES, *own, "voxels")}
        for k, name in enumerate(self.names):
            if k == 0:
                continue
            predicted, true = labels == k, truth == k
            scores = mask_scores(predicted, true, volume.spacing, self.config.tolerance or None)
            for measure in MEASURES:
                row[measure][name] = getattr(scores, measure)
            for metric, value in class_values(self.config.metric, predicted, true, volume.spacing).items():
                row[metric][name] = value
            row["voxels"][name] = [int(predicted.sum()), int(true.sum())]
        return row

    def score_functions(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, statistics.Statistic]]:
        """Return `dice`, `hd95` (mm, lower is better) and `surface_dice`, over classes and by class.

        The clusters are subjects; several volumes of one count as their mean.
        """
        functions: dict[str, statistics.Statistic] = {}
        clusters: Array = np.zeros(0)
        names = self.names[1:]
        for measure in (*MEASURES, *map(metric_name, self.config.metric)):
            clusters, table = subject_scores(predictions, names, measure)
            functions |= class_statistics(table, names if len(names) > 1 else (), measure)
        return clusters, functions

    def predict_trivial(
        self, name: str, train: Collection, val: Collection, test: Collection, seed: int
    ) -> list[dict[str, Any]]:
        """Predict the average of the annotated training masks, each stretched to the volume."""
        if name != "average mask":
            raise NotImplementedError(name)
        counts = torch.zeros(len(self.values), *ATLAS)
        for volume in train:
            target = torch.from_numpy(self._target(volume, (0, 0, 0), volume.shape[1:])).long()
            known = (target != IGNORE).float()
            one_hot = torch.nn.functional.one_hot(target.clamp(min=0), len(self.values)).movedim(-1, 0)
            counts += shrunk(one_hot * known, ATLAS)
        share = counts / counts.sum(dim=0, keepdim=True).clamp(min=1e-6)
        share[0] += (counts.sum(dim=0) == 0).float()  # places without any annotation
        rows = []
        for volume in test:
            here = torch.nn.functional.interpolate(share[None], volume.shape[1:], mode="trilinear")[0]
            row = self._scored(here.argmax(dim=0).numpy(), volume)
            row |= {"dataset": volume.dataset, "subject": volume.subject, "id": volume.id}
            rows.append(row)
        return rows

    def save_prediction(self, model: nn.Module, volume: Volume, folder: Path) -> Path | None:
        """Write mask values as NIfTI on the scan's own grid.

        Where the store does not know that grid, the file is on the stored grid and says so in its name:
        `..._stored_grid.nii.gz`.
        """
        values = np.array(self.values)[self.labels(model, volume)]
        name = file_name(volume)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.nii.gz"
        if not save_segmentation(volume.record, values, path):
            path = path.replace(folder / f"{name}_stored_grid.nii.gz")
        return path

    def picture(self, model: nn.Module, data: Collection, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Draw slices through the objects of the volumes with the median and the worst mean Dice."""
        from ssl3d.api import palette
        from ssl3d_benchmarks.finetune.segmentation.pictures import segmentation_picture

        each = [[value for value in row["dice"].values() if value is not None] for row in rows]
        chosen = median_and_worst([fmean(own) if own else float("nan") for own in each])
        shown = [data[k] for _, k in chosen]
        predicted = [self.labels(model, volume) for volume in shown]
        truth = [class_indices(self._table(volume), volume.read_mask().numpy()) for volume in shown]
        titles = palette.class_titles(data, self.names)
        return segmentation_picture(shown, truth, predicted, titles, [words for words, _ in chosen])


def _check_classes(classes: Sequence[int], data: Collection, ignore: int | Mapping[str, int]) -> None:
    """Raise a DataError for a class that no mask has."""
    there = mask_values(data, ignore)
    absent = sorted(set(classes) - set(there))
    if absent:
        raise DataError(
            f"--segmentation.classes {' '.join(map(str, classes))}: none of the {len(data)} masks "
            f"has the value {' or '.join(map(str, absent))}; they have {' '.join(map(str, there))}"
        )


def within_volume(slabs: Iterator[Tensor], start: Sequence[int], shape: Sequence[int]) -> Iterator[Tensor]:
    """Turn the slabs of a region into those of its volume, which is background elsewhere.

    Args:
        slabs: Probabilities (K, d, h, w) of the region, from its first slice to its last.
        start: First voxel of the region; may lie outside the volume.
        shape: Shape (D, H, W) of the volume.
    """
    at, done, classes = start[0], 0, 1
    for slab in slabs:
        classes, depth = slab.shape[:2]
        first, end = max(at, 0), min(at + depth, shape[0])
        if end > first:
            yield from _background(classes, first - done, shape, slab)
            inner = slab[:, first - at : end - at]
            if tuple(start[1:]) != (0, 0) or inner.shape[2:] != tuple(shape[1:]):
                inner = _placed(inner, start, shape)
            yield inner
            done = end
        at += depth
        last = slab
    yield from _background(classes, shape[0] - done, shape, last)


def _background(classes: int, depth: int, shape: Sequence[int], like: Tensor) -> Iterator[Tensor]:
    """Yield slices of background, few at a time."""
    for first in range(0, depth, SLAB):
        slab = like.new_zeros(classes, min(SLAB, depth - first), *shape[1:])
        slab[0] = 1
        yield slab


def _placed(slab: Tensor, start: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Put a slab (K, d, h, w) at its rows and columns of the volume."""
    whole = slab.new_zeros(*slab.shape[:2], *shape[1:])
    whole[0] = 1
    pairs = list(zip(start[1:], slab.shape[2:], shape[1:], strict=True))
    here = tuple(slice(max(s, 0), min(s + n, limit)) for s, n, limit in pairs)
    there = tuple(slice(cut.start - s, cut.stop - s) for cut, (s, _, _) in zip(here, pairs, strict=True))
    whole[(slice(None), slice(None), *here)] = slab[(slice(None), slice(None), *there)]
    return whole


def _padded(box: Sequence[int], size: Triple) -> tuple[list[int], list[int]]:
    """Return start and size of the crop that is read for a box; a smaller box lies in its middle."""
    start, extent = [], []
    for axis in range(3):
        length = box[axis + 3] - box[axis]
        short = max(size[axis] - length, 0)
        start.append(box[axis] - short // 2)
        extent.append(length + short)
    return start, extent


def _mirrored(x: Tensor, target: Tensor, chosen: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mirror images (B, C, D, H, W) and targets (B, D, H, W) along the `axes` that are `chosen` (B, 3)."""
    for axis in axes:
        flags = chosen[:, axis].view(-1, 1, 1, 1)
        x = torch.where(flags.unsqueeze(1), x.flip(axis + 2), x)
        target = torch.where(flags, target.flip(axis + 1), target)
    return x, target


def _batch_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Average the Dice over the classes that the batch has, for the log."""
    known = target != IGNORE
    best, predicted = logits[:, 0], torch.zeros_like(target)
    for k in range(1, logits.shape[1]):  # argmax over a strided axis takes a tenth of a step on the CPU
        predicted = torch.where(logits[:, k] > best, k, predicted)
        best = torch.maximum(best, logits[:, k])
    values = []
    for k in range(1, logits.shape[1]):
        here, true = (predicted == k) & known, target == k
        size = here.sum() + true.sum()
        values.append(torch.where(true.any(), 2 * (here & true).sum() / size.clamp(min=1), torch.nan))
    return torch.stack(values).nanmean().nan_to_num(0.0)
