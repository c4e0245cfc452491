"""Intra-inter: what its three tasks learn, what they must not, and how slices and images come together."""

import copy
import dataclasses
import io
import itertools
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

import ssl3d
from ssl3d.api import BatchRng, DataError, UsageError, ViewRng, load_encoder, open_data
from ssl3d.checkpoint import snapshot
from ssl3d.config import from_dict, to_dict
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d.objectives.masked_slices import mask_block
from ssl3d.rng import numpy_rng, one_group, seed_of
from ssl3d_proxies.intra_inter import (
    IntraInter,
    IntraInterConfig,
    augment_stack,
)

SMALL = {
    "slices": 6, "plane": (24, 24), "hidden": 64, "out": 32, "width": 32, "heads": 2, "layers": 2,
    "dropout": 0.0,
}  # fmt: skip
# Weaker than the defaults, so that seconds are enough.
EASY = {"bias": 0.1, "gamma": 0.2, "contrast": 0.1}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    from ssl3d.data.phantoms import phantom_store

    return open_data([phantom_store(16, shape=(32, 32, 32), folder=tmp_path_factory.mktemp("phantoms"))])


def config_of(**options):
    return IntraInterConfig(**{**SMALL, **options})


def make(config, data=None, seed=0, kind="acs", norm="batch"):
    torch.manual_seed(seed)
    proxy = IntraInter(config, ResNet10(ResNet10.Config(width=8, kind=kind, norm=norm, stem_kernel=3)))
    if data is not None:
        proxy.setup(data)
    return proxy


def batch_of(config, data, size, step=0):
    chosen = numpy_rng("which", step).permutation(len(data))[:size].tolist()
    batch = default_collate([IntraInter.draw(config, data[i], numpy_rng(step, i)) for i in chosen])
    return {**batch, "index": torch.tensor([data[i].index for i in chosen])}


def image_store(folder, count):
    """A store of images."""
    rng = np.random.default_rng(0)
    for n in range(count):
        image = rng.random((1, 1, 32, 32), dtype=np.float32)
        write_part(folder / "parts", f"{n}", Record(f"{n}", "images", f"s{n}"), image)
    assemble(folder / "parts", folder / "images.h5", {}, [])
    return folder / "images.h5"


def images_of(config, size, step=0, first=1000):
    """Images as `draw` gives them: smooth, different."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 1, 8, 8, generator=generator)
    side = config.plane[0] + 4
    x = F.interpolate(x, (side, side), mode="bilinear")[:, None, None, :, None]
    return {
        "slices": x,
        "places": torch.full((size, 1), 0.5),
        "spacing": torch.ones(size, 3),
        "index": torch.arange(first, first + size),
    }


def stack_of(x):
    """A group of stacks (B, V, S, side, side)."""
    places = (torch.arange(x.shape[2]) + 0.5) / x.shape[2]
    return {
        "slices": x[:, :, :, None, None],
        "places": places.expand(len(x), -1).clone(),
        "spacing": torch.ones(len(x), 3),
        "index": torch.arange(len(x)),
    }


def noise_of(step, size=12, views=1, slices=6, side=28):
    return stack_of(
        torch.randn(size, views, slices, side, side, generator=torch.Generator().manual_seed(step))
    )


def train(proxy, draw, steps, lr=3e-3):
    optimizer = torch.optim.AdamW([p for p in proxy.parameters() if p.requires_grad], lr)
    history = []
    for step in range(steps):
        batch = draw(step)
        out = proxy(batch, one_group(seed_of("step", step), len(batch["index"])))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        proxy.after_step(step, steps)
        history.append({"loss": out.loss.item(), **{k: v.item() for k, v in out.metrics.items()}})
    return history


def mean(history, name):
    return float(np.mean([step[name] for step in history if name in step]))


# Learning, and short cuts -------------------------------------------------------------------------


@pytest.mark.long
def test_it_learns_on_phantoms(phantoms):
    config = config_of(**EASY)
    history = train(make(config, phantoms), lambda step: batch_of(config, phantoms, 10, step), 40)
    first, last = history[:5], history[-10:]
    assert mean(last, "loss") < mean(first, "loss")
    assert mean(last, "intra_kappa") > 0.4 and mean(last, "inter_kappa") > 0.4
    assert mean(last, "masked_vs_mean") < 0.95 < mean(first, "masked_vs_mean")
    assert mean(last, "offset") > 1.5 * mean(first, "offset")


def test_views_that_share_nothing_stay_at_chance():
    config = config_of(**EASY)
    history = train(make(config), lambda step: noise_of(step, views=2), 30)[-15:]
    assert abs(mean(history, "intra_kappa")) < 0.1
    assert abs(mean(history, "inter_kappa")) < 0.2


def test_shuffled_views_stay_at_chance(phantoms):
    config = config_of(**EASY)

    def draw(step):
        batch = batch_of(config, phantoms, 10, step)
        x = batch["slices"]
        return {**batch, "slices": torch.cat([x, x.roll(1 + step % 9, 0)], 1)}

    history = train(make(config, phantoms), draw, 24)[-12:]
    assert abs(mean(history, "intra_kappa")) < 0.15
    assert abs(mean(history, "inter_kappa")) < 0.25


def test_slices_of_noise_cannot_be_predicted():
    config = config_of(**EASY, weights=(1.0, 0.0, 1.0))
    history = train(make(config), noise_of, 40)[-20:]
    assert mean(history, "masked_vs_mean") > 0.98


def test_augmentations_that_slices_share_would_predict_noise():
    """The short cut that the default avoids: how a view was augmented shows in every slice of it."""
    config = config_of(augmentation="volume", weights=(1.0, 0.0, 1.0))
    history = train(make(config), noise_of, 40)[-10:]
    assert mean(history, "masked_vs_mean") < 0.85


def test_slices_that_change_slowly_are_easier_to_predict():
    """Brightness, constant along z, told or not told by the other slices."""
    config = config_of(chance=0.0, weights=(1.0, 0.0, 1.0))

    def bright(step, smooth):
        generator = torch.Generator().manual_seed(step)
        level = torch.randn(12, 1, 6, 1, 1, generator=generator) * 2
        level = level[:, :, :1] if smooth else level
        return stack_of(torch.randn(12, 1, 6, 24, 24, generator=generator) + level)

    smooth, rough = (
        mean(train(make(config), lambda step: bright(step, cue), 30)[-10:], "masked_vs_mean")  # noqa: B023
        for cue in (True, False)
    )
    assert smooth < 0.6 < 0.9 < rough


def test_a_stack_of_another_volume_does_not_tell_the_masked_slice():
    """Targets shuffled over the batch: at the mean, though slices of one volume are alike."""
    config = config_of(chance=0.0, weights=(0.0, 0.0, 1.0))

    def draw(step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 1, 6, 24, 24, generator=generator) + 2 * torch.randn(
            12, 1, 1, 1, 1, generator=generator
        )
        orders = torch.stack([torch.randperm(12, generator=generator) for _ in range(6)], 1)
        return stack_of(x[orders, :, torch.arange(6)].movedim(2, 1))

    assert mean(train(make(config), draw, 24)[-10:], "masked_vs_mean") > 0.9


def test_a_constant_encoder_is_no_solution():
    config = config_of(weights=(0.0, 0.0, 1.0))
    proxy = make(config)
    proxy.encoder.register_forward_hook(lambda module, args, maps: [m * 0 + 1 for m in maps])
    out = proxy(noise_of(0), one_group(0, 12))
    # Equal slices have no deviation to standardise by: the error is that of the prediction, not 0 of both.
    assert out.loss.isfinite()
    history = train(make(config), noise_of, 40)[-10:]
    assert mean(history, "masked_error") > 0.9


# Drawing ------------------------------------------------------------------------------------------


class Counting:
    """A volume that counts the voxels read from it."""

    def __init__(self, volume):
        self._volume, self.voxels = volume, 0

    def __getattr__(self, name):
        return getattr(self._volume, name)

    def read(self, start, size):
        self.voxels += int(np.prod(size))
        return self._volume.read(start, size)


class Image(Counting):
    shape = (1, 1, 32, 32)
    block = (1, 8, 8)

    def foreground(self):
        return np.ones((1, 4, 4), np.float32)

    def foreground_box(self):
        return (0, 0, 0), (1, 32, 32)


@pytest.mark.parametrize("axis", ["D", "H", "W"])
@pytest.mark.parametrize("stack", ["spread", "random", "block"])
def test_slices_come_in_order_and_lie_flat(axis, stack, phantoms):
    config = config_of(axis=axis, stack=stack, slab=2, slices=5, chance=0.0)
    volume = Counting(phantoms[0])
    drawn = IntraInter.draw(config, volume, numpy_rng(3))
    assert drawn["slices"].shape == (1, 5, 1, 2, 24, 24)
    assert volume.voxels == 5 * 2 * 24 * 24
    number = "DHW".index(axis)
    whole = volume.read((0, 0, 0), volume.shape[1:]).movedim(number + 1, 1)[0]
    found = []
    for slab in drawn["slices"][0, :, 0]:
        places = [
            (z, y, x)
            for z in range(31)
            for y in range(9)
            for x in range(9)
            if torch.equal(whole[z : z + 2, y : y + 24, x : x + 24], slab)
        ]
        found.append(places[0])
    depths = [z for z, _, _ in found]
    assert all(b - a >= 2 for a, b in itertools.pairwise(depths))
    assert len({(y, x) for _, y, x in found}) == 1
    assert drawn["places"].diff().min() > 0


def test_an_image_is_a_stack_of_one(phantoms):
    config = config_of(slab=3)
    drawn = IntraInter.draw(config, Image(phantoms[0]), numpy_rng(0))
    assert drawn["slices"].shape[:4] == (1, 1, 1, 1)


def test_a_volume_with_nothing_to_see_is_refused_by_name(phantoms):
    class Empty(Counting):
        def foreground(self):
            return np.zeros_like(self._volume.foreground())

    with pytest.raises(DataError, match="no foreground"):
        IntraInter.draw(config_of(), Empty(phantoms[0]), numpy_rng(0))


def test_torchio_gives_each_view_its_own(phantoms):
    drawn = IntraInter.draw(config_of(torchio=("RandomNoise",)), phantoms[0], numpy_rng(0))
    a, b = drawn["slices"]
    assert a.shape == b.shape and not torch.equal(a, b)


@pytest.mark.parametrize("augmentation", ["slice", "volume"])
def test_slices_of_a_volume_turn_alike_or_each_on_its_own(augmentation):
    alone = {"blur": 0, "bias": 0, "gamma": 0, "contrast": 0, "noise": 0}
    config = config_of(augmentation=augmentation, chance=1.0, rotate=30, **alone)
    ramp = torch.linspace(-1, 1, 48).expand(2, 1, 3, 48, 48).clone()
    views = augment_stack(config, stack_of(ramp), one_group(0, 2))[:, :, :, 0, 0]
    same = [torch.allclose(views[b, v, 0], views[b, v, 1], atol=1e-5) for b in range(2) for v in range(2)]
    assert all(same) if augmentation == "volume" else not any(same)
    assert not torch.allclose(views[0, 0], views[0, 1], atol=1e-2)
    assert not torch.allclose(views[0, 0], views[1, 0], atol=1e-2)


# Images and volumes together ----------------------------------------------------------------------


def test_images_and_volumes_pass_the_encoder_in_one_batch(phantoms):
    config = config_of()
    proxy = make(config, phantoms)
    seen = []
    proxy.encoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    groups = [images_of(config, 3), batch_of(config, phantoms, 2)]
    out = proxy(groups, [BatchRng(0, (0, 2, 4), 5), BatchRng(0, (1, 3), 5)])
    assert seen == [(3 * 2 + 2 * 2 * 6, 1, 1, 24, 24)]
    out.loss.backward()
    assert all(p.grad is not None for p in proxy.encoder.parameters())


def test_images_alone_have_no_3d_tasks(phantoms):
    config = config_of()
    out = make(config, phantoms)([images_of(config, 4)], [one_group(0, 4)])
    assert "intra_kappa" in out.metrics and "inter_kappa" not in out.metrics
    assert "masked_vs_mean" not in out.metrics
    out.loss.backward()
    assert len(out.picture().axes) == 2


def test_thin_volumes_stand_beside_others(phantoms):
    """Stacks of different lengths are different groups of one loss."""
    config = config_of()
    proxy = make(config, phantoms).eval()
    batch = batch_of(config, phantoms, 6)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 6))]
    rngs = [BatchRng(5, range(2), 6), BatchRng(5, range(2, 6), 6)]
    whole, mixed = proxy(batch, one_group(5, 6)), proxy(parts, rngs)
    assert torch.allclose(whole.loss, mixed.loss, rtol=1e-4)
    parts[0] = {**parts[0], "slices": parts[0]["slices"][:, :, :3], "places": parts[0]["places"][:, :3]}
    assert proxy(parts, rngs).loss.isfinite()


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 1)])
def test_losses_can_be_switched_off(weights, phantoms):
    config = config_of(weights=weights)
    proxy = make(config, phantoms)
    out = proxy(batch_of(config, phantoms, 4), one_group(0, 4))
    for name, weight in zip(("intra_loss", "inter_loss", "masked_error"), weights, strict=True):
        assert (name in out.metrics) == bool(weight)
    expected = sum(out.metrics[n] for n in ("intra_loss", "inter_loss", "masked_error") if n in out.metrics)
    assert out.loss.item() == pytest.approx(float(expected), rel=1e-5)
    out.loss.backward()
    assert all(p.grad is not None for p in proxy.parameters() if p.requires_grad)
    assert ("aggregator" in proxy.travels()) == bool(weights[1] or weights[2])


@pytest.mark.parametrize("pooling", ["deformable", "attention", "mean"])
def test_every_pooling_trains(pooling, phantoms):
    config = config_of(pooling=pooling, weights=(1, 1, 0 if pooling == "mean" else 1))
    proxy = make(config, phantoms)
    out = proxy(batch_of(config, phantoms, 4), one_group(0, 4))
    out.loss.backward()
    assert ("offset" in out.metrics) == (pooling == "deformable")
    out.picture().savefig(io.BytesIO())


# Masked slices ------------------------------------------------------------------------------------


def test_the_error_is_of_masked_slices_alone(phantoms):
    config = config_of(weights=(0, 0, 1), chance=0.0)
    proxy = make(config, phantoms).eval()
    batch = batch_of(config, phantoms, 3)
    out = proxy(batch, one_group(0, 3))
    rng = one_group(0, 3)
    maps = proxy.encoder(augment_stack(config, batch, rng).flatten(0, 2))
    # Each average scaled to length 1: four stages, of which the last one is the embedding too.
    parts = [F.normalize(each.mean((2, 3, 4)), dim=1) for each in (*maps[1:], maps[4])]
    x = torch.cat(parts, 1).view(6, 6, -1).detach()
    assert x.shape[2] == 8 + 16 + 32 + 64 + 64
    mask = mask_block(ViewRng(rng, 2), 6, config.mask_share)

    def predict(embedded):
        tokens = proxy.aggregator.project(embedded)
        tokens[mask] = proxy.mask_token.detach()
        return proxy.decoder(proxy.aggregator.attend(tokens)[0])[mask]

    deviation = (x.var((0, 1), correction=0) + 1e-3 * x.var((0, 1), correction=0).mean()).sqrt()
    target = ((x - x.mean((0, 1))) / deviation)[mask]
    error = (predict(x) - target).square().mean()
    assert out.loss.item() == pytest.approx(error.item(), rel=1e-4)
    ratio = error / target.square().mean()
    assert out.metrics["masked_vs_mean"].item() == pytest.approx(ratio.item(), rel=1e-4)
    # What a masked slice shows does not reach the prediction, and what a seen one shows does.
    for slices, reaches in ((mask, False), (~mask, True)):
        changed = x.clone()
        changed[slices] *= torch.linspace(0.5, 2, x.shape[2])
        assert bool((predict(changed) - predict(x)).abs().max() > 1e-6) == reaches


def test_scattered_masks_are_the_same_in_both_views(phantoms):
    config = config_of(weights=(0, 0, 1), masks="scattered", mask_share=(0.4, 0.4))
    proxy = make(config, phantoms)
    mask = proxy._mask(one_group(0, 200), 6).view(200, 2, 6)
    assert torch.equal(mask[:, 0], mask[:, 1]) and (mask.sum(2) == 2).all()
    apart = (mask[:, 0, 1:] & ~mask[:, 0, :-1]).sum(1) + mask[:, 0, 0]
    assert (apart == 2).any() and (apart == 1).any()  # no block
    blocks = make(config_of(weights=(0, 0, 1), mask_share=(0.4, 0.4)))._mask(one_group(0, 200), 6)
    assert not torch.equal(blocks.view(200, 2, 6)[:, 0], blocks.view(200, 2, 6)[:, 1])
    out = proxy(batch_of(config, phantoms, 4), one_group(0, 4))
    out.loss.backward()
    assert out.metrics["masked_vs_neighbours"].isfinite()


def test_slices_of_noise_cannot_be_predicted_around_scattered_masks():
    config = config_of(**EASY, weights=(1.0, 0.0, 1.0), masks="scattered")
    history = train(make(config), noise_of, 30)[-15:]
    assert mean(history, "masked_vs_mean") > 0.98


def test_the_embedding_alone_and_no_bias_are_what_runs_of_before_had(phantoms):
    written = to_dict(config_of())
    for name in ("slice_features", "position_bias", "masks"):
        del written[name]
    before = from_dict(IntraInterConfig, written, "a run", recorded=True)
    assert (before.slice_features, before.position_bias, before.masks) == ("last", False, "block")
    proxy, today = make(before, phantoms), make(config_of(), phantoms)
    assert proxy.aggregator.config.features == proxy.encoder.embed_dim == 64
    assert not any("bias.layers" in name for name in proxy.state_dict())
    assert today.aggregator.config.features == 8 + 16 + 32 + 64 + 64
    assert any("bias.layers" in name for name in today.state_dict())
    out = proxy(batch_of(before, phantoms, 4), one_group(0, 4))
    out.loss.backward()
    assert all(p.grad is not None for p in proxy.parameters() if p.requires_grad)


def test_targets_of_a_moving_average(phantoms):
    config = config_of(target="ema", momentum=0.9)
    proxy = make(config, phantoms)
    start = copy.deepcopy(proxy.teacher.state_dict())
    history = train(proxy, lambda step: batch_of(config, phantoms, 6, step), 1)
    assert history[0]["masked_error"] > 0
    for name, new in proxy.encoder.state_dict().items():
        if new.is_floating_point():
            expected = 0.9 * start[name] + 0.1 * new
            assert torch.allclose(proxy.teacher.state_dict()[name], expected, atol=1e-5), name
    assert all(p.grad is None for p in proxy.teacher.parameters())
    assert not proxy.train().teacher.training


# Stages and clusters ------------------------------------------------------------------------------


def test_stages_follow_one_another(phantoms):
    config = config_of(stages="staged", stage_shares=(0.4, 0.2, 0.4))
    proxy = make(config, phantoms)
    steps = []
    for step in range(10):
        out = proxy(batch_of(config, phantoms, 4, step), one_group(step, 4))
        proxy.zero_grad(set_to_none=True)
        out.loss.backward()
        moved = any(p.grad is not None for p in proxy.encoder.parameters())
        steps.append(
            ("intra_loss" in out.metrics, "masked_error" in out.metrics, "inter_loss" in out.metrics)
        )
        assert moved == (not steps[-1][1])  # frozen while slices are predicted
        proxy.after_step(step, 10)
    assert steps == [(True, False, False)] * 4 + [(False, True, False)] * 2 + [(False, False, True)] * 4


def test_the_stage_is_kept_in_the_state(phantoms):
    config = config_of(stages="staged")
    proxy, other = make(config, phantoms), make(config, phantoms, seed=1)
    for step in range(5):
        proxy.after_step(step, 10)
    other.load_state_dict(proxy.state_dict())
    batch = batch_of(config, phantoms, 4)
    losses = [one.eval()(batch, one_group(0, 4)).loss for one in (proxy, other)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_frozen_encoder_does_not_move(weight_decay, phantoms, tmp_path):
    whole = ssl3d.pretrain(
        "intra_inter",
        data=phantoms,
        out=tmp_path / "whole",
        encoder="resnet10",
        resnet10={"width": 8, "stem_kernel": 3},
        intra_inter={**SMALL, "stages": "staged", "target": "ema"},
        steps=10, batch_size=4, save_at=(0.2, 0.4, 0.6), checkpoint_every=5, weight_decay=weight_decay,
        subjects="all", holdout=0.0, eval_every=-1, precision="32", workers=0, threads=1,
    )  # fmt: skip
    early, begun, ended, last = (
        load_encoder(whole.folder / f"encoder{at}").state_dict()
        for at in ("-at-20", "-at-40", "-at-60", "")
    )
    # Norm statistics too; the stages around train it.
    assert [key for key, value in begun.items() if not torch.equal(ended[key], value)] == []
    assert not torch.equal(early["conv1.weight"], begun["conv1.weight"])
    assert not torch.equal(ended["conv1.weight"], last["conv1.weight"])
    half = shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(half / "encoder")
    newest, before = snapshot.checkpoints(half)
    newest.unlink()
    assert snapshot.step_of(before) == 5  # within the frozen stage
    again = ssl3d.resume(half)
    ours, theirs = (snapshot.load_checkpoint(run.folder)["module"] for run in (again, whole))
    assert [key for key, value in theirs.items() if not torch.equal(ours[key], value)] == []


def test_the_first_stage_may_be_the_frozen_one(phantoms):
    config = config_of(stages="staged", stage_shares=(0.0, 0.5, 0.5))
    proxy = make(config, phantoms)
    optimizer = torch.optim.AdamW(proxy.parameters(), 1e-2)
    before = copy.deepcopy(proxy.encoder.state_dict())
    for step in range(4):
        out = proxy(batch_of(config, phantoms, 4, step), one_group(step, 4))
        optimizer.zero_grad()
        (out.loss + sum(p.sum() for p in proxy.parameters()) * 0).backward()  # as DDP has it
        optimizer.step()
        proxy.after_step(step, 4)
        same = all(torch.equal(value, before[key]) for key, value in proxy.encoder.state_dict().items())
        assert same == (step < 2)


@pytest.mark.parametrize("stages", ["joint", "staged"])
def test_deepcluster_keeps_banks_of_places_and_of_volumes(stages, phantoms):
    config = config_of(clustering="deepcluster_v2", stages=stages)
    proxy = make(config, phantoms)
    assert len(proxy.intra.bank) == 6 * len(phantoms) and len(proxy.inter.bank) == len(phantoms)
    loader = [[batch_of(config, phantoms, 8, step)] for step in range(2)]
    proxy.start_epoch(0, loader)
    known = sum(len(group["index"].unique()) for groups in loader for group in groups)
    assert 0 < proxy.inter.bank.filled.sum() <= known
    assert (proxy.intra.assignment >= 0).any() and (proxy.inter.assignment >= 0).any()
    before = proxy.inter.bank.features.clone()
    history = train(proxy, lambda step: loader[step % 2][0], 10)
    assert not torch.equal(before, proxy.inter.bank.features)  # staged: by the second stage
    assert all(np.isfinite(list(step.values())).all() for step in history)
    again = make(config, phantoms, seed=3)
    again.load_state_dict(proxy.state_dict())
    batch = batch_of(config, phantoms, 4)
    assert torch.equal(*[one.eval()(batch, one_group(0, 4)).loss for one in (proxy, again)])


def test_deepcluster_learns_on_phantoms(phantoms):
    config = config_of(clustering="deepcluster_v2", weights=(1, 1, 0), prototypes=(6, 4), **EASY)
    proxy = make(config, phantoms)
    losses = []
    for epoch in range(2):
        proxy.start_epoch(epoch, [[batch_of(config, phantoms, 16, epoch)]])
        history = train(proxy, lambda step: batch_of(config, phantoms, 10, step), 14)
        losses.append((history[0]["loss"], history[-1]["loss"]))
    assert losses[0][1] < losses[0][0]
    assert mean(history[-5:], "intra_kappa") > 0.3


def test_volumes_that_no_bank_knows_have_no_loss_but_metrics(phantoms):
    config = config_of(clustering="deepcluster_v2", weights=(1, 1, 0))
    proxy = make(config, phantoms)
    proxy.start_epoch(0, [[batch_of(config, phantoms, 8)]])
    batch = batch_of(config, phantoms, 4)
    stranger = {**batch, "index": batch["index"] + 10**6}
    out = proxy.eval()(stranger, one_group(0, 4))
    assert out.loss == 0 and out.metrics["intra_agreement"] > 0
    assert proxy(batch, one_group(0, 4)).loss > 0


def test_the_queue_holds_the_newest_pairs_in_the_order_of_items(phantoms):
    config = config_of(weights=(0, 1, 0), queue=5, queue_from=0.0, dropout=0.0)
    proxy = make(config, phantoms).train()
    batch = batch_of(config, phantoms, 4)
    order = batch["index"].argsort()
    proxy(batch, one_group(0, 4))
    held = proxy.inter.queue.clone()
    assert proxy.inter.queued == 4 and held[:4].abs().sum(2).min() > 0 and not held[4].any()
    shuffled = {name: value[order] for name, value in batch.items()}
    other = make(config, phantoms).train()
    other(shuffled, BatchRng(0, order.tolist(), 4))
    assert torch.allclose(other.inter.queue, held, atol=1e-5)
    proxy(batch, one_group(1, 4))
    assert torch.equal(proxy.inter.queue[4], held[0])
    proxy.eval()(batch, one_group(2, 4))
    assert proxy.inter.queued == 8  # evaluation adds nothing


def test_prototypes_scale_with_the_data(phantoms):
    proxy = make(config_of(), phantoms)
    assert proxy.intra.count == 6 * 16 // 10 and proxy.inter.count == 8
    assert make(config_of(prototypes=(7, 5)), phantoms).inter.count == 5


# Errors -------------------------------------------------------------------------------------------


def test_slices_too_thin_for_the_kernels_are_refused():
    with pytest.raises(UsageError, match="slab is 1, but kernels of kind 3d"):
        make(config_of(), kind="3d")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": (0, 1, 1)}, "weights 0 1 1 needs stacks of slices, and none of the 4 volumes"),
        ({"weights": (0, 1, 1), "stages": "staged", "stage_shares": (0, 0.5, 0.5)}, "take weights 1 0 0"),
        ({"stages": "staged"}, "along D: add volumes, or take stages joint"),
    ],
)
@pytest.mark.parametrize("slab", [1, 17])
def test_nothing_to_learn_from_is_refused(options, said, slab, phantoms, tmp_path):
    if slab == 1:  # images; volumes have room for one slab of 17 slices else
        data = open_data([image_store(tmp_path, 4)])
    else:
        data, said = phantoms.select(np.arange(4)), said.replace("of 1 ", "of 17 ")
    with pytest.raises(DataError, match=said):
        make(config_of(**options, slab=slab), data)
    make(config_of(slab=slab), data)  # 2D clustering has something


@pytest.mark.parametrize(
    "wrong",
    [
        {"slices": 1},
        {"plane": (0, 4)},
        {"weights": (0, 0, 0)},
        {"weights": (1, 1, -1)},
        {"mask_share": (0.3, 0.1)},
        {"mask_share": (0.0, 0.1)},
        {"prototypes": (1, 0)},
        {"momentum": 2.0},
        {"width": 31},
        {"step_mm": -1.0},
        {"torchio": ("RandomAffine",)},
    ],
)
def test_options_out_of_range_name_the_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config_of(**wrong)


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="weights must end in 0 with pooling mean"):
        config_of(pooling="mean")
    with pytest.raises(ValueError, match="stage_shares"):
        config_of(stages="staged", weights=(1, 1, 0))
    with pytest.raises(ValueError, match="stage_shares"):
        config_of(stages="staged", stage_shares=(0.5, 0.5, 0.5))
    assert dataclasses.replace(
        config_of(), stages="staged", stage_shares=(0.5, 0.0, 0.5), weights=(1, 1, 0)
    )


def test_the_picture_shows_slices_clusters_and_attention(phantoms):
    config = config_of()
    out = make(config, phantoms)(batch_of(config, phantoms, 4), one_group(0, 4))
    figure = out.picture()
    assert len(figure.axes) == 2 * 6 + 2
    assert "cluster" in figure.get_suptitle()
    assert all(panel.get_title() for panel in figure.axes)
    figure.savefig(io.BytesIO())
