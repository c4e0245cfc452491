"""Files beside records that are none: pipes and giant pictures cost a report nothing."""

import os
import struct
import zlib

from PIL import Image

from ssl3d.evaluation.record_archive import record_files
from ssl3d.pages.elements import inline


def test_a_pipe_among_records_is_not_opened(tmp_path):
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    os.mkfifo(tmp_path / "b.json")
    os.mkfifo(tmp_path / "b.png")
    assert record_files(tmp_path) == [tmp_path / "a.json"]
    assert inline(tmp_path / "b.png") is None


def test_a_giant_picture_beside_a_record_is_left_out(tmp_path):
    def chunk(name, content):
        held = name + content
        return struct.pack(">I", len(content)) + held + struct.pack(">I", zlib.crc32(held))

    for side in (9000, 30000):
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")))
        assert inline(tmp_path / "a.png") is None
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    assert inline(tmp_path / "a.png").startswith("data:image/jpeg;base64,")
