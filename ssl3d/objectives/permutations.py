"""Sets of permutations that differ from each other in many places: the classes of an ordering task."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_ALL = 8  # up to 8! = 40 320 permutations are listed whole
_POOL = 20_000  # candidates of the greedy choice beyond that
_MOST = 10_000  # permutations in a set; the minimum distance is measured over all pairs
_CELLS = 1 << 24  # compared at once


class PermutationSet(NamedTuple):
    """Permutations of n items, no two equal.

    Attributes:
        table: Permutations (K, n) int64; row k puts item `table[k, i]` at place i.
        min_distance: Least number of places (Hamming distance) in which two rows differ, measured over
            all pairs; n where there is only one row.
        construction: Construction of the set, in words.
    """

    table: np.ndarray
    min_distance: int
    construction: str


@lru_cache(maxsize=32)
def permutation_set(items: int, count: int) -> PermutationSet:
    """Choose permutations that are as far from each other as a known construction goes.

    They are the same in every process and version. The first construction that has enough members counts:

    - the cyclic shifts, n permutations, any two of which differ everywhere;
    - all n! (where at least so many are asked for: there are no more);
    - for n a power of a prime, the affine group AGL(1, n), x -> ax + b over the field of n elements:
      n(n - 1) permutations of which two agree in at most one place (n = 8: 56, distance 7);
    - for n - 1 a power of a prime, the projective group PGL(2, n - 1), x -> (ax + b)/(cx + d) on the
      projective line: (n - 1)n(n - 2) permutations of which two agree in at most two places (n = 8: 336,
      distance 6);
    - the greedy choice: from the largest of these groups on (or from one permutation), always the
      candidate whose nearest chosen one is the farthest. Candidates are all n! up to n = 8, and 20 000
      random ones beyond.

    Args:
        items: Number n of items, at least 2.
        count: Number K of permutations, 1 to 10 000.

    Raises:
        ValueError: `items` or `count` is out of range.

    Example:
        >>> chosen = permutation_set(8, 100)
        >>> chosen.table.shape, chosen.min_distance, chosen.construction
        ((100, 8), 6, 'subset of PGL(2, 7)')
    """
    if items < 2:
        raise ValueError(f"a permutation needs at least 2 items, not {items}")
    if not 1 <= count <= _MOST:
        raise ValueError(f"the number of permutations must lie in 1 to {_MOST}, not {count}")
    if count <= items:
        shifts = (np.arange(items) + np.arange(count)[:, None]) % items
        return _measured(shifts, "cyclic shifts")
    if items <= _ALL and count >= math.factorial(items):
        return _measured(_every(items), f"all {math.factorial(items)}")
    start = np.empty((0, items), np.int64)
    for group, name in _groups(items):
        if len(group) >= count:
            part = "subset of " if count < len(group) else ""
            return _measured(_mixed(group)[:count], part + name)
        start = group
    return _measured(_greedy(items, count, start), "greedy, the farthest next")


def min_hamming_distance(table: np.ndarray) -> int:
    """Measure the least number of places in which two rows of (K, n) differ; n for a single row.

    Example:
        >>> min_hamming_distance(np.array([[0, 1, 2], [0, 2, 1]]))
        2
    """
    count, items = table.shape
    least, rows = items, max(1, _CELLS // max(1, count * items))
    small = table.astype(np.int16)
    for start in range(0, count, rows):
        some = small[start : start + rows]
        apart = (some[:, None] != small[None]).sum(-1)
        apart[np.arange(len(some)), start + np.arange(len(some))] = items
        least = min(least, int(apart.min()))
    return least


def affine_group(order: int) -> np.ndarray:
    """List AGL(1, q), x -> ax + b: (q(q - 1), q), any two rows equal in at most one place.

    Raises:
        ValueError: `order` is not a power of a prime.
    """
    add, times = _field(order)
    rows = [add[times[a], b] for a in range(1, order) for b in range(order)]
    return np.array(rows, dtype=np.int64)


def projective_group(order: int) -> np.ndarray:
    """List PGL(2, q) on the q + 1 points of the projective line: (q(q² - 1), q + 1), infinity last.

    Sharply 3-transitive: any two rows are equal in at most two places.

    Raises:
        ValueError: `order` is not a power of a prime.
    """
    add, times = _field(order)
    infinity = order
    inverse = np.zeros(order, np.int64)
    for x in range(1, order):
        inverse[x] = int(np.flatnonzero(times[x] == 1)[0])
    rows = []
    for a, b in itertools.product(range(1, order), range(order)):  # c = 0, d = 1
        rows.append([*add[times[a], b], infinity])
    for a, b, d in itertools.product(range(order), repeat=3):  # c = 1
        if times[a, d] == b:
            continue  # no inverse
        above, below = add[times[a], b], add[np.arange(order), d]
        values = np.where(below == 0, infinity, times[above, inverse[below]])
        rows.append([*values, a])
    return np.array(rows, dtype=np.int64)


def _groups(items: int) -> list[tuple[np.ndarray, str]]:
    """List the groups that act on so many items, small to large."""
    groups = []
    if _prime_power(items):
        groups.append((affine_group(items), f"AGL(1, {items})"))
    if _prime_power(items - 1) and items - 1 < 40:  # at 40, 64 000 permutations
        groups.append((projective_group(items - 1), f"PGL(2, {items - 1})"))
    return groups


def _prime_power(n: int) -> tuple[int, int] | None:
    """Return (p, m) with n = p to the m, or None."""
    if n < 2:
        return None
    p = next(d for d in range(2, n + 1) if n % d == 0)
    m = round(math.log(n, p))
    return (p, m) if p**m == n else None


@lru_cache(maxsize=8)
def _field(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Make tables of addition and multiplication of the field of `order` elements; 0 and 1 are themselves.

    Elements are polynomials over the integers modulo p, their coefficients the digits to base p.
    """
    powers_of = _prime_power(order)
    if powers_of is None:
        raise ValueError(f"there is no field of {order} elements: {order} is not a power of a prime")
    p, m = powers_of
    powers = p ** np.arange(m)
    digits = np.arange(order)[:, None] // powers % p
    add = ((digits[:, None] + digits[None]) % p) @ powers
    product = np.zeros((order, order, 2 * m - 1), np.int64)
    for i, j in itertools.product(range(m), repeat=2):
        product[:, :, i + j] += digits[:, None, i] * digits[None, :, j]
    for low in range(order):  # x^m + low, until one cannot be divided
        reduced = product.copy()
        for degree in range(2 * m - 2, m - 1, -1):
            reduced[:, :, degree - m : degree] -= reduced[:, :, degree, None] * digits[low]
        times = (reduced[:, :, :m] % p) @ powers
        if (np.sort(times[1:], axis=1) == np.arange(order)).all():  # every row a permutation: inverses
            return add, times
    raise AssertionError("every finite field has an irreducible polynomial")


def _every(items: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(items))), dtype=np.int64)


def _mixed(rows: np.ndarray) -> np.ndarray:
    """Mix the rows into a fixed order; raw bits are the same in every version of numpy."""
    return rows[np.argsort(np.random.PCG64(0).random_raw(len(rows)), kind="stable")]


def _greedy(items: int, count: int, start: np.ndarray) -> np.ndarray:
    if items <= _ALL:
        pool = _mixed(_every(items))
    else:
        raw = np.random.PCG64(0).random_raw(_POOL * items).reshape(_POOL, items)
        pool = np.argsort(raw, axis=1, kind="stable")
    small = pool.astype(np.int8 if items < 128 else np.int16)
    nearest = np.full(len(pool), items, np.int64)
    for row in start:
        np.minimum(nearest, (small != row).sum(1), out=nearest)
    chosen = list(start)
    while len(chosen) < count:
        best = int(nearest.argmax())
        chosen.append(pool[best])
        np.minimum(nearest, (small != small[best]).sum(1), out=nearest)
    return np.stack(chosen)


def _measured(table: np.ndarray, construction: str) -> PermutationSet:
    table = np.ascontiguousarray(table, dtype=np.int64)
    table.setflags(write=False)
    return PermutationSet(table, min_hamming_distance(table), construction)
