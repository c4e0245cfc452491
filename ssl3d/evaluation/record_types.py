"""Types of what a record holds: the parts that tables and reports read, checked before they read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ssl3d.errors import DataError

DEEPEST = 32
"""Most levels that a record may be nested."""
LARGEST = 1e30
"""Bound of every number: no FLOPs, bytes or seconds come near, and no chart has ticks beyond."""

Kinds = str | tuple[str, ...]
_NESTS = (dict, list, tuple)

OBJECT, LIST, WORD, WORDS = "an object", "a list", "a text", "a list of texts"
NUMBER, NUMBERS, COUNT, FLAG = "a number", "a list of numbers", "a whole number", "a flag"

PARTS: Mapping[str, Kinds] = {
    "version": COUNT,
    "fraction": NUMBER,
    "repeat": COUNT,
    "seed": COUNT,
    "contestant.name": WORD,
    "contestant.kind": WORD,
    "contestant.digest": WORD,
    "contestant.group": WORD,
    "contestant.source": WORD,
    "contestant.pool": WORD,
    "contestant.architecture": OBJECT,
    "contestant.norm_recalibrated": FLAG,
    "contestant.saw_labels": FLAG,
    "contestant.mask_classes": LIST,
    "contestant.identities_seen": COUNT,
    "contestant.pretraining": OBJECT,
    "contestant.pretraining.proxies": OBJECT,
    "contestant.pretraining.steps": COUNT,
    "contestant.pretraining.seconds": NUMBER,
    "contestant.pretraining.flops": NUMBER,
    "contestant.pretraining.compute": OBJECT,
    "contestant.pretraining.compute.flops": NUMBER,
    "contestant.pretraining.compute.flops_per_step": NUMBER,
    "contestant.pretraining.compute.flops_between_epochs": NUMBER,
    "contestant.pretraining.compute.seconds": NUMBER,
    "contestant.pretraining.compute.peak_memory": NUMBER,
    "contestant.pretraining.data": OBJECT,
    "contestant.pretraining.data.volumes": NUMBER,
    "contestant.pretraining.data.datasets": (WORDS, OBJECT),
    "contestant.pretraining.data.modalities": OBJECT,
    "contestant.pretraining.init": OBJECT,
    "contestant.pretraining.init.from": WORD,
    "dataset": (WORD, WORDS),
    "settings.rates": NUMBERS,
    "settings.task": OBJECT,
    "settings.task.sparse_slices": COUNT,
    "settings.training": OBJECT,
    "split.how": WORD,
    "split.folds": COUNT,
    **{
        f"split.{part}.{count}": COUNT
        for part in ("train", "val", "test")
        for count in ("subjects", "of_subjects", "volumes")
    },
    "compute.details": (LIST, OBJECT),
    "flags.seen_test_subjects": COUNT,
    "flags.seen_test_volumes": COUNT,
    "flags.saw_labels": FLAG,
    "flags.ranked": FLAG,
    "flags.warnings": WORDS,
}
"""Type of each part that may be missing or null, by its place in the record."""


def check_parts(content: Mapping[str, Any], where: str) -> None:
    """Check the types of the parts of a record, and that any file can hold its texts.

    Raises:
        DataError: A part is of another type, the record is nested too deeply, or a text in it is no text.
    """
    if _deeper(content, DEEPEST):
        raise DataError(f"{where}: not a result record: it is nested deeper than {DEEPEST} levels")
    for part, value in content["split"].items():
        if part in ("train", "val", "test") and not isinstance(value, Mapping):
            raise DataError(f"{where}: split.{part} is {_short(value)}, expected {OBJECT}")
    for place, kinds in PARTS.items():
        value = _at(content, place)
        if value not in (None, "") and not any(_is(value, kind) for kind in _several(kinds)):
            said = " or ".join(_several(kinds))
            raise DataError(f"{where}: {place} is {_short(value)}, expected {said}")
    for part, kind in (("scores", NUMBER), ("versions", WORD)):
        for name, value in content[part].items():
            if not _undefined(value) and not _is(value, kind):
                raise DataError(f"{where}: {part}.{name} is {_short(value)}, expected {kind}")
    for name, ends in content["intervals"].items():
        known = ends if isinstance(ends, list | tuple) else ()
        if len(known) != 2 or not all(_undefined(end) or _is(end, NUMBER) for end in known):
            raise DataError(f"{where}: interval of {name} is {_short(ends)}, expected [low, high]")
    for row in content["predictions"]:
        if not (
            isinstance(row, dict)
            and isinstance(row.get("dataset"), str)
            and isinstance(row.get("subject"), str)
        ):
            raise DataError(f"{where}: a prediction without dataset and subject")
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        odd = _short(error.object[error.start])
        raise DataError(f"{where}: it holds {odd}, which is no text in Unicode") from error


def _undefined(value: Any) -> bool:
    """Return whether a score or an end is null, or NaN as it is before it is written."""
    return value is None or value != value


def _at(content: Any, place: str) -> Any:
    for key in place.split("."):
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _several(kinds: Kinds) -> tuple[str, ...]:
    return (kinds,) if isinstance(kinds, str) else kinds


def _is(value: Any, kind: str) -> bool:
    if kind in (WORDS, NUMBERS):
        inner = WORD if kind == WORDS else NUMBER
        return isinstance(value, list | tuple) and all(_is(item, inner) for item in value)
    if kind in (NUMBER, COUNT):
        # NaN is not below; whole numbers of any size are compared exactly.
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
        return number and (kind == NUMBER or float(value).is_integer())
    types: dict[str, Any] = {OBJECT: Mapping, LIST: list | tuple, WORD: str, FLAG: bool | int}
    return isinstance(value, types[kind])


def _deeper(value: Any, levels: int) -> bool:
    nested = [value]
    for _ in range(levels):
        nested = [
            item
            for outer in nested
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, _NESTS)
        ]
    return bool(nested)


def _short(value: Any) -> str:
    words = ascii(value)
    return words if len(words) <= 40 else words[:37] + "..."
