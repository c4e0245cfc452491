"""Records as people compare them: a table for each task, its contestants by their mean over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ssl3d.amounts import count_of

if TYPE_CHECKING:
    from ssl3d.evaluation.records import Result


def tables_of(records: Iterable[Result]) -> list[list[Result]]:
    """Group records that can be compared, those trained with all labels before those with few.

    Args:
        records: Records of any tasks.
    """
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for record in records:
        about = (record.task, record.version, datasets_of(record), record.split_digest)
        amount = (-record.fraction, -(annotated_slices(record) or math.inf))
        groups.setdefault((*about, *amount), []).append(record)
    return [
        same for _, same in sorted(groups.items(), key=lambda item: (*map(str, item[0][:4]), item[0][4:]))
    ]


def describe_table(records: Sequence[Result]) -> dict[str, Any]:
    """Describe the records of a table in plain values, its contestants with the best first."""
    first = records[0]
    by_name: dict[tuple[str, int], list[Result]] = {}
    for record, number in zip(records, settings_numbers(records), strict=True):
        by_name.setdefault((str(record.contestant["name"]), number), []).append(record)
    rows = [_row(*about, same) for about, same in by_name.items()]
    main = first.main
    rows.sort(key=lambda row: -row["scores"][main] if math.isfinite(row["scores"][main]) else math.inf)
    return {
        "title": title_of(first),
        "task": first.task,
        "version": first.version,
        "datasets": list(datasets_of(first)),
        "main": main,
        "fraction": first.fraction,
        "annotated_slices": annotated_slices(first),
        "test_subjects": first.split.get("test", {}).get("subjects"),
        "rows": rows,
    }


def title_of(record: Result) -> str:
    """Return the heading of a record's table, in the words of the report."""
    slices, train = annotated_slices(record), record.split.get("train", {})
    sparse = f", {slices} annotated slice{'s' * (slices > 1)} a volume" if slices else ""
    few = ""
    if record.fraction != 1:
        some, total = train.get("subjects"), train.get("of_subjects")
        few = f", {some} of {total} training subjects" if total else (
            f", {record.fraction:g} of the training subjects"
        )  # fmt: skip
    return f"{', '.join(datasets_of(record))}: {record.task.replace('/', ', ')}{sparse}{few}"


def kind_words(kind: str, task: str, settings: int = 0) -> str:
    """Say what a row is that is no pretrained network, and which of its contestant's settings it has.

    Args:
        kind: Kind of the contestant.
        task: Task of the record.
        settings: Number of the settings, 0 where there is nothing to tell apart.
    """
    words = {"trivial": "no network"}
    words["untrained"] = "from scratch" if task.startswith("finetune") else "untrained"
    parts = [words.get(kind, ""), f"settings {settings}" if settings else ""]
    return ", ".join(part for part in parts if part)


def datasets_of(record: Result) -> tuple[str, ...]:
    """Return the names of the data sets of a record."""
    names: Any = record.dataset
    return (names,) if isinstance(names, str) else tuple(map(str, names))


def annotated_slices(record: Result) -> int:
    """Return the number of annotated slices per volume that were trained on; 0 for all."""
    task = record.settings.get("task")
    return int(task.get("sparse_slices") or 0) if isinstance(task, dict) else 0


def seen_test_subjects(record: Result) -> int:
    """Return how many test subjects pretraining saw: with any, a record is not ranked."""
    return int(record.flags.get("seen_test_subjects") or 0)


def leak_words(seen: int) -> str:
    """Say that the pretraining of a row saw test subjects; nothing where it saw none."""
    return f"saw {count_of(seen, 'test subject')}: not ranked" if seen else ""


def settings_numbers(records: Sequence[Result]) -> list[int]:
    """Number the settings of each contestant that was trained by several; 0 where it has the same in all.

    Scores of different settings are no seeds of one another, and have no mean.
    """
    kinds: dict[str, dict[str, int]] = {}
    keys = [json.dumps(record.settings, sort_keys=True, default=str) for record in records]
    for record, key in zip(records, keys, strict=True):
        own = kinds.setdefault(str(record.contestant["name"]), {})
        own.setdefault(key, len(own) + 1)
    several = [kinds[str(record.contestant["name"])] for record in records]
    return [own[key] if len(own) > 1 else 0 for own, key in zip(several, keys, strict=True)]


def _row(name: str, settings: int, records: Sequence[Result]) -> dict[str, Any]:
    from ssl3d.evaluation.statistics import bounds_of, class_support, why_no_interval

    names = dict.fromkeys(score for record in records for score in record.scores)
    scores = {
        score: sum(record.scores.get(score, math.nan) for record in records) / len(records)
        for score in names
    }
    # Older records have intervals of classes with too few test subjects, and of scores at a bound.
    sure = len(records) == 1 and not why_no_interval(class_support(records[0].predictions), 0.0)
    ends = records[0].intervals if sure else {}
    return {
        "contestant": name,
        "settings": settings,
        "kind": records[0].contestant["kind"],
        "records": len(records),
        "seen_test_subjects": max(map(seen_test_subjects, records)),
        "scores": scores,
        "intervals": {
            score: list(own)
            for score, own in ends.items()
            if own[0] != own[1] or own[0] not in bounds_of(score)
        },
    }
