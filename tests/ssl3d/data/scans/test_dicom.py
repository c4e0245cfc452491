"""DICOM as scanners write it: every slice lies where its header says, or the series is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ssl3d.data.open import open_data
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.scans.dicom import dicom_tags
from ssl3d.data.scans.read import Pixels, header_spacing, read
from ssl3d.errors import DataError
from ssl3d.segmentation.save import save_segmentation

TILT = np.deg2rad(20)
TILTED = (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT))


def layers(scans, count: int = 6, seed: int = 0) -> np.ndarray:
    """(slices, rows, columns) of a body, uint16; slice k is 100 k brighter."""
    values = scans.body((count, 10, 12), seed=seed).astype(np.uint16)
    return values + 100 * np.arange(count, dtype=np.uint16)[:, None, None]


def series(scans, folder: Path, stored: np.ndarray, positions, tags=None, prefix: str = "", **options):
    """One file per slice, instance numbers from 1; `tags` a function of the number of the slice."""
    return [
        scans.raw_slice(
            folder / f"{prefix}{k}.dcm",
            layer,
            position,
            {0x00200013: ("IS", str(k + 1)), **(tags(k) if tags else {})},
            **options,
        )
        for k, (layer, position) in enumerate(zip(stored, positions, strict=True))
    ]


def upright(count: int = 6, step: float = 2.0) -> list[tuple[float, float, float]]:
    return [(0, 0, step * k) for k in range(count)]


def in_file_order(pixels: Pixels) -> np.ndarray:
    """(F, K, J, I) of an axial series: canonical voxels, but rows and columns run the other way in LPS."""
    return pixels.voxels[:, :, ::-1, ::-1]


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [None, (1, -5), (0.5, 0)])
@pytest.mark.parametrize(
    ("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12), (np.uint16, 16), (np.int16, 16)]
)
def test_stored_monochrome1_is_turned_bright_once(scans, tmp_path, dtype, bits, rescale):
    stored = np.arange(120).reshape(10, 12).astype(dtype)
    slope, intercept = rescale or (1, 0)
    tags = {0x00080060: ("CS", "DX")}
    if rescale:
        tags |= {0x00281053: ("DS", str(slope)), 0x00281052: ("DS", str(intercept))}
    bright = read([scans.raw_dicom(tmp_path / "2.dcm", stored, tags, bits=bits)])
    dark = read([scans.raw_dicom(tmp_path / "1.dcm", stored, tags, "MONOCHROME1", bits)])
    np.testing.assert_array_equal(bright.voxels[0, 0], slope * stored.astype(float) + intercept)
    white = -1 if dtype == np.int16 else 2**bits - 1
    np.testing.assert_array_equal(dark.voxels[0, 0], slope * (white - stored.astype(float)) + intercept)


def test_a_series_of_monochrome1_is_turned_bright_once(scans, tmp_path):
    stored = layers(scans)
    pixels = read(series(scans, tmp_path, stored, upright(), photometric="MONOCHROME1"))
    np.testing.assert_array_equal(in_file_order(pixels)[0], 65535 - stored)


def test_every_slice_has_its_own_rescaling(scans, tmp_path):
    stored = layers(scans)
    slopes = [1, *(0.5 + 0.1 * k for k in range(1, 6))]
    files = series(
        scans, tmp_path / "slopes", stored, upright(), lambda k: {0x00281053: ("DS", f"{slopes[k]:.1f}")}
    )
    pixels = read(files)
    assert pixels.voxels.dtype == np.float32
    np.testing.assert_allclose(
        in_file_order(pixels)[0], stored * np.array(slopes)[:, None, None], rtol=1e-6
    )
    files = series(
        scans,
        tmp_path / "intercepts",
        stored,
        upright(),
        lambda k: {0x00281053: ("DS", "1"), 0x00281052: ("DS", "-1024" if k else "0")},
    )
    moved = stored.astype(int) - np.array([0, *[1024] * 5])[:, None, None]
    np.testing.assert_array_equal(in_file_order(read(files))[0], moved)


# Places -------------------------------------------------------------------------------------------


def test_a_tilted_gantry_keeps_every_slice_at_its_place(scans, tmp_path):
    stored, positions = layers(scans), upright(step=2.5)
    files = series(scans, tmp_path / "tilted", stored, positions, axes=TILTED)
    pixels = read(files)
    for k, (x, y, z) in enumerate(positions):
        np.testing.assert_allclose(pixels.original_affine @ [0, 0, k, 1], [-x, -y, z, 1], atol=1e-4)
    assert pixels.spacing == pytest.approx((2.5, 1, 1), rel=1e-5)
    assert header_spacing(files) == pytest.approx(pixels.spacing)
    k, j, i = 4, 2, 7
    place = np.array(positions[k]) + i * np.array(TILTED[:3]) + j * np.array(TILTED[3:])
    d, h, w = np.rint(np.linalg.inv(pixels.affine) @ [*(place * (-1, -1, 1)), 1]).astype(int)[:3]
    assert pixels.voxels[0, d, h, w] == stored[k, j, i]


@pytest.mark.parametrize("spacing", [None, (1.25, 0.5, 0.5)])
def test_predictions_on_a_tilted_series_come_back_to_its_slices(scans, tmp_path, spacing):
    positions = upright(step=2.5)
    series(scans, tmp_path / "tilted", layers(scans), positions, axes=TILTED)
    grid = {"spacing": spacing} if spacing else {}
    prepare(PrepareOptions((str(tmp_path / "tilted"),), str(tmp_path / "s.h5"), **grid, workers=0))
    (volume,) = open_data([str(tmp_path / "s.h5")])
    labels = np.zeros(volume.shape[1:], np.uint8)
    middle = tuple(n // 2 for n in labels.shape)
    labels[middle] = 1
    assert save_segmentation(volume.record, labels, tmp_path / "p.nii")
    saved = nibabel.load(tmp_path / "p.nii")
    assert saved.shape == (12, 10, 6)
    for k, (x, y, z) in enumerate(positions):
        np.testing.assert_allclose(saved.affine @ [0, 0, k, 1], [-x, -y, z, 1], atol=1e-3)
    stored_at = (np.array(volume.affine) @ [*middle, 1])[:3]
    found = np.argwhere(np.asarray(saved.dataobj))
    if spacing is None:
        assert len(found) == 1
    for voxel in found:
        off = np.linalg.inv(saved.affine[:3, :3]) @ ((saved.affine @ [*voxel, 1])[:3] - stored_at)
        assert np.abs(off).max() <= (0.01 if spacing is None else 0.51)


def test_slices_off_their_even_places_are_refused(scans, tmp_path):
    stored = layers(scans, 7)
    gaps = [(0, 0, z) for z in (0, 5, 10, 15, 22, 29, 36)]
    files = series(scans, tmp_path / "gaps", stored, gaps)
    line = (
        r"^slices do not lie evenly: 3.dcm is 3 mm from its place in an even stack \(0.50 of a slice, at "
    )
    with pytest.raises(DataError, match=line):
        read(files)
    with pytest.raises(DataError, match=line):
        header_spacing(files)
    aside = upright(7)
    aside[2] = (0.8, 0, 4)
    with pytest.raises(
        DataError, match=r"2.dcm is 0.8 mm from its place .* \(0.80 of a pixel, at most 0.5\)"
    ):
        read(series(scans, tmp_path / "aside", stored, aside))


def test_rounded_positions_are_no_uneven_ones(scans, tmp_path):
    rounded = [(0.01 * (-1) ** k, 0, 2 * k + 0.1 * (-1) ** k) for k in range(6)]
    assert read(series(scans, tmp_path, layers(scans), rounded)).spacing[0] == pytest.approx(2, rel=0.05)


def test_pixel_spacing_and_orientation_are_those_of_the_whole_series(scans, tmp_path):
    stored = layers(scans)
    sides = series(
        scans,
        tmp_path / "sides",
        stored,
        upright(),
        lambda k: {0x00280030: ("DS", "1\\1" if k < 3 else "0.5\\0.5")},
    )
    with pytest.raises(
        DataError, match=r"several pixel spacings in one series: 1 x 1 mm, but 3.dcm 0.5 x 0.5"
    ):
        read(sides)
    turned = (1, 0, 0, 0, np.cos(0.005), np.sin(0.005))
    files = series(scans, tmp_path / "turned", stored, upright())
    files[4] = scans.raw_slice(tmp_path / "turned" / "x.dcm", stored[4], (0, 0, 8), axes=turned)
    with pytest.raises(DataError, match=r"several orientations in one series \(x.dcm differs\)"):
        read(files)


def test_slices_of_several_sizes_are_named(scans, tmp_path):
    files = series(scans, tmp_path, layers(scans), upright())
    files.append(scans.raw_slice(tmp_path / "small.dcm", layers(scans)[0, :8], (0, 0, 12)))
    with pytest.raises(
        DataError, match=r"several sizes in one series: 10 x 12 pixels, but small.dcm 8 x 12"
    ):
        read(files)


# Frames of a series -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "told",
    [
        {0x00200012: "IS"},  # acquisition
        {0x00200100: "IS"},  # temporal position
        {0x00180086: "IS"},  # echo
        {0x00080033: "TM"},  # content time
    ],
)
def test_acquisitions_that_number_their_slices_anew_stay_apart(scans, tmp_path, told):
    first, second = layers(scans, seed=1), layers(scans, seed=2) + 1000
    files = []
    for frame, stored in enumerate((first, second)):
        tags = {tag: (kind, str(frame + 1)) for tag, kind in told.items()}
        # In names' order, a slice of one acquisition follows one of the other at some places only.
        for k, file in enumerate(
            series(scans, tmp_path, stored, upright(), lambda _, t=tags: t, prefix=f"{frame}_")
        ):
            files.append(file.rename(tmp_path / f"{(k + frame) % 2}{frame}{k}.dcm"))
    pixels = read(sorted(files))
    np.testing.assert_array_equal(in_file_order(pixels), np.stack([first, second]))
    assert pixels.original_shape == (12, 10, 6, 2)


def test_frames_that_nothing_tells_apart_are_refused(scans, tmp_path):
    files = series(scans, tmp_path / "a", layers(scans, seed=1), upright())
    files += series(scans, tmp_path / "b", layers(scans, seed=2), upright(), prefix="x")
    with pytest.raises(DataError, match=r"0.dcm and x0.dcm lie at one place"):
        read(files)


def test_a_frame_is_of_one_echo(scans, tmp_path):
    def echoes(*numbers: int) -> list[Path]:
        folder = tmp_path / f"e{numbers[0]}"
        return series(
            scans, folder, layers(scans), upright(), lambda k: {0x00180086: ("IS", str(numbers[k]))}
        )

    with pytest.raises(DataError, match=r"frames are mixed: 5.dcm is of another echo or time than 0.dcm"):
        read(echoes(1, 1, 1, 1, 1, 2) + echoes(3, 3, 3, 3, 3, 3))


def test_slices_that_are_there_twice_are_read_once(scans, tmp_path):
    stored = layers(scans)
    files = series(scans, tmp_path / "a", stored, upright())
    copies = series(scans, tmp_path / "b", stored, upright(), prefix="x")
    for more, count in ((copies, 6), (copies[2:3], 1), ([], 0)):
        pixels = read(files + more)
        np.testing.assert_array_equal(in_file_order(pixels)[0], stored)
        assert len(pixels.voxels) == 1
        assert pixels.notes == ({"copies": count} if count else {})


# Pictures -----------------------------------------------------------------------------------------


def test_views_of_one_series_of_radiographs_are_a_picture_each(scans, tmp_path):
    for name, rows in (("front", 10), ("side", 8)):
        path = scans.raw_dicom(
            tmp_path / "x" / f"{name}.dcm", layers(scans)[0, :rows], {0x00080060: ("CS", "DX")}
        )
        assert dicom_tags(path)["series"] == ""
    prepare(PrepareOptions(sources=(str(tmp_path / "x"),), out=str(tmp_path / "s.h5"), workers=0))
    volumes = open_data([str(tmp_path / "s.h5")])
    assert {(v.id, tuple(v.shape), v.subject) for v in volumes} == {
        ("x/front", (1, 1, 10, 12), "P1"),
        ("x/side", (1, 1, 8, 12), "P1"),
    }


# Frames of a file ---------------------------------------------------------------------------------


def enhanced(
    scans,
    path: Path,
    stored: np.ndarray,
    positions,
    times=None,
    slopes=None,
    axes=(1, 0, 0, 0, 1, 0),
    **options,
) -> Path:
    """A multi-frame file with functional groups, its frames in the order given."""
    groups = []
    for k, position in enumerate(positions):
        content = {0x00209157: ("UL", (1, 1))}
        if times is not None:
            content[0x00209128] = ("UL", times[k])
        text = "\\".join(f"{v:g}" for v in position)
        group = {
            0x00209111: ("SQ", [content]),
            0x00209113: ("SQ", [{0x00200032: ("DS", text)}]),
        }
        if slopes is not None:
            scaling = {0x00281052: ("DS", "-1024"), 0x00281053: ("DS", f"{slopes[k]:g}")}
            group[0x00289145] = ("SQ", [scaling])
        groups.append(group)
    shared = {
        0x00209116: ("SQ", [{0x00200037: ("DS", "\\".join(f"{v:.8g}" for v in axes))}]),
        0x00289110: ("SQ", [{0x00180050: ("DS", "3"), 0x00280030: ("DS", "1.5\\1.25")}]),
    }
    tags = {
        0x00080016: ("UI", "1.2.840.10008.5.1.4.1.1.4.1"),
        0x00081140: ("SQ", [{0x00081150: ("UI", "1.2")}]),  # a sequence that nobody asks for
        0x52009229: ("SQ", [shared]),
        0x52009230: ("SQ", groups),
    }
    return scans.raw_dicom(path, stored, tags, **options)


@pytest.mark.parametrize(("explicit", "lengths"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
def test_frames_lie_where_their_own_header_says(scans, tmp_path, order, explicit, lengths):
    stored = layers(scans)
    path = enhanced(
        scans,
        tmp_path / "a.dcm",
        stored[order],
        [(3, 4, 2 * k) for k in order],
        explicit=explicit,
        lengths=lengths,
    )
    pixels = read([path])
    np.testing.assert_array_equal(in_file_order(pixels)[0], stored)
    assert pixels.spacing == pytest.approx((2, 1.5, 1.25))
    assert header_spacing([path]) == pytest.approx(pixels.spacing)
    np.testing.assert_allclose(pixels.original_affine @ [0, 0, 5, 1], [-3, -4, 10, 1])
    assert pixels.original_shape == (12, 10, 6)


def test_times_of_a_file_are_frames(scans, tmp_path):
    first, second = layers(scans, seed=1), layers(scans, seed=2)
    stored = np.stack([second, first], axis=1).reshape(12, 10, 12)  # place by place, the later time first
    path = enhanced(
        scans, tmp_path / "a.dcm", stored, [p for p in upright() for _ in "ab"], times=[2, 1] * 6
    )
    pixels = read([path])
    np.testing.assert_array_equal(in_file_order(pixels), np.stack([first, second]))
    assert pixels.original_shape == (12, 10, 6, 2)
    tied = enhanced(scans, tmp_path / "b.dcm", stored, [p for p in upright() for _ in "ab"])
    with pytest.raises(DataError, match="frame 0 and frame 1 lie at one place"):
        read([tied])


def test_missing_frames_and_tilted_stacks_are_seen(scans, tmp_path):
    stored = layers(scans)
    path = enhanced(scans, tmp_path / "a.dcm", stored, [(0, 0, 2 * k) for k in (0, 1, 2, 5, 6, 7)])
    with pytest.raises(DataError, match="slices are missing: a gap of 6 mm at 4, usually 2 mm"):
        read([path])
    tilted = read([enhanced(scans, tmp_path / "b.dcm", stored, upright(), axes=TILTED)])
    np.testing.assert_allclose(tilted.original_affine @ [0, 0, 5, 1], [0, 0, 10, 1], atol=1e-4)


def test_every_frame_has_its_own_rescaling(scans, tmp_path):
    stored = layers(scans)
    for slopes in ([2, 1, 0.5, 3, 1, 1], [2] * 6):
        path = enhanced(scans, tmp_path / "a.dcm", stored, upright(), slopes=slopes)
        found = in_file_order(read([path]))[0]
        np.testing.assert_allclose(found, stored * np.array(slopes)[:, None, None] - 1024.0, atol=1e-3)


def test_frames_without_a_place_are_refused(scans, tmp_path):
    path = scans.raw_dicom(tmp_path / "a.dcm", layers(scans), {0x00180088: ("DS", "3")})
    with pytest.raises(DataError, match=r"^6 frames, and the header does not tell where each lies"):
        read([path])
    assert dicom_tags(path)["series"] == ""


def test_frames_of_nuclear_medicine_that_say_so_are_a_stack(scans, tmp_path):
    tags = {
        0x00080016: ("UI", "1.2.840.10008.5.1.4.1.1.20"),
        0x00080060: ("CS", "NM"),
        0x00180088: ("DS", "3"),
        0x00280009: ("AT", (0x0054, 0x0080)),
    }
    pixels = read([scans.raw_dicom(tmp_path / "a.dcm", layers(scans), tags)])
    assert pixels.voxels.shape == (1, 6, 10, 12)
    assert pixels.spacing == pytest.approx((3, 1, 1))
    tags[0x00280009] = ("AT", (0x0054, 0x0010, 0x0054, 0x0080))  # energy windows, then slices
    with pytest.raises(DataError, match="does not tell where each lies"):
        read([scans.raw_dicom(tmp_path / "b.dcm", layers(scans), tags)])


def test_a_damaged_header_of_frames_is_refused(scans, tmp_path):
    path = enhanced(scans, tmp_path / "a.dcm", layers(scans), upright())
    raw = path.read_bytes()
    at = raw.index(b"\x00\x52\x30\x92SQ") + 12
    path.write_bytes(raw[:at] + b"\x11\x22\x33\x44" + raw[at + 4 :])
    with pytest.raises(DataError, match=r"^unreadable|not readable"):
        read([path])


def test_a_header_is_read_in_a_process_that_has_read_nothing_yet(scans, tmp_path):
    """The library that reads it is larger than what a damaged header may take, and loads at the first."""
    path = scans.raw_dicom(tmp_path / "a.dcm", layers(scans)[0], {})
    program = (
        "import sys, pathlib; from ssl3d.data.scans.dicom import dicom_tags;"
        " assert 'SimpleITK' not in sys.modules; print(dicom_tags(pathlib.Path(sys.argv[1]))['rows'])"
    )
    run = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    assert run.stdout == "10\n", run.stderr
