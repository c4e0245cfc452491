"""What is found and not used is named; label maps find their images where no other could be meant."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.find import find
from ssl3d.data.scans.folders import walk
from ssl3d.data.scans.found import Wanted


def nnunet(scans, root, image, label, cases=2, **described):
    for case in range(cases):
        scans.nifti(root / "imagesTr" / f"{image.format(case)}.nii.gz", scans.body(seed=case))
        mask = np.full((12, 14, 16), case + 1, np.uint8)
        scans.nifti(root / "labelsTr" / f"{label.format(case)}.nii.gz", mask)
    described = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1}, **described}
    (root / "dataset.json").write_text(json.dumps(described), encoding="utf-8")


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("MI_0{}_0000", "MI_0{}_0000"),
        ("volume-{}", "segmentation-{}"),
        ("case{}_0000", "case{}_seg"),
        ("p.{}.1_0000", "p.{}.1"),
        ("case{}_0000", "case{}"),
    ],
)
def test_label_maps_find_their_images(scans, tmp_path, image, label):
    nnunet(scans, tmp_path, image, label)
    found = find([tmp_path], Wanted())
    assert len(found.scans) == 2
    for scan in found.scans:
        name = scan.source.removeprefix("imagesTr/").removesuffix(".nii.gz")
        case = next(case for case in range(2) if image.format(case) == name)
        assert scan.mask is not None
        assert scan.mask.name == f"{label.format(case)}.nii.gz"
    assert not found.left_out


def test_a_label_map_that_may_be_of_two_images_is_of_none_and_said(scans, tmp_path):
    nnunet(scans, tmp_path, "volume-{}_0000", "other-{}")
    scans.nifti(tmp_path / "labelsTr" / "segmentation-0.nii.gz", np.ones((12, 14, 16), np.uint8))
    scans.nifti(tmp_path / "labelsTr" / "labels-0.nii.gz", np.ones((12, 14, 16), np.uint8))
    found = find([tmp_path], Wanted())
    assert [scan.mask for scan in found.scans] == [None, None]
    assert any("labelsTr: 4 label maps of no image in imagesTr" in note for note in found.notes)
    assert any("imagesTr: 2 cases of 2 without a label map in labelsTr: volume-0, volume-1" in note
               for note in found.notes)  # fmt: skip
    assert {path for path, reason in found.left_out if reason == "a label map of no scan"} == {
        f"labelsTr/{name}.nii.gz" for name in ("other-0", "other-1", "segmentation-0", "labels-0")
    }


def test_lists_of_dataset_json_by_other_names(scans, tmp_path):
    for name in ("images/p0", "images/p1", "tests/q0", "more/u0"):
        scans.nifti(tmp_path / f"{name}.nii.gz", scans.body(seed=len(name)))
    described = {
        "training": [{"image": "images/p0.nii.gz"}, {"image": "images/p1.nii.gz"}],
        "testing": ["tests/q0.nii.gz"],
        "unlabeled": [{"image": "more/u0.nii.gz"}],
        "labels": {"0": "background"},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    found = find([tmp_path], Wanted())
    assert [scan.subject for scan in found.scans] == ["p0", "p1", "q0"]
    assert any("the list 'unlabeled' of 1 scan is not used" in note for note in found.notes)
    assert [path for path, _ in found.left_out] == ["more/u0.nii.gz"]


def test_the_dataset_of_nnunet_maps_cases_to_files_anywhere(scans, tmp_path):
    for name in ("scans/first.0", "scans/first.1", "drawn/one"):
        scans.nifti(tmp_path / f"{name}.nii.gz", scans.body(seed=1))
    described = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "x": 1},
        "dataset": {
            "case.1": {
                "images": ["scans/first.0.nii.gz", "scans/first.1.nii.gz"],
                "label": "drawn/one.nii.gz",
            }
        },
    }
    (tmp_path / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    (scan,) = find([tmp_path], Wanted(dataset="d")).scans
    assert (scan.id, scan.channels) == ("d/case.1", ("T1", "T2"))
    assert [path.name for (path,) in scan.files] == ["first.0.nii.gz", "first.1.nii.gz"]
    assert scan.mask == tmp_path / "drawn" / "one.nii.gz"


@pytest.mark.parametrize("colour", ["grey", "rgb"])
def test_colour_pictures_of_nnunet_are_one_file(tmp_path, colour):
    root = tmp_path / "in"
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(picture).save(root / "imagesTr" / "c0_0000.png")
    Image.fromarray((picture[..., 0] > 100).astype(np.uint8)).save(root / "labelsTr" / "c0.png")
    described = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "road": 1}}
    (root / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    prepare(PrepareOptions((str(root),), str(tmp_path / "s.h5"), workers=0, colour=colour))
    from ssl3d.data.open import open_data

    (volume,) = open_data([tmp_path / "s.h5"])
    assert volume.record.channels == ("R", "G", "B")
    voxels = volume.read((0, 0, 0), volume.shape[1:]).numpy()
    np.testing.assert_allclose(voxels[:, 0].transpose(1, 2, 0), picture / 255, atol=1e-3)
    mask = volume.read_mask((0, 0, 0), volume.shape[1:]).numpy()
    np.testing.assert_array_equal(mask[0], picture[..., 0] > 100)


def test_one_volume_for_two_named_channels_in_a_fourth_axis_is_refused(scans, tmp_path, capsys):
    """It was stored with one channel beside others of two."""
    scans.nifti(tmp_path / "t" / "a.nii.gz", scans.body())
    described = {"modality": {"0": "T2", "1": "ADC"}, "training": [{"image": "a.nii.gz"}]}
    (tmp_path / "t" / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    summary = prepare(PrepareOptions((str(tmp_path / "t"),), str(tmp_path / "s.h5"), workers=0))
    assert (summary.volumes, summary.rejected) == (0, 1)
    assert "1 frame, but dataset.json names 2 channels" in (tmp_path / "rejected.csv").read_text()


def test_colours_that_are_not_the_named_channels_are_refused(tmp_path):
    """They were stored as one grey channel."""
    (tmp_path / "t").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(
        tmp_path / "t" / "c0_0000.png"
    )
    described = {"channel_names": {"0": "A", "1": "B"}, "training": [{"image": "c0_0000.png"}]}
    (tmp_path / "t" / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    prepare(PrepareOptions((str(tmp_path / "t"),), str(tmp_path / "s.h5"), workers=0))
    assert "3 colours, but dataset.json names 2 channels" in (tmp_path / "rejected.csv").read_text()


def test_a_missing_mask_is_said_in_a_sentence(scans, tmp_path):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    (tmp_path / "l.csv").write_text("path,mask\na.nii.gz,m.nii.gz\n", encoding="utf-8")
    line = "1 scan refused, as the masks listed for them do not exist: m.nii.gz of a.nii.gz"
    assert f"l.csv: {line}" in find([tmp_path / "l.csv"], Wanted()).notes
    (tmp_path / "l.csv").unlink()
    described = {"training": [{"image": "a.nii.gz", "label": "m.nii.gz"}]}
    (tmp_path / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    assert f"dataset.json: {line}" in find([tmp_path], Wanted()).notes


def test_folders_of_bids_that_hold_no_raw_scans(scans, tmp_path):
    scans.nifti(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz", scans.body())
    scans.nifti(tmp_path / "derivatives" / "fmriprep" / "sub-01_desc-preproc_T1w.nii.gz", scans.body())
    for folder in ("stimuli", "sourcedata", "code"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.arange(400, dtype=np.uint8).reshape(20, 20)).save(tmp_path / folder / "x.png")
    found = find([tmp_path], Wanted())
    assert [scan.subject for scan in found.scans] == ["sub-01"]
    assert dict(found.left_out) == {
        name: f"in {name.split('/')[0]}/ of a BIDS data set, which holds no raw scans"
        for name in (
            "code/x.png",
            "derivatives/fmriprep/sub-01_desc-preproc_T1w.nii.gz",
            "sourcedata/x.png",
            "stimuli/x.png",
        )
    }


def test_all_that_is_left_out_is_counted_named_and_listed(scans, tmp_path, capsys):
    root, out = tmp_path / "d", tmp_path / "s.h5"
    scans.nifti(root / "a.nii.gz", scans.body())
    scans.nifti(root / "a_seg.nii.gz", np.ones((12, 14, 16), np.uint8))
    few = np.tile(np.arange(4, dtype=np.int16), 12 * 14 * 4).reshape(12, 14, 16)
    scans.nifti(root / "parcels.nii.gz", few)
    (root / "b.xyz").write_bytes(b"1")
    (root / "c").write_bytes(b"1")
    (root / "notes.txt").write_text("no scan", encoding="utf-8")
    options = PrepareOptions((str(root),), str(out), workers=0)
    lines = []
    for _ in range(2):  # the second call finds the store
        assert prepare(options).volumes == 1
        lines.append(capsys.readouterr().out.splitlines()[-1])
        listed = (tmp_path / "left_out.csv").read_text(encoding="utf-8").splitlines()[1:]
        assert sorted(line.split(",")[0] for line in listed) == [
            "a_seg.nii.gz",
            "b.xyz",
            "c",
            "parcels.nii.gz",
        ]
    assert lines[0] == lines[1]
    assert lines[0].startswith("found and not used: 4 files, see left_out.csv: ")
    for part in ("a label map of no scan (1: a_seg.nii.gz)", "files named *.xyz are not read (1: b.xyz)",
                 "no ending, and not DICOM (1: c)",
                 "its values are those of a label map (1: parcels.nii.gz)"):  # fmt: skip
        assert part in lines[0]
    assert [scan.source for scan in find([tmp_path / "d"], Wanted()).scans] == [
        "a.nii.gz",
        "parcels.nii.gz",
    ]


def test_headers_and_their_voxels_are_used_both(scans, tmp_path):
    scans.itk(tmp_path / "a.mhd", scans.body())
    scans.nifti(tmp_path / "b.nii", scans.body())
    assert not find([tmp_path], Wanted()).left_out


def test_what_is_found_twice_is_said(scans, tmp_path):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    found = find([tmp_path, tmp_path / "a.nii.gz"], Wanted())
    assert len(found.scans) == 1
    assert "1 scan found twice, taken once: a.nii.gz" in found.notes


def test_channels_and_masks_whose_names_have_dots(scans, tmp_path):
    for person in ("p1", "p2"):
        for channel in ("t1", "t1.post"):
            scans.nifti(tmp_path / f"{person}_{channel}.nii.gz", scans.body(seed=len(person + channel)))
        scans.nifti(tmp_path / f"{person}_tumour.v2.nii.gz", np.ones((12, 14, 16), np.uint8))
    found = find([tmp_path], Wanted(channels=("t1", "t1.post"), masks="tumour.v2"))
    assert [scan.subject for scan in found.scans] == ["p1", "p2"]
    for scan in found.scans:
        assert [path.name for (path,) in scan.files] == [
            f"{scan.subject}_t1.nii.gz", f"{scan.subject}_t1.post.nii.gz"
        ]  # fmt: skip
        assert scan.mask is not None
        assert scan.mask.name == f"{scan.subject}_tumour.v2.nii.gz"


def test_every_folder_is_visited_once(scans, tmp_path):
    """Nine folders that link to each other have 9! paths through them."""
    for i in range(9):
        (tmp_path / f"f{i}").mkdir()
        for k in range(9):
            if i != k:
                (tmp_path / f"f{i}" / f"l{k}").symlink_to(f"../f{k}")
        (tmp_path / f"f{i}" / "x.txt").write_text("", encoding="utf-8")
    files = list(walk(tmp_path))
    assert len(files) == len({path.resolve() for path in files}) == 9


def test_a_tree_deeper_than_functions_may_call_each_other(scans, tmp_path):
    folder = top = tmp_path / "top"
    folder.mkdir()
    for _ in range(1100):
        folder = folder / "d"
        folder.mkdir()
    scans.nifti(folder / "x.nii.gz", scans.body())
    found = find([top], Wanted())
    subprocess.run(["rm", "-r", str(top)], check=True)  # shutil.rmtree cannot
    assert [scan.subject for scan in found.scans] == ["x"]


def test_pipes_are_never_opened(scans, tmp_path):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    os.mkfifo(tmp_path / "b.nii.gz")
    os.mkfifo(tmp_path / "c")
    assert len(find([tmp_path], Wanted()).scans) == 1
