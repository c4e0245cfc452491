"""Sweeps: equal to flags typed by hand, resumed after kill -9, shared by workers, pruned."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("optuna", reason="needs the extra sweep")

import optuna

from ssl3d.cli import main
from ssl3d.errors import UsageError
from ssl3d_benchmarks.child import Child
from ssl3d_benchmarks.finetune.validation import ValidationScores
from ssl3d_benchmarks.sweep import run
from ssl3d_benchmarks.sweep.scores import final, points
from ssl3d_benchmarks.sweep.space import plan_of, read_plan
from ssl3d_benchmarks.sweep.table import describe

SIMCLR = (
    "--proxy simclr --data phantoms:12 --encoder resnet10 --resnet10.width 4 --simclr.crop 12 12 12 "
    "--steps 3 --batch-size 4 --eval-every 1 --workers 0 --threads 1 --device cpu --precision 32 "
    "--holdout 0.3 --logger"
)

PROGRAM = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
resumed = "--resume" in words
folder = pathlib.Path(words[words.index("--resume" if resumed else "--out") + 1])
def save(*_):
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
if resumed:
    lr = float((folder / "lr").read_text())
    assert (folder / "saved").exists(), "two processes in one folder"
else:
    lr = float(words[words.index("--lr") + 1])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "lr").write_text(str(lr))
    (folder / "checkpoints" / "1").touch()
if lr < 0.0002:
    print("ssl3d: step 1: the loss is not finite")
    sys.exit(1)
lines = folder / "metrics.jsonl"
done = len(lines.read_text().splitlines()) if lines.exists() else 0
for step in range(done + 1, 6):
    time.sleep(PAUSE)
    with lines.open("a") as file:
        file.write(json.dumps({"step": step, "online/knn_accuracy": 1 - lr + step / 1000}) + chr(10))
"""
"""A command that writes scores as pretraining does: the smaller --lr, the better; far too small fails."""

SWEEP = """
command: pretrain
options: --proxy simclr --data phantoms:12
search:
  lr: {low: 1e-4, high: 1e-1, log: true}
value: online/knn_accuracy
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes the command, with so many seconds a step, and has trials run it."""
    monkeypatch.setattr(run, "LOOK", 0.05)
    (tmp_path / "sweep.yaml").write_text(SWEEP)

    def write(pause=0.0):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.replace("PAUSE", str(pause)))
        monkeypatch.setattr(run, "PROGRAM", (sys.executable, str(path)))
        return path

    return write


def sweep(tmp_path, trials, *more):
    return main(
        [
            "sweep",
            str(tmp_path / "sweep.yaml"),
            "--out",
            str(tmp_path / "s"),
            "--trials",
            str(trials),
            *more,
        ]
    )


def worker(tmp_path, path, trials):
    """A worker in a process of its own."""
    code = (
        "import sys\nfrom ssl3d_benchmarks.sweep import run\nfrom ssl3d.cli import main\n"
        f"run.PROGRAM, run.LOOK = (sys.executable, {str(path)!r}), 0.05\n"
        "from ssl3d_benchmarks.sweep.run import locks\nlocks.WAIT = 0.2\n"
        f"sys.exit(main(['sweep', {str(tmp_path / 'sweep.yaml')!r}, '--out', {str(tmp_path / 's')!r},"
        f" '--trials', '{trials}', '--pruner', 'none']))"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def by_number(tmp_path):
    return sorted(describe(tmp_path / "s")["trials"], key=lambda row: row["number"])


@pytest.mark.long
def test_a_trial_equals_its_flags_typed_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sweep.yaml").write_text(
        f"command: pretrain\noptions: {SIMCLR}\nsearch:\n  lr: {{low: 1e-4, high: 1e-2, log: true}}\n"
        "  simclr.temperature: [0.1, 0.5]\nvalue: holdout/simclr/loss\n"
    )
    assert sweep(tmp_path, 1) == 0
    shown = capsys.readouterr().out
    (trial,) = describe(tmp_path / "s")["trials"]
    best = shlex.split(next(line for line in shown.splitlines() if line.startswith("best: "))[6:])
    assert best[:2] == ["ssl3d", "pretrain"] and best[-2:] == ["--out", "runs/best"]
    assert main([*best[1:-1], str(tmp_path / "hand")]) == 0
    own, hand = tmp_path / "s" / "trials" / "0000", tmp_path / "hand"
    name = "encoder/encoder.safetensors"
    assert (own / name).read_bytes() == (hand / name).read_bytes()
    assert trial["value"] == final(hand, "holdout/simclr/loss")
    assert trial["flags"]["simclr.temperature"] in ("0.1", "0.5") and 1e-4 <= trial["flags"]["lr"] <= 1e-2
    capsys.readouterr()
    assert main(["info", str(tmp_path / "s")]) in (0, None)
    assert f"best: {shlex.join(best)}" in capsys.readouterr().out


def test_the_best_comes_first_and_a_failed_trial_is_named(tmp_path, program, capsys):
    program()
    assert sweep(tmp_path, 8, "--pruner", "none") == 0
    rows = describe(tmp_path / "s")["trials"]
    failed = [row for row in rows if row["state"] == "failed"]
    done = [row for row in rows if row["state"] == "done"]
    assert len(rows) == 8 and failed and [row["flags"]["lr"] >= 2e-4 for row in done]
    assert [row["value"] for row in done] == sorted((row["value"] for row in done), reverse=True)
    assert done[0]["value"] == pytest.approx(1 - done[0]["flags"]["lr"] + 0.005)
    assert all("the loss is not finite" in row["reason"] for row in failed)
    shown = capsys.readouterr().out
    assert f"trial {failed[0]['number']}: failed: ssl3d: step 1: the loss is not finite" in shown
    # More trials go on from these, and the same seed proposes the same.
    assert sweep(tmp_path, 9, "--pruner", "none") == 0
    assert len(describe(tmp_path / "s")["trials"]) == 9


def test_the_same_seed_proposes_the_same_flags(tmp_path, program):
    program()
    flags = []
    for name in ("a", "b"):
        words = ["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / name), "--trials", "4"]
        assert main([*words, "--startup", "2", "--pruner", "none"]) == 0
        flags.append({row["number"]: row["flags"] for row in describe(tmp_path / name)["trials"]})
    assert flags[0] == flags[1]


@pytest.mark.long
def test_a_trial_that_is_worse_than_the_others_is_stopped_early(tmp_path, program, capsys):
    path = program(0.3)
    text = path.read_text().replace("time.sleep(0.3)", "time.sleep(0.3 if lr > 0.003 else 0)")
    path.write_text(text.replace("lr < 0.0002", "lr < 0"))
    assert sweep(tmp_path, 8, "--startup", "2", "--sampler", "random") == 0
    rows = describe(tmp_path / "s")["trials"]
    stopped = [row for row in rows if row["state"] == "stopped early"]
    best = next(row for row in rows if row["state"] == "done")
    assert stopped and all(row["flags"]["lr"] > best["flags"]["lr"] for row in stopped)
    lines = (tmp_path / "s" / stopped[0]["folder"] / "metrics.jsonl").read_text().splitlines()
    assert len(lines) < 5  # it did not come to its end


@pytest.mark.long
def test_a_worker_killed_in_a_trial_loses_nothing(tmp_path, program):
    path = program(0.4)
    first = worker(tmp_path, path, 2)
    lines = tmp_path / "s" / "trials" / "0000" / "metrics.jsonl"
    until = time.monotonic() + 200
    while not lines.exists() or len(lines.read_text().splitlines()) < 2:
        assert time.monotonic() < until and first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()  # the process of its trial goes on to save; the next one waits for it
    assert sweep(tmp_path, 2, "--pruner", "none") == 0
    rows = by_number(tmp_path)
    assert [row["state"] for row in rows] == ["done", "done"]
    assert [json.loads(line)["step"] for line in lines.read_text().splitlines()] == [1, 2, 3, 4, 5]
    log = (tmp_path / "s" / "trials" / "0000.log").read_text()
    assert "--resume" in log
    lr = float((tmp_path / "s" / "trials" / "0000" / "lr").read_text())
    assert rows[0]["flags"]["lr"] == lr and rows[0]["value"] == pytest.approx(1 - lr + 0.005)


def test_a_trial_that_costs_three_workers_their_life_has_failed(tmp_path, program):
    program()
    options = run.SweepOptions(tmp_path / "sweep.yaml", tmp_path / "s")
    run._settle(options)
    own = run.Worker(options, read_plan(options.file))
    trial = own._take()
    trial.set_user_attr("attempts", run.ATTEMPTS)
    own._run(trial)
    (row,) = describe(tmp_path / "s")["trials"]
    assert row["state"] == "failed" and "its worker died 3 times" in row["reason"]


@pytest.mark.long
def test_two_workers_share_the_trials(tmp_path, program):
    path = program(0.1)
    both = [worker(tmp_path, path, 6) for _ in range(2)]
    said = [process.communicate(timeout=280)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    rows = by_number(tmp_path)
    assert [row["number"] for row in rows] == list(range(6))
    assert all(row["state"] in ("done", "failed") for row in rows)
    taken = [
        [line.split(":")[0].split()[-1] for line in text.splitlines() if line.startswith("[")]
        for text in said
    ]
    assert sorted(map(int, taken[0] + taken[1])) == list(range(6)) and all(taken)


def test_a_signal_leaves_the_trial_for_the_next_call(tmp_path, program, monkeypatch):
    program(0.5)
    real = Child.run

    def stopped(self, *arguments):
        self.asked = signal.SIGTERM
        return real(self, *arguments)

    monkeypatch.setattr(Child, "run", stopped)
    assert sweep(tmp_path, 1) == 128 + signal.SIGTERM
    assert [row["state"] for row in by_number(tmp_path)] == ["unfinished"]
    monkeypatch.setattr(Child, "run", real)
    assert sweep(tmp_path, 1) == 0
    assert [row["state"] for row in by_number(tmp_path)] == ["done"]


def test_another_sweep_in_the_folder_is_refused(tmp_path, program, capsys):
    program()
    assert sweep(tmp_path, 1) == 0
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("1e-1", "1e-2"))
    assert sweep(tmp_path, 1) == 2
    assert "holds another sweep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"command": "probe"}, "command: 'probe', must be pretrain or finetune"),
        ({"values": 1}, "values: unknown"),
        ({"search": {}}, "search: names no flag"),
        ({"search": {"lr": {"low": 1, "high": 1}}}, "low must be below high"),
        ({"search": {"lr": {"low": 0, "high": 1, "log": True}}}, "log needs low above 0"),
        ({"search": {"lr": {"low": 0.1}}}, r"must be \{low, high, log, step\} or a list"),
        ({"search": {"out": ["a"]}}, "--out: is set by the sweep"),
        ({"search": {"proxy": ["mae"]}}, "proxy is fixed in options too"),
        ({"value": None}, "value: names no score"),
        ({"direction": "up"}, "direction: 'up'"),
        ({"command": "finetune", "value": "dice"}, "must be validation"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_its_key(change, said):
    content = {"command": "pretrain", "options": "--proxy simclr", "search": {"lr": [0.1]}, "value": "loss"}
    with pytest.raises(UsageError, match=said):
        plan_of(content | change)


@pytest.mark.parametrize(
    ("search", "said"),
    [("lrr: [0.1]", "--lrr"), ("lr: {low: 0.0, high: 1.0}", "lr is 0"), ("optimizer: [adamw, adm]", "adm")],
)
def test_a_flag_that_no_trial_could_have_is_refused_before_any(search, said, tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text(
        f"command: pretrain\noptions: --proxy simclr\nsearch: {{{search}}}\nvalue: x\n"
    )
    assert sweep(tmp_path, 1) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_distributions_are_those_that_the_file_says():
    entries = {"a": {"low": 1, "high": 8, "step": 2}, "b": {"low": 0.1, "high": 1, "log": True},
               "c": [[32, 32, 32], [16, 64, 64]], "d": ["x y", True]}  # fmt: skip
    plan = plan_of({"command": "finetune", "options": "runs/a", "search": entries})
    made = {name: entry.distribution() for name, entry in plan.search.items()}
    assert made["a"] == optuna.distributions.IntDistribution(1, 8, step=2)
    assert made["b"] == optuna.distributions.FloatDistribution(0.1, 1.0, log=True)
    values = {"a": 3, "b": 0.25, "c": made["c"].choices[1], "d": made["d"].choices[0]}
    assert plan.flags(values) == ["--a", "3", "--b", "0.25", "--c", "16", "64", "64", "--d", "x y"]
    assert plan.value == "validation" and plan.direction == "maximize"
    assert plan.trial(values)[-3:] == ["--no-scratch", "--no-trivial", "--validation-only"]


def test_scores_of_a_finetuning_are_those_of_validation(tmp_path):
    for name, score in (("one", 0.5), ("two", 0.7)):
        own = ValidationScores(tmp_path / "validation" / f"{name}.jsonl")
        own.add("", 0.1, 5, 0.25)
        own.add("", 0.1, 5, 0.25)  # again, after a kill
        own.add("", 0.1, 10, None)
        os.utime(own.path, (1, 1 if name == "one" else 2))
        assert own.final() is None
        own.finish([score])
    assert [score for _, score in points(tmp_path, "validation")] == [0.25, 0.25]
    assert final(tmp_path, "validation") == pytest.approx(0.6)
