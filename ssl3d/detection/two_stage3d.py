"""The two-stage detector in 3D: Faster R-CNN over any encoder's maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl3d.detection.anchors3d import AnchorPlan, grid_anchors, level_of
from ssl3d.detection.boxes3d import box_overlap, clip, decode, encode, nms
from ssl3d.detection.pyramid3d import Conv3x3x3, Pyramid3d, conv_block
from ssl3d.detection.roi_align3d import roi_align3d
from ssl3d.detection.two_stage2d import Detection, sample, sampling_keys
from ssl3d.encoder import Encoder
from ssl3d.rng import BatchRng


@dataclass(frozen=True)
class TwoStage3dConfig:
    """Options of the two-stage detector in 3D.

    Faster R-CNN's, where volumes do not ask for others: a scan has fewer objects than a photograph, and
    the overlap of two boxes that are off by the same share per axis is smaller with three axes.

    Attributes:
        classes: Number of kinds of objects, without the background.
        channels: Number of channels of the pyramid.
        hidden: Width of the two layers of the box head.
        pool_size: Number of cells that a proposal is pooled to, along each axis.
        proposals: Numbers of proposals kept of a volume while training, and in evaluation (in 2D: 2000 and
            1000).
        candidates: Number of candidates that enter the suppression from each level.
        proposal_nms: Overlap above which the worse of two proposals goes.
        rpn_iou: Overlaps of an anchor with a box: by the second at least, or more than all others, it is
            the box's own; below the first for all boxes it is background (in 2D: .3 and .7).
        rpn_samples: Number of anchors per volume in the loss.
        rpn_positive: Largest share of them that are a box's.
        roi_iou: Least overlap of a proposal with a box to be its own (in 2D: .5).
        roi_samples: Number of proposals per volume in the loss (in 2D: 512).
        roi_positive: Largest share of them that are a box's.
        rpn_beta: Difference at which smooth L1 turns linear, for anchors.
        roi_beta: Difference at which it does for proposals, whose offsets are larger by `box_weights`.
        box_weights: Factors of the offsets of proposals (place, side).
        score: Least score of a detection.
        nms: Overlap above which the worse of two detections of a class goes.
        detections: Largest number of detections of a volume.
    """

    classes: int = 1
    channels: int = 64
    hidden: int = 256
    pool_size: int = 5
    proposals: tuple[int, int] = (300, 200)
    candidates: int = 500
    proposal_nms: float = 0.7
    rpn_iou: tuple[float, float] = (0.2, 0.5)
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    roi_iou: float = 0.3
    roi_samples: int = 64
    roi_positive: float = 0.25
    rpn_beta: float = 1 / 9
    roi_beta: float = 1.0
    box_weights: tuple[float, float] = (10.0, 5.0)
    score: float = 0.02
    nms: float = 0.22
    detections: int = 100

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        counts = ("classes", "channels", "hidden", "pool_size", "candidates", "rpn_samples")
        for name in (*counts, "roi_samples", "detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(self.proposals) != 2 or min(self.proposals) < 1:
            raise ValueError(f"proposals needs two numbers of at least 1, not {self.proposals}")
        if len(self.rpn_iou) != 2 or not 0 < self.rpn_iou[0] <= self.rpn_iou[1] <= 1:
            raise ValueError(f"rpn_iou needs two overlaps, the lower first, not {self.rpn_iou}")
        for name in (
            "proposal_nms",
            "roi_iou",
            "nms",
            "rpn_positive",
            "roi_positive",
            "rpn_beta",
            "roi_beta",
        ):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(self, name):g}")
        if len(self.box_weights) != 2 or min(self.box_weights) <= 0:
            raise ValueError(f"box_weights needs two positive numbers, not {self.box_weights}")
        if not 0 <= self.score < 1:
            raise ValueError(f"score must be from 0 up to 1, not {self.score:g}")


class TwoStageDetector3d(nn.Module):
    """Faster R-CNN (Ren et al., NeurIPS 2015, arXiv 1506.01497) in 3D, with a feature pyramid.

    A region proposal network on the levels of a 3D pyramid; proposals pooled by trilinear RoIAlign from
    the level that fits their size; a box head of two layers. Boxes gain tz and td. Any strides and sizes,
    thin volumes and images (D = 1). What follows the convolutions is in single precision. Losses are means
    over volumes, so that they do not depend on how a batch is shared out over ranks.

    Attributes:
        encoder: Encoder that was given.
        plan: Plan of the levels, with the anchors to begin with.
        shapes: Buffer of the sides of the anchors in use (levels, count, 3); set it from `fit_shapes`.

    Args:
        encoder: Encoder of any kind.
        plan: Plan from `plan_anchors`.
        config: Options of the detector; the defaults if None.
    """

    def __init__(self, encoder: Encoder, plan: AnchorPlan, config: TwoStage3dConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TwoStage3dConfig()
        self.encoder, self.plan = encoder, plan
        self.shapes: Tensor
        self.register_buffer("shapes", torch.tensor(plan.shapes, dtype=torch.float32))
        width, count = config.channels, plan.count
        self.pyramid = Pyramid3d(encoder, plan.strides, width)
        self.rpn = conv_block(width, width)
        self.objectness, self.offsets = Conv3x3x3(width, count), Conv3x3x3(width, count * 6)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(width * config.pool_size**3, config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(config.hidden, config.classes + 1)
        self.regressor = nn.Linear(config.hidden, config.classes * 6)
        for layer, std in (
            (self.objectness, 0.01),
            (self.offsets, 0.01),
            (self.classifier, 0.01),
            (self.regressor, 0.001),
        ):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def losses(
        self,
        images: Tensor,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        rng: BatchRng | None = None,
    ) -> dict[str, Tensor]:
        """Compute what training minimises: `rpn_class`, `rpn_box`, `roi_class`, `roi_box`, scalars.

        Args:
            images: Volumes (B, C, D, H, W).
            boxes: Boxes of each volume (n, 6), z1 y1 x1 z2 y2 x2 in voxels; n may be 0.
            labels: Labels of each volume (n,), from 0.
            rng: Generators of the B volumes, which decide what is sampled; None for torch's global
                generator.
        """
        config, size = self.config, images.shape[2:]
        levels = self.pyramid(self.encoder(images), size)
        rows = self._first(levels)
        anchors = grid_anchors(self.plan.strides, self.shapes, size)
        own = [box.float() for box in boxes]
        with torch.autocast(images.device.type, enabled=False):
            first = self._rpn_losses(rows, torch.cat(anchors), own, rng)
            with torch.no_grad():
                proposals = self._propose(rows, anchors, size, config.proposals[0])
                chosen = self._assign(proposals, own, labels, rng)
            places = [place for place, _, _ in chosen]
            logits, offsets = self._second(levels, places)
            counts = [len(place) for place in places]
            by_class, by_box = [], []
            for score, offset, (place, kinds, truth) in zip(
                logits.split(counts), offsets.split(counts), chosen, strict=True
            ):
                total = max(len(kinds), 1)
                by_class.append(functional.cross_entropy(score, kinds, reduction="sum") / total)
                at = torch.where(kinds > 0)[0]
                taken = offset.unflatten(1, (-1, 6))[at, kinds[at] - 1]
                aim = encode(truth[at], place[at], self._weights)
                loss = functional.smooth_l1_loss(taken, aim, beta=config.roi_beta, reduction="sum")
                by_box.append(loss / total)
        return first | {"roi_class": torch.stack(by_class).mean(), "roi_box": torch.stack(by_box).mean()}

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detection]:
        """Detect boxes (n, 6), with scores and labels, in each volume of (B, C, D, H, W)."""
        config, size = self.config, images.shape[2:]
        levels = self.pyramid(self.encoder(images), size)
        rows = self._first(levels)
        anchors = grid_anchors(self.plan.strides, self.shapes, size)
        with torch.autocast(images.device.type, enabled=False):
            proposals = self._propose(rows, anchors, size, config.proposals[1])
            logits, offsets = self._second(levels, proposals)
            counts = [len(place) for place in proposals]
            detections = []
            for score, offset, place in zip(
                logits.softmax(dim=1).split(counts), offsets.split(counts), proposals, strict=True
            ):
                scores = score[:, 1:].flatten()
                kinds = torch.arange(config.classes, device=score.device).repeat(len(place))
                repeated = place.repeat_interleave(config.classes, dim=0)
                boxes = clip(decode(offset.reshape(-1, 6), repeated, self._weights), size)
                kept = torch.where((scores > config.score) & _has_extent(boxes))[0]
                order = nms(boxes[kept], scores[kept], config.nms, kinds[kept], config.detections)
                kept = kept[order]
                detections.append(Detection(boxes[kept], scores[kept], kinds[kept]))
        return detections

    # ------------------------------------------------------------------------------------------------

    @property
    def _weights(self) -> list[float]:
        place, side = self.config.box_weights
        return [place] * 3 + [side] * 3

    def _first(self, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Compute, for each level, objectness (B, anchors) and offsets (B, anchors, 6), float32."""
        outputs = []
        for level in levels:
            x = self.rpn(level)
            scores = self.objectness(x).float().permute(0, 2, 3, 4, 1).flatten(1)
            offsets = self.offsets(x).float().unflatten(1, (self.plan.count, 6))
            outputs.append((scores, offsets.permute(0, 3, 4, 5, 1, 2).flatten(1, 4)))
        return outputs

    def _propose(
        self,
        rows: Sequence[tuple[Tensor, Tensor]],
        anchors: Sequence[Tensor],
        size: Sequence[int],
        most: int,
    ) -> list[Tensor]:
        """Propose boxes of each volume (n, 6), the best first."""
        config, proposals = self.config, []
        for n in range(len(rows[0][0])):
            boxes, scores, groups = [], [], []
            for level, ((logits, offsets), base) in enumerate(zip(rows, anchors, strict=True)):
                top = logits[n].topk(min(config.candidates, len(base))).indices
                boxes.append(clip(decode(offsets[n, top], base[top]), size))
                scores.append(logits[n, top])
                groups.append(torch.full_like(top, level))
            joined, ranked, level_of_each = torch.cat(boxes), torch.cat(scores), torch.cat(groups)
            solid = torch.where(_has_extent(joined))[0]
            joined, ranked, level_of_each = joined[solid], ranked[solid], level_of_each[solid]
            proposals.append(joined[nms(joined, ranked, config.proposal_nms, level_of_each, most)])
        return proposals

    def _rpn_losses(
        self,
        rows: Sequence[tuple[Tensor, Tensor]],
        anchors: Tensor,
        boxes: Sequence[Tensor],
        rng: BatchRng | None,
    ) -> dict[str, Tensor]:
        config = self.config
        logits = torch.cat([part for part, _ in rows], dim=1)
        offsets = torch.cat([part for _, part in rows], dim=1)
        keys = sampling_keys(rng, len(boxes), len(anchors), anchors.device)
        by_class, by_box = [], []
        for n, truths in enumerate(boxes):
            with torch.no_grad():
                labels, owner = match_anchors(anchors, truths, config.rpn_iou)
                at = sample(labels, keys[n], config.rpn_samples, config.rpn_positive)
            total = max(len(at), 1)
            goal = (labels[at] > 0).float()
            loss = functional.binary_cross_entropy_with_logits(logits[n, at], goal, reduction="sum")
            by_class.append(loss / total)
            own = at[labels[at] > 0]
            aim = encode(truths[owner[own]], anchors[own]) if len(own) else offsets.new_zeros(0, 6)
            loss = functional.smooth_l1_loss(offsets[n, own], aim, beta=config.rpn_beta, reduction="sum")
            by_box.append(loss / total)
        return {"rpn_class": torch.stack(by_class).mean(), "rpn_box": torch.stack(by_box).mean()}

    def _assign(
        self,
        proposals: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        rng: BatchRng | None,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Choose the places (n, 6) of each volume for the second loss, with their classes and boxes."""
        config = self.config
        room = config.proposals[0] + max((len(truth) for truth in boxes), default=0)
        keys = sampling_keys(rng, len(boxes), room, proposals[0].device)
        chosen = []
        for n, (place, truths, kinds) in enumerate(zip(proposals, boxes, labels, strict=True)):
            place = torch.cat([place, truths])  # so that the second stage sees its boxes from the start
            goal = torch.zeros(len(place), dtype=torch.long, device=place.device)
            owned = torch.zeros_like(place)
            if len(truths):
                best, owner = box_overlap(place, truths).max(dim=1)
                goal = torch.where(best >= config.roi_iou, kinds.long()[owner] + 1, goal)
                owned = truths[owner]
            at = sample(goal, keys[n, : len(goal)], config.roi_samples, config.roi_positive)
            chosen.append((place[at], goal[at], owned[at]))
        return chosen

    def _second(self, levels: Sequence[Tensor], places: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute class logits (N, classes + 1) and offsets (N, 6 classes) of all places, by volume."""
        config = self.config
        joined = torch.cat(list(places))
        of_level = level_of(joined, self.plan.strides, config.pool_size * 0.6)
        volume = torch.cat([torch.full((len(p),), n, device=p.device) for n, p in enumerate(places)])
        pooled = joined.new_zeros(len(joined), levels[0].shape[1], *[config.pool_size] * 3)
        for number, (level, stride) in enumerate(zip(levels, self.plan.strides, strict=True)):
            here = of_level == number
            split = [joined[here & (volume == n)] for n in range(len(places))]
            # Boolean places keep the order of volumes, as roi_align3d gives them.
            taken = roi_align3d(level, split, config.pool_size, stride, 2, centred=True)
            pooled = pooled.index_put((torch.where(here)[0],), taken)
        features = self.head(pooled)
        return self.classifier(features), self.regressor(features)


def match_anchors(anchors: Tensor, boxes: Tensor, iou: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Match each anchor to the box that it is trained on, as in Faster R-CNN.

    Args:
        anchors: Anchors (n, 6).
        boxes: Boxes (m, 6); m may be 0.
        iou: Overlaps of an anchor with the boxes. Below the first for all boxes it is background; from the
            second on, or as the best of a box, it is the box's own.

    Returns:
        Labels (n,), 1 a box's, 0 background, -1 neither; and the box, (n,).
    """
    labels = torch.zeros(len(anchors), dtype=torch.long, device=anchors.device)
    if not len(boxes):
        return labels, torch.zeros_like(labels)
    overlap = box_overlap(anchors, boxes)
    best, owner = overlap.max(dim=1)
    labels[best >= iou[0]] = -1
    labels[best >= iou[1]] = 1
    # The best anchors of each box, all that tie for it.
    top = overlap.max(dim=0).values
    for n in range(len(boxes)):
        if top[n] > 0:
            own = overlap[:, n] >= top[n] - 1e-6
            labels[own], owner[own] = 1, n
    return labels, owner


def _has_extent(boxes: Tensor) -> Tensor:
    return (boxes[:, 3:] - boxes[:, :3] > 1e-2).all(dim=1)
