"""Pseudo-3D classification: name what natural images show, their three colours read as three slices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl3d.api import BatchRng, DataError, Encoder, Proxy, StepOutput, UsageError, parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.api import Collection, Volume

_TRIES = 10  # boxes drawn until one lies within the picture, as torchvision has it
_SHOWN = 6  # pictures in a picture


@dataclass
class Pseudo3DClassificationConfig:
    """Options of pseudo-3D classification.

    Attributes:
        crop: Side of the square that the encoder sees, in pixels: 224 in the paper; 64 to 96 suit a CPU.
        side: Side that a picture's square is brought to before it is cropped; 0 makes it 8/7 of the crop
            (256 for 224).
        scale: Share of the square's area that a crop takes, ~ U(low, high); it is resized to the size of
            the crop.
        ratio: Ratio of a crop's width to its height: ratio ~ LogUniform(low, high).
        flip: Probability of mirroring left and right.
        shuffle: Probability that the three slices are put into a random order.
        label_smoothing: Share of the target probability that is spread evenly over all classes.
        mean: Mean that is subtracted from the pictures, whose values are 0 to 1; the paper's 114.495 of
            255.
        std: Standard deviation that pictures are then divided by; the paper's 57.63 of 255.
        keep_depth: Whether an encoder that strides across slices is refused.
    """

    crop: int = 224
    side: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    shuffle: float = 1.0
    label_smoothing: float = 0.1
    mean: float = 114.495 / 255
    std: float = 57.63 / 255
    keep_depth: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        if self.crop < 1:
            raise ValueError(f"crop must be at least 1, not {self.crop}")
        if self.side and self.side < self.crop:
            raise ValueError(f"side is {self.side}; a crop of {self.crop} needs that much at least, or 0")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale needs two shares, above 0 and up to 1, not {self.scale}")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= 1 <= self.ratio[1]:
            raise ValueError(f"ratio needs two numbers, up to 1 and from 1, not {self.ratio}")
        for name in ("flip", "shuffle"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, 0 to 1, not {getattr(self, name):g}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is a share, 0 to below 1, not {self.label_smoothing:g}")
        if not self.std > 0:
            raise ValueError(f"std must be above 0, not {self.std:g}")

    @property
    def square(self) -> int:
        """Side of the square that crops are taken from."""
        return self.side or round(self.crop * 8 / 7)


class Pseudo3DClassification(Proxy):
    """The network must work out which class of things a natural image shows.

    Zhang, Li, Zhou, Ma, Yu: Advancing 3D Medical Image Analysis with Variable Dimension
    Transform based Supervised 3D Pre-training, arXiv 2201.01426 (2022).

    Red, green and blue are read as three neighbouring slices of a volume of one channel: (B, 3, H, W)
    becomes (B, 1, 3, H, W), so that an ordinary 3D encoder for volumes of one channel learns from
    millions of labelled pictures. A square of each picture is brought to `side`; while training, a random
    part of it to `crop` (area, ratio and place as torchvision's RandomResizedCrop draws them), mirrored
    left and right at random, its slices shuffled, so that no colour has a place; otherwise the middle.
    Cross-entropy with label smoothing over the classes of the training data; equal labels are one class in
    all data sets. A class that is met among the held-out only is left out of the loss and counts as wrong.

    The paper's encoder strides within slices only, so that all three are there to the end. `--preset
    pseudo3d` has it: `--encoder resnet18 --resnet18.kind 3d --resnet18.stem-stride 1 2 2
    --resnet18.stem-pool true --resnet18.pool-stride 1 2 2 --resnet18.stage-strides
    [[1,1,1],[1,2,2],[1,2,2],[1,2,2]]`, BatchNorm as in the released configuration (`--resnet18.norm group`
    for small batches). With three slices the outermost planes of a 7 x 7 x 7 kernel see padding only and
    learn nothing, in the paper too; `--resnet18.stem-kernel 5` has none such. Strides have no weights, so
    that volumes may be given to the encoder with others: for dense tasks with the paper's
    (`RUN:high_resolution=true`: stride 1 in the first convolution and the third stage, no max-pool).

    Differs from the paper: the square is cut from a random place along the picture's longer side. The
    recipe is for batches of 16, not 256 on 8 GPUs for 100 epochs: SGD with the paper's momentum and decay,
    its rate of 0.1 scaled to the batch by the linear rule, this toolkit's warm-up and clipped gradients,
    and no decay of norms and biases. Pictures are standardised here (the paper's mean 114.495 and deviation
    57.63 of 255), so that stores keep their bytes; volumes for the encoder should be of mean 0 and
    deviation 1, as prepared MR is.
    """

    Config = Pseudo3DClassificationConfig
    paper: ClassVar[str] = (
        "Zhang, Li, Zhou, Ma, Yu: Advancing 3D Medical Image Analysis with Variable Dimension Transform "
        "based Supervised 3D Pre-training, arXiv 2201.01426, 2022"
    )
    main: ClassVar[str] = "top1"
    uses_labels: ClassVar[bool] = True
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "batch_size": 16,
        "lr": 0.1 * 16 / 256,
        "momentum": 0.9,
        "weight_decay": 1e-4,
    }
    keys: Tensor

    def __init__(self, config: Pseudo3DClassificationConfig, encoder: Encoder) -> None:
        """Check the encoder, before the classes are known.

        Raises:
            UsageError: The encoder takes several channels, or strides across the three slices.
        """
        super().__init__(config, encoder)
        channels = getattr(encoder.config, "in_channels", 1)
        if channels != 1:
            raise UsageError(
                f"pseudo3d_classification: the encoder takes {channels} channels; three colours become one "
                "channel of three slices, so it must take 1"
            )
        across = [stride[0] for stride in encoder.strides]
        if config.keep_depth and max(across) > 1:
            raise UsageError(
                "pseudo3d_classification: the encoder strides across the three slices (by "
                f"{' '.join(map(str, across))} along D); --preset pseudo3d has one that keeps them, or "
                "give it strides of 1 along D, as in --resnet18.stem-stride 1 2 2 --resnet18.stage-strides "
                "[[1,1,1],[1,2,2],[1,2,2],[1,2,2]] (--pseudo3d_classification.keep-depth false takes any)"
            )
        self.names: list[int | str] = []
        self.register_buffer("keys", torch.zeros(0, dtype=torch.int64))

    @classmethod
    def in_channels(cls, config: Pseudo3DClassificationConfig, data_channels: int) -> int:
        """Return one channel, for three colours are three slices.

        Raises:
            UsageError: The pictures do not have three colours.
        """
        if data_channels != 3:
            raise UsageError(
                f"pseudo3d_classification: reads red, green and blue as three slices, and the data have "
                f"{data_channels} channel{'s' * (data_channels > 1)}: make the store with `ssl3d prepare "
                "--colour rgb` (grey pictures then become three equal slices)"
            )
        return 1

    def setup(self, data: Collection) -> None:
        """Find the classes, and add the layer that tells them apart.

        Raises:
            DataError: There are no labels, a single one, or real values; or there are volumes only.
        """
        kept = getattr(data, "found", None)  # of a checkpoint without its data
        names = parse_json(bytes(kept["classes"].tolist())) if kept else _classes(data)
        self.names = names
        self.keys = torch.tensor([_key(name) for name in names], dtype=torch.int64)
        self.head = nn.Linear(self.encoder.embed_dim, len(names))

    def outline(self) -> Mapping[str, Tensor]:
        """Return the names of the classes, in their order."""
        return {"classes": torch.tensor(list(json.dumps(self.names).encode()), dtype=torch.uint8)}

    @classmethod
    def draw(
        cls, config: Pseudo3DClassificationConfig, volume: Volume, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Draw a square of a picture, `slices` (1, 3, S, S), and `label`, the key of its class.

        Raises:
            DataError: It is no picture in colour, or has no class.
        """
        channels, depth, height, width = volume.shape
        if channels != 3 or depth != 1:
            raise DataError(
                f"{volume.id}: has {channels} channels and depth {depth}; a picture in colour has 3 and 1"
            )
        if volume.label is None:
            raise DataError(f"{volume.id}: has no label, so nothing can be learned from it")
        short = min(height, width)
        place = int(rng.integers(0, max(height, width) - short + 1))
        start = (0, place, 0) if height > width else (0, 0, place)
        square = volume.read(start, (1, short, short))[:, 0]
        side = config.square
        if short != side:
            square = functional.interpolate(
                square[None], (side, side), mode="bilinear", align_corners=False, antialias=True
            )[0]
        return {"slices": square[None], "label": torch.tensor(_key(volume.label), dtype=torch.int64)}

    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Crop, mirror and shuffle `slices` (B, 1, 3, S, S), embed them, and name their classes."""
        config = self.config
        slices = batch["slices"]
        with torch.no_grad(), torch.autocast(slices.device.type, enabled=False):
            if self.training:
                shown = resized_crops(slices, rng, config.crop, config.scale, config.ratio)
                mirrored = rng.chance(config.flip).view(-1, 1, 1, 1, 1)
                shown = torch.where(mirrored, shown.flip(4), shown)
                shown = shuffle_slices(shown, rng, config.shuffle)
            else:
                first = (slices.shape[-1] - config.crop) // 2
                shown = slices[..., first : first + config.crop, first : first + config.crop]
            given = (shown - config.mean) / config.std
        embeddings = self.encoder.embed(given)
        target = self._classes_of(batch["label"])
        with torch.autocast(slices.device.type, enabled=False):
            logits = functional.linear(embeddings.float(), self.head.weight.float(), self.head.bias.float())
            known = target >= 0
            losses = functional.cross_entropy(
                logits, target, ignore_index=-1, reduction="none", label_smoothing=config.label_smoothing
            )
            loss = losses.sum() / known.sum().clamp_min(1)
        ranked = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices
        right = ranked == target.unsqueeze(1)
        metrics = {"top1": right[:, 0].float().mean(), "top5": right.any(dim=1).float().mean()}
        guess = ranked[:, 0]
        return StepOutput(loss, metrics, lambda: self._picture(shown, target, guess))

    def present(self, volumes: Tensor) -> Tensor:
        """Turn colours (B, 3, 1, H, W) into standardised slices (B, 1, 3, H, W)."""
        if volumes.shape[1] != 3 or volumes.shape[2] != 1:
            raise DataError(f"volumes of shape {tuple(volumes.shape)}; expected (B, 3, 1, H, W)")
        standard: Tensor = (volumes.transpose(1, 2) - self.config.mean) / self.config.std
        return standard

    def _classes_of(self, labels: Tensor) -> Tensor:
        """Look up the class numbers (B,) of keys; -1 for a class that was not there to be learned."""
        same = labels.unsqueeze(1) == self.keys
        return torch.where(same.any(dim=1), same.float().argmax(dim=1), -1)

    def _picture(self, shown: Tensor, target: Tensor, guess: Tensor) -> Figure:
        """Show the first pictures as the encoder saw them, with their true and their predicted classes."""
        from matplotlib.figure import Figure

        count = min(len(shown), _SHOWN)
        figure = Figure(figsize=(2.1 * count, 2.9), layout="constrained")
        panels = figure.subplots(1, count, squeeze=False)[0]
        pictures = shown[:count, 0].detach().float().cpu().movedim(1, -1).clamp(0, 1).numpy()
        for i, panel in enumerate(panels):
            known = int(target[i]) >= 0
            truth = str(self.names[int(target[i])]) if known else "class not learned"
            right = int(target[i]) == int(guess[i])
            panel.imshow(pictures[i])
            panel.set_title(
                f"is {truth}\nsaid {self.names[int(guess[i])]}",
                fontsize=8,
                color="tab:green" if right else "tab:red",
            )
            panel.set_xticks([])
            panel.set_yticks([])
        return figure


def resized_crops(
    x: Tensor, rng: BatchRng, crop: int, scale: Sequence[float], ratio: Sequence[float]
) -> Tensor:
    """Crop a random part of each picture and resize it: torchvision's RandomResizedCrop, batched.

    Of ten boxes the first that fits is taken, at a uniform place; where none fits, the whole picture.

    Args:
        x: Pictures (B, 1, slices, S, S); values between pixels are bilinear.
        rng: Generator of the B examples.
        crop: Side of the result, pixels.
        scale: Share of the area, ~ U(low, high).
        ratio: Ratio of width to height: ratio ~ LogUniform(low, high).

    Returns:
        (B, 1, slices, crop, crop).
    """
    side = x.shape[-1]
    area = rng.uniform(_TRIES, low=scale[0], high=scale[1]) * side**2
    shape = torch.exp(rng.uniform(_TRIES, low=float(np.log(ratio[0])), high=float(np.log(ratio[1]))))
    widths, heights = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (widths >= 1) & (widths <= side) & (heights >= 1) & (heights <= side)
    first = fits.float().argmax(dim=1, keepdim=True)
    sizes = torch.cat([widths.gather(1, first), heights.gather(1, first)], dim=1)
    sizes = torch.where(fits.any(dim=1, keepdim=True), sizes, float(side))  # (B, 2), W and H
    starts = (rng.uniform(2) * (side - sizes + 1)).floor()
    # grid_sample wants places in [-1, 1] from the picture's edge to edge.
    middle = 2 * (starts + sizes / 2) / side - 1
    steps = (2 * torch.arange(crop, device=x.device) + 1) / crop - 1
    w, h = (middle[:, a, None] + steps * (sizes[:, a, None] / side) for a in (0, 1))
    grid = torch.stack(torch.broadcast_tensors(w[:, None, :], h[:, :, None]), dim=-1)
    parts = functional.grid_sample(
        x[:, 0].float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return parts[:, None].to(x.dtype)


def shuffle_slices(x: Tensor, rng: BatchRng, p: float = 1.0) -> Tensor:
    """Put the slices of each example of (B, C, D, H, W) into a random order, with probability `p`."""
    depth = x.shape[2]
    order = rng.permutation(depth)
    plain = torch.arange(depth, device=x.device)
    order = torch.where(rng.chance(p).unsqueeze(1), order, plain)
    return x.gather(2, order.view(-1, 1, depth, 1, 1).expand_as(x))


def _classes(data: Collection) -> list[int | str]:
    """List the labels there are: whole numbers in their order, then words in theirs."""
    labels = [label for label in data.labels if label is not None]
    pictures = sum(int(shape[1]) == 1 for shape in data.shapes)
    if not pictures:
        raise DataError(
            f"pseudo3d_classification: none of the {len(data)} volumes is a picture, of depth 1"
        )
    real = next((label for label in labels if not isinstance(label, int | str)), None)
    if real is not None:
        raise DataError(
            f"pseudo3d_classification: labels are real values, such as {real:g}, and no classes"
        )
    names = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    if not names:
        raise DataError(
            f"pseudo3d_classification: none of the {len(data)} pictures has a label: put them in a folder "
            "per class, or list them in a CSV with the columns path and label"
        )
    if len(names) == 1:
        raise DataError(
            f"pseudo3d_classification: all {len(labels)} labelled pictures are of one class, {names[0]!r}; "
            "there must be two to tell apart"
        )
    return names


def _key(label: float | str) -> int:
    """Hash the label of a class to a number that is the same in every process and run."""
    digest = hashlib.blake2b(json.dumps(label).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
