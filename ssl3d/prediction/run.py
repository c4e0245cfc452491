"""The work of `ssl3d predict`: scan after scan, shared by processes, stopped anywhere and gone on with."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ssl3d import locks
from ssl3d.amounts import count_of, printable
from ssl3d.checkpoint.card import versions
from ssl3d.data.identity import identity_hash, source_hash
from ssl3d.data.preparation.parts import digest_of
from ssl3d.data.preparation.progress import Progress
from ssl3d.data.scans.arrays import Rows
from ssl3d.errors import (
    DataError,
    Ssl3dError,
    TransientError,
    UsageError,
    is_full,
    is_transient,
    not_written,
    reason_of,
)
from ssl3d.files import time_of, write_whole
from ssl3d.json_files import parse_json
from ssl3d.prediction import tables
from ssl3d.prediction.ensemble import Ensemble
from ssl3d.prediction.fit import Needs, needs_of, prepare_options
from ssl3d.prediction.inputs import Inputs, Item, inputs_of, names_of
from ssl3d.prediction.options import PredictOptions
from ssl3d.prediction.outputs import Writer
from ssl3d.training.device import device_of

SCAN = ("dataset", "subject", "id", "scan")
"""What `predict.json` says of each scan; `scan` is the hash of its file, by which `ssl3d view` finds it."""


@dataclass
class Summary:
    """What a call of `predict` came to.

    Attributes:
        predicted: Number of volumes predicted, now or before.
        rejected: (source, reason) of the scans set aside.
        files: Tables that were written.
    """

    predicted: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def predict(options: PredictOptions) -> Summary:
    """Predict every scan, or go on where that was stopped.

    Args:
        options: Models, scans and what is to be written.

    Raises:
        CheckpointError: A model is missing or damaged.
        DataError: No scan is found, or a file cannot be written.
        TransientError: The disk is full.
        UsageError: The models do not go together, or an option does not go with them.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    ensemble = Ensemble(options.model, device_of(options.device))
    if options.flip and not ensemble.can_flip:
        raise UsageError(
            "--flip: training did not mirror volumes along any axis, so mirrored copies are not what the "
            "model knows; leave it out"
        )
    needs = needs_of(ensemble.cards)
    inputs = inputs_of(options.data, needs, prepare_options(needs, options.data, options.normalize))
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out}: a file, not a folder")
    for note in inputs.notes:
        _say(printable(note))
    work = Work(options, ensemble, needs, inputs)
    work.do_all()
    return work.finish()


class Work:
    """Scans that several processes may share by the files in the folder of the predictions.

    Args:
        options: Options of the command.
        ensemble: Models that predict.
        needs: What they need of a scan.
        inputs: What is to be predicted.
    """

    def __init__(self, options: PredictOptions, ensemble: Ensemble, needs: Needs, inputs: Inputs) -> None:
        self.options, self.ensemble, self.needs, self.inputs = options, ensemble, needs, inputs
        self.writer = Writer(options, ensemble.kind, ensemble.classes)
        self.began = 0.0
        models = [card["digest"] for card in ensemble.cards]
        settings = [models, options.flip, options.normalize, self.writer.settings()]
        self.keys = [digest_of([item.key, settings]) for item in inputs.items]
        self.names = names_of(inputs.items)
        self.jobs, self.done = options.out / ".jobs", options.out / ".done"
        self.fresh: set[str] = set()
        """Keys of what this call predicted, which --overwrite does not ask for again."""

    def do_all(self) -> None:
        """Predict what is not predicted yet; what other processes hold comes last."""
        try:
            self.jobs.mkdir(parents=True, exist_ok=True)
            self.done.mkdir(parents=True, exist_ok=True)
            self.began = time_of(self.done)  # what is compared with it has its date from there
        except OSError as error:
            raise not_written(error, f"cannot write {self.options.out}: {error.strerror}") from error
        left = list(range(len(self.keys)))
        progress, started, waiting = Progress(len(left)), time.monotonic(), False
        while left:
            before, left, rows = left, [], Rows()
            for number in before:
                if not self._try(number, rows):
                    left.append(number)
                progress.show(max(len(self.keys) - len(left), 1), time.monotonic() - started)
            if left == before:
                if not waiting:
                    progress.clear()
                    _say(f"waiting for {count_of(len(left), 'scan')} that another process predicts")
                waiting = True
                time.sleep(locks.WAIT)
        progress.clear()

    def _try(self, number: int, rows: Rows) -> bool:
        """Predict one scan, and return False where another process holds it.

        Raises:
            TransientError: The disk is full.
            DataError: A file cannot be written.
        """
        if self._is_done(number):
            return True
        lock = self.jobs / f"{self.keys[number]}.lock"
        try:
            if not locks.take(lock):
                return False
            with locks.holding(lock):
                if not self._is_done(number):  # another process may have done it just before
                    self._do(number, rows)
        except OSError as error:
            raise self._told(error) from error
        return True

    def _told(self, error: OSError) -> Ssl3dError:
        why = "no space left on the disk" if is_full(error) else reason_of(error)
        kind = TransientError if is_transient(error) else DataError
        return kind(f"{self.options.out}: {why}; what is predicted stays: call again")

    def _do(self, number: int, rows: Rows) -> None:
        item, key = self.inputs.items[number], self.keys[number]
        scratch = self.jobs / key
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            entries = self._predict(item, self.names[number], scratch, rows)
            content: dict[str, Any] = {"source": item.source, "entries": entries}
        except OSError:
            raise
        except Exception as error:
            if not isinstance(error, Ssl3dError):
                traceback.print_exc()
            content = {"source": item.source, "reason": _reason(error)}
            _say(printable(f"set aside: {item.source}: {content['reason']}"))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        write_whole(self.done / f"{key}.json", json.dumps(content))
        self.fresh.add(key)

    def _predict(self, item: Item, name: str, scratch: Path, rows: Rows) -> list[dict[str, Any]]:
        entries, staged = [], []
        for n, volume in enumerate(item.volumes(rows)):
            self.needs.check(volume, self.options.normalize)
            own = f"{name}_{n:03d}" if n else name
            began = time.perf_counter()
            prediction = self.ensemble.infer(volume, self.options.flip)
            files, row = self.writer.write(prediction, volume, item, own, scratch)
            staged += files
            entries.append(
                {
                    "dataset": volume.dataset,
                    "subject": volume.subject,
                    "id": volume.id,
                    "scan": source_hash(volume.record.sha256, volume.record.source),
                    "files": [path.name for path in files],
                    "row": row,
                    "seconds": round(time.perf_counter() - began, 3),
                }
            )
        for path in staged:  # all of them, or none
            path.replace(self.options.out / path.name)
        return entries

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            content = parse_json((self.done / f"{self.keys[number]}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def _is_done(self, number: int) -> bool:
        """Tell whether a scan is predicted, or was set aside since this call began."""
        path = self.done / f"{self.keys[number]}.json"
        content = self._read(number)
        if content is None:
            return False
        with contextlib.suppress(OSError):
            new = self.keys[number] in self.fresh or path.stat().st_mtime >= self.began
            if self.options.overwrite or "reason" in content:
                return new
        return all((self.options.out / name).is_file() for entry in content.get("entries", ())
                   for name in entry["files"])  # fmt: skip

    def finish(self) -> Summary:
        """Write the tables over all scans, and say what became of them."""
        out, summary = self.options.out, Summary(rejected=list(self.inputs.rejected))
        entries: list[dict[str, Any]] = []
        for number in range(len(self.keys)):
            content = self._read(number) or {"reason": "its prediction was removed meanwhile"}
            if "reason" in content:
                summary.rejected.append((self.inputs.items[number].source, content["reason"]))
            else:
                entries += [{**entry, "source": content["source"]} for entry in content["entries"]]
        summary.predicted = len(entries)
        seen = self._trained_on(entries)
        about = {
            "models": [
                {"folder": str(folder), "digest": card["digest"], "record": card["record"]["key"]}
                for folder, card in zip(self.ensemble.folders, self.ensemble.cards, strict=True)
            ],
            "data": list(self.options.data),
            "task": self.ensemble.cards[0]["task"]["record"],
            "labels": {str(kind["value"]): kind["name"] for kind in self.ensemble.classes},
            "flip": self.options.flip,
            "predicted": summary.predicted,
            "set_aside": len(summary.rejected),
            "of_training_subjects": seen,
            "scans": [{key: entry.get(key, "") for key in SCAN} for entry in entries],
            "seconds": round(sum(entry["seconds"] for entry in entries), 3),
            "citations": self.ensemble.cards[0]["citations"],
            "versions": versions(),
        }
        try:
            summary.files = tables.write(out, entries, self.ensemble.kind, self.ensemble.classes)
            tables.write_rejected(out, summary.rejected)
            write_whole(out / "predict.json", json.dumps(about, indent=1) + "\n")
        except OSError as error:
            raise self._told(error) from error
        with contextlib.suppress(OSError):
            for lock in self.jobs.glob("*.lock"):  # of a process that was killed when its scan was done
                if locks.take(lock):
                    locks.release(lock)
            self.jobs.rmdir()
        if seen:
            _say(
                f"{count_of(seen, 'volume')} of {summary.predicted:,} are of subjects that a model was "
                "trained or chosen on: their predictions are better than those of other people"
            )
        return summary

    def _trained_on(self, entries: Sequence[dict[str, Any]]) -> int:
        known = {name for card in self.ensemble.cards for name in card["training"]["subjects"]}
        return sum(identity_hash(entry["dataset"], entry["subject"]) in known for entry in entries)


def _reason(error: Exception) -> str:
    if isinstance(error, Ssl3dError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "does not fit into memory"
    return " ".join(f"{type(error).__name__}: {error}".split())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
