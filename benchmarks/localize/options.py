"""Options of `ssl3d localize`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class LocalizeOptions:
    """Place volumes and crops of them on the axis that a sorting run has learnt.

    Attributes:
        run: Folder of a run of `ssl3d pretrain --proxy sorting`.
        data: Volumes to place: stores, folders of stores, phantoms[:N], or scans, which are prepared into a
            cache first. Volumes of subjects that pretraining saw are not placed.
        reference: Volumes that make the common axis. If left out, those of the data whose subjects
            pretraining saw, or else the training part of its house split.
        out: Folder for localize.json, localize.csv and localize.png.
        crops: Number of partial crops cut from every placed volume to measure the error.
        share: Smallest and largest length of those crops, as a share of the volume's foreground.
        references: Largest number of reference volumes.
        proxy: Name of the proxy of the run, if several of them score slices.
        device: Device of the network: auto, cpu, cuda or mps.
        seed: Seed of the crops, and of the choice of reference volumes.
    """

    run: Path = field(metadata={"positional": True})
    data: tuple[str, ...] = ("phantoms",)
    reference: tuple[str, ...] = ()
    out: Path = Path("runs/localize")
    crops: int = 5
    share: tuple[float, float] = (0.3, 0.6)
    references: int = 40
    proxy: str = ""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        if self.crops < 0:
            raise ValueError(f"crops is {self.crops}, must be 0 or more")
        if self.references < 1:
            raise ValueError(f"references is {self.references}, must be at least 1")
        if len(self.share) != 2 or not 0 < self.share[0] <= self.share[1] <= 1:
            raise ValueError(
                f"share is {self.share}, must be two numbers above 0 and at most 1, the lesser first"
            )
