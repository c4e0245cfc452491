"""The sorting proxy: what it draws, what it learns, and what it must not be able to learn from."""

import numpy as np
import pytest
import torch

from ssl3d.api import BatchRng, DataError, UsageError
from ssl3d.data.open import open_data
from ssl3d.data.phantoms import phantom_store
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d.rng import numpy_rng, one_group
from ssl3d.testing import check_proxy
from ssl3d_proxies.sorting import Sorting, SortingConfig


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return open_data([phantom_store(40, folder=tmp_path_factory.mktemp("phantoms"))])


def store(folder, images, spacing=(1.0, 1.0, 1.0), orientation="SAR"):
    """A store of float32 volumes (D, H, W), all of it foreground."""
    for n, image in enumerate(images):
        record = Record(f"v{n}", "made", f"s{n}", spacing=spacing, orientation=orientation)
        write_part(
            folder / "parts",
            f"v{n}",
            record,
            image[None].astype(np.float32),
            foreground=np.ones(image.shape, bool),
            dtype="float32",
        )
    assemble(folder / "parts", folder / "store.h5", {}, [])
    return open_data([folder / "store.h5"])


def ramp(shape=(24, 20, 20)):
    """A volume whose every voxel says in which slice along D it lies."""
    return np.broadcast_to(np.arange(shape[0], dtype=np.float32)[:, None, None], shape).copy()


def encoder(width=8, **options):
    torch.manual_seed(0)
    return ResNet10(ResNet10.Config(width=width, **options))


def batch_of(config, volumes, seed):
    drawn = [Sorting.draw(config, volume, numpy_rng(seed, n)) for n, volume in enumerate(volumes)]
    return {name: torch.stack([example[name] for example in drawn]) for name in drawn[0]}


def train(config, volumes, steps=80, batch=8, lr=3e-3, width=8):
    """A hand-written loop."""
    proxy = Sorting(config, encoder(width)).train()
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=lr)
    order = np.random.default_rng(0)
    for step in range(steps):
        some = [volumes[int(i)] for i in order.choice(len(volumes), batch, replace=False)]
        output = proxy(batch_of(config, some, step), one_group(step, batch))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return proxy.eval()


@torch.no_grad()
def metric(proxy, volumes, name="kendall_tau", repeats=2):
    volumes = list(volumes) * repeats
    output = proxy.eval()(batch_of(proxy.config, volumes, 10_000), one_group(1, len(volumes)))
    return output.metrics[name].item()


PLAIN = {"chance": 0.0, "flip": 0.0}  # no augmentation


# Drawing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["D", "H", "W"])
def test_slabs_come_in_order_with_the_gap_asked_for(tmp_path, axis):
    image = np.moveaxis(ramp((30, 20, 16)), 0, "DHW".index(axis))
    spacing = tuple(np.insert([1.0, 1.0], "DHW".index(axis), 1.5))
    volume = store(tmp_path, [image], spacing)[0]
    config = SortingConfig(
        slices=5, slab=2, axis=axis, min_gap_mm=5.0, crop=(12, 10), field="crop", **PLAIN
    )
    seen = set()
    for seed in range(30):
        slabs = Sorting.draw(config, volume, numpy_rng(seed))["slabs"]
        assert slabs.shape == (5, 1, 2, 12, 10)
        positions = slabs[:, 0, 0].flatten(1)
        assert (positions == positions[:, :1]).all()  # one slice, one position
        assert torch.equal(slabs[:, 0, 1], slabs[:, 0, 0] + 1)  # adjacent
        positions = positions[:, 0]
        assert (positions.diff() >= 4).all()  # 5 mm are 3.3 slices
        seen |= set(positions.tolist())
    assert {0.0, 28.0} <= seen  # both ends are reached


def test_all_slices_of_a_volume_share_one_crop(tmp_path):
    image = np.random.default_rng(0).permutation(40 * 40).reshape(1, 40, 40).astype(np.float32)
    volume = store(tmp_path, [np.repeat(image, 12, axis=0)])[0]
    config = SortingConfig(slices=4, crop=(16, 16), field="crop", **PLAIN)
    corners = set()
    for seed in range(8):
        slabs = Sorting.draw(config, volume, numpy_rng(seed))["slabs"]
        assert (slabs == slabs[:1]).all()
        corners.add(slabs[0, 0, 0, 0, 0].item())
    assert len(corners) > 4  # and another one every time


def test_small_volumes_are_padded_evenly(tmp_path):
    record = Record("a", "made", "s", done={"background": 0.0})
    write_part(tmp_path / "other", "a", record, np.full((1, 10, 6, 8), 3.0, np.float32))
    assemble(tmp_path / "other", tmp_path / "other.h5", {}, [])
    slabs = Sorting.draw(
        SortingConfig(slices=3, crop=(12, 12), **PLAIN), open_data([tmp_path / "other.h5"])[0], numpy_rng(0)
    )["slabs"]
    expected = torch.zeros(12, 12)
    expected[3:9, 2:10] = 3
    assert (slabs == expected).all()


def test_a_volume_too_short_is_refused_with_both_numbers(tmp_path):
    volume = store(tmp_path, [ramp((12, 20, 20))])[0]
    with pytest.raises(DataError, match=r"v0: 8 slabs .* need 14 mm .* has 11 mm"):
        Sorting.draw(SortingConfig(slices=8, min_gap_mm=2.0), volume, numpy_rng(0))


@pytest.mark.parametrize("axis", ["D", "H", "W"])
def test_a_whole_slice_is_shrunk_to_the_crop_in_its_proportions(tmp_path, axis):
    image = np.zeros((12, 64, 32), np.float32)
    image[:, 32:, :] = 1.0  # the second half of the long side
    volume = store(tmp_path, [np.moveaxis(image, 0, "DHW".index(axis))])[0]
    drawn = Sorting.draw(SortingConfig(slices=4, axis=axis, crop=(16, 16), **PLAIN), volume, numpy_rng(0))
    slabs = drawn["slabs"][:, 0, 0]
    assert torch.allclose(slabs[:, :7, 4:12], torch.zeros(()), atol=1e-5)
    assert torch.allclose(slabs[:, 9:, 4:12], torch.ones(()), atol=1e-5)
    assert (slabs[:, :, :4] == 0).all() and (slabs[:, :, 12:] == 0).all()  # background on both sides
    assert drawn["spacing"].tolist() == [1.0, 4.0, 4.0]


def test_profile_shrinks_wide_volumes(tmp_path):
    volume = store(tmp_path, [ramp((8, 64, 48))])[0]
    proxy = scored_by(SortingConfig(crop=(16, 16)))
    _, scores = proxy.profile(volume)
    # Three quarters of the crop are the slice, the rest is its background: the lowest value, 0.
    assert np.allclose(scores, 75 * np.arange(8), rtol=1e-4)


def test_margins_are_read_and_cut_off_again(tmp_path):
    volume = store(tmp_path, [np.random.default_rng(0).normal(size=(12, 40, 40))])[0]
    config = SortingConfig(slices=3, crop=(16, 16), field="crop")
    batch = batch_of(config, [volume], 0)
    assert batch["slabs"].shape[-1] > 16  # what a rotation brings in is real
    proxy = scored_by(config)
    proxy.train()(batch, one_group(0, 1))
    proxy.eval()(batch, one_group(0, 1))
    assert [tuple(x.shape) for x in proxy.shown] == [(3, 1, 1, 16, 16)] * 2


def test_orientation_travels_with_the_example(tmp_path):
    config = SortingConfig(slices=3, crop=(8, 8))
    for orientation, known in (("SAR", True), ("unknown", False)):
        volume = store(tmp_path / orientation, [ramp()], orientation=orientation)[0]
        assert Sorting.draw(config, volume, numpy_rng(0))["oriented"].item() is known


@pytest.mark.parametrize(
    "wrong",
    [
        {"slices": 1},
        {"slab": 0},
        {"crop": (0, 8)},
        {"tau": 0.0},
        {"steepness": -1.0},
        {"power": 0.5},
        {"min_gap_mm": -1.0},
        {"regularization": float("nan")},
        {"torchio": ("RandomFlip",)},
        {"chance": 2.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SortingConfig(**wrong)


@pytest.mark.parametrize("kind", ["3d", "p3d"])
def test_slabs_too_thin_for_the_kernels_are_refused(kind):
    with pytest.raises(UsageError, match=r"slab is 1.*stride of 16"):
        Sorting(SortingConfig(), encoder(kind=kind))
    flat = {"stem_stride": (1, 2, 2), "stage_strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))}
    Sorting(SortingConfig(slab=4), encoder(kind=kind, **flat))


# One step -------------------------------------------------------------------------------------------


class Scored(Sorting):
    """Sorting by a rule instead of a network; keeps what it was shown."""

    def __init__(self, config, rule):
        super().__init__(config, encoder())
        self.rule, self.shown = rule, []

    def score(self, slabs):
        self.shown.append(slabs)
        return self.rule(slabs.flatten(1).mean(dim=1))


def scored_by(config, sign=1.0):
    """Reads the position off a ramp."""
    return Scored(config, lambda mean: sign * 100 * mean).eval()


@pytest.mark.parametrize("relaxation", ["softsort", "neuralsort", "odd_even", "pairwise"])
def test_ranked_slices_have_no_loss_and_perfect_metrics(tmp_path, relaxation):
    config = SortingConfig(slices=6, crop=(8, 8), relaxation=relaxation, regularization=0.0)
    batch = batch_of(config, list(store(tmp_path, [ramp()] * 4)), 0)
    right = scored_by(config)(batch, one_group(0, 4))
    assert right.loss.item() < 1e-2
    assert right.metrics["kendall_tau"].item() == 1
    assert right.metrics["exact"].item() == 1
    assert right.metrics["undecidable"].item() == 0
    wrong = scored_by(config, -1)(batch, one_group(0, 4))
    assert wrong.loss.item() > 1
    assert wrong.metrics["kendall_tau"].item() == -1
    assert wrong.metrics["exact"].item() == 0


def test_either_direction_counts_only_where_it_is_unknown(tmp_path):
    known = store(tmp_path / "a", [ramp()] * 2)
    unknown = store(tmp_path / "b", [ramp()] * 2, orientation="unknown")

    def taus(direction, volumes):
        config = SortingConfig(slices=6, crop=(8, 8), direction=direction, regularization=0.0)
        output = scored_by(config, -1)(batch_of(config, list(volumes), 0), one_group(0, 2))
        assert (output.loss.item() < 1e-2) == (output.metrics["kendall_tau"].item() == 1)
        return output.metrics["kendall_tau"].item()

    assert taus("fixed", known) == taus("fixed", unknown) == -1
    assert taus("either", known) == taus("either", unknown) == 1
    assert taus("auto", known) == -1
    assert taus("auto", unknown) == 1


def test_repeated_slices_are_reported_as_undecidable(tmp_path):
    config = SortingConfig(slices=6, crop=(8, 8))
    still = np.broadcast_to(np.random.default_rng(0).normal(size=(20, 20)), (24, 20, 20))
    volumes = store(tmp_path, [ramp(), still, ramp(), ramp()])
    output = scored_by(config)(batch_of(config, list(volumes), 0), one_group(0, 4))
    assert output.metrics["undecidable"].item() == pytest.approx(0.25)


def test_slices_are_shown_shuffled(tmp_path):
    config = SortingConfig(slices=6, crop=(8, 8))
    proxy = scored_by(config)
    batch = batch_of(config, list(store(tmp_path, [ramp()] * 8)), 0)
    for seed in range(4):
        proxy(batch, one_group(seed, 8))
    orders = torch.cat([slabs.flatten(1)[:, 0].view(8, 6).argsort(dim=1) for slabs in proxy.shown])
    assert len(set(map(tuple, orders.tolist()))) > 25


def test_scores_of_a_slice_do_not_depend_on_the_others(phantoms):
    config = SortingConfig(crop=(32, 32))
    proxy = Sorting(config, encoder()).eval()
    slabs = batch_of(config, list(phantoms)[:1], 0)["slabs"][0][..., :32, :32]
    with torch.no_grad():
        together = proxy.score(slabs)
        alone = torch.cat([proxy.score(slab) for slab in slabs.split(1)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_two_ranks_see_the_numbers_of_one(phantoms):
    config = SortingConfig(crop=(32, 32), slices=4)
    proxy = Sorting(config, encoder()).eval()  # eval: BatchNorm would mix the examples
    batch = batch_of(config, list(phantoms)[:4], 0)
    with torch.no_grad():
        whole = proxy(batch, one_group(3, 4)).loss
        halves = [
            proxy({k: v[rows] for k, v in batch.items()}, BatchRng(3, rows, 4)).loss
            for rows in ([0, 1], [2, 3])
        ]
    assert torch.allclose(whole, sum(halves) / 2, atol=1e-6)


def test_scores_are_float32_under_autocast(phantoms):
    config = SortingConfig(crop=(32, 32), slices=4)
    proxy = Sorting(config, encoder())
    with torch.autocast("cpu", torch.bfloat16):
        output = proxy(batch_of(config, list(phantoms)[:2], 0), one_group(0, 2))
    assert output.loss.dtype == torch.float32


def test_picture_shows_both_orders(phantoms):
    config = SortingConfig(crop=(32, 32), slices=5)
    figure = Sorting(config, encoder())(batch_of(config, list(phantoms)[:2], 0), one_group(0, 2)).picture()
    assert len(figure.axes) == 10


def test_augmentation_is_the_same_for_all_slices_in_place_and_never_across(tmp_path):
    # Equal slices stay equal in place (flips, rotations), and the order of the ramp survives.
    config = SortingConfig(
        slices=6, crop=(16, 16), gamma=0.0, contrast=0.0, noise=0.0, bias=0.0, chance=1.0
    )
    still = np.broadcast_to(np.random.default_rng(0).normal(size=(40, 40)), (24, 40, 40))
    proxy = scored_by(config).train()
    batch = batch_of(config, list(store(tmp_path, [still] * 4)), 0)
    proxy(batch, one_group(0, 4))
    shown = proxy.shown[0].view(4, 6, 16, 16)
    assert torch.allclose(shown, shown[:, :1].expand_as(shown), atol=1e-5)
    margin = (batch["slabs"].shape[-1] - 16) // 2
    plain = batch["slabs"][:, 0, 0, 0, margin : margin + 16, margin : margin + 16]
    assert not torch.allclose(shown[:, 0], plain, atol=0.1)


# Learning -------------------------------------------------------------------------------------------


def test_it_sorts_phantoms_never_seen(phantoms):
    config = SortingConfig(crop=(48, 48))
    untrained = metric(Sorting(config, encoder()), phantoms[28:])
    trained = train(config, phantoms[:28], steps=90)
    assert metric(trained, phantoms[28:]) > 0.8 > 0.5 > abs(untrained)


@pytest.mark.parametrize("relaxation", ["neuralsort", "odd_even", "pairwise"])
def test_every_relaxation_learns(phantoms, relaxation):
    config = SortingConfig(crop=(32, 32), slices=5, relaxation=relaxation)
    assert metric(train(config, phantoms[:28], steps=50), phantoms[28:]) > 0.55


def test_either_direction_learns(phantoms):
    config = SortingConfig(crop=(32, 32), slices=5, direction="either")
    assert metric(train(config, phantoms[:28], steps=60), phantoms[28:]) > 0.6


# Shortcut controls: what is not anatomy must not be sorted -------------------------------------------


def test_noise_stays_at_chance(tmp_path):
    rng = np.random.default_rng(0)
    volumes = store(tmp_path, [rng.normal(size=(24, 24, 24)) for _ in range(32)])
    config = SortingConfig(crop=(24, 24), slices=6)
    trained = train(config, volumes[:16], steps=40)
    assert abs(metric(trained, volumes[16:])) < 0.2


def test_small_volumes_of_noise_stay_at_chance(tmp_path):
    # Padding is the same for all slices: no border to read the position off.
    rng = np.random.default_rng(1)
    volumes = store(tmp_path, [rng.normal(size=(24, 12, 14)) for _ in range(32)])
    config = SortingConfig(crop=(24, 24), slices=6)
    assert abs(metric(train(config, volumes[:16], steps=40), volumes[16:])) < 0.2


@pytest.mark.long
def test_an_unknowable_direction_stays_at_chance(tmp_path, phantoms):
    # Half of the volumes stand on their heads: no slice says which; `fixed` must find nothing.
    sources = [volume.read().numpy()[0] for volume in phantoms]
    images = [image[::-1] if n % 2 else image for n, image in enumerate(sources)]
    volumes = store(tmp_path, images, spacing=(8.0, 7.0, 7.0))
    config = SortingConfig(crop=(32, 32), slices=6, direction="fixed")
    assert abs(metric(train(config, volumes[:28], steps=60), volumes[28:])) < 0.25


@pytest.mark.long
def test_a_brightness_ramp_of_the_scanner_is_not_enough(tmp_path):
    # The only cue is a small drift of intensity along the axis. Without augmentation it sorts noise; with
    # it, most of the order is lost.
    rng = np.random.default_rng(2)
    drift = np.linspace(-0.15, 0.15, 24)[:, None, None]
    volumes = store(tmp_path, [rng.normal(size=(24, 24, 24)) + drift for _ in range(32)])
    bare = SortingConfig(crop=(24, 24), slices=6, **PLAIN)
    guarded = SortingConfig(crop=(24, 24), slices=6, chance=1.0)
    without = metric(train(bare, volumes[:16], steps=80), volumes[16:])
    with_views = metric(train(guarded, volumes[:16], steps=80), volumes[16:])
    assert with_views < without - 0.2


def test_conformance():
    check_proxy("sorting", SortingConfig(crop=(32, 32)))


# The profile of a volume ----------------------------------------------------------------------------


def test_profile_scores_every_slab_where_it_lies(tmp_path):
    volume = store(tmp_path, [ramp((20, 40, 24))])[0]
    proxy = scored_by(SortingConfig(slab=3, crop=(16, 16), field="crop"))
    positions, scores = proxy.train().profile(volume, batch=7)
    assert proxy.training  # as before
    assert np.allclose(positions, np.arange(1, 19))  # centres of the slabs
    assert np.allclose(scores, 100 * positions, rtol=1e-5)


def test_profile_tiles_wide_volumes(tmp_path):
    image = np.zeros((6, 32, 48), np.float32)
    image[:, :, 32:] = 3.0  # a third of the width
    record = Record("a", "made", "s", done={"background": 0.0})
    whole = np.ones(image.shape, bool)
    write_part(tmp_path / "p", "a", record, image[None], foreground=whole)
    assemble(tmp_path / "p", tmp_path / "s.h5", {}, [])
    proxy = scored_by(SortingConfig(crop=(16, 16), field="crop"))
    _, scores = proxy.profile(open_data([tmp_path / "s.h5"])[0])
    assert np.allclose(scores, 100.0)


def test_profile_refuses_what_is_thinner_than_a_slab(tmp_path):
    volume = store(tmp_path, [ramp((2, 20, 20))])[0]
    with pytest.raises(DataError, match="has 2 slices along D, a slab needs 3"):
        scored_by(SortingConfig(slab=3)).profile(volume)
