"""Nearest neighbours: how the labels of similar training subjects predict those of test subjects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssl3d_benchmarks import Words, words_of

if TYPE_CHECKING:
    from ssl3d.api import Result


def score(
    encoder: Words, data: Words = "phantoms", out: str | Path = "runs/knn", **options: Any
) -> list[Result]:
    """Score frozen encoders by nearest neighbours, as `ssl3d knn` does.

    Arguments, records and errors are those of `linear_probe.score`.
    """
    from ssl3d_benchmarks.knn.command import KNNOptions
    from ssl3d_benchmarks.knn.protocol import KNN
    from ssl3d_benchmarks.linear_probe.run import run

    given = KNNOptions(words_of(encoder), words_of(data), out=Path(out), **options)
    return [row.result for row in run(given, KNN)]
