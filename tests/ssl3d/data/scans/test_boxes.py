"""Boxes in `ssl3d prepare`: COCO, CSV lists as VinDr-CXR's, around masks; what is left out, and why."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ssl3d.cli import main
from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.boxes import around_mask, merged
from ssl3d.errors import DataError


def picture(path, size=(20, 30), seed=0):
    """Height and width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, size, np.uint8)).save(path)


def made(tmp_path, *sources, **options):
    prepare(PrepareOptions(tuple(map(str, sources)), str(tmp_path / "s.h5"), workers=0, **options))
    data = open_data([tmp_path / "s.h5"])
    return data, {volume.id.partition("/")[2]: volume for volume in data}


def coco(path, annotations, images=("a.png", "b.png"), categories=({"id": 4, "name": "cat"},)):
    content = {
        "images": [
            {"id": n, "file_name": name, "width": 30, "height": 20} for n, name in enumerate(images)
        ],
        "annotations": [{"image_id": 0, "category_id": 4, **one} for one in annotations],
        "categories": list(categories),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_coco_boxes_are_stored_with_their_names_and_useless_ones_counted(tmp_path, capsys):
    root = tmp_path / "d"
    for name in "abc":
        picture(root / "images" / f"{name}.png")
    coco(
        root / "annotations" / "instances_train.json",
        [
            {"bbox": [2, 3, 10, 5]},
            {"bbox": [25, 15, 10, 10]},  # reaches out of the picture
            {"bbox": [0, 0, 9, 9], "iscrowd": 1},
            {"bbox": [5, 5, 0, 9]},
            {"bbox": [5, 5, -3, 9]},
            {"bbox": [40, 5, 3, 9]},
            {"bbox": [1, 1, float("nan"), 9]},
        ],
    )
    data, volumes = made(tmp_path, root)
    np.testing.assert_array_equal(volumes["images/a"].boxes, [[0, 3, 2, 1, 8, 12], [0, 15, 25, 1, 20, 30]])
    assert volumes["images/a"].box_labels.tolist() == [4, 4]
    assert volumes["images/b"].boxes.shape == (0, 6)  # named, and nothing in it
    assert volumes["images/c"].boxes is None  # nobody looked
    assert data.settings[0]["box_labels"] == {"d": {"4": "cat"}}
    told = capsys.readouterr().out
    assert "boxes of 2 of 3 pictures" in told
    for reason in (
        "1 left out: crowds",
        "2 left out: without area",
        "1 left out: outside",
        "1 left out: not fin",
    ):
        assert reason in told


@pytest.mark.parametrize(
    "annotations,message",
    [
        ([{"bbox": [1, 1, 5, 5], "category_id": 9}], "annotation 0 is of category 9, and the file lists 1"),
        ([{"bbox": [1, 1, 5]}], "not as COCO has it"),
        ([{"bbox": [1, 1, 5, "x"]}], "not as COCO has it"),
    ],
)
def test_a_damaged_coco_file_is_one_line(tmp_path, capsys, annotations, message):
    picture(tmp_path / "d" / "a.png")
    coco(tmp_path / "d" / "instances.json", annotations)
    assert main(["prepare", str(tmp_path / "d"), "--out", str(tmp_path / "s.h5")]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and "instances.json" in told and "\n" not in told


def test_pictures_of_one_name_in_two_folders_keep_their_own_boxes(tmp_path):
    for folder in ("x", "y"):
        picture(tmp_path / "d" / folder / "1.png")
    coco(
        tmp_path / "d" / "instances.json",
        [{"bbox": [1, 2, 5, 5]}, {"image_id": 1, "bbox": [7, 8, 4, 4]}],
        images=("x/1.png", "y/1.png"),
    )
    data, _ = made(tmp_path, tmp_path / "d")
    by_folder = {volume.id.split("/")[1]: volume.boxes[0, 1:3].tolist() for volume in data}
    assert by_folder == {"x": [2, 1], "y": [8, 7]}


HEADER = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"


def vindr(root, *lines, header=HEADER):
    for name in ("aa", "bb", "cc"):
        picture(root / "train" / f"{name}.png")
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "train.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return root


def test_vindr_lists_findings_and_no_finding(tmp_path):
    root = vindr(
        tmp_path / "d",
        "aa,Nodule/Mass,8,R1,2,3,12,8",
        "aa,Nodule/Mass,8,R2,4,3,14,8",  # the same one, by another reader
        "aa,Nodule/Mass,8,R2,20,10,28,18",
        "aa,Cardiomegaly,3,R1,2,3,12,8",
        "bb,No finding,14,R1,,,,",
    )
    data, volumes = made(tmp_path, root)
    a = volumes["train/aa"]
    rows = sorted(zip(a.box_labels.tolist(), a.boxes[:, [1, 2, 4, 5]].tolist(), strict=True))
    assert rows == [(3, [3, 2, 8, 12]), (8, [3, 3, 8, 13]), (8, [10, 20, 18, 28])]
    assert volumes["train/bb"].boxes.shape == (0, 6)
    assert volumes["train/cc"].boxes is None
    assert data.settings[0]["box_labels"] == {"d": {"8": "Nodule/Mass", "3": "Cardiomegaly"}}


def test_every_readers_box_is_kept_on_request(tmp_path):
    root = vindr(tmp_path / "d", "aa,Mass,8,R1,2,3,12,8", "aa,Mass,8,R2,4,3,14,8")
    _, volumes = made(tmp_path, root, box_readers="keep")
    assert len(volumes["train/aa"].boxes) == 2


def test_a_plain_list_of_boxes_numbers_its_classes(tmp_path):
    root = vindr(tmp_path / "d", "aa,2,3,12,8,dog", "bb,2,3,12,8,cat", header="image,x1,y1,x2,y2,class")
    data, volumes = made(tmp_path, root)
    assert [volumes[f"train/{n}"].box_labels.tolist() for n in ("aa", "bb")] == [[2], [1]]
    assert data.settings[0]["box_labels"] == {"d": {"1": "cat", "2": "dog"}}


@pytest.mark.parametrize(
    "line,message",
    [
        ("aa,Mass,8,R1,2,x,12,8", "train.csv, line 2: 2, x, 12, 8 are not four numbers"),
        ("aa,Mass,eight,R1,2,3,12,8", "class_id 'eight' is no whole number"),
        ("aa,Mass,8,R1,2,3,12,8\naa,Mass,9,R1,2,3,12,8", "class 'Mass' is 9, and 8 before"),
    ],
)
def test_a_damaged_list_is_one_line(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        made(tmp_path, vindr(tmp_path / "d", line))


def test_only_overlapping_boxes_of_different_readers_and_one_class_are_merged():
    def box(x, kind=1.0):
        return (0.0, 0.0, float(x), 1.0, 10.0, float(x + 10), kind)

    drawn = [("A", box(0)), ("B", box(2)), ("C", box(1)), ("A", box(3)), ("B", box(0, 2.0)), ("D", box(30))]
    found = sorted((b[2], b[6]) for b in merged(drawn))
    # A's second box begins one of its own; C's lies nearest to the mean of A's and B's.
    assert found == [(0.0, 2.0), (1.0, 1.0), (3.0, 1.0), (30.0, 1.0)]


def test_boxes_follow_a_cut_to_the_foreground(tmp_path):
    root = tmp_path / "d"
    root.mkdir()
    body = np.zeros((40, 50), np.uint8)
    body[10:30, 15:45] = np.random.default_rng(0).integers(100, 255, (20, 30))
    Image.fromarray(body).save(root / "a.png")
    coco(root / "instances.json", [{"bbox": [20, 12, 8, 6]}, {"bbox": [0, 0, 5, 5]}], images=("a.png",))
    _, volumes = made(tmp_path, root, crop_foreground=True)
    start = volumes["a"].record.done["crop"]["start"]
    np.testing.assert_array_equal(
        volumes["a"].boxes, [[0, 12 - start[1], 20 - start[2], 1, 18 - start[1], 28 - start[2]]]
    )
    assert volumes["a"].record.done["boxes"] == {"listed": 2, "outside": 1}


def test_boxes_of_pixels_listed_for_a_volume_are_refused(scans, tmp_path):
    scans.nifti(tmp_path / "d" / "a.nii.gz", scans.body((12, 14, 16)))
    picture(tmp_path / "d" / "b.png")
    coco(tmp_path / "d" / "instances.json", [{"bbox": [1, 1, 5, 5]}], images=("a.nii.gz", "b.png"))
    _, volumes = made(tmp_path, tmp_path / "d")
    assert list(volumes) == ["b"]
    assert "1 boxes are listed for it, and it is no picture" in (tmp_path / "rejected.csv").read_text()


def test_boxes_around_masks_follow_resampling_and_know_their_structure(scans, tmp_path):
    root = tmp_path / "t"
    body = scans.body((20, 22, 24))
    labels = np.zeros((20, 22, 24), np.uint8)
    labels[4:8, 6:12, 10:14] = 1
    labels[12:16, 6:10, 2:8] = 1
    labels[2:6, 16:20, 16:20] = 2
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    scans.nifti(root / "imagesTr" / "p_0000.nii.gz", body, affine)
    scans.nifti(root / "labelsTr" / "p.nii.gz", labels, affine)
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "lesion": 1, "node": 2},
        "name": "t",
    }
    (root / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    data, volumes = made(tmp_path, root, boxes="masks", spacing=(1.0, 1.0, 1.0))
    volume = volumes["p"]
    assert sorted(volume.box_labels.tolist()) == [1, 1, 2]
    assert data.settings[0]["box_labels"] == {"t": {"0": "background", "1": "lesion", "2": "node"}}
    for box, label in zip(volume.boxes.astype(int), volume.box_labels, strict=True):
        z1, y1, x1, z2, y2, x2 = box
        assert (z2 - z1, y2 - y1, x2 - x1) in ((8, 12, 8), (12, 8, 8), (8, 8, 8))
        inside = volume.read_mask((z1, y1, x1), (z2 - z1, y2 - y1, x2 - x1))
        assert (inside == int(label)).all()


def test_components_touch_by_corners_and_specks_have_no_box():
    mask = np.zeros((1, 12, 12), np.uint8)
    mask[0, 1:3, 1:3] = mask[0, 3:5, 3:5] = 1
    mask[0, 8, 8] = 1
    boxes, values = around_mask(mask)
    assert boxes.tolist() == [[0, 1, 1, 1, 5, 5]] and values.tolist() == [1]


@pytest.mark.parametrize("folder", [False, True])
def test_nodule_slices_have_a_box_per_nodule_and_none_where_nobody_outlined_it(tmp_path, folder):
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 16, 16), np.uint8)
    masks[0, 5:9, 6:12] = masks[1, 4:8, 4:8] = masks[3, 2:9, 3:8] = 1
    root = tmp_path / "scans"
    root.mkdir()
    np.savez(
        root / "nodule_slices.npz",
        images=rng.integers(0, 255, (4, 16, 16), dtype=np.uint8),
        masks_packed=np.packbits(masks.reshape(4, -1), axis=1),
        nodule=np.array([0, 0, 1, 1]),
        patient=np.array(["p", "q"]),
        malignancy=np.array([2.0, 3.5], np.float32),
        diameter_mm=np.array([8.0, 9.0], np.float32),
    )
    data, _ = made(tmp_path, root if folder else root / "nodule_slices.npz")
    assert data.subjects.tolist() == ["p", "p", "q", "q"]
    found = [None if volume.boxes is None else volume.boxes.tolist() for volume in data]
    assert found == [[[0, 5, 6, 1, 9, 12]], [[0, 4, 4, 1, 8, 8]], None, [[0, 2, 3, 1, 9, 8]]]
    assert data[0].box_labels.tolist() == [1]
    assert data.settings[0]["box_labels"] == {"nodule_slices": {"1": "nodule"}}
    assert data.has_mask.all()


def test_the_shared_coco_images_have_their_boxes(tmp_path):
    from pathlib import Path

    root = Path(__file__).parents[5] / "shared" / "data" / "coco"
    if not root.is_dir():
        pytest.skip("no ../shared/data/coco")
    data, _ = made(tmp_path, root)
    content = json.loads((root / "instances.json").read_text(encoding="utf-8"))
    assert len(data) == 48 and data.has_boxes.all()
    assert sum(len(volume.boxes) for volume in data) == len(content["annotations"])
    assert data.settings[0]["box_labels"]["coco"]["1"] == "person"
    for volume in data:
        assert (volume.boxes[:, 3:] <= np.array(volume.shape[1:]) + 1e-3).all()
