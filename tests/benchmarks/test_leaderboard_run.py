"""A leaderboard's jobs are done once each, in order, whatever stops or fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssl3d.errors import UsageError
from ssl3d_benchmarks import leaderboard_run, locks
from ssl3d_benchmarks.leaderboard_run import Runner, RunOptions, run, worker
from ssl3d_benchmarks.leaderboard_suite import Job

# Stands in for `ssl3d`: writes down what it was asked, then makes a file, fails, or waits.
FAKE = """
import os, signal, sys, time
from pathlib import Path
log, verb, *rest = Path(sys.argv[1]), *sys.argv[2:]
def note(text):
    with log.open("a") as file:
        file.write(text + "\\n")
note(" ".join([verb, *rest]))
if verb == "make":
    Path(rest[0]).touch()
elif verb == "fail":
    print("ssl3d: there is no " + rest[0])
    sys.exit(2)
elif verb == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif verb == "wait":
    def stop(number, frame):
        note("saved")
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    note("waiting")
    time.sleep(60)
elif verb == "slow":
    time.sleep(0.05)
"""


class Jobs:
    """What a runner wants of a plan."""

    def __init__(self, *jobs):
        self.jobs = list(jobs)
        self.suite = type("Suite", (), {"name": "mine"})()


def job(name, *words, needs=(), product=None, missing="", inputs=(), kind="score"):
    return Job(
        name, kind, lambda: [str(word) for word in words], tuple(needs), product, missing, tuple(inputs)
    )


@pytest.fixture
def marks(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE, encoding="utf-8")
    front = (sys.executable, str(script), str(tmp_path / "said"))
    monkeypatch.setattr(leaderboard_run, "FRONT", front)
    monkeypatch.setattr(locks, "WAIT", 0.05)
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def said(marks):
    path = marks.parent / "said"
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def test_what_is_done_is_not_done_again(marks, tmp_path, capsys):
    made = tmp_path / "made"
    jobs = Jobs(job("prepare:a", "make", made, product=made), job("score:a", "say", 1, needs=["prepare:a"]))
    assert Runner(jobs, marks).run() == 0
    assert said(marks) == [f"make {made}", "say 1"]
    assert Runner(jobs, marks).run() == 0
    assert len(said(marks)) == 2
    assert "2 jobs, 2 done before" in capsys.readouterr().out
    assert not list(marks.glob("*.lock"))


def test_another_command_or_another_input_is_done_again(marks, tmp_path):
    card = tmp_path / "card"
    card.write_text("one", encoding="utf-8")
    assert Runner(Jobs(job("score:a", "say", 1, inputs=[card])), marks).run() == 0
    assert Runner(Jobs(job("score:a", "say", 2, inputs=[card])), marks).run() == 0
    card.write_text("two", encoding="utf-8")
    assert Runner(Jobs(job("score:a", "say", 2, inputs=[card])), marks).run() == 0
    assert said(marks) == ["say 1", "say 2", "say 2"]


def test_a_failure_is_told_and_stops_only_what_needs_it(marks, capsys):
    jobs = Jobs(
        job("score:a", "fail", "file"),
        job("score:b", "say", "b", needs=["score:a"]),
        job("score:c", "say", "c", needs=["score:b"]),
        job("score:d", "say", "d"),
    )
    assert Runner(jobs, marks).run() == 1
    assert said(marks) == ["fail file", "say d"]
    out = capsys.readouterr().out
    assert "failed score:a: there is no file; log: " in out
    assert "not done score:b" in out
    assert "not done score:c" in out
    assert "1 of 4 jobs done" in out
    # The next time it is tried again.
    jobs.jobs[0] = job("score:a", "say", "a")
    assert Runner(jobs, marks).run() == 0
    assert said(marks)[2:] == ["say a", "say b", "say c"]


def test_a_job_that_is_killed_has_failed(marks, capsys):
    assert Runner(Jobs(job("score:a", "die")), marks).run() == 1
    assert "killed by signal 9 (out of memory?)" in capsys.readouterr().out


def test_a_job_that_leaves_nothing_has_failed(marks, tmp_path, capsys):
    assert Runner(Jobs(job("prepare:a", "say", product=tmp_path / "none")), marks).run() == 1
    assert "ended well, but" in capsys.readouterr().out


def test_missing_data_is_skipped_with_all_that_needs_it(marks, capsys):
    jobs = Jobs(
        job("prepare:a", "say", product=marks / "x", missing="data/a", kind="prepare"),
        job("score:a", "say", "a", needs=["prepare:a"]),
        job("score:b", "say", "b"),
    )
    assert Runner(jobs, marks).run() == 0
    assert said(marks) == ["say b"]
    out = capsys.readouterr().out
    assert "skipped prepare:a: data/a is missing" in out
    assert "skipped score:a: data/a is missing" in out


def test_the_lock_of_a_dead_worker_is_broken(marks):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = marks / "score__a.lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": dead.pid}), encoding="utf-8")
    assert Runner(Jobs(job("score:a", "say", "a")), marks).run() == 0
    assert said(marks) == ["say a"]


def test_the_lock_of_a_silent_worker_elsewhere_is_broken_and_that_of_a_live_one_is_not(marks):
    lock = marks / "score__a.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}), encoding="utf-8")
    runner = Runner(Jobs(job("score:a", "say", "a")), marks)
    assert runner._free() is None
    long_ago = time.time() - 2 * locks.SILENT
    os.utime(lock, (long_ago, long_ago))
    assert runner._free().name == "score:a"


def test_a_job_in_the_hands_of_another_is_waited_for(marks, monkeypatch, capsys):
    lock = marks / "score__a.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}), encoding="utf-8")
    mine = job("score:a", "say", "a")

    def other_is_done(seconds):
        mark = {"state": "done", "digest": mine.digest()}
        (marks / "score__a.json").write_text(json.dumps(mark), encoding="utf-8")

    monkeypatch.setattr(leaderboard_run.time, "sleep", other_is_done)
    assert Runner(Jobs(mine, job("score:b", "say", "b", needs=["score:a"])), marks).run() == 0
    assert said(marks) == ["say b"]
    assert "in the hands of others" in capsys.readouterr().out


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_leaderboard_run import Jobs, job
from ssl3d_benchmarks import leaderboard_run, locks
leaderboard_run.FRONT, locks.WAIT = {front!r}, 0.05
jobs = Jobs(*[job(f"score:{{n}}", {words}) for n in range({count})])
sys.exit(leaderboard_run.Runner(jobs, Path({marks!r})).run())
"""


def started(marks, count, words):
    text = WORKER.format(
        here=str(Path(__file__).parent),
        front=leaderboard_run.FRONT,
        words=words,
        count=count,
        marks=str(marks),
    )
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


def test_workers_share_the_jobs_and_do_each_once(marks):
    workers = [started(marks, 12, '"slow", n') for _ in range(3)]
    assert [w.wait(60) for w in workers] == [0, 0, 0]
    assert sorted(said(marks)) == sorted(f"slow {n}" for n in range(12))


def test_a_signal_reaches_the_job_which_saves(marks):
    worker = started(marks, 2, '"wait", n')
    deadline = time.time() + 60
    while "waiting" not in said(marks):
        assert time.time() < deadline
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    out, _ = worker.communicate(timeout=60)
    assert worker.returncode == 128 + signal.SIGTERM
    assert said(marks) == ["wait 0", "waiting", "saved"]
    assert "the same command goes on where it was" in out
    assert not list(marks.glob("*.lock"))


def test_after_kill_9_the_job_is_done_again(marks):
    worker = started(marks, 1, '"wait", n')
    deadline = time.time() + 60
    while "waiting" not in said(marks):
        assert time.time() < deadline
        time.sleep(0.05)
    worker.kill()
    worker.wait()
    assert list(marks.glob("*.lock"))
    while sys.platform.startswith("linux") and "saved" not in said(marks):  # the job went with its worker
        assert time.time() < deadline
        time.sleep(0.05)
    assert Runner(Jobs(job("score:0", "say", "again")), marks).run() == 0
    assert said(marks)[-1] == "say again"


def test_a_dry_run_shows_the_commands_and_makes_nothing(tmp_path, capsys):
    options = RunOptions("quick", out=tmp_path / "out", dry_run=True)
    assert run(options) == 0
    out = capsys.readouterr().out
    assert "measure:simclr: ssl3d pretrain --proxy simclr --data phantoms:60" in out
    assert "ssl3d linear-probe untrained=scratch:resnet10:width=16 --data phantoms:60" in out
    assert not (tmp_path / "out").exists()
    options = RunOptions("quick", out=tmp_path / "out", dry_run=True, seeds=(7, 3), only=("simclr",))
    run(options)
    jobs = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [job for job in jobs if job.startswith("pretrain")] == ["pretrain:simclr:7", "pretrain:simclr:3"]
    assert worker(options)[-3:] == ["--seeds", "7", "3"]


def test_a_worker_in_the_queue_runs_the_same_without_slurm(tmp_path):
    options = RunOptions(
        "quick", tmp_path, data_root=tmp_path, only=("a", "b"), slurm=4, launch="torchrun -m"
    )
    words = worker(options)
    assert words[:3] == ["leaderboard", "run", "quick"]
    assert words[words.index("--only") + 1 : words.index("--only") + 3] == ["a", "b"]
    assert words[words.index("--launch") + 1] == "torchrun -m"
    assert "--slurm" not in words


def test_wrong_options_are_one_clear_line(tmp_path):
    with pytest.raises(UsageError, match=r"--data-root .*nowhere: no such folder"):
        run(RunOptions("quick", out=tmp_path, data_root=tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--out .*file: (Not a directory|File exists)"):
        run(RunOptions("quick", out=tmp_path / "file"))
    with pytest.raises(ValueError, match=r"seeds are \(0, -1\)"):
        RunOptions("quick", seeds=(0, -1))
    with pytest.raises(ValueError, match="cluster"):
        RunOptions("quick", cluster="pbs")
