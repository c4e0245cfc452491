"""Cross-validation with an encoder of each fold, which saw none of its test subjects; --part val."""

from pathlib import Path

import numpy as np
import pytest

from ssl3d.api import encoder_from, house_split, identity_hash, open_data, read_result
from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.cli import main
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.training.options import PretrainOptions
from ssl3d.training.selection import select
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.run import make_task
from ssl3d_benchmarks.finetune.segmentation.config import SegmentationConfig

SPEC = "scratch:resnet10:acs:width=4"
SHORT = ["--task", "segmentation", "--steps", "1", "--segmentation.patch", "8", "16", "16",
         "--batch-size", "2", "--segmentation.width", "2", "--no-trivial", "true", "--keep-models", "none",
         "--no-scratch", "true", "--threads", "1"]  # fmt: skip


def a_store(path, names, dataset, unlabelled=()):
    """Noise, whose brightest voxels are the mask."""
    parts = path.with_suffix(".partial")
    for name in names:
        image = np.random.default_rng(ord(name)).normal(size=(1, 8, 16, 16)).astype(np.float32)
        mask = None if name in unlabelled else image[0] > 1
        write_part(parts, name, Record(id=name, dataset=dataset, subject=name), image, mask)
    assemble(parts, path, {}, [])
    return str(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Eleven subjects, nine of them with a mask."""
    return a_store(tmp_path_factory.mktemp("folds") / "made.h5", "kjihgfedcba", "made", unlabelled="cg")


def people_of_folds(store, folds):
    """Subjects that each fold of fine-tuning tests on."""
    options = FinetuneOptions((SPEC,), (store,), task="segmentation", folds=folds)
    split, _ = make_task(options, SegmentationConfig())
    return [set(split.data.subjects[fold.test]) for fold in split.folds]


def encoders(store, folder, shift=0):
    """Save an untrained encoder for each of 3 folds that says it saw all but the subjects tested there."""
    data = open_data([store])
    people = set(data.subjects[data.has_mask])
    (name,) = set(data.datasets)
    for fold, own in enumerate(people_of_folds(store, 3)):
        seen = [identity_hash(name, subject) for subject in sorted(people - own)]
        card = {"identities": seen, "labels_seen": False, "steps": 1, "proxies": {}}
        encoder = encoder_from(SPEC, seed=10 + fold)
        save_encoder(encoder, folder / f"fold{(fold + shift) % 3}" / "encoder", card)
    return f"own={folder}/fold{{fold}}"


def record(out):
    (path,) = Path(out).glob("*.json")
    return read_result(path)


def test_pretraining_leaves_out_whom_a_fold_tests_on(store):
    data = open_data([store])
    folds = people_of_folds(store, 3)
    labelled = set(data.subjects[data.has_mask])
    assert set.union(*folds) == labelled and sum(map(len, folds)) == len(labelled) == 9 < len(data)
    for number, own in enumerate(folds):
        chosen = select(data, "train", 0.0, leave_out=(number, 3))
        assert set(chosen.train.subjects) == set(data.subjects) - own
        assert any(f"all but fold {number} of 3" in note for note in chosen.notes)


def test_a_fold_is_dealt_out_in_each_data_set_by_itself(store, tmp_path):
    more = a_store(tmp_path / "more.h5", "gfedcba", "other")
    both = open_data([store, more])
    for number, (own, theirs) in enumerate(
        zip(people_of_folds(store, 3), people_of_folds(more, 3), strict=True)
    ):
        kept = select(both, "train", 0.0, leave_out=(number, 3)).train
        for name in set(both.datasets):
            away = theirs if name == "other" else own
            here = set(both.subjects[both.datasets == name])
            assert set(kept.subjects[kept.datasets == name]) == here - away


@pytest.mark.parametrize("words", ["5/5", "1", "-1/5", "0/1", "a/b"])
def test_a_fold_that_is_none_is_refused(words):
    with pytest.raises(ValueError, match="must be a fold K/N"):
        PretrainOptions(leave_out=words)


def test_each_fold_starts_from_its_own_encoder_and_nobody_was_seen(store, tmp_path):
    spec = encoders(store, tmp_path)
    command = ["finetune", spec, "--data", store, *SHORT, "--folds", "3", "--lr", "1e-30"]
    assert main([*command, "--out", str(tmp_path / "all")]) == 0
    whole = record(tmp_path / "all")
    assert whole.flags["ranked"] and whole.flags["seen_test_subjects"] == 0
    assert len(whole.contestant["folds"]) == len(set(whole.contestant["folds"])) == 3
    assert len(whole.predictions) == 9
    # One encoder for all folds saw most of the people that are tested.
    assert main([*command[:1], f"one={tmp_path}/fold1", *command[2:], "--out", str(tmp_path / "one")]) == 0
    one = record(tmp_path / "one")
    assert (
        one.flags["seen_test_subjects"] == 9 - len(people_of_folds(store, 3)[1]) and not one.flags["ranked"]
    )
    # What the second fold predicted, with weights that did not move, is the same with either.
    weights = [[fold["weights"] for fold in result.compute["details"]] for result in (whole, one)]
    assert weights[0][1] == weights[1][1] and weights[0][0] != weights[1][0]


def test_encoders_of_the_wrong_folds_are_flagged(store, tmp_path, capsys):
    spec = encoders(store, tmp_path, shift=1)
    command = ["finetune", spec, "--data", store, *SHORT, "--folds", "3", "--out", str(tmp_path / "out")]
    assert main([*command, "--keep-models", "all"]) == 0
    flags = record(tmp_path / "out").flags
    assert flags["seen_test_subjects"] == 9 and not flags["ranked"]
    # Wherever the score is shown: with the records, on their page, and with the model that is kept.
    (model,) = (tmp_path / "out" / "models").iterdir()
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "saw 9 test subjects: not ranked" in capsys.readouterr().out
    assert main(["info", str(model)]) == 0
    assert "do not hold for other people: pretraining saw 9 test subjects" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["view", str(tmp_path / "out"), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "is not ranked, since its pretraining saw 9 test subjects" in text
    assert "no contestant is ranked" in text


def test_an_encoder_of_each_fold_needs_folds(store, tmp_path, capsys):
    spec = encoders(store, tmp_path)
    for command in (["finetune", spec, "--data", store, *SHORT], ["linear-probe", spec, "--data", store]):
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        assert "names an encoder for each fold, which finetune --folds 5 has" in capsys.readouterr().err


def test_validation_subjects_are_scored_and_test_subjects_are_not(store, tmp_path):
    out = tmp_path / "out"
    command = ["finetune", SPEC, "--data", store, *SHORT[:-4], "--threads", "1", "--part", "val"]
    assert main([*command, "--out", str(out)]) == 0
    result = record(out)
    data = open_data([store])
    own = set(data.subjects[(house_split(data) == "val") & data.has_mask])
    assert {row["subject"] for row in result.predictions} == own
    assert result.split["val"]["subjects"] == 0 and "validation subjects scored" in result.split["how"]
    assert result.compute["details"]["validation"] == {"dice": None}  # nobody is left to choose a step on
    assert main([*command[:-2], "--out", str(out)]) == 0
    assert len(list(out.glob("*.json"))) == 2  # another split, another record


def test_part_val_beside_folds_is_refused():
    with pytest.raises(ValueError, match="leave out folds"):
        FinetuneOptions((SPEC,), part="val", folds=3)
