"""Options of a converted 2D network; read without torch."""

from __future__ import annotations

from dataclasses import dataclass

CONVOLUTIONS = ("acs", "soft-acs", "i3d", "2.5d", "p3d")
KINDS = (*CONVOLUTIONS, "triplanar")

STEMS = ("sum", "rgb", "slices-as-rgb")


@dataclass(frozen=True)
class ConvertedConfig:
    """Options of a converted 2D network.

    Attributes:
        network: Name of a 2D network: torchvision's (resnet18, densenet121, mobilenet_v2, efficientnet_b0,
            ...), timm's as timm/NAME, or efficientnet_lite0.
        kind: Kind of conversion. The 2D convolutions become acs (a third of the kernels in each plane),
            soft-acs (all in all planes, with a learned mixture), i3d (inflated to full 3D kernels), 2.5d
            (every slice by itself) or p3d (2D kernels, then depth kernels that begin as the identity);
            triplanar runs the 2D network itself on the slices of all three planes and lays the maps side
            by side.
        in_channels: Number of channels of the volumes.
        stem: Way in which volumes enter a network for RGB images: sum (the kernels of R, G and B added up,
            so that a volume is a grey picture), rgb (one channel repeated, or three as they are),
            slices-as-rgb (the slice below, the slice itself and the one above are R, G and B).
        strides: Strides along D H W of every place where the network strides, from the image on; a pool
            whose stride becomes 1 is left out. Empty: the network's own, on all axes. A ResNet has five
            such places: its first convolution, its pool, and stages 2 to 4.
        resize: Whole factors by which volumes are enlarged (trilinearly) along D H W before they enter;
            maps that would be finer than the volume are not given out. An image keeps its depth of 1.
        axis: Axis D, H or W along which i3d inflates the kernels.
        depth_padding: Continuation of the volume beyond its first and last slice: zeros, or replicate.
        allow: Names of layers without a counterpart in 3D that may work on every slice by itself.
    """

    network: str = "resnet18"
    kind: str = "acs"
    in_channels: int = 1
    stem: str = "sum"
    strides: tuple[tuple[int, int, int], ...] = ()
    resize: tuple[int, int, int] = (1, 1, 1)
    axis: str = "D"
    depth_padding: str = "zeros"
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the value of every field."""
        for field, choices in (
            ("kind", KINDS),
            ("stem", STEMS),
            ("axis", ("D", "H", "W")),
            ("depth_padding", ("zeros", "replicate")),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is {getattr(self, field)!r}; choose {', '.join(choices)}")
        if self.in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, not {self.in_channels}")
        if self.stem == "rgb" and self.in_channels not in (1, 3):
            raise ValueError(
                f"stem rgb takes 1 channel or 3, not in_channels {self.in_channels}: choose sum"
            )
        for step in (*self.strides, self.resize):
            field = "resize" if step is self.resize else "strides"
            if len(step) != 3 or min(step) < 1:
                raise ValueError(f"{field} needs whole numbers of at least 1 along D, H and W, got {step}")
            if field == "strides" and self.kind == "triplanar" and len(set(step)) > 1:
                raise ValueError(f"strides of triplanar must be equal along D, H and W, got {step}")
