"""The cube-ordering proxy: what it cuts, what it asks, and what it must not be able to learn from."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.signal import lfilter
from torch import nn

from ssl3d.api import BatchRng, DataError, UsageError
from ssl3d.data.open import open_data
from ssl3d.data.phantoms import phantom_store
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d.rng import numpy_rng, one_group
from ssl3d_proxies.cube_ordering import CubeOrdering, CubeOrderingConfig, assign


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return open_data([phantom_store(40, folder=tmp_path_factory.mktemp("phantoms"))])


def store(folder, images, spacing=(1.0, 1.0, 1.0), foregrounds=None):
    """A store of float32 volumes (D, H, W) or (C, D, H, W), all of it foreground."""
    for n, image in enumerate(images):
        image = image if image.ndim == 4 else image[None]
        inside = np.ones(image.shape[1:], bool) if foregrounds is None else foregrounds[n]
        write_part(
            folder / "parts",
            f"v{n}",
            Record(f"v{n}", "made", f"s{n}", spacing=spacing),
            image.astype(np.float32),
            foreground=inside,
            dtype="float32",
        )
    assemble(folder / "parts", folder / "store.h5", {}, [])
    return open_data([folder / "store.h5"])


def places(shape):
    """A volume of three channels: every voxel says where it lies."""
    return np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij"))


def encoder(width=8, **options):
    """Strides of 8 in all: cubes of 9 are large enough."""
    torch.manual_seed(0)
    return ResNet10(ResNet10.Config(width=width, stem_kernel=3, stem_stride=(1, 1, 1), **options))


def batch_of(config, volumes, seed):
    drawn = [CubeOrdering.draw(config, volume, numpy_rng(seed, n)) for n, volume in enumerate(volumes)]
    return {name: torch.stack([example[name] for example in drawn]) for name in drawn[0]}


def made(config, data, kind=CubeOrdering, **options):
    proxy = kind(config, encoder(**options))
    proxy.setup(data)
    return proxy


def train(config, volumes, steps=60, batch=16, lr=3e-3, kind=CubeOrdering):
    """A hand-written loop."""
    proxy = made(config, volumes, kind).train()
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=lr)
    order = np.random.default_rng(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, 5 * (step + 1) / steps, 2 * (1 - step / steps))
        some = [volumes[int(i)] for i in order.choice(len(volumes), batch)]
        output = proxy(batch_of(config, some, step), one_group(step, batch))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return proxy.eval()


@torch.no_grad()
def metric(proxy, volumes, name="order_accuracy", repeats=16):
    volumes = list(volumes) * repeats
    output = proxy.eval()(batch_of(proxy.config, volumes, 10_000), one_group(1, len(volumes)))
    return output.metrics[name].item()


PLAIN = {"normalize": False, "detrend": False, "chance": 0.0}  # intensities as they are
UNGUARDED = {"gap": 0, "gap_mm": 0.0, "jitter": 0, **PLAIN}
TINY = {"crop": (24, 24, 24), "gap": 1, "gap_mm": 0.0, "jitter": 1, "permutations": 20, "hidden": 32}


# Cutting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(2, 2, 2), (1, 2, 3), (3, 3, 3)])
def test_cubes_lie_in_their_cells_with_gap_and_jitter(tmp_path, grid):
    volume = store(tmp_path, [places((48, 44, 40))])[0]
    config = CubeOrderingConfig(grid=grid, crop=(30, 36, 36), gap=2, gap_mm=0.0, jitter=3)
    jittered, regions = set(), set()
    for seed in range(20):
        drawn = CubeOrdering.draw(config, volume, numpy_rng(seed))
        cubes = drawn["cubes"]
        assert cubes.shape == (math.prod(grid), 3, *config.cube)
        assert drawn["extent"].tolist() == list(config.cube)
        assert drawn["filled"].all()
        corners = cubes[:, :, 0, 0, 0]
        # Each is a piece of the volume, as it is.
        for cube, corner in zip(cubes, corners):
            assert torch.equal(cube, volume.read(corner.int().tolist(), config.cube))
        corners = corners.view(*grid, 3)
        for axis in range(3):
            starts = corners[..., axis]
            if grid[axis] == 1:
                assert (starts == starts.flatten()[0]).all()
                continue
            # Whatever their jitter, every cube of one layer ends two voxels before the next begins.
            ends = starts.movedim(axis, 0).flatten(1).amax(1) + config.cube[axis]
            firsts = starts.movedim(axis, 0).flatten(1).amin(1)
            assert (firsts[1:] - ends[:-1] >= 2).all()
            jittered |= {(axis, int(step)) for step in (starts - starts.amin()).unique()}
        regions.add(tuple(corners.flatten()[:3].tolist()))
    assert len(regions) > 10
    assert all((axis, step) in jittered for axis in (1, 2) for step in range(4) if grid[axis] > 1)


def test_the_gap_in_mm_holds_and_the_crop_grows_for_it(tmp_path):
    volume = store(tmp_path, [places((40, 60, 60))], spacing=(2.0, 0.5, 0.5))[0]
    config = CubeOrderingConfig(grid=(1, 2, 2), crop=(8, 32, 32), gap=2, gap_mm=4.0, jitter=0)
    cubes = CubeOrdering.draw(config, volume, numpy_rng(0))["cubes"]
    assert cubes.shape == (4, 3, 8, 14, 14)
    corners = cubes[:, 1, 0, 0, 0]
    assert corners[2] - corners[0] - 14 == 8  # 4 mm


def test_small_volumes_pad_every_cube_alike(tmp_path):
    volume = store(tmp_path, [places((35, 50, 36)) + 1])[0]
    config = CubeOrderingConfig()
    assert config.cube == (18, 18, 18)
    drawn = CubeOrdering.draw(config, volume, numpy_rng(0))
    assert drawn["extent"].tolist() == [10, 18, 12]
    cubes = drawn["cubes"]
    empty = (cubes == 0).all(1)
    assert (empty == empty[:1]).all()  # nothing to tell them apart by
    assert torch.equal(empty, empty.flip((1, 2, 3)))  # nor how they were turned
    assert (cubes[:, :, 4:14, :, 3:15] > 0).all()


def test_thin_volumes_take_a_flat_grid(tmp_path):
    volumes = store(tmp_path, [places((depth, 80, 90)) for depth in (6, 8, 10, 18)])
    for grid, side in (((1, 2, 2), 26), ((1, 3, 3), 15)):
        config = CubeOrderingConfig(grid=grid, crop=(8, 64, 64))
        batch = batch_of(config, volumes, 0)
        assert batch["cubes"].shape[1:] == (math.prod(grid), 3, 8, side, side)
        assert batch["extent"][:, 0].tolist() == [6, 8, 8, 8]


def test_images_are_cut_in_plane_only(tmp_path):
    volumes = store(tmp_path, [places((1, 60, 60))])
    drawn = CubeOrdering.draw(CubeOrderingConfig(), volumes[0], numpy_rng(0))
    assert drawn["cubes"].shape == (4, 3, 1, 18, 18)
    with pytest.raises(DataError, match=r"v0: an image is not cut along D.*grid \(2, 1, 1\)"):
        CubeOrdering.draw(CubeOrderingConfig(grid=(2, 1, 1)), volumes[0], numpy_rng(0))
    assert set(made(CubeOrderingConfig(grid=(2, 1, 1), crop=(48, 20, 20)), volumes).heads) == {"volume"}


def test_a_volume_without_room_is_refused_with_both_numbers(tmp_path):
    volume = store(tmp_path, [places((10, 60, 60))])[0]
    with pytest.raises(DataError, match=r"v0: 2 cubes along D need 24 voxels.*volume has 10.*grid"):
        CubeOrdering.draw(CubeOrderingConfig(), volume, numpy_rng(0))


def test_every_cube_has_foreground_where_some_crop_allows_it(tmp_path):
    inside = np.zeros((32, 80, 32), bool)
    inside[:, 24:64] = True
    volume = store(tmp_path, [np.random.default_rng(0).normal(size=inside.shape)], foregrounds=[inside])[0]
    config = CubeOrderingConfig(crop=(24, 24, 24), gap=1, jitter=1, min_foreground=0.6)
    for seed in range(20):
        assert CubeOrdering.draw(config, volume, numpy_rng(seed))["filled"].all()


def test_cubes_without_foreground_are_named(tmp_path):
    inside = np.zeros((24, 24, 24), bool)
    inside[:, :, 12:] = True  # no crop other than the whole
    volume = store(tmp_path, [np.random.default_rng(0).normal(size=inside.shape)], foregrounds=[inside])[0]
    config = CubeOrderingConfig(**TINY, min_foreground=0.3)
    filled = CubeOrdering.draw(config, volume, numpy_rng(0))["filled"]
    assert filled.tolist() == [False, True] * 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"grid": (1, 1, 1)},
        {"grid": (0, 2, 2)},
        {"crop": (10, 48, 48)},
        {"gap": -1},
        {"gap_mm": float("nan")},
        {"jitter": -1},
        {"min_foreground": 1.5},
        {"permutations": 1},
        {"turns": ("X",)},
        {"turns": ("D", "D")},
        {"turns": ("D", "H", "W")},
        {"mask_share": 0.0},
        {"side_weight": -1.0},
        {"chance": 2.0},
        {"features": 0},
        {"hidden": 0},
    ],
    ids=lambda wrong: "-".join(map(str, next(iter(wrong.items())))),
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CubeOrderingConfig(**wrong)


def test_cubes_too_small_for_the_kernels_are_refused():
    with pytest.raises(UsageError, match=r"cubes of 10 voxels along H.*stride of 16"):
        CubeOrdering(CubeOrderingConfig(crop=(48, 32, 32)), ResNet10(ResNet10.Config(width=8)))
    thin = CubeOrderingConfig(grid=(1, 2, 2), crop=(8, 64, 64), hidden=32)
    CubeOrdering(thin, ResNet10(ResNet10.Config(width=8)))
    with pytest.raises(UsageError, match=r"cubes of 8 voxels along D.*kind 3d"):
        CubeOrdering(thin, ResNet10(ResNet10.Config(width=8, kind="3d")))


# Shuffling, turning, masking ------------------------------------------------------------------------


class Watched(CubeOrdering):
    """Keeps what the encoder was shown and what was asked."""

    def __init__(self, config, encoder):
        super().__init__(config, encoder)
        encoder.register_forward_pre_hook(lambda module, given: setattr(self, "seen", given[0]))

    def _shuffle(self, heads, rng, count):
        self.asked = super()._shuffle(heads, rng, count)
        return self.asked

    @property
    def shown(self):
        return self.seen.view(*self.asked[1].shape, *self.seen.shape[1:])


def by_place(cubes, order):
    """Cubes at the places that the order says."""
    restored = torch.empty_like(cubes)
    restored[torch.arange(len(cubes)).unsqueeze(1), order] = cubes
    return restored


@pytest.mark.parametrize("target", ["permutation", "position"])
def test_the_order_restores_the_cubes(tmp_path, target):
    volumes = store(tmp_path, [np.random.default_rng(n).normal(size=(24, 24, 24)) for n in range(6)])
    config = CubeOrderingConfig(**TINY, **PLAIN, target=target)
    proxy = made(config, volumes, Watched).eval()
    batch = batch_of(config, volumes, 0)
    proxy(batch, one_group(0, 6))
    asked, order = proxy.asked
    assert torch.allclose(by_place(proxy.shown, order), batch["cubes"], atol=1e-6)
    assert len(set(map(tuple, order.tolist()))) > 3
    if target == "permutation":
        assert torch.equal(proxy.heads["volume"].table[asked], order)
        inverse = order.argsort(1)
        assert torch.allclose(proxy.shown[torch.arange(6).unsqueeze(1), inverse], batch["cubes"], atol=1e-6)


def test_turned_cubes_come_back_when_turned_again(tmp_path):
    volumes = store(tmp_path, [np.random.default_rng(n).normal(size=(24, 24, 24)) for n in range(8)])
    config = CubeOrderingConfig(**TINY, **PLAIN, turns=("H", "W"))
    proxy = made(config, volumes, Watched).eval()
    told = {}
    for i in range(2):
        proxy.heads["volume"].turns[i] = Fixed(torch.zeros(8, 8), told, i)
    batch = batch_of(config, volumes, 0)
    accuracy = proxy(batch, one_group(0, 8)).metrics
    cubes = by_place(proxy.shown, proxy.asked[1])
    seen = set()
    for b, k in itertools.product(range(8), range(8)):
        true = batch["cubes"][b, k]
        about_h, about_w = true.flip(1, 3), true.flip(1, 2)
        kinds = {(0, 0): true, (1, 0): about_h, (0, 1): about_w, (1, 1): about_h.flip(1, 2)}
        fits = [kind for kind, cube in kinds.items() if torch.allclose(cubes[b, k], cube, atol=1e-6)]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) == 4
    assert 0.3 < accuracy["turned_H_accuracy"].item() < 0.7  # a head that always says no


class Fixed(nn.Module):
    """A head with fixed logits."""

    def __init__(self, logits, *_):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return self.logits


@pytest.mark.parametrize(("masks", "share"), [("voxels", 0.5), ("block", 0.5), ("block", 1.0)])
def test_half_of_the_cubes_lose_a_share(tmp_path, masks, share):
    volumes = store(tmp_path, [np.random.default_rng(n).normal(size=(24, 24, 24)) for n in range(12)])
    config = CubeOrderingConfig(**TINY, masks=masks, mask_share=share)
    proxy = made(config, volumes, Watched).eval()
    proxy(batch_of(config, volumes, 0), one_group(0, 12))
    lost = (proxy.shown == 0).flatten(2).float().mean(2)
    assert 0.35 < (lost > 0).float().mean() < 0.65
    assert (lost[lost > 0] - share).abs().max() < 0.12
    if masks == "block":  # one box
        gone = (proxy.shown[:, :, 0] == 0)[lost > 0]
        for cube in gone:
            where = cube.nonzero()
            box = where.amax(0) - where.amin(0) + 1
            assert box.prod() == len(where)


def test_images_have_heads_of_their_own_and_turn_in_plane(tmp_path):
    rng = np.random.default_rng(0)
    images = store(tmp_path / "images", [rng.normal(size=(1, 24, 24)) for _ in range(4)])
    both = open_data(
        [
            tmp_path / "images" / "store.h5",
            store(tmp_path / "volumes", [rng.normal(size=(24, 24, 24))])[0]._store.path,
        ]
    )
    config = CubeOrderingConfig(**TINY, turns=("H", "W"))
    assert set(made(config, images).heads) == {"image"}
    mixed = made(config, both)
    assert set(mixed.heads) == {"image", "volume"}
    metrics = mixed(batch_of(config, images, 0), one_group(0, 4)).metrics
    assert "turned_D_accuracy" in metrics and "turned_H_accuracy" not in metrics
    assert metrics["chance"].item() == pytest.approx(1 / 20)
    assert mixed.heads["image"].table.shape == (20, 4)
    with pytest.raises(UsageError, match="without images"):
        CubeOrdering(config, encoder())(batch_of(config, images, 0), one_group(0, 4))


@pytest.mark.parametrize("turns", [(), ("H", "W")])
def test_cubes_of_volumes_may_be_one_slice_deep(tmp_path, turns):
    # Few thick slices, cut along D all the same: two layers of one slice each, with one between them.
    rng = np.random.default_rng(0)
    config = CubeOrderingConfig(crop=(4, 24, 24), gap=1, gap_mm=0.0, jitter=0, hidden=32, turns=turns)
    assert config.cube == (1, 11, 11)
    volumes = store(tmp_path / "volumes", [rng.normal(size=(6, 30, 30)) for _ in range(4)])
    proxy = made(config, volumes)
    assert set(proxy.heads) == {"volume"}
    output = proxy(batch_of(config, volumes, 0), one_group(0, 4))
    output.loss.backward()
    assert output.metrics["chance"].item() == pytest.approx(1 / 100)  # of 8 cubes, not of 4
    # Turned in the plane: about H or W, a single slice would be mirrored.
    assert [name for name in output.metrics if name.startswith("turned")] == ["turned_D_accuracy"] * bool(
        turns
    )
    assert len(output.picture().axes[0].images) == 8
    boxes = {tuple(image.get_extent()) for image in output.picture().axes[0].images}
    assert len(boxes) == 8
    images = store(tmp_path / "images", [rng.normal(size=(1, 30, 30)) for _ in range(4)])
    folders = [tmp_path / name / "store.h5" for name in ("volumes", "images")]
    both = made(config, open_data(folders))
    assert both(batch_of(config, images, 0), one_group(0, 4)).metrics["chance"].item() == pytest.approx(
        1 / 24
    )
    assert both(batch_of(config, volumes, 0), one_group(0, 4)).metrics["chance"].item() == pytest.approx(
        0.01
    )


# Intensities ----------------------------------------------------------------------------------------


def prepared(config, cubes, extent=None):
    proxy = CubeOrdering(config, encoder()).eval()
    count = len(cubes)
    extent = torch.tensor([cubes.shape[3:]] * count) if extent is None else extent
    return proxy._prepare(cubes, extent, torch.ones(count, 3), one_group(0, count))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_gain_offset_and_ramps_of_a_cube_change_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    cubes = torch.randn(2, 8, 1, 10, 10, 10, generator=generator)
    gain = 0.5 + torch.rand(2, 8, 1, 1, 1, 1, generator=generator)
    slopes = torch.randn(3, 2, 8, 1, 1, 1, 1, generator=generator)
    line = torch.linspace(-1, 1, 10)
    ramp = slopes[0] * line[:, None, None] + slopes[1] * line[:, None] + slopes[2] * line
    config = CubeOrderingConfig(**TINY)
    plain, _ = prepared(config, cubes)
    changed, _ = prepared(config, gain * cubes + ramp + 5 * slopes[0])
    assert torch.allclose(plain, changed, atol=1e-4)
    assert torch.allclose(plain.mean((3, 4, 5)), torch.zeros(2, 8, 1), atol=1e-5)
    assert torch.allclose(plain.square().mean((3, 4, 5)), torch.ones(2, 8, 1), atol=1e-4)


def test_padding_is_zero_whatever_the_cube(tmp_path):
    cubes = torch.randn(2, 8, 1, 10, 10, 10) + 7
    extent = torch.tensor([[10, 6, 10], [4, 10, 8]])
    x, _ = prepared(CubeOrderingConfig(**TINY), cubes, extent)
    assert (x[0, ..., :2, :] == 0).all() and (x[0, ..., 8:, :] == 0).all()
    assert (x[0, ..., 2:8, :] != 0).all()
    assert (x[1, :, :, :3] == 0).all() and (x[1, ..., 9:] == 0).all()
    inner = x[1, :, :, 3:7, :, 1:9]
    assert torch.allclose(inner.square().mean((2, 3, 4)), torch.ones(8, 1), atol=1e-4)


def test_faint_cubes_are_not_blown_up_and_flat_ones_are_named():
    cubes = torch.randn(1, 8, 1, 10, 10, 10)
    cubes[0, 0] *= 1e-3  # air
    cubes[0, 1] = 3.0
    x, flat = prepared(CubeOrderingConfig(**TINY), cubes)
    assert x[0, 0].abs().max() < 0.1
    assert flat[0].tolist() == [False, True] + [False] * 6
    assert (x[0, 1].abs() < 1e-4).all()


def test_training_changes_every_cube_on_its_own():
    config = CubeOrderingConfig(**TINY | {"noise": 0.0, "bias": 0.0, "gamma": 0.0, "chance": 1.0})
    proxy = CubeOrdering(config, encoder()).train()
    cubes = torch.randn(1, 1, 1, 10, 10, 10).expand(2, 8, -1, -1, -1, -1)
    x, _ = proxy._prepare(cubes, torch.full((2, 3), 10), torch.ones(2, 3), one_group(0, 2))
    means = x.mean((2, 3, 4, 5)).flatten()
    assert len(means.unique()) == 16


# Losses and metrics ---------------------------------------------------------------------------------


def test_permutation_loss_by_hand(tmp_path):
    volumes = store(tmp_path, [np.random.default_rng(n).normal(size=(24, 24, 24)) for n in range(3)])
    config = CubeOrderingConfig(**TINY | {"permutations": 3})
    proxy = made(config, volumes, Watched).eval()
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, math.log(6.0)]])
    proxy.heads["volume"].order = Fixed(logits)
    output = proxy(batch_of(config, volumes, 0), one_group(1, 3))
    asked = proxy.asked[0].tolist()
    expected = 0.0
    for row, k in zip(logits.tolist(), asked):
        expected += -math.log(math.exp(row[k]) / sum(map(math.exp, row))) / 3
    assert output.loss.item() == pytest.approx(expected, abs=1e-6)
    assert output.metrics["order_accuracy"].item() == pytest.approx(
        sum(k == i for i, k in enumerate(asked)) / 3
    )
    assert output.metrics["chance"].item() == pytest.approx(1 / 3)


def test_position_turn_and_mask_losses_by_hand(tmp_path):
    volumes = store(tmp_path, [np.random.default_rng(n).normal(size=(1, 24, 24)) for n in range(2)])
    config = CubeOrderingConfig(**TINY, target="position", turns=("H",), masks="voxels", side_weight=0.5)
    proxy = made(config, volumes, Watched).eval()
    heads = proxy.heads["image"]
    rng = np.random.default_rng(0)
    order, turn, mask = (
        torch.tensor(rng.normal(size=n), dtype=torch.float32) for n in ((2, 16), (2, 4), (2, 4))
    )
    heads.order, heads.turns[0], heads.masked = Fixed(order), Fixed(turn), Fixed(mask)
    output = proxy(batch_of(config, volumes, 0), one_group(1, 2))
    true = proxy.asked[1].tolist()
    # The two labels, from what was drawn: the generator's draws after those of the order.
    draws = one_group(1, 2)
    draws.permutation(4)
    turned, masked = draws.chance(0.5, 4), draws.chance(0.5, 4)
    assert torch.equal(masked, (proxy.shown == 0).flatten(2).any(2))
    expected = 0.0
    for b, k in itertools.product(range(2), range(4)):
        row = order[b].view(4, 4)[k].tolist()
        expected += -math.log(math.exp(row[true[b][k]]) / sum(map(math.exp, row))) / 8
        for logits, truth in ((turn, turned), (mask, masked)):
            p = 1 / (1 + math.exp(-logits[b, k].item()))
            expected += 0.5 * -math.log(p if truth[b, k] else 1 - p) / 8
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)
    assert output.metrics["turned_D_accuracy"].item() == pytest.approx(
        ((turn > 0) == turned).float().mean().item()
    )
    assert output.metrics["masked_accuracy"].item() == pytest.approx(
        ((mask > 0) == masked).float().mean().item()
    )


def test_places_are_the_best_assignment():
    logits = torch.tensor([[[3.0, 2.9, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    assert assign(logits).tolist() == [[1, 0, 2]]  # each slot for itself would take 0 twice
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 4, generator=generator)
    scores = logits.log_softmax(2)
    for one, found in zip(scores, assign(logits)):
        best = max(itertools.permutations(range(4)), key=lambda p: sum(one[i, k] for i, k in enumerate(p)))
        assert found.tolist() == list(best)


@pytest.mark.parametrize("target", ["permutation", "position"])
def test_the_right_answer_has_no_loss_and_full_marks(tmp_path, target):
    volumes = store(tmp_path, [np.random.default_rng(n).normal(size=(24, 24, 24)) for n in range(4)])
    config = CubeOrderingConfig(**TINY, target=target)
    proxy = made(config, volumes, Watched).eval()
    batch = batch_of(config, volumes, 0)
    proxy(batch, one_group(0, 4))
    asked, order = proxy.asked
    answer, classes = (asked, 20) if target == "permutation" else (order, 8)
    proxy.heads["volume"].order = Fixed(100 * nn.functional.one_hot(answer, classes).float().flatten(1))
    output = proxy(batch, one_group(0, 4))
    assert output.loss.item() < 1e-6
    assert output.metrics["order_accuracy"].item() == 1
    if target == "position":
        assert output.metrics["placed"].item() == 1
        assert output.metrics["chance"].item() == pytest.approx(1 / 40320)
        assert output.metrics["placed_chance"].item() == pytest.approx(1 / 8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 300))
def test_undecidable_is_what_fits_two_permutations(seed, count):
    heads = CubeOrdering(CubeOrderingConfig(**TINY | {"permutations": count}), encoder()).heads["volume"]
    rng = np.random.default_rng(seed)
    asked = rng.integers(len(heads.table), size=6)
    filled = rng.random((6, 8)) < rng.random((6, 1))
    table = heads.table.numpy()
    expected = [
        sum(all(q[i] == table[k, i] for i in range(8) if full[i]) for q in table) > 1
        for k, full in zip(asked, filled)
    ]
    assert heads.ambiguous(torch.tensor(table[asked]), torch.tensor(filled)).tolist() == expected


def test_a_few_empty_cubes_are_decided_by_the_others(tmp_path):
    volumes = store(tmp_path, [np.random.default_rng(n).normal(size=(24, 24, 24)) for n in range(4)])
    for target, allowed in (("permutation", 5), ("position", 1)):  # distance 6; the last one out
        config = CubeOrderingConfig(**TINY | {"permutations": 100}, target=target)
        proxy = made(config, volumes).eval()
        batch = batch_of(config, volumes, 0)
        shares = []
        for empty in range(9):
            some = {**batch, "filled": torch.arange(8).expand(4, 8) >= empty}
            shares.append(proxy(some, one_group(0, 4)).metrics["undecidable"].item())
        assert shares[: allowed + 1] == [0.0] * (allowed + 1)
        assert shares[8] == 1.0
        assert sorted(shares) == shares


def test_undecidable_examples_do_not_train_the_order(tmp_path):
    volumes = store(tmp_path, [np.full((24, 24, 24), 2.0) for _ in range(4)])  # foreground, and nothing
    config = CubeOrderingConfig(**TINY)
    output = made(config, volumes)(batch_of(config, volumes, 0), one_group(0, 4))
    assert output.metrics["undecidable"].item() == 1
    assert output.loss.item() == 0


def test_cubes_are_embedded_alone(phantoms):
    config = CubeOrderingConfig(**TINY)
    proxy = made(config, phantoms).eval()
    cubes = batch_of(config, list(phantoms)[:1], 0)["cubes"][0]
    with torch.no_grad():
        together = proxy.reduce(proxy.encoder.embed(cubes))
        alone = torch.cat([proxy.reduce(proxy.encoder.embed(cube)) for cube in cubes.split(1)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_two_ranks_see_the_numbers_of_one(phantoms, norm):
    config = CubeOrderingConfig(**TINY, turns=("H", "W"), masks="block", head_norm=norm)
    proxy = made(config, phantoms, norm="group").train()
    batch = batch_of(config, list(phantoms)[:4], 0)
    with torch.no_grad():
        whole = proxy(batch, one_group(3, 4)).loss
        halves = [
            proxy({k: v[rows] for k, v in batch.items()}, BatchRng(3, rows, 4)).loss
            for rows in ([0, 1], [2, 3])
        ]
    assert torch.allclose(whole, sum(halves) / 2, atol=1e-5)


def test_the_permutations_say_how_far_apart_they_are():
    proxy = CubeOrdering(CubeOrderingConfig(), encoder())
    assert "100 permutations, subset of PGL(2, 7), min_distance=6" in repr(proxy)
    assert proxy.state_dict()["heads.volume.table"].shape == (100, 8)


@pytest.mark.parametrize(
    ("grid", "crop"), [((2, 2, 2), (24, 24, 24)), ((3, 3, 3), (36, 36, 36)), ((1, 2, 3), (9, 24, 36))]
)
def test_picture_shows_shown_predicted_and_true(phantoms, grid, crop):
    config = CubeOrderingConfig(**TINY | {"crop": crop}, grid=grid)
    figure = made(config, phantoms)(batch_of(config, list(phantoms)[:2], 0), one_group(0, 2)).picture()
    assert [panel.get_ylabel() for panel in figure.axes] == ["shown", "predicted", "true"]
    for panel in figure.axes:
        assert len(panel.images) == math.prod(grid)
        boxes = {tuple(image.get_extent()) for image in panel.images}
        assert len(boxes) == math.prod(grid)  # each at a place of its own
    assert sorted(int(text.get_text()) for text in figure.axes[2].texts) == list(
        range(1, math.prod(grid) + 1)
    )


# Learning -------------------------------------------------------------------------------------------

FLAT = {"grid": (1, 2, 2), "crop": (1, 40, 40), "permutations": 4, "hidden": 64}  # fast: images, 1 in 4


def noise(count=48, smooth=0.0, side=40):
    rng = np.random.default_rng(0)
    for _ in range(count):
        image = rng.normal(size=(1, side, side))
        if smooth:
            image = gaussian_filter(image, (0, smooth, smooth))
        yield image / image.std()


def accuracy(tmp_path, images, config, steps=45, **options):
    """Of held-back images, after training on the others."""
    volumes = store(tmp_path, list(images))
    return metric(train(config, volumes[16:], steps, **options), volumes[:16])


@pytest.mark.long
def test_it_orders_phantoms_never_seen(phantoms):
    config = CubeOrderingConfig(grid=(1, 2, 2), crop=(12, 40, 40), permutations=4, hidden=64)
    trained = train(config, phantoms[:28], steps=50, batch=12)
    assert metric(trained, phantoms[28:], repeats=4) > 0.6 > 1 / 4


def quarters(count=48):
    """Images whose four quarters have textures of their own."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        image = rng.normal(size=(1, 40, 40))
        image[:, :20, :20] = gaussian_filter(image[:, :20, :20], (0, 2, 0)) * 3
        image[:, 20:, :20] = gaussian_filter(image[:, 20:, :20], (0, 0, 2)) * 3
        image[:, 20:, 20:] = gaussian_filter(image[:, 20:, 20:], (0, 2, 2)) * 5
        yield image


class Shuffled(CubeOrdering):
    """Asks for an order that has nothing to do with the one shown."""

    def _shuffle(self, heads, rng, count):
        _, order = super()._shuffle(heads, rng, count)
        asked = rng.integers(0, len(heads.table))
        return asked, order


def test_it_orders_textures_and_shuffled_targets_stay_at_chance(tmp_path):
    config = CubeOrderingConfig(**FLAT)
    assert accuracy(tmp_path / "a", quarters(), config) > 0.9
    assert abs(accuracy(tmp_path / "b", quarters(), config, kind=Shuffled) - 1 / 4) < 0.12


def test_places_are_learnt(tmp_path):
    volumes = store(tmp_path, list(quarters()))
    trained = train(CubeOrderingConfig(**FLAT, target="position"), volumes[16:])
    assert metric(trained, volumes[:16], "placed") > 0.8
    assert metric(trained, volumes[:16]) > 0.5 > 1 / 24


def comet(rng):
    """An image of dots with tails to the lower right."""
    image = rng.random((1, 40, 40)) < 0.04
    for axis in (1, 2):
        image = lfilter([1.0], [1.0, -0.8], image, axis=axis)
    return image


def test_turns_are_learnt(tmp_path):
    rng = np.random.default_rng(0)
    volumes = store(tmp_path, [comet(rng) for _ in range(48)])
    trained = train(CubeOrderingConfig(**FLAT, turns=("D",), side_weight=5.0), volumes[16:], steps=50)
    assert metric(trained, volumes[:16], "turned_D_accuracy") > 0.85


def test_masks_are_learnt(tmp_path):
    volumes = store(tmp_path, list(noise()))
    trained = train(CubeOrderingConfig(**FLAT, masks="voxels"), volumes[16:], steps=60)
    assert metric(trained, volumes[:16], "masked_accuracy") > 0.8


# Shortcut controls: what is not anatomy must not be ordered -----------------------------------------


def test_noise_stays_at_chance(tmp_path):
    config = CubeOrderingConfig(**FLAT)
    assert abs(accuracy(tmp_path, noise(), config) - 1 / 4) < 0.12


def test_small_volumes_of_noise_stay_at_chance(tmp_path):
    # A third of every cube is padding.
    config = CubeOrderingConfig(**FLAT)
    assert abs(accuracy(tmp_path, noise(side=30), config) - 1 / 4) < 0.12


@pytest.mark.long
def test_touching_borders_are_a_shortcut_and_gap_with_jitter_close_it(tmp_path):
    images = list(noise(smooth=3.0))
    bare = accuracy(tmp_path / "a", images, CubeOrderingConfig(**FLAT, **UNGUARDED), steps=110)
    guarded = accuracy(tmp_path / "b", images, CubeOrderingConfig(**FLAT), steps=110)
    assert bare > 0.5
    assert guarded < 0.38


def test_a_ramp_over_the_volume_is_a_shortcut_and_intensities_of_their_own_close_it(tmp_path):
    ramp = np.linspace(-1, 1, 40)[:, None] + 0.5 * np.linspace(-1, 1, 40)
    images = [image + ramp for image in noise()]
    bare = accuracy(tmp_path / "a", images, CubeOrderingConfig(**FLAT, **PLAIN))
    guarded = accuracy(tmp_path / "b", images, CubeOrderingConfig(**FLAT))
    assert bare > 0.9
    assert abs(guarded - 1 / 4) < 0.12


def test_a_coil_field_is_a_shortcut_and_taking_off_ramps_closes_it(tmp_path):
    # Brighter in the middle: within each cube, the slope points there.
    line = np.linspace(-1, 1, 40)
    field = 3 * np.exp(-(line[:, None] ** 2) - line**2)
    images = [image + field for image in noise()]
    sloped = accuracy(tmp_path / "a", images, CubeOrderingConfig(**FLAT, detrend=False))
    guarded = accuracy(tmp_path / "b", images, CubeOrderingConfig(**FLAT))
    assert sloped > guarded + 0.2
    assert guarded < 0.38
