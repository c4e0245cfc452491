"""The proxy-task interface: unlabelled volumes in, a loss on the shared encoder out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor, nn

from ssl3d.encoder import Encoder
from ssl3d.rng import BatchRng

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ssl3d.data.store.collection import Collection
    from ssl3d.data.store.volume import Volume


class StepOutput(NamedTuple):
    """What one forward pass of a proxy gives.

    Attributes:
        loss: Scalar, differentiable.
        metrics: Scalars by name, detached; one of them is the proxy's `main` metric.
        picture: Draws input, target and prediction when called; None where there is nothing to see.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = {}
    picture: Callable[[], Figure] | None = None


class Proxy(nn.Module, ABC):
    """A proxy task. One file, one class, registered under the entry-point group `ssl3d.proxies`.

    Attributes:
        Config: A dataclass of options that checks itself in `__post_init__` (raise ValueError, naming
            the field). Its fields become `--<proxy>.<field>` flags.
        paper: Citation, shown by `ssl3d proxies` and kept in checkpoints.
        main: Name of the metric shown in the progress bar.
        recipe: Values of `ssl3d pretrain` options (`batch_size`, `lr`, ...) that make this proxy learn;
            they hold where the user says nothing.
        mixed: Whether `forward` takes the whole mixed batch at once: a list of groups, and a list of
            their generators. A loss that gathers over ranks needs this, since a rank may lack a group.
        uses_labels: Whether labels, masks or boxes are learned from; checkpoints then say that they saw
            them. Without it, `draw` is refused them.
        distinct: Whether no subject should come twice in a batch, where there are subjects enough. Without
            it every data set has its equal share of each batch, however few its subjects are.
    """

    Config: ClassVar[type]
    paper: ClassVar[str]
    main: ClassVar[str]
    recipe: ClassVar[Mapping[str, Any]] = {}
    mixed: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = False
    distinct: ClassVar[bool] = True

    def __init__(self, config: Any, encoder: Encoder) -> None:
        """Keeps config and encoder; subclasses add heads, sized from `encoder.channels`."""
        super().__init__()
        self.config = config
        self.encoder = encoder

    @classmethod
    def in_channels(cls, config: Any, data_channels: int) -> int:
        """Channels of what the encoder is fed, where the volumes have `data_channels`: as many.

        A proxy that reads channels as something else (colours as slices) says otherwise, and what it makes
        of volumes in `present`. The encoder is built for that many channels.

        Raises:
            UsageError: Volumes with so many channels are of no use to it; the message says what would be.
        """
        return data_channels

    def present(self, volumes: Tensor) -> Tensor:
        """Volumes (B, C, D, H, W), as stored, as the encoder takes them: as they are.

        For what is looked at while training (the online kNN score, the measure of collapse).
        """
        return volumes

    @classmethod
    @abstractmethod
    def draw(cls, config: Any, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Reads one example's crops, in a worker, on the CPU; all randomness from `rng`.

        Returns tensors by name. Examples whose names and shapes agree are stacked into one group; the
        toolkit adds `index`, `subject` and `dataset` (int64 scalars, unique over all stores).

        Raises:
            DataError: This volume cannot serve (too small, nothing to see). It is set aside, by name,
                and another takes its place.
        """

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Augments or corrupts, encodes, and computes the loss, on the device.

        Args:
            batch: One group: stacked examples, first axis B.
            rng: The step's generator for these B examples.
        """

    def setup(self, data: Collection) -> None:
        """Sizes what depends on the data (memory banks, branches), before weights are loaded.

        Where a checkpoint is loaded without its data, `data` is an outline of them
        (`ssl3d.checkpoint.outline`).
        """

    def outline(self) -> Mapping[str, Tensor]:
        """What `setup` found in the data beyond what every checkpoint keeps of them, by name.

        Small tensors. Without the data, `setup` gets them as the attribute `found` of their outline.
        """
        return {}

    def start_epoch(self, epoch: int, loader: Any) -> None:
        """Called before each pass over the data, on every rank; `loader` gives batches to cluster.

        Iterating over `loader` yields lists of groups, as `forward` gets them, every volume once.
        """

    def after_step(self, step: int, total: int) -> None:
        """Called after each optimizer step, on every rank: moving averages, queues.

        A momentum teacher is a copy made in `__init__`, `copy.deepcopy(encoder).requires_grad_(False)`: the
        optimizer leaves it out, checkpoints hold it, `--init` has given the encoder its weights by then;
        `exports` makes it an encoder to use. `forward` runs several times between two of these calls
        (`--accumulate`), and in eval mode for held-out subjects: it keeps the keys of a queue in a list,
        while training, gathered over the ranks (`ssl3d.api.gather`, which a `mixed` proxy may call), and
        here they go into a buffer.
        """

    def exports(self) -> Mapping[str, Encoder]:
        """Other encoders than the shared one that are exported too, by the name of their folder in the run.

        A momentum teacher, such as {"teacher": self.teacher}: RUN/teacher is then an encoder like
        RUN/encoder, and with `--save-at` RUN/teacher-at-25 is one like RUN/encoder-at-25. They are copies
        of the shared one, modules of the proxy.
        """
        return {}

    def travels(self) -> Mapping[str, nn.Module]:
        """Modules that are exported beside the encoder, by name, as they serve without the proxy.

        Each has its options in a dataclass, its attribute `config`, and is made from it alone; its class
        is listed in `ssl3d.checkpoint.travellers`, whose `load_traveller` loads it.
        """
        return {}
