"""Linear probe: how much of a target a linear model reads off a frozen encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d_benchmarks import Words, words_of

if TYPE_CHECKING:
    from ssl3d.api import Result


def score(
    encoder: Words, data: Words = "phantoms", out: str | Path = "runs/linear-probe", **options: Any
) -> list[Result]:
    """Score frozen encoders by a linear model, as `ssl3d linear-probe` does.

    Args:
        encoder: Runs, encoder folders, `scratch:...` or `imagenet:...`.
        data: Stores, scans or phantoms[:N].
        out: Folder for the records, the table and the pictures.
        options: Options of the command, with underscores, as in `target="masks", untrained=3`.

    Returns:
        The records, in the order of the table.

    Raises:
        Ssl3dError: As the command does.
    """
    from ssl3d_benchmarks.linear_probe.options import LinearProbeOptions
    from ssl3d_benchmarks.linear_probe.run import run

    return [
        row.result
        for row in run(LinearProbeOptions(words_of(encoder), words_of(data), out=Path(out), **options))
    ]
