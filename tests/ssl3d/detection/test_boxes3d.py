"""Boxes in 3D: coding, suppression, clustering; RoIAlign in 3D against torchvision and by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.detection.boxes3d import box_overlap, clip, decode, encode, nms, weighted_clusters
from ssl3d.detection.metrics import box_iou
from ssl3d.detection.roi_align3d import roi_align3d


def random_boxes(count, seed=0, size=40.0, dimension=3):
    rng = torch.Generator().manual_seed(seed)
    low = torch.rand(count, dimension, generator=rng) * size
    return torch.cat([low, low + 1 + 10 * torch.rand(count, dimension, generator=rng)], dim=1)


@pytest.mark.parametrize("dimension", [2, 3])
def test_overlap_of_tensors_is_that_of_arrays(dimension):
    a, b = random_boxes(9, 0, dimension=dimension), random_boxes(7, 1, dimension=dimension)
    np.testing.assert_allclose(box_overlap(a, b), box_iou(a.numpy(), b.numpy()), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**20), dimension=st.sampled_from([2, 3]))
def test_decoding_undoes_encoding(seed, dimension):
    boxes, anchors = random_boxes(8, seed, 40, dimension), random_boxes(8, seed + 1, 40, dimension)
    for weights in (None, [10.0] * dimension + [5.0] * dimension):
        again = decode(encode(boxes, anchors, weights), anchors, weights)
        torch.testing.assert_close(again, boxes, atol=2e-3, rtol=1e-4)


def test_offsets_by_hand():
    """Anchor centre (4, 5, 6), sides (4, 2, 8); box centre (6, 5, 5), sides (8, 1, 8)."""
    anchor = torch.tensor([[2.0, 4, 2, 6, 6, 10]])
    box = torch.tensor([[2.0, 4.5, 1, 10, 5.5, 9]])
    expected = torch.tensor([[0.5, 0, -0.125, math.log(2), math.log(0.5), 0]])
    torch.testing.assert_close(encode(box, anchor), expected)
    weights = [1.0, 2, 8, 1, 1, 1]
    torch.testing.assert_close(encode(box, anchor, weights)[0, 2], torch.tensor(-1.0))


def test_offsets_in_the_plane_are_torchvisions():
    from torchvision.models.detection._utils import BoxCoder

    boxes, anchors = random_boxes(20, 0, dimension=2), random_boxes(20, 1, dimension=2)
    theirs = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode_single(boxes, anchors)
    torch.testing.assert_close(encode(boxes, anchors, (10, 10, 5, 5)), theirs)


def test_a_side_does_not_explode():
    anchor = torch.tensor([[0.0, 0, 0, 16, 16, 16]])
    box = decode(torch.tensor([[0.0, 0, 0, 90, 0, 0]]), anchor)
    torch.testing.assert_close(box[0, 3] - box[0, 0], torch.tensor(1000.0))


def test_clipping():
    boxes = torch.tensor([[-3.0, 2, 2, 4, 9, 30]])
    assert clip(boxes, (8, 8, 8)).tolist() == [[0, 2, 2, 4, 8, 8]]


def plain_nms(boxes, scores, overlap, groups):
    """Loops, nothing else."""
    left = sorted(range(len(boxes)), key=lambda n: (-scores[n], n))
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [
            n
            for n in left
            if groups[n] != groups[best]
            or box_iou(boxes[n : n + 1], boxes[best : best + 1])[0, 0] <= overlap
        ]
    return kept


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 40),
    dimension=st.sampled_from([2, 3]),
    overlap=st.sampled_from([0.1, 0.3, 0.7]),
)
def test_suppression_is_that_of_plain_loops(seed, count, dimension, overlap):
    boxes = random_boxes(count, seed, 12, dimension)
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(np.round(rng.random(count), 1))  # ties among them
    groups = torch.from_numpy(rng.integers(2, size=count))
    expected = plain_nms(boxes.double().numpy(), scores.tolist(), overlap, groups.tolist())
    assert nms(boxes, scores, overlap, groups).tolist() == expected
    assert nms(boxes, scores, overlap, groups, most=3).tolist() == expected[:3]


def test_suppression_in_blocks_is_the_same(monkeypatch):
    boxes, scores = random_boxes(60, 3, 20), torch.rand(60, generator=torch.Generator().manual_seed(1))
    whole = nms(boxes, scores, 0.2).tolist()
    monkeypatch.setattr("ssl3d.detection.boxes3d._BLOCK", 60 * 7)
    assert nms(boxes, scores, 0.2).tolist() == whole


def test_suppression_in_the_plane_is_torchvisions():
    from torchvision.ops import nms as theirs

    boxes, scores = random_boxes(80, 5, 30, 2), torch.rand(80, generator=torch.Generator().manual_seed(2))
    assert nms(boxes, scores, 0.3).tolist() == theirs(boxes, scores, 0.3).tolist()


def test_clusters_by_hand():
    """Two windows saw one object, with boxes of overlap 1/3; a third box is alone."""
    boxes = torch.tensor([[0.0, 0, 0, 2, 2, 2], [1, 0, 0, 3, 2, 2], [9, 9, 9, 10, 10, 10]])
    scores = torch.tensor([0.8, 0.4, 0.2])
    merged, values, heads = weighted_clusters(boxes, scores, 0.2)
    assert heads.tolist() == [0, 2]
    # Weights .8 x 1 and .4 x 1/3: the lower end is (.8 x 0 + .1333 x 1) / .9333.
    torch.testing.assert_close(merged[0, 0], torch.tensor(0.4 / 3 / (0.8 + 0.4 / 3)))
    torch.testing.assert_close(values[0], torch.tensor((0.8 + 0.4 / 3) / (1 + 1 / 3)))
    assert merged[1].tolist() == boxes[2].tolist() and values[1] == pytest.approx(0.2)
    # Four windows looked, one found it: a quarter of the score.
    lone = weighted_clusters(boxes[2:], scores[2:], 0.2, expected=torch.tensor([4.0]))
    assert lone[1].tolist() == pytest.approx([0.05])


def test_nothing_to_suppress():
    none = torch.zeros(0, 6)
    assert nms(none, torch.zeros(0), 0.5).tolist() == []
    assert [len(part) for part in weighted_clusters(none, torch.zeros(0), 0.5)] == [0, 0, 0]


# RoIAlign -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride, samples", [*itertools.product((1, 2, 4), (1, 2, 3))])
def test_roi_align_of_an_image_is_torchvisions(stride, samples):
    from torchvision.ops import roi_align

    torch.manual_seed(0)
    map_ = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    low = torch.rand(2, 6, 2, dtype=torch.float64) * 10 * stride - 3 * stride  # some reach outside
    flat = torch.cat([low, low + torch.rand(2, 6, 2) * 9 * stride], dim=2)  # y1 x1 y2 x2
    theirs = roi_align(map_, [b[:, [1, 0, 3, 2]] for b in flat], (5, 4), 1 / stride, samples, aligned=True)
    solid = torch.zeros(2, 6, 6, dtype=torch.float64)
    solid[..., 1:3], solid[..., 4:6], solid[..., 3] = flat[..., :2], flat[..., 2:], 1
    ours = roi_align3d(map_[:, :, None], list(solid), (1, 5, 4), (1, stride, stride), (1, samples, samples))
    torch.testing.assert_close(ours.squeeze(2), theirs)


def test_roi_align_gradients_are_torchvisions():
    from torchvision.ops import roi_align

    torch.manual_seed(0)
    map_ = torch.randn(1, 2, 8, 8, requires_grad=True)
    box = torch.tensor([[1.2, 0.7, 6.9, 7.7]])
    weight = torch.randn(1, 2, 3, 3)
    (roi_align(map_, [box[:, [1, 0, 3, 2]]], 3, 1.0, 2, True) * weight).sum().backward()
    theirs = map_.grad.clone()
    map_.grad = None
    solid = torch.tensor([[0, 1.2, 0.7, 1, 6.9, 7.7]])
    (roi_align3d(map_[:, :, None], [solid], (1, 3, 3), 1, (1, 2, 2)).squeeze(2) * weight).sum().backward()
    torch.testing.assert_close(map_.grad, theirs)


def test_roi_align_in_3d_by_hand():
    """On a map that is linear in place, every cell is the value at its middle."""
    z, y, x = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), torch.arange(12.0), indexing="ij")
    map_ = (2 * z + 3 * y - x)[None, None]
    box = torch.tensor([[4.0, 6, 8, 12, 14, 20]])  # voxels at stride 2: places 1.5 to 5.5, 2.5 to 6.5, ...
    found = roi_align3d(map_, [box], (2, 4, 3), 2)
    middle = [
        [b / 2 - 0.5 + (n + 0.5) * (e - b) / 2 / count for n in range(count)]
        for b, e, count in ((4, 12, 2), (6, 14, 4), (8, 20, 3))
    ]
    for d, h, w in itertools.product(range(2), range(4), range(3)):
        expected = 2 * middle[0][d] + 3 * middle[1][h] - middle[2][w]
        assert found[0, 0, d, h, w].item() == pytest.approx(expected, abs=1e-4)


def test_roi_align_between_eight_voxels_by_hand():
    """One sample at place (.25, .5, .75): the trilinear mean of the corners, typed out."""
    corner = torch.tensor([[[1.0, 2], [3, 5]], [[7, 11], [13, 17]]])
    box = torch.tensor([[0.75, 1.0, 1.25, 0.75, 1.0, 1.25]])  # no extent: all samples in one place
    found = roi_align3d(corner[None, None], [box], 1, 1, 1)
    near = 0.5 * (0.25 * 1 + 0.75 * 2) + 0.5 * (0.25 * 3 + 0.75 * 5)
    far = 0.5 * (0.25 * 7 + 0.75 * 11) + 0.5 * (0.25 * 13 + 0.75 * 17)
    assert found.item() == pytest.approx(0.75 * near + 0.25 * far)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_centred_maps_are_read_where_their_voxels_lie(stride):
    """Voxel i of a map lies on voxel i x stride: features of a one-voxel box there are that voxel's."""
    map_ = torch.arange(5.0).view(1, 1, 1, 1, 5)
    at = 3 * stride
    box = torch.tensor([[0.0, 0, at, 1, 1, at + 1]])
    found = roi_align3d(map_, [box], 1, (1, 1, stride), 1, centred=True)
    assert found.item() == pytest.approx(3.0)


def test_boxes_of_several_volumes_stay_apart(monkeypatch):
    torch.manual_seed(0)
    map_ = torch.randn(3, 2, 4, 5, 6)
    boxes = [random_boxes(2, 0, 4), torch.zeros(0, 6), random_boxes(3, 1, 4)]
    both = roi_align3d(map_, boxes, 2)
    assert both.shape == (5, 2, 2, 2, 2)
    torch.testing.assert_close(both[2:], roi_align3d(map_[2:], boxes[2:], 2))
    monkeypatch.setattr("ssl3d.detection.roi_align3d._BLOCK", 1)
    torch.testing.assert_close(roi_align3d(map_, boxes, 2), both)
    assert roi_align3d(map_[:1], [torch.zeros(0, 6)], 2).shape == (0, 2, 2, 2, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(1, 1, 4, 4), [torch.zeros(0, 6)], 2), "takes a map"),
        ((torch.zeros(1, 1, 4, 4, 4), [], 2), "boxes of 0 volumes for a map of 1"),
        ((torch.zeros(1, 1, 4, 4, 4), [torch.zeros(0, 6)], 0), "must be at least 1"),
        ((torch.zeros(1, 1, 4, 4, 4), [torch.zeros(0, 6)], (2, 2)), "one number or three"),
        ((torch.zeros(1, 1, 4, 4, 4), [torch.zeros(0, 6)], 2, 0.0), "stride must be"),
    ],
)
def test_bad_maps_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        roi_align3d(*arguments)
