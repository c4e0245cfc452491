"""The two-stage detector in 2D, Faster R-CNN with a feature pyramid, over any encoder's maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl3d.encoder import Encoder
from ssl3d.encoders import norms
from ssl3d.encoders.convolutions import conv2d
from ssl3d.rng import BatchRng

_CANONICAL = 14  # side of a box, in cells of the level it is pooled from: 224 pixels at stride 16


@dataclass(frozen=True)
class TwoStageConfig:
    """Options of the two-stage detector; the defaults are those of Faster R-CNN with FPN on COCO.

    Attributes:
        classes: Number of kinds of objects, without the background.
        depth: Number of slices of an input that is no image (D = 1 always works).
        fusion: Fusion of the depth: `learned` weights per channel, or the `centre` slice.
        channels: Number of channels of the pyramid.
        min_stride: Smallest stride of the encoder's maps that enter the pyramid.
        pool_level: Whether a level of twice the largest stride is added, for the largest objects.
        norm_groups: Number of groups of the pyramid's group norm; lowered to what divides `channels`, 0
            for no norm.
        anchor_scale: Side of a square anchor, in strides of its level.
        anchor_ratios: Ratios of height to width of the anchors.
        hidden: Width of the two layers of the box head.
        pool_size: Number of cells that a proposal is pooled to, along each side.
        proposals: Numbers of proposals kept of an image while training, and in evaluation; as many enter
            the suppression from each level.
        proposal_nms: Overlap above which the worse of two proposals goes.
        rpn_iou: Overlaps of an anchor with a box: by the second at least it is the box's own; below the
            first for all boxes it is background.
        rpn_samples: Number of anchors per image in the loss.
        rpn_positive: Largest share of them that are a box's.
        rpn_beta: Difference at which smooth L1 turns linear, for anchors.
        roi_iou: Least overlap of a proposal with a box to be its own.
        roi_samples: Number of proposals per image in the loss.
        roi_positive: Largest share of them that are a box's.
        roi_beta: Difference at which smooth L1 turns linear, for proposals.
        box_stds: Standard deviations of the offsets (x, y, width, height) of proposals, which are divided
            by them.
        score: Least score of a detection.
        nms: Overlap above which the worse of two detections of a class goes.
        detections: Largest number of detections of an image.
    """

    classes: int = 1
    depth: int = 1
    fusion: Literal["learned", "centre"] = "learned"
    channels: int = 256
    min_stride: int = 4
    pool_level: bool = True
    norm_groups: int = 32
    anchor_scale: float = 4.0
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    hidden: int = 1024
    pool_size: int = 7
    proposals: tuple[int, int] = (2000, 1000)
    proposal_nms: float = 0.7
    rpn_iou: tuple[float, float] = (0.3, 0.7)
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    rpn_beta: float = 1 / 9
    roi_iou: float = 0.5
    roi_samples: int = 512
    roi_positive: float = 0.25
    roi_beta: float = 1.0
    box_stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    score: float = 0.05
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        counts = ("classes", "depth", "channels", "min_stride", "hidden", "pool_size")
        for name in (*counts, "rpn_samples", "roi_samples", "detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.fusion not in ("learned", "centre"):
            raise ValueError(f"fusion is {self.fusion!r}; choose learned or centre")
        if self.norm_groups < 0:
            raise ValueError(f"norm_groups must be 0 (no norm) or more, not {self.norm_groups}")
        if not self.anchor_ratios or min(self.anchor_ratios) <= 0 or self.anchor_scale <= 0:
            raise ValueError("anchor_scale and anchor_ratios must be positive, and there must be a ratio")
        if len(self.proposals) != 2 or min(self.proposals) < 1:
            raise ValueError(f"proposals needs two numbers of at least 1, not {self.proposals}")
        if len(self.rpn_iou) != 2 or not 0 < self.rpn_iou[0] <= self.rpn_iou[1] <= 1:
            raise ValueError(f"rpn_iou needs two overlaps, the lower first, not {self.rpn_iou}")
        for name in ("proposal_nms", "roi_iou", "nms", "rpn_positive", "roi_positive"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(self, name):g}")
        for name in ("rpn_beta", "roi_beta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name):g}")
        if len(self.box_stds) != 4 or min(self.box_stds) <= 0:
            raise ValueError(f"box_stds needs four positive numbers, not {self.box_stds}")
        if not 0 <= self.score < 1:
            raise ValueError(f"score must be from 0 up to 1, not {self.score:g}")


class Detection(NamedTuple):
    """Boxes that were found in one image.

    Attributes:
        boxes: Boxes (n, 4), y1 x1 y2 x2 in pixels, upper corner exclusive.
        scores: Scores (n,), falling.
        labels: Labels (n,), int64, from 0.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class DetectionTargets(NamedTuple):
    """True boxes of the B images of a batch.

    Attributes:
        boxes: Boxes of each image (n, 4), y1 x1 y2 x2; n may be 0.
        labels: Labels of each image (n,), int64, from 0.
    """

    boxes: list[Tensor]
    labels: list[Tensor]


class Proposals(NamedTuple):
    """Result of the region proposal network.

    Attributes:
        boxes: Proposals of each image (n, 4), x1 y1 x2 y2, the best first; without gradients.
        losses: Losses `rpn_class` and `rpn_box` of each image, (B,); empty without targets.
    """

    boxes: list[Tensor]
    losses: dict[str, Tensor]


class DepthFusion(nn.Module):
    """A feature map (B, C, D, H, W) made flat, (B, C, H, W).

    `learned` is a 1 x 1 convolution over depth in as many groups as there are channels, as MP3D has it
    (arXiv 2012.08770): each channel a weighted sum of its slices. It begins as their mean. `centre` takes
    the slice in the middle. A map of depth 1 is that slice.

    Args:
        channels: Number of channels C.
        depth: Number of slices D.
        how: Kind of fusion, `learned` or `centre`.
    """

    def __init__(self, channels: int, depth: int, how: str = "learned") -> None:
        super().__init__()
        self.depth = depth
        learned = how == "learned" and depth > 1
        self.weight = nn.Parameter(torch.full((channels, depth), 1 / depth)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """Fuse (B, C, D, H, W) to (B, C, H, W)."""
        depth = x.shape[2]
        if depth == 1:
            return x.squeeze(2)
        if depth != self.depth:
            raise ValueError(f"a map of depth {depth}: this detector fuses {self.depth} slices, or one")
        if self.weight is None:
            return x[:, :, depth // 2]
        return torch.einsum("bcdhw,cd->bchw", x, self.weight.to(x.dtype))


class Pyramid(nn.Module):
    """The encoder's maps, flat, through torchvision's feature pyramid network, (B, channels, h, w) each.

    Of the maps with equal strides the deepest counts. A backbone for torchvision's detectors once it is
    joined to its encoder: see `PyramidOf`.

    Attributes:
        strides: Strides of the levels, in pixels.
        sources: Indices of the encoder's maps that the levels are made of.

    Args:
        encoder: Encoder of which only `channels` and `strides` are read; it is not kept.
        config: Options of the detector.

    Raises:
        ValueError: The strides along H and W differ, or are below `min_stride` throughout.
    """

    def __init__(self, encoder: Encoder, config: TwoStageConfig) -> None:
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        chosen: dict[int, int] = {}
        for n, (_, height, width) in enumerate(encoder.strides):
            if height != width:
                raise ValueError(
                    f"the encoder's strides along H and W are {height} and {width}; boxes need equal ones"
                )
            if height >= config.min_stride:
                chosen[height] = n
        if not chosen:
            largest = max(stride[1] for stride in encoder.strides)
            raise ValueError(f"min_stride is {config.min_stride}, the encoder's largest stride {largest}")
        levels = sorted(chosen)
        self.sources = tuple(chosen[stride] for stride in levels)
        self.strides = tuple(levels) + ((2 * levels[-1],) if config.pool_level else ())
        self.out_channels = config.channels
        self.fusion = nn.ModuleList(
            DepthFusion(encoder.channels[n], -(-config.depth // encoder.strides[n][0]), config.fusion)
            for n in self.sources
        )

        def norm(channels: int) -> nn.Module:
            return norms.norm("group", channels, config.norm_groups)

        self.fpn = FeaturePyramidNetwork(
            [encoder.channels[n] for n in self.sources],
            config.channels,
            LastLevelMaxPool() if config.pool_level else None,
            norm if config.norm_groups else None,
        )
        _carefully(self.fpn)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the levels by name, fine to coarse; the last is `pool` where that was added."""
        flat = {
            str(level): fuse(maps[n])
            for level, (n, fuse) in enumerate(zip(self.sources, self.fusion, strict=True))
        }
        return cast("dict[str, Tensor]", self.fpn(flat))


class PyramidOf(nn.Module):
    """An encoder and its pyramid as a backbone of torchvision's detectors: (B, C, H, W) in, levels out.

    Attributes:
        out_channels: Number of channels of every level.

    Args:
        encoder: Encoder of any kind.
        pyramid: Pyramid made for the encoder.
    """

    def __init__(self, encoder: Encoder, pyramid: Pyramid) -> None:
        super().__init__()
        self.encoder, self.pyramid = encoder, pyramid
        self.out_channels = pyramid.out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the levels of (B, C, H, W), which becomes (B, C, 1, H, W), or of (B, C, D, H, W)."""
        maps = self.encoder(x.unsqueeze(2) if x.ndim == 4 else x)
        return cast("dict[str, Tensor]", self.pyramid(maps))


class TwoStageDetector2d(nn.Module):
    """Faster R-CNN with a feature pyramid over any encoder: torchvision's parts, with GroupNorm.

    Ren, He, Girshick, Sun: Faster R-CNN, NeurIPS 2015, arXiv 1506.01497; Lin et al.: Feature Pyramid
    Networks for Object Detection, CVPR 2017, arXiv 1612.03144.

    Images are (B, C, D, H, W). D = 1 is an image; a slab of `config.depth` slices is detected in as one,
    its depth being fused before the pyramid. Everything after the pyramid is in single precision.

    Differs from torchvision's: losses are means over images (of each image's mean over its samples), so
    that they do not depend on how a batch is shared out over ranks; what is sampled is drawn from a
    `BatchRng`; anchors lie at the encoder's strides, for any size of image; the proposals' smooth L1 turns
    linear at 1, not at 1/9.

    Attributes:
        encoder: Encoder that was given. Forward passes of parts (`propose`, `refine`) take its maps.

    Args:
        encoder: Encoder of any kind.
        config: Options of the detector; the defaults if None.

    Raises:
        ValueError: The encoder's strides do not serve; see `Pyramid`.
    """

    def __init__(self, encoder: Encoder, config: TwoStageConfig | None = None) -> None:
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.roi_heads import RoIHeads
        from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
        from torchvision.ops import MultiScaleRoIAlign

        super().__init__()
        self.config = config = config or TwoStageConfig()
        self.encoder = encoder
        self.pyramid = Pyramid(encoder, config)
        strides = self.pyramid.strides
        sizes = tuple((config.anchor_scale * stride,) for stride in strides)
        anchors = AnchorGenerator(sizes, (tuple(config.anchor_ratios),) * len(strides))
        head = RPNHead(config.channels, len(config.anchor_ratios))
        _carefully(head)
        kept = {"training": config.proposals[0], "testing": config.proposals[1]}
        self.rpn = RegionProposalNetwork(
            anchors, head, config.rpn_iou[1], config.rpn_iou[0], config.rpn_samples, config.rpn_positive,
            kept, kept, config.proposal_nms,
        )  # fmt: skip
        pooled = [str(n) for n in range(len(self.pyramid.sources))]
        align = MultiScaleRoIAlign(pooled, config.pool_size, 2)
        # Known, not guessed from the first image's size.
        align.scales = [1 / stride for stride in strides[: len(pooled)]]
        align.map_levels = _Levels(strides[: len(pooled)])
        weights = tuple(1 / std for std in config.box_stds)
        self.roi = RoIHeads(
            align,
            TwoMLPHead(config.channels * config.pool_size**2, config.hidden),
            FastRCNNPredictor(config.hidden, config.classes + 1),
            config.roi_iou, config.roi_iou, config.roi_samples, config.roi_positive, weights,
            config.score, config.nms, config.detections,
        )  # fmt: skip

    def losses(
        self,
        images: Tensor,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        rng: BatchRng | None = None,
    ) -> dict[str, Tensor]:
        """Compute what training minimises: `rpn_class`, `rpn_box`, `roi_class`, `roi_box`, scalars.

        Args:
            images: Images (B, C, D, H, W).
            boxes: Boxes of each image (n, 4), y1 x1 y2 x2 in pixels; n may be 0.
            labels: Labels of each image (n,), from 0.
            rng: Generators of the B images, which decide what is sampled; None for torch's global
                generator.
        """
        targets = DetectionTargets(list(boxes), list(labels))
        size = images.shape[-2:]
        levels = self.levels(self.encoder(images))
        first = self.propose(levels, size, targets, rng)
        both = first.losses | self.refine(levels, size, first.boxes, targets, rng)
        return {name: loss.mean() for name, loss in both.items()}

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detection]:
        """Detect boxes, with scores and labels, in each image of (B, C, D, H, W)."""
        size = images.shape[-2:]
        levels = self.levels(self.encoder(images))
        return self.read(levels, size, self.propose(levels, size).boxes)

    # Parts, for those who train them apart ---------------------------------------------------------

    def levels(self, maps: Sequence[Tensor], pyramid: Pyramid | None = None) -> dict[str, Tensor]:
        """Compute the pyramid's levels (B, channels, h, w) of the encoder's maps, in single precision."""
        levels = (pyramid or self.pyramid)(maps)
        return {name: level.float() for name, level in levels.items()}

    def propose(
        self,
        levels: dict[str, Tensor],
        size: Sequence[int],
        targets: DetectionTargets | None = None,
        rng: BatchRng | None = None,
    ) -> Proposals:
        """Run the first stage, which finds the anchors that hold something.

        Args:
            levels: Levels of the pyramid, from `levels`.
            size: Size (H, W) of the images.
            targets: True boxes, for the losses.
            rng: Generators that decide which anchors the losses are taken over.
        """
        from torchvision.models.detection.rpn import concat_box_prediction_layers

        rpn, maps = self.rpn, list(levels.values())
        with torch.autocast(maps[0].device.type, enabled=False):
            objectness, offsets = rpn.head(maps)
            counts = [level[0].numel() for level in objectness]
            objectness, offsets = concat_box_prediction_layers(objectness, offsets)
            images = len(maps[0])
            anchors = self._anchors(maps)
            with torch.no_grad():
                proposed = rpn.box_coder.decode(offsets.detach(), [anchors] * images)
                kept, _ = rpn.filter_proposals(
                    proposed.view(images, -1, 4), objectness, [(size[0], size[1])] * images, counts
                )
            if targets is None:
                return Proposals(kept, {})
            return Proposals(kept, self._rpn_losses(objectness, offsets, anchors, targets, rng))

    def refine(
        self,
        levels: dict[str, Tensor],
        size: Sequence[int],
        proposals: Sequence[Tensor],
        targets: DetectionTargets,
        rng: BatchRng | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of the second stage, `roi_class` and `roi_box`, (B,) each.

        Args:
            levels: Levels of the pyramid, from `levels`.
            size: Size (H, W) of the images.
            proposals: Proposals of each image (n, 4), x1 y1 x2 y2; the true boxes join them.
            targets: True boxes and labels.
            rng: Generators that decide which proposals the losses are taken over.
        """
        config, roi = self.config, self.roi
        device = next(iter(levels.values())).device
        with torch.autocast(device.type, enabled=False):
            with torch.no_grad():
                truths = [xyxy(boxes).float() for boxes in targets.boxes]
                classes = [labels + 1 for labels in targets.labels]
                both = roi.add_gt_proposals(list(proposals), truths)
                owners, owned = roi.assign_targets_to_proposals(both, truths, classes)
                keys = sampling_keys(
                    rng, len(both), config.proposals[0] + max(map(len, truths), default=0), device
                )
                chosen = [
                    sample(labels, keys[n, : len(labels)], config.roi_samples, config.roi_positive)
                    for n, labels in enumerate(owned)
                ]
                taken = [box[at] for box, at in zip(both, chosen, strict=True)]
                wanted = [labels[at] for labels, at in zip(owned, chosen, strict=True)]
                matched = [
                    truth[owner[at]] if len(truth) else box.new_zeros(len(at), 4)
                    for truth, owner, at, box in zip(truths, owners, chosen, taken, strict=True)
                ]
            logits, offsets = self._second(levels, size, taken)
            counts = [len(box) for box in taken]
            by_class, by_box = [], []
            for score, offset, goal, truth, box in zip(
                logits.split(counts), offsets.split(counts), wanted, matched, taken, strict=True
            ):
                total = max(len(goal), 1)
                by_class.append(functional.cross_entropy(score, goal, reduction="sum") / total)
                at = torch.where(goal > 0)[0]
                own = offset.view(len(goal), -1, 4)[at, goal[at]]
                aim = roi.box_coder.encode_single(truth[at], box[at])
                by_box.append(
                    functional.smooth_l1_loss(own, aim, beta=config.roi_beta, reduction="sum") / total
                )
            return {"roi_class": torch.stack(by_class), "roi_box": torch.stack(by_box)}

    @torch.no_grad()
    def read(
        self, levels: dict[str, Tensor], size: Sequence[int], proposals: Sequence[Tensor]
    ) -> list[Detection]:
        """Read detections off the proposals (n, 4), x1 y1 x2 y2, of each image by the second stage."""
        roi = self.roi
        with torch.autocast(next(iter(levels.values())).device.type, enabled=False):
            logits, offsets = self._second(levels, size, list(proposals))
            results = roi.postprocess_detections(
                logits, offsets, list(proposals), [(size[0], size[1])] * len(proposals)
            )
        return [
            Detection(yxyx(boxes), scores, labels - 1)
            for boxes, scores, labels in zip(*results, strict=True)
        ]

    # ------------------------------------------------------------------------------------------------

    def _second(
        self, levels: dict[str, Tensor], size: Sequence[int], proposals: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Compute class logits (N, classes + 1) and offsets (N, 4 (classes + 1)) of all proposals."""
        roi = self.roi
        pooled = roi.box_roi_pool(levels, proposals, [(size[0], size[1])] * len(proposals))
        logits, offsets = roi.box_predictor(roi.box_head(pooled))
        return logits, offsets

    def _anchors(self, maps: Sequence[Tensor]) -> Tensor:
        """Lay the anchors (N, 4), x1 y1 x2 y2, of one image; every level's at its stride."""
        generator: Any = self.rpn.anchor_generator
        generator.set_cell_anchors(maps[0].dtype, maps[0].device)
        strides = [[torch.tensor(stride, device=maps[0].device)] * 2 for stride in self.pyramid.strides]
        return torch.cat(generator.grid_anchors([list(level.shape[-2:]) for level in maps], strides))

    def _rpn_losses(
        self,
        objectness: Tensor,
        offsets: Tensor,
        anchors: Tensor,
        targets: DetectionTargets,
        rng: BatchRng | None,
    ) -> dict[str, Tensor]:
        config, rpn, images = self.config, self.rpn, len(targets.boxes)
        with torch.no_grad():
            truths = [{"boxes": xyxy(boxes).float()} for boxes in targets.boxes]
            labels, matched = rpn.assign_targets_to_anchors([anchors] * images, truths)
            keys = sampling_keys(rng, images, len(anchors), anchors.device)
            chosen = [
                sample(label, key, config.rpn_samples, config.rpn_positive)
                for label, key in zip(labels, keys, strict=True)
            ]
        by_class, by_box = [], []
        for logit, offset, label, match, at in zip(
            objectness.view(images, -1), offsets.view(images, -1, 4), labels, matched, chosen, strict=True
        ):
            total = max(len(at), 1)
            by_class.append(
                functional.binary_cross_entropy_with_logits(logit[at], label[at], reduction="sum") / total
            )
            own = at[label[at] > 0]
            aim = rpn.box_coder.encode_single(match[own], anchors[own])
            by_box.append(
                functional.smooth_l1_loss(offset[own], aim, beta=config.rpn_beta, reduction="sum") / total
            )
        return {"rpn_class": torch.stack(by_class), "rpn_box": torch.stack(by_box)}


def sample(labels: Tensor, keys: Tensor, count: int, positive: float) -> Tensor:
    """Choose the indices, rising, of those of N candidates that a loss is taken over.

    At most `count`: up to the share `positive` of those of an object, the rest background, those with the
    smallest keys of each kind. As torchvision's sampler, but for the order, which is given.

    Args:
        labels: Labels of the candidates (N,): above 0 an object, 0 background, below 0 ignored.
        keys: Random keys of the candidates (N,).
        count: Number of candidates wanted.
        positive: Largest share of them that is an object's.
    """

    def smallest(of: Tensor, most: int) -> Tensor:
        at = torch.where(of)[0]
        return at[keys[at].argsort(stable=True)[:most]]

    objects = smallest(labels > 0, int(count * positive))
    return torch.cat([objects, smallest(labels == 0, count - len(objects))]).sort().values


def xyxy(boxes: Tensor) -> Tensor:
    """Reorder boxes (n, 4) from y1 x1 y2 x2 to torchvision's x1 y1 x2 y2."""
    return boxes[:, [1, 0, 3, 2]]


def yxyx(boxes: Tensor) -> Tensor:
    """Reorder boxes (n, 4) from torchvision's x1 y1 x2 y2 to y1 x1 y2 x2."""
    return boxes[:, [1, 0, 3, 2]]


def sampling_keys(rng: BatchRng | None, images: int, count: int, device: torch.device) -> Tensor:
    """Draw the random keys (images, count) by which `sample` chooses."""
    return torch.rand(images, count, device=device) if rng is None else rng.uniform(count)


class _Levels:
    """Choice of the level a box is pooled from: the coarsest with 14 cells a side, else the finest.

    Equation 1 of the pyramid's paper, for any strides.
    """

    def __init__(self, strides: Sequence[int]) -> None:
        self.strides = tuple(strides)

    def __call__(self, boxes: list[Tensor]) -> Tensor:
        """Return the level (N,) of all boxes."""
        joined = torch.cat(boxes)
        side = ((joined[:, 2] - joined[:, 0]) * (joined[:, 3] - joined[:, 1])).clamp_min(0).sqrt()
        steps = torch.tensor(self.strides[1:], device=joined.device, dtype=joined.dtype)
        return (side[:, None] >= _CANONICAL * steps * (1 - 1e-6)).sum(1)


class _Conv2d(nn.Conv2d):
    """`nn.Conv2d` whose gradients are right on small padded maps in bfloat16; see `conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W) to (B, C', H', W')."""
        stride, padding = cast("tuple[int, int]", self.stride), cast("tuple[int, int]", self.padding)
        return conv2d(input, self.weight, stride, padding, self.groups, self.bias)


def _carefully(module: nn.Module) -> None:
    """Replace torchvision's convolutions by `_Conv2d`, with their weights."""
    for name, child in module.named_children():
        if type(child) is nn.Conv2d:
            kernel, stride = (
                cast("tuple[int, int]", child.kernel_size),
                cast("tuple[int, int]", child.stride),
            )
            padding, bias = cast("tuple[int, int]", child.padding), child.bias is not None
            own = _Conv2d(child.in_channels, child.out_channels, kernel, stride, padding, bias=bias)
            own.load_state_dict(child.state_dict())
            setattr(module, name, own)
        else:
            _carefully(child)
