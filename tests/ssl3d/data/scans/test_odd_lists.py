"""Lists with odd values in odd places are read or refused by the errors of the house, seeded."""

from __future__ import annotations

import json
import random

import pytest

from ssl3d.data.preparation import keys
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.errors import Ssl3dError

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
