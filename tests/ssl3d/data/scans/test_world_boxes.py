"""MONAI's detection lists (LUNA16) in `ssl3d prepare`: boxes in mm become boxes in voxels."""

import json

import nibabel
import numpy as np
import pytest

from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.boxes import from_world
from ssl3d.errors import DataError


def scan(path, codes="LPS", spacing=(0.8, 0.9, 2.0), box=(6, 9, 7, 12, 14, 11)):
    """A dark scan with a bright block, stored along `codes`; returns its centre and size, RAS mm."""
    rng = np.random.default_rng(0)
    voxels = rng.normal(0, 1, (30, 28, 20)).astype(np.float32)
    cut = tuple(slice(a, b) for a, b in zip(box[:3], box[3:], strict=True))
    voxels[cut] = 60.0
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-40.0, 25.0, 100.0)
    for axis, (letter, positive) in enumerate(zip(codes, "RAS", strict=True)):
        if letter != positive:
            affine[axis, axis] *= -1
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    low = (affine @ [*(np.array(box[:3]) - 0.5), 1])[:3]
    high = (affine @ [*(np.array(box[3:]) - 0.5), 1])[:3]
    return [*((low + high) / 2), *np.abs(high - low)]


def lps(box):
    return [-box[0], -box[1], *box[2:]]


def listed(root, entries, name="dataset_fold0.json", **more):
    (root / name).write_text(json.dumps({"training": entries, **more}), encoding="utf-8")


def made(tmp_path, root, **options):
    prepare(PrepareOptions((str(root),), str(tmp_path / "s.h5"), workers=0, **options))
    return open_data([tmp_path / "s.h5"])


def brightest(volume):
    image = volume.read()[0]
    where = (image > image.max() / 2).nonzero()
    return [*where.amin(0).tolist(), *(where.amax(0) + 1).tolist()]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "RPI"])
@pytest.mark.parametrize("spacing", [(), (1.0, 1.0, 1.0)], ids=["stored", "resampled"])
@pytest.mark.parametrize("crop", [False, True])
def test_boxes_in_mm_are_where_the_object_is(codes, spacing, crop, tmp_path):
    root = tmp_path / "luna"
    box = scan(root / "1.3.6" / "1.3.6.nii.gz", codes)
    listed(root, [{"image": "1.3.6/1.3.6.nii.gz", "box": [lps(box)], "label": [0]}])
    options = {"crop_foreground": crop} | ({"spacing": spacing} if spacing else {})
    volume = made(tmp_path, root, **options)[0]
    away = volume.boxes[0] - brightest(volume)
    # Interpolated edges are where half the brightness is: both nearer to the middle, up to a voxel.
    assert np.abs(away).max() <= (1.0 if spacing else 1e-3)
    assert np.abs(away[:3] + away[3:]).max() <= (1.0 if spacing else 1e-3)
    assert volume.box_labels.tolist() == [0]


def test_the_file_may_say_ras_and_name_its_classes(tmp_path):
    root = tmp_path / "d"
    box = scan(root / "a.nii.gz")
    listed(root, [{"image": "a.nii.gz", "box": [box], "label": [2]}], space="RAS", labels={"2": "nodule"})
    data = made(tmp_path, root)
    np.testing.assert_allclose(data[0].boxes[0], brightest(data[0]), atol=1e-3)
    assert data.settings[0]["box_labels"] == {"d": {"2": "nodule"}}


def test_scans_without_boxes_are_not_scans_nobody_looked_at(tmp_path):
    root = tmp_path / "d"
    box = scan(root / "a.nii.gz")
    scan(root / "b.nii.gz", box=(1, 1, 1, 4, 4, 4))
    scan(root / "c.nii.gz", box=(2, 2, 2, 4, 4, 4))
    entries = [
        {"image": "a.nii.gz", "box": [lps(box), [500, 500, 500, 5, 5, 5]]},
        {"image": "b.nii.gz", "box": []},
    ]
    listed(root, entries)
    volumes = {volume.id.rpartition("/")[2]: volume for volume in made(tmp_path, root)}
    assert [None if v.boxes is None else len(v.boxes) for _, v in sorted(volumes.items())] == [1, 0, None]


def test_luna16s_csv(tmp_path):
    root = tmp_path / "luna"
    box = scan(
        root / "subset0" / "1.3.6.1.4.860.nii.gz", spacing=(0.8, 0.8, 0.8), box=(6, 9, 7, 12, 15, 13)
    )
    scan(root / "subset0" / "1.3.6.1.4.861.nii.gz", box=(1, 1, 1, 4, 4, 4))
    scan(root / "subset1" / "1.3.6.1.4.862.nii.gz", box=(2, 2, 2, 4, 4, 4))
    lines = ["seriesuid,coordX,coordY,coordZ,diameter_mm"]
    lines += [f"1.3.6.1.4.860,{-box[0]},{-box[1]},{box[2]},{box[3]}", "1.3.6.1.4.861,,,,"]
    (root / "annotations.csv").write_text("\n".join(lines) + "\n")
    found = {volume.id.removesuffix(".nii.gz")[-3:]: volume.boxes for volume in made(tmp_path, root)}
    volume = next(volume for volume in open_data([tmp_path / "s.h5"]) if "860" in volume.id)
    np.testing.assert_allclose(found["860"], [brightest(volume)], atol=1e-3)
    assert len(found["861"]) == 0 and found["862"] is None


def test_a_csv_of_centres_and_sizes(tmp_path):
    root = tmp_path / "d"
    box = scan(root / "a.nii.gz", "RPI")
    head = "path,label,score,x_mm,y_mm,z_mm,w_mm,h_mm,d_mm\n"  # as predictions are written
    rows = [["a", "tumour", 0.5, *box], ["a", "tumour", 0.1, *box[:3], 0, 1, 1]]
    (root / "boxes.csv").write_text(head + "".join(",".join(map(str, row)) + "\n" for row in rows))
    data = made(tmp_path, root)
    np.testing.assert_allclose(data[0].boxes, [brightest(data[0])], atol=1e-3)
    assert data.settings[0]["box_labels"] == {"d": {"1": "tumour"}}
    (root / "boxes.csv").write_text(head + "a,tumour,1,1,2,three,4,5,6\n")
    with pytest.raises(DataError, match="line 2: 1, 2, three, 4, 5, 6 are not numbers"):
        made(tmp_path / "b", root)


def test_corners_of_volumes_say_what_to_write_instead(tmp_path):
    root = tmp_path / "d"
    scan(root / "a.nii.gz")
    (root / "b.csv").write_text("path,x_min,y_min,z_min,x_max,y_max,z_max\na.nii.gz,1,2,3,4,5,6\n")
    with pytest.raises(DataError, match="corners along z too; boxes in volumes are listed in mm"):
        made(tmp_path, root)


def test_corners_on_turned_axes():
    """A scan at 1 mm with z along D, x along H, y along W: 2 x 4 x 6 mm are sides 6, 2, 4."""
    affine = np.array([[0, 1.0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    found = from_world(np.array([[10.0, 20, 30, 2, 4, 6]]), affine)
    np.testing.assert_allclose(found, [[27.5, 9.5, 18.5, 33.5, 11.5, 22.5]])


@pytest.mark.parametrize(
    "entry, more, message",
    [
        ({"box": [[1, 2, 3]]}, {}, "not as MONAI has it"),
        ({"box": [[1, 2, 3, 4, 5, 6]], "label": [0, 1]}, {}, "1 boxes and 2 labels"),
        ({"box": [[1, 2, 3, 4, 5, 6]]}, {"space": "voxel"}, "LPS or RAS"),
        (
            {"box": [[1, 2, 3, 4, 5, 6]]},
            {"validation": [{"image": "a.nii.gz", "box": []}]},
            "listed twice, with different boxes",
        ),
    ],
)
def test_bad_lists_are_named(entry, more, message, tmp_path):
    root = tmp_path / "d"
    scan(root / "a.nii.gz")
    listed(root, [{"image": "a.nii.gz", **entry}], **more)
    with pytest.raises(DataError, match=message):
        made(tmp_path, root)
