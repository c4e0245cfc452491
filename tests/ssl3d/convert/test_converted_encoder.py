"""Converted networks as encoders: the contract, the 2D network's own maps, weights, commands."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from ssl3d.checkpoint.encoders import load_encoder
from ssl3d.cli import main
from ssl3d.convert import networks
from ssl3d.convert.config import ConvertedConfig
from ssl3d.convert.encoder import ConvertedEncoder
from ssl3d.convert.network import feature_network
from ssl3d.convert.weights import read_state
from ssl3d.encoders.masking import only_visible
from ssl3d.errors import CheckpointError, UsageError
from ssl3d.specs import encoder_from, fitting
from ssl3d.testing import check_encoder

NET = "shufflenet_v2_x0_5"
SHORT = ((2, 2, 2), (1, 1, 1), (2, 2, 2), (1, 1, 1), (1, 1, 1))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def weights(tmp_path):
    """A state dict of the small network, as torchvision would save it, with statistics of its own."""
    net = getattr(torchvision.models, NET)(weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    return tmp_path / "net.pth", net.eval()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["acs", "2.5d", "i3d", pytest.param("p3d", marks=SLOW), pytest.param("triplanar", marks=SLOW)]
)
def test_the_contract_holds(kind):
    check_encoder(ConvertedEncoder, ConvertedConfig(network=NET, kind=kind, strides=SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["slices-as-rgb", "rgb"])
def test_the_contract_holds_for_other_stems(stem):
    if stem == "rgb":
        config = ConvertedConfig(network=NET, stem=stem, in_channels=3, strides=SHORT)
    else:
        config = ConvertedConfig(network=NET, stem=stem, strides=SHORT)
    check_encoder(ConvertedEncoder, config)


def timm_like(net, x, places):
    """What hooks on modules give."""
    found = {}
    hooks = [
        net.get_submodule(place).register_forward_hook(
            lambda m, i, o, place=place: found.update({place: o})
        )
        for place in places
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return [functional.relu(found[p]) if p == "features.norm5" else found[p] for p in places]


PLACES = {
    "resnet18": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "mobilenet_v2": ("features.1", "features.3", "features.6", "features.13", "features.18"),
    "densenet121": (
        "features.relu0", "features.denseblock1", "features.denseblock2", "features.denseblock3",
        "features.norm5",
    ),
    "efficientnet_b0": ("features.1", "features.2", "features.3", "features.5", "features.8"),
    "convnext_tiny": ("features.1", "features.3", "features.5", "features.7"),
}  # fmt: skip


HEAVY = ("efficientnet_b0", "convnext_tiny")


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW if n in HEAVY else ()) for n in PLACES])
def test_maps_are_where_timm_has_them_and_are_the_2d_networks_on_an_image(name, tmp_path):
    net = getattr(torchvision.models, name)(weights=None).eval()
    encoder = ConvertedEncoder(
        ConvertedConfig(network=name, in_channels=3), {k: v.clone() for k, v in net.state_dict().items()}
    ).eval()
    x = torch.randn(1, 3, 64, 96)
    expected = timm_like(net, x, PLACES[name])
    if name == "densenet121":  # a block gives its layers' outputs one by one; its hook sees them joined
        expected = [e if isinstance(e, torch.Tensor) else torch.cat(list(e.values()), 1) for e in expected]
    with torch.no_grad():
        maps = encoder(x.unsqueeze(2))
    assert encoder.channels == tuple(e.shape[1] for e in expected)
    assert encoder.strides[-1] == (32, 32, 32)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours[:, :, 0], theirs, rtol=1e-4, atol=1e-5)


def test_names_are_the_2d_networks_and_its_head_is_gone(weights):
    path, net = weights
    encoder = ConvertedEncoder(ConvertedConfig(network=NET), read_state(path))
    theirs = set(net.state_dict())
    ours = {key.removeprefix("network.") for key in encoder.state_dict()}
    assert theirs - ours == {"fc.weight", "fc.bias"} and ours < theirs
    assert encoder.match.matched == encoder.match.total
    assert encoder.match.unused == ["fc.weight", "fc.bias"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["acs", "triplanar"])
def test_one_channel_is_a_grey_picture(weights, kind):
    path, net = weights
    encoder = ConvertedEncoder(ConvertedConfig(network=NET, kind=kind), read_state(path)).eval()
    rgb = ConvertedEncoder(ConvertedConfig(network=NET, kind=kind, stem="rgb"), read_state(path)).eval()
    x = torch.randn(2, 1, 1, 64, 64)
    with torch.no_grad():
        features = net.conv5(
            net.stage4(net.stage3(net.stage2(net.maxpool(net.conv1(x[:, :, 0].repeat(1, 3, 1, 1))))))
        )
        for made in (encoder, rgb):
            found = made(x)[-1][:, :, 0]
            torch.testing.assert_close(found[:, :1024], features, rtol=1e-4, atol=1e-5)


def test_slices_as_rgb_reads_three_neighbours(weights):
    path, net = weights
    config = ConvertedConfig(network=NET, kind="2.5d", stem="slices-as-rgb", strides=((1, 2, 2),) * 5)
    encoder = ConvertedEncoder(config, read_state(path)).eval()
    x = torch.randn(1, 1, 4, 64, 64)
    with torch.no_grad():
        maps = encoder(x)[0]  # what enters the pool
        for d, neighbours in ((0, (0, 0, 1)), (2, (1, 2, 3)), (3, (2, 3, 3))):
            expected = net.conv1(x[:, 0, list(neighbours)])
            torch.testing.assert_close(maps[:, :, d], expected, rtol=1e-4, atol=1e-5)


def test_triplanar_is_the_2d_network_on_the_slices_of_three_planes(weights):
    path, net = weights
    encoder = ConvertedEncoder(ConvertedConfig(network=NET, kind="triplanar"), read_state(path)).eval()
    x = torch.randn(1, 1, 32, 64, 96)
    with torch.no_grad():
        stem = encoder(x)[0]  # stride 2, 24 channels of each plane
        axial = torch.stack([net.conv1(x[:, :, d].repeat(1, 3, 1, 1)) for d in range(32)], 2)
        expected = axial.unflatten(2, (16, 2)).mean(3)
        torch.testing.assert_close(stem[:, :24], expected, rtol=1e-4, atol=1e-5)
        sagittal = torch.stack([net.conv1(x[..., w].repeat(1, 3, 1, 1)) for w in range(96)], 4)
        expected = sagittal.unflatten(4, (48, 2)).mean(5)
        torch.testing.assert_close(stem[:, 48:], expected, rtol=1e-4, atol=1e-5)
    assert encoder.embed_dim == 3 * 1024


def test_strides_are_chosen_and_a_pool_of_stride_1_is_left_out(weights):
    path, net = weights
    state = read_state(path)
    made = ConvertedEncoder(
        ConvertedConfig(
            network=NET, kind="2.5d", strides=((1, 1, 1), (1, 1, 1), (1, 2, 2), (1, 1, 1), (1, 1, 1))
        ),
        state,
    ).eval()
    assert made.strides == ((1, 1, 1), (1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
    x = torch.randn(1, 1, 2, 12, 12)
    with torch.no_grad():
        maps = made(x)
        net.conv1[0].stride = (1, 1)
        expected = net.conv1(x[:, :, 0].repeat(1, 3, 1, 1))
    assert torch.equal(maps[0], maps[1])
    torch.testing.assert_close(maps[0][:, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_resize_enlarges_and_leaves_out_maps_finer_than_the_volume():
    plain = ConvertedEncoder(ConvertedConfig(network=NET)).eval()
    made = ConvertedEncoder(ConvertedConfig(network=NET, resize=(2, 4, 4))).eval()
    made.load_state_dict(plain.state_dict())
    assert made.strides == ((2, 1, 1), (4, 2, 2), (8, 4, 4), (16, 8, 8))
    x = torch.randn(1, 1, 7, 9, 10)
    large = functional.interpolate(x, (14, 36, 40), mode="trilinear")
    with torch.no_grad():
        for ours, theirs in zip(made(x), plain(large)[1:], strict=True):
            torch.testing.assert_close(ours, theirs)
        assert made(x[:, :, :1])[-1].shape[2] == 1


@pytest.mark.long
def test_it_is_saved_and_rebuilt_from_its_config_alone(weights, tmp_path, capsys):
    path, _ = weights
    out = tmp_path / "out"
    assert main(["convert", NET, "--kind", "i3d", "--weights", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Inflated 3x3x3" in printed and "numbers matched; not used: fc" in printed
    card = json.loads((out / "encoder.json").read_text(encoding="utf-8"))
    assert card["architecture"] == "converted" and card["identities"] == []
    direct = encoder_from(f"imagenet:{NET}:i3d:weights={path}")
    path.unlink()
    x = torch.randn(1, 1, 6, 33, 33)
    with torch.no_grad():
        assert torch.equal(load_encoder(out).embed(x), direct.embed(x))
        assert torch.equal(pickle.loads(pickle.dumps(direct)).embed(x), direct.embed(x))
    assert main(["convert", NET, "--weights", "none.pth", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.long
def test_a_proxy_trains_it_further(weights, tmp_path):
    path, _ = weights
    strides = "strides=[[2,2,2],[1,1,1],[2,2,2],[1,1,1],[1,1,1]]"
    arguments = [
        "--data",
        "phantoms:4",
        "--steps",
        "1",
        "--batch-size",
        "4",
        "--simclr.crop",
        "8",
        "16",
        "16",
    ]
    init = f"imagenet:{NET}:acs:{strides}:weights={path}"
    out = tmp_path / "run"
    assert main(["pretrain", "--proxy", "simclr", *arguments, "--init", init, "--out", str(out)]) == 0
    trained, before = load_encoder(out), encoder_from(init)
    assert trained.strides == before.strides
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True)]
    assert all(moved)


def test_hidden_voxels_do_not_reach_visible_ones_through_folded_slices():
    encoder = ConvertedEncoder(ConvertedConfig(network=NET, strides=SHORT)).eval()
    visible = torch.ones(2, 1, 8, 16, 16, dtype=torch.bool)
    visible[0, :, :4] = False
    visible[1, :, :, :8] = False
    x = torch.randn(2, 1, 8, 16, 16) * visible
    with torch.no_grad(), only_visible(encoder, visible):
        maps = encoder(x)
    for m in maps:
        mask = functional.adaptive_max_pool3d(visible.float(), m.shape[2:]) > 0
        assert not m[~mask.expand_as(m)].any() and m[mask.expand_as(m)].any()
    assert (maps[0][0, :, 2:] != 0).any() and not maps[0][0, :, :2].any()


def test_untrained_ones_are_named_as_others_are():
    made = encoder_from(
        f"scratch:converted:network={NET}:2.5d:strides={SHORT}".replace(" ", "")
        .replace("(", "[")
        .replace(")", "]")
    )
    assert made.config == ConvertedConfig(network=NET, kind="2.5d", strides=SHORT)
    assert (
        fitting("imagenet:resnet18:acs:weights=/a:b", 3)
        == "imagenet:resnet18:acs:in_channels=3:weights=/a:b"
    )
    assert fitting("runs/one", 3) == "runs/one"


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_lite0"])
def test_untrained_ones_tell_volumes_apart(name):
    encoder = encoder_from(f"scratch:converted:network={name}")
    with torch.no_grad():
        assert encoder.embed(torch.randn(4, 1, 8, 32, 32)).std(0).mean() > 1e-3


# What is wrong is said in one line ----------------------------------------------------------------


@pytest.mark.parametrize(
    "spec,told",
    [
        ("imagenet:rsnet18:acs", "did you mean resnet18"),
        ("imagenet:resnet18:4d", "kind is '4d'; choose acs"),
        ("imagenet:resnet18:acs:depth=3", "unknown option depth"),
        ("imagenet:resnet18:acs:stem=rgb:in_channels=2", "stem rgb takes 1 channel or 3"),
        ("imagenet:resnet18:triplanar:strides=[[1,2,2]]", "strides of triplanar must be equal"),
        ("imagenet:resnet18:acs:weights=IMAGENET1K_V9", "'IMAGENET1K_V9' are no file, nor one of"),
        ("imagenet:resnet18:acs:weights=none.pth", "none.pth: no such file"),
        ("imagenet:efficientnet_lite0:acs", "name a file, weights=FILE"),
        ("scratch:converted:network=alexnet", "AlexNet: found no feature map"),
        ("scratch:converted:network=vit_b_16", "VisionTransformer"),
        (f"scratch:converted:network={NET}:strides=[[1,1,1]]", "1 given, but ShuffleNetV2 strides in 5"),
        (f"scratch:converted:network={NET}:resize=3,3,3", "must divide the network's total stride"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_one_line(spec, told):
    with pytest.raises((UsageError, CheckpointError), match=r".") as caught:
        encoder_from(spec)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_without_network_or_file_it_says_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(CheckpointError) as caught:
        encoder_from("imagenet:resnet18:acs")
    told = str(caught.value)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in told
    assert str(tmp_path / "hub" / "checkpoints") in told and "\n" not in told


def test_a_file_in_torchs_own_folder_is_taken(weights, tmp_path, monkeypatch):
    path, net = weights
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    path.rename(place / networks.source_of(NET).file)
    found = encoder_from(f"imagenet:{NET}:acs:in_channels=3")
    torch.testing.assert_close(found.network.conv1[0].weight, net.conv1[0].weight)


class Evil:
    def __reduce__(self):
        return (os.system, ("echo evil",))


@pytest.mark.long
def test_weights_that_are_not_the_networks_are_refused(weights, tmp_path):
    path, net = weights
    state = net.state_dict()

    def tried(name, content, **options):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError) as caught:
            encoder_from(f"imagenet:{NET}:acs:weights={tmp_path / name}")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    half = {key: value for key, value in state.items() if not key.startswith("stage3")}
    told = tried("half.pth", half)
    assert "names are missing (stage3.0.branch1.0.weight, " in told
    partial = encoder_from(f"imagenet:{NET}:acs:allow_partial=true:weights={tmp_path / 'half.pth'}")
    assert 0 < partial.match.share < 1 and partial.match.modules["stage3.0"][0] == 0
    assert "conv1.0.weight has shape (7, 3, 3, 3)" in tried(
        "shape.pth", state | {"conv1.0.weight": torch.zeros(7, 3, 3, 3)}
    )
    assert "0 of" in tried("other.pth", {"a.weight": torch.zeros(3)})
    assert "not finite" in tried(
        "nan.pth", state | {"conv1.0.weight": torch.full((24, 3, 3, 3), torch.nan)}
    )
    assert "holds no tensors" in tried("empty.pth", {"a": 1})
    told = tried("evil.pth", {"state_dict": Evil()})
    assert "Python objects" in told
    (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated"):
        encoder_from(f"imagenet:{NET}:acs:weights={tmp_path / 'cut.pth'}")


def test_wrapped_weights_and_safetensors_are_read(weights, tmp_path):
    from safetensors.torch import save_file

    path, net = weights
    expected = read_state(path)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3},
        tmp_path / "w.ckpt",
    )
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.ckpt", "w.safetensors"):
        found = read_state(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_densenets_old_names_are_understood():
    from ssl3d.convert.named import _renamed

    old = {
        "features.denseblock1.denselayer1.norm.1.weight": 0,
        "features.denseblock1.denselayer1.conv.2.weight": 1,
    }
    assert list(_renamed("densenet121", old)) == [
        "features.denseblock1.denselayer1.norm1.weight", "features.denseblock1.denselayer1.conv2.weight",
    ]  # fmt: skip


class Residual(nn.Module):
    """A network of the user's, with an activation in place on what is a feature map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 2, 1)
        self.second = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3, 2, 1))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        x = self.second(x)
        return self.head(functional.max_pool2d(x, 2).mean((2, 3)))


def test_a_users_network_gives_its_maps():
    net = Residual()
    made, maps = feature_network(net, "2.5d", strides=((1, 2, 2), (1, 2, 2), (1, 1, 1)))
    assert maps.channels == (4, 8, 8) and not hasattr(made, "head")
    x = torch.randn(1, 3, 2, 16, 16)
    first, second, pooled = made(x)
    before = net.first(x[:, :, 0])
    torch.testing.assert_close(first[:, :, 0], before)
    torch.testing.assert_close(second[:, :, 0], net.second(before.clone()))
    assert torch.equal(second, pooled)


def test_timms_networks_have_timms_maps():
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install 'ssl3d[timm]')")
    for name in ("resnet18d", "efficientnet_lite0", "mobilenetv3_small_100", "repvgg_a0"):
        encoder = ConvertedEncoder(ConvertedConfig(network=f"timm/{name}", in_channels=3)).eval()
        reference = timm.create_model(name, features_only=True).eval()
        known = dict(
            zip(reference.feature_info.reduction(), reference.feature_info.channels(), strict=True)
        )
        ours = dict(zip((s[0] for s in encoder.strides), encoder.channels, strict=True))
        deepest = max(known)
        assert {k: v for k, v in ours.items() if k != deepest} == {
            k: v for k, v in known.items() if k != deepest
        }


# Real weights -------------------------------------------------------------------------------------


@pytest.fixture
def imagenet():
    """The folder with real ImageNet weights; skips where it is missing."""
    root = Path(os.environ.get("SSL3D_DATA") or Path(__file__).parents[4] / "shared" / "data")
    if not (root / "imagenet" / "efficientnet_lite0.pth").is_file():
        pytest.skip(f"ImageNet weights are not in {root / 'imagenet'} (SSL3D_DATA names the folder)")
    return root / "imagenet"


def photographs(folder, count, mean, std):
    import csv

    import numpy as np
    from PIL import Image

    with open(folder / "images" / "labels.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:: max(1, 120 // count)][:count]
    pixels = []
    for row in rows:
        picture = Image.open(folder / "images" / row["file"]).convert("RGB")
        left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
        pixels.append(torch.from_numpy(np.array(picture.crop((left, top, left + 224, top + 224)))))
    x = torch.stack(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    return (x - mean) / std, torch.tensor([int(row["class_index"]) for row in rows])


def classified(imagenet, count):
    from ssl3d.convert import to_3d

    net = networks.network_2d("efficientnet_lite0").eval()
    net.load_state_dict(read_state(imagenet / "efficientnet_lite0.pth"))
    x, labels = photographs(imagenet, count, [0.498], [0.502])
    made = {kind: to_3d(net, kind) for kind in ("acs", "2.5d")}
    right = 0
    with torch.no_grad():
        for part, label in zip(x.split(8), labels.split(8), strict=True):
            expected = net(part)
            for kind, converted in made.items():
                found = converted(part.unsqueeze(2))
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
                assert torch.equal(found.topk(5).indices, expected.topk(5).indices), kind
            right += int((expected.argmax(1) == label).sum())
    return right / count


def test_efficientnet_lite0_classifies_photographs_as_in_2d(imagenet):
    assert classified(imagenet, 16) >= 0.7


@pytest.mark.slow
def test_efficientnet_lite0_classifies_all_sample_images_as_in_2d(imagenet):
    assert classified(imagenet, 120) >= 0.85


@pytest.mark.long
def test_mobilenet_v2s_maps_are_the_2d_networks(imagenet):
    state = read_state(imagenet / "mobilenet_v2_features.pth")
    net = torchvision.models.mobilenet_v2(weights=None).eval()
    net.load_state_dict(state, strict=False)
    x, _ = photographs(imagenet, 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = timm_like(net, x, PLACES["mobilenet_v2"])
    for kind in ("acs", "2.5d"):
        spec = (
            f"imagenet:mobilenet_v2:{kind}:in_channels=3:weights={imagenet / 'mobilenet_v2_features.pth'}"
        )
        with torch.no_grad():
            for ours, theirs in zip(encoder_from(spec)(x.unsqueeze(2)), expected, strict=True):
                assert (ours[:, :, 0] - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_every_field_has_help():
    from ssl3d.command_help import field_help

    assert all(field_help(ConvertedConfig).get(one.name) for one in dataclasses.fields(ConvertedConfig))
