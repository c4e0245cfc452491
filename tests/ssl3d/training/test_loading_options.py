"""A trained encoder with other strides; tensors that have two names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl3d.checkpoint.card import signed
from ssl3d.checkpoint.encoders import load_encoder, save_encoder
from ssl3d.encoders.resenc import ResEnc, ResEncConfig
from ssl3d.encoders.resnet import ResNet10, ResNet50, ResNetConfig
from ssl3d.errors import UsageError
from ssl3d.specs import encoder_from, is_foreign


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    encoder = ResNet10(ResNetConfig(width=4, stem_pool=True)).eval()
    save_encoder(
        encoder, tmp_path / "run" / "encoder", {"steps": 3, "identities": ["a"], "labels_seen": True}
    )
    return encoder, tmp_path / "run"


def test_the_strides_of_a_trained_encoder_can_be_changed(saved):
    encoder, run = saved
    found = encoder_from(
        f"{run}:stem_stride=1:stem_pool=false:stage_strides=[1,1,1],[2,2,2],[1,1,1],[2,2,2]"
    )
    named = encoder_from(f"{run}:high_resolution=true")
    assert found.strides == named.strides == ((1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2), (4, 4, 4))
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, found.state_dict()[key])
    x = torch.randn(1, 1, 9, 17, 17)
    for one, other in zip(found(x), named(x), strict=True):
        assert torch.equal(one, other)
    assert encoder.strides == encoder_from(run).strides


def test_what_it_learned_from_stays_in_its_card(saved):
    found = encoder_from(f"{saved[1]}:stem_stride=1,2,2")
    assert found.metadata["steps"] == 3 and found.metadata["identities"] == ["a"]
    assert found.metadata["labels_seen"] is True
    assert found.metadata["config"]["stem_stride"] == [1, 2, 2]
    assert found.metadata["strides"][0] == [1, 2, 2]
    assert found.metadata["changed"] == ["stem_stride"]


def test_acs_weights_are_weights_of_slices_too(saved):
    found = encoder_from(f"{saved[1]}:kind=2.5d:dilated=true")
    assert found.config.kind == "2.5d" and found.config.dilated


@pytest.mark.parametrize(
    "words,message",
    [
        ("width=8", r"with width=8: needs other weights than it has \(.*shape.*only options"),
        ("kind=3d", r"kind=3d: needs other weights"),
        ("shortcut=A", r"shortcut=A: needs other weights .*unknown"),
        ("stem_strides=1", r"unknown option stem_strides; known: .*stem_stride"),
        ("stem_stride=0", r"stem_stride needs strides of at least 1"),
    ],
)
def test_what_would_need_other_weights_is_refused_in_one_line(saved, words, message):
    with pytest.raises(UsageError, match=message) as error:
        encoder_from(f"{saved[1]}:{words}")
    assert "\n" not in str(error.value)


def test_a_folder_whose_name_looks_like_options_is_a_folder(saved, tmp_path):
    odd = tmp_path / "run:lr=1"
    saved[1].rename(odd)
    assert encoder_from(odd).config == saved[0].config
    assert encoder_from(f"{odd}:stem_stride=1").config.stem_stride == (1, 1, 1)


def test_one_number_stands_for_three_in_untrained_encoders_too():
    assert encoder_from("scratch:resnet10:width=4:stem_stride=1").config.stem_stride == (1, 1, 1)


def test_strides_of_an_encoder_with_bottlenecks_change_no_weight(tmp_path):
    encoder = ResNet50(ResNetConfig(width=4, kind="3d"))
    save_encoder(encoder, tmp_path / "e")
    found = load_encoder(tmp_path / "e", {"dilated": True, "pool_stride": (1, 1, 1)})
    assert found.strides[-1] == (4, 4, 4)


def test_a_tensor_with_two_names_is_written_once(tmp_path):
    torch.manual_seed(0)
    encoder = ResEnc(ResEncConfig(width=4, stages=3)).eval()
    save_encoder(encoder, tmp_path / "e")
    state = load_file(tmp_path / "e" / "encoder.safetensors")
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in encoder.parameters())
    assert not any("all_modules" in key for key in state)
    loaded = load_encoder(tmp_path / "e")
    x = torch.randn(1, 1, 8, 16, 16)
    for one, other in zip(encoder(x), loaded(x), strict=True):
        assert torch.equal(one, other)


def test_files_that_hold_both_names_are_read_too(tmp_path):
    encoder = ResEnc(ResEncConfig(width=4, stages=3)).eval()
    save_encoder(encoder, tmp_path / "e")
    card = json.loads((tmp_path / "e" / "encoder.json").read_text(encoding="utf-8"))
    del card["sha256"]
    (tmp_path / "e" / "encoder.json").write_text(signed(card), encoding="utf-8")
    both = {key: value.clone() for key, value in encoder.state_dict().items()}
    save_file(both, tmp_path / "e" / "encoder.safetensors")
    loaded = load_encoder(tmp_path / "e").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in both.items())


@pytest.mark.parametrize(
    "spec,foreign",
    [
        ("resnet_18.pth", True),
        ("a/Genesis_Chest_CT.pt:in_channels=2", True),
        ("model.safetensors:acs", True),
        ("model.pt:acs:network=timm/resnetaa50", True),
        ("foreign:anything", True),
        ("run/encoder/encoder.safetensors", False),
        ("imagenet:resnet18:acs:weights=a.pth", False),
        ("scratch:resnet18", False),
        ("runs/first", False),
        ("runs/first:stem_stride=1", False),
    ],
)
def test_foreign_files_are_told_from_runs_by_their_names(spec, foreign):
    assert is_foreign(spec) is foreign
