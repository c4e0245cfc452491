"""The contract of a downstream task, and the names of the tasks."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ssl3d.api import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from ssl3d.api import BatchRng, Collection, Encoder, Portable, Prediction, Volume, statistics

Array = NDArray[Any]

TASKS: dict[str, str] = {
    "classification": "ssl3d_benchmarks.finetune.classification:Classification",
    "segmentation": "ssl3d_benchmarks.finetune.segmentation.task:Segmentation",
    "detection": "ssl3d_benchmarks.finetune.detection.task:Detection",
}
"""Name of a task -> module:class; imported when named."""


class FinetuneTask(ABC):
    """Downstream task: the model, its loss, its predictions and their scores.

    The frame owns everything else: contestants, subjects, optimizer and schedule, the choice of the step,
    records and tables. A task is made once per run and never learns which contestant it serves. It must
    pickle, since workers draw with it.

    Attributes:
        Config: Dataclass of the task's own options, flags `--NAME.*`.
        name: Key of the task in `TASKS`; its records are of task `finetune-NAME/TARGET`.
        version: Version of the scores, raised whenever the same contestant on the same data would get
            another score.
        description: Description of the task in one line.
        reference: Publications from which model and metrics come.
        mains: Kind of target -> score that ranks contestants and chooses steps, higher being better.
        recipe: Defaults of the frame's options for this task, by field of `FinetuneOptions`
            (steps or epochs, batch_size, lr, lr_scratch, optimizer, ...).
        planned: Options of the frame that `plan` proposes where neither flag, preset nor recipe sets them.
        repeats_volumes: Whether a batch may hold several examples of one volume, so that its size is not
            bound by the number of training volumes.
        presets: Name -> options for `--preset`, by the fields of `recipe`; a key of the form `NAME.field`
            sets an option of the task's own.
        trivial: Names of the rows without a network that belong beside its results.
        floors: Kind of target -> level that a network must exceed to have learned its task: a row named in
            `trivial`, or the score of guessing. Tables and reports warn of a network below it.
        config: Options of the task, resolved.
        target: Kind of target, a key of `mains`; set by `__init__`.
        reasons: Sentences that say what was planned and why, shown before the training and kept in records.
        names: Names of the classes as tables show them.
        classes: Classes of the target; empty for values.
        can_flip: Whether training mirrored volumes, so that predictions may be averaged over mirrored
            copies.
    """

    Config: ClassVar[type]
    name: ClassVar[str]
    version: int
    description: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    mains: ClassVar[Mapping[str, str]]
    recipe: ClassVar[Mapping[str, Any]] = {}
    planned: ClassVar[tuple[str, ...]] = ()
    repeats_volumes: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    trivial: ClassVar[tuple[str, ...]] = ()
    floors: ClassVar[Mapping[str, str | float]] = {}

    config: Any
    target: str
    reasons: tuple[str, ...] = ()
    names: tuple[str, ...]
    classes: tuple[str, ...]
    can_flip: bool = False

    @abstractmethod
    def __init__(self, config: Any, data: Collection) -> None:
        """Find classes, spacings and other properties of the data.

        Args:
            config: Options of the task.
            data: All volumes that have a target (`known`), for training, validation and test.

        Raises:
            DataError: There is nothing to learn, such as one class only.
        """

    @classmethod
    def scorer(cls, settings: Mapping[str, Any], target: str) -> FinetuneTask:
        """Restore the task from a record, as far as `score_functions` needs it: reports have no data.

        Args:
            settings: Settings in the record; their `classes` become `names` and `classes`.
            target: Kind of target in the record.
        """
        task = object.__new__(cls)
        task.target = target
        known = {field.name for field in dataclasses.fields(cls.Config)}
        given = {key: _tupled(value) for key, value in settings.items() if key in known}
        task.config = cls.Config(**given)
        task.names = task.classes = tuple(map(str, settings.get("classes") or ()))
        return task

    @classmethod
    def known(cls, config: Any, data: Collection) -> NDArray[np.bool_]:
        """Return a mask (N,) of the volumes that have a target; the others are left out and counted.

        Raises:
            DataError: No volume has a target; the message says what to give.
        """
        return np.ones(len(data), dtype=bool)

    def strata(self, data: Collection) -> Array | None:
        """Return the class of each volume (N,), by which subsets and folds are stratified, or None."""
        return None

    def plan(self, train: Collection) -> Mapping[str, tuple[Any, str]]:
        """Settle options that were left open from the training volumes, and say why in `reasons`.

        Called once, before any training, with the volumes of training and validation; options of the
        task's own are kept in `config`.

        Returns:
            Values of the options named in `planned`, each with its reason.
        """
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the resolved options that a record keeps; each of them is part of the record's key."""
        return dataclasses.asdict(self.config)

    @abstractmethod
    def model(self, encoder: Encoder, train: Collection | None) -> nn.Module:
        """Build the network around an encoder, which becomes its attribute `encoder`.

        New weights follow torch's seed. The architecture may depend on the training subjects alone; what
        does so is in `keep`, for `restore` has none.
        """

    def start(self, model: nn.Module, train: Collection) -> None:
        """Set properties of the training subjects, such as class weights, before the training.

        They go into buffers of the model, since the same task object serves every subset.
        """
        return

    @abstractmethod
    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw one training example by reading and cutting, on the CPU, in a worker.

        Examples of equal names and shapes are stacked; `loss` runs once for each such group of a batch,
        so tensors of varying length (boxes) must be padded. The frame adds `index`, `subject` and
        `dataset`.
        """

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], rng: BatchRng
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the mean loss of stacked examples, augmented by `rng`, and values for the log."""

    @abstractmethod
    def predict(self, model: nn.Module, volume: Volume) -> dict[str, Any]:
        """Predict one volume: all that its scores are computed from, as JSON holds it.

        The model is in evaluation mode, without gradients, in the run's precision. The frame adds
        `dataset`, `subject` and `id`.
        """

    def predict_all(self, model: nn.Module, data: Collection) -> list[dict[str, Any]]:
        """Predict every volume, in order; tasks override this where batches are faster."""
        return [self.predict(model, volume) for volume in data]

    def predict_for_choosing(self, model: nn.Module, data: Collection) -> list[dict[str, Any]]:
        """Predict validation volumes, scored by no more labels than training has of each volume."""
        return self.predict_all(model, data)

    @abstractmethod
    def infer(self, model: nn.Module, volume: Volume, flip: bool = False) -> Prediction:
        """Predict one volume for its user, without a look at its target.

        A task that was restored from a card can do it: it has no data. `predict` comes to the same.

        Args:
            model: Model in evaluation mode.
            volume: Volume to predict, perhaps one in memory only.
            flip: Whether to average over mirrored copies, where `can_flip`.
        """

    def portable(self, model: nn.Module) -> Portable | None:
        """Return the network of one window as other programs use it; None where there is none."""
        return None

    def kinds(self, data: Collection) -> list[dict[str, Any]]:
        """Return `value` and `name` of each class, in the order of the outputs; none where values are."""
        return [{"value": n, "name": name} for n, name in enumerate(self.classes)]

    def keep(self, model: nn.Module) -> dict[str, Any]:
        """Return what `restore` needs beside the settings, as JSON holds it."""
        return {}

    @classmethod
    def restore(
        cls, settings: Mapping[str, Any], target: str, kept: Mapping[str, Any], encoder: Encoder
    ) -> tuple[FinetuneTask, nn.Module]:
        """Restore the task as far as `infer` needs it, and its model with new weights, without data.

        Args:
            settings: Answer of `settings` at that time.
            target: Kind of target.
            kept: Answer of `keep`.
            encoder: Encoder of the model.
        """
        task = cls.scorer(settings, target)
        return task, task.model(encoder, None)

    @abstractmethod
    def score_functions(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, statistics.Statistic]]:
        """Return clusters, and scores as functions of resampling weights (`Benchmark.score_functions`)."""

    def predict_trivial(
        self, name: str, train: Collection, val: Collection, test: Collection, seed: int
    ) -> list[dict[str, Any]]:
        """Predict by a row named in `trivial`; the rows have `dataset`, `subject` and `id`."""
        raise NotImplementedError(name)

    def measured(self, name: str) -> Sequence[int]:
        """Return the mask values that a row of `trivial` measures on test volumes; none for no mask."""
        return ()

    def save_prediction(self, model: nn.Module, volume: Volume, folder: Path) -> Path | None:
        """Write a prediction for other programs (NIfTI, CSV); None where there is nothing to write."""
        return None

    def picture(self, model: nn.Module, data: Collection, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Draw a matplotlib figure of predictions beside the truth, for a median and the worst volume.

        Args:
            model: Trained network.
            data: Volumes that were predicted.
            rows: Predictions of these volumes, as `predict_all` returns them.

        Returns:
            Figure; None where the task draws none.
        """
        return None


def median_and_worst(values: Sequence[float]) -> list[tuple[str, int]]:
    """Choose the volumes that a picture shows, with the words for each.

    Args:
        values: Score of each volume, a higher one is better; NaN for none.

    Example:
        >>> median_and_worst([0.9, float("nan"), 0.2, 0.7])
        [('median', 3), ('worst', 2)]
    """
    order = sorted((k for k, value in enumerate(values) if value == value), key=lambda k: values[k])
    if len(order) < 2:
        return [("", k) for k in order or range(min(len(values), 1))]
    return [("median", order[len(order) // 2]), ("worst", order[0])]


def _tupled(value: Any) -> Any:
    """Convert the lists of JSON to tuples, as options have them."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def task_class(name: str) -> type[FinetuneTask]:
    """Return the class of a task by its name.

    Raises:
        UsageError: There is no task of that name.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"--task {name} is none of {', '.join(TASKS)}{hint}")
    module, _, kind = TASKS[name].partition(":")
    task: type[FinetuneTask] = getattr(importlib.import_module(module), kind)
    return task


def patch_within(patch: Sequence[int], shapes: Array) -> tuple[int, int, int]:
    """Return the patch (D, H, W), voxels, no larger than the largest of volumes (N, 4) along any axis.

    The limit is the side of that volume, rounded up to a multiple of 8 where it is more than one voxel, so
    the patch has depth 1 if all volumes are images. `fit_size` fits it to an image among volumes.
    """
    largest = np.asarray(shapes)[:, 1:].max(axis=0).tolist()
    limits = [1 if side == 1 else -(-side // 8) * 8 for side in largest]
    d, h, w = (min(side, limit) for side, limit in zip(patch, limits, strict=True))
    return (d, h, w)


def file_name(volume: Volume) -> str:
    """Return the file name of a volume's prediction, without suffix: data set and id, unique by volume.

    Characters that a file name should not hold become `_`; a hash then keeps `p1/t1` and `p1_t1` apart.
    """
    # Ids of several data sets in one store begin with the data set's name.
    own = volume.id.removeprefix(f"{volume.dataset}/")
    words = re.sub(r"[^\w.=+-]", "_", own)
    name = re.sub(r"[^\w.=+-]+", "_", f"{volume.dataset}_{words}").strip("_")
    return name if words == own else f"{name}-{hashlib.sha256(own.encode()).hexdigest()[:6]}"
