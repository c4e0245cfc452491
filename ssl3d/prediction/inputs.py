"""What is to be predicted: volumes of stores as they are, and scans, prepared when their turn comes."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl3d.data.geometry import Triple
from ssl3d.data.open import holds_scans, open_data
from ssl3d.data.preparation.options import PrepareOptions
from ssl3d.data.preparation.parts import digest_of, key_of
from ssl3d.data.preparation.process import (
    Prepared,
    Recipe,
    ScanTask,
    prepared_volumes,
)
from ssl3d.data.scans.arrays import Rows
from ssl3d.data.scans.find import find
from ssl3d.data.scans.found import Scan
from ssl3d.data.scans.read import header_spacing
from ssl3d.data.store.collection import Collection
from ssl3d.data.store.writer import encode_voxels
from ssl3d.errors import DataError
from ssl3d.model import TensorVolume
from ssl3d.prediction.fit import Needs


class PreparedVolume(TensorVolume):
    """Volume of a scan that was prepared for a prediction and is in no store.

    Its voxels are rounded as a store rounds them, so that predictions are those of the stored volume.

    Args:
        prepared: Volume as it was prepared; its voxels are not kept.
    """

    def __init__(self, prepared: Prepared) -> None:
        record = self.record = prepared.record
        stored, scale, offset = encode_voxels(record.id, prepared.image, prepared.dtype)
        background = np.asarray(record.done["background"], np.float32)
        if stored.dtype == np.float16:
            background = background.astype(np.float16).astype(np.float32)
        super().__init__(torch.from_numpy(stored), record.spacing, background.tolist(), scale, offset)
        self.id, self.dataset, self.subject = record.id, record.dataset, record.subject
        self.orientation, self.affine = record.orientation, record.affine


class Item(ABC):
    """One volume, or the volumes of one scan, to be predicted.

    Attributes:
        id: Name of the volume or the scan.
        dataset: Name of the data set.
        subject: Name of the subject.
        source: Path of what is predicted, for messages.
        key: Hash of what is predicted.
    """

    id: str
    dataset: str
    subject: str
    source: str
    key: str

    @abstractmethod
    def volumes(self, rows: Rows) -> Iterator[Any]:
        """Yield the prepared volumes, each when it is asked for.

        Args:
            rows: Reader of rows of archives, asked for in rising order.

        Raises:
            DataError: The scan is of no use to the models.
        """

    @property
    def series(self) -> tuple[Path, ...]:
        """Files of a DICOM series; none where it is something else."""
        return ()


class StoredItem(Item):
    """A volume of a store."""

    def __init__(self, data: Collection, position: int) -> None:
        volume = data[position]
        self._data, self._position = data, position
        self.id, self.dataset, self.subject = volume.id, volume.dataset, volume.subject
        self.source = volume.record.source or f"{volume.place[0].path}#{volume.id}"
        self.key = digest_of([volume.dataset, volume.id, volume.record.voxels])

    def volumes(self, rows: Rows) -> Iterator[Any]:
        """Yield the volume as it is stored."""
        yield self._data[self._position]


class ScanItem(Item):
    """A scan, which is prepared as the training data were."""

    def __init__(
        self, scan: Scan, recipe: Recipe, needs: Needs, stamps: dict[Path, tuple[int, int]]
    ) -> None:
        # What is known of the answer must not enter the question: a mask widens the foreground.
        self.scan = dataclasses.replace(
            scan, mask=None, label=None, boxes=None, world_boxes=None, mask_boxes=False
        )
        self._recipe, self._needs = recipe, needs
        self.id, self.dataset, self.subject = scan.id, scan.dataset, scan.subject
        member = "" if scan.member is None else f"#{scan.member[0]}[{scan.member[1]}]"
        self.source = f"{scan.source}{member}"
        self.key = digest_of([key_of(self.scan, stamps), dataclasses.asdict(recipe)])

    def volumes(self, rows: Rows) -> Iterator[Any]:
        """Prepare the scan and yield its volumes; a file of frames has several."""
        scan = self.scan
        spacing = self._needs.spacing(self._own_spacing())
        recipe = dataclasses.replace(self._recipe, spacing=spacing, medians=())
        task = ScanTask(scan, "", Path(), recipe)
        if scan.member is not None:
            task.row, _, task.sha256 = rows.of(scan.files[0][0], *scan.member)
        first = next(volumes := prepared_volumes(task))
        guessed = str(first.record.done["normalize"]["kind"])
        kind = self._needs.kind(guessed)
        if recipe.normalize == "auto" and kind != guessed and not (scan.modality or self.series):
            task.recipe = dataclasses.replace(recipe, normalize=kind)
            first = next(volumes := prepared_volumes(task))
        waiting = PreparedVolume(first)
        del first  # a large scan is not held twice
        yield waiting
        yield from map(PreparedVolume, volumes)

    def _own_spacing(self) -> Triple | None:
        """Read the spacing of the scan; None where its format has none.

        Raises:
            DataError: The header cannot be read, and the models want to know the spacing.
        """
        files = next((group for group in self.scan.files if group), ())
        if self.scan.member is not None or not files:
            return None
        try:
            return header_spacing(files)
        except DataError:
            if self._needs.placed:
                raise
            return None

    @property
    def series(self) -> tuple[Path, ...]:
        """Files of a DICOM series; none where it is something else."""
        from ssl3d.data.scans.read import is_slice

        files = self.scan.files[0] if self.scan.member is None else ()
        return tuple(files) if files and is_slice(files[0]) else ()


@dataclasses.dataclass
class Inputs:
    """All that is to be predicted.

    Attributes:
        items: Volumes and scans, in a stable order.
        rejected: (path, reason) of what was refused while scans were looked for.
        notes: Lines that the user should read.
    """

    items: list[Item]
    rejected: list[tuple[str, str]]
    notes: list[str]


def inputs_of(paths: Sequence[str], needs: Needs, options: PrepareOptions) -> Inputs:
    """List what is to be predicted.

    Args:
        paths: Stores, phantoms, and anything that `ssl3d prepare` takes.
        needs: What the models need.
        options: Options that prepare scans as the training data were.

    Raises:
        DataError: A path is missing, or holds nothing known.
    """
    inputs = Inputs([], [], [])
    stamps: dict[Path, tuple[int, int]] = {}
    sources = [path for path in paths if holds_scans([path])]
    stores = [path for path in paths if path not in sources]
    if stores:
        data = open_data(stores)
        inputs.items += [StoredItem(data, position) for position in range(len(data))]
    if sources:
        contents = find(sources, options.wanted())
        recipe = options.recipe(None, {})
        inputs.items += [ScanItem(scan, recipe, needs, stamps) for scan in contents.scans]
        inputs.rejected += contents.rejected
        inputs.notes += contents.notes
    return inputs


def names_of(items: Sequence[Item]) -> list[str]:
    """Name the files of items, without suffix: by their ids, with the data set where there are several."""
    several = len({item.dataset for item in items}) > 1
    names: list[str] = []
    for item in items:
        own = item.id.removeprefix(f"{item.dataset}/")
        plain = re.sub(r"[^\w.=+-]", "_", own)
        name = plain if plain == own else f"{plain}-{hashlib.sha256(own.encode()).hexdigest()[:6]}"
        name = name.strip(".") or "scan"
        dataset = re.sub(r"[^\w.=+-]+", "_", item.dataset)
        names.append(f"{dataset}_{name}" if several else name)
    lower = [name.lower() for name in names]
    return [name if lower.count(low) == 1 else f"{name}-{item.key[:8]}"
            for name, low, item in zip(names, lower, items, strict=True)]  # fmt: skip
