"""`--pool aggregator`: volumes embedded by what intra_inter trained beside its encoder."""

import copy

import h5py
import numpy as np
import pytest
import torch

from ssl3d.api import (
    Result,
    encoder_digest,
    open_data,
)
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d.errors import CheckpointError
from ssl3d.heads.aggregator import AggregatedEncoder, AggregatorConfig, SliceAggregator
from ssl3d_benchmarks.contestants import Entry, described, pool_details, pooled, recalibrate


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    from ssl3d.data.phantoms import phantom_store

    return phantom_store(12, shape=(16, 24, 24), folder=tmp_path_factory.mktemp("phantoms"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An encoder that an aggregator travels with."""
    folder = tmp_path_factory.mktemp("run") / "encoder"
    torch.manual_seed(0)
    encoder = ResNet10(ResNet10.Config(width=8, stem_kernel=3)).eval()
    config = AggregatorConfig(encoder.embed_dim, width=16, heads=2, layers=1, slices=4, plane=(16, 16))
    aggregator = SliceAggregator(config).eval()
    metadata = {"patch": [1, 16, 16], "identities": [], "steps": 1}
    save_encoder(encoder, folder, metadata, travellers={"aggregator": aggregator})
    return folder, encoder, aggregator


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An encoder alone."""
    folder = tmp_path_factory.mktemp("bare") / "encoder"
    save_encoder(ResNet10(ResNet10.Config(width=8)), folder, {"patch": [8, 8, 8]})
    return folder


def test_embed_pools_with_the_aggregator(trained, phantoms, tmp_path, capsys):
    folder, encoder, aggregator = trained
    out = tmp_path / "features.h5"
    assert not main(
        ["embed", str(folder), "--data", str(phantoms), "--pool", "aggregator", "--out", str(out)]
    )
    assert "12 embeddings of length 16" in capsys.readouterr().out
    with h5py.File(out) as file:
        found = file["embeddings"][:]
        assert file.attrs["pool"] == "aggregator"
    data = open_data([phantoms])
    for row in (0, 7):
        expected = aggregator.embed_volume(encoder, data[row].read())
        assert np.allclose(found[row], expected.numpy(), atol=1e-5)


def test_embed_writes_the_encoders_own_maps_beside(trained, phantoms, tmp_path):
    out = tmp_path / "features.h5"
    words = ["embed", str(trained[0]), "--data", str(phantoms), "--pool", "aggregator", "--dense"]
    assert not main([*words, "--out", str(out)])
    with h5py.File(out) as file:
        assert file["embeddings"].shape == (12, 16)
        assert file["dense/0"].shape[0] == trained[1].channels[-1]


@pytest.mark.parametrize("command", [["embed"], ["linear-probe", "--target", "classes"]])
def test_an_encoder_without_aggregator_is_refused_in_one_line(command, bare, phantoms, tmp_path, capsys):
    for spec, said in (
        (str(bare), "no aggregator travelled"),
        ("scratch:resnet10", "without an aggregator"),
    ):
        words = [command[0], spec, *command[1:], "--data", str(phantoms), "--pool", "aggregator"]
        assert main([*words, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and said in error[0] and "intra_inter" in error[0]


def test_a_window_is_not_the_aggregators(trained, phantoms, tmp_path, capsys):
    words = ["embed", str(trained[0]), "--data", str(phantoms), "--pool", "aggregator"]
    assert main([*words, "--patch", "8", "8", "8", "--out", str(tmp_path / "out.h5")])
    assert "patch is of pool mean" in capsys.readouterr().err


def test_the_probe_of_masks_pools_nothing(trained, phantoms, tmp_path, capsys):
    words = ["linear-probe", str(trained[0]), "--data", str(phantoms), "--target", "masks"]
    assert main([*words, "--pool", "aggregator", "--out", str(tmp_path / "out")])
    assert "pools nothing" in capsys.readouterr().err


def test_the_probe_has_untrained_aggregators_beside(trained, phantoms, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    words = [
        "linear-probe",
        str(trained[0]),
        "--data",
        str(phantoms),
        "--target",
        "classes",
        "--folds",
        "2",
    ]
    words += ["--pool", "aggregator", "--untrained", "1", "--recalibrate", "yes"]
    assert not main([*words, "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert f"{trained[0]}, aggregator" in table and "stem_kernel=3, aggregator" in table
    records = list((tmp_path / "out").glob("*.json"))
    assert any('"pool": "aggregator v2"' in path.read_text(encoding="utf-8") for path in records)


def test_another_version_of_the_pooling_is_another_contestant(trained, monkeypatch):
    encoder, aggregator = copy.deepcopy(trained[1:])
    encoder.metadata = {"architecture": "resnet10", "config": {}}

    def keys():
        found = {}
        for pool, one in (("mean", encoder), ("aggregator", AggregatedEncoder(encoder, aggregator))):
            entry = Entry(f"x{pooled(pool)}", "encoder", "scratch:resnet10", None)
            who = described(entry, one, pool_details(pool))
            about = Result("t", 1, ["d"], "data", {}, "split", 1.0, 0, 0, who.described(), {}, "auc")
            found[pool] = who.digest, about.key
        return found

    now = keys()
    monkeypatch.setattr(AggregatedEncoder, "version", 1)
    before = keys()
    assert now["mean"] == before["mean"] and now["mean"][0] == encoder_digest(encoder)
    assert pool_details("mean") == {}
    assert all(a != b for a, b in zip(now["aggregator"], before["aggregator"]))


def test_norms_are_recalibrated_on_what_the_aggregator_sees():
    encoder = ResNet10(ResNet10.Config(width=8))
    aggregator = SliceAggregator(AggregatorConfig(encoder.embed_dim, width=16, heads=2, slab=2, axis="W"))
    whole = AggregatedEncoder(encoder, aggregator)
    x = torch.arange(2 * 3 * 4 * 5).view(2, 1, 3, 4, 5).float()
    slabs, mask = whole.stacks(x)
    assert slabs.shape == (2, 2, 1, 2, 3, 4) and mask.all()
    assert torch.equal(slabs[0, 1, 0, 0], x[0, 0, :, :, 2])
    assert whole.stacks(x[:, :, :1])[0].shape == (2, 1, 1, 1, 4, 5)


def test_norms_are_not_recalibrated_on_air(trained, tmp_path):
    """Statistics of volumes with more air at their ends are the same."""
    found = []
    for name, air in (("a", 0), ("b", 8)):
        for n in range(3):
            image = np.random.default_rng(n).random((1, 16, 24, 24), dtype=np.float32)
            image = np.pad(image, ((0, 0), (air, air), (0, 0), (0, 0)), constant_values=-1)
            image[..., :2] = -1
            write_part(tmp_path / name, f"{n}", Record(f"{n}", "made", f"s{n}"), image)
        assemble(tmp_path / name, tmp_path / f"{name}.h5", {}, [])
        whole = copy.deepcopy(AggregatedEncoder(*trained[1:]))
        recalibrate(whole, open_data([tmp_path / f"{name}.h5"]), (64, 64, 64), "cpu")
        found.append(whole.encoder.bn1.running_mean)
    torch.testing.assert_close(*found)


def test_an_aggregator_of_another_encoder_is_refused():
    with pytest.raises(CheckpointError, match="length 12, the encoder gives 64"):
        AggregatedEncoder(
            ResNet10(ResNet10.Config(width=8)), SliceAggregator(AggregatorConfig(12, width=16, heads=2))
        )
