"""Batches from a collection: the same for any number of workers and ranks, from any step on."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl3d.data.store.collection import Collection
from ssl3d.errors import DataError, PluginError, Ssl3dError, UsageError
from ssl3d.proxy import Proxy
from ssl3d.rng import numpy_rng
from ssl3d.training.batch import Batch, Group
from ssl3d.training.preempt import ONCE
from ssl3d.training.stream import Stream

_RESERVED = ("index", "subject", "dataset")
_PATIENCE = 256  # volumes tried for one place before giving up

Proxies = Mapping[str, tuple[type[Proxy], Any]]


class Loader:
    """Iterable over the batches of steps; every volume of a batch is drawn once for each proxy.

    What an example is depends on (seed, position in the stream, proxy) and on nothing else: not on the
    number of workers, nor of ranks (rank r has rows r, r + world, ... of each global batch), nor on
    where iteration started. A volume that raises `DataError` or `OSError` in `draw` is named once, and
    the same other volume takes its place wherever that happens.

    Args:
        collection: Volumes to draw from.
        proxies: Class and options of each proxy, by name.
        batch_size: Volumes in the global batch.
        seed: Seed of the run.
        workers: Processes that draw; 0 draws in this one.
        rank: Rank of this process.
        world: Number of ranks; it divides the batch size.
        start_step: First step.
        steps: End of the steps, exclusive; None goes on without end.
        balance: Whether data sets have equal shares, else volumes have.
        on_set_aside: Function of name and reason, called once per volume that cannot be drawn.
        pin: Whether batches are put in page-locked memory; by default where there is CUDA.

    Raises:
        DataError: The collection is empty, or, while iterating, no volume can be drawn.
        UsageError: The batch size is no multiple of the number of ranks.
    """

    def __init__(
        self,
        collection: Collection,
        proxies: Proxies,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        steps: int | None = None,
        balance: bool = True,
        on_set_aside: Callable[[str, str], None] | None = None,
        pin: bool | None = None,
    ):
        if not len(collection):
            raise DataError(
                "no volumes to draw from: the collection, or the part of it to train on, is empty"
            )
        if batch_size < 1 or batch_size % world:
            raise UsageError(f"--batch-size {batch_size}: expected a multiple of the {world} processes")
        self.collection, self.proxies, self.batch_size = collection, dict(proxies), batch_size
        self.seed, self.workers, self.rank, self.world = seed, workers, rank, world
        self.start_step, self.steps = start_step, steps
        distinct = any(getattr(proxy, "distinct", True) for proxy, _ in self.proxies.values())
        self.stream = Stream(
            collection.dataset_codes, collection.subject_codes, batch_size, seed, balance, distinct
        )
        self.set_aside: dict[str, str] = {}
        self.waited = 0.0
        self._on_set_aside = on_set_aside
        self._pin = torch.cuda.is_available() if pin is None else pin

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which as many examples are drawn as there are volumes."""
        return -(-len(self.collection) // self.batch_size)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Iterate over steps `start_step`, `start_step + 1`, ...; workers end when the iterator does."""
        steps = (
            itertools.count(self.start_step) if self.steps is None else range(self.start_step, self.steps)
        )
        plan = _Plan(self.stream, self.batch_size, self.rank, self.world)
        return self._run(_Drawing(self.collection, self.proxies, plan, self.seed), steps)

    def once(
        self,
        proxy: str | None = None,
        *,
        key: object = "once",
        limit: int | None = None,
        shard: bool = False,
    ) -> Once:
        """Draw every volume once, in order, with seeds of `key` and the volume's position only.

        Volumes that cannot be drawn are left out and named. Can be iterated over again and again.

        Args:
            proxy: Name of the only proxy to draw for; all proxies by default.
            key: Part of the seeds, such as the number of an epoch; another one gives other crops.
            limit: Number of volumes to take, evenly spaced; all by default.
            shard: Whether each rank gets only its own rows.
        """
        chosen = self.proxies if proxy is None else {proxy: self.proxies[proxy]}
        return Once(self, chosen, key, limit, shard)

    def _run(self, drawing: _Drawing, steps: Iterable[int]) -> Generator[Batch, None, None]:
        ending = RawValue("b", 0)
        # A program that fails asks its workers once to end, and waits: they must know it from a preemption.
        at_end = Finalize(None, setattr, (ending, "value", 1), exitpriority=0)
        loader = DataLoader(
            drawing,
            batch_size=None,
            sampler=steps,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=self._pin,
            worker_init_fn=functools.partial(_calm, ending) if self.workers else None,
            generator=torch.Generator(),  # else it takes a number from the global generator
        )
        batches = iter(loader)
        try:
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                batch.waited = time.perf_counter() - began
                self.waited += batch.waited
                self._note(batch)
                yield batch
        except Exception:
            ending.value = 1  # what was raised holds the workers: they end with the program
            raise
        finally:
            del batches  # ends the workers
            at_end.cancel()

    def _note(self, batch: Batch) -> None:
        for name, reason in batch.failures.items():
            if name not in self.set_aside:
                self.set_aside[name] = reason
                if self._on_set_aside is not None:
                    self._on_set_aside(name, reason)
        if batch.error is not None:
            raise batch.error


class Once:
    """Iterable over batches that hold every volume once, in order: what `Loader.once` returns.

    Args:
        loader: Loader whose volumes, batch size and workers are used.
        proxies: Proxies to draw for.
        key: Part of the seeds.
        limit: Number of volumes to take, evenly spaced; None takes all.
        shard: Whether each rank gets only its own rows.
    """

    def __init__(self, loader: Loader, proxies: Proxies, key: object, limit: int | None, shard: bool):
        self._loader, self._proxies, self._key = loader, proxies, key
        count = len(loader.collection)
        if limit is not None and limit < count:
            self._order = np.arange(limit) * count // limit
        else:
            self._order = np.arange(count)
        rank, world = (loader.rank, loader.world) if shard else (0, 1)
        self._plan = _Plan(None, loader.batch_size, rank, world, self._order)

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self._order) // self._loader.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        loader = self._loader
        drawing = _Drawing(loader.collection, self._proxies, self._plan, (loader.seed, self._key))
        drawn = 0
        for batch in loader._run(drawing, range(len(self))):
            drawn += sum(len(group.rows) for group in batch.groups)
            yield batch
        if not drawn and self._plan.world == 1:
            name, reason = next(iter(loader.set_aside.items()), ("", "nothing was drawn"))
            raise DataError(f"no volume can be drawn for {', '.join(self._proxies)}; {name}: {reason}")


# ------------------------------------------------------------------------------------------------


class _HasBatch(Protocol):
    def batch(self, step: int) -> np.ndarray: ...
    def substitutes(self, step: int, row: int) -> Iterator[int]: ...


@dataclass(frozen=True)
class _Plan:
    """Plan of the rows: the volume at each row of each step, and those that may take its place."""

    stream: _HasBatch | None
    batch_size: int
    rank: int
    world: int
    order: np.ndarray | None = None

    def rows(self, step: int) -> list[tuple[int, int]]:
        """Return this rank's rows of the global batch, each with its volume's position."""
        if self.stream is not None:
            volumes = self.stream.batch(step)
        else:
            assert self.order is not None
            volumes = self.order[step * self.batch_size : (step + 1) * self.batch_size]
        return [(row, int(volumes[row])) for row in range(self.rank, len(volumes), self.world)]

    def substitutes(self, step: int, row: int) -> Iterator[int]:
        return iter(()) if self.stream is None else self.stream.substitutes(step, row)


class _Drawing(Dataset[Batch]):
    """Data set whose item `step` is that step's batch, stacked where it was drawn: little travels."""

    def __init__(self, collection: Collection, proxies: Proxies, plan: _Plan, seed: object):
        self._collection, self._proxies, self._plan, self._seed = collection, dict(proxies), plan, seed

    def __getitem__(self, step: int) -> Batch:
        batch = Batch(step, [])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums differ in their last bits between one thread and two
        try:
            for name, (proxy, config) in self._proxies.items():
                examples = []
                for row, volume in self._plan.rows(step):
                    example = self._draw(name, proxy, config, step, row, volume, batch)
                    if example is not None:
                        examples.append((row, *example))
                batch.groups += _stack(name, examples, self._plan.batch_size)
        except Ssl3dError as error:  # one line for people: a worker's would come with its traceback
            batch.error = error
        finally:
            torch.set_num_threads(threads)
        return batch

    def _draw(
        self, name: str, proxy: type[Proxy], config: Any, step: int, row: int, position: int, batch: Batch
    ) -> tuple[dict[str, Tensor], str] | None:
        tried = itertools.chain([position], self._plan.substitutes(step, row))
        reason = ""
        for attempt, candidate in enumerate(itertools.islice(tried, _PATIENCE)):
            volume = self._collection[candidate]
            if not getattr(proxy, "uses_labels", True):
                volume.withhold_labels(f"{name}.draw")
            title = f"{volume.dataset}/{volume.id}"
            rng = numpy_rng("draw", self._seed, name, step * self._plan.batch_size + row, attempt)
            try:
                example = _checked(name, proxy.draw(config, volume, rng))
            except (DataError, OSError) as error:
                # Tried anew each time: skipping it from memory would make batches depend on the worker.
                reason = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix("DataError: ")
                batch.failures.setdefault(title, reason)
                continue
            codes = (volume.index, *self._codes(candidate))
            for key, code in zip(_RESERVED, codes, strict=True):
                example[key] = torch.tensor(code, dtype=torch.int64)
            return example, title
        if self._plan.stream is not None:
            tries = f"{min(len(self._collection), _PATIENCE)} of {len(self._collection)} tried"
            raise DataError(f"no volume can be drawn for {name} ({tries}); last: {reason}")
        return None

    def _codes(self, position: int) -> tuple[int, int]:
        if not hasattr(self, "_columns"):
            self._columns = (self._collection.subject_codes, self._collection.dataset_codes)
        return int(self._columns[0][position]), int(self._columns[1][position])


def _checked(name: str, example: Any) -> dict[str, Tensor]:
    """Check and copy what `draw` returned.

    Raises:
        PluginError: It is no dict of tensors, or uses a name that the toolkit fills in.
    """
    if not isinstance(example, dict) or not example:
        raise PluginError(f"{name}.draw returned {type(example).__name__}; expected a dict of tensors")
    for key, value in example.items():
        if not isinstance(value, Tensor) or key in _RESERVED:
            problem = (
                "which the toolkit adds" if key in _RESERVED else f"a {type(value).__name__}, not a tensor"
            )
            raise PluginError(f"{name}.draw returned {key!r}, {problem}")
    return dict(example)


def _stack(name: str, examples: Sequence[tuple[int, dict[str, Tensor], str]], total: int) -> list[Group]:
    groups: dict[str, list[tuple[int, dict[str, Tensor], str]]] = {}
    for entry in examples:
        signature = " ".join(
            f"{k}:{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for k, v in sorted(entry[1].items())
        )
        groups.setdefault(signature, []).append(entry)
    return [
        Group(
            proxy=name,
            tensors={key: torch.stack([e[1][key] for e in members]) for key in members[0][1]},
            rows=tuple(e[0] for e in members),
            total=total,
            volumes=tuple(e[2] for e in members),
            signature=signature,
        )
        for signature, members in sorted(groups.items())
    ]


def _calm(ending: Any, _: int) -> None:
    """Leave signals to the process group to the training loop, which saves and then ends the workers.

    That holds however long it takes: a worker that died meanwhile would take the main process with it.

    Args:
        ending: Byte shared with the main process, which sets it to 1 at its end.
    """
    since = 0.0

    def once(signum: int, frame: FrameType | None) -> None:
        nonlocal since
        if ending.value:
            os._exit(0)
        if since and time.monotonic() - since >= ONCE:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        since = since or time.monotonic()

    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)
    os.environ["OMP_NUM_THREADS"] = "1"  # of libraries that are loaded from here on
    torch.set_num_threads(1)
