"""The examples of one step: groups that stack, and their parts for accumulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ssl3d.errors import Ssl3dError


class Group(NamedTuple):
    """Examples of one proxy with equal names and shapes, stacked.

    It is a tuple because the wrappers of Fabric and torch take nothing else apart; its own length says
    nothing, that of `rows` is the number of examples.

    Attributes:
        proxy: Name of the proxy that the examples are for.
        tensors: Tensors of `draw`, first axis B, and `index`, `subject`, `dataset`, each (B,) int64.
        rows: Position of each of the B examples in the global batch.
        total: Number of examples in the global batch, over all groups, parts and ranks.
        volumes: Name of each example's volume, data set/id.
        signature: Names, shapes and types; groups are in the order of proxies, then of signatures.
    """

    proxy: str
    tensors: dict[str, Tensor]
    rows: tuple[int, ...]
    total: int
    volumes: tuple[str, ...]
    signature: str = ""

    def to(self, device: torch.device | str) -> Group:
        """Move the tensors to a device, without waiting for the copy where the memory is pinned."""
        return self._replace(tensors={k: v.to(device, non_blocking=True) for k, v in self.tensors.items()})

    def pin_memory(self) -> Group:
        """Copy the tensors into page-locked memory; torch's DataLoader calls it."""
        return self._replace(tensors={k: v.pin_memory() for k, v in self.tensors.items()})

    def take(self, places: Sequence[int]) -> Group:
        """Select some of the B examples by their places in this group."""
        return self._replace(
            tensors={key: value[places] for key, value in self.tensors.items()},
            rows=tuple(self.rows[place] for place in places),
            volumes=tuple(self.volumes[place] for place in places),
        )


@dataclass
class Batch:
    """Examples of one step, on this rank.

    Attributes:
        step: Number of the step.
        groups: Groups of examples, in the same order on every rank.
        waited: Seconds that the training loop waited for the batch.
        failures: Reasons why volumes could not be drawn, by name.
        error: Error that ends the run: no volume can be drawn, or a proxy refuses its options.
    """

    step: int
    groups: list[Group]
    waited: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)
    error: Ssl3dError | None = None

    @property
    def volume_ids(self) -> list[str]:
        """Names of the volumes in the batch, data set/id, each once."""
        return list(dict.fromkeys(name for group in self.groups for name in group.volumes))

    def to(self, device: torch.device | str) -> Batch:
        """Move all groups to a device."""
        return replace(self, groups=[group.to(device) for group in self.groups])

    def pin_memory(self) -> Batch:
        """Copy all groups into page-locked memory; torch's DataLoader calls it."""
        return replace(self, groups=[group.pin_memory() for group in self.groups])


def cut(groups: Sequence[Group], parts: int) -> list[list[Group]]:
    """Cut the groups of a step into parts of equally many rows, for accumulation."""
    if parts == 1:
        return [list(groups)]
    ordered: dict[str, list[int]] = {}
    for group in groups:
        ordered.setdefault(group.proxy, []).extend(group.rows)
    part_of = {
        (proxy, row): place * parts // len(rows)
        for proxy, rows in ordered.items()
        for place, row in enumerate(sorted(rows))
    }
    cuts: list[list[Group]] = [[] for _ in range(parts)]
    for group in groups:
        for part in range(parts):
            own = [place for place, row in enumerate(group.rows) if part_of[group.proxy, row] == part]
            if own:
                cuts[part].append(group.take(own))
    return cuts
