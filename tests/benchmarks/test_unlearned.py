"""A network that did not learn its task is told loudly: in the table, its record and the report."""

from pathlib import Path

import numpy as np
import pytest

from ssl3d.api import phantom_store, read_result, statistics
from ssl3d.cli import main
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d_benchmarks.finetune.protocol import TASKS, task_class
from ssl3d_benchmarks.unlearned import unlearned

SPEC = "scratch:resnet10:width=4"


def runs(value, spread=0.05, seeds=1, subjects=20):
    """Scores of subjects about a value, the same noise for all."""
    noise = np.random.default_rng(0).normal(size=subjects)
    noise = (noise - noise.mean()) * spread
    scores = [
        [lambda weights, k=k: statistics.mean(value + noise * (1 + k / 10), weights)] for k in range(seeds)
    ]
    return statistics.runs_of(scores, np.arange(subjects), 300)


def test_what_is_above_the_row_without_a_network_is_not_told():
    assert not unlearned("net", runs(0.8), runs(0.4), "average mask", "dice")
    assert not unlearned("net", runs(0.8, seeds=3), runs(0.4), "average mask", "dice")
    assert not unlearned("net", runs(0.8), 0.5, "guessing", "auc")


def test_what_is_not_above_it_has_not_learned():
    for value in (0.03, 0.4, 0.405, float("nan")):
        words = unlearned("scratch", runs(value), runs(0.4), "average mask", "dice")
        beside = "only +0.005 above" if value == 0.405 else "no better than"
        assert words.startswith("scratch ended at dice ") and f"{beside} average mask (0.400)" in words
        assert "has not learned its task, and no conclusion can be drawn; train it longer" in words
    assert "no better than guessing (0.500)" in unlearned("net", runs(0.48), 0.5, "guessing", "auc")


def test_what_may_be_chance_is_not_shown_to_have_learned():
    words = unlearned("net", runs(0.55, spread=0.4), 0.5, "guessing", "auc")
    assert "not clearly above guessing (0.500; +0.0" in words and "no conclusion can be drawn" in words
    apart = runs(0.5, spread=0.4)._replace(drawn=np.random.default_rng(1).normal(0.5, 0.4, (1, 1, 300)))
    assert "not clearly above average mask (0.400" in unlearned(
        "net", apart, runs(0.4), "average mask", "dice"
    )


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_its_networks_have_to_be_above(name):
    kind = task_class(name)
    assert set(kind.floors) == set(kind.mains)
    rows = [floor for floor in kind.floors.values() if isinstance(floor, str)]
    assert set(rows) <= set(kind.trivial)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(phantom_store(40, shape=(12, 24, 24), folder=tmp_path_factory.mktemp("phantoms")))


def bright_or_dark(path, count=40):
    """Noise whose mean is the class."""
    rng = np.random.default_rng(0)
    for k in range(count):
        record = Record(id=f"v{k:03d}", dataset="made", subject=f"p{k}", label=k % 2)
        image = rng.normal(size=(1, 6, 8, 8)).astype(np.float32) + 2.0 * (k % 2)
        write_part(Path(f"{path}.partial"), record.id, record, image)
    assemble(Path(f"{path}.partial"), path, {}, [])
    return path


def finetuned(store, out, *words):
    fixed = ["--threads", "1", "--batch-size", "4", "--out", str(out)]
    assert main(["finetune", SPEC, "--data", store, *fixed, *words]) == 0
    records = [read_result(path) for path in sorted(out.glob("*.json"))]
    return [one for one in records if one.contestant["kind"] == "untrained"]


SEGMENTATION = (
    "--task",
    "segmentation",
    "--segmentation.patch",
    "8",
    "16",
    "16",
    "--segmentation.width",
    "4",
)


def test_a_segmentation_that_learns_nothing_is_told_everywhere(store, tmp_path, capsys):
    (record,) = finetuned(store, tmp_path, *SEGMENTATION, "--lr", "1e-12", "--steps", "2")
    (words,) = record.flags["warnings"]
    assert "average mask" in words and "it has not learned its task" in words
    assert f"WARNING: {words}" in capsys.readouterr().out
    assert words in (tmp_path / "table.txt").read_text(encoding="utf-8")
    out = tmp_path / "report"
    assert main(["leaderboard", "report", str(tmp_path), "--out", str(out), "--resamples", "200"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("WARNING: on 1 of 1 tables of fine-tuning, networks are not clearly above")
    for name in ("index.html", "report.md"):
        text = (out / name).read_text(encoding="utf-8")
        assert "WARNING: on 1 of 1" in text and "it has not learned its task" in text


@pytest.mark.long
def test_a_classification_at_chance_is_told_and_one_that_learned_is_not(tmp_path, capsys):
    store = str(bright_or_dark(tmp_path / "s.h5"))
    (bad,) = finetuned(store, tmp_path / "bad", "--lr", "1e-12", "--steps", "2")
    assert "above guessing" in bad.flags["warnings"][0] or "than guessing" in bad.flags["warnings"][0]
    capsys.readouterr()
    (good,) = finetuned(store, tmp_path / "good", "--lr", "3e-3", "--steps", "60")
    assert good.scores["auc"] > 0.9 and not good.flags.get("warnings")
    assert "WARNING" not in capsys.readouterr().out


def test_without_the_row_to_compare_with_the_table_says_so(store, tmp_path, capsys):
    (record,) = finetuned(store, tmp_path, *SEGMENTATION, "--lr", "1e-12", "--steps", "2", "--no-trivial")
    assert "warnings" not in record.flags
    assert "learned their task is not checked: there is no row 'average mask'" in capsys.readouterr().out
