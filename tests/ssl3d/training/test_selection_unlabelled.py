"""Pretraining on subjects without a target alone, which leaves all others to a cross-validation."""

import nibabel as nib
import numpy as np
import pytest

from ssl3d.api import DataError, open_data
from ssl3d.training.selection import select


def test_unlabelled_takes_nobody_who_has_a_target(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    lines = ["path,subject,label"]
    for number in range(12):
        values = np.random.default_rng(number).normal(size=(8, 8, 8))
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{number}.nii.gz")
        lines.append(f"{number}.nii.gz,{number // 2},{'ab'[number % 2] if number in (0, 3) else ''}")
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    data = open_data([tmp_path / "list.csv"])
    chosen = select(data, "unlabelled", 0.0)
    # Subjects 0 and 1 have a label in one of their two volumes.
    assert sorted(set(chosen.train.subjects)) == ["2", "3", "4", "5"] and len(chosen.train) == 8
    assert any("those without a target, 8 of 12 volumes" in note for note in chosen.notes)
    with pytest.raises(DataError, match="no volume of 4 is left"):
        select(data.select(range(4)), "unlabelled", 0.0)
