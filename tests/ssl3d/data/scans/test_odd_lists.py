"""Lists with odd values in odd places are read or refused by the errors of the house, seeded."""

from __future__ import annotations

import json
import random

import pytest

from ssl3d.data.preparation import keys
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.errors import DataError, Ssl3dError

ODD = [None, True, -1, 1.5, float("nan"), float("inf"), 10**30, "", "x", "a.nii.gz", "\0", "\ud800",
       "x" * 400,
       [], [[]], {}, {"a": 1}, ["a.nii.gz"], [1, 2], "folder", ".", "\u00b2", "1_0", "\u2028"]  # fmt: skip
COLUMNS = ["subject", "label", "split", "mask", "image_id", "x_min", "y_min", "x_max", "y_max", "class_id"]


def described():
    image = {"id": 1, "file_name": "a.nii.gz", "width": 3, "height": 3}
    return {
        "name": "T",
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "x": [1, 2], "ignore": 3},
        "regions_class_order": [1],
        "training": [{"image": "a.nii.gz", "label": "b.nii.gz"}, {"image": ["a.nii.gz"], "box": [[1] * 6]}],
        "validation": ["b.nii.gz"],
        "dataset": {"k": {"images": ["b.nii.gz"], "label": "a.nii.gz"}},
        "images": [image],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
        "categories": [{"id": 1, "name": "n"}],
    }


def changed(value, rng):
    if rng.random() < 0.12:
        return rng.choice(ODD)
    if isinstance(value, dict):
        kept = {key: changed(own, rng) for key, own in value.items() if rng.random() > 0.1}
        return kept | ({str(rng.choice(ODD)): rng.choice(ODD)} if rng.random() < 0.1 else {})
    return [changed(own, rng) for own in value] if isinstance(value, list) else value


def table(rng):
    columns = ["path", *rng.sample(COLUMNS, rng.randint(0, 8))]
    cells = ["a.nii.gz", "b.nii.gz", "train", "1", *ODD]
    lines = [",".join(str(rng.choice(cells)) for _ in columns) for _ in range(rng.randint(0, 5))]
    return "\n".join([",".join(columns), *lines]).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("name", ["dataset.json", "dataset_0.json", "instances.json", "l.csv"])
def test_odd_lists_are_read_or_refused(scans, tmp_path, name):
    for scan in ("a", "b", "folder/c"):
        scans.nifti(tmp_path / f"{scan}.nii.gz", scans.body((4, 4, 4)))
    rng = random.Random(name)
    path, seen = tmp_path / name, set()
    for _ in range(50):
        odd = json.dumps(changed(described(), rng)).encode("utf-8", "surrogatepass")
        path.write_bytes(table(rng) if name == "l.csv" else odd)
        for source in (tmp_path, path) if name in ("dataset.json", "l.csv") else (tmp_path,):
            try:
                seen.add(bool(find([source], Wanted()).scans))
                keys.state_of(source)
            except Ssl3dError as error:
                seen.add(type(error))
                assert "\n" not in str(error)
    assert True in seen


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_a_dataset_json_is_read_in_the_encodings_of_lists(scans, tmp_path, encoding):
    scans.nifti(tmp_path / "imagesTr" / "a.nii.gz", scans.body())
    described = {"name": "Müller", "training": ["./imagesTr/a.nii.gz"]}
    content = json.dumps(described, ensure_ascii=False).encode(encoding)
    (tmp_path / "dataset.json").write_bytes(content)
    (found,) = find([tmp_path], Wanted()).scans
    assert found.dataset == "Müller"


@pytest.fixture
def people(scans, tmp_path):
    for subject in ("01", "02", "03"):
        scans.nifti(tmp_path / f"sub-{subject}" / "anat" / f"sub-{subject}_T1w.nii.gz", scans.body())
    rows = [
        "participant_id\tage\tgroup",
        "sub-01\t31\tpatient",
        "02\t40\tcontrol",
        "sub-03\tn/a\tn/a",
        "\t1\t2",
    ]
    (tmp_path / "participants.tsv").write_text("\n".join(rows), encoding="utf-8")
    return tmp_path


def test_the_table_of_people_of_bids_gives_labels_where_asked_for(people):
    found = find([people], Wanted(label="group"))
    assert {scan.subject: scan.label for scan in found.scans} == {
        "sub-01": "patient", "sub-02": "control", "sub-03": None
    }  # fmt: skip
    assert "participants.tsv: labels of 2 of 3 scans from its column group" in found.notes
    assert [scan.label for scan in find([people], Wanted(label="Age")).scans] == [31, 40, None]
    with pytest.raises(DataError, match="--label site: no scan has a label by it"):
        find([people], Wanted(label="site"))


def test_the_table_of_people_of_bids_is_told_where_it_is_not_used(people):
    found = find([people], Wanted())
    assert "participants.tsv: columns not used: age, group; --label NAME takes one as labels" in found.notes
    assert all(scan.label is None for scan in found.scans)


def test_two_labels_of_a_subject_are_refused(people):
    with (people / "participants.tsv").open("a", encoding="utf-8") as file:
        file.write("\nsub-01\t32\tpatient\n")
    assert find([people], Wanted(label="group")).scans[0].label == "patient"
    with pytest.raises(DataError, match="line 6: a second age of 01"):
        find([people], Wanted(label="age"))
