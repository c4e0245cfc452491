"""Shards of one store, each made by a job in SLURM's queue."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ssl3d.data.preparation.options import PrepareOptions
from ssl3d.data.preparation.prepare import prepare
from ssl3d.slurm import submit_jobs


@dataclasses.dataclass
class QueuedOptions(PrepareOptions):
    """Turn folders and files of scans into one store, ready for training.

    Attributes:
        slurm: Number of shards, each made by a job that is put into SLURM's queue; 0 makes the store here.
        slurm_options: Options of submitit as KEY=VALUE, such as slurm_partition=cpu cpus_per_task=8
            timeout_min=120.
        cluster: Cluster that submitit submits to: slurm, or local (processes of this machine).
    """

    slurm: int = 0
    slurm_options: tuple[str, ...] = ()
    cluster: str = "slurm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slurm < 0:
            raise ValueError(f"slurm is {self.slurm}, must be 0 or more")
        if self.slurm and self.part:
            raise ValueError(f"slurm is {self.slurm}, but part is {self.part} already: give one of them")
        if self.cluster not in ("slurm", "local"):
            raise ValueError(f"cluster is {self.cluster!r}, must be slurm or local")

    def of_part(self, part: str) -> PrepareOptions:
        """Return the options of one shard, or of the whole where `part` is empty."""
        names = [field.name for field in dataclasses.fields(PrepareOptions)]
        return PrepareOptions(**({name: getattr(self, name) for name in names} | {"part": part}))


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard as submitit calls it, which is queued again when its time is over.

    Attributes:
        options: Options of the shard.
        home: Folder in which relative paths hold.
    """

    options: PrepareOptions
    home: str

    def __call__(self) -> int:
        """Make the shard, or go on with it, and return its number of volumes."""
        os.chdir(self.home)
        return prepare(self.options).volumes

    def checkpoint(self) -> Any:
        """Return what submitit queues when the time is over: the same, for what is done stays."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit_shards(options: QueuedOptions) -> list[str]:
    """Put a job for each shard into the queue, and return their numbers.

    Raises:
        UsageError: submitit is not installed, or SLURM is not there.
    """
    count, out = options.slurm, Path(options.out)
    shards = [Shard(options.of_part(f"{n}/{count}"), os.getcwd()) for n in range(1, count + 1)]
    folder = out.parent / f".{out.stem}-jobs"
    return submit_jobs(shards, folder, f"ssl3d-{out.stem}", options.slurm_options, options.cluster)
