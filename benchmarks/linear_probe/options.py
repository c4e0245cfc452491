"""Options of `ssl3d linear-probe`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LinearProbeOptions:
    """Probes frozen encoders with a linear model.

    Attributes:
        encoder: A run or its encoder/ folder (RUN:stem_stride=1 changes an option that leaves the weights
            as they are), another toolkit's weights (FILE.pth, .pt, .ckpt or .safetensors),
            scratch:NAME[:kind][:field=value...] or imagenet:NAME...; one or several.
            LABEL=ENCODER gives the row a name of its own.
        data: Stores, folders of stores, phantoms[:N], or scans (prepared into $SSL3D_CACHE first).
        out: Folder for the records (JSON), the table and the pictures.
        target: What is probed: classes, ordinal (ordered integers), real, masks (dense probe), or auto.
        folds: Of a cross-validation by subject instead of the house split; 0 for none.
        fractions: Shares of the training subjects to fit on; smaller subsets lie in larger ones.
        repeats: Subsets per fraction below 1 (default 20, dense probe 5).
        untrained: Untrained encoders of the same architecture beside each encoder; seeds 0, 1, ...
        recalibrate: BatchNorm statistics taken anew from unlabelled training volumes: no, yes, or both
            rows.
        pool: How a volume becomes one embedding: the mean over its feature maps, or the aggregator over
            its slices that intra_inter trained with the encoder.
        pool_subject: Several volumes of a subject: a row each (none), their mean, or side by side (concat).
        window: Largest input of the encoder along D H W; larger volumes are taken window by window. A depth
            of 1 takes every slice as an image.
        precision: Of the frozen encoder, 32 or bf16.
        device: auto, cpu, cuda or mps.
        samples: Voxels per training volume, dense probe.
        seed: Of the subsets and the folds; the house split is always the one that pretraining spares.
        overwrite: Score again what has a record.
    """

    encoder: tuple[str, ...] = field(metadata={"positional": True})
    data: tuple[str, ...] = ("phantoms",)
    out: Path = Path("runs/linear-probe")
    target: str = "auto"
    folds: int = 0
    fractions: tuple[float, ...] = (1.0,)
    repeats: int | None = None
    untrained: int = 5
    recalibrate: str = "both"
    pool: str = "mean"
    pool_subject: str = "none"
    window: tuple[int, int, int] = (128, 256, 256)
    precision: str = "32"
    device: str = "auto"
    samples: int = 1024
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, allowed in (
            ("target", ("auto", "classes", "ordinal", "real", "masks")),
            ("recalibrate", ("both", "yes", "no")),
            ("pool", ("mean", "aggregator")),
            ("pool_subject", ("none", "mean", "concat")),
            ("precision", ("32", "bf16")),
            ("device", ("auto", "cpu", "cuda", "mps")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if not self.encoder:
            raise ValueError("encoder: name a run, an encoder folder or scratch:NAME")
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds: {self.folds}; use 0 for the house split, or 2 and more")
        if not self.fractions or not all(0 < f <= 1 for f in self.fractions):
            raise ValueError(f"fractions: {list(self.fractions)}; each must be above 0 and at most 1")
        if self.repeats is not None and self.repeats < 1:
            raise ValueError(f"repeats: {self.repeats}; at least 1")
        if self.untrained < 0:
            raise ValueError(f"untrained: {self.untrained}; 0 or more")
        if len(self.window) != 3 or min(self.window) < 1:
            raise ValueError(f"window: {list(self.window)}; three sizes from 1")
        if self.samples < 16:
            raise ValueError(f"samples: {self.samples}; at least 16")
