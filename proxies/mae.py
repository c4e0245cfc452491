"""Masked autoencoding: restore the hidden blocks of a volume from the few that are seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssl3d.api import (
    BatchRng,
    Encoder,
    Proxy,
    RestoreViews,
    StepOutput,
    UsageError,
    added_option,
    can_mask,
    decode,
    draw_one,
    mirror_counted,
    norm_visible,
    only_visible,
    relative_error,
    restoration_picture,
    restoring_decoder,
    travelling,
    visible_at,
)

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.api import Volume

_LARGEST = 16  # side of a block that is not given, voxels
_PARTS = 4  # blocks along an axis, at least, where it has the voxels


@dataclass
class MAEConfig(RestoreViews):
    """Options of masked autoencoding.

    Attributes:
        block: Sides of the masked blocks along D H W, in voxels. Where none are given, a quarter of the
            crop's side and 16 at most, and with remask at least the encoder's stride.
        ratio: Share of the blocks that are masked.
        masking: Way of hiding blocks: `token` puts a learned value in their place, and the encoder runs as
            ever; `remask` sets masked places to zero again after every convolution and norm of the
            encoder, whose statistics leave them out, and puts learned tokens into its maps for the
            decoder.
        densify_norm: Whether maps pass a batch norm, of visible places alone, before tokens are put into
            them, with masking remask.
        norm_targets: Whether the target of each block is standardised: its values less their mean, over
            their standard deviation. None does it as published: with masking remask, not with token.
        width: Channels of the decoder at half resolution.
        skips: Whether the decoder sees the encoder's shallower maps too, or the deepest one alone.
        decoder: Kind of decoder: light; or unet, the head of `ssl3d finetune --task segmentation`, which
            sees its input too, travels with the encoder and can start that head.
    """

    block: tuple[int, ...] = ()
    ratio: float = 0.75
    masking: Literal["token", "remask"] = "token"
    densify_norm: bool = added_option(True, before=False, only={"masking": "remask"})
    norm_targets: bool | None = None
    width: int = 32
    skips: bool = True
    decoder: Literal["light", "unet"] = "light"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        super().__post_init__()
        if self.block and (len(self.block) != 3 or min(self.block) < 1):
            raise ValueError(f"block needs 3 sizes of at least 1, or none, not {self.block}")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must lie between 0 and 1, not {self.ratio:g}")
        if self.width < 2:
            raise ValueError(f"width must be at least 2, not {self.width}")

    @property
    def standardised(self) -> bool:
        """Whether the targets are standardised."""
        return self.masking == "remask" if self.norm_targets is None else self.norm_targets


class MAE(Proxy):
    """The network must work out what lies in the hidden three quarters of a crop from the rest of it.

    He, Chen, Xie, Li, Dollár, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022; for
    volumes and convolutional networks as in nnssl (Wald et al., arXiv:2412.17041); `remask` after SparK
    (Tian et al., Designing BERT for Convolutional Networks, ICLR 2023).

    Differs from the papers: an encoder of maps instead of tokens, so masked places are computed too; the
    light decoder of all restoring proxies instead of a transformer or a mirrored U-Net, so that they
    compare; blocks scaled to the crop, since crops are small. nnssl puts zeros where something is masked,
    here the value is learned; it turns and zooms a fifth of its crops, here they are mirrored alone. AdamW
    and few steps instead of SGD (nnssl). The loss is theirs: the mean squared error over masked voxels, of
    the background too, since where the body ends is to be worked out as well; `token` takes plain grey
    values as nnssl does, where He et al. standardise patches (`norm_targets true`).

    `remask` has SparK's standardised targets and the norms of its maps (densify norms). Differs from
    SparK: three quarters are masked, not 60 % (`ratio`); deviations are of each channel on its own (there
    of all together) and divide by the number of voxels, not one less; the decoder takes maps through 1 x 1
    x 1 convolutions, not 3 x 3, to sizes by interpolation, not transposed convolutions; a max-pool whose
    windows overlap gives values one place beyond the visible, which SparK masks; a batch norm's statistics
    are each process's own (there of all); AdamW instead of LAMB, and few steps. nnssl's SparK for volumes
    has plain targets and instance norms instead (`norm_targets false` is the first of these).

    `token` is the default: the encoder runs as it will run later, on whole maps, and may be of any kind,
    with blocks of any size. In a small trial (hippocampus MR, blocks of 8 voxels at a stride of 8, 100
    steps, one seed) it restored better than `remask` without norms and standardised targets (relative
    error 0.67 against 0.73) and left better features (balanced accuracy of a linear dense probe 0.86
    against 0.83, untrained 0.76).

    On stacks of thick slices (cardiac cine MR, 10 mm) the defaults left features worse than an untrained
    encoder's, and `block 8 8 8, ratio 0.6` did not (the best of eight settings tried, one seed).

    The metrics count masked voxels of the foreground alone, because background is easily guessed:
    `relative_error` is the squared error divided by that of guessing the mean of what is seen of the
    foreground; `blur_error` the same, divided by that of blurring what is seen into the gaps.
    """

    Config = MAEConfig
    paper: ClassVar[str] = (
        "He, Chen, Xie, Li, Dollár, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022"
    )
    main: ClassVar[str] = "relative_error"
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 8, "lr": 2e-3}

    def __init__(self, config: MAEConfig, encoder: Encoder) -> None:
        """Add the decoder and the tokens.

        Raises:
            UsageError: `remask` with an encoder or blocks that it cannot work on, or a crop of one block.
        """
        super().__init__(config, encoder)
        self.decoder = restoring_decoder(config.decoder, encoder, config.width, config.skips)
        self.tokens = nn.ParameterDict()
        if config.masking == "token":
            self.tokens["input"] = nn.Parameter(torch.zeros(encoder.config.in_channels, 1, 1, 1))
        else:
            if not can_mask(encoder):
                raise UsageError(
                    "masking remask needs a convolutional encoder that takes volumes whole; this "
                    f"{type(encoder).__name__} attends over all places, or takes slices of several axes: "
                    "choose masking token"
                )
            for n in self.decoder.sources:
                token = nn.init.trunc_normal_(torch.empty(encoder.channels[n], 1, 1, 1), std=0.02)
                self.tokens[str(n)] = nn.Parameter(token)
            if config.densify_norm:
                self.norms = nn.ModuleDict(
                    {str(n): nn.BatchNorm3d(encoder.channels[n]) for n in self.decoder.sources}
                )
        self.block_of(config.crop)

    def block_of(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Return the sides (D, H, W) of the masked blocks in a crop of this size.

        Raises:
            UsageError: There would be a single block, or `remask` asks for other ones.
        """
        config, sides = self.config, []
        for axis, length in enumerate(size):
            stride = self.encoder.strides[-1][axis] if config.masking == "remask" else 1
            side = config.block[axis] if config.block else max(1, min(_LARGEST, length // _PARTS))
            if not config.block:
                side = -(-side // stride) * stride
            elif side % stride and side < length:
                raise UsageError(
                    f"block is {side} along {'DHW'[axis]}, masking remask needs multiples of the encoder's "
                    f"stride, {stride}: choose {-(-side // stride) * stride}, or masking token"
                )
            sides.append(min(side, length))
        if all(side >= length for side, length in zip(sides, size, strict=True)):
            raise UsageError(
                f"a crop of {'x'.join(map(str, size))} is a single block of {'x'.join(map(str, sides))}, "
                "nothing would be seen: enlarge crop, or make block smaller (masking token allows any)"
            )
        return (sides[0], sides[1], sides[2])

    @classmethod
    def draw(cls, config: MAEConfig, volume: Volume, rng: np.random.Generator) -> dict[str, Tensor]:
        """Draw one `crop` (C, d, h, w) and its `foreground` (d, h, w).

        Raises:
            DataError: The volume has no foreground.
        """
        return draw_one(config, volume, rng)

    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Mask blocks of the crops (B, C, D, H, W) and restore them."""
        config = self.config
        original, foreground, counted = mirror_counted(config, batch, rng, self.training)
        blocks = Blocks.of(original.shape[2:], self.block_of(original.shape[2:]))
        masked = mask_blocks(blocks, rng, config.ratio)
        seen, maps = self._encode(original, masked)
        predicted = decode(self.decoder, seen, maps)
        with torch.autocast(original.device.type, enabled=False):
            predicted, image = predicted.float(), original.float()
            target = normalise(image, blocks, counted) if config.standardised else image
            asked = masked if counted is None else masked & counted
            error = (predicted - target).square().mean(1, keepdim=True) * asked
            loss = (error.sum((1, 2, 3, 4)) / asked.sum((1, 2, 3, 4)).clamp_min(1)).mean()
            shown = ~masked if counted is None else ~masked & counted
            metrics = self._metrics(predicted.detach(), target, image, asked, shown, foreground, blocks)

        def picture() -> Any:
            filled = predicted.detach()
            if config.standardised:
                mean, deviation = block_statistics(image, blocks, counted)
                filled = filled * deviation + mean
            return restoration_picture(image, seen, torch.where(masked, filled, image))

        return StepOutput(loss, metrics, picture)

    def travels(self) -> dict[str, nn.Module]:
        """Send the decoder along with the encoder, where it can start a segmentation head."""
        return travelling(self.decoder)

    def _encode(self, original: Tensor, masked: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode visible voxels: the input as shown, and maps with tokens where they know nothing."""
        if self.config.masking == "token":
            seen = torch.where(masked, self.tokens["input"].to(original.dtype), original)
            return seen.detach(), self.encoder(seen)
        seen = original.masked_fill(masked, 0)
        with only_visible(self.encoder, ~masked):
            maps = self.encoder(seen)
        for n in self.decoder.sources:
            known = visible_at(~masked, tuple(maps[n].shape[2:]), self.encoder.strides[n])
            if self.config.densify_norm:
                maps[n] = norm_visible(self.norms[str(n)], maps[n], known)
            maps[n] = torch.where(known, maps[n], self.tokens[str(n)].to(maps[n].dtype))
        return seen, maps

    @torch.no_grad()
    def _metrics(
        self,
        predicted: Tensor,
        target: Tensor,
        image: Tensor,
        masked: Tensor,
        shown: Tensor,
        foreground: Tensor,
        blocks: Blocks,
    ) -> dict[str, Tensor]:
        body = foreground.unsqueeze(1)
        asked = masked & body
        mean, blurred = visible_mean(image, shown, body), blur_in(image, shown, blocks)
        if self.config.standardised:  # whoever knows nothing guesses 0 there
            mean, blurred = torch.zeros_like(mean), normalise(blurred, blocks)
        error, guess, blur = (
            ((y - target).square() * asked).sum() for y in (predicted, mean.expand_as(target), blurred)
        )
        return {
            "relative_error": relative_error(error, guess),
            "blur_error": relative_error(error, blur),
            "background": 1 - asked.sum() / masked.sum().clamp_min(1),
        }


class Blocks(NamedTuple):
    """A crop cut into blocks, the last along an axis cut off by its border.

    Attributes:
        size: Size of the crop, (D, H, W).
        side: Sides of a block.
        counts: Numbers of blocks along each axis.
    """

    size: tuple[int, ...]
    side: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, size: Sequence[int], side: Sequence[int]) -> Blocks:
        """Lay blocks of this side over a crop of this size."""
        return cls(tuple(size), tuple(side), tuple(-(-n // s) for n, s in zip(size, side, strict=True)))

    def spread(self, x: Tensor) -> Tensor:
        """Repeat a value per block, (B, C, *counts), at every voxel of the block: (B, C, D, H, W)."""
        for axis, (n, side) in enumerate(zip(self.size, self.side, strict=True)):
            x = x.repeat_interleave(side, axis + 2).narrow(axis + 2, 0, n)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Average (B, C, D, H, W) over every block: (B, C, *counts)."""
        for axis, (n, side, count) in enumerate(zip(self.size, self.side, self.counts, strict=True)):
            of = torch.arange(n, device=x.device) // side
            member = (of == torch.arange(count, device=x.device).unsqueeze(1)).to(x.dtype)
            member = member / member.sum(1, keepdim=True)
            x = (x.movedim(axis + 2, -1) @ member.T).movedim(-1, axis + 2)
        return x


def mask_blocks(blocks: Blocks, rng: BatchRng, ratio: float) -> Tensor:
    """Choose the masked blocks of each example: (B, 1, D, H, W), bool.

    The same number for all, the closest to the ratio that leaves one to see and one to restore.
    """
    total = math.prod(blocks.counts)
    hidden = min(max(round(ratio * total), 1), total - 1)
    chosen = rng.permutation(total) < hidden
    return blocks.spread(chosen.view(-1, 1, *blocks.counts))


def block_statistics(x: Tensor, blocks: Blocks, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the block that each voxel of (B, C, D, H, W) lies in.

    They are those of the voxels that are `counted`, (B, 1, D, H, W); None counts all.
    """

    def average(values: Tensor) -> Tensor:
        if counted is None:
            return blocks.spread(blocks.mean(values))
        share = blocks.mean(counted.to(values.dtype)).clamp_min(1e-12)
        return blocks.spread(blocks.mean(torch.where(counted, values, 0)) / share)

    mean = average(x)
    return mean, (average((x - mean).square()) + 1e-6).sqrt()


def normalise(x: Tensor, blocks: Blocks, counted: Tensor | None = None) -> Tensor:
    """Normalise each block to (x - mean) / deviation, the targets of He et al. that stress texture."""
    mean, deviation = block_statistics(x, blocks, counted)
    return (x - mean) / deviation


def visible_mean(x: Tensor, visible: Tensor, body: Tensor) -> Tensor:
    """Average what is seen of the body, else all that is seen, by example and channel: (B, C, 1, 1, 1)."""
    weight = (visible & body).to(x.dtype)
    weight = torch.where(weight.sum((2, 3, 4), keepdim=True) > 0, weight, visible.to(x.dtype))
    return (x * weight).sum((2, 3, 4), keepdim=True) / weight.sum((2, 3, 4), keepdim=True).clamp_min(1)


def blur_in(x: Tensor, visible: Tensor, blocks: Blocks) -> Tensor:
    """Blur the visible voxels into the gaps: weighted by a Gaussian, divided by the weights there.

    Its standard deviation is a quarter of a block along each axis, the best of 1/4 to 2 blocks on brain
    and heart MR. More than a block from everything visible the mean of the visible takes over.
    """
    known = visible.to(x.dtype)
    mean = (x * known).sum((2, 3, 4), keepdim=True) / known.sum((2, 3, 4), keepdim=True).clamp_min(1)
    both = torch.cat([(x - mean) * known, known], dim=1)
    for axis, (n, side) in enumerate(zip(blocks.size, blocks.side, strict=True)):
        at = torch.arange(n, device=x.device, dtype=x.dtype)
        kernel = torch.exp(-0.5 * ((at[:, None] - at) / (0.25 * side)).square())
        both = (both.movedim(axis + 2, -1) @ kernel).movedim(-1, axis + 2)
    return mean + both[:, :-1] / (both[:, -1:] + 1e-6)
