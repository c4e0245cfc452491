"""A contestant can be given a name; options of encoders, which hold `=` too, are none."""

import pytest
import torch

from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.specs import encoder_from
from ssl3d_benchmarks.contestants import given, named


@pytest.mark.parametrize(
    "text, expected",
    [
        ("simclr=runs/a-0", ("simclr", "runs/a-0")),
        ("best_of-3.1=scratch:resnet10:width=4", ("best_of-3.1", "scratch:resnet10:width=4")),
        ("runs/a:stem_stride=1", ("", "runs/a:stem_stride=1")),
        ("scratch:resnet18:width=3", ("", "scratch:resnet18:width=3")),
        ("imagenet:resnet18:acs:weights=/d/x=y.pth", ("", "imagenet:resnet18:acs:weights=/d/x=y.pth")),
        ("runs/a", ("", "runs/a")),
        ("a=", ("", "a=")),
    ],
)
def test_a_name_is_told_from_an_option(text, expected):
    assert named(text) == expected


def test_an_untrained_encoder_is_called_by_its_architecture_whatever_its_name():
    ((spec, encoder, entry),) = given(["mine=scratch:resnet10:width=4"])
    assert spec == "scratch:resnet10:width=4"
    assert (entry.kind, entry.name) == ("untrained", "scratch:resnet10:width=4")
    assert encoder.config.width == 4


def test_an_encoder_is_loaded_once_for_all_that_a_command_does_with_it(tmp_path, monkeypatch):
    from ssl3d_benchmarks import contestants

    saved = str(save_encoder(encoder_from("scratch:resnet10:width=4"), tmp_path / "encoder"))
    loads = []

    def load(spec, seed):
        loads.append(spec)
        return encoder_from(spec, seed)

    monkeypatch.setattr(contestants, "encoder_from", load)
    loaded = contestants.Loaded()
    (encoder,) = loaded.trained([f"mine={saved}", "scratch:resnet10:width=4"])
    ((_, again, entry),) = contestants.given([f"mine={saved}"], loaded=loaded)
    assert again is encoder and loads == [saved]
    first, second = entry.make(), entry.make()
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert next(second.parameters()).any() and next(encoder.parameters()).any() and loads == [saved]
