"""Cube ordering: put the shuffled cubes of a crop back into their places (jigsaw, Rubik's cube, cube+)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl3d.api import (
    BatchRng,
    DataError,
    Encoder,
    PermutationSet,
    Proxy,
    StepOutput,
    UsageError,
    ViewRng,
    Views,
    augment,
    centres_ignored,
    draw_crop,
    fit_size,
    foreground_shares,
    permutation_set,
    projection_head,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ssl3d.api import Collection, Volume

_AXES = "DHW"
_TRIES = 16  # crops looked at, until every cube of one has enough foreground
_LEAST = 3  # a volume too small for whole cubes gives cubes of a third of their side at least
_FAINT = 0.1  # cubes whose deviation is below this share of their crop's are not blown up to 1


@dataclass
class CubeOrderingConfig:
    """Options of the cube-ordering proxy.

    Cubes are cut with a gap and a jitter, and each changes its intensities on its own, so that neither
    touching borders nor a slow change of brightness gives the places away.

    A volume with room for less than the crop gives smaller cubes, all padded alike on all sides, which
    says nothing about their places. An image (D = 1) is cut along H and W only, with heads of its own.

    Attributes:
        grid: Numbers of cubes along D H W. Thin volumes take 1 2 2 or 1 3 3 with a crop such as 8 64 64.
        crop: Size of the crop that is cut, along D H W, in voxels. A cube's side is the crop's divided by
            the grid's, less gap and jitter: 18 by default, one more than the strides of most encoders, and
            16 to 18 with the crops that small scans of 35 to 50 voxels still allow.
        gap: Least distance between neighbouring cubes, in voxels; none along axes with a single cube.
        gap_mm: Least distance between neighbouring cubes, in mm; where it is the larger one, the cut
            crop grows.
        jitter: Range of each cube's random shift along each axis with several cubes: shift ~ U{0, ...,
            jitter} voxels.
        min_foreground: Least share of foreground in every cube; where no crop has that, the one with the
            most such cubes is taken. Cubes below count as empty.
        target: Question to the network: permutation, which one of a fixed set was used; or position, the
            place of each cube, all orders being possible, solved as an assignment.
        permutations: Number of permutations in the fixed set; with 4 cubes there are only 24.
        turns: Axes, at most two of D H W, about which cubes are turned by 180 degrees, each with
            probability 1/2; the network tells which cubes were turned. H W makes it the Rubik's cube. Cubes
            of depth 1 are turned about D.
        masks: Way of masking every cube with probability 1/2, as in Rubik's cube+: none, voxels here and
            there, or a block; the network tells which cubes were masked.
        mask_share: Share of the voxels of a masked cube that are masked.
        side_weight: Weight of the losses of turns and masks beside that of the order.
        normalize: Whether each cube is brought to mean 0 and deviation 1.
        detrend: Whether the linear trend of each cube's intensities is subtracted.
        chance: Probability of each of bias, gamma, contrast and noise, for each cube.
        bias: Strength b of a smooth multiplicative field, exp of a cubic polynomial whose coefficients ~
            U(-b, b); 0 is none.
        gamma: Strength g of a gamma curve: exponent ~ LogUniform(1/(1 + g), 1 + g); 0 is none.
        contrast: Strength c of a change of contrast, gain ~ LogUniform(1/(1 + c), 1 + c), and of
            brightness, offset ~ U(-c, c) standard deviations of the cube; 0 is none.
        noise: Strength n of Gaussian noise, whose standard deviation ~ U(0, n) times the cube's; 0 is
            none.
        features: Length of a cube's features before the cubes are joined.
        hidden: Width of the hidden layers of the heads.
        head_norm: Norm of the features of the cubes: batch, layer or none.
    """

    grid: tuple[int, int, int] = (2, 2, 2)
    crop: tuple[int, int, int] = (48, 48, 48)
    gap: int = 3
    gap_mm: float = 2.0
    jitter: int = 3
    min_foreground: float = 0.1
    target: Literal["permutation", "position"] = "permutation"
    permutations: int = 100
    turns: tuple[str, ...] = ()
    masks: Literal["none", "voxels", "block"] = "none"
    mask_share: float = 0.5
    side_weight: float = 1.0
    normalize: bool = True
    detrend: bool = True
    chance: float = 0.5
    bias: float = 0.2
    gamma: float = 0.3
    contrast: float = 0.3
    noise: float = 0.1
    features: int = 64
    hidden: int = 1024
    head_norm: Literal["batch", "layer", "none"] = "batch"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        for name in ("grid", "crop"):
            value = getattr(self, name)
            if len(value) != 3 or min(value) < 1:
                raise ValueError(f"{name} is {value}, must be three sizes of at least 1: D, H, W")
        if math.prod(self.grid) < 2:
            raise ValueError(f"grid is {self.grid}: a single cube has no order")
        for name in ("gap", "jitter"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        for name in ("gap_mm", "side_weight", "bias", "gamma", "contrast", "noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        for name in ("min_foreground", "chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must lie in 0 to 1")
        if not 0 < self.mask_share <= 1:
            raise ValueError(f"mask_share is {self.mask_share}, must be above 0 and at most 1")
        for name in ("features", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not 2 <= self.permutations <= 10_000:
            raise ValueError(f"permutations is {self.permutations}, must lie in 2 to 10000")
        if len(set(self.turns)) < len(self.turns) or not set(self.turns) <= set(_AXES):
            raise ValueError(f"turns is {self.turns}, must name different axes of D, H and W")
        if len(self.turns) > 2:
            raise ValueError("turns names three axes, but a turn about each of two is one about the third")
        if min(self.cube) < 1:
            raise ValueError(
                f"crop is {self.crop}: cut into {self.grid} with a gap of {self.gap} and a jitter of "
                f"{self.jitter} it leaves cubes of {self.cube}; make it larger"
            )

    @property
    def cube(self) -> tuple[int, int, int]:
        """Size of a cube along D H W, in voxels."""
        d, h, w = (
            side if cells == 1 else side // cells - self.gap - self.jitter
            for side, cells in zip(self.crop, self.grid)
        )
        return (d, h, w)


class CubeOrdering(Proxy):
    """The network must work out how the shuffled cubes of a crop lay to each other, from their anatomy.

    A crop is cut into cubes with gaps and jitter; each passes through the shared encoder and one small
    layer, on its own; the cubes' features are joined, in the order shown, and a head tells which of K
    permutations was used (any two of which differ in most places, so that no detail of one cube decides),
    or the place of each cube. With `turns`, cubes are also turned by 180 degrees, which two more heads
    tell (Rubik's cube); with `masks` parts of some are blanked out, which another tells (Rubik's cube+).

    By default, without turns and masks, it is a plain jigsaw: Noroozi, Favaro: Unsupervised Learning of
    Visual Representations by Solving Jigsaw Puzzles, ECCV 2016 (arXiv:1603.09246); in 3D Taleb et al.: 3D
    Self-Supervised Methods for Medical Imaging, NeurIPS 2020 (arXiv:2006.03829). With `turns H W` it is
    Zhuang, Li, Hu, Ma, Yang, Zheng: Self-supervised Feature Learning for 3D Medical Images by Playing a
    Rubik's Cube, MICCAI 2019 (arXiv:1910.02241), and with masks too Zhu, Li, Hu, Ma, Zhou, Zheng: Rubik's
    Cube+, Medical Image Analysis 2020. Widths of the heads after Zhang, Li, Zhou, Wang: A review of
    self-supervised, generative, and few-shot deep learning methods for data-limited magnetic resonance
    imaging, and its code Medical-SSL (arXiv:2209.12157), whose appendix finds that one more layer in the
    heads of the turns collapses training.

    Differs from all of them: permutations of a guaranteed least distance (PGL(2, 7) for 8 cubes: 6 of the
    8 places; the greedy sets in use have 2), so that no two cubes decide; jitter beside the gap, and
    intensities normalised, detrended and changed per cube, so that neither borders nor brightness give
    places away; optionally places instead of permutations. Differs from the jigsaws: 2 x 2 x 2 cubes, for
    which small scans have room, instead of 3 x 3 pieces or 3 x 3 x 3 cubes (`grid`); Taleb et al. cut from
    whole volumes of 128³, without a gap, and have wider heads with dropout. Differs from the Rubik's
    cubes: a gap of 3 voxels and a jitter of 3, where theirs is about 10, as crops are small; both turns of
    a cube are drawn independently, so that chance is one half (in Medical-SSL a cube has one turn or
    none); AdamW instead of Adam.

    An example whose known cubes fit more than one permutation is undecidable; it does not train the
    order and counts in `undecidable` (and, as it falls, in `order_accuracy`).
    """

    Config = CubeOrderingConfig
    paper: ClassVar[str] = (
        "Taleb et al.: 3D Self-Supervised Methods for Medical Imaging, NeurIPS 2020 (jigsaw); with turns "
        "Zhuang, Li, Hu, Ma, Yang, Zheng: Self-supervised Feature Learning for 3D Medical Images by "
        "Playing a Rubik's Cube, MICCAI 2019"
    )
    main: ClassVar[str] = "order_accuracy"
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 16, "lr": 1e-3, "steps": 600}

    def __init__(self, config: CubeOrderingConfig, encoder: Encoder) -> None:
        """Add the layer of the cubes and the heads.

        Raises:
            UsageError: The cubes are so small that some taps of the encoder's kernels never see data.
        """
        super().__init__(config, encoder)
        _check_size(config, encoder)
        self.reduce = nn.Sequential(
            projection_head(encoder.embed_dim, config.features, config.features, 1, config.head_norm),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({"volume": _Heads(config, image=False)})

    def setup(self, data: Collection) -> None:
        """Add heads for images (D = 1), where there are any and they need their own."""
        # Where the grid cuts along D only, an image is one cube without an order: `draw` sets it aside.
        own = _images_differ(self.config) and math.prod(_grid(self.config, image=True)) > 1
        flat = {own and int(shape[1]) == 1 for shape in data.shapes}
        if True in flat:
            self.heads["image"] = _Heads(self.config, image=True)
        if False not in flat:
            del self.heads["volume"]

    @classmethod
    def draw(
        cls, config: CubeOrderingConfig, volume: Volume, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Cut `cubes` (K, C, d, h, w), in the order of their places: D, then H, then W.

        `extent` (3,) is how much of a cube, in its middle, was cut from the volume; the rest is padding.
        `filled` (K,) says which have enough foreground. `spacing` (3,) is in mm.

        Raises:
            DataError: The volume has no foreground, or no room for so many cubes.
        """
        grid, cube, gaps, extent = _layout(config, volume)
        jitter = np.where(np.array(grid) == 1, 0, config.jitter)
        cells = np.asarray(extent) + gaps + jitter
        region = [int(n) for n in cells * grid]
        steps = np.array(list(itertools.product(*map(range, grid))))
        best: tuple[Any, ...] = ()
        for _ in range(_TRIES):
            start = np.array(draw_crop(volume, region, rng, config.min_foreground))
            moved = rng.integers(0, jitter + 1, size=steps.shape)
            places = start + steps * cells + gaps // 2 + moved
            shares = foreground_shares(volume, places, extent)
            filled = (shares >= config.min_foreground - 1e-9) & ~centres_ignored(volume, places, extent)
            rank = (int(filled.sum()), float(shares.min()))
            if not best or rank > best[0]:
                best = (rank, start, places, filled)
            if filled.all():
                break
        _, start, places, filled = best
        crop = volume.read([int(n) for n in start], region)
        cubes = torch.zeros(len(places), len(crop), *cube)
        inside = tuple(slice((n - m) // 2, (n + m) // 2) for n, m in zip(cube, extent))
        for i, corner in enumerate(places - start):
            window = tuple(slice(int(a), int(a) + n) for a, n in zip(corner, extent))
            cubes[i][:, inside[0], inside[1], inside[2]] = crop[:, window[0], window[1], window[2]]
        return {
            "cubes": cubes,
            "extent": torch.tensor(extent),
            "filled": torch.from_numpy(filled),
            "spacing": torch.tensor(volume.spacing, dtype=torch.float32),
        }

    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Prepare and shuffle the cubes (B, K, C, d, h, w), and ask for their order."""
        config, cubes = self.config, batch["cubes"]
        examples, count = cubes.shape[:2]
        image = _is_image(config, cubes)
        heads = self._heads(image)
        with torch.no_grad(), torch.autocast(cubes.device.type, enabled=False):
            cubes, flat = self._prepare(cubes, batch["extent"], batch["spacing"], rng)
            asked, order = self._shuffle(heads, rng, count)
            rows = torch.arange(examples, device=cubes.device).unsqueeze(1)
            shown, filled = cubes[rows, order], (batch["filled"] & ~flat)[rows, order]
            shown, turned = _turn(shown, heads.axes, rng)
            shown, masked = self._mask(shown, rng)
        embedded = self.encoder.embed(shown.flatten(0, 1))
        with torch.autocast(cubes.device.type, enabled=False):
            joined = self.reduce(embedded.float()).view(examples, -1)
            logits = heads.order(joined)
            if config.target == "permutation":
                decidable = ~heads.ambiguous(order, filled)
                terms = functional.cross_entropy(logits, asked, reduction="none") * decidable
                places = heads.table[logits.detach().argmax(1)]
            else:
                decidable = (~filled).sum(1) < 2
                logits = logits.view(examples, count, count)
                terms = functional.cross_entropy(logits.flatten(0, 1), order.flatten(), reduction="none")
                terms = terms.view_as(filled) * filled
                places = assign(logits)
            loss = terms.mean()
            right = places == order
            metrics = {
                "order_accuracy": right.all(1).float().mean(),
                "chance": loss.new_tensor(heads.chance),
                "undecidable": (~decidable).float().mean(),
            }
            if config.target == "position":
                metrics["placed"] = right.float().mean()
                metrics["placed_chance"] = loss.new_tensor(1 / count)
            asides = [(heads.turns[i], turned[i], f"turned_{axis}") for i, axis in enumerate(heads.axes)]
            if heads.masked is not None and masked is not None:
                asides.append((heads.masked, masked, "masked"))
            for head, truth, name in asides:
                logit = head(joined)
                side = functional.binary_cross_entropy_with_logits(logit, truth.float(), reduction="none")
                loss = loss + config.side_weight * (side * filled).mean()
                hits = ((logit.detach() > 0) == truth) & filled
                metrics[f"{name}_accuracy"] = hits.sum() / filled.sum().clamp_min(1)
        first = [x[0].detach() for x in (shown, order, places)]
        cells = _grid(config, image)
        return StepOutput(loss, metrics, lambda: _picture(first[0], first[1], first[2], cells))

    def _heads(self, image: bool) -> _Heads:
        name = "image" if image and _images_differ(self.config) else "volume"
        if name not in self.heads:
            raise UsageError(
                f"cube_ordering was set up without {name}s, and now gets one; train with both, or apart"
            )
        return cast(_Heads, self.heads[name])

    def _shuffle(self, heads: _Heads, rng: BatchRng, count: int) -> tuple[Tensor, Tensor]:
        """Draw the permutation that is asked (B,), and the place that each slot's cube came from (B, K)."""
        if self.config.target == "position":
            order = rng.permutation(count)
            return order[:, 0], order
        asked = rng.integers(0, len(heads.table))
        return asked, heads.table[asked]

    def _prepare(
        self, cubes: Tensor, extent: Tensor, spacing: Tensor, rng: BatchRng
    ) -> tuple[Tensor, Tensor]:
        """Standardise and augment each cube on its own, padding being 0; say which show nothing, (B, K)."""
        config, size = self.config, cubes.shape[3:]
        x, inside = cubes.float(), torch.ones((), device=cubes.device)
        coordinates = []
        for axis, n in enumerate(size):
            shape = [1] * 6
            shape[axis + 3] = n
            place = torch.arange(n, device=x.device, dtype=torch.float32) - (n - 1) / 2
            coordinates.append(place.view(shape))
            inside = inside * (coordinates[-1].abs() < extent[:, axis].view(-1, 1, 1, 1, 1, 1) / 2)
        dims, voxels = (3, 4, 5), extent.prod(1).view(-1, 1, 1, 1, 1, 1)
        mean = (x * inside).sum(dims, keepdim=True) / voxels
        spread = ((x - mean).square() * inside).sum(dims, keepdim=True) / voxels
        level = mean.abs() * 1e-6 + 1e-12
        flat = (spread.sqrt() <= level).flatten(2).all(2)
        x = (x - mean) * inside
        if config.detrend:
            for place in coordinates:
                squares = (place.square() * inside).sum(dims, keepdim=True)
                x = x - (x * place).sum(dims, keepdim=True) / squares.clamp_min(1e-6) * place * inside
        if config.normalize:
            spread = x.square().sum(dims, keepdim=True) / voxels
            least = spread.mean(1, keepdim=True).sqrt() * _FAINT
            x = x / torch.maximum(spread.sqrt(), least).clamp_min(1e-6)
        else:
            x = x + mean * inside
        if self.training and config.chance:
            views = Views(
                chance=config.chance, flip=0.0, turn=0.0, rotate=0.0, scale=0.0, blur=0.0,
                bias=config.bias, gamma=config.gamma, contrast=config.contrast, noise=config.noise,
            )  # fmt: skip
            count = x.shape[1]
            mm = spacing.repeat_interleave(count, 0)
            x = augment(views, x.flatten(0, 1), ViewRng(rng, count), size, mm, axes=()).view_as(x) * inside
        return x, flat

    def _mask(self, cubes: Tensor, rng: BatchRng) -> tuple[Tensor, Tensor | None]:
        """Mask a share of every second cube (B, K, C, d, h, w), and say of which ones, (B, K)."""
        config, (count, _, *size) = self.config, cubes.shape[1:]
        if config.masks == "none":
            return cubes, None
        chosen = rng.chance(0.5, count)
        if config.masks == "voxels":
            blank = rng.chance(config.mask_share, count, 1, *size)
        else:
            blank = torch.ones((), dtype=torch.bool, device=cubes.device)
            side = config.mask_share ** (1 / sum(n > 1 for n in size))
            corners = rng.uniform(count, 3)
            for axis, n in enumerate(size):
                length = max(1, round(side * n)) if n > 1 else 1
                first = (corners[..., axis] * (n - length + 1)).floor()[:, :, None]
                place = torch.arange(n, device=cubes.device)
                shape = [len(cubes), count, 1, 1, 1, 1]
                shape[axis + 3] = n
                blank = blank & ((place >= first) & (place < first + length)).view(shape)
        hidden = blank & chosen[:, :, None, None, None, None]
        return cubes.masked_fill(hidden, 0.0), chosen


class _Heads(nn.Module):
    """Heads on the joined features (B, K x F) of one kind of examples: order, turns, masks.

    Attributes:
        table: Place that each slot's cube came from, (permutations, K); a buffer.
        chance: Chance of telling the whole order by guessing.
        axes: Axes of the turns.
    """

    table: Tensor

    def __init__(self, config: CubeOrderingConfig, image: bool) -> None:
        super().__init__()
        count = math.prod(_grid(config, image))
        width = count * config.features
        flat = image or config.cube[0] == 1
        # In a plane, only the turn about D is one: those about H and W would be mirrors.
        self.axes = ("D",) * bool(config.turns) if flat else config.turns
        if config.target == "permutation":
            self.permutations: PermutationSet | None = permutation_set(count, config.permutations)
            table = torch.tensor(self.permutations.table)
            outputs = len(table)
            self.chance = 1 / outputs
        else:
            self.permutations, table = None, torch.arange(count)[None]
            outputs, self.chance = count * count, 1 / math.factorial(count)
        self.register_buffer("table", table)
        hidden = config.hidden
        self.order = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs),
        )
        self.turns = nn.ModuleList(_shallow(width, hidden, count) for _ in self.axes)
        self.masked = None if config.masks == "none" else _shallow(width, hidden, count)

    def extra_repr(self) -> str:
        """Describe the permutations and the least distance between two."""
        if self.permutations is None:
            return "places"
        table, distance, construction = self.permutations
        return f"{len(table)} permutations, {construction}, min_distance={distance}"

    def ambiguous(self, order: Tensor, filled: Tensor) -> Tensor:
        """Tell whether another permutation puts all filled cubes at the same places: (B,)."""
        fits = (self.table == order.unsqueeze(1)) | ~filled.unsqueeze(1)
        return fits.all(2).sum(1) > 1


def assign(logits: Tensor) -> Tensor:
    """Assign slots with logits (B, K, places) to their most likely places (B, K), no two equal.

    Solves the linear assignment of log-probabilities.
    """
    from scipy.optimize import linear_sum_assignment

    scores = logits.detach().float().log_softmax(2).cpu().numpy()
    places = np.stack([linear_sum_assignment(table, maximize=True)[1] for table in scores])
    return torch.from_numpy(places).to(logits.device)


def _shallow(width: int, hidden: int, out: int) -> nn.Module:
    """Make a head of a yes or no per cube; one more layer is known to collapse training."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))


def _turn(cubes: Tensor, axes: Sequence[str], rng: BatchRng) -> tuple[Tensor, list[Tensor]]:
    """Turn half of the cubes (B, K, C, d, h, w) by 180 degrees about each axis; say which (B, K)."""
    turned = []
    for name in axes:
        chosen = rng.chance(0.5, cubes.shape[1])
        others = [axis + 3 for axis in range(3) if _AXES[axis] != name]
        cubes = torch.where(chosen[:, :, None, None, None, None], cubes.flip(others), cubes)
        turned.append(chosen)
    return cubes, turned


def _images_differ(config: CubeOrderingConfig) -> bool:
    """Tell whether images need heads of their own: with fewer cubes than volumes, or other turns."""
    return config.grid[0] > 1 or (config.crop[0] > 1 and bool(config.turns))


def _is_image(config: CubeOrderingConfig, cubes: Tensor) -> bool:
    """Tell whether cubes (B, K, C, d, h, w) are those of images.

    Their number tells where volumes are cut along D: a volume's cubes may be one slice deep as well.
    """
    if config.grid[0] > 1:
        return cubes.shape[1] < math.prod(config.grid)
    return cubes.shape[3] == 1


def _grid(config: CubeOrderingConfig, image: bool) -> tuple[int, int, int]:
    """Return the numbers of cubes along D H W; an image is not cut along D."""
    return (1, *config.grid[1:]) if image else config.grid


def _layout(
    config: CubeOrderingConfig, volume: Volume
) -> tuple[tuple[int, int, int], list[int], np.ndarray, list[int]]:
    """Lay out a volume: grid, size of a cube, gaps, and the part of a cube that it has room for, voxels.

    Raises:
        DataError: There is room for less than a third of a cube, or an image and a grid that is cut along D
            only.
    """
    _, *sides = volume.shape
    grid, cube = _grid(config, sides[0] == 1), list(fit_size(volume, config.cube))
    if sides[0] == 1 and math.prod(grid) < 2:
        raise DataError(
            f"{volume.id}: an image is not cut along D, which leaves one cube of grid {config.grid}; "
            "ask for several along H or W"
        )
    gaps, extent = [], []
    for axis in range(3):
        millimetres = math.ceil(config.gap_mm / volume.spacing[axis] - 1e-6)
        gap = 0 if grid[axis] == 1 else max(config.gap, millimetres)
        room = sides[axis] // grid[axis] - (gap + config.jitter if grid[axis] > 1 else 0)
        fits = min(cube[axis], room)
        fits -= (cube[axis] - fits) % 2  # padded alike on both sides, or a turn would be seen by it
        if fits < 1 or fits < -(-cube[axis] // _LEAST):
            need = grid[axis] * (-(-cube[axis] // _LEAST) + gap + config.jitter * (grid[axis] > 1))
            raise DataError(
                f"{volume.id}: {grid[axis]} cubes along {_AXES[axis]} need {need} voxels at least, the "
                f"volume has {sides[axis]}; ask for a grid with fewer cubes, a smaller crop, gap or jitter"
            )
        gaps.append(gap)
        extent.append(fits)
    return grid, cube, np.array(gaps), extent


def _check_size(config: CubeOrderingConfig, encoder: Encoder) -> None:
    kind, strides = getattr(encoder.config, "kind", ""), encoder.strides[-1]
    axes = {"3d": (0, 1, 2), "p3d": (0, 1, 2), "acs": (1, 2), "2.5d": (1, 2)}.get(kind, ())
    for axis in axes:
        if config.cube[axis] <= strides[axis] and config.crop[axis] > 1:
            raise UsageError(
                f"cubes of {config.cube[axis]} voxels along {_AXES[axis]} (crop {config.crop[axis]}, grid "
                f"{config.grid[axis]}, gap {config.gap}, jitter {config.jitter}), but kernels of kind "
                f"{kind} at a stride of {strides[axis]} learn nothing off their centre from fewer than "
                f"{strides[axis] + 1}: take a larger crop, fewer cubes, or strides of 1"
            )


def _picture(cubes: Tensor, order: Tensor, places: Tensor, grid: Sequence[int]) -> Figure:
    """Show the middle slices of one crop's cubes: as shuffled, at their predicted and at their true places.

    Layers along D stand side by side; a cube's number is its true place, red where it is not there.
    """
    from matplotlib.figure import Figure

    depth, high, wide = grid
    middle = cubes[:, 0, cubes.shape[2] // 2].float().cpu().numpy()
    true, guessed = order.tolist(), places.tolist()
    slots = list(range(len(true)))
    figure = Figure(
        figsize=(max(4.5, 0.75 * (wide * depth + depth)), 0.3 + 2.4 * high), layout="constrained"
    )
    panels = figure.subplots(3, 1)
    limits = np.percentile(middle, (1, 99))
    for panel, (name, at) in zip(panels, (("shown", slots), ("predicted", guessed), ("true", true))):
        _montage(panel, middle, at, true, (depth, high, wide), limits, mark=name == "predicted")
        panel.set_ylabel(name)
    return figure


def _montage(
    panel: Axes,
    images: np.ndarray,
    at: Sequence[int],
    true: Sequence[int],
    grid: tuple[int, int, int],
    limits: np.ndarray,
    mark: bool,
) -> None:
    """Draw images (K, h, w) at places of the grid."""
    from matplotlib.patches import Rectangle

    _, high, wide = grid
    tall, broad = images.shape[1:]
    pad = max(1, max(tall, broad) // 8)
    for image, place, truth in zip(images, at, true):
        layer, rest = divmod(place, high * wide)
        row, column = divmod(rest, wide)
        left = layer * (wide * (broad + pad) + 2 * pad) + column * (broad + pad)
        top = row * (tall + pad)
        low, top_value = float(limits[0]), max(float(limits[1]), float(limits[0]) + 1e-6)
        panel.imshow(
            image, cmap="gray", vmin=low, vmax=top_value, extent=(left, left + broad, top + tall, top)
        )
        colour = "red" if mark and place != truth else "limegreen" if mark else "gold"
        panel.add_patch(Rectangle((left, top), broad, tall, fill=False, edgecolor=colour, linewidth=1.5))
        panel.text(left + 1, top + 1, str(truth + 1), color=colour, fontsize=8, va="top")
    panel.set_xlim(-pad, grid[0] * (wide * (broad + pad) + 2 * pad) - 2 * pad)
    panel.set_ylim(high * (tall + pad), -pad)
    panel.set_aspect("equal")
    panel.set_xticks([])
    panel.set_yticks([])
