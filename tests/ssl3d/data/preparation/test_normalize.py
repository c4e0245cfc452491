"""Intensities: the kind chosen, the scale reached, the foreground found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl3d.data.preparation.normalize import decide, foreground, normalize
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.found import modality_code

RNG = np.random.default_rng(0)


def chest() -> np.ndarray:
    """A body of 40 HU with two lungs of -850, in air of -1000."""
    h, w = np.mgrid[-1:1:64j, -1:1:80j]
    layer = np.full((64, 80), -1000.0)
    layer[(h / 0.8) ** 2 + (w / 0.9) ** 2 < 1] = 40
    for side in (-0.4, 0.4):
        layer[(h / 0.5) ** 2 + ((w - side) / 0.25) ** 2 < 1] = -850
    return np.rint(np.stack([layer] * 6)[None] + RNG.normal(0, 5, (1, 6, 64, 80))).astype(np.int16)


def circle() -> np.ndarray:
    """What a scanner sees of the chest's field."""
    h, w = np.mgrid[-1:1:64j, -1:1:80j]
    return h**2 + w**2 < 1


def head(scale: float = 100.0) -> np.ndarray:
    """Tissue of 5 to 10 times the scale in noisy darkness."""
    d, h, w = np.mgrid[-1:1:20j, -1:1:40j, -1:1:40j]
    inside = d**2 + h**2 + w**2 < 0.7
    values = inside * (7 + 2 * np.sin(6 * h)) + RNG.random(d.shape) * 0.2
    return (scale * values)[None].astype(np.float32)


@pytest.mark.parametrize(
    ("voxels", "modality", "eight_bit", "kind"),
    [
        (chest(), "", False, "ct"),
        (chest() + 1024, "", False, "mr"),  # HU without the intercept cannot be told from MR
        (chest() + 1024, "CT", False, "ct"),
        (head(), "", False, "mr"),
        (head() - 700, "", False, "mr"),  # negative, but no whole numbers
        (chest().astype(np.float32) + 0.25, "", False, "ct"),  # interpolated
        (np.where(chest() < -900, -8192, chest()), "", False, "ct"),  # nothing beyond the scanner's circle
        (np.where(circle(), chest(), -32768), "", False, "ct"),
        (np.where(circle(), chest() + 0.25, -32768), "", False, "ct"),
        (np.where(circle(), chest() + 0.25, -3024), "", False, "ct"),
        (np.where(head() > 100, head(), -32768).astype(np.int16), "", False, "mr"),
        (RNG.uniform(-4096, 4095, (1, 20, 40, 40)), "", False, "mr"),  # a phase
        ((head() > 300).astype(np.float32), "", False, "unit"),
        (head(25).astype(np.uint8), "", True, "unit"),
        (head(25).astype(np.uint8), "MR", True, "mr"),
        (head(), "DX", False, "unit"),
        (head(), "PT", False, "mr"),
    ],
)
def test_auto_decides_by_header_then_values(voxels, modality, eight_bit, kind):
    assert decide(voxels, modality, eight_bit) == kind


@pytest.mark.parametrize(
    ("word", "code"),
    [("MRI", "MR"), ("CT", "CT"), ("T1w", "MR"), ("FLAIR", "MR"), ("PET", "PT"), ("ct scan", "CT"),
     ("x-ray", "DX"),
     ("image", ""), ("noNorm", "")],
)  # fmt: skip
def test_words_of_data_sets_are_understood(word, code):
    assert modality_code(word) == code


def test_ct_is_clipped_to_the_window_and_scaled():
    voxels = chest()
    voxels[0, 0, 0, :3] = (-3000, 3000, 0)
    image, done = normalize(voxels, "ct", foreground(voxels, "ct"))
    np.testing.assert_allclose(image[0, 0, 0, :3], (0, 1, 0.5))
    assert done["clip"] == [[-1000, 1000]]
    assert done["background"][0] == pytest.approx(0, abs=0.01)
    image, done = normalize(voxels, "ct", foreground(voxels, "ct"), window=(-160, 240))
    np.testing.assert_allclose(image[0, 0, 0, 2], 0.4)


def test_mr_has_mean_zero_and_deviation_one_in_the_foreground():
    voxels = head()
    inside = foreground(voxels, "mr")
    image, done = normalize(voxels, "mr", inside)
    assert image[0][inside].mean() == pytest.approx(0, abs=1e-3)
    assert image[0][inside].std() == pytest.approx(1, abs=1e-3)
    assert done["background"][0] == pytest.approx(image[0].min())
    assert np.isfinite(image).all()


@settings(deadline=None, max_examples=25)
@given(st.floats(0.01, 1e5), st.floats(-1e3, 1e3))
def test_mr_does_not_depend_on_the_scanner_scale(gain, offset):
    voxels = head()
    reference = normalize(voxels, "mr", foreground(voxels, "mr"))[0]
    other = (voxels.astype(np.float64) * gain + offset * gain).astype(np.float32)
    image = normalize(other, "mr", foreground(other, "mr"))[0]
    np.testing.assert_allclose(image, reference, atol=2e-2)


def test_values_beyond_half_precision_fit_after_normalising():
    voxels = head(1e6)
    assert voxels.max() > 65504
    assert np.isfinite(normalize(voxels, "mr", foreground(voxels, "mr"))[0].astype(np.float16)).all()


def test_unit_scales_bytes_masks_and_percentiles():
    bytes_ = np.array([0, 51, 255] * 20, np.uint8).reshape(1, 1, 6, 10)
    inside = np.ones(bytes_.shape[1:], bool)
    np.testing.assert_allclose(np.unique(normalize(bytes_, "unit", inside, eight_bit=True)[0]), (0, 0.2, 1))
    np.testing.assert_array_equal(
        normalize((bytes_ > 9).astype(np.uint8), "unit", inside, eight_bit=True)[0], bytes_ > 9
    )
    sparse = np.zeros((1, 20, 20, 20), np.float32)
    sparse[0, 3, 4, 5] = 1  # the percentiles are both 0
    np.testing.assert_array_equal(normalize(sparse, "unit", np.ones((20, 20, 20), bool))[0], sparse)
    deep = RNG.normal(20000, 3000, (1, 1, 50, 50)).astype(np.float32)
    image = normalize(deep, "unit", np.ones((1, 50, 50), bool))[0]
    assert (image.min(), image.max()) == (0, 1)


def test_none_leaves_the_values():
    voxels = head()
    image, done = normalize(voxels, "none", foreground(voxels, "mr"))
    np.testing.assert_array_equal(image, voxels)
    assert done["kind"] == "none"


def test_channels_are_normalised_apart_and_missing_ones_stay_zero():
    voxels = np.concatenate([head(1), head(1000), np.zeros_like(head())])
    image, done = normalize(voxels, "mr", foreground(voxels[:2], "mr"), missing=[2])
    np.testing.assert_allclose(image[0].std(), image[1].std(), rtol=0.05)
    assert not image[2].any()
    assert done["background"][2] == 0


def test_foreground_is_the_body_with_its_cavities():
    voxels = chest()
    inside = foreground(voxels, "ct")
    assert inside[3, 32, 40]  # mediastinum
    assert inside[3, 32, 24]  # lung
    assert not inside[3, 1, 1]
    inside = foreground(head(), "mr")
    assert inside[10, 20, 20]
    assert not inside[10, 0, 0]
    assert 0.1 < inside.mean() < 0.4


def test_foreground_of_a_volume_inside_the_body_is_nearly_everything():
    tissue = RNG.normal(500, 100, (1, 20, 30, 30)).astype(np.float32)
    assert foreground(tissue, "mr").mean() > 0.95


def test_foreground_matches_the_shape_of_large_volumes():
    voxels = np.zeros((1, 3, 300, 401), np.float32)
    voxels[:, :, 100:200, 150:300] = 100
    inside = foreground(voxels, "mr")
    assert inside.shape == (3, 300, 401)
    assert inside[:, 105:195, 155:295].all()
    assert not inside[:, :95].any()


def test_values_beyond_half_precision_are_refused_with_what_prepare_offers(scans, tmp_path):
    scans.nifti(tmp_path / "v.nii", scans.body().astype(np.float32) * 1000)
    prepare(PrepareOptions((str(tmp_path / "v.nii"),), str(tmp_path / "s.h5"), normalize="none", workers=0))
    (line,) = (tmp_path / "rejected.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert "but a store holds up to 65504: another --normalize than none scales them" in line
