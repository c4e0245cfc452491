"""Contestants of a frozen-encoder protocol: encoders, untrained ones of the same kind, trivial rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssl3d.api import (
    Contestant,
    device_of,
)
from ssl3d_benchmarks.contestants import (
    Entry,
    Loaded,
    described,
    given,
    pool_details,
    recalibrate,
    trivial_contestant,
    trivial_entries,
    untrained,
    with_norm,
)
from ssl3d_benchmarks.task import Fold, SplitData

if TYPE_CHECKING:
    from ssl3d_benchmarks.linear_probe.options import FrozenEncoderOptions


def contestants(options: FrozenEncoderOptions, loaded: Loaded | None = None) -> list[Entry]:
    """List the encoders, the untrained ones of each architecture, and the trivial rows.

    Raises:
        CheckpointError: An encoder cannot be loaded.
        UsageError: A name is given twice.
    """
    trained: list[Entry] = []
    beside: dict[str, list[Entry]] = {}
    for spec, encoder, entry in given(options.encoder, options.pool, loaded):
        scratch = spec.startswith("scratch:")
        if not scratch:
            trained += with_norm(entry, encoder, options.recalibrate)
        if entry.group not in beside:
            seeds = range(max(options.untrained, 1) if scratch else options.untrained)
            beside[entry.group] = [
                row
                for seed in seeds
                for row in with_norm(untrained(entry, seed, encoder), encoder, options.recalibrate)
            ]
    return trained + [entry for rows in beside.values() for entry in rows] + trivial_entries()


def build(entry: Entry, task: SplitData, fold: Fold, options: FrozenEncoderOptions) -> Contestant:
    """Build the contestant, with norm statistics of this fold's training volumes if asked for."""
    if entry.make is None:
        return trivial_contestant(entry, task.config.mask_classes if entry.name != "pooled voxels" else ())
    encoder = entry.make()
    details: dict[str, Any] = {"norm_recalibrated": entry.recalibrate, **pool_details(options.pool)}
    device = device_of(options.device)
    encoder.to(device).eval()
    if entry.recalibrate:
        recalibrate(encoder, task.data.select(fold.train), options.window, device)
    return described(entry, encoder, details)
