"""Two ranks must learn what one process learns: tested on any proxy, with real processes."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ssl3d import plugins
from ssl3d.encoder import Encoder
from ssl3d.proxy import Proxy
from ssl3d.rng import seed_of
from ssl3d.testing.proxies import global_state_kept
from ssl3d.training.batch import Group
from ssl3d.training.loop import reseed
from ssl3d.training.trainee import Trainee

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection

_WORLD = 2
_SEED = 0


class _Case(NamedTuple):
    """Way to share a batch out: the groups of each rank, and what each rank's loss counts."""

    name: str
    groups: list[list[Group]]
    counts: list[float]


class _Given(NamedTuple):
    """Input of the ranks, handed over in a file."""

    cls: type[Proxy]
    config: Any
    encoder: Encoder
    data: Collection
    weights: dict[str, Tensor]
    epoch: list[list[dict[str, Tensor]]]
    cases: list[_Case]


class _Found(NamedTuple):
    """Outcome of a process: buffers after `start_epoch`, then loss, gradients and state of each case.

    The state is what `after_step` leaves: buffers (queues) and what is not trained (momentum teachers).
    """

    buffers: dict[str, Tensor]
    losses: list[Tensor]
    gradients: list[dict[str, Tensor]]
    states: list[dict[str, Tensor]]


def check_ranks(
    proxy: str | Path | type[Proxy],
    config: Any = None,
    encoder: Callable[[], Encoder] | None = None,
    data: Collection | None = None,
    batch_size: int = 6,
    *,
    rtol: float = 1e-3,
    timeout: float = 180.0,
) -> None:
    """Test that two processes (gloo, CPU) get the loss and the gradients of a single one.

    One batch is drawn, and shared out in two ways: row by row, and unequally. Where the proxy is
    `mixed`, the second rank lacks one of the groups the second time. The weights are handed over;
    `setup` and `start_epoch` have been called on every rank. The buffers that `start_epoch` leaves must
    be the same on both ranks, and those of the single process; the buffers and untrained parameters that
    `after_step` leaves must be the same on both ranks. Dropout is switched off.

    Args:
        proxy: Registered name, file (PATH/file.py or PATH/file.py:Class), module:Class, or class that
            another process can import.
        config: Configuration of the proxy, without batch norm; None takes the default one.
        encoder: Function that makes an encoder without batch norm, called under a fixed seed of torch; None
            takes a narrow resnet10 with group norm.
        data: Volumes to draw from, of several shapes for batches of several groups; None takes phantoms.
        batch_size: Examples in the global batch, at least 4.
        rtol: Relative tolerance; gradients may differ by 1e-5 of the largest one, too.
        timeout: Seconds until ranks that wait for each other are given up.

    Raises:
        AssertionError: The ranks learn something else; the message says what.
        ValueError: There is batch norm, whose statistics are each rank's own.
        PluginError: There is no such plugin, or it does not import.
    """
    cls = proxy if isinstance(proxy, type) else plugins.find(plugins.PROXIES, str(proxy))[1]
    with global_state_kept(), tempfile.TemporaryDirectory(prefix="ssl3d-ranks-") as folder:
        config = cls.Config() if config is None else config
        data = _phantoms() if data is None else data
        torch.manual_seed(seed_of("check_ranks"))
        network = (
            _default_encoder(cls.in_channels(config, int(data[0].shape[0]))) if encoder is None else encoder
        )()
        blank = copy.deepcopy(network)
        single = cls(config, network)
        single.setup(data)
        norms = [n for n, m in single.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms:
            raise ValueError(
                f"{cls.__name__}: {norms[0]} is a batch norm, whose statistics are each rank's own: give "
                "an encoder with norm group, and options whose heads have no batch norm"
            )
        weights = copy.deepcopy(single.state_dict())
        groups, epoch = _draw(cls, config, data, batch_size)
        cases = _cases(groups, cls.mixed)
        given = _Given(cls, config, blank, data, weights, epoch, cases)
        try:
            content = pickle.dumps(given)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise AssertionError(f"{cls.__name__}: cannot be handed to another process: {error}") from error
        Path(folder, "given.pickle").write_bytes(content)
        whole = [_Case(case.name, [groups], [1.0]) for case in cases[:1]]
        alone = _run(single, 0, given._replace(cases=whole), lambda trainee: trainee)
        _compare(
            cls.__name__, cases, alone, _launch(cls.__name__, folder, timeout, b"__main__" in content), rtol
        )


def _draw(
    cls: type[Proxy], config: Any, data: Collection, batch_size: int
) -> tuple[list[Group], list[list[dict[str, Tensor]]]]:
    """Draw a global batch, and what `start_epoch` iterates over."""
    from ssl3d.training.loader import Loader

    loader = Loader(data, {"proxy": (cls, config)}, batch_size, seed=_SEED, steps=1, pin=False)
    epoch = []
    if cls.start_epoch is not Proxy.start_epoch:
        epoch = [
            [group.tensors for group in batch.groups] for batch in loader.once("proxy", key=("epoch", 0))
        ]
    return next(iter(loader)).groups, epoch


def _cases(groups: list[Group], mixed: bool) -> list[_Case]:
    """List two ways to share a batch out among the ranks."""
    rows = sorted(row for group in groups for row in group.rows)
    # Rank 1 gets every third row: less than half, and none of a group where it can be helped.
    shares = {
        "interleaved": [rows[rank::_WORLD] for rank in range(_WORLD)],
        "unequal": [[row for i, row in enumerate(rows) if i % 3 != 1], rows[1::3]],
    }
    cases = []
    for name, shared in shares.items():
        parts = groups
        if mixed and name == "unequal":
            # A group that the second rank lacks: the batch's last one, or some of the first rank's rows.
            lone = set(groups[-1].rows) if len(groups) > 1 else set(shared[0][-2:])
            shared = [sorted({*shared[0], *lone}), [row for row in shared[1] if row not in lone]]
            parts = [
                part
                for group in groups
                for part in (_rows(group, set(group.rows) - lone), _rows(group, lone))
                if part is not None
            ]
        owned = [
            [part for group in parts if (part := _rows(group, set(own))) is not None] for own in shared
        ]
        # A loss of all ranks together counts as it is; a mean over a rank's own examples by their number.
        counts = [1.0 if mixed else len(own) * _WORLD / len(rows) for own in shared]
        assert all(owned), "a rank has nothing: give a larger batch"
        cases.append(_Case(name, owned, counts))
    return cases


def _rows(group: Group, rows: set[int]) -> Group | None:
    own = [i for i, row in enumerate(group.rows) if row in rows]
    return group.take(own) if own else None


def _run(proxy: Proxy, rank: int, given: _Given, wrap: Callable[[Trainee], Any]) -> _Found:
    """Run the epoch's start and each case, always from the same weights and buffers."""
    for module in proxy.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    proxy.train()
    reseed(_SEED, "epoch 0", 0)
    proxy.start_epoch(0, given.epoch)
    proxy.train()
    buffers = {name: value.clone() for name, value in proxy.named_buffers()}
    untrained = {n: p.detach().clone() for n, p in proxy.named_parameters() if not p.requires_grad}
    trainee = Trainee(proxy.encoder, {"proxy": proxy}, {"proxy": 1.0}, _SEED)
    module = wrap(trainee)
    outcome = _Found(buffers, [], [], [])
    for case in given.cases:
        with torch.no_grad():
            for name, value in _state(proxy).items():
                value.copy_((buffers | untrained)[name])
        proxy.zero_grad(set_to_none=True)
        loss, _ = module("loss", case.groups[rank], "ranks")
        loss = loss * case.counts[rank]
        loss.backward()
        outcome.losses.append(loss.detach().clone())
        outcome.gradients.append(
            {n: p.grad.clone() for n, p in proxy.named_parameters() if p.grad is not None}
        )
        proxy.after_step(0, len(given.cases))  # no optimizer's step before: gradients are compared already
        outcome.states.append({name: value.clone() for name, value in _state(proxy).items()})
    return outcome


def _state(proxy: Proxy) -> dict[str, Tensor]:
    """Collect the buffers, and the parameters that are not trained."""
    untrained = {n: p.data for n, p in proxy.named_parameters() if not p.requires_grad}
    return dict(proxy.named_buffers()) | untrained


# The ranks ----------------------------------------------------------------------------------------


def _rank(rank: int, folder: str, timeout: float) -> None:
    """Run a child process, which ends here.

    Not through the interpreter's end: a thread of the backward pass that outlives it aborts the process,
    one time in many ("terminate called without an active exception").
    """
    status = 1
    with Path(folder, f"log-{rank}").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        _work(rank, folder, timeout)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(rank: int, folder: str, timeout: float) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Our own file, written a moment ago by the process that started this one.
    given: _Given = pickle.loads(Path(folder, "given.pickle").read_bytes())
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=_WORLD,
        timeout=timedelta(seconds=timeout),
    )
    proxy = given.cls(given.config, given.encoder)
    proxy.setup(given.data)
    proxy.load_state_dict(given.weights)
    outcome = _run(
        proxy,
        rank,
        given,
        lambda trainee: nn.parallel.DistributedDataParallel(trainee, broadcast_buffers=False),
    )
    for loss in outcome.losses:
        dist.all_reduce(loss)
        loss /= _WORLD
    torch.save(outcome._asdict(), Path(folder, f"found-{rank}.pt"))
    dist.barrier()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep processes that are started meanwhile from running the caller's script again.

    A script that calls `check_ranks` without `if __name__ == "__main__"` would call it in every rank.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _launch(who: str, folder: str, timeout: float, needs_main: bool) -> list[_Found]:
    """Start the ranks, wait for them, and return what they found."""
    # A server that has torch imported, and nothing else running, forks the ranks of every check; a fork
    # of this process, whose backward pass has threads, would hang.
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__, "torch._dynamo", "torchvision", "lightly.models"])
    ranks = range(_WORLD)
    started = [context.Process(target=_rank, args=(n, folder, timeout), daemon=True) for n in ranks]
    with contextlib.nullcontext() if needs_main else _without_main():
        for process in started:
            process.start()
    deadline = time.monotonic() + timeout
    try:
        codes: list[int | None] = [None]
        while None in codes and time.monotonic() < deadline:
            time.sleep(0.02)
            codes = [process.exitcode for process in started]
            if any(code and not _abandoned(folder, n) for n, code in enumerate(codes)):
                break  # an abandoned one is not to blame: that which left it is still ending
    finally:
        for process in started:  # one that fails leaves the other waiting
            process.kill()
            process.join()
    failed = [rank for rank, status in enumerate(codes) if status]
    failed.sort(key=lambda rank: _abandoned(folder, rank))
    if failed:
        raise AssertionError(f"{who}: rank {failed[0]} of {_WORLD} fails: {_last_lines(folder, failed[0])}")
    assert None not in codes, (
        f"{who}: the {_WORLD} ranks have not come to an end in {timeout:g} s: does one wait for the other, "
        "in a collective that not every rank calls?"
    )
    return [_Found(**torch.load(Path(folder, f"found-{n}.pt"), weights_only=True)) for n in ranks]


def _abandoned(folder: str, rank: int) -> bool:
    """Tell whether a rank failed because the other was gone."""
    return "by peer" in _last_lines(folder, rank)


def _last_lines(folder: str, rank: int) -> str:
    log = Path(folder, f"log-{rank}")
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    return text[-2000:] or 'without a word (a script that defines it needs `if __name__ == "__main__":`)'


# The comparison -----------------------------------------------------------------------------------


def _compare(who: str, cases: Sequence[_Case], alone: _Found, ranks: Sequence[_Found], rtol: float) -> None:
    for name, value in alone.buffers.items():
        first, second = (outcome.buffers[name] for outcome in ranks)
        assert torch.equal(first, second), (
            f"{who}: after start_epoch, buffer {name} differs between the ranks"
        )
        assert first.shape == value.shape and _close(first, value, rtol), (
            f"{who}: after start_epoch, buffer {name} is not that of a single process"
        )
    loss, expected = alone.losses[0], alone.gradients[0]
    largest = max((float(g.abs().max()) for g in expected.values()), default=0.0)
    assert largest > 0, f"{who}: every gradient of the single process is 0: nothing can be compared"
    for number, case in enumerate(cases):
        shared, gradients = ranks[0].losses[number], ranks[0].gradients[number]
        how = f"(rows {case.name}: {' and '.join(str(_sizes(groups)) for groups in case.groups)})"
        hint = (
            "" if len(case.groups[0]) == 1 and case.name == "interleaved"
            else "; a loss that is no mean over examples needs mixed = True and ssl3d.distributed.gather"
        )  # fmt: skip
        assert torch.allclose(shared, loss, rtol=rtol, atol=1e-5), (
            f"{who}: the loss of two ranks is {shared.item():.6g}, of one process {loss.item():.6g} "
            f"{how}{hint}"
        )
        missing = sorted(set(expected) ^ set(gradients))
        assert not missing, f"{who}: {missing[0]} has a gradient in one process or in two, not in both"
        for name, gradient in expected.items():
            assert torch.allclose(gradients[name], gradient, rtol=rtol, atol=1e-5 * largest), (
                f"{who}: the gradient of {name} differs between two ranks and one process by "
                f"{(gradients[name] - gradient).abs().max():.3g}, the largest is {largest:.3g} {how}{hint}"
            )
        left, others = (outcome.states[number] for outcome in ranks)
        for name, value in left.items():
            assert torch.equal(value, others[name]), (
                f"{who}: after after_step, {name} differs between the ranks {how}: gather what goes into "
                "it (ssl3d.api.gather)"
            )


def _close(a: Tensor, b: Tensor, rtol: float) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=rtol, atol=1e-5 * scale)


def _sizes(groups: Sequence[Group]) -> list[int]:
    return [len(group.rows) for group in groups]


def _phantoms() -> Collection:
    from ssl3d.data.open import open_data

    return open_data(["phantoms:16"])


def _default_encoder(in_channels: int) -> Callable[[], Encoder]:
    cls = plugins.load(plugins.ENCODERS, "resnet10")
    return lambda: cls(cls.Config(width=8, norm="group", in_channels=in_channels))
