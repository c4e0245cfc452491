"""No proxy makes the device wait for Python within a step, and the loop does so once."""

import collections
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ssl3d
from ssl3d import on_device, plugins
from ssl3d.config import to_dict
from ssl3d.data.open import open_data
from ssl3d.training.loader import Loader
from ssl3d.training.loop import Loop, reseed
from ssl3d.training.trainee import Trainee

# What these proxies look at says what they compute next.
LOOKS = {
    "med3d": "each example goes through the branch of its data set",
    "faster_rcnn": "the number of proposals and of boxes is not known before",
    "pseudo3d_detection": "the number of proposals and of boxes is not known before",
}
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
METHODS = ("tolist", "cpu", "numpy", "item", "__array__")


def place():
    """The line of ours from which a call comes; None where a worker draws, or an optimizer counts steps."""
    frame, line = sys._getframe(2), "a test"
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/optim/" in file or file.endswith("/training/loader.py"):
            return None
        if line == "a test" and "ssl3d" in file and "/tests/" not in file:
            line = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return line


class Operators(TorchDispatchMode):
    """Counts the operators whose result Python needs, and so waits for."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        away = name == "_to_copy" and str((kwargs or {}).get("device")) == "cpu"
        if (name in OPERATORS or masks or away) and (where := place()):
            self.found[f"{name} at {where}"] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Counts the methods that no operator shows on a CPU, and numbers copied to the device one by one."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        copied = name in ("tensor", "as_tensor") and (kwargs or {}).get("device") is not None
        if (name in METHODS or copied) and (where := place()):
            self.found[f"{name} at {where}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Counts what would wait, as on a device that cannot be asked for free."""
    # Numbers sent from page-locked memory are not waited for; on the CPU there is no such thing.
    monkeypatch.setattr("ssl3d.rng.sent", lambda values, device, dtype: torch.LongTensor(values))
    monkeypatch.setattr(on_device, "FREE", frozenset())
    return collections.Counter()


def trainee_and_batches(name, small, tiny_encoder, store):
    data, config = open_data([store]), small(name)
    torch.manual_seed(0)
    kind = plugins.load(plugins.PROXIES, name)
    encoder = tiny_encoder("acs", name=name)
    proxy = kind(config, encoder)
    proxy.setup(data)
    loader = Loader(data, {name: (kind, config)}, 6, seed=0, steps=2, pin=False)
    proxy.start_epoch(0, [[g.tensors for g in batch.groups] for batch in loader.once(name)])
    return Trainee(encoder, {name: proxy}, {name: 1.0}, 0).train(), [batch.groups for batch in loader]


@pytest.mark.parametrize("name", plugins.names(plugins.PROXIES))
def test_a_step_waits_for_nothing(name, waits, small, tiny_encoder, store_of):
    trainee, batches = trainee_and_batches(name, small, tiny_encoder, store_of(name))
    for step, groups in enumerate(batches):  # constants are copied in the first one
        waits.clear()
        reseed(0, step, 0)
        with Methods(waits), Operators(waits):
            loss, _ = trainee("loss", groups, step)
            loss.backward()
            for _, proxy in trainee.each():
                proxy.after_step(step, 10)
    if name in LOOKS:
        assert waits, f"{name} waits for nothing any more: take it out of LOOKS"
    else:
        assert not waits, "\n".join(waits)


def test_the_loop_waits_once_in_a_step(waits, small, store_of, monkeypatch, tmp_path):
    step = Loop._step

    def watched(self, number, asked):
        waits.clear()
        with Methods(waits), Operators(waits):
            return step(self, number, asked)

    monkeypatch.setattr(Loop, "_step", watched)
    ssl3d.pretrain(
        "simclr", data=str(store_of("simclr")), out=tmp_path / "run", encoder="resnet10",
        resnet10={"width": 8}, simclr=to_dict(small("simclr")), steps=3, batch_size=4, eval_every=-1,
        precision="32", workers=0, threads=1,
    )  # fmt: skip
    assert sum(waits.values()) == 1, "\n".join(waits)
    assert "tolist" in next(iter(waits)) and "trainee.py" in next(iter(waits))


def test_a_number_is_read_again_where_something_else_changed_it():
    buffer = torch.zeros(())
    on_device.write_number(buffer, 0.7)
    assert on_device.read_number(buffer) == buffer.item() != 0.7  # as float32 has it
    buffer.add_(1)
    assert on_device.read_number(buffer) == buffer.item()
    copied = buffer.clone()
    assert on_device.read_number(copied) == buffer.item()
    copied.copy_(torch.tensor(3.0))
    assert on_device.read_number(copied) == 3 and on_device.read_number(buffer) == buffer.item()
