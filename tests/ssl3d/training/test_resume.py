"""A run that is stopped anywhere ends with the bytes of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import ssl3d
from ssl3d import cli
from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.proxies import load_proxies
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.errors import CheckpointError, TransientError
from ssl3d.training import run_folder
from ssl3d.training.preempt import Preemption

COMMAND = [sys.executable, "-m", "ssl3d", "pretrain"]


def bytes_of(folder):
    return (folder / "encoder" / "encoder.safetensors").read_bytes()


def lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def start(flags, folder, data, steps, *more):
    words = [*COMMAND, "--proxy", "tiny", "--data", data, "--steps", str(steps), "--out", str(folder)]
    words += ["--checkpoint-every", "4", "--eval-every", "5", "--tiny.dropout", "0.2", *flags, *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(process, folder, steps):
    deadline = time.monotonic() + 120
    while len(lines(folder)) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]


def test_kill_9_at_any_step_and_resume_gives_the_same_bytes(tiny_plugins, phantoms, flags, train, tmp_path):
    # The whole run is made in this process, with other workers: that must not matter either.
    whole = train("whole", steps=14, checkpoint_every=4, eval_every=5, tiny={"dropout": 0.2}, workers=2)
    killed = tmp_path / "killed"
    # The pause changes the time alone; it leaves the killer time to choose its moment.
    process = start(flags, killed, phantoms, 14, "--tiny.pause", "0.05")
    moment = random.randint(5, 12)
    wait_for(process, killed, moment)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "encoder").exists()
    assert cli.main(["pretrain", "--resume", str(killed), "--workers", "0"]) == 0, moment
    assert bytes_of(killed) == bytes_of(whole.folder), moment
    assert [json.loads(line)["step"] for line in lines(killed)] == list(range(1, 15))
    timings = {"seconds", "waiting", "volumes_per_s"}
    for ours, theirs in zip(lines(killed), lines(whole.folder), strict=True):
        a, b = json.loads(ours), json.loads(theirs)
        assert {k: a[k] for k in set(a) - timings} == {k: b[k] for k in set(b) - timings}


def test_sigterm_ends_the_step_saves_and_says_how_to_go_on(train, capsys):
    whole = train("whole", steps=8)
    stopped = train("stopped", steps=8, tiny={"signal_at": 2, "signum": int(signal.SIGTERM)})
    assert (stopped.done, stopped.stopped, stopped.finished) == (3, signal.SIGTERM, False)
    told = capsys.readouterr().out
    assert told.count("stopped by SIGTERM after step 3 of 8") == 1
    assert f"ssl3d pretrain --resume {stopped.folder}" in told
    again = ssl3d.resume(stopped.folder)
    assert again.finished
    assert bytes_of(again.folder) == bytes_of(whole.folder)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_comes_again_at_once_is_the_same(monkeypatch):
    """SLURM signals every process, and `timeout` and torchrun hand it on: the second ended it unsaved."""
    died = []
    with Preemption() as asked:
        monkeypatch.setattr("ssl3d.training.preempt.os.kill", lambda *how: died.append(how))
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert asked.signum == signal.SIGTERM and not died
        monkeypatch.setattr("ssl3d.training.preempt.ONCE", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert died == [(os.getpid(), signal.SIGTERM)]


def test_the_exit_status_tells_the_signal(tiny_plugins, phantoms, flags, tmp_path):
    words = [
        "pretrain",
        "--proxy",
        "tiny",
        "--data",
        phantoms,
        "--steps",
        "4",
        "--out",
        str(tmp_path / "run"),
    ]
    words += [*flags, "--workers", "0", "--tiny.signal-at", "1", "--tiny.signum"]
    assert cli.main([*words, str(int(signal.SIGTERM))]) == 143
    assert cli.main([*words, str(int(signal.SIGUSR1)), "--overwrite"]) == 128 + signal.SIGUSR1


def test_sigusr1_under_slurm_puts_the_job_back(train, tmp_path, monkeypatch, capsys):
    called = tmp_path / "called"
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" > {called}\n', encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    run = train(steps=5, tiny={"signal_at": 1, "signum": int(signal.SIGUSR1)})
    assert called.read_text(encoding="utf-8").split() == ["requeue", "1234"]
    assert "queued again" in capsys.readouterr().out
    # SLURM runs the same command again: it goes on instead of refusing the folder.
    plan = runs_plan(run.folder)
    assert run_folder.requeued_run(plan) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_folder.requeued_run(plan) == run.folder
    monkeypatch.setenv("SLURM_JOB_ID", "99")
    assert run_folder.requeued_run(plan) is None


def runs_plan(folder):
    from ssl3d.training.options import plan_from

    return plan_from({"proxy": "tiny", "out": str(folder)}, "test")


def test_a_checkpoint_cut_short_is_noticed_and_the_one_before_used(train, capsys, monkeypatch):
    whole = train("whole", steps=6)
    run = train("run", steps=6, checkpoint_every=2, tiny={"signal_at": 4})
    newest, before = snapshot.checkpoints(run.folder)
    newest.write_bytes(newest.read_bytes()[:-1000])
    monkeypatch.setenv("TINY_IS_CALM", "1")  # so that the run can end
    capsys.readouterr()
    again = ssl3d.resume(run.folder)
    told = capsys.readouterr().out
    assert newest.name in told and "cut short" in told
    assert f"resuming at step {snapshot.step_of(before)} of 6" in told
    assert bytes_of(again.folder) == bytes_of(whole.folder)


def test_no_whole_checkpoint_is_an_error(train):
    run = train("run", steps=4, checkpoint_every=2, tiny={"signal_at": 2})
    for path in snapshot.checkpoints(run.folder):
        path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        ssl3d.resume(run.folder)


def test_killed_before_the_first_checkpoint_starts_at_nought(train, capsys, monkeypatch):
    whole = train("whole", steps=5)
    run = train("run", steps=5, checkpoint_every=100, tiny={"signal_at": 1})
    for path in snapshot.checkpoints(run.folder):
        path.unlink()
    monkeypatch.setenv("TINY_IS_CALM", "1")  # so that the run can end
    again = ssl3d.resume(run.folder)
    assert "resuming at step 0 of 5" in capsys.readouterr().out
    assert bytes_of(again.folder) == bytes_of(whole.folder)
    assert len(again.metrics) == 5


def test_a_finished_run_says_so_and_stays_as_it_is(train, capsys):
    run = train(steps=3)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.suffix != ".log"}
    capsys.readouterr()
    assert cli.main(["pretrain", "--resume", str(run.folder)]) == 0
    assert f"{run.folder} is finished: 3 steps" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.suffix != ".log"}
    assert before.items() <= after.items()


def test_killed_between_the_last_step_and_the_export(train):
    import shutil

    run = train(steps=3)
    expected = bytes_of(run.folder)
    shutil.rmtree(run.folder / "encoder")
    assert bytes_of(ssl3d.resume(run.folder).folder) == expected


@pytest.mark.long
def test_threads_are_restored(train):
    import torch

    before = torch.get_num_threads()
    try:
        run = train(steps=4, threads=2, tiny={"signal_at": 1})
        torch.set_num_threads(1)
        ssl3d.resume(run.folder)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("words", "flag"),
    [(["--steps", "9"], "--steps"), (["--lr", "1"], "--lr"), (["--tiny.size", "9"], "--tiny.size")],
)
def test_resume_refuses_what_would_change_the_result(train, words, flag, capsys, tiny_plugins):
    run = train(steps=3)
    assert cli.main(["pretrain", "--resume", str(run.folder), *words]) == 2
    error = capsys.readouterr().err
    assert flag in error and "would change the result" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "changed", "message"),
    [
        ("steps: 4", "steps: 9", "steps 9, its checkpoint 4"),
        ("lr: 0.003", "lr: 0.3", "lr 0.3, its checkpoint 0.003"),
        ("  size: 12", "  size: 13", "tiny.size 13, its checkpoint 12"),
        ("  width: 4", "  width: 6", "resnet10.width 6, its checkpoint 4"),
        ("seed: 0\n", "", ""),  # the default is the same
    ],
)
def test_a_changed_option_is_refused(train, line, changed, message):
    run = train(steps=4, lr=0.003, tiny={"signal_at": 1})
    config = run.folder / "config.yaml"
    text = config.read_text(encoding="utf-8")
    assert text.count(line) == 1
    config.write_text(text.replace(line, changed), encoding="utf-8")
    if not message:
        assert ssl3d.resume(run.folder).finished
        return
    with pytest.raises(CheckpointError, match=f"config.yaml says {message}; write that of the checkpoint"):
        ssl3d.resume(run.folder)
    config.write_text(text, encoding="utf-8")
    assert ssl3d.resume(run.folder).finished


def test_another_proxy_is_refused(train):
    run = train(steps=4, tiny={"signal_at": 1})
    config = run.folder / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(
        text.replace("- tiny\n", "- other\n").replace("\ntiny:", "\nother:"), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match=r"says encoder and proxies .*other.*, its checkpoint .*tiny"):
        ssl3d.resume(run.folder)


@pytest.mark.long
def test_another_machine_is_noted(train, capsys):
    run = train(steps=4, threads=1, tiny={"signal_at": 1})
    config = run.folder / "config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("threads: 1", "threads: 2"), encoding="utf-8"
    )
    assert ssl3d.resume(run.folder).finished
    assert "note: threads 1 before, 2 now" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_compares_its_length_alone(train):
    run = train(steps=4, tiny={"signal_at": 1})
    (newest,) = snapshot.checkpoints(run.folder)
    state = snapshot.read_checkpoint(newest)
    del state["options"]
    newest.unlink()
    snapshot.save_checkpoint(run.folder, state["step"], lambda path: torch.save(state, path))
    config = run.folder / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("steps: 4", "steps: 9"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="steps 9, its checkpoint 4"):
        ssl3d.resume(run.folder)
    config.write_text(text, encoding="utf-8")
    assert ssl3d.resume(run.folder).finished


def test_other_data_are_refused(train, tmp_path):
    from ssl3d.data.phantoms import phantom_store
    from ssl3d.training.options import PretrainOptions

    run = train(steps=4, tiny={"signal_at": 1})
    other = str(phantom_store(13, shape=(24, 32, 32), folder=tmp_path))
    with pytest.raises(CheckpointError, match="data have changed"):
        ssl3d.resume(run.folder, PretrainOptions(data=(other,)), {"data"})


def test_a_run_of_the_earlier_choice_of_subjects_goes_on_with_it(
    tiny_plugins, small, tmp_path, monkeypatch
):
    from ssl3d.training import pretrain as module

    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    for i in range(24):
        entry = Record(id=str(i), dataset="d", subject=f"s{i}", label=i % 2 if i < 8 else None)
        write_part(tmp_path / "s.h5.partial", f"{i:04d}", entry, image + i)
    assemble(tmp_path / "s.h5.partial", tmp_path / "s.h5", {}, [])

    def before(plan, data, digest, initial):
        about = metadata(plan, data, digest, initial)
        del about["data"]["chosen_by"]  # as it was
        return about

    metadata = module.metadata
    with monkeypatch.context() as patched:
        patched.setattr(module, "BY_TARGET", "")
        patched.setattr(module, "metadata", before)
        options = small | {"steps": 4, "tiny": {"signal_at": 1}}
        run = ssl3d.pretrain("tiny", data=tmp_path / "s.h5", out=tmp_path / "run", **options)
        assert run.stopped
    assert ssl3d.resume(run.folder).finished
    card = json.loads((run.folder / "encoder" / "encoder.json").read_text(encoding="utf-8"))
    assert card["data"]["volumes"] == len(card["identities"]) < 16
    options = small | {"steps": 4, "holdout": 0.0}
    new = ssl3d.pretrain("tiny", data=tmp_path / "s.h5", out=tmp_path / "new", **options)
    card = json.loads((new.folder / "encoder" / "encoder.json").read_text(encoding="utf-8"))
    assert card["data"]["volumes"] == len(card["identities"]) > 16
    assert card["data"]["chosen_by"] == "subject and target"


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["pretrain", "--resume", str(tmp_path / "nothing")]) == 2
    (tmp_path / "config.yaml").write_text("a: 1\n", encoding="utf-8")
    assert cli.main(["pretrain", "--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_full_disk_is_one_line_and_older_checkpoints_stay(train, monkeypatch, tmp_path):
    import errno

    real = snapshot.write_state

    def full_at_step_4(state, path):
        real(state, path)
        if state["step"] == 4:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "write_state", full_at_step_4)
    with pytest.raises(TransientError, match=r"No space left on device.*older ones are intact") as caught:
        train(steps=6, checkpoint_every=2)
    assert caught.value.exit_status == 3 and "\n" not in str(caught.value)
    names = os.listdir(tmp_path / "run" / "checkpoints")
    assert len(names) == 1 and names[0].startswith("step-00000002-")
    assert int(load_proxies(tmp_path / "run")["tiny"].done) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_real_limit_on_file_size(tiny_plugins, phantoms, flags, tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "from ssl3d.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["pretrain", "--proxy", "tiny", "--data", phantoms, "--steps", "3", "--checkpoint-every", "1"]
    words += ["--out", str(tmp_path / "run"), "--workers", "0", *flags, "--optimizer", "adamw"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "checkpoint of step 1 cannot be written" in done.stderr
