"""SwAV: what it learns, what it must not, its queue, its small crops, and what it keeps."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ssl3d.api import BatchRng, UsageError, default_prototypes, open_data, sinkhorn, swav_loss
from ssl3d.encoders.resnet import ResNet10
from ssl3d.objectives import clustering
from ssl3d.rng import numpy_rng, one_group, seed_of
from ssl3d_proxies.swav import SwAV, small_views

# Weaker than the defaults, so that seconds are enough.
EASY = {"min_overlap": 1.0, "rotate": 5.0, "scale": 0.05, "bias": 0.1, "gamma": 0.1, "contrast": 0.1}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    from ssl3d.data.phantoms import phantom_store

    return open_data([phantom_store(16, shape=(32, 32, 32), folder=tmp_path_factory.mktemp("phantoms"))])


def config_of(**options):
    small = {"crop": (16, 16, 16), "plane": (24, 24), "hidden": 64, "out": 32, "prototypes": 8, "queue": 24}
    return SwAV.Config(**{**small, "freeze": 0.0, "queue_from": 0.0, **options})


def make(config, kind="acs", norm="batch", seed=0):
    torch.manual_seed(seed)
    return SwAV(config, ResNet10(ResNet10.Config(width=8, norm=norm, kind=kind, stem_kernel=3)))


def batch_of(config, data, size, step=0):
    chosen = numpy_rng("which", step).permutation(len(data))[:size]
    batch = default_collate([SwAV.draw(config, data[int(i)], numpy_rng(step, int(i))) for i in chosen])
    return {**batch, "subject": torch.as_tensor(chosen), "index": torch.as_tensor(chosen)}


def train(proxy, draw, steps, lr=3e-3):
    optimizer = torch.optim.AdamW(proxy.parameters(), lr)
    for step in range(steps):
        batch = draw(step)
        out = proxy(batch, one_group(seed_of("step", step), len(batch["a"])))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        proxy.after_step(step, steps)
    return proxy


def held_out(proxy, draw, name="kappa", batches=6):
    """A metric on batches never trained on, in evaluation mode."""
    proxy = copy.deepcopy(proxy).eval()
    with torch.no_grad():
        outs = [proxy(draw(1000 + i), one_group(1000 + i, 12)) for i in range(batches)]
    return float(np.mean([out.metrics[name] for out in outs]))


# Learning and shortcuts ---------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("views", ["volumes", "slices"])
def test_it_learns_on_phantoms(views, phantoms):
    config = config_of(views=views, **EASY)

    def draw(step):
        return batch_of(config, phantoms, 12, step)

    proxy = train(make(config), draw, 40)
    assert held_out(proxy, draw) > 0.45
    assert held_out(proxy, draw, "used") > 4  # of 8: not collapsed


def noise_batch(step, size=12, side=16, cue=0.0):
    """Pairs of crops of pure noise, which share nothing but the cue: a constant of the subject."""
    generator = torch.Generator().manual_seed(step)
    a, b = torch.randn(2, size, 1, 1, side, side, side, generator=generator)
    codes = torch.randint(0, 10**6, (size,), generator=generator)
    offset = cue * torch.linspace(-1, 1, size)[:, None, None, None, None, None]
    return {
        "a": a + offset,
        "b": b + offset,
        "spacing": torch.ones(size, 3),
        "subject": codes,
        "index": codes,
    }


@pytest.mark.long
def test_noise_stays_at_chance_and_a_constant_per_subject_gives_it_away():
    config = config_of(**dict.fromkeys(("rotate", "scale", "contrast", "gamma", "bias"), 0.0))
    found = {}
    for cue in (0.0, 10.0):

        def draw(step, cue=cue):
            return noise_batch(step, cue=cue)

        found[cue] = held_out(train(make(config), draw, 30), draw)
    assert abs(found[0.0]) < 0.15
    assert found[10.0] > 0.5


def test_shuffled_pairs_stay_at_chance(phantoms):
    config = config_of(**EASY)

    def draw(step):
        batch = batch_of(config, phantoms, 12, step)
        return {**batch, "b": batch["b"].roll(1 + step % 11, 0)}

    assert held_out(train(make(config), draw, 30), draw) < 0.2


def test_a_collapsed_network_is_at_chance(phantoms):
    config = config_of()
    proxy = make(config)
    with torch.no_grad():
        for parameter in proxy.encoder.parameters():
            parameter.zero_()
    out = proxy(batch_of(config, phantoms, 6), one_group(0, 6))
    assert (out.metrics["agreement"], out.metrics["chance"], out.metrics["used"]) == (1, 1, 1)
    assert out.metrics["kappa"] == 0


# The loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("small", [0, 2])
def test_the_loss_is_the_papers_on_the_networks_own_scores(small, phantoms):
    config = config_of(small_crops=small, queue=0)
    proxy, seen = make(config).eval(), []
    proxy.prototypes.register_forward_hook(lambda module, inputs, scores: seen.append(scores.detach()))
    out = proxy(batch_of(config, phantoms, 5), one_group(0, 5))
    views = seen[0].unbind(1)
    assert len(views) == 2 + small
    expected = swav_loss(views, [sinkhorn(view, config.epsilon) for view in views[:2]])
    assert torch.allclose(out.loss, expected, atol=1e-6)


def test_prototypes_learn_only_once_they_are_no_longer_frozen(phantoms):
    config = config_of(freeze=0.5)
    proxy = make(config)
    weight, encoder = proxy.prototypes.weight, next(proxy.encoder.parameters())
    for step, learns in ((0, False), (4, False), (5, True)):
        proxy.zero_grad(set_to_none=True)
        proxy(batch_of(config, phantoms, 4), one_group(0, 4)).loss.backward()
        assert encoder.grad.abs().sum() > 0
        assert (weight.grad is not None) == learns
        proxy.after_step(step, 10)
    with torch.no_grad():
        weight *= 3
    proxy.after_step(9, 10)
    assert torch.allclose(weight.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize("options,places", [({"axis": "H"}, 2), ({"plane": (64, 64)}, 1), ({"slab": 9}, 2)])
def test_images_among_sliced_volumes_count_by_their_crops(options, places):
    class Image:
        shape = (1, 1, 32, 64)

    proxy = make(config_of(**{"views": "slices", "plane": (32, 32), **options}, prototypes=0))
    proxy.setup([Image()] * 320)
    assert len(proxy.prototypes) == default_prototypes(320 * places)


@pytest.mark.parametrize(
    "options,places",
    [({}, 4), ({"views": "slices"}, 4), ({"views": "slices", "slab": 12}, 2), ({"crop": (32, 32, 32)}, 1)],
)
def test_prototypes_scale_with_what_there_is_to_see(options, places, phantoms):
    volumes = [*phantoms] * 20  # a list will do: only their shapes are asked for
    proxy = make(config_of(**options, prototypes=0))
    proxy.setup(volumes)
    assert len(proxy.prototypes) == default_prototypes(320 * places) == 32 * places
    given = make(config_of(**options, prototypes=5))
    given.setup(volumes)
    assert len(given.prototypes) == 5


# The queue ----------------------------------------------------------------------------------------


def test_the_queue_holds_the_newest_and_is_used_once_full_and_due(phantoms, monkeypatch):
    config = config_of(queue=10, queue_from=0.2, chance=0.0)
    proxy, balanced = make(config), []
    real = clustering.sinkhorn
    monkeypatch.setattr(
        clustering, "sinkhorn", lambda view, *rest: (balanced.append(len(view)), real(view, *rest))[1]
    )
    projected = []
    proxy.head.register_forward_hook(lambda module, inputs, out: projected.append(out.detach()))
    for step in range(4):
        proxy(batch_of(config, phantoms, 6, step), one_group(step, 6))
        if step != 2:
            proxy.after_step(step, 10)
    # Empty, half full, full and due from .2 on: after_step has seen steps 0 and 1.
    assert balanced == [6, 6, 6, 6, 16, 16, 16, 16]
    newest = projected[-1].unflatten(0, (6, 2))
    assert {tuple(row) for row in proxy.queue[:6, 0].tolist()} == {
        tuple(row) for row in newest[:, 0].tolist()
    }
    assert proxy.queued == 24


def test_looking_leaves_queue_and_progress_alone(phantoms):
    config = config_of()
    proxy = train(make(config), lambda step: batch_of(config, phantoms, 12, step), 3)
    before = {name: value.clone() for name, value in proxy.named_buffers()}
    proxy.eval()(batch_of(config, phantoms, 6, 9), one_group(9, 6))
    assert all(torch.equal(before[name], value) for name, value in proxy.named_buffers())


def test_the_order_of_a_batch_does_not_change_the_queue(phantoms):
    config = config_of(chance=0.0)
    batch = batch_of(config, phantoms, 6)
    queues = []
    for rows in (torch.arange(6), torch.tensor([3, 1, 5, 0, 2, 4])):
        proxy = make(config, norm="group").train()
        proxy.head.eval()
        proxy({name: value[rows] for name, value in batch.items()}, BatchRng(0, rows.tolist(), 6))
        queues.append(proxy.queue)
    assert torch.allclose(*queues, atol=1e-5)


# Views --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "views,shape", [("volumes", (8, 8, 8)), ("slices", (1, 12, 12)), ("images", (1, 8, 8))]
)
def test_small_views_are_half_as_large_and_lie_in_the_large_ones(views, shape, phantoms):
    config = config_of(views="volumes" if views == "images" else views, small_crops=3, chance=0.0, flip=0.0)
    batch = batch_of(config, phantoms, 2)
    if views == "images":
        batch = {**batch, "a": batch["a"][:, :, :, :1], "b": batch["b"][:, :, :, :1]}
    small = small_views(config, batch, one_group(0, 2))
    assert small.shape == (2, 3, 1, *shape)
    for example in range(2):
        for number, side in enumerate("aba"):
            whole = batch[side][example, 0, 0]
            boxes = whole.unfold(0, shape[0], 1).unfold(1, shape[1], 1).unfold(2, shape[2], 1)
            same = (boxes == small[example, number, 0]).all(-1).all(-1).all(-1)
            assert same.any(), (example, side)
    assert not torch.equal(small[:, 0], small[:, 2])


def test_groups_of_several_shapes_share_one_balance(phantoms):
    config = config_of(chance=0.0, small_crops=1)
    proxy = make(config).eval()
    batch = batch_of(config, phantoms, 6)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 6))]
    rngs = [BatchRng(5, range(2), 6), BatchRng(5, range(2, 6), 6)]
    whole, mixed = proxy(batch, one_group(5, 6)), proxy(parts, rngs)
    assert torch.allclose(whole.loss, mixed.loss, rtol=1e-4)
    flat = {**parts[0], "a": parts[0]["a"][:, :, :, :1], "b": parts[0]["b"][:, :, :, :1]}
    out = proxy([flat, parts[1]], rngs)  # two images among the volumes
    assert out.loss.isfinite() and len(out.picture().axes) == 2


def test_parts_of_a_batch_of_single_rows_are_refused(phantoms):
    config = config_of()
    single = batch_of(config, phantoms, 1)
    with pytest.raises(UsageError, match="--batch-size divided by --accumulate must be at least 2, not 1"):
        make(config)(single, BatchRng(0, [0], 4))
    make(config).eval()(single, BatchRng(0, [0], 4))


def test_slices_too_thin_for_the_kernels_are_refused():
    with pytest.raises(UsageError, match="slab is 1, but kernels of kind 3d"):
        make(config_of(views="slices"), kind="3d")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0}, {"epsilon": -1.0}, {"iterations": 0}, {"prototypes": 1}, {"queue": -1},
        {"freeze": 2.0}, {"queue_from": -0.1}, {"small_crops": -1}, {"out": 0},
    ],
)  # fmt: skip
def test_options_out_of_range_name_the_field(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config_of(**wrong)


# Ranks --------------------------------------------------------------------------------------------

QUEUED = '''
import torch

from ssl3d_proxies.swav import SwAV


class Queued(SwAV):
    """SwAV in the middle of a run: with a full queue."""

    def setup(self, data):
        super().setup(data)
        self.queue.copy_(torch.randn(self.queue.shape, generator=torch.Generator().manual_seed(0)))
        self.queued.fill_(99)
'''


def test_ranks_share_the_queue_out(phantoms, tmp_path, monkeypatch):
    import importlib

    from ssl3d.testing import check_ranks

    (tmp_path / "queued_swav.py").write_text(QUEUED, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    queued = importlib.import_module("queued_swav").Queued
    config = config_of(head_norm="layer", queue=9, small_crops=1)  # 9: unequal shares
    check_ranks(queued, config, data=phantoms)
