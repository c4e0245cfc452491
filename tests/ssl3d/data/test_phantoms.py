"""Phantoms: the same for the same seed, ordered along z, with a class that volume does not give away."""

import time

import numpy as np
import pytest

from ssl3d.data.open import open_data
from ssl3d.data.phantoms import CLASSES, phantom, phantom_store
from ssl3d.errors import UsageError


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return open_data([phantom_store(24, folder=tmp_path_factory.mktemp("phantoms"))])


def test_the_same_seed_gives_the_same_person():
    one, two, other = phantom(5), phantom(5), phantom(6)
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.mask, two.mask)
    assert one.spacing == two.spacing and one.label == two.label
    assert one.image.shape != other.image.shape or (one.image != other.image).any()


def test_stores_have_the_same_bytes(tmp_path):
    one = phantom_store(3, folder=tmp_path / "a")
    time.sleep(1.1)  # HDF5 notes times in seconds, where it is let
    two = phantom_store(3, folder=tmp_path / "b")
    assert one.read_bytes() == two.read_bytes()
    assert [p.name for p in one.parent.iterdir()] == [one.name]
    assert phantom_store(3, seed=1, folder=tmp_path / "a").read_bytes() != one.read_bytes()


def test_open_data_makes_them_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path))
    assert len(open_data(["phantoms:5"])) == 5 and len(open_data(["phantoms"])) == 48
    assert len(list((tmp_path / "phantoms").glob("*.h5"))) == 2


def test_two_scans_of_a_person_share_anatomy_but_not_noise():
    one, two = phantom(1, (40, 48, 48), scan=0), phantom(1, (40, 48, 48), scan=1)
    assert one.spacing != two.spacing and (one.image != two.image).any()

    def place(p, organ):
        return np.argwhere(p.mask == organ).mean(axis=0) * p.spacing + p.origin

    for organ in (1, 2):
        stranger = place(phantom(2, (40, 48, 48)), organ)
        np.testing.assert_allclose(place(one, organ), place(two, organ), atol=4)  # mm
        assert np.abs(place(one, organ) - stranger).max() > 4


def test_what_every_phantom_has(volumes):
    for volume in volumes:
        image, mask = volume.read(), volume.read_mask()
        assert set(mask.unique().tolist()) == set(range(len(CLASSES)))
        assert image.isfinite().all() and volume.orientation == "SAR" and volume.label in (0, 1)
        assert 0.2 < (volume.foreground() > 0.5).mean() < 0.9
        assert image[0, :, 0, 0].mean() == pytest.approx(volume.background[0], abs=0.3)  # air
        assert len(volume.boxes) <= 3
        for box in volume.boxes.astype(int):
            z1, y1, x1, z2, y2, x2 = box
            inside = image[0, z1:z2, y1:y2, x1:x2]
            assert min(inside.shape) >= 2 and (box[3:] <= volume.shape[1:]).all()
            assert inside.max() > image[0][mask == 1].median() + 1  # bright
    assert sum(len(v.boxes) for v in volumes) > 8
    assert len(set(map(tuple, volumes.shapes.tolist()))) > 5 and len(set(volumes.spacings[:, 0])) > 5
    assert 0.3 < np.mean(volumes.labels.astype(int)) < 0.7
    assert len(volumes.identities()) < len(volumes)


def test_classes_are_of_persons(volumes):
    by_person = {}
    for code, label in zip(volumes.subject_codes, volumes.labels, strict=True):
        assert by_person.setdefault(code, label) == label


def test_slices_can_be_ordered(volumes):
    """The nearest slice of another person lies at about the same height."""

    def profile(volume):
        image = volume.read()[0].numpy()
        heights = np.linspace(0.05, 0.95, 12)
        slices = [image[int(h * len(image))] for h in heights]
        return np.array([[np.quantile(s, q) for q in (0.1, 0.3, 0.5, 0.7, 0.9, 0.98)] for s in slices])

    profiles = [profile(volume) for volume in volumes]
    errors = []
    for i, mine in enumerate(profiles):
        others = np.concatenate(profiles[:i] + profiles[i + 1 :])
        heights = np.tile(np.arange(12), len(profiles) - 1)
        for height, row in enumerate(mine):
            nearest = np.argsort(np.linalg.norm(others - row, axis=1))[:5]
            errors.append(abs(np.median(heights[nearest]) - height))
    assert np.mean(errors) < 1.5  # by chance: 4


def test_the_class_is_in_the_texture_not_in_the_volume():
    size, roughness, labels = [], [], np.arange(40) % 2
    for seed, label in enumerate(labels):
        made = phantom(seed, label=int(label))
        organ = made.mask == 1
        size.append(organ.sum() * np.prod(made.spacing))
        image = made.image[0]
        inner = organ[:, :, 1:] & organ[:, :, :-1]
        step, spread = (image[:, :, 1:] - image[:, :, :-1])[inner].std(), image[organ].std()
        roughness.append(step / spread)

    def auc(score):
        score = np.array(score)
        return (score[labels == 0][:, None] > score[labels == 1]).mean()

    assert auc(roughness) > 0.8  # one feature; the outline says more
    assert 0.3 < auc(size) < 0.7


def test_any_shape_can_be_asked_for():
    made = phantom(0, (16, 20, 24))
    assert made.image.shape == (1, 16, 20, 24) and made.mask.max() == 3


def test_faint_lesions_are_in_the_same_places_and_hard_to_see(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path))
    plain, faint = phantom(3), phantom(3, kind="faint")
    np.testing.assert_array_equal(plain.boxes, faint.boxes)
    np.testing.assert_array_equal(plain.mask, faint.mask)
    box = plain.boxes[0].astype(int)
    middle = tuple((box[axis] + box[axis + 3]) // 2 for axis in range(3))
    brighter = [(one.image[0][middle] * one.std + one.mean) for one in (plain, faint)]
    assert brighter[0] > 0.8
    assert brighter[1] < brighter[0] - 0.2
    # Of the whole volume, many voxels are brighter than the lesion; of the plain one, next to none.
    more = [(one.image[0][one.body] > one.image[0][middle]).mean() for one in (plain, faint)]
    assert more[0] < 0.02 < 0.05 < more[1]
    data = open_data(["phantoms:5:faint"])
    assert set(data.datasets) == {"phantoms-faint"} and len(data) == 5
    assert set(open_data(["phantoms:5"]).datasets) == {"phantoms"}


def test_phantoms_of_noise_show_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path))
    data, plain = open_data(["phantoms:5:noise"]), open_data(["phantoms:5"])
    assert set(data.datasets) == {"phantoms-noise"} and data.labels.tolist() == plain.labels.tolist()
    for one, other in zip(data, plain, strict=True):
        image = one.read((0, 0, 0), one.shape[1:])[0].numpy().astype(np.float64)
        assert one.shape == other.shape and abs(image.mean()) < 0.02 and abs(image.std() - 1) < 0.02
        for axis in range(3):  # neighbours are independent, and so is the place
            a, b = np.moveaxis(image, axis, 0)[1:], np.moveaxis(image, axis, 0)[:-1]
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
            others = tuple(k for k in range(3) if k != axis)
            assert np.abs(image.mean(axis=others)).max() < 6 / np.sqrt(image[0].size)
    first, second = (data[k].read((0, 0, 0), (8, 8, 8)).numpy() for k in (0, 1))
    assert not np.array_equal(first, second)


def test_a_cache_that_cannot_be_made_is_told_with_what_helps(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"cache cannot be written .*; name another folder in SSL3D_CACHE"):
        phantom_store(2, shape=(8, 8, 8))
