"""What a long job says: a bar on the terminal, numbers in words."""

from __future__ import annotations

import sys


class Progress:
    """A bar on the terminal; nothing elsewhere."""

    def __init__(self, total: int):
        self.total = total
        self.shown = sys.stderr.isatty() and total > 0
        self.last = 0.0

    def show(self, done: int, seconds: float) -> None:
        """Draws it, ten times a second at most."""
        if not self.shown or (seconds - self.last < 0.1 and done < self.total):
            return
        self.last = seconds
        filled = round(30 * done / self.total)
        left = duration_of(seconds / done * (self.total - done))
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r[{bar}] {done}/{self.total}  {left} left \x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes it off the terminal."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def count_of(number: int, what: str) -> str:
    """Such as "2 scans"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def bytes_of(size: float) -> str:
    """Such as "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def duration_of(seconds: float) -> str:
    """Such as "3 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
