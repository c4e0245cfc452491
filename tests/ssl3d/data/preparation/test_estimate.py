"""What `ssl3d prepare` says of time and disk before it does the work, against what it then takes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.preparation.work import _STORE_ITSELF, Estimate

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def test_the_whole_is_the_proportion_of_each_kind_times_its_bytes():
    """Pictures become four times as large in a millisecond a byte; volumes a half as large, in none."""
    weights = {0: 10.0, 1: 30.0, 2: 1000.0, 3: 5000.0, 4: 20.0}
    kinds = {0: ".png", 1: ".png", 2: ".nii", 3: ".nii", 4: ".png"}
    estimate = Estimate(kinds, weights)
    assert estimate.sample == [0, 1, 3, 4]  # the large volume stands for the small one
    for scan in estimate.sample:
        picture = kinds[scan] == ".png"
        last = estimate.add(scan, 1e-3 * weights[scan] * picture, weights[scan] * (4 if picture else 0.5))
        assert last == (scan == 4)
    seconds, written = estimate.whole()
    assert seconds == pytest.approx(0.06)
    assert written == pytest.approx(60 * 4 + 6000 * 0.5 + _STORE_ITSELF)
    assert not estimate.add(0, 1.0, 1.0)


def test_large_files_are_in_the_sample():
    """A hundred small volumes and one that outweighs them."""
    weights = dict.fromkeys(range(100), 1000.0) | {100: 1e9}
    estimate = Estimate(dict.fromkeys(weights, ".nii.gz"), weights)
    assert estimate.sample == [100]
    assert len(Estimate(dict.fromkeys(range(100), ".nii.gz"), dict.fromkeys(range(100), 1.0)).sample) == 4


def test_rows_are_sampled_as_they_lie():
    assert Estimate(dict.fromkeys(range(3, 50), "rows"), dict.fromkeys(range(3, 50), 1.0)).sample == [
        3,
        4,
        5,
        6,
    ]


def test_mixed_folders_are_told_within_a_factor_of_two():
    """Folders of three kinds with proportions from 0.5 to 60, and sizes over three orders of magnitude."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        scans = int(rng.integers(20, 300))
        names = rng.choice([".nii.gz", ".nii", ".png"], scans)
        weights = dict(enumerate(np.exp(rng.normal(12, 2, scans)).tolist()))
        proportion = {
            ".nii.gz": rng.uniform(1, 60),
            ".nii": rng.uniform(0.5, 2),
            ".png": rng.uniform(2, 30),
        }
        took = {
            i: weights[i] * proportion[str(names[i])] * float(np.exp(rng.normal(0, 0.3))) for i in weights
        }
        estimate = Estimate({i: str(name) for i, name in enumerate(names)}, weights)
        for scan in estimate.sample:
            estimate.add(scan, took[scan] * 1e-9, took[scan])
        seconds, written = estimate.whole()
        whole = sum(took.values())
        assert 0.5 < written / (whole + _STORE_ITSELF) < 2
        assert 0.5 < seconds / (whole * 1e-9) < 2


def test_the_disk_that_is_told_is_what_the_store_takes(scans, tmp_path, capsys):
    """Volumes that are nearly empty, compressed; some of noise, not compressed; pictures; a label map."""
    root, rng = tmp_path / "d", np.random.default_rng(0)
    for i in range(30):
        scans.nifti(root / f"flat{i:02d}.nii.gz", scans.body((48, 48, 48), seed=i) // 50 * 50)
    for i in range(3):
        scans.nifti(root / f"noise{i}.nii", rng.normal(0, 1, (96, 96, 64)).astype(np.float32))
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (96, 128), dtype=np.uint8)).save(root / f"picture{i}.png")
    scans.nifti(root / "parcels.nii.gz", (scans.body((96, 96, 96)) // 100).astype(np.uint8))
    summary = prepare(PrepareOptions((str(root),), str(tmp_path / "s.h5"), workers=0))
    assert summary.volumes == 43
    match = re.search(r"44 scans .*; ([\d.]+) (\w*B) of disk", capsys.readouterr().out)
    assert match
    told = float(match[1]) * UNITS[match[2]]
    assert 0.5 < told / summary.store.stat().st_size < 2
