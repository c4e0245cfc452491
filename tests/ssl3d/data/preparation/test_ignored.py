"""Masks of voxels to ignore, from their files to crops, and masks that have no say in intensities."""

from __future__ import annotations

import csv
import io

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch

from ssl3d.api import DataError, draw_crop, open_data
from ssl3d.commands import info
from ssl3d.data.preparation.prepare import PrepareOptions, prepare
from ssl3d.data.store.verify import damage_of

SHAPE = (24, 20, 16)
AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])
FACE = (slice(0, 12), slice(10, 20), slice(None))  # x, y, z of the file


def head(seed: int, face: float | None = None) -> np.ndarray:
    """Draw an MR-like volume of positive values, with a block of one value where the face was."""
    rng = np.random.default_rng(seed)
    values = rng.gamma(4.0, 100.0, SHAPE)
    values[:2] = values[-2:] = 0
    if face is not None:
        values[FACE] = face
    return values.astype(np.float32)


def face_mask() -> np.ndarray:
    """Mark the face."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[FACE] = 255
    return mask


def save(path, array) -> None:
    """Write a NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, AFFINE), path)


def made(folder, *sources, **options):
    """Prepare the sources; return volumes, and what was said."""
    said = io.StringIO()
    out = folder / "store.h5"
    full = PrepareOptions(sources=sources, out=str(out), workers=0, overwrite=True, **options)
    prepare(full, output=said)
    return open_data([out]), said.getvalue(), out


def placed(mask: np.ndarray) -> np.ndarray:
    """Turn (x, y, z) of a file with a diagonal affine to the store's (D, H, W)."""
    return mask.transpose(2, 1, 0) > 0


def test_bids_masks_are_found_beside_and_in_derivatives(tmp_path):
    """Whose a mask is is told by the entities, and one of nobody is named in left_out.csv."""
    root = tmp_path / "bids"
    for subject in ("01", "02"):
        for run in ("1", "2"):
            save(
                root / f"sub-{subject}/anat/sub-{subject}_run-{run}_T1w.nii.gz", head(int(subject + run), 0)
            )
    save(root / "sub-01/anat/sub-01_run-1_desc-defaced_mask.nii.gz", face_mask())
    there = root / "derivatives/deface"
    save(there / "sub-02/anat/sub-02_run-2_desc-deface_mask.nii.gz", face_mask())
    save(there / "sub-03/anat/sub-03_run-1_desc-deface_mask.nii.gz", face_mask())
    data, said, _ = made(tmp_path, str(root), ignore_mask="*_desc-deface*_mask")
    having = {volume.id for volume in data if volume.has_ignored}
    assert having == {"bids/sub-01/anat/sub-01_run-1_T1w", "bids/sub-02/anat/sub-02_run-2_T1w"}
    assert len(data) == 4
    assert "2 of 4 scans with a mask of voxels to ignore; of no scan: sub-03_run-1_desc-deface" in said
    with open(tmp_path / "left_out.csv", newline="") as file:
        rows = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    left = "derivatives/deface/sub-03/anat/sub-03_run-1_desc-deface_mask.nii.gz"
    assert rows == {left: "a mask of voxels to ignore, of no scan"}
    for volume in data:
        expected = placed(face_mask()) if volume.has_ignored else np.zeros(volume.shape[1:], bool)
        assert (volume.read_ignored().numpy() == expected).all()
    assert not list(damage_of(data.stores[0]))


def test_part_folder_and_list_say_the_same(tmp_path):
    """A part of the name, a folder, and a column of a list lead to one store; without them nothing does."""
    for name in ("p1", "p2"):
        save(tmp_path / f"parts/{name}_t1.nii.gz", head(1 + (name == "p2"), 3000))
        save(tmp_path / f"parts/{name}_anon.nii.gz", face_mask())
        save(tmp_path / f"apart/{name}_t1.nii.gz", head(1 + (name == "p2"), 3000))
        save(tmp_path / f"faces/{name}.nii.gz", face_mask())
    (tmp_path / "list.csv").write_text(
        "path,subject,ignore_mask\napart/p1_t1.nii.gz,p1,faces/p1.nii.gz\napart/p2_t1.nii.gz,p2,n/a\n"
    )
    by_part, _, _ = made(tmp_path / "a", str(tmp_path / "parts"), ignore_mask="anon")
    by_folder, _, _ = made(tmp_path / "b", str(tmp_path / "apart"), ignore_mask=str(tmp_path / "faces"))
    listed, _, _ = made(tmp_path / "c", str(tmp_path / "list.csv"))
    plain, _, _ = made(tmp_path / "d", str(tmp_path / "apart"))
    assert [len(each) for each in (by_part, by_folder, listed, plain)] == [2, 2, 2, 2]
    assert [[v.has_ignored for v in each] for each in (by_part, by_folder, listed, plain)] == [
        [True, True], [True, True], [True, False], [False, False],
    ]  # fmt: skip
    for a, b in zip(by_part, by_folder, strict=True):
        assert torch.equal(a.read(), b.read())
        assert torch.equal(a.read_ignored(), b.read_ignored())
    assert not torch.equal(listed[0].read(), plain[0].read())
    assert torch.equal(listed[1].read(), plain[1].read())


@pytest.mark.parametrize("normalize", ["mr", "unit", "ct", "auto"])
def test_what_is_ignored_has_no_say_elsewhere(tmp_path, normalize):
    """Other values under the mask leave every other voxel, the air and the foreground as they are."""
    stores = []
    for number, face in enumerate((0.0, 9000.0, -4000.0)):
        root = tmp_path / f"{number}/scans"
        save(root / "p1_t1.nii.gz", head(5, face))
        save(root / "p1_face.nii.gz", face_mask())
        stores.append(
            made(tmp_path / f"{number}", str(root), ignore_mask="face", normalize=normalize)[0][0]
        )
    counted = torch.from_numpy(~placed(face_mask()))
    for other in stores[1:]:
        assert torch.equal(stores[0].read()[:, counted], other.read()[:, counted])
        assert stores[0].background == other.background
        assert (stores[0].foreground() == other.foreground()).all()
    assert stores[0].foreground()[:, 10:, :12].max() == 0 or stores[0].block != (1, 1, 1)


def test_mr_scale_is_that_of_the_counted_foreground(tmp_path):
    """Mean and deviation are numpy's over what is brighter than the air and not ignored."""
    root = tmp_path / "scans"
    values = head(3, 20000)
    save(root / "p1_t1.nii.gz", values)
    save(root / "p1_face.nii.gz", face_mask())
    volume = made(tmp_path, str(root), ignore_mask="face", normalize="mr")[0][0]
    seen = values[face_mask() == 0]
    level = seen.min() + 0.1 * (np.percentile(seen, 99.5) - seen.min())
    from scipy import ndimage

    body = (values > level) & (face_mask() == 0)
    body = np.stack([ndimage.binary_fill_holes(body[..., k]) for k in range(SHAPE[2])], -1) & (
        face_mask() == 0
    )
    low, high = np.percentile(values[body], (0.5, 99.5))
    clipped = np.clip(values, low, high)
    expected = (clipped - clipped[body].mean()) / clipped[body].std()
    got = volume.read()[0].numpy().transpose(2, 1, 0)
    assert np.abs(got - expected)[face_mask() == 0].max() < 5e-3


def test_a_mask_beside_a_scan_does_not_scale_it(tmp_path):
    """Test labels have no say in intensities; the foreground map has what is labelled all the same."""
    values = head(4)
    labels = np.zeros(SHAPE, np.uint8)
    labels[:2] = 1  # on the air, which is no foreground by itself
    save(tmp_path / "a/p1_t1.nii.gz", values)
    save(tmp_path / "b/p1_t1.nii.gz", values)
    save(tmp_path / "b/p1_seg.nii.gz", labels)
    plain = made(tmp_path / "1", str(tmp_path / "a"), normalize="mr")[0][0]
    masked = made(tmp_path / "2", str(tmp_path / "b"), normalize="mr", masks="seg")[0][0]
    assert masked.has_mask
    assert torch.equal(plain.read(), masked.read())
    assert plain.background == masked.background
    assert (masked.foreground()[..., 0] > plain.foreground()[..., 0]).any()


@pytest.mark.parametrize(
    ("mask", "option", "message"),
    [
        (np.ones(SHAPE, np.uint8), "face", "every voxel is above 0"),
        (face_mask(), "nose", "no scan has a mask by it; no file's name is like that"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(tmp_path, mask, option, message):
    """A mask of everything is the other way round, and a part of no name is a mistake."""
    save(tmp_path / "scans/p1_t1.nii.gz", head(1))
    save(tmp_path / "scans/p1_face.nii.gz", mask)
    try:
        made(tmp_path, str(tmp_path / "scans"), ignore_mask=option)
    except DataError as error:  # of the mask of everything: there is no store to open
        table = tmp_path / "rejected.csv"
        assert message in (table.read_text() if table.exists() else str(error))
    else:
        pytest.fail("it was taken")


def test_voxels_that_are_all_ignored_on_a_coarse_grid_are_refused(tmp_path):
    """A mask with one voxel left, which no voxel of a coarser grid is nearest to, is named."""
    mask = np.ones(SHAPE, np.uint8)
    mask[5, 5, 5] = 0
    save(tmp_path / "scans/p1_t1.nii.gz", head(1))
    save(tmp_path / "scans/p1_face.nii.gz", mask)
    options = {"ignore_mask": "face", "spacing": (4.0, 4.0, 4.0)}
    with pytest.raises(DataError):
        made(tmp_path, str(tmp_path / "scans"), **options)
    assert (
        "p1_face.nii.gz: at (4.0, 4.0, 4.0) mm every voxel left" in (tmp_path / "rejected.csv").read_text()
    )


def test_a_scan_listed_as_its_own_ignore_mask_is_not_lost(tmp_path):
    """Such a line is refused by name; the others are taken."""
    for i in (1, 2):
        save(tmp_path / f"p{i}.nii.gz", head(i))
    rows = [["path", "ignore_mask"], ["p1.nii.gz", ""], ["p2.nii.gz", "p2.nii.gz"]]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    volumes, _, out = made(tmp_path, str(tmp_path / "list.csv"))
    assert [volume.id.split("/")[-1] for volume in volumes] == ["p1"]
    assert (
        "line 3 of list.csv: its ignore_mask is the scan itself"
        in (out.parent / "rejected.csv").read_text()
    )


@pytest.fixture
def volume(tmp_path):
    """Return a volume whose face is to be ignored."""
    save(tmp_path / "scans/p1_t1.nii.gz", head(1, 0))
    save(tmp_path / "scans/p1_face.nii.gz", face_mask())
    return made(tmp_path, str(tmp_path / "scans"), ignore_mask="face")[0][0]


def test_no_crop_has_an_ignored_centre(volume):
    """Of many crops with no need of foreground none has an ignored voxel in its middle."""
    ignored = placed(face_mask())
    rng = np.random.default_rng(0)
    starts = [draw_crop(volume, (6, 6, 6), rng, min_foreground=0.0) for _ in range(300)]
    centres = np.array(starts) + 3
    assert not ignored[tuple(centres.T)].any()
    lower = (
        np.array([draw_crop(_Blind(volume), (6, 6, 6), np.random.default_rng(i), 0.0) for i in range(50)])
        + 3
    )
    assert ignored[tuple(lower.T)].any()  # without the mask there would be some


def test_a_crop_that_cannot_avoid_it_is_refused(volume, tmp_path):
    """A volume of which the only crop has an ignored centre says so."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[8:16, 6:14, 4:12] = 1
    save(tmp_path / "other/p1_t1.nii.gz", head(1))
    save(tmp_path / "other/p1_face.nii.gz", mask)
    middle = made(tmp_path / "m", str(tmp_path / "other"), ignore_mask="face")[0][0]
    with pytest.raises(DataError, match=r"every crop of .* has a voxel to be ignored at its centre"):
        draw_crop(middle, (16, 20, 24), np.random.default_rng(0))


class _Blind:
    """A volume that does not know what is to be ignored."""

    has_ignored = False

    def __init__(self, volume):
        self._volume = volume

    def __getattr__(self, name):
        return getattr(self._volume, name)


def test_info_and_old_stores(volume, tmp_path, capsys):
    """`ssl3d info` counts them; a store without is of the version that earlier releases read."""
    store = volume.place[0].path
    info.main([str(store)])
    assert "1 with voxels to ignore" in capsys.readouterr().out
    with h5py.File(store, locking=False) as file:
        assert file.attrs["version"] == 3
    save(tmp_path / "plain/p1_t1.nii.gz", head(1))
    _, _, plain = made(tmp_path / "p", str(tmp_path / "plain"))
    with h5py.File(plain, locking=False) as file:
        assert file.attrs["version"] == 1 and "ignored" not in file
        assert b"ignored" not in file["index/head"][()].tobytes()
