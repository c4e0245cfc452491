"""The ViT is torchvision's on images, takes any size, and learns every position embedding."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.vision_transformer import VisionTransformer

from ssl3d.checkpoint.encoders import load_encoder, save_encoder
from ssl3d.encoders.vit import ViT, ViTConfig, repeat_edges, resampling
from ssl3d.testing import check_encoder

SMALL = ViTConfig(patch=(4, 4, 4), width=16, layers=4, heads=2, grid=(2, 4, 4), maps=2)


def small(**options):
    torch.manual_seed(0)
    net = ViT(ViTConfig(**{**vars(SMALL), **options})).double().eval()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return net


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(width=12, patch=(1, 4, 8), grid=(3, 2, 4), layers=3, maps=2, checkpointing=True),
        ViTConfig(width=8, patch=(2, 3, 4), layers=2, maps=1, dropout=0.1, in_channels=2),
    ],
)
def test_patches_maps_and_checkpointing_keep_the_contract(config):
    check_encoder("vit", config)


def test_by_default_it_is_vit_s():
    with torch.device("meta"):
        net = ViT()
    assert net.channels == (384,) * 4 and net.strides == ((8, 8, 8),) * 4
    assert 21e6 < sum(parameter.numel() for parameter in net.parameters()) < 22e6
    assert net.encoder.layers["encoder_layer_0"].self_attention.head_dim == 64


# The 2D network ---------------------------------------------------------------------------------------


def test_an_image_gives_what_torchvisions_vit_gives():
    torch.manual_seed(0)
    reference = VisionTransformer(32, 4, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=64).double()
    weights = {
        k: v for k, v in reference.state_dict().items() if k.split(".")[0] in ("conv_proj", "encoder")
    }
    weights["encoder.pos_embedding"] = weights["encoder.pos_embedding"][:, 1:]  # no class token
    # As I3D inflates: through the depth the kernel is the same, and sums to what it was.
    weights["conv_proj.weight"] = weights["conv_proj.weight"][:, :, None].repeat(1, 1, 4, 1, 1) / 4
    net = small(in_channels=3, grid=(1, 8, 8))
    net.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    reference.encoder.pos_embedding.data = weights["encoder.pos_embedding"]
    with torch.no_grad():
        expected = reference.eval().encoder(reference.conv_proj(x).flatten(2).transpose(1, 2))
        found = net(x[:, :, None])[-1]
        thick = net(x[:, :, None].expand(-1, -1, 4, -1, -1))[-1]
    assert torch.allclose(found.flatten(2).transpose(1, 2), expected, atol=1e-12)
    assert torch.allclose(found, thick, atol=1e-12)


# Any size ---------------------------------------------------------------------------------------------


def test_an_image_is_a_volume_with_that_slice_throughout():
    net, x = small(), torch.randn(2, 1, 1, 9, 15, dtype=torch.float64)
    with torch.no_grad():
        for image, volume in zip(net(x), net(x.expand(-1, -1, 4, -1, -1)), strict=True):
            assert image.shape == (2, 16, 1, 3, 4)
            assert torch.allclose(image, volume, atol=1e-12)


def test_odd_sizes_are_lengthened_by_the_last_slice():
    x = torch.randn(1, 1, 3, 5, 9, dtype=torch.float64)
    longer = F.pad(x, (0, 3, 0, 3, 0, 1), mode="replicate")
    assert torch.equal(repeat_edges(x, (4, 4, 4)), longer)
    net = small()
    with torch.no_grad():
        assert torch.equal(net.embed(x), net.embed(longer))


@pytest.mark.parametrize("source,target", [(8, 4), (8, 3), (8, 1), (5, 4), (4, 4), (4, 7), (3, 12), (1, 6)])
def test_positions_are_interpolated_as_torch_does(source, target):
    line = torch.randn(1, 1, source, 5)  # not 1 wide: torch 2.15 then repeats the first row
    expected = F.interpolate(line, (target, 5), mode="bilinear", antialias=True)
    assert torch.allclose(resampling(target, source, line) @ line[0, 0], expected[0, 0], atol=1e-6)


def test_positions_of_a_larger_grid_are_trilinear():
    net = small()
    table = net.encoder.pos_embedding.detach().transpose(1, 2).unflatten(2, (2, 4, 4))
    expected = F.interpolate(table, (3, 6, 5), mode="trilinear").flatten(2).transpose(1, 2)
    assert torch.allclose(net.encoder.positions((3, 6, 5)), expected, atol=1e-6)
    assert net.encoder.positions((2, 4, 4)) is net.encoder.pos_embedding


@pytest.mark.parametrize("size", [(1, 5, 7), (4, 4, 4), (8, 16, 16), (13, 21, 8)])
def test_every_position_embedding_learns_at_every_size(size):
    net = small()
    net(torch.randn(2, 1, *size, dtype=torch.float64))[-1].square()[:, :, :, ::2].sum().backward()
    assert bool((net.encoder.pos_embedding.grad.abs().sum(-1) > 0).all())


def test_where_a_patch_is_counts():
    """Without position embeddings a transformer's mean over tokens is the same for shuffled patches."""
    net = small()
    x = torch.randn(1, 1, 4, 16, 16, dtype=torch.float64)
    moved = torch.cat([x[..., 8:], x[..., :8]], dim=-1)
    with torch.no_grad():
        assert (net.embed(x) - net.embed(moved)).abs().max() > 1e-6
        net.encoder.pos_embedding.zero_()
        assert torch.allclose(net.embed(x), net.embed(moved), atol=1e-12)


# Options ----------------------------------------------------------------------------------------------


def test_maps_are_those_of_evenly_spaced_blocks():
    few, all_ = small(maps=2), small(maps=4)
    x = torch.randn(1, 1, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        few, all_ = few(x), all_(x)
    assert torch.equal(few[0], all_[1]) and torch.equal(few[1], all_[3])


@pytest.mark.parametrize(
    "options,field",
    [
        ({"patch": (0, 4, 4)}, "patch"),
        ({"grid": (4, 4)}, "grid"),
        ({"width": 0}, "width"),
        ({"maps": 13}, r"maps \(13\) must be at most layers \(12\)"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_options_are_checked(options, field):
    with pytest.raises(ValueError, match=field):
        ViTConfig(**options)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    net = small().float()
    save_encoder(net, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert isinstance(loaded, ViT) and loaded.config == net.config
    x = torch.randn(1, 1, 3, 9, 8)
    with torch.no_grad():
        assert torch.equal(loaded.embed(x), net.embed(x))
