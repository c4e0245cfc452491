"""The HDF5 store: what was written is read, anywhere, by any process, in no time."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.data.open import open_data
from ssl3d.data.phantoms import simulated_index
from ssl3d.data.store import volume as volume_module
from ssl3d.data.store.collection import Collection
from ssl3d.data.store.record import Record
from ssl3d.data.store.volume import Store
from ssl3d.data.store.writer import _chunks, assemble, block_size, part_record, write_part
from ssl3d.errors import DataError

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 11, 40, 37)).astype(np.float32)
MASK = RNG.integers(0, 4, size=(11, 40, 37))
BOXES = np.array([[1, 2, 3, 4, 5, 6], [0, 0, 0, 11, 40, 37]], np.float32)
AFFINE = ((0.0, 0.0, 1.5, -20.0), (0.0, 0.7, 0.0, 4.0), (2.5, 0.0, 0.0, 9.0), (0.0, 0.0, 0.0, 1.0))


def record(name="a", **changes):
    values = {
        "dataset": "set",
        "subject": "s1",
        "label": 1,
        "spacing": (2.5, 0.7, 1.5),
        "orientation": "SAR",
        "affine": AFFINE,
        "original_shape": (40, 37, 11),
        "original_affine": AFFINE,
        "source": "x/ä.nii.gz",
        "sha256": "00ff",
        "channels": ("t1", "flair"),
        "done": {"normalisation": {"kind": "ct", "window": [-1000, 400]}},
    }
    return Record(id=name, **(values | changes))


def make(folder, volumes, out="store.h5", **settings):
    """A store of (record, image, keywords) triples."""
    parts = folder / f"{out}.partial"
    for number, (entry, image, more) in enumerate(volumes):
        write_part(parts, f"{number:04d}", entry, image, **more)
    assemble(parts, folder / out, settings, [{"path": "bad.nii", "reason": "empty"}])
    return folder / out


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    small = RNG.normal(size=(1, 1, 30, 20)).astype(np.float32)
    return make(
        tmp_path_factory.mktemp("store"),
        [
            (record(), IMAGE, {"mask": MASK, "boxes": BOXES, "box_labels": np.array([7, 8])}),
            (record("b", label="tumour", split="test", subject="s2"), IMAGE[:1], {}),
            (record("c", label=2.5, dataset="other"), small, {"boxes": np.zeros((0, 6))}),
            (record("d", label=None), small, {}),
        ],
        spacing="keep",
    )


def test_reading_back_equals_writing(path):
    volumes = open_data([path])
    first, second, third, fourth = volumes
    np.testing.assert_allclose(first.read().numpy(), IMAGE, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(first.read_mask().numpy(), MASK)
    np.testing.assert_array_equal(first.boxes, BOXES)
    assert first.box_labels.tolist() == [7, 8]
    assert (first.id, first.dataset, first.subject, first.split) == ("a", "set", "s1", "")
    assert first.shape == IMAGE.shape and first.spacing == (2.5, 0.7, 1.5) and first.orientation == "SAR"
    kept = first.record
    assert kept == record(voxels=kept.voxels, reading=kept.reading) and len(kept.voxels) == 32
    assert [v.label for v in volumes] == [1, "tumour", 2.5, None]
    assert [type(v) for v in volumes.labels] == [int, str, float, type(None)]
    assert second.split == "test" and second.boxes is None and not second.has_mask
    assert third.boxes.shape == (0, 6)  # looked for and found none, which is not the same
    assert fourth.shape == (1, 1, 30, 20)
    assert volumes.settings == [{"spacing": "keep"}]
    assert volumes.stores[0].rejected == [{"path": "bad.nii", "reason": "empty"}]


def test_columns_agree_with_volumes(path):
    volumes = open_data([path])
    for name, of in [
        ("ids", "id"),
        ("datasets", "dataset"),
        ("subjects", "subject"),
        ("splits", "split"),
        ("labels", "label"),
        ("orientations", "orientation"),
        ("has_mask", "has_mask"),
    ]:
        assert getattr(volumes, name).tolist() == [getattr(v, of) for v in volumes], name
    assert volumes.shapes.tolist() == [list(v.shape) for v in volumes]
    assert volumes.spacings.tolist() == [list(v.spacing) for v in volumes]
    assert volumes.has_boxes.tolist() == [v.boxes is not None for v in volumes]


def test_a_person_is_data_set_and_subject(path):
    volumes = open_data([path])
    # s1 of "set" twice (rows 0 and 3), s2, and another s1 in "other".
    codes = volumes.subject_codes
    assert codes[0] == codes[3] and len(set(codes.tolist())) == 3
    assert volumes.identities() == [("set", "s1"), ("set", "s2"), ("other", "s1")]


@settings(max_examples=60, deadline=None)
@given(
    start=st.tuples(*[st.integers(-50, 50)] * 3),
    size=st.tuples(*[st.integers(1, 30)] * 3),
)
def test_a_crop_is_the_padded_volume_cut(path, start, size):
    volume = open_data([path])[0]
    image = volume.read().numpy()
    where = [np.arange(s, s + n) for s, n in zip(start, size, strict=True)]
    z, y, x = ((w >= 0) & (w < n) for w, n in zip(where, MASK.shape, strict=True))
    inside = z[:, None, None] & y[:, None] & x
    nearest = np.ix_(*[w.clip(0, n - 1) for w, n in zip(where, MASK.shape, strict=True)])
    crop = volume.read(start, size).numpy()
    for channel in range(2):
        expected = np.where(inside, image[channel][nearest], image[channel].min())
        np.testing.assert_array_equal(crop[channel], expected)
    np.testing.assert_array_equal(volume.read_mask(start, size), np.where(inside, MASK[nearest], 0))


def test_outside_is_the_recorded_background(tmp_path):
    image = np.full((1, 4, 4, 4), 3.0, np.float32)
    path = make(tmp_path, [(record(done={"background": -2.5}), image, {})])
    crop = open_data([path])[0].read((-1, 0, 0), (2, 1, 1))
    assert crop.flatten().tolist() == [-2.5, 3.0]


def test_a_crop_is_placed_back_in_patient_space(path):
    volume = open_data([path])[0]
    moved = np.array(volume.crop_affine((2, 3, 4))) @ [1, 1, 1, 1]
    np.testing.assert_allclose(moved, np.array(AFFINE) @ [3, 4, 5, 1])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("int16", 2e-4)])
def test_other_types(tmp_path, dtype, tolerance):
    path = make(tmp_path, [(record(), IMAGE, {"dtype": dtype})])
    np.testing.assert_allclose(open_data([path])[0].read().numpy(), IMAGE, atol=tolerance)


def test_the_foreground_map_says_where_there_is_something(tmp_path):
    image = np.zeros((1, 64, 70, 1), np.float32)
    image[0, 8:24, 32:51] = 1
    volume = open_data([make(tmp_path, [(record(), image, {})])])[0]
    block = volume.block
    assert block == (4, 4, 1)
    share = volume.foreground()
    assert share.shape == (16, 18, 1)
    assert share[2:6, 8:12].min() == 1.0 and share[3, 12, 0] == pytest.approx(0.75, abs=0.005)
    assert share.sum() == pytest.approx(image.sum() / 16, abs=0.1)
    assert volume.foreground_box() == ((8, 32, 0), (24, 52, 1))


def test_a_foreground_without_voxels_is_the_whole_volume(tmp_path):
    nothing = np.zeros(IMAGE.shape[1:], bool)
    volume = open_data([make(tmp_path, [(record(), IMAGE, {"foreground": nothing})])])[0]
    assert volume.foreground_box() == ((0, 0, 0), IMAGE.shape[1:])


@given(shape=st.tuples(*[st.integers(1, 600)] * 3), channels=st.integers(1, 9))
def test_chunks_are_near_the_target_and_waste_little(shape, channels):
    chunk = _chunks((channels, *shape))
    assert all(1 <= c <= n for c, n in zip(chunk, (channels, *shape), strict=True))
    assert np.prod(chunk[1:]) <= 4 * 32**3
    stored = np.prod([-(-n // c) * c for n, c in zip(shape, chunk[1:], strict=True)])
    assert stored <= 1.35 * np.prod(shape) or np.prod(shape) < 4096
    if np.prod(shape) > 2 * 32**3:
        assert np.prod(chunk[1:]) >= 32**3 / 5
    assert all(1 <= b <= 8 for b in block_size(shape))


def test_select_keeps_index_codes_and_order(path):
    volumes = open_data([path])
    chosen = volumes.select([3, 1])
    assert [v.id for v in chosen] == ["d", "b"] and [v.index for v in chosen] == [3, 1]
    assert chosen.subject_codes.tolist() == volumes.subject_codes[[3, 1]].tolist()
    assert chosen.select(np.array([False, True])).ids.tolist() == ["b"]
    assert len(volumes.select([])) == 0 and chosen.identities() == [("set", "s1"), ("set", "s2")]
    assert [v.id for v in volumes[1:3]] == ["b", "c"] and volumes[-1].id == "d"


def test_several_stores_are_read_as_one(tmp_path, path):
    again = make(
        tmp_path, [(record("e", subject="s2"), IMAGE, {}), (record("f", dataset="new"), IMAGE, {})]
    )
    both = open_data([path, again])
    assert both.ids.tolist() == ["a", "b", "c", "d", "e", "f"]
    assert [v.index for v in both] == list(range(6)) and both[4].id == "e"
    codes = both.subject_codes
    assert codes[1] == codes[4] and len(set(codes.tolist())) == 4  # s2 of "set" is one person in both
    assert both.dataset_names == ["set", "other", "new"] and both.dataset_codes.tolist() == [
        0,
        0,
        1,
        0,
        0,
        2,
    ]
    assert both.digest() != open_data([again, path]).digest() != open_data([path]).digest()


def test_a_folder_of_shards_is_read_as_one(tmp_path):
    make(tmp_path, [(record("a"), IMAGE, {})], "shard-2.h5")
    make(tmp_path, [(record("b"), IMAGE, {})], "shard-1.h5")
    (tmp_path / "rejected.csv").write_text("path,reason\n", encoding="utf-8")
    assert open_data([tmp_path]).ids.tolist() == ["b", "a"]


def test_digest_follows_the_content(tmp_path):
    base = open_data([make(tmp_path, [(record(), IMAGE, {})], "1.h5")]).digest()
    assert base == open_data([make(tmp_path, [(record(), IMAGE, {})], "2.h5")]).digest()
    assert base != open_data([make(tmp_path, [(record(), IMAGE + 1, {})], "3.h5")]).digest()
    assert base != open_data([make(tmp_path, [(record(), IMAGE, {"mask": MASK})], "4.h5")]).digest()
    assert base != open_data([make(tmp_path, [(record(label=0), IMAGE, {})], "5.h5")]).digest()
    scaled = [make(tmp_path, [(record(), IMAGE * k, {"dtype": "int16"})], f"6{k}.h5") for k in (1, 2)]
    assert open_data([scaled[0]]).digest() != open_data([scaled[1]]).digest()


def test_assembly_gives_the_same_bytes(tmp_path):
    volumes = [(record(), IMAGE, {"mask": MASK}), (record("b"), IMAGE, {})]
    one, two = make(tmp_path, volumes, "1.h5"), make(tmp_path, volumes, "2.h5")
    assert one.read_bytes() == two.read_bytes()


def test_the_fingerprint_counts(path):
    found = open_data([path]).stores[0].fingerprint
    assert set(found) == {"set", "other"}
    mine = found["set"]
    assert (mine["volumes"], mine["subjects"], mine["masks"], mine["boxes"]) == (3, 2, 1, 2)
    assert mine["shape"]["max"] == [11, 40, 37] and mine["spacing"]["median"] == [2.5, 0.7, 1.5]
    assert mine["classes"] == {"1": 1, "tumour": 1} and mine["splits"] == {"none": 2, "test": 1}
    assert mine["intensity"][0]["p0.5"] < mine["intensity"][0]["p50"] < mine["intensity"][0]["p99.5"]
    json.dumps(found)


def _sum(volume):
    return float(volume.read((1, 2, 3), (4, 5, 6)).sum())


def test_forked_processes_read_the_same(path):
    volumes = open_data([path])
    here = _sum(volumes[0])  # opened here before the fork
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_sum, [volumes[0]] * 4).get(timeout=60) == [here] * 4
    assert _sum(volumes[0]) == here


def test_a_new_process_reads_the_same(path):
    volumes = open_data([path])
    here = _sum(volumes[0])
    code = (
        "import pickle, sys; v = pickle.load(sys.stdin.buffer);"
        "print(float(v[0].read((1, 2, 3), (4, 5, 6)).sum()))"
    )
    out = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(volumes), capture_output=True)
    assert float(out.stdout) == here


def test_a_child_does_not_use_the_files_of_its_parent(path):
    volumes = open_data([path])
    parents = volumes.stores[0].file
    child = os.fork()
    if child == 0:
        os._exit(0 if volumes.stores[0].file is not parents else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert volumes.stores[0].file is parents and parents.id.valid


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(volume_module, "_MAX_OPEN", 3)
    for i in range(6):
        make(tmp_path, [(record(), IMAGE, {})], f"{i}.h5")
    volumes = open_data([tmp_path])
    for _ in range(2):
        assert len({float(v.read().sum()) for v in volumes}) == 1
    assert len(volume_module._open_files) <= 3


# Killed, cut short, wrong -------------------------------------------------------------------------


def test_a_part_is_there_whole_or_not_at_all(tmp_path):
    code = textwrap.dedent(
        """
        import sys, numpy as np
        from pathlib import Path
        from ssl3d.data.store.record import Record
        from ssl3d.data.store.writer import write_part
        image = np.random.default_rng(0).normal(size=(1, 60, 60, 60))
        print("go", flush=True)
        for i in range(10**6):
            write_part(Path(sys.argv[1]), f"{i:06d}", Record(f"v{i}", "d", f"s{i}"), image)
        """
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    writer.stdout.readline()
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("*.part"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    parts = sorted(tmp_path.glob("*.part"))
    assert len(parts) >= 3
    for number, part in enumerate(parts):
        assert part_record(part).id == f"v{number}"
    assemble(tmp_path, tmp_path / "store.h5", {}, [])
    assert len(open_data([tmp_path / "store.h5"])) == len(parts)


def test_a_part_cut_short_is_noticed_and_nothing_assembled(tmp_path):
    parts = tmp_path / "store.h5.partial"
    part = write_part(parts, "0", record(), IMAGE)
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(DataError, match=r"0\.part: not a whole part .*delete it"):
        part_record(part)
    with pytest.raises(DataError, match=r"0\.part"):
        assemble(parts, tmp_path / "store.h5", {}, [])
    assert [p.name for p in tmp_path.iterdir()] == ["store.h5.partial"]


@pytest.mark.parametrize("name", ["image", "mask", "foreground", "record"])
def test_a_part_with_a_damaged_byte_is_noticed(tmp_path, name):
    part = write_part(tmp_path, "0", record(), IMAGE, np.ones(IMAGE.shape[1:], np.uint8))
    assert part_record(part).id == "a"
    with h5py.File(part, locking=False) as file:
        place = file[name].id.get_chunk_info(0).byte_offset + 1
    content = bytearray(part.read_bytes())
    content[place] ^= 16
    part.write_bytes(content)
    with pytest.raises(DataError, match=r"0\.part: not a whole part .*delete it"):
        part_record(part)


def test_a_failed_assembly_leaves_the_finished_store(tmp_path):
    path = make(tmp_path, [(record(), IMAGE, {})])
    before = path.read_bytes()
    write_part(tmp_path / "store.h5.partial", "0001", record(), IMAGE)  # the same id again
    with pytest.raises(DataError, match="called 'a'"):
        assemble(tmp_path / "store.h5.partial", path, {}, [])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def newer(path):
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 99


def foreign(path):
    path.unlink()
    with h5py.File(path, "w") as file:
        file["x"] = 1


def without_index(path):
    with h5py.File(path, "r+") as file:
        del file["index/head"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-5000]), "cut short"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "cut short"),
        (lambda p: p.write_bytes(b"PK\x03\x04" * 500), "not an HDF5 file"),
        (lambda p: p.write_bytes(b""), "not an HDF5 file"),
        (lambda p: p.unlink(), "no such file"),
        (newer, "format 99, this ssl3d reads up to 3"),
        (foreign, "not a store of ssl3d"),
        (without_index, "index cannot be read"),
        (lambda p: write_part(p.parent, "x", record(), IMAGE).replace(p), "unfinished store"),
    ],
)
def test_what_is_no_store_is_one_clear_line(tmp_path, damage, message):
    path = make(tmp_path, [(record(), IMAGE, {})])
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        open_data([path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_cannot_be_meant(tmp_path):
    path = make(tmp_path, [(record(), IMAGE, {})])
    with pytest.raises(DataError, match="unfinished"):
        open_data([tmp_path / "store.h5.partial"])
    with pytest.raises(DataError, match="given twice"):
        open_data([path, tmp_path / "." / "store.h5"])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "scan.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"store\.h5.*scan\.nii\.gz"):
        open_data([tmp_path])
    with pytest.raises(DataError, match="phantoms:N"):
        open_data(["phantoms:many"])
    (tmp_path / "deep" / "scan.nii.gz").unlink()
    path.unlink()
    with pytest.raises(DataError, match="unfinished"):
        open_data([tmp_path])


@pytest.mark.parametrize(
    ("image", "more", "message"),
    [
        (np.full((1, 2, 2, 2), np.nan), {}, "8 voxels are NaN"),
        (np.full((1, 2, 2, 2), 70000.0), {}, "70000 exceeds half precision"),
        (np.zeros((2, 2, 2)), {}, "expected \\(C, D, H, W\\)"),
        (np.zeros((1, 2, 2, 0)), {}, "not empty"),
        (np.zeros((1, 2, 2, 2)), {"mask": np.zeros((2, 2, 3), int)}, "mask of shape"),
        (np.zeros((1, 2, 2, 2)), {"mask": np.zeros((2, 2, 2))}, "expected integers"),
        (np.zeros((1, 2, 2, 2)), {"boxes": np.zeros((3, 4))}, "expected \\(n, 6\\)"),
        (np.zeros((1, 2, 2, 2)), {"boxes": np.zeros((3, 6)), "box_labels": [1]}, "3 boxes but 1"),
        (np.zeros((1, 2, 2, 2)), {"dtype": "float8"}, "float8"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, image, more, message):
    with pytest.raises(DataError, match=message):
        write_part(tmp_path, "x", record(), image, **more)
    assert not list(tmp_path.iterdir())


def test_no_mask_says_so(path):
    with pytest.raises(DataError, match="set/b: has no mask"):
        open_data([path])[1].read_mask()


# Scale --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 100, 1000])
def test_100_000_volumes_open_in_2_seconds_and_100_megabytes(tmp_path, shards):
    each = 100_000 // shards
    for i in range(shards):
        simulated_index(tmp_path / f"{i:04d}.h5", each, i * each)
    code = textwrap.dedent(
        """
        import sys, time
        from ssl3d.data.open import open_data
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
        before, began = resident(), time.process_time()  # whatever else runs here
        data = open_data([sys.argv[1]])
        codes = data.subject_codes, data.dataset_codes, data.shapes
        print(time.process_time() - began, resident() - before, len(data), data[54321].id)
        """
    )
    seconds, megabytes, count, name = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(count) == 100_000 and "0054321" in name
    assert float(seconds) < 2 and float(megabytes) < 100


def test_opening_reads_no_voxels_and_no_provenance(path, monkeypatch):
    touched = []
    get = h5py.Group.__getitem__
    monkeypatch.setattr(
        h5py.Group, "__getitem__", lambda self, name: touched.append(name) or get(self, name)
    )
    data = Collection([Store(path)])
    assert len(data.subject_codes) == 4 and data[2].shape and data[2].label == 2.5
    assert sorted(set(touched) - {"/"}) == ["index/head", "index/table", "index/text"]


def test_the_digest_tells_spacings_and_orientations_apart(tmp_path):
    digests = set()
    for n, changed in enumerate(({}, {"spacing": (2.0, 1.0, 1.0)}, {"orientation": "unknown"})):
        known = {"spacing": (1.0, 1.0, 1.0), "orientation": "SAR"} | changed
        write_part(
            tmp_path / str(n), "a", Record("a", "d", "s", **known), np.ones((1, 4, 4, 4), np.float32)
        )
        assemble(tmp_path / str(n), tmp_path / f"{n}.h5", {}, [])
        digests.add(open_data([tmp_path / f"{n}.h5"]).digest())
    assert len(digests) == 3


def test_a_store_made_anew_is_read_anew_in_the_same_session(tmp_path):
    path = make(tmp_path, [(record(), IMAGE, {})])
    before = open_data([path])[0]
    assert np.allclose(before.read(), IMAGE, atol=0.01)
    make(tmp_path, [(record(subject="another"), IMAGE + 1, {})])
    after = open_data([path])[0]
    assert np.allclose(after.read(), IMAGE + 1, atol=0.01) and after.record.subject == "another"
    assert np.allclose(before.read(), IMAGE, atol=0.01)  # whoever has the old one open goes on with it
