"""Result records: complete, exact on the way to disk and back, refused when they are something else."""

import json
import math

import pytest

from ssl3d import plugins
from ssl3d.benchmark import Benchmark, Contestant
from ssl3d.errors import DataError, UsageError
from ssl3d.evaluation.records import Result, find_result, read_result, validate_result, write_result


def a_result(**changed):
    values = {
        "task": "linear-probe/classes",
        "version": 1,
        "dataset": ["phantoms"],
        "data_digest": "d" * 16,
        "split": {"train": {"subjects": 3}},
        "split_digest": "s" * 16,
        "fraction": 1.0,
        "repeat": 0,
        "seed": 0,
        "contestant": Contestant("runs/sorting-1", "encoder", "c" * 16).described(),
        "settings": {"target": "classes"},
        "main": "auc",
        "scores": {"auc": 0.8, "accuracy": 2 / 3},
        "intervals": {"auc": (0.7, 0.9)},
        "predictions": [{"dataset": "phantoms", "subject": "p1", "target": "1", "probability": [0.1, 0.9]}],
    }
    return Result(**{**values, **changed})


def test_record_round_trip(tmp_path):
    result = a_result()
    path = write_result(result, tmp_path / "new")
    assert read_result(path) == result
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["scores"]["auc"] == 0.8 and content["intervals"]["auc"] == [0.7, 0.9]
    assert content["key"] == result.key and content["versions"]["python"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written beside it


def test_undefined_scores_survive_as_null(tmp_path):
    path = write_result(
        a_result(scores={"auc": math.nan}, intervals={"auc": (math.nan, math.nan)}), tmp_path
    )
    assert "NaN" not in path.read_text(encoding="utf-8")
    assert math.isnan(read_result(path).scores["auc"])


@pytest.mark.parametrize(
    "change",
    [
        {"fraction": 0.5},
        {"repeat": 1},
        {"version": 2},
        {"split_digest": "x"},
        {"settings": {"target": "real"}},
    ],
)
def test_whatever_decides_the_score_is_in_the_key(change):
    assert a_result(**change).key != a_result().key


def test_the_key_ignores_what_was_measured():
    assert a_result(scores={"auc": 0.1}, compute={"probe_seconds": 3}).key == a_result().key


def test_a_finished_record_is_found_and_a_damaged_one_is_not(tmp_path):
    path = write_result(a_result(), tmp_path)
    assert find_result(a_result(scores={}), tmp_path).scores["auc"] == 0.8
    assert find_result(a_result(seed=1), tmp_path) is None
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert find_result(a_result(), tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": 99}, "record format 99, this ssl3d reads up to 1"),
        ({"main": "dice"}, "main score 'dice' is not among the scores"),
        ({"intervals": {"auc": [0.9, 0.1]}}, r"interval of auc is \[0.9, 0.1\]"),
        ({"intervals": {"dice": [0.1, 0.9]}}, "interval of dice without a score"),
        ({"predictions": [{"target": 1}]}, "a prediction without dataset and subject"),
        ({"contestant": {"name": "x"}}, "lacks name, kind or digest"),
        ({"scores": []}, "'scores' is a list"),
    ],
)
def test_damaged_records_are_refused_in_one_line(tmp_path, damage, message):
    path = write_result(a_result(), tmp_path)
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **damage}), encoding="utf-8"
    )
    with pytest.raises(DataError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_number_is_refused_and_a_record_without_digest_is_read(tmp_path):
    path = write_result(a_result(), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["digest"]  # as earlier versions wrote it
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_result(path) == read_result(write_result(a_result(), tmp_path))
    content = json.loads(path.read_text(encoding="utf-8"))
    content["scores"][content["main"]] += 1e-9
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="was changed after it was written"):
        read_result(path)
    assert find_result(a_result(), tmp_path) is None


def test_a_missing_key_is_named():
    with pytest.raises(DataError, match="no 'key'"):
        validate_result({"format": 1}, "here")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot write"):
        write_result(a_result(), tmp_path / "file" / "deeper")


def test_an_unknown_kind_of_contestant_is_refused():
    with pytest.raises(ValueError, match="kind: 'winner'"):
        Contestant("x", "winner", "d")


@pytest.mark.parametrize("name", plugins.names(plugins.BENCHMARKS))
def test_every_benchmark_says_what_it_is(name):
    benchmark = plugins.load(plugins.BENCHMARKS, name)
    assert issubclass(benchmark, Benchmark) and not benchmark.__abstractmethods__
    assert benchmark.name == name
    assert isinstance(benchmark.version, int) and benchmark.version >= 1
    assert len(benchmark.description) > 20 and "\n" not in benchmark.description
    assert "arXiv" in benchmark.reference or "doi" in benchmark.reference
    assert benchmark.mains and all(benchmark.mains.values())
    assert benchmark.Config.__dataclass_fields__ and benchmark.__doc__


def nested(depth):
    return {"x": nested(depth - 1)} if depth else 1


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("scores.auc", [1], "scores.auc is [1], expected a number"),
        ("intervals.auc", 5, "interval of auc is 5, expected [low, high]"),
        ("intervals.auc", ["a", "b"], "interval of auc is ['a', 'b'], expected [low, high]"),
        (
            "contestant.pretraining.steps",
            "many",
            "contestant.pretraining.steps is 'many', expected a whole",
        ),
        ("contestant.pretraining.proxies", 7, "contestant.pretraining.proxies is 7, expected an object"),
        ("contestant.pretraining.compute", {"seconds": True}, "compute.seconds is True, expected a number"),
        ("contestant.pretraining.compute", {"flops": 10**400}, "expected a number"),
        ("contestant.pretraining.compute", {"flops_between_epochs": 1e308}, "is 1e+308, expected a number"),
        ("contestant.pretraining.data", {"datasets": 5}, "expected a list of texts or an object"),
        ("version", 10**400, "version is 1000"),  # the newest of a table refuses all others
        ("seed", True, "seed is True, expected a whole number"),
        ("contestant.name", 3, "contestant.name is 3, expected a text"),
        ("contestant.name", "\ud800", "which is no text in Unicode"),
        ("split.train", None, "split.train is None, expected an object"),
        ("settings.rates", 5, "settings.rates is 5, expected a list of numbers"),
        ("settings.x", nested(40), "nested deeper than 32 levels"),
        ("dataset", [1], "dataset is [1], expected a text or a list of texts"),
        ("flags.seen_test_subjects", "x", "flags.seen_test_subjects is 'x', expected a whole number"),
        ("predictions", [{"dataset": 1, "subject": "p"}], "a prediction without dataset and subject"),
    ],
)
def test_an_odd_part_refuses_its_record_by_name(tmp_path, place, value, message):
    path = write_result(a_result(), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    *way, last = place.split(".")
    part = content
    for key in way:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_result(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
