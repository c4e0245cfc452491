"""A suite whose commands cannot be read is refused before its first job, by the name of what is wrong."""

import pytest
import yaml

from ssl3d import plugins
from ssl3d.cli import main
from ssl3d.errors import UsageError
from ssl3d_benchmarks.leaderboard.suite.check import check
from ssl3d_benchmarks.leaderboard.suite.commands import Places
from ssl3d_benchmarks.leaderboard.suite.plan import SuitePlan
from ssl3d_benchmarks.leaderboard.suite.provenance import options_in
from ssl3d_benchmarks.leaderboard.suite.suite import load_suite

SUITE = {
    "encoder": "--encoder resnet10 --resnet10.width 8",
    "stores": {"scans": "folder --crop-foreground true"},
    "runs": {"simclr": "--proxy simclr --data {scans} --batch-size 4"},
    "contestants": {"plain": "scratch:resnet10:width=8"},
    "tasks": {
        "masks": {"runs": ["*"], "contestants": ["*"], "options": "--data {scans} --target masks"},
        "tuned": {
            "protocol": "finetune",
            "runs": ["*"],
            "options": "--data {scans} --task segmentation --preset low-label",
        },
        "near": {"protocol": "knn", "contestants": ["*"], "options": "--data {scans}"},
    },
}


def plan_of(tmp_path, **changes):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}), encoding="utf-8")
    return SuitePlan(load_suite(path), Places(tmp_path, tmp_path / "work", tmp_path / "out"))


def task(options, protocol="linear-probe"):
    return {"tasks": {"masks": {"protocol": protocol, "runs": ["*"], "options": options}}}


def test_a_good_suite_passes(tmp_path):
    check(plan_of(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (task("--data {scans} --recalibrat no"), "tasks: masks: .*recalibrat"),
        (task("--data {scans} --recalibrate maybe"), "tasks: masks: .*'maybe' is none of"),
        (task("--target masks"), "tasks: masks: options: --data is missing"),
        (task("--data {scans} --out foo"), "tasks: masks: options: --out is set by the suite"),
        (
            task("--data {scans} --task segmentaton", "finetune"),
            "tasks: masks: .*did you mean segmentation",
        ),
        (task("--data {scans} --task segmentation --segmentation.pach 8 8 8", "finetune"), "pach"),
        (task("--data {scans} --task segmentation --steps 5 --epochs 2", "finetune"), "--steps 5 and"),
        ({"runs": {"simclr": "--proxy simclr --simclr.crp 8 8 8 --data {scans}"}}, "runs: simclr: .*crp"),
        ({"runs": {"simclr": "--proxy sortin --data {scans}"}}, "runs: simclr: .*[Dd]id you mean sorting"),
        ({"runs": {"simclr": "--data {scans}"}}, "runs: simclr: .*--proxy"),
        (
            {"runs": {"simclr": "--proxy simclr --seed 3"}},
            "runs: simclr: --seed is set by the suite's seeds",
        ),
        (
            {"runs": {"simclr": "--proxy simclr --steps 10"}, "budget": {"flops": 1e9}},
            "runs: simclr: --steps is set by the suite's budget",
        ),
        ({"contestants": {"plain": "scratch:resnet10:widt=8"}}, "contestants: plain: .*widt"),
        ({"contestants": {"plain": "scratch:resnet11"}}, "contestants: plain: .*resnet11"),
        ({"stores": {"scans": "folder --spacin 1 1 1"}}, "stores: scans: .*spacin"),
        ({"runs": {"simclr": "--proxy 'simclr"}}, "cannot be split into words: No closing quotation"),
        ({"budget": {"run": "simclr", "steps": -3}}, "budget: steps is -3, must be a number above 0"),
        (
            {"tasks": {"masks": {"runs": 3, "options": "--data x"}}},
            "runs is 3: a name, a pattern, or a list",
        ),
        ({"tasks": {"masks": {"runs": None, "options": "--data x"}}}, "nobody to score"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        check(plan_of(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_name_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    text = (
        "tasks:\n  a: {contestants: [x], options: --data p}\n  a: {contestants: [y], options: --data q}\n"
    )
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="'a' is given twice"):
        load_suite(path)


def test_before_the_first_job_and_in_a_dry_run(tmp_path, capsys):
    plan_of(tmp_path, **task("--data {scans} --recalibrat no"))
    for more in ([], ["--dry-run"]):
        words = ["leaderboard", "run", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out"), *more]
        assert main(words) == 2
        assert "tasks: masks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_proxys_file_is_part_of_what_a_run_is_made_with(tmp_path):
    """A method author's day: the file changes, and the run of before is not taken for its own."""
    file = tmp_path / "mine.py"
    found = []
    for code in ("A = 1\n", "# says more\nA = 1\n", "A = 2\n"):
        file.write_text(code, encoding="utf-8")
        found.append(options_in(["--proxy", f"{file}:Mine", "--data", "x"])["proxy"])
    assert found[0] == found[1] != found[2]
    assert found[0][0].startswith(f"{file}:Mine (code ")
    assert options_in(["--proxy", "simclr"])["proxy"] == ["simclr"]


def test_where_no_data_is_nothing_is_done_and_said(tmp_path, capsys):
    plan_of(tmp_path)
    assert main(["leaderboard", "run", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")]) == 1
    assert "nothing could be done: is --data-root (or $SSL3D_DATA) right?" in capsys.readouterr().out


def test_a_package_may_bring_a_protocol_with_its_command(tmp_path, monkeypatch):
    (tmp_path / "lent_protocol.py").write_text(
        "from ssl3d_benchmarks.knn.command import KNNOptions as Options, main\n", encoding="utf-8"
    )
    info = tmp_path / "lent_protocol-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lent-protocol\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ssl3d.benchmarks]\nlent = ssl3d_benchmarks.knn.protocol:KNN\n"
        "half = ssl3d_benchmarks.knn.protocol:KNN\n"
        "[ssl3d.commands]\nlent = lent_protocol\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._installed.cache_clear()
    monkeypatch.setattr(plugins, "_installed", plugins._installed.__wrapped__)
    plan = plan_of(tmp_path, **task("--data {scans} --neighbours 3", "lent"))
    check(plan)
    assert any(job.command()[0] == "lent" for job in plan.jobs if job.kind == "score")
    with pytest.raises(UsageError, match=r"tasks: masks: .*neighbors"):
        check(plan_of(tmp_path, **task("--data {scans} --neighbors 3", "lent")))
    with pytest.raises(UsageError, match=r"'half' is none of linear-probe, knn, finetune, .*lent"):
        plan_of(tmp_path, **task("--data {scans}", "half"))
