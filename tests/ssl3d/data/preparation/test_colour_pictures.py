"""Natural images as volumes of three channels: every kind of file, classes, and what is stored of them."""

from __future__ import annotations

import csv

import h5py
import numpy as np
import pytest
from PIL import Image

from ssl3d.cli import main
from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.data.scans.read import read

RGB = Wanted(colour="rgb")


def colours(seed=0, size=(20, 24)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


def made(tmp_path, *sources, **options):
    given = {"colour": "rgb", "workers": 0} | options
    prepare(PrepareOptions(tuple(map(str, sources)), str(tmp_path / "s.h5"), **given))
    return open_data([tmp_path / "s.h5"])


def pixels_of(volume):
    return volume.read().numpy()[:, 0] * 255


def rejected(folder):
    with open(folder / "rejected.csv", encoding="utf-8", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def test_a_picture_is_three_channels_of_depth_one_with_the_very_bytes(tmp_path):
    values = colours()
    save(tmp_path / "p" / "a.png", values)
    (volume,) = made(tmp_path, tmp_path / "p")
    assert volume.shape == (3, 1, 20, 24)
    assert volume.record.channels == ("red", "green", "blue")
    np.testing.assert_allclose(pixels_of(volume), np.moveaxis(values, -1, 0), atol=1e-4)
    with h5py.File(tmp_path / "s.h5", "r", locking=False) as file:
        assert file["images/0"].dtype == np.uint8
        assert file.attrs["version"] == 2


def test_sizes_are_kept_and_crops_are_read_as_they_lie(tmp_path):
    values = {"a": colours(0, (33, 47)), "b": colours(1, (51, 30))}
    for name, picture in values.items():
        save(tmp_path / "p" / f"{name}.png", picture)
    for volume in made(tmp_path, tmp_path / "p"):
        picture = values[volume.subject]
        assert volume.shape == (3, 1, *picture.shape[:2])
        crop = volume.read((0, 5, 7), (1, 9, 11))[:, 0].numpy() * 255
        np.testing.assert_allclose(crop, np.moveaxis(picture[5:14, 7:18], -1, 0), atol=1e-4)


def test_no_picture_is_normalised_by_itself(tmp_path):
    # Dark, bright, with a channel that is nearly black or wholly: all on the one scale of bytes.
    dark = colours() // 8
    red = np.zeros((20, 24, 3), np.uint8)
    red[:10, :, 0] = 200
    red[3, 3, 1] = 1
    save(tmp_path / "p" / "dark.png", dark)
    save(tmp_path / "p" / "red.png", red)
    found = {volume.subject: pixels_of(volume) for volume in made(tmp_path, tmp_path / "p")}
    np.testing.assert_allclose(found["dark"], np.moveaxis(dark, -1, 0), atol=1e-4)
    np.testing.assert_allclose(found["red"], np.moveaxis(red, -1, 0), atol=1e-4)


def test_a_picture_of_one_colour_is_refused(tmp_path):
    save(tmp_path / "p" / "good.png", colours())
    save(tmp_path / "p" / "plain.png", np.full((20, 24, 3), 7, np.uint8))
    assert len(made(tmp_path, tmp_path / "p")) == 1
    assert "constant" in rejected(tmp_path)["plain.png"]


@pytest.mark.parametrize("mode", ["L", "1", "P", "PA", "LA", "RGBA", "CMYK", "YCbCr", "RGB"])
def test_every_mode_becomes_what_pillow_shows(tmp_path, mode):

    source = Image.fromarray(colours())
    if mode == "PA":
        picture = source.convert("P")
        picture.info["transparency"] = 3
    else:
        picture = source.convert(mode)
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    path = save(tmp_path / "p" / f"a.{suffix}", picture)
    with Image.open(path) as shown:
        expected = np.moveaxis(np.asarray(shown.convert("RGB")), -1, 0)
    (volume,) = made(tmp_path, tmp_path / "p")
    assert volume.shape == (3, 1, 20, 24)
    np.testing.assert_allclose(pixels_of(volume), expected, atol=1e-4)


def test_jpegs_and_cmyk_jpegs_too(tmp_path):
    smooth = Image.fromarray(colours()).resize((40, 32), Image.Resampling.BICUBIC)
    for name, mode in (("rgb", "RGB"), ("cmyk", "CMYK"), ("grey", "L")):
        save(tmp_path / "p" / f"{name}.jpg", smooth.convert(mode), quality=95)
    for volume in made(tmp_path, tmp_path / "p"):
        with Image.open(tmp_path / "p" / f"{volume.subject}.jpg") as shown:
            expected = np.moveaxis(np.asarray(shown.convert("RGB")), -1, 0)
        np.testing.assert_allclose(pixels_of(volume), expected, atol=1e-4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_says_how_it_is_to_be_looked_at(tmp_path, orientation):
    image = Image.fromarray(colours())
    exif = image.getexif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", image, exif=exif)
    upright = read([path]).voxels[:, 0]
    height, width = (20, 24) if orientation < 5 else (24, 20)
    assert upright.shape == (3, height, width)
    # What EXIF means, typed out: which corner of the file the upright picture's first row and column are.
    stored = np.moveaxis(colours(), -1, 0)
    turned = stored if orientation < 5 else stored.swapaxes(1, 2)
    vertical, horizontal = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1),
                            5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[orientation]  # fmt: skip
    np.testing.assert_array_equal(upright, turned[:, ::vertical, ::horizontal])


def test_folders_are_classes_and_every_picture_is_its_own_subject(tmp_path):
    # The same names in every class, as in many data sets, and a class that is called a mask.
    for kind in ("cat", "dog", "mask"):
        for i in range(3):
            save(tmp_path / "pets" / kind / f"{i}.png", colours(i))
    scans = find([tmp_path / "pets"], RGB).scans
    assert sorted({scan.label for scan in scans}) == ["cat", "dog", "mask"]
    assert len({scan.subject for scan in scans}) == 9


def test_one_picture_a_class_is_enough(tmp_path):
    for kind in ("cat", "dog"):
        save(tmp_path / "pets" / kind / "only.png", colours())
    assert {scan.label for scan in find([tmp_path / "pets"], RGB).scans} == {"cat", "dog"}


def test_train_and_val_folders_are_splits(tmp_path):
    for split in ("train", "val"):
        for kind in ("cat", "dog"):
            save(tmp_path / "in" / split / kind / "0.png", colours())
    found = {(scan.split, scan.label) for scan in find([tmp_path / "in"], RGB).scans}
    assert found == {(split, kind) for split in ("train", "val") for kind in ("cat", "dog")}


def test_a_list_says_class_subject_and_split(tmp_path):
    for name in "abc":
        save(tmp_path / "p" / f"{name}.jpg", colours())
    lines = ["path,class_index,subject,split", "a.jpg,7,me,train", "b.jpg,0,me,train", "c.jpg,7,you,val"]
    (tmp_path / "p" / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    data = made(tmp_path, tmp_path / "p" / "list.csv")
    assert data.labels.tolist() == [7, 0, 7]
    assert data.subjects.tolist() == ["me", "me", "you"]
    assert data.splits.tolist() == ["train", "train", "val"]


def test_a_broken_picture_is_set_aside_by_name(tmp_path, capsys):
    good = save(tmp_path / "p" / "good.jpg", colours(size=(64, 64)))
    (tmp_path / "p" / "cut.jpg").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "p" / "text.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "p" / "empty.png").write_bytes(b"")
    words = ["prepare", str(tmp_path / "p"), "--out", str(tmp_path / "s.h5"), "--colour", "rgb"]
    assert main([*words, "--workers", "0"]) == 0
    assert sorted(rejected(tmp_path)) == ["cut.jpg", "empty.png", "text.png"]
    assert "3 rejected" in capsys.readouterr().out


def test_without_the_option_pictures_are_grey_as_before(tmp_path):
    for kind in ("ill", "well"):
        for i in range(2):
            save(tmp_path / "x" / kind / f"{kind}{i}.png", colours(i))
    data = made(tmp_path, tmp_path / "x", colour="grey")
    assert {volume.shape for volume in data} == {(1, 1, 20, 24)}
    assert sorted(data.subjects) == ["ill0", "ill1", "well0", "well1"]
    with h5py.File(tmp_path / "s.h5", "r", locking=False) as file:
        assert file["images/0"].dtype == np.float16
        assert file.attrs["version"] == 1
    grey = np.asarray(Image.fromarray(colours(0)).convert("L"), np.float32)
    ill = next(volume for volume in data if volume.subject == "ill0")
    np.testing.assert_allclose(pixels_of(ill)[0], grey, atol=1.1)  # Pillow rounds its weights
