"""Models Genesis: restore crops whose grey values, texture and parts were spoilt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from ssl3d.api import (
    BatchRng,
    Corruptions,
    Encoder,
    Proxy,
    Restorable,
    RestoreViews,
    StepOutput,
    added_option,
    corrupt,
    decode,
    draw_one,
    flip_counted,
    mirror_counted,
    restoration_error,
    restoration_picture,
    restoring_decoder,
    travelling,
)

if TYPE_CHECKING:
    import numpy as np

    from ssl3d.api import Volume


@dataclass
class ModelsGenesisConfig(RestoreViews, Corruptions):
    """Options of the Models Genesis proxy.

    Attributes:
        flip: Probability that input and target are mirrored: of the first time, and of each further one
            after it, with mirror in_turn; along each axis with mirror axes.
        mirror: Way of mirroring: in_turn, up to three times along H, along W or not at all, each as
            likely, which leaves 73 % as they are, as released; or axes, along each of D, H and W on its
            own, which leaves 22 %.
        width: Channels of the decoder at half resolution.
        skips: Whether the decoder sees the encoder's shallower maps too, as in a U-Net.
        decoder: Kind of decoder: light; or unet, the head of `ssl3d finetune --task segmentation`, which
            sees its input too, travels with the encoder and can start that head.
    """

    flip: float = 0.4
    mirror: Literal["in_turn", "axes"] = added_option("in_turn", before="axes")
    width: int = 32
    skips: bool = True
    decoder: Literal["light", "unet"] = "light"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for a value that cannot be used."""
        RestoreViews.__post_init__(self)
        Corruptions.__post_init__(self)
        if self.width < 2:
            raise ValueError(f"width must be at least 2, not {self.width}")


class ModelsGenesis(Proxy):
    """The network must work out what a crop looked like before it was recoloured, shuffled and painted.

    Zhou, Sodha, Pang, Gotway, Liang: Models Genesis, Medical Image Analysis 67, 2021 (arXiv:2004.07882).

    A crop has its voxels shuffled within small blocks, runs through a random curve of its grey values,
    and has noise painted over boxes or over all but boxes; encoder and decoder restore it. Probabilities,
    mirroring, curves and boxes are those of the released code.

    Differs from the paper: its CT lies in one window, brought to [0, 1]; here each crop's own range takes
    the place of that window for curves and noise, the encoder sees the corrupted crop in the grey values
    that the data were prepared to (as it will downstream), and squared errors are divided by the square
    of that range, or by 1 where the range is smaller; so the decoder ends without their sigmoid. Shuffled
    blocks do not overlap, so that no value is lost or doubled. Crops lie anywhere in the body and are drawn
    anew in each step, for any kind of scan, where the released code cuts 32 of each beforehand, away from
    its borders and with 15 % of soft tissue at most, so from the lungs. Crops are 32³ instead of
    64 x 64 x 32, for small scans; any encoder with a light decoder instead of a 3D U-Net, so that proxies
    compare; AdamW and some hundred steps instead of SGD at a rate of 1 until the error on other scans stops
    falling.
    """

    Config = ModelsGenesisConfig
    paper: ClassVar[str] = (
        "Zhou, Sodha, Pang, Gotway, Liang: Models Genesis, Medical Image Analysis 67, 101840, 2021"
    )
    main: ClassVar[str] = "relative_error"
    recipe: ClassVar[dict[str, Any]] = {"batch_size": 16, "lr": 1e-3}

    def __init__(self, config: ModelsGenesisConfig, encoder: Encoder) -> None:
        """Add the decoder that restores crops."""
        super().__init__(config, encoder)
        self.decoder = restoring_decoder(config.decoder, encoder, config.width, config.skips)

    @classmethod
    def draw(
        cls, config: ModelsGenesisConfig, volume: Volume, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Draw one crop: `crop` (C, d, h, w), and its `foreground`.

        Raises:
            DataError: The volume has no foreground.
        """
        return draw_one(config, volume, rng)

    def forward(self, batch: dict[str, Tensor], rng: BatchRng) -> StepOutput:
        """Corrupt the crops and restore them; handing back the input as it came has relative_error 1."""
        original, _, counted = self._mirror(batch, rng)
        corrupted, done = corrupt(self.config, original, rng)
        restored = decode(self.decoder, corrupted, self.encoder(corrupted))
        error = restoration_error(restored, corrupted, original, counted)
        metrics = {
            "relative_error": error.relative,
            "flat_error": error.flat,
            **{f"share_{name}": flags.float().mean() for name, flags in done.items()},
        }
        # The middle slices: what boxes leave of an example lies there rather than at its ends.
        shown = [x[:, :, x.shape[2] // 2, None] for x in (original, corrupted, restored)]
        return StepOutput(error.loss, metrics, lambda: restoration_picture(*shown))

    def travels(self) -> dict[str, nn.Module]:
        """Send the decoder along with the encoder, where it can start a segmentation head."""
        return travelling(self.decoder)

    def _mirror(self, batch: dict[str, Tensor], rng: BatchRng) -> Restorable:
        """Mirror the crops at random while training."""
        config = self.config
        if config.mirror == "axes":
            return mirror_counted(config, batch, rng, self.training)
        return flip_counted(batch, rng, config.flip, self.training)
