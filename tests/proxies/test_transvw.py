"""TransVW: which volumes hold a word, where it is cut, what is learned, and what must not be."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from ssl3d.api import BatchRng, DataError, corrupt, find_alike, open_data, word_places
from ssl3d.config import from_dict, to_dict
from ssl3d.data.phantoms import phantom_store
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.encoders.resnet import ResNet10
from ssl3d.objectives.visual_words import principal_features, thumbnail
from ssl3d.rng import numpy_rng, one_group
from ssl3d.views.corruptions import corrupt_once
from ssl3d.views.spatial import elastic
from ssl3d_proxies.transvw import TransVW, TransVWConfig

CROP = (16, 16, 16)
# Without painting, so that seconds are enough.
EASY = {
    "corruptions": "several", "elastic": 0.0, "paint": 0.0, "shuffle": 0.0, "curve": 0.3, "words": 4,
    "word_weight": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return open_data([phantom_store(16, folder=tmp_path_factory.mktemp("phantoms"))])


def store(folder, images, subjects=None):
    """A store of float32 volumes (D, H, W); what is not 0 is foreground."""
    for n, image in enumerate(images):
        record = Record(f"v{n}", "made", subjects[n] if subjects else f"s{n}", spacing=(1.0, 1.0, 1.0))
        array = np.asarray(image, np.float32)[None]
        write_part(folder / "parts", f"v{n}", record, array, foreground=array[0] != 0, dtype="float32")
    assemble(folder / "parts", folder / "store.h5", {}, [])
    return open_data([folder / "store.h5"])


def families(folder, count=8, shape=(24, 32, 28)):
    """Volumes of two kinds, alternating: bright below or above, with noise."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(1, 3, shape[0])[:, None, None]
    kinds = [ramp, ramp[::-1]]
    return store(folder, [kinds[n % 2] + 0.3 * rng.normal(size=shape) for n in range(count)])


def make(norm="batch", **options):
    torch.manual_seed(0)
    encoder = ResNet10(ResNet10.Config(width=8, norm=norm, stem_kernel=3))
    return TransVW(TransVWConfig(**{"crop": CROP, "width": 8, **options}), encoder)


def batch_of(config, volumes, step):
    drawn = [
        TransVW.draw(config, v, numpy_rng(step, n)) | {"index": torch.tensor(v.index)}
        for n, v in enumerate(volumes)
    ]
    return default_collate(drawn)


def train(proxy, draw, steps=60, batch=16, lr=5e-3):
    optimizer = torch.optim.AdamW(proxy.train().parameters(), lr)
    for step in range(steps):
        loss = proxy(draw(step), one_group(step, batch)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return proxy


@torch.no_grad()
def accuracy(proxy, draw):
    """On batches never trained on."""
    proxy.eval()
    outputs = [proxy(draw(step), one_group(step, 16)) for step in range(5000, 5008)]
    return np.mean([output.metrics["word_accuracy"].item() for output in outputs])


def some_of(config, volumes):
    """draw(step): 16 of the volumes."""
    return lambda step: batch_of(
        config, [volumes[int(i)] for i in numpy_rng(step).integers(len(volumes), size=16)], step
    )


def noise(offset=0.0, words=4):
    """draw(step): fresh noise every time, brighter by `offset` per word."""

    def draw(step):
        generator = torch.Generator().manual_seed(step)
        word = torch.randint(words, (16,), generator=generator)
        crop = torch.randn(16, 1, *CROP, generator=generator) + offset * word.view(-1, 1, 1, 1, 1)
        return {"crop": crop, "word": word, "index": torch.full((16,), -1)}

    return draw


# Learning and controls ------------------------------------------------------------------------------


@pytest.mark.long
def test_words_of_phantoms_are_learned_by_people_never_seen(phantoms):
    rest = phantoms[4:]
    proxy = make(**EASY)
    proxy.setup(rest)
    proxy.start_epoch(0, None)
    train(proxy, some_of(proxy.config, rest))
    assert accuracy(proxy, some_of(proxy.config, phantoms[:4])) > 0.5  # chance is .25


def test_words_of_noise_stay_at_chance():
    assert accuracy(train(make(**EASY), noise(), steps=30), noise()) < 0.4


def test_words_of_noise_stay_at_chance_however_it_is_deformed_and_corrupted():
    proxy = make(words=4, word_weight=1.0)
    assert accuracy(train(proxy, noise(), steps=30), noise()) < 0.4


def test_with_a_cue_put_in_even_those_of_noise_are_easy():
    assert accuracy(train(make(**EASY), noise(2.0), steps=30), noise(2.0)) > 0.6


@pytest.mark.long
def test_shuffled_words_stay_at_chance(phantoms):
    proxy = make(**EASY)
    draw = some_of(proxy.config, phantoms)

    def shuffled(step):
        batch = draw(step)
        return {**batch, "word": torch.randint(4, (16,), generator=torch.Generator().manual_seed(step))}

    assert accuracy(train(proxy, shuffled, steps=30), shuffled) < 0.4


def test_restoring_noise_gains_nothing_over_its_mean():
    proxy = train(make(**{**EASY, "paint": 1.0, "outside": 1.0, "curve": 0.0}), noise(), steps=30)
    batch = noise()(9999)
    proxy.eval()
    with torch.no_grad():
        seen = corrupt(proxy.config, batch["crop"], one_group(0, 16)).input
        restored = proxy.decoder(proxy.encoder(seen), CROP)
    painted = seen != batch["crop"]
    assert (restored - batch["crop"])[painted].square().mean() > 0.95 * batch["crop"][painted].var()


# Deformed and corrupted -----------------------------------------------------------------------------


def test_crops_are_deformed_then_corrupted_once_and_the_target_is_neither(phantoms):
    proxy = make()
    x = torch.rand(40, 1, *CROP, generator=torch.Generator().manual_seed(0))
    seen, kept = proxy.corrupted(x, one_group(0, 40)), x.clone()
    rng = one_group(0, 40)
    deformed = elastic(x, rng)
    spoilt, done = corrupt_once(deformed, rng)
    assert torch.equal(seen, spoilt) and torch.equal(x, kept)
    assert (torch.stack(list(done.values())).sum(0) == 1).all()
    # What was painted around a box alone shows, there, the deformed crop: not the target.
    inside = (seen == deformed) & done["outpaint"].view(-1, 1, 1, 1, 1)
    assert inside.any() and not torch.equal(x[inside], deformed[inside])


def test_a_run_of_before_keeps_the_corruptions_of_before():
    written = {k: v for k, v in to_dict(TransVWConfig()).items() if k not in ("elastic", "corruptions")}
    before = from_dict(TransVWConfig, written, "a run", recorded=True)
    assert (before.elastic, before.corruptions) == (0.0, "several")
    x = torch.rand(6, 1, *CROP, generator=torch.Generator().manual_seed(0))
    proxy = make()
    proxy.config = before
    assert torch.equal(proxy.corrupted(x, one_group(3, 6)), corrupt(before, x, one_group(3, 6)).input)


def test_probabilities_beside_one_corruption_are_refused():
    with pytest.raises(ValueError, match=r"curve is 0.3, but with corruptions one .* corruptions several"):
        TransVWConfig(curve=0.3)


# Which volumes hold a word --------------------------------------------------------------------------


def test_those_who_look_alike_share_their_words(tmp_path):
    volumes = families(tmp_path)
    found = find_alike(volumes, words=6, share=0.5)
    assert len(set(found.references.tolist())) == 6
    for word, reference in enumerate(found.references.tolist()):
        assert found.alike[:, word].nonzero()[:, 0].tolist() == list(range(reference % 2, 8, 2))
    again = find_alike(volumes, words=6, share=0.5)
    assert torch.equal(again.references, found.references) and torch.equal(again.alike, found.alike)
    other = find_alike(volumes, words=6, share=0.5, seed=1)
    assert not torch.equal(other.references, found.references)


def test_at_least_two_hold_a_word_and_at_most_all(tmp_path):
    volumes = families(tmp_path, count=4)
    assert (find_alike(volumes, 9, 0.01).alike.sum(0) == 2).all()
    assert find_alike(volumes, 9, 1.0).alike.all()


def test_a_volume_that_cannot_be_read_holds_no_word(tmp_path):
    volumes = list(families(tmp_path))

    class Broken:
        shape = volumes[0].shape

        def foreground_box(self):
            raise DataError("gone")

    volumes[2] = Broken()
    found = find_alike(volumes, 7, 1.0)
    assert found.alike.sum(1).tolist() == [7, 7, 0, 7, 7, 7, 7, 7]
    assert 2 not in found.references
    with pytest.raises(DataError, match="1 of 2 volumes"):
        find_alike(volumes[1:3], 7, 1.0)


def test_thumbnails_are_means_of_the_foreground_box(tmp_path):
    image = np.zeros((40, 48, 40), np.float32)
    image[8:32, 8:40, 8:40] = np.random.default_rng(0).uniform(1, 2, (24, 32, 32))
    volume = store(tmp_path, [image])[0]
    low, high = volume.foreground_box()
    box = volume.read(low, [b - a for a, b in zip(low, high)])
    expected = F.adaptive_avg_pool3d(box, 8).flatten()
    expected = (expected - expected.mean()) / expected.std(correction=0)
    assert torch.allclose(thumbnail(volume, 8), expected, atol=1e-4)


def test_features_are_the_principal_components():
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).normal(size=(20, 7)) * [9, 7, 5, 1, 1, 1, 1]
    ours, theirs = principal_features(torch.from_numpy(x), 3).numpy(), PCA(3).fit_transform(x)
    assert np.allclose(np.abs(ours[:, ::-1]), np.abs(theirs))
    assert principal_features(torch.ones(5, 7), 3).shape == (5, 1)


RANKS = """
import sys, torch
from torch import distributed
from ssl3d.api import find_alike, open_data
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
found = find_alike(open_data([folder + "/store.h5"]), 5, 0.4)
torch.save({"references": found.references, "alike": found.alike}, f"{folder}/{rank}.pt")
distributed.barrier()
import os
os._exit(0)
"""


@pytest.mark.long
def test_two_ranks_find_the_words_of_one(tmp_path):
    alone = find_alike(families(tmp_path, count=7), 5, 0.4)  # unequal shares
    jobs = [subprocess.Popen([sys.executable, "-c", RANKS, str(n), str(tmp_path)]) for n in range(2)]
    assert [job.wait(120) for job in jobs] == [0, 0]
    for n in range(2):
        found = torch.load(tmp_path / f"{n}.pt", weights_only=True)
        assert torch.equal(found["references"], alone.references)
        assert torch.equal(found["alike"], alone.alike)


# Where a word is cut --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [2, 44, 200])
def test_places_are_spread_evenly(words):
    places = word_places(words)
    assert places.shape == (words, 3) and (places >= 0).all() and (places < 1).all()
    apart = np.abs(places[:, None] - places)
    apart = np.linalg.norm(np.minimum(apart, 1 - apart), axis=2)[~np.eye(words, dtype=bool)]
    assert apart.min() > 0.4 * words ** (-1 / 3)
    assert np.array_equal(word_places(words + 5)[:words], places)
    assert not np.array_equal(word_places(words, seed=1), places)


def body(shape=(40, 48, 44), low=(8, 8, 0), high=(40, 40, 40)):
    """Every voxel of a box says where it lies; around it is nothing."""
    image = np.zeros(shape, np.float32)
    z, y, x = np.meshgrid(*[np.arange(a, b) for a, b in zip(low, high)], indexing="ij")
    image[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1 + z * 10000 + y * 100 + x
    return image


def test_a_word_is_at_the_same_place_relative_to_the_body(tmp_path):
    moved = body((56, 48, 52), low=(16, 8, 8), high=(48, 40, 48))
    volumes = store(tmp_path, [body(), moved])
    config = TransVWConfig(crop=(12, 12, 12), exact=1.0, words=20)
    places = {}
    for n, (volume, low, high) in enumerate(
        zip(volumes, ([8, 8, 0], [16, 8, 8]), ([40, 40, 40], [48, 40, 48]), strict=True)
    ):
        for seed in range(60):
            drawn = TransVW.draw(config, volume, numpy_rng(n, seed))
            code, word = int(drawn["crop"][0, 0, 0, 0]) - 1, int(drawn["word"])
            start = np.array([code // 10000, code // 100 % 100, code % 100])
            room = np.array(high) - low - 12
            assert np.array_equal(start, np.round(low + word_places(20)[word] * room))
            places.setdefault(word, set()).add(tuple(start - low))
    assert len(places) == 20
    assert all(len(found) == 1 for found in places.values())


def test_other_crops_are_shifted_and_zoomed_but_keep_their_size(tmp_path):
    volume = store(tmp_path, [body()])[0]
    config = TransVWConfig(crop=(12, 12, 12), exact=0.0, words=2)
    spans, starts = set(), set()
    for seed in range(40):
        crop = TransVW.draw(config, volume, numpy_rng(seed))["crop"][0]
        assert crop.shape == (12, 12, 12)
        assert crop.min() >= 0
        spans.add(round((crop[-1, 0, 0] - crop[0, 0, 0]).item() / 10000))
        starts.add(round(crop[0, 0, 0].item()))
    assert min(spans) < 11 < max(spans) and len(starts) > 30


def test_what_is_not_there_is_never_shown(tmp_path):
    # Padding would say that a place lies at the border.
    volume = store(tmp_path, [np.full((20, 24, 20), 5.0)])[0]
    config = TransVWConfig(crop=(16, 16, 16), shift=2.0, exact=0.0)
    assert all(
        (TransVW.draw(config, volume, numpy_rng(n))["crop"] - 5).abs().max() < 1e-4 for n in range(40)
    )


def test_places_with_nothing_to_see_are_passed_over(tmp_path):
    image = np.ones((40, 40, 40), np.float32)
    image[:, :, 8:32] = 0
    volume = store(tmp_path, [image])[0]
    config = TransVWConfig(crop=(8, 8, 8), min_foreground=0.5)
    empty = sum(TransVW.draw(config, volume, numpy_rng(n))["crop"].mean().item() < 0.4 for n in range(60))
    assert empty < 3


# What is refused ------------------------------------------------------------------------------------


def test_a_single_subject_is_refused(tmp_path):
    data = store(tmp_path, [body(), body()], subjects=["one", "one"])
    with pytest.raises(DataError, match=r"1 subject .* at least 2"):
        make().setup(data)


def test_images_alone_are_refused(tmp_path):
    data = store(tmp_path, [np.ones((1, 30, 30))] * 3)
    with pytest.raises(DataError, match=r"0 subjects .* at least 2"):
        make().setup(data)
    with pytest.raises(DataError, match="v0: is an image"):
        TransVW.draw(TransVWConfig(), data[0], numpy_rng(0))


def test_a_volume_no_larger_than_the_crop_is_refused(tmp_path):
    volume = store(tmp_path, [body((20, 20, 20), (0, 0, 0), (20, 20, 20))])[0]
    with pytest.raises(DataError, match=r"v0: .*20.* crop of \(32, 32, 32\) a single place"):
        TransVW.draw(TransVWConfig(), volume, numpy_rng(0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"words": 1},
        {"elastic": -1.0},
        {"alike": 0.0},
        {"exact": 1.5},
        {"zoom": -1.0},
        {"shift": -1.0},
        {"word_weight": -1.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TransVWConfig(**wrong)


# What is computed -----------------------------------------------------------------------------------


def found_words(tmp_path, **options):
    data = families(tmp_path)
    proxy = make("group", **{"words": 6, **options})
    proxy.setup(data)
    proxy.start_epoch(0, None)
    return proxy, data


def test_the_loss_is_the_papers_sum_over_what_has_a_class(tmp_path):
    proxy, data = found_words(tmp_path)
    proxy.eval()
    batch = batch_of(proxy.config, data, 0)
    out = proxy(batch, one_group(2, 8))
    with torch.no_grad():
        rng = one_group(2, 8)
        seen = corrupt_once(elastic(batch["crop"], rng), rng).input
        maps = proxy.encoder(seen)
        restored = proxy.decoder(maps, CROP)
        logits = proxy.classifier(maps[-1].mean((2, 3, 4)))
    restoring = naming = known = 0.0
    for n in range(8):
        image, word = batch["crop"][n], int(batch["word"][n])
        scale = max((image.max() - image.min()).item(), 1.0)
        restoring += ((restored[n] - image) / scale).square().mean().item() / 8
        if n % 2 == int(proxy.references[word]) % 2:  # of the reference's family
            naming += -logits[n].log_softmax(0)[word].item() / 8 / 0.5
            known += 1 / 8
    assert 0 < known < 1
    assert out.metrics["coverage"].item() == pytest.approx(known)
    assert out.metrics["word_loss"].item() == pytest.approx(naming, rel=1e-5)
    assert out.loss.item() == pytest.approx(restoring + 0.01 * naming, rel=1e-5)
    assert out.metrics["chance"].item() == pytest.approx(1 / 6)


def test_the_loss_is_a_mean_over_examples_on_any_number_of_ranks(tmp_path):
    proxy, data = found_words(tmp_path)
    batch = batch_of(proxy.config, data, 0)
    whole = proxy(batch, one_group(1, 8)).loss
    halves = [
        proxy({k: v[list(rows)] for k, v in batch.items()}, BatchRng(1, rows, 8)).loss
        for rows in ((0, 2, 4, 6), (1, 3, 5, 7))
    ]
    assert torch.allclose(whole, torch.stack(halves).mean(), rtol=1e-5)


def test_every_word_counts_in_people_that_were_kept_out(tmp_path):
    proxy, _ = found_words(tmp_path)
    assert proxy.counts(torch.tensor([100, -1]), torch.tensor([0, 3])).tolist() == [1, 1]


def test_until_the_words_are_found_none_counts(tmp_path):
    data = families(tmp_path)
    proxy = make(words=6)
    proxy.setup(data)
    out = proxy(batch_of(proxy.config, data, 0), one_group(0, 8))
    assert out.loss.isfinite() and out.metrics["coverage"] == 0


def test_the_words_are_found_once_and_travel_in_the_state(tmp_path):
    proxy, data = found_words(tmp_path)
    state = copy.deepcopy(proxy.state_dict())
    again = make("group", words=6)
    again.setup(data)
    again.load_state_dict(state)
    assert again.member.any() and torch.equal(again.member, proxy.member)
    assert torch.equal(again.codes[:3], torch.tensor([0, 1, 2]))
    again.member[0] = ~again.member[0]
    changed = again.member.clone()
    again.start_epoch(0, None)
    assert torch.equal(again.member, changed)  # not computed anew


def test_the_words_of_a_selection_know_their_volumes(tmp_path):
    data = families(tmp_path).select([1, 3, 4, 6])
    proxy = make(words=6)
    proxy.setup(data)
    proxy.start_epoch(0, None)
    assert proxy.codes.tolist() == [1, 3, 4, 6]
    assert set(proxy.references.tolist()) <= {1, 3, 4, 6}
    for word, reference in enumerate(proxy.references.tolist()):
        alike = proxy.codes[proxy.member[:, word]]
        assert (alike % 2 == reference % 2).all()


def test_the_picture_shows_input_result_and_original(tmp_path):
    proxy, data = found_words(tmp_path)
    assert len(proxy(batch_of(proxy.config, data, 0), one_group(0, 8)).picture().axes) == 18
