"""A fault of the machine refuses no scan and loses nothing; two calls at once do not disturb each other."""

from __future__ import annotations

import csv
import errno
import faulthandler
import io
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from ssl3d.cli import main
from ssl3d.data.open import open_data
from ssl3d.data.preparation import parts, pool, work
from ssl3d.data.preparation.prepare import PrepareOptions, prepare, prepare_cached
from ssl3d.data.scans import read
from ssl3d.data.store import writer
from ssl3d.data.store.record import Record
from ssl3d.errors import TransientError, is_transient


def folder_of(scans, root, count=3):
    for i in range(count):
        scans.nifti(root / f"p{i}.nii.gz", scans.body(seed=i))
    return root


def options(source, out, workers=0):
    return PrepareOptions((str(source),), str(out), workers=workers)


def failing(monkeypatch, error, name, times):
    """Lets the reading of one scan fail some times, and counts how often it is read."""
    real, calls = work.process, []

    def process(task):
        if task.scan.source == name:
            calls.append(1)
            if len(calls) <= times:
                raise error
        return real(task)

    monkeypatch.setattr(work, "process", process)
    return calls


FAULTS = [
    MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"), ConnectionResetError(errno.ECONNRESET, "reset"),
    TimeoutError(errno.ETIMEDOUT, "timed out"),
]  # fmt: skip


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__ + str(error)[:10])
def test_a_fault_that_passes_costs_nothing(scans, tmp_path, monkeypatch, error):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    calls = failing(monkeypatch, error, "p1.nii.gz", times=1)
    assert prepare(options(source, out)).volumes == 3
    assert len(calls) == 2
    assert not (tmp_path / "rejected.csv").exists()


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__ + str(error)[:10])
def test_a_fault_that_stays_ends_the_call_and_is_no_verdict(scans, tmp_path, monkeypatch, capsys, error):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    with monkeypatch.context() as patch:
        failing(patch, error, "p1.nii.gz", times=2)
        assert main(["prepare", str(source), "--out", str(out), "--workers", "0"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "p1.nii.gz" in line
    assert "s.h5.partial" in line
    assert not out.exists()
    assert len(list((tmp_path / "s.h5.partial").glob("*.part"))) == 2
    assert prepare(options(source, out)).volumes == 3
    assert not (tmp_path / "rejected.csv").exists()


def test_a_fault_of_reading_is_no_fault_of_the_file(scans, tmp_path, monkeypatch):
    """The readers raise nearly anything on damaged files: this must not be taken for it."""
    scans.nifti(tmp_path / "a.nii.gz", scans.body())
    for error in FAULTS:

        def fail(files, most, error=error):
            raise error

        form = read.format_by_suffix(tmp_path / "a.nii.gz")
        monkeypatch.setitem(
            read._BY_SUFFIX, ".nii.gz", read.dataclasses.replace(form, read=fail, header=fail)
        )
        with pytest.raises(type(error)):
            read.read([tmp_path / "a.nii.gz"])
        monkeypatch.undo()


def test_no_descriptor_left_is_no_fault_of_the_file(scans, tmp_path):
    import resource

    scans.itk(tmp_path / "a.nrrd", scans.body())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    read.read([tmp_path / "a.nrrd"])
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            while True:
                held.append(open(os.devnull, "rb"))  # noqa: SIM115
        assert caught.value.errno == errno.EMFILE
        with pytest.raises(OSError) as caught:
            read.read([tmp_path / "a.nrrd"])
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert is_transient(caught.value)


def test_a_killed_worker_costs_no_scan(scans, tmp_path):
    source, out = folder_of(scans, tmp_path / "d", count=1), tmp_path / "s.h5"
    noise = np.random.default_rng(0)
    for i in range(16):
        voxels = scans.body((64, 64, 48), seed=i) + noise.integers(0, 50, (64, 64, 48), dtype=np.int16)
        scans.nifti(source / f"q{i:02d}.nii.gz", voxels)
    words = [sys.executable, "-m", "ssl3d", "prepare", str(source), "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    until = time.monotonic() + 60
    while len(list((tmp_path / "s.h5.partial").glob("*.part"))) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.002)
    with open(children, encoding="ascii") as file:
        os.kill(int(file.read().split()[0]), signal.SIGKILL)
    assert process.wait() == 0
    assert len(open_data([out])) == 17
    assert not (tmp_path / "rejected.csv").exists()


def _crash_or_answer(task):
    kind, marker = task
    if kind and not (marker and os.path.exists(marker)):
        if marker:
            with open(marker, "w", encoding="ascii"):
                pass
        if kind == "error":
            raise OSError(errno.EIO, "Input/output error")
        faulthandler.disable()  # pytest's would print
        os.kill(os.getpid(), getattr(signal, kind))
    return "made"


def test_what_fails_twice_is_told_from_what_failed_once(tmp_path):
    tasks = [("", ""), ("SIGSEGV", ""), ("SIGKILL", ""), ("error", ""), ("SIGSEGV", str(tmp_path / "a")),
             ("SIGKILL", str(tmp_path / "b")), ("error", str(tmp_path / "c"))]  # fmt: skip
    results = dict(pool.run(_crash_or_answer, iter(tasks), workers=2))
    told = [
        "made"
        if not isinstance(results[task], pool.Died)
        else (results[task].transient, results[task].crashed)
        for task in tasks
    ]
    assert told == ["made", (False, True), (True, False), (True, False), "made", "made", "made"]


def test_a_reader_that_crashes_on_a_file_twice_costs_that_file(scans, tmp_path, monkeypatch):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    real = work.process

    def process(task):
        if task.scan.source == "p1.nii.gz":
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        return real(task)

    monkeypatch.setattr(work, "process", process)
    summary = prepare(options(source, out, workers=1))
    assert (summary.volumes, summary.rejected) == (2, 1)
    assert "SIGSEGV" in (tmp_path / "rejected.csv").read_text(encoding="utf-8")


def test_a_median_is_not_taken_without_a_scan(scans, tmp_path, monkeypatch):
    source = folder_of(scans, tmp_path / "d")

    def spacing(scan):
        if scan.source == "p1.nii.gz":
            raise OSError(errno.EIO, "Input/output error")
        return (1.0, 1.0, 1.0)

    monkeypatch.setattr(work, "spacing_of_scan", spacing)
    with pytest.raises(TransientError, match=r"p1\.nii\.gz"):
        prepare(PrepareOptions((str(source),), str(tmp_path / "s.h5"), workers=0, spacing="median"))


class FullAfter(io.FileIO):
    """File on a disk that has room for so many bytes, and that writes a part of what does not fit."""

    room = 0

    def write(self, content):
        written = super().write(bytes(content)[: FullAfter.room])
        FullAfter.room -= written
        if len(content) and not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written


def part_of(folder, seed):
    image = np.random.default_rng(seed).normal(size=(1, 40, 40, 40))
    return writer.write_part(folder, f"{seed}", Record(f"r{seed}", "d", f"p{seed}"), image)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_disk_that_fills_ends_no_process(tmp_path, monkeypatch, share):
    """HDF5 raises at closing, or dies by SIGSEGV: at every place where the disk may fill."""
    sizes = [part_of(tmp_path / "whole", seed).stat().st_size for seed in range(3)]
    writer.assemble(tmp_path / "whole", tmp_path / "s.h5", {}, [])
    size = (tmp_path / "s.h5").stat().st_size
    monkeypatch.setattr(writer, "open", lambda path, *_, **__: FullAfter(path, "w+"), raising=False)
    FullAfter.room = int(share * sizes[0])
    with pytest.raises(OSError, match="No space left"):
        part_of(tmp_path / "parts", 0)
    FullAfter.room = int(share * size)
    with pytest.raises(OSError, match="No space left"):
        writer.assemble(tmp_path / "whole", tmp_path / "t.h5", {}, [])
    assert not list((tmp_path / "parts").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "s.h5", "whole"]
    FullAfter.room = 10**9
    writer.assemble(tmp_path / "whole", tmp_path / "t.h5", {}, [])
    assert open_data([tmp_path / "t.h5"]).digest() == open_data([tmp_path / "s.h5"]).digest()


def test_too_little_room_for_the_store_is_seen_before_it_is_begun(scans, tmp_path, monkeypatch):
    from ssl3d.data.preparation import prepare as module

    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    with monkeypatch.context() as patch:
        real = module.shutil.disk_usage

        def usage(path):
            return real(path)._replace(free=20_000)

        patch.setattr(module.shutil, "disk_usage", usage)
        with pytest.raises(TransientError, match=r"the store needs .* kB, and 20 kB are free"):
            prepare(options(source, out))
    assert len(list((tmp_path / "s.h5.partial").glob("*.part"))) == 3
    assert prepare(options(source, out)).volumes == 3


def test_tables_lose_no_line_of_shards_that_end_together(tmp_path):
    children = []
    for k in range(4):
        child = os.fork()
        if not child:
            for turn in range(10):
                rows = [(f"b{k}-{i}.nii", f"turn {turn}") for i in range(50)]
                parts.write_beside(tmp_path / f"s-{k + 1}-of-4.h5", "rejected.csv", rows)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    with open(tmp_path / "rejected.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["path"] for row in rows}) == len(rows) == 200
    assert [path.name for path in tmp_path.iterdir()] == ["rejected.csv"]


def test_what_a_killed_call_left_goes_with_the_next(scans, tmp_path):
    source, out = folder_of(scans, tmp_path / "d"), tmp_path / "s.h5"
    left = tmp_path / ".s.h5.123-abcdef01.tmp"
    others = tmp_path / ".t.h5.123-abcdef01.tmp"
    for path in (left, others):
        path.write_bytes(b"1" * 1000)
    prepare(options(source, out))
    assert not left.exists()
    left.write_bytes(b"1" * 1000)
    (tmp_path / "s.h5.partial").mkdir()
    assert prepare(options(source, out)).reused
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "d", "s.h5"]


def test_a_store_of_the_cache_that_another_makes_is_waited_for(scans, tmp_path, monkeypatch, capsys):
    source = folder_of(scans, tmp_path / "d")
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    wanted = prepare_cached([source])
    wanted.unlink()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom pathlib import Path\n"
         "from ssl3d.data.preparation.parts import locked\nout = Path(sys.argv[1])\n"
         "with locked(out.with_name(out.name + '.partial'), out):\n print('held', flush=True)\n input()\n",
         str(wanted)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    capsys.readouterr()
    timer = threading.Timer(1.5, lambda: holder.communicate("\n"))
    timer.start()
    assert prepare_cached([source]) == wanted
    timer.join()
    assert "waiting for another process that prepares" in capsys.readouterr().err
    assert len(open_data([wanted])) == 3
