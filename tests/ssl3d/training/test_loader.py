"""The loader: one stream of examples, whatever the workers, the ranks, the first step."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.data.open import open_data
from ssl3d.data.phantoms import phantom_store
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.errors import DataError, PluginError, UsageError
from ssl3d.rng import seed_of
from ssl3d.training.loader import Loader
from ssl3d.training.stream import Stream


@dataclasses.dataclass
class Options:
    bad: tuple = ()
    error: type = DataError


class Crop:
    """Draws a voxel and a number; volumes named in `bad` cannot be drawn."""

    @classmethod
    def draw(cls, config, volume, rng):
        if volume.id in config.bad:
            raise config.error(f"{volume.id} will not do")
        start = [int(rng.integers(n)) for n in volume.shape[1:]]
        size = (1, 1, 1 + volume.index % 2)  # two shapes
        return {"crop": volume.read(start, size), "noise": torch.tensor(rng.normal())}


class Threads:
    @classmethod
    def draw(cls, config, volume, rng):
        return {"threads": torch.tensor(torch.get_num_threads())}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 volumes: "big" has 15 subjects with one, "small" three subjects with three."""
    folder = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(0)
    people = [("big", f"b{i}") for i in range(15)] + [("small", f"s{i // 3}") for i in range(9)]
    for i, (dataset, subject) in enumerate(people):
        image = rng.normal(size=(1, 4, 4, 5)).astype(np.float32)
        write_part(folder / "parts", f"{i:03d}", Record(f"v{i:02d}", dataset, subject), image)
    assemble(folder / "parts", folder / "store.h5", {}, [])
    return open_data([folder / "store.h5"])


def flat(batches):
    """(step, proxy, row) -> what the example holds."""
    found = {}
    for batch in batches:
        for group in batch.groups:
            for i, row in enumerate(group.rows):
                held = {key: value[i].tolist() for key, value in group.tensors.items()}
                assert (batch.step, group.proxy, row) not in found
                found[batch.step, group.proxy, row] = (held, group.volumes[i])
    return found


def load(data, **changes):
    options = {"batch_size": 6, "seed": 3, "steps": 9, "proxies": {"crop": (Crop, Options())}}
    return Loader(data, **(options | changes))


def test_workers_change_nothing(data):
    expected = flat(load(data))
    assert len(expected) == 9 * 6 == len({held["noise"] for held, _ in expected.values()})
    for workers in (1, 2):
        assert flat(load(data, workers=workers)) == expected


def test_ranks_share_the_batch_of_one(data):
    expected, parts = flat(load(data)), {}
    for rank in range(3):
        part = flat(load(data, rank=rank, world=3))
        assert len(part) == 9 * 2 and not set(part) & set(parts)
        parts |= part
    assert parts == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_gives_the_tail(data, workers):
    tail = {key: value for key, value in flat(load(data, steps=20)).items() if key[0] >= 13}
    assert flat(load(data, steps=20, start_step=13, workers=workers)) == tail


def test_another_seed_gives_other_examples(data):
    assert flat(load(data)) != flat(load(data, seed=4))


def test_examples_carry_their_codes(data):
    for held, name in flat(load(data)).values():
        volume = data.volume(held["index"])
        assert name == f"{volume.dataset}/{volume.id}"
        assert held["subject"] == data.subject_codes[volume.index]
        assert held["dataset"] == data.dataset_codes[volume.index]


def test_a_selection_keeps_its_codes(data):
    chosen = data.select(np.arange(10, 20))
    indices = {held["index"] for held, _ in flat(load(chosen, steps=20)).values()}
    assert indices == set(range(10, 20))


def test_groups_have_one_shape_and_are_ordered_alike(data):
    orders = set()
    for batch in load(data, steps=12):
        for group in batch.groups:
            assert (
                group.tensors["crop"].shape[0] == len(group.rows) == len(group.volumes) and group.total == 6
            )
            assert list(group.rows) == sorted(group.rows)
        assert sorted(row for group in batch.groups for row in group.rows) == list(range(6))
        assert sorted(batch.volume_ids) == sorted({v for g in batch.groups for v in g.volumes})
        signatures = [group.signature for group in batch.groups]
        assert signatures == sorted(signatures)
        orders.add(tuple(signatures))
    assert max(map(len, orders)) == 2


def test_several_proxies_draw_every_volume_each(data):
    two = load(data, proxies={"one": (Crop, Options()), "two": (Crop, Options())})
    found = flat(two)
    assert [g.proxy for g in next(iter(two)).groups] in (["one"] * n + ["two"] * n for n in (1, 2))
    for step, _, row in found:
        mine, other = found[step, "one", row][0], found[step, "two", row][0]
        assert mine["index"] == other["index"] and mine["noise"] != other["noise"]
    # A proxy's examples do not depend on what else is trained.
    alone = flat(load(data, proxies={"two": (Crop, Options())}))
    assert alone == {key: value for key, value in found.items() if key[1] == "two"}


def test_draw_runs_with_one_thread_and_the_count_is_restored(data):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for workers in (0, 1):
            for batch in load(data, steps=2, workers=workers, proxies={"t": (Threads, None)}):
                assert torch.get_num_threads() == 2
                assert set(batch.groups[0].tensors["threads"].tolist()) == {1}
    finally:
        torch.set_num_threads(before)


def test_the_global_generators_are_left_alone(data):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(load(data, steps=2, workers=1))
    list(load(data).once())
    assert torch.rand(1) == expected


def test_waiting_is_measured(data):
    loader = load(data, workers=1, steps=3)
    waits = [batch.waited for batch in loader]
    assert min(waits) >= 0 and loader.waited == pytest.approx(sum(waits)) and loader.waited > 0


# Bad volumes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DataError, OSError])
def test_a_bad_volume_is_named_once_and_replaced_alike_everywhere(data, error):
    proxies = {"crop": (Crop, Options(("v03", "v20"), error))}
    good, told = flat(load(data, steps=16)), []
    loader = load(data, steps=16, proxies=proxies, on_set_aside=lambda *a: told.append(a))
    replaced = flat(loader)
    assert sorted(name for name, _ in told) == ["big/v03", "small/v20"] == sorted(loader.set_aside)
    assert all("will not do" in reason for _, reason in told)
    assert set(replaced) == set(good)
    for key, (held, name) in replaced.items():
        assert name not in ("big/v03", "small/v20")
        if good[key][1] not in ("big/v03", "small/v20"):
            assert (held, name) == good[key]
    for step in range(16):
        subjects = [held["subject"] for (s, _, _), (held, _) in replaced.items() if s == step]
        assert len(set(subjects)) == 6
    assert flat(load(data, steps=16, proxies=proxies, workers=2)) == replaced
    halves = [flat(load(data, steps=16, proxies=proxies, rank=r, world=2)) for r in range(2)]
    assert halves[0] | halves[1] == replaced
    late = flat(load(data, steps=16, proxies=proxies, start_step=11))
    assert late == {key: value for key, value in replaced.items() if key[0] >= 11}


@pytest.mark.parametrize("workers", [0, 1])
def test_if_all_volumes_are_bad_one_error_says_so(data, workers):
    proxies = {"crop": (Crop, Options(tuple(data.ids)))}
    with pytest.raises(
        DataError, match=r"no volume can be drawn for crop \(24 of 24 tried\).*will not do$"
    ):
        next(iter(load(data, proxies=proxies, workers=workers)))
    with pytest.raises(DataError, match="no volume can be drawn for crop; big/v00: v00 will not do"):
        list(load(data, proxies=proxies, workers=workers).once())


def test_a_mistake_in_draw_is_not_swallowed(data):
    for returned, message in [
        ([], "expected a dict"),
        ({"x": 1}, "a int"),
        ({"index": torch.ones(1)}, "adds"),
    ]:

        class Wrong:
            draw = classmethod(lambda cls, config, volume, rng, returned=returned: returned)

        with pytest.raises(PluginError, match=message):
            next(iter(load(data, proxies={"wrong": (Wrong, None)})))


@pytest.mark.parametrize("what", ["label", "boxes", "box_labels", "read_mask"])
def test_a_proxy_that_does_not_say_so_gets_no_labels(data, what):
    class Reads(Crop):
        uses_labels = False

        @classmethod
        def draw(cls, config, volume, rng):
            value = getattr(volume, what)
            return {"seen": torch.tensor(callable(value) and value() is None)}

    class Says(Reads):
        uses_labels = True

    with pytest.raises(PluginError, match=r"sneaky.draw reads a volume's .*uses_labels = True"):
        next(iter(load(data, proxies={"sneaky": (Reads, Options())})))
    if what != "read_mask":  # these volumes have none
        assert next(iter(load(data, proxies={"open": (Says, Options())}))).groups


def test_a_record_shows_no_label_to_a_draw_that_is_not_to_see_it(tmp_path):
    labelled = open_data([phantom_store(4, shape=(8, 8, 8), folder=tmp_path)])

    class Peeks:
        uses_labels = False

        @classmethod
        def draw(cls, config, volume, rng):
            return {"told": torch.tensor(volume.record.label is not None), "x": torch.zeros(1)}

    class Open(Peeks):
        uses_labels = True

    for kind, told in ((Peeks, False), (Open, True)):
        (group,) = next(iter(load(labelled, proxies={"peeks": (kind, Options())}))).groups
        assert group.tensors["told"].any().item() is told


def test_what_cannot_be_loaded_is_refused(data):
    with pytest.raises(DataError, match="empty"):
        load(data.select([]))
    with pytest.raises(UsageError, match="--batch-size 6: expected a multiple of the 4"):
        load(data, world=4)


# Once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_once_gives_every_volume_in_order(data, workers):
    loader = load(data, workers=workers, batch_size=5)
    once = loader.once()
    found = flat(once)
    assert len(once) == 5 and len(found) == 24
    assert [held["index"] for _, (held, _) in sorted(found.items())] == list(range(24))
    assert flat(once) == found == flat(load(data, batch_size=5, steps=2).once("crop"))
    other = flat(loader.once(key=1))
    assert [h["noise"] for h, _ in other.values()] != [h["noise"] for h, _ in found.values()]


def test_once_leaves_out_what_cannot_be_drawn(data):
    loader = load(data, proxies={"crop": (Crop, Options(("v03",)))})
    assert sorted(h["index"] for h, _ in flat(loader.once()).values()) == [i for i in range(24) if i != 3]
    assert list(loader.set_aside) == ["big/v03"]


def test_once_may_be_thinned_and_shared(data):
    loader = load(data, rank=1, world=2)
    assert [h["index"] for h, _ in flat(loader.once(limit=4)).values()] == [0, 6, 12, 18]
    assert {row % 2 for _, _, row in flat(loader.once(shard=True))} == {1}


# The stream ---------------------------------------------------------------------------------------


def stream(datasets, subjects, batch_size, **more):
    return Stream(np.array(datasets), np.array(subjects), batch_size, **({"seed": 0} | more))


@settings(max_examples=80, deadline=None)
@given(
    people=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=1, max_size=60),
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 5),
    balance=st.booleans(),
)
def test_no_subject_twice_in_a_batch_if_there_are_enough(people, batch_size, seed, balance):
    datasets = [d for d, _ in people]
    subjects = [d * 100 + s for d, s in people]
    made = stream(datasets, subjects, batch_size, seed=seed, balance=balance)
    enough = len(set(subjects)) >= batch_size
    for step in (*range(12), 1000):
        batch = made.batch(step)
        assert len(batch) == batch_size and batch.min() >= 0 and batch.max() < len(people)
        if enough:
            assert len(set(np.array(subjects)[batch])) == batch_size


def test_every_volume_is_drawn_once_per_pass():
    made = stream([0] * 100, range(100), 10)
    drawn = np.concatenate([made.batch(step) for step in range(100)])
    assert made.batches == 10
    for k in range(10):
        assert sorted(drawn[100 * k : 100 * (k + 1)]) == list(range(100))
    assert drawn[:100].tolist() != drawn[100:200].tolist()


def test_passes_that_end_inside_a_batch_still_give_equal_shares():
    made = stream([0] * 37, range(37), 10)
    counts = np.bincount(np.concatenate([made.batch(step) for step in range(400)]), minlength=37)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("balance", [True, False])
def test_data_sets_have_equal_shares_if_balanced(balance):
    datasets = np.repeat([0, 1, 2], [300, 60, 40])
    made = stream(datasets, range(400), 30, balance=balance)
    each = np.array([np.bincount(datasets[made.batch(step)], minlength=3) for step in range(140)])
    share = each.mean(axis=0) / 30
    np.testing.assert_allclose(share, [1 / 3] * 3 if balance else [0.75, 0.15, 0.10], atol=0.005)
    assert np.ptp(each, axis=0).max() <= 2  # in every batch, not only over many


def test_a_subject_with_very_many_volumes_is_drawn_less():
    subjects = np.array([0] * 90 + list(range(1, 11)))
    made = stream([0] * 100, subjects, 5)
    counts = np.bincount(np.concatenate([subjects[made.batch(step)] for step in range(200)]), minlength=11)
    assert counts[0] == 200 and counts[1:].min() >= 60


def test_a_data_set_of_two_people_has_its_share_if_they_may_come_twice():
    datasets, subjects = np.repeat([0, 1], [50, 2]), np.arange(52)
    shares = {}
    for distinct in (True, False):
        made = stream(datasets, subjects, 10, distinct=distinct)
        each = np.array([np.bincount(datasets[made.batch(step)], minlength=2) for step in range(60)])
        shares[distinct] = each.mean(axis=0).tolist()
        assert np.ptp(each, axis=0).max() <= 1
    assert shares == {True: [8, 2], False: [5, 5]}
    # Of those that cannot be drawn, others of the same data set take the place, all of them.
    for row, volume in enumerate(made.batch(3)):
        order = list(made.substitutes(3, row))
        own = np.flatnonzero(datasets == datasets[volume])
        assert sorted(order[: len(own)]) == own.tolist() and sorted(order) == list(range(52))


def test_which_volumes_meet_changes_from_pass_to_pass():
    made = stream([0] * 64, range(64), 8)
    together = {frozenset(made.batch(step).tolist()) for step in range(80)}
    assert len(together) == 80


def test_the_order_is_pinned():
    # A change of the stream changes every run that is resumed or repeated: it must not pass unseen.
    made = stream(np.arange(50) % 2, np.arange(50) // 2, 8, seed=7)
    order = [made.batch(step).tolist() for step in (0, 1, 50)]
    assert seed_of(order) == 2485519971405809303


# Ends ---------------------------------------------------------------------------------------------

SCRIPT = textwrap.dedent(
    """
    import os, signal, sys, time, torch
    from ssl3d.training.loader import Loader
    from ssl3d.data.open import open_data

    class Draw:
        @classmethod
        def draw(cls, config, volume, rng):
            return {"pid": torch.tensor(os.getpid())}

    saved = []
    signal.signal(signal.SIGTERM, lambda *a: saved.append(1))
    signal.signal(signal.SIGUSR1, lambda *a: saved.append(1))
    batches = iter(Loader(open_data([sys.argv[1]]), {"d": (Draw, None)}, 4, workers=2))
    pids = {next(batches).groups[0].tensors["pid"][0].item() for _ in range(8)}
    print(*pids, flush=True)
    while not saved:
        next(batches)
        time.sleep(0.01)
    for _ in range(30):
        next(batches)
    batches.close()
    print("saved", flush=True)
    time.sleep(60)
    """
)


class Pid:
    @classmethod
    def draw(cls, config, volume, rng):
        alarm = signal.getitimer(signal.ITIMER_REAL)[0]
        return {"pid": torch.tensor(os.getpid()), "alarm": torch.tensor(alarm)}


def start(data):
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(data.stores[0].path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return run, [int(pid) for pid in run.stdout.readline().split()]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_group_leaves_the_workers_to_the_main_process(data, name):
    run, pids = start(data)
    try:
        assert len(pids) == 2 and all(map(alive, pids))
        os.killpg(run.pid, getattr(signal, name))  # as SLURM does
        assert run.stdout.readline() == "saved\n", run.stderr.read()
        assert gone(pids, 10)
    finally:
        run.kill()
        run.communicate()


FAILING = SCRIPT.partition("print(*pids")[0] + "batches.kept = 1 / 0"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_worker_asked_to_end_waits_for_a_main_process_that_takes_its_time(data):
    """A long step, or a large checkpoint, after SLURM's signal: a dead worker would break it off."""
    batches = iter(Loader(data, {"pid": (Pid, None)}, 4, workers=1))
    pid = next(batches).groups[0].tensors["pid"][0].item()
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)  # the same signal, handed on by `timeout` or torchrun
    time.sleep(0.5)
    for _ in range(8):  # the first ones were drawn before
        drawn = next(batches).groups[0].tensors
    assert drawn["pid"][0].item() == pid and drawn["alarm"].tolist() == [0.0] * 4  # nor will it end later
    batches.close()
    assert gone([pid], 15)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_workers_of_a_program_that_fails_end_at_once(data):
    words = [sys.executable, "-c", FAILING, str(data.stores[0].path)]
    # They would live for a minute, and the program wait for them.
    done = subprocess.run(words, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.long
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_workers_do_not_outlive_a_killed_main_process(data):
    run, pids = start(data)
    run.kill()
    run.communicate()
    assert gone(pids, 20)
