"""`ssl3d convert`: encoders from 2D networks and other toolkits' checkpoints, and ours for nnU-Net."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ssl3d.convert.config import ConvertedConfig
from ssl3d.errors import UsageError

if TYPE_CHECKING:
    from ssl3d.encoder import Encoder

summary = "make an encoder of a 2D network or of another toolkit's checkpoint, with a report"


@dataclasses.dataclass(frozen=True)
class ConvertOptions(ConvertedConfig):
    """Make an encoder of a 2D network with its weights, or of another toolkit's checkpoint, and report how.

    Attributes:
        network: 2D network: one of torchvision (resnet18, densenet121, mobilenet_v2, efficientnet_b0, ...),
            of timm as timm/NAME, or efficientnet_lite0. Or a file of weights of MedicalNet, Models Genesis,
            nnssl, nnU-Net, MONAI, Merlin, torchvision, timm, lightly or Lightning (.pth, .pt, .ckpt,
            .safetensors), with options after it as in resnet_18.pth:stem_stride=1. Or, with --to, a run or
            an encoder.
        out: Folder for the encoder, which pretrain --init, linear-probe and embed take; with --to nnunet, a
            folder or a .pth file for nnU-Net.
        weights: Weights of the 2D network: a file (.pth, .safetensors), or the name of one of torchvision's
            versions, as IMAGENET1K_V2. By default they are fetched from torchvision or timm.
        layout: Layout of the names in a file of weights: medicalnet, inflated, monai, genesis, resenc,
            plain-unet, swin, vit, torchvision, densenet, mobilenet, timm-mobilenet or sequential. By
            default it is recognised.
        prefix: Beginning of the names of one network among several in a file, as teacher.backbone.
        axes: Order in which a file's network saw the axes of volumes, such as xyz (as NIfTI holds them),
            where you know better than what is known of its layout. Its 3D kernels are turned to z y x.
        labels_seen: Whether a file's weights learned from labels of medical volumes, where you know better
            than what is known of its layout.
        to: Toolkit to write for: nnunet writes a run's resenc or plain_unet encoder for nnU-Net's
            fine-tuning.
        patch: Crop size D H W in voxels that --to nnunet recommends downstream.
        allow_partial: Permission to take the weights that match, however few.
        overwrite: Permission to replace an encoder that is there.
    """

    network: str = dataclasses.field(metadata={"positional": True})
    out: Path = dataclasses.field(kw_only=True)
    weights: str | None = None
    layout: str | None = None
    prefix: str | None = None
    axes: str | None = None
    labels_seen: bool | None = None
    to: Literal["nnunet"] | None = None
    patch: tuple[int, int, int] = (160, 160, 160)
    allow_partial: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check what is for 2D networks; the encoder that a file belongs to checks its own options."""
        if self.to is None and not self.reads_file():
            super().__post_init__()

    def reads_file(self) -> bool:
        """Tell whether `network` is another toolkit's file."""
        from ssl3d.specs import is_foreign

        return is_foreign(self.network) or self.layout is not None


def main(argv: Sequence[str]) -> int:
    """Convert, report what became of every layer, and save an encoder folder."""
    from ssl3d.config import parse

    parsed = parse("ssl3d convert", ConvertOptions, argv)
    run(parsed.options, parsed.given)
    return 0


def run(options: ConvertOptions, given: Collection[str] = ()) -> None:
    """Convert a network as the options say, report, and save it.

    Args:
        options: Options of the command.
        given: Names of the options that the user gave.

    Raises:
        UsageError: The network is unknown or cannot be converted, or there is something at --out.
        CheckpointError: The weights cannot be had, or are not the network's.
    """
    if options.to is not None:
        _export(options)
        return
    for name in {"patch"} & set(given):
        raise UsageError(f"--{name}: is an option of --to nnunet only")
    if options.out.exists() and not (options.overwrite and (options.out / "encoder.json").is_file()):
        raise UsageError(f"--out {options.out}: exists (--overwrite replaces an encoder)")
    if options.reads_file():
        _foreign(options, given)
        return
    for name in {"prefix", "axes", "labels_seen"} & set(given):
        raise UsageError(
            f"--{name.replace('_', '-')}: is an option of a file of weights, not of {options.network}"
        )
    config = ConvertedConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(ConvertedConfig)}
    )
    from ssl3d.convert.named import save, with_weights

    encoder = with_weights(config, options.weights, options.allow_partial)
    print(encoder.report)
    print()
    print(encoder.match)
    _print_maps(encoder)
    print(f"encoder in {save(encoder, options.out)}")


def _foreign(options: ConvertOptions, given: Collection[str]) -> None:
    """Convert a file of another toolkit, report, and save the encoder."""
    from ssl3d.convert.foreign import load_foreign, save_foreign
    from ssl3d.specs import fields_of, file_and_words

    if options.weights is not None:
        raise UsageError(f"--weights: {options.network} is a file of weights itself")
    file, words = file_and_words(options.network)
    fields: dict[str, Any] = fields_of(words)
    shared = {field.name for field in dataclasses.fields(ConvertedConfig)} - {"network"}
    fields = {name: getattr(options, name) for name in shared & set(given)} | fields
    own: dict[str, Any] = {"allow_partial": options.allow_partial}
    for name in ("layout", "prefix", "network", "axes", "labels_seen", "allow_partial"):
        if name != "network" and name in given:
            own[name] = getattr(options, name)
        if name in fields:
            own[name] = fields.pop(name)
    loaded = load_foreign(file, fields, **own)
    print(loaded)
    _print_maps(loaded.encoder)
    print(f"encoder in {save_foreign(loaded, options.out)}")


def _export(options: ConvertOptions) -> None:
    """Export an encoder of ours for nnU-Net."""
    from ssl3d.convert.nnunet import CHECKPOINT, PLAN, export_nnunet
    from ssl3d.specs import IMAGENET, SCRATCH, encoder_from

    if options.network.startswith((SCRATCH, IMAGENET)):
        raise UsageError(f"--to {options.to}: {options.network} is no trained encoder")
    file = options.out if options.out.suffix == ".pth" else options.out / CHECKPOINT
    for place in (file, file.parent / PLAN):
        if place.exists() and not options.overwrite:
            raise UsageError(f"--out {options.out}: {place} exists (--overwrite replaces it)")
    encoder = encoder_from(options.network)
    written = export_nnunet(encoder, options.out, options.patch)
    numbers = sum(parameter.numel() for parameter in encoder.parameters())
    print(f"{options.network}: {numbers:,} numbers as encoder.* of nnU-Net's network")
    print(f"checkpoint in {written}, plan in {written.parent / PLAN}")


def _print_maps(encoder: Encoder) -> None:
    print("\nmap  channels  stride (D, H, W)")
    for n, (channels, stride) in enumerate(zip(encoder.channels, encoder.strides, strict=True)):
        print(f"{n:<3}  {channels:>8}  {' x '.join(map(str, stride))}")
