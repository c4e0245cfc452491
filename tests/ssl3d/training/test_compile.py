"""A compiled encoder computes what it computed before, under the same names, and its run goes on."""

import copy
import shutil

import pytest
import torch

import ssl3d
from ssl3d import cli
from ssl3d.checkpoint import snapshot
from ssl3d.encoders.resnet import ResNet10
from ssl3d.errors import UsageError
from ssl3d.evaluation.records import read_result
from ssl3d.training import device
from ssl3d.training.device import check_compiler, compile_encoders


def test_where_there_is_no_compiler_the_reason_is_one_line(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler\nfound in the path")

    monkeypatch.setattr(device, "BACKEND", broken)
    torch._dynamo.reset()
    with pytest.raises(UsageError, match=r"--compile: torch\.compile does not work here") as caught:
        check_compiler(torch.device("cpu"))
    message = str(caught.value)
    assert "No working C++ compiler found" in message and "such as g++" in message and "\n" not in message


def test_only_what_is_compiled_is_called_and_a_copy_is_not_compiled(monkeypatch):
    seen = []

    def compiled(forward, backend):
        return lambda *inputs: seen.append("compiled") or forward(*inputs)

    monkeypatch.setattr(torch, "compile", compiled)
    encoder = ResNet10(ResNet10.Config(width=4, stem_stride=(1, 1, 1), stem_kernel=3))
    names = list(encoder.state_dict())
    encoder.register_forward_pre_hook(lambda module, inputs: seen.append("hook"))
    compile_encoders(torch.nn.ModuleDict({"encoder": encoder}))
    x = torch.randn(2, 1, 16, 16, 16)
    embedded = encoder.embed(x)
    assert seen == ["hook", "compiled"]
    assert list(encoder.state_dict()) == names == list(encoder.state_dict(keep_vars=True))
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.conv1.weight.zero_()
    assert not torch.equal(other.embed(x), embedded) and seen == ["hook", "compiled", "hook"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["3d", "acs"])
def test_it_computes_what_it_computed_in_one_graph(kind):
    torch.manual_seed(0)
    encoder = ResNet10(ResNet10.Config(width=4, kind=kind, stem_stride=(1, 1, 1), stem_kernel=3))
    other = copy.deepcopy(encoder)
    x = torch.randn(2, 1, 12, 16, 16)
    graphs = torch._dynamo.explain(encoder.forward)(x)
    assert graphs.graph_count == 1, [str(reason) for reason in graphs.break_reasons]
    compile_encoders(encoder)
    # The trace of `explain` has counted a batch; both count the same from here on.
    other.load_state_dict(encoder.state_dict())
    for each in (encoder, other):
        each.embed(x).square().sum().backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in encoder.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * largest), name
    for name, value in encoder.named_buffers():
        assert torch.allclose(value.double(), other.get_buffer(name).double(), rtol=1e-4, atol=1e-6), name


@pytest.mark.slow
def test_a_run_goes_on_to_the_bytes_of_one_that_was_not_stopped(train, tmp_path):
    whole = train("whole", compile=True, checkpoint_every=2, eval_every=-1, steps=4)
    plain = train("plain", checkpoint_every=2, eval_every=-1, steps=4)
    half = shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(half / "encoder")
    snapshot.checkpoints(half)[0].unlink()
    again = ssl3d.resume(half)
    ours, theirs, others = (snapshot.load_checkpoint(run.folder) for run in (again, whole, plain))
    assert ours["module"].keys() == others["module"].keys()
    assert all(torch.equal(ours["module"][key], value) for key, value in theirs["module"].items())
    assert [r["loss"] for r in whole.metrics] == pytest.approx([r["loss"] for r in plain.metrics], rel=1e-4)
    assert whole.encoder.metadata["compute"]["flops"] == plain.encoder.metadata["compute"]["flops"]


@pytest.mark.slow
def test_fine_tuning_compiles_and_counts_the_same(phantoms, tmp_path):
    words = ["finetune", "scratch:resnet10:width=4", "--data", phantoms, "--task", "segmentation"]
    words += ["--steps", "3", "--no-trivial", "true", "--eval-at", "1", "--threads", "1"]
    words += ["--segmentation.patch", "16", "16", "16"]
    assert cli.main([*words, "--out", str(tmp_path / "plain")]) == 0
    assert cli.main([*words, "--out", str(tmp_path / "compiled"), "--compile", "true"]) == 0
    plain, compiled = (
        [read_result(path) for path in sorted((tmp_path / name).glob("*.json"))]
        for name in ("plain", "compiled")
    )
    assert plain and [each.key for each in plain] == [each.key for each in compiled]
    assert [each.compute["finetune"]["flops"] for each in plain] == [
        each.compute["finetune"]["flops"] for each in compiled
    ]
