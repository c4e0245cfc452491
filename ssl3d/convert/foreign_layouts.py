"""How other toolkits name the weights of networks that ssl3d has: one detector and one map for each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ssl3d.convert import foreign_nnunet as nnunet
from ssl3d.convert import foreign_resnets as resnets
from ssl3d.convert import foreign_transformers as transformers
from ssl3d.convert.foreign_recipe import Layout, Place, Recipe, Source, State, axes_of, blocks
from ssl3d.convert.foreign_resnets import IMAGENET, RESNET
from ssl3d.errors import CheckpointError

# Other 2D networks --------------------------------------------------------------------------------


def _assumed(whose: str, example: str) -> tuple[str, ...]:
    return (
        f"strides and pools as in torchvision's {whose}; network=NAME makes it of another with these names "
        f"(such as {example})",
    )


_DENSENET = "features.denseblock1.denselayer1.norm1.weight"


def _densenet(state: State, place: Place) -> Recipe:
    counts = blocks(state, r"features\.denseblock(\d)\.denselayer(\d+)\.norm1\.weight$")
    layers = [counts.get(n, 1) - 1 for n in (1, 2, 3, 4)]  # counted from 1 in their names
    if layers != [6, 12, 24, 16]:
        shown = "-".join(map(str, layers))
        raise CheckpointError(
            f"{place}: a DenseNet with blocks of {shown} layers is none of ssl3d's (densenet121: "
            "6-12-24-16); network=NAME makes it of torchvision's or timm's"
        )
    growth = state["features.denseblock1.denselayer1.conv2.weight"].shape[0]
    options = {
        "kind": "acs",
        "width": state["features.conv0.weight"].shape[0],
        "growth": growth,
        "bottleneck": state["features.denseblock1.denselayer1.conv1.weight"].shape[0] // growth,
        "stem_pool": True,
    }
    return Recipe(
        "densenet121", options, state, IMAGENET, assumed=_assumed("DenseNet", "timm/densenetblur121d"),
        stem="features.conv0.weight",
    )  # fmt: skip


_ALL_STRIDES = ((2, 2, 2),) * 4


def _mobilenet(state: State, place: Place) -> Recipe:
    options: dict[str, Any] = {"kind": "acs", "stage_strides": _ALL_STRIDES}
    last = state.get("features.18.0.weight")
    if last is not None:
        options["last_channels"] = last.shape[0]
    return Recipe(
        "mobilenet_v2", options, state, IMAGENET, assumed=_assumed("MobileNetV2", "mobilenet_v2"),
        stem="features.0.0.weight",
    )  # fmt: skip


_TIMM_STAGES = (1, 2, 3, 4, 3, 3, 1)
_TIMM_MOBILENET = "blocks.1.0.conv_pwl.weight"
_TIMM_PARTS = {  # of a block, by timm's name: torchvision's inside `conv`
    False: {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"},
    True: {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"},
}


def _timm_mobilenet(state: State, place: Place) -> Recipe:
    """Rename timm's keys to torchvision's names of the same network."""
    if any(".se." in key for key in state) or "blocks.6.0.conv_pwl.weight" not in state:
        raise CheckpointError(
            f"{place}: timm's names of a network with inverted residuals that is no MobileNetV2; "
            "network=timm/NAME makes it of timm's"
        )
    names = torchvision_names(state)
    return _mobilenet({names[key]: value for key, value in state.items()}, place)


def torchvision_names(keys: Iterable[str]) -> dict[str, str]:
    """Return torchvision's name of each weight of timm's MobileNetV2; of other names themselves."""
    before = [1 + sum(_TIMM_STAGES[:n]) for n in range(len(_TIMM_STAGES))]
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    ends |= {"conv_head": "features.18.0", "bn2": "features.18.1"}
    names = {}
    for key in keys:
        match = re.match(r"blocks\.(\d)\.(\d+)\.(\w+)\.(\w+)$", key)
        module, _, leaf = key.rpartition(".")
        if match and int(match[1]) < len(before):
            stage, block = int(match[1]), int(match[2])
            part = _TIMM_PARTS[stage > 0].get(match[3], match[3])
            names[key] = f"features.{before[stage] + block}.conv.{part}.{match[4]}"
        else:
            names[key] = f"{ends[module]}.{leaf}" if module in ends else key
    return names


# Models Genesis -----------------------------------------------------------------------------------

_GENESIS = "down_tr64.ops.0.conv1.weight"


def _genesis(state: State, place: Place) -> Recipe:
    source = Source(
        "Models Genesis",
        "Zhou, Sodha, Rahman Siddiquee, Feng, Tajbakhsh, Gotway, Liang: Models Genesis: Generic "
        "Autodidactic Models for 3D Medical Image Analysis. MICCAI 2019, arXiv 1908.06912",
        "chest CT, clipped to -1000 and 1000 HU and brought to 0 and 1, crops of 64 x 64 x 32 voxels along "
        "x y z, x to the left and y to the back",
        {"normalize": "ct"},
        labels="none (restoration of corrupted volumes)",
    )
    options = {"kind": "3d", "width": state[_GENESIS].shape[0]}
    return Recipe("genesis_unet", options, state, source, stem=_GENESIS, axes="xyz")


# All ----------------------------------------------------------------------------------------------

LAYOUTS = (
    Layout("medicalnet", "Tencent's resnet_*.pth", RESNET, resnets.is_medicalnet, resnets.medicalnet),
    Layout(
        "inflated", "2D ResNets inflated to 3D: Merlin's, Astra's", RESNET, resnets.is_inflated,
        resnets.inflated,
    ),
    Layout(
        "monai", "3D ResNets of MONAI, and others without a name", RESNET,
        lambda s, place: axes_of(s, RESNET) == 5, resnets.monai,
    ),
    Layout(
        "genesis", "Genesis_Chest_CT.pt", _GENESIS, lambda s, place: axes_of(s, _GENESIS) == 5, _genesis
    ),
    Layout(
        "resenc", "residual encoders of nnU-Net and nnssl", nnunet.RESENC, lambda s, place: True,
        nnunet.resenc,
    ),
    Layout(
        "plain-unet", "plain encoders of nnU-Net (PlainConvUNet)", nnunet.PLAIN, lambda s, place: True,
        nnunet.plain,
    ),
    Layout(
        "swin", "the encoder of MONAI's SwinUNETR", transformers.SWIN, transformers.is_swin,
        transformers.swin,
    ),
    Layout("vit", "MONAI's ViT", transformers.VIT, lambda s, place: True, transformers.vit),
    Layout(
        "torchvision", "2D ResNets of torchvision and timm, and what lightly and Lightning train of them",
        RESNET, lambda s, place: axes_of(s, RESNET) == 4, resnets.torchvision,
    ),
    Layout(
        "densenet", "DenseNet-121 of torchvision and timm", _DENSENET, lambda s, place: True, _densenet
    ),
    Layout(
        "mobilenet", "torchvision's MobileNetV2", "features.1.conv.0.0.weight",
        lambda s, place: "features.2.conv.1.0.weight" in s, _mobilenet,
    ),
    Layout(
        "timm-mobilenet", "timm's mobilenetv2_100", _TIMM_MOBILENET,
        lambda s, place: "conv_stem.weight" in s, _timm_mobilenet,
    ),
    Layout(
        "sequential", "2D ResNets as a sequence of their children, as in lightly's examples",
        "4.0.conv1.weight",
        lambda s, place: axes_of(s, "4.0.conv1.weight") == 4 and axes_of(s, "0.weight") == 4,
        resnets.sequential,
    ),
)  # fmt: skip
