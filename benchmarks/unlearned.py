"""The check whether a trained network beats what needs no training: a broken recipe is no result."""

from __future__ import annotations

import numpy as np

from ssl3d.api import statistics

LEAST = 0.01
"""Smallest gain over the floor that counts as one."""


def unlearned(
    name: str, runs: statistics.Runs, floor: statistics.Runs | float, floor_name: str, main: str
) -> str:
    """Return a sentence where a network is not clearly above its floor, else an empty one.

    Args:
        name: Name of the network's row.
        runs: Main score of the network over subjects, seeds and subsets.
        floor: Main score of a row without a network, on the same subsets; or the score of guessing.
        floor_name: Name of that row, or the word for guessing.
        main: Name of the main score, higher being better.
    """
    # A warning is no claim: it is given from an interval that would be too narrow to be printed, too.
    runs = runs._replace(support={})
    if isinstance(floor, float):
        own = statistics.nested_interval(runs)
        value, low, high, level = own.value - floor, own.low - floor, own.high - floor, floor
    else:
        # A row without a network is the same for every seed: nothing of it is luck of a seed.
        seeds = len(runs.each)
        each, drawn = floor.each[:1].repeat(seeds, 0), floor.drawn[:1].repeat(seeds, 0)
        floor = floor._replace(each=each, drawn=drawn, support={})
        gain = statistics.paired_difference(runs, floor, runs.each.shape == floor.each.shape)
        value, low, high, level = gain.value, gain.low, gain.high, floor.value
    if value >= LEAST and not low <= 0:  # one test subject has no interval
        return ""
    words = f"{name} ended at {main} {runs.value:.3f}"
    if not value >= LEAST:
        beside = f"only {value:+.3f} above" if value > 0 else "no better than"
        return (
            f"{words}, {beside} {floor_name} ({level:.3f}): it has not learned its task, and no conclusion "
            "can be drawn; train it longer (--steps or --epochs), or look for a fault in recipe and data"
        )
    between = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]" if np.isfinite(low) else f"{value:+.3f}"
    return (
        f"{words}, not clearly above {floor_name} ({level:.3f}; {between}): it is not shown to have "
        "learned its task, and no conclusion can be drawn"
    )


def floor_words(floor: str | float) -> str:
    """Return the name of a floor in a sentence."""
    return floor if isinstance(floor, str) else "guessing"
