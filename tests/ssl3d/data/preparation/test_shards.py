"""`ssl3d prepare --slurm N`: one job for each shard, in one array."""

import time

import numpy as np
import pytest

from ssl3d import cli
from ssl3d.data.open import open_data
from ssl3d.data.preparation import shards
from ssl3d.data.preparation.prepare import PrepareOptions
from ssl3d.data.preparation.shards import QueuedOptions, Shard, submit_shards


@pytest.fixture
def scans(tmp_path):
    """A folder of six scans of six people."""
    import nibabel

    folder = tmp_path / "scans"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        voxels = rng.normal(size=(10, 11, 12)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / f"sub-{number:02d}_t1.nii.gz")
    return folder


def test_each_job_makes_its_shard_with_the_other_options(scans, tmp_path, monkeypatch, capsys):
    asked = {}

    def submitted(works, folder, name, options, cluster):
        asked.update(works=works, folder=folder, name=name, options=options, cluster=cluster)
        return ["7_0", "7_1"]

    monkeypatch.setattr(shards, "submit_jobs", submitted)
    monkeypatch.chdir(tmp_path)
    words = ["prepare", "scans", "--out", "stores/mine.h5", "--spacing", "2", "2", "2", "--slurm", "2"]
    assert cli.main([*words, "--slurm-options", "slurm_partition=cpu", "timeout_min=60"]) == 0
    assert capsys.readouterr().out.split() == ["submitted", "7_0", "submitted", "7_1"]
    assert asked["options"] == ("slurm_partition=cpu", "timeout_min=60") and asked["cluster"] == "slurm"
    assert [type(work.options) for work in asked["works"]] == [PrepareOptions] * 2
    assert [work.options.part for work in asked["works"]] == ["1/2", "2/2"]
    assert all(work.options.spacing == (2.0, 2.0, 2.0) for work in asked["works"])
    # They hold wherever the job runs, and make what the job of an array would.
    monkeypatch.chdir(scans)
    made = sum(work() for work in asked["works"])
    assert made == 6 == len(open_data([str(tmp_path / "stores")]))


def test_wrong_options_are_one_line(scans, capsys):
    assert cli.main(["prepare", str(scans), "--slurm", "2", "--part", "1/2"]) == 2
    assert "slurm is 2, but part is 1/2 already" in capsys.readouterr().err


def test_a_job_whose_time_is_over_is_queued_again(scans):
    submitit = pytest.importorskip("submitit")
    shard = Shard(QueuedOptions((str(scans),)).of_part("1/2"), ".")
    again = shard.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and again.function is shard


@pytest.mark.slow
def test_jobs_of_this_machine_make_all_shards(scans, tmp_path):
    pytest.importorskip("submitit")
    options = QueuedOptions(
        (str(scans),), out=str(tmp_path / "stores" / "mine.h5"), slurm=2, cluster="local"
    )
    options.workers, options.slurm_options = 0, ("timeout_min=10",)
    numbers = submit_shards(options)
    assert len(numbers) == 2
    stores = [tmp_path / "stores" / f"mine-{n}-of-2.h5" for n in (1, 2)]
    deadline = time.monotonic() + 250
    while not all(store.is_file() for store in stores) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(open_data([str(tmp_path / "stores")])) == 6
