"""Options of fine-tuning for segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssl3d.api import Views


@dataclass
class SegmentationConfig(Views):
    """Options of segmentation; those of augmentation act on image and mask alike.

    Attributes:
        head: Decoder on the encoder: unet (U-shaped, with a skip of the input at full resolution), med3d
            (transposed convolutions on the deepest map), denseaspp (dilated convolutions) or linear
            (1x1x1, for frozen encoders).
        init: Weights that the unet head starts from: new; or pretrained, those of the decoder that came
            with each encoder, all but the layers of the classes, for a head of its width and norm.
            Networks from scratch start from new ones.
        width: Channels of the head at half resolution, planned if not given: 16, or more for many classes;
            32 gives med3d its 256 and 128 channels.
        head_norm: Normalisation in the head: batch, group or instance; group learns several times slower.
        deep_supervision: Whether the coarser steps of the unet head are trained too; the finer steps then
            refine their predictions.
        patch: Size D H W of training crops and prediction windows, voxels; no larger than the largest
            volume, and planned from shapes and spacing if not given.
        slicewise: Whether to segment slice by slice, with the encoder as a 2D network (crops of depth 1);
            planned if not given: where voxels are more than 3 times as long along D as in the plane.
        oversample: Share of the crops that are centred on a voxel of a class, each class with equal
            probability.
        axes: Axes 0 to 2 (D H W) along which crops are turned, rotated, stretched and shifted; if not
            given, all but those with long voxels or few of them.
        flip_axes: Axes along which crops are mirrored, with probability `flip`, and predictions with
            `mirror`; if not given, those of `axes` along which no class lies on a fixed side of another or
            of the volume: mirrored along H, the anterior and posterior hippocampus had a Dice of 0.3 after
            120 steps, else 0.8.
        classes: Mask values that count, 0 first; found in the masks if not given. Others are background.
        ignore: Mask value of voxels without an annotation, left out of the loss and of every score; -1 if
            there is none, and by default nnU-Net's `ignore` of each data set.
        sparse_slices: Number of annotated slices per volume, chosen along D once per volume; 0 for all.
            Training and the choice of the step see these alone; test subjects are scored on all slices.
        sparse_choice: Choice of the annotated slices: random (among those with objects) or equidistant; the
            slices of a smaller number are among those of a larger one.
        sparse_seed: Seed of the choice of slices, beside the name of the volume.
        batch_dice: Whether the soft Dice is taken over the whole batch, not averaged over its crops;
            planned if not given: over the batch for slices and for patches that show less than a quarter of
            a volume.
        dice_background: Whether background counts in the soft Dice.
        ce_weight: Weight of the cross-entropy in the loss.
        dice_weight: Weight of the soft Dice in the loss.
        overlap: Share of a prediction window that the next one covers too.
        windows: Number of windows predicted at a time.
        mirror: Whether to average predictions over copies mirrored along `flip_axes`: 8 times the work for
            three axes.
        tolerance: Tolerance of the surface Dice, mm; 0 for 1 mm, or the largest voxel side if that is more.
        metric: Metrics of your own beside Dice, FILE.py:FUNCTION.
        stages: Number of stages; with 2, a coarse network finds the region in the shrunk volume, and a
            fine one segments it.
        coarse: Size D H W of the shrunk volume for the coarse stage, voxels.
        margin: Margin m on each side of the region, as a share of its sides, in prediction; U(0, 2 m) in
            training.
    """

    head: Literal["unet", "med3d", "denseaspp", "linear"] = "unet"
    init: Literal["new", "pretrained"] = "new"
    width: int | None = None
    head_norm: Literal["batch", "group", "instance"] = "instance"
    deep_supervision: bool = True
    patch: tuple[int, int, int] | None = None
    slicewise: bool | None = None
    oversample: float = 1 / 3
    axes: tuple[int, ...] | None = None
    flip_axes: tuple[int, ...] | None = None
    classes: tuple[int, ...] = ()
    ignore: int | None = None
    sparse_slices: int = 0
    sparse_choice: Literal["random", "equidistant"] = "random"
    sparse_seed: int = 0
    batch_dice: bool | None = None
    dice_background: bool = False
    ce_weight: float = 1.0
    dice_weight: float = 1.0
    overlap: float = 0.5
    windows: int = 4
    mirror: bool = False
    tolerance: float = 0.0
    metric: tuple[str, ...] = ()
    stages: Literal[1, 2] = 1
    coarse: tuple[int, int, int] = (32, 32, 32)
    margin: float = 0.15
    chance: float = 0.3
    rotate: float = 20.0
    scale: float = 0.25
    contrast: float = 0.2
    noise: float = 0.1
    low_resolution: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        for name in ("patch", "coarse"):
            size = getattr(self, name)
            if size is not None and (len(size) != 3 or min(size) < 1):
                raise ValueError(f"{name} needs three sizes D H W of at least 1, not {size}")
        for name, least in (("width", 2), ("windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is too small: {value}")
        if not 0 <= self.oversample <= 1:
            raise ValueError(f"oversample is a share, 0 to 1, not {self.oversample:g}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, not {self.overlap:g}")
        for name in ("axes", "flip_axes"):
            if any(axis not in (0, 1, 2) for axis in getattr(self, name) or ()):
                raise ValueError(f"{name} are 0, 1 and 2 for D, H and W, not {getattr(self, name)}")
        for name in ("sparse_slices", "ce_weight", "dice_weight", "tolerance", "margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name):g}")
        if self.ce_weight + self.dice_weight == 0:
            raise ValueError("ce_weight and dice_weight are both 0: there is no loss")
        if self.classes and (self.classes[0] != 0 or len(set(self.classes)) < 2 or min(self.classes) < 0):
            raise ValueError(f"classes begin with 0, the background, and name another: not {self.classes}")
        if self.ignore in self.classes:
            raise ValueError(f"ignore: {self.ignore} is one of the classes {self.classes} too")
        if self.torchio:
            raise ValueError("torchio: its transforms do not move masks here; use the other augmentations")
        if self.init == "pretrained" and self.head != "unet":
            raise ValueError(
                f"init pretrained needs head unet, whose weights decoders have, not {self.head}"
            )
        if self.slicewise and self.stages == 2:
            raise ValueError("slicewise: a coarse stage finds regions of volumes, not of slices")
