"""`ssl3d export --to timm`, opened by timm, which knows nothing of ssl3d."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import ssl3d
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.specs import encoder_from

timm = pytest.importorskip("timm")
POOL = "scratch:resnet18:acs:stem_pool=true"
STRIDES = "stage_strides=[[2,2,2],[2,2,2],[2,2,2],[2,2,2]]"


def trained(spec, folder):
    """Save an encoder whose running statistics matter."""
    torch.manual_seed(0)
    made = encoder_from(spec)
    for module in made.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    card = {"patch": [16, 64, 48], "spacing": [2.0, 1.0, 1.0], "labels_seen": False}
    return save_encoder(made, folder, card)


def export(what, out, *words):
    return main(["export", str(what), "--to", "timm", "--out", str(out), *words])


@pytest.mark.parametrize(
    "spec, name, side",
    [
        (f"{POOL}:in_channels=2", "resnet18", 75),
        ("scratch:densenet121:2.5d:stem_pool=true", "densenet121", 96),
        (f"scratch:mobilenet_v2:acs:{STRIDES}", "mobilenetv2_100", 75),
        ("scratch:converted:network=timm/resnet10t:kind=2.5d", "resnet10t", 75),
    ],
)
def test_timm_computes_the_encoders_features_of_a_slice(spec, name, side, tmp_path, capsys):
    folder = trained(spec, tmp_path / "encoder")
    assert export(folder, tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "export.json", "model.safetensors"
    }  # fmt: skip
    encoder = ssl3d.load_encoder(folder)
    channels = encoder.config.in_channels
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, channels, 64, side)).astype(np.float32))
    with torch.no_grad():
        wanted = encoder(x.unsqueeze(2))[-1].squeeze(2)
        close = {"atol": 1e-4 * max(1.0, float(wanted.abs().max())), "rtol": 0}
        torch.testing.assert_close(model.forward_features(x), wanted, **close)
        torch.testing.assert_close(model(x), encoder.embed(x.unsqueeze(2)), **close)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architecture"] == name and config["pretrained_cfg"]["input_size"] == [channels, 64, 48]
    assert config["pretrained_cfg"]["mean"] == [0.0] * channels and "ImageNet" not in str(config)
    step = json.loads((tmp_path / "out/export.json").read_text())["input"]["H_and_W_multiples_of"]
    assert step == (32 if name == "densenet121" else 1)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("scratch:resnet18:3d:stem_pool=true", "timm's networks are 2D, and this encoder is of kind 3d"),
        ("scratch:resnet18:acs", "strides by 16 x 16 in the plane, timm's resnet18 by 32 x 32"),
        (f"{POOL}:width=8", "conv1.weight is (8, 1, 7, 7), there (64, 1, 7, 7)"),
        (f"{POOL}:norm=group", "bn1.running_mean is absent"),
        ("scratch:resnet10:acs:stem_pool=true", "timm has no resnet10"),
        ("scratch:converted:network=timm/resnet10t:resize=[2,2,2]", "stem sum and resize (2, 2, 2)"),
    ],
)
def test_what_timm_does_not_have_is_refused_in_a_line_that_names_hf(spec, words, tmp_path, capsys):
    folder = trained(spec, tmp_path / "encoder")
    assert export(folder, tmp_path / "out") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in told and "--to hf takes any encoder" in told
    assert not (tmp_path / "out").exists()


def tune(data, out):
    words = ["--task", "classification", "--epochs", "1", "--batch-size", "2", "--threads", "1"]
    words += ["--no-trivial", "--precision", "32"]
    assert main(["finetune", POOL, "--data", str(data), "--out", str(out), *words]) == 0
    return out


@pytest.fixture(scope="module")
def of_images(tmp_path_factory):
    """Model that tells bright images from dark ones."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    with (root / "list.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "subject", "label"])
        for number in range(16):
            voxels = rng.integers(0, 90, (40, 36)) + 90 * (number % 2)
            Image.fromarray(voxels.astype(np.uint8)).save(root / f"{number}.png")
            rows.writerow([f"{number}.png", number, ("dark", "bright")[number % 2]])
    return tune(root / "list.csv", root / "tuned")


def test_a_classifier_of_images_keeps_its_last_layer(of_images, tmp_path):
    assert export(of_images, tmp_path / "out") == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = ssl3d.load_model(of_images)
    names = json.loads((tmp_path / "out/config.json").read_text())["label_names"]
    assert names == [kind["name"] for kind in ours.card["classes"]] == ["bright", "dark"]
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 1, 40, 36)).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x.unsqueeze(2)), atol=1e-4, rtol=0)


def test_a_classifier_of_volumes_gives_timm_its_encoder_alone(tmp_path):
    assert export(tune("phantoms:12", tmp_path / "tuned"), tmp_path / "out") == 0
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_classes == 0


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_other_formats_take_images_of_a_classifier_of_images(of_images, form, tmp_path, capsys):
    assert main(["export", str(of_images), "--to", form, "--out", str(tmp_path / "out")]) == 0
    assert "takes batch x channel x D x H x W: any x 1 x 1 x any x any" in capsys.readouterr().out
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert all(size[0] == 1 for size in about["input"]["checked_sizes"])
