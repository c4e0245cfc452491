"""Fine-tuning on classes, ordered integers or real values: a linear head on the pooled features."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ssl3d.api import (
    AggregatedEncoder,
    Contestant,
    DataError,
    LabelPrediction,
    Portable,
    draw_crop,
    embed_volume,
)
from ssl3d_benchmarks.features import BATCH_VOXELS
from ssl3d_benchmarks.finetune.protocol import FinetuneTask
from ssl3d_benchmarks.linear_probe.config import LinearProbeConfig
from ssl3d_benchmarks.linear_probe.protocol import LinearProbe
from ssl3d_benchmarks.task import (
    CSV_HELP,
    check_numbers,
    class_names,
    kind_of_labels,
    known_label,
    mask_values,
)
from ssl3d_benchmarks.trivial_rows import TRIVIAL, VERSION

if TYPE_CHECKING:
    from ssl3d.api import BatchRng, Collection, Encoder, Volume, statistics

Array = NDArray[Any]

_MEDMNIST: dict[str, Any] = {
    "batch_size": 32,
    "lr": 1e-3,
    "lr_scratch": 1e-3,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "schedule": "milestones",
    "gamma": 0.1,
    "warmup": 0.0,
    "layer_decay": 1.0,
    "clip": 0.0,
    "keep": "best",
    "classification.scale": "medmnist",
}


@dataclass(frozen=True)
class ClassificationConfig:
    """Options of classification, ordinal regression and regression.

    Attributes:
        target: Kind of target to learn: classes, ordinal (ordered integers), real, or auto to decide by the
            labels.
        crop: Largest input of the encoder along D H W, voxels. A larger volume is trained on crops with
            foreground, and predicted as the mean over windows that cover it.
        pad: Padding of smaller volumes with their lowest value, to the size of the largest volume or of the
            crop.
            Without it, volumes of each shape go through the encoder, and so through batch norm, apart:
            one at a time, where every scan has a shape of its own.
        dropout: Probability of dropout before the last layer.
        label_smoothing: Share of label smoothing over the classes.
        class_weights: Weights of the classes in the loss: none, or balanced (inverse to the frequency in
            the training part).
        flip: Probability of mirroring along each axis, in training.
        shift: Largest shift s along each axis as a share of its length, drawn from U(-s, s); the edge fills
            the gap.
        contrast: Largest change c of the intensities: their scale is multiplied by U(1 - c, 1 + c), and
            their mean is moved by U(-c, c) standard deviations of the crop.
        scale: Dimming of the intensities: random multiplies them by U(0, 1) in training and by 1/2
            afterwards; medmnist does so for AdrenalMNIST3D and VesselMNIST3D alone (known by the names
            of the data sets), as the code of MedMNIST does.
    """

    target: Literal["auto", "classes", "ordinal", "real"] = "auto"
    crop: tuple[int, int, int] = (96, 96, 96)
    pad: bool = False
    dropout: float = 0.0
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    flip: float = 0.0
    shift: float = 0.0
    contrast: float = 0.0
    scale: Literal["none", "random", "medmnist"] = "none"

    def __post_init__(self) -> None:
        """Check the value of every field."""
        if len(self.crop) != 3 or min(self.crop) < 1:
            raise ValueError(f"crop: {list(self.crop)}; give three sizes from 1")
        for name, below in (("dropout", 1.0), ("label_smoothing", 1.0), ("shift", 0.5), ("contrast", 1.0)):
            if not 0 <= getattr(self, name) < below:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 0 and below {below:g}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip: {self.flip} must be a probability, from 0 to 1")


class Classifier(nn.Module):
    """Encoder with pooled features, dropout and a linear layer.

    Attributes:
        weights: Weights of the classes in the loss (K,).
        centre: Mean of the training values; 0 for classes.
        spread: Standard deviation of the training values; 1 for classes.

    Args:
        encoder: Encoder with its own pooling: the mean over its deepest map, or its aggregator.
        outputs: Number of classes, or 1 for values.
        dropout: Probability of dropout before the last layer.
    """

    weights: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, encoder: Encoder, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.embed_dim, outputs)
        self.register_buffer("weights", torch.ones(outputs))
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits, or standardised values, (B, outputs) of volumes (B, C, D, H, W)."""
        return self.read(self.embed(x))

    def read(self, embeddings: Tensor) -> Tensor:
        """Apply the head to embeddings (B, F)."""
        return self.head(self.dropout(embeddings))

    def embed(self, x: Tensor) -> Tensor:
        """Embed volumes (B, C, D, H, W) as (B, F), with gradients."""
        if not isinstance(self.encoder, AggregatedEncoder):
            embeddings: Tensor = self.encoder.embed(x)
            return embeddings
        return self.encoder.pooled(x)


class AnswerNetwork(nn.Module):
    """Network of a volume as other programs use it, from its voxels to probabilities or a value.

    Args:
        model: Trained classifier.
        classes: Kind of the outputs: logits of classes if true, else one value.
        dimmed: Halving of the input, which a training that darkened volumes at random saw on average.
    """

    def __init__(self, model: Classifier, classes: bool, dimmed: bool) -> None:
        super().__init__()
        self.model, self.classes, self.scale = model, classes, 0.5 if dimmed else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Compute probabilities (B, K), or values (B, 1), of volumes (B, C, D, H, W)."""
        outputs: Tensor = self.model(x * self.scale)
        if self.classes:
            return outputs.softmax(dim=1)
        return outputs[:, :1] * self.model.spread + self.model.centre


class Classification(FinetuneTask):
    """Classification and regression of volumes and images: classes, ordered integers or real values.

    The scores are those of the linear probe. Classes have the AUC and the accuracy of MedMNIST's evaluator,
    and balanced accuracy; values have Spearman's correlation, mean absolute error and R2. The loss is the
    cross-entropy of classes, and the squared error of values, standardised on the training part.
    """

    Config = ClassificationConfig
    name = "classification"
    version = 1
    description = "a linear head on the pooled features: classes, ordinal or real targets"
    reference = (
        "preset medmnist: Yang et al.: MedMNIST v2, Sci Data 2023, arXiv 2110.14795, and its published "
        "training code for 3D"
    )
    mains: ClassVar[Mapping[str, str]] = {"classes": "auc", "ordinal": "spearman", "real": "r2"}
    recipe: ClassVar[Mapping[str, Any]] = {
        "epochs": 30,
        "batch_size": 16,
        "lr": 3e-4,
        "lr_scratch": 1e-3,
        "weight_decay": 0.01,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "medmnist": {
            **_MEDMNIST,
            "epochs": 100,
            "milestones": (0.5, 0.75),
            "eval_at": tuple(k / 100 for k in range(1, 101)),
        },
        "medmnist-short": {
            **_MEDMNIST,
            "epochs": 30,
            "milestones": (15 / 30, 22 / 30),
            "eval_at": tuple(k / 30 for k in range(1, 31)),
        },
    }
    trivial = TRIVIAL
    # The rows without a network measure outlines, and beat good networks where outlines decide.
    floors: ClassVar[Mapping[str, str | float]] = {"classes": 0.5, "ordinal": 0.0, "real": 0.0}

    config: ClassificationConfig

    def __init__(self, config: ClassificationConfig, data: Collection) -> None:
        """Find the kind of target and the classes."""
        self.config = config
        self.target = _target(config, data)
        names = {str(name).lower() for name in data.datasets}
        shapes = all(name.startswith(("adrenalmnist", "vesselmnist")) for name in names)
        most = np.max([shape[1:] for shape in data.shapes], axis=0)
        # An axis with one voxel in all volumes keeps it: they are images.
        self._largest = np.minimum(most, config.crop)
        self._least = np.minimum(most, config.crop) if config.pad else np.ones(3, dtype=int)
        self.dimmed = config.scale == "random" or (config.scale == "medmnist" and shapes)
        if self.target != "classes":
            check_numbers(data.labels, self.target)
        self.classes = class_names(data) if self.target == "classes" else ()
        # All volumes need a mask, or the trivial rows would measure different things.
        measured = mask_values(data)[1:] if data.has_mask.all() else ()
        self._probe = LinearProbe(
            LinearProbeConfig(target=self.target, classes=self.classes, mask_classes=measured)
        )

    @classmethod
    def known(cls, config: ClassificationConfig, data: Collection) -> NDArray[np.bool_]:
        """Return a mask (N,) of the volumes that have a label."""
        _target(config, data)
        return np.array([known_label(label) for label in data.labels], dtype=bool)

    def strata(self, data: Collection) -> Array | None:
        """Return the class of each volume (N,); None for real values."""
        if self.target == "real":
            return None
        return np.array([str(label) for label in data.labels])

    def settings(self) -> dict[str, Any]:
        """Return the options, with the target and the classes resolved."""
        given = dataclasses.asdict(self.config)
        if not given["pad"]:  # records from before this option are found again
            del given["pad"]
        return {
            **given,
            "target": self.target,
            "classes": list(self.classes),
            "scale": "random" if self.dimmed else "none",
        }

    @property
    def can_flip(self) -> bool:  # type: ignore[override]
        """Permission to average predictions over mirrored volumes, where training mirrored them too."""
        return self.config.flip > 0

    def keep(self, model: nn.Module) -> dict[str, Any]:
        """Return the least and the largest size of what the encoder sees."""
        return {"least": [int(n) for n in self._least], "largest": [int(n) for n in self._largest]}

    @classmethod
    def restore(
        cls, settings: Mapping[str, Any], target: str, kept: Mapping[str, Any], encoder: Encoder
    ) -> tuple[Classification, Classifier]:
        """Restore the task and the classifier from a card."""
        task = cls.scorer(settings, target)
        assert isinstance(task, cls)
        task.dimmed = task.config.scale == "random"
        task._least = np.array(kept["least"], dtype=int)
        task._largest = np.array(kept.get("largest", task.config.crop), dtype=int)  # absent in older ones
        return task, task.model(encoder, None)

    def model(self, encoder: Encoder, train: Collection | None) -> Classifier:
        """Build the encoder with a linear head."""
        return Classifier(encoder, max(len(self.classes), 1), self.config.dropout)

    def start(self, model: nn.Module, train: Collection) -> None:
        """Set class weights, or mean and spread of the values, from the training subjects."""
        assert isinstance(model, Classifier)
        targets = self._probe.targets(train)
        if self.target != "classes":
            model.centre.fill_(float(targets.mean()))
            model.spread.fill_(max(float(targets.std()), 1e-6))
        elif self.config.class_weights == "balanced":
            counts = np.bincount(targets, minlength=len(self.classes))
            weights = len(targets) / (np.maximum(counts, 1) * len(self.classes))
            model.weights.copy_(torch.as_tensor(weights, dtype=torch.float32))

    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw the volume, or a crop with foreground where it is larger than the crop; and its target."""
        shape = volume.shape[1:]
        if self._fits(shape):
            image = volume.read()
        else:
            size = [min(n, most) for n, most in zip(shape, self.config.crop, strict=True)]
            image = volume.read(draw_crop(volume, size, rng), size)
        image = self._padded(image)
        if self.target == "classes":
            target = torch.tensor(self.classes.index(str(volume.label)))
        else:
            target = torch.tensor(float(volume.label), dtype=torch.float32)  # type: ignore[arg-type]
        return {"image": image, "target": target}

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], rng: BatchRng
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the cross-entropy, or the squared error of standardised values."""
        assert isinstance(model, Classifier)
        outputs = model(self._augment(batch["image"], rng)).float()
        target = batch["target"]
        if self.target != "classes":
            standard = (target - model.centre) / model.spread
            error = F.mse_loss(outputs[:, 0], standard)
            return error, {"mse": error.detach()}
        loss = F.cross_entropy(
            outputs, target, weight=model.weights, label_smoothing=self.config.label_smoothing
        )
        return loss, {"accuracy": (outputs.detach().argmax(1) == target).float().mean()}

    def predict(self, model: nn.Module, volume: Volume) -> dict[str, Any]:
        """Predict the probabilities of the classes, or the value, beside the target."""
        assert isinstance(model, Classifier)
        outputs = self._outputs(model, self._image(model, volume))
        return self._rows(model, outputs, [volume.label])[0]

    def infer(self, model: nn.Module, volume: Volume, flip: bool = False) -> LabelPrediction:
        """Predict the probabilities of the classes, or the value; the mean over mirrored copies."""
        assert isinstance(model, Classifier)
        image = self._image(model, volume)
        axes = [axis for axis in (1, 2, 3) if flip and image.shape[axis] > 1]
        ways = [some for count in range(len(axes) + 1) for some in itertools.combinations(axes, count)]
        each = [self._answers(model, self._outputs(model, image.flip(way) if way else image))[0]
                for way in ways]  # fmt: skip
        return LabelPrediction(self.classes, tuple(np.mean(each, axis=0).tolist()))

    def portable(self, model: nn.Module) -> Portable | None:
        """Return the network of one volume, with probabilities or a value in the labels' unit."""
        assert isinstance(model, Classifier)
        name = "probabilities" if self.target == "classes" else "value"
        network = AnswerNetwork(model, self.target == "classes", self.dimmed)
        d, h, w = (int(side) for side in self._largest)
        return Portable(network, (name,), (d, h, w), fixed=False)

    def _image(self, model: Classifier, volume: Volume) -> Tensor:
        device = next(model.parameters()).device
        return self._dimmed(self._padded(volume.read()).to(device))

    def _outputs(self, model: Classifier, image: Tensor) -> Tensor:
        """Compute the outputs (1, K) of one volume (C, D, H, W)."""
        if self._fits(image.shape[1:]):
            outputs: Tensor = model(image[None])
            return outputs
        if isinstance(model.encoder, AggregatedEncoder):
            return model.read(model.encoder.embed(image[None]))
        kind = image.device.type
        amp = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return model.read(embed_volume(model.encoder, image, self.config.crop, autocast=amp)[None])

    def predict_all(self, model: nn.Module, data: Collection) -> list[dict[str, Any]]:
        """Predict volumes, those of a shape in batches."""
        assert isinstance(model, Classifier)
        device = next(model.parameters()).device
        rows: list[dict[str, Any] | None] = [None] * len(data)
        shapes = [(shape[0], *np.maximum(shape[1:], self._least).tolist()) for shape in data.shapes]
        labels = data.labels
        for shape in sorted(set(shapes)):
            same = [position for position, own in enumerate(shapes) if own == shape]
            if not self._fits(shape[1:]):
                for position in same:
                    rows[position] = self.predict(model, data[position])
                continue
            size = max(1, BATCH_VOXELS // int(np.prod(shape)))
            for start in range(0, len(same), size):
                chosen = same[start : start + size]
                batch = torch.stack([self._padded(data[position].read()) for position in chosen]).to(device)
                predicted = self._rows(model, model(self._dimmed(batch)), [labels[k] for k in chosen])
                for position, row in zip(chosen, predicted, strict=True):
                    rows[position] = row
        return [row for row in rows if row is not None]

    def score_functions(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, statistics.Statistic]]:
        """Return the clusters and score functions of the linear probe."""
        return self._probe.score_functions(predictions)

    def predict_trivial(
        self, name: str, train: Collection, val: Collection, test: Collection, seed: int
    ) -> list[dict[str, Any]]:
        """Fit a linear model on hand-made features, as the linear probe does; val is not used."""
        probe = LinearProbe(self._probe.config)
        row = Contestant(
            name, "trivial", f"{name} v{VERSION}",
            details={"features": name, "mask_classes": list(self.measured(name))},
        )  # fmt: skip
        return probe.score(row, train, val, test, seed).predictions

    def measured(self, name: str) -> Sequence[int]:
        """Return the mask values that a row without a network measures."""
        return self._probe.config.mask_classes if name != "pooled voxels" else ()

    def save_prediction(self, model: nn.Module, volume: Volume, folder: Path) -> Path | None:
        """Add a line to `predictions.csv`: volume, target, and probabilities of classes or the value."""
        row = self.predict(model, volume)
        path = folder / "predictions.csv"
        said = row["probability"] if self.classes else [row["prediction"]]
        names = [f"probability of {name}" for name in self.classes] or ["prediction"]
        begun = path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if not begun:
                writer.writerow(["dataset", "subject", "id", "target", *names])
            writer.writerow([volume.dataset, volume.subject, volume.id, row["target"], *said])
        return path

    # Details --------------------------------------------------------------------------------------

    def _fits(self, shape: Sequence[int]) -> bool:
        return all(n <= most for n, most in zip(shape, self.config.crop, strict=True))

    def _padded(self, x: Tensor) -> Tensor:
        """Pad (C, D, H, W) to `_least` voxels along each axis with the lowest value of each channel."""
        lacking = np.maximum(self._least - x.shape[1:], 0)
        if not lacking.any():
            return x
        before = lacking // 2
        full = x.amin(dim=(1, 2, 3), keepdim=True).repeat(1, *(np.array(x.shape[1:]) + lacking).tolist())
        place = [slice(a, a + n) for a, n in zip(before.tolist(), x.shape[1:], strict=True)]
        full[:, place[0], place[1], place[2]] = x
        return full

    def _dimmed(self, x: Tensor) -> Tensor:
        return x * 0.5 if self.dimmed else x

    def _augment(self, x: Tensor, rng: BatchRng) -> Tensor:
        config = self.config
        wide = (slice(None), *[None] * 4)
        if config.flip:
            chosen = rng.chance(config.flip, 3)
            for axis in range(3):
                if x.shape[axis + 2] > 1:
                    x = torch.where(chosen[:, axis][wide], x.flip(axis + 2), x)
        if config.shift:
            x = shifted(x, rng.uniform(3, low=-config.shift, high=config.shift))
        if config.contrast:
            gain = rng.uniform(low=1 - config.contrast, high=1 + config.contrast)[wide]
            raised = rng.uniform(low=-config.contrast, high=config.contrast)[wide]
            mean = x.mean(dim=(2, 3, 4), keepdim=True)
            x = (x - mean) * gain + mean + raised * x.std(dim=(2, 3, 4), keepdim=True)
        if self.dimmed:
            x = x * rng.uniform()[wide]
        return x

    def _rows(self, model: Classifier, outputs: Tensor, labels: Sequence[Any]) -> list[dict[str, Any]]:
        pairs = zip(labels, self._answers(model, outputs), strict=True)
        if self.target != "classes":
            return [{"target": float(label), "prediction": row[0]} for label, row in pairs]
        return [{"target": str(label), "probability": row} for label, row in pairs]

    def _answers(self, model: Classifier, outputs: Tensor) -> list[list[float]]:
        """Turn outputs (B, K) into probabilities of the classes, or into one value in the labels' unit."""
        outputs = outputs.double().cpu()
        if self.target == "classes":
            probability: list[list[float]] = outputs.softmax(dim=1).tolist()
            return probability
        values = outputs[:, :1] * model.spread.double().cpu() + model.centre.double().cpu()
        answers: list[list[float]] = values.tolist()
        return answers


def shifted(x: Tensor, shares: Tensor) -> Tensor:
    """Shift each example by whole voxels and repeat the edge.

    Args:
        x: Volumes (B, C, D, H, W).
        shares: Shifts as shares of the length of each axis, (B, 3).
    """
    for axis in range(3):
        length = x.shape[axis + 2]
        if length == 1:
            continue
        moved = (shares[:, axis] * length).round().long()
        index = (torch.arange(length, device=x.device)[None] - moved[:, None]).clamp(0, length - 1)
        view = [len(x), 1, 1, 1, 1]
        view[axis + 2] = length
        x = x.gather(axis + 2, index.view(view).expand_as(x))
    return x


def _target(config: ClassificationConfig, data: Collection) -> str:
    """Return the kind of target: classes, ordinal or real."""
    asked = config.target
    where = ", ".join(sorted(set(data.datasets))) or "the data"
    labels = [label for label in data.labels if known_label(label)]
    if not labels:
        raise DataError(
            f"{where}: none of the {len(data)} volumes has a label, which classification needs; {CSV_HELP}"
        )
    return kind_of_labels(labels, where) if asked == "auto" else asked
