"""What weights do not say of their network: taken from the file, its name, or assumed and told."""

import json

import pytest
import torch
import torchvision
from monai.networks.nets.resnet import ResNet, ResNetBlock
from torch import nn

from ssl3d.cli import main
from ssl3d.convert.foreign import load_foreign
from ssl3d.errors import CheckpointError, UsageError
from ssl3d.specs import encoder_from


def settled(net):
    """In evaluation mode, with norm statistics that are not the initial ones."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.fixture(scope="module")
def small():
    """SimCLR's ResNet for small pictures."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return settled(net)


@torch.no_grad()
def last_map(net, x):
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


@torch.no_grad()
def test_a_stem_of_three_pixels_is_that_of_small_pictures(tmp_path, small, capsys):
    torch.save(small.state_dict(), tmp_path / "r18.pth")
    found = load_foreign(tmp_path / "r18.pth", {"in_channels": 3})
    x = torch.randn(1, 3, 32, 40)
    same(found.encoder(x[:, :, None])[-1][:, :, 0], last_map(small, x))
    assert "stride 1 and no pool" in found.assumed[0] and "stem_stride=2" in found.assumed[0]
    assert main(["info", str(tmp_path / "r18.pth")]) in (0, None)
    told = capsys.readouterr().out
    assert "assumed: a first convolution of 3 x 3" in told
    assert "numbers matched; not used: fc; what has no numbers is assumed" in told
    other = load_foreign(tmp_path / "r18.pth", {"in_channels": 3, "stem_stride": 2, "stem_pool": True})
    small.conv1.stride, small.maxpool = (2, 2), nn.MaxPool2d(3, 2, 1)
    same(other.encoder(x[:, :, None])[-1][:, :, 0], last_map(small, x))
    small.conv1.stride, small.maxpool = (1, 1), nn.Identity()
    assert not any("3 x 3" in line for line in other.assumed)


@torch.no_grad()
def test_hyperparameters_in_the_file_decide_on_the_pool(tmp_path, small):
    state = {f"encoder.{key}": value for key, value in small.state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": {"first_conv": False, "maxpool1": True}}
    torch.save(content, tmp_path / "epoch=9.ckpt")
    found = load_foreign(tmp_path / "epoch=9.ckpt", {"in_channels": 3})
    assert found.encoder.config.stem_pool and "maxpool1 True, as the file says" in found.notes


def test_only_a_name_or_the_file_itself_makes_a_plain_resnet_certain(tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    for name in ("resnet18-f37072fd.pth", "resnet18.pth"):
        torch.save(state, tmp_path / name)
        found = load_foreign(tmp_path / name)
        assert not found.assumed and "is assumed" not in str(found)
    torch.save({"arch": "resnet18", "state_dict": state}, tmp_path / "best.pth")
    assert not load_foreign(tmp_path / "best.pth").assumed
    torch.save(state, tmp_path / "best.pth")
    found = load_foreign(tmp_path / "best.pth")
    assert "network=timm/NAME" in found.assumed[0] and "what has no numbers is assumed" in str(found)
    assert found.encoder.metadata["foreign"]["assumed"] == found.assumed


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnetblur18", pytest.param("resnetaa50", marks=pytest.mark.slow)])
@torch.no_grad()
def test_anti_aliased_resnets_are_timms_where_the_file_says_so(tmp_path, name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = settled(timm.create_model(name))
    torch.save(net.state_dict(), tmp_path / f"{name}_a1h-f0ca1d2b.pth")
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    x = torch.randn(1, 3, 64, 64)
    expected = net.forward_features(x)

    def check(found):
        same(found.encoder(x[:, :, None])[-1][:, :, 0], expected)
        assert f"{name}, as the file says" in found.notes[0] and not found.assumed

    check(load_foreign(tmp_path / f"{name}_a1h-f0ca1d2b.pth", {"in_channels": 3}))
    plain = load_foreign(tmp_path / "pytorch_model.bin", {"in_channels": 3})
    assert plain.layout == "torchvision" and "network=timm/NAME" in plain.assumed[0]
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}), encoding="utf-8")
    check(load_foreign(tmp_path / "pytorch_model.bin", {"in_channels": 3}))
    asked = load_foreign(tmp_path / "pytorch_model.bin", {"in_channels": 3}, layout="torchvision")
    assert asked.encoder.metadata["architecture"] == f"resnet{name[-2:]}" and asked.assumed


def test_the_dilated_backbone_of_a_segmentation_network_is_refused(tmp_path):
    net = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    torch.save(net.state_dict(), tmp_path / "fcn.pth")
    with pytest.raises(CheckpointError, match="whose stages 3 and 4 dilate"):
        load_foreign(tmp_path / "fcn.pth")
    assert load_foreign(tmp_path / "fcn.pth", layout="torchvision").assumed


# 3D -----------------------------------------------------------------------------------------------


def monais(**options):
    torch.manual_seed(0)
    fixed = {"n_input_channels": 1, "feed_forward": False, "shortcut_type": "A", "bias_downsample": False}
    return settled(ResNet(ResNetBlock, [2, 2, 2, 2], [8, 16, 32, 64], **fixed | options))


@torch.no_grad()
def monais_last_map(net, x):
    x = net.act(net.bn1(net.conv1(x)))
    x = x if net.no_max_pool else net.maxpool(x)
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


@torch.no_grad()
def test_a_headless_resnet_without_medicalnets_name_is_not_medicalnets(tmp_path):
    net = monais()  # MONAI's defaults: a first convolution of stride 1
    torch.save(net.state_dict(), tmp_path / "model.pt")
    found = load_foreign(tmp_path / "model.pt")
    x = torch.randn(1, 1, 16, 24, 32)
    same(found.encoder(x)[-1], monais_last_map(net, x))
    card = found.encoder.metadata
    assert found.layout == "monai" and card["labels_seen"] is False and "Med3D" not in str(card)
    for option in ("stem_stride=2", "dilated=true", "axes=xyz"):
        assert any(option in line for line in found.assumed)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "resnet_18.pth")  # MedicalNet's own name
    found = load_foreign(tmp_path / "resnet_18.pth")
    assert found.layout == "medicalnet" and found.encoder.config.dilated and not found.assumed
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "a.pth")
    found = load_foreign(tmp_path / "a.pth")  # its form, and any DataParallel's
    assert found.layout == "medicalnet" and "layout=monai" in found.assumed[0]
    assert load_foreign(tmp_path / "a.pth", layout="monai").layout == "monai"
    assert not load_foreign(tmp_path / "a.pth", layout="medicalnet").assumed


@pytest.mark.parametrize("where", ["bundle", "checkpoint"])
@torch.no_grad()
def test_monais_strides_are_what_the_bundle_or_checkpoint_says(tmp_path, where):
    net = monais(conv1_t_stride=[2, 2, 1], no_max_pool=True, shortcut_type="B", bias_downsample=True)
    options = {"conv1_t_stride": [2, 2, 1], "no_max_pool": True, "spatial_dims": 3}
    content, place = dict(net.state_dict()), tmp_path / "models" / "model.pt"
    place.parent.mkdir()
    if where == "bundle":
        (tmp_path / "configs").mkdir()
        told = {"network_def": {"_target_": "ResNet", **options}, "preprocessing": ["$import torch"]}
        (tmp_path / "configs" / "inference.json").write_text(json.dumps(told), encoding="utf-8")
    else:
        content = {"state_dict": content, "hparams": {"network": options}}
    torch.save(content, place)
    found = load_foreign(place)
    x = torch.randn(1, 1, 16, 24, 32)
    same(found.encoder(x)[-1], monais_last_map(net, x))
    assert "conv1_t_stride 2 2 1, as the file says" in found.notes
    assert not any("stem_stride" in line or "stem_pool" in line for line in found.assumed)


@torch.no_grad()
def test_axes_turn_kernels_and_strides(tmp_path):
    net = monais(conv1_t_stride=[2, 2, 1], conv1_t_size=[7, 7, 3])
    torch.save({"model": net.state_dict(), "conv1_t_stride": [2, 2, 1]}, tmp_path / "model.pt")
    encoder = encoder_from(f"{tmp_path / 'model.pt'}:axes=xyz")
    assert encoder.config.stem_kernel == (3, 7, 7) and encoder.config.stem_stride == (1, 2, 2)
    x = torch.randn(1, 1, 16, 24, 32)
    theirs = monais_last_map(net, x.permute(0, 1, 4, 3, 2)).permute(0, 1, 4, 3, 2)
    same(encoder(x)[-1], theirs)
    with pytest.raises(UsageError, match="axes 'xxy' is no order"):
        load_foreign(tmp_path / "model.pt", axes="xxy")
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "flat.pth")
    with pytest.raises(UsageError, match="2D kernels"):
        load_foreign(tmp_path / "flat.pth", axes="xyz")


@torch.no_grad()
def test_monais_2d_resnets_have_its_strides_too(tmp_path):
    net = monais(spatial_dims=2, n_input_channels=3, shortcut_type="B", bias_downsample=True)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    found = load_foreign(tmp_path / "model.pt", {"in_channels": 3})
    x = torch.randn(1, 3, 40, 32)
    same(found.encoder(x[:, :, None])[-1][:, :, 0], monais_last_map(net, x))
    assert any("MONAI's default" in line for line in found.assumed)


@pytest.mark.parametrize("network", ["wide_resnet50_2", "resnext50_32x4d"])
def test_wide_and_grouped_resnets_are_refused_by_the_name_that_helps(tmp_path, network, capsys):
    """Their blocks are those of ResNet-50, only the channels inside differ."""
    place = tmp_path / "model.pth"
    with torch.device("meta"):
        names = getattr(torchvision.models, network)(weights=None).state_dict()
    torch.save({key: torch.zeros(value.shape, dtype=value.dtype) for key, value in names.items()}, place)
    with pytest.raises(CheckpointError, match=rf"128 channels.*network={network} behind the file's name"):
        load_foreign(place)
    assert main(["info", f"{place}:acs:network={network}"]) == 0
    assert network in capsys.readouterr().out


def test_options_behind_a_files_name_reach_info(tmp_path, capsys):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "model.pt")
    place = f"{tmp_path / 'model.pt'}"
    assert main(["info", f"{place}:network=timm/resnet18"]) == 0
    assert "timm/resnet18" in capsys.readouterr().out
    assert main(["info", f"{place}:2.5d"]) == 0
    assert "kind 2.5d" in capsys.readouterr().out
    assert main(["info", f"{tmp_path / 'other.pt'}:2.5d"])
    assert "no such file or folder" in capsys.readouterr().err
