"""A damaged store gives the numbers that were written, or refuses in one line that names it."""

import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ssl3d.commands import info
from ssl3d.data.open import open_data
from ssl3d.data.store import volume as handles
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


def chunks_of(path):
    """Return the name, place and length of every chunk of a store's data sets."""
    chunks = []
    with h5py.File(path, locking=False) as file:

        def add(name, data):
            if isinstance(data, h5py.Dataset) and data.chunks:
                infos = [data.id.get_chunk_info(n) for n in range(data.id.get_num_chunks())]
                chunks.extend((name, info.byte_offset, info.size) for info in infos)

        file.visititems(add)
    return chunks


@pytest.mark.parametrize("filtered", [False, True])
def test_a_damaged_byte_of_any_chunk_is_refused_at_its_first_reading(store, tmp_path, filtered):
    whole, path = everything(store), Path(shutil.copy(store, tmp_path / "whole.h5"))
    if filtered:  # as stores were written for a while
        with h5py.File(path, "r+", libver="v110") as file:
            for group in (file["images"], file["masks"]):
                for name in list(group):
                    values, attrs, sides = group[name][()], dict(group[name].attrs), group[name].chunks
                    del group[name], attrs["crc32"]
                    group.create_dataset(name, data=values, chunks=sides, fletcher32=True).attrs.update(
                        attrs
                    )
    assert everything(path) == whole
    rng, chunks = np.random.default_rng(7), chunks_of(path)
    assert {name.partition("/")[0] for name, *_ in chunks} == {
        "images", "masks", "foreground", "boxes", "box_labels", "provenance",
        "settings", "rejected", "fingerprint",
    }  # fmt: skip
    for number, (name, place, length) in enumerate(chunks):
        end = length - (4 if name in ("foreground", "boxes", "box_labels", "provenance") else 0)
        at = place + int(rng.integers(min(end, 64)))
        copy = flip(path, tmp_path / f"{number}.h5", [(at, int(rng.integers(8)))])
        with pytest.raises(DataError, match=f"{copy}: "):
            everything(copy)


def test_a_chunk_is_compared_once_though_few_handles_are_kept(tmp_path, monkeypatch):
    rng = np.random.default_rng(5)
    images = [rng.normal(size=(1, 20, 100, 33)).astype(np.float32) for _ in range(4)]
    for number, image in enumerate(images):
        write_part(
            tmp_path / "parts", str(number), Record(str(number), "d", f"p{number}"), image, dtype="float32"
        )
    assemble(tmp_path / "parts", tmp_path / "store.h5", {}, [])
    data, sums, crc32 = open_data([tmp_path / "store.h5"]), [], zlib.crc32
    monkeypatch.setattr("ssl3d.data.store.chunks.zlib.crc32", lambda part: sums.append(part) or crc32(part))
    monkeypatch.setattr("ssl3d.data.store.volume._MAX_CACHED", 3 * images[0].nbytes)
    assert torch.equal(data[0].read((2, 3, 4), (4, 4, 4)), torch.from_numpy(images[0])[:, 2:6, 3:7, 4:8])
    assert len(sums) == 1
    for _ in range(3):
        for volume, image in zip(data, images, strict=True):
            assert torch.equal(volume.read(), torch.from_numpy(image))
        assert len(handles._known) < 4
    assert len(sums) == 4 * data[0].stored("images")._data.id.get_num_chunks() > 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_byte_of_a_store_changes_a_number_in_silence(tmp_path, capfd):
    image = np.random.default_rng(3).normal(size=(1, 6, 9, 10)).astype(np.float32)
    entry = Record("scan", "study", "patient", label=3, source="a.nii")
    write_part(tmp_path / "parts", "0", entry, image, (image[0] > 0).astype(int), [[0, 0, 0, 5, 5, 5]])
    assemble(tmp_path / "parts", tmp_path / "small.h5", {"spacing": "keep"}, [])
    path = tmp_path / "small.h5"
    whole, refused, rng = everything(path), 0, np.random.default_rng(4)
    for place in range(path.stat().st_size):
        copy = flip(path, tmp_path / f"{place}.h5", [(place, int(rng.integers(8)))])
        try:
            assert everything(copy) == whole, f"byte {place}: other numbers"
        except DataError as error:
            assert str(copy) in str(error) and "\n" not in str(error)
            refused += 1
        copy.unlink()
    assert refused > 5000
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


def test_a_volume_of_a_store_made_before_is_compared_with_its_hash_as_it_is_first_read(tmp_path):
    copy = flip(OLD, tmp_path / "old.h5", [(place_of(OLD, "images/3") + 11, 6)])
    data, whole = open_data([copy]), open_data([OLD])
    with pytest.raises(DataError, match=r"damaged \(they are not those that were written\)"):
        data[3].read((0, 0, 0), (2, 2, 2))
    assert torch.equal(data[4].read(), whole[4].read())
    at = next(number for number, volume in enumerate(whole) if volume.has_mask)
    copy = flip(OLD, tmp_path / "other.h5", [(place_of(OLD, f"masks/{at}") + 11, 6)])
    with pytest.raises(DataError, match="not those that were written"):
        open_data([copy])[at].read_mask()


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
