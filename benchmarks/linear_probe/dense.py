"""Dense probe: a 1 x 1 x 1 convolution on frozen feature maps, up-sampled to the voxels; Dice per subject.

Linear interpolation and a 1 x 1 x 1 convolution commute, so the convolution is applied to each map at its
own resolution and only its few channels are up-sampled; the concatenated maps at full resolution never
exist. Training sees the maps at sampled voxels, interpolated there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssl3d.api import DataError, UsageError, autocast, class_values, metric_name, numpy_rng, upsample
from ssl3d_benchmarks.task import ignored_values
from ssl3d_benchmarks.trivial_rows import intensity_maps

if TYPE_CHECKING:
    from ssl3d.api import Collection, Contestant, Encoder, Volume
    from ssl3d_benchmarks.linear_probe.config import LinearProbeConfig

Array = NDArray[Any]
Triple = tuple[int, int, int]

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)
"""L2 tried, strong first, each starting from the last; the validation subjects choose."""
USUAL = 1e-2
"""L2 where there are no validation subjects."""
KEPT_BYTES = 10**9
"""Most bytes of sampled features, and of test maps, that are kept in memory for a contestant; beyond it
fewer voxels are drawn from each volume, and maps are computed anew."""
RIM = 3
"""Voxels round the objects that make a stratum of their own: the hard part of the background."""


# Maps and voxels ----------------------------------------------------------------------------------


def feature_maps(encoder: Encoder, image: Tensor, window: Sequence[int]) -> list[Tensor]:
    """Compute the feature maps of a whole volume, window by window if it is large.

    Windows begin at multiples of the deepest stride, so that their maps lie on one grid; each gives its
    core, the quarter window round it being there for context only, where the window is three strides wide.
    A window of depth 1 is an image: slices are encoded on their own, and no map strides along D
    (`strides_of`).

    Args:
        encoder: Encoder in evaluation mode.
        image: Volume of intensities (C, D, H, W).
        window: Largest input along D, H, W.

    Raises:
        UsageError: The window is smaller than the deepest stride.
    """
    if window[0] == 1 and image.shape[1] > 1:
        slices = [feature_maps(encoder, plane.unsqueeze(1), window) for plane in image.unbind(1)]
        return [torch.cat(maps, dim=1) for maps in zip(*slices, strict=True)]
    deepest = [max(stride[axis] for stride in encoder.strides) for axis in range(3)]
    tiles = [_tiles(n, w, s) for n, w, s in zip(image.shape[1:], window, deepest, strict=True)]
    if all(len(axis) == 1 for axis in tiles):
        return [m[0].float() for m in encoder(image[None])]
    whole_maps = [
        image.new_zeros(c, *(-(-n // s) for n, s in zip(image.shape[1:], stride, strict=True)))
        for c, stride in zip(encoder.channels, encoder.strides, strict=True)
    ]
    for tile in itertools.product(*tiles):
        cut = (slice(None), *(slice(first, last) for _, _, first, last in tile))
        for out, map_, stride in zip(whole_maps, encoder(image[cut][None]), encoder.strides, strict=True):
            to: tuple[slice, ...] = (slice(None),)
            take: tuple[slice, ...] = (slice(None),)
            for (begin, end, first, _), s in zip(tile, stride, strict=True):
                low, high = begin // s, -(-end // s)
                to += (slice(low, high),)
                take += (slice(low - first // s, high - first // s),)
            out[to] = map_[0][take].float()
    return whole_maps


def strides_of(encoder: Encoder, window: Sequence[int]) -> list[Triple]:
    """Return the strides (D, H, W) of the maps that `feature_maps` makes; slices are not strided over."""
    return [(1 if window[0] == 1 else d, h, w) for d, h, w in encoder.strides]


def _tiles(length: int, window: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Return, along one axis, the begin and end of each core and of what is read for it."""
    if length <= window:
        return [(0, length, 0, length)]
    if window < stride:
        raise UsageError(
            f"--window: {window} voxels of a volume of {length}, but the encoder strides by {stride}: take "
            f"{stride} or more (1 along D for slices, each on its own)"
        )
    core, rim = window // stride * stride, 0
    if window >= 3 * stride:
        core = max(window // 2 // stride, 1) * stride
        rim = max(window // 4 // stride, 1) * stride
    return [
        (begin, min(begin + core, length), max(begin - rim, 0), min(begin + core + rim, length))
        for begin in range(0, length, core)
    ]


def _neighbours(positions: Tensor, stride: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cells below and above voxel positions along an axis, and the share of the upper one.

    As `ssl3d.api.upsample` has it: cell i of a map lies on voxel i x stride.
    """
    place = (positions.float() / stride).clamp(max=size - 1)
    low = place.floor().long()
    return low, (low + 1).clamp(max=size - 1), place - low


def at_voxels(map_: Tensor, stride: Triple, points: Tensor) -> Tensor:
    """Interpolate the map (C, d, h, w) at voxels (n, 3) only, as `ssl3d.api.upsample` does; (n, C)."""
    axes = [_neighbours(points[:, a], stride[a], map_.shape[1 + a]) for a in range(3)]
    rows = map_.flatten(1).T
    values = rows.new_zeros(len(points), rows.shape[1])
    for corner in itertools.product((0, 1), repeat=3):
        weight = torch.ones(len(points), device=map_.device)
        index = torch.zeros(len(points), dtype=torch.long, device=map_.device)
        for (low, high, share), upper, size in zip(axes, corner, map_.shape[1:], strict=True):
            weight = weight * (share if upper else 1 - share)
            index = index * size + (high if upper else low)
        values += weight[:, None] * rows[index]
    return values


# Features of one contestant -----------------------------------------------------------------------


@dataclass
class Samples:
    """Sampled voxels of one volume.

    Attributes:
        features: Features of the voxels (n, F).
        labels: Class indices (n,).
        weights: Share of the volume that each voxel stands for (n,), sum 1.
    """

    features: Tensor
    labels: Tensor
    weights: Tensor


class DenseFeatures:
    """Sampled voxels and whole maps of one contestant's volumes, computed on demand and kept.

    Kept in memory only: an encoder pass over a volume takes less time than reading its maps from disk.

    Args:
        contestant: Contestant with an encoder, or the trivial row of intensities.
        data: Collection of all volumes that will be asked for.
        config: Resolved options of the benchmark.
        report: Function called with (done, total) as volumes are encoded.
    """

    def __init__(
        self,
        contestant: Contestant,
        data: Collection,
        config: LinearProbeConfig,
        report: Callable[[int, int], None] | None = None,
    ):
        self.encoder, self.config, self.report = contestant.encoder, config, report
        self.strides: list[Triple] = [(1, 1, 1)]
        if self.encoder is not None:
            self.strides = strides_of(self.encoder, config.window)
        self.values = torch.tensor([int(name) for name in config.classes])
        self._ignored = ignored_values(data)
        self.total = len(data)
        self._samples: dict[int, Samples] = {}
        self._maps: dict[int, list[Tensor]] = {}
        self._free = KEPT_BYTES
        self._seen: set[int] = set()

    def maps(self, volume: Volume) -> list[Tensor]:
        """Return the feature maps of a volume."""
        if volume.index in self._maps:
            return self._maps[volume.index]
        with torch.inference_mode():
            if self.encoder is None:
                maps = [intensity_maps(volume.read())]
            else:
                device = next(iter(self.encoder.parameters())).device
                with autocast(device, self.config.precision):
                    maps = feature_maps(self.encoder, volume.read().to(device), self.config.window)
        self._seen.add(volume.index)
        if self.report is not None and len(self._seen) <= self.total:
            self.report(len(self._seen), self.total)
        return maps

    def keep(self, volume: Volume) -> list[Tensor]:
        """Return the feature maps of a test volume, kept for the next subsets of the training data."""
        maps = self.maps(volume)
        size = sum(m.numel() * m.element_size() for m in maps)
        if volume.index not in self._maps and size <= self._free:
            self._maps[volume.index] = maps
            self._free -= size
        return maps

    def samples(self, volume: Volume) -> Samples:
        """Return the training voxels of the volume, the same for every contestant."""
        if volume.index not in self._samples:
            maps = self.maps(volume)
            channels = sum(m.shape[0] for m in maps)
            most = max(64, min(self.config.samples, KEPT_BYTES // (4 * channels * self.total)))
            labels = self.labels(volume)
            points, weights = sample_voxels(labels, most, (volume.dataset, volume.id))
            chosen = torch.from_numpy(points).to(maps[0].device)
            features = torch.cat(
                [at_voxels(m, s, chosen) for m, s in zip(maps, self.strides, strict=True)], dim=1
            )
            self._samples[volume.index] = Samples(
                features,
                torch.from_numpy(labels[tuple(points.T)]).to(features.device),
                torch.from_numpy(weights).to(features),
            )
        return self._samples[volume.index]

    def labels(self, volume: Volume) -> Array:
        """Return the class index of every voxel (D, H, W), -1 where nobody annotated it."""
        mask = volume.read_mask().numpy()
        indices = np.searchsorted(self.values.numpy(), mask)
        return np.where(mask == self._ignored.get(volume.dataset, -1), -1, indices)


def sample_voxels(labels: Array, number: int, seed: object) -> tuple[Array, Array]:
    """Draw voxels (n, 3), as many of each class, of the rim and of the rest, with their shares (n,).

    Voxels of class -1, which nobody annotated, are never drawn.

    With these weights a loss over the sample estimates, without bias, the loss over the whole volume;
    small classes and the hard background at their border are seen as often as the easy rest.
    """
    from scipy import ndimage

    strata = labels.astype(np.int64) + 1
    objects = labels > 0
    if objects.any():
        strata[ndimage.binary_dilation(objects, iterations=RIM) & ~objects] = 0
    strata[labels < 0] = -1
    rng = numpy_rng("dense samples", seed)
    kinds = np.unique(strata[strata >= 0])
    if not len(kinds):
        return np.zeros((0, 3), np.int64), np.zeros(0)
    points, weights = [], []
    for kind in kinds:
        members = np.flatnonzero(strata == kind)
        size = min(len(members), max(1, number // len(kinds)))
        drawn = rng.choice(members, size, replace=False)
        points.append(np.stack(np.unravel_index(drawn, labels.shape), axis=1))
        weights.append(np.full(size, len(members) / size / labels.size))
    return np.concatenate(points), np.concatenate(weights)


# The head -----------------------------------------------------------------------------------------


@dataclass
class Head:
    """A 1 x 1 x 1 convolution on raw (not standardised) maps.

    Attributes:
        weight: Weight of each channel for each class (K, F).
        bias: Bias of each class (K,).
    """

    weight: Tensor
    bias: Tensor

    def logits(self, maps: Sequence[Tensor], strides: Sequence[Triple], shape: Sequence[int]) -> Tensor:
        """Compute the logits (K, *shape): convolve each map at its resolution, up-sample and add."""
        total = self.bias[:, None, None, None].expand(-1, *shape)
        first = 0
        for map_, stride in zip(maps, strides, strict=True):
            weight = self.weight[:, first : first + map_.shape[0]]
            total = total + upsample(torch.einsum("kc,cdhw->kdhw", weight, map_)[None], shape, stride)[0]
            first += map_.shape[0]
        return total


def fit_head(
    train: Sequence[Samples], val: Sequence[Samples], classes: int, iterations: int
) -> tuple[Head, float, float | None]:
    """Fit a head to sampled voxels by cross-entropy and soft Dice, and choose L2 by the validation Dice.

    Args:
        train: Samples of each training volume.
        val: Samples of each validation volume; may be empty.
        classes: Number of classes K.
        iterations: Number of L-BFGS iterations over all strengths of L2 together.

    Returns:
        The head, its L2, and its Dice on the validation samples (None without).
    """
    x, y, w, v = _joined(train)
    # Standardised by the voxels' own shares: mean and deviation over the whole training volumes.
    share = (w / w.sum())[:, None]
    centre = (share * x).sum(dim=0)
    scale = (share * (x - centre) ** 2).sum(dim=0).sqrt()
    scale = torch.where(scale > 1e-6 * (1 + centre.abs()), scale, torch.full_like(scale, torch.inf))
    x = (x - centre).div_(scale)
    truth = F.one_hot(y, classes).to(x)
    volumes = len(train)
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    present = _per_volume(w[:, None] * truth, v, volumes)[:, 1:] > 0
    best: tuple[float, Head, float] | None = None
    strengths = STRENGTHS if val else STRENGTHS[: STRENGTHS.index(USUAL) + 1]
    for l2 in strengths:
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=-(-iterations // len(strengths)),
            history_size=10,
            line_search_fn="strong_wolfe",
            tolerance_change=1e-6,
        )

        def closure(l2: float = l2) -> Tensor:
            weight.grad = bias.grad = None
            logits = x @ weight.T + bias
            entropy = (w * F.cross_entropy(logits, y, reduction="none")).sum() / volumes
            probability = logits.softmax(dim=1)
            both = _per_volume(w[:, None] * probability * truth, v, volumes)
            sizes = _per_volume(w[:, None] * (probability + truth), v, volumes)
            dice = (2 * both / sizes.clamp(min=1e-12))[:, 1:][present].mean()
            loss = entropy + (1 - dice) + l2 * weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        with torch.no_grad():
            raw = weight.detach() / scale
            head = Head(raw.clone(), bias.detach() - raw @ centre)
        score = sampled_dice(head, val, classes) if val else 0.0
        if best is None or score >= best[0] or not val:
            best = (score, head, l2)
    assert best is not None
    return best[1], best[2], best[0] if val else None


def sampled_dice(head: Head, samples: Sequence[Samples], classes: int) -> float:
    """Estimate the mean foreground Dice of volumes from their weighted voxels."""
    values = []
    for sampled in samples:
        predicted = (sampled.features @ head.weight.T + head.bias).argmax(dim=1)
        for k in range(1, classes):
            truth, hit = sampled.labels == k, predicted == k
            size = float((sampled.weights * (truth.float() + hit.float())).sum())
            if truth.any():
                values.append(2 * float((sampled.weights * (truth & hit)).sum()) / size)
    return float(np.mean(values)) if values else 0.0


def fit_dense(
    dense: DenseFeatures,
    train: Collection,
    val: Collection,
    test: Collection,
    config: LinearProbeConfig,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Fit on `train`, choose L2 on `val`, and return the Dice of every class and test volume.

    Raises:
        DataError: The training masks hold no object.
    """
    head, l2, chosen_by = _head(dense, train, val, config)
    rows = []
    for volume in test:
        truth = dense.labels(volume)
        predicted = np.where(truth < 0, -1, _predict(dense, head, volume, dense.keep(volume)))
        rows.append(
            {
                "dataset": volume.dataset,
                "subject": volume.subject,
                "id": volume.id,
                "dice": {
                    name: dice(predicted == k, truth == k) for k, name in enumerate(config.classes) if k > 0
                },
                **_own_metrics(config, predicted, truth, volume.spacing),
            }
        )
    details: dict[str, Any] = {"l2": l2, "features": head.weight.shape[1], "train_volumes": len(train)}
    if chosen_by is not None:
        details["validation"] = {"dice": chosen_by}
    return rows, details


def _own_metrics(
    config: LinearProbeConfig, predicted: Array, truth: Array, spacing: Sequence[float]
) -> dict[str, dict[str, float | None]]:
    """Compute the user's metrics of a volume, by name and class."""
    scores: dict[str, dict[str, float | None]] = {metric_name(spec): {} for spec in config.metric}
    for k, name in list(enumerate(config.classes))[1:]:
        for metric, value in class_values(config.metric, predicted == k, truth == k, spacing).items():
            scores[metric][name] = value
    return scores


def predict_masks(
    dense: DenseFeatures, train: Collection, val: Collection, shown: Collection, config: Any, seed: int
) -> list[Array]:
    """Predict the class indices (D, H, W) of some volumes by a head fitted as for the scores."""
    head, _, _ = _head(dense, train, val, config)
    return [_predict(dense, head, volume, dense.maps(volume)) for volume in shown]


def _head(
    dense: DenseFeatures, train: Collection, val: Collection, config: LinearProbeConfig
) -> tuple[Head, float, float | None]:
    samples = [dense.samples(volume) for volume in train]
    if not any(bool((sampled.labels > 0).any()) for sampled in samples):
        raise DataError(f"the masks of all {len(train)} training volumes are empty")
    checked = [dense.samples(volume) for volume in val]
    return fit_head(samples, checked, len(config.classes), config.iterations)


def _predict(dense: DenseFeatures, head: Head, volume: Volume, maps: Sequence[Tensor]) -> Array:
    with torch.inference_mode():
        logits = head.logits(maps, dense.strides, volume.shape[1:])
        return logits.argmax(dim=0).cpu().numpy()


def dice(predicted: Array, truth: Array) -> float | None:
    """Compute the Dice of two masks, 2 |A and B| / (|A| + |B|); None where both are empty.

    Example:
        >>> dice(np.array([True, True, False]), np.array([True, False, False]))
        0.6666666666666666
    """
    size = int(predicted.sum()) + int(truth.sum())
    return None if size == 0 else 2 * int((predicted & truth).sum()) / size


def _joined(samples: Sequence[Samples]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.cat([sampled.features for sampled in samples])
    y = torch.cat([sampled.labels for sampled in samples])
    w = torch.cat([sampled.weights for sampled in samples])
    sizes = torch.tensor([len(sampled.labels) for sampled in samples])
    return x, y, w, torch.repeat_interleave(torch.arange(len(samples)), sizes).to(x.device)


def _per_volume(rows: Tensor, volume: Tensor, volumes: int) -> Tensor:
    """Sum rows (n, K) over the volume that each belongs to (volumes, K)."""
    return rows.new_zeros(volumes, rows.shape[1]).index_add(0, volume, rows)
