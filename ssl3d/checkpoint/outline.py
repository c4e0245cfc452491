"""The outline of a run's volumes that its checkpoints keep, without naming anybody."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ssl3d.errors import CheckpointError

if TYPE_CHECKING:
    from ssl3d.data.store.collection import Collection


class Outline(Sequence[Any]):
    """Outline of the volumes of a run, enough for most proxies to size themselves.

    Attributes:
        found: Tensors that the proxy's own `outline` kept, by name.

    Args:
        columns: Tensors of `outline_of`, and of the proxies' own outlines.
        instead: Call that loads with the data, for the message where more is needed.
        proxy: Name of the proxy to be sized.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor], instead: str, proxy: str = "") -> None:
        own = f"{proxy}/"
        self.found = {key.removeprefix(own): v for key, v in columns.items() if key.startswith(own)}
        shown = {key: value.tolist() for key, value in columns.items() if "/" not in key}
        self.shapes = [tuple(shape) for shape in shown["shapes"]]
        self.spacings = [tuple(spacing) for spacing in shown["spacings"]]
        self.dataset_codes, self.subject_codes = columns["datasets"].numpy(), columns["subjects"].numpy()
        self.datasets = [str(code) for code in shown["datasets"]]
        self._indices, self._instead = shown["indices"], instead

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, position: Any) -> Any:
        """Return the outline of a volume."""
        return OutlinedVolume(
            int(self._indices[position]), self.shapes[position], self.spacings[position],
            self.datasets[position], str(int(self.subject_codes[position])), self._instead,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OutlinedVolume:
    """Outline of one volume, without its voxels; data set and subject are numbers written as text."""

    index: int
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    dataset: str
    subject: str
    instead: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CheckpointError(
            f"a proxy asks for `{name}` of a volume, which the checkpoint does not hold: give the data of "
            f"the run, {self.instead}"
        )


def outline_of(data: Collection) -> dict[str, torch.Tensor]:
    """Collect what checkpoints keep of the volumes of a run, as tensors by which nobody can be named."""
    import numpy as np

    return {
        "indices": torch.as_tensor(np.asarray(data.rows, dtype=np.int64)),
        "shapes": torch.as_tensor(np.asarray([tuple(shape) for shape in data.shapes], dtype=np.int64)),
        "spacings": torch.as_tensor(np.asarray(data.spacings, dtype=np.float64)),
        "datasets": torch.as_tensor(np.asarray(data.dataset_codes, dtype=np.int64)),
        "subjects": torch.as_tensor(np.asarray(data.subject_codes, dtype=np.int64)),
    }
