"""What `ssl3d convert` does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ssl3d.convert.encoder import ConvertedConfig
from ssl3d.convert.named import save, with_weights
from ssl3d.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ConvertOptions(ConvertedConfig):
    """Makes a 2D network with its weights a 3D encoder, and tells layer by layer what became what.

    Attributes:
        network: A 2D network: torchvision's (resnet18, densenet121, mobilenet_v2, efficientnet_b0, ...),
            timm's as timm/NAME, or efficientnet_lite0.
        out: The folder for the encoder, which pretrain --init, linear-probe and embed take.
        weights: The 2D network's weights: a file (.pth, .safetensors), or the name of one of torchvision's
            versions, as IMAGENET1K_V2. By default they are fetched from torchvision or timm.
        allow_partial: Take the weights that match, however few.
        overwrite: Replace an encoder that is there.
    """

    network: str = dataclasses.field(metadata={"positional": True})
    out: Path = dataclasses.field(kw_only=True)
    weights: str | None = None
    allow_partial: bool = False
    overwrite: bool = False


def run(options: ConvertOptions) -> None:
    """Converts, reports, saves.

    Raises:
        UsageError: The network is unknown or cannot be converted, or there is something at --out.
        CheckpointError: The weights are not to be had, or not the network's.
    """
    if options.out.exists() and not (options.overwrite and (options.out / "encoder.json").is_file()):
        raise UsageError(f"--out {options.out}: exists (--overwrite replaces an encoder)")
    config = ConvertedConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(ConvertedConfig)}
    )
    encoder = with_weights(config, options.weights, options.allow_partial)
    print(encoder.report)
    print()
    print(encoder.match)
    print("\nmap  channels  stride (D, H, W)")
    for n, (channels, stride) in enumerate(zip(encoder.channels, encoder.strides, strict=True)):
        print(f"{n:<3}  {channels:>8}  {' x '.join(map(str, stride))}")
    print(f"encoder in {save(encoder, options.out)}")
