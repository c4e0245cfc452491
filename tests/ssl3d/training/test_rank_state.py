"""Every rank gets its own state back; `start_epoch` is called as in a run that was not stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import ssl3d
from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.proxies import load_proxies
from ssl3d.errors import CheckpointError

PLUGIN = '''
import json
import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ssl3d.api import Proxy, StepOutput, rank
from tiny_ssl3d_plugins import Tiny, TinyConfig


@dataclass
class QueueConfig(TinyConfig):
    """Options.

    Attributes:
        log: Where calls of start_epoch are noted.
    """

    log: str = ""


class Queue(Tiny):
    """The network must stay close to a queue of its own rank's features, and to its cluster."""

    Config = QueueConfig
    recipe = {"batch_size": 4}

    def __init__(self, config, encoder):
        super().__init__(config, encoder)
        self.register_buffer("queue", torch.zeros(8, encoder.embed_dim))
        self.register_buffer("last", torch.zeros(encoder.embed_dim))

    def setup(self, data):
        self.register_buffer("bank", torch.zeros(len(data), 2))

    def start_epoch(self, epoch, loader):
        with open(f"{self.config.log}-{rank()}", "a", encoding="utf-8") as file:
            print(epoch, os.getpid(), file=file)
        with torch.no_grad():
            for batches in loader:
                for group in batches:
                    volumes = group["image"]
                    means = torch.stack([volumes.mean((1, 2, 3, 4)), volumes.std((1, 2, 3, 4))], 1)
                    rows = group["index"] % len(self.bank)
                    self.bank[rows] = 0.5 * self.bank[rows] + means * (1 + epoch) + torch.rand(2)

    def forward(self, batch, rng):
        output = super().forward(batch, rng)
        z = self.encoder.embed(batch["image"])
        self.last = z.detach().float().mean(0)
        rows = batch["index"] % len(self.bank)
        pulled = functional.mse_loss(z, self.queue.mean(0).expand_as(z))
        clustered = functional.mse_loss(self.head(z), self.bank[rows])
        return StepOutput(output.loss + pulled + clustered, output.metrics)

    def after_step(self, step, total):
        self.queue.copy_(torch.cat([self.queue[1:], self.last[None]]))
        super().after_step(step, total)
'''


@pytest.fixture(scope="session")
def queue_plugin(tiny_plugins):
    from ssl3d import plugins

    (tiny_plugins / "queue_ssl3d_plugin.py").write_text(PLUGIN, encoding="utf-8")
    info = tiny_plugins / "queue_ssl3d_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: queue-ssl3d-plugin\nVersion: 1.0\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(
        "[ssl3d.proxies]\nqueue = queue_ssl3d_plugin:Queue\n", encoding="utf-8"
    )
    plugins._installed.cache_clear()
    return tiny_plugins


def command(ranks):
    words = ["-m", "ssl3d", "pretrain"]
    if ranks > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *words]
    return [sys.executable, *words]


def clean():
    dropped = ("SLURM_", "TORCHELASTIC", "WORLD_", "RANK")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}


def words_of(folder, phantoms, flags, steps=10):
    # 12 volumes: an epoch is 3 steps, so that a run saved after 5 goes on in the middle of one.
    words = ["--proxy", "queue", "--data", phantoms, "--out", str(folder), "--steps", str(steps)]
    words += ["--subjects", "all", "--holdout", "0", "--workers", "0"]
    words += ["--checkpoint-every", "5", "--eval-every", "-1", "--resnet10.norm", "batch"]
    return [*flags, *words, "--queue.log", str(folder) + "-epochs"]


def run(ranks, *words):
    done = subprocess.run(
        [*command(ranks), *words], capture_output=True, text=True, env=clean(), check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def epochs(folder, rank=0):
    path = folder.with_name(f"{folder.name}-epochs-{rank}")
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines()]


def pids(folder):
    paths = [folder.with_name(f"{folder.name}-epochs-{rank}") for rank in range(2)]
    return [int(path.read_text(encoding="utf-8").split()[1]) for path in paths]


def final(folder):
    """The last checkpoint, less what tells one run from another."""
    state = snapshot.load_checkpoint(folder)
    return {name: state[name] for name in ("module", "ranks", "optimizer")}


def same(a, b, path=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def wait_and_kill(process, folder, steps):
    """Kills all processes of a run once it has so many lines."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(path.read_text(encoding="utf-8").splitlines()) >= steps:
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0]
    process.kill()  # torchrun first, else it might act on what happens to its children
    for pid in pids(folder):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_two_killed_ranks_go_on_with_their_own_buffers(queue_plugin, phantoms, flags, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(2, *words_of(whole, phantoms, flags))
    words = [*words_of(killed, phantoms, flags), "--queue.pause", "0.2"]
    process = subprocess.Popen(
        [*command(2), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean(),
    )
    wait_and_kill(process, killed, 7)
    [saved] = snapshot.checkpoints(killed)
    own = snapshot.read_checkpoint(saved)["ranks"]
    assert own[0] == {} and "proxies.queue.queue" in own[1]
    assert "proxies.queue.bank" not in own[1]  # the same on both
    before = [epochs(killed, rank) for rank in range(2)]
    assert all(seen[:3] == ["0", "1", "2"] for seen in before)
    told = run(2, "--resume", str(killed), "--workers", "0")
    assert "resuming at step 5 of 10" in told and "note:" not in told
    same(final(killed), final(whole))
    ours, theirs = (ssl3d.load_encoder(folder).state_dict() for folder in (killed, whole))
    same(dict(ours), dict(theirs))
    # Steps 7 and 10 begin an epoch, and come after the checkpoint; step 6 lies within one.
    for rank in range(2):
        assert epochs(whole, rank) == ["0", "1", "2", "3"]
        assert epochs(killed, rank) == [*before[rank], "2", "3"]


@pytest.mark.slow
def test_another_number_of_ranks_takes_those_of_the_first(queue_plugin, phantoms, flags, tmp_path):
    folder = tmp_path / "run"
    words = [*words_of(folder, phantoms, flags, steps=6), "--queue.signal-at", "3"]
    done = subprocess.run(
        [*command(2), *words], capture_output=True, text=True, env=clean(), check=False, timeout=240
    )
    assert done.returncode != 0 and "stopped by SIGTERM after step 5 of 6" in done.stdout, done.stderr
    queue = snapshot.load_checkpoint(folder)["module"]["proxies.queue.queue"]
    told = run(1, "--resume", str(folder), "--workers", "0")
    assert "note: processes 2 before, 1 now" in told
    assert "every process starts with the buffers of the first" in told
    state = snapshot.load_checkpoint(folder)
    assert state["ranks"] == [] and torch.equal(state["module"]["proxies.queue.queue"][:-1], queue[1:])


def test_one_process_calls_start_epoch_as_if_it_had_not_been_stopped(queue_plugin, train, tmp_path):
    def options(name, **more):
        return {
            "steps": 10,
            "subjects": "all",
            "holdout": 0.0,
            "eval_every": -1,
            "queue": {"log": str(tmp_path / f"{name}-epochs"), **more},
        }

    whole = train("whole", proxy="queue", **options("whole"))
    stopped = train("stopped", proxy="queue", **options("stopped", signal_at=7))
    assert stopped.done == 8
    again = ssl3d.resume(stopped.folder)
    assert epochs(stopped.folder) == epochs(whole.folder) == ["0", "1", "2", "3"]
    same(final(again.folder), final(whole.folder))
    assert again.metrics[-1]["queue/loss"] == whole.metrics[-1]["queue/loss"]


def test_proxies_are_loaded_without_their_data(queue_plugin, train, tmp_path, monkeypatch):
    import queue_ssl3d_plugin

    options = {"steps": 3, "subjects": "all", "holdout": 0.0, "eval_every": -1}
    run = train("run", proxy="queue", queue={"log": str(tmp_path / "log")}, **options)
    proxy = load_proxies(run.folder)["queue"]
    assert len(proxy.bank) == 12 and bool(proxy.bank.any()) and not proxy.training
    assert torch.equal(proxy.bank, final(run.folder)["module"]["proxies.queue.bank"])

    def setup(self, data):
        self.register_buffer("bank", torch.zeros(len(data), 2))
        assert all(volume.read((0, 0, 0), (1, 1, 1)).numel() for volume in data)

    monkeypatch.setattr(queue_ssl3d_plugin.Queue, "setup", setup)
    with pytest.raises(
        CheckpointError, match=r"asks for `read` of a volume.*load_proxies\(.*, data\)"
    ) as caught:
        load_proxies(run.folder)
    assert "\n" not in str(caught.value)
    from ssl3d.data.open import open_data

    data = open_data(train_data(run))
    assert torch.equal(load_proxies(run.folder, data)["queue"].bank, proxy.bank)


def train_data(run):
    from ssl3d.checkpoint.snapshot import config_of

    return config_of(run.folder)["data"]
