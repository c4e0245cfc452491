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
        training: `joint`: both stages at once; `alternating`: the paper's four phases.
        phases: Lengths of the four phases, in proportion; the authors' code has 2 1 2 1.
    """

    min_stride: int = 2
    channels: int = 128
    hidden: int = 512
    proposals: tuple[int, int] = (512, 256)
    roi_samples: int = 128
    training: Literal["joint", "alternating"] = "joint"
    phases: tuple[float, float, float, float] = (2.0, 1.0, 2.0, 1.0)

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if self.training not in ("joint", "alternating"):
            raise ValueError(f"training is {self.training!r}; choose joint or alternating")
        if len(self.phases) != 4 or min(self.phases) <= 0:
            raise ValueError(f"phases needs four positive numbers, not {self.phases}")

    def phase(self, step: int, total: int) -> int:
        """Which phase, 1 to 4, a step belongs to."""
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
    costs its memory, and frozen weights are kept once more. Not for sharded parameters (FSDP).

    Differs from the paper: a feature pyramid with group norm and one anchor size per level in place of
    one map and three sizes; RoIAlign in place of RoI pooling; the pyramid counts as shared, with the
    encoder; one schedule of the learning rate runs over all four phases. A pyramid from stride 2 up with
    128 channels and few proposals are the defaults, for crops of about 100 pixels with objects of 5 to
    50.

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
        """Finds the classes, and makes the detector; with alternating training the second encoder too.

        Raises:
            DataError: There is no box in all the data.
            UsageError: The encoder's strides do not serve.
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
        """Both stages at once, or what the phase trains."""
        if self.second is None:
            return super().run(images, targets, rng)
        phase, detector, size = int(self.phase), self.detector, images.shape[-2:]
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
        """Takes back what weight decay and momentum did to frozen parameters; begins the next phase."""
        if self.second is None:
            return
        phase = int(self.phase)
        self._restore([part for part in _ALL if part not in _TRAINED[phase]])
        following = self.config.phase(step + 1, total)
        if following == phase:
            return
        if phase < 3 <= following:
            _fill(self._parameters_of("rpn"), self.fresh)
        self.kept.copy_(self._flat(_ALL))
        self.phase.fill_(following)

    # ------------------------------------------------------------------------------------------------

    def _second_levels(self, images: Tensor) -> dict[str, Tensor]:
        assert self.second is not None
        return self.detector.levels(self.second["encoder"](images), self.second["pyramid"])  # type: ignore[arg-type]

    def _parameters_of(self, part: str) -> list[nn.Parameter]:
        module = {
            "encoder": self.encoder,
            "pyramid": self.detector.pyramid,
            "rpn": self.detector.rpn,
            "roi": self.detector.roi,
            "second": self.second,
        }[part]
        assert module is not None
        return list(module.parameters())

    def _flat(self, parts: tuple[str, ...]) -> Tensor:
        """All parameters of some parts in a row."""
        return torch.cat([p.detach().reshape(-1) for part in parts for p in self._parameters_of(part)])

    def _restore(self, parts: list[str]) -> None:
        at = 0
        for part in _ALL:
            parameters = self._parameters_of(part)
            length = sum(p.numel() for p in parameters)
            if part in parts:
                _fill(parameters, self.kept[at : at + length])
            at += length


def _fill(parameters: list[nn.Parameter], values: Tensor) -> None:
    at = 0
    for parameter in parameters:
        parameter.copy_(values[at : at + parameter.numel()].view_as(parameter))
        at += parameter.numel()
