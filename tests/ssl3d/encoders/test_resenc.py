"""ResEnc has nnU-Net's names and gives nnU-Net's output, on volumes; its own additions work beside them."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import nn

from ssl3d.checkpoint.encoders import load_encoder, save_encoder
from ssl3d.encoders.resenc import ResEnc, ResEncConfig
from ssl3d.errors import UsageError
from ssl3d.testing import check_encoder

SMALL = ResEncConfig(
    stages=3, width=4, blocks=(1, 2, 1), max_width=8, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2))
)
THICK = replace(SMALL, kernels=((1, 3, 3), (1, 3, 3), (3, 3, 3)))

needs_reference = pytest.mark.skipif(
    importlib.util.find_spec("dynamic_network_architectures") is None,
    reason="dynamic-network-architectures is not installed (pip install dynamic-network-architectures)",
)


def reference(config):
    """The encoder of dynamic-network-architectures with nnU-Net's options."""
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder

    return ResidualEncoder(
        config.in_channels,
        config.stages,
        [min(config.width * 2**n, config.max_width) for n in range(config.stages)],
        nn.Conv3d,
        [list(kernel) for kernel in config.kernels] or 3,
        [list(stride) for stride in config.strides] or [1, 2, 2, 2, 2, 2][: config.stages],
        list(config.blocks) or [1, 3, 4, 6, 6, 6][: config.stages],
        conv_bias=config.conv_bias,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        return_skips=True,
    )


def filled(net):
    """The network with weights that are functions of their place only, and none of them 0 or 1."""
    for parameter in net.parameters():
        n = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.data = torch.sin(1.7 * n + 0.3).view(parameter.shape)
    return net.double().eval()


def volume(*size):
    n = torch.arange(torch.Size(size).numel(), dtype=torch.float64)
    return torch.cos(0.37 * n + 0.05 * (n % 7)).view(size)


# nnU-Net ----------------------------------------------------------------------------------------------


def expected_names():
    """The state dict of dynamic-network-architectures 0.4.4 for SMALL, typed out; tested below."""

    def conv(bias):
        own = [f"conv.{p}" for p in (["weight", "bias"] if bias else ["weight"])]
        twice = [f"all_modules.0.{p.rpartition('.')[2]}" for p in own]
        return [*own, "norm.weight", "norm.bias", *twice, "all_modules.1.weight", "all_modules.1.bias"]

    def within(prefix, names):
        return [f"{prefix}.{name}" for name in names]

    return (
        within("stem.convs.0", conv(True))
        + within("stages.0.blocks.0.conv1", conv(True))
        + within("stages.0.blocks.0.conv2", conv(True))
        + within("stages.1.blocks.0.conv1", conv(True))
        + within("stages.1.blocks.0.conv2", conv(True))
        + within("stages.1.blocks.0.skip.1", conv(False))  # skip.0 is the pooling
        + within("stages.1.blocks.1.conv1", conv(True))
        + within("stages.1.blocks.1.conv2", conv(True))
        + within("stages.2.blocks.0.conv1", conv(True))
        + within("stages.2.blocks.0.conv2", conv(True))  # as many channels as before: only the pooling
    )


def test_names_are_nnunets():
    assert list(ResEnc(SMALL).state_dict()) == expected_names()


@needs_reference
def test_the_names_typed_out_are_those_of_dynamic_network_architectures():
    assert list(reference(SMALL).state_dict()) == expected_names()


# Sum and sum of squares of each map of `reference(SMALL)` and of THICK, filled, on volume(2, 1, 4, 8, 12).
GOLDEN = {
    "SMALL": [(2003.316276, 4233.632956), (1525.5788537, 4160.9987), (251.9631185, 763.672586)],
    "THICK": [(2041.7205113, 5118.234711), (1510.9640236, 3948.29239), (250.554455, 752.147906)],
}


@pytest.mark.parametrize("name", ["SMALL", "THICK"])
def test_maps_are_those_that_dynamic_network_architectures_gave(name):
    with torch.no_grad():
        maps = filled(ResEnc(globals()[name]))(volume(2, 1, 4, 8, 12))
    found = [(float(map_.sum()), float(map_.square().sum())) for map_ in maps]
    for ours, theirs in zip(found, GOLDEN[name], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


@needs_reference
@pytest.mark.parametrize("config", [SMALL, THICK, ResEncConfig(width=4)])
def test_maps_and_gradients_are_those_of_dynamic_network_architectures(config):
    net, other = filled(ResEnc(config)), filled(reference(config))
    net.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(net.state_dict(), strict=True)
    x = volume(2, 1, *(2 * step for step in net.strides[-1]))
    ours, theirs = net(x), other(x)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    ours[-1].square().mean().backward(), theirs[-1].square().mean().backward()
    gradients = dict(other.named_parameters())
    for name, parameter in net.named_parameters():
        # A bias before instance norm has no gradient but rounding.
        assert torch.allclose(parameter.grad, gradients[name].grad, rtol=1e-7, atol=1e-9), name


@needs_reference
def test_six_stages_are_nnunets_resenc_l():
    """Features, blocks and strides of its plan for crops of 160 voxels, on no device: only the shapes."""
    with torch.device("meta"):
        net, other = ResEnc(ResEncConfig(stages=6)), reference(ResEncConfig(stages=6))
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in other.state_dict().items()
    }


def test_six_stages_are_as_nnunet_plans_them():
    with torch.device("meta"):
        net = ResEnc(ResEncConfig(stages=6))
    assert net.channels == (32, 64, 128, 256, 320, 320)
    assert net.strides == tuple((n, n, n) for n in (1, 2, 4, 8, 16, 32))
    assert [len(stage["blocks"]) for stage in net.stages] == [1, 3, 4, 6, 6, 6]


# The contract -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["p3d", "acs", "2.5d"])
def test_every_kind_keeps_the_contract(kind):
    check_encoder("resenc", replace(SMALL, kind=kind, norm="group"))


@pytest.mark.parametrize("config", [THICK, replace(SMALL, norm="batch", conv_bias=False)])
def test_kernels_and_norms_keep_the_contract(config):
    check_encoder("resenc", config)


def test_an_image_gives_what_a_slab_with_empty_neighbours_gives():
    """One full kernel on a slice meets zeros above and below: in 2D it must come to the same."""
    config = ResEncConfig(stages=1, width=4, norm="group")
    net = filled(ResEnc(config))
    x = volume(2, 1, 1, 9, 7)
    with torch.no_grad():
        conv = net.stem["convs"][0].conv
        assert torch.allclose(
            conv(x[:, :, 0], True),
            nn.functional.conv3d(x, conv.weight, None, 1, 1)[:, :, 0],
            atol=1e-12,
        )
    thick = ResEnc(replace(config, kernels=((3, 5, 3),)))
    conv = filled(thick).stem["convs"][0].conv
    expected = nn.functional.conv3d(x, conv.weight, None, 1, (1, 2, 1))[:, :, 0]
    assert torch.allclose(conv(x[:, :, 0], True), expected, atol=1e-12)


def test_at_an_odd_end_the_shortcut_is_the_mean_over_what_is_there():
    pool = ResEnc(SMALL).stages[2]["blocks"][0].skip[0]
    x = volume(1, 3, 3, 4, 5)
    pooled = pool(x, False)
    assert pooled.shape == (1, 3, 2, 2, 3)
    assert torch.allclose(pooled[..., 1, 1, 2], x[:, :, 2:, 2:, 4:].mean(dim=(2, 3, 4)))
    assert torch.allclose(pool(x[:, :, :1], False)[:, :, 0], pool(x[:, :, 0], True))


def test_one_voxel_under_instance_norm_is_an_error_of_one_line():
    net = ResEnc(ResEncConfig(width=4))
    with pytest.raises(UsageError, match="1 x 8 x 8 with stride 8 x 8 x 8") as caught:
        net(torch.zeros(1, 1, 1, 8, 8))
    assert "\n" not in str(caught.value)
    ResEnc(ResEncConfig(width=4, norm="group"))(torch.zeros(1, 1, 1, 8, 8))


def test_a_residual_branch_can_begin_at_zero():
    net = ResEnc(replace(SMALL, zero_init_residual=True, norm="group"))
    block = net.stages[1]["blocks"][1]
    x = torch.rand(1, 8, 2, 4, 4)
    assert torch.equal(block(x, False), x)


@pytest.mark.parametrize(
    "options,field",
    [
        ({"kind": "4d"}, "kind"),
        ({"norm": "layer"}, "norm"),
        ({"width": 0}, "width"),
        ({"stages": 0}, "stages"),
        ({"blocks": (1, 1, 1, 0)}, "blocks"),
        ({"blocks": (1, 1)}, "blocks has 2 entries for 4 stages"),
        ({"strides": ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 0))}, "strides"),
        ({"kernels": ((3, 3, 3),)}, "kernels has 1 entries for 4 stages"),
        ({"kernels": ((1, 2, 3),) * 4}, "kernels needs odd"),
        ({"kernels": ((1, 3, 3),) * 4, "kind": "acs"}, "need kind 3d"),
    ],
)
def test_options_are_checked(options, field):
    with pytest.raises(ValueError, match=field):
        ResEncConfig(**options)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    net = filled(ResEnc(THICK)).float()
    save_encoder(net, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert isinstance(loaded, ResEnc) and loaded.config == THICK
    x = volume(1, 1, 3, 9, 8).float()
    with torch.no_grad():
        assert torch.equal(loaded.embed(x), net.embed(x))
