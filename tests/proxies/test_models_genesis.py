"""Models Genesis: what it restores, what it must not be able to restore, and what its numbers mean."""

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ssl3d.api import BatchRng, corrupt, open_data
from ssl3d.config import from_dict, to_dict
from ssl3d.data.phantoms import phantom_store
from ssl3d.encoders.resnet import ResNet10
from ssl3d.rng import numpy_rng, one_group
from ssl3d.views.corruptions import Corrupted
from ssl3d_proxies import models_genesis
from ssl3d_proxies.models_genesis import ModelsGenesis, ModelsGenesisConfig

CROP = (16, 16, 16)
PAINTED = {"shuffle": 0.0, "curve": 0.0, "paint": 1.0, "outside": 0.0}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return open_data([phantom_store(16, folder=tmp_path_factory.mktemp("phantoms"))])


def make(norm="batch", **options):
    torch.manual_seed(0)
    encoder = ResNet10(ResNet10.Config(width=8, norm=norm, stem_kernel=3))
    return ModelsGenesis(ModelsGenesisConfig(**{"crop": CROP, "width": 8, **options}), encoder)


def batch_of(config, volumes, step):
    return default_collate(
        [ModelsGenesis.draw(config, v, numpy_rng(step, n)) for n, v in enumerate(volumes)]
    )


def train(proxy, draw, steps=40, batch=8, lr=3e-3):
    optimizer = torch.optim.AdamW(proxy.parameters(), lr)
    history = []
    for step in range(steps):
        out = proxy(draw(step), one_group(step, batch))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append({"loss": out.loss.item(), **{k: v.item() for k, v in out.metrics.items()}})
    return history


def mean(history, name):
    return float(np.mean([step[name] for step in history]))


def some_of(config, volumes):
    """draw(step): 8 of the volumes."""
    return lambda step: batch_of(
        config, [volumes[int(i)] for i in numpy_rng(step).choice(len(volumes), 8, replace=False)], step
    )


def crops_of(make_images):
    """draw(step): images made for the step, all foreground."""

    def draw(step):
        images = make_images(torch.Generator().manual_seed(step))
        return {"crop": images, "foreground": torch.ones_like(images[:, 0], dtype=torch.bool)}

    return draw


@torch.no_grad()
def painted_error(proxy, draw):
    """Squared error on painted voxels, over their variance, on unseen batches: 1 is not restored."""
    proxy.eval()
    error = variance = 0.0
    for step in range(1000, 1006):
        x = draw(step)["crop"]
        seen = corrupt(proxy.config, x, one_group(step, len(x))).input
        restored = proxy.decoder(proxy.encoder(seen), x.shape[2:])
        painted = seen != x
        error += (restored - x)[painted].square().sum().item()
        variance += (x - x.mean())[painted].square().sum().item()
    return error / variance


# Learning -------------------------------------------------------------------------------------------


def test_it_learns_to_restore_phantoms(phantoms):
    proxy = make()
    held, rest = phantoms[:4], phantoms[4:]
    unseen = batch_of(proxy.config, [*held] * 4, 999)

    def look():
        with torch.no_grad():
            return proxy.eval()(unseen, one_group(999, 16)).metrics["relative_error"].item()

    before = look()
    train(proxy.train(), some_of(proxy.config, rest), steps=50)
    assert look() < 0.75 * before  # of equal corruptions: those of each step ask for more or less


def test_painted_parts_are_restored_from_the_anatomy_around_them(phantoms):
    proxy = make(**PAINTED)
    train(proxy, some_of(proxy.config, phantoms[8:]), steps=80, lr=5e-3)
    assert painted_error(proxy, some_of(proxy.config, phantoms[:8])) < 0.9


# Shortcut controls ----------------------------------------------------------------------------------


def test_painted_noise_cannot_be_restored():
    draw = crops_of(lambda g: torch.randn(8, 1, *CROP, generator=g))
    proxy = make(**PAINTED)
    train(proxy, draw, steps=30)
    assert painted_error(proxy, draw) > 0.97


def test_noise_that_repeats_itself_can():
    # The cue: one slice of coarse noise, all along D, so that what is painted over shows elsewhere.
    def make_images(generator):
        coarse = torch.randn(8, 1, 1, 4, 4, generator=generator)
        return coarse.repeat_interleave(4, 3).repeat_interleave(4, 4).repeat(1, 1, 16, 1, 1)

    draw = crops_of(make_images)
    proxy = make(**PAINTED)
    train(proxy, draw)
    assert painted_error(proxy, draw) < 0.75


def test_with_targets_of_other_crops_nothing_is_restored(phantoms, monkeypatch):
    def mixed(options, x, rng):
        seen, done = corrupt(options, x, rng)
        return Corrupted(seen.roll(1, 0), done)

    monkeypatch.setattr(models_genesis, "corrupt", mixed)
    proxy = make(flip=0.0)
    history = train(proxy, some_of(proxy.config, phantoms), steps=30)[-10:]
    assert mean(history, "relative_error") > 0.9 * mean(history, "flat_error")


# What is computed -----------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error_in_units_of_each_crops_range(phantoms):
    proxy = make("group", flip=0.0).eval()
    batch = batch_of(proxy.config, phantoms[:5], 0)
    out = proxy(batch, one_group(3, 5))
    seen = corrupt(proxy.config, batch["crop"], one_group(3, 5)).input
    with torch.no_grad():
        restored = proxy.decoder(proxy.encoder(seen), CROP)
    errors, copies = [], []
    for image, spoilt, result in zip(batch["crop"], seen, restored, strict=True):
        scale = max((image.max() - image.min()).item(), 1.0)
        errors.append(((result - image) / scale).square().mean().item())
        copies.append(((spoilt - image) / scale).square().mean().item())
    assert out.loss.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert out.metrics["relative_error"].item() == pytest.approx(
        np.mean(errors) / np.mean(copies), rel=1e-5
    )


def test_the_loss_is_a_mean_over_examples_on_any_number_of_ranks(phantoms):
    proxy = make("group")
    batch = batch_of(proxy.config, phantoms[:6], 0)
    whole = proxy(batch, one_group(1, 6)).loss
    halves = [
        proxy({k: v[list(rows)] for k, v in batch.items()}, BatchRng(1, rows, 6)).loss
        for rows in ((0, 2, 4), (1, 3, 5))
    ]
    assert torch.allclose(whole, torch.stack(halves).mean(), rtol=1e-5)


def test_mirrored_in_training_only(phantoms, monkeypatch):
    targets = []

    def keep(options, x, rng):
        targets.append(x)
        return corrupt(options, x, rng)

    monkeypatch.setattr(models_genesis, "corrupt", keep)
    proxy = make(flip=1.0, mirror="axes")
    batch = batch_of(proxy.config, phantoms[:3], 0)
    proxy.train()(batch, one_group(0, 3))
    proxy.eval()(batch, one_group(0, 3))
    assert torch.equal(targets[0], batch["crop"].flip((2, 3, 4)))
    assert torch.equal(targets[1], batch["crop"])


def test_crops_are_mirrored_as_in_the_released_code():
    """Its loop, typed anew: an axis of (channel, x, y) at a time, up to three times."""
    rng, theirs = np.random.default_rng(0), np.zeros(4)
    cube = np.arange(4).reshape(1, 2, 2, 1)
    for _ in range(40_000):
        flipped, left = cube, 3
        while rng.random() < 0.4 and left > 0:
            flipped, left = np.flip(flipped, axis=rng.choice([0, 1, 2])), left - 1
        theirs[flipped[0, 0, 0, 0]] += 1 / 40_000  # which corner came first
    corner = torch.zeros(10_000, 1, 2, 3, 3)
    corner[:, :, 0, 0, 0] = 1
    drawn = {"crop": corner, "foreground": torch.ones_like(corner[:, 0], dtype=torch.bool)}
    found = make().train()._mirror(drawn, one_group(0, 10_000)).crop.mean((0, 1))
    ours = np.array([found[0, a, b] for a in (0, -1) for b in (0, -1)])
    assert found[1].sum() == 0  # never along z
    assert np.allclose(ours, theirs, atol=0.02) and ours[0] == pytest.approx(0.729, abs=0.02)


def test_a_run_of_before_mirrors_along_all_axes():
    written = {k: v for k, v in to_dict(ModelsGenesisConfig()).items() if k != "mirror"}
    assert from_dict(ModelsGenesisConfig, written, "a run", recorded=True).mirror == "axes"
    assert from_dict(ModelsGenesisConfig, written, "a user's").mirror == "in_turn"


def test_shares_say_which_corruptions_befell_the_batch(phantoms):
    proxy = make(shuffle=1.0, curve=0.0, paint=1.0, outside=1.0)
    metrics = proxy(batch_of(proxy.config, phantoms[:4], 0), one_group(0, 4)).metrics
    assert {k: v.item() for k, v in metrics.items() if k.startswith("share")} == {
        "share_shuffle": 1,
        "share_curve": 0,
        "share_inpaint": 0,
        "share_outpaint": 1,
    }


def test_images_are_restored_too():
    proxy = make(crop=(1, 32, 32))
    x = torch.randn(3, 1, 1, 32, 32)
    out = proxy({"crop": x, "foreground": torch.ones(3, 1, 32, 32, dtype=torch.bool)}, one_group(0, 3))
    assert out.loss.isfinite()


def test_the_picture_shows_input_result_and_original(phantoms):
    proxy = make()
    figure = proxy(batch_of(proxy.config, phantoms[:3], 0), one_group(0, 3)).picture()
    assert len(figure.axes) == 9


@pytest.mark.parametrize("wrong", [{"width": 1}, {"curve": 2.0}, {"crop": (0, 8, 8)}, {"flip": -1.0}])
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ModelsGenesisConfig(**wrong)
