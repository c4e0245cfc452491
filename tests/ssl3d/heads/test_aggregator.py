"""The slice aggregator: attention along the slices, places between them, and an order that matters."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssl3d.encoders.resnet import ResNet10
from ssl3d.errors import CheckpointError, DataError
from ssl3d.heads.aggregator import (
    AggregatedEncoder,
    AggregatorConfig,
    PositionBias,
    SliceAggregator,
    SliceAttention,
    attended_offset,
    interleaved,
    interpolation,
    regular_places,
    shown_slices,
    stage_features,
    stage_width,
)

POOLINGS = ["deformable", "attention", "mean"]


def make(pooling="deformable", seed=0, **options):
    torch.manual_seed(seed)
    given_ = {"features": 12, "width": 16, "layers": 2, "heads": 2, "hidden": 24, **options}
    return SliceAggregator(AggregatorConfig(pooling=pooling, **given_)).eval()


def slices(batch=2, count=7, seed=0):
    return torch.randn(batch, count, 12, generator=torch.Generator().manual_seed(seed))


def bent(aggregator, size=1.0, seed=0):
    """The aggregator with offsets of some size, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in aggregator.layers:
        out = layer.attention.offset_out
        out.data = torch.randn(out.shape, generator=generator) * size
    return aggregator


# Against references -------------------------------------------------------------------------------


def test_without_offsets_and_downsampling_it_is_multi_head_attention():
    torch.manual_seed(0)
    config = AggregatorConfig(12, width=16, heads=2, downsample=1)
    attention = SliceAttention(config)
    attention.offset_out.data.zero_()
    tokens = torch.randn(3, 5, 16)
    found, attended = attention(tokens, torch.full((3,), 5))
    assert not attended.offsets.any()

    def split(linear):
        return linear(tokens).view(3, 5, 2, 8).transpose(1, 2)

    q, k, v = map(split, (attention.to_query, attention.to_key, attention.to_value))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 5, 16)
    assert torch.allclose(found, attention.to_out(expected), atol=1e-6)


def released_bias(layers, queries, keys):
    """The continuous position bias of the released deformable attention, typed anew: (B, S, N)."""
    away = queries[None, :, None, None] - keys[:, None, :, None]
    x = torch.sign(away) * torch.log(away.abs() + 1)
    first, second, last = layers[0], layers[2], layers[4]
    for layer in (first, second):
        x = (x @ layer.weight.T + layer.bias).relu()
    return (x @ last.weight.T)[..., 0]


def test_the_bias_is_the_continuous_one_of_the_released_attention():
    torch.manual_seed(0)
    bias = PositionBias(6)
    places = torch.rand(2, 3, 4) * 5  # of keys among six slices; the second volume has four
    places[1] *= 3 / 5
    found = bias(places, torch.tensor([6, 4]), 6)
    for row, last in ((0, 5), (1, 3)):
        for head in range(3):
            queries, keys = (2 * at / last - 1 for at in (torch.arange(6.0), places[row, head]))
            expected = released_bias(bias.layers, queries, keys[None])[0]
            assert torch.allclose(found[row, head], expected, atol=1e-6)
    assert bias(torch.zeros(1, 1, 1), torch.tensor([1]), 1).shape == (1, 1, 1, 1)  # an image


def test_attention_with_a_bias_is_multi_head_attention_with_that_mask():
    torch.manual_seed(0)
    attention = SliceAttention(AggregatorConfig(12, width=16, heads=2, downsample=1, position_bias=True))
    attention.offset_out.data.zero_()
    tokens = torch.randn(3, 5, 16)
    found, attended = attention(tokens, torch.full((3,), 5))

    def split(linear):
        return linear(tokens).view(3, 5, 2, 8).transpose(1, 2)

    q, k, v = map(split, (attention.to_query, attention.to_key, attention.to_value))
    bias = attention.bias(attended.places, torch.full((3,), 5), 5)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(3, 5, 16)
    assert torch.allclose(found, attention.to_out(expected), atol=1e-6)
    assert bias.std() > 1e-3


def test_features_of_the_stages_stand_side_by_side():
    network = encoder()
    x = torch.randn(3, 1, 1, 32, 32)
    with torch.no_grad():
        maps = network(x)
        found = stage_features(network, maps)
    parts = found.split([8, 16, 32, 64, 64], dim=1)  # four stages, not the stem, and the last pool
    assert stage_width(network) == found.shape[1] == 184
    for part, each in zip(parts, (*maps[1:], maps[4]), strict=True):
        average = each.mean((2, 3, 4))
        assert torch.allclose(part, average / average.norm(dim=1, keepdim=True), atol=1e-6)


def test_plain_attention_has_a_key_on_every_slice():
    torch.manual_seed(0)
    attention = SliceAttention(AggregatorConfig(12, width=16, heads=2, pooling="attention", downsample=4))
    _, attended = attention(torch.randn(1, 6, 16), torch.tensor([6]))
    assert torch.equal(attended.places[0, 0], torch.arange(6.0))


def test_keys_are_interpolated_between_slices():
    places = torch.tensor([[[0.0, 0.25, 2.5, 3.0]]])
    weights = interpolation(places, torch.tensor([4]), 4)[0, 0]
    expected = [[1, 0, 0, 0], [0.75, 0.25, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1]]
    assert torch.allclose(weights, torch.tensor(expected))
    assert torch.allclose(
        weights @ torch.tensor([10.0, 20.0, 40.0, 80.0]), torch.tensor([10, 12.5, 60, 80])
    )


def test_keys_lie_in_the_middle_of_their_shares():
    places, present = regular_places(torch.tensor([8, 6, 5, 1]), 8, 4)
    assert torch.equal(places[0], torch.tensor([1.5, 5.5]))
    assert torch.equal(places[1], torch.tensor([1.0, 4.0]))
    assert torch.equal(places[2], torch.tensor([0.75, 3.25]))
    assert places[3, 0] == 0 and present.tolist() == [[True, True]] * 3 + [[True, False]]


def test_an_offset_reads_where_it_points_to():
    torch.manual_seed(0)
    attention = SliceAttention(AggregatorConfig(12, width=2, heads=1, downsample=1, offset_scale=1.5))
    tokens = torch.randn(1, 6, 2)
    attention.offset_taps.data.zero_()
    attention.offset_bias.data.fill_(100.0)  # a large activation: tanh gives 1
    attention.offset_out.data.fill_(1.0)
    _, attended = attention(tokens, torch.tensor([6]))
    assert torch.allclose(attended.offsets, torch.tensor(1.5))
    # Beyond the last slice there is nothing: places stop there.
    assert torch.allclose(attended.places[0, 0], torch.tensor([1.5, 2.5, 3.5, 4.5, 5.0, 5.0]))


def test_mean_pooling_is_the_mean_of_the_projected_slices():
    aggregator, x = make("mean"), slices()
    tokens, pooled = aggregator(x)
    assert torch.equal(tokens, aggregator.project(x))
    assert torch.allclose(pooled, F.normalize(aggregator.project(x).mean(1), dim=1), atol=1e-6)


# Order, offsets, gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["deformable", "attention"])
def test_another_order_of_slices_is_another_volume(pooling):
    aggregator, x = make(pooling), slices(batch=8)
    pooled = aggregator(x)[1]
    for order in (torch.arange(6, -1, -1), torch.tensor([1, 0, 2, 3, 4, 5, 6])):
        change = (aggregator(x[:, order])[1] - pooled).norm(dim=1)
        assert change.min() > 0.01


def test_mean_pooling_does_not_know_the_order():
    aggregator, x = make("mean"), slices()
    assert torch.allclose(aggregator(x)[1], aggregator(x.flip(1))[1], atol=1e-6)


def test_attention_runs_along_the_slices_not_the_features():
    aggregator = bent(make())
    x = slices().requires_grad_()
    tokens, _ = aggregator(x)
    # The first token looks at the last slice.
    assert torch.autograd.grad(tokens[0, 0, 0], x)[0][0, -1].abs().sum() > 0
    # Volumes do not look at each other.
    tokens, _ = aggregator(x)
    assert not torch.autograd.grad(tokens[0, :, 0].sum(), x)[0][1].any()


@pytest.mark.parametrize("bias", [False, True])
def test_every_parameter_learns_from_the_first_step_on(bias):
    aggregator = make(dropout=0.0, position_bias=bias).train()
    tokens, pooled = aggregator(slices())
    (tokens.square().sum() + (pooled * torch.randn(2, 16)).sum()).backward()
    for name, parameter in aggregator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_gradient_of_an_offset_is_the_difference_of_the_slices_around_it():
    values = torch.tensor([1.0, 3.0, 10.0])
    for place, slope in ((0.0, 2.0), (0.5, 2.0), (1.0, 7.0), (1.7, 7.0), (2.0, 7.0)):
        at = torch.tensor([[[place]]], requires_grad=True)
        (interpolation(at, torch.tensor([3]), 3) @ values).sum().backward()
        assert at.grad.item() == pytest.approx(slope)


def test_offsets_grow_when_what_is_asked_for_lies_elsewhere():
    """Each slice must tell what a place three slices on shows: keys, too few, have to move there."""
    aggregator = make(layers=1, width=32, downsample=4, dropout=0.0).train()
    read = torch.nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*aggregator.parameters(), *read.parameters()], 3e-3)
    sizes = []
    for step in range(120):
        x = slices(16, 8, seed=step)
        x[:, :, 0] = 3 * torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 + step))
        details = []
        tokens, _ = aggregator(x, details=details)
        loss = (read(tokens)[:, 0, 0] - x[:, 3, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sizes.append(attended_offset(details).item())
    assert sizes[-1] > 4 * sizes[0] and sizes[-1] > 0.1


# Any number of slices -----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99), bias=st.booleans()
)
def test_padding_changes_nothing(pooling, lengths, seed, bias):
    aggregator = make(pooling, position_bias=bias)
    if pooling == "deformable":
        bent(aggregator, seed=seed)
    longest, generator = max(lengths), torch.Generator().manual_seed(seed)
    x = 100 * torch.randn(len(lengths), longest, 12, generator=generator)
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, torch.randperm(longest, generator=generator)[:length]] = True  # anywhere
    tokens, pooled = aggregator(x, mask)
    for row in range(len(lengths)):
        alone, embedding = aggregator(x[row : row + 1, mask[row]])
        assert torch.allclose(tokens[row, mask[row]], alone[0], atol=1e-5)
        assert torch.allclose(pooled[row], embedding[0], atol=1e-5)
        assert not tokens[row, ~mask[row]].any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_slice_and_no_slice(pooling):
    aggregator = make(pooling)
    tokens, pooled = aggregator(slices(count=1))
    assert tokens.shape == (2, 1, 16) and torch.allclose(pooled.norm(dim=1), torch.ones(2))
    x = slices().requires_grad_()
    tokens, pooled = aggregator(x, torch.zeros(2, 7, dtype=torch.bool))
    assert not pooled.any()
    (tokens.sum() + pooled.sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_it_computes_in_float32_under_autocast(pooling):
    aggregator, x = make(pooling), slices()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, pooled = aggregator(x)
        assert tokens.dtype == pooled.dtype == torch.float32
    assert torch.equal(pooled, aggregator(x)[1])


def test_it_is_made_again_from_its_config_and_weights():
    aggregator = bent(make())
    other = SliceAggregator(copy.deepcopy(aggregator.config)).eval()
    other.load_state_dict(aggregator.state_dict())
    assert torch.equal(aggregator(slices())[1], other(slices())[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 15},
        {"heads": 0},
        {"offset_kernel": 4},
        {"dropout": 1.0},
        {"offset_scale": -1.0},
        {"slices": -1},
    ],
)
def test_options_out_of_range_name_the_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)


# Volumes ------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 60), size=st.integers(0, 12))
def test_interleaved_stacks_hold_every_slice_once(count, size):
    stacks = interleaved(count, size)
    assert sorted(n for stack in stacks for n in stack) == list(range(count))
    lengths = [len(stack) for stack in stacks]
    assert max(lengths) - min(lengths) <= 1
    assert not size or max(lengths) <= size


def encoder():
    torch.manual_seed(0)
    return ResNet10(ResNet10.Config(width=8, stem_kernel=3)).eval()


def test_a_volume_is_embedded_slice_by_slice():
    network = encoder()
    aggregator = make(features=network.embed_dim, slices=4, axis="H", plane=(32, 32))
    volume = torch.randn(1, 12, 8, 10)
    found = aggregator.embed_volume(network, volume)
    with torch.no_grad():
        tokens = network.embed(volume.permute(2, 0, 1, 3).unsqueeze(2))  # 8 slices across H
        stacks = [aggregator(tokens[None, first::2])[1][0] for first in range(2)]
    assert torch.allclose(found, F.normalize(sum(stacks), dim=0), atol=1e-5)
    assert found.norm().item() == pytest.approx(1, abs=1e-5)
    assert (aggregator.embed_volume(network, volume.flip(2)) - found).norm() > 1e-3


def test_a_volume_is_embedded_by_the_stages_of_its_slices():
    network = encoder().requires_grad_()
    aggregator = make(features=184, slice_features="stages", position_bias=True, plane=(32, 32))
    volume = torch.randn(1, 5, 8, 10)
    with torch.no_grad():
        seen = stage_features(network, network(volume.transpose(0, 1).unsqueeze(2)))
        expected = aggregator(seen[None])[1][0]
    assert torch.allclose(aggregator.embed_volume(network, volume), expected, atol=1e-5)
    whole = AggregatedEncoder(network, aggregator)
    assert torch.allclose(whole.pooled(volume[None])[0], expected, atol=1e-5)
    whole.pooled(volume[None]).square().sum().backward()
    assert network.layer1[0].conv1.weight.grad.abs().sum() > 0
    with pytest.raises(CheckpointError, match="takes embeddings of length 64, the encoder gives 184"):
        AggregatedEncoder(network, make(features=64, slice_features="stages"))


def test_an_image_is_a_volume_of_one_slice():
    network = encoder()
    aggregator = make(features=network.embed_dim, axis="W", plane=(16, 16), slab=3)
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        expected = aggregator(network.embed(image[None])[None])[1][0]
    assert torch.allclose(aggregator.embed_volume(network, image), expected, atol=1e-6)


def test_a_volume_thinner_than_a_slab_is_refused():
    aggregator = make(features=64, slab=5)
    with pytest.raises(DataError, match="slabs of 5 slices along D; the volume has 3"):
        aggregator.embed_volume(encoder(), torch.zeros(1, 3, 16, 16))


def body(depth, seed=0, air=-0.5):
    """Something to see in every slice, in the middle of air."""
    generator = torch.Generator().manual_seed(seed)
    volume = torch.full((1, depth, 20, 24), air)
    volume[:, :, 4:16, 5:18] = torch.rand(1, depth, 12, 13, generator=generator)
    return volume


def in_air(volume, before, after, axis=1, air=-0.5):
    ends = [torch.full_like(volume.narrow(axis, 0, 1), air) for _ in range(2)]
    counts = zip(ends, (before, after))
    first, last = (end.repeat_interleave(count, axis) for end, count in counts)
    return torch.cat([first, volume, last], axis)


@pytest.mark.parametrize("slab", [1, 3, 10])
@pytest.mark.parametrize("axis", ["D", "H"])
def test_air_at_the_ends_changes_nothing(axis, slab):
    network = encoder()
    aggregator = bent(
        make(features=network.embed_dim, slices=4, slab=slab, axis=axis, plane=(32, 32)), size=0.1
    )
    whole = AggregatedEncoder(network, aggregator).eval()
    volume = in_air(body(9), 1, 1).movedim(1, 1 + "DHW".index(axis))  # 9 slices: fewer than a slab of 10
    found = aggregator.embed_volume(network, volume)
    for before, after in ((20, 20), (0, 7), (33, 0)):
        more = in_air(volume, before, after, 1 + "DHW".index(axis))
        assert torch.allclose(aggregator.embed_volume(network, more), found, atol=1e-5)
        assert torch.allclose(whole.embed(more[None])[0], found, atol=1e-5)
        assert torch.allclose(whole.pooled(more[None]), whole.pooled(volume[None]), atol=1e-5)
    other = in_air(body(9, seed=1), 1, 1).movedim(1, 1 + "DHW".index(axis))
    assert (aggregator.embed_volume(network, other) - found).norm() > 1e-3


def test_what_is_shown_is_the_foreground_box(tmp_path):
    from ssl3d.data.open import open_data
    from ssl3d.data.phantoms import phantom_store

    for volume in open_data([phantom_store(4, shape=(48, 40, 40), folder=tmp_path)]):
        (low, *_), (high, *_) = volume.foreground_box()
        first, end = shown_slices(volume.read())
        # To the slice, where the box is to the block.
        assert abs(first - low) <= volume.block[0] and abs(high - end) <= volume.block[0]


def test_a_volume_of_one_value_is_seen_whole():
    assert shown_slices(torch.ones(2, 5, 8, 8)) == (0, 5)
    spot = torch.zeros(1, 5, 64, 64)
    spot[:, 2, :4, :4], spot[:, 4, 0, 0] = 1, 1  # a single voxel is noise
    assert shown_slices(spot) == (2, 3)
    assert shown_slices(torch.cat([torch.zeros_like(spot), spot.flip(1)])) == (2, 3)


def test_volumes_are_pooled_together_as_alone_with_gradients():
    network = encoder().requires_grad_()
    whole = AggregatedEncoder(network, make(features=network.embed_dim, slab=2, plane=(32, 32)))
    x = torch.stack([in_air(body(6), 2, 3), in_air(body(9, seed=1), 1, 1), in_air(body(2), 4, 5)])
    slabs, mask = whole.stacks(x)
    assert slabs.shape == (3, 4, 1, 2, 20, 24) and mask.sum(1).tolist() == [3, 4, 1]
    assert torch.equal(slabs[0, 0, :, 0], x[0, :, 2]) and (slabs[0, 3] == -0.5).all()
    pooled = whole.pooled(x)
    assert torch.allclose(pooled, whole.embed(x), atol=1e-5)
    pooled.square().sum().backward()
    assert network.conv1.weight.grad.isfinite().all()


def test_places_run_from_half_a_turn_to_many():
    from ssl3d.heads.aggregator import place_encoding

    encoded = place_encoding(torch.tensor([5, 3]), 5, 8)
    assert encoded.shape == (2, 5, 8)
    assert encoded[0, 4, 0].item() == pytest.approx(math.sin(math.pi), abs=1e-5)
    # The last of three slices lies where the last of five does.
    assert torch.allclose(encoded[1, 2], encoded[0, 4], atol=1e-4)


def test_it_travels_beside_the_encoder(tmp_path):
    from ssl3d.checkpoint.encoders import save_encoder
    from ssl3d.checkpoint.travellers import load_traveller

    network = encoder()
    aggregator = bent(make(features=184, slices=4, slice_features="stages", position_bias=True))
    save_encoder(network, tmp_path / "encoder", travellers={"aggregator": aggregator})
    loaded = load_traveller(tmp_path, "aggregator")
    assert loaded.config == aggregator.config
    volume = torch.randn(1, 6, 16, 16)
    assert torch.equal(loaded.embed_volume(network, volume), aggregator.embed_volume(network, volume))
