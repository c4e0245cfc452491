"""Shortcuts without parameters, dilated stages, fine maps: against torchvision, MONAI and by hand."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ssl3d.encoders.convolutions import convolution
from ssl3d.encoders.resnet import (
    ResNet10,
    ResNet18,
    ResNet50,
    ResNet101,
    ResNet152,
    ResNet200,
    ResNetConfig,
)
from ssl3d.errors import UsageError
from ssl3d.specs import encoder_from
from ssl3d.testing import check_encoder, dead_taps

KINDS = ["3d", "p3d", "acs", "2.5d"]


def settled(encoder, seed=0):
    """In evaluation mode, double precision, with norm statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return encoder.double().eval()


@pytest.mark.parametrize("kind,stride,gap", list(product(KINDS, [1, 2], [(2, 2, 2), (1, 2, 4)])))
def test_a_dilated_convolution_is_one_with_zeros_between_its_taps(kind, stride, gap):
    torch.manual_seed(0)
    dilated = convolution(kind, 4, 6, 3, stride, dilation=gap).double()
    for parameter in dilated.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 4, 9, 10, 11, dtype=torch.float64)
    expected = reference(dilated, kind, x, stride, gap)
    torch.testing.assert_close(dilated(x, False), expected)


def reference(module, kind, x, stride, gap):
    """The same by a dense kernel of 2 gap + 1 taps an axis, laid out in this test."""
    weight = module.weight.detach()
    dense = torch.zeros(6, 4, *(2 * g + 1 for g in gap), dtype=torch.float64)
    centre = list(gap)
    places = [(i, j) for i in range(3) for j in range(3)]
    for out in range(6):
        plane = {"acs": out // 2}.get(kind, 0)  # 6 channels: two in each plane
        if kind == "3d":
            for i, j, k in product(range(3), repeat=3):
                dense[out, :, i * gap[0], j * gap[1], k * gap[2]] = weight[out, :, i, j, k]
            continue
        for i, j in places:
            at = list(centre)
            first, second = [axis for axis in range(3) if axis != plane]
            at[first], at[second] = i * gap[first], j * gap[second]
            dense[(out, slice(None), *at)] = weight[out, :, i, j]
    if kind != "p3d":
        return F.conv3d(x, dense, None, stride, gap)
    y = F.conv3d(x, dense, None, (1, stride, stride), gap)
    deep = torch.zeros(6, 6, 2 * gap[0] + 1, 1, 1, dtype=torch.float64)
    deep[:, :, :: gap[0], 0, 0] = module.depth_weight.detach()
    return F.conv3d(y, deep, None, (stride, 1, 1), (gap[0], 0, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"shortcut": "A"}, {"dilated": True, "shortcut": "A", "stem_pool": True}]
)
def test_shortcut_a_and_dilation_keep_the_contract(kind, options):
    check_encoder(ResNet10, ResNetConfig(kind=kind, width=4, **options))


@pytest.mark.parametrize("options", [{"dilated": True}, {"dilated": True, "shortcut": "A"}])
def test_bottlenecks_keep_the_contract_dilated(options):
    check_encoder(ResNet50, ResNetConfig(width=4, **options))


def test_high_resolution_keeps_the_contract():
    check_encoder(ResNet10, ResNetConfig(kind="acs", width=4, high_resolution=True, stem_pool=True))


def test_med3d_has_stride_8_from_its_second_stage_on():
    encoder = ResNet18(ResNetConfig(width=4, dilated=True, stem_pool=True))
    assert encoder.strides == ((2, 2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8), (8, 8, 8))
    assert [stage[1].conv1.dilation[0] for stage in stages(encoder)] == [1, 1, 2, 4]
    assert [stage[0].conv2.dilation[0] for stage in stages(encoder)] == [1, 1, 2, 4]


def test_what_would_not_stride_does_not_dilate():
    steps = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
    encoder = ResNet18(ResNetConfig(width=4, dilated=True, stem_stride=(1, 2, 2), stage_strides=steps))
    assert encoder.strides[-1] == (1, 4, 4)
    assert [stage[0].conv1.dilation for stage in stages(encoder)][2:] == [(1, 2, 2), (1, 4, 4)]


def stages(encoder):
    return [encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4]


def test_transfer_rules_take_the_pool_and_two_strides_away():
    plain = ResNet18(ResNetConfig(width=4, stem_pool=True))
    fine = ResNet18(ResNetConfig(width=4, stem_pool=True, high_resolution=True))
    assert plain.strides[-1] == (32, 32, 32)
    assert fine.strides == ((1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2), (4, 4, 4))
    assert {k: v.shape for k, v in fine.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["acs", "2.5d"])
def test_an_image_gives_torchvisions_dilated_output(kind):
    """torchvision dilates the first block of a stage by the stage before's; that is set right here."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    theirs.layer3[0].conv2.dilation = theirs.layer3[0].conv2.padding = (2, 2)
    theirs.layer4[0].conv2.dilation = theirs.layer4[0].conv2.padding = (4, 4)
    settled(theirs)
    ours = ResNet50(ResNetConfig(kind=kind, in_channels=3, stem_pool=True, dilated=True)).double().eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(2, 3, 66, 71, dtype=torch.float64)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(y))))
    found = ours(x.unsqueeze(2))[-1]
    assert found.shape[2:] == (1, 9, 9)
    torch.testing.assert_close(found.squeeze(2), expected)


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("depth", [1, 17])
def test_it_is_monais_resnet_with_either_shortcut(shortcut, depth):
    from monai.networks.nets.resnet import ResNet as Monai
    from monai.networks.nets.resnet import ResNetBlock

    torch.manual_seed(0)
    theirs = Monai(
        ResNetBlock, [2, 2, 2, 2], [4, 8, 16, 32], n_input_channels=1, conv1_t_size=7, conv1_t_stride=2,
        shortcut_type=shortcut, feed_forward=False, bias_downsample=False,
    )  # fmt: skip
    settled(theirs)
    ours = ResNet18(ResNetConfig(kind="3d", width=4, stem_pool=True, shortcut=shortcut)).double().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 1, depth, 33, 40, dtype=torch.float64)
    y = theirs.maxpool(theirs.act(theirs.bn1(theirs.conv1(x))))
    with torch.no_grad():
        for stage, found in zip(stages(theirs), ours(x)[1:], strict=True):
            y = stage(y)
            torch.testing.assert_close(found, y)


def test_shortcut_a_has_no_parameters_and_passes_the_gradient():
    with_b = ResNet18(ResNetConfig(width=4))
    encoder = ResNet18(ResNetConfig(width=4, shortcut="A"))
    assert not any("downsample" in key for key in encoder.state_dict())
    assert len(with_b.state_dict()) > len(encoder.state_dict())
    block = copy.deepcopy(encoder.layer2[0])
    nn.init.zeros_(block.bn2.weight)  # what is left is the shortcut
    nn.init.zeros_(block.bn2.bias)
    x = torch.rand(1, 4, 4, 4, 4, requires_grad=True)
    y = block(x, False)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2, ::2]) and not y[:, 4:].any()
    y.sum().backward()
    expected = torch.zeros_like(x)
    expected[:, :, ::2, ::2, ::2] = 1
    assert torch.equal(x.grad, expected)


def test_every_dilated_tap_has_a_gradient():
    torch.manual_seed(0)
    encoder = ResNet10(ResNetConfig(kind="3d", width=4, dilated=True, shortcut="A"))
    maps = encoder(torch.randn(2, 1, 41, 41, 41))
    sum((map_ * torch.randn_like(map_)).mean() for map_ in maps).backward()
    assert dead_taps(encoder) == []


@pytest.mark.parametrize("cls,blocks", [(ResNet101, 33), (ResNet152, 50), (ResNet200, 66)])
def test_the_deep_ones_have_their_blocks(cls, blocks):
    with torch.device("meta"):
        encoder = cls(ResNetConfig(kind="3d", width=64))
    assert sum(len(stage) for stage in stages(encoder)) == blocks
    assert encoder.embed_dim == 2048


def test_medicalnets_resnet50_has_its_published_number_of_parameters():
    with torch.device("meta"):
        encoder = ResNet50(ResNetConfig(kind="3d", dilated=True))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 46_155_072


def test_options_are_words_of_an_encoder_by_name():
    encoder = encoder_from("scratch:resnet18:acs:width=4:dilated=true:shortcut=A")
    assert encoder.config.dilated and encoder.config.shortcut == "A" and encoder.config.kind == "acs"
    with pytest.raises(UsageError, match="shortcut is 'C'; choose B, A"):
        encoder_from("scratch:resnet18:acs:shortcut=C")
