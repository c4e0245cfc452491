"""Permutation sets: the distances that the constructions promise, counted by brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl3d.objectives.permutations import (
    affine_group,
    min_hamming_distance,
    permutation_set,
    projective_group,
)


def brute_force(table):
    """Least number of differing places, pair by pair."""
    return min(sum(a != b for a, b in zip(p, q)) for p, q in itertools.combinations(table.tolist(), 2))


def are_permutations(table):
    return (np.sort(table, axis=1) == np.arange(table.shape[1])).all() and len(
        set(map(tuple, table))
    ) == len(table)


def test_the_sets_for_eight_cubes_have_the_known_sizes_and_distances():
    affine, projective = affine_group(8), projective_group(7)
    assert affine.shape == (56, 8)
    assert projective.shape == (336, 8)
    assert are_permutations(affine) and are_permutations(projective)
    assert brute_force(affine) == 7
    assert brute_force(projective) == 6


@pytest.mark.parametrize("order", [3, 4, 5, 9])
def test_groups_over_any_field(order):
    affine, projective = affine_group(order), projective_group(order)
    assert affine.shape == (order * (order - 1), order)
    assert projective.shape == (order * (order**2 - 1), order + 1)
    assert are_permutations(affine) and are_permutations(projective)
    assert min_hamming_distance(affine) == order - 1  # two agree in at most one place
    assert min_hamming_distance(projective) == order - 1  # of order + 1: in at most two


@pytest.mark.parametrize("make", [lambda: affine_group(8), lambda: projective_group(5)])
def test_they_are_groups(make):
    table = make()
    members = set(map(tuple, table.tolist()))
    for p, q in itertools.product(table[::5], table[::7]):
        assert tuple(p[q].tolist()) in members
    assert tuple(range(table.shape[1])) in members


@pytest.mark.parametrize("order", [1, 6, 10, 12])
def test_there_is_no_field_of_other_sizes(order):
    with pytest.raises(ValueError, match=f"no field of {order} elements"):
        affine_group(order)


@pytest.mark.parametrize(
    ("items", "count", "size", "distance", "construction"),
    [
        (8, 8, 8, 8, "cyclic"),
        (8, 50, 50, 7, "subset of AGL(1, 8)"),
        (8, 56, 56, 7, "AGL(1, 8)"),
        (8, 100, 100, 6, "subset of PGL(2, 7)"),
        (8, 336, 336, 6, "PGL(2, 7)"),
        (4, 12, 12, 3, "AGL(1, 4)"),
        (4, 100, 24, 2, "all 24"),
        (9, 100, 100, 7, "PGL(2, 8)"),
        (27, 100, 100, 26, "AGL(1, 27)"),
        (2, 100, 2, 2, "cyclic"),
    ],
)
def test_the_best_construction_is_taken(items, count, size, distance, construction):
    found = permutation_set(items, count)
    assert found.table.shape == (size, items)
    assert are_permutations(found.table)
    assert found.min_distance == brute_force(found.table) == distance
    assert construction in found.construction or items == 2


@pytest.mark.parametrize(("items", "count", "least"), [(8, 400, 4), (15, 60, 12), (5, 70, 2)])
def test_greedy_sets_are_measured(items, count, least):
    found = permutation_set(items, count)
    assert found.table.shape == (count, items)
    assert are_permutations(found.table)
    assert "greedy" in found.construction
    assert found.min_distance == brute_force(found.table) >= least


def test_the_greedy_choice_beats_chance():
    drawn = np.stack([np.random.default_rng(n).permutation(15) for n in range(60)])
    assert permutation_set(15, 60).min_distance > brute_force(drawn) + 1


def test_subsets_put_every_cube_everywhere():
    # No place may be told from the cube alone.
    table = permutation_set(8, 100).table
    counts = np.stack([np.bincount(column, minlength=8) for column in table.T])
    assert counts.min() >= 4 and counts.max() <= 24


def test_sets_never_change():
    # A checkpoint's classes must mean the same in another version.
    assert permutation_set(8, 100).table[:2].tolist() == [
        [6, 0, 7, 3, 4, 2, 1, 5],
        [4, 6, 1, 3, 5, 0, 2, 7],
    ]
    assert permutation_set(15, 60).table[1].tolist() == [2, 5, 11, 13, 9, 1, 14, 6, 4, 10, 12, 0, 3, 7, 8]


@given(st.integers(2, 12), st.integers(1, 60))
def test_any_set_is_made_of_different_permutations(items, count):
    found = permutation_set(items, count)
    assert are_permutations(found.table)
    assert len(found.table) <= count
    assert found.min_distance >= (2 if len(found.table) > 1 else items)


@pytest.mark.parametrize(("items", "count"), [(1, 1), (8, 0), (8, 10_001)])
def test_wrong_sizes_are_refused_with_the_number(items, count):
    with pytest.raises(ValueError, match=str(items if items < 2 else count)):
        permutation_set(items, count)
