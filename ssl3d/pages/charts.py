"""Charts as inline SVG: no library, no file; their colours are the page's, dark where it is dark."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

WIDTH = 640.0
PLOT = 330.0
"""Width of what is drawn beside the labels; small, so that a phone needs not shrink the letters."""
FEW = 9
"""Amounts at which each can have its own tick."""
MARKED = 40
"""Most points of a curve that have a mark each."""
COLOURS = 8
"""Colours in the style of the page, .c0 to .c7; a ninth line is dashed."""


@dataclass(frozen=True)
class Mark:
    """A point with its interval.

    Attributes:
        label: Name of the row, which a pointer shows too.
        value: Score of the row.
        low: Lower end of its interval, NaN for none.
        high: Upper end of its interval.
        kind: `pretrained`, `imagenet`, `scratch`, `trivial` or `published`, which decides the form; a
            `heading` stands above the rows that follow.
        faint: Whether the row is not ranked.
    """

    label: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    kind: str = "pretrained"
    faint: bool = False


Point = tuple[float, float, float, float]
"""Amount, value, and the ends of its interval, NaN for none."""


@dataclass(frozen=True)
class Line:
    """A curve of values over an amount.

    Attributes:
        label: Name at the end of the curve.
        points: Points of the curve.
        kind: Kind of a mark, which decides the form of the points.
    """

    label: str
    points: Sequence[Point]
    kind: str = "pretrained"


def forest(marks: Sequence[Mark], axis: str, reference: float | None, title: str) -> str:
    """Draw scores with intervals, a row each, with a dashed line at the reference."""
    label_width = min(290.0, 20 + 6.8 * max((len(mark.label) for mark in marks), default=10))
    left, right, step, top = label_width + 10, label_width + PLOT, 22.0, 8.0
    ends = [v for mark in marks for v in (mark.value, mark.low, mark.high) if isfinite(v)]
    if not ends:
        return ""
    ends += [reference] if reference is not None and isfinite(reference) else []
    ticks = _ticks(min(ends), max(ends))
    place = _linear(min(ends + ticks), max(ends + ticks), left, right)
    bottom = top + step * len(marks) + 6
    parts = [_grid_x(ticks, place, top, bottom, axis)]
    if reference is not None and isfinite(reference):
        x = place(reference)
        parts.append(f'<line class="ref" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom:.1f}"/>')
    for number, mark in enumerate(marks):
        y = top + step * (number + 0.5)
        words = mark.label if len(mark.label) <= 40 else mark.label[:38] + "…"
        if mark.kind == "heading":
            parts.append(f'<text class="head" x="4" y="{y + 5:.1f}">{escape(words)}</text>')
            continue
        tone = ' class="dim"' if mark.faint else ""
        parts.append(
            f'<text{tone} x="{label_width:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(words)}</text>'
        )
        if not isfinite(mark.value):
            continue
        hint = f"{mark.label}: {mark.value:.3f}"
        if isfinite(mark.low):
            hint += f" [{mark.low:.3f}, {mark.high:.3f}]"
            parts.append(
                f'<line class="bar k-{mark.kind}" x1="{place(mark.low):.1f}" x2="{place(mark.high):.1f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        parts.append(_symbol(place(mark.value), y, mark.kind, mark.faint, hint))
    return _svg(bottom + 40, title, parts, right + 16)


def scatter(
    marks: Sequence[tuple[float, Mark]], x_axis: str, y_axis: str, title: str, reference: float | None,
    log: bool = True,
) -> str:  # fmt: skip
    """Draw scores against an amount."""
    return lines([Line(mark.label, [(x, mark.value, mark.low, mark.high)], mark.kind) for x, mark in marks],
                 x_axis, y_axis, title, log, reference)  # fmt: skip


def lines(
    curves: Sequence[Line], x_axis: str, y_axis: str, title: str, log: bool = False,
    reference: float | None = None, called: Mapping[float, str] | None = None,
    distances: Sequence[tuple[float, float, float, str]] = (),
) -> str:  # fmt: skip
    """Draw curves over an amount, their intervals, and their names at the right, kept apart.

    Amounts in `called` are written so below the axis. `distances` are pairs of amounts at one height,
    joined by a line: first amount, second amount, height, and what it says when pointed at.
    """
    curves = [curve for curve in curves if any(isfinite(point[1]) for point in curve.points)]
    if not curves:
        return ""
    label_width = min(230.0, 24 + 6.6 * max(len(curve.label) for curve in curves))
    top = 12.0
    height = max(260.0, 15.0 * len(curves))
    bottom = top + height
    points = [point for curve in curves for point in curve.points if isfinite(point[1])]
    xs = [point[0] for point in points]
    ys = [v for point in points for v in point[1:] if isfinite(v)]
    ys += [reference] if reference is not None and isfinite(reference) else []
    log = log and min(xs) > 0
    x_ticks = _log_ticks(min(xs), max(xs)) if log else _ticks(min(xs), max(xs))
    y_ticks = _ticks(min(ys), max(ys))
    # Room for the ticks' numbers and, left of them, the turned name of the axis.
    left = 30.0 + 7.0 * max(len(_short(tick)) for tick in y_ticks)
    right = left + PLOT - 10
    spread = (lambda v: log10(v)) if log else (lambda v: v)
    low_x, high_x = spread(min(xs + ([] if log else x_ticks))), spread(max(xs + ([] if log else x_ticks)))
    pad = 0.06 * (high_x - low_x) or 0.5
    across = _linear(low_x - pad, high_x + pad, left, right)
    own = sorted(set(xs))
    places = [across(spread(x)) for x in own]
    if log and len(own) <= FEW and all(b - a >= 24 for a, b in itertools.pairwise(places)):
        x_ticks = own  # few amounts: what was measured, not round numbers beside it
    up = _linear(min(ys + y_ticks), max(ys + y_ticks), bottom, top)
    parts = [
        _grid_x(
            x_ticks,
            lambda v: across(spread(v)),
            top,
            bottom,
            x_axis,
            amount=True,
            middle=(left + right) / 2,
            called=called,
        )
    ]
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    parts.append(
        f'<text class="axis" transform="translate(13 {(top + bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_axis)}</text>'
    )
    if reference is not None and isfinite(reference):
        y = up(reference)
        parts.append(f'<line class="ref" x1="{left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for begin, end, height_, hint in distances:
        parts.append(
            f'<line class="ref" x1="{across(spread(begin)):.1f}" x2="{across(spread(end)):.1f}" '
            f'y1="{up(height_):.1f}" y2="{up(height_):.1f}"><title>{escape(hint)}</title></line>'
        )
    ends = sorted(
        ((up(last[1]), number) for number, curve in enumerate(curves) for last in [_last(curve)]),
    )
    wanted = _apart([y for y, _ in ends], 14.0, top + 6, bottom + 10)
    at = {number: y for (_, number), y in zip(ends, wanted, strict=True)}
    for number, curve in enumerate(curves):
        tone = f"tone c{number % COLOURS}" + (" dash" if number >= COLOURS else "")
        if curve.kind in ("scratch", "trivial"):
            tone = "tone c-plain" + (" dash" if curve.kind == "trivial" else "")
        shown = [point for point in curve.points if isfinite(point[1])]
        where = [(across(spread(x)), up(v)) for x, v, _, _ in shown]
        if len(where) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
            parts.append(f'<polyline class="curve {tone}" points="{path}"/>')
        for (x, y), (amount, value, low, high) in zip(where, shown, strict=True):
            hint = f"{curve.label}: {value:.3f} at {_short(amount)}"
            if isfinite(low) and isfinite(high):
                hint += f" [{low:.3f}, {high:.3f}]"
                parts.append(
                    f'<line class="bar thin {tone}" x1="{x:.1f}" x2="{x:.1f}" '
                    f'y1="{up(low):.1f}" y2="{up(high):.1f}"/>'
                )
            if len(where) <= MARKED:
                parts.append(_symbol(x, y, curve.kind, False, hint, tone))
        x, y = where[-1]
        end = at[number]
        parts.append(
            f'<polyline class="lead {tone}" points="{x + 5:.1f},{y:.1f} {right + 4:.1f},{end:.1f}"/>'
        )
        words = curve.label if len(curve.label) <= 34 else curve.label[:32] + "…"
        parts.append(
            f'<text class="{tone} name" x="{right + 8:.1f}" y="{end + 4:.1f}">{escape(words)}</text>'
        )
    return _svg(bottom + 42, title, parts, right + label_width)


def critical(names: Sequence[str], average: Sequence[float], difference: float,
             cliques: Sequence[tuple[int, int]], title: str) -> str:  # fmt: skip
    """Draw average ranks on a line; a bar joins those that cannot be told apart (Demšar 2006).

    The names stand outside of the line's range, where no stem can run through them.
    """
    count = len(names)
    labels = [
        f"{name if len(name) <= 40 else name[:38] + '…'} {value:.2f}"
        for name, value in zip(names, average, strict=True)
    ]
    half = (count + 1) // 2
    widths = [20 + 6.6 * max(map(len, side), default=0) for side in (labels[:half], labels[half:])]
    left, line = widths[0], 62.0
    right = left + PLOT
    place = _linear(1, count, left + 10, right - 10)
    ends = f'x1="{place(1):.1f}" x2="{place(count):.1f}"'
    parts = [f'<line class="axisline" {ends} y1="{line}" y2="{line}"/>']
    every = max(1, ceil(count / 16))
    for tick in range(1, count + 1):
        x = place(tick)
        parts.append(f'<line class="axisline" x1="{x:.1f}" x2="{x:.1f}" y1="{line - 5}" y2="{line}"/>')
        if tick % every == 0 or tick == 1:
            parts.append(f'<text x="{x:.1f}" y="{line - 9}" text-anchor="middle">{tick}</text>')
    end = place(min(1 + difference, count))
    parts.append(f'<line class="clique" x1="{place(1):.1f}" x2="{end:.1f}" y1="20" y2="20"/>')
    parts.append(f'<text x="{place(1):.1f}" y="14">critical difference {difference:.2f}</text>')
    below = line + 12
    for begin, last in cliques:
        parts.append(
            f'<line class="clique" x1="{place(average[begin]) - 4:.1f}" '
            f'x2="{place(average[last]) + 4:.1f}" '
            f'y1="{below:.1f}" y2="{below:.1f}"/>'
        )
        below += 8
    height = below + 16
    for number, (words, value) in enumerate(zip(labels, average, strict=True)):
        first = number < half
        y = below + 18 * (number + 1 if first else count - number)
        x, side = place(value), (left if first else right)
        parts.append(f'<polyline class="stem" points="{x:.1f},{line} {x:.1f},{y:.1f} {side:.1f},{y:.1f}"/>')
        anchor, at = ("end", side - 6) if first else ("start", side + 6)
        parts.append(
            f'<text class="name" x="{at:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
        )
        height = max(height, y + 10)
    return _svg(height, title, parts, right + widths[1])


# --------------------------------------------------------------------------------------------------


def _svg(height: float, title: str, parts: Sequence[str], width: float = WIDTH) -> str:
    sizes = f"min-width:{0.72 * width:.0f}px;max-width:{1.25 * width:.0f}px"
    return (
        f'<div class="chart"><svg viewBox="0 0 {width:.0f} {height:.0f}" style="{sizes}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg></div>"
    )


def _symbol(x: float, y: float, kind: str, faint: bool, title: str, tone: str = "") -> str:
    look = f"mark k-{kind} {tone} {'faint' if faint else ''}".strip()
    if tone:
        look = f"mark {tone}"
    shapes = {
        "imagenet": f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" class="{look}">',
        "scratch": f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z" class="{look} hollow">',
        "trivial": f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" class="{look} hollow">',
        "published": f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" class="{look} cross">',
    }
    begin = shapes.get(kind, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="{look}">')
    end = f"</{begin[1:].split(' ', 1)[0]}>"
    return f"{begin}<title>{escape(title)}</title>{end}"


def _grid_x(ticks: Sequence[float], place: Callable[[float], float], top: float, bottom: float, axis: str,
            amount: bool = False, middle: float | None = None,
            called: Mapping[float, str] | None = None) -> str:  # fmt: skip
    parts = []
    for tick in ticks:
        x, words = place(tick), (called or {}).get(tick) or _short(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom:.1f}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{words}</text>')
    at = middle if middle is not None else (place(ticks[0]) + place(ticks[-1])) / 2
    parts.append(
        f'<text class="axis" x="{at:.1f}" y="{bottom + 33:.1f}" text-anchor="middle">{escape(axis)}</text>'
    )
    return "".join(parts)


def _last(line: Line) -> tuple[float, float, float, float]:
    return [point for point in line.points if isfinite(point[1])][-1]


def _linear(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: begin + (value - low) / span * (end - begin)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Choose round numbers that hold a range."""
    span = high - low
    if span <= 0:
        span = abs(high) * 0.1 or 1.0
        low, high = low - span / 2, high + span / 2
    raw = span / wanted
    size = 10 ** floor(log10(raw))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= raw * 0.999)
    first = floor(low / step + 1e-9)
    last = ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(floor(log10(low)) - 1, ceil(log10(high)) + 2)
    steps = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [k * 10.0**power for power in powers for k in steps]
    inside = [tick for tick in ticks if low * 0.93 <= tick <= high * 1.07]
    return inside if len(inside) > 1 else sorted({low, high})


def _short(value: float) -> str:
    """Write a number shortly: 1.2e13 as 12T, .25 as 0.25."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:.4g}"


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Place labels in ascending order near the wanted places, a gap between each two."""
    places: list[float] = []
    for y in wanted:
        places.append(max(y, places[-1] + gap if places else low))
    over = (places[-1] - high) if places else 0.0
    if over > 0:
        places[-1] = high
        for k in range(len(places) - 2, -1, -1):
            places[k] = min(places[k], places[k + 1] - gap)
    return places


def bars(low: float, high: float, shares: Sequence[float], axis: str, title: str) -> str:
    """Draw a histogram with bars of one width.

    Args:
        low: Lower end of the first bar.
        high: Upper end of the last bar.
        shares: Height of each bar; whole numbers are counts, and written above their bars.
        axis: Name of the axis.
        title: Title for readers who cannot see it.
    """
    if not shares or max(shares) <= 0:
        return ""
    left, right, top, bottom = 20.0, 20.0 + 1.4 * PLOT, 18.0, 158.0
    ticks = [tick for tick in _ticks(low, high) if low <= tick <= high] or [low, high]
    place = _linear(low, high if high > low else low + 1, left, right)
    width = (right - left) / len(shares)
    parts = [_grid_x(ticks, place, top, bottom, axis, middle=(left + right) / 2)]
    for number, share in enumerate(shares):
        height = share / max(shares) * (bottom - top)
        at = low + (high - low) * number / len(shares)
        parts.append(
            f'<rect class="column" x="{left + number * width:.1f}" y="{bottom - height:.1f}" '
            f'width="{width - 0.8:.1f}" height="{height:.1f}"><title>{_short(at)}: '
            f"{share if isinstance(share, int) else f'{share:.3f}'}</title></rect>"
        )
        if isinstance(share, int) and share:
            parts.append(
                f'<text x="{left + (number + 0.5) * width:.1f}" y="{bottom - height - 4:.1f}" '
                f'text-anchor="middle">{share}</text>'
            )
    return _svg(bottom + 42, title, parts, right + 20)


def spark(shares: Sequence[float], title: str) -> str:
    """Draw a histogram as small as a word, without axes."""
    highest = max(shares, default=0.0) or 1.0
    step = 100 / max(len(shares), 1)
    points = "".join(f"V{24 - 24 * (share / highest) ** 0.5:.1f}h{step:.3g}" for share in shares)
    return (
        '<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title, quote=True)}"><path d="M0 24{points}V24z"/></svg>'
    )


def dots(points: Sequence[tuple[float, float, str]], x_axis: str, y_axis: str, title: str) -> str:
    """Draw points on equal axes, with the line on which both are the same.

    Args:
        points: Value across, value up, and name of each point.
        x_axis: Name of the axis across.
        y_axis: Name of the axis up.
        title: Title for readers who cannot see it.
    """
    values = [v for x, y, _ in points for v in (x, y) if isfinite(v)]
    if not values:
        return ""
    ticks = _ticks(min(values), max(values))
    left, top = 30.0 + 7.0 * max(len(_short(tick)) for tick in ticks), 12.0
    right, bottom = left + PLOT, top + PLOT
    across, up = _linear(ticks[0], ticks[-1], left, right), _linear(ticks[0], ticks[-1], bottom, top)
    parts = [_grid_x(ticks, across, top, bottom, x_axis)]
    for tick in ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    parts.append(
        f'<text class="axis" transform="translate(13 {(top + bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_axis)}</text>'
    )
    parts.append(f'<line class="ref" x1="{left}" x2="{right:.1f}" y1="{bottom}" y2="{top}"/>')
    for x, y, name in points:
        if isfinite(x) and isfinite(y):
            hint = f"{name}: {y:.3f} at {_short(x)}"
            parts.append(_symbol(across(x), up(y), "pretrained", False, hint))
    return _svg(bottom + 42, title, parts, right + 20)
