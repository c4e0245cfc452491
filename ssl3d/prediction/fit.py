"""Whether a scan is what models were trained on: prepared alike, resampled where it must be, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssl3d.data.geometry import UNKNOWN, Triple
from ssl3d.data.open import kept_options
from ssl3d.data.preparation.options import PrepareOptions
from ssl3d.errors import DataError, UsageError

SLACK = 1.1
"""Factor by which a spacing may lie beyond those of the training data before a scan is resampled."""


@dataclass(frozen=True)
class Needs:
    """What models need of a scan, from what they were trained on.

    Attributes:
        options: Options of `ssl3d prepare` that made the training data.
        fixed: Spacing (D, H, W) in mm to which those were resampled; None where each kept its own.
        low: Lowest spacing of the training data.
        high: Highest spacing of the training data.
        median: Median spacing of the training data.
        channels: Number of channels.
        names: Names of the channels, in every order met.
        orientations: Orientations met.
        kinds: Kinds of normalisation met.
    """

    options: Mapping[str, Any]
    fixed: Triple | None
    low: Triple
    high: Triple
    median: Triple
    channels: int
    names: tuple[tuple[str, ...], ...]
    orientations: frozenset[str]
    kinds: frozenset[str]

    @property
    def placed(self) -> bool:
        """Whether the training data said where their voxels lie."""
        return self.orientations != {UNKNOWN}

    def spacing(self, own: Triple | None) -> Triple | None:
        """Return the spacing to which a scan is resampled; None where it keeps its own.

        A scan far from the training data's spacings is brought to their median.

        Args:
            own: Spacing (D, H, W) in mm of the scan; None where its file has none.

        Raises:
            DataError: The scan has no spacing, and the training data had.
        """
        if not self.placed:
            return self.fixed
        if own is None:
            raise DataError(
                "its file has no spacing, and the model was trained on scans of "
                f"{_mm(self.low)} to {_mm(self.high)} mm; save it as NIfTI with its spacing"
            )
        if self.fixed is not None:
            return self.fixed
        return None if self.near(own) else self.median

    def near(self, spacing: Sequence[float]) -> bool:
        """Tell whether a spacing is among those of the training data, with some slack."""
        triples = zip(self.low, spacing, self.high, strict=True)
        return all(low / SLACK <= side <= high * SLACK for low, side, high in triples)

    def kind(self, guessed: str) -> str:
        """Return the normalisation of a scan that does not tell its modality, given a guess by its values.

        Bytes and other numbers without a unit (mr, unit) are taken for what the training data were; HU are
        not, nor are others taken for HU.
        """
        unitless = {"mr", "unit"}
        if len(self.kinds) == 1 and guessed in unitless and self.kinds <= unitless:
            return next(iter(self.kinds))
        return guessed

    def check(self, volume: Any, normalize: str = "auto") -> None:
        """Refuse a prepared volume that is not what the models were trained on.

        Args:
            volume: Volume of a store.
            normalize: Normalisation that was asked for.

        Raises:
            DataError: Channels, orientation, spacing or normalisation differ; the message says how.
        """
        record = volume.record
        if volume.shape[0] != self.channels:
            wanted = " or ".join("+".join(names) for names in self.names)
            raise DataError(
                f"it has {_channels(volume.shape[0])} ({'+'.join(record.channels)}); the model takes "
                f"{self.channels} ({wanted})"
            )
        same = [names for names in self.names if sorted(names) == sorted(record.channels)]
        if same and tuple(record.channels) not in same:
            raise DataError(
                f"its channels are in another order ({' '.join(record.channels)}) than the model's "
                f"({' '.join(same[0])})"
            )
        if volume.orientation not in self.orientations:
            raise DataError(
                f"its orientation is {volume.orientation}; the model was trained on scans whose "
                f"orientation is {', '.join(sorted(self.orientations))}"
            )
        if self.placed and not self.near(volume.spacing):
            raise DataError(
                f"its voxels are {_mm(volume.spacing)} mm; the model was trained on {_mm(self.low)} to "
                f"{_mm(self.high)} mm; give the scan itself, which is resampled"
            )
        kind = str((record.done.get("normalize") or {}).get("kind", ""))
        if kind not in self.kinds and normalize == "auto":
            raise DataError(
                f"it was normalised as {kind or 'nothing'}; the model was trained on scans normalised as "
                f"{', '.join(kind or 'nothing' for kind in sorted(self.kinds))}; if it is such a scan, say "
                "--normalize"
            )


def needs_of(cards: Sequence[Mapping[str, Any]]) -> Needs:
    """Return what the models of an ensemble need of a scan.

    Raises:
        UsageError: Their training data were prepared in several ways.
    """
    recipes: list[dict[str, Any]] = []
    for card in cards:
        for settings in card["preprocessing"]:
            given = settings.get("options")
            if isinstance(given, dict):
                in_channels = card["architecture"]["config"]["in_channels"]
                own = kept_options(given, settings.get("spacing"), in_channels)
                own |= {"channels": tuple(given["channels"])} if given.get("channels") else {}
                if own not in recipes:
                    recipes.append(own)
    if len(recipes) > 1:
        raise UsageError(
            f"the models' training data were prepared in {len(recipes)} ways ({recipes[0]}, {recipes[1]}): "
            "make a store of the scans with `ssl3d prepare` and give it to --data"
        )
    options = recipes[0] if recipes else {}
    spacing = options.pop("spacing", None)
    sides = [card["spacing"] for card in cards]
    fixed = tuple(map(float, spacing)) if isinstance(spacing, list | tuple) else None
    return Needs(
        options=options,
        fixed=fixed,  # type: ignore[arg-type]
        low=_triple(np.min([own["low"] for own in sides], axis=0)),
        high=_triple(np.max([own["high"] for own in sides], axis=0)),
        median=_triple(sides[0]["median"]),
        channels=int(cards[0]["architecture"]["config"]["in_channels"]),
        names=tuple(dict.fromkeys(tuple(names) for card in cards for names in card["channels"])),
        orientations=frozenset(name for card in cards for name in card["orientations"]),
        kinds=frozenset(name for card in cards for name in card["normalize"]),
    )


def prepare_options(needs: Needs, sources: Sequence[str], normalize: str) -> PrepareOptions:
    """Return the options that prepare scans as the training data were."""
    own = dict(needs.options)
    if normalize != "auto":
        own["normalize"] = normalize
    return PrepareOptions(sources=tuple(sources), **own)


def _triple(values: Any) -> Triple:
    d, h, w = (float(value) for value in values)
    return d, h, w


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{side:.4g}" for side in spacing)


def _channels(count: int) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"
