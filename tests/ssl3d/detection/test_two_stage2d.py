"""The two-stage detector in 2D: torchvision's losses with the same weights, its parts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl3d.detection.two_stage2d import (
    DepthFusion,
    DetectionTargets,
    PyramidOf,
    TwoStageConfig,
    TwoStageDetector2d,
    sample,
    xyxy,
    yxyx,
)
from ssl3d.encoders.resnet import ResNet10
from ssl3d.rng import BatchRng, one_group

EVERYTHING = {"rpn_samples": 10**6, "roi_samples": 10**6}


def encoder(**options):
    return ResNet10(ResNet10.Config(**{"width": 8, "norm": "group", **options}))


def detector(seed=0, depth=1, **options):
    torch.manual_seed(seed)
    small = {"classes": 3, "channels": 16, "hidden": 24, "proposals": (64, 32), "depth": depth}
    return TwoStageDetector2d(encoder(), TwoStageConfig(**{**small, **options}))


def scene(images=2, size=(96, 128), seed=0):
    """Images and a few boxes in each, y1 x1 y2 x2."""
    rng = np.random.default_rng(seed)
    boxes, labels = [], []
    for n in range(images):
        low = rng.uniform(0, 60, (n + 1, 2))
        boxes.append(torch.tensor(np.concatenate([low, low + rng.uniform(8, 34, (n + 1, 2))], 1)).float())
        labels.append(torch.tensor(rng.integers(0, 3, n + 1)))
    return torch.from_numpy(rng.normal(size=(images, 1, 1, *size))).float(), boxes, labels


def torchvisions(ours):
    """torchvision's own Faster R-CNN with the weights of ours, without scaling, sampling everything."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    config, strides = ours.config, ours.pyramid.strides
    theirs = FasterRCNN(
        PyramidOf(ours.encoder, ours.pyramid),
        min_size=96, max_size=128, image_mean=[0.0], image_std=[1.0],
        rpn_anchor_generator=AnchorGenerator(
            tuple((int(4 * s),) for s in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        rpn_pre_nms_top_n_train=64, rpn_pre_nms_top_n_test=32,
        rpn_post_nms_top_n_train=64, rpn_post_nms_top_n_test=32,
        rpn_batch_size_per_image=10**6, box_batch_size_per_image=10**6,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        box_head=TwoMLPHead(config.channels * 49, config.hidden),
        box_predictor=FastRCNNPredictor(config.hidden, config.classes + 1),
    )  # fmt: skip
    theirs.rpn.head.load_state_dict(ours.rpn.head.state_dict())
    theirs.roi_heads.load_state_dict(ours.roi.state_dict())
    return theirs


def test_losses_and_detections_are_torchvisions_with_the_same_weights():
    # Its smooth L1 turns linear at 1/9 in both stages.
    ours = detector(roi_beta=1 / 9, **EVERYTHING)
    theirs = torchvisions(ours)
    x, boxes, labels = scene()
    names = {
        "rpn_class": "loss_objectness", "rpn_box": "loss_rpn_box_reg",
        "roi_class": "loss_classifier", "roi_box": "loss_box_reg",
    }  # fmt: skip
    each = []
    for n in range(2):
        found = ours.losses(x[n : n + 1], boxes[n : n + 1], labels[n : n + 1])
        target = {"boxes": boxes[n][:, [1, 0, 3, 2]], "labels": labels[n] + 1}
        expected = theirs([x[n, :, 0]], [target])
        for name, other in names.items():
            torch.testing.assert_close(found[name], expected[other], rtol=1e-4, atol=1e-6)
        each.append(found)
    # Of several images, the mean over images.
    both = ours.losses(x, boxes, labels)
    for name in names:
        torch.testing.assert_close(both[name], (each[0][name] + each[1][name]) / 2, rtol=1e-4, atol=1e-6)

    ours.eval(), theirs.eval()
    ours.roi.score_thresh = theirs.roi_heads.score_thresh = 0.2
    with torch.no_grad():
        expected = theirs([image[:, 0] for image in x])
    for found, other in zip(ours.detect(x), expected, strict=True):
        assert len(found.boxes)
        torch.testing.assert_close(found.boxes[:, [1, 0, 3, 2]], other["boxes"], rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(found.scores, other["scores"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.labels + 1, other["labels"])


def test_the_proposals_smooth_l1_is_the_configured_one():
    ours, other = detector(**EVERYTHING), detector(roi_beta=1 / 9, **EVERYTHING)
    x, boxes, labels = scene()
    assert not torch.allclose(*(d.losses(x, boxes, labels)["roi_box"] for d in (ours, other)))


@given(
    box=st.tuples(*[st.floats(0, 200)] * 2, *[st.floats(2, 150)] * 2),
    anchor=st.tuples(*[st.floats(0, 200)] * 2, *[st.floats(8, 150)] * 2),
)
@settings(max_examples=60, deadline=None)
def test_offsets_are_the_papers_and_lead_back_to_the_box(box, anchor):
    coder = _CODED.roi.box_coder
    corners = [torch.tensor([[x, y, x + w, y + h]]) for x, y, w, h in (box, anchor)]
    (x, y, w, h), (xa, ya, wa, ha) = box, anchor
    paper = [
        (x + w / 2 - xa - wa / 2) / wa / 0.1,
        (y + h / 2 - ya - ha / 2) / ha / 0.1,
        math.log(w / wa) / 0.2,
        math.log(h / ha) / 0.2,
    ]
    coded = coder.encode_single(*corners)
    torch.testing.assert_close(coded[0], torch.tensor(paper), rtol=1e-3, atol=2e-3)
    back = coder.decode_single(coded, corners[1])
    torch.testing.assert_close(back, corners[0], rtol=1e-3, atol=2e-2)


def test_an_offset_of_any_size_gives_a_finite_box():
    anchor = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    box = _CODED.rpn.box_coder.decode_single(torch.full((1, 4), 1e4), anchor)
    assert box.isfinite().all()
    assert (box[0, 2] - box[0, 0]).item() == pytest.approx(10 * 1000 / 16, rel=1e-3)


class _Stub(nn.Module):
    """Gives what it was told to."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


def test_a_perfect_second_stage_has_no_loss():
    ours = detector()
    x, boxes, labels = scene(1)
    levels = ours.levels(ours.encoder(x))
    count = 2 * len(boxes[0])  # the proposals, and the truths that join them
    logits = torch.full((count, 4), -30.0)
    logits[torch.arange(count), labels[0].repeat(2) + 1] = 30.0
    ours.roi.box_predictor = _Stub((logits, torch.zeros(count, 16)))
    losses = ours.refine(levels, x.shape[-2:], [xyxy(boxes[0])], DetectionTargets(boxes, labels))
    assert max(loss.item() for loss in losses.values()) < 1e-6
    # Read in evaluation, they are the detections.
    ours.roi.box_predictor = _Stub((logits[: len(boxes[0])], torch.zeros(len(boxes[0]), 16)))
    found = ours.eval().read(levels, x.shape[-2:], [xyxy(boxes[0])])[0]
    torch.testing.assert_close(found.boxes, boxes[0])
    assert found.labels.tolist() == labels[0].tolist()
    # The class that is not theirs costs what cross-entropy says.
    ours.roi.box_predictor = _Stub((logits.roll(1, dims=1), torch.zeros(count, 16)))
    wrong = ours.refine(levels, x.shape[-2:], [xyxy(boxes[0])], DetectionTargets(boxes, labels))
    assert wrong["roi_class"].item() == pytest.approx(60.0)


def test_a_perfect_first_stage_has_no_loss_and_proposes_the_boxes():
    ours = detector(**EVERYTHING)
    size = (96, 128)
    x, boxes, labels = scene(1, size)
    maps = list(ours.levels(ours.encoder(x)).values())
    anchors = ours._anchors(maps)
    truth = [{"boxes": xyxy(boxes[0])}]
    own, matched = ours.rpn.assign_targets_to_anchors([anchors], truth)
    offsets = ours.rpn.box_coder.encode_single(matched[0], anchors)
    offsets[own[0] <= 0] = 0
    score = torch.where(own[0] > 0, 30.0, -30.0)
    objectness, deltas, at = [], [], 0
    for level in maps:  # (1, A, H, W) and (1, 4 A, H, W), the anchors' order being H, W, A
        height, width = level.shape[-2:]
        n = height * width * 3
        objectness.append(score[at : at + n].view(1, height, width, 3).permute(0, 3, 1, 2))
        deltas.append(offsets[at : at + n].view(1, height, width, 12).permute(0, 3, 1, 2))
        at += n
    ours.rpn.head = _Stub((objectness, deltas))
    levels = dict(zip("0123", maps, strict=True))
    found = ours.propose(levels, size, DetectionTargets(boxes, labels))
    assert max(loss.item() for loss in found.losses.values()) < 1e-6
    torch.testing.assert_close(yxyx(found.boxes[0][: len(boxes[0])]), boxes[0], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("size", [(32, 32), (70, 45)])
def test_images_without_boxes_give_finite_losses_and_gradients(size):
    ours = detector()
    x = torch.randn(2, 1, 1, *size)
    nothing = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    losses = ours.losses(x, *nothing)
    assert losses["rpn_box"] == 0 and losses["roi_box"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
    assert ours.encoder.conv1.weight.grad.abs().sum() > 0


def test_anchors_lie_at_the_encoders_strides_whatever_the_image():
    ours = detector()
    maps = list(ours.levels(ours.encoder(torch.randn(1, 1, 1, 70, 45))).values())
    anchors = ours._anchors(maps)
    assert ours.pyramid.strides == (4, 8, 16, 32)
    height, width = 18, 12  # 70 / 4 and 45 / 4, rounded up
    assert maps[0].shape[-2:] == (height, width)
    first = anchors[: height * width * 3].view(height, width, 3, 4)
    middles = (first[..., :2] + first[..., 2:]) / 2
    torch.testing.assert_close(middles[5, 7, 1], torch.tensor([7 * 4.0, 5 * 4.0]))
    sides = (first[0, 0, :, 2:] - first[0, 0, :, :2]).prod(-1).sqrt()
    torch.testing.assert_close(sides, torch.full((3,), 16.0), rtol=0.05, atol=0.0)
    tall = first[0, 0, 2]  # ratio 2: twice as high as wide
    assert (tall[3] - tall[1]) / (tall[2] - tall[0]) == pytest.approx(2, rel=0.1)


def test_what_is_sampled_comes_from_the_generator_and_its_rows():
    ours = detector(rpn_samples=16, roi_samples=8)
    x, boxes, labels = scene(4)
    size = x.shape[-2:]
    levels = ours.levels(ours.encoder(x))

    def losses(rows, rng):
        part = {name: level[list(rows)] for name, level in levels.items()}
        targets = DetectionTargets([boxes[n] for n in rows], [labels[n] for n in rows])
        first = ours.propose(part, size, targets, rng)
        return first.losses["rpn_class"], ours.refine(part, size, first.boxes, targets, rng)["roi_class"]

    whole = losses(range(4), one_group(3, 4))
    part = losses((1, 3), BatchRng(3, (1, 3), 4))
    torch.testing.assert_close(whole[0][[1, 3]], part[0])
    other = losses(range(4), one_group(4, 4))
    assert not torch.allclose(whole[0], other[0])
    torch.manual_seed(0)
    again = losses(range(4), one_group(3, 4))
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])


@given(
    labels=st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=0, max_size=40),
    count=st.integers(1, 20),
    positive=st.sampled_from([0.25, 0.5, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_samples_are_as_many_as_torchvision_takes(labels, count, positive):
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

    given_labels = torch.tensor(labels, dtype=torch.float32)
    keys = torch.rand(len(labels), generator=torch.Generator().manual_seed(1))
    at = sample(given_labels, keys, count, positive)
    theirs = BalancedPositiveNegativeSampler(count, positive)([given_labels])
    assert (given_labels[at] > 0).sum() == theirs[0][0].sum()
    assert (given_labels[at] == 0).sum() == theirs[1][0].sum()
    assert at.tolist() == sorted(set(at.tolist())) and (given_labels[at] >= 0).all()


def test_the_depth_is_fused_by_a_grouped_convolution_that_begins_as_the_mean():
    x = torch.randn(2, 6, 3, 5, 4)
    fuse = DepthFusion(6, 3)
    torch.testing.assert_close(fuse(x), x.mean(2))
    nn.init.normal_(fuse.weight)
    # As MP3D says it: slices become channels, a 1 x 1 convolution in as many groups as channels.
    grouped = nn.Conv2d(18, 6, 1, groups=6, bias=False)
    grouped.weight.data = fuse.weight.data.view(6, 3, 1, 1)
    torch.testing.assert_close(fuse(x), grouped(x.flatten(1, 2)))
    torch.testing.assert_close(fuse(x[:, :, :1]), x[:, :, 0])
    torch.testing.assert_close(DepthFusion(6, 3, "centre")(x), x[:, :, 1])
    assert not list(DepthFusion(6, 1).parameters())
    with pytest.raises(ValueError, match="depth 2: this detector fuses 3"):
        fuse(x[:, :, :2])


def test_slabs_and_images_go_through_one_detector():
    torch.manual_seed(0)
    made = encoder(stem_stride=(1, 2, 2), stage_strides=((1, 1, 1), (2, 2, 2), (1, 2, 2), (1, 2, 2)))
    ours = TwoStageDetector2d(made, TwoStageConfig(depth=3, channels=16, hidden=16, proposals=(16, 16)))
    assert [fuse.depth for fuse in ours.pyramid.fusion] == [2, 2, 2]
    _, boxes, labels = scene(1)
    for depth in (3, 1):
        losses = ours.losses(torch.randn(1, 1, depth, 64, 64), boxes, [labels[0] * 0])
        assert all(loss.isfinite() for loss in losses.values())


def test_bfloat16_leaves_the_boxes_in_single_precision():
    ours = detector()
    x, boxes, labels = scene()
    with torch.autocast("cpu", torch.bfloat16):
        losses = ours.losses(x, boxes, labels)
        found = ours.eval().detect(x)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found[0].boxes.dtype == torch.float32


def test_unusable_encoders_and_options_are_named():
    with pytest.raises(ValueError, match="strides along H and W are 4 and 2"):
        TwoStageDetector2d(encoder(stem_stride=(1, 4, 2)))
    with pytest.raises(ValueError, match="min_stride is 64, the encoder's largest stride 16"):
        TwoStageDetector2d(encoder(), TwoStageConfig(min_stride=64))
    for field, value in (
        ("classes", 0), ("fusion", "sum"), ("proposals", (0, 1)), ("rpn_iou", (0.7, 0.3)), ("nms", 0.0),
        ("box_stds", (0.1, 0.1, 0.2)), ("anchor_ratios", ()), ("roi_beta", 0.0), ("score", 1.0),
        ("norm_groups", -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=field):
            TwoStageConfig(**{field: value})


_CODED = detector()
