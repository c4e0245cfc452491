"""Fine-tuning: the frame's promises (equal effort, no look at test, resuming) and classification."""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl3d.api import (
    AggregatedEncoder,
    AggregatorConfig,
    BatchRng,
    Contestant,
    Encoder,
    SliceAggregator,
    UsageError,
    encoder_from,
    identity_hash,
    locks,
    open_data,
    read_result,
)
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d_benchmarks.finetune import job, run, train
from ssl3d_benchmarks.finetune.benchmark import Finetune
from ssl3d_benchmarks.finetune.classification import Classification, ClassificationConfig, shifted
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.parameters import (
    freeze,
    optimizer_of,
    parameter_groups,
    set_training,
    stages_of,
)
from ssl3d_benchmarks.finetune.protocol import TASKS, file_name, task_class
from ssl3d_benchmarks.finetune.recipe import resolve
from ssl3d_benchmarks.finetune.run import Outcome, make_task
from ssl3d_benchmarks.finetune.train import build, rate, scoring_steps
from ssl3d_benchmarks.finetune.validation import ValidationScores
from ssl3d_benchmarks.task import training_subsets

SPEC = "scratch:resnet10:acs:width=4"
SHORT = ["--steps", "6", "--batch-size", "4", "--threads", "1", "--no-trivial"]


def a_store(path, labels, splits=None, shape=(6, 8, 8), signal_=1.0, people=None):
    """Noise whose mean is the label, times `signal_`."""
    rng = np.random.default_rng(0)
    for k, label in enumerate(labels):
        subject = f"p{k}" if people is None else people[k]
        split = "" if splits is None else splits[k]
        record = Record(id=f"v{k:03d}", dataset="made", subject=subject, label=label, split=split)
        value = float(label) if isinstance(label, int | float) else 0.0
        image = rng.normal(size=(1, *shape)).astype(np.float32) + signal_ * value
        write_part(Path(f"{path}.partial"), record.id, record, image)
    assemble(Path(f"{path}.partial"), path, {}, [])
    return str(path)


def parts(train, val, test):
    return ["train"] * train + ["val"] * val + ["test"] * test


def records(folder):
    return [read_result(path) for path in sorted(Path(folder).glob("*.json"))]


def same(a, b):
    """The same result, whatever it cost."""
    assert a.key == b.key
    assert a.predictions == b.predictions and a.scores == b.scores
    assert a.compute["details"] == b.compute["details"]


@dataclass(frozen=True)
class PlainConfig:
    in_channels: int = 1


class Plain(Encoder):
    """Its embedding is the volume's mean (and one feature that says nothing), or nothing at all."""

    Config = PlainConfig
    paper = ""

    def __init__(self, blind=False):
        super().__init__()
        self.config, self.blind = PlainConfig(), blind
        self.channels, self.strides, self.embed_dim = (2,), ((1, 1, 1),), 2
        self.gain = nn.Parameter(torch.ones(1))
        self.metadata = {"architecture": "plain", "config": {}, "seed": 0}

    def forward(self, x):
        return [torch.cat([x * (0.0 if self.blind else self.gain), torch.ones_like(x)], dim=1)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL3D_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """24 / 8 / 12 subjects, easy to tell apart."""
    folder = tmp_path_factory.mktemp("data")
    return a_store(folder / "s.h5", [k % 2 for k in range(44)], parts(24, 8, 12), signal_=2.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    card = {"identities": [identity_hash("made", "p40")], "labels_seen": True, "steps": 3, "proxies": {}}
    return str(save_encoder(encoder_from(SPEC, seed=77), tmp_path_factory.mktemp("run") / "encoder", card))


def scored(data, encoder, **options):
    """A contestant trained by the recipe, in Python."""
    collection = open_data([data])
    work = Classification(ClassificationConfig(), collection)
    splits = collection.splits
    train, val, test = (collection.select(splits == name) for name in ("train", "val", "test"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "recipe", {**Classification.recipe, **options})
        contestant = Contestant("plain", "encoder", "0", encoder)
        return Finetune(work).score(contestant, train, val, test, seed=0)


# What it says of good and of useless encoders --------------------------------------------------------


def test_the_protocol_ranks_by_what_its_tasks_rank_by():
    found = {target: score for name in TASKS for target, score in task_class(name).mains.items()}
    assert found == Finetune.mains


def test_an_encoder_that_separates_the_classes_reaches_auc_1(two_classes):
    scores = scored(two_classes, Plain(), epochs=0, steps=60, lr=0.1, freeze="all")
    assert scores.scores == {"auc": 1.0, "accuracy": 1.0, "balanced_accuracy": 1.0}


def test_a_blind_encoder_is_at_chance(two_classes):
    scores = scored(two_classes, Plain(blind=True), epochs=0, steps=20)
    assert scores.scores["auc"] == 0.5 and scores.scores["balanced_accuracy"] == 0.5


def test_labels_without_a_cause_stay_at_chance(tmp_path):
    labels = np.random.default_rng(3).integers(2, size=140).tolist()
    data = a_store(tmp_path / "s.h5", labels, parts(40, 20, 80), signal_=0.0)
    low, high = scored(data, Plain(), epochs=0, steps=40, lr=0.1).intervals["auc"]
    assert low < 0.5 < high


def test_values_are_learned(tmp_path):
    labels = [k / 10 + 0.05 for k in np.random.default_rng(0).permutation(60)]
    data = a_store(tmp_path / "s.h5", labels, parts(30, 12, 18))
    found = scored(data, Plain(), epochs=0, steps=150, lr=0.1)
    assert found.scores["r2"] > 0.9 and found.scores["spearman"] > 0.9
    assert set(found.scores) == {"r2", "spearman", "mae"}
    truth = [row["target"] for row in found.predictions]
    assert min(truth) >= 0.05 and max(truth) > 1  # in the data's own unit, not standardised


def test_a_long_training_alone_says_how_far_it_is(two_classes, tmp_path, capsys, monkeypatch):
    words = ["finetune", "scratch:resnet10:width=4", "--data", two_classes, *SHORT, "--no-scratch"]
    assert main([*words, "--out", str(tmp_path / "short")]) == 0
    assert "s a step" not in capsys.readouterr().err
    monkeypatch.setattr(train, "REPORT_EVERY", 0.0)
    assert main([*words, "--out", str(tmp_path / "long")]) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "s a step" in line]
    assert len(lines) == 5  # none after the last of 6 steps
    assert re.search(r"lr \S+: step 2/6, loss [\d.]+, \S+ s a step, \d+ s left$", lines[1]), lines
    assert "s a step" not in shown.out
    assert not any("a step" in path.read_text() for path in (tmp_path / "long").glob("*.json"))


# Equal effort ----------------------------------------------------------------------------------------


def test_end_to_end_with_the_scratch_arm(two_classes, trained, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["finetune", trained, "--data", two_classes, "--out", str(out), *SHORT, "--seeds", "0", "1"]
    assert main([*arguments, "--lr-scratch", "0.01"]) == 0
    shown = capsys.readouterr()
    for words in (
        "finetune-classification/classes v",
        "over scratch [95 %]",
        "minimum detectable difference in auc",
        "saw 1 test subject: not ranked",
        "pretrain on the labelled list itself, whose test subjects are then left out, or",
        "pretrained with labels",
        "from scratch",
        "24 of 24 training subjects, 8 to choose on; test 12 subjects",
        "2 seeds",
    ):
        assert words in shown.out
    found = records(out)
    assert len(found) == 4
    own = [r for r in found if r.contestant["kind"] == "encoder"]
    scratch = [r for r in found if r.contestant["kind"] == "untrained"]
    assert {r.contestant["name"] for r in scratch} == {"scratch:resnet10:width=4"}
    assert (
        len({r.contestant["digest"] for r in scratch}) == 2
        and len({r.contestant["digest"] for r in own}) == 1
    )
    assert own[0].flags == {**own[0].flags, "seen_test_subjects": 1, "saw_labels": True, "ranked": False}
    assert scratch[0].flags["ranked"]
    # Equal for all but the learning rate.
    assert len({str(r.settings["training"]) + str(r.settings["task"]) for r in found}) == 1
    assert own[0].settings["rates"] == [3e-4] and scratch[0].settings["rates"] == [0.01]
    for result in found:
        spent = result.compute["finetune"]
        assert spent["steps"] == 6 and spent["flops"] > 0 and spent["peak_memory_bytes"] > 0
        curve = result.compute["details"]["curve"]
        assert [point["step"] for point in curve] == [1, 2, 3, 4, 5, 6]
        best = max(point["score"] for point in curve)
        assert result.compute["details"]["validation"]["auc"] == best
        assert len(result.predictions) == 12
    assert not any((out / ".jobs").rglob("*.pt"))
    # A second call finds everything and changes nothing.
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix == ".json"}
    assert main([*arguments, "--lr-scratch", "0.01"]) == 0
    again = capsys.readouterr()
    assert again.err.count("record found") == 4 and again.out == shown.out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_scratch_arm_is_what_the_word_scratch_gives(two_classes, trained, tmp_path):
    for name, spec in (("a", trained), ("b", SPEC)):
        arguments = ["finetune", spec, "--data", two_classes, "--out", str(tmp_path / name), *SHORT]
        assert main(arguments) == 0
    automatic = next(r for r in records(tmp_path / "a") if r.contestant["kind"] == "untrained")
    (asked,) = records(tmp_path / "b")
    same(automatic, asked)
    assert (
        main(
            [
                "finetune",
                trained,
                "--data",
                two_classes,
                "--out",
                str(tmp_path / "c"),
                *SHORT,
                "--no-scratch",
            ]
        )
        == 0
    )
    assert len(records(tmp_path / "c")) == 1


def test_subsets_are_nested_and_validation_shrinks_too(two_classes):
    options, config = resolve(
        FinetuneOptions((SPEC,), data=(two_classes,), fractions=(0.25, 0.5, 1.0), repeats=2),
        ClassificationConfig(),
        set(),
    )
    split, _ = make_task(options, config)
    subsets = training_subsets(split, options.fractions, 2, 0)
    found = {(subset.fraction, subset.repeat): subset.folds[0] for subset in subsets}
    assert len(found) == 5
    for repeat in range(2):
        quarter, half, whole = found[0.25, repeat], found[0.5, repeat], found[1.0, 0]
        for part, sizes in ((0, (6, 12, 24)), (1, (2, 4, 8))):
            assert [int(one[part].sum()) for one in (quarter, half, whole)] == list(sizes)
            assert not (quarter[part] & ~half[part]).any() and not (half[part] & ~whole[part]).any()
    assert (found[0.5, 0][0] != found[0.5, 1][0]).any()


def test_every_arm_gets_the_same_number_of_trials_chosen_on_val(two_classes, trained, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "finetune",
        trained,
        "--data",
        two_classes,
        "--out",
        str(out),
        *SHORT,
        "--tune",
        "1e-9",
        "0.01",
    ]
    assert main(arguments) == 0
    for result in records(out):
        details = result.compute["details"]
        assert [trial["lr"] for trial in details["trials"]] == [1e-9, 0.01]
        values = [trial["auc"] for trial in details["trials"]]
        assert details["validation"]["auc"] == max(values)
        assert details["lr"] == details["trials"][int(np.argmax(values))]["lr"]
        assert result.settings["rates"] == [1e-9, 0.01] and result.compute["finetune"]["steps"] == 12


def test_training_and_tuning_never_look_at_test(tmp_path):
    labels = [k % 2 for k in range(40)]
    poisoned = labels[:28] + [1 - label for label in labels[28:]]
    found = []
    for name, given in (("a", labels), ("b", poisoned)):
        rng_store = a_store(tmp_path / f"{name}.h5", given, parts(20, 8, 12), signal_=0.0)
        out = tmp_path / name
        arguments = [
            "finetune",
            SPEC,
            "--data",
            rng_store,
            "--out",
            str(out),
            *SHORT,
            "--tune",
            "1e-3",
            "1e-2",
        ]
        assert main(arguments) == 0
        found += records(out)
    a, b = found
    assert a.data_digest != b.data_digest
    assert a.compute["details"] == b.compute["details"]  # weights, curve, trials, choice
    assert [r["probability"] for r in a.predictions] == [r["probability"] for r in b.predictions]
    assert a.scores["auc"] == pytest.approx(1 - b.scores["auc"])


def test_values_are_standardised_on_training_subjects_alone(tmp_path):
    labels = [k + 0.5 for k in range(20)]
    data = open_data([a_store(tmp_path / "s.h5", labels)])
    work = Classification(ClassificationConfig(), data)
    model = build(work, Plain(), data.select(np.arange(4)), 0, torch.device("cpu"))
    assert float(model.centre) == pytest.approx(2.0) and float(model.spread) == pytest.approx(
        np.std([0, 1, 2, 3])
    )


def test_a_rate_that_diverges_is_out_and_the_others_stay(two_classes, tmp_path, capsys):
    arguments = ["finetune", SPEC, "--data", two_classes, *SHORT, "--warmup", "0", "--optimizer", "sgd"]
    good, with_bad, bad = (str(tmp_path / name) for name in ("good", "with_bad", "bad"))
    assert main([*arguments, "--tune", "1e-3", "--out", good]) == 0
    assert main([*arguments, "--tune", "1e25", "1e-3", "--out", with_bad]) == 0
    assert "learning rate 1e+25" in (said := capsys.readouterr().err) and "is left out" in said
    (alone,), (beside,) = records(tmp_path / "good"), records(tmp_path / "with_bad")
    details = beside.compute["details"]
    assert details["lr"] == 1e-3 and alone.scores == beside.scores
    assert [trial["lr"] for trial in details["trials"]] == [1e25, 1e-3]
    assert details["trials"][0]["diverged"] >= 1 and "diverged" not in details["trials"][1]
    assert beside.compute["finetune"]["steps"] > alone.compute["finetune"]["steps"]
    assert main([*arguments, "--tune", "1e25", "1e29", "--out", bad]) == 1
    assert "1 of 1 jobs failed" in capsys.readouterr().err


def test_rows_without_a_network_belong_to_their_subset(two_classes, tmp_path):
    arguments = ["finetune", SPEC, "--data", two_classes, "--steps", "2", "--fractions", "0.3"]
    arguments += ["--out", str(tmp_path), "--threads", "1"]
    found = []
    for seed in ("0", "0", "7"):
        assert main([*arguments, "--split-seed", seed]) == 0
        found.append({r.key: r.scores for r in records(tmp_path) if r.contestant["kind"] == "trivial"})
    assert found[0] == found[1] and len(found[2]) == 2 * len(found[0]) > 0


def test_predictions_are_written_as_csv(two_classes, tmp_path, capsys):
    arguments = ["finetune", SPEC, "--data", two_classes, *SHORT, "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert main([*arguments, "--save-predictions"]) == 0
    assert "predictions are saved with --overwrite only" in capsys.readouterr().err
    for _ in range(2):  # written again, not twice
        assert main([*arguments, "--save-predictions", "--overwrite"]) == 0
    (path,) = tmp_path.glob("predictions/*/predictions.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    (record,) = records(tmp_path)
    assert len(rows) == len(record.predictions) == 12
    for row, kept in zip(rows, record.predictions, strict=True):
        assert (row["id"], row["target"]) == (kept["id"], kept["target"])
        assert float(row["probability of 1"]) == pytest.approx(kept["probability"][1], abs=1e-5)


def test_no_two_predictions_have_one_name():
    ids = ["pat_ä", "pat_ö", "a b", "a_b", "p1/t1", "p1_t1", "made/p1/t1", "x", "made/y", "p1\\t1"]
    volumes = [SimpleNamespace(dataset="made", id=one) for one in ids]
    names = [file_name(volume) for volume in volumes]
    assert len(set(names)) == len(ids) - 1 and names[4] == names[6]  # of one store only one of them
    assert names[7:9] == ["made_x", "made_y"] and names[0] == "made_pat_ä"
    assert not any(set(name) & set(" /\\:") for name in names)


def test_batch_norm_of_one_number_says_what_to_do(tmp_path, capsys):
    store = str(tmp_path / "small.h5")
    store = a_store(tmp_path / "small.h5", [0, 1] * 6)
    arguments = [
        "finetune",
        SPEC,
        "--data",
        store,
        *SHORT,
        "--batch-size",
        "1",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "batch norm has one number per channel" in said and "--freeze-norm" in said
    assert "Traceback" not in said


# Stopping and going on ---------------------------------------------------------------------------------


@pytest.mark.long
def test_a_killed_job_goes_on_to_the_same_result(two_classes, tmp_path):
    arguments = ["finetune", SPEC, "--data", two_classes, "--threads", "1", "--no-trivial", "--steps", "60"]
    arguments += ["--batch-size", "4", "--classification.dropout", "0.2", "--classification.flip", "0.5"]
    arguments += ["--classification.shift", "0.2", "--eval-at", ".3", ".6", "--ema", "0.3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*arguments, "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "ssl3d", *arguments, "--out", str(cut), "--checkpoint-seconds", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(cut.glob(".jobs/*/*/*.pt")) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    (left,) = cut.glob(".jobs/*/*/*.pt")
    step = torch.load(left, weights_only=True)["trial"]["step"]
    assert 0 < step < 60 and not records(cut)
    assert main([*arguments, "--out", str(cut), "--checkpoint-seconds", "0"]) == 0
    same(*records(whole), *records(cut))


@pytest.mark.long
def test_two_processes_on_one_folder_share_the_jobs(two_classes, tmp_path):
    arguments = ["finetune", SPEC, "--data", two_classes, "--threads", "1", "--no-trivial", "--steps", "10"]
    arguments += ["--batch-size", "4", "--seeds", "0", "1", "2"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert main([*arguments, "--out", str(alone)]) == 0
    command = [sys.executable, "-m", "ssl3d", *arguments, "--out", str(shared)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    made = [line for _, err in said for line in err.splitlines() if "(learning rate" in line]
    found = [line for _, err in said for line in err.splitlines() if "record found" in line]
    assert len(made) == 3 and len({line.split(": auc")[0] for line in made}) == 3
    assert len(found) == 3
    rows = [[line for line in out.splitlines() if "resnet10" in line] for out, _ in said]
    assert rows[0] == rows[1] != []
    for one, other in zip(records(alone), records(shared), strict=True):
        same(one, other)
    assert not list(shared.glob(".jobs/*"))


def test_a_job_in_the_hands_of_another_process_is_waited_for(two_classes, tmp_path, monkeypatch, capsys):
    arguments = ["finetune", SPEC, "--data", two_classes, *SHORT, "--seeds", "0", "1"]
    assert main([*arguments, "--out", str(tmp_path / "made")]) == 0
    theirs, _ = (tmp_path / "made").glob("*.json")
    out = tmp_path / "out"
    lock = out / ".jobs" / f"{read_result(theirs).key}.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid()}))

    def other_is_done(_):
        (mine,) = out.glob("*.json")  # everything else came first
        assert mine.name != theirs.name
        shutil.copy(theirs, out)
        lock.unlink()

    monkeypatch.setattr(locks.time, "sleep", other_is_done)
    capsys.readouterr()
    assert main([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "waiting for 1 job that another process is running" in said and said.count("(learning rate") == 1
    assert len(records(out)) == 2


def test_a_job_that_fails_is_named_and_the_others_go_on(two_classes, trained, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["finetune", trained, "--data", two_classes, "--out", str(out), *SHORT]
    assert main([*arguments, "--lr", "1e30", "--lr-scratch", "1e-3", "--warmup", "0"]) == 1
    shown = capsys.readouterr()
    assert "1 of 2 jobs failed" in shown.err and f"failed: {trained}" in shown.err
    assert "volumes: made/v0" in shown.err and "the loss is nan" in shown.err.replace("inf", "nan")
    (result,) = records(out)
    assert result.contestant["kind"] == "untrained" and "over scratch" in shown.out


def test_workers_change_nothing(two_classes, tmp_path):
    for name, workers in (("a", "0"), ("b", "1")):
        out = str(tmp_path / name)
        arguments = ["finetune", SPEC, "--data", two_classes, "--out", out, *SHORT, "--workers", workers]
        assert main(arguments) == 0
    same(*records(tmp_path / "a"), *records(tmp_path / "b"))


def test_folds_predict_every_subject_once(two_classes, tmp_path):
    out = tmp_path / "out"
    arguments = ["finetune", SPEC, "--data", two_classes, "--out", str(out), *SHORT[2:], "--folds", "3"]
    assert main([*arguments, "--steps", "2"]) == 0
    (result,) = records(out)
    ids = [row["id"] for row in result.predictions]
    assert len(ids) == len(set(ids)) == 44 and len(result.compute["details"]) == 3
    assert result.split["val"]["subjects"] > 0


# Parameters --------------------------------------------------------------------------------------------


def a_model(tmp_path, spec=SPEC):
    data = open_data([a_store(tmp_path / "m.h5", [k % 2 for k in range(8)])])
    work = Classification(ClassificationConfig(), data)
    return work, data, build(work, encoder_from(spec, seed=0), data, 0, torch.device("cpu"))


def test_layer_decay_by_hand(tmp_path):
    _, _, model = a_model(tmp_path)
    by_name = {
        name: (group["scale"], group["weight_decay"])
        for group in parameter_groups(model, 0.5, 0.1)
        for name in group["names"]
    }
    assert set(by_name) == {name for name, _ in model.named_parameters()}
    for name, (scale, decay) in by_name.items():
        first = name.removeprefix("encoder.").split(".")[0]
        stage = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4, "head": 5}[first]
        assert scale == 0.5 ** (5 - stage), name
        vector = name.endswith("bias") or ".bn" in name or name.split(".")[-2] == "1"
        assert decay == (0.0 if vector else 0.1), name
    optimizer = optimizer_of(model, FinetuneOptions(("x",), layer_decay=1.0))
    assert {group["scale"] for group in optimizer.param_groups} == {1.0}


@pytest.mark.parametrize("name", ["mobilenet_v2", "vit:width=24:layers=4:heads=2", "resenc"])
def test_stages_of_any_encoder_rise_with_depth(name):
    encoder = encoder_from(f"scratch:{name}")
    # A transformer's last norm is applied to every map, and so belongs to the first.
    found = [stage for name, stage in stages_of(encoder).items() if not name.startswith("encoder.ln.")]
    assert set(found) == set(range(len(encoder.strides))) and found == sorted(found)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize(("asked", "norms"), [("all", False), ("2", False), ("none", True)])
def test_frozen_parts_stay_as_they_are_to_the_byte(tmp_path, asked, norms):
    work, data, model = a_model(tmp_path)
    calm = freeze(model, asked, norms)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = optimizer_of(model, FinetuneOptions(("x",), optimizer="sgd", weight_decay=0.1))
    set_training(model, calm)
    batch = [work.draw(volume, np.random.default_rng(0)) for volume in data]
    stacked = {key: torch.stack([one[key] for one in batch]) for key in batch[0]}
    for _ in range(2):
        optimizer.zero_grad()
        work.loss(model, stacked, BatchRng(0, range(8), 8))[0].backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "head.weight" in changed
    stem = ("encoder.conv1", "encoder.bn1", "encoder.layer1")
    if asked == "all":
        assert not any(name.startswith("encoder") for name in changed)
    elif asked == "2":
        assert not any(name.startswith(stem) for name in changed)
        assert "encoder.layer2.0.conv1.weight" in changed and "encoder.layer2.0.bn1.running_mean" in changed
    else:
        assert not any(".bn" in name or "running" in name for name in changed)
        assert "encoder.conv1.weight" in changed


def test_schedules_by_hand():
    milestones = FinetuneOptions(
        ("x",), schedule="milestones", milestones=(0.5, 0.75), gamma=0.1, warmup=0.0
    )
    assert [rate(step, 100, 1.0, milestones) for step in (0, 49, 50, 74, 75, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    cosine = FinetuneOptions(("x",), warmup=0.1)
    assert [rate(step, 100, 2.0, cosine) for step in (0, 9, 10, 55)] == pytest.approx([0.2, 2, 2, 1])
    poly = FinetuneOptions(("x",), schedule="poly", warmup=0.0)
    assert rate(50, 100, 1.0, poly) == pytest.approx(0.5**0.9)
    assert scoring_steps((0, 0.5, 30, 300), 100) == {0, 50, 30, 100}


def test_presets_lie_between_recipe_and_flags(two_classes):
    options, config = resolve(FinetuneOptions(("x",), preset="medmnist"), ClassificationConfig(), set())
    assert (options.epochs, options.lr, options.lr_scratch, options.batch_size) == (100, 1e-3, 1e-3, 32)
    assert options.optimizer == "adam" and options.weight_decay == 0 and config.scale == "medmnist"
    steps = 100 * 38
    assert [rate(s * 38, steps, 1.0, options) for s in (49, 50, 75)] == pytest.approx([1, 0.1, 0.01])
    assert len(scoring_steps(options.eval_at, steps)) == 100
    short, _ = resolve(
        FinetuneOptions(("x",), preset="medmnist-short", batch_size=8),
        ClassificationConfig(),
        {"batch_size"},
    )
    assert short.epochs == 30 and short.batch_size == 8
    assert [rate(s * 38, 30 * 38, 1.0, short) for s in (14, 15, 22)] == pytest.approx([1, 0.1, 0.01])
    counted, _ = resolve(FinetuneOptions(("x",), steps=7), ClassificationConfig(), {"steps"})
    assert (counted.steps, counted.epochs) == (7, 0)


@pytest.mark.parametrize("words", [["--detection.model", "retinanet"], ["--config", "given.yaml"]])
def test_a_tasks_flag_at_its_default_goes_above_a_preset(words, tmp_path, monkeypatch):
    (tmp_path / "given.yaml").write_text("detection: {model: retinanet}\n")
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(run, "run", lambda options, config: seen.append(config) or Outcome())
    arguments = ["finetune", SPEC, "--data", "x", "--task", "detection", "--preset", "nodule-slices"]
    assert main([*arguments, *words]) == main(arguments) == 0
    assert [config.model for config in seen] == ["retinanet", "faster-rcnn-2d"]
    assert [config.scored_crop for config in seen] == [(96, 96), (96, 96)]


def test_a_rate_for_scratch_beside_tune_is_refused():
    with pytest.raises(UsageError, match="give --tune-scratch"):
        resolve(
            FinetuneOptions(("x",), tune=(0.1,), lr_scratch=0.1),
            ClassificationConfig(),
            {"tune", "lr_scratch"},
        )


def test_a_task_without_a_learning_rate_asks_for_one(monkeypatch):
    monkeypatch.setattr(Classification, "recipe", {"steps": 5})
    with pytest.raises(UsageError, match=r"--lr: classification has no learning rate"):
        resolve(FinetuneOptions(("x",)), ClassificationConfig(), set())
    assert resolve(FinetuneOptions(("x",), tune=(0.1,)), ClassificationConfig(), {"tune"})[0].lr is None
    monkeypatch.setattr(Classification, "recipe", {"lr": 1.0})
    with pytest.raises(UsageError, match=r"--steps: classification has no length"):
        resolve(FinetuneOptions(("x",)), ClassificationConfig(), set())


@pytest.mark.parametrize(
    ("labels", "extra", "message"),
    [
        ([None] * 8, [], "none of the 8 volumes has a label, which classification needs; write a CSV"),
        ([1] * 8, [], "all 8 labelled volumes are of class '1'"),
        ([0, 1], [], "fine-tuning needs two of each"),
        (["a", "b"] * 4, ["--classification.target", "real"], "is not a number"),
        (["0.5", "inf"] * 4, ["--classification.target", "real"], "label 'inf' is not a number"),
        (["0.1", "1.5", "2.3", "a"] * 4, [], "12 of 16 labels are numbers like 0.1, but not 'a'"),
        ([0, 1] * 4, ["--folds", "9"], "--folds 9: the data has 8 subjects"),
        ([0, 1] * 4, ["--lr", "0"], "--lr: "),
        ([0, 1] * 4, ["--steps", "3", "--epochs", "2"], "--steps 3 and --epochs 2"),
        ([0, 1] * 4, ["--task", "classificaton"], "did you mean classification"),
        ([0, 1] * 4, ["--preset", "medmnst"], "--preset medmnst: --task classification has medmnist"),
        ([0, 1] * 4, ["--freeze", "9"], "--freeze 9: the encoder has 5 stages"),
        ([0, 1] * 4, ["--freeze", "half"], "--freeze: "),
        ([0, 1] * 4, ["--tune", "1", "2", "--tune-scratch", "1"], "every row gets the same number"),
        ([0, 1] * 4, ["--classification.dropout", "2"], "dropout"),
        ([0, 1] * 4, ["--seeds", "1", "1"], "--seeds: "),
    ],
)
def test_wrong_input_is_one_clear_line(cache, tmp_path, capsys, labels, extra, message):
    data = a_store(tmp_path / "s.h5", labels)
    assert main(["finetune", SPEC, "--data", data, "--out", str(tmp_path / "out"), *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("ssl3d")
    assert not (tmp_path / "out").exists()


def test_folds_of_one_subject_are_scored_together(tmp_path):
    data, out = a_store(tmp_path / "s.h5", [0, 1, 0, 1]), tmp_path / "out"
    command = ["finetune", SPEC, "--data", data, "--out", str(out), *SHORT, "--folds", "4"]
    assert main(command) == 0
    (record,) = records(out)
    assert record.split["folds"] == 4
    assert record.split["test"]["subjects"] == 4


# Classification ------------------------------------------------------------------------------------------


def test_images_and_rows_without_a_network(tmp_path, capsys):
    data = a_store(tmp_path / "s.h5", [k % 2 for k in range(20)], parts(10, 4, 6), shape=(1, 12, 12))
    out = tmp_path / "out"
    assert main(["finetune", SPEC, "--data", data, "--out", str(out), *SHORT[:-1]]) == 0
    kinds = [r.contestant["kind"] for r in records(out)]
    assert sorted(kinds) == ["trivial"] * 3 + ["untrained"]
    assert "no network" in capsys.readouterr().out


def test_a_volume_larger_than_the_crop_is_the_mean_of_its_windows(tmp_path):
    data = open_data([a_store(tmp_path / "s.h5", [0, 1] * 4, shape=(8, 8, 8))])
    work = Classification(ClassificationConfig(crop=(8, 4, 8)), data)
    model = build(work, Plain(), data, 0, torch.device("cpu")).eval()
    drawn = work.draw(data[0], np.random.default_rng(0))
    assert drawn["image"].shape == (1, 8, 4, 8)
    image = data[0].read()
    with torch.inference_mode():
        found = work.predict(model, data[0])
        windows = [image[:, :, start : start + 4].mean() for start in (0, 2, 4)]
        # Weights by which every voxel counts as evenly as three overlapping windows can: 3 2 3.
        mean = sum(w * m for w, m in zip((3, 2, 3), windows, strict=True)) / 8
        expected = model.read(torch.stack([mean, torch.ones(())])[None]).softmax(1)[0]
    assert found["probability"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert work.predict_all(model, data)[0] == found


def test_volumes_of_several_shapes_are_one_batch_if_padded(tmp_path):
    """In the middle of their lowest value, to the largest volume or the crop; images stay images."""
    rng = np.random.default_rng(0)
    shapes = [(4, 6, 8), (3, 8, 8), (4, 8, 12), (1, 5, 5), (1, 7, 5)]
    for k, shape in enumerate(shapes):
        record = Record(id=f"v{k}", dataset="made", subject=f"p{k}", label=k % 2)
        image = rng.normal(size=(1, *shape)).astype(np.float32)
        write_part(tmp_path / "s.h5.partial", record.id, record, image)
    assemble(tmp_path / "s.h5.partial", tmp_path / "s.h5", {}, [])
    data = open_data([str(tmp_path / "s.h5")])
    work = Classification(ClassificationConfig(crop=(96, 96, 10), pad=True), data)
    drawn = [work.draw(volume, rng)["image"] for volume in data]
    assert {tuple(image.shape) for image in drawn} == {(1, 4, 8, 10)}
    volume = data[1].read()
    assert torch.equal(drawn[1][:, :3, :, 1:9], volume)
    outside = drawn[1].clone()
    outside[:, :3, :, 1:9] = volume.min()
    assert (outside == volume.min()).all()
    model = build(work, Plain(), data, 0, torch.device("cpu")).eval()
    with torch.inference_mode():
        together = work.predict_all(model, data)
        for row, volume in zip(together, data, strict=True):
            assert row["probability"] == pytest.approx(work.predict(model, volume)["probability"], abs=1e-5)
    plain = Classification(ClassificationConfig(crop=(96, 96, 10)), data)
    assert len({tuple(plain.draw(volume, rng)["image"].shape) for volume in data}) == 5
    assert work.settings()["pad"] and "pad" not in plain.settings()
    images = data.select(np.array([3, 4]))
    assert (
        Classification(ClassificationConfig(pad=True), images).draw(images[0], rng)["image"].shape[1] == 1
    )


def test_batches_predict_as_single_volumes_do(tmp_path):
    work, data, model = a_model(tmp_path)
    model.eval()
    with torch.inference_mode():
        together = work.predict_all(model, data)
        for row, volume in zip(together, data, strict=True):
            assert row["probability"] == pytest.approx(work.predict(model, volume)["probability"], abs=1e-5)


def test_random_scale_halves_what_is_predicted_and_dims_what_is_trained_on(tmp_path):
    data = open_data([a_store(tmp_path / "s.h5", [0, 1] * 4)])
    assert not Classification(ClassificationConfig(scale="medmnist"), data).dimmed  # not of its shape sets
    work = Classification(ClassificationConfig(scale="random"), data)
    model = build(work, Plain(), data, 0, torch.device("cpu")).eval()
    image = data[0].read()[None]
    with torch.inference_mode():
        expected = model(image * 0.5).softmax(1)[0].tolist()
        assert work.predict(model, data[0])["probability"] == pytest.approx(expected)
    many = torch.ones(500, 1, 1, 1, 1)
    factor = work._augment(many, BatchRng(0, range(500), 500)).flatten()
    assert 0 <= float(factor.min()) < 0.05 and 0.95 < float(factor.max()) <= 1
    assert float(factor.mean()) == pytest.approx(0.5, abs=0.05)


def test_loss_is_that_of_torch_with_weights_and_smoothing(tmp_path):
    data = open_data([a_store(tmp_path / "s.h5", [0, 0, 0, 1] * 2)])
    work = Classification(ClassificationConfig(class_weights="balanced", label_smoothing=0.1), data)
    model = build(work, Plain(), data, 0, torch.device("cpu"))
    assert model.weights.tolist() == pytest.approx([8 / (6 * 2), 8 / (2 * 2)])
    image, target = torch.stack([v.read() for v in data]), torch.tensor([0, 0, 0, 1] * 2)
    loss, _ = work.loss(model, {"image": image, "target": target}, BatchRng(0, range(8), 8))
    expected = F.cross_entropy(model(image), target, torch.tensor([2 / 3, 2.0]), label_smoothing=0.1)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_shift_moves_voxels_and_repeats_the_edge():
    x = torch.arange(5.0).view(1, 1, 1, 1, 5)
    assert shifted(x, torch.tensor([[0.3, 0.3, 0.4]])).flatten().tolist() == [0, 0, 0, 1, 2]
    assert shifted(x, torch.tensor([[0.0, 0.0, -0.2]])).flatten().tolist() == [1, 2, 3, 4, 4]


def test_the_aggregator_is_trained_with_the_encoder(tmp_path):
    inner = encoder_from(SPEC, seed=0)
    config = AggregatorConfig(features=inner.embed_dim)
    encoder = AggregatedEncoder(inner, SliceAggregator(config)).eval()
    data = open_data([a_store(tmp_path / "s.h5", [0, 1] * 4)])
    work = Classification(ClassificationConfig(), data)
    model = build(work, encoder, data, 0, torch.device("cpu")).eval()
    image = torch.stack([v.read() for v in data])
    assert torch.allclose(model.embed(image), encoder.embed(image), atol=1e-5)
    work.loss(
        model.train(), {"image": image, "target": torch.tensor([0, 1] * 4)}, BatchRng(0, range(8), 8)
    )[0].backward()
    assert model.encoder.encoder.conv1.weight.grad.abs().sum() > 0
    assert sum(p.grad.abs().sum() for p in encoder.aggregator.parameters() if p.grad is not None) > 0


def test_records_settings_hold_what_changes_scores():
    from ssl3d_benchmarks.finetune.job import APART

    fields = {one.name for one in dataclasses.fields(FinetuneOptions)}
    assert set(APART) <= fields
    assert {"steps", "epochs", "batch_size", "optimizer", "freeze", "precision", "pool"} <= fields - set(
        APART
    )


def test_a_record_does_not_depend_on_the_seeds_beside_it(two_classes, trained, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["finetune", trained, "--data", two_classes, *SHORT, "--out", str(out), "--seeds"]
    main([*arguments, "0"])
    first = {path: path.read_bytes() for path in out.glob("*.json")}
    assert len(first) == 2
    capsys.readouterr()
    main([*arguments, "1", "0"])
    assert capsys.readouterr().err.count("record found") == 2
    assert {path: path.read_bytes() for path in first} == first
    assert len(records(out)) == 4


def test_validation_alone_reads_no_test_subject_and_is_what_the_record_has(
    two_classes, tmp_path, capsys, monkeypatch
):
    words = ["finetune", SPEC, "--data", two_classes, *SHORT, "--eval-at", "0.5", "1", "--seeds", "0", "1"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    seen = []
    real = train.predict
    monkeypatch.setattr(
        train, "predict", lambda plan, model, data, **k: seen.append(data) or real(plan, model, data, **k)
    )
    monkeypatch.setattr(job, "predict", None)
    out = tmp_path / "short"
    assert main([*words, "--validation-only", "--out", str(out)]) == 0
    assert seen and all(split == "val" for data in seen for split in data.splits)
    assert not records(out) and not (out / "models").exists() and not list(out.glob("*.png"))
    files = sorted((out / "validation").glob("*.jsonl"))
    scores = [ValidationScores(path) for path in files]
    whole = [r for r in records(tmp_path / "whole") if r.contestant["kind"] != "trivial"]
    assert len(scores) == len(whole) == 2
    for own, record in zip(scores, sorted(whole, key=lambda r: r.seed), strict=True):
        details = record.compute["details"]
        assert own.final() == details["validation"]["auc"]
        assert [(line["step"], line["score"]) for line in own.lines() if "step" in line] == [
            (entry["step"], entry["score"]) for entry in details["curve"]
        ]
    before = [path.read_bytes() for path in files]
    seen.clear()
    assert main([*words, "--validation-only", "--out", str(out)]) == 0  # nothing is trained twice
    assert not seen and [path.read_bytes() for path in files] == before


def test_validation_alone_needs_validation_subjects(tmp_path, capsys):
    data = a_store(tmp_path / "s.h5", [0, 1] * 4)  # four to train on spare nobody
    words = ["finetune", SPEC, "--data", data, *SHORT, "--folds", "2", "--out", str(tmp_path / "out")]
    assert main([*words, "--validation-only"]) == 2
    assert "no validation subjects for --validation-only" in capsys.readouterr().err


@pytest.mark.long
def test_loggers_have_curves_scores_and_the_model_and_change_no_record(two_classes, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    words = ["finetune", SPEC, "--data", two_classes, *SHORT, "--eval-at", "0.5", "1"]
    assert main([*words, "--out", "plain"]) == 0
    assert main([*words, "--out", "logged", "--logger", "mlflow", "tensorboard"]) == 0
    (plain,), (logged,) = records("plain"), records("logged")
    same(plain, logged)
    client = MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "ssl3d"]
    (run_,) = client.search_runs([experiment.experiment_id])
    assert run_.info.status == "FINISHED" and run_.data.tags["group"] == "logged"
    assert run_.data.metrics["test/auc"] == pytest.approx(logged.scores["auc"])
    curve = client.get_metric_history(run_.info.run_id, "validation/auc")
    assert [(p.step, p.value) for p in curve] == [
        (entry["step"], entry["score"]) for entry in logged.compute["details"]["curve"]
    ]
    assert {p.step for p in client.get_metric_history(run_.info.run_id, "train/loss")} == set(range(1, 7))
    assert {f.path for f in client.list_artifacts(run_.info.run_id, "model")} >= {"model/model.json"}
    assert list(Path("logged", ".logs").glob("*/tensorboard/events*"))
    assert main(["info", "logged"]) in (0, None)  # what loggers write is taken for no record
