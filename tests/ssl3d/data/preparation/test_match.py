"""Masks and further channels on the grid of their scan: by good headers, voxel by voxel by bare ones."""

from __future__ import annotations

import csv
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare

SHAPE = (12, 14, 16)
SIDES = np.diag([1.0, 1.5, 2.0])


def affine_of(columns: np.ndarray, origin: tuple[float, float, float] = (-40.0, 25.0, 7.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns, origin
    return affine


PLACED = {
    "ras": affine_of(SIDES),
    "lps": affine_of(np.diag([-1.0, -1, 1]) @ SIDES),
    "sagittal": affine_of(np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]) @ SIDES),
}


def uncoded(path, voxels):
    """A NIfTI file that says nothing of its place, only the sides of its voxels."""
    image = nibabel.Nifti1Image(voxels, None)
    image.header.set_zooms(np.diag(SIDES))
    nibabel.save(image, path)
    assert not int(image.header["sform_code"]) and not int(image.header["qform_code"])


BARE = {
    "identity": lambda path, voxels: nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path),
    "flipped sides": lambda path, voxels: nibabel.save(
        nibabel.Nifti1Image(voxels, affine_of(np.diag([-1.0, -1, 1]) @ SIDES, (0, 0, 0))), path
    ),
    "no codes": uncoded,
    "origin without directions": lambda path, voxels: nibabel.save(
        nibabel.Nifti1Image(voxels, affine_of(SIDES)), path
    ),
}


def label_map(shape=SHAPE) -> np.ndarray:
    """Two boxes away from the middle: no mirror image or shift of them overlaps them."""
    mask = np.zeros(shape, np.uint8)
    mask[1:4, 2:5, 1:5] = 1
    mask[2:3, 9:12, 10:14] = 2
    return mask


def prepared(tmp_path, name="s"):
    """The only volume of a list of one scan and its mask, None if it was refused."""
    (tmp_path / "l.csv").write_text("path,mask\na.nii.gz,m.nii.gz\n", encoding="utf-8")
    out = tmp_path / f"{name}.h5"
    prepare(PrepareOptions((str(tmp_path / "l.csv"),), str(out), workers=0, overwrite=True))
    return open_data([out])[0] if out.exists() else None


def refused(tmp_path) -> str:
    with open(tmp_path / "rejected.csv", encoding="utf-8") as file:
        return next(csv.DictReader(file))["reason"]


def canonical(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(D, H, W) by nibabel alone."""
    return np.asarray(nibabel.as_closest_canonical(nibabel.Nifti1Image(mask, affine)).dataobj).T


@pytest.mark.parametrize("scan", PLACED)
@pytest.mark.parametrize("bare", BARE)
def test_a_mask_with_a_bare_header_lies_as_the_voxels_of_the_scans_file_do(scans, tmp_path, scan, bare):
    mask = label_map()
    scans.nifti(tmp_path / "a.nii.gz", scans.body(SHAPE), PLACED[scan])
    BARE[bare](tmp_path / "m.nii.gz", mask)
    volume = prepared(tmp_path)
    np.testing.assert_array_equal(volume.read_mask().numpy(), canonical(mask, PLACED[scan]))
    same = (bare, scan) == ("origin without directions", "ras")
    assert volume.record.done.get("mask") == (
        None if same else "its header places it elsewhere; taken voxel by voxel"
    )


def test_a_bare_scan_takes_its_mask_voxel_by_voxel_too(scans, tmp_path):
    mask = label_map()
    uncoded(tmp_path / "a.nii.gz", scans.body(SHAPE))
    scans.nifti(tmp_path / "m.nii.gz", mask, PLACED["lps"])
    volume = prepared(tmp_path)
    # nibabel lets x of an uncoded file run to the left.
    np.testing.assert_array_equal(volume.read_mask().numpy(), mask[::-1].T)
    assert "voxel by voxel" in volume.record.done["mask"]
    uncoded(tmp_path / "m.nii.gz", mask)
    volume = prepared(tmp_path, "both")
    np.testing.assert_array_equal(volume.read_mask().numpy(), mask[::-1].T)
    assert "mask" not in volume.record.done


def test_itk_arrays_without_their_image_are_bare_too(scans, tmp_path):
    mask = label_map()
    sitk.WriteImage(sitk.GetImageFromArray(mask.T.copy()), str(tmp_path / "m.mha"))
    scans.nifti(tmp_path / "a.nii.gz", scans.body(SHAPE), PLACED["sagittal"])
    (tmp_path / "l.csv").write_text("path,mask\na.nii.gz,m.mha\n", encoding="utf-8")
    prepare(PrepareOptions((str(tmp_path / "l.csv"),), str(tmp_path / "s.h5"), workers=0))
    stored = open_data([tmp_path / "s.h5"])[0].read_mask().numpy()
    np.testing.assert_array_equal(stored, canonical(mask, PLACED["sagittal"]))


def test_a_picture_as_the_mask_of_one_placed_slice_is_not_turned_over(scans, tmp_path):
    mask = label_map((12, 14, 16))[2].T.copy()  # rows, columns
    affine = affine_of(np.diag([-1.0, -1, 1]) @ SIDES)  # rows run to posterior, as in DICOM
    scans.nifti(tmp_path / "a.nii.gz", scans.body((14, 16, 1)), affine)
    Image.fromarray(mask).save(tmp_path / "m.png")
    (tmp_path / "l.csv").write_text("path,mask\na.nii.gz,m.png\n", encoding="utf-8")
    prepare(PrepareOptions((str(tmp_path / "l.csv"),), str(tmp_path / "s.h5"), workers=0))
    stored = open_data([tmp_path / "s.h5"])[0].read_mask().numpy()
    np.testing.assert_array_equal(stored[0], mask[::-1, ::-1])


@pytest.mark.parametrize("scan", PLACED)
@pytest.mark.parametrize("mask", PLACED)
def test_good_headers_of_one_grid_are_believed_however_the_voxels_are_stored(scans, tmp_path, scan, mask):
    labels = label_map()
    image = nibabel.Nifti1Image(labels, PLACED["ras"])
    for name, voxels, like in (("a", scans.body(SHAPE), scan), ("m", labels, mask)):
        one = nibabel.Nifti1Image(voxels, PLACED["ras"])
        turned = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(one.affine), nibabel.io_orientation(PLACED[like])
        )
        nibabel.save(one.as_reoriented(turned), tmp_path / f"{name}.nii.gz")
    volume = prepared(tmp_path)
    np.testing.assert_array_equal(volume.read_mask().numpy(), np.asarray(image.dataobj).T)
    assert "mask" not in volume.record.done


def test_a_mask_of_another_place_is_resampled_where_it_lies_in_the_scan(scans, tmp_path):
    mask = label_map()
    affine = PLACED["lps"].copy()
    scans.nifti(tmp_path / "a.nii.gz", scans.body(SHAPE), affine)
    affine[:3, 3] += affine[:3, :3] @ [0, 3, 0]
    scans.nifti(tmp_path / "m.nii.gz", mask, affine)
    volume = prepared(tmp_path)
    # Three voxels further on, where the last of them fall off the scan.
    wanted = np.zeros_like(mask)
    wanted[:, 3:] = mask[:, :-3]
    np.testing.assert_array_equal(volume.read_mask().numpy(), canonical(wanted, affine))
    assert volume.record.done["mask"] == "resampled from a grid of (16, 14, 12)"


@pytest.mark.parametrize("scan", PLACED)
def test_a_mask_whose_place_is_outside_the_scan_is_taken_voxel_by_voxel_and_said(
    scans, tmp_path, capsys, scan
):
    mask = label_map()
    scans.nifti(tmp_path / "a.nii.gz", scans.body(SHAPE), PLACED[scan])
    scans.nifti(tmp_path / "m.nii.gz", mask, affine_of(SIDES, (200.0, 0.0, 0.0)))
    volume = prepared(tmp_path)
    np.testing.assert_array_equal(volume.read_mask().numpy(), canonical(mask, PLACED[scan]))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "1 mask placed elsewhere than the scan by its header, taken voxel by voxel all the same: a.nii.gz"
    )


def test_a_bare_mask_of_another_order_of_axes_is_refused(scans, tmp_path):
    # Of the scan's size once the scan is upright, but which way its axes run nobody knows.
    scans.nifti(tmp_path / "a.nii.gz", scans.body(SHAPE), PLACED["sagittal"])
    BARE["identity"](tmp_path / "m.nii.gz", label_map((16, 12, 14)))
    assert prepared(tmp_path) is None
    assert refused(tmp_path) == "mask m.nii.gz of shape (16, 12, 14) does not fit the scan, (12, 14, 16)"


def test_a_coarser_mask_reaches_the_border_of_the_scan(scans, tmp_path):
    mask = np.ones((8, 8, 8), np.uint8)
    scans.nifti(tmp_path / "a.nii.gz", scans.body((24, 24, 24)))
    affine = np.diag([3.0, 3, 3, 1])
    affine[:3, 3] = 1
    scans.nifti(tmp_path / "m.nii.gz", mask, affine)
    assert prepared(tmp_path).read_mask().all()


def channels(tmp_path):
    """Both channels of the only subject, and what was done."""
    options = PrepareOptions(
        (str(tmp_path / "d"),), str(tmp_path / "s.h5"), channels=("t1", "t2"), normalize="none", workers=0
    )
    prepare(options)
    volume = open_data([tmp_path / "s.h5"])[0]
    return volume.read().numpy(), volume.record.done


@pytest.mark.parametrize("scan", PLACED)
@pytest.mark.parametrize("bare", ["identity", "flipped sides", "no codes"])
def test_a_channel_with_a_bare_header_is_no_mirror_image_of_the_first(scans, tmp_path, capsys, scan, bare):
    one, two = scans.body(SHAPE, 1), scans.body(SHAPE, 2)
    scans.nifti(tmp_path / "d" / "p_t1.nii.gz", one, PLACED[scan])
    BARE[bare](tmp_path / "d" / "p_t2.nii.gz", two)
    stored, done = channels(tmp_path)
    np.testing.assert_array_equal(stored, [canonical(one, PLACED[scan]), canonical(two, PLACED[scan])])
    assert done["voxel_by_voxel"] == ["t2"]
    assert capsys.readouterr().out.splitlines()[-1] == (
        "1 scan with a channel that its header places elsewhere than the first, taken voxel by voxel all "
        "the same: p_t1.nii.gz"
    )


def test_one_scan_under_two_subjects_is_told(scans, tmp_path, capsys):
    image = scans.body(SHAPE, 1).astype(np.float32)
    scans.nifti(tmp_path / "d" / "a1.nii.gz", image, PLACED["ras"])
    scans.nifti(tmp_path / "d" / "b2.nii.gz", 2 * image, PLACED["ras"])
    scans.nifti(tmp_path / "d" / "c3.nii.gz", scans.body(SHAPE, 2), PLACED["ras"])
    scans.nifti(tmp_path / "d" / "c3_visit2.nii.gz", scans.body(SHAPE, 2), PLACED["ras"])
    prepare(PrepareOptions((str(tmp_path / "d"),), str(tmp_path / "s.h5"), workers=0))
    told = "1 scan with the voxels of another subject's: a1.nii.gz = b2.nii.gz; if"
    assert [line.startswith(told) for line in capsys.readouterr().out.splitlines()].count(True) == 1


def test_series_of_one_folder_under_two_subjects_are_told_apart(scans, tmp_path, capsys):
    """Both were called by their folder: `. = .`."""
    for uid, patient in (("1.2.1", "P1"), ("1.2.2", "P2")):
        scans.dicom(tmp_path / "d", scans.body(SHAPE, 1), uid, patient=patient, prefix=patient)
    prepare(PrepareOptions((str(tmp_path / "d"),), str(tmp_path / "s.h5"), workers=0))
    told = "1 scan with the voxels of another subject's: d/1.2.1 = d/1.2.2; if"
    assert [line.startswith(told) for line in capsys.readouterr().out.splitlines()].count(True) == 1


def test_slices_that_are_there_twice_are_told(scans, tmp_path, capsys):
    first, *_ = scans.dicom(tmp_path / "d", scans.body(SHAPE, 1), "1.2.1")
    shutil.copy(first, tmp_path / "d" / "copy.dcm")
    prepare(PrepareOptions((str(tmp_path / "d"),), str(tmp_path / "s.h5"), workers=0))
    told = "1 slice there twice, with the same pixels, and read once: 1 of d/1.2.1"
    assert told in capsys.readouterr().out.splitlines()


def test_missing_channels_are_told(scans, tmp_path, capsys):
    for k in range(4):
        scans.nifti(tmp_path / "d" / f"p{k}_t1.nii.gz", scans.body(SHAPE, k), PLACED["ras"])
    scans.nifti(tmp_path / "d" / "p0_t2.nii.gz", scans.body(SHAPE, 9), PLACED["ras"])
    options = PrepareOptions(
        (str(tmp_path / "d"),), str(tmp_path / "s.h5"), channels=("t1", "t2", "pd"), workers=0
    )
    prepare(options)
    told = capsys.readouterr().out.splitlines()
    assert (
        "d: 3 of 4 scans without the channel t2, which is 0 there: p1_t1.nii.gz, p2_t1.nii.gz, p3_t1.nii.gz"
        in told
    )
    assert "d: no scan has the channel pd, which is 0 everywhere; is the name right?" in told


def test_a_channel_of_unknown_place_and_another_shape_is_refused(scans, tmp_path):
    scans.nifti(tmp_path / "d" / "p_t1.nii.gz", scans.body(SHAPE), PLACED["ras"])
    uncoded(tmp_path / "d" / "p_t2.nii.gz", scans.body((16, 14, 12)))
    options = PrepareOptions(
        (str(tmp_path / "d"),), str(tmp_path / "s.h5"), channels=("t1", "t2"), workers=0
    )
    assert not prepare(options).volumes
    assert refused(tmp_path) == "channel t2: shape (16, 14, 12), the first has (12, 14, 16)"


@pytest.mark.parametrize("turned", [False, True])
def test_a_registered_channel_keeps_its_border(scans, tmp_path, turned):
    one = scans.body(SHAPE, dtype=np.float32) + 50
    affine = PLACED["lps"].copy()
    scans.nifti(tmp_path / "d" / "p_t1.nii.gz", one, affine)
    affine[:3, 3] += 0.005  # mm: as a registration, or a header's rounding, leaves it
    if turned:
        affine[0, 1] += 0.002
    scans.nifti(tmp_path / "d" / "p_t2.nii.gz", one, affine)
    stored, done = channels(tmp_path)
    assert done["onto_first_channel"] == ["t2"]
    np.testing.assert_allclose(stored[1], stored[0], atol=4)


def test_a_channel_is_filled_from_half_a_voxel_beyond_its_end(scans, tmp_path):
    one = scans.body(SHAPE, dtype=np.float32) + 50
    affine = PLACED["ras"].copy()
    scans.nifti(tmp_path / "d" / "p_t1.nii.gz", one, affine)
    affine[:3, 3] += affine[:3, :3] @ [0, 0, 2.4]  # centre 2 lies 0.4 before its first, centre 1 1.4
    scans.nifti(tmp_path / "d" / "p_t2.nii.gz", one, affine)
    stored, _ = channels(tmp_path)
    np.testing.assert_allclose(stored[1, :2], one.min(), atol=0.1)
    np.testing.assert_allclose(stored[1, 2], canonical(one, affine)[0], atol=0.2)
