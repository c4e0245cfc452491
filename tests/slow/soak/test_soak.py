"""The whole chain under kills, damage and a disk that fills comes to the results of the undisturbed chain.

`SSL3D_SOAK_SECONDS=3600 pytest -m slow -s -o timeout=0 tests/slow/soak` goes on for an hour, round after
round, and prints how often what was disturbed; by default it is one round. `SSL3D_SOAK_SEED` draws others.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ssl3d.data.phantoms import phantom

SECONDS = float(os.environ.get("SSL3D_SOAK_SECONDS", "0"))
SEED = int(os.environ.get("SSL3D_SOAK_SEED", "0"))
SHORT = ["--batch-size", "4", "--precision", "32", "--threads", "1", "--workers", "0"]


def chain(folder, scans):
    """Return the commands of the chain by name, each with the file or folder that it makes."""
    store, run, tuned = folder / "scans.h5", folder / "run", folder / "tuned"
    return {
        "prepare": (["prepare", scans, "--out", store, "--workers", "2"], store),
        "pretrain": (
            ["pretrain", "--proxy", "simclr", "--data", store, "--encoder", "resnet10", "--resnet10.width",
             "4", "--steps", "12", "--checkpoint-every", "2", "--accelerator", "cpu", *SHORT, "--out", run],
            run,
        ),
        "finetune": (
            ["finetune", run, "--data", "phantoms:20", "--task", "classification", "--steps", "12",
             "--no-scratch", "--no-trivial", "--checkpoint-seconds", "0", "--device", "cpu",
             "--keep-models", "all", *SHORT, "--out", tuned],
            tuned,
        ),
        "predict": (
            ["predict", tuned, "--data", "phantoms:8", "--threads", "1", "--out", folder / "predicted"],
            folder / "predicted",
        ),
        "report": (
            ["leaderboard", "report", tuned, "--out", folder / "report"], folder / "report"
        ),
    }  # fmt: skip


def start(words, resume=False, limit=None):
    """Start a command in a session of its own; `limit` is the largest file that it can write."""
    words = [str(word) for word in words]
    if resume and words[0] == "pretrain":
        words = ["pretrain", "--resume", words[-1]]
    return subprocess.Popen(
        [sys.executable, "-m", "ssl3d", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2)),
    )  # fmt: skip


def begun(words):
    """Tell whether a command is a pretraining that has a checkpoint to go on from."""
    return words[0] == "pretrain" and any((Path(words[-1]) / "checkpoints").glob("*.pt"))


def finish(words):
    """Call a command until it ends well, as a user would; a run that has begun is resumed."""
    process = start(words, resume=begun(words))
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, f"{words}: {said[-2000:]}"


def results(folder):
    """Return all numbers of a chain, without times and paths."""
    store, run, tuned = folder / "scans.h5", folder / "run", folder / "tuned"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(tuned.glob("*.json"))]
    predicted = (folder / "predicted" / "predictions.csv").read_text(encoding="utf-8")
    return {
        "prepare": hashlib.sha256(store.read_bytes()).hexdigest(),
        "pretrain": hashlib.sha256((run / "encoder" / "encoder.safetensors").read_bytes()).hexdigest(),
        "finetune": [(record["scores"], record["predictions"]) for record in records],
        "predict": predicted,
    }


def flip(path, rng):
    """Flip a bit of a file that lies there between two calls."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def disturb(name, words, made, rng, counts):
    """Disturb a command once, in one of several ways, and check how it ended."""
    way = rng.choice(["kill", "kill", "two", "full", "damage"])
    if way == "two" and name in ("prepare", "finetune", "predict"):
        both = [start(words) for _ in range(2)]
        said = [process.communicate(timeout=600)[0] for process in both]
        codes = sorted(process.returncode for process in both)
        # A store is made by one: the other ends in one line.
        assert codes == [0, 0] or (name == "prepare" and codes == [0, 2]), f"{codes} {said}"
        assert "Traceback" not in "".join(said)
    elif way == "full":
        process = start(words, resume=begun(words), limit=rng.randrange(1 << 12, 1 << 18))
        said, _ = process.communicate(timeout=600)
        assert "Traceback" not in said and process.returncode in (0, 1, 2, 3), said[-2000:]
    else:
        way = "kill" if way == "two" else way
        process = start(words, resume=begun(words))
        time.sleep(rng.uniform(0, 8))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        left = list(made.rglob("*.pt")) if made.is_dir() else []
        left += made.with_name(f"{made.name}.partial").glob("*.part")
        if way == "damage" and left:
            flip(rng.choice(left), rng)
        elif way == "damage":
            way = "kill"
    counts[f"{name}: {way}"] += 1
    if name == "pretrain" and made.exists() and not any((made / "checkpoints").glob("*.pt")):
        shutil.rmtree(made)  # it had not begun: there is nothing to resume


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for seed in range(8):
        image = np.rint((phantom(seed, (24, 32, 32)).image[0] + 4) * 200).clip(0, 32767).astype(np.int16)
        nibabel.save(
            nibabel.Nifti1Image(image.transpose(2, 1, 0), np.eye(4)), folder / f"scan-{seed}.nii.gz"
        )
    return folder


@pytest.mark.slow
def test_a_disturbed_chain_comes_to_the_same_results(scans, tmp_path):
    rng, counts = random.Random(SEED), Counter()
    for words, _ in chain(tmp_path / "whole", scans).values():
        finish(words)
    whole = results(tmp_path / "whole")
    began, rounds = time.monotonic(), 0
    while rounds == 0 or time.monotonic() - began < SECONDS:
        folder = tmp_path / f"round-{rounds}"
        for name, (words, made) in chain(folder, scans).items():
            for _ in range(rng.randrange(1, 3)):
                disturb(name, words, made, rng, counts)
            finish(words)
        found = results(folder)
        for name, value in whole.items():
            assert found[name] == value, f"round {rounds}: {name} differs; {dict(counts)}"
        assert (folder / "report" / "index.html").is_file()
        shutil.rmtree(folder)
        rounds += 1
    print(f"\n{rounds} rounds, {sum(counts.values())} disturbances: {dict(sorted(counts.items()))}")
