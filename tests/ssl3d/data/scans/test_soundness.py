"""Damaged files: what is damaged is refused, by name, before a voxel of it is used."""

from __future__ import annotations

import errno
import gzip
import os
import re
import zipfile
import zlib

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import RLELossless

from ssl3d.cli import main
from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.data.scans.itk import image_of, pixels_of
from ssl3d.data.scans.read import read
from ssl3d.errors import DataError


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


# Check sums ---------------------------------------------------------------------------------------


def test_damage_in_a_gzip_stream_that_still_inflates_is_noticed(scans, tmp_path):
    raw = scans.nifti(tmp_path / "a.nii", scans.body()).read_bytes()
    packer = zlib.compressobj(0, zlib.DEFLATED, 31)  # stored as it is: any voxel can be changed
    packed = packer.compress(raw) + packer.flush()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(packed)
    np.testing.assert_array_equal(read([path]).voxels, read([tmp_path / "a.nii"]).voxels)
    at = packed.find(raw[2000:2040])
    path.write_bytes(flipped(packed, at))
    np.asarray(nibabel.load(path).dataobj)  # nibabel takes it: it stops before the check sum
    with pytest.raises(DataError, match="damaged: CRC check failed"):
        read([path])


@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz"])
def test_a_gzip_stream_without_its_end_is_cut_short(scans, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    image = nibabel.Nifti1Image if "nii" in suffix else nibabel.MGHImage
    nibabel.save(image(scans.body(), np.eye(4)), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="cut short: its gzip stream does not end"):
        read([path])


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr"])
def test_compressed_voxels_of_itk_are_checked_to_their_end(scans, tmp_path, name):
    path = scans.itk(tmp_path / name, scans.body(), compress=True)
    np.testing.assert_array_equal(read([path]).voxels[0], scans.body().T)
    (held,) = [p for p in tmp_path.iterdir() if p.suffix not in (".mhd", ".nhdr")]
    content = held.read_bytes()
    held.write_bytes(flipped(content, len(content) - 2))  # the check sum itself
    with pytest.raises(DataError, match=r"damaged: Error -3 .* incorrect (data|length) check"):
        read([path])
    held.write_bytes(content[:-40])
    with pytest.raises(DataError, match="cut short"):
        read([path])


@pytest.mark.parametrize("said", [b"", b"CompressedDataSize = 100\n", b"CompressedDataSize = 9999\n"])
def test_voxels_of_metaimage_inflate_whatever_its_header_says_of_their_bytes(tmp_path, said):
    voxels = np.random.default_rng(0).integers(-900, 900, (5, 6, 7)).astype(np.int16)
    path = tmp_path / "a.mha"
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path), True)
    whole, content = read([path]).voxels, path.read_bytes()
    path.write_bytes(re.sub(rb"CompressedDataSize = \d+\n", said, content))
    assert path.read_bytes() != content
    np.testing.assert_array_equal(read([path]).voxels, whole)


@pytest.mark.parametrize(
    "name", ["a.mha", "z.mha", "a.mhd", "z.mhd", "a.nrrd", "z.nrrd", "a.nhdr", "z.nhdr"]
)
@pytest.mark.parametrize(
    "kind", ["int8", "uint8", "int16", "uint16", "uint32", "int64", "float32", "float64"]
)
def test_voxels_of_itk_formats_are_those_that_itk_reads(tmp_path, name, kind):
    for shape, vector in (
        ((4, 5, 6), False),
        ((4, 5, 6, 3), True),
        ((2, 4, 5, 6), False),
        ((3,) * 4, True),
    ):
        voxels = np.random.default_rng(0).normal(0, 60, shape).astype(kind)
        sitk.WriteImage(sitk.GetImageFromArray(voxels, vector), str(tmp_path / name), name[0] == "z")
        ours, theirs = read([tmp_path / name]), pixels_of(image_of(tmp_path / name), colours=False)
        assert ours.voxels.dtype == theirs.voxels.dtype and ours.vector == theirs.vector
        np.testing.assert_array_equal(ours.voxels, theirs.voxels)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "z.nrrd", "z.mha"])
def test_a_header_whose_sizes_are_no_numbers_is_refused(tmp_path, name):
    voxels = np.arange(4 * 18 * 16, dtype=np.int16).reshape(4, 18, 16)
    path = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path), name[0] == "z")
    content = path.read_bytes()
    assert b"16 18 4" in content
    path.write_bytes(content.replace(b"16 18 4", b"16 1\x18 4", 1))  # ITK reads 16 x 1 x 4 of one
    with pytest.raises(DataError, match="its header does not tell size, type and place of its voxels"):
        read([path])


def test_numbers_whose_highest_byte_comes_first_are_read_so(tmp_path):
    voxels = np.arange(24, dtype=">i2").reshape(2, 3, 4).tobytes()
    head = b"NDims = 3\nDimSize = 4 3 2\nElementType = MET_SHORT\nBinaryDataByteOrderMSB = True\n"
    (tmp_path / "a.mha").write_bytes(head + b"ElementDataFile = LOCAL\n" + voxels)
    head = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 2\nencoding: raw\nendian: big\n\n"
    (tmp_path / "a.nrrd").write_bytes(head + voxels)
    for name in ("a.mha", "a.nrrd"):
        theirs = pixels_of(image_of(tmp_path / name)).voxels
        np.testing.assert_array_equal(read([tmp_path / name]).voxels, theirs)
        assert sorted(theirs.reshape(-1)) == list(range(24))


def test_damage_in_an_archive_costs_the_archive_before_a_row_is_used(scans, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 18, 19, 20), np.uint8)
    path = tmp_path / "in" / "m.npz"
    path.parent.mkdir()
    np.savez(path, train_images=images)
    content = path.read_bytes()
    at = content.find(images[0].tobytes())
    path.write_bytes(flipped(content, at + 100))
    scans.nifti(tmp_path / "in" / "v.nii", scans.body())
    prepare(PrepareOptions((str(path.parent),), str(tmp_path / "s.h5"), workers=0))
    assert [volume.subject for volume in open_data([tmp_path / "s.h5"])] == ["v"]
    rejected = (tmp_path / "rejected.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert rejected == ["m.npz,damaged: the check sum of train_images does not hold,s.h5"]


def _broken(how: str, content: bytes, path) -> None:
    def patch(sign: bytes, offset: int, value: int) -> None:
        nonlocal content
        at = 0
        while (at := content.find(sign, at)) >= 0:
            content = content[: at + offset] + bytes([value]) + content[at + offset + 1 :]
            at += 4

    def header(shape, kind: str = "|u1") -> bytes:
        import io

        text = io.BytesIO()
        np.lib.format.write_array_header_1_0(text, {"descr": kind, "fortran_order": False, "shape": shape})
        return text.getvalue()

    if how == "encrypted":
        patch(b"PK\3\4", 6, 1)
        patch(b"PK\1\2", 8, 1)
    elif how == "method":
        patch(b"PK\3\4", 8, 99)
        patch(b"PK\1\2", 10, 99)
    elif how in ("rows", "labels"):
        path.unlink(missing_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            if how == "rows":
                archive.writestr("train_images.npy", header((10**12, 8, 8, 8)) + bytes(512))
            else:
                archive.writestr("train_images.npy", header((2, 8, 8, 8)) + bytes(1024))
                archive.writestr("train_labels.npy", header((2, 10**15), "<f8") + bytes(16))
        return
    elif how == "empty":
        content = b"PK\5\6" + bytes(18)
    elif how == "text":
        content = b"no archive"
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "pickled":
        np.savez(path, train_images=np.array([{}], dtype=object))
        return
    path.write_bytes(content)


@pytest.mark.parametrize(
    "how", ["encrypted", "method", "rows", "labels", "empty", "text", "cut", "pickled"]
)
def test_a_broken_archive_is_refused_beside_good_scans(scans, tmp_path, how):
    path = tmp_path / "x.npz"
    np.savez(path, train_images=np.zeros((2, 8, 8, 8), np.uint8))
    _broken(how, path.read_bytes(), path)
    scans.nifti(tmp_path / "v.nii", scans.body())
    contents = find([tmp_path], Wanted())
    assert [scan.source for scan in contents.scans] == ["v.nii"]
    ((source, reason),) = contents.rejected
    assert source == "x.npz" and reason.startswith(("unreadable: ", "arrays none"))


def test_a_picture_whose_check_sum_does_not_hold_is_refused(tmp_path):
    path = tmp_path / "a.png"
    values = np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)
    Image.fromarray(values).save(path, compress_level=0)
    content = path.read_bytes()
    at = content.find(values[20].tobytes())
    path.write_bytes(flipped(content, at))
    with pytest.raises(DataError, match="damaged: the check sum of IDAT does not hold"):
        read([path])


# Sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "packbits", "tiff_deflate"])
def test_a_tiff_whose_strips_do_not_cover_it_is_refused_at_once(tmp_path, compression):
    values = np.random.default_rng(0).integers(0, 255, (18, 16)).astype(np.uint8)
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path, compression=compression)
    np.testing.assert_array_equal(read([path]).voxels[0, 0], values)
    content = bytearray(path.read_bytes())
    with Image.open(path) as picture:
        rows = picture.tag_v2.get(278)
    place = max(content.find(bytes((1, 1, kind, 0, 1, 0, 0, 0))) for kind in (3, 4))  # the height
    content[place + 2 : place + 12] = bytes((4, 0, 1, 0, 0, 0)) + (8388626).to_bytes(4, "little")
    path.write_bytes(content)
    told = rf"1 piece of 16 x {rows}, its header promises [\d,]+ \(16 x 8388626"
    with pytest.raises(DataError, match=told):
        read([path])


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_fewer_bits_than_blocks_is_cut_short(tmp_path, progressive):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.full((4000, 5000), 90, np.uint8)).save(path, progressive=progressive, quality=5)
    assert read([path]).voxels.shape == (1, 1, 4000, 5000)  # as few bits as there can be
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(path, progressive=progressive)
    content = bytearray(path.read_bytes())
    place = content.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
    content[place : place + 4] = (13_000).to_bytes(2, "big") * 2
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cut short: [\d,]+ bytes, its header promises 13,000 x 13,000"):
        read([path])


def test_a_tiff_that_ends_before_its_strips_is_cut_short(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((40, 50), np.uint16) * 700).save(path)
    content = path.read_bytes()
    with Image.open(path) as picture:
        start = picture.tag_v2[273][0]
    path.write_bytes(content[: start + 3999])
    with pytest.raises(DataError, match=r"cut short: [\d,]+ bytes, its header promises [\d,]+"):
        read([path])


@pytest.mark.parametrize("explicit", [True, False])
def test_a_dicom_file_with_fewer_pixels_than_its_header_says_is_refused(scans, tmp_path, explicit):
    stored = scans.body((30, 28, 1))[..., 0].astype(np.uint16)
    path = scans.raw_dicom(tmp_path / "a.dcm", stored, {}, explicit=explicit)
    assert read([path]).voxels.shape == (1, 1, 30, 28)
    header = pydicom.dcmread(path)
    for rows in (40, 20):
        header.Rows = rows
        header.save_as(path)
        needed = rows * 28 * 2
        with pytest.raises(
            DataError, match=f"damaged: 1,680 bytes of pixels, but its header promises {needed:,}"
        ):
            read([path])
    header.Rows = 30
    header.save_as(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"not readable as DICOM|cut short"):
        read([path])


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
    ],
)
def test_compressed_dicom_of_another_size_than_its_header_is_refused(tmp_path, name):
    path = tmp_path / name
    header = pydicom.dcmread(get_testdata_file(name))
    for rows in (header.Rows + 8, header.Rows - 8):
        header.Rows = rows
        header.save_as(path)
        with pytest.raises(DataError, match="damaged"):
            read([path])
    content = (path.parent / name).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError):
        read([path])


def test_run_lengths_that_end_too_soon_are_refused(scans, tmp_path):
    stored = scans.body((30, 28, 1))[..., 0].astype(np.uint16)
    path = scans.raw_dicom(tmp_path / "a.dcm", stored, {})
    header = pydicom.dcmread(path)
    header.compress(RLELossless)
    header.save_as(path)
    np.testing.assert_array_equal(read([path]).voxels[0, 0], stored)
    content = path.read_bytes()
    at = content.rfind(b"\xfe\xff\x00\xe0") + 8  # its one item, behind the table of offsets
    length = int.from_bytes(content[at - 4 : at], "little")
    (tmp_path / "a.dcm").write_bytes(
        content[: at - 4] + (length - 200).to_bytes(4, "little") + content[at : at + length - 200]
        + b"\xfe\xff\xdd\xe0\0\0\0\0"
    )  # fmt: skip
    with pytest.raises(DataError, match=r"damaged: run lengths of \d+ pixels, its header promises 840"):
        read([path])


def test_a_header_that_promises_more_than_its_file_holds_takes_no_memory(tmp_path, scans):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float64)
    header.set_data_shape((1000, 1000, 1000))
    header.set_sform(np.eye(4), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(1004))
    with gzip.open(tmp_path / "a.nii.gz", "wb") as file:
        file.write(header.binaryblock + bytes(1004))
    scans.itk(tmp_path / "a.mha", scans.body((8, 8, 8)))
    scans.itk(tmp_path / "z.mha", scans.body((8, 8, 8)), compress=True)
    scans.itk(tmp_path / "a.nrrd", scans.body((8, 8, 8)))
    scans.itk(tmp_path / "z.nrrd", scans.body((8, 8, 8)), compress=True)
    for name in ("a.mha", "z.mha", "a.nrrd", "z.nrrd"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes().replace(b" 8 8 8\n", b" 900 900 900\n"))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError, match=r"cut short: .*, its header promises [\d,]{13}"):
            read([path])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "z.mha", "a.nrrd", "z.nrrd"])
def test_a_header_that_promises_less_than_its_file_holds_is_refused(scans, tmp_path, name):
    voxels = scans.body((12, 14, 16))
    path = tmp_path / name
    if ".nii" in name:
        image = nibabel.Nifti1Image(voxels, np.eye(4))
        content = image.to_bytes()
        image.header.set_data_shape((12, 14, 15))
        content = image.header.binaryblock + content[348:]
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    else:
        scans.itk(path, voxels, compress=name.startswith("z"))
        path.write_bytes(path.read_bytes().replace(b"12 14 16\n", b"12 14 15\n"))
    with pytest.raises(DataError, match="damaged"):
        read([path])


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr", "a.hdr", "a.img"])
def test_an_image_in_two_files_names_the_one_that_is_missing(scans, tmp_path, name):
    path = tmp_path / name
    if path.suffix in (".hdr", ".img"):
        nibabel.save(nibabel.Nifti1Pair(scans.body(), np.eye(4)), path)
    else:
        scans.itk(path, scans.body())
    (other,) = [p for p in tmp_path.iterdir() if p != path]
    other.unlink()
    with pytest.raises(DataError, match=rf"{other.name}.*missing|missing.*{other.name}"):
        read([path])


# What is no file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.nii.gz", "x.npz", "x.csv", "x.dcm", "dataset.json"])
def test_a_pipe_is_never_opened(scans, tmp_path, capsys, name):
    scans.nifti(tmp_path / "in" / "v.nii", scans.body())
    os.mkfifo(tmp_path / "in" / name)
    assert [scan.source for scan in find([tmp_path / "in"], Wanted()).scans] == ["v.nii"]
    assert main(["prepare", str(tmp_path / "in" / name), "--out", str(tmp_path / "s.h5")]) == 2
    assert "neither a file nor a folder, but a pipe or a device" in capsys.readouterr().err
    with pytest.raises(DataError, match="no regular file"):
        read([tmp_path / "in" / name])


# Refusals that say what to do ----------------------------------------------------------------------


def test_jpeg_ls_of_seven_bits_is_refused_by_name(tmp_path):
    path = tmp_path / "a.dcm"
    with open(get_testdata_file("JPEGLSNearLossless_08.dcm"), "rb") as file:
        content = file.read()
    at = content.find(b"\xff\xf7") + 4  # bits of a value, in the JPEG's own header
    path.write_bytes(content[:at] + b"\7" + content[at + 1 :])
    with pytest.raises(DataError, match="JPEG-LS of 7 bits a value, which GDCM does not decode; dcmdjpls"):
        read([path])


def test_values_on_surfaces_are_refused_by_name(tmp_path):
    from nibabel import cifti2

    axes = cifti2.ScalarAxis(["a", "b"]), cifti2.BrainModelAxis.from_mask(np.ones(5, bool), "CORTEX_LEFT")
    image = cifti2.Cifti2Image(np.zeros((2, 5), np.float32), cifti2.Cifti2Header.from_axes(axes))
    nibabel.save(image, tmp_path / "a.dscalar.nii")
    with pytest.raises(DataError, match="CIFTI: values at points of the brain's surface, not a volume"):
        read([tmp_path / "a.dscalar.nii"])


# A passing fault is no verdict ----------------------------------------------------------------------


@pytest.mark.parametrize("code", ["EMFILE", "EIO", "ESTALE", "ETIMEDOUT"])
def test_a_file_that_cannot_be_opened_just_now_is_not_left_out(scans, tmp_path, monkeypatch, capsys, code):
    for path in scans.dicom(tmp_path / "in", scans.body((10, 12, 6)), "1.2.3.4", np.eye(4)):
        path.rename(path.with_suffix(""))  # told by its first bytes

    def fails(*args, **options):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    with monkeypatch.context() as patched:
        patched.setattr("ssl3d.data.scans.dicom_pixels.open", fails, raising=False)
        assert (
            main(["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "s.h5"), "--workers", "0"]) == 3
        )
    assert os.strerror(getattr(errno, code)) in capsys.readouterr().err
    assert not (tmp_path / "s.h5").exists()
    assert main(["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "s.h5"), "--workers", "0"]) == 0
