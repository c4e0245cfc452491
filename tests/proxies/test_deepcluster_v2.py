"""DeepCluster-v2: its places, its bank, when it clusters, what it learns and what it must not."""

import copy
import io

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

from ssl3d.api import BatchRng, DataError, default_prototypes, open_data
from ssl3d.encoders.resnet import ResNet10
from ssl3d.rng import numpy_rng, one_group, seed_of
from ssl3d_proxies.deepcluster_v2 import DeepClusterV2

# Weaker than the defaults, so that seconds are enough.
EASY = {"min_overlap": 1.0, "rotate": 5.0, "scale": 0.05, "bias": 0.1, "gamma": 0.1, "contrast": 0.1}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    from ssl3d.data.phantoms import phantom_store

    return open_data([phantom_store(16, shape=(32, 32, 32), folder=tmp_path_factory.mktemp("phantoms"))])


def config_of(**options):
    small = {"crop": (16, 16, 16), "plane": (24, 24), "hidden": 64, "out": 32, "per_volume": 2, "every": 10}
    return DeepClusterV2.Config(**{**small, **options})


def make(config, data=(), kind="acs", norm="batch", seed=0):
    torch.manual_seed(seed)
    encoder = ResNet10(ResNet10.Config(width=8, norm=norm, kind=kind, stem_kernel=3))
    proxy = DeepClusterV2(config, encoder)
    proxy.setup(data)
    return proxy


def batch_of(config, volumes, step=0):
    drawn = [DeepClusterV2.draw(config, volume, numpy_rng(step, volume.index)) for volume in volumes]
    codes = torch.tensor([volume.index for volume in volumes])
    return {**default_collate(drawn), "subject": codes, "index": codes}


def rounds(config, data, size=8, step=0):
    """What `start_epoch` iterates over: every volume once."""
    volumes = list(data)
    return [[batch_of(config, volumes[i : i + size], step)] for i in range(0, len(volumes), size)]


def train(proxy, epoch, steps, lr=3e-3):
    """Trains on `epoch(number)`, lists of batches of one group; clusters before each."""
    optimizer = torch.optim.AdamW(proxy.parameters(), lr)
    step = 0
    for number in range(steps):
        batches = epoch(number)
        torch.manual_seed(seed_of("epoch", number))
        proxy.start_epoch(number, batches)
        for groups in batches:
            if step == steps:
                return proxy
            out = proxy(groups, [one_group(seed_of("step", step), len(groups[0]["a"]))])
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            proxy.after_step(step, steps)
            step += 1
    return proxy


def held_out(proxy, batches, name="kappa"):
    """A metric on examples never trained on, whose volumes the bank does not know."""
    proxy = copy.deepcopy(proxy).eval()
    with torch.no_grad():
        outs = [
            proxy(
                [{**group, "index": group["index"] + 10**6} for group in groups],
                [one_group(i, len(groups[0]["a"]))],
            )
            for i, groups in enumerate(batches)
        ]
    return float(np.mean([out.metrics[name] for out in outs]))


# Learning and shortcuts ---------------------------------------------------------------------------


@pytest.mark.parametrize("views", ["volumes", "slices"])
def test_it_learns_on_phantoms(views, phantoms):
    config = config_of(views=views, **EASY)
    known, unknown = phantoms[:12], phantoms[12:]
    proxy = make(config, known)
    proxy = train(proxy, lambda number: rounds(config, known, 6, number), 40)
    out = proxy(batch_of(config, list(known), 999), one_group(999, 12))
    assert out.metrics["kappa"] > 0.45  # of the clusters in the bank, from new views
    assert out.metrics["used"] > 4
    assert 0.2 < out.metrics["stability"] <= 1
    assert held_out(proxy, [[batch_of(config, list(unknown), i)] for i in range(4)]) > 0.3


def noise_rounds(number, cue, count=24, side=16):
    """Views of pure noise, new at every visit, plus a constant of the volume, the cue."""
    batches = []
    for start in (0, count // 2):
        generator = torch.Generator().manual_seed(number * 100 + start)
        index = torch.arange(start, start + count // 2)
        a, b = torch.randn(2, count // 2, 1, 1, side, side, side, generator=generator)
        offset = cue * (index / count * 2 - 1)[:, None, None, None, None, None]
        spacing = torch.ones(count // 2, 3)
        batches.append(
            [{"a": a + offset, "b": b + offset, "spacing": spacing, "subject": index, "index": index}]
        )
    return batches


def test_noise_stays_at_chance_and_a_constant_per_volume_gives_it_away():
    still = dict.fromkeys(("rotate", "scale", "contrast", "gamma", "bias"), 0.0)
    config = config_of(**still, per_volume=1, every=4)
    found = {}
    for cue in (0.0, 10.0):
        proxy = make(config)
        proxy._size(torch.arange(24))
        train(proxy, lambda number, cue=cue: noise_rounds(number, cue), 24)
        new = noise_rounds(777, cue)
        found[cue] = (
            held_out(proxy, new),
            float(proxy(new[0], [one_group(0, 12)]).metrics["kappa"]),
        )
    assert abs(found[0.0][0]) < 0.2 and abs(found[0.0][1]) < 0.2
    assert min(found[10.0]) > 0.5


def test_shuffled_assignments_stay_at_chance(phantoms):
    config = config_of(**EASY, every=1)

    def epoch(number):
        batches = rounds(config, phantoms, 8, number)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(number))
        return [[{**group, "index": order[group["index"]]}] for (group,) in batches]

    proxy = train(make(config, phantoms), epoch, 24)
    assert proxy(epoch(99)[0], [one_group(0, 8)]).metrics["kappa"] < 0.2


def test_a_collapsed_network_is_at_chance(phantoms):
    config = config_of()
    proxy = make(config, phantoms)
    with torch.no_grad():
        for parameter in proxy.encoder.parameters():
            parameter.zero_()
    proxy.start_epoch(0, rounds(config, phantoms))
    out = proxy(batch_of(config, list(phantoms)), one_group(0, 16))
    assert out.metrics["accuracy"] == 1 and out.metrics["kappa"] == 0
    assert out.metrics["used"] == pytest.approx(1.0)


# The loss -----------------------------------------------------------------------------------------


def test_the_loss_is_the_authors(phantoms):
    config = config_of(heads=3, chance=0.0, flip=0.0)
    proxy = make(config, phantoms, norm="group")
    proxy.head.eval()
    proxy.start_epoch(0, rounds(config, phantoms))
    projected = []
    proxy.head.register_forward_hook(lambda module, inputs, out: projected.append(out.detach()))
    batch = batch_of(config, list(phantoms)[3:7], 5)
    out = proxy(batch, one_group(5, 4))
    z = F.normalize(projected[-1].unflatten(0, (8, 2)), dim=2)
    items = torch.tensor([[2 * v, 2 * v + 1] for v in batch["index"]]).flatten()
    rows = torch.searchsorted(proxy.bank.codes, items)
    loss = 0.0
    for head in range(3):
        scores = torch.cat([z[:, 0], z[:, 1]]) @ proxy.prototypes[head].T
        loss += F.cross_entropy(scores / 0.1, proxy.assignments[head, rows].repeat(2))
    assert torch.allclose(out.loss, loss / 3, atol=1e-5)
    # Each head's clusters are of its own view's bank: heads 0 and 2 of the first, head 1 of the second.
    for head in range(3):
        known = proxy.bank.features[head % 2].clone()
        fresh = copy.deepcopy(proxy)
        fresh.start_epoch(0, rounds(config, phantoms))
        nearest = (known @ proxy.prototypes[head].T).argmax(1)
        kept = torch.ones(len(known), dtype=torch.bool)
        kept[rows] = False  # written since
        assert torch.equal(nearest[kept], proxy.assignments[head][kept])


def test_before_the_first_clustering_there_is_nothing_to_learn(phantoms):
    proxy = make(config_of(), phantoms)
    out = proxy(batch_of(proxy.config, list(phantoms)[:4]), one_group(0, 4))
    assert out.loss == 0 and out.loss.requires_grad
    out.loss.backward()
    assert all(metric.isfinite() for metric in out.metrics.values())
    assert out.picture() is not None


def test_volumes_that_the_bank_does_not_know_are_left_out(phantoms):
    config = config_of(chance=0.0)
    proxy = make(config, phantoms[:8], norm="group")
    proxy.head.eval()
    proxy.start_epoch(0, rounds(config, phantoms[:8]))
    both = batch_of(config, list(phantoms)[6:10])
    known = {name: value[:2] for name, value in both.items()}
    losses = [proxy(batch, BatchRng(0, range(len(batch["a"])), 4)).loss for batch in (both, known)]
    assert torch.allclose(*losses, atol=1e-5)


def test_held_out_subjects_are_judged_by_their_other_view(phantoms):
    proxy = make(config_of(), phantoms[:8])
    proxy.start_epoch(0, rounds(proxy.config, phantoms[:8]))
    before = {name: value.clone() for name, value in proxy.named_buffers()}
    proxy.eval()
    first = torch.tensor([[[0, 1]], [[2, 3]], [[4, 5]]])  # heads, one pair, views
    targets = proxy._targets(first, torch.tensor([77]))
    assert targets.tolist() == [[[-100, 0]], [[3, -100]], [[-100, 4]]]
    out = proxy(batch_of(proxy.config, list(phantoms)[8:]), one_group(0, 8))
    assert out.loss > 0 and out.metrics["chance"] < 1
    assert all(torch.equal(before[name], value) for name, value in proxy.named_buffers())


# Bank and clustering ------------------------------------------------------------------------------


def test_the_first_pass_fills_the_bank_and_steps_refresh_it(phantoms):
    config = config_of()
    proxy = make(config, phantoms)
    assert len(proxy.bank) == 32 and proxy.prototypes.shape == (3, default_prototypes(32), 32)
    proxy.start_epoch(0, rounds(config, phantoms))
    assert proxy.bank.filled.all()
    before = proxy.bank.features.clone()
    proxy(batch_of(config, list(phantoms)[:3], 1), one_group(1, 3))
    changed = (proxy.bank.features != before).any(2).all(0)
    assert changed.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_it_clusters_anew_only_after_enough_steps(phantoms):
    config = config_of(every=3)
    proxy = make(config, phantoms)
    data, clustered = rounds(config, phantoms), []
    for epoch in range(5):
        before = proxy.prototypes.clone()
        proxy.start_epoch(epoch, data)
        clustered.append(not torch.equal(before, proxy.prototypes))
        for step in range(2):
            proxy.after_step(step, 100)
    assert clustered == [True, False, True, False, True]


def test_more_clusters_than_places_are_taken_as_far_as_they_go(phantoms):
    config = config_of(prototypes=50)
    proxy = make(config, phantoms[:3])
    proxy.start_epoch(0, rounds(config, phantoms[:3]))
    assert proxy.assignments.max() < 6
    assert proxy(batch_of(config, list(phantoms)[:3]), one_group(0, 3)).loss.isfinite()


def test_a_run_cut_in_the_middle_of_an_epoch_goes_on_with_the_same_bytes(phantoms):
    config = config_of(every=2)
    data = rounds(config, phantoms)

    def go_on(proxy, epochs):
        optimizer = torch.optim.SGD(proxy.parameters(), 0.05)
        for epoch in epochs:
            torch.manual_seed(epoch)
            proxy.start_epoch(epoch, data)
            for step, groups in enumerate(data):
                proxy(groups, [one_group(epoch * 10 + step, 8)]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                proxy.after_step(step, 10)
        return proxy

    first = go_on(make(config, phantoms), [0])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(config, phantoms, seed=9)
    second.load_state_dict(torch.load(file, weights_only=True))
    for one in (first, second):
        go_on(one, [1, 2])
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


# Places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views,axis", [("volumes", "D"), ("slices", "D"), ("slices", "W")])
def test_places_stay_where_they_are_and_views_move_around_them(views, axis, phantoms):
    options = {"chance": 0.0, "flip": 0.0, "views": views, "axis": axis, "plane": (16, 16)}
    still = config_of(**options, min_overlap=1.0)
    first, again = (DeepClusterV2.draw(still, phantoms[0], numpy_rng(seed)) for seed in (0, 1))
    assert torch.equal(first["a"], again["a"]) and torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"][0], first["a"][1])  # two places
    assert first["spacing"][0] == pytest.approx(
        phantoms[0].spacing["DHW".index(axis if views == "slices" else "D")]
    )
    other = DeepClusterV2.draw(still, phantoms[1], numpy_rng(0))
    assert not torch.equal(first["a"], other["a"])
    moved = config_of(**options, min_overlap=0.5)
    views_of_it = [DeepClusterV2.draw(moved, phantoms[0], numpy_rng(seed))["a"][0] for seed in range(6)]
    assert any(not torch.equal(view, views_of_it[0]) for view in views_of_it)
    # Every view of a place shares at least half of each side with every other: the middle is in all.
    if views == "volumes":
        middle = first["a"][0, 0, 6:10, 6:10, 6:10]
        for view in views_of_it:
            boxes = view[0].unfold(0, 4, 1).unfold(1, 4, 1).unfold(2, 4, 1)
            assert (boxes == middle).all(-1).all(-1).all(-1).any()


def test_a_volume_without_room_for_its_places_is_refused_by_name(phantoms):
    with pytest.raises(DataError, match="40 slabs of 1 slices"):
        DeepClusterV2.draw(config_of(views="slices", per_volume=40), phantoms[0], numpy_rng(0))


def test_images_are_clustered_with_the_volumes(phantoms):
    config = config_of(chance=0.0)
    proxy = make(config, phantoms[:8]).eval()
    parts = [batch_of(config, list(phantoms)[:3]), batch_of(config, list(phantoms)[3:8])]
    parts[0] = {**parts[0], "a": parts[0]["a"][:, :, :, :1], "b": parts[0]["b"][:, :, :, :1]}
    proxy.start_epoch(0, [parts])
    assert proxy.bank.filled.all()
    out = proxy.train()(parts, [BatchRng(5, range(3), 8), BatchRng(5, range(3, 8), 8)])
    assert out.loss.isfinite() and len(out.picture().axes) == 6


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0.0}, {"prototypes": 1}, {"heads": 0}, {"every": 0}, {"iterations": 0}, {"out": 0}],
)
def test_options_out_of_range_name_the_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config_of(**wrong)
