"""`ssl3d embed`: one row per volume, in order, whatever is asked for beside it."""

import h5py
import numpy as np
import pytest
import torch

from ssl3d import cli
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.data.open import open_data, open_data_for
from ssl3d.encoders.inference import embed_volume
from ssl3d.errors import UsageError
from ssl3d.specs import encoder_from

WORD = "scratch:resnet10:width=4"


def embed(data, out, *more, encoder=WORD):
    return cli.main(
        ["embed", encoder, "--data", data, "--out", str(out), "--patch", "16", "16", "16", *more]
    )


def test_every_volume_gets_its_row(phantoms, tmp_path, capsys):
    assert embed(phantoms, tmp_path / "f.h5") == 0
    assert "12 embeddings of length 32" in capsys.readouterr().out
    data = open_data([phantoms])
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["embeddings"].shape == (12, 32) and "dense" not in file
        assert file["ids"].asstr()[:].tolist() == data.ids.tolist()
        assert file["subjects"].asstr()[:].tolist() == data.subjects.tolist()
        assert file["labels"][:].tolist() == [float(label) for label in data.labels]
        expected = embed_volume(encoder_from(WORD), data[5].read(), (16, 16, 16))
        assert np.allclose(file["embeddings"][5], expected.numpy(), rtol=1e-4, atol=1e-5)
        assert tuple(file.attrs["patch"]) == (16, 16, 16) and file.attrs["encoder"] == WORD


def test_dense_maps_on_request(phantoms, tmp_path):
    words = ["--dense", "--dense-levels", "1", "-1", "--dense-every", "4", "8", "8"]
    assert embed(phantoms, tmp_path / "f.h5", *words) == 0
    channels = encoder_from(WORD).channels
    with h5py.File(tmp_path / "f.h5") as file:
        assert len(file["dense"]) == 12
        assert file["dense/3"].shape == (channels[1] + channels[-1], 6, 4, 4)
        assert file["dense"].attrs["every"].tolist() == [4, 8, 8]


def test_a_run_brings_its_own_patch(train, phantoms, tmp_path):
    run = train(steps=2)
    out = tmp_path / "f.h5"
    assert cli.main(["embed", str(run.folder), "--data", phantoms, "--out", str(out)]) == 0
    with h5py.File(out) as file:
        assert tuple(file.attrs["patch"]) == (12, 12, 12)


def test_what_is_there_stays(phantoms, tmp_path, capsys):
    out = tmp_path / "f.h5"
    out.write_text("mine", encoding="utf-8")
    assert embed(phantoms, out) == 2
    assert out.read_text(encoding="utf-8") == "mine" and "--overwrite" in capsys.readouterr().err
    assert embed(phantoms, out, "--overwrite") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--overlap", "1"], "--overlap"),
        (["--patch", "4", "4"], "--patch"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_wrong_options_are_told(phantoms, tmp_path, words, message, capsys):
    assert cli.main(["embed", WORD, "--data", phantoms, "--out", str(tmp_path / "f.h5"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "f.h5").exists()


def test_other_channels_are_refused(phantoms, tmp_path, capsys):
    assert embed(phantoms, tmp_path / "f.h5", encoder=f"{WORD}:in_channels=2") == 2
    assert "takes 2 channels" in capsys.readouterr().err


def test_bf16_is_close(phantoms, tmp_path):
    assert embed(phantoms, tmp_path / "a.h5") == 0
    assert embed(phantoms, tmp_path / "b.h5", "--precision", "bf16") == 0
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b:
        first, second = torch.tensor(a["embeddings"][:]), torch.tensor(b["embeddings"][:])
    assert torch.nn.functional.cosine_similarity(first, second).min() > 0.99


def test_raw_scans_are_prepared_as_the_encoders_own_data_were(tmp_path, monkeypatch, capsys):
    nibabel = pytest.importorskip("nibabel")
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    scans = tmp_path / "scans"
    scans.mkdir()
    for number in range(2):
        noise = np.random.default_rng(number).normal(100, 30, (16, 16, 16)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(noise, np.eye(4)), scans / f"p{number}.nii.gz")
    store = tmp_path / "own.h5"
    words = ["--spacing", "2", "2", "2", "--normalize", "unit", "--workers", "0"]
    assert cli.main(["prepare", str(scans), "--out", str(store), *words]) == 0
    encoder = encoder_from(WORD)
    save_encoder(encoder, tmp_path / "encoder", {"preprocessing": open_data([store]).settings})

    trained = encoder_from(tmp_path / "encoder")
    own = open_data_for([trained], [scans])
    assert own.digest() == open_data([store]).digest() != open_data([scans]).digest()
    assert "spacing [2.0, 2.0, 2.0], normalize unit" in capsys.readouterr().err
    other = encoder_from(WORD)
    other.metadata["preprocessing"] = [{"options": {"spacing": "keep", "normalize": "mr"}}]
    with pytest.raises(UsageError, match="prepared differently"):
        open_data_for([trained, other], [scans])
    assert len(open_data_for([trained, other], [store])) == 2


def test_info_tells_weights_that_are_cut_short(tmp_path, capsys):
    save_encoder(encoder_from(WORD), tmp_path / "encoder")
    weights = tmp_path / "encoder" / "encoder.safetensors"
    assert cli.main(["info", str(tmp_path / "encoder")]) == 0
    weights.write_bytes(weights.read_bytes()[:-10])
    assert cli.main(["info", str(tmp_path / "encoder")]) == 2
    assert "encoder.safetensors: truncated" in capsys.readouterr().err
    weights.unlink()
    assert cli.main(["info", str(tmp_path / "encoder")]) == 2
