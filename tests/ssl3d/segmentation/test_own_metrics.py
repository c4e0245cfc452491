"""Metrics of one's own by file: a right one is scored everywhere, a wrong one is refused by name."""

import csv
import re

import pytest

from ssl3d.api import load_metric, metric_name, phantom_store, read_result, record_files, recorded_metric
from ssl3d.cli import main
from ssl3d.errors import PluginError
from ssl3d.testing import check_metric

BOUNDARY_IOU = '''
from scipy import ndimage


def boundary_iou(predicted, truth, spacing):
    """Overlap of the rims, one voxel wide."""
    rims = [mask & ~ndimage.binary_erosion(mask) for mask in (predicted, truth)]
    union = (rims[0] | rims[1]).sum()
    return float((rims[0] & rims[1]).sum() / union) if union else None
'''


@pytest.fixture
def metric(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(BOUNDARY_IOU, encoding="utf-8")
    return f"{path}:boundary_iou"


def test_a_right_metric_passes(metric):
    check_metric(metric)
    check_metric(load_metric(metric))
    assert metric_name(metric) == metric_name(recorded_metric(metric)) == "boundary_iou"
    assert re.fullmatch("boundary_iou@[0-9a-f]{16}", recorded_metric(metric))


WRONG = {
    "distance": (
        "return 1.0 * (predicted != truth).sum()",
        "higher must be better, but of masks",
    ),
    "constant": ("return 1.0", "a perfect prediction has 1 and one that misses the object 1"),
    "word": ("return 'good'", "it returned 'good', expected a number or None"),
    "infinite": (
        "return 1.0 if (predicted == truth).all() else -float('inf')",
        "it returned -inf",
    ),
    "division": ("return (predicted & truth).sum().item() / truth.sum().item()", "ZeroDivisionError"),
    "empty": (
        "return None",
        "it is undefined of masks of 6 x 8 x 7 voxels",
    ),
    "changing": (
        "predicted &= truth\n    return float(predicted.sum())",
        "it changes the masks",
    ),
    "cubes": (
        "assert len(set(spacing)) == 1\n    return float((predicted & truth).sum())",
        "AssertionError",
    ),
    "volumes": ("return float((predicted & truth)[1].sum())", "IndexError"),
    "dice": ("return float((predicted & truth).sum())", "masks have a score dice already"),
    "random": (
        "import random\n    return float((predicted == truth).all()) * 9 + random.random()",
        "it gives two numbers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_metric_is_refused_by_name(tmp_path, name, capsys):
    body, message = WRONG[name]
    path = tmp_path / "my.py"
    path.write_text(f"def {name}(predicted, truth, spacing):\n    {body}\n", encoding="utf-8")
    with pytest.raises(PluginError) as error:
        check_metric(f"{path}:{name}")
    said = str(error.value)
    assert said.startswith(f"--metric {path}:{name}: ") and message in said and "\n" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("my.py", "expected FILE.py:FUNCTION, such as my/metrics.py:boundary_iou"),
        ("{folder}/nowhere.py:f", "No such file"),
        ("{folder}/my.py:other", "the file has no function other"),
        ("{folder}/broken.py:f", "SyntaxError"),
    ],
)
def test_what_is_no_metric_is_one_line_before_anything_is_computed(
    metric, tmp_path, capsys, words, message
):
    (tmp_path / "broken.py").write_text("def f(:\n", encoding="utf-8")
    words = words.format(folder=tmp_path)
    for command in (["linear-probe", "--target", "masks"], ["finetune", "--task", "segmentation"]):
        out = tmp_path / command[0]
        arguments = [command[0], "scratch:resnet10:width=4", "--data", "phantoms:12", *command[1:]]
        assert main([*arguments, "--metric", words, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith(f"ssl3d: --metric {words}: ") and message in error
        assert not list(tmp_path.glob(f"{command[0]}/*.json"))


def test_it_is_for_masks(metric, tmp_path, capsys):
    for command in (["linear-probe", "--target", "classes"], ["finetune", "--task", "classification"]):
        arguments = [command[0], "scratch:resnet10:width=4", "--data", "phantoms:12", *command[1:]]
        assert main([*arguments, "--metric", metric, "--out", str(tmp_path / "o")]) == 2
        assert "a metric of one's own is for masks" in capsys.readouterr().err


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(phantom_store(16, shape=(8, 16, 16), folder=tmp_path_factory.mktemp("phantoms")))


def test_it_is_scored_by_the_dense_probe_and_by_fine_tuning_and_shown_in_the_report(
    store, metric, tmp_path
):
    spec, results = "scratch:resnet10:width=4:stem_kernel=3:stem_stride=1,1,1", tmp_path / "results"
    fixed = [spec, "--data", store, "--metric", metric]
    probe = ["linear-probe", *fixed, "--target", "masks", "--untrained", "1", "--recalibrate", "no"]
    assert main([*probe, "--samples", "100", "--out", str(results / "probe")]) == 0
    tuned = ["finetune", *fixed, "--task", "segmentation", "--segmentation.patch", "8", "16", "16"]
    tuned += [
        "--segmentation.width",
        "4",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--threads",
        "1",
        "--lr",
        "1e-3",
    ]
    assert main([*tuned, "--out", str(results / "tuned")]) == 0
    for path in record_files(results):
        record = read_result(path)
        classes = {name.removeprefix("dice_") for name in record.scores if name.startswith("dice_")}
        assert {f"boundary_iou_{name}" for name in classes} | {"boundary_iou"} <= set(record.scores)
        values = [row["boundary_iou"][name] for row in record.predictions for name in classes]
        known = [value for value in values if value is not None]
        assert known and all(0 <= value <= 1 for value in known)
        settings = record.settings.get("task", record.settings)
        assert settings["metric"] == [recorded_metric(metric)]
    out = tmp_path / "report"  # the file is not needed any more
    (tmp_path / "my.py").unlink()
    assert main(["leaderboard", "report", str(results), "--out", str(out), "--resamples", "100"]) == 0
    table = list(csv.DictReader((out / "scores.csv").open(encoding="utf-8")))
    assert len(table) >= 4 and all(row["score_boundary_iou"] for row in table)


def test_without_it_records_keep_their_names():
    """Settings are part of the key: an option more would do every job anew."""
    from ssl3d_benchmarks.finetune.protocol import task_class

    task = task_class("segmentation").scorer({"classes": [0, 1]}, "masks")
    task.values, task.patch, task._slices = (0, 1), (8, 8, 8), {}
    assert "metric" not in task.settings()
