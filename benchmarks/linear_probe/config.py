"""Resolved options of the protocols on frozen encoders, as a record keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

TARGETS = ("classes", "ordinal", "real", "masks")

POOLING = ("none", "mean", "concat")

PRECISIONS = ("32", "bf16")


def check_choices(options: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Check that the named fields hold one of their allowed values.

    Raises:
        ValueError: A field holds another value.
    """
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            raise ValueError(f"{name}: {getattr(options, name)!r} is none of {', '.join(allowed)}")


def check_window(window: Sequence[int]) -> None:
    """Check that a window has three sizes of at least 1.

    Raises:
        ValueError: It does not.
    """
    if len(window) != 3 or min(window) < 1:
        raise ValueError(f"window: {list(window)} must be three sizes (D H W) of at least 1")


@dataclass(frozen=True)
class FrozenEncoderConfig:
    """Resolved options that the protocols on frozen encoders share.

    Attributes:
        target: Kind of target to predict: classes, ordinal, real or masks.
        classes: Names of the classes in the order of the probabilities; mask values for masks.
        pool_subject: Treatment of several volumes of a subject: one row each (none), the mean of their
            features, or their features side by side (concat).
        window: Largest input of the encoder along D H W; a larger volume is taken window by window, with a
            depth of 1 every slice as an image.
        precision: Numerical precision of the frozen encoder, 32 or bf16.
        mask_classes: Mask values that the trivial rows measure; empty: thresholded voxels.
    """

    target: str = "classes"
    classes: tuple[str, ...] = ()
    pool_subject: str = "none"
    window: tuple[int, int, int] = (128, 256, 256)
    precision: str = "32"
    mask_classes: tuple[int, ...] = ()

    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "target": TARGETS,
        "pool_subject": POOLING,
        "precision": PRECISIONS,
    }

    def __post_init__(self) -> None:
        """Check the value of every field."""
        check_choices(self, self.choices)
        check_window(self.window)
        if self.target in ("classes", "masks") and len(set(self.classes)) < 2:
            raise ValueError(f"classes: a target of {self.target} needs two, got {list(self.classes)}")


@dataclass(frozen=True)
class LinearProbeConfig(FrozenEncoderConfig):
    """Resolved options of a linear probe.

    Attributes:
        samples: Number of voxels that the dense probe draws from each training volume.
        iterations: Number of L-BFGS iterations of the dense probe.
        metric: Metrics of one's own for the dense probe, FILE.py:FUNCTION; name and digest in a record.
    """

    samples: int = 1024
    iterations: int = 60
    metric: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the value of every field."""
        super().__post_init__()
        if self.samples < 16 or self.iterations < 1:
            raise ValueError(
                f"samples must be at least 16 and iterations at least 1, got {self.samples} and "
                f"{self.iterations}"
            )
