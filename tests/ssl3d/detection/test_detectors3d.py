"""Anchors, pyramid and the two detectors in 3D: geometry, gradients, over-fitting, odd input."""

import math
import sys

import numpy as np
import pytest
import torch

from ssl3d.api import (
    AnchorPlan,
    Detections,
    RetinaNet3d,
    RetinaNet3dConfig,
    Truths,
    TwoStage3dConfig,
    TwoStageDetector3d,
    average_precision,
    froc,
    one_group,
    phantom,
    plan_anchors,
)
from ssl3d.detection.anchors3d import fit_shapes, grid_anchors, level_of
from ssl3d.detection.boxes3d import box_overlap
from ssl3d.detection.pyramid3d import Pyramid3d
from ssl3d.detection.retinanet3d import own_best
from ssl3d.detection.two_stage3d import match_anchors
from ssl3d.encoders.resnet import ResNet10
from ssl3d.encoders.vit import ViT
from ssl3d.errors import UsageError

THIN = {"stem_stride": (1, 2, 2), "stage_strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))}
PLAN = AnchorPlan(strides=((2, 2, 2), (8, 8, 8)), shapes=(((4.0, 4, 4),), ((14.0, 14, 14),)))
KINDS = ("retinanet", "faster-rcnn")


def encoder(**options):
    torch.manual_seed(0)
    return ResNet10(ResNet10.Config(width=4, **options))


def detector(kind, made=None, plan=PLAN, classes=1, **options):
    made = made or encoder()
    torch.manual_seed(0)
    if kind == "retinanet":
        pytest.importorskip("monai")
        return RetinaNet3d(made, plan, RetinaNet3dConfig(classes=classes, channels=8, depth=1, **options))
    return TwoStageDetector3d(
        made, plan, TwoStage3dConfig(classes=classes, channels=8, hidden=64, pool_size=3, **options)
    )


def boxes_of_sides(*sides):
    return np.array([[10.0, 10, 10, 10 + d, 10 + h, 10 + w] for d, h, w in sides])


# Anchors ------------------------------------------------------------------------------------------


def test_levels_and_shapes_are_those_of_the_boxes():
    small = [(4, 4.2, 3.8)] * 20
    large = [(15, 16, 17)] * 20
    plan = plan_anchors(boxes_of_sides(*small, *large), encoder(), count=1)
    assert plan.strides == ((2, 2, 2), (8, 8, 8))
    np.testing.assert_allclose(plan.shapes[0][0], (4, 4.2, 3.8))
    np.testing.assert_allclose(plan.shapes[1][0], (15, 16, 17))


def test_shapes_of_two_kinds_of_boxes_are_found():
    flat, tall = [(2, 8, 8)] * 30, [(8, 3, 3)] * 10
    plan = plan_anchors(boxes_of_sides(*flat, *tall), encoder(), count=2)
    found = {tuple(np.round(shape, 3)) for level in plan.shapes for shape in level}
    assert {(2.0, 8.0, 8.0), (8.0, 3.0, 3.0)} <= found


def test_boxes_that_are_alike_get_shapes_around_theirs():
    plan = plan_anchors(boxes_of_sides(*[(4, 4, 4)] * 5), encoder(), count=3)
    sides = [shape[0] for shape in plan.shapes[0]]
    np.testing.assert_allclose(sides, [4 / 2 ** (1 / 3), 4, 4 * 2 ** (1 / 3)], rtol=1e-6)


def test_images_have_anchors_one_voxel_deep():
    boxes = boxes_of_sides(*[(1, 8, 8)] * 5, *[(1, 30, 20)] * 5)
    plan = plan_anchors(boxes, encoder(), count=2)
    assert {shape[0] for level in plan.shapes for shape in level} == {1.0}


def test_levels_finer_than_the_first_map():
    """A stem of stride 4 and lesions of 4 voxels: a level of stride 2 is added, not one of stride 1."""
    made = encoder(stem_pool=True)
    assert made.strides[0] == (4, 4, 4) or made.strides[1] == (4, 4, 4)
    plan = plan_anchors(boxes_of_sides(*[(4, 4, 4)] * 5, *[(2, 2, 2)] * 5), made)
    assert plan.strides == ((2, 2, 2),)


def test_every_box_is_covered_by_an_anchor():
    """Boxes as in the phantoms, anywhere: each has an anchor that overlaps it by a quarter or more."""
    rng = np.random.default_rng(0)
    low = rng.uniform(4, 24, (200, 3))
    boxes = np.concatenate([low, low + rng.uniform(3, 12, (200, 3))], axis=1)
    plan = plan_anchors(boxes, encoder())
    anchors = torch.cat(grid_anchors(plan.strides, torch.tensor(plan.shapes), (40, 40, 40)))
    best = box_overlap(torch.from_numpy(boxes).float(), anchors).max(dim=1).values
    assert best.min() > 0.2 and best.mean() > 0.45


def test_anchors_lie_on_the_voxels_of_their_maps():
    anchors = grid_anchors(((2, 4, 4),), torch.tensor([[[2.0, 4, 6], [1, 1, 1]]]), (3, 5, 5))[0]
    assert anchors.shape == (2 * 2 * 2 * 2, 6)
    assert anchors[0].tolist() == [-0.5, -1.5, -2.5, 1.5, 2.5, 3.5]  # centre .5
    assert anchors[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert ((anchors[-1, :3] + anchors[-1, 3:]) / 2).tolist() == [2.5, 4.5, 4.5]


def test_refitted_shapes_keep_the_levels():
    plan = plan_anchors(boxes_of_sides(*[(4, 4, 4)] * 9, *[(16, 16, 16)] * 9), encoder(), count=1)
    assert fit_shapes(boxes_of_sides((5, 5, 5)), plan)[:, 0, 0].tolist() == [5, 16]
    assert fit_shapes(np.zeros((0, 6)), plan)[:, 0, 0].tolist() == pytest.approx([4, 16])


def test_a_box_is_pooled_from_the_level_it_fits():
    boxes = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0, 0, 0, 16, 16, 16]])
    assert level_of(boxes, ((2, 2, 2), (8, 8, 8)), 2.0).tolist() == [0, 1]
    # In images the depth of a box says nothing: a box of 16 pixels is of the level of stride 8.
    flat = torch.tensor([[0, 0, 0, 1, 4, 4], [0, 0, 0, 1, 16, 16.0]])
    assert level_of(flat, ((2, 2, 2), (8, 8, 8)), 2.0).tolist() == [0, 1]


@pytest.mark.parametrize(
    "boxes, message", [(np.zeros((0, 6)), "there are none"), ([[1, 1, 1, 1, 2, 2]], "no extent")]
)
def test_anchors_need_boxes(boxes, message):
    with pytest.raises(ValueError, match=message):
        plan_anchors(boxes, encoder())


def test_matching_as_in_faster_rcnn():
    anchors = torch.tensor(
        [[0.0, 0, 0, 2, 2, 2], [0, 0, 1, 2, 2, 3], [9, 9, 9, 11, 11, 11], [0, 0, 0, 2, 2, 4]]
    )
    boxes = torch.tensor([[0.0, 0, 0, 2, 2, 2], [9, 9, 9, 11, 11, 19]])
    labels, owner = match_anchors(anchors, boxes, (0.3, 0.7))
    # The first is box 0; the second overlaps it by 1/3, the last by 1/2: neither; the third is the best
    # of box 1 though it overlaps it by 1/5 only.
    assert labels.tolist() == [1, -1, 1, -1]
    assert owner[labels > 0].tolist() == [0, 1]
    assert match_anchors(anchors, boxes[:0], (0.3, 0.7))[0].tolist() == [0, 0, 0, 0]


# Pyramid ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16, 16), (17, 23, 30), (1, 24, 17), (5, 32, 32)])
@pytest.mark.parametrize("options", [{}, THIN, {"stem_pool": True}], ids=["plain", "thin", "pool"])
def test_pyramid_has_the_levels_asked_for(options, size):
    made = encoder(**options)
    strides = (made.strides[-1], (1, 2, 2) if options is THIN else (2, 2, 2))[::-1]
    pyramid = Pyramid3d(made, strides, 8)
    levels = pyramid(made(torch.randn(2, 1, *size)), size)
    for level, stride in zip(levels, strides, strict=True):
        assert level.shape == (2, 8, *(-(-n // s) for n, s in zip(size, stride, strict=True)))
    sum(level.square().mean() for level in levels).backward()
    for name, weight in pyramid.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name


def test_pyramid_over_maps_of_one_stride():
    made = ViT(ViT.Config(patch=(8, 8, 8), grid=(2, 2, 2), width=16, layers=2, heads=2, maps=2))
    pyramid = Pyramid3d(made, ((4, 4, 4), (8, 8, 8)), 8)
    levels = pyramid(made(torch.randn(1, 1, 16, 16, 16)), (16, 16, 16))
    assert [tuple(level.shape[2:]) for level in levels] == [(4, 4, 4), (2, 2, 2)]


def test_a_level_beyond_the_deepest_map_is_refused():
    with pytest.raises(ValueError, match="level of stride"):
        Pyramid3d(encoder(), ((2, 2, 2), (64, 64, 64)), 8)


# Detectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options, size, strides",
    [
        ({}, (24, 20, 30), ((2, 2, 2), (8, 8, 8))),
        (THIN, (5, 32, 32), ((1, 2, 2), (1, 8, 8))),
        ({"kind": "acs"}, (1, 32, 40), ((2, 2, 2), (8, 8, 8))),
    ],
    ids=["volume", "thin", "image"],
)
def test_losses_reach_every_weight_and_detections_fit(kind, options, size, strides):
    depth = min(size[0], 4)
    plan = AnchorPlan(strides, (((depth, 4.0, 4.0),), ((depth, 12.0, 12.0),)))
    model = detector(kind, encoder(**options), plan, classes=2)
    images = torch.randn(2, 1, *size)
    boxes = [torch.tensor([[0.0, 3, 3, depth, 8, 8], [0.0, 10, 10, depth, 20, 19]]), torch.zeros(0, 6)]
    labels = [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.long)]
    losses = model.losses(images, boxes, labels, one_group(0, 2))
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    model.eval()
    found = model.detect(images)
    assert len(found) == 2
    for one in found:
        limit = torch.tensor([*size, *size])
        assert (one.boxes >= 0).all() and (one.boxes <= limit).all()
        assert (one.boxes[:, 3:] > one.boxes[:, :3]).all()
        assert (one.scores[:-1] >= one.scores[1:]).all()
        assert set(one.labels.tolist()) <= {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_volumes_without_boxes_have_finite_losses_and_gradients(kind):
    model = detector(kind)
    losses = model.losses(
        torch.randn(2, 1, 16, 16, 16), [torch.zeros(0, 6)] * 2, [torch.zeros(0, dtype=torch.long)] * 2
    )
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_batch_is_the_mean_over_its_volumes(kind):
    """So a batch shared out over ranks gives the same gradients."""
    model = detector(kind).eval()  # running statistics: no volume sees the others
    images = torch.randn(2, 1, 16, 16, 16)
    boxes = [torch.tensor([[2.0, 2, 2, 7, 7, 7]]), torch.zeros(0, 6)]
    labels = [torch.tensor([0]), torch.zeros(0, dtype=torch.long)]
    both = model.losses(images, boxes, labels, one_group(3, 2))

    class Row:
        """The generator of one row of the batch."""

        def __init__(self, row):
            self.rng, self.row = one_group(3, 2), row

        def uniform(self, *shape):
            return self.rng.uniform(*shape)[self.row : self.row + 1]

        def integers(self, *arguments):
            return self.rng.integers(*arguments)[self.row : self.row + 1]

    alone = [model.losses(images[n : n + 1], boxes[n : n + 1], labels[n : n + 1], Row(n)) for n in range(2)]
    for name, value in both.items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sampled_follows_from_the_seed(kind):
    model = detector(kind).eval()
    images, boxes = torch.randn(1, 1, 24, 24, 24), [torch.tensor([[2.0, 2, 2, 7, 7, 7]])]
    labels = [torch.tensor([0])]
    state = torch.get_rng_state()
    first, again, other = (
        sum(model.losses(images, boxes, labels, one_group(seed, 1)).values()).item() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert torch.equal(state, torch.get_rng_state())


def test_a_box_smaller_than_all_anchors_still_has_one():
    """Of four anchors that hold it whole, three overlap it alike: mean + deviation lies above them all."""
    pytest.importorskip("monai")
    anchors = torch.tensor([[0.0, 0, 0, 8, 8, 8]] * 3 + [[0, 0, 0, 12, 12, 12], [20, 20, 20, 28, 28, 28]])
    boxes = torch.tensor([[3.0, 3, 3, 5, 5, 5], [20, 20, 20, 28, 28, 28]])
    assert own_best(torch.tensor([-1, -1, -1, -1, 1]), anchors, boxes).tolist() == [0, 0, 0, -1, 1]
    far = torch.tensor([[90.0, 90, 90, 91, 91, 91]])
    assert own_best(torch.full((5,), -1), anchors, far).tolist() == [-1] * 5


def test_scores_begin_at_the_prior():
    model = detector("retinanet")
    model.eval()
    logits, _, _ = model._outputs(torch.zeros(1, 1, 16, 16, 16))
    assert torch.sigmoid(logits).mean().item() == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_losses_are_near_those_of_single_precision(kind):
    model = detector(kind).eval()
    images, boxes = torch.randn(1, 1, 24, 24, 24), [torch.tensor([[2.0, 2, 2, 7, 7, 7]])]
    exact = model.losses(images, boxes, [torch.tensor([0])], one_group(0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.losses(images, boxes, [torch.tensor([0])], one_group(0, 1))
    for name in exact:
        assert rough[name].dtype == torch.float32
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.2, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_finds_the_boxes_of_single_precision(kind):
    model = detector(kind, score=1e-4).eval()
    images = torch.randn(2, 1, 24, 24, 24)
    exact = model.detect(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.detect(images)
    for one, other in zip(exact, rough, strict=True):
        assert other.boxes.dtype == other.scores.dtype == torch.float32
        assert len(one.boxes) and abs(float(one.scores.max()) - float(other.scores.max())) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_one_phantom_is_learned_by_heart(kind):
    """Its lesions, and nothing else, are found: every measure says 1."""
    made = next(one for seed in range(20) if len((one := phantom(seed, (24, 24, 24))).boxes) > 1)
    plan = plan_anchors(made.boxes, encoder())
    torch.manual_seed(0)
    # A norm that needs no statistics: one volume is the whole batch.
    model = detector(kind, ResNet10(ResNet10.Config(width=8, norm="instance")), plan)
    image, truth = torch.from_numpy(made.image)[None], torch.from_numpy(made.boxes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60 if kind == "retinanet" else 120):
        losses = model.losses(image, [truth], [torch.zeros(len(truth), dtype=torch.long)])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    model.eval()
    found = model.detect(image)[0]
    rows = [Detections(found.boxes.numpy(), found.scores.numpy())], [Truths(made.boxes)]
    assert average_precision(*rows, iou=0.1).mean[0] == 1.0
    assert froc(*rows).cpm[0] == 1.0


@pytest.mark.parametrize(
    "config, field",
    [
        (lambda: RetinaNet3dConfig(score=1.0), "score"),
        (lambda: RetinaNet3dConfig(depth=-1), "depth"),
        (lambda: RetinaNet3dConfig(nms=0.0), "nms"),
        (lambda: TwoStage3dConfig(rpn_iou=(0.5, 0.2)), "rpn_iou"),
        (lambda: TwoStage3dConfig(proposals=(0, 1)), "proposals"),
        (lambda: TwoStage3dConfig(box_weights=(1.0, 0.0)), "box_weights"),
        (lambda: AnchorPlan(((1, 1, 1),), ((),)), "anchor shapes"),
        (lambda: AnchorPlan((), ()), "levels"),
    ],
)
def test_bad_options_are_named(config, field):
    with pytest.raises(ValueError, match=field):
        config()


def test_retinanet_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.apps.detection.networks.retinanet_detector", None)
    with pytest.raises(UsageError, match=r"pip install 'ssl3d\[detection\]'"):
        RetinaNet3d(encoder(), PLAN)


def test_sides_are_bounded():
    """What an untrained network says of a box stays finite."""
    model = detector("faster-rcnn").eval()
    with torch.no_grad():
        model.offsets.weight.fill_(100.0)
        found = model.detect(torch.randn(1, 1, 16, 16, 16))[0]
    assert found.boxes.isfinite().all()
    assert math.isfinite(float(found.scores.sum()))
