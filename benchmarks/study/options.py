"""Options of the command `ssl3d study`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ssl3d.api import HelpSection


@dataclass(frozen=True)
class StudyOptions:
    """Answer whether pretraining pays on scans of which some have labels, masks or boxes.

    Attributes:
        scans: Scans of subjects with and without a target: whatever `ssl3d prepare` takes, stores, or
            phantoms[:N].
        hours: Time that the study may take on this machine, in hours.
        out: Folder of the study: its suite, stores, runs, records, models and report.
        target: Target to learn: masks, boxes, classes, ordinal or real; auto takes masks, boxes or labels,
            whichever is there first.
        prepare: Options of `ssl3d prepare` for the scans, such as "--spacing 1 1 1 --masks seg".
        encoder: Network to pretrain, NAME[:kind][:field=value...], trained from scratch beside.
        recipes: Proxy tasks to pretrain by, instead of those that our own results favour for such scans.
        imagenet: File with ImageNet's weights of the network, or imagenet:NAME[:kind][:weights=FILE]; by
            default torchvision's file, where it is in torch's own folder already.
        folds: Number of folds of the cross-validation, by subject; 0 for one split into training,
            validation and test. By default 5 where at least as many subjects have no target as have one.
        seeds: Number of seeds of pretraining and of training; planned from the hours if 0.
        pretrain_steps: Steps of the first recipe, whose training FLOPs all others spend; planned if 0.
        finetune_steps: Steps of every fine-tuning; planned from the hours if 0.
        spread: Assumed standard deviation, between subjects, of the gain of a pretrained network; by
            default of our own records.
        workers: Number of processes that will share the folder, each started by this command.
        dry_run: Whether the plan is printed, and nothing but the scans' preparation and timing is done.
        verbose: Whether the output of the jobs is shown.
    """

    scans: tuple[str, ...] = field(metadata={"positional": True})
    hours: float = 8.0
    out: Path = Path("study")
    target: Literal["auto", "masks", "boxes", "classes", "ordinal", "real"] = "auto"
    prepare: str = ""
    encoder: str = "resnet18:acs:width=32"
    recipes: tuple[str, ...] = ()
    imagenet: str = ""
    folds: int | None = None
    seeds: int = 0
    pretrain_steps: int = 0
    finetune_steps: int = 0
    spread: float = 0.0
    workers: int = 1
    dry_run: bool = False
    verbose: bool = False

    help_sections: ClassVar[tuple[HelpSection, ...]] = (
        HelpSection("data", ("target", "prepare")),
        HelpSection(
            "plan",
            ("hours", "out", "dry_run", "recipes", "imagenet"),
            ("encoder", "folds", "seeds", "pretrain_steps", "finetune_steps", "spread"),
        ),
        HelpSection("hardware", ("workers", "verbose")),
    )
    """Sections of the help."""

    def __post_init__(self) -> None:
        """Check the value of every field."""
        if not self.scans:
            raise ValueError("scans: name a folder, a list or a store of scans")
        if not 0 < self.hours < float("inf"):
            raise ValueError(f"hours is {self.hours}, must be above 0")
        if self.folds is not None and (self.folds < 0 or self.folds == 1):
            raise ValueError(f"folds is {self.folds}; use 0 for one split, or 2 and more")
        for name in ("seeds", "pretrain_steps", "finetune_steps", "spread"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be 0 or more")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, must be at least 1")
        if len(set(self.recipes)) < len(self.recipes):
            raise ValueError(f"recipes are {' '.join(self.recipes)}; give each once")
