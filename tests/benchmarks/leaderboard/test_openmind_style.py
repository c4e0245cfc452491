"""The suite for large public sets, from end to end, on small stand-ins in the layouts they come in."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import yaml

from ssl3d.cli import main
from ssl3d_benchmarks.leaderboard.suite.suite import SUITES

SMALLER = {
    "--encoder resenc": "--encoder resnet10 --resnet10.width 4",
    "scratch:resenc": "scratch:resnet10:width=4",
    "96 96 96": "16 16 16",
    "64 64 64": "16 16 16",
    "--mae.block 16 16 16": "--mae.block 8 8 8",
    "--steps 37500": "--steps 2",
    "steps: 250000": "steps: 2",
    "--batch-size 32": "--batch-size 4",
    "--batch-size 8": "--batch-size 4",
}


def scan(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))


def people(folder: Path, image: str, mask: str, others: tuple[str, ...] = ()) -> None:
    """Ten people: a bright ball in noise, and its outline; `{}` in a name is the person's number."""
    rng = np.random.default_rng(0)
    for person in range(10):
        z, y, x = np.indices((20, 22, 24)) - rng.integers(8, 12, 3)[:, None, None, None]
        ball = z * z + y * y + x * x < rng.integers(16, 40)
        for name in (image, *others):
            scan(folder / name.format(person), (rng.normal(size=ball.shape) + 3 * ball).astype(np.float32))
        if mask:
            scan(folder / mask.format(person), ball.astype(np.uint8))


def layouts(root: Path) -> None:
    brats = "BraTS2021_{0:05d}/BraTS2021_{0:05d}_"
    people(root / "LUNA16", "subset0/scan{}.mhd", "")
    people(root / "BraTS2021", f"{brats}flair.nii.gz", f"{brats}seg.nii.gz", (f"{brats}t1.nii.gz",))
    people(
        root / "MMWHS", "ct_train/ct_train_1{:03d}_image.nii.gz", "ct_train/ct_train_1{:03d}_label.nii.gz"
    )
    people(root / "LiTS", "volume-{}.nii", "segmentation-{}.nii")
    people(root / "KiTS19", "case_{:05d}/imaging.nii.gz", "case_{:05d}/segmentation.nii.gz")
    lung = root / "Task06_Lung"
    people(lung, "imagesTr/lung_{:03d}.nii.gz", "labelsTr/lung_{:03d}.nii.gz")
    pairs = [
        {"image": f"./imagesTr/lung_{n:03d}.nii.gz", "label": f"./labelsTr/lung_{n:03d}.nii.gz"}
        for n in range(10)
    ]
    about = {"name": "Lung", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "cancer"}}
    (lung / "dataset.json").write_text(json.dumps({**about, "training": pairs}), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_set_that_is_there_is_prepared_pretrained_on_and_scored(tmp_path, capfd):
    layouts(tmp_path / "root")
    text = (SUITES / "openmind-style.yaml").read_text(encoding="utf-8")
    for long, short in SMALLER.items():
        assert long in text, long
        text = text.replace(long, short)
    suite = yaml.safe_load(text)
    suite["runs"] = {name: suite["runs"][name] for name in ("mae", "simclr")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    command = ["leaderboard", "run", str(tmp_path / "small.yaml"), "--data-root", str(tmp_path / "root")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    assert "failed" not in said
    for missing in ("MMWHS/mr_train", "Task07_Pancreas", "Task10_Colon"):
        assert f"{missing} is missing" in said
    report = (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    # Two proxies, one from scratch, the average mask.
    for task in ("brats", "mmwhs_ct", "lits", "kits", "lung"):
        assert len(list((tmp_path / "out" / task).glob("*.json"))) == 4, (
            task
        )  # two proxies, scratch, average
    assert "No record was refused." in report
