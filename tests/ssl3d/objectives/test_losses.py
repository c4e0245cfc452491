import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.objectives.contrastive import alignment, barlow_twins_loss, nt_xent, uniformity


def projections(rows=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator, requires_grad=True) for _ in range(2)]


def reference_nt_xent(a, b, subject, temperature):
    """Equation 1 of Chen et al., one anchor at a time, without the rows of the anchor's subject."""
    z = np.concatenate([a, b])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    who, n = np.tile(subject, 2), len(a)
    losses = []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        similar = np.exp(z @ z[i] / temperature)
        kept = [k for k in range(2 * n) if k == j or (k != i and who[k] != who[i])]
        losses.append(-math.log(similar[j] / similar[kept].sum()))
    return float(np.mean(losses))


def reference_barlow(a, b, weight):
    """The authors' main.py: BatchNorm without affine, c = a.T @ b / B, the two sums."""
    a = (a - a.mean(0)) / np.sqrt(a.var(0) + 1e-5)
    b = (b - b.mean(0)) / np.sqrt(b.var(0) + 1e-5)
    c = a.T @ b / len(a)
    on = ((np.diag(c) - 1) ** 2).sum()
    off = (c**2).sum() - (np.diag(c) ** 2).sum()
    return on + weight * off


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_lightlys_when_every_row_is_another_subject(temperature):
    from lightly.loss import NTXentLoss

    a, b = projections()
    mine = nt_xent(a, b, torch.arange(6), temperature).loss
    theirs = NTXentLoss(temperature)(a, b)
    assert torch.allclose(mine, theirs, atol=1e-6)
    for x, y in zip(torch.autograd.grad(mine, (a, b)), torch.autograd.grad(theirs, (a, b)), strict=True):
        assert torch.allclose(x, y, atol=1e-6)
    unmasked = nt_xent(a, b, torch.zeros(6, dtype=torch.int64), temperature, same_subject_negatives=True)
    assert torch.allclose(unmasked.loss, theirs, atol=1e-6)


def test_nt_xent_by_hand():
    # Two orthogonal pairs, each identical: similarity 1 to the positive, 0 to the two negatives.
    z = torch.eye(2)
    found = nt_xent(z, z, torch.tensor([0, 1]), temperature=0.5)
    assert found.loss.item() == pytest.approx(-math.log(math.e**2 / (math.e**2 + 2)), abs=1e-6)
    assert found.accuracy.item() == 1.0
    assert found.chance.item() == pytest.approx(1 / 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=2, max_size=8))
def test_rows_of_one_subject_are_not_negatives(seed, subjects):
    a, b = projections(len(subjects), 4, seed)
    found = nt_xent(a, b, torch.tensor(subjects), 0.3).loss.item()
    expected = reference_nt_xent(a.detach().numpy(), b.detach().numpy(), np.array(subjects), 0.3)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_the_order_of_rows_and_of_views_does_not_matter(seed):
    a, b = projections(6, 5, seed)
    subject = torch.tensor([0, 0, 1, 2, 3, 3])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    whole = nt_xent(a, b, subject)
    shuffled = nt_xent(b[order], a[order], subject[order])
    assert torch.allclose(whole.loss, shuffled.loss, atol=1e-5)
    assert whole.accuracy == shuffled.accuracy
    barlow = barlow_twins_loss(a, b).loss
    assert torch.allclose(barlow, barlow_twins_loss(b[order], a[order]).loss, rtol=1e-4)


def test_collapsed_embeddings_recognise_nothing():
    z = torch.ones(5, 3)
    assert nt_xent(z, z, torch.arange(5)).accuracy == 0


def test_one_subject_alone_gives_no_loss_and_no_gradient():
    a, b = projections(3)
    found = nt_xent(a, b, torch.zeros(3, dtype=torch.int64))
    found.loss.backward()
    assert found.loss == 0 and a.grad.abs().max() == 0
    assert found.accuracy == found.chance == 0


def test_an_anchor_without_negatives_is_not_recognised():
    z = torch.eye(3)
    for subjects, same, accuracy in (([0, 0, 0], False, 0), ([0, 0, 0], True, 1), ([0, 0, 1], False, 1)):
        assert nt_xent(z, z, torch.tensor(subjects), same_subject_negatives=same).accuracy == accuracy
    alone = nt_xent(z[:1], z[:1], torch.tensor([0]), same_subject_negatives=True)
    assert alone.accuracy == alone.chance == 0


@pytest.mark.parametrize("rows,width", [(2, 3), (16, 8), (4, 32)])
def test_barlow_twins_is_the_authors_equation(rows, width):
    a, b = projections(rows, width)
    found = barlow_twins_loss(a, b, 0.0051).loss.item()
    expected = reference_barlow(a.detach().double().numpy(), b.detach().double().numpy(), 0.0051)
    assert found == pytest.approx(expected, rel=1e-4)


def test_barlow_twins_by_hand():
    # Two features, both the same sign pattern: C is all ones, so nothing on the diagonal, two off it.
    a = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    found = barlow_twins_loss(a, a, 0.5)
    assert found.loss.item() == pytest.approx(0.5 * 2, rel=1e-3)
    assert found.diagonal.item() == pytest.approx(1, rel=1e-3)
    assert found.off_diagonal.item() == pytest.approx(1, rel=1e-3)
    apart = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert barlow_twins_loss(apart, apart, 0.5).loss.item() == pytest.approx(0, abs=1e-3)


def test_barlow_twins_of_a_single_row_is_no_error():
    a, b = projections(1)
    found = barlow_twins_loss(a, b)
    found.loss.backward()
    assert found.loss == 0 and a.grad.abs().max() == 0


def test_barlow_twins_ignores_scale_and_offset_of_features():
    a, b = projections(16, 6)
    scaled = barlow_twins_loss(a * torch.arange(1.0, 7) + 5, b * 3 - 2).loss
    assert torch.allclose(barlow_twins_loss(a, b).loss, scaled, rtol=1e-3)


@pytest.mark.parametrize(
    "loss",
    [lambda a, b: nt_xent(a, b, torch.arange(len(a))).loss, lambda a, b: barlow_twins_loss(a, b).loss],
)
def test_losses_stay_in_float32_under_autocast(loss):
    a, b = projections(16, 8)
    plain = loss(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(a, b)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)
    assert loss(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_alignment_and_uniformity_by_hand():
    a = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert alignment(a, a).item() == 0
    assert alignment(a, -a).item() == pytest.approx(4)
    assert uniformity(a).item() == pytest.approx(-4)  # one pair, squared distance 2
    assert uniformity(torch.ones(3, 2)).item() == pytest.approx(0)
