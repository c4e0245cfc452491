"""A checkpoint with the right digest and wrong parts is refused by name: nothing trains from it."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from ssl3d import cli
from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.card import read_card
from ssl3d.checkpoint.weights import restore_optimizer
from ssl3d.errors import CheckpointError

STOPPED = Path(__file__).parents[2] / "made_before" / "stopped" / "sorting"
GONE = object()


@pytest.fixture(scope="module")
def state():
    (path,) = snapshot.checkpoints(STOPPED)
    return snapshot.read_checkpoint(path)


def changed(state, place, value):
    state = copy.deepcopy(state)
    *way, last = place.split("/")
    inner = state
    for step in way:
        inner = inner[step]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return state


WRONG = [
    *((part, value) for part in ("step", "steps", "patch", "about", "world", "device", "spec", "precision",
                                 "module", "optimizer") for value in (GONE, None, 1.5, [{}])),
    ("outline", 7), ("ranks", {}), ("step", -1), ("step", 10**9), ("patch", [1, 2]), ("patch", ["a"] * 3),
    ("about/data", GONE), ("about/data/digest", 3), ("about/plugins", []), ("about/compute", "x"),
    ("about/compute/seconds", []), ("spec/encoder", 3), ("spec/encoder_config", None),
    ("spec/proxies", ["sorting"]), ("spec/proxies/sorting", 3), ("module/encoder", "text"),
    ("outline/shapes", [1]), ("ranks", [[1]]),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value"), WRONG)
def test_a_part_of_the_wrong_kind_is_refused_by_name(state, tmp_path, place, value):
    broken = changed(state, place, value)
    path = snapshot.save_checkpoint(tmp_path, 9, lambda path: torch.save(broken, path))
    with pytest.raises(CheckpointError, match=f"{path}: is no checkpoint of ssl3d: ") as caught:
        snapshot.read_checkpoint(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
        snapshot.load_checkpoint(tmp_path, lambda line: None)


def test_a_checkpoint_whose_encoder_has_diverged_is_passed_over(state, tmp_path):
    name = next(name for name in state["module"] if name.startswith("encoder."))
    for step, value in ((3, 1.0), (6, math.nan)):
        odd = {**state, "step": step, "module": {**state["module"], name: state["module"][name] * value}}
        snapshot.save_checkpoint(tmp_path, step, lambda path, odd=odd: torch.save(odd, path))
    told = []
    assert snapshot.load_checkpoint(tmp_path, told.append)["step"] == 3
    assert f"weights of {name} are NaN or infinite" in told[0]


@pytest.mark.parametrize("patch", [[8, 8], [-1, 8, 8], [8, 8, "8"]])
def test_a_card_with_another_patch_is_refused(tmp_path, patch):
    card = {"format": 1, "architecture": "resnet10", "config": {}, "patch": patch}
    (tmp_path / "encoder.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"damaged: patch is .* not three sizes"):
        read_card(tmp_path)


def stepped(kind, **options):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    optimizer = kind(layer.parameters(), lr=0.1, **options)
    for _ in range(2):
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_gets_its_own_state(kind):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    layer, first = stepped(kind, **options)
    kept, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(layer.state_dict())
    layer(torch.ones(1, 4)).sum().backward()
    first.step()
    other, second = stepped(kind, **options)
    other.load_state_dict(weights)
    restore_optimizer(second, kept)
    other.load_state_dict(weights)
    other.weight.grad, other.bias.grad = layer.weight.grad.clone(), layer.bias.grad.clone()
    second.step()
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("state", GONE), ("param_groups", GONE), ("state", 7), ("param_groups", []),
        ("param_groups", [{}]), ("state/0", 3), ("state/0/exp_avg", GONE), ("state/0/exp_avg", "text"),
        ("state/0/exp_avg", torch.zeros(5)), ("state/0/exp_avg", torch.full((3, 4), math.nan)),
        ("state/0/step", [1]), ("state/7", {"exp_avg": 1}), ("group/lr", "x"), ("group/betas", 3),
        ("group/betas", GONE), ("group/params", [0]), ("group/eps", None),
    ],
)  # fmt: skip
def test_an_optimizer_refuses_what_is_not_its_own(place, value):
    _, optimizer = stepped(torch.optim.AdamW)
    state = copy.deepcopy(optimizer.state_dict())
    if place.startswith("group/"):
        state["param_groups"] = [changed(state["param_groups"][0], place.partition("/")[2], value)]
    else:
        *way, last = (int(part) if part.isdigit() else part for part in place.split("/"))
        inner = state
        for step in way:
            inner = inner[step]
        inner[last] = value
        if value is GONE:
            del inner[last]
    with pytest.raises(ValueError):
        restore_optimizer(optimizer, state)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("module", {}, "missing"),
        ("optimizer/param_groups", [], "is not one of this run"),
        ("about/data/digest", "0" * 32, "its data have changed"),
        ("world", GONE, "none of its 1 checkpoints is whole"),
    ],
)
def test_a_run_does_not_go_on_from_wrong_parts(state, tmp_path, capsys, monkeypatch, place, value, said):
    shutil.copytree(STOPPED, tmp_path / "run")
    shutil.copy(STOPPED.parents[1] / "store.h5", tmp_path)
    for path in snapshot.checkpoints(tmp_path / "run"):
        path.unlink()
    broken = changed(state, place, value)
    snapshot.save_checkpoint(tmp_path / "run", int(state["step"]), lambda path: torch.save(broken, path))
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", "--resume", "run", "--data", str(tmp_path / "store.h5")]
    assert cli.main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and "run" in error
    assert not (tmp_path / "run" / "encoder").exists()
