"""kNN against scikit-learn, on features whose answer is known, and from the command line."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from ssl3d.api import read_result
from ssl3d.cli import main
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d_benchmarks.knn.protocol import KNN, KNNConfig, neighbours_mean

SPEC = "scratch:resnet10:acs:width=8"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL3D_CACHE", str(folder))
        yield folder


def a_store(path, labels):
    rng = np.random.default_rng(0)
    for k, label in enumerate(labels):
        record = Record(id=f"v{k:03d}", dataset="made", subject=f"p{k}", label=label)
        image = rng.normal(size=(1, 6, 8, 8)).astype(np.float32)
        image[:, :3] += float(label) if isinstance(label, float) else 0.0
        write_part(Path(f"{path}.partial"), record.id, record, image)
    assemble(Path(f"{path}.partial"), path, {}, [])
    return str(path)


def records(folder):
    return [read_result(path) for path in sorted(Path(folder).glob("*.json"))]


def drawn(rows=80, features=12, classes=3):
    rng = np.random.default_rng(1)
    y = rng.integers(classes, size=rows)
    x = rng.normal(size=(rows, features)) + np.eye(classes)[y] @ rng.normal(size=(classes, features))
    return x, y, rng.normal(size=(25, features))


@pytest.mark.parametrize("count", [1, 5, 20])
def test_votes_equal_scikit_learn(count):
    x, y, new = drawn()
    votes = np.eye(3)[y]
    even = KNeighborsClassifier(count, metric="cosine").fit(x, y)
    assert np.allclose(neighbours_mean(x, votes, new, count, None), even.predict_proba(new))
    # scikit-learn's cosine distance is 1 less the similarity.
    weighted = KNeighborsClassifier(count, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(
        x, y
    )
    assert np.allclose(neighbours_mean(x, votes, new, count, 0.07), weighted.predict_proba(new))


def test_values_equal_scikit_learn():
    x, y, new = drawn()
    values = x[:, 0] * 3 + y
    model = KNeighborsRegressor(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.2)).fit(x, values)
    assert np.allclose(neighbours_mean(x, values[:, None], new, 7, 0.2)[:, 0], model.predict(new))


def test_a_cold_temperature_is_the_nearest_neighbour_and_does_not_overflow():
    x, y, new = drawn()
    votes = np.eye(3)[y]
    cold = neighbours_mean(x, votes, new, 20, 1e-6)
    assert np.allclose(cold, neighbours_mean(x, votes, new, 1, None), atol=1e-3)
    assert np.isfinite(cold).all()


def test_length_of_features_means_nothing_and_a_small_bank_is_used_whole():
    x, y, new = drawn()
    scale = np.random.default_rng(2).uniform(0.1, 9, size=(len(x), 1))
    votes = np.eye(3)[y]
    assert np.allclose(neighbours_mean(x * scale, votes, new, 5), neighbours_mean(x, votes, new, 5))
    whole = neighbours_mean(x[:4], votes[:4], new, 20, None)
    assert np.allclose(whole, votes[:4].mean(axis=0))
    assert np.isfinite(neighbours_mean(np.zeros((4, 3)), votes[:4], np.zeros((2, 3)), 2)).all()


def test_end_to_end_beside_untrained_and_trivial_rows(cache, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["knn", SPEC, "--data", "phantoms:24", "--out", str(out), "--untrained", "2"]
    assert main([*arguments, "--recalibrate", "no", "--fractions", "0.5", "1", "--repeats", "2"]) == 0
    shown = capsys.readouterr()
    for words in (
        "knn/classes v1 on phantoms",
        "2 untrained seeds",
        "shape features",
        "mean of 2 nested subsets",
    ):
        assert words in shown.out
    found = records(out)
    assert len(found) == 5 * 3 and {r.task for r in found} == {"knn/classes"}
    for result in found:
        assert result.settings["neighbours"] == 20 and "samples" not in result.settings
        assert result.compute["details"]["neighbours"] == min(20, result.compute["details"]["train_rows"])
        assert all(abs(sum(row["probability"]) - 1) < 1e-9 for row in result.predictions)
    assert main([*arguments, "--recalibrate", "no", "--fractions", "0.5", "1", "--repeats", "2"]) == 0
    assert capsys.readouterr().err.count("found in") == 5


def test_values_are_regressed(cache, tmp_path):
    data = a_store(tmp_path / "s.h5", [k / 3 + 0.1 for k in range(24)])
    out = tmp_path / "out"
    assert (
        main(["knn", SPEC, "--data", data, "--out", str(out), "--untrained", "1", "--neighbours", "3"]) == 0
    )
    pooled = next(r for r in records(out) if r.contestant["name"] == "pooled voxels")
    assert pooled.task == "knn/real" and pooled.scores["spearman"] > 0.8


@pytest.mark.parametrize(
    ("labels", "extra", "message"),
    [
        ([None] * 8, [], "neither labels nor masks"),
        ([0, 1] * 4, ["--neighbours", "0"], "--neighbours: "),
        ([0, 1] * 4, ["--temperature", "0"], "--temperature: "),
        ([0, 1] * 4, ["--weights", "odd"], "--weights: "),
        ([0, 1], [], "subjects to train on and"),
    ],
)
def test_wrong_input_is_one_clear_line(cache, tmp_path, capsys, labels, extra, message):
    data = a_store(tmp_path / "s.h5", labels)
    assert main(["knn", SPEC, "--data", data, "--out", str(tmp_path / "out"), *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("ssl3d")


def test_masks_are_left_to_the_linear_probe(cache, tmp_path, capsys):
    for k in range(8):
        record = Record(id=f"v{k}", dataset="made", subject=f"p{k}")
        mask = np.zeros((6, 8, 8), np.int64)
        mask[:3] = 1
        image = np.random.default_rng(k).normal(size=(1, 6, 8, 8)).astype(np.float32)
        write_part(tmp_path / "s.h5.partial", record.id, record, image, mask=mask)
    assemble(tmp_path / "s.h5.partial", tmp_path / "s.h5", {}, [])
    assert main(["knn", SPEC, "--data", str(tmp_path / "s.h5"), "--out", str(tmp_path / "out")]) == 2
    assert "knn takes classes, ordinal, real; use linear-probe" in capsys.readouterr().err


def test_configuration_is_checked():
    assert KNN.mains == {"classes": "auc", "ordinal": "spearman", "real": "r2"}
    for wrong in ({"neighbours": 0}, {"temperature": 0.0}, {"target": "masks"}, {"classes": ("a",)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            KNNConfig(**{"classes": ("a", "b"), **wrong})
