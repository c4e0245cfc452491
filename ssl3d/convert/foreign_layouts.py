"""How other toolkits name the weights of networks that ssl3d has: one detector and one map for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ssl3d.convert.foreign_files import WeightsFile, plan_of
from ssl3d.errors import CheckpointError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """Origin of weights, and what follows from it for whoever uses them.

    Attributes:
        title: Short name of the source.
        citation: Citation of the paper.
        expects: Description, for a person, of the volumes that the weights learned from.
        prepare: Options of `ssl3d prepare` that come nearest to that preparation.
        labels_seen: Whether they learned from labels of medical volumes.
        labels: Description of those labels.
    """

    title: str
    citation: str = ""
    expects: str = "not known"
    prepare: dict[str, Any] = field(default_factory=dict)
    labels_seen: bool = False
    labels: str = "not known"


@dataclass(frozen=True)
class Recipe:
    """Architecture and options of our encoder that foreign weights belong to.

    Attributes:
        architecture: Registered name of the encoder.
        config: Options that the weights decide, or their toolkit.
        state: Weights by our names, those of heads and decoders by their own.
        source: Origin of the weights.
        notes: Notes on what could not be known from the file.
        stem: Key of the convolution that reads the volume.
    """

    architecture: str
    config: dict[str, Any]
    state: State
    source: Source
    notes: tuple[str, ...] = ()
    stem: str = "conv1.weight"


@dataclass(frozen=True)
class Layout:
    """Naming of weights that a family of files shares.

    Attributes:
        name: Name for `--layout`.
        files: Description of the files that have it.
        anchor: Key that every such network has; what stands before it in a file is its prefix.
        fits: Function that tells whether tensors without their prefix are such a network.
        recipe: Function that returns our encoder for them.
    """

    name: str
    files: str
    anchor: str
    fits: Callable[[Mapping[str, Tensor]], bool]
    recipe: Callable[[State, WeightsFile], Recipe]


# ResNets ------------------------------------------------------------------------------------------

_DEPTHS = {
    (False, (1, 1, 1, 1)): "resnet10",
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (True, (3, 24, 36, 3)): "resnet200",
}
_RESNET = "layer1.0.conv1.weight"


def _axes(state: Mapping[str, Tensor], key: str) -> int:
    return state[key].ndim if key in state else 0


def _blocks(state: Mapping[str, Tensor], pattern: str) -> dict[int, int]:
    """Count the blocks of each stage by the two numbers that a pattern finds in keys."""
    counts: dict[int, int] = {}
    for key in state:
        match = re.match(pattern, key)
        if match:
            stage, block = int(match[1]), int(match[2])
            counts[stage] = max(counts.get(stage, 0), block + 1)
    return counts


def _resnet(state: Mapping[str, Tensor], where: str) -> tuple[str, dict[str, Any]]:
    """Return the name and options of the ResNet whose weights these are."""
    counts = _blocks(state, r"layer(\d)\.(\d+)\.conv1\.weight$")
    blocks = tuple(counts.get(stage, 0) for stage in range(1, 5))
    deep = "layer1.0.conv3.weight" in state
    name = _DEPTHS.get((deep, blocks))  # type: ignore[arg-type]
    stem = state.get("conv1.weight")
    if name is None or stem is None:
        kind = "bottleneck" if deep else "basic"
        lacks = "" if stem is not None else ", and no conv1.weight (another stem)"
        raise CheckpointError(
            f"{where}: a ResNet of {'-'.join(map(str, blocks))} {kind} blocks{lacks} is none of ssl3d's "
            f"({', '.join(_DEPTHS.values())}); network=NAME makes it of torchvision's or timm's, where 2D"
        )
    options = {
        "width": stem.shape[0],
        "stem_kernel": stem.shape[-1],
        "shortcut": "B" if "layer2.0.downsample.0.weight" in state else "A",
        "stem_pool": True,
    }
    return name, options


_MEDICALNET = Source(
    "MedicalNet",
    "Chen, Ma, Zheng: Med3D: Transfer Learning for 3D Medical Image Analysis. arXiv 1904.00625",
    "grey volumes (CT and MR) at their data set's median spacing, clipped to the 0.5 and 99.5 percentiles, "
    "mean 0 and standard deviation 1 over the voxels above 0",
    {"normalize": "mr"},
    labels_seen=True,
    labels="segmentations of 3DSeg-8 (8 public data sets) or of 23 data sets; which subjects is not known",
)


def _medicalnet(state: State, file: WeightsFile) -> Recipe:
    name, options = _resnet(state, str(file.path))
    notes = ("stages 3 and 4 dilated, as MedicalNet's; dilated=false for a ResNet that strides there",)
    return Recipe(name, {"kind": "3d", "dilated": True, **options}, state, _MEDICALNET, notes)


_MONAI = Source(
    "MONAI or another 3D ResNet",
    "Cardoso et al.: MONAI: An open-source framework for deep learning in healthcare. arXiv 2211.02701",
)


def _monai(state: State, file: WeightsFile) -> Recipe:
    """Move the bias of a shortcut's convolution into the norm after it, which has nothing else to do."""
    name, options = _resnet(state, str(file.path))
    state = dict(state)
    for key in [key for key in state if key.endswith("downsample.0.bias")]:
        mean = key.removesuffix("0.bias") + "1.running_mean"
        if mean in state:
            state[mean] = state[mean] - state.pop(key)
    notes = ("strides as in torchvision's ResNet and no dilation; dilated=true for MedicalNet's",)
    return Recipe(name, {"kind": "3d", **options}, state, _MONAI, notes)


_IMAGENET = Source(
    "a 2D network of torchvision or timm",
    "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016, arXiv 1512.03385; "
    "Russakovsky et al.: ImageNet Large Scale Visual Recognition Challenge. IJCV 2015, arXiv 1409.0575",
    "RGB pictures, each channel of mean 0 and standard deviation 1 over ImageNet",
    labels="of natural images (ImageNet's classes), if it was trained as torchvision and timm train",
)


def _torchvision_resnet(state: State, file: WeightsFile) -> Recipe:
    name, options = _resnet(state, str(file.path))
    return Recipe(name, {"kind": "acs", **options}, state, _IMAGENET)


_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def _sequential(state: State, file: WeightsFile) -> Recipe:
    """Name the numbered children of `nn.Sequential(*list(resnet.children())[:-1])` as a ResNet does."""
    named = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        named[f"{_CHILDREN.get(first, first)}.{rest}"] = value
    name, options = _resnet(named, str(file.path))
    source = Source("a 2D ResNet without its head, as lightly's examples build it", _IMAGENET.citation)
    return Recipe(name, {"kind": "acs", **options}, named, source)


# Other 2D networks --------------------------------------------------------------------------------

_DENSENET = "features.denseblock1.denselayer1.norm1.weight"


def _densenet(state: State, file: WeightsFile) -> Recipe:
    counts = _blocks(state, r"features\.denseblock(\d)\.denselayer(\d+)\.norm1\.weight$")
    layers = [counts.get(n, 1) - 1 for n in (1, 2, 3, 4)]  # counted from 1 in their names
    if layers != [6, 12, 24, 16]:
        shown = "-".join(map(str, layers))
        raise CheckpointError(
            f"{file.path}: a DenseNet with blocks of {shown} layers is none of ssl3d's (densenet121: "
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
    return Recipe("densenet121", options, state, _IMAGENET, stem="features.conv0.weight")


_ALL_STRIDES = ((2, 2, 2),) * 4


def _mobilenet(state: State, file: WeightsFile) -> Recipe:
    options: dict[str, Any] = {"kind": "acs", "stage_strides": _ALL_STRIDES}
    last = state.get("features.18.0.weight")
    if last is not None:
        options["last_channels"] = last.shape[0]
    return Recipe("mobilenet_v2", options, state, _IMAGENET, stem="features.0.0.weight")


_TIMM_STAGES = (1, 2, 3, 4, 3, 3, 1)
_TIMM_MOBILENET = "blocks.1.0.conv_pwl.weight"
_TIMM_PARTS = {  # of a block, by timm's name: torchvision's inside `conv`
    False: {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"},
    True: {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"},
}


def _timm_mobilenet(state: State, file: WeightsFile) -> Recipe:
    """Rename timm's keys to torchvision's names of the same network."""
    if any(".se." in key for key in state) or "blocks.6.0.conv_pwl.weight" not in state:
        raise CheckpointError(
            f"{file.path}: timm's names of a network with inverted residuals that is no MobileNetV2; "
            "network=timm/NAME makes it of timm's"
        )
    before = [1 + sum(_TIMM_STAGES[:n]) for n in range(len(_TIMM_STAGES))]
    ends = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    ends |= {"conv_head": "features.18.0", "bn2": "features.18.1"}
    named = {}
    for key, value in state.items():
        match = re.match(r"blocks\.(\d)\.(\d+)\.(\w+)\.(\w+)$", key)
        module, _, leaf = key.rpartition(".")
        if match and int(match[1]) < len(before):
            stage, block = int(match[1]), int(match[2])
            part = _TIMM_PARTS[stage > 0].get(match[3], match[3])
            named[f"features.{before[stage] + block}.conv.{part}.{match[4]}"] = value
        else:
            named[f"{ends[module]}.{leaf}" if module in ends else key] = value
    return _mobilenet(named, file)


# Models Genesis -----------------------------------------------------------------------------------

_GENESIS = "down_tr64.ops.0.conv1.weight"


def _genesis(state: State, file: WeightsFile) -> Recipe:
    source = Source(
        "Models Genesis",
        "Zhou, Sodha, Rahman Siddiquee, Feng, Tajbakhsh, Gotway, Liang: Models Genesis: Generic "
        "Autodidactic Models for 3D Medical Image Analysis. MICCAI 2019, arXiv 1908.06912",
        "chest CT, clipped to -1000 and 1000 HU and brought to 0 and 1, crops of 64 x 64 x 32 voxels (the "
        "published crops have the axial direction last)",
        {"normalize": "ct"},
        labels="none (restoration of corrupted volumes)",
    )
    options = {"kind": "3d", "width": state[_GENESIS].shape[0]}
    return Recipe("genesis_unet", options, state, source, stem=_GENESIS)


# nnU-Net ------------------------------------------------------------------------------------------

_RESENC = "stem.convs.0.conv.weight"


def _resenc(state: State, file: WeightsFile) -> Recipe:
    """Read nnU-Net's residual encoder: sizes from the weights, strides from the plans."""
    where = str(file.path)
    counts = _blocks(state, r"stages\.(\d+)\.blocks\.(\d+)\.conv1\.conv\.weight$")
    if not counts or sorted(counts) != list(range(len(counts))):
        raise CheckpointError(
            f"{where}: a network of nnU-Net with a stem but no residual stages (stages.N.blocks): only its "
            "residual encoders (ResidualEncoderUNet, ResEncL) can be read"
        )
    firsts = [state[f"stages.{n}.blocks.0.conv1.conv.weight"] for n in range(len(counts))]
    if firsts[0].ndim != 5 or any(f"stages.{n}.blocks.0.conv3.conv.weight" in state for n in counts):
        raise CheckpointError(
            f"{where}: a residual encoder of nnU-Net, but in 2D or with bottleneck blocks"
        )
    widths, kernels = [len(weight) for weight in firsts], [tuple(weight.shape[2:]) for weight in firsts]
    ruled = [min(widths[0] * 2**n, max(widths)) for n in range(len(widths))]
    if widths != ruled or len(state[_RESENC]) != widths[0]:
        raise CheckpointError(
            f"{where}: stages of {', '.join(map(str, widths))} channels; ssl3d's resenc doubles them up to "
            f"a most, which would be {', '.join(map(str, ruled))}"
        )
    plan, place = plan_of(file)
    options: dict[str, Any] = {
        "kind": "3d", "stages": len(widths), "width": widths[0], "max_width": max(widths),
        "blocks": [counts[n] for n in range(len(counts))],
        "conv_bias": "stem.convs.0.conv.bias" in state,
    }  # fmt: skip
    if any(kernel != (3, 3, 3) for kernel in kernels):
        options["kernels"] = [list(kernel) for kernel in kernels]
    notes: tuple[str, ...] = ()
    arch = (plan or {}).get("arch_kwargs")
    strides = arch.get("strides") if isinstance(arch, Mapping) else None
    if isinstance(strides, list | tuple) and len(strides) == len(widths):
        options["strides"] = [
            [stride] * 3 if isinstance(stride, int) else list(stride) for stride in strides
        ]
        notes = (f"strides from the plans {place}",)
    elif plan is not None and plan.get("arch_class_name") in ("ResEncL", "NoSkipResEncL"):
        notes = (f"strides of {plan['arch_class_name']}, as the plans {place} say",)
    else:
        notes = ("no plans beside the file: strides of 1, then 2, assumed; strides=... says otherwise",)
    return Recipe("resenc", options, state, _of_plan(plan, file), notes, stem=_RESENC)


def _of_plan(plan: dict[str, Any] | None, file: WeightsFile) -> Source:
    whole = (plan or {}).get("plan")
    if not isinstance(whole, Mapping):
        return Source(
            "nnU-Net",
            "Isensee et al.: nnU-Net: a self-configuring method for deep learning-based biomedical image "
            "segmentation. Nature Methods 2021",
            "as its plans say: each data set's target spacing, mean 0 and standard deviation 1",
            {"normalize": "mr"},
            labels_seen=True,
            labels="segmentations of nnU-Net's training data",
        )
    configurations = (whole.get("pretrain_plan") or {}).get("configurations") or {}
    first: Any = next(iter(configurations.values()), {}) if isinstance(configurations, Mapping) else {}
    spacing = first.get("spacing") if isinstance(first, Mapping) else None
    known = isinstance(spacing, list | tuple) and len(spacing) == 3
    trainer = str(file.contents.get("trainer_name") or "")
    return Source(
        "nnssl" + (f" ({trainer})" if trainer else ""),
        "Wald et al.: An OpenMind for 3D medical vision self-supervised learning. ICCV 2025, "
        "arXiv 2412.17041",
        "MR of mean 0 and standard deviation 1"
        + (f", spacing {' x '.join(f'{float(v):g}' for v in spacing)} mm" if known and spacing else ""),
        {"normalize": "mr", **({"spacing": [float(v) for v in spacing]} if known and spacing else {})},
        labels="none (self-supervised)",
    )


# All ----------------------------------------------------------------------------------------------


def _is_medicalnet(state: Mapping[str, Tensor]) -> bool:
    return _axes(state, _RESNET) == 5 and not _is_monai(state)


def _is_monai(state: Mapping[str, Tensor]) -> bool:
    heads = ("fc.weight", "layer2.0.downsample.0.bias")
    return _axes(state, _RESNET) == 5 and any(key in state for key in heads)


LAYOUTS = (
    Layout("medicalnet", "Tencent's resnet_*.pth", _RESNET, _is_medicalnet, _medicalnet),
    Layout("monai", "3D ResNets of MONAI, with a head or biased shortcuts", _RESNET, _is_monai, _monai),
    Layout("genesis", "Genesis_Chest_CT.pt", _GENESIS, lambda s: _axes(s, _GENESIS) == 5, _genesis),
    Layout("resenc", "residual encoders of nnU-Net and nnssl", _RESENC, lambda s: True, _resenc),
    Layout(
        "torchvision", "2D ResNets of torchvision and timm, and what lightly and Lightning train of them",
        _RESNET, lambda s: _axes(s, _RESNET) == 4, _torchvision_resnet,
    ),
    Layout("densenet", "DenseNet-121 of torchvision and timm", _DENSENET, lambda s: True, _densenet),
    Layout(
        "mobilenet", "torchvision's MobileNetV2", "features.1.conv.0.0.weight",
        lambda s: "features.2.conv.1.0.weight" in s, _mobilenet,
    ),
    Layout(
        "timm-mobilenet", "timm's mobilenetv2_100", _TIMM_MOBILENET,
        lambda s: "conv_stem.weight" in s, _timm_mobilenet,
    ),
    Layout(
        "sequential", "2D ResNets as a sequence of their children, as in lightly's examples",
        "4.0.conv1.weight",
        lambda s: _axes(s, "4.0.conv1.weight") == 4 and _axes(s, "0.weight") == 4, _sequential,
    ),
)  # fmt: skip

UNREADABLE = (
    ("swinViT.", "MONAI's SwinUNETR"),
    ("encoder.stages.0.0.convs.0", "nnU-Net's PlainConvUNet"),
    ("stages.0.0.convs.0", "nnU-Net's PlainConvUNet"),
    ("eva.blocks.", "a Primus transformer of nnssl"),
    ("patch_embed.", "a vision transformer"),
    ("patch_embedding.", "a vision transformer of MONAI"),
)
"""Names in files that ssl3d cannot read, and whose they are."""
