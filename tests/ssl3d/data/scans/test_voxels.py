"""Voxels that formats pack in odd ways: mosaics, vectors, channels of rows, deep and palette pictures."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image

from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.arrays import frames_of_row
from ssl3d.data.scans.read import header_spacing, read, read_mask
from ssl3d.errors import DataError


def stored(tmp_path, source, **options):
    """Prepare one source; return the volumes and the reasons of what was refused."""
    out = tmp_path / "out" / "s.h5"
    prepare(PrepareOptions((str(source),), str(out), workers=0, **options))
    table = out.parent / "rejected.csv"
    reasons = table.read_text(encoding="utf-8").splitlines()[1:] if table.is_file() else []
    return list(open_data([out])) if out.is_file() else [], reasons


# Siemens mosaics ------------------------------------------------------------------------------------


@pytest.fixture
def mosaic(tmp_path) -> Path:
    path = Path(nibabel.__file__).parent / "nicom" / "tests" / "data" / "siemens_dwi_1000.dcm.gz"
    if not path.is_file():
        pytest.skip("this nibabel comes without its test data")
    (tmp_path / "m.dcm").write_bytes(gzip.decompress(path.read_bytes()))
    return tmp_path / "m.dcm"


def test_a_mosaic_is_a_volume_whose_slices_lie_where_its_header_says(mosaic):
    header = pydicom.dcmread(mosaic)
    sheet = header.pixel_array
    pixels = read([mosaic])
    assert pixels.voxels.shape == (1, 48, 128, 128)
    assert header_spacing([mosaic]) == pytest.approx((3.0, 1.796875, 1.796875), rel=1e-4)
    # By hand: the header places the corner of the sheet as if its middle were that of a slice.
    across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    side = float(header.PixelSpacing[0])
    corner = np.array(header.ImagePositionPatient) + (across + down) * side * (896 - 128) / 2
    for k, row, column in ((0, 0, 0), (9, 40, 70), (47, 127, 127)):
        place = corner + side * (across * column + down * row) + 3.0 * k * np.cross(across, down)
        index = np.rint(np.linalg.inv(pixels.affine) @ [-place[0], -place[1], place[2], 1])[:3].astype(int)
        np.testing.assert_allclose((pixels.affine @ [*index, 1])[:3], place * (-1, -1, 1), atol=0.02)
        assert pixels.voxels[0][tuple(index)] == sheet[k // 7 * 128 + row, k % 7 * 128 + column]


def test_mosaics_of_a_series_are_frames_in_the_order_of_time(mosaic):
    header = pydicom.dcmread(mosaic)
    later = header.pixel_array + 1
    header.InstanceNumber = int(header.InstanceNumber) + 1
    header.PixelData = later.astype(np.uint16).tobytes()
    header.save_as(mosaic.with_name("a.dcm"))
    pixels = read([mosaic.with_name("a.dcm"), mosaic])
    assert pixels.voxels.shape == (2, 48, 128, 128)
    np.testing.assert_array_equal(pixels.voxels[1], pixels.voxels[0] + 1)


def test_a_mosaic_is_known_by_siemens_own_type_too(mosaic):
    header = pydicom.dcmread(mosaic)
    whole = read([mosaic]).voxels
    header.ImageType = ["DERIVED", "PRIMARY", "DIFFUSION"]  # as programs that pass images on leave it
    header.private_block(0x51, "SIEMENS MR HEADER", create=True).add_new(0x16, "LO", "p2 M/ND/MOSAIC")
    header.save_as(mosaic)
    np.testing.assert_array_equal(read([mosaic]).voxels, whole)


def test_a_grid_of_united_imaging_is_refused_by_name(mosaic):
    header = pydicom.dcmread(mosaic)
    header.remove_private_tags()
    header.ImageType = ["ORIGINAL", "PRIMARY", "M", "VFRAME"]
    grid = header.private_block(0x65, "Image Private Header", create=True)
    grid.add_new(0x50, "DS", "48")
    header.save_as(mosaic)
    with pytest.raises(DataError, match=r"a grid of 48 slices in one picture .* with dcm2niix"):
        read([mosaic])
    grid[0x50].value = "1"
    header.save_as(mosaic)
    assert read([mosaic]).voxels.shape == (1, 1, 896, 896)


def test_a_mosaic_without_siemens_header_is_refused_by_name(mosaic):
    header = pydicom.dcmread(mosaic)
    header.remove_private_tags()
    header.save_as(mosaic)
    with pytest.raises(
        DataError, match=r"a Siemens mosaic without the header .*; convert it with dcm2niix"
    ):
        read([mosaic])


# Vectors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v.mha", "v.nrrd", "v.nii.gz"])
@pytest.mark.parametrize("count", [2, 3])
def test_values_of_a_vector_are_channels_when_asked_and_refused_otherwise(scans, tmp_path, name, count):
    parts = [scans.body(seed=k).astype(np.float32) + 1000 * k for k in range(count)]
    image = sitk.Compose([scans.placed(part) for part in parts])
    sitk.WriteImage(image, str(tmp_path / name))
    volumes, reasons = stored(tmp_path, tmp_path / name, normalize="none")
    assert not volumes
    assert reasons == [
        f"{name},{count} values at each voxel; --frames channels takes them as channels,s.h5"
    ]
    ((volume,), _) = stored(tmp_path, tmp_path / name, normalize="none", frames="channels")
    expected = np.stack([part.T for part in parts])
    np.testing.assert_allclose(volume.read(), expected, rtol=1e-3, atol=0.5)


def test_an_nrrd_that_says_colours_is_coloured(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (4, 20, 24, 3), np.uint8)
    path = tmp_path / "c.nrrd"
    head = "NRRD0004\ntype: uint8\ndimension: 4\nspace: left-posterior-superior\nsizes: 3 24 20 4\n"
    head += "space directions: none (1,0,0) (0,1,0) (0,0,1)\nkinds: RGB-color domain domain domain\n"
    head += "encoding: raw\nspace origin: (0,0,0)\n\n"
    path.write_bytes(head.encode() + values.tobytes())
    pixels = read([path])
    assert pixels.colours and not pixels.vector
    np.testing.assert_array_equal(pixels.voxels, np.moveaxis(values, -1, 0)[:, :, ::-1, ::-1])


# Rows of archives -----------------------------------------------------------------------------------

ROWS = [
    ((28, 30), (1, 1, 28, 30), False),
    ((28, 30, 1), (1, 1, 28, 30), False),
    ((28, 30, 3), (3, 1, 28, 30), True),
    ((26, 28, 30), (1, 26, 28, 30), False),
    ((26, 28, 30, 1), (1, 26, 28, 30), False),
    ((3, 28, 30, 1), (1, 3, 28, 30), False),
    ((26, 28, 30, 3), (3, 26, 28, 30), True),
    ((1, 28, 30), (1, 1, 28, 30), False),
]


@pytest.mark.parametrize(("shape", "frames", "coloured"), ROWS)
def test_channel_axes_of_rows_come_last(shape, frames, coloured):
    row = np.arange(np.prod(shape)).reshape(shape)
    values, colours = frames_of_row(row)
    assert values.shape == frames and colours == coloured
    expected = np.moveaxis(row, -1, 0) if coloured else row
    np.testing.assert_array_equal(values.ravel(), expected.ravel())


@pytest.mark.parametrize("shape", [(3, 28, 30), (2, 28, 30), (28, 30, 4), (2, 26, 28, 30), (26, 28, 30, 2)])
def test_rows_of_channels_or_slices_are_refused(shape):
    with pytest.raises(DataError, match=r"rows of shape .*: channels or slices\? Save channels last"):
        frames_of_row(np.zeros(shape))


def test_grey_pictures_with_a_channel_axis_are_pictures(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (2, 28, 30, 1), np.uint8)
    np.savez(tmp_path / "m.npz", train_images=images)
    volumes, _ = stored(tmp_path, tmp_path / "m.npz")
    assert [tuple(volume.shape) for volume in volumes] == [(1, 1, 28, 30)] * 2


# Pictures -------------------------------------------------------------------------------------------


def png(path: Path, values: np.ndarray, kind: int, extra: bytes = b"") -> Path:
    """Write a PNG of 16 bits by hand; Pillow writes none in colours."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(("kind", "values"), [(2, 3), (6, 4)])
def test_colours_of_sixteen_bits_keep_them(tmp_path, kind, values):
    deep = np.random.default_rng(0).integers(0, 65535, (20, 24, values)).astype(np.uint16)
    pixels = read([png(tmp_path / "a.png", deep, kind)])
    np.testing.assert_array_equal(pixels.voxels[:, 0], np.moveaxis(deep[..., :3], -1, 0))
    assert pixels.colours and not pixels.eight_bit
    with pytest.raises(DataError, match="grey of 16 bits with transparency; save it without"):
        read([png(tmp_path / "b.png", deep[..., :2], 4)])


@pytest.mark.parametrize("turned", range(1, 9))
def test_deep_colours_are_upright_as_pillow_turns_shallow_ones(tmp_path, turned):
    values = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    exif = Image.Exif()
    exif[274] = turned
    content = exif.tobytes()[6:]
    part = struct.pack(">I", len(content)) + b"eXIf" + content
    part += struct.pack(">I", zlib.crc32(b"eXIf" + content))
    Image.fromarray(values).save(tmp_path / "shallow.png", exif=exif)
    png(tmp_path / "deep.png", values.astype(np.uint16) * 257, 2, part)
    shallow, deep = read([tmp_path / "shallow.png"]), read([tmp_path / "deep.png"])
    np.testing.assert_array_equal(deep.voxels, shallow.voxels.astype(np.uint16) * 257)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_white_at_the_lowest_value_is_turned(tmp_path, kind):
    values = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (20, 24)).astype(kind)
    path = tmp_path / "a.tif"
    Image.fromarray(values).save(path)
    content = path.read_bytes()
    entry = struct.pack("<HHIHH", 262, 3, 1, 1, 0)  # the lowest value is black
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    np.testing.assert_array_equal(read([path]).voxels[0, 0], np.iinfo(kind).max - values)


@pytest.mark.parametrize("planes", [1, 2])
def test_deep_tiffs_keep_their_colours_or_are_refused(tmp_path, planes):
    deep = np.random.default_rng(0).integers(0, 65535, (20, 24, 3)).astype(np.uint16)
    path = tiff(tmp_path / "a.tif", deep if planes == 1 else np.moveaxis(deep, -1, 0), planes)
    if planes == 1:
        np.testing.assert_array_equal(read([path]).voxels[:, 0], np.moveaxis(deep, -1, 0))
    else:  # SimpleITK gives the upper 8 bits
        with pytest.raises(DataError, match=r"more than 8 bits a colour, laid out so .*; save it as PNG"):
            read([path])


def tiff(path: Path, values: np.ndarray, planes: int) -> Path:
    """Write 20 x 24 colours of 16 bits, those of a pixel side by side (1) or each in its plane (2)."""
    content = values.astype("<u2").tobytes()
    pieces = 1 if planes == 1 else 3
    size = len(content) // pieces
    starts = struct.pack("<3I", *(8 + piece * size for piece in range(3)))
    tables = struct.pack("<3H", 16, 16, 16) + starts + struct.pack("<3I", size, size, size)
    at = 8 + len(content)
    tags = [
        *((256, 3, 1, 24), (257, 3, 1, 20), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, pieces, 8 if pieces == 1 else at + 6), (277, 3, 1, 3), (278, 3, 1, 20)),
        *((279, 4, pieces, size if pieces == 1 else at + 18), (284, 3, 1, planes)),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", at + len(tables))
    path.write_bytes(head + content + tables + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


def test_white_at_the_lowest_of_values_without_a_highest_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.random.default_rng(0).normal(size=(20, 24)).astype(np.float32)).save(path)
    content = path.read_bytes()
    entry = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    path.write_bytes(content.replace(entry, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    with pytest.raises(DataError, match=r"its lowest value is white .* of float32 nothing"):
        read([path])


def labelled() -> np.ndarray:
    labels = np.zeros((20, 24), np.uint8)
    labels[3:9, 4:9], labels[12:16, 4:9] = 1, 2
    return labels


def test_a_palette_picture_is_a_mask_by_its_indices(scans, tmp_path):
    (tmp_path / "in").mkdir()
    for c in range(2):
        Image.fromarray(scans.body((20, 24), seed=c).astype(np.uint8)).save(tmp_path / "in" / f"p{c}.png")
        mask = Image.fromarray(labelled())
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        assert mask.mode == "P"
        mask.save(tmp_path / "in" / f"p{c}_mask.png")
    volumes, _ = stored(tmp_path, tmp_path / "in", masks="mask")
    assert len(volumes) == 2
    for volume in volumes:
        np.testing.assert_array_equal(volume.read_mask()[0], labelled())


def test_masks_of_bits_and_of_grey_in_colours_are_labels(tmp_path):
    Image.fromarray(labelled() > 0).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "bits.png").voxels[0, 0], labelled() > 0)
    Image.fromarray(np.repeat(labelled()[..., None], 3, axis=2)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "grey.png").voxels[0, 0], labelled())


def test_a_label_map_that_jpeg_blurred_is_refused_with_its_values(tmp_path):
    Image.fromarray(labelled() * 100).save(tmp_path / "m.jpg", quality=50)
    with pytest.raises(DataError, match=r"a label map in JPEG, which blurs it: \d+ values \(0, 1, .*PNG"):
        read_mask(tmp_path / "m.jpg")
    Image.fromarray(np.kron(labelled() == 1, np.ones((8, 8))).astype(np.uint8) * 255).save(
        tmp_path / "two.jpg", quality=100, subsampling=0
    )
    assert set(np.unique(read_mask(tmp_path / "two.jpg").voxels)) == {0, 255}


def test_a_label_map_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    Image.fromarray(labelled()).save(tmp_path / "m.gif")
    with pytest.raises(DataError, match=r"^mask m\.gif: not a known format$"):
        read_mask(tmp_path / "m.gif")
    (tmp_path / "m.png").touch()
    with pytest.raises(DataError, match=r"^mask m\.png: empty file$"):
        read_mask(tmp_path / "m.png")


# Cropped segmentations ------------------------------------------------------------------------------


def test_a_cropped_segmentation_is_placed_by_its_header(scans, tmp_path):
    image = scans.placed(scans.body((20, 18, 14)))
    image.SetSpacing((1, 1.2, 2))
    image.SetOrigin((-30, 20, 5))
    sitk.WriteImage(image, str(tmp_path / "s.nii.gz"))
    labels = np.zeros((14, 18, 20), np.uint8)
    labels[4:10, 5:12, 6:14] = 1
    labels[6, 7, 8] = 2
    mask = sitk.GetImageFromArray(labels)
    mask.CopyInformation(image)
    part = sitk.RegionOfInterest(mask, [8, 7, 6], [6, 5, 4])
    sitk.WriteImage(part, str(tmp_path / "m.seg.nrrd"))
    (tmp_path / "l.csv").write_text("path,mask\ns.nii.gz,m.seg.nrrd\n", encoding="utf-8")
    ((volume,), _) = stored(tmp_path, tmp_path / "l.csv")
    sitk.WriteImage(mask, str(tmp_path / "whole.nii.gz"))
    np.testing.assert_array_equal(volume.read_mask(), read_mask(tmp_path / "whole.nii.gz").voxels[0])
    part.SetOrigin((0, 0, 0))  # a header without a place of its own tells nothing
    sitk.WriteImage(part, str(tmp_path / "m.seg.nrrd"))
    _, reasons = stored(tmp_path / "bare", tmp_path / "l.csv")
    assert len(reasons) == 1 and "does not fit the scan" in reasons[0]
