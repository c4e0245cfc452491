"""What a linear probe is told: target, classes, window, precision."""

from __future__ import annotations

from dataclasses import dataclass

TARGETS = ("classes", "ordinal", "real", "masks")

POOLING = ("none", "mean", "concat")


@dataclass(frozen=True)
class LinearProbeConfig:
    """What is probed, and how.

    Attributes:
        target: classes, ordinal, real or masks.
        classes: Names of the classes in the order of the probabilities; mask values for masks.
        pool_subject: What several volumes of a subject become: one row each (none), the mean of their
            features, or their features side by side (concat).
        window: Largest input of the encoder along D H W; a larger volume is taken window by window, with a
            depth of 1 every slice as an image.
        precision: Of the frozen encoder, 32 or bf16.
        mask_classes: Mask values that the trivial rows of a class task measure; empty: thresholded voxels.
        samples: Voxels per training volume of the dense probe.
        iterations: Of L-BFGS, dense probe.
    """

    target: str = "classes"
    classes: tuple[str, ...] = ()
    pool_subject: str = "none"
    window: tuple[int, int, int] = (128, 256, 256)
    precision: str = "32"
    mask_classes: tuple[int, ...] = ()
    samples: int = 1024
    iterations: int = 60

    def __post_init__(self) -> None:
        """Checks every field."""
        for name, allowed in (
            ("target", TARGETS),
            ("pool_subject", POOLING),
            ("precision", ("32", "bf16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if len(self.window) != 3 or min(self.window) < 1:
            raise ValueError(f"window: expected three sizes from 1, got {self.window}")
        if self.target in ("classes", "masks") and len(set(self.classes)) < 2:
            raise ValueError(f"classes: a {self.target} probe needs two, got {list(self.classes)}")
        if self.samples < 16 or self.iterations < 1:
            raise ValueError("samples must be at least 16 and iterations at least 1")
