"""The released nnU-Net starts its training from an export, on four real cases.

nnU-Net wants packages that ssl3d does not, so it has an environment of its own: SSL3D_NNUNET_PYTHON names
its interpreter.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.convert.foreign_files import read_file
from ssl3d.specs import encoder_from

PYTHON = os.environ.get("SSL3D_NNUNET_PYTHON", "")
CASES = Path(os.environ.get("SSL3D_DATA") or Path(__file__).parents[4] / "shared/data") / "hippocampus"
pytestmark = [
    pytest.mark.timeout(3000),
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SSL3D_NNUNET_PYTHON names no interpreter that has nnunetv2"),
    pytest.mark.skipif(not CASES.is_dir(), reason=f"no data in {CASES}"),
]
TRAIN = """
import functools, sys, torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.run.run_training import run_training_entry
made = nnUNetTrainer.__init__
@functools.wraps(made)  # whose signature it reads
def short(self, *args, **kwargs):
    made(self, *args, **kwargs)
    self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
    self.initial_lr = 1e-5
nnUNetTrainer.__init__ = short
nnUNetTrainer.perform_actual_validation = lambda self, *_: None
torch.set_num_threads(1)
sys.argv = ["nnUNetv2_train", "1", "3d_fullres", "all", "-device", "cpu", *sys.argv[1:]]
run_training_entry()
"""


def run(root, *command, workers="1"):
    names = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "prep", "nnUNet_results": "results"}
    environment = {**os.environ, **{key: str(root / name) for key, name in names.items()},
                   "nnUNet_n_proc_DA": workers, "nnUNet_compile": "f", "PYTHONPATH": ""}  # fmt: skip
    done = subprocess.run(
        [PYTHON, *command], env=environment, cwd=root, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Four cases of the hippocampus, planned and preprocessed by nnU-Net."""
    root = tmp_path_factory.mktemp("nnunet")
    raw = root / "raw/Dataset001_Hippocampus"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for path in sorted((CASES / "imagesTr").glob("*.nii.gz"))[:4]:
        name = path.name.removesuffix(".nii.gz")
        shutil.copyfile(path, raw / f"imagesTr/{name}_0000.nii.gz")
        shutil.copyfile(CASES / "labelsTr" / path.name, raw / "labelsTr" / path.name)
    about = {"channel_names": {"0": "MRI"}, "numTraining": 4, "file_ending": ".nii.gz",
             "labels": {"background": 0, "Anterior": 1, "Posterior": 2}}  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(about))
    entry = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import "
    entry += "plan_and_preprocess_entry as go; go()"
    run(root, "-c", entry, "-d", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    return root


@pytest.mark.parametrize("name", ["resenc", "plain_unet"])
def test_nnunet_trains_from_the_weights_of_an_export(name, planned, tmp_path):
    torch.manual_seed(0)
    card = {"spacing": [1.0, 1.0, 1.0], "patch": [32, 32, 32], "labels_seen": False}
    encoder = encoder_from(f"scratch:{name}:width=8:stages=4")
    folder = save_encoder(encoder, tmp_path / "encoder", card)
    words = ["--to", "nnunet", "--patch", "32", "32", "32", "--out", str(tmp_path / "out")]
    assert main(["export", str(folder), *words]) == 0
    plans = planned / "prep/Dataset001_Hippocampus/nnUNetPlans.json"
    content = json.loads(plans.read_text())
    content["configurations"]["3d_fullres"] |= {
        "architecture": json.loads((tmp_path / "out/architecture.json").read_text()),
        "patch_size": [32, 32, 32], "batch_size": 2,
    }  # fmt: skip
    plans.write_text(json.dumps(content))
    shutil.rmtree(planned / "results", ignore_errors=True)
    told = run(
        planned, "-c", TRAIN, "-pretrained_weights", str(tmp_path / "out/checkpoint_final.pth"), workers="0"
    )
    assert "Loading pretrained weights" in told
    (trained,) = (planned / "results").rglob("checkpoint_final.pth")
    weights = read_file(trained).tensors
    moved = 0.0
    for key, value in encoder.state_dict().items():
        for place in ("encoder", "decoder.encoder"):  # two steps of 1e-5 away, where others would be far
            np.testing.assert_allclose(weights[f"network_weights.{place}.{key}"], value, atol=1e-3)
        moved = max(moved, float((weights[f"network_weights.encoder.{key}"] - value).abs().max()))
    assert moved > 0
