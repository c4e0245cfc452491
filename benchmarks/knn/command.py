"""`ssl3d knn`: a frozen encoder's neighbours vote, with the rows they have to be read beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssl3d.api import parse

summary = (
    "score frozen encoders: nearest neighbours of classes or values, beside untrained and trivial rows"
)

EPILOG = """The same features, splits, records and table as of `ssl3d linear-probe`, with nothing fitted.
Records are reused: the same contestant on the same split with the same options is not scored again."""


@dataclass(frozen=True)
class KNNOptions:
    """Scores frozen encoders by the labels of the nearest training subjects.

    Attributes:
        encoder: A run or its encoder/ folder (RUN:stem_stride=1 changes an option that leaves the weights
            as they are), another toolkit's weights (FILE.pth, .pt, .ckpt or .safetensors),
            scratch:NAME[:kind][:field=value...] or imagenet:NAME...; one or several.
        data: Stores, folders of stores, phantoms[:N], or scans (prepared into $SSL3D_CACHE first).
        out: Folder for the records (JSON), the table and the pictures.
        target: What is predicted: classes, ordinal (ordered integers), real, or auto.
        neighbours: How many training rows vote, at most as many as there are.
        temperature: A neighbour of cosine similarity s counts exp(s / temperature).
        weights: similarity as above, or even.
        folds: Of a cross-validation by subject instead of the house split; 0 for none.
        fractions: Shares of the training subjects to look among; smaller subsets lie in larger ones.
        repeats: Subsets per fraction below 1 (default 20).
        untrained: Untrained encoders of the same architecture beside each encoder; seeds 0, 1, ...
        recalibrate: BatchNorm statistics taken anew from unlabelled training volumes: no, yes, or both
            rows.
        pool: How a volume becomes one embedding: the mean over its feature maps, or the aggregator over
            its slices that intra_inter trained with the encoder.
        pool_subject: Several volumes of a subject: a row each (none), their mean, or side by side (concat).
        window: Largest input of the encoder along D H W; larger volumes are taken window by window.
        precision: Of the frozen encoder, 32 or bf16.
        device: auto, cpu, cuda or mps.
        seed: Of the subsets and the folds; the house split is always the one that pretraining spares.
        overwrite: Score again what has a record.
    """

    encoder: tuple[str, ...] = field(metadata={"positional": True})
    data: tuple[str, ...] = ("phantoms",)
    out: Path = Path("runs/knn")
    target: str = "auto"
    neighbours: int = 20
    temperature: float = 0.07
    weights: str = "similarity"
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
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, allowed in (
            ("target", ("auto", "classes", "ordinal", "real")),
            ("weights", ("similarity", "even")),
            ("recalibrate", ("both", "yes", "no")),
            ("pool", ("mean", "aggregator")),
            ("pool_subject", ("none", "mean", "concat")),
            ("precision", ("32", "bf16")),
            ("device", ("auto", "cpu", "cuda", "mps")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if not self.encoder:
            raise ValueError("encoder: name a run, an encoder folder, scratch:NAME or imagenet:NAME")
        if self.neighbours < 1:
            raise ValueError(f"neighbours: {self.neighbours}; at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}; must be above 0")
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


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    options = parse("ssl3d knn", KNNOptions, argv, epilog=EPILOG).options
    from ssl3d_benchmarks.knn.protocol import KNN
    from ssl3d_benchmarks.linear_probe.run import run

    run(options, KNN)
    return 0
