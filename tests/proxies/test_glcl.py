"""Global and local contrast: both losses, both stages, and what they must not learn."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ssl3d.api import (
    DataError,
    UsageError,
    intensities,
    local_contrast,
    movements,
    open_data,
    region_places,
    regions_at,
    set_contrast,
)
from ssl3d.encoders.resnet import ResNet10
from ssl3d.rng import numpy_rng, one_group, seed_of
from ssl3d_proxies.glcl import GLCL, GLCLConfig

SMALL = {"crop": (32, 32), "local_stride": 2, "negatives": 4, "width": 8, "hidden": 64, "out": 32}


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """data_of(kind): 12 phantoms, of anatomy or of noise alone."""
    from ssl3d.data.phantoms import phantom_store

    folder = tmp_path_factory.mktemp("phantoms")
    return lambda kind="plain": open_data([phantom_store(12, shape=(32, 32, 32), folder=folder, kind=kind)])


def make(config, seed=0):
    torch.manual_seed(seed)
    encoder = ResNet10(ResNet10.Config(width=8, kind="acs", stem_kernel=3, stem_stride=(1, 1, 1)))
    return GLCL(config, encoder)


def batch_of(config, data, size, step=0):
    chosen = numpy_rng("which", step).permutation(len(data))[:size]
    batch = default_collate([GLCL.draw(config, data[int(i)], numpy_rng(step, int(i))) for i in chosen])
    codes = {"index": torch.as_tensor(chosen), "subject": torch.as_tensor(data.subject_codes[chosen])}
    return {**batch, **codes}


def train(proxy, draw, steps):
    optimizer = torch.optim.AdamW([p for p in proxy.parameters() if p.requires_grad], 3e-3)
    history = []
    for step in range(steps):
        batch = draw(step)
        out = proxy(batch, one_group(seed_of("step", step), len(batch["slabs"])))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        proxy.after_step(step + 1, steps)
        history.append({"loss": out.loss.item(), **{k: v.item() for k, v in out.metrics.items()}})
    return history


def mean(history, name):
    return float(np.mean([step[name] for step in history]))


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# The losses ---------------------------------------------------------------------------------------


def published_global(z, part, volume, temperature, across):
    """Equation 1 of Chaitanya et al., pair by pair: z (N, F), two views of each slice among them."""
    losses = []
    for i in range(len(z)):
        far = sum(math.exp(cosine(z[i], z[k]) / temperature) for k in range(len(z)) if part[k] != part[i])
        for j in range(len(z)):
            same = part[j] == part[i] and (across or volume[j] == volume[i])
            if j != i and same:
                near = math.exp(cosine(z[i], z[j]) / temperature)
                losses.append(-math.log(near / (near + far)))
    return float(np.mean(losses))


@pytest.mark.parametrize("across", [True, False], ids=["G^D", "G^D-"])
def test_the_global_loss_is_the_published_one(across):
    z = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    part = torch.arange(4).repeat(3).repeat_interleave(2)
    volume = torch.arange(3).repeat_interleave(8)
    proxy = make(GLCLConfig(**SMALL, across=across))
    keys = torch.stack([part, volume, volume], 1).float()
    loss = set_contrast(z, keys, proxy._relate, 0.1, rivals=False).loss
    expected = published_global(z.numpy(), part.numpy(), volume.numpy(), 0.1, across)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def published_local(a, b, negatives, temperature):
    """Equation 3 of Chaitanya et al., region by region: a, b (P, A, F)."""
    losses = []
    for x, y in ((a, b), (b, a)):
        for p in range(len(x)):
            for i in range(x.shape[1]):
                near = math.exp(cosine(x[p, i], y[p, i]) / temperature)
                far = sum(
                    math.exp(cosine(x[p, i], other[p, k]) / temperature)
                    for k in negatives[i]
                    for other in (x, y)
                )
                losses.append(-math.log(near / (near + far)))
    return float(np.mean(losses))


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_the_local_loss_is_the_published_one(temperature):
    a, b = torch.randn(2, 3, 13, 6, generator=torch.Generator().manual_seed(2))
    _, negatives = region_places((24, 24), 3, 5)
    loss = local_contrast(a, b, negatives, temperature).loss
    expected = published_local(a.numpy(), b.numpy(), negatives.tolist(), temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_regions_of_other_volumes_are_positives_where_asked():
    proxy = make(GLCLConfig(**SMALL, local_across=True))
    regions = torch.randn(4, 2, 13, 6, generator=torch.Generator().manual_seed(3))
    keys = torch.tensor([[0.0, 7, 7], [1, 7, 7], [0, 8, 8], [1, 8, 8]])  # two volumes of two parts
    pairs = [(n, 0, n, 1) for n in range(4)]
    pairs += [(n, v, (n + 2) % 4, w) for n in range(4) for v in (0, 1) for w in (0, 1)]
    a = torch.stack([regions[n, v] for n, v, _, _ in pairs]).numpy()
    b = torch.stack([regions[m, w] for _, _, m, w in pairs]).numpy()
    expected = published_local(a, b, proxy.negatives.tolist(), 0.1)
    assert proxy._local(regions, keys).loss.item() == pytest.approx(expected, rel=1e-5)


# Regions ------------------------------------------------------------------------------------------


def test_negatives_are_apart():
    places, negatives = region_places((24, 40), 3, 5)
    assert len(set(places)) == 13 and max(places) == (21, 37)
    for (y, x), others in zip(places, negatives.tolist(), strict=True):
        assert len(set(others)) == 5
        assert all(max(abs(places[k][0] - y), abs(places[k][1] - x)) >= 3 for k in others)


@pytest.mark.parametrize("sides", [(2, 2), (5, 5), (6, 40)])
def test_a_map_without_room_is_refused_with_both_numbers(sides):
    with pytest.raises(
        UsageError, match=rf"map of {sides[0]} x {sides[1]} cells \d+ regions.* 12 negatives"
    ):
        region_places(sides, 3, 12)


def test_regions_are_cut_at_their_places():
    maps = torch.randn(2, 3, 9, 11)
    cut = regions_at(maps, [(0, 0), (4, 7)], 3)
    assert torch.equal(cut[1, 1].view(3, 3, 3), maps[1, :, 4:7, 7:10].permute(1, 2, 0))


def test_both_views_of_a_local_pair_show_the_same_places(data_of):
    config = GLCLConfig(**SMALL, chance=1.0, noise=0.0, blur=0.0, gamma=0.0, bias=0.0)
    proxy, batch = make(config), batch_of(config, data_of(), 3)
    a, b = proxy._recoloured(batch, one_group(0, 3)).flatten(0, 0).flatten(2).unbind(1)
    assert not torch.allclose(a, b)
    a, b = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (a, b))
    assert torch.allclose(a, b, atol=1e-3)  # a change of contrast alone is between them
    seen = proxy._views(batch, one_group(0, 3)).flatten(2)
    seen = (seen - seen.mean(2, keepdim=True)) / seen.std(2, keepdim=True)
    assert not torch.allclose(seen[:, 0], seen[:, 1], atol=0.1)  # those of the global pair are moved apart
    assert movements(config).contrast == 0 and intensities(config).rotate == 0


# Drawing and stages -------------------------------------------------------------------------------


@pytest.mark.parametrize("slab", [1, 3])
def test_each_part_gives_one_slab(slab, data_of):
    config = GLCLConfig(**SMALL, slab=slab, chance=0.0)
    volume = data_of()[0]
    whole = volume.read()[0]
    for seed in range(5):
        drawn = GLCL.draw(config, volume, numpy_rng(seed))["slabs"]
        for part, piece in enumerate(drawn):
            starts = [z for z in range(33 - slab) if torch.equal(whole[z : z + slab], piece[0])]
            room = 33 - slab
            assert any(part * room // 4 <= z < (part + 1) * room // 4 for z in starts)


def test_a_volume_of_few_slices_is_refused():
    class Thin:
        id, shape = "thin", (1, 3, 32, 32)

    with pytest.raises(
        DataError, match="thin: 3 slices along D hold 3 slabs, and each of 4 parts needs one"
    ):
        GLCL.draw(GLCLConfig(**SMALL), Thin(), numpy_rng(0))


def test_the_encoder_is_trained_first_and_then_the_decoder(data_of):
    config, data = GLCLConfig(**SMALL, global_share=0.5), data_of()
    proxy = make(config)

    def gradients(local):
        proxy.local_stage.fill_(local)
        proxy.zero_grad()
        proxy.train()
        before = {name: value.clone() for name, value in proxy.encoder.named_buffers()}
        proxy(batch_of(config, data, 4), one_group(0, 4)).loss.backward()
        kept = all(torch.equal(before[name], value) for name, value in proxy.encoder.named_buffers())
        return {
            part: any(p.grad is not None and p.grad.any() for p in getattr(proxy, part).parameters())
            for part in ("encoder", "head", "decoder", "voxel_head", "region_head")
        }, kept

    first, kept = gradients(False)
    assert first == {
        "encoder": True,
        "head": True,
        "decoder": False,
        "voxel_head": False,
        "region_head": False,
    }
    assert not kept
    then, kept = gradients(True)
    assert then == {
        "encoder": False,
        "head": False,
        "decoder": True,
        "voxel_head": True,
        "region_head": True,
    }
    assert kept and proxy.encoder.training  # fixed, its statistics too, and left as it was
    proxy.local_stage.fill_(False)
    for step, local in ((4, False), (5, True), (6, True)):
        proxy.after_step(step, 10)
        assert bool(proxy.local_stage) is local


def test_jointly_the_loss_is_the_sum_of_both(data_of):
    config, data = GLCLConfig(**SMALL, schedule="joint", local_weight=0.3), data_of()
    out = make(config)(batch_of(config, data, 4), one_group(0, 4))
    expected = out.metrics["global_loss"] + 0.3 * out.metrics["local_loss"]
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_steps_of_the_decoder_beyond_the_regions_are_left_alone():
    proxy = make(GLCLConfig(**SMALL))
    names = {name for name, p in proxy.decoder.named_parameters() if p.requires_grad}
    fine = len(proxy.decoder.path) - 1
    assert proxy.decoder.path[-2:] == [(2, 2, 2), (1, 1, 1)]
    assert not any(name.startswith(("out", "stem", f"mixes.{fine}", f"convs.{fine}")) for name in names)
    assert any(name.startswith(f"convs.{fine - 1}") for name in names)
    with pytest.raises(UsageError, match="local_stride is 64, the decoder's coarsest map has stride"):
        make(GLCLConfig(**{**SMALL, "local_stride": 64}))


@pytest.mark.parametrize(
    "options",
    [{"partitions": 1}, {"global_share": 1.5}, {"temperature": 0.0}, {"local_weight": -1.0}, {"width": 1}],
)
def test_odd_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GLCLConfig(**{**SMALL, **options})


# Learning -----------------------------------------------------------------------------------------


def test_it_learns_parts_and_places_of_phantoms(data_of):
    config, data = GLCLConfig(**SMALL), data_of()
    history = train(make(config), lambda step: batch_of(config, data, 8, step), 50)
    assert mean(history[18:25], "accuracy") > 1.5 * mean(history[18:25], "chance")
    assert mean(history[18:25], "loss") < mean(history[:4], "loss")
    assert mean(history[-5:], "local_loss") < 0.8 * mean(history[25:28], "local_loss")
    assert mean(history[-5:], "local_accuracy") > 0.3


def test_noise_has_no_parts(data_of):
    config, data = GLCLConfig(**SMALL, global_share=1.0), data_of("noise")
    history = train(make(config), lambda step: batch_of(config, data, 8, step), 40)[-20:]
    assert mean(history, "accuracy") == pytest.approx(mean(history, "chance"), abs=0.12)


def test_shuffled_parts_stay_at_chance(data_of):
    config, data = GLCLConfig(**SMALL, global_share=1.0), data_of()

    def draw(step):
        batch = batch_of(config, data, 8, step)
        order = torch.rand(8, 4, generator=torch.Generator().manual_seed(step)).argsort(1)
        rows = torch.arange(8).unsqueeze(1)
        return {**batch, "slabs": batch["slabs"][rows, order]}

    history = train(make(config), draw, 40)[-20:]
    assert mean(history, "accuracy") == pytest.approx(mean(history, "chance"), abs=0.12)
