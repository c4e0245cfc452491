"""Options of the command `ssl3d finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ssl3d.api import HelpSection, check_loggers

SCHEDULES = ("cosine", "milestones", "poly", "constant")


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune encoders on a downstream task, and compare them with the same network from scratch.

    Attributes:
        encoder: One or several encoders: a run, its encoder/ folder or zoo:NAME (RUN:stem_stride=1 changes
            an option that leaves the weights as they are), weights of another toolkit (FILE.pth, .pt, .ckpt
            or .safetensors), scratch:NAME[:kind][:field=value...] or imagenet:NAME...; LABEL=ENCODER gives
            the row a name of its own. With --folds, {fold} in a path is the number of the fold: each fold
            starts from the run that left its test subjects out (`ssl3d pretrain --leave-out 0/5`).
        data: Stores, folders of stores, phantoms[:N], or scans (prepared into $SSL3D_CACHE first).
        task: Downstream task to learn: classification, segmentation or detection.
        out: Folder for the records (JSON), the table and the pictures.
        preset: Name of a recipe of the task. classification: medmnist (100 epochs, as published),
            medmnist-short (30 epochs); segmentation: low-label, med3d-lung, med3d-liver; detection:
            nodule-slices, tumours-from-masks.
        fractions: Shares of the training and validation subjects to use; smaller subsets lie in larger
            ones and are the same for every contestant.
        repeats: Number of subsets for each fraction below 1.
        metric: Metrics of your own for segmentation, FILE.py:FUNCTION, such as my.py:boundary_iou. The
            function takes two masks (D H W) and the voxel sides in mm, and returns a number, higher being
            better.
        sparse_slices: Numbers of annotated slices per volume that segmentation trains on, or all; several,
            such as 1 2 4 all, give a curve. A single number equals --segmentation.sparse_slices.
        seeds: Seeds of the training: order, crops, augmentation, head, and the weights from scratch.
        folds: Number of folds of a cross-validation by subject, instead of the house split; 0 for none.
        part: Subjects that the records score: test; or val, the validation subjects, so that a recipe can
            be chosen before anybody looks at the test subjects. Then the last weights are kept.
        split_seed: Seed of the subsets and the folds.
        steps: Number of optimizer steps; 0 to count epochs, or for the task's plan.
        epochs: Number of passes over the training volumes; 0 to count steps.
        batch_size: Number of examples per step, by default of the recipe or planned from the data. Where a
            task draws one example of a volume, it is at most the number of training volumes.
        lr: Peak learning rate of the pretrained encoders.
        lr_scratch: Peak learning rate of the network from scratch; by default that of lr.
        tune: Learning rates to try instead of lr; the best on the validation subjects is kept.
        tune_scratch: Learning rates to try from scratch, as many as tune has; by default those of tune.
        optimizer: Optimizer of the training: adamw, adam (weight decay in the gradient) or sgd.
        momentum: Nesterov momentum of sgd.
        weight_decay: Weight decay of all parameters but biases and norms.
        schedule: Decay of the learning rate: cosine, milestones (times gamma at each), poly (power 0.9)
            or constant.
        milestones: Places of the milestones, as shares of the steps.
        gamma: Factor on the learning rate at each milestone.
        warmup: Share of the steps in which the learning rate rises linearly from 0.
        layer_decay: Learning rate of each encoder stage relative to the next deeper one; 1 for the same.
        freeze: Encoder stages to freeze: none, all, or a number of first stages (the stem is the first).
        freeze_norm: Whether to freeze statistics, scales and shifts of the encoder's batch norms.
        clip: Largest norm of the gradient; 0 for no limit.
        ema: Share of the steps over which an exponential moving average of the weights reaches back, which
            is then scored and kept in place of the weights; 0 for none.
        precision: Numerical precision of the forward passes, 32 or bf16.
        compile: Compilation of the encoder by torch.compile: minutes at the start of each training, and
            faster steps, on GPUs above all. It needs a C++ compiler, on GPUs Triton.
        eval_at: Places at which the validation subjects are scored: shares of the steps if at most 1,
            else steps.
        keep: Weights to test: those with the best score on the validation subjects (best), or the last.
        pool: Pooling of a volume into one embedding (classification): the mean over its feature maps, or
            the aggregator over its slices that intra_inter trained with the encoder.
        no_scratch: Whether to leave out the network from scratch.
        no_trivial: Whether to leave out the rows without a network.
        validation_only: Stop at the validation score of the weights kept, as ssl3d sweep needs it: no
            subject is predicted for a record, and OUT/validation has the scores at each step for each job.
        save_predictions: Whether to write the predictions on the test subjects (NIfTI, CSV, JSON) under
            OUT/predictions.
        keep_models: Arms whose trained networks are kept under OUT/models, for ssl3d predict: best (the arm
            and seed with the best score on the validation subjects, at the largest fraction; all, where
            there are no such subjects), all, none, or names of rows.
        checkpoint_seconds: Seconds between two checkpoints of a training.
        logger: Loggers of curves, pictures, options, scores and kept models: tensorboard, wandb (Weights &
            Biases, offline where no account is known) and mlflow, any number of them. Each arm, subset and
            seed is a run of its own there; local files go to OUT/.logs.
        device: Device that computes: auto, cpu, cuda or mps.
        threads: Number of CPU threads; 0 for torch's own number.
        workers: Number of processes that read; -1 for none on a CPU and 4 beside a GPU.
        overwrite: Whether to train again where a record exists already.
    """

    encoder: tuple[str, ...] = field(metadata={"positional": True})
    data: tuple[str, ...] = ("phantoms",)
    task: str = "classification"
    out: Path = Path("runs/finetune")
    preset: str = ""
    fractions: tuple[float, ...] = (1.0,)
    repeats: int = 3
    metric: tuple[str, ...] = ()
    sparse_slices: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    folds: int = 0
    part: Literal["test", "val"] = "test"
    split_seed: int = 0
    steps: int = 0
    epochs: int = 0
    batch_size: int | None = None
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
    ema: float = 0.0
    precision: Literal["32", "bf16"] = "32"
    compile: bool = False
    eval_at: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    keep: Literal["best", "last"] = "best"
    pool: Literal["mean", "aggregator"] = "mean"
    no_scratch: bool = False
    no_trivial: bool = False
    validation_only: bool = False
    save_predictions: bool = False
    keep_models: tuple[str, ...] = ("best",)
    checkpoint_seconds: float = 60.0
    logger: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = 0
    workers: int = -1
    overwrite: bool = False

    help_sections: ClassVar[tuple[HelpSection, ...]] = (
        HelpSection(
            "data", ("data", "fractions", "folds", "sparse_slices"), ("repeats", "part", "split_seed")
        ),
        HelpSection(
            "training",
            ("task", "preset", "steps", "epochs", "batch_size", "lr", "tune", "seeds", "out", "overwrite"),
            ("lr_scratch", "tune_scratch", "optimizer", "momentum", "weight_decay", "schedule",
             "milestones", "gamma", "warmup", "clip", "eval_at", "keep", "checkpoint_seconds"),
        ),
        HelpSection("encoder", ("freeze", "pool"), ("layer_decay", "freeze_norm")),
        HelpSection(
            "rows and files",
            ("no_scratch", "save_predictions", "logger"),
            ("no_trivial", "metric", "validation_only"),
        ),
        HelpSection("hardware", ("device", "workers"), ("precision", "threads", "compile")),
    )  # fmt: skip
    """Sections of the help."""

    def __post_init__(self) -> None:
        """Check the value of every field."""
        if not self.encoder:
            raise ValueError("encoder: name a run, an encoder folder, scratch:NAME or imagenet:NAME")
        if not self.fractions or not all(0 < f <= 1 for f in self.fractions):
            raise ValueError(f"fractions: {list(self.fractions)}; each must be above 0 and at most 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)}; give each once, and at least one")
        for words in self.sparse_slices:
            if words != "all" and not (words.isdigit() and int(words) > 0):
                raise ValueError(f"sparse_slices: {words!r} must be a number from 1, or all")
        if len(set(self.sparse_slices)) < len(self.sparse_slices):
            raise ValueError(f"sparse_slices: {' '.join(self.sparse_slices)}; give each once")
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds: {self.folds} is impossible; use 0 for the house split, or 2 and more")
        if self.folds and self.part == "val":
            raise ValueError("part is val, which the house split has: leave out folds")
        for name in ("repeats", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} must be at least 1")
        for name in ("steps", "epochs", "weight_decay", "clip", "threads", "checkpoint_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be 0 or more")
        for name in ("lr", "lr_scratch"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value} must be above 0")
        for name in ("tune", "tune_scratch"):
            if not all(value > 0 for value in getattr(self, name)):
                raise ValueError(f"{name}: {list(getattr(self, name))}; each must be above 0")
        if self.tune_scratch and len(self.tune_scratch) != len(self.tune):
            raise ValueError(
                f"tune_scratch: {len(self.tune_scratch)} learning rates, but tune has {len(self.tune)}; "
                "give as many, since every row gets the same number of trials"
            )
        for name in ("warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 0 and below 1")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: {self.layer_decay} must be above 0 and at most 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: {self.momentum} must be at least 0 and below 1")
        if not all(0 < share < 1 for share in self.milestones):
            raise ValueError(
                f"milestones: {list(self.milestones)}; each must be a share of the steps, between 0 and 1"
            )
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma: {self.gamma} must be above 0 and at most 1")
        if self.freeze not in ("none", "all") and not (self.freeze.isdigit() and int(self.freeze) > 0):
            raise ValueError(f"freeze: {self.freeze!r} must be none, all, or a number of stages")
        if not self.eval_at or min(self.eval_at) < 0:
            raise ValueError(
                f"eval_at: {list(self.eval_at)}; give shares of the steps, or steps, each 0 or more"
            )
        check_loggers(self.logger)
