"""Encoders on disk: the same back, the same bytes, and one line for what is not one."""

import hashlib
import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import ssl3d
from ssl3d import cli
from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.card import signed
from ssl3d.checkpoint.encoders import load_encoder, save_encoder
from ssl3d.data.identity import identity_hash
from ssl3d.errors import CheckpointError, UsageError
from ssl3d.specs import encoder_from


@pytest.fixture
def encoder():
    return encoder_from("scratch:resnet10:width=4", seed=3)


@pytest.fixture
def saved(encoder, tmp_path):
    return save_encoder(encoder, tmp_path / "encoder", {"patch": [8, 8, 8], "spacing": [1.0, 2.0, 3.0]})


def rewrite(folder, **changes):
    path = folder / "encoder.json"
    path.write_text(signed({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def change_quietly(folder):
    """Change an option that leaves the weights as they are, as a flipped bit of the card may."""
    path = folder / "encoder.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    assert card["config"]["pool_stride"] == [2, 2, 2]
    card["config"]["pool_stride"] = [1, 2, 2]
    path.write_text(json.dumps(card), encoding="utf-8")


def test_a_card_without_a_digest_as_it_was_once_written_is_read(saved, encoder):
    path = saved / "encoder.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    del card["digest"]
    path.write_text(json.dumps(card), encoding="utf-8")
    x = torch.rand(1, 1, 9, 20, 20)
    assert torch.equal(ssl3d.load_encoder(saved).embed(x), encoder.embed(x))


def test_an_encoder_comes_back_as_it_was(encoder, saved, tmp_path):
    x = torch.rand(2, 1, 9, 20, 20)
    for path in (saved, tmp_path, saved / "encoder.safetensors"):
        back = ssl3d.load_encoder(path)
        assert not back.training
        assert torch.equal(back.embed(x), encoder.embed(x))
    assert back.metadata["spacing"] == [1.0, 2.0, 3.0]
    assert back.metadata["architecture"] == "resnet10"


def test_the_bytes_are_the_same_in_every_process(saved, tmp_path):
    code = (
        "import sys; from ssl3d.checkpoint.encoders import save_encoder;"
        "from ssl3d.specs import encoder_from;"
        "save_encoder(encoder_from('scratch:resnet10:width=4', 3), sys.argv[1], {'b': 1, 'a': 2})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    ours, theirs = (folder / "encoder.safetensors" for folder in (saved, tmp_path / "other"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert b"__metadata__" not in ours.read_bytes()[:2000]


def test_the_memory_format_is_not_part_of_the_bytes(encoder, saved, tmp_path):
    from ssl3d.encoders import to_memory_format

    to_memory_format(encoder, torch.channels_last_3d)
    for parameter in encoder.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    again = save_encoder(encoder, tmp_path / "again")
    assert (again / "encoder.safetensors").read_bytes() == (saved / "encoder.safetensors").read_bytes()


def test_loading_leaves_the_random_generator_alone(saved):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_encoder(saved)
    encoder_from("scratch:resnet10:width=4")
    assert torch.equal(torch.rand(3), expected)


def test_an_encoder_is_replaced_whole(saved, encoder):
    with torch.no_grad():
        next(encoder.parameters()).zero_()
    save_encoder(encoder, saved, {"steps": 7})
    assert load_encoder(saved).metadata["steps"] == 7
    assert [p.name for p in saved.parent.iterdir()] == ["encoder"]


def break_weights(folder):
    path = folder / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(folder):
    path = folder / "encoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def not_a_number(folder):
    path = folder / "encoder.safetensors"
    state = safetensors.torch.load(path.read_bytes())
    name = next(name for name, tensor in state.items() if tensor.is_floating_point())
    state[name].view(-1)[1] = float("nan")
    content = safetensors.torch.save(state)
    path.write_bytes(content)
    rewrite(folder, sha256=hashlib.sha256(content).hexdigest())


def pickled(folder):
    (folder / "encoder.safetensors").write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, "truncated or not safetensors"),
        (flip_a_bit, "sha256 differs"),
        (pickled, "truncated or not safetensors"),
        (not_a_number, "1 of the .* weights of .* are NaN or infinite"),
        (lambda f: rewrite(f, config=[1]), "config is list, not dict"),
        (lambda f: rewrite(f, config=7), "config is int, not dict"),
        (lambda f: rewrite(f, config={"width": 10**30}), "no encoder can be built"),
        (lambda f: rewrite(f, config={"width": -1}), "width must be at least 1"),
        (lambda f: rewrite(f, config={"width": None}), "width is None; expected int"),
        (lambda f: rewrite(f, architecture=[]), "architecture is list, not str"),
        (lambda f: rewrite(f, plugins={"resnet10": 3}, architecture="no-such"), "unknown encoder"),
        (lambda f: rewrite(f, sha256=5), "sha256 is int, not str"),
        (lambda f: rewrite(f, preprocessing=7), "preprocessing is int, not list"),
        (lambda f: rewrite(f, preprocessing=[7]), "not a list of dict"),
        (lambda f: rewrite(f, data=[]), "data is list, not dict"),
        (lambda f: rewrite(f, patch="x"), "patch is str, not list"),
        (lambda f: (f / "encoder.safetensors").unlink(), "No such file"),
        (lambda f: (f / "encoder.json").write_text("{", encoding="utf-8"), "truncated or not JSON"),
        (change_quietly, "was changed after it was written"),
        (
            lambda f: (f / "encoder.json").write_text('{"a": 1}', encoding="utf-8"),
            "is no encoder of ssl3d",
        ),
        (lambda f: rewrite(f, format=99), "newer ssl3d .format 99"),
        (lambda f: rewrite(f, format="one"), "is no file of ssl3d"),
        (lambda f: rewrite(f, architecture="resnet17"), "Did you mean resnet1"),
        (lambda f: rewrite(f, config={"width": 4, "wings": 2}), "unknown option wings"),
        (lambda f: rewrite(f, config={"width": 8}), "has shape"),
        (lambda f: rewrite(f, architecture="resnet50"), "missing"),
    ],
)
def test_what_is_not_a_whole_encoder_gets_one_line(saved, damage, message, capsys):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_encoder(saved)
    assert str(caught.value).startswith(str(saved))
    assert cli.main(["embed", str(saved), "--out", str(saved / "x.h5")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_path_that_holds_no_encoder(tmp_path):
    with pytest.raises(CheckpointError, match="no such run or encoder"):
        load_encoder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="neither a run nor an encoder"):
        load_encoder(tmp_path)
    (tmp_path / "config.yaml").write_text("proxy: [a]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not finished; ssl3d pretrain --resume"):
        load_encoder(tmp_path)


def test_untrained_encoders_by_word():
    words = "scratch:resnet10:3d:width=4:stem_stride=1,2,2:norm=group"
    encoder = encoder_from(words)
    assert (encoder.config.kind, encoder.config.stem_stride) == ("3d", (1, 2, 2))
    assert encoder.metadata["steps"] == 0
    a, b, c = (encoder_from("scratch:resnet10:width=4", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    for word in ("scratch:resnet11", "scratch:resnet10:5d", "scratch:resnet10:wings=2"):
        with pytest.raises(UsageError, match=word.split(":")[-1].split("=")[0]):
            encoder_from(word)


def test_identities_are_hashed_without_mixing_their_parts():
    assert identity_hash("a", "bc") != identity_hash("ab", "c")
    assert identity_hash("a", "b") == identity_hash("a", "b")
    assert len(identity_hash("a", "b")) == 16


def test_an_unwritable_place_is_told(encoder, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be written"):
        save_encoder(encoder, tmp_path / "file" / "encoder")


class Evil:
    def __reduce__(self):
        return print, ("owned",)


def test_checkpoints_unpickle_nothing_but_tensors(tmp_path, capsys):
    def write(path):
        torch.save({"format": 1, "x": Evil()}, path)

    path = snapshot.save_checkpoint(tmp_path, 1, write)
    with pytest.raises(CheckpointError, match="is no checkpoint of ssl3d"):
        snapshot.read_checkpoint(path)
    assert "owned" not in capsys.readouterr().out


def test_a_checkpoint_of_a_newer_format_is_not_passed_over(tmp_path):
    snapshot.save_checkpoint(tmp_path, 1, lambda path: torch.save({"format": 1}, path))
    snapshot.save_checkpoint(tmp_path, 2, lambda path: torch.save({"format": 2}, path))
    with pytest.raises(CheckpointError, match="newer ssl3d"):
        snapshot.load_checkpoint(tmp_path)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        snapshot.save_checkpoint(tmp_path, step, lambda path: torch.save({"format": 1}, path))
    assert [snapshot.step_of(path) for path in snapshot.checkpoints(tmp_path)] == [4, 3]
    # A run that went back to step 2 has nothing later.
    snapshot.save_checkpoint(tmp_path, 2, lambda path: torch.save({"format": 1}, path))
    assert [snapshot.step_of(path) for path in snapshot.checkpoints(tmp_path)] == [2]
