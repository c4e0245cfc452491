"""Every registered encoder keeps the contract; the ResNets are the 2D ResNets on images."""

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from ssl3d import plugins
from ssl3d.encoder import Encoder
from ssl3d.encoders import memory_format, to_memory_format
from ssl3d.encoders.norms import norm, norm_relu
from ssl3d.encoders.resnet import ResNet, ResNet10, ResNet18, ResNet34, ResNet50, ResNetConfig
from ssl3d.errors import Ssl3dError, UsageError
from ssl3d.testing import check_encoder, dead_taps

ENCODERS = plugins.names(plugins.ENCODERS)
DEEP = ("resnet101", "resnet152", "resnet200")  # nothing but more blocks of resnet50
CONTRACT = [pytest.param(name, marks=pytest.mark.slow) if name in DEEP else name for name in ENCODERS]


# By name, the options that make an encoder quick to test; others are tested as they come.
SMALL = {
    "densenet121": {"growth": 4, "width": 8, "bottleneck": 2},
    "mobilenet_v2": {"width_multiplier": 0.2, "last_channels": 16},
    "converted": {"network": "shufflenet_v2_x0_5", "strides": ((2, 2, 2), *((1, 1, 1),) * 4)},
    "vit": {"patch": (4, 4, 4), "width": 16, "layers": 4, "heads": 2, "grid": (2, 4, 4), "maps": 2},
    "genesis_unet": {"width": 4},
    "plain_unet": {"width": 4, "max_width": 16, "stages": 4},
    "swin": {"width": 6, "window": (2, 2, 2)},
    **{name: {"width": 8} for name in ("resnet10", "resnet18", "resnet34", "resnet50")},
    **{name: {"width": 4} for name in DEEP},
    **{name: {"width": 4, "max_width": 16} for name in ("resenc", "resenc_l")},
}
EXTRAS = ("monai",)


def registered(name):
    """An encoder and a configuration that is tested quickly; skips what needs an extra that is missing."""
    try:
        cls = plugins.load(plugins.ENCODERS, name)
        config = replace(cls.Config(), **SMALL.get(name, {}))
        cls(config)
    except Ssl3dError as error:
        for extra in EXTRAS:
            if extra in str(error) and importlib.util.find_spec(extra) is None:
                pytest.skip(f"{name} needs {extra}, which is not installed")
        raise
    return cls, config


@pytest.mark.parametrize("name", CONTRACT)
def test_every_registered_encoder_keeps_the_contract(name):
    check_encoder(*registered(name))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_registered_encoder_cites_its_paper(name):
    assert plugins.load(plugins.ENCODERS, name).paper


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
@pytest.mark.parametrize("kind", ["3d", "p3d", "acs", "2.5d"])
@pytest.mark.parametrize("normed", ["batch", "group", "instance"])
def test_every_kind_and_norm_keeps_the_contract(name, kind, normed):
    check_encoder(name, ResNetConfig(kind=kind, norm=normed, width=6 if normed == "instance" else 8))


@pytest.mark.parametrize(
    "options",
    [
        {"stem_pool": True, "stem_stride": (1, 2, 2), "pool_stride": (1, 2, 2)},
        {"stem_kernel": 3, "stem_stride": (1, 1, 1)},
        {"stage_strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)), "stem_stride": (1, 2, 2)},
        {"stage_strides": ((1, 1, 1), (2, 2, 2), (1, 1, 1), (2, 1, 1))},
        {"checkpointing": True, "in_channels": 2},
    ],
)
def test_strides_pools_and_stems_keep_the_contract(options):
    check_encoder("resnet10", ResNetConfig(width=8, **options))


def test_depth_is_kept_where_its_strides_are_1():
    flat = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
    net = ResNet10(ResNetConfig(width=8, stem_stride=(1, 2, 2), stage_strides=flat))
    assert net.strides == ((1, 2, 2), (1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16))
    assert net(torch.randn(2, 1, 5, 32, 32))[-1].shape == (2, 64, 5, 2, 2)


# The 2D network ---------------------------------------------------------------------------------------


def torchvision_pair(cls, kind, dtype, **options):
    """Our network and torchvision's with the same random weights and statistics."""
    torch.manual_seed(0)
    reference = getattr(torchvision.models, cls.__name__.lower())(num_classes=1)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    net = cls(ResNetConfig(kind=kind, in_channels=3, stem_pool=True, **options))
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    net.load_state_dict(weights, strict=True)
    if not net.config.stem_pool:
        reference.maxpool = nn.Identity()
    return net.to(dtype), reference.to(dtype)


def torchvision_maps(reference, x):
    stem = reference.relu(reference.bn1(reference.conv1(x)))
    maps, x = [stem], reference.maxpool(stem)
    for layer in (reference.layer1, reference.layer2, reference.layer3, reference.layer4):
        x = layer(x)
        maps.append(x)
    return maps


@pytest.mark.parametrize("cls", [ResNet18, ResNet34, ResNet50])
@pytest.mark.parametrize("kind", ["acs", "2.5d"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_an_image_gives_the_2d_resnets_output(cls, kind, dtype, tolerance):
    net, reference = torchvision_pair(cls, kind, dtype)
    x = torch.randn(2, 3, 65, 71, dtype=dtype)
    for training in (False, True):
        net.train(training), reference.train(training)
        with torch.no_grad():
            for ours, theirs in zip(net(x.unsqueeze(2)), torchvision_maps(reference, x), strict=True):
                assert ours.shape[2] == 1
                assert (ours[:, :, 0] - theirs).abs().max() <= tolerance * theirs.abs().max()
    theirs = dict(reference.named_buffers())
    for name, value in net.named_buffers():
        assert torch.allclose(value, theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["acs", "2.5d"])
def test_an_image_gives_the_2d_resnets_gradients(kind):
    net, reference = torchvision_pair(ResNet18, kind, torch.float64)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    net(x.unsqueeze(2))[-1].square().mean().backward()
    torchvision_maps(reference, x)[-1].square().mean().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in net.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-8, atol=1e-12)


def test_stride_and_stem_settings_give_the_2d_resnets_output_too():
    strides = ((1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2))
    net, reference = torchvision_pair(
        ResNet18, "acs", torch.float64, stem_stride=(2, 1, 1), stage_strides=strides
    )
    net.eval(), reference.eval()
    reference.conv1.stride = (1, 1)
    reference.layer3[0].conv1.stride = reference.layer3[0].downsample[0].stride = (1, 1)
    x = torch.randn(1, 3, 31, 33, dtype=torch.float64)
    for ours, theirs in zip(net(x.unsqueeze(2)), torchvision_maps(reference, x), strict=True):
        assert torch.allclose(ours[:, :, 0], theirs, rtol=1e-10, atol=1e-10)


def test_2_5d_sees_every_slice_as_the_2d_network_where_depth_strides_are_1():
    strides = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
    net = ResNet10(ResNetConfig(kind="2.5d", width=8, stem_stride=(1, 2, 2), stage_strides=strides)).eval()
    x = torch.randn(1, 1, 4, 32, 32)
    whole = net(x)[-1]
    for k in range(4):
        assert torch.allclose(whole[:, :, k], net(x[:, :, k : k + 1])[-1][:, :, 0], atol=1e-5)


@pytest.mark.parametrize("kind", ["acs"])
def test_a_map_brought_to_depth_1_stays_a_volume(kind):
    """Depth 2 becomes 1 in the stem; the split kernels must still be used, not the whole ones."""
    net = ResNet10(ResNetConfig(kind=kind, width=8)).eval()
    seen = []
    net.layer1[0].conv1.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    net(torch.randn(1, 1, 2, 32, 32))
    ((x, image), out) = seen[0]
    assert x.shape[2] == 1 and image is False
    assert not torch.allclose(out[:, :, 0], net.layer1[0].conv1(x[:, :, 0], True))


# Gradients --------------------------------------------------------------------------------------------


def backward(kind, depth, **options):
    torch.manual_seed(0)
    net = ResNet10(ResNetConfig(kind=kind, width=8, **options))
    loss = sum(m.square().mean() for m in net(torch.randn(2, 1, depth, 33, 33)))
    loss.backward()
    return net


def test_depth_1_leaves_off_plane_taps_of_3d_kernels_without_gradient():
    dead = dead_taps(backward("3d", 1))
    assert "layer1.0.conv1.weight[:, :, 0, :, :]" in dead and "layer1.0.conv1.weight[:, :, 2, :, :]" in dead
    assert not any("weight[:, :, 1, :, :]" in line and "layer" in line for line in dead)
    assert any("depth_weight[:, :, 0]" in line for line in dead_taps(backward("p3d", 1)))


@pytest.mark.parametrize("kind,depth", [("acs", 1), ("2.5d", 1), ("acs", 33), ("3d", 33), ("p3d", 33)])
def test_every_tap_has_a_gradient_where_the_kind_suits_the_depth(kind, depth):
    assert dead_taps(backward(kind, depth)) == []


def test_dead_taps_finds_single_taps_and_missing_gradients():
    net = backward("acs", 1)
    net.conv1.weight.grad[:, :, 2, 3] = 0
    net.layer1[0].conv1.weight.grad[:, :, 1] = 0
    net.layer2[0].bn1.bias.grad = None
    net.layer2[0].bn2.bias.grad.zero_()
    assert set(dead_taps(net)) == {
        "conv1.weight[:, :, 2, 3]",
        "layer1.0.conv1.weight[:, :, 1, :]",
        "layer2.0.bn1.bias (no gradient)",
        "layer2.0.bn2.bias (gradient zero)",
    }
    net.layer2[0].bn1.bias.requires_grad_(False)
    assert "layer2.0.bn1.bias (no gradient)" not in dead_taps(net)


@pytest.mark.parametrize("depth", [1, 2, 9])
@pytest.mark.parametrize("normed", ["batch", "group"])
def test_activation_checkpointing_changes_neither_gradients_nor_statistics(depth, normed):
    a = backward("acs", depth, norm=normed)
    b = backward("acs", depth, norm=normed, checkpointing=True)
    for (name, one), other in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-7), name
    for (name, one), other in zip(a.named_buffers(), b.buffers(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("name", ["resnet10", "resenc", "genesis_unet", "densenet121", "vit"])
def test_activation_checkpointing_outlives_a_second_walk_through_the_graph(name):
    cls, config = registered(name)
    config = config if name == "vit" else replace(config, norm="batch")
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = cls(replace(config, checkpointing=checkpointing))
        maps = net(torch.randn(2, 1, 17, 16, 16, generator=torch.Generator().manual_seed(1)))
        loss = sum(level.square().mean() for level in maps)
        first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)  # as by GradNorm
        loss.backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(first, net.parameters(), strict=True))
        found.append([*first, *net.buffers()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    def kept(**options):
        net = ResNet18(ResNetConfig(width=8, **options))
        total = 0

        def count(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            net(torch.randn(2, 1, 16, 32, 32))
        return total

    assert kept(checkpointing=True) < 0.6 * kept()


# Options ----------------------------------------------------------------------------------------------


def test_zero_init_residual_begins_with_shortcuts_only():
    net = ResNet18(ResNetConfig(width=8, zero_init_residual=True)).eval()
    x = torch.rand(1, 8, 4, 4, 4)
    assert torch.equal(net.layer1(x, False, False), x)


@pytest.mark.parametrize("name", ["resnet10", "mobilenet_v2", "densenet121", "genesis_unet", "resenc"])
def test_instance_norm_of_one_voxel_is_refused_while_training(name):
    cls, config = registered(name)
    net = cls(replace(config, norm="instance"))
    d, h, w = net.strides[-1]
    for size in ((d, h, w), (1, h, w), (1, 2, 1)):
        said = f"{size[0]} x {size[1]} x {size[2]} with stride {d} x {h} x {w}"
        with pytest.raises(UsageError, match=said) as caught:
            net(torch.randn(2, 1, *size))
        assert "\n" not in str(caught.value)
    # Two voxels have a deviation; and of a small volume the shallow maps can be asked for.
    with torch.no_grad():
        assert net(torch.randn(4, 1, d, h, w + 1))[-1].std(0).mean() > 0.1
        if name != "resenc":
            assert net.eval()(torch.randn(2, 1, d, h, w))[0].std(0).mean() > 1e-3
    for other in ("group", "batch"):
        cls(replace(config, norm=other))(torch.randn(2, 1, d, h, w))


def test_group_norm_takes_any_width():
    for width in (6, 12, 20):
        ResNet10(ResNetConfig(norm="group", norm_groups=32, width=width))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kind": "4d"}, "kind is '4d'; choose 3d, p3d, acs, 2.5d"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"width": 0}, "width must be at least 1, not 0"),
        ({"stem_kernel": 4}, "stem_kernel must be odd, not 4"),
        ({"stage_strides": ((1, 1, 1),)}, "stage_strides needs four triples, got 1"),
        ({"stem_stride": (0, 1, 1)}, "stem_stride needs strides of at least 1"),
    ],
)
def test_unusable_options_are_named(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ResNetConfig(**options)


def test_a_wrong_input_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"takes \(B, 1, D, H, W\), got \(2, 3, 4, 4, 4\)"):
        ResNet10(ResNetConfig(width=8))(torch.zeros(2, 3, 4, 4, 4))


@pytest.mark.parametrize("kind", ["3d", "acs"])
def test_the_memory_format_changes_nothing_but_rounding(kind):
    torch.manual_seed(0)
    net = ResNet10(ResNetConfig(kind=kind, width=8)).double()
    x = torch.randn(2, 1, 9, 16, 16, dtype=torch.float64)
    expected = net(x)
    other = to_memory_format(copy.deepcopy(net), torch.channels_last_3d)
    for one, two in zip(expected, other(x.contiguous(memory_format=torch.channels_last_3d)), strict=True):
        assert torch.allclose(one, two)
    last = memory_format(net, "cpu") is torch.channels_last_3d
    assert last == net(x)[0].is_contiguous(memory_format=torch.channels_last_3d)
    assert other(x)[0].is_contiguous(memory_format=torch.channels_last_3d)
    other = to_memory_format(other, torch.contiguous_format)
    assert other(x)[0].is_contiguous()


def test_it_converts_to_synchronised_batch_norm_and_exports():
    net = ResNet10(ResNetConfig(width=8))
    names = set(net.state_dict())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert set(synced.state_dict()) == names
    assert isinstance(synced.bn1, nn.SyncBatchNorm)
    for depth in (1, 5):
        x = torch.randn(2, 1, depth, 16, 16)
        program = torch.export.export(net.eval(), (x,))
        for ours, exported in zip(net(x), program.module()(x), strict=True):
            assert torch.allclose(ours, exported, atol=1e-6)


@pytest.mark.parametrize("kind", ["batch", "group", "instance"])
def test_norm_relu_is_norm_then_sum_then_relu(kind):
    torch.manual_seed(0)
    module = norm(kind, 6, 2).double()
    nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    for shape in ((3, 6, 4, 5), (3, 6, 2, 4, 5)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        residual = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for given in (None, residual):
            reference = copy.deepcopy(module)
            ours = norm_relu(module, x, given)
            theirs = reference(x)
            theirs = (theirs if given is None else theirs + given).relu()
            assert torch.allclose(ours, theirs)
            inputs = [x, *module.parameters()] + ([] if given is None else [given])
            others = [x, *reference.parameters()] + ([] if given is None else [given])
            weight = torch.randn_like(ours)
            for one, two in zip(
                torch.autograd.grad((ours * weight).sum(), inputs),
                torch.autograd.grad((theirs * weight).sum(), others),
                strict=True,
            ):
                assert torch.allclose(one, two)
            for one, two in zip(module.buffers(), reference.buffers(), strict=True):
                assert torch.equal(one, two)


# check_encoder must refuse what breaks the contract ----------------------------------------------------


class WrongStrides(ResNet10):
    def __init__(self, config=None):
        super().__init__(config)
        self.strides = (*self.strides[:-1], (8, 8, 8))


class RemembersDepth(ResNet10):
    def forward(self, x):
        before, self.depth = getattr(self, "depth", 0), x.shape[2]
        return super().forward(x * 2 if before > self.depth else x)


class UsesBatch(ResNet10):
    def forward(self, x):
        return super().forward(x - x.mean(dim=0, keepdim=True))


class Unused(ResNet10):
    def __init__(self, config=None):
        super().__init__(config)
        self.extra = nn.Parameter(torch.zeros(3))


class Noisy(ResNet10):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


class Unpicklable(ResNet10):
    def __init__(self, config=None):
        super().__init__(config)
        self.hook = lambda x: x


class InPlace(ResNet10):
    def forward(self, x):
        return super().forward(x.relu_())


class NeedsSpace(ResNet10):
    def forward(self, x):
        maps = super().forward(x)
        return [*maps[:-1], maps[-1] / min(1, min(x.shape[3:]) - 1)]


class DependsOnLayout(ResNet10):
    def forward(self, x):
        return [m * 2 if self.channels_last else m for m in super().forward(x)]


class Unseeded(ResNet10):
    def __init__(self, config=None):
        super().__init__(config)
        generator = torch.Generator()
        generator.seed()
        nn.init.normal_(self.conv1.weight, generator=generator)


@pytest.mark.parametrize(
    "cls,message",
    [
        (WrongStrides, "channels and strides promise"),
        (RemembersDepth, "saw before|deterministic"),
        (UsesBatch, "rest of its batch"),
        (Unused, r"reaches extra \(no gradient\)"),
        (Noisy, "embed is not pool|deterministic"),
        (InPlace, "changes its input"),
        (NeedsSpace, "or is not finite"),
        (DependsOnLayout, "depends on the memory format"),
        (Unseeded, "not a function of torch's seed"),
    ],
)
def test_check_encoder_refuses_what_breaks_the_contract(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_encoder(cls, ResNetConfig(width=8))


def test_check_encoder_refuses_an_encoder_that_does_not_pickle():
    with pytest.raises(Exception, match=r"pickle|lambda"):
        check_encoder(Unpicklable, ResNetConfig(width=8))


def test_the_contract_is_abstract():
    with pytest.raises(TypeError):
        Encoder()
    assert issubclass(ResNet, Encoder)
