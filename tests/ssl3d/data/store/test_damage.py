"""A damaged store gives the numbers that were written, or refuses in one line that names it."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from ssl3d.commands import info
from ssl3d.data.open import open_data
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.errors import DataError

OLD = Path(__file__).parents[3] / "made_before" / "store.h5"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("damage"), np.random.default_rng(0)
    for number, dtype in enumerate(("float16", "int16", "float32")):
        image = rng.normal(size=(1 + number % 2, 20, 34, 33)).astype(np.float32)
        entry = Record(f"scan-{number}", "study", f"patient-{number}", label=number, source=f"{number}.nii")
        mask = rng.integers(0, 3, size=image.shape[1:])
        write_part(folder / "parts", str(number), entry, image, mask, [[0, 0, 0, 5, 5, 5]], dtype=dtype)
    assemble(folder / "parts", folder / "store.h5", {"spacing": "keep"}, [])
    return folder / "store.h5"


def everything(path):
    data = open_data([path])
    settings = [(store.settings, store.fingerprint, store.rejected) for store in data.stores]
    return [
        [repr(volume), volume.record, volume.label, volume.split, volume.orientation, volume.boxes.tolist(),
         volume.box_labels.tolist(), volume.foreground().tolist(), volume.read().numpy().tobytes(),
         volume.background, volume.read((-2, 3, 3), (8, 8, 8)).numpy().tobytes(),
         volume.read_mask().numpy().tobytes()]
        for volume in data
    ] + settings + [data.digest()]  # fmt: skip


def flip(path, copy, places):
    content = bytearray(path.read_bytes())
    for place, bit in places:
        content[place] ^= 1 << bit
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize("how", ["zeros", "ones", "head", "doubled", "cut"])
def test_a_damaged_stretch_changes_no_number_in_silence(store, tmp_path, capfd, how):
    whole, content, size = everything(store), store.read_bytes(), store.stat().st_size
    for seed in range(12):
        rng = np.random.default_rng(seed)
        place, length = int(rng.integers(size)), int(rng.integers(1, 4096))
        if how == "head":
            place, length = int(rng.integers(2048)), 8
        kept = content[place : place + length]
        part = {
            "zeros": bytes(len(kept)), "ones": b"\xff" * len(kept), "head": rng.bytes(len(kept)),
            "doubled": kept * 2, "cut": b"",
        }[how]  # fmt: skip
        copy = tmp_path / f"{seed}.h5"
        copy.write_bytes(content[:place] + part + content[place + length :])
        try:
            assert everything(copy) == whole, f"seed {seed}: other numbers"
        except DataError as error:
            assert str(copy) in str(error) and "\n" not in str(error)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("begin", range(0, 60, 10))
def test_a_flipped_bit_changes_no_number_in_silence(store, tmp_path, capfd, begin):
    whole, size = everything(store), store.stat().st_size
    for seed in range(begin, begin + 10):
        rng = np.random.default_rng(seed)
        copy = flip(store, tmp_path / f"{seed}.h5", [(int(rng.integers(size)), int(rng.integers(8)))])
        try:
            assert everything(copy) == whole, f"seed {seed}: other numbers"
        except DataError as error:
            assert str(copy) in str(error) and "\n" not in str(error)
    assert capfd.readouterr().err == ""


def place_of(path, name):
    with h5py.File(path, locking=False) as file:
        return file[name].id.get_chunk_info(0).byte_offset


@pytest.mark.parametrize(
    ("name", "read", "said"),
    [
        ("images/1", lambda volume: volume.read((0, 0, 0), (4, 4, 4)), "the image of study/scan-1"),
        ("masks/1", lambda volume: volume.read_mask(), "the mask of study/scan-1"),
        ("foreground", lambda volume: volume.foreground(), "the foreground of study/scan-1"),
        ("boxes", lambda volume: volume.boxes, "the boxes of study/scan-1"),
        ("box_labels", lambda volume: volume.box_labels, "the box labels of study/scan-1"),
        ("provenance", lambda volume: volume.record, "the record of study/scan-1"),
    ],
)
def test_damage_is_named_on_reading_and_by_verify(store, tmp_path, capsys, name, read, said):
    copy = flip(store, tmp_path / "copy.h5", [(place_of(store, name) + 3, 6)])
    with pytest.raises(DataError, match=f"{copy}: {said} is damaged"):
        read(open_data([copy])[1])
    if name.startswith("images"):
        read(open_data([copy])[0])  # the fault costs that volume
    with pytest.raises(DataError, match=r"of 3 volumes damaged"):
        info.main(["--verify", str(copy)])
    assert "study/scan-1 is damaged" in capsys.readouterr().out


def test_an_index_with_another_label_is_refused(store, tmp_path):
    copy = Path(shutil.copy(store, tmp_path))
    with h5py.File(copy, "r+", locking=False) as file:
        rows = file["index/table"][()]
        rows["label"][1] = 2
        file["index/table"][...] = rows
    with pytest.raises(DataError, match="not those that were written"):
        open_data([copy])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("identity", 99, "a person's number"),
        ("split", 7, "a split"),
        ("orientation", 9, "an orientation"),
        ("id_length", 10**6, "a name's place"),
        ("label_kind", 9, "a label"),
        ("shape", -1, "a shape"),
        ("block", 0, "a block"),
        ("spacing", np.nan, "a spacing"),
        ("provenance_at", -5, "a place in a list"),
    ],
)
def test_an_index_without_a_digest_must_make_sense(tmp_path, field, value, said):
    copy = Path(shutil.copy(OLD, tmp_path))
    with h5py.File(copy, "r+", locking=False) as file:
        rows = file["index/table"][()]
        rows[field][2] = value
        file["index/table"][...] = rows
    with pytest.raises(DataError, match=f"{said} of volume 2 cannot be"):
        open_data([copy])


def test_a_store_made_before_is_verified_by_its_hashes(tmp_path, capsys):
    info.main(["--verify", str(OLD)])
    assert "all of 14 volumes read, nothing is damaged" in capsys.readouterr().out
    copy = flip(OLD, tmp_path / "old.h5", [(place_of(OLD, "images/3") + 11, 6)])
    with h5py.File(copy, "r+", locking=False) as file:
        rows = file["index/table"][()]
        rows["spacing"][5] *= 2
        file["index/table"][...] = rows
    with pytest.raises(DataError, match="2 parts of 14 volumes damaged"):
        info.main(["--verify", str(copy)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "not those that were written" in lines[0] and "its spacing is" in lines[1]
    ids = open_data([copy]).ids
    assert ids[3] in lines[0] and ids[5] in lines[1]


def test_a_large_volume_has_the_same_hash_in_slabs(store, monkeypatch, capsys):
    monkeypatch.setattr("ssl3d.data.store.digests._SLAB", 4096)
    info.main(["--verify", str(store)])
    assert "nothing is damaged" in capsys.readouterr().out


def test_verify_reads_stores_only(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="--verify reads stores"):
        info.main(["--verify", str(tmp_path)])
