"""`ssl3d predict`: masks, rows and boxes of scans; shared, killed, on a full disk, of odd scans."""

import csv
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import ssl3d
from ssl3d.api import locks, model_folders, open_data, read_result
from ssl3d.cli import main
from ssl3d.model import BoxPrediction, LabelPrediction, MaskPrediction
from ssl3d.prediction.ensemble import joined, mean_slabs

SPEC = "scratch:resnet10:width=4:stem_stride=1"
SHORT = ["--steps", "30", "--batch-size", "2", "--threads", "1", "--no-trivial", "--eval-at", "1"]
MASKS = ["--task", "segmentation", "--segmentation.patch", "12", "12", "12", "--segmentation.width", "8",
         "--segmentation.flip-axes", "2", "--lr-scratch", "1e-2"]  # fmt: skip
SHAPE = (18, 16, 14)  # x, y, z


def a_scan(seed, shape=SHAPE):
    """A noisy scan (x, y, z), int16, with a bright block of class 1 and a dark one of class 4."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    at = rng.integers(0, 3, 3)
    mask[3 + at[0] : 10 + at[0], 2 : 9 + at[1], 2 : 8 + at[2]] = 1
    mask[8:16, 9:14, 7 + at[2] : 12] = 4
    image = 400 + rng.normal(size=shape) * 20 + 200 * (mask == 1) - 200 * (mask == 4)
    return image.astype(np.int16), mask


AFFINE = np.array([[-1.0, 0, 0, 90], [0, -1.2, 0, 70], [0, 0, 2.0, -30], [0, 0, 0, 1]])


def write(path, voxels, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def a_folder(root, count=12, labels=False):
    """MSD's layout: images, masks and their names, or a list with labels."""
    rows = ["path,subject,label"]
    for number in range(count):
        image, mask = a_scan(number)
        if labels:
            image = image + np.int16(150 * (number % 2))
        write(root / f"imagesTr/case_{number:02d}.nii.gz", image)
        write(root / f"labelsTr/case_{number:02d}.nii.gz", mask)
        rows.append(f"imagesTr/case_{number:02d}.nii.gz,p{number},{'ill' if number % 2 else 'well'}")
    if labels:
        (root / "list.csv").write_text("\n".join(rows) + "\n")
        return root / "list.csv"
    training = [{"image": f"./imagesTr/case_{n:02d}.nii.gz", "label": f"./labelsTr/case_{n:02d}.nii.gz"}
                for n in range(count)]  # fmt: skip
    content = {"name": "blocks", "modality": {"0": "MRI"}, "training": training, "test": [],
               "labels": {"0": "background", "1": "bright", "4": "dark"}}  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def trained(folder, source, *words, name="out", data="s.h5", prepare=()):
    store, out = folder / data, folder / name
    if not store.exists():
        assert main(["prepare", str(source), "--out", str(store), "--workers", "0", *prepare]) == 0
    assert main(["finetune", SPEC, "--data", str(store), "--out", str(out), *SHORT, *words]) == 0
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@pytest.fixture(scope="module")
def scans(home):
    return a_folder(home / "blocks")


@pytest.fixture(scope="module")
def tuned(home, scans):
    return trained(home, scans, *MASKS)


def record_of(out):
    (path,) = Path(out).glob("*.json")
    return read_result(path)


def predict(model, data, out, *words):
    return main(["predict", str(model), "--data", str(data), "--out", str(out), "--threads", "1", *words])


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Masks -----------------------------------------------------------------------------------------------


def test_test_subjects_predicted_again_have_the_records_dice_to_the_last_digit(home, scans, tuned, capsys):
    """From the scans and from the store; recomputed with nibabel and numpy alone."""
    record = record_of(tuned)
    assert record.scores["dice"] > 0.5  # or it would say little
    for name, source in (("scans", scans), ("store", home / "s.h5")):
        out = home / name
        assert predict(tuned, source, out) == 0
        for row in record.predictions:
            case = row["id"].rpartition("/")[2]
            mask = nibabel.load(
                out / f"{case}.nii.gz" if name == "scans" else next(out.glob(f"*{case}*.nii.gz"))
            )
            truth = nibabel.load(scans / f"labelsTr/{case}.nii.gz")
            assert mask.shape == truth.shape and np.array_equal(mask.affine, truth.affine)
            predicted, true = np.asarray(mask.dataobj), np.asarray(truth.dataobj)
            assert set(np.unique(predicted)) <= {0, 1, 4}
            for value in (1, 4):
                both = ((predicted == value) & (true == value)).sum()
                dice = 2 * int(both) / int((predicted == value).sum() + (true == value).sum())
                assert dice == row["dice"][str(value)]
    said = capsys.readouterr().err
    assert "are of subjects that a model was trained or chosen on" in said
    rows = table(home / "scans" / "predictions.csv")
    assert len(rows) == 12 and list(rows[0])[-2:] == ["ml of bright", "ml of dark"]
    one = np.asarray(nibabel.load(home / "scans" / rows[0]["file"]).dataobj)
    assert float(rows[0]["ml of dark"]) == pytest.approx((one == 4).sum() * 1.2 * 2 / 1000, abs=1e-3)
    about = json.loads((home / "scans" / "predict.json").read_text())
    assert about["labels"] == {"0": "background", "1": "bright", "4": "dark"}
    # The page finds the truth by the content of the files, wherever a list of them lies.
    (home / "lists").mkdir()
    cases = [row["id"].rpartition("/")[2] for row in rows]
    lines = [f"{scans}/imagesTr/{case}.nii.gz,{scans}/labelsTr/{case}.nii.gz" for case in cases]
    (home / "lists/truth.csv").write_text("\n".join(["path,mask", *lines]))
    page = home / "page.html"
    words = ["--data", str(home / "lists/truth.csv"), "--out", str(page)]
    assert main(["view", str(home / "scans"), *words]) == 0
    assert "The mean Dice of 12 scans is" in page.read_text(encoding="utf-8")
    assert about["predicted"] == 12 and about["of_training_subjects"] == 12 - len(record.predictions)


@pytest.mark.parametrize("axes", ["turned", "oblique"])
def test_a_scan_that_lies_otherwise_gets_the_same_mask_in_its_own_grid(tuned, tmp_path, axes):
    image, _ = a_scan(50)
    plain = write(tmp_path / "plain/a.nii.gz", image)
    if axes == "turned":  # the same voxels with axes swapped and flipped: the same patient
        turned = np.ascontiguousarray(image.transpose(2, 0, 1)[::-1])
        step = np.zeros((4, 4))
        step[2, 0], step[2, 3], step[0, 1], step[1, 2], step[3, 3] = -1, SHAPE[2] - 1, 1, 1, 1
        affine = AFFINE @ step
    else:
        angle = np.deg2rad(12)
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        turned, affine = image, turn @ AFFINE
    write(tmp_path / "other/a.nii.gz", turned, affine)
    assert predict(tuned, plain, tmp_path / "one") == 0
    assert predict(tuned, tmp_path / "other/a.nii.gz", tmp_path / "two", "--probabilities") == 0
    first = np.asarray(nibabel.load(tmp_path / "one/a.nii.gz").dataobj)
    second = nibabel.load(tmp_path / "two/a.nii.gz")
    assert np.allclose(second.affine, affine, atol=1e-4) and second.shape == turned.shape
    again = np.asarray(second.dataobj)
    if axes == "turned":
        again = again[::-1].transpose(1, 2, 0)
    assert np.array_equal(first, again) and set(np.unique(first)) == {0, 1, 4}
    shares = nibabel.load(tmp_path / "two/a_probabilities.nii.gz")
    assert shares.shape == (*turned.shape, 3) and np.allclose(shares.affine, second.affine)
    shares = np.asarray(shares.dataobj)
    assert np.allclose(shares.sum(axis=-1), 1, atol=2e-3)
    assert (np.array([0, 1, 4])[shares.argmax(axis=-1)] == np.asarray(second.dataobj)).mean() > 0.999


def test_a_scan_of_another_spacing_is_resampled_and_brought_back(tuned, tmp_path):
    """Twice as fine as any scan of the training: the median of the training's spacings is right."""
    image, mask = a_scan(60)
    fine = np.repeat(np.repeat(np.repeat(image, 2, 0), 2, 1), 2, 2)
    affine = AFFINE.copy()
    affine[:3, :3] /= 2
    affine[:3, 3] -= AFFINE[:3, :3] @ np.full(3, 0.25)
    write(tmp_path / "fine.nii.gz", fine, affine)
    write(tmp_path / "plain.nii.gz", image)
    assert predict(tuned, tmp_path / "fine.nii.gz", tmp_path / "out") == 0
    assert predict(tuned, tmp_path / "plain.nii.gz", tmp_path / "out") == 0
    found = nibabel.load(tmp_path / "out/fine.nii.gz")
    assert found.shape == fine.shape and np.allclose(found.affine, affine, atol=1e-5)
    plain = np.asarray(nibabel.load(tmp_path / "out/plain.nii.gz").dataobj)
    again = np.asarray(found.dataobj)[::2, ::2, ::2]
    assert (again == plain).mean() > 0.95  # fine voxels lie a quarter of a coarse one beside them
    assert 2 * ((again == 1) & (mask == 1)).sum() / ((again == 1).sum() + (mask == 1).sum()) > 0.5


def test_odd_scans_are_set_aside_by_name_and_the_others_go_on(tuned, tmp_path, capsys):
    folder = tmp_path / "scans"
    image, _ = a_scan(70)
    write(folder / "good.nii.gz", image)
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "noise.nii.gz").write_bytes(bytes(range(256)) * 9)
    (folder / "cut.nii.gz").write_bytes((folder / "good.nii.gz").read_bytes()[:900])
    write(folder / "nan.nii.gz", np.where(image > 500, np.nan, image).astype(np.float32))
    unplaced = nibabel.Nifti1Image(image, None)
    unplaced.header.set_zooms((1, 1.2, 2))
    nibabel.save(unplaced, folder / "unplaced.nii.gz")
    air = np.full(SHAPE, -1000, np.int16)
    air[4:12, 4:12, 4:12] = np.random.default_rng(0).integers(-50, 200, (8, 8, 8))
    write(folder / "ct.nii.gz", air)
    assert predict(tuned, folder, tmp_path / "out") == 1
    shown = capsys.readouterr()
    reasons = {row["path"]: row["reason"] for row in table(tmp_path / "out/rejected.csv")}
    assert "has no spacing" not in "".join(reasons.values())
    odd = ("noise", "empty", "cut", "nan", "unplaced", "ct")
    assert set(reasons) == {f"{name}.nii.gz" for name in odd}
    assert "NaN" in reasons["nan.nii.gz"] and "its orientation is unknown" in reasons["unplaced.nii.gz"]
    assert "normalised as ct; the model was trained on scans normalised as mr;" in reasons["ct.nii.gz"]
    assert all("\n" not in reason for reason in reasons.values())
    for name, reason in reasons.items():
        assert f"set aside: {name}: {reason}" in shown.err
    assert "1 volume predicted, 6 scans set aside" in shown.out
    assert [row["id"].rpartition("/")[2] for row in table(tmp_path / "out/predictions.csv")] == ["good"]
    assert not (tmp_path / "out/.jobs").exists()
    write(folder / "cut.nii.gz", image)  # mended
    capsys.readouterr()
    assert predict(tuned, folder, tmp_path / "out", "--normalize", "mr") == 1
    assert {row["path"] for row in table(tmp_path / "out/rejected.csv")} == {
        "noise.nii.gz", "empty.nii.gz", "nan.nii.gz", "unplaced.nii.gz"
    }  # fmt: skip


def test_bytes_without_a_modality_are_normalised_as_the_training_data(tuned, tmp_path):
    image, _ = a_scan(75)
    small = ((image - image.min()) * (250 / np.ptp(image))).astype(np.uint8)
    write(tmp_path / "bytes.nii.gz", small)
    write(tmp_path / "same.nii.gz", small.astype(np.int16))
    for name in ("bytes", "same"):
        assert predict(tuned, tmp_path / f"{name}.nii.gz", tmp_path / "out") == 0
    masks = [np.asarray(nibabel.load(tmp_path / f"out/{n}.nii.gz").dataobj) for n in ("bytes", "same")]
    assert np.array_equal(*masks) and set(np.unique(masks[0])) == {0, 1, 4}


def test_channels_are_those_of_the_training_or_refused(tmp_path, capsys):
    for number in range(10):
        image, mask = a_scan(number)
        write(tmp_path / f"two/p{number}/p{number}_t1.nii.gz", image)
        write(tmp_path / f"two/p{number}/p{number}_t2.nii.gz", image[::-1].copy())
        write(tmp_path / f"two/p{number}/p{number}_seg.nii.gz", mask)
    words = ["--channels", "t1", "t2", "--masks", "seg"]
    out = trained(tmp_path, tmp_path / "two", *MASKS, "--steps", "2", prepare=words)
    assert predict(out, tmp_path / "two", tmp_path / "found") == 0
    assert len(table(tmp_path / "found/predictions.csv")) == 10
    alone = write(tmp_path / "one/a.nii.gz", a_scan(0)[0])
    capsys.readouterr()
    assert predict(out, alone, tmp_path / "alone") == 1
    assert "it has 1 channel (image); the model takes 2 (t1+t2)" in capsys.readouterr().err


def test_probabilities_flip_and_own_format(tuned, tmp_path):
    image, _ = a_scan(80)
    volume = sitk.GetImageFromArray(image.transpose(2, 1, 0))
    volume.SetSpacing((1.0, 1.2, 2.0))
    volume.SetOrigin((-90.0, -70.0, -30.0))
    for name in ("a.nrrd", "b.mha"):
        sitk.WriteImage(volume, str(tmp_path / name))
        assert predict(tuned, tmp_path / name, tmp_path / "own", "--format", "own") == 0
        found = sitk.ReadImage(str(tmp_path / "own" / name))
        assert found.GetSize() == volume.GetSize() and found.GetOrigin() == volume.GetOrigin()
        assert found.GetDirection() == volume.GetDirection() and found.GetSpacing() == volume.GetSpacing()
    write(tmp_path / "c.nii.gz", image)
    for out, words in (("plain", []), ("flipped", ["--flip"])):
        assert predict(tuned, tmp_path / "c.nii.gz", tmp_path / out, "--probabilities", *words) == 0
    shares = [np.asarray(nibabel.load(tmp_path / out / "c_probabilities.nii.gz").dataobj)
              for out in ("plain", "flipped")]  # fmt: skip
    masks = [np.asarray(nibabel.load(tmp_path / out / "c.nii.gz").dataobj) for out in ("plain", "flipped")]
    assert not np.array_equal(*shares)
    same = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "own" / "a.nrrd"))).transpose(2, 1, 0)
    assert np.array_equal(same, masks[0])
    # The mean over a scan and its mirror image, by the model itself.
    data = open_data([str(tmp_path / "c.nii.gz")])
    model = ssl3d.load_model(tuned)
    x = data[0].read()
    ways = [torch.cat(list(model.infer(as_volume(model, way)).slabs), dim=1)
            for way in (x, x.flip(3))]  # fmt: skip
    mean = (ways[0] + ways[1].flip(3)) / 2
    values = np.array([0, 1, 4])[mean.numpy().argmax(axis=0)]
    canonical = masks[1][::-1, ::-1].transpose(2, 1, 0)
    assert (values == canonical).mean() > 0.995  # windows are mirrored one by one


def as_volume(model, x):
    from ssl3d.model import TensorVolume

    return TensorVolume(x, model.card)


# DICOM -----------------------------------------------------------------------------------------------


def a_series(folder, image, patient="p1", turned=None, step=2.0):
    """A series of slices from head to feet, its files in no order; (x, y, z) int16 of LPS axes.

    `turned` (3, 3) turns it about the origin; with a step below 0 slice 0 is the uppermost.
    """
    turned = np.eye(3) if turned is None else turned
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for k in range(image.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        own = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        own.SOPClassUID, own.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        own.PatientID, own.PatientName, own.PatientBirthDate, own.PatientSex = patient, "A^B", "", ""
        own.StudyInstanceUID, own.SeriesInstanceUID, own.FrameOfReferenceUID = study, series, frame
        own.StudyDate, own.StudyTime, own.StudyID, own.AccessionNumber = "20200101", "000000", "1", ""
        own.Modality, own.Manufacturer, own.SeriesNumber, own.InstanceNumber = "MR", "m", 1, 99 - k
        own.ReferringPhysicianName = ""
        own.ImagePositionPatient = (turned @ [-90, -70, -30 + step * k]).round(9).tolist()
        own.ImageOrientationPatient = turned[:, :2].T.ravel().round(9).tolist()
        own.PixelSpacing, own.SliceThickness = [1.2, 1.0], 2.0
        own.Rows, own.Columns, own.SamplesPerPixel = image.shape[1], image.shape[0], 1
        own.PhotometricInterpretation, own.PixelRepresentation = "MONOCHROME2", 1
        own.BitsAllocated = own.BitsStored = 16
        own.HighBit = 15
        own.PixelData = np.ascontiguousarray(image[:, :, k].T).tobytes()
        pydicom.dcmwrite(folder / f"{(7 * k) % 97:03d}.dcm", own, enforce_file_format=True)
    return folder


def test_a_dicom_series_gets_dicom_seg_that_others_read(tuned, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    image, _ = a_scan(90)
    series = a_series(tmp_path / "series", image)
    assert predict(tuned, series, tmp_path / "out", "--dicom-seg", "yes") == 0
    (row,) = table(tmp_path / "out/predictions.csv")
    assert row["subject"] == "p1"
    mask = nibabel.load(tmp_path / "out" / row["file"])
    expected = np.diag([-1, -1.2, 2, 1])
    expected[:3, 3] = 90, 70, -30
    assert np.allclose(mask.affine, expected)
    mask = np.asarray(mask.dataobj)
    assert set(np.unique(mask)) == {0, 1, 4}
    (path,) = (tmp_path / "out").glob("*.dcm")
    # By pydicom alone: every frame at its place, of its segment.
    seg = pydicom.dcmread(path)
    assert seg.Modality == "SEG" and seg.SegmentationType == "BINARY" and seg.PatientID == "p1"
    names = {part.SegmentNumber: part.SegmentLabel for part in seg.SegmentSequence}
    assert names == {1: "bright", 2: "dark"}
    assert {part.SegmentAlgorithmType for part in seg.SegmentSequence} == {"AUTOMATIC"}
    again = np.zeros_like(mask)
    bits = seg.pixel_array
    assert len(bits) == int(seg.NumberOfFrames) == len(seg.PerFrameFunctionalGroupsSequence)
    source = {own.SOPInstanceUID: own for own in map(pydicom.dcmread, series.glob("*.dcm"))}
    for frame, about in zip(bits, seg.PerFrameFunctionalGroupsSequence, strict=True):
        x, y, z = map(float, about.PlanePositionSequence[0].ImagePositionPatient)
        assert (x, y) == (-90, -70)
        number = about.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        again[:, :, round((z + 30) / 2)][frame.T > 0] = {1: 1, 2: 4}[number]
        reference = about.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert float(source[reference].ImagePositionPatient[2]) == z
    assert np.array_equal(again, mask)
    # And SimpleITK takes it for as many frames.
    assert sitk.ReadImage(str(path)).GetSize() == (SHAPE[0], SHAPE[1], len(bits))
    assert predict(tuned, series, tmp_path / "no", "--dicom-seg", "no") == 0
    assert not list((tmp_path / "no").glob("*.dcm"))


@pytest.mark.parametrize("step", [2.0, -2.0])
def test_the_seg_of_an_oblique_series_lies_where_the_mask_lies(tuned, tmp_path, step):
    highdicom = pytest.importorskip("highdicom")
    a, b = np.deg2rad([12, 7])
    about_x = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]
    about_z = [[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]]
    turned = np.array(about_z) @ about_x
    image, _ = a_scan(90)
    stored = image if step > 0 else image[:, :, ::-1]  # the same patient, sliced from above
    series = a_series(tmp_path / "series", stored, turned=turned, step=step)
    assert predict(tuned, series, tmp_path / "out", "--dicom-seg", "yes") == 0
    (row,) = table(tmp_path / "out/predictions.csv")
    mask = nibabel.load(tmp_path / "out" / row["file"])
    (path,) = (tmp_path / "out").glob("*.dcm")
    # By highdicom's own reader, whose world is LPS.
    volume = highdicom.seg.segread(path).get_volume(combine_segments=True, relabel=False)
    labels = np.asarray(mask.dataobj)
    places = np.argwhere(labels)
    assert len(places) > 50
    world = np.diag([-1, -1, 1, 1]) @ mask.affine @ np.c_[places, np.ones(len(places))].T
    where = (np.linalg.inv(volume.affine) @ world)[:3].T
    index = np.rint(where).astype(int)
    assert np.abs(where - index).max() < 1e-3
    found = volume.array[tuple(index.T)]
    assert np.array_equal(np.array([0, 1, 4])[found], labels[tuple(places.T)])
    assert (volume.array > 0).sum() == len(places)
    # Slices' positions are the series' own, as numbers in the file.
    mine = np.diag([-1, -1, 1]) @ mask.affine[:3, :3]
    assert np.allclose(np.abs(np.linalg.inv(turned) @ mine), np.diag([1, 1.2, 2]), atol=1e-5)


# Going on, sharing, kills ----------------------------------------------------------------------------


def some_scans(folder, count=4):
    for number in range(count):
        write(folder / f"s{number}.nii.gz", a_scan(100 + number)[0])
    return folder


def test_nothing_is_predicted_twice_unless_it_changed(tuned, tmp_path, capsys):
    folder, out = some_scans(tmp_path / "scans"), tmp_path / "out"
    assert predict(tuned, folder, out) == 0
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert len(times) == 4
    (out / "s1.nii.gz").unlink()
    write(folder / "s2.nii.gz", a_scan(7)[0])
    assert predict(tuned, folder, out) == 0
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert {name for name in times if again[name] != times[name]} == {"s1.nii.gz", "s2.nii.gz"}
    assert predict(tuned, folder, out, "--overwrite") == 0
    assert all(path.stat().st_mtime_ns != again[path.name] for path in out.glob("*.nii.gz"))


def test_a_killed_call_goes_on_and_leaves_whole_files_only(tuned, tmp_path):
    folder, whole, out = some_scans(tmp_path / "scans"), tmp_path / "whole", tmp_path / "out"
    assert predict(tuned, folder, whole) == 0
    words = ["predict", str(tuned), "--data", str(folder), "--out", str(out), "--threads", "1"]
    with subprocess.Popen([sys.executable, "-m", "ssl3d", *words], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not list(out.glob("*.nii.gz")) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert before
    assert predict(tuned, folder, out) == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    done = {json.loads(path.read_text())["entries"][0]["files"][0] for path in (out / ".done").iterdir()}
    assert (
        done == set(after) and sum(before.get(name) == at for name, at in after.items()) >= len(before) - 1
    )
    for path in whole.glob("*.nii.gz"):
        assert np.array_equal(*(np.asarray(nibabel.load(f / path.name).dataobj) for f in (whole, out)))
    assert (whole / "predictions.csv").read_text() == (out / "predictions.csv").read_text()
    assert not (out / ".jobs").exists()


def test_the_lock_of_a_dead_process_whose_scan_is_done_goes(tuned, tmp_path):
    folder, out = some_scans(tmp_path / "scans", 1), tmp_path / "out"
    assert predict(tuned, folder, out) == 0
    with subprocess.Popen(["true"]) as dead:
        pass
    (out / ".jobs").mkdir()
    (done,) = (out / ".done").iterdir()
    lock = {"host": socket.gethostname(), "pid": dead.pid, "token": "0"}
    (out / ".jobs" / f"{done.stem}.lock").write_text(json.dumps(lock))
    assert predict(tuned, folder, out) == 0
    assert not (out / ".jobs").exists()


def test_two_processes_share_a_folder(tuned, tmp_path):
    folder, out = some_scans(tmp_path / "scans", 6), tmp_path / "out"
    words = ["predict", str(tuned), "--data", str(folder), "--out", str(out), "--threads", "1"]
    both = [subprocess.Popen([sys.executable, "-m", "ssl3d", *words], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]  # fmt: skip
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("6 volumes predicted" in shown for shown, _ in said)
    assert len(list(out.glob("*.nii.gz"))) == len(list((out / ".done").iterdir())) == 6


def test_a_scan_in_the_hands_of_another_process_is_waited_for(tuned, tmp_path, monkeypatch, capsys):
    folder, out = some_scans(tmp_path / "scans", 2), tmp_path / "out"
    assert predict(tuned, folder, out) == 0
    marker = sorted((out / ".done").iterdir())[0]
    kept = marker.read_text()
    marker.unlink()
    (out / ".jobs").mkdir()
    lock = out / ".jobs" / f"{marker.stem}.lock"
    lock.write_text(json.dumps({"host": os.uname().nodename, "pid": os.getppid()}))

    def other_is_done(_):
        marker.write_text(kept)
        lock.unlink()

    monkeypatch.setattr(locks.time, "sleep", other_is_done)
    capsys.readouterr()
    assert predict(tuned, folder, out) == 0
    assert "waiting for 1 scan that another process predicts" in capsys.readouterr().err


@pytest.mark.long
def test_a_full_disk_is_one_line_and_what_is_done_stays(tuned, tmp_path):
    folder, out = some_scans(tmp_path / "scans", 3), tmp_path / "out"
    script = (
        "import resource, signal, sys\n"
        "from ssl3d.cli import main\n"
        "from ssl3d.prediction import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "whole, count = run.Work._do, [0]\n"
        "def third(self, *words):\n"
        "    count[0] += 1\n"
        "    if count[0] == 3:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "    whole(self, *words)\n"
        "run.Work._do = third\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    words = ["predict", str(tuned), "--data", str(folder), "--out", str(out), "--threads", "1"]
    for limit, more in (("100", []), ("2000", ["--probabilities"])):  # a mask, and the probabilities
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-c", script, limit, *words, *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 3, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("ssl3d:")]
        assert str(out) in line and "call again" in line and "Traceback" not in done.stderr
        assert len(list(out.glob("s?.nii.gz"))) == 2
    assert predict(tuned, folder, out) == 0
    assert len(list(out.glob("s?.nii.gz"))) == 3
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# Classes, values, boxes, ensembles -------------------------------------------------------------------


def test_classes_are_a_row_for_each_subject_and_folds_an_ensemble(tmp_path, capsys):
    source = a_folder(tmp_path / "labelled", 10, labels=True)
    out = trained(tmp_path, source, "--folds", "2", "--classification.flip", "0.5")
    record = record_of(out)
    folders = model_folders(out)
    assert len(folders) == 2
    assert predict(folders[0], source, tmp_path / "first") == 0
    rows = {row["subject"]: row for row in table(tmp_path / "first/predictions.csv")}
    assert list(rows["p0"])[2:] == ["scans", "prediction", "probability of ill", "probability of well"]
    seen = set(ssl3d.load_model(folders[0]).card["training"]["subjects"])
    scored = {row["subject"]: row["probability"] for row in record.predictions}
    from ssl3d.api import identity_hash

    tested = [subject for subject in rows if identity_hash(rows[subject]["dataset"], subject) not in seen]
    assert len(tested) == 5
    for subject in tested:
        own = [float(rows[subject][f"probability of {name}"]) for name in ("ill", "well")]
        assert own == pytest.approx(scored[subject], abs=1e-6)
    assert predict(out, source, tmp_path / "both") == 0
    assert predict(folders[1], source, tmp_path / "second") == 0
    for first, second, both in zip(*(table(tmp_path / name / "predictions.csv")
                                     for name in ("first", "second", "both")), strict=True):  # fmt: skip
        mean = (float(first["probability of ill"]) + float(second["probability of ill"])) / 2
        assert float(both["probability of ill"]) == pytest.approx(mean, abs=1e-9)
    write(tmp_path / "labelled/imagesTr/again.nii.gz", a_scan(0)[0])
    text = source.read_text() + "imagesTr/again.nii.gz,p0,well\n"
    (tmp_path / "labelled/twice.csv").write_text(text)
    assert predict(out, tmp_path / "labelled/twice.csv", tmp_path / "twice") == 0
    rows = table(tmp_path / "twice/predictions.csv")
    assert len(rows) == 10 and rows[0]["scans"] == "2"
    assert len(table(tmp_path / "twice/scans.csv")) == 11
    capsys.readouterr()
    assert main(["predict", str(folders[0]), str(folders[0]), "--data", str(source)]) == 2
    assert "given twice" in capsys.readouterr().err


@pytest.mark.long
def test_boxes_are_in_mm_and_in_three_files(home, scans, tmp_path):
    words = ["--task", "detection", "--detection.boxes", "masks", "--detection.patch", "12", "12", "12",
             "--detection.channels", "8", "--detection.least-score", "0", "--detection.detections", "5",
             "--eval-at", "1", "--steps", "2"]  # fmt: skip
    out = trained(home, scans, *words, name="boxes")
    assert predict(out, scans, tmp_path / "found") == 0
    rows = table(tmp_path / "found/predictions.csv")
    assert rows and set(rows[0]) == {"id", "label", "score", "x_mm", "y_mm", "z_mm", "w_mm", "h_mm", "d_mm"}
    listed = json.loads((tmp_path / "found/boxes.json").read_text())["validation"]
    assert len(listed) == 12 and sum(len(entry["box"]) for entry in listed) == len(rows)
    record = record_of(out)
    row = record.predictions[0]
    case = row["id"].rpartition("/")[2]
    own = json.loads((tmp_path / f"found/{case}.json").read_text())
    assert np.allclose([box["voxels"] for box in own["boxes"]], row["boxes"], atol=0.006)
    picture = nibabel.load(tmp_path / f"found/{case}_boxes.nii.gz")
    assert picture.shape == SHAPE and np.allclose(picture.affine, AFFINE)
    best = own["boxes"][0]
    where = np.argwhere(np.asarray(picture.dataobj) == 1) @ picture.affine[:3, :3].T + picture.affine[:3, 3]
    half = np.abs(picture.affine[:3, :3]).sum(axis=1) / 2
    assert np.allclose(where.min(axis=0) - half, best["low"], atol=1.01 * 2 * half.max())
    assert np.allclose(where.max(axis=0) + half, best["high"], atol=1.01 * 2 * half.max())


def test_slabs_of_several_models_are_averaged_whatever_their_depths():
    whole = torch.rand(2, 3, 11, 4, 5).softmax(dim=1)
    depths = ([4, 4, 3], [1, 9, 1])
    streams = [iter(volume.split(own, dim=1)) for volume, own in zip(whole, depths, strict=True)]
    slabs = list(mean_slabs(streams))
    assert [slab.shape[1] for slab in slabs] == [1, 3, 4, 2, 1]
    assert torch.allclose(torch.cat(slabs, dim=1), whole.mean(dim=0))
    mask = joined([MaskPrediction((0, 7, 9), ("a", "b", "c"), (11, 4, 5), volume.split(4, dim=1))
                   for volume in whole]).mask()  # fmt: skip
    assert np.array_equal(mask, np.array([0, 7, 9])[whole.mean(dim=0).argmax(dim=0)])


def test_labels_and_boxes_of_several_models_are_joined():
    answers = [LabelPrediction(("a", "b"), (0.9, 0.1)), LabelPrediction(("a", "b"), (0.2, 0.8))]
    both = joined(answers)
    assert both.numbers == pytest.approx((0.55, 0.45)) and both.answer == "a"
    box = np.array([[0.0, 0, 0, 4, 4, 4]])
    seen = BoxPrediction(("o",), box, np.array([0.8]), np.array([0]), 0.2, 10)
    blind = BoxPrediction(("o",), np.zeros((0, 6)), np.zeros(0), np.zeros(0, int), 0.2, 10)
    alone, agreed = joined([seen, blind]), joined([seen, seen])
    assert np.allclose(alone.boxes, box) and np.allclose(agreed.boxes, box)
    assert agreed.scores[0] == pytest.approx(0.8) and alone.scores[0] == pytest.approx(0.4)


# Wrong input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--data", "DATA"], "nowhere: no such file or folder"),
        (["MODEL", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["MODEL"], "data: name scans"),
        (["MODEL", "--data", "DATA", "--out", "DATA/s0.nii.gz"], "a file, not a folder"),
    ],
)
def test_wrong_input_is_one_line(tuned, tmp_path, capsys, words, message):
    folder = some_scans(tmp_path / "scans", 1)
    words = [word.replace("DATA", str(folder)).replace("MODEL", str(tuned)) for word in words]
    assert main(["predict", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
