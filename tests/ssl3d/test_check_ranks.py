"""`check_ranks` passes proxies that reduce rightly over ranks, and catches those that do not."""

import importlib
import subprocess
import sys

import pytest

from ssl3d.encoders.resnet import ResNet10
from ssl3d.testing import check_ranks

PLUGIN = '''
import copy
from dataclasses import dataclass

import torch
from torch import nn

from ssl3d.api import Proxy, StepOutput, gather, rank, row_counts


@dataclass
class Options:
    """None."""


class Mean(Proxy):
    """The mean of a crop, a mean over examples."""

    Config, paper, main = Options, "Nobody, 2020", "error"

    def __init__(self, config, encoder):
        super().__init__(config, encoder)
        self.head = nn.Linear(encoder.embed_dim, 1)
        self.register_buffer("bank", torch.zeros(0))

    def setup(self, data):
        self.bank = torch.zeros(len(data))

    @classmethod
    def draw(cls, config, volume, rng):
        start = [int(rng.integers(n - 11)) for n in volume.shape[1:]]
        depth = (12, 6)[volume.index % 2] if cls.mixed else 12
        return {"image": volume.read(start, (depth, 12, 12))}

    def start_epoch(self, epoch, loader):
        for groups in loader:
            for group in groups:
                self.bank[group["index"]] = group["image"].flatten(1).mean(1)

    def errors(self, batch, rng):
        x = batch["image"] + 0.1 * rng.normal(*batch["image"].shape[1:])
        return (self.head(self.encoder.embed(x)).squeeze(1) - self.bank[batch["index"]]) ** 2

    def forward(self, batch, rng):
        loss = self.reduce(self.errors(batch, rng))
        return StepOutput(loss, {"error": loss.detach()})

    def reduce(self, errors):
        return errors.mean()


class Sum(Mean):
    """Wrong: a sum over a rank's own examples."""

    def reduce(self, errors):
        return errors.sum()


class OwnNoise(Mean):
    """Wrong: noise that is each rank's own."""

    def errors(self, batch, rng):
        noise = torch.randn(len(batch["image"]), generator=torch.Generator().manual_seed(rank()))
        return super().errors(batch, rng) * (1 + 0.1 * noise)


class OwnBank(Mean):
    """Wrong: a bank that is not the same on every rank."""

    def start_epoch(self, epoch, loader):
        super().start_epoch(epoch, loader)
        self.bank += rank()


class Contrast(Mean):
    """Every example against all others, of all groups and ranks."""

    mixed = True

    def forward(self, groups, rngs):
        z = torch.cat([self.encoder.embed(group["image"]) for group in groups])
        everyone = gather(z, row_counts(len(z), z.device))
        loss = torch.cdist(everyone[None], everyone[None]).square().mean() + self.head.weight.sum()
        return StepOutput(loss, {"error": loss.detach()})


class Queue(Contrast):
    """Keys of all ranks go into a queue, by a teacher that is not trained."""

    def __init__(self, config, encoder):
        super().__init__(config, encoder)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(12, encoder.embed_dim))
        self.keys = []

    def forward(self, groups, rngs):
        with torch.no_grad():
            z = torch.cat([self.teacher.embed(group["image"]) for group in groups])
        self.keys.append(self.everyone(z))
        return super().forward(groups, rngs)

    def everyone(self, z):
        return gather(z)

    @torch.no_grad()
    def after_step(self, step, total):
        for teacher, student in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            teacher.lerp_(student, 0.5)
        self.queue.copy_(torch.cat([*self.keys, self.queue])[: len(self.queue)])
        self.keys.clear()


class OwnQueue(Queue):
    """Wrong: each rank's queue holds its own keys."""

    def everyone(self, z):
        return z


class OwnTeacher(Queue):
    """Wrong: a teacher that each rank moves by its own batch."""

    @torch.no_grad()
    def after_step(self, step, total):
        super().after_step(step, total)
        self.teacher.conv1.weight.mul_(1 + 0.1 * rank())


class OwnContrast(Contrast):
    """Wrong: every example against those of its own rank."""

    def forward(self, groups, rngs):
        z = torch.cat([self.encoder.embed(group["image"]) for group in groups])
        loss = torch.cdist(z[None], z[None]).square().mean() + self.head.weight.sum()
        return StepOutput(loss, {"error": loss.detach()})


class Uneven(Contrast):
    """Wrong: one collective for every group, which a rank may lack."""

    def forward(self, groups, rngs):
        for group in groups:
            row_counts(len(group["image"]), group["image"].device)
        return super().forward(groups, rngs)


class Failing(Mean):
    """Wrong: one rank raises, while the other waits."""

    def forward(self, batch, rng):
        if torch.distributed.is_initialized() and rank() == 1:
            raise RuntimeError("rank 1 cannot")
        row_counts(1, torch.device("cpu"))
        return super().forward(batch, rng)
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "ranks_plugin.py").write_text(PLUGIN, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("ranks_plugin")
    sys.path.remove(str(folder))


def encoder():
    return ResNet10(ResNet10.Config(width=4, norm="group", norm_groups=2))


def check(cls, **options):
    check_ranks(cls, encoder=encoder, **options)


@pytest.mark.parametrize("name", ["Mean", "Contrast", "Queue"])
def test_it_passes_what_reduces_rightly(name, plugin):
    check(getattr(plugin, name))


@pytest.mark.parametrize(
    "name,message",
    [
        ("Sum", "the loss of two ranks is"),
        ("OwnNoise", "the (loss|gradient) of"),
        ("OwnBank", "after start_epoch, buffer bank differs between the ranks"),
        ("OwnQueue", "after after_step, queue differs between the ranks .*gather"),
        ("OwnTeacher", "after after_step, teacher.conv1.weight differs between the ranks"),
        ("OwnContrast", "the loss of two ranks is"),
        ("Failing", "rank 1 of 2 fails: .*rank 1 cannot"),
    ],
)
def test_it_catches_what_does_not(name, message, plugin):
    with pytest.raises(AssertionError, match=f"(?s)^{name}: {message}"):
        check(getattr(plugin, name))


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_are_given_up(plugin):
    with pytest.raises(AssertionError, match=r"(have not come to an end|fails)"):
        check(plugin.Uneven, timeout=20.0)


def test_batch_norm_is_refused(plugin):
    with pytest.raises(ValueError, match="batch norm, whose statistics are each rank's own"):
        check_ranks(plugin.Mean, encoder=lambda: ResNet10(ResNet10.Config(width=4)))


def test_a_class_that_cannot_be_imported_is_named(plugin):
    class Local(plugin.Mean):
        """Known to this process only."""

    with pytest.raises(AssertionError, match="Local: cannot be handed to another process"):
        check(Local)


@pytest.mark.long
def test_a_script_that_calls_it_is_not_run_again_in_the_ranks(tmp_path):
    (tmp_path / "ranks_plugin.py").write_text(PLUGIN, encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(
        "print('begun', flush=True)\n"
        "import ranks_plugin\n"
        "from ssl3d.encoders.resnet import ResNet10\n"
        "from ssl3d.testing import check_ranks\n"
        "check_ranks(ranks_plugin.Mean, None, "
        "lambda: ResNet10(ResNet10.Config(width=4, norm='group', norm_groups=2)))\n"
        "print('ended')\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["begun", "ended"], done.stderr[-2000:]
