"""Models that fine-tuning keeps: whose, that they predict as they were scored, kills and damage."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ssl3d
from ssl3d.api import (
    AggregatedEncoder,
    AggregatorConfig,
    BoxPrediction,
    LabelPrediction,
    Record,
    SliceAggregator,
    Ssl3dError,
    TrainingError,
    assemble,
    encoder_from,
    identity_hash,
    model_folders,
    open_data,
    phantom_store,
    read_model_card,
    read_result,
    save_model,
    write_part,
)
from ssl3d.cli import main
from ssl3d_benchmarks.finetune.classification import Classification, ClassificationConfig
from ssl3d_benchmarks.finetune.detection.task import Detection, DetectionConfig
from ssl3d_benchmarks.finetune.kept import FinetunedModel
from ssl3d_benchmarks.finetune.segmentation.config import SegmentationConfig
from ssl3d_benchmarks.finetune.segmentation.task import Segmentation

SPEC = "scratch:resnet10:width=4:stem_stride=1"
SHORT = ["--steps", "4", "--batch-size", "2", "--threads", "1", "--no-trivial", "--eval-at", "0.5", "1"]
MASKS = ["--task", "segmentation", "--segmentation.patch", "12", "12", "12", "--segmentation.width", "4"]


def a_store(path, count=14, labels=None, names=None, seed=0):
    """Small noise volumes with a bright box of class 1 and a dark one of class 4, and labels."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % 2 if labels is None else labels[number]
        record = Record(f"v{number:02d}", "made", f"p{number}", label=label, spacing=(2.0, 1.0, 1.0))
        mask = np.zeros((14, 16, 18), np.int64)
        mask[2:8, 2:9, 3:10] = 1
        mask[6:12, 8:14, 8:16] = 4
        image = rng.normal(size=mask.shape) * 0.3 + 2.0 * (mask == 1) - 2.0 * (mask == 4)
        write_part(Path(f"{path}.partial"), record.id, record, np.float32(image)[None], mask=mask)
    settings = {} if names is None else {"mask_labels": {"made": names}}
    assemble(Path(f"{path}.partial"), path, settings, [])
    return str(path)


def the_record(out):
    (path,) = Path(out).glob("*.json")
    return read_result(path)


def finetune(data, out, *words, spec=SPEC):
    return main(["finetune", spec, "--data", data, "--out", str(out), *SHORT, *words])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return a_store(tmp_path_factory.mktemp("data") / "s.h5", names={"1": "anterior", "4": "posterior"})


@pytest.fixture(scope="module")
def segmented(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("masks") / "out"
    assert finetune(store, out, *MASKS) == 0
    return out


@pytest.fixture
def kept(segmented, tmp_path):
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(model_folders(segmented)[0], tmp_path / "model"))


def resigned(folder, **changes):
    """Change the card of a model as somebody would who can compute its digest."""
    card = json.loads((folder / "model.json").read_text()) | changes
    rest = {key: value for key, value in card.items() if key != "digest"}
    card["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / "model.json").write_text(json.dumps(card))


# What is kept ----------------------------------------------------------------------------------------


def test_the_model_predicts_what_the_record_was_scored_on(segmented, store):
    record = the_record(segmented)
    model = ssl3d.load_model(segmented)
    assert isinstance(model, torch.nn.Module) and not model.training
    data = open_data([store])
    places = {name: n for n, name in enumerate(data.ids)}
    assert len(record.predictions) > 1
    for row in record.predictions:
        volume = data[places[row["id"]]]
        mask, truth = model.predict(volume), volume.read_mask().numpy()
        assert mask.shape == truth.shape and mask.dtype == np.uint8
        for name in ("1", "4"):
            predicted, true = mask == int(name), truth == int(name)
            assert row["voxels"][name] == [int(predicted.sum()), int(true.sum())]
            size = int(predicted.sum()) + int(true.sum())
            assert row["dice"][name] == 2 * int((predicted & true).sum()) / size
    assert np.array_equal(model.predict(volume.read()), mask)  # a tensor will do


def test_the_card_says_what_the_model_is(segmented, store, capsys):
    card, record = ssl3d.load_model(segmented).card, the_record(segmented)
    data = open_data([store])
    assert card["classes"] == [
        {"value": 0, "name": "background"},
        {"value": 1, "name": "anterior"},
        {"value": 4, "name": "posterior"},
    ]
    assert card["spacing"]["median"] == [2.0, 1.0, 1.0] and card["channels"] == [["image"]]
    assert card["record"] == {"key": record.key, "main": "dice"}
    assert card["scores"] == record.scores
    assert card["intervals"] == {name: list(ends) for name, ends in record.intervals.items()}
    tested = {identity_hash("made", row["subject"]) for row in record.predictions}
    everyone = {identity_hash(*person) for person in data.identities()}
    assert set(card["training"]["subjects"]) == everyone - tested
    assert card["training"]["step_chosen"] == record.compute["details"]["best_step"]
    assert card["training"]["validation"] == record.compute["details"]["validation"]
    capsys.readouterr()
    assert main(["info", str(segmented / "models" / os.listdir(segmented / "models")[0])]) == 0
    shown = capsys.readouterr().out
    assert "4 posterior" in shown and f"dice: {record.scores['dice']:.4g} [" in shown
    assert "2 x 1 x 1 mm" in shown and "of 11 subjects" in shown


def test_each_fold_has_its_model_that_never_saw_its_test_subjects(store, tmp_path):
    out = tmp_path / "out"
    assert finetune(store, out, "--folds", "3", "--classification.dropout", "0.1") == 0
    record, folders = the_record(out), model_folders(out)
    assert [folder.name for folder in folders] == ["fold-0", "fold-1", "fold-2"]
    data, seen = open_data([store]), 0
    for folder in folders:
        model = ssl3d.load_model(folder)
        own = set(model.card["training"]["subjects"])
        rows = [row for row in record.predictions if identity_hash("made", row["subject"]) not in own]
        for row in rows:
            predicted = model.predict(data[list(data.ids).index(row["id"])])
            assert isinstance(predicted, LabelPrediction) and predicted.names == ("0", "1")
            assert predicted.numbers == pytest.approx(row["probability"], abs=1e-6)
        seen += len(rows)
    assert seen == len(record.predictions) == 14
    with pytest.raises(Ssl3dError, match="3 models, one for each fold"):
        ssl3d.load_model(out)


@pytest.mark.long
def test_of_several_arms_the_best_by_validation_is_kept(store, tmp_path, capsys):
    first = finetune(store, tmp_path / "out", "--seeds", "0", "1", "2", "--fractions", "0.6", "1",
                     "--repeats", "1")  # fmt: skip
    assert first == 0
    records = [read_result(path) for path in (tmp_path / "out").glob("*.json")]
    assert len(records) == 6
    best = max(
        (record for record in records if record.fraction == 1),
        key=lambda record: (record.compute["details"]["validation"]["auc"], Path(record.filename).stem),
    )
    (folder,) = (tmp_path / "out" / "models").iterdir()
    assert read_model_card(folder)["record"]["key"] == best.key
    assert f"model: {folder}" in capsys.readouterr().out
    for words, count in ((["all"], 6), (["none"], 0), ([best.contestant["name"]], 6)):
        out = tmp_path / words[0][:4]
        finetune(store, out, "--seeds", "0", "1", "2", "--fractions", "0.6", "1", "--repeats", "1",
                 "--keep-models", *words)  # fmt: skip
        models = out / "models"
        assert len(list(models.iterdir()) if models.exists() else []) == count
    with pytest.raises(Ssl3dError, match="holds 6 models"):
        model_folders(tmp_path / "all")


@pytest.mark.long
def test_values_and_boxes_are_kept_too(tmp_path):
    data = a_store(tmp_path / "v.h5", labels=[k / 3 for k in range(14)])
    assert finetune(data, tmp_path / "values") == 0
    record, model = the_record(tmp_path / "values"), ssl3d.load_model(tmp_path / "values")
    volumes = open_data([data])
    for row in record.predictions:
        predicted = model.predict(volumes[list(volumes.ids).index(row["id"])])
        assert predicted.names == () and predicted.answer == pytest.approx(row["prediction"], abs=1e-6)
    words = ["--task", "detection", "--detection.boxes", "masks", "--detection.patch", "12", "12", "12"]
    words += ["--detection.channels", "8", "--detection.least-score", "0"]
    for detector in ("retinanet", "faster-rcnn"):
        out = tmp_path / detector
        assert finetune(data, out, *words, "--detection.model", detector) == 0
        record, model = the_record(out), ssl3d.load_model(out)
        for row in record.predictions:
            predicted = model.predict(volumes[list(volumes.ids).index(row["id"])])
            assert isinstance(predicted, BoxPrediction) and predicted.names == ("1", "4")
            assert np.round(predicted.boxes, 2).tolist() == row["boxes"] != []
            assert predicted.labels.tolist() == row["labels"]


def rebuilt(task, model, tmp_path):
    """The model of a task, kept and loaded."""
    encoder = model.encoder
    pool = None
    if isinstance(encoder, AggregatedEncoder):
        pool, encoder = encoder.aggregator.config, encoder.encoder
    card = {
        "benchmark": "finetune",
        "task": {"name": task.name, "target": task.target, "settings": task.settings(),
                 "kept": task.keep(model)},
        "architecture": {"name": "resnet10", "config": vars(encoder.config),
                         "pool": None if pool is None else vars(pool)},
        "channels": [["image"]], "spacing": {"median": [1, 1, 1]}, "orientations": ["SAR"],
        "preprocessing": [], "precision": "32", "classes": [],
    }  # fmt: skip
    return ssl3d.load_model(save_model(model, tmp_path / "kept", card))


@pytest.mark.parametrize(
    "options",
    [
        {"stages": 2, "coarse": (8, 8, 8)},
        {"head": "med3d"},
        {"head": "denseaspp"},
        {"head": "linear", "deep_supervision": False},
        {"slicewise": True, "mirror": True, "flip_axes": (1, 2)},
    ],
    ids=lambda options: next(iter(options.items()))[1],
)
def test_every_kind_of_segmentation_is_built_again(store, tmp_path, options):
    data = open_data([store])
    task = Segmentation(
        SegmentationConfig(**{"patch": (8, 16, 16), "width": 4, "flip_axes": (2,), **options}), data
    )
    torch.manual_seed(1)
    model = task.model(encoder_from(SPEC, seed=3), data).eval()
    again = rebuilt(task, model, tmp_path)
    with torch.inference_mode():
        assert np.array_equal(again.predict(data[0]), np.array(task.values)[task.labels(model, data[0])])
    assert again.can_flip
    prediction = again.infer(data[0])
    whole = torch.cat(list(prediction.slabs), dim=1)
    assert whole.shape == (3, *data[0].shape[1:]) and torch.allclose(whole.sum(dim=0), torch.ones(()))


def test_an_aggregator_and_padding_are_built_again(store, tmp_path):
    data = open_data([store])
    inner = encoder_from(SPEC, seed=3)
    torch.manual_seed(0)
    pooled = AggregatedEncoder(inner, SliceAggregator(AggregatorConfig(features=inner.embed_dim))).eval()
    task = Classification(ClassificationConfig(pad=True, crop=(16, 16, 24), scale="random", flip=0.5), data)
    for encoder in (pooled, inner):
        model = task.model(encoder, data).eval()
        again = rebuilt(task, model, tmp_path)
        with torch.inference_mode():
            row = task.predict(model, data[1])
        assert again.predict(data[1]).numbers == tuple(row["probability"])
        flipped = again.predict(data[1], flip=True).numbers
        assert flipped != tuple(row["probability"]) and sum(flipped) == pytest.approx(1)


def test_a_detector_of_images_is_built_again(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        mask = np.zeros((1, 48, 48), np.int64)
        mask[0, 10:22, 12:30] = 1
        image = rng.normal(size=(1, 1, 48, 48)) + 2 * mask
        record = Record(f"v{number}", "made", f"p{number}")
        write_part(tmp_path / "i.h5.partial", record.id, record, np.float32(image), mask=mask)
    assemble(tmp_path / "i.h5.partial", tmp_path / "i.h5", {}, [])
    data = open_data([tmp_path / "i.h5"])
    config = DetectionConfig(model="faster-rcnn-2d", boxes="masks", patch=(1, 32, 32), channels=8,
                             least_score=0.0)  # fmt: skip
    task = Detection(config, data)
    torch.manual_seed(0)
    model = task.model(encoder_from(SPEC, seed=3), data).eval()
    again = rebuilt(task, model, tmp_path)
    with torch.inference_mode():
        boxes = task.detect(model, data[0]).boxes
    assert len(boxes) and np.array_equal(again.predict(data[0]).boxes, boxes)


def test_a_phantoms_box_is_predicted_on_two_stages(tmp_path):
    data = open_data([phantom_store(2, shape=(20, 24, 24), folder=tmp_path)])
    task = Segmentation(SegmentationConfig(patch=(8, 8, 8), width=4, stages=2, coarse=(8, 8, 8)), data)
    model = task.model(encoder_from(SPEC, seed=3), data).eval()
    (slabs, region), shape = task._slabs(model, data[0]), data[0].shape[1:]
    with torch.inference_mode():
        whole = torch.cat(list(slabs), dim=1)
    assert whole.shape[1:] == shape
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[tuple(slice(a, b) for a, b in zip(region[:3], region[3:], strict=True))] = True
    assert (whole[0][~inside] == 1).all() and not (whole[0][inside] == 1).all()


# Kills and full disks --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from ssl3d.cli import main
from ssl3d_benchmarks.finetune import job, kept
home = {where!r}
def killed(*words, **more):
    os.kill(os.getpid(), signal.SIGKILL)
if home == "before":
    kept.save_model = killed
elif home == "after":
    whole = kept.save_model
    def half(*words, **more):
        whole(*words, **more)
        killed()
    kept.save_model = half
else:
    job.write_result = killed
main(sys.argv[1:])
"""


@pytest.mark.long
@pytest.mark.parametrize("where", ["before", "after", "record"])
def test_a_kill_between_training_and_keeping_loses_nothing(store, segmented, tmp_path, where, capfd):
    out = tmp_path / "out"
    words = ["finetune", SPEC, "--data", store, "--out", str(out), *SHORT, *MASKS]
    done = subprocess.run([sys.executable, "-c", KILLED.format(where=where), *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL and not list(out.glob("*.json"))
    capfd.readouterr()
    assert finetune(store, out, *MASKS) == 0
    assert "step 2/4" not in capfd.readouterr().err  # nothing was trained again
    (mine,), (theirs,) = model_folders(out), model_folders(segmented)
    same, other = load_file(mine / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert same.keys() == other.keys() and all(torch.equal(same[key], other[key]) for key in same)
    assert the_record(out).predictions == the_record(segmented).predictions
    assert not list((out / ".jobs").iterdir())
    assert len(list(out.rglob("*.safetensors"))) == 1  # and nothing is there twice


def test_a_full_disk_is_told_and_the_training_stays(store, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    from ssl3d_benchmarks.finetune import kept

    whole = kept.save_model

    def on_a_full_disk(*words):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return whole(*words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(signal, "SIGXFSZ", signal.SIGXFSZ)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error then, as of a full disk
    monkeypatch.setattr(kept, "save_model", on_a_full_disk)
    try:
        assert finetune(store, out, *MASKS) == 1
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert "the model cannot be written" in capsys.readouterr().err
    assert not list(out.glob("*.json")) and not (out / "models").exists()
    monkeypatch.undo()
    assert finetune(store, out, *MASKS) == 0
    assert len(model_folders(out)) == 1


# Damage ----------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_neither_kept_nor_loaded(kept, tmp_path):
    model = ssl3d.load_model(kept)
    state = load_file(kept / "model.safetensors")
    name = next(key for key, value in state.items() if value.is_floating_point() and value.numel() > 3)
    for value in (float("nan"), float("inf")):
        state[name].view(-1)[1] = value
        model.network.load_state_dict(state)
        with pytest.raises(TrainingError, match=f"1 of the .* weights of {name} are NaN or infinite"):
            save_model(model.network, tmp_path / "new", model.card)
        assert not (tmp_path / "new").exists()
        save_file(state, kept / "model.safetensors")
        resigned(kept, sha256=hashlib.sha256((kept / "model.safetensors").read_bytes()).hexdigest())
        with pytest.raises(Ssl3dError, match="are NaN or infinite"):
            ssl3d.load_model(kept)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "truncated or not JSON"),
        (lambda text: "[]", "is no card of a model"),
        (lambda text: text.replace('"value": 4', '"value": 3'), "was changed after it was written"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "written by a newer ssl3d"),
        (lambda text: text.replace('"task"', '"tusk"'), "'task' is missing"),
        (lambda text: text.replace("2.0", "1.0", 1), "was changed after it was written"),
    ],
)
def test_a_damaged_card_is_one_line(kept, damage, message, capsys):
    path = kept / "model.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(Ssl3dError, match=message) as error:
        ssl3d.load_model(kept)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert main(["info", str(kept)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "knn"}, "the benchmark knn keeps no models"),
        ({"benchmark": "no_such"}, "unknown benchmark"),
        ({"task": {"name": "no_such"}}, "no_such is none of"),
        ({"task": {"name": "segmentation"}}, "no model can be built of it"),
        ({"architecture": {"name": "no_such"}}, "unknown encoder"),
        (
            {"architecture": {"name": "resnet10", "config": {"width": "wide"}}},
            "width is 'wide'; expected int",
        ),
        ({"architecture": {"name": "resnet10", "config": {"breadth": 1}}}, "unknown option breadth"),
        ({"architecture": {"name": "resnet10", "config": {"width": 8}}}, "expects|missing"),
    ],
)
def test_a_card_that_fits_no_network_is_one_line(kept, changes, message):
    resigned(kept, **changes)
    with pytest.raises(Ssl3dError, match=message) as error:
        ssl3d.load_model(kept)
    assert "\n" not in str(error.value)


def test_a_lying_header_of_safetensors_is_refused(kept):
    path = kept / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(key for key in header if key != "__metadata__")

    def written(changed, length=None, rest=content[8 + size :]):
        text = json.dumps(changed).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + rest

    far = {**header[name], "data_offsets": [0, 10**12]}
    shape = {**header[name], "shape": [2**40, 2**40]}
    lies = [
        written({**header, name: far}),
        written({**header, name: shape}),
        written(header, length=2**62),
        written(header, length=3),
        written({**header, name: {**header[name], "dtype": "F63"}}),
        written({key: value for key, value in header.items() if key != name}),
        content[: len(content) // 2],
        b"",
    ]
    for lie in lies:
        path.write_bytes(lie)
        with pytest.raises(Ssl3dError, match=r"sha256 differs"):
            ssl3d.load_model(kept)
        resigned(kept, sha256=hashlib.sha256(lie).hexdigest())  # even where the digest lies too
        with pytest.raises(Ssl3dError, match=r"not safetensors|missing|unknown"):
            ssl3d.load_model(kept)
        resigned(kept, sha256=hashlib.sha256(content).hexdigest())
    path.unlink()
    with pytest.raises(Ssl3dError, match=r"No such file"):
        ssl3d.load_model(kept)


def test_weights_of_another_type_or_shape_are_refused(kept):
    state = load_file(kept / "model.safetensors")
    name = next(key for key, value in state.items() if value.dtype == torch.float32)
    for changed, message in (
        (state[name].double(), "is torch.float64, the model expects torch.float32"),
        (state[name][:1].contiguous(), "has shape"),
    ):
        save_file({**state, name: changed}, kept / "model.safetensors")
        resigned(kept, sha256=hashlib.sha256((kept / "model.safetensors").read_bytes()).hexdigest())
        with pytest.raises(Ssl3dError, match=message):
            ssl3d.load_model(kept)


def test_where_no_model_is(tmp_path, segmented):
    with pytest.raises(Ssl3dError, match="no such file"):
        ssl3d.load_model(tmp_path / "nowhere")
    with pytest.raises(Ssl3dError, match="holds no model"):
        ssl3d.load_model(tmp_path)
    model = ssl3d.load_model(segmented)
    assert isinstance(model, FinetunedModel)
    with pytest.raises(ValueError, match="2 channels; the model takes 1"):
        model.predict(torch.zeros(2, 8, 8, 8))
    with pytest.raises(ValueError, match="a volume is"):
        model.predict(torch.zeros(8, 8, 8))
