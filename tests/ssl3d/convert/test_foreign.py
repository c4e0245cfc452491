"""Files of other toolkits' layouts give encoders with those toolkits' outputs; or one clear line."""

import argparse
import io
import json
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from ssl3d.checkpoint.encoders import load_encoder
from ssl3d.cli import main
from ssl3d.convert.foreign import load_foreign, save_foreign
from ssl3d.convert.foreign_layouts import LAYOUTS
from ssl3d.data.open import prepare_options_of
from ssl3d.encoders.resnet import ResNet10, ResNetConfig
from ssl3d.errors import CheckpointError, UsageError
from ssl3d.specs import encoder_from


def settled(net, seed=0):
    """In evaluation mode, with norm statistics and scales that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + 0.1)
            module.weight.data.add_(1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return net.double().eval()


def state_of(net, prefix="", leave=()):
    return {
        f"{prefix}{key}": value.float() if value.is_floating_point() else value
        for key, value in net.state_dict().items()
        if not key.startswith(leave)
    }


def volume(*size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(ours, theirs):
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# MedicalNet and MONAI -----------------------------------------------------------------------------


class MedicalNet(nn.Module):
    """Med3D's backbone as its paper and files have it, typed anew; stages 3 and 4 dilate."""

    def __init__(self, counts, bottleneck, shortcut, width=8):
        super().__init__()
        self.conv1 = nn.Conv3d(1, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.maxpool = nn.MaxPool3d(3, 2, 1)
        before = width
        for n, (count, stride, gap) in enumerate(zip(counts, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            blocks = []
            for k in range(count):
                blocks.append(
                    MedBlock(before, width * 2**n, stride if k == 0 else 1, gap, bottleneck, shortcut)
                )
                before = width * 2**n * (4 if bottleneck else 1)
            setattr(self, f"layer{n + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        maps = [x]
        x = self.maxpool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class MedBlock(nn.Module):
    def __init__(self, before, width, stride, gap, bottleneck, shortcut):
        super().__init__()
        self.out = width * (4 if bottleneck else 1)
        self.stride, self.bottleneck = stride, bottleneck
        spatial = {"kernel_size": 3, "padding": gap, "dilation": gap, "bias": False}
        if bottleneck:
            self.conv1 = nn.Conv3d(before, width, 1, bias=False)
            self.conv2 = nn.Conv3d(width, width, stride=stride, **spatial)
            self.conv3 = nn.Conv3d(width, self.out, 1, bias=False)
            self.bn3 = nn.BatchNorm3d(self.out)
        else:
            self.conv1 = nn.Conv3d(before, width, stride=stride, **spatial)
            self.conv2 = nn.Conv3d(width, width, **spatial)
        self.bn1, self.bn2 = nn.BatchNorm3d(width), nn.BatchNorm3d(width)
        self.downsample = None
        if (stride != 1 or before != self.out) and shortcut == "B":
            self.downsample = nn.Sequential(
                nn.Conv3d(before, self.out, 1, stride, bias=False), nn.BatchNorm3d(self.out)
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        if self.downsample is not None:
            x = self.downsample(x)
        elif x.shape != y.shape:
            x = x[:, :, :: self.stride, :: self.stride, :: self.stride]
            x = torch.cat([x, x.new_zeros(len(x), self.out - x.shape[1], *x.shape[2:])], 1)
        return F.relu(x + y)


@pytest.mark.parametrize(
    "name,counts,bottleneck,shortcut",
    [
        ("resnet10", (1, 1, 1, 1), False, "B"),
        ("resnet18", (2, 2, 2, 2), False, "A"),
        ("resnet34", (3, 4, 6, 3), False, "A"),
        ("resnet50", (3, 4, 6, 3), True, "B"),
    ],
)
def test_medicalnet_files_give_medicalnets_outputs(tmp_path, name, counts, bottleneck, shortcut):
    torch.manual_seed(0)
    theirs = settled(MedicalNet(counts, bottleneck, shortcut))
    file = tmp_path / f"{name}.pth"
    torch.save({"state_dict": OrderedDict(state_of(theirs, "module."))}, file)
    found = load_foreign(file)
    assert found.layout == "medicalnet" and found.prefix == "state_dict.module."
    assert found.match.matched == found.match.total
    encoder = found.encoder
    assert encoder.metadata["architecture"] == name and encoder.config.shortcut == shortcut
    assert encoder.strides[1:] == ((4, 4, 4), (8, 8, 8), (8, 8, 8), (8, 8, 8))
    x = volume(1, 1, 25, 33, 40)
    encoder = encoder.double()
    for one, other in zip(encoder(x), settled(theirs)(x), strict=True):
        same(one, other)


def test_the_old_format_of_torch_is_read_as_medicalnets_files_have_it(tmp_path):
    net = MedicalNet((1, 1, 1, 1), False, "B", width=4)
    torch.save(
        {"state_dict": state_of(net, "module.")}, tmp_path / "a.pth", _use_new_zipfile_serialization=False
    )
    assert load_foreign(tmp_path / "a.pth").layout == "medicalnet"


def test_labels_source_and_preprocessing_are_in_medicalnets_card(tmp_path):
    file = tmp_path / "resnet_10.pth"
    torch.save({"state_dict": state_of(MedicalNet((1, 1, 1, 1), False, "B", width=4), "module.")}, file)
    save_foreign(load_foreign(file), tmp_path / "folder")
    card = load_encoder(tmp_path / "folder").metadata
    assert card["labels_seen"] is True and "3DSeg-8" in card["foreign"]["labels"]
    assert card["foreign"]["file"] == "resnet_10.pth" and card["foreign"]["layout"] == "medicalnet"
    assert len(card["foreign"]["sha256"]) == 64 and "1904.00625" in card["citations"]["weights"]
    assert "percentiles" in card["foreign"]["expects"]
    assert prepare_options_of([load_encoder(tmp_path / "folder")]) == {"normalize": "mr"}


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_monais_resnets_give_monais_outputs_biased_shortcuts_and_all(tmp_path, shortcut):
    from monai.networks.nets.resnet import ResNet, ResNetBlock

    torch.manual_seed(0)
    theirs = ResNet(
        ResNetBlock, [2, 2, 2, 2], [8, 16, 32, 64], n_input_channels=2, conv1_t_size=7, conv1_t_stride=2,
        num_classes=3, shortcut_type=shortcut,
    )  # fmt: skip
    settled(theirs)
    assert ("layer2.0.downsample.0.bias" in theirs.state_dict()) == (shortcut == "B")
    torch.save(state_of(theirs), tmp_path / "model.pt")
    found = load_foreign(tmp_path / "model.pt", {"in_channels": 2, "stem_stride": 1})
    assert found.layout == "monai" and found.match.share == 1
    assert "not used: fc" in str(found)
    ours = found.encoder.double()
    x = volume(1, 2, 9, 17, 20)
    theirs.conv1.stride = (1, 1, 1)
    y = theirs.maxpool(theirs.act(theirs.bn1(theirs.conv1(x))))
    for stage, one in zip(
        (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), ours(x)[1:], strict=True
    ):
        y = stage(y)
        same(one, y)


# Models Genesis -----------------------------------------------------------------------------------


class GenesisDown(nn.Module):
    """The down path of Models Genesis' 3D U-Net, typed anew from its description."""

    def __init__(self):
        super().__init__()
        before = 1
        for name, first in (
            ("down_tr64", 32),
            ("down_tr128", 64),
            ("down_tr256", 128),
            ("down_tr512", 256),
        ):
            stage = nn.Module()
            pairs = []
            for inside, out in ((before, first), (first, 2 * first)):
                pair = nn.Module()
                pair.conv1, pair.bn1 = nn.Conv3d(inside, out, 3, padding=1), nn.BatchNorm3d(out)
                pairs.append(pair)
            stage.ops = nn.Sequential(*pairs)
            setattr(self, name, stage)
            before = 2 * first

    def forward(self, x):
        maps = []
        for stage in self.children():
            if maps:
                x = F.max_pool3d(maps[-1], 2)
            for pair in stage.ops:
                x = F.relu(pair.bn1(pair.conv1(x)))
            maps.append(x)
        return maps


@pytest.fixture(scope="module")
def genesis(tmp_path_factory):
    torch.manual_seed(0)
    theirs = settled(GenesisDown())
    file = tmp_path_factory.mktemp("genesis") / "Genesis_Chest_CT.pt"
    state = state_of(theirs, "module.")
    state["module.up_tr256.up_conv.weight"] = torch.zeros(512, 512, 2, 2, 2)
    state["module.out_tr.final_conv.bias"] = torch.zeros(1)
    torch.save({"epoch": 3, "state_dict": state, "optimizer_state_dict": {"state": {0: {"step": 1}}}}, file)
    return theirs, file


def test_models_genesis_gives_its_down_paths_outputs_on_the_volume_as_its_authors_turn_it(genesis):
    theirs, file = genesis
    encoder = encoder_from(file)
    assert encoder.channels == (64, 128, 256, 512) and encoder.strides[-1] == (8, 8, 8)
    assert encoder.metadata["foreign"]["not_used"] == ["out_tr", "up_tr256"]
    assert encoder.metadata["labels_seen"] is False
    assert any("x y z, to z y x" in note for note in encoder.metadata["foreign"]["notes"])
    encoder = encoder.double()
    x = volume(2, 1, 8, 16, 24)  # z, y, x
    turned = x.permute(0, 1, 4, 3, 2)

    def agree():
        for one, other in zip(encoder(x), theirs(turned), strict=True):
            same(one, other.permute(0, 1, 4, 3, 2))

    agree()
    asked = encoder_from(f"{file}:axes=zyx").double()
    same(asked(x)[-1], theirs(x)[-1])
    theirs.train(), encoder.train()  # as the published code always is: each batch by itself
    agree()
    theirs.eval()


def test_genesis_learns_on_sizes_that_its_pools_do_not_divide(genesis):
    encoder = encoder_from(f"{genesis[1]}:in_channels=2")
    maps = encoder.train()(torch.randn(2, 2, 5, 17, 9))
    assert [tuple(m.shape[2:]) for m in maps] == [(5, 17, 9), (3, 9, 5), (2, 5, 3), (1, 3, 2)]


# torchvision, timm, lightly, Lightning ------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return settled(torchvision.models.resnet18())


def resnet_map(net, x):
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"model": {f"_orig_mod.backbone.{k}": v for k, v in s.items()}},
        lambda s: {
            "pytorch-lightning_version": "2.4.0", "epoch": 3, "callbacks": {"a": {"b": torch.ones(1)}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
            "state_dict": {f"model.encoder.{k}": v for k, v in s.items()} | {"head.weight": torch.ones(3)},
        },
        lambda s: {"network": {"student": {f"module.backbone.{k}": v for k, v in s.items()}}},
        lambda s: {"best": np.float64(0.5), "args": argparse.Namespace(lr=1), "net": s},
    ],
    ids=["plain", "parallel", "compiled", "lightning", "student", "numpy"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["acs", "2.5d", "p3d"])
def test_wrapped_2d_resnets_give_the_2d_output_on_images(tmp_path, resnet18, wrap, kind):
    torch.save(wrap(state_of(resnet18)), tmp_path / "a.ckpt")
    encoder = encoder_from(f"{tmp_path / 'a.ckpt'}:{kind}:in_channels=3").double()
    assert encoder.config.kind == kind and encoder.metadata["foreign"]["matched"] > 11_000_000
    x = volume(1, 3, 1, 64, 50)
    same(encoder(x)[-1].squeeze(2), resnet_map(resnet18, x.squeeze(2)))


def test_a_teacher_and_a_student_are_told_apart(tmp_path):
    small = state_of(ResNet10(ResNetConfig(kind="2.5d", in_channels=3, width=4)))
    weight = small["layer1.0.conv1.weight"]

    def named(prefix, add):
        return {f"{prefix}.{key}": value + add for key, value in small.items()}

    def first(spec):
        return encoder_from(spec).layer1[0].conv1.weight

    dino, moco = tmp_path / "dino.ckpt", tmp_path / "moco.ckpt"
    torch.save({"state_dict": named("student_backbone", 0) | named("teacher_backbone", 1)}, dino)
    same(first(dino), weight + 1)
    same(first(f"{dino}:prefix=student_backbone"), weight)
    torch.save({"state_dict": named("backbone_momentum", 2) | named("backbone", 3)}, moco)
    same(first(moco), weight + 3)
    assert "also in the file: 'state_dict.backbone_momentum.'" in str(load_foreign(moco))
    with pytest.raises(CheckpointError, match=r"under prefix 'nobody' \(has 'state_dict.backbone.'"):
        encoder_from(f"{moco}:prefix=nobody")
    plain, key = tmp_path / "plain.ckpt", tmp_path / "key.ckpt"
    torch.save({"encoder_q": small, "encoder_k": named("module", 1)}, key)
    same(first(key), weight)
    torch.save({"state_dict": named("demand", 0) | named("ema.deeper", 1)}, plain)
    same(first(plain), weight)


def test_a_sequence_of_children_as_lightlys_examples_build_it(tmp_path, resnet18):
    backbone = nn.Sequential(*list(resnet18.children())[:-1])
    torch.save({"state_dict": state_of(backbone, "backbone.")}, tmp_path / "simclr.ckpt")
    found = load_foreign(tmp_path / "simclr.ckpt", {"in_channels": 3})
    assert found.layout == "sequential" and found.match.share == 1
    x = volume(1, 3, 1, 64, 50)
    same(found.encoder.double()(x)[-1].squeeze(2), resnet_map(resnet18, x.squeeze(2)))


def test_a_grey_volume_gives_what_the_grey_picture_gave(tmp_path, resnet18):
    save_file(state_of(resnet18), tmp_path / "model.safetensors")
    x = volume(1, 1, 1, 40, 40)
    expected = resnet_map(resnet18, x.squeeze(2).expand(-1, 3, -1, -1))
    for channels in (1, 2, 5):
        encoder = encoder_from(f"{tmp_path / 'model.safetensors'}:in_channels={channels}").double()
        same(encoder(x.expand(-1, channels, -1, -1, -1))[-1].squeeze(2), expected)
    assert "added up, shared out among 5" in encoder.metadata["foreign"]["notes"][0]


def test_inflated_kernels_see_equal_slices_as_the_picture(tmp_path, resnet18):
    torch.save(state_of(resnet18), tmp_path / "a.pth")
    encoder = encoder_from(f"{tmp_path / 'a.pth'}:3d:in_channels=3").double()
    x = volume(1, 3, 1, 30, 30)
    deep = x.expand(-1, -1, 21, -1, -1)
    found = encoder.conv1(deep, False)[:, :, 5]
    same(found, resnet18.conv1(x.squeeze(2)))
    assert any("inflated along D" in note for note in encoder.metadata["foreign"]["notes"])


def test_old_densenets_and_mobilenets_give_their_maps(tmp_path):
    torch.manual_seed(0)
    dense = settled(torchvision.models.densenet121())
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", k): v for k, v in state_of(dense).items()
    }
    assert any(".norm.1." in key for key in old)
    torch.save(old, tmp_path / "densenet121-a639ec97.pth")
    x = volume(1, 3, 1, 64, 64)
    found = load_foreign(tmp_path / "densenet121-a639ec97.pth", {"in_channels": 3})
    assert found.layout == "densenet" and "not used: classifier" in str(found)
    same(found.encoder.double()(x)[-1].squeeze(2), F.relu(dense.features(x.squeeze(2))))
    mobile = settled(torchvision.models.mobilenet_v2())
    torch.save(state_of(mobile), tmp_path / "mobilenet.pth")
    found = load_foreign(tmp_path / "mobilenet.pth", {"in_channels": 3})
    assert found.layout == "mobilenet"
    same(found.encoder.double()(x)[-1].squeeze(2), mobile.features(x.squeeze(2)))


def test_timms_mobilenet_is_torchvisions_by_other_names(tmp_path):
    torch.manual_seed(0)
    mobile = settled(torchvision.models.mobilenet_v2())
    named = {}
    blocks = [(s, b) for s, count in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(count)]
    for key, value in state_of(mobile, leave=("classifier",)).items():
        parts = key.split(".")
        place = int(parts[1])
        if place in (0, 18):
            module = {("0", 0): "conv_stem", ("1", 0): "bn1", ("0", 18): "conv_head", ("1", 18): "bn2"}
            named[f"{module[parts[2], place]}.{parts[3]}"] = value
            continue
        stage, block = blocks[place - 1]
        names = {
            "0.0": "conv_pw",
            "0.1": "bn1",
            "1.0": "conv_dw",
            "1.1": "bn2",
            "2": "conv_pwl",
            "3": "bn3",
        }
        if stage == 0:
            names = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
        named[f"blocks.{stage}.{block}.{names['.'.join(parts[3:-1])]}.{parts[-1]}"] = value
    named["classifier.weight"] = torch.zeros(5, 1280)
    save_file(named, tmp_path / "mobilenetv2_100.safetensors")
    found = load_foreign(tmp_path / "mobilenetv2_100.safetensors", {"in_channels": 3})
    assert found.layout == "timm-mobilenet"
    x = volume(1, 3, 1, 64, 64)
    same(found.encoder.double()(x)[-1].squeeze(2), mobile.features(x.squeeze(2)))


def test_other_2d_networks_become_converted_encoders_by_name(tmp_path):
    torch.manual_seed(0)
    net = settled(torchvision.models.shufflenet_v2_x0_5())
    torch.save({"state_dict": state_of(net, "model.net.")}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="network=NAME makes"):
        encoder_from(tmp_path / "a.ckpt")
    encoder = encoder_from(f"{tmp_path / 'a.ckpt'}:network=shufflenet_v2_x0_5:kind=soft-acs:in_channels=3")
    assert encoder.metadata["architecture"] == "converted" and encoder.config.kind == "soft-acs"
    x = volume(1, 3, 1, 64, 64)
    y = net.stage4(net.stage3(net.stage2(net.maxpool(net.conv1(x.squeeze(2))))))
    same(encoder.double()(x)[-1].squeeze(2), net.conv5(y))


# nnU-Net ------------------------------------------------------------------------------------------


def unet(strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), kernels=((3, 3, 3),) * 3):
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    return unets.ResidualEncoderUNet(
        1, 3, [4, 8, 12], nn.Conv3d, [list(k) for k in kernels], [list(s) for s in strides], [1, 2, 2], 2,
        [1, 1], True, nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def plan(**arch):
    return {
        "architecture_plans": {"arch_class_name": "ResidualEncoderUNet", "arch_kwargs": arch},
        "pretrain_plan": {"configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": [96] * 3}}},
        "pretrain_num_input_channels": 1,
        "key_to_encoder": "encoder.stages",
    }


@pytest.mark.parametrize("where", ["inside", "beside", "above"])
def test_nnssl_checkpoints_give_the_unets_skips(tmp_path, where):
    torch.manual_seed(0)
    strides, kernels = ((1, 1, 1), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (3, 3, 3))
    theirs = unet(strides, kernels).eval()
    folder = tmp_path / "fold_all"
    folder.mkdir()
    content = {
        "network_weights": theirs.state_dict(), "trainer_name": "BaseMAETrainer", "best": np.float64(3),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(1)}}}, "current_epoch": 1000,
    }  # fmt: skip
    told = plan(strides=[list(s) for s in strides])
    if where == "inside":
        content["nnssl_adaptation_plan"] = told
    else:
        place = folder if where == "beside" else tmp_path
        (place / "adaptation_plan.json").write_text(json.dumps(told), encoding="utf-8")
    torch.save(content, folder / "checkpoint_final.pth")
    found = load_foreign(folder / "checkpoint_final.pth")
    assert found.layout == "resenc" and found.prefix == "network_weights.encoder."
    assert found.match.total == sum(p.numel() for p in theirs.encoder.parameters())
    assert not any("also in the file" in note for note in found.notes)
    assert found.encoder.strides == ((1, 1, 1), (1, 2, 2), (2, 4, 4))
    card = found.encoder.metadata
    assert card["labels_seen"] is False and "BaseMAETrainer" in card["foreign"]["title"]
    assert prepare_options_of([found.encoder]) == {"normalize": "mr", "spacing": [1.0, 1.0, 1.0]}
    x = volume(1, 1, 8, 16, 16).float()
    for one, other in zip(found.encoder(x), theirs.encoder(x), strict=True):
        same(one, other)


def test_nnunets_own_checkpoints_say_their_strides_and_that_they_saw_labels(tmp_path):
    theirs = unet(((1, 1, 1), (1, 2, 2), (1, 2, 2)))
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {"strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2]]},
    }
    plans = {"configurations": {"3d_lowres": {"architecture": architecture}}}
    start = {"plans": plans, "configuration": "3d_lowres", "fold": 0}
    torch.save(
        {"network_weights": theirs.state_dict(), "init_args": start}, tmp_path / "checkpoint_best.pth"
    )
    encoder = encoder_from(tmp_path / "checkpoint_best.pth")
    assert encoder.strides[-1] == (1, 4, 4) and encoder.metadata["labels_seen"] is True


def test_without_plans_the_strides_are_assumed_and_said_so(tmp_path):
    torch.save({"network_weights": unet().state_dict()}, tmp_path / "a.pth")
    found = load_foreign(tmp_path / "a.pth")
    assert found.encoder.strides[-1] == (4, 4, 4) and "strides of 1, then 2" in found.assumed[0]
    found = load_foreign(tmp_path / "a.pth", {"strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2]]})
    assert found.encoder.strides[-1] == (1, 4, 4)
    assert not any("strides" in line for line in found.assumed)


def test_nnunets_files_may_hold_one_name_of_each_tensor(tmp_path):
    theirs = unet()
    once = {k: v.clone() for k, v in theirs.encoder.state_dict().items() if "all_modules" not in k}
    save_file(once, tmp_path / "a.safetensors")
    assert load_foreign(tmp_path / "a.safetensors").match.share == 1
    other = {k: v.clone() for k, v in theirs.encoder.state_dict().items() if ".conv.conv" not in k}
    kept = {k: v for k, v in other.items() if "all_modules" in k or not re.search(r"\.(conv|norm)\.", k)}
    kept |= {"stem.convs.0.conv.weight": theirs.encoder.stem.convs[0].conv.weight.data.clone()}
    kept |= {k: v for k, v in once.items() if k.endswith("blocks.0.conv1.conv.weight")}
    kept |= {
        k: v
        for k, v in once.items()
        if k.endswith("conv1.conv.weight") or k.endswith("stem.convs.0.conv.bias")
    }
    save_file(kept, tmp_path / "b.safetensors")
    found = load_foreign(tmp_path / "b.safetensors")
    assert found.match.share == 1
    x = torch.randn(1, 1, 8, 8, 8)
    same(found.encoder(x)[-1], theirs.eval().encoder(x)[-1])


# What is refused ----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.fixture
def state():
    return state_of(MedicalNet((1, 1, 1, 1), False, "B", width=4), "module.")


def write(path, content):
    torch.save(content, path)
    return path


def bad_files(folder, state):
    """Name to a file and what its one line must say."""
    whole = write(folder / "whole.pth", {"state_dict": state}).read_bytes()
    cut, page, empty, lfs, text = (folder / f"{n}.pth" for n in ("cut", "page", "empty", "lfs", "text"))
    cut.write_bytes(whole[: len(whole) // 2])
    page.write_text("<!DOCTYPE html><html><title>Download resnet_18.pth</title></html>", encoding="utf-8")
    empty.write_bytes(b"")
    lfs.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    text.write_text("not weights", encoding="utf-8")
    code = write(folder / "code.pth", {"state_dict": state, "hparams": Evil()})
    classes = folder / "classes.pth"
    buffer = io.BytesIO()
    torch.save(nn.Linear(2, 2), buffer)
    classes.write_bytes(buffer.getvalue())
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    safe = folder / "cut.safetensors"
    save_file({"a": torch.ones(100)}, safe)
    safe.write_bytes(safe.read_bytes()[:200])
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / "script.pt")
    few = dict(list(state.items())[:-4])
    shape = state | {"module.layer4.0.conv2.weight": torch.zeros(2, 2, 3, 3, 3)}
    more = state | {"module.layer1.0.se.fc1.weight": torch.zeros(2, 2)}
    nan = {k: v.clone() for k, v in state.items()}
    nan["module.layer2.0.conv1.weight"][0] = float("nan")
    primus = {"encoder.eva.blocks.0.attn.q_proj.weight": torch.zeros(2, 2)}
    dino = {
        "teacher.backbone.patch_embed.proj.weight": torch.zeros(2, 1, 4, 4, 4),
        "teacher.backbone.blocks.0.0.ls1.gamma": torch.zeros(2),
        "teacher.backbone.cls_token": torch.zeros(1, 1, 2),
    }
    pooled = {"stages.0.0.convs.0.conv.weight": torch.zeros(2, 1, 3, 3, 3)}
    pooled |= {"stages.1.1.convs.0.conv.weight": torch.zeros(4, 2, 3, 3, 3)}
    small = next(key for key, value in state.items() if value.ndim > 1)
    complexes = state | {small: state[small].to(torch.complex64)}
    sparse = state | {small: state[small].to_sparse()}
    eleven = state | {"module.layer1.1.conv1.weight": torch.zeros(4, 4, 3, 3, 3)}
    return {
        "missing": (folder / "nowhere.pth", "no such file"),
        "cut": (cut, "truncated"),
        "page": (page, "web page"),
        "empty": (empty, "empty"),
        "lfs": (lfs, "Git LFS"),
        "text": (text, "not weights of PyTorch"),
        "code": (code, r"Python objects.*runs no code.*save its tensors alone"),
        "classes": (classes, r"Python objects \(torch.nn.modules.linear.Linear\)"),
        "zip": (folder / "zip.pth", "truncated, or not weights"),
        "safe": (safe, "truncated or not safetensors"),
        "script": (folder / "script.pt", "TorchScript"),
        "few": (write(folder / "few.pth", few), r"numbers match; \d names are missing"),
        "shape": (write(folder / "shape.pth", shape), r"has shape \(2, 2, 3, 3, 3\), needed is"),
        "more": (write(folder / "more.pth", more), r"1 keys more inside.*layer1.0.se.fc1.weight"),
        "nan": (write(folder / "nan.pth", nan), "not finite"),
        "complex": (write(folder / "complex.pth", complexes), "is complex64; save plain real numbers"),
        "sparse": (write(folder / "sparse.pth", sparse), "is sparse; save plain real numbers"),
        "primus": (write(folder / "primus.pth", primus), "a Primus transformer .*rotary"),
        "3dino": (write(folder / "dino.pth", dino), "a DINOv2 transformer over 3D patches, as 3DINO's"),
        "pooled": (write(folder / "pooled.pth", pooled), "plain encoder of nnU-Net with pools"),
        "unknown": (write(folder / "unknown.pth", {"a.b": torch.ones(2)}), "no network that ssl3d knows"),
        "tensorless": (write(folder / "none.pth", {"epoch": 3}), r"holds no tensors \(epoch\)"),
        "list": (write(folder / "list.pth", [1, 2]), "holds a list"),
        "blocks": (write(folder / "blocks.pth", eleven), "2-1-1-1 basic blocks"),
        "ours": (write(folder / "ours.pth", {"module": state, "spec": {}, "step": 1}), "ssl3d run"),
    }


NAMES = [
    "missing", "cut", "page", "empty", "lfs", "text", "code", "classes", "zip", "safe", "script", "few",
    "shape", "more", "nan", "complex", "sparse", "primus", "3dino", "pooled", "unknown", "tensorless",
    "list", "blocks", "ours",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_file_is_one_clear_line(tmp_path, state, name, capsys):
    files = bad_files(tmp_path, state)
    assert set(files) == set(NAMES)
    path, message = files[name]
    with pytest.raises(CheckpointError, match=message) as error:
        encoder_from(f"foreign:{path}")
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert "code was run" not in capsys.readouterr().out


def test_partial_weights_are_taken_where_asked(tmp_path, state):
    torch.save(dict(list(state.items())[:-6]), tmp_path / "few.pth")
    found = load_foreign(tmp_path / "few.pth", allow_partial=True)
    assert 0.3 < found.match.share < 1 and found.match.missing
    assert encoder_from(f"{tmp_path / 'few.pth'}:allow_partial=true").config.width == 4


@pytest.mark.parametrize(
    "words,message",
    [
        ("layout=medicalnets", "layout 'medicalnets' is none of medicalnet"),
        ("stem_strid=1", "unknown option stem_strid"),
        ("allow_partial=much", "allow_partial is true or false"),
        ("network=resnet19", "resnet19"),
    ],
)
def test_wrong_words_after_the_file_are_named(tmp_path, state, words, message):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=message):
        encoder_from(f"{tmp_path / 'a.pth'}:{words}")


def test_a_forced_layout_that_is_not_there_says_what_it_has(tmp_path, state):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"not of layout genesis, which has down_tr64\.ops"):
        encoder_from(f"{tmp_path / 'a.pth'}:layout=genesis")


def test_every_layout_is_named_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for layout in LAYOUTS:
        assert layout.name in told


# Commands -----------------------------------------------------------------------------------------


def test_the_command_makes_a_folder_that_loads_and_prints_the_table(tmp_path, state, capsys):
    file = write(tmp_path / "resnet_10.pth", {"state_dict": state})
    folder = tmp_path / "encoder"
    assert main(["convert", str(file), "--layout", "medicalnet", "--out", str(folder)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"layer4\.0 +[\d,]+ of +[\d,]+", told) and "numbers matched" in told
    assert "MedicalNet" in told and "8 x 8 x 8" in told
    encoder, direct = encoder_from(folder), encoder_from(file)
    assert encoder.config == direct.config
    for key, value in direct.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[key])
    assert encoder_from(f"{folder}:high_resolution=true").strides[0] == (1, 1, 1)
    assert main(["convert", str(file), "--out", str(folder)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (
        main(["convert", str(file), "--out", str(folder), "--in-channels", "2", "--overwrite", "true"]) == 0
    )
    assert encoder_from(folder).config.in_channels == 2


def test_info_tells_what_a_foreign_file_is(tmp_path, state, capsys):
    file = write(tmp_path / "resnet_10.pth", {"state_dict": state})
    assert main(["info", str(file)]) in (0, None)
    told = capsys.readouterr().out
    assert "MedicalNet" in told and "labels of volumes seen: yes" in told and "sha256" in told
    assert main(["info", str(file), "--json"]) in (0, None)
    assert json.loads(capsys.readouterr().out)["layout"] == "medicalnet"


def test_a_foreign_file_is_where_pretraining_starts(tmp_path, state):
    file = write(tmp_path / "resnet_10.pth", {"state_dict": state})
    run = tmp_path / "run"
    words = (
        "pretrain --data phantoms:4 --proxy context_restoration --context_restoration.crop 16 16 16 "
        "--steps 1 --batch-size 2 --workers 0"
    )
    start = ["--init", f"{file}:stem_stride=1", "--out", str(run), "--accelerator", "cpu"]
    assert main([*words.split(), *start]) in (0, None)
    card = load_encoder(run).metadata
    assert card["architecture"] == "resnet10" and card["config"]["stem_stride"] == [1, 1, 1]
    assert card["labels_seen"] is True and card["config"]["dilated"] is True
