"""Names of files and header text in any bytes: they go through every list, and end no call."""

import csv
import json
import os
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pydicom
import pytest

from ssl3d.amounts import printable
from ssl3d.cli import main
from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.dicom import dicom_tags
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted

latin = os.fsdecode(b"caf\xe9")  # as Python has it: not UTF-8, so a surrogate


@hypothesis.given(st.text(st.characters(codec=None)))
@hypothesis.settings(derandomize=True, deadline=None)
def test_printable_text_is_one_line_that_every_file_takes(text):
    plain = printable(text)
    plain.encode()
    assert len(plain.splitlines()) <= 1 and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in plain)
    assert printable(plain) == plain
    if text.isprintable():
        assert plain == text


@pytest.mark.parametrize(
    ("charset", "patient"),
    [
        ("ISO_IR 100", "Müller"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("ISO_IR 192", "Buc^Jérôme"),
        ("GB18030", "王^小东"),
        (["", "ISO 2022 IR 87"], "山田^太郎"),
        ("ISO-IR 100", "Müller"),  # misspelt, as some devices write it
    ],
)
def test_a_patient_is_decoded_as_the_file_declares(scans, tmp_path, charset, patient):
    (path,) = scans.dicom(tmp_path, scans.body((4, 4, 1)), "1.2.3")
    header = pydicom.dcmread(path)
    header.SpecificCharacterSet, header.PatientID = charset, patient
    header.save_as(path)
    assert pydicom.dcmread(path).PatientID == patient
    assert dicom_tags(path)["patient"] == patient


@pytest.mark.parametrize("charset", ["", "ISO_IR 192", "ISO_IR 999"])
def test_a_patient_that_is_no_text_of_its_character_set_is_escaped(scans, tmp_path, charset):
    (path,) = scans.dicom(tmp_path, scans.body((4, 4, 1)), "1.2.3", patient="M#ller\t7")
    header = pydicom.dcmread(path)
    if charset:
        header.SpecificCharacterSet = charset
    header.save_as(path)
    path.write_bytes(path.read_bytes().replace(b"M#ller", b"M\xfcller"))
    assert dicom_tags(path)["patient"] == "M\\xfcller\\x097"


def test_names_in_any_bytes_become_subjects_of_a_store(scans, tmp_path):
    root = tmp_path / "in"
    scans.nifti(root / f"{latin}.nii.gz", scans.body())
    scans.itk(tmp_path / "good.mha", scans.body(seed=1))
    (tmp_path / "good.mha").rename(root / f"{latin}2.mha")
    scans.itk(tmp_path / "apart.mhd", scans.body(seed=2))
    for suffix in (".mhd", ".raw"):
        (tmp_path / f"apart{suffix}").rename(root / f"{latin}3{suffix}")
    header = root / f"{latin}3.mhd"
    header.write_bytes(header.read_bytes().replace(b"apart.raw", os.fsencode(f"{latin}3.raw")))
    scans.nifti(root / "two\nlines.nii", scans.body(seed=3))
    (root / f"{latin}4.nii").write_bytes(b"no scan")
    scans.dicom(tmp_path / "series", scans.body(seed=4), "1.2.3", patient="")
    (tmp_path / "series").rename(root / latin)
    store = tmp_path / "s.h5"
    prepare(PrepareOptions((str(root),), str(store), workers=0))
    collection = open_data([store])
    assert sorted(volume.subject for volume in collection) == [
        "caf\\xe9", "caf\\xe9", "caf\\xe92", "caf\\xe93", "two\\x0alines",
    ]  # fmt: skip
    assert all(volume.record.source.isprintable() for volume in collection)
    with open(tmp_path / "rejected.csv", encoding="utf-8", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["caf\\xe94.nii"]


def test_lists_with_names_that_no_file_has_refuse_these_alone(scans, tmp_path):
    scans.nifti(tmp_path / "v.nii", scans.body())
    listed = [{"image": "\ud800.nii"}, {"image": "a\0b.nii"}, {"image": "v.nii"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": listed}), encoding="utf-8")
    contents = find([tmp_path], Wanted())
    assert [scan.source for scan in contents.scans] == ["v.nii"]
    assert [source for source, _ in contents.rejected] == ["\\ud800.nii", "a\\x00b.nii"]


def test_an_error_about_such_a_file_is_one_line_of_printable_text(tmp_path, capfd):
    path = tmp_path / f"{latin}\x1b[2J.xyz"
    path.write_bytes(b"nothing")
    assert main(["prepare", str(path), "--out", str(tmp_path / "s.h5")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("ssl3d: ") and "caf\\xe9\\x1b[2J.xyz" in error and error.count("\n") == 1


def test_a_store_may_lie_at_such_a_place(scans, tmp_path, capfd):
    scans.nifti(tmp_path / "v.nii", scans.body())
    store = tmp_path / latin / f"{latin}.h5"
    assert main(["prepare", str(tmp_path / "v.nii"), "--out", str(store), "--workers", "0"]) == 0
    assert Path(store).is_file() and "caf\\xe9.h5: 1 volume" in capfd.readouterr().out
    np.testing.assert_array_equal(open_data([store])[0].shape, (1, 16, 14, 12))
