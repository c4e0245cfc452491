"""What a search of folders and files finds: scans to be made into volumes, and what was refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ssl3d.amounts import printable


@dataclasses.dataclass(frozen=True)
class Scan:
    """One volume to be made, or several if its file holds frames.

    Attributes:
        id: Name that is unique among the scans of all sources.
        dataset: Name of the data set.
        subject: Name of the subject within the data set.
        source: Path relative to the root given.
        files: Files to read, per channel: one, the slices of a DICOM series, or none if missing.
        channels: Names of the channels; one name for a file whose own channels are not known yet.
        frames_are_channels: Whether a fourth axis holds these channels.
        mask: Label map, if there is one.
        ignore: Mask of voxels to ignore, as defaced ones are: those above 0; if there is one.
        label: Class or value of the volume.
        split: "", "train", "val" or "test".
        modality: Modality that a list beside the data tells; "" where none does.
        named: Whether a list or the user named this file: then it is a scan, whatever its values.
        member: Array of an archive and the row in it.
        boxes: (z1, y1, x1, z2, y2, x2, class) each, in pixels; None where nobody drew any.
        world_boxes: (x, y, z, w, h, d, class) each, centre and size in RAS+ mm; None where nobody drew any.
        mask_boxes: Whether the components of the mask are the boxes; an empty mask then says nothing.
    """

    id: str
    dataset: str
    subject: str
    source: str
    files: tuple[tuple[Path, ...], ...]
    channels: tuple[str, ...] = ("image",)
    frames_are_channels: bool = False
    mask: Path | None = None
    ignore: Path | None = None
    label: int | float | str | None = None
    split: str = ""
    modality: str = ""
    named: bool = False
    member: tuple[str, int] | None = None
    boxes: tuple[tuple[float, ...], ...] | None = None
    world_boxes: tuple[tuple[float, ...], ...] | None = None
    mask_boxes: bool = False

    @property
    def all_files(self) -> list[Path]:
        """Files that decide what this scan becomes."""
        masks = [path for path in (self.mask, self.ignore) if path]
        return [path for group in self.files for path in group] + masks


@dataclasses.dataclass
class Found:
    """What a search of the sources found in them.

    Attributes:
        scans: Scans in a stable order.
        rejected: (path relative to its root, reason) of what is listed or named, but of no use.
        left_out: (path relative to its root, reason) of files found and not used, and no fault of theirs.
        notes: Lines that the user should read.
        label_names: Mask value -> structure, per data set.
        box_names: Box label -> kind of object, per data set.
        ignore_labels: Mask value of voxels that nobody annotated, per data set that has one.
        regions: Regions of a data set whose structures overlap, in the order of the list, each with
            `name`, the mask's `values` in it, and the `class` that a prediction writes for it.
    """

    scans: list[Scan] = dataclasses.field(default_factory=list)
    rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    label_names: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    box_names: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    ignore_labels: dict[str, int] = dataclasses.field(default_factory=dict)
    regions: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def add(self, other: Found) -> None:
        """Add what was found elsewhere, names of structures and of objects too."""
        self.scans += other.scans
        self.rejected += other.rejected
        self.left_out += other.left_out
        self.notes += other.notes
        self.label_names.update(other.label_names)
        self.ignore_labels.update(other.ignore_labels)
        self.regions.update(other.regions)
        for dataset, names in other.box_names.items():
            self.box_names.setdefault(dataset, {}).update(names)

    def printable(self) -> Found:
        """Return the same with every name as text that stores, tables and terminals take; files stay."""
        return Found(**_printable(vars(self)))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, int | float | Path) or not value:
        return value
    if isinstance(value, dict):
        return {_printable(key): _printable(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_printable, value))
    if isinstance(value, Scan):
        return Scan(**_printable(vars(value)))
    return value


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The options that decide what is taken.

    Attributes:
        dataset: Name of the data set; "" takes it from the source.
        channels: File-name parts that are channels of one subject.
        masks: File-name part of the label maps that belong to the scans beside them; "" takes none.
        take_labels: Whether label-like files are scans.
        colour: grey, or rgb: pictures are then natural images, in folders named by their class.
        box_readers: Fate of one object's boxes by several readers: merge, or keep.
        label: Column of lists that holds the labels; "" for the usual ones.
        ignore_mask: Folder, part or pattern of the names of masks of voxels to ignore; "" takes none.
    """

    dataset: str = ""
    channels: tuple[str, ...] = ()
    masks: str = ""
    take_labels: bool = False
    colour: str = "grey"
    box_readers: str = "merge"
    label: str = ""
    ignore_mask: str = ""


MODALITIES = {
    "CT": "ct",
    "MR": "mr",
    "PT": "mr",
    "NM": "mr",
    **dict.fromkeys(("CR", "DX", "MG", "XA", "RF", "US", "XC", "OP", "SM", "ES"), "unit"),
}


def modality_code(name: str) -> str:
    """Find the DICOM modality code for a data set's word ("MRI", "T1", "CT scan"); "" if unclear."""
    word = name.strip().upper()
    if word in MODALITIES:
        return word
    if word.startswith("CT"):
        return "CT"
    if word.startswith(("MR", "T1", "T2", "FLAIR", "ADC", "DWI", "PD", "BOLD", "LGE")):
        return "MR"
    if word.startswith(("PET", "PT")):
        return "PT"
    if any(part in word for part in ("X-RAY", "XRAY", "RADIOGRAPH")):
        return "DX"
    return "US" if word.startswith("ULTRASOUND") else ""
