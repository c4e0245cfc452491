"""The volume at each position of training: a closed form of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from ssl3d import memory
from ssl3d.rng import numpy_rng

_SMALLEST = 4000
"""Bytes of a small crop, of 10 x 10 x 10 voxels."""


class Stream:
    """Endless sequence of global batches of volumes, any of which can be had without the others.

    Every data set is read pass after pass, each pass in an order of its own; with `balance` the data
    sets take turns, so that a small one is passed through more often. Batches are made in rounds of
    whole batches: what a round holds is sorted by subject and dealt out like cards, so that no subject
    comes twice in a batch if there are as many subjects as places. A subject with so many volumes that
    this cannot be is drawn less often than its share, others of its data set instead; then subjects of
    other data sets. With `distinct` off a subject may come several times, and shares are always kept.

    Args:
        datasets: Codes (N,) of the volumes' data sets.
        subjects: Codes (N,) of the volumes' subjects.
        batch_size: Volumes in the global batch.
        seed: Seed of the run.
        balance: Whether data sets have equal shares, else volumes have.
        distinct: Whether a batch has no subject twice, where there are as many subjects as places.

    Raises:
        TooLarge: No batch of so many volumes fits into memory.
    """

    def __init__(
        self,
        datasets: np.ndarray,
        subjects: np.ndarray,
        batch_size: int,
        seed: int,
        balance: bool = True,
        distinct: bool = True,
    ):
        memory.check(_SMALLEST * batch_size, f"--batch-size {batch_size:,}: ")
        self.batch_size, self.seed, self.distinct = batch_size, seed, distinct
        self.subjects = np.unique(subjects, return_inverse=True)[1].reshape(-1)
        self._people = int(self.subjects.max(initial=-1)) + 1
        self._datasets = np.unique(datasets, return_inverse=True)[1].reshape(-1)
        groups = self._datasets if balance else np.zeros_like(self._datasets)
        self._members = [np.flatnonzero(groups == g) for g in range(int(groups.max(initial=-1)) + 1)]
        # Short rounds would make the number of repeats a matter of chance; 8 batches spread it out.
        self.batches = max(8, -(-len(datasets) // batch_size))
        self._round = lru_cache(maxsize=2)(self._deal)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_round"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._round = lru_cache(maxsize=2)(self._deal)

    def batch(self, step: int) -> np.ndarray:
        """Return the volumes of a step: positions in the collection, (batch_size,) int64."""
        return self._round(step // self.batches)[step % self.batches]

    def substitutes(self, step: int, row: int) -> Iterator[int]:
        """Iterate over volumes to try, in order, where the one at a row cannot be drawn.

        Subjects that are not in the batch come first, and no two rows try the same of them; then come
        all volumes. Where subjects may come twice, volumes of the same data set come first: it keeps its
        share, as long as one of its volumes can be drawn.
        """
        rng = numpy_rng("substitutes", self.seed, step)
        order = rng.permutation(len(self.subjects))
        if not self.distinct:
            rolled = np.roll(order, -row)
            other = self._datasets[rolled] != self._datasets[self.batch(step)[row]]
            yield from map(int, rolled[np.argsort(other, kind="stable")])
            return
        present = np.isin(self.subjects[order], self.subjects[self.batch(step)])
        absent = order[~present]
        _, first = np.unique(self.subjects[absent], return_index=True)
        strangers = absent[np.sort(first)]
        yield from map(int, strangers[row :: self.batch_size])
        yield from map(int, np.roll(order, -row))

    def _deal(self, number: int) -> np.ndarray:
        """Deal the batches of round `number`: (batches, batch_size) positions."""
        rng = numpy_rng("round", self.seed, number)
        places = self.batches * self.batch_size
        groups = len(self._members)
        drawn = []
        for group in range(groups):
            # Places are handed to the data sets in turn, over all rounds, so none is ever favoured.
            begin, end = (
                (at - group + groups - 1) // groups for at in (number * places, (number + 1) * places)
            )
            drawn.append(self._sequence(group, begin, end))
        items = np.concatenate(drawn)
        if self.distinct:
            items = self._spread(items, rng)
        by_subject, by_dataset = rng.permutation(self._people), rng.permutation(self._datasets.max() + 1)
        # Sorted by data set too: every batch has an even share of each.
        keys = (rng.random(places), by_subject[self.subjects[items]], by_dataset[self._datasets[items]])
        table = items[np.lexsort(keys)].reshape(self.batch_size, self.batches).T
        return rng.permuted(table[rng.permutation(self.batches)], axis=1)

    def _sequence(self, group: int, begin: int, end: int) -> np.ndarray:
        """Return the draws from begin to end of a data set's endless sequence of passes."""
        members = self._members[group]
        first, last = begin // len(members), -(-end // len(members))
        passes = [
            members[numpy_rng("pass", self.seed, group, k).permutation(len(members))]
            for k in range(first, last)
        ]
        return np.concatenate([*passes, members[:0]])[begin - first * len(members) :][: end - begin]

    def _spread(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Replace what a subject has beyond one place per batch, if there are subjects enough."""
        counts = np.bincount(self.subjects[items], minlength=self._people)
        if self._people < self.batch_size or counts.max() <= self.batches:
            return items
        items = rng.permutation(items)
        kept = _rank_among_equals(self.subjects[items]) < self.batches
        lost = self._datasets[items[~kept]]
        counts = np.minimum(counts, self.batches)
        added: list[np.ndarray] = []
        for dataset in np.unique(lost):
            home = np.flatnonzero(self._datasets == dataset)
            added += self._fill(home, int((lost == dataset).sum()), counts, rng)
        short = len(lost) - sum(map(len, added))
        added += self._fill(np.arange(len(self.subjects)), short, counts, rng)
        return np.concatenate([items[kept], *added])

    def _fill(
        self, home: np.ndarray, missing: int, counts: np.ndarray, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Draw up to `missing` volumes of `home`, evenly over subjects with room, and count them."""
        added = []
        while missing > 0:
            # One volume of every subject that has room, in a new order each time around.
            order = rng.permutation(home)
            order = order[_rank_among_equals(self.subjects[order]) == 0]
            order = order[counts[self.subjects[order]] < self.batches][:missing]
            if not len(order):
                break
            counts[self.subjects[order]] += 1
            missing -= len(order)
            added.append(order)
        return added


def _rank_among_equals(codes: np.ndarray) -> np.ndarray:
    """Count the equal codes that come before each code."""
    order = np.argsort(codes, kind="stable")
    _, starts, lengths = np.unique(codes[order], return_index=True, return_counts=True)
    ranks = np.empty(len(codes), np.int64)
    ranks[order] = np.arange(len(codes)) - np.repeat(starts, lengths)
    return ranks
