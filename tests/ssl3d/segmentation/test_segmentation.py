"""Segmentation parts: heads, loss, windows, scores and NIfTI against what is known of them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl3d.api import (
    CoarseToFine,
    DataError,
    Record,
    SegmentationNetwork,
    UsageError,
    dice_ce_loss,
    expanded,
    find_region,
    mask_scores,
    open_data,
    predict_windows,
    save_segmentation,
    segmentation_head,
    shrunk,
    shrunk_mask,
)
from ssl3d.encoders.mobilenet import MobileNetV2
from ssl3d.encoders.resnet import ResNet10
from ssl3d.encoders.vit import ViT
from ssl3d.segmentation.heads import HEADS, ConvNorm, DenseASPPHead, LinearHead, Med3DHead, UNetHead
from ssl3d.segmentation.metrics import surface_distances
from ssl3d.segmentation.network import region_of
from ssl3d.segmentation.save import to_original

# Heads --------------------------------------------------------------------------------------------


def resnet(**options):
    return ResNet10(ResNet10.Config(width=4, **options))


ENCODERS = {
    "stride 2": lambda: resnet(),
    "stride 1": lambda: resnet(stem_stride=(1, 1, 1), kind="3d"),
    "depth kept": lambda: resnet(
        stem_stride=(1, 2, 2), stage_strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    ),
    "mobilenet": lambda: MobileNetV2(MobileNetV2.Config(width_multiplier=0.25, last_channels=64)),
    "vit": lambda: ViT(ViT.Config(width=24, layers=2, heads=2, maps=2, grid=(2, 2, 2))),
}
SIZES = [(16, 16, 16), (1, 24, 20), (5, 17, 23), (2, 9, 31), (1, 3, 2)]


def test_finer_steps_of_the_u_net_add_to_what_coarser_ones_found():
    torch.manual_seed(0)
    encoder = resnet(norm="group")
    head = UNetHead(encoder, 3, 8, deep_supervision=True)
    x = torch.randn(2, 1, 16, 16, 16)
    maps = encoder(x)
    levels = head.train()(x, maps)  # finest first
    assert len(levels) == 1 + len(head.coarse)
    (finest,) = head.eval()(x, maps)
    assert torch.equal(finest, levels[0])
    last = max(head.coarse, key=int)
    for parameter in (*head.out.parameters(), *head.coarse[last].parameters()):
        torch.nn.init.zeros_(parameter)
    silenced = head.train()(x, maps)  # the two finest add nothing: what is left is the next coarser one's
    assert torch.equal(silenced[0], levels[2]) and torch.equal(silenced[1], levels[2])
    assert not torch.equal(levels[0], levels[1]) and not torch.equal(levels[1], levels[2])
    alone = UNetHead(encoder, 3, 8)
    assert len(alone.train()(x, maps)) == 1 and not alone.coarse


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_logits_of_the_inputs_size_and_learns_all_its_weights(head, name):
    torch.manual_seed(0)
    encoder = ENCODERS[name]()
    network = SegmentationNetwork(encoder, segmentation_head(head, encoder, 3, 8, deep_supervision=True))
    for size in SIZES[: 3 if name == "vit" else None]:
        network.zero_grad()
        found = network(torch.randn(2, 1, *size))
        assert all(one.shape == (2, 3, *size) for one in found)
        torch.stack([one.square().mean() for one in found]).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.head.parameters())
    assert len(network.eval()(torch.randn(1, 1, 8, 8, 8))) == 1


def test_heads_learn_right_in_bfloat16_on_small_maps():
    # torch 2.15 computes garbage gradients of padded bfloat16 convolutions on small maps.
    torch.manual_seed(0)
    encoder = resnet().eval()
    for name in HEADS:
        head = segmentation_head(name, encoder, 2, 8, norm="group").eval()
        x = torch.randn(2, 1, 20, 18, 16)
        maps = [m.detach() for m in encoder(x)]
        gradients = []
        for low in (False, True):
            head.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = head(x, maps)[0].float().square().mean()
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in head.parameters()]))
        assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm(), name


def test_unet_sees_the_input_at_full_resolution():
    # The encoder gives nothing: what distinguishes neighbours comes through the stem.
    torch.manual_seed(0)
    encoder = resnet().eval()
    head = UNetHead(encoder, 2, 8).eval()
    maps = [torch.zeros_like(m) for m in encoder(torch.zeros(1, 1, 8, 8, 8))]
    x = torch.zeros(1, 1, 8, 8, 8, requires_grad=True)
    head(x, maps)[0][0, 1, 4, 4, 4].backward()
    assert x.grad[0, 0, 4, 4, 4] != 0
    # With a map at full resolution there is no stem.
    assert UNetHead(resnet(stem_stride=(1, 1, 1)), 2, 8).stem is None


def test_med3d_head_is_the_papers_for_stride_8():
    encoder = resnet(stage_strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1)))
    head = Med3DHead(encoder, 2)
    assert [tuple(up.weight.shape) for up in head.up] == [
        (32, 256, 3, 3, 3),
        (128, 256, 3, 3, 3),
        (128, 256, 3, 3, 3),
    ]
    assert [tuple(conv.weight.shape) for conv in head.conv] == [(128, 256, 3, 3, 3)] * 3
    assert tuple(head.out.weight.shape) == (2, 128, 1, 1, 1)


def test_transposed_convolution_is_torchs_on_whole_and_odd_sizes():
    from ssl3d.segmentation.heads import _transposed

    torch.manual_seed(0)
    weight = torch.randn(3, 5, 3, 3, 3)
    for small, big in [((2, 3, 4), (4, 5, 7)), ((1, 3, 3), (1, 6, 5)), ((3, 1, 2), (5, 1, 4))]:
        x = torch.randn(2, 3, *small)
        rest = [b - (2 * s - 1) for s, b in zip(small, big)]
        expected = F.conv_transpose3d(x, weight, stride=2, padding=1, output_padding=rest)
        found = _transposed(x, weight, big, (2, 2, 2), (1, 1, 1))
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 3, 6, 24])
def test_dilated_convolution_leaves_out_only_taps_that_meet_padding(dilation):
    torch.manual_seed(0)
    part = ConvNorm(3, 4, "group", dilation, slope=0.0)
    for size in [(4, 7, 9), (1, 5, 30), (2, 3, 3)]:
        x = torch.randn(2, 3, *size)
        plain = F.conv3d(x, part.weight, padding=dilation, dilation=dilation)
        assert torch.allclose(part(x), F.relu(part.norm(plain)), atol=1e-4)


def test_denseaspp_layers_see_all_layers_before_them():
    head = DenseASPPHead(resnet(), 2, bottleneck=8, growth=4)
    assert [layer.weight.shape[1] for layer in head.reduce] == [32, 36, 40, 44, 48]
    assert [layer.dilation for layer in head.dilated] == [3, 6, 12, 18, 24]
    assert head.out.weight.shape[1] == 52


def test_linear_head_is_one_convolution_of_concatenated_maps():
    from ssl3d.api import upsample

    torch.manual_seed(0)
    encoder = resnet().eval()
    head, x = LinearHead(encoder, 3), torch.randn(2, 1, 9, 12, 10)
    maps = encoder(x)
    whole = torch.cat([upsample(m, x.shape[2:], s) for m, s in zip(maps, encoder.strides)], dim=1)
    weight = torch.cat([out.weight for out in head.out], dim=1)
    bias = torch.stack([out.bias for out in head.out]).sum(0)
    assert torch.allclose(head(x, maps)[0], F.conv3d(whole, weight, bias), atol=1e-4)


def test_unknown_head_is_refused():
    with pytest.raises(UsageError, match="unet, med3d, denseaspp, linear"):
        segmentation_head("fcn", resnet(), 2)


# Loss ---------------------------------------------------------------------------------------------


def test_loss_equals_the_hand_computed_one():
    # Two examples of two voxels, two classes, logits such that p(1) = .8, .4 and .5, .9.
    p = torch.tensor([[0.8, 0.4], [0.5, 0.9]])
    logits = torch.stack([(1 - p).log(), p.log()], dim=1)
    target = torch.tensor([[1, 0], [0, 1]])
    ce = -(math.log(0.8) + math.log(0.6) + math.log(0.5) + math.log(0.9)) / 4
    batch = 2 * (0.8 + 0.9) / (0.8 + 0.4 + 0.5 + 0.9 + 2)
    loss, parts = dice_ce_loss(logits, target, smooth=0)
    assert float(loss) == pytest.approx(ce + 1 - batch, abs=1e-6)
    assert float(parts["ce"]) == pytest.approx(ce, abs=1e-6)
    each = (2 * 0.8 / (1.2 + 1) + 2 * 0.9 / (1.4 + 1)) / 2
    loss, _ = dice_ce_loss(logits, target, batch_dice=False, smooth=0)
    assert float(loss) == pytest.approx(ce + 1 - each, abs=1e-6)
    other = 2 * (0.6 + 0.5) / (0.2 + 0.6 + 0.5 + 0.1 + 2)
    loss, _ = dice_ce_loss(logits, target, background=True, weights=(0.5, 2), smooth=0)
    assert float(loss) == pytest.approx(0.5 * ce + 2 * (1 - (batch + other) / 2), abs=1e-6)


def test_loss_equals_monais_where_all_is_annotated():
    monai = pytest.importorskip("monai.losses")
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 5, 6, 7), torch.randint(4, (3, 5, 6, 7))
    reference = monai.DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )
    assert float(dice_ce_loss(logits, target)[0]) == pytest.approx(
        float(reference(logits, target.unsqueeze(1))), abs=1e-5
    )


def test_unannotated_voxels_change_neither_loss_nor_gradient():
    torch.manual_seed(0)
    target = torch.randint(3, (2, 6, 4, 4))
    target[:, [0, 2, 3, 5]] = -1
    logits = torch.randn(2, 3, 6, 4, 4, requires_grad=True)
    for whole in (True, False):
        loss, _ = dice_ce_loss(logits, target, batch_dice=whole, background=True)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient[:, :, [0, 2, 3, 5]].abs().max() == 0
        assert gradient[:, :, [1, 4]].abs().min() > 0
        with torch.no_grad():
            poisoned = logits.clone()
            poisoned[:, :, [0, 2, 3, 5]] = 1e4 * torch.randn(2, 3, 4, 4, 4)
        assert torch.equal(dice_ce_loss(poisoned, target, whole, True)[0], loss)
        # And the loss is that of the annotated slices alone.
        alone, _ = dice_ce_loss(logits[:, :, [1, 4]], target[:, [1, 4]], whole, True)
        assert torch.allclose(alone, loss, atol=1e-6)


def test_loss_without_any_annotation_is_zero_and_harmless():
    logits = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
    loss, _ = dice_ce_loss(logits, torch.full((2, 4, 4, 4), -1))
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6) and logits.grad.abs().max() == 0


# Windows ------------------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 13), st.integers(3, 15), st.integers(3, 15)),
    window=st.tuples(st.sampled_from((1, 4, 8)), st.integers(3, 9), st.integers(3, 9)),
    overlap=st.sampled_from((0.0, 0.5, 0.75)),
)
@settings(max_examples=30, deadline=None)
def test_windows_of_a_local_network_give_the_whole_volumes_prediction(size, window, overlap):
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 2, 1, 1, 1, generator=torch.Generator().manual_seed(1))

    def network(x):
        return torch.sigmoid(F.conv3d(x, weight))

    whole = network(image[None])[0]
    for mirror in ((), (0, 2)):
        found = predict_windows(network, image, window, overlap, batch=3, mirror=mirror)
        assert torch.allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_blended_windows_of_a_convolutional_network_are_its_whole_pass(seed):
    """Each window is padded with zeros at its faces; by a floor of 1e-4 the mean error was 9e-4."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 3, padding=1), nn.Softmax(1)
    )
    image = torch.randn(1, 40, 40, 40)
    with torch.no_grad():
        error = (predict_windows(network, image, (24, 24, 24)) - network(image[None])[0]).abs()
    assert error.mean() < 1e-4 and error.max() < 1e-3


def test_the_middle_of_a_window_counts_more_and_windows_come_in_batches():
    sizes = []

    def network(x):
        sizes.append(len(x))
        ramp = torch.linspace(-1, 1, x.shape[-1]).abs()  # 0 in the middle of the window
        return ramp.expand(len(x), 1, *x.shape[2:])

    found = predict_windows(network, torch.zeros(1, 4, 4, 33), (4, 4, 16), 0.5, batch=2)
    assert sizes == [2, 2]
    # Where two windows overlap the mean is nearer to the one in whose middle the voxel lies.
    assert found[0, 0, 0, 9:24].max() < 0.62


def test_mirrored_copies_are_mirrored_back():
    seen = []

    def network(x):
        seen.append(x)
        return x

    image = torch.randn(1, 6, 5, 4)
    found = predict_windows(network, image, (6, 5, 4), mirror=(0, 1, 2))
    assert len(seen) == 8 and len({tuple(one.flatten().tolist()) for one in seen}) == 8
    assert torch.allclose(found, image, atol=1e-6)


def test_bad_windows_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        predict_windows(lambda x: x, torch.zeros(1, 4, 4, 4), (2, 2, 2), 1.0)
    with pytest.raises(ValueError, match="C, D, H, W"):
        predict_windows(lambda x: x, torch.zeros(4, 4, 4), (2, 2, 2))


# Scores -------------------------------------------------------------------------------------------


def box(shape, *corners):
    mask = np.zeros(shape, bool)
    z1, y1, x1, z2, y2, x2 = corners
    mask[z1:z2, y1:y2, x1:x2] = True
    return mask


def test_a_perfect_prediction_scores_1():
    mask = box((8, 9, 10), 1, 2, 3, 6, 7, 9)
    assert mask_scores(mask, mask, (3, 1, 0.5)) == (1, 0, 1)
    assert mask_scores(mask, mask, (3, 1, 0.5), tolerance=0) == (1, 0, 1)


def test_scores_of_shifted_boxes_by_hand():
    # Cubes of 4 voxels a side, one slice apart along D: 48 of 64 voxels shared; 5 mm slices.
    one, other = box((10, 10, 10), 2, 3, 3, 6, 7, 7), box((10, 10, 10), 3, 3, 3, 7, 7, 7)
    scores = mask_scores(one, other, (5, 1, 1), tolerance=1)
    assert scores.dice == 48 / 64
    # Of each cube's 56 surface voxels, 16 lie on the first slice, 5 mm from the other's surface but for
    # the 4 ... of the rim, which are 5 mm away too; and the inner 2x2 of the second slice's place: 1 mm.
    there, back = surface_distances(one, other, (5, 1, 1))
    assert len(there) == len(back) == 56
    assert sorted(there) == sorted(back) and there.max() == 5
    assert scores.hd95 == 5
    assert scores.surface_dice == pytest.approx(np.mean(there <= 1))
    assert mask_scores(one, other, (5, 1, 1)).surface_dice == 1  # the default tolerance is the voxel: 5 mm


def test_empty_masks_follow_the_stated_conventions():
    mask, empty = box((4, 5, 6), 1, 1, 1, 3, 3, 3), np.zeros((4, 5, 6), bool)
    assert mask_scores(empty, empty, (1, 1, 1)) == (None, None, None)
    diagonal = math.sqrt(8**2 + 5**2 + 3**2)
    for one, other in ((mask, empty), (empty, mask)):
        assert mask_scores(one, other, (2, 1, 0.5)) == (0, pytest.approx(diagonal), 0)
    with pytest.raises(ValueError, match="shapes"):
        mask_scores(mask, empty[1:], (1, 1, 1))


@pytest.mark.parametrize("seed", range(6))
def test_scores_equal_monais(seed):
    metrics = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(seed)
    shape = (9, 14, 12) if seed else (1, 20, 18)
    from scipy.ndimage import gaussian_filter

    spacing = tuple(rng.uniform(0.4, 4, 3).round(2).tolist())
    one, other = (gaussian_filter(rng.normal(size=shape), 1.5) > 0.02 for _ in range(2))
    axes = 2 if shape[0] == 1 else 3  # an image is scored as one: its contour, not its area
    tensors = [torch.from_numpy(np.stack([~mask, mask])[None]).float() for mask in (one, other)]
    tensors = [one.squeeze(2) if axes == 2 else one for one in tensors]
    scores = mask_scores(one, other, spacing, tolerance=1.7)
    kinds = {"spacing": [spacing[-axes:]], "include_background": False}
    hd95 = metrics.compute_hausdorff_distance(*tensors, percentile=95, **kinds)
    surface = metrics.compute_surface_dice(*tensors, class_thresholds=[1.7], **kinds)
    dice = metrics.compute_dice(*tensors, include_background=False)
    assert scores.dice == pytest.approx(float(dice), abs=1e-6)
    assert scores.hd95 == pytest.approx(float(hd95), abs=1e-4)
    assert scores.surface_dice == pytest.approx(float(surface), abs=1e-6)


def test_images_are_scored_by_their_contours():
    one, other = np.zeros((2, 1, 60, 60), bool)
    one[0, 10:50, 10:50] = True
    other[0, 15:55, 10:50] = True
    scores = mask_scores(one, other, (7, 1, 1))
    assert scores.hd95 == 5 and scores == mask_scores(one, other, (1, 1, 1))
    assert scores.surface_dice < 0.5  # the tolerance is 1 mm, whatever the side along D
    assert mask_scores(one, one & False, (7, 1, 1)).hd95 == pytest.approx(60 * 2**0.5)


def test_a_random_prediction_scores_chance():
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 24, 24, 24)) < 0.3
    assert mask_scores(one, other, (1, 1, 1)).dice == pytest.approx(0.3, abs=0.02)


# Coarse to fine -----------------------------------------------------------------------------------


def test_regions_are_found_grown_and_kept_inside():
    probability = torch.zeros(8, 8, 8)
    probability[2:4, 5:8, 1:3] = 0.9
    probability[7, 0, 7] = 0.9  # a twelfth of the other: a slip
    assert region_of(probability, (80, 40, 16)) == (20, 25, 2, 40, 40, 6)
    assert region_of(torch.zeros(8, 8, 8), (80, 40, 16)) is None
    assert expanded((20, 25, 2, 40, 40, 6), (0.5, 0.2, 0), (80, 40, 16)) == (10, 19, 2, 50, 40, 6)
    low = expanded((0, 0, 0, 2, 2, 2), (0, 0, 0), (80, 40, 16), (10, 10, 32))
    assert low == (0, 0, 0, 10, 10, 16)


def test_a_region_pushed_inside_keeps_its_size():
    assert expanded((70, 0, 0, 80, 4, 4), (0, 0, 0), (80, 40, 16), (20, 4, 4))[:1] == (60,)


def test_shrinking_keeps_means_and_loses_no_small_object():
    image = torch.randn(2, 40, 24, 32)
    assert torch.allclose(shrunk(image, (8, 8, 8)), F.avg_pool3d(image, (5, 3, 4)), atol=1e-5)
    mask = torch.zeros(40, 24, 32, dtype=torch.bool)
    mask[17, 11, 30] = True
    small = shrunk_mask(mask, (8, 8, 8))
    assert small.sum() == 1 and small[3, 3, 7]
    assert shrunk(image[:, :3], (8, 8, 8)).shape == (2, 8, 8, 8)
    assert shrunk_mask(mask[:3], (8, 8, 8)).shape == (8, 8, 8)


def test_the_coarse_stage_begins_with_the_encoders_weights_and_is_its_own():
    encoder = resnet()
    network = CoarseToFine(encoder, segmentation_head("unet", encoder, 2, 8))
    assert network.encoder is encoder and network.coarse.encoder is not encoder
    for one, other in zip(encoder.parameters(), network.coarse.encoder.parameters()):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()


def test_where_the_coarse_stage_finds_nothing_the_region_is_the_whole():
    class Nothing(torch.nn.Module):
        def forward(self, x):
            return [torch.stack([x[:, 0] * 0 + 9, x[:, 0] * 0], dim=1)]

    assert find_region(Nothing(), torch.randn(1, 20, 30, 10), (8, 8, 8), 0.1, (4, 4, 4)) == (
        0,
        0,
        0,
        20,
        30,
        10,
    )


# NIfTI --------------------------------------------------------------------------------------------


def oblique(spacing=(1.0, 1.2, 2.5)):
    """(i, j, k) to RAS+ of an oblique scan whose axes run left, anterior, inferior."""
    a, b = 0.3, -0.2
    turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn @ np.diag([-spacing[0], spacing[1], -spacing[2]])
    matrix[:3, 3] = (33, -20, 7)
    return matrix


def prepared(tmp_path, *flags, shape=(18, 22, 12), affine=None):
    """A scan and its mask as NIfTI, through `ssl3d prepare`; the store, and the mask's voxels."""
    import json

    import nibabel

    from ssl3d.cli import main

    rng = np.random.default_rng(0)
    affine = oblique() if affine is None else affine
    image = rng.normal(100, 20, shape).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[5:11, 6:14, 3:8] = 1
    mask[8:13, 6:10, 5:8] = 2
    image += 200 * (mask > 0)
    root = tmp_path / "set"
    for folder, voxels in (("imagesTr", image), ("labelsTr", mask)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), root / folder / "case_001.nii.gz")
    content = {
        "name": "made",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "a", "2": "b"},
        "numTraining": 1,
        "training": [{"image": "./imagesTr/case_001.nii.gz", "label": "./labelsTr/case_001.nii.gz"}],
        "test": [],
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    store = tmp_path / "made.h5"
    assert main(["prepare", str(root), "--out", str(store), "--workers", "0", *flags]) == 0
    return open_data([store])[0], mask


def test_written_nifti_has_the_scans_affine_shape_and_voxels(tmp_path):
    import nibabel

    volume, mask = prepared(tmp_path)
    path = tmp_path / "predicted.nii.gz"
    assert save_segmentation(volume.record, volume.read_mask().numpy(), path)
    written = nibabel.load(path)
    assert written.shape == mask.shape and np.allclose(written.affine, oblique(), atol=1e-4)
    assert np.array_equal(np.asarray(written.dataobj), mask)


@pytest.mark.parametrize("label", [-3, 255, 300, 40000, 100_000])
def test_written_nifti_holds_the_largest_label(tmp_path, label):
    import nibabel

    volume, mask = prepared(tmp_path)
    labels = volume.read_mask().numpy().astype(np.int64)
    labels[labels == 2] = label
    assert save_segmentation(volume.record, labels, tmp_path / "predicted.nii.gz")
    written = np.asarray(nibabel.load(tmp_path / "predicted.nii.gz").dataobj)
    assert set(np.unique(written)) == {0, 1, label} and np.array_equal(written == label, mask == 2)
    with pytest.raises(DataError, match="32 bits"):
        save_segmentation(volume.record, labels * 2**33, tmp_path / "predicted.nii.gz")


def test_cropped_and_resampled_scans_go_back_too(tmp_path):
    import nibabel

    volume, mask = prepared(tmp_path, "--spacing", "1", "1", "1")
    path = tmp_path / "predicted.nii.gz"
    assert volume.shape[1:] != mask.shape[::-1]
    assert save_segmentation(volume.record, volume.read_mask().numpy(), path)
    back = np.asarray(nibabel.load(path).dataobj)
    assert back.shape == mask.shape
    for k in (1, 2):
        assert 2 * ((back == k) & (mask == k)).sum() / ((back == k).sum() + (mask == k).sum()) > 0.9
    # Every voxel of the scan gets a label, to the rim.
    ones = np.ones(volume.shape[1:], np.int64)
    assert to_original(volume.record, ones).all()


def test_a_record_without_the_sources_grid_gives_the_stores(tmp_path):
    import nibabel

    affine = ((0.0, 0.0, 1.5, 4.0), (0.0, 1.0, 0.0, 5.0), (2.0, 0.0, 0.0, 6.0), (0.0, 0.0, 0.0, 1.0))
    record = Record(id="a", dataset="d", subject="s", spacing=(2.0, 1.0, 1.5), affine=affine)
    labels = np.random.default_rng(0).integers(3, size=(4, 5, 6))
    assert not save_segmentation(record, labels, tmp_path / "a.nii")
    written = nibabel.load(tmp_path / "a.nii")
    assert np.array_equal(np.asarray(written.dataobj), labels.T)
    assert np.allclose(written.affine @ [1, 2, 3, 1], np.array(affine) @ [3, 2, 1, 1])
    with pytest.raises(DataError, match="nii"):
        save_segmentation(record, labels, tmp_path / "a.png")
    with pytest.raises(DataError, match="D, H, W"):
        save_segmentation(record, labels[0], tmp_path / "a.nii")
