"""Every suite can be run: its commands parse, its recipes hold for their proxies and encoders."""

from pathlib import Path

import pytest

from ssl3d.api import Plugins, parse
from ssl3d.options import request_of
from ssl3d_benchmarks import finetune_command, knn_command, linear_probe_command
from ssl3d_benchmarks.finetune_protocol import TASKS, task_class
from ssl3d_benchmarks.leaderboard_suite import SUITES, Places, Plan, load_suite

ALL = sorted(path.stem for path in SUITES.glob("*.yaml"))
COMMANDS = {
    "linear-probe": (linear_probe_command.Options, None),
    "knn": (knn_command.Options, None),
    "finetune": (
        finetune_command.Options,
        Plugins({"task": lambda name: task_class(name).Config}, {"task": tuple(TASKS)}),
    ),
}


def shown_suite(folder):
    """The suite that the documentation shows."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "suite.md").read_text(encoding="utf-8")
    path = folder / "mine.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [*ALL, "docs"])
def test_a_suites_commands_parse(name, tmp_path):
    suite = load_suite(shown_suite(tmp_path) if name == "docs" else name)
    places = Places(Path("/data"), tmp_path, tmp_path / "out")
    plan = Plan(suite, places)
    for run in suite.runs:
        asked = request_of(plan.pretraining(run, 3, 0))
        assert asked.plan is not None and asked.plan.options.steps == 3, run
    for job in plan.jobs:
        if job.kind == "score":
            protocol, *words = job.command()
            options, plugins = COMMANDS[protocol]
            more = () if plugins is None else (plugins,)
            parsed = parse(f"ssl3d {protocol}", options, words, *more)
            assert parsed.options.data, job.name


def test_commands_stay_functions_whatever_is_imported():
    """A module of the same name would take the function's place when something imports it."""
    import pkgutil

    import ssl3d_benchmarks

    commands = {name for name, one in vars(ssl3d_benchmarks).items() if callable(one) and name[0] != "_"}
    assert {"linear_probe", "knn", "finetune", "leaderboard", "leaderboard_report"} <= commands
    modules = {one.name for one in pkgutil.iter_modules(ssl3d_benchmarks.__path__)}
    assert not modules & commands
