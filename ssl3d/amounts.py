"""Amounts as people read them: durations, sizes, counts."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a duration in words.

    Example:
        >>> duration(45), duration(720), duration(12000)
        ('45 s', '12 min', '3 h 20 min')
    """
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Return a number of bytes in words.

    Example:
        >>> size(512), size(1.2e9)
        ('512 B', '1.2 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def count_of(number: int, thing: str) -> str:
    """Return a number of things in words.

    Example:
        >>> count_of(1, "scan"), count_of(1200, "scan")
        ('1 scan', '1,200 scans')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
