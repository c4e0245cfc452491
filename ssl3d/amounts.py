"""Amounts as people read them: durations, sizes, counts."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a duration in words, as in 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Return a number of bytes in words, as in 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def count_of(number: int, what: str) -> str:
    """Return a number of things in words, as in 2 scans."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
