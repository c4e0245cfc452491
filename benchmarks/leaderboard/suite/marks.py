"""Marks of jobs in a folder that all workers share: what was done or failed, its log, its lock."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ssl3d.api import parse_json, write_whole
from ssl3d_benchmarks.leaderboard.suite.jobs import Job


@dataclass(frozen=True)
class Marks:
    """Marks of the jobs of a suite.

    Attributes:
        folder: Folder of NAME.json, NAME.log, and NAME.lock while a job is in work.
    """

    folder: Path

    def path(self, name: str, kind: str) -> Path:
        """Return the file of a job's mark (json), log or lock."""
        return self.folder / f"{name.replace(':', '__')}.{kind}"

    def log_hint(self, name: str) -> str:
        """Name the log of a job for the end of a message; empty if there is none."""
        path = self.path(name, "log")
        return f"; log: {path}" if path.exists() else ""

    def is_done(self, job: Job) -> bool:
        """Return whether a job is done: its product is there, or its mark says so."""
        if job.product is not None:
            return job.product.exists()
        mark = self._read(job)
        return mark.get("state") == "done" and mark.get("digest") == job.digest()

    def failure_since(self, job: Job, began: float) -> str:
        """Say why the same job failed since some time; empty if it did not."""
        mark = self._read(job)
        if mark.get("state") != "failed" or mark.get("digest") != job.digest():
            return ""
        try:
            ended = datetime.fromisoformat(mark["ended"]).timestamp()
        except (KeyError, TypeError, ValueError):
            return ""
        return f"{mark.get('why')} (on {mark.get('host')})" if ended > began else ""

    def write(self, job: Job, mark: dict[str, Any]) -> None:
        """Write the mark of a job, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        path = self.path(job.name, "json")
        write_whole(path, json.dumps(mark, indent=1) + "\n")

    def _read(self, job: Job) -> dict[str, Any]:
        try:
            content = parse_json(self.path(job.name, "json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
