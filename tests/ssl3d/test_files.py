"""Files appear whole or not at all."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssl3d.checkpoint.encoders import save_encoder
from ssl3d.checkpoint.snapshot import read_checkpoint
from ssl3d.cli import main
from ssl3d.errors import CheckpointError
from ssl3d.files import whole_file, write_whole
from ssl3d.specs import encoder_from
from ssl3d.yaml_files import read_yaml


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_replaces_the_one_before_it_and_leaves_nothing_beside(tmp_path, sync):
    path = tmp_path / "new folder" / "note.txt"
    write_whole(path, "first", sync)
    write_whole(path, "größer".encode(), sync)
    assert path.read_text(encoding="utf-8") == "größer"
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "note.txt"
    write_whole(path, "before")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "before"
        raise ZeroDivisionError
    assert path.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError):
        write_whole(tmp_path / "file" / "note.txt", "text")


def test_what_a_killed_process_left_goes_with_the_next_call(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom ssl3d.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "note.txt"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".tmp"
    with whole_file(path) as temporary:  # a process that lives keeps its own
        temporary.write_text("whole", encoding="utf-8")
        write_whole(path, "another's")
        assert temporary.exists()
    assert list(tmp_path.iterdir()) == [path] and path.read_text(encoding="utf-8") == "whole"
    other = tmp_path / left.name.replace(f"-{left.name.split('-')[1]}-", f"-{os.getpid()}-")
    other.write_text("", encoding="utf-8")
    write_whole(path, "again")
    assert other.exists()


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_file_holds_no_command(tmp_path, capsys):
    encoder = save_encoder(encoder_from("scratch:resnet10:width=4"), tmp_path / "encoder", {})
    pipe(encoder / "encoder.safetensors")
    (tmp_path / "run").mkdir()
    pipe(tmp_path / "run" / "config.yaml")
    for words in (
        ["pretrain", "--config", pipe(tmp_path / "c.yaml")],
        ["leaderboard", "run", pipe(tmp_path / "s.yaml"), "--out", tmp_path / "o"],
        ["pretrain", "--resume", tmp_path / "run"],
        ["embed", encoder, "--data", "phantoms:20", "--out", tmp_path / "e.h5"],
        ["pretrain", "--proxy", f"{pipe(tmp_path / 'p.py')}", "--data", "phantoms:20"],
        ["pretrain", "--config", "/dev/zero"],
    ):
        with contextlib.suppress(SystemExit):
            assert main([str(word) for word in words]) == 2
        assert "pipe or a device" in capsys.readouterr().err, words
    name = "step-00000002-0123456789abcdef.pt"
    with pytest.raises(CheckpointError, match="pipe or a device"):
        read_checkpoint(pipe(tmp_path / name))


def test_what_a_shell_hands_over_is_read(tmp_path):
    ours, theirs = os.pipe()
    os.write(theirs, b"steps: 7\n")
    os.close(theirs)
    assert read_yaml(Path(f"/dev/fd/{ours}")) == {"steps": 7}
    os.close(ours)
