"""Med3D: segment many data sets at once, each with a branch of its own on the one encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl3d.api import (
    BatchRng,
    DataError,
    Encoder,
    Proxy,
    StepOutput,
    Views,
    augment_labelled,
    centre_crop,
    conv3x3x3,
    dataset_labels,
    draw_labelled,
    fit_size,
    norm,
    read_labelled,
    upsample,
    view_margin,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.api import Collection, Volume

UNKNOWN = -1
"""Class of a voxel whose value no training mask has; neither learned nor counted."""
_SHOWN = 2  # examples of each data set in a picture
_WIDTH = 32  # channels of the released head


@dataclass
class Med3DConfig(Views):
    """Options of the Med3D proxy.

    Attributes:
        crop: Size of the crops along D H W, in voxels; images (D = 1) give crops of depth 1.
        head: Branch of each data set: paper, a 1x1x1 convolution of the deepest feature map, or conv_seg,
            the released demo's head (transposed convolution, 3x3x3 and 1x1x1 convolutions, 32 channels);
            the output of either is brought to the crop's voxels.
        head_norm: Norm of the head conv_seg: batch (the released one's), group or instance.
        loss: Loss of a crop: ce (cross entropy over all voxels, the paper's), dice (soft Dice over the
            structures of each crop), or both (their sum).
        around: Probability that a crop is drawn so that it holds a structure, each structure of a volume
            being as likely; other crops lie anywhere in the foreground.
        min_foreground: Least share of foreground in a crop that lies anywhere.
        flip: Probability of mirroring along each axis; 0 by default, as left and right may be different
            structures.
        shift: Range s of the translation, as a share of the crop's side: shift ~ U(-s, s) along each axis.
        torchio: Transforms of torchio, which cannot be used here: they would move images without their
            masks.
    """

    crop: tuple[int, int, int] = (32, 32, 32)
    head: Literal["paper", "conv_seg"] = "paper"
    head_norm: Literal["batch", "group", "instance"] = "batch"
    loss: Literal["ce", "dice", "both"] = "ce"
    around: float = 0.5
    min_foreground: float = 0.1
    flip: float = 0.0
    shift: float = 0.1
    blur: float = 0.0
    bias: float = 0.0
    gamma: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if len(self.crop) != 3 or min(self.crop) < 1:
            raise ValueError(f"crop needs 3 sizes of at least 1, not {self.crop}")
        for name, choices in (
            ("head", ("paper", "conv_seg")),
            ("head_norm", ("batch", "group", "instance")),
            ("loss", ("ce", "dice", "both")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {', '.join(choices)}")
        for name in ("around", "min_foreground"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, not {getattr(self, name):g}")
        if self.torchio:
            raise ValueError(
                f"torchio is {' '.join(self.torchio)}, which would move images without their masks: "
                "leave it empty"
            )


class Med3D(Proxy):
    """The network must work out which structure every voxel belongs to, in data sets of all kinds.

    Chen, Ma, Zheng: Med3D: Transfer Learning for 3D Medical Image Analysis, 2019 (arXiv:1904.00625).

    Supervised: it learns from masks, and its checkpoints say so. All data sets share the encoder; each
    has a branch that tells the values of its own masks apart, found in the data. An example trains the
    encoder and its own data set's branch, no other. Data sets are seen equally often, however large they
    are, and augmented by translation, rotation and scaling, image and mask alike. The paper's
    pre-processing is `ssl3d prepare --spacing median` (per data set) with normalisation `mr` (0.5 and
    99.5 percentiles, z-score); its backbone a ResNet with `dilated` stages.

    Differs from the paper: half of the crops are drawn so that they hold a structure (as nnU-Net does;
    `around`), where the paper crops randomly to its targets; a branch's logits are brought to the crop's
    voxels by linear interpolation, also after the released head `conv_seg`, which scales the masks down
    instead; crops keep their voxels, where that demo resizes each to one size; percentiles and z-scores are
    the foreground's, and the background stays what it is, where the released demo fills zeros with noise; a
    smaller data set is drawn from more often, where the paper augments it up to the largest; one learning
    rate, where the released code gives new layers 100 times that of the rest; AdamW with a cosine instead
    of SGD with an exponential decay; crops of 32³ by default instead of whole volumes. Loss and metric
    leave out voxels whose value no training mask has.

    What a branch can draw depends on the stride of the deepest map: 8 in the paper. With resnet18 of width
    32 on hippocampus and brain tumours, Dice on hippocampus crops reached 0.45 after 20 steps with
    `dilated` stages (stride 4), and stayed at 0 for 300 steps at the default stride of 16.

    The metric `dice` is the mean over structures and data sets of the Dice coefficient, from the voxels
    of all of a batch's crops together; `dice_NAME` is that of one data set. Structures that are neither
    in the masks nor predicted do not count.
    """

    Config = Med3DConfig
    paper: ClassVar[str] = (
        "Chen, Ma, Zheng: Med3D: Transfer Learning for 3D Medical Image Analysis, arXiv:1904.00625, 2019"
    )
    main: ClassVar[str] = "dice"
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 16, "lr": 2e-3}
    uses_labels: ClassVar[bool] = True
    distinct: ClassVar[bool] = False

    codes: Tensor

    def __init__(self, config: Med3DConfig, encoder: Encoder) -> None:
        """Prepare for branches, which come with the data in `setup`."""
        super().__init__(config, encoder)
        self.branches = nn.ModuleList()
        self.names: list[str] = []
        self.register_buffer("codes", torch.zeros(0, dtype=torch.int64))

    def setup(self, data: Collection) -> None:
        """Give every data set with masks a branch, as wide as its masks have values.

        Raises:
            DataError: No volume has a mask, or those of a data set hold a single value.
        """
        kept: Mapping[str, Tensor] | None = getattr(data, "found", None)  # of a checkpoint without its data
        if kept is not None:
            names = bytes(kept["names"].tolist()).decode().split("\0")
            values = kept["values"].split(kept["counts"].tolist())
            self._make(kept["codes"].tolist(), names, values)
            return
        labels = dataset_labels(data)
        if not labels:
            raise DataError(
                f"med3d learns from masks, and none of the {len(data)} volumes to train on has one: "
                "prepare the scans with --masks PART, a dataset.json or a CSV with a column mask"
            )
        names = [data.dataset_names[code] for code in labels]
        for name, here in zip(names, labels.values(), strict=True):
            if len(here) < 2:
                raise DataError(
                    f"med3d: the masks of {name} hold the value {here[0]} alone, so there is nothing to "
                    "tell apart: leave that data set out"
                )
        self._make(list(labels), names, [torch.from_numpy(here) for here in labels.values()])

    def _make(self, codes: Sequence[int], names: Sequence[str], values: Sequence[Tensor]) -> None:
        self.names = list(names)
        self.register_buffer("codes", torch.tensor(codes, dtype=torch.int64, device=self.codes.device))
        self.branches = nn.ModuleList(Branch(self.config, self.encoder, own) for own in values)

    def outline(self) -> dict[str, Tensor]:
        """Return the data sets with masks, and the values of their masks."""
        values = [branch.values.cpu() for branch in self._branches()]
        return {
            "codes": self.codes.cpu(),
            "names": torch.tensor(list("\0".join(self.names).encode()), dtype=torch.uint8),
            "values": torch.cat(values),
            "counts": torch.tensor([len(own) for own in values]),
        }

    def _branches(self) -> list[Branch]:
        return [branch for branch in self.branches if isinstance(branch, Branch)]

    @classmethod
    def draw(cls, config: Med3DConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw one `crop` (C, d, h, w) and its `mask` (d, h, w), with margin, and `spacing` (3,), mm.

        Raises:
            DataError: The volume has no mask, or no foreground.
        """
        if not volume.has_mask:
            raise DataError("it has no mask, and med3d learns from masks")
        size = fit_size(volume, config.crop)
        start = draw_labelled(volume, size, rng, config.around, config.min_foreground)
        crop, mask = read_labelled(volume, start, size, view_margin(config, size))
        return {"crop": crop, "mask": mask, "spacing": torch.tensor(volume.spacing, dtype=torch.float32)}

    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Predict masks of the crops, each with the branch of its data set."""
        config, crop, mask = self.config, batch["crop"], batch["mask"]
        size = fit_size(crop, config.crop)
        if self.training:
            x, labels = augment_labelled(config, crop, mask, rng, size, batch["spacing"])
        else:
            x, labels = centre_crop(crop, size), centre_crop(mask.unsqueeze(1), size).squeeze(1)
        deepest = self.encoder(x)[-1]
        owners, codes = batch["dataset"].tolist(), self.codes.tolist()
        # The sum is over the whole group: a mean over its examples, whichever data sets they are of.
        total = deepest.float().sum() * 0
        scores: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        shown: list[_Shown] = []
        for code, name, branch in zip(codes, self.names, self._branches(), strict=True):
            rows = [row for row, owner in enumerate(owners) if owner == code]
            if not rows:
                continue
            logits = branch(deepest[rows], size)
            target = branch.classes(labels[rows])
            with torch.autocast(x.device.type, enabled=False):
                losses = segmentation_loss(logits.float(), target, branch.structures, config.loss)
            total = total + losses.sum()
            metrics[f"loss_{name}"] = losses.detach().mean()
            predicted = logits.detach().argmax(1)
            own = dice(predicted, target, len(branch.values))[branch.structures]
            if bool(own.isfinite().any()):
                scores[name] = metrics[f"dice_{name}"] = own.nanmean()
            some = slice(_SHOWN)
            shown.append(_Shown(name, len(branch.values), x[rows][some, 0], target[some], predicted[some]))
        # Nothing to find and nothing found, in any data set: as it should be.
        metrics["dice"] = torch.stack(list(scores.values())).mean() if scores else total.new_ones(())
        return StepOutput(total / len(owners), metrics, (lambda: _picture(shown)) if shown else None)


class Branch(nn.Module):
    """Head that tells the structures of one data set apart, from the encoder's deepest map.

    Attributes:
        values: Values of the masks, increasing, (K,) int64; class k stands for value k.
        structures: Classes that are structures, (K,) bool: all but the value 0.

    Args:
        config: Options of the proxy, which choose the head.
        encoder: Encoder whose map is taken; it is not kept.
        values: Values of the masks, increasing.
    """

    values: Tensor
    structures: Tensor

    def __init__(self, config: Med3DConfig, encoder: Encoder, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.clone())
        self.register_buffer("structures", values != 0)
        self.strides = [float(stride) for stride in encoder.strides[-1]]
        channels = encoder.channels[-1]
        self.up: nn.ConvTranspose3d | None = None
        if config.head == "conv_seg":
            self.up = nn.ConvTranspose3d(channels, _WIDTH, 2, stride=2)
            self.mix = nn.Conv3d(_WIDTH, _WIDTH, 3, padding=1, bias=False)
            self.norms = nn.ModuleList(norm(config.head_norm, _WIDTH, 8) for _ in range(2))
            channels = _WIDTH
        self.out = nn.Conv3d(channels, len(values), 1, bias=self.up is None)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Return logits (B, K, D, H, W) at the crop's voxels.

        Args:
            x: Deepest map of the encoder, (B, C, d, h, w).
            size: Size (D, H, W) of the crop.
        """
        strides = self.strides
        if self.up is not None:
            if size[0] == 1:  # an image stays one
                flat = self.up.weight.mean(2)
                x = F.conv_transpose2d(x.squeeze(2), flat, self.up.bias, stride=2).unsqueeze(2)
            else:
                x = self.up(x)
            x = F.relu(self.norms[0](x))
            x = F.relu(self.norms[1](conv3x3x3(x, self.mix.weight)))
            strides = [stride / 2 for stride in strides]
        return upsample(self.out(x).float(), size, strides)

    def classes(self, labels: Tensor) -> Tensor:
        """Convert the values of a mask to classes, int64; a value that is not known becomes `UNKNOWN`."""
        place = torch.searchsorted(self.values, labels.long().contiguous()).clamp_max(len(self.values) - 1)
        return torch.where(self.values[place] == labels, place, UNKNOWN)


def segmentation_loss(
    logits: Tensor, target: Tensor, structures: Tensor, kind: Literal["ce", "dice", "both"] = "ce"
) -> Tensor:
    """Compute the loss of each example, (B,), over its voxels of known class; 0 where there are none.

    Soft Dice is 1 - the mean over structures of (2 sum pg + 1) / (sum p + sum g + 1), with p the
    probability and g 1 on the structure's voxels and 0 elsewhere: a structure that is not in the crop
    asks for a small sum of p, and is fulfilled where that is 0.

    Args:
        logits: Predictions (B, K, D, H, W), float32.
        target: Classes 0 to K - 1, or `UNKNOWN`, (B, D, H, W).
        structures: Classes whose Dice counts, (K,), bool.
        kind: Loss: cross entropy, Dice, or the sum of both.

    Example:
        >>> logits = torch.tensor([[[[[9.0, 0.0]]], [[[0.0, 9.0]]]]])
        >>> target, structures = torch.tensor([[[[0, 1]]]]), torch.tensor([False, True])
        >>> segmentation_loss(logits, target, structures).round(decimals=3)
        tensor([0.])
    """
    known = target != UNKNOWN
    loss = logits.new_zeros(len(logits))
    if kind != "dice":
        each = F.cross_entropy(logits, target, ignore_index=UNKNOWN, reduction="none")
        loss = loss + each.flatten(1).sum(1) / known.flatten(1).sum(1).clamp_min(1)
    if kind != "ce":
        axes = (2, 3, 4)
        p = logits.softmax(1)[:, structures] * known.unsqueeze(1)
        chosen = structures.nonzero()[:, 0].view(1, -1, 1, 1, 1)
        g = (target.unsqueeze(1) == chosen).to(p.dtype)
        share = (2 * (p * g).sum(axes) + 1) / (p.sum(axes) + g.sum(axes) + 1)
        loss = loss + (1 - share.mean(1)) * known.flatten(1).any(1)
    return loss


def dice(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """Compute Dice coefficients (K,) over all voxels of known class.

    A class that is neither there nor predicted has NaN.

    Args:
        predicted: Predicted classes, in any shape.
        target: True classes or `UNKNOWN`, of the same shape.
        classes: Number K of classes.

    Example:
        >>> dice(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 3)
        tensor([0.6667, 0.6667,    nan])
    """
    known = target != UNKNOWN
    pairs = torch.where(known, target * classes + predicted, classes * classes)
    table = torch.bincount(pairs.flatten(), minlength=classes * classes + 1)[:-1].view(classes, classes)
    return 2 * table.diagonal().float() / (table.sum(0) + table.sum(1))


class _Shown(NamedTuple):
    """Some examples of one data set: its name, number of classes, and (n, D, H, W) each."""

    name: str
    classes: int
    image: Tensor
    target: Tensor
    predicted: Tensor


def _picture(shown: Sequence[_Shown]) -> Figure:
    """Show input, mask and prediction of the slice across D with most structure, of each example."""
    from matplotlib.figure import Figure

    columns: list[tuple[_Shown, list[np.ndarray]]] = []
    for own in shown:
        parts = [part.detach().float().cpu().numpy() for part in (own.image, own.target, own.predicted)]
        columns += [
            (own, [part[n] for part in parts]) for n in range(len(own.image) if len(shown) < 6 else 1)
        ]
    figure = Figure(figsize=(1.7 * len(columns) + 0.3, 5.4), layout="constrained")
    panels = figure.subplots(3, len(columns), squeeze=False)
    for column, (own, (image, target, predicted)) in enumerate(columns):
        place = int((target > 0).sum((1, 2)).argmax())
        low, high = np.percentile(image, (0.5, 99.5))
        for row, labels in enumerate((None, target, predicted)):
            panel = panels[row, column]
            panel.imshow(image[place], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            if labels is not None:
                over = np.ma.masked_less_equal(labels[place], 0)
                panel.imshow(
                    over, cmap="turbo", vmin=0, vmax=own.classes - 1, alpha=0.6, interpolation="nearest"
                )
            panel.set_xticks([])
            panel.set_yticks([])
        panels[0, column].set_title(own.name, fontsize=8)
    for row, name in enumerate(("input", "mask", "predicted")):
        panels[row, 0].set_ylabel(name, fontsize=9)
    return figure
