"""Folders for timm: the 2D network whose weights an encoder of kind acs or 2.5d holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl3d.convert.config import ConvertedConfig
from ssl3d.convert.foreign_layouts import torchvision_names
from ssl3d.convert.networks import TIMM
from ssl3d.encoder import Encoder
from ssl3d.errors import UsageError
from ssl3d.export.options import ExportOptions
from ssl3d.export.source import TOLERANCE, Source, largest_difference, require_equal, sample
from ssl3d.model import Model

PLANAR = ("acs", "2.5d")
"""Kinds of convolutions whose kernels are those of a 2D network."""
_SAME = {"mobilenet_v2": "mobilenetv2_100"}  # other names of timm's than ours and torchvision's
_INSTEAD = "--to hf takes any encoder"


def write_timm(source: Source, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Write `config.json` and `model.safetensors`, opened again by `timm.create_model`.

    On an image, or a slice by itself, timm's network computes what the encoder computes; its embedding is
    the mean over the deepest map. A classifier of images keeps its last layer.

    Args:
        source: What is exported.
        folder: Folder to write into.
        options: Options of the command, of which `patch` counts.

    Raises:
        UsageError: timm is missing, or has no such network.
        TrainingError: The outputs differ.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError('--to timm: needs timm; pip install "ssl3d[timm]"') from error
    encoder, label = source.encoder, f"--to timm: {source.word}"
    name, size = _architecture(source, label), source.portable().size
    head = _head(source) if size[0] == 1 else None
    _, height, width = options.patch or size
    words: dict[str, Any] = {"in_chans": source.channels}
    if not timm.is_model(name):
        raise UsageError(f"{label}: timm has no {name}; {_INSTEAD}")
    network: Any = timm.create_model(name, num_classes=head.out_features if head else 0, **words)
    _fill(network, _weights(encoder, network), head, label, name)
    step = _stride(network, encoder, label, name)
    classes = [str(kind["name"]) for kind in source.card["classes"]] if head else []
    # What timm's own weights say of themselves holds no more.
    network.pretrained_cfg.update(
        input_size=(source.channels, height, width), mean=(0.0,) * source.channels,
        std=(1.0,) * source.channels, crop_pct=1.0, test_crop_pct=None, test_input_size=None,
        pool_size=None, first_conv=None, tag="ssl3d", url="", hf_hub_id=None, origin_url="",
         paper_ids=None, license=None, num_classes=network.num_classes,
    )  # fmt: skip
    named = {"label_names": classes} if classes else None
    timm.models.save_for_hf(network, str(folder), named, words, safe_serialization=True)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    up, across = (-(-side // step) * step for side in (height, width))
    whole = [(1, up, across), (1, up + step, across)]
    sizes = [(1, height, width), (1, height + 9, width + 5)]
    apart = [_difference(again, source, head, side) for side in (*whole, *sizes)]
    free = max(apart) <= TOLERANCE  # else odd lengths are rounded otherwise, as in a DenseNet
    worst = max(apart if free else apart[: len(whole)])
    require_equal(worst, f"--to timm of {source.word}")
    return {
        "architecture": name,
        "input": {
            "axes": "batch, channel, H, W",
            "H_and_W_multiples_of": 1 if free else step,
            "checked_sizes": [list(side[1:]) for side in (*whole, *(sizes if free else ()))],
        },
        "output": "logits" if head else "embedding",
        "largest_difference": worst,
    }


def _architecture(source: Source, label: str) -> str:
    """Return timm's name of the 2D network whose weights an encoder holds.

    Raises:
        UsageError: The encoder holds no 2D network's weights, or changes what enters it.
    """
    config: Any = source.encoder.config
    kind = getattr(config, "kind", "3d")
    if kind not in PLANAR:
        raise UsageError(
            f"{label}: timm's networks are 2D, and this encoder is of kind {kind}, not "
            f"{' or '.join(PLANAR)}; {_INSTEAD}"
        )
    if isinstance(config, ConvertedConfig):
        if config.stem != "sum" or config.resize != (1, 1, 1):
            raise UsageError(
                f"{label}: volumes enter it by stem {config.stem} and resize {config.resize}, which no "
                f"network of timm's does; {_INSTEAD}"
            )
        name = config.network
    else:
        described = source.card["architecture"]
        name = str(described["name"] if isinstance(source.module, Model) else described)
    return name.removeprefix(TIMM) if name.startswith(TIMM) else _SAME.get(name, name)


def _head(source: Source) -> nn.Linear | None:
    """Return the last layer of a classifier; None of anything else."""
    if not isinstance(source.module, Model):
        return None
    network: Any = source.module.network
    head = getattr(network, "head", None)
    fits = isinstance(head, nn.Linear) and head.out_features == len(source.card["classes"])
    return head if fits and network.encoder is source.encoder else None


def _weights(encoder: Encoder, network: nn.Module) -> dict[str, Tensor]:
    """Return an encoder's weights by timm's names."""
    own = {key.removeprefix("network."): value for key, value in encoder.state_dict().items()}
    if "conv_stem.weight" not in network.state_dict() or "conv_stem.weight" in own:
        return own
    theirs = {ours: key for key, ours in torchvision_names(network.state_dict()).items()}
    return {theirs.get(key, key): value for key, value in own.items()}


def _fill(
    network: nn.Module, weights: dict[str, Tensor], head: nn.Linear | None, label: str, name: str
) -> None:
    """Load weights into timm's network.

    Raises:
        UsageError: It has other weights than the encoder.
    """
    last = network.get_classifier() if head else None  # type: ignore[operator]
    if isinstance(last, nn.Linear) and head is not None:
        where = next(key for key, module in network.named_modules() if module is last)
        weights = {**weights, f"{where}.weight": head.weight.detach(), f"{where}.bias": head.bias.detach()}
    wanted = network.state_dict()
    for key in [*wanted, *weights]:
        shapes = [tuple(state[key].shape) if key in state else "absent" for state in (weights, wanted)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{label}: it is no {name} as timm has it: {key} is {shapes[0]}, there {shapes[1]}; "
                f"{_INSTEAD}"
            )
    network.load_state_dict(weights)
    network.eval()


def _stride(network: Any, encoder: Encoder, label: str, name: str) -> int:
    """Return the total stride of both networks.

    Raises:
        UsageError: They differ.
    """
    own, theirs = encoder.strides[-1][1:], int(network.feature_info[-1]["reduction"])
    if own != (theirs, theirs):
        raise UsageError(
            f"{label}: it strides by {own[0]} x {own[1]} in the plane, timm's {name} by {theirs} x "
            f"{theirs} (options stem_pool, stem_stride and stage_strides of its pretraining); {_INSTEAD}"
        )
    return theirs


def _difference(network: Any, source: Source, head: nn.Linear | None, size: tuple[int, int, int]) -> float:
    """Return the largest difference of maps, embeddings and probabilities of two images of a size."""
    encoder, x = source.encoder, sample(source.channels, size, 2, seed=100)
    picture = x.squeeze(2)
    with torch.no_grad():
        maps, deepest = encoder(x), network.forward_features(picture)
        ours = [maps[-1].squeeze(2), encoder.pool(maps)]
        theirs = [deepest, network.forward_head(deepest, pre_logits=True)]
        if head:
            ours.append(source.portable().network(x))
            theirs.append(network(picture).softmax(dim=1))
    return largest_difference(theirs, ours)
