"""`ssl3d prepare` from scans to store: what is in it, what is refused."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ssl3d.cli import main
from ssl3d.data.open import open_data, prepare_options_of
from ssl3d.data.preparation.prepare import PrepareOptions, prepare


def made(tmp_path, *sources, out="s.h5", **options):
    """Prepares into a store; the collection, its volumes by id without the data set."""
    prepare(PrepareOptions(tuple(map(str, sources)), str(tmp_path / out), workers=0, **options))
    data = open_data([tmp_path / out])
    return data, {volume.id.partition("/")[2]: volume for volume in data}


def voxels_of(volume):
    return volume.read((0, 0, 0), volume.shape[1:]).numpy()


def rejected(folder):
    with open(folder / "rejected.csv", encoding="utf-8", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def test_every_format_in_one_folder(scans, tmp_path):
    root = tmp_path / "mixed"
    body = scans.body((16, 18, 12))
    for name in ("a.nii.gz", "b.nii"):
        scans.nifti(root / name, body)
    for name in ("c.nrrd", "d.mha", "e.mhd"):
        scans.itk(root / name, body)
    scans.dicom(root / "f", body, "1.2.3.4", prefix="x")
    scans.dicom(root / "f", body, "1.2.3.5", prefix="y", patient="P2")
    Image.fromarray(body[..., 5].astype(np.uint8)).save(root / "g.png")
    np.savez(
        root / "hmnist.npz", train_images=(body[None] // 2).astype(np.uint8), train_labels=np.array([[1]])
    )
    data, volumes = made(tmp_path, root)
    assert len(data) == 9
    reference = voxels_of(volumes["a"])
    for name in ("b", "c", "d", "e", "f/1.2.3.4", "f/1.2.3.5"):
        np.testing.assert_allclose(voxels_of(volumes[name]), reference, atol=2e-3)
    assert volumes["g"].shape == (1, 1, 16, 18)
    assert data.datasets.tolist().count("mixed") == 8
    record = volumes["f/1.2.3.4"].record
    assert (record.subject, record.source) == ("P1", "f")
    assert len(record.sha256) == 64
    assert record.done["normalize"]["kind"] == "mr"


def test_record_says_where_from_and_what_was_done(scans, tmp_path):
    import hashlib

    path = scans.nifti(tmp_path / "d" / "p" / "a.nii.gz", scans.body(), np.diag([1.0, 1, 2, 1]))
    data, _ = made(tmp_path, tmp_path / "d", spacing=(1, 1, 1))
    record = data[0].record
    assert record.source == "p/a.nii.gz"
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record.original_shape == (12, 14, 16)
    assert record.done["resampled"]["from_spacing"] == [2, 1, 1]
    assert data.settings[0]["spacing"] == [1, 1, 1]
    assert data.settings[0]["options"]["normalize"] == "auto"


def test_median_spacing_is_that_of_the_data_set(scans, tmp_path):
    for i, side in enumerate((1.0, 2.0, 7.0)):
        scans.nifti(tmp_path / "d" / f"{i}.nii.gz", scans.body(), np.diag([1, 1, side, 1]))
    data, _ = made(tmp_path, tmp_path / "d", spacing="median")
    assert [volume.spacing for volume in data] == [(2, 1, 1)] * 3
    assert [volume.shape[1] for volume in data] == [8, 16, 56]


def test_several_data_sets_each_have_their_own_median_spacing(scans, tmp_path):
    labels = np.zeros((12, 14, 16), np.uint8)
    labels[3:9, 4:10, 5:12] = 200
    for name, sides in (("thin", (1.0, 2.0, 2.0)), ("thick", (4.0, 4.0, 9.0))):
        for i, side in enumerate(sides):
            affine = np.diag([1, 1, side, 1])
            scans.nifti(tmp_path / name / f"p{i}" / "t1.nii.gz", scans.body(), affine)
            scans.nifti(tmp_path / name / f"p{i}" / "seg.nii.gz", labels, affine)
    out, sources = tmp_path / "s.h5", (str(tmp_path / "thin"), str(tmp_path / "thick"))
    prepare(PrepareOptions(sources, str(out), spacing="median", masks="seg", workers=0))
    data = open_data([out])
    assert {(volume.dataset, volume.spacing) for volume in data} == {
        ("thin", (2, 1, 1)),
        ("thick", (4, 1, 1)),
    }
    depths = {name: sorted(v.shape[1] for v in data if v.dataset == name) for name in ("thin", "thick")}
    assert depths == {"thin": [8, 16, 16], "thick": [16, 16, 36]}
    assert all(set(volume.read_mask().unique().tolist()) == {0, 200} for volume in data)
    assert data.settings[0]["spacing"] == {"thin": [2, 1, 1], "thick": [4, 1, 1]}
    # Other scans, for an encoder trained on these, get the median of their own.
    encoder = SimpleNamespace(
        config=SimpleNamespace(in_channels=1), metadata={"preprocessing": data.settings}
    )
    assert prepare_options_of([encoder]) == {"spacing": "median"}


def test_medmnist_keeps_order_labels_splits_and_values(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 7), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 9, 10, 11), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 3, (count, 1)).astype(np.uint8)
    np.savez_compressed(tmp_path / "xmnist3d.npz", **arrays)
    data, _ = made(tmp_path, tmp_path / "xmnist3d.npz")
    assert data.splits.tolist() == ["train"] * 7 + ["val"] * 2 + ["test"] * 3
    expected = np.concatenate([arrays[f"{s}_labels"][:, 0] for s in ("train", "val", "test")])
    assert data.labels.tolist() == expected.tolist()
    images = np.concatenate([arrays[f"{s}_images"] for s in ("train", "val", "test")])
    for volume, image in zip(data, images, strict=True):
        np.testing.assert_allclose(voxels_of(volume)[0], image / 255, atol=5e-4)
    assert set(data.orientations) == {"unknown"}


def test_coloured_rows_become_grey_or_three_channels(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (2, 12, 13, 3), dtype=np.uint8)
    np.savez(tmp_path / "pathmnist.npz", train_images=rows, train_labels=np.zeros((2, 1)))
    data, _ = made(tmp_path, tmp_path / "pathmnist.npz")
    assert data[0].shape == (1, 1, 12, 13)
    data, _ = made(tmp_path, tmp_path / "pathmnist.npz", colour="rgb", out="c.h5")
    np.testing.assert_allclose(voxels_of(data[1])[:, 0], np.moveaxis(rows[1], -1, 0) / 255, atol=5e-4)
    assert data[0].record.channels == ("red", "green", "blue")


def test_packed_masks_are_unpacked(tmp_path):
    masks = np.random.default_rng(0).random((3, 8, 8, 8)) > 0.5
    np.savez(
        tmp_path / "shapes.npz",
        masks_packed=np.packbits(masks.reshape(3, -1), axis=1),
        shape=np.array([8, 8, 8]),
        patient=np.array(["p", "q", "p"]),
        malignancy=np.array([1, 5, 2]),
    )
    data, _ = made(tmp_path, tmp_path / "shapes.npz")
    assert data.subjects.tolist() == ["p", "q", "p"]
    assert data.labels.tolist() == [1, 5, 2]
    for volume, mask in zip(data, masks, strict=True):
        np.testing.assert_array_equal(voxels_of(volume)[0], mask)


def test_slices_of_lesions_take_what_their_lesion_says(tmp_path):
    rng = np.random.default_rng(0)
    masks = rng.random((4, 16, 16)) > 0.8
    np.savez(
        tmp_path / "slices.npz",
        images=rng.integers(0, 255, (4, 16, 16), dtype=np.uint8),
        masks_packed=np.packbits(masks.reshape(4, -1), axis=1),
        nodule=np.array([1, 1, 0, 1]),
        patient=np.array(["p", "q"]),
        malignancy=np.array([2.0, 3.5], np.float32),
    )
    data, _ = made(tmp_path, tmp_path / "slices.npz")
    assert data.subjects.tolist() == ["q", "q", "p", "q"]
    assert data.labels.tolist() == [3.5, 3.5, 2.0, 3.5]
    assert {type(label) for label in data.labels} == {float}
    for volume, mask in zip(data, masks, strict=True):
        np.testing.assert_array_equal(volume.read_mask((0, 0, 0), (1, 16, 16))[0].numpy(), mask)


def test_channels_are_joined_on_the_grid_of_the_first(scans, tmp_path):
    fine, coarse = np.diag([1.0, 1, 1, 1]), np.diag([-2.0, 2, 2, 1])
    coarse[0, 3] = 23
    ramp = np.indices((24, 24, 24)).sum(axis=0).astype(np.float32)
    scans.nifti(tmp_path / "d" / "p1_t1.nii.gz", ramp, fine)
    small = np.indices((12, 12, 12)) * 2.0
    scans.nifti(
        tmp_path / "d" / "p1_flair.nii.gz",
        ((23 - small[0]) + small[1] + small[2]).astype(np.float32),
        coarse,
    )
    scans.nifti(tmp_path / "d" / "p2_t1.nii.gz", ramp, fine)
    data, volumes = made(tmp_path, tmp_path / "d", channels=("t1", "flair"), normalize="none")
    assert data.subjects.tolist() == ["p1", "p2"]
    both = voxels_of(volumes["p1"])
    assert both.shape == (2, 24, 24, 24)
    # Both files hold x + y + z of their patient, so the channels agree where they overlap.
    np.testing.assert_allclose(both[1][:22, :22, 2:], both[0][:22, :22, 2:], atol=0.1)
    alone = volumes["p2"]
    assert alone.record.done["missing"] == ["flair"]
    assert alone.record.channels == ("t1", "flair")
    assert not voxels_of(alone)[1].any()


def test_channels_on_one_grid_keep_their_own_voxels(scans, tmp_path):
    one, two = scans.body(seed=1), scans.body(seed=2)
    scans.nifti(tmp_path / "d" / "p_t1.nii.gz", one)
    scans.nifti(tmp_path / "d" / "p_t2.nii.gz", two)
    data, _ = made(tmp_path, tmp_path / "d", channels=("t2", "t1"), normalize="none")
    np.testing.assert_array_equal(voxels_of(data[0]), np.stack([two.T, one.T]))


def test_scans_without_a_spacing_are_not_resampled_and_that_is_said(tmp_path, capsys):
    rows = np.random.default_rng(0).integers(0, 255, (2, 9, 10, 11), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", train_images=rows, train_labels=np.zeros((2, 1)))
    data, _ = made(tmp_path, tmp_path / "x.npz", spacing=(2, 2, 2))
    assert data[0].shape == (1, 9, 10, 11)
    assert "2 scans without a spacing: not resampled" in capsys.readouterr().out


def test_four_dimensions_split_join_or_refuse(scans, tmp_path):
    frames = np.stack([scans.body(seed=s) for s in range(3)], axis=-1)
    path = scans.nifti(tmp_path / "d" / "cine.nii.gz", frames)
    data, volumes = made(tmp_path, path)
    assert sorted(volumes) == ["cine#0", "cine#1", "cine#2"]
    assert set(data.subjects) == {"cine"}
    assert volumes["cine#1"].record.done["frame"] == 1
    data, _ = made(tmp_path, path, frames="channels", out="c.h5")
    assert data[0].shape == (3, 16, 14, 12)
    summary = prepare(PrepareOptions((str(path),), str(tmp_path / "r.h5"), frames="refuse", workers=0))
    assert summary.volumes == 0
    assert rejected(tmp_path)["cine.nii.gz"].startswith("4D: 3 frames")


def test_decathlon_channels_in_a_fourth_axis(scans, tmp_path):
    frames = np.stack([scans.body(seed=s) for s in range(2)], axis=-1)
    scans.nifti(tmp_path / "t" / "imagesTr" / "a.nii.gz", frames)
    scans.nifti(tmp_path / "t" / "labelsTr" / "a.nii.gz", (frames[..., 0] > 100).astype(np.uint8))
    described = {
        "name": "T", "modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "bg", "1": "x"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    }  # fmt: skip
    (tmp_path / "t" / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    data, _ = made(tmp_path, tmp_path / "t")
    assert data[0].shape == (2, 16, 14, 12)
    assert data[0].record.channels == ("T2", "ADC")
    mask = data[0].read_mask((0, 0, 0), (16, 14, 12)).numpy()
    np.testing.assert_array_equal(mask, (frames[..., 0] > 100).T)
    assert data.settings[0]["mask_labels"] == {"T": {"0": "bg", "1": "x"}}


def test_a_store_carries_what_is_ignored_and_the_regions(scans, tmp_path):
    scans.nifti(tmp_path / "t" / "imagesTr" / "a_0000.nii.gz", scans.body())
    scans.nifti(tmp_path / "t" / "labelsTr" / "a.nii.gz", (scans.body() > 100).astype(np.uint8))
    described = {"name": "T", "channel_names": {"0": "T2"}, "regions_class_order": [2, 1],
                 "labels": {"background": 0, "z": [1, 2], "a": [2], "ignore": 3}}  # fmt: skip
    (tmp_path / "t" / "dataset.json").write_text(json.dumps(described), encoding="utf-8")
    settings = made(tmp_path, tmp_path / "t")[0].settings[0]
    assert settings["mask_ignore"] == {"T": 3}
    regions = [
        (region["name"], region["values"], region["class"]) for region in settings["mask_regions"]["T"]
    ]
    assert regions == [("z", [1, 2], 2), ("a", [2], 1)]


def test_boxes_are_stored(tmp_path):
    (tmp_path / "d").mkdir()
    for name in "ab":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24), np.uint8)).save(
            tmp_path / "d" / f"{name}.png"
        )
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "bbox": [2, 3, 10, 5], "category_id": 4}],
    }
    (tmp_path / "d" / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    _, volumes = made(tmp_path, tmp_path / "d")
    np.testing.assert_array_equal(volumes["a"].boxes, [[0, 3, 2, 1, 8, 12]])
    assert volumes["a"].box_labels.tolist() == [4]
    assert volumes["b"].boxes is None


def bad_files(scans, root):
    """One file of every bad kind; what its reason says."""
    body = scans.body((12, 14, 16))
    root.mkdir(parents=True, exist_ok=True)
    (root / "empty.nii.gz").write_bytes(b"")
    (root / "rubbish.mha").write_bytes(b"no scan " * 99)
    scans.nifti(root / "constant.nii.gz", np.full((5, 6, 7), 9, np.int16))
    holes = body.astype(np.float32)
    holes[3, 3, 3] = np.nan
    scans.nifti(root / "nan.nii.gz", holes)
    holes[3, 3, 3] = np.inf
    scans.nifti(root / "infinite.nii.gz", holes)
    scans.nifti(
        root / "truncated.nii.gz", np.random.default_rng(0).integers(0, 999, (30, 30, 30)).astype(np.int16)
    )
    whole = (root / "truncated.nii.gz").read_bytes()
    (root / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    scans.nifti(root / "large.nii.gz", np.zeros((40, 40, 40), np.int16))
    scans.nifti(root / "complex.nii.gz", body.astype(np.complex64))
    (root / "bad.dcm").write_bytes(b"x" * 500)
    (root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    (root / "bad.npz").write_bytes(b"PK\x03\x04" + b"x" * 50)
    return {
        "empty.nii.gz": "empty file",
        "rubbish.mha": "unreadable",
        "constant.nii.gz": "constant: every voxel is 9",
        "nan.nii.gz": "1 of 2,688 voxels are NaN; --nan 0 of ssl3d prepare puts 0 in their place",
        "infinite.nii.gz": "1 of 2,688 voxels are NaN or infinite",
        "truncated.nii.gz": "cut short: its gzip stream does not end",
        "large.nii.gz": "64,000 voxels (40, 40, 40), more than --max-voxels 50,000",
        "complex.nii.gz": "complex voxels",
        "bad.dcm": "not readable as DICOM",
        "bad.png": "unreadable",
        "bad.npz": "unreadable",
    }


def test_bad_files_are_listed_and_do_not_stop_the_rest(scans, tmp_path, capsys):
    reasons = bad_files(scans, tmp_path / "d")
    scans.nifti(tmp_path / "d" / "good.nii.gz", scans.body())
    words = ["prepare", str(tmp_path / "d"), "--out", str(tmp_path / "s.h5"), "--max-voxels", "50000"]
    assert main(words) == 0
    found = rejected(tmp_path)
    assert sorted(found) == sorted(reasons)
    for path, reason in reasons.items():
        assert found[path].startswith(reason), (path, found[path])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"1 volume of 1 subject, {len(reasons)} rejected" in last
    data = open_data([tmp_path / "s.h5"])
    assert len(data.stores[0].rejected) == len(reasons)


def test_nothing_usable_is_status_one_and_no_store(scans, tmp_path, capsys):
    count = len(bad_files(scans, tmp_path / "d"))
    words = ["prepare", str(tmp_path / "d"), "--out", str(tmp_path / "s.h5"), "--max-voxels", "50000"]
    assert main(words) == 1
    assert f"{count} rejected" in capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "s.h5").exists()
    assert not (tmp_path / "s.h5.partial").exists()


def test_volumes_that_look_like_label_maps_are_left_out_by_name(scans, tmp_path, capsys):
    scans.nifti(tmp_path / "d" / "a.nii.gz", scans.body())
    scans.nifti(tmp_path / "d" / "a2.nii.gz", (scans.body() > 100).astype(np.uint8) * 2)
    _, volumes = made(tmp_path, tmp_path / "d")
    assert list(volumes) == ["a"]
    assert "look like label maps: a2.nii.gz" in capsys.readouterr().out
    _, volumes = made(tmp_path, tmp_path / "d", take_labels=True, out="t.h5")
    assert list(volumes) == ["a", "a2"]


def test_a_mask_that_does_not_fit_refuses_the_scan(scans, tmp_path):
    for name in ("a", "b", "c"):
        scans.nifti(tmp_path / f"{name}.nii.gz", scans.body())
    scans.nifti(tmp_path / "m1.nii.gz", np.ones((5, 5, 5), np.uint8))
    scans.nifti(tmp_path / "m2.nii.gz", np.full((12, 14, 16), 0.5, np.float32))
    (tmp_path / "l.csv").write_text(
        "path,mask\na.nii.gz,m1.nii.gz\nb.nii.gz,m2.nii.gz\nc.nii.gz,\n", encoding="utf-8"
    )
    _, volumes = made(tmp_path, tmp_path / "l.csv")
    assert list(volumes) == ["c"]
    assert "does not fit the scan" in rejected(tmp_path)["a.nii.gz"]
    assert "expected whole numbers" in rejected(tmp_path)["b.nii.gz"]


def test_a_mask_on_a_coarser_grid_of_the_same_field_is_taken(scans, tmp_path):
    body = scans.body((20, 20, 20))
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[3:6, 4:7, 2:8] = 4
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = 0.5
    scans.nifti(tmp_path / "a.nii.gz", body)
    scans.nifti(tmp_path / "m.nii.gz", mask, affine)
    (tmp_path / "l.csv").write_text("path,mask\na.nii.gz,m.nii.gz\n", encoding="utf-8")
    data, _ = made(tmp_path, tmp_path / "l.csv")
    stored = data[0].read_mask((0, 0, 0), (20, 20, 20)).numpy()
    np.testing.assert_array_equal(stored, np.kron(mask, np.ones((2, 2, 2))).T)
    assert "resampled" in data[0].record.done["mask"]


def test_values_beyond_half_precision_are_refused_only_without_normalisation(scans, tmp_path):
    path = scans.nifti(tmp_path / "a.nii.gz", scans.body().astype(np.float32) * 1e4)
    data, _ = made(tmp_path, path)
    assert np.isfinite(voxels_of(data[0])).all()
    assert (
        prepare(PrepareOptions((str(path),), str(tmp_path / "n.h5"), normalize="none", workers=0)).volumes
        == 0
    )
    assert "a store holds up to 65504" in rejected(tmp_path)["a.nii.gz"]


def test_several_stores_share_one_list_of_rejected_files(scans, tmp_path):
    for name in ("x", "y"):
        scans.nifti(tmp_path / name / "good.nii.gz", scans.body())
        (tmp_path / name / f"bad_{name}.nii.gz").write_bytes(b"")
        made(tmp_path, tmp_path / name, out=f"{name}.h5")
    assert sorted(rejected(tmp_path)) == ["bad_x.nii.gz", "bad_y.nii.gz"]
    (tmp_path / "x" / "bad_x.nii.gz").unlink()
    made(tmp_path, tmp_path / "x", out="x.h5", overwrite=True)
    assert sorted(rejected(tmp_path)) == ["bad_y.nii.gz"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--spacing", "1", "2"], "--spacing"),
        (["--spacing", "0", "1", "1"], "positive"),
        (["--spacing", "middle"], "--spacing"),
        (["--normalize", "zscore"], "--normalize"),
        (["--window", "3", "1"], "lower value first"),
        (["--part", "3/2"], "--part"),
        (["--workers", "-1"], "--workers"),
        (["--out", "store.zip"], "--out"),
        (["--channels", "t1", "T1"], "--channels"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_wrong_options_are_one_line_and_status_two(scans, tmp_path, capsys, words, message):
    scans.nifti(tmp_path / "d" / "a.nii.gz", scans.body())
    out = [] if "--out" in words else ["--out", str(tmp_path / "s.h5")]
    assert main(["prepare", str(tmp_path / "d"), *out, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_no_source_or_none_there_is_status_two(tmp_path, capsys):
    assert main(["prepare"]) == 2
    assert main(["prepare", str(tmp_path / "nowhere"), "--out", str(tmp_path / "s.h5")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "d").mkdir()
    assert main(["prepare", str(tmp_path / "d"), "--out", str(tmp_path / "s.h5")]) == 2
    assert "looked for NIfTI" in capsys.readouterr().err


@pytest.mark.long
def test_real_cardiac_list_gives_labels_masks_and_subjects(real_data, tmp_path):
    prepare(PrepareOptions((str(real_data / "cardiac" / "patients.csv"),), str(tmp_path / "c.h5")))
    data = open_data([tmp_path / "c.h5"])
    assert len(data) == 140
    assert len(data.identities()) == 70
    assert set(data.labels) == {"DCM", "HCM", "MINF", "NOR", "RV"}
    assert data.has_mask.all()
    assert set(np.unique(data[0].read_mask((0, 0, 0), data[0].shape[1:]))) == {0, 1, 2, 3}


def test_real_folders_of_other_kinds(real_data, tmp_path):
    data, volumes = made(tmp_path, real_data / "ct", masks="mask")
    assert {volume.record.done["normalize"]["kind"] for volume in data} == {"ct"}
    assert [volumes[name].has_mask for name in ("lung_baseline", "lung_followup")] == [False, True]
    data, _ = made(tmp_path, real_data / "brain_tumour", masks="labels", out="b.h5")
    assert len(data.identities()) == 3
    assert data.has_mask.all()


def test_nan_of_a_background_is_filled_where_that_is_asked_for(scans, tmp_path):
    """SPM writes NaN outside of the brain."""
    body = scans.body().astype(np.float32)
    outside = np.zeros(body.shape, bool)
    outside[:3] = True
    plain, holes = np.where(outside, 0, body), np.where(outside, np.nan, body)
    made = {}
    for name, voxels in (("plain", plain), ("holes", holes)):
        scans.nifti(tmp_path / name / "p.nii.gz", voxels)
        assert (
            main(["prepare", str(tmp_path / name), "--nan", "0", "--out", str(tmp_path / f"{name}.h5")])
            == 0
        )
        (made[name],) = open_data([tmp_path / f"{name}.h5"])
    assert torch.equal(made["plain"].read(), made["holes"].read())
    assert made["holes"].record.done["nan_filled"] == outside.sum()
    assert "nan_filled" not in made["plain"].record.done


def test_nan_is_filled_in_every_channel(scans, tmp_path):
    for name in ("a", "b"):
        voxels = scans.body().astype(np.float32)
        voxels[0, 0, 0] = np.nan
        scans.nifti(tmp_path / "d" / f"p_{name}.nii.gz", voxels)
    words = ["prepare", str(tmp_path / "d"), "--channels", "a", "b", "--nan", "0"]
    assert main([*words, "--out", str(tmp_path / "s.h5")]) == 0
    (volume,) = open_data([tmp_path / "s.h5"])
    assert volume.record.done["nan_filled"] == 2 and torch.isfinite(volume.read()).all()


def test_one_of_several_outcomes_is_the_label(scans, tmp_path, capsys):
    for n in range(4):
        scans.nifti(tmp_path / "d" / f"p{n}.nii.gz", scans.body(seed=n))
    rows = ["path,Survival_Days,grade"] + [f"p{n}.nii.gz,{n * 1.5},{'ab'[n % 2]}" for n in range(4)]
    (tmp_path / "d" / "outcomes.csv").write_text("\n".join(rows), encoding="utf-8")
    for source in (tmp_path / "d", tmp_path / "d" / "outcomes.csv"):
        for column, expected in (("survival_days", [0.0, 1.5, 3.0, 4.5]), ("grade", ["a", "b", "a", "b"])):
            words = [
                "prepare",
                str(source),
                "--label",
                column,
                "--out",
                str(tmp_path / "s.h5"),
                "--overwrite",
            ]
            assert main(words) == 0
            assert open_data([tmp_path / "s.h5"]).labels.tolist() == expected
        capsys.readouterr()
        assert main(["prepare", str(source), "--label", "age", "--out", str(tmp_path / "t.h5")]) == 2
        assert "no column 'age'" in capsys.readouterr().err
    (tmp_path / "d" / "outcomes.csv").unlink()
    assert main(["prepare", str(tmp_path / "d"), "--label", "age", "--out", str(tmp_path / "t.h5")]) == 2
    assert "no scan has a label by it" in capsys.readouterr().err
