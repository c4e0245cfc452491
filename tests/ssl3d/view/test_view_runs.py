"""Pages of runs: curves of any length, pictures over time, settings, and what to type next."""

import json

import numpy as np
import pytest
from PIL import Image

from ssl3d.api import write_result
from ssl3d.cli import main
from ssl3d.evaluation.records import Result
from ssl3d.view.curves import POINTS, read_curves
from ssl3d.yaml_files import dump_yaml


def a_run(folder, steps=300):
    """A run that was stopped: its settings, its log and some pictures."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml({"proxy": ["sorting"], "steps": 2 * steps, "lr": 0.001}))
    lines = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "loss": 5 / step,
            "sorting/loss": 5 / step,
            "lr": 0.001 * (steps - step),
            "sorting/undecidable": 0.0,
            "sorting/kendall_tau": step / steps,
            "waiting": 0.1,
        }
        if step % 50 == 0:
            record["holdout/sorting/kendall_tau"] = 0.9 * step / steps
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 301, "loss": 0.')
    for step in range(10, 10 * 21, 10):
        Image.new("RGB", (30, 20), (step, 0, 0)).save(folder / "pictures" / f"sorting-{step:08d}.png")
    return folder


def test_a_run_shows_curves_pictures_settings_and_what_to_type_next(tmp_path, capsys):
    run = a_run(tmp_path / "run")
    out = tmp_path / "p.html"
    assert main(["view", str(run), "--out", str(out)]) == 0
    assert "a run of 300 steps" in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    assert "300 of 600 steps are logged" in text and f"ssl3d pretrain --resume {run}" in text
    assert "Loss of training" in text and "Learning rate" in text and "held out" in text
    assert "The same at every step: sorting/undecidable 0." in text and ">undecidable<" not in text
    first = text[text.index("<svg") : text.index("</svg>")]
    assert first.count('<polyline class="curve') == 1 and ">training<" in first  # one loss, drawn once
    assert text.count("<img ") == 12 and "step 10<" in text and "step 200<" in text
    assert "proxy" in text and "sorting" in text


@pytest.mark.parametrize("count", [3, POINTS, 5 * POINTS + 1, 40 * POINTS])
def test_long_curves_are_means_that_keep_every_value(tmp_path, count):
    log = tmp_path / "metrics.jsonl"
    values = np.random.default_rng(0).normal(size=count)
    log.write_text("".join(json.dumps({"step": k, "loss": float(v)}) + "\n" for k, v in enumerate(values)))
    curves, last = read_curves(log)
    points = curves["loss"].points()
    assert last == count - 1 and len(points) <= 2 * POINTS + 1
    if count <= POINTS:
        assert [value for _, value, *_ in points] == values.tolist()
    width = -(-count // len(points))
    if count % width == 0:
        assert np.mean([value for _, value, *_ in points]) == pytest.approx(values.mean())


def test_a_folder_of_records_shows_scores_and_curves(tmp_path, capsys):
    def record(name, score):
        curve = [{"step": step, "score": score * step / 100, "loss": 1.0} for step in (25, 50, 100)]
        return Result(
            task="finetune-segmentation", version=1, dataset=["blocks"], data_digest="d", split_digest="s",
            split={"test": {"subjects": 4}}, fraction=1.0, repeat=0, seed=0,
            contestant={"name": name, "kind": "encoder", "digest": name, "group": "g"},
            settings={"training": {"lr": 0.1}}, main="dice",
            scores={"dice": score, "hd95": float("nan")}, intervals={"dice": (score - 0.1, score + 0.1)},
            predictions=[{"dataset": "blocks", "subject": "p"}], compute={"details": {"curve": curve}},
        )  # fmt: skip

    for name, score in (("runs/<b>a</b>", 0.8), ("scratch:resnet18", 0.7)):
        write_result(record(name, score), tmp_path / "tuned")
    other = record("scratch:resnet18", 0.9)
    other.settings["training"] = {"lr": 0.2}
    write_result(other, tmp_path / "tuned")
    Image.new("RGB", (30, 20)).save(tmp_path / "tuned" / "x_1-median-and-worst-12345678.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "tuned" / "curves-f1-12345678.png")
    (tmp_path / "tuned" / "models" / "best").mkdir(parents=True)
    out = tmp_path / "p.html"
    assert main(["view", str(tmp_path / "tuned"), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    first = "scratch:resnet18 (settings 2) has the highest dice, 0.900 [0.800, 1.000]"
    assert f"blocks: finetune-segmentation, 4 test subjects: {first}." in text
    assert "runs/&lt;b&gt;a&lt;/b&gt;" in text and "settings 1" in text  # no mean over both settings
    assert "<polyline" in text and "over the steps of training" in text
    assert text.count("<img ") == 1 and "x 1: the median and the worst" in text  # curves are drawn once
    assert text.index("What to type next") < text.index("<table")
    assert f"ssl3d predict {tmp_path / 'tuned' / 'models' / 'best'} --data SCANS" in text
    assert "<b>" not in text.replace('<b class="star">', "")
