"""The one-stage detector in 3D: RetinaNet over any encoder's maps, by MONAI's parts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl3d.detection.anchors3d import AnchorPlan, grid_anchors
from ssl3d.detection.boxes3d import box_overlap
from ssl3d.detection.pyramid3d import Conv3x3x3, Pyramid3d, conv_block
from ssl3d.detection.two_stage2d import Detection
from ssl3d.encoder import Encoder
from ssl3d.errors import UsageError
from ssl3d.rng import BatchRng


@dataclass(frozen=True)
class RetinaNet3dConfig:
    """Options of the one-stage detector; the defaults are nnDetection's, but for its width.

    Attributes:
        classes: Number of kinds of objects.
        channels: Number of channels of the pyramid and the heads (nnDetection: 128).
        depth: Number of convolutions of each head before the last.
        candidates: Number of anchors per level that are nearest to a box and compete for it (ATSS).
        samples: Number of anchors per volume in the classification loss.
        positive: Largest share of them that are a box's.
        pool: Factor of the pool that background anchors are drawn from: so many times as many with the
            highest scores.
        prior: Score of every anchor before training.
        beta: Difference at which smooth L1 turns linear.
        score: Least score of a detection.
        nms: Overlap above which the worse of two detections of a class goes.
        top: Number of candidates per level before that.
        detections: Largest number of detections of a volume.
    """

    classes: int = 1
    channels: int = 64
    depth: int = 2
    candidates: int = 4
    samples: int = 32
    positive: float = 0.33
    pool: int = 20
    prior: float = 0.01
    beta: float = 1 / 9
    score: float = 0.02
    nms: float = 0.22
    top: int = 1000
    detections: int = 100

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        for name in ("classes", "channels", "candidates", "samples", "pool", "top", "detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.depth < 0:
            raise ValueError(f"depth must be 0 or more, not {self.depth}")
        for name in ("positive", "prior", "nms", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(self, name):g}")
        if not 0 <= self.score < 1:
            raise ValueError(f"score must be from 0 up to 1, not {self.score:g}")


class RetinaNet3d(nn.Module):
    """RetinaNet in 3D (Lin et al., ICCV 2017, arXiv 1708.02002), trained as nnDetection does.

    Anchors are matched by ATSS (Zhang et al., CVPR 2020, arXiv 1912.02424), background anchors mined
    among the hardest, the class loss is binary cross-entropy over both: matcher, sampler, box coder and
    the selection of boxes are MONAI's `RetinaNetDetector` (nnDetection: Baumgartner et al., MICCAI 2021,
    arXiv 2106.00817).

    A box to which ATSS gives no anchor (its threshold can lie above the best overlap, where the box is
    smaller than all anchors) gets the best ones, as in Faster R-CNN.

    Any strides and sizes, thin volumes and images (D = 1): nothing is padded, and anchors lie where the
    maps' voxels do. What follows the heads is in single precision. Losses are means over volumes (of each
    volume's mean over its samples), so that they do not depend on how a batch is shared out over ranks.

    Differs from nnDetection's: smooth L1 of the offsets instead of GIoU, three shapes of anchors per place
    found from the data, and no segmentation branch.

    Attributes:
        encoder: Encoder that was given.
        plan: Plan of the levels, with the anchors to begin with.
        shapes: Buffer of the sides of the anchors in use (levels, count, 3); set it from `fit_shapes`.

    Args:
        encoder: Encoder of any kind.
        plan: Plan from `plan_anchors`.
        config: Options of the detector; the defaults if None.

    Raises:
        UsageError: MONAI is not installed.
    """

    def __init__(self, encoder: Encoder, plan: AnchorPlan, config: RetinaNet3dConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RetinaNet3dConfig()
        self.encoder, self.plan = encoder, plan
        self.shapes: Tensor
        self.register_buffer("shapes", torch.tensor(plan.shapes, dtype=torch.float32))
        width, count = config.channels, plan.count
        self.pyramid = Pyramid3d(encoder, plan.strides, width)
        logits, offsets = Conv3x3x3(width, count * config.classes), Conv3x3x3(width, count * 6)
        for last in (logits, offsets):
            nn.init.normal_(last.weight, std=0.01)
        prior = -math.log((1 - config.prior) / config.prior)
        with torch.no_grad():
            for last, value in ((logits, prior), (offsets, 0.0)):
                last.get_parameter("bias").fill_(value)
        self.classifier = nn.Sequential(*(conv_block(width, width) for _ in range(config.depth)), logits)
        self.regressor = nn.Sequential(*(conv_block(width, width) for _ in range(config.depth)), offsets)
        self._monai = _monai_detector(config, count)

    def losses(
        self,
        images: Tensor,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        rng: BatchRng | None = None,
    ) -> dict[str, Tensor]:
        """Compute what training minimises: `class` and `box`, scalars.

        Args:
            images: Volumes (B, C, D, H, W).
            boxes: Boxes of each volume (n, 6), z1 y1 x1 z2 y2 x2 in voxels; n may be 0.
            labels: Labels of each volume (n,), from 0.
            rng: Generators of the B volumes, which decide which anchors are sampled; None for torch's
                global generator.
        """
        logits, offsets, sizes = self._outputs(images)
        anchors = torch.cat(grid_anchors(self.plan.strides, self.shapes, images.shape[2:]))
        places = [size // self.plan.count for size in sizes]
        seeds = None if rng is None else rng.integers(0, 2**62)
        by_class, by_box = [], []
        with torch.autocast(images.device.type, enabled=False):
            for n, (own, kinds) in enumerate(zip(boxes, labels, strict=True)):
                target = {"boxes": own.float(), "labels": kinds.long()}
                monai = self._monai
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "No anchor is matched", UserWarning)
                    matched = monai.compute_anchor_matched_idxs([anchors], [target], places)[0]
                    matched = own_best(matched, anchors, target["boxes"])
                with _drawn_with(None if seeds is None else int(seeds[n]), images.device):
                    score, goal = monai.get_cls_train_sample_per_image(logits[n], target, matched)
                by_class.append(functional.binary_cross_entropy_with_logits(score, goal))
                predicted, aim = monai.get_box_train_sample_per_image(offsets[n], target, anchors, matched)
                if len(predicted):
                    by_box.append(functional.smooth_l1_loss(predicted, aim, beta=self.config.beta))
                else:  # no box here, but every weight has a gradient on every rank
                    by_box.append(offsets[n].sum() * 0.0)
        return {"class": torch.stack(by_class).mean(), "box": torch.stack(by_box).mean()}

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detection]:
        """Detect boxes (n, 6), with scores and labels, in each volume of (B, C, D, H, W)."""
        logits, offsets, sizes = self._outputs(images)
        anchors = torch.cat(grid_anchors(self.plan.strides, self.shapes, images.shape[2:]))
        monai = self._monai
        places = [size // self.plan.count for size in sizes]
        with torch.autocast(images.device.type, enabled=False):
            results = monai.postprocess_detections(
                {monai.cls_key: logits, monai.box_reg_key: offsets},
                [anchors] * len(images),
                [list(images.shape[2:])] * len(images),
                places,
            )
        return [Detection(result["boxes"], result["labels_scores"], result["labels"]) for result in results]

    def _outputs(self, images: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Compute class logits (B, anchors, classes), offsets (B, anchors, 6) and anchors per level."""
        levels = self.pyramid(self.encoder(images), images.shape[2:])
        logits = [_rows(self.classifier(level), self.plan.count) for level in levels]
        offsets = [_rows(self.regressor(level), self.plan.count) for level in levels]
        return torch.cat(logits, dim=1), torch.cat(offsets, dim=1), [level.shape[1] for level in logits]


def own_best(matched: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
    """Give every box that has no anchor those that overlap it most.

    Args:
        matched: Box of each anchor, negative for none (n,).
        anchors: Anchors (n, 6).
        boxes: Boxes (m, 6).
    """
    alone = [n for n in range(len(boxes)) if not (matched == n).any()]
    if alone:
        matched = matched.clone()
        overlap = box_overlap(boxes[alone], anchors)
        for n, row in zip(alone, overlap, strict=True):
            if row.max() > 0:
                matched[row >= row.max() - 1e-6] = n
    return matched


def _rows(map_: Tensor, count: int) -> Tensor:
    """Reorder (B, count x values, d, h, w) to (B, d h w count, values), float32."""
    parts = map_.float().unflatten(1, (count, -1))
    return parts.permute(0, 3, 4, 5, 1, 2).flatten(1, 4)


def _monai_detector(config: RetinaNet3dConfig, count: int) -> Any:
    """Build MONAI's detector for its parts: it has no weights, and its network is never run."""
    try:
        from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
        from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
    except ImportError as error:
        raise UsageError(
            f"the RetinaNet detector needs MONAI ({error}): pip install 'ssl3d[detection]'"
        ) from error

    # Of the anchors it needs to know only how many there are in a place; ours know the strides.
    anchors = AnchorGeneratorWithAnchorShape((1.0,), [(8.0, 8.0, 8.0)] * count)
    detector = RetinaNetDetector(nn.Identity(), anchors, spatial_dims=3, num_classes=config.classes)
    detector.set_target_keys(box_key="boxes", label_key="labels")
    detector.set_atss_matcher(num_candidates=config.candidates, center_in_gt=False)
    detector.set_hard_negative_sampler(
        batch_size_per_image=config.samples,
        positive_fraction=config.positive,
        pool_size=config.pool,
        min_neg=1,
    )
    detector.set_box_selector_parameters(
        score_thresh=config.score,
        topk_candidates_per_level=config.top,
        nms_thresh=config.nms,
        detections_per_img=config.detections,
    )
    return detector


@contextmanager
def _drawn_with(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's global generator, from which MONAI's sampler draws, for a while."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
