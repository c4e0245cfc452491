"""Whose a scan is: the same from a folder, a list and as channels, and never one person as two."""

from __future__ import annotations

import json

import pytest

from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted


def laid_out(root, *names):
    """Empty files: only their names are looked at."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def subjects(source, **wanted):
    return {scan.source: scan.subject for scan in find([source], Wanted(**wanted)).scans}


def listed(root, names, path=None, lines=None):
    """A list without a column `subject`."""
    path = path or root / "l.csv"
    path.write_text("path\n" + "".join(f"{line}\n" for line in lines or names), encoding="utf-8")
    return path


LAYOUTS = {
    "channels of nnU-Net without its folders": {
        "la_1_0000.nii.gz": "la_1",
        "la_1_0001.nii.gz": "la_1",
        "la_2_0000.nii.gz": "la_2",
        "la_2_0001.nii.gz": "la_2",
    },
    "people numbered from 0": {
        "a_0000.nii.gz": "a_0000",
        "a_0001.nii.gz": "a_0001",
        "a_0002.nii.gz": "a_0002",
        "b_0000.nii.gz": "b_0000",
        "b_0001.nii.gz": "b_0001",
    },
    "people of two sites": {
        f"site{site}_000{number}.nii.gz": f"site{site}_000{number}" for site in "12" for number in range(2)
    },
    "sequences in a folder": {"p1/t1.nii.gz": "p1", "p1/t2.nii.gz": "p1", "p2/t1.nii.gz": "p2"},
    "BIDS": {
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz": "sub-01",
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz": "sub-01",
        "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz": "sub-02",
    },
    "ACDC": {
        "patient001/patient001_frame01.nii.gz": "patient001",
        "patient001/patient001_frame12.nii.gz": "patient001",
        "patient002/patient002_frame01.nii.gz": "patient002",
        "patient002/patient002_4d.nii.gz": "patient002",
    },
    "ACDC, below training and testing": {
        f"{part}/patient{n:03d}/patient{n:03d}_frame{frame:02d}.nii.gz": f"patient{n:03d}"
        for part, people in (("training", (1, 2)), ("testing", (101, 102)))
        for n in people
        for frame in (1, 9)
    },
    "one number in two hospitals": {
        f"{place}/p01/p01_frame{frame}.nii": f"{place}/p01"
        for place in ("north", "south")
        for frame in (1, 2)
    }
    | {f"{place}/p02/p02_frame1.nii": f"{place}/p02" for place in ("north", "south")},
    "visits": {
        f"p{n}/{visit}/t1.nii.gz": f"p{n}" for n in (1, 2) for visit in ("baseline", "follow-up", "visit_3")
    },
    "named visits": {
        f"p{n}/{visit}/p{n}_{visit}_t1.nii.gz": f"p{n}" for n in (1, 2) for visit in ("baseline", "week4")
    },
    "visits and frames at the end of names": {
        f"p{n}_{end}.nii.gz": f"p{n}" for n in (1, 2) for end in ("frame01", "ses-2_T1w", "t1_followup")
    },
    "visits in the names of folders": {
        f"p{n}_visit{k}/p{n}_visit{k}_{kind}.nii": f"p{n}"
        for n in (1, 2)
        for k in (1, 2)
        for kind in ("t1", "x")
    },
    "visits in folders of a person's name": {
        f"00{n}/00{n}_{visit}/t1.nii": f"00{n}/00{n}" for n in (1, 2) for visit in ("baseline", "followup")
    },
    "BraTS 2023": {
        f"BraTS-GLI-0000{n}-00{k}/BraTS-GLI-0000{n}-00{k}-{kind}.nii.gz": f"BraTS-GLI-0000{n}"
        for n in (0, 2)
        for k in (0, 1)
        for kind in ("t1n", "t2f")
    },
    "OASIS": {f"OAS1_000{n}_MR{k}.nii": f"OAS1_000{n}" for n in (1, 2) for k in (1, 2)},
    "OASIS-3": {f"OAS3000{n}_MR_d000{k}.nii": f"OAS3000{n}" for n in (1, 2) for k in (1, 2)},
    "ADNI": {
        f"00{n}_S_0295/MPRAGE/{year}/ADNI_00{n}_S_0295_MR_{year}.nii": f"ADNI_00{n}_S_0295"
        for n in (2, 3)
        for year in (2006, 2007)
    },
    "folders of sequences": {
        f"all_{kind}/scan{n}.nii": f"all_{kind}" for kind in ("ct", "mr") for n in (1, 2)
    },
    "visits and dates at the end of names": {
        f"{name}_{visit}{what}.nii": name
        for name in ("P01", "P02")
        for visit in ("visit1", "visit-2", "baseline", "ses_3", "20190702", "2019-11-30")
        for what in ("", "_T1")
    },
    "dates of nobody": {f"scan_2019070{n}.nii": f"scan_2019070{n}" for n in (1, 2)},
    "dates are folders": {
        f"{who}/2019-0{day}-11/T1.nii.gz": who for who in ("Anna", "Jörg", "Li") for day in (1, 2)
    },
    "dates in hospitals": {
        f"{where}/201907{day}/T1.nii.gz": f"{where}/201907{day}"
        for where in ("utrecht", "singapore")
        for day in (11, 12, 13)
    },
    "visits of nobody": {f"scan_visit{n}.nii": f"scan_visit{n}" for n in (1, 2)},
    "classes of pictures": {
        f"{kind}/{n:03d}.png": f"{kind}/{n:03d}" for kind in ("normal", "pneumonia") for n in range(3)
    },
    "pictures of people": {f"patient{k}/slice{n}.png": f"patient{k}" for k in (1, 2) for n in range(3)},
    "AMOS": {f"images{part}/amos_{n:04d}.nii.gz": f"amos_{n:04d}" for part, n in (("Tr", 1), ("Va", 3))},
    "a folder per sequence": {f"{kind}/{n}.nii.gz": str(n) for kind in ("t1", "flair") for n in (1, 2)},
    "MSD": {f"imagesTr/liver_{n}.nii.gz": f"liver_{n}" for n in range(4)},
    "organs": {f"{organ}/{organ}_{n}.nii": f"{organ}_{n}" for organ in ("liver", "lung") for n in range(4)},
    "LiTS": {f"liver/volume-{n}.nii": f"volume-{n}" for n in range(4)},
    "sites": {f"site{k}/site{k}_{n:03d}.nii": f"site{k}_{n:03d}" for k in (1, 2) for n in range(4)},
    "sites with people": {f"c{k}/c{k}_case{n}.nii": f"c{k}_case{n}" for k in (1, 2) for n in range(4)},
    "many in few folders": {
        f"lung{k}/lung{k}_{n:03d}.nii": f"lung{k}_{n:03d}" for k in (1, 2) for n in range(12)
    },
    "a folder alone": {f"lung1/lung1_{n}.nii": f"lung1_{n}" for n in range(3)},
    "several images in folders of groups": {
        f"{images}/case_{n}.nii": f"{images}/case_{n}"
        for images in ("imagesTr", "imagesTs")
        for n in (1, 2)
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_has_the_same_subjects_as_a_folder_and_as_a_list(layout, tmp_path):
    expected = LAYOUTS[layout]
    root = laid_out(tmp_path / "d", *expected)
    assert subjects(root) == expected
    assert subjects(listed(root, expected)) == expected


def test_classes_that_are_one_person_each_are_named(tmp_path):
    """No split has room for that: the numbers may be classes, or people."""
    laid_out(tmp_path, *(f"{k}/{n}.png" for k in "01" for n in range(3)))
    (note,) = find([tmp_path], Wanted()).notes
    assert note.startswith("pictures in folders named 0, 1: each is taken")


def test_frames_of_a_person_in_nnunets_layout_are_one_subject(tmp_path):
    """ACDC as nnU-Net has it; in two splits, its frames would leak."""
    cases = [f"patient{n:03d}_frame{k:02d}" for n in (1, 2) for k in (1, 12)]
    laid_out(tmp_path, *(f"imagesTr/{case}_0000.nii.gz" for case in cases))
    assert [scan.subject for scan in find([tmp_path], Wanted()).scans] == [case[:10] for case in cases]
    entries = [{"image": f"./imagesTr/{case}.nii.gz"} for case in cases]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}), encoding="utf-8")
    assert [scan.subject for scan in find([tmp_path], Wanted()).scans] == [case[:10] for case in cases]


def test_a_list_may_lie_elsewhere_and_move_with_its_scans(tmp_path):
    names = ["p1/t1.nii.gz", "p1/t2.nii.gz", "p2/t1.nii.gz"]
    for place in ("a", "b"):
        root = laid_out(tmp_path / place / "d", *names)
        for lines in ([f"../d/{name}" for name in names], [str(root / name) for name in names]):
            (tmp_path / place / "lists").mkdir(exist_ok=True)
            path = listed(root, names, tmp_path / place / "lists" / "l.csv", lines)
            assert [scan.subject for scan in find([path], Wanted()).scans] == ["p1", "p1", "p2"]
        # All of one person: the folder is still the person.
        path = listed(root, names, path, [f"../d/{name}" for name in names[:2]])
        assert [scan.subject for scan in find([path], Wanted()).scans] == ["p1", "p1"]


def test_where_the_subjects_of_a_list_come_from_is_said(scans, tmp_path):
    laid_out(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz")
    path = listed(tmp_path, ["a.nii.gz", "b.nii.gz", "c.nii.gz"])
    names = "taken from the names of files and folders"
    assert find([path], Wanted()).notes == [f"l.csv: no column subject: 3 subjects {names}"]
    path.write_text("path,subject\na.nii.gz,p\nb.nii.gz,\nc.nii.gz,\n", encoding="utf-8")
    found = find([path], Wanted())
    assert found.notes == [f"l.csv: no subject in 2 lines: 2 subjects {names}"]
    assert [scan.subject for scan in found.scans] == ["p", "b", "c"]
    path.write_text("path,subject\na.nii.gz,p\nb.nii.gz,p\n", encoding="utf-8")
    assert find([path], Wanted()).notes == []


def test_the_patient_of_listed_dicom_files_is_the_subject(scans, tmp_path):
    files = [
        scans.dicom(tmp_path, scans.body((8, 8, 1)), f"1.2.{k}", patient=f"P{k // 2}", prefix=f"im{k}_")[0]
        for k in range(4)
    ]
    path = listed(tmp_path, [file.name for file in files])
    found = find([path], Wanted())
    assert [scan.subject for scan in found.scans] == ["P0", "P0", "P1", "P1"]
    assert [scan.modality for scan in found.scans] == ["MR"] * 4
    assert found.notes == ["l.csv: no column subject: 2 subjects taken from DICOM's PatientID"]
    scans.dicom(tmp_path, scans.body((8, 8, 1)), "1.2.9", modality="SEG", prefix="seg")
    (tmp_path / "bad.dcm").write_bytes(b"no")
    listed(tmp_path, [], path, [next(tmp_path.glob("seg*")).name, "bad.dcm"])
    reasons = [reason for _, reason in find([path], Wanted()).rejected]
    assert reasons == [
        "DICOM, but not a scan (a segmentation, a plan or a report)",
        "not readable as DICOM",
    ]


def test_series_of_one_study_are_one_subject_where_the_patient_is_blank(scans, tmp_path):
    """Some remove the PatientID; a person's series in two splits would leak."""
    root = tmp_path / "d"
    for n in (1, 2):
        for k in (1, 2):
            folder = root / f"p{n}" / "study" / f"s{k}"
            scans.dicom(folder, scans.body((8, 8, 3), seed=k), f"1.{n}.{k}", patient="", study=f"9.{n}")
    folders = [f"p{n}/study/s{k}" for n in (1, 2) for k in (1, 2)]
    expected = {folder: folder.removesuffix(folder[-3:]) for folder in folders}
    assert subjects(root) == expected
    path = listed(root, folders)
    assert subjects(path) == expected
    (note,) = find([path], Wanted()).notes
    assert note.endswith("2 subjects taken from the folders of DICOM studies, as their PatientID is blank")


@pytest.mark.parametrize("folders", [("a", "b"), ("x", "x"), (".", ".")])
def test_single_files_of_equal_names_without_a_patient_are_not_one_person(folders, scans, tmp_path):
    names = ("im", "im") if folders == ("a", "b") else ("im1", "im2")
    for n, (folder, name) in enumerate(zip(folders, names, strict=True)):
        (file,) = scans.dicom(tmp_path / "o", scans.body((8, 8, 1)), f"1.{n}", patient="", study=f"9.{n}")
        (tmp_path / "d" / folder).mkdir(parents=True, exist_ok=True)
        file.rename(tmp_path / "d" / folder / f"{name}.dcm")
    assert len(set(subjects(tmp_path / "d").values())) == 2
    listing = [f"{folder}/{name}.dcm" for folder, name in zip(folders, names, strict=True)]
    assert len(set(subjects(listed(tmp_path / "d", listing)).values())) == 2


def test_a_list_beside_dicom_may_name_the_folder_of_a_series(scans, tmp_path):
    """As it may as a source; its labels were left out without a word."""
    for n in (1, 2):
        scans.dicom(tmp_path / f"p{n}" / "CT", scans.body((8, 8, 3)), f"1.{n}", patient=f"P{n}")
    path = tmp_path / "l.csv"
    path.write_text("path,label\np1/CT,ill\np2,well\n", encoding="utf-8")
    for source in (path, tmp_path):
        assert [scan.label for scan in find([source], Wanted()).scans] == ["ill", "well"]


@pytest.mark.parametrize("column", ["PatientID", "Patient ID", "participant_id"])
def test_the_usual_names_of_the_column_of_people_are_known(column, tmp_path):
    """One person's scans under two names would leak from one split into another."""
    path = laid_out(tmp_path, "a.nii.gz", "b.nii.gz") / "l.csv"
    path.write_text(f"path,{column}\na.nii.gz,P1\nb.nii.gz,P1\n", encoding="utf-8")
    found = find([path], Wanted())
    assert [scan.subject for scan in found.scans] == ["P1", "P1"] and found.notes == []


def test_masks_in_the_column_of_labels_are_told(tmp_path):
    laid_out(tmp_path, "a.nii.gz", "b.nii.gz", "masks/a.nii.gz", "masks/b.nii.gz")
    path = tmp_path / "l.csv"
    path.write_text("image,label\na.nii.gz,masks/a.nii.gz\nb.nii.gz,masks/b.nii.gz\n", encoding="utf-8")
    assert any("masks/a.nii.gz: each is taken for a class" in note for note in find([path], Wanted()).notes)


def test_natural_pictures_of_a_list_are_each_their_own(tmp_path):
    names = [f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(2)]
    path = listed(laid_out(tmp_path, *names), names)
    assert subjects(path, colour="rgb") == {name: name.removesuffix(".png") for name in names}


CHANNELS = {
    "visits": {f"p{n}/{visit}/{{c}}.nii": f"p{n}" for n in (1, 2) for visit in ("baseline", "followup")},
    "visits by letter": {f"p{n}/{visit}/{{c}}.nii": f"p{n}" for n in (1, 2, 3) for visit in ("a", "b")},
    "visits by date": {f"p{n}/2019-0{n}-0{day}/{{c}}.nii": f"p{n}" for n in (1, 2, 3) for day in (1, 2)},
    "visits in names": {f"p{n}_visit{k}_{{c}}.nii": f"p{n}" for n in (1, 2) for k in (1, 2)},
    "visits above": {f"{visit}/p{n}/{{c}}.nii": f"p{n}" for n in (1, 2) for visit in ("ses-1", "ses-2")},
    "visits below, without BIDS": {f"p{n}/ses-{k}/{{c}}.nii": f"p{n}" for n in (1, 2) for k in (1, 2)},
    "a folder above all": {f"all/p{n}/{visit}/{{c}}.nii": f"p{n}" for n in (1, 2) for visit in ("a", "b")},
    "sequences above": {f"{{c}}/p{n}/scan.nii": f"p{n}" for n in (1, 2)},
    "sequences between": {f"p{n}/{{c}}/image.nii": f"p{n}" for n in (1, 2)},
    "kinds above": {f"anat/p{n}_{{c}}.nii": f"p{n}" for n in (1, 2)},
    "splits": {f"{part}/{part}_{n}/{{c}}.nii": f"{part}_{n}" for part in ("train", "test") for n in (1, 2)},
    "sites": {f"site{k}/p{k}{n}/{{c}}.nii": f"p{k}{n}" for k in (1, 2) for n in (1, 2)},
    "hospitals": {
        f"{place}/{place[0]}{n}/{{c}}.nii": f"{place[0]}{n}" for place in ("bern", "jena") for n in range(9)
    },
    "visits at the end of names": {f"p{n}_ses-{k}_{{c}}.nii": f"p{n}" for n in (1, 2) for k in (1, 2)},
    "BraTS": {f"hgg/b_{n}/b_{n}_{{c}}.nii": f"b_{n}" for n in range(3)},
}  # fmt: skip


@pytest.mark.parametrize("layout", CHANNELS)
def test_channels_belong_to_the_person_and_not_to_the_visit(layout, tmp_path):
    expected = CHANNELS[layout]
    laid_out(tmp_path, *(name.format(c=c) for name in expected for c in ("t1", "flair")))
    found = find([tmp_path], Wanted(channels=("t1", "flair")))
    assert len(found.scans) == len(expected) == len({scan.id for scan in found.scans})
    assert {scan.source: scan.subject for scan in found.scans} == {
        name.format(c="t1"): subject for name, subject in expected.items()
    }


def test_a_map_of_one_frame_is_not_that_of_the_patients_other_frames(tmp_path):
    laid_out(
        tmp_path,
        *(f"p{n}/p{n}_frame{k}.nii" for n in (1, 2) for k in (1, 2)),
        "p1/p1_frame1_gt.nii",
        "p2/p2_gt.nii",
    )
    masks = {s.source: s.mask and s.mask.name for s in find([tmp_path], Wanted(masks="gt")).scans}
    assert masks == dict.fromkeys(("p1/p1_frame2.nii", "p2/p2_frame1.nii", "p2/p2_frame2.nii")) | {
        "p1/p1_frame1.nii": "p1_frame1_gt.nii"
    }


def test_entries_of_a_dataset_json_with_equal_names_are_not_one_person(tmp_path):
    laid_out(tmp_path, "p1/t1.nii", "p1/t2.nii", "p2/t1.nii")
    entries = [{"image": name} for name in ("p1/t1.nii", "p1/t2.nii", "p2/t1.nii")]
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "D", "training": entries}), encoding="utf-8")
    found = find([tmp_path], Wanted())
    assert [(scan.id, scan.subject) for scan in found.scans] == [
        ("D/p1/t1", "p1"),
        ("D/p1/t2", "p1"),
        ("D/p2/t1", "p2"),
    ]


def test_a_subject_in_two_splits_is_named(tmp_path):
    laid_out(tmp_path, "a.nii", "b.nii", "c.nii", "d.nii")
    (tmp_path / "l.csv").write_text(
        "path,subject,split\na.nii,p,train\nb.nii,p,test\nc.nii,q,train\nd.nii,q,\n", encoding="utf-8"
    )
    assert find([tmp_path / "l.csv"], Wanted()).notes == [
        "1 subject with scans in several splits: p (test, train); the house split puts all scans of a "
        "subject into the one furthest from training"
    ]
