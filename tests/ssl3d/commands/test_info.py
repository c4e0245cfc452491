"""`ssl3d info` of stores, shards, runs, encoders, scans, and of what is none of these."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ssl3d.cli import main
from ssl3d.data.preparation.prepare import PrepareOptions, prepare


@pytest.fixture
def store(scans, tmp_path):
    source = tmp_path / "d"
    for i in range(3):
        scans.nifti(source / f"p{i}.nii.gz", scans.body(seed=i))
    (source / "bad.nii.gz").write_bytes(b"")
    (source / "labels.csv").write_text(
        "path,label,split\np0.nii.gz,ill,train\np1.nii.gz,well,test\n", encoding="utf-8"
    )
    prepare(PrepareOptions((str(source),), str(tmp_path / "s.h5"), workers=0))
    return tmp_path / "s.h5"


def shown(capsys, *words):
    capsys.readouterr()
    assert main(["info", *map(str, words)]) == 0
    return capsys.readouterr().out


def as_json(capsys, path):
    return json.loads(shown(capsys, path, "--json"))


def test_store(store, capsys):
    info = as_json(capsys, store)
    assert (info["volumes"], info["subjects"], info["rejected"]) == (3, 3, 1)
    assert info["rejected_files"] == [{"path": "bad.nii.gz", "reason": "empty file"}]
    text = shown(capsys, store)
    for words in (
        "3 volumes of 3 subjects",
        "1 rejected",
        "16 x 14 x 12",
        "ill 1, well 1",
        "bad.nii.gz: empty file",
    ):
        assert words in text


def test_measured_labels_are_no_classes(scans, tmp_path, capsys):
    for name, values in (("real", ["0.5", "2", "", "4.25"]), ("whole", ["0", "1", "1", ""]),
                         ("many", [str(i) for i in range(60)])):  # fmt: skip
        folder = tmp_path / name
        lines = ["path,label"]
        for i, value in enumerate(values):
            scans.nifti(folder / f"p{i}.nii.gz", scans.body((6, 6, 6), seed=i))
            lines.append(f"p{i}.nii.gz,{value}")
        (folder / "l.csv").write_text("\n".join(lines), encoding="utf-8")
        prepare(PrepareOptions((str(folder / "l.csv"),), str(tmp_path / f"{name}.h5"), workers=0))
    text = shown(capsys, tmp_path / "real.h5")
    assert "  labels: 3 real values, 0.5 to 4.25, median 2\n" in text and "classes" not in text
    text = shown(capsys, tmp_path / "whole.h5")
    assert "  classes: 0 1, 1 2\n" in text and "labels:" not in text
    assert "  labels: 60 whole numbers, 60 different, 0 to 59, median 29.5\n" in shown(
        capsys, tmp_path / "many.h5"
    )
    assert as_json(capsys, tmp_path / "real.h5")["stores"][0]["datasets"]["real"]["values"]["count"] == 3


def test_masks_that_do_not_fit_their_scans_are_named(scans, tmp_path, capsys):
    shape, affine = (12, 14, 16), np.diag([1.0, 1, 1, 1])
    mask = np.zeros(shape, np.uint8)
    mask[4:8, 4:8, 4:8] = 1
    for i in range(5):  # mirrored, as far as the headers know
        scans.nifti(tmp_path / "d" / f"m{i}.nii.gz", scans.body(shape, i), np.diag([-1.0, 1, 1, 1]))
        scans.nifti(tmp_path / "d" / f"m{i}_seg.nii.gz", mask, affine)
    scans.nifti(tmp_path / "d" / "r.nii.gz", scans.body(shape), affine)
    scans.nifti(tmp_path / "d" / "r_seg.nii.gz", mask[:-1], affine)
    scans.nifti(tmp_path / "d" / "good.nii.gz", scans.body(shape), affine)
    scans.nifti(tmp_path / "d" / "good_seg.nii.gz", mask, affine)
    lines = [
        "5 masks placed elsewhere than the scan by its header, taken voxel by voxel all the same: "
        "m0.nii.gz, m1.nii.gz, m2.nii.gz and 2 more",
        "1 mask of another grid than the scan, resampled to it: r.nii.gz",
    ]
    words = ["prepare", str(tmp_path / "d"), "--masks", "seg", "--out", str(tmp_path / "s.h5"),
             "--workers", "0"]  # fmt: skip
    for _ in range(2):  # made, and found made
        assert main(words) == 0
        assert capsys.readouterr().out.splitlines()[-2:] == lines
    said = shown(capsys, tmp_path / "s.h5")
    assert all(f"\n  {line}\n" in said for line in lines)
    assert len(as_json(capsys, tmp_path / "s.h5")["stores"][0]["odd_masks"]["elsewhere"]) == 5


def test_json_flag_may_come_first(store, capsys):
    assert json.loads(shown(capsys, "--json", store))["volumes"] == 3


def test_folder_of_shards_is_summed(scans, tmp_path, capsys):
    for i in range(8):
        scans.nifti(tmp_path / "d" / f"p{i}.nii.gz", scans.body(seed=i))
    for part in ("1/2", "2/2"):
        prepare(PrepareOptions((str(tmp_path / "d"),), str(tmp_path / "x" / "s.h5"), part=part, workers=0))
    info = as_json(capsys, tmp_path / "x")
    assert (info["volumes"], len(info["stores"])) == (8, 2)
    assert "in 2 stores" in shown(capsys, tmp_path / "x")


def test_scan_and_dicom_folder(scans, tmp_path, capsys):
    affine = np.diag([1.0, 2, 3, 1])
    scans.nifti(tmp_path / "a.nii.gz", scans.body(), affine)
    info = as_json(capsys, tmp_path / "a.nii.gz")
    assert (info["volumes"], info["rejected"], info["spacing"]) == (1, 0, [3, 2, 1])
    assert info["orientation"] == "SAR"
    assert info["normalize"] == "mr"
    assert "16 x 14 x 12 voxels" in shown(capsys, tmp_path / "a.nii.gz")
    scans.dicom(tmp_path / "dicom", scans.body((8, 9, 5)), "1.2.3.4", modality="CT")
    info = as_json(capsys, tmp_path / "dicom")
    assert (info["kind"], info["modality"], info["files"], info["shape"]) == ("scan", "CT", 5, [1, 5, 9, 8])


def test_folder_of_scans_is_counted(scans, tmp_path, capsys):
    for name in ("a", "b", "b_mask"):
        scans.nifti(tmp_path / f"{name}.nii.gz", scans.body())
    info = as_json(capsys, tmp_path)
    assert (info["kind"], info["volumes"], info["rejected"]) == ("scans", 2, 0)
    assert "b_mask.nii.gz" in shown(capsys, tmp_path)


def test_encoder_and_run(tmp_path, capsys):
    from ssl3d.checkpoint.encoders import save_encoder
    from ssl3d.specs import encoder_from

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("proxy: [sorting]\nsteps: 5\n", encoding="utf-8")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo', encoding="utf-8"
    )
    info = as_json(capsys, run)
    assert (info["kind"], info["finished"], info["steps_logged"], info["last"]["loss"]) == (
        "run",
        False,
        2,
        1.5,
    )
    assert "--resume" in shown(capsys, run)
    encoder = encoder_from("scratch:resnet10:acs:width=4")
    save_encoder(encoder, run / "encoder", {"steps": 5, "identities": ["a" * 16, "b" * 16]})
    info = as_json(capsys, run / "encoder")
    assert info["kind"] == "encoder"
    assert info["card"]["architecture"] == "resnet10"
    assert info["card"]["identities"] == 2
    assert as_json(capsys, run)["finished"]
    assert "architecture: resnet10" in shown(capsys, run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "no such file"),
        ("a.nii.gz", b"", "empty file"),
        ("a.nii.gz", b"rubbish" * 99, "unreadable"),
        ("s.h5", b"rubbish" * 99, "not an HDF5 file"),
        ("encoder.json", b"{", "not JSON"),
        ("x.csv", b"a,b\n", "no column `path`"),
    ],
)
def test_useless_input_is_one_line_and_status_two(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["info", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_truncated_store_is_one_line(store, capsys):
    store.write_bytes(store.read_bytes()[:5000])
    assert main(["info", str(store)]) == 2
    assert "cut short" in capsys.readouterr().err
    assert main(["info", str(store.parent / "s.h5")]) == 2


MADE = Path(__file__).parents[2] / "made_before"


def test_an_encoder_is_told_shortly(capsys):
    place = MADE / "encoders" / "intra_inter"
    text = shown(capsys, place)
    assert "proxies: intra_inter" in text and "subjects seen: 7" in text and "labels seen: no" in text
    assert "base64" not in text and len(text.splitlines()) < 24
    assert "base64" in as_json(capsys, place)["card"]["volumes_seen"]


@pytest.mark.parametrize(
    ("name", "tables"), [("results/knn", 1), ("results/segmentation", 1), ("board", 3)]
)
def test_results_tuned_folders_and_boards_print_their_tables(capsys, name, tables):
    place = MADE / name
    info = as_json(capsys, place)
    assert info["kind"] == "results" and len(info["tables"]) == tables
    paths = [path for path in place.rglob("*.json") if re.fullmatch(r".+-[0-9a-f]{8}\.json", path.name)]
    said = {json.loads(p.read_text(encoding="utf-8"))["contestant"]["name"] for p in paths}
    assert {row["contestant"] for table in info["tables"] for row in table["rows"]} == said
    assert info["records"] == len(paths) and not info["refused"]
    text = shown(capsys, place)
    for table in info["tables"]:
        assert f"people: {table['task'].replace('/', ', ')}" in text and table["title"] in text
        values = [row["scores"][table["main"]] for row in table["rows"]]
        assert values == sorted(values, reverse=True) and f"{values[0]:.3f}" in text
    assert f"ssl3d leaderboard report {place}" in text


def test_a_report_prints_the_rows_of_its_tables(capsys, tmp_path):
    assert main(["leaderboard", "report", str(MADE / "board"), "--out", str(tmp_path / "report")]) == 0
    info = as_json(capsys, tmp_path / "report")
    with (tmp_path / "report" / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert info["kind"] == "report"
    assert [row["title"] for same in info["tables"].values() for row in same] == [r["title"] for r in rows]
    text = shown(capsys, tmp_path / "report")
    for row in rows:
        assert any(
            row["title"] in line and f"{float(row['value']):.3f}" in line for line in text.splitlines()
        )
    (tmp_path / "report" / "scores.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    assert main(["info", str(tmp_path / "report")]) == 2
    assert "is not what ssl3d leaderboard report writes" in capsys.readouterr().err


def test_predictions_and_exports_say_what_they_are(capsys, tmp_path):
    predicted, exported = tmp_path / "predicted", tmp_path / "exported"
    for folder in (predicted, exported):
        folder.mkdir()
    about = {
        "task": "finetune-segmentation/masks",
        "models": [{"folder": "tuned/models/a"}],
        "data": ["new"],
        "labels": {"1": "liver"},
        "predicted": 3,
        "set_aside": 1,
        "of_training_subjects": 2,
    }
    (predicted / "predict.json").write_text(json.dumps(about), encoding="utf-8")
    (predicted / "predictions.csv").write_text("id,file\na,a.nii.gz\n", encoding="utf-8")
    assert as_json(capsys, predicted)["kind"] == "predictions"
    text = shown(capsys, predicted)
    for words in ("3 volumes, 1 scan set aside", "tuned/models/a", "1 liver", "2 volumes are of subjects"):
        assert words in text
    about = {"format": "onnx", "largest_difference": 8.3e-7, "card": {"architecture": "resnet10"},
             "input": {"axes": "batch, channel", "shape": [None, 1]}}  # fmt: skip
    (exported / "export.json").write_text(json.dumps(about), encoding="utf-8")
    (exported / "model.onnx").write_bytes(bytes(2000))
    assert as_json(capsys, exported)["files"] == {"model.onnx": 2000}
    text = shown(capsys, exported)
    for words in ("format onnx", "model.onnx  2 kB", "any x 1", "encoder: resnet10", "8.3e-07"):
        assert words in text
    for path in (predicted / "predict.json", exported / "export.json"):
        path.write_text("[", encoding="utf-8")
        assert main(["info", str(path.parent)]) != 0
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and path.name in said and "write it again" in said


def test_a_folder_of_odd_records_names_them(capsys, tmp_path):
    for number, path in enumerate(sorted((MADE / "results" / "knn").glob("*.json"))):
        shutil.copy(path, tmp_path)
        if number == 0:
            (tmp_path / path.name).write_text('{"task": 1}', encoding="utf-8")
    info = as_json(capsys, tmp_path)
    assert len(info["refused"]) == 1 and "not a result record" in info["refused"][0]["reason"]
    assert "refused" in shown(capsys, tmp_path)
