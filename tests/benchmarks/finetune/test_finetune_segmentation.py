"""Segmentation as a downstream task: crops, sparse annotation, two stages, predictions and scores."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl3d.api import BatchRng, DataError, Encoder, numpy_rng, one_group, open_data, phantom_store
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d_benchmarks.finetune.parameters import freeze, parameter_groups
from ssl3d_benchmarks.finetune.segmentation.config import SegmentationConfig
from ssl3d_benchmarks.finetune.segmentation.data import (
    Annotation,
    annotate,
    class_indices,
    class_table,
    place_patch,
    sparse_slices,
)
from ssl3d_benchmarks.finetune.segmentation.task import IGNORE, Segmentation

PLAIN = {"chance": 0.0, "flip": 0.0}


def a_store(path, volumes):
    """Writes (subject, image (D, H, W), mask) to a store."""
    for number, (subject, image, mask) in enumerate(volumes):
        record = Record(id=f"v{number:03d}", dataset="made", subject=subject, spacing=(2.0, 1.0, 1.0))
        write_part(Path(f"{path}.partial"), record.id, record, np.float32(image)[None], mask=mask)
    assemble(Path(f"{path}.partial"), path, {}, [])
    return open_data([path])


def blobs(n=4, shape=(20, 24, 22), seed=0, value=2.0):
    """Noise with a bright box of class 1 and a dark one of class 4 on slices 5 to 14."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        mask = np.zeros(shape, np.int64)
        mask[5:12, 4:11, 4:12] = 1
        mask[9:15, 12:18, 8:16] = 4
        image = rng.normal(size=shape) * 0.3 + value * (mask == 1) - value * (mask == 4)
        yield f"p{number // 2}", image, mask


def encoder_of(width=8, seed=0, **options):
    torch.manual_seed(seed)
    return ResNet10(ResNet10.Config(width=width, stem_kernel=3, **options))


def batch_of(task, volumes, seed=0):
    examples = [task.draw(volume, numpy_rng(seed, n)) for n, volume in enumerate(volumes)]
    return {name: torch.stack([one[name] for one in examples]) for name in examples[0]}


def train(task, model, data, steps, batch=2, lr=4e-3):
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in range(steps):
        volumes = [data[(step * batch + n) % len(data)] for n in range(batch)]
        loss, values = task.loss(model, batch_of(task, volumes, step), one_group(step, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return values


def row(task, model, volume):
    with torch.no_grad():
        found = task.predict(model.eval(), volume)
    return found | {"dataset": volume.dataset, "subject": volume.subject, "id": volume.id}


def scores(task, rows):
    clusters, functions = task.score_functions(rows)
    return {name: float(f(np.ones((1, len(clusters))))[0]) for name, f in functions.items()}


class Told(torch.nn.Module):
    """Knows the classes: bright voxels are class 1, dark ones class 2."""

    def __init__(self, right=True):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(20.0 if right else -20.0))

    def forward(self, x):
        return [torch.cat([torch.full_like(x, 20.0), self.factor * x, -self.factor * x], dim=1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return a_store(tmp_path_factory.mktemp("blobs") / "blobs.h5", blobs())


# Sparse annotation --------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["random", "equidistant"])
def test_sparse_slices_are_nested_on_objects_and_the_same_again(choice):
    occupied = np.zeros(40, bool)
    occupied[8:29] = True
    before = set()
    for number in (1, 2, 4, 8, 21, 30, 99):
        found = sparse_slices(occupied, number, choice, (3, "d", "a"))
        assert len(found) == min(number, 40) and (np.diff(found) > 0).all()
        assert before <= set(found) and (number > 21 or occupied[found].all())
        assert np.array_equal(found, sparse_slices(occupied, number, choice, (3, "d", "a")))
        before = set(found)
    assert sparse_slices(np.zeros(9, bool), 2, choice, (0,)).shape == (2,)


def test_equidistant_slices_are_middle_and_quarters_and_random_ones_differ_by_volume():
    occupied = np.zeros(40, bool)
    occupied[8:24] = True
    assert sparse_slices(occupied, 1, "equidistant", ()).tolist() == [16]
    assert sparse_slices(occupied, 3, "equidistant", ()).tolist() == [12, 16, 20]
    chosen = {int(sparse_slices(occupied, 1, "random", (0, n))[0]) for n in range(40)}
    assert len(chosen) > 8


def test_crops_hold_an_annotated_slice_and_targets_only_annotated_voxels(data):
    for number, oversample in ((1, 0.0), (2, 1.0), (2, 0.4)):
        config = SegmentationConfig(patch=(6, 12, 10), sparse_slices=number, oversample=oversample, **PLAIN)
        task = Segmentation(config, data)
        for volume in data:
            slices = task.annotated_slices(volume)
            assert len(slices) == number and ((slices >= 5) & (slices < 15)).all()
            for seed in range(12):
                target = task.draw(volume, np.random.default_rng(seed))["target"]
                assert target.shape == (6, 12, 10) and target.dtype == torch.int16
                known = (target != IGNORE).flatten(1)
                assert 1 <= known.any(1).sum() <= number
                assert (known.all(1) == known.any(1)).all()
                if oversample == 1:
                    assert (target > 0).any()
    assert (
        Segmentation(config, data).settings()["annotated"]["made/v000"]
        == task.annotated_slices(data[0]).tolist()
    )


def test_validation_subjects_are_annotated_on_a_few_slices_too(data):
    """What is kept is chosen on no more labels than a person with time for two slices has drawn."""
    few = Segmentation(SegmentationConfig(patch=(16, 16, 16), width=4, sparse_slices=2), data)
    whole = Segmentation(SegmentationConfig(patch=(16, 16, 16), width=4), data)
    model = few.model(encoder_of(), data).eval()
    with torch.inference_mode():
        chosen, scored = few.predict_for_choosing(model, data), few.predict_all(model, data)
        assert whole.predict_for_choosing(model, data) == whole.predict_all(model, data) == scored
        found = [few.labels(model, volume) for volume in data]
    for volume, row, labels in zip(data, chosen, found, strict=True):
        slices = few.annotated_slices(volume)
        truth = volume.read_mask().numpy()[slices]
        assert row["voxels"] == {
            str(value): [int((labels[slices] == k).sum()), int((truth == value).sum())]
            for k, value in ((1, 1), (2, 4))
        }


def test_a_class_that_no_mask_has_is_refused(data):
    with pytest.raises(DataError, match="none of the 4 masks has the value 300; they have 0 1 4"):
        Segmentation(SegmentationConfig(classes=(0, 1, 300)), data)
    with pytest.raises(ValueError, match="ignore: 1 is one of the classes"):
        SegmentationConfig(classes=(0, 1), ignore=1)


def test_masks_of_unannotated_slices_are_never_used(tmp_path, data):
    config = SegmentationConfig(patch=(16, 16, 16), sparse_slices=2, stages=2, coarse=(8, 8, 8))
    task = Segmentation(config, data)
    poisoned = []
    for volume, (subject, image, mask) in zip(data, blobs()):
        other = np.random.default_rng(0).choice([1, 4], mask.shape)
        other[~mask.any(axis=(1, 2))] = 0  # which slices hold objects is what the annotator is shown
        slices = task.annotated_slices(volume)
        other[slices] = mask[slices]
        poisoned.append((subject, image, other))
    bad = a_store(tmp_path / "bad.h5", poisoned)
    again = Segmentation(config, bad)
    model = task.model(encoder_of(norm="group"), data)
    for step in range(3):
        clean, dirty = batch_of(task, data, step), batch_of(again, bad, step)
        assert all(torch.equal(clean[name], dirty[name]) for name in clean)
        losses = [t.loss(model, b, one_group(step, 4))[0] for t, b in ((task, clean), (again, dirty))]
        assert torch.equal(*losses) and losses[0] > 0
    trivial = [t.predict_trivial("average mask", d, d, data, 0) for t, d in ((task, data), (again, bad))]
    assert trivial[0] == trivial[1]


def test_what_is_asked_of_the_encoder_holds_in_both_stages(data):
    task = Segmentation(SegmentationConfig(patch=(16, 16, 16), stages=2, coarse=(8, 8, 8)), data)
    model = task.model(encoder_of(), data)
    groups = parameter_groups(model, 0.5, 0.1)
    scales = {name: group["scale"] for group in groups for name in group["names"]}
    assert scales["encoder.conv1.weight"] == scales["coarse.encoder.conv1.weight"] == 0.5**5
    assert {scale for name, scale in scales.items() if name.startswith("coarse.head")} == {1.0}
    calm = freeze(model, "all", False)
    assert {id(one) for one in calm} == {id(model.encoder), id(model.coarse.encoder)}
    assert not any(p.requires_grad for name, p in model.named_parameters() if "encoder." in name)
    assert all(p.requires_grad for name, p in model.named_parameters() if "head." in name)


def test_voxels_that_nobody_annotated_count_in_no_score(tmp_path):
    (subject, image, mask), *_ = blobs(1)
    mask[:, :, 12:] = 255
    data = a_store(tmp_path / "a.h5", [(subject, image, mask)])
    task = Segmentation(SegmentationConfig(patch=(16, 16, 16), ignore=255), data)
    assert task.values == (0, 1, 4)

    class Wrong(torch.nn.Module):
        def forward(self, x):
            return [torch.cat([Told()(x)[0][:, :1], Told()(x)[0][:, 1:]], dim=1)]

    image[:, :, 12:] = 9  # never seen by the score
    found = row(task, Told(), data[0])
    assert found["dice"]["1"] > 0.98
    assert task.draw(data[0], np.random.default_rng(0))["target"].min() == IGNORE
    plain = Segmentation(SegmentationConfig(patch=(16, 16, 16), classes=(0, 4)), data)
    assert plain.names == ("0", "4")  # values that are not named are background


def a_store_of_nnunet(path, dataset, ignored, settings):
    """Two of `blobs` in a data set; unannotated voxels have the value `ignored`."""
    for number, (subject, image, mask) in enumerate(blobs(2)):
        mask[:, :, 12:] = ignored
        record = Record(
            id=f"{dataset}{number}", dataset=dataset, subject=f"{dataset}{subject}", spacing=(2.0, 1.0, 1.0)
        )
        write_part(Path(f"{path}.partial"), record.id, record, np.float32(image)[None], mask=mask)
    assemble(Path(f"{path}.partial"), path, settings, [])
    return path


def test_what_a_data_set_ignores_counts_in_no_loss_and_no_score(tmp_path):
    paths = [
        a_store_of_nnunet(tmp_path / f"{name}.h5", name, value, {"mask_ignore": {name: value, "other": 1}})
        for name, value in (("A", 3), ("B", 9))
    ]
    paths.append(a_store_of_nnunet(tmp_path / "C.h5", "C", 0, {}))
    data = open_data(paths)
    config = SegmentationConfig(patch=(20, 24, 22), oversample=0.0, **PLAIN)
    task = Segmentation(config, data)
    assert task.values == (0, 1, 4)
    assert task.settings()["ignored"] == {"A": 3, "B": 9} and task.settings()["ignore"] == -1
    batch = batch_of(task, data)
    for volume, target in zip(data, batch["target"], strict=True):
        right = target[..., 12:22]
        assert (right == IGNORE).all() if volume.dataset != "C" else (right[:20] != IGNORE).any()
        assert (target[..., :12] >= 0).any()
    told = Told()
    rng = np.random.default_rng(0)
    first = data.select(np.flatnonzero(np.asarray(data.datasets) == "A"))
    clean = batch_of(task, first)
    dirty = {**clean, "image": clean["image"].clone()}
    dirty["image"][clean["target"][:, None] == IGNORE] = torch.from_numpy(
        rng.normal(size=int((clean["target"] == IGNORE).sum())).astype(np.float32) * 50
    )
    losses = [task.loss(told, batch, one_group(0, 2))[0] for batch in (clean, dirty)]
    assert torch.equal(*losses) and losses[0] > 0

    class Everywhere(Told):
        def forward(self, x):
            (logits,) = super().forward(x)
            logits[:, 1, :, :, 12:] = 99  # a class where nobody has annotated anything
            return [logits]

    scored = [row(task, network, first[0])["voxels"] for network in (Told(), Everywhere())]
    assert scored[0] == scored[1]
    asked = Segmentation(SegmentationConfig(patch=(20, 24, 22), ignore=-1), data)
    assert asked.values == (0, 1, 3, 4, 9)  # what is asked for goes above what the stores say


def test_structures_that_overlap_are_refused_by_name_unless_values_are_named(tmp_path):
    regions = [{"name": "whole", "values": [1, 4], "class": 1}, {"name": "core", "values": [4], "class": 2}]
    path = a_store_of_nnunet(tmp_path / "a.h5", "tumours", 0, {"mask_regions": {"tumours": regions}})
    data = open_data([path])
    with pytest.raises(DataError, match=r"tumours: .*\(whole, core\).*--segmentation.classes 0 1 4 to"):
        Segmentation(SegmentationConfig(), data)
    assert Segmentation(SegmentationConfig(classes=(0, 1, 4)), data).values == (0, 1, 4)


# Crops --------------------------------------------------------------------------------------------


def test_a_third_of_the_crops_lies_on_objects():
    annotation = Annotation(None, (2, 2, 2, 4, 4, 4), {1: np.array([[2, 3, 3]], np.int16)})
    rng = np.random.default_rng(0)
    starts = np.array([place_patch((64, 64, 64), (8, 8, 8), annotation, 1 / 3, rng) for _ in range(600)])
    on = ((starts <= 2) & (starts > 2 - 8 + 1)).all(axis=1)
    assert 0.26 < on.mean() < 0.42
    assert starts.min() == 0 and starts.max() == 56
    assert place_patch((4, 64, 8), (8, 8, 8), annotation, 0, rng)[::2] == (-2, 0)
    inside = np.array(
        [place_patch((64,) * 3, (8,) * 3, annotation, 0, rng, (10, 20, 30, 14, 40, 60)) for _ in range(200)]
    )
    assert inside[:, 0].min() == 6 and inside[:, 0].max() == 10  # round a smaller box
    assert inside[:, 1].min() == 20 and inside[:, 1].max() == 32  # within a larger one


def test_crops_are_read_with_their_margin_and_outside_is_unknown(data):
    task = Segmentation(SegmentationConfig(patch=(48, 48, 48)), data)
    assert task.patch == (24, 24, 24)  # no larger than the volumes, up to a multiple of 8
    example = task.draw(data[0], np.random.default_rng(0))
    assert example["image"].shape[1:] == example["target"].shape > (24, 24, 24)
    known = example["target"] != IGNORE
    assert known.sum() == 20 * 24 * 22
    loss, values = task.loss(task.model(encoder_of(), data), batch_of(task, data), one_group(0, 4))
    assert loss.isfinite() and set(values) == {"ce", "dice_loss", "dice"}


def test_values_that_are_not_named_are_background_and_may_be_large():
    table = class_table((0, 2, 7), 5)
    mask = np.array([[0, 2, 7], [5, 3, 900], [8, 6, -4]])
    assert class_indices(table, mask).tolist() == [[0, 1, 2], [-1, 0, 0], [0, 0, 0]]


def test_places_of_large_objects_are_drawn_evenly(tmp_path):
    mask = np.ones((70, 40, 40), np.int64)
    mask[:2] = 2
    data = a_store(tmp_path / "a.h5", [("a", np.random.default_rng(0).normal(size=mask.shape), mask)])
    found = annotate(data[0], class_table((0, 1, 2), -1), 0, "random", 0)
    assert found.box == (0, 0, 0, 70, 40, 40) and set(found.places) == {1, 2}
    assert len(found.places[1]) == 1000
    share = np.histogram(found.places[1][:, 0], [2, 32, 64, 70])[0] / 1000
    assert np.allclose(share, [30 / 68, 32 / 68, 6 / 68], atol=0.06)


# Learning -----------------------------------------------------------------------------------------


def by_heart(tmp_path, steps, **options):
    data = open_data([phantom_store(1, shape=(20, 24, 24), folder=tmp_path)])
    task = Segmentation(SegmentationConfig(patch=(24, 24, 24), width=16, **options, **PLAIN), data)
    model = task.model(encoder_of(), data)
    train(task, model, data, steps, batch=1, lr=1e-2)
    return row(task, model, data[0])["dice"]


def test_it_learns_one_phantom_by_heart(tmp_path):
    found = by_heart(tmp_path, 90, classes=(0, 1, 2))
    assert min(found.values()) > 0.95, found


@pytest.mark.slow
def test_it_learns_a_phantoms_lesions_of_a_few_voxels_too(tmp_path):
    found = by_heart(tmp_path, 400)
    assert min(found.values()) > 0.95, found


def test_two_stages_find_a_small_object_in_a_large_volume(tmp_path):
    rng = np.random.default_rng(0)
    volumes = []
    for number in range(4):
        image, mask = rng.normal(size=(48, 64, 64)) * 0.3, np.zeros((48, 64, 64), np.int64)
        corner = rng.integers(4, 36, 3)
        cut = tuple(slice(int(c), int(c) + 8) for c in corner)
        mask[cut], image[cut] = 1, image[cut] + 4
        volumes.append((f"p{number}", image, mask))
    data = a_store(tmp_path / "small.h5", volumes)
    config = SegmentationConfig(patch=(16, 16, 16), width=8, stages=2, coarse=(16, 16, 16), **PLAIN)
    task = Segmentation(config, data)
    model = task.model(
        encoder_of(stem_stride=(1, 1, 1), stage_strides=((1,) * 3, (2,) * 3, (1,) * 3, (1,) * 3)), data
    )
    train(task, model, data, 50, lr=1e-2)
    for volume in data:
        found = row(task, model, volume)
        assert found["dice"]["1"] > 0.85
        z1, y1, x1, z2, y2, x2 = found["region"]
        assert (z2 - z1) * (y2 - y1) * (x2 - x1) < 0.1 * 48 * 64 * 64


def test_slicewise_the_encoder_is_a_2d_network(data):
    task = Segmentation(SegmentationConfig(patch=(16, 24, 16), slicewise=True, width=8, **PLAIN), data)
    assert task.patch == (1, 24, 16)

    class Seen(Encoder):
        channels, strides, embed_dim = (1,), ((1, 1, 1),), 1
        config = ResNet10.Config()

        def forward(self, x):
            assert x.shape[2] == 1
            return [x]

    model = task.model(Seen(), data)
    task.loss(model, batch_of(task, data), one_group(0, 4))[0].backward()
    assert task.labels(model.eval(), data[0]).shape == data[0].shape[1:]
    # What is predicted of a slice depends on that slice alone.
    network = task.model(encoder_of(), data).eval()
    whole = task.labels(network, data[0])

    def blanked(start, size):
        crop = data[0].read(start, size)
        crop[:, : 7 - start[0]] = crop[:, 8 - start[0] :] = 0
        return crop

    volume = data[0]
    volume.read = blanked
    again = task.labels(network, volume)
    assert np.array_equal(again[7], whole[7])
    assert not np.array_equal(again[8], whole[8])


@pytest.mark.parametrize("head", ["med3d", "denseaspp", "linear"])
def test_every_head_can_be_chosen_and_is_made_anew_by_the_seed(head, data):
    task = Segmentation(SegmentationConfig(head=head, width=4, patch=(16, 16, 16)), data)
    models = []
    for seed in (0, 0, 1):
        encoder = encoder_of()
        torch.manual_seed(seed)
        models.append(task.model(encoder, data))
        assert models[-1].encoder is encoder
    weights = [torch.cat([p.flatten() for p in m.head.parameters()]) for m in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    loss, _ = task.loss(models[0], batch_of(task, data[:2]), BatchRng(0, [0, 1], 2))
    loss.backward()


# Predictions and scores ---------------------------------------------------------------------------


def test_a_perfect_prediction_scores_1_and_its_opposite_0(data):
    task = Segmentation(SegmentationConfig(patch=(16, 16, 16), mirror=True, flip_axes=(0, 1, 2)), data)
    rows = [row(task, Told(), volume) for volume in data]
    found = scores(task, rows)
    assert found["dice"] > 0.99 and found["surface_dice"] > 0.99 and found["hd95"] < 0.5
    assert set(found) == {f"{m}{k}" for m in ("dice", "hd95", "surface_dice") for k in ("", "_1", "_4")}
    assert scores(task, [row(task, Told(False), v) for v in data])["dice"] < 0.05
    assert rows[0]["voxels"]["1"][1] == 7 * 7 * 8


def test_volumes_of_a_subject_are_averaged_and_undefined_classes_left_out(data):
    task = Segmentation(SegmentationConfig(patch=(16, 16, 16)), data)
    values = [("a", 1.0, None), ("a", 0.5, None), ("b", 0.0, 0.6)]
    rows = [
        {"dataset": "d", "subject": s, "id": str(n)}
        | {m: {"1": one, "4": other} for m in ("dice", "hd95", "surface_dice")}
        for n, (s, one, other) in enumerate(values)
    ]
    clusters, functions = task.score_functions(rows)
    assert clusters.tolist() == ["d\ta", "d\tb"]
    found = scores(task, rows)
    assert found["dice_1"] == pytest.approx(0.375) and found["dice_4"] == pytest.approx(0.6)
    assert found["dice"] == pytest.approx((0.375 + 0.6) / 2)
    only_a = functions["dice"](np.array([[1.0, 0.0]]))
    assert only_a[0] == pytest.approx(0.75)


def test_the_average_mask_knows_where_objects_usually_are(data):
    task = Segmentation(SegmentationConfig(patch=(16, 16, 16)), data)
    rows = task.predict_trivial("average mask", data[:2], data[:0], data[2:], 0)
    assert [r["id"] for r in rows] == ["v002", "v003"]
    assert scores(task, rows)["dice"] > 0.9  # the boxes never move here


def test_a_prediction_is_written_with_mask_values(tmp_path, data):
    import nibabel

    task = Segmentation(SegmentationConfig(patch=(16, 16, 16)), data)
    path = task.save_prediction(Told(), data[0], tmp_path / "new")
    assert path.name == "made_v000_stored_grid.nii.gz"  # the record has no source
    written = np.asarray(nibabel.load(path).dataobj)
    assert written.shape == (22, 24, 20) and set(np.unique(written)) == {0, 1, 4}
    mask = data[0].read_mask().numpy()
    assert (mask == written.T).mean() > 0.99


def test_a_picture_shows_truth_beside_prediction(tmp_path, data):
    task = Segmentation(SegmentationConfig(patch=(16, 16, 16)), data)
    path = tmp_path / "p.png"
    rows = [{"dice": {"1": value, "4": None}} for value in (0.8, None, 0.3, 0.9)]
    figure = task.picture(Told(), data[:4], rows)
    words = [text.get_text() for panel in figure.axes for text in panel.texts]
    ids = [volume.id.split("/")[-1] for volume in data[:4]]
    assert [word for word in words if "Dice" not in word] == [f"median: {ids[0]}", f"worst: {ids[2]}"]
    titles = [panel.get_title() for panel in figure.axes]
    assert titles[:2] == ["axial, truth", "axial, predicted"] and len(titles) == 12 and not titles[6]
    figure.savefig(path)
    assert path.stat().st_size > 5000


def test_the_task_pickles_for_workers_and_draws_the_same(data):
    task = Segmentation(SegmentationConfig(patch=(16, 16, 16), stages=2, coarse=(8, 8, 8)), data)
    task.draw(data[0], np.random.default_rng(0))
    again = pickle.loads(pickle.dumps(task))
    one, other = (t.draw(data[0], np.random.default_rng(1)) for t in (task, again))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_loss_in_parts_of_the_global_batch_draws_the_same_augmentation(data):
    task = Segmentation(SegmentationConfig(patch=(16, 16, 16), chance=1.0), data)
    seen = []

    class Keep(Told):
        def forward(self, x):
            seen.append(x.detach().clone())
            return super().forward(x)

    batch = batch_of(task, data)
    task.loss(Keep(), batch, BatchRng(5, range(4), 4))
    for rows in ([0, 1], [2, 3]):
        part = {name: value[rows] for name, value in batch.items()}
        task.loss(Keep(), part, BatchRng(5, rows, 4))
    assert torch.allclose(seen[0], torch.cat(seen[1:]), atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch", (0, 1, 1)),
        ("oversample", 1.5),
        ("overlap", 1.0),
        ("classes", (1, 2)),
        ("axes", (3,)),
        ("sparse_slices", -1),
        ("torchio", ("RandomMotion",)),
        ("width", 1),
    ],
)
def test_options_that_cannot_be_used_are_named(field, value):
    with pytest.raises(ValueError, match=field.replace("torchio", "torchio")):
        SegmentationConfig(**{field: value})


def test_data_without_masks_is_refused(tmp_path):
    for number in range(2):
        record = Record(id=f"v{number}", dataset="d", subject=str(number))
        write_part(
            tmp_path / "a.h5.partial", record.id, record, np.random.rand(1, 8, 8, 8).astype(np.float32)
        )
    assemble(tmp_path / "a.h5.partial", tmp_path / "a.h5", {}, [])
    with pytest.raises(
        DataError, match=r"none of the 2 volumes has a mask; .*column `mask` .*--masks seg.*nnU-Net"
    ):
        Segmentation.known(SegmentationConfig(), open_data([tmp_path / "a.h5"]))
    empty = a_store(tmp_path / "b.h5", [("a", np.random.rand(8, 8, 8), np.zeros((8, 8, 8), np.int64))])
    with pytest.raises(DataError, match="empty"):
        Segmentation(SegmentationConfig(), empty)


def test_the_command_trains_scores_and_writes_predictions(tmp_path, capsys):
    import json

    from ssl3d.cli import main

    store = phantom_store(16, shape=(12, 16, 16), folder=tmp_path)
    arguments = ["finetune", "scratch:resnet10:width=4", "--data", str(store), "--task", "segmentation"]
    options = {"steps": 2, "batch_size": 2, "eval_at": 1, "threads": 1, "out": tmp_path / "o"}
    options |= {"segmentation.width": 4, "segmentation.sparse_slices": 1}
    arguments += ["--save_predictions", *(part for k, v in options.items() for part in (f"--{k}", str(v)))]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "average mask" in shown and "dice" in shown
    records = [json.loads(p.read_text(encoding="utf-8")) for p in (tmp_path / "o").rglob("*.json")]
    records = [one for one in records if one.get("task") == "finetune-segmentation/masks"]
    assert records and all("surface_dice_2" in one["scores"] for one in records)
    assert all(len(s) == 1 for s in records[0]["settings"]["task"]["annotated"].values())
    assert list((tmp_path / "o").rglob("*.nii.gz"))


def test_numbers_of_annotated_slices_are_trained_one_after_the_other(tmp_path, capsys):
    import json

    from ssl3d.cli import main

    store, out = phantom_store(16, shape=(12, 16, 16), folder=tmp_path), tmp_path / "o"
    arguments = ["finetune", "scratch:resnet10:width=4", "--data", str(store), "--task", "segmentation"]
    arguments += [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--eval-at",
        "1",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    arguments += ["--segmentation.width", "4", "--no-trivial"]
    assert main([*arguments, "--sparse-slices", "1", "3", "all"]) == 0
    text = (out / "table.txt").read_text(encoding="utf-8")
    assert text.index("subjects, ") < text.index("(3 annotated slices") < text.index("(1 annotated slice ")
    assert len(list(out.glob("slices-*.png"))) == 1
    records = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")]
    numbers = {one["settings"]["task"]["sparse_slices"]: one for one in records}
    assert sorted(numbers) == [0, 1, 3]
    annotated = numbers[3]["settings"]["task"]["annotated"]
    assert {len(slices) for slices in annotated.values()} == {3}
    capsys.readouterr()
    assert main([*arguments, "--segmentation.sparse_slices", "3"]) == 0  # the same record
    assert "record found" in capsys.readouterr().err
    assert len(list(out.glob("*.json"))) == 3
    report = ["leaderboard", "report", str(out), "--out", str(tmp_path / "report"), "--resamples", "100"]
    assert main(report) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "No record was refused." in text and "3 annotated slices a volume" in text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--sparse-slices", "0"], "slices: '0' must be a number from 1, or all"),
        (["--sparse-slices", "2", "2"], "slices: 2 2; give each once"),
        (["--sparse-slices", "1", "--task", "classification"], "use --task segmentation"),
    ],
)
def test_wrong_numbers_of_annotated_slices_are_one_clear_line(tmp_path, capsys, extra, message):
    from ssl3d.cli import main

    arguments = ["finetune", "scratch:resnet10:width=4", "--data", "phantoms:8", "--task", "segmentation"]
    assert main([*arguments, "--out", str(tmp_path / "o"), *extra]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_mask_value_of_one_subject_alone_is_told(tmp_path, capsys):
    from ssl3d.data.open import open_data
    from ssl3d.data.store.record import Record
    from ssl3d.data.store.writer import assemble, write_part
    from ssl3d_benchmarks.finetune.segmentation.data import mask_values
    from ssl3d_benchmarks.task import mask_names

    rng = np.random.default_rng(0)
    for k in range(6):
        mask = rng.integers(0, 3, (4, 8, 8)).astype(np.uint8)
        if k == 4:
            mask[0, 0, 0] = 255
        image = rng.normal(size=(1, 4, 8, 8)).astype(np.float32)
        entry = Record(id=f"v{k}", dataset="made", subject=f"p{k // 2 if k < 4 else k}")
        write_part(tmp_path / "s.partial", f"{k}", entry, image, mask=mask)
    assemble(tmp_path / "s.partial", tmp_path / "s.h5", {}, [])
    data = open_data([tmp_path / "s.h5"])
    told = "mask value 255 is in the mask of one subject alone (v4)"
    assert mask_names(data) == ("0", "1", "2", "255")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(told)
    assert mask_values(data, -1, tell=True) == (0, 1, 2, 255)
    assert "--segmentation.ignore" in capsys.readouterr().err
    assert mask_values(data, 255, tell=True) == (0, 1, 2)
    assert not capsys.readouterr().err
