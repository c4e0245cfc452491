"""Synthetic torsos: organs of varying pose and texture, masks, a class per person, lesions with boxes.

Nothing here is anatomy. Any number that comes from phantoms is to be called a phantom number.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from scipy.ndimage import gaussian_filter

from ssl3d.data.cache import cache_folder, make_cache
from ssl3d.data.store.index import IndexWriter
from ssl3d.data.store.record import Record
from ssl3d.data.store.writer import assemble, write_part
from ssl3d.rng import numpy_rng, seed_of

DEFAULT_COUNT = 48
DEFAULT_SHAPE = (40, 48, 48)
CLASSES = ("background", "liver", "heart", "kidneys")
LABELS = ("fine", "coarse")
KINDS = ("plain", "faint", "noise")
_VERSION = 1  # part of the cache's name; raise it when phantoms change
_TORSO = np.array([360.0, 330.0, 330.0])  # mm


@dataclass(frozen=True)
class Phantom:
    """One scan of one synthetic person.

    Attributes:
        image: (1, D, H, W) float32, z-scored over the body; D inferior to superior, H to anterior, W to
            the right.
        mask: (D, H, W) uint8: 0 background, 1 liver, 2 heart, 3 kidneys.
        boxes: (n, 6) float32 of the lesions, 0 to 3 of them: z1 y1 x1 z2 y2 x2, upper corner exclusive.
        body: (D, H, W) booleans, true within the body.
        label: 0 or 1: the liver's texture is fine and its outline smooth, or coarse and lobulated.
        spacing: Voxel sides, mm along (D, H, W).
        background: Value of air after normalisation.
        origin: mm from the torso's centre to the first voxel, along (D, H, W).
        mean: Mean over the body before z-scoring.
        std: Standard deviation over the body before z-scoring.
    """

    image: np.ndarray
    mask: np.ndarray
    boxes: np.ndarray
    body: np.ndarray
    label: int
    spacing: tuple[float, float, float]
    background: float
    origin: tuple[float, float, float]
    mean: float
    std: float


def phantom(
    seed: int,
    shape: tuple[int, int, int] | None = None,
    *,
    scan: int = 0,
    label: int | None = None,
    kind: str = "plain",
) -> Phantom:
    """Make one scan of a synthetic person, the same for the same arguments.

    Args:
        seed: Seed of the person: anatomy, pose, class, lesions.
        shape: Voxels along (D, H, W); by default 40 x 48 x 48, varying by a few.
        scan: Number of the scan of that person: noise, bias field, gain, spacing, field of view.
        label: Class; by default drawn with the person.
        kind: `plain`; `faint`: lesions are a little brighter than what they lie in, instead of brighter
            than everything, so hard to detect. `noise`: every voxel is an independent standard normal
            number, so that what a proxy learns of it is a shortcut; masks, boxes and classes are those of
            `plain`.

    Example:
        >>> scan = phantom(7, (24, 32, 32))
        >>> scan.image.shape, scan.mask.shape, scan.boxes.shape[1]
        ((1, 24, 32, 32), (24, 32, 32), 6)
    """
    person, machine = numpy_rng("person", seed), numpy_rng("scan", seed, scan)
    drawn = int(person.integers(2))
    label = drawn if label is None else label
    if shape is None:
        d, h, w = (int(n) for n in np.array(DEFAULT_SHAPE) + machine.integers(-4, 5, 3))
        shape = (d, h, w)
    # The field of view covers the torso whatever the shape, a little more or less of it.
    spacing = _TORSO / np.array(shape) * machine.uniform(0.94, 1.06, 3)
    origin = -spacing * (np.array(shape) - 1) / 2 + machine.uniform(-0.03, 0.03, 3) * _TORSO
    tissue, mask, body, boxes = _anatomy(person, shape, spacing, origin, label, kind == "faint")
    blur = gaussian_filter(tissue, 0.5)
    z, y, x = _grid(shape)
    a, b, c = machine.normal(0, 0.05, 3)
    image = blur * (1 + a * z + b * y + c * x) * machine.uniform(0.9, 1.1)
    image += machine.normal(0, machine.uniform(0.02, 0.04), shape)
    image = np.clip(image, 0, None, dtype=np.float32)  # air reads zero, as in a magnitude image
    mean, std = float(image[body].mean()), float(image[body].std())
    image = (image - mean) / std
    background = -mean / std
    if kind == "noise":
        image = numpy_rng("noise", seed, scan).standard_normal(shape, dtype=np.float32)
        body, mean, std, background = np.ones(shape, dtype=bool), 0.0, 1.0, 0.0
    return Phantom(
        image=image[None],
        mask=mask,
        boxes=boxes,
        body=body,
        label=label,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        background=background,
        origin=(float(origin[0]), float(origin[1]), float(origin[2])),
        mean=mean,
        std=std,
    )


def phantom_store(
    count: int = DEFAULT_COUNT,
    seed: int = 0,
    shape: tuple[int, int, int] | None = None,
    folder: Path | None = None,
    kind: str = "plain",
) -> Path:
    """Make a store of `count` phantoms once and keep it in the cache; classes are balanced over people.

    Every fourth person has two scans.

    Args:
        count: Number of volumes.
        seed: Seed of the whole store.
        shape: Shape of every volume; by default shapes vary.
        folder: Folder of the store; by default the cache ($SSL3D_CACHE, else ~/.cache/ssl3d).
        kind: `plain`, `faint` or `noise`, explained at `phantom`; the data set is then called
            `phantoms-faint` or `phantoms-noise`.
    """
    folder = cache_folder() / "phantoms" if folder is None else folder
    size = "" if shape is None else "-" + "x".join(map(str, shape))
    dataset = "phantoms" if kind == "plain" else f"phantoms-{kind}"
    out = folder / f"{dataset}-v{_VERSION}-{count}-seed{seed}{size}.h5"
    if out.exists():
        return out
    make_cache(folder)
    scans = [(person, scan) for person in range(count) for scan in range(2 if person % 4 == 3 else 1)][
        :count
    ]
    people = scans[-1][0] + 1
    labels = numpy_rng("classes", seed).permutation(np.arange(people) % 2)
    # Several processes may make the same store at once: each has parts of its own, the last rename wins.
    parts = folder / f".{out.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
    try:
        for number, (person, scan) in enumerate(scans):
            torso = phantom(
                seed_of("phantom", seed, person), shape, scan=scan, label=int(labels[person]), kind=kind
            )
            _write(parts, number, person, scan, torso, dataset)
        settings = {
            "phantoms": count,
            "seed": seed,
            "version": _VERSION,
            "normalize": "z-score over the body",
        }
        assemble(parts, out, settings, [])
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return out


def simulated_index(out: Path, count: int, first: int = 0) -> Path:
    """Make a store of `count` volumes without voxels, to measure what opening large collections costs.

    Args:
        out: File of the store.
        count: Number of volumes, in four data sets, two per subject.
        first: Number of the first volume, so that several files make one collection.
    """
    with h5py.File(out, "w", libver="v110") as file:
        index = IndexWriter(file, count)
        for n in range(first, first + count):
            name = f"hospital-{n % 4}/subject-{n // 8:07d}/series-{n:07d}.nii.gz"
            record = Record(
                id=name,
                dataset=f"hospital-{n % 4}",
                subject=f"subject-{n // 8:07d}",
                label=n % 2,
                source=name,
            )
            index.add(
                record,
                shape=(1, 160, 256, 256),
                block=(8, 8, 8),
                has_mask=False,
                foreground=np.zeros(0, np.uint8),
                sketch=np.zeros((1, 2), np.float32),
            )
        index.close()
    return out


# ------------------------------------------------------------------------------------------------


def _write(folder: Path, number: int, person: int, scan: int, torso: Phantom, dataset: str) -> None:
    # Voxel (d, h, w) to RAS+ mm: D goes superior, H anterior, W right.
    s, o = torso.spacing, torso.origin
    affine = ((0.0, 0.0, s[2], o[2]), (0.0, s[1], 0.0, o[1]), (s[0], 0.0, 0.0, o[0]), (0.0, 0.0, 0.0, 1.0))
    name = f"phantom-{person:05d}-scan{scan}"
    record = Record(
        id=name,
        dataset=dataset,
        subject=f"phantom-{person:05d}",
        label=torso.label,
        spacing=torso.spacing,
        orientation="SAR",
        affine=affine,
        original_shape=torso.image.shape[1:],
        original_affine=affine,
        source=f"phantom:{person}:{scan}",
        sha256=hashlib.sha256(torso.image.tobytes()).hexdigest(),
        channels=("phantom",),
        done={
            "normalisation": {"kind": "mr", "mean": torso.mean, "std": torso.std},
            "background": torso.background,
        },
    )
    labels = np.zeros(len(torso.boxes), np.int64)
    write_part(folder, f"{number:08d}", record, torso.image, torso.mask, torso.boxes, labels, torso.body)


def _grid(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay coordinates from -1 to 1 along each axis, as an open grid."""
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    return z[:, None, None], y[:, None], x


def _anatomy(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: np.ndarray,
    origin: np.ndarray,
    label: int,
    faint: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw tissue intensities (air 0, soft tissue about .5), mask, body and lesion boxes of one person.

    Positions are in half torsos: z from -1 (pelvis) to 1 (shoulders), y to anterior, x to the right.
    All of it comes from `rng` in an order that does not depend on the grid, so that two scans of a
    person show the same anatomy; only the texture is drawn on the grid, from a generator of its own.
    """
    z, y, x = (
        ((o + s * np.arange(n)) * 2 / mm).astype(np.float32)
        for o, s, n, mm in zip(origin, spacing, shape, _TORSO)
    )
    z, y = z[:, None, None], y[:, None]
    size, turn, lean = rng.uniform(0.9, 1.08, 3), rng.normal(0, 0.06), rng.normal(0, 0.03, 2)
    y, x = y - lean[0] * z, x - lean[1] * z
    y, x = np.cos(turn) * y - np.sin(turn) * x, np.sin(turn) * y + np.cos(turn) * x
    phase, girth = rng.uniform(0, 2 * np.pi), rng.uniform(-0.05, 0.05)
    jitter = rng.normal(0, 1, (8, 6))
    lobes, roughness = rng.integers(4, 7), rng.integers(2**62)
    lesions = rng.uniform(0, 1, (int(rng.integers(0, 4)), 5))

    # Body: narrow waist, wide shoulders and hips.
    waist = 0.70 + girth + 0.10 * z**2 + 0.06 * z
    body = (y / (0.68 * size[1] * waist / 0.7)) ** 2 + (x / (0.88 * size[2] * waist / 0.7)) ** 2 < 1
    noise = np.random.Generator(np.random.PCG64(roughness))
    white = noise.standard_normal(shape, dtype=np.float32)
    fine, coarse = (_unit(gaussian_filter(white, sigma)) for sigma in (0.6, 1.6))
    tissue = np.where(body, 0.45 + 0.02 * fine, 0).astype(np.float32)
    fat = body & ((y / (0.60 * size[1] * waist / 0.7)) ** 2 + (x / (0.80 * size[2] * waist / 0.7)) ** 2 > 1)
    tissue[fat] = 0.62
    mask = np.zeros(shape, np.uint8)

    def ellipsoid(row: int, centre: tuple[float, ...], radius: tuple[float, ...]) -> np.ndarray:
        """Measure squared distance, in radii, of an organ that varies in place (.04) and size (8 %)."""
        c = np.array(centre) + 0.04 * jitter[row, :3]
        r = np.array(radius) * np.exp(0.08 * jitter[row, 3:])
        return ((z - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + ((x - c[2]) / r[2]) ** 2

    # Lungs, dark, growing from the diaphragm up and closing at the apex.
    for row, side in ((0, 0.42), (1, -0.42)):
        lung = (ellipsoid(row, (0.52, 0.02, side), (0.52, 0.44, 0.27)) < 1) & body
        tissue[lung] = 0.12 + 0.03 * fine[lung]
    # Spine with vertebrae, ribs as rings of the wall, pelvis as two wings at the bottom.
    bow = -0.40 + 0.06 * np.sin(1.5 * z + 0.3 * jitter[7, 0])
    spine = ((y - bow) / 0.11) ** 2 + (x / 0.11) ** 2 < 1
    vertebrae = 0.80 + 0.12 * np.cos(2 * np.pi * 4.5 * z + phase)
    tissue = np.where(spine, vertebrae, tissue)
    wall = fat & (z > 0.05) & (np.cos(2 * np.pi * 3.5 * z + phase + 2 * y) > 0.55)
    tissue[wall] = 0.85
    for row, side in ((2, 0.40), (3, -0.40)):
        wing = ellipsoid(row, (-0.82, -0.10, side), (0.26, 0.30, 0.16))
        tissue[(wing < 1) & (wing > 0.45) & body] = 0.90
    # Liver on the right, its outline and texture are the class.
    liver = ellipsoid(4, (-0.02, 0.10, 0.34), (0.30, 0.36, 0.34))
    angle = np.arctan2(y - 0.10, x - 0.34)
    bumps = np.cos(lobes * angle + phase) * np.cos(lobes * 1.7 * z + phase)
    inside = (liver < 1 + (0.22 if label else 0.04) * bumps) & body & ~spine
    texture = coarse if label else fine
    tissue[inside] = 0.60 + 0.06 * texture[inside]
    mask[inside] = 1
    heart = (ellipsoid(5, (0.32, 0.20, -0.14), (0.20, 0.22, 0.22)) < 1) & body & ~spine & ~inside
    tissue[heart] = 0.74 + 0.02 * coarse[heart]
    mask[heart] = 2
    for row, side in ((6, 0.36), (7, -0.36)):
        kidney = ellipsoid(row, (-0.34, -0.26, side), (0.20, 0.12, 0.12))
        organ = (kidney < 1) & body & ~spine & ~inside
        tissue[organ] = np.where(kidney[organ] < 0.35, 0.50, 0.82)
        mask[organ] = 3
    boxes = _lesions(lesions, tissue, (z, y, x), spacing, inside | heart | (mask == 3), body, faint)
    return tissue, mask, body, boxes


def _lesions(
    drawn: np.ndarray,
    tissue: np.ndarray,
    grid: tuple[np.ndarray, np.ndarray, np.ndarray],
    spacing: np.ndarray,
    organs: np.ndarray,
    body: np.ndarray,
    faint: bool,
) -> np.ndarray:
    """Put balls of 16 to 24 mm radius into the trunk, apart from each other, and return their boxes."""
    z, y, x = grid
    mm = _TORSO / 2
    boxes: list[list[float]] = []
    placed: list[np.ndarray] = []
    for a, b, c, r, shine in drawn:
        centre = np.array([-0.6 + 1.2 * a, -0.25 + 0.6 * b, -0.45 + 0.9 * c])
        radius = 16 + 8 * r
        if any(np.linalg.norm((centre - other) * mm) < 60 for other in placed):
            continue
        distance = ((z - centre[0]) * mm[0]) ** 2 + ((y - centre[1]) * mm[1]) ** 2
        ball = (distance + ((x - centre[2]) * mm[2]) ** 2 < radius**2) & body
        if ball.sum() < 8:
            continue
        tissue[ball] = tissue[ball] + 0.2 + 0.1 * shine if faint else 1.05 + 0.15 * shine
        placed.append(centre)
        where = [np.flatnonzero(ball.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
        boxes.append([float(w[0]) for w in where] + [float(w[-1] + 1) for w in where])
    return np.array(boxes, np.float32).reshape(-1, 6)


def _unit(field: np.ndarray) -> np.ndarray:
    return (field - field.mean()) / field.std()
