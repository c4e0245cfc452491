"""The plan of a segmentation against rules worked out by hand, and its way into training and records."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl3d.api import encoder_from, open_data, phantom_store
from ssl3d.cli import main
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d_benchmarks.finetune import train as finetune_train
from ssl3d_benchmarks.finetune.benchmark import Finetune
from ssl3d_benchmarks.finetune.options import FinetuneOptions
from ssl3d_benchmarks.finetune.recipe import planned, resolve
from ssl3d_benchmarks.finetune.segmentation.config import SegmentationConfig
from ssl3d_benchmarks.finetune.segmentation.plan import Fingerprint, fixed_sides, patch_of, plan_by_rule
from ssl3d_benchmarks.finetune.segmentation.task import Segmentation
from ssl3d_benchmarks.finetune.train import update_average

# Count, shape, spacing, classes -> what the rules of the docstring give, worked out by hand.
PLANS = {
    # 40 * 56 * 40 = 89,600 voxels, one of which is within 5 * 2^15; 750 * 27^(1/3) = 2,250 steps.
    "whole volumes": (
        (27, (36, 50, 35), (1, 1, 1), 3),
        {"slicewise": False, "patch": (40, 56, 40), "axes": (0, 1, 2), "batch_dice": False, "width": 16},
        (2, 2250),
    ),
    # 176^2 = 30,976 <= 2^15 < 184^2; 5 * 2^15 // 30,976 = 5; 750 * 2 = 1,500.
    "thick slices": (
        (8, (10, 192, 192), (10, 1.5, 1.5), 4),
        {"slicewise": True, "patch": (1, 176, 176), "axes": (1, 2), "batch_dice": True, "width": 16},
        (5, 1500),
    ),
    # A ratio of 3 itself is not thick. An edge of 72 mm gives 24 * 72 * 72 = 124,416 voxels, the next one,
    # 80 mm, 24 * 80 * 80 = 153,600 and so too many.
    "just not thick": (
        (8, (60, 192, 192), (3, 1, 1), 2),
        {"slicewise": False, "patch": (24, 72, 72), "axes": (0, 1, 2), "batch_dice": True, "width": 16},
        (2, 1500),
    ),
    # 14 classes need 28 channels at half resolution. 32 * 80 * 80 is too many, 24 * 72 * 72 is not.
    "CT of many organs": (
        (64, (200, 512, 512), (2, 0.8, 0.8), 14),
        {"slicewise": False, "patch": (24, 72, 72), "axes": (0, 1, 2), "batch_dice": True, "width": 32},
        (2, 3000),
    ),
    # Coarse along H: nothing turns into it, and D is no axis of slices.
    "thick along H": (
        (8, (64, 16, 64), (1, 5, 1), 2),
        {"slicewise": False, "patch": (64, 16, 64), "axes": (0, 2), "batch_dice": False, "width": 16},
        (2, 1500),
    ),
    "flat patch": (
        (8, (8, 300, 300), (1, 1, 1), 2),
        {"slicewise": False, "patch": (8, 128, 128), "axes": (1, 2), "batch_dice": True, "width": 16},
        (2, 1500),
    ),
    "images": (
        (1000, (1, 28, 28), (1, 1, 1), 2),
        {"patch": (1, 32, 32), "axes": (1, 2), "batch_dice": True, "width": 16},
        (32, 6000),
    ),
    "one volume": ((1, (8, 8, 8), (1, 1, 1), 2), {"patch": (8, 8, 8)}, (32, 1000)),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_follow_the_rules(name):
    (count, shape, spacing, classes), config, (batch, steps) = PLANS[name]
    found = plan_by_rule(Fingerprint(count, shape, spacing, classes, {}), {})
    assert config.items() <= dict(found.config).items()
    assert found.config["flip_axes"] == found.config["axes"]
    assert {key: value for key, (value, _) in found.training.items()} == {
        "batch_size": batch,
        "steps": steps,
    }
    assert " x ".join(map(str, shape)) in found.lines[0]


def test_what_is_given_is_kept_and_decides_the_rest():
    thick = Fingerprint(8, (10, 192, 192), (10, 1.5, 1.5), 4, {2: "1 and 2 lie in one order"})
    found = plan_by_rule(thick, {"patch": (8, 96, 96)})
    assert found.config["slicewise"] is False and "patch" not in found.config
    assert found.config["axes"] == (1, 2) and found.config["flip_axes"] == (1,)
    assert found.training["batch_size"][0] == 2
    assert "W: 1 and 2 lie in one order" in found.lines[-1]
    kept = plan_by_rule(thick, {"slicewise": False, "axes": (2,), "flip_axes": (0, 1), "width": 4})
    assert kept.config.keys() == {"patch", "batch_dice"}
    assert plan_by_rule(thick, {"stages": 2}).config["slicewise"] is False


def test_a_patch_grows_as_a_cube_in_mm_and_stops_at_the_volume():
    assert patch_of((100, 100, 100), (1, 1, 1), 32**3) == (32, 32, 32)
    assert patch_of((100, 100, 100), (2, 1, 1), 16 * 32 * 32) == (16, 32, 32)
    assert patch_of((12, 100, 100), (1, 1, 1), 16 * 64 * 64) == (16, 64, 64)
    assert patch_of((5, 300, 6), (1, 1, 1), 10**9) == (8, 304, 8)


# Mirroring ----------------------------------------------------------------------------------------


def places(**centres):
    """Cubes of 4 voxels about centres, by class."""
    corners = np.stack(np.meshgrid([-2, 1], [-2, 1], [-2, 1]), -1).reshape(-1, 3)
    return {int(name[1:]): np.array(at) + corners for name, at in centres.items()}


def test_classes_in_one_order_forbid_mirroring_along_that_axis():
    shapes = np.full((20, 3), 40)
    names = ("0", "left", "right")
    rng = np.random.default_rng(0)
    volumes = []
    for _ in range(20):
        middle = rng.integers(8, 32, 3)
        volumes.append(places(c1=middle - [0, 0, 6], c2=middle + np.array([0, 0, 6])))
    found = fixed_sides(shapes, volumes, names)
    assert found == {2: "left and right lie in one order"}
    volumes[0] = places(c1=(20, 20, 26), c2=(20, 20, 14))  # 19 of 20 are 95%
    assert set(fixed_sides(shapes, volumes, names)) == {2}
    volumes[1] = volumes[0]
    assert not fixed_sides(shapes, volumes, names)
    assert not fixed_sides(shapes[:3], volumes[2:5], names)  # three volumes tell nothing


def test_a_class_on_one_side_of_the_volume_forbids_it_too_but_one_around_another_does_not():
    shapes = np.full((8, 3), 40)
    assert fixed_sides(shapes, [places(c1=(20, 8, 20))] * 8, ("0", "liver")) == {
        1: "liver lies on one side of the volume"
    }
    shell = {**places(c1=(20, 20, 20)), 2: np.array([[12, 12, 12], [28, 28, 29]])}
    assert not fixed_sides(shapes, [shell] * 8, ("0", "core", "shell"))


# From the data to the training --------------------------------------------------------------------


def a_store(path, count, shape, spacing):
    """Boxes of class 1 left of class 2, anywhere."""
    rng = np.random.default_rng(0)
    for number in range(count):
        image, mask = rng.normal(size=shape).astype(np.float32), np.zeros(shape, np.int64)
        d, h, w = (int(rng.integers(0, n - 4 * k)) for n, k in zip(shape, (1, 1, 3), strict=True))
        mask[d : d + 4, h : h + 4, w : w + 4] = 1
        mask[d : d + 4, h : h + 4, w + 6 : w + 10] = 2
        name = f"{path.stem}{number:02d}"
        record = Record(id=name, dataset="made", subject=name, spacing=spacing)
        write_part(Path(f"{path}.partial"), record.id, record, image[None], mask=mask)
    assemble(Path(f"{path}.partial"), path, {}, [])
    return open_data([path])


def test_the_fingerprint_is_that_of_the_training_volumes_alone(tmp_path):
    first = a_store(tmp_path / "a.h5", 8, (10, 40, 32), (5.0, 1.0, 1.0))
    a_store(tmp_path / "b.h5", 8, (40, 40, 32), (1.0, 1.0, 1.0))
    both = open_data([tmp_path / "a.h5", tmp_path / "b.h5"])
    task = Segmentation(SegmentationConfig(), both)
    options, _ = resolve(FinetuneOptions(("x",), task="segmentation"), task.config, set())
    thick = planned(options, task, both[: len(first)])
    assert task.patch == (1, 40, 32) and task.config.slicewise and task.flip_axes == (1,)
    assert thick.batch_size == 32 and thick.steps == 1500
    assert task.reasons[-1] == "steps 1500: 8 volumes"
    deep = planned(options, task, both[len(first) :])
    assert task.patch == (40, 40, 32) and not task.config.slicewise and task.flip_axes == (0, 1)
    assert deep.batch_size == 5 * 2**15 // (40 * 40 * 32)
    asked, _ = resolve(FinetuneOptions(("x",), task="segmentation", steps=7), task.config, {"steps"})
    assert planned(asked, task, both).steps == 7 and not any("steps" in line for line in task.reasons)


def test_the_plan_is_shown_before_training_and_kept_in_the_record(tmp_path, capsys):
    store = phantom_store(16, shape=(12, 16, 16), folder=tmp_path)
    words = ["finetune", "scratch:resnet10:width=4", "--data", str(store), "--task", "segmentation"]
    words += [
        "--steps",
        "3",
        "--eval-at",
        "1",
        "--threads",
        "1",
        "--no-trivial",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 0
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if line.startswith("plan: ")]
    assert not any(".patch" in line for line in lines)  # planned: nobody gave it, so it is not told off
    (path,) = (tmp_path / "o").glob("*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [f"plan: {line}" for line in record["compute"]["details"]["plan"]] == shown
    assert shown[-1].startswith("plan: batch_size 32: ")  # more than there are training volumes
    assert record["settings"]["training"]["batch_size"] == record["compute"]["details"]["batch_size"] == 32
    assert record["settings"]["task"]["patch"] == [16, 16, 16]


# The average of the weights -----------------------------------------------------------------------


def test_the_average_of_weights_by_hand():
    model = nn.BatchNorm1d(1)
    average: dict[str, torch.Tensor] = {}
    for step, weight in enumerate((1.0, 2.0, 4.0, 8.0), start=1):
        nn.init.constant_(model.weight, weight)
        model.num_batches_tracked.fill_(step)
        update_average(average, model, step, reach=4.0)
    # Decays: none, 1/10, 2/11, 3/12, each below 1 - 1/4.
    second = 0.1 * 1 + 0.9 * 2
    third = 2 / 11 * second + 9 / 11 * 4
    assert average["weight"].item() == pytest.approx(0.25 * third + 0.75 * 8)
    assert average["num_batches_tracked"].item() == 4
    for step in range(5, 400):
        update_average(average, model, step, reach=4.0)
    assert average["weight"].item() == pytest.approx(8, abs=1e-5)
    nn.init.constant_(model.weight, 0.0)
    update_average(average, model, 400, reach=4.0)
    assert average["weight"].item() == pytest.approx(0.75 * 8)  # 1 - 1/reach at most


def test_the_average_is_what_is_scored_and_kept(tmp_path, monkeypatch):
    data = a_store(tmp_path / "a.h5", 4, (8, 16, 24), (1.0, 1.0, 1.0))
    task = Segmentation(SegmentationConfig(width=4), data)
    options = FinetuneOptions(
        ("x",), steps=6, batch_size=2, lr=1e-2, ema=0.5, eval_at=(0.5, 1.0), threads=1
    )
    averages, updated = [], finetune_train.update_average

    def noted(average, model, step, reach):
        assert reach == 3.0
        updated(average, model, step, reach)
        averages.append({key: value.clone() for key, value in average.items()})

    monkeypatch.setattr(finetune_train, "update_average", noted)
    seen = []
    plan = finetune_train.TrainingPlan(
        Finetune(task), task, data[:2], data[2:], options, 0, torch.device("cpu"), "a"
    )

    def choose(task, model, data):
        seen.append(model.head.out.weight.clone())
        return [{"dice": {}} for _ in data]

    monkeypatch.setattr(Segmentation, "predict_for_choosing", choose)
    monkeypatch.setattr(Finetune, "value", lambda benchmark, rows: float(len(seen)))
    make = encoder_from("scratch:resnet10:width=4:norm=group", seed=0)
    model, trial = finetune_train.train(plan, lambda: copy.deepcopy(make), 1e-2)
    for found, step in zip(seen, (3, 6), strict=True):
        assert torch.equal(found, averages[step - 1]["head.out.weight"])
    kept = model.state_dict()
    assert trial.best["step"] == 6 and all(torch.equal(kept[key], averages[5][key]) for key in kept)
    plain, _ = finetune_train.train(
        dataclasses.replace(plan, options=dataclasses.replace(options, ema=0.0)),
        lambda: copy.deepcopy(make),
        1e-2,
    )
    # The average looks on: without it the weights of the last step are the same that it was fed.
    before, after = (averages[n]["head.out.weight"] for n in (4, 5))
    last = (after - 5 / 14 * before) / (1 - 5 / 14)
    assert torch.allclose(plain.state_dict()["head.out.weight"], last, atol=1e-5)
