"""A lock has one holder, whoever dies, falls silent or comes in between."""

import json
import os
import socket
import time

import pytest

from ssl3d.api import locks


def of_a_dead_process(lock):
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}), encoding="utf-8")


def of_another(lock, silent=0.0):
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "other"}), encoding="utf-8")
    os.utime(lock, (time.time() - silent,) * 2)


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "job.lock"


@pytest.mark.parametrize("links", [True, False])
def test_of_two_who_find_a_lock_abandoned_one_takes_it(lock, monkeypatch, links):
    of_a_dead_process(lock)
    first = []
    abandoned = locks._abandoned

    def another_is_faster(path):
        found = abandoned(path)
        if not first:
            first.append(None)
            first[0] = locks.take(lock)
            first.append(lock.read_text(encoding="utf-8"))
        return found

    def refused(*paths):
        raise PermissionError("no links here")

    monkeypatch.setattr(locks, "_abandoned", another_is_faster)
    if not links:
        monkeypatch.setattr(locks.os, "link", refused)
    assert not locks.take(lock)
    assert first[0]
    assert lock.read_text(encoding="utf-8") == first[1]
    assert list(lock.parent.iterdir()) == [lock]


def test_who_was_silent_for_long_leaves_the_lock_to_its_successor(lock, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    assert locks.take(lock)
    with locks.holding(lock):
        of_another(lock, silent=100)
        before = lock.stat().st_mtime
        time.sleep(0.1)
        assert lock.stat().st_mtime == before  # a sign of life of one is none of the other
    assert json.loads(lock.read_text(encoding="utf-8"))["token"] == "other"


def test_a_holder_shows_that_it_lives_and_lets_go(lock, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    assert locks.take(lock)
    assert not locks.take(lock)
    with locks.holding(lock):
        os.utime(lock, (1, 1))
        deadline = time.monotonic() + 60
        while lock.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not lock.exists()
    assert locks.take(lock)
    locks.release(lock)
    assert not lock.exists()


def test_a_silent_holder_elsewhere_loses_its_lock(lock):
    of_another(lock)
    assert not locks.take(lock)
    of_another(lock, silent=2 * locks.SILENT)
    assert locks.take(lock)
    assert list(lock.parent.iterdir()) == [lock]


@pytest.mark.parametrize(
    "text",
    ["[1]", "null", "7", '{"host": "HERE", "pid": "x"}', '{"host": "HERE"}', '{"host": "HERE", "pid": 0}',
     '{"host": 1, "pid": 1}', "[" * 100_000, '{"host": "HERE", "pid": 1' + "0" * 5000 + "}", "",
     "\x00\xff"],
)  # fmt: skip
def test_a_lock_of_odd_content_is_kept_while_fresh_and_taken_when_silent(lock, text):
    lock.write_text(text.replace("HERE", socket.gethostname()), encoding="latin-1")
    assert not locks.take(lock)
    os.utime(lock, (1, 1))
    assert locks.take(lock)
    assert list(lock.parent.iterdir()) == [lock]


def test_a_process_of_a_number_that_no_system_has_is_dead(lock):
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": 10**20}), encoding="utf-8")
    assert locks.take(lock)


@pytest.mark.parametrize("ahead", [-7200, 2 * locks.SILENT])
def test_a_live_lock_is_kept_whatever_our_clock_says(lock, monkeypatch, ahead):
    of_another(lock)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    assert not locks.take(lock)


def test_a_lock_dated_in_the_future_is_taken_when_its_date_stands_still(lock, monkeypatch):
    of_another(lock, silent=-3600)
    assert not locks.take(lock)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + locks.SILENT + 1)
    of_another(lock, silent=-3700)  # a sign of life
    assert not locks.take(lock)
    monkeypatch.setattr(time, "monotonic", lambda: real() + 2 * locks.SILENT + 2)
    assert locks.take(lock)
