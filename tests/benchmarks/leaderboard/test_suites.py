"""Every suite can be run: its commands parse, its recipes hold for their proxies and encoders."""

from pathlib import Path

import pytest

from ssl3d.api import Plugins, parse
from ssl3d.training.options import request_of
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.protocol import TASKS, task_class
from ssl3d_benchmarks.knn.command import KNNOptions
from ssl3d_benchmarks.leaderboard.suite.commands import Places
from ssl3d_benchmarks.leaderboard.suite.plan import SuitePlan
from ssl3d_benchmarks.leaderboard.suite.suite import SUITES, load_suite
from ssl3d_benchmarks.linear_probe.options import LinearProbeOptions

ALL = sorted(path.stem for path in SUITES.glob("*.yaml"))
COMMANDS = {
    "linear-probe": (LinearProbeOptions, None),
    "knn": (KNNOptions, None),
    "finetune": (
        FinetuneOptions,
        Plugins({"task": lambda name: task_class(name).Config}, {"task": tuple(TASKS)}),
    ),
}


def shown_suite(folder):
    """The suite that the documentation shows."""
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "suite.md").read_text(encoding="utf-8")
    path = folder / "mine.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [*ALL, "docs"])
def test_a_suites_commands_parse(name, tmp_path):
    suite = load_suite(shown_suite(tmp_path) if name == "docs" else name)
    places = Places(Path("/data"), tmp_path, tmp_path / "out")
    plan = SuitePlan(suite, places)
    for run in suite.runs:
        asked = request_of(plan.commands.pretraining(run, 3, 0))
        assert asked.plan is not None and asked.plan.options.steps == 3, run
    for job in plan.jobs:
        if job.kind == "score":
            protocol, *words = job.command()
            options, plugins = COMMANDS[protocol]
            more = () if plugins is None else (plugins,)
            parsed = parse(f"ssl3d {protocol}", options, words, *more)
            assert parsed.options.data, job.name
