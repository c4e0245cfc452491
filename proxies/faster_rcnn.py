"""Faster R-CNN: find and name objects in images and slices, with boxes as labels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ssl3d.api import (
    BatchRng,
    Detection2dOptions,
    DetectionPass,
    DetectionProxy2d,
    DetectionTargets,
    evaluating,
    flat_parameters,
    read_number,
    restore_parameters,
    write_number,
)

if TYPE_CHECKING:
    from ssl3d.api import Collection

_ALL = ("encoder", "pyramid", "rpn", "roi", "second")
# What each of the four phases trains.
_TRAINED = {1: ("rpn", "second"), 2: ("encoder", "pyramid", "roi"), 3: ("rpn",), 4: ("roi",)}


@dataclass
class FasterRCNNConfig(Detection2dOptions):
    """Options of Faster R-CNN.

    Attributes:
        training: Order of training: `joint`, both stages at once, or `alternating`, the paper's four
            phases.
        phases: Relative lengths of the four phases; the authors' code has 2 1 2 1.
    """

    min_stride: int = 2
    channels: int = 128
    hidden: int = 512
    proposals: tuple[int, int] = (512, 256)
    roi_samples: int = 128
    training: Literal["joint", "alternating"] = "joint"
    phases: tuple[float, float, float, float] = (2.0, 1.0, 2.0, 1.0)

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if self.training not in ("joint", "alternating"):
            raise ValueError(f"training is {self.training!r}; choose joint or alternating")
        if len(self.phases) != 4 or min(self.phases) <= 0:
            raise ValueError(f"phases needs four positive numbers, not {self.phases}")

    def phase(self, step: int, total: int) -> int:
        """Return the phase, 1 to 4, that a step belongs to."""
        ends = [sum(self.phases[: n + 1]) / sum(self.phases) * total for n in range(3)]
        return 1 + sum(step >= end for end in ends)


class FasterRCNN(DetectionProxy2d):
    """The network must work out where in an image objects lie, and which they are.

    Ren, He, Girshick, Sun: Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks,
    NeurIPS 2015, arXiv 1506.01497; with the pyramid of Lin et al., arXiv 1612.03144.

    Supervised: crops of images, and of slabs of volumes around a slice, with the boxes in them. A region
    proposal network says which anchors hold something, and a second head what it is and where exactly
    (`TwoStageDetector2d`). `joint` training minimises the sum of their losses.

    `alternating` is the paper's: 1. the proposal network with an encoder of its own that starts from the
    same weights; 2. the box head with the shared encoder, on the fixed proposals of the first; 3. a new
    proposal network on the shared encoder, which is frozen from here on; 4. the box head goes on, on
    those proposals. Each gets its share of the steps (`phases`). Parameters that a phase does not train
    keep their values exactly, so no other proxy can learn on this encoder meanwhile; the second encoder
    costs its memory, and frozen weights are kept once more. That does not work with
    sharded parameters (FSDP).

    Differs from the paper: a feature pyramid with group norm and one anchor size per level in place of one
    map and three sizes; RoIAlign in place of RoI pooling; anchors that cross the border are trained too,
    since crops are cut anywhere; the pyramid counts as shared, with the encoder; AdamW instead of SGD, and
    one schedule of the learning rate over all four phases. A pyramid from stride 2 up with 128 channels and
    few proposals are the defaults, for crops of about 100 pixels with objects of 5 to 50.

    The metrics: `recall`, the share of the boxes that one of the 100 best proposals of the first stage
    overlaps by half; on held-out subjects `ap50` too, the average precision at that overlap (of a batch;
    `score_boxes` scores all of a collection together).
    """

    Config = FasterRCNNConfig
    paper: ClassVar[str] = (
        "Ren, He, Girshick, Sun: Faster R-CNN: Towards Real-Time Object Detection with Region Proposal "
        "Networks, NeurIPS 2015, arXiv 1506.01497"
    )
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 8, "lr": 1e-3}
    phase: Tensor
    kept: Tensor
    fresh: Tensor

    def setup(self, data: Collection) -> None:
        """Find the classes, and make the detector; with alternating training the second encoder too.

        Raises:
            DataError: There is no box in all the data.
            UsageError: The encoder's strides leave no map for the pyramid.
        """
        super().setup(data)
        self.second: nn.ModuleDict | None = None
        if self.config.training == "joint":
            return
        pyramid = copy.deepcopy(self.detector.pyramid)
        self.second = nn.ModuleDict({"encoder": copy.deepcopy(self.encoder), "pyramid": pyramid})
        self.register_buffer("phase", torch.tensor(1))
        self.register_buffer("kept", self._flat(_ALL))
        self.register_buffer("fresh", self._flat(("rpn",)))

    def run(self, images: Tensor, targets: DetectionTargets, rng: BatchRng) -> DetectionPass:
        """Train both stages at once, or the part that the phase trains."""
        if self.second is None:
            return super().run(images, targets, rng)
        phase, detector, size = int(read_number(self.phase)), self.detector, images.shape[-2:]
        if phase == 1:
            levels = self._second_levels(images)
            first = detector.propose(levels, size, targets, rng)
            return DetectionPass(first.losses, first.boxes, levels, reads=False)
        if phase == 2:
            with torch.no_grad(), evaluating(self.second):
                first = detector.propose(self._second_levels(images), size)
            levels = detector.levels(self.encoder(images))
            losses = detector.refine(levels, size, first.boxes, targets, rng)
            return DetectionPass(losses, first.boxes, levels)
        with torch.no_grad(), evaluating(self.encoder), evaluating(detector.pyramid):
            levels = detector.levels(self.encoder(images))
        if phase == 3:
            first = detector.propose(levels, size, targets, rng)
            return DetectionPass(first.losses, first.boxes, levels)
        with torch.no_grad():
            first = detector.propose(levels, size)
        return DetectionPass(detector.refine(levels, size, first.boxes, targets, rng), first.boxes, levels)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Take back what weight decay and momentum did to frozen parameters; begin the next phase."""
        if self.second is None:
            return
        phase = int(read_number(self.phase))
        self._restore([part for part in _ALL if part not in _TRAINED[phase]])
        following = self.config.phase(step + 1, total)
        if following == phase:
            return
        if phase < 3 <= following:
            restore_parameters(self._part("rpn"), self.fresh)
        self.kept.copy_(self._flat(_ALL))
        write_number(self.phase, following)

    # ------------------------------------------------------------------------------------------------

    def _second_levels(self, images: Tensor) -> dict[str, Tensor]:
        assert self.second is not None
        return self.detector.levels(self.second["encoder"](images), self.second["pyramid"])  # type: ignore[arg-type]

    def _part(self, name: str) -> nn.Module:
        part = {
            "encoder": self.encoder,
            "pyramid": self.detector.pyramid,
            "rpn": self.detector.rpn,
            "roi": self.detector.roi,
            "second": self.second,
        }[name]
        assert part is not None
        return part

    def _flat(self, parts: tuple[str, ...]) -> Tensor:
        """Return a copy of all parameters of some parts in a row."""
        return torch.cat([flat_parameters(self._part(name)) for name in parts])

    def _restore(self, parts: list[str]) -> None:
        start = 0
        for name in _ALL:
            part = self._part(name)
            end = start + sum(p.numel() for p in part.parameters())
            if name in parts:
                restore_parameters(part, self.kept[start:end])
            start = end
