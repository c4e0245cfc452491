"""Every format gives the same voxels at the same place; every damaged file is refused with its reason."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ssl3d.data.geometry import spacing_of
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.data.scans.read import header_spacing, read, read_mask, sha256_of, stem_of, suffix_of
from ssl3d.errors import DataError

OBLIQUE = np.array([[-0.9, 0.1, 0.3, 20], [0.1, 1.1, -0.2, -30], [-0.1, 0.15, 2.4, 5], [0, 0, 0, 1.0]])
OBLIQUE[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] @ np.diag([0.9, 1.1, 2.4])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"])
def test_formats_agree(scans, tmp_path, suffix):
    voxels = scans.body()
    write = scans.nifti if ".nii" in suffix else scans.itk
    pixels = read([write(tmp_path / f"a{suffix}", voxels, OBLIQUE)])
    reference = read([scans.nifti(tmp_path / "b.nii.gz", voxels, OBLIQUE)])
    np.testing.assert_array_equal(pixels.voxels, reference.voxels)
    np.testing.assert_allclose(pixels.affine, reference.affine, atol=1e-3)
    assert pixels.orientation == "SAR"
    assert header_spacing([tmp_path / f"a{suffix}"]) == pytest.approx(pixels.spacing, rel=1e-4)


@pytest.mark.parametrize("suffix", [".mgz", ".mgh", ".hdr", ".img", ".hdr.gz", ".img.gz"])
def test_other_formats_of_nibabel_agree_with_nifti(scans, tmp_path, suffix):
    voxels = scans.body()
    kind = nibabel.MGHImage if suffix.startswith(".mg") else nibabel.Nifti1Pair
    path = tmp_path / f"a{suffix}"
    nibabel.save(kind(voxels, OBLIQUE), path)
    reference = read([scans.nifti(tmp_path / "b.nii.gz", voxels, OBLIQUE)])
    pixels = read([path])
    np.testing.assert_array_equal(pixels.voxels, reference.voxels)
    np.testing.assert_allclose(pixels.affine, reference.affine, atol=1e-3)
    assert pixels.orientation == "SAR" and header_spacing([path]) == pytest.approx(pixels.spacing, rel=1e-4)
    (scan, _) = find([tmp_path], Wanted()).scans  # an image in two files is one scan
    assert scan.id.endswith("/a")


def test_analyze_tells_sides_and_no_place(scans, tmp_path):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    nibabel.save(nibabel.AnalyzeImage(scans.body(), affine), tmp_path / "a.img")
    pixels = read([tmp_path / "a.img"])
    np.testing.assert_array_equal(np.sort(pixels.voxels, axis=None), np.sort(scans.body(), axis=None))
    assert pixels.orientation == "unknown" and pixels.spacing == pytest.approx((4, 3, 2))


@pytest.mark.parametrize("name", ["minc1_1_scale.mnc", "minc2_1_scale.mnc"])
def test_minc_lies_where_nibabel_says(tmp_path, name):
    path = Path(nibabel.__file__).parent / "tests" / "data" / name
    if not path.is_file():
        pytest.skip("this nibabel comes without its test data")
    image = nibabel.as_closest_canonical(nibabel.load(path))
    np.testing.assert_allclose(read([path]).voxels[0], np.asarray(image.dataobj).T, rtol=1e-6)
    assert header_spacing([path]) == pytest.approx(tuple(image.header.get_zooms()[::-1]))


@pytest.mark.parametrize("how", ["gzipped", "bare", "bare implicit", "deflated"])
def test_dicom_in_other_clothes_is_the_same(scans, tmp_path, how):
    files = scans.dicom(tmp_path / "d", scans.body((10, 12, 6)), "1.2.3.4", OBLIQUE)
    reference = read(files)
    for path in files:
        header = pydicom.dcmread(path)
        if how == "gzipped":
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        elif how == "deflated":
            header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
            header.save_as(path)
        else:
            path.unlink()
            with open(path.with_suffix(""), "wb") as file:
                pydicom.dcmwrite(
                    file,
                    pydicom.Dataset(dict(header.items())),
                    implicit_vr="implicit" in how,
                    little_endian=True,
                )
    (scan,) = find([tmp_path / "d"], Wanted()).scans
    assert scan.subject == "P1" and len(scan.files[0]) == 6
    pixels = read(scan.files[0])
    np.testing.assert_array_equal(pixels.voxels, reference.voxels)
    np.testing.assert_allclose(pixels.affine, reference.affine)


def test_dicom_that_gdcm_reads_wrongly_is_as_pydicom_has_it():
    for name in ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm", "liver_1frame.dcm", "image_dfl.dcm"):
        path = Path(get_testdata_file(name))
        expected = pydicom.dcmread(path).pixel_array
        pixels = read([path])
        if pixels.orientation == "SAR":
            expected = expected[::-1, ::-1]
        expected = np.moveaxis(expected, -1, 0) if pixels.colours else expected[None]
        np.testing.assert_array_equal(pixels.voxels[:, 0], expected)


def test_a_dicom_series_agrees_with_nifti_whatever_its_file_names(scans, tmp_path):
    voxels = scans.body((10, 12, 6))
    files = scans.dicom(tmp_path / "d", voxels, "1.2.3.4", OBLIQUE, modality="CT")
    pixels = read(files)
    reference = read([scans.nifti(tmp_path / "b.nii.gz", voxels, OBLIQUE)])
    np.testing.assert_array_equal(pixels.voxels, reference.voxels)
    np.testing.assert_allclose(pixels.affine, reference.affine, atol=1e-3)
    assert pixels.modality == "CT"
    assert header_spacing(files) == pytest.approx(pixels.spacing, rel=1e-4)


def test_repeated_slice_positions_are_frames(scans, tmp_path):
    first, second = scans.body((10, 12, 6), seed=1), scans.body((10, 12, 6), seed=2)
    files = scans.dicom(tmp_path, first, "1.2.3.4", prefix="a")
    files += scans.dicom(tmp_path, second, "1.2.3.4", prefix="b", first=6)
    pixels = read(files)
    for frame, voxels in enumerate((first, second)):
        np.testing.assert_array_equal(pixels.voxels[frame], voxels.T)


def test_missing_slices_and_frames_are_noticed(scans, tmp_path):
    files = scans.dicom(tmp_path, scans.body((10, 12, 8)), "1.2.3.4")
    with pytest.raises(DataError, match=r"slices are missing: a gap of 2 mm at \d+, usually 1 mm"):
        read(files[:3] + files[4:])
    with pytest.raises(DataError, match="slices are missing"):
        read([files[0], *files[2:4]])
    more = scans.dicom(tmp_path, scans.body((10, 12, 7)), "1.2.3.4", prefix="b", first=8)
    with pytest.raises(DataError, match="frames are incomplete"):
        read(files + more)


def test_slices_of_two_orientations_are_refused(scans, tmp_path):
    files = scans.dicom(tmp_path, scans.body((10, 12, 4)), "1.2.3.4", prefix="a")
    files += scans.dicom(tmp_path, scans.body((10, 12, 4)), "1.2.3.4", OBLIQUE, prefix="b", first=4)
    with pytest.raises(DataError, match="several orientations"):
        read(files)


def test_a_radiograph_has_spacing_but_no_place(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4000, (1, 30, 40)).astype(np.int16)
    image = sitk.GetImageFromArray(pixels)
    image.SetSpacing([0.3, 0.2, 1.0])
    image.SetMetaData("0008|0060", "DX")
    sitk.WriteImage(image, str(tmp_path / "a.dcm"))
    found = read([tmp_path / "a.dcm"])
    assert found.orientation == "unknown"
    assert found.voxels.shape == (1, 1, 30, 40)
    np.testing.assert_array_equal(found.voxels[0], pixels)
    assert found.spacing[1:] == pytest.approx((0.2, 0.3))
    assert header_spacing([tmp_path / "a.dcm"]) == pytest.approx(found.spacing)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_pictures_are_volumes_of_depth_one(tmp_path, suffix):
    values = np.tile(np.arange(0, 240, 10, np.uint8), (20, 1))
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    pixels = read([tmp_path / f"a{suffix}"])
    assert pixels.voxels.shape == (1, 1, 20, 24)
    assert pixels.orientation == "unknown"
    assert pixels.eight_bit
    np.testing.assert_allclose(pixels.voxels[0, 0].astype(int), values, atol=3)
    np.testing.assert_allclose((pixels.affine @ [0, 3, 5, 1])[:3], [5, 3, 0])


def test_sixteen_bit_and_coloured_pictures(tmp_path):
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    Image.fromarray(deep).save(tmp_path / "deep.png")
    pixels = read([tmp_path / "deep.png"])
    np.testing.assert_array_equal(pixels.voxels[0, 0], deep)
    assert not pixels.eight_bit
    colour = np.random.default_rng(0).integers(0, 255, (20, 30, 4), np.uint8)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    pixels = read([tmp_path / "colour.png"])
    assert pixels.colours
    assert pixels.voxels.shape == (3, 1, 20, 30)


def test_four_dimensions_keep_their_frames(scans, tmp_path):
    frames = np.stack([scans.body(seed=s) for s in range(3)], axis=-1)
    pixels = read([scans.nifti(tmp_path / "a.nii.gz", frames, OBLIQUE)])
    single = read([scans.nifti(tmp_path / "b.nii.gz", frames[..., 2], OBLIQUE)])
    np.testing.assert_array_equal(pixels.voxels[2], single.voxels[0])
    np.testing.assert_allclose(pixels.affine, single.affine)


def test_scaled_nifti_has_its_real_values(tmp_path):
    image = nibabel.Nifti1Image(np.full((4, 4, 4), 10, np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, -1024.0)
    nibabel.save(image, tmp_path / "a.nii")
    assert read([tmp_path / "a.nii"]).voxels.max() == nibabel.load(tmp_path / "a.nii").get_fdata().max()


def test_nifti_without_a_place_is_unknown(scans, tmp_path):
    nibabel.save(nibabel.Nifti1Image(scans.body(), None), tmp_path / "a.nii.gz")
    assert read([tmp_path / "a.nii.gz"]).orientation == "unknown"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".png", ".jpg", ".dcm"])
@pytest.mark.parametrize("keep", [0, 0.02, 0.5, 0.95])
def test_truncated_files_are_refused(scans, tmp_path, suffix, keep):
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 4000, (24, 25, 26)).astype(np.int16)
    if ".nii" in suffix:
        scans.nifti(path, noise)
    elif suffix in (".nrrd", ".mha"):
        scans.itk(path, noise)
    elif suffix == ".dcm":
        scans.dicom(tmp_path / "d", noise[..., :1], "1.2.3.4")[0].rename(path)
    else:
        Image.fromarray((noise[0] // 16).astype(np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(DataError) as caught:
        read([path])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 260
    if keep == 0:
        assert message == "empty file"


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_truncated_itk_files_are_refused_compressed_or_not(scans, tmp_path, suffix, compress):
    path = scans.itk(tmp_path / f"a{suffix}", scans.body((30, 30, 30)), compress=compress)
    read([path])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError) as caught:
        read([path])
    assert "No such file" not in str(caught.value)
    if (suffix, compress) == (".mha", False):
        assert str(caught.value).startswith("cut short: ")


def test_a_missing_raw_file_of_an_mhd_is_an_error(scans, tmp_path):
    scans.itk(tmp_path / "a.mhd", scans.body())
    raw = tmp_path / "a.raw"
    raw.write_bytes(raw.read_bytes()[:100])
    with pytest.raises(DataError):
        read([tmp_path / "a.mhd"])
    raw.unlink()
    with pytest.raises(DataError):
        read([tmp_path / "a.mhd"])


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha", "a.nrrd", "a.png", "a.dcm", "a"])
def test_rubbish_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"hello world, this is no scan\n" * 30)
    with pytest.raises(DataError, match=r"unreadable|not readable"):
        read([tmp_path / name])
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(DataError, match="unreadable"):
        read([tmp_path / "b.nii.gz"])


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".png"])
def test_large_files_are_refused_before_reading(scans, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        Image.new("L", (40, 50)).save(path)
    else:
        (scans.nifti if suffix == ".nii.gz" else scans.itk)(path, scans.body())
    with pytest.raises(DataError, match=r"more than --max-voxels 1,000"):
        read([path], max_voxels=1000)


def test_an_absurd_header_costs_no_memory(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    nibabel.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(DataError, match="27,000,000,000,000 voxels"):
        read([tmp_path / "a.nii"], max_voxels=2**30)


@pytest.mark.parametrize("broken", [np.diag([0.0, 1, 1, 1]), np.diag([np.nan, 1, 1, 1])])
def test_degenerate_affines_are_refused(tmp_path, broken):
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4))
    nibabel.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[280:328] = broken[:3].astype("<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(DataError, match="affine of the header"):
        read([tmp_path / "a.nii"])


@pytest.mark.parametrize(
    ("unit", "sides"), [("meter", 0.001), ("micron", 1000.0), ("mm", 1.0), (None, 1.0)]
)
def test_units_of_a_nifti_are_turned_into_mm(scans, tmp_path, unit, sides):
    affine = OBLIQUE.copy()
    affine[:3] *= sides
    image = nibabel.Nifti1Image(scans.body(), affine)
    image.header.set_xyzt_units(unit, "sec")
    nibabel.save(image, tmp_path / "a.nii")
    pixels = read([tmp_path / "a.nii"])
    np.testing.assert_allclose(pixels.original_affine, OBLIQUE, rtol=1e-5, atol=1e-5)
    assert sorted(pixels.spacing) == pytest.approx([0.9, 1.1, 2.4], rel=1e-4)
    assert header_spacing([tmp_path / "a.nii"]) == pytest.approx(pixels.spacing)


def test_a_degenerate_sform_gives_way_to_a_qform(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([1.0, 2, 3, 1]))
    image.set_qform(OBLIQUE, 1)
    nibabel.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[280:328] = bytes(48)
    (tmp_path / "a.nii").write_bytes(raw)
    pixels = read([tmp_path / "a.nii"])
    np.testing.assert_allclose(pixels.original_affine, OBLIQUE, atol=1e-4)
    assert pixels.orientation == "SAR"
    assert header_spacing([tmp_path / "a.nii"]) == pytest.approx(pixels.spacing)


def test_complex_and_five_dimensional_files_are_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.complex64), np.eye(4)), tmp_path / "c.nii")
    with pytest.raises(DataError, match="complex"):
        read([tmp_path / "c.nii"])
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2, 3), np.int16), np.eye(4)), tmp_path / "f.nii")
    with pytest.raises(DataError, match="5 axes"):
        read([tmp_path / "f.nii"])


def test_masks_hold_whole_numbers(scans, tmp_path):
    labels = np.zeros((5, 6, 7))
    labels[2] = 3
    close = labels * 0.9999999 + 1e-5
    assert read_mask(scans.nifti(tmp_path / "a.nii.gz", close.astype(np.float32))).voxels.max() == 3
    with pytest.raises(DataError, match=r"mask b.nii.gz: values such as 0.5"):
        read_mask(scans.nifti(tmp_path / "b.nii.gz", (labels / 6).astype(np.float32)))
    with pytest.raises(DataError, match="labels -3"):
        read_mask(scans.nifti(tmp_path / "c.nii.gz", (-labels).astype(np.int16)))


def test_names_and_hashes(tmp_path):
    path = tmp_path / "A.b.NII.GZ"
    path.write_bytes(b"x")
    assert suffix_of(path) == ".nii.gz"
    assert stem_of(path) == "A.b"
    other = tmp_path / "c"
    other.write_bytes(b"y")
    assert sha256_of([path]) == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert sha256_of([path, other]) == sha256_of([other, path]) != sha256_of([path])


def test_real_oblique_volumes_keep_their_affine(real_data):
    for path in sorted((real_data / "brain_flair").glob("*.nii.gz")):
        pixels, source = read([path]), nibabel.load(path)
        assert spacing_of(pixels.affine) == pytest.approx(
            sorted(source.header.get_zooms(), reverse=True), rel=1e-3
        )
        brightest = np.unravel_index(pixels.voxels[0].argmax(), pixels.voxels[0].shape)
        there = (pixels.affine @ [*brightest, 1])[:3]
        index = np.rint(np.linalg.inv(source.affine) @ [*there, 1])[:3].astype(int)
        assert source.dataobj[tuple(index)] == pixels.voxels.max()
