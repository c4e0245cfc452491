"""Masked autoencoding: what is hidden, what it learns, and what it must not be able to learn from."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.api import BatchRng, UsageError, one_group, only_visible, open_data
from ssl3d.config import from_dict, to_dict
from ssl3d.encoders.resnet import ResNet10
from ssl3d.testing import check_proxy
from ssl3d_proxies.mae import MAE, Blocks, MAEConfig, blur_in, mask_blocks, normalise, visible_mean


def proxy_of(strides=8, **options):
    torch.manual_seed(0)
    deep = {
        4: ((1, 1, 1), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
        8: ((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1)),
    }
    encoder = ResNet10(ResNet10.Config(width=8, stem_kernel=3, stage_strides=deep[strides]))
    return MAE(MAEConfig(**{"crop": (16, 16, 16), "width": 8, "flip": 0.0} | options), encoder)


def group(x, foreground=None):
    inside = torch.ones_like(x[:, 0], dtype=torch.bool) if foreground is None else foreground
    return {"crop": x, "foreground": inside}


def step(proxy, x, seed=3, foreground=None, rule=None):
    """One step: its output, what the encoder saw, and what the decoder gave."""
    seen, given = [], []
    hooks = [
        proxy.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach())),
        proxy.decoder.register_forward_hook(lambda module, inputs, output: given.append(output.detach())),
    ]
    if rule is not None:
        proxy.decoder.forward = lambda maps, size: rule
    output = proxy(group(x, foreground), one_group(seed, len(x)))
    for hook in hooks:
        hook.remove()
    return output, seen[0], given[0]


def train(proxy, make, steps=50, batch=8, lr=3e-3):
    """A hand-written loop; `make(n, seed)` gives crops."""
    optimizer = torch.optim.AdamW(proxy.train().parameters(), lr=lr)
    for at in range(steps):
        output = proxy(group(make(batch, at)), one_group(at, batch))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    with torch.no_grad():
        return proxy(group(make(16, 10_000)), one_group(1, 16)).metrics


# What is hidden -------------------------------------------------------------------------------------


@given(
    size=st.sampled_from([(16, 16, 16), (10, 20, 33), (1, 32, 32), (3, 9, 7)]),
    side=st.sampled_from([(4, 4, 4), (1, 8, 8), (3, 5, 2)]),
    ratio=st.sampled_from((0.01, 0.5, 0.75, 0.99)),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_whole_blocks_are_hidden_as_many_as_asked_for(size, side, ratio, seed):
    masked = mask_blocks(Blocks.of(size, side), one_group(seed, 3), ratio)
    assert masked.shape == (3, 1, *size) and masked.dtype == torch.bool
    for one in masked[:, 0]:
        hidden = total = 0
        for d in range(0, size[0], side[0]):
            for h in range(0, size[1], side[1]):
                for w in range(0, size[2], side[2]):
                    block = one[d : d + side[0], h : h + side[1], w : w + side[2]]
                    assert block.all() or not block.any()
                    hidden, total = hidden + int(block.any()), total + 1
        assert hidden == min(max(round(ratio * total), 1), total - 1)


def test_every_block_is_hidden_as_often():
    masked = mask_blocks(Blocks.of((4, 4, 4), (2, 2, 2)), one_group(0, 2000), 0.75)
    assert masked.float().mean(0).sub(0.75).abs().max() < 0.05
    halves = [
        mask_blocks(Blocks.of((4, 4, 4), (2, 2, 2)), BatchRng(0, rows, 2000), 0.75) for rows in ([5], [99])
    ]
    assert all(torch.equal(half, masked[[at]]) for half, at in zip(halves, (5, 99)))


def test_blocks_are_scaled_to_the_crop():
    token, remask = proxy_of(), proxy_of(masking="remask")
    assert token.block_of((32, 32, 32)) == (8, 8, 8)
    assert token.block_of((160, 160, 160)) == (16, 16, 16)
    assert token.block_of((10, 64, 48)) == (2, 16, 12)
    assert token.block_of((1, 64, 64)) == (1, 16, 16)
    assert token.block_of((3, 16, 16)) == (1, 4, 4)
    assert remask.block_of((16, 16, 16)) == (8, 8, 8)  # the stride
    assert remask.block_of((64, 48, 100)) == (16, 16, 16)
    assert remask.block_of((1, 64, 64)) == (1, 16, 16)
    assert proxy_of(block=(2, 4, 8)).block_of((1, 16, 16)) == (1, 4, 8)


def test_blocks_that_cannot_work_are_refused():
    with pytest.raises(UsageError, match="16x16x16 is a single block of 16x16x16"):
        proxy_of(block=(16, 16, 16))
    with pytest.raises(UsageError, match=r"block is 6 along D, .* stride, 8: choose 8"):
        proxy_of(block=(6, 8, 8), masking="remask")
    with pytest.raises(UsageError, match="single block"):
        proxy_of(crop=(8, 8, 8), masking="remask")


@pytest.mark.parametrize(
    "wrong",
    [{"block": (1, 2)}, {"block": (0, 1, 1)}, {"ratio": 1.0}, {"width": 1}, {"flip": -1.0}],
    ids=str,
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MAEConfig(**wrong)


@pytest.mark.parametrize(
    "options", [{}, {"masking": "remask"}, {"skips": False}], ids=["token", "remask", "bare"]
)
@pytest.mark.parametrize("size", [(16, 16, 16), (1, 32, 32)], ids=["volume", "image"])
def test_what_is_hidden_does_not_reach_the_network(options, size):
    proxy, x = proxy_of(**options).train(), torch.randn(3, 1, *size)
    _, seen, first = step(proxy, x)
    hidden = (seen != x).float()
    assert hidden.mean() == pytest.approx(0.75, abs=0.01)
    _, again, second = step(proxy, x + 5 * hidden * torch.randn_like(x))
    assert torch.equal(seen, again) and torch.equal(first, second)
    _, _, third = step(proxy, x + 5 * (1 - hidden) * torch.randn_like(x))
    assert not torch.allclose(first, third, atol=1e-3)


def test_the_token_is_what_is_shown_and_is_learned():
    proxy, x = proxy_of(), torch.randn(3, 1, 16, 16, 16)
    proxy.tokens["input"].data.fill_(7.0)
    output, seen, _ = step(proxy, x)
    assert set(seen[seen != x].tolist()) == {7.0}
    output.loss.backward()
    assert proxy.tokens["input"].grad.abs().sum() > 0


@pytest.mark.parametrize("size", [(16, 16, 16), (12, 20, 13)], ids=["multiple", "cut"])
def test_remasked_maps_hold_tokens_where_nothing_is_known(size):
    proxy, x = proxy_of(masking="remask", densify_norm=False), torch.randn(3, 1, *size)
    masked = mask_blocks(Blocks.of(size, (8, 8, 8)), one_group(0, 3), 0.75)
    with only_visible(proxy.encoder, ~masked):
        sparse = proxy.encoder(x * ~masked)
    _, maps = proxy._encode(x, masked)
    for n in proxy.decoder.sources:
        d, h, w = proxy.encoder.strides[n]
        there = masked[:, :, ::d, ::h, ::w].expand_as(maps[n])
        assert torch.equal(maps[n][there], proxy.tokens[str(n)].expand_as(maps[n])[there])
        assert torch.equal(maps[n][~there], sparse[n][~there])  # as if masked places did not exist


@pytest.mark.parametrize("size", [(16, 16, 16), (12, 20, 13)], ids=["multiple", "cut"])
def test_remasked_maps_are_normalised_over_what_is_visible_before_tokens_come(size):
    """As SparK's sparse batch norm: over the visible places alone, flattened to one axis."""
    proxy, x = proxy_of(masking="remask").train(), torch.randn(3, 1, *size)
    masked = mask_blocks(Blocks.of(size, (8, 8, 8)), one_group(0, 3), 0.75)
    plain = proxy_of(masking="remask", densify_norm=False).train()
    _, raw = plain._encode(x, masked)
    _, maps = proxy._encode(x, masked)
    assert len(proxy.decoder.sources) > 1
    for n in proxy.decoder.sources:
        d, h, w = proxy.encoder.strides[n]
        hidden = masked[:, 0, ::d, ::h, ::w]
        flat = torch.nn.BatchNorm1d(maps[n].shape[1])
        expected = flat(raw[n].movedim(1, -1)[~hidden])
        assert torch.allclose(maps[n].movedim(1, -1)[~hidden], expected, atol=1e-4)
        assert torch.equal(proxy.norms[str(n)].num_batches_tracked, torch.tensor(1))
        assert torch.allclose(proxy.norms[str(n)].running_mean, flat.running_mean, atol=1e-5)
        assert torch.allclose(proxy.norms[str(n)].running_var, flat.running_var, rtol=1e-3, atol=1e-5)
        assert (maps[n].movedim(1, -1)[hidden] == proxy.tokens[str(n)].flatten()).all()


@pytest.mark.long
def test_remask_keeps_the_contract(store_of, small, tiny_encoder):
    config = dataclasses.replace(small("mae"), masking="remask")
    check_proxy("mae", config, encoder=tiny_encoder, data=open_data([store_of("mae")]))


def test_a_run_of_before_has_plain_targets_and_no_norms():
    config = MAEConfig(masking="remask", norm_targets=False)
    written = {k: v for k, v in to_dict(config).items() if k != "densify_norm"}  # it wrote norm_targets
    before = from_dict(MAEConfig, written, "a run", recorded=True)
    assert not before.standardised and not before.densify_norm
    assert MAEConfig(masking="remask").standardised and not MAEConfig().standardised
    assert MAEConfig(norm_targets=True).standardised


# Loss and metrics -----------------------------------------------------------------------------------


def test_the_loss_of_remask_is_that_of_spark():
    """Its patchify, its targets and its loss, typed anew for volumes."""
    x, answer = torch.randn(3, 1, 16, 16, 16) * 4 + 3, torch.randn(3, 1, 16, 16, 16)
    output, seen, _ = step(proxy_of(masking="remask"), x, rule=answer)

    def patches(y):
        return y.reshape(3, 2, 8, 2, 8, 2, 8).permute(0, 1, 3, 5, 2, 4, 6).reshape(3, 8, 512)

    inp, rec = patches(x), patches(answer)
    inp = (inp - inp.mean(-1, keepdim=True)) / (inp.var(-1, keepdim=True) + 1e-6) ** 0.5
    hidden = (patches(seen) == 0).all(-1)
    expected = ((rec - inp) ** 2).mean(2)[hidden].mean()
    assert hidden.sum(1).tolist() == [6, 6, 6]
    assert output.loss.item() == pytest.approx(expected.item(), rel=2e-3)  # n - 1 there


def test_the_loss_is_the_error_on_hidden_voxels_alone():
    x = torch.randn(2, 1, 16, 16, 16)
    answer = torch.randn(2, 1, 16, 16, 16)
    output, seen, _ = step(proxy_of(), x, rule=answer)
    by_hand = [((a - b)[s != b] ** 2).mean().item() for a, b, s in zip(answer, x, seen)]
    assert output.loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert step(proxy_of(), x, rule=x)[0].loss.item() == 0


def test_normalised_targets_by_hand():
    x = torch.randn(1, 2, 5, 4, 6) * 3 + 2
    found = normalise(x, Blocks.of((5, 4, 6), (2, 4, 4)))
    for c in range(2):
        for d in (0, 2, 4):
            for w in (0, 4):
                block = x[0, c, d : d + 2, :, w : w + 4].double()
                expected = (block - block.mean()) / math.sqrt(block.var(correction=0).item() + 1e-6)
                assert torch.allclose(found[0, c, d : d + 2, :, w : w + 4].double(), expected, atol=1e-5)


def test_normalised_targets_ask_for_texture_not_for_shade():
    x = torch.randn(2, 1, 16, 16, 16)
    blocks = Blocks.of((16,) * 3, (4,) * 3)
    shade = blocks.spread(torch.randn(2, 1, 4, 4, 4))
    right = normalise(x, blocks)
    output, _, _ = step(proxy_of(norm_targets=True), x * 3 + shade, rule=right)
    assert output.loss.item() < 1e-8 and output.metrics["relative_error"].item() < 1e-8
    output, _, _ = step(proxy_of(norm_targets=True), x, rule=torch.zeros_like(x))
    assert output.metrics["relative_error"].item() == pytest.approx(1)


def test_metrics_are_measured_against_the_visible_mean_and_a_blur():
    x, inside = torch.randn(2, 1, 16, 16, 16) + 2, torch.zeros(2, 16, 16, 16, dtype=torch.bool)
    inside[:, :, :10] = True
    x[:, :, :, 10:] = -9.0  # background
    _, seen, _ = step(proxy_of(), x, foreground=inside)
    hidden = seen != x
    body = inside.unsqueeze(1)
    mean = torch.stack([one[~h & b].mean() for one, h, b in zip(x, hidden, body)]).view(2, 1, 1, 1, 1)
    output, _, _ = step(proxy_of(), x, foreground=inside, rule=mean.expand_as(x))
    assert output.metrics["relative_error"].item() == pytest.approx(1, rel=1e-4)
    assert output.metrics["background"].item() == pytest.approx(
        (hidden & ~body).sum().item() / hidden.sum().item()
    )
    blurred = blur_in(x, ~hidden, Blocks.of((16,) * 3, (4,) * 3))
    output, _, _ = step(proxy_of(), x, foreground=inside, rule=blurred)
    assert output.metrics["blur_error"].item() == pytest.approx(1, rel=1e-4)


def test_the_blur_by_hand():
    x, visible = torch.randn(1, 1, 3, 4, 5), torch.rand(1, 1, 3, 4, 5) < 0.5
    side = (2, 4, 3)
    found = blur_in(x, visible, Blocks.of((3, 4, 5), side))
    known = torch.nonzero(visible[0, 0]).double()
    values = x[0, 0][visible[0, 0]].double()
    for at in [(0, 0, 0), (2, 1, 4), (1, 3, 2)]:
        away = ((known - torch.tensor(at)) / (torch.tensor(side) / 4)).square().sum(1)
        weight = torch.exp(-0.5 * away)
        expected = (weight @ (values - values.mean()) / (weight.sum() + 1e-6) + values.mean()).item()
        assert found[0, 0][at].item() == pytest.approx(expected, abs=1e-4)


def test_the_visible_mean_is_of_the_body_where_it_is_seen():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 1, 4).repeat(2, 1, 1, 1, 1)
    visible = torch.tensor([True, True, False, True]).view(1, 1, 1, 1, 4).repeat(2, 1, 1, 1, 1)
    body = torch.tensor([[True, False, True, True], [False, False, True, False]]).view(2, 1, 1, 1, 4)
    assert visible_mean(x, visible, body).flatten().tolist() == pytest.approx([2.5, 7 / 3])


def test_an_even_crop_has_nothing_to_restore():
    metrics = step(proxy_of(), torch.full((2, 1, 16, 16, 16), 3.0))[0].metrics
    assert metrics["relative_error"].item() == metrics["blur_error"].item() == 1


@pytest.mark.parametrize("options", [{}, {"norm_targets": True}, {"masking": "remask"}], ids=str)
def test_picture_shows_input_restored_and_original(options):
    x = torch.randn(3, 1, 16, 16, 16)
    assert len(step(proxy_of(**options), x)[0].picture().axes) == 9


# Learning, and shortcut controls --------------------------------------------------------------------


def noise(n, seed):
    return torch.randn(n, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def smooth(n, seed):
    """Waves of random direction and phase."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.stack(torch.meshgrid(*[torch.arange(16.0)] * 3, indexing="ij"))
    way = torch.rand(n, 3, generator=generator) * 0.3
    phase = torch.rand(n, 1, 1, 1, generator=generator) * 6.28
    return (1.4 * torch.sin(torch.einsum("na,adhw->ndhw", way, at) + phase)).unsqueeze(1)


def place(n, seed):
    """The cue put in: what is hidden is where it always is."""
    ramp = torch.linspace(-1.5, 1.5, 16).view(16, 1, 1).expand(16, 16, 16)
    return (ramp + 0.1 * noise(n, seed)).contiguous()


@pytest.mark.long
@pytest.mark.parametrize("masking", ["token", "remask"])
def test_it_restores_what_continues_and_the_cue_makes_it_easier(masking):
    # Plain targets: of a wave, standardised blocks leave little but its direction.
    options = {"masking": masking, "block": (4, 4, 4), "strides": 4, "norm_targets": False}
    waves = train(proxy_of(**options), smooth)["relative_error"]
    assert waves < 0.75
    assert train(proxy_of(**options), place)["relative_error"] < 0.6 * waves


@pytest.mark.parametrize("masking", ["token", "remask"])
def test_noise_stays_at_chance(masking):
    metrics = train(proxy_of(masking=masking), noise)
    assert metrics["relative_error"] > 0.97 and metrics["blur_error"] < 1  # a blur of noise is worse still


def test_the_crop_of_another_example_is_of_no_use():
    proxy = proxy_of()
    proxy.encoder.register_forward_pre_hook(lambda module, inputs: inputs[0].roll(1, 0))
    assert train(proxy, smooth)["relative_error"] > 0.9
