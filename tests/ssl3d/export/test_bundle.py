"""`ssl3d export --to monai-bundle`, run by `python -m monai.bundle run` without ssl3d."""

import json
import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from ssl3d.cli import main

pytest.importorskip("monai")
AFFINE = np.array([[-1.0, 0, 0, 90], [0, -1.2, 0, 70], [0, 0, 2.0, -30], [0, 0, 0, 1]])


@pytest.mark.slow
def test_monai_segments_scans_as_ssl3d_predict_does(segmenter, scans, tmp_path):
    """Scans as they were, with axes swapped and flipped, larger than a window, and smaller than one."""
    for package in ("ignite", "fire"):
        pytest.importorskip(package)
    bundle, given = tmp_path / "bundle", tmp_path / "scans"
    assert main(["export", str(segmenter), "--to", "monai-bundle", "--out", str(bundle)]) == 0
    given.mkdir()
    image = nibabel.load(scans / "imagesTr/case_3.nii.gz")
    voxels = np.asarray(image.dataobj)
    nibabel.save(image, given / "plain.nii.gz")
    step = np.zeros((4, 4))
    step[2, 0], step[2, 3], step[0, 1], step[1, 2], step[3, 3] = -1, voxels.shape[2] - 1, 1, 1, 1
    turned = np.ascontiguousarray(voxels.transpose(2, 0, 1)[::-1])
    nibabel.save(nibabel.Nifti1Image(turned, AFFINE @ step), given / "turned.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.tile(voxels, (2, 1, 2)), AFFINE), given / "large.nii.gz")
    nibabel.save(nibabel.Nifti1Image(voxels[:, :, :9], AFFINE), given / "flat.nii.gz")
    words = ["--config_file", "configs/inference.json", "--meta_file", "configs/metadata.json",
             "--dataset_dir", str(given), "--output_dir", str(tmp_path / "theirs")]  # fmt: skip
    alone = {**os.environ, "PYTHONPATH": str(bundle)}
    subprocess.run([sys.executable, "-m", "monai.bundle", "run", *words], check=True, cwd=bundle, env=alone)
    assert main(["predict", str(segmenter), "--data", str(given), "--out", str(tmp_path / "ours")]) == 0
    classes = set()
    for name in ("plain", "turned", "large", "flat"):
        ours = nibabel.load(tmp_path / f"ours/{name}.nii.gz")
        theirs = nibabel.load(tmp_path / f"theirs/{name}_seg.nii.gz")
        assert np.allclose(ours.affine, theirs.affine, atol=1e-4)
        assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
        classes |= set(np.unique(np.asarray(ours.dataobj)).tolist())
    assert classes == {0, 1, 4}
    for path in bundle.rglob("*.py"):
        assert "import ssl3d" not in path.read_text() and "from ssl3d" not in path.read_text()
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    assert outputs["channel_def"] == {"0": "background", "1": "bright", "2": "dark"}


@pytest.mark.parametrize(
    ("what", "message"), [("encoder", "segments no scans"), ("classifier", "segments no")]
)
def test_what_segments_no_scans_is_no_bundle(what, message, request, tmp_path, capsys):
    source = request.getfixturevalue(what)
    assert main(["export", str(source), "--to", "monai-bundle", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
