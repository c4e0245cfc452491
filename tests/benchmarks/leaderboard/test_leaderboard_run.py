"""A leaderboard's jobs are done once each, in order, whatever stops or fails."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ssl3d.api import locks
from ssl3d.errors import UsageError
from ssl3d_benchmarks.leaderboard.suite import run as suite_run
from ssl3d_benchmarks.leaderboard.suite import runner
from ssl3d_benchmarks.leaderboard.suite.commands import Places
from ssl3d_benchmarks.leaderboard.suite.jobs import Job
from ssl3d_benchmarks.leaderboard.suite.plan import SuitePlan
from ssl3d_benchmarks.leaderboard.suite.provenance import Provenance, options_in
from ssl3d_benchmarks.leaderboard.suite.run import RunOptions, Worker, run, submit
from ssl3d_benchmarks.leaderboard.suite.runner import Runner
from ssl3d_benchmarks.leaderboard.suite.suite import load_suite

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
elif verb == "wait" or any("ONCE" in word for word in rest) and not Path(f"{log}.pids").exists():
    def stop(number, frame):
        note("saved")
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    Path(f"{log}.pids").write_text(f"{os.getpid()} {os.getppid()}")
    note("waiting")
    time.sleep(60)
elif verb == "slow":
    time.sleep(0.05)
elif verb == "prepare":
    Path(rest[rest.index("--out") + 1]).touch()
elif verb == "pretrain":
    if "FAIL" in rest:
        print("ssl3d: there is no FAIL")
        sys.exit(2)
    folder = Path(rest[rest.index("--resume" if "--resume" in rest else "--out") + 1])
    (folder / "encoder").mkdir(parents=True, exist_ok=True)
    card = '{"compute": {"flops_per_step": FLOPS}}'.replace("FLOPS", os.environ.get("FLOPS", "100"))
    (folder / "encoder" / "encoder.json").write_text(card)
elif any("FAIL" in word for word in rest):
    print("ssl3d: no such weights")
    sys.exit(2)
"""


def runner_of(marks, *jobs):
    """A runner of some jobs."""
    return Runner("mine", list(jobs), marks, plugin_files=["net.py"])


def job(name, *words, needs=(), product=None, missing="", inputs=(), kind="score", after=()):
    return Job(
        name, kind, lambda: [str(word) for word in words], tuple(needs), product, missing, tuple(inputs),
        tuple(after),
    )  # fmt: skip


@pytest.fixture
def marks(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE, encoding="utf-8")
    front = (sys.executable, str(script), str(tmp_path / "said"))
    monkeypatch.setattr(runner, "FRONT", front)
    monkeypatch.setattr(locks, "WAIT", 0.05)
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def said(marks):
    path = marks.parent / "said"
    return path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []


def test_the_plugins_that_a_suite_names_are_known_to_its_jobs(marks, monkeypatch, tmp_path):
    words = "import os; open(os.environ['WHERE'], 'w').write(os.environ['SSL3D_PLUGINS'])"
    monkeypatch.setattr(runner, "FRONT", (sys.executable, "-c", words))
    monkeypatch.setenv("WHERE", str(tmp_path / "told"))
    monkeypatch.setenv("SSL3D_PLUGINS", "own.py")
    assert runner_of(marks, job("score:a", "go")).run() == 0
    assert (tmp_path / "told").read_text() == "own.py,net.py"


def test_what_is_done_is_not_done_again(marks, tmp_path, capsys):
    made = tmp_path / "made"
    jobs = [job("prepare:a", "make", made, product=made), job("score:a", "say", 1, needs=["prepare:a"])]
    assert runner_of(marks, *jobs).run() == 0
    assert said(marks) == [f"make {made}", "say 1"]
    assert runner_of(marks, *jobs).run() == 0
    assert len(said(marks)) == 2
    assert "2 jobs, 2 done before" in capsys.readouterr().out
    assert not list(marks.glob("*.lock"))


def test_another_command_or_another_input_is_done_again(marks, tmp_path):
    card = tmp_path / "card"
    card.write_text("one", encoding="utf-8")
    assert runner_of(marks, job("score:a", "say", 1, inputs=[card])).run() == 0
    assert runner_of(marks, job("score:a", "say", 2, inputs=[card])).run() == 0
    card.write_text("two", encoding="utf-8")
    assert runner_of(marks, job("score:a", "say", 2, inputs=[card])).run() == 0
    assert said(marks) == ["say 1", "say 2", "say 2"]


def test_a_failure_is_told_and_stops_only_what_needs_it(marks, capsys):
    jobs = [
        job("score:a", "fail", "file"),
        job("score:b", "say", "b", needs=["score:a"]),
        job("score:c", "say", "c", needs=["score:b"]),
        job("score:d", "say", "d"),
    ]
    assert runner_of(marks, *jobs).run() == 1
    assert said(marks) == ["fail file", "say d"]
    out = capsys.readouterr().out
    assert "failed score:a: there is no file; log: " in out
    assert "not done score:b" in out
    assert "not done score:c" in out
    assert "1 of 4 jobs done" in out
    # The next time it is tried again.
    jobs[0] = job("score:a", "say", "a")
    assert runner_of(marks, *jobs).run() == 0
    assert said(marks)[2:] == ["say a", "say b", "say c"]


def test_a_job_that_is_killed_has_failed(marks, capsys):
    assert runner_of(marks, job("score:a", "die")).run() == 1
    assert "killed by signal 9 (out of memory?)" in capsys.readouterr().out


def test_a_full_disk_ends_a_job_and_names_no_file_that_it_does_not_know(marks, monkeypatch, capsys):
    worker = runner_of(marks, job("score:a", "say"))

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker.child, "run", full)
    assert worker.run() == 1
    assert worker.failed == {"score:a": "No space left on device"}


def test_a_job_that_leaves_nothing_has_failed(marks, tmp_path, capsys):
    assert runner_of(marks, job("prepare:a", "say", product=tmp_path / "none")).run() == 1
    assert "ended well, but" in capsys.readouterr().out


def test_missing_data_is_skipped_with_all_that_needs_it(marks, capsys):
    jobs = [
        job("prepare:a", "say", product=marks / "x", missing="data/a", kind="prepare"),
        job("score:a", "say", "a", needs=["prepare:a"]),
        job("score:b", "say", "b"),
    ]
    assert runner_of(marks, *jobs).run() == 0
    assert said(marks) == ["say b"]
    out = capsys.readouterr().out
    assert "skipped prepare:a: data/a is missing" in out
    assert "skipped score:a: data/a is missing" in out


def test_the_lock_of_a_dead_worker_is_broken(marks):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = marks / "score__a.lock"
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": dead.pid}), encoding="utf-8")
    assert runner_of(marks, job("score:a", "say", "a")).run() == 0
    assert said(marks) == ["say a"]


def test_the_lock_of_a_silent_worker_elsewhere_is_broken_and_that_of_a_live_one_is_not(marks):
    lock = marks / "score__a.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1}), encoding="utf-8")
    runner = runner_of(marks, job("score:a", "say", "a"))
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

    monkeypatch.setattr(runner.time, "sleep", other_is_done)
    assert runner_of(marks, mine, job("score:b", "say", "b", needs=["score:a"])).run() == 0
    assert said(marks) == ["say b"]
    assert "other workers do the rest" in capsys.readouterr().out


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_leaderboard_run import job
from ssl3d.api import locks
from ssl3d_benchmarks.leaderboard.suite import runner
runner.FRONT, locks.WAIT = {front!r}, 0.05
jobs = [*[job(f"score:{{n}}", {words}) for n in range({count})]]
sys.exit(runner.Runner("mine", jobs, Path({marks!r})).run())
"""


def started(marks, count, words):
    text = WORKER.format(
        here=str(Path(__file__).parent),
        front=runner.FRONT,
        words=words,
        count=count,
        marks=str(marks),
    )
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


@pytest.mark.long
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
    assert runner_of(marks, job("score:0", "say", "again")).run() == 0
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


# What was made with other options ----------------------------------------------------------------

SUITE = {
    "encoder": "--encoder resnet10",
    "budget": {"run": "simclr", "steps": 60},
    "stores": {"scans": "folder", "people": "phantoms:60"},
    "runs": {
        "simclr": "--proxy simclr --data {scans} --batch-size 16",
        "mae": "--proxy mae --data {people} --init {simclr}",
    },
    "contestants": {"untrained": "scratch:resnet10"},
    "tasks": {"organs": {"runs": ["*"], "contestants": ["*"], "options": "--data {scans} --target masks"}},
}


def done(marks, status=0, out="out", work="work", root="data", **changes):
    """Does a suite, and returns the commands that it took, each by its verb and what it makes or scores."""
    base = marks.parent
    (base / root / "folder").mkdir(parents=True, exist_ok=True)
    (base / "mine.yaml").write_text(yaml.safe_dump({**SUITE, **changes}), encoding="utf-8")
    (base / out / ".jobs").mkdir(parents=True, exist_ok=True)
    (base / work).mkdir(exist_ok=True)
    plan = SuitePlan(load_suite(base / "mine.yaml"), Places(base / root, base / work, base / out))
    before = len(said(marks))
    assert Runner("mine", plan.jobs, base / out / ".jobs").run() == status
    told = []
    for line in said(marks)[before:]:
        words = line.split()
        made = words[words.index("--resume" if "--resume" in words else "--out") + 1]
        told.append(f"{words[0]} {Path(made).name if words[0] in ('prepare', 'pretrain') else words[1]}")
    return told


ALL = [
    "prepare scans.h5",
    "pretrain flops-simclr",
    "pretrain simclr-0",
    "pretrain flops-mae",
    "pretrain mae-0",
]
SIMCLR = {**SUITE["runs"], "simclr": "--proxy simclr --data {scans} --batch-size 64 --lr 9"}


def test_what_was_made_with_the_same_options_is_not_made_again(marks):
    first = done(marks)
    assert sorted(first[:5]) == sorted(ALL)
    assert len(first) == 8
    assert done(marks) == []
    # Of what is made, nothing is another: order, spelling, where the folders lie, how fast it goes.
    same = {**SUITE["runs"], "simclr": "--batch_size=16 --data {scans} --proxy simclr --workers 7"}
    assert done(marks, runs=same) == []
    again = done(marks, out="other")
    assert all(words.startswith("linear-probe") for words in again) and len(again) == 3
    (marks.parent / "work").rename(marks.parent / "moved")
    (marks.parent / "data").rename(marks.parent / "elsewhere")
    moved = done(marks, out="third", work="moved", root="elsewhere")
    assert all(words.startswith("linear-probe") for words in moved)


OTHER = {
    "run": (
        {"runs": SIMCLR},
        "failed measure:simclr: made with other options: --batch-size 16, no --lr then, "
        "--batch-size 64, --lr 9 now; use another --work, or delete WORK/flops-simclr WORK/simclr-0",
    ),
    "budget": (
        {"budget": {"run": "simclr", "steps": 600}},
        "failed pretrain:simclr:0: made with other options: --steps 60 then, --steps 600 now; use another "
        "--work, or delete WORK/simclr-0",
    ),
    "encoder": (
        {"encoder": "--encoder resnet50"},
        "failed measure:simclr: made with other options: --encoder resnet10 then, --encoder resnet50 now",
    ),
    "phantoms": (
        {"stores": {"scans": "folder", "people": "phantoms:500"}},
        "failed measure:mae: made with other options: --data phantoms:60 then, --data phantoms:500 now",
    ),
    "store": (
        {"stores": {"scans": "folder --spacing 1 1 1", "people": "phantoms:60"}},
        "failed prepare:scans: made with other options: no --spacing then, --spacing 1 1 1 now; use "
        "another --work, or delete WORK/scans.h5",
    ),
}


@pytest.mark.parametrize("what", OTHER)
@pytest.mark.parametrize("out", ["out", "other"])
def test_what_was_made_with_other_options_is_refused_by_name(marks, capsys, what, out):
    changes, message = OTHER[what]
    done(marks)
    cards = {path: path.stat().st_mtime_ns for path in (marks.parent / "work").rglob("*.json")}
    assert not any(words.startswith("pretrain") for words in done(marks, status=1, out=out, **changes))
    assert message.replace("WORK", str(marks.parent / "work")) in capsys.readouterr().out
    assert cards == {path: path.stat().st_mtime_ns for path in cards}


def test_what_is_deleted_is_made_with_the_new_options(marks, capsys):
    work = marks.parent / "work"
    done(marks)
    done(marks, status=1, runs=SIMCLR)
    for name in ("flops-simclr", "simclr-0"):
        (work / name / "encoder" / "encoder.json").unlink()
    # What began with the other encoder is not what would be made of this one.
    again = done(marks, status=1, runs=SIMCLR)
    assert again[:2] == ["pretrain flops-simclr", "pretrain simclr-0"]
    assert (
        "failed measure:mae: made of another simclr than the one that is there now"
        in capsys.readouterr().out
    )
    for name in ("flops-mae", "mae-0"):
        (work / name / "encoder" / "encoder.json").unlink()
    assert done(marks, runs=SIMCLR)[:2] == ["pretrain flops-mae", "pretrain mae-0"]
    assert done(marks, runs=SIMCLR) == []


def test_a_run_that_was_begun_with_other_options_does_not_go_on(marks, capsys):
    work = marks.parent / "work"
    done(marks)
    (work / "simclr-0" / "encoder" / "encoder.json").unlink()
    (work / "simclr-0" / "checkpoints").mkdir()
    (work / "simclr-0" / "checkpoints" / "step-10").touch()
    longer = {"budget": {"run": "simclr", "steps": 600}}
    assert not any("simclr-0" in words for words in done(marks, status=1, **longer))
    assert "failed pretrain:simclr:0: made with other options: --steps 60 then" in capsys.readouterr().out
    assert "pretrain simclr-0" in done(marks)


def test_where_nothing_was_noted_a_runs_own_configuration_decides(marks, capsys):
    work = marks.parent / "work"
    done(marks)
    shutil.rmtree(work / ".made")
    assert done(marks) == []
    # Nobody knows what it was made with: taken, as it always was.
    assert done(marks, runs=SIMCLR, out="other")[0].startswith("linear-probe")
    recorded = {
        "proxy": ["simclr"], "encoder": "resnet10", "data": ["other/place/scans.h5"], "batch_size": 16,
        "steps": 60, "seed": 0, "lr": 0.001,
    }  # fmt: skip
    (work / "simclr-0" / "config.yaml").write_text(yaml.safe_dump(recorded), encoding="utf-8")
    assert done(marks, out="third")[0].startswith("linear-probe")
    assert not any("simclr-0" in words for words in done(marks, status=1, runs=SIMCLR))
    assert (
        "failed pretrain:simclr:0: made with other options: --batch-size 16, --lr 0.001 then, "
        "--batch-size 64, --lr 9 now" in capsys.readouterr().out
    )


def test_a_link_to_what_another_suite_made_is_judged_by_its_configuration(marks):
    work = marks.parent / "work"
    done(marks)
    done(marks, status=1, runs=SIMCLR)
    for name in ("flops-simclr", "simclr-0"):
        (work / name).rename(marks.parent / name)
        (work / name).symlink_to(marks.parent / name)
    assert not any(words.startswith("pretrain") for words in done(marks, runs=SIMCLR))


def test_a_configuration_is_compared_by_what_it_means(tmp_path):
    recorded = {
        "proxy": ["simclr"], "encoder": "resnet18", "precision": "32", "holdout": 0.1, "lr": 0.002,
        "data": ["a/x.h5"], "init": "somewhere", "resnet18": {"stem_stride": [1, 2, 2], "bias": False},
        "simclr": {"crop": [32, 32, 32], "stages": [[1, 1], [2, 2]]},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded), encoding="utf-8")

    def difference(text):
        return Provenance(tmp_path, lambda: [options_in(text.split())]).difference()

    same = "--proxy simclr --precision 32 --holdout .10 --lr 2e-3 --data {x} --resnet18.stem-stride 1 2 2"
    more = (
        "--resnet18.bias false --simclr.crop 32 --simclr.stages [[1,1],[2,2]] --simclr.new 3 --preset quick"
    )
    assert not difference(f"{same} {more}")
    assert not difference("--init {other} --encoder resnet50")  # the architecture of what it began with
    for text, told in {
        "--lr 0.02": "--lr 0.002 then, --lr 0.02 now",
        "--proxy simclr mae": "--proxy simclr then, --proxy simclr mae now",
        "--resnet18.bias true": "--resnet18.bias false then, --resnet18.bias true now",
        "--simclr.crop 32 32 16": "--simclr.crop 32 32 32 then, --simclr.crop 32 32 16 now",
        "--simclr.stages [[1,1],[1,1]]": "--simclr.stages [1,1] [2,2] then, --simclr.stages [[1,1],[1,1]]",
    }.items():
        assert told in difference(text)


@pytest.mark.parametrize(
    ("config", "text", "told"),
    [
        ({"proxy": ["transvw"], "transvw": {"words": 8}}, "--proxy transvw",
         "--transvw.elastic 0.0, --transvw.corruptions several then, --transvw.elastic 1.0, "
         "--transvw.corruptions one now"),
        ({"proxy": ["transvw"], "transvw": {"words": 8}},
         "--proxy transvw --transvw.elastic 0 --transvw.corruptions several", ""),
        ({"proxy": ["transvw"], "transvw": {"elastic": 1.0, "corruptions": "one"}}, "--proxy transvw", ""),
        ({"proxy": ["models_genesis"], "models_genesis": {"flip": 0.4}}, "--proxy models_genesis",
         "--models-genesis.mirror axes then, --models-genesis.mirror in_turn now"),
        ({"proxy": ["intra_inter"], "intra_inter": {"slices": 4}}, "--proxy intra_inter",
         "--intra-inter.slice-features last"),
        ({"proxy": ["mae"], "mae": {"masking": "remask"}}, "--proxy mae --mae.masking remask",
         "--mae.densify-norm false then, --mae.densify-norm true now"),
        ({"proxy": ["mae"], "mae": {"masking": "token"}}, "--proxy mae", ""),
        ({"proxy": ["nowhere.py"], "nowhere.py": {"a": 1}}, "--proxy nowhere.py", ""),
    ],
)  # fmt: skip
def test_a_run_of_former_defaults_is_another_run(tmp_path, config, text, told):
    """With its note too: what nobody gave is in no note, and meant something else."""
    folder = tmp_path / "run-0"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    provenance = Provenance(folder, lambda: [options_in(text.split())])
    provenance.note()
    said = provenance.difference()
    assert told in said if told else not said
    if told:
        assert said.startswith("made with the defaults of an earlier version: ") and str(folder) in said


def test_a_store_may_have_been_made_in_any_of_its_ways(marks):
    ways = {"stores": {"scans": "flat.npz | folder --spacing 1 1 1", "people": "phantoms:60"}}
    done(marks, **ways)
    (marks.parent / "data" / "flat.npz").touch()  # what would be taken now
    assert done(marks, **ways) == []


# What fails ---------------------------------------------------------------------------------------


def test_the_first_of_a_task_may_fail_be_skipped_or_never_come(marks):
    jobs = [
        job("score:bad", "fail", "weights"),
        job("score:lost", "say", "never", needs=["score:bad"]),
        job("prepare:gone", "say", missing="data", kind="prepare", product=marks / "x"),
        job("score:skipped", "say", needs=["prepare:gone"]),
        *(job(f"score:{n}", "say", n, after=[n]) for n in ("score:bad", "score:lost", "score:skipped")),
        job("score:free", "say", "free", after=["score:in-no-plan"]),
    ]
    assert runner_of(marks, *jobs).run() == 1
    assert sorted(said(marks)) == [
        "fail weights", "say free", "say score:bad", "say score:lost", "say score:skipped"
    ]  # fmt: skip


def test_a_job_comes_after_those_that_compute_what_it_finds(marks):
    jobs = [job("score:b", "say", "b", after=["score:a"]), job("score:a", "say", "a")]
    assert runner_of(marks, *jobs).run() == 0
    assert said(marks) == ["say a", "say b"]


def test_a_contestant_that_cannot_be_made_takes_nobody_with_it(marks):
    contestants = {"imagenet": "imagenet:FAIL", "untrained": "scratch:resnet10"}
    task = SUITE["tasks"]["organs"]
    for protocol in ("linear-probe", "finetune"):
        tasks = {protocol: {**task, "protocol": protocol}}
        told = done(marks, status=1, contestants={"imagenet": "imagenet:FAIL"}, tasks=tasks)
        assert next(words for words in told if words.startswith(protocol)).endswith("FAIL")
        assert len([words for words in told if words.startswith(protocol)]) == 3
    assert any("scratch" in words for words in done(marks, status=1, contestants=contestants, tasks=tasks))


@pytest.mark.parametrize("flops", ["null", '"many"', "0", "[1]"])
def test_a_card_that_tells_no_flops_ends_its_jobs_only(marks, monkeypatch, capsys, flops):
    monkeypatch.setenv("FLOPS", flops)
    told = done(marks, status=1)
    assert any("scratch" in words for words in told)
    card = marks.parent / "work" / "flops-simclr" / "encoder" / "encoder.json"
    out = capsys.readouterr().out
    assert f"failed pretrain:simclr:0: {card}" in out and "flops_per_step" in out
    assert not list((marks.parent / "out" / ".jobs").glob("*.lock"))


def test_a_card_that_is_spoiled_after_all_was_done_ends_its_jobs_only(marks, capsys):
    done(marks)
    card = marks.parent / "work" / "flops-mae" / "encoder" / "encoder.json"
    card.write_text("{", encoding="utf-8")
    assert done(marks, status=1) == []
    assert f"failed pretrain:mae:0: {card}" in capsys.readouterr().out


def test_whatever_is_wrong_with_a_job_ends_that_job_only(marks, capsys):
    def wrong():
        raise TypeError("of two\nlines")

    jobs = [
        Job("score:digest", "score", wrong),
        Job("prepare:command", "prepare", wrong, product=marks / "x"),
        job("score:good", "say", "good"),
    ]
    assert runner_of(marks, *jobs).run() == 1
    assert said(marks) == ["say good"]
    out = capsys.readouterr().out
    assert "failed score:digest: TypeError: of two lines" in out
    assert "failed prepare:command: TypeError: of two lines" in out
    assert not list(marks.glob("*.lock"))


def test_what_failed_elsewhere_since_the_start_is_not_tried_again(marks, capsys):
    def jobs(*words):
        return [job("score:bad", *words), job("score:good", "say", "good")]

    late = runner_of(marks, *jobs("fail", "file"))  # began before the other's failure
    other = runner_of(marks, *jobs("say", "another"))
    assert runner_of(marks, *jobs("fail", "file")).run() == 1
    assert late.run() == 1
    assert said(marks) == ["fail file", "say good"]
    assert f"failed score:bad: there is no file (on {socket.gethostname()})" in capsys.readouterr().out
    assert other.run() == 0  # that was another job
    assert runner_of(marks, *jobs("fail", "file")).run() == 1  # a new start tries again
    assert said(marks)[2:] == ["say another", "fail file"]


def test_where_all_fails_the_status_tells_it(marks, tmp_path, capsys):
    contestants = {"bad": "imagenet:FAIL"}
    tasks = {"organs": {"contestants": ["bad"], "options": "--data {people}"}}
    suite = {**SUITE, "runs": {}, "budget": {}, "contestants": contestants, "tasks": tasks}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    assert run(RunOptions(str(tmp_path / "mine.yaml"), tmp_path / "out")) == 1
    assert "failed score:organs:bad: no such weights" in capsys.readouterr().out


# SLURM --------------------------------------------------------------------------------------------


def waited(marks, what):
    deadline = time.monotonic() + 100
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(pid) for pid in Path(f"{marks.parent / 'said'}.pids").read_text(encoding="utf-8").split()]


def test_a_worker_whose_time_is_over_has_its_job_save(marks):
    worker = started(marks, 1, '"wait", n')
    child, _ = waited(marks, lambda: "waiting" in said(marks))
    if sys.platform.startswith("linux"):
        os.kill(child, signal.SIGUSR2)  # SLURM sends it to all processes: the job must not die of it
    worker.send_signal(signal.SIGUSR2)
    worker.communicate(timeout=60)
    assert worker.returncode == 128 + signal.SIGUSR2
    assert said(marks) == ["wait 0", "waiting", "saved"]
    assert not list(marks.glob("*.lock"))


def with_one_contestant(tmp_path, name, **options):
    tasks = {"organs": {"contestants": ["one"], "options": "--data {people}"}}
    suite = {**SUITE, "runs": {}, "budget": {}, "contestants": {"one": name}, "tasks": tasks}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    options = RunOptions(str(tmp_path / "mine.yaml"), tmp_path / "out", cluster="local", **options)
    (options.out / ".jobs").mkdir(parents=True)
    return options


def test_what_submitit_calls_off_is_queued_again_and_goes_on(marks, tmp_path, monkeypatch):
    front = runner.FRONT

    class Mine(Worker):
        def __call__(self):
            runner.FRONT = front
            suite_run.check = lambda plan: None  # the words mean something to the front alone
            super().__call__()

    monkeypatch.setattr(suite_run, "Worker", Mine)
    pytest.importorskip("submitit")
    submit(with_one_contestant(tmp_path, "scratch:ONCE", slurm=1, slurm_options=("timeout_min=10",)))
    _, worker = waited(marks, lambda: "waiting" in said(marks))
    os.kill(worker, signal.SIGUSR2)
    slurm = tmp_path / "out" / ".jobs" / "slurm"
    waited(marks, lambda: list(slurm.glob("*_result.pkl")))
    first, *rest = said(marks)
    assert rest == ["waiting", "saved", first]
    mark = json.loads((tmp_path / "out" / ".jobs" / "score__organs__one.json").read_text(encoding="utf-8"))
    assert mark["state"] == "done"
    assert "the same command goes on where it was" in "".join(
        path.read_text(encoding="utf-8") for path in slurm.glob("*.out")
    )


def test_workers_in_the_queue_have_all_options_but_slurm(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_run, "check", lambda plan: None)
    queued = []

    class Executor:
        def __init__(self, folder, cluster, **more):
            assert folder == tmp_path / "out" / ".jobs" / "slurm" and cluster == "local"

        def update_parameters(self, **given):
            assert given == {"name": "ssl3d-mine", "timeout_min": 600}

        def batch(self):
            return contextlib.nullcontext()

        def submit(self, function):
            queued.append(function)
            return SimpleNamespace(job_id=7)

    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    more = {"report": False, "verbose": True, "seeds": (1,), "only": ("organs",), "launch": "torchrun -m"}
    options = with_one_contestant(
        tmp_path, "scratch:a", slurm=3, slurm_options=("timeout_min=600",), **more
    )
    assert run(options) == 0
    assert [worker.options for worker in queued] == [replace(options, slurm=0)] * 3


def test_without_slurm_the_reason_is_one_clear_line(tmp_path):
    options = replace(with_one_contestant(tmp_path, "scratch:a", slurm=1), cluster="slurm")
    with pytest.raises(UsageError, match="--slurm 1: "):
        submit(options)


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
