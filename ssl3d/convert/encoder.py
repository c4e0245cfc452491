"""Converted 2D networks as encoders like any other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl3d.convert import networks
from ssl3d.convert.config import ConvertedConfig
from ssl3d.convert.network import feature_network
from ssl3d.convert.report import Report
from ssl3d.convert.weights import Match, load_matching
from ssl3d.encoder import Encoder
from ssl3d.encoders.convolutional import average_pool
from ssl3d.errors import UsageError

Triple = tuple[int, int, int]


class ConvertedEncoder(Encoder):
    """A 2D network, of ImageNet perhaps, as a 3D encoder: ACS, I3D, P3D, 2.5D or in three planes.

    Its feature maps are the last before each of the network's strides and the deepest; they are found in
    its graph, and what comes after them is taken out. An input of depth 1 is an image: `acs`, `soft-acs`,
    `2.5d`, `p3d` and `triplanar` then compute what the 2D network computes (so that an image teaches the
    mixture of `soft-acs` nothing). Where a size is no multiple of
    the strides, the last cells are partly empty. `triplanar` averages each plane's maps over as many
    slices as a cell has voxels, and lays the three planes' channels side by side; of an image it has one
    plane only, three times.

    Volumes enter as they are: networks of ImageNet want pictures of mean 0 and standard deviation 1, over
    all pictures, and that is what prepared volumes have.

    Differs from torchvision: untrained grouped kernels begin with the variance that keeps the signal's.

    Attributes:
        network: The converted network, with the 2D network's parameter names.
        match: Counts of the numbers that came from a file of weights; None without one.
    """

    Config = ConvertedConfig
    paper = (
        "Yang, Huang, He, Xu, Yang, Xu, Ni: Reinventing 2D Convolutions for 3D Images. IEEE JBHI 2021, "
        "arXiv 1911.10477 (acs, soft-acs, 2.5d); Carreira, Zisserman: Quo Vadis, Action Recognition? CVPR "
        "2017, arXiv 1705.07750 (i3d); Qiu, Yao, Mei: Learning Spatio-Temporal Representation with "
        "Pseudo-3D Residual Networks. ICCV 2017, arXiv 1711.10305 (p3d)"
    )
    match: Match | None = None

    def __init__(
        self,
        config: ConvertedConfig | None = None,
        state: Mapping[str, Tensor] | None = None,
        where: str = "",
        least: float = 1.0,
    ):
        """Build the network, and load weights where they are given.

        Args:
            config: Options of the converted network.
            state: Weights of the 2D network, for RGB images, from `read_state`; those of its head are
                not needed. None: its own random weights.
            where: Name of the file of weights, for messages.
            least: Least share of the numbers that must match.

        Raises:
            UsageError: The network is unknown or cannot be an encoder.
            CheckpointError: The weights are not this network's.
        """
        super().__init__()
        self.config = config = config or ConvertedConfig()
        net = networks.network_2d(config.network)
        kind = "2.5d" if config.kind == "triplanar" else config.kind
        if state is not None:
            plain, _ = feature_network(net, "2.5d", allow=config.allow)
            keys = set(plain.state_dict())
            self.match = load_matching(net, state, where, keys, least)
        else:
            networks.keep_the_signal(net)
        entering = {"sum": config.in_channels, "rgb": 3, "slices-as-rgb": 3 * config.in_channels}[
            config.stem
        ]
        if config.stem == "slices-as-rgb":
            networks.tripled_stem(net, config.in_channels)
        elif config.stem == "sum":
            networks.replace_stem(net, config.in_channels)
        self.network, maps = feature_network(
            net, kind, strides=config.strides, axis=config.axis, depth_padding=config.depth_padding,
            allow=config.allow, channels=entering,
        )  # fmt: skip
        self.network.report.kind = config.kind
        steps = config.strides or tuple((reduction.factor,) * 3 for reduction in maps.reductions)
        strides = maps.with_strides(steps)
        self.kept = tuple(
            n
            for n, stride in enumerate(strides)
            if all(s % r == 0 for s, r in zip(stride, config.resize, strict=True))
        )
        if len(strides) - 1 not in self.kept:
            raise UsageError(
                f"resize {config.resize} must divide the network's total stride {strides[-1]} along D, H, W"
            )
        planes = 3 if config.kind == "triplanar" else 1
        self.channels = tuple(planes * maps.channels[n] for n in self.kept)
        self.strides = tuple(_divided(strides[n], config.resize) for n in self.kept)
        self.embed_dim = self.channels[-1]
        self._inner = tuple(strides[n] for n in self.kept)

    @property
    def report(self) -> Report:
        """Report of the conversion, layer by layer."""
        report: Report = self.network.report
        return report

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the feature maps of (B, C, D, H, W), shallow to deep."""
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"the encoder takes (B, {self.config.in_channels}, D, H, W), got {tuple(x.shape)}"
            )
        if self.config.resize != (1, 1, 1):
            factors = (1 if x.shape[2] == 1 else self.config.resize[0], *self.config.resize[1:])
            size = [n * factor for n, factor in zip(x.shape[2:], factors, strict=True)]
            x = F.interpolate(x, size, mode="trilinear")
        if self.config.kind != "triplanar":
            return self._of(self._entering(x, 2))
        if x.shape[2] == 1:
            return [torch.cat([m, m, m], 1) for m in self._of(self._entering(x, 2))]
        planes = [self._plane(x, axis) for axis in (2, 3, 4)]
        return [torch.cat(maps, 1) for maps in zip(*planes, strict=True)]

    def prefers_channels_last(self, device: torch.device | str) -> bool:
        """Return True: slices are folded into the batch, which costs a copy otherwise."""
        return True

    def _of(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.network(x)
        return [maps[n] for n in self.kept]

    def _entering(self, x: Tensor, axis: int) -> Tensor:
        """Prepare the network's input for slices that follow one another along an axis."""
        if self.config.stem == "rgb":
            return x.expand(-1, 3, -1, -1, -1)
        if self.config.stem == "sum":
            return x
        places = torch.arange(x.shape[axis], device=x.device)
        neighbours = [
            x.index_select(axis, (places + step).clamp(0, len(places) - 1)) for step in (-1, 0, 1)
        ]
        # Channel by channel, each as R, G, B.
        return torch.stack(neighbours, 2).flatten(1, 2)

    def _plane(self, x: Tensor, axis: int) -> list[Tensor]:
        """Compute the maps of the slices across an axis, brought to the same places along it."""
        slices = self._entering(x, axis).movedim(axis, 1)
        placed = []
        maps = self._of(slices.flatten(0, 1).unsqueeze(2))
        for map_, stride in zip(maps, self._inner, strict=True):
            volume = map_.squeeze(2).unflatten(0, slices.shape[:2]).movedim(1, axis)
            cell = [1, 1, 1]
            cell[axis - 2] = stride[axis - 2]
            placed.append(average_pool(volume, (cell[0], cell[1], cell[2]), False))
        return placed


def _divided(stride: Triple, factors: Triple) -> Triple:
    return (stride[0] // factors[0], stride[1] // factors[1], stride[2] // factors[2])
