"""Balanced losses: the published equations by hand, two ranks as one, a resumption to the same bytes."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import ssl3d
from ssl3d import cli
from ssl3d.encoders.resnet import ResNet10
from ssl3d.errors import TrainingError, UsageError
from ssl3d.training.balance import GradNorm, Uncertainty, build_balance, last_shared

# Uncertainty --------------------------------------------------------------------------------------


def test_uncertainty_is_the_sum_of_weighted_losses_and_log_variances():
    balance = Uncertainty({"a": 1.0, "b": 4.0})
    losses = {"a": torch.tensor(3.0, requires_grad=True), "b": torch.tensor(0.5, requires_grad=True)}
    total = balance(losses, None)
    # s = 0 and -log 4: 1 * 3 + 4 * .5 + (0 - log 4) / 2
    assert total.item() == pytest.approx(3 + 2 - math.log(4) / 2)
    total.backward()
    assert losses["a"].grad.item() == pytest.approx(1) and losses["b"].grad.item() == pytest.approx(4)
    # d/ds = -exp(-s) L + 1/2
    assert balance.log_variances.grad.tolist() == pytest.approx([-3 + 0.5, -4 * 0.5 + 0.5])


def test_uncertainty_comes_to_rest_at_one_over_twice_the_loss():
    balance = Uncertainty({"a": 1.0, "b": 1.0})
    optimizer = torch.optim.SGD(balance.parameters(), 0.1)
    for _ in range(400):
        optimizer.zero_grad()
        balance({"a": torch.tensor(2.0), "b": torch.tensor(0.25)}, None).backward()
        optimizer.step()
    assert balance.current().tolist() == pytest.approx([0.25, 2.0], rel=1e-3)


def test_weight_decay_leaves_the_log_variances_alone():
    from ssl3d.training.optim import without_decay

    assert without_decay(Uncertainty({"a": 1.0, "b": 1.0})) == {"log_variances"}


# GradNorm -----------------------------------------------------------------------------------------


def toy(scale_a, scale_b, shared):
    """Two losses linear in the shared weight: their gradients are (scale, 0) and (0, 2 scale)."""
    return {"a": scale_a * shared[0], "b": 2 * scale_b * shared[1]}


def test_gradnorm_moves_the_weights_as_the_paper_says():
    shared = nn.Parameter(torch.tensor([3.0, 1.0]))
    balance = GradNorm({"a": 1.0, "b": 1.0}, alpha=1.5, rate=0.1)
    total = balance(toy(1.0, 1.0, shared), shared)
    assert total.item() == pytest.approx(3 + 2)
    balance.step()
    # First step: rates 1 and 1; G = 1 and 2, target 1.5 each; signs -, +; G over the mean: 1/1.5, 2/1.5
    moved = [math.exp(0.1 / 1.5), math.exp(-0.1 * 2 / 1.5)]
    expected = [2 * w / sum(moved) for w in moved]
    assert balance.current().tolist() == pytest.approx(expected)
    assert balance.first.tolist() == pytest.approx([3, 2])

    with torch.no_grad():
        shared.copy_(torch.tensor([0.6, 0.9]))
    balance(toy(1.0, 1.0, shared), shared)
    balance.step()
    # Losses .6 and 1.8: training rates .2 and .9, relative to their mean .55
    sizes = [expected[0] * 1, expected[1] * 2]
    mean = sum(sizes) / 2
    targets = [mean * (0.2 / 0.55) ** 1.5, mean * (0.9 / 0.55) ** 1.5]
    moved = [
        w * math.exp(-0.1 * math.copysign(1, size - target) * size / mean)
        for w, size, target in zip(expected, sizes, targets, strict=True)
    ]
    assert balance.current().tolist() == pytest.approx([2 * w / sum(moved) for w in moved])


def test_the_gradient_of_the_weights_is_that_of_the_papers_loss():
    torch.manual_seed(0)
    network, x = nn.Linear(5, 4), torch.randn(7, 5)
    balance = GradNorm({"a": 3.0, "b": 1.0, "c": 2.0}, alpha=0.5, rate=1e-3)
    before = balance.current()

    def losses():
        z = network(x)
        return {"a": z.square().mean(), "b": z.abs().mean(), "c": 5 * (z - 1).square().mean()}

    balance(losses(), network.weight)
    balance.step()
    logs = before.log().requires_grad_()
    sizes = torch.stack(
        [
            (logs[i].exp() * torch.autograd.grad(loss, network.weight, retain_graph=True)[0]).norm()
            for i, loss in enumerate(losses().values())
        ]
    )
    target = sizes.mean().detach()  # all training rates are 1 at the first step
    (gradient,) = torch.autograd.grad((sizes - target).abs().sum(), logs)
    moved = (logs.detach() - 1e-3 * gradient / target).exp()
    assert torch.allclose(balance.current(), 3 * moved / moved.sum(), atol=1e-6)


def test_gradnorm_makes_the_gradients_equal():
    shared = nn.Parameter(torch.tensor([1.0, 1.0]))
    balance = GradNorm({"a": 1.0, "b": 1.0}, alpha=0.0, rate=0.025)
    for _ in range(300):
        balance(toy(1.0, 10.0, shared), shared)
        balance.step()
    sizes = balance.current() * torch.tensor([1.0, 20.0])
    assert balance.current().sum().item() == pytest.approx(2)
    assert sizes[0].item() == pytest.approx(sizes[1].item(), rel=0.2)


def test_parts_of_a_batch_move_the_weights_as_the_whole():
    shared = nn.Parameter(torch.tensor([2.0, 1.0]))
    whole, parts = (GradNorm({"a": 1.0, "b": 1.0}) for _ in range(2))
    whole(toy(2.0, 1.0, shared), shared)
    parts(toy(1.0, 0.5, shared), shared)
    parts(toy(3.0, 1.5, shared), shared)
    whole.step()
    parts.step()
    assert torch.allclose(whole.current(), parts.current()) and torch.allclose(whole.first, parts.first)


def test_a_loss_below_nought_is_refused_by_name():
    shared = nn.Parameter(torch.tensor([-1.0, 1.0]))
    balance = GradNorm({"good": 1.0, "b": 1.0})
    balance({"b": shared[1] * 1, "good": shared[0] * 1}, shared)
    with pytest.raises(TrainingError, match="the loss of good is -1 at the first step"):
        balance.step()


# A run --------------------------------------------------------------------------------------------


def test_one_proxy_needs_no_balance():
    assert build_balance("gradnorm", {"a": 1.0}, 1.5) is None
    assert build_balance("fixed", {"a": 1.0, "b": 1.0}, 1.5) is None
    with pytest.raises(UsageError, match="b has 0"):
        build_balance("uncertainty", {"a": 1.0, "b": 0.0}, 1.5)


def test_the_last_shared_weight_is_one_of_the_last_stage():
    encoder = ResNet10(ResNet10.Config(width=4))
    names = {id(p): name for name, p in encoder.named_parameters()}
    assert names[id(last_shared(encoder))].startswith("layer4.")


def values(run):
    """What was logged, less the time it took."""
    timings = {"seconds", "waiting", "volumes_per_s"}
    return [{k: v for k, v in record.items() if k not in timings} for record in run.metrics]


@pytest.mark.parametrize("kind", ["fixed", "uncertainty", "gradnorm"])
def test_a_stopped_run_of_several_proxies_ends_with_the_same_bytes(kind, train):
    options = {
        "proxy": ["tiny", "other"], "balance": kind, "weights": (1.0, 3.0), "accumulate": 2, "lr": 0.01,
    }  # fmt: skip
    whole = train("whole", steps=6, **options)
    stopped = train("stopped", steps=6, tiny={"signal_at": 2}, **options)
    assert stopped.done == 3
    again = ssl3d.resume(stopped.folder)
    ours, theirs = (run.folder / "encoder" / "encoder.safetensors" for run in (again, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert values(again) == values(whole)
    first, last = whole.metrics[0], whole.metrics[-1]
    assert {"tiny/loss", "other/loss"} <= set(first)
    if kind == "fixed":
        assert "tiny/weight" not in first
        expected = first["tiny/loss"] + 3 * first["other/loss"]
    else:
        begun = [1.0, 3.0] if kind == "uncertainty" else [0.5, 1.5]
        weights = [first["tiny/weight"], first["other/weight"]]
        assert weights == pytest.approx(begun)
        assert last["tiny/weight"] != pytest.approx(begun[0], rel=1e-4)
        expected = sum(w * first[f"{n}/loss"] for w, n in zip(weights, ("tiny", "other"), strict=True))
        if kind == "uncertainty":
            expected -= (math.log(1) + math.log(3)) / 2
        else:
            assert last["tiny/weight"] + last["other/weight"] == pytest.approx(2)
    assert first["loss"] == pytest.approx(expected, rel=1e-4)


def clean():
    dropped = ("SLURM_", "TORCHELASTIC", "WORLD_", "RANK")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm"])
def test_two_ranks_find_the_weights_of_one(kind, tiny_plugins, phantoms, flags, train, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = ["--proxy", "tiny", "other", "--balance", kind, "--steps", "5", "--batch-size", "8"]
    words += ["--data", phantoms, "--out", str(tmp_path / "two"), "--workers", "0", "--eval-every", "-1"]
    done = subprocess.run(
        [*command, "ssl3d", "pretrain", *flags, *words],
        capture_output=True, text=True, env=clean(), check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    one = train("one", proxy=["tiny", "other"], balance=kind, batch_size=8, steps=5, eval_every=-1)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    two = [json.loads(line) for line in lines]
    for name in ("loss", "tiny/weight", "other/weight"):
        ours, theirs = [[record[name] for record in records] for records in (two, one.metrics)]
        assert ours == pytest.approx(theirs, rel=1e-3), name
    assert two[-1]["tiny/weight"] != two[0]["tiny/weight"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--weights", "0", "1"], "weights"),
        (["--balance-alpha", "-1"], "balance"),
        (["--precision", "16"], "which precision 16 does not give"),
        (["--strategy", "fsdp"], "which strategy fsdp does not give"),
    ],
)
def test_what_cannot_be_balanced_is_refused_in_one_line(words, message, tiny_plugins, capsys):
    asked = ["pretrain", "--proxy", "tiny", "other", "--balance", "gradnorm", *words]
    assert cli.main(asked) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_help_names_the_ways_to_balance(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help-all"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--balance <fixed | uncertainty | gradnorm>" in told and "Kendall et al., 2018" in told
