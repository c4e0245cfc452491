"""SimCLR and Barlow Twins: what they learn, what they must not, and that ranks agree with one process."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ssl3d.api import BatchRng, DataError, UsageError, draw_pairs, draw_places, open_data
from ssl3d.config import to_dict
from ssl3d.encoders.resnet import ResNet10
from ssl3d.rng import numpy_rng, one_group, seed_of
from ssl3d_proxies.barlow_twins import BarlowTwins
from ssl3d_proxies.simclr import SimCLR

PROXIES = [SimCLR, BarlowTwins]
SMALL = {SimCLR: {"hidden": 64, "out": 32}, BarlowTwins: {"hidden": 64, "out": 64}}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    from ssl3d.data.phantoms import phantom_store

    return open_data([phantom_store(16, shape=(32, 32, 32), folder=tmp_path_factory.mktemp("phantoms"))])


def config_of(cls, **options):
    return cls.Config(**{**SMALL[cls], "crop": (16, 16, 16), "plane": (24, 24), **options})


def make(cls, config, norm="batch", kind="acs", seed=0):
    torch.manual_seed(seed)
    encoder = ResNet10(ResNet10.Config(width=8, norm=norm, kind=kind, stem_kernel=3))
    return cls(config, encoder)


def batch_of(cls, config, data, size, step=0):
    chosen = numpy_rng("which", step).permutation(len(data))[:size]
    batch = default_collate([cls.draw(config, data[int(i)], numpy_rng(step, int(i))) for i in chosen])
    codes = data.subject_codes[chosen]
    return {**batch, "subject": torch.as_tensor(codes)}


def train(proxy, draw, steps, lr=3e-3):
    optimizer = torch.optim.AdamW(proxy.parameters(), lr)
    history = []
    for step in range(steps):
        batch = draw(step)
        out = proxy(batch, one_group(seed_of("step", step), len(batch["a"])))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append({"loss": out.loss.item(), **{k: v.item() for k, v in out.metrics.items()}})
    return history


def mean(history, name):
    return float(np.mean([step[name] for step in history]))


# Weaker than the defaults, so that seconds are enough.
EASY = {"min_overlap": 1.0, "rotate": 10.0, "scale": 0.1, "bias": 0.1, "gamma": 0.2, "contrast": 0.1}


# Learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", ["volumes", "slices"])
@pytest.mark.parametrize("cls", PROXIES)
def test_it_learns_on_phantoms(cls, views, phantoms):
    config = config_of(cls, views=views, **EASY)
    proxy = make(cls, config)
    history = train(proxy, lambda step: batch_of(cls, config, phantoms, 12, step), 40)
    first, last = history[:4], history[-8:]
    assert mean(last, "loss") < 0.7 * mean(first, "loss")
    if cls is SimCLR:
        assert mean(last, "accuracy") > 10 * mean(last, "chance") > 0.4
    else:
        assert mean(last, "diagonal") > 0.7
        assert mean(last, "off_diagonal_rms") < mean(last, "diagonal")


def noise_batch(step, size=12, side=16):
    """Pairs of crops from different places of pure noise: they share nothing."""
    generator = torch.Generator().manual_seed(step)
    a, b = torch.randn(2, size, 1, 1, side, side, side, generator=generator)
    return {"a": a, "b": b, "spacing": torch.ones(size, 3), "subject": torch.arange(size)}


@pytest.mark.parametrize("cls", PROXIES)
def test_noise_that_shares_nothing_stays_at_chance(cls):
    config = config_of(cls, **{**EASY, "rotate": 0.0, "scale": 0.0})
    history = train(make(cls, config), noise_batch, 40)[-20:]
    if cls is SimCLR:
        assert mean(history, "accuracy") < 2.5 * mean(history, "chance")
    else:
        assert abs(mean(history, "diagonal")) < 0.15


@pytest.mark.parametrize("cls", PROXIES)
def test_shuffled_pairs_stay_at_chance(cls, phantoms):
    config = config_of(cls, **EASY)

    def draw(step):
        batch = batch_of(cls, config, phantoms, 12, step)
        batch["subject"] = torch.arange(12)
        return {**batch, "b": batch["b"].roll(1 + step % 11, 0)}

    history = train(make(cls, config), draw, 30)[-15:]
    if cls is SimCLR:
        assert mean(history, "accuracy") < 2.5 * mean(history, "chance")
    else:
        assert mean(history, "diagonal") < 0.3


@pytest.mark.parametrize("cls", PROXIES)
@pytest.mark.parametrize("views", ["volumes", "slices"])
def test_the_plugin_keeps_the_contract(cls, views):
    from ssl3d.testing import check_proxy

    # Crops as deep as it takes for the last layer's off-centre taps to see something.
    check_proxy(cls, config_of(cls, views=views, crop=(32, 32, 32), plane=(48, 48)), steps=20)


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


def test_drawing_reads_the_crops_and_no_more(phantoms):
    config = config_of(SimCLR, crop=(8, 8, 8), per_volume=2)
    volume = Counting(phantoms[0])
    drawn = SimCLR.draw(config, volume, numpy_rng(0))
    assert drawn["a"].shape == drawn["b"].shape == (2, 1, 12, 12, 12)
    assert volume.voxels == 4 * 12**3


class Image:
    """A picture without a store; every voxel says where it lies, from 1 on."""

    id, dataset, shape, block, spacing = "picture", "made", (1, 1, 40, 40), (1, 8, 8), (5.0, 1.0, 2.0)
    has_ignored = False

    def foreground(self):
        return np.ones((1, 5, 5), np.float32)

    def read(self, start, size):
        whole = torch.zeros(1, 120, 120, 120)  # background all around
        whole[:, 40, 40:80, 40:80] = torch.arange(1.0, 1601).view(40, 40)
        box = tuple(slice(s + 40, s + 40 + n) for s, n in zip(start, size, strict=True))
        return whole[(slice(None), *box)]


@pytest.mark.parametrize("axis", ["D", "H", "W"])
def test_slices_lie_flat_and_do_not_move_across_their_axis(axis, phantoms):
    config = config_of(SimCLR, views="slices", axis=axis, slab=3, per_volume=2, chance=0.0, flip=0.0)
    volume = phantoms[0]
    drawn = SimCLR.draw(config, volume, numpy_rng(3))
    assert drawn["a"].shape == (2, 1, 3, 24, 24)
    number = "DHW".index(axis)
    assert drawn["spacing"][0] == pytest.approx(volume.spacing[number])
    whole = volume.read((0, 0, 0), volume.shape[1:]).movedim(number + 1, 1)[0]
    slab = drawn["a"][0, 0]
    found = [
        (z, y, x)
        for z in range(30)
        for y in range(9)
        for x in range(9)
        if torch.equal(whole[z : z + 3, y : y + 24, x : x + 24], slab)
    ]
    assert len(found) == 1


def test_pairs_of_slices_are_as_close_as_asked(phantoms):
    same = config_of(SimCLR, views="slices", chance=0.0, min_overlap=1.0)
    drawn = SimCLR.draw(same, phantoms[0], numpy_rng(0))
    assert torch.equal(drawn["a"], drawn["b"])
    near = dataclasses.replace(same, max_distance_mm=3 * phantoms[0].spacing[0])
    pairs = [SimCLR.draw(near, phantoms[0], numpy_rng(i)) for i in range(8)]
    assert any(not torch.equal(pair["a"], pair["b"]) for pair in pairs)


def test_images_give_views_of_depth_one(phantoms):
    class Image(Counting):
        shape = (1, 1, 32, 32)
        block = (1, 8, 8)

        def foreground(self):
            return np.ones((1, 4, 4), np.float32)

    config = config_of(SimCLR)
    drawn = SimCLR.draw(config, Image(phantoms[0]), numpy_rng(0))
    assert drawn["a"].shape[2] == 1
    batch = default_collate([drawn, drawn])
    views = []
    proxy = make(SimCLR, config)
    proxy.encoder.register_forward_pre_hook(lambda module, args: views.append(args[0].shape))
    proxy.train()
    out = proxy({**batch, "subject": torch.arange(2)}, one_group(0, 2))
    out.loss.backward()
    assert all(shape[2:] == (1, 16, 16) for shape in views)


@pytest.mark.parametrize("axis", ["D", "H", "W"])
@pytest.mark.parametrize("draw", [draw_pairs, draw_places])
def test_of_images_among_sliced_volumes_crops_are_shown(axis, draw):
    config = config_of(SimCLR, views="slices", axis=axis, slab=3, plane=(12, 20), per_volume=2, chance=0.0)
    image = Image()
    drawn = draw(config, image, numpy_rng(0))
    assert drawn["spacing"].tolist() == [5, 1, 2]
    whole = image.read((0, 0, 0), (1, 40, 40))[0, 0]
    for view in torch.cat([drawn["a"], drawn["b"]]):
        assert view.shape == (1, 1, 12, 20)
        y, x = divmod(int(view[0, 0, 0, 0]) - 1, 40)
        assert torch.equal(view[0, 0], whole[y : y + 12, x : x + 20])  # of the picture, nothing padded
    assert not torch.equal(drawn["a"][0], drawn["a"][1])


def test_sliced_volumes_and_images_train_together(phantoms):
    config = config_of(SimCLR, views="slices", slab=3)
    shapes = []
    proxy = make(SimCLR, config)
    proxy.encoder.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[2:])))
    groups = []
    for number, source in enumerate((phantoms[0], Image())):
        drawn = default_collate([SimCLR.draw(config, source, numpy_rng(i)) for i in range(2)])
        groups.append({**drawn, "subject": torch.tensor([0, 1]) + 2 * number})
    out = proxy(groups, [BatchRng(0, [0, 1], 4), BatchRng(0, [2, 3], 4)])
    out.loss.backward()
    assert shapes == [(3, 24, 24), (1, 24, 24)]


@pytest.mark.parametrize("cls", PROXIES)
def test_a_volume_with_nothing_to_see_is_refused_by_name(cls, phantoms):
    class Empty(Counting):
        def foreground(self):
            return np.zeros_like(self._volume.foreground())

    with pytest.raises(DataError, match=r"no foreground"):
        cls.draw(config_of(cls), Empty(phantoms[0]), numpy_rng(0))


@pytest.mark.parametrize("cls", PROXIES)
def test_torchio_by_name_in_draw(cls, phantoms):
    config = config_of(cls, torchio=("RandomNoise",))
    plain = cls.draw(config_of(cls), phantoms[0], numpy_rng(0))
    noisy = cls.draw(config, phantoms[0], numpy_rng(0))
    assert noisy["a"].shape == plain["a"].shape and not torch.equal(noisy["a"], plain["a"])
    assert torch.equal(cls.draw(config, phantoms[0], numpy_rng(0))["b"], noisy["b"])


@pytest.mark.parametrize("cls", PROXIES)
def test_groups_of_several_shapes_are_compared_with_each_other(cls, phantoms):
    config = config_of(cls, chance=0.0)
    proxy = make(cls, config).eval()
    batch = batch_of(cls, config, phantoms, 6)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 6))]
    rngs = [BatchRng(5, range(2), 6), BatchRng(5, range(2, 6), 6)]
    whole, mixed = proxy(batch, one_group(5, 6)), proxy(parts, rngs)
    assert torch.allclose(whole.loss, mixed.loss, rtol=1e-4)
    flat = {**parts[0], "a": parts[0]["a"][:, :, :, :1], "b": parts[0]["b"][:, :, :, :1]}
    assert proxy([flat, parts[1]], rngs).loss.isfinite()  # two images among the volumes


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls,options,least",
    [
        (SimCLR, {}, 2),
        (SimCLR, {"per_volume": 3}, 2),
        (SimCLR, {"per_volume": 3, "same_subject_negatives": True}, 1),
        (BarlowTwins, {}, 3),
        (BarlowTwins, {"per_volume": 2}, 2),
    ],
)
def test_parts_of_a_batch_with_nothing_to_compare_are_refused(cls, options, least, phantoms):
    config = config_of(cls, **options)
    batch = batch_of(cls, config, phantoms, least)
    # As accumulation cuts it: the batch is large enough, its part is not.
    proxy = make(cls, config)
    out = proxy(batch, BatchRng(0, range(least), 8))
    out.loss.backward()
    assert max(float(p.grad.abs().max()) for p in proxy.encoder.parameters()) > 1e-3  # it learns
    fewer = {name: value[: least - 1] for name, value in batch.items()}
    if least > 1:
        refusal = rf"--batch-size divided by --accumulate must be at least {least}, not {least - 1}"
        with pytest.raises(UsageError, match=refusal):
            proxy(fewer, BatchRng(0, range(least - 1), 8))
        proxy.eval()(fewer, BatchRng(0, range(least - 1), 8))  # held-out subjects may be odd in number


def test_every_rank_counts_towards_what_is_compared(phantoms, monkeypatch):
    import ssl3d.views.pairs as pairs

    config = config_of(SimCLR)
    monkeypatch.setattr(pairs, "world_size", lambda: 2)
    make(SimCLR, config)(batch_of(SimCLR, config, phantoms, 1), BatchRng(0, [1], 2))


def test_a_run_that_cannot_learn_ends_at_once_and_exports_nothing(phantoms, tmp_path):
    import ssl3d

    with pytest.raises(UsageError, match="--batch-size divided by --accumulate"):
        ssl3d.pretrain(
            "simclr", phantoms, tmp_path / "run", encoder="resnet10", resnet10={"width": 8}, steps=2,
            batch_size=4, accumulate=4, simclr=to_dict(config_of(SimCLR)), workers=0, eval_every=-1,
        )  # fmt: skip
    assert not (tmp_path / "run" / "encoder").exists()


def test_data_of_one_subject_have_no_negatives(phantoms):
    alone = phantoms[:1]
    with pytest.raises(UsageError, match=r"one subject's: .*--simclr\.same_subject_negatives"):
        make(SimCLR, config_of(SimCLR)).setup(alone)
    make(SimCLR, config_of(SimCLR, same_subject_negatives=True)).setup(alone)
    make(SimCLR, config_of(SimCLR)).setup(phantoms[:2])


@pytest.mark.parametrize("cls", PROXIES)
def test_slices_too_thin_for_the_kernels_are_refused(cls):
    with pytest.raises(UsageError, match="slab is 1, but kernels of kind 3d"):
        make(cls, config_of(cls, views="slices"), kind="3d")


@pytest.mark.parametrize(
    "cls,wrong",
    [
        (SimCLR, {"temperature": 0.0}),
        (SimCLR, {"crop": (0, 4, 4)}),
        (SimCLR, {"min_iou": 2.0}),
        (BarlowTwins, {"out": 1}),
        (BarlowTwins, {"off_diagonal": -1.0}),
    ],
)
def test_options_out_of_range_name_the_field(cls, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config_of(cls, **wrong)


@pytest.mark.parametrize("cls", PROXIES)
def test_the_picture_shows_pairs_and_what_is_nearest(cls, phantoms):
    config = config_of(cls)
    out = make(cls, config)(batch_of(cls, config, phantoms, 4), one_group(0, 4))
    figure = out.picture()
    assert len(figure.axes) == 12
    assert cls.main in out.metrics


# Ranks --------------------------------------------------------------------------------------------


RANK = """
import os, sys, torch
from ssl3d.config import from_dict
from ssl3d.encoders.resnet import ResNet10
from ssl3d.rng import BatchRng
from ssl3d_proxies.barlow_twins import BarlowTwins
from ssl3d_proxies.simclr import SimCLR

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
found = []
for given in torch.load(f"{folder}/given.pt", weights_only=True):
    cls = {"SimCLR": SimCLR, "BarlowTwins": BarlowTwins}[given["cls"]]
    encoder = ResNet10(from_dict(ResNet10.Config, given["encoder"], "encoder"))
    proxy = cls(from_dict(cls.Config, given["config"], "proxy"), encoder)
    proxy.load_state_dict(given["weights"])
    wrapped = torch.nn.parallel.DistributedDataParallel(proxy)
    rows, batch = given["rows"][rank], given["batch"]
    out = wrapped({k: v[rows] for k, v in batch.items()}, BatchRng(5, rows, len(batch["a"])))
    out.loss.backward()
    loss = out.loss.detach() / 2
    torch.distributed.all_reduce(loss)
    found.append({"loss": loss, **{n: p.grad for n, p in proxy.named_parameters()}})
if rank == 0:
    torch.save(found, f"{folder}/found.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Not through the interpreter's end: a thread of the backward pass that outlives it aborts the process,
# one time in many ("terminate called without an active exception").
sys.stderr.flush()
os._exit(0)
"""
SPLITS = {"interleaved": [[0, 2, 4], [1, 3, 5]], "unequal": [[0, 2, 3, 5], [1, 4]]}


@pytest.fixture(scope="module")
def gradients(phantoms, tmp_path_factory):
    """Loss and gradients by proxy and split of the batch: of one process, and of two."""
    folder, given, alone = tmp_path_factory.mktemp("ranks"), [], []
    cases = [(cls, split) for cls in PROXIES for split in SPLITS]
    for cls, split in cases:
        config = config_of(cls, head_norm="layer", per_volume=2)
        batch = batch_of(cls, config, phantoms, 6)
        batch["subject"] = torch.tensor([0, 0, 1, 2, 3, 3])
        proxy = make(cls, config, norm="group")
        given.append(
            {
                "cls": cls.__name__,
                "config": to_dict(config),
                "encoder": to_dict(proxy.encoder.config),
                "weights": proxy.state_dict(),
                "batch": batch,
                "rows": SPLITS[split],
            }
        )
        out = proxy(batch, one_group(5, 6))
        out.loss.backward()
        alone.append({"loss": out.loss.detach(), **{n: p.grad for n, p in proxy.named_parameters()}})
    torch.save(given, folder / "given.pt")
    started = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(folder)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    ranks = torch.load(folder / "found.pt", weights_only=True)
    return {case: pair for case, *pair in zip(cases, alone, ranks, strict=True)}


@pytest.mark.long
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("cls", PROXIES)
def test_gradients_of_two_ranks_are_those_of_one_process(cls, split, gradients):
    alone, ranks = gradients[cls, split]
    assert alone.keys() == ranks.keys()
    assert torch.allclose(ranks["loss"], alone["loss"], rtol=1e-4)
    parameters = {name: gradient for name, gradient in alone.items() if name != "loss"}
    largest = max(float(gradient.abs().max()) for gradient in parameters.values())
    for name, gradient in parameters.items():
        assert torch.allclose(ranks[name], gradient, rtol=1e-3, atol=1e-5 * largest), name
