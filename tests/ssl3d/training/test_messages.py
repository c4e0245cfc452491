"""What a run says before it trains, while it trains, and when the machine fails it."""

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssl3d.errors import TransientError, UsageError
from ssl3d.training import run_folder
from ssl3d.training.build import size_notes
from ssl3d.training.device import check_descriptors
from ssl3d.training.monitor import Log, Monitor
from ssl3d.training.options import request_of
from ssl3d.training.run_folder import plain_errors, settle, write_config


def plan_of(*words):
    return request_of(["--proxy", "mae", *words]).plan


def test_crops_and_batches_larger_than_the_data_are_told():
    data = SimpleNamespace(shapes=[(1, 20, 40, 40), (1, 30, 64, 64), (1, 64, 64, 64)])
    assert size_notes(plan_of("--mae.crop", "32", "32", "32", "--batch-size", "4"), data) == [
        "note: --mae.crop 32 32 32 is larger than 2 of 3 volumes (median 30 x 64 x 64 voxels): give a "
        "smaller one",
        "note: --batch-size 4 is larger than the number of volumes, 3: a batch holds some of them twice",
    ]
    assert size_notes(plan_of("--mae.crop", "24", "32", "32", "--batch-size", "3"), data) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_line_of_progress_fits_and_keeps_speed_and_time(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Terminal()
    mains = ["sorting/kendall_tau", "mae/correlation"]
    monitor = Monitor(tmp_path, 0, 100, 10, mains, Log(stream=screen))
    record = {"step": 100, "loss": 1.25, "seconds": 0.5, "volumes_per_s": 3.5, "waiting": 0.1}
    for name in mains:
        record |= {name: 0.5, f"holdout/{name}": 0.25}
    monitor.step(record)
    line = screen.getvalue().lstrip("\r").rstrip()
    monitor.close()
    assert len(line) < columns and "step 100/100" in line and "3.5 volumes/s" in line and " left" in line
    if columns == 200:  # each score is told apart
        assert "held out sorting/kendall_tau 0.250" in line and "held out mae/correlation 0.250" in line
        assert "waiting 10 %" in line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device; {state}: make room"),
        (OSError(errno.EMFILE, "x"), "Too many open files; {state}: raise `ulimit -n`"),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."),
            "has died.*fewer --workers",
        ),
        (RuntimeError("Too many open files. Communication with"), "ulimit -n"),
        (
            RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]"),
            "another rank has ended.*see",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            "out of memory.*smaller --batch",
        ),
        (MemoryError(), "out of memory.*smaller --batch"),
    ],
)
def test_a_failure_of_the_machine_is_one_line(tmp_path, error, said):
    for state, more in (("nothing is saved", "start again"), ("checkpoints are intact", "--resume")):
        with (
            pytest.raises(TransientError, match=said.format(state=state) + f".*{more}"),
            plain_errors(tmp_path),
        ):
            raise error
        (tmp_path / "config.yaml").write_text("", encoding="utf-8")


def test_any_other_error_keeps_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake"), plain_errors(tmp_path):
        raise RuntimeError("a mistake")


FABRIC = SimpleNamespace(is_global_zero=True, broadcast=lambda value: value)


def test_a_first_write_that_fails_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    out = tmp_path / "run"
    plan = plan_of("--out", str(out))

    def fail(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_whole", fail)
        with pytest.raises(OSError):
            write_config(settle(FABRIC, plan, None), plan)
    assert not out.exists()
    out.mkdir()
    (out / ".config.yaml.12ab-99-cd.tmp").write_text("half", encoding="utf-8")  # of one that was killed
    write_config(settle(FABRIC, plan, None), plan)
    assert (out / "config.yaml").is_file()
    with pytest.raises(UsageError, match="is not empty"):
        settle(FABRIC, plan, None)


def test_too_few_open_files_are_told_before_training(monkeypatch):
    limits = {"now": (24, 24)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, now: limits.update(now=now))
    with pytest.raises(UsageError, match="2 processes that read need 256 open files, but the limit is 24"):
        check_descriptors(2)
    check_descriptors(0)
    limits["now"] = (24, 4096)
    check_descriptors(2)
    assert limits["now"] == (256, 4096)


def training(out, **environment):
    """Start a run with one worker, and wait for its first steps."""
    words = ["--proxy", "simclr", "--data", "phantoms:20", "--encoder", "resnet10", "--resnet10.width", "4"]
    words += ["--steps", "2000", "--batch-size", "4", "--device", "cpu", "--workers", "1"]
    words += ["--precision", "32", "--memory-format", "contiguous", "--eval-every", "-1"]
    run = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ssl3d",
            "pretrain",
            *words,
            "--simclr.crop",
            "16",
            "16",
            "16",
            "--out",
            str(out),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    metrics = out / "metrics.jsonl"
    while run.poll() is None and not (metrics.is_file() and metrics.read_text(encoding="utf-8")):
        time.sleep(0.1)
    return run


@pytest.mark.long
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the worker in /proc")
def test_a_killed_worker_ends_a_run_in_one_line(tmp_path):
    out = tmp_path / "run"
    run = training(out)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="utf-8").split()
    readers = [
        pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(int(readers[-1]), signal.SIGKILL)
    error = run.communicate(timeout=200)[1]
    assert run.returncode == 3 and error.count("\n") == 1, error
    assert "a process that reads data has died" in error and f"--resume {out}" in error


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="tensors travel by sockets in the folder")
def test_an_emptied_folder_of_temporary_files_ends_a_run_in_one_line(tmp_path):
    """Those who tidy up do so; the worker, which hears nothing of it, must not keep the program alive."""
    out = tmp_path / "run"
    with tempfile.TemporaryDirectory(prefix="t") as folder:  # the names of sockets are short
        run = training(out, TMPDIR=folder)
        for socket in Path(folder).glob("pymp-*/*"):
            socket.unlink()
        error = run.communicate(timeout=200)[1]
    line, *rest = error.splitlines()  # Python laments its missing socket once more as it ends
    assert run.returncode == 3 and not any("ssl3d" in more for more in rest), error
    assert f"has something emptied {folder}" in line and f"--resume {out}" in line
