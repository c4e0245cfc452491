"""What needs more memory than may be taken is set aside by name before it is, or read in slabs."""

from __future__ import annotations

import dataclasses
import gzip
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image

from ssl3d import memory
from ssl3d.cli import main
from ssl3d.commands.embed import EmbedOptions, embed_collection
from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.read import read
from ssl3d.data.store.record import Record
from ssl3d.data.store.windows import WindowedVoxels, voxels_of
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.inference import embed_volume
from ssl3d.errors import CheckpointError, DataError, UsageError
from ssl3d.specs import encoder_from
from ssl3d.training.stream import Stream

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(autouse=True)
def own_budget(monkeypatch):
    """Put the budget back that a test sets."""
    monkeypatch.setenv(memory.VARIABLE, "100GB")


def resident() -> int:
    """Return the bytes of memory of this process that are no pages of a file."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(r"RssAnon:\s+(\d+)", status)
    assert match is not None
    return int(match[1]) * 1024


def most_taken(work: Callable[[], object]) -> tuple[int, str]:
    """Do work in a child; return the most memory that it took at once, and what became of it."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        before, most, ended = resident(), 0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not ended.is_set():
                most = max(most, resident() - before)
                time.sleep(0.0005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            said = repr(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        ended.set()
        watcher.join()
        os.write(theirs, f"{most} {said[:3000]}".encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, encoding="utf-8") as stream:
        most, _, said = stream.read().partition(" ")
    os.waitpid(child, 0)
    return int(most), said


def scan(path: Path, side: int = 40, seed: int = 0, slope: float | None = None) -> Path:
    rng = np.random.default_rng(seed)
    voxels = np.zeros((side, side, side), np.int16)
    voxels[4:-4, 4:-4, 4:-4] = rng.integers(300, 900, (side - 8,) * 3)
    image = nibabel.Nifti1Image(voxels if slope is None else voxels * slope + 3, np.eye(4))
    image.set_data_dtype(np.int16)
    nibabel.save(image, path)
    return path


# The budget -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--max-memory", "12MB"], ["--max_memory=12 MB"]])
def test_every_command_takes_a_budget_and_hands_it_to_what_it_starts(words, monkeypatch, capsys):
    assert main(["info", "phantoms:2", *words]) == 0
    assert os.environ[memory.VARIABLE].replace(" ", "") == "12MB" and memory.budget() == 12_000_000


@pytest.mark.parametrize("words", [["--max-memory"], ["--max-memory", "much"], ["--max-memory=0"]])
def test_a_budget_that_is_no_number_of_bytes_is_one_line(words, capsys):
    assert main(["info", "phantoms:2", *words]) == 2
    said = capsys.readouterr().err
    assert "--max-memory" in said and "8GB" in said and said.count("\n") == 1


def test_a_budget_in_the_environment_that_is_none_is_told(monkeypatch):
    monkeypatch.setenv(memory.VARIABLE, "lots")
    with pytest.raises(UsageError, match="--max-memory lots"):
        memory.budget()


@linux
def test_by_default_it_is_half_of_what_is_free(monkeypatch):
    monkeypatch.delenv(memory.VARIABLE)
    monkeypatch.setattr(memory, "_machine_free", lambda: 1000)
    monkeypatch.setattr(memory, "_own_free", lambda: [800])
    monkeypatch.setattr(memory, "_cgroups_free", lambda: [900, 600])
    assert memory.budget() == 300


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_all_cgroups_above_count(tmp_path, version):
    root, kind = tmp_path / "cgroup", "memory" if version == 1 else ""
    limit, used, cached = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    for place, most in (("a", "5000"), ("a/b", "max")):
        folder = root / kind / place
        folder.mkdir(parents=True)
        (folder / limit).write_text(most)
        (folder / used).write_text("3000")
        (folder / "memory.stat").write_text(f"anon 7\n{cached} 500\nactive_file 9\n")
    about = tmp_path / "about"
    about.write_text(f"9:name=systemd:/x\n4:{kind}:/a/b\n")
    assert memory._cgroups_free(root, about) == [2500]


# Scans ------------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha", "a.nrrd", "a.png", "a.tif", "s.nii", "s.nii.gz"])
def test_a_scan_that_promises_more_than_the_budget_is_refused_before_it_is_taken(tmp_path, name):
    path, zeros = tmp_path / name, np.zeros((1, 320, 320, 320), np.int16)
    if name.startswith("s"):
        image = nibabel.Nifti1Image(zeros[0], np.eye(4))
        image.header.set_slope_inter(2, 1)
        nibabel.save(image, path)
    elif "nii" in name:
        nibabel.save(nibabel.Nifti1Image(zeros[0], np.eye(4)), path)
    elif name in ("a.mha", "a.nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(zeros[0]), str(path), True)
    else:
        Image.fromarray(np.zeros((6000, 6000), np.uint8)).save(path, compression="tiff_deflate")
    if name != "s.nii":
        assert path.stat().st_size < 2e6

    def work():
        memory.allow("40MB")
        read([path])

    taken, said = most_taken(work)
    assert re.search(r"TooLarge: .*needs [\d.]+ [MG]B of memory, more than the 40 MB of --max-memory", said)
    assert taken < 40e6


@pytest.mark.parametrize("name", ["a.nii", "a.mha", "a.nrrd", "a.dcm"])
def test_a_file_that_cannot_be_mapped_is_refused(tmp_path, name, monkeypatch):
    path = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((1, 20, 20), np.int16)), str(path))
    monkeypatch.setattr(memory, "_own_free", lambda: [700])
    with pytest.raises(memory.TooLarge, match=r"needs \S+ k?B of addresses, and `ulimit -v` leaves 700"):
        read([path])


@linux
def test_a_damaged_element_of_dicom_takes_no_memory(tmp_path):
    path = tmp_path / "a.dcm"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((1, 20, 20), np.int16)), str(path))
    with path.open("ab") as file:
        file.write(b"\xe1\x7f\x10\x00OB\0\0\x00\x00\x00\xf0" + bytes(100))
    taken, said = most_taken(lambda: read([path]))
    assert taken < 500e6, said


def test_a_batch_that_no_memory_holds_is_refused_at_once():
    codes = np.arange(4)
    with pytest.raises(memory.TooLarge, match="--batch-size 1,000,000,000: needs 4 TB"):
        Stream(codes, codes, 10**9, seed=0)


@linux
def test_a_file_larger_than_the_budget_costs_that_file_by_name(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    scan(folder / "small.nii.gz")
    content = gzip.decompress(scan(tmp_path / "x.nii.gz", 190).read_bytes())
    (folder / "large.nii.gz").write_bytes(gzip.compress(content, 1))

    def work():
        return main(["prepare", str(folder), "--out", str(tmp_path / "s.h5"), "--workers", "0",
                     "--max-memory", "60MB"])  # fmt: skip

    taken, said = most_taken(work)
    assert said == "0" and taken < 60e6
    assert [volume.subject for volume in open_data([tmp_path / "s.h5"])] == ["small"]
    (line,) = (tmp_path / "rejected.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert re.search(r"large\.nii\.gz,.*needs 82.3 MB of memory, more than the 60 MB of --max-memory", line)


@linux
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_scaled_voxels_that_do_not_fit_in_double_precision_are_read_by_slabs(tmp_path, suffix, monkeypatch):
    path = scan(tmp_path / f"a{suffix}", 144, slope=0.37)
    count = 144**3
    whole = read([path]).voxels
    assert whole.dtype == np.float64

    def work():
        memory.allow(f"{9 * count}")
        voxels = read([path]).voxels
        # To the last bit what double precision gives in single.
        return voxels.dtype == np.float32 and np.array_equal(voxels, whole.astype(np.float32))

    monkeypatch.setattr("ssl3d.data.scans.nifti._SLAB", 1 << 20)
    taken, said = most_taken(work)
    # What compares them takes another 5 bytes for each voxel.
    assert said == "True" and taken < (4 + 5) * count + 2e7


@linux
@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_voxels_that_are_not_deflated_stay_on_the_disk(tmp_path, name):
    voxels = np.random.default_rng(0).integers(-900, 900, (160, 160, 160)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / name))

    def work():
        return int(read([tmp_path / name]).voxels[0, 3].sum())

    taken, said = most_taken(work)
    assert said == str(int(voxels[3].astype(np.int64).sum())) and taken < voxels.nbytes / 2


def test_scans_too_large_for_a_workers_share_are_done_alone(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        scan(folder / f"{number}.nii.gz", 40, number)
    memory.allow(f"{40**3 * 15}")  # for one of them, not for two
    options = PrepareOptions((str(folder),), str(tmp_path / "s.h5"), workers=2)
    assert prepare(options).volumes == 3
    memory.allow(f"{40**3 * 9}")
    (folder / "small.nii.gz").write_bytes(scan(tmp_path / "small.nii.gz", 20).read_bytes())
    assert prepare(dataclasses.replace(options, out=str(tmp_path / "t.h5"))).rejected == 3
    capsys.readouterr()
    prepare(dataclasses.replace(options, out=str(tmp_path / "t.h5")))
    assert "3 files of them for want of memory: --max-memory gives it" in capsys.readouterr().out


@linux
def test_no_more_is_taken_to_prepare_a_scan_than_is_asked_for(tmp_path):
    side = 128
    (tmp_path / "in").mkdir()
    path = scan(tmp_path / "in" / "a.nii.gz", side)
    for number in range(2):  # a mask beside it, too
        options = PrepareOptions((str(path.parent),), str(tmp_path / f"{number}.h5"), workers=0)
        if number:
            voxels = (np.asarray(nibabel.load(path).dataobj) > 500).astype(np.uint8)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path.parent / "a_seg.nii.gz")
            options.masks = "seg"
        taken, said = most_taken(lambda options=options: prepare(options).volumes)
        assert said == "1" and taken < (10 + 2) * side**3 + 1.5e7


# Volumes, weights and records -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("store"), np.random.default_rng(0)
    for number, depth in enumerate((30, 190)):
        image = rng.normal(size=(1, depth, 128, 128)).astype(np.float32)
        entry = Record(f"scan-{number}", "study", f"patient-{number}", source=f"{number}.nii")
        write_part(folder / "parts", str(number), entry, image)
    assemble(folder / "parts", folder / "s.h5", {}, [])
    return folder / "s.h5"


def test_a_volume_beyond_the_budget_is_told_by_name_and_both_numbers(store):
    volume = open_data([store])[1]
    memory.allow("10MB")
    told = (
        r"study/scan-1, shape \(1, 190, 128, 128\): needs 18.7 MB of memory, more than the 10 MB of --max"
    )
    with pytest.raises(DataError, match=told):
        volume.read()
    assert volume.read((0, 0, 0), (20, 64, 64)).shape == (1, 20, 64, 64)


def test_a_volume_beyond_the_budget_is_embedded_by_windows_to_the_same_bits(store):
    encoder = encoder_from("scratch:resnet10:width=4")
    volume = open_data([store])[0]
    whole = embed_volume(encoder, voxels_of(volume), (16, 64, 64))
    memory.allow("1MB")
    windowed = voxels_of(volume)
    assert isinstance(windowed, WindowedVoxels)
    assert torch.equal(embed_volume(encoder, windowed, (16, 64, 64)), whole)


@linux
def test_embedding_keeps_to_the_budget(store, tmp_path):
    def work():
        torch.set_num_threads(1)
        memory.allow("6MB")
        options = EmbedOptions(
            "scratch:resnet10:width=4", out=tmp_path / "e.h5", patch=(16, 64, 64), overlap=0.0,
            batch_size=1,
        )  # fmt: skip
        return embed_collection(encoder_from(options.encoder), open_data([store]), options)

    taken, said = most_taken(work)
    assert said == "2" and taken < 190 * 128 * 128 * 4 + 6e6  # the network itself takes some


def test_feature_maps_beyond_the_budget_cost_their_volume(store, tmp_path):
    said: list[str] = []
    memory.allow("10MB")
    options = EmbedOptions(
        "scratch:resnet10:width=4", out=tmp_path / "e.h5", patch=(16, 64, 64), overlap=0.0, dense=True,
        dense_every=(2, 4, 4),
    )  # fmt: skip
    assert embed_collection(encoder_from(options.encoder), open_data([store]), options, said.append) == 1
    (line,) = [line for line in said if line.startswith("set aside: study/scan-1")]
    assert re.search(r"feature maps of shape \(32, 95, 32, 32\): needs [\d.]+ MB", line)


def test_weights_and_records_beyond_the_budget_are_refused_by_name(tmp_path):
    from ssl3d.checkpoint.encoders import load_encoder, save_encoder
    from ssl3d.evaluation.records import read_result

    folder = save_encoder(encoder_from("scratch:resnet10:width=8"), tmp_path / "e")
    (tmp_path / "a.json").write_text('{"predictions": [' + "1, " * 100_000 + "1]}")
    memory.allow("100kB")
    for work, name in ((lambda: load_encoder(folder), "encoder.safetensors"),
                       (lambda: read_result(tmp_path / "a.json"), "a.json")):  # fmt: skip
        with pytest.raises((DataError, CheckpointError), match=rf"{name}: needs [\d.]+ [kM]B of memory"):
            work()
