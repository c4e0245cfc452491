"""Detection as a downstream task: objects, crops, windows, scores, files."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl3d.api import DataError, numpy_rng, one_group, open_data, phantom_store
from ssl3d.data.scans.boxes import around_mask
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.detection.files import to_mm
from ssl3d.detection.two_stage2d import Detection as Seen
from ssl3d.encoders.resnet import ResNet10
from ssl3d_benchmarks.finetune.detection.pictures import froc_picture
from ssl3d_benchmarks.finetune.detection.task import Detection, DetectionConfig

SMALL = {"channels": 8, "patch": (16, 16, 16), "zoom": 0.0, "intensity": 0.0}


def a_store(path, volumes, **known):
    """Writes (subject, image, mask or None, boxes or None, labels) to a store."""
    for number, (subject, image, mask, boxes, labels) in enumerate(volumes):
        record = Record(
            id=f"v{number:03d}", dataset="made", subject=subject, spacing=(2.0, 1.0, 1.0), **known
        )
        write_part(Path(f"{path}.partial"), record.id, record, np.float32(image)[None], mask, boxes, labels)
    assemble(Path(f"{path}.partial"), path, {"box_labels": {"made": {"3": "large"}}}, [])
    return open_data([path])


def blocks(n=10, shape=(40, 36, 44), seed=0):
    """Dark volumes with two bright blocks, a small one of class 1 and a large one of class 3."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        image = rng.normal(size=shape) * 0.05
        mask, boxes = np.zeros(shape, np.int64), []
        for value, side, corner in ((1, 5, 2), (3, 9, 22)):
            low = [0 if n == 1 else int(corner + rng.integers(0, 6)) for n in shape]
            high = [min(a + side, m) for a, m in zip(low, shape, strict=True)]
            boxes.append([*low, *high])
            cut = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            image[cut], mask[cut] = 1.0 + 0.5 * value, value
        if number == 0:  # nothing to be found
            boxes, image, mask = [], rng.normal(size=shape) * 0.05, mask * 0
        array = np.array(boxes, np.float32).reshape(-1, 6)
        yield f"p{number}", image, mask, array, np.array([1, 3] if boxes else [], np.int64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return a_store(tmp_path_factory.mktemp("blocks") / "blocks.h5", blocks())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return a_store(tmp_path_factory.mktemp("images") / "images.h5", blocks(shape=(1, 40, 40)))


def encoder():
    torch.manual_seed(0)
    return ResNet10(ResNet10.Config(width=4))


def task_of(data, **options):
    return Detection(DetectionConfig(**{**SMALL, **options}), data)


class Told(torch.nn.Module):
    """Sees bright components: what a perfect detector would say of a window, and nothing beyond it."""

    def __init__(self, wrong=0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.wrong = wrong

    def detect(self, images):
        found = []
        for image in images:
            small, large = image[0] > 0.75, image[0] > 2.0
            mask = (small.long() + large.long()).numpy()
            boxes, values = around_mask(mask, 1)
            scores = [0.9] * len(boxes)
            noise = [[0.0, 1, 1, 1, 3, 3]] * self.wrong
            joined = torch.tensor([*boxes.tolist(), *noise]).reshape(-1, 6)
            labels = torch.tensor([*(values - 1), *[0] * self.wrong], dtype=torch.long)
            found.append(Seen(joined, torch.tensor([*scores, *[0.5] * self.wrong]), labels))
        return found


def rows_of(task, model, data):
    with torch.no_grad():
        return [
            {"dataset": v.dataset, "subject": v.subject, "id": v.id, **task.predict(model, v)} for v in data
        ]


def scores(task, rows):
    clusters, functions = task.score_functions(rows)
    return {name: float(f(np.ones((1, len(clusters))))[0]) for name, f in functions.items()}


# Objects ------------------------------------------------------------------------------------------


def test_objects_are_the_stored_boxes_with_their_classes(data):
    task = task_of(data)
    assert task.classes == ("1", "large") and task.values == (1, 3)
    boxes, labels = task.objects[data[1].index]
    np.testing.assert_array_equal(boxes, data[1].boxes)
    assert labels.tolist() == [0, 1]
    assert len(task.objects[data[0].index].boxes) == 0


def test_objects_are_the_components_of_the_masks(data):
    stored, masks = task_of(data), task_of(data, boxes="masks")
    for volume in data:
        np.testing.assert_array_equal(stored.objects[volume.index].boxes, masks.objects[volume.index].boxes)
    large = task_of(data, boxes="masks", min_voxels=200, one_class=True)
    assert large.classes == ("object",)
    assert all(len(large.objects[volume.index].boxes) <= 1 for volume in data)


def test_one_class_counts_everything_alike(data):
    task = task_of(data, one_class=True)
    assert task.objects[data[1].index].labels.tolist() == [0, 0]


def test_data_without_objects_is_refused_by_name(tmp_path):
    empty = np.zeros((0, 6), np.float32)
    volumes = [("p0", np.ones((8, 8, 8)), np.zeros((8, 8, 8), np.int64), empty, np.zeros(0, np.int64))]
    made = a_store(tmp_path / "empty.h5", volumes)
    with pytest.raises(DataError, match="hold no object"):
        task_of(made)
    with pytest.raises(DataError, match="no component of 8 voxels"):
        task_of(made, boxes="masks")


def test_data_without_boxes_is_refused_with_a_hint(tmp_path):
    made = a_store(tmp_path / "none.h5", [("p0", np.ones((8, 8, 8)), np.ones((8, 8, 8), int), None, None)])
    with pytest.raises(DataError, match=r"has a list of boxes; use --detection[.]boxes masks"):
        Detection.known(DetectionConfig(), made)
    assert Detection.known(DetectionConfig(boxes="masks"), made).tolist() == [True]


def test_the_2d_detector_takes_images_only(data):
    with pytest.raises(DataError, match="10 of 10 volumes have several slices"):
        task_of(data, model="faster-rcnn-2d")


# Training and prediction --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["retinanet", "faster-rcnn", "faster-rcnn-2d"])
@pytest.mark.parametrize("flat", [False, True], ids=["volumes", "images"])
def test_loss_has_gradients_and_predictions_are_json(kind, flat, data, images):
    if kind == "retinanet":
        pytest.importorskip("monai")
    if kind == "faster-rcnn-2d" and not flat:
        pytest.skip("takes images")
    some = images if flat else data
    task = pickle.loads(pickle.dumps(task_of(some, model=kind, patch=(32, 32, 32))))
    model = task.model(encoder(), some[:5])
    task.start(model, some[:5])
    examples = [task.draw(volume, numpy_rng(n)) for n, volume in enumerate(some[:4])]
    batch = {name: torch.stack([one[name] for one in examples]) for name in examples[0]}
    loss, values = task.loss(model, batch, one_group(0, 4))
    assert loss.isfinite() and all(value.isfinite() for value in values.values())
    loss.backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    model.eval()
    rows = rows_of(task, model, some[:3])
    assert json.loads(json.dumps(rows)) == rows
    found = scores(task, rows)
    assert {"cpm", "froc_0.125", "froc_8", "ap_0.1", "ap_0.5", "ap_0.1_large"} <= set(found)


def test_anchors_follow_the_training_subjects(data):
    task = task_of(data, model="faster-rcnn", one_class=True)
    model = task.model(encoder(), data)
    before = model.shapes.clone()
    task.objects[data[1].index] = task.objects[data[1].index]._replace(
        boxes=np.array([[1, 1, 1, 7, 8, 9]], np.float32)
    )
    task.start(model, data[1:2])
    assert not torch.equal(before, model.shapes)
    assert (model.shapes - torch.tensor([6.0, 7, 8])).abs().amax(dim=2).min() < 1e-4


@pytest.mark.parametrize("kind", ["retinanet", "faster-rcnn", "faster-rcnn-2d"])
def test_boxes_of_others_than_the_training_subjects_change_no_detector(kind, data, images):
    """The levels of the pyramid too: validation and test subjects' boxes are not looked at."""
    if kind == "retinanet":
        pytest.importorskip("monai")
    some = images if kind == "faster-rcnn-2d" else data

    def made():
        torch.manual_seed(0)
        model = task.model(encoder(), some[:5])
        task.start(model, some[:5])
        return getattr(model, "plan", model.config), [b.tolist() for b in model.buffers()]

    task = task_of(some, model=kind)
    before = made()
    for volume in some[5:]:
        boxes = np.array([[0, 0, 0, 1, 1, 1]], np.float32)
        task.objects[volume.index] = task.objects[volume.index]._replace(boxes=boxes, labels=np.array([0]))
    assert made() == before
    task.objects[some[1].index] = task.objects[some[5].index]
    task.objects[some[2].index] = task.objects[some[5].index]
    assert made() != before


def test_training_subjects_without_an_object_are_refused(data):
    with pytest.raises(DataError, match="none of the 1 training volumes has an object"):
        task_of(data).model(encoder(), data[:1])


@pytest.mark.parametrize("merge", ["nms", "clusters"])
@pytest.mark.parametrize("flat", [False, True], ids=["volumes", "images"])
def test_a_perfect_detector_scores_one_through_windows(merge, flat, data, images):
    """The volume is larger than the window: objects lie in several, are cut by some, and count once."""
    some = images if flat else data
    task = task_of(some, merge=merge, patch=(24, 24, 24))
    rows = rows_of(task, Told(), some)
    if merge == "nms":
        for row in rows:
            assert sorted(row["boxes"]) == sorted(row["truth"])
    found = scores(task, rows)
    wanted = ("cpm", "ap_0.1", "ap_0.5") if merge == "nms" else ("cpm", "ap_0.1")
    assert all(found[name] == 1.0 for name in wanted), found


def test_false_positives_cost_precision_but_not_sensitivity(data):
    task = task_of(data, patch=(48, 48, 48))
    found = scores(task, rows_of(task, Told(wrong=1), data))
    assert found["cpm"] == 1.0 and found["ap_0.5"] == 1.0  # all surer than the false ones
    upside = rows_of(task, Told(wrong=1), data)
    for row in upside:
        row["scores"] = [1.0 - score for score in row["scores"]]
    worse = scores(task, upside)
    assert worse["froc_0.125"] == 0.0 and worse["froc_1"] == 1.0 and worse["ap_0.5"] < 0.8


def test_a_wrong_class_is_no_hit(data):
    task = task_of(data)
    rows = rows_of(task, Told(), data)
    for row in rows:
        row["labels"] = [1 - label for label in row["labels"]]
    assert scores(task, rows)["cpm"] == 0.0


def test_images_are_scored_on_crops_off_the_middle(images):
    task = task_of(images, scored_crop=(24, 24), visible=0.5)
    starts = [task.region(volume)[0] for volume in images]
    assert starts == [task.region(volume)[0] for volume in images]
    assert len(set(starts)) > 5
    for volume in images:
        (_, y, x), size = task.region(volume)
        assert size == (1, 24, 24)
        for box in task.truth(volume).boxes:
            assert y <= box[1] and box[4] <= y + 24 and x <= box[2] and box[5] <= x + 24
    lost = sum(len(task.objects[v.index].boxes) - len(task.truth(v).boxes) for v in images)
    assert lost > 0
    rows = rows_of(task, Told(), images)
    assert all(
        y <= box[1] and box[4] <= y + 24
        for volume, row in zip(images, rows)
        for box in row["boxes"]
        for y in [task.region(volume)[0][1]]
    )


def test_usual_places(data):
    """Where the training volumes have objects, and nothing else: near enough here, useless by the half."""
    task = task_of(data)
    rows = task.predict_trivial("usual places", data[:6], data[6:7], data[6:], 0)
    assert [row["id"] for row in rows] == [volume.id for volume in data[6:]]
    found = scores(task, rows)
    assert 0 < found["cpm"] <= 1
    assert found["ap_0.5"] < found["ap_0.1"]


# Files and pictures -------------------------------------------------------------------------------


def test_boxes_in_mm_by_hand():
    """Spacing 2 x 3 x 4 mm, W to the right from x = 10: voxel i reaches from i - .5 to i + .5."""
    affine = np.array([[0, 0, 4.0, 10], [0, 3, 0, 0], [2, 0, 0, 0], [0, 0, 0, 1]])
    corners = to_mm(affine, np.array([1.0, 2, 3, 4, 5, 6]))
    assert corners.min(axis=0).tolist() == [20, 4.5, 1]
    assert corners.max(axis=0).tolist() == [32, 13.5, 7]


def test_predictions_are_written_in_mm(tmp_path):
    store = phantom_store(2, folder=tmp_path)
    some = open_data([store])
    task = task_of(some, patch=(56, 56, 56))
    volume = next(v for v in some if len(v.boxes))

    class Right(Told):
        def detect(self, images):
            boxes = torch.from_numpy(volume.boxes)
            return [Seen(boxes, torch.full((len(boxes),), 0.9), torch.zeros(len(boxes), dtype=torch.long))]

    path = task.save_prediction(Right(), volume, tmp_path / "out")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["space"] == "RAS+ mm" and written["id"] == volume.id
    truth = sorted(volume.boxes.tolist())
    assert sorted(entry["voxels"] for entry in written["boxes"]) == truth
    for entry in written["boxes"]:
        sides = (np.array(entry["voxels"][3:]) - entry["voxels"][:3]) * volume.spacing
        np.testing.assert_allclose(entry["size"], sides, atol=1e-2)
        np.testing.assert_allclose(entry["box"][3:], sides[::-1], atol=1e-2)  # x y z from D H W
        middle = (np.array(entry["voxels"][3:]) + entry["voxels"][:3]) / 2 - 0.5
        world = np.array(volume.affine) @ [*middle, 1]
        np.testing.assert_allclose(entry["centre"], world[:3], atol=1e-2)
    with path.with_suffix(".csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(volume.boxes)
    assert float(lines[0]["x_mm"]) == written["boxes"][0]["box"][0]


def test_pictures_are_drawn(data, images, tmp_path):
    for number, some in enumerate((data, images)):
        task = task_of(some)
        own = rows_of(task, Told(wrong=1), some[:4])
        own[2] = {**own[2], "boxes": [], "scores": [], "labels": []}  # nothing found: the worst
        figure = task.picture(Told(wrong=1), some[:4], own)
        titles = [panel.get_title() for panel in figure.axes[:2]]
        assert titles[0].startswith("median") and titles[1].startswith("worst\n")
        assert some[2].id[-20:] in titles[1]
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
    from ssl3d_benchmarks.finetune.detection.task import scores_of

    rows = rows_of(task, Told(), images)
    froc_picture({"told": scores_of(rows, 0.1, None)}).savefig(tmp_path / "froc.png")


@pytest.mark.parametrize(
    "options",
    [
        {"model": "yolo"},
        {"boxes": "here"},
        {"merge": "all"},
        {"patch": (0, 8, 8)},
        {"scored_crop": (96, 0)},
        {"min_voxels": 0},
        {"anchors": 0},
        {"cells": 0.0},
        {"overlap": 1.0},
        {"merge_iou": 0.0},
        {"least_score": -0.1},
        {"around": 2.0},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DetectionConfig(**options)


@pytest.mark.long
def test_records_are_reported_with_their_curve(tmp_path):
    from ssl3d.cli import main

    out = tmp_path / "records"
    arguments = ["finetune", "scratch:resnet10:width=4", "--data", "phantoms:12", "--task", "detection"]
    arguments += ["--detection.patch", "16", "16", "16", "--detection.channels", "8", "--out", str(out)]
    arguments += ["--steps", "2", "--batch-size", "2", "--eval-at", "1", "--threads", "1"]
    assert main([*arguments, "--detection.froc_iou", "0.2"]) == 0
    report = ["leaderboard", "report", str(out), "--out", str(tmp_path / "report"), "--resamples", "100"]
    assert main(report) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "No record was refused." in text  # scored anew with the records' own overlap
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "FROC: the share of the objects" in page
