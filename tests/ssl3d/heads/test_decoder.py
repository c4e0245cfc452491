"""The decoder: every encoder's maps back to every voxel."""

import copy
import itertools
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ssl3d.api import Decoder
from ssl3d.encoders.resnet import ResNet10
from ssl3d.heads.decoder import conv3x3x3, stride_path

THIN = {"stem_stride": (1, 2, 2), "stage_strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))}
FINE = {"stem_stride": (1, 1, 1), "stem_kernel": 3}


def encoder(**options):
    torch.manual_seed(0)
    return ResNet10(ResNet10.Config(width=4, **options))


def bare(channels, strides):
    """What a decoder needs to know of an encoder."""
    return types.SimpleNamespace(
        channels=channels, strides=strides, config=types.SimpleNamespace(in_channels=2)
    )


@pytest.mark.parametrize("size", [(16, 16, 16), (17, 23, 30), (1, 24, 17), (5, 32, 32)])
@pytest.mark.parametrize(
    "options", [{}, THIN, FINE, {"stem_pool": True}], ids=["plain", "thin", "fine", "pool"]
)
def test_every_voxel_gets_its_values_and_every_weight_a_gradient(options, size):
    made = encoder(in_channels=2, **options)
    decoder = Decoder(made, width=8)
    x = torch.randn(2, 2, *size)
    y = decoder(made(x), size)
    assert y.shape == x.shape
    y.square().mean().backward()
    for name, weight in decoder.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert weight.grad.abs().sum() > 0, name


def test_channels_asked_for():
    made = encoder()
    assert Decoder(made, out_channels=5)(made(torch.randn(2, 1, 16, 16, 16)), (16,) * 3).shape[1] == 5
    with pytest.raises(ValueError, match="width must be at least 2, not 1"):
        Decoder(made, width=1)


@pytest.mark.parametrize("skips", [True, False])
def test_without_skips_the_deepest_map_alone_counts(skips):
    made = encoder()
    decoder = Decoder(made, skips=skips).eval()
    maps = [m.detach().requires_grad_() for m in made(torch.randn(2, 1, 16, 16, 16))]
    decoder(maps, (16, 16, 16)).square().mean().backward()
    seen = tuple(n for n, m in enumerate(maps) if m.grad is not None and m.grad.any())
    # The stem's map has the stride of the first stage's, which lies deeper.
    assert seen == decoder.sources == ((1, 2, 3, 4) if skips else (4,))


def test_a_single_deep_map_is_reached_in_halvings():
    decoder = Decoder(bare((12,), ((2, 16, 16),)))
    y = decoder([torch.randn(2, 12, 4, 2, 3)], (8, 32, 48))
    assert y.shape == (2, 2, 8, 32, 48)
    assert len(decoder.mix) == 4


def test_an_encoder_that_keeps_the_resolution_is_decoded_in_one_step():
    decoder = Decoder(bare((6,), ((1, 1, 1),)))
    assert decoder([torch.randn(2, 6, 4, 5, 6)], (4, 5, 6)).shape == (2, 2, 4, 5, 6)


strides = st.lists(st.tuples(*[st.sampled_from((1, 2, 3, 4, 8, 16))] * 3), max_size=4)


@given(start=st.tuples(*[st.integers(1, 32)] * 3), stops=strides)
@settings(max_examples=60, deadline=None)
def test_the_way_up_halves_at_most_and_ends_at_every_voxel(start, stops):
    path = [start, *stride_path(start, [*sorted(stops, reverse=True), (1, 1, 1)])]
    assert path[-1] == (1, 1, 1)
    for a, b in itertools.pairwise(path):
        assert all(y <= x <= 2 * y for x, y in zip(a, b))
        assert a != b or start == (1, 1, 1)


def test_images_run_in_2d_with_the_same_outcome():
    x, weight = torch.randn(2, 3, 1, 9, 7), torch.randn(4, 3, 3, 3, 3)
    assert torch.allclose(conv3x3x3(x, weight), functional.conv3d(x, weight, padding=1), atol=1e-5)


def test_a_cue_stays_where_it_is():
    # Untrained and linear but for norms and activations: what one voxel of the deepest map changes lies
    # around that voxel's place in the input, not half a stride beside it.
    made = encoder(stem_stride=(1, 1, 1), stage_strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)))
    decoder = Decoder(made, skips=False)
    for norm in range(len(decoder.norms)):
        decoder.norms[norm] = torch.nn.Identity()
    for conv in decoder.mix:  # only the middle tap
        middle = conv.weight.data[:, :, 1:2, 1:2, 1:2].clone()
        conv.weight.data.zero_()[:, :, 1:2, 1:2, 1:2] = middle
    maps = [torch.randn(1, n, 4, 4, 4) for n in made.channels]
    changed = [*maps[:-1], maps[-1].clone()]
    changed[-1][:, :, 2, 1, 2] += 1
    with torch.no_grad():
        difference = (decoder(changed, (32, 32, 32)) - decoder(maps, (32, 32, 32))).abs().sum((0, 1))
    for axis, at in enumerate((2, 1, 2)):
        # A tent over (at - 1) * 8 ... (at + 1) * 8, and nothing beyond.
        found = torch.nonzero(difference.sum([a for a in range(3) if a != axis]) > 1e-7).flatten()
        assert found[0] == (at - 1) * 8 + 1 and found[-1] == (at + 1) * 8 - 1


def test_bfloat16_gradients_are_those_of_float32():
    # Small padded maps are where oneDNN's weight gradients go wrong (see convolutions.conv3d).
    made = encoder()
    decoder = Decoder(made, width=8)
    with torch.no_grad():
        maps = made(torch.randn(2, 1, 32, 32, 32))
    found = []
    for autocast in (False, True):
        trial = copy.deepcopy(decoder)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = trial(maps, (32, 32, 32))
        y.float().square().mean().backward()
        found.append(torch.cat([conv.weight.grad.flatten() for conv in trial.mix]))
    assert functional.cosine_similarity(*found, dim=0) > 0.98
    assert found[1].norm() / found[0].norm() == pytest.approx(1, abs=0.1)


def test_the_encoder_is_not_part_of_it():
    made = encoder()
    decoder = Decoder(made)
    assert made not in list(decoder.modules())
    other = Decoder(made)
    other.load_state_dict(decoder.state_dict())
    maps = made(torch.randn(2, 1, 16, 16, 16))
    assert torch.equal(other(maps, (16,) * 3), decoder(maps, (16,) * 3))
