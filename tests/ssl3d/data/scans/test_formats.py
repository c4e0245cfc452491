"""The table of formats: the one place where the suffixes of scans stand, and what goes by it."""

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ssl3d.data
from ssl3d.data.geometry import UNKNOWN, unknown_affine
from ssl3d.data.open import open_data
from ssl3d.data.phantoms import phantom_store
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans import read as read_module
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.data.scans.read import (
    FORMATS,
    LISTS,
    STORES,
    Format,
    Pixels,
    header_spacing,
    read,
    suffix_of,
    without_suffix,
)
from ssl3d.errors import DataError

SUFFIXES = {suffix for form in FORMATS for suffix in form.suffixes}


def literals(tree):
    """Yield the strings of a module, less those within an f-string, which make names and test none."""
    inside = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node


def test_suffixes_of_scans_stand_in_the_table_alone():
    root = Path(ssl3d.data.__file__).parent
    elsewhere = [
        f"{path.relative_to(root)}:{node.lineno}: {node.value!r}"
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).as_posix() != "scans/read.py"
        for node in literals(ast.parse(path.read_text(encoding="utf-8")))
        if node.value.lower() in SUFFIXES | {*LISTS, *STORES}
    ]
    assert not elsewhere, "\n".join(elsewhere)


def test_no_suffix_is_that_of_two_formats():
    every = [suffix for form in FORMATS for suffix in form.suffixes] + [*LISTS, *STORES]
    assert len(every) == len(set(every))


@pytest.mark.parametrize("suffix", sorted(SUFFIXES | {".tif", ".tiff", ".bmp", ".dicom"}))
def test_scans_beside_shards_are_refused_and_never_left_out(tmp_path, suffix):
    phantom_store(1, shape=(16, 16, 16), folder=tmp_path)
    assert len(open_data([tmp_path])) == 1
    (tmp_path / f"a{suffix.upper()}").write_bytes(b"anything")
    with pytest.raises(DataError, match=r"holds stores \(.*\.h5\) and scans \(a\..*\); give them apart"):
        open_data([tmp_path])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"])
def test_pictures_of_every_suffix_are_found_and_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)).save(path)
    (scan,) = find([tmp_path], Wanted()).scans
    assert scan.files == ((path,),)
    assert read([path]).voxels.shape == (1, 1, 20, 30)
    assert header_spacing([path]) == (1.0, 1.0, 1.0)


def test_an_archive_of_rows_is_no_single_scan(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(DataError, match="an archive of arrays with a volume per row"):
        read([tmp_path / "a.npz"])


@pytest.mark.parametrize(
    ("name", "suffix", "bare"),
    [("d/a.NII.gz", ".nii.gz", "d/a"), ("a.b.png", ".png", "a.b"), ("d.x/a", "", "d.x/a")],
)
def test_suffixes_are_cut_off_whole(name, suffix, bare):
    assert suffix_of(Path(name)) == suffix
    assert without_suffix(name) == bare


def test_a_further_format_is_one_entry_of_the_table(scans, tmp_path, monkeypatch):
    def read_plain(files, max_voxels):
        return Pixels(np.load(files[0])[None], unknown_affine((3.0, 1.0, 1.0)), UNKNOWN, (4, 6, 8))

    form = Format("numpy", (".npy",), "volume", read_plain, lambda files: (3.0, 1.0, 1.0))
    monkeypatch.setitem(read_module._BY_SUFFIX, ".npy", form)
    (tmp_path / "d").mkdir()
    volume = np.arange(4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    np.save(tmp_path / "d" / "p1_t1.npy", volume)
    prepare(PrepareOptions((str(tmp_path / "d"),), str(tmp_path / "s.h5"), normalize="none", workers=0))
    (stored,) = open_data([tmp_path / "s.h5"])
    assert (stored.id, stored.subject) == ("d/p1_t1", "p1")
    np.testing.assert_array_equal(stored.read()[0].numpy(), volume)
    (tmp_path / "l.csv").write_text("path,label\nd/p1_t1.npy,1\n", encoding="utf-8")
    assert find([tmp_path / "l.csv"], Wanted()).scans[0].label == 1
    (tmp_path / "s.h5").rename(tmp_path / "d" / "s.h5")
    with pytest.raises(DataError, match=r"holds stores \(s.h5\) and scans \(p1_t1.npy\)"):
        open_data([tmp_path / "d"])
