"""What every fine-tuning task shows its network: inputs and truth of the size asked for, at any depth."""

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl3d.api import DataError, numpy_rng, one_group, open_data
from ssl3d.cli import main
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d_benchmarks.finetune.benchmark import Finetune
from ssl3d_benchmarks.finetune.classification import Classification, ClassificationConfig
from ssl3d_benchmarks.finetune.detection.task import Detection, DetectionConfig
from ssl3d_benchmarks.finetune.segmentation import task as finetune_segmentation
from ssl3d_benchmarks.finetune.segmentation.config import SegmentationConfig
from ssl3d_benchmarks.finetune.segmentation.task import Segmentation

VOLUME, IMAGE = (10, 28, 28), (1, 28, 28)


def a_store(path, volumes):
    """Writes (subject, label, image (D, H, W), mask, boxes) to a store."""
    for number, (subject, label, image, mask, boxes) in enumerate(volumes):
        record = Record(id=f"v{number:03d}", dataset="made", subject=subject, label=label)
        kinds = np.ones(len(boxes), np.int64)
        part = Path(f"{path}.partial")
        write_part(part, record.id, record, np.float32(image)[None], mask, boxes, kinds)
    assemble(Path(f"{path}.partial"), path, {}, [])
    return open_data([path])


def objects(shapes, deep, seed=0):
    """Noise with a bright block, `deep` voxels along D in volumes."""
    rng = np.random.default_rng(seed)
    for number, shape in enumerate(shapes):
        side = (min(deep, shape[0]), 9, 9)
        low = [int(rng.integers(n - s + 1)) for n, s in zip(shape, side, strict=True)]
        cut = tuple(slice(a, a + s) for a, s in zip(low, side, strict=True))
        image, mask = rng.normal(size=shape) * 0.3, np.zeros(shape, np.int64)
        image[cut], mask[cut] = 2.0, 1
        box = [*low, *(a + s for a, s in zip(low, side, strict=True))]
        yield f"p{number}", number % 2, image, mask, np.array([box], np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Volumes, images, both; and volumes whose objects are one slice deep."""
    folder, shapes = tmp_path_factory.mktemp("sizes"), {"volumes": [VOLUME] * 2, "images": [IMAGE] * 2}
    shapes["mixed"] = [VOLUME, IMAGE]
    made = {name: a_store(folder / f"{name}.h5", objects(some, 6)) for name, some in shapes.items()}
    made["thin"] = a_store(folder / "thin.h5", objects([VOLUME] * 2, 1))
    return made


class Spy:
    """Notes the size of all that an encoder is given."""

    def __init__(self, encoder):
        self.seen: list[tuple[int, ...]] = []
        encoder.register_forward_pre_hook(self._note)

    def _note(self, module, inputs):
        self.seen.append(tuple(inputs[0].shape))

    def sizes(self):
        """Sizes (D, H, W) since the last look."""
        found, self.seen[:] = {shape[2:] for shape in self.seen}, []
        return found


def encoder_of(seed=0):
    torch.manual_seed(seed)
    return ResNet10(ResNet10.Config(width=4, stem_kernel=3, norm="group"))


def batches_of(task, volumes, seed=0):
    """Examples as the loader puts them together: equal shapes in one group."""
    groups = {}
    for number, volume in enumerate(volumes):
        example = task.draw(volume, numpy_rng(seed, number))
        shape = tuple((name, tuple(value.shape)) for name, value in example.items())
        groups.setdefault(shape, []).append(example)
    for same in groups.values():
        yield {name: torch.stack([one[name] for one in same]) for name in same[0]}


def depth_of(volume, deep):
    return 1 if volume.shape[1] == 1 else deep


# Segmentation -------------------------------------------------------------------------------------

WAYS = {
    "3D crops": ("volumes", {}, 8),
    "slicewise": ("volumes", {"slicewise": True}, 1),
    "patch of depth 1": ("volumes", {"patch": (1, 24, 16)}, 1),
    "images": ("images", {}, 1),
    "images among volumes": ("mixed", {}, 8),
}
OPTIONS = {
    "plain": {"chance": 0.0, "flip": 0.0},
    "augmented": {"chance": 1.0, "flip": 0.5, "mirror": True, "flip_axes": (0, 1, 2)},
    "in plane": {"chance": 1.0, "axes": (1, 2), "flip_axes": (1, 2), "mirror": True},
    "turned and shifted": {"chance": 1.0, "turn": 0.5, "stretch": 0.2, "shift": 0.1},
    "sparse": {"sparse_slices": 2, "chance": 1.0},
    "one step": {"deep_supervision": False, "head": "med3d"},
    "two stages": {"stages": 2, "coarse": (4, 16, 24), "chance": 1.0},
}


@pytest.mark.parametrize(("way", "options"), list(product(WAYS, OPTIONS)))
def test_a_segmentation_network_and_its_truth_have_the_size_asked_for(way, options, data, monkeypatch):
    which, more, deep = WAYS[way]
    if way == "slicewise" and options == "two stages":
        pytest.skip("refused: a coarse stage finds regions of volumes")
    some = data[which]
    config = SegmentationConfig(
        **{"patch": (8, 24, 16), "width": 4, "overlap": 0.0, **OPTIONS[options], **more}
    )
    task = Segmentation(config, some)
    model = task.model(encoder_of(), some)
    spy = Spy(model.encoder)
    coarse = Spy(model.coarse.encoder) if config.stages == 2 else None
    truths, whole = [], finetune_segmentation.dice_ce_loss

    def noted(logits, truth, *others):
        truths.append((tuple(logits.shape[2:]), tuple(truth.shape[1:])))
        return whole(logits, truth, *others)

    monkeypatch.setattr(finetune_segmentation, "dice_ce_loss", noted)
    for volume in some:
        size, small = (depth_of(volume, deep), 24, 16), (depth_of(volume, 4), 16, 24)
        for batch in batches_of(task, [volume]):
            task.loss(model.train(), batch, one_group(0, 1))[0].backward()
        assert spy.sizes() == {size}
        assert {truth for _, truth in truths} == {size} | ({small} if coarse else set())
        assert all(truth == logits for logits, truth in truths)
        truths.clear()
        with torch.no_grad():
            assert task.labels(model.eval(), volume).shape == volume.shape[1:]
        assert spy.sizes() == {size}
        if coarse:
            assert coarse.sizes() == {small}


def test_no_segmentation_has_a_version_of_before(data):
    """Version 105 had a fixed recipe; windows of 102 to 104 blended almost evenly near their faces."""
    for which, options in (
        ("volumes", {}),
        ("volumes", {"sparse_slices": 2}),
        ("volumes", {"slicewise": True}),
        ("images", {}),
        ("mixed", {}),
    ):
        task = Segmentation(SegmentationConfig(**options), data[which])
        assert Finetune(task).task_version == 106


# Detection ----------------------------------------------------------------------------------------

DETECTIONS = {
    "volumes": ("volumes", (8, 24, 24), 8),
    "slices": ("thin", (1, 24, 24), 1),
    "images": ("images", (8, 24, 24), 1),
    "images among volumes": ("mixed", (8, 24, 24), 8),
}


@pytest.mark.parametrize("model", ["retinanet", "faster-rcnn", "faster-rcnn-2d"])
@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("way", DETECTIONS)
def test_a_detector_and_its_boxes_have_the_size_asked_for(way, augmented, model, data):
    which, patch, deep = DETECTIONS[way]
    if model == "retinanet":
        pytest.importorskip("monai")
    if model == "faster-rcnn-2d" and which != "images":
        pytest.skip("takes images")
    some = data[which]
    strength = {"zoom": 0.2, "intensity": 1.0} if augmented else {"zoom": 0.0, "intensity": 0.0, "axes": ()}
    config = DetectionConfig(model=model, patch=patch, channels=8, around=1.0, overlap=0.0, **strength)
    task = Detection(config, some)
    network = task.model(encoder_of(), some)
    task.start(network, some)
    spy, given, whole = Spy(network.encoder), [], network.losses

    def noted(images, boxes, labels, rng):
        given.extend(boxes)
        return whole(images, boxes, labels, rng)

    network.losses = noted
    for volume in some:
        size = (depth_of(volume, deep), 24, 24)
        for batch in batches_of(task, [volume] * 4):
            total, _ = task.loss(network.train(), batch, one_group(0, 4))
            total.backward()
        assert spy.sizes() == {size}
        # Every crop is drawn round an object, and most of them show half of it or more.
        assert sum(len(boxes) for boxes in given) >= 2
        ends = torch.tensor(size if model != "faster-rcnn-2d" else size[1:], dtype=torch.float32)
        for boxes in given:
            low, high = boxes.chunk(2, dim=1)
            assert (low >= 0).all() and (high <= ends).all() and (high > low).all()
        given.clear()
        with torch.no_grad():
            task.detect(network.eval(), volume)
        assert spy.sizes() == {size}


def test_a_patch_that_holds_no_object_is_refused(data):
    with pytest.raises(DataError, match=r"patch 1 24 24: a crop holds 17% of an object at most.*none of 2"):
        Detection(DetectionConfig(patch=(1, 24, 24), zoom=0.0), data["volumes"])
    with pytest.raises(DataError, match="none of 2 objects would be learned"):
        Detection(DetectionConfig(patch=(8, 4, 4), zoom=0.2), data["volumes"])
    Detection(DetectionConfig(patch=(1, 24, 24), zoom=0.0), data["mixed"])  # the images can be learned


# Classification -----------------------------------------------------------------------------------

CROPS = {
    "whole": ("volumes", (96, 96, 96), VOLUME),
    "crops": ("volumes", (8, 24, 16), (8, 24, 16)),
    "slices": ("volumes", (1, 24, 16), (1, 24, 16)),
    "whole images": ("images", (96, 96, 96), IMAGE),
    "crops of images": ("images", (8, 24, 16), (1, 24, 16)),
}


@pytest.mark.parametrize("pad", [False, True], ids=["as they are", "padded"])
@pytest.mark.parametrize("way", CROPS)
def test_a_classifier_sees_the_size_asked_for(way, pad, data):
    which, crop, size = CROPS[way]
    some = data[which]
    config = ClassificationConfig(crop=crop, pad=pad, flip=0.5, shift=0.2, contrast=0.2)
    task = Classification(config, some)
    model = task.model(encoder_of(), some)
    task.start(model, some)
    spy = Spy(model.encoder)
    for batch in batches_of(task, list(some)):
        assert len(batch["target"]) == len(some)
        task.loss(model.train(), batch, one_group(0, len(some)))[0].backward()
    assert spy.sizes() == {size}
    with torch.no_grad():
        task.predict_all(model.eval(), some)
    assert spy.sizes() == {size}


# Learning -----------------------------------------------------------------------------------------


def shapes_2d(count, side, deep, seed):
    """Discs (1) and squares (2), equally bright, anywhere: a single voxel does not tell them apart."""
    places, noise = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    at, quarter = np.indices((side, side)), side // 4
    for number in range(count):
        mask = np.zeros((side, side), np.int64)
        corners = places.permutation([(0, 0), (0, 1), (1, 0), (1, 1)])
        for kind, corner in zip((1, 2), corners, strict=False):
            middle = quarter * (1 + 2 * corner) + places.integers(-3, 4, 2)
            away = np.abs(at - middle[:, None, None])
            mask[(away**2).sum(0) < quarter**2 if kind == 1 else away.max(0) < 0.6 * quarter] = kind
        stack = np.repeat(mask[None], deep, 0)
        image = (stack > 0) + noise.normal(size=stack.shape) * 0.2
        yield f"p{number}", None, image, stack, np.zeros((0, 6), np.float32)


LEARNING = {
    "slicewise": (4, {"slicewise": True, "patch": (16, 48, 48)}),
    "patch of depth 1": (4, {"patch": (1, 48, 48)}),
    "images": (1, {"patch": (16, 48, 48)}),
}


@pytest.mark.parametrize("way", LEARNING)
def test_crops_of_depth_1_learn_what_a_single_voxel_does_not_tell(way, tmp_path):
    deep, options = LEARNING[way]
    data = a_store(tmp_path / "shapes.h5", shapes_2d(16, 48, deep, seed=0))
    in_plane = {"axes": (1, 2), "flip_axes": (1, 2)}
    found, average = learned(data[:12], data[12:], {**in_plane, **options}, batch=4, steps=60)
    # Trained on single voxels it ended at .04.
    assert average < 0.2 and found > 0.8, (found, average)


@pytest.mark.slow
def test_slicewise_learns_the_heart_at_least_as_3d_crops_do(tmp_path):
    """In half of the time that 3D crops take: 160 steps of 8 slices, 80 steps of 8 x 64 x 64 voxels."""
    root = Path(os.environ.get("SSL3D_DATA") or Path(__file__).parents[4] / "shared" / "data") / "cardiac"
    if not root.is_dir():
        pytest.skip("no ../shared/data/cardiac")
    scans = sorted((root / "imagesTr").glob("*_frame01.nii.gz"))[:26]
    lines = ["path,mask", *(f"{scan},{root / 'labelsTr' / scan.name}" for scan in scans)]
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    store, spacing = str(tmp_path / "store.h5"), ["--spacing", "10", "3", "3"]
    assert main(["prepare", str(tmp_path / "list.csv"), "--out", store, "--workers", "1", *spacing]) == 0
    data = open_data([store])
    train, test, plane = data[:18], data[18:], {"axes": (1, 2)}
    slices, average = learned(train, test, {"slicewise": True, "patch": (1, 64, 64), **plane}, 8, 160)
    whole, _ = learned(train, test, {"patch": (8, 64, 64), **plane}, 1, 80)
    assert slices > average + 0.25 and slices >= whole, (slices, whole, average)


def learned(train, test, options, batch, steps):
    """Dice on the test volumes after some steps from scratch, and that of the average mask."""
    everything = train.select(np.arange(len(train)))
    everything.rows = np.concatenate([train.rows, test.rows])
    task = Segmentation(SegmentationConfig(width=8, **options), everything)
    torch.manual_seed(0)
    model = task.model(ResNet10(ResNet10.Config(width=16, stem_kernel=3, stem_stride=(1, 1, 1))), train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    rng = np.random.default_rng(0)
    for step in range(steps):
        volumes = [train[int(n)] for n in rng.integers(len(train), size=batch)]
        (examples,) = batches_of(task, volumes, step)
        loss, _ = task.loss(model.train(), examples, one_group(step, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    value = Finetune(task).value
    with torch.no_grad():
        rows = [
            {
                **task.predict(model.eval(), one),
                "dataset": one.dataset,
                "subject": one.subject,
                "id": one.id,
            }
            for one in test
        ]
    return value(rows), value(task.predict_trivial("average mask", train, train[:0], test, 0))
