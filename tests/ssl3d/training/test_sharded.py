"""Sharded training (fsdp) learns what ddp learns, is saved whole, and goes on with other ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import ssl3d
from ssl3d.checkpoint import snapshot

pytestmark = pytest.mark.slow


def clean():
    dropped = ("SLURM_", "TORCHELASTIC", "WORLD_", "RANK")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}


def command(ranks, *more):
    words = ["-m", "ssl3d", "pretrain"]
    if ranks > 1:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        words = [*run, *more, *words]
    return [sys.executable, *words]


def run(ranks, *words):
    done = subprocess.run(
        [*command(ranks), *words], capture_output=True, text=True, env=clean(), check=False, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def close(ours, theirs, rel, *names):
    for name in names:
        values = [[record[name] for record in metrics(folder)] for folder in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=rel), name


def words_of(folder, phantoms, flags, *more):
    words = [
        "--data",
        phantoms,
        "--out",
        str(folder),
        "--workers",
        "0",
        "--steps",
        "4",
        "--batch-size",
        "8",
    ]
    return [*flags, *words, "--proxy", "tiny", "--optimizer", "adamw", "--eval-every", "2", *more]


def test_ranks_that_hold_a_part_learn_what_ranks_learn_that_hold_all(
    tiny_plugins, phantoms, flags, tmp_path
):
    ours, theirs, single = (tmp_path / name for name in ("fsdp", "ddp", "single"))
    run(2, *words_of(ours, phantoms, flags, "--strategy", "fsdp", "--checkpoint-every", "2"))
    run(2, *words_of(theirs, phantoms, flags, "--strategy", "ddp"))
    close(ours, theirs, 1e-4, "loss", "grad_norm", "tiny/error")
    a, b = (ssl3d.load_encoder(folder).state_dict() for folder in (ours, theirs))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], rtol=1e-2, atol=1e-4) for key in a)
    # Saved whole: names and shapes are those of any other run, plain tensors all.
    kept, other = (snapshot.load_checkpoint(folder)["module"] for folder in (ours, theirs))
    assert {k: v.shape for k, v in kept.items()} == {k: v.shape for k, v in other.items()}
    assert all(type(value) is torch.Tensor for value in kept.values())
    # As it was when the second step had been saved; it goes on in one process, moments and all.
    shutil.copytree(ours, single)
    shutil.rmtree(single / "encoder")
    snapshot.checkpoints(single)[0].unlink()
    told = run(1, "--resume", str(single), "--workers", "0")
    assert "resuming at step 2 of 4" in told and "note: processes 2 before, 1 now" in told
    close(single, ours, 1e-4, "loss", "grad_norm")


def test_a_proxy_that_clusters_between_epochs_is_trained_in_parts(tiny_plugins, phantoms, flags, tmp_path):
    words = words_of(tmp_path / "run", phantoms, flags, "--strategy", "fsdp")
    words[words.index("tiny")] = "deepcluster_v2"
    words += ["--deepcluster_v2.crop", "16", "16", "16", "--deepcluster_v2.per_volume", "2"]
    run(2, *words)
    assert all(record["loss"] == record["loss"] for record in metrics(tmp_path / "run"))


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as file:
        return [int(word) for word in file.read().split()]


def test_torchrun_goes_on_after_a_rank_was_killed(tiny_plugins, phantoms, flags, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    words = [*words_of(folder, phantoms, flags, "--checkpoint-every", "2"), "--steps", "8"]
    process = subprocess.Popen(
        [*command(2, "--max-restarts", "1"), *words, "--tiny.pause", "0.5"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean(),
    )  # fmt: skip
    lines, deadline = folder / "metrics.jsonl", time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if lines.exists() and len(lines.read_text(encoding="utf-8").splitlines()) >= 3:
            break
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    told, _ = process.communicate(timeout=250)
    assert process.returncode == 0, told
    assert "resuming at step" in told and told.count("done: 8 steps") == 1
    whole_words = [*words_of(whole, phantoms, flags), "--steps", "8", "--tiny.pause", "0"]
    run(2, *whole_words)
    a, b = (ssl3d.load_encoder(each).state_dict() for each in (folder, whole))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_job_without_a_name_of_its_own_takes_over_no_run(monkeypatch):
    from ssl3d.training.preempt import restarted

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert restarted() == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "f3a")
    assert restarted() == ["TORCHELASTIC_RUN_ID"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert restarted() == []
