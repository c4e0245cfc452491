"""Fine-tuning for segmentation: training on patches, prediction by windows; also from few slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

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
from ssl3d_benchmarks.finetune.segmentation.config import SegmentationConfig
from ssl3d_benchmarks.finetune.segmentation.data import (
    Annotation,
    annotate,
    class_indices,
    class_table,
    mask_values,
    place_patch,
    refuse_regions,
)
from ssl3d_benchmarks.finetune.segmentation.plan import fingerprint, plan_by_rule
from ssl3d_benchmarks.finetune.segmentation.windows import WindowNetwork, padded, within_volume
from ssl3d_benchmarks.subject_scores import class_statistics, subject_scores
from ssl3d_benchmarks.task import ignored_values

if TYPE_CHECKING:
    from ssl3d.api import BatchRng, Collection, Encoder, Volume

Array = NDArray[Any]

IGNORE = -1
MEASURES = ("dice", "hd95", "surface_dice")
KEPT_BYTES = 500_000_000
"""Bytes of shrunk volumes, for the coarse stage, that each process keeps in memory."""
ATLAS = (48, 48, 48)
"""Cells of the average mask along D H W."""


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
        start, extent = padded(box, size)
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
