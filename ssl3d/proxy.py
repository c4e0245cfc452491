"""The proxy-task interface: unlabelled volumes in, a loss on the shared encoder out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    """Output of one forward pass of a proxy.

    Attributes:
        loss: Loss, a differentiable scalar.
        metrics: Detached scalars by name; one of them is the proxy's `main` metric.
        picture: Function that draws input, target and prediction; None where there is nothing to see.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = {}
    picture: Callable[[], Figure] | None = None


class EmbeddedViews(NamedTuple):
    """Views of some examples as their network gives them, before they are compared with each other.

    Attributes:
        rows: Tensors by name, first axis R, in which a row depends on no other one (batch norm apart).
        picture: Function that draws what there is to see; None where there is nothing.
    """

    rows: dict[str, Tensor]
    picture: Callable[[], Figure] | None = None


class Proxy(nn.Module, ABC):
    """Proxy task: one file, one class, registered under the entry-point group `ssl3d.proxies`.

    Attributes:
        Config: Dataclass of options, which checks itself in `__post_init__` (by a ValueError that names
            the field). Its fields become `--<proxy>.<field>` flags.
        paper: Citation, which `ssl3d proxies` shows and checkpoints keep.
        main: Name of the metric that the progress line shows.
        recipe: Values of `ssl3d pretrain` options (`batch_size`, `lr`, ...) with which this proxy learns;
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
        """Keep config and encoder; subclasses add heads, sized by `encoder.channels`."""
        super().__init__()
        self.config = config
        self.encoder = encoder

    @classmethod
    def in_channels(cls, config: Any, data_channels: int) -> int:
        """Return the channels that the encoder is fed for volumes of `data_channels`: as many, by default.

        A proxy that reads channels as something else (colours as slices) returns another number, and
        converts volumes in `present`. The encoder is built for that many channels.

        Raises:
            UsageError: Volumes with so many channels are of no use to it; the message says what would be.
        """
        return data_channels

    def present(self, volumes: Tensor) -> Tensor:
        """Convert stored volumes (B, C, D, H, W) to what the encoder takes: by default they stay.

        Measures while training use it (the online kNN score, collapse).
        """
        return volumes

    @classmethod
    @abstractmethod
    def draw(cls, config: Any, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw one example from a volume, in a worker, on the CPU, with all randomness from `rng`.

        Returns:
            Tensors by name. Examples whose names and shapes agree are stacked into one group; the toolkit
            adds `index`, `subject` and `dataset` (int64 scalars, unique over all stores).

        Raises:
            DataError: This volume cannot serve (too small, nothing to see). It is set aside, by name,
                and another takes its place.
        """

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Augment or corrupt, encode, and compute the loss, on the device.

        Args:
            batch: Group of stacked examples, first axis B.
            rng: Generator of the step for these B examples.
        """

    def embed_views(self, batch: list[dict[str, Tensor]], rng: list[BatchRng]) -> EmbeddedViews:
        """Augment and embed some examples: the part of `forward` that needs the memory.

        A `mixed` proxy whose loss is a function of such rows writes this and `compare`; its `forward` is
        the one after the other. Then `--grad-cache` can embed a batch part by part and compare all of it:
        each part is embedded again in the backward pass, by the same random numbers.

        Args:
            batch: Groups of a part of the batch.
            rng: Generator of each group.
        """
        raise NotImplementedError(f"{type(self).__name__} has no embed_views")

    def compare(self, embedded: EmbeddedViews) -> StepOutput:
        """Compute the loss of what `embed_views` gave, over all rows and ranks."""
        raise NotImplementedError(f"{type(self).__name__} has no compare")

    @classmethod
    def runs_used(cls, config: Any) -> Sequence[str]:
        """Return folders of other runs that the proxy learns from; what those saw counts as seen here."""
        return ()

    def setup(self, data: Collection) -> None:
        """Size what depends on the data (memory banks, branches), before weights are loaded.

        Where a checkpoint is loaded without its data, `data` is an outline of them
        (`ssl3d.checkpoint.outline`).
        """

    def outline(self) -> Mapping[str, Tensor]:
        """Return what `setup` found in the data beyond what checkpoints keep, as small tensors by name.

        Without the data, `setup` gets them as the attribute `found` of their outline.
        """
        return {}

    def start_epoch(self, epoch: int, loader: Any) -> None:
        """Prepare a pass over the data, such as by clustering; every rank calls it.

        Args:
            epoch: Number of the pass.
            loader: Iterable over lists of groups, as `forward` gets them, that hold every volume once.
        """

    def after_step(self, step: int, total: int) -> None:
        """Update moving averages and queues after an optimizer step; every rank calls it.

        A momentum teacher is a copy made in `__init__`, `copy.deepcopy(encoder).requires_grad_(False)`: the
        optimizer leaves it out, checkpoints hold it, `--init` has given the encoder its weights by then;
        `exports` makes it an encoder to use. `forward` runs several times between two of these calls
        (`--accumulate`), and in eval mode for held-out subjects: it keeps the keys of a queue in a list,
        while training, gathered over the ranks (`ssl3d.api.gather`, which a `mixed` proxy may call), and
        here they go into a buffer.
        """

    def exports(self) -> Mapping[str, Encoder]:
        """Return other encoders to export beside the shared one, by the name of their folder in the run.

        With a momentum teacher, {"teacher": self.teacher}, RUN/teacher becomes an encoder like RUN/encoder,
        and with `--save-at` RUN/teacher-at-25 one like RUN/encoder-at-25. They are copies of the shared
        one, and modules of the proxy.
        """
        return {}

    def travels(self) -> Mapping[str, nn.Module]:
        """Return modules to export beside the encoder, by name, which serve without the proxy.

        Each has its options in a dataclass, its attribute `config`, and is made from it alone; its class
        is listed in `ssl3d.checkpoint.travellers`, whose `load_traveller` loads it.
        """
        return {}
