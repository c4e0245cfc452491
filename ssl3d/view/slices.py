"""Slices through a volume as one small picture: three planes side by side, outlines, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from ssl3d.data.geometry import UNKNOWN
from ssl3d.pages import elements, palette

Array = NDArray[Any]

GAP = 3
"""Pixels between two planes, and between two rows."""
SLAB = 16
"""Slices of a mask that are read at once."""
ACROSS = ((1, 2), (0, 2), (0, 1))
"""Axes that run down and across the picture, for each axis (D, H, W) that a plane cuts."""
_OPPOSITE = dict(zip("SIAPRL", "ISPALR", strict=True))


@dataclass(frozen=True)
class Plane:
    """A plane of a volume, and its place in the picture.

    Attributes:
        axis: Axis (0 for D, 1 for H, 2 for W) that the plane cuts.
        at: Number of the slice.
        left: First column in the picture.
        top: First row in the picture.
        width: Pixels across.
        height: Pixels down.
        flipped: Whether both axes run against those of the volume, so that superior or anterior is on top.
        letters: Letters at the top, the right, the bottom and the left; empty where nobody knows.
    """

    axis: int
    at: int
    left: int
    top: int
    width: int
    height: int
    flipped: bool
    letters: str


@dataclass(frozen=True)
class Layout:
    """Planes of one picture.

    Attributes:
        planes: Axial, coronal and sagittal plane; of an image (D = 1) the axial one alone.
        shape: Voxels (D, H, W) of the volume.
        width: Pixels of the picture across.
        height: Pixels of the picture down.
    """

    planes: tuple[Plane, ...]
    shape: tuple[int, int, int]
    width: int
    height: int


def layout(volume: Any, at: Sequence[int], side: int) -> Layout:
    """Lay out the planes of a volume in its physical proportions.

    Stored volumes run to superior, anterior and right. They are shown as radiologists look at them: from
    the feet, from the face and from the patient's left, so that the patient's right is on the left of the
    picture. Of an unknown orientation the first voxel is at the top left, as in a file of pixels.

    Args:
        volume: Volume with `shape`, `spacing` and `orientation`.
        at: Slice of each axis (D, H, W).
        side: Pixels of its longest side.
    """
    shape = (int(volume.shape[1]), int(volume.shape[2]), int(volume.shape[3]))
    axes = (0,) if shape[0] == 1 else (0, 1, 2)
    used = sorted({axis for cut in axes for axis in ACROSS[cut]})
    extent = [n * s for n, s in zip(shape, volume.spacing, strict=True)]
    scale = side / max(extent[axis] for axis in used)
    pixels = [max(1, round(length * scale)) for length in extent]
    height = max(pixels[ACROSS[cut][0]] for cut in axes)
    known = volume.orientation != UNKNOWN
    planes, left = [], 0
    for cut in axes:
        down, across = ACROSS[cut]
        letters = ""
        if known:  # the axes are flipped: what they run to is at the top and at the left
            up, side_ = volume.orientation[down], volume.orientation[across]
            letters = up + _OPPOSITE[side_] + _OPPOSITE[up] + side_
        planes.append(
            Plane(
                cut, int(at[cut]), left, (height - pixels[down]) // 2, pixels[across], pixels[down],
                known, letters,
            )
        )  # fmt: skip
        left += pixels[across] + GAP
    return Layout(tuple(planes), shape, left - GAP, height)


def cut(source: Any, plane: Plane, shape: Sequence[int], channel: int = 0) -> Array:
    """Read the voxels of a plane of a volume, (rows, columns) as they are stored.

    Args:
        source: Volume with `read`, or an array (D, H, W).
        plane: Plane to read.
        shape: Voxels (D, H, W) of the volume.
        channel: Channel to read.
    """
    if isinstance(source, np.ndarray):
        taken: Array = source.take(plane.at, axis=plane.axis)
        return taken
    start, size = [0, 0, 0], list(shape)
    start[plane.axis], size[plane.axis] = plane.at, 1
    voxels: Array = source.read(start, size)[channel].numpy()
    return voxels.reshape([n for axis, n in enumerate(shape) if axis != plane.axis])


def cut_mask(volume: Any, plane: Plane, shape: Sequence[int]) -> Array:
    """Read the mask values of a plane of a volume, (rows, columns) as they are stored."""
    start, size = [0, 0, 0], list(shape)
    start[plane.axis], size[plane.axis] = plane.at, 1
    values: Array = volume.read_mask(start, size).numpy()
    return values.reshape([n for axis, n in enumerate(shape) if axis != plane.axis])


def grey(plan: Layout, slices: Sequence[Array]) -> str:
    """Draw slices in grey, from their 0.5th to their 99.5th percentile, as a data URI (JPEG)."""
    values = np.concatenate([own[np.isfinite(own)] for own in slices])
    low, high = np.percentile(values, (0.5, 99.5)) if values.size else (0.0, 1.0)
    span = float(high - low) or 1.0
    canvas = Image.new("L", (plan.width, plan.height))
    for plane, own in zip(plan.planes, slices, strict=True):
        shown = np.clip((np.nan_to_num(own) - low) / span, 0, 1) * 255
        part = Image.fromarray(_turned(shown, plane).astype(np.uint8))
        part = part.resize((plane.width, plane.height), Image.Resampling.BILINEAR)
        canvas.paste(part, (plane.left, plane.top))
    return elements.data_uri(canvas, "JPEG", quality=68, optimize=True)


def outlines(plan: Layout, slices: Sequence[Array]) -> str:
    """Draw the outlines of mask values in the colours of the palette, as a data URI; empty for none."""
    drawn = [_edges(_scaled(own, plane)) for plane, own in zip(plan.planes, slices, strict=True)]
    return _overlay(plan, drawn, [palette.colour(k) for k in range(1, len(palette.COLOURS) + 1)], 255)


def areas(plan: Layout, slices: Sequence[Array], colours: Sequence[str]) -> str:
    """Fill the areas of values 1, 2, ... with colours, as a data URI; empty for none."""
    drawn = [_scaled(own, plane) for plane, own in zip(plan.planes, slices, strict=True)]
    return _overlay(plan, drawn, colours, 190)


def rectangles(
    plan: Layout, boxes: Array, kind: str, words: Sequence[str] = (), strengths: Sequence[float] = ()
) -> str:
    """Draw the boxes that the planes cut, as elements of SVG.

    Args:
        plan: Planes of the picture.
        boxes: Boxes (n, 6), z1 y1 x1 z2 y2 x2 in voxels, upper corner exclusive.
        kind: CSS class.
        words: What a pointer shows of each box.
        strengths: Opacity of each box, from 0 to 1; by default 1.
    """
    parts = []
    for plane in plan.planes:
        down, across = ACROSS[plane.axis]
        for number, box in enumerate(boxes):
            if not box[plane.axis] - 0.5 <= plane.at < box[plane.axis + 3] + 0.5:
                continue
            low, high = [], []
            for axis, length in ((down, plane.height), (across, plane.width)):
                n = plan.shape[axis]
                ends = [float(box[axis]) / n * length, float(box[axis + 3]) / n * length]
                if plane.flipped:
                    ends = [length - ends[1], length - ends[0]]
                low.append(ends[0])
                high.append(ends[1])
            title = f"<title>{escape(words[number])}</title>" if words else ""
            faint = f' opacity="{min(max(strengths[number], 0.15), 1):.2f}"' if len(strengths) else ""
            parts.append(
                f'<rect class="{kind}" x="{plane.left + low[1]:.1f}" y="{plane.top + low[0]:.1f}" '
                f'width="{high[1] - low[1]:.1f}" height="{high[0] - low[0]:.1f}"{faint}>{title}</rect>'
            )
    return "".join(parts)


@dataclass(frozen=True)
class Layer:
    """A row of a picture: the slices once more, with something drawn over them.

    Attributes:
        title: Words above the row; empty for none.
        overlay: Data URI of what lies over the slices; empty for nothing.
        shapes: Elements of SVG over the slices.
    """

    title: str = ""
    overlay: str = ""
    shapes: str = ""


def picture(plan: Layout, source: str, layers: Sequence[Layer], about: str, name: str) -> str:
    """Return the picture of a volume as SVG: its slices are held once, and shown in every row.

    Args:
        plan: Planes of the picture.
        source: Data URI of the slices.
        layers: Rows of the picture.
        about: What the picture shows.
        name: Name in the page that no other picture has.
    """
    titled = 13 if any(layer.title for layer in layers) else 0
    step = plan.height + titled + GAP
    letters = "".join(_letters(plane) for plane in plan.planes)
    rows = []
    for number, layer in enumerate(layers):
        image = f'<image id="{name}" href="{source}" width="{plan.width}" height="{plan.height}"/>'
        if number:
            image = f'<use href="#{name}"/>'
        over = ""
        if layer.overlay:
            over = f'<image href="{layer.overlay}" width="{plan.width}" height="{plan.height}"/>'
        over = f'<g class="over">{over}{layer.shapes}</g>' if over or layer.shapes else ""
        words = f'<text class="row" y="10">{escape(layer.title)}</text>' if layer.title else ""
        rows.append(
            f'<g transform="translate(0 {number * step})">{words}'
            f'<g transform="translate(0 {titled})">{image}{over}{letters}</g></g>'
        )
    size = f'viewBox="0 0 {plan.width} {step * len(layers) - GAP}" width="{plan.width}"'
    label = escape(about, quote=True)
    return f'<svg class="slices" {size} role="img" aria-label="{label}">{"".join(rows)}</svg>'


def centre_of_mask(volume: Any) -> tuple[tuple[int, int, int], list[int]] | None:
    """Find the slices with most of the mask, and its values; None without a mask, or an empty one."""
    if not volume.has_mask:
        return None
    depth, height, width = volume.shape[1:]
    counts = [np.zeros(n, np.int64) for n in (depth, height, width)]
    values: set[int] = set()
    for first in range(0, depth, SLAB):
        size = (min(SLAB, depth - first), height, width)
        slab = volume.read_mask((first, 0, 0), size).numpy()
        inside = slab > 0
        values |= set(np.unique(slab).tolist())
        counts[0][first : first + size[0]] = inside.sum(axis=(1, 2))
        counts[1] += inside.sum(axis=(0, 2))
        counts[2] += inside.sum(axis=(0, 1))
    if not counts[0].any():
        return None
    d, h, w = (int(count.argmax()) for count in counts)
    return (d, h, w), sorted(value for value in values if value > 0)


def centre_of_boxes(boxes: Array | None, shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Return the middle of the largest box; None where there is none."""
    if boxes is None or not len(boxes):
        return None
    largest = boxes[int((boxes[:, 3:] - boxes[:, :3]).prod(axis=1).argmax())]
    middle = (largest[:3] + largest[3:] - 1) / 2
    d, h, w = (int(np.clip(round(float(x)), 0, n - 1)) for x, n in zip(middle, shape, strict=True))
    return d, h, w


def _letters(plane: Plane) -> str:
    if not plane.letters or min(plane.width, plane.height) < 24:
        return ""
    x, y = plane.left + plane.width / 2, plane.top + plane.height / 2
    right, bottom = plane.left + plane.width, plane.top + plane.height
    places = ((x, plane.top + 9), (right - 5, y + 3), (x, bottom - 2), (plane.left + 5, y + 3))
    return "".join(
        f'<text class="way" x="{x:.0f}" y="{y:.0f}">{letter}</text>'
        for letter, (x, y) in zip(plane.letters, places, strict=True)
    )


def _turned(values: Array, plane: Plane) -> Array:
    return values[::-1, ::-1] if plane.flipped else values


def _scaled(values: Array, plane: Plane) -> Array:
    """Bring values to the pixels of the picture, each pixel that of the voxel in its middle."""
    turned = _turned(values, plane)
    rows = ((np.arange(plane.height) + 0.5) * turned.shape[0] / plane.height).astype(int)
    columns = ((np.arange(plane.width) + 0.5) * turned.shape[1] / plane.width).astype(int)
    scaled: Array = turned[rows][:, columns]
    return scaled


def _edges(values: Array) -> Array:
    """Keep the pixels of objects that have another value, or the rim of the picture, beside them."""
    around = np.pad(values, 1)
    inner = around[1:-1, 1:-1]
    edge = np.zeros(inner.shape, bool)
    for other in (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]):
        edge |= other != inner
    return np.where(edge, inner, 0)


def _overlay(plan: Layout, drawn: Sequence[Array], colours: Sequence[str], alpha: int) -> str:
    canvas = np.zeros((plan.height, plan.width), np.uint8)
    for plane, own in zip(plan.planes, drawn, strict=True):
        index = np.where(own > 0, (own - 1) % len(colours) + 1, 0)
        canvas[plane.top : plane.top + plane.height, plane.left : plane.left + plane.width] = index
    if not canvas.any():
        return ""
    image = Image.fromarray(canvas).convert("P")
    flat = [0, 0, 0] + [part for own in colours for part in ImageColor.getrgb(own)[:3]]
    image.putpalette(flat)
    return elements.data_uri(
        image, "PNG", optimize=True, transparency=bytes([0] + [alpha] * len(colours)), bits=4
    )
