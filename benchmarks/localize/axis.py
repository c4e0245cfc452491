"""The common body axis: profiles of slice scores, and where a volume lies on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ssl3d.api import DataError

FEWEST = 4
"""Slices that a crop must have to be placed."""

_ROUNDS = 3
"""Rounds of aligning the reference volumes with their own mean curve."""


@dataclass(frozen=True)
class Profile:
    """The scores along one volume, or along a part of it.

    Attributes:
        mm: Centres of the slabs along the axis, mm from the volume's first voxel, increasing.
        scores: Scores of the slabs.
    """

    mm: np.ndarray
    scores: np.ndarray

    @property
    def middle(self) -> float:
        """Position half way between the first and the last slab, mm."""
        return float(self.mm[0] + self.mm[-1]) / 2


@dataclass(frozen=True)
class Placement:
    """Place of a profile on the common axis.

    Attributes:
        offset: Position of the volume's first voxel on the common axis, in mm. A position is offset + mm,
            or offset - mm where flipped.
        flipped: Whether the volume's axis runs against the common one.
        misfit: Mean |score - reference score| at that place.
    """

    offset: float
    flipped: bool
    misfit: float

    def __call__(self, mm: np.ndarray) -> np.ndarray:
        """Return positions on the common axis, mm."""
        return self.offset - mm if self.flipped else self.offset + mm


@dataclass(frozen=True)
class Axis:
    """The common axis: the score to expect at every position.

    Attributes:
        mm: Positions, increasing, evenly spaced.
        scores: Expected scores, monotone.
    """

    mm: np.ndarray
    scores: np.ndarray

    def at(self, mm: np.ndarray) -> np.ndarray:
        """Interpolate the expected scores; beyond the ends, they are those of the ends."""
        return np.interp(mm, self.mm, self.scores)

    def place(self, profile: Profile, flips: bool = False) -> Placement:
        """Find the offset (and direction, with `flips`) whose expected scores are nearest, in the mean.

        Offsets are tried at every quarter of the axis' step, such that the profile's middle lies on it.
        """
        best: Placement | None = None
        step = (self.mm[1] - self.mm[0]) / 4
        middles = np.arange(self.mm[0], self.mm[-1] + step / 2, step)
        for flipped in (False, True) if flips else (False,):
            away = profile.mm - profile.middle
            expected = self.at(middles[:, None] + (-away if flipped else away))
            misfits = np.abs(expected - profile.scores).mean(axis=1)
            # Of equally good places (a flat end of the curve) the middle one.
            good = np.flatnonzero(misfits <= misfits.min() + 1e-12)
            chosen = int(good[len(good) // 2])
            offset = middles[chosen] + (profile.middle if flipped else -profile.middle)
            placement = Placement(float(offset), flipped, float(misfits[chosen]))
            if best is None or placement.misfit < best.misfit:
                best = placement
        assert best is not None
        return best


def common_axis(
    profiles: Sequence[Profile], flips: Sequence[bool] | None = None
) -> tuple[Axis, list[Placement]]:
    """Align reference profiles with one another, and fit a monotone curve (isotonic regression).

    The zero of the axis is where the middles of the profiles lie on average. `flips` says which of them
    may run against the axis.

    Raises:
        DataError: The scores do not change along the axis: nothing can be placed by them.
    """
    flips = [False] * len(profiles) if flips is None else flips
    # Where directions are unknown, one volume leads: a mean over both directions would be flat.
    longest = max(range(len(profiles)), key=lambda i: profiles[i].mm[-1] - profiles[i].mm[0])
    leaders = [longest] if any(flips) else range(len(profiles))
    placements = {i: Placement(-profiles[i].middle, False, 0.0) for i in leaders}
    axis = _fit([profiles[i] for i in placements], list(placements.values()))
    for _ in range(_ROUNDS):
        placed = [axis.place(profile, flip) for profile, flip in zip(profiles, flips)]
        shift = float(np.mean([where(np.array(p.middle)) for where, p in zip(placed, profiles)]))
        placed = [Placement(where.offset - shift, where.flipped, where.misfit) for where in placed]
        axis = _fit(profiles, placed)
    return axis, placed


def _fit(profiles: Sequence[Profile], placements: Sequence[Placement]) -> Axis:
    from sklearn.isotonic import IsotonicRegression

    mm = np.concatenate([where(profile.mm) for where, profile in zip(placements, profiles)])
    scores = np.concatenate([profile.scores for profile in profiles])
    step = float(np.median(np.concatenate([np.diff(profile.mm) for profile in profiles])))
    grid = np.arange(mm.min(), mm.max() + step / 2, step)
    rising = bool(np.mean((mm - mm.mean()) * (scores - scores.mean())) >= 0)
    fitted = IsotonicRegression(increasing=rising, out_of_bounds="clip").fit(mm, scores).predict(grid)
    if len(grid) < 2 or not np.ptp(fitted) > 1e-6 * max(1.0, float(np.abs(scores).max())):
        raise DataError("the scores do not change along the axis: the run has not learnt to sort this data")
    # Runs of equal values have no place of their own: lines between the middles of their runs.
    starts = np.flatnonzero(np.concatenate([[True], np.diff(fitted) != 0]))
    ends = np.concatenate([starts[1:], [len(fitted)]]) - 1
    return Axis(grid, np.interp(grid, (grid[starts] + grid[ends]) / 2, fitted[starts]))
