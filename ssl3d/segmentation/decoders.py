"""Decoders that proxies train beside the encoder: a light one, or the U-Net of segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ssl3d.checkpoint.card import encoder_folder, read_card
from ssl3d.checkpoint.travellers import load_traveller, travellers_of
from ssl3d.checkpoint.weights import state_digest
from ssl3d.encoder import Encoder
from ssl3d.errors import CheckpointError, UsageError
from ssl3d.heads.decoder import Decoder
from ssl3d.segmentation.heads import UNetHead

DECODERS = ("light", "unet")
"""Names that `restoring_decoder` knows."""
_OWN = ("out.", "coarse.")  # layers of the classes, which no proxy has


def restoring_decoder(kind: str, encoder: Encoder, width: int, skips: bool = True) -> Decoder | UNetHead:
    """Build the decoder with which a proxy restores the voxels of its encoder's input.

    Args:
        kind: Kind of decoder: light, or unet, whose weights can start a segmentation head.
        encoder: Encoder whose maps are decoded.
        width: Channels at half resolution.
        skips: Whether the shallower maps are used; a U-Net always does.

    Raises:
        UsageError: A U-Net without skips is asked for, or the kind is unknown.
    """
    if kind == "light":
        return Decoder(encoder, width=width, skips=skips)
    if kind != "unet":
        raise UsageError(f"decoder {kind!r}: is none of {', '.join(DECODERS)}")
    if not skips:
        raise UsageError("decoder unet has skips: leave out skips false, or take decoder light")
    return UNetHead(encoder, encoder.config.in_channels, width)


def decode(decoder: nn.Module, x: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Decode the maps of an input by either decoder: (B, out_channels, D, H, W).

    Args:
        decoder: Decoder of `restoring_decoder`.
        x: Input of the encoder (B, C, D, H, W), which the U-Net sees too.
        maps: Feature maps of the encoder.
    """
    values: Tensor = decoder(x, maps)[0] if isinstance(decoder, UNetHead) else decoder(maps, x.shape[2:])
    return values


def travelling(decoder: nn.Module) -> dict[str, nn.Module]:
    """Return what a proxy's `travels` sends along of its decoder: a U-Net; the light one stays behind."""
    return {"decoder": decoder} if isinstance(decoder, UNetHead) else {}


class PretrainedDecoder(NamedTuple):
    """U-Net that travelled with an encoder.

    Attributes:
        source: Folder of its encoder.
        config: Options of the U-Net.
        state: Weights by name.
        digest: Hash of names and weights.
    """

    source: str
    config: Any
    state: dict[str, Tensor]
    digest: str


def load_decoder(path: str) -> PretrainedDecoder:
    """Load the U-Net that travelled with an encoder.

    Args:
        path: Folder of a run, or of an encoder.

    Raises:
        CheckpointError: No U-Net travelled with it; the message says how one does.
    """
    hint = "pretrain with glcl, or with decoder unet of mae, models_genesis, context_restoration or transvw"
    try:
        folder = encoder_folder(Path(path))
        there = travellers_of(read_card(folder)).get("decoder", {})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: no decoder travelled with it; {hint} ({error})") from error
    if there.get("class") != "unet":
        raise CheckpointError(f"{path}: no decoder travelled with this encoder; {hint}")
    module = load_traveller(folder, "decoder")
    assert isinstance(module, UNetHead)
    state = module.state_dict()
    return PretrainedDecoder(str(path), module.config, state, state_digest(state)[:16])


def start_from(head: nn.Module, decoder: PretrainedDecoder) -> str:
    """Give a segmentation head the weights of a pretrained decoder, all but those of its classes.

    Args:
        head: Head of a segmentation network, a U-Net on an encoder as the decoder's.
        decoder: Decoder to start from.

    Returns:
        Line that says how many tensors came from it, and which are new.

    Raises:
        UsageError: The head is no U-Net, or has other names or shapes; nothing is changed then.
    """
    where = f"init pretrained, {decoder.source}"
    if not isinstance(head, UNetHead):
        raise UsageError(
            f"{where}: its decoder is a U-Net, the head a {type(head).__name__}: choose head unet"
        )
    own = head.state_dict()
    asked = {name for name in own if not name.startswith(_OWN)}
    given = {name: value for name, value in decoder.state.items() if not name.startswith(_OWN)}
    differ = [
        f"{name} {theirs!r} there, {ours!r} here"
        for name in ("width", "norm", "in_channels", "channels", "strides")
        if (theirs := getattr(decoder.config, name)) != (ours := getattr(head.config, name))
    ]
    wrong = sorted((asked ^ set(given)) | {n for n in asked & set(given) if own[n].shape != given[n].shape})
    if differ or wrong:
        raise UsageError(
            f"{where}: the decoder is not the head ({'; '.join(differ) or wrong[0]}; {len(wrong)} of "
            f"{len(asked)} tensors do not match): give the head the decoder's options"
        )
    head.load_state_dict({**own, **given})
    new = sorted({name for name in own if name not in asked})
    return f"{where}: {len(given)} tensors of the head from its decoder, new: {', '.join(new)}"
