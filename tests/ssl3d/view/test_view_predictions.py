"""Pages of predictions: the worst first, by the scores that fine-tuning has, beside the truth."""

import csv
import json
import re

import nibabel
import numpy as np
import pytest

from ssl3d.api import open_data, save_segmentation
from ssl3d.cli import main
from ssl3d.data.identity import source_hash
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.detection.files import describe_boxes

SHAPE = (8, 12, 10)
AXES = np.array([[0, 0, 1.0, -5], [0, 1.2, 0, 7], [2.0, 0, 0, 3], [0, 0, 0, 1]])
"""Affine of stored volumes, (d, h, w) to RAS+ mm."""
FILE = np.array([[-1.0, 0, 0, 4], [0, -1.2, 0, 20.2], [0, 0, 2.0, 3], [0, 0, 0, 1]])
"""Affine of the files, whose i and j run to the left and to posterior."""


def a_store(folder, count=6, settings=None, each=lambda k: {}, **changes):
    """Scans whose masks have the classes 1 and 4, and labels and boxes of their own."""
    parts = folder / "s.partial"
    for k in range(count):
        rng = np.random.default_rng(k)
        mask = np.zeros(SHAPE, np.uint8)
        mask[2:6, 3:8, 2:6] = 1
        mask[3:7, 8:11, 5:9] = 4
        record = Record(
            id=f"set/v{k}", dataset="set", subject=f"p{k}", label=("ill", "well")[k % 2], orientation="SAR",
            affine=AXES, spacing=(2.0, 1.2, 1.0), original_affine=FILE, original_shape=SHAPE[::-1],
            source=f"v{k}.nii.gz", **changes, **each(k),
        )  # fmt: skip
        boxes = np.array([[2, 3, 2, 6, 8, 6], [3, 8, 5, 7, 11, 9]], np.float32)
        image = rng.normal(size=(1, *SHAPE)).astype(np.float32)
        write_part(parts, f"v{k}", record, image, mask=mask, boxes=boxes, box_labels=np.zeros(2, np.int64))
    assemble(parts, folder / "s.h5", settings or {}, [])
    return folder / "s.h5"


def tabled(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def noted(folder, **changes):
    about = {"models": [], "task": "finetune", "labels": {}, "data": [], "of_training_subjects": 0}
    (folder / "predict.json").write_text(json.dumps({**about, **changes}))


def predicted_masks(folder, store):
    """Masks as `ssl3d predict` writes them, on the files' own grids, each wrong in its own way."""
    folder.mkdir()
    data = open_data([store])
    rows = []
    for k, volume in enumerate(data):
        mask = volume.read_mask().numpy()
        wrong = np.random.default_rng(k + 10).random(SHAPE) < 0.07 * ((k * 3) % 7)
        mask = np.where(wrong, 0, mask)
        assert save_segmentation(volume.record, mask, folder / f"v{k}.nii.gz")
        rows.append(["set", f"p{k}", f"set/v{k}", f"v{k}.nii.gz", f"v{k}.nii.gz", 1, 2])
    tabled(
        folder / "predictions.csv",
        ["dataset", "subject", "id", "source", "file", "ml of bright", "ml of dark"],
        rows,
    )
    noted(folder, labels={"0": "background", "1": "bright", "4": "dark"}, data=[str(store)])
    return folder


def dice_by_hand(folder, store):
    """Mean Dice of each scan, of the files alone, by nibabel and numpy."""
    values = {}
    for volume in open_data([store]):
        image = nibabel.load(folder / f"{volume.id.removeprefix('set/')}.nii.gz")
        assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
        mask = np.asarray(image.dataobj)[::-1, ::-1].T  # to right, anterior, superior; then D, H, W
        truth = volume.read_mask().numpy()
        each = [
            2 * ((mask == v) & (truth == v)).sum() / ((mask == v).sum() + (truth == v).sum())
            for v in (1, 4)
        ]
        values[volume.id] = float(np.mean(each))
    return values


def page(path, out, *words):
    assert main(["view", str(path), "--out", str(out), *words]) == 0
    return out.read_text(encoding="utf-8")


def cards(text):
    return re.findall(r"<h4>([^<]*)</h4>", text)


def test_masks_are_ordered_by_dice_recomputed_with_numpy(tmp_path):
    store = a_store(tmp_path)
    folder = predicted_masks(tmp_path / "out", store)
    dice = dice_by_hand(folder, store)
    text = page(folder, tmp_path / "p.html")
    assert cards(text) == sorted(dice, key=dice.get)
    orders = [float(value) for value in re.findall(r'<article[^>]* data-o0="([^"]*)"', text)]
    np.testing.assert_allclose(orders, sorted(dice.values()), rtol=1e-5)
    mean, median = np.mean(list(dice.values())), np.median(list(dice.values()))
    assert f"The mean Dice of 6 scans is {mean:.3f} (median {median:.3f})." in text
    for layer in ("scan", "truth", "prediction", "difference"):
        assert text.count(f'class="row" y="10">{layer}<') == 6
    bars = text[text.index("mean Dice over classes") - 9000 : text.index("Scans by mean Dice.")]
    assert sum(map(int, re.findall(r'text-anchor="middle">(\d+)</text>\s*(?=<rect|</svg>)', bars))) == 6


def test_voxels_that_nobody_annotated_count_for_nothing(tmp_path):
    store = a_store(tmp_path, settings={"mask_ignore": {"set": 4}})
    folder = predicted_masks(tmp_path / "out", store)
    noted(folder, labels={"0": "background", "1": "bright"}, data=[str(store)])
    for volume in open_data([store]):  # what lies where the truth is unknown is neither right nor wrong
        name = volume.id.removeprefix("set/")
        mask = volume.read_mask().numpy()
        save_segmentation(volume.record, np.where(mask == 4, 1, mask), folder / f"{name}.nii.gz")
    assert "The mean Dice of 6 scans is 1.000" in page(folder, tmp_path / "p.html")


def test_a_mask_that_is_missing_or_damaged_is_named(tmp_path):
    store = a_store(tmp_path)
    folder = predicted_masks(tmp_path / "out", store)
    (folder / "v1.nii.gz").unlink()
    (folder / "v2.nii.gz").write_bytes(b"nothing")
    text = page(folder, tmp_path / "p.html")
    assert set(cards(text)[:2]) == {"set/v1", "set/v2"} and "2 scans cannot be compared" in text
    assert "v1.nii.gz: no such file" in text and text.count('<svg class="slices"') == 4


def test_without_the_scans_the_page_asks_for_them(tmp_path):
    store = a_store(tmp_path)
    folder = predicted_masks(tmp_path / "out", store)
    for data, message in (([], "name them with --data"), (["gone.h5"], "The scans cannot be opened")):
        noted(folder, labels={"1": "bright", "4": "dark"}, data=data)
        text = page(folder, tmp_path / "p.html", "--overwrite")
        assert message in text and "bright 1.00 ml" in text and '<svg class="slices"' not in text
    text = page(folder, tmp_path / "p.html", "--overwrite", "--data", str(store))
    assert text.count('<svg class="slices"') == 6


def test_scans_that_are_not_those_predicted_are_told(tmp_path):
    folder = predicted_masks(tmp_path / "out", a_store(tmp_path))
    parts = tmp_path / "t.partial"
    image = np.random.default_rng(0).normal(size=(1, *SHAPE)).astype(np.float32)
    write_part(parts, "v0", Record(id="other/v0", dataset="other", subject="p0"), image)
    assemble(parts, tmp_path / "t.h5", {}, [])
    text = page(folder, tmp_path / "p.html", "--data", str(tmp_path / "t.h5"))
    assert "6 of 6 predicted scans are not among the data, such as set/v0 of data set set" in text
    assert "the data begin with other/v0 of data set other" in text
    assert "are not among the data" not in page(folder, tmp_path / "q.html")


def renamed(rows):
    """Rows of predictions under names of another folder, and their scans for `predict.json`."""
    scans = [{"dataset": "new", "subject": f"q{k}", "id": f"new/w{k}",
              "scan": source_hash(f"{k}", f"elsewhere/w{k}.nii.gz")} for k in range(len(rows))]  # fmt: skip
    return [[own["dataset"], own["subject"], *row[2:]] for own, row in zip(scans, rows, strict=True)], scans


def test_scans_of_other_names_are_found_by_the_content_of_their_files(tmp_path, capsys):
    store = a_store(tmp_path, settings={"mask_ignore": {"set": 4}}, each=lambda k: {"sha256": f"{k}"})
    folder = predicted_masks(tmp_path / "out", store)
    usual = re.sub("set/v", "new/w", page(folder, tmp_path / "p.html"))
    with (folder / "predictions.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    rows, scans = renamed(rows)
    tabled(
        folder / "predictions.csv", head, [[*row[:2], f"new/w{k}", *row[3:]] for k, row in enumerate(rows)]
    )
    about = {"labels": {"0": "background", "1": "bright", "4": "dark"}, "data": [str(store)]}
    noted(folder, **about)
    capsys.readouterr()
    assert "6 of 6 predicted scans are not among the data" in page(folder, tmp_path / "q.html")
    assert "6 of 6 predicted scans are not among the data" in capsys.readouterr().err
    noted(folder, **about, scans=scans)
    text = page(folder, tmp_path / "r.html")
    assert cards(text) == cards(usual) and "are not among the data" not in text
    assert re.findall("The mean Dice of [^<]*", text) == re.findall("The mean Dice of [^<]*", usual)
    noted(folder, **about, scans=[{**scans[0], "scan": ""}, *scans[1:]])  # a file that nobody hashed
    assert "1 of 6 predicted scans are not among the data" in page(folder, tmp_path / "s.html")


def test_subjects_of_other_names_are_found_by_the_content_of_their_files(tmp_path):
    store = a_store(tmp_path, each=lambda k: {"sha256": f"{k}"})
    folder = tmp_path / "out"
    folder.mkdir()
    rows, scans = renamed([["set", f"p{k}", 1, "ill", 0.9, 0.1] for k in range(6)])
    tabled(folder / "predictions.csv",
           ["dataset", "subject", "scans", "prediction", "probability of ill", "probability of well"],
           rows)  # fmt: skip
    noted(folder, data=[str(store)], scans=scans)
    text = page(folder, tmp_path / "p.html")
    assert "3 of 6 subjects are right (50.0%)" in text and "are not among the data" not in text


def test_classes_have_confusions_and_the_least_probable_truth_comes_first(tmp_path):
    store = a_store(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    shares = [0.9, 0.2, 0.4, 0.7, 0.6, 0.5001]  # of ill; the true classes take turns
    rows = [["set", f"p{k}", 1, "ill" if p > 0.5 else "well", p, 1 - p] for k, p in enumerate(shares)]
    tabled(folder / "predictions.csv",
           ["dataset", "subject", "scans", "prediction", "probability of ill", "probability of well"],
           rows)  # fmt: skip
    noted(folder, data=[str(store)])
    text = page(folder, tmp_path / "p.html")
    truth = [p if k % 2 == 0 else 1 - p for k, p in enumerate(shares)]
    assert cards(text) == [f"p{k}" for k in np.argsort(truth)]
    assert "3 of 6 subjects are right (50.0%)" in text and "Never predicted" not in text
    assert "are of subjects that a model was trained" not in text
    table = text[text.index("Confusions") :]
    counts = [int(n) for n in re.findall(r'<td class="n"[^>]*>(\d+)</td>', table)[:4]]
    assert counts == [2, 1, 2, 1]
    for row in rows:
        row[3] = "well"
    tabled(folder / "predictions.csv",
           ["dataset", "subject", "scans", "prediction", "probability of ill", "probability of well"],
           rows)  # fmt: skip
    noted(folder, data=[str(store)], predicted=6, of_training_subjects=2)
    text = page(folder, tmp_path / "q.html")
    assert "Never predicted: ill." in text and "2 of 6 volumes are of subjects that a model" in text


def test_values_are_ordered_by_their_error(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    tabled(folder / "predictions.csv", ["dataset", "subject", "scans", "prediction"],
           [["set", f"p{k}", 1, value] for k, value in enumerate((1.5, 9.0, 2.0))])  # fmt: skip
    noted(folder)
    parts = tmp_path / "t.partial"
    for k, value in enumerate((1.0, 2.5, 3.5)):
        image = np.random.default_rng(k).normal(size=(1, *SHAPE)).astype(np.float32)
        write_part(parts, f"v{k}", Record(id=f"v{k}", dataset="set", subject=f"p{k}", label=value), image)
    assemble(parts, tmp_path / "t.h5", {}, [])
    text = page(folder, tmp_path / "p.html", "--data", str(tmp_path / "t.h5"))
    assert cards(text) == ["p1", "p2", "p0"]
    assert f"The mean error of 3 subjects is {(0.5 + 6.5 + 1.5) / 3:.4g}." in text


def test_boxes_that_miss_come_first_and_others_are_mapped_to_the_scan(tmp_path):
    store = a_store(tmp_path, 3)
    folder = tmp_path / "out"
    folder.mkdir()
    data = open_data([store])
    for k, volume in enumerate(data):
        truth = volume.boxes.astype(float)
        boxes = [truth, truth[:1], np.concatenate([truth, [[0, 0, 0, 1, 1, 1]]])][k]
        scores = np.linspace(0.9, 0.6, len(boxes))
        content = describe_boxes(volume, boxes, scores, np.zeros(len(boxes), int), ["lesion"])
        if k == 0:  # from a grid of half the voxel sides along D, as a scan that was resampled has it
            finer = np.array(volume.affine) @ np.diag([0.5, 1, 1, 1])
            finer[:3, 3] -= np.array(volume.affine)[:3, 0] * 0.25
            content["affine"] = finer.tolist()
            for row in content["boxes"]:
                row["voxels"][0] *= 2
                row["voxels"][3] *= 2
        (folder / f"v{k}.json").write_text(json.dumps(content))
    (folder / "boxes.json").write_text("{}")
    tabled(folder / "predictions.csv", ["id", "label", "score", "x_mm"], [["set/v0", "lesion", 0.9, 0]])
    noted(folder, data=[str(store)])
    text = page(folder, tmp_path / "p.html")
    assert cards(text) == ["set/v1", "set/v2", "set/v0"]
    assert "5 of 6 objects in 3 scans are found" in text and "with 1 false alarm of" in text
    assert 'class="true"' in text and 'class="found"' in text and "lesion 0.90" in text
    strengths = re.findall(r'class="found"[^>]* opacity="([0-9.]+)"><title>lesion ([0-9.]+)<', text)
    assert strengths and all(opacity == score for opacity, score in strengths)


def test_names_in_predictions_are_text(tmp_path):
    evil = "<script>alert(1)</script>"
    store = a_store(tmp_path)
    folder = predicted_masks(tmp_path / "out", store)
    noted(folder, labels={"1": evil, "4": "dark"}, data=[str(store)], task=evil, citations={"a": evil},
          models=[{"folder": evil}], versions={evil: evil})  # fmt: skip
    (folder / "rejected.csv").write_text(f"path,reason\n{evil},{evil}\n")
    text = page(folder, tmp_path / "p.html")
    assert text.count("<script") == 1 and text.count("&lt;script&gt;alert(1)") > 6


@pytest.mark.parametrize("name", ["predict.json", "predictions.csv"])
def test_a_damaged_folder_is_one_line(tmp_path, capsys, name):
    folder = predicted_masks(tmp_path / "out", a_store(tmp_path))
    (folder / name).write_bytes(b"\xff\xfe[")
    assert main(["view", str(folder), "--out", str(tmp_path / "p.html")]) != 0
    assert f"{name}: cannot be read" in capsys.readouterr().err.strip().splitlines()[-1]
