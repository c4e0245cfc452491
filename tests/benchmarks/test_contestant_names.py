"""A contestant can be given a name; options of encoders, which hold `=` too, are none."""

import pytest

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
