"""The commands as Python functions."""

import h5py
import numpy as np
import pytest

import ssl3d
from ssl3d.errors import CheckpointError, DataError, UsageError


def test_the_package_completes_to_what_it_has():
    names = {"prepare", "pretrain", "resume", "embed", "finetune", "localize", "convert", "load_encoder"}
    assert names <= set(dir(ssl3d)) and names <= set(ssl3d.__all__)
    for name in names - {"convert"}:
        assert callable(getattr(ssl3d, name)) and "Raises:" in getattr(ssl3d, name).__doc__


@pytest.fixture
def scans(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    np.savez(
        tmp_path / "scans" / "set.npz",
        train_images=rng.integers(0, 255, (12, 16, 16, 16), dtype=np.uint8),
        train_labels=np.arange(12)[:, None] % 2,
        test_images=rng.integers(0, 255, (6, 16, 16, 16), dtype=np.uint8),
        test_labels=np.arange(6)[:, None] % 2,
        val_images=rng.integers(0, 255, (4, 16, 16, 16), dtype=np.uint8),
        val_labels=np.arange(4)[:, None] % 2,
    )
    return tmp_path / "scans"


def test_scans_become_a_store_embeddings_and_records(scans, tmp_path):
    store = ssl3d.prepare(scans, tmp_path / "s.h5", workers=0)
    features = ssl3d.embed("scratch:resnet10:3d:width=4", store, tmp_path / "f.h5", patch=(16, 16, 16))
    with h5py.File(features) as file:
        assert file["embeddings"].shape[0] == 22 and file.attrs["patch"].tolist() == [16, 16, 16]
    with pytest.raises(UsageError, match="exists"):
        ssl3d.embed("scratch:resnet10:3d:width=4", store, features)
    records = ssl3d.finetune(
        "scratch:resnet10:3d:width=4", store, tmp_path / "out",
        steps=2, batch_size=4, eval_at=(1.0,), no_trivial=True, workers=0, lr=0.001,
    )  # fmt: skip
    assert (records / "table.txt").is_file()


def test_a_wrong_word_is_refused_as_on_the_command_line(scans, tmp_path):
    with pytest.raises(UsageError, match="--spacin"):
        ssl3d.prepare(scans, tmp_path / "s.h5", spacin=1)
    with pytest.raises(CheckpointError, match="is no run"):
        ssl3d.localize(tmp_path / "run", tmp_path / "nowhere", tmp_path / "out")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.nii").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"no scan of .* is usable"):
        ssl3d.prepare([broken], tmp_path / "b.h5", workers=0)
