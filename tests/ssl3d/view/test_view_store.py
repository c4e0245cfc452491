"""Pages of stores: what they show is what is there, they load nothing, and odd names stay text."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser

import h5py
import nibabel
import numpy as np
import pytest
from PIL import Image

from ssl3d.api import open_data
from ssl3d.cli import main
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.view import slices


def made(folder, volumes, settings=None, rejected=()):
    """A store of (record, image, mask, boxes)."""
    parts = folder / "s.partial"
    for record, image, mask, boxes in volumes:
        labels = None if boxes is None else np.zeros(len(boxes), np.int64)
        write_part(
            parts, re.sub(r"\W", "_", record.id), record, image, mask=mask, boxes=boxes, box_labels=labels
        )
    assemble(parts, folder / "s.h5", settings or {}, list(rejected))
    return folder / "s.h5"


def a_volume(name="a", subject="p", shape=(6, 10, 12), mask=True, boxes=None, **changes):
    rng = np.random.default_rng(len(name))
    image = rng.normal(size=(1, *shape)).astype(np.float32)
    labels = np.zeros(shape, np.uint8)
    labels[2:4, 3:7, 4:9] = 1
    record = Record(id=name, dataset=changes.pop("dataset", "set"), subject=subject, **changes)
    return record, image, labels if mask else None, boxes


def page(path, out, *words):
    assert main(["view", str(path), "--out", str(out), *words]) == 0
    return out.read_text(encoding="utf-8")


class Read(HTMLParser):
    """Elements, their attributes and the words of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.words.append(data)


def pixels(uri):
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(
        int
    )


EVIL = '<script>alert(1)</script>"><img src=http://evil.example/x onerror=alert(2)>'


def test_names_are_text_whatever_they_hold(tmp_path, capsys):
    boxes = np.array([[1, 2, 3, 4, 6, 8]], np.float32)
    store = made(
        tmp_path,
        [a_volume(EVIL, EVIL, dataset=EVIL, label=EVIL, boxes=boxes, source=EVIL)],
        {"mask_labels": {EVIL: {"1": EVIL}}, "options": {"note": EVIL}},
        [{"path": EVIL, "reason": EVIL}],
    )
    (tmp_path / "left_out.csv").write_text(f'path,reason\n"{EVIL.replace(chr(34), chr(34) * 2)}",b\n')
    read = Read(page(store, tmp_path / "p.html"))
    assert read.tags.count("script") == 1 and "img" not in read.tags
    assert not any(name.startswith("on") for _, name, _ in read.attributes)
    words = "".join(read.words)
    assert words.count("<script>alert(1)</script>") >= 5


def test_a_page_loads_nothing(tmp_path):
    text = page(made(tmp_path, [a_volume()]), tmp_path / "p.html")
    read = Read(text)
    for _, name, value in read.attributes:
        if name in ("src", "href", "data", "action", "srcset"):
            assert value.startswith(("data:image/", "#")), value
    assert not {"link", "iframe", "object", "embed", "base"} & set(read.tags)
    assert "@import" not in text and "url(" not in text
    assert re.findall(r"https?://[^\"' <]+", text) == []
    (policy,) = [
        v for tag, name, v in read.attributes if tag == "meta" and name == "content" and "src" in v
    ]
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR", "AIL"])
def test_letters_and_sides_are_those_of_the_patient(tmp_path, axes):
    """A bright corner at the patient's right, anterior, superior end is found where the letters say."""
    voxels = np.random.default_rng(0).integers(300, 500, (20, 24, 28)).astype(np.int16)
    voxels[14:, 17:, 20:] += 2000  # x to right, y to anterior, z to superior
    image = nibabel.Nifti1Image(voxels, np.diag([1.0, 1.2, 1.5, 1.0]))
    codes = nibabel.orientations.axcodes2ornt(axes)
    turned = image.as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), codes)
    )
    assert "".join(nibabel.aff2axcodes(turned.affine)) == axes
    nibabel.save(turned, tmp_path / "scan.nii.gz")
    assert (
        main(["prepare", str(tmp_path / "scan.nii.gz"), "--out", str(tmp_path / "s.h5"), "--workers", "0"])
        == 0
    )
    volume = open_data([tmp_path / "s.h5"])[0]
    plan = slices.layout(volume, (23, 20, 17), 120)
    stored = nibabel.aff2axcodes(np.array(volume.affine) @ np.eye(4))
    shape = volume.shape[1:]
    picture = pixels(slices.grey(plan, [slices.cut(volume, p, shape) for p in plan.planes]))[..., 0]
    opposite = dict(zip("RLAPSI", "LRPAIS"))
    for plane in plan.planes:
        down, across = slices.ACROSS[plane.axis]
        up, right, bottom, left = plane.letters
        assert {up, bottom} == {stored[down], opposite[stored[down]]}
        assert {left, right} == {stored[across], opposite[stored[across]]}
        own = picture[plane.top : plane.top + plane.height, plane.left : plane.left + plane.width]
        rows, columns = np.nonzero(own > 128)
        at_top, at_left = rows.mean() < own.shape[0] / 2, columns.mean() < own.shape[1] / 2
        assert (up if at_top else bottom) in "RAS" and (left if at_left else right) in "RAS"
    assert f"({axes} in the file)" in page(tmp_path / "s.h5", tmp_path / "p.html")


def test_planes_have_the_proportions_of_the_patient(tmp_path):
    record, image, mask, _ = a_volume(shape=(5, 60, 80), spacing=(10.0, 1.5, 1.5), orientation="SAR")
    volume = open_data([made(tmp_path, [(record, image, mask, None)])])[0]
    axial, coronal, sagittal = slices.layout(volume, (2, 30, 40), 120).planes
    assert (axial.width, axial.height) == (120, 90)  # 120 x 90 mm
    assert (coronal.width, coronal.height) == (120, 50)
    assert (sagittal.width, sagittal.height) == (90, 50)


def test_outlines_and_boxes_lie_on_their_objects(tmp_path):
    boxes = np.array([[2, 3, 4, 4, 7, 9]], np.float32)
    record, image, mask, _ = a_volume(orientation="SAR")
    volume = open_data([made(tmp_path, [(record, image, mask, boxes)])])[0]
    plan = slices.layout(volume, (3, 5, 6), 120)
    drawn = pixels(
        slices.outlines(plan, [slices.cut_mask(volume, p, volume.shape[1:]) for p in plan.planes])
    )
    axial = plan.planes[0]
    rows, columns = np.nonzero(drawn[: axial.height + axial.top, : axial.width].sum(axis=2))
    # W 4 to 9 of 12 and H 3 to 7 of 10, ten pixels each, from the other side: 30 to 80 and 30 to 70.
    assert (columns.min(), columns.max() + 1) == (30, 80)
    assert (rows.min() - axial.top, rows.max() + 1 - axial.top) == (30, 70)
    x, y, width, height = map(
        float, re.findall(r'[xywidthe]+="([\d.]+)"', slices.rectangles(plan, boxes, "true"))[:4]
    )
    assert (x, y - axial.top, width, height) == (30, 30, 50, 40)


def test_a_damaged_volume_is_named_and_the_others_are_shown(tmp_path):
    store = made(tmp_path, [a_volume(f"v{k}", f"p{k}") for k in range(3)])
    with h5py.File(store) as file:
        data = file["images/1"]
        place = data.id.get_chunk_info(0)
    with store.open("r+b") as file:
        file.seek(place.byte_offset + place.size // 2)
        file.write(b"\xff" * 8)
    text = page(store, tmp_path / "p.html")
    assert text.count('<svg class="slices"') == 2
    assert re.search(r"<h4>v1</h4>.{0,40}Damaged:", text)
    assert "1 volume cannot be read" in text


def test_what_was_refused_or_left_out_stands_there_with_its_reason(tmp_path):
    store = made(tmp_path, [a_volume()], rejected=[{"path": "bad.nii", "reason": "not finite"}])
    table = f"path,reason,store\nnotes.txt,not a scan,{store.name}\ntheirs.txt,not a scan,another.h5\n"
    (tmp_path / "left_out.csv").write_text(table)
    words = " ".join(Read(page(store, tmp_path / "p.html")).words)
    assert "theirs.txt" not in words
    assert "bad.nii" in words and "not finite" in words and "notes.txt" in words and "not a scan" in words


def test_two_thousand_volumes_make_a_page_that_can_be_mailed(tmp_path):
    noise = np.random.default_rng(0).normal(size=(1, 24, 96, 96)).astype(np.float32)
    record = Record(id="noise", dataset="set", subject="p", orientation="SAR")
    mask = np.zeros((24, 96, 96), np.uint8)
    mask[4:20, 20:70, 20:70] = 1 + (np.indices((16, 50, 50)).sum(axis=0) // 8) % 4
    store = made(tmp_path, [(record, noise, mask, None)])
    from ssl3d.view.gallery import side_of
    from ssl3d.view.store import Histograms, _card

    data = open_data([store])
    card, _ = _card(data[0], side_of(2000), Histograms(data), 1999)
    from ssl3d.view.gallery import gallery

    # Noise has the largest pictures there are: real scans take about half.
    assert 2000 * len(gallery([card] * 20)) / 20 < 25e6


def test_of_more_volumes_some_are_chosen_evenly(tmp_path):
    store = made(tmp_path, [a_volume(f"v{k}", f"p{k}") for k in range(9)])
    text = page(store, tmp_path / "p.html", "--volumes", "3")
    assert re.findall(r"<h4>(v\d)</h4>", text) == ["v0", "v4", "v8"]
    assert "3 volumes, chosen evenly, are shown here" in text


def test_a_page_that_is_there_is_replaced_only_when_asked(tmp_path, capsys):
    store = made(tmp_path, [a_volume()])
    out = tmp_path / "p.html"
    out.write_text("mine")
    assert main(["view", str(store), "--out", str(out)]) == 2
    assert out.read_text() == "mine" and "--overwrite replaces it" in capsys.readouterr().err
    assert "<svg" in page(store, out, "--overwrite")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.h5"], "no such file"),
        (["{store}", "--out", "{folder}"], "a folder; name a file"),
        (["{store}", "--data", "{store}"], "holds no predictions"),
        (["{store}", "--volumes", "0"], "at least 1"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, capsys, words, message):
    store = made(tmp_path, [a_volume()])
    filled = [word.format(store=store, folder=tmp_path) for word in words]
    rest = [] if "--out" in filled else ["--out", str(tmp_path / "p.html")]
    assert main(["view", *filled, *rest]) != 0
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line
    assert not (tmp_path / "p.html").exists()


def test_a_kill_leaves_no_half_page(tmp_path):
    """Killed while the page is being written, where the old page lies and stays."""
    store = made(tmp_path, [a_volume()])
    out = tmp_path / "p.html"
    out.write_text("old")
    code = (
        "import os, signal, pathlib\n"
        "from ssl3d.cli import main\n"
        "before = pathlib.Path.write_bytes\n"
        "def write(self, content):\n"
        "    before(self, content[: len(content) // 2])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pathlib.Path.write_bytes = write\n"
        f"main(['view', {str(store)!r}, '--out', {str(out)!r}, '--overwrite'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert out.read_text() == "old"
