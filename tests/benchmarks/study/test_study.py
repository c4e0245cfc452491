"""A whole study on small scans: planned, killed, resumed, edited by hand, refused in one line."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ssl3d import cli
from ssl3d.api import record_files
from ssl3d_benchmarks.child import Child

WORDS = ["--encoder", "resnet10:width=4", "--recipes", "context_restoration", "--seeds", "1", "--folds",
         "2", "--pretrain-steps", "2", "--finetune-steps", "2"]  # fmt: skip


class Killed(BaseException):
    """Stands in for the end of the process."""


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Thirteen people, six with a mask."""
    folder, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    rows, bare = ["path,subject,mask"], ["path,subject"]
    for number in range(13):
        mask, corner = np.zeros((16, 16, 16), np.uint8), rng.integers(3, 7, 3)
        mask[tuple(slice(start, start + 6) for start in corner)] = 1
        values = (rng.normal(size=mask.shape) + 3 * mask + 10).astype(np.float32)
        for name, voxels in ((f"p{number}", values), (f"p{number}_seg", mask)):
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"{name}.nii.gz")
        rows.append(f"p{number}.nii.gz,p{number},{f'p{number}_seg.nii.gz' if number < 6 else ''}")
        bare.append(f"p{number}.nii.gz,p{number}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    (folder / "bare.csv").write_text("\n".join(bare) + "\n")
    return folder


class Jobs:
    """Does the jobs of a suite in this process, and notes them; dies after the one that `kill` names."""

    def __init__(self, monkeypatch):
        self.done, self.kill = [], ""
        monkeypatch.setattr(Child, "run", self.run)

    def run(self, argv, log, environment, verbose):
        words = argv[argv.index("ssl3d") + 1 :]
        status = cli.main(words)
        name = log.stem.replace("__", ":")
        self.done.append(name)
        if self.kill and name.startswith(self.kill):
            self.kill = ""
            raise Killed(name)  # its work is done, its mark is not written
        return status, "" if status == 0 else " ".join(words)


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL3D_CACHE", str(tmp_path / "cache"))
    return Jobs(monkeypatch)


def records(out):
    """The scores of a study by contestant, with what they are of."""
    found = {}
    for path in record_files(out):
        content = json.loads(path.read_text())
        if path.parent.name != "finetune":  # a mark or a note of the study
            continue
        found[content["contestant"]["name"]] = (content["scores"], content["split_digest"])
    return found


@pytest.mark.long
def test_a_study_that_was_killed_ends_with_the_same_records(scans, jobs, tmp_path, capsys):
    words = ["study", str(scans / "list.csv"), "--hours", "1", *WORDS, "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main([*words, str(whole)]) == 0
    said = capsys.readouterr().out
    assert "6 with masks, 7 without" in said and "2-fold cross-validation" in said
    assert "What it can show: 6 test subjects, 2 folds: a gain below" in said
    assert said.index("What it can show") < said.index("pretrain:context_restoration:0")
    assert "Does pretraining pay here?\n  Fine-tuned, " in said and "ssl3d predict " in said
    assert (whole / "answer.txt").read_text() in said + "\n"
    assert re.search(r"\nTime: its jobs took \S+.*, planned were \S+", said)
    model = Path(next(w.split()[2] for w in said.splitlines() if w.strip().startswith("ssl3d predict")))
    assert model.is_dir()
    assert "(1 of 1 encoders" in said or "no gain" in said or "nothing can be" in said
    # Nobody who is tested was pretrained on.
    assert "saw test subjects" not in said
    card = json.loads((whole / "work/context_restoration-0/encoder/encoder.json").read_text())
    assert len(card["identities"]) == 7

    for kill in ("measure:", "pretrain:", "score:finetune:scratch"):
        jobs.kill = kill
        with pytest.raises(Killed):
            cli.main([*words, str(killed)])
    assert cli.main([*words, str(killed)]) == 0
    assert records(killed) == records(whole) and len(records(whole)) >= 2

    # Edited by hand: the suite is done as it stands, and what was done is not done again.
    suite = whole / "suite.yaml"
    suite.write_text(suite.read_text().replace("--steps 2", "--steps 3"))
    edited = suite.read_text()
    assert "--steps 3" in edited
    jobs.done.clear()
    assert cli.main([*words, str(whole), "--hours", "2"]) == 0
    assert sorted(jobs.done) == ["score:finetune:context_restoration-0", "score:finetune:scratch"]
    assert suite.read_text() == edited
    told = capsys.readouterr()
    assert "was planned with another --hours and is done as it stands" in told.err
    steps = {
        json.loads(path.read_text())["settings"]["training"].get("steps")
        for path in (whole / "finetune").glob("[cs]*.json")
    }
    assert steps == {2, 3}

    # The same folder for other scans.
    assert cli.main(["study", str(scans / "bare.csv"), "--out", str(whole)]) == 2
    assert "use another --out" in capsys.readouterr().err


@pytest.mark.long
def test_data_without_targets_and_too_few_hours_are_one_line(scans, jobs, tmp_path, capsys):
    assert cli.main(["study", str(scans / "bare.csv"), "--out", str(tmp_path / "bare")]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert "none of 13 volumes has a mask, a box or a label" in line
    assert not (tmp_path / "bare/suite.yaml").exists()
    words = ["study", str(scans / "list.csv"), *WORDS[:-4], "--out", str(tmp_path / "short"), "--dry-run"]
    assert cli.main([*words, "--hours", "0.001"]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert "--hours 0.001 are too few: the smallest study of these scans needs " in line
    assert not (tmp_path / "short/suite.yaml").exists()
    # With as many as it says there is a plan, and a dry run trains nothing.
    jobs.done.clear()
    assert cli.main([*words, "--hours", "30"]) == 0
    assert jobs.done == [] and (tmp_path / "short/suite.yaml").exists()
    assert "Plan: about " in capsys.readouterr().out
