"""Remarks of `prepare` on a whole store: what only shows when its scans are seen together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl3d.amounts import count_of
from ssl3d.json_files import parse_json

_BATCH = 4096  # records read at a time
_NAMED = 3


def left_out_lines(left_out: Sequence[tuple[str, str]]) -> list[str]:
    """Write the line that counts and names what was found and is not used.

    Args:
        left_out: (path, reason) of each file.
    """
    if not left_out:
        return []
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out:
        by_reason.setdefault(reason, []).append(path)
    most = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    parts = [f"{reason} ({len(paths):,}: {_few(paths)})" for reason, paths in most]
    return [f"found and not used: {count_of(len(left_out), 'file')}, see left_out.csv: {'; '.join(parts)}"]


def remarks(path: Path) -> list[str]:
    """Write lines about scans of a store that do not fit together.

    They tell of scans normalised in several ways, of channels that are missing or were taken voxel by
    voxel, of slices that are there twice, and of scans of two subjects that are the same.

    Args:
        path: File of the store.
    """
    import h5py

    kinds: dict[str, dict[str, list[str]]] = {}
    elsewhere: list[str] = []
    copied: dict[str, int] = {}
    lacking: dict[tuple[str, str], list[str]] = {}
    volumes: dict[str, int] = {}
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    alike: list[str] = []
    with h5py.File(path, "r", locking=False) as file:
        rows = file["index/table"][("provenance_at", "provenance_length")]
        for begin in range(0, len(rows), _BATCH):
            own = rows[begin : begin + _BATCH]
            start = int(own["provenance_at"].min())
            ends = own["provenance_at"] + own["provenance_length"]
            text = file["provenance"][start : int(ends.max())].tobytes()
            for at, end in zip(own["provenance_at"].tolist(), ends.tolist(), strict=True):
                record = parse_json(text[at - start : end - start])
                kind = record["done"].get("normalize", {}).get("kind")
                if kind is not None:
                    kinds.setdefault(record["dataset"], {}).setdefault(kind, []).append(record["source"])
                volumes[record["dataset"]] = volumes.get(record["dataset"], 0) + 1
                both = _same_voxels(record, seen)
                if both:
                    alike.append(both)
                for channel in record["done"].get("missing", ()):
                    lacking.setdefault((record["dataset"], channel), []).append(record["source"])
                if "voxel_by_voxel" in record["done"]:
                    elsewhere.append(record["source"])
                if copies := record["done"].get("copies"):
                    copied[record["id"]] = copies
    lines = [_mixed(dataset, of) for dataset, of in kinds.items() if len(of) > 1]
    for (dataset, channel), whose in lacking.items():
        all_of_them = len(whose) == volumes[dataset]
        lines.append(
            f"{dataset}: no scan has the channel {channel}, which is 0 everywhere; is the name right?"
            if all_of_them
            else f"{dataset}: {len(whose)} of {count_of(volumes[dataset], 'scan')} without the channel "
            f"{channel}, which is 0 there: {_few(whose)}"
        )
    if alike:
        lines.append(
            f"{count_of(len(alike), 'scan')} with the voxels of another subject's: {_few(alike)}; if they "
            "are of one person, name it in a column `subject` of a CSV, or training sees what is tested on"
        )
    if copied:
        lines.append(
            f"{count_of(sum(copied.values()), 'slice')} there twice, with the same pixels, and read once: "
            f"{_few([f'{count} of {name}' for name, count in copied.items()])}"
        )
    if elsewhere:
        lines.append(
            f"{count_of(len(elsewhere), 'scan')} with a channel that its header places elsewhere than the "
            f"first, taken voxel by voxel all the same: {_few(elsewhere)}"
        )
    return lines


def _same_voxels(record: dict[str, Any], seen: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Name this scan and an earlier one of another subject that looks the same, or ""; remember this one.

    Scans look the same where both hashes of the leak check are equal, which any linear change of the
    intensities leaves as they are.
    """
    reading = str(record.get("reading") or "")
    if not reading:
        return ""
    earlier = seen.setdefault((record["dataset"], reading), record)
    if str(earlier.get("subject") or "") == str(record.get("subject") or ""):
        return ""
    key = "id" if earlier["source"] == record["source"] else "source"  # DICOM series of one folder
    return f"{earlier[key]} = {record[key]}"


def _mixed(dataset: str, kinds: dict[str, list[str]]) -> str:
    """Tell a data set's kinds of normalisation, the most frequent first, with examples of the rest."""
    first, *rest = sorted(kinds, key=lambda kind: (-len(kinds[kind]), kind))
    rare = ", ".join(f"{len(kinds[kind])} as {kind} ({_few(kinds[kind])})" for kind in rest)
    # Hounsfield units are often taken for MR (cropped, resampled, shifted ones), hardly ever the other way.
    likely = "ct" if "ct" in kinds else first
    return (
        f"{dataset}: {count_of(len(kinds[first]), 'volume')} normalised as {first}, {rare}; if all are of "
        f"one kind, --normalize {likely} makes them alike"
    )


def _few(sources: list[str]) -> str:
    names = list(dict.fromkeys(sources))  # the frames of a file share its name
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
