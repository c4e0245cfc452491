"""A proxy says how many channels it feeds the encoder: what is built, and what check_proxy checks."""

from dataclasses import dataclass

import pytest
import torch

import ssl3d
from ssl3d.api import DataError, Proxy, StepOutput, UsageError, open_data
from ssl3d.data.phantoms import phantom_store
from ssl3d.testing import check_proxy


@dataclass
class FoldConfig:
    """Options.

    Attributes:
        says: Channels that it says it feeds the encoder.
    """

    says: int = 2


class Fold(Proxy):
    """The network must work out how bright a crop is; its crops are shown twice, as two channels."""

    Config = FoldConfig
    paper = "None."
    main = "error"

    def __init__(self, config, encoder):
        super().__init__(config, encoder)
        self.head = torch.nn.Linear(encoder.embed_dim, 1)

    @classmethod
    def in_channels(cls, config, data_channels):
        return config.says

    def present(self, volumes):
        return volumes.repeat(1, 2, 1, 1, 1)

    @classmethod
    def draw(cls, config, volume, rng):
        start = [int(rng.integers(0, n - 16 + 1)) for n in volume.shape[1:]]
        return {"crop": volume.read(start, (16, 16, 16))}

    def forward(self, batch, rng):
        error = self.head(self.encoder.embed(self.present(batch["crop"]))) - batch["crop"].mean((2, 3, 4))
        loss = error.square().mean()
        return StepOutput(loss, {"error": loss.detach()})


class Plain(Fold):
    """The network must work out how bright a crop is."""

    in_channels = Proxy.in_channels
    present = Proxy.present


class Picky(Fold):
    """The network must work out how bright a crop in colour is."""

    @classmethod
    def in_channels(cls, config, data_channels):
        raise UsageError(f"picky: {data_channels} channel, not 3")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return open_data([phantom_store(10, shape=(20, 20, 20), folder=tmp_path_factory.mktemp("phantoms"))])


def encoder(channels):
    from ssl3d.encoders.resnet import ResNet10

    return ResNet10(ResNet10.Config(width=4, in_channels=channels, stem_kernel=3, stem_stride=(1, 1, 1)))


def run_of(proxies, data, out, **options):
    return ssl3d.pretrain(
        proxies, data, out, encoder="resnet10", steps=2, batch_size=2, workers=0, threads=1, eval_every=1,
        **{"resnet10": {"width": 4, "stem_kernel": 3}, **options},
    )  # fmt: skip


def registered(monkeypatch, *classes):
    """As if the classes were registered under their names in lower case."""
    from ssl3d import plugins

    names = {cls.__name__.lower(): cls for cls in classes}
    words = {cls: name for name, cls in names.items()}
    load, name_of = plugins.load, plugins.name_of
    monkeypatch.setattr(plugins, "load", lambda group, name: names.get(name) or load(group, name))
    monkeypatch.setattr(plugins, "name_of", lambda group, cls: words.get(cls) or name_of(group, cls))


def test_the_encoder_is_built_for_what_it_is_fed(phantoms, tmp_path, monkeypatch):
    registered(monkeypatch, Fold)
    run = run_of(Fold, phantoms, tmp_path / "run")
    assert run.encoder.config.in_channels == 2
    # What is looked at while training is presented to the encoder in the same way.
    assert "online/embedding_std" in run.metrics[-1]


def test_proxies_that_feed_it_differently_are_refused(phantoms, tmp_path, monkeypatch):
    registered(monkeypatch, Fold, Plain)
    with pytest.raises(UsageError, match="fold feeds it 2, plain feeds it 1; train them one by one"):
        run_of([Fold, Plain], phantoms, tmp_path / "run")


def test_channels_given_by_hand_must_agree(phantoms, tmp_path, monkeypatch):
    registered(monkeypatch, Fold)
    with pytest.raises(UsageError, match="in-channels is 3, fold feeds it 2 channels"):
        run_of(Fold, phantoms, tmp_path / "run", resnet10={"width": 4, "in_channels": 3})


def test_a_proxy_may_refuse_the_data(phantoms, tmp_path, monkeypatch):
    registered(monkeypatch, Picky)
    with pytest.raises(UsageError, match="picky: 1 channel, not 3"):
        run_of(Picky, phantoms, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_check_proxy_passes_a_proxy_that_keeps_its_word(phantoms):
    check_proxy(Fold, FoldConfig(), lambda: encoder(2), phantoms)


class Liar(Fold):
    """The network must work out how bright a crop is; it is fed two channels, whatever is said."""


class Unpresented(Fold):
    """The network must work out how bright a crop is; what it is to be shown otherwise is not said."""

    def forward(self, batch, rng):
        twice = batch["crop"].repeat(1, 2, 1, 1, 1)
        loss = (self.head(self.encoder.embed(twice)) - batch["crop"].mean((2, 3, 4))).square().mean()
        return StepOutput(loss, {"error": loss.detach()})

    def present(self, volumes):
        return volumes


class Instance(Fold):
    """The network must work out how bright a crop is; channels are asked of an instance."""

    def in_channels(self, config, data_channels):
        return 2


@pytest.mark.parametrize(
    ("cls", "says", "message"),
    [
        (Liar, 1, "in_channels says 1, but forward feeds the encoder .2."),
        (Liar, 0, "in_channels gives 0, not a number of channels"),
        (Unpresented, 2, "present makes a tensor of shape .2, 1, .* expected .2, 2, D, H, W."),
        (Instance, 2, "in_channels is not a classmethod"),
    ],
)
def test_check_proxy_says_what_is_wrong(cls, says, message, phantoms):
    with pytest.raises(AssertionError, match=message):
        check_proxy(cls, FoldConfig(says), lambda: encoder(2), phantoms)


def test_refusing_is_an_error_of_the_user():
    assert issubclass(UsageError, ssl3d.errors.Ssl3dError) and not issubclass(UsageError, DataError)
