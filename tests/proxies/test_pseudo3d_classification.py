"""pseudo3d_classification: what the encoder is shown, the loss, what must not be learned, errors."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import ssl3d
from ssl3d import cli
from ssl3d.api import (
    BatchRng,
    DataError,
    Encoder,
    UsageError,
    load_encoder,
    numpy_rng,
    one_group,
    open_data,
)
from ssl3d.checkpoint.proxies import load_proxies
from ssl3d.data.open import prepare_options_of
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d_proxies.pseudo3d_classification import (
    Pseudo3DClassification,
    Pseudo3DClassificationConfig,
    resized_crops,
    shuffle_slices,
)

FLAT = ((1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
NAME = "pseudo3d_classification"
WHOLE = {"crop": 16, "side": 16, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}


class Seen(Encoder):
    """Keeps what it is shown; its embedding is the mean of each slice."""

    channels, strides, embed_dim, config = (3,), ((1, 1, 1),), 3, None

    def forward(self, x):
        self.shown = x
        return [x.transpose(1, 2)]


def collection(folder, images, labels, split=None):
    """A store of pictures (C, D, H, W)."""
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        record = Record(f"p/{n}", "p", f"s{n}", label=label, split=split[n] if split else "")
        write_part(folder / "parts", f"{n:03d}", record, np.asarray(image, np.float32))
    assemble(folder / "parts", folder / "store.h5", {}, [])
    return open_data([folder / "store.h5"])


def noise(count, shape=(3, 1, 20, 24), seed=0):
    return np.random.default_rng(seed).uniform(0, 1, (count, *shape)).astype(np.float32)


def patterns(count, seed=0):
    """Pictures of three kinds: bars that lie, bars that stand, chequers; place and colours at random."""
    rng = np.random.default_rng(seed)
    images = []
    for n in range(count):
        rows, columns = (np.indices((24, 28)) + rng.integers(0, 8, (2, 1, 1))) // 4 % 2
        kind = (rows, columns, (rows + columns) % 2)[n % 3]
        images.append(
            np.clip(kind * rng.uniform(0.4, 0.7, (3, 1, 1, 1)) + rng.uniform(0, 0.3, (3, 1, 24, 28)), 0, 1)
        )
    return images, [("lie", "stand", "chequer")[n % 3] for n in range(count)]


def made(data, encoder=None, **options):
    torch.manual_seed(0)
    proxy = Pseudo3DClassification(Pseudo3DClassificationConfig(**options), encoder or Seen())
    proxy.setup(data)
    return proxy


def batch_of(proxy, data):
    drawn = [proxy.draw(proxy.config, volume, numpy_rng("test", volume.index)) for volume in data]
    return {key: torch.stack([one[key] for one in drawn]) for key in drawn[0]}


# What the encoder is shown -------------------------------------------------------------------------


def test_colours_are_three_slices_of_one_channel(tmp_path):
    images = noise(4, (3, 1, 16, 16))
    data = collection(tmp_path, images, [0, 1, 0, 1])
    proxy = made(data, **WHOLE).eval()
    proxy(batch_of(proxy, data), one_group(0, 4))
    assert proxy.encoder.shown.shape == (4, 1, 3, 16, 16)
    expected = (images[:, :, 0] * 255 - 114.495) / 57.63
    np.testing.assert_allclose(proxy.encoder.shown[:, 0].numpy(), expected, atol=5e-3)  # half precision


def test_every_map_of_the_papers_encoder_has_three_slices(tmp_path):
    data = collection(tmp_path, noise(2), [0, 1])
    own = {"stem_stride": (1, 2, 2), "stem_pool": True, "pool_stride": (1, 2, 2), "stage_strides": FLAT}
    config = ResNet10.Config(width=8, kind="3d", **own)
    proxy = made(data, ResNet10(config), crop=32)
    shapes = []
    proxy.encoder.register_forward_hook(lambda module, inputs, maps: shapes.extend(m.shape for m in maps))
    proxy(batch_of(proxy, data), one_group(0, 2))
    assert [shape[2] for shape in shapes] == [3] * 5
    assert shapes[-1] == (2, 64, 3, 1, 1)


def test_the_slices_of_each_picture_are_shuffled_while_training_only(tmp_path):
    data = collection(tmp_path, noise(60, (3, 1, 16, 16)), [n % 2 for n in range(60)])
    proxy = made(data, **WHOLE)
    batch = batch_of(proxy, data)
    original = (batch["slices"][:, 0] - proxy.config.mean) / proxy.config.std
    proxy.train()(batch, one_group(0, 60))
    orders = set()
    for mine, shown in zip(original, proxy.encoder.shown[:, 0], strict=True):
        order = tuple(next(k for k in range(3) if torch.allclose(mine[k], one, atol=1e-4)) for one in shown)
        assert sorted(order) == [0, 1, 2]
        orders.add(order)
    assert len(orders) == 6
    proxy.eval()(batch, one_group(1, 60))
    torch.testing.assert_close(proxy.encoder.shown[:, 0], original)


def test_shuffling_has_its_probability():
    x = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(3000, 1, 3, 4, 4)
    untouched = (shuffle_slices(x, one_group(0, 3000), 0.3) == x).flatten(1).all(1).float().mean()
    assert abs(float(untouched) - (0.7 + 0.3 / 6)) < 0.03
    assert torch.equal(shuffle_slices(x, one_group(0, 3000), 0.0), x)


def test_pictures_are_mirrored_left_and_right_at_random(tmp_path):
    data = collection(tmp_path, noise(30, (3, 1, 16, 16)), [n % 2 for n in range(30)])
    proxy = made(data, **{**WHOLE, "flip": 0.5, "shuffle": 0.0}).train()
    batch = batch_of(proxy, data)
    proxy(batch, one_group(0, 30))
    plain = (batch["slices"] - proxy.config.mean) / proxy.config.std
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(proxy.encoder.shown, plain, strict=True)]
    mirrored = [
        torch.allclose(a.flip(-1), b, atol=1e-4) for a, b in zip(proxy.encoder.shown, plain, strict=True)
    ]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 5 < sum(same) < 25


def test_in_evaluation_it_is_the_middle(tmp_path):
    data = collection(tmp_path, noise(2, (3, 1, 16, 16)), [0, 1])
    proxy = made(data, crop=10, side=16).eval()
    batch = batch_of(proxy, data)
    proxy(batch, one_group(0, 2))
    expected = (batch["slices"][..., 3:13, 3:13] - proxy.config.mean) / proxy.config.std
    torch.testing.assert_close(proxy.encoder.shown, expected)


def test_the_square_is_cut_along_the_longer_side_and_resized_as_torchvision_does(tmp_path):
    from torchvision.transforms.functional import resize

    image = noise(1, (3, 1, 20, 50))
    data = collection(tmp_path, [*image, image[0].transpose(0, 1, 3, 2)], [0, 1])
    config = Pseudo3DClassificationConfig(crop=14)
    assert config.square == 16
    whole = torch.from_numpy(image[0, :, 0])
    squares = [resize(whole[:, :, x : x + 20], [16, 16], antialias=True) for x in range(31)]
    places = set()
    for seed in range(20):
        for volume, lying in zip(data, (True, False), strict=True):
            slices = Pseudo3DClassification.draw(config, volume, numpy_rng(seed))["slices"]
            assert slices.shape == (1, 3, 16, 16)
            mine = slices[0] if lying else slices[0].transpose(1, 2)
            errors = [float((mine - square).abs().max()) for square in squares]
            assert min(errors) < 2e-3
            places.add(int(np.argmin(errors)))
    assert len(places) > 10


def box_of(crop, side):
    """First pixel and length along an axis, from a crop of a ramp of pixel numbers."""
    n = len(crop)
    step = float(crop[n - n // 4 - 1] - crop[n // 4]) / (n - 2 * (n // 4) - 1)
    return float(crop[n // 2] - (n // 2 + 0.5) * step + 0.5), step * n


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.3, 0.6)])
def test_crops_are_torchvisions_random_resized_crops(scale):
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms.functional import resized_crop

    side, crop, count = 40, 35, 600
    rows = torch.arange(float(side)).view(-1, 1).expand(side, side)
    texture = torch.rand(side, side, generator=torch.Generator().manual_seed(0))
    x = torch.stack([rows, rows.T, texture])[None, None].expand(count, 1, 3, side, side)
    shown = resized_crops(x, one_group(0, count), crop, scale, (3 / 4, 4 / 3))[:, 0]
    areas, ratios, tops = [], [], []
    for one in shown:
        top, height = box_of(one[0, :, crop // 2], side)
        left, width = box_of(one[1, crop // 2], side)
        box = [round(value) for value in (top, left, height, width)]
        np.testing.assert_allclose([top, left, height, width], box, atol=1e-2)
        assert min(box[:2]) >= 0 and box[0] + box[2] <= side and box[1] + box[3] <= side
        theirs = resized_crop(texture[None], *box, [crop, crop], antialias=False)[0]
        torch.testing.assert_close(one[2, 2:-2, 2:-2], theirs[2:-2, 2:-2], atol=1e-4, rtol=0)
        areas.append(box[2] * box[3] / side**2)
        ratios.append(math.log(box[3] / box[2]))
        tops.append(box[0] / max(1, side - box[2]))
    torch.manual_seed(0)
    boxes = [
        RandomResizedCrop.get_params(torch.zeros(1, side, side), scale, (3 / 4, 4 / 3)) for _ in range(4000)
    ]
    for mine, theirs in (
        (areas, [h * w / side**2 for _, _, h, w in boxes]),
        (ratios, [math.log(w / h) for _, _, h, w in boxes]),
        (tops, [i / max(1, side - h) for i, _, h, _ in boxes]),
    ):
        error = np.std(theirs) / np.sqrt(count)
        assert abs(np.mean(mine) - np.mean(theirs)) < 4 * error
        assert abs(np.std(mine) / np.std(theirs) - 1) < 0.15


# The loss ------------------------------------------------------------------------------------------


def test_the_loss_is_smoothed_cross_entropy(tmp_path):
    labels = ["c", "a", "b", "a"]
    data = collection(tmp_path, noise(4, (3, 1, 16, 16)), labels)
    proxy = made(data, **WHOLE, label_smoothing=0.1).eval()
    proxy.head.weight.data = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0], [-0.7, 2.0, 1.5]])
    proxy.head.bias.data = torch.tensor([0.1, -0.2, 0.4])
    batch = batch_of(proxy, data)
    output = proxy(batch, one_group(0, 4))
    means = ((batch["slices"][:, 0].mean((2, 3)) - 114.495 / 255) / (57.63 / 255)).double().numpy()
    logits = means @ proxy.head.weight.double().detach().numpy().T + [0.1, -0.2, 0.4]
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = ["abc".index(label) for label in labels]
    wanted = np.full((4, 3), 0.1 / 3)
    wanted[range(4), target] += 0.9
    assert float(output.loss.detach()) == pytest.approx(-(wanted * logs).sum(1).mean(), rel=1e-5)
    assert float(output.metrics["top1"]) == pytest.approx((logits.argmax(1) == target).mean())
    assert float(output.metrics["top5"]) == 1.0


def test_the_loss_of_two_classes_by_hand(tmp_path):
    # Logits log 3 and 0 are probabilities .75 and .25; of a smoothing of .2 each class gets .1:
    # -(.9 log .75 + .1 log .25) = .397540 for the first, -(.1 log .75 + .9 log .25) = 1.276433.
    data = collection(tmp_path, noise(2, (3, 1, 16, 16)), ["a", "b"])
    proxy = made(data, **WHOLE, label_smoothing=0.2).eval()
    proxy.head.weight.data.zero_()
    proxy.head.bias.data = torch.tensor([math.log(3.0), 0.0])
    for volume, expected in zip(data, (0.397540, 1.276433), strict=True):
        loss = proxy(batch_of(proxy, [volume]), one_group(0, 1)).loss
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)


def test_top5_counts_the_five_most_likely(tmp_path):
    data = collection(tmp_path, noise(8, (3, 1, 16, 16)), list(range(8)))
    proxy = made(data, **WHOLE).eval()
    proxy.head.weight.data.zero_()
    proxy.head.bias.data = torch.tensor([0.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    metrics = proxy(batch_of(proxy, data), one_group(0, 8)).metrics
    assert float(metrics["top1"]) == pytest.approx(1 / 8)
    assert float(metrics["top5"]) == pytest.approx(5 / 8)


def test_a_class_met_among_the_held_out_only_is_wrong_and_no_loss(tmp_path):
    data = collection(tmp_path, noise(6, (3, 1, 16, 16)), ["a", "b", "a", "b", "new", "new"])
    proxy = made(data.select(range(4)), **WHOLE).eval()
    batch = batch_of(proxy, data)
    both = proxy(batch, one_group(0, 6))
    known = proxy({key: value[:4] for key, value in batch.items()}, one_group(0, 4))
    torch.testing.assert_close(both.loss, known.loss)
    assert float(both.metrics["top1"]) == pytest.approx(float(known.metrics["top1"]) * 4 / 6)
    only = proxy({key: value[4:] for key, value in batch.items()}, one_group(0, 2))
    assert float(only.loss.detach()) == 0.0


def test_words_and_numbers_are_classes_in_their_order(tmp_path):
    data = collection(tmp_path, noise(4), ["10", "9", "9", "10"])
    assert made(data, crop=16).names == ["10", "9"]
    data = collection(tmp_path / "n", noise(4), [10, 9, 9, 10])
    assert made(data, crop=16).names == [9, 10]


def test_the_picture_names_what_is_and_what_was_said(tmp_path):
    data = collection(tmp_path, noise(3, (3, 1, 16, 16)), ["cat", "dog", "cat"])
    proxy = made(data, **WHOLE).eval()
    proxy.head.weight.data.zero_()
    proxy.head.bias.data = torch.tensor([0.0, 1.0])
    figure = proxy(batch_of(proxy, data), one_group(0, 3)).picture()
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["is cat\nsaid dog", "is dog\nsaid dog", "is cat\nsaid dog"]
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, data[0].read().numpy()[:, 0].transpose(1, 2, 0), atol=1e-5)


# What is learned -----------------------------------------------------------------------------------


def run_of(data, out):
    flat = {"kind": "3d", "stem_kernel": 3, "stem_stride": [1, 2, 2], "stage_strides": FLAT}
    return ssl3d.pretrain(
        NAME, data, out, steps=60, batch_size=16, holdout=0.3, subjects="all", eval_every=60,
        encoder="resnet10", resnet10={"width": 8, **flat}, precision="32", workers=0, threads=1,
        optimizer="adamw", lr=3e-3, **{NAME: {"crop": 20, "scale": [0.5, 1.0]}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    data = collection(folder, *patterns(90))
    return run_of(data, folder / "run")


@pytest.mark.long
def test_it_learns_classes_of_pictures_never_seen(learned):
    last = learned.metrics[-1]
    assert last[f"holdout/{NAME}/top1"] > 0.8
    assert last["online/knn_accuracy"] > last["online/knn_majority"]


@pytest.mark.long
def test_of_shuffled_labels_it_learns_nothing_that_holds(tmp_path):
    images, labels = patterns(90)
    shuffled = np.random.default_rng(3).permutation(labels).tolist()
    run = run_of(collection(tmp_path, images, shuffled), tmp_path / "run")
    assert run.metrics[-1][f"holdout/{NAME}/top1"] < 0.6


def test_the_encoder_serves_volumes_of_one_channel(learned):
    card = json.loads((learned.folder / "encoder" / "encoder.json").read_text(encoding="utf-8"))
    assert card["config"]["in_channels"] == 1
    assert card["labels_seen"] is True
    assert card["patch"] == [3, 20, 20]
    assert card["proxies"]  # with mean and std among the options
    encoder = load_encoder(learned.folder)
    assert encoder.embed(torch.randn(2, 1, 9, 20, 24)).shape == (2, 64)


def test_raw_scans_for_it_are_not_made_coloured(learned):
    encoder = load_encoder(learned.folder)
    encoder.metadata["preprocessing"] = [{"options": {"colour": "rgb", "normalize": "unit"}}]
    assert prepare_options_of([encoder]) == {"normalize": "unit"}


def test_classes_are_known_without_the_data(learned):
    assert load_proxies(learned.folder)[NAME].names == ["chequer", "lie", "stand"]


# Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([None] * 4, "none of the 4 pictures has a label"),
        (["cat"] * 4, "all 4 labelled pictures are of one class, 'cat'"),
        ([1, 2.5, 3, 4], "real values, such as 2.5, and no classes"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        made(collection(tmp_path, noise(4), labels), crop=16)


def test_coloured_volumes_are_no_pictures(tmp_path):
    data = collection(tmp_path, noise(2, (3, 5, 8, 8)), [0, 1])
    with pytest.raises(DataError, match="none of the 2 volumes is a picture"):
        made(data, crop=16)
    with pytest.raises(DataError, match="p/0: has 3 channels and depth 5"):
        Pseudo3DClassification.draw(Pseudo3DClassificationConfig(), data[0], numpy_rng(0))


def test_a_picture_without_a_label_is_set_aside(tmp_path):
    data = collection(tmp_path, noise(3), [0, 1, None])
    assert made(data, crop=16).names == [0, 1]
    with pytest.raises(DataError, match="p/2: has no label"):
        Pseudo3DClassification.draw(Pseudo3DClassificationConfig(crop=16), data[2], numpy_rng(0))


def test_an_encoder_that_strides_across_slices_is_refused(tmp_path):
    config = Pseudo3DClassificationConfig(crop=16)
    with pytest.raises(UsageError, match=r"the three slices \(by 2 2 4 8 16.*--preset pseudo3d"):
        Pseudo3DClassification(config, ResNet10(ResNet10.Config(width=8)))
    Pseudo3DClassification(
        Pseudo3DClassificationConfig(keep_depth=False), ResNet10(ResNet10.Config(width=8))
    )
    flat = ResNet10.Config(width=8, in_channels=3, stem_stride=(1, 2, 2), stage_strides=FLAT)
    with pytest.raises(UsageError, match="takes 3 channels"):
        Pseudo3DClassification(config, ResNet10(flat))


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop", 0), ("side", 100), ("scale", (0.0, 1.0)), ("scale", (0.5, 1.5)), ("ratio", (1.2, 1.3)),
     ("flip", 2.0), ("shuffle", -0.1), ("label_smoothing", 1.0), ("std", 0.0)],
)  # fmt: skip
def test_unusable_options_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}"):
        Pseudo3DClassificationConfig(**{field: value})


def test_the_preset_is_an_encoder_it_takes():
    from ssl3d.training.options import request_of

    plan = request_of(["--proxy", NAME, "--preset", "pseudo3d"]).plan
    config = plan.encoder_config
    assert (config.kind, config.stem_kernel, config.stem_pool, config.norm) == ("3d", 7, True, "batch")
    encoder = plan.encoder(config)
    assert encoder.strides == ((1, 2, 2), (1, 4, 4), (1, 8, 8), (1, 16, 16), (1, 32, 32))
    Pseudo3DClassification(plan.proxies[NAME][1], encoder)


def test_grey_pictures_are_one_clear_line(tmp_path, capsys):
    for kind in ("cat", "dog"):
        (tmp_path / "x" / kind).mkdir(parents=True)
        for i in range(4):
            image = Image.fromarray((noise(1, (20, 24), seed=i)[0] * 255).astype(np.uint8))
            image.save(tmp_path / "x" / kind / f"{kind}{i}.png")
    words = ["prepare", str(tmp_path / "x"), "--out", str(tmp_path / "s.h5"), "--workers", "0"]
    assert cli.main(words) == 0
    run = ["pretrain", "--proxy", NAME, "--preset", "pseudo3d", "--data", str(tmp_path / "s.h5")]
    assert cli.main([*run, "--out", str(tmp_path / "run"), "--steps", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "1 channel: make the store with `ssl3d prepare --colour rgb`" in error
    assert not (tmp_path / "run").exists()


def test_ranks_draw_the_same_views():
    x = torch.rand(6, 1, 3, 16, 16)
    whole = resized_crops(x, one_group(5, 6), 12, (0.1, 1.0), (0.75, 1.33))
    mine = resized_crops(x[[1, 4]], BatchRng(5, [1, 4], 6), 12, (0.1, 1.0), (0.75, 1.33))
    assert torch.equal(whole[[1, 4]], mine)
