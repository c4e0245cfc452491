"""Prototypes, Sinkhorn, k-means and the memory bank against the authors' equations and lightly."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssl3d.api import UsageError
from ssl3d.objectives.clustering import (
    IGNORED,
    MemoryBank,
    Prototypes,
    agreement,
    default_prototypes,
    mutual_information,
    perplexity,
    prototype_picture,
    sinkhorn,
    spherical_kmeans,
    swav_loss,
)


def cosines(seed, rows, count, features=16):
    generator = torch.Generator().manual_seed(seed)
    x, c = (
        torch.randn(rows, features, generator=generator),
        torch.randn(count, features, generator=generator),
    )
    return F.normalize(x, dim=1) @ F.normalize(c, dim=1).T


# Sinkhorn -----------------------------------------------------------------------------------------


def authors_sinkhorn(scores, epsilon, iterations):
    """The equations of facebookresearch/swav: Q is (K, B)."""
    q = np.exp(scores.double().numpy() / epsilon).T
    q /= q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= k
        q /= q.sum(axis=0, keepdims=True)
        q /= b
    return torch.from_numpy((q * b).T).float()


@pytest.mark.parametrize(
    "rows,count,epsilon,iterations", [(12, 5, 0.05, 3), (7, 20, 0.5, 1), (3, 3, 0.1, 9)]
)
def test_sinkhorn_is_the_authors_and_lightlys(rows, count, epsilon, iterations):
    from lightly.loss.swav_loss import sinkhorn as theirs

    scores = cosines(0, rows, count)
    q = sinkhorn(scores, epsilon, iterations)
    assert torch.allclose(q, authors_sinkhorn(scores, epsilon, iterations), atol=1e-5)
    assert torch.allclose(q, theirs(scores.clone(), iterations, epsilon), atol=1e-5)


def test_sinkhorn_uses_every_prototype_equally_whatever_the_bias():
    scores = cosines(1, 64, 8) + torch.linspace(0, 1, 8)  # the last prototype is nearest to nearly all
    q = sinkhorn(scores, iterations=100)
    assert torch.allclose(q.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(q.sum(0), torch.full((8,), 8.0), atol=0.05)


def test_sinkhorn_stays_finite_in_half_precision_and_at_tiny_epsilon():
    scores = torch.eye(6) * 2 - 1
    assert torch.allclose(sinkhorn(scores.half()), sinkhorn(scores), atol=1e-3)
    assert sinkhorn(scores, epsilon=1e-3).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert sinkhorn(scores.bfloat16()).dtype == torch.float32


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 9), count=st.integers(2, 9))
def test_sinkhorn_does_not_care_about_order(seed, rows, count):
    scores = cosines(seed, rows, count)
    generator = torch.Generator().manual_seed(seed)
    r, c = torch.randperm(rows, generator=generator), torch.randperm(count, generator=generator)
    assert torch.allclose(sinkhorn(scores[r][:, c]), sinkhorn(scores)[r][:, c], atol=1e-5)


# The loss -----------------------------------------------------------------------------------------


def test_swav_loss_of_two_views_by_hand():
    # View a is surely of prototype 0, view b of 1; both guess (1/2, 1/2): log 2 each, and their mean.
    level = torch.zeros(1, 2)
    sure = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    assert swav_loss([level, level], sure).item() == pytest.approx(np.log(2))
    # b's scores (.1, 0) at temperature .1 give log softmax of (1, 0); a is level.
    told = swav_loss([level, torch.tensor([[0.1, 0.0]])], sure, 0.1)
    assert told.item() == pytest.approx((np.log(1 + np.exp(-1)) + np.log(2)) / 2)


@pytest.mark.parametrize("small", [0, 1, 3])
def test_swav_loss_is_the_authors_and_lightlys(small):
    from lightly.loss import SwaVLoss

    scores = [cosines(seed, 10, 6) for seed in range(2 + small)]
    q = [sinkhorn(view) for view in scores[:2]]
    ours = swav_loss(scores, q, 0.1)
    theirs = SwaVLoss()([view.clone() for view in scores[:2]], [view.clone() for view in scores[2:]])
    authors = 0.0
    for i in range(2):
        others = [v for v in range(2 + small) if v != i]
        authors += sum(-(q[i] * F.log_softmax(scores[v] / 0.1, 1)).sum(1).mean() for v in others) / len(
            others
        )
    assert ours.shape == ()
    assert torch.allclose(ours, theirs[0], atol=1e-5)
    assert torch.allclose(ours, authors / 2, atol=1e-5)


def test_swav_loss_of_a_single_view_is_refused():
    with pytest.raises(ValueError, match="two views at least"):
        swav_loss([torch.zeros(2, 3)], [torch.zeros(2, 3)])


# Prototypes ---------------------------------------------------------------------------------------


def test_prototypes_are_cosines_without_bias():
    torch.manual_seed(0)
    layer, x = Prototypes(5, 3), torch.randn(4, 5)
    expected = F.normalize(x, dim=1) @ F.normalize(layer.weight, dim=1).T
    assert torch.allclose(layer(x), expected)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    with torch.no_grad():
        layer.weight *= 7
    assert torch.allclose(layer(x * 3), expected, atol=1e-6)
    layer.normalize_()
    assert torch.allclose(layer.weight.norm(dim=1), torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer(x), expected, atol=1e-6)


def test_frozen_prototypes_get_no_gradient_and_features_do():
    layer, x = Prototypes(5, 3), torch.randn(4, 5, requires_grad=True)
    layer(x, frozen=True).sum().backward()
    assert layer.weight.grad is None and x.grad.abs().sum() > 0
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("items,count", [(3, 3), (40, 8), (120, 12), (480, 48), (50_000, 3000), (0, 2)])
def test_prototypes_scale_with_the_data(items, count):
    assert default_prototypes(items) == count


# k-means ------------------------------------------------------------------------------------------


def test_kmeans_finds_directions_whatever_the_length():
    generator = torch.Generator().manual_seed(0)
    true = torch.eye(4).repeat_interleave(25, 0)
    x = true + 0.1 * torch.randn(100, 4, generator=generator)
    x = x * torch.rand(100, 1, generator=generator).add(0.1)
    best = max(
        mutual_information(
            spherical_kmeans(x, 4, generator=torch.Generator().manual_seed(seed)).assignment, true.argmax(1)
        )
        for seed in range(8)
    )
    assert best == pytest.approx(1.0)


def authors_kmeans(x, first, iterations):
    """DeepCluster-v2's cluster_memory, for rows x of unit length and the rows it begins with."""
    centroids = x[first].clone()
    for iteration in range(iterations + 1):
        assignment = (x @ centroids.T).max(dim=1)[1]
        if iteration == iterations:
            return centroids, assignment
        for k in range(len(first)):
            mine = x[assignment == k]
            if len(mine):
                centroids[k] = mine.mean(0)
        centroids = F.normalize(centroids, dim=1)


@pytest.mark.parametrize("rows,k,iterations", [(50, 6, 10), (9, 9, 3), (5000, 4, 2)])
def test_kmeans_is_the_authors(rows, k, iterations):
    x = F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)), dim=1)
    first = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:k]
    centroids, assignment = authors_kmeans(x, first, iterations)
    found = spherical_kmeans(x, k, iterations, torch.Generator().manual_seed(1))
    assert torch.equal(found.assignment, assignment)
    assert torch.allclose(found.centroids, centroids, atol=1e-5)


def test_an_empty_cluster_keeps_its_centroid():
    x = torch.tensor([[1.0, 0.0]] * 5)  # the second of two equal centroids never gets a row
    found = spherical_kmeans(x, 2, generator=torch.Generator().manual_seed(0))
    assert found.assignment.tolist() == [0] * 5
    assert torch.equal(found.centroids, x[:2])


def test_fewer_rows_than_clusters_is_refused_with_both_numbers():
    with pytest.raises(UsageError, match="3 features cannot start 4 clusters"):
        spherical_kmeans(torch.randn(3, 2), 4)


# The bank -----------------------------------------------------------------------------------------


def test_the_bank_keeps_the_last_feature_of_each_item_it_knows():
    bank = MemoryBank([9, 4, 2_000_000], 3)
    given = torch.randn(4, 2, 3)
    bank.write(torch.tensor([4, 9, 4, 5]), given)
    assert bank.codes.tolist() == [4, 9, 2_000_000]
    assert bank.filled.tolist() == [True, True, False]
    assert torch.allclose(bank.features[:, 0], F.normalize(given[2], dim=1))
    assert torch.allclose(bank.features[:, 1], F.normalize(given[1], dim=1))
    assert bank.rows(torch.tensor([9, 5, 0, 10**7])).tolist() == [1, -1, -1, -1]


def test_items_that_are_unknown_or_not_filled_have_no_target():
    bank = MemoryBank([1, 2, 3, 4], 2)
    bank.write(torch.tensor([1, 2, 4]), torch.randn(3, 2, 2))
    clusters = bank.cluster(0, 2, generator=torch.Generator().manual_seed(0))
    assert clusters.assignment[2] == IGNORED and (clusters.assignment[[0, 1, 3]] >= 0).all()
    targets = bank.targets(clusters.assignment, torch.tensor([3, 4, 77]))
    assert targets.tolist() == [IGNORED, clusters.assignment[3].item(), IGNORED]
    assert MemoryBank([], 2).targets(torch.zeros(3, 0, dtype=torch.int64), torch.tensor([1])).shape == (
        3,
        1,
    )


def test_more_clusters_than_filled_items_leaves_the_last_without():
    bank = MemoryBank(range(10), 4)
    bank.write(torch.tensor([0, 5]), torch.randn(2, 2, 4))
    found = bank.cluster(1, 6)
    assert found.centroids.shape == (6, 4) and found.centroids.isfinite().all()
    assert sorted(found.assignment[bank.filled].tolist()) == [0, 1]
    with pytest.raises(UsageError, match="nothing to cluster"):
        MemoryBank(range(3), 4).cluster(0, 2)


def test_the_bank_survives_saving_byte_for_byte():
    bank, file = MemoryBank(range(5), 3), io.BytesIO()
    bank.write(torch.arange(3), torch.randn(3, 2, 3))
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other = MemoryBank(range(5), 3)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(bank.buffers(), other.buffers(), strict=True))


def test_codes_that_collide_are_refused():
    with pytest.raises(ValueError, match="3 items have 2 different codes"):
        MemoryBank([1, 2, 1], 3)


# What a person reads ------------------------------------------------------------------------------


def test_agreement_by_hand():
    found = agreement(torch.tensor([0, 0, 1, 2, -100]), torch.tensor([0, 1, 1, 2, 0]), 4)
    # Shares 2/4 1/4 1/4 and 1/4 2/4 1/4: chance 2/16 + 2/16 + 1/16; kappa (12/16 - 5/16) / (11/16).
    assert found.agreement.item() == pytest.approx(0.75)
    assert found.chance.item() == pytest.approx(5 / 16)
    assert found.kappa.item() == pytest.approx(7 / 11)
    shares = np.array([3, 3, 2]) / 8
    assert found.used.item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_collapse_agrees_by_chance_only():
    same = torch.full((9,), 3)
    found = agreement(same, same, 8)
    assert (found.agreement, found.chance, found.kappa, found.used) == (1, 1, 0, 1)
    nobody = torch.full((2,), -1)
    assert agreement(nobody, nobody, 3).kappa == 0


def test_perplexity_and_mutual_information():
    assert perplexity(torch.tensor([5, 5, 0, 0])).item() == pytest.approx(2.0)
    first = torch.tensor([0, 0, 1, 1, IGNORED])
    assert mutual_information(first, torch.tensor([7, 7, 2, 2, 0])) == pytest.approx(1.0)
    unrelated = [
        torch.randint(40, (400,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    assert mutual_information(*unrelated) == pytest.approx(0.0, abs=0.05)
    assert mutual_information(first, torch.full((5,), IGNORED)) == 0.0


def test_the_picture_puts_views_of_a_prototype_together():
    views = torch.rand(5, 1, 3, 8, 8)
    figure = prototype_picture(views, torch.tensor([2, 1, 2, -100, 1]), torch.tensor([2, 1, 0, 0, 1]))
    titles = [panel.get_title() for panel in figure.axes if panel.get_title()]
    assert titles == ["1", "1", "2", "2, not 0"]
    assert prototype_picture(views, torch.full((5,), -100), torch.zeros(5, dtype=torch.int64)).axes


# Ranks --------------------------------------------------------------------------------------------

RANK = """
import os, sys, torch
from ssl3d.objectives.clustering import MemoryBank, agreement, shard, sinkhorn, swav_loss

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=True)
rows = slice(0, 5) if rank == 0 else slice(5, 7)
a, b = (given[name][rows].requires_grad_() for name in "ab")
q = [sinkhorn(a), sinkhorn(b)]
loss = swav_loss([a, b], q)
loss.backward()
bank = MemoryBank(range(6), 4)
bank.write(given["codes"][rows], given["features"][rows])
bank.write(given["codes"][:0] if rank else given["codes"][:1], given["features"][: 1 - rank])
clusters = bank.cluster(0, 3, generator=torch.Generator().manual_seed(rank))
found = {"q": q[0], "loss": loss.detach(), "grad": a.grad, "features": bank.features,
         "centroids": clusters.centroids, "kappa": agreement(a.argmax(1), b.argmax(1), 4).kappa,
         "shard": shard(torch.arange(5))}
torch.save(found, f"{folder}/found{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.stderr.flush()
os._exit(0)  # a thread of the backward pass that outlives the interpreter's end may abort it
"""


def test_ranks_with_unequal_rows_agree_with_one_process(tmp_path):
    torch.manual_seed(0)
    data = {"a": cosines(0, 7, 4), "b": cosines(1, 7, 4), "codes": torch.tensor([0, 1, 2, 3, 9, 1, 5])}
    data["features"] = torch.randn(7, 2, 4)
    torch.save(data, tmp_path / "given.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], stderr=subprocess.PIPE, env=environment
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    ranks = [torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in range(2)]
    a, b = data["a"].requires_grad_(), data["b"]
    loss = swav_loss([a, b], [sinkhorn(a), sinkhorn(b)])
    loss.backward()
    bank = MemoryBank(range(6), 4)
    bank.write(data["codes"], data["features"])
    bank.write(data["codes"][:1], data["features"][:1])
    assert torch.allclose(torch.cat([one["q"] for one in ranks]), sinkhorn(a), atol=1e-6)
    assert torch.allclose((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss.detach(), atol=1e-6)
    assert torch.allclose(torch.cat([one["grad"] for one in ranks]) / 2, a.grad, atol=1e-6)
    for one in ranks:
        assert torch.equal(one["features"], bank.features)
        assert torch.equal(one["centroids"], ranks[0]["centroids"])  # though their generators differ
        assert torch.allclose(one["kappa"], agreement(a.argmax(1), b.argmax(1), 4).kappa)
    assert torch.cat([one["shard"] for one in ranks]).sort().values.tolist() == [0, 1, 2, 3, 4]
