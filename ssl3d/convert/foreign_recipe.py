"""What a layout of foreign weights is, and what it says of a file: the recipe for our encoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ssl3d.convert.foreign_files import WeightsFile

State = dict[str, Tensor]
AXES = "zyx"
"""Our order of a volume's axes, D H W: towards the head, the front and the right."""


@dataclass(frozen=True)
class Source:
    """Origin of weights, and what follows from it for whoever uses them.

    Attributes:
        title: Short name of the source.
        citation: Citation of the paper.
        expects: Description, for a person, of the volumes that the weights learned from.
        prepare: Options of `ssl3d prepare` that come nearest to that preparation.
        labels_seen: Whether they learned from labels of medical volumes.
        labels: Description of those labels.
        licence: Licence of the weights, and who says so; empty where that is not known.
    """

    title: str
    citation: str = ""
    expects: str = "not known"
    prepare: dict[str, Any] = field(default_factory=dict)
    labels_seen: bool = False
    labels: str = "not known"
    licence: str = ""


@dataclass(frozen=True)
class Recipe:
    """Architecture and options of our encoder that foreign weights belong to.

    Attributes:
        architecture: Registered name of the encoder.
        config: Options that the weights decide, or their toolkit; triples along the axes of `axes`.
        state: Weights by our names, those of heads and decoders by their own.
        source: Origin of the weights.
        notes: Notes on what the file says beside its weights.
        assumed: What neither the weights nor the file says, as it was assumed, and the option that
            changes it: strides, pools and other operators without parameters.
        stem: Key of the convolution that reads the volume.
        axes: Axes of the network's input in its own order, a permutation of `AXES`; 3D kernels are turned
            to ours.
        tables: Grid of tokens of each table of positions (1, N, E), which turns with the axes; by key.
        turns: Whether the network is the same with its axes in another order.
    """

    architecture: str
    config: dict[str, Any]
    state: State
    source: Source
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    stem: str = "conv1.weight"
    axes: str = AXES
    tables: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    turns: bool = True


@dataclass(frozen=True)
class Place:
    """Place of one network's weights in a file.

    Attributes:
        file: File that holds them.
        prefix: What stands before their names there.
        asked: Whether the user named the layout.
    """

    file: WeightsFile
    prefix: str = ""
    asked: bool = False

    def __str__(self) -> str:
        return str(self.file.path)


@dataclass(frozen=True)
class Layout:
    """Naming of weights that a family of files shares.

    Attributes:
        name: Name for `--layout`.
        files: Description of the files that have it.
        anchor: Key that every such network has; what stands before it in a file is its prefix.
        fits: Function that tells whether tensors without their prefix are such a network.
        recipe: Function that returns our encoder for them.
    """

    name: str
    files: str
    anchor: str
    fits: Callable[[Mapping[str, Tensor], Place], bool]
    recipe: Callable[[State, Place], Recipe]


def axes_of(state: Mapping[str, Tensor], key: str) -> int:
    """Return the number of a tensor's axes, 0 where it is not there."""
    return state[key].ndim if key in state else 0


def blocks(state: Mapping[str, Tensor], pattern: str) -> dict[int, int]:
    """Count the blocks of each stage by the two numbers that a pattern finds in keys."""
    counts: dict[int, int] = {}
    for key in state:
        match = re.match(pattern, key)
        if match:
            stage, block = int(match[1]), int(match[2])
            counts[stage] = max(counts.get(stage, 0), block + 1)
    return counts


def turned(state: State, axes: str, tables: Mapping[str, tuple[int, ...]]) -> State:
    """Turn 3D kernels and tables of positions from a network's order of axes to ours."""
    order = [axes.index(axis) for axis in AXES]
    result = dict(state)
    for key, value in state.items():
        if value.ndim == 5:
            result[key] = value.permute(0, 1, *(2 + place for place in order)).contiguous()
        elif key in tables:
            grid = value.unflatten(1, tables[key])
            result[key] = grid.permute(0, *(1 + place for place in order), 4).flatten(1, 3)
    return result
