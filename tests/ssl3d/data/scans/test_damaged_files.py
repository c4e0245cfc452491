"""Files damaged at random: each is read as it was, or refused; none ends, fills or holds the process.

The default set damages 50 files of each format, `pytest -m slow` 1,000. What carries no check sum (raw
voxels, text of headers) can be changed without a trace: there a file must be read or refused, and refused
if it is cut.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
import traceback
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from ssl3d.data.scans.arrays import Rows
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Wanted
from ssl3d.data.scans.read import header_spacing, read
from ssl3d.errors import DataError

MEMORY = 2 << 30  # bytes a file may take beyond what the process has
CHECKED = ("a.nii.gz", "a.mgz", "z.mha", "z.nrrd", "a.png", "a.npz")
UNCHECKED = ("a.nii", "a.mgh", "a.mha", "a.nrrd", "a.dcm", "z.dcm", "a.tif", "a.bmp", "a.jpg")


def whole(folder: Path, name: str) -> Path:
    """Write an undamaged file."""
    path = folder / name
    voxels = np.random.default_rng(0).integers(0, 200, (9, 10, 11)).astype(np.int16)
    suffix = name.partition(".")[2]
    if suffix.startswith(("nii", "mg")):
        nibabel.save((nibabel.MGHImage if "mg" in suffix else nibabel.Nifti1Image)(voxels, np.eye(4)), path)
    elif suffix == "npz":
        np.savez_compressed(path, train_images=np.stack([voxels] * 3), train_labels=np.arange(3))
    elif suffix in ("png", "tif", "bmp", "jpg"):
        Image.fromarray(voxels[0].astype(np.uint8)).save(path)
    else:
        image = sitk.GetImageFromArray(voxels[:1] if suffix == "dcm" else voxels)
        sitk.WriteImage(image, str(path), useCompression=name.startswith("z"))
    return path


def begin_of_voxels(name: str, content: bytes) -> int:
    """Find the first byte that a check sum covers, or the header's length does."""
    return {"z.mha": content.find(b"LOCAL\n") + 6, "z.nrrd": content.find(b"\n\n") + 2}.get(name, 0)


@st.composite
def damages(draw: st.DrawFn, size: int, begin: int) -> tuple[str, int, int, bytes]:
    """Draw a kind of damage, a place from `begin` on, a length and new bytes."""
    kind = draw(st.sampled_from(("flip", "cut", "zero", "double", "insert", "write")))
    early = st.integers(begin, min(begin + 400, size - 1))
    at = draw(st.one_of(early, st.integers(begin, size - 1)))
    return kind, at, draw(st.integers(1, max(size // 4, 1))), draw(st.binary(min_size=1, max_size=8))


def damaged(content: bytes, kind: str, at: int, length: int, new: bytes) -> bytes:
    head, tail = content[:at], content[at:]
    if kind == "flip":
        return head + bytes([tail[0] ^ (1 << new[0] % 8)]) + tail[1:]
    if kind == "cut":
        return head
    if kind == "zero":
        return head + bytes(len(tail[:length])) + tail[length:]
    if kind == "double":
        return head + tail[:length] + tail
    return head + new + (tail if kind == "insert" else tail[len(new) :])


def content_of(path: Path) -> list[np.ndarray]:
    """Read a file by the toolkit: affine and voxels, or the rows and their labels."""
    if path.suffix != ".npz":
        pixels = read([path])
        header_spacing([path])
        return [pixels.affine, pixels.voxels]
    contents, rows = find([path], Wanted()), Rows()
    if contents.rejected:
        raise DataError(contents.rejected[0][1])
    read_rows = [rows.of(path, *scan.member)[0] for scan in contents.scans if scan.member]
    return [np.array([scan.label for scan in contents.scans], float), np.stack(read_rows)]


def outcomes(folder: Path, name: str, count: int) -> str:
    """Damage a file many times; return the first case that went wrong, or nothing."""
    path = whole(folder, name)
    content, reference = path.read_bytes(), content_of(path)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    begin = begin_of_voxels(name, content)

    @hypothesis.settings(max_examples=count, derandomize=True, deadline=None, database=None)
    @hypothesis.given(damages(len(content), begin))
    def check(case: tuple[str, int, int, bytes]) -> None:
        path.write_bytes(damaged(content, *case))
        signal.alarm(60)
        try:
            result = content_of(path)
        except DataError as error:
            assert str(error) and "\n" not in str(error)
            return
        if name in CHECKED:
            for mine, theirs in zip(result, reference, strict=True):
                np.testing.assert_array_equal(mine, theirs)

    try:
        check()
        # What is cut is refused; less than a kind's own padding may be missing at the end.
        for length in np.linspace(1, len(content) - 64, 12).astype(int) if name != "a.jpg" else ():
            path.write_bytes(content[:length])
            with pytest.raises(DataError):
                content_of(path)
    except BaseException:
        return traceback.format_exc()[-3000:]
    return ""


def _child(connection, folder: Path, name: str, count: int) -> None:
    connection.send(outcomes(folder, name, count))


def run(folder: Path, name: str, count: int) -> None:
    """Damage files in a process of its own, as the readers in C may end it."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, folder, name, count))
    process.start()
    theirs.close()
    try:
        fault = mine.recv()
    except EOFError:
        fault = "the process ended"
    process.join()
    assert not fault and process.exitcode == 0, f"{fault} (status {process.exitcode})"


@pytest.mark.parametrize("name", [*CHECKED, *UNCHECKED])
def test_fifty_damaged_files_are_read_as_they_were_or_refused(tmp_path, name):
    run(tmp_path, name, 50)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHECKED, *UNCHECKED])
def test_a_thousand_damaged_files_are_read_as_they_were_or_refused(tmp_path, name):
    run(tmp_path, name, 1000)
