"""What is said at the end of `prepare` of the scans of a data set together."""

from __future__ import annotations

import numpy as np

from ssl3d.data.preparation.prepare import PrepareOptions, prepare


def said(capsys, tmp_path, **options) -> list[str]:
    prepare(PrepareOptions((str(tmp_path / "d"),), str(tmp_path / "s.h5"), workers=0, **options))
    return capsys.readouterr().out.splitlines()


def test_kinds_of_normalisation_that_mix_in_a_data_set_are_said(scans, tmp_path, capsys):
    for i in range(3):
        scans.nifti(tmp_path / "d" / f"p{i}.nii.gz", 4 * scans.body(seed=i) - 1000)
    scans.nifti(tmp_path / "d" / "shifted.nii.gz", 4 * scans.body(seed=3))
    line = (
        "d: 3 volumes normalised as ct, 1 as mr (shifted.nii.gz); if all are of one kind, "
        "--normalize ct makes them alike"
    )
    for _ in range(2):  # made, and found made
        assert said(capsys, tmp_path)[-1] == line
    assert "normalised as" not in "".join(said(capsys, tmp_path, normalize="ct", overwrite=True))


def test_one_kind_is_nothing_to_speak_of_and_data_sets_are_apart(scans, tmp_path, capsys):
    scans.nifti(tmp_path / "d" / "a.nii.gz", 4 * scans.body() - 1000)
    scans.nifti(tmp_path / "e" / "b.nii.gz", scans.body())
    folders = tuple(str(tmp_path / name) for name in "de")
    prepare(PrepareOptions(folders, str(tmp_path / "s.h5"), workers=0))
    assert "normalised as" not in capsys.readouterr().out


def test_only_some_of_many_scans_are_named(scans, tmp_path, capsys):
    for i in range(6):
        scans.nifti(tmp_path / "d" / f"p{i}.nii.gz", scans.body(seed=i))
    for i in range(5):
        scans.nifti(tmp_path / "d" / f"q{i}.nii.gz", scans.body(seed=i).clip(0, 255).astype(np.uint8))
    assert (
        "d: 6 volumes normalised as mr, 5 as unit (q0.nii.gz, q1.nii.gz, q2.nii.gz and 2 more); if all are "
        "of one kind, --normalize mr makes them alike"
    ) in said(capsys, tmp_path)
