"""DenseNet keeps the contract in every kind and norm, and is the 2D DenseNet on images."""

import pytest
import torch
from torch import nn
from torchvision.models import DenseNet as Reference
from torchvision.models import densenet121

from ssl3d.encoders.convolutional import average_pool
from ssl3d.encoders.densenet import DenseNet, DenseNet121, DenseNetConfig
from ssl3d.testing import check_encoder, dead_taps

SMALL = {"growth": 4, "width": 8, "bottleneck": 2, "stem_kernel": 3}


class Short(DenseNet):
    """Two layers each, for what is tested in all combinations."""

    layers = (2, 2, 2, 2)


@pytest.mark.parametrize("kind", ["3d", "p3d", "acs", "2.5d"])
@pytest.mark.parametrize("normed", ["batch", "group", "instance"])
def test_every_kind_and_norm_keeps_the_contract(kind, normed):
    check_encoder(Short, DenseNetConfig(kind=kind, norm=normed, **SMALL))


@pytest.mark.parametrize(
    "options",
    [
        {"stem_pool": True, "stem_stride": (1, 2, 2), "pool_stride": (1, 2, 2)},
        {"stage_strides": ((1, 2, 2), (1, 2, 2), (1, 2, 2)), "stem_stride": (1, 2, 2), "stem_kernel": 7},
        {"stage_strides": ((3, 2, 1), (1, 1, 1), (2, 3, 3)), "stem_stride": (1, 1, 1)},
        {"checkpointing": True, "in_channels": 2},
    ],
)
def test_strides_pools_and_stems_keep_the_contract(options):
    check_encoder(Short, DenseNetConfig(**(SMALL | options)))


def test_maps_are_cut_before_each_stride_as_timms():
    net = DenseNet121(DenseNetConfig(stem_pool=True))
    assert net.channels == (64, 256, 512, 1024, 1024)
    assert [stride[0] for stride in net.strides] == [2, 4, 8, 16, 32]
    assert [stride[0] for stride in DenseNet121().strides] == [2, 2, 4, 8, 16]


# The 2D network ---------------------------------------------------------------------------------------


def torchvision_pair(kind, dtype, reference=None, cls=Short):
    """Our network and torchvision's with the same random weights and statistics."""
    torch.manual_seed(0)
    whole = reference is not None
    reference = reference or Reference(8, (2, 2, 2, 2), 16, bn_size=2, num_classes=1)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    sizes = {} if whole else {"growth": 8, "width": 16, "bottleneck": 2}
    net = cls(DenseNetConfig(kind=kind, in_channels=3, stem_pool=True, **sizes))
    weights = {k: v for k, v in reference.state_dict().items() if k.startswith("features.")}
    net.load_state_dict(weights, strict=True)
    return net.to(dtype), reference.to(dtype)


def torchvision_maps(reference, x):
    parts = reference.features
    maps = [parts.relu0(parts.norm0(parts.conv0(x)))]
    x = parts.pool0(maps[0])
    for n in range(1, 4):
        transition = getattr(parts, f"transition{n}")
        x = getattr(parts, f"denseblock{n}")(x)
        maps.append(transition.relu(transition.norm(x)))
        x = transition.pool(transition.conv(maps[-1]))
    return [*maps, parts.norm5(parts.denseblock4(x)).relu()]


@pytest.mark.parametrize(
    "kind,dtype,tolerance",
    [("acs", torch.float32, 2e-5), ("acs", torch.float64, 1e-12), ("2.5d", torch.float32, 2e-5)],
)
def test_an_image_gives_the_2d_densenet121s_output(kind, dtype, tolerance):
    net, reference = torchvision_pair(kind, dtype, densenet121(num_classes=1), DenseNet121)
    x = torch.randn(2, 3, 64, 96, dtype=dtype)
    for training in (False, True):
        net.train(training), reference.train(training)
        with torch.no_grad():
            maps = torchvision_maps(reference, x)
            for ours, theirs in zip(net(x.unsqueeze(2)), maps, strict=True):
                assert ours.shape[2] == 1
                assert (ours[:, :, 0] - theirs).abs().max() <= tolerance * theirs.abs().max()
    theirs = dict(reference.named_buffers())
    for name, value in net.named_buffers():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-4)
    reference.eval(), net.eval()
    with torch.no_grad():  # what torchvision's own forward says of the last map
        pooled = reference.classifier(net.embed(x.unsqueeze(2)))
        assert torch.allclose(pooled, reference(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["acs", "2.5d"])
def test_an_image_gives_the_2d_networks_gradients(kind):
    net, reference = torchvision_pair(kind, torch.float64)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    sum(m[:, :, 0].sin().mean() for m in net(x.unsqueeze(2))).backward()
    sum(m.sin().mean() for m in torchvision_maps(reference, x)).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in net.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize("kind", ["acs", "2.5d"])
def test_a_volume_uses_the_2d_networks_weights(kind):
    expected = densenet121().features.state_dict(prefix="features.")
    net = DenseNet121(DenseNetConfig(kind=kind, in_channels=3))
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in expected.items()}


# Volumes ----------------------------------------------------------------------------------------------


def test_pools_give_the_mean_of_each_cell_and_keep_what_does_not_fill_one():
    x = torch.randn(2, 3, 5, 4, 7, dtype=torch.float64)
    pooled = average_pool(x, (2, 1, 3), False)
    assert pooled.shape == (2, 3, 3, 4, 3)
    for d, w in ((0, 0), (1, 1), (2, 0), (0, 2), (2, 2)):
        cell = x[:, :, 2 * d : 2 * d + 2, :, 3 * w : 3 * w + 3]
        assert torch.allclose(pooled[:, :, d, :, w], cell.mean(dim=(2, 4)))
    thin = x[:, :, :1, :, :2]
    assert torch.allclose(
        average_pool(thin, (2, 2, 3), False)[:, :, 0, 0, 0], thin[:, :, 0, :2].mean((2, 3))
    )
    assert torch.allclose(
        average_pool(x[:, :, 0], (2, 1, 3), True), average_pool(x[:, :, :1], (2, 1, 3), False)[:, :, 0]
    )


def test_2_5d_sees_every_slice_as_the_2d_network_where_depth_strides_are_1():
    flat = {"stem_stride": (1, 2, 2), "stage_strides": ((1, 2, 2),) * 3}  # a pool of size 3 would see three
    net = Short(DenseNetConfig(kind="2.5d", **flat, **SMALL)).eval()
    x = torch.randn(1, 1, 4, 33, 35)
    whole = net(x)[-1]
    for k in range(4):
        assert torch.allclose(whole[:, :, k], net(x[:, :, k : k + 1])[-1][:, :, 0], atol=1e-5)


def test_a_map_brought_to_depth_1_stays_a_volume():
    """Depth 2 becomes 1 in the stem; the split kernels must still be used, not the whole ones."""
    net = Short(DenseNetConfig(kind="acs", **SMALL)).eval()
    seen = []
    layer = net.features["denseblock1"]["denselayer1"].conv2
    layer.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    net(torch.randn(1, 1, 2, 32, 32))
    ((x, image), out) = seen[0]
    assert x.shape[2] == 1 and image is False
    assert not torch.allclose(out[:, :, 0], layer(x[:, :, 0], True))


@pytest.mark.parametrize("kind,depth", [("acs", 1), ("2.5d", 1), ("acs", 33), ("3d", 33), ("p3d", 33)])
def test_every_tap_has_a_gradient_where_the_kind_suits_the_depth(kind, depth):
    torch.manual_seed(0)
    net = Short(DenseNetConfig(kind=kind, **SMALL))
    sum(m.square().mean() for m in net(torch.randn(2, 1, depth, 33, 33))).backward()
    assert dead_taps(net) == []


def test_activation_checkpointing_makes_memory_linear_in_the_layers():
    def kept(count, **options):
        class Deep(Short):
            layers = (count, 1, 1, 1)

        net = Deep(DenseNetConfig(**SMALL, **options))
        storages = {}  # one tensor may be kept by many layers

        def add(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(add, lambda x: x):
            maps = net(torch.randn(2, 1, 8, 16, 16))
        assert maps
        return sum(len(storage) for storage in storages.values())

    assert kept(24) > 2.5 * kept(12)
    assert kept(24, checkpointing=True) < 0.2 * kept(24)
    assert kept(24, checkpointing=True) < 2.2 * kept(12, checkpointing=True)


@pytest.mark.parametrize("depth", [1, 33])
def test_maps_have_the_memory_format_that_is_faster(depth):
    net = Short(DenseNetConfig(**SMALL))
    maps = net(torch.randn(2, 1, depth, 32, 32))
    assert all(m.is_contiguous(memory_format=torch.channels_last_3d) for m in maps)
    net.channels_last = False
    assert all(m.is_contiguous() for m in net(torch.randn(2, 1, depth, 32, 32)))


def test_it_converts_to_synchronised_batch_norm_and_exports():
    net = Short(DenseNetConfig(**SMALL))
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
        ({"growth": 0}, "growth must be at least 1, not 0"),
        ({"stem_kernel": 4}, "stem_kernel must be odd, not 4"),
        ({"stage_strides": ((1, 1, 1),)}, "stage_strides needs 3 strides along D H W, got 1"),
        ({"pool_stride": (2, 2)}, "pool_stride needs strides of at least 1"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DenseNetConfig(**options)
