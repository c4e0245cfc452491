"""Options of `ssl3d linear-probe`, and those it shares with `ssl3d knn`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ssl3d.api import HelpSection
from ssl3d_benchmarks.linear_probe.config import POOLING, PRECISIONS, TARGETS, check_choices, check_window


@dataclass(frozen=True)
class FrozenEncoderOptions:
    """Options that the commands which score frozen encoders share.

    Attributes:
        encoder: One or several encoders: a run or its encoder/ folder (RUN:stem_stride=1 changes an option
            that leaves the weights as they are), weights of another toolkit (FILE.pth, .pt, .ckpt or
            .safetensors), scratch:NAME[:kind][:field=value...] or imagenet:NAME...; LABEL=ENCODER gives
            the row a name of its own.
        data: Stores, folders of stores, phantoms[:N], or scans (prepared into $SSL3D_CACHE first).
        out: Folder for the records (JSON), the table and the pictures.
        target: Kind of target to predict: classes, ordinal (ordered integers), real, or auto.
        folds: Number of folds of a cross-validation by subject, instead of the house split; 0 for none.
        fractions: Shares of the training subjects to use; smaller subsets lie in larger ones.
        repeats: Number of subsets for each fraction below 1 (default 20).
        untrained: Number of untrained encoders of the same architecture beside each encoder, with the
            seeds 0, 1, ...
        recalibrate: Rows whose BatchNorm statistics are taken anew from unlabelled training volumes: none
            (no), all (yes), or one beside each (both), which doubles time and table.
        pool: Pooling of a volume into one embedding: the mean over its feature maps, or the aggregator
            over its slices that intra_inter trained with the encoder.
        pool_subject: Treatment of several volumes of a subject: a row each (none), the mean of their
            features, or their features side by side (concat).
        window: Largest input of the encoder along D H W; larger volumes are taken window by window. A depth
            of 1 takes every slice as an image.
        precision: Numerical precision of the frozen encoder, 32 or bf16.
        device: Device that computes: auto, cpu, cuda or mps.
        seed: Seed of the subsets and the folds; the house split is always the one that pretraining spares.
        overwrite: Whether to score again what already has a record.
    """

    encoder: tuple[str, ...] = field(metadata={"positional": True})
    data: tuple[str, ...] = ("phantoms",)
    out: Path = Path("runs")
    target: str = "auto"
    folds: int = 0
    fractions: tuple[float, ...] = (1.0,)
    repeats: int | None = None
    untrained: int = 5
    recalibrate: str = "no"
    pool: str = "mean"
    pool_subject: str = "none"
    window: tuple[int, int, int] = (128, 256, 256)
    precision: str = "32"
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False

    help_sections: ClassVar[tuple[HelpSection, ...]] = (
        HelpSection(
            "data",
            ("data", "target", "folds", "fractions", "out", "overwrite"),
            ("repeats", "pool_subject"),
        ),
        HelpSection("encoder", ("untrained", "recalibrate", "pool"), ("window",)),
        HelpSection("probe", ("samples", "neighbours"), ("temperature", "weights", "seed")),
        HelpSection("hardware", ("device",), ("precision",)),
    )
    """Sections of the help."""

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "target": ("auto", *TARGETS),
        "recalibrate": ("no", "yes", "both"),
        "pool": ("mean", "aggregator"),
        "pool_subject": POOLING,
        "precision": PRECISIONS,
        "device": ("auto", "cpu", "cuda", "mps"),
    }

    def __post_init__(self) -> None:
        """Check the value of every field."""
        check_choices(self, self.choices)
        if not self.encoder:
            raise ValueError("encoder: name a run, an encoder folder, scratch:NAME or imagenet:NAME")
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds: {self.folds} is impossible; use 0 for the house split, or 2 and more")
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"fractions: {list(self.fractions)}; each must be above 0 and at most 1")
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"repeats: {self.repeats} must be at least 1")
        if self.untrained < 0:
            raise ValueError(f"untrained: {self.untrained} must be 0 or more")
        check_window(self.window)


@dataclass(frozen=True)
class LinearProbeOptions(FrozenEncoderOptions):
    """Probe frozen encoders with a linear model.

    Attributes:
        target: Kind of target to predict: classes, ordinal (ordered integers), real, masks (dense probe),
            or auto.
        repeats: Number of subsets for each fraction below 1 (default 20, dense probe 5).
        samples: Number of voxels that the dense probe draws from each training volume.
        metric: Metrics of your own for the dense probe, FILE.py:FUNCTION, such as my.py:boundary_iou. The
            function takes two masks (D H W) and the voxel sides in mm, and returns a number, higher being
            better.
    """

    out: Path = Path("runs/linear-probe")
    samples: int = 1024
    metric: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the value of every field."""
        super().__post_init__()
        if self.samples < 16:
            raise ValueError(f"samples: {self.samples} must be at least 16")
