"""Converted networks against the 2D networks that they were."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ssl3d.convert import config, to_3d
from ssl3d.errors import UsageError

NETWORKS = {
    "resnet18": {}, "resnet50": {}, "resnext50_32x4d": {}, "wide_resnet50_2": {}, "densenet121": {},
    "vgg11_bn": {}, "alexnet": {}, "mobilenet_v2": {}, "mobilenet_v3_small": {}, "efficientnet_b0": {},
    "efficientnet_v2_s": {}, "shufflenet_v2_x0_5": {}, "convnext_tiny": {}, "regnet_y_400mf": {},
    "squeezenet1_1": {}, "mnasnet0_5": {}, "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
}  # fmt: skip
LARGE = {"alexnet", "inception_v3"}  # they leave nothing of 64 pixels
SMALL = ("resnet18", "mobilenet_v2")


def network(name):
    """With running statistics that are not those of a new network."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None, num_classes=10, **NETWORKS[name]).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def image(name, batch=1):
    side = 96 if name in LARGE else 64
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_on_depth_1_acs_and_2_5d_are_the_2d_network_with_its_keys(name):
    net, x = network(name), image(name)
    with torch.no_grad():
        expected = net(x)
        for kind in ("acs", "2.5d"):
            made = to_3d(net, kind)
            assert list(made.state_dict()) == list(net.state_dict())
            assert all(
                torch.equal(a, b)
                for a, b in zip(made.state_dict().values(), net.state_dict().values(), strict=True)
            )
            torch.testing.assert_close(made(x.unsqueeze(2)), expected, rtol=1e-4, atol=1e-5)
        assert made.report.parameters == made.report.before


@pytest.mark.parametrize("kind", config.CONVOLUTIONS)
@pytest.mark.parametrize(
    "name", ["resnet18", "resnext50_32x4d", "mobilenet_v2", "shufflenet_v2_x0_5", "convnext_tiny"]
)
def test_thin_and_cubic_volumes_pass(name, kind):
    made = to_3d(network(name), kind)
    with torch.no_grad():
        for shape in ((2, 3, 3, 64, 64), (1, 3, 33, 33, 33)):
            assert made(torch.randn(shape)).shape == (shape[0], 10)


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "mobilenet_v2", "efficientnet_b0", "googlenet"]
)
def test_i3d_with_replicated_depth_is_the_2d_network_on_a_constant_volume(name):
    net, x = network(name), image(name)
    made = to_3d(net, "i3d", depth_padding="replicate")
    volume = x.unsqueeze(2).expand(-1, -1, 9, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(made(volume), net(x), rtol=1e-3, atol=1e-5)
        assert not torch.allclose(to_3d(net, "i3d")(volume), net(x), rtol=1e-3, atol=1e-5)


CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 7, 3, padding=1),
    "strided": nn.Conv2d(4, 8, 3, stride=2, padding=1),
    "grouped": nn.Conv2d(4, 10, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False),
    "depthwise, two each": nn.Conv2d(3, 6, 3, padding=1, groups=3),
    "dilated": nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "even": nn.Conv2d(4, 6, 4, stride=2, padding=1),
    "patches": nn.Conv2d(4, 6, 4, stride=4),
    "unpadded": nn.Conv2d(4, 6, 3),
    "same": nn.Conv2d(4, 6, 4, padding="same"),
    "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "replicate": nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
    "oblong": nn.Conv2d(4, 6, (1, 7), padding=(0, 3)),
    "point": nn.Conv2d(4, 6, 1, stride=2),
}


def by_hand(conv, x, plane):
    """A 2D kernel in one plane: every 2D section of the volume through the 2D convolution.

    Across the plane, output i is the section at i s - p + d (K - 1) // 2.
    """
    sections = x.movedim(2 + plane, 2)  # (B, C, N, a, b)
    k, s, d = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    p = d * (k - 1) // 2 if conv.padding == "same" else conv.padding[0]
    total = d * (k - 1) if conv.padding == "same" else 2 * p
    count = (sections.shape[2] + total - d * (k - 1) - 1) // s + 1
    out = []
    for i in range(count):
        at = i * s - p + d * ((k - 1) // 2)
        if conv.padding_mode == "circular":
            at %= sections.shape[2]
        inside = 0 <= at < sections.shape[2]
        section = sections[:, :, at] if inside else torch.zeros_like(sections[:, :, 0])
        y = (
            functional.conv2d(
                section, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
            )
            if (conv.padding_mode == "zeros")
            else conv._conv_forward(section, conv.weight, None)
        )
        out.append(y)
    return torch.stack(out, 2).movedim(2, 2 + plane)


@pytest.mark.parametrize("name", [n for n in CONVOLUTIONS if n not in ("oblong", "replicate")])
def test_acs_is_the_2d_convolution_of_the_sections_in_three_planes(name):
    conv = CONVOLUTIONS[name]
    x = torch.randn(2, conv.in_channels, 9, 10, 11)
    c, rest = divmod(conv.out_channels, 3)
    sizes = {0: (c, c, c), 1: (c + 1, c, c), 2: (c + 1, c + 1, c)}[rest]
    start, parts = 0, []
    for plane, size in enumerate(sizes):
        parts.append(by_hand(conv, x, plane)[:, start : start + size])
        start += size
    expected = torch.cat(parts, 1)
    if conv.bias is not None:
        expected = expected + conv.bias[:, None, None, None]
    torch.testing.assert_close(to_3d(conv, "acs")(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", config.CONVOLUTIONS)
def test_layers_agree_in_size_train_and_take_images(name, kind):
    conv = CONVOLUTIONS[name]
    made = to_3d(conv, kind)
    y = made(torch.randn(2, conv.in_channels, 9, 9, 9))
    assert y.shape[3:] == conv(torch.randn(2, conv.in_channels, 9, 9)).shape[2:]
    y.square().sum().backward()
    assert all((p.grad != 0).any() for p in made.parameters())
    if kind != "i3d":
        x = torch.randn(2, conv.in_channels, 9, 9)
        torch.testing.assert_close(made(x.unsqueeze(2)).squeeze(2), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("depth", [2, 3, 5, 9])
def test_2_5d_is_the_2d_layer_on_every_slice_that_its_stride_leaves(name, depth):
    conv = CONVOLUTIONS[name]
    x = torch.randn(2, conv.in_channels, depth, 9, 11)
    expected = torch.stack([conv(x[:, :, d]) for d in range(0, depth, conv.stride[0])], 2)
    for depth_padding in ("zeros", "replicate"):
        made = to_3d(conv, "2.5d", depth_padding=depth_padding)
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)


class PaddedByFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(4, 6, 3, stride=2)

    def forward(self, x):
        return self.convolution(functional.pad(x, (1, 1, 1, 1), mode="reflect"))


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3)),
        nn.Sequential(nn.ReflectionPad2d(1), nn.ZeroPad2d(1), nn.Conv2d(4, 6, 5)),
        PaddedByFunction(),
    ],
)
def test_2_5d_pads_no_slices_for_convolutions_that_pad_by_a_layer_of_their_own(net, depth):
    x = torch.randn(2, 4, depth, 9, 11)
    step = 2 if isinstance(net, PaddedByFunction) else 1
    expected = torch.stack([net(x[:, :, d]) for d in range(0, depth, step)], 2)
    torch.testing.assert_close(to_3d(net, "2.5d")(x), expected, rtol=1e-4, atol=1e-5)


def test_2_5d_pads_slices_for_pools():
    net = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2))
    assert to_3d(net, "2.5d")(torch.randn(1, 4, 5, 9, 9)).shape == (1, 6, 3, 5, 5)


def test_gradients_reach_every_tap_of_acs():
    made = to_3d(nn.Conv2d(2, 6, 3, padding=1), "acs")
    made(torch.randn(1, 2, 5, 5, 5)).square().sum().backward()
    assert (made.weight.grad != 0).all()


def test_soft_acs_begins_as_the_mean_of_the_planes():
    conv = nn.Conv2d(2, 6, 3, padding=1)
    x = torch.randn(1, 2, 5, 6, 7)
    expected = sum(by_hand(conv, x, plane) for plane in range(3)) / 3 + conv.bias.view(-1, 1, 1, 1)
    torch.testing.assert_close(to_3d(conv, "soft-acs")(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", ["D", "H", "W"])
def test_i3d_on_what_is_constant_along_its_axis_is_the_2d_layer_away_from_the_border(axis):
    conv = nn.Conv2d(2, 5, 3, padding=1)
    at = "DHW".index(axis)
    x = torch.randn(1, 2, 8, 8)
    volume = x.unsqueeze(2 + at).expand(*(-1,) * (2 + at), 8, *(-1,) * (2 - at))
    y = to_3d(conv, "i3d", axis=axis)(volume)
    torch.testing.assert_close(y.select(2 + at, 4), conv(x), rtol=1e-4, atol=1e-5)


def test_p3d_begins_as_the_2d_network_on_every_slice():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2, groups=2))
    x = torch.randn(1, 3, 6, 9, 9)
    expected = torch.stack([net(x[:, :, d]) for d in range(6)], 2)
    made = to_3d(net, "p3d")
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
    assert made.report.parameters - made.report.before == 8 * 8 * 3 + 8 * 4 * 5


def test_a_kernel_that_would_leave_no_depth_keeps_its_middle():
    conv = nn.Conv2d(2, 6, 3)
    x = torch.randn(1, 2, 2, 9, 9)
    flat = torch.stack([conv(x[:, :, d]) for d in range(2)], 2)
    torch.testing.assert_close(to_3d(conv, "2.5d")(x), flat, rtol=1e-4, atol=1e-5)
    assert to_3d(conv, "acs")(x).shape == flat.shape
    torch.testing.assert_close(to_3d(conv, "acs")(x)[:, :2], flat[:, :2], rtol=1e-4, atol=1e-5)
    pooled = to_3d(nn.MaxPool2d(3))(x)
    torch.testing.assert_close(
        pooled, torch.stack([functional.max_pool2d(x[:, :, d], 3) for d in range(2)], 2)
    )


class Functional(nn.Module):
    """Everything by function calls, and a squeeze-and-excitation gate that is one per volume."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.gate = nn.Conv2d(6, 6, 1)
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, x, scale: float = 2.0, squeeze: bool = True, more=None):
        size = x.shape[-2:]
        y = self.norm(functional.relu(self.conv(x)))
        if squeeze and more is None:
            y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        z = functional.avg_pool2d(functional.max_pool2d(y, 2), 3, 1, 1)
        z = functional.interpolate(z, size=size, mode="bilinear", align_corners=False)
        pooled = functional.interpolate(functional.adaptive_avg_pool2d(y, 1), size=size)
        maps = torch.cat([y, z, pooled], 1)
        return {"maps": maps, "vector": maps.amax((-1, -2)) * scale}


def reference(net, x, scale=2.0):
    """`Functional`, in 3D, by hand."""
    weight, bias = net.conv.weight, net.conv.bias
    planes = []
    for i in range(3):
        own, padding = slice(2 * i, 2 * i + 2), [0 if axis == i else 1 for axis in range(3)]
        planes.append(functional.conv3d(x, weight[own].unsqueeze(2 + i), bias[own], padding=padding))
    y = net.norm(functional.relu(torch.cat(planes, 1)))
    gate = functional.conv3d(y.mean((2, 3, 4), keepdim=True), net.gate.weight.unsqueeze(2), net.gate.bias)
    y = y * torch.sigmoid(gate)
    z = functional.avg_pool3d(functional.max_pool3d(y, 2), 3, 1, 1)
    z = functional.interpolate(z, size=x.shape[2:], mode="trilinear", align_corners=False)
    maps = torch.cat([y, z, y.mean((2, 3, 4), keepdim=True).expand_as(y)], 1)
    return {"maps": maps, "vector": maps.amax((2, 3, 4)) * scale}


def test_function_calls_see_the_whole_volume():
    net = Functional()
    x = torch.randn(2, 3, 7, 8, 10)
    made = to_3d(net)
    for ours, scale in (
        (made(x), 2.0),
        (made(x, 3.0), 3.0),
        (made(x, scale=3.0, squeeze=True, more=None), 3.0),
    ):
        theirs = reference(net, x, scale)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="squeeze was True"):
        made(x, squeeze=False)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_segmentation_networks_give_maps_of_the_volumes_size(name):
    torch.manual_seed(0)
    make = getattr(torchvision.models.segmentation, name)
    net = make(weights=None, weights_backbone=None, num_classes=3).eval()
    made = to_3d(net)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            made(x.unsqueeze(2))["out"].squeeze(2), net(x)["out"], rtol=1e-4, atol=1e-5
        )
        assert made(torch.randn(1, 3, 7, 64, 64))["out"].shape == (1, 3, 7, 64, 64)


def test_transposed_convolutions_repeat_slices():
    conv = nn.ConvTranspose2d(3, 4, 2, 2)
    x = torch.randn(1, 3, 4, 5, 5)
    expected = torch.stack([conv(x[:, :, d // 2]) for d in range(8)], 2)
    torch.testing.assert_close(to_3d(conv)(x), expected, rtol=1e-4, atol=1e-5)


def test_it_pickles_copies_checkpoints_exports_and_leaves_the_original(tmp_path):
    net = network("resnet18")
    before = pickle.dumps(net)
    made = to_3d(net, "acs")
    x = torch.randn(2, 3, 5, 64, 64, requires_grad=True)
    expected = made(x)
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert torch.equal(other(x), expected)
    plain = torch.autograd.grad(made(x).sum(), made.conv1.weight)[0]
    again = torch.autograd.grad(checkpoint(made, x, use_reentrant=False).sum(), made.conv1.weight)[0]
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
    exported = torch.export.export(made, (x.detach(),))
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        made.conv1.weight.zero_()
    assert pickle.dumps(net) == before


@pytest.mark.slow
def test_it_compiles():
    made, x = to_3d(network("resnet18"), "acs"), torch.randn(1, 3, 4, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(made)(x), made(x), rtol=1e-3, atol=1e-4)


def test_train_and_eval_are_followed_and_stochastic_depth_spares_whole_volumes():
    torch.manual_seed(0)
    net = torchvision.models.convnext_tiny(weights=None, stochastic_depth_prob=1.0)
    made = to_3d(net)
    assert made.training
    drop = next(m for m in made.modules() if type(m).__name__ == "PerSample" and m.layer.p > 0.4)
    drop.layer.p = 0.5
    y = drop(torch.ones(64, 1, 4, 2, 2)).flatten(1)
    assert ((y == 0).all(1) | (y == 2).all(1)).all()  # never a part of a volume
    made.eval()
    assert not any(m.training for m in made.modules())
    assert torch.equal(drop(torch.ones(2, 1, 4, 2, 2)), torch.ones(2, 1, 4, 2, 2))
    x = torch.randn(1, 3, 3, 64, 64)
    assert torch.equal(made(x), made(x))
    made.train()
    assert not torch.equal(made(x), made(x))


def test_the_report_tells_every_layer():
    made = to_3d(network("mobilenet_v2"), "i3d")
    told = {entry.name: entry for entry in made.report.entries}
    assert told["features.0.0"].after == "Inflated 3x3x3"
    assert told["features.1.conv.0.0"].parameters == 3 * 32 * 9
    assert "features.0.0" in str(made.report) and f"{made.report.parameters:,}" in str(made.report)


class Shuffles(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.PixelShuffle(2)

    def forward(self, x):
        return functional.unfold(self.up(x), 2).mean(1)


def test_what_has_no_counterpart_is_named_and_can_be_allowed():
    with pytest.raises(UsageError, match=r"up \(PixelShuffle\); unfold \(unfold\).*allow="):
        to_3d(Shuffles())

    class Up(nn.Sequential):
        pass

    made = to_3d(Up(nn.PixelShuffle(2)), allow=("0",))
    assert made(torch.randn(1, 4, 3, 5, 5)).shape == (1, 1, 3, 10, 10)
    assert made.report.slicewise == [("0", "PixelShuffle")]


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_forward_pass_that_cannot_be_traced_is_one_line():
    with pytest.raises(UsageError, match="Branches cannot be traced"):
        to_3d(Branches())


def test_features_flattened_slice_by_slice_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 64, 3))
    with pytest.raises(RuntimeError, match="5 answers per volume"):
        to_3d(net)(torch.randn(1, 1, 5, 8, 8))


def test_unknown_arguments_name_the_choices():
    with pytest.raises(ValueError, match="choose acs"):
        to_3d(nn.Conv2d(1, 1, 3), "4d")
