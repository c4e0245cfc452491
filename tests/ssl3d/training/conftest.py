"""Shared by the tests of training: a distribution of small proxies, a small store, small options."""

import os
import sys

import pytest

TINY = '''
import os
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from ssl3d.api import Proxy, StepOutput


@dataclass
class TinyConfig:
    """Options of the tiny proxy.

    Attributes:
        size: Crop edge.
        nan_at: Step whose loss is not a number.
        signal_at: Step after which a signal is sent to the process, unless $TINY_IS_CALM is set.
        signum: Which.
        pause: Seconds to wait after each step.
        dropout: Of the features.
        noise: On the voxels.
    """

    size: int = 12
    nan_at: int = -1
    signal_at: int = -1
    signum: int = 15
    pause: float = 0.0
    dropout: float = 0.0
    noise: float = 0.1

    def __post_init__(self):
        if self.size < 2:
            raise ValueError(f"size is {self.size}, must be at least 2")


class Tiny(Proxy):
    """The network must work out the mean and the spread of a crop."""

    Config = TinyConfig
    paper = "Nobody: Nothing, 2020"
    main = "error"
    recipe = {"lr": 0.003, "batch_size": 4, "optimizer": "sgd"}

    def __init__(self, config, encoder):
        super().__init__(config, encoder)
        self.head = nn.Linear(encoder.embed_dim, 2)
        self.unused = nn.Linear(3, 2)
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    @classmethod
    def draw(cls, config, volume, rng):
        size = (config.size,) * 3
        high = [max(n - config.size, 0) + 1 for n in volume.shape[1:]]
        return {"image": volume.read([int(rng.integers(h)) for h in high], size)}

    def forward(self, batch, rng):
        x = batch["image"]
        target = torch.stack([x.mean(dim=(1, 2, 3, 4)), x.std(dim=(1, 2, 3, 4))], dim=1)
        x = x + self.config.noise * rng.normal(*x.shape[1:])
        z = functional.dropout(self.encoder.embed(x), self.config.dropout, self.training)
        loss = functional.mse_loss(self.head(z), target)
        if self.training and int(self.done) == self.config.nan_at:
            loss = loss * float("nan")
        return StepOutput(loss, {"error": loss.detach().sqrt()}, self._picture)

    def _picture(self):
        from matplotlib.figure import Figure

        return Figure(figsize=(1, 1))

    def after_step(self, step, total):
        self.done += 1
        self.average.lerp_(self.head.bias.detach(), 0.1)
        time.sleep(self.config.pause)
        if step == self.config.signal_at and "TINY_IS_CALM" not in os.environ:
            os.kill(os.getpid(), self.config.signum)


class Other(Tiny):
    """Another one."""

    recipe = {"lr": 0.5, "weight_decay": 0.01}
'''

SMALL = {
    "encoder": "resnet10",
    "resnet10": {"width": 4, "norm": "group", "norm_groups": 2},
    "precision": "32",
    "workers": 0,
    "threads": 1,
}
FLAGS = [
    "--encoder",
    "resnet10",
    "--resnet10.width",
    "4",
    "--resnet10.norm",
    "group",
    "--resnet10.norm-groups",
    "2",
    "--precision",
    "32",
    "--threads",
    "1",
]


@pytest.fixture(scope="session")
def tiny_plugins(tmp_path_factory):
    """Installs the proxies `tiny` and `other` and a broken one, for this process and for children."""
    from ssl3d import plugins

    folder = tmp_path_factory.mktemp("site")
    (folder / "tiny_ssl3d_plugins.py").write_text(TINY, encoding="utf-8")
    info = folder / "tiny_ssl3d_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-ssl3d-plugins\nVersion: 1.0\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(
        "[ssl3d.proxies]\ntiny = tiny_ssl3d_plugins:Tiny\nother = tiny_ssl3d_plugins:Other\n"
        "broken = tiny_ssl3d_plugins:Missing\n",
        encoding="utf-8",
    )
    before = os.environ.get("PYTHONPATH", "")
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), before]) if before else str(folder)
    plugins._installed.cache_clear()
    yield folder
    sys.path.remove(str(folder))
    os.environ["PYTHONPATH"] = before
    plugins._installed.cache_clear()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A store of 12 small phantoms."""
    from ssl3d.data.phantoms import phantom_store

    return str(phantom_store(12, shape=(24, 32, 32), folder=tmp_path_factory.mktemp("phantoms")))


@pytest.fixture
def train(tiny_plugins, phantoms, tmp_path):
    """Trains the tiny proxy from Python: train(folder name, proxy, **options)."""
    import ssl3d

    def run(name="run", proxy="tiny", **options):
        options = {"data": phantoms, **SMALL, "steps": 4, **options}
        return ssl3d.pretrain(proxy, out=tmp_path / name, **options)

    return run


@pytest.fixture
def small():
    """Options of a small run, for Python."""
    return dict(SMALL)


@pytest.fixture
def flags():
    """Options of a small run, for the command line."""
    return list(FLAGS)
