"""Two processes learn what one learns."""

import json
import os
import subprocess
import sys

import pytest
import torch

import ssl3d


def clean():
    return {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM_", "TORCHELASTIC", "WORLD_", "RANK"))
    }


def torchrun(folder, phantoms, flags, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += [
        "ssl3d",
        "pretrain",
        "--data",
        phantoms,
        "--out",
        str(folder),
        "--workers",
        "0",
        *flags,
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=clean(), check=False, timeout=240)


def test_two_processes_give_the_loss_and_gradients_of_one(tiny_plugins, phantoms, flags, train, tmp_path):
    # Two proxies: each has a branch (`unused`) that no rank ever uses, and a buffer of its own.
    words = ["--proxy", "tiny", "other", "--steps", "4", "--batch-size", "8", "--eval-every", "2"]
    done = torchrun(tmp_path / "two", phantoms, flags, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("done: 4 steps") == 1
    one = train("one", proxy=["tiny", "other"], batch_size=8, steps=4, eval_every=2)
    ours = [
        json.loads(line)
        for line in (tmp_path / "two" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for name in ("loss", "tiny/loss", "other/loss", "grad_norm", "lr"):
        two, alone = [record[name] for record in ours], [record[name] for record in one.metrics]
        assert two[0] == pytest.approx(alone[0], rel=1e-5), name
        # Later steps start from weights that differ in their last bits.
        assert two == pytest.approx(alone, rel=1e-3), name
    a, b = ssl3d.load_encoder(tmp_path / "two").state_dict(), one.encoder.state_dict()
    assert all(torch.allclose(a[key], b[key], rtol=1e-2, atol=1e-4) for key in a)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_every_process(tiny_plugins, phantoms, flags, tmp_path):
    words = ["--proxy", "tiny", "--steps", "3", "--tiny.nan-at", "1", "--eval-every", "-1"]
    done = torchrun(tmp_path / "run", phantoms, flags, *words)
    assert done.returncode != 0
    assert "step 2: the loss of tiny is not finite" in done.stderr
    assert not (tmp_path / "run" / "encoder").exists()
