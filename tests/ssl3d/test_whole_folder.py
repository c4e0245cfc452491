"""A folder takes another's place at once; a process that dies on the way loses neither."""

import os
import subprocess
import sys

import pytest

from ssl3d.files import whole_folder

DIES = """
import os, sys
from pathlib import Path
from ssl3d.files import whole_folder
rename, place = Path.rename, Path(sys.argv[1])
def dying(self, target):
    made = rename(self, target)
    os._exit(9)
Path.rename = dying
with whole_folder(place) as folder:
    (folder / "a").write_text("new")
"""


def write(place, text):
    with whole_folder(place) as folder:
        (folder / "a").write_text(text)


def test_a_folder_replaces_another_and_leaves_nothing_beside(tmp_path):
    for text in ("old", "new"):
        write(tmp_path / "model", text)
    assert (tmp_path / "model/a").read_text() == "new" and os.listdir(tmp_path) == ["model"]


def test_what_fails_leaves_the_old_one(tmp_path):
    write(tmp_path / "model", "old")
    with pytest.raises(OSError, match="full"), whole_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("half")
        raise OSError("full")
    assert (tmp_path / "model/a").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_a_failed_rename_brings_the_old_one_back(tmp_path, monkeypatch):
    write(tmp_path / "model", "old")
    rename = type(tmp_path).rename

    def refusing(self, target):
        if self.suffix == ".tmp":
            raise OSError("refused")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", refusing)
    with pytest.raises(OSError, match="refused"):
        write(tmp_path / "model", "new")
    assert (tmp_path / "model/a").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_a_death_between_the_renames_loses_nothing(tmp_path):
    """The process dies just after it moved the old one aside; the next one puts it back first."""
    write(tmp_path / "model", "old")
    died = subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "model")], check=False)
    assert died.returncode == 9 and not (tmp_path / "model").exists()
    with pytest.raises(OSError, match="full"), whole_folder(tmp_path / "model"):
        raise OSError("full")
    assert (tmp_path / "model/a").read_text() == "old" and os.listdir(tmp_path) == ["model"]
