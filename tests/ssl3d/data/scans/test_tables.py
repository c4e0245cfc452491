"""Cells mean the same in every column; lists of any size and shape are read, or refused in one line."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.data.scans.tables import cell, number, read_json, read_table
from ssl3d.errors import DataError

MISSING = ("n/a", "NA", "nan", "NaN", "null", "None", "-", "", " ", "#N/A", "<NA>")


@pytest.mark.parametrize("word", MISSING)
def test_a_cell_that_says_nothing_is_empty_in_every_column(scans, tmp_path, word):
    for i in range(2):
        scans.nifti(tmp_path / f"s{i}.nii.gz", scans.body(seed=i))
        scans.nifti(tmp_path / f"m{i}.nii.gz", (scans.body(seed=i) > 100).astype(np.uint8))
    (tmp_path / "l.tsv").write_text(
        f"path\tsubject\tlabel\tmask\tsplit\ns0.nii.gz\tp0\t1\tm0.nii.gz\ttrain\n"
        f"s1.nii.gz\t{word}\t{word}\t{word}\t{word}\n",
        encoding="utf-8",
    )
    found = find([tmp_path / "l.tsv"], Wanted())
    rows = [(scan.subject, scan.label, scan.mask is not None, scan.split) for scan in found.scans]
    assert rows == [("p0", 1, True, "train"), ("s1", None, False, "")]
    assert not found.rejected


def test_two_people_without_a_name_are_not_one(scans, tmp_path):
    for i in range(3):
        scans.nifti(tmp_path / f"s{i}.nii.gz", scans.body(seed=i))
    lines = "".join(f"s{i}.nii.gz,n/a\n" for i in range(3))
    (tmp_path / "l.csv").write_text("path,subject\n" + lines, encoding="utf-8")
    assert len({scan.subject for scan in find([tmp_path / "l.csv"], Wanted()).scans}) == 3


def test_subjects_keep_their_zeros(scans, tmp_path):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    scans.nifti(tmp_path / "b.nii.gz", scans.body(seed=1))
    (tmp_path / "l.csv").write_text("path,subject\na.nii.gz,007\nb.nii.gz,7\n", encoding="utf-8")
    assert [scan.subject for scan in find([tmp_path / "l.csv"], Wanted()).scans] == ["007", "7"]


def test_cells_of_arrays_are_read_alike(tmp_path):
    rows = np.random.default_rng(0).random((3, 8, 8)).astype(np.float32)
    np.savez(
        tmp_path / "a.npz", images=rows, patient=["p1", "n/a", "nan"], label=["x", "NA", "none"],
        split=["train", "n/a", ""],
    )  # fmt: skip
    found = find([tmp_path / "a.npz"], Wanted()).scans
    assert [(scan.subject, scan.label, scan.split) for scan in found] == [
        ("p1", "x", "train"), ("00001", None, ""), ("00002", None, ""),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["1_0", "0x10", "inf", "Infinity", "1e400", "\u0661", "1 0", "", "--1"])
def test_words_are_no_numbers(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("text", "value"), [("10", 10), ("-0.5", -0.5), (".5", 0.5), ("+2e3", 2000), ("3.", 3)]
)
def test_numbers_are_those_of_the_csv_of_spreadsheets(text, value):
    assert number(text) == value


def test_a_giant_cell_costs_its_line_alone(tmp_path):
    (tmp_path / "l.csv").write_text("path,note\na," + "y" * 300_000 + "\nb,c\n", encoding="utf-8")
    limit = csv.field_size_limit()
    table = read_table(tmp_path / "l.csv")
    assert [row["path"] for _, row in table.rows] == ["a", "b"]
    assert csv.field_size_limit() == limit
    (tmp_path / "l.csv").write_text("path," + "y" * 300_000 + "\na,1\n", encoding="utf-8")
    assert [row["path"] for _, row in read_table(tmp_path / "l.csv").rows] == ["a"]


def test_a_line_is_cut_where_a_csv_cuts_it(tmp_path):
    """str.splitlines cuts at a file separator, a form feed and U+2028 too."""
    names = ["a\x1cb", "c\x0cd", "e\u2028f", "g\nh"]
    with open(tmp_path / "l.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *([name, 1] for name in names)])
    assert [row["path"] for _, row in read_table(tmp_path / "l.csv").rows] == names


@pytest.mark.parametrize("column", ["path", "mask"])
def test_names_longer_than_any_file_cost_their_line(scans, tmp_path, column):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    scans.nifti(tmp_path / "b.nii.gz", scans.body(seed=1))
    long = "x" * 300 + ".nii.gz"
    line = f"{long}," if column == "path" else f"b.nii.gz,{long}"
    (tmp_path / "l.csv").write_text(f"path,mask\n{line}\na.nii.gz,\n", encoding="utf-8")
    found = find([tmp_path / "l.csv"], Wanted())
    assert [scan.source for scan in found.scans] == ["a.nii.gz"]
    assert len(found.rejected) == 1
    beside = find([tmp_path], Wanted())
    assert len(beside.scans) == 2
    assert any("1 line not used" in note for note in beside.notes)
    (tmp_path / "l.csv").unlink()
    entries = [{"image": long if column == "path" else "b.nii.gz", "label": long}, {"image": "a.nii.gz"}]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}), encoding="utf-8")
    found = find([tmp_path], Wanted())
    assert [scan.source for scan in found.scans] == ["a.nii.gz"]
    assert len(found.rejected) == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{,}", "\ud800"])
def test_json_of_no_list_is_one_line(scans, tmp_path, text):
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    content = text.encode("utf-8", "surrogatepass")
    (tmp_path / "dataset_0.json").write_bytes(content)
    found = find([tmp_path], Wanted())
    assert len(found.scans) == 1
    assert any("dataset_0.json: not JSON" in note and "not used" in note for note in found.notes)
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=r"dataset\.json: not JSON"):
        find([tmp_path], Wanted())


def test_json_larger_than_any_list_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**30 + 1)  # sparse: it takes no room
    with pytest.raises(DataError, match="bytes of JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("damage", ["latin-1", "comma", "dead link"])
def test_the_description_of_a_bids_tree_is_no_list(scans, tmp_path, damage):
    scans.nifti(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz", scans.body())
    path = tmp_path / "dataset_description.json"
    if damage == "latin-1":
        path.write_bytes('{"Name": "Müller"}'.encode("latin-1"))
    elif damage == "comma":
        path.write_text('{"Name": "x",}', encoding="utf-8")
    else:
        path.symlink_to("/nowhere")
    found = find([tmp_path], Wanted())
    assert len(found.scans) == 1
    assert not found.notes


def test_boxes_take_the_same_cells(scans, tmp_path):
    from PIL import Image

    for name in "ab":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24), np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    (tmp_path / "boxes.csv").write_text(
        "image_id,class_name,x_min,y_min,x_max,y_max\na,nodule,1,2,5,6\nb,n/a,n/a,NA,nan,-\n",
        encoding="utf-8",
    )
    found = find([tmp_path], Wanted())
    assert [scan.boxes for scan in found.scans] == [((0.0, 2.0, 1.0, 1.0, 6.0, 5.0, 1.0),), ()]
    (tmp_path / "boxes.csv").write_text(
        "image_id,class_name,x_min,y_min,x_max,y_max\na,nodule,1_0,2,5,6\n", encoding="utf-8"
    )
    with pytest.raises(DataError, match="1_0, 2, 5, 6 are not four numbers"):
        find([tmp_path], Wanted())


def test_a_cell_is_read_as_its_kind():
    assert [cell(word) for word in MISSING] == [""] * len(MISSING)
    assert [cell(word) for word in ("nano", "n", "0", "--")] == ["nano", "n", "0", "--"]
