"""What proxies that learn to detect in 2D share: classes, the step, its metrics and pictures, its score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssl3d.detection.crops2d import Boxed, BoxViews, draw_boxed, move_boxed
from ssl3d.detection.metrics import AveragePrecision, Detections, Truths, average_precision, box_iou
from ssl3d.detection.two_stage2d import (
    Detection,
    DetectionTargets,
    TwoStageConfig,
    TwoStageDetector2d,
    yxyx,
)
from ssl3d.encoder import Encoder
from ssl3d.errors import DataError, UsageError
from ssl3d.json_files import parse_json
from ssl3d.proxy import Proxy, StepOutput
from ssl3d.rng import BatchRng, numpy_rng, one_group

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.data.store.collection import Collection
    from ssl3d.data.store.volume import Volume

_SHOWN = 6  # images in a picture
_SURE = 0.3  # score of a detection that is drawn
_BEST = 100  # proposals per image that the recall counts


@dataclass
class Detection2dOptions(BoxViews):
    """Options of a proxy that learns to detect in 2D.

    Attributes:
        fusion: Fusion of several slices before the pyramid: `learned` weights per channel, or the `centre`
            slice.
        channels: Number of channels of the feature pyramid.
        hidden: Width of the two layers of the box head.
        min_stride: Smallest stride of the encoder's maps that enter the pyramid; its smallest anchors are
            `anchor_scale` times the smallest stride that is left.
        anchor_scale: Side of a square anchor, in strides of its level.
        anchor_ratios: Ratios of height to width of the anchors.
        proposals: Numbers of proposals kept of an image while training, and in evaluation.
        rpn_samples: Number of anchors per image in the loss.
        roi_samples: Number of proposals per image in the loss.
        score_training: Whether to score the average precision of the training crops too, at every step;
            else of the held-out ones only.
    """

    fusion: Literal["learned", "centre"] = "learned"
    channels: int = 256
    hidden: int = 1024
    min_stride: int = 4
    anchor_scale: float = 4.0
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    proposals: tuple[int, int] = (2000, 1000)
    rpn_samples: int = 256
    roi_samples: int = 512
    score_training: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        self.detector(1)

    def detector(self, classes: int) -> TwoStageConfig:
        """Return the detector's options for a number of classes."""
        return TwoStageConfig(
            classes=classes,
            depth=self.depth,
            fusion=self.fusion,
            channels=self.channels,
            hidden=self.hidden,
            min_stride=self.min_stride,
            anchor_scale=self.anchor_scale,
            anchor_ratios=tuple(self.anchor_ratios),
            proposals=(self.proposals[0], self.proposals[-1]),
            rpn_samples=self.rpn_samples,
            roi_samples=self.roi_samples,
        )

    @property
    def depth(self) -> int:
        """Number of slices that the detector fuses."""
        return self.slab


class DetectionPass(NamedTuple):
    """Result of one pass through the detector.

    Attributes:
        losses: Losses by name, (B,) each.
        proposals: Proposals of each image (n, 4), x1 y1 x2 y2, the best first.
        levels: Levels of the pyramid that the second stage reads.
        reads: Whether the second stage can read them yet.
    """

    losses: dict[str, Tensor]
    proposals: list[Tensor]
    levels: dict[str, Tensor]
    reads: bool = True


class DetectionProxy2d(Proxy):
    """A proxy that learns boxes in images, and in slices of volumes, with the two-stage detector.

    Classes are what the boxes of the training data are labelled: by name where the store has names, so
    that equal names are one class in all data sets, else by number. `setup` finds them and makes
    `self.detector`.
    """

    main: ClassVar[str] = "recall"
    uses_labels: ClassVar[bool] = True
    detector: TwoStageDetector2d
    known: Tensor

    def __init__(self, config: Any, encoder: Encoder) -> None:
        """Start without classes; `setup` finds them and adds the detector."""
        super().__init__(config, encoder)
        self.names: list[str] = []
        self.register_buffer("known", torch.zeros(0, 3, dtype=torch.int64))

    def setup(self, data: Collection) -> None:
        """Find the classes, and build the detector.

        Raises:
            DataError: There is no box in all the data.
            UsageError: The encoder's strides do not serve.
        """
        outline = getattr(data, "found", None)  # of a checkpoint without its data
        if outline:
            self.names = parse_json(bytes(outline["classes"].tolist()))
            self.known = outline["known"].clone()
        else:
            self.names, self.known = _classes(data)
        try:
            self.detector = TwoStageDetector2d(self.encoder, self.config.detector(len(self.names)))
        except ValueError as error:
            raise UsageError(f"{type(self).__name__}: {error}") from error

    def outline(self) -> Mapping[str, Tensor]:
        """Return the classes' names in their order, and data set, label and class of every label."""
        return {
            "classes": torch.tensor(list(json.dumps(self.names).encode()), dtype=torch.uint8),
            "known": self.known,
        }

    @classmethod
    def draw(cls, config: Any, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw one crop with its boxes by `draw_boxed`.

        Raises:
            DataError: Nobody looked for boxes in the volume.
        """
        return draw_boxed(config, volume, rng)

    def shown(self, batch: dict[str, Tensor], rng: BatchRng) -> Boxed:
        """Prepare a batch for the encoder: moved, augmented while training, standardised."""
        return move_boxed(self.config, batch, rng, self.training)

    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Detect in the crops (B, C, D, h, w), and compare with their boxes."""
        seen = self.shown(batch, rng)
        kinds = self._classes_of(batch)
        there = seen.there & (kinds >= 0)
        targets = DetectionTargets(
            [boxes[at] for boxes, at in zip(seen.boxes, there, strict=True)],
            [labels[at] for labels, at in zip(kinds, there, strict=True)],
        )
        done = self.run(seen.images, targets, rng)
        loss = torch.stack(list(done.losses.values())).sum(0).mean()
        metrics = {name: value.detach().mean() for name, value in done.losses.items()}
        metrics["recall"] = recall([yxyx(boxes) for boxes in done.proposals], targets.boxes).to(loss.device)
        levels = {name: level.detach() for name, level in done.levels.items()}
        detections: list[Detection] | None = None
        if done.reads and (self.config.score_training or not self.training):
            detections = self.detector.read(levels, seen.images.shape[-2:], done.proposals)
            score = _precision(detections, targets)
            if score is not None:
                metrics["ap50"] = score.to(loss.device)

        def picture() -> Figure:
            read = detections
            if read is None and done.reads:
                read = self.detector.read(levels, seen.images.shape[-2:], done.proposals)
            return picture_of(seen.images, targets, read, self.names)

        return StepOutput(loss, metrics, picture)

    def run(self, images: Tensor, targets: DetectionTargets, rng: BatchRng) -> DetectionPass:
        """Run both stages at once, on one encoder."""
        detector, size = self.detector, images.shape[-2:]
        levels = detector.levels(self.encoder(images))
        first = detector.propose(levels, size, targets, rng)
        losses = first.losses | detector.refine(levels, size, first.boxes, targets, rng)
        return DetectionPass(losses, first.boxes, levels)

    def _classes_of(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the class (B, M) of every label; -1 for one that the training data do not have."""
        same = (batch["dataset"].view(-1, 1, 1) == self.known[:, 0]) & (
            batch["labels"].unsqueeze(2) == self.known[:, 1]
        )
        classes = self.known[:, 2].expand(same.shape)
        return torch.where(same, classes, -1).amax(2)


@torch.no_grad()
def score_boxes(
    proxy: DetectionProxy2d, volumes: Collection, iou: float = 0.5, seed: int = 0, batch_size: int = 16
) -> AveragePrecision:
    """Score a trained proxy's average precision over one crop of every volume, the same at every call.

    Crops lie anywhere (`around` is 0) and are not augmented; volumes without boxes known are left out.

    Args:
        proxy: Trained proxy with its classes.
        volumes: Volumes of the data sets that it was trained on.
        iou: Least overlap of a detection with the box that it finds.
        seed: Seed of the crops.
        batch_size: Number of crops at once.

    Raises:
        DataError: No volume has boxes known.
    """
    import dataclasses

    config = dataclasses.replace(proxy.config, around=0.0)
    device = next(proxy.parameters()).device
    examples: list[dict[str, Tensor]] = []
    codes = volumes.dataset_codes
    for volume, code in zip(volumes, codes, strict=True):
        if volume.boxes is not None:
            drawn = proxy.draw(config, volume, numpy_rng("score_boxes", seed, volume.id))
            examples.append(drawn | {"dataset": torch.tensor(int(code))})
    if not examples:
        raise DataError(f"none of the {len(volumes)} volumes has boxes, so there is nothing to score")
    was = proxy.training
    proxy.eval()
    detections: list[Detections] = []
    truths: list[Truths] = []
    for begin in range(0, len(examples), batch_size):
        some = examples[begin : begin + batch_size]
        batch = {name: torch.stack([example[name] for example in some]).to(device) for name in some[0]}
        seen = proxy.shown(batch, one_group(0, len(some), device))
        kinds = proxy._classes_of(batch)
        detections += [
            Detections(*(part.cpu().numpy() for part in detection))
            for detection in proxy.detector.detect(seen.images)
        ]
        for boxes, labels, there in zip(seen.boxes, kinds, seen.there, strict=True):
            at = there & (labels >= 0)
            truths.append(Truths(boxes[at].cpu().numpy(), labels[at].cpu().numpy()))
    proxy.train(was)
    return average_precision(detections, truths, iou)


def recall(proposals: Sequence[Tensor], truths: Sequence[Tensor], iou: float = 0.5) -> Tensor:
    """Share of the true boxes that one of the 100 best proposals of its image overlaps by `iou`.

    1 where there is nothing to find.
    """
    hit = total = 0
    for boxes, truth in zip(proposals, truths, strict=True):
        total += len(truth)
        if len(truth) and len(boxes):
            overlap = box_iou(boxes[:_BEST].detach().cpu().numpy(), truth.detach().cpu().numpy())
            hit += int((overlap.max(0) >= iou).sum())
    return torch.tensor(hit / total if total else 1.0)


def picture_of(
    images: Tensor, targets: DetectionTargets, detections: Sequence[Detection] | None, names: Sequence[str]
) -> Figure:
    """Draw the first images: true boxes in green, detections in red with their scores.

    Args:
        images: Images (B, C, D, H, W); three slices, or channels, are shown as colours, else the middle
            slice.
        targets: True boxes and labels.
        detections: Detections of each image; None where there is nothing to detect with yet.
        names: Names of the classes.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    count = min(len(images), _SHOWN)
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for panel in panels:
        panel.set_axis_off()
    for n in range(count):
        image = images[n].detach().float().cpu()
        panel = panels[n]
        if image.shape[0] * image.shape[1] == 3:
            colours = image.flatten(0, 1).movedim(0, -1)
            low, high = np.percentile(colours.numpy(), (0.5, 99.5))
            panel.imshow(((colours - low) / max(high - low, 1e-6)).clamp(0, 1).numpy())
        else:
            panel.imshow(image[0, image.shape[1] // 2].numpy(), cmap="gray")

        def outline(box: Tensor, colour: str, text: str, panel: Any = panel) -> None:
            y1, x1, y2, x2 = box.tolist()  # edges of pixels; imshow has their middles at whole numbers
            panel.add_patch(
                Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.2)
            )
            panel.text(x1, y1 - 1, text, color=colour, fontsize=6, clip_on=True)

        for box, label in zip(targets.boxes[n], targets.labels[n].tolist(), strict=True):
            outline(box, "lime", names[label] if len(names) > 1 else "")
        if detections is not None:
            shown = detections[n]
            own = (shown.boxes, shown.scores.tolist(), shown.labels.tolist())
            for box, score, label in zip(*own, strict=True):
                if score >= _SURE:
                    outline(box, "red", f"{names[label]} {score:.2f}" if len(names) > 1 else f"{score:.2f}")
    figure.suptitle("true boxes green, detections red", fontsize=8)
    return figure


def _precision(detections: Sequence[Detection], targets: DetectionTargets) -> Tensor | None:
    """Compute the average precision at 0.5 over a batch; None where there is nothing to find."""
    if not any(len(boxes) for boxes in targets.boxes):
        return None
    score = average_precision(
        [Detections(*(part.detach().cpu().numpy() for part in detection)) for detection in detections],
        [
            Truths(boxes.cpu().numpy(), labels.cpu().numpy())
            for boxes, labels in zip(targets.boxes, targets.labels, strict=True)
        ],
        0.5,
    )
    return torch.tensor(float(score.mean[0]))


def _classes(data: Collection) -> tuple[list[str], Tensor]:
    """Return the names of the classes, and (data set, label, class) of every label of a box."""
    codes = getattr(data, "dataset_codes", None)
    named: dict[str, dict[str, str]] = {}
    for settings in getattr(data, "settings", ()):
        for dataset, texts in settings.get("box_labels", {}).items():
            named.setdefault(dataset, {}).update(texts)
    order: dict[str, int] = {}
    labels: dict[tuple[int, int], str] = {}
    looked = 0
    for n, volume in enumerate(data):
        code = order.setdefault(volume.dataset, len(order)) if codes is None else int(codes[n])
        box_labels = volume.box_labels
        looked += box_labels is not None
        for label in np.unique(box_labels if box_labels is not None else ()).astype(int).tolist():
            labels[code, label] = named.get(volume.dataset, {}).get(str(label), str(label))
    if not labels:
        many = f"{looked} of them were looked at and have none" if looked else "nobody looked for any"
        raise DataError(
            f"no box in all {len(data)} volumes to be learned from: {many}. `ssl3d prepare` reads COCO's "
            "instances.json and CSV lists beside pictures, and --boxes masks draws them around masks"
        )
    numeric = all(name.isdigit() for name in labels.values())
    names = sorted(set(labels.values()), key=(lambda name: int(name)) if numeric else None)
    table = [(code, label, names.index(name)) for (code, label), name in sorted(labels.items())]
    return names, torch.tensor(table, dtype=torch.int64)
