"""A batch embedded in parts and compared whole has the gradients of the whole batch."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import ssl3d
from ssl3d import plugins
from ssl3d.config import to_dict
from ssl3d.data.open import open_data
from ssl3d.errors import UsageError
from ssl3d.training import trainee as training
from ssl3d.training.batch import cut
from ssl3d.training.loader import Loader
from ssl3d.training.loop import reseed
from ssl3d.training.trainee import Trainee

NAMES = ("simclr", "barlow_twins", "pcl")


@pytest.fixture
def made(small, tiny_encoder, store_of):
    """made(name, norm, drop): a trainee and the groups of a batch of six."""

    def make(name, norm="group", drop=0.0):
        data = open_data([store_of(name)])
        # Sampling by affine maps has other last bits in another batch, and they move ReLUs.
        config = dataclasses.replace(small(name, ranks=True), rotate=0.0, scale=0.0)
        torch.manual_seed(0)
        kind = plugins.load(plugins.PROXIES, name)
        encoder = tiny_encoder("acs", norm=norm, name=name)
        proxy = kind(config, encoder)
        proxy.head = nn.Sequential(nn.Dropout(drop), proxy.head)
        proxy.setup(data)
        loader = Loader(data, {name: (kind, config)}, 6, seed=0, steps=1, pin=False)
        return Trainee(encoder, {name: proxy}, {name: 1.0}, 0).train(), next(iter(loader)).groups

    return make


def learnt(trainee, task, given):
    """The loss, all gradients, and all buffers after a pass."""
    reseed(0, 0, 0)
    trainee.zero_grad(set_to_none=True)
    loss, sums = trainee(task, given, 0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainee.named_parameters()}
    return loss.detach(), gradients, {k: v.clone() for k, v in trainee.named_buffers()}, sums


def in_one_pass(embed, *inputs, **_):
    """In place of a checkpoint: everything is kept, nothing computed again."""
    return embed(*inputs)


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_its_loss_and_gradients_are_those_of_the_whole_batch(name, parts, made):
    trainee, groups = made(name)
    trainee.double()
    groups = [
        group._replace(tensors={k: v.double() if v.ndim > 2 else v for k, v in group.tensors.items()})
        for group in groups
    ]
    loss, gradients, _, sums = learnt(trainee, "loss", groups)
    cached, others, _, own = learnt(trainee, "loss of parts", cut(groups, parts))
    assert cached == pytest.approx(loss.item(), rel=1e-5)
    largest = max(float(g.abs().max()) for g in gradients.values())
    worst = max(float((others[key] - value).abs().max()) for key, value in gradients.items())
    assert worst <= 1e-5 * largest
    for key, (value, count) in sums.values.items():
        assert own.values[key][1] == count
        assert own.values[key][0].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), key


def test_dropout_drops_the_same_again_and_batch_norm_counts_once(made, monkeypatch):
    trainee, groups = made("simclr", norm="batch", drop=0.5)
    before = {name: value.clone() for name, value in trainee.named_buffers()}
    parts = cut(groups, 3)
    loss, gradients, buffers, _ = learnt(trainee, "loss of parts", parts)
    for name, value in trainee.named_buffers():
        value.copy_(before[name])
    monkeypatch.setattr(training, "checkpoint", in_one_pass)
    kept, others, counted, _ = learnt(trainee, "loss of parts", parts)
    assert torch.equal(loss, kept)
    assert all(torch.allclose(gradients[key], value, atol=1e-7) for key, value in others.items())
    assert buffers.keys() == counted.keys() and any("num_batches" in key for key in counted)
    assert all(torch.equal(buffers[key], value) for key, value in counted.items())
    assert counted["encoder.bn1.num_batches_tracked"] == 3


def test_a_run_compares_all_volumes_of_its_batch(small, store_of, tmp_path):
    options = {
        "data": str(store_of("simclr")), "encoder": "resnet10", "resnet10": {"width": 8}, "steps": 1,
        "simclr": to_dict(small("simclr")), "batch_size": 6, "accumulate": 3, "eval_every": -1,
        "subjects": "all", "holdout": 0.0, "precision": "32", "workers": 0, "threads": 1,
    }  # fmt: skip
    whole = ssl3d.pretrain("simclr", out=tmp_path / "whole", grad_cache=True, **options)
    assert whole.metrics[0]["simclr/chance"] == pytest.approx(1 / 11)
    parts = ssl3d.pretrain("simclr", out=tmp_path / "parts", **options)
    assert parts.metrics[0]["simclr/chance"] == pytest.approx(1 / 3)


def test_proxies_that_cannot_are_refused_by_name():
    with pytest.raises(UsageError, match="--grad-cache: the loss of mae is no function of embeddings"):
        ssl3d.pretrain(["simclr", "mae"], data="none.h5", accumulate=2, grad_cache=True)
    with pytest.raises(UsageError, match="accumulate is 1"):
        ssl3d.pretrain("simclr", data="none.h5", grad_cache=True)


RUN = """
import sys, ssl3d
run = ssl3d.pretrain("simclr", data=sys.argv[1], out=sys.argv[2], encoder="resnet10",
    resnet10={"width": 16, "kind": "3d", "stem_stride": [1, 1, 1]}, simclr={"crop": [40, 40, 40]}, steps=1,
    batch_size=16, accumulate=int(sys.argv[3]), grad_cache=sys.argv[3] != "1", eval_every=-1,
    subjects="all", holdout=0.0, precision="32", workers=0, threads=1)
print("peak", run.encoder.metadata["compute"]["peak_memory"])
"""


@pytest.mark.slow
def test_memory_falls(store_of, tmp_path):
    peaks = []
    # What is freed goes back to the system at once, so that the resident size says what is held.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for parts in ("1", "8"):
        words = [sys.executable, "-c", RUN, str(store_of("simclr")), str(tmp_path / parts), parts]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
        peaks.append(int(done.stdout.split("peak ")[1]))
    assert peaks[1] < 0.7 * peaks[0], peaks
