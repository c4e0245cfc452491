"""Fine-tuning: what a task must bring, and the protocol that trains every contestant on it alike."""

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

    from ssl3d.api import BatchRng, Collection, Encoder, Volume, statistics

Array = NDArray[Any]

TASKS: dict[str, str] = {
    "classification": "ssl3d_benchmarks.finetune.classification:Classification",
    "segmentation": "ssl3d_benchmarks.finetune.segmentation.task:Segmentation",
    "detection": "ssl3d_benchmarks.finetune.detection.task:Detection",
}
"""Name of a task -> module:class; imported when named."""


class FinetuneTask(ABC):
    """What is learned downstream: the model, its loss, its predictions and their scores.

    The frame owns everything else: who is trained, on which subjects, with which optimizer and schedule,
    which step is kept, records and tables. A task is made once per run and never told which contestant
    it serves. It must pickle (workers draw with it).

    Attributes:
        Config: Dataclass of its own options, flags `--NAME.*`.
        name: As in `TASKS`; records are of task `finetune-NAME/TARGET`.
        version: Raised whenever the same contestant on the same data would get another score.
        description: One line.
        reference: Where model and metrics come from.
        mains: Kind of target -> the score that ranks contestants and chooses steps, higher being better.
        recipe: Defaults of the frame's options for this task, by field of `finetune_command.Options`
            (steps or epochs, batch_size, lr, lr_scratch, optimizer, ...).
        presets: Name -> as `recipe`, for `--preset`; a key of the form `NAME.field` sets an option of
            the task's own.
        trivial: Names of the rows without a network that belong beside its results.
        floors: Kind of target -> what a network that learned its task is above: a row named in `trivial`,
            or the score of guessing. Below it, tables and reports say so loudly.
        target: Kind of target, a key of `mains`; set by `__init__`.
    """

    Config: ClassVar[type]
    name: ClassVar[str]
    version: int
    description: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    mains: ClassVar[Mapping[str, str]]
    recipe: ClassVar[Mapping[str, Any]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    trivial: ClassVar[tuple[str, ...]] = ()
    floors: ClassVar[Mapping[str, str | float]] = {}

    config: Any
    target: str
    names: tuple[str, ...]
    classes: tuple[str, ...]

    @abstractmethod
    def __init__(self, config: Any, data: Collection) -> None:
        """Finds classes, spacings and the like.

        Args:
            config: Its options.
            data: All volumes that have a target (`known`), of train, val and test.

        Raises:
            DataError: There is nothing to learn, such as one class only.
        """

    @classmethod
    def scorer(cls, settings: Mapping[str, Any], target: str) -> FinetuneTask:
        """The task as far as `score_functions` goes, from what a record says: reports have no data.

        Args:
            settings: As `settings` made them; `classes` are there as `names` and `classes`.
            target: Of the record.
        """
        made = object.__new__(cls)
        made.target = target
        known = {one.name for one in dataclasses.fields(cls.Config)}
        given = {key: _tupled(value) for key, value in settings.items() if key in known}
        made.config = cls.Config(**given)
        made.names = made.classes = tuple(map(str, settings.get("classes") or ()))
        return made

    @classmethod
    def known(cls, config: Any, data: Collection) -> NDArray[np.bool_]:
        """Which volumes have a target, (N,); the others are left out and counted.

        Raises:
            DataError: None has one; the message says what to give.
        """
        return np.ones(len(data), dtype=bool)

    def strata(self, data: Collection) -> Array | None:
        """Class of each volume (N,), by which subsets and folds are stratified; None for none."""
        return None

    def settings(self) -> dict[str, Any]:
        """What a record keeps of the task's options, resolved; everything here changes the record's key."""
        return dataclasses.asdict(self.config)

    @abstractmethod
    def model(self, encoder: Encoder, train: Collection) -> nn.Module:
        """The whole network; its attribute `encoder` is that encoder. New weights follow torch's seed.

        What it is made of may follow from the training subjects, and from no others.
        """

    def start(self, model: nn.Module, train: Collection) -> None:
        """Sets what follows from the training subjects alone, such as class weights; before training.

        It goes into buffers of the model: the same task object serves every subset.
        """
        return

    @abstractmethod
    def draw(self, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """One training example, on the CPU, in a worker: reading and cutting.

        Examples of equal names and shapes are stacked; `loss` runs once for each such group of a batch,
        so tensors of varying length (boxes) are padded. `index`, `subject` and `dataset` are added.
        """

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], rng: BatchRng
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of stacked examples on the device, and values for the log; augments by `rng`."""

    @abstractmethod
    def predict(self, model: nn.Module, volume: Volume) -> dict[str, Any]:
        """What the scores of one volume are computed from, as JSON holds it.

        The model is in evaluation mode, without gradients, in the run's precision. The frame adds
        `dataset`, `subject` and `id`.
        """

    def predict_all(self, model: nn.Module, data: Collection) -> list[dict[str, Any]]:
        """`predict` of every volume, in order; overridden where batches are faster."""
        return [self.predict(model, volume) for volume in data]

    def predict_for_choosing(self, model: nn.Module, data: Collection) -> list[dict[str, Any]]:
        """As `predict_all`, of validation volumes, by no more labels than training may see of its own."""
        return self.predict_all(model, data)

    @abstractmethod
    def score_functions(
        self, predictions: Sequence[Mapping[str, Any]]
    ) -> tuple[Array, dict[str, statistics.Statistic]]:
        """As `Benchmark.score_functions`: clusters, and scores as functions of resampling weights."""

    def predict_trivial(
        self, name: str, train: Collection, val: Collection, test: Collection, seed: int
    ) -> list[dict[str, Any]]:
        """Predictions of a row named in `trivial`, with `dataset`, `subject` and `id`."""
        raise NotImplementedError(name)

    def save_prediction(self, model: nn.Module, volume: Volume, folder: Path) -> Path | None:
        """Writes a prediction for other programs (NIfTI, CSV); None where there is nothing to write."""
        return None

    def picture(self, model: nn.Module, data: Collection) -> Any:
        """A matplotlib figure of predictions beside the truth on some of `data`, or None."""
        return None


def _tupled(value: Any) -> Any:
    """JSON's lists as an option has them."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def task_class(name: str) -> type[FinetuneTask]:
    """The class of a task.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"--task {name}: is none of {', '.join(TASKS)}{hint}")
    module, _, kind = TASKS[name].partition(":")
    found: type[FinetuneTask] = getattr(importlib.import_module(module), kind)
    return found


def patch_within(patch: Sequence[int], data: Collection) -> tuple[int, int, int]:
    """Return the patch (D, H, W), voxels, no larger than the largest volume along any axis.

    The limit is that volume's side, up to the next multiple of 8 where it is more than one voxel: of images
    alone the patch has depth 1. What an image among volumes gives, `fit_size` says.
    """
    largest = np.asarray(data.shapes)[:, 1:].max(axis=0).tolist()
    limits = [1 if side == 1 else -(-side // 8) * 8 for side in largest]
    d, h, w = (min(side, limit) for side, limit in zip(patch, limits, strict=True))
    return (d, h, w)


def file_name(volume: Volume) -> str:
    """Of a volume's prediction, without suffix: data set and id, another for every volume.

    What a file name should not hold becomes `_`; a hash then keeps `p1/t1` and `p1_t1` apart.
    """
    # Ids of several data sets in one store begin with the data set's name.
    own = volume.id.removeprefix(f"{volume.dataset}/")
    words = re.sub(r"[^\w.=+-]", "_", own)
    name = re.sub(r"[^\w.=+-]+", "_", f"{volume.dataset}_{words}").strip("_")
    return name if words == own else f"{name}-{hashlib.sha256(own.encode()).hexdigest()[:6]}"
