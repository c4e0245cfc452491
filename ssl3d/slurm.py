"""Jobs in SLURM's queue, by submitit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssl3d.errors import UsageError

REQUEUES = 100
"""Times that a job is queued again when its time is over."""


def submit_jobs(
    works: Sequence[Callable[[], Any]], folder: Path, name: str, options: Sequence[str], cluster: str
) -> list[str]:
    """Put work into the queue, as one array of jobs, and return their numbers.

    Args:
        works: Objects to call, one for each job, which can be pickled. One that has a method `checkpoint`
            says by it what is queued again when its time is over.
        folder: Folder for the jobs' output.
        name: Name of the jobs.
        options: Options of submitit as KEY=VALUE.
        cluster: Cluster that submitit submits to: slurm, or local (processes of this machine).

    Raises:
        UsageError: submitit is not installed, SLURM is not there, or an option is none.
    """
    try:
        import submitit
    except ImportError as error:
        raise UsageError('--slurm needs submitit: pip install "ssl3d[slurm]"') from error
    given: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--slurm-options {text}: expected KEY=VALUE, as in slurm_partition=gpu")
        given[key] = int(value) if value.isdigit() else value
    try:
        executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=REQUEUES)
    except RuntimeError as error:
        raise UsageError(f"--slurm {len(works)}: {error}") from error
    executor.update_parameters(name=name, **given)
    with executor.batch():
        jobs = [executor.submit(work) for work in works]
    return [str(job.job_id) for job in jobs]
