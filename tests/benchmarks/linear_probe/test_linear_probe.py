"""The linear probe: its fits, its dense head and its trivial rows on data whose answer is known."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl3d.api import Contestant, DataError, Encoder, UsageError, encoder_from, open_data, upsample
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d_benchmarks import trivial_rows as shapes
from ssl3d_benchmarks.features import embeddings
from ssl3d_benchmarks.linear_probe import dense as dense
from ssl3d_benchmarks.linear_probe.config import LinearProbeConfig
from ssl3d_benchmarks.linear_probe.protocol import LinearProbe, fit_classifier, fit_ridge
from ssl3d_benchmarks.task import find_target, mask_names


def a_store(path, volumes, settings=None):
    """Writes (subject, label, image (D, H, W), mask or None) to a store."""
    for number, (subject, label, image, mask) in enumerate(volumes):
        record = Record(id=f"v{number:03d}", dataset="made", subject=subject, label=label)
        write_part(Path(f"{path}.partial"), record.id, record, np.float32(image)[None], mask=mask)
    assemble(Path(f"{path}.partial"), path, settings or {}, [])
    return path


def test_structures_that_overlap_are_told_before_their_values_are_probed(tmp_path, capsys):
    regions = [{"name": "whole", "values": [1, 2], "class": 1}, {"name": "core", "values": [2], "class": 2}]
    path = a_store(tmp_path / "a.h5", blobs(2), {"mask_regions": {"made": regions, "other": regions}})
    assert find_target(open_data([path]), "masks", "a") == "masks"
    assert capsys.readouterr().err.splitlines() == [
        "made: its structures overlap (whole, core); the mask's values are scored one by one"
    ]


def blobs(n=12, shape=(12, 14, 10), seed=0):
    """Volumes with two mask classes, grey values unrelated to them."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        mask = np.zeros(shape, np.int64)
        z, y, x = rng.integers(2, 5, size=3)
        mask[z : z + 4, y : y + 5, x : x + 4] = 1
        mask[z + 4 : z + 6, y : y + 5, x : x + 4] = 2
        yield f"p{number}", number % 2, rng.normal(size=shape), mask


# Classes and values -------------------------------------------------------------------------------


def rows(n=120, seed=0):
    rng = np.random.default_rng(seed)
    return rng, np.repeat(np.arange(n // 2), 2), rng.integers(3, size=n // 2).repeat(2)


def test_classifier_reads_an_oracle_feature_and_stays_at_chance_on_noise():
    rng, subjects, y = rows()
    noise = rng.normal(size=(120, 300))
    oracle = np.c_[3 * np.eye(3)[y] + 0.1 * rng.normal(size=(120, 3)), 0.1 * noise]
    train = subjects < 40
    model, _ = fit_classifier(oracle[train], y[train], subjects[train], 3, seed=0)
    assert np.mean(model(oracle[~train]).argmax(1) == y[~train]) == 1
    model, l2 = fit_classifier(noise[train], y[train], subjects[train], 3, seed=0)
    assert np.mean(model(noise[~train]).argmax(1) == y[~train]) < 0.65
    assert l2 >= 1e2  # cross-validation sees that there is nothing to read


def test_classifier_equals_scikit_learn_at_its_l2():
    from sklearn.linear_model import LogisticRegression

    rng, subjects, y = rows(60)
    x = rng.normal(size=(60, 100)) + np.eye(3)[y] @ rng.normal(size=(3, 100))
    x -= x.mean(axis=0)
    model, l2 = fit_classifier(x, y, subjects, 3, seed=0)
    plain = LogisticRegression(C=1 / l2, max_iter=2000, tol=1e-8).fit(x, y)
    assert np.abs(model(x) - plain.predict_proba(x)).max() < 5e-3


def test_l2_is_chosen_across_subjects_not_rows():
    # Every subject has a fingerprint, twice. Folds that cut subjects would find it useful.
    rng, subjects, _ = rows(80)
    y = rng.integers(2, size=40)[subjects]
    x = np.eye(40)[subjects] * 5 + 0.01 * rng.normal(size=(80, 40))
    _, grouped = fit_classifier(x, y, subjects, 2, seed=0)
    _, cut = fit_classifier(x, y, np.arange(80), 2, seed=0)
    assert grouped > cut


def test_a_class_missing_from_train_gets_probability_0():
    rng, subjects, y = rows()
    x = rng.normal(size=(120, 5))
    kept = y != 1
    model, _ = fit_classifier(x[kept], y[kept], subjects[kept], 3, seed=0)
    assert model(x).shape == (120, 3) and np.all(model(x)[:, 1] == 0)
    assert np.allclose(model(x).sum(axis=1), 1)


def test_one_class_is_refused():
    with pytest.raises(DataError, match="one class only"):
        fit_classifier(np.zeros((4, 2)), np.zeros(4, int), np.arange(4), 2, seed=0)


def test_ridge_finds_a_linear_target():
    rng, subjects, _ = rows()
    x = rng.normal(size=(120, 20))
    y = x[:, 0] * 2 - x[:, 1] + 5
    model, _ = fit_ridge(x, y, subjects, seed=0)
    assert np.abs(model(x) - y).max() < 0.1
    with pytest.raises(DataError, match="one target value"):
        fit_ridge(x, np.ones(120), subjects, seed=0)


def test_scores_are_the_ones_of_medmnist(tmp_path):
    probe = LinearProbe(LinearProbeConfig("classes", ("a", "b")))
    predictions = [
        {"dataset": "d", "subject": str(k), "target": t, "probability": [1 - p, p]}
        for k, (t, p) in enumerate([("a", 0.1), ("b", 0.8), ("a", 0.5), ("b", 0.45), ("b", 0.4)])
    ]
    scores = probe.summarise(predictions).scores
    assert scores["auc"] == pytest.approx(4 / 6)
    assert scores["accuracy"] == pytest.approx(3 / 5)  # above .5, not at it: subject 2 is right
    assert scores["balanced_accuracy"] == pytest.approx((2 / 2 + 1 / 3) / 2)


class FirstVoxel(Encoder):
    """Embeds a volume as its first two voxels."""

    channels, strides, embed_dim = (1,), ((1, 1, 1),), 2

    def forward(self, x):
        return [x]

    def embed(self, x):
        return x[:, 0, 0, 0, :2] + next(self.parameters()).sum() * 0

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.config = None


@pytest.fixture
def two_per_subject(tmp_path, monkeypatch):
    """Twenty subjects with two volumes; only the sum over both says the class."""
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    volumes = []
    for person in range(40):
        values = rng.integers(2, size=2) * 2 - 1.0
        label = "same" if values.sum() != 0 else "different"
        for k in range(2):
            image = rng.normal(size=(2, 3, 4)) * 0.1
            image[0, 0, :2] = [values[k], values[0] * values[1] * (1 if k else 0.01)]
            volumes.append((f"p{person}", label, image, None))
    return open_data([a_store(tmp_path / "two.h5", volumes)])


@pytest.mark.parametrize(
    ("pooling", "per_subject", "features"), [("none", 2, 2), ("mean", 1, 2), ("concat", 1, 4)]
)
def test_volumes_of_a_subject_are_pooled(two_per_subject, pooling, per_subject, features):
    probe = LinearProbe(LinearProbeConfig("classes", ("different", "same"), pooling))
    contestant = Contestant("x", "encoder", pooling, FirstVoxel())
    people = two_per_subject.subject_codes
    train, val, test = (
        two_per_subject.select(np.flatnonzero(part)) for part in (people < 25, people == 25, people > 25)
    )
    scores = probe.score(contestant, train, val, test, seed=0)
    assert len(scores.predictions) == 14 * per_subject
    assert scores.details["features"] == features
    if pooling == "concat":  # only side by side is the second volume known as such
        assert scores.scores["auc"] == 1
    # At the score's bound there is none.
    assert np.isnan(scores.intervals["auc"]).all() == (scores.scores["auc"] == 1)
    low, high = scores.intervals["accuracy"]
    assert low <= scores.scores["accuracy"] <= high or scores.scores["accuracy"] == 1
    again = LinearProbe(probe.config).score(contestant, train, val, test, seed=0)
    assert again.predictions == scores.predictions


# Dense --------------------------------------------------------------------------------------------


def test_convolving_before_up_sampling_is_convolving_after():
    torch.manual_seed(0)
    maps = [torch.randn(3, 5, 7, 4), torch.randn(2, 3, 4, 2)]
    strides, shape = [(1, 2, 3), (2, 4, 8)], (5, 13, 11)
    head = dense.Head(torch.randn(4, 5), torch.randn(4))
    fast = head.logits(maps, strides, shape)
    whole = torch.cat([upsample(m[None], shape, s)[0] for m, s in zip(maps, strides, strict=True)])
    slow = F.conv3d(whole[None], head.weight[:, :, None, None, None], head.bias)[0]
    assert torch.allclose(fast, slow, atol=1e-5)
    points = torch.cartesian_prod(*[torch.arange(n) for n in shape])
    sampled = torch.cat([dense.at_voxels(m, s, points) for m, s in zip(maps, strides, strict=True)], dim=1)
    assert torch.allclose(sampled.T.reshape(whole.shape), whole, atol=1e-6)


def test_windowed_maps_are_those_of_the_whole_volume():
    # A norm-free look: with a window that leaves more rim than the receptive field, nothing changes.
    torch.manual_seed(0)
    encoder = encoder_from("scratch:resnet10:width=4", seed=0)
    image = torch.randn(1, 20, 40, 150)
    with torch.no_grad():
        whole = dense.feature_maps(encoder, image, (200, 200, 200))
        tiled = dense.feature_maps(encoder, image, (20, 40, 128))
        shallow = [(a - b).abs().max().item() for a, b in zip(whole, tiled, strict=True)]
    assert [m.shape for m in whole] == [m.shape for m in tiled]
    assert max(shallow[:3]) < 1e-4  # the deepest maps see further than the rim
    assert shallow[4] < whole[4].abs().max()


@pytest.mark.parametrize("stride", [2, 1], ids=["stem stride 2", "stem stride 1"])
def test_no_window_is_exceeded_and_slices_are_seen_on_their_own(stride):
    encoder = encoder_from(f"scratch:resnet10:acs:width=16:stem_stride={stride}", seed=0)
    deepest, seen = encoder.strides[-1][0], []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    image = torch.randn(1, 40, 70, 36)
    with torch.no_grad():
        for window in ((32, 32, 32), (16, 48, 20), (33, 64, 200), (1, 200, 200), (1, 32, 32)):
            maps = dense.feature_maps(encoder, image, window)
            assert all(n <= w for size in seen for n, w in zip(size, window, strict=True)), window
            seen.clear()
            for one, step in zip(maps, dense.strides_of(encoder, window), strict=True):
                assert one.shape[1:] == tuple(
                    -(-n // s) for n, s in zip(image.shape[1:], step, strict=True)
                )
        with pytest.raises(UsageError, match=f"--window: {deepest - 1} voxels of a volume of 40"):
            dense.feature_maps(encoder, image, (deepest - 1, 200, 200))
        other = image.clone()
        other[:, 8:] = 0
        before, after = (dense.feature_maps(encoder, x, (1, 200, 200)) for x in (image, other))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, 7], b[:, 7]) and not torch.equal(a[:, 8], b[:, 8])


def test_windows_that_were_exceeded_are_another_version():
    def version(**options):
        return LinearProbe(LinearProbeConfig(classes=("0", "1"), **options)).task_version

    assert version(target="masks") == version(target="classes", window=(1, 64, 64)) == 1
    assert (
        version(target="masks", window=(1, 192, 192)) == version(target="masks", window=(64, 64, 64)) == 2
    )


def test_sampled_voxels_stand_for_the_whole_volume():
    rng = np.random.default_rng(0)
    labels = np.zeros((16, 16, 16), np.int64)
    labels[2:5, 2:5, 2:5] = 1
    labels[8:14, 8:14, 8:14] = 2
    points, weights = dense.sample_voxels(labels, 400, "seed")
    drawn = labels[tuple(points.T)]
    assert weights.sum() == pytest.approx(1)
    for k in range(3):
        assert weights[drawn == k].sum() == pytest.approx(np.mean(labels == k))
        assert (drawn == k).sum() >= min(27, 100)
    assert len({tuple(p) for p in points}) == len(points)
    value = rng.normal(size=labels.shape) + np.arange(16)
    assert weights @ value[tuple(points.T)] == pytest.approx(value.mean(), abs=0.8)


def test_voxels_that_nobody_annotated_are_neither_drawn_nor_scored(tmp_path):
    labels = np.zeros((8, 8, 8), np.int64)
    labels[:4, :4], labels[4:] = 1, -1
    points, weights = dense.sample_voxels(labels, 200, "seed")
    assert (labels[tuple(points.T)] >= 0).all() and weights.sum() == pytest.approx(0.5)
    assert all(len(part) == 0 for part in dense.sample_voxels(np.full((2, 2, 2), -1), 9, "seed"))

    rng, scores = np.random.default_rng(0), []
    for value in (0, 3):
        path = tmp_path / f"{value}.h5"
        for number in range(4):
            mask = (np.arange(12) < 6).astype(np.int64) * np.ones((6, 8, 1), np.int64)
            image = rng.normal(size=mask.shape) * 0.1 + 5 * mask
            mask[3:] = value
            image[3:] = 5 if value else 0  # looks like class 1 where nobody has looked
            record = Record(id=f"v{number}", dataset="T", subject=f"p{number}")
            write_part(Path(f"{path}.partial"), record.id, record, np.float32(image)[None], mask=mask)
        assemble(Path(f"{path}.partial"), path, {"mask_ignore": {"T": 3}}, [])
        data = open_data([path])
        config = LinearProbeConfig(target="masks", classes=mask_names(data))
        assert config.classes == ("0", "1")
        features = dense.DenseFeatures(SimpleNamespace(encoder=None), data, config)
        rows, _ = dense.fit_dense(features, data[:2], data[2:3], data[3:], config, 0)
        scores.append(rows[0]["dice"]["1"])
    assert scores == [1.0, 1.0]


class Planted(Encoder):
    """Feature maps that are given: the mask's classes at stride 1, or noise."""

    channels, strides, embed_dim = (3, 2), ((1, 1, 1), (2, 2, 2)), 2

    def __init__(self, noise):
        super().__init__()
        self.noise, self.config = noise, None
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        generator = torch.Generator().manual_seed(int(x.abs().sum() * 1000) % 2**31)
        coarse = F.avg_pool3d(torch.randn(1, 2, *x.shape[2:], generator=generator), 2, ceil_mode=True)
        fine = F.one_hot(x[:, 0].round().long(), 3).movedim(-1, 1).float() * 5 + 100
        if self.noise:
            fine = torch.randn(fine.shape, generator=generator)
        return [fine, coarse]


@pytest.fixture
def dense_data(tmp_path):
    volumes = [(s, None, m, m) for s, _, _, m in blobs(14)]  # the image is the mask
    return open_data([a_store(tmp_path / "dense.h5", volumes)])


@pytest.mark.parametrize(("noise", "low", "high"), [(False, 0.99, 1.0), (True, 0.0, 0.35)])
def test_dense_probe_reads_planted_features_and_nothing_from_noise(dense_data, noise, low, high):
    probe = LinearProbe(LinearProbeConfig("masks", ("0", "1", "2"), samples=256))
    contestant = Contestant("x", "encoder", str(noise), Planted(noise))
    probe.prepare(contestant, dense_data)
    scores = probe.score(contestant, dense_data[:8], dense_data[8:10], dense_data[10:], seed=0)
    assert low <= scores.scores["dice"] <= high
    assert set(scores.scores) == {"dice", "dice_1", "dice_2"}
    assert len(scores.predictions) == 4


def test_dice_by_hand():
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert dense.dice(a, b) == 0.5
    assert dense.dice(a, ~a) == 0 and dense.dice(a, a) == 1
    assert dense.dice(a & ~a, a & ~a) is None


def test_dice_is_the_mean_over_a_subjects_volumes_first():
    probe = LinearProbe(LinearProbeConfig("masks", ("0", "1", "2")))
    rows = [("a", 0.2, None), ("a", 0.4, None), ("b", 0.9, 0.5)]
    found = probe.summarise(
        [
            {"dataset": "d", "subject": s, "id": str(k), "dice": {"1": x, "2": y}}
            for k, (s, x, y) in enumerate(rows)
        ]
    ).scores
    assert found["dice_1"] == pytest.approx((0.3 + 0.9) / 2)
    assert found["dice_2"] == 0.5  # nobody's where truth and prediction are empty
    assert found["dice"] == pytest.approx((0.6 + 0.5) / 2)


# Trivial rows -------------------------------------------------------------------------------------


@dataclass
class Ball:
    radius: float
    spacing: tuple[float, float, float]

    @property
    def mask(self):
        half = [math.ceil(self.radius / s) + 1 for s in self.spacing]
        grid = np.meshgrid(
            *[np.arange(-h, h + 1) * s for h, s in zip(half, self.spacing, strict=True)], indexing="ij"
        )
        return sum(g**2 for g in grid) <= self.radius**2


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_shape_features_of_a_ball_are_in_mm(spacing):
    found = dict(zip(shapes.FEATURES, shapes.shape_features(Ball(10, spacing).mask, spacing), strict=True))
    assert len(found) == 17
    assert found["log volume"] == pytest.approx(np.log(4 / 3 * np.pi * 1000), abs=0.03)
    for axis in (1, 2, 3):  # a ball's standard deviation along an axis is r / sqrt(5)
        assert found[f"log axis {axis}"] == pytest.approx(np.log(10 / np.sqrt(5)), abs=0.03)
    assert found["greatest thickness"] == pytest.approx(10, abs=1.1)
    assert found["share of the bounding box"] == pytest.approx(np.pi / 6, abs=0.1)
    assert found["solidity"] > 0.8 and found["log components"] == 0
    assert found["elongation"] == pytest.approx(1, abs=0.02)


def test_shape_features_of_boxes_by_hand():
    mask = np.zeros((6, 8, 20), bool)
    mask[1:3, 1:5, 1:9] = True
    found = dict(zip(shapes.FEATURES, shapes.shape_features(mask, (1, 1, 1)), strict=True))
    assert found["log volume"] == pytest.approx(np.log(64))
    assert found["log surface"] == pytest.approx(np.log(2 * (8 + 16 + 32)))
    assert found["solidity"] == pytest.approx(1) and found["share of the bounding box"] == 1
    assert found["log axis 1"] == pytest.approx(np.log(8 / np.sqrt(12)))
    assert (found["elongation"], found["flatness"]) == pytest.approx((0.5, 0.25))
    mask[1:3, 1:5, 15:17] = True
    found = dict(zip(shapes.FEATURES, shapes.shape_features(mask, (1, 1, 1)), strict=True))
    assert found["log components"] == pytest.approx(np.log(2))
    assert found["share of the largest component"] == pytest.approx(0.8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 5), (1, 1, 7), (3, 1, 4)])
def test_flat_and_empty_objects_have_features(shape):
    assert np.all(np.isfinite(shapes.shape_features(np.ones(shape, bool), (1, 1, 1))))
    assert np.all(shapes.shape_features(np.zeros(shape, bool), (1, 1, 1)) == 0)


def test_threshold_parts_a_binary_volume_exactly():
    mask = Ball(5, (1, 1, 1)).mask
    assert np.array_equal(
        shapes.bright(torch.from_numpy(np.where(mask, 1.7, -0.3).astype(np.float32))[None]), mask
    )
    noisy = np.where(mask, 5.0, 0.0) + np.random.default_rng(0).normal(size=mask.shape) * 0.5
    assert np.mean(shapes.bright(torch.from_numpy(noisy.astype(np.float32))[None]) == mask) > 0.995
    assert not shapes.bright(torch.zeros(1, 2, 3, 4)).any()


def test_pooled_voxels_have_one_length():
    assert shapes.pooled_voxels(torch.randn(1, 28, 28, 28)).shape == (343,)
    assert shapes.pooled_voxels(torch.randn(1, 5, 40, 31)).shape == (343,)
    assert shapes.pooled_voxels(torch.randn(2, 1, 28, 28)).shape == (98,)


def test_slabs_of_one_slice_and_of_several_have_rows_of_one_length(tmp_path, monkeypatch):
    """np.stack ended the linear probe in a traceback."""
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    volumes = [
        (f"p{n}", n % 2, rng.normal(size=(depth, 14, 10)), None) for n, depth in enumerate((1, 4, 1))
    ]
    data = open_data([a_store(tmp_path / "a.h5", volumes)])
    for name in shapes.TRIVIAL:
        row = SimpleNamespace(encoder=None, details={"features": name}, digest=name)
        features = embeddings(row, data, (8, 8, 8), "32", ())
        assert features.shape[0] == 3 and np.isfinite(features).all()
    assert features.shape == (3, 343)
    np.testing.assert_array_equal(features[0, :49], features[0, -49:])  # its one slice, seven times
