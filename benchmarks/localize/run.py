"""Places volumes and partial crops on the axis that a sorting proxy has learnt."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ssl3d.api import (
    DataError,
    UsageError,
    device_of,
    house_split,
    identity_hash,
    load_proxies,
    numpy_rng,
    open_data_for,
    print_table,
    whole_file,
    write_whole,
)
from ssl3d_benchmarks.localize.axis import FEWEST, Axis, Placement, Profile, common_axis
from ssl3d_benchmarks.task import show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.api import Collection, Proxy, Volume
    from ssl3d_benchmarks.localize.options import LocalizeOptions


# Measuring ----------------------------------------------------------------------------------------


@dataclass
class Row:
    """One placed volume or crop; lengths in mm on the common axis unless said otherwise.

    Attributes:
        volume: Id of the volume.
        dataset: Name of the data set.
        subject: Name of the subject.
        kind: volume or crop.
        first_slice: First slice that was scored, counted in the volume.
        last_slice: Last slice that was scored.
        spacing: Distance between slices, mm.
        first: Position of the first slice.
        last: Position of the last slice.
        flipped: Whether the volume runs against the axis.
        misfit: Mean |score - expected score|.
        tau: Kendall's tau between position and score, in the direction of the axis.
        inside: Share of slices whose score the reference curve reaches.
        error: Error of a crop: mean |position - position when the whole volume is placed|.
        error_slices: The same error in slices.
        centre_error: The same error if the crop is put into the middle of its volume, unseen.
        frame_error: Mean |position - mm from the middle of the volume| of a crop, which needs no network
            and includes how differently the volumes are cut.
    """

    volume: str
    dataset: str
    subject: str
    kind: str
    first_slice: int
    last_slice: int
    spacing: float
    first: float
    last: float
    flipped: bool
    misfit: float
    tau: float
    inside: float
    error: float | None = None
    error_slices: float | None = None
    centre_error: float | None = None
    frame_error: float | None = None


def place_volume(
    proxy: Any, volume: Volume, axis: Axis, crops: int, share: tuple[float, float], seed: int
) -> tuple[list[Row], Profile, Placement]:
    """Place a volume, then `crops` random parts of it as if nothing else had been scanned.

    Returns:
        A row for the volume and one per crop; the volume's profile and placement.

    Raises:
        DataError: The volume is too short.
    """
    profile, flips = _profile(proxy, volume), _may_flip(proxy, volume)
    whole = axis.place(profile, flips)
    rows = [_row("volume", proxy, volume, profile, whole, axis)]
    spacing, slab = _spacing(proxy, volume), int(proxy.config.slab)
    first = round(profile.mm[0] / spacing - (slab - 1) / 2)
    count = len(profile.mm) + slab - 1  # slices
    rng = numpy_rng("localize", seed, volume.dataset, volume.id)
    for _ in range(crops):
        length = round(rng.uniform(*share) * count)
        length = min(count, max(length, FEWEST + slab - 1))
        start = first + int(rng.integers(count - length + 1))
        part = _profile(proxy, volume, start, start + length)
        where = axis.place(part, flips)
        row = _row("crop", proxy, volume, part, where, axis)
        error = float(np.abs(where(part.mm) - whole(part.mm)).mean())
        row.error, row.error_slices = error, error / spacing
        row.centre_error = abs(part.middle - profile.middle)
        away = part.mm - profile.middle
        row.frame_error = float(np.abs(where(part.mm) - (-away if whole.flipped else away)).mean())
        rows.append(row)
    return rows, profile, whole


def _row(kind: str, proxy: Any, volume: Volume, profile: Profile, where: Placement, axis: Axis) -> Row:
    from scipy.stats import kendalltau

    mm = where(profile.mm)
    low, high = axis.scores.min(), axis.scores.max()
    rising = np.sign(axis.scores[-1] - axis.scores[0])
    tau = kendalltau(mm, rising * profile.scores).statistic
    spacing, half = _spacing(proxy, volume), (int(proxy.config.slab) - 1) / 2
    return Row(
        volume.id,
        volume.dataset,
        volume.subject,
        kind,
        round(profile.mm[0] / spacing - half),
        round(profile.mm[-1] / spacing + half),
        spacing,
        float(mm[0]),
        float(mm[-1]),
        where.flipped,
        where.misfit,
        0.0 if np.isnan(tau) else float(tau),
        float(np.mean((profile.scores >= low) & (profile.scores <= high))),
    )


def _profile(proxy: Any, volume: Volume, start: int | None = None, stop: int | None = None) -> Profile:
    positions, scores = proxy.profile(volume, start, stop)
    if len(positions) < FEWEST:
        raise DataError(
            f"{volume.id} has {len(positions)} slices along {proxy.config.axis}, but {FEWEST} are "
            "needed to place it"
        )
    return Profile(positions * _spacing(proxy, volume), scores)


def _spacing(proxy: Any, volume: Volume) -> float:
    return float(volume.spacing["DHW".index(proxy.config.axis)])


def _may_flip(proxy: Any, volume: Volume) -> bool:
    direction = proxy.config.direction
    return direction == "either" or (direction == "auto" and volume.orientation == "unknown")


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Count volumes and crops, and compute median and 90th percentile of the errors of crops."""
    crops = [row for row in rows if row.kind == "crop"]
    whole = [row for row in rows if row.kind == "volume"]
    summary: dict[str, Any] = {
        "volumes": len(whole),
        "subjects": len({(row.dataset, row.subject) for row in whole}),
        "crops": len(crops),
        "tau": float(np.median([row.tau for row in whole])),
        "inside": float(np.mean([row.inside for row in whole])),
    }
    for name in ("error", "error_slices", "centre_error", "frame_error"):
        values = [getattr(row, name) for row in crops]
        if values:
            summary[name] = {"median": float(np.median(values)), "p90": float(np.percentile(values, 90))}
    return summary


# The command --------------------------------------------------------------------------------------


def localize(options: LocalizeOptions) -> None:
    """Make the common axis, place every unseen volume, and write and print the results.

    Raises:
        UsageError: The run has no proxy that scores slices.
        DataError: Nothing can serve as reference, or nothing can be placed.
    """
    name, proxy = _scoring_proxy(options)
    reference, unseen, how = _choose(options, proxy)
    show(f"{len(reference)} reference volumes ({how}), {len(unseen)} to place")
    profiles, flips = [], []
    for volume in reference:
        try:
            profiles.append(_profile(proxy, volume))
            flips.append(_may_flip(proxy, volume))
        except DataError as error:
            show(f"left out: {error}")
    if not profiles:
        raise DataError("none of the reference volumes can be used; see above")
    axis, _ = common_axis(profiles, flips)
    rows: list[Row] = []
    curves: list[tuple[Profile, Placement]] = []
    rejected: list[str] = []
    for volume in unseen:
        try:
            placed, profile, where = place_volume(
                proxy, volume, axis, options.crops, options.share, options.seed
            )
        except DataError as error:
            show(f"left out: {error}")
            rejected.append(str(error))
            continue
        rows += placed
        curves.append((profile, where))
    if not rows:
        raise DataError("none of the volumes can be placed; see above")
    _write(options, name, how, axis, len(profiles), rows, curves, rejected)


def _scoring_proxy(options: LocalizeOptions) -> tuple[str, Any]:
    proxies = load_proxies(options.run)
    able: dict[str, Proxy] = {name: proxy for name, proxy in proxies.items() if hasattr(proxy, "profile")}
    if options.proxy and options.proxy not in able:
        raise UsageError(
            f"--proxy {options.proxy} does not score slices; of the run's proxies, these do: "
            f"{', '.join(able) or 'none'}"
        )
    if not able:
        raise UsageError(
            f"{options.run} trained {', '.join(proxies)}, which do not score slices; pretrain with "
            "--proxy sorting"
        )
    name = options.proxy or next(iter(able))
    return name, able[name].to(device_of(options.device)).eval()


def _choose(options: LocalizeOptions, proxy: Any) -> tuple[Collection, Collection, str]:
    """Choose reference volumes and volumes to place, and say where the former came from."""
    data = open_data_for([proxy.encoder], list(options.data))
    known = set(getattr(proxy.encoder, "metadata", {}).get("identities", []))

    def seen(collection: Collection) -> np.ndarray:
        pairs = zip(collection.datasets, collection.subjects)
        return np.array([identity_hash(str(d), str(s)) in known for d, s in pairs], dtype=bool)

    trained = seen(data)
    if options.reference:
        reference, how = open_data_for([proxy.encoder], list(options.reference)), "as given"
        theirs = {tuple(pair) for pair in reference.identities()}
        mine = np.array([pair in theirs for pair in zip(data.datasets, data.subjects)], dtype=bool)
        unseen = data.select(np.flatnonzero(~trained & ~mine))
    elif trained.any():
        reference, how = data.select(np.flatnonzero(trained)), "seen in pretraining"
        unseen = data.select(np.flatnonzero(~trained))
    else:
        parts = house_split(data)
        reference, how = data.select(np.flatnonzero(parts == "train")), "training part of the house split"
        unseen = data.select(np.flatnonzero(parts != "train"))
    if not len(unseen):
        raise DataError(
            f"{' '.join(options.data)}: all {len(data)} volumes are of subjects that pretraining saw or "
            "that are the reference; give others with --data"
        )
    if not len(reference):
        raise DataError(
            f"{' '.join(options.data)}: no volume is left for the reference; give some with --reference"
        )
    if len(reference) > options.references:
        chosen = numpy_rng("localize reference", options.seed).permutation(len(reference))
        reference = reference.select(np.sort(chosen[: options.references]))
    return reference, unseen, how


def _write(
    options: LocalizeOptions,
    name: str,
    how: str,
    axis: Axis,
    references: int,
    rows: Sequence[Row],
    curves: Sequence[tuple[Profile, Placement]],
    rejected: Sequence[str],
) -> None:
    scores = summarize(rows)
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(asdict(rows[0])))
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    record = {
        "run": str(options.run),
        "proxy": name,
        "data": list(options.data),
        "reference": {"volumes": references, "from": how},
        "crops": {"per_volume": options.crops, "share": list(options.share), "seed": options.seed},
        "scores": scores,
        "axis": {"mm": axis.mm.tolist(), "scores": axis.scores.tolist()},
        "rows": [asdict(row) for row in rows],
        "rejected": list(rejected),
    }
    try:
        write_whole(options.out / "localize.csv", lines.getvalue())
        write_whole(options.out / "localize.json", json.dumps(record, indent=1))
        with whole_file(options.out / "localize.png") as temporary:
            picture(axis, curves, rows).savefig(temporary, format="png", dpi=120)
    except OSError as error:
        raise UsageError(f"--out {options.out}: cannot be written ({error.strerror})") from error
    shown = [row for row in rows if row.kind == "volume"]
    print_table(
        [
            [
                r.volume,
                f"{r.first:.1f}",
                f"{r.last:.1f}",
                "yes" if r.flipped else "no",
                f"{r.tau:.3f}",
                f"{r.inside:.2f}",
            ]
            for r in shown[:20]
        ],
        ["volume", "first slice, mm", "last slice, mm", "flipped", "tau", "inside"],
    )
    if len(shown) > 20:
        show(f"... and {len(shown) - 20} more in {options.out / 'localize.csv'}")
    if scores["crops"]:
        titles = {
            "error": "position error of crops, mm",
            "error_slices": "position error of crops, slices",
            "centre_error": "position error if the middle of the volume is guessed, mm",
            "frame_error": "difference from the distance to the volume's middle, mm",
        }
        print()
        print_table(
            [[text, f"{scores[k]['median']:.2f}", f"{scores[k]['p90']:.2f}"] for k, text in titles.items()],
            [
                f"{scores['crops']} crops of {scores['subjects']} unseen subjects",
                "median",
                "90th percentile",
            ],
        )
    show(f"\n{options.out / 'localize.png'}, .csv and .json")


def picture(axis: Axis, curves: Sequence[tuple[Profile, Placement]], rows: Sequence[Row]) -> Figure:
    """Draw the reference curve with the placed volumes, and the places of crops against those of the scans.

    What a crop is compared with is no anatomical truth: it is where the same encoder places the whole scan.
    """
    from matplotlib.figure import Figure

    crops = [row for row in rows if row.kind == "crop"]
    whole = {(row.dataset, row.volume): row for row in rows if row.kind == "volume"}
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for profile, where in curves[:60]:
        left.plot(where(profile.mm), profile.scores, color="tab:blue", alpha=0.35, linewidth=0.8)
    left.plot(axis.mm, axis.scores, color="k", linewidth=2, label="reference")
    left.set(xlabel="common axis, mm", ylabel="slice score", title=f"{len(curves)} unseen volumes")
    left.legend()
    truth, placed = [], []
    for row in crops:
        volume = whole[row.dataset, row.volume]
        sign = -1 if volume.flipped else 1
        middle = (row.first_slice + row.last_slice - 2 * volume.first_slice) / 2 * row.spacing
        truth.append(volume.first + sign * middle)
        placed.append((row.first + row.last) / 2)
    right.scatter(truth, placed, s=8, alpha=0.5)
    ends = [axis.mm[0], axis.mm[-1]]
    right.plot(ends, ends, color="k", linewidth=0.8)
    title = "crops"
    if crops:
        median = np.median([row.error for row in crops if row.error is not None])
        guess = np.median([row.centre_error for row in crops if row.centre_error is not None])
        title = (
            f"{len(crops)} crops: median difference {median:.1f} mm\n(the middle guessed: {guess:.1f} mm)"
        )
    right.set(
        xlabel="middle of the crop, mm, where the same encoder\nplaces the whole scan: no anatomical truth",
        ylabel="middle of the crop, mm, from the crop alone",
        title=title,
    )
    return figure
