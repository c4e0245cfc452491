"""Stores on servers: the numbers of the disk, few requests, a bounded cache, failures by name."""

from __future__ import annotations

import gc
import http.server
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path

import h5py
import pytest
import torch

from ssl3d.api import open_data
from ssl3d.data.phantoms import phantom_store
from ssl3d.data.store import remote
from ssl3d.data.store import volume as opened
from ssl3d.errors import DataError, TransientError, UsageError

pytest.importorskip("aiohttp")


class _Server(http.server.SimpleHTTPRequestHandler):
    """A web server that sends parts of files, counts requests, and fails as often as it is told."""

    requests: list[tuple[int, int]] = []
    failures: list[int] = []
    silent: list[float] = []
    cut: list[int] = []

    def log_message(self, *words):
        """Print nothing."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        if self.failures:
            self.send_error(self.failures.pop())
            return
        if self.silent:
            time.sleep(self.silent.pop())
        path = Path(self.directory, self.path.lstrip("/").split("?")[0])
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = self.headers.get("Range")
        first, last = 0, len(content) - 1
        if asked:
            first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            last = min(last, len(content) - 1)
        part = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if body:
            self.requests.append((first, last + 1))
            self.wfile.write(part[: self.cut.pop()] if self.cut else part)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(remote, "sleep", lambda seconds: None)
    remote._recent.clear()
    remote._written[0] = 0


@pytest.fixture(scope="module")
def store():
    """A store of phantoms on the disk."""
    return phantom_store(8)


@pytest.fixture
def served(tmp_path, store):
    """The address of that store on a web server."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "scans.h5").write_bytes(Path(store).read_bytes())
    for counted in (_Server.requests, _Server.failures, _Server.silent, _Server.cut):
        counted.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/scans.h5"
    server.shutdown()
    server.server_close()


def test_a_store_on_a_web_server_gives_the_numbers_of_the_disk(served, store):
    here, there = open_data([store]), open_data([served])
    assert there.digest() == here.digest()
    for own, other in zip(here, there, strict=True):
        assert torch.equal(own.read(), other.read())
        assert torch.equal(own.read_mask(), other.read_mask())
        assert torch.equal(own.read((0, 3, 2), (9, 20, 30)), other.read((0, 3, 2), (9, 20, 30)))


def test_a_block_is_asked_for_once_by_all_readers(served, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1 << 16)
    for volume in open_data([served]):
        volume.read()
    asked = list(_Server.requests)
    assert len(asked) == len(set(asked)) > 5
    assert all(last - first <= 1 << 16 for first, last in asked)
    remote._recent.clear()  # as another process would begin
    before = len(_Server.requests)
    for volume in open_data([served]):
        volume.read()
    assert len(_Server.requests) == before  # all came from the local disk


def test_blocks_on_the_disk_keep_to_their_bound_and_the_oldest_go(served, store, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1 << 16)
    monkeypatch.setattr(remote, "_KEPT", 1)
    monkeypatch.setenv(remote.VARIABLE, "400KB")
    assert Path(store).stat().st_size > 800_000
    for own, other in zip(open_data([store]), open_data([served]), strict=True):
        assert torch.equal(own.read(), other.read())
        held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
        assert held <= 400_000 + (1 << 16)
    assert held > 200_000


def test_the_block_that_was_used_last_stays(tmp_path):
    folder = tmp_path / "cache" / "remote" / "key"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / str(number)).write_bytes(bytes(100))
        os.utime(folder / str(number), (number, number))
    os.utime(folder / "0", (9, 9))
    assert remote.drop_oldest(400) == 0
    assert remote.drop_oldest(300) == 200
    assert sorted(path.name for path in folder.iterdir()) == ["0", "3"]


def test_a_file_that_changed_is_read_anew(served, tmp_path):
    first = open_data([served])[0].read()
    other = phantom_store(8, seed=3)
    (tmp_path / "served" / "scans.h5").write_bytes(Path(other).read_bytes())
    assert not torch.equal(open_data([served])[0].read(), first)


def test_a_server_that_fails_for_a_while_is_asked_again(served, store):
    _Server.failures += [503, 500, 429]
    _Server.cut += [100, 50]
    assert torch.equal(open_data([served])[0].read(), open_data([store])[0].read())


def test_a_server_that_fails_for_good_ends_in_one_line_and_exit_status_3(served):
    data = open_data([served])
    remote._recent.clear()
    for path in remote._folder().glob("*/*"):
        path.unlink()
    _Server.failures += [503] * 50
    with pytest.raises(TransientError, match=r"does not answer, asked 5 times .*503.*call again") as caught:
        data[5].read()
    assert caught.value.exit_status == 3
    _Server.failures.clear()
    assert data[5].read().isfinite().all()  # nothing of it sticks


def test_garbage_of_h5py_stops_no_read(served, store, monkeypatch):
    """h5py frees its objects under the lock that a read through a file object holds."""
    asked_part = remote._part

    def part_while_garbage_is_collected(*words):
        circle: list = [h5py.File(str(time.monotonic_ns()), "w", driver="core", backing_store=False)]
        circle.append(circle)
        del circle
        collector = threading.Thread(target=lambda: gc.isenabled() and gc.collect(), daemon=True)
        collector.start()
        collector.join(20)
        assert not collector.is_alive(), "h5py waits for its own lock"
        return asked_part(*words)

    gc.collect()
    data = open_data([served])
    monkeypatch.setattr(remote, "_part", part_while_garbage_is_collected)
    monkeypatch.setattr(remote, "TRIES", 1)
    remote._recent.clear()
    for path in remote._folder().glob("*/*"):
        path.unlink()
    assert torch.equal(data[5].read(), open_data([store])[5].read())
    assert gc.isenabled()


def test_a_silent_server_is_given_up(served, monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 0.2)
    monkeypatch.setattr(remote, "TRIES", 2)
    _Server.silent += [1.0] * 8
    with pytest.raises(TransientError, match="does not answer, asked 2 times"):
        open_data([served])


def test_a_damaged_local_block_is_noticed_by_the_check_sums(served, monkeypatch):
    volume = open_data([served])[3]
    expected = volume.read()
    for path in remote._folder().glob("*/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 4 :: 97] = bytes(len(content[len(content) // 4 :: 97]))
        path.write_bytes(content)
    remote._recent.clear()
    for name, anew in {"_open_files": OrderedDict(), "_known": opened._Handles(), "_pending": {}}.items():
        monkeypatch.setattr(opened, name, anew)
    try:
        again = open_data([served])[3].read()
    except DataError as error:
        assert "damaged" in str(error) or "cannot be read" in str(error)
    else:
        assert torch.equal(again, expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.h5", "no such file on the server"),
        ("other.h5", "not an HDF5 file .* bytes"),
        ("cut.h5", "cut short or damaged"),
    ],
)
def test_what_is_no_store_is_refused_by_name(served, tmp_path, name, words):
    (tmp_path / "served" / "other.h5").write_bytes(b"no store at all")
    whole = (tmp_path / "served" / "scans.h5").read_bytes()
    (tmp_path / "served" / "cut.h5").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError, match=words) as caught:
        open_data([served.replace("scans.h5", name)])
    assert name in str(caught.value)


def test_a_server_nobody_knows_is_told_with_those_that_are_known():
    with pytest.raises(UsageError, match=r"nowhere://a/b.h5.*known are"):
        open_data(["nowhere://a/b.h5"])


def test_a_bound_that_is_no_number_is_refused_by_its_name(monkeypatch):
    monkeypatch.setenv(remote.VARIABLE, "much")
    with pytest.raises(UsageError, match=r"\$SSL3D_REMOTE_CACHE much"):
        remote.bound()


def test_a_path_that_lost_a_slash_is_the_same_address():
    assert str(remote.Remote.of(Path("s3://bucket/a.h5"))) == "s3://bucket/a.h5"


def test_several_processes_read_one_store(served, store):
    """Workers that were forked make connections of their own."""
    from torch.utils.data import DataLoader

    data = open_data([served])
    data[0].read()
    loader = DataLoader(_Voxels(data), batch_size=None, num_workers=2)
    for own, other in zip(open_data([store]), loader, strict=True):
        assert torch.equal(own.read(), other)


def test_a_process_that_ends_with_an_open_store_ends_well(served):
    """HDF5 closes its files last of all, by functions of Python that are gone by then."""
    code = f"from ssl3d.api import open_data; print(len(open_data([{served!r}])), end='')"
    environ = os.environ | {"SSL3D_CACHE": str(remote.cache_folder())}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stdout) == (0, "8"), done.stderr


class _Voxels(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, position):
        return self.data[position].read()


def test_shards_in_a_bucket_are_one_collection(store, tmp_path, monkeypatch):
    """S3 as moto stands in for it; the folder is listed, and pretraining takes its address."""
    pytest.importorskip("s3fs")
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    running = server.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    try:
        place = "http://{}:{}".format(*running.get_host_and_port())
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "nobody")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", place)
        client = boto3.client("s3", endpoint_url=place)
        client.create_bucket(Bucket="scans")
        other = phantom_store(4, seed=5)
        client.upload_file(str(store), "scans", "shards/a.h5")
        client.upload_file(str(other), "scans", "shards/b.h5")
        client.put_object(Bucket="scans", Key="shards/readme.txt", Body=b"words")
        here, there = open_data([store, other]), open_data(["s3://scans/shards"])
        assert [str(one.path) for one in there.stores] == [
            "s3://scans/shards/a.h5",
            "s3://scans/shards/b.h5",
        ]
        assert there.digest() == here.digest()
        assert all(torch.equal(a.read(), b.read()) for a, b in zip(here, there, strict=True))
        with pytest.raises(DataError, match="no such file"):
            open_data(["s3://scans/shards/c.h5"])
        with pytest.raises(DataError, match="no stores"):
            open_data(["s3://scans/empty"])
    finally:
        running.stop()


def test_info_and_view_take_an_address(served, capsys, tmp_path):
    from ssl3d.cli import main

    main(["info", served])
    assert "8 volumes" in capsys.readouterr().out
    main(["view", served, "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").stat().st_size > 10_000
