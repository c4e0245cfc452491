"""Med3D: whose branch learns what, golden losses, balance, controls, and what its checkpoints say."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional

import ssl3d
from ssl3d.api import BatchRng, DataError, load_proxies, numpy_rng, one_group
from ssl3d.checkpoint import snapshot
from ssl3d.cli import main as cli
from ssl3d.data.open import open_data
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d.testing import check_proxy, check_ranks
from ssl3d.training.loader import Loader
from ssl3d_proxies.med3d import UNKNOWN, Med3D, Med3DConfig, dice, segmentation_loss

SMALL = (16, 16, 16)


def balls(rng, bright, shape=(24, 24, 24)):
    """Noise with a bright and a dark ball: the values of bright and dark voxels' mask are `bright`."""
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    image = rng.normal(0, 0.3, (1, *shape)).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    for shine, value in zip((1.5, -1.5), bright):
        inside = ((at - rng.integers(6, 18, 3)) ** 2).sum(-1) < 36
        image[0, inside] += shine
        mask[inside] = value
    return image, mask


def write_store(path, dataset, count, make, seed=0, unmasked=0):
    """A store of `count` people with masks, and `unmasked` without."""
    rng = np.random.default_rng(seed)
    for n in range(count + unmasked):
        image, mask = make(rng)
        record = Record(f"{dataset}/{n}", dataset, f"s{n}")
        inside = np.ones(image.shape[1:], bool)
        write_part(
            path.with_suffix(".parts"), f"{n:03d}", record, image, mask if n < count else None,
            foreground=inside,
        )  # fmt: skip
    assemble(path.with_suffix(".parts"), path, {}, [])
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Ten people whose bright ball is 2 and dark one 7; three others whose dark ball alone is labelled."""
    folder = tmp_path_factory.mktemp("stores")
    return [
        write_store(folder / "many.h5", "many", 10, lambda rng: balls(rng, (2, 7))),
        write_store(folder / "few.h5", "few", 3, lambda rng: balls(rng, (0, 1)), seed=1),
    ]


def encoder_of(seed=0, norm="batch"):
    torch.manual_seed(seed)
    strides = ((1, 1, 1),) * 4
    return ResNet10(ResNet10.Config(width=8, stem_kernel=3, stage_strides=strides, norm=norm))


def proxy_of(data, seed=0, norm="batch", **options):
    proxy = Med3D(Med3DConfig(crop=SMALL, **options), encoder_of(seed, norm))
    proxy.setup(data)
    return proxy


def group_of(data, size=8, step=0, **options):
    """A batch of the loader: crops of both data sets."""
    loader = Loader(data, {"med3d": (Med3D, Med3DConfig(crop=SMALL, **options))}, size, pin=False)
    return next(batch for batch in loader if batch.step == step).groups[0].tensors


# Losses and metric --------------------------------------------------------------------------------


def made(batch=3, classes=4, size=(4, 5, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, *size, generator=generator)
    target = torch.randint(0, classes, (batch, *size), generator=generator)
    return logits, target, torch.arange(classes) > 0


def test_cross_entropy_is_its_definition():
    logits, target, structures = made()
    by_hand = []
    for one, right in zip(logits, target):
        log_p = one - one.exp().sum(0, keepdim=True).log()
        by_hand.append(-sum(log_p[right[v], v[0], v[1], v[2]] for v in np.ndindex(4, 5, 6)) / (4 * 5 * 6))
    found = segmentation_loss(logits, target, structures, "ce")
    torch.testing.assert_close(found, torch.stack(by_hand))


def test_soft_dice_is_that_of_monai():
    from monai.losses import DiceLoss

    logits, target, structures = made()
    reference = DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1, smooth_dr=1, reduction="none"
    )
    expected = reference(logits, target.unsqueeze(1)).mean((1, 2, 3, 4))
    torch.testing.assert_close(segmentation_loss(logits, target, structures, "dice"), expected)
    ce = segmentation_loss(logits, target, structures, "ce")
    torch.testing.assert_close(segmentation_loss(logits, target, structures, "both"), expected + ce)


def test_dice_loss_by_hand():
    # Of two voxels the first is the structure; it has probability 3/4 there and 1/4 at the other.
    logits = torch.zeros(1, 2, 1, 1, 2)
    logits[0, 1, 0, 0] = torch.tensor([math.log(3), -math.log(3)])
    found = segmentation_loss(logits, torch.tensor([[[[1, 0]]]]), torch.tensor([False, True]), "dice")
    assert found.item() == pytest.approx(1 - (2 * 0.75 + 1) / (0.75 + 0.25 + 1 + 1))


@pytest.mark.parametrize("kind", ["ce", "dice", "both"])
def test_absent_structures_and_unknown_voxels_leave_the_loss_finite(kind):
    logits, target, structures = made()
    target[0], target[1] = 0, UNKNOWN
    target[2, 0] = UNKNOWN
    logits.requires_grad_()
    loss = segmentation_loss(logits, target, structures, kind)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    assert loss[1] == 0 and not logits.grad[1].any() and not logits.grad[2, :, 0].any()
    # What is left out changes nothing.
    other = logits.detach().clone()
    other[2, :, 0] += torch.randn(4, 5, 6)
    assert torch.equal(segmentation_loss(other, target, structures, kind), loss)


def test_dice_coefficients_by_hand():
    target = torch.tensor([0, 0, 1, 1, 1, 2, UNKNOWN])
    predicted = torch.tensor([0, 1, 1, 1, 0, 2, 3])
    found = dice(predicted, target, 4)
    assert found[:3].tolist() == pytest.approx([2 * 1 / (2 + 2), 2 * 2 / (3 + 3), 1.0])
    assert found[3].isnan()  # neither there nor predicted, where anything is known


# Whose branch -------------------------------------------------------------------------------------


def test_classes_are_the_values_found_in_each_data_sets_masks(stores):
    data = open_data(stores)
    proxy = proxy_of(data)
    assert proxy.names == ["many", "few"] and proxy.codes.tolist() == [0, 1]
    assert [branch.values.tolist() for branch in proxy.branches] == [[0, 2, 7], [0, 1]]
    labels = torch.tensor([0, 7, 2, 5, 200], dtype=torch.int32)
    assert proxy.branches[0].classes(labels).tolist() == [0, 2, 1, UNKNOWN, UNKNOWN]
    # A selection keeps the codes that its examples will carry.
    assert proxy_of(data.select(data.datasets == "few")).codes.tolist() == [1]


def test_what_a_checkpoint_knows_is_not_looked_for_again(stores, monkeypatch):
    data = open_data(stores)
    proxy = proxy_of(data)
    monkeypatch.setattr("ssl3d_proxies.med3d.dataset_labels", None)
    monkeypatch.setattr(data, "found", proxy.outline(), raising=False)
    again = proxy_of(data, seed=1)
    assert again.names == proxy.names and again.codes.tolist() == proxy.codes.tolist()
    again.load_state_dict(proxy.state_dict())


@pytest.mark.parametrize("head", ["paper", "conv_seg"])
def test_only_the_own_branch_learns(stores, head):
    data = open_data(stores)
    batch = group_of(data)
    proxy = proxy_of(data, head=head).train()
    for code in (0, 1):
        proxy.zero_grad(set_to_none=True)
        own = {key: value[batch["dataset"] == code] for key, value in batch.items()}
        output = proxy(own, one_group(0, len(own["crop"])))
        output.loss.backward()
        mine, other = proxy.branches[code], proxy.branches[1 - code]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mine.parameters())
        assert all(p.grad is None for p in other.parameters())
        assert set(output.metrics) == {"dice", *(f"{m}_{proxy.names[code]}" for m in ("dice", "loss"))}


def test_the_loss_is_the_mean_of_each_examples_own(stores):
    data = open_data(stores)
    batch = group_of(data, chance=0.0)
    proxy = proxy_of(data, norm="group", chance=0.0).eval()
    whole = proxy(batch, one_group(0, 8))
    alone = [
        proxy({key: value[n : n + 1] for key, value in batch.items()}, BatchRng(0, [n], 8)).loss
        for n in range(8)
    ]
    torch.testing.assert_close(whole.loss, torch.stack(alone).mean())
    by_hand = []
    maps = proxy.encoder(batch["crop"])
    for n in range(8):
        branch = proxy.branches[int(batch["dataset"][n])]
        logits = branch.out(maps[-1][n : n + 1])
        # Voxel 2 i is voxel i of a map of stride 2, and the last one holds to the end.
        fine = functional.interpolate(logits, size=[15] * 3, mode="trilinear", align_corners=True)
        fine = functional.pad(fine, (0, 1) * 3, mode="replicate")
        right = branch.classes(batch["mask"][n : n + 1])
        by_hand.append(functional.cross_entropy(fine, right))
    torch.testing.assert_close(whole.loss, torch.stack(by_hand).mean(), rtol=1e-4, atol=1e-5)
    names = [proxy.names[code] for code in batch["dataset"].tolist()]
    many = torch.stack([loss for loss, name in zip(by_hand, names) if name == "many"]).mean()
    torch.testing.assert_close(whole.metrics["loss_many"], many.detach(), rtol=1e-4, atol=1e-5)
    both = (whole.metrics["dice_many"] + whole.metrics["dice_few"]) / 2
    torch.testing.assert_close(whole.metrics["dice"], both)


def test_a_data_set_without_a_branch_is_left_out(stores):
    # As held-out subjects may be, of a data set of whose masks none is trained on.
    data = open_data(stores)
    batch = group_of(data)
    proxy = proxy_of(data.select(data.datasets == "few")).train()
    strange = {key: value[batch["dataset"] == 0] for key, value in batch.items()}
    output = proxy(strange, one_group(0, len(strange["crop"])))
    assert output.loss.item() == 0 and output.metrics["dice"] == 1 and output.picture is None
    output.loss.backward()


@pytest.mark.parametrize("options", [{}, {"head": "conv_seg", "head_norm": "group", "loss": "both"}])
def test_ranks_that_lack_a_data_set_learn_what_one_process_learns(stores, options):
    config = Med3DConfig(crop=SMALL, **options)
    check_ranks(Med3D, config, lambda: encoder_of(norm="group"), open_data(stores))


def test_the_released_head_keeps_the_contract_too(stores):
    config = Med3DConfig(crop=SMALL, head="conv_seg", loss="both")
    check_proxy(Med3D, config, encoder_of, open_data(stores), bfloat16=True)


def test_images_are_segmented_as_images(tmp_path):
    def flat(rng):
        image, mask = balls(rng, (1, 2), (12, 24, 24))
        return image[:, 6:7], mask[6:7]

    data = open_data([write_store(tmp_path / "flat.h5", "flat", 4, flat)])
    for head in ("paper", "conv_seg"):
        batch = group_of(data, 4, head=head)
        assert batch["crop"].shape[2] == 1
        proxy = proxy_of(data, head=head).train()
        output = proxy(batch, one_group(0, 4))
        output.loss.backward()
        assert output.loss.isfinite() and len(output.picture().axes) == 6


def test_the_encoders_input_and_its_target_move_alike(stores, tmp_path, monkeypatch):
    from ssl3d_proxies import med3d

    def ramps(rng):
        at = np.broadcast_to(np.arange(40, dtype=np.float32), (32, 36, 40))
        return at[None].copy(), at.astype(np.uint8)

    data = open_data([write_store(tmp_path / "ramp.h5", "ramp", 6, ramps)])
    # Well inside: at a volume's edge grey values fall steeply, and the nearest voxel's do not tell which.
    monkeypatch.setattr(med3d, "draw_labelled", lambda *_: (8, 10, 12))
    proxy = proxy_of(data, chance=1.0, flip=0.5, turn=0.5).train()
    shown, targets = [], []
    proxy.encoder.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0][:, 0]))
    kept = med3d.segmentation_loss
    monkeypatch.setattr(
        med3d,
        "segmentation_loss",
        lambda x, target, *rest: (targets.append(target), kept(x, target, *rest))[1],
    )
    batch = group_of(data, 6, chance=1.0)
    proxy(batch, one_group(0, 6))
    image, target = shown[0], targets[0]  # grey value = label = class, for a background of 0 as well
    clear = (image - image.floor() - 0.5).abs() > 0.02
    assert clear.float().mean() > 0.9 and torch.equal(target[clear], image[clear].round().long())
    proxy.eval()(batch, one_group(0, 6))
    assert torch.equal(targets[1], shown[1].round().long())
    assert (shown[0] != shown[1]).float().mean() > 0.5


# Data ---------------------------------------------------------------------------------------------


def test_data_sets_are_seen_equally_often_though_volumes_without_masks_are_set_aside(tmp_path, stores):
    some = write_store(tmp_path / "some.h5", "some", 2, lambda rng: balls(rng, (1, 2)), unmasked=3)
    data = open_data([stores[0], some])
    loader = Loader(data, {"med3d": (Med3D, Med3DConfig(crop=SMALL))}, 8, steps=12, pin=False)
    counts = np.zeros(2, int)
    for batch in loader:
        counts += np.bincount(batch.groups[0].tensors["dataset"].numpy(), minlength=2)
    assert counts.tolist() == [48, 48]
    assert sorted(loader.set_aside) == ["some/some/2", "some/some/3", "some/some/4"]
    assert set(loader.set_aside.values()) == {"it has no mask, and med3d learns from masks"}


def test_data_without_masks_are_refused_in_one_line(tmp_path, capsys):
    bare = write_store(tmp_path / "bare.h5", "bare", 0, lambda rng: balls(rng, (1, 2)), unmasked=4)
    with pytest.raises(DataError, match="none of the 4 volumes to train on has one"):
        proxy_of(open_data([bare]))
    words = [
        "pretrain",
        "--proxy",
        "med3d",
        "--data",
        str(bare),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
    ]
    assert cli(words) != 0
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0 and "med3d learns from masks" in told and "column mask" in told
    assert not (tmp_path / "run").exists()


def test_masks_of_one_value_are_refused_by_name(tmp_path, stores):
    blank = write_store(tmp_path / "blank.h5", "blank", 3, lambda rng: balls(rng, (0, 0)))
    with pytest.raises(DataError, match="masks of blank hold the value 0 alone"):
        proxy_of(open_data([stores[0], blank]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": (0, 1, 1)},
        {"head": "fcn"},
        {"head_norm": "layer"},
        {"loss": "focal"},
        {"around": 1.5},
        {"min_foreground": -0.1},
        {"torchio": ("RandomAffine",)},
        {"rotate": 200.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Med3DConfig(**wrong)


# Learning, controls, checkpoints ------------------------------------------------------------------


def train(data, steps, lr=5e-3, **options):
    """A hand-written loop on the data's first people; gives the proxy and a batch of the others."""
    people = np.unique(data.subject_codes)
    seen = np.isin(data.subject_codes, people[people % 4 != 0])
    proxy = proxy_of(data.select(seen), **options).train()
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=lr)
    loader = Loader(data.select(seen), {"p": (Med3D, proxy.config)}, 8, steps=steps, pin=False)
    for batch in loader:
        output = proxy(batch.groups[0].tensors, one_group(batch.step, 8))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    others = Loader(data.select(~seen), {"p": (Med3D, proxy.config)}, 24, steps=1, pin=False)
    return proxy.eval(), next(iter(others)).groups[0].tensors


def lift(proxy, batch):
    """Dice with the right masks, less Dice with those of other crops."""
    with torch.no_grad():
        right = proxy(batch, one_group(0, len(batch["mask"]))).metrics["dice"]
        order = torch.argsort(batch["dataset"], stable=True)
        own = {key: value[order] for key, value in batch.items()}
        scores = []
        for by in (1, 2, 3, 5):
            mask = own["mask"].clone()
            for code in own["dataset"].unique():
                rows = own["dataset"] == code
                mask[rows] = own["mask"][rows].roll(by, 0)
            scores.append(proxy(own | {"mask": mask}, one_group(0, len(mask))).metrics["dice"])
    return right.item(), right.item() - torch.stack(scores).mean().item()


def test_it_learns_every_data_sets_own_structures(stores):
    proxy, batch = train(open_data(stores), 50)
    metrics = proxy(batch, one_group(0, 24)).metrics
    assert metrics["dice_many"] > 0.6 and metrics["dice_few"] > 0.6
    right, above = lift(proxy, batch)
    assert right > 0.6 and above > 0.3


@pytest.mark.parametrize("what", ["noise", "other people's masks"])
def test_what_the_images_do_not_tell_stays_at_chance(what, tmp_path):
    def unrelated(rng):
        image, _ = balls(rng, (1, 2))
        _, mask = balls(rng, (1, 2))
        return (rng.normal(size=image.shape).astype(np.float32) if what == "noise" else image), mask

    data = open_data([write_store(tmp_path / "x.h5", "x", 12, unrelated)])
    right, above = lift(*train(data, 30, around=1.0, loss="both"))
    assert abs(above) < 0.05, (right, above)


def test_checkpoints_say_that_labels_were_seen_and_rebuild_the_branches(stores, tmp_path):
    run = ssl3d.pretrain(
        "med3d", data=stores, out=tmp_path / "run", steps=2, batch_size=4, workers=0, eval_every=-1,
        encoder="resnet10", resnet10={"width": 8}, med3d={"crop": SMALL, "head": "conv_seg"},
        subjects="all", precision="32",
    )  # fmt: skip
    card = json.loads((run.folder / "encoder" / "encoder.json").read_text(encoding="utf-8"))
    assert card["labels_seen"] is True and sorted(card["data"]["datasets"]) == ["few", "many"]
    loaded = load_proxies(run.folder)["med3d"]
    again = load_proxies(run.folder, open_data(stores))["med3d"]
    assert loaded.names == again.names == ["many", "few"]
    assert [branch.values.tolist() for branch in loaded.branches] == [[0, 2, 7], [0, 1]]
    batch = group_of(open_data(stores))
    outputs = [proxy(batch, one_group(0, 8)) for proxy in (loaded, again)]
    assert outputs[0].loss == outputs[1].loss
    assert set(outputs[0].metrics) == {"dice", "dice_many", "dice_few", "loss_many", "loss_few"}


def test_the_picture_shows_input_mask_and_prediction_of_every_data_set(stores):
    data = open_data(stores)
    figure = proxy_of(data)(group_of(data), one_group(0, 8)).picture()
    assert len(figure.axes) == 12
    assert [axes.get_title() for axes in figure.axes[:4]] == ["many", "many", "few", "few"]


def test_draw_gives_a_crop_with_margin_and_its_mask(stores):
    data = open_data(stores)
    config = Med3DConfig(crop=SMALL, rotate=0.0, scale=0.25, shift=0.0, around=1.0)
    drawn = Med3D.draw(config, data[0], numpy_rng(0))
    assert drawn["crop"].shape == (1, 20, 20, 20) and drawn["mask"].shape == (20, 20, 20)
    assert drawn["mask"][2:-2, 2:-2, 2:-2].any()


def test_a_resumed_run_does_not_look_through_the_masks_again(tmp_path, monkeypatch):
    store = write_store(tmp_path / "s.h5", "made", 6, lambda rng: balls(rng, (1, 2)))
    whole = ssl3d.pretrain(
        "med3d", data=str(store), out=tmp_path / "whole", encoder="resnet10", resnet10={"width": 8},
        med3d={"crop": [16, 16, 16]}, steps=4, batch_size=2, checkpoint_every=2, subjects="all",
        holdout=0.0, eval_every=-1, precision="32", workers=0, threads=1,
    )  # fmt: skip
    half = shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(half / "encoder")
    snapshot.checkpoints(half)[0].unlink()
    monkeypatch.setattr("ssl3d_proxies.med3d.dataset_labels", None)
    again = ssl3d.resume(half)
    ours, theirs = (snapshot.load_checkpoint(run.folder)["module"] for run in (again, whole))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
