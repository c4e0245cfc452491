"""Intensities: which normalisation a scan needs, what is foreground in it, and the normalisation itself.

All of it happens in single precision, before anything is cast to half: raw MR values can exceed what
half precision holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl3d.data.scans.found import MODALITIES

KINDS = ("ct", "mr", "unit", "none")
CT_WINDOW = (-1000.0, 1000.0)  # HU: air to dense bone

_CLIP = (0.5, 99.5)  # percentiles of the foreground
_LOWEST_HU = -5000.0  # air is -1000; what surrounds a scanner's circle is -1024 to -3024, or far below


def decide(voxels: np.ndarray, modality: str, eight_bit: bool) -> str:
    """Decide the normalisation of `auto`: by the header's modality, else by the values.

    Args:
        voxels: (C, ...).
        modality: DICOM code, or "".
        eight_bit: Whether the source held unsigned bytes.

    Returns:
        "ct", "mr" or "unit". Without a modality: bytes and shape masks are "unit"; whole numbers that reach
        from air (-500 or less) to tissue (above -200) are "ct", and so are fractions whose floor is air
        (about -1000), as interpolated CT has them; the rest is "mr". One value far below air, as is set
        where a scanner's circle ends, counts for nothing.
    """
    if modality in MODALITIES:
        return MODALITIES[modality]
    if eight_bit:
        return "unit"
    sample = voxels.reshape(-1)[:: max(1, voxels.size // 1_000_000)]
    low, high = float(sample.min()), float(sample.max())
    if not ((sample != low) & (sample != high)).any():
        return "unit"
    if low <= _LOWEST_HU:
        sample = sample[sample != low]
        low = float(sample.min())
    if not (_LOWEST_HU < low <= -500 and -200 < high < 70_000):
        return "mr"
    if np.array_equal(sample, np.rint(sample)):
        return "ct"
    # A scan without its mean has fractions below zero too, but nothing keeps them from falling below air.
    around = sample[sample > low] if low < -1500 else sample
    return "ct" if abs(float(np.percentile(around, 2)) + 1000) < 100 else "mr"


def foreground(voxels: np.ndarray, kind: str, ignored: np.ndarray | None = None) -> np.ndarray:
    """Mark where there is something to see: body, head, organ; cavities inside it included.

    A tenth of the way from the darkest to the brightest (99.5th percentile) separates air and its noise
    from tissue and keeps nearly all of a volume that lies inside the body; CT has its own scale (-500 HU).
    Holes are filled in every axial slice, so lungs and ventricles count.

    Args:
        voxels: (C, D, H, W), before normalisation.
        kind: Normalisation: ct, mr, unit or none.
        ignored: (D, H, W), boolean: voxels that are no foreground and have no say.

    Returns:
        (D, H, W), boolean; where nothing stands out, all that is not ignored.
    """
    from scipy import ndimage

    # A coarse copy decides: holes are filled ten times faster, and crops need no more.
    steps = [max(1, round(n / 128)) for n in voxels.shape[1:]]
    coarse = voxels[:, :: steps[0], :: steps[1], :: steps[2]]
    body: np.ndarray = np.zeros(coarse.shape[1:], dtype=bool)
    counted = _counted(ignored)
    coarsely = None if counted is None else counted[:: steps[0], :: steps[1], :: steps[2]]
    for channel in coarse:
        seen = channel if coarsely is None else channel[coarsely]
        if not seen.size:
            continue
        low = float(seen.min())
        level = -500.0 if kind == "ct" else low + 0.1 * (float(np.percentile(seen, 99.5)) - low)
        body |= channel > level
    if coarsely is not None:  # nor do they close a hole
        body &= coarsely
    if body.shape[1] > 2 and body.shape[2] > 2:
        body = np.stack([ndimage.binary_fill_holes(layer) for layer in body])
    if not body.any():
        body[:] = True
    for axis, step in enumerate(steps):
        body = np.repeat(body, step, axis=axis)
    body = body[tuple(slice(n) for n in voxels.shape[1:])]
    return body if counted is None else body & counted


def normalize(
    voxels: np.ndarray,
    kind: str,
    inside: np.ndarray,
    window: Sequence[float] | None = None,
    eight_bit: bool = False,
    missing: Sequence[int] = (),
    in_place: bool = False,
    ignored: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Bring intensities to a common scale, and say how.

    `ct` clips to the window (HU) and scales it to 0..1. `mr` clips to the 0.5th and 99.5th percentiles
    of the foreground and z-scores with the foreground's mean and deviation, channel by channel. `unit`
    scales bytes by 255, a mask of 0 and 1 by nothing, anything else from its 0.5th to its 99.5th
    percentile, to 0..1; a window replaces the percentiles. `none` leaves the values.

    Args:
        voxels: (C, D, H, W).
        kind: Normalisation: ct, mr, unit or none.
        inside: (D, H, W), the foreground.
        window: Lowest and highest value, of `ct` and `unit`; of `mr` instead of the percentiles.
        eight_bit: Whether the source held unsigned bytes.
        missing: Channels that the subject lacks; they stay 0.
        in_place: Whether `voxels`, then float32, may be overwritten: a large scan is not held twice.
        ignored: (D, H, W), boolean: voxels that are brought to the scale of the others without a say in it.

    Returns:
        (C, D, H, W) float32, and what was done: `kind`, `clip` per channel, `mean` and `std` of `mr`,
        `background`: the value of air per channel, with which crops are filled beyond the volume.
    """
    result: np.ndarray = voxels.astype(np.float32, copy=not in_place)
    clips: list[list[float]] = []
    means: list[float] = []
    deviations: list[float] = []
    background: list[float] = []
    counted = _counted(ignored)
    for index, channel in enumerate(result):
        if index in missing:
            clips.append([0.0, 0.0])
            means.append(0.0)
            deviations.append(1.0)
            background.append(0.0)
            continue
        if kind == "none":
            background.append(float(channel.min() if counted is None else channel[counted].min()))
            continue
        seen, within = (channel, inside) if counted is None else (channel[counted], inside[counted])
        low, high = window if window else _limits(seen, kind, within, eight_bit)
        clips.append([float(low), float(high)])
        air = float(np.clip(_air(seen, within), low, high))
        np.clip(channel, low, high, out=channel)
        if kind == "mr":
            mean, deviation = _moments(channel, inside)
            deviation = deviation or 1.0
            means.append(mean)
            deviations.append(deviation)
        else:
            mean, deviation = float(low), float(high - low) or 1.0
        channel -= mean
        channel /= deviation
        background.append((air - mean) / deviation)
    done: dict[str, Any] = {"kind": kind, "background": background}
    if clips:
        done["clip"] = clips
    if means:
        done["mean"], done["std"] = means, deviations
    return result, done


def _counted(ignored: np.ndarray | None) -> np.ndarray | None:
    """Mark the voxels that have a say; None where all have."""
    return None if ignored is None else ~ignored


def _limits(channel: np.ndarray, kind: str, inside: np.ndarray, eight_bit: bool) -> tuple[float, float]:
    if kind == "ct":
        return CT_WINDOW
    if kind == "unit":
        top = float(channel.max())
        if eight_bit:
            return 0.0, 1.0 if top <= 1 else 255.0
    step = max(1, channel.size // 4_000_000)
    sample = channel.reshape(-1)[::step]
    if kind != "unit":
        chosen = inside.reshape(-1)[::step]
        sample = sample[chosen] if chosen.any() else sample
    low, high = (float(v) for v in np.percentile(sample, _CLIP))
    if high <= low:  # nearly all voxels are alike: a shape mask, a lone bright spot
        low, high = float(channel.min()), float(channel.max())
    return low, high


def _moments(channel: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Compute mean and deviation of the foreground in double precision, layer by layer to save memory."""
    count = int(inside.sum())
    if not count:
        inside, count = np.ones_like(inside), inside.size
    total = sum(float(layer[m].sum(dtype=np.float64)) for layer, m in zip(channel, inside, strict=True))
    mean = total / count
    squares = 0.0
    for layer, m in zip(channel, inside, strict=True):
        squares += float(((layer[m].astype(np.float64) - mean) ** 2).sum())
    return mean, float(np.sqrt(squares / count))


def _air(channel: np.ndarray, inside: np.ndarray) -> float:
    """Estimate the value around the body: the median outside the foreground, else the darkest value."""
    step = max(1, channel.size // 1_000_000)
    sample = channel.reshape(-1)[::step]
    around = sample[~inside.reshape(-1)[::step]]
    if around.size < max(8, sample.size // 1000):
        return float(channel.min())
    return float(np.median(around))
