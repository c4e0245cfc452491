"""`ssl3d export --to onnx` and `--to torch-export`, run by programs that have no ssl3d."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ssl3d
from ssl3d.cli import main
from ssl3d.export import graphs, source

DISTANT = """
import sys, numpy, torch
sys.path[:] = [p for p in sys.path if ".links" not in p]
program = torch.export.load(sys.argv[1]).module()
out = program(torch.from_numpy(numpy.load(sys.argv[2])))
numpy.save(sys.argv[3], (out if isinstance(out, torch.Tensor) else out[0]).detach().numpy())
assert not [name for name in sys.modules if name.startswith("ssl3d")]
"""


def export(what, form, out, *words):
    return main(["export", str(what), "--to", form, "--out", str(out), *words])


def one_convolution(*_):
    """Trace another network, and a small one."""
    other = torch.nn.Sequential(torch.nn.Conv3d(1, 3, 1), torch.nn.Softmax(dim=1))
    with torch.no_grad():
        return torch.export.export(other, (torch.zeros(2, 1, 12, 12, 12),),
                                   dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))  # fmt: skip


def windows(model, shape=(12, 12, 12), count=3):
    return torch.from_numpy(np.random.default_rng(1).normal(size=(count, 1, *shape)).astype(np.float32))


@pytest.mark.long
def test_onnxruntime_computes_the_probabilities_of_a_segmentation(segmenter, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    capsys.readouterr()
    assert export(segmenter, "onnx", tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert "model.onnx" in shown.out and "largest difference from ssl3d's own outputs" in shown.out
    assert "Warning" not in shown.err
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["volume"]
    assert [o.name for o in session.get_outputs()] == ["probabilities"]
    model = ssl3d.load_model(segmenter)
    for count in (1, 3):
        x = windows(model, count=count)
        (found,) = session.run(None, {"volume": x.numpy()})
        with torch.no_grad():
            wanted = model(x)[0].softmax(dim=1)
        assert found.shape == (count, 3, 12, 12, 12)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert about["input"]["shape"] == [None, 1, 12, 12, 12] and about["largest_difference"] < 1e-4
    assert [kind["name"] for kind in about["card"]["classes"]] == ["background", "bright", "dark"]
    assert "subjects" not in about["card"]["training"]


@pytest.mark.long
def test_onnxruntime_computes_an_encoders_maps_of_another_size(encoder, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export(encoder, "onnx", tmp_path / "out") == 0
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    ours = ssl3d.load_encoder(encoder)
    names = [o.name for o in session.get_outputs()]
    assert names == ["embedding", *(f"map_{n}" for n in range(len(ours.channels)))]
    for shape in ((16, 24, 20), (21, 18, 33)):
        x = windows(ours, shape, 2)
        found = session.run(None, {"volume": x.numpy()})
        with torch.no_grad():
            wanted = [ours.embed(x), *ours(x)]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4)
    assert "identities" not in json.loads((tmp_path / "out/export.json").read_text())["card"]


@pytest.mark.long
@pytest.mark.parametrize("what", ["segmenter", pytest.param("classifier", marks=pytest.mark.slow)])
def test_a_program_of_torch_needs_no_ssl3d(what, request, tmp_path):
    folder = request.getfixturevalue(what)
    assert export(folder, "torch-export", tmp_path / "out") == 0
    model = ssl3d.load_model(folder)
    x = windows(model, (12, 12, 12) if what == "segmenter" else (33, 40, 26), 1)
    np.save(tmp_path / "x.npy", x.numpy())
    words = [tmp_path / "out/model.pt2", tmp_path / "x.npy", tmp_path / "y.npy"]
    subprocess.run([sys.executable, "-c", DISTANT, *map(str, words)], check=True, cwd=tmp_path)
    with torch.no_grad():
        out = model(x)
    logits = out[0] if what == "segmenter" else out
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), logits.softmax(dim=1).numpy(), atol=1e-4)
    if what == "classifier":
        predicted = model.predict(x[0]).numbers
        np.testing.assert_allclose(np.load(tmp_path / "y.npy")[0], predicted, atol=1e-4)


def test_outputs_that_differ_are_refused_and_nothing_is_left(segmenter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(source, "TOLERANCE", 1e-9)
    monkeypatch.setattr(graphs, "traced", one_convolution)
    assert export(segmenter, "torch-export", tmp_path / "out") == 1
    assert "its outputs differ from ours by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(segmenter, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(graphs, "_checked", lambda *_: {"largest_difference": 0.0})
    monkeypatch.setattr(graphs, "traced", one_convolution)
    assert export(segmenter, "torch-export", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graphs, "_checked", full)
    assert export(segmenter, "torch-export", out, "--overwrite") == 3
    assert "no space left on the disk" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scratch:resnet10", "--to", "onnx"], "no encoder that ssl3d trained"),
        (["nowhere", "--to", "onnx"], "no such file or folder"),
        (["MODEL", "--to", "torchscript"], "torch has deprecated TorchScript"),
        (
            ["MODEL", "--to", "onnx", "--patch", "16", "16", "16"],
            "windows of 12 x 12 x 12, as it was trained",
        ),
        (["MODEL", "--to", "onnx", "--out", "."], "--out .: exists"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    words, message, segmenter, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(str(segmenter) if word == "MODEL" else word for word in words)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(Path().iterdir())
