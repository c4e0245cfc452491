"""Every suite file can be run: its commands parse, its names exist."""

import fnmatch
from pathlib import Path

import pytest
import yaml

from ssl3d.options import request_of
from ssl3d_benchmarks import equal_compute
from ssl3d_benchmarks.equal_compute import Suite

SUITES = sorted((Path(__file__).parents[2] / "benchmarks" / "suites").glob("*.yaml"))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suites_commands_parse_and_its_names_exist(path, tmp_path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    suite = Suite(content, tmp_path, tmp_path, 0)
    assert content["reference"]["run"] in content["runs"]
    for name in content["runs"]:
        asked = request_of([str(word) for word in suite.command(name, 3)])
        assert asked.plan is not None and asked.plan.options.steps == 3, name
        assert all(Path(data).parent == tmp_path for data in asked.plan.options.data), name
    for name, task in content["probes"].items():
        for pattern in task["runs"]:
            assert fnmatch.filter(content["runs"], pattern), f"{name}: {pattern} matches no run"
        assert suite.words(task["options"])[0] == "--data"


def test_a_stores_sources_lie_in_the_data_root_and_its_options_stay(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(equal_compute, "ssl3d", lambda *words: called.append([str(word) for word in words]))
    stores = {"a": "one two.csv --masks seg --spacing median", "b": "three"}
    Suite({"stores": stores}, tmp_path / "work", Path("/data"), 0).prepare()
    assert called == [
        ["prepare", "/data/one", "/data/two.csv", "--masks", "seg", "--spacing", "median",
         "--out", str(tmp_path / "work" / "a.h5")],
        ["prepare", "/data/three", "--out", str(tmp_path / "work" / "b.h5")],
    ]  # fmt: skip
