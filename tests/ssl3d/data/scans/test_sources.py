"""What is found in folders and lists: subjects, series, channels, labels, masks."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from ssl3d.data.preparation.process import Recipe, ScanTask, process
from ssl3d.data.scans import csv_lists, dataset_json
from ssl3d.data.scans.find import find, in_part
from ssl3d.data.scans.found import Wanted
from ssl3d.errors import DataError


def by_id(found):
    return {scan.id: scan for scan in found.scans}


def test_bids_gives_subjects_and_leaves_derivatives_out(scans, tmp_path):
    root = tmp_path / "study"
    for sub in ("sub-01", "sub-02"):
        for ses in ("ses-1", "ses-2"):
            scans.nifti(root / sub / ses / "anat" / f"{sub}_{ses}_T1w.nii.gz", scans.body())
    scans.nifti(root / "derivatives" / "fs" / "sub-01" / "brain.nii.gz", scans.body())
    (root / "dataset_description.json").write_text("{}", encoding="utf-8")
    found = find([root], Wanted())
    assert [scan.subject for scan in found.scans] == ["sub-01", "sub-01", "sub-02", "sub-02"]
    assert {scan.dataset for scan in found.scans} == {"study"}
    assert found.scans[0].source == "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"


def test_subject_is_the_file_name_or_the_folder_where_names_repeat(scans, tmp_path):
    for name in ("a/flair.nii.gz", "b/flair.nii.gz"):
        scans.nifti(tmp_path / "x" / name, scans.body())
    scans.nifti(tmp_path / "y" / "p1.nii.gz", scans.body())
    assert [scan.subject for scan in find([tmp_path / "x"], Wanted()).scans] == ["a", "b"]
    assert [scan.subject for scan in find([tmp_path / "y"], Wanted()).scans] == ["p1"]


def test_label_like_names_are_not_scans_and_are_named(scans, tmp_path):
    for name in (
        "a",
        "a_seg",
        "b",
        "b-mask",
        "brainmask",
        "c_labels",
        "roi1",
        "segment_of_spine",
        "masked",
    ):
        scans.nifti(tmp_path / f"{name}.nii.gz", scans.body())
    scans.nifti(tmp_path / "labels" / "d.nii.gz", scans.body())
    found = find([tmp_path], Wanted())
    assert [scan.subject for scan in found.scans] == ["a", "b", "masked", "segment_of_spine"]
    assert len(found.notes) == 1
    assert "a_seg.nii.gz" in found.notes[0]
    assert "1 more" in found.notes[0]
    assert len(find([tmp_path], Wanted(take_labels=True)).scans) == 10


def test_masks_beside_scans_are_kept_when_asked(scans, tmp_path):
    for name in (
        "a.nii.gz",
        "a_seg.nii.gz",
        "b.nii.gz",
        "p/flair.nii.gz",
        "p/seg.nii.gz",
        "p/brain_mask.nii.gz",
    ):
        scans.nifti(tmp_path / name, scans.body())
    found = find([tmp_path], Wanted(masks="seg"))
    masks = {scan.source: scan.mask and scan.mask.name for scan in found.scans}
    assert masks == {"a.nii.gz": "a_seg.nii.gz", "b.nii.gz": None, "p/flair.nii.gz": "seg.nii.gz"}
    assert "brain_mask" in found.notes[0]


@pytest.mark.parametrize(
    "layout", ["{s}/{c}.nii.gz", "{c}/{s}.nii.gz", "{s}_{c}.nii.gz", "sub-{s}/ses-1/x_{c}.nii"]
)
def test_sequences_of_a_subject_become_channels(scans, tmp_path, layout):
    for subject in ("p1", "p2"):
        for channel in ("T1", "flair", "t1ce"):
            if (subject, channel) != ("p2", "flair"):
                scans.nifti(tmp_path / "d" / layout.format(s=subject, c=channel), scans.body())
    found = find([tmp_path / "d"], Wanted(channels=("t1", "flair")))
    assert len(found.scans) == 2
    one, two = found.scans
    assert one.subject.removeprefix("sub-") == "p1"
    assert one.channels == ("t1", "flair")
    assert [len(files) for files in one.files] == [1, 1]
    assert "T1" in str(one.files[0][0].relative_to(tmp_path))
    assert [len(files) for files in two.files] == [1, 0]
    assert "t1ce" in " ".join(found.notes)


def test_two_files_of_one_channel_are_refused_by_name(scans, tmp_path):
    for name in ("p_t1.nii.gz", "t1_p.nii.gz"):
        scans.nifti(tmp_path / name, scans.body())
    found = find([tmp_path], Wanted(channels=("t1",)))
    assert len(found.scans) == 1
    assert found.rejected[0][0] == "t1_p.nii.gz"


def _decathlon(scans, root, modality=None):
    mask = np.zeros((12, 14, 16), np.uint8)
    mask[5:8, 5:8, 5:8] = 1
    for case in ("case_1", "case_2"):
        scans.nifti(root / "imagesTr" / f"{case}.nii.gz", scans.body())
        scans.nifti(root / "labelsTr" / f"{case}.nii.gz", mask)
    scans.nifti(root / "imagesTr" / "._case_1.nii.gz", scans.body())
    scans.nifti(root / "imagesTs" / "case_3.nii.gz", scans.body())
    pairs = [
        {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"}
        for case in ("case_1", "case_2", "case_9")
    ]
    described = {
        "name": "Spleen",
        "modality": modality or {"0": "CT"},
        "labels": {"0": "background", "1": "spleen"},
        "training": pairs,
        "test": ["./imagesTs/case_3.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(described), encoding="utf-8")


PUBLIC = {
    # Layout: files, the part that tells masks, subject and mask of every scan.
    "BraTS": (
        ["B_01/B_01_flair.nii.gz", "B_01/B_01_t1.nii.gz", "B_01/B_01_seg.nii.gz"],
        "_seg",
        {
            "B_01/B_01_flair.nii.gz": ("B_01", "B_01_seg.nii.gz"),
            "B_01/B_01_t1.nii.gz": ("B_01", "B_01_seg.nii.gz"),
        },
    ),
    "MMWHS": (
        ["ct_train_1001_image.nii.gz", "ct_train_1001_label.nii.gz", "ct_train_1002_image.nii.gz"],
        "label",
        {
            "ct_train_1001_image.nii.gz": ("ct_train_1001", "ct_train_1001_label.nii.gz"),
            "ct_train_1002_image.nii.gz": ("ct_train_1002", None),
        },
    ),
    "LiTS": (
        ["volume-1.nii", "volume-10.nii", "segmentation-1.nii", "segmentation-10.nii"],
        "segmentation",
        {
            "volume-1.nii": ("volume-1", "segmentation-1.nii"),
            "volume-10.nii": ("volume-10", "segmentation-10.nii"),
        },
    ),
    "KiTS": (
        ["case_1/imaging.nii.gz", "case_1/segmentation.nii.gz", "case_2/imaging.nii.gz"],
        "segmentation",
        {
            "case_1/imaging.nii.gz": ("case_1", "segmentation.nii.gz"),
            "case_2/imaging.nii.gz": ("case_2", None),
        },
    ),
    # One map that could be anyone's is nobody's.
    "ambiguous": (
        ["liver_a.nii", "liver_b.nii", "liver_seg.nii"],
        "seg",
        {"liver_a.nii": ("liver_a", None), "liver_b.nii": ("liver_b", None)},
    ),
}


@pytest.mark.parametrize("layout", PUBLIC)
def test_public_data_sets_give_subjects_and_masks(layout, tmp_path):
    files, part, expected = PUBLIC[layout]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find([tmp_path], Wanted(masks=part))
    assert {s.source: (s.subject, s.mask and s.mask.name) for s in found.scans} == expected


def test_decathlon_folder_keeps_masks_names_and_modality(scans, tmp_path):
    _decathlon(scans, tmp_path / "Task09")
    found = find([tmp_path / "Task09"], Wanted())
    assert [scan.subject for scan in found.scans] == ["case_1", "case_2", "case_3"]
    assert [scan.mask is not None for scan in found.scans] == [True, True, False]
    assert {scan.dataset for scan in found.scans} == {"Spleen"}
    assert {scan.modality for scan in found.scans} == {"CT"}
    assert found.label_names == {"Spleen": {"0": "background", "1": "spleen"}}
    assert found.rejected == [("./imagesTr/case_9.nii.gz", "listed in dataset.json, no such file")]
    assert {scan.dataset for scan in find([tmp_path / "Task09"], Wanted(dataset="mine")).scans} == {"mine"}


def _json_listed(root, **described):
    for name in ("a", "a2", "b", "b2", "m", "v", "t"):
        (root / f"{name}.nii").touch()
    (root / "dataset.json").write_text(json.dumps({"name": "D", **described}), encoding="utf-8")
    return find([root], Wanted())


def test_a_list_of_images_is_the_channels_of_one_scan(tmp_path):
    entries = [{"image": ["a.nii", "a2.nii"], "label": "m.nii"}, {"image": ["b.nii", "b2.nii"]}]
    found = _json_listed(tmp_path, training=entries)
    assert [scan.channels for scan in found.scans] == [("channel0", "channel1")] * 2
    assert [[f.name for (f,) in scan.files] for scan in found.scans] == [
        ["a.nii", "a2.nii"],
        ["b.nii", "b2.nii"],
    ]
    assert [scan.frames_are_channels for scan in found.scans] == [False, False]
    assert found.scans[0].mask == tmp_path / "m.nii"
    entries = [
        *entries,
        {"image": ["a.nii", "z.nii"]},
        {"image": ["a.nii", "b.nii", "v.nii"]},
        {"image": []},
    ]
    found = _json_listed(tmp_path, training=[*entries, {"label": 1}, 7], modality={"0": "T1", "1": "T2"})
    assert [scan.channels for scan in found.scans] == [("T1", "T2")] * 2
    without = "listed in dataset.json without the name of an image"
    assert found.rejected == [
        ("a.nii", "listed in dataset.json, no such file"),
        ("a.nii", "3 images in dataset.json, which names 2 channels"),
        ("{'image': []}", without),
        ("{'label': 1}", without),
        ("7", without),
    ]


def test_a_number_as_label_is_the_class(tmp_path):
    labels = [1, 2.0, 2.5, "m.nii", [0, 1], None, "gone.nii"]
    found = _json_listed(tmp_path, training=[{"image": "a.nii", "label": label} for label in labels[:1]])
    assert [scan.label for scan in found.scans] == [1]
    entries = [
        {"image": f"{name}.nii", "label": label}
        for name, label in zip(("a", "a2", "b", "b2", "v", "t", "m"), labels, strict=True)
    ]
    found = _json_listed(tmp_path, training=entries)
    assert [scan.label for scan in found.scans] == [1, 2, 2.5, None, None]
    assert [scan.mask and scan.mask.name for scan in found.scans] == [None, None, None, "m.nii", None]
    assert found.rejected == [
        ("v.nii", "its label in dataset.json is [0, 1]; expected a mask's file or one number"),
        ("m.nii", "its mask gone.nii, listed in dataset.json, does not exist"),
    ]
    for odd in (10**400, float("nan"), -float("inf")):
        found = _json_listed(tmp_path, training=[{"image": "a.nii", "label": odd}])
        assert not found.scans and "expected a mask's file or one number" in found.rejected[0][1]


def test_the_validation_part_of_a_list_is_one(tmp_path):
    parts = {"training": [{"image": "a.nii"}], "test": ["t.nii"]}
    assert [scan.split for scan in _json_listed(tmp_path, **parts).scans] == ["", ""]
    found = _json_listed(tmp_path, **parts, validation=[{"image": "v.nii", "label": "m.nii"}])
    assert [(scan.source, scan.split) for scan in found.scans] == [
        ("a.nii", "train"), ("v.nii", "val"), ("t.nii", "test"),
    ]  # fmt: skip
    assert found.scans[1].mask == tmp_path / "m.nii"
    found = find([tmp_path / "dataset.json"], Wanted())
    assert len(found.scans) == 3
    assert {path.name for path in dataset_json.named_in_json(tmp_path / "dataset.json")} == {
        "a.nii", "t.nii", "v.nii", "m.nii",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        ({"0": "T1", "1": "T2", "10": "FLAIR", "2": "PD"}, ("T1", "T2", "PD", "FLAIR")),
        ({"T2": 1, "T1": 0}, ("T1", "T2")),
        ({"first": "T1", "second": "T2"}, ("T1", "T2")),
    ],
)
def test_channels_may_be_named_by_number_or_number_by_name(tmp_path, channels, expected):
    found = _json_listed(tmp_path, training=[{"image": "a.nii"}], channel_names=channels)
    assert [scan.channels for scan in found.scans] == [expected]


def test_boxes_in_a_list_of_masks_are_said_not_to_be_read(tmp_path):
    entries = [{"image": "a.nii", "box": [[1, 2, 3, 4, 5, 6]], "label": [0]}]
    found = _json_listed(tmp_path, training=entries)
    assert [(scan.mask, scan.label) for scan in found.scans] == [(None, None)]
    assert found.notes == [
        "dataset.json: boxes of 1 scan not read: boxes are read from files named dataset_0.json and so on"
    ]


LINK = "a link to a file that is not here (get the data first: datalad get, git annex get)"


def test_links_to_nothing_are_rejected_by_name(scans, tmp_path):
    root = tmp_path / "d"
    scans.nifti(root / "a.nii.gz", scans.body())
    for name in ("b.nii.gz", "p/c.dcm", "p/IM001", "p/1.2.840.1", "notes.txt", "x.bval"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to("/nowhere/at/all")
    found = find([root], Wanted())
    assert [scan.source for scan in found.scans] == ["a.nii.gz"]
    assert found.rejected == [(name, LINK) for name in ("b.nii.gz", "p/1.2.840.1", "p/IM001", "p/c.dcm")]
    (root / "l.csv").write_text("path\na.nii.gz\nb.nii.gz\n", encoding="utf-8")
    assert find([root / "l.csv"], Wanted()).rejected == [("b.nii.gz", f"line 3 of l.csv: {LINK}")]
    with pytest.raises(DataError, match=r"b\.nii\.gz: a link to a file that is not here"):
        find([root / "b.nii.gz"], Wanted())
    nnunet = tmp_path / "n"
    scans.nifti(nnunet / "imagesTr" / "x_0000.nii.gz", scans.body())
    for name in ("imagesTr/y_0000.nii.gz", "labelsTr/x.nii.gz"):
        (nnunet / name).parent.mkdir(exist_ok=True)
        (nnunet / name).symlink_to("/nowhere/at/all")
    (nnunet / "dataset.json").write_text('{"channel_names": {"0": "CT"}, "labels": {}}', encoding="utf-8")
    assert sorted(find([nnunet], Wanted()).rejected) == [
        ("imagesTr/y_0000.nii.gz", LINK),
        ("labelsTr/x.nii.gz", LINK),
    ]


def test_a_link_as_the_source_keeps_its_name_and_its_place(scans, tmp_path):
    annex = tmp_path / "study" / ".git" / "annex" / "objects"
    scans.nifti(annex / "MD5E-s1--77.nii.gz", scans.body())
    (annex / "MD5E-s1--78.csv").write_text("path,label\np1.nii.gz,1\n", encoding="utf-8")
    (tmp_path / "study" / "p1.nii.gz").symlink_to(annex / "MD5E-s1--77.nii.gz")
    (tmp_path / "study" / "l.csv").symlink_to(annex / "MD5E-s1--78.csv")
    for source in ("p1.nii.gz", "l.csv"):
        found = find([tmp_path / "study" / source], Wanted())
        assert [(s.id, s.subject, s.source) for s in found.scans] == [("study/p1", "p1", "p1.nii.gz")]
        assert found.rejected == []
    # A link to a list elsewhere: its paths are from where it lies.
    (tmp_path / "mine").mkdir()
    (annex / "p1.nii.gz").symlink_to("MD5E-s1--77.nii.gz")
    (tmp_path / "mine" / "list.csv").symlink_to(annex / "MD5E-s1--78.csv")
    assert [s.subject for s in find([tmp_path / "mine" / "list.csv"], Wanted()).scans] == ["p1"]
    assert list(csv_lists.named_in(tmp_path / "mine" / "list.csv")) == [annex / "p1.nii.gz"]


def test_links_to_a_folder_above_are_not_followed(scans, tmp_path):
    scans.nifti(tmp_path / "d" / "p" / "a.nii.gz", scans.body())
    scans.nifti(tmp_path / "e" / "b.nii.gz", scans.body())
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "p" / "up").symlink_to(tmp_path)
    (tmp_path / "d" / "p" / "self").symlink_to("self")
    (tmp_path / "d" / "e").symlink_to(tmp_path / "e")
    (tmp_path / "e" / "back").symlink_to(tmp_path / "d")
    assert [scan.source for scan in find([tmp_path / "d"], Wanted()).scans] == ["e/b.nii.gz", "p/a.nii.gz"]


def test_nnunet_suffixes_become_channels(scans, tmp_path):
    root = tmp_path / "Dataset001_X"
    for case, channels in (("a", (0, 1)), ("b", (0,))):
        for channel in channels:
            scans.nifti(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz", scans.body(seed=channel))
        scans.nifti(root / "labelsTr" / f"{case}.nii.gz", np.ones((12, 14, 16), np.uint8))
    described = {
        "channel_names": {"0": "T2", "1": "ADC"},
        "labels": {"background": 0, "PZ": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    found = find([root], Wanted())
    assert [scan.channels for scan in found.scans] == [("T2", "ADC")] * 2
    assert [len(files) for files in found.scans[1].files] == [1, 0]
    assert all(scan.mask for scan in found.scans)
    assert found.label_names == {"Dataset001_X": {"0": "background", "1": "PZ"}}
    (root / "dataset.json").unlink()
    assert [scan.channels for scan in find([root], Wanted()).scans] == [("channel0", "channel1")] * 2


def described_masks(scans, root, labels, **more):
    """Find a folder of one case whose dataset.json has these labels."""
    scans.nifti(root / "imagesTr" / "a_0000.nii.gz", scans.body())
    scans.nifti(root / "labelsTr" / "a.nii.gz", np.ones((12, 14, 16), np.uint8))
    described = {"channel_names": {"0": "T2"}, "labels": labels, "file_ending": ".nii.gz", **more}
    (root / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    return find([root], Wanted(dataset="x"))


@pytest.mark.parametrize(
    "labels",
    [{"background": 0, "tumour": 1, "ignore": 2}, {"0": "background", "1": "tumour", "2": "Ignore"}],
)
def test_the_ignore_label_is_no_structure(scans, tmp_path, labels):
    found = described_masks(scans, tmp_path, labels)
    assert found.label_names == {"x": {"0": "background", "1": "tumour"}}
    assert found.ignore_labels == {"x": 2} and not found.regions


def test_regions_of_nnunet_keep_their_order_and_classes(scans, tmp_path):
    """As nnU-Net's documentation of region-based training has it, for BraTS."""
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    found = described_masks(scans, tmp_path, labels, regions_class_order=[1, 2, 3])
    assert found.regions == {
        "x": [
            {"name": "whole", "values": [1, 2, 3], "class": 1},
            {"name": "core", "values": [2, 3], "class": 2},
            {"name": "enhancing", "values": [3], "class": 3},
        ]
    }
    assert found.ignore_labels == {"x": 4}


def test_regions_without_their_classes_are_numbered_and_said(scans, tmp_path):
    found = described_masks(scans, tmp_path, {"whole": [1, 2], "core": [2], "odd": "many"})
    assert [region["class"] for region in found.regions["x"]] == [1, 2]
    assert any("2 regions, and regions_class_order is None" in note for note in found.notes)
    assert any("no values of a mask: odd" in note for note in found.notes)


def test_a_dataset_json_that_lists_nothing_hides_no_scans(scans, tmp_path):
    """Others have files of that name too."""
    scans.nifti(tmp_path / "p1.nii.gz", scans.body())
    (tmp_path / "dataset.json").write_text('{"title": "a collection"}', encoding="utf-8")
    assert [scan.subject for scan in find([tmp_path], Wanted()).scans] == ["p1"]


def test_numbers_of_people_are_no_channels(scans, tmp_path):
    """AMOS without its dataset.json: all people became one scan of hundreds of channels."""
    for name in ("amos_0001", "amos_0004"):
        scans.nifti(tmp_path / "a" / "imagesTr" / f"{name}.nii.gz", scans.body())
    assert [scan.subject for scan in find([tmp_path / "a"], Wanted()).scans] == ["amos_0001", "amos_0004"]
    for name in ("x_0000", "x_0001"):
        for part in ("imagesTr", "labelsTr"):
            scans.nifti(tmp_path / "b" / part / f"{name}.nii.gz", scans.body())
    assert [scan.subject for scan in find([tmp_path / "b"], Wanted()).scans] == ["x_0000", "x_0001"]


def test_the_first_nnunet_lists_cases_without_their_channels(scans, tmp_path):
    for case in ("la_003", "la_004"):
        for channel in range(2):
            scans.nifti(tmp_path / "imagesTr" / f"{case}_{channel:04d}.nii.gz", scans.body(seed=channel))
        scans.nifti(tmp_path / "labelsTr" / f"{case}.nii.gz", np.ones((12, 14, 16), np.uint8))
    (tmp_path / "imagesTr" / "la_004_0000.nii.gz").unlink()
    entries = [
        {"image": f"./imagesTr/la_00{n}.nii.gz", "label": f"./labelsTr/la_00{n}.nii.gz"} for n in (3, 4)
    ]
    described = {"name": "LA", "modality": {"0": "MRI", "1": "T2"}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    found = find([tmp_path], Wanted())
    assert [(scan.id, scan.subject, scan.channels) for scan in found.scans] == [
        ("LA/la_003", "la_003", ("MRI", "T2"))
    ]
    names = [[path.name for path in group] for group in found.scans[0].files]
    assert names == [["la_003_0000.nii.gz"], ["la_003_0001.nii.gz"]] and found.scans[0].mask
    assert found.rejected == [
        (
            "./imagesTr/la_004.nii.gz",
            "listed in dataset.json, which names 2 channels; there are la_004_0001.nii.gz",
        )
    ]


def test_dicom_series_in_one_folder_are_told_apart(scans, tmp_path):
    folder = tmp_path / "dicom" / "study"
    scans.dicom(folder, scans.body((10, 12, 5)), "1.2.3.4", prefix="a")
    scans.dicom(folder, scans.body((10, 12, 7)), "1.2.3.5", patient="P2", modality="CT", prefix="b")
    (folder / "notes.txt").write_text("x", encoding="utf-8")
    (folder / "broken.dcm").write_bytes(b"not dicom at all")
    found = find([tmp_path / "dicom"], Wanted())
    assert [(s.subject, len(s.files[0]), s.modality) for s in found.scans] == [
        ("P1", 5, "MR"),
        ("P2", 7, "CT"),
    ]
    assert found.rejected == [("study/broken.dcm", "not readable as DICOM")]


def test_dicom_files_without_an_ending_are_found(scans, tmp_path):
    for path in scans.dicom(tmp_path / "d", scans.body((10, 12, 4)), "1.2.3.4"):
        path.rename(path.with_name(path.stem.upper()))
    (tmp_path / "d" / "README").write_text("x" * 400, encoding="utf-8")
    assert [len(scan.files[0]) for scan in find([tmp_path / "d"], Wanted()).scans] == [4]


def test_csv_says_subject_label_split_and_mask(scans, tmp_path):
    for name in ("a", "b", "c"):
        scans.nifti(tmp_path / "v" / f"{name}.nii.gz", scans.body())
    scans.nifti(tmp_path / "v" / "m.nii.gz", np.ones((12, 14, 16), np.uint8))
    (tmp_path / "l.csv").write_text(
        "path,subject,label,split,mask\nv/a.nii.gz,p1,0,train,v/m.nii.gz\nv/b.nii.gz,p1,1,valid,\n"
        "v/c.nii.gz,,,TEST,\nv/nowhere.nii.gz,p3,1,,\nv/a.nii.gz,p1,0,,\n",
        encoding="utf-8",
    )
    found = find([tmp_path / "l.csv"], Wanted())
    rows = [(s.subject, s.label, s.split, s.mask is not None) for s in found.scans]
    assert rows == [("p1", 0, "train", True), ("p1", 1, "val", False), ("c", None, "test", False)]
    reasons = dict(found.rejected)
    assert "no such file" in reasons["v/nowhere.nii.gz"]
    assert "listed twice" in reasons["v/a.nii.gz"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("1", "2"), [1, 2]),
        (("1", "2.5"), [1.0, 2.5]),
        (("0.0", "1.0", ""), [0, 1, None]),
        (("60.0", "61.5"), [60.0, 61.5]),
        (("0,5", "1", "-2,25"), [0.5, 1.0, -2.25]),
        (("1,0", "0,0"), [1, 0]),
        (("1,2", "x"), ["1,2", "x"]),
        (("1e400", "1"), ["1e400", "1"]),
        (("1", "x"), ["1", "x"]),
        (("nan", "1"), [None, 1]),
        (("1.5", "N/A", "", "2"), [1.5, None, None, 2.0]),
        (("none", "-", "1"), [None, None, 1]),
        (("1_0", "10"), ["1_0", "10"]),
        (("007", "7"), ["007", "7"]),
        (("\u0661", "1"), ["\u0661", "1"]),
        (("infinity", "1"), ["infinity", "1"]),
    ],
)
def test_labels_of_a_column_have_one_type(scans, tmp_path, labels, expected):
    for i, _ in enumerate(labels):
        scans.nifti(tmp_path / f"{i}.nii.gz", scans.body())
    lines = "".join(f"{i}.nii.gz;{label}\n" for i, label in enumerate(labels))
    (tmp_path / "l.csv").write_text("\ufeffFile;Label\n" + lines, encoding="utf-8")
    found = [scan.label for scan in find([tmp_path / "l.csv"], Wanted()).scans]
    assert found == expected
    assert [type(label) for label in found] == [type(label) for label in expected]


def test_a_comma_in_a_cell_of_a_list_with_commas_is_a_set_of_classes(scans, tmp_path):
    for i in range(2):
        scans.nifti(tmp_path / f"{i}.nii.gz", scans.body())
    (tmp_path / "l.csv").write_text('path,label\n0.nii.gz,"0,5"\n1.nii.gz,1\n', encoding="utf-8")
    assert [scan.label for scan in find([tmp_path / "l.csv"], Wanted()).scans] == ["0,5", "1"]


def test_a_word_among_numbers_is_named_with_its_line(scans, tmp_path):
    for i in range(4):
        scans.nifti(tmp_path / f"{i}.nii.gz", scans.body())
    path = tmp_path / "l.csv"

    def notes(*labels):
        lines = "".join(f"{i}.nii.gz,s{i},{label}\n" for i, label in enumerate(labels))
        path.write_text("path,subject,label\n" + lines, encoding="utf-8")
        assert find([path], Wanted()).notes == find([tmp_path], Wanted()).notes[1:]
        return find([path], Wanted()).notes

    assert notes("1", "2", "unclear", "3.5") == [
        "l.csv, line 4: the label 'unclear' is no number, so the other labels, which are numbers, are "
        "names of classes too; correct it, or leave it empty"
    ]
    assert "line 3: the label 'a' and 1 more is no number" in notes("1", "a", "b", "2")[0]
    for labels in (("a", "b", "c", "1"), ("1", "2", "", "3"), ("a", "b", "a", "b")):
        assert notes(*labels) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na,1\n", "no column `path` .columns: name, label."),
        ("", "no column `path`"),
        ("path,split\na.nii.gz,holdout\n", "line 2: split 'holdout'"),
    ],
)
def test_a_useless_csv_is_refused(scans, tmp_path, text, message):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    (tmp_path / "l.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        find([tmp_path / "l.csv"], Wanted())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_list_is_read_as_spreadsheets_write_it(scans, tmp_path, encoding):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    (tmp_path / "l.csv").write_bytes("path;label\r\na.nii.gz;gutartig, groß\r\n".encode(encoding))
    assert [scan.label for scan in find([tmp_path / "l.csv"], Wanted()).scans] == ["gutartig, groß"]
    assert [scan.label for scan in find([tmp_path], Wanted()).scans] == ["gutartig, groß"]


def test_a_csv_that_is_no_text_is_an_error_only_where_it_is_the_source(scans, tmp_path):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    (tmp_path / "notes.csv").write_bytes(b"path\x00\x81\x8d\n")
    found = find([tmp_path], Wanted())
    assert len(found.scans) == 1
    assert [note for note in found.notes if "notes.csv" in note] == [
        f"{tmp_path / 'notes.csv'}: not text in UTF-8, UTF-16 or cp1252; not used"
    ]
    with pytest.raises(DataError, match=r"notes\.csv: not text"):
        find([tmp_path / "notes.csv"], Wanted())


def test_what_of_a_list_is_not_used_is_said(scans, tmp_path):
    for name in "abc":
        scans.nifti(tmp_path / f"{name}.nii.gz", scans.body())
    path = tmp_path / "l.csv"
    path.write_text("path,Target,\na.nii.gz,1,,\nb.nii.gz,2,,x,\nc.nii.gz,3,\n", encoding="utf-8")
    notes = [
        "l.csv: columns not used: Target (labels are read from label, class, class_index, diagnosis, "
        "or the column that --label names; "
        "subjects are read from subject, patient, subject_id, patient_id, patientid, patient id, "
        "participant_id)",
        "l.csv: 1 line has more cells than the header; what is in those was not read (a delimiter within a "
        "cell needs quotes around it)",
    ]
    subjects = "l.csv: no column subject: 3 subjects taken from the names of files and folders"
    assert find([path], Wanted()).notes == [*notes, subjects]
    assert find([tmp_path], Wanted()).notes[1:] == notes
    path.write_text("path,patient,label\na.nii.gz,p,NA\nb.nii.gz,p,\nc.nii.gz,q,nan\n", encoding="utf-8")
    assert find([path], Wanted()).notes == ["l.csv: 2 cells of n/a or the like in label, taken for none"]
    path.write_text("path,subject,label,split,mask\na.nii.gz,p,1,,\n", encoding="utf-8")
    assert find([path], Wanted()).notes == []


def test_the_columns_of_boxes_beside_scans_are_used(scans, tmp_path):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    (tmp_path / "b.csv").write_text(
        "path,x_mm,y_mm,z_mm,w_mm,h_mm,d_mm,class_name\na.nii.gz,5,5,5,4,4,4,node\n", encoding="utf-8"
    )
    assert not any("not used" in note for note in find([tmp_path], Wanted()).notes)


def test_a_list_of_boxes_is_no_list_of_labels(scans, tmp_path):
    for name in "ab":
        scans.nifti(tmp_path / f"{name}.nii.gz", scans.body())
    boxes = tmp_path / "boxes.csv"
    lines = ["a,p,5,5,5,4,4,4,benign", "a,p,6,6,6,2,2,2,malignant", "b,q,5,5,5,4,4,4,benign"]
    lines = [line.replace(",", ".nii.gz,", 1) + "\n" for line in lines]
    boxes.write_text(
        "path,patient,x_mm,y_mm,z_mm,w_mm,h_mm,d_mm,label\n" + "".join(lines), encoding="utf-8"
    )
    for source in (tmp_path, boxes):
        found = find([source], Wanted())
        assert [scan.label for scan in found.scans] == [None, None]
        assert [scan.subject for scan in found.scans] == ["p", "q"]
        assert [[box[6] for box in scan.world_boxes] for scan in found.scans] == [[1, 2], [1]]
        assert "boxes.csv: boxes of 2 of 2 scans" in found.notes
        assert found.rejected == []
        assert not any("not used" in note for note in found.notes)
    # Beside it, a list of labels is one, whichever comes first.
    for name in ("aa.csv", "labels.csv"):
        (tmp_path / name).write_text("path,subject,label\na.nii.gz,r,1\nb.nii.gz,s,0\n", encoding="utf-8")
        found = find([tmp_path], Wanted())
        assert [(scan.subject, scan.label) for scan in found.scans] == [("r", 1), ("s", 0)]
        assert [len(scan.world_boxes) for scan in found.scans] == [2, 1]
        listed = find([tmp_path / name], Wanted())
        assert [scan.world_boxes for scan in listed.scans] == [None, None]
        assert listed.notes == [
            f"boxes.csv: tells of boxes, which were not read, as {name} is the source; give the folder "
            f"({tmp_path}) as the source to have both"
        ]
        (tmp_path / name).unlink()


def test_boxes_beside_a_list_that_are_of_other_scans_are_not_mentioned(scans, tmp_path):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2\nz.png,1,2,3,4\n", encoding="utf-8")
    (tmp_path / "my_coco.json").write_text("{", encoding="utf-8")
    (tmp_path / "l.csv").write_text("path,subject\na.nii.gz,p\n", encoding="utf-8")
    assert find([tmp_path / "l.csv"], Wanted()).notes == []


@pytest.mark.parametrize("part", ["lesion", "_lesion", "-Lesion."])
@pytest.mark.parametrize("channels", [(), ("t1",)])
def test_masks_are_found_with_and_without_the_line_before_their_part(tmp_path, part, channels):
    for name in ("a_t1", "a_t1_lesion" if not channels else "a_lesion"):
        (tmp_path / f"{name}.nii.gz").touch()
    found = find([tmp_path], Wanted(masks=part, channels=channels))
    assert [scan.mask and "lesion" in scan.mask.name for scan in found.scans] == [True]
    assert found.notes == []


def test_masks_by_a_name_that_no_file_has_are_refused(scans, tmp_path):
    for name in ("a", "a_seg", "b", "b_seg", "b_brainmask", "labels/c"):
        scans.nifti(tmp_path / "d" / f"{name}.nii.gz", scans.body())
    message = r"--masks sge: no file has it.*: seg \(2\), brainmask \(1\), labels/ \(1\)$"
    for channels in ((), ("a", "b")):
        with pytest.raises(DataError, match=message):
            find([tmp_path / "d"], Wanted(masks="sge", channels=channels))
    (tmp_path / "l.csv").write_text("path\nd/a.nii.gz\n", encoding="utf-8")
    with pytest.raises(DataError, match="a list names masks in its column `mask`"):
        find([tmp_path / "l.csv"], Wanted(masks="seg"))
    # One source with masks is enough, and a name that is there but nobody's is said.
    assert len(find([tmp_path / "d", tmp_path / "l.csv"], Wanted(masks="seg")).scans) == 2
    scans.nifti(tmp_path / "e" / "x.nii.gz", scans.body())
    scans.nifti(tmp_path / "e" / "far" / "y_seg.nii.gz", scans.body())
    notes = find([tmp_path / "e"], Wanted(masks="_seg")).notes
    assert "--masks _seg: 1 files have it in their names, and none is one scan's alone" in notes


def test_csv_may_name_dicom_folders(scans, tmp_path):
    scans.dicom(tmp_path / "p1", scans.body((8, 8, 4)), "1.2.3.4", patient="X")
    scans.dicom(tmp_path / "p2", scans.body((8, 8, 4)), "1.2.3.5")
    scans.dicom(tmp_path / "p2", scans.body((8, 8, 4)), "1.2.3.6", prefix="t")
    (tmp_path / "l.csv").write_text("path,label\np1,sick\np2,well\n", encoding="utf-8")
    found = find([tmp_path / "l.csv"], Wanted())
    assert [(scan.subject, scan.label, len(scan.files[0])) for scan in found.scans] == [("X", "sick", 4)]
    assert found.rejected == [
        (
            "p2",
            "a folder with 2 DICOM series (s001.dcm and 3 more files, t001.dcm and 3 more files): move "
            "each series to a folder of its own, and list the one that is meant",
        )
    ]
    scans.dicom(tmp_path / "p3" / "a", scans.body((8, 8, 1)), "1.2.3.7")
    scans.dicom(tmp_path / "p3" / "b", scans.body((8, 8, 2)), "1.2.3.8")
    (tmp_path / "p4").mkdir()
    (tmp_path / "l.csv").write_text("path,label\np3,sick\np4,well\n", encoding="utf-8")
    assert find([tmp_path / "l.csv"], Wanted()).rejected == [
        (
            "p3",
            "a folder with 2 DICOM series (a/s001.dcm and 0 more files, b/s001.dcm and 1 more file): list "
            "these folders instead, a line each",
        ),
        ("p4", "a folder without a DICOM series; a line names one file, or the folder of one series"),
    ]


def test_a_list_beside_the_scans_is_used(scans, tmp_path):
    for name in ("a", "b"):
        scans.nifti(tmp_path / "v" / f"{name}.nii.gz", scans.body())
    (tmp_path / "labels.csv").write_text("file,label\nv/b.nii.gz,ill\n", encoding="utf-8")
    found = find([tmp_path], Wanted())
    assert [scan.label for scan in found.scans] == [None, "ill"]
    assert "1 of 2" in found.notes[0]
    (tmp_path / "other.csv").write_text("path,label\nv/b.nii.gz,well\n", encoding="utf-8")
    found = find([tmp_path], Wanted())
    assert [scan.label for scan in found.scans] == [None, None]
    assert "several lists" in found.notes[0]


def _picture(path, seed=0, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (20, 24) if mode == "L" else (20, 24, 3)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, np.uint8), mode).save(path)


def test_class_folders_of_pictures_are_labels(tmp_path):
    for split in ("train", "test"):
        for kind in ("ill", "well"):
            for i in range(2):
                _picture(tmp_path / "x" / split / kind / f"{i}.png")
    found = find([tmp_path / "x"], Wanted())
    assert sorted({(scan.split, scan.label) for scan in found.scans}) == [
        ("test", "ill"), ("test", "well"), ("train", "ill"), ("train", "well"),
    ]  # fmt: skip
    assert len({scan.subject for scan in found.scans}) == 8


def test_pictures_in_one_folder_have_no_class(tmp_path):
    for i in range(3):
        _picture(tmp_path / "images" / f"{i}.jpg")
    assert {scan.label for scan in find([tmp_path], Wanted()).scans} == {None}


def test_coco_boxes_come_with_the_pictures(tmp_path):
    _picture(tmp_path / "images" / "a.png")
    _picture(tmp_path / "images" / "b.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
        "annotations": [{"image_id": 7, "bbox": [2, 3, 10, 5], "category_id": 4}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    found = find([tmp_path], Wanted())
    assert [scan.boxes for scan in found.scans] == [((0.0, 3.0, 2.0, 1.0, 8.0, 12.0, 4.0),), ()]


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (9, 10, 11)])
def test_medmnist_rows_are_subjects_with_labels_and_splits(tmp_path, shape):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, *shape), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None].astype(np.uint8)
    np.savez_compressed(tmp_path / "organmnist_64.npz", **arrays)
    found = find([tmp_path / "organmnist_64.npz"], Wanted())
    assert [scan.split for scan in found.scans] == ["train"] * 5 + ["val"] * 2 + ["test"] * 3
    assert [scan.label for scan in found.scans] == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]
    assert found.scans[0].dataset == "organmnist"
    assert len({scan.subject for scan in found.scans}) == 10
    assert found.scans[5].subject == "val-00000"


def test_other_arrays_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "x.npz", weights=np.zeros((3, 3)))
    (tmp_path / "y.npz").write_bytes(b"PK nothing")
    (tmp_path / "z.npz").write_bytes(b"")
    np.savez(tmp_path / "o.npz", train_images=np.array([{}], dtype=object))
    reasons = dict(find([tmp_path], Wanted()).rejected)
    assert "weights" in reasons["x.npz"]
    assert "unreadable" in reasons["y.npz"]
    assert reasons["z.npz"] == "empty file"
    assert "pickled" in reasons["o.npz"]


def test_nothing_found_says_what_was_looked_for(tmp_path):
    (tmp_path / "readme.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"no scans found; looked for NIfTI.*CSV"):
        find([tmp_path], Wanted())
    with pytest.raises(DataError, match="no such file"):
        find([tmp_path / "nowhere"], Wanted())
    with pytest.raises(DataError, match="not a known format"):
        find([tmp_path / "readme.txt"], Wanted())
    (tmp_path / "dataset.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not JSON"):
        find([tmp_path], Wanted())


def test_a_file_found_twice_is_one_scan_and_equal_names_get_different_ids(scans, tmp_path):
    for root in ("x", "y"):
        scans.nifti(tmp_path / root / "data" / "a.nii.gz", scans.body())
    found = find([tmp_path / "x" / "data", tmp_path / "x" / "data" / "a.nii.gz"], Wanted())
    assert len(found.scans) == 1
    found = find([tmp_path / "x" / "data", tmp_path / "y" / "data"], Wanted(dataset="d"))
    assert len({scan.id for scan in found.scans}) == 2


def test_shards_hold_every_name_once():
    names = [f"d/s{i}" for i in range(200)]
    shards = [[name for name in names if in_part(name, i, 4)] for i in (1, 2, 3, 4)]
    assert sorted(name for shard in shards for name in shard) == sorted(names)
    assert min(map(len, shards)) > 30


def test_label_like_values_are_recognised_unless_the_file_was_named(scans, tmp_path):
    labels = np.zeros((8, 9, 10), np.float32)
    labels[2:5] = 3
    scans.nifti(tmp_path / "a.nii.gz", labels)
    folder = find([tmp_path], Wanted()).scans[0]
    named = find([tmp_path / "a.nii.gz"], Wanted()).scans[0]
    assert process(ScanTask(folder, "n", tmp_path / "p", Recipe())).label_like
    assert process(ScanTask(named, "n", tmp_path / "p", Recipe())).parts == ["n"]
    spot = np.zeros((8, 9, 10), np.int16)
    spot[4, 4, 4] = 1000
    nibabel.save(nibabel.Nifti1Image(spot, np.eye(4)), tmp_path / "a.nii.gz")
    assert not process(ScanTask(folder, "n", tmp_path / "p", Recipe())).label_like
