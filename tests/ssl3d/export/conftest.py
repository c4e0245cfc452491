"""An encoder and fine-tuned models to export."""

import json

import nibabel
import numpy as np
import pytest
import torch

from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.specs import encoder_from

SPEC = "scratch:resnet10:width=4:stem_stride=1"
AFFINE = np.array([[-1.0, 0, 0, 90], [0, -1.2, 0, 70], [0, 0, 2.0, -30], [0, 0, 0, 1]])


def a_scan(seed, shape=(18, 16, 14)):
    """A noisy scan (x, y, z), int16, with a bright block and a dark one."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    mask[3:10, 2:9, 2:8], mask[8:16, 9:14, 7:12] = 1, 4
    return (400 + rng.normal(size=shape) * 20 + 200 * (mask == 1) - 200 * (mask == 4)).astype(
        np.int16
    ), mask


def save_scan(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp("scans")
    for number in range(10):
        image, mask = a_scan(number)
        save_scan(root / f"imagesTr/case_{number}.nii.gz", image)
        save_scan(root / f"labelsTr/case_{number}.nii.gz", mask)
    training = [{"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr/case_{n}.nii.gz"}
                for n in range(10)]  # fmt: skip
    content = {"name": "blocks", "modality": {"0": "MRI"}, "training": training, "test": [],
               "labels": {"0": "background", "1": "bright", "4": "dark"}}  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def tune(encoder, data, out, *words):
    short = ["--batch-size", "2", "--threads", "1", "--no-trivial", "--eval-at", "1", "--precision", "32"]
    assert main(["finetune", encoder, "--data", str(data), "--out", str(out), *short, *words]) == 0
    return out


@pytest.fixture(scope="session")
def segmenter(scans, tmp_path_factory):
    out = tmp_path_factory.mktemp("masks") / "out"
    words = ["--task", "segmentation", "--segmentation.patch", "12", "12", "12", "--steps", "30",
             "--segmentation.width", "8", "--lr-scratch", "1e-2"]  # fmt: skip
    return tune(SPEC, scans, out, *words)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    out = tmp_path_factory.mktemp("classes") / "out"
    return tune(SPEC, "phantoms:12", out, "--task", "classification", "--epochs", "1")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    made = encoder_from("scratch:resnet10:acs:width=4")
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm3d):  # running statistics that matter
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    card = {"patch": [16, 24, 20], "spacing": [2.0, 1.0, 1.0], "labels_seen": False,
            "citations": {"acs": "Yang et al."}, "identities": ["a" * 64]}  # fmt: skip
    return save_encoder(made, tmp_path_factory.mktemp("encoder") / "encoder", card)
