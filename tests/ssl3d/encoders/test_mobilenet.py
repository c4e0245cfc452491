"""MobileNetV2 keeps the contract in every kind and norm, and is the 2D MobileNetV2 on images."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import MobileNetV2 as Reference

from ssl3d.encoders import memory_format
from ssl3d.encoders.mobilenet import InvertedResidual, MobileNetV2, MobileNetV2Config, scaled
from ssl3d.testing import check_encoder, dead_taps

ORIGINAL = {"stage_strides": ((2, 2, 2),) * 4}
SMALL = {"width_multiplier": 0.2, "last_channels": 16}


class Short(MobileNetV2):
    """Every part of the network once, for what is tested in all combinations."""

    settings = (
        (1, 16, 1, None),
        (6, 24, 2, 0),
        (6, 32, 1, 1),
        (2, 48, 1, 2),
        (2, 48, 2, None),
        (2, 64, 1, 3),
    )


@pytest.mark.parametrize("kind", ["3d", "p3d", "acs", "2.5d"])
@pytest.mark.parametrize("normed", ["batch", "group", "instance"])
def test_every_kind_and_norm_keeps_the_contract(kind, normed):
    check_encoder(Short, MobileNetV2Config(kind=kind, norm=normed, **SMALL))


@pytest.mark.parametrize(
    "options",
    [
        ORIGINAL,
        {"stem_stride": (1, 2, 2), "stage_strides": ((1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2))},
        {"stem_stride": (1, 1, 1), "stage_strides": ((1, 1, 1), (2, 1, 1), (1, 1, 1), (2, 2, 2))},
        {"checkpointing": True, "in_channels": 2},
    ],
)
def test_strides_keep_the_contract(options):
    check_encoder(Short, MobileNetV2Config(**SMALL, **options))


def test_maps_are_cut_before_each_stride_as_timms():
    net = MobileNetV2(MobileNetV2Config(**ORIGINAL))
    assert net.channels == (16, 24, 32, 96, 1280)
    assert [stride[0] for stride in net.strides] == [2, 4, 8, 16, 32]
    assert net.cuts == (1, 3, 6, 13, 18)
    assert [stride[0] for stride in MobileNetV2().strides] == [2, 4, 8, 16, 16]


# The 2D network ---------------------------------------------------------------------------------------


def torchvision_pair(kind, dtype, multiplier=1.0):
    """Our network and torchvision's with the same random weights and statistics."""
    torch.manual_seed(0)
    reference = Reference(num_classes=1, width_mult=multiplier)
    for module in reference.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            nn.init.normal_(module.weight, std=0.3)  # torchvision's own hardly let anything through
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    config = MobileNetV2Config(kind=kind, in_channels=3, width_multiplier=multiplier, **ORIGINAL)
    net = MobileNetV2(config)
    weights = {k: v for k, v in reference.state_dict().items() if k.startswith("features.")}
    net.load_state_dict(weights, strict=True)
    return net.to(dtype), reference.to(dtype)


def torchvision_maps(reference, x):
    maps = []
    for n, layer in enumerate(reference.features):
        x = layer(x)
        if n in (1, 3, 6, 13, 18):
            maps.append(x)
    return maps


@pytest.mark.parametrize("kind", ["acs", "2.5d"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-4), (torch.float64, 1e-10)])
def test_an_image_gives_the_2d_networks_output(kind, dtype, tolerance):
    net, reference = torchvision_pair(kind, dtype)
    x = torch.randn(2, 3, 65, 71, dtype=dtype)
    # In float32 and training, rounding grows with every batch norm of a few voxels.
    for training in (False, True) if dtype == torch.float64 else (False,):
        net.train(training), reference.train(training)
        with torch.no_grad():
            for ours, theirs in zip(net(x.unsqueeze(2)), torchvision_maps(reference, x), strict=True):
                assert ours.shape[2] == 1
                assert (ours[:, :, 0] - theirs).abs().max() <= tolerance * theirs.abs().max()
    theirs = dict(reference.named_buffers())
    for name, value in net.named_buffers():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["acs", "2.5d"])
def test_an_image_gives_the_2d_networks_gradients(kind):
    net, reference = torchvision_pair(kind, torch.float64)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    sum(m[:, :, 0].sin().mean() for m in net(x.unsqueeze(2))).backward()
    sum(m.sin().mean() for m in torchvision_maps(reference, x)).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in net.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("multiplier", [0.1, 0.25, 0.5, 0.75, 1.4])
def test_a_width_multiplier_gives_torchvisions_network(multiplier):
    net, reference = torchvision_pair("acs", torch.float64, multiplier)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    net.eval(), reference.eval()
    for ours, theirs in zip(net(x.unsqueeze(2)), torchvision_maps(reference, x), strict=True):
        assert torch.allclose(ours[:, :, 0], theirs, rtol=1e-9, atol=1e-9)


def test_widths_are_multiples_of_8_and_at_most_a_tenth_too_narrow():
    assert [scaled(c, 1.0) for c in (16, 24, 1280)] == [16, 24, 1280]
    assert [scaled(c, 0.35) for c in (16, 24, 96)] == [8, 8, 32]
    assert scaled(44, 1.0) == 48 and scaled(67, 1.0) == 64 and scaled(1, 1.0) == 8
    assert scaled(11, 1.0) == 16  # 8 would be less than nine tenths


@pytest.fixture
def imagenet():
    """The folder with real ImageNet weights; skips where it is missing."""
    root = Path(os.environ.get("SSL3D_DATA") or Path(__file__).parents[4] / "shared" / "data")
    if not (root / "imagenet" / "mobilenet_v2_features.pth").is_file():
        pytest.skip(f"ImageNet weights are not in {root / 'imagenet'} (SSL3D_DATA names the folder)")
    return root / "imagenet"


@pytest.mark.parametrize("kind", ["acs", "2.5d"])
def test_imagenet_weights_load_by_name_and_see_photographs_as_torchvision(imagenet, kind):
    weights = torch.load(imagenet / "mobilenet_v2_features.pth", weights_only=True)
    net = MobileNetV2(MobileNetV2Config(kind=kind, in_channels=3, **ORIGINAL)).eval()
    net.load_state_dict(weights, strict=True)
    reference = Reference().eval()
    reference.load_state_dict(weights, strict=False)
    paths = sorted(path for path in (imagenet / "images").iterdir() if path.suffix.lower() != ".csv")[:1]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for path in paths:
        photograph = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[
            :, :224, :224
        ]
        x = ((photograph / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).unsqueeze(0)
        with torch.no_grad():
            ours, theirs = net(x.unsqueeze(2)), torchvision_maps(reference, x)
        for one, two in zip(ours, theirs, strict=True):
            assert (one[:, :, 0] - two).abs().max() <= 2e-5 * two.abs().max()


# Volumes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["acs", "2.5d"])
def test_a_volume_uses_the_2d_networks_weights(kind):
    shapes = {k: tuple(v.shape) for k, v in Reference().features.state_dict(prefix="features.").items()}
    net = MobileNetV2(MobileNetV2Config(kind=kind, in_channels=3))
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == shapes


def test_2_5d_sees_every_slice_as_the_2d_network_where_depth_strides_are_1():
    flat = ((1, 2, 2),) * 4
    net = Short(MobileNetV2Config(kind="2.5d", stem_stride=(1, 2, 2), stage_strides=flat, **SMALL)).eval()
    x = torch.randn(1, 1, 4, 64, 64)
    whole = net(x)[-1]
    for k in range(4):
        assert torch.allclose(whole[:, :, k], net(x[:, :, k : k + 1])[-1][:, :, 0], atol=1e-5)


def test_a_map_brought_to_depth_1_stays_a_volume():
    """Depth 2 becomes 1 in the stem; the split kernels must still be used, not the whole ones."""
    net = Short(MobileNetV2Config(kind="acs", **SMALL)).eval()
    seen = []
    filters = net.features[1].conv[0][0]
    assert filters.groups == filters.in_channels
    filters.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    net(torch.randn(1, 1, 2, 32, 32))
    ((x, image), out) = seen[0]
    assert x.shape[2] == 1 and image is False
    assert not torch.allclose(out[:, :, 0], filters(x[:, :, 0], True))


@pytest.mark.parametrize("kind,depth", [("acs", 1), ("2.5d", 1), ("acs", 33), ("3d", 33), ("p3d", 33)])
def test_every_tap_has_a_gradient_where_the_kind_suits_the_depth(kind, depth):
    torch.manual_seed(0)
    net = Short(MobileNetV2Config(kind=kind, **SMALL))
    sum(m.square().mean() for m in net(torch.randn(2, 1, depth, 33, 33))).backward()
    assert dead_taps(net) == []


def test_activations_end_at_6_and_narrow_layers_have_none():
    net = Short(MobileNetV2Config(**SMALL)).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.weight.fill_(100.0)
        maps = net(torch.randn(1, 1, 16, 16, 16))
    assert maps[-1].min() == 0 and maps[-1].max() == 6
    assert all(m.min() < 0 and m.max() > 6 for m in maps[:-1])


def test_shortcuts_are_where_the_2d_network_has_them():
    ours = [m.residual for m in MobileNetV2().modules() if isinstance(m, InvertedResidual)]
    theirs = [m.use_res_connect for m in Reference().features if hasattr(m, "use_res_connect")]
    assert ours == theirs and sum(ours) == 10


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    def kept(**options):
        net = Short(MobileNetV2Config(**SMALL, **options))
        total = 0

        def count(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            net(torch.randn(2, 1, 16, 32, 32))
        return total

    assert kept(checkpointing=True) < 0.3 * kept()


@pytest.mark.parametrize("depth", [1, 33])
def test_maps_have_the_memory_format_that_is_faster(depth):
    net = Short(MobileNetV2Config(**SMALL))
    assert memory_format(net, "cpu") is torch.channels_last_3d
    maps = net(torch.randn(2, 1, depth, 32, 32))
    assert all(m.is_contiguous(memory_format=torch.channels_last_3d) for m in maps)
    net.channels_last = False
    assert all(m.is_contiguous() for m in net(torch.randn(2, 1, depth, 32, 32)))


def test_it_converts_to_synchronised_batch_norm_and_exports():
    net = Short(MobileNetV2Config(**SMALL))
    names = set(net.state_dict())
    x = torch.randn(2, 1, 5, 16, 16)
    program = torch.export.export(net.eval(), (x,))
    for ours, exported in zip(net(x), program.module()(x), strict=True):
        assert torch.allclose(ours, exported, atol=1e-5)
    assert set(nn.SyncBatchNorm.convert_sync_batchnorm(net).state_dict()) == names


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kind": "4d"}, "kind is '4d'; choose 3d, p3d, acs, 2.5d"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"width_multiplier": 0.0}, "width_multiplier must be above 0, not 0.0"),
        ({"last_channels": 0}, "last_channels must be at least 1, not 0"),
        ({"stage_strides": ((1, 1, 1),)}, "stage_strides needs 4 strides along D H W, got 1"),
        ({"stem_stride": (0, 1, 1)}, "stem_stride needs strides of at least 1"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV2Config(**options)


def test_a_wrong_input_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"takes \(B, 1, D, H, W\), got \(2, 3, 4, 4, 4\)"):
        Short(MobileNetV2Config(**SMALL))(torch.zeros(2, 3, 4, 4, 4))
