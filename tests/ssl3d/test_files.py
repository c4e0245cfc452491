"""Files appear whole or not at all."""

import os
import subprocess
import sys

import pytest

from ssl3d.files import whole_file, write_whole


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
