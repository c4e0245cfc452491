"""Damaged files of every kind, by the hundred: each gives what the whole one gives, or is refused by name.

`SSL3D_DAMAGE_CASES=500 pytest -m slow -s tests/slow/damage` damages 500 of each kind, and prints what
became of them; `SSL3D_DAMAGE_SEED` draws others. A format without a check sum cannot tell every damage: of
those the other numbers are counted, and nothing else is borne.
"""

import copy
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
import yaml
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from ssl3d.checkpoint import snapshot
from ssl3d.checkpoint.card import signed
from ssl3d.checkpoint.encoders import load_encoder, save_encoder
from ssl3d.commands.info import describe
from ssl3d.data.open import open_data, prepare_options_of
from ssl3d.data.preparation.options import PrepareOptions
from ssl3d.data.preparation.prepare import prepare
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.errors import Ssl3dError
from ssl3d.evaluation.records import read_result, write_result
from ssl3d.specs import encoder_from
from ssl3d.training.options import plan_from
from ssl3d.training.run_folder import check_same
from ssl3d_benchmarks.leaderboard.report.records import read_records
from ssl3d_benchmarks.leaderboard.suite.suite import load_suite

CASES = int(os.environ.get("SSL3D_DAMAGE_CASES", "10"))
SEED = int(os.environ.get("SSL3D_DAMAGE_SEED", "1"))
SECONDS = 120  # until a case counts as one that hangs, on a busy machine too
BUDGET = 1.5e9  # bytes that reading a file of some kB may take
MADE_BEFORE = Path(__file__).parents[2] / "made_before"
ODD = [None, 7, -1, 10**30, 1.5, float("inf"), True, "x", "a" * 1000, [], [[]], [1], {}, {"a": 1}]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * 3600)]


def damaged(content, rng):
    """Return the content with a damage drawn at random."""
    content, size = bytearray(content), len(content)
    way = rng.choice(
        ["bit", "bits", "head", "cut", "zeros", "ones", "doubled", "swapped", "more", "number", "noise"]
    )
    at, length = rng.randrange(size), rng.randrange(1, max(2, size // 4))
    if way == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif way == "bits":
        for _ in range(8):
            content[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif way == "head":
        for _ in range(3):
            content[rng.randrange(min(size, 400))] = rng.randrange(256)
    elif way == "cut":
        del content[at:]
    elif way == "zeros":
        content[at : at + length] = bytes(len(content[at : at + length]))
    elif way == "ones":
        content[at : at + 8] = b"\xff" * len(content[at : at + 8])
    elif way == "doubled":
        content[at:at] = content[at : at + length]
    elif way == "swapped":
        other = rng.randrange(size)
        content[at], content[other] = content[other], content[at]
    elif way == "more":
        content[at:at] = rng.randbytes(rng.randrange(1, 50))
    elif way == "number":
        value = rng.choice([2**31 - 1, 2**15 - 1, -1, -(2**31), 2**63 - 1, 65535]).to_bytes(
            8, "little", signed=True
        )
        at = rng.randrange(min(size, 600))
        content[at : at + 8] = value[: len(content[at : at + 8])]
    else:
        content[:] = rng.randbytes(size)
    return bytes(content)


def with_odd_part(content, rng):
    """Return a copy of nested dicts and lists in which one part is another value, or gone."""
    content = copy.deepcopy(content)
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        inner = place[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.4:
            break
        place = inner
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = copy.deepcopy(rng.choice(ODD))
    return content


def outcome(read, whole):
    """Read in a child, and return what became of it: same, other, refused, or a fault."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)
            try:
                said = "same" if read() == whole else "other"
            except Ssl3dError as error:
                said = "refused" if "\n" not in str(error) else f"several lines: {str(error)[:200]}"
            except BaseException as error:
                said = f"TRACEBACK {type(error).__name__}: {str(error)[:200]}"
            if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > BUDGET:
                said = "OVER THE BUDGET of memory"
            os.write(theirs, said.encode())
        finally:
            os._exit(0)
    os.close(theirs)
    began, said = time.monotonic(), "HANGS"
    while time.monotonic() - began < SECONDS:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            said = os.read(ours, 1000).decode() or f"DIED with status {status}"
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(ours)
    return said


def judge(name, cases, whole, tmp_path, unnoticed=False):
    """Count what becomes of damaged files, and fail if one of them is no right outcome."""
    counts, bad = Counter(), []
    for number, (place, read) in enumerate(cases):
        said = outcome(read, whole)
        counts[said.partition(" ")[0]] += 1
        if said not in ("same", "refused") and not (unnoticed and said == "other"):
            kept = tmp_path / f"kept-{number}"
            shutil.copytree(place, kept) if place.is_dir() else shutil.copy(place, kept)
            bad.append(f"{kept}: {said}")
    print(f"\n{name}: {sum(counts.values())} damaged: {dict(sorted(counts.items()))}", flush=True)
    assert not bad, "\n".join(bad)


# Scans ------------------------------------------------------------------------------------------------


def scan_files(folder, seed):
    """Write one small scan in every format; return the files by format."""
    rng = np.random.default_rng(seed)
    voxels = np.rint(rng.normal(300, 60, size=(14, 18, 16))).astype(np.int16)
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    files = {}
    for name, kind in (
        ("nii.gz", nibabel.Nifti1Image),
        ("nii", nibabel.Nifti1Image),
        ("nifti2.nii", nibabel.Nifti2Image),
    ):
        files[name] = folder / f"{seed}.{name}"
        nibabel.save(kind(voxels, affine), files[name])
    image = SimpleITK.GetImageFromArray(voxels)
    for name, packed in (("mha", False), ("packed.mha", True), ("nrrd", False), ("packed.nrrd", True)):
        files[name] = folder / f"{seed}.{name}"
        SimpleITK.WriteImage(image, str(files[name]), packed)
    picture = Image.fromarray(np.clip(voxels[7] // 3, 0, 255).astype(np.uint8))
    for name in ("png", "jpg", "tif", "bmp"):
        files[name] = folder / f"{seed}.{name}"
        picture.save(files[name])
    files["dcm"] = folder / f"{seed}.dcm"
    write_dicom(files["dcm"], voxels[7])
    rows = rng.integers(0, 255, (5, 12, 12, 12), dtype=np.uint8)
    labels = np.arange(5)[:, None] % 2
    arrays = {}
    for part, cut in (("train", slice(3)), ("val", slice(3, 4)), ("test", slice(4, 5))):
        arrays |= {f"{part}_images": rows[cut], f"{part}_labels": labels[cut]}
    for name, save in (("npz", np.savez), ("packed.npz", np.savez_compressed)):
        files[name] = folder / f"{seed}.{name}"
        save(files[name], **arrays)
    return files


def write_dicom(path, pixels):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MRImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    scan = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    scan.SOPClassUID, scan.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    scan.PatientID, scan.Modality, scan.InstanceNumber = path.stem, "MR", 1
    scan.StudyInstanceUID, scan.SeriesInstanceUID = (
        generate_uid(entropy_srcs=[path.name, w]) for w in "ab"
    )
    scan.ImagePositionPatient, scan.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    scan.PixelSpacing, scan.SliceThickness = [1, 1], 3
    scan.Rows, scan.Columns = pixels.shape
    scan.BitsAllocated = scan.BitsStored = 16
    scan.HighBit, scan.PixelRepresentation, scan.SamplesPerPixel = 15, 1, 1
    scan.PhotometricInterpretation, scan.PixelData = "MONOCHROME2", pixels.astype(np.int16).tobytes()
    pydicom.dcmwrite(path, scan, enforce_file_format=True)


def prepared(folder):
    """Prepare a folder of two scans, of which `bad` is damaged, and return what the store holds of each.

    Raises:
        Ssl3dError: The damaged one is refused by name; the other one is there as it was.
    """
    out = folder.with_suffix(".h5")
    prepare(PrepareOptions(sources=(str(folder),), out=str(out), workers=0), output=io.StringIO())
    data = open_data([out])
    found = {"good": [], "bad": []}
    for volume in data:
        whose = "good" if Path(volume.record.source).name.startswith("good") else "bad"
        found[whose].append((volume.record.voxels, volume.shape, volume.spacing, volume.affine))
        volume.read()
    if not found["bad"]:
        assert found["good"], "the whole scan is lost"
        said = (folder.parent / "rejected.csv").read_text(encoding="utf-8")
        assert "bad" in said, "left out in silence"
        raise Ssl3dError(json.dumps(found["good"]))
    return found


# A damage anywhere in these is told by a check sum.
SUMMED = ("nii.gz", "npz", "packed.npz")
FORMATS = ("nii.gz", "nii", "nifti2.nii", "mha", "packed.mha", "nrrd", "packed.nrrd", "png", "jpg", "tif",
           "bmp", "dcm", "npz", "packed.npz")  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_scans(form, tmp_path):
    (tmp_path / "made").mkdir()
    good, bad = (scan_files(tmp_path / "made", seed)[form] for seed in (1, 2))
    suffix = "." + form.removeprefix("packed.").removeprefix("nifti2.")
    whole_folder, rng = tmp_path / "whole", random.Random(f"{SEED} {form}")

    def lay(folder, content):
        folder.mkdir()
        shutil.copy(good, folder / f"good{suffix}")
        (folder / f"bad{suffix}").write_bytes(content)

    lay(whole_folder, bad.read_bytes())
    whole = prepared(whole_folder)

    def read(folder):
        try:
            return prepared(folder)
        except Ssl3dError as error:
            if str(error).startswith("["):
                kept = json.loads(json.dumps(whole["good"]))
                assert json.loads(str(error)) == kept, "the whole scan has changed"
            raise

    def cases():
        for number in range(max(1, 2 * CASES // len(FORMATS))):
            folder = tmp_path / f"{number}"
            lay(folder, damaged(bad.read_bytes(), rng))
            yield folder, lambda folder=folder: read(folder)
            shutil.rmtree(folder)
            for path in tmp_path.glob(f"{number}.h5*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    judge(f"scans, {form}", cases(), whole, tmp_path, unnoticed=form not in SUMMED)


# Stores -----------------------------------------------------------------------------------------------


def everything(path):
    data = open_data([path])
    digest = hashlib.sha256()
    for volume in data:
        for array in (volume.read().numpy(), volume.read_mask().numpy(), volume.foreground(), volume.boxes):
            digest.update(array.tobytes())
        digest.update(repr([volume, volume.record, volume.label, volume.split, volume.background]).encode())
    for store in data.stores:
        digest.update(repr([store.settings, store.fingerprint, store.rejected]).encode())
    return digest.hexdigest()


def test_stores(tmp_path):
    numbers, rng = np.random.default_rng(0), random.Random(SEED)
    for i in range(5):
        image = numbers.normal(size=(1, 24, 40, 35)).astype(np.float32)
        mask = numbers.integers(0, 3, size=image.shape[1:])
        entry = Record(f"scan-{i}", "study", f"patient-{i}", label=i, source=f"{i}.nii")
        write_part(tmp_path / "parts", str(i), entry, image, mask, [[0, 0, 0, 5, 5, 5]])
    assemble(tmp_path / "parts", tmp_path / "whole.h5", {"spacing": "keep"}, [])
    content, whole = (tmp_path / "whole.h5").read_bytes(), everything(tmp_path / "whole.h5")

    def cases():
        for number in range(CASES):
            path = tmp_path / f"{number}.h5"
            path.write_bytes(damaged(content, rng))
            yield path, lambda path=path: everything(path)
            path.unlink()

    judge("stores", cases(), whole, tmp_path)


# Cards, weights, checkpoints -----------------------------------------------------------------------------


def embedded(folder):
    encoder = load_encoder(folder)
    prepare_options_of([encoder])
    describe(folder)
    with torch.no_grad():
        return encoder.embed(torch.ones(1, 1, 16, 16, 16)).numpy().tobytes()


def test_cards(tmp_path):
    card = {"steps": 1, "patch": [16] * 3, "spacing": [1.0] * 3, "identities": ["a" * 16],
            "preprocessing": [{"options": {"spacing": "keep"}}], "data": {"digest": "x"}}  # fmt: skip
    made = save_encoder(encoder_from("scratch:resnet10:width=4"), tmp_path / "whole", card)
    card, whole, rng = json.loads((made / "encoder.json").read_text()), embedded(made), random.Random(SEED)

    def cases():
        for number in range(CASES):
            folder = Path(shutil.copytree(made, tmp_path / f"{number}"))
            way = rng.choice(["odd", "card", "weights"])
            if way == "odd":
                (folder / "encoder.json").write_text(json.dumps(with_odd_part(card, rng)))
            else:
                path = folder / ("encoder.json" if way == "card" else "encoder.safetensors")
                path.write_bytes(damaged(path.read_bytes(), rng))
            yield folder, lambda folder=folder: embedded(folder)
            shutil.rmtree(folder)

    judge("cards and weights", cases(), whole, tmp_path)

    def odd():
        for number in range(CASES):
            folder = Path(shutil.copytree(made, tmp_path / f"odd-{number}"))
            (folder / "encoder.json").write_text(signed(with_odd_part(card, rng)))
            yield folder, lambda folder=folder: embedded(folder)
            shutil.rmtree(folder)

    # With other options it is another network, if the weights fit them.
    judge("cards with the right digest and an odd part", odd(), whole, tmp_path, unnoticed=True)


def test_checkpoints(tmp_path):
    (made,) = snapshot.checkpoints(MADE_BEFORE / "stopped" / "sorting")
    state, content, rng = snapshot.read_checkpoint(made), made.read_bytes(), random.Random(SEED)

    def read(path):
        return hashlib.sha256(repr(snapshot.read_checkpoint(path)).encode()).hexdigest()

    def cases():
        for number in range(CASES):
            folder = tmp_path / f"{number}"
            (folder / "checkpoints").mkdir(parents=True)
            path = folder / "checkpoints" / made.name
            path.write_bytes(damaged(content, rng))
            yield folder, lambda path=path: read(path)
            shutil.rmtree(folder)

    judge("checkpoints", cases(), read(made), tmp_path)

    def odd():
        for number in range(CASES):
            folder, broken = tmp_path / f"odd-{number}", with_odd_part(state, rng)
            path = snapshot.save_checkpoint(folder, 4, lambda path, broken=broken: torch.save(broken, path))
            yield folder, lambda path=path: read(path)
            shutil.rmtree(folder)

    judge("checkpoints with the right digest and an odd part", odd(), read(made), tmp_path, unnoticed=True)


# Records and options -----------------------------------------------------------------------------------


def test_records(tmp_path):
    made = sorted((MADE_BEFORE / "results" / "knn").glob("*.json"))
    made = [write_result(read_result(path), tmp_path / "made") for path in made]  # with a digest
    content, rng = json.loads(made[0].read_text(encoding="utf-8")), random.Random(SEED)

    def read(folder):
        records = read_records([folder])
        if records.refused:
            names = " ".join(str(refused) for refused in records.refused)
            assert made[0].name in names, names
            raise Ssl3dError("refused")
        return repr(records.tables)

    folder = tmp_path / "records"
    folder.mkdir()
    for path in made:
        shutil.copy(path, folder)
    whole = read(folder)

    def cases():
        for _ in range(CASES):
            if rng.random() < 0.5:
                text = json.dumps(with_odd_part(content, rng)).encode()
            else:
                text = damaged(made[0].read_bytes(), rng)
            (folder / made[0].name).write_bytes(text)
            yield folder, lambda: read(folder)

    judge("records", cases(), whole, tmp_path)


def test_configs(tmp_path):
    run, rng = MADE_BEFORE / "stopped" / "sorting" / "config.yaml", random.Random(SEED)
    suite = MADE_BEFORE / "mine.yaml"
    checkpoint = snapshot.load_checkpoint(run.parent)
    checkpoint["options"] = plan_from(snapshot.config_of(run.parent), str(run), recorded=True).compared()
    data = checkpoint["about"]["data"]["digest"]
    fabric = SimpleNamespace(world_size=1, device=torch.device("cpu"))

    class Loud:
        def say(self, note):  # what is said is not silent
            raise Ssl3dError(note)

    def goes_on(folder):
        made = plan_from(snapshot.config_of(folder), str(folder / "config.yaml"), recorded=True)
        check_same(checkpoint, data, fabric, made, folder, Loud())
        return "what is learnt is the same"

    def cases(source, name, read):
        for number in range(CASES):
            folder = tmp_path / f"{name}-{number}"
            folder.mkdir()
            content = source.read_bytes()
            if rng.random() < 0.5:
                content = yaml.safe_dump(with_odd_part(yaml.safe_load(content), rng)).encode()
            else:
                content = damaged(content, rng)
            (folder / name).write_bytes(content)
            yield folder, lambda folder=folder: read(folder)
            shutil.rmtree(folder)

    def suite_of(folder):
        return re.sub(re.escape(str(folder)), "", repr(load_suite(folder / "mine.yaml")))

    judge(
        "config.yaml of a run that goes on",
        cases(run, "config.yaml", goes_on),
        goes_on(run.parent),
        tmp_path,
    )
    judge("suites", cases(suite, "mine.yaml", suite_of), suite_of(suite.parent), tmp_path, unnoticed=True)
