"""Pseudo-3D detection: colours become slices, with their boxes; what it learns and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssl3d.api import DataError, UsageError, numpy_rng, one_group, open_data, score_boxes
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.encoders.resnet import ResNet10
from ssl3d_proxies.pseudo3d_detection import Pseudo3DDetection, Pseudo3DDetectionConfig, as_slices

SMALL = {
    "crop": (64, 64), "channels": 16, "hidden": 32, "proposals": (48, 48), "rpn_samples": 64,
    "roi_samples": 32, "most": 4, "scale": 0.0, "flip": (0.0, 0.0), "intensity": 0.0, "min_stride": 4,
    "span": (1.0, 1.0), "around": 0.0,
}  # fmt: skip
FLAT = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Four pictures of 60 x 80 with a red or a blue rectangle each; a store of them."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for n in range(4):
        picture = rng.integers(0, 60, (60, 80, 3)).astype(np.uint8)
        x, y = int(rng.integers(0, 40)), int(rng.integers(0, 30))
        w, h = int(rng.integers(16, 30)), int(rng.integers(16, 28))
        picture[y : y + h, x : x + w, 2 * (n % 2)] = 250
        Image.fromarray(picture).save(root / f"{n}.png")
        images.append({"id": n, "file_name": f"{n}.png", "width": 80, "height": 60})
        annotations.append({"id": n, "image_id": n, "category_id": 1 + n % 2, "bbox": [x, y, w, h]})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    out = root / "store" / "c.h5"
    out.parent.mkdir()
    prepare(PrepareOptions((str(root),), str(out), workers=0, colour="rgb"))
    return open_data([out])


def proxy_of(data, seed=0, encoder=None, **options):
    torch.manual_seed(seed)
    encoder = encoder or ResNet10(
        ResNet10.Config(
            width=8, kind="3d", norm="group", stem_kernel=3, stem_stride=(1, 2, 2), stage_strides=FLAT
        )
    )
    made = Pseudo3DDetection(Pseudo3DDetectionConfig(**{**SMALL, **options}), encoder)
    if data is not None:
        made.setup(data)
    return made


def batch_of(proxy, volumes):
    drawn = [proxy.draw(proxy.config, volume, numpy_rng(0, volume.id)) for volume in volumes]
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]} | {
        "dataset": torch.zeros(len(drawn), dtype=torch.int64)
    }


def test_colours_are_slices_in_their_order_and_standardised(coco):
    proxy = proxy_of(coco).eval()
    assert proxy.names == ["blue", "red"]
    batch = batch_of(proxy, coco)
    assert batch["crop"].shape == (4, 1, 3, 64, 64)
    seen = proxy.shown(batch, one_group(0, 4))
    for n in range(4):
        y1, x1, y2, x2 = seen.boxes[n, 0].round().int().tolist()
        inside = seen.images[n, 0, :, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].mean((1, 2))
        # 250 of 255 in the slice of its colour, less the paper's mean, over its deviation.
        assert inside.argmax() == 2 * (n % 2)
        assert inside.max().item() == pytest.approx((250 - 114.495) / 57.63, abs=0.05)
    # What is looked at while training is made the same way.
    whole = torch.rand(2, 3, 1, 8, 8)
    slices = proxy.present(whole)
    torch.testing.assert_close(slices[:, 0], (whole[:, :, 0] * 255 - 114.495) / 57.63)


def test_boxes_keep_their_proportions_in_crops_that_span_the_picture(coco):
    proxy = proxy_of(coco).eval()
    seen = proxy.shown(batch_of(proxy, coco), one_group(0, 4))
    for n, volume in enumerate(coco):
        _, y1, x1, _, y2, x2 = volume.boxes[0]
        found = seen.boxes[n, 0, 2:] - seen.boxes[n, 0, :2]
        np.testing.assert_allclose(found, np.array([y2 - y1, x2 - x1]) * 64 / 80, rtol=1e-4)


def test_slices_are_shuffled_while_training_only(coco):
    proxy = proxy_of(coco, shuffle=1.0)
    batch = batch_of(proxy, coco)
    plain = proxy.eval().shown(batch, one_group(0, 4)).images
    mixed = [proxy.train().shown(batch, one_group(seed, 4)).images for seed in range(6)]
    assert any(not torch.equal(x, plain) for x in mixed)
    for x in mixed:
        torch.testing.assert_close(x.sort(2).values, plain.sort(2).values)


@pytest.mark.long
def test_it_learns_a_few_pictures_by_heart(coco):
    proxy = proxy_of(coco)
    batch = batch_of(proxy, coco)
    before = score_boxes(proxy, coco).mean[0]
    optimizer = torch.optim.AdamW(proxy.train().parameters(), lr=2e-3)
    for step in range(70):
        output = proxy(batch, one_group(step, 4))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert before < 0.5 < 0.9 < score_boxes(proxy, coco).mean[0]


def test_grey_pictures_and_volumes_are_three_slices_too():
    grey = torch.rand(1, 1, 5, 6)
    assert torch.equal(as_slices(grey), grey.expand(1, 3, 5, 6))
    volume = torch.rand(1, 3, 5, 6)
    assert torch.equal(as_slices(volume), volume)
    colours = torch.rand(3, 1, 5, 6)
    assert torch.equal(as_slices(colours)[0], colours[:, 0])


def test_wrong_encoders_and_data_are_named(coco):
    with pytest.raises(UsageError, match="strides across the three slices"):
        proxy_of(None, encoder=ResNet10(ResNet10.Config(width=8)))
    with pytest.raises(UsageError, match="the encoder takes 3 channels"):
        proxy_of(None, encoder=ResNet10(ResNet10.Config(width=8, in_channels=3)))
    with pytest.raises(UsageError, match="have 2 channels"):
        Pseudo3DDetection.in_channels(Pseudo3DDetectionConfig(), 2)
    assert Pseudo3DDetection.in_channels(Pseudo3DDetectionConfig(), 3) == 1
    with pytest.raises(DataError, match="has 3 channels and depth 4"):
        Pseudo3DDetection.draw(Pseudo3DDetectionConfig(), _Thick(), np.random.default_rng(0))
    for field, value in (("slab", 5), ("shuffle", 2.0), ("std", 0.0)):
        with pytest.raises(ValueError, match=field):
            Pseudo3DDetectionConfig(**{field: value})


class _Thick:
    id, shape, boxes, box_labels = "thick", (3, 4, 8, 8), np.zeros((0, 6)), np.zeros(0)
