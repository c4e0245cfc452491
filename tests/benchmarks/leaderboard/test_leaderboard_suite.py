"""Suites are checked when they are read, and mean the jobs that one would type by hand."""

import json
import re
from dataclasses import replace

import pytest
import yaml

from ssl3d.errors import UsageError
from ssl3d_benchmarks.leaderboard.suite.check import check
from ssl3d_benchmarks.leaderboard.suite.commands import Places
from ssl3d_benchmarks.leaderboard.suite.plan import SuitePlan
from ssl3d_benchmarks.leaderboard.suite.suite import built_in, load_suite

SUITE = {
    "encoder": "--encoder resnet10 --resnet10.width 8",
    "budget": {"run": "simclr", "steps": 100},
    "seeds": [0, 3],
    "stores": {"scans": "folder", "people": "phantoms:20"},
    "runs": {"simclr": "--proxy simclr --data {scans}", "vit": "--proxy mae --encoder vit --data {people}"},
    "contestants": {
        "plain": "scratch:resnet10:width=8",
        "image": "imagenet:resnet18:acs:weights={root}/r.pth",
    },
    "tasks": {
        "masks": {"runs": ["*"], "contestants": ["*"], "options": "--data {scans} --target masks"},
        "tuned": {"protocol": "finetune", "runs": ["sim*"], "options": "--data {people}", "curve": True},
    },
}


def written(tmp_path, **changes):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}), encoding="utf-8")
    return path


def planned(tmp_path, only=("*",), **changes):
    (tmp_path / "data" / "folder").mkdir(parents=True, exist_ok=True)
    places = Places(tmp_path / "data", tmp_path / "work", tmp_path / "out")
    return SuitePlan(load_suite(written(tmp_path, **changes)), places, only)


def measured(tmp_path, **flops):
    for name, count in flops.items():
        card = tmp_path / "work" / f"flops-{name}" / "encoder" / "encoder.json"
        card.parent.mkdir(parents=True)
        card.write_text(json.dumps({"compute": {"flops_per_step": count}}), encoding="utf-8")


def test_jobs_come_after_what_they_need(tmp_path):
    jobs = planned(tmp_path).jobs
    seen = set()
    for job in jobs:
        assert set(job.needs) <= seen, job.name
        seen.add(job.name)
    assert len(seen) == len(jobs)
    kinds = [job.kind for job in jobs]
    assert kinds.count("prepare") == 1  # phantoms need none
    assert kinds.count("measure") == 2
    assert kinds.count("pretrain") == 4
    # masks: 2 contestants and 2 runs of 2 seeds; tuned: 1 run of 2 seeds; its curve: each at 0, 25, 50 %
    assert kinds.count("score") == 6 + 2 + 6


def test_a_run_may_begin_with_one_that_comes_later_in_the_file(tmp_path):
    runs = {
        "after": "--proxy mae --data {scans} --init {simclr}",
        "simclr": "--proxy simclr --data {scans}",
    }
    tasks = {"masks": {"runs": "*", "options": "--data {scans}"}}
    names = [job.name for job in planned(tmp_path, runs=runs, contestants={}, tasks=tasks).jobs]
    assert len(names) == len(set(names))
    # One step of it begins there, too.
    assert names.index("pretrain:simclr:0") < names.index("measure:after") < names.index("pretrain:after:0")


def test_runs_spend_the_flops_of_the_reference(tmp_path):
    measured(tmp_path, simclr=30, vit=90)
    plan = planned(tmp_path)
    assert plan.commands.steps("simclr") == 100
    assert plan.commands.steps("vit") == 33
    assert planned(tmp_path, budget={"flops": 1e4}).commands.steps("vit") == 111
    assert planned(tmp_path, budget={}).commands.steps("vit") is None


def test_commands_are_those_that_one_would_type(tmp_path):
    measured(tmp_path, simclr=30, vit=90)
    commands = {job.name: job.command() for job in planned(tmp_path).jobs}
    store = str(tmp_path / "work" / "scans.h5")
    assert commands["prepare:scans"] == ["prepare", str(tmp_path / "data" / "folder"), "--out", store]
    words = commands["pretrain:simclr:3"]
    assert words[:5] == ["pretrain", "--proxy", "simclr", "--data", store]
    assert "resnet10" in words
    assert words[words.index("--steps") + 1] == "100"
    assert words[words.index("--seed") + 1] == "3"
    assert "resnet10" not in commands["pretrain:vit:0"]  # it names its own
    assert commands["score:masks:image"][1] == f"image=imagenet:resnet18:acs:weights={tmp_path}/data/r.pth"
    tuned = commands["score:tuned:simclr-3"]
    assert tuned[:4] == ["finetune", f"simclr={tmp_path}/work/simclr-3", "--data", "phantoms:20"]
    way = commands["score:tuned-curve:simclr-at-25-0"]
    assert way[1] == f"simclr={tmp_path}/work/simclr-0/encoder-at-25"
    assert "--no-scratch" in way


def test_a_run_that_was_begun_is_resumed(tmp_path):
    measured(tmp_path, simclr=30, vit=90)
    (tmp_path / "work" / "simclr-0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "work" / "simclr-0" / "checkpoints" / "step-10").touch()
    commands = {job.name: job.command() for job in planned(tmp_path).jobs}
    assert commands["pretrain:simclr:0"] == ["pretrain", "--resume", str(tmp_path / "work" / "simclr-0")]


def test_untrained_encoders_are_scored_before_those_that_are_compared_with_them(tmp_path):
    jobs = [job for job in planned(tmp_path).jobs if job.name.startswith("score:masks:")]
    assert jobs[0].name == "score:masks:plain"
    assert all(job.after == ("score:masks:plain",) for job in jobs[1:])
    assert not any("score:masks:plain" in job.needs for job in jobs)  # without it, they do it themselves


def test_fine_tuning_gives_the_scratch_arm_a_seed_for_each_of_the_pretrained_ones(tmp_path):
    fine = {"fine": "{simclr}:high_resolution=true"}
    tuned = {"protocol": "finetune", "runs": ["simclr"], "contestants": ["*"], "curve": True}
    tasks = {
        "tuned": {**tuned, "options": "--data {people}"},
        "told": {**tuned, "options": "--data {people} --seeds 5 6"},
        "probed": {"contestants": ["*"], "options": "--data {people}"},
    }
    plan = planned(tmp_path, contestants={**SUITE["contestants"], **fine}, tasks=tasks)

    def seeds(plan):
        for job in plan.jobs:
            if job.kind == "score":
                words = " ".join(job.command()).partition(" --seeds ")[2]
                yield job.name.removeprefix("score:"), words.split(" --")[0]

    found = dict(seeds(plan))
    assert {found[name] for name in found if name.startswith("told")} == {"5 6"}
    assert {found[name] for name in found if name.startswith("probed")} == {""}
    assert found["tuned:plain"] == found["tuned:image"] == "0 3"
    assert (found["tuned:simclr-0"], found["tuned:simclr-3"]) == ("0", "3")
    assert (found["tuned-curve:simclr-at-25-0"], found["tuned-curve:simclr-at-25-3"]) == ("0", "3")
    assert found["tuned:fine"] == "0"  # the run of that seed
    some = dict(seeds(SuitePlan(replace(plan.suite, seeds=(3,)), plan.places)))
    assert some["tuned:plain"] == "3" and some["tuned:simclr-3"] == "3" and some["tuned:fine"] == "0"
    assert "tuned:simclr-0" not in some


def test_a_contestant_names_the_runs_of_the_suites_first_seed_whichever_are_done(tmp_path):
    fine = {"fine": "{simclr}:high_resolution=true"}
    tasks = {"masks": {"runs": ["simclr"], "contestants": ["fine"], "options": "--data {people}"}}
    plan = planned(tmp_path, contestants=fine, tasks=tasks)
    some = SuitePlan(replace(plan.suite, seeds=(3,)), plan.places)
    whole, part = ({job.name: job for job in one.jobs} for one in (plan, some))
    name = "score:masks:fine"
    assert part[name].command() == whole[name].command()
    assert part[name].command()[1] == f"fine={tmp_path}/work/simclr-0:high_resolution=true"
    assert part[name].digest() == whole[name].digest()
    assert part["measure:simclr"].digest() == whole["measure:simclr"].digest()
    # That one run of seed 0 and no other.
    runs = [name for name in part if name.startswith("pretrain")]
    assert sorted(runs) == ["pretrain:simclr:0", "pretrain:simclr:3", "pretrain:vit:3"]
    assert not any(
        ":0" in job.name for job in SuitePlan(replace(plan.suite, seeds=(3,)), plan.places, ["vit"]).jobs
    )


def test_a_run_can_begin_where_another_ended_and_be_scored_with_other_options(tmp_path):
    runs = {
        "simclr": "--proxy simclr --data {scans}",
        "after": "--proxy mae --data {scans} --init {simclr}",
    }
    fine = {"fine": "{simclr}:high_resolution=true"}
    tasks = {"masks": {"contestants": "fine", "options": "--data {scans}"}}
    measured(tmp_path, simclr=30, after=90)
    jobs = {
        j.name: j
        for j in planned(tmp_path, runs=runs, contestants=fine, tasks=tasks, only=["masks", "after"]).jobs
    }
    assert "pretrain:simclr:3" in jobs["pretrain:after:3"].needs
    words = jobs["pretrain:after:3"].command()
    assert words[words.index("--init") + 1] == str(tmp_path / "work" / "simclr-3")
    assert jobs["score:masks:fine"].command()[1] == f"fine={tmp_path}/work/simclr-0:high_resolution=true"
    assert "pretrain:simclr:0" in jobs["score:masks:fine"].needs


def test_only_takes_what_is_needed_along(tmp_path):
    names = {job.name for job in planned(tmp_path, only=["tuned"]).jobs}
    assert {"pretrain:simclr:0", "measure:simclr", "prepare:scans"} <= names
    assert not any("vit" in name or "masks" in name for name in names)


def test_data_that_is_not_there_is_said(tmp_path):
    plan = planned(tmp_path, stores={"scans": "elsewhere", "people": "phantoms"})
    assert plan.jobs[0].missing == str(tmp_path / "data" / "elsewhere")


def test_what_all_begin_with_is_scored_once(tmp_path):
    runs = {
        "a": "--proxy simclr --data {scans}",
        "b": "--proxy sorting --data {scans}",
        "c": "--proxy mae --data {scans} --encoder vit",
        "d": "--proxy mae --data {scans} --init {a}",
    }
    tasks = {"masks": {"runs": "*", "options": "--data {scans}", "curve": True}}
    jobs = planned(tmp_path, runs=runs, budget={}, seeds=[0], tasks=tasks).jobs
    beginnings = [job.name.split(":")[2] for job in jobs if "-at-00" in job.name]
    assert beginnings == ["a-at-00-0", "c-at-00-0", "d-at-00-0"]


def test_a_store_is_made_in_the_first_way_that_is_there(tmp_path):
    stores = {"scans": "flat.npz | folder --spacing 1 1 1", "people": "phantoms"}
    job = planned(tmp_path, stores=stores).jobs[0]
    folder = str(tmp_path / "data" / "folder")
    assert not job.missing
    assert job.command()[:6] == ["prepare", folder, "--spacing", "1", "1", "1"]


def test_with_folds_every_run_is_made_for_each_and_scored_as_one(tmp_path):
    measured(tmp_path, simclr=30, after=30)
    runs = {
        "simclr": "--proxy simclr --data {scans}",
        "after": "--proxy mae --data {scans} --init {simclr}",
    }
    tasks = {"tuned": {"protocol": "finetune", "runs": ["*"], "contestants": ["*"],
                       "options": "--data {scans}"}}  # fmt: skip
    contestants = {"fine": "{after}:high_resolution=true", "plain": "scratch:resnet10:width=8"}
    plan = planned(tmp_path, runs=runs, tasks=tasks, contestants=contestants, folds=3)
    jobs = {job.name: job for job in plan.jobs}
    work = tmp_path / "work"
    for fold in range(3):
        words = jobs[f"pretrain:after:3:{fold}"].command()
        assert words[words.index("--leave-out") + 1] == f"{fold}/3"
        assert words[words.index("--init") + 1] == str(work / f"simclr-3-fold{fold}")  # of the same fold
        assert f"pretrain:simclr:3:{fold}" in jobs[f"pretrain:after:3:{fold}"].needs
        assert words[words.index("--out") + 1] == str(work / f"after-3-fold{fold}")
    score = jobs["score:tuned:after-3"]
    assert score.command()[1] == f"after={work}/after-3-fold{{fold}}"
    assert score.command()[-4:] == ["--folds", "3", "--out", str(tmp_path / "out" / "tuned")]
    assert set(score.needs) == {"prepare:scans", *(f"pretrain:after:3:{fold}" for fold in range(3))}
    assert len(set(score.inputs)) == 3  # another encoder of any fold is another job
    assert jobs["score:tuned:fine"].command()[1] == f"fine={work}/after-0-fold{{fold}}:high_resolution=true"
    assert {"pretrain:after:0:0", "pretrain:after:0:2"} <= set(jobs["score:tuned:fine"].needs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {"simclr": "--proxy simclr --leave-out 0/3 --data {people}"}}, "by the suite's folds"),
        ({"tasks": {"a": {"runs": ["*"], "options": "--data {people}"}}}, "linear-probe has no encoder"),
        ({"tasks": {"a": {"protocol": "finetune", "runs": ["*"], "options": "--data {people} --folds 4"}}},
         "set by the suite's folds"),
    ],
)  # fmt: skip
def test_what_the_suites_folds_decide_is_left_out_elsewhere(tmp_path, changes, message):
    tuned = {"tuned": {"protocol": "finetune", "runs": ["*"], "options": "--data {people}"}}
    good = {
        "runs": {"simclr": "--proxy simclr --data {people}"},
        "contestants": {},
        "tasks": tuned,
        "folds": 3,
    }
    check(planned(tmp_path, **good))
    with pytest.raises(UsageError, match=message):
        check(planned(tmp_path, **{**good, **changes}))


def test_another_encoder_is_another_job(tmp_path):
    measured(tmp_path, simclr=30, vit=90)
    job = next(job for job in planned(tmp_path).jobs if job.name == "score:masks:simclr-0")
    card = tmp_path / "work" / "simclr-0" / "encoder" / "encoder.json"
    card.parent.mkdir(parents=True)
    card.write_text("1", encoding="utf-8")
    first = job.digest()
    assert job.digest() == first
    card.write_text("2", encoding="utf-8")
    assert job.digest() != first


WRONG = {
    "tasks is missing": {"tasks": {}},
    "did you mean stores": {"store": {}},
    "protocol 'probe' is none of linear-probe, knn, finetune": {
        "tasks": {"a": {"protocol": "probe", "runs": ["*"], "options": "--data {scans}"}}
    },
    "runs sim matches none": {"tasks": {"a": {"runs": ["sim"], "options": "--data {scans}"}}},
    "nobody to score": {"tasks": {"a": {"options": "--data {scans}"}}},
    "options is missing": {"tasks": {"a": {"runs": ["*"]}}},
    "folds is 1": {"folds": 1},
    "budget: no run other": {"budget": {"run": "other", "steps": 3}},
    "budget: no run ['simclr']": {"budget": {"run": ["simclr"], "steps": 3}},
    "give flops, or run and steps": {"budget": {"steps": 3}},
    "seeds is [-1]": {"seeds": [-1]},
    "simclr: a run and a contestant of one name": {"contestants": {"simclr": "scratch:resnet10"}},
    "is no name": {"stores": {"a b": "x"}},
    "runs maps names to text": {"runs": {"simclr": 3}},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_suite_is_one_clear_line(tmp_path, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_suite(written(tmp_path, **WRONG[message]))
    assert str(tmp_path / "mine.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_names_are_one_clear_line(tmp_path):
    with pytest.raises(UsageError, match="no suite qick: did you mean quick"):
        load_suite("qick")
    with pytest.raises(UsageError, match="No such file"):
        load_suite(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(UsageError, match="not YAML"):
        load_suite(tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match="no such run or task in mine: simclr"):
        planned(tmp_path, only=["nothing"])
    with pytest.raises(
        UsageError, match="'nowhere' names no store and no run: there are people, scans, simclr, vit"
    ):
        planned(tmp_path, runs={"simclr": "--proxy simclr --data {nowhere}", "vit": "--proxy mae"})


@pytest.mark.parametrize("name", built_in())
def test_built_in_suites_make_plans(name, tmp_path):
    suite = load_suite(name)
    assert suite.description
    plan = SuitePlan(suite, Places(tmp_path, tmp_path / "work", tmp_path / "out"))
    assert plan.jobs
    for job in plan.jobs:
        if job.kind in ("measure", "score"):
            assert all(isinstance(word, str) for word in job.command())


def test_an_encoder_of_a_file_is_known_to_the_jobs_that_score_it(tmp_path):
    runs = {
        "first": "--proxy simclr --data {scans}",
        "mine": "--proxy moco.py --encoder=nets/mine.py --data {scans}",
        "other": "--proxy simclr --encoder nets:Mine --data {scans}",
    }
    plan = planned(
        tmp_path,
        runs=runs,
        budget={"flops": 1e9},
        tasks={"t": {"runs": ["*"], "options": "--data {scans}"}},
    )
    assert plan.commands.plugin_files() == ["nets/mine.py", "nets:Mine"]
