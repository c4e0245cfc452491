"""The relaxations of sorting: hand-computed cases, references written from the papers, invariances."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from ssl3d.objectives.sorting import (
    in_order,
    kendall_tau,
    neuralsort,
    odd_even,
    pairwise_logistic,
    softsort,
    sorting_loss,
    swap_degree,
)

RELAXATIONS = ("softsort", "neuralsort", "odd_even", "pairwise")
DISTRIBUTIONS = ("cauchy", "logistic", "reciprocal", "optimal")
LOGISTIC_1 = 0.7310585786300049  # 1 / (1 + exp(-1))


def matrices(scores, relaxation):
    if relaxation == "softsort":
        return softsort(scores).exp()
    if relaxation == "neuralsort":
        return neuralsort(scores).exp()
    return odd_even(scores)


def doubles(low=-3.0, high=3.0):
    return st.floats(low, high, allow_nan=False, width=32)


# Scores that differ clearly, of 2 to 7 items.
distinct = st.lists(st.integers(-40, 40), min_size=2, max_size=7, unique=True).map(
    lambda values: torch.tensor([values], dtype=torch.float64) / 10
)


# By hand --------------------------------------------------------------------------------------------


def test_softsort_by_hand():
    # Items 1, 0: rank 0 has value 0, at distances 1 and 0.
    p = softsort(torch.tensor([[1.0, 0.0]]), tau=1.0).exp()
    expected = torch.tensor([[[1 - LOGISTIC_1, LOGISTIC_1], [LOGISTIC_1, 1 - LOGISTIC_1]]])
    assert torch.allclose(p, expected)
    # Squared distance 4 over temperature 2.
    p = softsort(torch.tensor([[0.0, 2.0]]), tau=2.0, power=2.0).exp()
    assert p[0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-2)))


def test_neuralsort_by_hand():
    # n = 2: both items are 1 away from the other; rank 0 weighs scores by -1, rank 1 by +1.
    p = neuralsort(torch.tensor([[1.0, 0.0]]), tau=1.0).exp()
    expected = torch.tensor([[[1 - LOGISTIC_1, LOGISTIC_1], [LOGISTIC_1, 1 - LOGISTIC_1]]])
    assert torch.allclose(p, expected)


def test_odd_even_by_hand():
    # One comparator: alpha = atan(1) / pi + 1/2 = 3/4.
    p = odd_even(torch.tensor([[0.0, 1.0]]), steepness=1.0)
    assert torch.allclose(p, torch.tensor([[[0.75, 0.25], [0.25, 0.75]]]))
    # Three items at 0 tie everywhere: comparators (0,1), (1,2), (0,1) of 1/2 each.
    p = odd_even(torch.zeros(1, 3), steepness=1.0)
    assert torch.allclose(
        p, torch.tensor([[[0.375, 0.375, 0.25], [0.375, 0.375, 0.25], [0.25, 0.25, 0.5]]])
    )


def test_pairwise_by_hand():
    scores, ranks = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[2, 0, 1]])
    expected = (2 * math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 3
    assert pairwise_logistic(scores, ranks).item() == pytest.approx(expected)


def test_losses_by_hand():
    scores, ranks = torch.tensor([[0.0, 1.0]]), torch.tensor([[0, 1]])
    for relaxation in ("softsort", "neuralsort"):
        assert sorting_loss(scores, ranks, relaxation).item() == pytest.approx(-math.log(LOGISTIC_1))
        wrong = sorting_loss(scores, 1 - ranks, relaxation).item()
        assert wrong == pytest.approx(-math.log(1 - LOGISTIC_1))
    # All four entries of the matrix are .75 sure.
    assert sorting_loss(scores, ranks, "odd_even", steepness=1.0).item() == pytest.approx(-math.log(0.75))


@pytest.mark.parametrize(
    ("distribution", "at_1"),
    [("cauchy", 0.75), ("logistic", LOGISTIC_1), ("reciprocal", 2 / 3), ("optimal", 1 - 1 / 16)],
)
def test_swap_degree_by_hand(distribution, at_1):
    v = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    expected = torch.tensor([1 - at_1, 0.5, at_1], dtype=torch.float64)
    assert torch.allclose(swap_degree(v, distribution), expected)


# Against the published equations, written out in loops -------------------------------------------------


def reference_softsort(s, tau, power):
    """SoftSort, eq. 3, ascending."""
    n, ordered = len(s), sorted(s)
    p = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            p[i, j] = math.exp(-(abs(ordered[i] - s[j]) ** power) / tau)
        p[i] /= p[i].sum()
    return p


def reference_neuralsort(s, tau):
    """NeuralSort, eq. 5: row i, from 1, of the descending sort; then from last to first."""
    n = len(s)
    p = np.zeros((n, n))
    for i in range(1, n + 1):
        logits = []
        for j in range(n):
            total = 0.0
            for k in range(n):
                total += abs(s[j] - s[k])
            logits.append(((n + 1 - 2 * i) * s[j] - total) / tau)
        top = max(logits)
        for j in range(n):
            p[i - 1, j] = math.exp(logits[j] - top)
        p[i - 1] /= p[i - 1].sum()
    return p[::-1]


def reference_degree(v, distribution):
    if distribution == "cauchy":
        return math.atan(v) / math.pi + 0.5
    if distribution == "logistic":
        return 1 / (1 + math.exp(-v))
    if distribution == "reciprocal":
        return 0.5 * v / (2 + abs(v)) + 0.5  # f_R of the paper at beta = 1/2
    if v < -0.25:
        return -1 / (16 * v)
    if v > 0.25:
        return 1 - 1 / (16 * v)
    return v + 0.5


def reference_odd_even(s, steepness, distribution):
    """Monotonic differentiable sorting networks, eqs. 1 to 3: one matrix per layer, multiplied."""
    n, x = len(s), np.array(s, dtype=float)
    p = np.eye(n)
    for layer in range(n):
        one = np.eye(n)
        for i in range(layer % 2, n - 1, 2):
            alpha = reference_degree(steepness * (x[i + 1] - x[i]), distribution)
            one[i, i] = one[i + 1, i + 1] = alpha
            one[i, i + 1] = one[i + 1, i] = 1 - alpha
        x, p = one @ x, one @ p
    return p


@settings(max_examples=40, deadline=None)
@given(
    st.lists(doubles(), min_size=2, max_size=7), st.sampled_from([0.1, 1.0, 3.0]), st.sampled_from([1, 2])
)
def test_softsort_is_the_published_equation(values, tau, power):
    p = softsort(torch.tensor([values], dtype=torch.float64), tau, power).exp()
    assert np.allclose(p[0], reference_softsort(values, tau, power), atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(doubles(), min_size=2, max_size=7), st.sampled_from([0.1, 1.0, 3.0]))
def test_neuralsort_is_the_published_equation(values, tau):
    p = neuralsort(torch.tensor([values], dtype=torch.float64), tau).exp()
    assert np.allclose(p[0], reference_neuralsort(values, tau), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(doubles(), min_size=2, max_size=7),
    st.sampled_from([0.5, 10.0]),
    st.sampled_from(DISTRIBUTIONS),
)
def test_odd_even_is_the_published_network(values, steepness, distribution):
    p = odd_even(torch.tensor([values], dtype=torch.float64), steepness, distribution)
    assert np.allclose(p[0], reference_odd_even(values, steepness, distribution), atol=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [2, 5, 8])
def test_odd_even_agrees_with_diffsort(n, distribution):
    diffsort = pytest.importorskip("diffsort", reason="diffsort, an optional check, is not installed")
    scores = torch.randn(4, n, generator=torch.Generator().manual_seed(n))
    sorter = diffsort.DiffSortNet("odd_even", n, steepness=3.0, distribution=distribution)
    _, theirs = sorter(scores)
    assert torch.allclose(odd_even(scores, 3.0, distribution), theirs.transpose(1, 2), atol=1e-5)


def test_the_sorted_values_agree_with_torchsort():
    torchsort = pytest.importorskip("torchsort", reason="torchsort, an optional check, is not installed")
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    theirs = torchsort.soft_sort(scores, regularization_strength=1e-3)
    assert torch.allclose(
        (softsort(scores, tau=1e-3).exp() @ scores.unsqueeze(2)).squeeze(2), theirs, atol=1e-2
    )


# Properties -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", ["softsort", "neuralsort", "odd_even"])
@settings(max_examples=30, deadline=None)
@given(values=st.lists(doubles(-30, 30), min_size=2, max_size=8))
def test_rows_are_distributions(relaxation, values):
    p = matrices(torch.tensor([values], dtype=torch.float64), relaxation)
    assert (p > -1e-12).all()
    assert torch.allclose(p.sum(dim=2), torch.ones(1, len(values), dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.lists(doubles(-30, 30), min_size=2, max_size=8), st.sampled_from(DISTRIBUTIONS))
def test_odd_even_is_doubly_stochastic(values, distribution):
    p = odd_even(torch.tensor([values], dtype=torch.float64), 10.0, distribution)
    ones = torch.ones(1, len(values), dtype=torch.float64)
    assert torch.allclose(p.sum(dim=1), ones)
    assert torch.allclose(p.sum(dim=2), ones)


@settings(max_examples=40, deadline=None)
@given(distinct, st.sampled_from(["softsort", "neuralsort", "odd_even"]))
def test_the_limit_is_the_hard_sort(scores, relaxation):
    hard = torch.nn.functional.one_hot(scores.argsort(dim=1), scores.shape[1]).double()
    soft = {
        "softsort": lambda: softsort(scores, tau=1e-3).exp(),
        "neuralsort": lambda: neuralsort(scores, tau=1e-3).exp(),
        "odd_even": lambda: odd_even(scores, 1e6),
    }[relaxation]()
    assert torch.allclose(soft, hard, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(distinct, st.sampled_from(["softsort", "neuralsort"]), st.randoms(use_true_random=False))
def test_shuffled_items_permute_the_columns(scores, relaxation, random):
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    assert torch.allclose(matrices(scores[:, order], relaxation), matrices(scores, relaxation)[:, :, order])


@settings(max_examples=40, deadline=None)
@given(distinct, st.sampled_from(["softsort", "neuralsort", "pairwise"]), st.randoms(use_true_random=False))
def test_the_loss_does_not_depend_on_the_order_of_the_items(scores, relaxation, random):
    # (A sorting network's does: its comparators sit at places.)
    ranks = torch.tensor([random.sample(range(scores.shape[1]), scores.shape[1])])
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    assert torch.allclose(
        sorting_loss(scores, ranks, relaxation), sorting_loss(scores[:, order], ranks[:, order], relaxation)
    )


@settings(max_examples=30, deadline=None)
@given(distinct, st.sampled_from(RELAXATIONS), doubles(-5, 5))
def test_the_loss_does_not_depend_on_the_origin_of_the_scores(scores, relaxation, shift):
    ranks = torch.arange(scores.shape[1]).unsqueeze(0)
    assert torch.allclose(
        sorting_loss(scores, ranks, relaxation), sorting_loss(scores + shift, ranks, relaxation), atol=1e-6
    )


@settings(max_examples=30, deadline=None)
@given(distinct, st.sampled_from(RELAXATIONS))
def test_the_loss_of_the_mirrored_order_is_that_of_mirrored_scores(scores, relaxation):
    # One direction must not be easier than the other: `direction either` compares them. An odd network
    # of comparators is its own mirror image only for even n.
    n = scores.shape[1]
    assume(relaxation != "odd_even" or n % 2 == 0)
    ranks = torch.arange(n).unsqueeze(0)
    mirrored = sorting_loss(-scores.flip(1), ranks.flip(1), relaxation)
    assert torch.allclose(sorting_loss(scores, n - 1 - ranks, relaxation), mirrored, atol=1e-9)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_loss_is_zero_when_slices_are_ranked(relaxation):
    ranks = torch.tensor([[3, 0, 2, 1], [0, 1, 2, 3]])
    right = sorting_loss(ranks * 1000.0, ranks, relaxation)
    wrong = sorting_loss(-ranks * 1000.0, ranks, relaxation)
    assert (right < 1e-2).all()
    assert (wrong > 1).all()


@pytest.mark.parametrize(
    # softsort and odd_even have local minima when all scores are free; from small scores, few are met.
    ("relaxation", "scale", "least"),
    [("softsort", 0.01, 0.85), ("odd_even", 0.01, 0.9), ("neuralsort", 1.0, 1.0), ("pairwise", 1.0, 1.0)],
)
def test_following_the_gradient_sorts(relaxation, scale, least):
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(50, 6, generator=generator).argsort(dim=1)
    scores = (torch.randn(50, 6, generator=generator) * scale).requires_grad_()
    assert kendall_tau(scores.detach(), ranks).mean() < 0.2
    optimizer = torch.optim.Adam([scores], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        sorting_loss(scores, ranks, relaxation).sum().backward()
        assert scores.grad.isfinite().all()
        optimizer.step()
    assert kendall_tau(scores.detach(), ranks).mean() >= least


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_equal_scores_have_a_finite_gradient_that_parts_them(relaxation):
    # An untrained encoder on nearly empty slices gives equal scores: learning must begin from there.
    scores = torch.zeros(1, 5, requires_grad=True)
    ranks = torch.arange(5).unsqueeze(0)
    sorting_loss(scores, ranks, relaxation).sum().backward()
    assert scores.grad.isfinite().all()
    if relaxation in ("pairwise", "odd_even"):
        assert scores.grad[0, 0] > 0 > scores.grad[0, -1]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_swap_degrees_are_distribution_functions_with_finite_gradients(distribution):
    v = torch.linspace(-20, 20, 4001, dtype=torch.float64, requires_grad=True)
    f = swap_degree(v, distribution)
    f.sum().backward()
    assert (f.diff() >= -1e-12).all()
    assert torch.allclose(f + f.flip(0), torch.ones_like(f))
    assert v.grad.isfinite().all()
    assert (v.grad >= 0).all()


def test_unknown_names_are_refused():
    scores, ranks = torch.zeros(1, 2), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="bubble"):
        sorting_loss(scores, ranks, "bubble")
    with pytest.raises(ValueError, match="gaussian"):
        odd_even(scores, 1.0, "gaussian")


# Metrics ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(distinct, st.randoms(use_true_random=False))
def test_kendall_tau_is_scipys(scores, random):
    ranks = torch.tensor([random.sample(range(scores.shape[1]), scores.shape[1])])
    expected = kendalltau(scores[0], ranks[0]).statistic
    assert kendall_tau(scores, ranks).item() == pytest.approx(expected)


def test_constant_scores_sort_nothing():
    ranks = torch.arange(5).unsqueeze(0)
    assert kendall_tau(torch.zeros(1, 5), ranks).item() == 0
    assert not in_order(torch.zeros(1, 5), ranks).item()


def test_exactly_one_order_is_right():
    ranks = torch.tensor([[2, 0, 1]])
    right = [order for order in itertools.permutations(range(3)) if in_order(torch.tensor([order]), ranks)]
    assert right == [(2, 0, 1)]
