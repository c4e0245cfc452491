"""Files appear whole or not at all."""

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
