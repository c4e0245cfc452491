"""Encoders by name: packed, listed, fetched over HTTP and from files, verified, and refused otherwise."""

import functools
import http.server
import io
import json
import tarfile
import threading
from pathlib import Path

import pytest
import torch

from ssl3d.api import UsageError, encoder_digest, encoder_from, restoring_decoder
from ssl3d.checkpoint import zoo
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.errors import CheckpointError
from ssl3d.segmentation.decoders import load_decoder

SPEC = "scratch:resnet10:acs:width=4"
CARD = {
    "identities": [],
    "labels_seen": False,
    "steps": 7,
    "proxies": {"mae": {}},
    "data": {"datasets": ["ACDC"]},
}


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A folder of a zoo with one encoder, and the encoder."""
    encoder = encoder_from(SPEC, seed=5)
    save_encoder(encoder, tmp_path / "run" / "encoder", CARD)
    words = ["--name", "heart-mr", "--licence", "CC-BY-4.0", "--out", str(tmp_path / "zoo")]
    assert main(["zoo", "pack", str(tmp_path / "run"), *words]) == 0
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSL3D_ZOO", str(tmp_path / "zoo" / "index.json"))
    return tmp_path / "zoo", encoder


@pytest.fixture
def served(packed, monkeypatch):
    """The same behind a server of this machine; yields the requests that it got."""
    asked = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(packed[0]))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL3D_ZOO", f"http://127.0.0.1:{server.server_port}/index.json")
    yield asked
    server.shutdown()
    server.server_close()


def test_an_encoder_of_the_zoo_is_the_one_that_was_packed(served, packed):
    encoder = encoder_from("zoo:heart-mr")
    assert encoder_digest(encoder) == encoder_digest(packed[1]) and encoder.metadata["steps"] == 7
    assert (
        served == ["/index.json", "/index.json", "/heart-mr.tar.gz"]
        or served.count("/heart-mr.tar.gz") == 1
    )
    again = encoder_from("zoo:heart-mr:stem_stride=1")  # options as of a run; nothing is fetched twice
    assert again.config.stem_stride == (1, 1, 1) and served.count("/heart-mr.tar.gz") == 1


def test_what_was_fetched_serves_without_the_index(served, packed, monkeypatch):
    encoder_from("zoo:heart-mr")
    monkeypatch.setenv("SSL3D_ZOO", "http://127.0.0.1:9/index.json")
    assert encoder_digest(encoder_from("zoo:heart-mr")) == encoder_digest(packed[1])
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        encoder_from("zoo:other")


def test_packing_twice_gives_the_same_bytes_and_needs_a_word(packed, tmp_path, capsys):
    archive = packed[0] / "heart-mr.tar.gz"
    before = archive.read_bytes()
    words = [
        "zoo",
        "pack",
        str(tmp_path / "run"),
        "--name",
        "heart-mr",
        "--licence",
        "x",
        "--out",
        str(packed[0]),
    ]
    assert main(words) == 2 and "has heart-mr already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and archive.read_bytes() == before
    assert json.loads((packed[0] / "index.json").read_text())["encoders"]["heart-mr"]["licence"] == "x"


def test_the_list_says_size_licence_and_training(packed, capsys):
    assert main(["zoo"]) == main(["zoo", "list", "--index", str(packed[0] / "index.json")]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == second and first.startswith("zoo:heart-mr  ")
    assert first.endswith("CC-BY-4.0  resnet10, mae on ACDC, 7 steps")


def test_a_decoder_travels_through_the_zoo(packed, tmp_path):
    encoder = encoder_from(SPEC, seed=5)
    decoder = restoring_decoder("unet", encoder, 4)
    save_encoder(encoder, tmp_path / "both" / "encoder", CARD, {"decoder": decoder})
    words = ["--name", "both", "--licence", "x", "--out", str(packed[0])]
    assert main(["zoo", "pack", str(tmp_path / "both"), *words]) == 0
    loaded = load_decoder("zoo:both").state
    assert all(torch.equal(loaded[name], value) for name, value in decoder.state_dict().items())


@pytest.mark.parametrize("change", ["byte", "shorter", "longer"])
def test_other_bytes_than_those_of_the_index_are_refused(packed, tmp_path, change):
    archive = packed[0] / "heart-mr.tar.gz"
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes({"byte": content, "shorter": content[:-1], "longer": content + b"0"}[change])
    with pytest.raises(CheckpointError, match=r"refused; ask who keeps|larger than the"):
        encoder_from("zoo:heart-mr")
    assert not (tmp_path / "cache" / "zoo").exists() or not list((tmp_path / "cache" / "zoo").iterdir())


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "link"])
def test_an_archive_of_anything_but_plain_files_is_refused(packed, tmp_path, name):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO())
    index = packed[0] / "index.json"
    content = json.loads(index.read_text())
    entry = content["encoders"]["heart-mr"]
    entry |= {"sha256": zoo.hashlib.sha256(raw.getvalue()).hexdigest(), "bytes": len(raw.getvalue())}
    index.write_text(json.dumps(content))
    (packed[0] / "heart-mr.tar.gz").write_bytes(raw.getvalue())
    with pytest.raises(CheckpointError, match="is no file of an encoder"):
        encoder_from("zoo:heart-mr")
    assert not (tmp_path / "evil").exists() and not list((tmp_path / "cache" / "zoo").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "abc"}, "64 hexadecimal"), ({"bytes": 0}, "bytes is 0"),
        ({"bytes": 10**9}, "must be 1 to"), ({"bytes": "9"}, "bytes is '9'"),
        ({"licence": 3}, "must be texts"), ({"file": "ftp://x/y"}, "only https"),
        ({"file": "none.tar.gz"}, "cannot be fetched"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_meant_is_one_clear_line(packed, change, message):
    index = packed[0] / "index.json"
    content = json.loads(index.read_text())
    content["encoders"]["heart-mr"] |= change
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as caught:
        encoder_from("zoo:heart-mr")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2, "encoders": {}}', '{"format": 1}', "\udcff", "{" * 9000]
)
def test_what_is_no_index_is_one_clear_line(packed, text):
    (packed[0] / "index.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="is no index of encoders") as caught:
        encoder_from("zoo:heart-mr")
    assert "\n" not in str(caught.value)


def test_names_and_missing_indices_are_one_clear_line(packed, monkeypatch, capsys):
    with pytest.raises(CheckpointError, match="there are: heart-mr"):
        encoder_from("zoo:brain")
    with pytest.raises(CheckpointError, match="is no name"):
        encoder_from("zoo:../x")
    assert main(["zoo", "other"]) == 2 and "neither list nor pack" in capsys.readouterr().err
    monkeypatch.delenv("SSL3D_ZOO")
    with pytest.raises(CheckpointError, match="no index is configured: set \\$SSL3D_ZOO"):
        encoder_from("zoo:heart-mr")


def test_an_encoder_that_is_too_large_is_not_packed(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "LARGEST", 1000)
    words = [
        "zoo",
        "pack",
        str(tmp_path / "run"),
        "--name",
        "big",
        "--licence",
        "x",
        "--out",
        str(tmp_path / "z"),
    ]
    assert main(words) == 2
    assert not (tmp_path / "z").exists()


def test_a_name_that_is_none_is_refused_before_anything_is_written(packed, tmp_path):
    from ssl3d.commands.zoo import ZooPackOptions, pack

    with pytest.raises(UsageError, match="is no name"):
        pack(ZooPackOptions(tmp_path / "run", name="A/B", licence="x", out=tmp_path / "z"))
    assert not Path(tmp_path / "z").exists()
