"""Fine-tuning for detection: boxes of objects, scored by FROC and average precision."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssl3d.api import (
    AnchorPlan,
    BoxPrediction,
    BoxViews3d,
    DataError,
    Detections,
    DetectionScores,
    RetinaNet3d,
    RetinaNet3dConfig,
    Truths,
    TwoStage3dConfig,
    TwoStageConfig,
    TwoStageDetector2d,
    TwoStageDetector3d,
    around_mask,
    box_iou,
    draw_boxed3d,
    fit_shapes,
    fit_size,
    move_boxed3d,
    nms,
    numpy_rng,
    plan_anchors,
    statistics,
    weighted_clusters,
    window_starts,
    write_boxes,
)
from ssl3d_benchmarks.finetune.protocol import FinetuneTask, file_name, median_and_worst, patch_within

if TYPE_CHECKING:
    from torch import nn

    from ssl3d.api import BatchRng, Collection, Encoder, Volume

Array = NDArray[Any]
Triple = tuple[int, int, int]

RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
OVERLAPS = (0.1, 0.2, 0.3, 0.4, 0.5)
USUAL = 50
"""Boxes per volume of the row without a network."""


@dataclass
class DetectionConfig(BoxViews3d):
    """Options of detection; those of augmentation act on image and boxes alike.

    Attributes:
        model: Detector: retinanet (one stage, parts of MONAI) or faster-rcnn (two stages), both for volumes
            and images; faster-rcnn-2d (two stages, parts of torchvision) for images.
        boxes: Source of the boxes: stored with the data (phantoms, or prepared from COCO, CSV or MONAI JSON
            lists), or the connected components of the masks.
        one_class: Merging of all classes of objects into one.
        min_voxels: Smallest component of a mask that is an object, voxels.
        patch: Size D H W of training crops and prediction windows, voxels; no larger than the largest
            volume.
        scored_crop: Height and width of the part of each image that is predicted and scored, at a place
            drawn from the image's name; 0 0 for the whole image. For data whose objects lie in the
            middle of every image.
        channels: Number of channels of the feature pyramid and of the heads on it.
        anchors: Number of anchor shapes per place, found from the training boxes (in 3D).
        cells: Approximate number of cells of its pyramid level that an object spans per axis (in 3D).
        overlap: Share of a prediction window that the next one covers too.
        windows: Number of windows predicted at a time.
        merge: Merging of the boxes that several windows predict of one object: nms (the best box is kept)
            or clusters (their weighted mean, as in nnDetection).
        merge_iou: Overlap (IoU) above which two boxes of a class belong to one object.
        least_score: Smallest score of a box that is kept.
        detections: Largest number of boxes per volume.
        froc_iou: Smallest overlap (IoU) with an object that counts as a hit in the FROC scores.
    """

    model: Literal["retinanet", "faster-rcnn", "faster-rcnn-2d"] = "retinanet"
    boxes: Literal["stored", "masks"] = "stored"
    one_class: bool = False
    min_voxels: int = 8
    patch: tuple[int, int, int] = (48, 48, 48)
    scored_crop: tuple[int, int] = (0, 0)
    channels: int = 64
    anchors: int = 3
    cells: float = 2.0
    overlap: float = 0.5
    windows: int = 4
    merge: Literal["nms", "clusters"] = "nms"
    merge_iou: float = 0.2
    least_score: float = 0.01
    detections: int = 100
    froc_iou: float = 0.1

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        for name, known in (
            ("model", ("retinanet", "faster-rcnn", "faster-rcnn-2d")),
            ("boxes", ("stored", "masks")),
            ("merge", ("nms", "clusters")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(known)}")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise ValueError(f"patch needs three sizes D H W of at least 1, not {self.patch}")
        if len(self.scored_crop) != 2 or (min(self.scored_crop) < 1 and tuple(self.scored_crop) != (0, 0)):
            raise ValueError(f"scored_crop needs a height and a width, or 0 0, not {self.scored_crop}")
        for name in ("min_voxels", "channels", "anchors", "windows", "detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("merge_iou", "froc_iou"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(self, name):g}")
        if self.cells <= 0:
            raise ValueError(f"cells must be positive, not {self.cells:g}")
        for name in ("overlap", "least_score"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name):g}")


class Objects(NamedTuple):
    """True objects of one volume.

    Attributes:
        boxes: Boxes (n, 6) float32, z1 y1 x1 z2 y2 x2 in voxels.
        labels: Class indices (n,) int64.
    """

    boxes: Array
    labels: Array


class Predicted(NamedTuple):
    """Objects predicted in one volume, or in the part of it that is scored.

    Attributes:
        boxes: Boxes (n, 6) in voxels of the volume, by falling score.
        scores: Scores (n,) from 0 to 1.
        labels: Class indices (n,).
    """

    boxes: Array
    scores: Array
    labels: Array


class Detection(FinetuneTask):
    """Detection of objects: a box, a class and a score for each.

    Training sees crops, most of them with an object, augmented with their boxes. Overlapping windows
    predict a volume, and their boxes are merged. The main score, `cpm`, is the mean sensitivity at 1/8 to 8
    false positives per scan (an overlap of 0.1 is a hit); `ap_0.1` to `ap_0.5` are average precisions over
    all points, averaged over classes. A scan is a volume or an image.

    The trivial row *usual places* knows the places of objects in the training volumes, and nothing else.
    """

    Config = DetectionConfig
    name = "detection"
    version = 1
    description = "boxes of objects; sensitivity at 1/8 to 8 false positives per scan, average precision"
    reference = (
        "Baumgartner et al.: nnDetection, MICCAI 2021, arXiv 2106.00817; Lin et al.: RetinaNet, ICCV 2017; "
        "Ren et al.: Faster R-CNN, NeurIPS 2015; Setio et al.: LUNA16, MedIA 2017 (FROC)"
    )
    mains: ClassVar[Mapping[str, str]] = {"boxes": "cpm"}
    recipe: ClassVar[Mapping[str, Any]] = {
        "steps": 1500,
        "batch_size": 4,
        "lr": 1e-3,
        "lr_scratch": 1e-3,
        "optimizer": "adamw",
        "weight_decay": 1e-4,
        "clip": 10.0,
        "eval_at": (0.25, 0.5, 0.75, 1.0),
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "nodule-slices": {
            "batch_size": 8,
            "detection.model": "faster-rcnn-2d",
            "detection.patch": (1, 96, 96),
            "detection.scored_crop": (96, 96),
            "detection.axes": (1, 2),
        },
        "tumours-from-masks": {
            "detection.boxes": "masks",
            "detection.one_class": True,
            "detection.min_voxels": 50,
        },
    }
    trivial: ClassVar[tuple[str, ...]] = ("usual places",)
    floors: ClassVar[Mapping[str, str | float]] = {"boxes": "usual places"}

    config: DetectionConfig

    def __init__(self, config: DetectionConfig, data: Collection) -> None:
        """Find the objects of every volume and their classes.

        Raises:
            DataError: No volume has an object, or the model takes images only.
        """
        self.config, self.target = config, "boxes"
        objects = {volume.index: _objects(config, volume) for volume in data}
        values = sorted({int(value) for own in objects.values() for value in own.labels})
        if not values:
            raise DataError(
                f"the {len(data)} volumes hold no object: none of their boxes lists has an entry"
                if config.boxes == "stored"
                else f"the masks of the {len(data)} volumes hold no component of {config.min_voxels} voxels"
            )
        depths = np.asarray(data.shapes)[:, 1]
        self.flat = bool((depths == 1).all())
        if config.model == "faster-rcnn-2d" and not self.flat:
            raise DataError(
                f"--detection.model faster-rcnn-2d takes images, and {int((depths > 1).sum())} of "
                f"{len(data)} volumes have several slices; use retinanet or faster-rcnn"
            )
        self.values = (0,) if config.one_class else tuple(values)
        self.classes = ("object",) if config.one_class else _class_names(data, values)
        index = {value: n for n, value in enumerate(values)}
        self.objects: dict[int, Objects] = {}
        for number, own in objects.items():
            kinds = [0 if config.one_class else index[int(value)] for value in own.labels]
            self.objects[number] = Objects(own.boxes, np.array(kinds, np.int64))
        self.patch: Triple = patch_within(config.patch, data.shapes)
        if config.model == "faster-rcnn" and ((depths == 1).any() or self.patch[0] == 1):
            self.version = 2  # the level that a box of an image is read from followed from its depth too
        self._check_patch(data)

    def _check_patch(self, data: Collection) -> None:
        """Raise a DataError where no crop holds enough of any object for it to be learned."""
        c = self.config
        shares = []
        for volume in data:
            size = np.array(fit_size(volume, self.patch))
            room = size * np.where(size > 1, 1 + c.zoom, 1.0)  # of the volume, at the smallest zoom
            boxes = self.objects[volume.index].boxes
            sides = boxes[:, 3:] - boxes[:, :3]
            shares.append((np.minimum(sides, room) / sides).prod(axis=1))
        seen = np.concatenate(shares)
        if seen.max() < c.visible:
            raise DataError(
                f"--detection.patch {' '.join(map(str, self.patch))}: a crop holds {seen.max():.0%} of an "
                f"object at most, and one counts from {c.visible:.0%} on: none of {len(seen)} objects "
                "would be learned; take a larger patch, or a smaller --detection.visible"
            )

    def _boxes_of(self, data: Collection) -> Array:
        parts = [self.objects[volume.index].boxes for volume in data]
        return np.concatenate([np.zeros((0, 6), np.float32), *parts])

    @classmethod
    def known(cls, config: DetectionConfig, data: Collection) -> NDArray[np.bool_]:
        """Return a mask (N,) of the volumes that have a list of boxes, empty or not."""
        searched = np.asarray(data.has_mask if config.boxes == "masks" else data.has_boxes, dtype=bool)
        if not searched.any():
            other = data.has_mask if config.boxes == "stored" else data.has_boxes
            hint = (
                "; use --detection.boxes " + ("masks" if config.boxes == "stored" else "stored")
                if other.any()
                else "; prepare them with a COCO, CSV or MONAI JSON list of boxes beside them"
            )
            source = "mask" if config.boxes == "masks" else "list of boxes"
            raise DataError(f"none of the {len(data)} volumes has a {source}{hint}")
        return searched

    def settings(self) -> dict[str, Any]:
        """Return the options, with patch and classes resolved."""
        return {
            **dataclasses.asdict(self.config),
            "patch": list(self.patch),
            "classes": list(self.classes),
            "values": list(self.values),
        }

    def kinds(self, data: Collection) -> list[dict[str, Any]]:
        """Return value and name of each kind of object."""
        return [
            {"value": value, "name": name} for value, name in zip(self.values, self.classes, strict=True)
        ]

    def keep(self, model: nn.Module) -> dict[str, Any]:
        """Return the levels and anchors that the training boxes decided."""
        if isinstance(model, TwoStageDetector2d):
            return {"config": dataclasses.asdict(model.config)}
        assert isinstance(model, RetinaNet3d | TwoStageDetector3d)
        return {"plan": dataclasses.asdict(model.plan)}

    @classmethod
    def restore(
        cls, settings: Mapping[str, Any], target: str, kept: Mapping[str, Any], encoder: Encoder
    ) -> tuple[Detection, nn.Module]:
        """Restore the task and the detector from a card."""
        task = cls.scorer(settings, target)
        assert isinstance(task, cls)
        task.values = tuple(settings["values"])
        task.patch = task.config.patch
        if task.config.model == "faster-rcnn-2d":
            return task, TwoStageDetector2d(encoder, TwoStageConfig(**_tuples(kept["config"])))
        return task, task._detector(encoder, AnchorPlan(**_tuples(kept["plan"])))

    # Training -------------------------------------------------------------------------------------

    def model(self, encoder: Encoder, train: Collection | None) -> nn.Module:
        """Build the detector over the encoder's maps, with levels fitted to the training boxes."""
        c = self.config
        assert train is not None
        boxes = self._boxes_of(train)
        if not len(boxes):
            raise DataError(
                f"none of the {len(train)} training volumes has an object: nothing to find anchors for"
            )
        if c.model == "faster-rcnn-2d":
            return TwoStageDetector2d(encoder, self._config_2d(encoder, boxes))
        return self._detector(encoder, plan_anchors(boxes, encoder, c.anchors, c.cells))

    def _detector(self, encoder: Encoder, plan: AnchorPlan) -> nn.Module:
        c = self.config
        common = {
            "classes": len(self.classes),
            "channels": c.channels,
            "score": c.least_score,
            "detections": c.detections,
        }
        if c.model == "retinanet":
            return RetinaNet3d(encoder, plan, RetinaNet3dConfig(**common))  # type: ignore[arg-type]
        return TwoStageDetector3d(encoder, plan, TwoStage3dConfig(**common))  # type: ignore[arg-type]

    def _config_2d(self, encoder: Encoder, boxes: Array) -> TwoStageConfig:
        """Return levels and anchors that reach down to the smaller of the training boxes."""
        c = self.config
        sides = np.sqrt((boxes[:, 4] - boxes[:, 1]) * (boxes[:, 5] - boxes[:, 2]))
        small = float(np.quantile(sides, 0.2))
        strides = sorted({stride[1] for stride in encoder.strides})
        first = max([stride for stride in strides if stride <= max(small / 3, strides[0])])
        return TwoStageConfig(
            classes=len(self.classes),
            channels=c.channels,
            hidden=4 * c.channels,
            min_stride=first,
            anchor_scale=max(small / first, 1.0),
            norm_groups=8,
            score=c.least_score,
            detections=c.detections,
            proposals=(500, 300),
            roi_samples=128,
        )

    def start(self, model: nn.Module, train: Collection) -> None:
        """Set the anchors to the sizes of the boxes of the training subjects."""
        if isinstance(model, RetinaNet3d | TwoStageDetector3d):
            plan: AnchorPlan = model.plan
            shapes = fit_shapes(self._boxes_of(train), plan, self.config.cells)
            model.shapes.copy_(shapes.to(model.shapes.device))

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw a crop `image` (C, d, h, w), with the margin of its augmentation, and the boxes in it."""
        boxes, labels = self.objects[volume.index]
        return draw_boxed3d(self.config, volume, boxes, labels, fit_size(volume, self.patch), rng)

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], rng: BatchRng
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the sum of the detector's losses on augmented crops, and each of them."""
        moved = move_boxed3d(self.config, batch, fit_size(batch["image"], self.patch), rng)
        boxes = moved.boxes
        if isinstance(model, TwoStageDetector2d):
            boxes = [own[:, [1, 2, 4, 5]] for own in boxes]
        losses = model.losses(moved.images, boxes, moved.labels, rng)  # type: ignore[operator]
        total = torch.stack(list(losses.values())).sum()
        return total, {name: value.detach() for name, value in losses.items()}

    # Prediction -----------------------------------------------------------------------------------

    def region(self, volume: Volume) -> tuple[Triple, Triple]:
        """Return start and size of the part of a volume that is scored."""
        _, depth, height, width = volume.shape
        if tuple(self.config.scored_crop) == (0, 0):
            return (0, 0, 0), (depth, height, width)
        rng = numpy_rng("detection crop", volume.dataset, volume.id)
        h, w = (min(n, m) for n, m in zip(self.config.scored_crop, (height, width), strict=True))
        start = (0, int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)))
        return start, (depth, h, w)

    def truth(self, volume: Volume) -> Objects:
        """Return the objects of which at least a share `visible` lies in the scored part."""
        boxes, labels = self.objects[volume.index]
        start, size = self.region(volume)
        low, high = np.array(start * 2), np.add(start, size)
        cut = np.concatenate(
            [np.clip(boxes[:, :3], low[:3], high), np.clip(boxes[:, 3:], low[:3], high)], axis=1
        )
        share = _volumes(cut) / np.maximum(_volumes(boxes), 1e-6)
        kept = share >= self.config.visible
        return Objects(cut[kept], labels[kept])

    def detect(self, model: nn.Module, volume: Volume) -> Predicted:
        """Predict the boxes of the scored part, window by window, and merge them."""
        c = self.config
        start, size = self.region(volume)
        device = next(model.parameters()).device
        window = tuple(min(p, n) for p, n in zip(fit_size(volume, self.patch), size, strict=True))
        image = volume.read(start, size)
        ways = [window_starts(n, p, c.overlap) for n, p in zip(size, window, strict=True)]
        places = list(itertools.product(*ways))
        boxes, scores, labels, seen = [], [], [], []
        for first in range(0, len(places), c.windows):
            some = places[first : first + c.windows]
            crops = [image[:, d : d + window[0], h : h + window[1], w : w + window[2]] for d, h, w in some]
            for place, predicted in zip(some, model.detect(torch.stack(crops).to(device)), strict=True):  # type: ignore[operator]
                own = predicted.boxes.float().cpu()
                if own.shape[1] == 4:
                    low, high = own.new_zeros(len(own), 1), own.new_ones(len(own), 1)
                    own = torch.cat([low, own[:, :2], high, own[:, 2:]], dim=1)
                own = own + own.new_tensor(place * 2)
                kept = torch.ones(len(own), dtype=torch.bool)
                if c.merge == "nms":
                    kept = _in_core(own, place, ways, window)
                boxes.append(own[kept])
                scores.append(predicted.scores.float().cpu()[kept])
                labels.append(predicted.labels.cpu()[kept])
                seen.append(_covering(own[kept], ways, window))
        joined, sure, kinds = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        if c.merge == "nms":
            kept = nms(joined, sure, c.merge_iou, kinds, c.detections)
            joined, sure, kinds = joined[kept], sure[kept], kinds[kept]
        else:
            joined, sure, heads = weighted_clusters(joined, sure, c.merge_iou, kinds, torch.cat(seen))
            joined, sure, kinds = joined[: c.detections], sure[: c.detections], kinds[heads][: c.detections]
        moved = joined + joined.new_tensor(start * 2)
        return Predicted(moved.numpy().astype(np.float64), sure.numpy().astype(np.float64), kinds.numpy())

    def predict(self, model: nn.Module, volume: Volume) -> dict[str, Any]:
        """Predict boxes, scores and classes, beside the truth, in voxels of the volume."""
        return self._row(self.detect(model, volume), self.truth(volume))

    def infer(self, model: nn.Module, volume: Volume, flip: bool = False) -> BoxPrediction:
        """Predict boxes, scores and kinds of objects."""
        predicted = self.detect(model, volume)
        return BoxPrediction(self.classes, *predicted, self.config.merge_iou, self.config.detections)

    def _row(self, predicted: Predicted, truth: Objects) -> dict[str, Any]:
        return {
            "boxes": np.round(predicted.boxes, 2).tolist(),
            "scores": [float(f"{score:.5g}") for score in predicted.scores],
            "labels": predicted.labels.tolist(),
            "truth": np.round(truth.boxes.astype(np.float64), 2).tolist(),
            "truth_labels": truth.labels.tolist(),
        }

    def score_functions(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, statistics.Statistic]]:
        """Return `cpm`, `froc_0.125` to `froc_8`, `ap_0.1` to `ap_0.5`, and `ap_0.1` of each class."""
        clusters = np.array([f"{row['dataset']}/{row['subject']}" for row in predictions])
        by_overlap = {
            iou: scores_of(predictions, iou, self.config.detections)
            for iou in sorted({*OVERLAPS, self.config.froc_iou})
        }
        froc = by_overlap[self.config.froc_iou]
        functions: dict[str, statistics.Statistic] = {"cpm": lambda weights: froc.froc(weights).cpm}
        for column, rate in enumerate(RATES):
            functions[f"froc_{rate:g}"] = _sensitivity(froc, column)
        for iou in OVERLAPS:
            functions[f"ap_{iou:g}"] = _precision(by_overlap[iou])
        if len(self.classes) > 1:
            lowest = by_overlap[OVERLAPS[0]]
            for kind in lowest.classes:
                functions[f"ap_{OVERLAPS[0]:g}_{self.classes[kind]}"] = _class_precision(lowest, kind)
        return clusters, functions

    def predict_trivial(
        self, name: str, train: Collection, val: Collection, test: Collection, seed: int
    ) -> list[dict[str, Any]]:
        """Predict the boxes of the training volumes at their places, scored by how many agree."""
        if name != "usual places":
            raise NotImplementedError(name)
        places, kinds = [], []
        for volume in train:
            truth, (start, size) = self.truth(volume), self.region(volume)
            places.append((truth.boxes - np.array(start * 2)) / np.array(size * 2))
            kinds.append(truth.labels)
        relative, labels = np.concatenate(places), np.concatenate(kinds)
        alike = (box_iou(relative, relative) * (labels[:, None] == labels[None])).sum(axis=1)
        boxes, scores = torch.from_numpy(relative), torch.from_numpy(alike / max(len(train), 1))
        kept = nms(boxes, scores, self.config.merge_iou, torch.from_numpy(labels), USUAL).numpy()
        rows = []
        for volume in test:
            start, size = self.region(volume)
            here = relative[kept] * np.array(size * 2) + np.array(start * 2)
            row = self._row(Predicted(here, scores.numpy()[kept], labels[kept]), self.truth(volume))
            rows.append({"dataset": volume.dataset, "subject": volume.subject, "id": volume.id, **row})
        return rows

    def save_prediction(self, model: nn.Module, volume: Volume, folder: Path) -> Path | None:
        """Write the boxes in the scanner's mm as JSON, and as CSV beside it."""
        predicted = self.detect(model, volume)
        folder.mkdir(parents=True, exist_ok=True)
        return write_boxes(folder / f"{file_name(volume)}.json", volume, *predicted, self.classes)

    def picture(self, model: nn.Module, data: Collection, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Draw truth and detections of a median and the worst volume, and the FROC curve of all.

        Volumes are compared by the average precision of each, which one without an object has not.
        """
        from ssl3d_benchmarks.finetune.detection.pictures import detection_picture

        iou, limit = self.config.froc_iou, self.config.detections
        each = [float(scores_of([row], iou, limit).average_precision().mean[0]) for row in rows]
        chosen = median_and_worst(each)
        shown = [data[k] for _, k in chosen]
        predicted = [self.detect(model, volume) for volume in shown]
        return detection_picture(
            shown,
            [self.truth(volume).boxes for volume in shown],
            predicted,
            scores_of(rows, iou, limit),
            [words for words, _ in chosen],
        )


def scores_of(predictions: Sequence[Mapping[str, Any]], iou: float, limit: int | None) -> DetectionScores:
    """Match the detections of rows to their truths."""
    return DetectionScores(
        [Detections(row["boxes"], row["scores"], row["labels"]) for row in predictions],
        [Truths(row["truth"], row["truth_labels"]) for row in predictions],
        iou,
        limit,
    )


# ------------------------------------------------------------------------------------------------


def _objects(config: DetectionConfig, volume: Volume) -> Objects:
    """Read boxes and values of a volume, or find them in its mask."""
    if config.boxes == "stored":
        boxes, labels = volume.boxes, volume.box_labels
        if boxes is None or labels is None:
            raise DataError(
                f"{volume.dataset}/{volume.id} has no list of boxes, not even an empty one; prepare it "
                "with its boxes, or use --detection.boxes masks"
            )
        solid = (boxes[:, 3:] > boxes[:, :3]).all(axis=1)
        return Objects(boxes[solid], labels[solid])
    mask = volume.read_mask().numpy()
    if config.one_class:
        mask = (mask > 0).astype(mask.dtype)
    boxes, labels = around_mask(mask, config.min_voxels)
    return Objects(boxes, labels)


def _class_names(data: Collection, values: Sequence[int]) -> tuple[str, ...]:
    """Return the names of box labels where the stores know them."""
    known: dict[str, str] = {}
    for settings in data.settings:
        for names in (settings.get("box_labels") or {}).values():
            known |= {str(key): str(name) for key, name in names.items()}
    if len(values) == 1 and str(values[0]) not in known:
        return ("object",)
    return tuple(known.get(str(value), str(value)) for value in values)


def _tuples(values: Any) -> Any:
    """Convert the lists of JSON to tuples, as options have them."""
    if isinstance(values, Mapping):
        return {key: _tuples(value) for key, value in values.items()}
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


def _in_core(
    boxes: Tensor, place: Sequence[int], ways: Sequence[list[int]], window: Sequence[int]
) -> Tensor:
    """Return whether a window sees a box best; the cores of windows meet in the middle of the overlaps.

    Cores are two voxels wider than that, so that no object is lost between two windows that place it
    differently.
    """
    middle = (boxes[:, :3] + boxes[:, 3:]) / 2
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for axis, (starts, length) in enumerate(zip(ways, window, strict=True)):
        at = starts.index(place[axis])
        if at > 0:
            kept &= middle[:, axis] >= (starts[at] + starts[at - 1] + length) / 2 - 2
        if at + 1 < len(starts):
            kept &= middle[:, axis] <= (starts[at + 1] + starts[at] + length) / 2 + 2
    return kept


def _covering(boxes: Tensor, ways: Sequence[list[int]], window: Sequence[int]) -> Tensor:
    """Count the windows that hold the middle of each box, (n,)."""
    middle = (boxes[:, :3] + boxes[:, 3:]) / 2
    count = torch.ones(len(boxes))
    for axis, (starts, length) in enumerate(zip(ways, window, strict=True)):
        first = torch.tensor(starts, dtype=torch.float32)
        at = middle[:, axis, None]
        count *= ((at >= first) & (at < first + length)).sum(dim=1).clamp_min(1)
    return count


def _volumes(boxes: Array) -> Array:
    sizes: Array = np.clip(boxes[:, 3:] - boxes[:, :3], 0, None).prod(axis=1)
    return sizes


def _sensitivity(scores: DetectionScores, column: int) -> statistics.Statistic:
    return lambda weights: scores.froc(weights).sensitivities[:, column]


def _precision(scores: DetectionScores) -> statistics.Statistic:
    return lambda weights: scores.average_precision(weights).mean


def _class_precision(scores: DetectionScores, kind: int) -> statistics.Statistic:
    return lambda weights: scores.average_precision(weights).classes[kind]
