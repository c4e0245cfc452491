"""`ssl3d linear-probe` from the command line to records, table and pictures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ssl3d.api import encoder_from, identity_hash, open_data, read_result
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.data.split import house_split
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part

SPEC = "scratch:resnet10:acs:width=8"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL3D_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """An encoder with metadata as pretraining writes it, that saw one test subject."""
    data = open_data(["phantoms:24"])
    parts = house_split(data)
    seen = [k for k, part in enumerate(parts) if part == "train"] + [
        int(np.flatnonzero(parts == "test")[0])
    ]
    card = {
        "identities": sorted({identity_hash(data[k].dataset, data[k].subject) for k in seen}),
        "labels_seen": False,
        "steps": 12,
        "proxies": {"sorting": {}},
    }
    return save_encoder(encoder_from(SPEC, seed=77), tmp_path_factory.mktemp("run") / "encoder", card)


def records(folder):
    return [read_result(path) for path in sorted(folder.glob("*.json"))]


def a_store(path, labels, mask=None, people=None):
    rng = np.random.default_rng(0)
    parts = Path(f"{path}.partial")
    for k, label in enumerate(labels):
        subject = f"p{k}" if people is None else people[k]
        record = Record(id=f"v{k:03d}", dataset="made", subject=subject, label=label)
        image = rng.normal(size=(1, 6, 8, 8)).astype(np.float32) + float(
            label if isinstance(label, float) else 0
        )
        write_part(parts, record.id, record, image, mask=mask)
    assemble(parts, path, {}, [])
    return str(path)


def test_classes_end_to_end(cache, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["linear-probe", SPEC, "--data", "phantoms:24", "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    for words in (
        "linear-probe/classes v1 on phantoms",
        "5 untrained seeds, mean ± sd",
        "volume only",
        "shape features",
        "pooled voxels",
        "No interval is given, because class 1 has 2 test subjects and 5 of each class are needed; "
        "--folds 5 tests on every subject.",
        "auc [95 %]",
    ):
        assert words in shown.out
    found = records(out)
    assert len(found) == 8
    assert {r.contestant["kind"] for r in found} == {"untrained", "trivial"}
    assert len({r.contestant["digest"] for r in found}) == 8
    for result in found:
        assert result.main == "auc" and set(result.scores) == {"auc", "accuracy", "balanced_accuracy"}
        assert np.isnan(result.intervals["auc"]).all()
        assert len(result.predictions) == result.split["test"]["volumes"]
        assert all(abs(sum(row["probability"]) - 1) < 1e-9 for row in result.predictions)
        clean = {"seen_test_subjects": 0, "seen_test_volumes": 0, "saw_labels": False, "ranked": True}
        assert result.flags == clean
    assert len({r.split_digest for r in found}) == 1
    picture = Path(re.search(r"picture: (.+)", shown.out)[1])
    assert picture.read_bytes().startswith(b"\x89PNG")
    # A second call finds everything and changes nothing.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert main([*arguments, "--recalibrate", "no"]) == 0
    again = capsys.readouterr()
    assert again.err.count("found in") == 8 and again.out == shown.out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == before


def test_folds_give_the_intervals_that_few_test_subjects_cannot(cache, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["linear-probe", SPEC, "--data", "phantoms:24", "--folds", "5", "--out", str(out)]
    assert main([*arguments, "--untrained", "2", "--recalibrate", "no"]) == 0
    shown = capsys.readouterr().out
    assert "No interval" not in shown and "minimum detectable difference in auc" in shown
    for result in records(out):
        low, high = result.intervals["auc"]
        assert 0 <= low <= result.scores["auc"] <= high <= 1


def test_a_trained_encoder_is_compared_and_flagged_for_a_test_subject_it_saw(trained, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["linear-probe", str(trained), "--data", "phantoms:24", "--out", str(out)]
    assert main([*arguments, "--untrained", "2", "--recalibrate", "both"]) == 0
    shown = capsys.readouterr().out
    assert "saw 1 test subject: not ranked" in shown
    remedy = next(line for line in shown.splitlines() if line.startswith("not ranked: "))
    assert "pretrain on the labelled list itself" in remedy and "column `split`" in remedy
    by_name = {r.contestant["name"]: r for r in records(out)}
    own = by_name[str(trained)]
    assert own.flags["seen_test_subjects"] == 1 and not own.flags["ranked"]
    assert own.contestant["kind"] == "encoder" and own.compute["pretraining"]["steps"] == 12
    assert by_name[f"{trained}, norm recalibrated"].contestant["digest"] != own.contestant["digest"]
    assert by_name["scratch:resnet10:width=8, seed 1"].flags["ranked"]
    row = next(line for line in shown.splitlines() if line.startswith(f"{trained}  "))
    assert re.search(r" [+-]\d\.\d{3}  ", row) and "[" not in row  # two test subjects of a class


def test_masks_end_to_end(cache, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["linear-probe", SPEC, "--data", "phantoms:24", "--out", str(out), "--target", "masks"]
    assert main([*arguments, "--untrained", "1", "--recalibrate", "no", "--samples", "200"]) == 0
    shown = capsys.readouterr().out
    assert "linear-probe/masks" in shown and "intensities and position" in shown
    untrained, trivial = sorted(records(out), key=lambda r: r.contestant["kind"], reverse=True)
    assert untrained.main == "dice" and 0.05 < untrained.scores["dice"] < 1
    assert trivial.contestant["kind"] == "trivial"
    assert set(untrained.predictions[0]["dice"]) == set(untrained.settings["classes"]) - {"0"}
    assert Path(re.search(r"picture: (.+)", shown)[1]).exists()
    assert "minimum detectable difference in dice" in shown


def test_fractions_are_repeated_and_paired(cache, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["linear-probe", SPEC, "--data", "phantoms:24", "--out", str(out), "--recalibrate", "no"]
    assert main([*arguments, "--untrained", "2", "--fractions", "0.5", "1", "--repeats", "3"]) == 0
    found = records(out)
    assert len(found) == 5 * (1 + 3)
    half = [r for r in found if r.fraction == 0.5]
    assert {r.repeat for r in half} == {0, 1, 2}
    assert {r.split["train"]["subjects"] for r in half} == {
        round(0.5 * half[0].split["train"]["of_subjects"])
    }
    assert "mean of 3 nested subsets" in capsys.readouterr().out


def test_cross_validation_predicts_every_subject_once(cache, tmp_path):
    out = tmp_path / "out"
    arguments = ["linear-probe", SPEC, "--data", "phantoms:24", "--out", str(out), "--untrained", "1"]
    assert main([*arguments, "--folds", "3", "--recalibrate", "yes"]) == 0
    for result in records(out):
        ids = [row["id"] for row in result.predictions]
        assert len(ids) == len(set(ids)) == 24
        assert result.split["folds"] == 3


def test_the_remedy_for_a_leak_under_folds_is_another(trained, tmp_path, capsys):
    arguments = [
        "linear-probe",
        str(trained),
        "--data",
        "phantoms:24",
        "--out",
        str(tmp_path),
        "--folds",
        "3",
    ]
    assert main([*arguments, "--untrained", "1", "--recalibrate", "no"]) == 0
    remedy = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("not ranked: "))
    assert "with --folds every labelled subject is tested on" in remedy and "column `split`" not in remedy


@pytest.mark.parametrize(
    ("target", "labels", "main_score"),
    [
        ("auto", [k / 3 + 0.1 for k in range(20)], "r2"),
        ("ordinal", [float(k % 4) for k in range(20)], "spearman"),
    ],
)
def test_values_are_regressed(cache, tmp_path, target, labels, main_score):
    data = a_store(tmp_path / "s.h5", labels)
    arguments = ["linear-probe", SPEC, "--data", data, "--out", str(tmp_path / "out"), "--target", target]
    assert main([*arguments, "--untrained", "1", "--recalibrate", "no"]) == 0
    pooled = next(r for r in records(tmp_path / "out") if r.contestant["name"] == "pooled voxels")
    assert pooled.main == main_score and pooled.scores[main_score] > 0.7  # the label shifts the grey values
    assert {"target", "prediction"} <= set(pooled.predictions[0])


@pytest.mark.parametrize(
    ("labels", "extra", "message"),
    [
        ([None] * 8, [], "neither labels nor masks; write a CSV with the columns path,subject,label"),
        (
            [None] * 8,
            ["--target", "classes"],
            "no volume has a label, which --target classes needs; write a CSV",
        ),
        ([1] * 8, ["--target", "masks"], "no volume has a mask, which --target masks needs; write a CSV"),
        ([1] * 8, [], "all 8 labelled volumes are of class '1': classification needs two classes"),
        ([0, 1], [], "subjects to train on and"),
        (["a", "b"] * 4, ["--target", "real"], "is not a number"),
        ([0, 1] * 4, ["--folds", "9"], "--folds 9: the data has 8 subjects"),
        ([0, 1] * 4, ["--fractions", "1.5"], "--fractions"),
        ([0, 1] * 4, ["--folds", "1"], "--folds: "),
        ([0, 1] * 4, ["--target", "boxes"], "--target: "),
    ],
)
def test_wrong_input_is_one_clear_line(cache, tmp_path, capsys, labels, extra, message):
    data = a_store(tmp_path / "s.h5", labels)
    assert main(["linear-probe", SPEC, "--data", data, "--out", str(tmp_path / "out"), *extra]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("ssl3d")
    assert not (tmp_path / "out").exists()


def test_channels_of_an_untrained_encoder_follow_the_data(cache, tmp_path, capsys):
    parts = tmp_path / "s.h5.partial"
    rng = np.random.default_rng(0)
    for k in range(20):
        record = Record(id=f"v{k}", dataset="made", subject=f"p{k}", label=k % 2, channels=("t1", "t2"))
        write_part(parts, record.id, record, rng.normal(size=(2, 4, 8, 8)).astype(np.float32))
    assemble(parts, tmp_path / "s.h5", {}, [])
    arguments = ["--data", str(tmp_path / "s.h5"), "--out", str(tmp_path / "out"), "--untrained", "1"]
    assert main(["linear-probe", f"{SPEC}:in_channels=3", *arguments]) == 2
    assert "takes 3 channels, but the data has 2" in capsys.readouterr().err
    assert main(["linear-probe", SPEC, *arguments, "--recalibrate", "no"]) == 0
    assert "in_channels=2" in capsys.readouterr().out


def test_uneven_subjects_cannot_be_put_side_by_side(cache, tmp_path, capsys):
    data = a_store(tmp_path / "s.h5", [0, 1] * 4, people=["a", "b", "c", "d", "e", "f", "e", "f"])
    arguments = ["linear-probe", SPEC, "--data", data, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--pool-subject", "concat"]) == 2
    assert "subjects have 1 to 2 volumes" in capsys.readouterr().err


def test_volumes_without_a_label_are_left_out_and_counted(cache, tmp_path, capsys):
    data = a_store(tmp_path / "s.h5", [None, None, *[0, 1] * 10])
    arguments = ["linear-probe", SPEC, "--data", data, "--out", str(tmp_path / "out"), "--untrained", "1"]
    assert main([*arguments, "--recalibrate", "no"]) == 0
    assert "2 of 22 volumes have no classes target and are left out" in capsys.readouterr().err


def test_records_are_plain_json(cache, tmp_path):
    data = a_store(tmp_path / "s.h5", [0, 1] * 10)
    out = tmp_path / "out"
    assert main(["linear-probe", SPEC, "--data", data, "--out", str(out), "--untrained", "1"]) == 0
    content = json.loads(next(out.glob("scratch*.json")).read_text(encoding="utf-8"))
    assert content["dataset"] == ["made"] and content["contestant"]["architecture"]["name"] == "resnet10"
    assert str(tmp_path) not in json.dumps(content)  # no machine's paths
