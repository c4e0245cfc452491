"""Modules that travel beside the encoder: written, loaded, refused."""

import dataclasses
import json
import sys

import pytest
import torch
from torch import nn

from ssl3d.checkpoint import travellers
from ssl3d.checkpoint.card import signed
from ssl3d.checkpoint.encoders import load_encoder, save_encoder
from ssl3d.checkpoint.travellers import load_traveller
from ssl3d.errors import CheckpointError, PluginError
from ssl3d.specs import encoder_from


@dataclasses.dataclass
class PoolConfig:
    """Options of the pool.

    Attributes:
        width: Of its features.
    """

    width: int = 4


class Pool(nn.Module):
    """A stand-in for an aggregator."""

    Config = PoolConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.width, 2)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))


class PoolOf(Pool):
    """One that is made of more than its options."""

    def __init__(self, width):
        super().__init__(PoolConfig(width))

    @classmethod
    def from_config(cls, config):
        return cls(config.width)


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    places = {"pool": f"{__name__}:Pool", "pool_of": f"{__name__}:PoolOf"}
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Pool.__module__])
    monkeypatch.setattr(travellers, "TRAVELLERS", places)


def saved(folder, module, name="aggregator"):
    return save_encoder(
        encoder_from("scratch:resnet10:width=4"), folder / "encoder", {"steps": 3}, {name: module}
    )


@pytest.mark.parametrize("made", [Pool(PoolConfig(6)), PoolOf(6)], ids=["of its config", "from_config"])
def test_it_is_loaded_as_it_was_saved(made, tmp_path):
    made.seen += 5
    folder = saved(tmp_path, made)
    assert sorted(path.name for path in folder.iterdir()) == [
        "aggregator.safetensors",
        "encoder.json",
        "encoder.safetensors",
    ]
    for path in (folder, tmp_path):
        loaded = load_traveller(path, "aggregator")
        assert type(loaded) is type(made) and loaded.config == PoolConfig(6) and not loaded.training
        for name, value in made.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)
    assert load_encoder(folder).metadata["travellers"]["aggregator"]["config"] == {"width": 6}


def test_an_encoder_alone_is_written_as_before(tmp_path):
    folder = save_encoder(encoder_from("scratch:resnet10:width=4"), tmp_path / "encoder")
    assert "travellers" not in json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    with pytest.raises(CheckpointError, match=r"no aggregator travelled with this encoder \(it has none\)"):
        load_traveller(folder, "aggregator")


def test_another_name_says_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"no pooling .*it has aggregator"):
        load_traveller(saved(tmp_path, Pool(PoolConfig())), "pooling")


def edit(folder, **changes):
    path = folder / "encoder.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["travellers"]["aggregator"] |= changes
    path.write_text(signed(card), encoding="utf-8")


def test_no_class_is_made_that_is_not_listed(tmp_path):
    folder = saved(tmp_path, Pool(PoolConfig()))
    edit(folder, **{"class": "os:system"})
    with pytest.raises(CheckpointError, match="'os:system' is not one of pool, pool_of"):
        load_traveller(folder, "aggregator")


@pytest.mark.parametrize(
    "harm,message",
    [
        (lambda f: edit(f, config={"width": 8}), "has shape"),
        (lambda f: edit(f, config={"breadth": 8}), "breadth"),
        (lambda f: (f / "aggregator.safetensors").write_bytes(b"x"), "truncated"),
        (lambda f: (f / "aggregator.safetensors").unlink(), "No such file"),
        (lambda f: edit(f, sha256="0"), "sha256"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(harm, message, tmp_path):
    folder = saved(tmp_path, Pool(PoolConfig()))
    harm(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_traveller(folder, "aggregator")
    assert "\n" not in str(error.value)


def test_a_file_elsewhere_is_never_read(tmp_path):
    folder = saved(tmp_path, Pool(PoolConfig()))
    path = folder / "encoder.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    card["travellers"] = {"../aggregator": card["travellers"]["aggregator"]}
    path.write_text(signed(card), encoding="utf-8")
    with pytest.raises(CheckpointError, match="it has none"):
        load_traveller(folder, "../aggregator")


@pytest.mark.parametrize(
    "name,module,message",
    [
        ("encoder", Pool(PoolConfig()), "cannot be the name"),
        ("../up", Pool(PoolConfig()), "cannot be the name"),
        ("pool", nn.Linear(2, 2), "not listed"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(name, module, message, tmp_path):
    with pytest.raises(PluginError, match=message):
        saved(tmp_path, module, name)
    assert not (tmp_path / "encoder").exists()


def test_a_proxy_sends_its_module_along(tiny_plugins, phantoms, tmp_path, small):
    import tiny_ssl3d_plugins

    import ssl3d

    class Sending(tiny_ssl3d_plugins.Tiny):
        """It sends its pool along."""

        def __init__(self, config, encoder):
            super().__init__(config, encoder)
            self.pool = Pool(PoolConfig(3))

        def travels(self):
            return {"aggregator": self.pool}

        def after_step(self, step, total):
            self.pool.seen += 1

    run = ssl3d.pretrain(Sending, data=phantoms, out=tmp_path / "run", steps=4, save_at=(0.5,), **small)
    assert load_traveller(run.folder, "aggregator").seen == 4
    assert load_traveller(run.folder / "encoder-at-50", "aggregator").seen == 2

    class Wrong(Sending):
        """It sends along what it does not own."""

        def travels(self):
            return {"aggregator": Pool(PoolConfig(3))}

    with pytest.raises(PluginError, match="aggregator is no part of the proxy"):
        ssl3d.pretrain(Wrong, data=phantoms, out=tmp_path / "wrong", steps=4, **small)
    assert not (tmp_path / "wrong").exists()
