"""Stopping, going on, sharding, caching: a store is whole or not there, and made once."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ssl3d.cli import main
from ssl3d.data.open import open_data
from ssl3d.data.preparation import parts, pool
from ssl3d.data.preparation.prepare import PrepareOptions, prepare, prepare_cached
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.errors import DataError, TransientError


def folder_of(scans, root, count=6):
    for i in range(count):
        scans.nifti(root / f"p{i:03d}.nii.gz", scans.body(seed=i))
    return root


def options(source, out, **more):
    return PrepareOptions((str(source),), str(out), **{"workers": 0, **more})


def content(path):
    """Digest of the volumes, and all provenance."""
    data = open_data([path])
    return data.digest(), [volume.record for volume in data]


def test_killed_in_the_middle_it_goes_on_to_the_same_store(scans, tmp_path):
    source, out = tmp_path / "d", tmp_path / "s.h5"
    source.mkdir()
    noise = np.random.default_rng(0)
    for i in range(24):
        voxels = scans.body((64, 64, 48), seed=i) + noise.integers(0, 50, (64, 64, 48), dtype=np.int16)
        scans.nifti(source / f"p{i:03d}.nii.gz", voxels)
    words = [sys.executable, "-m", "ssl3d", "prepare", str(source), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    partial = tmp_path / "s.h5.partial"
    until = time.monotonic() + 60
    while len(list(partial.glob("*.part"))) < 3:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = len(list(partial.glob("*.part")))
    assert 3 <= done < 24
    again = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "going on: " in again.stdout
    assert not partial.exists()
    prepare(options(source, tmp_path / "whole.h5"))
    assert content(out) == content(tmp_path / "whole.h5")


def test_a_finished_store_is_not_made_twice(scans, tmp_path, capsys):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    prepare(options(source, out))
    before = out.stat()
    summary = prepare(options(source, out, workers=2))  # the number of workers changes nothing
    assert summary.reused
    assert (out.stat().st_mtime_ns, out.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert "already prepared: 6 volumes, 0 rejected" in capsys.readouterr().out


def test_other_options_or_data_need_overwrite(scans, tmp_path, monkeypatch):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    prepare(options(source, out))
    for more, named in (
        ({"normalize": "unit"}, "--normalize: auto then, unit now"),
        ({"spacing": (2, 1, 1.5)}, "--spacing: keep then, 2 1 1.5 now"),
        ({"window": (0, 80), "crop_foreground": True},
         "--window: none then, 0 80 now; --crop-foreground: no then, yes now"),
        ({"boxes": "masks"}, "--boxes: listed then, masks now"),
    ):  # fmt: skip
        message = re.escape(f"made with other options ({named}); --overwrite")
        with pytest.raises(DataError, match=message):
            prepare(options(source, out, **more))
    monkeypatch.setattr(parts, "VERSION", 99)
    monkeypatch.setattr("ssl3d.data.preparation.prepare.VERSION", 99)
    with pytest.raises(DataError, match="made by another version of ssl3d; --overwrite"):
        prepare(options(source, out))
    monkeypatch.undo()
    scans.nifti(source / "new.nii.gz", scans.body())
    with pytest.raises(DataError, match=r"other data .6 scans found then, 7 now"):
        prepare(options(source, out))
    assert prepare(options(source, out, overwrite=True)).volumes == 7
    out.write_bytes(out.read_bytes()[:3000])
    with pytest.raises(DataError, match="not a whole store"):
        prepare(options(source, out))
    (tmp_path / "n.h5").write_text("notes", encoding="utf-8")
    with pytest.raises(DataError, match="not a whole store"):
        prepare(options(source, tmp_path / "n.h5"))
    assert (tmp_path / "n.h5").read_text(encoding="utf-8") == "notes"


def stopped(source, out, monkeypatch, after, **more):
    """Fills the disk after some volumes."""
    from ssl3d.data.store import writer

    real, calls = writer.write_part, []

    def full(*words, **options):
        calls.append(1)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return real(*words, **options)

    monkeypatch.setattr(writer, "write_part", full)
    with pytest.raises(TransientError) as caught:
        prepare(options(source, out, **more))
    monkeypatch.setattr(writer, "write_part", real)
    return str(caught.value)


def test_a_full_disk_is_one_line_and_what_is_done_stays(scans, tmp_path, monkeypatch, capsys):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    message = stopped(source, out, monkeypatch, 4)
    assert "no space left" in message
    assert "s.h5.partial" in message
    assert len(list((tmp_path / "s.h5.partial").glob("*.part"))) == 4
    assert prepare(options(source, out)).volumes == 6
    assert "going on: 4 of 6 scans are done" in capsys.readouterr().out


def test_parts_of_other_options_are_not_reused(scans, tmp_path, monkeypatch, capsys):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    stopped(source, out, monkeypatch, 4)
    prepare(options(source, out, normalize="unit"))
    assert "4 volumes made with other options, not reused" in capsys.readouterr().out
    assert {volume.record.done["normalize"]["kind"] for volume in open_data([out])} == {"unit"}


def test_parts_of_changed_or_vanished_files_are_not_reused(scans, tmp_path, monkeypatch):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    stopped(source, out, monkeypatch, 5)
    scans.nifti(source / "p000.nii.gz", scans.body((9, 9, 9), seed=77))
    (source / "p001.nii.gz").unlink()
    scans.nifti(source / "a_new.nii.gz", scans.body(seed=78))  # shifts the numbers of all others
    prepare(options(source, out))
    prepare(options(source, tmp_path / "whole.h5"))
    assert content(out) == content(tmp_path / "whole.h5")
    assert len(open_data([out])) == 6


def test_voxels_changed_beside_their_header_are_noticed(scans, tmp_path):
    source = tmp_path / "d"
    for name in ("a", "b"):
        scans.itk(source / f"{name}.mhd", scans.body(seed=ord(name)))
    prepare(options(source, tmp_path / "s.h5"))
    scans.itk(tmp_path / "other" / "a.mhd", scans.body(seed=9))
    (tmp_path / "other" / "a.raw").replace(source / "a.raw")  # the header is what it was
    with pytest.raises(DataError, match=r"other data|changed"):
        prepare(options(source, tmp_path / "s.h5"))


def test_changed_labels_are_noticed(scans, tmp_path, monkeypatch):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    lines = [f"p{i:03d}.nii.gz,{i % 2}" for i in range(6)]
    (source / "l.csv").write_text("path,label\n" + "\n".join(lines), encoding="utf-8")
    stopped(source / "l.csv", out, monkeypatch, 4)
    (source / "l.csv").write_text(
        "path,label\n" + "\n".join(line.replace(",0", ",2") for line in lines), encoding="utf-8"
    )
    prepare(options(source / "l.csv", out))
    assert set(open_data([out]).labels) == {1, 2}


def test_frames_of_a_file_are_all_there_after_a_stop(scans, tmp_path, monkeypatch):
    frames = np.stack([scans.body(seed=s) for s in range(4)], axis=-1)
    scans.nifti(tmp_path / "d" / "cine.nii.gz", frames)
    stopped(tmp_path / "d", tmp_path / "s.h5", monkeypatch, 2)
    assert prepare(options(tmp_path / "d", tmp_path / "s.h5")).volumes == 4
    assert [volume.id for volume in open_data([tmp_path / "s.h5"])] == [f"d/cine#{i}" for i in range(4)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_workers_changes_nothing(scans, tmp_path, workers):
    source = folder_of(scans, tmp_path / "d", 7)
    (source / "bad.nii.gz").write_bytes(b"")
    prepare(options(source, tmp_path / "a.h5"))
    prepare(options(source, tmp_path / "b.h5", workers=workers))
    assert content(tmp_path / "a.h5") == content(tmp_path / "b.h5")


def test_shards_make_up_the_whole_and_keep_subjects_together(scans, tmp_path):
    source = tmp_path / "d"
    for i in range(12):
        for visit in "ab":
            scans.nifti(
                source / f"sub-{i:02d}" / f"ses-{visit}" / f"sub-{i:02d}_T1w.nii.gz", scans.body(seed=i)
            )
    (source / "sub-03" / "bad.nii.gz").write_bytes(b"")
    prepare(options(source, tmp_path / "whole.h5"))
    shards = tmp_path / "shards"
    for part in ("1/3", "2/3", "3/3"):
        prepare(options(source, shards / "s.h5", part=part, spacing="median"))
    assert sorted(p.name for p in shards.glob("*.h5")) == ["s-1-of-3.h5", "s-2-of-3.h5", "s-3-of-3.h5"]
    whole, union = open_data([tmp_path / "whole.h5"]), open_data([shards])
    assert sorted(union.ids) == sorted(whole.ids)
    assert sorted(v.record.voxels for v in union) == sorted(v.record.voxels for v in whole)
    owners = [set(open_data([path]).subjects) for path in sorted(shards.glob("*.h5"))]
    assert sum(len(o) for o in owners) == 12
    assert (shards / "rejected.csv").read_text(encoding="utf-8").count("bad.nii.gz") == 1


def test_rows_of_arrays_are_found_again_in_shards_and_after_a_stop(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).integers(0, 255, (20, 6, 7, 8), dtype=np.uint8)
    source = tmp_path / "xmnist.npz"
    np.savez_compressed(source, train_images=rows, train_labels=np.arange(20)[:, None])
    for part in ("1/3", "2/3", "3/3"):
        prepare(options(source, tmp_path / "x" / "s.h5", part=part))
    stopped(source, tmp_path / "s.h5", monkeypatch, 7)
    prepare(options(source, tmp_path / "s.h5"))
    for path in (tmp_path / "x", tmp_path / "s.h5"):
        data = open_data([path])
        assert sorted(data.labels) == list(range(20))
        for volume in data:
            image = volume.read((0, 0, 0), (6, 7, 8))[0].numpy()
            np.testing.assert_allclose(image, rows[volume.label] / 255, atol=5e-4)


def test_a_shard_without_subjects_is_no_error(scans, tmp_path, capsys):
    folder_of(scans, tmp_path / "d", 1)
    statuses = [
        main(["prepare", str(tmp_path / "d"), "--out", str(tmp_path / "s.h5"), "--part", f"{i}/5"])
        for i in range(1, 6)
    ]
    assert statuses == [0] * 5
    assert len(list(tmp_path.glob("*.h5"))) == 1


def test_two_at_once_are_refused(scans, tmp_path):
    source = folder_of(scans, tmp_path / "d", 2)
    (tmp_path / "s.h5.partial").mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl,sys,time; f=open(sys.argv[1],'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
            "print('held', flush=True); time.sleep(60)",
            str(tmp_path / "s.h5.partial" / "lock"),
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(DataError, match="another ssl3d prepare"):
            prepare(options(source, tmp_path / "s.h5"))
    finally:
        holder.kill()
        holder.wait()
    assert prepare(options(source, tmp_path / "s.h5")).volumes == 2


def _die_on_three(task):
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 5:
        raise ValueError("five\nis odd")
    return task * 10, os.getpid()


def test_damaged_files_make_workers_say_nothing(scans, tmp_path, capfd):
    source = folder_of(scans, tmp_path / "d", 2)
    path = scans.itk(source / "cut.mha", scans.body((30, 30, 30)), compress=True)
    path.write_bytes(path.read_bytes()[:-500])
    assert prepare(options(source, tmp_path / "s.h5", workers=2)).rejected == 1
    said = capfd.readouterr()
    assert said.err == ""
    assert len(said.out.splitlines()) == 2


def test_a_part_that_the_disk_lost_is_made_again(scans, tmp_path, monkeypatch):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    stopped(source, out, monkeypatch, 4)
    first, second, *_ = sorted((tmp_path / "s.h5.partial").glob("*.part"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:1500])
    assert prepare(options(source, out)).volumes == 6


def test_a_worker_that_dies_loses_only_its_task():
    results = dict(pool.run(_die_on_three, iter(range(8)), workers=2))
    assert "SIGKILL" in results[3].reason
    assert "out of memory" in results[3].reason
    assert results[5].reason == "ValueError: five is odd"
    assert all(results[task][0] == task * 10 for task in (0, 1, 2, 4, 6, 7))
    assert os.getpid() not in {results[task][1] for task in (0, 1, 2)}


def test_tasks_are_drawn_only_when_a_worker_is_free():
    drawn = []

    def tasks():
        for i in range(40):
            drawn.append(i)
            yield i

    for seen, _ in enumerate(pool.run(_identity, tasks(), workers=3), start=1):
        assert len(drawn) - seen <= 3


def _identity(task):
    return task


def test_workers_end_when_their_parent_is_killed(tmp_path):
    code = (
        "import os, time\nfrom ssl3d.data.preparation import pool\n"
        "def f(task):\n return os.getpid()\n"
        "results = pool.run(f, iter([1, 2, 3]), 2)\nprint(next(results)[1], flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = _state(worker).split()[2]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlived its parent")


def _state(pid):
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read()


def test_the_cache_is_keyed_by_data_and_options(scans, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    source = folder_of(scans, tmp_path / "d", 3)
    first = prepare_cached([source], workers=0)
    stamp = first.stat().st_mtime_ns
    assert first.parent == tmp_path / "cache"
    assert prepare_cached([str(source)], workers=0) == first
    assert first.stat().st_mtime_ns == stamp
    assert prepare_cached([source], workers=0, normalize="unit") != first
    scans.nifti(source / "p009.nii.gz", scans.body(seed=9))
    changed = prepare_cached([source], workers=0)
    assert changed != first
    assert len(open_data([changed])) == 4
    assert len(open_data([source], workers=0)) == 4
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "a.nii.gz").write_bytes(b"")
    with pytest.raises(DataError, match="nothing usable"):
        prepare_cached([tmp_path / "e"], workers=0)


def test_a_cached_store_is_made_anew_where_names_are_read_otherwise(tmp_path, scans, monkeypatch):
    """A newer ssl3d may take two subjects for one; the cache must not go on with two."""
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    source = scans.nifti(tmp_path / "d" / "p_frame01.nii.gz", scans.body())
    first = prepare_cached([source], workers=0)
    monkeypatch.setattr("ssl3d.data.preparation.keys.FOUND", 0)
    assert prepare_cached([source], workers=0) != first


def listed_elsewhere(scans, tmp_path):
    """work/l.csv that names scans, a mask and a DICOM series of other folders."""
    for i in range(3):
        scans.nifti(tmp_path / "far" / f"p{i}.nii.gz", scans.body(seed=i))
    scans.nifti(tmp_path / "masks" / "m.nii.gz", np.ones((12, 14, 16), np.uint8))
    scans.dicom(tmp_path / "series", scans.body((8, 8, 4)), "1.2.3.4")
    (tmp_path / "work").mkdir()
    path = tmp_path / "work" / "l.csv"
    path.write_text(
        "path,label,mask\n../far/p0.nii.gz,0,../masks/m.nii.gz\n../far/p1.nii.gz,1,\n../series,1,\n",
        encoding="utf-8",
    )
    return path


def test_a_list_is_prepared_again_when_what_it_names_changes(scans, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    path = listed_elsewhere(scans, tmp_path)
    stores = [prepare_cached([path], workers=0)]
    before = open_data([stores[0]])[0].read()

    def changed():
        stores.append(prepare_cached([path], workers=0))
        return stores[-1] not in stores[:-1]

    scans.nifti(tmp_path / "far" / "p0.nii.gz", scans.body(seed=9))
    assert changed()
    assert (open_data([stores[-1]])[0].read() != before).any()
    scans.nifti(tmp_path / "masks" / "m.nii.gz", np.zeros((12, 14, 16), np.uint8))
    assert changed()
    slice_ = next((tmp_path / "series").iterdir())
    os.utime(slice_, ns=(1, 1))
    assert changed()
    (tmp_path / "work" / "dataset.json").write_text('{"name": "mine"}', encoding="utf-8")
    assert changed()
    path.write_text(path.read_text(encoding="utf-8") + "../far/p2.nii.gz,0,\n", encoding="utf-8")
    assert changed()


def test_a_list_is_not_prepared_again_for_what_lies_beside_it(scans, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    path = listed_elsewhere(scans, tmp_path)
    first = prepare_cached([path], workers=0)
    for name in ("results/a-01234567.json", "runs/x/encoder/encoder.json", "s.h5", "t.csv", "n.nii.gz"):
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / name).write_bytes(b"{}")
    scans.nifti(tmp_path / "far" / "p2.nii.gz", scans.body(seed=7))  # not listed
    os.utime(path, ns=(1, 1))
    assert prepare_cached([path], workers=0) == first
    assert capsys.readouterr().err.count("preparing ") == 1


def test_the_voxels_of_a_header_apart_count(scans, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    scans.itk(tmp_path / "a.mhd", scans.body())
    (tmp_path / "l.csv").write_text("path\na.mhd\n", encoding="utf-8")
    for source in (tmp_path / "a.mhd", tmp_path / "l.csv"):
        first = prepare_cached([source], workers=0)
        assert prepare_cached([source], workers=0) == first
        scans.itk(tmp_path / "b.mhd", scans.body(seed=3 + len(source.name)))
        (tmp_path / "b.raw").replace(tmp_path / "a.raw")
        assert prepare_cached([source], workers=0) != first


def test_what_the_toolkit_writes_into_a_folder_is_neither_read_nor_counted(scans, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    source = folder_of(scans, tmp_path / "d", 2)
    (source / "boxes.json").write_text("{}", encoding="utf-8")
    first = prepare_cached([source], workers=0)
    picture = np.random.default_rng(0).integers(0, 255, (20, 20), np.uint8)
    for name in ("runs/r/pictures/p.png", "results/a-embeddings.png", "tuned/curves.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(source / name)
    for name in ("runs/r/config.yaml", "runs/r/metrics.jsonl", "results/table.txt",
                 "results/a-0123abcd.json", "tuned/.jobs/x", "rejected.csv", "notes.txt"):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"")
    assert prepare_cached([source], workers=0) == first
    assert len(find([source], Wanted()).scans) == 2
    (source / "boxes.json").write_text("{ }", encoding="utf-8")
    assert prepare_cached([source], workers=0) != first


def test_a_mask_outside_the_folder_counts(scans, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    source = folder_of(scans, tmp_path / "d", 2)
    name = sorted(path.name for path in source.iterdir())[0]
    scans.nifti(tmp_path / "m.nii.gz", np.ones((12, 14, 16), np.uint8))
    (source / "l.csv").write_text(f"path,mask\n{name},../m.nii.gz\n", encoding="utf-8")
    first = prepare_cached([source], workers=0)
    os.utime(tmp_path / "m.nii.gz", ns=(1, 1))
    assert prepare_cached([source], workers=0) != first


def test_the_estimate_comes_before_the_work_ends(scans, tmp_path, capsys):
    folder_of(scans, tmp_path / "d", 3)
    assert main(["prepare", str(tmp_path / "d"), "--out", str(tmp_path / "s.h5")]) == 0
    first, last = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("3 scans with ")
    assert "of disk" in first
    assert last.startswith(f"{tmp_path / 's.h5'}: 3 volumes of 3 subjects, 0 rejected")


@pytest.mark.long
def test_all_of_the_real_hippocampus_is_taken(real_data, tmp_path):
    summary = prepare(options(real_data / "hippocampus", tmp_path / "h.h5", workers=2))
    assert (summary.volumes, summary.subjects, summary.rejected) == (200, 200, 0)
    data = open_data([tmp_path / "h.h5"])
    assert data.has_mask.all()
    assert np.median(data.shapes[:, 1:], axis=0).tolist() == pytest.approx([35, 50, 36], abs=2)
