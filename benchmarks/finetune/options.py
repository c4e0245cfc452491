"""Options of `ssl3d finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SCHEDULES = ("cosine", "milestones", "poly", "constant")


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tunes encoders on a downstream task and compares them with the same network from scratch.

    Attributes:
        encoder: A run or its encoder/ folder (RUN:stem_stride=1 changes an option that leaves the weights
            as they are), another toolkit's weights (FILE.pth, .pt, .ckpt or .safetensors),
            scratch:NAME[:kind][:field=value...] or imagenet:NAME...; one or several.
        data: Stores, folders of stores, phantoms[:N], or scans (prepared into $SSL3D_CACHE first).
        task: What is learned: classification, segmentation or detection.
        out: Folder for the records (JSON), the table and the pictures.
        preset: Options of a published recipe: of classification medmnist (100 epochs, as published) and
            medmnist-short (30 epochs).
        fractions: Shares of the training subjects (and of those to choose on) to train with; smaller
            subsets lie in larger ones and are the same for all.
        repeats: Subsets per fraction below 1.
        sparse_slices: Annotated slices per volume that segmentation trains on, or all; several numbers
            for a curve, such as 1 2 4 all. The same as --segmentation.sparse_slices for one number.
        seeds: Of the training: order, crops, augmentation, head, and the weights from scratch.
        folds: Of a cross-validation by subject instead of the house split; 0 for none.
        split_seed: Of the subsets and the folds.
        steps: Optimizer steps; 0 to count epochs.
        epochs: Passes over the training volumes; 0 to count steps.
        batch_size: Volumes per step, at most those there are.
        lr: Peak learning rate.
        lr_scratch: That of the network from scratch; lr if left out.
        tune: Learning rates to try, the best on the validation subjects is taken; instead of lr.
        tune_scratch: Those of the network from scratch, as many; those of tune if left out.
        optimizer: adamw, adam (weight decay in the gradient) or sgd.
        momentum: Of sgd (Nesterov).
        weight_decay: Of all but biases and norms.
        schedule: How the learning rate falls: cosine, milestones (times gamma at each), poly (power 0.9)
            or constant.
        milestones: As shares of the steps.
        gamma: Factor at a milestone.
        warmup: Share of the steps in which the learning rate rises from 0.
        layer_decay: Learning rate of each encoder stage relative to the next deeper one; 1 for the same.
        freeze: Stages of the encoder that stay as they are: none, all, or the first so many (maps, the
            stem being the first).
        freeze_norm: Keep statistics, scales and shifts of the encoder's batch norms.
        clip: Largest norm of the gradient; 0 for any.
        precision: 32 or bf16.
        eval_at: Where to score on the validation subjects: shares of the steps if at most 1, else steps.
        keep: Which weights are tested: those of the best score on the validation subjects (best), or the
            last.
        pool: How a volume becomes one embedding (classification): the mean over its feature maps, or the
            aggregator that intra_inter trained with the encoder.
        no_scratch: Leave out the network from scratch.
        no_trivial: Leave out the rows without a network.
        save_predictions: Write what is predicted on the test subjects (NIfTI, CSV) under OUT/predictions.
        checkpoint_seconds: Between checkpoints of a job in training.
        device: auto, cpu, cuda or mps.
        threads: Of the CPU; 0 for torch's own number.
        workers: Processes that read; -1: none on a CPU, 4 beside a GPU.
        overwrite: Train again what has a record.
    """

    encoder: tuple[str, ...] = field(metadata={"positional": True})
    data: tuple[str, ...] = ("phantoms",)
    task: str = "classification"
    out: Path = Path("runs/finetune")
    preset: str = ""
    fractions: tuple[float, ...] = (1.0,)
    repeats: int = 3
    sparse_slices: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    folds: int = 0
    split_seed: int = 0
    steps: int = 0
    epochs: int = 0
    batch_size: int = 8
    lr: float | None = None
    lr_scratch: float | None = None
    tune: tuple[float, ...] = ()
    tune_scratch: tuple[float, ...] = ()
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.01
    schedule: Literal["cosine", "milestones", "poly", "constant"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float = 0.1
    layer_decay: float = 1.0
    freeze: str = "none"
    freeze_norm: bool = False
    clip: float = 0.0
    precision: Literal["32", "bf16"] = "32"
    eval_at: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    keep: Literal["best", "last"] = "best"
    pool: Literal["mean", "aggregator"] = "mean"
    no_scratch: bool = False
    no_trivial: bool = False
    save_predictions: bool = False
    checkpoint_seconds: float = 60.0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = 0
    workers: int = -1
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        if not self.encoder:
            raise ValueError("encoder: name a run, an encoder folder, scratch:NAME or imagenet:NAME")
        if not self.fractions or not all(0 < f <= 1 for f in self.fractions):
            raise ValueError(f"fractions: {list(self.fractions)}; each must be above 0 and at most 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)}; give each once, and at least one")
        for one in self.sparse_slices:
            if one != "all" and not (one.isdigit() and int(one) > 0):
                raise ValueError(f"sparse_slices: {one!r}; a number from 1, or all")
        if len(set(self.sparse_slices)) < len(self.sparse_slices):
            raise ValueError(f"sparse_slices: {' '.join(self.sparse_slices)}; give each once")
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds: {self.folds}; use 0 for the house split, or 2 and more")
        for name in ("repeats", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; at least 1")
        for name in ("steps", "epochs", "weight_decay", "clip", "threads", "checkpoint_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; 0 or more")
        for name in ("lr", "lr_scratch"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value}; must be above 0")
        for name in ("tune", "tune_scratch"):
            if not all(value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name}: {list(getattr(self, name))}; each must be above 0")
        if self.tune_scratch and len(self.tune_scratch) != len(self.tune):
            raise ValueError(
                f"tune_scratch: {len(self.tune_scratch)} learning rates, tune has {len(self.tune)}; "
                "give as many, every row gets the same number of trials"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: {self.warmup}; from 0 to below 1")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: {self.layer_decay}; above 0 and at most 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: {self.momentum}; from 0 to below 1")
        if not all(0 < share < 1 for share in self.milestones):
            raise ValueError(f"milestones: {list(self.milestones)}; shares of the steps, between 0 and 1")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma: {self.gamma}; above 0 and at most 1")
        if self.freeze not in ("none", "all") and not (self.freeze.isdigit() and int(self.freeze) > 0):
            raise ValueError(f"freeze: {self.freeze!r}; none, all, or how many stages")
        if not self.eval_at or min(self.eval_at) < 0:
            raise ValueError(f"eval_at: {list(self.eval_at)}; shares of the steps, or steps, 0 or more")
