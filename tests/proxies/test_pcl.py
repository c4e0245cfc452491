"""Positional contrastive learning: its loss, where positions come from, and what it must not learn."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

import ssl3d
from ssl3d.api import DataError, UsageError, draw_positions, load_proxies, open_data, set_contrast
from ssl3d.encoders.resnet import ResNet10
from ssl3d.rng import numpy_rng, one_group, seed_of
from ssl3d_proxies.pcl import PCL, PCLConfig

SMALL = {"crop": (32, 32), "slices": 3, "threshold": 0.15, "hidden": 64, "out": 32}


COMMON = {
    "batch_size": 4,
    "encoder": "resnet10",
    "resnet10": {"width": 8, "kind": "acs", "stem_kernel": 3},
    "eval_every": -1,
    "workers": 0,
    "threads": 1,
}


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """data_of(kind): 16 phantoms, of anatomy or of noise alone."""
    from ssl3d.data.phantoms import phantom_store

    folder = tmp_path_factory.mktemp("phantoms")
    return lambda kind="": open_data(
        [phantom_store(16, shape=(32, 32, 32), folder=folder, **({"kind": kind} if kind else {}))]
    )


def make(config, seed=0):
    torch.manual_seed(seed)
    return PCL(config, ResNet10(ResNet10.Config(width=8, kind="acs", stem_kernel=3)))


def batch_of(config, data, size, step=0):
    chosen = numpy_rng("which", step).permutation(len(data))[:size]
    batch = default_collate([PCL.draw(config, data[int(i)], numpy_rng(step, int(i))) for i in chosen])
    return {**batch, "subject": torch.as_tensor(data.subject_codes[chosen])}


def train(proxy, draw, steps):
    optimizer = torch.optim.AdamW(proxy.parameters(), 3e-3)
    history = []
    for step in range(steps):
        batch = draw(step)
        out = proxy(batch, one_group(seed_of("step", step), len(batch["slabs"])))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append({"loss": out.loss.item(), **{k: v.item() for k, v in out.metrics.items()}})
    return history


def mean(history, name):
    return float(np.mean([step[name] for step in history]))


# The loss -----------------------------------------------------------------------------------------


def published(features, positions, threshold, temperature):
    """Equation 2 of Zeng et al., one view at a time: features (N, 2, F), positions (N,)."""
    z = np.concatenate([features[:, 0], features[:, 1]])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    at = np.tile(positions, 2)
    losses = []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        below = sum(math.exp(z[i] @ z[k] / temperature) for k in others)
        positives = [k for k in others if abs(at[k] - at[i]) < threshold]
        losses.append(np.mean([-math.log(math.exp(z[i] @ z[k] / temperature) / below) for k in positives]))
    return float(np.mean(losses))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("threshold", [0.05, 0.35, 0.9])
def test_the_loss_is_the_published_one(threshold, temperature):
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(7, 2, 5, generator=generator)
    position = torch.tensor([0.0, 0.1, 0.13, 0.5, 0.5, 0.72, 1.0])
    proxy = make(PCLConfig(**{**SMALL, "threshold": threshold, "temperature": temperature}))
    group = {"position": position.view(7, 1), "subject": torch.arange(7)}
    keys = proxy._keys(group).repeat_interleave(2, 0)
    loss = set_contrast(features.flatten(0, 1), keys, proxy._relate, temperature).loss
    expected = published(features.numpy(), position.numpy(), threshold, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_forward_hands_every_view_its_own_position(data_of):
    config = PCLConfig(**SMALL, chance=0.0)
    proxy, batch = make(config).eval(), batch_of(config, data_of(), 4)
    out = proxy(batch, one_group(0, 4))
    with torch.no_grad():  # without augmentation both views are the slab itself
        z = proxy.head(proxy.encoder.embed(batch["slabs"].flatten(0, 1)))
    features = torch.stack([z, z], 1).numpy()
    expected = published(features, batch["position"].flatten().numpy(), config.threshold, 0.1)
    assert out.loss.item() == pytest.approx(expected, rel=1e-4)


# Positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["D", "W"])
def test_positions_are_shares_of_the_length(axis, data_of):
    config = PCLConfig(**SMALL, slab=3, axis=axis)
    volume = data_of()[0]
    drawn = PCL.draw(config, volume, numpy_rng(5))
    starts = draw_positions(volume, "DHW".index(axis), 3, numpy_rng(5), slab=3)
    assert drawn["position"].numpy() == pytest.approx((starts + 1.5) / 32)
    assert drawn["slabs"].shape[:3] == (3, 1, 3)


def test_one_slice_has_no_position(data_of):
    class Image:
        id, shape = "picture", (1, 1, 32, 32)

    with pytest.raises(DataError, match="picture: has one slice along D"):
        PCL.draw(PCLConfig(**SMALL), Image(), numpy_rng(0))


@pytest.fixture(scope="module")
def sorted_run(tmp_path_factory, data_of):
    return ssl3d.pretrain(
        "sorting",
        str(data_of().stores[0].path),
        tmp_path_factory.mktemp("sorting") / "run",
        steps=40,
        sorting={"crop": [32, 32], "slices": 5},
        **{**COMMON, "batch_size": 8},
    )


def test_sorting_scores_are_positions_where_asked(sorted_run, data_of):
    run = str(sorted_run.folder)
    config = PCLConfig(**SMALL, sorted_by=run)
    data = data_of()
    sorter = load_proxies(run)["sorting"]
    places, scores = sorter.profile(data[2], 0, 32)
    drawn = PCL.draw(config, data[2], numpy_rng(1))
    starts = draw_positions(data[2], 0, 3, numpy_rng(1))
    expected = [scores[list(places).index(start)] for start in starts]
    assert drawn["position"].numpy() == pytest.approx(np.array(expected), abs=1e-4)

    proxy = make(config)
    groups = [[batch_of(config, data, 8, step)] for step in range(6)]
    proxy.start_epoch(0, groups)
    first = proxy.quantiles.clone()
    raw = torch.cat([group[0]["position"].flatten() for group in groups])
    keys = torch.cat([proxy._keys(group[0])[:, 0] for group in groups])
    assert keys.min() >= 0 and keys.max() <= 1
    assert torch.equal(keys[raw.argsort()], keys.sort().values)  # in the order of the scores
    assert abs(keys.median().item() - 0.5) < 0.1  # and evenly spread, as quantiles are
    proxy.start_epoch(1, [])
    assert torch.equal(proxy.quantiles, first)  # once


def test_what_the_sorting_run_saw_counts_as_seen(sorted_run, data_of, tmp_path):
    options = {key: list(v) if isinstance(v, tuple) else v for key, v in SMALL.items()}
    other = str(data_of("noise").stores[0].path)
    plain = ssl3d.pretrain("pcl", other, tmp_path / "plain", pcl=options, steps=2, **COMMON)
    options["sorted_by"] = str(sorted_run.folder)
    by = ssl3d.pretrain("pcl", other, tmp_path / "sorted", pcl=options, steps=2, **COMMON)
    seen, more = (set(run.encoder.metadata["identities"]) for run in (plain, by))
    teacher = set(sorted_run.encoder.metadata["identities"])
    assert more == seen | teacher and teacher - seen


def test_a_run_that_does_not_sort_is_refused(sorted_run, tmp_path):
    config = PCLConfig(**SMALL, sorted_by=str(sorted_run.folder), axis="W")
    with pytest.raises(UsageError, match="sorts along D, and slices are drawn along W"):
        make(config)
    with pytest.raises(ssl3d.errors.Ssl3dError, match="nowhere"):
        make(PCLConfig(**SMALL, sorted_by=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"threshold": 1.0}, {"temperature": 0.0}, {"slices": 0}, {"slab": 0}]
)
def test_odd_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PCLConfig(**{**SMALL, **options})


# Learning -----------------------------------------------------------------------------------------


def test_it_learns_positions_of_phantoms(data_of):
    config, data = PCLConfig(**SMALL), data_of()
    history = train(make(config), lambda step: batch_of(config, data, 10, step), 50)
    assert mean(history[-10:], "loss") < mean(history[:5], "loss")
    assert mean(history[-10:], "accuracy") > 1.5 * mean(history[-10:], "chance")


def test_noise_has_no_position(data_of):
    config, data = PCLConfig(**SMALL), data_of("noise")
    history = train(make(config), lambda step: batch_of(config, data, 10, step), 50)[-25:]
    assert mean(history, "accuracy") == pytest.approx(mean(history, "chance"), abs=0.12)


def test_shuffled_positions_stay_at_chance(data_of):
    config, data = PCLConfig(**SMALL), data_of()

    def draw(step):
        batch = batch_of(config, data, 10, step)
        position = batch["position"].flatten()
        order = torch.randperm(len(position), generator=torch.Generator().manual_seed(step))
        return {**batch, "position": position[order].view_as(batch["position"])}

    history = train(make(config), draw, 40)[-20:]
    assert mean(history, "accuracy") == pytest.approx(mean(history, "chance"), abs=0.12)
