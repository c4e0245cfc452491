"""Every registered proxy keeps the contract, resumes to the same bytes, and learns over ranks as alone."""

import shutil

import pytest
import torch

import ssl3d
from ssl3d import plugins
from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.proxies import load_proxies
from ssl3d.config import to_dict
from ssl3d.data.open import open_data
from ssl3d.testing import check_proxy, check_ranks

NAMES = plugins.names(plugins.PROXIES)
ALTERNATING = [(name, ("acs", "3d")[number % 2]) for number, name in enumerate(NAMES)]


@pytest.mark.parametrize("name,kind", ALTERNATING)
def test_it_keeps_the_contract(name, kind, small, tiny_encoder, store_of):
    data = open_data([store_of(name)])
    encoder = lambda: tiny_encoder(kind, name=name)  # noqa: E731
    check_proxy(name, small(name, kind), encoder, data, steps=12, lr=2e-3)  # more under `slow`


@pytest.mark.slow
@pytest.mark.parametrize("bfloat16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["acs", "3d"])
@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract_with_every_kernel_and_precision(
    name, kind, bfloat16, small, tiny_encoder, store_of
):
    config, data = small(name, kind), open_data([store_of(name)])
    check_proxy(name, config, encoder=lambda: tiny_encoder(kind, name=name), data=data, bfloat16=bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_and_two_are_four(name, small, tiny_encoder, store_of, tmp_path):
    # Three steps an epoch: it goes on in the middle of one, and begins another.
    whole = ssl3d.pretrain(
        name,
        data=str(store_of(name)),
        out=tmp_path / "whole",
        encoder="resnet10",
        resnet10=to_dict(tiny_encoder("acs", name=name).config),
        **{name: to_dict(small(name))},
        steps=4,
        batch_size=4,
        checkpoint_every=2,
        subjects="all",
        holdout=0.0,
        eval_every=-1,
        precision="32",
        workers=0,
        threads=1,
    )
    # As it was when the second step had been saved, and no more.
    half = shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(half / "encoder")
    newest, before = snapshot.checkpoints(half)
    newest.unlink()
    assert snapshot.step_of(before) == 2
    again = ssl3d.resume(half)
    ours, theirs = (snapshot.load_checkpoint(run.folder) for run in (again, whole))
    kept = theirs["module"]
    assert [key for key, value in kept.items() if not _equal(ours["module"][key], value)] == []
    ours, theirs = ((run.folder / "encoder" / "encoder.safetensors").read_bytes() for run in (again, whole))
    assert ours == theirs
    # Its heads are loaded without the data: the checkpoint knows what they were sized by.
    loaded = load_proxies(whole.folder)[name].state_dict()
    prefix = f"proxies.{name}."
    assert all(_equal(loaded[k.removeprefix(prefix)], v) for k, v in kept.items() if k.startswith(prefix))
    losses = [[record[f"{name}/loss"] for record in run.metrics] for run in (again, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def _equal(a, b):
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_learn_what_one_learns(name, small, tiny_encoder, store_of):
    data = open_data([store_of(name)])
    check_ranks(name, small(name, ranks=True), lambda: tiny_encoder(norm="group", name=name), data)


def test_the_record_counts_what_clustering_costs_beside_the_steps(small, store_of, tmp_path):
    store = str(store_of("deepcluster_v2"))
    run = ssl3d.pretrain(
        "deepcluster_v2", store, tmp_path / "run", steps=3, batch_size=4, eval_every=-1,
        encoder="resnet10", resnet10={"width": 8}, deepcluster_v2=to_dict(small("deepcluster_v2")),
    )  # fmt: skip
    compute = run.encoder.metadata["compute"]
    assert compute["flops_between_epochs"] > 0
    assert compute["flops"] == 3 * compute["flops_per_step"] + compute["flops_between_epochs"]
