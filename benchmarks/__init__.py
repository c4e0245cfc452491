"""The built-in benchmarks: one package, one protocol; each is a function too, as `linear_probe.score`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Words = str | Path | Sequence[str | Path]


def words_of(given: Words) -> tuple[str, ...]:
    """Return one word or several as a tuple of strings."""
    return (str(given),) if isinstance(given, str | Path) else tuple(map(str, given))
