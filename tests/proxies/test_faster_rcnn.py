"""Faster R-CNN as a proxy: what it learns, its four phases, and what it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import ssl3d
from ssl3d.api import DataError, UsageError, flat_parameters, numpy_rng, one_group, score_boxes
from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.proxies import load_proxies
from ssl3d.data.open import open_data
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d_proxies.faster_rcnn import FasterRCNN, FasterRCNNConfig

SMALL = {
    "crop": (48, 48), "channels": 16, "hidden": 32, "proposals": (48, 48), "rpn_samples": 64,
    "roi_samples": 32, "most": 4, "scale": 0.0, "flip": (0.0, 0.0), "intensity": 0.0,
}  # fmt: skip


def store(folder, pictures, names=None, out="boxes.h5"):
    """A store of noise with a bright rectangle per box; pictures are (boxes y1 x1 y2 x2, labels)."""
    for n, (boxes, labels) in enumerate(pictures):
        image = numpy_rng("picture", n).normal(0, 0.1, (1, 1, 48, 48)).astype(np.float32)
        full = None
        if boxes is not None:
            full = np.array([[0, *box[:2], 1, *box[2:]] for box in boxes], np.float32).reshape(-1, 6)
            for (y1, x1, y2, x2), label in zip(boxes, labels, strict=True):
                image[0, 0, y1:y2, x1:x2] += 1 + label
        record = Record(id=f"picture-{n}", dataset="rectangles", subject=f"s{n}")
        write_part(
            folder / "parts", f"{n:03d}", record, image, None, full,
            None if boxes is None else np.array(labels, np.int64), np.ones((1, 48, 48), bool),
        )  # fmt: skip
    assemble(folder / "parts", folder / out, {"box_labels": {"rectangles": names or {}}}, [])
    shutil.rmtree(folder / "parts")
    return open_data([folder / out])


@pytest.fixture
def rectangles(tmp_path):
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(8):
        y, x = rng.integers(0, 30, 2)
        h, w = rng.integers(8, 17, 2)
        pictures.append(([[y, x, y + h, x + w]], [1]))
    return store(tmp_path, pictures)


def proxy_of(data, seed=0, **options):
    torch.manual_seed(seed)
    encoder = ResNet10(ResNet10.Config(width=8, norm="group"))
    made = FasterRCNN(FasterRCNNConfig(**{**SMALL, **options}), encoder)
    made.setup(data)
    return made


def batch_of(proxy, volumes, seed=0):
    drawn = [proxy.draw(proxy.config, volume, numpy_rng(seed, volume.id)) for volume in volumes]
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]} | {
        "dataset": torch.zeros(len(drawn), dtype=torch.int64)
    }


def test_one_image_with_one_box_and_one_without_are_learned_by_heart(tmp_path):
    data = store(tmp_path, [([[12, 20, 30, 36]], [1]), ([], [])])
    proxy = proxy_of(data)
    batch = batch_of(proxy, data)
    before = score_boxes(proxy, data).mean[0]
    optimizer = torch.optim.AdamW(proxy.train().parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 100)
    first = None
    for step in range(100):
        output = proxy(batch, one_group(step, 2))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        decay.step()
        first = first or output.loss.item()
    assert score_boxes(proxy, data).mean[0] == pytest.approx(1.0) and before < 0.5
    assert score_boxes(proxy, data, iou=0.75).mean[0] == pytest.approx(1.0)
    assert output.loss.item() < 0.2 * first
    seen = proxy.eval()(batch, one_group(0, 2)).metrics
    assert seen["ap50"] == 1 and seen["recall"] == 1
    # In the image without a rectangle none is as sure.
    found = proxy.detector.detect(proxy.shown(batch, one_group(0, 2)).images)
    assert found[0].scores.max() > 0.9 and not (found[1].scores > 0.5).any()


def test_classes_are_those_of_the_data_by_name_and_unknown_ones_are_not_asked_for(tmp_path):
    box = [[5, 5, 20, 20]]
    data = store(tmp_path, [(box, [7]), (box, [3]), ([], []), (None, None)], {"7": "cat", "3": "dog"})
    proxy = proxy_of(data)
    assert proxy.names == ["cat", "dog"]
    assert proxy.known.tolist() == [[0, 3, 1], [0, 7, 0]]
    batch = batch_of(proxy, data[:3])
    assert proxy._classes_of(batch)[:2, 0].tolist() == [0, 1]
    batch["labels"][0, 0] = 99
    output = proxy(batch, one_group(0, 3))
    assert output.loss.isfinite() and proxy._classes_of(batch)[0, 0] == -1
    with pytest.raises(DataError, match="picture-3: nobody looked for boxes"):
        batch_of(proxy, data[3:])


def test_data_without_a_single_box_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match="no box in all 2 volumes to be learned from: nobody looked"):
        proxy_of(store(tmp_path, [(None, None)] * 2, out="a.h5"))
    with pytest.raises(DataError, match="2 of them were looked at and have none"):
        proxy_of(store(tmp_path, [([], [])] * 2, out="b.h5"))


def test_batches_without_boxes_give_finite_losses_and_gradients(tmp_path):
    data = store(tmp_path, [([[5, 5, 20, 20]], [1]), ([], []), ([], [])])
    for training in ("joint", "alternating"):
        proxy = proxy_of(data, training=training)
        for phase in (1, 2, 3, 4) if training == "alternating" else (0,):
            if phase:
                proxy.phase.fill_(phase)
            output = proxy(batch_of(proxy, data[1:]), one_group(0, 2))
            proxy.zero_grad()
            output.loss.backward()
            assert output.loss.isfinite() and output.metrics["recall"] == 1 and "ap50" not in output.metrics
            assert all(p.grad is None or p.grad.isfinite().all() for p in proxy.parameters())


def test_an_unusable_encoder_is_named(rectangles):
    with pytest.raises(UsageError, match="min_stride is 64"):
        proxy_of(rectangles, min_stride=64)
    for field, value in (("training", "both"), ("phases", (1.0, 0.0, 1.0, 1.0)), ("fusion", "none")):
        with pytest.raises(ValueError, match=field):
            FasterRCNNConfig(**{field: value})


# Alternating ------------------------------------------------------------------------------------------


def parts_of(proxy):
    return {
        part: flat_parameters(proxy._part(part)).clone()
        for part in ("encoder", "pyramid", "rpn", "roi", "second")
    }


def test_phases_are_as_long_as_they_are_asked_to_be():
    config = FasterRCNNConfig(phases=(2.0, 1.0, 2.0, 1.0))
    assert [config.phase(step, 12) for step in range(12)] == [1] * 4 + [2] * 2 + [3] * 4 + [4] * 2


def test_each_phase_trains_its_parts_and_nothing_else_moves(rectangles):
    proxy = proxy_of(rectangles, training="alternating", phases=(1.0, 1.0, 1.0, 1.0)).train()
    batch = batch_of(proxy, rectangles)
    # Weight decay and momentum would move what has a gradient of zero.
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=1e-2, weight_decay=0.5)
    trained = {
        1: {"rpn", "second"}, 2: {"encoder", "pyramid", "roi"}, 3: {"rpn"}, 4: {"roi"},
    }  # fmt: skip
    start = parts_of(proxy)
    rpn = start["rpn"]
    assert torch.equal(start["second"], torch.cat([start["encoder"], start["pyramid"]]))
    losses = {1: {"rpn_class", "rpn_box"}, 2: {"roi_class", "roi_box"}}
    for step in range(8):
        phase = int(proxy.phase)
        assert phase == 1 + step // 2
        before = parts_of(proxy)
        if phase == 3 and step == 4:
            assert torch.equal(before["rpn"], rpn)  # a new one
        output = proxy(batch, one_group(step, len(rectangles)))
        assert losses[1 + (phase + 1) % 2] <= set(output.metrics)
        optimizer.zero_grad(set_to_none=True)
        (output.loss + 0 * sum(p.sum() for p in proxy.parameters())).backward()
        optimizer.step()
        proxy.after_step(step, 8)
        after = parts_of(proxy)
        moved = {part for part in after if not torch.equal(before[part], after[part])}
        if step == 3:  # the new proposal network is put in at the end of the second phase
            moved -= {"rpn"}
        assert moved == trained[phase], (step, moved)


def test_frozen_encoders_keep_the_statistics_of_their_norms(rectangles):
    torch.manual_seed(0)
    config = FasterRCNNConfig(**SMALL, training="alternating")
    proxy = FasterRCNN(config, ResNet10(ResNet10.Config(width=8, norm="batch"))).train()
    proxy.setup(rectangles)
    batch = batch_of(proxy, rectangles)
    proxy.phase.fill_(3)
    before = proxy.encoder.bn1.running_mean.clone()
    proxy(batch, one_group(0, len(rectangles)))
    assert torch.equal(proxy.encoder.bn1.running_mean, before) and proxy.encoder.bn1.training
    proxy.phase.fill_(2)
    proxy(batch, one_group(0, len(rectangles)))
    assert not torch.equal(proxy.encoder.bn1.running_mean, before)


def test_alternating_training_goes_on_to_the_same_bytes(rectangles, tmp_path):
    whole = ssl3d.pretrain(
        "faster_rcnn",
        data=rectangles,
        out=tmp_path / "whole",
        encoder="resnet10",
        resnet10={"width": 8, "norm": "group"},
        faster_rcnn={**SMALL, "training": "alternating", "phases": [1, 1, 1, 1]},
        steps=8, batch_size=4, checkpoint_every=5, subjects="all", holdout=0.0, eval_every=-1,
        precision="32", workers=0, threads=1,
    )  # fmt: skip
    half = shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(half / "encoder")
    newest, before = snapshot.checkpoints(half)
    newest.unlink()
    assert snapshot.step_of(before) == 5  # within the third phase
    again = ssl3d.resume(half)
    ours, theirs = (snapshot.load_checkpoint(run.folder)["module"] for run in (again, whole))
    assert [key for key, value in theirs.items() if not torch.equal(ours[key], value)] == []
    loaded = load_proxies(whole.folder)["faster_rcnn"]
    assert loaded.names == ["1"] and int(loaded.phase) == 4
    assert np.isfinite(score_boxes(loaded, rectangles).mean[0])


def test_the_picture_shows_true_and_found_boxes(rectangles, tmp_path):
    proxy = proxy_of(rectangles)
    figure = proxy(batch_of(proxy, rectangles), one_group(0, 8)).picture()
    panel = figure.axes[0]
    y1, x1, y2, x2 = proxy.shown(batch_of(proxy, rectangles), one_group(0, 8)).boxes[0, 0].tolist()
    drawn = panel.patches[0]
    assert drawn.get_xy() == pytest.approx((x1 - 0.5, y1 - 0.5))
    assert (drawn.get_width(), drawn.get_height()) == pytest.approx((x2 - x1, y2 - y1))
    figure.savefig(tmp_path / "picture.png")
