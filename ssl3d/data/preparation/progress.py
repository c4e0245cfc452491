"""The bar that a long job shows on the terminal."""

from __future__ import annotations

import sys

from ssl3d.amounts import duration


class Progress:
    """A bar on the terminal, and nothing elsewhere.

    Args:
        total: Number of steps.
    """

    def __init__(self, total: int):
        self.total = total
        self.shown = sys.stderr.isatty() and total > 0
        self.last = 0.0

    def show(self, done: int, seconds: float) -> None:
        """Draw the bar, ten times a second at most."""
        if not self.shown or (seconds - self.last < 0.1 and done < self.total):
            return
        self.last = seconds
        filled = round(30 * done / self.total)
        left = duration(seconds / done * (self.total - done))
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r[{bar}] {done}/{self.total}  {left} left \x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the bar off the terminal."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
