"""The options of `ssl3d view`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ViewOptions:
    """Write a page to look at: of a store, a run, fine-tuning, or predictions beside the truth.

    Attributes:
        path: Store (.h5), folder of stores, phantoms[:N], run of ssl3d pretrain, folder of ssl3d finetune,
            or folder of ssl3d predict.
        out: File for the page, which needs no other file and no network.
        data: Scans that were predicted, with their masks, labels or boxes: stores, or anything that
            `ssl3d prepare` takes; by default what ssl3d predict was given.
        volumes: Largest number of volumes that are shown; of more, some are chosen evenly.
        overwrite: Whether a file that is there already is replaced.
    """

    path: str = field(metadata={"positional": True})
    out: Path = Path("page.html")
    data: tuple[str, ...] = ()
    volumes: int = 2000
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        if self.volumes < 1:
            raise ValueError(f"volumes: {self.volumes} must be at least 1")
