"""A landmark at a known place in the patient is found there again, whatever the file's axes are."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from ssl3d.data.geometry import respaced, save_nifti, spacing_of, to_patient, unknown_affine
from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.errors import DataError


def _rotation(degrees: float, axis: int) -> np.ndarray:
    a = np.deg2rad(degrees)
    rotation = np.eye(3)
    i, j = [n for n in range(3) if n != axis]
    rotation[i, i] = rotation[j, j] = np.cos(a)
    rotation[i, j], rotation[j, i] = -np.sin(a), np.sin(a)
    return rotation


def _affine(columns: np.ndarray, origin: tuple[float, float, float] = (-40.0, 25.0, 7.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = origin
    return affine


SPACING = np.diag([1.5, 1.0, 2.0])
AFFINES = {
    "ras": _affine(SPACING),
    "lps": _affine(np.diag([-1.0, -1, 1]) @ SPACING),
    "upside down": _affine(np.diag([1.0, -1, -1]) @ SPACING),
    "permuted": _affine(np.eye(3)[:, [2, 0, 1]] @ np.diag([-1.0, 1, -1]) @ SPACING),
    "sagittal": _affine(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]) @ SPACING),
    "oblique": _affine(_rotation(17, 0) @ _rotation(-11, 2) @ SPACING),
    "oblique, flipped": _affine(_rotation(17, 0) @ _rotation(30, 1) @ np.diag([-1.0, 1, -1]) @ SPACING),
}
LANDMARK = (8, 5, 9)  # (i, j, k)


def _head(scans, landmark: bool = True) -> np.ndarray:
    voxels = scans.body((18, 14, 16)) + 20
    voxels[:3] = voxels[-2:] = 0
    voxels[:, :1] = voxels[:, :, :2] = 0
    if landmark:
        i, j, k = LANDMARK
        # A small blob whose centre of mass survives resampling.
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                for dk in (-1, 0, 1):
                    voxels[i + di, j + dj, k + dk] = 3000 if di == dj == dk == 0 else 2200
    return voxels


def _found(volume) -> np.ndarray:
    image = volume.read((0, 0, 0), volume.shape[1:])[0].numpy().astype(float)
    weight = np.clip(image - np.percentile(image, 98), 0, None)
    return np.array([(index * weight).sum() / weight.sum() for index in np.indices(image.shape)])


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_landmark_stays_in_place(scans, tmp_path, name, suffix):
    write = scans.nifti if suffix == ".nii.gz" else scans.itk
    affine = AFFINES[name]
    write(tmp_path / "in" / f"head{suffix}", _head(scans), affine)
    where = (affine @ [*LANDMARK, 1])[:3]
    prepare(PrepareOptions((str(tmp_path / "in"),), str(tmp_path / "s.h5"), normalize="none", workers=0))
    volume = open_data([tmp_path / "s.h5"])[0]
    image = volume.read((0, 0, 0), volume.shape[1:])[0]
    brightest = np.unravel_index(int(image.argmax()), image.shape)
    np.testing.assert_allclose(to_patient(volume.record, brightest), where, atol=1e-3)
    assert volume.orientation == "SAR"
    columns = np.array(volume.record.affine)[:3, :3]
    # D runs nearest to superior, H to anterior, W to right.
    assert [int(np.abs(columns[:, axis]).argmax()) for axis in range(3)] == [2, 1, 0]
    assert all(columns[2 - axis, axis] > 0 for axis in range(3))
    np.testing.assert_allclose(spacing_of(np.array(volume.record.affine)), volume.spacing, rtol=1e-6)
    np.testing.assert_allclose(np.array(volume.record.original_affine), affine, atol=1e-3)
    assert volume.record.original_shape == (18, 14, 16)


@pytest.mark.parametrize("name", ["ras", "lps", "permuted", "oblique, flipped"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.2, 2.0), (0.7, 2.0, 1.0)])
@pytest.mark.parametrize("crop", [False, True])
def test_landmark_stays_in_place_after_resampling_and_cropping(scans, tmp_path, name, spacing, crop):
    affine = AFFINES[name]
    scans.nifti(tmp_path / "in" / "head.nii.gz", _head(scans), affine)
    options = PrepareOptions(
        (str(tmp_path / "in"),), str(tmp_path / "s.h5"), spacing=spacing, crop_foreground=crop,
        normalize="none", workers=0,
    )  # fmt: skip
    prepare(options)
    volume = open_data([tmp_path / "s.h5"])[0]
    assert volume.spacing == pytest.approx(spacing)
    where = (affine @ [*LANDMARK, 1])[:3]
    off = np.linalg.norm(to_patient(volume.record, _found(volume)) - where)
    assert off < 0.35 * max(spacing), f"{off:.2f} mm off"
    assert ("crop" in volume.record.done) == crop
    assert "resampled" in volume.record.done


def test_cropping_moves_the_affine_and_takes_the_mask_along(scans, tmp_path):
    affine = AFFINES["oblique"]
    voxels = _head(scans)
    mask = np.zeros(voxels.shape, np.uint8)
    mask[LANDMARK] = 2
    mask[1, 7, 7] = 1  # in the dark border: a label is never cut off
    scans.nifti(tmp_path / "imagesTr" / "a.nii.gz", voxels, affine)
    scans.nifti(tmp_path / "labelsTr" / "a.nii.gz", mask, affine)
    (tmp_path / "dataset.json").write_text(
        '{"name": "x", "labels": {"0": "bg", "1": "a", "2": "b"}, "modality": {"0": "MRI"},'
        '"training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]}',
        encoding="utf-8",
    )
    prepare(PrepareOptions((str(tmp_path),), str(tmp_path / "s.h5"), crop_foreground=True, workers=0))
    volume = open_data([tmp_path / "s.h5"])[0]
    assert np.prod(volume.shape) < voxels.size
    stored = volume.read_mask((0, 0, 0), volume.shape[1:]).numpy()
    for label, index in ((2, LANDMARK), (1, (1, 7, 7))):
        (at,) = np.argwhere(stored == label)
        np.testing.assert_allclose(to_patient(volume.record, at), (affine @ [*index, 1])[:3], atol=1e-3)


def test_a_crop_is_written_back_into_patient_space(scans, tmp_path):
    affine = AFFINES["oblique, flipped"]
    scans.nifti(tmp_path / "in" / "head.nii.gz", _head(scans), affine)
    prepare(
        PrepareOptions(
            (str(tmp_path / "in"),),
            str(tmp_path / "s.h5"),
            crop_foreground=True,
            normalize="none",
            workers=0,
        )
    )
    volume = open_data([tmp_path / "s.h5"])[0]
    start, size = (3, 1, 2), (9, 9, 10)
    crop = volume.read(start, size)[0].numpy()
    written = nibabel.load(save_nifti(volume.record, start, crop, tmp_path / "crop.nii.gz"))
    values = written.get_fdata()
    brightest = np.unravel_index(values.argmax(), values.shape)
    there = (written.affine @ [*brightest, 1])[:3]
    np.testing.assert_allclose(there, (affine @ [*LANDMARK, 1])[:3], atol=1e-3)
    # The same anatomy at the same place: compare every voxel with the source's.
    source = nibabel.load(tmp_path / "in" / "head.nii.gz")
    for index in np.ndindex(*values.shape):
        back = np.rint(np.linalg.inv(source.affine) @ written.affine @ [*index, 1])[:3].astype(int)
        assert values[index] == pytest.approx(source.dataobj[tuple(back)], abs=0.6)


def test_saving_channels_and_refusing_other_shapes(tmp_path, scans):
    scans.nifti(tmp_path / "a.nii.gz", _head(scans))
    prepare(PrepareOptions((str(tmp_path / "a.nii.gz"),), str(tmp_path / "s.h5"), workers=0))
    record = open_data([tmp_path / "s.h5"])[0].record
    saved = nibabel.load(
        save_nifti(record, (0, 0, 0), np.zeros((2, 3, 4, 5), np.float16), tmp_path / "c.nii")
    )
    assert saved.shape == (5, 4, 3, 2)
    with pytest.raises(DataError, match="expected"):
        save_nifti(record, (0, 0, 0), np.zeros((3, 4)), tmp_path / "c.nii")
    with pytest.raises(DataError, match="nii"):
        save_nifti(record, (0, 0, 0), np.zeros((3, 4, 5)), tmp_path / "c.mha")


def test_masks_are_resampled_to_the_nearest_label(scans, tmp_path):
    voxels = _head(scans)
    mask = (np.indices(voxels.shape)[2] > 7).astype(np.uint8) * 5
    (tmp_path / "m").mkdir()
    scans.nifti(tmp_path / "in" / "a.nii.gz", voxels, AFFINES["ras"])
    scans.nifti(tmp_path / "m" / "a.nii.gz", mask, AFFINES["ras"])
    (tmp_path / "list.csv").write_text("path,mask\nin/a.nii.gz,m/a.nii.gz\n", encoding="utf-8")
    prepare(
        PrepareOptions((str(tmp_path / "list.csv"),), str(tmp_path / "s.h5"), spacing=(1, 1, 1), workers=0)
    )
    volume = open_data([tmp_path / "s.h5"])[0]
    stored = volume.read_mask((0, 0, 0), volume.shape[1:]).numpy()
    assert set(np.unique(stored)) == {0, 5}
    for at in ((0, 0, 0), (volume.shape[1] - 1, 3, 3), (volume.shape[1] // 2 + 2, 1, 1)):
        k = (np.linalg.inv(AFFINES["ras"]) @ [*to_patient(volume.record, at), 1])[2]
        assert stored[at] == (5 if k > 7.5 else 0)


def test_resampling_larger_voxels_averages_and_smaller_ones_interpolate(scans, tmp_path):
    noise = np.random.default_rng(0).normal(100, 30, (24, 24, 24)).astype(np.float32)
    scans.nifti(tmp_path / "n.nii.gz", noise)
    spreads = {}
    for side in (0.5, 1.0, 3.0):
        out = tmp_path / f"{side}.h5"
        prepare(
            PrepareOptions(
                (str(tmp_path / "n.nii.gz"),), str(out), spacing=(side,) * 3, normalize="none", workers=0
            )
        )
        volume = open_data([out])[0]
        image = volume.read((0, 0, 0), volume.shape[1:])
        spreads[side] = float(image.std())
        assert float(image.mean()) == pytest.approx(100, abs=2)
    assert spreads[3.0] < 0.5 * spreads[1.0]  # without smoothing it would stay at 30


def test_the_field_of_view_is_kept():
    affine = AFFINES["oblique"]
    for spacing in ((1.0, 1.0, 1.0), (3.0, 0.4, 5.0)):
        shape, moved = respaced((20, 30, 40), affine, spacing)
        centre = affine[:3, :3] @ [9.5, 14.5, 19.5] + affine[:3, 3]
        again = moved[:3, :3] @ ((np.array(shape) - 1) / 2) + moved[:3, 3]
        np.testing.assert_allclose(again, centre, atol=1e-9)
        assert spacing_of(moved) == pytest.approx(spacing)
        extents = np.array(shape) * spacing
        assert (
            np.abs(extents - np.array([20, 30, 40]) * spacing_of(affine)) <= np.array(spacing) / 2 + 1e-9
        ).all()


def test_unknown_places_run_along_the_array():
    affine = unknown_affine((4.0, 2.0, 1.0))
    assert spacing_of(affine) == (4.0, 2.0, 1.0)
    np.testing.assert_allclose((affine @ [1, 2, 3, 1])[:3], [3, 4, 4])
