"""The options of `ssl3d prepare`, and what of them decides a store."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl3d.data.geometry import Triple
from ssl3d.data.preparation.process import Recipe
from ssl3d.data.scans.found import Wanted
from ssl3d.data.scans.read import STORES


@dataclasses.dataclass
class PrepareOptions:
    """Turn folders and files of scans into one store, ready for training.

    Attributes:
        sources: Folders and files of scans: NIfTI, NRRD, MHA, DICOM, MedMNIST .npz, PNG, JPEG, BMP and
            TIFF, folders with dataset.json (MSD, nnU-Net), BIDS, or a CSV with a column path and, if you
            like, subject, label, split, mask, ignore_mask.
        out: File of the store.
        dataset: Name of the data set; by default what dataset.json says, else the folder's name.
        channels: File-name parts that tell the sequences of one subject apart, such as t1 flair; they
            become channels, a missing one is marked and zero.
        label: Column of a CSV, or of the participants.tsv of BIDS, that holds the labels, such as
            survival_days; of a CSV by default label, class, class_index or diagnosis.
        masks: File-name part that tells the label map beside a scan, such as seg; kept as its mask.
        ignore_mask: Masks of voxels to ignore, such as defaced ones: a folder of them, a part of their
            names, such as desc-deface, or a pattern with * and ?. Voxels above 0 are ignored: no loss of a
            restoration counts them, no crop has one at its centre, they are no foreground and have no say
            in the normalisation. A CSV has a column ignore_mask instead.
        take_labels: Whether files that look like label maps are scans too.
        spacing: Voxel size in mm along D H W; keep leaves every scan its own (the default: nothing is
            interpolated, and the spacing is stored), and median takes the median over each data set
            (Med3D).
        normalize: Normalisation of intensities: ct (clip to the window, 0 to 1), mr (clip to the
            foreground's 0.5 and 99.5 percentiles, z-score over the foreground), unit (0 to 1), none, or
            auto: for each scan by its header's modality, else by its values.
        nan: Value to put in place of NaN, which SPM writes for the background; by default scans with NaN
            are refused.
        window: Lowest and highest intensity; by default -1000 1000 HU (ct) or the percentiles (mr, unit).
        crop_foreground: Whether the background around the foreground is cut off.
        frames: Treatment of 4D files: split into volumes, channels of one volume, or refuse.
        colour: Treatment of pictures: grey, or rgb (three channels, for grey ones too). With rgb they
            are taken for natural images: folders are their classes, every picture is a subject of its own
            unless a list says whose it is, and a byte stays what it is, divided by 255 when it is read.
        boxes: Boxes of objects: listed (beside pictures COCO's instances.json or a CSV as VinDr-CXR's;
            beside volumes MONAI's JSON, LUNA16's annotations.csv or a CSV of x_mm, y_mm, z_mm, w_mm, h_mm,
            d_mm), or masks (around the connected components of each value of the mask).
        box_readers: Treatment of boxes that several readers drew around one object: merge (their mean),
            or keep.
        max_voxels: Largest number of voxels of a scan; larger scans are refused before they are read.
        workers: Number of processes; by default one per core, at most 8; 0 works without any.
        part: Shard to make, as I/N: shard I of N (from 1), all volumes of a subject in one; the name of the
            store gets -I-of-N.
        overwrite: Whether a store made of other data or with other options is replaced.
    """

    sources: tuple[str, ...] = dataclasses.field(metadata={"positional": True})
    out: str = "store.h5"
    dataset: str = ""
    channels: tuple[str, ...] = ()
    label: str = ""
    masks: str = ""
    ignore_mask: str = ""
    take_labels: bool = False
    spacing: tuple[float, float, float] | Literal["keep", "median"] = "keep"
    normalize: Literal["auto", "ct", "mr", "unit", "none"] = "auto"
    nan: float | None = None
    window: tuple[float, float] | None = None
    crop_foreground: bool = False
    frames: Literal["split", "channels", "refuse"] = "split"
    colour: Literal["grey", "rgb"] = "grey"
    boxes: Literal["listed", "masks"] = "listed"
    box_readers: Literal["merge", "keep"] = "merge"
    max_voxels: int = 2**30
    workers: int | None = None
    part: str = ""
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.sources = tuple(str(source) for source in self.sources)
        self.channels = tuple(self.channels)
        if not self.sources:
            raise ValueError("sources: name at least one folder or file")
        if not self.out.endswith(STORES):
            raise ValueError(f"out is {self.out!r}; expected a name that ends in .h5")
        if isinstance(self.spacing, str):
            if self.spacing not in ("keep", "median"):
                raise ValueError(
                    f"spacing is {self.spacing!r}; expected keep, median or three numbers (D H W, mm)"
                )
        else:
            self.spacing = _triple(self.spacing)
        if self.window is not None:
            self.window = (float(self.window[0]), float(self.window[1]))
            if not self.window[0] < self.window[1]:
                raise ValueError(f"window is {self.window}; expected the lower value first")
        for field, known in (("boxes", ("listed", "masks")), ("box_readers", ("merge", "keep"))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} is {getattr(self, field)!r}; expected {' or '.join(known)}")
        if self.nan is not None and not np.isfinite(self.nan):
            raise ValueError(f"nan is {self.nan}; expected a finite value to put in place of NaN")
        if self.max_voxels < 1:
            raise ValueError(f"max_voxels is {self.max_voxels}; expected 1 or more")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}; expected 0 or more")
        if len({channel.lower() for channel in self.channels}) < len(self.channels):
            raise ValueError(f"channels are {' '.join(self.channels)}; expected different names")
        self.shard()

    def shard(self) -> tuple[int, int]:
        """Return (I, N) of `part`; (1, 1) without."""
        if not self.part:
            return 1, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"part is {self.part!r}; expected I/N with I from 1 to N, such as 2/8")
        return int(match[1]), int(match[2])

    def store(self) -> Path:
        """Return the file of the store, with the shard in its name."""
        path = Path(self.out)
        index, count = self.shard()
        return path.with_name(f"{path.stem}-{index}-of-{count}{path.suffix}") if self.part else path

    def wanted(self) -> Wanted:
        """Return the options that decide which files are taken."""
        return Wanted(
            dataset=self.dataset,
            channels=self.channels,
            masks=self.masks,
            take_labels=self.take_labels,
            colour=self.colour,
            box_readers=self.box_readers,
            label=self.label,
            ignore_mask=self.ignore_mask,
        )

    def recipe(self, spacing: Triple | None, medians: dict[str, Triple]) -> Recipe:
        """Return the steps that every scan takes.

        Args:
            spacing: Target spacing (D, H, W) in mm; None keeps each scan's own.
            medians: Target spacing of each data set, where each has its own.
        """
        return Recipe(
            spacing=spacing,
            normalize=self.normalize,
            window=self.window,
            crop_foreground=self.crop_foreground,
            frames=self.frames,
            colour=self.colour,
            max_voxels=self.max_voxels,
            boxes=self.boxes,
            medians=tuple(medians.items()),
            nan=self.nan,
        )


def plain_options(options: PrepareOptions) -> dict[str, Any]:
    """Select the options that decide what is in the store, as JSON values."""
    plain = dataclasses.asdict(options)
    for name in ("out", "workers", "overwrite", "sources"):
        del plain[name]
    for name, usual in (
        ("boxes", "listed"),
        ("box_readers", "merge"),
        ("label", ""),
        ("nan", None),
        ("ignore_mask", ""),
    ):
        if plain[name] == usual:  # stores made before there were these options are made the same way
            del plain[name]
    return json.loads(json.dumps(plain))


def other_options(settings: dict[str, Any], options: PrepareOptions) -> str:
    """Say with which options a store was made that are not those given."""
    usual = json.loads(json.dumps({f.name: f.default for f in dataclasses.fields(options)[1:]}))
    before, now = usual | (settings.get("options") or {}), usual | plain_options(options)
    differ = [
        f"--{name.replace('_', '-')}: {_word(before.get(name))} then, {_word(value)} now"
        for name, value in now.items()
        if before.get(name) != value and name not in ("out", "workers", "overwrite")
    ]
    if not differ:
        return "a store made by another version of ssl3d"
    return f"a store made with other options ({'; '.join(differ)})"


# ------------------------------------------------------------------------------------------------


def _triple(values: Sequence[float]) -> Triple:
    spacing = tuple(float(v) for v in values)
    if len(spacing) != 3 or not all(np.isfinite(v) and v > 0 for v in spacing):
        raise ValueError(
            f"spacing is {values}; expected three positive numbers (D H W, mm), keep or median"
        )
    return spacing[0], spacing[1], spacing[2]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in (None, "", []):
        return "none"
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in values)
